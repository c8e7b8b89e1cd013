"""The statistics that results/rules.md fixes for the verdicts on the paper's claims.

A sample is a list with one array per task, of shape (seeds,), or (resamples, seeds) within the bootstrap; seeds may
differ between tasks. Sources: Agarwal et al. 2021, "Deep Reinforcement Learning at the Edge of the Statistical
Precipice" (rliable), whose definitions of the probability of improvement, the interquartile mean and the stratified
bootstrap these are; Mann and Whitney 1947; Welch 1947; Holm 1979.
"""

import csv
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from scipy import stats

TASKS = ("HalfCheetah-v4", "Walker2d-v4", "Hopper-v4", "Ant-v4", "Humanoid-v4")
# The paper's means of five seeds, on the -v3 tasks in the same order: TD3's return (Table 2) and LCA (Table 1).
PAPER_TD3_RETURN = dict(zip(TASKS, (11153.48, 4042.36, 2184.78, 4287.69, 3809.15), strict=True))
PAPER_TD3_LCA = dict(zip(TASKS, (1.7686, 0.5264, 0.4788, 0.5524, 0.3635), strict=True))

STEPS, EVALUATIONS, LAST = 1_000_000, 201, 10
RESAMPLES, SEED, LEVEL = 50_000, 0, 0.95


# --- A run ------------------------------------------------------------------------------------------------------------
def read_evaluations(run: Path, missing: float = math.nan) -> tuple[np.ndarray, np.ndarray]:
    """Return a run's steps and returns, both of shape (201,); ``missing`` stands for evaluations it did not reach."""
    with open(run / "evaluations.csv", newline="") as file:
        read = [float(row["return_mean"]) for row in csv.DictReader(file)]
    steps = np.linspace(0, STEPS, EVALUATIONS).astype(int)
    return steps, np.array(read + [missing] * (EVALUATIONS - len(read)))


def read_random_policy(path: Path) -> dict[str, float]:
    """Return the random policy's mean return on each task, from results/random_policy.csv."""
    with open(path, newline="") as file:
        return {row["environment"]: float(row["return_mean"]) for row in csv.DictReader(file)}


def final_return(returns: np.ndarray) -> float:
    """Return the mean of the last ten of (evaluations,) returns, as Table 2 does."""
    return float(np.mean(returns[-LAST:]))


def learning_curve_area(returns: np.ndarray) -> float:
    """Return the sum of (evaluations,) returns over the number of steps, Table 1's LCA."""
    return float(np.sum(returns) / STEPS)


def steps_to_reach(steps: np.ndarray, returns: np.ndarray, level: float) -> int:
    """Return the step at which ten evaluations in a row first average ``level``, that of the last of them.

    A run that never does counts with its whole length. Both arrays have shape (evaluations,).
    """
    smoothed = np.convolve(returns, np.full(LAST, 1 / LAST), mode="valid")
    reached = np.flatnonzero(smoothed >= level)
    return int(steps[reached[0] + LAST - 1]) if len(reached) else STEPS


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
def welch(x: np.ndarray, y: np.ndarray) -> tuple[float, float, float, float]:
    """Return the difference of the means of (m,) and (n,) values, its Welch interval's ends, and the two-sided p."""
    test = stats.ttest_ind(x, y, equal_var=False)
    interval = test.confidence_interval(LEVEL)
    return float(np.mean(x) - np.mean(y)), float(interval.low), float(interval.high), float(test.pvalue)


def mean_against(x: np.ndarray, level: float) -> tuple[float, float, float, float]:
    """Return the mean of (n,) values, its Student interval's ends, and the two-sided p against the fixed ``level``."""
    test = stats.ttest_1samp(x, level)
    interval = test.confidence_interval(LEVEL)
    return float(np.mean(x)), float(interval.low), float(interval.high), float(test.pvalue)


def holm(p: Sequence[float]) -> np.ndarray:
    """Return Holm's adjusted p-values, shape (claims,), in the order given."""
    p = np.asarray(p, float)
    order = np.argsort(p)
    adjusted = np.maximum.accumulate(np.minimum(1, p[order] * np.arange(len(p), 0, -1)))
    return adjusted[np.argsort(order)]
