"""What became of each instance, what mending it would be worth, and how sure the score is.

All of it is read from one contingency table; nothing passes over the volume again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hydralv_tune.numerics.metrics.scores import (
    COVERED,
    ContingencyTable,
    Ints,
    adapted_rand,
    adapted_rand_foreground,
    match_instances,
    rand_from_sums,
)

Floats = npt.NDArray[np.float64]

VERDICTS = ("true", "missed", "split", "merged", "invented")
"""What can become of an instance. `true` was found once and alone, however well it fits."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of one instance of the truth, or of one segment that is merged or invented.

    `truth_id` is None for an invented segment, `segment_ids` empty for a missed truth. `iou` is
    that of the best segment. `worth` and `worth_foreground` say by how much adapted Rand error
    and its foreground form would fall if this one alone were mended.
    """

    verdict: str
    truth_id: int | None
    segment_ids: tuple[int, ...]
    size_voxels: int
    iou: float
    worth: float
    worth_foreground: float

    @property
    def fits(self) -> bool:
        """Return whether it counts as matched at IoU 0.5."""
        return self.verdict != "invented" and self.iou > 0.5


def segment_verdicts(table: ContingencyTable) -> dict[int, str]:
    """Return the verdict of each segment: `true`, `merged` or `invented`, or `split`, a piece."""
    matching = match_instances(table)
    split, merged, invented = (
        set(matching.split), set(matching.merged), set(matching.invented),
    )  # fmt: skip
    verdicts: dict[int, str] = {}
    pieces = _covering(table)
    for row, segment in enumerate(table.segment_ids.tolist()):
        if segment in merged:
            verdicts[segment] = "merged"
        elif segment in invented:
            verdicts[segment] = "invented"
        elif any(truth in split for truth in pieces.get(row, ())):
            verdicts[segment] = "split"
        else:
            verdicts[segment] = "true"
    return verdicts


def truth_verdicts(table: ContingencyTable) -> dict[int, str]:
    """Return the verdict of each truth; one that is merged and split counts as merged."""
    matching = match_instances(table)
    merged = set(matching.merged)
    verdicts = dict.fromkeys(table.truth_ids.tolist(), "true")
    verdicts.update(dict.fromkeys(matching.missed, "missed"))
    verdicts.update(dict.fromkeys(matching.split, "split"))
    for row, truths in _covering(table).items():
        if int(table.segment_ids[row]) in merged:
            verdicts.update(dict.fromkeys(truths, "merged"))
    return verdicts


def _covering(table: ContingencyTable) -> dict[int, list[int]]:
    """Return, for each row of the segments, the truths of which it holds a tenth or more."""
    holds = table.pair_voxels >= COVERED * table.truth_sizes[table.pair_truth]
    covering: dict[int, list[int]] = {}
    for truth, segment in zip(table.pair_truth[holds], table.pair_segment[holds], strict=True):
        covering.setdefault(int(segment), []).append(int(table.truth_ids[truth]))
    return covering


def judge(table: ContingencyTable) -> list[Verdict]:
    """Return the verdict of every truth and of every invented segment, worst first.

    Mending a truth means giving it a segment of its own that fits exactly; what its old
    segments hold of other truths or of background stays. Mending an invented segment means
    dropping it, which adapted Rand error cannot see and the foreground form can.

    Args:
        table: Overlaps inside the mask, with at least one truth.

    Raises:
        ValueError: There is no truth.
    """
    before, before_fg = adapted_rand(table).error, adapted_rand_foreground(table).error
    after, after_fg = _mended(table)
    best = _best_iou(table)
    by_truth = truth_verdicts(table)
    verdicts = []
    for row, truth in enumerate(table.truth_ids.tolist()):
        own = table.pair_truth == row
        order = np.argsort(-table.pair_voxels[own], kind="stable")
        segments = table.segment_ids[table.pair_segment[own][order]]
        verdicts.append(
            Verdict(
                verdict=by_truth[truth],
                truth_id=int(truth),
                segment_ids=tuple(int(s) for s in segments),
                size_voxels=int(table.truth_sizes[row]),
                iou=float(best[row]),
                worth=float(before - after[row]),
                worth_foreground=float(before_fg - after_fg[row]),
            )
        )
    inventions = match_instances(table).invented
    verdicts += _invented(table, inventions, before_fg)
    return sorted(verdicts, key=lambda v: (-v.worth, -v.worth_foreground, v.truth_id or 0))


def _best_iou(table: ContingencyTable) -> Floats:
    """Return the intersection over union of each truth with its best segment, 0 where none."""
    inter = table.pair_voxels.astype(np.float64)
    union = table.truth_sizes[table.pair_truth] + table.segment_sizes[table.pair_segment] - inter
    best = np.zeros(len(table.truth_ids))
    np.maximum.at(best, table.pair_truth, inter / union)
    return best


def _mended(table: ContingencyTable) -> tuple[Floats, Floats]:
    """Return both errors after mending each truth alone, in the order of the truths."""
    truths = len(table.truth_ids)
    n = table.pair_voxels.astype(np.float64)
    sizes = table.truth_sizes.astype(np.float64)
    squares = np.bincount(table.pair_truth, n * n, truths)
    found = np.bincount(table.pair_truth, n, truths)
    pair_squares = (n * n).sum() - squares + sizes**2
    uncovered = (table.uncovered - (sizes - found)) / table.voxels
    errors = []
    for segment_sizes in (table.segment_sizes_in_truth, table.segment_sizes):
        held = segment_sizes.astype(np.float64)
        old = held[table.pair_segment]
        change = np.bincount(table.pair_truth, (old - n) ** 2 - old**2, truths)
        error, _, _ = rand_from_sums(
            pair_squares=pair_squares,
            segment_squares=(held**2).sum() + change + sizes**2,
            truth_squares=(sizes**2).sum(),
            uncovered_share=uncovered,
        )
        errors.append(np.asarray(error, np.float64))
    return errors[0], errors[1]


def joined_tables(
    tables: Sequence[ContingencyTable],
) -> tuple[ContingencyTable, list[int], list[int]]:
    """Return several volumes as one table, and what was added to the ids of each.

    Args:
        tables: One per volume; ids may repeat between them.

    Returns:
        The table, and for truths and for segments one shift per volume: ids of volume v are
        above its shift and not above the next.
    """
    shifts: tuple[list[int], list[int]] = ([0], [0])
    for table in tables:
        for shift, ids in zip(shifts, (table.truth_ids, table.segment_ids), strict=True):
            shift.append(shift[-1] + int(ids.max(initial=0)))
    rows = np.cumsum([0, *(len(table.truth_ids) for table in tables)])
    columns = np.cumsum([0, *(len(table.segment_ids) for table in tables)])

    def joined(name: str, added: Sequence[int]) -> Ints:
        parts = [getattr(table, name) + add for table, add in zip(tables, added, strict=True)]
        return np.concatenate(parts).astype(np.int64)

    zeros = [0] * len(tables)
    table = ContingencyTable(
        voxels=sum(table.voxels for table in tables),
        truth_ids=joined("truth_ids", shifts[0][:-1]),
        truth_sizes=joined("truth_sizes", zeros),
        segment_ids=joined("segment_ids", shifts[1][:-1]),
        segment_sizes=joined("segment_sizes", zeros),
        pair_truth=joined("pair_truth", rows[:-1].tolist()),
        pair_segment=joined("pair_segment", columns[:-1].tolist()),
        pair_voxels=joined("pair_voxels", zeros),
    )
    return table, shifts[0][:-1], shifts[1][:-1]


def errors_if_mended(table: ContingencyTable, verdicts: Iterable[Verdict]) -> tuple[float, float]:
    """Return adapted Rand error and its foreground form after mending several at once.

    Mending several is worth more, or less, than the sum of mending each.

    Args:
        table: Overlaps inside the mask, with at least one truth.
        verdicts: Of `judge`, of this table.
    """
    verdicts = list(verdicts)
    truths = np.isin(table.truth_ids, [v.truth_id for v in verdicts if v.truth_id is not None])
    dropped = [s for v in verdicts if v.truth_id is None for s in v.segment_ids]
    kept = ~truths[table.pair_truth] & ~np.isin(table.segment_ids, dropped)[table.pair_segment]
    n = table.pair_voxels.astype(np.float64)
    gone = np.bincount(table.pair_segment[~kept], n[~kept], len(table.segment_ids))
    sizes = table.truth_sizes.astype(np.float64)
    own = (sizes[truths] ** 2).sum()
    found = (n[kept]).sum() + sizes[truths].sum()
    errors = []
    for segment_sizes in (table.segment_sizes_in_truth, table.segment_sizes):
        held = segment_sizes - gone
        held[np.isin(table.segment_ids, dropped)] = 0.0
        error, _, _ = rand_from_sums(
            pair_squares=np.square(n[kept]).sum() + own,
            segment_squares=np.square(held).sum() + own,
            truth_squares=np.square(sizes).sum(),
            uncovered_share=(sizes.sum() - found) / table.voxels,
        )
        errors.append(float(error))
    return errors[0], errors[1]


def _invented(table: ContingencyTable, inventions: tuple[int, ...], before: float) -> list[Verdict]:
    """Return the verdicts of invented segments; `before` is the foreground error as it is."""
    held = table.segment_sizes.astype(np.float64)
    verdicts = []
    for segment in inventions:
        row = int(np.searchsorted(table.segment_ids, segment))
        touching = table.pair_segment == row
        n = table.pair_voxels.astype(np.float64)
        error, _, _ = rand_from_sums(
            pair_squares=(n[~touching] ** 2).sum(),
            segment_squares=(held**2).sum() - held[row] ** 2,
            truth_squares=np.square(table.truth_sizes.astype(np.float64)).sum(),
            uncovered_share=(table.uncovered + n[touching].sum()) / table.voxels,
        )
        verdicts.append(
            Verdict("invented", None, (segment,), int(held[row]), 0.0, 0.0, before - float(error))
        )
    return verdicts


def bootstrap(
    table: ContingencyTable, *, resamples: int = 2000, level: float = 0.95, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """Return percentile intervals of the errors and of F1 over resampled instances.

    Every sum in the scores adds up over instances: a segment's square is shared among the truths
    it covers by their overlap, and a segment that touches no truth is a unit of its own. So
    instances can be drawn with replacement without a volume to draw them from. It says how
    much the score owes to the few instances at hand, nothing about another volume.

    Args:
        table: Overlaps inside the mask, with at least one truth.
        resamples: How often to draw.
        level: Share of resamples inside the interval.
        seed: Of the draws.

    Returns:
        (low, high) for `adapted_rand_error`, `adapted_rand_error_foreground`, `f1_iou50`.
    """
    units = _units(table)
    count = len(units["truth_squares"])
    rng = np.random.default_rng(seed)
    draws = rng.multinomial(count, np.full(count, 1.0 / count), size=resamples).astype(np.float64)
    # A draw without any truth has no error; with one truth among many inventions it may happen.
    draws = draws[draws @ units["true"] > 0]
    sums = {name: draws @ values for name, values in units.items()}
    share = sums["uncovered"] / table.voxels
    samples: Mapping[str, Floats] = {
        "adapted_rand_error": _error(sums, sums["inside_squares"], share),
        "adapted_rand_error_foreground": _error(sums, sums["whole_squares"], share),
        # Shares of segments that lie in several truths may add up to less than what matched.
        "f1_iou50": np.minimum(2 * sums["matched"] / (sums["true"] + sums["segments"]), 1.0),
    }
    tail = 100 * (1 - level) / 2
    return {
        name: (float(np.percentile(v, tail)), float(np.percentile(v, 100 - tail)))
        for name, v in samples.items()
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
        "matched": np.concatenate([_best_iou(table) > 0.5, np.zeros(len(alone))]),
    }
