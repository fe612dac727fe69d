"""What became of each instance, what its correction would gain, and how certain the score is.

All of it is read from one contingency table.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from hydralv_tune.numerics.metrics.contingency import ContingencyTable, Ids
from hydralv_tune.numerics.metrics.scores import (
    COVERED,
    adapted_rand,
    adapted_rand_foreground,
    ious,
    match_instances,
    rand_from_sums,
)

Floats = npt.NDArray[np.float64]

KINDS = ("true", "missed", "split", "merged", "invented")
"""What can become of an instance. `true` was found once and alone, however well it fits."""


@dataclass(frozen=True, slots=True)
class InstanceError:
    """What became of one instance of the truth, or of one false positive.

    `truth_id` is None for a false positive (kind `invented`), `segment_ids` empty for a missed
    truth. `row` is the index in the table of the truth, or else of the segment. `iou` is that of
    the best segment. `worth` and `worth_foreground` say by how much adapted Rand error and its
    foreground form would fall if this one alone were corrected.
    """

    kind: str
    truth_id: int | None
    segment_ids: tuple[int, ...]
    row: int
    size_voxels: int
    iou: float
    worth: float
    worth_foreground: float

    @property
    def fits(self) -> bool:
        """Return whether it counts as matched at IoU 0.5."""
        return self.kind != "invented" and self.iou > 0.5


def segment_kinds(table: ContingencyTable) -> dict[int, str]:
    """Return the kind of each segment: `true`, `merged` or `invented`, or `split`, a piece."""
    matching = match_instances(table)
    split = set(matching.split)
    kinds = dict.fromkeys(map(int, table.segment_ids), "true")
    for row, truths in _covering(table).items():
        if any(truth in split for truth in truths):
            kinds[int(table.segment_ids[row])] = "split"
    kinds.update(dict.fromkeys(matching.invented, "invented"))
    kinds.update(dict.fromkeys(matching.merged, "merged"))
    return kinds


def truth_kinds(table: ContingencyTable) -> dict[int, str]:
    """Return the kind of each truth; one that is merged and split counts as merged."""
    matching = match_instances(table)
    merged = set(matching.merged)
    kinds = dict.fromkeys(map(int, table.truth_ids), "true")
    kinds.update(dict.fromkeys(matching.missed, "missed"))
    kinds.update(dict.fromkeys(matching.split, "split"))
    for row, truths in _covering(table).items():
        if int(table.segment_ids[row]) in merged:
            kinds.update(dict.fromkeys(truths, "merged"))
    return kinds


def _covering(table: ContingencyTable) -> dict[int, list[int]]:
    """Return, for each row of the segments, the truths of which it holds a tenth or more."""
    holds = table.pair_voxels >= COVERED * table.truth_sizes[table.pair_truth]
    covering: dict[int, list[int]] = {}
    for truth, segment in zip(table.pair_truth[holds], table.pair_segment[holds], strict=True):
        covering.setdefault(int(segment), []).append(int(table.truth_ids[truth]))
    return covering


def instance_errors(table: ContingencyTable) -> list[InstanceError]:
    """Return what became of every truth and every false positive, the costliest first.

    A truth is corrected by a segment of its own that fits exactly; what its old segments hold
    of other truths or of background stays. A false positive is corrected by dropping it, which
    adapted Rand error cannot see and the foreground form can.

    Args:
        table: Overlaps inside the mask, with at least one truth.

    Raises:
        ValueError: There is no truth.
    """
    before, before_fg = adapted_rand(table).error, adapted_rand_foreground(table).error
    after, after_fg = _truths_corrected(table)
    best = best_ious(table)
    kinds = truth_kinds(table)
    errors = []
    for row, truth in enumerate(map(int, table.truth_ids)):
        own = table.pair_truth == row
        order = np.argsort(-table.pair_voxels[own], kind="stable")
        errors.append(
            InstanceError(
                kind=kinds[truth],
                truth_id=truth,
                segment_ids=_ints(table.segment_ids[table.pair_segment[own][order]]),
                row=row,
                size_voxels=int(table.truth_sizes[row]),
                iou=float(best[row]),
                worth=float(before - after[row]),
                worth_foreground=float(before_fg - after_fg[row]),
            )
        )
    errors += _false_positives(table, float(before_fg))
    return sorted(errors, key=lambda e: (-e.worth, -e.worth_foreground, e.truth_id or 0))


def _ints(ids: Ids) -> tuple[int, ...]:
    """Return ids as Python integers."""
    return tuple(int(one) for one in ids)


def best_ious(table: ContingencyTable) -> Floats:
    """Return the intersection over union of each truth with its best segment, 0 where none."""
    best = np.zeros(len(table.truth_ids))
    np.maximum.at(best, table.pair_truth, ious(table))
    return best


def _truths_corrected(table: ContingencyTable) -> tuple[Floats, Floats]:
    """Return both errors after correcting each truth alone, in the order of the truths."""
    truths = len(table.truth_ids)
    n = table.pair_voxels.astype(np.float64)
    sizes = table.truth_sizes.astype(np.float64)
    squares = np.bincount(table.pair_truth, n * n, truths)
    found = np.bincount(table.pair_truth, n, truths)
    errors = []
    for segment_sizes in (table.segment_sizes_in_truth, table.segment_sizes):
        held = segment_sizes.astype(np.float64)
        old = held[table.pair_segment]
        change = np.bincount(table.pair_truth, (old - n) ** 2 - old**2, truths)
        error, _, _ = rand_from_sums(
            pair_squares=(n * n).sum() - squares + sizes**2,
            segment_squares=(held**2).sum() + change + sizes**2,
            truth_squares=(sizes**2).sum(),
            uncovered_share=(table.uncovered - (sizes - found)) / table.voxels,
        )
        errors.append(error)
    return errors[0], errors[1]


def errors_if_corrected(
    table: ContingencyTable, corrected: Iterable[InstanceError]
) -> tuple[float, float]:
    """Return adapted Rand error and its foreground form after correcting several at once.

    Correcting several may gain more, or less, than the sum of correcting each.

    Args:
        table: Overlaps inside the mask, with at least one truth.
        corrected: Some of `instance_errors`, of this table.
    """
    truths = np.zeros(len(table.truth_ids), bool)
    dropped = np.zeros(len(table.segment_ids), bool)
    for one in corrected:
        (dropped if one.truth_id is None else truths)[one.row] = True
    kept = ~truths[table.pair_truth] & ~dropped[table.pair_segment]
    n = table.pair_voxels.astype(np.float64)
    gone = np.bincount(table.pair_segment[~kept], n[~kept], len(table.segment_ids))
    sizes = table.truth_sizes.astype(np.float64)
    own = (sizes[truths] ** 2).sum()
    found = (n[kept]).sum() + sizes[truths].sum()
    errors = []
    for segment_sizes in (table.segment_sizes_in_truth, table.segment_sizes):
        held = np.where(dropped, 0.0, segment_sizes - gone)
        error, _, _ = rand_from_sums(
            pair_squares=np.square(n[kept]).sum() + own,
            segment_squares=np.square(held).sum() + own,
            truth_squares=np.square(sizes).sum(),
            uncovered_share=(sizes.sum() - found) / table.voxels,
        )
        errors.append(float(error))
    return errors[0], errors[1]


def _false_positives(table: ContingencyTable, before: float) -> list[InstanceError]:
    """Return the false positives; `before` is the foreground error as it is."""
    invented = np.array(match_instances(table).invented, np.uint64)
    errors = []
    for row in np.flatnonzero(np.isin(table.segment_ids, invented)):
        one = InstanceError(
            "invented", None, (int(table.segment_ids[row]),), int(row),
            int(table.segment_sizes[row]), 0.0, 0.0, 0.0,
        )  # fmt: skip
        after = errors_if_corrected(table, [one])[1]
        errors.append(replace(one, worth_foreground=before - after))
    return errors


def bootstrap(
    table: ContingencyTable, *, resamples: int = 2000, level: float = 0.95, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """Return percentile intervals of the errors and of F1 over resampled instances.

    Every sum in the scores adds up over instances: a segment's square is shared among the truths
    it covers by their overlap, and a segment that touches no truth is a unit of its own. So
    instances can be drawn with replacement without the volume. The interval says how much the
    score depends on the few instances at hand, nothing about another volume.

    Args:
        table: Overlaps inside the mask, with at least one truth.
        resamples: How often to draw.
        level: Share of resamples inside the interval.
        seed: Of the draws.

    Returns:
        (low, high) for `adapted_rand_error`, `adapted_rand_error_foreground`, `f1_iou50`.
    """
    tail = 100 * (1 - level) / 2
    return {
        name: (float(np.percentile(v, tail)), float(np.percentile(v, 100 - tail)))
        for name, v in _resampled(table, resamples, seed).items()
    }


def noise(table: ContingencyTable, metric: str) -> float | None:
    """Return the standard deviation of a score over resampled instances, as `bootstrap` draws them.

    Args:
        table: As for `bootstrap`.
        metric: A name of the table of metrics.

    Returns:
        None where `bootstrap` has no interval of the metric.
    """
    values = _resampled(table, 2000, 0).get(metric)
    return None if values is None else float(np.std(values))


def _resampled(table: ContingencyTable, resamples: int, seed: int) -> Mapping[str, Floats]:
    """Return errors and F1 of each draw of instances."""
    units = _units(table)
    count = len(units["truth_squares"])
    rng = np.random.default_rng(seed)
    draws = rng.multinomial(count, np.full(count, 1.0 / count), size=resamples).astype(np.float64)
    # A draw without any truth has no error; with one truth among many false positives that happens.
    draws = draws[draws @ units["true"] > 0]
    sums = {name: draws @ values for name, values in units.items()}
    share = sums["uncovered"] / table.voxels
    return {
        "adapted_rand_error": _error(sums, sums["inside_squares"], share),
        "adapted_rand_error_foreground": _error(sums, sums["whole_squares"], share),
        # Shares of segments that lie in several truths may add up to less than what matched.
        "f1_iou50": np.minimum(2 * sums["matched"] / (sums["true"] + sums["segments"]), 1.0),
    }


def _error(sums: Mapping[str, Floats], segment_squares: Floats, share: Floats) -> Floats:
    """Return adapted Rand error of each draw."""
    error, _, _ = rand_from_sums(
        pair_squares=sums["pair_squares"],
        segment_squares=segment_squares,
        truth_squares=sums["truth_squares"],
        uncovered_share=share,
    )
    return np.asarray(error, np.float64)


def _units(table: ContingencyTable) -> dict[str, Floats]:
    """Return what each truth, then each segment outside all truth, adds to the sums."""
    truths = len(table.truth_ids)
    n = table.pair_voxels.astype(np.float64)
    inside = table.segment_sizes_in_truth.astype(np.float64)
    whole = table.segment_sizes.astype(np.float64)
    share = n / inside[table.pair_segment]
    alone = whole[inside == 0]

    def per_truth(values: Floats, outside: Floats | float = 0.0) -> Floats:
        summed = np.bincount(table.pair_truth, values, truths)
        return np.concatenate([summed, np.broadcast_to(outside, alone.shape)])

    sizes = np.concatenate([table.truth_sizes.astype(np.float64), np.zeros(len(alone))])
    return {
        "true": (sizes > 0).astype(np.float64),
        "truth_squares": sizes**2,
        "pair_squares": per_truth(n * n),
        "uncovered": sizes - per_truth(n),
        "inside_squares": per_truth(n * inside[table.pair_segment]),
        "whole_squares": per_truth(share * whole[table.pair_segment] ** 2, alone**2),
        "segments": per_truth(share, 1.0),
        "matched": np.concatenate([best_ious(table) > 0.5, np.zeros(len(alone))]),
    }
