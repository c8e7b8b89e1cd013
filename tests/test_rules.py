"""Topology rules of one's own: ``TD3.scores``, which both engines ask and follow alike; RigL's and RLx2's by it."""

import dataclasses

import numpy as np
import pytest
import torch
from engines import DEFAULTS, Pair, case, make_agent, random_buffer, train
from hypothesis import given
from hypothesis import strategies as st
from running import SHORT, imported, rows_of, run_directory
from test_topology import per_network, random_layer, seeds, shapes

import dst_td3
from dst_td3 import TD3, Arguments, MaskedEngine, drop_and_grow

rigl, rlx2 = imported("examples/rigl.py"), imported("examples/rlx2.py")
RULES = ("drop", "growth", "both")


@given(shapes, st.floats(0, 1), st.floats(0, 1), seeds)
def test_growth_takes_the_largest_scores_among_empty_positions(shape, density, fraction, seed):
    """Connections are dropped as they are without such scores; nothing is drawn."""
    scores, mask, connections = random_layer(shape, density, seed)
    growth = torch.from_numpy(np.random.default_rng(seed).integers(0, 6, shape).astype(np.float32))
    rng = np.random.default_rng(seed)
    kept, grown = drop_and_grow(scores, mask, fraction, rng, growth)
    assert rng.bit_generator.state == np.random.default_rng(seed).bit_generator.state
    assert torch.equal(kept, drop_and_grow(scores, mask, fraction, rng)[0])
    assert (per_network(kept + grown).sum(-1) == connections).all() and ((kept + grown) <= 1).all()
    for k, g, score in zip(per_network(kept), per_network(grown), per_network(growth), strict=True):
        chosen, left = score[g == 1], score[(k == 0) & (g == 0)]
        assert not len(chosen) or not len(left) or chosen.min() >= left.max()


class ByScores(TD3):
    """A rule of one's own: it drops by the square of a weight, grows by a fixed matrix, or does both."""

    def scores(self, network, buffer, rng):
        layers, rule = network.layer_arrays()[:-1], self.args.rule
        drop = [weight * np.abs(weight) * (1 + np.arange(weight.shape[-1]) % 2 * 100) for weight, _, _ in layers]
        growth = [np.random.default_rng(7).random(weight.shape) for weight, _, _ in layers]
        return drop if rule != "growth" else None, growth if rule != "drop" else None


@dataclasses.dataclass(frozen=True)
class ByScoresArguments(Arguments):
    """Arguments with one more, and an agent of one's own."""

    rule: str = "both"

    def make_agent(self, actor, critics, bounds):
        return ByScores(self.make_engine(actor, critics, bounds, MaskedEngine), bounds, self)


def arguments(kind: type[Arguments], **changes) -> Arguments:
    """Return arguments of the engines' cases for a rule of one's own."""
    return kind(**vars(DEFAULTS) | changes)


@pytest.mark.parametrize("rule", RULES)
def test_engines_choose_the_same_connections_for_the_same_scores(rule):
    pair = Pair(case(args=arguments(ByScoresArguments, rule=rule, adapt_interval=3)))
    plain = Pair(case(args=arguments(Arguments, adapt_interval=3)))
    for this in (pair, plain):
        this.train_step_by_step()
    for (network, _), (other, _) in zip(pair.networks, plain.networks, strict=True):
        assert (network.layer_arrays()[0][1] != other.layer_arrays()[0][1]).any(), "the rule makes a difference"


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_keeps_the_count_of_connections(rule):
    agent = make_agent(ByScoresArguments, sparsity=0.6, rule=rule, drop_fraction=0.3)
    before = [layer.mask for network in agent.networks.values() for layer in network.layer_arrays()]
    train(agent, range(1, 25))
    after = [layer.mask for network in agent.networks.values() for layer in network.layer_arrays()]
    for old, new in zip(before, after, strict=True):
        np.testing.assert_array_equal(new.sum((-2, -1)), old.sum((-2, -1)))
    assert any((old != new).any() for old, new in zip(before, after, strict=True))


@pytest.mark.parametrize("name", ["actor", "critic"])
def test_rigl_grows_where_the_dense_gradient_is_largest(name):
    """Of the loss of one batch, against the differences that small weights at empty positions make to it."""
    this = case(args=arguments(rigl.RigLArguments, drop_fraction=0.3))
    agent, rng = this.agent("masked")
    this.train(agent, rng, range(1, 4))
    engine, network, buffer = agent.engine, agent.networks[name], this.buffer
    drop, growth = agent.scores(network, buffer, np.random.default_rng(5))
    rng = np.random.default_rng(5)
    batch = engine.batch(buffer, buffer.draw(this.batch_size, rng))
    noise = torch.from_numpy(rng.standard_normal(batch.action.shape, dtype=np.float32))
    assert drop is None
    for layer, score in zip(network.layers[:-1], growth, strict=True):
        for position in map(tuple, (layer.mask == 0).nonzero()[::20].tolist()):
            losses = []
            for weight in (1e-4, -1e-4):
                layer.weight.detach()[position] = weight
                loss = engine.actor_loss(batch) if name == "actor" else engine.critic_loss(batch, noise)[0]
                losses.append(loss.item())
            layer.weight.detach()[position] = 0
            assert score[position] == pytest.approx(abs(losses[0] - losses[1]) / 2e-4, rel=1e-3, abs=1e-6)
    before = [layer.mask == 1 for layer in network.layers]
    agent.adapt(network, buffer, np.random.default_rng(5))
    for layer, old, score in zip(network.layers[:-1], before, map(torch.from_numpy, growth), strict=False):
        grown, empty = (layer.mask == 1) & ~old, (layer.mask == 0) & ~old
        for g, e, values in zip(*map(per_network, (grown, empty, score)), strict=True):
            assert g.any() and values[g].min() >= values[e].max()


def test_rigl_trains_on_either_engine_alike():
    pair = Pair(case(args=arguments(rigl.RigLArguments, adapt_interval=4)))
    pair.train_step_by_step()


def test_rigl_is_a_program_whose_runs_have_names_of_their_own(command_line, tmp_path):
    names = [dst_td3.run_name(dst_td3.resolve(rigl.RigLArguments(grow_by=by))) for by in ("gradient", "uniform")]
    assert names == ["ds-td3_grow-by=gradient", "ds-td3"]
    given = [*SHORT, "--sparsity", 0.9, "--total-timesteps", 1000, "--results-dir", tmp_path]
    code, output, error = command_line(*given, kind=rigl.RigLArguments)
    assert code == 0, error
    rows = rows_of(run_directory(tmp_path) / "topology.csv")
    assert "grow-by=gradient" in output and float(rows[-1]["initial_connections_alive"]) < 1


# RLx2


def test_rlx2_trains_on_either_engine_alike():
    args = arguments(rlx2.RLx2Arguments, adapt_interval=4, drop_fraction=0.5, forgets=False, total_timesteps=13)
    pair = Pair(case(args=dataclasses.replace(args, learning_starts=0)))
    pair.train_step_by_step()
    for network, masked in pair.networks:
        assert network.drop_fraction == masked.drop_fraction == pytest.approx(0, abs=1e-9)


def test_rlx2_replaces_fewer_connections_as_time_goes_on_and_the_actors_half_as_often():
    args = {"adapt_interval": 10, "drop_fraction": 0.5, "total_timesteps": 100, "learning_starts": 0, "forgets": False}
    agent, replaced = make_agent(rlx2.RLx2Arguments, sparsity=0.6, **args), {"critic": [], "actor": []}
    buffer, rng = random_buffer(np.random.default_rng(0)), np.random.default_rng(0)
    for step in range(1, 101):
        before = {name: network.layer_arrays()[0].mask for name, network in agent.networks.items()}
        agent.learn(buffer, step, rng)
        for name, network in agent.networks.items():
            changed = (before[name] != network.layer_arrays()[0].mask).sum() / 2 / before[name].sum()
            replaced[name] += [(step, changed)] if changed else []
    steps, shares = zip(*replaced["critic"], strict=True)
    assert steps[:5] == (10, 20, 30, 40, 50) and shares[0] > shares[4] > shares[-1]
    assert shares[0] <= 0.25 * (1 + np.cos(np.pi / 10)) + 0.02, "some of those dropped may grow again"
    assert [step for step, _ in replaced["actor"]][:3] == [20, 40, 60]


def test_rlx2_begins_with_the_largest_weights_of_a_dense_layer():
    shape = (2, 30, 20)
    mask = np.zeros(shape, np.float32)
    mask[:, :5] = 1
    layer = rlx2.keep_largest(dst_td3.Layer(mask, mask, np.ones((2, 1, 20), np.float32)), np.random.default_rng(3))
    dense = dst_td3.initial_values(30, shape, np.random.default_rng(3)).astype(np.float32)
    for weight, kept, drawn in zip(layer.weight, layer.mask, dense, strict=True):
        assert kept.sum() == 100 and np.abs(drawn[kept == 1]).min() >= np.abs(drawn[kept == 0]).max()
        np.testing.assert_array_equal(weight, drawn * kept)
    assert (layer.bias == 1).all()


@pytest.mark.parametrize("far", [False, True])
def test_rlx2_forgets_the_oldest_tenth_where_the_policy_has_moved_on(monkeypatch, far):
    monkeypatch.setattr(rlx2, "FEWEST", 40)
    agent = make_agent(rlx2.RLx2Arguments, sparsity=0.5)
    buffer, rng = rlx2.ForgettingBuffer(60, 5, 3, 3, 0.99, 20), np.random.default_rng(0)
    low, high = agent.bounds
    for number in range(75):
        observation = rng.standard_normal(5).astype(np.float32)
        action = agent.act(observation)
        action = np.where(action > (low + high) / 2, low, high) if far else action
        transition = dst_td3.Batch(observation, action, [1.0], observation, [False])
        buffer.add(transition, ended=number == 74)
    assert buffer.added == 75 and buffer.first == 15
    rewards = buffer.rows[:, 8]
    assert (rewards[20:58] == np.float32(1 + 0.99 + 0.99**2)).all() and (rewards[15:20] == 1).all()
    agent.forget(buffer)
    assert buffer.first == (21 if far else 15)
    assert set(buffer.draw(2000, rng)) == {number % 60 for number in range(buffer.first, 75)}
    other = make_agent(rlx2.RLx2Arguments, sparsity=0.5)
    other.load_state_dict(agent.state_dict())
    assert other.oldest == agent.oldest == (21 if far else 0)


def test_rlx2_is_a_program(command_line, tmp_path):
    given = [*SHORT, "--sparsity", 0.9, "--critic-sparsity", 0.8, "--total-timesteps", 1000, "--results-dir", tmp_path]
    code, _, error = command_line(*given, kind=rlx2.RLx2Arguments)
    assert code == 0, error
    assert "n-step=3" in dst_td3.run_name(dst_td3.resolve(rlx2.RLx2Arguments(env="Hopper-v4", sparsity=0.9)))
