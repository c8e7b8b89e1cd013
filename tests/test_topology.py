"""The four pieces of the paper, as properties of any layer."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import dst_td3
from dst_td3 import (
    Arguments,
    InputError,
    adaptation_due,
    count_connections,
    drop_and_grow,
    erdos_renyi_topology,
    prune_target,
    target_support,
)

seeds = st.integers(0, 2**32 - 1)
shapes = st.tuples(st.sampled_from([(), (2,), (3, 2)]), st.integers(1, 9), st.integers(1, 9)).map(
    lambda parts: (*parts[0], parts[1], parts[2])
)


def random_layer(shape, density, seed) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Draw weights with equal magnitudes and zeros among them, their mask and the connections of each network."""
    rng = np.random.default_rng(seed)
    connections = max(1, round(density * shape[-2] * shape[-1]))
    mask = torch.from_numpy(erdos_renyi_topology(shape, connections, rng))
    weight = torch.from_numpy(rng.integers(-4, 5, shape).astype(np.float32)) * mask
    return weight, mask, connections


def per_network(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1, tensor.shape[-2] * tensor.shape[-1])


# Piece 1: Erdős-Rényi initialization


@given(shapes, st.floats(0, 1), seeds)
def test_each_network_gets_exactly_its_connections(shape, density, seed):
    connections = round(density * shape[-2] * shape[-1])
    mask = erdos_renyi_topology(shape, connections, np.random.default_rng(seed))
    assert mask.shape == shape and mask.dtype == np.float32
    assert set(np.unique(mask)) <= {0, 1}
    assert (mask.sum((-2, -1)) == connections).all()


def test_every_position_is_equally_likely():
    rng = np.random.default_rng(0)
    draws = 4000
    counts = erdos_renyi_topology((draws, 4, 5), 8, rng).sum(0)
    expected, deviation = draws * 0.4, np.sqrt(draws * 0.4 * 0.6)
    assert np.abs(counts - expected).max() < 4.5 * deviation


@given(st.lists(st.integers(1, 300), min_size=3, max_size=5), st.floats(0, 0.99))
def test_sparsity_is_met_exactly_and_follows_the_erdos_renyi_rule(sizes, sparsity):
    full = [a * b for a, b in itertools.pairwise(sizes)]
    units = [a + b for a, b in itertools.pairwise(sizes)]
    try:
        *counts, output = count_connections(sizes, sparsity=sparsity)
    except InputError:
        # Only ever refused because some layer really is due less than one connection.
        assert min((1 - sparsity) * sum(full[:-1]) * u / sum(units[:-1]) for u in units[:-1]) < 1.5
        return
    assert output == full[-1]
    assert abs(sum(counts) - (1 - sparsity) * sum(full[:-1])) <= 0.5 + 1e-6
    assert all(1 <= count <= size for count, size in zip(counts, full[:-1], strict=True))
    lambdas = [count / u for count, u, size in zip(counts, units, full, strict=False) if count < size]
    slack = sum(1 / u for u in units)
    assert not lambdas or max(lambdas) - min(lambdas) <= slack
    # A layer is full only where the shared lambda would ask for more than there is.
    assert all(
        s / u <= max(lambdas) + slack for c, u, s in zip(counts, units, full, strict=False) if lambdas and c == s
    )


def test_lambda_gives_the_papers_counts():
    assert count_connections([17, 256, 256, 6], er_lambda=(7, 64)) == [7 * 273, 64 * 512, 1536]
    assert count_connections([11, 256, 256, 3], er_lambda=(1000, 64))[0] == 11 * 256
    assert count_connections([17, 256, 256, 6]) == [17 * 256, 256 * 256, 1536]


@pytest.mark.parametrize("asked", [{"sparsity": 0.99999}, {"er_lambda": (0.0001, 64)}])
def test_an_empty_layer_is_refused(asked):
    with pytest.raises(InputError, match=r"leaves layer 1 of \[17, 256, 256, 6\] no connection"):
        count_connections([17, 256, 256, 6], **asked)


# Piece 2: the schedule


def due_steps(period: int, **changes) -> list[int]:
    args = dataclasses.replace(Arguments(total_timesteps=20_000, adapt_interval=1000), **changes)
    return [step for step in range(period, 20_001, period) if adaptation_due(step, period, args)]


def test_adaptations_are_an_interval_apart_and_stop_before_the_end():
    assert due_steps(1) == due_steps(2) == list(range(1000, 19_001, 1000))


def test_a_network_that_learns_less_often_adapts_when_it_learns_next():
    assert due_steps(2, adapt_interval=999)[:3] == [1000, 1998, 2998]
    assert due_steps(3, adapt_interval=1000)[:3] == [1002, 2001, 3000]


@pytest.mark.parametrize("algorithm", ["td3", "sac"])
def test_only_the_dynamically_sparse_methods_adapt(algorithm):
    adapts = [Arguments(method=f"{prefix}{algorithm}").adapts for prefix in ("", "static-", "ds-")]
    assert adapts == [False, False, True]


# Piece 3: drop and grow


@given(shapes, st.floats(0, 1), st.floats(0, 1), seeds)
def test_only_the_smallest_of_each_sign_drop_and_as_many_grow(shape, density, fraction, seed):
    weight, mask, connections = random_layer(shape, density, seed)
    kept, grown = drop_and_grow(weight, mask, fraction, np.random.default_rng(seed))
    assert kept.shape == grown.shape == mask.shape
    assert ((kept + grown) <= 1).all() and (kept <= mask).all()
    assert (per_network(kept + grown).sum(-1) == connections).all()
    for w, m, k in zip(per_network(weight), per_network(mask), per_network(kept), strict=True):
        for side in ((w >= 0) & (m == 1), (w < 0) & (m == 1)):
            dropped, stayed = w[side & (k == 0)].abs(), w[side & (k == 1)].abs()
            full = connections == m.numel()
            assert len(dropped) == (0 if full else round(fraction * int(side.sum())))
            assert not len(dropped) or not len(stayed) or dropped.max() <= stayed.min()


def test_equal_weights_drop_in_order_of_position():
    weight = torch.tensor([[0.5, -0.5, 0.5, -0.5, 0.5, 0.5, -0.5, -0.5, 0.0]])
    kept, _ = drop_and_grow(weight, (weight != 0).float(), 0.5, np.random.default_rng(0))
    assert kept.tolist() == [[0, 0, 0, 0, 1, 1, 1, 1, 0]]


def test_growth_is_uniform_over_the_positions_without_connection():
    rng = np.random.default_rng(0)
    weight, mask, _ = random_layer((6, 6), 0.5, seed=1)
    draws = [drop_and_grow(weight, mask, 0.25, rng) for _ in range(3000)]
    kept = draws[0][0]
    assert all(torch.equal(kept, k) for k, _ in draws), "what drops depends on the weights alone"
    counts = torch.stack([grown for _, grown in draws]).sum(0)[kept == 0]
    share = float(draws[0][1].sum()) / len(counts)
    deviation = np.sqrt(len(draws) * share * (1 - share))
    assert len(counts) == 36 - kept.sum()
    assert (counts - len(draws) * share).abs().max() < 4.5 * deviation


def test_stacked_networks_adapt_as_they_would_alone():
    weight, mask, _ = random_layer((2, 7, 8), 0.4, seed=3)
    together = drop_and_grow(weight, mask, 0.3, np.random.default_rng(5))
    rng = np.random.default_rng(5)
    for index in range(2):
        alone = drop_and_grow(weight[index], mask[index], 0.3, rng)
        assert all(torch.equal(a[index], b) for a, b in zip(together, alone, strict=True))


# Piece 4: targets


@given(shapes, st.floats(0, 1), seeds)
def test_targets_keep_their_largest_weights_up_to_the_networks_count(shape, density, seed):
    weight, mask, connections = random_layer(shape, density, seed)
    target, _, _ = random_layer(shape, density, seed + 1)
    support = target_support(target, mask)
    assert (per_network(((target != 0) | (mask != 0)).float()).sum(-1) <= support.shape[-1]).all()
    target.lerp_(weight, 0.25)
    before = target.clone()
    prune_target(target, support, connections)
    for t, b in zip(per_network(target), per_network(before), strict=True):
        survived = t != 0
        assert torch.equal(t[survived], b[survived])
        assert int(survived.sum()) == min(connections, int((b != 0).sum()))
        lost = b[(b != 0) & ~survived].abs()
        assert not len(lost) or lost.max() <= t[survived].abs().min()


def test_a_targets_support_holds_until_the_next_adaptation():
    weight, mask, connections = random_layer((2, 12, 12), 0.3, seed=0)
    target = weight.clone()
    kept, grown = drop_and_grow(weight, mask, 0.5, np.random.default_rng(0))
    weight, mask = weight * kept, kept + grown
    support = target_support(target, mask)
    for step in range(20):
        weight += 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(step)) * mask
        target.lerp_(weight, 0.2)
        prune_target(target, support, connections)
        assert (per_network(target != 0).sum(-1) <= connections).all()


# The paper's numbers


@pytest.mark.parametrize(
    ("changes", "connections", "flops"),
    [
        ({"method": "td3"}, 214_784, 1.074e14),
        ({"er_lambda": (7.0, 64.0)}, 106_169, 5.284e13),
        ({"er_lambda": (7.0, 64.0), "updates_per_step": 2}, 106_169, 2 * 5.284e13),
    ],
)
def test_the_papers_connections_and_flops(changes, connections, flops):
    args = Arguments(env="HalfCheetah-v4", **changes)
    costs = dst_td3.count_costs(dst_td3.make_environment(args.env), args)
    assert costs["connections"] == connections
    assert costs["sparsity"] == pytest.approx(1 - connections / 214_784)
    assert costs["training_flops"] == pytest.approx(flops, rel=1e-3)
    assert costs["training_flops_of_dense"] == pytest.approx(1.074e14, rel=1e-3)


def test_the_learning_curve_area_is_the_papers_and_no_matter_of_the_interval():
    returns = [float(step) for step in range(0, 1_000_001, 5000)]
    evaluations = [{"step": int(step), "return_mean": step} for step in returns]
    area = dst_td3.learning_curve_area(evaluations, 1_000_000)
    assert area == pytest.approx(sum(returns) / 1e6, rel=1e-12)
    assert dst_td3.learning_curve_area(evaluations[::2], 1_000_000) == pytest.approx(area, rel=0.01)
    # A run of 1,400 steps, evaluated every 1,000: its last evaluation counts for 400.
    short = [{"step": step, "return_mean": value} for step, value in ((0, 1.0), (1000, 10.0), (1400, 100.0))]
    assert dst_td3.learning_curve_area(short, 1400) == pytest.approx((1 * 1000 + 10 * 1000 + 100 * 400) / 5000 / 1400)
