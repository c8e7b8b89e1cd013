"""Signals, pipes and terminals, of trainings in processes of their own."""

import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from point import TRAINING, habit
from running import PROGRAM, assert_same_bytes, run_directory, train_here


@contextmanager
def started(*arguments: object, **options):
    """Start a training on this file's point in a process of its own, which has ended in the end."""
    paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(PROGRAM), *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": paths, "PYTHONWARNINGS": "ignore", "PYTHONUNBUFFERED": ""}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    with subprocess.Popen(command, env=environment, text=True, **pipes) as process:
        try:
            yield process
        finally:
            process.kill()


ENDLESS = ("--env", "point:Point-v0", *TRAINING[2:], *habit("endless"))


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
        assert process.wait(timeout=30) == 128 + signal.SIGINT and process.stderr.read() == ""


LONG = ("--env", "point:Point-v0", *TRAINING[2:], "--total-timesteps", "1000")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    """The folder of a run that nothing disturbed."""
    results = tmp_path_factory.mktemp("undisturbed")
    assert train_here(*LONG, "--results-dir", results)[0] == 0
    return run_directory(results)


def assert_goes_on(results: Path, undisturbed: Path) -> None:
    """Give the same command again and require the bytes of the run that nothing disturbed."""
    assert list(results.rglob("checkpoint.npz")) and not list(results.rglob("policy.npz"))
    code, output, error = train_here(*LONG, "--results-dir", results)
    assert (code, error) == (0, "") and "step 0 of" not in output.splitlines()[0]
    assert_same_bytes(run_directory(results), undisturbed)


def test_a_reader_that_goes_away_costs_no_checkpoint(tmp_path, undisturbed):
    """As ``| head -3`` does."""
    with started(*LONG, "--results-dir", tmp_path) as process:
        head = subprocess.run(["head", "-3"], stdin=process.stdout, capture_output=True, text=True)
        process.stdout.close()
        error = process.stderr.read()
        assert process.wait(timeout=60) == 128 + signal.SIGPIPE and head.stdout.count("\n") == 3
        assert error == ""
    assert_goes_on(tmp_path, undisturbed)


def test_an_interrupt_without_a_reader_costs_no_checkpoint(tmp_path, undisturbed):
    """As Ctrl-C does after ``2>&1 | tee log``, which it ends first."""
    with started(*LONG, "--results-dir", tmp_path, stderr=subprocess.STDOUT) as process:
        read_until(process, "step         0")
        process.send_signal(signal.SIGINT)
        process.stdout.close()
        assert process.wait(timeout=60) == 128 + signal.SIGINT
    assert_goes_on(tmp_path, undisturbed)


@pytest.mark.parametrize("what", ["--describe", "a finished run"])
def test_a_reader_of_little_wants_no_more(tmp_path, undisturbed, what):
    """``--describe`` and a finished run print, and end by the same code as others do there."""
    finished = (*LONG, "--results-dir", undisturbed.parents[2])
    with started(*(finished if what == "a finished run" else ("--describe",))) as process:
        process.stdout.close()
        error = process.stderr.read()
        assert (process.wait(timeout=60), error) == (128 + signal.SIGPIPE, "")
