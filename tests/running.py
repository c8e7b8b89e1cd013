"""What several test files share about runs: making them here or in a process of their own, and reading them."""

import csv
import importlib.util
import inspect
import io
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

import dst_td3

PROGRAM = Path(dst_td3.__file__)

# The figures that analysis.ipynb writes.
FIGURES = (
    *("fig1_learning_curves", "fig2_adapt_interval", "fig3_sparsity", "fig4_initial_policy"),
    "fig5_high_sparsity",
    *("dense_moments", "seconds_and_bytes", "topology_alive", "topology_inputs"),
)

# Figure 5: its four environments, and its recipe as the names of its runs have it, of any and of those that adapt.
FOUR = ("HalfCheetah-v4", "Walker2d-v4", "Hopper-v4", "Ant-v4")
RECIPE = "recycle-dormant=True_updates-per-step=2_step-exponent=0.5"
ADAPTING_RECIPE = f"drop-by=contribution_{RECIPE}"
AS_RLX2 = (  # environment, sparsities of actor and critics, steps of targets in a run's name
    ("HalfCheetah-v4", 0.92, 0.853, ""),
    ("Walker2d-v4", 0.977, 0.961, "_n-step=3"),
    ("Hopper-v4", 0.985, 0.957, ""),
    ("Ant-v4", 0.969, 0.892, ""),
)

# Seed 0 of two runs, as results/rules.md had seen them before they were made again.
FORMER = {
    ("Walker2d-v4", "td3"): {"return": 3332.202715751499, "LCA": 0.477725729017435},
    ("Ant-v4", "ds-td3"): {"return": 3695.745658458315, "LCA": 0.45615302924041384},
}

# A run of a few seconds that still evaluates, adapts, prunes targets and writes checkpoints several times.
SHORT = (
    *("--env", "Hopper-v4", "--hidden", "32", "32", "--total-timesteps", "2400", "--learning-starts", "400"),
    *("--eval-interval", "400", "--eval-episodes", "2", "--adapt-interval", "100", "--checkpoint-interval", "150"),
)

# What is said of an environment that cannot be made.
UNMADE = "cannot be made (the paper's are HalfCheetah-v4, Hopper-v4, Walker2d-v4, Ant-v4 and Humanoid-v4)"

# What a run leaves that is the same at each repetition.
REPEATED = ("evaluations.csv", "topology.csv", "policy.npz")

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch has no GPU to use here")


def imported(path: str):
    """Import a program by its path from the root, such as ``examples/rigl.py``."""
    path = Path(dst_td3.__file__).parent / path
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_here(main: Callable, program: str, *arguments: object) -> tuple[int, str, str]:
    """Run the command line of a program in this process: its exit code, standard output and standard error.

    What a training sets in this process, it undoes.
    """
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    output, error = io.StringIO(), io.StringIO()
    argv = mock.patch.object(sys, "argv", [program, *map(str, arguments)])
    try:
        with argv, redirect_stdout(output), redirect_stderr(error):
            code = main()
    except SystemExit as leaving:
        code = leaving.code
    finally:
        torch.set_num_threads(1)
        torch.set_flush_denormal(False)
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return code, output.getvalue(), error.getvalue()


def train_here(*arguments: object, kind: type[dst_td3.Arguments] = dst_td3.Arguments) -> tuple[int, str, str]:
    """Run the program of a kind of arguments in this process."""
    return run_here(lambda: dst_td3.main(kind), Path(inspect.getfile(kind)).name, *arguments)


def assert_refused(command_line: Callable, results: Path, arguments: str, expected: str) -> None:
    """Require that bad input gets one clear line and exit code 2, and leaves nothing behind."""
    code, output, error = command_line("--env", "Hopper-v4", "--results-dir", results, *arguments.split())
    assert code == 2, output
    assert expected in error and "Traceback" not in error
    if "For full helptext" not in error:  # what the argument parser itself refuses comes in a box
        assert re.fullmatch(r"\w+\.py: error: .+\n", error)
    assert not list(results.iterdir()), "nothing is left behind"


class Killed(BaseException):
    """Ends a run in this process as SIGKILL does in its own: what has not been written is lost."""


@contextmanager
def replaced_advance(replacement: Callable[[dst_td3.Run, Callable], None]):
    """Take each environment step of a run by ``replacement`` of the run and of the function that takes it."""
    advance = dst_td3.Run.advance
    with mock.patch.object(dst_td3.Run, "advance", lambda run: replacement(run, advance)):
        yield


@contextmanager
def killed_after(step: int):
    """Kill the run in this process 100 steps after its first checkpoint at or after ``step``."""

    def mortal(run: dst_td3.Run, advance: Callable) -> None:
        if run.saved_step >= step and run.step == run.saved_step + 100:
            raise Killed
        advance(run)

    with replaced_advance(mortal), pytest.raises(Killed):
        yield


@contextmanager
def before_step(step: int, action: Callable[[], object]):
    """Do something once in the run in this process, before it takes the step after ``step``."""
    pending = [action]

    def acting(run: dst_td3.Run, advance: Callable) -> None:
        if pending and run.step == step:
            pending.pop()()
        advance(run)

    with replaced_advance(acting):
        yield
    assert not pending


def start_process(*arguments: object, **options) -> subprocess.Popen:
    """Start dst_td3 with ``arguments`` in a process of its own; ``options`` are Popen's."""
    command = [sys.executable, str(PROGRAM), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)


def wait_for_step(results: Path, step: int) -> None:
    """Wait until a checkpoint at or after ``step`` is on disk."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        for path in results.rglob("checkpoint.npz"):
            with np.load(path) as stored:
                if json.loads(str(stored["state"]))["step"] >= step:
                    return
        time.sleep(0.01)
    raise AssertionError(f"no checkpoint at step {step} in time")


def run_directory(results: Path) -> Path:
    """Return the only run directory below ``results``."""
    (config,) = results.rglob("config.json")
    return config.parent


def rows_of(path: Path) -> list[dict]:
    """Return the rows of a CSV file."""
    with open(path) as file:
        return list(csv.DictReader(file))


def assert_same_bytes(directory: Path, other: Path) -> None:
    """Require that two runs left the same."""
    for name in REPEATED:
        assert (directory / name).read_bytes() == (other / name).read_bytes(), name


def read_table(text: str) -> list[dict[str, str]]:
    """Return the rows of the only Markdown table of a text, by the names of their columns."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [dict(zip(cells[0], row, strict=True)) for row in cells[2:]]


def damage(path: Path, how: str) -> None:
    """Damage a file."""
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
