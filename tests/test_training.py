"""Whole runs: they learn, repeat themselves to the byte, survive anything, and refuse what they cannot use."""

import dataclasses
import importlib.metadata
import itertools
import json
import os
import platform
import re
import resource
import shutil
import signal
import subprocess
import tempfile
from contextlib import ExitStack, contextmanager
from pathlib import Path

import gymnasium
import numpy as np
import pytest
from conftest import (
    REPEATED,
    SHORT,
    Killed,
    assert_refused,
    assert_same_bytes,
    before_step,
    finished_run,
    killed_after,
    needs_gpu,
    rows_of,
    run_directory,
    start_process,
    wait_for_step,
)

import dst_td3
from dense_moments import DenseMomentsArguments
from dst_sac import SACArguments
from dst_td3 import Arguments
from high_sparsity import HighSparsityArguments


@pytest.fixture(scope="session")
def unbroken(tmp_path_factory) -> Path:
    """The run directory of a short run that nothing disturbed."""
    return finished_run(tmp_path_factory.mktemp("unbroken"))


# Learning


@pytest.mark.parametrize("method", ["ds-td3", "static-td3", "td3"])
def test_it_learns_to_balance_a_pole(command_line, tmp_path, method):
    """Balancing for a whole episode returns 1000; an untrained agent reaches about 10."""
    arguments = (
        "--env InvertedPendulum-v4 --hidden 64 64 --learning-rate 0.005 --tau 0.02 --total-timesteps 10000 "
        f"--learning-starts 1000 --eval-interval 1000 --eval-episodes 5 --adapt-interval 200 --method {method}"
    )
    code, output, error = command_line(*arguments.split(), "--results-dir", tmp_path)
    assert code == 0, error
    returns = [float(row["return_mean"]) for row in rows_of(run_directory(tmp_path) / "evaluations.csv")]
    assert returns[0] < 100 and max(returns) > 900, output


def test_ds_td3_changes_its_topology_and_keeps_its_size(unbroken):
    rows = rows_of(unbroken / "topology.csv")
    assert {(row["network"], row["layer"]) for row in rows} == {(n, i) for n in ("actor", "critic") for i in "12"}
    for network in ("actor", "critic"):
        alive = [
            float(row["initial_connections_alive"]) for row in rows if (row["network"], row["layer"]) == (network, "2")
        ]
        assert alive[0] == 1 and alive[-1] < 0.75 and alive[-1] < alive[2]
        sizes = {
            sum(map(int, row["connections_per_input"].split()))
            for row in rows
            if (row["network"], row["layer"]) == (network, "1")
        }
        assert len(sizes) == 1


def test_a_row_of_topology_counts_the_first_connections_that_are_left(tmp_path):
    args = Arguments(env="Hopper-v4", engine="masked", sparsity=0.8, hidden=(16, 12), results_dir=tmp_path)
    run = dst_td3.Run(dataclasses.replace(args, learning_starts=10, adapt_interval=5, drop_fraction=0.3))
    first = {name: network.layer_arrays() for name, network in run.agent.networks.items()}
    for _ in range(40):
        run.advance()
    run.directory.mkdir(parents=True)
    run.evaluate()
    rows = run.tables["topology"]
    assert [(row["network"], row["layer"]) for row in rows] == [(n, i) for n in ("actor", "critic") for i in (1, 2)]
    for row in rows:
        now = run.agent.networks[row["network"]].layer_arrays()
        mask, initial = (layers[row["layer"] - 1].mask for layers in (now, first[row["network"]]))
        mask, initial = (m if m.ndim == 2 else m[0] for m in (mask, initial))  # of the first critic
        assert 0 < row["initial_connections_alive"] < 1
        assert row["initial_connections_alive"] == pytest.approx(mask[initial == 1].mean())
        counts = [str(int(count)) for count in mask.sum(1)]
        assert row["connections_per_input"].split() == (counts if row["layer"] == 1 else [])


def test_a_run_directory_holds_what_it_should(unbroken):
    assert unbroken.parts[-3] == "Hopper-v4" and unbroken.name == "seed0"
    files = {path.name for path in unbroken.iterdir()}
    assert files == {"config.json", "summary.json", "timing.csv", *REPEATED}
    config, summary = (json.loads((unbroken / f"{name}.json").read_text()) for name in ("config", "summary"))
    assert config["arguments"]["adapt_interval"] == 100
    packages = ("torch", "gymnasium", "mujoco", "numpy", "numba", "llvmlite", "scipy")
    versions = {name: importlib.metadata.version(name) for name in packages}
    assert config["versions"] == versions | {"python": platform.python_version()}
    rows = rows_of(unbroken / "evaluations.csv")
    assert [int(row["step"]) for row in rows] == list(range(0, 2401, 400))
    returns = [float(row["return_mean"]) for row in rows]
    assert summary["lca"] == pytest.approx(sum(returns) * 400 / 5000 / 2400)
    assert summary["final_return"] == pytest.approx(np.mean(returns[1:]))  # of seven, the untrained policy's left out
    assert summary["peak_memory_bytes"] > 50e6


def test_the_same_command_makes_the_same_bytes_and_a_line_for_each_evaluation(command_line, unbroken, tmp_path):
    code, output, _ = command_line(*SHORT, "--results-dir", tmp_path)
    assert code == 0
    assert_same_bytes(run_directory(tmp_path), unbroken)
    _, begin, *lines, _ = output.splitlines()
    sparsity = r"sparsity 0\.50 of the hidden layers \(0\.48 of all\)"
    assert re.search(rf"seed 0, {sparsity}, sparse engine on cpu: step 0 of 2,400$", begin), begin
    for line, row in zip(lines, rows_of(unbroken / "evaluations.csv"), strict=True):
        step, mean, std = int(row["step"]), float(row["return_mean"]), float(row["return_std"])
        speed = "" if step == 0 else r"  [\d,]+ steps/s" if step <= 400 else r"  [\d,]+ steps/s  0:\d\d:\d\d left"
        assert re.fullmatch(rf"step +{step:,}  return +{mean:.1f} \+- +{std:.1f}{speed}", line), line


def test_a_progress_line_has_the_speed_since_the_last_one_and_the_time_left(monkeypatch, capsys, tmp_path):
    now = [100.0]
    args = Arguments(env="Hopper-v4", engine="masked", sparsity=0.5, hidden=(8, 8), results_dir=tmp_path)
    run = dst_td3.Run(args)
    monkeypatch.setattr(dst_td3.time, "perf_counter", lambda: now[0])
    with ExitStack() as closing:
        progress = dst_td3.Progress(run, closing)
        for step, seconds in ((0, 3), (20_000, 4), (30_000, 20), (40_000, 10)):
            now[0] += seconds
            progress.evaluated({"step": step, "return_mean": 1.0, "return_std": 2.0})
    _, *lines = capsys.readouterr().out.splitlines()
    # Random actions before step 25,000 are many times faster, so that they say nothing of the time left.
    expected = ("1.0 +-     2.0", "5,000 steps/s", "500 steps/s  0:32:20 left", "1,000 steps/s  0:16:00 left")
    assert [line.endswith(end) for line, end in zip(lines, expected, strict=True)] == [True] * 4, lines


# The same bytes, whatever happens


def test_another_seed_makes_other_bytes(command_line, unbroken, tmp_path):
    command_line(*SHORT, "--seed", 1, "--results-dir", tmp_path)
    evaluations = run_directory(tmp_path) / "evaluations.csv"
    assert evaluations.read_bytes() != (unbroken / "evaluations.csv").read_bytes()


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
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL
        raise Killed

    with before_step(500, twice), pytest.raises(Killed):
        command_line(*SHORT, "--results-dir", tmp_path)


@pytest.mark.parametrize(
    "further",
    [
        "--engine masked --total-timesteps 1200",
        "--buffer-size 500",
        pytest.param("--device cuda", marks=needs_gpu),
    ],
)
def test_other_runs_resume_to_the_same_bytes_too(command_line, tmp_path, further):
    """The other engine, a buffer smaller than the run, and a GPU."""
    arguments = [*SHORT, *further.split()]
    assert command_line(*arguments, "--results-dir", tmp_path / "unbroken")[0] == 0
    with killed_after(700):
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


def test_an_environment_with_randomness_of_its_own_is_not_resumed(command_line, tmp_path):
    arguments = ["--env", "OwnRandomness-v0", "--total-timesteps", 40, "--learning-starts", 20, "--eval-episodes", 1]
    arguments += ["--checkpoint-interval", 10, "--results-dir", tmp_path]
    args = Arguments(env="OwnRandomness-v0", total_timesteps=40, learning_starts=20, eval_episodes=1)
    run = dst_td3.Run(dst_td3.resolve(dataclasses.replace(args, results_dir=tmp_path)))
    run.directory.mkdir(parents=True)
    while not run.step or not run.between_episodes:
        run.advance()
    run.save()
    code, _, error = command_line(*arguments)
    assert (
        code == 1
        and "does not begin an episode again as it did before a checkpoint" in error
        and error.count("\n") == 1
    )


# What a run directory was begun with


# What the paper's runs have of the options that have programs of their own.
PAPERS = {"drop_by": "magnitude", "recycle_dormant": False, "step_exponent": 0.0, "dense_moments": False}


def kind_of(stored: dict) -> type[Arguments]:
    """Return the arguments of the program that goes on with a run of stored ones."""
    other = [name for name, papers in PAPERS.items() if stored.get(name, papers) != papers]
    if not other:
        return Arguments if stored["method"].endswith("td3") else SACArguments
    return DenseMomentsArguments if other == ["dense_moments"] else HighSparsityArguments


def test_the_committed_runs_are_finished(command_line, monkeypatch):
    """Also where arguments have been added since they were made, and on a machine with a GPU."""
    monkeypatch.setattr(dst_td3.torch.cuda, "is_available", lambda: True)
    results = Path(dst_td3.__file__).parent / "results"
    directories = [path.parent for path in results.glob("*-v4/*/*/summary.json")]
    assert len(directories) >= 6
    kinds = set()
    for directory in directories:
        stored = json.loads((directory / "config.json").read_text())["arguments"]
        kind = kind_of(stored)
        more = dataclasses.make_dataclass("More", [("added_later", float, 0.5)], bases=(kind,), frozen=True)
        left_open, known = {"engine", "device"}, {field.name for field in dataclasses.fields(kind)}
        assert all(stored[name] == PAPERS[name] for name in set(stored) - known)
        values = {name: value for name, value in (PAPERS | stored).items() if name in known - left_open}
        given = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        if stored.get("initial_policy"):  # kept by name and content; it is one of the same seed's snapshots
            snapshot = stored["initial_policy"].split()[0]
            given["initial_policy"] = directory.parents[1] / stored["method"] / directory.name / snapshot
        args = dst_td3.resolve(more(**given, results_dir=directory.parents[2]))
        args.validate()
        assert dst_td3.run_directory(args) == directory and dst_td3.is_finished(args)
        kinds.add(kind)
    assert kinds >= {Arguments, HighSparsityArguments, DenseMomentsArguments}
    args = dataclasses.replace(args, added_later=0.6)
    assert dst_td3.run_name(args).endswith("_added-later=0.6")


def test_a_resumed_run_says_what_makes_it_now(command_line, stopped):
    config = json.loads((stopped / "config.json").read_text())
    (stopped / "config.json").write_text(json.dumps(config | {"commit": "another"}))
    code, output, _ = command_line(*SHORT, "--results-dir", stopped.parents[2])
    assert code == 0 and "another commit, other versions or another machine" in output
    (session,) = json.loads((stopped / "config.json").read_text())["resumed"]
    assert session["step"] > 0 and session["commit"] == config["commit"]
    assert session["versions"] == config["versions"] and session["machine"] == config["machine"]


def test_a_commit_is_dirty_where_code_was_edited_and_not_where_figures_were(tmp_path, monkeypatch):
    (tmp_path / "code.py").write_text("")
    (tmp_path / "figure.png").write_text("")
    monkeypatch.setattr(dst_td3, "__file__", str(tmp_path / "code.py"))
    assert dst_td3.provenance()["commit"] is None
    identity = ("-c", "user.name=nobody", "-c", "user.email=nobody@example.org")
    for command in (("init", "-q"), ("add", "."), (*identity, "commit", "-qm", "a commit")):
        subprocess.run(["git", "-C", tmp_path, *command], check=True)
    (tmp_path / "figure.png").write_text("drawn again")
    clean = dst_td3.provenance()["commit"]
    (tmp_path / "code.py").write_text("edited")
    assert len(clean) == 40 and dst_td3.provenance()["commit"] == clean + "-dirty"


def test_a_finished_run_is_left_alone(command_line, unbroken, tmp_path):
    shutil.copytree(unbroken.parents[2], tmp_path / "copy")
    times = {path.name: path.stat().st_mtime_ns for path in run_directory(tmp_path / "copy").iterdir()}
    code, output, _ = command_line(*SHORT, "--results-dir", tmp_path / "copy")
    assert code == 0 and "finished already" in output
    assert times == {path.name: path.stat().st_mtime_ns for path in run_directory(tmp_path / "copy").iterdir()}


def test_snapshots_are_kept_and_an_initial_policy_acts_first(command_line, tmp_path):
    snapshots = [*SHORT, "--snapshot-at", 800, 1600]
    command_line(*snapshots, "--results-dir", tmp_path / "first")
    first = run_directory(tmp_path / "first")
    assert {path.name for path in first.glob("policy*")} == {"policy.npz", "policy-800.npz", "policy-1600.npz"}
    initial = ["--initial-policy", first / "policy-1600.npz"]
    assert command_line(*SHORT, *initial, "--results-dir", tmp_path / "second")[0] == 0
    second = run_directory(tmp_path / "second")
    assert "initial-policy=policy-1600" in second.parent.name
    assert (second / "evaluations.csv").read_bytes() != (first / "evaluations.csv").read_bytes()


# Bad input


class Broken(gymnasium.Env):
    """Returns a reward or an observation that is not finite at its fifth step, or fails otherwise."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,))
    action_space = gymnasium.spaces.Box(-1, 1, (1,))

    def __init__(self, broken: str = "reward", observation_space=None, action_space=None):
        if broken == "start":
            raise KeyError("a file is missing")
        self.broken, self.resets = broken, 0
        self.observation_space = observation_space or self.observation_space
        self.action_space = action_space or self.action_space

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        if self.broken == "reset" and self.resets == 3:
            raise RuntimeError("the simulator has crashed")
        self.resets += 1
        start = next(RANDOMNESS_OF_ITS_OWN) if self.broken == "randomness" else 0
        return np.full(2, start, dtype=np.float32), {}

    def step(self, action):
        self.steps += 1
        if self.broken == "step" and self.steps == 5:
            raise RuntimeError("the simulator has crashed")
        bad = np.nan if self.steps == 5 else 0.0
        observation = np.array([bad if self.broken == "observation" else 1.0, 1.0], dtype=np.float32)
        return observation, bad if self.broken == "reward" else 1.0, self.steps == 8, False, {}


RANDOMNESS_OF_ITS_OWN = itertools.count()
Box, Discrete = gymnasium.spaces.Box, gymnasium.spaces.Discrete
Dict, Sequence = gymnasium.spaces.Dict, gymnasium.spaces.Sequence
for name, options in {
    "BrokenReward-v0": {"broken": "reward"},
    "BrokenObservation-v0": {"broken": "observation"},
    "BrokenStep-v0": {"broken": "step"},
    "BrokenReset-v0": {"broken": "reset"},
    "OwnRandomness-v0": {"broken": "randomness"},
    "FailsToStart-v0": {"broken": "start"},
    "DoubleActions-v0": {"broken": "nothing", "action_space": Box(-1, 1, (1,), np.float64)},
    "UnboundedActions-v0": {"action_space": Box(-np.inf, np.inf, (1,))},
    "DiscreteActions-v0": {"action_space": Discrete(3)},
    "SequenceObservations-v0": {"observation_space": Dict({"positions": Sequence(Box(-1, 1, (2,)))})},
    "ImageObservations-v0": {"observation_space": Box(0, 1, (8, 8, 3))},
}.items():
    gymnasium.register(name, entry_point=Broken, kwargs=options)

UNMADE = "cannot be made (the paper's are HalfCheetah-v4, Hopper-v4, Walker2d-v4, Ant-v4 and Humanoid-v4)"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("--env Hoper-v4", "Did you mean: `Hopper`?"),
        ("--env Hopper-v3", "Hopper-v4"),
        (
            "--env Nonsense",
            f"Nonsense {UNMADE}: NameNotFound: Environment `Nonsense` doesn't exist",
        ),
        ("--env DiscreteActions-v0", "vector of real numbers"),
        ("--env SequenceObservations-v0", "vector of real numbers"),
        ("--env ImageObservations-v0", "vector of real numbers"),
        (
            "--env UnboundedActions-v0",
            "in Box(-inf, inf, (1,), float32): needed are real numbers within bounds below 4e+09",
        ),
        ("--sparsity 1", "--sparsity must be at least 0 and below 1, not 1.0"),
        ("--sparsity -0.1", "--sparsity must be"),
        ("--sparsity nan", "--sparsity must be"),
        ("--sparsity 0.99999", "leaves layer 1 of [11, 256, 256, 3] no connection"),
        ("--er-lambda 0 64", "--er-lambda must be 2 positive numbers"),
        ("--er-lambda -7 64", "--er-lambda must be"),
        ("--er-lambda 7", "one for each hidden layer"),
        ("--er-lambda 7 64 --sparsity 0.5", "give one of them"),
        ("--method td3 --sparsity 0.5", "td3 is dense"),
        ("--method td3 --er-lambda 7 64", "td3 is dense"),
        ("--batch-size 0", "--batch-size must be a positive whole number, not 0"),
        ("--total-timesteps -5", "--total-timesteps must be"),
        ("--total-timesteps 25000", "--total-timesteps must be more than --learning-starts (25000)"),
        ("--env no_such_module:Env-v0", "no_such_module"),
        ("--env FailsToStart-v0", f"{UNMADE}: KeyError: 'a file is missing'"),
        ("--buffer-size 0", "--buffer-size must be"),
        ("--buffer-size 10000000000000 --total-timesteps 10000000000000", "--buffer-size"),
        ("--hidden 0", "--hidden must be"),
        ("--hidden", "--hidden must be"),
        ("--adapt-interval 0", "--adapt-interval must be"),
        ("--drop-fraction 1.5", "--drop-fraction must be between 0 and 1"),
        ("--learning-rate 0", "--learning-rate must be"),
        ("--eval-episodes 0", "--eval-episodes must be"),
        ("--threads 0", "--threads must be"),
        ("--seed -1", "--seed must be"),
        ("--device tpu", "--device"),
        ("--device auto", "--device"),
        ("--snapshot-at 5 2000000", "--snapshot-at must be steps of the run, 1 to 1000000, not (5, 2000000)"),
        ("--snapshot-at 0", "--snapshot-at must be"),
        ("--buffer-size 9999999999 --total-timesteps 9999999999", "networks and transitions need about 1,0"),
        ("--initial-policy nowhere.npz", "nowhere.npz is no policy"),
        ("--batch-size many", "--batch-size"),
        ("--spasity 0.5", "--sparsity"),
        ("--method sac", "ds-td3"),
    ],
)
def test_bad_input_gets_one_clear_line_and_exit_code_2(command_line, tmp_path, arguments, expected):
    assert_refused(command_line, tmp_path, arguments, expected)


@pytest.mark.parametrize(
    "given",
    [
        *("--drop-by contribution", "--drop_by=magnitude", "--recycle-dormant"),
        *("--step-exponent 0.5", "--step-exponent=0", "--dense-moments"),
    ],
)
def test_an_option_that_has_a_program_of_its_own_is_named_with_it(command_line, tmp_path, given):
    flag = given.split()[0].partition("=")[0].replace("_", "-")
    program = "dense_moments.py" if flag == "--dense-moments" else "high_sparsity.py"
    code, output, error = command_line(*given.split(), "--results-dir", tmp_path)
    assert (code, output) == (2, "") and error == f"dst_td3.py: error: {flag} is an option of {program}\n"


@pytest.mark.parametrize("kind", [Arguments, SACArguments, HighSparsityArguments])
def test_auto_is_the_sparse_engine_wherever_it_can_be(monkeypatch, kind):
    monkeypatch.setattr(dst_td3.torch.cuda, "is_available", lambda: True)  # a GPU alone is no reason to use it

    def engine(**given) -> str:
        return dst_td3.resolve(kind(**given)).engine

    assert engine() == engine(method=kind().method.replace("ds-", "")) == "sparse"
    assert engine(engine="masked") == engine(device="cuda") == "masked"
    found = dst_td3.importlib.util.find_spec
    for missing in ("sparse_engine", "numba", "scipy", "threadpoolctl"):
        monkeypatch.setattr(dst_td3.importlib.util, "find_spec", lambda n, m=missing: None if n == m else found(n))
        assert engine() == "masked"
        with pytest.raises(dst_td3.InputError, match=f"--engine sparse needs a CPU and the packages .*{missing}"):
            engine(engine="sparse")


def test_the_sparse_engine_is_refused_on_a_gpu(command_line, tmp_path, monkeypatch):
    monkeypatch.setattr(dst_td3.torch.cuda, "is_available", lambda: True)
    assert_refused(command_line, tmp_path, "--engine sparse --device cuda", "--engine sparse needs a CPU")


def test_a_missing_gpu_is_said(command_line, tmp_path, monkeypatch):
    monkeypatch.setattr(dst_td3.torch.cuda, "is_available", lambda: False)
    code, _, error = command_line("--device", "cuda", "--results-dir", tmp_path)
    assert code == 2 and "--device must be cpu (torch finds no GPU to use), not cuda" in error


FAILURES = {
    "Reward": "returned (nan, False, False) as reward, terminated, truncated: needed are 3 finite numbers",
    "Observation": "returned [nan 1.] as an observation: needed are 2 finite numbers",
    "Step": "failed with RuntimeError: the simulator has crashed",
}


def assert_stopped(answer: tuple[int, str, str], cause: str, traceback: bool) -> None:
    """Require that a run has ended with one clear line, after the traceback of the environment's own exception."""
    code, _, error = answer
    *before, line = error.splitlines()
    assert code == 1 and cause in line and line.endswith("; the command goes on from 0"), error
    assert bool(before) == traceback == error.startswith("Traceback"), error
    assert not traceback or before[-1] == "RuntimeError: the simulator has crashed"


@pytest.mark.parametrize("what", FAILURES)
def test_a_failing_environment_stops_the_run(command_line, tmp_path, monkeypatch, what):
    monkeypatch.setattr(dst_td3, "evaluate", lambda *_: [(0.0, 1)])  # it would meet the failure before training does
    for _ in range(2):
        answer = command_line("--env", f"Broken{what}-v0", "--results-dir", tmp_path)
        assert_stopped(answer, f"after step 4: Broken{what}-v0 {FAILURES[what]}", what == "Step")


@pytest.mark.parametrize("what", [*FAILURES, "Reset"])
def test_a_failing_evaluation_stops_the_run_and_is_made_again(command_line, tmp_path, what):
    cause = FAILURES.get(what, FAILURES["Step"])
    for _ in range(2):
        answer = command_line("--env", f"Broken{what}-v0", "--results-dir", tmp_path)
        assert_stopped(answer, f"after step 0: Broken{what}-v0 {cause}", what in ("Step", "Reset"))
    assert not (run_directory(tmp_path) / "evaluations.csv").exists()


def test_other_failures_are_not_blamed_on_the_results_folder(command_line, tmp_path, monkeypatch):
    def lost(*_):
        raise ConnectionResetError("connection lost")

    monkeypatch.setattr(dst_td3.Progress, "evaluated", lost)
    with pytest.raises(ConnectionResetError):
        command_line(*SHORT, "--results-dir", tmp_path)


@pytest.mark.parametrize("engine", ["masked", "sparse"])
def test_actions_of_double_precision_are_no_obstacle(command_line, tmp_path, engine):
    arguments = ["--env", "DoubleActions-v0", "--total-timesteps", 60, "--learning-starts", 20, "--engine", engine]
    code, _, error = command_line(*arguments, "--eval-episodes", 1, "--results-dir", tmp_path)
    assert code == 0, error


def test_a_diverged_policy_stops_the_run():
    run = dst_td3.Run(Arguments(env="Hopper-v4", learning_starts=2, hidden=(8, 8), sparsity=0.5, engine="masked"))
    run.advance()
    run.advance()
    run.agent.engine.actor.layers[0].bias.data.fill_(np.nan)
    with pytest.raises(dst_td3.RunError, match="the policy's action is not finite"):
        run.advance()


@pytest.fixture(scope="session")
def killed(tmp_path_factory) -> Path:
    """The run directory that a killed process left, with a checkpoint."""
    results = tmp_path_factory.mktemp("killed")
    process = start_process(*SHORT, "--results-dir", results)
    wait_for_step(results, 150)
    process.kill()
    process.communicate()
    return run_directory(results)


@pytest.fixture
def stopped(killed, tmp_path) -> Path:
    """A copy of that run directory, to do with as one likes."""
    shutil.copytree(killed.parents[2], tmp_path, dirs_exist_ok=True)
    return run_directory(tmp_path)


def damage(path: Path, how: str) -> None:
    if how == "folder":
        path.unlink()
        path.mkdir()
        return
    content = bytearray(path.read_bytes())
    if how == "cut":
        content = content[: len(content) // 2]
    elif how == "flipped":
        content[len(content) // 2] ^= 0xFF
    elif how == "text":
        content = bytearray(b"not a checkpoint")
    path.write_bytes(content)


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


@pytest.mark.parametrize("directory", ["unbroken", "stopped"])
def test_a_folder_with_other_arguments_is_refused(command_line, request, directory):
    path = request.getfixturevalue(directory)
    code, _, error = command_line(*SHORT, "--threads", 2, "--results-dir", path.parents[2])
    assert code == 2 and "threads 1 there and 2 here" in error


def test_only_an_unfinished_run_needs_the_engine_that_it_was_begun_with(command_line, unbroken, stopped):
    code, _, error = command_line(*SHORT, "--engine", "masked", "--results-dir", stopped.parents[2])
    assert code == 2 and "engine sparse there and masked here" in error
    code, output, _ = command_line(*SHORT, "--engine", "masked", "--results-dir", unbroken.parents[2])
    assert code == 0 and "finished already" in output


def test_a_folder_in_use_is_refused(command_line, tmp_path):
    refusals = []
    with before_step(200, lambda: refusals.append(command_line(*SHORT, "--results-dir", tmp_path))):
        assert command_line(*SHORT, "--results-dir", tmp_path)[0] == 0
    ((code, _, error),) = refusals
    assert code == 2 and "another process" in error


@contextmanager
def with_rights(folder: Path, rights: int):
    """Give this process, be it root's, only these rights to a folder."""
    user = os.geteuid()
    folder.chmod(rights)
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)
        folder.chmod(0o700)


@pytest.mark.parametrize("why", ["a file", "no right to write", "no right to enter"])
def test_an_unusable_results_folder_is_refused(command_line, why):
    with tempfile.TemporaryDirectory() as parent:  # not pytest's, which lets in its owner alone
        Path(parent).chmod(0o755)
        results = Path(parent) / "results"
        results.write_text("") if why == "a file" else results.mkdir()
        rights = {"a file": 0o444, "no right to write": 0o555, "no right to enter": 0}[why]
        with with_rights(results, rights):
            code, _, error = command_line(*SHORT, "--engine", "masked", "--results-dir", results)
    assert code == 2 and "cannot use" in error and error.count("\n") == 1


def test_loading_executes_nothing(tmp_path, command_line):
    """An array of Python objects is how a numpy file would carry code."""

    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    objects = np.array([Evil()], dtype=object)
    np.savez(tmp_path / "policy.npz", **{"0.shape": objects, "env": objects})
    with pytest.raises(dst_td3.InputError, match="no policy"):
        dst_td3.load_policy(tmp_path / "policy.npz", "Hopper-v4")
    run = dst_td3.Run(Arguments(env="Hopper-v4", results_dir=tmp_path, engine="masked", sparsity=0.5))
    run.directory.mkdir(parents=True)
    np.savez(run.directory / "checkpoint.npz", state=objects)
    with pytest.raises(dst_td3.InputError, match="cannot be resumed"):
        run.load()
    assert not (tmp_path / "executed").exists()


# What is shown


def test_describe_prints_the_papers_figures(command_line):
    code, dense, _ = command_line("--describe", "--env", "HalfCheetah-v4", "--method", "td3")
    assert code == 0 and "214,784 connections" in dense and "1.07e+14" in dense
    code, sparse, _ = command_line("--describe", "--env", "HalfCheetah-v4", "--er-lambda", 7, 64)
    assert code == 0 and "sparsity 0.51" in sparse and "0.49x dense" in sparse
    assert [line.split()[-2:] for line in sparse.splitlines() if "17 x 256" in line] == [["1,911", "0.561"]]


def test_tensorboard_logs_are_written_where_it_is_installed(command_line, tmp_path):
    pytest.importorskip("tensorboard")
    command_line(*SHORT, "--tensorboard", "--results-dir", tmp_path)
    assert list(run_directory(tmp_path).glob("tensorboard/events*"))


@pytest.mark.parametrize(("flag", "package"), [("--tensorboard", "tensorboard"), ("--track", "wandb")])
def test_a_missing_logger_is_said(command_line, tmp_path, monkeypatch, flag, package):
    monkeypatch.setattr(dst_td3.importlib.util, "find_spec", lambda name: None)
    code, _, error = command_line(*SHORT, flag, "--results-dir", tmp_path)
    assert code == 2 and f"{flag} needs the package {package}" in error


def test_runs_are_named_by_what_differs_from_the_paper():
    def name(**changes) -> str:
        return dst_td3.run_name(dst_td3.resolve(Arguments(**changes)))

    assert name() == name(er_lambda=(7.0, 64.0)) == name(seed=3, threads=2) == "ds-td3"
    assert name(method="td3") == "td3"
    assert name(sparsity=0.8) == "ds-td3_sparsity=0.8"
    assert name(adapt_interval=200, er_lambda=(5.0, 6.5)) == "ds-td3_er-lambda=5,6.5_adapt-interval=200"
