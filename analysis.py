"""Runs, the statistics and verdicts that results/rules.md fixes, and one's own runs drawn beside the published ones.

``python analysis.py FOLDER --beside results`` draws the learning curves of FOLDER's runs with those of results, writes
figure and table into FOLDER, and prints the table of differences. ``report.py`` has every figure and table of
analysis.ipynb, made with what is here.

A sample is a list with one array per task, of shape (seeds,), or (resamples, seeds) within the bootstrap; seeds may
differ between tasks. A return is the sum of an episode's rewards, an LCA a sum of returns over environment steps.
Sources: Sokar et al. 2022 (arXiv 2106.04217), whose numbers stand below; Agarwal et al. 2021, "Deep Reinforcement
Learning at the Edge of the Statistical Precipice" (rliable), whose definitions of the probability of improvement, the
interquartile mean and the stratified bootstrap these are; Mann and Whitney 1947; Welch 1947; Holm 1979.
"""

import dataclasses
import functools
import io
import itertools
import json
import math
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import matplotlib
import numpy as np
import pandas as pd
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats

import dst_td3
from dst_td3 import InputError, Layer, command_line, read_policy, writing

TASKS = ("HalfCheetah-v4", "Walker2d-v4", "Hopper-v4", "Ant-v4", "Humanoid-v4")
METHODS = {"td3": "TD3", "static-td3": "Static-TD3", "ds-td3": "DS-TD3"}
SAC_METHODS = {"sac": "SAC", "ds-sac": "DS-SAC"}
PAIRS = (("ds-td3", "td3"), ("static-td3", "td3"), ("ds-td3", "static-td3"))

STEPS, EVALUATIONS, EVAL_INTERVAL, LAST, SEEDS = 1_000_000, 201, 5000, 10, range(5)  # the paper's
RESAMPLES, SEED, LEVEL = 50_000, 0, 0.95
LEAST_SEEDS = 3  # of every sample that an interval is drawn from; that of two seeds is no more than both of them

# The paper's numbers, of five seeds on the -v3 tasks, for TD3, Static-TD3, DS-TD3 and SAC: the mean LCA (Table 1), and
# mean and standard deviation of the return (Table 2).
PAPER_LCA = {
    "HalfCheetah-v4": (1.7686, 1.7666, 1.9560, 1.7297),
    "Walker2d-v4": (0.5264, 0.5167, 0.6956, 0.6128),
    "Hopper-v4": (0.4788, 0.4984, 0.5435, 0.5572),
    "Ant-v4": (0.5524, 0.5807, 0.6623, 0.7969),
    "Humanoid-v4": (0.3635, 0.5182, 0.6089, 0.5639),
}
PAPER_RETURN = {
    "HalfCheetah-v4": ((11153.48, 473.29), (10583.84, 307.03), (11459.88, 482.55), (11415.23, 357.22)),
    "Walker2d-v4": ((4042.36, 576.57), (3951.01, 443.78), (4870.57, 525.33), (4566.18, 448.25)),
    "Hopper-v4": ((2184.78, 1224.14), (3570.88, 43.71), (3587.17, 70.62), (3387.36, 148.73)),
    "Ant-v4": ((4287.69, 1080.88), (4148.61, 801.34), (5011.56, 596.95), (5848.64, 385.85)),
    "Humanoid-v4": ((3809.15, 1053.40), (4989.47, 546.32), (5238.16, 121.71), (5518.61, 97.03)),
}
PAPER_MEANS = {task: tuple(mean for mean, _ in pairs) for task, pairs in PAPER_RETURN.items()}
V4_NOTE = (
    "The paper used gym's `-v3` environments; ours are gymnasium's `-v4`, the same tasks on newer simulator bindings, "
    "with close but not equal returns (Humanoid-v4's contact cost is always zero, Ant-v4 has 27 observations instead "
    "of 111)."
)


# --- Runs -------------------------------------------------------------------------------------------------------------
LENGTH_OPTIONS = ("total-timesteps", "learning-starts", "eval-interval", "eval-episodes")
PAPER_LENGTH = (STEPS, 25_000, EVAL_INTERVAL, 10)
SUMMARY_FIELDS = {
    *("connections", "sparsity", "training_flops", "training_flops_of_dense", "peak_memory_bytes", "evaluations"),
}
COLUMNS = {
    "evaluations": ["step", "return_mean"],
    "topology": ["step", "network", "layer", "initial_connections_alive", "connections_per_input"],
}


class Run(NamedTuple):
    """A run: the folder ENVIRONMENT/VARIANT/seedN, as ``dst_td3.py`` writes it."""

    folder: Path
    env: str
    method: str
    options: dict[str, str]  # what differs from the paper's settings, other than the run's length
    length: tuple[int, ...]  # LENGTH_OPTIONS: steps, and what else sets how long and how often a run is looked at
    seed: int
    engine: str
    sessions: list[dict]  # what began the run, then each change of commit, versions or machine that went on with it
    evaluations: pd.DataFrame
    topology: pd.DataFrame
    summary: dict | None  # None: not finished
    diverged: bool  # stopped for good on numbers that are not finite: its folder has a file "diverged", made by hand
    actor: list[Layer] | None = None

    @property
    def steps(self) -> int:
        """Return how many environment steps the whole run has."""
        return self.length[0]

    @property
    def returns(self) -> pd.Series:
        """Return the mean return of each evaluation, by its step."""
        return self.evaluations.set_index("step")["return_mean"]


def split_name(name: str) -> tuple[str, dict[str, str]]:
    """Split a variant, METHOD_option=value_..., into method and options. Values may hold "_": "policy=my_own"."""
    method, *options = re.split(r"_(?=[a-z-]+=)", name)
    return method, dict(option.split("=", 1) for option in options)


def read_run_table(folder: Path, name: str) -> pd.DataFrame:
    """Read a table of a run, empty where there is none. Raises ValueError where it is not whole."""
    path, columns = folder / f"{name}.csv", COLUMNS[name]
    table = pd.read_csv(path) if path.exists() else pd.DataFrame(columns=columns)
    if not set(columns) <= set(table):
        raise ValueError(f"{name}.csv lacks columns")
    numbers = table.drop(columns=["network", "connections_per_input"], errors="ignore")  # the latter of first layers
    if not np.isfinite(numbers.astype(float)).all(axis=None):
        raise ValueError(f"{name}.csv lacks values")
    return table


def check_finished(summary: dict, evaluations: pd.DataFrame, topology: pd.DataFrame) -> None:
    """Raise ValueError where the tables of a finished run do not have the rows that its summary counts."""
    if missing := SUMMARY_FIELDS - set(summary):
        raise ValueError(f"summary.json lacks {', '.join(sorted(missing))}")
    if not len(evaluations) == summary["evaluations"] > 0:
        raise ValueError(f"evaluations.csv has {len(evaluations)} rows, the summary counts {summary['evaluations']}")
    if len(topology):
        rows = topology.groupby("step").size()  # one for each sparse layer
        if rows.nunique() > 1 or list(rows.index) != list(evaluations["step"]):
            raise ValueError(f"topology.csv has not all layers at each of {summary['evaluations']} evaluations")


def read_run(folder: Path) -> Run:
    """Read a run but for its policy. Raises OSError, KeyError, TypeError or ValueError where it is damaged."""
    config = json.loads((folder / "config.json").read_text())
    arguments, sessions = config["arguments"], [config, *config.get("resumed", [])]
    if not all({"versions", "machine", "commit"} <= set(session) for session in sessions):
        raise ValueError("config.json lacks fields")
    tables = {name: read_run_table(folder, name) for name in COLUMNS}
    summary = json.loads((folder / "summary.json").read_text()) if (folder / "summary.json").exists() else None
    if summary is not None:
        check_finished(summary, **tables)
    _, options = split_name(config.get("name", folder.parent.name))  # older runs have no other
    return Run(
        folder=folder,
        env=arguments["env"],
        method=arguments["method"],
        options={name: value for name, value in options.items() if name not in LENGTH_OPTIONS},
        length=tuple(arguments[name.replace("-", "_")] for name in LENGTH_OPTIONS),
        seed=arguments["seed"],
        engine=arguments["engine"],
        sessions=sessions,
        summary=summary,
        diverged=(folder / "diverged").exists(),
        **tables,
    )


def read_actor(run: Run) -> list[Layer] | None:
    """Read the layers of a run's trained policy, None where it left none. Raises ValueError where it is damaged."""
    if not (path := run.folder / "policy.npz").exists():
        return None
    try:
        return read_policy(path, run.env)[0]
    except InputError as error:
        raise ValueError(f"left out is its policy alone: {error}") from error


@dataclasses.dataclass(frozen=True)
class Results:
    """A folder of runs, and what in it cannot be read."""

    folder: Path
    runs: list[Run]
    left_out: list[str]

    def select(self, env: str, method: str, options: dict | None = None, length: tuple | None = None) -> list[Run]:
        """Return the finished runs of one setting and length, the longest unless given, in the order of their seeds."""
        found = [r for r in self.runs if (r.env, r.method, r.options) == (env, method, options or {}) and r.summary]
        length = length or max((r.length for r in found), default=None)
        return sorted((r for r in found if r.length == length), key=lambda r: r.seed)

    def initial_policies(self, method: str, fraction: float) -> list[Run]:
        """Return Figure 4's runs: their first samples come from a policy after this fraction of as many steps."""
        named = [(r, r.options["initial-policy"]) for r in self.runs if set(r.options) == {"initial-policy"}]
        names = {name for run, name in named if name == f"policy-{int(run.steps * fraction)}"}
        found = [self.select("HalfCheetah-v4", method, {"initial-policy": name}) for name in names]
        return max(found, key=lambda selected: selected[0].length if selected else (), default=[])

    def describe(self) -> str:
        """Say in a sentence or two what is there and what cannot be read."""
        finished = sum(run.summary is not None for run in self.runs)
        text = f"`{self.folder}` holds {len(self.runs)} runs, {finished} of them finished."
        if self.left_out:
            text += " These cannot be read and are left out: " + "; ".join(self.left_out) + "."
        return text


def read_results(folder: Path) -> Results:
    """Read all runs below a folder. What is damaged is left out and named."""
    runs, left_out = [], []
    for path in sorted(folder.glob("*/*/seed*/config.json")):
        try:
            runs.append(read_run(path.parent))
            runs[-1] = runs[-1]._replace(actor=read_actor(runs[-1]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            left_out.append(f"`{path.parent}` ({error})")
    return Results(folder, runs, left_out)


def learning_curves(selected: list[Run]) -> pd.DataFrame:
    """Return the returns of evaluations, one row a step and one column a seed."""
    return pd.DataFrame({run.seed: run.returns for run in selected})


def final_returns(selected: list[Run]) -> np.ndarray:
    """Return each seed's final return, shape (seeds,)."""
    return np.array([final_return(run.returns.to_numpy()) for run in selected])


def lcas(selected: list[Run]) -> np.ndarray:
    """Return each seed's learning curve area, shape (seeds,)."""
    return np.array([learning_curve_area(*steps_and_returns(run), run.steps) for run in selected])


def steps_and_returns(run: Run, missing: float = math.nan) -> tuple[np.ndarray, np.ndarray]:
    """Return a run's steps and returns, both of shape (evaluations,); ``missing`` stands for what it did not reach."""
    interval = run.length[2]
    steps, returns = run.evaluations["step"].to_numpy(), run.returns.to_numpy(float)
    further = np.arange(len(steps) * interval, run.steps + 1, interval)
    return np.append(steps, further).astype(int), np.append(returns, np.full(len(further), missing))


def read_random_policy(path: Path) -> dict[str, float]:
    """Return the random policy's mean return on each task, from results/random_policy.csv."""
    return pd.read_csv(path).set_index("environment")["return_mean"].to_dict()


# --- One run ----------------------------------------------------------------------------------------------------------
def final_return(returns: np.ndarray) -> float:
    """Return the mean of the last ten of (evaluations,) returns, as Table 2 does, without that of the untrained policy.

    The first evaluation is the untrained policy's, and in a short run among the last ten.
    """
    return float(np.mean(returns[1:][-LAST:]))


def learning_curve_area(steps: np.ndarray, returns: np.ndarray, total: int = STEPS) -> float:
    """Return the sum of (evaluations,) returns over the number of steps, Table 1's LCA.

    The paper evaluates every 5,000 steps; where evaluations lie otherwise apart, each counts for as many of those.
    """
    intervals = np.diff(steps, prepend=-steps[:2][-1])  # the first, at step 0, counts as the second does
    return float(np.dot(returns, intervals / EVAL_INTERVAL) / total)


def steps_to_reach(steps: np.ndarray, returns: np.ndarray, level: float, never: int | None = STEPS) -> int | None:
    """Return the step at which ten evaluations in a row first average ``level``, that of the last of them.

    A run that never does counts with ``never``, its whole length. Both arrays have shape (evaluations,).
    """
    if len(returns) < LAST:
        return never
    means = np.lib.stride_tricks.sliding_window_view(returns, LAST).mean(axis=1)
    reached = np.flatnonzero(means >= level)
    return int(steps[reached[0] + LAST - 1]) if len(reached) else never


def normalise(score: np.ndarray | float, random: float, paper: float) -> np.ndarray | float:
    """Return the score on the scale on which the random policy has 0 and the paper's TD3 has 1, both fixed numbers."""
    return (score - random) / (paper - random)


# --- Two methods over tasks -------------------------------------------------------------------------------------------
def probability_of_improvement(x: Sequence[np.ndarray], y: Sequence[np.ndarray]) -> np.ndarray:
    """Return the share of pairs of seeds in which x is above y, ties a half, averaged over tasks: shape () or (R,)."""
    shares = []
    for a, b in zip(x, y, strict=True):
        a, b = a[..., :, None], b[..., None, :]
        shares.append(((a > b) + 0.5 * (a == b)).mean(axis=(-2, -1)))
    return np.mean(shares, axis=0)


def interquartile_mean(x: Sequence[np.ndarray]) -> np.ndarray:
    """Return the mean of the middle half of all tasks' and seeds' normalised scores together: shape () or (R,)."""
    return stats.trim_mean(np.concatenate(x, axis=-1), 0.25, axis=-1)


def bootstrap_interval(
    statistic: Callable[..., np.ndarray], *samples: Sequence[np.ndarray], resamples: int = RESAMPLES, seed: int = SEED
) -> tuple[float, float]:
    """Return the percentile interval of ``statistic`` of the samples under rliable's stratified bootstrap.

    Seeds are drawn with replacement within each task and method, independently of each other; tasks stay as they are.
    """
    rng = np.random.default_rng(seed)
    drawn = [[x[rng.integers(len(x), size=(resamples, len(x)))] for x in sample] for sample in samples]
    low, high = np.quantile(statistic(*drawn), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def rank_null(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return the chance of each value of 2U, shape (2 m n + 1,), when all ways to deal the m + n values are alike.

    U counts the pairs in which x is above y, a tie a half, so that 2U is whole; midranks make that exact under ties.
    The recursion counts the ways to choose m values by twice their sum of ranks.
    """
    m, n = len(x), len(y)
    doubled = np.rint(2 * stats.rankdata(np.concatenate([x, y]))).astype(int)
    ways = np.zeros((m + 1, doubled.sum() + 1))
    ways[0, 0] = 1
    for rank in doubled:
        ways[1:, rank:] += ways[:-1, :-rank].copy()
    lowest = m * (m + 1)
    return ways[m, lowest : lowest + 2 * m * n + 1] / math.comb(m + n, m)


def stratified_null(x: Sequence[np.ndarray], y: Sequence[np.ndarray]) -> np.ndarray:
    """Return the chance of each value of the probability of improvement, evenly spaced from 0 to 1, under the null.

    The null is that both methods have the same distribution within each task. Tasks are independent, so that their
    distributions are convolved, on a common denominator where the numbers of seeds differ.
    """
    pairs = [len(a) * len(b) for a, b in zip(x, y, strict=True)]
    common, null = math.lcm(*pairs), np.ones(1)
    for a, b, count in zip(x, y, pairs, strict=True):
        task = np.zeros(2 * common + 1)
        task[:: common // count] = rank_null(a, b)
        null = np.convolve(null, task)
    return null


def exact_rank_test(x: Sequence[np.ndarray], y: Sequence[np.ndarray]) -> tuple[float, float]:
    """Return the one-sided p (x above y) and the two-sided p, twice the smaller tail, of the exact stratified test."""
    null = stratified_null(x, y)
    at = round(float(probability_of_improvement(x, y)) * (len(null) - 1))
    above, below = null[at:].sum(), null[: at + 1].sum()
    return min(1.0, float(above)), min(1.0, float(2 * min(above, below)))


# --- One task ---------------------------------------------------------------------------------------------------------
def student(
    value: float, variances: Sequence[float], sizes: Sequence[int], level: float = LEVEL
) -> tuple[float, float, float]:
    """Return the ends of Student's interval of a value, and its two-sided p against 0.

    The value's variance is the sum of independent ``variances``, each estimated from as many values as ``sizes`` says;
    degrees of freedom after Welch and Satterthwaite.
    """
    if not any(variances):
        return value, value, float(value == 0)
    freedom = sum(variances) ** 2 / sum(v**2 / (n - 1) for v, n in zip(variances, sizes, strict=True))
    error = math.sqrt(sum(variances))
    margin = stats.t.ppf((1 + level) / 2, freedom) * error
    return float(value - margin), float(value + margin), float(2 * stats.t.sf(abs(value) / error, freedom))


def welch(x: np.ndarray, y: np.ndarray, level: float = LEVEL) -> tuple[float, float, float, float]:
    """Return the difference of the means of (m,) and (n,) values, its Welch interval's ends, and the two-sided p."""
    difference = float(np.mean(x) - np.mean(y))
    variances = [np.var(z, ddof=1) / len(z) for z in (x, y)]
    return difference, *student(difference, variances, (len(x), len(y)), level)


def mean_against(x: np.ndarray, level: float) -> tuple[float, float, float, float]:
    """Return the mean of (n,) values, its Student interval's ends, and the two-sided p against the fixed ``level``."""
    low, high, p = student(float(np.mean(x) - level), [np.var(x, ddof=1) / len(x)], [len(x)])
    return float(np.mean(x)), low + level, high + level, p


def holm(p: Sequence[float]) -> np.ndarray:
    """Return Holm's adjusted p-values, shape (claims,), in the order given."""
    p = np.asarray(p, float)
    order = np.argsort(p)
    adjusted = np.maximum.accumulate(np.minimum(1, p[order] * np.arange(len(p), 0, -1)))
    return adjusted[np.argsort(order)]


# --- Tables -----------------------------------------------------------------------------------------------------------
class Table(NamedTuple):
    """A table under a caption. One that is ``optional`` is shown and written only where it has rows."""

    name: str
    caption: str
    rows: list[dict[str, str]]
    optional: bool = False

    def __str__(self) -> str:
        lines = [self.caption, ""]
        if self.rows:
            lines += ["| " + " | ".join(self.rows[0]) + " |", "|" + " --- |" * len(self.rows[0])]
            lines += ["| " + " | ".join(row.values()) + " |" for row in self.rows]
        else:
            lines.append("*No finished run for this table yet.*")
        return "\n".join(lines) + "\n"

    def __repr__(self) -> str:
        return f"<{self.name}>"

    def _repr_markdown_(self) -> str:
        return str(self)

    def write(self, folder: Path) -> bool:
        """Write the table into ``folder``/tables as Markdown, and tell whether there is anything to show."""
        path = folder / "tables" / f"{self.name}.md"
        if self.optional and not self.rows:
            path.unlink(missing_ok=True)
            return False
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(str(self))
        return True


def mean_and_std(values: np.ndarray, digits: int) -> str:
    """Format mean ± sample standard deviation; a single value has no deviation, and no value is a dash."""
    if len(values) == 0:
        return "-"
    mean = f"{np.mean(values):,.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):,.{digits}f}"


def brackets(bounds: tuple[float, float], digits: int = 2) -> str:
    """Format an interval."""
    low, high = bounds
    return f"[{low:,.{digits}f}, {high:,.{digits}f}]"


def with_interval(value: float, bounds: tuple[float, float], digits: int = 2) -> str:
    """Format a figure and its interval."""
    return f"{value:,.{digits}f} {brackets(bounds, digits)}"


def describe_difference(ours: np.ndarray, theirs: np.ndarray, digits: int) -> str:
    """Format the difference of two means and its Welch interval, where there are seeds enough for one."""
    if min(len(ours), len(theirs)) < LEAST_SEEDS:
        return "-"
    difference, low, high, _ = welch(ours, theirs)
    return with_interval(difference, (low, high), digits)


def name_of(method: str) -> str:
    """Return a method's name in tables and figures."""
    return (METHODS | SAC_METHODS).get(method, method)


def describe_options(options: dict[str, str]) -> str:
    """Return what differs from the paper's settings in a table's words."""
    return ", ".join(f"{name} {value}" for name, value in options.items())


# --- Verdicts ---------------------------------------------------------------------------------------------------------
ROOT = Path(__file__).resolve().parent
FRESH_SEEDS = (3, 4)  # on all tasks but HalfCheetah, whose DS-TD3 was run and seen before the rules
REACHED, SAVED = 0.9, 0.6  # claim 5: the score to be reached, and the share of TD3's steps that DS-TD3 has for it
KEPT = 0.9  # claim 8: the score below which an agent fails

Measure = Callable[[Run, float], float]  # of a run and the random policy's return on its task


def return_score(run: Run, random: float) -> float:
    """Return a run's final return as a score."""
    _, returns = steps_and_returns(run, random)
    return normalise(final_return(returns), random, PAPER_MEANS[run.env][0])


def lca_score(run: Run, random: float) -> float:
    """Return a run's LCA as a score."""
    area = learning_curve_area(*steps_and_returns(run, random))
    return normalise(area, EVALUATIONS * random / STEPS, PAPER_LCA[run.env][0])


def steps_to_score(run: Run, random: float, score: float = REACHED) -> float:
    """Return the steps after which a run has a score, all where it never has."""
    level = random + score * (PAPER_MEANS[run.env][0] - random)
    return steps_to_reach(*steps_and_returns(run, random), level)


class Claim(NamedTuple):
    """A claim of results/rules.md that one method is above another, over the five tasks."""

    number: int
    words: str
    first: str
    second: str
    measure: Measure
    by_score: bool = True  # or by the steps to one, of which fewer are better


ACROSS_TASKS = (
    Claim(1, "DS-TD3 ends higher than TD3 (return)", "ds-td3", "td3", return_score),
    Claim(2, "DS-TD3 learns faster than TD3 (LCA)", "ds-td3", "td3", lca_score),
    Claim(3, "Moving connections ends higher: DS-TD3 over Static-TD3 (return)", "ds-td3", "static-td3", return_score),
    Claim(4, "Moving connections learns faster: DS-TD3 over Static-TD3 (LCA)", "ds-td3", "static-td3", lca_score),
    Claim(5, "DS-TD3 needs 40% fewer steps than TD3", "ds-td3", "td3", steps_to_score, by_score=False),
)


class Verdict(NamedTuple):
    """What is said of a claim: its statistic with interval, one-sided and two-sided p, and what stands beside."""

    words: str
    statistic: str = "-"
    one_sided: float | None = None
    p: float | None = None
    beside: str = "-"


@functools.cache
def git(*arguments: str) -> str | None:
    """Return what git says of this repository, None where it fails."""
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout if done.returncode == 0 else None


def is_fresh(run: Run) -> bool:
    """Tell whether the code that began a run held results/rules.md: whether its commit has that which added the page.

    Without the git history that tells it, no run is fresh.
    """
    added = (git("log", "--diff-filter=A", "--format=%H", "--", "results/rules.md") or "").split()
    commit = str(run.sessions[0]["commit"]).removesuffix("-dirty")
    return bool(added) and git("merge-base", "--is-ancestor", added[-1], commit) is not None


def counted(results: Results, task: str, method: str, options: dict | None = None) -> dict[int, Run]:
    """Return the runs that count in a cell, by seed: the paper's length, finished or diverged, seeds 0 to 4."""
    setting = (task, method, options or {}, PAPER_LENGTH)
    runs = [r for r in results.runs if (r.env, r.method, r.options, r.length) == setting and r.seed in SEEDS]
    return {run.seed: run for run in sorted(runs, key=lambda r: r.seed) if run.summary or run.diverged}


def cells(results: Results, claim: Claim, fresh: bool) -> tuple[list[list[Run]], ...]:
    """Return the runs of both methods of a claim on each task, only the fresh ones if asked."""
    tasks, seeds = (TASKS[1:], FRESH_SEEDS) if fresh else (TASKS, SEEDS)

    def cell(task: str, method: str) -> list[Run]:
        runs = counted(results, task, method).items()
        return [run for seed, run in runs if seed in seeds and (not fresh or is_fresh(run))]

    return tuple([cell(task, method) for task in tasks] for method in (claim.first, claim.second))


def sample(runs: list[list[Run]], measure: Measure, random: dict[str, float], **options: float) -> list[np.ndarray]:
    """Return what a measure says of the runs of each task."""
    return [np.array([measure(run, random[run.env], **options) for run in cell]) for cell in runs]


def improvement(x: Sequence[np.ndarray], y: Sequence[np.ndarray]) -> tuple[str, tuple[float, float]]:
    """Return the probability of improvement with its interval, as text, and the interval."""
    bounds = bootstrap_interval(probability_of_improvement, x, y)
    return with_interval(float(probability_of_improvement(x, y)), bounds), bounds


def verdict_across_tasks(x: Sequence[np.ndarray], y: Sequence[np.ndarray]) -> Verdict:
    """Return the verdict that x is above y over tasks: interval of the probability of improvement and exact test."""
    statistic, (low, high) = improvement(x, y)
    one_sided, p = exact_rank_test(x, y)
    rounding = 1e-9
    confirmed, refuted = low > 0.5 + rounding, high < 0.5 - rounding
    words = "not shown" if p > 1 - LEVEL else "confirmed" if confirmed else "refuted" if refuted else "not shown"
    return Verdict(words, statistic, one_sided, p)


def waiting(have: list[bool], whose: str, random: dict[str, float]) -> Verdict | None:
    """Return why a verdict is open: not all cells have their seeds, or there is no random policy. None if it is not."""
    if not all(have):
        return Verdict(f"open: {sum(have)} of {len(have)} cells{whose} have their seeds")
    return Verdict("open: there is no random_policy.csv") if any(map(math.isnan, random.values())) else None


def beside_scores(x: Sequence[np.ndarray], y: Sequence[np.ndarray]) -> str:
    """Return the interquartile mean of both methods' scores, which stands beside a verdict."""
    means = [with_interval(float(interquartile_mean(z)), bootstrap_interval(interquartile_mean, z)) for z in (x, y)]
    return f"interquartile means {' and '.join(means)}"


def beside_differences(tasks: Sequence[str], x: Sequence[np.ndarray], y: Sequence[np.ndarray]) -> str:
    """Return the differences of means by task with Welch's intervals, which stand beside a verdict."""
    differences = []
    for task, a, b in zip(tasks, x, y, strict=True):
        difference, low, high, _ = welch(a, b)
        differences.append(f"{task} {with_interval(difference, (low, high))}")
    return f"difference of means {', '.join(differences)}"


def across_tasks(results: Results, claim: Claim, random: dict[str, float], fresh: bool = False) -> Verdict:
    """Return the verdict on a claim over tasks, open until every cell that it compares has its seeds."""
    runs = cells(results, claim, fresh)
    have = [len(cell) == len(FRESH_SEEDS if fresh else SEEDS) for cell in itertools.chain(*runs)]
    if verdict := waiting(have, "", random):
        return verdict
    tasks = [cell[0].env for cell in runs[0]]
    x, y = (sample(method, claim.measure, random) for method in runs)
    if claim.by_score:
        return verdict_across_tasks(x, y)._replace(beside=f"{beside_scores(x, y)}; {beside_differences(tasks, x, y)}")

    def against(score: float, share: float) -> tuple[list[np.ndarray], list[np.ndarray]]:
        x, y = (sample(method, claim.measure, random, score=score) for method in runs)
        return [-steps for steps in x], [-share * steps for steps in y]

    others = ((REACHED, 0.5), (REACHED, 1.0), (0.8, SAVED), (1.0, SAVED))
    beside = [f"level {score}, factor {share} {improvement(*against(score, share))[0]}" for score, share in others]
    millions = [[steps / STEPS for steps in method] for method in (x, y)]
    beside.insert(0, beside_differences(tasks, *millions).replace("means", "mean steps in millions"))
    return verdict_across_tasks(*against(REACHED, SAVED))._replace(beside="; ".join(beside))


def verdict_over_rivals(x: np.ndarray, rivals: Sequence[np.ndarray]) -> Verdict:
    """Return the verdict that x is above each rival: all intervals above 0 confirm, one below 0 refutes.

    Against three rivals the intervals that refute have 1 - 0.05/3, and so has the p of a negative difference.
    """
    tests = [welch(x, y) for y in rivals]
    wider = [welch(x, y, 1 - (1 - LEVEL) / len(rivals)) for y in rivals]
    confirmed, refuted = all(low > 0 for _, low, _, _ in tests), any(high < 0 for _, _, high, _ in wider)
    behind = [p for difference, _, _, p in tests if difference <= 0]
    p = min(1.0, len(rivals) * min(behind)) if behind else max(p for *_, p in tests)
    statistic = ", ".join(with_interval(difference, (low, high)) for difference, low, high, _ in tests)
    return Verdict("confirmed" if confirmed else "refuted" if refuted else "not shown", statistic, p=p)


def verdict_below(x: np.ndarray, level: float) -> Verdict:
    """Return the verdict that the mean of x is below a level."""
    mean, low, high, p = mean_against(x, level)
    words = "confirmed" if high < level else "refuted" if low > level else "not shown"
    return Verdict(words, with_interval(mean, (low, high)), p=p)


def verdicts_on_halfcheetah(results: Results, random: dict[str, float]) -> dict[str, Verdict]:
    """Return the verdicts on claims 6 to 9, open until all of Figure 1's cells have their seeds."""

    def cell(measure: Measure, method: str = "ds-td3", **options: str) -> np.ndarray:
        options = {name.replace("_", "-"): value for name, value in options.items()}
        (values,) = sample([list(counted(results, TASKS[0], method, options).values())], measure, random)
        return values

    papers, dense = cell(lca_score), cell(lca_score, "td3")
    intervals = [cell(lca_score, adapt_interval=e) for e in ("200", "500", "2000")]
    quarter, half, most = (cell(lca_score, sparsity=s) for s in ("0.25", "0.5", "0.8"))
    after_500k, after_700k = (cell(lca_score, initial_policy=f"policy-{step}") for step in (500_000, 700_000))
    claims = {  # the sample, its rivals
        "6. e = 1000 is best: LCA less that of 200, 500 and 2000": (papers, *intervals),
        "7. 50% learns fastest: LCA less that of 25%, 80% and TD3": (half, quarter, most, dense),
        "8. 80% fails: mean return below 0.9": (cell(return_score, sparsity="0.8"),),
        "9. Learned first samples help: LCA after 700,000 steps less that with random ones": (after_700k, papers),
    }
    have = [len(counted(results, task, method)) == len(SEEDS) for task in TASKS for method in METHODS]
    if verdict := waiting(have, " of Figure 1", random):
        return dict.fromkeys(claims, verdict)
    found = {}
    for claim, (first, *rivals) in claims.items():
        if min(map(len, (first, *rivals))) < 2:
            found[claim] = Verdict("open: a cell has no two seeds")
        else:
            found[claim] = verdict_over_rivals(first, rivals) if rivals else verdict_below(first, KEPT)
    if min(map(len, (after_500k, papers))) > 1:
        difference, low, high, _ = welch(after_500k, papers)
        beside = f"after 500,000 steps {with_interval(difference, (low, high))}"
        found[claim] = found[claim]._replace(beside=beside)
    return found


def random_returns(results: Results) -> dict[str, float]:
    """Return the random policy's mean return on each task, of the results or else the published one; NaN without."""
    paths = [folder / "random_policy.csv" for folder in (results.folder, ROOT / "results")]
    found = next((path for path in paths if path.exists()), None)
    return read_random_policy(found) if found else dict.fromkeys(TASKS, math.nan)


def scores(results: Results) -> Table:
    """Return every seed's scores, so that no mean hides one."""
    random = random_returns(results)
    rows = [
        {
            "environment": task,
            "method": name_of(method),
            "seed": f"{seed}{' (fresh)' if task != TASKS[0] and seed in FRESH_SEEDS and is_fresh(run) else ''}",
            "return": f"{return_score(run, random[task]):.2f}",
            "LCA": f"{lca_score(run, random[task]):.2f}",
            f"steps to {REACHED:g}": f"{steps_to_score(run, random[task]):,.0f}",
        }
        for task in TASKS
        for method in METHODS
        for seed, run in counted(results, task, method).items()
    ]
    caption = (
        "**Every seed's scores**: the random policy has 0 and the paper's TD3 1. Steps are those to a return score of "
        f"{REACHED:g}, all {STEPS:,} where a seed never has it. Verdicts on fresh seeds take those marked so, none on "
        f"HalfCheetah. {V4_NOTE}"
    )
    return Table("scores", caption, rows)


def verdicts(results: Results) -> Table:
    """Return the verdicts on claims 1 to 9 by results/rules.md, on all five seeds and on the fresh ones alone."""
    random, rows = random_returns(results), []
    for seeds in ("0 to 4", "fresh"):
        family = {
            f"{claim.number}. {claim.words}": across_tasks(results, claim, random, seeds == "fresh")
            for claim in ACROSS_TASKS
        }
        family |= verdicts_on_halfcheetah(results, random) if seeds == "0 to 4" else {}
        p = [verdict.p for verdict in family.values()]
        adjusted = [None] * len(p) if None in p else holm(p)
        for (claim, verdict), corrected in zip(family.items(), adjusted, strict=True):
            chances = (verdict.one_sided, verdict.p, corrected)
            rows.append(
                {
                    "claim": claim,
                    "seeds": seeds,
                    "verdict": verdict.words if verdict.words.startswith("open") else f"**{verdict.words}**",
                    "statistic": verdict.statistic,
                    "p one-sided, two-sided, Holm's": ", ".join("-" if x is None else f"{x:.2g}" for x in chances),
                    "beside": verdict.beside,
                }
            )
    caption = (
        "**Verdicts by [the rules](../rules.md)** [95 % interval]. Claims 1 to 5: probability of improvement over the "
        "five tasks, fresh seeds on all but HalfCheetah. Claims 6 to 9: scores on HalfCheetah, where the random policy "
        "has 0 and the paper's TD3 1, with three to five seeds a cell. A verdict is open until every cell that it "
        f"compares has its seeds. {V4_NOTE}"
    )
    return Table("verdicts", caption, rows)


# --- Figures ----------------------------------------------------------------------------------------------------------
matplotlib.rcParams.update(
    {
        "figure.dpi": 60,
        "savefig.dpi": 150,
        "font.size": 12,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.3,
        "lines.linewidth": 1.8,
        "legend.frameon": False,
        "pdf.fonttype": 42,
    }
)
COLOURS = {"TD3": "#555555", "Static-TD3": "#E69F00", "DS-TD3": "#0072B2"}
SKY, GREEN, PINK = MORE_COLOURS = ("#56B4E9", "#009E73", "#CC79A7")


class Plot(NamedTuple):
    """A figure and the name of its files."""

    name: str
    figure: Figure

    def __repr__(self) -> str:
        return f"<{self.name}>"

    def _repr_png_(self) -> bytes:
        image = io.BytesIO()
        self.figure.savefig(image, format="png", dpi="figure", bbox_inches="tight")
        return image.getvalue()

    def write(self, folder: Path) -> bool:
        """Write the figure into ``folder``/figures as PNG and PDF."""
        (folder / "figures").mkdir(parents=True, exist_ok=True)
        path = folder / "figures" / self.name
        self.figure.savefig(f"{path}.png", bbox_inches="tight")
        # Without its date a figure is the same file whenever it is made from the same results.
        self.figure.savefig(f"{path}.pdf", bbox_inches="tight", metadata={"CreationDate": None})
        return True


def mark_empty(axes: Axes, text: str = "no finished run yet") -> None:
    """Say in the middle of an empty panel why it is empty."""
    if not axes.has_data():
        axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color="0.5")
        axes.tick_params(length=0, labelleft=False, labelbottom=False)  # not set(): panels can share their ticks
        axes.grid(False)


def thousands(value: float, _position: int = 0) -> str:
    """Format a tick of steps or returns: 250k, 1M."""
    for unit, name in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{value / unit:g}{name}"
    return f"{value:g}"


def smoothed(returns: pd.DataFrame | pd.Series) -> pd.DataFrame | pd.Series:
    """Return for each evaluation the mean of ten in a row up to it, as Table 2's returns are."""
    return returns.rolling(LAST, min_periods=1).mean()


def plot_curves(axes: Axes, selected: list[Run], label: str, colour: str, x: pd.Series | None = None) -> None:
    """Draw the mean over seeds of the return against steps (or ``x``), and one standard deviation around it.

    The line is smoothed; each evaluation is drawn pale behind it.
    """
    if not selected:
        return
    curves = learning_curves(selected)
    x = curves.index if x is None else x
    seeds = f"{len(selected)} seed" + "s" * (len(selected) > 1)
    axes.plot(x, curves.mean(axis=1), color=colour, alpha=0.2, linewidth=0.8)
    smooth = smoothed(curves)
    mean = smooth.mean(axis=1)
    axes.plot(x, mean, color=colour, label=f"{label}, {seeds}")
    if len(selected) > 1:
        std = smooth.std(axis=1)
        axes.fill_between(x, mean - std, mean + std, color=colour, alpha=0.15, linewidth=0)


def label_axes(axes: Axes, title: str, xlabel: str = "environment steps", ylabel: str = "return") -> None:
    """Label a panel of learning curves."""
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    if axes.has_data():
        axes.yaxis.set_major_formatter(thousands)
        if xlabel == "environment steps":
            axes.xaxis.set_major_formatter(thousands)
    mark_empty(axes)


def add_legend_where_drawn(axes: Axes, **options) -> None:
    """Explain the lines of a panel that has any."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(**options)


def panels_of(shown: Sequence[str]) -> tuple[Figure, dict[str, Axes]]:
    """Return a figure with one panel for each of some environments, and one for the legend."""
    rows, columns = (1, len(shown) + 1) if len(shown) < 3 else (2, math.ceil((len(shown) + 1) / 2))
    figure = Figure(figsize=(4.4 * columns, 3.5 * rows), layout="constrained")
    grid = figure.subplots(rows, columns)
    for axes in grid.flat[len(shown) :]:
        axes.axis("off")
    return figure, dict(zip(shown, grid.flat, strict=False))


def add_legend(figure: Figure, panels: dict[str, Axes], note: str = "") -> None:
    """Explain the lines of all panels once, beside them."""
    # Numbers of seeds differ between panels, so they stand in a panel's title and not in the common legend.
    handles = {}
    for axes in panels.values():
        drawn, labels = axes.get_legend_handles_labels()
        seeds = [label.rsplit(", ", 1)[1] for label in labels if label.endswith((" seed", " seeds"))]
        if seeds:
            counts = seeds[0] if len(set(seeds)) == 1 else ", ".join(s.split()[0] for s in seeds) + " seeds"
            axes.set_title(f"{axes.get_title()} ({counts})")
        handles |= {label.rsplit(", ", 1)[0]: handle for label, handle in zip(labels, drawn, strict=True)}
    legend = figure.axes[len(panels)]
    if handles:
        legend.legend(handles.values(), handles.keys(), loc="center", fontsize=14)
    legend.text(0.5, 0.02, note.strip(), transform=legend.transAxes, ha="center", fontsize=10, color="0.4")


# --- Command line -----------------------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class Arguments:
    """Draw the learning curves of one's own runs with the published ones, and print the table of their differences."""

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    """folder of one's own runs, as --results-dir was; figures/beside.* and tables/beside.md are written into it"""
    beside: Path = Path("results")
    """folder of the published runs"""


def cut(selected: list[Run], steps: int) -> list[Run]:
    """Return runs as if they had ended after ``steps``."""
    return [
        run._replace(length=(steps, *run.length[1:]), evaluations=run.evaluations[run.evaluations["step"] <= steps])
        for run in selected
    ]


def settings_of(results: Results) -> list[tuple[str, str, dict[str, str], tuple[int, ...]]]:
    """Return environment, method, options and length of everything that has a finished run, in order."""
    settings = [(run.env, run.method, run.options, run.length) for run in results.runs if run.summary]
    return [setting for index, setting in enumerate(settings) if setting not in settings[:index]]


def describe_setting(method: str, options: dict[str, str], length: tuple[int, ...]) -> str:
    """Return a setting in a table's words: its method and what differs from the paper's run, its length too."""
    lengths = zip(LENGTH_OPTIONS, length, PAPER_LENGTH, strict=True)
    differing = options | {name: f"{value:,}" for name, value, papers in lengths if value != papers}
    return f"{name_of(method)} {describe_options(differing)}".strip()


def published_alike(published: Results, env: str, method: str, options: dict[str, str]) -> list[Run]:
    """Return the published runs of a setting, but for the options of a variant alone."""
    known = {field.name.replace("_", "-") for field in dataclasses.fields(dst_td3.Arguments)}
    known = known.union(*(run.options for run in published.runs))
    return published.select(env, method, {name: value for name, value in options.items() if name in known})


def describe_beside(own: list[Run], published: list[Run], measure: str) -> str:
    """Format how far the mean of one's own runs lies above the published one, at the last step that both have."""
    if not published:
        return "-"
    steps = min(own[0].steps, published[0].steps)
    if steps < max(own[0].length[2], published[0].length[2]):  # one has no evaluation but that of step 0
        return "-"
    values, digits = {"return": (final_returns, 0), "LCA": (lcas, 3)}[measure]
    ours, theirs = (values(cut(runs, steps)) for runs in (own, published))
    if min(len(ours), len(theirs)) < LEAST_SEEDS:
        return f"{np.mean(ours) - np.mean(theirs):,.{digits}f}"
    return describe_difference(ours, theirs, digits)


def table_beside(own: Results, published: Results) -> Table:
    """Return by how much each setting of one's own differs from the published one alike and the three methods."""
    rows = []
    for (env, method, options, length), measure in itertools.product(settings_of(own), ("return", "LCA")):
        selected = own.select(env, method, options, length)
        values, digits = {"return": (final_returns, 1), "LCA": (lcas, 4)}[measure]
        row = {"environment": env, "setting": describe_setting(method, options, length), "of": measure}
        row |= {"steps": f"{selected[0].steps:,}", "seeds": str(len(selected))}
        row |= {"ours": mean_and_std(values(selected), digits)}
        alike = published_alike(published, env, method, options)
        row["less the same published"] = describe_beside(selected, alike, measure)
        row |= {
            f"less published {name}": describe_beside(selected, published.select(env, other), measure)
            for other, name in METHODS.items()
        }
        rows.append(row)
    caption = (
        f"**One's own runs less the published ones**, means over seeds at the last step that both have [95 % interval, "
        f"Welch's t, where both have {LEAST_SEEDS} seeds]. The same is the published setting with all options but "
        "those that a variant of one's own has added. Published runs begin to learn after 25,000 steps."
    )
    return Table("beside", caption, rows)


LEGEND_WIDTH = 45  # characters, so that a setting of many options leaves room for its curve


def plot_beside(own: Results, published: Results) -> Plot:
    """Return learning curves: a panel for each environment, one's own runs bright, the published methods' as ever."""
    settings = settings_of(own)
    wrapped = functools.partial(textwrap.fill, width=LEGEND_WIDTH, break_on_hyphens=False)
    figure, panels = panels_of(list(dict.fromkeys(env for env, *_ in settings)))
    others = list(dict.fromkeys(describe_setting(*setting) for _, *setting in settings))
    colours = dict(zip(others, itertools.cycle((GREEN, PINK, SKY, "#D55E00", "#F0E442")), strict=False))
    for env, axes in panels.items():
        here = [setting for task, *setting in settings if task == env]
        longest = max(length[0] for _, _, length in here)
        for method, name in METHODS.items():
            plot_curves(axes, cut(published.select(env, method), longest), f"{name}, published", COLOURS[name])
        for method, options, length in here:
            alike = published_alike(published, env, method, options)
            if alike and alike[0].options:  # the three methods are drawn already
                label = describe_setting(method, alike[0].options, PAPER_LENGTH)
                plot_curves(axes, cut(alike, longest), wrapped(f"{label}, published"), "#AAAAAA")
            label = describe_setting(method, options, length)
            plot_curves(axes, own.select(env, method, options, length), wrapped(f"{label}, ours"), colours[label])
        label_axes(axes, env)
    add_legend(figure, panels, "mean of ten evaluations, single ones pale")
    return Plot("beside", figure)


def main() -> int:
    """Run the command line and return its exit code."""

    def program(name: str) -> None:
        args = tyro.cli(Arguments, prog=name)
        own, published = (read_results(folder) for folder in (args.folder, args.beside))
        for results in (own, published):
            for named in results.left_out:
                print(f"{name}: left out: {named}", file=sys.stderr)
            if not settings_of(results):
                raise InputError(f"{results.folder} has no finished run that can be read")
        table, plot = table_beside(own, published), plot_beside(own, published)
        with writing(own.folder):
            table.write(own.folder)
            plot.write(own.folder)
        print(table)
        print(f"written: {own.folder}/figures/beside.png and .pdf, {own.folder}/tables/beside.md")

    return command_line(program)


if __name__ == "__main__":
    sys.exit(main())
