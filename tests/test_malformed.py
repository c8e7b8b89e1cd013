"""A thousand malformed files and arguments: each is refused in one line, or used, and costs no file."""

import io
import itertools
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock

import gymnasium
import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from point import Still
from running import PROGRAM, Killed, assert_same_bytes

import dst_td3
import watch

sys.path.insert(0, str(PROGRAM.parent / "examples"))
import export_c

gymnasium.register("Still-v0", entry_point=Still)

# A run of almost no time.
TINY = {"env": "Still-v0", "hidden": (4, 4), "engine": "masked", "learning_starts": 20, "batch_size": 4}
TINY |= {"total_timesteps": 60, "eval_interval": 20, "eval_episodes": 1, "checkpoint_interval": 10}


def train(results: Path, initial_policy: Path | None = None) -> int:
    """Do what the command line does once it has parsed the arguments of the tiny run, which takes it longest."""
    args = dst_td3.Arguments(**TINY, results_dir=results, initial_policy=initial_policy)
    args.validate()
    return dst_td3.train(dst_td3.resolve(args))


def play(run: Path) -> None:
    """Watch an episode of a run, where there is no screen."""
    with mock.patch("glfw.init", lambda: False):
        watch.watch(watch.Arguments(run, episodes=1))


def call(program: Callable, *arguments: object) -> tuple[int, str]:
    """Run a program here as a command line does: its exit code, and what it wrote to standard error."""
    output, error = io.StringIO(), io.StringIO()
    with redirect_stdout(output), redirect_stderr(error):
        try:
            code = dst_td3.command_line(lambda name: program(*arguments))
        except SystemExit as leaving:  # of the argument parser
            code = leaving.code
    return code, error.getvalue()


def files_of(folder: Path) -> dict[Path, bytes]:
    """Return the content of every file of a folder but the lock."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "lock"}


def assert_refused_or_used(folder: Path, program: Callable, *arguments: object) -> bool:
    """Require one line and no change of a file where the program refuses its input; return whether it does."""
    before = files_of(folder)
    try:
        code, error = call(program, *arguments)
    except Killed:  # once it has learned
        return False
    if code:
        assert "Traceback" not in error and error, error
        assert error.count("\n") == 1 or "For full helptext" in error, error  # the argument parser has a box
        after = files_of(folder)
        assert {path: after.get(path) for path in before} == before, "a file is lost"
    return bool(code)


@pytest.fixture(scope="module", autouse=True)
def no_git() -> Iterator[None]:
    """Ask for the versions once, since git takes longer than everything else here."""
    made_with = dst_td3.provenance()
    with mock.patch.object(dst_td3, "provenance", lambda: made_with), mock.patch.object(signal, "signal"):
        yield


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> Path:
    """The folder of a run that was killed after a checkpoint."""
    results, advance = tmp_path_factory.mktemp("stopped"), dst_td3.Run.advance

    def mortal(run: dst_td3.Run) -> None:
        if run.step == 45:
            raise Killed
        advance(run)

    with mock.patch.object(dst_td3.Run, "advance", mortal), pytest.raises(Killed):
        call(train, results)
    return next(results.rglob("checkpoint.npz")).parent


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The folder of a finished run."""
    results = tmp_path_factory.mktemp("finished")
    assert call(train, results) == (0, "")
    return next(results.rglob("policy.npz")).parent


@pytest.fixture
def in_a_copy(tmp_path) -> Callable[[Path], Path]:
    """Return a function that copies a run's folder, which it returns, over what the example before has left."""

    def copy(folder: Path) -> Path:
        results = tmp_path / "results"
        shutil.rmtree(results, ignore_errors=True)
        shutil.copytree(folder.parents[2], results)
        return results / folder.relative_to(folder.parents[2])

    return copy


# --- What is malformed ------------------------------------------------------------------------------------------------
scalars = st.sampled_from(
    [None, True, False, 0, 1, -1, 2.5, -0.0, float("nan"), float("inf"), 10**30, 2**63, "", "x", "tpu", "1", "é\n"]
)
values = scalars | st.lists(scalars, max_size=2) | st.dictionaries(st.sampled_from(["a", "step"]), scalars, max_size=2)
dtypes = st.sampled_from(["f2", "f8", ">f4", "i1", "i8", "u8", "?", "c8", "U3", "S2", "M8[s]"])


def damaged(draw: Callable, content: bytes) -> bytes:
    """Return some bytes with a few of them flipped, or cut, or with others at their end."""
    damage = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        damage[draw(st.integers(0, len(damage) - 1))] ^= draw(st.integers(1, 255))
    end = draw(st.integers(0, len(damage)))
    return draw(st.sampled_from([bytes(damage), content[:end], content + content[:end], b"null", b"\x00", content]))


def other_json(draw: Callable, content: object) -> object:
    """Return JSON with one value somewhere in it replaced or left out."""
    if not isinstance(content, dict | list) or not content or draw(st.integers(0, 4)) == 0:
        return draw(values)
    keys = sorted(content) if isinstance(content, dict) else range(len(content))
    key = draw(st.sampled_from(keys))
    changed = content.copy()
    if draw(st.integers(0, 4)) == 0:
        del changed[key]
    else:
        changed[key] = other_json(draw, content[key])
    return changed


def other_array(draw: Callable, array: np.ndarray) -> np.ndarray:
    """Return an array of another type, shape or content."""
    how = draw(st.sampled_from(["dtype", "dtype", "flat", "axis", "shorter", "empty", "one", "swapped"]))
    if how == "dtype" and array.dtype.kind != "U":
        with np.errstate(all="ignore"):
            return array.astype("f8").astype(draw(dtypes))
    if how == "shorter" or how == "swapped":
        return np.atleast_1d(array)[:-1] if how == "shorter" else np.atleast_1d(array).T[::-1]
    others = {"flat": array.ravel(), "axis": array[None], "empty": np.zeros(0, array.dtype)}
    return others.get(how, np.full(1, 10**9))


def write_other_arrays(draw: Callable, path: Path) -> None:
    """Leave out or change some arrays of a file, or damage its bytes."""
    if draw(st.booleans()):
        path.write_bytes(damaged(draw, path.read_bytes()))
        return
    arrays = dst_td3.read_arrays(path)
    names = st.sampled_from(["state"] if "state" in arrays and draw(st.booleans()) else sorted(arrays))
    for name in draw(st.lists(names, min_size=1, max_size=3, unique=True)):
        how = draw(st.integers(0, 5))
        if how == 0:
            del arrays[name]
        elif how == 1:
            others = [other for other in arrays.values() if other.dtype == arrays[name].dtype]
            arrays[name] = draw(st.sampled_from(others))
        elif name == "state":
            arrays[name] = np.array(json.dumps(other_json(draw, json.loads(str(arrays[name])))))
        else:
            arrays[name] = other_array(draw, arrays[name])
    np.savez(path, **arrays)


def repeated(examples: int):
    """Try a test with so many examples, the same at each run; each takes a copy of its own."""
    return settings(max_examples=examples, suppress_health_check=[HealthCheck.function_scoped_fixture])


def write_other_policy(draw: Callable, path: Path) -> None:
    """Write a policy that may be of other observations, layers or actions than the environment's."""
    widths = [draw(st.integers(2, 4)), *draw(st.lists(st.integers(1, 3), max_size=2)), draw(st.integers(1, 3))]
    layers = dst_td3.initial_layers(widths, [a * b for a, b in itertools.pairwise(widths)], np.random.default_rng(0))
    bound = np.full(widths[-1], draw(st.sampled_from([1, 0, np.nan, 3e38])), np.float32)
    dst_td3.save_policy(path, layers, (-bound, bound), "Still-v0")


# --- Tests ------------------------------------------------------------------------------------------------------------
@repeated(250)
@given(data=st.data())
def test_policies(data, finished, in_a_copy, tmp_path):
    """They are read to be watched, to be exported, and to act first in another run."""
    run = in_a_copy(finished)
    write = data.draw(st.sampled_from([write_other_arrays, write_other_arrays, write_other_policy]))
    write(data.draw, run / "policy.npz")
    watched = assert_refused_or_used(run, play, run)
    header = tmp_path / "policy.h"
    header.write_text("old")
    exported = assert_refused_or_used(run, export_c.export, export_c.Arguments(run, output=header))
    assert exported >= watched and (header.read_text() == "old") == exported
    assert assert_refused_or_used(tmp_path, train, tmp_path / "results", run / "policy.npz") >= watched


@repeated(250)
@given(data=st.data())
def test_configurations_and_summaries(data, finished, stopped, in_a_copy):
    """A finished run is watched and exported; one that was killed goes on."""
    begun = data.draw(st.booleans())
    run = in_a_copy(stopped if begun else finished)
    path = run / data.draw(st.sampled_from(["config.json"] * 3 + ["evaluations.csv" if begun else "summary.json"]))
    if path.suffix == ".json" and data.draw(st.integers(0, 3)):
        content = json.loads(path.read_text())
        notes = st.dictionaries(st.sampled_from(["resumed", "evaluated_otherwise"]), values, max_size=1)
        path.write_text(json.dumps(other_json(data.draw, content | data.draw(notes))))
    else:
        path.write_bytes(damaged(data.draw, path.read_bytes()))
    if begun and data.draw(st.booleans()):
        (run / "summary.json").write_text(json.dumps(data.draw(values | st.fixed_dictionaries({"steps": values}))))
    refused = assert_refused_or_used(run, train, run.parents[2])
    assert refused or (run / "policy.npz").exists() or (run / "summary.json").exists()
    if not begun:
        assert_refused_or_used(run, play, run)
        assert_refused_or_used(run, export_c.export, export_c.Arguments(run, output=run.parents[2] / "policy.h"))


@repeated(250)
@given(data=st.data())
def test_checkpoints(data, finished, stopped, in_a_copy):
    """What is not refused ends with the bytes of a run that nothing disturbed."""
    run = in_a_copy(stopped)
    path = run / data.draw(st.sampled_from(["checkpoint.npz"] * 4 + ["transitions.bin"]))
    before = path.read_bytes()
    if path.suffix == ".npz":
        write_other_arrays(data.draw, path)
    else:
        path.write_bytes(damaged(data.draw, before))
    changed = path.read_bytes() != before
    refused = assert_refused_or_used(run, train, run.parents[2])
    assert changed or not refused
    if not refused:
        assert_same_bytes(run, finished)


words = st.sampled_from(
    [
        *(
            "",
            "x",
            "-1",
            "0",
            "1",
            "2.5",
            "nan",
            "inf",
            "-inf",
            "1e400",
            "1_0",
            "None",
            "null",
            "[]",
            "{}",
            "[1]",
            "tpu",
        ),
        *("9" * 30, "9" * 400, "é", "\udcff", "a" * 300, "{'a': 1}", '{"reward": 1}', '{"reward": NaN}', '{"a": 1}'),
        *("Still-v0", "a:b", "../x", "/", "/dev/null", "dst_td3.py", "policy.npz", "--", "-h", "--env", "Hopper-v9"),
    ]
)
OPTIONS = [
    *("--env", "--env-kwargs", "--method", "--sparsity", "--er-lambda", "--hidden", "--adapt-interval", "--seed"),
    *("--drop-fraction", "--adapt-until", "--total-timesteps", "--learning-starts", "--initial-policy", "--batch-size"),
    *("--buffer-size", "--gamma", "--tau", "--policy-frequency", "--updates-per-step", "--learning-rate"),
    *("--weight-decay", "--exploration-noise", "--policy-noise", "--noise-clip", "--eval-interval", "--eval-episodes"),
    *("--checkpoint-interval", "--engine", "--device", "--threads", "--snapshot-at", "--nonsense", "--drop-by"),
    *("--describe", "--tensorboard"),
]


@repeated(250)
@given(options=st.lists(st.tuples(st.sampled_from(OPTIONS), st.lists(words, max_size=2)), min_size=1, max_size=3))
def test_arguments(options, tmp_path, monkeypatch):
    """What is not refused learns for a few steps. A step with endless updates is left out."""
    assume(not any(option == "--updates-per-step" and len(word) >= 30 for option, words in options for word in words))
    advance = dst_td3.Run.advance

    def mortal(run: dst_td3.Run) -> None:
        if run.step == 24:
            raise Killed
        advance(run)

    results = tmp_path / "results"
    shutil.rmtree(results, ignore_errors=True)
    results.mkdir()
    fixed = {"total-timesteps": 60, "learning-starts": 20, "hidden": 4, "engine": "masked", "results-dir": results}
    given = [f"--{name}={value}" for name, value in ({"env": "Still-v0"} | fixed).items()]
    given += [word for option, words in options for word in (option, *words)]
    monkeypatch.setattr(sys, "argv", ["dst_td3.py", *given])
    brief = (
        mock.patch.object(dst_td3.Run, "advance", mortal),
        mock.patch.object(dst_td3, "evaluate", lambda *_: [(0, 1)]),
    )
    with brief[0], brief[1], mock.patch("torch.set_num_threads"):
        refused = assert_refused_or_used(results, dst_td3.main)
    assert not refused or not os.listdir(results), "nothing is left behind"
