"""A folder of sections: one grey picture for each z, in the order of the numbers in their names."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from hydralv_tune.config.errors import VolumeError
from hydralv_tune.data.formats.interface import Stored, unreadable
from hydralv_tune.data.formats.location import Location

SUFFIXES = (".tif", ".tiff", ".png", ".jpg", ".jpeg", ".bmp")
GREY_MODES = {"1", "L", "I", "F", "I;16", "I;16B", "I;16L"}
CACHED_SECTIONS = 32


def holds_sections(folder: Path) -> bool:
    """Return whether a folder holds pictures."""
    return bool(_pictures(folder))


def _pictures(folder: Path) -> list[Path]:
    """Return the pictures in a folder, without the hidden files that macOS puts beside them."""
    return [
        path
        for path in folder.iterdir()
        if is_picture(path) and path.is_file() and not path.name.startswith(".")
    ]


def is_picture(path: Path) -> bool:
    """Return whether a file is named as a picture."""
    return path.suffix.lower() in SUFFIXES


def open_stored(location: Location) -> Stored:
    """Open the pictures of a folder as a stack.

    Raises:
        VolumeError: They are of several kinds, one is missing, or they are not one grey picture of
            the same shape and type each.
    """
    pictures = _pictures(location.path)
    kinds = sorted({p.suffix.lower() for p in pictures})
    if len(kinds) > 1:
        raise VolumeError(
            f"{location}: its pictures are of several kinds ({', '.join(kinds)}), so their order "
            "is not known. Keep those of one stack alone in a folder."
        )
    array = _Sections(location, _in_order(location, pictures))
    return Stored(array, ("z", "y", "x"), chunks=(1, *array.shape[1:]))


def _in_order(location: Location, files: Sequence[Path]) -> list[Path]:
    """Return files by the one number in their names that counts them, none left out."""
    split = [re.split(r"(\d+)", path.stem) for path in files]
    words = {tuple(parts[::2]) for parts in split}
    if len(files) > 1 and (len(words) > 1 or len(split[0]) == 1):
        some = ", ".join(sorted(path.name for path in files)[:3])
        raise VolumeError(
            f"{location}: the names of its {len(files)} pictures differ in more than numbers "
            f"({some}, ...), so their order is not known. Number those of one stack alone."
        )
    numbers = np.asarray([[int(n) for n in parts[1::2]] for parts in split]).reshape(len(files), -1)
    ranked = numbers[np.lexsort(numbers.T[::-1])] if numbers.size else numbers
    varying = [i for i in range(ranked.shape[1]) if len(set(ranked[:, i])) > 1]
    if any((np.diff(ranked[:, i]) <= 0).any() for i in varying):
        raise VolumeError(
            f"{location}: its pictures are numbered by {len(varying)} numbers that do not rise "
            "together, as tiles or channels are. Keep those of one stack alone in a folder."
        )
    steps = {int(s) for i in varying[-1:] for s in np.diff(ranked[:, i])}
    if len(steps) > 1:
        column = ranked[:, varying[-1]]
        at = int(np.argmax(np.diff(column) > min(steps)))
        raise VolumeError(
            f"{location}: after picture {column[at]} comes {column[at + 1]}, so one is missing. "
            "Put a copy of its neighbour there, and leave it out with the mask."
        )
    order = np.lexsort(numbers.T[::-1]) if numbers.size else range(len(files))
    return [files[int(i)] for i in order]


class _Sections:
    """A stack whose pictures are read when they are asked for.

    Args:
        location: For messages.
        files: In order.
    """

    def __init__(self, location: Location, files: Sequence[Path]) -> None:
        self._location, self._files = location, files
        self._section = lru_cache(maxsize=CACHED_SECTIONS)(self._read)
        first = self._read(0)
        self.shape = (len(files), *first.shape)
        self.dtype: np.dtype[Any] = first.dtype

    def _read(self, number: int) -> np.ndarray:
        """Return one section."""
        path = self._files[number]
        section = _tiff(path) if path.suffix.lower() in (".tif", ".tiff") else _picture(path)
        expected = getattr(self, "shape", None)
        if expected is not None and (section.shape, section.dtype) != (expected[1:], self.dtype):
            raise VolumeError(
                f"{path}: it is {section.shape} {section.dtype}, but the first section is "
                f"{expected[1:]} {self.dtype}; all must be alike. Save it like the others."
            )
        return section

    def __getitem__(self, box: Sequence[slice]) -> np.ndarray:
        """Return a box, given by one slice an axis."""
        planes = [self._section(z)[tuple(box[1:])] for z in range(len(self._files))[box[0]]]
        return np.asarray(planes, self.dtype)


def _tiff(path: Path) -> np.ndarray:
    """Return the only page of a TIFF."""
    from hydralv_tune.data.formats import tiff

    stored = tiff.open_stored(Location(path))
    try:
        if stored.palette:
            raise VolumeError(f"{path}: it is in colours of a palette. Save it in grey.")
        # What tifffile writes of a plain array names no axes.
        shape = stored.array.shape
        axes = ("y", "x") if stored.axes is None and len(shape) == 2 else stored.axes
        if axes != ("y", "x") and (axes != ("z", "y", "x") or shape[0] != 1):
            raise VolumeError(
                f"{path}: its axes are {', '.join(axes or 'not named')}, but one grey section is "
                "required. Keep the sections of one stack alone in a folder."
            )
        return np.asarray(stored.array[(slice(None),) * len(shape)]).reshape(shape[-2:])
    finally:
        stored.close()


def _picture(path: Path) -> np.ndarray:
    """Return a grey picture of any other kind."""
    from PIL import Image

    try:
        with Image.open(path) as picture:
            if picture.mode not in GREY_MODES:
                raise VolumeError(
                    f"{path}: a picture of mode {picture.mode}, but a grey one is required. Save "
                    "it in grey."
                )
            if picture.getexif().get(0x0112, 1) != 1:
                raise VolumeError(f"{path}: it is to be turned (EXIF). Save it upright.")
            return np.asarray(picture)
    except (OSError, ValueError, SyntaxError) as error:
        if isinstance(error, VolumeError):
            raise
        raise unreadable(path, error) from error
