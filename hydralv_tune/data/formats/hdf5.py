"""HDF5: datasets by name, compression of any registered kind, attributes as EM tools write them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from hydralv_tune.config.errors import VolumeError
from hydralv_tune.data.formats.interface import (
    DEFAULT_DATASET,
    Names,
    Stored,
    WritableArray,
    axis_letters,
    check_new_dataset,
    choose_dataset,
    unreadable,
)
from hydralv_tune.data.formats.location import Location
from hydralv_tune.data.voxel_size import Placement, in_nm, in_zyx, nm_of, placement_from

BUILT_IN_FILTERS = range(1, 7)
"""Deflate, shuffle, Fletcher, szip, nbit and scale-offset; others come as plug-ins."""


def open_stored(location: Location) -> Stored:
    """Open a dataset.

    Raises:
        VolumeError: There is none of that name, its axes contradict each other, or a part of it
            is missing. h5py raises what else it cannot read.
    """
    file = h5py.File(location.path, "r")
    try:
        if "ImarisDataSet" in file.attrs or "DataSetInfo" in file:
            raise VolumeError(
                f"{location}: an Imaris file, whose arrays are padded. Export it as TIFF or HDF5."
            )
        name = choose_dataset(location, _names(location, file))
        dataset, link = file[name], file.get(name, getlink=True)
        name = link.path if isinstance(link, h5py.SoftLink) else name
        _check_parts(location, dataset)
        _load_filters(location, dataset)
        axes, tagged = _axes(location, dataset)
        return Stored(
            array=dataset if dataset.shape is not None else np.empty(()),
            axes=axes,
            placement=_placement(dataset, axes, tagged),
            chunks=dataset.chunks,
            close=file.close,
            place=location.path / name.lstrip("/"),
        )
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
    """Give a compressed, chunked dataset to write to; other datasets of the file stay."""
    name = location.dataset or DEFAULT_DATASET
    with h5py.File(location.path, "a") as file:
        if name in file:
            del file[name]
        target = file.create_dataset(
            name,
            shape=shape,
            dtype=dtype,
            chunks=chunks,
            compression="gzip" if chunks else None,
            # Noise does not compress: a higher level costs seconds on probabilities for nothing.
            compression_opts=(1 if dtype.kind == "f" else 4) if chunks else None,
            shuffle=True if chunks and dtype.itemsize > 1 else None,
        )
        target.attrs.update(placement_attributes(placement))
        yield target


def check_dataset(location: Location) -> None:
    """Refuse to write to a name that stands for several datasets of an existing file.

    Raises:
        VolumeError: It is a group, or a part of it is a dataset.
    """
    try:
        with h5py.File(location.path, "r") as file:
            check_new_dataset(location, file.get, h5py.Group)
    except OSError as error:
        raise unreadable(location, error) from error


def placement_attributes(placement: Placement) -> dict[str, Any]:
    """Return a placement as attributes: our own names, and those that CREMI's readers look for."""
    attributes: dict[str, Any] = {}
    if placement.voxel_size_nm is not None:
        size = list(placement.voxel_size_nm)
        attributes |= {"voxel_size_nm": size, "resolution": size, "units": "nm"}
    if placement.origin_nm is not None:
        origin = list(placement.origin_nm)
        attributes |= {"origin_nm": origin, "offset": origin}
    return attributes


def _names(location: Location, file: h5py.File) -> list[str]:
    """Return the names of all datasets; of links that of the one that is meant, or of all alone.

    Raises:
        VolumeError: The link that is meant leads nowhere.
    """
    names: list[str] = []
    file.visititems(
        lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None
    )
    wanted = location.dataset or DEFAULT_DATASET
    for name in [wanted] if names else [*file]:
        link = file.get(name, getlink=True)
        if name in names or not isinstance(link, h5py.SoftLink | h5py.ExternalLink):
            continue
        try:
            item = file[name]
        except (KeyError, OSError) as error:
            place = getattr(link, "filename", link.path)
            raise VolumeError(
                f"{location}: its dataset '{name}' is a link to {place}, which is not there. Put "
                "it there, or name the file that holds the voxels."
            ) from error
        if isinstance(item, h5py.Dataset):
            names.append(name)
    return names


def _check_parts(location: Location, dataset: h5py.Dataset) -> None:
    """Refuse a virtual dataset of which a file is missing: HDF5 would fill it with zeros."""
    if not dataset.is_virtual:
        return
    for source in dataset.virtual_sources():
        file = Path(source.file_name)
        here = location.path if source.file_name == "." else location.path.parent / file
        if not (here.exists() or file.exists()):
            raise VolumeError(
                f"{location}: its voxels are in {source.file_name}, which is missing. Copy that "
                "file beside it, or name another."
            )


def _load_filters(location: Location, dataset: h5py.Dataset) -> None:
    """Register the compressions that HDF5 does not have itself, where a dataset needs one."""
    properties = dataset.id.get_create_plist()
    filters = [properties.get_filter(i) for i in range(properties.get_nfilters())]
    if all(code in BUILT_IN_FILTERS for code, *_ in filters):
        return
    # It adds its filters to HDF5 on import.
    import hdf5plugin  # noqa: F401

    for code, _, _, name in filters:
        if not h5py.h5z.filter_avail(code):
            raise VolumeError(
                f"{location}: it is compressed by HDF5 filter {code} "
                f"({name.decode(errors='replace') or 'no name'}), which is not known here. Save it "
                "with gzip: h5repack -f GZIP=4 IN.h5 OUT.h5 where the filter is known."
            )


def _axes(
    location: Location, dataset: h5py.Dataset
) -> tuple[Names | None, list[Mapping[str, Any]]]:
    """Return the axes by name, and the entries of vigra's `axistags` that ilastik writes."""
    tagged: list[Mapping[str, Any]] = []
    if "axistags" in dataset.attrs:
        text = dataset.attrs["axistags"]
        try:
            tagged = json.loads(text)["axes"]
            names = [entry["key"] for entry in tagged]
        except (ValueError, KeyError, TypeError) as error:
            raise VolumeError(
                f"{location}: its attribute axistags is not understood ({text!r:.80}). Remove it, "
                "or write it as vigra does."
            ) from error
    else:
        names = [dim.label for dim in dataset.dims] if dataset.shape else []
    axes = axis_letters(names)
    if axes is not None and len(axes) != len(dataset.shape or ()):
        raise VolumeError(
            f"{location}: its attribute axistags names {len(axes)} axes, but the shape is "
            f"{dataset.shape}. Correct the attribute."
        )
    return axes, tagged


def _placement(
    dataset: h5py.Dataset, axes: Names | None, tagged: list[Mapping[str, Any]]
) -> Placement:
    """Return what the dataset, or else a group that holds it, says of its placement."""
    notes: list[str] = []
    origin = bare_size = bare_origin = None
    node: Any = dataset
    while True:
        found = placement_from(node.attrs, axes)
        notes += found.notes
        origin = found.origin_nm if origin is None else origin
        bare_size, bare_origin = bare_size or found.bare_size, bare_origin or found.bare_origin
        if found.voxel_size_nm is not None:
            return Placement(found.voxel_size_nm, origin, tuple(notes))
        if node.name == "/":
            break
        node = node.parent
    spatial = [entry for entry in tagged if str(entry.get("key")).lower() in ("z", "y", "x")]
    sizes = [entry.get("resolution", 0) for entry in spatial]
    units = [nm_of(str(entry.get("description", "")).split(" ")[-1]) for entry in spatial]
    size = in_zyx(in_nm(sizes, units), axes)
    return Placement(size, origin, tuple(notes), None, bare_size, bare_origin)
