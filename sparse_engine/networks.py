"""A stack of sparse networks: how it lies in memory, drop and grow, state.

Rare work, once in about 1,000 updates, and so in numpy. The kernels do the rest.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from sparse_engine.compilation import compiled_for, first_level_cache
from sparse_engine.kernels import (
    BACKWARD_TILE,
    FORWARD_TILE,
    VECTOR_BYTES,
    Arrays,
    activations,
    all_units,
    soft_update,
)

CARRIED = ("parameters", "target", "first_moment", "second_moment")  # what a connection keeps as the topology changes
# The most inputs whose tiles, together, fit the first-level cache; outputs likewise, of the backward pass.
BAND_INPUTS = first_level_cache() // (FORWARD_TILE * VECTOR_BYTES // 2) // 32 * 32
BAND_OUTPUTS = first_level_cache() // (BACKWARD_TILE * VECTOR_BYTES // 2) // 32 * 32
BAND_CONNECTIONS = 16  # the fewest, on average, that a row of a band is worth its start for
DENSE_OUTPUTS = 16  # the fewest for which BLAS is faster than the kernels

Layer = tuple[np.ndarray, np.ndarray, np.ndarray]  # weight and mask [..., inputs, outputs], bias [..., 1, outputs]


# --- Sparse topology: piece 3 of the paper ----------------------------------------------------------------------------
# A position is input * outputs + output, its place in the dense matrix that is never made; a topology is a sorted array
# of them.


def drop_and_grow(
    drop_scores: np.ndarray, topology: np.ndarray, positions: int, drop_fraction: float, rng, growth_scores=None
) -> tuple[np.ndarray, np.ndarray]:
    """Choose which connections of a layer go and where new ones come: piece 3, the adaptation (the SET rule).

    Drops the fraction ``drop_fraction`` (eta) of the connections with a positive score, zero among them, and of those
    with a negative one, those nearest to zero; among equals the first position goes first. ``drop_scores`` are those of
    the connections in ``topology``, in a layer of ``positions``. Then grows as many, where no connection is left:
    uniformly, by one draw of ``rng``, or with ``growth_scores`` [positions] where these are largest, among equals at
    the first position. A full layer stays as it is, without a draw. Returns which connections are kept (booleans), and
    the sorted positions of the grown ones.
    """
    kept = np.ones(len(topology), dtype=bool)
    if len(topology) == positions:
        return kept, topology[:0]
    for signed in (np.flatnonzero(drop_scores >= 0), np.flatnonzero(drop_scores < 0)):
        weakest_first = np.argsort(np.abs(drop_scores[signed]), kind="stable")
        kept[signed[weakest_first[: round(drop_fraction * len(signed))]]] = False
    occupied, dropped = topology[kept], np.count_nonzero(~kept)
    if growth_scores is not None:
        empty = np.delete(np.arange(positions), occupied)
        return kept, np.sort(empty[np.argsort(-growth_scores[empty], kind="stable")[:dropped]])
    ranks = np.sort(rng.choice(positions - len(occupied), dropped, replace=False))
    # As many empty positions precede an occupied one as its own number exceeds its rank.
    empty_before = occupied - np.arange(len(occupied))
    return kept, ranks + np.searchsorted(empty_before, ranks, side="right")


# --- Layout -----------------------------------------------------------------------------------------------------------
class Block(NamedTuple):
    """One layer of one network of a stack, and where it lies in the stack's arrays."""

    inputs: int
    outputs: int
    bands: int
    output_bands: int
    connections: slice
    rows: slice
    segments: slice
    columns: slice

    @classmethod
    def after(cls, last: "Block | None", inputs: int, outputs: int, connections: int) -> "Block":
        """Lay out a layer of so many connections behind the ``last`` one."""
        bands = output_bands = 1
        if connections < inputs * outputs:
            bands = max(1, min(-(-inputs // BAND_INPUTS), connections // (BAND_CONNECTIONS * outputs)))
            output_bands = max(1, min(-(-outputs // BAND_OUTPUTS), connections // (BAND_CONNECTIONS * inputs)))
        lengths = (connections, outputs, bands * outputs, output_bands * inputs)
        parts = zip(last.ends if last else (0, 0, 0, 0), lengths, strict=True)
        return cls(inputs, outputs, bands, output_bands, *(slice(start, start + length) for start, length in parts))

    @property
    def dense(self) -> bool:
        """Whether the layer holds every connection, and is large enough for BLAS."""
        connections = self.connections.stop - self.connections.start
        return connections == self.inputs * self.outputs and self.outputs >= DENSE_OUTPUTS

    @property
    def ends(self) -> tuple[int, int, int, int]:
        """How many connections, rows, segments and columns there are up to the end of this layer."""
        return self.connections.stop, self.rows.stop, self.segments.stop, self.columns.stop

    def mask(self, topology: np.ndarray) -> np.ndarray:
        """Return a topology as a dense mask [inputs, outputs]."""
        mask = np.zeros(self.inputs * self.outputs, dtype=np.float32)
        mask[topology] = 1
        return mask.reshape(self.inputs, self.outputs)


def with_end(part: slice) -> slice:
    """Return the slice of the starts of some rows and of the one that follows, where the last of them ends."""
    return slice(part.start, part.stop + 1)


def start_of_each(numbers: np.ndarray, count: int) -> np.ndarray:
    """Return where each of the numbers 0 to ``count`` starts when ``numbers`` are sorted."""
    return np.concatenate([[0], np.cumsum(np.bincount(numbers, minlength=count))])


PARTS = ("row", "segment", "column")


def allocate(blocks: list[Block], layers: int, dtype: np.dtype, normalized: bool) -> Arrays:
    """Return zeroed arrays for a stack of networks of so many ``layers`` each, with no extras."""
    sizes = [block.inputs for block in blocks[:layers]] + [blocks[layers - 1].outputs]
    connections, rows, segments, columns = blocks[-1].ends
    index = np.uint16 if max(sizes) <= 1 << 16 else np.uint32
    return Arrays(
        sizes=np.array(sizes),
        **{name: np.array([getattr(b, name) for b in blocks[:layers]]) for name in ("dense", "bands", "output_bands")},
        **{f"first_{name}": np.array([getattr(b, f"{name}s").start for b in blocks]) for name in PARTS},
        segment_start=np.zeros(segments + 1, np.uint32),
        input_index=np.zeros(connections, index),
        column_start=np.zeros(columns + 1, np.uint32),
        output_index=np.zeros(connections, index),
        place=np.zeros(connections, np.uint32),
        **{name: np.zeros(connections + rows, dtype) for name in ("parameters", "gradient", *CARRIED[1:])},
        extra_start=np.zeros(rows + 1, np.uint32),
        extra_index=np.zeros(0, index),
        extra_weight=np.zeros(0, dtype),
        part_start=np.array([0, *(block.connections.stop for block in blocks), connections + rows]),
        step_scale=np.ones(len(blocks) + 1),
        prune_guess=np.zeros((len(blocks) // layers, layers), np.int64),
        normalized=(None,) * normalized,
    )


# --- Sparse networks --------------------------------------------------------------------------------------------------
class SparseNetwork:
    """A stack of sparse networks in compressed rows, with their Adam optimizer and their targets.

    ``layers`` are (weight, mask, bias), inputs first: weight and mask [..., inputs, outputs], bias [..., 1, outputs],
    with the stacked networks as leading axes. All but the last are sparse layers, which adapt. ``tau`` is the rate at
    which targets follow, ``drop_fraction`` (eta) the fraction of connections that an adaptation replaces. Hidden layers
    can be ``normalized`` before their ReLU (layer normalization).
    """

    def __init__(self, layers: list[Layer], *, tau: float, drop_fraction: float, normalized: bool = False):
        self.tau, self.drop_fraction = tau, drop_fraction
        self.depth, self.networks = len(layers), layers[0][0].shape[:-2]
        layers = [tuple(array.reshape(-1, *array.shape[-2:]) for array in layer) for layer in layers]
        stack = [tuple(array[n] for array in layer) for n in range(len(layers[0][0])) for layer in layers]
        topologies = [np.flatnonzero(mask) for _, mask, _ in stack]
        self.blocks: list[Block] = []
        for (weight, _, _), topology in zip(stack, topologies, strict=True):
            self.blocks.append(Block.after((self.blocks or [None])[-1], *weight.shape, len(topology)))
        self.arrays = allocate(self.blocks, self.depth, layers[0][0].dtype, normalized)
        for block, topology, (weight, _, _) in zip(self.blocks, topologies, stack, strict=True):
            self._write(block, topology, parameters=weight.ravel()[topology])
        self.arrays.parameters[self.connections :] = np.concatenate([bias.ravel() for _, _, bias in stack])
        self.arrays.target[:] = self.arrays.parameters
        self.steps = np.zeros((), dtype=np.int64)
        self._soft_update: Callable | None = None  # compiled for this network

    @property
    def connections(self) -> int:
        """How many connections the stack has, after which biases follow."""
        return len(self.arrays.input_index)

    def scale_steps(self, scales: list[float]) -> None:
        """Multiply Adam's steps of each layer's weights by a number, the output layer's too; biases keep theirs."""
        self.arrays.step_scale[:-1] = np.tile(scales, len(self.blocks) // self.depth)

    def adapt(self, rng: np.random.Generator, drop_scores: list | None = None, growth_scores: list | None = None):
        """Adapt the topology of every sparse layer (drop and grow).

        Scores are an array [..., inputs, outputs] for each of them; without, connections drop by their weights, and
        grow uniformly, by draws of ``rng``.
        """
        extras = [self._extras(block) for block in self.blocks]
        scores = [self._by_network(scores) for scores in (drop_scores, growth_scores)]
        for layer in range(self.depth - 1):
            for index in range(layer, len(self.blocks), self.depth):
                extras[index] = self._adapt(self.blocks[index], rng, *(s[index] for s in scores), *extras[index])
        self._write_extras(extras)

    def _by_network(self, scores: list[np.ndarray] | None) -> list[np.ndarray | None]:
        """Return the scores [inputs * outputs] of each block, None where there are none."""
        each = [None] * len(self.blocks)
        for layer, array in enumerate(scores or []):
            each[layer :: self.depth] = array.reshape(-1, array.shape[-2] * array.shape[-1])
        return each

    def _adapt(self, block: Block, rng, drop_scores, growth_scores, extra_positions, extra_weight) -> tuple:
        """Adapt the topology of one layer. Takes and returns the positions and the weights of its target's extras."""
        arrays, (topology, place) = self.arrays, self._topology(block)
        scores = arrays.parameters[place] if drop_scores is None else drop_scores[topology]
        size = block.inputs * block.outputs
        kept, grown = drop_and_grow(scores, topology, size, self.drop_fraction, rng, growth_scores)
        adapted, zeros = np.concatenate([topology[kept], grown]), np.zeros(len(grown), arrays.parameters.dtype)
        order = np.argsort(adapted, kind="stable")
        adapted = adapted[order]
        carried = {name: np.concatenate([getattr(arrays, name)[place[kept]], zeros])[order] for name in CARRIED}

        positions = np.concatenate([topology[~kept], extra_positions])
        values = np.concatenate([arrays.target[place[~kept]], extra_weight])
        extra = values != 0
        _, there, here = np.intersect1d(adapted, positions, assume_unique=True, return_indices=True)
        carried["target"][there], extra[here] = values[here], False
        self._write(block, adapted, **carried)
        return positions[extra], values[extra]

    def contributions(self, rows: np.ndarray) -> list[np.ndarray]:
        """Return each sparse layer's weights times the standard deviations of their inputs [..., inputs, outputs].

        Over the inputs in the first columns of ``rows`` [samples, columns]; 0 where there is no connection.
        """
        rows = np.ascontiguousarray(rows)
        values = all_units(self.arrays, activations(self.arrays, len(rows)), rows, np.arange(len(rows)))
        deviation = (values - values[:, :1]).std(axis=1)  # of an input that never changes, exactly zero
        products = []
        for index, block in enumerate(self.blocks):
            start = self.arrays.sizes[0] + self.blocks[index - 1].rows.start if index % self.depth else 0
            weight, _, _ = self._dense(block, self.arrays.parameters)
            products.append(weight * deviation[start : start + block.inputs, None])
        return [self._stacked(products[layer :: self.depth]) for layer in range(self.depth - 1)]

    def redraw_dormant(self, rng: np.random.Generator, draw: Callable, threshold: float) -> None:
        """Draw the incoming weights and the bias of each dormant hidden unit anew (ReDo, arXiv 2302.12902).

        A unit has died when its incoming weights together have a magnitude below ``threshold``, and its bias does not
        open it. ``draw(inputs, size, rng)`` returns the new values of units with so many inputs.
        """
        arrays = self.arrays
        for layer in range(self.depth - 1):
            weights, biases = [], []
            for block in self.blocks[layer :: self.depth]:
                topology, place = self._topology(block)
                output = topology % block.outputs
                bias = self.connections + np.arange(block.rows.start, block.rows.stop)
                magnitude = np.bincount(output, np.abs(arrays.parameters[place]), block.outputs)
                dormant = (magnitude < threshold) & (arrays.parameters[bias] <= 0)
                weights.append(place[dormant[output]])
                biases.append(bias[dormant])
            for there in map(np.concatenate, (weights, biases)):
                arrays.parameters[there] = draw(self.blocks[layer].inputs, len(there), rng)
                arrays.first_moment[there] = arrays.second_moment[there] = 0

    def _topology(self, block: Block) -> tuple[np.ndarray, np.ndarray]:
        """Return the sorted positions of a layer's connections, and where each is among the weights."""
        counts = np.diff(self.arrays.column_start[with_end(block.columns)])
        inputs = np.repeat(np.arange(len(counts)) % block.inputs, counts)
        positions = inputs * block.outputs + self.arrays.output_index[block.connections]
        order = np.argsort(positions, kind="stable")
        return positions[order], self.arrays.place[block.connections][order]

    def _write(self, block: Block, topology: np.ndarray, **values: np.ndarray) -> None:
        """Write a layer's topology into both indices, and ``values`` of its connections into the arrays so named."""
        arrays, start = self.arrays, block.connections.start
        inputs, outputs = np.divmod(topology, block.outputs)
        segments = inputs * block.bands // block.inputs * block.outputs + outputs
        columns = outputs * block.output_bands // block.outputs * block.inputs + inputs
        by_segment, by_column = (np.argsort(numbers, kind="stable") for numbers in (segments, columns))
        arrays.segment_start[with_end(block.segments)] = start + start_of_each(segments, block.bands * block.outputs)
        arrays.input_index[block.connections] = inputs[by_segment]
        arrays.column_start[with_end(block.columns)] = start + start_of_each(columns, block.output_bands * block.inputs)
        arrays.output_index[block.connections] = outputs[by_column]
        place = np.empty_like(arrays.place[block.connections])
        place[by_segment] = np.arange(start, block.connections.stop)
        arrays.place[block.connections] = place[by_column]
        for name, array in values.items():
            getattr(arrays, name)[block.connections] = array[by_segment]

    def _extras(self, block: Block) -> tuple[np.ndarray, np.ndarray]:
        """Return the positions and the weights of the connections that only a layer's target has."""
        row_starts = self.arrays.extra_start[with_end(block.rows)].astype(np.int64)
        extras = slice(row_starts[0], row_starts[-1])
        outputs = np.repeat(np.arange(block.outputs), np.diff(row_starts))
        positions = self.arrays.extra_index[extras].astype(np.int64) * block.outputs + outputs
        return positions, self.arrays.extra_weight[extras]

    def _write_extras(self, extras: list[tuple[np.ndarray, np.ndarray]]) -> None:
        """Write the positions and the weights of all layers' extras into the arrays."""
        indices, weights, start = [], [], 0
        for block, (positions, values) in zip(self.blocks, extras, strict=True):
            inputs, outputs = np.divmod(positions, block.outputs)
            order = np.argsort(outputs, kind="stable")
            self.arrays.extra_start[with_end(block.rows)] = start + start_of_each(outputs, block.outputs)
            indices.append(inputs[order])
            weights.append(values[order])
            start += len(positions)
        index = np.concatenate(indices).astype(self.arrays.input_index.dtype)
        self.arrays = self.arrays._replace(extra_index=index, extra_weight=np.concatenate(weights))

    def update_target(self) -> None:
        """Move the target a step ``tau`` towards the network, then prune it back to the network's sparsity."""
        arguments = self.soft_update_arguments()
        self._soft_update = self._soft_update or compiled_for(soft_update, arguments)
        self._soft_update(*arguments)

    def __getstate__(self) -> dict:
        """Leave out what cannot be pickled, a compiled function."""
        return vars(self) | {"_soft_update": None}

    def soft_update_arguments(self) -> tuple:
        """Return what ``soft_update`` takes."""
        target, extra = self.arrays.target, self.arrays.extra_weight
        bits = f"i{target.itemsize}"
        return self.arrays, target.view(bits), extra.view(bits), target.dtype.type(self.tau)

    def layer_arrays(self, target: bool = False) -> list[Layer]:
        """Return copies of all layers as dense arrays (weight, mask, bias), shaped as those given at the start.

        With ``target`` those of the target; its mask also has the extras, connections that its network has dropped.
        """
        values, dense = self.arrays.target if target else self.arrays.parameters, []
        for layer in range(self.depth):
            stack = [self._dense(block, values) for block in self.blocks[layer :: self.depth]]
            for block, (weight, mask, _) in zip(self.blocks[layer :: self.depth], stack, strict=True):
                if target:
                    positions, extra_weight = self._extras(block)
                    weight.ravel()[positions], mask.ravel()[positions] = extra_weight, 1
            dense.append(tuple(map(self._stacked, zip(*stack, strict=True))))
        return dense

    def moment_arrays(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return copies of Adam's first and second moments of each layer's weights as dense arrays."""
        moments = self.arrays.first_moment, self.arrays.second_moment
        stacks = [self.blocks[layer :: self.depth] for layer in range(self.depth)]
        return [
            tuple(self._stacked([self._dense(block, values)[0] for block in stack]) for values in moments)
            for stack in stacks
        ]

    def _stacked(self, arrays) -> np.ndarray:
        """Return one array of each network of the stack as one, with the leading axes of the layers at the start."""
        return np.reshape(arrays, (*self.networks, *arrays[0].shape))

    def _dense(self, block: Block, values: np.ndarray) -> Layer:
        """Return weight, mask and bias of one layer as dense arrays, from parameters or those of the target."""
        topology, place = self._topology(block)
        weight = np.zeros((block.inputs, block.outputs), values.dtype)
        weight.ravel()[topology] = values[place]
        return weight, block.mask(topology), values[self.connections :][block.rows][None]

    def state_dict(self) -> dict[str, np.ndarray]:
        """Return everything that training changes, as numpy arrays by name; the layout in memory is no part of it."""
        arrays = self.arrays
        extras = [self._extras(block) for block in self.blocks]
        topology, place = map(np.concatenate, zip(*map(self._topology, self.blocks), strict=True))
        order = np.concatenate([place, np.arange(self.connections, len(arrays.parameters))])
        return {
            "sizes": arrays.sizes,
            "topology": topology,
            **{name: getattr(arrays, name)[order] for name in CARRIED},
            "extra_topology": np.concatenate([positions for positions, _ in extras]),
            "extra_weight": np.concatenate([weight for _, weight in extras]),
            "extra_ends": np.cumsum([len(weight) for _, weight in extras]),
            "steps": self.steps,
        }

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        """Take over what ``state_dict`` returned. Raises KeyError or ValueError when it belongs to another network."""
        for name, own in self.state_dict().items():
            shape = state["extra_topology"].shape if name in ("extra_topology", "extra_weight") else own.shape
            if state[name].shape != shape or state[name].dtype != own.dtype:
                raise ValueError(f"{name} is {state[name].dtype}{state[name].shape}, not {own.dtype}{shape}")
        if not np.array_equal(state["sizes"], self.arrays.sizes):
            raise ValueError(f"its layers are {state['sizes'].tolist()} wide, not {self.arrays.sizes.tolist()}")
        ends = state["extra_ends"][:-1]
        extras = list(zip(*(np.split(state[f"extra_{name}"], ends) for name in ("topology", "weight")), strict=True))
        for block, (extra_positions, _) in zip(self.blocks, extras, strict=True):
            positions = np.concatenate([extra_positions, state["topology"][block.connections]])
            if (positions < 0).any() or (positions >= block.inputs * block.outputs).any():
                raise ValueError(f"its connections do not fit a layer of {block.inputs} x {block.outputs}")
            if (np.diff(state["topology"][block.connections]) <= 0).any():
                raise ValueError("its connections are out of order")
        for name in CARRIED:
            getattr(self.arrays, name)[:] = state[name]  # the biases; the weights still go to their places
        for block in self.blocks:
            carried = {name: state[name][block.connections] for name in CARRIED}
            self._write(block, state["topology"][block.connections], **carried)
        self._write_extras(extras)
        self.steps = state["steps"].copy()
