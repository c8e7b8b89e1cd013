"""Simulates what the verdicts of results/rules.md can show, and prints its tables in Markdown.

usage: python benchmarks/power.py, from the root. Each cell is normal, with the standard deviation of our own runs so
far (three to five seeds); where the methods are meant to be equal, they share the mean. "Interval" is the bootstrap
interval of the probability of improvement, "exact" the two-sided exact stratified rank test at 0.05, "both" the rule.
A/B is the share of simulations that confirms and that refutes.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import analysis  # noqa: E402
from analysis import TASKS  # noqa: E402

# The paper's means (Tables 2 and 1), in the order of TASKS.
PAPER = {
    (method, metric): tuple(means[task][index] for task in TASKS)
    for metric, means in (("return", analysis.PAPER_MEANS), ("lca", analysis.PAPER_LCA))
    for index, method in enumerate(analysis.METHODS)
}
RANDOM_POLICY = ROOT / "results" / "random_policy.csv"
METRICS = {"return": lambda _, returns: analysis.final_return(returns), "lca": analysis.learning_curve_area}
# All other cells had three seeds.
FIVE_SEEDS = {("HalfCheetah-v4", "ds-td3"), ("HalfCheetah-v4", "ds-td3_sparsity=0.8")}
# Five seeds of five tasks, and the two fresh ones of all but HalfCheetah, whose DS-TD3 was run before the rules.
DESIGNS = {"five seeds": (slice(None), 5), "fresh": (slice(1, None), 2)}


def seeds(task: str, cell: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Read the seeds of a cell that were there before the rules, so that later runs do not change the tables."""
    for seed in range(5 if (task, cell) in FIVE_SEEDS else 3):
        yield analysis.steps_and_returns(analysis.read_run(ROOT / "results" / task / cell / f"seed{seed}"))


def verdicts(x: np.ndarray, y: np.ndarray, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """Return the shares of simulations, of (simulations, tasks, n) values, that confirm and that refute x above y.

    Shape (3, 2): by the interval, by the exact test, by both. The resamples are shared by all simulations.
    """
    simulations, tasks, n = x.shape
    above = (x[..., :, None] > y[..., None, :]).astype(np.float32)
    observed = above.mean(axis=(1, 2, 3))
    counts = rng.multinomial(n, np.full(n, 1 / n), size=(2, resamples, tasks)).astype(np.float32)
    weights = counts[0][..., :, None] * counts[1][..., None, :] / (tasks * n * n)
    resampled = above.reshape(simulations, -1) @ weights.reshape(resamples, -1).T
    low, high = np.quantile(resampled, [0.025, 0.975], axis=1)
    interval = np.array([low > 0.5 + 1e-6, high < 0.5 - 1e-6])
    ranks = [np.arange(n)] * tasks, [np.arange(n, 2 * n)] * tasks
    null = analysis.stratified_null(*ranks)
    at = np.rint(observed * (len(null) - 1)).astype(int)
    exact = np.array([null[::-1].cumsum()[::-1][at] <= 0.025, null.cumsum()[at] <= 0.025])
    return np.array([interval, exact, interval & exact]).mean(axis=-1)


def print_row(label: str, comparison: str, spreads: tuple, means: tuple, args: argparse.Namespace, cap=None) -> None:
    """Print a row: for each design, the shares that confirm and refute; ``cap`` is where y and x are censored."""
    cells, digits = [], int(label.startswith(("none", "0.6")))
    for tasks, n in DESIGNS.values():
        rng = np.random.default_rng(args.seed)
        shape = args.simulations, len(TASKS[tasks]), n
        x, y = (
            rng.normal(np.array(m)[tasks, None], np.array(s)[tasks, None], shape)
            for m, s in zip(means, spreads, strict=True)
        )
        if cap:
            x, y = -np.minimum(x, cap), -0.6 * np.minimum(y, cap)
        cells += [
            "/".join(f"{100 * share:.{digits}f}" for share in pair) for pair in verdicts(x, y, args.resamples, rng)
        ]
    print(f"| {comparison} | {label} | {' | '.join(cells)} |")


def print_tasks(args: argparse.Namespace) -> None:
    """Print the table of the claims across tasks."""
    print(f"| claim | true effect | {' | '.join(f'{name}: interval | exact | both' for name in DESIGNS)} |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for metric, measure in METRICS.items():
        for other in ("td3", "static-td3"):
            names = {"td3": "TD3", "static-td3": "Static-TD3", "lca": "LCA"}
            spreads = tuple(
                [np.std([measure(*run) for run in seeds(task, cell)], ddof=1) for task in TASKS]
                for cell in ("ds-td3", other)
            )
            scale, base = np.array(PAPER["td3", metric]), np.zeros(len(TASKS))
            comparison = f"DS-TD3 above {names[other]}, {names.get(metric, metric)}"
            if (other, metric) == ("td3", "return"):
                # Ranks see no scale: where both methods spread alike, all four claims have this row.
                print_row("none, equal spread", "each of the four", (spreads[1], spreads[1]), (base, base), args)
            effects = {"none": base} | {f"+{e:.0%}": e * scale for e in (0.05, 0.1, 0.2)}
            effects["the paper's"] = np.array(PAPER["ds-td3", metric]) - np.array(PAPER[other, metric])
            for label, effect in effects.items():
                print_row(label, comparison, spreads, (effect, base), args)
    random = analysis.read_random_policy(RANDOM_POLICY)
    reached = {}
    for cell in ("ds-td3", "td3"):
        for task in TASKS:
            level = random[task] + 0.9 * (analysis.PAPER_MEANS[task][0] - random[task])
            reached[cell, task] = [analysis.steps_to_reach(*run, level) for run in seeds(task, cell)]
    spreads = tuple([np.std(reached[cell, task], ddof=1) for task in TASKS] for cell in ("ds-td3", "td3"))
    dense = np.array([np.mean(reached["td3", task]) for task in TASKS])
    for share in (0.4, 0.5, 0.6, 0.8, 1.0):
        # At 0.6 the steps that the rule compares are equal.
        print_row(f"{share} of TD3's steps", "40% fewer steps", spreads, (share * dense, dense), args, cap=1e6)


def print_halfcheetah(args: argparse.Namespace) -> None:
    """Print the table of the claims on HalfCheetah alone, of three seeds a cell, and five at sparsity 0.8."""
    task, rng = TASKS[0], np.random.default_rng(args.seed)
    cells = [f"ds-td3_adapt-interval={e}" for e in (200, 500, 2000)] + [f"ds-td3_sparsity={s}" for s in (0.25, 0.5)]
    cells += ["ds-td3", "ds-td3_initial-policy=policy-700000", "td3"]
    lca = [[analysis.learning_curve_area(*run) for run in seeds(task, cell)] for cell in cells]
    spread = np.sqrt(np.mean([np.var(values, ddof=1) for values in lca]))
    effects = (0, 0.05, 0.1, 0.2)
    print("\n| claim | " + " | ".join(f"{effect:.0%} of the paper's TD3" for effect in effects) + " |")
    print("| --- | --- | --- | --- | --- |")
    sizes = {
        "learned first samples help: 3 against 5 seeds": (3, 5, 1),
        "50% is fastest: 3 seeds, three rivals": (3, 3, 3),
        "e = 1000 is best: 5 seeds, three rivals of 3": (5, 3, 3),
    }
    for label, (m, n, rivals) in sizes.items():
        shares = []
        for effect in effects:
            x = rng.normal(effect * analysis.PAPER_LCA[task][0], spread, (m, args.simulations))
            low = np.full(args.simulations, np.inf)
            for _ in range(rivals):
                y = rng.normal(0, spread, (n, args.simulations))
                test = analysis.stats.ttest_ind(x, y, equal_var=False)
                low = np.minimum(low, test.confidence_interval(analysis.LEVEL).low)
            shares.append(f"{(low > 0).mean():.0%}")
        print(f"| {label} | {' | '.join(shares)} |")
    final = [analysis.final_return(returns) for _, returns in seeds(task, "ds-td3_sparsity=0.8")]
    random = analysis.read_random_policy(RANDOM_POLICY)[task]
    scores = analysis.normalise(np.array(final), random, analysis.PAPER_MEANS[task][0])
    spread = np.std(scores, ddof=1)
    x = [rng.normal(-effect, spread, (5, args.simulations)) for effect in effects]
    shares = [analysis.stats.ttest_1samp(below, 0).confidence_interval(analysis.LEVEL).high < 0 for below in x]
    print(f"| 80% fails: 5 seeds, that far below the limit | {' | '.join(f'{s.mean():.0%}' for s in shares)} |")


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--simulations", type=int, default=10_000)
    parser.add_argument("--resamples", type=int, default=1000, help="of the bootstrap, in each simulation")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print_tasks(args)
    print_halfcheetah(args)


if __name__ == "__main__":
    main()
