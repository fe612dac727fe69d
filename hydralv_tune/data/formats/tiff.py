"""TIFF stacks: axes as the file names them, missing pages refused, sizes where Fiji has them."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import tifffile

from hydralv_tune.config.errors import VolumeError
from hydralv_tune.data.formats.interface import UNNAMED, Names, Stored, WritableArray
from hydralv_tune.data.formats.location import Location
from hydralv_tune.data.voxel_size import (
    Placement,
    VoxelSize,
    in_nm,
    measured,
    nm_of,
    no_size,
    placement_from,
    unknown_unit,
)

CACHED_BYTES = 1 << 28
"""Of decoded pages kept, so that neighbouring boxes do not decode a page anew."""
IMAGEJ_TYPES = (np.uint8, np.uint16, np.float32)
UPRIGHT = 1
ONE_SECTION = "It holds a single section, which is read as a volume of that one."
UNNAMED_LETTERS = "IQ"


def open_stored(location: Location) -> Stored:
    """Open a stack: mapped where its pages are contiguous, else read page by page.

    Raises:
        VolumeError: It holds more than one stack, its pages are turned or missing, or 0 is white.
        EOFError: Voxels are missing. tifffile raises what else it cannot read.
    """
    with logged_errors_raised():
        file = tifffile.TiffFile(location.path)
        try:
            series = _only_series(location, file)
            contiguous = series.dataoffset is not None and series.dtype.isnative and series.size
            if contiguous and series.dataoffset + series.nbytes > file.filehandle.size:
                raise EOFError("voxels are missing at its end")
            axes = _axes(file, series)
            array: Any
            if contiguous:
                array = tifffile.memmap(location.path, mode="r")
            elif _is_paged(series):
                array = _Pages(series)
            else:
                array = series.asarray() if series.size else np.empty(series.shape, series.dtype)
            placement = _placement(file)
            if axes is not None and _is_one_section(series):
                array, axes = _OneSection(array), ("z", *axes)
                placement = replace(placement, notes=(*placement.notes, ONE_SECTION))
            palette = _is_palette(location, series.keyframe)
            return Stored(array, axes, placement, close=file.close, palette=palette)
        except BaseException:
            file.close()
            raise


@contextmanager
def create(
    location: Location,
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    chunks: tuple[int, ...] | None,
    placement: Placement,
) -> Iterator[WritableArray]:
    """Give a stack to write to: in ImageJ's form where it has one, so that Fiji knows the size."""
    size, origin = placement.voxel_size_nm, placement.origin_nm
    # TIFF counts pixels for a unit of length, as a fraction.
    resolution = None if size is None else (1 / size[2], 1 / size[1])
    metadata: dict[str, Any] = {}
    # tifffile reads no stack of ImageJ that is one pixel wide.
    if len(shape) == 3 and shape[-1] > 1 and dtype in IMAGEJ_TYPES:
        metadata |= {"axes": "ZYX"}
        if size is not None:
            metadata |= {"spacing": size[0], "unit": "nm"}
            if origin is not None:
                # ImageJ's origin is a place in pixels: that of the coordinate 0.
                names = ("zorigin", "yorigin", "xorigin")
                metadata |= {n: -o / s for n, o, s in zip(names, origin, size, strict=True)}
        options: dict[str, Any] = {"imagej": True, "resolution": resolution}
    else:
        metadata |= {"axes": "CZYX"} if len(shape) == 4 else {}
        if size is not None:
            metadata["voxel_size_nm"] = list(size)
        if origin is not None:
            metadata["origin_nm"] = list(origin)
        options = {"photometric": "minisblack", "resolution": resolution}
    target = tifffile.memmap(location.path, shape=shape, dtype=dtype, metadata=metadata, **options)
    yield target
    target.flush()


def _only_series(location: Location, file: tifffile.TiffFile) -> Any:
    """Return the only stack of a file, having refused what would be lost or displaced."""
    if len(file.series) != 1:
        found = "; ".join(f"{s.axes} {s.shape} {s.dtype}" for s in file.series[:4])
        raise VolumeError(
            f"{location}: it holds {len(file.series)} images "
            f"({found}{'; ...' if len(file.series) > 4 else ''}), but one stack is required. Save "
            "the stack alone."
        )
    series = file.series[0]
    if any(page is None for page in series.pages):
        missing = sum(page is None for page in series.pages)
        raise VolumeError(
            f"{location}: {missing} of its {len(series.pages)} sections are in files that are "
            "missing. Copy those files beside it, or save the stack as one file."
        )
    pages = len(file.pages)
    own = sum(level_pages(level) for level in series.levels)
    if not series.is_multifile and pages > max(own, 1):
        raise VolumeError(
            f"{location}: it has {pages} pages, but its metadata tell of {own} only. Save the "
            "stack anew, for example with Fiji."
        )
    tag = series.keyframe.tags.get("Orientation")
    if tag is not None and tag.value != UPRIGHT:
        raise VolumeError(
            f"{location}: its sections are turned or mirrored (orientation {int(tag.value)}), and "
            f"only upright ones ({UPRIGHT}) are read. Save them upright."
        )
    return series


def _is_palette(location: Location, page: Any) -> bool:
    """Return whether numbers stand for colours; not where the palette is that of grey values.

    Raises:
        VolumeError: 0 is white: some programs turn the values around and some do not.
    """
    if page.photometric == tifffile.PHOTOMETRIC.MINISWHITE:
        raise VolumeError(
            f"{location}: it says that 0 is white (MinIsWhite), so its values may be turned around "
            "(dark for bright) or not, as the program that wrote them took it. Save it with 0 for "
            "black, in Fiji by Image > Lookup Tables > Grays, and look whether it is right."
        )
    if page.photometric != tifffile.PHOTOMETRIC.PALETTE:
        return False
    greys = np.linspace(0, 1, page.colormap.shape[1])
    return not np.allclose(page.colormap / page.colormap.max(initial=1), greys, atol=1 / 128)


def _axes(file: tifffile.TiffFile, series: Any) -> Names | None:
    """Return the axes by name; None where tifffile alone wrote the shape and nobody named them."""
    shaped = file.shaped_metadata if series.kind == "shaped" else None
    if shaped and "axes" not in shaped[0] and set(series.axes) <= {*UNNAMED_LETTERS, *"YX"}:
        return None
    return tuple(UNNAMED if a in UNNAMED_LETTERS else a.lower() for a in series.axes)


def _is_one_section(series: Any) -> bool:
    """Return whether the only section of a volume stands without its z, as Fiji writes it."""
    return "Z" in series.get_axes(squeeze=False) and not {"Z", "T"} & set(series.axes)


def level_pages(level: Any) -> int:
    """Return how many pages of the file belong to a level of a series."""
    return len(level.pages)


def _is_paged(series: Any) -> bool:
    """Return whether each page is one plane of the stack, in order."""
    page = series.keyframe
    return (
        series.ndim > page.ndim - 1
        and tuple(series.shape[-2:]) == tuple(page.shape)
        and len(series.pages) == int(np.prod(series.shape[:-2]))
        and series.transform is None
    )


class _OneSection:
    """A section as a volume of that one.

    Args:
        section: (Y, X), or with channels.
    """

    def __init__(self, section: Any) -> None:
        self._section, self.shape, self.dtype = section, (1, *section.shape), section.dtype

    def __getitem__(self, box: Sequence[slice]) -> np.ndarray:
        """Return a box, given by one slice an axis."""
        return np.asarray(self._section[tuple(box[1:])])[None][box[0]]


class _Pages:
    """A stack whose pages are decoded when they are asked for.

    Args:
        series: Each page of it is one plane.
    """

    def __init__(self, series: Any) -> None:
        self.shape, self.dtype = tuple(series.shape), series.dtype
        self._pages = series.pages
        series.parent.filehandle.set_lock(True)
        plane = int(np.prod(self.shape[-2:])) * self.dtype.itemsize
        self._plane = lru_cache(maxsize=max(CACHED_BYTES // max(plane, 1), 1))(self._decode)

    def _decode(self, number: int) -> np.ndarray:
        """Return one plane."""
        with logged_errors_raised():
            plane: np.ndarray = self._pages[number].asarray().reshape(self.shape[-2:])
        return plane

    def __getitem__(self, box: Sequence[slice]) -> np.ndarray:
        """Return a box, given by one slice an axis."""
        numbers = np.arange(len(self._pages)).reshape(self.shape[:-2])[tuple(box[:-2])]
        planes = [self._plane(int(number))[tuple(box[-2:])] for number in numbers.ravel()]
        inner = planes[0].shape if planes else (0, 0)
        return np.asarray(planes, self.dtype).reshape(*numbers.shape, *inner)


class _Complaints(logging.Handler):
    """Keeps the errors that a library logs instead of raising."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a message."""
        self.found.append(record.getMessage())


@contextmanager
def logged_errors_raised() -> Iterator[None]:
    """Raise what tifffile only logs: it reads a truncated stack as a shorter one, or as zeros."""
    logger, complaints = logging.getLogger("tifffile"), _Complaints()
    before, logger.propagate = logger.propagate, False
    logger.addHandler(complaints)
    try:
        yield
    finally:
        logger.removeHandler(complaints)
        logger.propagate = before
    if complaints.found:
        raise EOFError(complaints.found[0])


def _placement(file: tifffile.TiffFile) -> Placement:
    """Return the placement of our own, OME or ImageJ metadata."""
    shaped = file.shaped_metadata
    if shaped and ("voxel_size_nm" in shaped[0] or "origin_nm" in shaped[0]):
        return placement_from(shaped[0])
    if file.is_ome and file.ome_metadata:
        return _ome_placement(file.ome_metadata)
    if file.imagej_metadata:
        return _imagej_placement(file, file.imagej_metadata)
    return Placement()


def _ome_placement(xml: str) -> Placement:
    """Return the placement of OME-XML, whose sizes are in micrometres where no unit is given."""
    image = tifffile.xml2dict(xml).get("OME", {}).get("Image", {})
    image = image[0] if isinstance(image, list) else image
    pixels = image.get("Pixels", {})
    sizes = [pixels.get(f"PhysicalSize{axis}") for axis in "ZYX"]
    if None in sizes:
        return Placement()
    units = [pixels.get(f"PhysicalSize{axis}Unit", "um") for axis in "ZYX"]
    known = [nm_of(unit) for unit in units]
    size = in_nm(sizes, known)
    notes = _notes(size, f"PhysicalSize Z, Y, X = {sizes}", units)
    return measured(sizes, None, known, notes)


def _imagej_placement(file: tifffile.TiffFile, imagej: Mapping[str, Any]) -> Placement:
    """Return the placement of ImageJ's metadata and the resolution beside them."""
    tags = file.pages.first.tags
    if "spacing" not in imagej or "XResolution" not in tags or "YResolution" not in tags:
        return Placement()
    x, y = (tags[name].value for name in ("XResolution", "YResolution"))
    if not x[0] or not y[0]:
        return Placement()
    unit = imagej.get("unit", "pixel")
    units = [imagej.get("zunit", unit), imagej.get("yunit", unit), unit]
    known = [nm_of(one) for one in units]
    sizes = [imagej["spacing"], y[1] / y[0], x[1] / x[0]]
    names = ("zorigin", "yorigin", "xorigin")
    origin = None
    if any(name in imagej for name in names):
        places = [float(imagej.get(name, 0)) for name in names]
        origin = [-p * s for p, s in zip(places, sizes, strict=True)]
    notes = _notes(in_nm(sizes, known), f"spacing = {imagej['spacing']}", units)
    return measured(sizes, origin, known, notes)


def _notes(size: VoxelSize | None, stated: str, units: Sequence[Any]) -> tuple[str, ...]:
    """Return the note on a voxel size that is not known although the file states one."""
    if size is not None:
        return ()
    unknown = [unit for unit in units if nm_of(unit) is None]
    return (unknown_unit(unknown[0]) if unknown else no_size(stated),)
