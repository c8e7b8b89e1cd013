"""Two verdicts computed again from the CSV files alone, by code that shares nothing with ``analysis.py``."""

import csv
import itertools
import random
from pathlib import Path

import pytest
from running import FORMER, FOUR, read_table

RESULTS = Path(__file__).resolve().parents[1] / "results"
MEASURES = {  # of a run's returns; a score is one that grows with it, so no pair of seeds changes places
    "return": lambda returns: sum(returns[-10:]) / 10,
    "LCA": lambda returns: sum(returns) / 1_000_000,
}
ENVIRONMENTS = (*FOUR, "Humanoid-v4")


def read_returns(env: str, method: str, seed: int) -> list[float]:
    """Return what a run's 201 evaluations returned."""
    with (RESULTS / env / method / f"seed{seed}" / "evaluations.csv").open() as file:
        returns = [float(row["return_mean"]) for row in csv.DictReader(file)]
    assert len(returns) == 201
    return returns


def compared(measure: str, seeds: range) -> list[tuple[list[float], list[float]]]:
    """Return what DS-TD3's and TD3's seeds have on each task."""
    return [
        tuple([MEASURES[measure](read_returns(env, method, seed)) for seed in seeds] for method in ("ds-td3", "td3"))
        for env in ENVIRONMENTS
    ]


def wins(ours: list[float], theirs: list[float]) -> float:
    """Return in how many pairs the first is above the second; a tie is half a win."""
    return sum((a > b) + (a == b) / 2 for a, b in itertools.product(ours, theirs))


def null(ours: list[float], theirs: list[float]) -> dict[float, float]:
    """Return how likely each count of wins is when all ways of naming the seeds are equally so."""
    pooled = ours + theirs
    counts = []
    for chosen in itertools.combinations(range(len(pooled)), len(ours)):
        rest = [pooled[index] for index in range(len(pooled)) if index not in chosen]
        counts.append(wins([pooled[index] for index in chosen], rest))
    return {count: counts.count(count) / len(counts) for count in set(counts)}


def bootstrap_interval(tasks: list[tuple[list[float], list[float]]]) -> list[float]:
    """Return the bounds of the probability of improvement, seeds drawn anew within each task and method."""
    generator, resampled = random.Random(1), []
    above = [[[wins([a], [b]) for b in theirs] for a in ours] for ours, theirs in tasks]
    for _ in range(10_000):
        total = 0.0
        for table in above:
            rows = generator.choices(table, k=len(table))
            columns = generator.choices(range(len(table[0])), k=len(table[0]))
            total += sum(row[column] for row in rows for column in columns) / len(rows) / len(columns)
        resampled.append(total / len(tasks))
    resampled.sort()
    return [resampled[249], resampled[9749]]


def exact_test(tasks: list[tuple[list[float], list[float]]], seen: float) -> list[float]:
    """Return how likely shares of wins that add up to what is ``seen`` or more are by chance, one- and two-sided."""
    together = {0.0: 1.0}
    for task in tasks:
        step, chances = null(*task), {}
        for (sum_so_far, p), (count, q) in itertools.product(together.items(), step.items()):
            share = sum_so_far + count / len(task[0]) / len(task[1])
            chances[round(share, 9)] = chances.get(round(share, 9), 0.0) + p * q
        together = chances
    above, below = (sum(p for share, p in together.items() if sign * (share - seen) > -1e-6) for sign in (1, -1))
    return [above, min(1.0, 2 * min(above, below))]


def recompute(tasks: list[tuple[list[float], list[float]]]) -> tuple[list[float], list[float]]:
    """Return the probability of improvement with its bootstrap interval, and the exact test's p, one- and two-sided."""
    shares = [wins(*task) / len(task[0]) / len(task[1]) for task in tasks]
    return [sum(shares) / len(shares), *bootstrap_interval(tasks)], exact_test(tasks, sum(shares))


def assert_agrees(shown: list[float], tasks: list[tuple[list[float], list[float]]], digits: float) -> None:
    """Assert that a page's probability, interval and p values are those of the runs."""
    improvement, p = recompute(tasks)
    assert shown[0] == pytest.approx(improvement[0], abs=0.0051)
    assert shown[1:3] == pytest.approx(improvement[1:], abs=0.021), "two bootstraps differ by a step of their counts"
    assert shown[3:] == pytest.approx(p, rel=digits, abs=0.0006)


def numbers(cell: str) -> list[float]:
    """Return the numbers of a table's cell."""
    return [float(word) for word in cell.translate(str.maketrans("[](),", "     ")).split()]


@pytest.mark.parametrize("measure", MEASURES)
def test_the_first_three_seeds_say_what_the_rules_page_has(measure):
    page = (RESULTS / "rules.md").read_text()
    seen = read_table(page[page.index("| | seeds 0 to 2") : page.index("All of claims.md")])
    (row,) = [row for row in seen if row[""] == measure]
    tasks = compared(measure, range(3))
    for (env, method), former in FORMER.items():
        tasks[ENVIRONMENTS.index(env)][method == "td3"][0] = former[measure]
    assert_agrees(numbers(row["seeds 0 to 2"]), tasks, 0.01)


@pytest.mark.parametrize(("number", "measure"), [("1", "return"), ("2", "LCA")])
def test_the_five_seeds_say_what_the_verdict_is(number, measure):
    rows = read_table((RESULTS / "tables" / "verdicts.md").read_text())
    (row,) = [row for row in rows if row["claim"].startswith(f"{number}.") and row["seeds"] == "0 to 4"]
    chances = numbers(row["p one-sided, two-sided, Holm's"])[:2]
    tasks = compared(measure, range(5))
    assert_agrees([*numbers(row["statistic"]), *chances], tasks, 0.06)
    (_, low, high), (_, p) = recompute(tasks)
    settled = "confirmed" if low > 0.5 else "refuted" if high < 0.5 else "not shown"
    assert row["verdict"] == f"**{settled if p <= 0.05 else 'not shown'}**"
