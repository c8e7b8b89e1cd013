"""All compiled code: forward, backward, Adam, prune, and the updates of TD3 and SAC made of them.

From the bottom up: emitted instructions (``Emitter``), the two kernels made of them (``weighted_sum``,
``backward_row``), passes through a network, its optimizer and its target, and the updates. What lies where is told in
``__init__.py``.

numba compiles a function anew for each batch size, of which ``Activations`` tell it, and for each literal among its
arguments: hence numbers and flags with a name, ``FIRST``, ``OWN`` and so on.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.registry import cpu_target
from numba.extending import intrinsic, overload
from scipy.linalg import cython_blas  # noqa: F401  numba's np.dot takes it, and only what is loaded can be limited

from sparse_engine.compilation import compiled, compiled_apart, compiled_part, first_level_cache

BETAS = (0.9, 0.999)  # Adam's, as torch has them by default
NORMALIZATION_EPSILON = 1e-5  # beside the variance, as torch has it by default
LOG_STD_MIN, LOG_STD_MAX = -20.0, 2.0  # bounds of the Gaussian's logarithmic deviation, as SAC's authors have them
FIRST = np.intp(0)
OWN, TARGET = np.bool_(False), np.bool_(True)  # whose weights: the network's own, or its target's
TO_INPUTS, TO_PARAMETERS = np.bool_(False), np.bool_(True)  # where gradients go

# --- Tiles ------------------------------------------------------------------------------------------------------------
# A tile is some columns of a row of activations, counted in half vectors so that a batch of 100 wastes at most a half.
FEATURES = cpu_target.target_context.codegen().magic_tuple()[2]
VECTOR_BYTES = 64 if "+avx512f" in FEATURES else 32 if "+avx" in FEATURES else 16
CACHE_LINE = 64

# The most half vectors in a tile: what the registers hold, the forward pass's sums alone where there are but sixteen of
# them. Where the cache is small, it takes less of long vectors, so that the tiles of a band of inputs fill the cache
# and not more.
BACKWARD_TILE = 14
FORWARD_TILE = 26 if VECTOR_BYTES < 64 else 8 if first_level_cache() < 600 * 64 else 14
DOTS_AT_ONCE = 4


class Activations(NamedTuple):
    """Room for the values of all units of a stack for a batch: see ``activations``."""

    values: np.ndarray  # rows of ``stride``: of the stack's inputs, of all outputs, then scratch
    stride: int  # elements of a row, padded to whole cache lines
    batch: int  # of which so many are samples
    half_vectors: tuple[None, ...]  # as many as hold the batch; a tuple, for its length is part of its type


class Emitter:
    """Emits LLVM instructions on a tile: vectors of ``lanes`` elements, the last one half as long where need be."""

    def __init__(self, context, builder, dtype: types.Float):
        self.context, self.builder = context, builder
        self.element = context.get_value_type(dtype)
        self.bytes = dtype.bitwidth // 8
        self.lanes = VECTOR_BYTES // self.bytes

    def tile(self, half_vectors: int) -> list[tuple[int, int]]:
        """Return offset and length of each vector of a tile."""
        slots = [(i * self.lanes, self.lanes) for i in range(half_vectors // 2)]
        return slots + [(half_vectors // 2 * self.lanes, self.lanes // 2)] * (half_vectors % 2)

    def for_each_size(self, half_vectors, row: int, most: int, emit) -> None:
        """Switch on a tile's size; ``emit`` takes the vectors of one.

        Tiles of a row of so many half vectors, none of more than ``most``, come in two sizes, or one.
        """
        tiles = -(-row // most)
        done = self.builder.append_basic_block("tile_done")
        switch = self.builder.switch(half_vectors, done)
        for size in {row // tiles, -(-row // tiles)}:
            block = self.builder.append_basic_block("tile")
            switch.add_case(ir.Constant(half_vectors.type, size), block)
            self.builder.position_at_end(block)
            emit(self.tile(size))
            self.builder.branch(done)
        self.builder.position_at_end(done)

    def data(self, type_, array):
        """Return the pointer to an array's first element."""
        return self.context.make_array(type_)(self.context, self.builder, array).data

    def rows(self, type_, activations):
        """Return the pointer to the first row of ``activations``, whose values are of ``type_``, and their stride."""
        return self.data(type_, self.builder.extract_value(activations, 0)), self.builder.extract_value(activations, 1)

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
    typing, activations, out_at, source_at, tile_size, threshold, initial, resume, weight, index, start, stop,
    extra_weight, extra_index, extra_start, extra_stop
):  # fmt: skip
    """Write ``max(threshold, initial + sum_k weight[k] * row(index[k]))`` for one tile of one output's row.

    ``row(i)`` is the tile at ``values[source_at + i * stride]``; the sum runs over the connections ``start`` to
    ``stop`` and over the extras. The result goes to ``values[out_at]``; with ``resume``, what is there is the initial.
    """
    values, _, _, half_vectors = activations.types

    def codegen(context, builder, signature, arguments):
        _, out_at, source_at, tile_size, threshold, initial, resume, _, _, start, stop, _, _, *extra = arguments
        emitter = Emitter(context, builder, values.dtype)
        rows, stride = emitter.rows(values, arguments[0])
        data = [emitter.data(signature.args[i], arguments[i]) for i in (7, 8, 11, 12)]
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
                value, least = builder.load(total), emitter.splat(threshold, slot[1])
                value = builder.select(builder.fcmp_ordered("<", value, least), least, value)  # lets NaN through
                emitter.store(value, out, slot)

        emitter.for_each_size(tile_size, len(half_vectors), FORWARD_TILE, emit)
        return context.get_dummy_value()

    places, segment = (types.intp,) * 3, (types.intp,) * 2
    scalars = (values.dtype, values.dtype, types.boolean)
    arguments = (*places, *scalars, weight, index, *segment, extra_weight, extra_index, *segment)
    return types.void(activations, *arguments), codegen


@intrinsic(prefer_literal=True)
def backward_row(
    typing, activations, at, sum_at, delta_at, tile_size, threshold, resume, finish, to_input, to_weights,
    weight, gradient, place, index, start, stop
):  # fmt: skip
    """Propagate the gradients of one tile of a layer's outputs back to one of its inputs, over its connections.

    The input's row is at ``values[at]``, the gradient of output ``o`` at ``values[delta_at + o * stride]``, and
    connection k is that of ``index[k]`` with the weight at ``place[k]``. With ``to_weights``, the weights' gradients
    are added to what is in ``gradient``. With ``to_input``, the input's own gradient takes the place of its value, zero
    where that is at most ``threshold`` (0 for a ReLU, -inf for none). Its sum may take several calls, at
    ``values[sum_at]`` in between: all but the first ``resume``, the last is to ``finish``.
    """
    values, _, _, half_vectors = activations.types

    def codegen(context, builder, signature, arguments):
        emitter = Emitter(context, builder, values.dtype)
        flags = to_input.literal_value, to_weights.literal_value
        emit = BackwardRow(emitter, values, signature.args, arguments, *flags)
        emitter.for_each_size(arguments[4], len(half_vectors), BACKWARD_TILE, emit)
        return context.get_dummy_value()

    places, segment, flags = (types.intp,) * 4, (types.intp,) * 2, (types.boolean,) * 2
    arrays = (to_input, to_weights, weight, gradient, place, index)
    return types.void(activations, *places, values.dtype, *flags, *arrays, *segment), codegen


class BackwardRow:
    """Emits ``backward_row`` for one size of tile and one choice of where gradients go."""

    def __init__(self, emitter: Emitter, values, signature, arguments, to_input: bool, to_weights: bool):
        self.emitter, self.builder = emitter, emitter.builder
        self.to_input, self.to_weights = to_input, to_weights
        activations, at, sum_at, self.delta_at, _, self.threshold, self.resume, self.finish, *_ = arguments
        rows, self.stride = emitter.rows(values, activations)
        self.values = rows
        self.weights, self.gradients, self.places, self.indices = (
            emitter.data(signature[i], arguments[i]) for i in range(10, 14)
        )
        self.start, self.stop = arguments[14:]
        self.own_row, self.sum_row = self.builder.gep(rows, [at]), self.builder.gep(rows, [sum_at])

    def __call__(self, slots: list[tuple[int, int]]) -> None:
        """Emit it for a tile of these vectors."""
        emitter, builder, start = self.emitter, self.builder, self.start
        value = [emitter.load(self.own_row, slot) for slot in slots]
        zeros = [ir.Constant(v.type, [0.0] * v.type.count) for v in value]
        sums = list(zeros)
        if self.to_input:
            loaded = [emitter.load(self.sum_row, slot) for slot in slots]
            sums = [builder.select(self.resume, *pair) for pair in zip(loaded, zeros, strict=True)]
        sums = [emitter.variable(total) for total in sums]
        at_once = min(DOTS_AT_ONCE, emitter.lanes // 2)
        several = builder.and_(builder.sub(self.stop, start), ir.Constant(start.type, -at_once))
        self.connections(start, builder.add(start, several), at_once, slots, value, sums)
        self.connections(builder.add(start, several), self.stop, 1, slots, value, sums)
        if self.to_input:
            self.store(slots, value, zeros, sums)

    def connections(self, first, end, count: int, slots, value, sums) -> None:
        """Emit the loop over connections, so many at once that the sums of their products are added up together."""
        with cgutils.for_range_slice(self.builder, first, end, ir.Constant(first.type, count)) as (k, _):
            ks = [self.builder.add(k, ir.Constant(k.type, i)) for i in range(count)]
            each = [self.connection(k, slots, value, sums) for k in ks]
            if self.to_weights:
                pointers, dots = zip(*each, strict=True)
                self.emitter.add_sums(dots, pointers)

    def connection(self, k, slots, value, sums) -> tuple | None:
        """Emit one connection; return where its weight's gradient lies, and the vector whose sum is to be added."""
        emitter, builder = self.emitter, self.builder
        place = emitter.at(self.places, k)
        offset = builder.add(self.delta_at, builder.mul(emitter.at(self.indices, k), self.stride))
        row, dot = builder.gep(self.values, [offset]), None
        w = emitter.at(self.weights, place) if self.to_input else None
        for total, v, slot in zip(sums, value, slots, strict=True):
            delta = emitter.load(row, slot)  # used at once, for LLVM would keep others waiting on the stack
            if self.to_input:
                emitter.add_to(total, emitter.splat(w, slot[1]), delta)
            if self.to_weights:
                dot = emitter.add_to_dot(dot, v, delta)
        return (builder.gep(self.gradients, [place]), dot) if self.to_weights else None

    def store(self, slots, value, zeros, sums) -> None:
        """Emit how the input's gradient is stored, or its sum so far."""
        emitter, builder = self.emitter, self.builder
        with builder.if_else(self.finish) as (finished, unfinished):
            with finished:
                for v, zero, total, slot in zip(value, zeros, sums, slots, strict=True):
                    shut = builder.fcmp_ordered("<=", v, emitter.splat(self.threshold, slot[1]))
                    emitter.store(builder.select(shut, zero, builder.load(total)), self.own_row, slot)
            with unfinished:
                for total, slot in zip(sums, slots, strict=True):
                    emitter.store(builder.load(total), self.sum_row, slot)


# --- Passes through a network -----------------------------------------------------------------------------------------
# The L layers of N stacked networks are parts n * L + l. Their outputs ("rows") follow one another in that order, and
# so do their inputs ("columns"). The units of a stack are its shared inputs and then all rows. A layer of many inputs
# and connections is cut into bands of inputs, each with compressed rows of its own ("segments"): the forward pass takes
# one band after another, and the activations of a band stay in the first-level cache meanwhile. The backward pass has
# bands of outputs, likewise.


class Arrays(NamedTuple):
    """A stack of sparse networks, their targets and optimizer, of C connections, R rows, S segments and K columns."""

    sizes: np.ndarray  # [L + 1] widths of all layers, inputs first
    dense: np.ndarray  # [L] whether a layer's weights are one dense matrix [outputs, inputs], which BLAS multiplies
    bands: np.ndarray  # [L] in how many bands of inputs each layer is cut
    output_bands: np.ndarray  # [L] in how many bands of outputs each layer is cut for the backward pass
    first_row: np.ndarray  # [N * L] the first row of each part
    first_segment: np.ndarray  # [N * L] likewise
    first_column: np.ndarray  # [N * L] likewise
    segment_start: np.ndarray  # [S + 1] segment s holds connections segment_start[s] to segment_start[s + 1]
    input_index: np.ndarray  # [C] their inputs, numbered within the layer
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
    part_start: np.ndarray  # [N * L + 2] where parameters start that are a part's weights, then all biases; their end
    step_scale: np.ndarray  # [N * L + 1] by what Adam's steps are multiplied in each of these
    prune_guess: np.ndarray  # [N, L] bits of the last magnitude that was pruned, where the next search starts
    normalized: tuple[None, ...]  # one where hidden layers are, before their ReLU; a tuple for the sake of its type


def activations(network: Arrays, batch: int) -> Activations:
    """Allocate padded rows of cache lines for a stack's units, then for scratch.

    Scratch are one layer's sums in ``sparse_backward`` and, of a normalized stack, what ``normalize`` keeps: the
    normalized value of each of its R rows, and a scale for each part. Rows are an odd number of cache lines long, so
    that a column of tiles spreads over all sets of a cache.
    """
    dtype = network.parameters.dtype
    stride = (-(-batch * dtype.itemsize // CACHE_LINE) | 1) * CACHE_LINE // dtype.itemsize
    rows, parts = len(network.extra_start) - 1, len(network.first_row)
    kept = (rows + parts) * len(network.normalized)
    length = stride * int(network.sizes[0] + rows + network.sizes.max() + kept)
    room = np.zeros(length + CACHE_LINE // dtype.itemsize, dtype)
    start = -room.ctypes.data % CACHE_LINE // dtype.itemsize
    half_vectors = (None,) * -(-batch * dtype.itemsize * 2 // VECTOR_BYTES)
    return Activations(room[start : start + length], stride, batch, half_vectors)


@compiled_part
def units(activations: Activations, first: int, count: int) -> np.ndarray:
    """View the values of ``count`` units from ``first`` on as a matrix [count, padded batch]."""
    stride = activations.stride
    return activations.values[first * stride : (first + count) * stride].reshape(count, stride)


@compiled_part
def output_units(network: Arrays, n: int, activations: Activations) -> np.ndarray:
    """View the values of network ``n``'s outputs [outputs, padded batch]."""
    layers = len(network.bands)
    return units(activations, network.sizes[0] + network.first_row[n * layers + layers - 1], network.sizes[layers])


@compiled_part
def forward(network: Arrays, n: int, target: bool, activations: Activations) -> np.ndarray:
    """Apply network ``n`` of a stack, or its target, to the first units, with ReLU between its layers.

    Returns a view of its outputs [outputs, padded batch].
    """
    parameters = network.target if target else network.parameters
    layers, source = len(network.bands), 0
    for layer in range(layers):
        part = n * layers + layer
        hidden, plain = layer < layers - 1, len(network.normalized) == 0
        threshold = 0.0 if hidden and plain else -np.inf
        if network.dense[layer]:
            dense_forward(network, part, layer, parameters, activations, source, threshold)
        else:
            sparse_forward(network, part, layer, parameters, target, activations, source, threshold)
        if hidden:
            normalize(network, part, layer, activations)
        source = network.sizes[0] + network.first_row[part]
    return output_units(network, n, activations)


@compiled_apart
def sparse_forward(network, part, layer, parameters, target, activations, source, threshold):
    """Apply a layer to the units from ``source`` on."""
    values, stride, half_vectors = activations.values, activations.stride, len(activations.half_vectors)
    row, bands, outputs = network.first_row[part], network.bands[layer], network.sizes[layer + 1]
    biases, to, tiles = len(network.input_index) + row, network.sizes[0] + row, -(-half_vectors // FORWARD_TILE)
    for tile in range(tiles):
        tile_start, tile_end = tile * half_vectors // tiles, (tile + 1) * half_vectors // tiles
        offset = tile_start * VECTOR_BYTES // 2 // values.itemsize
        segment = network.first_segment[part]
        for band in range(bands):
            last_band = band == bands - 1
            for r in range(outputs):
                extra_start = extra_stop = np.uint32(0)
                if target and last_band:
                    extra_start, extra_stop = network.extra_start[row + r], network.extra_start[row + r + 1]
                weighted_sum(
                    activations, (to + r) * stride + offset, source * stride + offset, tile_end - tile_start,
                    threshold if last_band else -np.inf, parameters[biases + r], band > 0, parameters,
                    network.input_index, network.segment_start[segment + r], network.segment_start[segment + r + 1],
                    network.extra_weight, network.extra_index, extra_start, extra_stop
                )  # fmt: skip
            segment += outputs


@compiled_apart
def dense_forward(network, part, layer, parameters, activations, source, threshold):
    """Do ``sparse_forward`` for a dense layer."""
    inputs, outputs, row = network.sizes[layer], network.sizes[layer + 1], network.first_row[part]
    weight = parameters[network.part_start[part] : network.part_start[part + 1]]
    biases = len(network.input_index) + row
    y = units(activations, network.sizes[0] + row, outputs)
    np.dot(weight.reshape(outputs, inputs), units(activations, source, inputs), y)
    for o in range(outputs):
        for b in range(y.shape[1]):
            value = y[o, b] + parameters[biases + o]
            y[o, b] = threshold if value < threshold else value  # lets NaN through


def where_normalized(function: Callable) -> Callable:
    """Compile a kernel that runs only where the stack is normalized; for other stacks nothing is compiled."""
    kernel = compiled_apart(function)

    def stub(network, part, layer, activations):
        raise NotImplementedError("for compiled code alone")

    @overload(stub)
    def choose(network, part, layer, activations):
        if network.types[network.fields.index("normalized")].count == 0:
            return lambda network, part, layer, activations: None
        return lambda network, part, layer, activations: kernel(network, part, layer, activations)

    return stub


@compiled_part
def rows_to_normalize(network, part, layer, activations):
    """View a layer's outputs [outputs, padded batch], what they are normalized to, and by what [padded batch]."""
    row, outputs, rows = network.first_row[part], network.sizes[layer + 1], len(network.extra_start) - 1
    kept = network.sizes[0] + rows + network.sizes.max()
    values = units(activations, network.sizes[0] + row, outputs)
    return values, units(activations, kept + row, outputs), units(activations, kept + rows + part, 1)[0]


@where_normalized
def normalize(network, part, layer, activations):
    """Normalize a layer's outputs sample by sample over its units, then apply its ReLU (arXiv 1607.06450).

    There are no gains and biases to learn.
    """
    values, normalized, scale = rows_to_normalize(network, part, layer, activations)
    count, size = values.shape
    mean, square = np.zeros(size, values.dtype), np.zeros(size, values.dtype)
    for unit in range(count):
        for b in range(size):
            mean[b] += values[unit, b]
    mean /= values.dtype.type(count)
    for unit in range(count):
        for b in range(size):
            square[b] += (values[unit, b] - mean[b]) * (values[unit, b] - mean[b])
    for b in range(size):
        scale[b] = 1 / math.sqrt(square[b] / count + NORMALIZATION_EPSILON)
    for unit in range(count):
        for b in range(size):
            value = (values[unit, b] - mean[b]) * scale[b]
            normalized[unit, b] = value
            values[unit, b] = 0 if value < 0 else value  # lets NaN through


@where_normalized
def normalize_backward(network, part, layer, activations):
    """Turn the gradients by a layer's normalized outputs, in place, into those by the outputs before."""
    gradient, normalized, scale = rows_to_normalize(network, part, layer, activations)
    count, size = gradient.shape
    mean, product = np.zeros(size, gradient.dtype), np.zeros(size, gradient.dtype)
    for unit in range(count):
        for b in range(size):
            mean[b] += gradient[unit, b]
            product[b] += gradient[unit, b] * normalized[unit, b]
    mean /= gradient.dtype.type(count)
    product /= gradient.dtype.type(count)
    for unit in range(count):
        for b in range(size):
            gradient[unit, b] = scale[b] * (gradient[unit, b] - mean[b] - normalized[unit, b] * product[b])


@compiled_part
def backward(network: Arrays, n: int, to_parameters: bool, activations: Activations, first_input: int) -> None:
    """Propagate the gradients of network ``n``'s outputs, given in place of their values, back through it.

    They go to its parameters, or not ``to_parameters`` but to its inputs from ``first_input`` on. Gradients of hidden
    units, before their ReLU, take the place of their values.
    """
    layers, inputs = len(network.bands), network.sizes[0]
    for layer in range(layers - 1, -1, -1):
        part = n * layers + layer
        delta, to_inputs = inputs + network.first_row[part], layer > 0 or not to_parameters
        source = inputs + network.first_row[part - 1] if layer > 0 else 0
        first, threshold = (0, 0.0) if layer > 0 else (first_input, -np.inf)
        if layer < layers - 1:
            normalize_backward(network, part, layer, activations)
        if network.dense[layer]:
            dense_backward(network, part, layer, activations, source, delta, first, threshold, to_inputs, to_parameters)
        elif not to_parameters:
            sparse_backward(network, part, layer, activations, source, delta, first, threshold, True, False)
        elif to_inputs:
            sparse_backward(network, part, layer, activations, source, delta, first, threshold, True, True)
        else:
            sparse_backward(network, part, layer, activations, source, delta, first, threshold, False, True)
    if to_parameters:
        first_row, last = network.first_row[n * layers], n * layers + layers - 1
        for row in range(first_row, network.first_row[last] + network.sizes[layers]):
            values = activations.values[(inputs + row) * activations.stride :][: activations.batch]
            network.gradient[len(network.input_index) + row] = values.sum()


@compiled_apart
def sparse_backward(
    network, part, layer, activations, source, delta, first_input, threshold, to_inputs, to_weights
):  # fmt: skip
    """Do ``backward_row`` for the inputs of a layer from ``first_input`` on.

    The inputs are the units from ``source`` on; the gradients of the outputs are in the units from ``delta`` on.
    """
    if to_weights:  # what the kernel adds to: storing at first would be a branch for each connection
        network.gradient[network.part_start[part] : network.part_start[part + 1]] = 0
    stride, half_vectors = activations.stride, len(activations.half_vectors)
    sums, inputs = network.sizes[0] + len(network.extra_start) - 1, network.sizes[layer]
    tiles, bands = -(-half_vectors // BACKWARD_TILE), network.output_bands[layer]
    for tile in range(tiles):
        tile_start, tile_end = tile * half_vectors // tiles, (tile + 1) * half_vectors // tiles
        offset = tile_start * VECTOR_BYTES // 2 // activations.values.itemsize
        column = network.first_column[part]
        for band in range(bands):
            for i in range(first_input, inputs):
                backward_row(
                    activations, (source + i) * stride + offset, (sums + i) * stride + offset, delta * stride + offset,
                    tile_end - tile_start, threshold, band > 0, band == bands - 1, to_inputs, to_weights,
                    network.parameters, network.gradient, network.place, network.output_index,
                    network.column_start[column + i], network.column_start[column + i + 1]
                )  # fmt: skip
            column += inputs


@compiled_apart
def dense_backward(
    network, part, layer, activations, source, delta, first_input, threshold, to_inputs, to_weights
):  # fmt: skip
    """Do ``sparse_backward`` for a dense layer."""
    inputs, outputs = network.sizes[layer], network.sizes[layer + 1]
    first, end = network.part_start[part], network.part_start[part + 1]
    gradients, x = units(activations, delta, outputs), units(activations, source, inputs)
    gradients[:, activations.batch :] = 0
    if to_weights:
        np.dot(gradients, x.T, network.gradient[first:end].reshape(outputs, inputs))
    if to_inputs:
        to = np.dot(network.parameters[first:end].reshape(outputs, inputs).T, gradients)
        for i in range(first_input, inputs):
            for b in range(x.shape[1]):
                x[i, b] = 0 if x[i, b] <= threshold else to[i, b]


@compiled
def all_units(network: Arrays, activations: Activations, rows: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """Apply a stack to the first columns of picked rows; return a view of its units after their ReLU [units, batch]."""
    gather(activations, rows, indices, FIRST, network.sizes[0])
    for n in range(len(network.prune_guess)):
        forward(network, n, OWN, activations)
    return units(activations, FIRST, network.sizes[0] + len(network.extra_start) - 1)[:, : activations.batch]


@compiled
def outputs_for_one(actor: Arrays, observation: np.ndarray) -> np.ndarray:
    """Return an actor's outputs [outputs] for one observation [observations]."""
    x, layers = observation, len(actor.bands)
    for layer in range(layers):
        row, segment = len(actor.input_index) + actor.first_row[layer], actor.first_segment[layer]
        y = actor.parameters[row : row + actor.sizes[layer + 1]].copy()
        if actor.dense[layer]:
            weight = actor.parameters[actor.part_start[layer] : actor.part_start[layer + 1]]
            y += np.dot(weight.reshape(len(y), len(x)), x)
        else:
            for _ in range(actor.bands[layer]):
                for o in range(len(y)):
                    total = y[o]
                    for k in range(actor.segment_start[segment], actor.segment_start[segment + 1]):
                        total += actor.parameters[k] * x[actor.input_index[k]]
                    y[o] = total
                    segment += 1
        for o in range(len(y) if layer < layers - 1 else 0):
            y[o] = 0 if y[o] < 0 else y[o]  # lets NaN through
        x = y
    return x


# --- Optimizer and target ---------------------------------------------------------------------------------------------
@compiled_part
def adam_step(network: Arrays, steps: int, learning_rate: float, weight_decay: np.floating) -> None:
    """Take Adam's step number ``steps`` down the gradient, with an L2 penalty, in every parameter of a stack."""
    number = network.parameters.dtype.type
    root_scale = number(1 / math.sqrt(1 - BETAS[1] ** steps))  # both moments start at zero, which is corrected
    first_rate, second_rate, epsilon = number(1 - BETAS[0]), number(1 - BETAS[1]), number(1e-8)
    for part, scale in enumerate(network.step_scale):
        step_size = number(learning_rate * scale / (1 - BETAS[0] ** steps))
        # Views, whose indices start at 0: numba checks whether any other is negative, and then nothing is vectorized.
        here = slice(network.part_start[part], network.part_start[part + 1])
        parameters, gradient = network.parameters[here], network.gradient[here]
        first, second = network.first_moment[here], network.second_moment[here]
        for k in range(len(parameters)):
            g = gradient[k] + weight_decay * parameters[k]
            first[k] += first_rate * (g - first[k])
            second[k] += second_rate * (g * g - second[k])
            parameters[k] -= step_size * first[k] / (math.sqrt(second[k]) * root_scale + epsilon)


@compiled
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


@compiled
def prune_target(bits: np.ndarray, extra_bits: np.ndarray, guess: int) -> int:
    """Zero the smallest weights of a target layer until its network's count is left: the paper's piece 4.

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


@compiled_part
def count_up_to(bits: np.ndarray, limit: int) -> int:
    """Count the weights, given as integers of the same bits, of a magnitude up to that of ``limit``."""
    magnitude, count = (1 << (8 * bits.itemsize - 1)) - 1, 0
    for k in range(len(bits)):
        count += bits[k] & magnitude <= limit
    return count


@compiled_part
def zero_up_to(bits: np.ndarray, limit: int) -> None:
    """Zero the weights, given as integers of the same bits, of a magnitude up to that of ``limit``."""
    magnitude = (1 << (8 * bits.itemsize - 1)) - 1
    for k in range(len(bits)):
        bits[k] = bits[k] if bits[k] & magnitude > limit else 0


# --- Updates ----------------------------------------------------------------------------------------------------------
# Of a batch, the ``indices`` among a replay buffer's ``rows``, whose columns are observation, action, reward, next
# observation, and whether a state was the last one.


class Settings(NamedTuple):
    """The constants of an update; all but the learning rate in the type of the parameters."""

    low: np.ndarray  # [actions]
    high: np.ndarray  # [actions]
    gamma: np.floating
    learning_rate: float
    weight_decay: np.floating


@compiled_apart
def gather(activations: Activations, rows: np.ndarray, indices: np.ndarray, start: int, stop: int) -> None:
    """Write the columns ``start`` to ``stop`` of a batch into the first units."""
    to = units(activations, FIRST, stop - start)
    for b in range(activations.batch):
        row = rows[indices[b], start:stop]
        for column in range(len(row)):
            to[column, b] = row[column]


@compiled_part
def square_errors(output, next_values, rows, indices, reward, gamma):
    """Return the mean square of a critic's temporal-difference errors, and its mean value.

    Its values, ``output`` [padded batch], are replaced by their gradient; ``next_values`` [networks, batch] are all
    target critics', and the reward is in the column ``reward``.
    """
    size, loss, mean_value = len(indices), 0.0, 0.0
    output[size:] = 0
    for b in range(size):
        smallest = next_values[0, b]
        for other in range(1, len(next_values)):
            smallest = min(smallest, next_values[other, b])
        row = rows[indices[b]]
        error = output[b] - (row[reward] + gamma * (1 - row[-1]) * smallest)
        loss += error * error / size
        mean_value += output[b] / size
        output[b] = 2 * error / size
    return loss, mean_value


@compiled_part
def target_values(critics, activations, rows, indices):
    """Return all target critics' values [networks, batch] of next observations, and of actions already in place."""
    next_values = np.empty((len(critics.prune_guess), len(indices)), activations.values.dtype)
    gather(activations, rows, indices, critics.sizes[0] + 1, rows.shape[1] - 1)
    for n in range(len(next_values)):
        output = forward(critics, n, TARGET, activations)[0]
        for b in range(len(indices)):
            next_values[n, b] = output[b]
    return next_values


@compiled_part
def fit_critics(critics, activations, rows, indices, next_values, settings, steps):
    """Fit all critics to the smallest of ``next_values`` [networks, batch]; return the loss and the mean value."""
    reward = critics.sizes[0]
    gather(activations, rows, indices, FIRST, reward)
    losses, values = 0.0, 0.0
    for n in range(len(next_values)):
        output = forward(critics, n, OWN, activations)[0]
        loss, value = square_errors(output, next_values, rows, indices, reward, settings.gamma)
        losses += loss
        values += value
        backward(critics, n, TO_PARAMETERS, activations, FIRST)
    adam_step(critics, steps, settings.learning_rate, settings.weight_decay)
    return losses, values / len(next_values)


# --- TD3 --------------------------------------------------------------------------------------------------------------
@compiled_part
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


@compiled_part
def policy(actor: Arrays, target: bool, activations: Activations) -> np.ndarray:
    """Apply an actor, or its target; return its outputs, within [-1, 1], as a view [actions, padded batch]."""
    outputs = forward(actor, FIRST, target, activations)
    tanh(outputs.reshape(outputs.size))
    return outputs


@compiled
def update_td3_critics(
    actor, critics, actor_activations, activations, rows, indices, noise, policy_noise, noise_clip, settings, steps
):
    """Fit all critics to the smallest target value (clipped double Q-learning); return the loss and the mean value.

    ``noise`` [batch, actions], unscaled, smooths the next actions.
    """
    low, high = settings.low, settings.high
    observations, actions = actor.sizes[0], len(low)
    gather(actor_activations, rows, indices, observations + actions + 1, rows.shape[1] - 1)
    outputs, next_action = policy(actor, TARGET, actor_activations), units(activations, observations, actions)
    for a in range(actions):
        half, middle = (high[a] - low[a]) / 2, (high[a] + low[a]) / 2
        for b in range(len(indices)):
            smoothing = max(-noise_clip, min(noise[b, a] * policy_noise, noise_clip))
            next_action[a, b] = min(max(outputs[a, b] * half + middle + smoothing * half, low[a]), high[a])
    next_values = target_values(critics, activations, rows, indices)
    return fit_critics(critics, activations, rows, indices, next_values, settings, steps)


@compiled
def update_td3_actor(actor, critics, actor_activations, activations, rows, indices, settings, steps):
    """Move the actor towards actions that the first critic values more; return the loss."""
    low, high = settings.low, settings.high
    size, observations, actions = len(indices), actor.sizes[0], len(low)
    gather(actor_activations, rows, indices, FIRST, observations)
    outputs, action = policy(actor, OWN, actor_activations), units(activations, observations, actions)
    for a in range(actions):
        half, middle = (high[a] - low[a]) / 2, (high[a] + low[a]) / 2
        for b in range(size):
            action[a, b] = outputs[a, b] * half + middle
    gather(activations, rows, indices, FIRST, observations)
    output = forward(critics, FIRST, OWN, activations)[0]
    loss = -output[:size].mean()
    output[:size], output[size:] = -1 / size, 0
    backward(critics, FIRST, TO_INPUTS, activations, observations)
    for a in range(actions):
        outputs[a, size:] = 0
        for b in range(size):
            slope = (1 - outputs[a, b] * outputs[a, b]) * (high[a] - low[a]) / 2
            outputs[a, b] = action[a, b] * slope  # by now the gradient of the action
    backward(actor, FIRST, TO_PARAMETERS, actor_activations, FIRST)
    adam_step(actor, steps, settings.learning_rate, settings.weight_decay)
    return loss


@compiled
def act(actor: Arrays, observation: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Return TD3's deterministic action [actions] for one observation [observations]."""
    x = outputs_for_one(actor, observation)
    for a in range(len(x)):
        action = math.tanh(x[a]) * (high[a] - low[a]) / 2 + (high[a] + low[a]) / 2
        action = low[a] if action < low[a] else action  # rounding can leave the bounds; lets NaN through
        x[a] = high[a] if action > high[a] else action
    return x


# --- SAC --------------------------------------------------------------------------------------------------------------
@compiled_part
def draw(actor, activations, action, noise, settings):
    """Draw actions by ``noise`` [batch, actions] for the observations that are the actor's inputs.

    Writes them to ``action`` [actions, padded batch]. Returns a view of the actor's outputs [2 * actions, padded
    batch], the actions as they were before they were stretched to their bounds [actions, batch], and their
    log-probabilities [batch].
    """
    low, high = settings.low, settings.high
    size, actions = noise.shape
    outputs = forward(actor, FIRST, OWN, activations)
    squashed, log_probability, product = np.empty((actions, size)), np.zeros(size), np.ones(size)
    for a in range(actions):
        half, middle = (high[a] - low[a]) / 2, (high[a] + low[a]) / 2
        for b in range(size):
            log_std = min(max(np.float64(outputs[actions + a, b]), LOG_STD_MIN), LOG_STD_MAX)
            unbounded = outputs[a, b] + math.exp(log_std) * noise[b, a]
            e = math.exp(-2 * abs(unbounded))  # tanh is (1 - e) / (1 + e), and its slope 4e / (1 + e)^2
            squashed[a, b] = math.copysign((1 - e) / (1 + e), unbounded)
            action[a, b] = squashed[a, b] * half + middle
            log_probability[b] -= noise[b, a] ** 2 / 2 + log_std - 2 * abs(unbounded)
            product[b] *= 1 + e  # a logarithm for each sample is enough
    for b in range(size):
        log_probability[b] += 2 * math.log(product[b]) - actions * (math.log(4) + math.log(2 * math.pi) / 2)
    return outputs, squashed, log_probability


@compiled
def update_sac_critics(
    actor, critics, actor_activations, activations, rows, indices, noise, temperature, settings, steps
):
    """Fit all critics to the smallest of the target critics' values, plus what entropy the next actions add.

    ``noise`` [batch, actions] draws the next actions. Returns the loss and the mean value.
    """
    observations, actions = actor.sizes[0], len(settings.low)
    gather(actor_activations, rows, indices, observations + actions + 1, rows.shape[1] - 1)
    next_action = units(activations, observations, actions)
    _, _, next_log_probability = draw(actor, actor_activations, next_action, noise, settings)
    next_values = target_values(critics, activations, rows, indices)
    for n in range(len(next_values)):
        for b in range(len(indices)):
            next_values[n, b] -= temperature * next_log_probability[b]
    return fit_critics(critics, activations, rows, indices, next_values, settings, steps)


@compiled_part
def slope_of_minimum(critics, activations, action, size):
    """Return the mean minimum critic's value, and minus its gradient by each action [actions, batch].

    The critics' inputs are in place; ``action`` [actions, padded batch] is a view of the last of them.
    """
    minimum, value = np.zeros(size, np.int64), np.empty(size, activations.values.dtype)
    for n in range(len(critics.prune_guess)):
        output = forward(critics, n, OWN, activations)[0]
        for b in range(size):
            if n == 0 or not output[b] >= value[b]:  # lets NaN through
                minimum[b], value[b] = n, output[b]
    # A sample's gradient comes through its minimum critic. Each critic leaves its part in place of the actions, where
    # the next one no longer needs them.
    slope = np.zeros((len(action), size))
    for n in range(len(critics.prune_guess)):
        output = output_units(critics, n, activations)[0]
        output[:] = 0
        for b in range(size):
            if minimum[b] == n:
                output[b] = -1 / size
        backward(critics, n, TO_INPUTS, activations, critics.sizes[0] - len(action))
        for a in range(len(action)):
            for b in range(size):
                slope[a, b] += action[a, b]
    return value.mean(), slope


@compiled
def update_sac_actor(
    actor, critics, actor_activations, activations, rows, indices, noise, temperature, settings, steps
):
    """Move the actor towards actions that the minimum critic values more, and towards entropy.

    ``noise`` [batch, actions] draws its actions. Returns loss and entropy.
    """
    low, high = settings.low, settings.high
    size, observations, actions = len(indices), actor.sizes[0], len(low)
    gather(actor_activations, rows, indices, FIRST, observations)
    action = units(activations, observations, actions)
    outputs, squashed, log_probability = draw(actor, actor_activations, action, noise, settings)
    gather(activations, rows, indices, FIRST, observations)
    value, slope = slope_of_minimum(critics, activations, action, size)
    outputs[:, size:] = 0
    for a in range(actions):
        for b in range(size):
            y, log_std = squashed[a, b], np.float64(outputs[actions + a, b])
            # The log-probability falls with the slope of the tanh, 1 - y^2, whose logarithm has the derivative -2y.
            gradient = slope[a, b] * (1 - y * y) * (high[a] - low[a]) / 2 + temperature * 2 * y / size
            outputs[a, b] = gradient
            within = LOG_STD_MIN <= log_std <= LOG_STD_MAX
            outputs[actions + a, b] = gradient * math.exp(log_std) * noise[b, a] - temperature / size if within else 0
    backward(actor, FIRST, TO_PARAMETERS, actor_activations, FIRST)
    adam_step(actor, steps, settings.learning_rate, settings.weight_decay)
    entropy = -log_probability.mean()
    return -temperature * entropy - value, entropy
