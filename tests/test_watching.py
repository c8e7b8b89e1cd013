"""Watching trained agents: their returns, the videos, and what cannot be shown."""

import json
import os
import shutil
import signal
import subprocess
import sys

import glfw
import gymnasium
import imageio.v3
import numpy as np
import pytest
from gymnasium.envs.mujoco.hopper_v4 import HopperEnv
from point import Still
from running import PROGRAM, SHORT, rows_of, run_directory, run_here, train_here

import dst_td3
import watch

NO_SCREEN = {k: v for k, v in os.environ.items() if k not in ("DISPLAY", "WAYLAND_DISPLAY", "MUJOCO_GL")}


def can_draw() -> bool:
    """Whether MuJoCo can draw off-screen here, tried apart since graphics libraries can take a process with them."""
    program = "import mujoco.egl; mujoco.egl.GLContext(64, 64).make_current()"
    return subprocess.run([sys.executable, "-c", program], env=NO_SCREEN, capture_output=True).returncode == 0


needs_drawing = pytest.mark.skipif(
    not can_draw(), reason="there is no off-screen OpenGL (Debian: libegl1 libgl1-mesa-dri libopengl0)"
)


def command(*arguments: object) -> list[str]:
    """Return the command that watches, as a process of its own, since MuJoCo fixes at its import how it draws."""
    return [sys.executable, str(PROGRAM.with_name("watch.py")), *map(str, arguments)]


def run_watch(*arguments: object, **variables: str) -> subprocess.CompletedProcess:
    """Watch without a screen, with further environment variables."""
    return subprocess.run(command(*arguments), env=NO_SCREEN | variables, capture_output=True, text=True)


def watch_here(*arguments: object) -> tuple[int, str, str]:
    """Watch in this process; return exit code, standard output and error."""
    return run_here(watch.main, "watch.py", *arguments)


@pytest.fixture(scope="session")
def stand(tmp_path_factory):
    """The directory of a finished masked run whose Hopper falls after some tens of steps."""
    results = tmp_path_factory.mktemp("watched")
    assert train_here(*SHORT, "--engine", "masked", "--total-timesteps", 800, "--results-dir", results)[0] == 0
    return run_directory(results)


def test_watching_repeats_the_last_evaluation_without_a_screen_too(stand):
    last = rows_of(stand / "evaluations.csv")[-1]
    shown = run_watch(stand, "--episodes", 2)
    assert shown.returncode == 0, shown.stderr
    assert shown.stderr == ""
    assert shown.stdout.startswith("there is no screen")
    expected = f"mean return {float(last['return_mean']):.1f} +- {float(last['return_std']):.1f}"
    assert shown.stdout.splitlines()[-1] == expected
    assert len(shown.stdout.splitlines()) == 4


# imageio's reader of .mp4 leaves its pipes to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@needs_drawing
@pytest.mark.parametrize("suffix", ["gif", "mp4"])
def test_a_video_shows_the_episode_in_real_time(stand, tmp_path, suffix):
    path = tmp_path / f"agent.{suffix}"
    shown = run_watch(stand, "--video", path, "--episodes", 1)
    assert shown.returncode == 0 and shown.stderr == "", shown.stderr
    steps = int(shown.stdout.split()[4])
    with imageio.v3.imopen(path, "r") as file:
        pictures, metadata = list(file.iter()), file.metadata()
    # Hopper has 125 steps a second; its reset is the first state.
    assert len(pictures) == steps // 5 + 1 > 1
    assert metadata.get("fps") == 25 or metadata["duration"] == 40
    assert not np.array_equal(pictures[0], pictures[-1])
    assert os.listdir(tmp_path) == [path.name]
    assert shown.stdout.splitlines()[-1] == f"video: {path}"


def test_drawing_changes_no_return():
    """The floor is drawn longer; the robot must not feel it, beyond the end of the drawn one either."""
    returns = []
    for extended in (False, True):
        env = dst_td3.make_environment("HalfCheetah-v4")
        if extended:
            watch.extend_floor(env.unwrapped.model)
        env.reset(seed=0)
        position = env.unwrapped.data.qpos.copy()
        position[0] = 39.5
        env.unwrapped.set_state(position, env.unwrapped.data.qvel.copy())
        rng = np.random.default_rng(0)
        returns.append([env.step(rng.uniform(-1, 1, 6))[1] for _ in range(300)])
        env.close()
    assert returns[0] == returns[1]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("{empty}", "is not the directory of a run"),
        ("{run} --video {empty}/agent.avi", "must be a file that ends in .mp4 or .gif"),
        ("{run} --video {folder}", "must be a file that ends in .mp4 or .gif"),
        ("{run} --video {empty}/missing/agent.gif", "cannot write"),
        ("{run} --episodes 0", "--episodes must be"),
        ("{unfinished}", "when it is finished"),
    ],
)
def test_what_cannot_be_watched_is_said_in_one_line(stand, tmp_path, arguments, expected):
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    shutil.copy(stand / "config.json", unfinished)
    folder = tmp_path / "folder.gif"
    folder.mkdir()
    filled = arguments.format(run=stand, empty=tmp_path, unfinished=unfinished, folder=folder)
    code, output, error = watch_here(*filled.split())
    assert (code, output) == (2, "")
    assert error.startswith("watch.py: error: ") and error.count("\n") == 1
    assert expected in error


@pytest.mark.parametrize("arguments", [(), ("{run}", "--seed", "1"), ("{run}", "--eval-episodes", "1")])
def test_other_arguments_than_its_own_are_refused(stand, arguments):
    code, output, _ = watch_here(*(argument.format(run=stand) for argument in arguments))
    assert (code, output) == (2, "")


def test_missing_graphics_are_said(stand, tmp_path, monkeypatch):
    def fail(self):
        raise ImportError("no such library")

    monkeypatch.setattr(HopperEnv, "render", fail)
    monkeypatch.setenv("MUJOCO_GL", "egl")
    code, _, error = watch_here(stand, "--video", tmp_path / "agent.gif")
    assert code == 2
    assert "cannot draw Hopper-v4: no such library" in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_an_environment_that_fails_is_said_in_one_line_after_its_traceback(stand, monkeypatch):
    def fail(self, action):
        raise ValueError("of two\nlines")

    monkeypatch.setattr(glfw, "init", lambda: False)
    monkeypatch.setattr(HopperEnv, "step", fail)
    code, _, error = watch_here(stand)
    assert code == 1 and error.startswith("Traceback")
    assert error.endswith(
        "\nValueError: of two\nlines\nwatch.py: error: Hopper-v4 failed with ValueError: of two lines\n"
    )


@pytest.mark.parametrize("further", [(), ("--video", "agent.gif")])
def test_an_impossible_way_to_draw_is_said(stand, tmp_path, further):
    shown = run_watch(stand, *further, MUJOCO_GL="crayons")
    assert shown.returncode == 2
    assert shown.stderr.count("\n") == 1 and "crayons" in shown.stderr


@needs_drawing
@pytest.mark.parametrize("suffix", ["gif", "mp4"])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_video_leaves_the_old_one(stand, tmp_path, suffix, number, code):
    path = tmp_path / f"agent.{suffix}"
    path.write_bytes(b"old")
    arguments = (stand, "--video", path, "--episodes", 100_000)
    process = subprocess.Popen(command(*arguments), env=NO_SCREEN, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.readline()
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (code, b"")
    assert os.listdir(tmp_path) == [path.name] and path.read_bytes() == b"old"


def test_the_viewer_is_for_mujoco(monkeypatch):
    monkeypatch.setattr(glfw, "init", lambda: True)
    with pytest.raises(dst_td3.InputError, match="not simulated by MuJoCo"), watch.viewer("Pendulum-v1"):
        pass


class Drawn(Still):
    """Five steps to an episode, of pictures, or of what it is told to draw after some of them; it may fail to close."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 25}  # noqa: RUF012, as Gymnasium has it
    later, closes = "picture", True

    def __init__(self, size: int = 32, render_mode: str | None = None):
        super().__init__(reward=1.0, length=5)
        self.size, self.render_mode, self.drawn = size, render_mode, 0

    def render(self):
        self.drawn += 1
        if self.later == "failure" and self.drawn > 3:
            raise RuntimeError("the window is gone")
        picture = np.full((self.size, self.size, 3), self.drawn, np.uint8)
        others = {"none at all": None, "none": None, "smaller": picture[:16], "flat": picture[0]}
        return others.get(self.later, picture) if self.drawn > 3 or self.later == "none at all" else picture

    def close(self):
        if not self.closes:
            raise OSError("already closed")


gymnasium.register("Drawn-v0", entry_point=Drawn)


@pytest.fixture
def drawn(tmp_path):
    """Return a function that makes what a finished run of that environment leaves, with further entries."""

    def make(**further: object):
        folder = tmp_path / "run"
        folder.mkdir()
        layers = dst_td3.initial_layers([3, 4, 2], [12, 8], np.random.default_rng(0))
        bounds = np.full(2, -1, np.float32), np.full(2, 1, np.float32)
        dst_td3.save_policy(folder / "policy.npz", layers, bounds, "Drawn-v0")
        arguments = {"env": "Drawn-v0", "seed": 0, "threads": 1} | further
        (folder / "config.json").write_text(json.dumps({"arguments": arguments}))
        return folder

    return make


@pytest.mark.parametrize(
    ("later", "code", "expected"),
    [
        ("none at all", 2, "cannot draw Drawn-v0: render of Drawn-v0 returned None, which is no picture"),
        ("none", 1, "render of Drawn-v0 returned None, which is no picture"),
        ("flat", 1, "render of Drawn-v0 returned [[4 4 4]"),
        ("smaller", 1, "Drawn-v0 has drawn what cannot be added to the video: ValueError: All images in a movie"),
        ("failure", 1, "Drawn-v0 failed with RuntimeError: the window is gone"),
    ],
)
@pytest.mark.parametrize("closes", [True, False])
def test_what_is_no_picture_is_said_and_leaves_the_old_video(
    drawn, tmp_path, monkeypatch, later, code, expected, closes
):
    monkeypatch.setattr(Drawn, "later", later)
    monkeypatch.setattr(Drawn, "closes", closes)
    video = tmp_path / "agent.mp4"
    video.write_bytes(b"old")
    answer, _, error = watch_here(drawn(), "--video", video, "--episodes", 1)
    *traceback, line = error.splitlines()
    assert answer == code and line.startswith("watch.py: error: ") and expected in line
    assert bool(traceback) == (later == "failure" or (later != "none at all" and not closes))
    assert sorted(os.listdir(tmp_path)) == ["agent.mp4", "run"] and video.read_bytes() == b"old"


def test_an_environment_that_fails_to_close_leaves_the_video(drawn, tmp_path, monkeypatch):
    monkeypatch.setattr(Drawn, "closes", False)
    code, output, error = watch_here(drawn(), "--video", tmp_path / "agent.gif", "--episodes", 1)
    assert code == 0 and output.splitlines()[-1] == f"video: {tmp_path / 'agent.gif'}"
    assert error.startswith("Traceback") and error.endswith("OSError: already closed\n")
    assert len(imageio.v3.imread(tmp_path / "agent.gif")) == 6


def test_a_run_is_watched_in_its_own_environment(drawn, tmp_path):
    run = drawn(env_kwargs='{"size": 64}')
    assert watch_here(run, "--video", tmp_path / "agent.gif", "--episodes", 1)[0] == 0
    assert imageio.v3.imread(tmp_path / "agent.gif").shape[1:3] == (32, 32)  # a .gif has every second pixel


@pytest.mark.parametrize(
    "further",
    [
        {"threads": 0},
        {"threads": 10**9},
        {"threads": "1"},
        {"threads": None},
        {"seed": -1},
        {"seed": "x"},
        {"seed": []},
    ],
)
def test_a_damaged_configuration_is_said_in_one_line(drawn, further):
    run = drawn(**further)
    for config in (None, "null", "[]", "3", '{"arguments": []}', '{"arguments": null}', "{", '"arguments"'):
        if config is not None:
            (run / "config.json").write_text(config)
        code, output, error = watch_here(run)
        assert (code, output) == (2, "") and error.count("\n") == 1
        assert error.startswith(f"watch.py: error: {run} is not the directory of a run: ")


def test_a_policy_that_does_not_fit_is_said_in_one_line(drawn, monkeypatch):
    monkeypatch.setattr(glfw, "init", lambda: False)
    run = drawn()
    for widths, expected in (([4, 4, 2], "takes 4 observations, not (3,)"), ([3, 4, 1], "Drawn-v0 takes 2 actions")):
        layers = dst_td3.initial_layers(widths, [widths[0] * 4, 4 * widths[2]], np.random.default_rng(0))
        bounds = np.full(widths[2], -1, np.float32), np.full(widths[2], 1, np.float32)
        dst_td3.save_policy(run / "policy.npz", layers, bounds, "Drawn-v0")
        code, _, error = watch_here(run)
        assert code == (2 if widths[0] == 4 else 1) and expected in error and error.count("\n") == 1
