"""The statistics of analysis.py against scipy, brute force, and cases worked by hand."""

from itertools import combinations, product

import numpy as np
import pytest
from scipy import stats

import analysis

RNG = np.random.default_rng(7)
SAMPLE = [RNG.normal(size=5), RNG.normal(size=3)]
OTHER = [RNG.normal(1, 2, size=4), RNG.normal(1, 2, size=3)]


@pytest.mark.parametrize("m, n", [(2, 2), (3, 3), (5, 3), (5, 5), (8, 6)])
def test_the_rank_test_of_one_task_is_mann_whitneys(m, n):
    x, y = RNG.normal(0.5, size=m), RNG.normal(size=n)
    one, two = analysis.exact_rank_test([x], [y])
    assert one == pytest.approx(stats.mannwhitneyu(x, y, alternative="greater", method="exact").pvalue)
    assert two == pytest.approx(stats.mannwhitneyu(x, y, method="exact").pvalue)


def deals(x, y):
    """Return the share of pairs in which the first group is above, for all ways to deal the values to the groups."""
    values, shares = [*x, *y], []
    for chosen in combinations(range(len(values)), len(x)):
        rest = [values[i] for i in range(len(values)) if i not in chosen]
        pairs = [(values[i] > b) + 0.5 * (values[i] == b) for i in chosen for b in rest]
        shares.append(sum(pairs) / len(pairs))
    return shares


@pytest.mark.parametrize("second", [([4, 4, 1], [0, 1]), ([1, 2], [2, 5, 3])])
def test_the_rank_test_of_two_tasks_with_ties_is_the_permutation_test(second):
    first = ([3, 3, 7], [1, 3, 2])
    x, y = ([np.array(task[side], float) for task in (first, second)] for side in (0, 1))
    null = np.array([(a + b) / 2 for a, b in product(deals(*first), deals(*second))])
    seen = analysis.probability_of_improvement(x, y)
    above, below = (null >= seen - 1e-9).mean(), (null <= seen + 1e-9).mean()
    assert analysis.exact_rank_test(x, y) == pytest.approx((above, min(1, 2 * min(above, below))))
    assert analysis.stratified_null(x, y).sum() == pytest.approx(1)


def test_the_probability_of_improvement_counts_pairs_and_halves_ties():
    x, y = [np.array([1.0, 3.0]), np.array([5.0, 5.0])], [np.array([2.0, 3.0]), np.array([5.0, 9.0])]
    assert analysis.probability_of_improvement(x, y) == pytest.approx((1.5 / 4 + 1 / 4) / 2)


def test_the_interquartile_mean_is_scipys():
    assert analysis.interquartile_mean(SAMPLE) == pytest.approx(stats.trim_mean(np.concatenate(SAMPLE), 0.25))
    assert analysis.interquartile_mean([np.arange(8.0)]) == pytest.approx((2 + 3 + 4 + 5) / 4)


def test_the_bootstrap_draws_within_tasks_and_is_repeatable():
    assert analysis.bootstrap_interval(analysis.interquartile_mean, [np.full(3, 1.0), np.full(3, 5.0)]) == (3, 3)
    once = analysis.bootstrap_interval(analysis.probability_of_improvement, SAMPLE, OTHER, resamples=2000)
    assert once == analysis.bootstrap_interval(analysis.probability_of_improvement, SAMPLE, OTHER, resamples=2000)
    assert once[0] < analysis.probability_of_improvement(SAMPLE, OTHER) < once[1]


def test_the_bootstrap_of_one_mean_is_scipys():
    x = RNG.normal(size=12)
    ours = analysis.bootstrap_interval(lambda sample: sample[0].mean(axis=-1), [x])
    theirs = stats.bootstrap((x,), np.mean, n_resamples=50_000, method="percentile", rng=1).confidence_interval
    assert ours == pytest.approx(tuple(theirs), abs=0.02)


def test_welchs_interval_is_the_textbooks():
    x, y = SAMPLE[0], OTHER[0]
    a, b = x.var(ddof=1) / len(x), y.var(ddof=1) / len(y)
    half = stats.t.ppf(0.975, (a + b) ** 2 / (a**2 / (len(x) - 1) + b**2 / (len(y) - 1))) * np.sqrt(a + b)
    difference, low, high, p = analysis.welch(x, y)
    assert (low, difference, high) == pytest.approx(x.mean() - y.mean() + half * np.array([-1, 0, 1]))
    assert p == pytest.approx(stats.ttest_ind(x, y, equal_var=False).pvalue)


def test_values_without_spread_have_no_interval():
    assert analysis.welch(np.full(3, 7.0), np.full(3, 5.0)) == (2, 2, 2, 0)
    assert analysis.welch(np.full(3, 5.0), np.full(3, 5.0)) == (0, 0, 0, 1)


def test_the_interval_of_one_mean_is_students():
    x = SAMPLE[0]
    mean, low, high, p = analysis.mean_against(x, 0.3)
    assert (low, high) == pytest.approx(stats.t.interval(0.95, 4, x.mean(), stats.sem(x)))
    assert mean == pytest.approx(x.mean())
    assert p == pytest.approx(stats.ttest_1samp(x, 0.3).pvalue)


def test_holm_steps_down():
    assert analysis.holm([0.04, 0.01, 0.03, 0.9]) == pytest.approx([0.09, 0.04, 0.09, 0.9])


def test_a_level_is_reached_when_ten_evaluations_in_a_row_average_it():
    steps, returns = np.arange(0, 1_005_000, 5000), np.zeros(201)
    returns[50:] = 10
    assert analysis.steps_to_reach(steps, returns, 5) == steps[54]
    assert analysis.steps_to_reach(steps, returns, 10.5) == 1_000_000
    assert analysis.steps_to_reach(steps, returns, 10.5, never=None) is None
    assert analysis.steps_to_reach(steps[:9], returns[:9], -1, never=None) is None  # nine are not ten


def test_the_final_return_and_the_lca_are_the_papers():
    steps, returns = np.arange(0, 1_005_000, 5000), np.arange(201.0)
    assert analysis.final_return(returns) == pytest.approx(195.5)
    assert analysis.final_return(returns[:5]) == pytest.approx(2.5)  # without that of the untrained policy
    assert analysis.learning_curve_area(steps, returns) == pytest.approx(20100 / 1e6)
    # Evaluated half as often, each counts twice; at the end of a run also one that comes sooner.
    assert analysis.learning_curve_area(steps[::2], np.ones(101)) == pytest.approx(202 / 1e6)
    assert analysis.learning_curve_area(np.array([0, 5000, 7500]), np.ones(3), 7500) == pytest.approx(2.5 / 7500)


def test_scores_are_normalised_by_fixed_numbers():
    assert analysis.normalise(np.array([20.0, 120.0, 70.0]), 20, 120) == pytest.approx([0, 1, 0.5])
