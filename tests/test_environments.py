"""Other people's environments, files and pipes: what is learned is what happened, or one line says why it cannot."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import gymnasium
import numpy as np
import pytest
from conftest import (
    PROGRAM,
    REPEATED,
    Killed,
    assert_refused,
    assert_same_bytes,
    before_step,
    replaced_advance,
    rows_of,
    run_directory,
)
from gymnasium.spaces import Box, Dict, Discrete

import dst_td3
import watch
from dst_sac import SACArguments
from dst_td3 import Arguments
from sparse_engine.sac import SparseSACEngine
from sparse_engine.td3 import SparseEngine

GENERATORS = ("MT19937", "PCG64DXSM", "Philox", "SFC64")


class Point(gymnasium.Env):
    """A point to be moved to the origin in 50 steps, by an environment with the habits that it is made with."""

    observation_space, action_space = Box(-10, 10, (2,), np.float32), Box(-1, 1, (2,), np.float32)

    def __init__(self, habit: str = "", pull: float = 1.0):
        self.habit, self.pull, self.episodes = habit, pull, 0
        self.place = np.zeros(2, np.float32)
        if habit == "double bounds":
            self.action_space = Box(np.array([-0.1, -1 / 3]), np.array([0.4, 1 / 3]), dtype=np.float64)
        if habit == "half bounds":
            self.action_space = Box(np.float16(-0.1), np.float16(1 / 3), (2,), np.float16)
        if habit == "dictionary":
            self.observation_space = Dict({"place": Box(-10, 10, (2,)), "number": Discrete(3)})
        if habit == "large":
            self.observation_space = Box(-60_000, 60_000, (50,), np.float16)
        for name, bound in (("widest", 3.4e38), ("beyond", 1e100), ("wide", 1e38)):
            if habit == name:
                self.action_space = Box(-bound, bound, (2,), np.float64)
        if habit == "whole":
            self.action_space = Box(-5, 5, (2,), np.int32)
        if habit == "nothing":
            self.action_space = Box(-1, 1, (0,))

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
        self.steps, self.episodes = 0, self.episodes + 1
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
        if self.habit == "raises" and self.steps == 7:
            raise RuntimeError("the arm\nis stuck")
        if self.habit == "four values":
            return self._observe(), reward, done, {}
        reward = {"reward of one": np.array([reward]), "no reward": None}.get(self.habit, reward)
        return self._observe(), reward, np.array([done, done]) if self.habit == "two ends" else done, False, {}


gymnasium.register("Point-v0", entry_point=Point)
gymnasium.register("Point-v1", entry_point=Point, max_episode_steps=50)

TRAINING = ("--env", "Point-v0", "--hidden", "16", "16", "--engine", "masked", "--learning-starts", "200")
TRAINING += ("--total-timesteps", "600", "--eval-interval", "200", "--eval-episodes", "2", "--adapt-interval", "100")
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


def transitions_of(args: Arguments, steps: int) -> dst_td3.Batch:
    """Return what the buffer holds after so many steps of uniform actions."""
    run = dst_td3.Run(args)
    for _ in range(steps):
        run.advance()
    return run.buffer.batch(np.arange(steps))


# --- Data -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["aliases", "changes actions"])
def test_an_agent_learns_from_copies_of_what_an_environment_changes_later(command_line, tmp_path, name):
    plain, _ = trained(command_line, tmp_path / "plain")
    assert_same_bytes(plain, trained(command_line, tmp_path / "changing", *habit(name))[0])
    args = Arguments(env="Point-v0", hidden=(8, 8), sparsity=0.5, engine="masked", results_dir=tmp_path)
    expected = transitions_of(args, 120)
    changing = dst_td3.dataclasses.replace(args, env_kwargs=habit(name)[1])
    for given, right in zip(transitions_of(changing, 120), expected, strict=True):
        np.testing.assert_array_equal(given, right)
    moved = expected.next_observation - expected.observation
    np.testing.assert_allclose(moved, (0.1 * expected.action).clip(-0.05, 0.05), atol=1e-6)


@pytest.mark.parametrize("engine", ["masked", "sparse"])
@pytest.mark.parametrize("name", ["double bounds", "half bounds"])
def test_actions_are_of_the_spaces_type_and_within_its_bounds(command_line, tmp_path, name, engine):
    """The environment asserts it; float32 rounds 0.1 up."""
    trained(command_line, tmp_path, *habit(name), "--engine", engine)


@pytest.mark.parametrize("name", ["RandomState", *GENERATORS])
def test_every_generator_of_numpy_goes_on_after_a_kill(command_line, tmp_path, name):
    unbroken, _ = trained(command_line, tmp_path / "unbroken", *habit(name))
    with killed_at(430):
        trained(command_line, tmp_path / "killed", *habit(name))
    assert_same_bytes(unbroken, trained(command_line, tmp_path / "killed", *habit(name))[0])


def test_a_generator_that_is_not_numpys_is_refused_before_training(command_line, tmp_path):
    code, _, error = command_line(*TRAINING, *habit("other generator"), "--results-dir", tmp_path)
    assert code == 2 and "not from a generator of numpy" in error and error.count("\n") == 1, error
    assert not list(tmp_path.iterdir())


def test_large_observations_are_finite_though_their_sum_is_not(command_line, tmp_path):
    with np.errstate(over="ignore"):
        assert not np.isfinite(np.full(50, 3000, np.float16).sum())
    trained(command_line, tmp_path, *habit("large"))
    env = dst_td3.make_environment("Point-v0", habit("large")[1])
    observation, _ = env.reset(seed=0)
    assert observation.dtype == np.float32 and (observation == 3000).all()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("wide", "has actions in Box(-1e+38, 1e+38, (2,), float64): needed are real numbers within bounds below 4e+09"),
        ("widest", "needed are real numbers within bounds below 4e+09"),
        ("beyond", "needed are real numbers within bounds below 4e+09"),
        ("whole", "has actions in Box(-5, 5, (2,), int32): needed are real numbers"),
        ("nothing", "needed is a vector of real numbers"),
    ],
)
def test_actions_that_cannot_be_learned_are_refused(command_line, tmp_path, name, expected):
    code, _, error = command_line(*TRAINING, *habit(name), "--results-dir", tmp_path)
    assert (
        code == 2 and expected in error and error.count("\n") == 1 and error.startswith("dst_td3.py: error: Point-v0")
    )
    assert not list(tmp_path.iterdir())


def test_dictionaries_are_flattened_which_is_said(command_line, tmp_path):
    _, output = trained(command_line, tmp_path, *habit("dictionary"))
    assert "observations of Point-v0 are flattened to 5 numbers\n" in output
    observation, _ = dst_td3.make_environment("Point-v0", habit("dictionary")[1]).reset(seed=0)
    np.testing.assert_array_equal(observation[:3], [0, 1, 0])  # keys in order: the number one of three, then the place
    _, output = trained(command_line, tmp_path / "plain")
    assert "flattened" not in output


def test_arguments_of_the_environment_are_named_and_used(command_line, tmp_path):
    given = '{"terminate_when_unhealthy": false}'
    args = Arguments(env="Hopper-v4", env_kwargs=given, results_dir=tmp_path)
    assert dst_td3.run_name(dst_td3.resolve(args)) == "ds-td3_env-kwargs=terminate_when_unhealthy=false"
    short = ("--env", "Hopper-v4", "--total-timesteps", 300, "--learning-starts", 200, "--eval-episodes", 1)
    more = ("--engine", "masked", "--hidden", 8, 8, "--env-kwargs", given, "--results-dir", tmp_path)
    code, _, error = command_line(*short, *more)
    assert code == 0, error
    run = run_directory(tmp_path)
    assert "_env-kwargs=terminate_when_unhealthy=false_" in f"{run.parent.name}_"
    assert {float(row["length_mean"]) for row in rows_of(run / "evaluations.csv")} == {1000}  # it falls much earlier
    assert watch.finished_run(run).env_kwargs == given


@pytest.mark.parametrize("given", ["{", "[1]", "3", "null", "", '{"unknown": 1}', '{"pull": "x"}'])
def test_bad_arguments_of_the_environment_are_refused(command_line, tmp_path, given):
    code, _, error = command_line(*TRAINING, "--env-kwargs", given, "--results-dir", tmp_path)
    if given == '{"pull": "x"}':  # which fails at its first step, in the environment's own code
        assert code == 1 and error.startswith("Traceback") and "Point-v0 failed with" in error.splitlines()[-1]
        return
    expected = "environment Point-v0 cannot be made" if "unknown" in given else "--env-kwargs must be JSON in braces"
    assert code == 2 and expected in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


MALFORMED = {
    "short": "] as an observation: needed are 2 finite numbers",
    "long": "Point-v0 returned [0. 0. 0.] as an observation: needed are 2 finite numbers",
    "text": "Point-v0 returned here as an observation: needed are 2 finite numbers",
    "huge": "Point-v0 returned [1000",
    "no observation": "Point-v0 returned None as an observation: needed are 2 finite numbers",
    "beyond single": "Point-v0 returned [0.e+00 1.e+39] as an observation: needed are 2 finite numbers",
    "first not finite": "Point-v0 returned [ 0. nan] as an observation: needed are 2 finite numbers",
    "one value": "Point-v0 returned [",
    "four values": "Point-v0 returned (array(",
    "reward of one": "Point-v0 returned (array([-",
    "no reward": "Point-v0 returned (None, False, False) as reward, terminated, truncated: needed are 3 finite",
    "two ends": "array([False, False]), False) as reward, terminated, truncated",
}


@pytest.mark.parametrize("engine", ["masked", "sparse"])
@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_data_is_named_in_one_line(command_line, tmp_path, name, engine):
    code, _, error = command_line(*TRAINING, *habit(name), "--engine", engine, "--results-dir", tmp_path)
    expected = " ".join(MALFORMED[name].split())
    assert code == 1 and expected in error and error.count("\n") == 1, error
    assert not list(tmp_path.rglob("checkpoint.npz")) and not list(tmp_path.rglob("policy.npz"))


def test_what_gymnasiums_own_wrappers_meet_is_one_line_too(command_line, tmp_path):
    """An environment with a time limit is wrapped, and the wrapper is the first to meet four values."""
    code, _, error = command_line(*TRAINING, "--env", "Point-v1", *habit("four values"), "--results-dir", tmp_path)
    assert code == 1 and error.count("\n") == 1, error
    assert "Point-v1 failed with ValueError: not enough values to unpack (expected 5, got 4)" in error


def test_a_list_is_an_observation(command_line, tmp_path):
    plain, _ = trained(command_line, tmp_path / "plain")
    assert_same_bytes(plain, trained(command_line, tmp_path / "list", *habit("list"))[0])


def test_an_exception_of_the_environment_keeps_its_traceback(command_line, tmp_path):
    code, _, error = command_line(*TRAINING, *habit("raises"), "--results-dir", tmp_path)
    *traceback, line = error.splitlines()
    assert code == 1 and traceback[0].startswith("Traceback") and 'raise RuntimeError("the arm' in error
    assert line.endswith("Point-v0 failed with RuntimeError: the arm is stuck; the command goes on from 0")


@pytest.mark.parametrize("length", [0, 1, 3, 100])
def test_the_sparse_engine_reads_no_further_than_an_observation(length):
    widths, rng, bounds = [2, 8, 8, 4], np.random.default_rng(0), (-np.ones(2), np.ones(2))
    layers = dst_td3.initial_layers(widths, dst_td3.count_connections(widths, 0.5), rng)
    critics = dst_td3.initial_layers([4, 8, 8, 1], dst_td3.count_connections([4, 8, 8, 1], 0.5), rng, (2,))
    numbers = {"batch_size": 4, "learning_rate": 1e-3, "weight_decay": 0, "gamma": 0.99, "tau": 0.1}
    numbers |= {"drop_fraction": 0.1}
    for observation in (np.zeros(length, np.float32), np.zeros((2, 1), np.float32)):
        with pytest.raises(ValueError, match=r"an observation has shape .*, not \(2,\)"):
            SparseSACEngine(layers, critics, bounds, **numbers).outputs(observation)
        with pytest.raises(ValueError, match=r"an observation has shape .*, not \(2,\)"):
            SparseEngine(layers, critics, bounds, policy_noise=0.2, noise_clip=0.5, **numbers).act(observation)


def test_a_policy_takes_any_array_and_refuses_another_size(command_line, tmp_path):
    run, _ = trained(command_line, tmp_path)
    act = dst_td3.load_policy(run / "policy.npz", "Point-v0")
    expected = act(np.array([0.25, -0.5], np.float32))
    for given in ([0.25, -0.5], (0.25, -0.5), np.array([0.25, -0.5]), np.array([-0.5, 0.25])[::-1]):
        np.testing.assert_array_equal(act(given), expected)
    for other in ([0.25], [0, 0, 0], 1.0, np.zeros((1, 2))):
        with pytest.raises(dst_td3.InputError, match="takes 2 observations, not"):
            act(other)


def test_a_policy_of_another_environment_does_not_act_first(command_line, tmp_path):
    layers = dst_td3.initial_layers([2, 4, 1], [8, 4], np.random.default_rng(0))  # one action would be broadcast to two
    dst_td3.save_policy(tmp_path / "one.npz", layers, (-np.ones(1, np.float32), np.ones(1, np.float32)), "Point-v0")
    layers = dst_td3.initial_layers([3, 4, 2], [12, 8], np.random.default_rng(0))
    dst_td3.save_policy(tmp_path / "three.npz", layers, (-np.ones(2, np.float32), np.ones(2, np.float32)), "Point-v0")
    for name, expected in (("one", "does not have the 2 actions of Point-v0"), ("three", "takes 3 observations")):
        given = ("--initial-policy", tmp_path / f"{name}.npz", "--results-dir", tmp_path / "results")
        code, _, error = command_line(*TRAINING, *given)
        assert code == 2 and expected in error and error.count("\n") == 1
        assert not (tmp_path / "results").exists()


# --- Episodes ---------------------------------------------------------------------------------------------------------
def test_an_environment_without_a_time_limit_is_named(command_line, tmp_path):
    said = "Point-v{} has no time limit: an episode, and so an evaluation, ends only where it says so itself\n"
    assert said.format(0) in trained(command_line, tmp_path / "0")[1]
    assert "no time limit" not in trained(command_line, tmp_path / "1", "--env", "Point-v1")[1]


def test_state_kept_between_episodes_is_noticed_after_a_kill(command_line, tmp_path):
    unbroken, output = trained(command_line, tmp_path / "unbroken", *habit("scales"))
    assert "differs from the one made before a kill" not in output

    killed = (*TRAINING, *habit("scales"), "--checkpoint-interval", 250, "--results-dir", tmp_path / "killed")
    with killed_at(430):
        command_line(*killed)
    code, output, error = command_line(*killed)
    assert code == 0, error
    (line,) = (line for line in output.splitlines() if "differs from the one made before a kill" in line)
    assert line.startswith("step 400: this evaluation") and "keeps state from one episode" in line
    run = run_directory(tmp_path / "killed")
    assert json.loads((run / "config.json").read_text())["evaluated_otherwise"] == [{"step": 400}]
    assert (run / "evaluations.csv").read_bytes() != (unbroken / "evaluations.csv").read_bytes()


def test_an_evaluation_that_is_made_again_alike_is_not_noted(command_line, tmp_path):
    with killed_at(430):
        trained(command_line, tmp_path, "--checkpoint-interval", 250)
    run, output = trained(command_line, tmp_path)
    assert "differs" not in output and "evaluated_otherwise" not in json.loads((run / "config.json").read_text())


# --- Processes --------------------------------------------------------------------------------------------------------
@contextmanager
def started(*arguments: object, **options):
    """Start a training on this file's point in a process of its own, which has ended in the end."""
    paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(PROGRAM), *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": paths, "PYTHONWARNINGS": "ignore"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    with subprocess.Popen(command, env=environment, text=True, **pipes) as process:
        try:
            yield process
        finally:
            process.kill()


ENDLESS = ("--env", "test_environments:Point-v0", *TRAINING[2:], *habit("endless"))


def read_until(process: subprocess.Popen, words: str) -> str:
    """Return the first line of a process's standard output that has some words."""
    for line in process.stdout:
        if words in line:
            return line
    raise AssertionError(process.stderr.read())


def test_the_first_interrupt_says_what_stops_and_the_second_stops(tmp_path):
    with started(*ENDLESS, "--results-dir", tmp_path) as process:
        read_until(process, "no time limit")
        time.sleep(0.5)  # the first evaluation has begun, and never ends
        process.send_signal(signal.SIGINT)
        said = "stopping after this evaluation and episode; again stops now and goes on from step 0\n"
        assert process.stderr.readline() == said
        time.sleep(0.5)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == -signal.SIGINT and process.stderr.read() == ""


LONG = ("--env", "test_environments:Point-v0", *TRAINING[2:], "--total-timesteps", "1500")


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> Path:
    """The folder of a run that nothing disturbed."""
    results = tmp_path_factory.mktemp("unbroken")
    with started(*LONG, "--results-dir", results) as process:
        output, error = process.communicate()
    assert process.returncode == 0 and error == "", output + error
    return run_directory(results)


def finish(results: Path, unbroken: Path) -> None:
    """Give the same command again and require the bytes of the unbroken run."""
    assert list(results.rglob("checkpoint.npz")) and not list(results.rglob("policy.npz"))
    with started(*LONG, "--results-dir", results) as process:
        output, error = process.communicate()
    assert process.returncode == 0 and "step 0 of" not in output.splitlines()[0], output + error
    assert_same_bytes(run_directory(results), unbroken)


def test_a_reader_that_goes_away_costs_no_checkpoint(tmp_path, unbroken):
    """As ``| head -3`` does."""
    with started(*LONG, "--results-dir", tmp_path) as process:
        head = subprocess.run(["head", "-3"], stdin=process.stdout, capture_output=True, text=True)
        process.stdout.close()
        error = process.stderr.read()
        assert process.wait(timeout=60) == 128 + signal.SIGPIPE and head.stdout.count("\n") == 3
        assert error.startswith("stopping after this evaluation and episode") and error.count("\n") == 1
    finish(tmp_path, unbroken)


def test_an_interrupt_without_a_reader_costs_no_checkpoint(tmp_path, unbroken):
    """As Ctrl-C does after ``2>&1 | tee log``, which it ends first."""
    with started(*LONG, "--results-dir", tmp_path, stderr=subprocess.STDOUT) as process:
        read_until(process, "step         0")
        process.send_signal(signal.SIGINT)
        process.stdout.close()
        assert process.wait(timeout=60) == 128 + signal.SIGINT
    finish(tmp_path, unbroken)


def test_a_reader_of_little_wants_no_more(tmp_path):
    """``--describe`` and a finished run print, and end by the same code as others do there."""
    with started("--describe") as process:
        process.stdout.close()
        error = process.stderr.read()
        assert (process.wait(timeout=60), error) == (128 + signal.SIGPIPE, "")


# --- Tasks of version 5 -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("task", ["HalfCheetah", "Hopper", "Walker2d", "Ant", "Humanoid"])
@pytest.mark.parametrize("kind", [Arguments, SACArguments])
def test_a_task_of_version_5_has_the_papers_lambda_where_it_observes_the_same(task, kind):
    of_4, of_5 = (dst_td3.make_environment(f"{task}-v{version}").observation_space.shape for version in (4, 5))
    lambdas = [dst_td3.resolve(kind(env=f"{task}-v{version}")).er_lambda for version in (4, 5)]
    assert lambdas[1] == (lambdas[0] if of_4 == of_5 else None)


def test_a_run_says_what_it_takes_where_the_paper_has_no_lambda(command_line, tmp_path):
    said = "the paper has no lambda for Point-v0 with these --hidden: --sparsity 0.5 instead\n"
    assert said in trained(command_line, tmp_path / "silent")[1]
    assert "has no lambda" not in trained(command_line, tmp_path / "given", "--sparsity", 0.5)[1]


# --- Folders ----------------------------------------------------------------------------------------------------------
def test_a_long_name_is_shortened_by_a_checksum(command_line, tmp_path):
    long = {"hidden": (64,) * 60, "gamma": 0.98}
    names = [dst_td3.run_name(dst_td3.resolve(Arguments(**long | {"tau": tau}))) for tau in (0.005, 0.1, 0.2)]
    assert len(set(names)) == 3 and all(len(name.encode()) <= 200 for name in names)
    assert all(name.startswith("ds-td3_sparsity=0.5_hidden=64,64,") for name in names)
    assert re.fullmatch(r".*_[0-9a-f]{1,8}", names[0])
    accented = dst_td3.resolve(Arguments(env_kwargs=json.dumps({"é" * 150: 1}, ensure_ascii=False)))
    assert len(os.fsencode(dst_td3.run_name(accented))) <= 200
    short = dst_td3.resolve(Arguments(gamma=0.98, tau=0.1))
    assert dst_td3.run_name(short) == "ds-td3_gamma=0.98_tau=0.1"
    (tmp_path / names[0]).mkdir()


def test_a_module_leaves_no_colon_in_a_path_and_an_old_folder_is_found(tmp_path):
    args = dst_td3.resolve(Arguments(env="module:Space/Env-v0", results_dir=tmp_path))
    assert dst_td3.run_directory(args) == tmp_path / "module-Space-Env-v0" / "ds-td3" / "seed0"
    old = tmp_path / "module:Space-Env-v0" / "ds-td3" / "seed0"
    old.mkdir(parents=True)
    assert dst_td3.run_directory(args) == old


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            "--hidden 1000000 1000000",
            r"networks and transitions need about 48,\d{3}\.\d GB and this machine has [\d.]+",
        ),
        ("--sparsity 0.9 --hidden 300000 300000", r"need about 4,3\d\d\.\d GB"),
        ("--engine masked --hidden 300000 300000", r"need about 10,8\d\d\.\d GB"),
        ("--batch-size 1000000000000", r"need about 6,42\d,\d{3}\.\d GB"),
        ("--buffer-size 99999999999 --total-timesteps 99999999999", r"need about 10,8\d\d\.\d GB"),
    ],
)
def test_what_no_memory_holds_is_refused_with_its_bytes(command_line, tmp_path, arguments, expected):
    assert_refused(command_line, tmp_path, arguments, "and this machine has")
    _, _, error = command_line("--env", "Hopper-v4", "--results-dir", tmp_path, *arguments.split())
    assert re.search(expected, error), error


@pytest.mark.parametrize("link", ["runs", "runs/Point-v0"])
def test_a_link_to_nothing_so_far_is_followed(command_line, tmp_path, link):
    (tmp_path / link).parent.mkdir(exist_ok=True)
    (tmp_path / link).symlink_to(tmp_path / "scratch")
    code, _, error = command_line(*TRAINING, "--results-dir", tmp_path / "runs")
    assert (code, error) == (0, "") and list((tmp_path / "scratch").rglob("policy.npz"))


def test_a_path_with_spaces_is_quoted_in_the_last_line(command_line, tmp_path):
    run, output = trained(command_line, tmp_path / "my results")
    assert output.splitlines()[-1].endswith(f": python watch.py '{run}'")
    assert (REPEATED[-1]) in os.listdir(run)


def test_the_first_line_says_which_sparsity_is_counted(command_line, tmp_path):
    _, output = trained(command_line, tmp_path, "--sparsity", 0.8)
    run = dst_td3.Run(dst_td3.resolve(Arguments(env="Point-v0", engine="masked", hidden=(16, 16), sparsity=0.8)))
    hidden = sum(mask.sum() for masks in run.initial_masks for mask in masks)
    full = sum(mask.size for masks in run.initial_masks for mask in masks)
    assert 1 - hidden / full == pytest.approx(0.8, abs=0.005)
    of_all = f"{run.costs['sparsity']:.2f}"
    assert of_all != "0.80"
    assert f", sparsity 0.80 of the hidden layers ({of_all} of all), masked engine on cpu: step 0 of" in output


def test_a_table_of_evaluations_that_is_no_text_is_no_obstacle(command_line, tmp_path):
    with before_step(300, lambda: signal.raise_signal(signal.SIGTERM)):
        command_line(*TRAINING, "--results-dir", tmp_path)
    (run_directory(tmp_path) / "evaluations.csv").write_bytes(b"\xff\xfe")
    trained(command_line, tmp_path)
