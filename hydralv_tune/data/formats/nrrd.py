"""NRRD: axes by labels, kinds and directions; read whole, since its values are often packed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import nrrd
import numpy as np

from hydralv_tune.config.errors import VolumeError
from hydralv_tune.data.formats.interface import LETTERS, UNNAMED, Stored
from hydralv_tune.data.formats.location import Location
from hydralv_tune.data.voxel_size import Placement, measured, nm_of, unknown_unit

ERRORS = (nrrd.NRRDError,)
"""What pynrrd raises beside the usual errors."""
SPACE_KINDS = ("domain", "space", "none", "???", "")
KINDS = {"time": "t", "list": "c", "vector": "c", "scalar": "c", "stub": "c"}
BACKWARD = (("left", "lps", "las"), ("posterior", "lps"), ("inferior",))
"""Words of a space whose x, y, z run against those of NIfTI: right, anterior, superior."""
ALIGNED = 1e-3


def open_stored(location: Location) -> Stored:
    """Open an array of the file, or of the one that a detached header names.

    Raises:
        VolumeError: It lies askew in its space. pynrrd raises what else it cannot read.
    """
    array, header = nrrd.read(str(location.path), index_order="F")
    return Stored(array, *_axes_and_placement(location, array.ndim, header))


def _axes_and_placement(
    location: Location, count: int, header: Mapping[str, Any]
) -> tuple[tuple[str, ...], Placement]:
    """Return the axes in the order of the file, and the placement along z, y, x."""
    kinds = [str(kind or "").lower() for kind in header.get("kinds", ["domain"] * count)]
    labels = [str(label or "").lower() for label in header.get("labels", [""] * count)]
    directions = _directions(header.get("space directions"), count)
    rest = iter("xyz")
    axes = []
    for kind, label, direction in zip(kinds, labels, directions, strict=True):
        if direction is not None:
            next(rest, None)
            axes.append(_along(location, direction))
        elif label in LETTERS:
            axes.append(LETTERS[label])
        elif kind in SPACE_KINDS:
            axes.append(next(rest, UNNAMED))
        else:
            axes.append("s" if "color" in kind else KINDS.get(kind, kind))
    sizes = [
        float(np.linalg.norm(d)) if d is not None else s
        for d, s in zip(directions, header.get("spacings", [np.nan] * count), strict=True)
    ]
    units = header.get("space units", header.get("units"))
    unit = next((u for u in (units if units is not None else []) if u), None)
    nm = [nm_of(unit)] * 3
    by_axis = dict(zip(axes, sizes, strict=True))
    origin = header.get("space origin")
    space = str(header.get("space", "")).lower()
    turned = [-1 if any(word in space for word in words) else 1 for words in BACKWARD]
    forward = {
        axis: int(np.sign(direction["xyz".index(axis)])) * turned["xyz".index(axis)]
        for axis, direction in zip(axes, directions, strict=True)
        if direction is not None
    }
    if origin is not None and len(origin) == len(turned):
        origin = np.asarray(origin, float) * turned
    return tuple(axes), measured(
        [by_axis.get(axis, np.nan) for axis in "zyx"],
        None if origin is None else list(origin)[::-1],
        nm,
        () if unit is None or nm[0] is not None else (unknown_unit(unit),),
        (forward["z"], forward["y"], forward["x"]) if set(forward) == set("xyz") else None,
    )


def _directions(given: Any, count: int) -> list[np.ndarray | None]:
    """Return the direction of each axis in space, None for an axis that has none."""
    rows = [None] * count if given is None else list(given)
    return [
        None if row is None or np.isnan(np.asarray(row, float)).any() else np.asarray(row, float)
        for row in rows
    ]


def _along(location: Location, direction: np.ndarray) -> str:
    """Return the axis of space that a direction follows."""
    length = float(np.linalg.norm(direction))
    at = int(np.abs(direction).argmax())
    if length == 0 or abs(abs(direction[at]) / length - 1) > ALIGNED or at > 2:
        raise VolumeError(
            f"{location}: it lies askew in its space (direction {direction.tolist()}). Resample it "
            "along its axes."
        )
    return "xyz"[at]
