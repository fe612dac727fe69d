"""The decorator of every compiled kernel, and the folder its machine code is kept in."""

from __future__ import annotations

import os
import stat
import tempfile
import warnings
from pathlib import Path

import numba
from numba import njit

CACHE_VARIABLE = "NUMBA_CACHE_DIR"


def _probe() -> None:
    """Do nothing; decorated to ask Numba whether it finds a folder for its cache."""


def _has_cache() -> bool:
    """Return whether Numba has a folder for its cache, one in the temporary folder if need be.

    By itself it takes `NUMBA_CACHE_DIR`, the folder of the module or one under the home folder. A
    read-only installation that runs without a home has none of them, and Numba then refuses
    to compile at all.
    """
    if _finds_folder():
        return True
    folder = Path(tempfile.gettempdir()) / f"hydralv-tune-numba-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
    except OSError:
        status = None
    # Whoever can write into the folder decides what this process runs.
    is_ours = status is not None and (
        stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o077
    )
    if is_ours:
        numba.config.CACHE_DIR = str(folder)
        os.environ[CACHE_VARIABLE] = str(folder)  # for the workers
        if _finds_folder():
            warnings.warn(
                f"neither the installation nor a home folder can hold the cache of compiled "
                f"kernels; {folder} is used. Set {CACHE_VARIABLE} to a folder of yours to choose "
                "another.",
                stacklevel=2,
            )
            return True
    warnings.warn(
        f"no folder can hold the cache of compiled kernels, so each process compiles them anew, "
        f"which takes half a minute. Set {CACHE_VARIABLE} to a folder that you can write to.",
        stacklevel=2,
    )
    return False


def _finds_folder() -> bool:
    """Return whether Numba accepts a cached function of this folder now."""
    has_home = os.path.isabs(os.path.expanduser("~"))
    if not (numba.config.CACHE_DIR or has_home or os.access(Path(__file__).parent, os.W_OK)):
        return False  # it would make a folder that is called `~` where the process stands
    try:
        njit(cache=True)(_probe)
    except RuntimeError:
        return False
    return True


kernel = njit(cache=_has_cache(), nogil=True)
"""Compiles a function on its first call, without the interpreter lock."""
