"""The sparse engine against the masked one: the same topologies always, the same numbers within rounding."""

import dataclasses
import functools
import io
import itertools
import math
import os
import platform
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dst_td3
import sparse_engine
from sparse_engine import SparseTD3, prune_target

OBSERVATIONS, ACTIONS = 5, 3
DEFAULTS = dst_td3.Arguments(engine="masked", device="cpu", adapt_interval=8, drop_fraction=0.2, tau=0.05)


@dataclasses.dataclass
class Case:
    """An agent to build by either engine, and the batches to train it on."""

    actor: list[int]
    critic: list[int]
    actor_connections: list[int]
    critic_connections: list[int]
    args: dst_td3.Arguments = DEFAULTS
    batch_size: int = 10
    dtype: type = np.float64
    seed: int = 0

    def agent(self, engine):
        """Build an agent and the generator that places its grown connections."""
        rng = np.random.default_rng(self.seed)
        actor = dst_td3.initial_layers(self.actor, self.actor_connections, rng)
        critics = dst_td3.initial_layers(self.critic, self.critic_connections, rng, networks=(2,))
        typed = [[dst_td3.Layer(*(a.astype(self.dtype) for a in layer)) for layer in net] for net in (actor, critics)]
        return engine(*typed, self.bounds, self.args), rng

    @property
    def bounds(self):
        """Bounds of the actions, lopsided so that both the middle and the range of them matter."""
        return -np.full(self.actor[-1], 0.5, self.dtype), np.linspace(0.4, 1, self.actor[-1]).astype(self.dtype)

    @functools.cached_property
    def buffer(self):
        """A replay buffer of random transitions, in the type of the case."""
        observations, actions = self.actor[0], self.actor[-1]
        buffer = dst_td3.ReplayBuffer(400, observations, actions)
        buffer.rows = np.random.default_rng(self.seed).standard_normal(buffer.rows.shape).astype(self.dtype)
        buffer.rows[:, observations : observations + actions] /= 4
        buffer.rows[:, -1] = buffer.rows[:, -1] > 1
        buffer.added = len(buffer.rows)
        return buffer

    def train(self, agent, rng, steps):
        """Train an agent for the given steps."""
        agent.args = dataclasses.replace(agent.args, batch_size=self.batch_size)
        for step in steps:
            agent.learn(self.buffer, step, rng)


def case(hidden=(24, 20), sparsity=0.6, observations=OBSERVATIONS, actions=ACTIONS, **rest):
    """Return a case of the given widths and sparsity."""
    actor, critic = [observations, *hidden, actions], [observations + actions, *hidden, 1]
    counts = (dst_td3.count_connections(sizes, sparsity) for sizes in (actor, critic))
    return Case(actor, critic, *counts, **rest)


@st.composite
def cases(draw):
    """Draw widths, depths, counts of connections (from a single one to a full layer), batch sizes and settings."""
    hidden = draw(st.lists(st.integers(1, 40) | st.sampled_from([129, 300]), min_size=1, max_size=3))
    observations, actions = draw(st.integers(1, 20)), draw(st.integers(1, 6))
    sizes = [observations, *hidden, actions], [observations + actions, *hidden, 1]
    counts = [
        [
            draw(st.one_of(st.integers(1, inputs * outputs), st.just(inputs * outputs)))
            for inputs, outputs in itertools.pairwise(widths[:-1])
        ]
        + [widths[-2] * widths[-1]]
        for widths in sizes
    ]
    args = dataclasses.replace(
        DEFAULTS,
        adapt_interval=draw(st.integers(2, 6)),
        drop_fraction=draw(st.sampled_from([0, 0.05, 0.3, 1])),
        tau=draw(st.sampled_from([0.005, 0.3, 1])),
        policy_frequency=draw(st.integers(1, 3)),
        weight_decay=draw(st.sampled_from([0, 2e-4, 0.1])),
        updates_per_step=draw(st.integers(1, 3)),
        step_exponent=draw(st.sampled_from([0, 0.5, 1])),
        recycle_dormant=draw(st.booleans()),
        drop_by=draw(st.sampled_from(["magnitude", "contribution"])),
    )
    batch_size = draw(st.one_of(st.integers(1, 40), st.sampled_from([100, 129, 300])))
    return Case(*sizes, *counts, args, batch_size, seed=draw(st.integers(0, 1000)))


def sparse_layers(network):
    """Return weight, target, first and second moment of each layer of each network of a SparseNetwork, dense."""
    arrays, layers = network.arrays, []
    for block in network.blocks:
        topology, place = network._topology(block)
        dense = [np.zeros((block.inputs, block.outputs)) for _ in range(4)]
        for matrix, name in zip(dense, ("parameters", "target", "first_moment", "second_moment"), strict=True):
            matrix.ravel()[topology] = getattr(arrays, name)[place]
        positions, weight = network._extras(block)
        assert not np.isin(positions, topology).any()
        dense[1].ravel()[positions] = weight
        layers.append(dense)
    return layers


def masked_layers(network):
    """Return the same of a MaskedNetwork."""
    layers = []
    stack = network.layers[0].weight.shape[:-2].numel()
    for n, (layer, target) in itertools.product(range(stack), zip(network.layers, network.target, strict=True)):
        moments = network.optimizer.state[layer.weight]
        tensors = (layer.weight, target.weight, moments["exp_avg"], moments["exp_avg_sq"])
        layers.append([tensor.detach().reshape(-1, *tensor.shape[-2:])[n].numpy() for tensor in tensors])
    return layers


class Pair:
    """The agent of a case by either engine, trained on the same batches."""

    ENGINES = (dst_td3.MaskedTD3, SparseTD3)

    def __init__(self, this):
        self.this = this
        (self.masked, self.masked_rng), (self.sparse, self.sparse_rng) = map(this.agent, self.ENGINES)

    @property
    def networks(self):
        """The networks of the sparse agent, each with that of the masked one."""
        return (self.sparse.actor, self.masked.actor), (self.sparse.critics, self.masked.critics)

    def train(self, steps):
        """Train both agents for the given steps."""
        self.this.train(self.masked, self.masked_rng, steps)
        self.this.train(self.sparse, self.sparse_rng, steps)

    def train_over_ten_adaptations(self):
        """Train for 300 steps, with an adaptation at each 30th, around which both agents must agree."""
        adaptations = 0
        for step in range(1, 301):
            before = self.sparse.critics.topologies()[0][0]
            self.train([step])
            adaptations += (before != self.sparse.critics.topologies()[0][0]).any()
            if step % 30 in (0, 1):
                self.assert_agree(rtol=1e-8, atol=1e-11)
        assert adaptations == 10
        self.assert_same_draws()

    def train_step_by_step(self):
        """Train for 13 steps, after each of which both agents must have the same topologies, and in the end agree."""
        for step in range(1, 14):
            self.train([step])
            self.assert_same_topologies()
        self.assert_agree(rtol=1e-6, atol=1e-9)
        self.assert_same_draws()

    def assert_same_draws(self):
        """Require that both agents have drawn the same random numbers."""
        assert self.masked_rng.bit_generator.state == self.sparse_rng.bit_generator.state

    def assert_same_topologies(self):
        """Require the same connections in all layers of both agents."""
        for ours, theirs in self.networks:
            for layer, expected in zip(ours.layer_arrays(), theirs.layer_arrays(), strict=True):
                np.testing.assert_array_equal(layer.mask, expected.mask)

    def assert_matrices_agree(self, **close):
        """Require weights, targets and moments that agree."""
        for ours, theirs in self.networks:
            for layer, expected in zip(sparse_layers(ours), masked_layers(theirs), strict=True):
                for array, expected_array in zip(layer, expected, strict=True):
                    np.testing.assert_allclose(array, expected_array, **close)

    def assert_agree(self, rtol, atol):
        """Require the same topologies, and weights, targets, moments, biases and losses that agree."""
        close = {"rtol": rtol, "atol": atol}
        self.assert_same_topologies()
        self.assert_matrices_agree(**close)
        for ours, theirs in self.networks:
            for layer, expected in zip(sparse_layers(ours), masked_layers(theirs), strict=True):
                np.testing.assert_array_equal(layer[1] != 0, expected[1] != 0)
            for index, (layer, expected) in enumerate(zip(ours.layer_arrays(), theirs.layer_arrays(), strict=True)):
                np.testing.assert_allclose(layer.bias, expected.bias, **close)
                target = ours.arrays.target[len(ours.arrays.input_index) :]
                biases = np.concatenate([target[b.rows] for b in ours.blocks[index :: len(theirs.layers)]])
                np.testing.assert_allclose(biases, theirs.target[index].bias.flatten().numpy(), **close)
        assert set(self.sparse.losses) == set(self.masked.losses)
        for name, loss in self.masked.losses.items():
            expected = pytest.approx(float(loss), rel=max(rtol, 1e-5), abs=max(atol, 1e-7))
            assert self.sparse.losses[name] == expected


@pytest.mark.parametrize("rule", ["magnitude", "contribution"])
def test_engines_agree_over_hundreds_of_updates(rule):
    pair = Pair(case(args=dataclasses.replace(DEFAULTS, adapt_interval=30, drop_by=rule), batch_size=37))
    pair.train_over_ten_adaptations()
    assert len(pair.sparse.critics.arrays.extra_weight) > 0


def test_engines_draw_the_same_dormant_units_anew():
    """Units 0 to 2 of each hidden layer have died, unit 3 still has a positive bias, and unit 4 one weight."""

    class Dormant(Case):
        def agent(self, engine):
            agent, rng = super().agent(engine)
            networks = [network.layer_arrays() for network in (agent.actor, agent.critics)]
            for layer in itertools.chain(*(layers[:-1] for layers in networks)):
                layer.bias[..., :3], layer.bias[..., 3] = -1e-20, 1e-20
                layer.weight[..., :5] *= 1e-9
                first = layer.mask[..., 4].argmax(-1)
                np.put_along_axis(layer.weight[..., 4], first[..., None], 0.1, -1)
            return engine(*networks, self.bounds, self.args), rng

    args = dataclasses.replace(DEFAULTS, method="static-td3", recycle_dormant=True, adapt_interval=2)
    pair = Pair(Dormant(**vars(case(args=args))))
    before = [network.layer_arrays() for network in (pair.sparse.actor, pair.sparse.critics)]
    for (sparse, masked), layers in zip(pair.networks, before, strict=True):
        sparse.arrays.first_moment[:] = sparse.arrays.second_moment[:] = 1
        for layer in masked.layers:
            for name in ("exp_avg", "exp_avg_sq"):
                masked.optimizer.state[layer.weight][name].copy_(layer.mask)
                masked.optimizer.state[layer.bias][name].fill_(1)
        generators = np.random.default_rng(3), np.random.default_rng(3)
        for network, rng in zip((sparse, masked), generators, strict=True):
            network.recycle(rng)
        for index, (old, new) in enumerate(zip(layers, sparse.layer_arrays(), strict=True)):
            drawn = new.weight != old.weight
            assert drawn[..., :3].sum() == old.mask[..., :3].sum() * (index < 2) and not drawn[..., 3:].any()
            assert (new.bias != old.bias).sum() == (3 * new.bias[..., 0].size if index < 2 else 0)
            bound = 1 / np.sqrt(new.weight.shape[-2])
            assert bound / 2 < np.abs(new.weight[drawn]).max(initial=bound) <= bound
            np.testing.assert_array_equal(new.mask, old.mask)
    pair.assert_matrices_agree(rtol=0, atol=0)
    pair.train(range(1, 8))
    pair.assert_agree(rtol=1e-8, atol=1e-11)
    pair.assert_same_draws()


def test_engines_agree_on_a_dense_agent():
    """Its hidden layers are matrices that BLAS multiplies, its output layers are not."""
    dense = dataclasses.replace(DEFAULTS, method="td3")
    pair = Pair(case(hidden=(40, 24), sparsity=0.0, args=dense, batch_size=37))
    assert pair.sparse.critics.arrays.full.tolist() == [True, True, False]
    pair.train(range(1, 61))
    pair.assert_agree(rtol=1e-8, atol=1e-11)


def test_engines_agree_where_only_some_layers_are_full():
    """What a full layer leaves in the padding of its rows must not reach the others."""
    this = Case([5, 40, 50, 40, 3], [8, 40, 50, 40, 1], [200, 900, 2000, 120], [320, 700, 2000, 40], batch_size=37)
    pair = Pair(this)
    assert pair.sparse.critics.arrays.full.tolist() == [True, False, True, False]
    pair.train(range(1, 31))
    pair.assert_agree(rtol=1e-8, atol=1e-11)


def python(program, *arguments, **options):
    """Run a program in a process of its own that imports the modules under test."""
    command, root = [sys.executable, "-c", program, *arguments], Path(sparse_engine.__file__).parent
    return subprocess.run(command, cwd=root, capture_output=True, text=True, **options)


def test_blas_keeps_to_one_thread():
    """In a process of its own, since a library that is loaded later than the limit is set would not be held to it."""
    program = """
import dst_td3, numpy, threadpoolctl
args = dst_td3.Arguments(env="Hopper-v4", method="td3", engine="sparse", device="cpu", hidden=(64, 64), batch_size=50)
run = dst_td3.Run(args, dst_td3.RunDirectory(args))
run.buffer.added = 100
run.agent.learn(run.buffer, 2, run.rng)
libraries = [pool for pool in threadpoolctl.threadpool_info() if pool["user_api"] == "blas"]
print(len(libraries), {pool["num_threads"] for pool in libraries})
"""
    done = python(program)
    assert done.returncode == 0 and done.stdout.split()[1:] == ["{1}"], done.stdout + done.stderr


# A processor, what it can do, and the bytes of its vectors.
FEATURES = {
    "AVX2": (
        "haswell",
        "+avx2,+avx,+fma,+bmi,+bmi2,+popcnt,+lzcnt,+f16c,+sse4.2,+sse4.1,+ssse3,+sse3,+sse2,+sse,+cx16",
        32,
    ),
    "no AVX": ("x86-64", "+sse2,+sse,+cx16,+fxsr,+mmx", 16),
}


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the features are those of x86-64")
@pytest.mark.parametrize("features", FEATURES)
def test_engines_agree_on_processors_with_less(features, tmp_path):
    """The kernels compiled for shorter vectors than this machine may have."""
    name, flags, vector_bytes = FEATURES[features]
    compiled_for = {"NUMBA_CPU_NAME": name, "NUMBA_CPU_FEATURES": flags, "NUMBA_CACHE_DIR": str(tmp_path)}
    program = """
import sys, pytest, sparse_engine
print("vectors of", sparse_engine.VECTOR_BYTES, flush=True)
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", *sys.argv[1:]]))
"""
    chosen = "hundreds_of_updates or some_layers_are_full"
    done = python(program, __file__, "-k", chosen, env=os.environ | compiled_for)
    assert done.returncode == 0 and "3 passed" in done.stdout, done.stdout[-3000:]
    assert done.stdout.startswith(f"vectors of {vector_bytes}\n")


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(cases())
def test_engines_agree_whatever_the_networks(this):
    Pair(this).train_step_by_step()


@pytest.mark.parametrize("batch_size", [1, 7, 16, 100, 128, 250])
def test_engines_agree_in_float32(batch_size):
    args = dataclasses.replace(DEFAULTS, adapt_interval=12)
    pair = Pair(case(dtype=np.float32, batch_size=batch_size, args=args))
    pair.train(range(1, 15))
    pair.assert_same_topologies()
    pair.assert_matrices_agree(rtol=1e-3, atol=2e-5)


def trained(this, engine):
    """Return the bytes of an agent's state after 30 steps."""
    agent, rng = this.agent(engine)
    this.train(agent, rng, range(1, 31))
    return bytes_of(agent)


def test_a_second_thread_changes_no_bit():
    one, two = (case(args=dataclasses.replace(DEFAULTS, threads=threads), dtype=np.float32) for threads in (1, 2))
    assert trained(one, SparseTD3) == trained(two, SparseTD3)


def test_the_batch_size_may_change():
    small, large = case(batch_size=3), case(batch_size=290)
    pair = Pair(small)
    for this, steps in ((small, range(1, 4)), (large, range(4, 7)), (small, range(7, 10))):
        pair.this = this
        pair.train(steps)
    pair.assert_agree(rtol=1e-8, atol=1e-11)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 70), min_size=1, max_size=3), st.integers(1, 20), st.integers(1, 6))
def test_engines_act_alike(hidden, observations, actions):
    this = case(hidden, 0.0, observations, actions, dtype=np.float32)
    masked, sparse = this.agent(dst_td3.MaskedTD3)[0], this.agent(SparseTD3)[0]
    observation = np.random.default_rng(0).standard_normal(observations)
    action = sparse.act(observation)
    assert action.dtype == np.float32 and action.shape == (actions,)
    np.testing.assert_allclose(action, masked.act(observation), atol=1e-5)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.data())
def test_prune_target_keeps_the_largest(data):
    magnitudes = st.sampled_from([0.0, 1e-30, 0.25, 0.5, 1.0, 2.0]) | st.floats(0, 4, width=32)
    weights = st.lists(st.builds(math.copysign, magnitudes, st.sampled_from([-1.0, 1.0])), min_size=1, max_size=30)
    own, extras = (np.array(data.draw(weights), dtype=np.float32) for _ in range(2))
    extras = extras[: len(own)]
    before = np.concatenate([own, extras])
    prune_target(own.view(np.int32), extras.view(np.int32), data.draw(st.integers(0, 2**31 - 2)))
    after = np.concatenate([own, extras])
    np.testing.assert_array_equal(after[after != 0], before[after != 0])
    np.testing.assert_array_equal(np.sort(np.abs(after))[-len(own) :], np.sort(np.abs(before))[-len(own) :])
    assert np.count_nonzero(after) <= len(own)


def saved(agent):
    """Return an agent's state after a trip to a file."""
    file = io.BytesIO()
    np.savez(file, **agent.state())
    file.seek(0)
    with np.load(file, allow_pickle=False) as stored:
        return dict(stored)


def bytes_of(agent):
    return {name: array.tobytes() for name, array in agent.state().items()}


def loaded(this, engine, steps):
    """Return an agent after ``steps`` and one that has loaded its state, each with its generator."""
    first, rng = this.agent(engine)
    this.train(first, rng, steps)
    second, other_rng = this.agent(engine)
    second.load_state(saved(first))
    other_rng.bit_generator.state = rng.bit_generator.state
    return (first, rng), (second, other_rng)


def test_a_loaded_agent_goes_on_to_the_same_bytes():
    this = case(dtype=np.float32)
    (first, rng), (second, other_rng) = loaded(this, SparseTD3, range(1, 28))
    assert len(first.critics.arrays.extra_weight) > 0
    this.train(first, rng, range(28, 60))
    this.train(second, other_rng, range(28, 60))
    assert bytes_of(first) == bytes_of(second)
    for ours, theirs in ((first.actor, second.actor), (first.critics, second.critics)):
        for masks, expected_masks in zip(ours.topologies(), theirs.topologies(), strict=True):
            np.testing.assert_array_equal(masks, expected_masks)


def test_a_state_fits_another_layout_in_memory(monkeypatch):
    """A machine with other caches cuts layers into other bands of inputs."""
    this = case(hidden=(300, 129), sparsity=0.3)
    first, rng = this.agent(SparseTD3)
    this.train(first, rng, range(1, 12))
    monkeypatch.setattr(sparse_engine, "BAND_INPUTS", 10)
    second, _ = this.agent(SparseTD3)
    assert list(second.critics.arrays.bands) != list(first.critics.arrays.bands)
    second.load_state(saved(first))
    assert bytes_of(second) == bytes_of(first)
    other_rng = np.random.default_rng()
    other_rng.bit_generator.state = rng.bit_generator.state
    this.train(first, rng, range(12, 20))
    this.train(second, other_rng, range(12, 20))
    for ours, theirs in ((first.actor, second.actor), (first.critics, second.critics)):
        for layer, expected in zip(ours.layer_arrays(), theirs.layer_arrays(), strict=True):
            np.testing.assert_array_equal(layer.mask, expected.mask)
            np.testing.assert_allclose(layer.weight, expected.weight, rtol=1e-8, atol=1e-11)


def test_topologies_are_the_present_and_the_first_mask():
    pair = Pair(case())
    pair.train(range(1, 20))
    for ours, theirs in pair.networks:
        for masks, expected in zip(ours.topologies(), theirs.topologies(), strict=True):
            np.testing.assert_array_equal(masks, expected)


FOREIGN = {
    "other widths": lambda: case(hidden=(20, 24)),
    "another depth": lambda: case(hidden=(24, 20, 5)),
    "another sparsity": lambda: case(sparsity=0.5),
    "another type": lambda: case(dtype=np.float32),
}


@pytest.mark.parametrize("other", FOREIGN)
def test_another_networks_state_is_rejected(other):
    state = FOREIGN[other]().agent(SparseTD3)[0].actor.state()
    with pytest.raises((KeyError, ValueError)):
        case().agent(SparseTD3)[0].actor.load_state(state)


def test_a_masked_networks_state_is_rejected():
    with pytest.raises(KeyError):
        case().agent(SparseTD3)[0].actor.load_state(case().agent(dst_td3.MaskedTD3)[0].actor.state())


@pytest.mark.parametrize("name", ["topology", "extra_topology", "extra_ends", "sizes"])
def test_a_damaged_topology_is_rejected(name):
    this = case()
    agent, rng = this.agent(SparseTD3)
    this.train(agent, rng, range(1, 10))
    state = {key: array.copy() for key, array in agent.critics.state().items()}
    state[name][len(state[name]) // 2] = 60_000
    with pytest.raises(ValueError):
        agent.critics.load_state(state)


def test_a_policy_of_either_engine_loads_alike(tmp_path):
    this = case(dtype=np.float32)
    observation = np.random.default_rng(0).standard_normal(OBSERVATIONS)
    for engine in (dst_td3.MaskedTD3, SparseTD3):
        agent, rng = this.agent(engine)
        this.train(agent, rng, range(1, 12))
        path = tmp_path / f"{engine.__name__}.npz"
        dst_td3.save_policy(path, agent.actor.layer_arrays(), this.bounds, "Hopper-v4")
        loaded = dst_td3.load_policy(path, "Hopper-v4")
        np.testing.assert_allclose(loaded(observation), agent.act(observation), atol=1e-6)
    files = [dict(np.load(tmp_path / f"{engine.__name__}.npz")) for engine in (dst_td3.MaskedTD3, SparseTD3)]
    assert {n: (a.shape, a.dtype) for n, a in files[0].items()} == {n: (a.shape, a.dtype) for n, a in files[1].items()}


def arrays_in(value):
    """Yield all numpy arrays that an object holds, however deep."""
    if isinstance(value, np.ndarray):
        yield value
    elif isinstance(value, dict):
        yield from itertools.chain.from_iterable(map(arrays_in, value.values()))
    elif isinstance(value, list | tuple):
        yield from itertools.chain.from_iterable(map(arrays_in, value))
    elif hasattr(value, "__dict__"):
        yield from arrays_in(vars(value))


def test_nothing_is_as_large_as_a_dense_matrix():
    this = case(hidden=(600, 600), sparsity=0.99, batch_size=4, dtype=np.float32)
    agent, rng = this.agent(SparseTD3)
    this.train(agent, rng, range(1, 8))
    tracemalloc.start()
    this.train(agent, rng, range(8, 10))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    dense = 600 * 600
    assert all(array.size < dense / 5 for array in arrays_in(agent))
    assert peak < dense * 4 / 2


def test_a_diverged_network_shows():
    this = case(dtype=np.float32)
    agent, rng = this.agent(SparseTD3)
    agent.actor.arrays.parameters[0] = np.nan
    agent.args = dataclasses.replace(agent.args, batch_size=this.batch_size)
    assert np.isnan(agent.act(this.buffer.sample(1, rng).observation[0])).any()
    agent.update_actor(agent.sample(this.buffer, rng))
    assert math.isnan(agent.losses["actor_loss"])
