"""The voxel size that a file states, in nanometres, whatever tool wrote it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

NM_OF_UNIT = {
    "nm": 1.0,
    "nanometer": 1.0,
    "nanometers": 1.0,
    "nanometre": 1.0,
    "um": 1e3,
    "µm": 1e3,
    "μm": 1e3,
    "\\u00b5m": 1e3,
    "micron": 1e3,
    "microns": 1e3,
    "micrometer": 1e3,
    "micrometre": 1e3,
    "mm": 1e6,
    "millimeter": 1e6,
    "å": 0.1,
    "angstrom": 0.1,
}
VoxelSize = tuple[float, float, float]


def voxel_size_from(attributes: Mapping[str, Any], array_name: str = "") -> VoxelSize | None:
    """Return the voxel size in nanometres from the attributes that EM tools write.

    `voxel_size_nm` is ours, `resolution` with `units` that of CREMI and of Saalfeld's tools,
    `element_size_um` that of ilastik and Fiji's HDF5 plug-ins, `multiscales` that of OME-NGFF.
    """
    unit = attributes.get("units", attributes.get("unit", "nm"))
    for key, nm in (
        ("voxel_size_nm", 1.0),
        ("resolution_nm", 1.0),
        ("element_size_um", 1e3),
        ("voxel_size", nm_of(unit)),
        ("resolution", nm_of(unit)),
    ):
        if key in attributes:
            size = three_positive(attributes[key], nm)
            if size is not None:
                return size
    return _ngff_voxel_size(attributes, array_name)


def nm_of(unit: Any) -> float:
    """Return nanometres in a unit; one name, or a list with one for each axis."""
    if isinstance(unit, bytes):
        unit = unit.decode(errors="replace")
    if isinstance(unit, list | tuple | np.ndarray):
        unit = unit[0] if len(unit) else "nm"
    return NM_OF_UNIT.get(str(unit).strip().lower(), 1.0)


def three_positive(values: Any, factor: float) -> VoxelSize | None:
    """Return three positive finite numbers, or None where there are others."""
    try:
        size = np.asarray(values, dtype=float).ravel() * factor
    except (TypeError, ValueError):
        return None
    if size.size == 4:
        size = size[1:]
    if size.size != 3 or not np.isfinite(size).all() or (size <= 0).any():
        return None
    # Twelve digits, so that 0.008 um reads as 8.0 nm.
    z, y, x = (float(f"{value:.12g}") for value in size)
    return z, y, x


def _ngff_voxel_size(attributes: Mapping[str, Any], array_name: str) -> VoxelSize | None:
    """Return the voxel size of OME-NGFF `multiscales` for one of its arrays."""
    ome = attributes.get("ome", attributes)
    try:
        scales = ome["multiscales"][0]
        axes = scales["axes"]
        space = [i for i, axis in enumerate(axes) if axis.get("type") == "space"]
        for level in scales["datasets"]:
            if level["path"] == array_name:
                scale = level["coordinateTransformations"][0]["scale"]
                unit = axes[space[0]].get("unit", "nanometer")
                return three_positive([scale[i] for i in space], nm_of(unit))
    except (KeyError, IndexError, TypeError, AttributeError):
        return None
    return None
