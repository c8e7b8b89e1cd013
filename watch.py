"""Watch a trained agent: play its policy in MuJoCo's viewer or into a video, and print the returns.

``python watch.py results/Hopper-v4/ds-td3/seed0`` opens the viewer; with ``--video hopper.mp4`` no screen is needed.
Any algorithm's run can be watched whose directory has the config.json and the policy.npz that dst_td3.py writes.
"""

import dataclasses
import itertools
import json
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Annotated, NamedTuple

import gymnasium
import numpy as np
import torch
import tyro
from tqdm import tqdm

from dst_td3 import (
    InputError,
    RunError,
    command_line,
    evaluate,
    load_policy,
    make_environment,
    replaced,
    reported_as,
)


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Play the trained policy of a finished run on the start states of its evaluations, and print each return."""

    run_directory: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_DIRECTORY")]
    """directory of a finished run, such as results/Hopper-v4/ds-td3/seed0"""
    video: Path | None = None
    """write this .mp4 or .gif file, which needs no screen, instead of opening MuJoCo's viewer"""
    episodes: int = 10
    """episodes to play"""


class FinishedRun(NamedTuple):
    """What a finished run's policy is played with: its file, its environment, the seed of evaluations, CPU threads."""

    policy: Path
    env: str
    env_kwargs: str | None
    evaluation_seed: int
    threads: int


def finished_run(directory: Path) -> FinishedRun:
    """Read how to play the policy in a run's directory. Raises InputError where no finished run is."""
    with reported_as(InputError, f"{directory} is not the directory of a run:"):
        trained = json.loads((directory / "config.json").read_text())["arguments"]
        env, seed, threads = (trained[name] for name in ("env", "seed", "threads"))
        if not (isinstance(seed, int) and seed >= 0 and isinstance(threads, int) and 0 < threads <= 4096):
            raise ValueError(f"its config.json has seed {seed!s:.60} and threads {threads!s:.60}")
        run = FinishedRun(directory / "policy.npz", env, trained.get("env_kwargs"), seed + 100, threads)
    if not run.policy.exists():
        raise InputError(f"{directory} has no policy.npz: a run writes it when it is finished")
    return run


class ShownEnvironment(gymnasium.Wrapper):
    """Calls ``show`` at each state, the first one of an episode too."""

    def __init__(self, env: gymnasium.Env, show: Callable[[], None]):
        super().__init__(env)
        self.show = show

    def reset(self, **options) -> tuple[np.ndarray, dict]:
        """Begin an episode and show its first state."""
        result = self.env.reset(**options)
        self.show()
        return result

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        """Act and show the state that follows."""
        result = self.env.step(action)
        self.show()
        return result


def extend_floor(model) -> None:
    """Draw the planes of a MuJoCo model 50 times as long. They hold a robot without end, but are drawn for 20 m."""
    planes = model.geom_type == 0  # mjGEOM_PLANE
    materials = np.unique(model.geom_matid[planes])
    model.geom_size[planes, :2] *= 50
    model.mat_texrepeat[materials[materials >= 0]] *= 50


def draw(name: str, render: Callable) -> np.ndarray:
    """Return a picture [rows, columns, 3] of the state. Raises RunError where what ``render`` returns is none."""
    picture = render()
    if not isinstance(picture, np.ndarray) or picture.ndim != 3:
        raise RunError(f"render of {name} returned {picture!s:.60}, which is no picture")
    return picture


@contextmanager
def closed_afterwards(env: gymnasium.Env) -> Iterator[gymnasium.Env]:
    """Close an environment in the end; nothing is lost where its own code fails at that, which is shown."""
    try:
        yield env
    finally:
        with suppress(RunError):
            env.call(None, env.env.close)


@contextmanager
def viewer(name: str, arguments: str | None = None) -> Iterator[gymnasium.Env]:
    """Yield an environment that MuJoCo's viewer shows in real time, where there is a screen, until its window closes.

    Raises InputError for an environment without MuJoCo.
    """
    with closed_afterwards(make_environment(name, arguments)) as env:
        import glfw
        import mujoco.viewer

        with warnings.catch_warnings(action="ignore"):
            screen = glfw.init()
        if not screen:
            print("there is no screen to open the viewer on; --video FILE writes a video instead", flush=True)
            yield env
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

            yield ShownEnvironment(env, show)


def make_drawn_environment(name: str, arguments: str | None) -> gymnasium.Env:
    """Make an environment that draws pictures without a screen. Raises InputError where that cannot be."""
    os.environ.setdefault("MUJOCO_GL", "egl")
    try:
        env = make_environment(name, arguments, render_mode="rgb_array")
        if hasattr(env.unwrapped, "mujoco_renderer"):
            extend_floor(env.unwrapped.model)
            # The model's own camera follows the robot; the one that gymnasium takes stays behind.
            env.unwrapped.mujoco_renderer.camera_id = min(0, env.unwrapped.model.ncam - 1)
        env.reset()
        draw(
            name, env.env.render
        )  # not by way of what shows a traceback: missing libraries are no fault of the environment
    except Exception as error:  # graphics libraries can raise anything
        cause = error.__cause__ or error
        reason = " ".join(str(cause).split()) or type(cause).__name__
        hint = f"an environment of MuJoCo needs the libraries of MUJOCO_GL={os.environ['MUJOCO_GL']}"
        hint += " (Debian's are libegl1 libgl1-mesa-dri libopengl0 for egl), another its own package and a render_mode"
        raise InputError(f"cannot draw {name}: {reason}; {hint}") from error
    return env


@contextmanager
def video(name: str, arguments: str | None, path: Path) -> Iterator[gymnasium.Env]:
    """Yield an environment that is drawn into the video at ``path``, which appears when all is done.

    Raises InputError when ``path`` is neither .mp4 nor .gif or cannot be written, or nothing can be drawn.
    """
    suffix = path.suffix.lower()
    if suffix not in (".mp4", ".gif") or path.is_dir():
        raise InputError(f"--video must be a file that ends in .mp4 or .gif, not {path}")
    import imageio.v2

    with ExitStack() as stack:
        try:
            file = stack.enter_context(replaced(path))
        except RunError as error:  # nothing has been played yet, and another file will do
            raise InputError(str(error)) from error
        env = stack.enter_context(closed_afterwards(make_drawn_environment(name, arguments)))
        # About 25 pictures a second, which every player keeps up with; Hopper has 125 steps a second.
        states_a_second = env.metadata.get("render_fps", 30)
        every = max(1, round(states_a_second / 25))
        rate = states_a_second / every
        # A .gif stores each picture by itself, so it gets every second pixel of every second row.
        pixel, timing = (2, {"duration": 1000 / rate, "loop": 0}) if suffix == ".gif" else (1, {"fps": rate})
        # A writer leaves itself open after an error, and its process would make the file anew that has been removed.
        writer = stack.enter_context(closing(imageio.v2.get_writer(file.name, **timing)))
        bar = stack.enter_context(tqdm(unit=" steps", leave=False, disable=None))
        states = itertools.count()

        def show() -> None:
            if next(states) % every == 0:
                picture = draw(name, partial(env.call, None, env.env.render))[::pixel, ::pixel]
                with reported_as(RunError, f"{name} has drawn what cannot be added to the video:", Exception):
                    writer.append_data(picture)
            bar.update()

        yield ShownEnvironment(env, show)


def watch(args: Arguments) -> None:
    """Play the episodes and print their returns. Raises InputError where no finished run is or none can be shown."""
    if args.episodes < 1:
        raise InputError(f"--episodes must be a positive whole number, not {args.episodes}")
    run = finished_run(args.run_directory)
    torch.set_num_threads(run.threads)  # as another number would round otherwise
    act, returns = load_policy(run.policy, run.env), []
    environment = run.env, run.env_kwargs
    with video(*environment, args.video) if args.video else viewer(*environment) as env:
        for total, length in evaluate(act, env, args.episodes, run.evaluation_seed):
            returns.append(total)
            tqdm.write(f"episode {len(returns):>3}  return {total:9.1f}  {length:,} steps")
    print(f"mean return {np.mean(returns):.1f} +- {np.std(returns):.1f}")
    if args.video:
        print(f"video: {args.video}")


def main() -> int:
    """Run the command line and return its exit code."""
    for number in (signal.SIGINT, signal.SIGTERM):  # to leave by way of what removes the unfinished video
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    return command_line(lambda name: watch(tyro.cli(Arguments, prog=name)))


if __name__ == "__main__":
    sys.exit(main())
