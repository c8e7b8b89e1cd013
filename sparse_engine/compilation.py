"""How the kernels are compiled, where they are kept, and what is said meanwhile.

numba keeps compiled code on disk and checks only whether a function's own file has changed. A kernel holds the code of
all that it calls, so what is kept here goes by the content of the whole package: see ``digest``.
"""

import hashlib
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import llvmlite
import numba
import numpy as np
from numba.core import event

PACKAGE = Path(__file__).parent
# No assumption that values are finite: a diverged network must show as one.
OPTIONS = {"fastmath": {"contract", "reassoc", "nsz", "arcp"}, "error_model": "numpy"}
# What numba makes of the same source depends on these too. The processor is in its own key.
CONFIGURATION = ("OPT", "LOOP_VECTORIZE", "SLP_VECTORIZE", "ENABLE_AVX", "USING_SVML", "BOUNDSCHECK", "DEBUG")
DAY = 24 * 60 * 60


def first_level_cache() -> int:
    """Return the bytes of a core's first-level cache for data; 32 KB where Linux does not tell."""
    size = Path("/sys/devices/system/cpu/cpu0/cache/index0/size")  # Linux lists the one for data first
    return int(size.read_text().strip().removesuffix("K")) * 1024 if size.exists() else 32 * 1024


def digest() -> str:
    """Return a digest of everything that decides what the compiled kernels are."""
    versions = platform.python_version(), np.__version__, numba.__version__, llvmlite.__version__
    configuration = [str(getattr(numba.config, name, None)) for name in CONFIGURATION]
    content = hashlib.sha256(repr((versions, configuration, first_level_cache())).encode())
    for path in sorted(PACKAGE.glob("*.py")):
        content.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return content.hexdigest()[:16]


def cache_folder() -> Path | None:
    """Make and return the folder that keeps the compiled kernels; None where no place for it can be written."""
    user = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    for parent in (numba.config.CACHE_DIR, PACKAGE / "__pycache__", Path(user, PACKAGE.name)):
        folder = Path(parent, f"kernels-{digest()}")
        with suppress(OSError):
            if parent and writable(folder):
                return folder
    return None


def writable(folder: Path) -> bool:
    """Make a folder and try it, which raises OSError where that fails. A new one takes the place of old ones."""
    new = not folder.is_dir()
    folder.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=folder).close()
    for other in folder.parent.glob("kernels-*") if new else ():
        # A day, since another machine of a cluster may be using its own at this moment.
        with suppress(OSError):
            if other != folder and time.time() - other.stat().st_mtime > DAY:
                shutil.rmtree(other, ignore_errors=True)
    return True


CACHE_FOLDER = cache_folder()


def compiled(function: Callable) -> Callable:
    """Compile a function that Python calls, and keep what comes of it."""
    users, numba.config.CACHE_DIR = numba.config.CACHE_DIR, str(CACHE_FOLDER or "")
    try:
        return numba.njit(cache=CACHE_FOLDER is not None, **OPTIONS)(function)
    finally:
        numba.config.CACHE_DIR = users


def compiled_part(function: Callable) -> Callable:
    """Compile a function that only compiled code calls, into its callers: see ``compiled_apart``."""
    return numba.njit(no_cpython_wrapper=True, no_cfunc_wrapper=True, forceinline=True, **OPTIONS)(function)


def compiled_apart(function: Callable) -> Callable:
    """Compile a function that only compiled code calls, but not into its callers.

    A process that compiles and one that loads the result may run different optimizations of such a function. So its
    results must not depend on them: no sum in it may be reordered.
    """
    return numba.njit(no_cpython_wrapper=True, no_cfunc_wrapper=True, **OPTIONS)(function)


def compiled_for(function: Callable, arguments: tuple) -> Callable:
    """Return a ``compiled`` function for arguments of these types, and compile it if need be.

    What is returned takes arguments of these types only, and checks nothing. At a call of the function itself, numba
    finds out the type of each array, which takes longer than unpacking them.
    """
    return function.compile(tuple(map(numba.typeof, arguments)))


class CompilationNotice(event.Listener):
    """Says on stderr, once, that kernels of this package are being compiled."""

    given = False

    def on_start(self, event) -> None:
        """Say so at the first kernel that no earlier run has left compiled."""
        if self.given or not event.data["dispatcher"].py_func.__module__.startswith(__package__):
            return
        self.given = True
        often = "once"
        if not CACHE_FOLDER:
            often = "at every start: no folder to keep them in can be written (NUMBA_CACHE_DIR names one)"
        notice = f"compiling the sparse kernels for this machine, about 15 seconds, {often} ..."
        print(notice, file=sys.stderr, flush=True)

    def on_end(self, event) -> None:
        """Say nothing at its end."""


event.register("numba:compile", CompilationNotice())
