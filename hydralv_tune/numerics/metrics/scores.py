"""How well a segmentation fits the ground truth: adapted Rand error, VOI, instance matching.

Every metric reads one contingency table, so that the volume is passed over once.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from skimage.metrics import adapted_rand_error as skimage_error

Array = npt.NDArray[Any]
Ints = npt.NDArray[np.int64]

COVERED = 0.1
"""The share of an instance from which on an overlap counts as more than a touch."""

EMPTY_TRUTH = "the label has no labelled voxel inside the mask, so adapted Rand error is undefined"


@dataclass(frozen=True, slots=True)
class ContingencyTable:
    """Overlaps of truth and segments inside the mask; background, id 0, is in no array.

    `truth_sizes` and `segment_sizes` count whole instances inside the mask. `pair_truth` and
    `pair_segment` are indices into the ids, and `pair_voxels` the voxels both hold.
    """

    voxels: int
    truth_ids: Ints
    truth_sizes: Ints
    segment_ids: Ints
    segment_sizes: Ints
    pair_truth: Ints
    pair_segment: Ints
    pair_voxels: Ints

    @property
    def uncovered(self) -> int:
        """Return the truth voxels that are predicted background."""
        return int(self.truth_sizes.sum() - self.pair_voxels.sum())

    @property
    def segment_sizes_in_truth(self) -> Ints:
        """Return the voxels of each segment that lie within truth."""
        sizes = np.zeros(len(self.segment_ids), np.int64)
        np.add.at(sizes, self.pair_segment, self.pair_voxels)
        return sizes


@dataclass(frozen=True, slots=True)
class AdaptedRand:
    """Adapted Rand error with the precision and recall it is made of, all in [0, 1]."""

    error: float
    precision: float
    recall: float


@dataclass(frozen=True, slots=True)
class InstanceMatching:
    """Which instances were found, and what went wrong with the others, by id."""

    matched: int
    precision: float
    recall: float
    f1: float
    missed: tuple[int, ...]
    split: tuple[int, ...]
    merged: tuple[int, ...]
    invented: tuple[int, ...]


def checked_labels(labels: Array, name: str) -> Array:
    """Return labels as an array of non-negative integers.

    Args:
        labels: (Z, Y, X), integers; 0 is background.
        name: What to call it in an error.

    Raises:
        ValueError: It holds floats or negative numbers.
    """
    labels = np.asarray(labels)
    if labels.dtype == bool:
        return labels.astype(np.uint8)
    if not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"{name} has dtype {labels.dtype}, but instance ids are integers")
    if labels.size and np.issubdtype(labels.dtype, np.signedinteger) and labels.min() < 0:
        raise ValueError(f"{name} holds {labels.min()}, but instance ids start at 0 (background)")
    return labels


def checked_mask(mask: Array | None, shape: tuple[int, ...]) -> npt.NDArray[np.bool_] | None:
    """Return the mask as booleans, of the given shape.

    Raises:
        ValueError: The shape differs, or no voxel is valid.
    """
    if mask is None:
        return None
    mask = np.asarray(mask)
    if mask.shape != tuple(shape):
        raise ValueError(f"mask has shape {mask.shape}, but the volume has {tuple(shape)}")
    mask = mask > 0
    if not mask.any():
        raise ValueError("the mask holds no valid voxel; drop it to use the whole volume")
    return mask


def _ids_of(values: Array) -> tuple[Ints, Ints]:
    """Return the ids above 0 and their sizes."""
    ids, sizes = np.unique(values[values > 0], return_counts=True)
    return ids.astype(np.int64), sizes.astype(np.int64)


def contingency_table(
    *, prediction: Array, truth: Array, mask: Array | None = None
) -> ContingencyTable:
    """Return how instances of prediction and truth overlap inside the mask.

    Args:
        prediction: (Z, Y, X), integers; 0 is background.
        truth: (Z, Y, X), integers; 0 is background.
        mask: (Z, Y, X); voxels above 0 are valid. The whole volume where there is none.

    Raises:
        ValueError: Shapes differ, ids are no non-negative integers, or the mask is empty.
    """
    prediction = checked_labels(prediction, "prediction")
    truth = checked_labels(truth, "truth")
    if prediction.shape != truth.shape:
        raise ValueError(f"prediction has shape {prediction.shape}, but truth has {truth.shape}")
    valid = checked_mask(mask, truth.shape)
    either = (prediction > 0) | (truth > 0)
    if valid is not None:
        either &= valid
    voxels = int(truth.size if valid is None else np.count_nonzero(valid))
    segments, labels = prediction[either], truth[either]
    truth_ids, truth_sizes = _ids_of(labels)
    segment_ids, segment_sizes = _ids_of(segments)
    both = (segments > 0) & (labels > 0)
    columns = max(len(segment_ids), 1)
    keys = np.searchsorted(truth_ids, labels[both].astype(np.int64)) * columns
    keys += np.searchsorted(segment_ids, segments[both].astype(np.int64))
    pairs, pair_voxels = np.unique(keys, return_counts=True)
    return ContingencyTable(
        voxels=voxels,
        truth_ids=truth_ids,
        truth_sizes=truth_sizes,
        segment_ids=segment_ids,
        segment_sizes=segment_sizes,
        pair_truth=pairs // columns,
        pair_segment=pairs % columns,
        pair_voxels=pair_voxels.astype(np.int64),
    )


def rand_from_sums(
    *,
    pair_squares: npt.ArrayLike,
    segment_squares: npt.ArrayLike,
    truth_squares: npt.ArrayLike,
    uncovered_share: npt.ArrayLike,
) -> tuple[Array, Array, Array]:
    """Return error, precision and recall from exact sums; scalars or arrays of one shape.

    Args:
        pair_squares: Σ n_ij².
        segment_squares: Σ b_j², or Σ |S_j|² for the foreground form.
        truth_squares: Σ a_i², above 0.
        uncovered_share: c/N.

    Returns:
        Float64 arrays. Where no truth voxel is predicted, error is 1 and the others 0: the
        formula alone would leave a remainder of c/N.
    """
    pairs = np.asarray(pair_squares, np.float64)
    share = np.asarray(uncovered_share, np.float64)
    both = pairs + share
    below = np.asarray(segment_squares, np.float64) + share
    found = pairs > 0
    precision = np.where(found, both / np.where(below > 0, below, 1.0), 0.0)
    recall = np.where(found, both / np.asarray(truth_squares, np.float64), 0.0)
    total = precision + recall
    harmonic = 2.0 * precision * recall / np.where(total > 0, total, 1.0)
    return 1.0 - harmonic, precision, recall


def _adapted_rand(table: ContingencyTable, segment_sizes: Ints) -> AdaptedRand:
    """Return adapted Rand error with the given sizes of the segments."""
    if not len(table.truth_ids):
        raise ValueError(EMPTY_TRUTH)
    error, precision, recall = rand_from_sums(
        pair_squares=np.square(table.pair_voxels).sum(),
        segment_squares=np.square(segment_sizes).sum(),
        truth_squares=np.square(table.truth_sizes).sum(),
        uncovered_share=np.float64(table.uncovered) / np.float64(table.voxels),
    )
    return AdaptedRand(float(error), float(precision), float(recall))


def adapted_rand(table: ContingencyTable) -> AdaptedRand:
    """Return adapted Rand error as SNEMI3D defines it.

    With n_ij voxels of truth i and segment j, a_i the truth sizes, b_j the sizes of segments
    within truth, c the truth voxels predicted background, N all voxels:
    AB = Σ n_ij² + c/N, precision = AB / (Σ b_j² + c/N), recall = AB / Σ a_i².
    It cannot see false positives outside truth: read `adapted_rand_foreground` beside it.

    Raises:
        ValueError: There is no truth.

    Source: Arganda-Carreras et al. 2015, doi:10.3389/fnana.2015.00142, in SNEMI3D's form.
    """
    return _adapted_rand(table, table.segment_sizes_in_truth)


def adapted_rand_foreground(table: ContingencyTable) -> AdaptedRand:
    """Return adapted Rand error in which segments pay for every voxel outside truth too.

    As `adapted_rand`, with b_j the whole segment inside the mask.

    Raises:
        ValueError: There is no truth.
    """
    return _adapted_rand(table, table.segment_sizes)


def skimage_adapted_rand_error(
    *, prediction: Array, truth: Array, mask: Array | None = None
) -> float:
    """Return scikit-image's adapted Rand error, where predicted background is a segment.

    Raises:
        ValueError: There is no truth inside the mask.
    """
    valid = checked_mask(mask, truth.shape)
    inside = truth > 0 if valid is None else (truth > 0) & valid
    if not inside.any():
        raise ValueError(EMPTY_TRUTH)
    # The error counts voxels within truth alone, so the rest of the volume need not be passed.
    labels = np.unique(truth[inside], return_inverse=True)[1] + 1
    segments = np.unique(np.append(prediction[inside], 0), return_inverse=True)[1][:-1]
    return float(skimage_error(labels.astype(np.int64), segments.astype(np.int64))[0])


def variation_of_information(table: ContingencyTable) -> tuple[float, float]:
    """Return variation of information over truth voxels in bits: (split, merge).

    Split is H(segment | truth), merge is H(truth | segment). Predicted background counts as
    one segment, so that missed voxels cost something.

    Raises:
        ValueError: There is no truth.

    Source: Meila 2007, doi:10.1016/j.jmva.2006.11.013.
    """
    if not len(table.truth_ids):
        raise ValueError(EMPTY_TRUTH)
    found = np.zeros(len(table.truth_ids), np.int64)
    np.add.at(found, table.pair_truth, table.pair_voxels)
    background = table.truth_sizes - found
    pairs = np.concatenate([table.pair_voxels, background])
    split, merge = voi_from_sums(
        pair_logs=log_terms(pairs).sum(),
        segment_logs=log_terms(table.segment_sizes_in_truth).sum(),
        truth_sizes=table.truth_sizes,
        uncovered=np.array(table.uncovered),
    )
    return float(split), float(merge)


def log_terms(counts: npt.ArrayLike) -> Array:
    """Return n log2 n of each count, 0 for 0."""
    numbers: Array = np.asarray(counts, np.float64)
    return numbers * np.log2(np.maximum(numbers, 1.0))


def voi_from_sums(
    *,
    pair_logs: npt.ArrayLike,
    segment_logs: npt.ArrayLike,
    truth_sizes: npt.ArrayLike,
    uncovered: npt.ArrayLike,
) -> tuple[Array, Array]:
    """Return variation of information in bits, (split, merge), from sums over instances.

    Args:
        pair_logs: Σ n_ij log2 n_ij, with the uncovered part of each truth as one more pair.
        segment_logs: Σ b_j log2 b_j.
        truth_sizes: a_i.
        uncovered: Truth voxels predicted background.
    """
    total = np.float64(np.sum(truth_sizes))
    pairs = np.asarray(pair_logs, np.float64)
    split = (log_terms(truth_sizes).sum() - pairs) / total
    merge = (np.asarray(segment_logs, np.float64) + log_terms(uncovered) - pairs) / total
    return np.maximum(split, 0.0), np.maximum(merge, 0.0)


def f1_from_counts(
    *, matched: npt.ArrayLike, predicted: npt.ArrayLike, true: npt.ArrayLike
) -> Array:
    """Return 2·matched / (predicted + true), 0 where both are empty."""
    total = np.asarray(predicted, np.float64) + np.asarray(true, np.float64)
    return 2.0 * np.asarray(matched, np.float64) / np.where(total > 0, total, 1.0)


def match_instances(table: ContingencyTable, *, iou: float = 0.5) -> InstanceMatching:
    """Return which instances match, and which are missed, split, merged or invented.

    A pair matches when its intersection over union is above `iou`; from 0.5 on a match is
    then unique without an assignment. A truth is missed when no segment holds a tenth of it,
    split when several do. A segment is merged when it holds a tenth of several truths, and
    invented when no truth makes up a tenth of it.

    Args:
        table: Overlaps inside the mask.
        iou: Limit in [0.5, 1).

    Raises:
        ValueError: `iou` is under 0.5 or not under 1.
    """
    if not 0.5 <= iou < 1.0:
        raise ValueError(f"iou is {iou}, but matches are unique only for 0.5 <= iou < 1")
    truth_size = table.truth_sizes[table.pair_truth]
    segment_size = table.segment_sizes[table.pair_segment]
    matched = int(
        np.count_nonzero(table.pair_voxels > iou * (truth_size + segment_size - table.pair_voxels))
    )
    truths, segments = len(table.truth_ids), len(table.segment_ids)
    of_truth = table.pair_voxels >= COVERED * truth_size
    of_segment = table.pair_voxels >= COVERED * segment_size
    pieces = np.bincount(table.pair_truth[of_truth], minlength=truths)
    held = np.bincount(table.pair_segment[of_truth], minlength=segments)
    backed = np.bincount(table.pair_segment[of_segment], minlength=segments)

    def ids(values: Ints, where: Array) -> tuple[int, ...]:
        return tuple(int(value) for value in values[where])

    return InstanceMatching(
        matched=matched,
        precision=matched / segments if segments else 0.0,
        recall=matched / truths if truths else 0.0,
        f1=float(f1_from_counts(matched=matched, predicted=segments, true=truths)),
        missed=ids(table.truth_ids, pieces == 0),
        split=ids(table.truth_ids, pieces > 1),
        merged=ids(table.segment_ids, held > 1),
        invented=ids(table.segment_ids, backed == 0),
    )


@dataclass(frozen=True)
class Score:
    """Every figure of one segmentation, named as on the command line."""

    adapted_rand_error: float
    adapted_rand_precision: float
    adapted_rand_recall: float
    adapted_rand_error_foreground: float
    skimage_adapted_rand_error: float
    voi_split: float
    voi_merge: float
    instances_true: int
    instances_predicted: int
    matched_iou50: int
    precision_iou50: float
    recall_iou50: float
    f1_iou50: float
    missed: tuple[int, ...]
    split: tuple[int, ...]
    merged: tuple[int, ...]
    invented: tuple[int, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return the figures as plain JSON types."""
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in asdict(self).items()
        }

    @property
    def counts(self) -> dict[str, int]:
        """Return how many instances are missed, split, merged and invented."""
        return {key: len(getattr(self, key)) for key in ("missed", "split", "merged", "invented")}


def score(*, prediction: Array, truth: Array, mask: Array | None = None) -> Score:
    """Return every figure of a segmentation against the ground truth.

    Args:
        prediction: (Z, Y, X), integers; 0 is background.
        truth: (Z, Y, X), integers; 0 is background.
        mask: (Z, Y, X); voxels above 0 are valid. The whole volume where there is none.

    Raises:
        ValueError: Shapes differ, ids are no non-negative integers, or no truth is left.
    """
    prediction = checked_labels(prediction, "prediction")
    truth = checked_labels(truth, "truth")
    table = contingency_table(prediction=prediction, truth=truth, mask=mask)
    rand = adapted_rand(table)
    split, merge = variation_of_information(table)
    matching = match_instances(table)
    return Score(
        adapted_rand_error=rand.error,
        adapted_rand_precision=rand.precision,
        adapted_rand_recall=rand.recall,
        adapted_rand_error_foreground=adapted_rand_foreground(table).error,
        skimage_adapted_rand_error=skimage_adapted_rand_error(
            prediction=prediction, truth=truth, mask=mask
        ),
        voi_split=split,
        voi_merge=merge,
        instances_true=len(table.truth_ids),
        instances_predicted=len(table.segment_ids),
        matched_iou50=matching.matched,
        precision_iou50=matching.precision,
        recall_iou50=matching.recall,
        f1_iou50=matching.f1,
        missed=matching.missed,
        split=matching.split,
        merged=matching.merged,
        invented=matching.invented,
    )
