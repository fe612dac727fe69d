"""What is known of a volume's truth: ids of any type, "no label", tissue and annotated places.

Two masks are told apart. The tissue mask says where instances can be: decoding is confined to
it. The scored mask says where the truth is known: losses, sampling and scores are taken there.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from hydralv_tune.numerics.metrics.contingency import split_unknown

Array = npt.NDArray[Any]
Ids = npt.NDArray[np.uint64]

LARGEST_ID = np.iinfo(np.int32).max
"""Labels are trained on as int32."""


def renumbered(labels: Array, ids: Array) -> Array:
    """Return labels as int32: 0, or the place of the id in the sorted `ids`, from 1."""
    places = np.searchsorted(ids, labels.astype(ids.dtype)) + 1
    return np.where(labels > 0, places, 0).astype(np.int32)


def known_labels(
    labels: Array, ignore: Collection[int] = ()
) -> tuple[Array, Array | None, Ids | None]:
    """Return labels that fit into int32, with 0 where they are unknown.

    Args:
        labels: (Z, Y, X), integers of any type.
        ignore: Ids that mean "no label".

    Returns:
        The labels; True where they are unknown, or None; and the ids they had where they had to
        be numbered anew, that of label k at k - 1, or None.
    """
    labels, unknown = split_unknown(labels, "label", ignore)
    if not labels.size or int(labels.max()) <= LARGEST_ID:
        return labels, unknown, None
    ids = np.unique(labels[labels > 0]).astype(np.uint64)
    return renumbered(labels, ids), unknown, ids


@dataclass(frozen=True)
class LazyLabels:
    """Labels that stay on disk, read as `known_labels` returns them.

    Args:
        array: An open file.
        ignore: Ids that mean "no label".
        ids: Of the whole volume, sorted, where they must be numbered anew.
    """

    array: Any
    ignore: tuple[int, ...] = ()
    ids: Ids | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of the array."""
        return tuple(self.array.shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Return the type of what is read."""
        return np.dtype(np.int32) if self.ids is not None else np.dtype(self.array.dtype)

    def __getitem__(self, where: Any) -> Array:
        """Return a part, in memory."""
        labels, _ = split_unknown(np.asarray(self.array[where]), "label", self.ignore)
        return labels if self.ids is None else renumbered(labels, self.ids)

    def with_ids(self) -> LazyLabels:
        """Return the same with the ids of the whole volume, where one does not fit into int32."""
        if np.iinfo(self.array.dtype).max <= LARGEST_ID:
            return self
        found = np.zeros(0, np.uint64)
        for z in range(self.shape[0]):
            section = self[z : z + 1]
            found = np.union1d(found, section[section > 0].astype(np.uint64))
        fits = not len(found) or found[-1] <= LARGEST_ID
        return self if fits else LazyLabels(self.array, self.ignore, found)


@dataclass(frozen=True)
class LazyKnown:
    """Where every one of some masks on disk is above 0 and the labels, if any, are known."""

    masks: tuple[Any, ...]
    labels: LazyLabels | None = None

    dtype = np.dtype(bool)

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of the volume."""
        arrays = (*self.masks, self.labels)
        return tuple(arrays[0].shape)

    def __getitem__(self, where: Any) -> Array:
        """Return a part, in memory."""
        known = [np.asarray(mask[where]) > 0 for mask in self.masks]
        if self.labels is not None:
            raw = np.asarray(self.labels.array[where])
            _, unknown = split_unknown(raw, "label", self.labels.ignore)
            known += [np.ones(raw.shape, bool) if unknown is None else ~unknown]
        return np.logical_and.reduce(known)


def has_unknown(labels: LazyLabels) -> bool:
    """Return whether some voxel has no label; sections are read until one is found."""
    for z in range(labels.shape[0]):
        raw = np.asarray(labels.array[z : z + 1])
        if split_unknown(raw, "label", labels.ignore)[1] is not None:
            return True
    return False


def annotated_sections(occupied: Any) -> bool:
    """Return whether a mask marks annotated sections rather than tissue.

    It does where sections without any mask lie between others, or where it is one section of
    several: tissue does not end and begin again with the sections.

    Args:
        occupied: (Z,), whether a section holds any voxel of the mask.
    """
    inside = np.flatnonzero(occupied)
    if not len(inside):
        return False
    single = len(inside) == 1 and len(occupied) > 2
    return single or bool(inside[-1] - inside[0] + 1 > len(inside))


FEW_SECTIONS = 2
"""Annotated side by side: so few do not say where tissue ends."""


Gap = tuple[int, int]
"""Sections that a mask leaves out: the section before the first one, and that after the last."""


def gaps_to_fill(occupied: Any) -> list[Gap] | None:
    """Return the gaps of a mask across which tissue goes on; none where the mask marks tissue.

    Where no more than `FEW_SECTIONS` are annotated side by side, nothing says where tissue ends.

    Args:
        occupied: (Z,), whether a section holds any voxel of the mask.

    Returns:
        The gaps, or None where decoding goes on everywhere.
    """
    if not annotated_sections(occupied):
        return []
    inside = np.flatnonzero(occupied)
    runs = np.split(inside, np.flatnonzero(np.diff(inside) > 1) + 1)
    if max(len(run) for run in runs) <= FEW_SECTIONS:
        return None
    return [(int(below[-1]), int(above[0])) for below, above in pairwise(runs)]


def tissue_of(mask: Array) -> Array | None:
    """Return where decoding goes on for a mask given alone; None is everywhere.

    Sections that a mask of annotated sections leaves out are filled from the nearest ones on both
    sides, as `gaps_to_fill` says.

    Args:
        mask: (Z, Y, X), bool.
    """
    gaps = gaps_to_fill(mask.any(axis=(1, 2)))
    return None if gaps is None else FilledMask(mask, gaps)[:]


@dataclass(frozen=True)
class FilledMask:
    """A mask whose gaps are filled from the nearest sections on both sides, read part by part.

    Args:
        mask: (Z, Y, X), in memory or on disk; voxels above 0 count.
        gaps: Of `gaps_to_fill`.
    """

    mask: Any
    gaps: Sequence[Gap]

    dtype = np.dtype(bool)

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of the volume."""
        return tuple(self.mask.shape)

    def __getitem__(self, where: Any) -> Array:
        """Return a part in memory; slices alone, without steps."""
        sections, *plane = where if isinstance(where, tuple) else (where,)
        first, end, _ = sections.indices(self.shape[0])
        values: Array = np.array(np.asarray(self.mask[(sections, *plane)]) > 0)
        for below, above in self.gaps:
            low, high = max(below + 1, first), min(above, end)
            if low < high:
                nearest = [
                    np.asarray(self.mask[(slice(z, z + 1), *plane)]) > 0 for z in (below, above)
                ]
                values[low - first : high - first] = nearest[0] | nearest[1]
        return values


ANNOTATED_NOTE = (
    "the mask leaves out whole sections, so it is taken for the sections that are annotated: the "
    "score is made in it, and decoding goes on beyond it. Give it with --scored-mask, and "
    "the tissue with --mask, to say so yourself"
)
