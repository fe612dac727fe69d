"""What a volume must be: image, labels and mask that fit each other, checked once at the edge.

The file formats themselves are in `formats/`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from hydralv_tune.config.errors import VolumeError
from hydralv_tune.data.formats import suffix_of
from hydralv_tune.data.formats.files import (
    LazyArray,
    locate,
    open_lazy,
    open_mask,
    read_array,
    read_voxel_size_nm,
    write_array,
)
from hydralv_tune.data.formats.interface import on_voxels_of
from hydralv_tune.data.truth import (
    ANNOTATED_NOTE,
    annotated_sections,
    known_labels,
    tissue_of,
)
from hydralv_tune.data.volume_paths import NO_MASK, VolumePaths, pairs, volume_paths
from hydralv_tune.data.voxel_size import Placement, VoxelSize
from hydralv_tune.numerics.metrics.contingency import split_unknown
from hydralv_tune.numerics.normalisation import Normalisation

__all__ = [
    "NO_MASK",
    "Box",
    "Sections",
    "Volume",
    "VolumePaths",
    "Windowed",
    "agreed_placement",
    "check_heads",
    "check_scorable",
    "check_volume",
    "first_voxel_size",
    "open_lazy",
    "open_mask",
    "pairs",
    "placement_of",
    "read_array",
    "read_labels",
    "read_mask",
    "read_probabilities",
    "read_volume",
    "read_voxel_size_nm",
    "volume_paths",
    "windowed",
    "write_array",
]

Box = tuple[slice, slice, slice]
UNIT_SIZE = (1.0, 1.0, 1.0)
"""The voxel size that tools write where they know none."""
SAME_SIZE = 0.01
"""Relative difference up to which two voxel sizes are the same, rounded differently."""


class Sections(Protocol):
    """An array (Z, Y, X) in memory or on disk, read section by section."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> np.dtype[Any]: ...
    def __iter__(self) -> Iterator[Any]: ...


@dataclass(frozen=True)
class Windowed:
    """A part of an array that stays where it is until it is sliced.

    Args:
        array: Anything with `shape`, `dtype` and slices: an open file, or an array.
        window: Of the array, (z, y, x).
    """

    array: Any
    window: Box

    @property
    def shape(self) -> tuple[int, int, int]:
        """Return the shape of the part."""
        z, y, x = (s.stop - s.start for s in self.window)
        return z, y, x

    @property
    def dtype(self) -> np.dtype[Any]:
        """Return the type of its file."""
        return np.dtype(self.array.dtype)

    @property
    def size(self) -> int:
        """Return the number of its voxels."""
        return int(np.prod(self.shape))

    def read(self, box: Box) -> np.ndarray:
        """Return a box of the part, in memory."""
        where = tuple(
            slice(own.start + s.start, own.start + s.stop)
            for own, s in zip(self.window, box, strict=True)
        )
        return np.asarray(self.array[where])

    def cut(self, box: Box) -> Windowed:
        """Return a smaller part, unread. Ends that are None are those of this part."""
        ends = [
            (own.start + (s.start or 0), own.start + (side if s.stop is None else s.stop))
            for own, s, side in zip(self.window, box, self.shape, strict=True)
        ]
        z, y, x = (slice(a, b) for a, b in ends)
        return replace(self, window=(z, y, x))

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator[np.ndarray]:
        """Yield the sections, one in memory at a time."""
        _, height, width = self.shape
        for z in range(len(self)):
            yield self.read((slice(z, z + 1), slice(0, height), slice(0, width)))[0]


def windowed(array: Any) -> Windowed:
    """Return a whole array as a part of itself."""
    if isinstance(array, Windowed):
        return array
    z, y, x = (slice(0, int(side)) for side in array.shape)
    return Windowed(array, (z, y, x))


@dataclass(frozen=True)
class Volume:
    """One volume in memory, already checked.

    Args:
        name: What messages call it.
        image: (Z, Y, X) in the dtype of its file.
        label: (Z, Y, X) integer instance ids, 0 is background; None where there is no truth.
        mask: (Z, Y, X) bool, True where there is tissue, to which decoding is confined; None
            where that is everywhere.
        scored_mask: (Z, Y, X) bool, True where the truth is known; None where the mask is.
        voxel_size_nm: Size of a voxel along z, y, x; None where the file does not say.
        normalisation: How its sections are normalised, fitted on the whole volume where this is a
            part of one; None until a candidate says how.
        origin_nm: Where its first voxel lies along z, y, x; None where the file does not say.
        label_ids: The ids that labels 1, 2, … have in the file, where they are too large for
            int32; None where labels are those of the file.
        note: A sentence on how the masks were taken, else None.
    """

    name: str
    image: np.ndarray
    label: np.ndarray | None = None
    mask: np.ndarray | None = None
    voxel_size_nm: tuple[float, float, float] | None = None
    normalisation: Normalisation | None = None
    scored_mask: np.ndarray | None = None
    origin_nm: tuple[float, float, float] | None = None
    label_ids: np.ndarray | None = None
    note: str | None = None

    @property
    def where_scored(self) -> np.ndarray | None:
        """Return where losses and scores are taken: (Z, Y, X) bool, or None for everywhere."""
        return self.mask if self.scored_mask is None else self.scored_mask

    def id_in_file(self, label: int) -> int:
        """Return the id that a label of this volume has in its file."""
        return label if self.label_ids is None else int(self.label_ids[label - 1])

    def fingerprint(self) -> str:
        """Return 16 hex digits of a SHA-256 over shape, dtype and content of the arrays.

        The dtype counts, since normalisation sees it; the name and the path do not, nor does the
        type of a mask, which is boolean in memory and anything on disk.
        """
        digest = hashlib.sha256()
        arrays = {"image": self.image, "label": self.label, "mask": self.where_scored}
        if self.scored_mask is not None and self.mask is not None:
            arrays["tissue"] = self.mask
        for kind, array in arrays.items():
            digest.update(kind.encode())
            if array is None:
                continue
            is_mask = kind in ("mask", "tissue")
            dtype = np.dtype(bool) if is_mask else array.dtype
            digest.update(f"{array.shape}{dtype.str}".encode())
            for section in array:
                values = section > 0 if is_mask else section
                digest.update(np.ascontiguousarray(values).data)
        return digest.hexdigest()[:16]


def read_volume(paths: VolumePaths) -> Volume:
    """Return a volume whose image, labels and mask fit each other.

    Raises:
        VolumeError: A file cannot be read, or its content breaks a rule; the message names the
            file, the value, the rule and the next step.
    """
    image = read_array(paths.image, ndim=3)
    label = None if paths.label is None else read_array(paths.label, ndim=3)
    mask, scored = (
        None if path is None else _read_on(path, image.shape)
        for path in (paths.mask, paths.scored_mask)
    )
    check_volume(paths, image, label, mask, scored)
    unknown = ids = None
    if label is not None:
        label, unknown, ids = known_labels(label, paths.ignore_labels)
    tissue = None if mask is None else mask > 0
    known = None if scored is None else scored > 0
    note = None
    if tissue is not None and known is None and annotated_sections(tissue.any(axis=(1, 2))):
        tissue, known, note = tissue_of(tissue), tissue, ANNOTATED_NOTE
    if known is not None and tissue is not None:
        known = known & tissue
    if unknown is not None:
        before = tissue if known is None else known
        known = ~unknown if before is None else before & ~unknown
    size, origin = placement_of(paths)
    volume = Volume(
        name=paths.name,
        image=image,
        label=label,
        mask=tissue,
        voxel_size_nm=size,
        origin_nm=origin,
        scored_mask=known,
        label_ids=ids,
        note=note,
    )
    check_truth(paths, label, volume.where_scored)
    return volume


def check_volume(
    paths: VolumePaths, image: Sections, label: Sections | None, mask: Sections | None,
    scored: Sections | None = None,
) -> list[bool] | None:  # fmt: skip
    """Refuse a volume that breaks a rule; of one on disk, a section is in memory at a time.

    Args:
        paths: What messages name.
        image: (Z, Y, X).
        label: The same of the instance labels, where the paths name any.
        mask: The same of the tissue mask.
        scored: The same of where the truth is known.

    Returns:
        Whether each section of the mask holds a voxel that counts; None without a mask.

    Raises:
        VolumeError: As for `read_volume`.
    """
    _check_image(paths.image, image)
    if label is not None:
        assert paths.label is not None, "it was read from there"
        _check_shape(paths.label, "label", label.shape, paths.image, image.shape)
        if _check_labels(paths.label, label, paths.ignore_labels) == 0:
            raise VolumeError(
                f"{paths.label}: the label has no labelled voxel; there is nothing to learn from. "
                "Check the path and the dataset, or drop the volume."
            )
    occupied: dict[str, list[bool]] = {}
    for kind, path, array in (
        ("mask", paths.mask, mask), ("scored mask", paths.scored_mask, scored),
    ):  # fmt: skip
        if array is not None:
            assert path is not None, "it was read from there"
            _check_shape(path, kind, array.shape, paths.image, image.shape)
            occupied[kind] = occupied_sections(path, array)
    return occupied.get("mask")


def check_truth(paths: VolumePaths, label: Sections | None, inside: Sections | None) -> None:
    """Refuse a volume without a labelled voxel where it is scored.

    Args:
        paths: What messages name.
        label: (Z, Y, X), 0 where nothing is known.
        inside: (Z, Y, X), above 0 where it is scored, or None.

    Raises:
        VolumeError: There is none.
    """
    if label is None:
        return
    places = [None] * label.shape[0] if inside is None else inside
    if any(
        ((ids > 0) if valid is None else (ids > 0) & (valid > 0)).any()
        for ids, valid in zip(label, places, strict=True)
    ):
        return
    raise _no_truth(paths)


def _no_truth(paths: VolumePaths) -> VolumeError:
    """Return the error for a volume without a labelled voxel where it is scored."""
    where = " and ".join(path for path in (paths.mask, paths.scored_mask) if path is not None)
    place = f"inside the mask {where}" if where else "that is not ignored"
    return VolumeError(
        f"{paths.label}: the label has no labelled voxel {place}, so adapted Rand error is "
        "undefined. Check that both belong to this volume, or drop it."
    )


def check_scorable(paths: VolumePaths) -> None:
    """Refuse labels on disk that nothing can be scored against, a few sections in memory at once.

    Args:
        paths: With a label.

    Raises:
        VolumeError: They are no instance ids, or none of them lies where it is scored.
    """
    assert paths.label is not None
    with ExitStack() as stack:
        label = stack.enter_context(open_lazy(paths.label, ndim=3))
        masks = [
            stack.enter_context(open_mask(path, label.shape))
            for path in (paths.mask, paths.scored_mask)
            if path is not None
        ]
        _check_labels(paths.label, label, paths.ignore_labels)
        for ids, *valid in zip(label, *masks, strict=True):
            known = (ids > 0) & ~np.isin(ids, paths.ignore_labels)
            for inside in valid:
                known &= inside > 0
            if known.any():
                return
    raise _no_truth(paths)


def read_labels(path: str | Path, ignore: Collection[int] = ()) -> np.ndarray:
    """Return instance labels (Z, Y, X) in the integer dtype of their file.

    Labels without any instance are returned as they are: a prediction may be empty.

    Args:
        path: File, or `file:dataset`.
        ignore: Ids that mean "no label"; they are returned too.

    Raises:
        VolumeError: They cannot be read, are not 3-D, not integers, or negative and not ignored.
    """
    labels = read_array(path, ndim=3)
    _check_labels(path, labels, ignore)
    return labels


def narrowed(path: str | Path, labels: np.ndarray) -> np.ndarray:
    """Return labels in the type to write them in: in a TIFF, 16 bits where they suffice.

    ImageJ and Fiji open no integers of more than 16 bits as such.

    Args:
        path: Where they go.
        labels: Integers from 0.
    """
    if suffix_of(locate(path).path) not in (".tif", ".tiff"):
        return labels
    fits = int(labels.max(initial=0)) <= np.iinfo(np.uint16).max
    return labels.astype(np.uint16 if fits else np.uint32)


def _check_labels(path: str | Path, labels: Sections, ignore: Collection[int] = ()) -> int:
    """Refuse labels that are no instance ids, and return the largest id."""
    kind = labels.dtype.kind
    if kind == "f":
        whole = all(np.isfinite(ids).all() and (ids == np.round(ids)).all() for ids in labels)
        hint = (
            "All values are whole numbers: save them as integers, labels.astype('uint16')."
            if whole
            else "Are these probabilities or an image? Give the instance labels."
        )
        raise VolumeError(
            f"{path}: the labels have dtype {labels.dtype}, but instance ids must be integers. "
            f"{hint}"
        )
    if kind == "b":
        raise VolumeError(
            f"{path}: the labels have dtype bool, which cannot tell one instance from another; "
            "ids must be integers. Number the components, for example with scipy.ndimage.label."
        )
    smallest = largest = negative = 0
    for ids in labels:
        if kind == "i" and int(ids.min()) < 0:
            below = ids[(ids < 0) & ~np.isin(ids, [one for one in ignore if one < 0])]
            negative += below.size
            smallest = min(smallest, int(below.min(initial=0)))
        known, _ = split_unknown(np.maximum(ids, ids.dtype.type(0)), "label", ignore)
        largest = max(largest, int(known.max()))
    if negative:
        raise VolumeError(
            f"{path}: {negative} labels are negative (smallest {smallest}), but 0 is "
            f"background and ids are positive. If {smallest} means 'no label', say so with "
            f"--ignore-label {smallest}."
        )
    return largest


def _read_on(path: str | Path, shape: Sequence[int]) -> np.ndarray:
    """Return a mask in the dtype of its file, on the voxels of an image of that shape."""
    with open_mask(path, shape) as lazy:
        return lazy[...]


def read_mask(path: str | Path, shape: Sequence[int] | None = None) -> np.ndarray:
    """Return a valid mask (Z, Y, X) as booleans, True where the file is above 0.

    Args:
        path: File, or `file:dataset`.
        shape: Of its image, onto whose voxels a mask of lower resolution is enlarged; None leaves
            it as it is.

    Raises:
        VolumeError: It cannot be read, is not 3-D, holds NaN, or has no valid voxel.
    """
    values = read_array(path, ndim=3) if shape is None else _read_on(path, shape)
    occupied_sections(path, values)
    mask: np.ndarray = values > 0
    return mask


def occupied_sections(path: str | Path, mask: Sections) -> list[bool]:
    """Return whether each section of a mask holds a voxel that counts, one above 0.

    Args:
        path: What messages name.
        mask: (Z, Y, X), in memory or on disk.

    Raises:
        VolumeError: It holds NaN or infinity, or no voxel counts.
    """
    _refuse_not_finite(path, "mask", mask)
    occupied = [bool((section > 0).any()) for section in mask]
    if not any(occupied):
        raise VolumeError(
            f"{path}: the mask has no voxel above 0, so nothing would count. Check the path, or "
            "leave the mask out to use the whole volume."
        )
    return occupied


def read_probabilities(path: str | Path) -> np.ndarray:
    """Return probabilities (3, Z, Y, X): binary, boundary, distance; float16 or float32.

    The range is checked by the decoder, which knows what each channel may hold.

    Raises:
        VolumeError: They cannot be read, are not 4-D with 3 channels, not floats, or not finite.
    """
    with open_lazy(path) as lazy:
        shape, named = lazy.shape, lazy.axes is not None
    if not named and (len(shape) != 4 or shape[0] != 3):
        raise VolumeError(
            f"{path}: shape {shape}, but probabilities have 3 channels, binary, boundary and "
            f"distance, in (3, Z, Y, X). {_hint_on_channels(shape)}"
        )
    maps = read_array(path, ndim=4, axes="(3, Z, Y, X)")
    if maps.shape[0] != 3:
        raise VolumeError(
            f"{path}: {maps.shape[0]} channels, but probabilities have 3: binary, boundary and "
            f"distance. {_hint_on_channels(maps.shape)}"
        )
    if maps.dtype.kind != "f":
        raise VolumeError(
            f"{path}: dtype {maps.dtype}, but probabilities are float16 or float32: binary and "
            "boundary from 0 to 1, distance from -1 to 1. Divide by 255 where they were scaled to "
            "uint8."
        )
    _refuse_not_finite(path, "probabilities", maps)
    return maps if maps.dtype.itemsize <= 4 else maps.astype(np.float32)


def _hint_on_channels(shape: tuple[int, ...]) -> str:
    """Return what to do about probabilities of a wrong shape; an expression where one does it."""
    if len(shape) == 3:
        return "This is one channel alone. Predict or save all three, with numpy.stack([b, c, d])."
    if len(shape) == 5 and shape[0] == 1:
        return "Drop the first axis, of length 1: p[0]."
    if len(shape) == 4 and 3 in shape[1:]:
        at = len(shape) - 1 - shape[::-1].index(3)
        return f"Move axis {at}, the channels, to the front: numpy.moveaxis(p, {at}, 0)."
    channels = f"{shape[0]} channels" if len(shape) == 4 else f"{len(shape)} axes"
    return f"These are {channels}. Give the output of predict, or three channels in that order."


def _check_image(path: str | Path, image: Sections) -> None:
    """Refuse an image that is a mask, in colours of a palette, or not finite."""
    with open_lazy(path, ndim=3) as lazy:
        _refuse_no_grey(path, lazy)
    _refuse_not_finite(path, "image", image)


def _refuse_no_grey(path: str | Path, image: LazyArray) -> None:
    """Refuse an image whose numbers are no grey values."""
    if image.dtype.kind == "b":
        raise VolumeError(
            f"{path}: the image has dtype bool, which is a mask. Give the EM image with --image "
            "and the mask with --mask."
        )
    if image.palette:
        raise VolumeError(
            f"{path}: its numbers stand for colours of a palette (a coloured lookup table), not "
            "for grey values; only labels and masks may be such. Save it in grey, in Fiji by Image "
            "> Lookup Tables > Grays."
        )


def _refuse_not_finite(path: str | Path, kind: str, array: Sections) -> None:
    """Raise where a float array holds NaN or infinity, naming how many and the first place."""
    if array.dtype.kind != "f":
        return
    count, first = 0, ""
    # One section at a time: a whole-volume boolean array would double the peak of memory.
    for index, section in enumerate(array):
        bad = np.argwhere(~np.isfinite(section))
        if len(bad) and not count:
            value = "NaN" if np.isnan(section[tuple(bad[0])]) else "infinite"
            first = f"{value} at {(index, *(int(i) for i in bad[0]))}"
        count += len(bad)
    if count:
        raise VolumeError(
            f"{path}: {count} voxels of the {kind} are NaN or infinite (first: {first}), "
            "but every value must be finite. Fill them, for example with numpy.nan_to_num, and "
            "leave them out with a mask."
        )


def _check_shape(
    path: str, kind: str, shape: tuple[int, ...], image: str, expected: tuple[int, ...]
) -> None:
    """Raise where an array does not lie on the voxels of its image."""
    if shape != expected:
        axes = " The axes seem to be in another order." if sorted(shape) == sorted(expected) else ""
        raise VolumeError(
            f"{path}: the {kind} has shape {shape}, but the image {image} has {expected}; both "
            f"must be equal.{axes} Give the {kind} of this very volume."
        )


def placement_of(paths: VolumePaths) -> tuple[VoxelSize | None, VoxelSize | None]:
    """Return voxel size and origin that the image states, or else the label, or else a mask.

    Raises:
        VolumeError: As `agreed_placement`.
    """
    return agreed_placement(paths.image, paths.label, paths.mask, paths.scored_mask)


def agreed_placement(*files: str | None) -> tuple[VoxelSize | None, VoxelSize | None]:
    """Return voxel size and origin that the first of some files states that states any.

    Args:
        files: Of one volume; None and `none` are left out.

    Raises:
        VolumeError: A file cannot be opened, or two files contradict each other in size, place or
            direction; a size of 1 x 1 x 1 nm, which tools write for unknown, contradicts none.
    """
    stated: dict[str, Placement] = {}
    shape: tuple[int, ...] | None = None
    for path in files:
        if path is not None and path != NO_MASK:
            with open_lazy(path) as lazy:
                shape = lazy.shape[-3:] if shape is None else shape
                fits = lazy.ndim == len(shape) == 3
                stated[path] = (on_voxels_of(lazy, shape) if fits else lazy).placement
    directions = {path: one.directions for path, one in stated.items() if one.directions}
    for path, other in directions.items():
        first, own = next(iter(directions.items()))
        mirrored = [name for name, a, b in zip("zyx", own, other, strict=True) if a != b]
        if mirrored:
            raise VolumeError(
                f"{path}: along {', '.join(mirrored)} its voxels run the other way round than "
                f"those of {first}, so the two would lie mirrored on each other. Save both in the "
                "same orientation."
            )
    bare = {path: (one.bare_size, one.bare_origin) for path, one in stated.items()}
    _agreed(bare, "in a unit that is no length")
    return _agreed({p: (one.voxel_size_nm, one.origin_nm) for p, one in stated.items()}, "nm")


def _agreed(
    stated: Mapping[str, tuple[VoxelSize | None, VoxelSize | None]], unit: str
) -> tuple[VoxelSize | None, VoxelSize | None]:
    """Return the first voxel size and origin of some files, having refused those that differ."""
    sizes = {path: size for path, (size, _) in stated.items() if size is not None}
    origins = {path: origin for path, (_, origin) in stated.items() if origin is not None}
    known = {path: size for path, size in sizes.items() if size != UNIT_SIZE}
    first = next(iter(known.values()), ())
    _refuse_different("voxel size", known, [SAME_SIZE * s for s in first], unit)
    size = next(iter((known or sizes).values()), None)
    _refuse_different("origin", origins, [s / 2 for s in size or UNIT_SIZE], unit)
    return size, next(iter(origins.values()), None)


def check_heads(image: str, others: Mapping[str, str | None]) -> None:
    """Refuse files that do not lie on the voxels of an image, before any of them is read.

    Args:
        image: File, or `file:dataset`.
        others: What each other file is, as messages call it, and where it lies, if anywhere.

    Raises:
        VolumeError: A file cannot be opened, or its shape, voxel size or origin is another.
    """
    with open_lazy(image, ndim=3) as lazy:
        shape = lazy.shape
        _refuse_no_grey(image, lazy)
    for kind, path in others.items():
        if path is not None:
            mask = kind.endswith("mask")
            with open_mask(path, shape) if mask else open_lazy(path, ndim=3) as lazy:
                _check_shape(path, kind, lazy.shape, image, shape)
    agreed_placement(image, *others.values())


def first_voxel_size(paths: VolumePaths) -> VoxelSize | None:
    """Return the voxel size of `placement_of`.

    Raises:
        VolumeError: As there.
    """
    return placement_of(paths)[0]


def _refuse_different(
    what: str, stated: Mapping[str, VoxelSize], tolerance: Sequence[float], unit: str
) -> None:
    """Refuse files of one volume that state different sizes or places of its voxels."""
    for path, other in list(stated.items())[1:]:
        first, own = next(iter(stated.items()))
        if any(abs(a - b) > t for a, b, t in zip(own, other, tolerance, strict=True)):
            shown, others = (" x ".join(f"{n:g}" for n in values) for values in (own, other))
            key = "voxel_size_nm" if what == "voxel size" else "origin_nm"
            raise VolumeError(
                f"{path}: its {what} is {others} {unit} (z, y, x), but that of {first} is {shown}; "
                "the files of one volume must agree. Give files of the same volume, or correct "
                f"the one that is wrong: in HDF5 and Zarr the attribute {key} of the array."
            )
