"""RLx2's recipe on our engines (arXiv 2205.15043): gradient growth, targets of three steps, a buffer that forgets.

Settings are those of its code. These sparsities of the hidden layers leave as many connections there as its rule:

    python examples/rlx2.py --env HalfCheetah-v4 --sparsity 0.92 --critic-sparsity 0.853
    python examples/rlx2.py --env Hopper-v4 --sparsity 0.985 --critic-sparsity 0.953
    python examples/rlx2.py --env Walker2d-v4 --sparsity 0.977 --critic-sparsity 0.953
    python examples/rlx2.py --env Ant-v4 --sparsity 0.969 --critic-sparsity 0.883

It runs for three million steps, and this for one. Some things differ. Our output layers are dense, and its actors' are
sparse too. Transitions of the first tenth keep targets of one step. Our targets are pruned by magnitude, and its take
over the network's topology at once. Its adaptation takes the place of an update, keeps Adam's moments, and leaves a
connection that is dropped and grown at once its weight. Its buffer compares the actions before exploration noise.
"""

import dataclasses
import math
import sys
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.random import Generator

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))  # where a campaign imports this file
from rigl import gradient_magnitudes

from dst_td3 import TD3, Arguments, Layer, MaskedEngine, ReplayBuffer, initial_values, main, policy
from high_sparsity import HighSparsityArguments, MultiStepBuffer

COMPARED = 2048  # oldest transitions whose actions are compared with the policy's
DISTANCE = 0.2  # beyond which they are forgotten: half the mean square of the difference, of actions in [-1, 1]
FEWEST = 100_000  # transitions that are never forgotten


class ForgettingBuffer(MultiStepBuffer):
    """A buffer that draws from its transitions since the one numbered ``oldest``.

    Targets have one step for the first ``after`` transitions, then ``steps``.
    """

    def __init__(self, capacity: int, observations: int, actions: int, steps: int, gamma: float, after: int):
        super().__init__(capacity, observations, actions, 1, gamma)
        self.later_steps, self.after, self.oldest = steps, after, 0

    @property
    def first(self) -> int:
        """Number of the oldest transition that is there and not forgotten."""
        return max(self.oldest, self.added - len(self.rows))

    def add(self, transition, ended: bool) -> None:
        """Store a transition, as ``MultiStepBuffer`` does."""
        self.steps = self.later_steps if self.added >= self.after else 1
        super().add(transition, ended)

    def draw(self, batch_size: int, rng: Generator) -> np.ndarray:
        """Draw the indices [batch] of a batch uniformly, with replacement."""
        return (self.first + rng.integers(self.added - self.first, size=batch_size)) % len(self.rows)


class RLx2TD3(TD3):
    """TD3 with RLx2's adaptation, by magnitude and gradient, and its buffer."""

    def __init__(self, engine, bounds: tuple[np.ndarray, np.ndarray], args: "RLx2Arguments"):
        super().__init__(engine, bounds, args)
        self.oldest = np.zeros((), np.int64)  # number of the oldest transition that is not forgotten

    def learn(self, buffer: ForgettingBuffer, step: int, rng: Generator) -> None:
        """Learn from one environment step; what is dropped shrinks along a cosine, from ``drop_fraction`` to none."""
        self.step, args, buffer.oldest = step, self.args, int(self.oldest)
        if args.forgets and step % args.adapt_interval == 0:
            self.forget(buffer)
        progress = (step - args.learning_starts) / (args.total_timesteps - args.learning_starts)
        for network in self.networks.values():
            network.drop_fraction = args.drop_fraction / 2 * (1 + math.cos(math.pi * progress))
        super().learn(buffer, step, rng)

    def forget(self, buffer: ForgettingBuffer) -> None:
        """Forget the oldest tenth of the transitions where the policy has moved on."""
        kept = buffer.added - buffer.first
        batch = buffer.batch((buffer.first + np.arange(min(COMPARED, kept))) % len(buffer.rows))
        low, high = map(torch.from_numpy, self.bounds)
        layers = [Layer(*map(torch.from_numpy, layer)) for layer in self.policy_layers()]
        difference = policy(layers, torch.from_numpy(batch.observation), low, high) - torch.from_numpy(batch.action)
        distance = float((difference / (high - low) * 2).square().mean() / 2)
        if distance > DISTANCE and kept > FEWEST:
            buffer.oldest = buffer.first + kept // 10
            self.oldest[...] = buffer.oldest

    def adapt(self, network, buffer: ReplayBuffer, rng: Generator) -> None:
        """Adapt a network; RLx2 counts the actor's own updates, which are half as many."""
        if network is not self.engine.actor or self.step // self.args.adapt_interval % self.args.policy_frequency == 0:
            super().adapt(network, buffer, rng)

    def scores(self, network, buffer: ReplayBuffer, rng: Generator) -> tuple[list, list]:
        """Drop the smallest magnitudes, whatever their sign, and grow the largest gradients."""
        magnitudes = [np.abs(weight) for weight, _, _ in network.layer_arrays()[:-1]]
        return magnitudes, gradient_magnitudes(self, network, buffer, rng)

    def state_dict(self) -> dict[str, np.ndarray]:
        """Return everything that training changes, as numpy arrays by name."""
        return super().state_dict() | {"oldest": self.oldest}

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        """Take over what ``state_dict`` returned. Raises KeyError or ValueError when it belongs to another agent."""
        super().load_state_dict(state)
        self.oldest[...] = state["oldest"]


@dataclasses.dataclass(frozen=True)
class RLx2Arguments(HighSparsityArguments):
    """Train TD3 by RLx2's recipe. Defaults are the settings of its code."""

    adapt_interval: int = 10_000  # steps between two adaptations of the critics, and two checks of the buffer
    drop_fraction: float = 0.5  # fraction of a layer's connections that the first adaptation replaces
    adapt_until: float = 1.0  # fraction of the run after which the topology stays as it is
    batch_size: int = 256  # transitions in a batch
    learning_rate: float = 3e-4  # Adam's learning rate, actor and critics
    weight_decay: float = 0  # L2 penalty, actor and critics
    drop_by: Literal["magnitude"] = "magnitude"
    """drop the smallest weights"""
    recycle_dormant: Literal[False] = False  # no part of RLx2
    layer_norm: Literal[False] = False  # no part of RLx2
    updates_per_step: int = 1  # update-to-data ratio: critic updates after each environment step
    step_exponent: Literal[0.0] = 0.0  # all layers learn at the learning rate
    n_step: int = 3
    """steps whose rewards a target value adds up, from a tenth of the run on"""
    forgets: bool = True  # forget old transitions once the policy has moved on

    def papers(self) -> "RLx2Arguments":
        """Return the setting of the paper of DS-TD3, so that a run's name says what differs from it."""
        papers = {field.name: field.default for field in dataclasses.fields(Arguments)}
        papers |= {"n_step": 1, "forgets": False, "env": self.env, "method": self.method}
        return type(self)(**papers)

    def make_buffer(self, observations: int, actions: int) -> ReplayBuffer:
        """Return the replay buffer of a run, for so many numbers in each."""
        after = self.total_timesteps // 10
        return ForgettingBuffer(self.buffer_capacity, observations, actions, self.n_step, self.gamma, after)

    def make_agent(self, actor: list[Layer], critics: list[Layer], bounds: tuple) -> TD3:
        """Return the agent to train, whose first connections are the largest weights of a dense network."""
        rng = np.random.default_rng(self.seed)
        actor, critics = ([keep_largest(layer, rng) for layer in layers] for layers in (actor, critics))
        return RLx2TD3(self.make_engine(actor, critics, bounds, MaskedEngine), bounds, self)


def keep_largest(layer: Layer, rng: Generator) -> Layer:
    """Draw a layer anew, with as many connections, where the weights of a dense one are the largest."""
    weight = initial_values(layer.weight.shape[-2], layer.weight.shape, rng).astype(layer.weight.dtype)
    flat = weight.reshape(-1, weight.shape[-2] * weight.shape[-1])
    mask, connections = np.zeros(flat.shape, np.float32), int(layer.mask.sum()) // len(flat)
    np.put_along_axis(mask, np.abs(flat).argsort(axis=-1)[:, flat.shape[1] - connections :], 1, axis=-1)
    mask = mask.reshape(weight.shape)
    return Layer(weight * mask, mask, layer.bias)


if __name__ == "__main__":
    sys.exit(main(RLx2Arguments))
