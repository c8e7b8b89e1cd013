"""What others install and call: the wheel, ``train`` and ``load_policy`` from Python, other platforms."""

import configparser
import json
import os
import re
import signal
import subprocess
import sys
import threading
import tomllib
import zipfile
from pathlib import Path

import numpy as np
import pytest

import dst_td3
from dst_td3 import Arguments, InputError, RunError
from high_sparsity import HighSparsityArguments

ROOT = Path(dst_td3.__file__).parent
TINY = {"env": "Hopper-v4", "engine": "masked", "hidden": (8, 8), "sparsity": 0.5, "batch_size": 8}
TINY |= {"learning_starts": 100, "total_timesteps": 200, "eval_interval": 100, "eval_episodes": 1}


def test_training_from_python_returns_the_directory_whose_policy_acts(tmp_path, capsys):
    before = signal.getsignal(signal.SIGINT)
    run = dst_td3.train(Arguments(**TINY | {"hidden": [8, 8]}, results_dir=str(tmp_path)))
    assert run.is_relative_to(tmp_path) and "hidden=8,8_" in run.parent.name and (run / "summary.json").exists()
    assert len(re.findall("^step ", capsys.readouterr().out, re.MULTILINE)) == 3
    assert signal.getsignal(signal.SIGINT) == before
    act = dst_td3.load_policy(run / "policy.npz")
    observation = np.linspace(-1, 1, 11)
    assert act(observation).shape == (3,)
    np.testing.assert_array_equal(
        act(observation), dst_td3.load_policy(str(run / "policy.npz"), "Hopper-v4")(observation)
    )
    assert dst_td3.train(Arguments(**TINY, results_dir=tmp_path)) == run  # finished already


def test_training_from_python_raises_where_a_command_would_exit(tmp_path):
    with pytest.raises(InputError, match="--gamma must be between 0 and 1"):
        dst_td3.train(Arguments(**TINY, gamma=2, results_dir=tmp_path))
    with pytest.raises(InputError, match="--method must be ds-td3 or static-td3 or td3, not DS-TD3"):
        dst_td3.train(Arguments(**TINY, method="DS-TD3", results_dir=tmp_path))
    with pytest.raises(InputError, match="--updates-per-step must be a positive whole number, not 1"):
        dst_td3.train(Arguments(**TINY, updates_per_step=1.5, results_dir=tmp_path))
    assert not list(tmp_path.iterdir())
    with pytest.raises(RunError, match="diverged"):
        dst_td3.train(Arguments(**TINY, learning_rate=1e30, results_dir=tmp_path))


def test_training_works_in_a_thread_too(tmp_path):
    runs = []
    thread = threading.Thread(target=lambda: runs.append(dst_td3.train(Arguments(**TINY, results_dir=tmp_path))))
    thread.start()
    thread.join()
    assert (runs[0] / "summary.json").exists()


def test_an_interrupt_from_python_raises_and_the_call_goes_on(tmp_path, monkeypatch):
    advance = dst_td3.Run.advance

    def interrupted(run: dst_td3.Run) -> None:
        advance(run)
        if run.step == 120:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(dst_td3.Run, "advance", interrupted)
    with pytest.raises(KeyboardInterrupt):
        dst_td3.train(Arguments(**TINY, results_dir=tmp_path))
    assert list(tmp_path.rglob("checkpoint.npz"))
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
    monkeypatch.setattr(dst_td3.Run, "advance", advance)
    run = dst_td3.train(Arguments(**TINY, results_dir=tmp_path))
    assert json.loads((run / "summary.json").read_text())["steps"] == 200


def test_an_interrupt_in_the_last_evaluation_stops_a_loop_of_the_caller_too(tmp_path, monkeypatch):
    evaluate = dst_td3.Run.evaluate

    def interrupted(run: dst_td3.Run) -> dict:
        if run.step == 200:
            signal.raise_signal(signal.SIGINT)
        return evaluate(run)

    monkeypatch.setattr(dst_td3.Run, "evaluate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        dst_td3.train(Arguments(**TINY, results_dir=tmp_path))
    assert list(tmp_path.rglob("summary.json"))


def test_a_second_interrupt_leaves_a_script_its_cleaning_up(tmp_path, monkeypatch):
    def interrupted(run: dst_td3.Run) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(dst_td3.Run, "advance", interrupted)
    with pytest.raises(KeyboardInterrupt):
        dst_td3.train(Arguments(**TINY, results_dir=tmp_path))


def test_a_broken_pipe_of_others_is_none_of_a_runs_business(tmp_path, monkeypatch):
    advance, (reading, writing) = dst_td3.Run.advance, os.pipe()
    os.close(reading)

    def writes(run: dst_td3.Run) -> None:
        advance(run)
        with pytest.raises(BrokenPipeError):
            os.write(writing, b"x")

    monkeypatch.setattr(dst_td3.Run, "advance", writes)
    assert (dst_td3.train(Arguments(**TINY, results_dir=tmp_path)) / "summary.json").exists()
    os.close(writing)


def test_what_a_script_passes_counts_as_on_the_command_line(tmp_path):
    policy = dst_td3.train(Arguments(**TINY, results_dir=tmp_path)) / "policy.npz"
    given = {"seed": np.int64(3), "hidden": np.array([8, 8]), "er_lambda": [1.0, 2], "snapshot_at": [150]}
    args = Arguments(env="Hopper-v4", **given, initial_policy=str(policy))
    same = Arguments("Hopper-v4", seed=3, hidden=(8, 8), er_lambda=(1, 2), snapshot_at=(150,), initial_policy=policy)
    assert args == same and dst_td3.arguments_to_store(args) == dst_td3.arguments_to_store(same)
    args.validate()
    of_a_variant = (HighSparsityArguments(results_dir=path, hidden=[8, 8]) for path in ("x", Path("x")))
    assert next(of_a_variant) == next(of_a_variant) == HighSparsityArguments(results_dir=Path("x"), hidden=(8, 8))
    for wrong in ({"seed": 1.5}, {"hidden": (8.0, 8)}, {"learning_starts": 100.5}, {"snapshot_at": (200.5,)}):
        with pytest.raises(InputError, match="must be"):
            Arguments(**wrong).validate()
    wrong = {
        "sparsity": "0.9",
        "gamma": "0.9",
        "hidden": 64,
        "seed": True,
        "track": "no",
        "results_dir": None,
        "env": 3,
    }
    recipes = {"drop_by": "weight", "recycle_dormant": "no", "layer_norm": 1, "n_step": True, "actor_sparsity": [0.9]}
    for name, value in (wrong | recipes).items():
        with pytest.raises(InputError, match=f"^--{name.replace('_', '-')} must be .*, not "):
            HighSparsityArguments(**{name: value}).validate()


def test_the_wheel_has_the_algorithms_and_their_commands(tmp_path):
    source = tmp_path / "source"  # a build leaves folders behind
    files = subprocess.run(["git", "ls-files", "*.py", "*.toml", "README.md"], cwd=ROOT, capture_output=True, text=True)
    for name in files.stdout.split():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    options = ("--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", tmp_path)
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, source], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as content:
        names = {name for name in content.namelist() if ".dist-info/" not in name}
        entries = next(content.read(name).decode() for name in content.namelist() if name.endswith("entry_points.txt"))
    engine = {f"sparse_engine/{path.name}" for path in (ROOT / "sparse_engine").glob("*.py")}
    assert names == {"dst_td3.py", "dst_sac.py", "high_sparsity.py", *engine}
    commands = configparser.ConfigParser()
    commands.read_string(entries)
    for command, where in commands["console_scripts"].items():
        module, _, function = where.partition(":")
        code = f"import sys, {module}; sys.argv = ['{command}', '--describe']; sys.exit({module}.{function}())"
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
        assert done.stdout.startswith("HalfCheetah-v4, ")
    assert set(commands["console_scripts"]) == {"dst-td3", "dst-sac", "high-sparsity"}


def test_the_package_needs_the_versions_of_requirements():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = [line.partition("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
    needed = project["dependencies"] + project["optional-dependencies"]["dev"]
    assert sorted(filter(None, pinned)) == sorted(re.sub(r"\[.*\]", "", requirement) for requirement in needed)
    assert not any("[" in line for line in pinned), "pip takes no extras in constraints, and this file serves as such"
    assert f"## {project['version']}" in (ROOT / "CHANGELOG.md").read_text()


def test_an_installed_copy_does_not_name_the_commit_of_who_installed_it(tmp_path):
    (tmp_path / "dst_td3.py").write_bytes((ROOT / "dst_td3.py").read_bytes())
    git = ["git", "-c", "user.name=other", "-c", "user.email=other@localhost"]
    for words in (["init", "--quiet"], ["commit", "--quiet", "--allow-empty", "--message", "Theirs"]):
        subprocess.run([*git, *words], cwd=tmp_path, check=True)
    code = "import dst_td3; print(dst_td3.provenance()['commit'])"
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout == "None\n"


def test_a_machine_without_what_linux_alone_has(tmp_path, monkeypatch):
    """As a Mac is: no /proc, memory counted in bytes, another name for the processor."""
    dst_td3.make_environment("Hopper-v4")  # MuJoCo is imported for this machine
    exists = Path.exists
    monkeypatch.setattr(Path, "exists", lambda path: exists(path) and not path.is_relative_to("/proc"))
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(dst_td3.platform, "processor", lambda: "arm")
    run = dst_td3.train(Arguments(**TINY, results_dir=tmp_path))
    assert json.loads((run / "config.json").read_text())["machine"]["processor"] == "arm"
    peak = json.loads((run / "summary.json").read_text())["peak_memory_bytes"]
    assert peak == pytest.approx(dst_td3.resource.getrusage(dst_td3.resource.RUSAGE_SELF).ru_maxrss, rel=0.1)


def test_a_processor_that_nothing_names_goes_by_its_architecture(monkeypatch):
    """As of Arm under Linux: its /proc/cpuinfo has no model name, and the C library knows none either."""
    monkeypatch.setattr(dst_td3.re, "findall", lambda *_: [])
    monkeypatch.setattr(dst_td3.platform, "processor", lambda: "")
    assert dst_td3.provenance()["machine"]["processor"] == dst_td3.platform.machine()
