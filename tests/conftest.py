"""What several test files share: running the command line, in this process or in one of its own."""

import csv
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import hypothesis
import pytest
import torch

import dst_td3

# How long an example takes is the machine's matter, and the examples are the same at each run.
hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True)
hypothesis.settings.load_profile("repeatable")

PROGRAM = Path(dst_td3.__file__)

# The figures that analysis.ipynb writes.
FIGURES = (
    *("fig1_learning_curves", "fig2_adapt_interval", "fig3_sparsity", "fig4_initial_policy"),
    "fig5_high_sparsity",
    *("dense_moments", "wall_clock", "seconds_and_bytes", "topology_alive", "topology_inputs"),
)

# A run of a few seconds that still evaluates, adapts, prunes targets and writes checkpoints several times.
SHORT = (
    *("--env", "Hopper-v4", "--hidden", "32", "32", "--total-timesteps", "2400", "--learning-starts", "400"),
    *("--eval-interval", "400", "--eval-episodes", "2", "--adapt-interval", "100", "--checkpoint-interval", "150"),
)


@pytest.fixture
def command_line(monkeypatch, capsys) -> Callable[..., tuple[int, str, str]]:
    """Return a function that runs dst_td3 with arguments here and returns exit code, standard output and error."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["dst_td3.py", *map(str, arguments)])
        capsys.readouterr()
        try:
            code = dst_td3.main()
        except SystemExit as leaving:
            code = leaving.code
        return code, *capsys.readouterr()

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


def start_process(*arguments: object, **options) -> subprocess.Popen:
    """Start dst_td3 with ``arguments`` in a process of its own; ``options`` are Popen's."""
    command = [sys.executable, str(PROGRAM), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)


def run_directory(results: Path) -> Path:
    """Return the only run directory below ``results``."""
    (config,) = results.rglob("config.json")
    return config.parent


def rows_of(path: Path) -> list[dict]:
    """Return the rows of a CSV file."""
    with open(path) as file:
        return list(csv.DictReader(file))


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


@pytest.fixture(autouse=True)
def denormals():
    """Keep denormal numbers for the next test, which a training in this process flushes to zero."""
    yield
    torch.set_flush_denormal(False)
