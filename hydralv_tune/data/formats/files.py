"""HDF5, TIFF and Zarr: find the array in a file, read it, read a part of it, write it whole."""

from __future__ import annotations

import os
import shutil
import struct
import uuid
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import tifffile
import zarr
import zarr.errors

from hydralv_tune.config.errors import VolumeError
from hydralv_tune.data.formats.tiff import read_tiff, write_tiff
from hydralv_tune.data.voxel_size import VoxelSize, voxel_size_from

DEFAULT_DATASET = "main"
SUFFIXES = {
    ".h5": "HDF5",
    ".hdf5": "HDF5",
    ".hdf": "HDF5",
    ".he5": "HDF5",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".zarr": "Zarr",
}
# What the three libraries raise on broken files, found by truncating and garbling them.
BROKEN = (
    EOFError,
    OSError,
    RuntimeError,
    ValueError,
    KeyError,
    IndexError,
    TypeError,
    struct.error,
    zlib.error,
    tifffile.TiffFileError,
)


@dataclass(frozen=True)
class Location:
    """A file, and the dataset in it where one is named."""

    path: Path
    dataset: str | None = None

    def __str__(self) -> str:
        return str(self.path) if self.dataset is None else f"{self.path}:{self.dataset}"


@dataclass(frozen=True)
class LazyArray:
    """An array that stays on disk until it is sliced.

    Args:
        path: What messages call it.
        shape: Its whole shape.
        dtype: Its dtype.
        chunks: The blocks it is stored in, or None where it is stored in one piece.
        voxel_size_nm: Size of a voxel along z, y, x; None where the file does not say.
    """

    path: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    chunks: tuple[int, ...] | None
    voxel_size_nm: VoxelSize | None
    _array: Any
    _close: Callable[[], None]

    def __getitem__(self, index: Any) -> np.ndarray:
        """Return a part in memory.

        Raises:
            VolumeError: The part cannot be read.
        """
        try:
            return np.asarray(self._array[index])
        except BROKEN as error:
            raise _broken(self.path, error) from error

    @property
    def ndim(self) -> int:
        """Return the number of axes."""
        return len(self.shape)

    def close(self) -> None:
        """Close the file."""
        self._close()

    def __enter__(self) -> LazyArray:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def locate(path: str | Path) -> Location:
    """Split `file:dataset`, and expand `~`.

    A colon counts only after a known suffix, so that other colons in a path stay what they are.
    """
    text = os.path.expanduser(os.fspath(path))
    if ":" in text and not os.path.exists(text):
        file, _, dataset = text.rpartition(":")
        if Path(file).suffix.lower() in SUFFIXES:
            return Location(Path(file), dataset.strip("/") or None)
    return Location(Path(text))


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
    """Return shape, dtype and slices of an array without reading it.

    Compressed TIFF is read whole on opening, since its pages cannot be sliced.

    Raises:
        VolumeError: As for `read_array`.
    """
    location = locate(path)
    kind = _format_of(location)
    try:
        lazy = OPENERS[kind](location)
    except VolumeError:
        raise
    except BROKEN as error:
        raise _broken(location, error) from error
    try:
        _check_array(location, lazy, ndim, axes)
    except VolumeError:
        lazy.close()
        raise
    return lazy


def read_voxel_size_nm(path: str | Path) -> VoxelSize | None:
    """Return the voxel size along z, y, x that a file states, or None."""
    with open_lazy(path) as lazy:
        return lazy.voxel_size_nm


def write_array(
    path: str | Path, array: np.ndarray, *, voxel_size_nm: VoxelSize | None = None
) -> None:
    """Write an array so that readers see the old file or the whole new one, never a part.

    Args:
        path: `file` or `file:dataset`; the suffix decides on HDF5, TIFF or Zarr. With a dataset
            named, the others of an existing file stay.
        array: What to write, in its dtype.
        voxel_size_nm: Written along where given.

    Raises:
        VolumeError: The suffix is unknown, or the place cannot be written.
    """
    location = locate(path)
    kind = SUFFIXES.get(location.path.suffix.lower())
    if kind is None:
        raise VolumeError(
            f"{location}: '{location.path.suffix}' is no known format. Known suffixes: "
            f"{', '.join(SUFFIXES)}."
        )
    if kind == "TIFF" and location.dataset is not None:
        raise VolumeError(f"{location}: a TIFF holds no datasets. Name the file alone.")
    try:
        with _replacing(location.path, keep=location.dataset is not None) as temporary:
            WRITERS[kind](temporary, location.dataset, array, voxel_size_nm)
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
    temporary = path.with_name(f".{path.stem}.{uuid.uuid4().hex[:8]}{path.suffix}")
    try:
        if keep and path.is_dir():
            shutil.copytree(path, temporary)
        elif keep and path.exists():
            shutil.copy2(path, temporary)
        yield temporary
        if path.is_dir():
            # A folder cannot be replaced in one step; the old one is moved aside, not deleted,
            # until the new one is in place.
            old = path.with_name(f".{path.stem}.{uuid.uuid4().hex[:8]}.old{path.suffix}")
            path.rename(old)
            temporary.rename(path)
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


def _flush(path: Path) -> None:
    """Wait until a file is on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _format_of(location: Location) -> str:
    """Return HDF5, TIFF or Zarr, by suffix or else by content."""
    path = location.path
    if not path.exists():
        near = sorted(p.name for p in path.parent.glob("*") if p.suffix.lower() in SUFFIXES)
        there = f" In that folder: {', '.join(near[:5])}." if near else ""
        raise VolumeError(f"{location}: no such file.{there} Check the path.")
    if path.is_dir():
        if any((path / name).exists() for name in ("zarr.json", ".zarray", ".zgroup")):
            return "Zarr"
        if not path.suffix.lower() == ".zarr":
            raise VolumeError(
                f"{location}: this is a folder, neither a Zarr array nor a Zarr group. Name a file."
            )
        raise VolumeError(
            f"{location}: this folder has no Zarr metadata (zarr.json, .zarray or .zgroup); it is "
            "empty or was copied in part. Copy it again, or name another."
        )
    known = SUFFIXES.get(path.suffix.lower())
    try:
        with path.open("rb") as file:
            head = file.read(8)
    except OSError as error:
        raise VolumeError(
            f"{location}: cannot be opened ({error.strerror}). Check the permissions."
        ) from error
    if h5py.is_hdf5(path):
        return "HDF5"
    if head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return "TIFF"
    if known is None:
        raise VolumeError(
            f"{location}: neither HDF5 nor TIFF nor Zarr. Known suffixes: {', '.join(SUFFIXES)}."
        )
    size = path.stat().st_size
    what = "is empty" if size == 0 else f"({size} bytes) is no {known} file, or its head is lost"
    raise VolumeError(f"{location}: the file {what}. Copy it again, or name another.")


def _broken(place: object, error: BaseException) -> VolumeError:
    """Return the error for a file that its library cannot read."""
    reason = " ".join(str(error).split()) or type(error).__name__
    return VolumeError(
        f"{place}: cannot be read, the file is truncated or damaged ({reason[:200]}). "
        "Copy it again, or name another."
    )


def _check_array(location: Location, lazy: LazyArray, ndim: int | None, axes: str) -> None:
    """Raise where an array has the wrong number of axes, no voxel, or no real numbers."""
    shape = lazy.shape
    if ndim is not None and len(shape) != ndim:
        hint = "Give a stack of sections." if len(shape) < ndim else "Save one channel alone."
        raise VolumeError(
            f"{location}: shape {shape} has {len(shape)} axes, but {ndim} are due, {axes}. {hint}"
        )
    if 0 in shape or not shape:
        raise VolumeError(f"{location}: shape {shape} holds no voxel. Name another file.")
    if lazy.dtype.kind not in "buif":
        raise VolumeError(
            f"{location}: dtype {lazy.dtype} holds no real numbers, but integers or floats are "
            "due. Save the values as one of them."
        )


def _choose(location: Location, names: list[str]) -> str:
    """Return the dataset that is named, `main`, or the only one."""
    if location.dataset is not None:
        if location.dataset in names:
            return location.dataset
        raise VolumeError(
            f"{location.path}: there is no dataset '{location.dataset}'. It holds: "
            f"{', '.join(names) or 'none'}."
        )
    if DEFAULT_DATASET in names:
        return DEFAULT_DATASET
    if len(names) == 1:
        return names[0]
    if not names:
        raise VolumeError(f"{location.path}: it holds no dataset. Name another file.")
    raise VolumeError(
        f"{location.path}: it holds {len(names)} datasets and none is named: {', '.join(names)}. "
        f"Name one, for example {location.path}:{names[0]}."
    )


def _open_hdf5(location: Location) -> LazyArray:
    """Open an HDF5 dataset."""
    file = h5py.File(location.path, "r")
    try:
        names: list[str] = []
        file.visititems(
            lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None
        )
        dataset = file[_choose(location, names)]
        size = voxel_size_from(dataset.attrs) or voxel_size_from(file.attrs)
        return LazyArray(
            path=str(location),
            shape=tuple(dataset.shape or ()),
            dtype=dataset.dtype,
            chunks=dataset.chunks,
            voxel_size_nm=size,
            _array=dataset,
            _close=file.close,
        )
    except BaseException:
        file.close()
        raise


def _open_zarr(location: Location) -> LazyArray:
    """Open a Zarr array, or the array of a Zarr group."""
    node = zarr.open(location.path, mode="r")
    attributes: list[tuple[Mapping[str, Any], str]] = [(dict(node.attrs), "")]
    if isinstance(node, zarr.Group):
        names = [
            name for name, item in node.members(max_depth=None) if isinstance(item, zarr.Array)
        ]
        name = _choose(location, sorted(names))
        array = node[name]
        attributes = [(dict(array.attrs), name), (dict(node.attrs), name)]
    elif location.dataset is not None:
        raise VolumeError(
            f"{location}: {location.path} is a single array without datasets. Name it alone."
        )
    else:
        array = node
    size = next(
        (s for a, name in attributes if (s := voxel_size_from(a, name)) is not None),
        None,
    )
    return LazyArray(
        path=str(location),
        shape=tuple(array.shape),
        dtype=array.dtype,
        chunks=tuple(array.chunks),
        voxel_size_nm=size,
        _array=array,
        _close=lambda: None,
    )


def _open_tiff(location: Location) -> LazyArray:
    """Open a TIFF stack: mapped where its pages are contiguous, read whole where not."""
    if location.dataset is not None:
        raise VolumeError(f"{location}: a TIFF holds no datasets. Name the file alone.")
    array, size = read_tiff(location.path)
    return LazyArray(
        path=str(location),
        shape=tuple(array.shape),
        dtype=array.dtype,
        chunks=None,
        voxel_size_nm=size,
        _array=array,
        _close=lambda: None,
    )


def _write_hdf5(
    path: Path, dataset: str | None, array: np.ndarray, voxel_size_nm: VoxelSize | None
) -> None:
    """Write a compressed, chunked HDF5 dataset."""
    name = dataset or DEFAULT_DATASET
    with h5py.File(path, "a") as file:
        if name in file:
            del file[name]
        written = file.create_dataset(
            name,
            data=array,
            chunks=_chunks(array.shape),
            compression="gzip",
            # Noise does not compress: a higher level costs seconds on probabilities for nothing.
            compression_opts=1 if array.dtype.kind == "f" else 4,
            shuffle=array.dtype.itemsize > 1,
        )
        if voxel_size_nm is not None:
            written.attrs["voxel_size_nm"] = list(voxel_size_nm)
            written.attrs["resolution"] = list(voxel_size_nm)
            written.attrs["units"] = "nm"


def _write_zarr(
    path: Path, dataset: str | None, array: np.ndarray, voxel_size_nm: VoxelSize | None
) -> None:
    """Write a Zarr array, alone or into a group."""
    chunks = _chunks(array.shape) or "auto"
    if dataset is None:
        written = zarr.create_array(path, shape=array.shape, dtype=array.dtype, chunks=chunks)
    else:
        group = zarr.open_group(path, mode="a")
        written = group.create_array(
            dataset, shape=array.shape, dtype=array.dtype, chunks=chunks, overwrite=True
        )
    written[...] = array
    if voxel_size_nm is not None:
        written.attrs.update(
            {
                "voxel_size_nm": list(voxel_size_nm),
                "resolution": list(voxel_size_nm),
                "units": "nm",
            }
        )


def _write_tiff(
    path: Path, dataset: str | None, array: np.ndarray, voxel_size_nm: VoxelSize | None
) -> None:
    """Write a TIFF; it holds one array alone."""
    assert dataset is None
    write_tiff(path, array, voxel_size_nm)


def _chunks(shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """Return blocks of about a quarter of a million voxels, flat along z as patches are."""
    if len(shape) < 3:
        return None
    z, y, x = (min(n, m) for n, m in zip(shape[-3:], (16, 128, 128), strict=True))
    return (*(1 for _ in shape[:-3]), z, y, x)


OPENERS: dict[str, Callable[[Location], LazyArray]] = {
    "HDF5": _open_hdf5,
    "TIFF": _open_tiff,
    "Zarr": _open_zarr,
}
WRITERS: dict[str, Callable[[Path, str | None, np.ndarray, VoxelSize | None], None]] = {
    "HDF5": _write_hdf5,
    "TIFF": _write_tiff,
    "Zarr": _write_zarr,
}
