"""A point to be moved, by an environment with the habits of other people's, and short trainings on it."""

import itertools
import json
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import gymnasium
import numpy as np
import pytest
from gymnasium.spaces import Box, Dict, Discrete, Sequence
from running import Killed, replaced_advance, run_directory

import dst_td3

GENERATORS = ("MT19937", "PCG64DXSM", "Philox", "SFC64")
RANDOMNESS_OF_ITS_OWN = itertools.count()
OBSERVATIONS = {
    "dictionary": Dict({"place": Box(-10, 10, (2,)), "number": Discrete(3)}),
    "large": Box(-60_000, 60_000, (50,), np.float16),
    "sequence": Dict({"positions": Sequence(Box(-1, 1, (2,)))}),
    "image": Box(0, 1, (8, 8, 3)),
}
ACTIONS = {
    "double bounds": Box(np.array([-0.1, -1 / 3]), np.array([0.4, 1 / 3]), dtype=np.float64),
    "half bounds": Box(np.float16(-0.1), np.float16(1 / 3), (2,), np.float16),
    "wide": Box(-1e38, 1e38, (2,), np.float64),
    "widest": Box(-3.4e38, 3.4e38, (2,), np.float64),
    "beyond": Box(-1e100, 1e100, (2,), np.float64),
    "unbounded": Box(-np.inf, np.inf, (1,)),
    "whole": Box(-5, 5, (2,), np.int32),
    "nothing": Box(-1, 1, (0,)),
    "discrete": Discrete(3),
}


class Point(gymnasium.Env):
    """A point to be moved to the origin in 50 steps, by an environment with the habit that it is made with."""

    def __init__(self, habit: str = "", pull: float = 1.0):
        if habit == "cannot start":
            raise KeyError("a file is missing")
        self.habit, self.pull, self.episodes = habit, pull, 0
        self.place = np.zeros(2, np.float32)
        self.observation_space = OBSERVATIONS.get(habit, Box(-10, 10, (2,), np.float32))
        self.action_space = ACTIONS.get(habit, Box(-1, 1, (2,), np.float32))

    def _observe(self):
        given = self.place if self.habit == "aliases" else self.place.copy()
        others = {
            "list": given.tolist(),
            "dictionary": {"place": given, "number": 1},
            "large": np.full(50, 3000, np.float16),
            "short": given[:1],
            "long": np.zeros(3),
            "text": "here",
            "no observation": None,
            "huge": [10**400, 0],
        }
        if self.habit == "beyond single" and self.steps == 3:
            return np.array([0, 1e39])
        if self.habit == "observation not finite" and self.steps == 5:
            return np.array([np.nan, 1], np.float32)
        if self.habit == "first not finite" and self.episodes > 1 and self.steps == 0:
            return np.array([0, np.nan], np.float32)
        return others.get(self.habit, given)

    def _seed(self, seed):
        if self.habit == "RandomState":
            self._np_random = np.random.RandomState(seed)
        elif self.habit == "other generator":
            self._np_random = __import__("random").Random(seed)
        elif self.habit in GENERATORS:
            self._np_random = np.random.Generator(getattr(np.random, self.habit)(seed))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None or self.episodes == 0:
            self._seed(seed)
        draw = self.np_random
        self.place[:] = [draw.uniform(-1, 1), 0.5 if self.habit == "other generator" else draw.normal()]
        if self.habit == "randomness of its own":
            self.place[:] = next(RANDOMNESS_OF_ITS_OWN)
        self.steps, self.episodes = 0, self.episodes + 1
        if self.habit == "reset raises" and self.episodes == 4:
            raise RuntimeError("the arm\nis stuck")
        return self._observe() if self.habit == "one value" else (self._observe(), {})

    def step(self, action):
        assert not self.habit.endswith("bounds") or self.action_space.contains(action), f"{action} is out of bounds"
        assert action.dtype == self.action_space.dtype
        if self.habit == "changes actions":
            action *= 0.1
            np.clip(action, -0.05, 0.05, out=action)
        else:
            action = (0.1 * action).clip(-0.05, 0.05)
        self.place[:] = (self.place + self.pull * action).clip(-10, 10)
        self.steps += 1
        reward = -float(np.abs(self.place).sum()) * (self.episodes if self.habit == "scales" else 1)
        done = self.steps == 50 and self.habit != "endless"
        if self.habit == "raises" and self.steps == 5:
            raise RuntimeError("the arm\nis stuck")
        if self.habit == "four values":
            return self._observe(), reward, done, {}
        rewards = {"reward of one": np.array([reward]), "no reward": None, "reward beyond single": 1e40}
        if self.habit == "reward not finite" and self.steps == 5:
            reward = np.nan
        reward = rewards.get(self.habit, reward)
        done = {"two ends": np.array([done, done]), "half an end": 0.5}.get(self.habit, done)
        return self._observe(), reward, done, False, {}


class Still(gymnasium.Env):
    """A point that does not move, in episodes of some steps."""

    observation_space, action_space = Box(-1, 1, (3,), np.float32), Box(-1, 1, (2,), np.float32)

    def __init__(self, reward: float = 0.0, length: int = 10):
        self.reward, self.length = reward, length

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return np.zeros(3, np.float32), {}

    def step(self, action):
        self.steps += 1
        return np.zeros(3, np.float32), self.reward, self.steps == self.length, False, {}


gymnasium.register("Point-v0", entry_point=Point)
gymnasium.register("Point-v1", entry_point=Point, max_episode_steps=50)

# A run of a second that still evaluates, adapts and writes checkpoints several times.
TRAINING = ("--env", "Point-v0", "--hidden", "16", "16", "--engine", "masked", "--learning-starts", "200")
TRAINING += ("--total-timesteps", "400", "--eval-interval", "100", "--eval-episodes", "2", "--adapt-interval", "50")
TRAINING += ("--checkpoint-interval", "100")


def habit(name: str) -> tuple[str, str]:
    """Return the option that gives the point a habit."""
    return "--env-kwargs", json.dumps({"habit": name})


def trained(command_line: Callable, results: Path, *further: object) -> tuple[Path, str]:
    """Train on the point; return the run's directory and what was on screen."""
    code, output, error = command_line(*TRAINING, *further, "--results-dir", results)
    assert (code, error) == (0, "")
    return run_directory(results), output


@contextmanager
def killed_at(step: int):
    """Kill the run in this process before it takes the step after ``step``."""

    def mortal(run: dst_td3.Run, advance: Callable) -> None:
        if run.step == step:
            raise Killed
        advance(run)

    with replaced_advance(mortal), pytest.raises(Killed):
        yield
