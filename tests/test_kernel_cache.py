"""Compiled kernels are kept from run to run, as long as nothing that they were made of has changed."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numba
import pytest

from sparse_engine import compilation

PACKAGE = Path(__file__).parent.parent / "sparse_engine"
# Prints a target after an update that prunes it: the kernel that is compiled fastest, and that calls others.
PROGRAM = """
import numpy as np
from sparse_engine.networks import SparseNetwork

rng = np.random.default_rng(0)
mask = np.arange(60, dtype=np.float32).reshape(6, 10) % 2
layers = [(rng.standard_normal((6, 10), np.float32) * mask, mask, np.zeros((1, 10), np.float32))]
layers += [(np.ones((10, 1), np.float32), np.ones((10, 1), np.float32), np.zeros((1, 1), np.float32))]
network = SparseNetwork(layers, tau=0.1, drop_fraction=0.3)
network.adapt(rng)
network.update_target()
print(network.arrays.target.tobytes().hex())
"""
NOTICE = "compiling the sparse kernels"


class Copy:
    """A copy of the package in a folder of its own, with the environment that it runs in."""

    def __init__(self, folder: Path):
        self.folder, self.package = folder, folder / PACKAGE.name
        shutil.copytree(PACKAGE, self.package, ignore=shutil.ignore_patterns("__pycache__"))
        self.environment = {k: v for k, v in os.environ.items() if k != "NUMBA_CACHE_DIR"}

    def run(self) -> tuple[str, str]:
        """Run the program in a process of its own; return what it printed, and on standard error."""
        # -B: python itself would take its byte code for fresh, as an edit here leaves date and size.
        command = [sys.executable, "-B", "-c", PROGRAM]
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
    # In zero_up_to, which the kernel calls.
    copy.edit("kernels.py", "magnitude > limit else 0", "magnitude > limit else 9")
    second, notice = copy.run()
    assert second != first and notice.startswith(NOTICE)
    assert len(copy.kept) == 2 and kept in copy.kept, "what another process may be using stays for a day"


def test_where_nothing_can_be_written_kernels_are_compiled_at_every_start(copy):
    """Root may write anywhere but below a file: here stands one for each folder."""
    (copy.package / "__pycache__").write_text("")
    blocked = copy.folder / "blocked"
    blocked.write_text("")
    copy.environment |= {"NUMBA_CACHE_DIR": str(blocked / "cache"), "HOME": str(blocked), "XDG_CACHE_HOME": ""}
    _, notice = copy.run()
    assert notice.startswith(NOTICE) and "at every start" in notice and notice.count("\n") == 1


# --- The folder, of a copy that this process takes for the package ----------------------------------------------------
@pytest.fixture
def here(copy, monkeypatch) -> Copy:
    """The copy, by which digest and folder go in this process."""
    monkeypatch.setattr(compilation, "PACKAGE", copy.package)
    monkeypatch.setattr(numba.config, "CACHE_DIR", "")
    return copy


@pytest.mark.parametrize("name", sorted(path.name for path in PACKAGE.glob("*.py")))
def test_an_edit_of_any_file_counts(here, name):
    first = compilation.cache_folder()
    assert compilation.cache_folder() == first
    start = (here.package / name).read_text().splitlines()[0]
    here.edit(name, start + "\n", start.replace("e", "a") + "\n")
    assert compilation.cache_folder() != first


def test_a_setting_of_the_compiler_counts(here, monkeypatch):
    first = compilation.cache_folder()
    monkeypatch.setattr(numba.config, "OPT", 2)
    assert compilation.cache_folder() != first


def test_old_kernels_are_removed(here):
    old, young = (here.package / "__pycache__" / f"kernels-{name}" for name in ("old", "young"))
    for folder in (old, young):
        folder.mkdir(parents=True)
    os.utime(old, (0, 0))
    compilation.cache_folder()
    assert young in here.kept and old not in here.kept and len(here.kept) == 2


def test_the_folder_that_the_user_names_comes_first(here, tmp_path, monkeypatch):
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path / "mine"))
    assert compilation.cache_folder().parent == tmp_path / "mine" and not here.kept
