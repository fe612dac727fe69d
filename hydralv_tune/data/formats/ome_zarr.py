"""OME-Zarr groups: axes, scales and translations of each level.

Pyramids are written as version 0.4, and into what is Zarr 3 already as 0.5.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from hydralv_tune.config.errors import VolumeError
from hydralv_tune.data.formats.interface import Names, WritableArray, axis_letters
from hydralv_tune.data.formats.location import Location
from hydralv_tune.data.voxel_size import Placement, measured, nm_of, unknown_unit

SMALLEST_LEVEL = 256
"""Voxels of the longest side of a pyramid's coarsest level."""
SLAB = 64
"""Sections of a level that are in memory while the next one is made."""
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
    scale, offset, is_placed = np.ones(len(axes)), np.zeros(len(axes)), False
    for transformation in (one for step in steps for one in step):
        kind = transformation.get("type")
        if kind == "identity":
            continue
        values = np.asarray(transformation.get(str(kind), ()), dtype=float)
        is_known = kind in ("scale", "translation") and values.shape == scale.shape
        if is_known and kind == "scale" and not ((values > 0) & np.isfinite(values)).all():
            raise VolumeError(
                f"{location}: its scale {values.tolist()} mirrors an axis or is no scale; only "
                "numbers above 0 are read. Save it with the axes in their own direction."
            )
        if not is_known or not np.isfinite(values).all():
            raise VolumeError(
                f"{location}: its coordinate transformation {dict(transformation)} is not "
                "understood; known are identity, scale and translation, with a number for each "
                "axis. Save it with one scale for each level."
            )
        if kind == "scale":
            scale, offset = scale * values, offset * values
        elif kind == "translation":
            offset, is_placed = offset + values, True
    if not any(steps):
        return Placement()
    space = [axes.index(axis) for axis in "zyx" if axis in axes]
    known = [nm_of(units[i]) for i in space]
    notes = [unknown_unit(units[i]) for i in space if units[i] and nm_of(units[i]) is None]
    return measured(scale[space], offset[space] if is_placed else None, known, notes[:1])


@contextmanager
def create_image(
    location: Location,
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    chunks: tuple[int, ...] | None,
    placement: Placement,
) -> Iterator[WritableArray]:
    """Give level 0 of a new image to write to; its pyramid and its metadata follow at the end.

    Integers of more than 8 bits are labels: each level takes every other voxel, and viewers are
    told so. With a dataset, `labels/NAME` becomes one of the labels of the image that is there.

    Args:
        location: `PATH.ome.zarr`, or a group in it.
        shape: (Z, Y, X), or channels first.
        dtype: Of the image.
        chunks: Of level 0; those of the others are the same.
        placement: Of its voxels; without a size, the scale is 1 and has no unit.
    """
    import zarr

    version = 3 if (location.path / "zarr.json").exists() else 2
    root = zarr.open_group(location.path, mode="a", zarr_format=version, use_consolidated=False)
    try:
        group = root.require_group(location.dataset) if location.dataset else root
    except TypeError as error:
        raise VolumeError(
            f"'{location.dataset}' is an array there, but an image of OME-Zarr is a group. Name "
            "another, for example labels/vesicles."
        ) from error
    options: dict[str, Any] = {"chunks": chunks or shape}
    if version == 2:
        options["chunk_key_encoding"] = {"name": "v2", "separator": "/"}
    else:
        options["dimension_names"] = list("czyx"[-len(shape) :])
    level = group.create_array("0", shape=shape, dtype=dtype, overwrite=True, **options)
    yield level
    size = placement.voxel_size_nm or (1.0, 1.0, 1.0)
    steps: list[tuple[int, ...]] = [(1, 1, 1)]
    number = 0
    while max(level.shape[-2:]) > SMALLEST_LEVEL:
        # Sections are thicker than pixels: z is halved once the pixels are as large.
        grown = [s * f for s, f in zip(size, steps[-1], strict=True)]
        step = (2 if grown[0] <= grown[2] else 1, 2, 2)
        number += 1
        level = _halved(group, level, str(number), step, options)
        steps.append(tuple(a * b for a, b in zip(steps[-1], step, strict=True)))
    is_label = np.dtype(dtype).kind in "iu" and (np.dtype(dtype).itemsize > 1 or location.dataset)
    image = _metadata(location, len(shape), placement, steps)
    _write_metadata(group, {"multiscales": [image]} | ({"image-label": {}} if is_label else {}))
    parent, _, name = (location.dataset or "").rpartition("/")
    if parent.rpartition("/")[2] == "labels":
        holder = root[parent]
        names = [*holder.attrs.get("ome", holder.attrs).get("labels", [])]
        _write_metadata(holder, {"labels": names if name in names else [*names, name]})


def _write_metadata(group: Any, metadata: Mapping[str, Any]) -> None:
    """Write what OME-Zarr says of a group: as 0.5 under one key, as 0.4 with a version in each."""
    if group.metadata.zarr_format == 3:
        group.attrs["ome"] = {"version": "0.5", **metadata}
        return
    version = {"version": "0.4"}
    images = [version | image for image in metadata.get("multiscales", [])]
    group.attrs.update(
        {**metadata}
        | ({"multiscales": images} if images else {})
        | ({"image-label": version} if "image-label" in metadata else {})
    )


def _halved(
    group: Any, level: Any, name: str, step: tuple[int, int, int], options: Mapping[str, Any]
) -> Any:
    """Write the next level, every other voxel of the one before, and return it."""
    z, y, x = step
    shape = (*level.shape[:-3], *(-(-n // s) for n, s in zip(level.shape[-3:], step, strict=True)))
    following = group.create_array(name, shape=shape, dtype=level.dtype, overwrite=True, **options)
    for start in range(0, shape[-3], SLAB):
        stop = min(start + SLAB, shape[-3])
        part = level[..., start * z : stop * z, :, :][..., ::z, ::y, ::x]
        following[..., start:stop, :, :] = part
    return following


def _metadata(
    location: Location, axes: int, placement: Placement, steps: list[tuple[int, ...]]
) -> dict[str, Any]:
    """Return the only image of `multiscales`."""
    known = placement.voxel_size_nm is not None
    unit = {"unit": "nanometer"} if known else {}
    named = [{"name": name, "type": "space", **unit} for name in "zyx"]
    if axes == 4:
        named.insert(0, {"name": "c", "type": "channel"})
    size, front = placement.voxel_size_nm or (1.0, 1.0, 1.0), [1.0] * (axes - 3)
    moved: list[dict[str, Any]] = []
    if placement.origin_nm is not None and known:
        origin = [0.0] * (axes - 3) + list(placement.origin_nm)
        moved = [{"type": "translation", "translation": origin}]
    datasets = [
        {
            "path": str(level),
            "coordinateTransformations": [
                {
                    "type": "scale",
                    "scale": front + [s * f for s, f in zip(size, step, strict=True)],
                },
                *moved,
            ],
        }
        for level, step in enumerate(steps)
    ]
    name = location.dataset or "image"
    return {"name": name, "axes": named, "datasets": datasets, "type": "nearest"}
