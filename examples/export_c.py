"""Write a trained policy as one C99 header for a small machine: arrays that stay in flash, and a function that acts.

``python examples/export_c.py results/HalfCheetah-v4/ds-td3/seed0`` writes ``policy.h``. It allocates nothing, needs no
library but ``tanhf``, and costs what its connections cost: a sparse layer is the list of its connections, by output
unit; a full one is a plain matrix.
"""

import dataclasses
import itertools
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from dst_td3 import InputError, Layer, RunError, command_line, make_environment, policy, read_policy, replaced
from watch import finished_run


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Write the trained policy of a finished run as a C99 header."""

    run_directory: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_DIRECTORY")]
    """directory of a finished run, such as results/HalfCheetah-v4/ds-td3/seed0"""
    weights: Literal["float32", "int8"] = "float32"
    """int8: a byte for each weight, and one scale for each output unit"""
    output: Path = Path("policy.h")  # file to write


# --- Reading ----------------------------------------------------------------------------------------------------------
class Policy(NamedTuple):
    """A trained policy: its environment, the run's evaluation seed, its layers (numpy), the actions' bounds."""

    env: str
    env_kwargs: str | None
    seed: int
    layers: list[Layer]
    low: np.ndarray
    high: np.ndarray


def read_run(run_directory: Path) -> Policy:
    """Read the policy of a finished run. Raises InputError where there is none, or none that can be used."""
    run = finished_run(run_directory)
    layers, low, high = read_policy(run.policy, run.env)
    layers = [Layer(*(tensor.numpy() for tensor in layer)) for layer in layers]
    if not all(np.isfinite(array).all() for layer in layers for array in layer):
        raise InputError(f"{run.policy} has weights that are not finite: its networks had diverged")
    return Policy(run.env, run.env_kwargs, run.evaluation_seed, layers, low.numpy(), high.numpy())


def require_fit(trained: Policy) -> None:
    """Raise InputError where the policy's layers do not fit each other or its environment."""
    env = make_environment(trained.env, trained.env_kwargs)
    sizes = (env.observation_space.shape, env.action_space.shape)
    env.close()
    shapes = [layer.weight.shape for layer in trained.layers]
    fits = all(before[1] == after[0] for before, after in itertools.pairwise(shapes))
    if not fits or sizes != ((shapes[0][0],), (shapes[-1][1],)) or trained.low.shape != sizes[1]:
        layers = ", ".join(f"{inputs} x {outputs}" for inputs, outputs in shapes)
        raise InputError(
            f"a policy of {layers} does not fit {trained.env}, with {sizes[0][0]} observations "
            f"and {sizes[1][0]} actions"
        )


def quantize(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Round a weight [inputs, outputs] to int8, symmetric about zero; return it and each unit's scale [outputs]."""
    scale = np.abs(weight).max(axis=0) / np.float32(127)
    scale[scale == 0] = 1
    return np.rint(weight / scale).astype(np.int8), scale


def exact_policy(trained: Policy, weights: str) -> Callable[[np.ndarray], np.ndarray]:
    """Return the policy, of the weights as written, in float64: observations [..., n] to actions [..., actions]."""
    layers = []
    for weight, mask, bias in trained.layers:
        if weights == "int8":
            rounded, scale = quantize(weight)
            weight = rounded * scale
        layers.append(Layer(*(torch.from_numpy(array).double() for array in (weight, mask, bias))))
    low, high = (torch.from_numpy(bound).double() for bound in (trained.low, trained.high))
    return lambda observations: policy(layers, torch.from_numpy(observations).double(), low, high).numpy()


def observe(trained: Policy, count: int) -> np.ndarray:
    """Play the policy from its run's first evaluation on; return ``count`` float32 observations, the first ones."""
    env, act, observations = make_environment(trained.env, trained.env_kwargs), exact_policy(trained, "float32"), []
    observation, _ = env.reset(seed=trained.seed)
    while len(observations) < count:
        observations.append(observation.astype(np.float32))
        action = act(observations[-1][None])[0]
        observation, _, terminated, truncated, _ = env.step(action.astype(np.float32))
        if terminated or truncated:
            observation, _ = env.reset()
    env.close()
    return np.array(observations)


# --- Writing ----------------------------------------------------------------------------------------------------------
C_TYPES = {"float32": "float", "int8": "int8_t"}


def unsigned_type(largest: int) -> str:
    """Return the smallest type of C that holds whole numbers up to ``largest``."""
    return next(f"uint{bits}_t" for bits in (8, 16, 32) if largest < 2**bits)


def index_type_of(layer: Layer) -> str | None:
    """Return the type of a layer's indices of inputs; a full layer needs none."""
    return None if layer.mask.all() else unsigned_type(layer.mask.shape[0] - 1)


def c_array(kind: str, name: str, values: np.ndarray) -> str:
    """Return the definition of a constant array; a float is written so that it is read back exactly."""
    exact = (lambda v: np.format_float_scientific(v, unique=True, trim="0") + "f") if kind == "float" else str
    size = "".join(f"[{length}]" for length in values.shape)
    rows = values if values.ndim == 2 else values[None]
    lines = [
        textwrap.fill(", ".join(map(exact, row)), 120, initial_indent="    ", subsequent_indent="    ") for row in rows
    ]
    body = ",\n".join(f"    {{\n{line}\n    }}" for line in lines) if values.ndim == 2 else lines[0]
    return f"static const {kind} {name}{size} = {{\n{body}\n}};\n"


def c_dot(kind: str, index_type: str | None) -> str:
    """Return the function that sums a unit's products, over all inputs in order or over those of its connections.

    Four sums in turn stay nearer to the exact one than a single sum does, and take fewer instructions.
    """
    pointer, moving = (f"const {index_type} *from, ", "from") if index_type else ("", "input")
    product = "weight[{0}] * input[from[{0}]]" if index_type else "weight[{0}] * input[{0}]"
    four = "\n        ".join(f"{name} += {product.format(n)};" for n, name in enumerate("abcd"))
    return f"""
static inline float policy_dot_{index_type or "full"}(const {kind} *weight, {pointer}const float *input, int count)
{{
    float a = 0.0f, b = 0.0f, c = 0.0f, d = 0.0f;
    for (; count >= 4; count -= 4, weight += 4, {moving} += 4) {{
        {four}
    }}
    for (; count > 0; count--, weight++, {moving}++)
        a += {product.format(0)};
    return (a + b) + (c + d);
}}
"""


def c_layer(number: int, layer: Layer, weights: str, hidden: bool) -> str:
    """Return a layer's arrays and function: a full one's matrix, else counts, inputs and weights by output unit."""
    inputs, outputs = layer.weight.shape
    topology, index_type = layer.mask.T == 1, index_type_of(layer)
    values, scale = quantize(layer.weight) if weights == "int8" else (layer.weight, None)
    arrays = c_array(C_TYPES[weights], f"policy_weight_{number}", values.T[topology])
    arrays += c_array("float", f"policy_bias_{number}", layer.bias.ravel())
    if scale is not None:
        arrays += c_array("float", f"policy_scale_{number}", scale)
    if index_type:
        counts = topology.sum(axis=1)
        arrays += c_array(unsigned_type(counts.max()), f"policy_count_{number}", counts)
        arrays += c_array(index_type, f"policy_from_{number}", topology.nonzero()[1])
    start = f"\n    const {index_type} *from = policy_from_{number};" if index_type else ""
    advance = "\n        from += count;" if index_type else ""
    count = f"policy_count_{number}[unit]" if index_type else str(inputs)
    dot = f"policy_dot_{index_type or 'full'}(weight, {'from, ' if index_type else ''}input, count)"
    scaled = f" * policy_scale_{number}[unit]" if scale is not None else ""
    return f"""
{arrays}
static inline void policy_layer_{number}(const float *input, float *output)
{{
    const {C_TYPES[weights]} *weight = policy_weight_{number};{start}
    for (int unit = 0; unit < {outputs}; unit++) {{
        const int count = {count};
        const float sum = {dot}{scaled} + policy_bias_{number}[unit];
        output[unit] = {"sum > 0.0f ? sum : 0.0f" if hidden else "sum"};
        weight += count;{advance}
    }}
}}
"""


def c_check(trained: Policy, weights: str) -> str:
    """Return what checks a policy on the device: observations spread over an episode, their actions, a function."""
    observations = observe(trained, 1000)[::63]
    actions = exact_policy(trained, weights)(observations).astype(np.float32)
    return f"""
#ifdef POLICY_CHECK
#define POLICY_CHECKS {len(observations)}

{c_array("float", "policy_check_observation", observations)}\
{c_array("float", "policy_check_action", actions)}
/* Returns how many actions are off by more than 1e-4 of half their range. */
static inline int policy_check(void)
{{
    int wrong = 0;
    for (int check = 0; check < POLICY_CHECKS; check++) {{
        float action[POLICY_ACTIONS];
        policy_act(policy_check_observation[check], action);
        for (int n = 0; n < POLICY_ACTIONS; n++) {{
            const float off = action[n] - policy_check_action[check][n];
            const float allowed = 1e-4f * (policy_high[n] - policy_low[n]) / 2.0f;
            wrong += !(off >= -allowed && off <= allowed);
        }}
    }}
    return wrong;
}}
#endif
"""


def c_header(trained: Policy, weights: str) -> str:
    """Return the whole header of a policy, its weights as float32 or int8."""
    shapes = [layer.weight.shape for layer in trained.layers]
    connections = sum(int(layer.mask.sum()) for layer in trained.layers)
    index_types = dict.fromkeys(index_type_of(layer) for layer in trained.layers)
    dots = "".join(c_dot(C_TYPES[weights], index_type) for index_type in index_types)
    last = len(shapes)
    layers = "".join(c_layer(n, layer, weights, n < last) for n, layer in enumerate(trained.layers, start=1))
    names = ["observation", *(f"hidden_{n}" for n in range(1, last)), "action"]
    buffers = "\n".join(f"    float hidden_{n}[{shape[1]}];" for n, shape in enumerate(shapes[:-1], start=1))
    calls = "\n".join(f"    policy_layer_{n}({a}, {b});" for n, (a, b) in enumerate(itertools.pairwise(names), start=1))
    return f"""/* A policy for {trained.env} with {connections} connections, {weights}, written by export_c.py.
 *
 * policy_act(observation, action) acts. With POLICY_CHECK defined, policy_check() says how many of the actions that it
 * recomputes are wrong: none, where compiler, library and machine do their part.
 */
#ifndef POLICY_H
#define POLICY_H

#include <math.h>
#include <stdint.h>

#define POLICY_OBSERVATIONS {shapes[0][0]}
#define POLICY_ACTIONS {shapes[-1][1]}

{c_array("float", "policy_low", trained.low)}\
{c_array("float", "policy_high", trained.high)}\
{dots}{layers}
static inline void policy_act(const float observation[POLICY_OBSERVATIONS], float action[POLICY_ACTIONS])
{{
{buffers}
{calls}
    for (int n = 0; n < POLICY_ACTIONS; n++) {{
        const float low = policy_low[n], high = policy_high[n];
        const float scaled = tanhf(action[n]) * (high - low) / 2.0f + (high + low) / 2.0f;
        action[n] = scaled < low ? low : scaled > high ? high : scaled; /* rounding alone could leave the bounds */
    }}
}}
{c_check(trained, weights)}
#endif
"""


def export(args: Arguments) -> None:
    """Write the header. Raises InputError where there is nothing to write, or nowhere."""
    torch.set_num_threads(1)  # on busy cores, several threads wait for each other far longer than they compute
    trained = read_run(args.run_directory)
    require_fit(trained)
    text = c_header(trained, args.weights)
    try:
        with replaced(args.output) as file:
            file.write(text.encode())
    except RunError as error:  # nothing is lost, and another file will do
        raise InputError(str(error)) from error
    connections = sum(int(layer.mask.sum()) for layer in trained.layers)
    print(f"{args.output}: a policy for {trained.env}, {connections:,} connections, {args.weights}")


def main() -> int:
    """Run the command line and return its exit code."""
    return command_line(lambda name: export(tyro.cli(Arguments, prog=name)))


if __name__ == "__main__":
    sys.exit(main())
