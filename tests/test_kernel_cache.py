"""Compiled kernels are kept from run to run, as long as nothing that they were made of has changed."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "sparse_engine"
# Prints the actor's parameters after two updates of a tiny agent.
PROGRAM = """
import types
import numpy as np
from sparse_engine.td3 import SparseEngine

def layer(*shape):
    weight = np.linspace(-1, 1, int(np.prod(shape)), dtype=np.float32).reshape(shape)
    return weight, np.ones_like(weight), np.zeros((*shape[:-2], 1, shape[-1]), np.float32)

settings = dict(learning_rate=0.01, weight_decay=0, gamma=0.9, tau=0.1, policy_noise=0.2, noise_clip=0.5)
engine = SparseEngine([layer(2, 3), layer(3, 1)], [layer(2, 3, 3), layer(2, 3, 1)], (-np.ones(1), np.ones(1)),
                      batch_size=4, drop_fraction=0.1, **settings)
buffer = types.SimpleNamespace(rows=np.linspace(-1, 1, 28, dtype=np.float32).reshape(4, 7))
for _ in range(2):
    engine.update_critics(buffer, np.arange(4), np.zeros((4, 1), np.float32))
    engine.update_actor(buffer, np.arange(4))
print(engine.critics.arrays.parameters.tobytes().hex())
"""
NOTICE = "compiling the sparse kernels"


class Copy:
    """A copy of the package in a folder of its own, with the environment that it runs in."""

    def __init__(self, folder: Path):
        self.folder, self.package = folder, folder / PACKAGE.name
        shutil.copytree(PACKAGE, self.package, ignore=shutil.ignore_patterns("__pycache__"))
        self.environment = {k: v for k, v in os.environ.items() if k != "NUMBA_CACHE_DIR"}

    def run(self, program: str = PROGRAM) -> tuple[str, str]:
        """Run a program in a process of its own; return what it printed, and on standard error."""
        # -B: python itself would take its byte code for fresh, as an edit here leaves date and size.
        command = [sys.executable, "-B", "-c", program]
        done = subprocess.run(command, cwd=self.folder, env=self.environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout, done.stderr

    def edit(self, name: str, old: str, new: str) -> None:
        """Edit a file, and set back its date."""
        path = self.package / name
        times, text = path.stat(), path.read_text()
        assert text.count(old) == 1
        path.write_text(text.replace(old, new))
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))

    @property
    def kept(self) -> list[Path]:
        """The folders of kernels that it keeps beside its files."""
        return sorted(self.package.glob("__pycache__/kernels-*"))


@pytest.fixture
def copy(tmp_path) -> Copy:
    return Copy(tmp_path)


def test_kernels_are_compiled_once_and_after_an_edit(copy):
    first, notice = copy.run()
    assert notice.startswith(NOTICE) and notice.count("\n") == 1
    (kept,) = copy.kept
    assert list(kept.rglob("*.nbc"))
    assert copy.run() == (first, "")
    copy.edit("kernels.py", "BETAS = (0.9, 0.999)", "BETAS = (0.8, 0.999)")  # the momentum in adam_step
    second, notice = copy.run()
    assert second != first and notice.startswith(NOTICE)
    assert len(copy.kept) == 2 and kept in copy.kept, "what another process may be using stays for a day"


IMPORT = "from sparse_engine.compilation import CACHE_FOLDER; print(CACHE_FOLDER)"


@pytest.mark.parametrize("name", sorted(path.name for path in PACKAGE.glob("*.py")))
def test_an_edit_of_any_file_counts(copy, name):
    first, _ = copy.run(IMPORT)
    assert copy.run(IMPORT)[0] == first
    start = (copy.package / name).read_text().splitlines()[0]
    copy.edit(name, start + "\n", start.replace("e", "a") + "\n")
    assert copy.run(IMPORT)[0] != first


def test_a_setting_of_the_compiler_counts(copy):
    first, _ = copy.run(IMPORT)
    copy.environment["NUMBA_OPT"] = "2"
    assert copy.run(IMPORT)[0] != first


def test_old_kernels_are_removed(copy):
    old, young = (copy.package / "__pycache__" / f"kernels-{name}" for name in ("old", "young"))
    for folder in (old, young):
        folder.mkdir(parents=True)
    os.utime(old, (0, 0))
    copy.run(IMPORT)
    assert young in copy.kept and old not in copy.kept and len(copy.kept) == 2


def test_the_folder_that_the_user_names_comes_first(copy, tmp_path):
    copy.environment["NUMBA_CACHE_DIR"] = str(tmp_path / "mine")
    folder, _ = copy.run(IMPORT)
    assert Path(folder.strip()).parent == tmp_path / "mine" and not copy.kept


def test_where_nothing_can_be_written_kernels_are_compiled_at_every_start(copy):
    """Root may write anywhere but below a file: here stands one for each folder."""
    (copy.package / "__pycache__").write_text("")
    blocked = copy.folder / "blocked"
    blocked.write_text("")
    copy.environment |= {"NUMBA_CACHE_DIR": str(blocked / "cache"), "HOME": str(blocked), "XDG_CACHE_HOME": ""}
    _, notice = copy.run()
    assert notice.startswith(NOTICE) and "at every start" in notice and notice.count("\n") == 1
