"""Other people's environments: what is learned is what happened, or one line says why it cannot."""

import dataclasses

import numpy as np
import pytest
from point import TRAINING, habit, trained
from running import UNMADE, assert_same_bytes, rows_of, run_directory

import dst_td3
import watch
from dst_sac import SACArguments
from dst_td3 import Arguments


def transitions_of(args: Arguments, steps: int) -> dst_td3.Batch:
    """Return what the buffer holds after so many steps of uniform actions."""
    run = dst_td3.Run(args)
    for _ in range(steps):
        run.advance()
    return run.buffer.batch(np.arange(steps))


@pytest.mark.parametrize("name", ["aliases", "changes actions"])
def test_an_agent_learns_from_copies_of_what_an_environment_changes_later(command_line, plain, tmp_path, name):
    assert_same_bytes(plain[0], trained(command_line, tmp_path / "changing", *habit(name))[0])
    args = Arguments(env="Point-v0", hidden=(8, 8), sparsity=0.5, engine="masked", results_dir=tmp_path)
    expected = transitions_of(args, 120)
    changing = dataclasses.replace(args, env_kwargs=habit(name)[1])
    for given, right in zip(transitions_of(changing, 120), expected, strict=True):
        np.testing.assert_array_equal(given, right)
    moved = expected.next_observation - expected.observation
    np.testing.assert_allclose(moved, (0.1 * expected.action).clip(-0.05, 0.05), atol=1e-6)


@pytest.mark.parametrize("engine", ["masked", "sparse"])
@pytest.mark.parametrize("name", ["double bounds", "half bounds"])
def test_actions_are_of_the_spaces_type_and_within_its_bounds(command_line, tmp_path, name, engine):
    """The environment asserts it; float32 rounds 0.1 up."""
    trained(command_line, tmp_path, *habit(name), "--engine", engine)


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
        ("unbounded", "in Box(-inf, inf, (1,), float32): needed are real numbers within bounds below 4e+09"),
        ("widest", "needed are real numbers within bounds below 4e+09"),
        ("beyond", "needed are real numbers within bounds below 4e+09"),
        ("whole", "has actions in Box(-5, 5, (2,), int32): needed are real numbers"),
        ("nothing", "needed is a vector of real numbers"),
        ("discrete", "needed is a vector of real numbers"),
        ("sequence", "needed is a vector of real numbers"),
        ("image", "needed is a vector of real numbers"),
        ("other generator", "not from a generator of numpy"),
        ("cannot start", f"environment Point-v0 {UNMADE}: KeyError: 'a file is missing'"),
    ],
)
def test_what_cannot_be_learned_or_made_is_refused_before_training(command_line, tmp_path, name, expected):
    code, _, error = command_line(*TRAINING, *habit(name), "--results-dir", tmp_path)
    assert code == 2 and expected in error and error.count("\n") == 1, error
    assert error.startswith("dst_td3.py: error: ") and "Point-v0" in error
    assert not list(tmp_path.iterdir())


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


AS_OBSERVATION, AS_THREE = "as an observation: not 2 plain,", "as reward, terminated, truncated: not 3 plain,"
MALFORMED = {
    "short": f"] {AS_OBSERVATION}",
    "long": f"Point-v0 returned [0. 0. 0.] {AS_OBSERVATION}",
    "text": f"Point-v0 returned here {AS_OBSERVATION}",
    "huge": "Point-v0 returned [1000",
    "no observation": f"Point-v0 returned None {AS_OBSERVATION}",
    "beyond single": f"Point-v0 returned [0.e+00 1.e+39] {AS_OBSERVATION}",
    "first not finite": f"Point-v0 returned [ 0. nan] {AS_OBSERVATION}",
    "one value": "Point-v0 returned [",
    "four values": "Point-v0 returned (array(",
    "reward not finite": f"Point-v0 returned (nan, False, False) {AS_THREE}",
    "observation not finite": f"Point-v0 returned [nan 1.] {AS_OBSERVATION}",
    "reward of one": "Point-v0 returned (array([-",
    "no reward": f"Point-v0 returned (None, False, False) {AS_THREE}",
    "reward beyond single": f"Point-v0 returned (1e+40, False, False) {AS_THREE}",
    "half an end": "Point-v0 returned (0.5, False) as terminated, truncated: not true or false",
    "two ends": f"array([False, False]), False) {AS_THREE}",
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_data_is_named_in_one_line(command_line, tmp_path, name):
    """In the first episode, or in the first evaluation, which the same command makes again."""
    for _ in range(2):
        code, _, error = command_line(*TRAINING, *habit(name), "--results-dir", tmp_path)
        assert code == 1 and MALFORMED[name] in error and error.count("\n") == 1, error
        assert {path.name for path in tmp_path.rglob("*.*")} <= {"config.json"}


def test_what_gymnasiums_own_wrappers_meet_is_one_line_too(command_line, tmp_path):
    """An environment with a time limit is wrapped, and the wrapper is the first to meet four values."""
    code, _, error = command_line(*TRAINING, "--env", "Point-v1", *habit("four values"), "--results-dir", tmp_path)
    assert code == 1 and error.count("\n") == 1, error
    assert "Point-v1 failed with ValueError: not enough values to unpack (expected 5, got 4)" in error


def test_a_list_is_an_observation(command_line, plain, tmp_path):
    assert_same_bytes(plain[0], trained(command_line, tmp_path, *habit("list"))[0])


def assert_failed(answer: tuple[int, str, str], step: int) -> None:
    """Require that a run has ended with one line, after the traceback of the environment's own exception."""
    code, _, error = answer
    *traceback, line = error.splitlines()
    assert code == 1 and traceback[0].startswith("Traceback") and 'raise RuntimeError("the arm' in error
    said = f"after step {step}: Point-v0 failed with RuntimeError: the arm is stuck; the command goes on from 0"
    assert traceback[-1] == "is stuck" and line == f"dst_td3.py: error: {said}"


@pytest.mark.parametrize("name", ["raises", "reset raises"])
def test_an_exception_of_the_environment_keeps_its_traceback(command_line, tmp_path, name):
    for _ in range(2):
        given = (*habit(name), "--eval-episodes", 5, "--results-dir", tmp_path)
        assert_failed(command_line(*TRAINING, *given), step=0)


@pytest.mark.parametrize("name", ["reward not finite", "observation not finite", "raises"])
def test_what_happens_in_training_is_said_too(command_line, tmp_path, monkeypatch, name):
    monkeypatch.setattr(dst_td3, "evaluate", lambda *_: [(0.0, 1)])  # it would meet the failure before training does
    for _ in range(2):
        code, _, error = answer = command_line(*TRAINING, *habit(name), "--results-dir", tmp_path)
        if name == "raises":
            assert_failed(answer, step=4)
        else:
            assert code == 1 and error.count("\n") == 1
            assert f"after step 4: {MALFORMED[name]} finite numbers; the command goes on from 0\n" in error


@pytest.mark.parametrize("task", ["HalfCheetah", "Hopper", "Walker2d", "Ant", "Humanoid"])
@pytest.mark.parametrize("kind", [Arguments, SACArguments])
def test_a_task_of_version_5_has_the_papers_lambda_where_it_observes_the_same(task, kind):
    of_4, of_5 = (dst_td3.make_environment(f"{task}-v{version}").observation_space.shape for version in (4, 5))
    lambdas = [dst_td3.resolve(kind(env=f"{task}-v{version}")).er_lambda for version in (4, 5)]
    assert lambdas[1] == (lambdas[0] if of_4 == of_5 else None)


def test_a_run_says_what_it_takes_where_the_paper_has_no_lambda(command_line, plain, tmp_path):
    said = "the paper has no lambda for Point-v0 with these --hidden: --sparsity 0.5 instead\n"
    assert said in plain[1]
    assert "has no lambda" not in trained(command_line, tmp_path, "--sparsity", 0.5)[1]
