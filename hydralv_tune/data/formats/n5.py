"""N5: arrays by name or by path, their axes x, y, z as N5 counts them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hydralv_tune.config.errors import VolumeError
from hydralv_tune.data.formats.interface import UNNAMED, Names, Stored, axis_letters, choose_dataset
from hydralv_tune.data.formats.location import Location
from hydralv_tune.data.formats.tensors import Tensors, parents_of, read_mapping, store_of
from hydralv_tune.data.voxel_size import Placement, in_nm, measured, nm_of, no_size, unknown_unit

MARK = "attributes.json"
ARRAY_KEYS = ("dimensions", "blockSize", "dataType", "compression")


def open_stored(location: Location) -> Stored:
    """Open an array: the one that is named, the finest level of a pyramid, or the only one.

    Raises:
        VolumeError: There is none of that name, several are there, or the order of its axes is not
            understood. tensorstore raises what else it cannot read.
    """
    folder = location.url or location.path / (location.dataset or "")
    if "dataType" not in _attributes(folder):
        folder = _choose(location, folder)
    attributes = _attributes(folder)
    array = Tensors(*_specification(folder, attributes))
    axes = _axes(location, attributes, len(array.shape))
    try:
        placement = _placement(folder)
    except (TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
        raise VolumeError(
            f"{location}: what its attributes say of size and place is not understood "
            f"({type(error).__name__}: {str(error)[:80]}). Correct resolution, pixelResolution, "
            "transform, offset and downsamplingFactors in attributes.json."
        ) from error
    return Stored(array, axes, placement, array.chunks)


def _specification(folder: Path | str, attributes: Mapping[str, Any]) -> tuple[dict[str, Any], Any]:
    """Return what tensorstore needs of an array, and the context that holds it.

    It is given a copy of the attributes that make the array: of `units` and `resolution` it refuses
    other forms than its own.
    """
    import tensorstore

    context = tensorstore.Context()
    memory = tensorstore.KvStore.open({"driver": "memory"}, context=context).result()
    needed = {key: attributes[key] for key in ARRAY_KEYS if key in attributes}
    memory.write(MARK, json.dumps(needed)).result()
    layers = [
        {"base": store_of(folder)},
        {"exact": MARK, "base": {"driver": "memory", "path": MARK}},
    ]
    return {"driver": "n5", "kvstore": {"driver": "kvstack", "layers": layers}}, context


def _attributes(folder: Path | str) -> Mapping[str, Any]:
    """Return the attributes of a group or an array, here or at a URL; empty where it has none."""
    if isinstance(folder, str):
        return read_mapping(folder, MARK)
    file = folder / MARK
    content = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds no mapping")
    return content


def _choose(location: Location, folder: Path | str) -> Path | str:
    """Return the array that a group stands for: its level s0, `main`, or the only one."""
    if isinstance(folder, str):
        if "dataType" in _attributes(f"{folder}/s0"):
            return f"{folder}/s0"
        raise VolumeError(
            f"{location}: there is no array of N5, and what is elsewhere cannot be listed. Name an "
            f"array: {location.of('PATH')}"
        )
    if not folder.is_dir():
        choose_dataset(location, sorted(_arrays(location.path)))
    if "dataType" in _attributes(folder / "s0"):
        return folder / "s0"
    names = sorted(_arrays(location.path, folder))
    return location.path / choose_dataset(Location(location.path), names)


def _arrays(root: Path, folder: Path | None = None) -> Iterator[str]:
    """Yield the names of the arrays in a group; blocks of arrays are not looked into."""
    for inner in sorted((folder or root).iterdir()):
        if inner.is_dir():
            if "dataType" in _attributes(inner):
                yield inner.relative_to(root).as_posix()
            else:
                yield from _arrays(root, inner)


def _axes(location: Location, attributes: Mapping[str, Any], count: int) -> Names:
    """Return the axes in N5's order, x first; a list that ends with x is in the order of C."""
    transform = attributes.get("transform")
    named = attributes.get("axes", transform.get("axes") if isinstance(transform, dict) else None)
    letters = axis_letters(named) if isinstance(named, list) else None
    if letters is None:
        return (*"xyz", *[UNNAMED] * (count - 3))[:count]
    if letters[-1] == "x":
        letters = letters[::-1]
    if letters[0] != "x" or len(letters) != count:
        raise VolumeError(
            f"{location}: its axes are called {', '.join(letters)} for {count} axes, and x is "
            "neither the first nor the last, so their order is not known. Save them as x, y, z."
        )
    return letters


def _placement(folder: Path | str) -> Placement:
    """Return what an array, or else a group that holds it, says of its voxels.

    `downsamplingFactors` of a level multiply a `pixelResolution`, as in the n5-viewer, and whatever
    a group above states; a `resolution` of the level itself is its own, as Paintera writes it.
    """
    own = _attributes(folder)
    factors = np.asarray(own.get("downsamplingFactors", [1, 1, 1]), dtype=float)
    above = parents_of(folder) if isinstance(folder, str) else folder.parents
    for place in (folder, *above[:3]):
        attributes = _attributes(place)
        transform, pixel = attributes.get("transform"), attributes.get("pixelResolution")
        if isinstance(transform, dict) and {"axes", "scale"} <= set(transform):
            order = [list(map(str.lower, transform["axes"])).index(a) for a in "zyx"]
            units = transform.get("units", [None] * 3)
            offsets = transform.get("translate", [0, 0, 0])
            scale = transform["scale"]
            return _placed(*([values[i] for i in order] for values in (scale, offsets, units)))
        if pixel is not None:
            sizes, unit = (
                (pixel.get("dimensions"), pixel.get("unit", "um"))
                if isinstance(pixel, dict)
                else (pixel, "um")
            )
            values = np.asarray(sizes, dtype=float)[:3] * factors[:3]
            return _along_zyx(values, attributes.get("offset"), unit)
        if "resolution" in attributes:
            unit = attributes.get("units", attributes.get("unit", "nm"))
            factor = 1.0 if place == folder else factors[:3]
            values = np.asarray(attributes["resolution"], dtype=float)[:3] * factor
            return _along_zyx(values, attributes.get("offset"), unit)
    return Placement()


def _along_zyx(values: np.ndarray, offset: Any, units: Any) -> Placement:
    """Return the placement of sizes along x, y, z, of the offset beside them, and their units."""
    given = units if isinstance(units, list) and units else [units]
    one_each = given[:3] if len(given) >= 3 else given[:1] * 3
    origin = None if offset is None else list(offset)[:3][::-1]
    return _placed(values[::-1], origin, one_each[::-1])


def _placed(size: Any, origin: Any, units: Sequence[Any]) -> Placement:
    """Return the placement of lengths along z, y, x, with a note where the size is none."""
    known = [nm_of(unit) for unit in units]
    notes = [unknown_unit(u) for u, nm in zip(units, known, strict=True) if u and nm is None]
    if not notes and None not in known and in_nm(size, known) is None:
        notes = [no_size(f"sizes z, y, x = {np.asarray(size).tolist()}")]
    return measured(size, origin, known, notes[:1])
