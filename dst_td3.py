"""Dynamic sparse training for deep reinforcement learning (DS-TD3), in one file.

TD3 whose actor and critics are sparse from the first step to the last, after Sokar, Mocanu, Mocanu, Pechenizkiy and
Stone, "Dynamic Sparse Training for Deep Reinforcement Learning" (IJCAI 2022, arXiv 2106.04217). The paper adds four
pieces to TD3, and each is one function here:

1. ``erdos_renyi_topology``  a random sparse topology to start from,
2. ``adaptation_due``        a schedule that gives new connections time to grow,
3. ``drop_and_grow``         an adaptation that drops the weakest connections and grows as many new ones,
4. ``prune_target``          target networks that stay as sparse as the networks they follow.

The file reads from top to bottom: arguments, topology, masked networks, TD3, environment, accounting, run directory,
training, watching. ``python dst_td3.py --env Hopper-v4 --sparsity 0.5`` trains, ``--describe`` only prints the
networks, ``--watch RUN_DIRECTORY`` shows what was trained.
"""

import copy
import csv
import dataclasses
import difflib
import fcntl
import hashlib
import importlib.util
import io
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
from collections.abc import Callable
from contextlib import ExitStack, closing, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Literal, NamedTuple

import gymnasium
import numpy as np
import torch
import tyro
from tqdm import tqdm

# The paper's lambda for its two sparse layers of 256. Ant-v4 observes 27 numbers where the paper's Ant-v3 had 111: 40
# would be more than a full layer, and 12.6 keeps the paper's density of the actor's first layer (0.52).
PAPER_LAMBDA = {
    "HalfCheetah-v4": (7.0, 64.0),
    "Hopper-v4": (7.0, 64.0),
    "Walker2d-v4": (7.0, 64.0),
    "Ant-v4": (12.6, 64.0),
    "Humanoid-v4": (61.0, 64.0),
}


class InputError(Exception):
    """What the user gave cannot be used. The message is one line; the program exits with code 2."""


class RunError(Exception):
    """The run cannot go on, though its input was good. The message is one line; the program exits with code 1."""


# ----------------------------------------------------------------------------------------------------------------------
# Arguments
# ----------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Train a TD3 agent that is sparse from the first step to the last (DS-TD3). Defaults are the paper's settings."""

    env: str = "HalfCheetah-v4"
    """Gymnasium environment with a vector of observations and a bounded vector of actions"""
    method: Literal["ds-td3", "static-td3", "td3"] = "ds-td3"
    """ds-td3 adapts its sparse topology, static-td3 keeps the first one, td3 is dense"""
    sparsity: float | None = None
    """fraction of the connections that the hidden layers of each network go without, spread over them by the
    Erdos-Renyi rule (default: the paper's --er-lambda for its five environments, elsewhere 0.5)"""
    er_lambda: tuple[float, ...] | None = None
    """the paper's lambda of each hidden layer, instead of --sparsity: lambda * (inputs + outputs) connections"""
    hidden: tuple[int, ...] = (256, 256)
    """widths of the hidden layers"""
    adapt_interval: int = 1000
    """e of the paper: steps between two adaptations of the topology"""
    drop_fraction: float = 0.05
    """eta of the paper: fraction of a layer's connections that an adaptation replaces"""
    adapt_until: float = 0.95
    """fraction of the run after which the topology stays as it is"""
    dense_moments: bool = False
    """as the authors' code: Adam's moments also follow the gradient where there is no connection"""

    seed: int = 0
    """seed of everything random in the run; evaluations use seed + 100"""
    total_timesteps: int = 1_000_000
    """environment steps of the run"""
    learning_starts: int = 25_000
    """steps of uniform random actions before the first update"""
    initial_policy: Path | None = None
    """act with this trained policy (and exploration noise) before the first update, not at random (Figure 4)"""
    batch_size: int = 100
    """transitions in a batch"""
    buffer_size: int = 1_000_000
    """transitions that the replay buffer holds"""
    gamma: float = 0.99
    """discount factor"""
    tau: float = 0.005
    """rate at which target networks follow theirs"""
    policy_frequency: int = 2
    """d of the paper: critic updates for each update of the actor and the targets"""
    learning_rate: float = 1e-3
    """Adam's learning rate, actor and critics"""
    weight_decay: float = 2e-4
    """L2 penalty, actor and critics"""
    exploration_noise: float = 0.1
    """standard deviation of the exploration noise, in units of half the action range"""
    policy_noise: float = 0.2
    """standard deviation of the target policy's smoothing noise, in units of half the action range"""
    noise_clip: float = 0.5
    """bound of the smoothing noise, in units of half the action range"""

    eval_interval: int = 5000
    """steps between two evaluations"""
    eval_episodes: int = 10
    """noise-free episodes in an evaluation"""
    checkpoint_interval: int = 10_000
    """steps between two checkpoints, at most buffer_size; a stopped run also writes one"""
    engine: Literal["auto", "masked", "sparse"] = "auto"
    """masked multiplies dense matrices by 0/1 masks in torch, sparse computes with the connections alone (sparse
    methods on the CPU); auto takes sparse where it can"""
    device: str = "auto"
    """cpu, cuda or auto (a GPU where there is one)"""
    threads: int = 1
    """CPU threads of the run; the sparse engine trains each critic in one of its own"""
    snapshot_at: tuple[int, ...] = ()
    """steps at which the policy so far is also kept, as policy-STEP.npz"""
    results_dir: Path = Path("results")
    """where run directories are made: RESULTS_DIR/ENV/VARIANT/seedN"""
    tensorboard: bool = False
    """also write TensorBoard logs into the run directory"""
    track: bool = False
    """also log to Weights & Biases"""
    describe: bool = False
    """print layers, connections, FLOPs and bytes, then leave without training"""
    watch: Path | None = None
    """instead of training, show the trained policy of this run directory in MuJoCo's viewer, on the start states of its
    evaluations, and print the returns"""
    video: Path | None = None
    """with --watch: write the --eval-episodes to this .mp4 or .gif file, which needs no screen"""


# How a run is stored and shown; none of these changes a number that it computes.
PRESENTATION = (
    *("results_dir", "checkpoint_interval", "snapshot_at", "tensorboard", "track"),
    *("describe", "watch", "video"),
)


def validate(args: Arguments) -> None:
    """Raise InputError for the first argument that no run can use."""

    def require(condition: bool, name: str, expected: str) -> None:
        if not condition:
            raise InputError(f"--{name.replace('_', '-')} must be {expected}, not {getattr(args, name)}")

    for name in ("adapt_interval", "total_timesteps", "batch_size", "buffer_size", "policy_frequency"):
        require(getattr(args, name) > 0, name, "a positive whole number")
    for name in ("eval_interval", "eval_episodes", "checkpoint_interval", "threads"):
        require(getattr(args, name) > 0, name, "a positive whole number")
    for name in ("seed", "learning_starts"):
        require(getattr(args, name) >= 0, name, "zero or a positive whole number")
    for name in ("weight_decay", "exploration_noise", "policy_noise", "noise_clip"):
        require(0 <= getattr(args, name) < math.inf, name, "zero or a positive number")
    for name in ("drop_fraction", "adapt_until", "gamma"):
        require(0 <= getattr(args, name) <= 1, name, "between 0 and 1")
    require(0 < args.learning_rate < math.inf, "learning_rate", "a positive number")
    require(0 < args.tau <= 1, "tau", "above 0 and at most 1")
    require(len(args.hidden) > 0 and min(args.hidden) > 0, "hidden", "one or more positive widths")
    if args.total_timesteps <= args.learning_starts:
        learning = f"--learning-starts ({args.learning_starts}), where learning starts"
        require(False, "total_timesteps", f"more than {learning}")
    if args.sparsity is not None:
        require(0 <= args.sparsity < 1, "sparsity", "at least 0 and below 1")
    if args.er_lambda is not None:
        expected = f"{len(args.hidden)} positive numbers, one for each hidden layer"
        proper = len(args.er_lambda) == len(args.hidden) and all(0 < value < math.inf for value in args.er_lambda)
        require(proper, "er_lambda", expected)
    if args.sparsity is not None and args.er_lambda is not None:
        raise InputError("--sparsity and --er-lambda both set the number of connections: give one of them")
    if args.video is not None and args.watch is None:
        raise InputError("--video shows a trained agent: say which with --watch RUN_DIRECTORY")
    if args.method == "td3" and (args.sparsity is not None or args.er_lambda is not None):
        raise InputError("--method td3 is dense: leave out --sparsity and --er-lambda, or choose ds-td3 or static-td3")
    if args.method == "td3" and args.dense_moments:
        raise InputError("--dense-moments changes nothing in a dense network: choose --method ds-td3 or static-td3")


def resolve(args: Arguments) -> Arguments:
    """Return the arguments with every "auto" and every default that depends on another argument filled in.

    Raises InputError for a device, an engine or a logger that this machine or this combination of arguments does not
    have.
    """
    device = args.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device not in ("cpu", "cuda"):
        raise InputError(f"--device must be cpu, cuda or auto, not {device}")
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda needs a GPU that torch can use, and there is none: choose cpu or auto")
    engine, obstacle = args.engine, None
    if args.dense_moments:
        obstacle = "--dense-moments needs --engine masked: the sparse engine has no moments to keep dense"
    elif device != "cpu" or args.method == "td3":
        obstacle = "--engine sparse trains ds-td3 and static-td3 on the CPU: choose --engine masked"
    elif any(importlib.util.find_spec(name) is None for name in ("sparse_engine", "numba")):
        obstacle = "--engine sparse needs sparse_engine.py beside this file and numba installed: choose --engine masked"
    if engine == "auto":
        engine = "masked" if obstacle else "sparse"
    if engine == "sparse" and obstacle:
        raise InputError(obstacle)
    for asked, flag, package in ((args.tensorboard, "tensorboard", "tensorboard"), (args.track, "track", "wandb")):
        if asked and importlib.util.find_spec(package) is None:
            raise InputError(f"--{flag} needs the package {package}: pip install {package}")
    sparsity, er_lambda = args.sparsity, args.er_lambda
    if args.method != "td3" and sparsity is None and er_lambda is None:
        if args.env in PAPER_LAMBDA and args.hidden == (256, 256):
            er_lambda = PAPER_LAMBDA[args.env]
        else:
            sparsity = 0.5
    return dataclasses.replace(args, device=device, engine=engine, sparsity=sparsity, er_lambda=er_lambda)


def variant(args: Arguments) -> str:
    """Name resolved arguments by their method and whatever differs from the paper's setting: "ds-td3_sparsity=0.8"."""
    papers = resolve(Arguments(env=args.env, method=args.method, device=args.device, engine=args.engine))
    unnamed = ("env", "method", "seed", "device", "engine", "threads", *PRESENTATION)
    name = args.method
    for field in dataclasses.fields(args):
        value = getattr(args, field.name)
        if field.name not in unnamed and value is not None and value != getattr(papers, field.name):
            if isinstance(value, tuple):
                value = ",".join(f"{v:g}" for v in value)
            shown = value.stem if isinstance(value, Path) else value
            name += f"_{field.name.replace('_', '-')}={shown}"
    return name


# ----------------------------------------------------------------------------------------------------------------------
# Sparse topology: the four pieces of the paper
#
# A weight matrix is [..., inputs, outputs]; leading axes are independent networks, such as the twin critics. A mask of
# the same shape is 1 where the topology has a connection and 0 elsewhere. Masked weights are zero.
# ----------------------------------------------------------------------------------------------------------------------


def count_connections(
    sizes: list[int], sparsity: float | None = None, er_lambda: tuple[float, ...] | None = None
) -> list[int]:
    """Count the connections of each layer of one network (Erdős-Rényi initialization).

    ``sizes`` are the widths of all layers, observations (and actions) first. The paper gives layer l between n_{l-1}
    and n_l units ``lambda_l * (n_l + n_{l-1})`` connections in expectation, each with its own coin; here the count
    itself is fixed, so that two seeds train networks of the same size. ``sparsity`` instead solves for one lambda,
    shared by all layers, that leaves the sparse layers together ``1 - sparsity`` of their connections, no layer above
    full. The output layer is dense, and so is every layer where neither is given.

    Raises InputError when a layer would have no connection.
    """
    shapes = list(itertools.pairwise(sizes))
    full = np.array([inputs * outputs for inputs, outputs in shapes[:-1]], dtype=float)
    units = np.array([inputs + outputs for inputs, outputs in shapes[:-1]], dtype=float)
    if er_lambda is not None:
        counts = np.minimum(np.array(er_lambda) * units, full)
    else:
        budget = (1 - (sparsity or 0)) * full.sum()
        saturated = np.zeros(len(full), dtype=bool)
        counts = full
        while not saturated.all():
            shared_lambda = (budget - full[saturated].sum()) / units[~saturated].sum()
            counts = np.where(saturated, full, shared_lambda * units)
            if not (counts > full).any():
                break
            saturated |= counts >= full
    # Rounding the running sum, not each count, keeps the total exact.
    rounded = np.diff(np.floor(np.cumsum(counts) + 0.5), prepend=0).astype(int)
    for layer, count in enumerate(rounded):
        if count < 1:
            asked = f"--sparsity {sparsity}" if er_lambda is None else f"--er-lambda {er_lambda[layer]:g}"
            raise InputError(
                f"{asked} leaves layer {layer + 1} ({shapes[layer][0]} x {shapes[layer][1]}) without a connection"
            )
    return [*rounded.tolist(), sizes[-2] * sizes[-1]]


def erdos_renyi_topology(shape: tuple[int, ...], connections: int, rng: np.random.Generator) -> np.ndarray:
    """Draw the mask of one layer: piece 1, the Erdős-Rényi initialization.

    Returns a float32 mask of ``shape`` [..., inputs, outputs] in which each network of the leading axes has exactly
    ``connections`` ones, every such topology being equally likely.
    """
    *networks, inputs, outputs = shape
    mask = np.zeros((*networks, inputs * outputs), dtype=np.float32)
    mask[..., :connections] = 1
    return rng.permuted(mask, axis=-1).reshape(shape)


def adaptation_due(step: int, period: int, args: Arguments) -> bool:
    """Tell whether a network that learns every ``period`` steps adapts its topology at ``step``: piece 2, the schedule.

    An adaptation is due every ``adapt_interval`` (e) steps rather than at every step, since a new connection needs
    time to grow before its magnitude says anything of its worth. A network that does not learn at that very step adapts
    when it learns next. Topologies no longer change in the last ``1 - adapt_until`` of a run, as in the authors' code.
    """
    if args.method != "ds-td3" or step > args.adapt_until * args.total_timesteps:
        return False
    return step // args.adapt_interval > (step - period) // args.adapt_interval


def drop_and_grow(
    weight: torch.Tensor, mask: torch.Tensor, drop_fraction: float, rng: np.random.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose which connections of a layer go and where new ones come: piece 3, the adaptation (the SET rule).

    Drops the fraction ``drop_fraction`` (eta) of the positive weights and of the negative weights, those nearest to
    zero; among equals the first position goes first. A weight of exactly zero counts as positive. Then grows as many
    connections, uniformly among the positions that hold none, those just dropped included. A full layer has nowhere
    else to grow and stays as it is.

    ``weight`` and ``mask`` are [..., inputs, outputs]. Returns two masks of that shape: the connections that were kept
    and the ones that were grown. Together they are the new topology, of as many connections as the old.
    """
    kept, grown = mask.clone(), torch.zeros_like(mask)
    for w, k, g in zip(_networks(weight), _networks(kept), _networks(grown), strict=True):
        connections = k.nonzero().squeeze(-1)
        if len(connections) == len(k):
            continue
        for signed in (connections[w[connections] >= 0], connections[w[connections] < 0]):
            weakest_first = w[signed].abs().argsort(stable=True)
            k[signed[weakest_first[: round(drop_fraction * len(signed))]]] = 0
        empty = (k == 0).nonzero().squeeze(-1)
        dropped = len(connections) - (len(k) - len(empty))
        g[empty[torch.from_numpy(rng.choice(len(empty), dropped, replace=False)).to(empty.device)]] = 1
    return kept, grown


def prune_target(target: torch.Tensor, support: torch.Tensor, connections: int) -> None:
    """Drop a target layer's smallest weights until it has ``connections`` non-zeros: piece 4, the target's sparsity.

    The soft update mixes two topologies, the network's and the target's own, so without this a target would slowly
    become dense. ``target`` is [..., inputs, outputs] and is changed in place; ``support``, from ``target_support``,
    are the positions where it can be non-zero. A layer with no more than ``connections`` of them is left alone.
    """
    # Zeros are the smallest of all, so the surplus of the support counts them before it takes any weight.
    surplus = max(0, support.shape[-1] - connections)
    for weights, positions in zip(_networks(target), support.view(-1, support.shape[-1]), strict=True):
        smallest = weights.index_select(0, positions).abs().topk(surplus, largest=False, sorted=False).indices
        weights.index_fill_(0, positions.index_select(0, smallest), 0)


def target_support(target: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """List the positions where a target layer is non-zero or soft updates can make it so, until ``mask`` changes again.

    Returns flat positions [..., positions]; networks of the leading axes that need fewer than the largest are filled up
    with positions that stay zero. Knowing them spares ``prune_target`` the search through the whole matrix.
    """
    reachable = ((target != 0) | (mask != 0)).flatten(-2)
    order = reachable.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)
    return order[..., : int(reachable.sum(-1).max())].contiguous()


def _networks(tensor: torch.Tensor) -> torch.Tensor:
    """View [..., inputs, outputs] as [networks, inputs * outputs]."""
    return tensor.view(-1, tensor.shape[-2] * tensor.shape[-1])


# ----------------------------------------------------------------------------------------------------------------------
# Masked networks
# ----------------------------------------------------------------------------------------------------------------------


class Layer(NamedTuple):
    """One layer's parameters: ``weight`` and ``mask`` [..., inputs, outputs], ``bias`` [..., 1, outputs]."""

    weight: np.ndarray | torch.Tensor
    mask: np.ndarray | torch.Tensor
    bias: np.ndarray | torch.Tensor


def initial_layers(
    sizes: list[int], connections: list[int], rng: np.random.Generator, networks: tuple[int, ...] = ()
) -> list[Layer]:
    """Draw the first topology and weights of a network, or of a stack of them with the leading axes ``networks``.

    Weights and biases are uniform within 1/sqrt(inputs), torch's own initialization of a linear layer.
    """
    layers = []
    for (inputs, outputs), count in zip(itertools.pairwise(sizes), connections, strict=True):
        bound = 1 / math.sqrt(inputs)
        mask = erdos_renyi_topology((*networks, inputs, outputs), count, rng)
        weight = rng.uniform(-bound, bound, mask.shape).astype(np.float32) * mask
        bias = rng.uniform(-bound, bound, (*networks, 1, outputs)).astype(np.float32)
        layers.append(Layer(weight, mask, bias))
    return layers


def forward(layers: list[Layer], x: torch.Tensor) -> torch.Tensor:
    """Apply an MLP with ReLU between its layers to ``x`` [..., batch, inputs]; returns [..., batch, outputs]."""
    for layer in layers[:-1]:
        x = torch.relu(x @ layer.weight + layer.bias)
    return x @ layers[-1].weight + layers[-1].bias


def policy(layers: list[Layer], observation: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """Return an actor's actions [..., batch, actions], within [low, high], for [..., batch, observations]."""
    return torch.tanh(forward(layers, observation)) * (high - low) / 2 + (high + low) / 2


class MaskedNetwork:
    """A sparse network as dense matrices and 0/1 masks, with its Adam optimizer and its target network.

    No gradient, no moment and no weight decay reaches a position without a connection, and a grown connection starts
    at zero with zero moments, as in a network that stores its connections alone. ``--dense-moments`` follows the
    authors' code instead: the moments track the dense gradient and the mask is applied to the weights afterwards.
    """

    def __init__(self, layers: list[Layer], args: Arguments):
        self.args = args
        self.layers = [Layer(*(torch.tensor(array, device=args.device) for array in layer)) for layer in layers]
        self.target = copy.deepcopy(self.layers)
        self.initial_masks = [layer.mask.clone() for layer in self.layers]
        self.connections = [int(_networks(layer.mask)[0].sum()) for layer in self.layers]
        # Until the first adaptation a target shares its network's topology and needs no pruning.
        self.supports: list[torch.Tensor | None] = [None] * len(self.layers)
        self.parameters = [tensor for layer in self.layers for tensor in (layer.weight, layer.bias)]
        for parameter in self.parameters:
            parameter.requires_grad_()
        self.optimizer = torch.optim.Adam(
            self.parameters, lr=args.learning_rate, weight_decay=args.weight_decay, fused=True
        )
        # Adam makes its state at its first step; checkpoints need it from the start.
        for p in self.parameters:
            moments = {name: torch.zeros_like(p, requires_grad=False) for name in ("exp_avg", "exp_avg_sq")}
            self.optimizer.state[p] = {"step": torch.zeros((), device=p.device), **moments}

    def minimize(self, loss: torch.Tensor) -> None:
        """Take one Adam step down the gradient of ``loss``, within the topology."""
        gradients = torch.autograd.grad(loss, self.parameters)
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        for layer in self.layers:
            if not self.args.dense_moments:
                layer.weight.grad.mul_(layer.mask)
        self.optimizer.step()
        if self.args.dense_moments:
            with torch.no_grad():
                for layer in self.layers:
                    layer.weight.mul_(layer.mask)

    @torch.no_grad()
    def adapt(self, rng: np.random.Generator) -> None:
        """Adapt the topology of every sparse layer (drop and grow)."""
        for index, layer in enumerate(self.layers[:-1]):
            kept, grown = drop_and_grow(layer.weight, layer.mask, self.args.drop_fraction, rng)
            layer.weight.mul_(kept)
            if not self.args.dense_moments:
                for moment in ("exp_avg", "exp_avg_sq"):
                    self.optimizer.state[layer.weight][moment].mul_(kept)
            layer.mask.copy_(kept + grown)
            self.supports[index] = target_support(self.target[index].weight, layer.mask)

    @torch.no_grad()
    def update_target(self) -> None:
        """Move the target a step ``tau`` towards the network, then prune it back to the network's sparsity."""
        for layer, target, support, connections in zip(
            self.layers, self.target, self.supports, self.connections, strict=True
        ):
            target.weight.lerp_(layer.weight, self.args.tau)
            target.bias.lerp_(layer.bias, self.args.tau)
            if support is not None:
                prune_target(target.weight, support, connections)

    def layer_arrays(self) -> list[Layer]:
        """Return copies of the network's own layers (not the target's) as numpy arrays."""
        return [Layer(*(tensor.detach().cpu().numpy() for tensor in layer)) for layer in self.layers]

    def topologies(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return the present and the first mask of each sparse layer (of the first network, where they are stacked)."""
        pairs = zip((layer.mask for layer in self.layers[:-1]), self.initial_masks, strict=False)
        return [tuple(mask.reshape(-1, *mask.shape[-2:])[0].cpu().numpy() for mask in pair) for pair in pairs]

    def state(self) -> dict[str, np.ndarray]:
        """Return everything that training changes, as numpy arrays by name."""
        supports = {f"{index}.support": s for index, s in enumerate(self.supports) if s is not None}
        return {name: tensor.detach().cpu().numpy() for name, tensor in (self._tensors() | supports).items()}

    @torch.no_grad()
    def load_state(self, state: dict[str, np.ndarray]) -> None:
        """Take over what ``state`` returned. Raises KeyError or ValueError when it belongs to another network."""
        for name, tensor in self._tensors().items():
            if state[name].shape != tensor.shape:
                raise ValueError(f"{name} has shape {state[name].shape}, not {tuple(tensor.shape)}")
            tensor.copy_(torch.from_numpy(state[name]))
        for index in range(len(self.layers)):
            if f"{index}.support" in state:
                self.supports[index] = torch.from_numpy(state[f"{index}.support"]).to(self.args.device)

    def _tensors(self) -> dict[str, torch.Tensor]:
        tensors = {}
        for index, (layer, target) in enumerate(zip(self.layers, self.target, strict=True)):
            tensors |= {f"{index}.{name}": tensor for name, tensor in layer._asdict().items()}
            tensors |= {f"{index}.target_weight": target.weight, f"{index}.target_bias": target.bias}
            tensors |= {f"{index}.initial_mask": self.initial_masks[index]}
            for name in ("weight", "bias"):
                state = self.optimizer.state[getattr(layer, name)]
                tensors |= {f"{index}.{name}_{key}": tensor for key, tensor in state.items()}
        return tensors


# ----------------------------------------------------------------------------------------------------------------------
# TD3
# ----------------------------------------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """Transitions as float32 arrays [batch, ...]; ``terminated`` is 1 where no state follows, 0 at a time limit."""

    observation: np.ndarray
    action: np.ndarray
    reward: np.ndarray
    next_observation: np.ndarray
    terminated: np.ndarray


class MaskedTD3:
    """Twin delayed DDPG on masked networks, on any torch device. It draws no random number of its own."""

    def __init__(
        self, actor: list[Layer], critics: list[Layer], bounds: tuple[np.ndarray, np.ndarray], args: Arguments
    ):
        self.args = args
        self.actor = MaskedNetwork(actor, args)
        self.critics = MaskedNetwork(critics, args)
        self.low, self.high = (torch.tensor(bound, device=args.device) for bound in bounds)
        self.losses: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def act(self, observation: np.ndarray) -> np.ndarray:
        """Return the deterministic action [actions] for one observation [observations]."""
        x = torch.from_numpy(observation.astype(np.float32)).to(self.args.device)
        return policy(self.actor.layers, x[None], self.low, self.high)[0].cpu().numpy()

    def update_critics(self, batch: Batch, noise: np.ndarray) -> None:
        """Fit both critics to the smaller of the target critics' values (clipped double Q-learning).

        ``noise`` [batch, actions] is standard normal; scaled and clipped, it smooths the target policy.
        """
        observation, action, reward, next_observation, terminated = self._to_device(*batch)
        with torch.no_grad():
            (noise,) = self._to_device(noise)
            noise = (noise * self.args.policy_noise).clamp(-self.args.noise_clip, self.args.noise_clip)
            next_action = policy(self.actor.target, next_observation, self.low, self.high)
            next_action = next_action + noise * (self.high - self.low) / 2
            next_action = torch.minimum(torch.maximum(next_action, self.low), self.high)
            next_values = forward(self.critics.target, torch.cat([next_observation, next_action], dim=-1))
            target_value = reward + self.args.gamma * (1 - terminated) * next_values.amin(dim=-3)
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

    def _to_device(self, *arrays: np.ndarray) -> list[torch.Tensor]:
        return [torch.from_numpy(array).to(self.args.device) for array in arrays]


def train_step(agent, batch: Batch, noise: np.ndarray, step: int, rng: np.random.Generator, args: Arguments) -> None:
    """Do the learning of one environment step: Algorithm 1 of the paper, from the sampled ``batch`` on.

    ``rng`` only places grown connections; ``noise`` is that of ``update_critics``.
    """
    agent.update_critics(batch, noise)
    if adaptation_due(step, 1, args):
        agent.critics.adapt(rng)
    if step % args.policy_frequency == 0:
        agent.update_actor(batch)
        if adaptation_due(step, args.policy_frequency, args):
            agent.actor.adapt(rng)
        agent.actor.update_target()
        agent.critics.update_target()


class ReplayBuffer:
    """The last ``capacity`` transitions, one float32 row each, so that a batch is a single gather.

    Memory is taken as rows fill up: ``4 * capacity * (2 * observations + actions + 2)`` bytes when full. Raises
    InputError where that is out of the question.
    """

    def __init__(self, capacity: int, observations: int, actions: int):
        widths = Batch(observations, actions, 1, observations, 1)
        self.columns = np.cumsum(widths)[:-1]
        try:
            self.rows = np.zeros((capacity, sum(widths)), dtype=np.float32)
        except MemoryError as error:
            raise InputError(f"--buffer-size {capacity} is more than this machine's memory holds") from error

    def add(self, index: int, transition: Batch) -> None:
        """Store transition number ``index``, over the oldest one when the buffer is full."""
        self.rows[index % len(self.rows)] = np.concatenate(transition)

    def sample(self, added: int, batch_size: int, rng: np.random.Generator) -> Batch:
        """Draw a batch uniformly, with replacement, from what the first ``added`` transitions left in the buffer."""
        rows = self.rows[rng.integers(min(added, len(self.rows)), size=batch_size)]
        return Batch(*np.split(rows, self.columns, axis=1))

    def places(self, start: int, stop: int) -> np.ndarray:
        """Return the row of each transition numbered ``start`` to ``stop - 1``, at most as many as the buffer holds."""
        return np.arange(start, stop) % len(self.rows)


# ----------------------------------------------------------------------------------------------------------------------
# Environment
# ----------------------------------------------------------------------------------------------------------------------


def make_environment(name: str, **options) -> gymnasium.Env:
    """Make a Gymnasium environment that TD3 can act in; ``options`` are those of ``gymnasium.make``.

    Raises InputError for an unknown name, for observations or actions that are no vectors, and for unbounded actions.
    """
    # The paper's tasks are the -v4 ones; that newer versions exist is nothing the user should act on.
    warnings.filterwarnings("ignore", message=".*is out of date.*")
    try:
        env = gymnasium.make(name, disable_env_checker=True, **options)
    except Exception as error:  # an environment's own code can raise anything
        if name in gymnasium.registry or ":" in name:
            reason = f"environment {name} cannot be made: {' '.join(str(error).split()) or type(error).__name__}"
            near = [other for other in PAPER_LAMBDA if other != name and other[:-1] == name[:-1]]
        else:
            reason = f"no environment {name}; see gymnasium.pprint_registry() for the known ones"
            near = difflib.get_close_matches(name, gymnasium.registry, n=4)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise InputError(f"{reason}{hint}") from error
    for kind, space in (("observations", env.observation_space), ("actions", env.action_space)):
        if not isinstance(space, gymnasium.spaces.Box) or len(space.shape) != 1:
            raise InputError(f"{name} has {kind} in {space}: TD3 needs a vector of real numbers (a Box of one axis)")
    if not env.action_space.is_bounded():
        raise InputError(f"{name} has unbounded actions: TD3 needs a lower and an upper bound for each")
    return env


class ReplayableEnvironment:
    """An environment that can be brought back to the middle of an episode, by giving it the episode's actions again.

    Simulators hide state (MuJoCo's solver warm start, a time limit's counter), so a copy of what they show would not
    go on to the same bytes. The state of the random generator before the reset and the actions since then do.
    """

    def __init__(self, env: gymnasium.Env, seed: int):
        self.env = env
        env.reset(seed=seed)
        self.reset()

    def reset(self) -> None:
        """Begin the next episode."""
        self.reset_from = self.env.unwrapped.np_random.bit_generator.state
        self.actions: list[np.ndarray] = []
        self.observation, _ = self.env.reset()

    def step(self, action: np.ndarray) -> tuple[float, bool, bool]:
        """Act, and return reward, terminated and truncated; ``observation`` becomes the next one."""
        self.actions.append(action)
        self.observation, reward, terminated, truncated, _ = self.env.step(action)
        return float(reward), bool(terminated), bool(truncated)

    def restore(self, reset_from: dict, actions: np.ndarray, observation: np.ndarray) -> None:
        """Return to where the episode stood. Raises RunError when the environment does not repeat itself."""
        self.env.unwrapped.np_random.bit_generator.state = reset_from
        self.reset()
        for action in actions:
            self.step(action)
        if not np.array_equal(self.observation, observation):
            raise RunError(
                f"{self.env.spec.id} gave other observations for the same actions, so its run cannot be resumed: all "
                "its randomness must come from self.np_random"
            )


def evaluate(
    act: Callable[[np.ndarray], np.ndarray],
    env: gymnasium.Env,
    episodes: int,
    seed: int | None,
    show: Callable[[], None] = lambda: None,
) -> tuple[list[float], list[int]]:
    """Return the returns and the lengths in steps of noise-free episodes, and call ``show`` after each reset and step.

    ``seed`` sets their start states; with None they go on from the environment's last ones.
    """
    returns, lengths = [], []
    for episode in range(episodes):
        observation, _ = env.reset(seed=seed if episode == 0 else None)
        show()
        total, length, done = 0.0, 0, False
        while not done:
            observation, reward, terminated, truncated, _ = env.step(act(observation))
            show()
            total, length, done = total + float(reward), length + 1, terminated or truncated
        returns.append(total)
        lengths.append(length)
    return returns, lengths


# ----------------------------------------------------------------------------------------------------------------------
# Accounting
# ----------------------------------------------------------------------------------------------------------------------


class NetworkSizes(NamedTuple):
    """The layer sizes and connections of the actor and of one of the two critics."""

    actor: list[int]
    critic: list[int]
    actor_connections: list[int]
    critic_connections: list[int]

    @property
    def connections(self) -> int:
        """#params of the paper: connections of the actor and both critics, without biases and targets."""
        return sum(self.actor_connections) + 2 * sum(self.critic_connections)

    @property
    def dense(self) -> "NetworkSizes":
        """The same networks with every connection."""
        return NetworkSizes(self.actor, self.critic, count_connections(self.actor), count_connections(self.critic))

    @property
    def sparsity(self) -> float:
        """Fraction of all connections, the dense output layers' included, that the agent goes without."""
        return 1 - self.connections / self.dense.connections

    @property
    def biases(self) -> int:
        """Biases of the actor and both critics."""
        return sum(self.actor[1:]) + 2 * sum(self.critic[1:])

    def training_flops(self, args: Arguments) -> float:
        """FLOPs of a training run as the paper counts them.

        Multiply and add count apart and a backward pass as two forward passes; left out are target networks and the
        critic's part in the actor's loss; updates count as if they ran at every step.
        """
        per_sample = 6 * 2 * sum(self.critic_connections) + 6 * sum(self.actor_connections) / args.policy_frequency
        return args.total_timesteps * args.batch_size * per_sample


def network_sizes(env: gymnasium.Env, args: Arguments) -> NetworkSizes:
    """Size the networks for an environment. Raises InputError as ``count_connections`` does."""
    observations, actions = env.observation_space.shape[0], env.action_space.shape[0]
    actor, critic = [observations, *args.hidden, actions], [observations + actions, *args.hidden, 1]
    counts = (count_connections(sizes, args.sparsity, args.er_lambda) for sizes in (actor, critic))
    return NetworkSizes(actor, critic, *counts)


def describe(env: gymnasium.Env, args: Arguments) -> str:
    """Tabulate each layer's shape, connections and sparsity, then #params, training FLOPs and bytes."""
    ours = network_sizes(env, args)
    full = ours.dense
    lines = [f"{args.env}, {variant(args)}", f"{'layer':<12}{'shape':>12}{'connections':>14}{'sparsity':>10}"]
    for name, sizes, counts in (
        ("actor", ours.actor, ours.actor_connections),
        ("critic 1", ours.critic, ours.critic_connections),
        ("critic 2", ours.critic, ours.critic_connections),
    ):
        for layer, ((inputs, outputs), count) in enumerate(
            zip(itertools.pairwise(sizes), counts, strict=True), start=1
        ):
            shape, sparsity = f"{inputs} x {outputs}", 1 - count / (inputs * outputs)
            lines.append(f"{f'{name} {layer}':<12}{shape:>12}{count:>14,}{sparsity:>10.3f}")
    flops, dense_flops = ours.training_flops(args), full.training_flops(args)
    # Each connection and bias has a weight, a gradient, two moments and a target weight, 4 bytes each; a mask is 4 more
    # for each position, an index 4 more for each connection and once again for the target's own topology.
    masked_bytes = 20 * (full.connections + full.biases) + 4 * full.connections
    sparse_bytes = 20 * (ours.connections + ours.biases) + 8 * ours.connections
    row_bytes = 4 * (2 * ours.actor[0] + ours.actor[-1] + 2)
    buffer_bytes = row_bytes * min(args.buffer_size, args.total_timesteps)
    lines += [
        f"#params    {ours.connections:,} connections of {full.connections:,} (sparsity {ours.sparsity:.2f})",
        f"FLOPs      {flops:.3g} for training, {flops / dense_flops:.2f}x dense",
        f"bytes      {masked_bytes / 1e6:.1f} MB of agent state with masks, {sparse_bytes / 1e6:.1f} MB as connections "
        f"alone, {buffer_bytes / 1e6:,.0f} MB of replay buffer (estimated)",
    ]
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------------------------------------
# Run directory
# ----------------------------------------------------------------------------------------------------------------------


@contextmanager
def replaced(path: Path):
    """Open a file to write whose content appears at ``path`` all at once when done, and not at all when it fails."""
    temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, content: dict) -> None:
    """Replace ``path`` by ``content`` as JSON."""
    with replaced(path) as file:
        file.write((json.dumps(content, indent=2) + "\n").encode())


def write_csv(path: Path, rows: list[dict]) -> None:
    """Replace ``path`` by ``rows`` as CSV with a header; floats keep every digit."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    with replaced(path) as file:
        file.write(text.getvalue().encode())


def save_policy(path: Path, actor: list[Layer], bounds: tuple[np.ndarray, np.ndarray], env: str) -> None:
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


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Read a file that np.savez wrote, executing nothing in it. Raises one of UNREADABLE when it is damaged."""
    if not zipfile.is_zipfile(path):
        raise ValueError("it is no archive of arrays" if path.exists() else "there is no such file")
    with open(path, "rb") as file, np.load(file, allow_pickle=False) as stored:
        return dict(stored)


# What reading a damaged or foreign file can raise.
UNREADABLE = (OSError, KeyError, ValueError, EOFError, TypeError, AttributeError, zipfile.BadZipFile, zlib.error)


def load_policy(path: Path, env: str) -> Callable[[np.ndarray], np.ndarray]:
    """Read what ``save_policy`` wrote as a function from an observation [observations] to an action [actions].

    Nothing in the file is executed. Raises InputError when it cannot be read, is no policy or was trained for another
    environment than ``env``.
    """
    try:
        arrays = read_arrays(path)
        layers = []
        for index in range(sum(name.endswith(".shape") for name in arrays)):
            shape = tuple(arrays[f"{index}.shape"])
            mask = torch.from_numpy(np.unpackbits(arrays[f"{index}.topology"], count=math.prod(shape)).reshape(shape))
            weight = torch.zeros(shape)
            weight[mask == 1] = torch.from_numpy(arrays[f"{index}.weight"])
            layers.append(Layer(weight, mask, torch.from_numpy(arrays[f"{index}.bias"])))
        low, high, trained_for = torch.from_numpy(arrays["low"]), torch.from_numpy(arrays["high"]), str(arrays["env"])
    except UNREADABLE as error:
        raise InputError(f"{path} is no policy that can be read: {error}") from error
    if trained_for != env:
        raise InputError(f"{path} holds a policy for {trained_for}, not for {env}")
    return lambda observation: policy(layers, torch.from_numpy(observation).float()[None], low, high)[0].numpy()


def provenance() -> dict:
    """Return the versions, the git commit of this file and the machine that a run was made with."""
    here = Path(__file__).resolve().parent
    git = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None
    cpuinfo = Path("/proc/cpuinfo")
    models = [line for line in cpuinfo.read_text().splitlines() if "model name" in line] if cpuinfo.exists() else []
    processor = models[0].split(":")[1].strip() if models else platform.processor()
    versions = {module.__name__: module.__version__ for module in (torch, gymnasium, np)}
    if (mujoco := sys.modules.get("mujoco")) is not None:
        versions["mujoco"] = mujoco.__version__
    machine = {"processor": processor, "cores": os.cpu_count(), "system": platform.platform()}
    return {"versions": {"python": platform.python_version(), **versions}, "commit": commit, "machine": machine}


class RunDirectory:
    """RESULTS_DIR/ENV/VARIANT/seedN."""

    def __init__(self, args: Arguments):
        self.path = args.results_dir / args.env.replace("/", "-") / variant(args) / f"seed{args.seed}"
        values = {k: v for k, v in dataclasses.asdict(args).items() if k not in PRESENTATION}
        if args.initial_policy is not None and args.initial_policy.exists():
            # What matters is the policy, wherever its file lies.
            values["initial_policy"] = hashlib.sha256(args.initial_policy.read_bytes()).hexdigest()
        self.arguments = json.loads(json.dumps(values, default=str))

    @contextmanager
    def opened(self):
        """Make the directory and keep other processes out of it.

        Raises InputError when it cannot be written, holds a run with other arguments, or is in use.
        """
        with ExitStack() as stack:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                lock = stack.enter_context(open(self.path / "lock", "w"))
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                config = self.path / "config.json"
                if config.exists():
                    self._require_same_arguments(config)
                else:
                    write_json(config, {"arguments": self.arguments, **provenance()})
            except BlockingIOError as error:
                raise InputError(f"another process is training in {self.path}") from error
            except OSError as error:
                raise InputError(f"cannot use {self.path}: {error.strerror}") from error
            yield

    def _require_same_arguments(self, config: Path) -> None:
        try:
            theirs = json.loads(config.read_text())["arguments"]
            differing = [name for name, value in self.arguments.items() if theirs[name] != value]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{config} is damaged: move it away, or choose another --results-dir") from error
        if differing:
            pairs = ", ".join(f"{n} {theirs[n]} there and {self.arguments[n]} here" for n in differing)
            raise InputError(f"{self.path} holds a run with other arguments ({pairs}): choose another --results-dir")

    @property
    def finished(self) -> bool:
        """Whether the run is done."""
        return (self.path / "summary.json").exists()

    def remove_working_files(self) -> None:
        """Remove what only an unfinished run needs."""
        for name in ("checkpoint.npz", "transitions.bin", "lock"):
            (self.path / name).unlink(missing_ok=True)


# ----------------------------------------------------------------------------------------------------------------------
# Training
# ----------------------------------------------------------------------------------------------------------------------


class Run:
    """A training run: everything that changes while it goes on, and the checkpoints that bring it back.

    All random numbers come from one numpy generator, except those of the environments.
    """

    def __init__(self, args: Arguments, directory: RunDirectory):
        self.args, self.directory = args, directory
        self.rng = np.random.default_rng(args.seed)
        env, self.evaluation_env = make_environment(args.env), make_environment(args.env)
        self.bounds = (env.action_space.low.astype(np.float32), env.action_space.high.astype(np.float32))
        self.sizes = network_sizes(env, args)
        actor = initial_layers(self.sizes.actor, self.sizes.actor_connections, self.rng)
        critics = initial_layers(self.sizes.critic, self.sizes.critic_connections, self.rng, networks=(2,))
        if args.engine == "sparse":
            from sparse_engine import SparseTD3 as TD3
        else:
            TD3 = MaskedTD3
        self.agent = TD3(actor, critics, self.bounds, args)
        observations, actions = self.sizes.actor[0], self.sizes.actor[-1]
        self.buffer = ReplayBuffer(min(args.buffer_size, args.total_timesteps), observations, actions)
        self.env = ReplayableEnvironment(env, args.seed)
        self.initial_policy = None
        if args.initial_policy is not None:
            self.initial_policy = load_policy(args.initial_policy, args.env)
        self.step = 0
        self.saved_step, self.saved_crc = 0, 0
        self.tables: dict[str, list[dict]] = {"evaluations": [], "timing": [], "topology": []}
        self.seconds = {"training": 0.0, "evaluation": 0.0}
        self.peak_memory = 0

    def advance(self) -> None:
        """Take one environment step and learn from it.

        Raises RunError, with everything as before the step, when the environment fails or when an action, an
        observation or a reward is not finite.
        """
        started, rng_before = time.perf_counter(), self.rng.bit_generator.state
        observation, actions_before = self.env.observation, len(self.env.actions)
        try:
            action = self._explore()
            reward, terminated, truncated = self._act(action)
        except RunError:
            self.rng.bit_generator.state = rng_before
            self.env.observation = observation
            del self.env.actions[actions_before:]
            raise
        transition = Batch(observation, action, [reward], self.env.observation, [terminated])
        self.buffer.add(self.step, transition)
        self.step += 1
        if terminated or truncated:
            self.env.reset()
        if self.step > self.args.learning_starts:
            batch = self.buffer.sample(self.step, self.args.batch_size, self.rng)
            noise = self.rng.standard_normal(batch.action.shape, dtype=np.float32)
            train_step(self.agent, batch, noise, self.step, self.rng, self.args)
        self.seconds["training"] += time.perf_counter() - started

    def _act(self, action: np.ndarray) -> tuple[float, bool, bool]:
        """Return reward, terminated and truncated. Raises RunError as ``advance`` says."""
        step, name = self.step + 1, self.args.env
        if not np.isfinite(action).all():
            raise RunError(f"step {step}: the policy's action is not finite (the networks have diverged)")
        try:
            reward, terminated, truncated = self.env.step(action)
        except Exception as error:  # an environment's own code can raise anything
            raise RunError(f"step {step}: {name} failed with {type(error).__name__}: {error}") from error
        if not np.isfinite(self.env.observation).all():
            raise RunError(f"step {step}: {name} returned an observation that is not finite")
        if not math.isfinite(reward):
            raise RunError(f"step {step}: {name} returned a reward that is not finite")
        return reward, terminated, truncated

    def _explore(self) -> np.ndarray:
        """Return a uniform random action (or the initial policy's) at first, then the policy's with noise."""
        low, high = self.bounds
        act = self.agent.act
        if self.step < self.args.learning_starts:
            if self.initial_policy is None:
                return self.rng.uniform(low, high).astype(np.float32)
            act = self.initial_policy
        noise = self.rng.standard_normal(low.shape, dtype=np.float32) * self.args.exploration_noise * (high - low) / 2
        return (act(self.env.observation) + noise).clip(low, high)

    def evaluate(self) -> dict:
        """Evaluate the policy, extend the tables, write them, and return the evaluation's row."""
        started = time.perf_counter()
        returns, lengths = evaluate(self.agent.act, self.evaluation_env, self.args.eval_episodes, self.args.seed + 100)
        self.seconds["evaluation"] += time.perf_counter() - started
        row = {
            "step": self.step,
            "return_mean": float(np.mean(returns)),
            "return_std": float(np.std(returns)),
            "return_min": min(returns),
            "return_max": max(returns),
            "length_mean": float(np.mean(lengths)),
        }
        self.tables["evaluations"].append(row)
        self.tables["timing"].append(
            {"step": self.step, **{f"{name}_seconds": round(value, 3) for name, value in self.seconds.items()}}
        )
        if self.args.method == "ds-td3":
            self.tables["topology"] += self._topology_rows()
        self._write_tables()
        return row

    def _topology_rows(self) -> list[dict]:
        """Describe how far the actor's and the first critic's topologies have moved from their first ones."""
        rows = []
        for name, network in (("actor", self.agent.actor), ("critic", self.agent.critics)):
            for index, (mask, initial) in enumerate(network.topologies(), start=1):
                row = {"step": self.step, "network": name, "layer": index}
                row["initial_connections_alive"] = float((mask * initial).sum() / initial.sum())
                inputs = mask.sum(-1).astype(int) if index == 1 else []
                row["connections_per_input"] = " ".join(map(str, inputs))
                rows.append(row)
        return rows

    def _write_tables(self) -> None:
        for name, rows in self.tables.items():
            if rows:
                write_csv(self.directory.path / f"{name}.csv", rows)

    def save(self) -> None:
        """Write a checkpoint: new transitions behind those on disk, then the rest in one file, replaced at once.

        Until that last moment the previous checkpoint stays whole, whatever happens.
        """
        new = self.buffer.rows[self.buffer.places(self.saved_step, self.step)]
        crc = zlib.crc32(new, self.saved_crc)
        state = {
            "arguments": self.directory.arguments,
            "step": self.step,
            "transitions_crc": crc,
            "rng": self.rng.bit_generator.state,
            "reset_from": self.env.reset_from,
            "tables": self.tables,
            "seconds": self.seconds,
            "peak_memory": self._peak_memory(),
        }
        arrays = {"actions": np.array(self.env.actions), "observation": self.env.observation}
        for name, network in (("actor", self.agent.actor), ("critics", self.agent.critics)):
            arrays |= {f"{name}.{key}": array for key, array in network.state().items()}
        transitions = self.directory.path / "transitions.bin"
        with open(transitions, "r+b" if transitions.exists() else "wb") as file:
            file.seek(self.saved_step * self.buffer.rows[0].nbytes)
            file.truncate()
            file.write(new)
            file.flush()
            os.fsync(file.fileno())
        with replaced(self.directory.path / "checkpoint.npz") as file:
            np.savez(file, state=np.array(json.dumps(state)), **arrays)
        self.saved_step, self.saved_crc = self.step, crc

    def load(self) -> bool:
        """Return to the last checkpoint and tell whether there was one.

        Raises InputError, and changes nothing on disk, when the checkpoint is damaged or of another run.
        """
        path = self.directory.path / "checkpoint.npz"
        if not path.exists():
            return False
        try:
            arrays = read_arrays(path)
            state = json.loads(str(arrays.pop("state")))
            if state["arguments"] != self.directory.arguments:
                raise ValueError("it belongs to a run with other arguments")
            for name, network in (("actor", self.agent.actor), ("critics", self.agent.critics)):
                prefix = f"{name}."
                network.load_state({k.removeprefix(prefix): a for k, a in arrays.items() if k.startswith(prefix)})
            self._load_transitions(state["step"], state["transitions_crc"])
            self.rng.bit_generator.state = state["rng"]
            self.tables, self.seconds, self.peak_memory = state["tables"], state["seconds"], state["peak_memory"]
            reset_from, actions, observation = state["reset_from"], arrays["actions"], arrays["observation"]
        except UNREADABLE as error:
            raise InputError(f"{path} cannot be resumed: {error}; move the folder away to start afresh") from error
        self.env.restore(reset_from, actions, observation)
        self.step, self.saved_step, self.saved_crc = state["step"], state["step"], state["transitions_crc"]
        return True

    def _load_transitions(self, count: int, expected_crc: int) -> None:
        crc, (capacity, width) = 0, self.buffer.rows.shape
        block = min(capacity, 10_000)
        transitions = self.directory.path / "transitions.bin"
        if transitions.stat().st_size < count * self.buffer.rows[0].nbytes:
            raise ValueError("transitions.bin beside it is damaged")
        with open(transitions, "rb") as file:
            for start in range(0, count, block):
                rows = np.fromfile(file, dtype=np.float32, count=min(block, count - start) * width).reshape(-1, width)
                self.buffer.rows[self.buffer.places(start, start + len(rows))] = rows
                crc = zlib.crc32(rows, crc)
        if crc != expected_crc:
            raise ValueError("transitions.bin beside it is damaged")

    def save_policy(self, name: str) -> None:
        """Write the policy so far into the run directory."""
        save_policy(self.directory.path / name, self.agent.actor.layer_arrays(), self.bounds, self.args.env)

    def finish(self) -> None:
        """Write the trained policy and the summary, and remove what only an unfinished run needs."""
        returns = [row["return_mean"] for row in self.tables["evaluations"]]
        summary = {
            "connections": self.sizes.connections,
            "sparsity": self.sizes.sparsity,
            "training_flops": self.sizes.training_flops(self.args),
            "training_flops_of_dense": self.sizes.dense.training_flops(self.args),
            "final_return": float(np.mean(returns[-10:])),
            "lca": sum(returns) / self.args.total_timesteps,
            "evaluations": len(returns),
            "steps": self.step,
            **{f"{name}_seconds": round(value, 1) for name, value in self.seconds.items()},
            "peak_memory_bytes": self._peak_memory(),
        }
        self.save_policy("policy.npz")
        write_json(self.directory.path / "summary.json", summary)
        self.directory.remove_working_files()

    def _peak_memory(self) -> int:
        """Return the most bytes of memory that a process of this run has held."""
        unit = 1 if sys.platform == "darwin" else 1024
        return max(self.peak_memory, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


class StopSignals:
    """Remembers Ctrl-C and SIGTERM (as Slurm sends) until the step at hand is complete; a second one stops at once."""

    def __init__(self):
        self.received: signal.Signals | None = None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame) -> None:
        self.received = signal.Signals(number)
        signal.signal(number, signal.SIG_DFL)


class Progress:
    """Shows how a run goes, as a bar on a terminal and else as a line at each evaluation, and logs it where asked."""

    def __init__(self, run: Run):
        args, directory = run.args, run.directory
        self.total, self.sparsity = args.total_timesteps, run.sizes.sparsity
        self.loggers: list[Callable[[int, dict[str, float]], None]] = []
        self.closing = ExitStack()
        if args.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            writer = self.closing.enter_context(SummaryWriter(directory.path / "tensorboard", purge_step=run.step + 1))
            self.loggers.append(lambda step, scalars: [writer.add_scalar(k, v, step) for k, v in scalars.items()])
        if args.track:
            import wandb

            name = "-".join(directory.path.parts[-3:])
            config = directory.arguments
            tracked = wandb.init(project="dst-td3", name=name, id=name, resume="allow", config=config)
            self.closing.callback(tracked.finish)
            self.loggers.append(lambda step, scalars: tracked.log(scalars, step=step))
        self.learning_starts = args.learning_starts
        self.bar, self.shown_step, self.shown_at = None, run.step, time.perf_counter()
        print(f"{args.env} {variant(args)} seed {args.seed}: step {run.step:,} of {self.total:,}", flush=True)
        if sys.stderr.isatty():
            layout = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} {rate_fmt} {remaining} left{postfix}"
            bar = tqdm(total=self.total, initial=run.step, unit=" steps", unit_scale=True, bar_format=layout)
            self.bar = self.closing.enter_context(bar)

    def advanced(self) -> None:
        """Count one step."""
        if self.bar is not None:
            self.bar.update()

    def evaluated(self, row: dict, losses: dict) -> None:
        """Show and log an evaluation's row of the table and the losses of the last update."""
        step, mean, std = row["step"], row["return_mean"], row["return_std"]
        for log in self.loggers:
            log(step, {**row, **{name: float(value) for name, value in losses.items()}})
        if self.bar is not None:
            self.bar.set_postfix_str(f"return {mean:.0f}, sparsity {self.sparsity:.2f}")
            return
        now = time.perf_counter()
        speed = (step - self.shown_step) / (now - self.shown_at)
        # Before it learns, a run is many times faster than it will be.
        left = timedelta(seconds=round((self.total - step) / speed)) if step > self.learning_starts else "unknown"
        print(
            f"step {step:>9,}  return {mean:9.1f} +- {std:7.1f}  sparsity {self.sparsity:.2f}  {speed:6.0f} steps/s  "
            f"time left {left}",
            flush=True,
        )
        self.shown_step, self.shown_at = step, now


def advance_to_the_end(run: Run, progress: Progress, signals: StopSignals) -> None:
    """Train until the run is finished or told to stop, evaluating and writing checkpoints on the way."""
    args = run.args
    if run.step == 0 and not run.tables["evaluations"]:
        progress.evaluated(run.evaluate(), run.agent.losses)
    while run.step < args.total_timesteps and signals.received is None:
        try:
            run.advance()
        except RunError:
            run.save()
            raise
        progress.advanced()
        if run.step % args.eval_interval == 0 or run.step == args.total_timesteps:
            progress.evaluated(run.evaluate(), run.agent.losses)
        if run.step in args.snapshot_at:
            run.save_policy(f"policy-{run.step}.npz")
        if run.step % min(args.checkpoint_interval, len(run.buffer.rows)) == 0:
            run.save()
    if run.step < args.total_timesteps:
        run.save()
    else:
        run.finish()


def train(args: Arguments) -> int:
    """Train, or go on training, as resolved arguments say. Returns the exit code; raises InputError and RunError."""
    torch.set_num_threads(args.threads)
    # Moments and target weights that decay towards zero become denormal, which slows a CPU many times over.
    torch.set_flush_denormal(True)
    directory = RunDirectory(args)
    # Making a run may compile, which a finished one need not; only under the lock is it sure whether it is finished.
    run = None if directory.finished else Run(args, directory)
    with directory.opened():
        if directory.finished:
            directory.remove_working_files()
            print(f"{directory.path} is finished already: nothing to do")
            return 0
        run.load()
        signals, progress = StopSignals(), Progress(run)
        try:
            with progress.closing:
                advance_to_the_end(run, progress, signals)
        except OSError as error:
            raise RunError(
                f"cannot write to {directory.path}: {error.strerror}; what was there before is whole, and the same "
                f"command goes on from step {run.saved_step:,}"
            ) from error
    if not directory.finished:
        print(f"stopped by {signals.received.name} at step {run.step:,}: the same command goes on from there")
        return 128 + signals.received
    summary = json.loads((directory.path / "summary.json").read_text())
    print(f"final return {summary['final_return']:.1f}, LCA {summary['lca']:.4f}: {directory.path}")
    print(f"to see it: python dst_td3.py --watch {directory.path}")
    return 0


# ----------------------------------------------------------------------------------------------------------------------
# Watching
# ----------------------------------------------------------------------------------------------------------------------


def extend_floor(model) -> None:
    """Draw the planes of a MuJoCo model 50 times as long. They hold a robot without end, but are drawn for 20 m."""
    planes = model.geom_type == 0  # mjGEOM_PLANE
    materials = np.unique(model.geom_matid[planes])
    model.geom_size[planes, :2] *= 50
    model.mat_texrepeat[materials[materials >= 0]] *= 50


@contextmanager
def viewer(name: str):
    """Yield a MuJoCo environment and a function that shows its state in MuJoCo's viewer, at the speed of real time.

    Without a screen, or when the window is closed, the function does nothing. Raises InputError for an environment
    without MuJoCo.
    """
    with closing(make_environment(name)) as env:
        import glfw
        import mujoco.viewer

        with warnings.catch_warnings(action="ignore"):
            screen = glfw.init()
        if not screen:
            print("there is no screen to open the viewer on; --video FILE writes a video instead", flush=True)
            yield env, lambda: None
            return
        if not hasattr(env.unwrapped, "mujoco_renderer"):
            raise InputError(f"{name} is not simulated by MuJoCo, so its viewer cannot show it: give --video FILE")
        model, data, seconds = env.unwrapped.model, env.unwrapped.data, env.unwrapped.dt
        extend_floor(model)
        with mujoco.viewer.launch_passive(model, data, show_left_ui=False, show_right_ui=False) as window:
            # The first body of a robot is its torso; a camera that did not follow it would lose it.
            window.cam.type, window.cam.trackbodyid = mujoco.mjtCamera.mjCAMERA_TRACKING, 1
            window.cam.distance = 4
            shown_at = time.perf_counter()

            def show() -> None:
                nonlocal shown_at
                if window.is_running():
                    time.sleep(max(0.0, shown_at + seconds - time.perf_counter()))
                    shown_at = time.perf_counter()
                    window.sync()

            yield env, show


def make_drawn_environment(name: str) -> gymnasium.Env:
    """Make an environment that draws pictures without a screen. Raises InputError where that cannot be."""
    if sys.platform == "linux":
        os.environ.setdefault("MUJOCO_GL", "egl")
    try:
        env = make_environment(name, render_mode="rgb_array")
        if hasattr(env.unwrapped, "mujoco_renderer"):
            extend_floor(env.unwrapped.model)
            # The model's own camera follows the robot; the one that gymnasium takes stays behind.
            env.unwrapped.mujoco_renderer.camera_id = min(0, env.unwrapped.model.ncam - 1)
        env.reset()
        env.render()
    except Exception as error:  # graphics libraries can raise anything
        cause = error.__cause__ or error
        reason = " ".join(str(cause).split()) or type(cause).__name__
        packages = "Debian's are libegl1 libgl1-mesa-dri libopengl0"
        hint = f"MuJoCo needs the libraries of MUJOCO_GL={os.environ.get('MUJOCO_GL')} ({packages} for egl)"
        raise InputError(f"cannot draw {name}: {reason}; {hint}") from error
    return env


@contextmanager
def video(name: str, path: Path):
    """Yield an environment and a function that adds its state to the video at ``path``, which appears when all is done.

    Raises InputError when ``path`` is neither .mp4 nor .gif or cannot be written, or nothing can be drawn.
    """
    import imageio.v2

    suffix = path.suffix.lower()
    if suffix not in (".mp4", ".gif") or path.is_dir():
        raise InputError(f"--video must be a file that ends in .mp4 or .gif, not {path}")
    with closing(make_drawn_environment(name)) as env:
        # About 25 pictures a second, which every player keeps up with; Hopper has 125 steps a second.
        states_a_second = env.metadata.get("render_fps", 30)
        every = max(1, round(states_a_second / 25))
        rate = states_a_second / every
        # A .gif stores each picture by itself, so it gets every second pixel of every second row.
        pixel, timing = (2, {"duration": 1000 / rate, "loop": 0}) if suffix == ".gif" else (1, {"fps": rate})
        states = itertools.count()
        try:
            with (
                replaced(path) as file,
                imageio.v2.get_writer(file.name, **timing) as writer,
                tqdm(unit=" steps", leave=False, disable=None) as bar,
            ):

                def show() -> None:
                    if next(states) % every == 0:
                        writer.append_data(env.render()[::pixel, ::pixel])
                    bar.update()

                yield env, show
        except OSError as error:
            raise InputError(f"cannot write {path}: {error.strerror or error}") from error


def watch(args: Arguments) -> None:
    """Play episodes of a finished run's policy in the viewer or into a video, and print their returns.

    Their start states are those of the run's evaluations. Raises InputError when the directory holds no finished run
    and as ``viewer`` and ``video`` do.
    """
    for field in dataclasses.fields(args):
        if field.name not in ("watch", "video", "eval_episodes") and getattr(args, field.name) != field.default:
            raise InputError(f"--watch shows a run as it was trained: leave out --{field.name.replace('_', '-')}")
    try:
        trained = json.loads((args.watch / "config.json").read_text())["arguments"]
        name, seed = trained["env"], trained["seed"] + 100
    except UNREADABLE as error:
        raise InputError(f"--watch needs the directory of a run, and {args.watch} is none: {error}") from error
    if not (args.watch / "policy.npz").exists():
        raise InputError(f"{args.watch} has no policy.npz: a run writes it when it is finished")
    act = load_policy(args.watch / "policy.npz", name)
    returns = []
    with video(name, args.video) if args.video else viewer(name) as (env, show):
        for episode in range(args.eval_episodes):
            (total,), (length,) = evaluate(act, env, 1, None if episode else seed, show)
            tqdm.write(f"episode {episode + 1:>3}  return {total:9.1f}  {length:,} steps")
            returns.append(total)
    print(f"mean return {np.mean(returns):.1f} +- {np.std(returns):.1f}")


def main() -> int:
    """Run the command line and return its exit code."""
    args = tyro.cli(Arguments, prog="dst_td3.py")
    try:
        validate(args)
        if args.watch is not None:
            watch(args)
            return 0
        args = resolve(args)
        if args.describe:
            print(describe(make_environment(args.env), args))
            return 0
        return train(args)
    except (InputError, RunError) as error:
        print(f"dst_td3.py: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    except KeyboardInterrupt:  # before training has begun
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main())
