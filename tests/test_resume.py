"""The same bytes, whatever happens: kills, signals, full disks, damaged checkpoints."""

import json
import resource
import shutil
import signal

import numpy as np
import pytest
from point import GENERATORS, TRAINING, habit, killed_at, trained
from running import (
    SHORT,
    Killed,
    assert_same_bytes,
    before_step,
    damage,
    killed_after,
    needs_gpu,
    run_directory,
    start_process,
    wait_for_step,
)

import dst_td3
from dst_td3 import Arguments


def test_a_killed_process_resumes_to_the_same_bytes(command_line, unbroken, stopped):
    """Killed twice: while it explores at random, and while it learns with adapted topologies."""
    results = stopped.parents[2]
    process = start_process(*SHORT, "--results-dir", results)
    wait_for_step(results, 900)
    process.kill()
    output, _ = process.communicate()
    assert process.returncode == -signal.SIGKILL, output
    assert not (stopped / "summary.json").exists()
    assert command_line(*SHORT, "--results-dir", results)[0] == 0
    assert_same_bytes(stopped, unbroken)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_run_resumes_to_the_same_bytes(command_line, unbroken, tmp_path, number, code):
    """Stopped while it explores at random, and while it learns with adapted topologies; the signal is a real one."""
    for step in (250, 1100):
        with before_step(step, lambda: signal.raise_signal(number)):
            stopped, output, _ = command_line(*SHORT, "--results-dir", tmp_path)
        assert stopped == code
        assert f"stopped by {number.name}" in output and "the same command goes on" in output
    assert not (run_directory(tmp_path) / "summary.json").exists()
    assert command_line(*SHORT, "--results-dir", tmp_path)[0] == 0
    assert_same_bytes(run_directory(tmp_path), unbroken)


def test_a_second_signal_stops_at_once(command_line, tmp_path):
    def twice() -> None:
        signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
        raise Killed

    with before_step(500, twice), pytest.raises(Killed):
        command_line(*SHORT, "--results-dir", tmp_path)


@pytest.mark.parametrize(
    "further",
    [
        "--engine masked --total-timesteps 800",
        "--buffer-size 500",
        pytest.param("--device cuda", marks=needs_gpu),
    ],
)
def test_other_runs_resume_to_the_same_bytes_too(command_line, tmp_path, further):
    """The other engine, a buffer smaller than the run, and a GPU."""
    arguments = [*SHORT, *further.split()]
    assert command_line(*arguments, "--results-dir", tmp_path / "unbroken")[0] == 0
    with killed_after(500):
        command_line(*arguments, "--results-dir", tmp_path / "stopped")
    assert command_line(*arguments, "--results-dir", tmp_path / "stopped")[0] == 0
    assert_same_bytes(run_directory(tmp_path / "stopped"), run_directory(tmp_path / "unbroken"))


def test_a_full_disk_loses_nothing(command_line, unbroken, tmp_path):
    """A limit on the size of files fails a write in the middle, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Enough for a few checkpoints' transitions, not for all.
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, before[1]))
    try:
        code, _, error = command_line(*SHORT, "--results-dir", tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert code == 1 and "cannot write" in error and error.count("\n") == 1
    assert command_line(*SHORT, "--results-dir", tmp_path)[0] == 0
    assert_same_bytes(run_directory(tmp_path), unbroken)


def test_transitions_are_not_written_twice(tmp_path):
    """Between two checkpoints the file of transitions grows at its end, and nothing before is touched."""
    args = Arguments(env="Hopper-v4", total_timesteps=1000, engine="masked", sparsity=0.5, results_dir=tmp_path)
    run = dst_td3.Run(args)
    run.directory.mkdir(parents=True)
    transitions, written = run.directory / "transitions.bin", []
    for _ in range(3):
        for _ in range(50):
            run.advance()
        before = transitions.read_bytes() if transitions.exists() else b""
        transitions.exists() and transitions.write_bytes(b"x" * len(before))  # what is on disk stays as it is
        run.save()
        after = transitions.read_bytes()
        assert after[: len(before)] == b"x" * len(before)
        written.append(len(after) - len(before))
    assert written == [50 * run.buffer.rows[0].nbytes] * 3


def test_a_resumed_run_says_what_makes_it_now(command_line, stopped):
    config = json.loads((stopped / "config.json").read_text())
    (stopped / "config.json").write_text(json.dumps(config | {"commit": "another"}))
    code, output, _ = command_line(*SHORT, "--results-dir", stopped.parents[2])
    assert code == 0 and "another commit, other versions or another machine" in output
    (session,) = json.loads((stopped / "config.json").read_text())["resumed"]
    assert session["step"] > 0 and session["commit"] == config["commit"]
    assert session["versions"] == config["versions"] and session["machine"] == config["machine"]


# --- Environments -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["Humanoid-v4", "Ant-v4"])
def test_an_episode_follows_from_the_random_generators_state_alone(name):
    """Checkpoints hold no more of an environment, though its rewards depend on state that no observation shows."""
    used, fresh = dst_td3.make_environment(name), dst_td3.make_environment(name)
    rng = np.random.default_rng(0)
    actions = rng.uniform(-0.4, 0.4, (60, *used.action_space.shape)).astype(np.float32)
    used.reset(seed=3)
    for action in actions[:25]:
        used.step(action)
    fresh.reset(seed=4)
    fresh.unwrapped.np_random.bit_generator.state = used.unwrapped.np_random.bit_generator.state
    np.testing.assert_array_equal(used.reset()[0], fresh.reset()[0])
    for action in actions:
        observation, *rest, _ = used.step(action)
        other, *other_rest, _ = fresh.step(action)
        np.testing.assert_array_equal(observation, other)
        assert rest == other_rest


@pytest.mark.parametrize("name", ["RandomState", *GENERATORS])
def test_every_generator_of_numpy_goes_on_after_a_kill(command_line, tmp_path, name):
    undisturbed, _ = trained(command_line, tmp_path / "undisturbed", *habit(name))
    with killed_at(330):
        trained(command_line, tmp_path / "killed", *habit(name))
    assert_same_bytes(undisturbed, trained(command_line, tmp_path / "killed", *habit(name))[0])


def test_an_environment_with_randomness_of_its_own_goes_on_otherwise_which_is_noted(command_line, tmp_path):
    own = (*TRAINING, *habit("randomness of its own"), "--results-dir", tmp_path)
    with killed_at(130):
        command_line(*own)
    code, output, _ = command_line(*own)
    assert code == 0 and "this episode does not begin as before the checkpoint: Point-v0 keeps state" in output
    (noted,) = json.loads((run_directory(tmp_path) / "config.json").read_text())["begun_otherwise"]
    assert 0 < noted["step"] <= 130


def test_state_kept_between_episodes_is_noticed_after_a_kill(command_line, tmp_path):
    undisturbed, output = trained(command_line, tmp_path / "undisturbed", *habit("scales"))
    assert "differs from the one made before a kill" not in output

    killed = (*TRAINING, *habit("scales"), "--checkpoint-interval", 250, "--results-dir", tmp_path / "killed")
    with killed_at(330):
        command_line(*killed)
    code, output, error = command_line(*killed)
    assert code == 0, error
    (line,) = (line for line in output.splitlines() if "differs from the one made before a kill" in line)
    assert line.startswith("step 300: this evaluation") and "keeps state from one episode" in line
    run = run_directory(tmp_path / "killed")
    assert json.loads((run / "config.json").read_text())["evaluated_otherwise"] == [{"step": 300}]
    assert (run / "evaluations.csv").read_bytes() != (undisturbed / "evaluations.csv").read_bytes()


def test_an_evaluation_that_is_made_again_alike_is_not_noted(command_line, tmp_path):
    with killed_at(330):
        trained(command_line, tmp_path, "--checkpoint-interval", 250)
    run, output = trained(command_line, tmp_path)
    assert "differs" not in output and "evaluated_otherwise" not in json.loads((run / "config.json").read_text())


# --- Damaged files ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("how", ["cut", "flipped", "text", "folder"])
@pytest.mark.parametrize("name", ["checkpoint.npz", "transitions.bin", "config.json", "summary.json"])
def test_a_damaged_file_is_refused_and_all_left_untouched(command_line, stopped, name, how):
    if name == "summary.json":  # which an unfinished run does not have: the run must not pass for finished
        (stopped / name).write_text("{}")
    if name.endswith("json") and how == "flipped":
        pytest.skip("a flipped byte in the middle of a text may leave it as good")
    damage(stopped / name, how)
    before = {path.name: path.read_bytes() for path in stopped.iterdir() if path.is_file()}
    code, _, error = command_line(*SHORT, "--results-dir", stopped.parents[2])
    assert code == 2 and name in error and error.count("\n") == 1, error
    assert {path.name: path.read_bytes() for path in stopped.iterdir() if path.is_file()} == before


def test_a_checkpoint_of_another_run_is_refused(command_line, stopped, tmp_path):
    other = [*SHORT, "--seed", 1, "--results-dir", tmp_path]
    with killed_after(150):
        command_line(*other)
    (found,) = tmp_path.rglob("seed1/checkpoint.npz")
    shutil.copy(stopped / "checkpoint.npz", found)
    before = found.read_bytes()
    code, _, error = command_line(*other)
    assert code == 2 and "another run" in error
    assert found.read_bytes() == before


def test_a_table_of_evaluations_that_is_no_text_is_no_obstacle(command_line, tmp_path):
    with before_step(300, lambda: signal.raise_signal(signal.SIGTERM)):
        command_line(*TRAINING, "--results-dir", tmp_path)
    (run_directory(tmp_path) / "evaluations.csv").write_bytes(b"\xff\xfe")
    trained(command_line, tmp_path)
