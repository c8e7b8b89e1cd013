"""Measures what sparsity costs and saves in seconds and bytes, side by side in one run on one pinned core.

usage: python benchmarks/benchmark.py [--peers PYTHON] [--results-dir DIR] [--repeats N] [--only PART ...]

What is compared runs in turn, a block of one and a block of the other, and figures are medians over the repeats: a
machine's speed drifts, and a ratio within one repeat does not. `make benchmark` also sets up the peers' environment.
"""

import functools
import itertools
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from subprocess import PIPE

import matplotlib.pyplot as plt
import numba
import numpy as np
import pandas as pd
import torch
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import roofline  # noqa: E402

import dst_sac  # noqa: E402
import dst_td3  # noqa: E402
import high_sparsity  # noqa: E402
import report  # noqa: E402

OBSERVATIONS, ACTIONS, BATCH = 17, 6, 100  # HalfCheetah-v4 and the paper's batch
BOUNDS = (-np.ones(ACTIONS, np.float32), np.ones(ACTIONS, np.float32))
PAPERS_CONNECTIONS = 32_768  # of a 256 x 256 layer at sparsity 0.5
PEERS = ("rltools", "stable-baselines3", "sbx")
LEARNING_STARTS = 1000
STEPS = 1000  # of a block of training
# Environment variables that change speeds, which the report names.
SETTINGS = ("RL_TOOLS_DISABLE_MKL", "OPENBLAS_CORETYPE", "NUMBA_CPU_FEATURES", "ATEN_CPU_CAPABILITY")


@dataclass(frozen=True)
class Options:
    """Measure seconds and bytes."""

    peers: Path | None = None
    """Python of an environment with requirements-peers.txt; without it the end-to-end part leaves all peers out"""
    results_dir: Path = Path("results/benchmarks")
    """where tables and figures go"""
    repeats: int = 7
    """blocks of each kind whose median counts"""
    core: int | None = None
    """the core to run on, else the last one this process may use"""
    only: tuple[str, ...] = ()
    """parts to run, all if none is given: updates, end_to_end, frontier, sac, step, inference, memory, kernels, layers,
    gpu"""


# ----------------------------------------------------------------------------------------------------------------------
# What is measured
# ----------------------------------------------------------------------------------------------------------------------


def make_agent(engine: str, width: int = 256, sparsity: float | None = None, device: str = "cpu"):
    """Make an agent of HalfCheetah's sizes; without ``sparsity`` a dense one."""
    method = "td3" if sparsity is None else "ds-td3"
    args = dst_td3.Arguments(method=method, sparsity=sparsity, hidden=(width, width), engine=engine, device=device)
    rng = np.random.default_rng(0)
    actor, critic = [OBSERVATIONS, width, width, ACTIONS], [OBSERVATIONS + ACTIONS, width, width, 1]
    counts = [dst_td3.count_connections(sizes, sparsity) for sizes in (actor, critic)]
    layers = dst_td3.initial_layers(actor, counts[0], rng), dst_td3.initial_layers(critic, counts[1], rng, (2,))
    connections = sum(counts[0]) + 2 * sum(counts[1])
    return args.make_agent(*layers, BOUNDS), connections


class Learner:
    """An agent that learns from random transitions."""

    def __init__(self, agent):
        self.agent, self.rng, self.step = agent, np.random.default_rng(1), 0
        self.buffer = dst_td3.ReplayBuffer(10_000, OBSERVATIONS, ACTIONS)
        self.buffer.rows[:] = self.rng.standard_normal(self.buffer.rows.shape)
        action = self.buffer.rows[:, OBSERVATIONS : OBSERVATIONS + ACTIONS]
        np.tanh(action, out=action)
        self.buffer.rows[:, -1] = 0
        self.buffer.added = len(self.buffer.rows)

    def update(self, updates: int) -> float:
        """Learn ``updates`` times, adaptations where they are due, and return the microseconds of one."""
        started = time.perf_counter()
        for _ in range(updates):
            self.step += 1
            self.agent.learn(self.buffer, self.step, self.rng)
        if self.agent.args.device == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - started) / updates * 1e6


def in_turn(blocks: dict[str, Callable[[], float]], repeats: int) -> pd.DataFrame:
    """Measure each block once to warm up, then all of them in turn ``repeats`` times; a column for each."""
    for block in blocks.values():
        block()
    return pd.DataFrame([{name: block() for name, block in blocks.items()} for _ in range(repeats)])


def equal_sparsity(width):
    """Return the sparsity at which a middle layer of a width, or of many, has as many connections as the paper's."""
    return 1 - PAPERS_CONNECTIONS / width**2


def dense_block(width: int) -> int:
    """Return how many updates a dense agent of a width makes on a core in about a second."""
    return max(4, 300 * 256**2 // width**2)


def state_bytes(agent) -> int:
    """Count the bytes of an agent's weights, indices or masks, moments, gradients and targets."""
    if agent.args.engine == "sparse":
        entries = itertools.chain(*(network.arrays for network in agent.networks.values()))
        return sum(array.nbytes for array in entries if isinstance(array, np.ndarray))
    total = 0
    for network in agent.networks.values():
        # A weight, a gradient, two moments and a target weight; a dense agent could do without its masks of ones.
        total += 5 * sum(parameter.nbytes for parameter in network.parameters)
        total += sum(layer.mask.nbytes for layer in network.layers) * (not agent.args.dense)
    return total


# ----------------------------------------------------------------------------------------------------------------------
# Parts
# ----------------------------------------------------------------------------------------------------------------------


def updates(options: Options) -> str:
    """Time of an update and bytes of an agent, dense and sparse, over sparsity and over width."""
    rows = []
    for width, sparsities in ((256, (0.25, 0.5, 0.8, 0.9, 0.95)), (512, ()), (1024, ()), (2048, ())):
        # At other widths than the paper's, as many connections in the middle layer as at its width and sparsity 0.5.
        sparsities = sparsities or (equal_sparsity(width),)
        cases = [("dense TD3 (torch)", "masked", None)]
        cases += [("DS-TD3, masks (torch)", "masked", sparsity) for sparsity in sparsities if width == 256]
        cases += [("DS-TD3, sparse engine", "sparse", sparsity) for sparsity in sparsities]
        agents = {(name, sparsity): make_agent(engine, width, sparsity) for name, engine, sparsity in cases}
        # A thousand updates hold one adaptation; dense torch, without any, is measured for about a second.
        lengths = {key: 1000 if "DS-TD3" in key[0] else dense_block(width) for key in agents}
        learners = {key: Learner(agent) for key, (agent, _) in agents.items()}
        blocks = {key: functools.partial(learners[key].update, lengths[key]) for key in agents}
        times = in_turn(blocks, options.repeats)
        dense = times.iloc[:, 0]
        for column, (name, sparsity) in enumerate(agents):
            agent, connections = agents[name, sparsity]
            rows.append(
                {
                    "implementation": name,
                    "width": width,
                    "sparsity": round(sparsity or 0.0, 4),
                    "connections": connections,
                    "microseconds": times.iloc[:, column].median(),
                    "speedup_over_dense": (dense / times.iloc[:, column]).median(),
                    "state_bytes": state_bytes(agent),
                }
            )
            print(f"  {name}, width {width}: {rows[-1]['microseconds']:,.0f} µs", file=sys.stderr, flush=True)
        dense_bytes = rows[-len(agents)]["state_bytes"]
        for row in rows[-len(agents) :]:
            row["bytes_over_dense"] = row["state_bytes"] / dense_bytes
    plot_growth(pd.DataFrame(rows), options.results_dir / "growth.png")
    table = written(options, "updates", rows, digits=4)
    return f"## Time of an update and bytes of the agent's state\n\n{table}\n\n![](growth.png)"


def plot_growth(table: pd.DataFrame, path: Path) -> None:
    """Plot the time of an update against connections at one width, and against width at equal connections."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    sparse = table[table.implementation.str.contains("sparse engine")]
    dense = table[table.implementation.str.contains("dense")]
    at_256 = sparse[sparse.width == 256].sort_values("connections")
    left.plot(at_256.connections, at_256.microseconds, "o-", label="DS-TD3, sparse engine")
    left.axhline(dense[dense.width == 256].microseconds.iloc[0], color="C1", linestyle="--", label="dense TD3 (torch)")
    left.set(xlabel="connections", ylabel="µs per update", title="width 256", xlim=(0, None), ylim=(0, None))
    equal = sparse[(sparse.sparsity - equal_sparsity(sparse.width)).abs() < 1e-3]
    right.plot(equal.width, equal.microseconds, "o-", label="DS-TD3, sparse engine, equal connections")
    right.plot(dense.width, dense.microseconds, "s--", label="dense TD3 (torch)")
    right.set(xscale="log", yscale="log", xlabel="width", ylabel="µs per update", title="as many connections")
    right.set_xticks(equal.width, equal.width)
    right.minorticks_off()
    for axes in (left, right):
        axes.legend()
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def end_to_end(options: Options) -> str:
    """Environment steps a second of whole training loops on HalfCheetah-v4, without evaluations."""
    papers, recipe = ("dst_td3", "--engine", "sparse"), ("high_sparsity", "--engine", "sparse")
    ours = {
        "td3": ("dst_td3", "--method", "td3", "--engine", "masked"),
        "td3, compiled": (*papers, "--method", "td3"),
        **{f"ds-td3, sparsity {s}": (*papers, "--sparsity", str(s)) for s in (0.5, 0.8, 0.9, 0.95)},
        **{f"ds-td3, sparsity {s}, recipe": (*recipe, "--sparsity", str(s)) for s in (0.9, 0.95)},
        "td3, width 77, recipe": (*recipe, "--method", "td3", "--hidden", "77", "77"),  # as many connections as 0.9
    }
    table = written(options, "end_to_end", train_in_turn(options, "td3", ours))
    return f"## Steps a second of training on HalfCheetah-v4, without evaluations\n\n{table}"


def training_speeds(
    options: Options, ours: dict[str, tuple[str, ...]], peers: Sequence[list[str]] = ()
) -> pd.DataFrame:
    """Return steps a second, a row for each repeat: of ``peers`` with their arguments, and of our programs by name."""
    with ExitStack() as running:
        steppers = {peer[0]: start_training(options.peers, peer, running) for peer in peers}
        for name, arguments in ours.items():
            steppers[name] = start_training(Path(sys.executable), list(arguments), running)
        return in_turn({name: step for name, step in steppers.items() if step}, options.repeats)


def train_in_turn(options: Options, algorithm: str, ours: dict[str, tuple[str, ...]]) -> list[dict]:
    """Return rows: steps a second of all libraries' ``algorithm`` and of ours, program and arguments given by name."""
    speeds = training_speeds(options, ours, [[name, algorithm] for name in PEERS if options.peers])
    rows = []
    for name in speeds:
        median = speeds[name].median()
        row = {"implementation": name, "steps_per_second": median, "microseconds_per_step": 1e6 / median}
        for library in filter(speeds.__contains__, PEERS):
            row[f"speedup_over_{library}"] = (speeds[name] / speeds[library]).median()
        rows.append(row)
    return rows


def frontier(options: Options) -> str:
    """Steps a second of training and bytes of agents with as many connections as RLx2's, beside dense ones."""
    rows = []
    for env, settings in report.RLX2.items():
        changes = itertools.chain(*((f"--{name}", value) for name, value in settings.items()))
        agents = {  # program, its arguments
            "td3, compiled": (dst_td3.Arguments, ("--env", env, "--engine", "sparse", "--method", "td3")),
            "ds-td3, recipe": (high_sparsity.HighSparsityArguments, ("--env", env, "--engine", "sparse", *changes)),
        }
        programs = {name: (kind.__module__, *arguments) for name, (kind, arguments) in agents.items()}
        speeds = training_speeds(options, programs)
        for name, (kind, arguments) in agents.items():
            run = dst_td3.Run(dst_td3.resolve(tyro.cli(kind, args=arguments)))
            rows.append(
                {
                    "environment": env,
                    "implementation": name,
                    "connections": run.costs["connections"],
                    "steps_per_second": speeds[name].median(),
                    "speedup_over_dense": (speeds[name] / speeds["td3, compiled"]).median(),
                    "state_bytes": state_bytes(run.agent),
                }
            )
    table = written(options, "frontier", rows)
    return (
        f"## Training with as many connections as RLx2, without evaluations, and bytes of the agent's state\n\n{table}"
    )


def sac(options: Options) -> str:
    """Time of SAC's update and steps a second of its training: dense, masked and sparse, with the paper's settings."""
    papers, sparsities = ("--er-lambda", "12", "80"), (0.5, 0.9)
    ours = {
        "sac (torch)": ("--method", "sac", "--engine", "masked"),
        "sac, compiled": ("--method", "sac", "--engine", "sparse"),
        "ds-sac, masks (torch), the paper's lambda": (*papers, "--engine", "masked"),
        "ds-sac, the paper's lambda": (*papers, "--engine", "sparse"),
        **{f"ds-sac, sparsity {s}": ("--sparsity", str(s), "--engine", "sparse") for s in sparsities},
    }
    blocks = {}
    for name, arguments in ours.items():
        args = dst_td3.resolve(tyro.cli(dst_sac.SACArguments, args=[*arguments, "--buffer-size", "1000"]))
        learner = Learner(dst_td3.Run(args).agent)
        blocks[name] = functools.partial(learner.update, 100 if "torch" in name else STEPS)
    times = in_turn(blocks, options.repeats)
    dense = times.iloc[:, 0]
    costs = [
        {
            "implementation": name,
            "microseconds": times[name].median(),
            "speedup_over_dense": (dense / times[name]).median(),
        }
        for name in times
    ]
    steps = train_in_turn(options, "sac", {name: ("dst_sac", *arguments) for name, arguments in ours.items()})
    tables = written(options, "sac_updates", costs), written(options, "sac_end_to_end", steps)
    title = "## SAC, batch 256: time of an update, steps a second of training on HalfCheetah-v4 without evaluations"
    return "\n\n".join([title, *tables])


def start_training(python: Path, arguments: list[str], running: ExitStack) -> Callable[[], float] | None:
    """Start a library's training in a process of its own, until ``running`` ends, and wait for the warm-up's end.

    Returns what takes a block of steps and returns how many a second, or None where the library does not start.
    """
    command = [str(python), str(ROOT / "benchmarks" / "peer.py"), *arguments]
    with tempfile.TemporaryFile("w+") as errors:
        process = running.enter_context(subprocess.Popen(command, stdin=PIPE, stdout=PIPE, stderr=errors, text=True))
        if not process.stdout.readline():
            errors.seek(0)
            return leave_out(" ".join(arguments), errors.read())

    def step() -> float:
        process.stdin.write(f"{STEPS}\n")
        process.stdin.flush()
        return STEPS / float(process.stdout.readline())

    return step


class Stopwatch:
    """Adds up the seconds of each part of a program, those of the parts within it not counted."""

    def __init__(self):
        self.seconds, self.within, self.since = defaultdict(float), ["everything else"], time.perf_counter()

    def stop(self) -> None:
        """Give the seconds since the last part began or ended to the part that is going on."""
        now = time.perf_counter()
        self.seconds[self.within[-1]] += now - self.since
        self.since = now

    def time(self, part: str, holder: object, name: str) -> None:
        """Count the calls of a holder's function as a part."""
        function = getattr(holder, name)

        def timed(*arguments, **options):
            self.stop()
            self.within.append(part)
            result = function(*arguments, **options)
            self.stop()
            self.within.pop()
            return result

        setattr(holder, name, timed)


def step(options: Options) -> str:
    """Where the microseconds of a training step go, on HalfCheetah-v4."""
    columns = {}
    for label, changes in (
        ("td3, compiled", {"method": "td3"}),
        *((f"ds-td3, sparsity {s}", {"sparsity": s}) for s in (0.5, 0.9, 0.95)),
    ):
        args = dst_td3.Arguments(**changes, engine="sparse", learning_starts=LEARNING_STARTS)
        run = dst_td3.Run(dst_td3.resolve(args))
        while run.step < 2 * LEARNING_STARTS:
            run.advance()
        columns[label] = step_parts(run, options.repeats)
    order = columns[label].index  # a dense agent lacks the adaptation
    table = pd.DataFrame(columns).reindex(order).fillna(0).rename_axis("part").reset_index()
    shown = written(options, "step", table, digits=1)
    return f"## Where a training step's microseconds go, on HalfCheetah-v4\n\n{shown}"


def step_parts(run: dst_td3.Run, repeats: int) -> pd.Series:
    """Return the medians, over blocks of steps, of the microseconds a step that each part of it takes."""
    agent, watch = run.agent, Stopwatch()
    watch.time("critics' update", agent.engine, "update_critics")
    watch.time("actor's update, every second step", agent.engine, "update_actor")
    for network in agent.networks.values():
        watch.time("targets, every second step", network, "update_target")
        watch.time("adaptation, every thousandth step", network, "adapt")
    watch.time("noise, and what calls the updates", agent, "learn")
    watch.time("draw of a batch", run.buffer, "draw")
    watch.time("action", agent, "explore")
    watch.time("MuJoCo", run.env.unwrapped, "do_simulation")
    watch.time("environment around it, checks", run.env, "step")
    watch.time("replay buffer", run.buffer, "add")
    blocks = []
    for _ in range(repeats):
        watch.seconds.clear()
        for _ in range(STEPS):
            run.advance()
        watch.stop()
        blocks.append({part: 1e6 * seconds / STEPS for part, seconds in watch.seconds.items()})
    parts = pd.DataFrame(blocks).fillna(0).median().sort_values(ascending=False)
    return pd.concat([parts, pd.Series({"all": parts.sum()})])


def leave_out(name: str, reason: str) -> None:
    """Say in one line, the last one of the reason, why something is not measured."""
    print(f"  {name} is left out: {(reason.splitlines() or ['it ended'])[-1]}", file=sys.stderr, flush=True)


def inference(options: Options) -> str:
    """Latency of one action and bytes of the stored policy."""
    observations = np.random.default_rng(0).standard_normal((1000, OBSERVATIONS))
    blocks, sizes = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for name, engine, sparsity in (
            ("dense TD3 (torch)", "masked", None),
            *((f"DS-TD3, sparse engine, sparsity {s}", "sparse", s) for s in (0.5, 0.8, 0.9, 0.95)),
        ):
            agent, _ = make_agent(engine, sparsity=sparsity)

            def act(agent=agent) -> float:
                started = time.perf_counter()
                for observation in observations:
                    agent.act(observation)
                return (time.perf_counter() - started) / len(observations) * 1e6

            blocks[name] = act
            path = Path(folder) / "policy.npz"
            dst_td3.save_policy(path, agent.policy_layers(), BOUNDS, "HalfCheetah-v4")
            sizes[name] = path.stat().st_size
    times = in_turn(blocks, options.repeats)
    dense = times.iloc[:, 0]
    rows = [
        {
            "implementation": name,
            "microseconds_per_action": times[name].median(),
            "speedup_over_dense": (dense / times[name]).median(),
            "policy_bytes": sizes[name],
        }
        for name in times
    ]
    table = written(options, "inference", rows)
    return f"## Latency of one action and bytes of the stored policy\n\n{table}"


def memory(options: Options) -> str:
    """Memory that agents take, as their arrays count it and as the growth of a process's peak shows it."""
    rows = []
    for width, sparsity in ((1024, None), (1024, 0.5), (1024, 0.9), (2048, None), (2048, 0.5), (2048, 0.9)):
        measured = measure_alone("masked" if sparsity is None else "sparse", sparsity, width)
        rows.append({"width": width, "sparsity": sparsity or 0.0, **measured})
    table = written(options, "memory", rows, digits=6)
    return (
        "## Bytes of the agent's state, counted and seen\n\n"
        "Counted: weights, indices or masks, moments, gradients and targets, as in the first table. Seen: how much the "
        "peak of the process's memory grew while the agent was made from its first layers and learned; room for a "
        f"batch and temporaries of the update are part of it.\n\n{table}"
    )


def kernels(options: Options) -> str:
    """How fast the kernels multiply and add, against what loads and dense BLAS allow on the same machine."""
    compared = roofline.limits(BATCH)
    for sparsity in (0.5, 0.8, 0.9, 0.95):
        network = make_agent("sparse", sparsity=sparsity)[0].engine.critics.arrays
        compared |= roofline.of_kernels(network, BATCH, f"sparsity {sparsity}")
    speeds = in_turn({name: block for name, (block, _) in compared.items()}, options.repeats)
    rows = [
        {"kernel": name, "gflops": speeds[name].median(), "share_of_limit": (speeds[name] / speeds[limit]).median()}
        for name, (_, limit) in compared.items()
    ]
    table = written(options, "kernels", rows)
    return (
        "## Speed of the kernels, in useful GFLOP/s\n\n"
        "The limits load vectors of the kernels' length from the first-level cache. The forward kernel uses what it "
        "loads for one multiply-add, the backward kernel for two, for the input's and for the weight's gradient: each "
        "is compared with its own limit, and dense BLAS, which uses a load more often, with the second.\n\n" + table
    )


def layers(options: Options) -> str:
    """Time of a pass through one sparse layer, beside SparseProp, the other engine that trains on connections."""
    if not options.peers:
        return ""
    rows = []
    for (inputs, outputs), density in itertools.product(((256, 256), (23, 256)), (0.5, 0.2, 0.1, 0.05)):
        for batch in (104, BATCH):  # SparseProp wants a multiple of 8
            ours = roofline.of_a_layer(inputs, outputs, density, batch)
            for way, block in ours.items():
                with ExitStack() as running:
                    peer = ["sparseprop", *map(str, (inputs, outputs, density, batch)), way]
                    blocks = {"theirs": start_training(options.peers, peer, running), "ours": block}
                    if not blocks["theirs"]:
                        return ""
                    speeds = in_turn(blocks, options.repeats)
                row = {"layer": f"{inputs} x {outputs}", "density": density, "batch": batch, "pass": way}
                row |= {f"{name}_microseconds": 1e6 / speeds[name].median() for name in ("ours", "theirs")}
                rows.append({**row, "speedup": (speeds["ours"] / speeds["theirs"]).median()})
    table = written(options, "layers", rows, digits=2)
    return (
        "## A sparse layer, beside SparseProp\n\n"
        "The backward pass computes the gradients of weights and of inputs. SparseProp has a barrier of OpenMP in it "
        f"for each row, with one thread too.\n\n{table}"
    )


def gpu(options: Options) -> str:
    """Updates and training steps a second of torch's matrices and masks on a GPU, and of our engine on one core."""
    if not torch.cuda.is_available():
        leave_out("gpu", "torch has no GPU to use here")
        return ""
    on_gpu, on_core = "torch, on the GPU", "compiled, on one core"
    rows = []
    for width, sparsities in ((256, (0.5, 0.9)), *((width, (equal_sparsity(width),)) for width in (1024, 2048))):
        cases = [("TD3", None), *(("DS-TD3", sparsity) for sparsity in sparsities)]
        blocks = {}
        for (method, sparsity), (place, engine, device) in itertools.product(
            cases, ((on_gpu, "masked", "cuda"), (on_core, "sparse", "cpu"))
        ):
            learner = Learner(make_agent(engine, width, sparsity, device=device)[0])
            length = 1000 if sparsity or device == "cuda" else dense_block(width)
            blocks[f"{method}, {place}", width, sparsity or 0.0] = functools.partial(learner.update, length)
        times = in_turn(blocks, options.repeats)
        for column, key in enumerate(blocks):
            micro = times.iloc[:, column]
            row = dict(zip(("implementation", "width", "sparsity"), key, strict=True))
            row |= {"updates_per_second": 1e6 / micro.median(), "microseconds": micro.median()}
            rows.append({**row, "speedup_over_dense_on_the_gpu": (times.iloc[:, 0] / micro).median()})
    methods = {"td3": ("--method", "td3"), **{f"ds-td3, sparsity {s}": ("--sparsity", str(s)) for s in (0.5, 0.9)}}
    places = {on_gpu: ("--engine", "masked", "--device", "cuda"), on_core: ("--engine", "sparse")}
    ours = {f"{m}, {p}": ("dst_td3", *methods[m], *places[p]) for m, p in itertools.product(methods, places)}
    steps = train_in_turn(options, "td3", ours)
    tables = written(options, "gpu_updates", rows), written(options, "gpu_steps", steps)
    return "\n\n".join(["## A GPU, and one core beside it", *tables])


def measure_alone(*arguments: object) -> dict[str, float]:
    """Return what ``alone`` measures in a process of its own."""
    command = [sys.executable, __file__, "--alone", *map(str, arguments)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def alone(engine: str, sparsity: str, width: str) -> None:
    """Print, as JSON, an agent's counted and seen megabytes."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    kept = None if sparsity == "None" else float(sparsity)

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    make_agent(engine, 8, kept and 0.1)  # libraries load what they need
    before = resident()
    agent, _ = make_agent(engine, int(width), kept)
    Learner(agent).update(3)
    print(json.dumps({"counted_megabytes": state_bytes(agent) / 1e6, "seen_megabytes": (resident() - before) / 1e6}))


# ----------------------------------------------------------------------------------------------------------------------
# Report
# ----------------------------------------------------------------------------------------------------------------------


def written(options: Options, name: str, rows: list[dict] | pd.DataFrame, digits: int = 3) -> str:
    """Write a table as name.csv, numbers to so many digits after the point, and return it as Markdown."""
    table = pd.DataFrame(rows)
    table.round(digits).to_csv(options.results_dir / f"{name}.csv", index=False)
    return markdown(table)


def markdown(table: pd.DataFrame) -> str:
    """Return a table as Markdown."""

    def shown(value: object) -> str:
        if not isinstance(value, float):
            return str(value)
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.2f}"

    lines = ["| " + " | ".join(name.replace("_", " ") for name in table) + " |", "| --- " * len(table.columns) + "|"]
    lines += ["| " + " | ".join(map(shown, row)) + " |" for row in table.itertuples(index=False)]
    return "\n".join(lines)


def machine() -> str:
    """Describe processor, instruction set, caches, versions and settings."""
    cpuinfo = Path("/proc/cpuinfo").read_text()
    fields = dict(line.split(":", 1) for line in cpuinfo.splitlines() if ":" in line)
    fields = {key.strip(): value.strip() for key, value in fields.items()}
    vector = [flag for flag in ("avx", "avx2", "fma", "avx512f") if flag in fields.get("flags", "").split()]
    caches = []
    for cache in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = ((cache / name).read_text().strip() for name in ("level", "type", "size"))
        caches.append(f"L{level} {kind.lower()} {size}")
    model = f"{fields.get('model name')} (family {fields.get('cpu family')}, model {fields.get('model')})"
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, numba {numba.__version__}"
    gpus = f"{torch.cuda.get_device_name()}; " if torch.cuda.is_available() else ""
    settings = "".join(f"; {name}={os.environ[name]}" for name in SETTINGS if name in os.environ)
    return f"{model}, {' '.join(vector)}; {', '.join(caches)}; {os.cpu_count()} cores; {gpus}{versions}{settings}"


PARTS = {
    part.__name__: part for part in (updates, end_to_end, frontier, sac, step, inference, memory, kernels, layers, gpu)
}


def main() -> None:
    """Run the parts asked for and write their tables."""
    if sys.argv[1:2] == ["--alone"]:
        alone(*sys.argv[2:])
        return
    options = tyro.cli(Options)
    unknown = [name for name in options.only if name not in PARTS]
    if unknown:
        print(f"benchmark.py: error: there is no part {unknown[0]}: choose from {', '.join(PARTS)}", file=sys.stderr)
        sys.exit(2)
    if options.peers and not shutil.which(options.peers):
        print(f"benchmark.py: error: --peers {options.peers} is no program that can be run", file=sys.stderr)
        sys.exit(2)
    options.results_dir.mkdir(parents=True, exist_ok=True)
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0)) if options.core is None else options.core})
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    report = ["# Seconds and bytes", machine()]
    report.append(f"One pinned core, batch {BATCH}, HalfCheetah-v4 shapes, medians of {options.repeats} repeats.")
    for name, part in PARTS.items():
        if not options.only or name in options.only:
            print(f"measuring {name} ...", file=sys.stderr, flush=True)
            report.append(part(options))
    text = "\n\n".join(filter(None, report)) + "\n"
    print(text)
    if not options.only:
        (options.results_dir / "README.md").write_text(text)


if __name__ == "__main__":
    main()
