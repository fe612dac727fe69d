"""The contingency table of truth and prediction, which every metric reads.

A volume is passed over once; several volumes are joined as tables.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Ints = npt.NDArray[np.int64]
Ids = npt.NDArray[np.uint64]
Mask = npt.NDArray[np.bool_]

EMPTY_TRUTH = (
    "the label has no labelled voxel where it is scored, so adapted Rand error is undefined"
)


@dataclass(frozen=True, slots=True)
class ContingencyTable:
    """Overlaps of truth and segments inside the mask; background, id 0, is in no array.

    `truth_sizes` and `segment_sizes` count whole instances inside the mask. `pair_truth` and
    `pair_segment` are indices into the ids, and `pair_voxels` the voxels that both hold.

    A stack holds many segmentations from one flood: sizes of segments (segments, combinations)
    and overlaps (pairs, combinations). A segment of size 0 does not exist in that combination.
    """

    voxels: int
    truth_ids: Ids
    truth_sizes: Ints
    segment_ids: Ids
    segment_sizes: Ints
    pair_truth: Ints
    pair_segment: Ints
    pair_voxels: Ints

    @property
    def uncovered(self) -> Any:
        """Return the truth voxels that are predicted background."""
        return self.truth_sizes.sum() - self.pair_voxels.sum(axis=0)

    @property
    def segment_sizes_in_truth(self) -> Ints:
        """Return the voxels of each segment that lie within truth."""
        return summed(self.pair_voxels, self.pair_segment, len(self.segment_ids))

    @property
    def truth_sizes_found(self) -> Ints:
        """Return the voxels of each truth that lie within any segment."""
        return summed(self.pair_voxels, self.pair_truth, len(self.truth_ids))

    @property
    def instances_predicted(self) -> Any:
        """Return the number of segments."""
        return np.count_nonzero(self.segment_sizes, axis=0)

    def column(self, index: int) -> ContingencyTable:
        """Return the table of one combination of a stack, without the segments it lacks."""
        sizes, voxels = self.segment_sizes[:, index], self.pair_voxels[:, index]
        segments, pairs = sizes > 0, voxels > 0
        return ContingencyTable(
            voxels=self.voxels,
            truth_ids=self.truth_ids,
            truth_sizes=self.truth_sizes,
            segment_ids=self.segment_ids[segments],
            segment_sizes=sizes[segments],
            pair_truth=self.pair_truth[pairs],
            pair_segment=(np.cumsum(segments) - 1)[self.pair_segment[pairs]],
            pair_voxels=voxels[pairs],
        )


def summed(values: Array, groups: Ints, count: int) -> Array:
    """Return the sum of the values of each group, along the first axis."""
    sums = np.zeros((count, *values.shape[1:]), values.dtype)
    np.add.at(sums, groups, values)
    return sums


def split_unknown(
    labels: Array, name: str, ignore: Collection[int] = ()
) -> tuple[Array, Mask | None]:
    """Return labels with 0 where nothing is known, and where that is.

    All ones in 32 or 64 unsigned bits, which is -1 stored as unsigned, means "no label" in
    public data sets and is always unknown.

    Args:
        labels: (Z, Y, X), integers or booleans of any size and byte order; 0 is background.
        name: What to call it in an error.
        ignore: Further ids that mean "unknown"; a negative one must be named here.

    Returns:
        Labels in their own type, not copied where all is known; and True where they are
        unknown, None where they nowhere are.

    Raises:
        ValueError: It holds floats, or a negative number that is not ignored.
    """
    labels = np.asarray(labels)
    if labels.dtype == bool:
        return labels.astype(np.uint8), None
    if not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"{name} has dtype {labels.dtype}, but instance ids are integers")
    limits = np.iinfo(labels.dtype)
    unknown_ids = {value for value in ignore if limits.min <= value <= limits.max}
    if labels.dtype.kind == "u" and labels.dtype.itemsize >= 4:
        unknown_ids.add(limits.max)
    unknown = np.zeros(labels.shape, bool)
    for value in unknown_ids:
        unknown |= labels == labels.dtype.type(value)
    if unknown.any():
        labels = np.where(unknown, labels.dtype.type(0), labels)
    if labels.size and labels.min() < 0:
        raise ValueError(
            f"{name} holds {labels.min()}, but instance ids start at 0 (background). If it means "
            "'no label', say so with --ignore-label"
        )
    return labels, unknown if unknown.any() else None


def checked_mask(mask: Array | None, shape: tuple[int, ...]) -> Mask | None:
    """Return the mask as booleans, of the given shape.

    Raises:
        ValueError: The shape differs, or no voxel is valid.
    """
    if mask is None:
        return None
    mask = np.asarray(mask)
    if mask.shape != tuple(shape):
        raise ValueError(f"mask has shape {mask.shape}, but the volume has {tuple(shape)}")
    mask = mask if mask.dtype == bool else mask > 0
    if not mask.any():
        raise ValueError("the mask holds no valid voxel; drop it to use the whole volume")
    return mask


def contingency_table(
    *, prediction: Array, truth: Array, mask: Array | None = None, ignore: Collection[int] = ()
) -> ContingencyTable:
    """Return how instances of prediction and truth overlap where the truth is known.

    Args:
        prediction: (Z, Y, X), integers of any type; 0 and "no label" are background.
        truth: (Z, Y, X), integers of any type; 0 is background, "no label" is not scored.
        mask: (Z, Y, X); voxels above 0 are scored. The whole volume where there is none.
        ignore: Ids of the truth that mean "no label"; negative ones are background in the
            prediction too.

    Raises:
        ValueError: Shapes differ, ids are no non-negative integers, or the mask is empty.
    """
    negative = [value for value in ignore if value < 0]
    prediction, _ = split_unknown(prediction, "prediction", negative)
    truth, unknown = split_unknown(truth, "truth", ignore)
    if prediction.shape != truth.shape:
        raise ValueError(f"prediction has shape {prediction.shape}, but truth has {truth.shape}")
    valid = checked_mask(mask, truth.shape)
    if unknown is not None:
        valid = ~unknown if valid is None else valid & ~unknown
    either = (prediction > 0) | (truth > 0)
    if valid is not None:
        either &= valid
    segments, labels = prediction[either], truth[either]
    truth_ids, truth_sizes = np.unique(labels[labels > 0], return_counts=True)
    segment_ids, segment_sizes = np.unique(segments[segments > 0], return_counts=True)
    both = (segments > 0) & (labels > 0)
    columns = max(len(segment_ids), 1)
    keys = np.searchsorted(truth_ids, labels[both]) * columns
    keys += np.searchsorted(segment_ids, segments[both])
    pairs, pair_voxels = np.unique(keys, return_counts=True)
    return ContingencyTable(
        voxels=int(truth.size if valid is None else np.count_nonzero(valid)),
        truth_ids=truth_ids.astype(np.uint64),
        truth_sizes=truth_sizes.astype(np.int64),
        segment_ids=segment_ids.astype(np.uint64),
        segment_sizes=segment_sizes.astype(np.int64),
        pair_truth=pairs // columns,
        pair_segment=pairs % columns,
        pair_voxels=pair_voxels.astype(np.int64),
    )


def offsets(tables: Sequence[ContingencyTable]) -> tuple[list[int], list[int]]:
    """Return how many truths, and how many segments, the tables before each one hold."""
    counts = [(len(table.truth_ids), len(table.segment_ids)) for table in tables[:-1]]
    truths, segments = np.cumsum([(0, 0), *counts], axis=0).T
    return truths.tolist(), segments.tolist()


def joined(tables: Sequence[ContingencyTable]) -> ContingencyTable:
    """Return several volumes as one table; each keeps its own instances.

    Ids of one table are kept. Ids of several are numbered anew, from 1 in the order of the
    tables: `offsets` says where those of each begin.
    """
    if len(tables) == 1:
        return tables[0]
    truths, segments = offsets(tables)

    def all_of(name: str, added: Sequence[int] | None = None) -> Any:
        parts = [getattr(table, name) for table in tables]
        return np.concatenate(
            [p + a for p, a in zip(parts, added or [0] * len(parts), strict=True)]
        )

    truth_sizes, segment_sizes = all_of("truth_sizes"), all_of("segment_sizes")
    return ContingencyTable(
        voxels=sum(table.voxels for table in tables),
        truth_ids=np.arange(1, len(truth_sizes) + 1, dtype=np.uint64),
        truth_sizes=truth_sizes,
        segment_ids=np.arange(1, len(segment_sizes) + 1, dtype=np.uint64),
        segment_sizes=segment_sizes,
        pair_truth=all_of("pair_truth", truths),
        pair_segment=all_of("pair_segment", segments),
        pair_voxels=all_of("pair_voxels"),
    )


SLAB = 16
"""Sections in memory at once: as many as a block on disk holds."""


def slab_tables(
    prediction: Any,
    truth: Any,
    masks: Sequence[Any] = (),
    *,
    ignore: Collection[int] = (),
) -> Iterator[ContingencyTable]:
    """Yield the tables of a volume slab by slab; `of_one_volume` joins them.

    Args:
        prediction: (Z, Y, X) labels, in memory or on disk.
        truth: (Z, Y, X) labels, likewise.
        masks: (Z, Y, X) each, likewise; a voxel counts that lies in all of them.
        ignore: Ids of the truth that mean "no label".

    Raises:
        ValueError: As `contingency_table`.
    """
    for z in range(0, truth.shape[0], SLAB):
        part = slice(z, z + SLAB)
        here = np.all([np.asarray(mask[part]) > 0 for mask in masks], axis=0) if masks else None
        if here is None or here.any():
            yield contingency_table(
                prediction=prediction[part], truth=truth[part], mask=here, ignore=ignore
            )


def of_one_volume(parts: Sequence[ContingencyTable]) -> ContingencyTable:
    """Return the tables of disjoint parts of one volume as one: equal ids are one instance."""
    truth_ids = np.unique(np.concatenate([np.zeros(0, np.uint64), *(p.truth_ids for p in parts)]))
    segment_ids = np.unique(
        np.concatenate([np.zeros(0, np.uint64), *(p.segment_ids for p in parts)])
    )
    truth_sizes = np.zeros(len(truth_ids), np.int64)
    segment_sizes = np.zeros(len(segment_ids), np.int64)
    columns = max(len(segment_ids), 1)
    keys, voxels = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for part in parts:
        truths = np.searchsorted(truth_ids, part.truth_ids)
        segments = np.searchsorted(segment_ids, part.segment_ids)
        truth_sizes[truths] += part.truth_sizes
        segment_sizes[segments] += part.segment_sizes
        keys.append(truths[part.pair_truth] * columns + segments[part.pair_segment])
        voxels.append(part.pair_voxels)
    pairs, place = np.unique(np.concatenate(keys), return_inverse=True)
    return ContingencyTable(
        voxels=sum(part.voxels for part in parts),
        truth_ids=truth_ids,
        truth_sizes=truth_sizes,
        segment_ids=segment_ids,
        segment_sizes=segment_sizes,
        pair_truth=pairs // columns,
        pair_segment=pairs % columns,
        pair_voxels=summed(np.concatenate(voxels), place, len(pairs)),
    )
