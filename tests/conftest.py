"""What several test files share: running the command line, here or apart, and reading what runs leave."""

import csv
import inspect
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import hypothesis
import numpy as np
import pytest
import torch

import dst_td3

pytest.register_assert_rewrite("engines")

# How long an example takes is the machine's matter, and the examples are the same at each run.
hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True)
hypothesis.settings.load_profile("repeatable")

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

# A run of a few seconds that still evaluates, adapts, prunes targets and writes checkpoints several times.
SHORT = (
    *("--env", "Hopper-v4", "--hidden", "32", "32", "--total-timesteps", "2400", "--learning-starts", "400"),
    *("--eval-interval", "400", "--eval-episodes", "2", "--adapt-interval", "100", "--checkpoint-interval", "150"),
)

# What a run leaves that is the same at each repetition.
REPEATED = ("evaluations.csv", "topology.csv", "policy.npz")


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch has no GPU to use here")


@pytest.fixture(autouse=True)
def process():
    """Undo for the next test what a training sets in this process, and keep torch to one thread on small networks."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    torch.set_num_threads(1)
    yield
    torch.set_flush_denormal(False)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def program_of(kind: type[dst_td3.Arguments]) -> str:
    """Return the name of the program that takes a kind of arguments."""
    return Path(inspect.getfile(kind)).name


@pytest.fixture
def command_line(monkeypatch, capsys) -> Callable[..., tuple[int, str, str]]:
    """Return a function that runs the program of a kind of arguments here: exit code, standard output and error."""

    def run(*arguments: object, kind: type[dst_td3.Arguments] = dst_td3.Arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [program_of(kind), *map(str, arguments)])
        capsys.readouterr()
        try:
            code = dst_td3.main(kind)
        except SystemExit as leaving:
            code = leaving.code
        return code, *capsys.readouterr()

    return run


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


def finished_run(results: Path, *further: object) -> Path:
    """Make a short run in a process of its own and return its directory."""
    process = start_process(*SHORT, *further, "--results-dir", results)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    return run_directory(results)


def read_table(text: str) -> list[dict[str, str]]:
    """Return the rows of the only Markdown table of a text, by the names of their columns."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [dict(zip(cells[0], row, strict=True)) for row in cells[2:]]
