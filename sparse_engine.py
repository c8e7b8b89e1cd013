"""DS-TD3 on connections alone: the update of ``dst_td3.py`` with no dense weight matrix, mask, gradient or moment.

``SparseTD3`` does what ``MaskedTD3`` does, on one CPU, with time and memory in proportion to the connections. The two
files read side by side, room by room; the room that only this one has comes first, the kernels, which numba compiles.
Full layers, all of TD3's, are matrices that BLAS multiplies: what a dense agent gains here is what compiling gains.

**What lies where.** A layer's connections are compressed rows: those into one output lie side by side, each a weight
and the 2-byte number of its input. A second index lists the same connections by input, each with its output and its
place among the weights. All layers of all stacked networks follow one another in the same flat arrays, biases at the
end. Activations are feature-major: one unit's values for the whole batch lie side by side, in whole cache lines. A
target holds a weight for each connection of its network, in the same places, and a few *extras*: connections that its
network has dropped since, and it has not.

**How the kernels move memory.** A connection multiplies a whole row of activations, so loading rows bounds the time.

- ``weighted_sum``, forward: some columns of one output's row (a tile) stay in vector registers while all connections
  into that output pass by, each with its input's tile. Then they are stored, bias and ReLU included. Large layers go by
  bands of inputs, whose tiles fit the first-level cache.
- ``backward_row``, backward: the same from one input over the connections by input. An output's gradient row is loaded
  once and used twice: it adds to the input's gradient, and its dot product with the input's values is the weight's
  gradient. The input's gradient then takes the place of its values, whose work is done.
- ``adam_step`` and ``soft_update`` stream through the flat arrays once; drop and grow, rare, sort them with numpy.
- ``prune_target`` sorts nothing: it counts, a stream of comparisons at a time, how many weights lie below a threshold.
"""

import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FunctionType
from typing import NamedTuple

import numba
import numpy as np
from llvmlite import ir
from numba import njit, prange, types
from numba.core import cgutils, event
from numba.core.registry import cpu_target
from numba.extending import intrinsic
from scipy.linalg import cython_blas  # noqa: F401  numba's np.dot takes it, and only what is loaded can be limited
from threadpoolctl import threadpool_limits

from dst_td3 import DORMANT, TD3, Arguments, Layer, ReplayBuffer, initial_values, step_scale

BETAS = (0.9, 0.999)  # Adam's, as torch has them by default
# No assumption that values are finite: a diverged network must show as one.
COMPILED = {"cache": True, "fastmath": {"contract", "reassoc", "nsz", "arcp"}, "error_model": "numpy"}

# --- Kernels ----------------------------------------------------------------------------------------------------------
# A tile is some columns of a row of activations, counted in half vectors so that a batch of 100 wastes at most a half.
FEATURES = cpu_target.target_context.codegen().magic_tuple()[2]
VECTOR_BYTES = 64 if "+avx512f" in FEATURES else 32 if "+avx" in FEATURES else 16
CACHE_LINE = 64


def first_level_cache() -> int:
    """Return the bytes of a core's first-level cache for data; 32 KB where Linux does not tell."""
    size = Path("/sys/devices/system/cpu/cpu0/cache/index0/size")  # Linux lists the one for data first
    return int(size.read_text().strip().removesuffix("K")) * 1024 if size.exists() else 32 * 1024


# The most half vectors in a tile: what the registers hold, the forward pass's sums alone where there are but sixteen of
# them. Where the cache is small, it takes less of long vectors, so that the tiles of a band of inputs (see Sparse
# networks) fill the cache and not more.
BACKWARD_TILE = 14
FORWARD_TILE = 26 if VECTOR_BYTES < 64 else 8 if first_level_cache() < 600 * 64 else 14
BAND_INPUTS = first_level_cache() // (FORWARD_TILE * VECTOR_BYTES // 2) // 32 * 32
BAND_OUTPUTS = first_level_cache() // (BACKWARD_TILE * VECTOR_BYTES // 2) // 32 * 32  # likewise, of the backward pass
BAND_CONNECTIONS = 16  # the fewest, on average, that a row of a band is worth its start for
DOTS_AT_ONCE = 4
FULL_OUTPUTS = 16  # the fewest for which BLAS is faster than the kernels


class Emitter:
    """Emits LLVM instructions on a tile: vectors of ``lanes`` elements, the last one half as long where need be."""

    def __init__(self, context, builder, dtype: types.Float):
        self.context, self.builder = context, builder
        self.element = context.get_value_type(dtype)
        self.bytes = dtype.bitwidth // 8
        self.lanes = VECTOR_BYTES // self.bytes

    def for_each_size(self, half_vectors, most: int, emit) -> None:
        """Switch on the tile's size, up to ``most``; ``emit`` takes offset and length of each of its vectors."""
        done = self.builder.append_basic_block("tile_done")
        switch = self.builder.switch(half_vectors, done)
        for size in range(1, most + 1):
            block = self.builder.append_basic_block("tile")
            switch.add_case(ir.Constant(half_vectors.type, size), block)
            self.builder.position_at_end(block)
            slots = [(i * self.lanes, self.lanes) for i in range(size // 2)]
            emit(slots + [(size // 2 * self.lanes, self.lanes // 2)] * (size % 2))
            self.builder.branch(done)
        self.builder.position_at_end(done)

    def data(self, type_, array):
        """Return the pointer to an array's first element."""
        return self.context.make_array(type_)(self.context, self.builder, array).data

    def at(self, pointer, index):
        """Load the element of ``pointer`` at ``index``; unsigned integers widen to the size of a pointer."""
        value = self.builder.load(self.builder.gep(pointer, [index]))
        narrow = isinstance(value.type, ir.IntType) and value.type.width < 64
        return self.builder.zext(value, ir.IntType(64)) if narrow else value

    def _vector_pointer(self, pointer, slot):
        offset, length = slot
        place = self.builder.gep(pointer, [ir.Constant(ir.IntType(64), offset)])
        return self.builder.bitcast(place, ir.VectorType(self.element, length).as_pointer())

    def load(self, pointer, slot):
        """Load the vector of a tile's ``slot``."""
        return self.builder.load(self._vector_pointer(pointer, slot), align=self.bytes)

    def store(self, value, pointer, slot) -> None:
        """Store the vector of a tile's ``slot``."""
        self.builder.store(value, self._vector_pointer(pointer, slot), align=self.bytes)

    def variable(self, value):
        """Return a new variable, kept in a register, that holds ``value``."""
        return cgutils.alloca_once_value(self.builder, value)

    def add_to(self, variable, a, b) -> None:
        """Add the product ``a * b`` to a variable."""
        self.builder.store(self.multiply_add(a, b, self.builder.load(variable)), variable)

    def multiply_add(self, a, b, c):
        """Return ``a * b + c`` in one instruction."""
        product = self.builder.fmul(a, b, flags=("contract",))
        return self.builder.fadd(product, c, flags=("contract",))

    def splat(self, scalar, length: int):
        """Return a vector of ``length`` copies of ``scalar``."""
        vector = self.builder.insert_element(
            ir.Constant(ir.VectorType(self.element, length), ir.Undefined), scalar, ir.Constant(ir.IntType(32), 0)
        )
        return self.shuffle(vector, vector, [0] * length)

    def shuffle(self, a, b, lanes: list[int]):
        """Return the given lanes of ``a`` followed by ``b``."""
        return self.builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(ir.IntType(32), len(lanes)), lanes))

    def fold(self, vector):
        """Add the upper half of a vector to its lower half."""
        lanes = list(range(vector.type.count))
        half = len(lanes) // 2
        return self.builder.fadd(self.shuffle(vector, vector, lanes[:half]), self.shuffle(vector, vector, lanes[half:]))

    def add_to_dot(self, total, x, y):
        """Add the product of two vectors to a tile's dot product so far, None before the first, and return that."""
        if total is None:
            return self.builder.fmul(x, y)
        return self.multiply_add(x, y, self.fold(total) if total.type.count > x.type.count else total)

    def sum_each(self, vectors: list):
        """Return the sum of each of several (a power of two) vectors, as one vector.

        Pairs first, neighbouring lanes within groups of as many lanes as there are vectors: cheap shuffles.
        """
        group, length = len(vectors), vectors[0].type.count
        starts = [start for first in range(0, length, group) for start in (first, length + first)]
        even = [lane for start in starts for lane in range(start, start + group, 2)]
        odd = [lane + 1 for lane in even]
        while len(vectors) > 1:
            pairs = zip(vectors[::2], vectors[1::2], strict=True)
            vectors = [self.builder.fadd(self.shuffle(a, b, even), self.shuffle(a, b, odd)) for a, b in pairs]
        total = vectors[0]
        while total.type.count > group:
            total = self.fold(total)
        return total

    def add_sums(self, vectors: list, pointers: list) -> None:
        """Add the sum of each vector to what is at its pointer."""
        total = self.sum_each([self.fold(v) if v.type.count == self.lanes else v for v in vectors])
        for lane, pointer in enumerate(pointers):
            value = self.builder.extract_element(total, ir.Constant(ir.IntType(32), lane))
            self.builder.store(self.builder.fadd(self.builder.load(pointer), value), pointer)


@intrinsic
def weighted_sum(
    typing, values, out_at, source_at, stride, half_vectors, floor, initial, resume, weight, index, start, stop,
    extra_weight, extra_index, extra_start, extra_stop
):  # fmt: skip
    """Write ``max(floor, initial + sum_k weight[k] * row(index[k]))`` for one tile of one output's row.

    ``row(i)`` is the tile at ``values[source_at + i * stride]``; the sum runs over the connections ``start`` to
    ``stop`` and over the extras. The result goes to ``values[out_at]``; with ``resume``, what is there is the initial.
    """

    def codegen(context, builder, signature, arguments):
        _, out_at, source_at, stride, half_vectors, floor, initial, resume, _, _, start, stop, _, _, *extra = arguments
        emitter = Emitter(context, builder, values.dtype)
        rows, *data = (emitter.data(signature.args[i], arguments[i]) for i in (0, 8, 9, 12, 13))
        out = builder.gep(rows, [out_at])

        def emit(slots):
            sums = []
            for slot in slots:
                first = builder.select(resume, emitter.load(out, slot), emitter.splat(initial, slot[1]))
                sums.append(emitter.variable(first))
            for weights, indices, first, end in ((*data[:2], start, stop), (*data[2:], *extra)):
                with cgutils.for_range_slice(builder, first, end, ir.Constant(first.type, 1)) as (k, _):
                    offset = builder.add(source_at, builder.mul(emitter.at(indices, k), stride))
                    row, w = builder.gep(rows, [offset]), emitter.at(weights, k)
                    for total, slot in zip(sums, slots, strict=True):
                        emitter.add_to(total, emitter.splat(w, slot[1]), emitter.load(row, slot))
            for total, slot in zip(sums, slots, strict=True):
                value, least = builder.load(total), emitter.splat(floor, slot[1])
                value = builder.select(builder.fcmp_ordered("<", value, least), least, value)  # lets NaN through
                emitter.store(value, out, slot)

        emitter.for_each_size(half_vectors, FORWARD_TILE, emit)
        return context.get_dummy_value()

    places, segment = (types.intp,) * 4, (types.intp, types.intp)
    scalars = (values.dtype, values.dtype, types.boolean)
    return types.void(values, *places, *scalars, weight, index, *segment, extra_weight, extra_index, *segment), codegen


@intrinsic
def backward_row(
    typing, values, at, sum_at, delta_at, stride, half_vectors, gate, resume, finish, weight, gradient, place, index,
    start, stop
):  # fmt: skip
    """Propagate the gradients of one tile of a layer's outputs back to one of its inputs, over its connections.

    The input's row is at ``values[at]``, the gradient of output ``o`` at ``values[delta_at + o * stride]``, and
    connection k is that of ``index[k]`` with the weight at ``place[k]``. Weights' gradients are added to what is in
    ``gradient``, unless that is None. Unless ``weight`` is None, the input's own gradient takes the place of its value,
    zero where that is at most ``gate`` (0 for a ReLU, -inf for none). Its sum may take several calls, at
    ``values[sum_at]`` in between: all but the first ``resume``, the last is to ``finish``.
    """
    to_input, to_weights = not isinstance(weight, types.NoneType), not isinstance(gradient, types.NoneType)

    def codegen(context, builder, signature, arguments):
        _, at, sum_at, delta_at, stride, half_vectors, gate, resume, finish, *_, start, stop = arguments
        emitter = Emitter(context, builder, values.dtype)
        rows, places, indices = (emitter.data(signature.args[i], arguments[i]) for i in (0, 11, 12))
        weights = emitter.data(signature.args[9], arguments[9]) if to_input else None
        gradients = emitter.data(signature.args[10], arguments[10]) if to_weights else None
        own_row, sum_row = builder.gep(rows, [at]), builder.gep(rows, [sum_at])

        def emit(slots):
            value = [emitter.load(own_row, slot) for slot in slots]
            zeros = [ir.Constant(v.type, [0.0] * v.type.count) for v in value]
            sums = [
                emitter.variable(builder.select(resume, emitter.load(sum_row, slot), zero) if to_input else zero)
                for zero, slot in zip(zeros, slots, strict=True)
            ]

            def connection(k):
                place = emitter.at(places, k)
                offset = builder.add(delta_at, builder.mul(emitter.at(indices, k), stride))
                row, dot = builder.gep(rows, [offset]), None
                w = emitter.at(weights, place) if to_input else None
                for total, v, slot in zip(sums, value, slots, strict=True):
                    delta = emitter.load(row, slot)  # used at once, for LLVM would keep others waiting on the stack
                    if to_input:
                        emitter.add_to(total, emitter.splat(w, slot[1]), delta)
                    if to_weights:
                        dot = emitter.add_to_dot(dot, v, delta)
                return (builder.gep(gradients, [place]), dot) if to_weights else None

            def connections(first, end, count):
                with cgutils.for_range_slice(builder, first, end, ir.Constant(first.type, count)) as (k, _):
                    each = [connection(builder.add(k, ir.Constant(k.type, i))) for i in range(count)]
                    if to_weights:
                        pointers, dots = zip(*each, strict=True)
                        emitter.add_sums(dots, pointers)

            at_once = min(DOTS_AT_ONCE, emitter.lanes // 2)
            several = builder.and_(builder.sub(stop, start), ir.Constant(start.type, -at_once))
            connections(start, builder.add(start, several), at_once)
            connections(builder.add(start, several), stop, 1)
            if to_input:
                with builder.if_else(finish) as (finished, unfinished):
                    with finished:
                        for v, zero, total, slot in zip(value, zeros, sums, slots, strict=True):
                            shut = builder.fcmp_ordered("<=", v, emitter.splat(gate, slot[1]))
                            emitter.store(builder.select(shut, zero, builder.load(total)), own_row, slot)
                    with unfinished:
                        for total, slot in zip(sums, slots, strict=True):
                            emitter.store(builder.load(total), sum_row, slot)

        emitter.for_each_size(half_vectors, BACKWARD_TILE, emit)
        return context.get_dummy_value()

    places, segment, flags = (types.intp,) * 5, (types.intp,) * 2, (types.boolean,) * 2
    arrays = (weight, gradient, place, index)
    return types.void(values, *places, values.dtype, *flags, *arrays, *segment), codegen


@njit(**COMPILED)
def batch_layout(batch: int, itemsize: int) -> tuple[int, int]:
    """Return the length of a row of activations in elements, and how many half vectors of it hold the batch.

    Rows are an odd number of cache lines long, so that a column of tiles spreads over all sets of a cache.
    """
    lines = -(-batch * itemsize // CACHE_LINE) | 1
    return lines * CACHE_LINE // itemsize, -(-batch * itemsize * 2 // VECTOR_BYTES)


# --- Sparse topology: pieces 3 and 4 of the paper ---------------------------------------------------------------------
# A position is input * outputs + output, its place in the dense matrix that is never made; a topology is a sorted array
# of them.


def drop_and_grow(
    weight: np.ndarray, topology: np.ndarray, positions: int, drop_fraction: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Choose which connections of a layer go and where new ones come: piece 3, the adaptation (the SET rule).

    As ``dst_td3.drop_and_grow``, with the same draws: ``weight``, or contributions, are those of the connections in
    ``topology``, in a layer of ``positions``. Returns which of them are kept (booleans), and the sorted positions of
    the grown ones.
    """
    kept = np.ones(len(topology), dtype=bool)
    if len(topology) == positions:
        return kept, topology[:0]
    for signed in (np.flatnonzero(weight >= 0), np.flatnonzero(weight < 0)):
        weakest_first = np.argsort(np.abs(weight[signed]), kind="stable")
        kept[signed[weakest_first[: round(drop_fraction * len(signed))]]] = False
    occupied = topology[kept]
    ranks = np.sort(rng.choice(positions - len(occupied), len(topology) - len(occupied), replace=False))
    # As many empty positions precede an occupied one as its own number exceeds its rank.
    empty_before = occupied - np.arange(len(occupied))
    return kept, ranks + np.searchsorted(empty_before, ranks, side="right")


@njit(**COMPILED)
def prune_target(bits: np.ndarray, extra_bits: np.ndarray, guess: int) -> int:
    """Zero the smallest weights of a target layer until its network's count is left: piece 4, the target's sparsity.

    The weights come as integers of the same bits, which, sign bit aside, order as the magnitudes do: ``bits`` those at
    the places of the network's own connections, ``extra_bits`` those elsewhere, as many as there are too many. Among
    equals the first goes first. The threshold is searched outwards from ``guess``, which decides nothing but the time
    that takes; returned is the threshold, a good guess for the next update, since a target moves slowly.
    """
    surplus = len(extra_bits)
    if surplus == 0:
        return guess
    largest = (1 << (8 * bits.itemsize - 1)) - 1
    # Always: ``dropped`` weights lie up to ``low``, no more than there are to go; up to ``high`` lie at least as many.
    # When the two are neighbours, all up to ``low`` go, and of those that equal ``high`` as many as are then missing.
    low, high, dropped, step = -1, largest, 0, 1 << (8 * bits.itemsize - 22)
    while high - low > 1:
        count = count_up_to(bits, guess) + count_up_to(extra_bits, guess)
        if count <= surplus:
            low, dropped = guess, count
        if count >= surplus:
            high = guess + (count == surplus)
        step *= 2
        if high == largest:
            guess = min(low + step, largest - 1)
        else:
            guess = (low + high) // 2 if low >= 0 else max(high - step, 0)
    for weights in (bits, extra_bits):
        zero_up_to(weights, low)
        for k in range(len(weights) if dropped < surplus else 0):
            if weights[k] & largest == high and dropped < surplus:
                weights[k] = 0
                dropped += 1
    return max(low, 0)


@njit(**COMPILED)
def count_up_to(bits: np.ndarray, limit: int) -> int:
    """Count the weights, given as integers of the same bits, of a magnitude up to that of ``limit``."""
    magnitude, count = (1 << (8 * bits.itemsize - 1)) - 1, 0
    for k in range(len(bits)):
        count += bits[k] & magnitude <= limit
    return count


@njit(**COMPILED)
def zero_up_to(bits: np.ndarray, limit: int) -> None:
    """Zero the weights, given as integers of the same bits, of a magnitude up to that of ``limit``."""
    magnitude = (1 << (8 * bits.itemsize - 1)) - 1
    for k in range(len(bits)):
        bits[k] = bits[k] if bits[k] & magnitude > limit else 0


# --- Sparse networks --------------------------------------------------------------------------------------------------
# The L layers of N stacked networks are numbered n * L + l. Their outputs ("rows") follow one another in that order,
# and so do their inputs ("columns"). The units of a stack are its shared inputs and then all rows. A layer of many
# inputs and connections is cut into bands of inputs, each with compressed rows of its own ("segments"): the forward
# pass takes one band after another, and the activations of a band stay in the first-level cache meanwhile.


class Arrays(NamedTuple):
    """A stack of sparse networks, their targets and optimizer, of C connections, R rows, S segments and K columns."""

    sizes: np.ndarray  # [L + 1] widths of all layers, inputs first
    bands: np.ndarray  # [L] in how many bands of inputs each layer is cut
    full: np.ndarray  # [L] whether a layer's weights are one dense matrix [outputs, inputs], which BLAS multiplies
    segment_start: np.ndarray  # [S + 1] segment s holds connections segment_start[s] to segment_start[s + 1]
    input_index: np.ndarray  # [C] their inputs, numbered within the layer
    column_bands: np.ndarray  # [L] in how many bands of outputs each layer is cut for the backward pass
    column_start: np.ndarray  # [K + 1] the same connections by column, band after band
    output_index: np.ndarray  # [C] their outputs, numbered within the layer
    place: np.ndarray  # [C] and where each is among the weights
    parameters: np.ndarray  # [C + R] weights, then biases
    gradient: np.ndarray  # [C + R]
    first_moment: np.ndarray  # [C + R]
    second_moment: np.ndarray  # [C + R]
    target: np.ndarray  # [C + R]
    extra_start: np.ndarray  # [R + 1] the target's extras into row r
    extra_index: np.ndarray  # [E] their inputs
    extra_weight: np.ndarray  # [E]
    part_start: np.ndarray  # [N * L + 2] where parameters start that are a layer's weights, then all biases; their end
    step_scale: np.ndarray  # [N * L + 1] by what Adam's steps are multiplied in each of these parts
    prune_guess: np.ndarray  # [N, L] bits of the last magnitude that was pruned, where the next search starts


@njit(**COMPILED)
def forward(network: Arrays, n: int, target: bool, values: np.ndarray, batch: int) -> np.ndarray:
    """Apply network ``n`` of a stack, or its target, to the inputs in ``values``, with ReLU between its layers.

    Returns a view of its outputs [outputs, padded batch].
    """
    parameters = network.target if target else network.parameters
    inputs, widths, bands = network.sizes[0], network.sizes[1:], network.bands
    source, row, segment = 0, n * widths.sum(), n * (widths * bands).sum()
    for layer in range(len(widths)):
        floor = 0.0 if layer < len(widths) - 1 else -np.inf
        if network.full[layer]:
            part = n * len(widths) + layer
            weight = parameters[network.part_start[part] : network.part_start[part + 1]]
            bias = parameters[len(network.input_index) + row :][: widths[layer]]
            full_forward(values, source, inputs + row, weight, bias, floor, batch)
        else:
            sparse_forward(network, parameters, target, layer, segment, row, values, source, floor, batch)
        source = inputs + row
        row += widths[layer]
        segment += widths[layer] * bands[layer]
    return units(values, source, widths[-1], batch)


@njit(**COMPILED)
def sparse_forward(network, parameters, target, layer, first_segment, row, values, source, floor, batch):
    """Apply a layer, whose outputs are the rows from ``row`` on, to the units from ``source`` on."""
    stride, half_vectors = batch_layout(batch, values.itemsize)
    biases, bands, outputs = len(network.input_index) + row, network.bands[layer], network.sizes[layer + 1]
    tiles = -(-half_vectors // FORWARD_TILE)
    for tile in range(tiles):
        tile_start, tile_end = tile * half_vectors // tiles, (tile + 1) * half_vectors // tiles
        offset = tile_start * VECTOR_BYTES // 2 // values.itemsize
        for band in range(bands):
            last_band = band == bands - 1
            for r in range(outputs):
                segment = first_segment + band * outputs + r
                extra_start = extra_stop = np.uint32(0)
                if target and last_band:
                    extra_start, extra_stop = network.extra_start[row + r], network.extra_start[row + r + 1]
                weighted_sum(
                    values, (network.sizes[0] + row + r) * stride + offset, source * stride + offset, stride,
                    tile_end - tile_start, floor if last_band else -np.inf, parameters[biases + r], band > 0,
                    parameters, network.input_index, network.segment_start[segment], network.segment_start[segment + 1],
                    network.extra_weight, network.extra_index, extra_start, extra_stop
                )  # fmt: skip


@njit(**COMPILED)
def units(values: np.ndarray, first: int, count: int, batch: int) -> np.ndarray:
    """View the values of ``count`` units from ``first`` on as a matrix [count, padded batch]."""
    stride, _ = batch_layout(batch, values.itemsize)
    return values[first * stride : (first + count) * stride].reshape(count, stride)


@njit(**COMPILED)
def full_forward(values, source, to, weight, bias, floor, batch):
    """Apply a full layer to the units from ``source`` on; its outputs are the units from ``to`` on."""
    inputs = len(weight) // len(bias)
    y = units(values, to, len(bias), batch)
    np.dot(weight.reshape(len(bias), inputs), units(values, source, inputs, batch), y)
    for o in range(y.shape[0]):
        for b in range(y.shape[1]):
            value = y[o, b] + bias[o]
            y[o, b] = floor if value < floor else value  # lets NaN through


@njit(**COMPILED)
def backward(network: Arrays, n: int, values: np.ndarray, batch: int, first_input: int, gradient) -> None:
    """Propagate the gradients of network ``n``'s outputs, given in place of their values, back through it.

    They go to its parameters' ``gradient``, or where that is None, to its inputs from ``first_input`` on. Gradients of
    hidden units, before their ReLU, take the place of their values.
    """
    inputs, widths, weight = network.sizes[0], network.sizes[1:], network.parameters
    to = inputs + (n + 1) * widths.sum()
    for layer in range(len(widths) - 1, 0, -1):
        to -= widths[layer]
        backward_layer(network, n, layer, values, to - widths[layer - 1], to, 0, 0.0, weight, gradient, batch)
    to -= widths[0]
    if gradient is None:
        backward_layer(network, n, 0, values, 0, to, first_input, -np.inf, weight, None, batch)
    else:
        backward_layer(network, n, 0, values, 0, to, 0, -np.inf, None, gradient, batch)
        stride, _ = batch_layout(batch, values.itemsize)
        for unit in range(to, to + widths.sum()):
            gradient[len(network.input_index) + unit - inputs] = values[unit * stride :][:batch].sum()


@njit(**COMPILED)
def backward_layer(network, n, layer, values, at, delta_at, first_input, gate, weight, gradient, batch):
    """Do ``backward_row`` for the inputs of a layer of network ``n`` from ``first_input`` on.

    The inputs are the units from ``at`` on; the gradients of the outputs are in the units from ``delta_at`` on.
    """
    inputs, outputs = network.sizes[layer], network.sizes[layer + 1]
    part = n * len(network.bands) + layer
    first, end = network.part_start[part], network.part_start[part + 1]
    if network.full[layer]:
        full_backward(values, first, end, outputs, at, delta_at, first_input, gate, weight, gradient, batch)
        return
    if gradient is not None:
        gradient[first:end] = 0  # what the kernel adds to: storing at first would be a branch for each connection
    stride, half_vectors = batch_layout(batch, values.itemsize)
    sums = network.sizes[0] + len(network.extra_start) - 1 + n * network.sizes.max()
    columns = network.sizes[:-1] * network.column_bands
    tiles, bands = -(-half_vectors // BACKWARD_TILE), network.column_bands[layer]
    for tile in range(tiles):
        tile_start, tile_end = tile * half_vectors // tiles, (tile + 1) * half_vectors // tiles
        offset = tile_start * VECTOR_BYTES // 2 // values.itemsize
        column = n * columns.sum() + columns[:layer].sum()
        for band in range(bands):
            for c in range(first_input, inputs):
                backward_row(
                    values, (at + c) * stride + offset, (sums + c) * stride + offset, delta_at * stride + offset,
                    stride, tile_end - tile_start, gate, band > 0, band == bands - 1, weight, gradient, network.place,
                    network.output_index, network.column_start[column + c], network.column_start[column + c + 1]
                )  # fmt: skip
            column += inputs


@njit(**COMPILED)
def full_backward(values, first, end, outputs, at, delta_at, first_input, gate, weight, gradient, batch):
    """Do ``backward_layer`` for a full layer, whose connections are those from ``first`` to ``end``."""
    inputs = (end - first) // outputs
    delta, x = units(values, delta_at, outputs, batch), units(values, at, inputs, batch)
    delta[:, batch:] = 0
    if gradient is not None:
        np.dot(delta, x.T, gradient[first:end].reshape(outputs, inputs))
    if weight is not None:
        to_inputs = np.dot(weight[first:end].reshape(outputs, inputs).T, delta)
        for i in range(first_input, inputs):
            for b in range(x.shape[1]):
                x[i, b] = 0 if x[i, b] <= gate else to_inputs[i, b]


@njit(**COMPILED)
def adam_step(network: Arrays, steps: int, learning_rate: float, weight_decay: np.floating) -> None:
    """Take Adam's step number ``steps`` down the gradient, with an L2 penalty, in every parameter of a stack."""
    parameters, gradient = network.parameters, network.gradient
    first, second = network.first_moment, network.second_moment
    number = parameters.dtype.type
    root_scale = number(1 / math.sqrt(1 - BETAS[1] ** steps))  # both moments start at zero, which is corrected
    first_rate, second_rate, epsilon = number(1 - BETAS[0]), number(1 - BETAS[1]), number(1e-8)
    for part, scale in enumerate(network.step_scale):
        step_size = number(learning_rate * scale / (1 - BETAS[0] ** steps))
        for k in range(network.part_start[part], network.part_start[part + 1]):
            g = gradient[k] + weight_decay * parameters[k]
            first[k] += first_rate * (g - first[k])
            second[k] += second_rate * (g * g - second[k])
            parameters[k] -= step_size * first[k] / (math.sqrt(second[k]) * root_scale + epsilon)


@njit(**COMPILED)
def soft_update(network: Arrays, target_bits: np.ndarray, extra_bits: np.ndarray, tau: np.floating) -> None:
    """Move a stack's targets, also given as the integers of their bits, by ``tau`` to their networks; then prune."""
    parameters, target, extra_weight = network.parameters, network.target, network.extra_weight
    for k in range(len(target)):
        target[k] += tau * (parameters[k] - target[k])
    for k in range(len(extra_weight)):
        extra_weight[k] -= tau * extra_weight[k]
    guesses, row = network.prune_guess.reshape(-1), 0
    for part in range(len(guesses)):
        next_row = row + network.sizes[1 + part % len(network.bands)]
        bits = target_bits[network.part_start[part] : network.part_start[part + 1]]
        extras = extra_bits[network.extra_start[row] : network.extra_start[next_row]]
        guesses[part] = prune_target(bits, extras, guesses[part])
        row = next_row


CARRIED = ("parameters", "target", "first_moment", "second_moment")  # what a connection keeps as the topology changes


class Block(NamedTuple):
    """One layer of one network of a stack, and where it lies in the stack's arrays."""

    inputs: int
    outputs: int
    bands: int
    column_bands: int
    connections: slice
    rows: slice
    segments: slice
    columns: slice

    @classmethod
    def after(cls, last: "Block | None", inputs: int, outputs: int, connections: int) -> "Block":
        """Lay out a layer of so many connections behind the ``last`` one."""
        bands = column_bands = 1
        if connections < inputs * outputs:
            bands = max(1, min(-(-inputs // BAND_INPUTS), connections // (BAND_CONNECTIONS * outputs)))
            column_bands = max(1, min(-(-outputs // BAND_OUTPUTS), connections // (BAND_CONNECTIONS * inputs)))
        lengths = (connections, outputs, bands * outputs, column_bands * inputs)
        parts = zip(last.ends if last else (0, 0, 0, 0), lengths, strict=True)
        return cls(inputs, outputs, bands, column_bands, *(slice(start, start + length) for start, length in parts))

    @property
    def full(self) -> bool:
        """Whether the layer holds every connection, and is large enough for BLAS."""
        connections = self.connections.stop - self.connections.start
        return connections == self.inputs * self.outputs and self.outputs >= FULL_OUTPUTS

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


def allocate(blocks: list[Block], layers: int, dtype: np.dtype) -> Arrays:
    """Return zeroed arrays for a stack of networks of so many ``layers`` each, with no extras."""
    sizes = [block.inputs for block in blocks[:layers]] + [blocks[layers - 1].outputs]
    connections, rows, segments, columns = blocks[-1].ends
    index = np.uint16 if max(sizes) <= 1 << 16 else np.uint32
    return Arrays(
        sizes=np.array(sizes),
        **{name: np.array([getattr(b, name) for b in blocks[:layers]]) for name in ("bands", "full", "column_bands")},
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
    )


class SparseNetwork:
    """A stack of sparse networks as compressed rows, with their Adam optimizer and their targets."""

    def __init__(self, layers: list[Layer], args: Arguments):
        self.args = args
        self.depth, self.networks = len(layers), layers[0].weight.shape[:-2]
        layers = [Layer(*(array.reshape(-1, *array.shape[-2:]) for array in layer)) for layer in layers]
        stack = [Layer(*(array[n] for array in layer)) for n in range(len(layers[0].weight)) for layer in layers]
        topologies = [np.flatnonzero(layer.mask) for layer in stack]
        self.blocks: list[Block] = []
        for layer, topology in zip(stack, topologies, strict=True):
            self.blocks.append(Block.after((self.blocks or [None])[-1], *layer.weight.shape, len(topology)))
        self.arrays = allocate(self.blocks, self.depth, layers[0].weight.dtype)
        for block, topology, layer in zip(self.blocks, topologies, stack, strict=True):
            self._write(block, topology, parameters=layer.weight.ravel()[topology])
        self.arrays.step_scale[:-1] = [step_scale(layer.mask, args) for layer in stack]
        self.arrays.parameters[len(self.arrays.input_index) :] = np.concatenate([layer.bias.ravel() for layer in stack])
        self.arrays.target[:] = self.arrays.parameters
        sparse = zip(self.blocks[: self.depth - 1], topologies, strict=False)
        self.initial = [topology.astype(np.min_scalar_type(b.inputs * b.outputs)) for b, topology in sparse]
        self.steps = np.zeros((), dtype=np.int64)

    def adapt(self, rng: np.random.Generator, x: np.ndarray | None = None) -> None:
        """Adapt the topology of every sparse layer (drop and grow); ``x`` is that of ``MaskedNetwork.adapt``."""
        extras, worth = [self._extras(block) for block in self.blocks], self._worth(x)
        for layer in range(self.depth - 1):
            for index in range(layer, len(self.blocks), self.depth):
                extras[index] = self._adapt(self.blocks[index], worth, *extras[index], rng)
        self._write_extras(extras)

    def _worth(self, x: np.ndarray | None) -> np.ndarray:
        """Return each connection's weight, or its contribution as ``dst_td3.contributions`` has it [C]."""
        arrays, weight = self.arrays, self.arrays.parameters[: len(self.arrays.input_index)]
        if x is None:
            return weight
        unit = arrays.input_index.astype(np.int64)  # among all of the stack, from among those of the layer
        for index, block in enumerate(self.blocks):
            if index % self.depth:
                unit[block.connections] += arrays.sizes[0] + self.blocks[index - 1].rows.start
        values = all_units(arrays, activations(arrays, len(x)), x, np.arange(len(x)))
        return weight * (values - values[:, :1]).std(axis=1)[unit]

    def _adapt(self, block: Block, worth: np.ndarray, extra_positions: np.ndarray, extra_weight, rng) -> tuple:
        """Adapt the topology of one layer. Takes and returns the positions and the weights of its target's extras."""
        arrays, (topology, place) = self.arrays, self._topology(block)
        size = block.inputs * block.outputs
        kept, grown = drop_and_grow(worth[place], topology, size, self.args.drop_fraction, rng)
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

    def recycle(self, rng: np.random.Generator) -> None:
        """As ``MaskedNetwork.recycle``, with the same draws: recycle dormant hidden units."""
        arrays = self.arrays
        for layer in range(self.depth - 1):
            weights, biases = [], []
            for block in self.blocks[layer :: self.depth]:
                topology, place = self._topology(block)
                output = topology % block.outputs
                bias = len(arrays.input_index) + np.arange(block.rows.start, block.rows.stop)
                magnitude = np.bincount(output, np.abs(arrays.parameters[place]), block.outputs)
                dormant = (magnitude < DORMANT) & (arrays.parameters[bias] <= 0)
                weights.append(place[dormant[output]])
                biases.append(bias[dormant])
            for there in map(np.concatenate, (weights, biases)):
                arrays.parameters[there] = initial_values(self.blocks[layer].inputs, len(there), rng)
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
        columns = outputs * block.column_bands // block.outputs * block.inputs + inputs
        by_segment, by_column = (np.argsort(numbers, kind="stable") for numbers in (segments, columns))
        arrays.segment_start[with_end(block.segments)] = start + start_of_each(segments, block.bands * block.outputs)
        arrays.input_index[block.connections] = inputs[by_segment]
        arrays.column_start[with_end(block.columns)] = start + start_of_each(columns, block.column_bands * block.inputs)
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
        soft_update(*self.soft_update_arguments())

    def soft_update_arguments(self) -> tuple:
        """Return what ``soft_update`` takes."""
        target, extra = self.arrays.target, self.arrays.extra_weight
        bits = f"i{target.itemsize}"
        return self.arrays, target.view(bits), extra.view(bits), target.dtype.type(self.args.tau)

    def layer_arrays(self) -> list[Layer]:
        """Return the networks' own layers (not the targets') as dense arrays."""
        dense = []
        for layer in range(self.depth):
            stack = zip(*map(self._dense, self.blocks[layer :: self.depth]), strict=True)
            dense.append(Layer(*(np.reshape(arrays, (*self.networks, *arrays[0].shape)) for arrays in stack)))
        return dense

    def _dense(self, block: Block) -> Layer:
        topology, place = self._topology(block)
        weight = np.zeros((block.inputs, block.outputs), self.arrays.parameters.dtype)
        weight.ravel()[topology] = self.arrays.parameters[place]
        bias = self.arrays.parameters[len(self.arrays.input_index) :][block.rows]
        return Layer(weight, block.mask(topology), bias[None])

    def topologies(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return the present and the first mask of each sparse layer (of the first network, where they are stacked)."""
        pairs = zip(self.blocks, self.initial, strict=False)
        return [(block.mask(self._topology(block)[0]), block.mask(initial)) for block, initial in pairs]

    def state(self) -> dict[str, np.ndarray]:
        """Return everything that training changes, as numpy arrays by name; the layout in memory is no part of it."""
        arrays, connections = self.arrays, len(self.arrays.input_index)
        extras = [self._extras(block) for block in self.blocks]
        topology, place = map(np.concatenate, zip(*map(self._topology, self.blocks), strict=True))
        order = np.concatenate([place, np.arange(connections, len(arrays.parameters))])
        return {
            "sizes": arrays.sizes,
            "topology": topology,
            **{name: getattr(arrays, name)[order] for name in CARRIED},
            "extra_topology": np.concatenate([positions for positions, _ in extras]),
            "extra_weight": np.concatenate([weight for _, weight in extras]),
            "extra_ends": np.cumsum([len(weight) for _, weight in extras]),
            "steps": self.steps,
        }

    def load_state(self, state: dict[str, np.ndarray]) -> None:
        """Take over what ``state`` returned. Raises KeyError or ValueError when it belongs to another network."""
        for name, own in self.state().items():
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


# --- TD3 --------------------------------------------------------------------------------------------------------------
class Settings(NamedTuple):
    """The constants of an update; all but the learning rate in the type of the parameters."""

    low: np.ndarray  # [actions]
    high: np.ndarray  # [actions]
    gamma: np.floating
    policy_noise: np.floating
    noise_clip: np.floating
    learning_rate: float
    weight_decay: np.floating


@njit(**COMPILED)
def gather(values: np.ndarray, rows: np.ndarray, picks: np.ndarray, start: int, stop: int) -> None:
    """Write the columns ``start`` to ``stop`` of picked rows of a replay buffer into the first units."""
    stride, _ = batch_layout(len(picks), values.itemsize)
    for b in range(len(picks)):
        for column in range(start, stop):
            values[(column - start) * stride + b] = rows[picks[b], column]


@njit(**COMPILED)
def all_units(network: Arrays, values: np.ndarray, rows: np.ndarray, picks: np.ndarray) -> np.ndarray:
    """Apply a stack to the first columns of picked rows; return a view of its units after their ReLU [units, batch]."""
    gather(values, rows, picks, 0, network.sizes[0])
    for n in range(len(network.prune_guess)):
        forward(network, n, False, values, len(picks))
    return units(values, 0, network.sizes[0] + len(network.extra_start) - 1, len(picks))[:, : len(picks)]


@njit(**COMPILED)
def tanh(values: np.ndarray) -> None:
    """Replace values by their tanh, (1 - e) / (1 + e) with e = exp(-2|x|): a plain loop, so on whole vectors."""
    for k in range(len(values)):
        z = -abs(np.float64(values[k])) / 64
        z = -0.3125 if z < -0.3125 else z
        e = 1.0
        for term in range(12, 0, -1):  # the series of exp(z), then by squaring exp(128 z)
            e = 1 + e * z / term
        for _ in range(7):
            e *= e
        values[k] = math.copysign((1 - e) / (1 + e), values[k])


@njit(**COMPILED)
def policy(actor: Arrays, target: bool, values: np.ndarray, batch: int) -> np.ndarray:
    """Apply an actor, or its target; return its outputs, within [-1, 1], as a view [actions, padded batch]."""
    outputs = forward(actor, 0, target, values, batch)
    tanh(outputs.reshape(outputs.size))
    return outputs


@njit(**COMPILED)
def square_errors(output, next_values, rows, picks, reward, gamma):
    """Return the mean square of a critic's temporal-difference errors, and its mean value.

    Its values, ``output`` [padded batch], are replaced by their gradient; ``next_values`` [networks, batch] are all
    target critics', and the reward is in the column ``reward``.
    """
    size, loss, mean_value = len(picks), 0.0, 0.0
    output[size:] = 0
    for b in range(size):
        smallest = next_values[0, b]
        for other in range(1, len(next_values)):
            smallest = min(smallest, next_values[other, b])
        row = rows[picks[b]]
        error = output[b] - (row[reward] + gamma * (1 - row[-1]) * smallest)
        loss += error * error / size
        mean_value += output[b] / size
        output[b] = 2 * error / size
    return loss, mean_value


@njit(**COMPILED, inline="always")  # a loop that is to run in threads must be in the caller itself
def target_values(critics, values, rows, picks):
    """Return all target critics' values [networks, batch] of the next observations and the actions in ``values``.

    The batch are the ``picks`` among a replay buffer's ``rows``, whose columns are those of a ``Batch``.
    """
    next_values = np.empty((len(critics.prune_guess), len(picks)), values.dtype)
    gather(values, rows, picks, critics.sizes[0] + 1, rows.shape[1] - 1)
    for n in prange(len(next_values)):
        next_values[n] = forward(critics, n, True, values, len(picks))[0, : len(picks)]
    return next_values


@njit(**COMPILED, inline="always")
def fit_critics(critics, values, rows, picks, next_values, settings, steps):
    """Fit all critics to the smallest of ``next_values`` [networks, batch]; return the loss and the mean value."""
    size, reward = len(picks), critics.sizes[0]
    gather(values, rows, picks, 0, reward)
    losses, mean_values = np.empty(len(next_values)), np.empty(len(next_values))
    for n in prange(len(next_values)):
        output = forward(critics, n, False, values, size)[0]
        losses[n], mean_values[n] = square_errors(output, next_values, rows, picks, reward, settings.gamma)
        backward(critics, n, values, size, 0, critics.gradient)
    adam_step(critics, steps, settings.learning_rate, settings.weight_decay)
    return losses.sum(), mean_values.mean()


@njit(**COMPILED)
def update_critics(actor, critics, actor_values, values, rows, picks, noise, settings, steps):
    """Fit all critics to the smallest target value (clipped double Q-learning); return the loss and the mean value."""
    low, high = settings.low, settings.high
    size, observations, actions = len(picks), actor.sizes[0], len(low)
    gather(actor_values, rows, picks, observations + actions + 1, rows.shape[1] - 1)
    outputs = policy(actor, True, actor_values, size)
    next_action = units(values, observations, actions, size)
    for a in range(actions):
        half, middle = (high[a] - low[a]) / 2, (high[a] + low[a]) / 2
        for b in range(size):
            smoothing = max(-settings.noise_clip, min(noise[b, a] * settings.policy_noise, settings.noise_clip))
            next_action[a, b] = min(max(outputs[a, b] * half + middle + smoothing * half, low[a]), high[a])
    return fit_critics(critics, values, rows, picks, target_values(critics, values, rows, picks), settings, steps)


def in_threads(update):
    """Compile an update of critics again, each critic by a thread of its own; every bit of what it does stays the same.

    A thread inherits from the one that starts it how denormals are treated.
    """
    options = {"prange": True, **dict.fromkeys(("comprehension", "inplace_binop", "numpy", "setitem"), False)}
    code = update.py_func.__code__.replace(co_qualname="update_critics_in_threads")  # apart in numba's cache
    return njit(**COMPILED, parallel=options)(FunctionType(code, update.py_func.__globals__))


@njit(**COMPILED)
def update_actor(actor, critics, actor_values, values, rows, picks, settings, steps):
    """Move the actor towards actions that the first critic values more; return the loss. Batch: ``target_values``."""
    low, high = settings.low, settings.high
    size, observations, actions = len(picks), actor.sizes[0], len(low)
    gather(actor_values, rows, picks, 0, observations)
    outputs, action = policy(actor, False, actor_values, size), units(values, observations, actions, size)
    for a in range(actions):
        half, middle = (high[a] - low[a]) / 2, (high[a] + low[a]) / 2
        for b in range(size):
            action[a, b] = outputs[a, b] * half + middle
    gather(values, rows, picks, 0, observations)
    output = forward(critics, 0, False, values, size)[0]
    loss = -output[:size].mean()
    output[:size], output[size:] = -1 / size, 0
    backward(critics, 0, values, size, observations, None)
    for a in range(actions):
        outputs[a, size:] = 0
        for b in range(size):
            slope = (1 - outputs[a, b] * outputs[a, b]) * (high[a] - low[a]) / 2
            outputs[a, b] = action[a, b] * slope  # by now the gradient of the action
    backward(actor, 0, actor_values, size, 0, actor.gradient)
    adam_step(actor, steps, settings.learning_rate, settings.weight_decay)
    return loss


@njit(**COMPILED)
def outputs_for_one(actor: Arrays, observation: np.ndarray) -> np.ndarray:
    """Return an actor's outputs [outputs] for one observation [observations]."""
    biases = actor.parameters[len(actor.input_index) :]
    x, row, segment = observation, 0, 0
    for layer in range(len(actor.bands)):
        y = biases[row : row + actor.sizes[layer + 1]].copy()
        if actor.full[layer]:
            weight = actor.parameters[actor.part_start[layer] : actor.part_start[layer + 1]]
            y += np.dot(weight.reshape(len(y), len(x)), x)
            segment += len(y)
        else:
            for _ in range(actor.bands[layer]):
                for output in range(len(y)):
                    total = y[output]
                    for k in range(actor.segment_start[segment], actor.segment_start[segment + 1]):
                        total += actor.parameters[k] * x[actor.input_index[k]]
                    y[output] = total
                    segment += 1
        row += len(y)
        # 0 * y, not 0: its type is that of y, and where y is not a number it is none either.
        x = np.maximum(y, 0 * y) if layer < len(actor.bands) - 1 else y
    return x


@njit(**COMPILED)
def act(actor: Arrays, observation: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Return the deterministic action [actions] for one observation [observations]."""
    x = np.tanh(outputs_for_one(actor, observation))
    action = x * (high - low) / 2 + (high + low) / 2
    return np.minimum(np.maximum(action, low), high).astype(x.dtype)  # which rounding can leave


class SparseTD3(TD3):
    """TD3 on sparse networks, on one CPU. The first one after an installation compiles the kernels."""

    CRITIC_UPDATES = (update_critics, in_threads(update_critics))  # by one thread, and by several

    def __init__(self, actor: list[Layer], critics: list[Layer], bounds: tuple, args: Arguments):
        self.dtype = actor[0].weight.dtype.type
        super().__init__(SparseNetwork, actor, critics, tuple(np.array(bound, self.dtype) for bound in bounds), args)
        constants = map(self.dtype, (args.gamma, args.policy_noise, args.noise_clip))
        self.settings = Settings(*self.bounds, *constants, args.learning_rate, self.dtype(args.weight_decay))
        self.batch_size = None
        threadpool_limits(1, "blas")  # a second thread takes a critic of its own
        if args.threads > 1:  # starting numba's threads would give torch as many, against its own setting
            numba.set_num_threads(min(args.threads, numba.config.NUMBA_NUM_THREADS))
        vector, matrix = np.zeros(1, self.dtype), np.zeros((1, 1), self.dtype)  # for their types; lengths do not matter
        with event.install_listener("numba:compile", CompilationNotice()):
            for function, arguments in self._calls(vector, (matrix, np.zeros(1, np.int64)), matrix):
                function.compile(tuple(map(numba.typeof, arguments)))

    def act(self, observation: np.ndarray) -> np.ndarray:
        """Return the deterministic action [actions] for one observation [observations]."""
        return act(self.actor.arrays, np.array(observation, self.dtype), *self.bounds)

    def sample(self, buffer: ReplayBuffer, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Draw a batch as numbers of the buffer's rows, from where the kernels gather it."""
        return buffer.rows, buffer.draw(self.args.batch_size, rng)

    def update_critics(self, batch: tuple[np.ndarray, np.ndarray], noise: np.ndarray) -> None:
        """Fit both critics to the smaller target value; ``noise`` [batch, actions], unscaled, is for next actions."""
        self.critics.steps += 1
        loss, value = self._critic_update(*self._arguments(self.critics, batch, noise))
        self.losses |= {"critic_loss": loss, "value": value}

    def update_actor(self, batch: tuple[np.ndarray, np.ndarray]) -> None:
        """Move the actor towards actions that the first critic values more (deterministic policy gradient)."""
        self.actor.steps += 1
        loss = update_actor(*self._arguments(self.actor, batch))
        self.losses |= {"actor_loss": loss}

    @property
    def _critic_update(self) -> Callable:
        return self.CRITIC_UPDATES[self.args.threads > 1]

    def _arguments(self, network: SparseNetwork, batch: tuple[np.ndarray, np.ndarray], *rest) -> tuple:
        """Return what the update of ``network`` takes, with room for the values of all units."""
        stacks = self.actor.arrays, self.critics.arrays
        if len(batch[1]) != self.batch_size:
            self.batch_size = len(batch[1])
            self.activations = tuple(activations(stack, self.batch_size) for stack in stacks)
        return *stacks, *self.activations, *batch, *rest, self.settings, int(network.steps)

    def _calls(self, observation: np.ndarray, batch: tuple, noise: np.ndarray) -> Iterator[tuple[Callable, tuple]]:
        """Yield the compiled functions that the agent calls, with arguments of the types that they take."""
        yield act, (self.actor.arrays, observation, *self.bounds)
        yield self._critic_update, self._arguments(self.critics, batch, noise)
        yield update_actor, self._arguments(self.actor, batch)
        yield from self._network_calls(batch)

    def _network_calls(self, batch: tuple) -> Iterator[tuple[Callable, tuple]]:
        """Yield those of them that do not depend on the algorithm."""
        yield soft_update, self.actor.soft_update_arguments()
        if self.args.drop_by == "contribution":
            yield all_units, (self.actor.arrays, self.activations[0], *batch)


def activations(stack: Arrays, batch_size: int) -> np.ndarray:
    """Allocate padded rows of cache lines for a stack's units, and for one layer's sums in each ``backward_layer``."""
    dtype = stack.parameters.dtype
    stride, _ = batch_layout.py_func(batch_size, dtype.itemsize)
    length = stride * int(stack.sizes[0] + len(stack.extra_start) - 1 + len(stack.prune_guess) * stack.sizes.max())
    room = np.zeros(length + CACHE_LINE // dtype.itemsize, dtype)
    start = -room.ctypes.data % CACHE_LINE // dtype.itemsize
    return room[start : start + length]


class CompilationNotice(event.Listener):
    """Says on stderr, once, that the kernels are being compiled."""

    given = False

    def on_start(self, event) -> None:
        """Say so at the first kernel that no earlier run has left compiled."""
        if not self.given:
            print("compiling the sparse engine for this machine (once, 1-2 minutes) ...", file=sys.stderr, flush=True)
        self.given = True

    def on_end(self, event) -> None:
        """Say nothing at its end."""
