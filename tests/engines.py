"""What several test files share about engines: agents to build by either, what they train on, how they are compared."""

import dataclasses
import functools
import io
import itertools

import numpy as np
import pytest
import torch
from hypothesis import strategies as st

import dst_td3
from dst_sac import SACArguments
from dst_td3 import TD3, Arguments, Layer, ReplayBuffer
from high_sparsity import HighSparsityArguments

OBSERVATIONS, ACTIONS = 5, 3
DEFAULTS = Arguments(adapt_interval=8, drop_fraction=0.2, tau=0.05)
SAC_DEFAULTS = SACArguments(adapt_interval=8, drop_fraction=0.2, target_interval=5)


# --- Agents -----------------------------------------------------------------------------------------------------------
@dataclasses.dataclass
class Case:
    """An agent to build by either engine, and the batches to train it on."""

    actor: list[int]
    critic: list[int]
    actor_connections: list[int]
    critic_connections: list[int]
    args: Arguments = DEFAULTS
    batch_size: int = 8  # kernels are compiled for each width of a batch: a few of these serve all tests
    dtype: type = np.float64
    seed: int = 0

    def layers(self):
        """Return the first layers of actor and critics, and the generator that drew them and goes on to be used."""
        rng = np.random.default_rng(self.seed)
        actor = dst_td3.initial_layers(self.actor, self.actor_connections, rng)
        critics = dst_td3.initial_layers(self.critic, self.critic_connections, rng, networks=(2,))
        typed = [
            [Layer(weight.astype(self.dtype), mask, bias.astype(self.dtype)) for weight, mask, bias in network]
            for network in (actor, critics)
        ]
        return typed, rng

    def agent(self, engine):
        """Build an agent on an engine, and the generator that places its grown connections."""
        networks, rng = self.layers()
        args = dataclasses.replace(self.args, engine=engine, batch_size=self.batch_size)
        return args.make_agent(*networks, self.bounds), rng

    @property
    def bounds(self):
        """Bounds of the actions, lopsided so that both the middle and the range of them matter."""
        return -np.full(self.actor[-1], 0.5, self.dtype), np.linspace(0.4, 1, self.actor[-1]).astype(self.dtype)

    @functools.cached_property
    def buffer(self):
        """A replay buffer of random transitions, in the type of the case."""
        return random_buffer(np.random.default_rng(self.seed), 400, self.actor[0], self.actor[-1], self.dtype)

    def train(self, agent, rng, steps):
        """Train an agent for the given steps."""
        for step in steps:
            agent.learn(self.buffer, step, rng)


def case(hidden=(24, 20), sparsity=0.6, observations=OBSERVATIONS, actions=ACTIONS, **rest):
    """Return a case of the given widths and sparsity."""
    actor, critic = [observations, *hidden, actions], [observations + actions, *hidden, 1]
    counts = (dst_td3.count_connections(sizes, sparsity) for sizes in (actor, critic))
    return Case(actor, critic, *counts, **rest)


@st.composite
def cases(draw, kind=Arguments):
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
    options = dict(
        adapt_interval=draw(st.integers(2, 6)),
        drop_fraction=draw(st.sampled_from([0, 0.05, 0.3, 1])),
        tau=draw(st.sampled_from([0.005, 0.3, 1])),
        policy_frequency=draw(st.integers(1, 3)),
        weight_decay=draw(st.sampled_from([0, 2e-4, 0.1])),
        updates_per_step=draw(st.integers(1, 3)),
    )
    if kind is HighSparsityArguments:
        options |= dict(
            step_exponent=draw(st.sampled_from([0, 0.5, 1])),
            recycle_dormant=draw(st.booleans()),
            drop_by=draw(st.sampled_from(["magnitude", "contribution"])),
            layer_norm=draw(st.booleans()),
        )
    batch_size = draw(st.integers(5, 8) | st.integers(37, 40) | st.integers(129, 132))  # in few widths of tiles
    return Case(*sizes, *counts, kind(**options), batch_size, seed=draw(st.integers(0, 1000)))


class SACCase(Case):
    """A SAC agent, whose actor has a mean and a deviation for each action."""

    def layers(self):
        """Return the first layers of actor and critics, and the generator that drew them and goes on to be used."""
        widths, counts = ([*n[:-1], 2 * n[-1]] for n in (self.actor, self.actor_connections))
        return Case.layers(dataclasses.replace(self, actor=widths, actor_connections=counts))


def as_sac(this: Case, **changes) -> SACCase:
    """Return the case for SAC, with the settings of its arguments that SAC has too."""
    fields = {field.name: getattr(this, field.name) for field in dataclasses.fields(this)}
    names = ("adapt_interval", "drop_fraction", "updates_per_step", "weight_decay")
    own = {name: getattr(this.args, name) for name in names}
    return SACCase(**fields | {"args": dataclasses.replace(SAC_DEFAULTS, **own | changes)})


def sac_case(hidden=(24, 20), sparsity=0.6, arguments=None, **rest) -> SACCase:
    """Return a case of the given widths and sparsity."""
    return as_sac(case(hidden, sparsity, **rest), **arguments or {})


def make_agent(kind: type[Arguments] = Arguments, **arguments) -> TD3:
    """Return an agent on the masked engine, with small networks, in float32 as in a run."""
    defaults = {"hidden": (16, 12), "batch_size": 8, "adapt_interval": 4, "total_timesteps": 1000}
    args = kind(**(defaults | arguments))
    this = case(args.hidden, args.sparsity, args=args, batch_size=args.batch_size, dtype=np.float32, seed=args.seed)
    return this.agent("masked")[0]


# --- Training and states ----------------------------------------------------------------------------------------------
def random_buffer(rng, size=50, observations=OBSERVATIONS, actions=ACTIONS, dtype=np.float32) -> ReplayBuffer:
    """Return a replay buffer full of random transitions, some of which end an episode."""
    buffer = ReplayBuffer(size, observations, actions)
    buffer.rows = rng.standard_normal(buffer.rows.shape).astype(dtype)
    buffer.rows[:, observations : observations + actions] /= 4
    buffer.rows[:, -1] = buffer.rows[:, -1] > 1
    buffer.added = size
    return buffer


def train(agent: TD3, steps: range, seed: int = 1) -> None:
    """Train an agent for the given steps, on random transitions."""
    rng = np.random.default_rng(seed)
    buffer = random_buffer(rng)
    for step in steps:
        agent.learn(buffer, step, rng)


def moments(network, layer: Layer) -> list[torch.Tensor]:
    """Return Adam's moments of a layer's weights, of a MaskedNetwork."""
    return [network.optimizer.state[layer.weight][name] for name in ("exp_avg", "exp_avg_sq")]


def sparse_layers(network):
    """Return weight, target, first and second moment of each layer of each network of a SparseNetwork, dense."""
    state, layers, start = network.state_dict(), [], 0
    own, target = ([*map(each_network, network.layer_arrays(target))] for target in (False, True))
    for n, layer in itertools.product(range(len(own[0][0])), range(len(own))):
        weight, mask, target_weight, target_mask = (a[n] for part in (own, target) for a in part[layer][:2])
        assert not weight[mask == 0].any() and not target_weight[target_mask == 0].any()
        end, moments = start + np.count_nonzero(mask), []
        for name in ("first_moment", "second_moment"):
            moments.append(np.zeros_like(weight))
            moments[-1][mask == 1] = state[name][start:end]
        layers.append([weight, target_weight, *moments])
        start = end
    return layers


def each_network(layer):
    """Return the arrays of a layer with a single leading axis, that of the stacked networks."""
    return [array.reshape(-1, *array.shape[-2:]) for array in layer]


def masked_layers(network):
    """Return the same of a MaskedNetwork."""
    layers = []
    stack = network.layers[0].weight.shape[:-2].numel()
    for n, (layer, target) in itertools.product(range(stack), zip(network.layers, network.target, strict=True)):
        tensors = (layer.weight, target.weight, *moments(network, layer))
        layers.append([tensor.detach().reshape(-1, *tensor.shape[-2:])[n].numpy() for tensor in tensors])
    return layers


def saved(agent):
    """Return an agent's state after a trip to a file."""
    file = io.BytesIO()
    np.savez(file, **agent.state_dict())
    file.seek(0)
    with np.load(file, allow_pickle=False) as stored:
        return dict(stored)


def bytes_of(agent):
    """Return the bytes of all arrays of an agent's state, by name."""
    return {name: array.tobytes() for name, array in agent.state_dict().items()}


def loaded(this, engine, steps):
    """Return an agent after ``steps`` and one that has loaded its state, each with its generator."""
    first, rng = this.agent(engine)
    this.train(first, rng, steps)
    second, other_rng = this.agent(engine)
    second.load_state_dict(saved(first))
    other_rng.bit_generator.state = rng.bit_generator.state
    return (first, rng), (second, other_rng)


# --- Comparisons ------------------------------------------------------------------------------------------------------
class Pair:
    """The agent of a case by either engine, trained on the same batches."""

    def __init__(self, this):
        self.this = this
        (self.masked, self.masked_rng), (self.sparse, self.sparse_rng) = map(this.agent, ("masked", "sparse"))

    @property
    def networks(self):
        """The networks of the sparse agent, each with that of the masked one."""
        return [*zip(self.sparse.networks.values(), self.masked.networks.values(), strict=True)]

    def train(self, steps):
        """Train both agents for the given steps."""
        self.this.train(self.masked, self.masked_rng, steps)
        self.this.train(self.sparse, self.sparse_rng, steps)

    def train_over_ten_adaptations(self):
        """Train for 300 steps, with an adaptation at each 30th, around which both agents must agree."""
        adaptations = 0
        for step in range(1, 301):
            before = self.sparse.engine.critics.layer_arrays()[0][1]
            self.train([step])
            adaptations += (before != self.sparse.engine.critics.layer_arrays()[0][1]).any()
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
                np.testing.assert_array_equal(layer[1], expected.mask)

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
            for target in (False, True):
                pairs = zip(ours.layer_arrays(target), theirs.layer_arrays(target), strict=True)
                for (_, _, bias), expected in pairs:
                    np.testing.assert_allclose(bias, expected.bias, **close)
        assert set(self.sparse.losses) == set(self.masked.losses)
        for name, loss in self.masked.losses.items():
            expected = pytest.approx(float(loss), rel=max(rtol, 1e-5), abs=max(atol, 1e-7))
            assert self.sparse.losses[name] == expected


def torch_module(layers: list[Layer], index=...) -> torch.nn.Sequential:
    """Return torch's own network with the weights of one of ours, which is number ``index`` where they are stacked."""
    parts = []
    for layer in layers:
        weight, bias = (torch.as_tensor(array)[index].detach() for array in (layer.weight, layer.bias))
        linear = torch.nn.Linear(*weight.shape, dtype=weight.dtype)
        linear.weight.data, linear.bias.data = weight.T.clone(), bias[0].clone()
        parts += [linear, torch.nn.ReLU()]
    return torch.nn.Sequential(*parts[:-1])


def assert_same_parameters(network: torch.nn.Sequential, expected: torch.nn.Sequential, **close: float) -> None:
    """Require that two networks have the same parameters, as close as torch's ``assert_close`` is told."""
    for ours, theirs in zip(network.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, **close)
