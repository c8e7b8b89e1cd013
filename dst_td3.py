"""Dynamic sparse training for deep reinforcement learning (DS-TD3), in one file.

TD3 whose actor and critics are sparse from the first step to the last, after Sokar, Mocanu, Mocanu, Pechenizkiy and
Stone, "Dynamic Sparse Training for Deep Reinforcement Learning" (IJCAI 2022, arXiv 2106.04217). The paper adds four
pieces to TD3, and each is one function here:

1. ``erdos_renyi_topology``  a random sparse topology to start from,
2. ``adaptation_due``        a schedule that gives new connections time to grow,
3. ``drop_and_grow``         an adaptation that drops the weakest connections and grows as many new ones,
4. ``prune_target``          target networks that stay as sparse as the networks they follow.

Whoever only wants the paper reads from "Sparse topology" to "TD3". An agent computes with an engine: ``MaskedEngine``
keeps dense matrices whose masks hold the missing weights at zero; the package ``sparse_engine`` has connections alone.
"""

import dataclasses
import fcntl
import importlib.metadata
import importlib.util
import itertools
import json
import math
import os
import platform
import re
import resource
import shlex
import signal
import subprocess
import sys
import threading
import time
import traceback
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from types import UnionType
from typing import ClassVar, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import gymnasium
import numpy as np
import torch
import tyro
from numpy.random import Generator
from torch import Tensor


class InputError(Exception):
    """The user's input cannot be used. The message is one line; the program exits with code 2."""


class RunError(Exception):
    """The run cannot go on, though its input was good. The message is one line; the program exits with code 1."""


# --- Arguments --------------------------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class Arguments:
    """Train a TD3 agent that is sparse from the first step to the last (DS-TD3). Defaults are the paper's settings."""

    env: str = "HalfCheetah-v4"  # Gymnasium environment with a vector of observations and a bounded vector of actions
    env_kwargs: str | None = None  # arguments of the environment, as JSON: {"terminate_when_unhealthy": false}
    method: Literal["ds-td3", "static-td3", "td3"] = "ds-td3"  # adapts its topology, keeps its first one, or is dense
    sparsity: float | None = None  # fraction of the hidden layers' connections left out (else the paper's, or 0.5)
    er_lambda: tuple[float, ...] | None = None  # instead: lambda * (inputs + outputs) connections for each hidden layer
    hidden: tuple[int, ...] = (256, 256)  # widths of the hidden layers
    adapt_interval: int = 1000  # e of the paper: steps between two adaptations of the topology
    drop_fraction: float = 0.05  # eta of the paper: fraction of a layer's connections that an adaptation replaces
    adapt_until: float = 0.95  # fraction of the run after which the topology stays as it is

    seed: int = 0  # seed of everything random in the run; evaluations use seed + 100
    total_timesteps: int = 1_000_000  # environment steps of the run
    learning_starts: int = 25_000  # steps of uniform random actions before the first update
    initial_policy: Path | None = None  # act with this trained policy, and noise, before the first update (Figure 4)
    batch_size: int = 100  # transitions in a batch
    buffer_size: int = 1_000_000  # transitions that the replay buffer holds
    gamma: float = 0.99  # discount factor
    tau: float = 0.005  # rate of the soft update of the target networks
    policy_frequency: int = 2  # d of the paper: critic updates for each update of the actor and the targets
    updates_per_step: int = 1  # update-to-data ratio: critic updates after each environment step
    learning_rate: float = 1e-3  # Adam's learning rate, actor and critics
    weight_decay: float = 2e-4  # L2 penalty, actor and critics
    exploration_noise: float = 0.1  # standard deviation of the exploration noise, in units of half the action range
    policy_noise: float = 0.2  # standard deviation of the target policy's smoothing noise, in the same units
    noise_clip: float = 0.5  # bound of the smoothing noise, in the same units
    eval_interval: int = 5000  # steps between two evaluations
    eval_episodes: int = 10  # noise-free episodes in an evaluation
    checkpoint_interval: int = 10_000  # steps between two checkpoints; a stopped run also writes one
    engine: Literal["auto", "masked", "sparse"] = "auto"
    """masked: dense matrices and 0/1 masks in torch; sparse: connections alone (CPU); auto: sparse wherever it can"""
    device: Literal["cpu", "cuda"] = "cpu"  # cuda is for the masked engine
    threads: int = 1  # CPU threads of torch
    snapshot_at: tuple[int, ...] = ()  # steps at which the policy so far is also kept, as policy-STEP.npz
    results_dir: Path = Path("runs")  # where run directories are made: RESULTS_DIR/ENV/NAME/seedN
    tensorboard: bool = False  # also write TensorBoard logs into the run directory
    track: bool = False  # also log to Weights & Biases
    describe: bool = False  # print layers, connections, FLOPs and bytes, then leave without training

    # How a run is stored and shown; none of these changes a number that it computes.
    PRESENTATION: ClassVar = ("results_dir", "checkpoint_interval", "snapshot_at", "tensorboard", "track", "describe")
    OUTPUTS_PER_ACTION: ClassVar = 1  # of the actor; another algorithm overrides this and the next
    # The paper's lambda for its two hidden layers of 256. Ant-v4 observes 27 numbers where the paper's Ant-v3 had 111:
    # 40 would be more than a full layer, and 12.6 keeps the paper's density of the actor's first layer (0.52).
    # Of the -v5 tasks, three observe the same as their -v4; Ant-v5 and Humanoid-v5 do not.
    PAPER_LAMBDA: ClassVar = {
        **dict.fromkeys((f"{it}-v{n}" for it in ("HalfCheetah", "Hopper", "Walker2d") for n in (4, 5)), (7.0, 64.0)),
        "Ant-v4": (12.6, 64.0),
        "Humanoid-v4": (61.0, 64.0),
    }

    def __post_init__(self):
        """Take lists, numpy's numbers and paths as text, which a script may pass, for what the command line makes."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            value = value.tolist() if isinstance(value, np.generic | np.ndarray) else value
            value = tuple(value) if isinstance(value, list) else value
            is_path = isinstance(value, str) and field.name in ("results_dir", "initial_policy")
            object.__setattr__(self, field.name, Path(value) if is_path else value)

    @property
    def sparsities(self) -> tuple[float | None, float | None]:
        """Sparsities of the actor's and of each critic's hidden layers; a variant may set them apart."""
        return self.sparsity, self.sparsity

    @property
    def buffer_capacity(self) -> int:
        """How many transitions the replay buffer of a run needs room for."""
        return min(self.buffer_size, self.total_timesteps)

    @property
    def dense(self) -> bool:
        """Whether the networks hold every connection."""
        return not self.method.startswith(("ds-", "static-"))

    @property
    def adapts(self) -> bool:
        """Whether the topology changes during training."""
        return self.method.startswith("ds-")

    def make_agent(self, actor: "list[Layer]", critics: "list[Layer]", bounds: tuple) -> "TD3":
        """Return the agent to train; a variant has its own."""
        return TD3(self.make_engine(actor, critics, bounds, MaskedEngine), bounds, self)

    def make_engine(
        self, actor: "list[Layer]", critics: "list[Layer]", bounds: tuple, masked: "type[MaskedEngine]", **options
    ):
        """Return the requested engine: the class ``masked``, or the sparse one with further ``options``."""
        if self.engine == "masked":
            return masked(actor, critics, bounds, self)
        from sparse_engine.td3 import SparseEngine

        names = ("batch_size", "learning_rate", "weight_decay", "gamma", "tau", "drop_fraction")
        numbers = {name: getattr(self, name) for name in (*names, "policy_noise", "noise_clip")}
        return SparseEngine(actor, critics, bounds, **numbers, **options)

    def make_buffer(self, observations: int, actions: int) -> "ReplayBuffer":
        """Return the replay buffer of a run, for so many numbers in each; a variant may have its own.

        Whenever an episode has ended it has added one transition for each step: a checkpoint counts on that.
        """
        return ReplayBuffer(self.buffer_capacity, observations, actions)

    def papers(self) -> "Arguments":
        """Return the paper's setting of this environment and method; a run's name says what differs from it."""
        return type(self)(env=self.env, method=self.method)

    def validate(self) -> None:
        """Raise InputError for the first argument that no run can use; a variant adds its own."""
        check_arguments(self)

    def require(self, condition: bool, name: str, expected: str) -> None:
        """Raise InputError, which says what was ``expected`` of an argument, unless a condition holds."""
        if not condition:
            raise InputError(f"--{name.replace('_', '-')} must be {expected}, not {getattr(self, name)}")


# --- Sparse topology: the four pieces of the paper --------------------------------------------------------------------
# A weight matrix is [..., inputs, outputs]; leading axes are independent networks, such as the twin critics. A mask of
# the same shape is 1 where the topology has a connection and 0 elsewhere. Masked weights are zero.


def count_connections(widths: list[int], sparsity: float | None = None, er_lambda: tuple | None = None) -> list[int]:
    """Count the connections of each layer of one network (Erdős-Rényi initialization), inputs first in ``widths``.

    The paper gives layer l between n_{l-1} and n_l units ``lambda_l * (n_l + n_{l-1})`` connections in expectation,
    each with its own coin; here the count itself is fixed, so that two seeds train networks of the same size.
    ``sparsity`` instead solves for one lambda, shared by the sparse layers, that leaves them together ``1 - sparsity``
    of their connections, no layer above full. The output layer is dense; with neither argument, every layer is.
    Raises InputError when a layer would have no connection.
    """
    shapes = np.array(list(itertools.pairwise(widths[:-1])), dtype=float)  # of the sparse layers: [layers, 2]
    full, units = shapes.prod(axis=1), shapes.sum(axis=1)
    if er_lambda is None:
        # The total is piecewise linear in a shared lambda, with a kink where a layer fills: interpolation inverts it.
        kinks = np.sort(np.append(0, full / units))
        totals = [np.minimum(kink * units, full).sum() for kink in kinks]
        er_lambda = np.interp((1 - (sparsity or 0)) * full.sum(), totals, kinks)
    counts = np.minimum(er_lambda * units, full)
    rounded = np.diff(np.floor(np.cumsum(counts) + 0.5), prepend=0).astype(int)  # of running sums: the total is exact
    if rounded.min() < 1:
        raise InputError(f"this sparsity or lambda leaves layer {rounded.argmin() + 1} of {widths} no connection")
    return [*rounded.tolist(), widths[-2] * widths[-1]]


def erdos_renyi_topology(shape: tuple[int, ...], connections: int, rng: Generator) -> np.ndarray:
    """Draw a layer's mask [..., inputs, outputs], each topology of so many ``connections`` equally likely: piece 1."""
    *networks, inputs, outputs = shape
    mask = np.zeros((*networks, inputs * outputs), dtype=np.float32)
    mask[..., :connections] = 1
    return rng.permuted(mask, axis=-1).reshape(shape)


def adaptation_due(update: int, period: int, args: Arguments) -> bool:
    """Tell whether a network that learns every ``period`` updates is adapted after one: piece 2, the schedule.

    An adaptation is due every ``adapt_interval`` (e) steps: a new connection needs time to grow before its magnitude
    tells its worth. The actor learns more rarely than the critics, and adapts when it learns next. Nothing changes any
    more in the last ``1 - adapt_until`` of a run, as in the authors' code.
    """
    interval = args.adapt_interval * args.updates_per_step
    last = args.adapt_until * args.total_timesteps * args.updates_per_step
    return update <= last and update // interval > (update - period) // interval


def drop_and_grow(
    drop_scores: Tensor, mask: Tensor, drop_fraction: float, rng: Generator, growth_scores: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Choose which connections of a layer go and where new ones come: piece 3, the adaptation (the SET rule).

    Drops the fraction ``drop_fraction`` (eta) of the connections with a positive score, zero among them, and the same
    fraction of those with a negative one: the smallest magnitudes, of equals the first. The paper's scores are the
    weights; scores without a sign make one group of all. Then grows as many among the positions that hold none, those
    just dropped included: uniformly, or those of the largest ``growth_scores``. A full layer has nowhere else to grow
    and stays as it is. Takes scores and mask [..., inputs, outputs] and returns two masks of that shape: connections
    that were kept and grown, together as many as before.
    """
    flat = (-1, mask.shape[-2] * mask.shape[-1])
    kept, grown = mask.clone(), torch.zeros_like(mask)
    for n, (score, k, g) in enumerate(zip(drop_scores.reshape(flat), kept.view(flat), grown.view(flat), strict=True)):
        connected = k.nonzero().squeeze(-1)
        if len(connected) == len(k):
            continue
        for signed in (connected[score[connected] >= 0], connected[score[connected] < 0]):
            weakest_first = score[signed].abs().argsort(stable=True)
            k[signed[weakest_first[: round(drop_fraction * len(signed))]]] = 0
        empty = (k == 0).nonzero().squeeze(-1)
        dropped = len(connected) - int(k.sum())
        if growth_scores is None:
            chosen = torch.from_numpy(rng.choice(len(empty), dropped, replace=False)).to(empty.device)
        else:
            chosen = growth_scores.reshape(flat)[n, empty].argsort(descending=True, stable=True)[:dropped]
        g[empty[chosen]] = 1
    return kept, grown


def target_support(target: Tensor, mask: Tensor) -> Tensor:
    """List the flat positions [..., positions] where a target can be non-zero until ``mask`` changes.

    Pruning these alone is three times faster than pruning the whole matrix.
    """
    reachable = ((target != 0) | (mask != 0)).flatten(-2)
    order = reachable.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)
    return order[..., : int(reachable.sum(-1).max())].contiguous()  # shorter lists end in positions that stay zero


def prune_target(target: Tensor, support: Tensor, connections: int) -> None:
    """Drop a target layer's smallest weights until it has ``connections`` non-zeros: piece 4, the target's sparsity.

    The soft update mixes two topologies, the network's and the target's own, so without this a target would slowly
    become dense. ``target`` is [..., inputs, outputs] and is changed in place; ``support``, from ``target_support``,
    are the positions where it can be non-zero. A layer with no more than ``connections`` of them is left alone.
    """
    surplus = support.shape[-1] - connections  # positions to be zeroed; those that are zero already go first
    if surplus <= 0:
        return
    weights = target.view((*support.shape[:-1], -1))
    smallest = weights.gather(-1, support).abs().topk(surplus, largest=False, sorted=False).indices
    weights.scatter_(-1, support.gather(-1, smallest), 0)


# --- Masked networks --------------------------------------------------------------------------------------------------
class Layer(NamedTuple):
    """One layer's parameters: ``weight`` and ``mask`` [..., inputs, outputs], ``bias`` [..., 1, outputs]."""

    weight: np.ndarray | Tensor
    mask: np.ndarray | Tensor
    bias: np.ndarray | Tensor


def initial_values(inputs: int, size: int | tuple[int, ...], rng: Generator) -> np.ndarray:
    """Draw weights or biases of units with so many ``inputs``, as torch does for a linear layer."""
    return rng.uniform(-1 / math.sqrt(inputs), 1 / math.sqrt(inputs), size)


def initial_layers(widths: list[int], connections: list[int], rng: Generator, networks: tuple = ()) -> list[Layer]:
    """Draw the first topology and weights of a network, or of a stack of them with the leading axes ``networks``."""
    layers = []
    for (inputs, outputs), count in zip(itertools.pairwise(widths), connections, strict=True):
        mask = erdos_renyi_topology((*networks, inputs, outputs), count, rng)
        weight = initial_values(inputs, mask.shape, rng).astype(np.float32) * mask
        bias = initial_values(inputs, (*networks, 1, outputs), rng).astype(np.float32)
        layers.append(Layer(weight, mask, bias))
    return layers


def forward(layers: list[Layer], x: Tensor) -> Tensor:
    """Apply an MLP with ReLU between its layers to ``x`` [..., batch, inputs]; returns [..., batch, outputs]."""
    for layer in layers[:-1]:
        x = torch.relu(x @ layer.weight + layer.bias)
    return x @ layers[-1].weight + layers[-1].bias


def unscale_action(action, low, high):
    """Stretch actions in [-1, 1], an array or a tensor, to their bounds; clip, since rounding can overshoot."""
    return (action * (high - low) / 2 + (high + low) / 2).clip(low, high)


def policy(layers: list[Layer], observation: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Return an actor's actions [..., batch, actions], within [low, high], for [..., batch, observations]."""
    return unscale_action(torch.tanh(forward(layers, observation)), low, high)


class MaskedNetwork:
    """A sparse network as dense matrices and 0/1 masks, with its Adam optimizer and its target network.

    No gradient, moment or weight decay reaches a position without a connection, and a grown one starts at zero with
    zero moments; Adam's bias correction goes on with the network's age.
    """

    def __init__(self, layers: list[Layer], args: Arguments):
        self.args, self.drop_fraction = args, args.drop_fraction
        self.layers = [Layer(*(torch.tensor(array, device=args.device) for array in layer)) for layer in layers]
        self.target = [Layer(*(tensor.clone() for tensor in layer)) for layer in self.layers]  # its masks are unused
        self.supports = [target_support(layer.weight, layer.mask) for layer in self.layers]
        self.connections = [int(layer.mask.count_nonzero(dim=(-2, -1)).max()) for layer in self.layers]
        self.parameters = [tensor.requires_grad_() for layer in self.layers for tensor in (layer.weight, layer.bias)]
        rates = {"lr": args.learning_rate, "weight_decay": args.weight_decay}
        self.optimizer = torch.optim.Adam(self.parameters, **rates, fused=True)
        for p in self.parameters:  # Adam makes its state at its first step; checkpoints need it from the start
            moments = {name: torch.zeros_like(p, requires_grad=False) for name in ("exp_avg", "exp_avg_sq")}
            self.optimizer.state[p] = {"step": torch.zeros((), device=p.device), **moments}

    def minimize(self, loss: Tensor) -> None:
        """Take one Adam step down the gradient of ``loss``, within the topology."""
        # Not backward(): the actor's loss also runs through the critics, whose gradients are not wanted.
        for parameter, gradient in zip(self.parameters, torch.autograd.grad(loss, self.parameters), strict=True):
            parameter.grad = gradient
        for layer in self.layers:
            layer.weight.grad.mul_(layer.mask)
        self.optimizer.step()

    @torch.no_grad()
    def adapt(self, rng: Generator, drop_scores: list | None = None, growth_scores: list | None = None) -> None:
        """Adapt the topology of every sparse layer, right after ``minimize``, by what ``TD3.scores`` returns."""
        for index, layer in enumerate(self.layers[:-1]):
            drop = layer.weight if drop_scores is None else torch.as_tensor(drop_scores[index], device=self.args.device)
            growth = None if growth_scores is None else torch.as_tensor(growth_scores[index], device=self.args.device)
            kept, grown = drop_and_grow(drop, layer.mask, self.drop_fraction, rng, growth)
            layer.mask.copy_(kept + grown)
            state = self.optimizer.state[layer.weight]
            for tensor in (layer.weight, state["exp_avg"], state["exp_avg_sq"]):
                tensor.mul_(kept)
            self.supports[index] = target_support(self.target[index].weight, layer.mask)

    @torch.no_grad()
    def update_target(self) -> None:
        """Move the target a step ``tau`` towards the network, then prune it back to the network's sparsity."""
        for layer, target, *pruning in zip(self.layers, self.target, self.supports, self.connections, strict=True):
            target.weight.lerp_(layer.weight, self.args.tau)
            target.bias.lerp_(layer.bias, self.args.tau)
            prune_target(target.weight, *pruning)

    def layer_arrays(self, target: bool = False) -> list[Layer]:
        """Return copies of the network's own layers, or of its target's, as numpy arrays."""
        layers = self.target if target else self.layers
        return [Layer(*(tensor.detach().cpu().numpy().copy() for tensor in layer)) for layer in layers]

    def moment_arrays(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return copies of Adam's first and second moments of each layer's weights, as numpy arrays."""
        states = (self.optimizer.state[layer.weight] for layer in self.layers)
        return [tuple(state[name].cpu().numpy().copy() for name in ("exp_avg", "exp_avg_sq")) for state in states]

    def state_dict(self) -> dict[str, np.ndarray]:
        """Return everything that training changes, as numpy arrays by name."""
        return {f"{number}": tensor.detach().cpu().numpy() for number, tensor in enumerate(self._tensors())}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        """Take over what ``state_dict`` returned. Raises KeyError or ValueError when it belongs to another network."""
        for number, tensor in enumerate(self._tensors()):
            stored = torch.from_numpy(state[f"{number}"])
            if tensor.dtype == torch.int64:  # a support, the one tensor that grows and shrinks
                tensor.resize_(stored.shape)
            if stored.shape != tensor.shape:
                raise ValueError(f"its tensor {number} has shape {tuple(stored.shape)}, not {tuple(tensor.shape)}")
            tensor.copy_(stored)

    def _tensors(self) -> list[Tensor]:
        layers = itertools.chain(*self.layers, *self.target)
        moments = (tensor for p in self.parameters for tensor in self.optimizer.state[p].values())
        return [*layers, *self.supports, *moments]


# --- TD3 --------------------------------------------------------------------------------------------------------------
class Batch(NamedTuple):
    """Transitions as float32 arrays [batch, ...]; ``terminated`` is 1 where no state follows, 0 at a time limit.

    Between the two it discounts the next value further, which a variant's buffer may ask for.
    """

    observation: np.ndarray
    action: np.ndarray
    reward: np.ndarray
    next_observation: np.ndarray
    terminated: np.ndarray


class ReplayBuffer:
    """The last ``capacity`` transitions, as float32 rows, and a file of all. InputError where memory is too small."""

    def __init__(self, capacity: int, observations: int, actions: int):
        widths = Batch(observations, actions, 1, observations, 1)
        self.ends = np.cumsum(widths)[:-1]  # of the columns of each part of a row but the last
        self.added = 0  # transitions so far, the overwritten ones too
        self.saved, self.checksum = 0, 0  # transitions in the file, and their CRC-32
        with reported_as(InputError, f"--buffer-size {capacity} is more than there is memory for:", MemoryError):
            self.rows = np.zeros((capacity, sum(widths)), dtype=np.float32)

    def add(self, transition: Batch, ended: bool) -> None:
        """Store a transition, over the oldest one when the buffer is full; ``ended`` tells if its episode is over."""
        self.rows[self.added % len(self.rows)] = np.concatenate(transition)
        self.added += 1

    def draw(self, batch_size: int, rng: Generator) -> np.ndarray:
        """Draw the indices [batch] of a batch uniformly, with replacement."""
        return rng.integers(min(self.added, len(self.rows)), size=batch_size)

    def batch(self, indices: np.ndarray) -> Batch:
        """Return the transitions of these indices [batch]."""
        return Batch(*np.split(self.rows[indices], self.ends, axis=-1))

    def save(self, path: Path) -> None:
        """Append new transitions to those in the file, over what a killed run left there after its checkpoint."""
        new = self.rows[np.arange(self.saved, self.added) % len(self.rows)]
        with writing(path), open(path, "ab") as file:
            file.truncate(self.saved * self.rows[0].nbytes)
            file.write(new)
            file.flush()
            os.fsync(file.fileno())
        self.saved, self.checksum = self.added, zlib.crc32(new, self.checksum)

    def load(self, path: Path, count: int, checksum: int) -> None:
        """Fill the buffer from the first ``count`` transitions of a file. Raises ValueError when it is damaged."""
        stored = np.memmap(path, mode="r")[: count * self.rows[0].nbytes]
        if zlib.crc32(stored) != checksum:
            raise ValueError(f"{path.name} beside it is damaged")
        rows = stored.view(np.float32).reshape(count, -1)
        kept = np.arange(max(0, count - len(self.rows)), count)
        self.rows[kept % len(self.rows)] = rows[kept]
        self.added, self.saved, self.checksum = count, count, checksum


class MaskedEngine:
    """Computes with masked networks, on any torch device. An engine does the arithmetic that its agent asks for."""

    network: ClassVar = MaskedNetwork  # a variant may put its own here

    def __init__(self, actor: list[Layer], critics: list[Layer], bounds: tuple, args: Arguments):
        self.args = args
        self.actor, self.critics = self.network(actor, args), self.network(critics, args)
        self.low, self.high = (torch.tensor(bound, device=args.device) for bound in bounds)

    @torch.no_grad()
    def act(self, observation: np.ndarray) -> np.ndarray:
        """Return the deterministic action [actions] for one observation [observations]."""
        x = torch.from_numpy(observation.astype(np.float32)).to(self.args.device)
        return policy(self.actor.layers, x[None], self.low, self.high)[0].cpu().numpy()

    def update_critics(self, buffer: ReplayBuffer, indices: np.ndarray, noise: np.ndarray) -> dict[str, Tensor]:
        """Fit both critics to a batch; ``noise`` [batch, actions] is standard normal. Returns what to log."""
        loss, values = self.critic_loss(self.batch(buffer, indices), torch.from_numpy(noise).to(self.args.device))
        self.critics.minimize(loss)
        return {"critic_loss": loss.detach(), "value": values.detach().mean()}

    def update_actor(self, buffer: ReplayBuffer, indices: np.ndarray) -> dict[str, Tensor]:
        """Move the actor towards actions that the first critic values more. Returns what to log."""
        loss = self.actor_loss(self.batch(buffer, indices))
        self.actor.minimize(loss)
        return {"actor_loss": loss.detach()}

    def batch(self, buffer: ReplayBuffer, indices: np.ndarray) -> Batch:
        """Return a batch as tensors on the device."""
        return Batch(*(torch.from_numpy(array).to(self.args.device) for array in buffer.batch(indices)))

    def critic_loss(self, batch: Batch, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss of both critics against the smaller target value, and their values [2, batch, 1]."""
        with torch.no_grad():
            noise = (noise * self.args.policy_noise).clamp(-self.args.noise_clip, self.args.noise_clip)
            next_action = policy(self.actor.target, batch.next_observation, self.low, self.high)
            next_action = (next_action + noise * (self.high - self.low) / 2).clamp(self.low, self.high)
            next_values = self.values(self.critics.target, batch.next_observation, next_action)
            target_value = batch.reward + self.args.gamma * (1 - batch.terminated) * next_values.amin(dim=-3)
        values = self.values(self.critics.layers, batch.observation, batch.action)
        return (values - target_value).square().mean(dim=(-2, -1)).sum(), values

    def actor_loss(self, batch: Batch) -> Tensor:
        """Return the loss of the deterministic policy gradient: what the first critic says of the actor's actions."""
        first_critic = [Layer(*(tensor[..., 0, :, :] for tensor in layer)) for layer in self.critics.layers]
        action = policy(self.actor.layers, batch.observation, self.low, self.high)
        return -self.values(first_critic, batch.observation, action).mean()

    def values(self, critics: list[Layer], observation: Tensor, action: Tensor) -> Tensor:
        """Return what critics say of actions [batch, actions], [critics, batch, 1]; of one of them, [batch, 1]."""
        return forward(critics, torch.cat([observation, action], dim=-1))


class TD3:
    """Twin delayed DDPG with the paper's adaptations, on an engine with the networks ``actor`` and ``critics``.

    An engine has ``act``, ``update_critics`` and ``update_actor``, its networks what ``MaskedNetwork`` has but for
    ``minimize``. A topology rule of one's own is a subclass with other ``scores``.
    """

    def __init__(self, engine, bounds: tuple[np.ndarray, np.ndarray], args: Arguments):
        self.engine, self.bounds, self.args = engine, bounds, args
        self.networks = {"actor": engine.actor, "critic": engine.critics}
        self.losses: dict[str, float | Tensor] = {}  # of the last updates

    def act(self, observation: np.ndarray) -> np.ndarray:
        """Return the deterministic action [actions] for one observation [observations]."""
        return self.engine.act(observation)

    def explore(self, observation: np.ndarray, rng: Generator, act: Callable | None = None) -> np.ndarray:
        """Return the action [actions] of the policy, or of ``act``, with exploration noise, within the bounds."""
        low, high = self.bounds
        noise = rng.standard_normal(low.shape, dtype=np.float32) * self.args.exploration_noise * (high - low) / 2
        return ((act or self.act)(observation) + noise).clip(low, high)

    def learn(self, buffer: ReplayBuffer, step: int, rng: Generator) -> None:
        """Learn from one environment step: Algorithm 1 of the paper from the batch on; ``Run.advance`` has the rest."""
        engine, args, delay = self.engine, self.args, self.args.policy_frequency
        # Numbered as if updates had begun with the run: the schedule and the delay go by the steps.
        for update in range(args.updates_per_step * (step - 1) + 1, args.updates_per_step * step + 1):
            batch = buffer.draw(args.batch_size, rng)
            noise = rng.standard_normal((args.batch_size, len(self.bounds[0])), dtype=self.bounds[0].dtype)
            self.losses |= engine.update_critics(buffer, batch, noise)
            if adaptation_due(update, 1, args):
                self.adapt(engine.critics, buffer, rng)
            if update % delay == 0:
                self.losses |= engine.update_actor(buffer, batch)
                if adaptation_due(update, delay, args):
                    self.adapt(engine.actor, buffer, rng)
                engine.actor.update_target()
                engine.critics.update_target()

    def adapt(self, network, buffer: ReplayBuffer, rng: Generator) -> None:
        """Adapt the topology of a network, where the method does."""
        if self.args.adapts:
            network.adapt(rng, *self.scores(network, buffer, rng))

    def scores(self, network, buffer: ReplayBuffer, rng: Generator) -> tuple[list | None, list | None]:
        """Return drop and growth scores, a list each of arrays [..., inputs, outputs]; None is the paper's rule.

        Called when ``network`` adapts, right after its update; a list has an array for each layer but the last. Of drop
        scores the smallest magnitudes go, in each sign's own share; growth scores count where no connection is. The
        network has ``layer_arrays()`` and ``moment_arrays()``.
        """
        return None, None

    def policy_layers(self) -> list[Layer]:
        """Return copies of the layers whose outputs, through a tanh, are the deterministic actions."""
        return [Layer(*arrays) for arrays in self.engine.actor.layer_arrays()]

    def state_dict(self) -> dict[str, np.ndarray]:
        """Return everything that training changes, as numpy arrays by name."""
        parts = ((name, network.state_dict()) for name, network in self.networks.items())
        return {f"{name}.{key}": array for name, state in parts for key, array in state.items()}

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        """Take over what ``state_dict`` returned. Raises KeyError or ValueError when it belongs to another agent."""
        for name, network in self.networks.items():
            network.load_state_dict({k.partition(".")[2]: a for k, a in state.items() if k.startswith(f"{name}.")})


# --- Environment ------------------------------------------------------------------------------------------------------
@contextmanager
def reported_as(kind: type[Exception], message: str, causes=(OSError, KeyError, TypeError, ValueError)):
    """Turn ``causes``, by default what a damaged file can lead to, into one ``kind``: message first, then reason."""
    try:
        yield
    except causes as error:
        raise kind(f"{message} {type(error).__name__}: {error}") from error


class CheckedEnvironment(gymnasium.Wrapper):
    """The one place where an environment's data enters: copied, converted to float32, checked. RunError names faults.

    Copied, since an environment may change the array that it has returned, or the action it was given. An exception of
    its own code is shown with its traceback; one of Gymnasium's wrappers only says that they were given other data.
    """

    def __init__(self, env: gymnasium.Env):
        super().__init__(env)
        self.name, self.low, self.high = env.spec.id, env.action_space.low, env.action_space.high
        self.observations, self.actions = len(env.observation_space.low), len(self.low)

    def reset(self, **options) -> tuple[np.ndarray, dict]:
        """Begin an episode; return its first observation [observations], and information."""
        observation, information = self.call(2, self.env.reset, **options)
        return self._numbers("an observation", observation, self.observations), information

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        """Act, by the action space's own type and bounds; return what Gymnasium's ``step`` does."""
        if action.shape != self.low.shape:
            raise RunError(f"{self.name} takes {self.actions} actions and the policy has {len(action)}")
        if not math.isfinite(action.sum()):
            raise RunError("the policy's action is not finite (the networks have diverged)")
        action = np.minimum(np.maximum(action, self.low), self.high).astype(self.low.dtype, copy=False)
        observation, reward, terminated, truncated, information = self.call(5, self.env.step, action)
        observation, ends = self._numbers("an observation", observation, self.observations), (terminated, truncated)
        # The common case first, for the sake of speed.
        if not (type(terminated) is type(truncated) is bool and isinstance(reward, float) and abs(reward) < 1e38):
            self._numbers("reward, terminated, truncated", (reward, *ends), 3)
            if any(end not in (0, 1) for end in ends):
                raise RunError(f"{self.name} returned {ends} as terminated, truncated: not true or false")
        return observation, float(reward), bool(terminated), bool(truncated), information

    def call(self, values: int | None, function: Callable, *arguments, **options):
        """Call the environment's own code, which returns so many ``values``."""
        try:
            returned = function(*arguments, **options)
        except Exception as error:  # an environment's own code can raise anything
            if not re.search(r"gymnasium.(wrappers|spaces)", traceback.extract_tb(error.__traceback__)[-1].filename):
                traceback.print_exc()
            raise RunError(f"{self.name} failed with {type(error).__name__}: {error}") from error
        if values and (not isinstance(returned, tuple) or len(returned) != values):
            raise RunError(f"{self.name} returned {returned!s:.60} from {function.__name__}, not {values} values")
        return returned

    def _numbers(self, what: str, given, count: int) -> np.ndarray:
        with suppress(TypeError, ValueError, OverflowError), np.errstate(over="ignore"):
            numbers = np.array(given, np.float32)
            if numbers.shape == (count,) and np.isfinite(numbers).all():
                return numbers
        raise RunError(f"{self.name} returned {given!s:.60} as {what}: not {count} plain, finite numbers")


def make_environment(name: str, arguments: str | None = None, **options) -> CheckedEnvironment:
    """Make an environment of Gymnasium with ``arguments`` in JSON. InputError where it has no bounded real vectors."""
    warnings.filterwarnings("ignore", message=".*is out of date.*")  # on purpose: the paper's tasks are the -v4 ones
    papers = "HalfCheetah-v4, Hopper-v4, Walker2d-v4, Ant-v4 and Humanoid-v4"
    with reported_as(InputError, f"environment {name} cannot be made (the paper's are {papers}):", Exception):
        env = gymnasium.make(name, disable_env_checker=True, **json.loads(arguments or "{}"), **options)
        if isinstance(env.observation_space, gymnasium.spaces.Dict | gymnasium.spaces.Tuple):
            env = gymnasium.wrappers.FlattenObservation(env)
    for kind, space in (("observations", env.observation_space), ("actions", env.action_space)):
        if not isinstance(space, gymnasium.spaces.Box) or len(space.shape) != 1 or space.shape == (0,):
            raise InputError(f"{name} has {kind} in {space}: needed is a vector of real numbers (a Box of one axis)")
    # Values of the square of a loss's square: beyond, float32 overflows within an update.
    widest = float(np.finfo(np.float32).max) ** 0.25
    if not np.issubdtype(space.dtype, np.floating) or not abs(np.float64([space.low, space.high])).max() < widest:
        raise InputError(f"{name} has actions in {space}: needed are real numbers within bounds below {widest:.0e}")
    return CheckedEnvironment(env)


def random_state(env: gymnasium.Env) -> dict:
    """Return the state of an environment's random generator, as JSON has it. InputError where it is not numpy's."""
    generator = env.unwrapped.np_random
    with reported_as(InputError, f"{env.name} draws from {type(generator)}, not from a generator of numpy;", Exception):
        legacy = isinstance(generator, np.random.RandomState)
        state = generator.get_state(legacy=False) if legacy else generator.bit_generator.state
        return json.loads(json.dumps(state, default=np.ndarray.tolist))


def set_random_state(env: gymnasium.Env, state: dict) -> None:
    """Take over what ``random_state`` returned. Raises KeyError, TypeError or ValueError where it does not fit."""
    generator = env.unwrapped.np_random
    if isinstance(generator, np.random.RandomState):
        generator.set_state(state)
    else:
        generator.bit_generator.state = state


def evaluate(act: Callable, env: gymnasium.Env, episodes: int, seed: int) -> Iterator[tuple[float, int]]:
    """Play noise-free episodes from the start states of ``seed``; yield the return and the length in steps of each."""
    for episode in range(episodes):
        observation, _ = env.reset(seed=seed if episode == 0 else None)
        total, length, done = 0.0, 0, False
        while not done:
            observation, reward, terminated, truncated, _ = env.step(act(observation))
            total, length, done = total + reward, length + 1, terminated or truncated
        yield total, length


# --- Accounting -------------------------------------------------------------------------------------------------------
def network_sizes(env: CheckedEnvironment, args: Arguments) -> list[tuple[list[int], list[int]]]:
    """Return widths and connections of the layers of the actor and of each critic; InputError as count_connections."""
    actor = [env.observations, *args.hidden, env.actions * args.OUTPUTS_PER_ACTION]
    critic = [env.observations + env.actions, *args.hidden, 1]
    pairs = zip((actor, critic), args.sparsities, strict=True)
    return [(widths, count_connections(widths, sparsity, args.er_lambda)) for widths, sparsity in pairs]


def count_costs(env: CheckedEnvironment, args: Arguments) -> dict[str, float]:
    """Count actor's and critics' connections (no biases, no targets) and training FLOPs, as the paper does.

    A backward pass is two forward ones, the critic's part in the actor's loss is left out, and every step counts.
    """
    sizes, costs = network_sizes(env, args), []
    sparse = [sum(connections) for _, connections in sizes]
    dense = [sum(count_connections(widths)) for widths, _ in sizes]
    for (actor, critic), updates_per_step in ((sparse, args.updates_per_step), (dense, 1)):
        updates = args.total_timesteps * updates_per_step * args.batch_size
        costs.append((actor + 2 * critic, updates * (6 * 2 * critic + 6 * actor / args.policy_frequency)))
    (connections, flops), (dense_connections, dense_flops) = costs
    counts = {"connections": connections, "sparsity": 1 - connections / dense_connections}
    return counts | {"training_flops": flops, "training_flops_of_dense": dense_flops}


def require_memory(env: CheckedEnvironment, args: Arguments) -> None:
    """Raise InputError where networks, replay buffer and a batch need more than this machine's memory."""
    (actor, _), (critic, _) = network_sizes(env, args)
    dense = sum(sum(count_connections(widths)) for widths in (actor, critic, critic))
    copies = 4 if args.engine == "sparse" else 10  # of a dense float32 matrix: drawn as such, and kept by one engine
    transition = 2 * env.observations + env.actions + 2
    numbers = copies * dense + transition * args.buffer_capacity
    needed = 4 * (numbers + args.batch_size * (transition + sum(actor + 2 * critic)))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory:
        sizes = f"{needed / 1e9:,.1f} GB and this machine has {memory / 1e9:,.1f}"
        raise InputError(f"--hidden, --buffer-size, --batch-size: networks and transitions need about {sizes}")


def describe(args: Arguments) -> str:
    """Tabulate each layer's shape, connections and sparsity, then #params, training FLOPs and the buffer's bytes."""
    args.validate()
    args = resolve(args)
    env = make_environment(args.env, args.env_kwargs)
    lines = [f"{args.env}, {run_name(args)}", f"{'layer':<17}{'shape':>12}{'connections':>14}{'sparsity':>10}"]
    for name, (widths, connections) in zip(("actor", "each critic"), network_sizes(env, args), strict=True):
        for number, (inputs, outputs, count) in enumerate(zip(widths, widths[1:], connections, strict=False), start=1):
            shape, sparsity = f"{inputs} x {outputs}", 1 - count / (inputs * outputs)
            lines.append(f"{name:<12}{number:<5}{shape:>12}{count:>14,}{sparsity:>10.3f}")
    costs = count_costs(env, args)
    row = ReplayBuffer(1, env.observations, env.actions).rows
    share = costs["training_flops"] / costs["training_flops_of_dense"]
    lines.append(f"#params    {costs['connections']:,} connections (sparsity {costs['sparsity']:.2f})")
    lines.append(f"FLOPs      {costs['training_flops']:.3g} for training, {share:.2f}x dense")
    lines.append(f"bytes      {args.buffer_capacity * row.nbytes / 1e6:,.0f} MB of replay buffer, once it is full")
    return "\n".join(lines)


def learning_curve_area(evaluations: list[dict], total_timesteps: int) -> float:
    """Return the paper's LCA: all evaluations' returns, the first before training, summed, over the number of steps.

    The paper evaluates every 5,000 steps; where evaluations lie otherwise apart, each counts for as many of those.
    """
    steps, returns = ([row[name] for row in evaluations] for name in ("step", "return_mean"))
    intervals = np.diff(steps, prepend=-steps[1])  # the first, at step 0, counts as the second does
    return float(np.dot(returns, intervals)) / 5000 / total_timesteps


# --- Files ------------------------------------------------------------------------------------------------------------
def discard_output() -> None:
    """Send nowhere what is printed from now on, since its reader has gone away."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def say(line: str, stopped: list) -> None:
    """Print a line at once. Where the reader has gone away, such as head, SIGPIPE joins ``stopped``, in silence."""
    try:
        print(line, flush=True)
    except BrokenPipeError:
        discard_output()
        stopped.append(signal.SIGPIPE)


def writing(path: Path):
    """Report a failure of the file system, such as a full disk, as a RunError that names ``path``."""
    return reported_as(RunError, f"cannot write {path} (what was there before is whole):", OSError)


@contextmanager
def replaced(path: Path):
    """Open a file to write whose content appears at ``path`` all at once when done, and not at all when it fails."""
    temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")
    try:
        with writing(path), open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: dict) -> None:
    """Replace ``path`` by ``content`` as JSON."""
    with replaced(path) as file:
        file.write((json.dumps(content, indent=2) + "\n").encode())


def read_json(path: Path, key: str, kind: type):
    """Return one entry, of type ``kind``, of what ``write_json`` wrote. Raises InputError when the file is damaged."""
    with reported_as(InputError, f"{path} is damaged: move its folder away, or choose a --results-dir;"):
        entry = json.loads(path.read_text())[key]
        if not isinstance(entry, kind):
            raise TypeError(f"{key} is {entry!s:.60}")
        return entry


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Read a file that np.savez wrote, executing nothing in it. Raises ValueError when it cannot be read."""
    with reported_as(ValueError, "unreadable:", Exception), np.lib.npyio.NpzFile(path, allow_pickle=False) as stored:
        return dict(stored)  # a damaged archive can raise anything


def checksum(arrays: dict[str, np.ndarray]) -> int:
    """Return the CRC-32 of arrays with their names, types and shapes."""
    crc = 0
    for name, array in arrays.items():
        crc = zlib.crc32(array.tobytes(), zlib.crc32(f"{name} {array.dtype} {array.shape} ".encode(), crc))
    return crc


def save_policy(path: Path, actor: list[Layer], bounds: tuple, env: str) -> None:
    """Write a trained actor: for each layer a bit for each position, the connections' weights and the biases."""
    arrays = {"env": np.array(env), "low": bounds[0], "high": bounds[1]}
    for index, (weight, mask, bias) in enumerate(actor):
        arrays |= {f"{index}.shape": np.array(weight.shape), f"{index}.topology": np.packbits(mask == 1)}
        arrays |= {f"{index}.weight": weight[mask == 1], f"{index}.bias": bias}
    with replaced(path) as file:
        np.savez(file, **arrays)


def read_policy(path: Path, env: str | None = None) -> tuple[list[Layer], Tensor, Tensor]:
    """Read the layers and bounds [actions] of a policy, for ``env`` if given. Raises InputError when it is none."""
    with reported_as(InputError, f"{path} is no policy that can be read:"):
        arrays, layers = read_arrays(path), []
        if env not in (None, arrays["env"]):
            raise InputError(f"{path} holds a policy for {arrays['env']}, not for {env}")
        low, high = arrays["low"], arrays["high"]
        for index in range(sum(name.endswith(".shape") for name in arrays)):
            shape, topology, connected, bias = (arrays[f"{index}.{n}"] for n in ("shape", "topology", "weight", "bias"))
            inputs, outputs = shape.tolist()
            mask = np.unpackbits(topology)[: inputs * outputs].reshape(inputs, outputs)
            fits = (not layers or layers[-1].bias.shape == (1, inputs)) and bias.shape == (1, outputs)
            if not fits or connected.shape != (mask.sum(),):
                raise ValueError(f"layer {index + 1} does not fit its shape or the layer before")
            if any(array.dtype != np.float32 for array in (connected, bias, low, high)):
                raise ValueError("its numbers are not float32")
            weight = np.zeros(shape, np.float32)
            weight[mask == 1] = connected
            layers.append(Layer(*map(torch.from_numpy, (weight, mask, bias))))
        if not layers or not low.shape == high.shape == layers[-1].bias.shape[1:]:
            raise ValueError("its bounds are not those of its actions")
        return layers, torch.from_numpy(low), torch.from_numpy(high)


def load_policy(path: Path, env: str | None = None) -> Callable[[np.ndarray], np.ndarray]:
    """Read a policy, for ``env`` if given, as a function from observation to action. InputError when it is none."""
    layers, low, high = read_policy(Path(path), env)

    def act(observation) -> np.ndarray:
        x = torch.tensor(np.array(observation, np.float32))
        if x.shape != layers[0].weight.shape[:1]:
            raise InputError(f"{path} takes {len(layers[0].weight)} observations, not {tuple(x.shape)}")
        return policy(layers, x[None], low, high)[0].numpy()

    return act


def provenance() -> dict:
    """Return the versions, the git commit of this file and the machine that a run is made with."""
    file, folder = Path(__file__).name, Path(__file__).resolve().parent
    git = f"git ls-files --error-unmatch {file} >&2 && git rev-parse HEAD"  # no commit of others who install this
    git += " && git status --porcelain -- '*.py'"  # new figures are no other code
    answer = subprocess.run(git, shell=True, cwd=folder, capture_output=True, text=True).stdout.split()
    commit = answer[0] + ("-dirty" if answer[1:] else "") if answer else None
    packages = filter(importlib.util.find_spec, ("torch", "gymnasium", "mujoco", "numpy", "numba", "llvmlite", "scipy"))
    versions = {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in packages}
    cpuinfo = Path("/proc/cpuinfo")  # Linux alone has it
    models = re.findall(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else []
    processor = (models or [platform.processor() or platform.machine()])[0]  # Arm has no model name
    machine = {"processor": processor, "cores": os.cpu_count(), "system": platform.platform()}
    return {"versions": versions, "commit": commit, "machine": machine}


# --- Run --------------------------------------------------------------------------------------------------------------
def fits(value, kind) -> bool:
    """Tell whether a value is of an argument's type; the command line has seen to that, a script may not have."""
    options = get_args(kind)
    if get_origin(kind) in (Union, UnionType):
        return any(fits(value, option) for option in options)
    if get_origin(kind) is Literal:
        return value in options
    if get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(fits(each, options[0]) for each in value)
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, int | float if kind is float else kind)


def check_arguments(args: Arguments) -> None:
    """Raise InputError for the first argument that no run can use."""
    kinds = get_type_hints(type(args))
    for name in (field.name for field in dataclasses.fields(args)):
        value, kind = getattr(args, name), kinds[name]
        if kind is int:
            least = 0 if name in ("seed", "learning_starts") else 1
            expected = "a positive whole number" if least else "zero or a positive whole number"
            args.require(fits(value, int) and value >= least, name, expected)
        else:
            expected = " or ".join(map(str, get_args(kind))) if get_origin(kind) is Literal else f"of type {kind}"
            args.require(fits(value, kind), name, expected)
    for name in ("weight_decay", "exploration_noise", "policy_noise", "noise_clip"):
        args.require(0 <= getattr(args, name) < math.inf, name, "zero or a positive number")
    for name in ("drop_fraction", "adapt_until", "gamma", "tau"):
        args.require(0 <= getattr(args, name) <= 1, name, "between 0 and 1")
    args.require(args.threads <= 4096, "threads", "at most 4096")
    args.require(0 < args.learning_rate < math.inf, "learning_rate", "a positive number")
    args.require(args.hidden and min(args.hidden) > 0, "hidden", "one or more positive widths")
    later = f"more than --learning-starts ({args.learning_starts})"
    args.require(args.total_timesteps > args.learning_starts, "total_timesteps", later)
    snapshots = all(0 < step <= args.total_timesteps for step in args.snapshot_at)
    args.require(snapshots, "snapshot_at", f"steps of the run, 1 to {args.total_timesteps}")
    args.require(0 <= (args.sparsity or 0) < 1, "sparsity", "at least 0 and below 1")
    lambdas = (1,) * len(args.hidden) if args.er_lambda is None else args.er_lambda
    proper = len(lambdas) == len(args.hidden) and all(0 < value < math.inf for value in lambdas)
    args.require(proper, "er_lambda", f"{len(args.hidden)} positive numbers, one for each hidden layer")
    if args.dense and (args.sparsity, args.er_lambda) != (None, None):
        raise InputError(f"--method {args.method} is dense: leave out --sparsity and --er-lambda")
    if args.sparsity is not None and args.er_lambda is not None:
        raise InputError("--sparsity and --er-lambda both set the number of connections: give one of them")
    args.require(args.device == "cpu" or torch.cuda.is_available(), "device", "cpu (torch finds no GPU to use)")
    for flag, package in (("tensorboard", "tensorboard"), ("track", "wandb"), ("track", "tensorboard")):
        if getattr(args, flag) and importlib.util.find_spec(package) is None:
            raise InputError(f"--{flag} needs the package {package}: pip install {package}")
    if args.initial_policy is not None:
        read_policy(args.initial_policy, args.env)
    with reported_as(InputError, f"--env-kwargs must be JSON in braces, not {args.env_kwargs}:"):
        dict(**json.loads("{}" if args.env_kwargs is None else args.env_kwargs))


def resolve(args: Arguments) -> Arguments:
    """Fill in what is left open, engine and number of connections. InputError if the sparse engine is unavailable."""
    needed = ("sparse_engine", "numba", "scipy", "threadpoolctl")
    fits = args.device == "cpu" and all(map(importlib.util.find_spec, needed))
    if args.engine == "sparse" and not fits:
        raise InputError(f"--engine sparse needs a CPU and the packages {', '.join(needed)}: choose --engine masked")
    if args.engine == "auto":
        args = dataclasses.replace(args, engine="sparse" if fits else "masked")
    if args.dense or (args.sparsity, args.er_lambda) != (None, None):
        return args
    paper = args.PAPER_LAMBDA.get(args.env) if args.hidden == (256, 256) else None
    return dataclasses.replace(args, er_lambda=paper, sparsity=None if paper else 0.5)


def run_name(args: Arguments) -> str:
    """Name resolved arguments by their method and what differs from the paper's setting: "ds-td3_sparsity=0.8"."""
    papers, unnamed = resolve(args.papers()), ("env", "method", "seed", "device", "engine", "threads")
    names: list[str] = []  # an argument that a variant declares anew is named in the variant's place
    for kind in type(args).__mro__:
        names = [name for name in vars(kind).get("__annotations__", ()) if name not in names] + names
    name = args.method
    for field in names:
        value = getattr(args, field)
        if field not in (*unnamed, *args.PRESENTATION) and value is not None and value != getattr(papers, field):
            if field == "env_kwargs":
                value = ",".join(f"{key}={json.dumps(v)}" for key, v in json.loads(value).items()).replace("/", "-")
            value = ",".join(f"{v:g}" for v in value) if isinstance(value, tuple) else value
            name += f"_{field.replace('_', '-')}={value.stem if isinstance(value, Path) else value}"
    return name


def run_directory(args: Arguments) -> Path:
    """Return the folder of a run of resolved arguments; a long name is cut, and whole in config.json."""
    name, env = run_name(args), args.env.replace("/", "-")
    encoded = os.fsencode(name)  # of which file systems take at most 255 bytes
    cut = name if len(encoded) <= 200 else f"{encoded[:190].decode(errors='ignore')}_{zlib.crc32(encoded):x}"
    run = Path(cut, f"seed{args.seed}")
    former = args.results_dir / env / run  # a colon is not for paths, but older folders have it
    return former if os.path.exists(former) else args.results_dir / env.replace(":", "-") / run


def arguments_to_store(args: Arguments) -> dict:
    """Return those arguments that change what a run computes, as JSON has them; a policy counts by its content."""
    values = {"program": type(args).__name__}  # so that a variant does not take another's run for its own
    values |= {k: v for k, v in dataclasses.asdict(args).items() if k not in args.PRESENTATION}
    return json.loads(json.dumps(values, default=lambda policy: f"{policy.name} {zlib.crc32(policy.read_bytes()):x}"))


def is_finished(args: Arguments) -> bool:
    """Tell whether a run is done. Raises InputError where its folder is damaged or has a run of other arguments."""
    config, summary = (run_directory(args) / name for name in ("config.json", "summary.json"))
    begun = read_json(config, "arguments", dict) if os.path.exists(config) else {}
    finished = os.path.exists(summary) and read_json(summary, "steps", int) > 0
    for name, value in arguments_to_store(args).items():
        if begun.get(name, value) != value and not (finished and name in ("engine", "device")):
            other = f"{name} {begun[name]} there and {value} here"
            raise InputError(f"{config.parent} has a run of other arguments ({other}): choose another --results-dir")
    return finished


class Run:
    """A training run: everything that changes while it goes on, and the checkpoints that bring it back.

    Checkpoints are written between episodes: a simulator has hidden state during one (MuJoCo's solver, a time limit's
    counter), but an episode begins from its random generator alone. All else is drawn from one numpy generator.
    """

    def __init__(self, args: Arguments):
        self.args, self.directory = args, run_directory(args)
        self.checkpoint, self.transitions = self.directory / "checkpoint.npz", self.directory / "transitions.bin"
        self.rng = np.random.default_rng(args.seed)
        self.env, self.evaluation_env = (make_environment(args.env, args.env_kwargs) for _ in range(2))
        self.bounds = tuple(bound.astype(np.float32) for bound in (self.env.low, self.env.high))
        require_memory(self.env, args)
        self.costs, (actor, critic) = count_costs(self.env, args), network_sizes(self.env, args)
        networks = initial_layers(*actor, self.rng), initial_layers(*critic, self.rng, networks=(2,))
        self.buffer = args.make_buffer(self.env.observations, self.env.actions)
        self.initial_policy = load_policy(args.initial_policy, args.env) if args.initial_policy else None
        if self.initial_policy and self.initial_policy(np.zeros(self.env.observations)).shape != self.bounds[0].shape:
            raise InputError(f"{args.initial_policy} does not have the {self.env.actions} actions of {args.env}")
        self.agent = args.make_agent(*networks, self.bounds)  # last: this may compile for some seconds
        first = (network.layer_arrays()[:-1] for network in self.agent.networks.values())
        self.initial_masks = [[mask == 1 for _, mask, _ in layers] for layers in first]
        self.step, self.saved_step = 0, 0
        self.stopped: list[signal.Signals] = []  # what asks the run to stop
        self.begun_alike = True  # as before the checkpoint
        self.made_before: dict[str, str] = {}  # evaluations since the checkpoint, by a run that was killed
        self.tables: dict[str, list[dict]] = {"evaluations": [], "timing": [], "topology": []}
        self.seconds = {"training_seconds": 0.0, "evaluation_seconds": 0.0}
        self.env.reset(seed=args.seed)  # seeds its generator, from whose state the first episode begins
        self.begin_episode()

    def begin_episode(self) -> None:
        """Reset the environment, so that a checkpoint written now can do it again."""
        self.episode_rng = random_state(self.env)
        self.observation, _ = self.env.reset()

    def advance(self) -> None:
        """Take one environment step and learn from it (``TD3.learn``). Raises RunError when that fails."""
        started, observation, first = time.perf_counter(), self.observation, self.step < self.args.learning_starts
        if first and self.initial_policy is None:
            action = self.rng.uniform(*self.bounds).astype(np.float32)
        else:
            action = self.agent.explore(observation, self.rng, self.initial_policy if first else None)
        self.observation, reward, terminated, truncated, _ = self.env.step(action)
        self.step, self.between_episodes = self.step + 1, terminated or truncated
        transition = Batch(observation, action, [reward], self.observation, [terminated])
        self.buffer.add(transition, self.between_episodes)
        if 2 * (self.buffer.added - self.buffer.saved) >= len(self.buffer.rows):  # before any is overwritten
            self.buffer.save(self.transitions)
        if self.between_episodes:
            self.begin_episode()
        if self.step > self.args.learning_starts:
            self.agent.learn(self.buffer, self.step, self.rng)
        self.seconds["training_seconds"] += time.perf_counter() - started

    def evaluate(self) -> dict:
        """Evaluate the policy, extend the tables, write them, and return the evaluation's row."""
        started, args = time.perf_counter(), self.args
        episodes = evaluate(self.agent.act, self.evaluation_env, args.eval_episodes, args.seed + 100)
        returns, lengths = zip(*episodes, strict=True)
        self.seconds["evaluation_seconds"] += time.perf_counter() - started
        row = {"step": self.step, "return_mean": float(np.mean(returns)), "return_std": float(np.std(returns))}
        row |= {"return_min": min(returns), "return_max": max(returns), "length_mean": float(np.mean(lengths))}
        if self.made_before.get(str(self.step), line := ",".join(map(str, row.values()))) != line:
            reason = "the environment keeps state from one episode to the next, or this machine rounds otherwise"
            self.note("evaluated_otherwise", f"this evaluation differs from the one made before a kill: {reason}", {})
        self.tables["evaluations"].append(row)
        self.tables["timing"].append({"step": self.step} | {name: round(s, 3) for name, s in self.seconds.items()})
        self.tables["topology"] += self._topology_rows() if args.adapts else []
        for name, rows in self.tables.items():
            if rows:
                lines = [rows[0], *map(dict.values, rows)]
                with replaced(self.directory / f"{name}.csv") as file:
                    file.writelines(f"{','.join(map(str, line))}\n".encode() for line in lines)
        return row

    def _topology_rows(self) -> Iterator[dict]:
        """Describe how far the actor's and the first critic's topologies have moved from their first ones."""
        for (name, network), initial_masks in zip(self.agent.networks.items(), self.initial_masks, strict=True):
            pairs = zip(initial_masks, network.layer_arrays(), strict=False)
            for number, (initial, (_, mask, _)) in enumerate(pairs, start=1):
                initial, mask = (each.reshape(-1, *each.shape[-2:])[0] for each in (initial, mask))
                alive = float((mask * initial).sum() / initial.sum(dtype=np.float32))
                inputs = " ".join(map(str, mask.sum(-1).astype(int))) if number == 1 else ""
                row = {"step": self.step, "network": name, "layer": number}
                yield {**row, "initial_connections_alive": alive, "connections_per_input": inputs}

    def save(self) -> None:
        """Write a checkpoint. Until its last moment the previous one stays whole, whatever happens."""
        self.buffer.save(self.transitions)
        state = {"arguments": arguments_to_store(self.args), "step": self.step, "checksum": self.buffer.checksum}
        state |= {"rng": self.rng.bit_generator.state, "episode_rng": self.episode_rng}
        state |= {"tables": self.tables, "seconds": self.seconds}
        with replaced(self.checkpoint) as file:
            arrays = {"state": np.array(json.dumps(state)), "observation": self.observation, **self.agent.state_dict()}
            np.savez(file, **arrays, checksum=checksum(arrays))
        self.saved_step = self.step

    def load(self) -> None:
        """Return to the last checkpoint, if any. Raises InputError when it is damaged or of another run."""
        if not self.checkpoint.exists():
            return
        with reported_as(InputError, f"{self.checkpoint} cannot be resumed; move its folder away to begin anew;"):
            arrays = read_arrays(self.checkpoint)
            if arrays.pop("checksum") != checksum(arrays):
                raise ValueError("its checksum is not that of its content")
            state = json.loads(str(arrays["state"]))
            now = arguments_to_store(self.args)
            if now | state["arguments"] != now:  # an argument that is newer than the checkpoint has its default
                raise ValueError("it belongs to another run")
            self.agent.load_state_dict(arrays)
            self.buffer.load(self.transitions, state["step"], state["checksum"])
            self.rng.bit_generator.state = state["rng"]
            set_random_state(self.env, state["episode_rng"])
            self.tables, self.seconds, self.step = state["tables"], state["seconds"], state["step"]
        self.saved_step = self.step
        with suppress(OSError, ValueError):
            lines = (self.directory / "evaluations.csv").read_text().splitlines()[1:]
            self.made_before = {line.partition(",")[0]: line for line in lines}
        self.begin_episode()
        self.begun_alike = np.array_equal(self.observation, arrays["observation"])

    def note_provenance(self) -> None:
        """Note in config.json what the run is made with, and where it goes on with something else."""
        path, now = self.directory / "config.json", provenance()
        if not path.exists():
            names = {"id": os.urandom(4).hex(), "name": run_name(self.args)}
            write_json(path, names | {"arguments": arguments_to_store(self.args), **now})
        with reported_as(InputError, f"{path} is damaged: move its folder away, or choose a --results-dir;"):
            config = json.loads(path.read_text())
            lists = ("evaluated_otherwise", "begun_otherwise", "resumed")
            notes = [dict(**entry) for key in lists for entry in config.get(key, [])]
        last = notes[-1] if config.get("resumed") else config
        if any(now[key] != last.get(key) for key in now):
            self.note("resumed", "another commit, other versions or another machine go on with the run", now)
        if not self.begun_alike:
            reason = f"{self.args.env} keeps state from one episode to the next, or has a generator of its own"
            self.note("begun_otherwise", f"this episode does not begin as before the checkpoint: {reason}", {})

    def note(self, key: str, message: str, further: dict) -> None:
        """Say something about the run from this step on, and add it to a list in config.json."""
        say(f"step {self.step:,}: {message}", self.stopped)
        path = self.directory / "config.json"
        config = json.loads(path.read_text())
        write_json(path, config | {key: [*config.get(key, []), {"step": self.step, **further}]})

    def save_policy(self, name: str) -> None:
        """Write the policy so far."""
        save_policy(self.directory / name, self.agent.policy_layers(), self.bounds, self.args.env)

    def finish(self) -> dict:
        """Write the trained policy and the summary, remove what only an unfinished run needs, return the summary."""
        returns = [row["return_mean"] for row in self.tables["evaluations"]]
        lca = learning_curve_area(self.tables["evaluations"], self.args.total_timesteps)
        final = float(np.mean(returns[1:][-10:]))  # a short run's first one, of the untrained policy, is left out
        summary = self.costs | {"final_return": final, "lca": lca, "evaluations": len(returns), "steps": self.step}
        summary |= {name: round(value, 1) for name, value in self.seconds.items()}
        unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
        summary["peak_memory_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        self.save_policy("policy.npz")
        write_json(self.directory / "summary.json", summary)
        for path in (self.checkpoint, self.transitions, self.directory / "lock"):
            path.unlink(missing_ok=True)
        return summary


class Progress:
    """Prints and logs how a run goes, a line at each evaluation."""

    def __init__(self, run: Run, closing: ExitStack):
        self.run, self.writer, args, directory = run, None, run.args, run.directory
        name = f"{args.env} {run_name(args)} seed {args.seed}"
        if args.track:
            import wandb

            options = {"project": "dst-rl", "name": name, "id": read_json(directory / "config.json", "id", str)}
            options |= {"config": arguments_to_store(args), "resume": "allow", "sync_tensorboard": True}
            closing.callback(wandb.init(**options).finish)
        if args.tensorboard or args.track:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = closing.enter_context(SummaryWriter(directory / "tensorboard", purge_step=run.step + 1))
        masks = [mask for masks in run.initial_masks for mask in masks]
        hidden = 1 - sum(mask.sum() for mask in masks) / sum(mask.size for mask in masks)
        sparsity = f"sparsity {hidden:.2f} of the hidden layers ({run.costs['sparsity']:.2f} of all)"
        where = f"{args.engine} engine on {args.device}: step {run.step:,} of {args.total_timesteps:,}"
        say(f"{name}, {sparsity}, {where}", run.stopped)
        if isinstance(run.env.env, gymnasium.wrappers.FlattenObservation):
            say(f"observations of {args.env} are flattened to {run.env.observations} numbers", run.stopped)
        if run.env.spec.max_episode_steps is None:
            limit = """--env-kwargs '{"max_episode_steps": 1000}'"""
            ends = f"its episodes, and so evaluations, end by themselves or by {limit}"
            say(f"{args.env} has no time limit: {ends}", run.stopped)
        if run.step < args.learning_starts and args.initial_policy is None:
            say(f"random actions, and nothing learned, until step {args.learning_starts:,}", run.stopped)
        self.shown, self.shown_at = run.step, time.perf_counter()  # at the last line

    def evaluated(self, row: dict) -> None:
        """Print and log an evaluation's row of the table, and log the losses of the last update."""
        step, now, args = row["step"], time.perf_counter(), self.run.args
        line = f"step {step:>9,}  return {row['return_mean']:9.1f} +- {row['return_std']:7.1f}"
        if step > self.shown:
            speed = (step - self.shown) / (now - self.shown_at)
            line += f"  {speed:,.0f} steps/s"
            if step > args.learning_starts:  # before that, steps are far faster, and tell no time left
                line += f"  {timedelta(seconds=round((args.total_timesteps - step) / speed))} left"
        say(line, self.run.stopped)
        self.shown, self.shown_at = step, now
        for name, value in (row | self.run.agent.losses).items() if self.writer else ():
            self.writer.add_scalar(name, value, step)


def train(args: Arguments) -> Path:
    """Train a run, or go on training it, and return its directory. Raises InputError and RunError.

    The first SIGINT or SIGTERM, or a reader of the output that goes away, ends the episode, writes a checkpoint, then
    raises KeyboardInterrupt or SystemExit. Sets the number of torch's threads and flushes denormals, for the process.
    """
    args.validate()
    asked, args = args, resolve(args)
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)  # what decays towards zero becomes denormal, which slows a CPU many times over
    directory, formers = run_directory(args), {}
    if is_finished(args):
        print(f"{directory} is finished already: another --seed or --results-dir makes a new run", flush=True)
        return directory
    run = Run(args)
    if args.sparsity != asked.sparsity:
        lambdas = f"the paper has no lambda for {args.env} with these --hidden"
        print(f"{lambdas}: --sparsity {args.sparsity} instead", flush=True)

    def stop(number: int, frame) -> None:
        run.stopped.append(signal.Signals(number))
        former = formers.get(number)
        signal.signal(number, former if callable(former) else signal.SIG_DFL)
        now = f"again stops now and goes on from step {run.saved_step:,}"
        with suppress(OSError):  # no print, which this signal may have interrupted
            os.write(2, f"stopping after this evaluation and episode; {now}\n".encode())

    def leave_if_stopped() -> None:
        if run.stopped:
            raise KeyboardInterrupt if run.stopped[0] == signal.SIGINT else SystemExit(128 + run.stopped[0])

    with ExitStack() as closing:
        with reported_as(InputError, f"cannot use {directory}:", OSError):
            directory.resolve().mkdir(parents=True, exist_ok=True)  # also where a link leads to nothing so far
            lock = closing.enter_context(open(directory / "lock", "w"))
        with reported_as(InputError, f"another process is training in {directory}:", OSError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if is_finished(args):  # by another process, meanwhile
            raise InputError(f"another process has just finished {directory}")
        run.load()
        run.note_provenance()
        if threading.current_thread() is threading.main_thread():  # the only one that may
            for number in (signal.SIGINT, signal.SIGTERM):  # the latter is Slurm's
                formers[number] = signal.signal(number, stop)
                closing.callback(signal.signal, number, formers[number])
        progress = Progress(run, closing)
        try:
            if not run.tables["evaluations"]:
                progress.evaluated(run.evaluate())
            while run.step < args.total_timesteps:
                run.advance()
                if run.step % args.eval_interval == 0 or run.step == args.total_timesteps:
                    progress.evaluated(run.evaluate())
                if run.step in args.snapshot_at:
                    run.save_policy(f"policy-{run.step}.npz")
                if run.between_episodes and (run.stopped or run.step - run.saved_step >= args.checkpoint_interval):
                    run.save()
                    if run.stopped:
                        stopped = f"stopped by {run.stopped[0].name} at step {run.step:,}"
                        say(f"{stopped}: the same command goes on from there", run.stopped)
                        leave_if_stopped()
            summary = run.finish()
        except RunError as error:
            raise RunError(f"after step {run.step:,}: {error}; the command goes on from {run.saved_step:,}") from error
        watch = f"python watch.py {shlex.quote(str(directory))}"
        final = f"final return {summary['final_return']:.1f} (mean of the last ten evaluations)"
        say(f"{final}, LCA {summary['lca']:.4f}: {watch}", run.stopped)
        leave_if_stopped()  # a caller's loop too
    return directory


def command_line(program: Callable[[str], None]) -> int:
    """Run a program, which is told its name, and return the exit code; its error becomes one line on stderr."""
    name = Path(sys.argv[0]).name
    try:
        program(name)
        print(end="", flush=True)  # what is left, here where a reader that has gone away is no failure
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:  # a reader that has gone away, such as head, wants no more
        discard_output()
        return 128 + signal.SIGPIPE
    except (InputError, RunError) as error:
        print(f"{name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    return 0


# Options of other programs: where they are given and unknown, the error says which program has them.
RECIPE = ("drop_by", "recycle_dormant", "step_exponent", "n_step", "layer_norm", "actor_sparsity", "critic_sparsity")
MOVED = dict.fromkeys(RECIPE, "high_sparsity.py") | {"dense_moments": "dense_moments.py"}


def main(arguments: type[Arguments] = Arguments) -> int:
    """Run the command line of an algorithm and return its exit code."""

    def program(name: str) -> None:
        for word in sys.argv[1:]:
            option = word.partition("=")[0].replace("-", "_").removeprefix("__").removeprefix("no_")
            if word.startswith("--") and option in MOVED and not hasattr(arguments, option):
                raise InputError(f"--{option.replace('_', '-')} is an option of {MOVED[option]}")
        args = tyro.cli(arguments, prog=name)
        print(describe(args)) if args.describe else train(args)

    return command_line(program)


if __name__ == "__main__":
    sys.exit(main())
