"""Exact sums over instances for every foreground combination of one flood at once."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from hydralv_tune.numerics.watershed.compiled import kernel

Array = npt.NDArray[Any]

PAIR_SQUARES, SEGMENT_SQUARES, WHOLE_SQUARES, COVERED, INSTANCES, MATCHED = range(6)
COUNTS = 6
PAIR_LOGS, SEGMENT_LOGS = range(2)
"""Rows of the sums: Σ n_ij², Σ b_j², Σ |S_j|², truth voxels covered, instances, matches; and
Σ n_ij log2 n_ij with the uncovered part of each truth as one more pair, Σ b_j log2 b_j."""


@kernel
def _suffix_sums(row: Any, bins: Any) -> None:
    """Sum from the back along each of three axes, in place."""
    one, two, three = bins
    for b in range(one):
        for c in range(two):
            at = (b * two + c) * three
            for d in range(three - 2, -1, -1):
                row[at + d] += row[at + d + 1]
    for b in range(one):
        for c in range(two - 2, -1, -1):
            at = (b * two + c) * three
            for d in range(three):
                row[at + d] += row[at + three + d]
    for b in range(one - 2, -1, -1):
        at = b * two * three
        for cd in range(two * three):
            row[at + cd] += row[at + two * three + cd]


@kernel
def _by_label(labels: Any, truth: Any, cell: Any) -> Any:
    """Return truth and cell of the nodes of each label, in their order, and where each begins."""
    top = 0
    for node in range(len(labels)):
        top = max(top, labels[node])
    starts = np.zeros(top + 2, np.int64)
    for node in range(len(labels)):
        if labels[node] > 0 and cell[node] >= 0:
            starts[labels[node] + 1] += 1
    for label in range(top + 1):
        starts[label + 1] += starts[label]
    ends = starts.copy()
    truths, cells = np.empty(starts[top + 1], np.int32), np.empty(starts[top + 1], np.int32)
    for node in range(len(labels)):
        if labels[node] > 0 and cell[node] >= 0:
            end = ends[labels[node]]
            truths[end] = truth[node]
            cells[end] = cell[node]
            ends[labels[node]] = end + 1
    return truths, cells, starts


@kernel
def _log_term(count: int) -> float:
    """Return n log2 n, 0 for 0."""
    return count * np.log2(count) if count > 1 else 0.0


@kernel
def _add_segment(full: Any, whole: Any, inside: Any, least: Any, sums: Any, logs: Any) -> None:
    """Add one instance, given its size, its scored part and its part within truth.

    Each is given at every combination; the size in full decides whether the instance is kept.
    """
    for size in range(len(least)):
        for f in range(len(whole)):
            if whole[f] > 0 and full[f] >= least[size]:
                sums[SEGMENT_SQUARES, size, f] += inside[f] * inside[f]
                sums[WHOLE_SQUARES, size, f] += whole[f] * whole[f]
                sums[COVERED, size, f] += inside[f]
                sums[INSTANCES, size, f] += 1
                if len(logs):
                    logs[SEGMENT_LOGS, size, f] += _log_term(inside[f])


@kernel
def _add_pair(
    both: Any, full: Any, whole: Any, true: int, least: Any, sums: Any, logs: Any, covered: Any
) -> None:
    """Add the overlap of an instance with one truth of `true` voxels."""
    for size in range(len(least)):
        for f in range(len(both)):
            if both[f] > 0 and full[f] >= least[size]:
                sums[PAIR_SQUARES, size, f] += both[f] * both[f]
                if 2 * both[f] > whole[f] + true - both[f]:
                    sums[MATCHED, size, f] += 1
                if len(logs):
                    logs[PAIR_LOGS, size, f] += _log_term(both[f])
                    covered[size, f] += both[f]


@kernel
def _sizes(
    truths: Any, cells: Any, start: int, stop: int, bins: Any, full: Any, whole: Any, inside: Any
) -> None:
    """Write the sizes of one instance at every combination: in full, scored, within truth."""
    full[:] = 0
    whole[:] = 0
    inside[:] = 0
    at = start
    while at < stop and truths[at] < 0:
        full[cells[at]] += 1
        at += 1
    has_unscored = at > start
    while at < stop and truths[at] == 0:
        whole[cells[at]] += 1
        at += 1
    while at < stop:
        inside[cells[at]] += 1
        at += 1
    _suffix_sums(inside, bins)
    _suffix_sums(whole, bins)
    whole += inside
    if has_unscored:
        _suffix_sums(full, bins)
        full += whole
    else:
        full[:] = whole


@kernel
def _overlap(truths: Any, cells: Any, at: int, stop: int, bins: Any, both: Any) -> Any:
    """Write the overlap with the truth at `at` at every combination; return where it ends."""
    name = truths[at]
    both[:] = 0
    while at < stop and truths[at] == name:
        both[cells[at]] += 1
        at += 1
    _suffix_sums(both, bins)
    return at


@kernel
def threshold_sums(
    labels: Any, truth: Any, cell: Any, bins: Any, truth_sizes: Any, least: Any, entropy: bool
) -> Any:
    """Return exact sums over instances for every foreground combination.

    One histogram for each instance and each of its overlaps, summed from the back, holds its
    size under every foreground combination at once.

    Args:
        labels: (nodes,), int32, from the flood; nodes are sorted by truth.
        truth: (nodes,), int32; -1 is not scored, 0 background, else an index into `truth_sizes`
            plus 1.
        cell: (nodes,), int32; the last foreground combination a node passes, -1 for none.
        bins: The lengths of the three foreground axes.
        truth_sizes: (truths,), int64.
        least: (sizes,), int64, each a `min_instance_size`.
        entropy: Whether the sums of logarithms are needed too.

    Returns:
        Sums (6, sizes, combinations), int64, and sums of logarithms (2, sizes, combinations),
        float64, the latter empty where not needed.
    """
    width = bins[0] * bins[1] * bins[2]
    sums = np.zeros((COUNTS, len(least), width), np.int64)
    logs = np.zeros((2 if entropy else 0, len(least), width))
    covered = np.zeros((len(truth_sizes) if entropy else 1, len(least), width), np.int64)
    truths, cells, starts = _by_label(labels, truth, cell)
    full, whole, inside, both = (
        np.empty(width, np.int64), np.empty(width, np.int64), np.empty(width, np.int64),
        np.empty(width, np.int64),
    )  # fmt: skip
    for label in range(1, len(starts) - 1):
        at, stop = starts[label], starts[label + 1]
        _sizes(truths, cells, at, stop, bins, full, whole, inside)
        _add_segment(full, whole, inside, least, sums, logs)
        while at < stop:
            name = truths[at]
            if name <= 0:
                at += 1
                continue
            at = _overlap(truths, cells, at, stop, bins, both)
            place = name - 1 if entropy else 0
            _add_pair(both, full, whole, truth_sizes[name - 1], least, sums, logs, covered[place])
    if entropy:
        for name in range(len(truth_sizes)):
            for size in range(len(least)):
                for f in range(width):
                    logs[PAIR_LOGS, size, f] += _log_term(
                        truth_sizes[name] - covered[name, size, f]
                    )
    return sums, logs


@kernel
def threshold_tables(labels: Any, truth: Any, cell: Any, bins: Any) -> Any:
    """Return the overlaps of every foreground combination, as a stack of tables needs them.

    Args:
        labels, truth, cell, bins: As for `threshold_sums`.

    Returns:
        Sizes in full and scored (labels, combinations); for each overlap its label and its truth,
        from 0, and its voxels (overlaps, combinations).
    """
    width = bins[0] * bins[1] * bins[2]
    truths, cells, starts = _by_label(labels, truth, cell)
    count = len(starts) - 2
    pairs = 0
    for label in range(1, count + 1):
        last = 0
        for at in range(starts[label], starts[label + 1]):
            name = truths[at]
            pairs += name > 0 and name != last
            last = name
    full, whole = np.zeros((count, width), np.int64), np.zeros((count, width), np.int64)
    segment, own, both = (
        np.zeros(pairs, np.int64), np.zeros(pairs, np.int64), np.zeros((pairs, width), np.int64)
    )  # fmt: skip
    inside = np.empty(width, np.int64)
    pair = 0
    for label in range(1, count + 1):
        at, stop = starts[label], starts[label + 1]
        _sizes(truths, cells, at, stop, bins, full[label - 1], whole[label - 1], inside)
        while at < stop:
            name = truths[at]
            if name <= 0:
                at += 1
                continue
            at = _overlap(truths, cells, at, stop, bins, both[pair])
            segment[pair], own[pair] = label - 1, name - 1
            pair += 1
    return full, whole, segment, own, both
