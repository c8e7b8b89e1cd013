"""A roofline for the kernels: how fast they multiply and add, against what loads and dense BLAS allow.

``benchmark.py`` runs what is returned here in turn; nothing is measured by importing it.
"""

import functools
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sparse_engine.kernels import (
    VECTOR_BYTES,
    Activations,
    Arrays,
    Emitter,
    activations,
    backward,
    forward,
    sparse_backward,
)
from sparse_engine.networks import SparseNetwork

CACHED = 4096  # float32 elements whose loads the kernels' limits measure: half of a small first-level cache
LIMIT_SUMS = 12  # more than a multiply-add's latency asks for; with their factors they still fit in 16 registers
LIMIT_STEP = LIMIT_SUMS * VECTOR_BYTES // 4  # elements
TIMES = 300  # a kernel is repeated in a block
LIMITS = {1: "limit, a load for each multiply-add", 2: "limit, a load for two multiply-adds"}


@numba.njit
def repeat_forward(network: Arrays, room: Activations, times: int) -> None:
    """Apply the first critic ``times`` times."""
    for _ in range(times):
        forward(network, 0, False, room)


@numba.njit
def repeat_layer_backward(network: Arrays, room: Activations, times: int) -> None:
    """Propagate gradients back through a network of one layer ``times`` times, to its inputs too."""
    for _ in range(times):
        sparse_backward(network, 0, 0, room, 0, network.sizes[0], 0, -np.inf, True, True)


@numba.njit
def repeat_backward(network: Arrays, room: Activations, times: int) -> None:
    """Propagate gradients back through the first critic ``times`` times."""
    for _ in range(times):
        backward(network, 0, True, room, 0)


def multiply_adds_of_loads(uses: int) -> Callable[[np.ndarray, int], float]:
    """Compile the fastest multiply-adds on elements from the first-level cache, each loaded once for so many ``uses``.

    It goes through ``values`` [CACHED + LIMIT_STEP] until it has loaded so many elements, in vectors of the kernels'
    length, and keeps enough independent sums that no multiply-add waits for another.
    """

    @intrinsic
    def run(typing, values, loads):
        def codegen(context, builder, signature, arguments):
            emitter = Emitter(context, builder, values.dtype)
            data, first, lanes = emitter.data(values, arguments[0]), ir.Constant(arguments[1].type, 0), emitter.lanes
            slots = [(i * lanes, lanes) for i in range(LIMIT_SUMS // uses)]
            factors = [ir.Constant(ir.VectorType(emitter.element, lanes), [0.5 + use] * lanes) for use in range(uses)]
            zero = ir.Constant(factors[0].type, [0.0] * lanes)
            sums = [[emitter.variable(zero) for _ in factors] for _ in slots]
            stride = ir.Constant(first.type, len(slots) * lanes)
            with cgutils.for_range_slice(builder, first, arguments[1], stride) as (k, _):
                row = builder.gep(data, [builder.and_(k, ir.Constant(k.type, CACHED - 1))])
                for slot, totals in zip(slots, sums, strict=True):
                    vector = emitter.load(row, slot)
                    for total, factor in zip(totals, factors, strict=True):
                        emitter.add_to(total, vector, factor)
            total = functools.reduce(builder.fadd, [builder.load(total) for totals in sums for total in totals])
            return builder.extract_element(emitter.sum_each([total]), ir.Constant(ir.IntType(32), 0))

        return values.dtype(values, types.intp), codegen

    return numba.njit(lambda values, loads: run(values, loads))


def speed(work: Callable[[], object], operations: float) -> Callable[[], float]:
    """Return what does some work of so many operations, and returns how many GFLOP/s that was."""

    def measured() -> float:
        started = time.perf_counter()
        work()
        return operations / (time.perf_counter() - started) / 1e9

    return measured


Compared = dict[str, tuple[Callable[[], float], str]]  # by name: what measures its speed, and the name of its limit


def limits(batch: int) -> Compared:
    """Return the limits, and dense BLAS."""
    loads, compared = LIMIT_STEP * 10_000_000, {}
    values = torch.rand(CACHED + LIMIT_STEP).numpy()  # torch's memory begins at a cache line
    for uses, name in LIMITS.items():
        work = functools.partial(multiply_adds_of_loads(uses), values, loads)
        compared[name] = speed(work, 2.0 * uses * loads), name
    left, right, product = (np.ones((rows, 256), np.float32) for rows in (batch, 256, batch))

    def multiply() -> None:
        for _ in range(TIMES):
            np.dot(left, right, product)

    return compared | {"OpenBLAS, dense, 256 x 256": (speed(multiply, 2.0 * batch * 256 * 256 * TIMES), LIMITS[2])}


def of_kernels(network: Arrays, batch: int, label: str) -> Compared:
    """Return the forward and the backward kernel on the first of two stacked critics; the label ends their names."""
    room, compared = activations(network, batch), {}
    connections, first_layers = len(network.input_index) // 2, network.part_start[1]
    # Backwards a connection passes on two gradients, its weight's and its input's; inputs of the first layer need none.
    both = 2 * connections - first_layers
    for kernel, repeat, uses, products in (
        ("forward", repeat_forward, 1, connections),
        ("backward", repeat_backward, 2, both),
    ):
        work = functools.partial(repeat, network, room, TIMES)
        compared[f"{kernel} of a critic, {label}"] = speed(work, 2.0 * batch * products * TIMES), LIMITS[uses]
    return compared


def of_a_layer(inputs: int, outputs: int, density: float, batch: int) -> dict[str, Callable[[], float]]:
    """Return what applies a layer forwards and backwards, and returns how many times a second it did."""
    rng = np.random.default_rng(0)
    mask = np.zeros(inputs * outputs, np.float32)
    mask[rng.choice(len(mask), round(density * len(mask)), replace=False)] = 1
    mask = mask.reshape(inputs, outputs)
    weight = rng.standard_normal(mask.shape, dtype=np.float32) * mask
    network = SparseNetwork([(weight, mask, np.zeros((1, outputs), np.float32))], tau=0.0, drop_fraction=0.0).arrays

    def repeated(repeat: Callable) -> Callable[[], float]:
        room = activations(network, batch)
        room.values[:] = rng.standard_normal(len(room.values))

        def measured() -> float:
            started = time.perf_counter()
            repeat(network, room, TIMES)
            return TIMES / (time.perf_counter() - started)

        return measured

    return {"forward": repeated(repeat_forward), "backward": repeated(repeat_layer_backward)}
