"""Dynamic sparse training for deep reinforcement learning (DS-TD3), in one file.

TD3 whose actor and critics are sparse from the first step to the last, after Sokar, Mocanu, Mocanu, Pechenizkiy and
Stone, "Dynamic Sparse Training for Deep Reinforcement Learning" (IJCAI 2022, arXiv 2106.04217). The paper adds four
pieces to TD3, and each is one function here:

1. ``erdos_renyi_topology``  a random sparse topology to start from,
2. ``adaptation_due``        a schedule that gives new connections time to grow,
3. ``drop_and_grow``         an adaptation that drops the weakest connections and grows as many new ones,
4. ``prune_target``          target networks that stay as sparse as the networks they follow.

Whoever only wants the paper reads from "Sparse topology" to "TD3". Two engines compute it: the masked one here, dense
matrices times 0/1 masks, and ``sparse_engine.py``, where cost follows the connections.
"""

import dataclasses
import fcntl
import importlib.util
import itertools
import json
import math
import os
import platform
import resource
import signal
import subprocess
import sys
import time
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple

import gymnasium
import numpy as np
import torch
import tyro
from numpy.random import Generator
from torch import Tensor
from tqdm import tqdm


class InputError(Exception):
    """What the user gave cannot be used. The message is one line; the program exits with code 2."""


class RunError(Exception):
    """The run cannot go on, though its input was good. The message is one line; the program exits with code 1."""


# --- Arguments --------------------------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class Arguments:
    """Train a TD3 agent that is sparse from the first step to the last (DS-TD3). Defaults are the paper's settings."""

    env: str = "HalfCheetah-v4"  # Gymnasium environment with a vector of observations and a bounded vector of actions
    method: Literal["ds-td3", "static-td3", "td3"] = "ds-td3"  # adapts its topology, keeps its first one, or is dense
    sparsity: float | None = None  # fraction of the hidden layers' connections left out
    er_lambda: tuple[float, ...] | None = None
    """instead: lambda * (inputs + outputs) connections for each hidden layer (neither: the paper's lambda, or 0.5)"""
    hidden: tuple[int, ...] = (256, 256)  # widths of the hidden layers
    adapt_interval: int = 1000  # e of the paper: steps between two adaptations of the topology
    drop_fraction: float = 0.05  # eta of the paper: fraction of a layer's connections that an adaptation replaces
    adapt_until: float = 0.95  # fraction of the run after which the topology stays as it is
    drop_by: Literal["magnitude", "contribution"] = "magnitude"
    """drop the smallest weights, as the paper, or the smallest products of weight and its input's standard deviation"""
    dense_moments: bool = False
    """as the authors' code: empty positions have moments too, and what grows keeps its step (masked engine alone)"""
    recycle_dormant: bool = False  # also draw hidden units anew that have died, when an adaptation is due

    seed: int = 0  # seed of everything random in the run; evaluations use seed + 100
    total_timesteps: int = 1_000_000  # environment steps of the run
    learning_starts: int = 25_000  # steps of uniform random actions before the first update
    initial_policy: Path | None = None  # act with this trained policy, and noise, before the first update (Figure 4)
    batch_size: int = 100  # transitions in a batch
    buffer_size: int = 1_000_000  # transitions that the replay buffer holds
    gamma: float = 0.99  # discount factor
    tau: float = 0.005  # rate at which target networks follow theirs
    policy_frequency: int = 2  # d of the paper: critic updates for each update of the actor and the targets
    updates_per_step: int = 1  # updates after each environment step, of the critics where the policy is delayed
    learning_rate: float = 1e-3  # Adam's learning rate, actor and critics
    step_exponent: float = 0.0  # a sparse layer learns at density ** -step_exponent times the learning rate
    weight_decay: float = 2e-4  # L2 penalty, actor and critics
    exploration_noise: float = 0.1  # standard deviation of the exploration noise, in units of half the action range
    policy_noise: float = 0.2  # standard deviation of the target policy's smoothing noise, in the same units
    noise_clip: float = 0.5  # bound of the smoothing noise, in the same units
    eval_interval: int = 5000  # steps between two evaluations
    eval_episodes: int = 10  # noise-free episodes in an evaluation
    checkpoint_interval: int = 10_000  # steps between two checkpoints; a stopped run also writes one
    engine: Literal["auto", "masked", "sparse"] = "auto"
    """masked: matrices times 0/1 masks in torch; sparse: connections alone (CPU); auto: as begun, sparse if it can"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: as begun, at first the CPU for the sparse engine, and for the masked one a GPU where there is one"""
    threads: int = 1  # CPU threads of the run; the sparse engine trains each critic in one of its own
    snapshot_at: tuple[int, ...] = ()  # steps at which the policy so far is also kept, as policy-STEP.npz
    results_dir: Path = Path("results")  # where run directories are made: RESULTS_DIR/ENV/VARIANT/seedN
    tensorboard: bool = False  # also write TensorBoard logs into the run directory
    track: bool = False  # also log to Weights & Biases
    describe: bool = False  # print layers, connections, FLOPs and bytes, then leave without training

    # How a run is stored and shown; none of these changes a number that it computes.
    PRESENTATION: ClassVar = ("results_dir", "checkpoint_interval", "snapshot_at", "tensorboard", "track", "describe")
    OUTPUTS_PER_ACTION: ClassVar = 1  # of the actor; another algorithm sets anew this and what follows
    ENGINE_MODULES: ClassVar = ("sparse_engine",)  # what --engine sparse needs of this project
    # The paper's lambda for its two sparse layers of 256. Ant-v4 observes 27 numbers where the paper's Ant-v3 had 111:
    # 40 would be more than a full layer, and 12.6 keeps the paper's density of the actor's first layer (0.52).
    PAPER_LAMBDA: ClassVar = {
        "HalfCheetah-v4": (7.0, 64.0),
        "Hopper-v4": (7.0, 64.0),
        "Walker2d-v4": (7.0, 64.0),
        "Ant-v4": (12.6, 64.0),
        "Humanoid-v4": (61.0, 64.0),
    }

    @property
    def dense(self) -> bool:
        """Whether the networks hold every connection."""
        return not self.method.startswith(("ds-", "static-"))

    @property
    def adapts(self) -> bool:
        """Whether the topology changes during training."""
        return self.method.startswith("ds-")

    @property
    def evaluation_seed(self) -> int:
        """Seed of every evaluation's start states, as in the authors' code."""
        return self.seed + 100

    @property
    def sparse_engine_fits(self) -> bool:
        """Whether the sparse engine is there and can train this agent."""
        needed = map(importlib.util.find_spec, (*self.ENGINE_MODULES, "numba", "scipy", "threadpoolctl"))
        return all(needed) and self.device != "cuda" and not self.dense_moments

    def _require(self, condition: bool, name: str, expected: str) -> None:
        if not condition:
            value = getattr(self, name)
            given = " ".join(map(str, value)) if isinstance(value, tuple) else value
            raise InputError(f"--{name.replace('_', '-')} must be {expected}, not {given}")

    def validate(self) -> None:
        """Raise InputError for the first argument that no run can use."""
        at_least_one = ("adapt_interval", "total_timesteps", "batch_size", "buffer_size", "policy_frequency", "threads")
        for name in (*at_least_one, "updates_per_step", "eval_interval", "eval_episodes", "checkpoint_interval"):
            self._require(getattr(self, name) > 0, name, "a positive whole number")
        for name in ("seed", "learning_starts", "weight_decay", "exploration_noise", "policy_noise", "noise_clip"):
            self._require(0 <= getattr(self, name) < math.inf, name, "zero or a positive number")
        for name in ("drop_fraction", "adapt_until", "gamma", "tau", "step_exponent"):
            self._require(0 <= getattr(self, name) <= 1, name, "between 0 and 1")
        self._require(0 < self.learning_rate < math.inf, "learning_rate", "a positive number")
        self._require(len(self.hidden) > 0 and min(self.hidden) > 0, "hidden", "one or more positive widths")
        learning = f"more than --learning-starts ({self.learning_starts}), where learning starts"
        self._require(self.total_timesteps > self.learning_starts, "total_timesteps", learning)
        snapshots = all(0 < step <= self.total_timesteps for step in self.snapshot_at)
        self._require(snapshots, "snapshot_at", f"steps of the run, 1 to {self.total_timesteps}")
        self._require(self.sparsity is None or 0 <= self.sparsity < 1, "sparsity", "at least 0 and below 1")
        if self.er_lambda is not None:
            proper = len(self.er_lambda) == len(self.hidden) and all(0 < value < math.inf for value in self.er_lambda)
            self._require(proper, "er_lambda", f"{len(self.hidden)} positive numbers, one for each hidden layer")
        if self.sparsity is not None and self.er_lambda is not None:
            raise InputError("--sparsity and --er-lambda both set the number of connections: give one of them")
        for name in ("sparsity", "er_lambda", "dense_moments"):
            if self.dense and getattr(self, name) not in (None, False):
                raise InputError(f"--method {self.method} is dense: leave out --{name.replace('_', '-')}")
        self._require(self.weight_decay or not self.recycle_dormant, "weight_decay", "positive with --recycle-dormant")
        left_out = f"left out with --method {self.method}, which drops nothing"
        self._require(self.adapts or self.drop_by == "magnitude", "drop_by", left_out)
        for flag, package in (("tensorboard", "tensorboard"), ("track", "wandb"), ("track", "tensorboard")):
            if getattr(self, flag) and importlib.util.find_spec(package) is None:
                raise InputError(f"--{flag} needs the package {package}: pip install {package}")

    def agent_class(self) -> type["TD3"]:
        """Return the class of agent to train. Raises InputError where machine or arguments do not allow it."""
        if self.device == "cuda" and not torch.cuda.is_available():
            reason = f"needs a GPU that torch {torch.__version__} can use, and there is none: choose --device cpu"
            raise InputError(f"--device cuda {reason}")
        if self.engine == "masked":
            return MaskedTD3
        if not self.sparse_engine_fits:
            modules = " and ".join(f"{module}.py" for module in self.ENGINE_MODULES)
            raise InputError(f"--engine sparse needs a CPU, {modules} with all packages, and no --dense-moments")
        from sparse_engine import SparseTD3

        return SparseTD3


def with_topology(args: Arguments) -> Arguments:
    """Fill in how many connections there are, where the user has not said: the paper's lambda, or half of all."""
    if args.dense or args.sparsity is not None or args.er_lambda is not None:
        return args
    if args.env in args.PAPER_LAMBDA and args.hidden == (256, 256):
        return dataclasses.replace(args, er_lambda=args.PAPER_LAMBDA[args.env])
    return dataclasses.replace(args, sparsity=0.5)


def resolve(args: Arguments) -> Arguments:
    """Fill in all that is left open, engine and device as the run was begun. Raises InputError when that is damaged."""
    args = with_topology(args)
    begun = RunDirectory(args).begun_with()
    if args.engine == "auto":
        args = dataclasses.replace(args, engine=begun.get("engine", "sparse" if args.sparse_engine_fits else "masked"))
    if args.device == "auto":
        gpu = args.engine == "masked" and torch.cuda.is_available()
        args = dataclasses.replace(args, device=begun.get("device", "cuda" if gpu else "cpu"))
    return args


def variant(args: Arguments) -> str:
    """Name resolved arguments by their method and whatever differs from the paper's setting: "ds-td3_sparsity=0.8"."""
    papers = with_topology(type(args)(env=args.env, method=args.method))
    unnamed = ("env", "method", "seed", "device", "engine", "threads", *args.PRESENTATION)
    name = args.method
    for field in dataclasses.fields(args):
        value = getattr(args, field.name)
        if field.name not in unnamed and value is not None and value != getattr(papers, field.name):
            value = ",".join(f"{v:g}" for v in value) if isinstance(value, tuple) else value
            shown = value.stem if isinstance(value, Path) else value
            name += f"_{field.name.replace('_', '-')}={shown}"
    return name


# --- Sparse topology: the four pieces of the paper --------------------------------------------------------------------
# A weight matrix is [..., inputs, outputs]; leading axes are independent networks, such as the twin critics. A mask of
# the same shape is 1 where the topology has a connection and 0 elsewhere. Masked weights are zero.

DORMANT = 1e-6  # magnitude below which all incoming weights of a unit together show that it has died
CONTRIBUTION_SAMPLES = 1000  # transitions over which contributions are measured; a batch of 100 gained less on Ant


def count_connections(widths: list[int], sparsity: float | None = None, er_lambda: tuple | None = None) -> list[int]:
    """Count the connections of each layer of one network (Erdős-Rényi initialization), inputs first in ``widths``.

    The paper gives layer l between n_{l-1} and n_l units ``lambda_l * (n_l + n_{l-1})`` connections in expectation,
    each with its own coin; here the count itself is fixed, so that two seeds train networks of the same size.
    ``sparsity`` instead solves for one lambda, shared by all layers, that leaves the sparse layers together
    ``1 - sparsity`` of their connections, no layer above full. The output layer is dense, and so is every layer where
    neither is given. Raises InputError when a layer would have no connection.
    """
    shapes = list(itertools.pairwise(widths))
    full = np.array([inputs * outputs for inputs, outputs in shapes[:-1]], dtype=float)
    units = np.array([inputs + outputs for inputs, outputs in shapes[:-1]], dtype=float)
    if er_lambda is None:
        # The total is piecewise linear in a shared lambda, with a kink where a layer fills: interpolation inverts it.
        kinks = np.sort(np.append(0, full / units))
        totals = [np.minimum(kink * units, full).sum() for kink in kinks]
        er_lambda = np.interp((1 - (sparsity or 0)) * full.sum(), totals, kinks)
    counts = np.minimum(er_lambda * units, full)
    rounded = np.diff(np.floor(np.cumsum(counts) + 0.5), prepend=0).astype(int)  # of running sums: the total is exact
    if rounded.min() < 1:
        inputs, outputs = shapes[rounded.argmin()]
        raise InputError(f"--sparsity or --er-lambda leaves the layer of {inputs} x {outputs} without a connection")
    return [*rounded.tolist(), widths[-2] * widths[-1]]


def erdos_renyi_topology(shape: tuple[int, ...], connections: int, rng: Generator) -> np.ndarray:
    """Draw the mask of one layer: piece 1, the Erdős-Rényi initialization.

    Each network of ``shape`` [..., inputs, outputs] gets ``connections`` ones, every such topology equally likely.
    """
    *networks, inputs, outputs = shape
    mask = np.zeros((*networks, inputs * outputs), dtype=np.float32)
    mask[..., :connections] = 1
    return rng.permuted(mask, axis=-1).reshape(shape)


def adaptation_due(update: int, period: int, args: Arguments) -> bool:
    """Tell whether a network that learns every ``period`` updates is adapted after one: piece 2, the schedule.

    An adaptation is due every ``adapt_interval`` (e) steps rather than at every step, since a new connection needs
    time to grow before its magnitude says anything of its worth. A network that does not learn at that very step adapts
    when it learns next. Nothing changes any more in the last ``1 - adapt_until`` of a run, as in the authors' code.
    """
    interval = args.adapt_interval * args.updates_per_step
    last = args.adapt_until * args.total_timesteps * args.updates_per_step
    return update <= last and update // interval > (update - period) // interval


def _networks(tensor: Tensor) -> Tensor:
    """View a stack [..., inputs, outputs] as [networks, inputs * outputs]; what changes there changes here."""
    return tensor.view(-1, tensor.shape[-2] * tensor.shape[-1])


def drop_and_grow(weight: Tensor, mask: Tensor, drop_fraction: float, rng: Generator) -> tuple[Tensor, Tensor]:
    """Choose which connections of a layer go and where new ones come: piece 3, the adaptation (the SET rule).

    Drops the fraction ``drop_fraction`` (eta) of the positive weights, zero among them, and of the negative ones, those
    nearest to zero; among equals the first position goes first. Then grows as many connections, uniformly among the
    positions that hold none, those just dropped included. A full layer has nowhere else to grow and stays as it is.
    Takes weights, or their ``contributions``, and mask [..., inputs, outputs] and returns two masks of that shape: the
    connections that were kept and those that were grown, together as many as before.
    """
    kept, grown = mask.clone(), torch.zeros_like(mask)
    for w, k, g in zip(_networks(weight), _networks(kept), _networks(grown), strict=True):
        connected = k.nonzero().squeeze(-1)
        if len(connected) == len(k):
            continue
        for signed in (connected[w[connected] >= 0], connected[w[connected] < 0]):
            weakest_first = w[signed].abs().argsort(stable=True)
            k[signed[weakest_first[: round(drop_fraction * len(signed))]]] = 0
        empty = (k == 0).nonzero().squeeze(-1)
        dropped = len(connected) - int(k.sum())
        g[empty[torch.from_numpy(rng.choice(len(empty), dropped, replace=False)).to(empty.device)]] = 1
    return kept, grown


def target_support(target: Tensor, mask: Tensor) -> Tensor:
    """List flat positions [..., positions] possibly non-zero in a target until ``mask`` changes: 3x faster to prune."""
    reachable = ((target != 0) | (mask != 0)).flatten(-2)
    order = reachable.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)
    return order[..., : int(reachable.sum(-1).max())].contiguous()  # where stacked networks differ, some stay zero


def prune_target(target: Tensor, support: Tensor, connections: int) -> None:
    """Drop a target layer's smallest weights until it has ``connections`` non-zeros: piece 4, the target's sparsity.

    The soft update mixes two topologies, the network's and the target's own, so without this a target would slowly
    become dense. ``target`` is [..., inputs, outputs] and is changed in place; ``support``, from ``target_support``,
    are the positions where it can be non-zero. A layer with no more than ``connections`` of them is left alone.
    """
    surplus = support.shape[-1] - connections  # counts zeros, the smallest of all, before it takes any weight
    if surplus <= 0:
        return
    for weights, positions in zip(_networks(target), support.view(-1, support.shape[-1]), strict=True):
        smallest = weights.index_select(0, positions).abs().topk(surplus, largest=False, sorted=False).indices
        weights.index_fill_(0, positions.index_select(0, smallest), 0)


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


def contributions(layers: list[Layer], x: Tensor) -> list[Tensor]:
    """Return the weights of each layer but the last, times the standard deviations of the inputs that they weigh.

    Those are over ``x`` [..., batch, inputs]. A velocity that reaches ten moves a unit by a small weight as far as an
    angle does by a large one: magnitude alone takes its connections away. After Wanda (arXiv 2306.11695), which
    measures by the norm.
    """
    worth = []
    for layer in layers[:-1]:
        change = x - x[..., :1, :]  # so that an input that never changes deviates by exactly zero in either engine
        worth.append(layer.weight * change.std(dim=-2, correction=0).unsqueeze(-1))
        x = torch.relu(forward([layer], x))
    return worth


def stretch(action: np.ndarray | Tensor, low: np.ndarray | Tensor, high: np.ndarray | Tensor) -> np.ndarray | Tensor:
    """Stretch actions in [-1, 1] to their bounds, which rounding alone could leave."""
    return (action * (high - low) / 2 + (high + low) / 2).clip(low, high)


def policy(layers: list[Layer], observation: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Return an actor's actions [..., batch, actions], within [low, high], for [..., batch, observations]."""
    return stretch(torch.tanh(forward(layers, observation)), low, high)


def step_scale(mask: np.ndarray | Tensor, args: Arguments) -> float:
    """Return the factor of Adam's steps in a layer's weights (with exponent 1, that of SμPar, arXiv 2405.15743)."""
    return float(mask.sum() / math.prod(mask.shape)) ** -args.step_exponent


def is_dormant(layer: Layer) -> Tensor:
    """Return which units [..., 1, outputs] have died: their incoming weights have vanished, and no bias opens them."""
    return (layer.weight.abs().sum(-2, keepdim=True) < DORMANT) & (layer.bias <= 0)


class MaskedNetwork:
    """A sparse network as dense matrices and 0/1 masks, with its Adam optimizer and its target network.

    No gradient, moment or weight decay reaches a position without a connection, and a grown one starts at zero with
    zero moments, as where connections alone are stored; Adam's bias correction goes on with the network's age. With
    ``--dense-moments``, as in the authors' code, Adam steps at empty positions too, and what grows there keeps it.
    """

    def __init__(self, layers: list[Layer], args: Arguments):
        self.args = args
        self.layers = [Layer(*(torch.tensor(array, device=args.device) for array in layer)) for layer in layers]
        self.target = [Layer(*(tensor.clone() for tensor in layer)) for layer in self.layers]  # their masks go unused
        self.initial_masks = [layer.mask.clone() for layer in self.layers]
        self.connections = [int(_networks(layer.mask)[0].sum()) for layer in self.layers]
        # Until the first adaptation a target shares its network's topology and needs no pruning.
        self.supports = [torch.empty(0, dtype=torch.int64, device=args.device) for _ in self.layers]
        self.parameters = [tensor.requires_grad_() for layer in self.layers for tensor in (layer.weight, layer.bias)]
        rates: dict[float, list[Tensor]] = {}
        for layer in self.layers:
            for scale, tensor in ((step_scale(layer.mask, args), layer.weight), (1.0, layer.bias)):
                rates.setdefault(args.learning_rate * scale, []).append(tensor)
        groups = [{"params": tensors, "lr": rate} for rate, tensors in rates.items()]
        self.optimizer = torch.optim.Adam(groups, weight_decay=args.weight_decay, fused=True)
        for p in self.parameters:  # Adam makes its state at its first step; checkpoints need it from the start
            moments = {name: torch.zeros_like(p, requires_grad=False) for name in ("exp_avg", "exp_avg_sq")}
            self.optimizer.state[p] = {"step": torch.zeros((), device=p.device), **moments}

    def minimize(self, loss: Tensor) -> None:
        """Take one Adam step down the gradient of ``loss``, within the topology."""
        # Not backward(): the actor's loss also runs through the critics, whose gradients are not wanted.
        for parameter, gradient in zip(self.parameters, torch.autograd.grad(loss, self.parameters), strict=True):
            parameter.grad = gradient
        if not self.args.dense_moments:
            for layer in self.layers:
                layer.weight.grad.mul_(layer.mask)
        self.optimizer.step()
        if self.args.dense_moments:
            self.unmasked = [layer.weight.detach().clone() for layer in self.layers]
            for layer in self.layers:
                layer.weight.detach().mul_(layer.mask)

    @torch.no_grad()
    def adapt(self, rng: Generator, x: np.ndarray | None = None) -> None:
        """Adapt the topology of every sparse layer (drop and grow), right after a step of ``minimize``.

        Drops by contribution over ``x`` [..., batch, columns], whose first columns are the network's inputs, or
        without it by magnitude.
        """
        worth = [layer.weight for layer in self.layers]
        if x is not None:
            inputs = torch.from_numpy(x[..., : self.layers[0].weight.shape[-2]]).to(self.args.device)
            worth = contributions(self.layers, inputs)
        for index, layer in enumerate(self.layers[:-1]):
            kept, grown = drop_and_grow(worth[index], layer.mask, self.args.drop_fraction, rng)
            layer.mask.copy_(kept + grown)
            if self.args.dense_moments:
                layer.weight.copy_(self.unmasked[index] * layer.mask)
            else:
                state = self.optimizer.state[layer.weight]
                for tensor in (layer.weight, state["exp_avg"], state["exp_avg_sq"]):
                    tensor.mul_(kept)
            self.supports[index] = target_support(self.target[index].weight, layer.mask)

    @torch.no_grad()
    def recycle(self, rng: Generator) -> None:
        """Draw incoming weights and bias of each dormant hidden unit anew, as at the start (after arXiv 2302.12902).

        A unit that nothing activates has no gradient; weight decay takes all its weights to zero, where connections
        grown into it stay as well. Its outgoing ones have decayed too, so that nothing changes at once.
        """
        for layer in self.layers[:-1]:
            dormant = is_dormant(layer)
            for tensor, there in ((layer.weight, dormant & (layer.mask == 1)), (layer.bias, dormant)):
                tensor[there] = tensor.new_tensor(initial_values(layer.weight.shape[-2], int(there.sum()), rng))
                for moment in ("exp_avg", "exp_avg_sq"):
                    self.optimizer.state[tensor][moment][there] = 0

    @torch.no_grad()
    def update_target(self) -> None:
        """Move the target a step ``tau`` towards the network, then prune it back to the network's sparsity."""
        layers = zip(self.layers, self.target, self.supports, self.connections, strict=True)
        for layer, target, support, connections in layers:
            target.weight.lerp_(layer.weight, self.args.tau)
            target.bias.lerp_(layer.bias, self.args.tau)
            prune_target(target.weight, support, connections)

    def layer_arrays(self) -> list[Layer]:
        """Return copies of the network's own layers (not the target's) as numpy arrays."""
        return [Layer(*(tensor.detach().cpu().numpy().copy() for tensor in layer)) for layer in self.layers]

    def topologies(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return the present and the first mask of each sparse layer (of the first network, where they are stacked)."""
        pairs = zip((layer.mask for layer in self.layers[:-1]), self.initial_masks, strict=False)
        return [tuple(mask.reshape(-1, *mask.shape[-2:])[0].cpu().numpy() for mask in pair) for pair in pairs]

    def state(self) -> dict[str, np.ndarray]:
        """Return everything that training changes, as numpy arrays by name."""
        return {f"{number}": tensor.detach().cpu().numpy() for number, tensor in enumerate(self._tensors())}

    @torch.no_grad()
    def load_state(self, state: dict[str, np.ndarray]) -> None:
        """Take over what ``state`` returned. Raises KeyError or ValueError when it belongs to another network."""
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
    """Transitions as float32 arrays [batch, ...]; ``terminated`` is 1 where no state follows, 0 at a time limit."""

    observation: np.ndarray
    action: np.ndarray
    reward: np.ndarray
    next_observation: np.ndarray
    terminated: np.ndarray


class ReplayBuffer:
    """The last ``capacity`` transitions, a float32 row each. Raises InputError where memory could never hold them."""

    def __init__(self, capacity: int, observations: int, actions: int):
        widths = Batch(observations, actions, 1, observations, 1)
        self.columns = [slice(end - width, end) for width, end in zip(widths, np.cumsum(widths).tolist(), strict=True)]
        self.added = 0  # transitions so far, the overwritten ones too
        try:
            self.rows = np.zeros((capacity, sum(widths)), dtype=np.float32)
        except (MemoryError, ValueError) as error:
            raise InputError(f"--buffer-size {capacity} is more than this machine's memory holds") from error

    def add(self, transition: Batch) -> None:
        """Store a transition, over the oldest one when the buffer is full."""
        self.rows[self.added % len(self.rows)] = np.concatenate(transition)
        self.added += 1

    def sample(self, batch_size: int, rng: Generator) -> Batch:
        """Draw a batch uniformly, with replacement."""
        rows = self.rows[self.draw(batch_size, rng)]
        return Batch(*(rows[:, columns] for columns in self.columns))

    def draw(self, batch_size: int, rng: Generator) -> np.ndarray:
        """Draw the numbers of as many rows."""
        return rng.integers(min(self.added, len(self.rows)), size=batch_size)


class TD3:
    """Twin delayed DDPG, as far as both engines share it; theirs add ``act``, ``update_critics`` and ``update_actor``.

    A run asks any agent for ``networks`` (each with ``topologies``), ``losses`` of the last update, ``act``,
    ``explore``, ``learn``, ``policy_layers``, ``state`` and ``load_state``.
    """

    def __init__(self, network: type, actor: list[Layer], critics: list[Layer], bounds: tuple, args: Arguments):
        self.args, self.bounds = args, bounds
        self.actor, self.critics = network(actor, args), network(critics, args)
        self.networks = {"actor": self.actor, "critic": self.critics}
        self.losses: dict[str, float | Tensor] = {}

    def explore(self, observation: np.ndarray, rng: Generator, act: Callable | None = None) -> np.ndarray:
        """Return the action [actions] of the policy, or of ``act``, with exploration noise, within the bounds."""
        low, high = self.bounds
        noise = rng.standard_normal(low.shape, dtype=np.float32) * self.args.exploration_noise * (high - low) / 2
        return ((act or self.act)(observation) + noise).clip(low, high)

    def sample(self, buffer: ReplayBuffer, rng: Generator) -> Batch:
        """Draw a batch."""
        return buffer.sample(self.args.batch_size, rng)

    def learn(self, buffer: ReplayBuffer, step: int, rng: Generator) -> None:
        """Do the learning of one environment step: Algorithm 1 of the paper, from the sampled batch on."""
        updates, delay = self.args.updates_per_step, self.args.policy_frequency
        for update in range(updates * (step - 1) + 1, updates * step + 1):
            batch = self.sample(buffer, rng)
            noise = rng.standard_normal((self.args.batch_size, len(self.bounds[0])), dtype=self.bounds[0].dtype)
            self.update_critics(batch, noise)
            self.adapt(self.critics, buffer, update, 1, rng)
            if update % delay == 0:
                self.update_actor(batch)
                self.adapt(self.actor, buffer, update, delay, rng)
                self.actor.update_target()
                self.critics.update_target()

    def adapt(self, network, buffer: ReplayBuffer, update: int, period: int, rng: Generator) -> None:
        """Adapt a network that learns every ``period`` updates, if that is due after this one."""
        if adaptation_due(update, period, self.args):
            if self.args.adapts:
                by_contribution = self.args.drop_by == "contribution"
                network.adapt(rng, buffer.rows[buffer.draw(CONTRIBUTION_SAMPLES, rng)] if by_contribution else None)
            if self.args.recycle_dormant:
                network.recycle(rng)

    def policy_layers(self) -> list[Layer]:
        """Return copies of the layers whose outputs, through a tanh, are the deterministic actions."""
        return self.actor.layer_arrays()

    def state(self) -> dict[str, np.ndarray]:
        """Return everything that training changes, as numpy arrays by name."""
        return {f"{name}.{key}": a for name, network in self.networks.items() for key, a in network.state().items()}

    def load_state(self, state: dict[str, np.ndarray]) -> None:
        """Take over what ``state`` returned. Raises KeyError or ValueError when it belongs to another agent."""
        for name, network in self.networks.items():
            network.load_state({k.partition(".")[2]: a for k, a in state.items() if k.startswith(f"{name}.")})


class MaskedTD3(TD3):
    """TD3 on masked networks, on any torch device."""

    def __init__(self, actor: list[Layer], critics: list[Layer], bounds: tuple, args: Arguments):
        super().__init__(MaskedNetwork, actor, critics, bounds, args)
        self.low, self.high = (torch.tensor(bound, device=args.device) for bound in bounds)

    @torch.no_grad()
    def act(self, observation: np.ndarray) -> np.ndarray:
        """Return the deterministic action [actions] for one observation [observations]."""
        x = torch.from_numpy(observation.astype(np.float32)).to(self.args.device)
        return policy(self.actor.layers, x[None], self.low, self.high)[0].cpu().numpy()

    def update_critics(self, batch: Batch, noise: np.ndarray) -> None:
        """Fit both critics to the smaller target value; ``noise`` [batch, actions], unscaled, smooths the policy."""
        observation, action, reward, next_observation, terminated, noise = self._to_device(*batch, noise)
        with torch.no_grad():
            noise = (noise * self.args.policy_noise).clamp(-self.args.noise_clip, self.args.noise_clip)
            next_action = policy(self.actor.target, next_observation, self.low, self.high)
            next_action = (next_action + noise * (self.high - self.low) / 2).clamp(self.low, self.high)
            next_values = forward(self.critics.target, torch.cat([next_observation, next_action], dim=-1))
            target_value = reward + self.args.gamma * (1 - terminated) * next_values.amin(dim=-3)  # of both critics
        values = forward(self.critics.layers, torch.cat([observation, action], dim=-1))
        loss = (values - target_value).square().mean(dim=(-2, -1)).sum()
        self.critics.minimize(loss)
        self.losses |= {"critic_loss": loss.detach(), "value": values.detach().mean()}

    def update_actor(self, batch: Batch) -> None:
        """Move the actor towards actions that the first critic values more (deterministic policy gradient)."""
        (observation,) = self._to_device(batch.observation)
        first_critic = [Layer(*(tensor[..., 0, :, :] for tensor in layer)) for layer in self.critics.layers]
        action = policy(self.actor.layers, observation, self.low, self.high)
        loss = -forward(first_critic, torch.cat([observation, action], dim=-1)).mean()
        self.actor.minimize(loss)
        self.losses |= {"actor_loss": loss.detach()}

    def _to_device(self, *arrays: np.ndarray) -> list[Tensor]:
        return [torch.from_numpy(array).to(self.args.device) for array in arrays]


# --- Environment ------------------------------------------------------------------------------------------------------
class CheckedEnvironment(gymnasium.Wrapper):
    """Raises RunError where an environment fails, or where an action, an observation or a reward is not finite.

    Arrays are copied both ways: an environment may change the array that it has returned, or the action it was given.
    """

    def reset(self, **options) -> tuple[np.ndarray, dict]:
        """Begin an episode, and return its first observation [observations]."""
        observation, information = self._checked(self.env.reset, **options)
        return np.array(observation), information

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        """Act, and return observation, reward, terminated, truncated and information."""
        if not math.isfinite(action.sum()):
            raise RunError("the policy's action is not finite (the networks have diverged)")
        observation, reward, terminated, truncated, information = self._checked(self.env.step, action.copy())
        for name, total in (("an observation", observation.sum()), ("a reward", reward)):
            if not math.isfinite(total):
                raise RunError(f"{self.spec.id} returned {name} that is not finite")
        return np.array(observation), float(reward), bool(terminated), bool(truncated), information

    def _checked(self, function: Callable, *arguments, **options):
        try:
            return function(*arguments, **options)
        except Exception as error:  # an environment's own code can raise anything
            raise RunError(f"{self.spec.id} failed with {type(error).__name__}: {error}") from error


def make_environment(name: str, **options) -> gymnasium.Env:
    """Make an environment of Gymnasium. Raises InputError where there is none, or none with bounded vectors."""
    warnings.filterwarnings("ignore", message=".*is out of date.*")  # on purpose: the paper's tasks are the -v4 ones
    try:
        env = gymnasium.make(name, disable_env_checker=True, **options)
    except Exception as error:  # an environment's own code can raise anything
        reason, papers = " ".join(str(error).split()) or type(error).__name__, ", ".join(Arguments.PAPER_LAMBDA)
        raise InputError(f"environment {name} cannot be made (the paper's are {papers}): {reason}") from error
    for kind, space in (("observations", env.observation_space), ("actions", env.action_space)):
        if not isinstance(space, gymnasium.spaces.Box) or len(space.shape) != 1:
            raise InputError(f"{name} has {kind} in {space}: needed is a vector of real numbers (a Box of one axis)")
    if not env.action_space.is_bounded():
        raise InputError(f"{name} has unbounded actions: needed are a lower and an upper bound for each")
    return CheckedEnvironment(env)


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
def network_sizes(env: gymnasium.Env, args: Arguments) -> list[tuple[list[int], list[int]]]:
    """Return widths and connections of the layers of the actor and of each critic; InputError as count_connections."""
    observations, actions = env.observation_space.shape[0], env.action_space.shape[0]
    both = [observations, *args.hidden, actions * args.OUTPUTS_PER_ACTION], [observations + actions, *args.hidden, 1]
    return [(widths, count_connections(widths, args.sparsity, args.er_lambda)) for widths in both]


def count_costs(env: gymnasium.Env, args: Arguments) -> dict[str, float]:
    """Count actor's and critics' connections (no biases, no targets) and training FLOPs, as the paper does.

    A backward pass is two forward ones, the critic's part in the actor's loss is left out, and every step counts.
    """

    def count(args: Arguments) -> tuple[int, float]:
        actor, critic = (sum(connections) for _, connections in network_sizes(env, args))
        per_sample = 6 * 2 * critic + 6 * actor / args.policy_frequency
        return actor + 2 * critic, args.total_timesteps * args.updates_per_step * args.batch_size * per_sample

    connections, flops = count(args)
    dense_connections, dense_flops = count(dataclasses.replace(args, sparsity=None, er_lambda=None, updates_per_step=1))
    counts = {"connections": connections, "sparsity": 1 - connections / dense_connections}
    return counts | {"training_flops": flops, "training_flops_of_dense": dense_flops}


def describe(env: gymnasium.Env, args: Arguments) -> str:
    """Tabulate each layer's shape, connections and sparsity, then #params, training FLOPs and the buffer's bytes."""
    lines = [f"{args.env}, {variant(args)}", f"{'layer':<17}{'shape':>12}{'connections':>14}{'sparsity':>10}"]
    for name, (widths, connections) in zip(("actor", "each critic"), network_sizes(env, args), strict=True):
        for layer, count in enumerate(connections):
            inputs, outputs = widths[layer : layer + 2]
            shape, sparsity = f"{inputs} x {outputs}", 1 - count / (inputs * outputs)
            lines.append(f"{name:<12}{layer + 1:<5}{shape:>12}{count:>14,}{sparsity:>10.3f}")
    costs = count_costs(env, args)
    share = costs["training_flops"] / costs["training_flops_of_dense"]
    transition_bytes = 4 * (2 * env.observation_space.shape[0] + env.action_space.shape[0] + 2)
    buffer_bytes = transition_bytes * min(args.buffer_size, args.total_timesteps)
    return "\n".join(lines) + (
        f"\n#params    {costs['connections']:,} connections (sparsity {costs['sparsity']:.2f})"
        f"\nFLOPs      {costs['training_flops']:.3g} for training, {share:.2f}x dense"
        f"\nbytes      {buffer_bytes / 1e6:,.0f} MB of replay buffer, once it is full"
    )


def learning_curve_area(returns: list[float], eval_interval: int, total_timesteps: int) -> float:
    """Return the paper's LCA: all evaluations' returns, the first before training, summed, over the number of steps.

    It evaluates every 5,000 steps; where evaluations lie otherwise apart, each counts for as many of those.
    """
    return sum(returns) * (eval_interval / 5000) / total_timesteps


# --- Run directory ----------------------------------------------------------------------------------------------------
@contextmanager
def writing(path: Path):
    """Turn a failure of the file system, such as a full disk, into a RunError that names ``path``."""
    try:
        yield
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror or error}; what was there before is whole") from error


@contextmanager
def replaced(path: Path):
    """Open a file to write whose content appears at ``path`` all at once when done, and not at all when it fails."""
    temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")
    try:
        with writing(path):
            with open(temporary, "wb") as file:
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


def read_json(path: Path, key: str):
    """Return one entry of what ``write_json`` wrote. Raises InputError when the file is damaged."""
    try:
        return json.loads(path.read_text())[key]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged: move its folder away, or choose a --results-dir") from error


def write_csv(path: Path, rows: list[dict]) -> None:
    """Replace ``path`` by ``rows`` as CSV with a header; floats keep every digit."""
    lines = [rows[0], *(row.values() for row in rows)]
    with replaced(path) as file:
        file.writelines(f"{','.join(map(str, line))}\n".encode() for line in lines)


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Read a file that np.savez wrote, executing nothing in it. Raises ValueError when it cannot be read."""
    try:
        with np.lib.npyio.NpzFile(path, allow_pickle=False) as stored:
            return dict(stored)
    except (OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(str(error)) from error


def save_policy(path: Path, actor: list[Layer], bounds: tuple, env: str) -> None:
    """Write a trained actor: for each layer a bit for each position, the connections' weights and the biases."""
    arrays = {"env": np.array(env), "low": bounds[0], "high": bounds[1]}
    for index, layer in enumerate(actor):
        connected = layer.mask.astype(bool)
        arrays[f"{index}.shape"] = np.array(layer.weight.shape)
        arrays[f"{index}.topology"] = np.packbits(connected)
        arrays[f"{index}.weight"] = layer.weight[connected]
        arrays[f"{index}.bias"] = layer.bias
    with replaced(path) as file:
        np.savez(file, **arrays)


def read_policy(path: Path, env: str) -> tuple[list[Layer], Tensor, Tensor]:
    """Read the layers and bounds [actions] of a policy for ``env``. Raises InputError when it is none."""
    try:
        arrays = read_arrays(path)
        layers = []
        for index in range(sum(name.endswith(".shape") for name in arrays)):
            shape = tuple(arrays[f"{index}.shape"])
            mask = torch.from_numpy(np.unpackbits(arrays[f"{index}.topology"], count=math.prod(shape)).reshape(shape))
            weight = torch.zeros(shape)
            weight[mask == 1] = torch.from_numpy(arrays[f"{index}.weight"])
            layers.append(Layer(weight, mask, torch.from_numpy(arrays[f"{index}.bias"])))
        if (trained_for := str(arrays["env"])) != env:
            raise InputError(f"{path} holds a policy for {trained_for}, not for {env}")
        return layers, torch.from_numpy(arrays["low"]), torch.from_numpy(arrays["high"])
    except (KeyError, ValueError) as error:
        raise InputError(f"{path} is no policy that can be read: {error}") from error


def load_policy(path: Path, env: str) -> Callable[[np.ndarray], np.ndarray]:
    """Read a policy for ``env`` as a function from observation to action. Raises InputError when it is none."""
    layers, low, high = read_policy(path, env)
    return lambda observation: policy(layers, torch.from_numpy(observation).float()[None], low, high)[0].numpy()


def provenance() -> dict:
    """Return the versions, the git commit of this file and the machine that a run is made with."""
    git, commit = ["git", "-C", str(Path(__file__).resolve().parent)], None
    questions = (["rev-parse", "HEAD"], ["diff", "--name-only", "HEAD", "--", "*.py"])  # new figures are no other code
    with suppress(OSError, subprocess.CalledProcessError):
        answers = [subprocess.run([*git, *q], capture_output=True, text=True, check=True).stdout for q in questions]
        commit = answers[0].strip() + ("-dirty" if answers[1] else "")
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    versions = {n: sys.modules[n].__version__ for n in ("torch", "gymnasium", "numpy", "mujoco") if n in sys.modules}
    processor = models[0].split(":")[1].strip() if models else platform.processor()
    machine = {"processor": processor, "cores": os.cpu_count(), "system": platform.platform()}
    return {"versions": {"python": platform.python_version()} | versions, "commit": commit, "machine": machine}


class RunDirectory:
    """The folder of a run, RESULTS_DIR/ENV/VARIANT/seedN: what it was begun with, its lock, whether it is finished."""

    def __init__(self, args: Arguments):
        self.path = args.results_dir / args.env.replace("/", "-") / variant(args) / f"seed{args.seed}"
        self.config = self.path / "config.json"
        self.arguments, self.defaults, self.id = self._stored(args), self._stored(type(args)()), None

    @staticmethod
    def _stored(args: Arguments) -> dict:
        values = {k: v for k, v in dataclasses.asdict(args).items() if k not in args.PRESENTATION}
        if args.initial_policy is not None:
            with suppress(OSError):  # what counts is its content; where that cannot be read, making the run fails
                content = zlib.crc32(args.initial_policy.read_bytes())
                values["initial_policy"] = f"{args.initial_policy.name} {content:x}"
        return json.loads(json.dumps(values, default=str))

    def begun_with(self) -> dict:
        """Return the arguments of the run that is here, if any; those added since are at their defaults."""
        try:
            return self.defaults | read_json(self.config, "arguments") if self.config.exists() else {}
        except PermissionError as error:
            raise InputError(f"cannot use {self.path}: {error.strerror}") from error

    def require_writable(self) -> None:
        """Raise InputError where the directory cannot be written, or made."""
        there = next(path for path in (self.path, *self.path.parents) if path.exists())
        if not (there.is_dir() and os.access(there, os.W_OK)):
            raise InputError(f"cannot use {self.path}: {there} is no folder that can be written")

    def require_same_arguments(self) -> None:
        """Raise InputError where a run that was begun with other arguments is here."""
        begun, ours = self.begun_with(), self.arguments
        if differing := [name for name in begun if begun[name] != ours.get(name)]:
            pairs = ", ".join(f"{name} {begun[name]} there and {ours.get(name)} here" for name in differing)
            raise InputError(f"{self.path} has a run with other arguments ({pairs}): choose another --results-dir")

    @contextmanager
    def opened(self):
        """Make the directory and keep others out. Raises InputError when it is in use, unusable or of another run."""
        with ExitStack() as stack:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                lock = stack.enter_context(open(self.path / "lock", "w"))
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise InputError(f"another process is training in {self.path}") from error
            except OSError as error:
                raise InputError(f"cannot use {self.path}: {error.strerror}") from error
            if not self.config.exists():
                write_json(self.config, {"id": os.urandom(4).hex(), "arguments": self.arguments, **provenance()})
            self.require_same_arguments()
            self.id = json.loads(self.config.read_text()).get("id")
            yield

    def resumed(self, step: int) -> None:
        """Where commit, versions or machine are not those of the run so far, say so and add them to its file."""
        config, now = json.loads(self.config.read_text()), provenance()
        sessions = config.get("resumed", [])
        if any(now[key] != [config, *sessions][-1].get(key) for key in now):
            print(f"from step {step:,} on, another commit, other versions or another machine make this run")
            write_json(self.config, config | {"resumed": [*sessions, {"step": step, **now}]})

    @property
    def finished(self) -> bool:
        """Whether the run is done. Raises InputError when its summary is damaged."""
        summary = self.path / "summary.json"
        return summary.exists() and read_json(summary, "steps") > 0

    def snapshot(self, step: int) -> Path:
        """Return where the policy after ``step`` steps is kept, if asked for."""
        return self.path / f"policy-{step}.npz"

    def remove_working_files(self) -> None:
        """Remove what only an unfinished run needs."""
        for name in ("checkpoint.npz", "transitions.bin", "lock"):
            (self.path / name).unlink(missing_ok=True)


# --- Training ---------------------------------------------------------------------------------------------------------
class Run:
    """A training run: everything that changes while it goes on, and the checkpoints that bring it back.

    Checkpoints are written between episodes: simulators hide state while one goes on (MuJoCo's solver, a time limit's
    counter), but an episode begins from its random generator alone. All else is drawn from one numpy generator.
    """

    def __init__(self, args: Arguments, directory: RunDirectory):
        self.args, self.directory = args, directory
        self.rng = np.random.default_rng(args.seed)
        self.env, self.evaluation_env = make_environment(args.env), make_environment(args.env)
        observations, actions = self.env.observation_space.shape[0], self.env.action_space
        self.bounds = (actions.low.astype(np.float32), actions.high.astype(np.float32))
        actor_sizes, critic_sizes = network_sizes(self.env, args)
        actor, critics = initial_layers(*actor_sizes, self.rng), initial_layers(*critic_sizes, self.rng, networks=(2,))
        self.costs = count_costs(self.env, args)
        self.buffer = ReplayBuffer(min(args.buffer_size, args.total_timesteps), observations, actions.shape[0])
        self.written, self.written_crc = 0, 0  # transitions on disk, and their checksum
        self.initial_policy = load_policy(args.initial_policy, args.env) if args.initial_policy else None
        self.agent = args.agent_class()(actor, critics, self.bounds, args)  # last: this may compile for minutes
        self.step, self.saved_step = 0, 0
        self.tables: dict[str, list[dict]] = {"evaluations": [], "timing": [], "topology": []}
        self.seconds = {"training": 0.0, "evaluation": 0.0}
        self.env.reset(seed=args.seed)  # seeds its generator, from whose state the first episode begins
        self.begin_episode()

    def begin_episode(self) -> None:
        """Reset the environment, so that a checkpoint written now can do it again."""
        self.episode_rng = self.env.unwrapped.np_random.bit_generator.state
        self.observation, _ = self.env.reset()
        self.between_episodes = True

    def advance(self) -> None:
        """Take one environment step and learn from it. Raises RunError when that fails."""
        started = time.perf_counter()
        observation, action = self.observation, self._action(self.observation)
        self.observation, reward, terminated, truncated, _ = self.env.step(action)
        self.buffer.add(Batch(observation, action, [reward], self.observation, [terminated]))
        self.step, self.between_episodes = self.step + 1, False
        if self.buffer.added - self.written == len(self.buffer.rows):  # before they are overwritten
            self._write_transitions()
        if terminated or truncated:
            self.begin_episode()
        if self.step > self.args.learning_starts:
            self.agent.learn(self.buffer, self.step, self.rng)
        self.seconds["training"] += time.perf_counter() - started

    def _action(self, observation: np.ndarray) -> np.ndarray:
        """Return a random action at first (or the initial policy's, with noise), then one that the agent explores."""
        if self.step >= self.args.learning_starts:
            return self.agent.explore(observation, self.rng)
        if self.initial_policy is not None:
            return self.agent.explore(observation, self.rng, self.initial_policy)
        return self.rng.uniform(*self.bounds).astype(np.float32)

    def evaluate(self) -> dict:
        """Evaluate the policy, extend the tables, write them, and return the evaluation's row."""
        started = time.perf_counter()
        episodes = evaluate(self.agent.act, self.evaluation_env, self.args.eval_episodes, self.args.evaluation_seed)
        returns, lengths = zip(*episodes, strict=True)
        self.seconds["evaluation"] += time.perf_counter() - started
        row = {"step": self.step, "return_mean": float(np.mean(returns)), "return_std": float(np.std(returns))}
        row |= {"return_min": min(returns), "return_max": max(returns), "length_mean": float(np.mean(lengths))}
        seconds = {f"{name}_seconds": round(value, 3) for name, value in self.seconds.items()}
        self.tables["evaluations"].append(row)
        self.tables["timing"].append({"step": self.step, **seconds})
        if self.args.adapts:
            self.tables["topology"] += self._topology_rows()
        for name, rows in self.tables.items():
            if rows:
                write_csv(self.directory.path / f"{name}.csv", rows)
        return row

    def _topology_rows(self) -> Iterator[dict]:
        """Describe how far the actor's and the first critic's topologies have moved from their first ones."""
        for name, network in self.agent.networks.items():
            for layer, (mask, initial) in enumerate(network.topologies(), start=1):
                alive = float((mask * initial).sum() / initial.sum())
                inputs = " ".join(map(str, mask.sum(-1).astype(int))) if layer == 1 else ""
                row = {"step": self.step, "network": name, "layer": layer}
                yield {**row, "initial_connections_alive": alive, "connections_per_input": inputs}

    def save(self) -> None:
        """Write a checkpoint. Until its last moment the previous one stays whole, whatever happens."""
        self._write_transitions()
        state = {"run": self.directory.id, "step": self.step, "transitions_crc": self.written_crc}
        state |= {"rng": self.rng.bit_generator.state, "episode_rng": self.episode_rng}
        state |= {"tables": self.tables, "seconds": self.seconds}
        with replaced(self.directory.path / "checkpoint.npz") as file:
            np.savez(file, state=np.array(json.dumps(state)), observation=self.observation, **self.agent.state())
        self.saved_step = self.step

    def _write_transitions(self) -> None:
        """Write the new transitions behind those on disk, over what a killed run left there after its checkpoint."""
        rows, path = self.buffer.rows, self.directory.path / "transitions.bin"
        new = rows[np.arange(self.written, self.buffer.added) % len(rows)]
        with writing(path), open(path, "ab") as file:
            file.truncate(self.written * rows[0].nbytes)
            file.write(new)
            file.flush()
            os.fsync(file.fileno())
        self.written, self.written_crc = self.buffer.added, zlib.crc32(new, self.written_crc)

    def load(self) -> None:
        """Return to the last checkpoint, if any. Raises InputError when it is damaged or of another run."""
        path = self.directory.path / "checkpoint.npz"
        if not path.exists():
            return
        try:
            arrays = read_arrays(path)
            state = json.loads(str(arrays["state"]))
            if state["run"] != self.directory.id:
                raise ValueError("it belongs to another run")
            self.agent.load_state(arrays)
            self._read_transitions(state["step"], state["transitions_crc"])
            self.rng.bit_generator.state = state["rng"]
            self.tables, self.seconds = state["tables"], state["seconds"]
            self.env.unwrapped.np_random.bit_generator.state = state["episode_rng"]
        except (OSError, KeyError, ValueError) as error:
            raise InputError(f"{path} cannot be resumed: {error}; move the folder away to start afresh") from error
        self.begin_episode()
        if not np.array_equal(self.observation, arrays["observation"]):
            reason = "begins an episode otherwise than before (not all its randomness comes from self.np_random)"
            raise RunError(f"{self.args.env} {reason}, so the run cannot be resumed")
        self.step, self.saved_step = state["step"], state["step"]
        self.directory.resumed(self.step)

    def _read_transitions(self, count: int, crc: int) -> None:
        """Fill the buffer from disk. Raises ValueError when the file is damaged."""
        stored = np.memmap(self.directory.path / "transitions.bin", mode="r")[: count * self.buffer.rows[0].nbytes]
        if zlib.crc32(stored) != crc:
            raise ValueError("transitions.bin beside it is damaged")
        rows = stored.view(np.float32).reshape(count, -1)
        kept = np.arange(max(0, count - len(self.buffer.rows)), count)
        self.buffer.rows[kept % len(self.buffer.rows)] = rows[kept]
        self.buffer.added, self.written, self.written_crc = count, count, crc

    def save_policy(self, path: Path) -> None:
        """Write the policy so far."""
        save_policy(path, self.agent.policy_layers(), self.bounds, self.args.env)

    def finish(self) -> dict:
        """Write the trained policy and the summary, remove what only an unfinished run needs, return the summary."""
        returns = [row["return_mean"] for row in self.tables["evaluations"]]
        lca = learning_curve_area(returns, self.args.eval_interval, self.args.total_timesteps)
        trained = returns[1:]  # the first evaluation is of the untrained policy, and in a short run among the last ten
        summary = self.costs | {"final_return": float(np.mean(trained[-10:])), "lca": lca, "evaluations": len(returns)}
        summary |= {"steps": self.step} | {f"{name}_seconds": round(value, 1) for name, value in self.seconds.items()}
        summary |= {"peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
        self.save_policy(self.directory.path / "policy.npz")
        write_json(self.directory.path / "summary.json", summary)
        self.directory.remove_working_files()
        return summary


def remember_stop_signals() -> list[signal.Signals]:
    """Return a list that Ctrl-C and SIGTERM (as Slurm sends) go to from now on; a second one stops at once."""
    received: list[signal.Signals] = []

    def remember(number: int, frame) -> None:
        received.append(signal.Signals(number))
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, remember)
    return received


class Progress:
    """Shows how a run goes, as a bar on a terminal and else as a line at each evaluation, and logs it where asked."""

    def __init__(self, run: Run):
        self.run, self.closing, self.writer = run, ExitStack(), None
        args, directory = run.args, run.directory
        if args.track:
            import wandb

            options = {"project": "dst-rl", "name": "-".join(directory.path.parts[-3:]), "config": directory.arguments}
            self.closing.callback(wandb.init(**options, id=directory.id, resume="allow", sync_tensorboard=True).finish)
        if args.tensorboard or args.track:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(directory.path / "tensorboard", purge_step=run.step + 1)
            self.closing.callback(self.writer.close)
        self.shown, self.shown_at = run.step, time.perf_counter()  # at the last line
        name = f"{args.env} {variant(args)} seed {args.seed}, {args.engine} engine on {args.device}"
        print(f"{name}: step {run.step:,} of {args.total_timesteps:,}", flush=True)
        layout = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} {rate_fmt} {remaining} left{postfix}"
        options = {"initial": run.step, "unit_scale": True, "bar_format": layout, "disable": None}
        self.bar = self.closing.enter_context(tqdm(total=args.total_timesteps, unit=" steps", **options))

    def evaluated(self, row: dict) -> None:
        """Show and log an evaluation's row of the table, and log the losses of the last update."""
        step, mean, std, sparsity = row["step"], row["return_mean"], row["return_std"], self.run.costs["sparsity"]
        if self.writer:
            for name, value in (row | self.run.agent.losses).items():
                self.writer.add_scalar(name, value, step)
        self.bar.set_postfix_str(f"return {mean:.0f}, sparsity {sparsity:.2f}")
        if self.bar.disable:
            now, args = time.perf_counter(), self.run.args
            # Steps before the first update are many times faster, and tell nothing of the time that is left.
            layout = "  {rate_fmt}" + "  {remaining} left" * (step > args.learning_starts)
            since = {"elapsed": now - self.shown_at, "initial": self.shown, "unit": " steps", "bar_format": layout}
            speed = tqdm.format_meter(step, args.total_timesteps, **since) if step > self.shown else ""
            print(f"step {step:>9,}  return {mean:9.1f} +- {std:7.1f}  sparsity {sparsity:.2f}{speed}", flush=True)
            self.shown, self.shown_at = step, now


def advance_to_the_end(run: Run, progress: Progress, stop_signals: list[signal.Signals]) -> None:
    """Train until all steps are made, or a signal says stop and a checkpoint is written; evaluate on the way."""
    args = run.args
    if not run.tables["evaluations"]:
        progress.evaluated(run.evaluate())
    while run.step < args.total_timesteps:
        run.advance()
        progress.bar.update()
        if run.step % args.eval_interval == 0 or run.step == args.total_timesteps:
            progress.evaluated(run.evaluate())
        if run.step in args.snapshot_at:
            run.save_policy(run.directory.snapshot(run.step))
        due = stop_signals or run.step - run.saved_step >= args.checkpoint_interval
        if due and run.between_episodes:
            run.save()
            if stop_signals:
                return


def train(args: Arguments) -> int:
    """Train, or go on training, as resolved arguments say. Returns the exit code; raises InputError and RunError."""
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)  # what decays towards zero becomes denormal, which slows a CPU many times over
    directory = RunDirectory(args)
    directory.require_same_arguments()
    directory.require_writable()
    # Making a run may compile, for minutes: one that is finished, or another's, need not. Only the lock makes it sure.
    run = None if directory.finished else Run(args, directory)
    with directory.opened():
        finished = directory.finished
        if not finished:
            run.load()
        step = args.total_timesteps if finished else run.step
        for late in (s for s in args.snapshot_at if s <= step and not directory.snapshot(s).exists()):
            print(f"--snapshot-at {late} comes too late: {directory.path} is at step {step:,}")
        if finished:
            directory.remove_working_files()
            print(f"{directory.path} is finished already: another --seed or --results-dir makes a new run")
            return 0
        stop_signals, progress = remember_stop_signals(), Progress(run)
        try:
            with progress.closing:
                advance_to_the_end(run, progress, stop_signals)
            if run.step < args.total_timesteps:
                print(f"stopped by {stop_signals[0].name} at step {run.step:,}: the same command goes on from there")
                return 128 + stop_signals[0]
            summary = run.finish()
        except RunError as error:
            raise RunError(f"after step {run.step:,}: {error}; the command goes on from {run.saved_step:,}") from error
    print(f"final return {summary['final_return']:.1f}, LCA {summary['lca']:.4f}: {directory.path}")
    print(f"to see it: python watch.py {directory.path}")
    return 0


def start(args: Arguments) -> int:
    """Train, or with ``--describe`` only say what, and return the exit code. Raises InputError and RunError."""
    args.validate()
    args = resolve(args)
    if args.describe:
        print(describe(make_environment(args.env), args))
        return 0
    return train(args)


def command_line(program: Callable[[str], int | None]) -> int:
    """Run a program, which is told its name, and return the exit code; its error becomes one line on stderr."""
    name = Path(sys.argv[0]).name
    try:
        return program(name) or 0
    except KeyboardInterrupt:  # where training has not begun
        return 128 + signal.SIGINT
    except (InputError, RunError) as error:
        print(f"{name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1


def main(arguments: type[Arguments] = Arguments) -> int:
    """Run the command line of an algorithm and return its exit code."""
    return command_line(lambda name: start(tyro.cli(arguments, prog=name)))


if __name__ == "__main__":
    sys.modules["dst_td3"] = sys.modules["__main__"]  # the module that sparse_engine imports is this one
    sys.exit(main())
