"""What the engines of TD3 and SAC share: two stacks of networks, room for a batch, and kernels compiled beforehand."""

from collections.abc import Callable, Iterator

import numpy as np
from threadpoolctl import threadpool_limits

from sparse_engine.compilation import compiled_for
from sparse_engine.kernels import Settings, activations, soft_update
from sparse_engine.networks import Layer, SparseNetwork


class Engine:
    """An actor and its critics on sparse networks, on one CPU. The first one after an installation compiles kernels.

    ``actor`` and ``critics`` are lists of layers as ``SparseNetwork`` takes them, of one type, float32 or float64, the
    type of all computation; ``bounds`` (low, high) [actions] are those of the actions. The critics can be normalized
    as ``SparseNetwork`` says.
    """

    def __init__(
        self, actor: list[Layer], critics: list[Layer], bounds: tuple, *,
        batch_size: int, learning_rate: float, weight_decay: float, gamma: float, tau: float, drop_fraction: float,
        normalized_critics: bool = False
    ):  # fmt: skip
        self.dtype = actor[0][0].dtype.type
        self.actor = SparseNetwork(actor, tau=tau, drop_fraction=drop_fraction)
        self.critics = SparseNetwork(critics, tau=tau, drop_fraction=drop_fraction, normalized=normalized_critics)
        low, high = (np.array(bound, self.dtype) for bound in bounds)
        self.settings = Settings(low, high, self.dtype(gamma), learning_rate, self.dtype(weight_decay))
        self._prepare(batch_size)
        threadpool_limits(1, "blas")  # a run has one thread

    def _observation(self, observation: np.ndarray) -> np.ndarray:
        """Return one observation as the kernels take it, which read as many numbers as the actor has inputs."""
        converted, inputs = np.array(observation, self.dtype), self.actor.blocks[0].inputs
        if converted.shape != (inputs,):
            raise ValueError(f"an observation has shape {converted.shape}, not ({inputs},)")
        return converted

    def _prepare(self, batch_size: int) -> None:
        """Make room for batches of this size, and compile what takes them."""
        self._activations = tuple(activations(network.arrays, batch_size) for network in (self.actor, self.critics))
        rows, indices = np.zeros((1, 1), self.dtype), np.zeros(batch_size, np.int64)  # for their types
        calls = self._calls(rows[0], (rows, indices), rows)
        self._compiled = {function: compiled_for(function, arguments) for function, arguments in calls}

    def _arguments(self, network: SparseNetwork, batch: tuple[np.ndarray, np.ndarray], *rest) -> tuple:
        """Return what an update of ``network`` takes; a ``batch`` are the rows of a buffer and indices of some."""
        rows, indices = batch
        if indices.ndim != 1 or indices.dtype.kind not in "iu":
            raise ValueError(f"indices are {indices.dtype}{indices.shape}, not whole numbers [batch]")
        if rows.dtype != self.dtype or not rows.flags.c_contiguous:  # only those of the batch are worth a copy
            rows, indices = self._matrix(rows[indices]), np.arange(len(indices))
        indices = np.ascontiguousarray(indices, np.int64)
        if len(indices) != self._activations[0].batch:
            self._prepare(len(indices))
        return (
            self.actor.arrays,
            self.critics.arrays,
            *self._activations,
            rows,
            indices,
            *rest,
            self.settings,
            int(network.steps),
        )

    def _matrix(self, array: np.ndarray) -> np.ndarray:
        """Return a matrix as the kernels, which check nothing, take it: itself, or a copy of another type."""
        if array.ndim != 2:
            raise ValueError(f"an array of shape {array.shape} is not a matrix")
        return np.ascontiguousarray(array, self.dtype)

    def __getstate__(self) -> dict:
        """Leave out what cannot be pickled, compiled functions."""
        return vars(self) | {"_compiled": {}}

    def __setstate__(self, state: dict) -> None:
        """Take over what ``__getstate__`` returned, and compile again."""
        vars(self).update(state)
        self._prepare(self._activations[0].batch)

    def _calls(self, observation, batch: tuple, noise: np.ndarray) -> Iterator[tuple[Callable, tuple]]:
        """Yield the compiled functions that the agent calls, with arguments of the types that they take."""
        yield soft_update, self.actor.soft_update_arguments()
