"""Which networks to average: greedy selection by the exact sweep, and what it gains elsewhere.

Selection, thresholds and figure must not share an instance: the truth is divided among cells of
space, selection looks at the cells of all folds but one, and the figure is taken in that one.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from hydralv_tune.config.search_space import Objective, objective_value
from hydralv_tune.data.volumes import Volume
from hydralv_tune.numerics.metrics.contingency import (
    ContingencyTable,
    contingency_table,
    joined,
    split_unknown,
)
from hydralv_tune.numerics.metrics.registry import METRICS
from hydralv_tune.numerics.metrics.scores import score, value_of
from hydralv_tune.numerics.watershed.decoders import decode
from hydralv_tune.trial.scoring.prediction import averaged
from hydralv_tune.trial.scoring.sweep.choice import SweepPoint
from hydralv_tune.trial.scoring.sweep.sweep import GridLike, sweep

Array = npt.NDArray[Any]
Picks = tuple[int, ...]
"""Candidates by their numbers, ascending; one that is there twice weighs twice."""

FOLDS = 3
CELLS = 12
"""Cells of space that the interval draws from, where there are as many instances."""
RESAMPLES = 1000
LEVEL = 0.95


def shares_of(picks: Picks) -> dict[int, float]:
    """Return the weight of each candidate that was picked."""
    return {one: picks.count(one) / len(picks) for one in sorted(set(picks))}


def cells_of(truths: Sequence[Array], count: int) -> list[Array]:
    """Return the number of the cell that each voxel belongs to, from 0.

    Cells are slabs along the longest axis of each volume with about as many instances in each. An
    instance belongs to one cell as a whole: that of its middle.

    Args:
        truths: (Z, Y, X) labels of each volume, 0 where nothing is scored.
        count: How many cells there are in all, at least one for each volume with instances.

    Returns:
        (Z, Y, X) int32 of each volume; the cells count on from volume to volume.
    """
    counts = [len(np.unique(truth[truth > 0])) for truth in truths]
    whole, first = max(sum(counts), 1), 0
    result: list[Array] = []
    for truth, instances in zip(truths, counts, strict=True):
        own = min(max(round(count * instances / whole), 1), max(instances, 1))
        result.append(first + _slabs(truth, own))
        first += own
    return result


def _slabs(truth: Array, count: int) -> npt.NDArray[np.int32]:
    """Return the cells of one volume, from 0."""
    axis = int(np.argmax(truth.shape))
    ids, dense = np.unique(truth, return_inverse=True)
    dense = dense.reshape(truth.shape)
    if ids[0] != 0:
        dense = dense + 1
        ids = np.concatenate([[0], ids])
    along = np.arange(truth.shape[axis]).reshape([-1 if a == axis else 1 for a in range(3)])
    middles = np.asarray(
        ndimage.mean(np.broadcast_to(along, truth.shape), dense, np.arange(1, len(ids)))
    )
    order = np.argsort(middles, kind="stable")
    cell = np.zeros(len(ids), np.int32)
    parts = np.array_split(order, count)
    cuts = []
    for number, part in enumerate(parts):
        cell[1 + part] = number
        if number:
            cuts.append((middles[parts[number - 1][-1]] + middles[part[0]]) / 2)
    background = np.searchsorted(np.array(cuts), along, side="right").astype(np.int32)
    inside = dense > 0
    return np.where(inside, cell[dense], np.broadcast_to(background, truth.shape)).astype(np.int32)


@dataclass
class Selection:
    """Averages of candidates, swept on some of the cells; none is swept twice.

    Args:
        maps: (3, Z, Y, X) of each volume, for each candidate.
        volumes: What the candidates were scored on.
        cells: The cell of each voxel of each volume.
        grid: Combinations of thresholds.
        objective: What is minimised, and the guard.
        threads: Of the sweeps.
        sweep_s: What one sweep may take; its grid is thinned to fit.
        deadline: When selection stops with what it has, by `time.perf_counter`.
    """

    maps: Sequence[Sequence[Array]]
    volumes: Sequence[Volume]
    cells: Sequence[Array]
    grid: GridLike
    objective: Objective
    threads: int | None = None
    sweep_s: float | None = None
    deadline: float | None = None
    _swept: dict[tuple[Picks, frozenset[int]], SweepPoint] = field(default_factory=dict)
    _decoded: tuple[Any, list[Array]] | None = None

    def average(self, picks: Picks) -> list[npt.NDArray[np.float16]]:
        """Return the average of the picked candidates on each volume."""
        shares = shares_of(picks)
        return [
            averaged([self.maps[one][number] for one in shares], list(shares.values()))
            for number in range(len(self.volumes))
        ]

    def best_thresholds(self, picks: Picks, cells: frozenset[int]) -> SweepPoint:
        """Return the winner of the sweep of an average on some cells."""
        if (picks, cells) not in self._swept:
            where = [self._where(number, cells) for number in range(len(self.volumes))]
            chosen = [
                number for number, inside in enumerate(where) if self._has_truth(number, inside)
            ]
            maps = self.average(picks)
            self._swept[picks, cells] = sweep(
                [maps[number] for number in chosen],
                [self.volumes[number].label for number in chosen],
                [self.volumes[number].mask for number in chosen],
                self.grid,
                scored_mask=[where[number] for number in chosen],
                objective=self.objective,
                threads=self.threads,
                time_limit_s=self.sweep_s,
            ).winner
        return self._swept[picks, cells]

    def _where(self, number: int, cells: frozenset[int]) -> npt.NDArray[np.bool_]:
        """Return where a volume is scored, as far as it lies in some cells."""
        inside = np.isin(self.cells[number], list(cells))
        scored = self.volumes[number].where_scored
        return inside if scored is None else inside & (scored > 0)

    def _has_truth(self, number: int, where: Array) -> bool:
        """Return whether any instance of a volume lies there."""
        label = self.volumes[number].label
        return label is not None and bool((split_unknown(label, "label")[0][where] > 0).any())

    def choose(self, most: int, cells: frozenset[int]) -> Picks:
        """Return the picks of the best average: one after the other, while each makes it better.

        An average whose F1 is further below the best one's than the guard of the sweep loses.

        Args:
            most: Different candidates at most; each may be picked more than once.
            cells: Where averages are judged.
        """
        picks: Picks = ()
        best: SweepPoint | None = None
        guard = self.objective.guard.f1_below_best
        while len(picks) < 2 * most:
            known = set(picks)
            options = [
                tuple(sorted((*picks, one)))
                for one in range(len(self.maps))
                if one in known or len(known) < most
            ]
            found: dict[Picks, SweepPoint] = {}
            for option in options:
                if best is not None and self._is_late():
                    return picks
                found[option] = self.best_thresholds(option, cells)
            points = [*found.values(), *([best] if best is not None else [])]
            limit = max(float(point.metrics["f1_iou50"]) for point in points) - guard

            def rank(point: SweepPoint, limit: float = limit) -> tuple[bool, float]:
                value = objective_value(point.metrics, self.objective)
                return float(point.metrics["f1_iou50"]) < limit, value

            winner = min(found, key=lambda option: rank(found[option]))
            if best is not None and not rank(found[winner]) < rank(best):
                break
            picks, best = winner, found[winner]
            if most == 1:
                break
        return picks

    def _is_late(self) -> bool:
        """Return whether the time is over."""
        return self.deadline is not None and time.perf_counter() > self.deadline

    def single(self, cells: frozenset[int]) -> Picks:
        """Return the best candidate alone."""
        return self.choose(1, cells)

    def tables(self, picks: Picks, chosen_on: frozenset[int], at: int) -> ContingencyTable | None:
        """Return the overlaps in one cell, with thresholds chosen on others; None: it is empty."""
        tables = []
        for number, labels in enumerate(self._segments(picks, chosen_on)):
            where = self._where(number, frozenset({at}))
            if where.any():
                label = self.volumes[number].label
                assert label is not None, "checked by the split"
                tables.append(contingency_table(prediction=labels, truth=label, mask=where))
        return joined(tables) if tables else None

    def _segments(self, picks: Picks, chosen_on: frozenset[int]) -> list[Array]:
        """Return the segmentation of each volume, with thresholds chosen on some cells."""
        key = (picks, chosen_on)
        if self._decoded is None or self._decoded[0] != key:
            arguments = self.best_thresholds(picks, chosen_on).arguments
            segments = [
                decode(self.grid.decoder, maps, volume.mask, **arguments)
                for maps, volume in zip(self.average(picks), self.volumes, strict=True)
            ]
            self._decoded = (key, segments)
        return self._decoded[1]


@dataclass(frozen=True)
class CrossFitted:
    """What selection gains on instances that it has not seen.

    Args:
        picks: Chosen on everything: what is kept, where it is.
        point: Their thresholds and figures there, where they were chosen.
        single: The best candidate alone, chosen on everything.
        metrics: Of the ensembles of the folds, each on the cells that it was not chosen on.
        single_metrics: The same of the best candidates alone.
        gain: How much smaller the objective is.
        interval: Of the gain, over cells drawn with replacement.
        folds: Picks of the ensemble, and of the single candidate, of each fold.
        cells: How many the interval draws from.
    """

    picks: Picks
    point: SweepPoint
    single: Picks
    metrics: dict[str, Any]
    single_metrics: dict[str, Any]
    gain: float
    interval: tuple[float, float]
    folds: tuple[tuple[Picks, Picks], ...]
    cells: int

    @property
    def is_better(self) -> bool:
        """Return whether the gain is more than noise, and there is more than one network."""
        return self.interval[0] > 0 and len(set(self.picks)) > 1


def cross_fitted(selection: Selection, most: int, *, seed: int = 0) -> CrossFitted:
    """Return the ensemble chosen on everything, and what such a choice gains where it is not seen.

    Args:
        selection: Candidates and where they are judged.
        most: Different candidates of the ensemble at most.
        seed: Of the resampling.

    Raises:
        ValueError: There are fewer than two cells with an instance.
    """
    numbers = sorted(
        {
            int(cell)
            for number, cells in enumerate(selection.cells)
            for cell in np.unique(cells[_truth_of(selection.volumes[number]) > 0])
        }
    )
    if len(numbers) < 2:
        raise ValueError("selection and figure need an instance each, and there is only one")
    folds = [part.tolist() for part in np.array_split(numbers, min(FOLDS, len(numbers)))]
    everything = frozenset(numbers)
    pairs: list[tuple[ContingencyTable, ContingencyTable]] = []
    chosen = []
    for held_out in folds:
        seen = everything - frozenset(held_out)
        picks, single = selection.choose(most, seen), selection.single(seen)
        chosen.append((picks, single))
        both = [
            [selection.tables(which, seen, cell) for cell in held_out] for which in (picks, single)
        ]
        pairs += [(a, b) for a, b in zip(*both, strict=True) if a is not None and b is not None]
    together, alone = ([pair[side] for pair in pairs] for side in range(2))
    metrics, single_metrics = (score(joined(tables)).as_dict() for tables in (together, alone))
    objective = selection.objective
    picks = selection.choose(most, everything)
    # What is kept is decoded with thresholds of the whole grid, however little time there was.
    last = selection if len(set(picks)) == 1 else replace(selection, sweep_s=None, _swept={})
    return CrossFitted(
        picks=picks,
        point=last.best_thresholds(picks, everything),
        single=selection.single(everything),
        metrics=metrics,
        single_metrics=single_metrics,
        gain=objective_value(single_metrics, objective) - objective_value(metrics, objective),
        interval=_interval(together, alone, objective, seed),
        folds=tuple(chosen),
        cells=len(pairs),
    )


def _truth_of(volume: Volume) -> Array:
    """Return the labels of a volume where it is scored, 0 elsewhere."""
    assert volume.label is not None, "checked by the split"
    label, _ = split_unknown(volume.label, "label")
    scored = volume.where_scored
    return label if scored is None else np.where(scored > 0, label, 0)


def _interval(
    together: Sequence[ContingencyTable], alone: Sequence[ContingencyTable], objective: Objective,
    seed: int,
) -> tuple[float, float]:  # fmt: skip
    """Return the percentile interval of the gain over cells drawn with replacement."""
    metric = METRICS[objective.metric]
    rng = np.random.default_rng(seed)
    gains = []
    for _ in range(RESAMPLES):
        drawn = rng.integers(0, len(alone), len(alone))
        values = [
            float(metric.cost(value_of(metric, joined([tables[i] for i in drawn]))))
            for tables in (alone, together)
        ]
        gains.append(values[0] - values[1])
    tail = 100 * (1 - LEVEL) / 2
    return float(np.percentile(gains, tail)), float(np.percentile(gains, 100 - tail))


def selection_of(
    maps: Sequence[Sequence[Array]],
    volumes: Sequence[Volume],
    grid: GridLike,
    objective: Objective,
    *,
    threads: int | None = None,
    sweep_s: float | None = None,
    deadline: float | None = None,
) -> Selection:
    """Return candidates that are ready to be chosen from.

    Args:
        maps: (3, Z, Y, X) of each volume, for each candidate.
        volumes: What they were scored on.
        grid: As for `Selection`.
        objective: As for `Selection`.
        threads: As for `Selection`.
        sweep_s: As for `Selection`.
        deadline: As for `Selection`.
    """
    cells = cells_of([_truth_of(volume) for volume in volumes], CELLS)
    return Selection(
        maps, volumes, cells, grid, objective, threads=threads, sweep_s=sweep_s, deadline=deadline
    )
