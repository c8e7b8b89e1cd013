"""What other people's environments may do to an agent: it learns what happened, or the run says why it cannot."""

import gymnasium
import numpy as np
import pytest
from conftest import assert_same_bytes, run_directory


class Point(gymnasium.Env):
    """A point to be moved to the origin, which may alias its observations and change the actions it is given."""

    observation_space = gymnasium.spaces.Box(-10, 10, (2,), np.float32)
    action_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)

    aliases = changes_actions = False

    def __init__(self):
        self.place = np.zeros(2, np.float32)

    def _observation(self) -> np.ndarray:
        return self.place if self.aliases else self.place.copy()

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place[:] = self.np_random.uniform(-1, 1, 2)
        self.steps = 0
        return self._observation(), {}

    def step(self, action):
        if not self.changes_actions:
            action = action.copy()
        action *= 0.1
        self.place += action
        self.steps += 1
        return self._observation(), -float(np.abs(self.place).sum()), False, self.steps == 50, {}


gymnasium.register("Point-v0", entry_point=Point)


def trained(command_line, results):
    """Train on the point and return the run's directory."""
    arguments = ("--env", "Point-v0", "--hidden", 16, 16, "--engine", "masked", "--learning-starts", 200)
    more = ("--total-timesteps", 600, "--eval-interval", 200, "--eval-episodes", 2, "--adapt-interval", 100)
    code, _, error = command_line(*arguments, *more, "--results-dir", results)
    assert code == 0, error
    return run_directory(results)


@pytest.mark.parametrize("habit", ["aliases", "changes_actions"])
def test_an_agent_learns_from_copies_of_what_an_environment_changes_later(command_line, tmp_path, monkeypatch, habit):
    plain = trained(command_line, tmp_path / "plain")
    monkeypatch.setattr(Point, habit, True)
    assert_same_bytes(plain, trained(command_line, tmp_path / "changing"))
