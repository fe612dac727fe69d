"""Patches of a volume that is too large for the device: read from disk when they are due.

Only what a patch needs is read: from chunked HDF5 or Zarr, by a few threads, a few batches ahead.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch

from hydralv_tune.config.candidate import Data
from hydralv_tune.data.truth import (
    ANNOTATED_NOTE,
    FilledMask,
    LazyKnown,
    LazyLabels,
    gaps_to_fill,
    has_unknown,
)
from hydralv_tune.data.volumes import (
    Box,
    Volume,
    VolumePaths,
    Windowed,
    check_truth,
    check_volume,
    first_voxel_size,
    open_lazy,
    open_mask,
    read_volume,
    volume_paths,
    windowed,
)
from hydralv_tune.numerics.augmentation.patches import Patches, intensity_range
from hydralv_tune.numerics.targets import instance_edt
from hydralv_tune.trial.fitted_normalisation import (
    PAD_MODES,
    padded_normalisation,
    with_normalisation,
)
from hydralv_tune.trial.training.sampling import (
    OUTSIDE,
    distance_arguments,
    known_voxel_size,
    normalised,
    resident_bytes,
    upload,
)
from hydralv_tune.trial.training.sampling_locations import Ints, find_sampling_locations

Array = npt.NDArray[Any]

HALO = (8, 32, 32)
"""Voxels (z, y, x) read around a patch for the distance target: instances that reach further out
of the patch than that get a distance as if cut there."""

SCORED_BYTES = 40
"""Bytes a voxel takes while it is predicted, swept and scored."""


def is_lazy(volume: Volume) -> bool:
    """Return whether a volume is read when it is needed."""
    return isinstance(cast(Any, volume.image), Windowed)


def as_lazy(volume: Volume) -> Volume:
    """Return a volume whose arrays are only read in parts."""
    return replace(
        volume,
        image=cast(Array, windowed(volume.image)),
        label=None if volume.label is None else cast(Array, windowed(volume.label)),
        mask=None if volume.mask is None else cast(Array, windowed(volume.mask)),
        scored_mask=(
            None if volume.scored_mask is None else cast(Array, windowed(volume.scored_mask))
        ),
    )


def open_volume(paths: VolumePaths) -> Volume:
    """Return a volume that stays on disk, checked as `read_volume` does, section by section.

    Its fingerprint is that of `read_volume`.

    Raises:
        VolumeError: A file cannot be read, or its content breaks a rule.
    """
    image = windowed(open_lazy(paths.image, ndim=3))
    label = None if paths.label is None else windowed(open_lazy(paths.label, ndim=3))
    mask, scored = (
        None if path is None else windowed(open_mask(path, image.shape))
        for path in (paths.mask, paths.scored_mask)
    )
    occupied = check_volume(paths, image, label, mask, scored)
    volume = Volume(paths.name, cast(Array, image), voxel_size_nm=first_voxel_size(paths))
    masks = tuple(part.array for part in (mask, scored) if part is not None)
    tissue, note = mask, None
    if mask is not None and scored is None:
        gaps = gaps_to_fill(occupied)
        if gaps != []:
            tissue = None if gaps is None else windowed(FilledMask(mask.array, gaps))
            note = ANNOTATED_NOTE
    labels = None if label is None else LazyLabels(label.array, paths.ignore_labels).with_ids()
    ignoring = labels if labels is not None and has_unknown(labels) else None
    separate = scored is not None or note is not None or ignoring is not None
    known = windowed(LazyKnown(masks, ignoring)) if separate else None
    above = None if tissue is None else windowed(LazyKnown((tissue.array,)))
    volume = replace(
        volume,
        label=None if labels is None else cast(Array, windowed(labels)),
        mask=cast(Array, above),
        scored_mask=cast(Array, known),
        label_ids=None if labels is None else labels.ids,
        note=note,
    )
    check_truth(paths, volume.label, volume.where_scored)
    return volume


def read_or_open(paths: VolumePaths, limit_gb: float) -> Volume:
    """Return a volume in memory, or one that stays on disk where it takes more than the limit.

    Args:
        paths: Of its files.
        limit_gb: `data.memory_limit_gb`.

    Raises:
        VolumeError: A file cannot be read, or its content breaks a rule.
    """
    with open_lazy(paths.image, ndim=3) as image:
        unread = Volume(paths.name, cast(Array, windowed(image)))
        large = is_too_large(unread, limit_gb)
    return open_volume(paths) if large else read_volume(paths)


def held_out_volumes(data: Data, trained: Sequence[VolumePaths]) -> list[Volume]:
    """Return the volumes that a candidate names for validation, opened as those to train on.

    Args:
        data: `data` of the candidate.
        trained: Volumes to train on: the ids that mean "no label" are the same in both.

    Raises:
        VolumeError: One cannot be read.
    """
    if data.split.kind != "volumes" or data.val_image is None:
        return []

    def listed(paths: str | list[str] | None) -> list[str]:
        return [] if paths is None else [paths] if isinstance(paths, str) else list(paths)

    images, labels, masks = map(listed, (data.val_image, data.val_label, data.val_mask))
    ignored = sorted({number for paths in trained for number in paths.ignore_labels})
    named = volume_paths(images, labels, masks, ignore_labels=ignored)
    return [read_or_open(paths, data.memory_limit_gb) for paths in named]


def is_too_large(volume: Volume, limit_gb: float) -> bool:
    """Return whether a volume takes more of the device than it may."""
    return resident_bytes(volume) > limit_gb * 1e9


def truth_counts(volume: Volume) -> Iterator[int]:
    """Yield how many labelled voxels inside the mask each section has; they are read one by one."""
    if volume.label is None:
        return
    masks = iter(volume.where_scored) if volume.where_scored is not None else None
    for section in volume.label:
        inside = section > 0
        if masks is not None:
            inside &= next(masks) > 0
        yield int(np.count_nonzero(inside))


def has_truth(volume: Volume) -> bool:
    """Return whether there is a labelled voxel inside the mask; no more is read than it takes."""
    return any(truth_counts(volume))


def part_to_score(volume: Volume, data: Data) -> Volume:
    """Return those sections of a lazy volume that can be scored in memory, with most truth.

    They are normalised as sections of the whole, which is how they are trained on.

    Args:
        volume: With a labelled voxel inside its mask; returned as it is where it is not lazy.
        data: `data` of the candidate; prediction and sweep may take its `memory_limit_gb`.
    """
    if not is_lazy(volume):
        return volume
    volume = with_normalisation(volume, data)
    assert volume.normalisation is not None
    label = cast(Windowed, volume.label)
    depth, height, width = label.shape
    sections = int(data.memory_limit_gb * 1e9 / (SCORED_BYTES * height * width))
    sections = min(max(sections, 1), depth)
    counts = np.fromiter(truth_counts(volume), np.int64)
    sums = np.convolve(counts, np.ones(sections, np.int64), mode="valid")
    first = int(np.argmax(sums))
    box: Box = (slice(first, first + sections), slice(0, height), slice(0, width))
    name = volume.name if sections == depth else f"{volume.name}[z {first}:{first + sections}]"
    tissue, known = (
        None if mask is None else cast(Windowed, mask).read(box) > 0
        for mask in (volume.mask, volume.scored_mask)
    )
    return replace(
        volume,
        name=name,
        image=cast(Windowed, volume.image).read(box),
        label=label.read(box),
        mask=tissue,
        scored_mask=known,
        normalisation=volume.normalisation.of_sections(first, first + sections),
    )


class LazySource:
    """A volume on disk as a source of patches.

    Args:
        volume: Lazy, with a label.
        data: `data` of the candidate.
        device: Where the patches go.
        seed: Of the places remembered.
    """

    def __init__(self, volume: Volume, data: Data, device: torch.device, seed: int) -> None:
        self.volume = volume = with_normalisation(volume, data)
        assert volume.normalisation is not None
        self.device = device
        self.voxel_size_nm = known_voxel_size(data, volume)
        self.pad = data.pad_size
        self.pad_mode = PAD_MODES[data.pad_mode]
        label, mask = cast(Windowed, volume.label), cast(Windowed | None, volume.where_scored)
        self.places = find_sampling_locations(
            volume.name, label, mask, pad=data.pad_size, seed=seed
        )
        self.distance_arguments = distance_arguments(data, volume)
        fitted = volume.normalisation
        self.intensity_range = intensity_range(data.image_transform.normalize, fitted)
        fitted = padded_normalisation(fitted, self.pad[0], data.pad_mode)
        self.per_section = {
            name: torch.from_numpy(getattr(fitted, name))
            for name in ("low", "high", "offset", "scale")
        }

    def cut(self, starts: Ints, size: Sequence[int]) -> Patches:
        """Return the patches that begin at `starts` (B, 3), read from disk.

        Args:
            starts: First voxel (z, y, x) of each patch, in the padded volume.
            size: Voxels (z, y, x) of a patch.
        """
        image, labels, distance, mask = zip(
            *(self._read([int(v) for v in start], size) for start in starts), strict=True
        )
        sections = torch.from_numpy(starts)[:, :1] + torch.arange(size[0])
        cpu = torch.device("cpu")
        whole = normalised(upload(np.stack(image), cpu), self.per_section, sections)
        return Patches(
            image=whole[:, None].to(self.device, non_blocking=True),
            labels=upload(np.stack(labels), self.device),
            edt=upload(np.stack(distance), self.device),
            mask=upload(np.stack(mask), self.device),
            voxel_sizes_nm=(self.voxel_size_nm,) * len(starts),
            intensity_ranges=(self.intensity_range,) * len(starts),
        )

    def _read(self, start: Sequence[int], size: Sequence[int]) -> tuple[Array, ...]:
        """Return image, labels, distance and mask of one patch."""
        first = [s - p for s, p in zip(start, self.pad, strict=True)]
        label = cast(Windowed, self.volume.label)
        mask = cast(Windowed | None, self.volume.where_scored)
        image = self._box(cast(Windowed, self.volume.image), first, size, None)
        wide_first = [f - h for f, h in zip(first, HALO, strict=True)]
        wide_size = [s + 2 * h for s, h in zip(size, HALO, strict=True)]
        wide = self._box(label, wide_first, wide_size, 0).astype(np.int32)
        distance = instance_edt(wide, **self.distance_arguments)
        inner = tuple(slice(h, h + s) for h, s in zip(HALO, size, strict=True))
        inside = self._inside(label.shape, first, size)
        valid = inside if mask is None else self._box(mask, first, size, 0) > 0
        return image, wide[inner], np.where(inside, distance[inner], np.float32(OUTSIDE)), valid

    def _inside(self, shape: Sequence[int], first: Sequence[int], size: Sequence[int]) -> Array:
        """Return which voxels of a patch lie in the volume rather than in its padding."""
        inside = [
            (np.arange(f, f + s) >= 0) & (np.arange(f, f + s) < side)
            for f, s, side in zip(first, size, shape, strict=True)
        ]
        return inside[0][:, None, None] & inside[1][:, None] & inside[2]

    def _box(
        self, array: Windowed, first: Sequence[int], size: Sequence[int], value: int | None
    ) -> Array:
        """Return a box that may reach out of the volume: padded with a value, or as the image."""
        ends = [(f, f + s, side) for f, s, side in zip(first, size, array.shape, strict=True)]
        z, y, x = (slice(min(max(a, 0), side), max(min(b, side), 0)) for a, b, side in ends)
        if value is None and self.pad_mode != "constant":
            return self._reflected(array, ends)
        inner = array.read((z, y, x))
        width = [(s.start - a, b - s.stop) for s, (a, b, _) in zip((z, y, x), ends, strict=True)]
        return np.pad(inner, width, constant_values=value or 0)

    def _reflected(self, array: Windowed, ends: Sequence[tuple[int, int, int]]) -> Array:
        """Return a box of the image whose rim repeats or mirrors the volume."""
        indices = []
        for a, b, side in ends:
            index = np.arange(a, b)
            if self.pad_mode == "edge":
                index = index.clip(0, side - 1)
            else:
                period = max(2 * (side - 1), 1)
                index = np.abs((index + side - 1) % period - (side - 1)) if side > 1 else index * 0
            indices.append(index)
        z, y, x = (slice(int(index.min()), int(index.max()) + 1) for index in indices)
        inner = array.read((z, y, x))
        moved = [index - index.min() for index in indices]
        return inner[np.ix_(*moved)]
