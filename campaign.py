"""Every run behind every figure and table of the paper, or those of a program of your own.

``python campaign.py --help`` says how; ``run_all.sh`` is the same in the environment that ``make`` sets up. What is run
stands here, and how in ``jobs.py``.
"""

import argparse
import dataclasses
import importlib
import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, NoReturn

from jobs import Job, Pool, Progress, Stopped, show_times, submit

FOUR, FIVE = "HalfCheetah-v4 Walker2d-v4 Hopper-v4 Ant-v4", "HalfCheetah-v4 Walker2d-v4 Hopper-v4 Ant-v4 Humanoid-v4"
RUNS, PUBLISHED = Path("runs"), Path("results")


class Row(NamedTuple):
    """Runs of the grid: each environment with each method and each of some options."""

    shown_in: str
    environments: str
    methods: str
    options: tuple[str, ...] = ("",)  # what differs from the program's defaults; N% is the step after N % of it
    program: str = "dst_td3.py"
    begins_with: int | None = None  # acts first with the policy of the run otherwise the same, after so many % of it


# The grid of one seed. The programs' defaults are the paper's settings; Figure 4 has policies of 5e5 and 7e5 steps.
GRID = (
    Row("fig1 fig2 fig4 fig5 tables", "HalfCheetah-v4", "ds-td3", ("--snapshot-at 50% 70%",)),
    Row("fig1 fig2 fig3 fig4 fig5 tables", "HalfCheetah-v4", "td3", ("--snapshot-at 50% 70%",)),
    Row("fig1 fig5 tables", "Hopper-v4 Walker2d-v4 Ant-v4", "ds-td3 td3"),
    Row("fig1 tables", "Humanoid-v4", "ds-td3 td3"),
    Row("fig1 tables", FIVE, "static-td3"),
    Row("fig2", "HalfCheetah-v4", "ds-td3", ("--adapt-interval 200", "--adapt-interval 500", "--adapt-interval 2000")),
    Row("fig3", "HalfCheetah-v4", "ds-td3", ("--sparsity 0.25", "--sparsity 0.5", "--sparsity 0.8")),
    Row("fig4", "HalfCheetah-v4", "ds-td3 td3", begins_with=50),
    Row("fig4", "HalfCheetah-v4", "ds-td3 td3", begins_with=70),
    Row("fig5", "Walker2d-v4", "ds-td3", ("--sparsity 0.9", "--sparsity 0.95"), "high_sparsity.py"),
    # As many connections in all as RLx2 keeps (arXiv 2205.15043).
    Row("fig5", "HalfCheetah-v4", "ds-td3", ("--sparsity 0.92 --critic-sparsity 0.853",), "high_sparsity.py"),
    Row("fig5", "Walker2d-v4", "ds-td3", ("--sparsity 0.977 --critic-sparsity 0.961",), "high_sparsity.py"),
    Row("fig5", "Hopper-v4", "ds-td3", ("--sparsity 0.985 --critic-sparsity 0.957",), "high_sparsity.py"),
    Row("fig5", "Ant-v4", "ds-td3", ("--sparsity 0.969 --critic-sparsity 0.892",), "high_sparsity.py"),
    Row("fig5", FOUR, "ds-td3", ("--sparsity 0.9 --n-step 1", "--sparsity 0.95 --n-step 1"), "high_sparsity.py"),
    Row("fig5", FOUR, "ds-td3", ("--sparsity 0.9 --n-step 1 --drop-by magnitude",), "high_sparsity.py"),
    Row("fig5", FOUR, "static-td3", ("--sparsity 0.9 --n-step 1",), "high_sparsity.py"),
    Row("fig5", FOUR, "ds-td3", ("--sparsity 0.9", "--sparsity 0.95")),
    Row("fig5", "HalfCheetah-v4 Walker2d-v4", "td3", ("--n-step 1",), "high_sparsity.py"),
    Row("fig5", "HalfCheetah-v4", "td3", ("--hidden 77 77",), "high_sparsity.py"),
    Row("appendix", FIVE, "ds-sac sac", ("",), "dst_sac.py"),
)


def reject(reason: object) -> NoReturn:
    """Leave with one line on stderr and exit code 2: the input cannot be used."""
    print(f"campaign.py: error: {' '.join(str(reason).split())}", file=sys.stderr)
    sys.exit(2)


# --- Command line -----------------------------------------------------------------------------------------------------
def positive(word: str) -> int:
    """Read a positive whole number."""
    if not re.fullmatch("[1-9][0-9]{0,8}", word):
        raise argparse.ArgumentTypeError(f"must be a positive whole number, not {word} (at most 999999999)")
    return int(word)


def parse(words: list[str], arguments: list[str]) -> argparse.Namespace:
    """Read the words before ``--``; the arguments after it are for a program of one's own."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s [OPTION ...] [--program FILE [--env ENV ...] [-- ARGUMENT ...]]",
        description="Trains every agent of the paper, then makes every figure and table by analysis.ipynb. Stopped at "
        "any moment and given again, it does only what is missing. Paths are seen from the folder of this program.",
        allow_abbrev=False,
    )
    parser.error = reject
    add, number, several = parser.add_argument, {"type": positive, "metavar": "N"}, {"action": "append", "default": []}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    narrowing = "only the runs of fig1 to fig5, tables, appendix, an environment or a method; given again, it narrows"
    program = "instead of the paper's runs, those of a file whose arguments subclass dst_td3.Arguments (given after --)"
    add("--only", **several, metavar="NAME", help=narrowing)
    add("--seeds", **number, help="seeds of each run, 0 to N-1 (default: 5; with --quick: 2)")
    add("--steps", **number, help="environment steps of a run (default: the program's; with --quick: 1500)")
    add("--jobs", **number, default=cores, help="runs at the same time, one thread each (default: one for each core)")
    add("--quick", action="store_true", help="all of it with tiny runs, to see that it works; in RUNS/quick")
    add("--results-dir", type=Path, default=RUNS, metavar="RUNS", help="where results go (default: runs)")
    add("--list", action="store_true", help="print each run's command and the time that all would take; run nothing")
    add("--line", **number, help="run only line N of the list, for job schedulers other than Slurm")
    add("--slurm", action="store_true", help="submit what is missing as a Slurm job array instead of running it here")
    sbatch = "what else sbatch is given, such as --slurm-options '--time=24:00:00 --mem=8G'"
    add("--slurm-options", type=shlex.split, default=[], metavar="OPTIONS", help=sbatch)
    add("--program", metavar="FILE", help=program)
    add("--env", **several, help="environment of --program (default: its own); may be given again")
    if "--slurm-options" in words:  # argparse would take "--mem=8G" for another option
        place = words.index("--slurm-options")
        words = [*words[:place], "=".join(words[place : place + 2]), *words[place + 2 :]]
    given = parser.parse_args(words, argparse.Namespace(arguments=arguments))
    if given.only if given.program else given.env or arguments:
        reject("--only narrows the paper's runs; --env and arguments after -- are for a --program")
    given.results = given.results_dir / "quick" if given.quick else given.results_dir
    given.seeds = given.seeds or (2 if given.quick else 5)
    given.steps = given.steps or (1500 if given.quick else None)
    return given


# --- List -------------------------------------------------------------------------------------------------------------
def arguments_class(program: str) -> type:
    """Return the last subclass of dst_td3.Arguments that a program defines, or else the one that it imports."""
    from dst_td3 import Arguments

    path = Path(program).resolve()
    if not path.is_file():
        reject(f"there is no file {program} in {Path.cwd()}")
    if str(path.parent) not in sys.path:  # python itself puts it there for the file that it is given
        sys.path.insert(0, str(path.parent))
    module = importlib.import_module(path.stem)
    kinds = [kind for kind in vars(module).values() if isinstance(kind, type) and issubclass(kind, Arguments)]
    kinds.sort(key=lambda kind: kind.__module__ == module.__name__)
    return kinds[-1] if kinds else reject(f"{program} has no subclass of dst_td3.Arguments")


def runs_of(row: Row, options: str, agent: str, given: argparse.Namespace) -> list[Job]:
    """Return a run for each seed. Raises InputError where the program would refuse its arguments."""
    import tyro

    from dst_td3 import resolve, run_directory

    kind, runs = arguments_class(row.program), []
    steps = given.steps or kind.total_timesteps
    options = re.sub(r"(\d+)%", lambda percent: str(steps * int(percent[1]) // 100), options)
    if steps != kind.total_timesteps:
        options += f" --total-timesteps {steps}"
    if given.quick:
        options += f" --learning-starts {steps // 4} --eval-interval {max(1, steps // 10)} --eval-episodes 1"
    options, where = shlex.split(options), ["--results-dir", str(given.results)]
    parsed = tyro.cli(kind, args=[*agent.split(), *options, *where], prog=row.program)
    parsed.validate()
    if parsed.seed != kind.seed:
        reject("--seed cannot stand after --: --seeds N makes seeds 0 to N-1")
    if given.program and steps < 2 * parsed.learning_starts:
        random = f"the first {parsed.learning_starts} steps of {steps} are random actions: --learning-starts sets that"
        print(f"{row.program}: {random}", file=sys.stderr)
    for seed in range(given.seeds):
        args, policy, initial = resolve(dataclasses.replace(parsed, seed=seed)), None, []
        if row.begins_with is not None:
            policy = run_directory(args) / f"policy-{args.total_timesteps * row.begins_with // 100}.npz"
            args, initial = dataclasses.replace(args, initial_policy=policy), ["--initial-policy", str(policy)]
        words = ["python", row.program, *agent.split(), "--seed", str(seed), *options, *initial, *where]
        directory = run_directory(args)
        name, result = "_".join(directory.parts[-3:]), directory / "summary.json"
        runs.append(Job(name, shlex.join(words), result, args.total_timesteps, policy))
    return runs


def list_runs(given: argparse.Namespace) -> list[Job]:
    """Return all runs, seeds in the outer loop: every environment and method has one seed before any has two."""
    own = Row("", " ".join(given.env), "", (shlex.join(given.arguments),), given.program)
    settings = [
        (row, options, f"--env {env}" * bool(env) + f" --method {method}" * bool(method))
        for row in ([own] if given.program else GRID)
        for options in row.options
        for env in row.environments.split() or [""]
        for method in row.methods.split() or [""]
        if {*row.shown_in.split(), env, method}.issuperset(given.only)
    ]
    if not settings:
        expected = "fig1 to fig5, tables, appendix, an environment or a method"
        reject(f"no run matches --only {' '.join(given.only)}: it takes {expected}")
    try:
        import dst_td3

        runs = [run for seed in zip(*(runs_of(*setting, given) for setting in settings), strict=True) for run in seed]
    except ImportError as error:
        reject(f"{error}: activate the environment of requirements.txt")
    except dst_td3.InputError as error:
        reject(f"no such run can be made: {error}")
    if len({run.result for run in runs}) < len(runs):
        reject("two runs would share a folder: give each --env once")
    return runs


# --- Campaign ---------------------------------------------------------------------------------------------------------
def final_jobs(given: argparse.Namespace) -> Iterator[Job]:
    """Yield what follows the paper's runs: speed measurements where all runs are made, and the notebook."""
    # Seconds mean something only once no run takes cores away. Other libraries are compared where `make benchmark` has
    # set up their environment.
    measured, peers = given.results / "benchmarks", Path(".venv-peers/bin/python")
    compared = ["--peers", str(peers)] if peers.exists() else []
    further = ["--only", "updates", "--repeats", "1"] if given.quick else compared
    benchmark = ["python", "benchmarks/benchmark.py", "--results-dir", str(measured), *further]
    measuring = Job("benchmark", shlex.join(benchmark), measured / ("updates.csv" if given.quick else "README.md"))
    if not given.only and not measuring.is_done():
        yield measuring
    os.environ["RESULTS_DIR"] = str(given.results)
    notebook = ["python", "-m", "jupyter", "execute", "analysis.ipynb", f"--output={given.results}/analysis"]
    yield Job("analysis", shlex.join(notebook), given.results / "analysis.ipynb")


def main() -> int:
    """Run the command line and return its exit code."""
    end = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    own, arguments = sys.argv[1:end], sys.argv[end + 1 :]
    given = parse(own, arguments)
    os.chdir(Path(__file__).resolve().parent)
    runs, logs = list_runs(given), given.results / "logs"
    if given.list:
        print(*(run.command for run in runs), sep="\n")
        show_times(runs, given.results, PUBLISHED)
        return 0
    if given.line is not None:
        if given.line > len(runs):
            reject(f"--line must be at most {len(runs)}, the length of the list, not {given.line}")
        job = runs[given.line - 1]
        print(job.command, flush=True)
        os.execv(sys.executable, job.words)
    try:
        logs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reject(f"cannot write to {given.results}: {error.strerror}: choose another --results-dir")
    if given.slurm:
        if shutil.which("sbatch") is None:
            reject("--slurm needs sbatch, which this machine does not have")
        words = [word for word in own if word != "--slurm"]
        task = f"exec {shlex.join([sys.executable, __file__, *words, '--line'])} $SLURM_ARRAY_TASK_ID"
        task += f" -- {shlex.join(arguments)}" if arguments else ""
        return submit(runs, task, logs, given.slurm_options)
    pool = Pool(given.jobs, logs)
    try:
        pool.work([run for run in runs if not run.is_done()], Progress(pool, runs))
        if given.program and not pool.failed:
            print(f"to draw them beside the published runs: python analysis.py {shlex.quote(str(given.results))}")
        for job in () if given.program else final_jobs(given):
            print(f"{job.name}: {job.command}", flush=True)
            pool.work([job])
    except Stopped as stopped:
        done = sum(run.is_done() for run in runs)
        print(f"stopped with {done} of {len(runs)} runs done; to go on: {shlex.join(sys.orig_argv)}")
        return 128 + stopped.args[0]
    return pool.report()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:  # where no run has begun
        sys.exit(130)
