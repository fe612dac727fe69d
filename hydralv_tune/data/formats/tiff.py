"""TIFF stacks: truncated ones are an error, and the voxel size goes where Fiji looks for it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import tifffile

from hydralv_tune.data.voxel_size import VoxelSize, nm_of, three_positive


def read_tiff(path: Path) -> tuple[np.ndarray, VoxelSize | None]:
    """Return a stack and its voxel size: mapped where its pages are contiguous, read where not.

    Raises:
        EOFError: Pages or voxels are missing. tifffile raises what else it cannot read.
    """
    with _logged_errors_raised(), tifffile.TiffFile(path) as file:
        series = file.series[0]
        size = _voxel_size(file)
        contiguous = series.dataoffset is not None and series.dtype.isnative
        if contiguous and series.dataoffset + series.nbytes > file.filehandle.size:
            raise EOFError("voxels are missing at its end")
        array = None if contiguous else series.asarray()
    return (tifffile.memmap(path, mode="r") if array is None else array), size


def write_tiff(path: Path, array: np.ndarray, voxel_size_nm: VoxelSize | None) -> None:
    """Write a TIFF stack: as ImageJ reads it where it can, so that Fiji knows the voxel size."""
    imagej = array.ndim == 3 and array.dtype in (np.uint8, np.uint16, np.float32)
    if imagej:
        metadata: dict[str, Any] = {"axes": "ZYX"}
        resolution = None
        if voxel_size_nm is not None:
            z, y, x = voxel_size_nm
            metadata |= {"spacing": z, "unit": "nm"}
            resolution = (1 / x, 1 / y)
        tifffile.imwrite(path, array, imagej=True, resolution=resolution, metadata=metadata)
        return
    metadata = {"voxel_size_nm": list(voxel_size_nm)} if voxel_size_nm is not None else {}
    tifffile.imwrite(path, array, metadata=metadata, photometric="minisblack")


class _Complaints(logging.Handler):
    """Keeps the errors that a library logs instead of raising."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a message."""
        self.found.append(record.getMessage())


@contextmanager
def _logged_errors_raised() -> Iterator[None]:
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


def _voxel_size(file: tifffile.TiffFile) -> VoxelSize | None:
    """Return the voxel size of our own, ImageJ or OME metadata."""
    shaped = file.shaped_metadata
    if shaped and "voxel_size_nm" in shaped[0]:
        return three_positive(shaped[0]["voxel_size_nm"], 1.0)
    if file.is_ome and file.ome_metadata:
        pixels = tifffile.xml2dict(file.ome_metadata).get("OME", {}).get("Image", {})
        pixels = pixels[0] if isinstance(pixels, list) else pixels
        pixels = pixels.get("Pixels", {})
        sizes = [
            float(pixels[f"PhysicalSize{axis}"])
            * nm_of(pixels.get(f"PhysicalSize{axis}Unit", "um"))
            for axis in "ZYX"
            if f"PhysicalSize{axis}" in pixels
        ]
        return three_positive(sizes, 1.0)
    imagej = file.imagej_metadata
    if imagej and "spacing" in imagej:
        tags = file.pages.first.tags
        if "XResolution" not in tags or "YResolution" not in tags:
            return None
        x, y = (tags[name].value for name in ("XResolution", "YResolution"))
        if not x[0] or not y[0]:
            return None
        unit = nm_of(imagej.get("unit", "nm"))
        return three_positive([imagej["spacing"], y[1] / y[0], x[1] / x[0]], unit)
    return None
