"""The agent's update: TD3 as the textbook has it, and nothing outside the topology."""

import copy
import itertools

import numpy as np
import pytest
import torch
from engines import (
    ACTIONS,
    OBSERVATIONS,
    assert_same_parameters,
    bytes_of,
    make_agent,
    moments,
    random_buffer,
    torch_module,
    train,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import dst_td3
from dst_td3 import Arguments, Layer, initial_layers


def test_a_dense_update_is_the_textbooks():
    """One update of every network, against TD3 written with torch's own modules and optimizer."""
    agent = make_agent(method="td3")
    buffer, noise = random_buffer(np.random.default_rng(0), 8), np.ones((8, ACTIONS), dtype=np.float32) * 4
    low, high = map(torch.from_numpy, agent.bounds)
    networks = agent.engine.actor, agent.engine.critics
    actor, critics = torch_module(networks[0].layers), [torch_module(networks[1].layers, i) for i in range(2)]
    actor_target, critic_targets = copy.deepcopy(actor), copy.deepcopy(critics)
    observation, action, reward, next_observation, terminated = map(torch.from_numpy, buffer.batch(np.arange(8)))

    def act(network, x):
        return torch.tanh(network(x)) * (high - low) / 2 + (high + low) / 2

    critic_optimizer = torch.optim.Adam([p for c in critics for p in c.parameters()], lr=1e-3, weight_decay=2e-4)
    actor_optimizer = torch.optim.Adam(actor.parameters(), lr=1e-3, weight_decay=2e-4)
    with torch.no_grad():
        # The noise of 4 * 0.2 is clipped to 0.5.
        smoothed = act(actor_target, next_observation) + 0.5 * (high - low) / 2
        pair = torch.cat([next_observation, smoothed.clamp(low, high)], 1)
        value = torch.minimum(critic_targets[0](pair), critic_targets[1](pair))
        target = reward + 0.99 * (1 - terminated) * value
    pair = torch.cat([observation, action], 1)
    sum(torch.nn.functional.mse_loss(critic(pair), target) for critic in critics).backward()
    critic_optimizer.step()
    (-critics[0](torch.cat([observation, act(actor, observation)], 1)).mean()).backward()
    actor_optimizer.step()
    for network, follower in zip((actor, *critics), (actor_target, *critic_targets), strict=True):
        for p, t in zip(network.parameters(), follower.parameters(), strict=True):
            t.data = 0.995 * t.data + 0.005 * p.data

    class Given:
        """A generator that draws every transition once, and this noise."""

        integers = staticmethod(lambda stop, size: np.arange(size))
        standard_normal = staticmethod(lambda shape, dtype: noise)

    agent.learn(buffer, 2, Given)
    for ours, expected in (
        (torch_module(networks[0].layers), actor),
        (torch_module(networks[0].target), actor_target),
        *((torch_module(networks[1].layers, i), critics[i]) for i in range(2)),
        *((torch_module(networks[1].target, i), critic_targets[i]) for i in range(2)),
    ):
        assert_same_parameters(ours, expected, rtol=1e-4, atol=1e-6)


@settings(max_examples=10)
@given(st.sampled_from(["ds-td3", "static-td3"]), st.floats(0.1, 0.9), st.integers(1, 7), st.integers(0, 99))
def test_nothing_lives_outside_the_topology(method, sparsity, adapt_interval, seed):
    agent = make_agent(method=method, sparsity=sparsity, adapt_interval=adapt_interval, drop_fraction=0.3, seed=seed)
    first = [[layer.mask.sum((-2, -1)) for layer in n.layers] for n in agent.networks.values()]
    for step in range(1, 31):
        train(agent, range(step, step + 1), seed=step)
        for network, counts in zip(agent.networks.values(), first, strict=True):
            for layer, target, count in zip(network.layers, network.target, counts, strict=True):
                assert torch.equal(layer.mask.sum((-2, -1)), count)
                absent = layer.mask == 0
                assert not layer.weight[absent].any()
                assert not any(moment[absent].any() for moment in moments(network, layer))
                assert ((target.weight != 0).sum((-2, -1)) <= count).all()


def test_no_gradient_reaches_a_masked_weight():
    agent = make_agent(sparsity=0.5)
    buffer, engine = random_buffer(np.random.default_rng(0)), agent.engine
    engine.update_critics(buffer, np.arange(8), np.zeros((8, ACTIONS), dtype=np.float32))
    engine.update_actor(buffer, np.arange(8, 16))
    for layer in engine.actor.layers + engine.critics.layers:
        assert not layer.weight.grad[layer.mask == 0].any()
        assert layer.weight.grad[layer.mask == 1].any()


def test_grown_connections_start_at_zero_with_zero_moments():
    agent = make_agent(sparsity=0.5, drop_fraction=0.4)
    train(agent, range(1, 4))
    for network in agent.networks.values():
        before = [layer.mask.clone() for layer in network.layers]
        rng = np.random.default_rng(0)
        kept = [dst_td3.drop_and_grow(x.weight.detach(), x.mask, 0.4, rng)[0] for x in network.layers]
        network.adapt(np.random.default_rng(0))
        for layer, old, stayed in zip(network.layers[:-1], before, kept, strict=False):
            grown = (layer.mask == 1) & (stayed == 0)
            assert grown.any() and not torch.equal(layer.mask, old)
            for tensor in (layer.weight, *moments(network, layer)):
                assert not tensor[grown].any()
        assert torch.equal(network.layers[-1].mask, torch.ones_like(before[-1])), "the output layer stays dense"


def test_every_method_is_one_code_path():
    """A topology that holds every connection trains to the same bytes as the dense agent."""
    dense, full = make_agent(method="td3"), make_agent(method="static-td3", sparsity=0.0)
    for agent in (dense, full):
        train(agent, range(1, 9))
    assert bytes_of(dense) == bytes_of(full)


@pytest.mark.parametrize("method", ["td3", "static-td3", "ds-td3"])
def test_only_what_adapts_is_adapted_critics_first(monkeypatch, method):
    agent, done = make_agent(method=method, sparsity=None if method == "td3" else 0.5), []
    for name, network in agent.networks.items():
        monkeypatch.setattr(network, "adapt", lambda *_, name=name: done.append(name))
    train(agent, range(1, 9))
    assert done == ["critic", "actor"] * 2 * (method == "ds-td3")


def test_several_updates_a_step_each_with_a_batch_of_its_own(monkeypatch):
    agent, done = make_agent(sparsity=0.5, updates_per_step=3, adapt_interval=2), []
    for name in ("update_critics", "update_actor"):
        own = getattr(agent.engine, name)

        def update(buffer, indices, *rest, own=own, name=name):
            done.append((name, buffer.batch(indices)))
            return own(buffer, indices, *rest)

        monkeypatch.setattr(agent.engine, name, update)
    for name, network in agent.networks.items():
        monkeypatch.setattr(network, "adapt", lambda *_, name=name: done.append((name, None)))
    train(agent, range(1, 5))
    names = [name for name, _ in done]
    assert [names.count(name) for name in ("update_critics", "update_actor")] == [12, 6]
    batches = [batch.reward.tolist() for name, batch in done if name == "update_critics"]
    assert all(a != b for a, b in itertools.pairwise(batches))
    # An interval is still one of environment steps: after steps 2 and 4.
    assert [names.count(name) for name in agent.networks] == [2, 2]
    assert names.index("critic") == names.index("actor") - 2


def test_a_networks_arrays_are_copies():
    agent = make_agent(sparsity=0.5)
    before = agent.engine.actor.layer_arrays()
    kept = [layer.weight.copy() for layer in before]
    train(agent, range(1, 9))
    assert all(np.array_equal(layer.weight, weight) for layer, weight in zip(before, kept, strict=True))
    assert not np.array_equal(agent.engine.actor.layer_arrays()[0].weight, kept[0])


def test_a_loaded_agent_goes_on_to_the_same_bytes():
    """After adaptations, so that the supports of the targets' prune are loaded with it."""
    first, second = make_agent(sparsity=0.5), make_agent(sparsity=0.5)
    train(first, range(1, 14))
    second.load_state_dict({name: array.copy() for name, array in first.state_dict().items()})
    for agent in (first, second):
        train(agent, range(14, 30), seed=2)
    assert bytes_of(first) == bytes_of(second)


@pytest.mark.parametrize("other", [{"hidden": (12, 16)}, {"hidden": (16, 12, 4)}])
def test_another_agents_state_is_rejected(other):
    with pytest.raises((KeyError, ValueError)):
        make_agent(**other).load_state_dict(make_agent().state_dict())


def test_the_actors_bounds_are_respected():
    agent = make_agent()
    actions = np.array([agent.act(100 * np.random.default_rng(i).standard_normal(OBSERVATIONS)) for i in range(50)])
    low, high = agent.bounds
    assert (actions >= low).all() and (actions <= high).all()
    assert actions.dtype == np.float32


def test_a_population_is_one_more_leading_axis():
    """Three agents stacked on a leading axis compute what each computes alone."""
    args = Arguments(sparsity=0.5, hidden=(16, 12))
    sizes = [OBSERVATIONS, 16, 12, ACTIONS]
    counts = dst_td3.count_connections(sizes, 0.5)
    layers = initial_layers(sizes, counts, np.random.default_rng(0), networks=(3,))
    stacked = dst_td3.MaskedNetwork(layers, args)
    x = torch.randn(3, 8, OBSERVATIONS, generator=torch.Generator().manual_seed(0))
    together = dst_td3.forward(stacked.layers, x)
    stacked.minimize(together.square().sum())
    stacked.adapt(np.random.default_rng(1))
    rng = np.random.default_rng(1)
    alone = [dst_td3.MaskedNetwork([Layer(*(a[i] for a in layer)) for layer in layers], args) for i in range(3)]
    for i, network in enumerate(alone):
        output = dst_td3.forward(network.layers, x[i])
        torch.testing.assert_close(output, together[i])
        network.minimize(output.square().sum())
    # Growth is drawn layer by layer, and within a layer network by network.
    for index in range(2):
        for i, network in enumerate(alone):
            layer = network.layers[index]
            kept, grown = dst_td3.drop_and_grow(layer.weight.detach(), layer.mask, args.drop_fraction, rng)
            assert torch.equal(stacked.layers[index].mask[i], kept + grown)
