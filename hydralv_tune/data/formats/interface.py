"""What a format takes and gives: a location, an array as stored, and the same as (Z, Y, X)."""

from __future__ import annotations

import math
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from hydralv_tune.config.errors import VolumeError
from hydralv_tune.data.formats.location import Location
from hydralv_tune.data.voxel_size import UNKNOWN, Placement, VoxelSize

DEFAULT_DATASET = "main"
Names = tuple[str, ...]

# What the libraries raise on broken files, found by truncating and garbling them.
UNREADABLE = (
    EOFError,
    OSError,
    RuntimeError,
    ValueError,
    KeyError,
    IndexError,
    TypeError,
    AttributeError,
    NotImplementedError,
    ImportError,
    ArithmeticError,
    SyntaxError,
    struct.error,
    zlib.error,
)
MEANING = {"c": "channels", "s": "colour samples", "t": "time points"}
SYNONYMS = {
    "z": ("z", "depth", "plane", "slice", "section"),
    "y": ("y", "row", "height"),
    "x": ("x", "column", "col", "width"),
    "c": ("c", "channel", "channels"),
    "t": ("t", "time"),
    "s": ("s", "sample", "samples", "rgb"),
}
LETTERS = {name: letter for letter, names in SYNONYMS.items() for name in names}
UNNAMED = "?"
STACK = "Give a stack of sections, or the folder that holds them."
COLOURS = (3, 4)
"""Samples of a colour picture, without and with transparency."""
AT_ONCE_BYTES = 2**28
"""Read at once while an array is iterated, however much a layer of chunks holds."""


@dataclass(frozen=True)
class Stored:
    """An array as its file has it.

    Args:
        array: Sliced by one slice an axis; anything with `shape` and `dtype`.
        axes: A name for each axis, as `axis_letters` gives them; None where the file has none.
        placement: Of its voxels, along z, y, x.
        chunks: The blocks it is stored in; None where it is stored in one piece.
        close: Closes the file.
        palette: Whether its numbers stand for colours of a palette: they can be ids, but no greys.
        place: The path of its file with its name in there, where it has one.
    """

    array: Any
    axes: Names | None = None
    placement: Placement = UNKNOWN
    chunks: tuple[int, ...] | None = None
    close: Callable[[], None] = lambda: None
    palette: bool = False
    place: Path | None = None


class WritableArray(Protocol):
    """An array that is being written.

    A box is written by `target[z0:z1, y0:y1, x0:x1] = values`. Boxes may come in any order, and
    those never written are 0; boxes that are whole chunks are the fastest.
    """

    def __setitem__(self, box: Any, values: np.ndarray) -> None: ...


@dataclass(frozen=True)
class LazyArray:
    """An array that stays on disk until it is sliced: (Z, Y, X), or channels first.

    Args:
        path: What messages call it.
        shape: Its whole shape.
        dtype: Of its values, in the byte order of this machine.
        chunks: The blocks it is stored in; None where it is stored in one piece.
        voxel_size_nm: Size of a voxel along z, y, x; None where the file does not say.
        origin_nm: Where its first voxel lies along z, y, x; None where the file does not say.
        axes: Their names as the file gives them; None where it gives none.
        palette: As that of `Stored`.
    """

    path: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    chunks: tuple[int, ...] | None
    voxel_size_nm: VoxelSize | None
    origin_nm: VoxelSize | None
    axes: Names | None
    palette: bool
    _stored: Stored
    _order: tuple[int, ...]

    def __getitem__(self, index: Any) -> np.ndarray:
        """Return a part in memory: numbers, slices with steps from 1, and an ellipsis.

        Raises:
            VolumeError: The part cannot be read.
        """
        box, squeezed = self._box(index)
        dropped = [axis for axis in range(len(self._stored.array.shape)) if axis not in self._order]
        where: list[slice] = [slice(0, 1)] * (len(self._order) + len(dropped))
        for axis, part in zip(self._order, box, strict=True):
            where[axis] = part
        try:
            values = np.asarray(self._stored.array[tuple(where)])
        except VolumeError:
            raise
        except UNREADABLE as error:
            raise unreadable(self.path, error) from error
        values = values.transpose(*self._order, *dropped)
        values = values.reshape(values.shape[: len(self._order)])
        values = values.astype(self.dtype, copy=False)
        return values[tuple(0 if gone else slice(None) for gone in squeezed)]

    def __iter__(self) -> Iterator[np.ndarray]:
        """Yield the parts along the first axis; as many are read at once as a chunk holds."""
        one = max(math.prod(self.shape[1:]) * self.dtype.itemsize, 1)
        depth = max(min(self.chunks[0] if self.chunks else 1, AT_ONCE_BYTES // one), 1)
        for first in range(0, self.shape[0], depth):
            yield from self[first : first + depth]

    def _box(self, index: Any) -> tuple[list[slice], list[bool]]:
        """Return a slice for each axis, and which axes an index by number drops."""
        parts = list(index) if isinstance(index, tuple) else [index]
        if Ellipsis not in parts:
            parts.append(Ellipsis)
        at = parts.index(Ellipsis)
        parts[at : at + 1] = [slice(None)] * (self.ndim - len(parts) + 1)
        box, squeezed = [], []
        for part, side in zip(parts, self.shape, strict=True):
            number = not isinstance(part, slice)
            if number:
                place = int(part)
                if not -side <= place < side:
                    raise IndexError(f"index {place} is outside an axis of {side}")
                part = slice(place % side, place % side + 1)
            start, stop, step = part.indices(side)
            box.append(slice(start, max(stop, start), step))
            squeezed.append(number)
        return box, squeezed

    @property
    def placement(self) -> Placement:
        """Return all that the file says of the place of its voxels."""
        return self._stored.placement

    @property
    def place(self) -> Path | None:
        """Return that of `Stored`."""
        return self._stored.place

    @property
    def ndim(self) -> int:
        """Return the number of axes."""
        return len(self.shape)

    def close(self) -> None:
        """Close the file."""
        self._stored.close()

    def __enter__(self) -> LazyArray:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True)
class Repeated:
    """An array of which each voxel stands for a block of voxels, enlarged where it is sliced.

    Args:
        array: (Z, Y, X), at the lower resolution.
        factors: Voxels along z, y, x that one of its voxels stands for.
    """

    array: LazyArray
    factors: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape at the higher resolution."""
        return tuple(n * factor for n, factor in zip(self.array.shape, self.factors, strict=True))

    @property
    def dtype(self) -> np.dtype[Any]:
        """Return the type of its file."""
        return self.array.dtype

    def __getitem__(self, box: tuple[slice, ...]) -> np.ndarray:
        """Return a box of the higher resolution, given by slices with steps from 1."""
        coarse = tuple(
            slice(part.start // factor, -(-part.stop // factor))
            for part, factor in zip(box, self.factors, strict=True)
        )
        values = self.array[coarse]
        for axis, (part, factor) in enumerate(zip(box, self.factors, strict=True)):
            places = np.arange(part.start, part.stop, part.step) // factor
            values = values.take(places - part.start // factor, axis)
        return values


COARSEST = 8
"""Voxels along an axis that a voxel of a mask may stand for."""


def on_voxels_of(mask: LazyArray, shape: Sequence[int]) -> LazyArray:
    """Return a mask on the voxels of its image; as it is where it is not coarser by whole numbers.

    Args:
        mask: (Z, Y, X).
        shape: Of the image.
    """
    factors = tuple(
        side // own if side % own == 0 else 0 for side, own in zip(shape, mask.shape, strict=True)
    )
    if max(factors) == 1 or not all(1 <= factor <= COARSEST for factor in factors):
        return mask
    warnings.warn(
        f"{mask.path}: has a lower resolution than its image; each of its voxels stands for "
        f"{' x '.join(map(str, factors))} voxels (z, y, x) of it.",
        stacklevel=2,
    )
    placement = mask.placement
    sizes = {
        key: tuple(s / f for s, f in zip(size, factors, strict=True))
        for key in ("voxel_size_nm", "bare_size")
        if (size := getattr(placement, key)) is not None
    }
    placement = replace(placement, **sizes)
    chunks = (
        tuple(c * f for c, f in zip(mask.chunks, factors, strict=True)) if mask.chunks else None
    )
    stored = Stored(Repeated(mask, factors), mask.axes, placement, chunks, mask.close)
    return replace(
        mask,
        shape=tuple(int(n) for n in shape),
        chunks=chunks,
        voxel_size_nm=placement.voxel_size_nm,
        _stored=stored,
        _order=(0, 1, 2),
    )


def axis_letters(names: Sequence[Any]) -> Names | None:
    """Return the letters of named axes, or None where the names say nothing.

    Args:
        names: As a file has them: `z`, `depth`, `channel`, `dim_0`, None.
    """
    letters = [str("" if name is None else name).strip().lower() for name in names]
    if all(name == "" or name.startswith("dim_") for name in letters):
        return None
    return tuple(LETTERS.get(name, name or UNNAMED) for name in letters)


def arranged(location: object, stored: Stored, ndim: int | None, axes: str) -> LazyArray:
    """Return a stored array with its axes in order; those of length 1 that are no space are gone.

    Args:
        location: What messages call it.
        stored: As a format opened it.
        ndim: 3 for (Z, Y, X), 4 for channels first, None for whatever there is.
        axes: How messages call the axes that are required.

    Raises:
        VolumeError: The axes are named and are not those of a volume, their number is another, it
            holds no voxel or no real numbers.
    """
    shape, dtype = tuple(int(n) for n in stored.array.shape), np.dtype(stored.array.dtype)
    if stored.axes is None:
        order = tuple(range(len(shape)))
    else:
        order = _order(location, stored.axes, shape, ndim)
    ours = tuple(shape[axis] for axis in order)
    if ndim is not None and len(ours) != ndim:
        hint = STACK if len(ours) < ndim else "Save one channel alone."
        raise VolumeError(
            f"{location}: shape {ours} has {len(ours)} axes, but {ndim} are required, {axes}. "
            f"{hint}"
        )
    if stored.axes is None and len(ours) >= 3 and ours[-1] in COLOURS:
        warnings.warn(
            f"{location}: its axes have no names and its shape is {ours}: the last is read as x, "
            f"but may be {ours[-1]} colours. If so, save one channel alone, as a stack.",
            stacklevel=2,
        )
    if not ours or min(ours) < 1:
        raise VolumeError(f"{location}: shape {ours} holds no voxel. Name another file.")
    if dtype.kind not in "buif":
        raise VolumeError(
            f"{location}: dtype {dtype} holds no real numbers, but integers or floats are "
            "required. Save the values as one of them."
        )
    return LazyArray(
        path=str(location),
        shape=ours,
        dtype=dtype.newbyteorder("="),
        chunks=None if stored.chunks is None else tuple(stored.chunks[axis] for axis in order),
        voxel_size_nm=stored.placement.voxel_size_nm,
        origin_nm=stored.placement.origin_nm,
        axes=stored.axes,
        palette=stored.palette,
        _stored=stored,
        _order=order,
    )


def _order(
    location: object, axes: Names, shape: tuple[int, ...], ndim: int | None
) -> tuple[int, ...]:
    """Return which stored axis is which of (c,) z, y, x, by their names."""
    names = list(axes)
    if len(names) != len(shape) or len({n for n in names if n != UNNAMED}) < sum(
        n != UNNAMED for n in names
    ):
        raise VolumeError(
            f"{location}: its axes are called {', '.join(names)}, but its shape is {shape}: names "
            "and axes do not fit each other. Name each axis once in the file."
        )
    spelled = ", ".join(f"{n} ({side})" for n, side in zip(names, shape, strict=True))
    wanted = "czyx" if ndim == 4 else "zyx"
    unnamed = [i for i, name in enumerate(names) if name == UNNAMED]
    missing = [name for name in wanted if name not in names]
    if ndim is not None and 0 < len(unnamed) <= len(missing):
        for i, name in zip(unnamed, missing[-len(unnamed) :], strict=True):
            names[i] = name
    if ndim is not None and "z" not in names and "t" in names and shape[names.index("t")] > 1:
        names[names.index("t")] = "z"
        warnings.warn(
            f"{location}: its axes are {spelled}: time (t) is read as z, since there is no z.",
            stacklevel=2,
        )
    if ndim is None:
        rest = [i for i, n in enumerate(names) if n not in ("z", "y", "x") and shape[i] != 1]
        return (*rest, *(names.index(name) for name in "zyx" if name in names))
    for i, name in enumerate(names):
        if name in wanted or shape[i] == 1:
            continue
        what = f"'{name}' ({MEANING[name]})" if name in MEANING else f"'{name}'"
        colour = " It is a colour picture." if name == "s" else ""
        hint = {
            "t": "Save one time point alone.",
            UNNAMED: "Give a stack of sections of one channel.",
        }.get(name, "Save one channel alone, as a stack of sections.")
        raise VolumeError(
            f"{location}: its axes are {spelled}; axis {what} has length {shape[i]}, but "
            f"{axes_of(wanted)} are required.{colour} {hint}"
        )
    absent = [name for name in wanted if name not in names]
    if absent:
        hint = STACK if absent == ["z"] else "Name the axes in the file so."
        raise VolumeError(
            f"{location}: its axes are {spelled}; {', '.join(absent)} is missing, but "
            f"{axes_of(wanted)} are required. {hint}"
        )
    return tuple(names.index(name) for name in wanted)


def axes_of(letters: str) -> str:
    """Return axes as a message lists them."""
    return "channels, z, y and x" if letters == "czyx" else "z, y and x alone"


def choose_dataset(location: Location, names: list[str]) -> str:
    """Return the dataset that is named, `main`, or the only one.

    Raises:
        VolumeError: It is missing, or several are there and none is named.
    """
    place = replace(location, dataset=None)
    if location.dataset is not None:
        if location.dataset in names:
            return location.dataset
        raise VolumeError(
            f"{place}: there is no dataset '{location.dataset}'. It holds: "
            f"{', '.join(names) or 'none'}."
        )
    if DEFAULT_DATASET in names:
        return DEFAULT_DATASET
    if len(names) == 1:
        return names[0]
    if not names:
        raise VolumeError(f"{place}: it holds no dataset. Name another file.")
    raise VolumeError(
        f"{place}: it holds {len(names)} datasets and none is named: {', '.join(names)}. "
        f"Name one, for example {place.of(names[0])}."
    )


def check_new_dataset(
    location: Location, item: Callable[[str], object | None], group: type[Any]
) -> None:
    """Refuse to write to a name that is a group, or that leads through an array.

    Args:
        location: With the dataset that is to be written.
        item: Gives what has a name in the file, or None.
        group: The type of those that hold others.

    Raises:
        VolumeError: It is one of these.
    """
    parts = str(location.dataset).split("/")
    for depth in range(1, len(parts) + 1):
        name = "/".join(parts[:depth])
        found = item(name)
        if found is not None and isinstance(found, group) == (depth == len(parts)):
            what = (
                "a group, and what it holds would be lost"
                if depth == len(parts)
                else "an array, which holds no other"
            )
            raise VolumeError(f"{location}: '{name}' is {what}. Name another dataset.")


def unreadable(place: object, error: BaseException) -> VolumeError:
    """Return the error for a file that its library cannot read, with what can be done about it."""
    whole = " ".join(str(error).split()) or type(error).__name__
    reason, lower = whole[:200], whole.lower()
    if any(word in lower for word in ("unable to lock file", "already open for", "file is locked")):
        return VolumeError(
            f"{place}: another program holds the file open for writing, or ended without closing "
            "it. Close it there, or copy the file once it is written."
        )
    if any(word in lower for word in ("http code", "ignored by server")):
        return VolumeError(
            f"{place}: its server does not give it ({reason}). Check the address, and that the "
            "server gives whole files and parts of them."
        )
    if isinstance(error, OSError) and error.errno is not None and error.strerror:
        return VolumeError(
            f"{place}: cannot be read ({error.strerror}). Check the path, its permissions and the "
            "disk."
        )
    if isinstance(error, ImportError | NotImplementedError) or any(
        word in lower
        for word in ("requires the", "codec", "filter", "not supported", "unsupported")
    ):
        return VolumeError(
            f"{place}: its compression or encoding cannot be read here ({reason}). Save it with "
            "gzip, or uncompressed."
        )
    if "metadata invalid" in lower:
        return VolumeError(
            f"{place}: its metadata do not fit its pages ({reason}). Copy it again, or save it "
            "anew, for example with Fiji."
        )
    return VolumeError(
        f"{place}: cannot be read, the file is truncated or damaged ({reason}). Copy it again, or "
        "name another."
    )


def chunks_for(shape: Sequence[int]) -> tuple[int, ...] | None:
    """Return blocks of about a quarter of a million voxels, flat along z as patches are."""
    if len(shape) < 3 or 0 in shape:
        return None
    z, y, x = (min(n, m) for n, m in zip(shape[-3:], (16, 128, 128), strict=True))
    return (*(1 for _ in shape[:-3]), z, y, x)
