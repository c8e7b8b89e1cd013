"""Jobs of a campaign, each a command that leaves a result: a pool of them and its progress, their time, Slurm."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import NamedTuple


class Job(NamedTuple):
    """A command of python, done when ``result`` exists; ``needs`` is a file that another job leaves."""

    name: str
    command: str
    result: Path
    steps: int = 0  # of a training run
    needs: Path | None = None

    @property
    def words(self) -> list[str]:
        """What is executed: the command in the python that runs this one."""
        return [sys.executable, *shlex.split(self.command)[1:]]

    def is_done(self) -> bool:
        """Tell whether there is nothing left to do."""
        return self.result.exists()

    def is_ready(self) -> bool:
        """Tell whether it can begin."""
        return self.needs is None or self.needs.exists()

    def step(self) -> int:
        """Return the step of a training run's last evaluation."""
        try:
            return int(self.result.with_name("evaluations.csv").read_text().splitlines()[-1].split(",")[0])
        except (OSError, ValueError, IndexError):
            return 0


# --- Pool -------------------------------------------------------------------------------------------------------------
class Stopped(Exception):
    """A signal said to stop; its number is the argument."""


class Pool:
    """Works on jobs, some at the same time. A job that fails stops no other."""

    def __init__(self, slots: int, logs: Path):
        self.slots, self.logs, self.signals = slots, logs, []
        self.waiting, self.running, self.failed = [], {}, []
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:  # what nohup makes of SIGHUP
                signal.signal(number, lambda number, frame: self.signals.append(number))

    def work(self, jobs: list[Job], show: Callable[[], None] = lambda: None) -> None:
        """Work on jobs until all have ended, and ``show`` it. Raises Stopped after a signal, when none runs any more.

        A signal only leaves a note, which is read here: raised in the middle of a start, it would lose the new process.
        """
        self.waiting = list(jobs)
        try:
            while self.waiting or self.running:
                self._reap()
                self._start()
                show()
                if self.signals:
                    raise Stopped(self.signals[0])
                time.sleep(0.2)
        finally:
            for process in self.running.values():
                os.killpg(process.pid, signal.SIGTERM)
            if self.running:
                print("\nstopping: each run first writes its checkpoint", flush=True)
            for process in self.running.values():
                process.wait()

    def _reap(self) -> None:
        for job, process in list(self.running.items()):
            if process.poll() is not None:
                del self.running[job]
                if process.returncode < 0:  # by the kernel, say, for its memory: then its log ends with nothing
                    self._note(job, f"ended by {signal.Signals(-process.returncode).name}")
                if process.returncode != 0 or not job.is_done():
                    self.failed.append(job)

    def _start(self) -> None:
        for job in [job for job in self.waiting if job.is_ready()][: self.slots - len(self.running)]:
            self.waiting.remove(job)
            with open(self.log(job), "a") as log:
                print(job.command, file=log, flush=True)
                # In a group of its own, so that Ctrl-C does not reach it: a second signal ends a run at once.
                options = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log, "process_group": 0}
                self.running[job] = subprocess.Popen(job.words, **options)
        if not self.running:  # nor can anything start: what made the policies has failed or kept none
            for job in self.waiting:
                reason = "which the run in that folder did not leave: move the folder away to make it again"
                self._note(job, f"{job.name} needs {job.needs}, {reason}")
            self.failed += self.waiting
            self.waiting.clear()

    def _note(self, job: Job, line: str) -> None:
        with open(self.log(job), "a") as log:
            print(line, file=log)

    def log(self, job: Job) -> Path:
        """Return the file that has what a job says."""
        return self.logs / f"{job.name}.log"

    def report(self) -> int:
        """Name what has failed with the last line of its log. Returns the exit code."""
        if not self.failed:
            return 0
        print(f"{len(self.failed)} failed; the same command tries them again. Their logs end with:", file=sys.stderr)
        for log in map(self.log, self.failed):
            last = log.read_text(errors="replace").splitlines()[-1]
            print(f"  {log}: {last}", file=sys.stderr)
        return 1


class Progress:
    """Shows how far a pool is with training runs: in place on a terminal, else as a line where something changes."""

    def __init__(self, pool: Pool, runs: list[Job]):
        self.pool, self.total, self.shown, self.began = pool, len(runs), "", time.monotonic()
        self.missing = {run: run.step() for run in runs if not run.is_done()}  # with the step it goes on from

    def __call__(self) -> None:
        """Show it."""
        pool, on_terminal = self.pool, sys.stdout.isatty()
        done = self.total - len(pool.waiting) - len(pool.running) - len(pool.failed)
        counts = f"{done} done, {len(pool.running)} running, {len(pool.failed)} failed of {self.total} runs"
        if not on_terminal and counts == self.shown:
            return
        self.shown, left, made, ahead = counts, "", 0, 0
        waiting, failed = set(pool.waiting), set(pool.failed)
        for run, first in self.missing.items():
            if run not in failed:
                step = first if run in waiting else run.step() if run in pool.running else run.steps
                made, ahead = made + step - first, ahead + run.steps - step
        if made > 0:
            minutes = int((time.monotonic() - self.began) * ahead / made / 60)
            left = f", about {minutes // 60} h {minutes % 60} min left"
        if on_terminal:
            print(f"\r\033[K{counts}{left}", end="" if pool.waiting or pool.running else "\n", flush=True)
        else:
            print(f"{datetime.now():%F %T}  {counts}{left}", flush=True)


# --- Time -------------------------------------------------------------------------------------------------------------
def kinds_of(run: Path) -> tuple[str, str]:
    """Return algorithm and setting of a run's folder: TD3 and Hopper-v4/ds-td3_sparsity=0.8, whatever its length."""
    env, name, _ = run.parts[-3:]
    return name.split("_")[0].split("-")[-1].upper(), f"{env}/{re.sub('_total-timesteps=[0-9]+', '', name)}"


def finished_runs(results: Path) -> Iterator[tuple[str, str, int, float]]:
    """Yield algorithm, setting, steps and seconds of each finished run in a folder."""
    for path in results.glob("*/*/*/summary.json"):
        with suppress(OSError, ValueError, KeyError):  # an estimate can do without a damaged one
            summary = json.loads(path.read_text())
            seconds = summary["training_seconds"] + summary["evaluation_seconds"]
            yield *kinds_of(path.parent), summary["steps"], seconds


def show_times(runs: list[Job], results: Path, shipped: Path) -> None:
    """Tell on stderr what runs will cost: by finished ones of their setting, or else of their algorithm.

    Those in ``results`` tell, or where it has none of an algorithm, those in ``shipped``.
    """
    missing = {run for run in runs if not run.is_done()}
    print(f"{len(runs)} runs of {runs[0].steps} steps, {len(missing)} of them not finished", file=sys.stderr)
    settings = {run: kinds_of(run.result.parent) for run in runs}
    for algorithm in dict.fromkeys(algorithm for algorithm, _ in settings.values()):
        for folder in (results, shipped):
            # Short runs are mostly random actions, which take next to no time.
            known = [run for run in finished_runs(folder) if run[0] == algorithm and run[2] >= runs[0].steps / 2]
            if known:
                break
        else:
            print(f"{algorithm}: no run of half as many steps is finished: the time is unknown", file=sys.stderr)
            continue
        hours = {}
        for run in (run for run in runs if settings[run][0] == algorithm):
            alike = [other for other in known if other[1] == settings[run][1]] or known
            hours[run] = run.steps * sum(seconds for *_, seconds in alike) / sum(done for _, _, done, _ in alike) / 3600
        ahead = [hours[run] for run in hours if run in missing]
        cost = f"about {sum(hours.values()):.1f} core-hours for all {len(hours)}"
        cost += f", {sum(ahead):.1f} for the {len(ahead)} missing ones"
        known_by = f"by {len(known)} finished runs in {folder}, each setting by its own where it has some"
        print(f"{algorithm}: {cost} ({known_by})", file=sys.stderr)


# --- Slurm ------------------------------------------------------------------------------------------------------------
def submit(jobs: list[Job], task: str, logs: Path, options: list[str]) -> int:
    """Submit to Slurm what is missing: a job array, and one that waits for it, of what needs it. Returns the exit code.

    ``task`` is a command of the shell that works on the job whose number, from 1 on, is $SLURM_ARRAY_TASK_ID.
    """
    missing, dependency = [(n, job.is_ready()) for n, job in enumerate(jobs, start=1) if not job.is_done()], []
    for ready, what in ((True, "a task for each line of --list"), (False, "which waits for the files that it needs")):
        if lines := ",".join(str(line) for line, is_ready in missing if is_ready is ready):
            command = ["sbatch", "--parsable", "--job-name=dst-td3", f"--array={lines}", "--cpus-per-task=1"]
            command += ["--requeue", "--open-mode=append", f"--output={logs}/slurm-%A_%a.log", *dependency]
            submitted = subprocess.run([*command, *options, "--wrap", task], stdout=subprocess.PIPE, text=True)
            if submitted.returncode != 0:  # it has said why
                return submitted.returncode
            number = submitted.stdout.strip().split(";")[0]  # the name of its cluster may follow
            print(f"submitted job array {number}, {what}: {lines}")
            dependency = [f"--dependency=afterany:{number}"]
    print(f"logs are in {logs}; when all are done, the same command without --slurm finishes the campaign")
    return 0
