"""Agents at sparsity 0.9 and above, which the paper does not cover: a variant of DS-TD3.

``python high_sparsity.py --env Walker2d-v4 --sparsity 0.9`` trains with the first five; each part is an argument.

1. A sparse layer's weights take larger steps: Adam's, times density ** -0.5. A unit with a tenth of the inputs moves a
   tenth as far in one step of the same size (with exponent 1 it is SμPar, arXiv 2405.15743).
2. Two updates a step.
3. Connections are dropped by contribution, their weight times the standard deviation of their input. A velocity that
   reaches ten moves a unit by a small weight as far as an angle does by a large one: magnitude alone takes its
   connections away. After Wanda (arXiv 2306.11695), which measures by the norm.
4. Dormant units are drawn anew (ReDo, arXiv 2302.12902): a unit that nothing activates has no gradient, weight decay
   takes its weights to zero, and connections grown into it stay there.
5. Targets of three steps on Walker2d: their rewards, then what the target critics say (arXiv 1710.02298).
6. Layer normalization in the critics (``--layer-norm``), before the ReLU of their hidden layers (arXiv 1607.06450).
7. An actor and critics of different sparsities (``--actor-sparsity``, ``--critic-sparsity``; arXiv 2205.15043).

``docs/high-sparsity.md`` says what the parts are worth, so far as they were tried.
"""

import collections
import dataclasses
import sys
from collections.abc import Callable
from typing import ClassVar, Literal

import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor
from torch.nn.functional import layer_norm

from dst_td3 import (
    TD3,
    Arguments,
    Batch,
    InputError,
    Layer,
    MaskedEngine,
    MaskedNetwork,
    ReplayBuffer,
    forward,
    initial_values,
    main,
)

DORMANT = 1e-6  # magnitude below which all incoming weights of a unit together show that it has died
CONTRIBUTION_SAMPLES = 1000  # transitions over which contributions are measured; a batch of 100 gained less on Ant


# --- Arguments --------------------------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class HighSparsityArguments(Arguments):
    """Train a TD3 agent at high sparsity. Defaults are the recipe; the other arguments are those of dst_td3.py."""

    drop_by: Literal["magnitude", "contribution"] | None = None
    """drop the smallest weights, as the paper, or the smallest products of weight and its input's standard deviation
    (default: contribution, where the method drops anything)"""
    recycle_dormant: bool = True  # draw hidden units anew that have died, when an adaptation is due (ReDo)
    updates_per_step: int = 2  # update-to-data ratio: critic updates after each environment step
    step_exponent: float = 0.5  # a sparse layer learns at density ** -step_exponent times the learning rate
    n_step: int | None = None
    """steps whose rewards a target value adds up before it asks the target critics (default: 3 on Walker2d, else 1)"""
    layer_norm: bool = False  # normalize the outputs of the critics' hidden layers before their ReLU
    actor_sparsity: float | None = None  # beside --sparsity: another one for the actor
    critic_sparsity: float | None = None  # beside --sparsity: another one for the critics

    # The one setting that differs between tasks: three steps cost Ant return.
    N_STEP: ClassVar = {"Walker2d-v4": 3, "Walker2d-v5": 3}

    def __post_init__(self):
        super().__post_init__()
        if self.n_step is None:
            object.__setattr__(self, "n_step", self.N_STEP.get(self.env, 1))
        if self.drop_by is None:
            object.__setattr__(self, "drop_by", "contribution" if self.adapts else "magnitude")

    @property
    def sparsities(self) -> tuple[float | None, float | None]:
        """Sparsities of the actor's and of each critic's hidden layers."""
        own = self.actor_sparsity, self.critic_sparsity
        return tuple(self.sparsity if sparsity is None else sparsity for sparsity in own)

    def papers(self) -> "HighSparsityArguments":
        """Return the paper's setting of this environment and method; a run's name says what differs from it."""
        papers = {"drop_by": "magnitude", "recycle_dormant": False, "updates_per_step": 1, "step_exponent": 0.0}
        return type(self)(env=self.env, method=self.method, n_step=1, **papers)

    def validate(self) -> None:
        """Raise InputError for the first argument that no run can use."""
        super().validate()
        self.require(0 <= self.step_exponent <= 1, "step_exponent", "between 0 and 1")
        most = min(self.learning_starts + 1, max(1, self.buffer_size // 2))
        bounds = "--learning-starts + 1 and half of --buffer-size"
        self.require(self.n_step > 0, "n_step", "a positive whole number")
        self.require(self.n_step <= most, "n_step", f"at most {most} ({bounds})")
        for name in ("actor_sparsity", "critic_sparsity"):
            self.require(0 <= (getattr(self, name) or 0) < 1, name, "at least 0 and below 1")
            if getattr(self, name) is not None and self.sparsity is None:
                advice = f"leave it out: {self.method} is dense" if self.dense else "give that instead of --er-lambda"
                raise InputError(f"--{name.replace('_', '-')} changes --sparsity for one network: {advice}")
        if self.recycle_dormant and not self.weight_decay:
            raise InputError("--weight-decay must be positive with --recycle-dormant: decay shows that a unit is dead")
        if self.drop_by == "contribution" and not self.adapts:
            raise InputError(f"--drop-by contribution needs a method that drops connections, not {self.method}")

    def make_buffer(self, observations: int, actions: int) -> ReplayBuffer:
        """Return the replay buffer of a run, for so many numbers in each."""
        return MultiStepBuffer(self.buffer_capacity, observations, actions, self.n_step, self.gamma)

    def make_agent(self, actor: list[Layer], critics: list[Layer], bounds: tuple) -> TD3:
        """Return the agent to train."""
        engine = self.make_engine(actor, critics, bounds, HighSparsityMaskedEngine, normalized_critics=self.layer_norm)
        return HighSparsityTD3(engine, bounds, self)


# --- Multi-step targets -----------------------------------------------------------------------------------------------
class MultiStepBuffer(ReplayBuffer):
    """A replay buffer of transitions over so many ``steps``, or as many as are left in the episode.

    A row has the discounted sum of their rewards and the observation after them. An engine discounts the value of that
    by ``gamma * (1 - terminated)``: what stands for ``terminated`` makes this gamma ** steps, or 0 at a real end.
    """

    def __init__(self, capacity: int, observations: int, actions: int, steps: int, gamma: float):
        super().__init__(capacity, observations, actions)
        self.steps, self.gamma = steps, gamma
        self.recent: collections.deque[Batch] = collections.deque()  # transitions that wait for the next ones

    def add(self, transition: Batch, ended: bool) -> None:
        """Take a transition, and store what is complete by it: everything when its episode has ``ended``."""
        self.recent.append(transition)
        while len(self.recent) == self.steps or (ended and self.recent):
            first, last = self.recent[0], self.recent[-1]
            reward = sum(self.gamma**k * later.reward[0] for k, later in enumerate(self.recent))
            terminated = 1 if last.terminated[0] else 1 - self.gamma ** (len(self.recent) - 1)
            summed = Batch(first.observation, first.action, [reward], last.next_observation, [terminated])
            super().add(summed, ended)
            self.recent.popleft()


# --- Agent ------------------------------------------------------------------------------------------------------------
class HighSparsityTD3(TD3):
    """TD3 with the recipe, on an engine whose networks do what ``HighSparsityNetwork`` does."""

    def __init__(self, engine, bounds: tuple[np.ndarray, np.ndarray], args: HighSparsityArguments):
        super().__init__(engine, bounds, args)
        for network in self.networks.values():
            layers = network.layer_arrays()
            network.scale_steps([float(mask.sum() / mask.size) ** -args.step_exponent for _, mask, _ in layers])
            if args.drop_by == "contribution" and args.adapts:  # so that kernels are compiled before training begins
                weight = layers[0][0]
                network.contributions(np.zeros((CONTRIBUTION_SAMPLES, weight.shape[-2]), weight.dtype))

    def adapt(self, network, buffer: ReplayBuffer, rng: Generator) -> None:
        """Adapt the topology of a network, then draw its dormant units anew."""
        super().adapt(network, buffer, rng)
        if self.args.recycle_dormant:
            network.redraw_dormant(rng, initial_values, DORMANT)

    def scores(self, network, buffer: ReplayBuffer, rng: Generator) -> tuple[list | None, list | None]:
        """Return each connection's contribution as its drop score, and no growth scores."""
        if self.args.drop_by == "magnitude":
            return None, None
        return network.contributions(buffer.rows[buffer.draw(CONTRIBUTION_SAMPLES, rng)]), None


# --- Masked engine ----------------------------------------------------------------------------------------------------
def activate(layer: Layer, x: Tensor, normalized: bool) -> Tensor:
    """Return the outputs [..., batch, outputs] of a hidden layer for ``x`` [..., batch, inputs]."""
    x = forward([layer], x)
    return torch.relu(layer_norm(x, x.shape[-1:]) if normalized else x)


def contributions(layers: list[Layer], x: Tensor, normalized: bool = False) -> list[Tensor]:
    """Return the weights of each layer but the last, times the standard deviations of the inputs that they weigh.

    Those are over ``x`` [..., batch, inputs]; hidden layers may be ``normalized``.
    """
    scores = []
    for layer in layers[:-1]:
        change = x - x[..., :1, :]  # so that an input that never changes deviates by exactly zero in either engine
        scores.append(layer.weight * change.std(dim=-2, correction=0).unsqueeze(-1))
        x = activate(layer, x, normalized)
    return scores


def is_dormant(layer: Layer, threshold: float = DORMANT) -> Tensor:
    """Return which units [..., 1, outputs] have died: their incoming weights have vanished, and no bias opens them."""
    return (layer.weight.abs().sum(-2, keepdim=True) < threshold) & (layer.bias <= 0)


class HighSparsityNetwork(MaskedNetwork):
    """A masked network with what the recipe asks of it; ``SparseNetwork`` has the same methods."""

    normalized = False  # whether hidden layers are, before their ReLU

    def scale_steps(self, scales: list[float]) -> None:
        """Multiply the steps of Adam in the weights of each layer by one of ``scales``."""
        (group,) = self.optimizer.param_groups
        scaled = [
            group | {"params": [layer.weight], "lr": group["lr"] * scale}
            for layer, scale in zip(self.layers, scales, strict=True)
        ]
        self.optimizer.param_groups = [group | {"params": [layer.bias for layer in self.layers]}, *scaled]

    @torch.no_grad()
    def contributions(self, rows: np.ndarray) -> list[Tensor]:
        """Return the contributions [..., inputs, outputs] of each sparse layer over ``rows`` [samples, columns].

        The first columns are the network's inputs.
        """
        inputs = rows[:, : self.layers[0].weight.shape[-2]]
        return contributions(self.layers, torch.from_numpy(inputs).to(self.args.device), self.normalized)

    @torch.no_grad()
    def redraw_dormant(self, rng: Generator, draw: Callable, threshold: float) -> None:
        """Draw incoming weights and bias of each dormant hidden unit anew, as ``draw(inputs, size, rng)`` has it.

        Its outgoing weights have decayed too, so that nothing changes at once.
        """
        for layer in self.layers[:-1]:
            dormant = is_dormant(layer, threshold)
            for tensor, there in ((layer.weight, dormant & (layer.mask == 1)), (layer.bias, dormant)):
                tensor[there] = tensor.new_tensor(draw(layer.weight.shape[-2], int(there.sum()), rng))
                for moment in ("exp_avg", "exp_avg_sq"):
                    self.optimizer.state[tensor][moment][there] = 0


class HighSparsityMaskedEngine(MaskedEngine):
    """The masked engine on networks that know the recipe."""

    network: ClassVar = HighSparsityNetwork

    def __init__(self, actor: list[Layer], critics: list[Layer], bounds: tuple, args: HighSparsityArguments):
        super().__init__(actor, critics, bounds, args)
        self.critics.normalized = args.layer_norm

    def values(self, critics: list[Layer], observation: Tensor, action: Tensor) -> Tensor:
        """Return what critics say of actions [batch, actions], [critics, batch, 1]; of one of them, [batch, 1]."""
        x = torch.cat([observation, action], dim=-1)
        for layer in critics[:-1]:
            x = activate(layer, x, self.critics.normalized)
        return forward(critics[-1:], x)


def command() -> int:
    """Run the command line and return its exit code."""
    return main(HighSparsityArguments)


if __name__ == "__main__":
    sys.exit(command())
