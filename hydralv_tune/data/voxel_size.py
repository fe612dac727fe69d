"""The size of a voxel and where a volume begins, in nanometres, whatever tool wrote them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

VoxelSize = tuple[float, float, float]
"""(z, y, x) in nm."""
Directions = tuple[int, int, int]
"""(z, y, x): 1 where voxels follow an axis of the world, -1 where they run against it."""

NM_OF_UNIT = {
    "pm": 1e-3,
    "picometer": 1e-3,
    "å": 0.1,
    "angstrom": 0.1,
    "ångström": 0.1,
    "nm": 1.0,
    "nanometer": 1.0,
    "um": 1e3,
    "µm": 1e3,
    "micron": 1e3,
    "micrometer": 1e3,
    "mm": 1e6,
    "millimeter": 1e6,
    "cm": 1e7,
    "centimeter": 1e7,
    "m": 1e9,
    "meter": 1e9,
}
"""Nanometres in a unit. What is not listed, pixels among them, is no known length."""


@dataclass(frozen=True)
class Placement:
    """What a file says of the place and the size of its voxels.

    Args:
        voxel_size_nm: (z, y, x); None where the file does not say.
        origin_nm: (z, y, x) of the first voxel; None where the file does not say.
        directions: How voxels run in the world; None where the file does not say.
        bare_size: The voxel size as a number, where its unit is no known length; else None.
        bare_origin: The same of the origin.
        notes: What the file says in a way that is not understood, one sentence each.
    """

    voxel_size_nm: VoxelSize | None = None
    origin_nm: VoxelSize | None = None
    notes: tuple[str, ...] = ()
    directions: Directions | None = None
    bare_size: VoxelSize | None = None
    bare_origin: VoxelSize | None = None


UNKNOWN = Placement()
"""Of a file that says nothing."""


def nm_of(unit: Any) -> float | None:
    """Return nanometres in a unit, or None where it is no known length.

    Args:
        unit: As files have it: text or bytes, in any case, in the plural, American or British.
    """
    if isinstance(unit, bytes):
        unit = unit.decode(errors="replace")
    # ImageJ writes the micro sign as the six characters \u00B5.
    name = str(unit).strip().lower().replace("\\u00b5", "µ").replace("μ", "µ")
    for spelling in (name, name.removesuffix("s")):
        if spelling.endswith("metre"):
            spelling = spelling[:-2] + "er"
        if spelling in NM_OF_UNIT:
            return NM_OF_UNIT[spelling]
    return None


def units_of(units: Any, count: int) -> list[float | None]:
    """Return nanometres in the unit of each axis; one unit stands for all."""
    if isinstance(units, np.ndarray):
        units = units.tolist()
    if not isinstance(units, list | tuple):
        units = [units] * count
    return [nm_of(unit) for unit in units]


def in_nm(values: Any, units: Sequence[float | None], *, positive: bool = True) -> VoxelSize | None:
    """Return three lengths in nanometres, or None where they are no such.

    Args:
        values: Of the last three axes; what stands before them is dropped.
        units: Nanometres in the unit of each of them, None where it is unknown.
        positive: Whether they must be above 0, as sizes are and offsets are not.
    """
    try:
        lengths = np.asarray(values, dtype=float).ravel()
    except (TypeError, ValueError):
        return None
    if not 3 <= lengths.size <= 5 or len(units) < 3 or None in units[-3:]:
        return None
    lengths = lengths[-3:] * np.asarray(units[-3:], dtype=float)
    if not np.isfinite(lengths).all() or (positive and (lengths <= 0).any()):
        return None
    # Twelve digits, so that 0.008 um reads as 8.0 nm.
    z, y, x = (float(f"{length:.12g}") for length in lengths)
    return z, y, x


def measured(
    size: Any,
    origin: Any,
    units: Sequence[float | None],
    notes: Sequence[str] = (),
    directions: Directions | None = None,
) -> Placement:
    """Return the placement of lengths in some units; bare numbers where one is not known.

    Args:
        size: Of a voxel along z, y, x; None where the file does not say.
        origin: The same of the first voxel.
        units: Nanometres in the unit of each axis, None where it is unknown.
        notes: As those of `Placement`.
        directions: As those of `Placement`.
    """
    known = None not in units
    scale = units if known else [1.0] * 3
    found = in_nm(size, scale), in_nm(origin, scale, positive=False)
    in_unit, bare = (found, (None, None)) if known else ((None, None), found)
    return Placement(*in_unit, tuple(notes), directions, *bare)


def placement_from(attributes: Mapping[str, Any], axes: Sequence[str] | None = None) -> Placement:
    """Return the placement that EM tools write as attributes of an array.

    `voxel_size_nm` and `origin_nm` are ours, `resolution` and `offset` with `units` those of CREMI
    and of Saalfeld's tools, in nanometres where no unit is given, `element_size_um` that of ilastik
    and of Fiji's HDF5 plug-ins.

    Args:
        attributes: Of the array, or of what holds it.
        axes: Of the array, where the file names them: the attributes are in their order.
    """
    given = attributes.get("units", attributes.get("unit", "nm"))
    units_given = units_of(given, 3)
    size = origin = None
    notes: list[str] = []
    for key, units in (
        ("voxel_size_nm", [1.0] * 3),
        ("resolution_nm", [1.0] * 3),
        ("element_size_um", [1e3] * 3),
        ("voxel_size", units_given),
        ("resolution", units_given),
    ):
        if key in attributes and size is None:
            size = in_nm(attributes[key], units)
            if None in units:
                notes.append(unknown_unit(given))
            elif size is None:
                notes.append(no_size(f"{key} = {attributes[key]}"))
    for key, units in (("origin_nm", [1.0] * 3), ("offset", units_given)):
        if key in attributes and origin is None:
            origin = in_nm(attributes[key], units, positive=False)
    bare = UNKNOWN
    if size is None and None in units_given:
        bare = measured(
            attributes.get("voxel_size", attributes.get("resolution")),
            attributes.get("offset"),
            units_given,
        )
    return Placement(
        in_zyx(size, axes),
        in_zyx(origin, axes),
        tuple(notes),
        bare_size=in_zyx(bare.bare_size, axes),
        bare_origin=in_zyx(bare.bare_origin, axes),
    )


def unknown_unit(unit: Any) -> str:
    """Return the note on a unit that is no known length."""
    return f"The unit {unit!r} is no known length, so the voxel size is taken as unknown."


def no_size(stated: str) -> str:
    """Return the note on a voxel size that is none, or not one of three axes.

    Args:
        stated: As the file has it.
    """
    shown = " ".join(stated.split())[:80]
    return f"It says {shown}: not three lengths above 0, so the voxel size is taken as unknown."


def in_zyx(lengths: VoxelSize | None, axes: Sequence[str] | None) -> VoxelSize | None:
    """Return three lengths that are in the order of an array's axes along z, y, x."""
    if lengths is None or axes is None:
        return lengths
    spatial = [axis for axis in axes if axis in "zyx"]
    if sorted(spatial) != ["x", "y", "z"]:
        return lengths
    z, y, x = (lengths[spatial.index(axis)] for axis in "zyx")
    return z, y, x
