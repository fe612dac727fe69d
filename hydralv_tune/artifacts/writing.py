"""Writing to disk: whether a place takes a file, and files that are written whole or not at all.

Light to import: a worker that starts, and a command that refuses its input, wait for no library.
"""

from __future__ import annotations

import io
import os
import tempfile
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd


def why_not_writable(folder: Path) -> str | None:
    """Return why no file can be made in a folder that need not exist yet, or None where one can.

    It is tried, since permissions alone say too little: for root they allow everything, and in
    `/sys` nothing can be made all the same. Nothing is left behind.

    Args:
        folder: Where something is to be written; folders on the way to it may be missing.
    """
    place = folder.absolute()
    try:
        while not place.exists() and place != place.parent:
            place = place.parent
        if not place.is_dir():
            return f"{place} is a file, not a folder"
        with tempfile.TemporaryFile(dir=place):
            return None
    except OSError as error:
        return f"{place} cannot be written ({error.strerror or error})"


def write_atomically(path: str | Path, data: bytes) -> Path:
    """Write a file whole or not at all, and return its path.

    Args:
        path: Where it goes; an older file there is replaced at the very end.
        data: The content.

    Raises:
        OSError: The disk is full or the folder cannot be written; the older file is untouched.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        # A temporary file is private to its owner; what others may read stays as they set it.
        Path(name).chmod(0o666 & ~_umask())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    flush_folder(path.parent)
    return path


def write_frame(frame: pd.DataFrame, path: Path) -> Path:
    """Write a table as CSV, or as Parquet where the suffix is not `.csv`, and return its path."""
    buffer = io.BytesIO()
    if path.suffix == ".csv":
        frame.to_csv(buffer, index=False)
    else:
        frame.to_parquet(buffer, index=False)
    return write_atomically(path, buffer.getvalue())


@cache
def _umask() -> int:
    """Return the process' mask of file rights, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def flush_folder(folder: Path) -> None:
    """Flush a rename to the disk, where the file system lets one."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)
