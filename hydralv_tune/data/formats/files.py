"""Arrays in files of any format: found, read whole or in parts, written whole or not at all."""

from __future__ import annotations

import os
import shutil
import uuid
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from hydralv_tune.config.errors import InputError, VolumeError
from hydralv_tune.data.formats.interface import (
    UNREADABLE,
    LazyArray,
    WritableArray,
    arranged,
    chunks_for,
    on_voxels_of,
    unreadable,
)
from hydralv_tune.data.formats.location import Location, format_of, format_to_write, locate
from hydralv_tune.data.voxel_size import Placement, VoxelSize

__all__ = [
    "LazyArray",
    "Location",
    "WritableArray",
    "create_array",
    "locate",
    "open_lazy",
    "open_mask",
    "read_array",
    "read_voxel_size_nm",
    "write_array",
]


def read_array(path: str | Path, *, ndim: int | None = None, axes: str = "(Z, Y, X)") -> np.ndarray:
    """Return a whole array in the dtype of its file.

    Args:
        path: `file` or `file:dataset`.
        ndim: The number of axes it must have; any where None.
        axes: How the message calls them.

    Raises:
        VolumeError: It is missing, broken, ambiguous, of another number of axes, empty, or holds
            no real numbers.
    """
    with open_lazy(path, ndim=ndim, axes=axes) as lazy:
        return lazy[...]


def open_lazy(path: str | Path, *, ndim: int | None = None, axes: str = "(Z, Y, X)") -> LazyArray:
    """Return shape, dtype, placement and slices of an array without reading it.

    Raises:
        VolumeError: As for `read_array`.
        InputError: A package that its format needs is not installed.
    """
    location = locate(path)
    kind = format_of(location)
    if location.dataset is not None and not kind.has_datasets:
        raise VolumeError(f"{location}: a {kind.name} holds no datasets. Name the file alone.")
    try:
        stored = kind.code.open_stored(location)
    except InputError:
        raise
    except (*UNREADABLE, *getattr(kind.code, "ERRORS", ())) as error:
        raise unreadable(location, error) from error
    try:
        lazy = arranged(location, stored, ndim, axes)
    except BaseException:
        stored.close()
        raise
    for note in stored.placement.notes:
        warnings.warn(f"{location}: {note}", stacklevel=2)
    return lazy


def open_mask(path: str | Path, shape: Sequence[int]) -> LazyArray:
    """Return a mask (Z, Y, X) without reading it, on the voxels of the image it belongs to.

    One of a lower resolution, by whole numbers up to 8, is enlarged, each voxel repeated.

    Args:
        path: As for `read_array`.
        shape: Of the image.

    Raises:
        VolumeError: As for `read_array`. That its shape does not fit is for the caller to say.
    """
    return on_voxels_of(open_lazy(path, ndim=3), shape)


def read_voxel_size_nm(path: str | Path) -> VoxelSize | None:
    """Return the voxel size along z, y, x that a file states, or None."""
    with open_lazy(path) as lazy:
        return lazy.voxel_size_nm


def write_array(
    path: str | Path,
    array: np.ndarray,
    *,
    voxel_size_nm: VoxelSize | None = None,
    origin_nm: VoxelSize | None = None,
) -> None:
    """Write an array so that readers see the old file or the whole new one, never a part.

    Args:
        path: `file` or `file:dataset`; the suffix decides on the format. With a dataset named, the
            others of an existing file stay.
        array: What to write, in its dtype.
        voxel_size_nm: Along z, y, x; written along where given.
        origin_nm: Where the first voxel lies; written along where given.

    Raises:
        VolumeError: The suffix is unknown, or the place cannot be written.
    """
    with create_array(
        path, array.shape, array.dtype, voxel_size_nm=voxel_size_nm, origin_nm=origin_nm
    ) as target:
        target[...] = array


@contextmanager
def create_array(
    path: str | Path,
    shape: Sequence[int],
    dtype: np.typing.DTypeLike,
    *,
    voxel_size_nm: VoxelSize | None = None,
    origin_nm: VoxelSize | None = None,
    chunks: Sequence[int] | None = None,
) -> Iterator[WritableArray]:
    """Give an array to be written box by box; it takes its name once the block ends without error.

    Only the boxes that are being written are in memory: see `WritableArray`.

    Args:
        path: As for `write_array`.
        shape: Of the whole array, (Z, Y, X) or channels first.
        dtype: Of the array.
        voxel_size_nm: As for `write_array`.
        origin_nm: As for `write_array`.
        chunks: The blocks to store it in; some 16 x 128 x 128 voxels where None.

    Raises:
        VolumeError: As for `write_array`; the older file is untouched.
    """
    location = locate(path)
    kind = format_to_write(location)
    whole = tuple(int(n) for n in shape)
    blocks = chunks_for(whole) if chunks is None else tuple(int(n) for n in chunks)
    try:
        with (
            _replacing(location.path, keep=location.dataset is not None) as temporary,
            kind.code.create(
                Location(temporary, location.dataset),
                whole,
                np.dtype(dtype),
                blocks,
                Placement(voxel_size_nm, origin_nm),
            ) as target,
        ):
            yield target
    except OSError as error:
        raise VolumeError(
            f"{location}: cannot be written ({error.strerror or error}). Check the folder, its "
            "permissions and the free space."
        ) from error


@contextmanager
def _replacing(path: Path, *, keep: bool) -> Iterator[Path]:
    """Give a temporary path beside the final one, and rename it there on success.

    Args:
        keep: Start from a copy of what is there, to add to it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # The suffix stays last: the libraries look at it.
    temporary = path.with_name(f".{uuid.uuid4().hex[:8]}.{path.name}")
    try:
        if keep and path.is_dir():
            # The libraries of these formats replace files and never change them in place, so the
            # old content need not be copied.
            shutil.copytree(path, temporary, copy_function=_link_or_copy)
        elif keep and path.exists():
            shutil.copy2(path, temporary)
        yield temporary
        if path.is_dir():
            # A folder cannot be replaced in one step; the old one is moved aside, not deleted,
            # until the new one is in place.
            old = path.with_name(f".{uuid.uuid4().hex[:8]}.old.{path.name}")
            path.rename(old)
            temporary.rename(path)
            if old.is_symlink():
                old.unlink()
            else:
                shutil.rmtree(old)
        else:
            if temporary.is_file():
                _flush(temporary)
            temporary.replace(path)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


def _link_or_copy(source: str, target: str) -> None:
    """Give a file a second name, or copy it where the file system has no hard links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _flush(path: Path) -> None:
    """Wait until a file is on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
