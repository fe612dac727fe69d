"""Zarr 2 and 3: arrays by name, and the levels of OME-Zarr groups with their axes and scales."""

from __future__ import annotations

import asyncio
import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from hydralv_tune.config.errors import VolumeError
from hydralv_tune.data.formats.hdf5 import placement_attributes
from hydralv_tune.data.formats.interface import (
    Names,
    Stored,
    WritableArray,
    axis_letters,
    check_new_dataset,
    choose_dataset,
)
from hydralv_tune.data.formats.location import Location
from hydralv_tune.data.formats.ome_zarr import Level, create_image, level_of, levels_of
from hydralv_tune.data.formats.tensors import Tensors, parents_of, read_file, read_mapping, store_of
from hydralv_tune.data.voxel_size import Placement, placement_from

OME_SUFFIX = ".ome.zarr"
MARKS = ("zarr.json", ".zarray", ".zgroup")


def open_stored(location: Location) -> Stored:
    """Open an array: one that stands alone, one of a group, or level 0 of an OME-Zarr group.

    Raises:
        VolumeError: There is none of that name, several are there, or what its metadata say of
            axes and scales is not understood. zarr raises what else it cannot read.
    """
    root, inner = _root_of(location.path) if location.url is None else _root_at(location)
    node = _node(root)
    name = "/".join(part for part in (inner, location.dataset) if part)
    if isinstance(node, zarr.Array):
        if name:
            raise VolumeError(
                f"{location}: {root} is a single array without datasets. Name it alone."
            )
        return _stored(location, node, [node.attrs], None)
    group, name = _enter(location, node, name)
    level = None
    if not name:
        level = next(iter(levels_of(location, group.attrs)), None)
        name = level.path if level is not None else _choose(location, group)
    array = group[name]
    if not isinstance(array, zarr.Array):
        raise VolumeError(f"{location}: '{name}' is no array. Name one.")
    if level is None:
        level = _level_above(location, group, name)
    return _stored(location, array, [array.attrs, group.attrs, node.attrs], level)


class _MetadataAt(zarr.storage.MemoryStore):
    """The metadata of a Zarr elsewhere. Nothing is listed, since web servers have no lists.

    Args:
        url: Of its outermost group, or of its only array.
    """

    supports_listing = False

    def __init__(self, url: str) -> None:
        super().__init__(read_only=True)
        self.url = url

    async def get(self, key: str, prototype: Any, byte_range: Any = None) -> Any:
        """Return the content of a file, whole, or None where there is none."""
        content = await asyncio.to_thread(read_file, self.url, key)
        return None if content is None else prototype.buffer.from_bytes(content)


def _root_at(location: Location) -> tuple[_MetadataAt, str]:
    """Return the outermost Zarr group around a URL, and the name of the URL's end within it.

    Raises:
        VolumeError: There is no Zarr, or nobody answers.
    """
    url = root = str(location.url)
    if not any(read_mapping(url, mark) for mark in MARKS):
        raise VolumeError(
            f"{location}: there is no Zarr ({', '.join(MARKS)}), or it is not public. Check the "
            "address."
        )
    for parent in parents_of(url):
        if not any(read_mapping(parent, mark) for mark in MARKS):
            break
        root = parent
    return _MetadataAt(root), url[len(root) + 1 :]


@contextmanager
def create(
    location: Location,
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    chunks: tuple[int, ...] | None,
    placement: Placement,
) -> Iterator[WritableArray]:
    """Give an array to write to, alone or in a group whose other arrays stay.

    Consolidated metadata, where a group around it has some, are those of the new content.
    """
    around = list(_around(location))
    consolidated = [group for group in around if _is_consolidated(group)]
    write = create_image if _writes_image(location) else _create_plain
    with write(location, shape, dtype, chunks, placement) as target:
        yield target
    for group in consolidated:
        with warnings.catch_warnings():
            # That format 3 does not specify them; they were there before.
            warnings.filterwarnings("ignore", message="Consolidated metadata is currently not")
            zarr.consolidate_metadata(group)


@contextmanager
def _create_plain(
    location: Location,
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    chunks: tuple[int, ...] | None,
    placement: Placement,
) -> Iterator[WritableArray]:
    """Give a single array to write to."""
    options = {
        "shape": shape,
        "dtype": dtype,
        "chunks": chunks or "auto",
        "dimension_names": {3: list("zyx"), 4: list("czyx")}.get(len(shape)),
        "attributes": placement_attributes(placement),
    }
    if location.dataset is None:
        yield zarr.create_array(location.path, **options)
    else:
        group = zarr.open_group(location.path, mode="a", use_consolidated=False)
        if group.metadata.zarr_format == 2:
            del options["dimension_names"]
        yield group.create_array(location.dataset, overwrite=True, **options)


def check_dataset(location: Location) -> None:
    """Refuse to write to a name that stands for several arrays of an existing group.

    An image of an OME-Zarr, a group of its levels, is replaced as one.

    Raises:
        VolumeError: It is another group, an array where an image is written, or leads through one.
    """
    root = _node(location.path)
    if isinstance(root, zarr.Array):
        raise VolumeError(f"{location.path}: a single array, which holds no other. Name it alone.")
    node = root.get(location.dataset)
    if _writes_image(location):
        if isinstance(node, zarr.Array):
            raise VolumeError(
                f"{location}: an array, but an image of OME-Zarr is a group. Name another, for "
                "example labels/vesicles."
            )
        if isinstance(node, zarr.Group) and levels_of(location, node.attrs):
            return
    check_new_dataset(location, root.get, zarr.Group)


def _writes_image(location: Location) -> bool:
    """Return whether an image of OME-Zarr is written there, rather than a single array."""
    return location.path.name.endswith(OME_SUFFIX) or _is_label(location)


def _around(location: Location) -> Iterator[Path]:
    """Yield the folder of a container, and those of its groups down to a dataset."""
    yield (folder := location.path)
    for part in (location.dataset or "").split("/"):
        yield (folder := folder / part)


def _is_consolidated(group: Path) -> bool:
    """Return whether a folder is a group that repeats the metadata of what is in it."""
    own = group / "zarr.json"
    return (group / ".zmetadata").exists() or (
        own.exists() and bool(json.loads(own.read_bytes()).get("consolidated_metadata"))
    )


def _is_label(location: Location) -> bool:
    """Return whether a dataset is to be one of the labels of an image that is there."""
    image, labels, _ = f"/{location.dataset}".rpartition("/labels/")
    folder = location.path / image.strip("/")
    if not labels or not any((folder / mark).exists() for mark in MARKS):
        return False
    attributes = _node(folder).attrs
    return "multiscales" in attributes.get("ome", attributes)


def _node(root: Any, name: str = "") -> Any:
    """Return an array or a group as it is: what its consolidated metadata repeat may be stale."""
    return zarr.open(root, path=name, mode="r", use_consolidated=False)


def _root_of(path: Path) -> tuple[Path, str]:
    """Return the outermost Zarr group around a path, and the name of the path within it."""
    root = path
    for parent in path.absolute().parents:
        if not any((parent / mark).exists() for mark in MARKS):
            break
        root = parent
    inner = "" if root is path else path.absolute().relative_to(root).as_posix()
    return root, inner


def _enter(location: Location, root: Any, name: str) -> tuple[Any, str]:
    """Return the group that a name leads to and an empty name, or the root and an array's name."""
    if not name or name not in root:
        if name:
            choose_dataset(location, [*_arrays(root)])
        return root, name
    node = _node(root.store_path, name)
    return (node, "") if isinstance(node, zarr.Group) else (root, name)


def _arrays(group: Any) -> list[str]:
    """Return the names of all arrays in a group, those of its groups too."""
    if group.metadata.consolidated_metadata is not None:
        members = group.members(max_depth=None)
        return sorted(name for name, item in members if isinstance(item, zarr.Array))
    names: list[str] = []
    for name, item in group.members():
        is_array = isinstance(item, zarr.Array)
        inner = [] if is_array else _arrays(_node(item.store_path))
        names += [name] if is_array else [f"{name}/{one}" for one in inner]
    return sorted(names)


def _choose(location: Location, group: Any) -> str:
    """Return the array that a group without levels of its own stands for."""
    if location.url is not None:
        group = zarr.open_group(group.store_path, mode="r")
        if group.metadata.consolidated_metadata is None:
            raise VolumeError(
                f"{location}: a group, and what is elsewhere cannot be listed. Name an array: "
                f"{location.of('PATH')}"
            )
    if "plate" in group.attrs.get("ome", group.attrs):
        raise VolumeError(
            f"{location}: a plate of many images. Name one, for example {location.of('A/1/0')}."
        )
    images = [
        f"{name}/{level.path}"
        for name, item in group.groups()
        if "labels" not in name
        for level in levels_of(location, item.attrs)[:1]
    ]
    # A group of one image, as bioformats2raw writes it, stands for that one.
    return choose_dataset(replace(location, dataset=None), images or _arrays(group))


def _level_above(location: Location, root: Any, name: str) -> Level | None:
    """Return what the groups around an array say of it as a level of theirs."""
    parts = name.split("/")
    for depth in range(len(parts) - 1, -1, -1):
        group = root["/".join(parts[:depth])] if depth else root
        level = level_of(location, group.attrs, "/".join(parts[depth:]))
        if level is not None:
            return level
    return None


def _stored(
    location: Location, array: Any, attributes: list[Mapping[str, Any]], level: Level | None
) -> Stored:
    """Return an opened array with the axes and the placement that its metadata give."""
    chunks = tuple(array.chunks)
    if location.url is None:
        values, place = array, Path(array.store_path.store.root) / array.path
    else:
        driver = "zarr3" if array.metadata.zarr_format == 3 else "zarr"
        url = "/".join(part for part in (array.store.url, array.path) if part)
        values, place = Tensors({"driver": driver, "kvstore": store_of(url)}), None
    if level is not None:
        return Stored(values, level.axes, level.placement, chunks, place=place)
    axes = _own_axes(array)
    placement = Placement()
    for mapping in attributes:
        found = placement_from(dict(mapping), axes)
        placement = Placement(
            placement.voxel_size_nm or found.voxel_size_nm,
            placement.origin_nm or found.origin_nm,
            tuple(dict.fromkeys(placement.notes + found.notes)),
            None,
            placement.bare_size or found.bare_size,
            placement.bare_origin or found.bare_origin,
        )
    return Stored(values, axes, placement, chunks, place=place)


def _own_axes(array: Any) -> Names | None:
    """Return the axes that an array names itself: in format 3, or as xarray does."""
    names = getattr(array.metadata, "dimension_names", None)
    names = names or array.attrs.get("_ARRAY_DIMENSIONS")
    return axis_letters(names) if isinstance(names, list | tuple) else None
