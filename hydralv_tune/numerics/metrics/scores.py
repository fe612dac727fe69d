"""How well a segmentation fits the ground truth: the formula of every entry of `METRICS`.

Each reads one contingency table, and most a stack of tables too, with the combinations along the
last axis.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hydralv_tune.numerics.metrics.contingency import (
    EMPTY_TRUTH,
    ContingencyTable,
    Ids,
    Ints,
    contingency_table,
    joined,
    summed,
)
from hydralv_tune.numerics.metrics.registry import (
    COUNTS,
    HEADLINE,
    METRICS,
    SUMMARY,
    Metric,
    register_metric,
)

__all__ = [
    "EMPTY_TRUTH", "HEADLINE", "METRICS", "SUMMARY", "ContingencyTable", "Metric", "Score",
    "adapted_rand", "adapted_rand_foreground", "contingency_table", "joined", "match_instances",
    "register_metric", "score", "score_labels", "variation_of_information",
]  # fmt: skip

Array = npt.NDArray[Any]

COVERED = 0.1
"""The share of an instance from which on an overlap counts as more than a touch."""
IOU_LIMITS = (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
"""The limits that the average precision is averaged over."""


@dataclass(frozen=True, slots=True)
class AdaptedRand:
    """Adapted Rand error with the precision and recall it is made of, all in [0, 1]."""

    error: Any
    precision: Any
    recall: Any


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
    figures = rand_from_sums(
        pair_squares=np.square(table.pair_voxels).sum(axis=0),
        segment_squares=np.square(segment_sizes).sum(axis=0),
        truth_squares=np.square(table.truth_sizes).sum(),
        uncovered_share=table.uncovered / np.float64(table.voxels),
    )
    return AdaptedRand(*(figure[()] for figure in figures))


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


def skimage_adapted_rand_error(table: ContingencyTable) -> Any:
    """Return adapted Rand error as scikit-image defines it: over pairs of truth voxels.

    Predicted background counts as one segment. Where there is no pair at all, it is 0.

    Raises:
        ValueError: There is no truth.
    """
    if not len(table.truth_ids):
        raise ValueError(EMPTY_TRUTH)
    voxels = table.truth_sizes.sum()
    missed = (table.truth_sizes - table.truth_sizes_found.T).T
    pairs = np.square(table.pair_voxels).sum(axis=0) + np.square(missed).sum(axis=0) - voxels
    held = np.square(table.segment_sizes_in_truth).sum(axis=0) + np.square(table.uncovered)
    total = held + np.square(table.truth_sizes).sum() - 2 * voxels
    return np.where(total > 0, 1.0 - 2.0 * pairs / np.maximum(total, 1), 0.0)[()]


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


def variation_of_information(table: ContingencyTable) -> tuple[Any, Any]:
    """Return variation of information over truth voxels in bits: (split, merge).

    Split is H(segment | truth), merge is H(truth | segment). Predicted background counts as
    one segment, so that missed voxels cost something.

    Raises:
        ValueError: There is no truth.

    Source: Meila 2007, doi:10.1016/j.jmva.2006.11.013.
    """
    if not len(table.truth_ids):
        raise ValueError(EMPTY_TRUTH)
    background = (table.truth_sizes - table.truth_sizes_found.T).T
    pairs = log_terms(table.pair_voxels).sum(axis=0) + log_terms(background).sum(axis=0)
    return voi_from_sums(
        pair_logs=pairs,
        segment_logs=log_terms(table.segment_sizes_in_truth).sum(axis=0),
        truth_sizes=table.truth_sizes,
        uncovered=table.uncovered,
    )


def f1_from_counts(
    *, matched: npt.ArrayLike, predicted: npt.ArrayLike, true: npt.ArrayLike
) -> Array:
    """Return 2·matched / (predicted + true), 0 where both are empty."""
    total = np.asarray(predicted, np.float64) + np.asarray(true, np.float64)
    return 2.0 * np.asarray(matched, np.float64) / np.where(total > 0, total, 1.0)


def ious(table: ContingencyTable) -> Array:
    """Return the intersection over union of each overlapping pair."""
    sizes = (table.truth_sizes[table.pair_truth] + table.segment_sizes[table.pair_segment].T).T
    return table.pair_voxels / np.maximum(sizes - table.pair_voxels, 1)


def matches(table: ContingencyTable, iou: float) -> Any:
    """Return the largest number of one-to-one matches with an IoU of at least `iou`.

    This is how stardist and panoptica count; `match_instances` wants more than `iou` instead,
    so the two differ where an IoU equals it.
    """
    edges = ious(table) >= iou
    counts = np.asarray(np.count_nonzero(edges, axis=0))
    if iou > 0.5:  # no instance can have two partners
        return counts
    crowded = np.zeros(counts.shape, bool)
    for rows, total in (
        (table.pair_truth, len(table.truth_ids)),
        (table.pair_segment, len(table.segment_ids)),
    ):
        crowded |= (summed(edges.astype(np.int64), rows, total) > 1).any(axis=0)
    if crowded.any():
        from scipy.sparse import csr_array
        from scipy.sparse.csgraph import maximum_bipartite_matching

        shape = (len(table.truth_ids), len(table.segment_ids))
        columns, flat = edges.reshape(len(edges), -1), counts.reshape(-1)
        for column in np.flatnonzero(crowded):
            own = columns[:, column]
            pairs = (table.pair_truth[own], table.pair_segment[own])
            graph = csr_array((np.ones(np.count_nonzero(own)), pairs), shape=shape)
            flat[column] = np.count_nonzero(maximum_bipartite_matching(graph) >= 0)
    return counts


def f1_at(table: ContingencyTable, iou: float) -> Any:
    """Return F1 of the matches with an IoU of at least `iou`."""
    return f1_from_counts(
        matched=matches(table, iou),
        predicted=table.instances_predicted,
        true=np.array(len(table.truth_ids)),
    )


def average_precision(table: ContingencyTable, iou: float) -> Any:
    """Return matches / (matches + false positives + missed) at an IoU of at least `iou`.

    Source: Data Science Bowl 2018, doi:10.1038/s41592-019-0612-7, as stardist counts it.
    """
    matched = matches(table, iou)
    return matched / np.maximum(table.instances_predicted + len(table.truth_ids) - matched, 1)


def segmentation_quality(table: ContingencyTable) -> Any:
    """Return the mean IoU of the matches at an IoU of at least 0.5, 0 where none matches.

    Source: Kirillov et al. 2019, doi:10.1109/CVPR.2019.00963.
    """
    pairs, matched = ious(table), matches(table, 0.5)
    sure = pairs > 0.5
    # Whatever competes for a partner at 0.5 has an IoU of exactly 0.5.
    total = (pairs * sure).sum(axis=0) + 0.5 * (matched - np.count_nonzero(sure, axis=0))
    return total / np.maximum(matched, 1)


def best_dice(table: ContingencyTable) -> Any:
    """Return symmetric best Dice: the smaller of the mean best Dice of truths and of segments.

    Source: Scharr et al. 2014, CVPPP leaf segmentation challenge.
    """
    sizes = (table.truth_sizes[table.pair_truth] + table.segment_sizes[table.pair_segment].T).T
    dice = 2 * table.pair_voxels / np.maximum(sizes, 1)
    means = []
    for rows, total, count in (
        (table.pair_truth, len(table.truth_ids), len(table.truth_ids)),
        (table.pair_segment, len(table.segment_ids), table.instances_predicted),
    ):
        best = np.zeros((total, *dice.shape[1:]))
        np.maximum.at(best, rows, dice)
        means.append(best.sum(axis=0) / np.maximum(count, 1))
    return np.minimum(*means)


def count_bias(table: ContingencyTable) -> Any:
    """Return how many more instances are predicted than true, as a share of the true ones."""
    return (table.instances_predicted - len(table.truth_ids)) / np.float64(len(table.truth_ids))


def volume_bias(table: ContingencyTable) -> Any:
    """Return how many more voxels are predicted than true, as a share of the true ones."""
    true = table.truth_sizes.sum()
    return (table.segment_sizes.sum(axis=0) - true) / np.float64(true)


def above_half(table: ContingencyTable) -> Any:
    """Return the number of matches with an IoU above 0.5, which are unique."""
    return np.count_nonzero(ious(table) > 0.5, axis=0)


def f1_above_half(table: ContingencyTable) -> Any:
    """Return F1 of the matches with an IoU above 0.5."""
    return f1_from_counts(
        matched=above_half(table),
        predicted=table.instances_predicted,
        true=np.array(len(table.truth_ids)),
    )


def precision_above_half(table: ContingencyTable) -> Any:
    """Return the share of segments that match, 0 where there is none."""
    return above_half(table) / np.maximum(table.instances_predicted, 1)


def recall_above_half(table: ContingencyTable) -> Any:
    """Return the share of truths that match."""
    return above_half(table) / max(len(table.truth_ids), 1)


def mean_average_precision(table: ContingencyTable) -> Any:
    """Return the average precision, averaged over `IOU_LIMITS`."""
    return sum(average_precision(table, iou) for iou in IOU_LIMITS) / len(IOU_LIMITS)


def panoptic_quality(table: ContingencyTable) -> Any:
    """Return segmentation quality times recognition quality, which is F1."""
    return segmentation_quality(table) * f1_at(table, 0.5)


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


def match_instances(table: ContingencyTable, *, iou: float = 0.5) -> InstanceMatching:
    """Return which instances match, and which are missed, split, merged or false positives.

    A pair matches when its intersection over union is above `iou`; from 0.5 on a match is
    then unique without an assignment. A truth is missed when no segment holds a tenth of it,
    split when several do. A segment is merged when it holds a tenth of several truths, and
    invented (a false positive) when no truth makes up a tenth of it.

    Args:
        table: Overlaps inside the mask, of one segmentation.
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

    def ids(values: Ids, where: Array) -> tuple[int, ...]:
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


def _size_classes(table: ContingencyTable) -> dict[str, npt.NDArray[np.bool_]]:
    """Return which truths are small, medium and large: thirds of them by their size.

    Truths of one size are never parted, so the thirds are as even as that allows.
    """
    first, second = np.quantile(table.truth_sizes, [1 / 3, 2 / 3], method="inverted_cdf")
    sizes = table.truth_sizes
    return {
        "small": sizes <= first,
        "medium": (sizes > first) & (sizes <= second),
        "large": sizes > second,
    }


def _found_above_half(table: ContingencyTable) -> npt.NDArray[np.bool_]:
    """Return which truths match a segment with an IoU above 0.5."""
    pairs = table.pair_truth[ious(table) > 0.5]
    return np.isin(np.arange(len(table.truth_ids)), pairs)


def by_size(table: ContingencyTable) -> dict[str, dict[str, Any]]:
    """Return what became of small, medium and large truths."""
    matching, found = match_instances(table), _found_above_half(table)
    ids = {name: np.array(getattr(matching, name), np.uint64) for name in ("missed", "split")}
    classes = {}
    for name, own in _size_classes(table).items():
        sizes = table.truth_sizes[own]
        classes[name] = {
            "smallest_voxels": int(sizes.min()) if len(sizes) else None,
            "largest_voxels": int(sizes.max()) if len(sizes) else None,
            "instances_true": len(sizes),
            "matched_iou50": int(np.count_nonzero(found[own])),
            **{kind: int(np.isin(table.truth_ids[own], of).sum()) for kind, of in ids.items()},
        }
    return classes


def recall_of_size(table: ContingencyTable, size: str) -> float:
    """Return the share of small, medium or large truths that match at IoU 0.5; 1 without any.

    Args:
        table: Of `contingency_table`.
        size: A key of `by_size`.
    """
    found = _found_above_half(table)[_size_classes(table)[size]]
    return float(found.mean()) if len(found) else 1.0


@dataclass(frozen=True)
class Score:
    """Every figure of one segmentation; each metric and count is an attribute of its name.

    Args:
        metrics: Of each entry of `METRICS`.
        table: What they were read from.
        matching: Counts and ids of what matched and what went wrong.
    """

    metrics: Mapping[str, float]
    table: ContingencyTable
    matching: InstanceMatching

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name in ("metrics", "table", "matching"):
            raise AttributeError(name)
        try:
            return self.metrics[name]
        except KeyError:
            return getattr(self.matching, name)

    @property
    def instances_true(self) -> int:
        """Return the number of truths."""
        return len(self.table.truth_ids)

    @property
    def instances_predicted(self) -> int:
        """Return the number of segments."""
        return len(self.table.segment_ids)

    @property
    def matched_iou50(self) -> int:
        """Return the number of matches with an IoU above 0.5."""
        return self.matching.matched

    @property
    def by_size(self) -> dict[str, dict[str, Any]]:
        """Return what became of small, medium and large truths."""
        return by_size(self.table)

    @property
    def counts(self) -> dict[str, int]:
        """Return how many instances are missed, split, merged and invented."""
        return {key: len(getattr(self, key)) for key in ("missed", "split", "merged", "invented")}

    def as_dict(self, voxel_size_nm: Sequence[float] | None = None) -> dict[str, Any]:
        """Return the figures as plain JSON types.

        Args:
            voxel_size_nm: (z, y, x); where it is given, size classes are told in nm³ too.
        """
        counts = {name: getattr(self, name) for name in COUNTS}
        plain: dict[str, Any] = {
            k: list(v) if isinstance(v, tuple) else v for k, v in counts.items()
        }
        if voxel_size_nm is not None:
            volume = float(np.prod(voxel_size_nm))
            for own in plain["by_size"].values():
                for end in ("smallest", "largest"):
                    voxels = own[f"{end}_voxels"]
                    own[f"{end}_nm3"] = None if voxels is None else voxels * volume
        return {**self.metrics, **plain}


def score(table: ContingencyTable) -> Score:
    """Return every figure of a segmentation against the ground truth.

    Args:
        table: Of `contingency_table`, or several of them `joined`.

    Raises:
        ValueError: There is no truth, or a registered metric gives no finite number.
    """
    if not len(table.truth_ids):
        raise ValueError(EMPTY_TRUTH)
    metrics = {name: value_of(metric, table) for name, metric in METRICS.items()}
    return Score(metrics, table, match_instances(table))


def score_labels(
    *, prediction: Array, truth: Array, mask: Array | None = None, ignore: Collection[int] = ()
) -> Score:
    """Return every figure of a segmentation against the ground truth.

    Args:
        prediction, truth, mask, ignore: As for `contingency_table`.

    Raises:
        ValueError: As for `contingency_table` and `score`.
    """
    return score(contingency_table(prediction=prediction, truth=truth, mask=mask, ignore=ignore))


def value_of(metric: Metric, table: ContingencyTable) -> float:
    """Return one metric of one segmentation.

    Raises:
        ValueError: It gives no finite number.
    """
    value = float(metric.of_table(table))
    if not np.isfinite(value):
        raise ValueError(f"metric '{metric.name}' gives {value}, but a finite number is required")
    return value
