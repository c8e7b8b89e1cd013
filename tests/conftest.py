"""How the tests are set up, and the runs that several of them read."""

import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import hypothesis
import pytest
import torch

pytest.register_assert_rewrite("engines", "point", "running")

from point import TRAINING  # noqa: E402
from running import SHORT, run_directory, start_process, train_here, wait_for_step  # noqa: E402

# How long an example takes is the machine's matter, and the examples are the same at each run.
hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True)
hypothesis.settings.load_profile("repeatable")

torch.set_num_threads(1)  # as runs do: networks are small


@pytest.fixture(autouse=True)
def foreground():
    """Let Ctrl-C interrupt, also where the tests run in a shell's background, which has it ignored."""
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, former)


@pytest.fixture(scope="session")
def command_line() -> Callable[..., tuple[int, str, str]]:
    """Return a function that runs the program of a kind of arguments here: exit code, standard output and error."""
    return train_here


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> tuple[Path, str]:
    """Make a short run in a process of its own, for tests to read: its directory, and what it wrote."""
    results = tmp_path_factory.mktemp("unbroken")
    process = start_process(*SHORT, "--results-dir", results)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    return run_directory(results), output


@pytest.fixture(scope="session")
def unbroken(finished) -> Path:
    """The directory of that run, which nothing disturbed."""
    return finished[0]


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


@pytest.fixture(scope="session")
def plain(tmp_path_factory) -> tuple[Path, str]:
    """Train on a point without habits, for tests to read: the run's directory, and what was on screen."""
    results = tmp_path_factory.mktemp("my results")
    code, output, error = train_here(*TRAINING, "--results-dir", results)
    assert (code, error) == (0, "")
    return run_directory(results), output
