"""The metadata of OME-Zarr groups: axes, scales and translations of each level."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from hydralv_tune.config.errors import VolumeError
from hydralv_tune.data.formats.interface import Names, axis_letters
from hydralv_tune.data.voxel_size import Placement, in_nm, nm_of, unknown_unit

BEFORE_AXES = ("t", "c", "z", "y", "x")
"""Of the versions 0.1 and 0.2, which name none."""


@dataclass(frozen=True)
class Level:
    """One level of a pyramid.

    Args:
        path: Of its array, within the group.
        axes: A letter for each.
        placement: Of its voxels, along z, y, x.
    """

    path: str
    axes: Names
    placement: Placement


def levels_of(location: object, attributes: Mapping[str, Any]) -> list[Level]:
    """Return the levels of the image that a group holds, finest first; none where it is no image.

    Args:
        location: What messages call the group.
        attributes: Of the group.

    Raises:
        VolumeError: It holds several images, or what it says of axes and scales is not understood.
    """
    ome = attributes.get("ome", attributes)
    images = ome.get("multiscales") if isinstance(ome, Mapping) else None
    if not images:
        return []
    if len(images) > 1:
        names = [str(dict(image).get("name", "no name")) for image in images]
        paths = [str(image["datasets"][0]["path"]) for image in images]
        raise VolumeError(
            f"{location}: its multiscales hold {len(images)} images ({', '.join(names)}). Name "
            f"one, by the path of its array: {', '.join(paths)}."
        )
    return _levels(location, images[0])


def level_of(location: object, attributes: Mapping[str, Any], path: str) -> Level | None:
    """Return the level of a group that an array's path names, or None.

    Raises:
        VolumeError: What the group says of axes and scales is not understood.
    """
    ome = attributes.get("ome", attributes)
    images = ome.get("multiscales") if isinstance(ome, Mapping) else None
    for image in images or []:
        if any(str(dataset.get("path")) == path for dataset in image.get("datasets", [])):
            return next(level for level in _levels(location, image) if level.path == path)
    return None


def _levels(location: object, image: Mapping[str, Any]) -> list[Level]:
    """Return the levels of one image."""
    try:
        axes = image.get("axes", BEFORE_AXES)
        if "coordinateSystems" in image:
            raise VolumeError(
                f"{location}: its multiscales are in coordinate systems, as no version up to 0.5 "
                "of OME-Zarr has them. Save it in version 0.4 or 0.5."
            )
        named = [axis if isinstance(axis, Mapping) else {"name": axis} for axis in axes]
        names = axis_letters([axis["name"] for axis in named])
        if names is None:
            raise KeyError("axes")
        units = [axis.get("unit") for axis in named]
        whole = image.get("coordinateTransformations", [])
        return [
            Level(
                str(dataset["path"]),
                names,
                _placement(
                    location,
                    names,
                    units,
                    [dataset.get("coordinateTransformations", []), whole],
                ),
            )
            for dataset in image["datasets"]
        ]
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, VolumeError):
            raise
        raise VolumeError(
            f"{location}: its multiscales are not understood "
            f"({type(error).__name__}: {str(error)[:80]}). Write them as OME-Zarr 0.4 or 0.5 does."
        ) from error


def _placement(
    location: object, axes: Names, units: list[Any], steps: list[list[Mapping[str, Any]]]
) -> Placement:
    """Return the placement after the transformations of a level, then those of all levels."""
    scale, offset = np.ones(len(axes)), np.zeros(len(axes))
    for transformation in (one for step in steps for one in step):
        kind = transformation.get("type")
        values = np.asarray(transformation.get(str(kind), 1 if kind == "identity" else None), float)
        if kind not in ("identity", "scale", "translation") or values.shape not in (
            (),
            scale.shape,
        ):
            raise VolumeError(
                f"{location}: its coordinate transformation {dict(transformation)} is not "
                "understood; known are identity, scale and translation, with a number for each "
                "axis. Save it with one scale for each level."
            )
        if kind == "scale":
            scale, offset = scale * values, offset * values
        elif kind == "translation":
            offset = offset + values
    if not any(steps):
        return Placement()
    space = [axes.index(axis) for axis in "zyx" if axis in axes]
    known = [nm_of(units[i]) for i in space]
    notes = [unknown_unit(units[i]) for i in space if units[i] and nm_of(units[i]) is None]
    return Placement(
        in_nm(scale[space], known),
        in_nm(offset[space], known, positive=False) if offset.any() else None,
        tuple(notes[:1]),
    )
