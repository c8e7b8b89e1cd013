"""Measure exported policies on an emulated Cortex-M4: flash, RAM and instructions an action, as a Markdown table.

``python examples/measure_c.py RUN_DIRECTORY...`` needs Debian's gcc, gcc-arm-none-eabi, libnewlib-arm-none-eabi and
qemu-system-arm; where emlearn is installed, the dense policies among them are written by it as well.
"""

import ctypes
import dataclasses
import importlib.util
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import torch
import tyro
from export_c import Policy, c_array, c_header, observe, read_run, require_fit

from dst_td3 import InputError, RunError, command_line, evaluate, make_environment

STANDARD = ("-std=c99", "-Wall", "-Wextra", "-Werror", "-pedantic", "-O2")
BOARD = (
    *("-mcpu=cortex-m4", "-mthumb", "-mfloat-abi=hard", "-mfpu=fpv4-sp-d16", "-ffunction-sections", "-fdata-sections"),
    *("-nostartfiles", "-Wl,--gc-sections", "--specs=nano.specs", "--specs=nosys.specs"),
)
TOOLS = ("gcc", "arm-none-eabi-gcc", "arm-none-eabi-size", "qemu-system-arm")

# With its virtual clock at 2**5 ns an instruction, the emulator counts instructions in ticks of the board's 25 MHz.
SHIFT, TICK_NANOSECONDS = 5, 40

PROTOTYPES = """void act(const float *observation, float *action);
int check(void);
"""
OURS = f"""{PROTOTYPES}
#include "policy.h"
void act(const float *observation, float *action) {{ policy_act(observation, action); }}
#ifdef POLICY_CHECK
int check(void) {{ return policy_check(); }}
#else
int check(void) {{ return 0; }}
#endif
"""
EMLEARNS = f"""{PROTOTYPES}
#include "emlearn.h"
void act(const float *observation, float *action) {{ policy_regress(observation, INPUTS, action, ACTIONS); }}
int check(void) {{ return 0; }}
"""
NOTHING = f"""{PROTOTYPES}
void act(const float *observation, float *action) {{ (void)observation; (void)action; }}
int check(void) {{ return 0; }}
"""


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Print flash, RAM, instructions an action and returns of the policies of finished runs, as C on a Cortex-M4."""

    run_directories: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN_DIRECTORY...")]
    """directories of finished runs"""
    episodes: int = 10  # episodes that returns are the mean of, played by the same C on this machine


def run(*command: object) -> str:
    """Run a command and return its standard output. Raises RunError with its first complaint where it fails."""
    finished = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=300)
    if finished.returncode:
        lines = (finished.stderr + finished.stdout).splitlines()
        complaints = [line for line in lines if "error" in line] or lines or [f"exit code {finished.returncode}"]
        raise RunError(f"{command[0]}: {complaints[0]}")
    return finished.stdout


# --- C on this machine ------------------------------------------------------------------------------------------------
def write_ours(folder: Path, trained: Policy, weights: str) -> None:
    """Write a folder's act.c, which acts by our header."""
    (folder / "policy.h").write_text(c_header(trained, weights))
    (folder / "act.c").write_text(OURS)


def write_emlearns(folder: Path, trained: Policy) -> None:
    """Write a folder's act.c, which acts by what emlearn generates of a dense policy whose actions are in [-1, 1]."""
    from emlearn.net import c_generate_net_loadable

    weights, biases = ([getattr(layer, name) for layer in trained.layers] for name in ("weight", "bias"))
    activations = ["relu"] * (len(weights) - 1) + ["tanh"]
    code = c_generate_net_loadable(activations, weights, [bias.ravel() for bias in biases], prefix="policy")
    (folder / "emlearn.h").write_text(code)
    sizes = f"#define INPUTS {len(weights[0])}\n#define ACTIONS {len(trained.low)}\n"
    (folder / "act.c").write_text(sizes + EMLEARNS)


def include_paths() -> list[str]:
    """Return the compiler's options that find emlearn's headers, where it is installed."""
    if importlib.util.find_spec("emlearn") is None:
        return []
    import emlearn

    return [f"-isystem{emlearn.includedir}"]


def compiled_act(folder: Path, actions: int, compiler: str = "gcc") -> Callable[[np.ndarray], np.ndarray]:
    """Compile a folder's act.c here and return it as a function from observation to action. Raises RunError."""
    run(compiler, *STANDARD, *include_paths(), "-shared", "-fPIC", folder / "act.c", "-o", folder / "act.so", "-lm")
    function = ctypes.CDLL(str(folder / "act.so")).act
    function.argtypes, function.restype = [np.ctypeslib.ndpointer(np.float32, flags="C")] * 2, None

    def act(observation: np.ndarray) -> np.ndarray:
        action = np.empty(actions, dtype=np.float32)
        function(np.ascontiguousarray(observation, dtype=np.float32), action)
        return action

    return act


# --- C on the board ---------------------------------------------------------------------------------------------------
class Measured(NamedTuple):
    """What the board did: actions [observations, actions], actions that its check calls wrong, costs of an action."""

    actions: np.ndarray
    wrong: int
    instructions: float
    flash_bytes: int
    ram_bytes: int


def build(folder: Path, *options: str) -> tuple[Path, int, int]:
    """Link a folder's act.c for the board; return the program and its bytes in flash and in RAM, without the stack."""
    here, program = Path(__file__).resolve().parent, folder / "board.elf"
    sources = (here / "board.c", folder / "act.c", f"-T{here / 'board.ld'}")
    run(
        "arm-none-eabi-gcc",
        *STANDARD,
        *BOARD,
        *options,
        *include_paths(),
        f"-I{folder}",
        *sources,
        "-lm",
        "-o",
        program,
    )
    text, data, bss, *_ = map(int, run("arm-none-eabi-size", program).splitlines()[1].split()[:3])
    return program, text + data, data + bss


def emulate(program: Path, actions: int) -> tuple[np.ndarray, np.ndarray, int, int]:
    """Run a program of ``build``; return actions, instructions of each, the stack's bytes, and what its check says."""
    machine = ("qemu-system-arm", "-M", "mps2-an386", "-display", "none", "-chardev", "stdio,id=out")
    counting = ("-icount", f"shift={SHIFT}", "-semihosting-config", "enable=on,target=native,chardev=out")
    *rows, wrong = run(*machine, *counting, "-kernel", program).splitlines()
    numbers = np.array([[int(word, 16) for word in row.split()] for row in rows], dtype=np.uint32)
    performed, ticks, stack = numbers[:, :actions].copy().view(np.float32), numbers[:, actions], numbers[:, -1].max()
    return performed, ticks * TICK_NANOSECONDS / 2**SHIFT, int(stack), int(wrong, 16)


def measure(folder: Path, observations: np.ndarray, actions: int) -> Measured:
    """Measure a folder's act.c on the board. Flash and RAM are what it adds to a program, tanhf included."""
    sizes = dict(zip(("OBSERVATIONS", "INPUTS"), observations.shape, strict=True), ACTIONS=actions)
    defines = "".join(f"#define {name} {size}\n" for name, size in sizes.items())
    (folder / "observations.h").write_text(defines + c_array("float", "observation", observations))
    *_, wrong = emulate(build(folder, "-DPOLICY_CHECK")[0], actions)
    program, flash, ram = build(folder)
    performed, instructions, stack, _ = emulate(program, actions)
    with tempfile.TemporaryDirectory() as empty:
        shutil.copy(folder / "observations.h", empty)
        (Path(empty) / "act.c").write_text(NOTHING)
        _, flash_without, ram_without = build(Path(empty))
    return Measured(performed, wrong, instructions.mean(), flash - flash_without, ram - ram_without + stack)


# --- The table --------------------------------------------------------------------------------------------------------
def rows(trained: Policy, episodes: int) -> list[str]:
    """Measure a policy as float32 and int8, and as emlearn's where it is dense; return the rows of the table."""
    require_fit(trained)
    actions, observations, lines = len(trained.low), observe(trained, 16), []
    connections = sum(int(layer.mask.sum()) for layer in trained.layers)
    hidden = trained.layers[:-1]
    sparsity = 1 - sum(layer.mask.sum() for layer in hidden) / sum(layer.mask.size for layer in hidden)
    writers = {"float32": lambda folder: write_ours(folder, trained, "float32")}
    writers["int8"] = lambda folder: write_ours(folder, trained, "int8")
    unscaled = (trained.low == -1).all() and (trained.high == 1).all()
    if sparsity == 0 and unscaled and importlib.util.find_spec("emlearn"):
        writers["emlearn's float32"] = lambda folder: write_emlearns(folder, trained)
    for weights, write in writers.items():
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write(folder)
            measured = measure(folder, observations, actions)
            act = compiled_act(folder, actions)
            played = evaluate(act, make_environment(trained.env), episodes, trained.seed)
            mean = np.mean([total for total, _ in played])
            if measured.wrong or not np.allclose(measured.actions, [act(o) for o in observations], atol=1e-6):
                raise RunError(f"{weights}: the board's actions are not those of this machine")
        costs = (connections, measured.flash_bytes, measured.ram_bytes, round(measured.instructions))
        lines.append(f"| {sparsity:.2f} | {weights} | " + " | ".join(f"{c:,}" for c in costs) + f" | {mean:,.0f} |")
    return lines


def print_table(args: Arguments) -> None:
    """Measure the policies and print the table. Raises InputError where a tool or a policy is missing, and RunError."""
    torch.set_num_threads(1)  # as export_c.py does
    if missing := [tool for tool in TOOLS if shutil.which(tool) is None]:
        raise InputError(
            f"{', '.join(missing)} not found: on Debian, apt install gcc gcc-arm-none-eabi "
            "libnewlib-arm-none-eabi qemu-system-arm"
        )
    policies = [read_run(directory) for directory in args.run_directories]
    print("| sparsity | weights | connections | flash bytes | RAM bytes | instructions an action | return |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for trained in policies:
        print("\n".join(rows(trained, args.episodes)), flush=True)


def main() -> int:
    """Run the command line and return its exit code."""
    return command_line(lambda name: print_table(tyro.cli(Arguments, prog=name)))


if __name__ == "__main__":
    sys.exit(main())
