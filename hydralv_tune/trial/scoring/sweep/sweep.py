"""Score every combination of decoding thresholds, exactly, on probabilities predicted once.

One flood serves every foreground combination, equal seed masks are flooded once, and seeds,
flood and sums are those of `decode` and `score`, so the results are equal.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, reduce
from operator import add
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from hydralv_tune.config.errors import unknown_name
from hydralv_tune.numerics.metrics import scores
from hydralv_tune.numerics.watershed import threshold_sums
from hydralv_tune.trial.scoring.sweep.choice import (
    BOOKKEEPING,
    HIGHER_IS_BETTER,
    METRICS,
    SweepPoint,
    by_rule,
    costs,
    judge,
    plain,
    plateau_of,
    point,
)
from hydralv_tune.trial.scoring.sweep.grid import (
    PAIRS,
    Axes,
    Grid,
    GridLike,
    checked_axes,
    count,
    finer,
    halvings,
    slow_combinations,
)
from hydralv_tune.trial.scoring.sweep.volume import NO_LIMIT, Sums, SweptVolume

__all__ = ["Grid", "GridLike", "SweepPoint", "SweepResult", "sweep", "warm_up"]

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class SweepResult:
    """Every combination, and the three worth a look.

    Args:
        table: One row a combination: axes, figures, `round` (0, or that of the refinement),
            `within_guard`, `near_tie` and `depth` (steps inside the plateau).
        winner: By the rule of `sweep`.
        best_by_f1: The highest F1, whatever the metric says.
        best_unguarded: The best of the metric, whatever F1 says.
        plateau_width: How many combinations the winner's plateau holds.
        plateau: Its values on each axis, through the winner.
        axes: Of the first grid.
        combinations: Rows of the table.
        seconds: Without compiling, which `compile_s` holds.
        metric: What was compared.
        guard: How far F1 may be below the best.
        thinned: A sentence where the time limit cost combinations or refinement, else none.
    """

    table: pd.DataFrame
    winner: SweepPoint
    best_by_f1: SweepPoint
    best_unguarded: SweepPoint
    plateau_width: int
    plateau: dict[str, list[Any]]
    axes: Axes
    combinations: int
    seconds: float
    compile_s: float
    metric: str
    guard: float
    thinned: str | None

    def as_mapping(self) -> dict[str, Any]:
        """Return what a record keeps, as plain JSON types."""
        return {
            "combinations": self.combinations,
            "seconds": self.seconds,
            "combinations_per_s": self.combinations / max(self.seconds, 1e-9),
            "compile_s": self.compile_s,
            "metric": self.metric,
            "best": self.winner.as_mapping(),
            "winner": self.winner.as_mapping(),
            "best_by_f1": self.best_by_f1.as_mapping(),
            "best_unguarded": self.best_unguarded.as_mapping(),
            "plateau_width": self.plateau_width,
            "plateau": self.plateau,
            "thinned": self.thinned,
        }

    def best_rows(self, count: int) -> list[dict[str, Any]]:
        """Return the best outcomes as rows for a terminal, the winner first.

        Combinations with equal figures are one row, that of the best by the rule, and `alike`
        says how many they are.
        """
        figures = [name for name in self.table.columns if name not in (*self.axes, *BOOKKEEPING)]
        alike = self.table.groupby(figures)[figures[0]].transform("size").rename("alike")
        ordered = self.table.assign(alike=alike).iloc[by_rule(self.table, self.metric)]
        best = ordered.drop_duplicates(figures).head(count)
        return [_short(row, self.metric) for row in best.to_dict("records")]

    def important_axes(self) -> list[str]:
        """Return the axes with several values, the one that moves the metric most first.

        An axis moves it by the spread of what the rule reaches at each of its values.
        """
        moving = [name for name, values in self.axes.items() if len(values) > 1]
        spread = {name: float(np.ptp(self._best_at([name])[self.metric])) for name in moving}
        return sorted(moving, key=lambda name: -spread[name])

    def heatmap(self, column: str | None = None) -> pd.DataFrame:
        """Return what the rule reaches at each pair of values of the two most important axes.

        Args:
            column: The figure to show; the metric where none is given.

        Returns:
            One axis down, the other across; one column remains where only one axis moves.
        """
        names = self.important_axes()[:2] or list(self.axes)[:1]
        best = self._best_at(names)[column or self.metric]
        return best.unstack() if len(names) == 2 else best.to_frame()

    def _best_at(self, names: Sequence[str]) -> pd.DataFrame:
        """Return, for each combination of some axes, the row that the guarded rule picks."""
        table = self.table[self.table["round"] == 0]
        best_f1 = table.groupby(list(names))["f1_iou50"].transform("max")
        table = table[table["f1_iou50"] >= best_f1 - self.guard]
        cost = table[self.metric] * (-1.0 if self.metric in HIGHER_IS_BETTER else 1.0)
        rows = cost.groupby([table[name] for name in names]).idxmin()
        return table.loc[rows.to_numpy()].set_index(list(names))


def _short(row: Mapping[Any, Any], metric: str) -> dict[str, Any]:
    """Return one row of the table with pairs in one column and short names."""
    short: dict[str, Any] = {}
    for name in PAIRS:
        if f"{name}.seed" in row:
            pair = (row[f"{name}.seed"], row[f"{name}.foreground"])
            words = ["off" if np.isinf(value) else f"{value:g}" for value in pair]
            short[name.removesuffix("_threshold")] = ", ".join(words)
    names = {"min_seed_size": "min seed", "min_instance_size": "min inst"}
    names |= {} if metric in METRICS[:3] else {metric: metric}
    names |= dict(zip(METRICS[:3], ("error", "foreground", "f1"), strict=True))
    names |= {"instances_predicted": "found", "alike": "alike"}
    return {**short, **{new: plain(row[name]) for name, new in names.items()}}


def sweep(
    probabilities: Any,
    labels: Any,
    mask: Any,
    grid: GridLike,
    *,
    objective: Any = None,
    time_limit_s: float | None = None,
    threads: int | None = None,
) -> SweepResult:
    """Return every combination of the grid scored exactly, and the one that wins.

    Among the combinations whose F1 at IoU 0.5 is within `objective.guard.f1_below_best` of the
    best, the smallest adapted Rand error wins; ties within 0.002 go to the higher F1, then to
    the one deepest inside its plateau: it carries over to new data better than one on an edge.

    Memory beside the input: 4.25 bytes a voxel of each volume's box (the mask's bounding box)
    and 25 a node (a voxel that some combination could seed or call foreground, or of distance
    above 0); for each thread 8 bytes a node and 16 a voxel of the widest flood front; 450 bytes
    a combination, of which there may be a million. 100,000 combinations on the plan's volume of
    51 x 516 x 516, without a mask too, take 0.45 GB in all, Python and the input included; 1 GB
    is promised and tested.

    Args:
        probabilities: (3, Z, Y, X) floats, or a list of such; the sums of several volumes add
            up, and each volume keeps its own instances.
        labels: (Z, Y, X) integers, or as many.
        mask: (Z, Y, X), or as many, or none.
        grid: `Grid`, or what looks like one.
        objective: Has `metric` and `guard.f1_below_best`; adapted Rand error and 0.05 without.
            `voi` is split + merge.
        time_limit_s: Nested grids from coarse to fine are scored until the next would not fit.
        threads: As many as there are cores without.

    Raises:
        ValueError: The input or the grid breaks a rule, or a volume has no truth in its mask.
    """
    metric, guard = _checked(objective, time_limit_s, threads)
    compile_s = warm_up()
    clock = _Clock(time.perf_counter(), NO_LIMIT if time_limit_s is None else time_limit_s)
    axes = checked_axes(grid)
    volumes = _volumes(probabilities, labels, mask, grid, axes, metric == "voi")
    runner = _Runner(volumes, threads or _cores(), clock)
    grids = [runner.first(axes)]
    tables = [_table(runner.sums(grids[0]), grids[0])]
    for number in range(1, grid.refine + 1):
        around = _around(tables, grids, metric, guard, 0.5**number)
        if not runner.another(around):
            runner.rounds_left_out = grid.refine + 1 - number
            break
        grids.append(around)
        tables.append(_table(runner.sums(around), around))
    table = _joined(tables, grids, metric, guard)
    return _result(table, grids, grid, metric, guard, clock, compile_s, runner.told(axes, grids))


def _checked(objective: Any, time_limit_s: float | None, threads: int | None) -> tuple[str, float]:
    """Return metric and guard of an objective, all settings checked."""
    metric = str(getattr(objective, "metric", METRICS[0]))
    if metric not in METRICS:
        raise ValueError(unknown_name("metric", metric, METRICS))
    if time_limit_s is not None and not time_limit_s >= 0:
        raise ValueError(f"time_limit_s is {time_limit_s}, but it is a number of seconds from 0 on")
    if threads is not None and threads < 1:
        raise ValueError(f"threads is {threads}, but at least one must work")
    return metric, float(getattr(getattr(objective, "guard", None), "f1_below_best", 0.05))


def _cores() -> int:
    """Return how many cores this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux alone has it
    return len(affinity(0)) if affinity else os.cpu_count() or 1


@dataclass
class _Clock:
    """When a sweep began, and how long it may take."""

    start: float
    limit_s: float

    @property
    def deadline(self) -> float:
        """Return when it must end."""
        return self.start + self.limit_s

    @property
    def seconds(self) -> float:
        """Return how long it has taken."""
        return time.perf_counter() - self.start


@dataclass
class _Runner:
    """Floods grids on all volumes while there is time, and knows what it left out."""

    volumes: Sequence[SweptVolume]
    threads: int
    clock: _Clock
    seconds: float = 0.0
    done: int = 0
    rounds_left_out: int = 0

    def first(self, axes: Axes) -> Axes:
        """Return the finest of the nested grids for which there was time, flooded."""
        if self.clock.limit_s == NO_LIMIT:
            self._run(set(slow_combinations(axes)), NO_LIMIT)
            return axes
        reached: Axes = {}
        seen: set[Any] = set()
        for nested in halvings(axes):
            new = set(slow_combinations(nested)) - seen
            # The coarsest grid, one flood, runs whatever the limit: a sweep has a result.
            if reached and not self._fits(len(new)):
                break
            if not self._run(new, self.clock.deadline if reached else NO_LIMIT):
                break
            reached, seen = nested, seen | new
        return reached

    def another(self, axes: Axes) -> bool:
        """Flood one more grid, with foreground thresholds of its own, if there is time."""
        keys = set(slow_combinations(axes))
        if not self._fits(len(keys)):
            return False
        for volume in self.volumes:
            volume.fit(axes)
        return self._run(keys, self.clock.deadline)

    def sums(self, axes: Axes) -> Sums:
        """Return the sums of all volumes together."""
        return reduce(add, (volume.sums(axes) for volume in self.volumes))

    def told(self, axes: Axes, grids: Sequence[Axes]) -> str | None:
        """Return a sentence that says what the time limit cost, or none."""
        before, after = count(axes), count(grids[0])
        if before == after and not self.rounds_left_out:
            return None
        rounds = self.rounds_left_out
        refined = f", and {rounds} rounds of refinement left out" if rounds else ""
        whole = self.seconds / self.done * len(set(slow_combinations(axes)))
        return (
            f"{after:,} of {before:,} combinations scored{refined}: the whole grid takes about "
            f"{whole:.1f} s, and the limit is {self.clock.limit_s:.1f} s"
        )

    def _fits(self, combinations: int) -> bool:
        """Return whether so many more would end in time, at the pace so far."""
        pace = self.seconds / max(self.done, 1)
        return time.perf_counter() + pace * combinations <= self.clock.deadline

    def _run(self, keys: set[Any], deadline: float) -> bool:
        """Run combinations of the slow axes on all volumes; return whether all are done."""
        start = time.perf_counter()
        ordered = sorted(keys)
        done = all(volume.run(ordered, self.threads, deadline) for volume in self.volumes)
        self.seconds += time.perf_counter() - start
        self.done += len(keys)
        return done


def _listed(values: Any) -> list[Any]:
    """Return one volume, or several, as a list."""
    return list(values) if isinstance(values, list | tuple) else [values]


def _volumes(
    probabilities: Any, labels: Any, mask: Any, grid: GridLike, axes: Axes, entropy: bool
) -> list[SweptVolume]:
    """Return the volumes made ready."""
    maps, truths = _listed(probabilities), _listed(labels)
    masks = [None] * len(maps) if mask is None else _listed(mask)
    if not len(maps) == len(truths) == len(masks) or not maps:
        raise ValueError(
            f"{len(maps)} probabilities, {len(truths)} labels and {len(masks)} masks: give as "
            "many of each"
        )
    ready = []
    for number, (one, truth, valid) in enumerate(zip(maps, truths, masks, strict=True), 1):
        try:
            ready.append(SweptVolume(one, truth, valid, grid, axes, entropy=entropy))
        except ValueError as error:
            place = f"volume {number} of {len(maps)}: " if len(maps) > 1 else ""
            raise ValueError(f"{place}{error}") from error
    return ready


def _table(sums: Sums, axes: Axes) -> pd.DataFrame:
    """Return the table of all combinations of one grid."""
    counts, sizes = sums.counts, sums.truth_sizes
    uncovered = int(sizes.sum()) - counts[threshold_sums.COVERED]
    shared: dict[str, Any] = {
        "pair_squares": counts[threshold_sums.PAIR_SQUARES],
        "truth_squares": np.square(sizes).sum(),
        "uncovered_share": uncovered / np.float64(sums.voxels),
    }
    error, precision, recall = scores.rand_from_sums(
        segment_squares=counts[threshold_sums.SEGMENT_SQUARES], **shared
    )
    grown, _, _ = scores.rand_from_sums(
        segment_squares=counts[threshold_sums.WHOLE_SQUARES], **shared
    )
    predicted, matched = counts[threshold_sums.INSTANCES], counts[threshold_sums.MATCHED]
    columns = np.meshgrid(*[np.array(values) for values in axes.values()], indexing="ij")
    figures = {name: column.ravel() for name, column in zip(axes, columns, strict=True)}
    figures |= {
        "adapted_rand_error": error,
        "adapted_rand_precision": precision,
        "adapted_rand_recall": recall,
        "adapted_rand_error_foreground": grown,
        "f1_iou50": scores.f1_from_counts(
            matched=matched, predicted=predicted, true=np.array(len(sizes))
        ),
        "instances_predicted": predicted,
        "matched_iou50": matched,
    }
    if len(sums.logs):
        split, merge = scores.voi_from_sums(
            pair_logs=sums.logs[threshold_sums.PAIR_LOGS],
            segment_logs=sums.logs[threshold_sums.SEGMENT_LOGS],
            truth_sizes=sizes,
            uncovered=uncovered,
        )
        figures |= {"voi_split": split, "voi_merge": merge, "voi": split + merge}
    return pd.DataFrame(figures)


def _joined(
    tables: Sequence[pd.DataFrame], grids: Sequence[Axes], metric: str, guard: float
) -> pd.DataFrame:
    """Return all grids in one table, judged together."""
    table = pd.concat([t.assign(round=n) for n, t in enumerate(tables)], ignore_index=True)
    shapes = [[len(values) for values in axes.values()] for axes in grids]
    judge(table, shapes, metric, guard)
    return table


def _around(
    tables: Sequence[pd.DataFrame], grids: Sequence[Axes], metric: str, guard: float, step: float
) -> Axes:
    """Return a finer grid around the winner so far."""
    table = _joined(tables, grids, metric, guard)
    winner = table.iloc[by_rule(table, metric)[0]]
    return finer(grids[0], {name: winner[name] for name in grids[0]}, step)


def _result(
    table: pd.DataFrame, grids: Sequence[Axes], grid: GridLike, metric: str, guard: float,
    clock: _Clock, compile_s: float, thinned: str | None,
) -> SweepResult:  # fmt: skip
    """Return the result of judged grids; a combination that two grids hold is kept once."""
    names = list(grids[0])
    winner = int(by_rule(table, metric)[0])
    cost, f1 = costs(table, metric), table["f1_iou50"].to_numpy()
    own = int(table["round"].iloc[winner])
    axes = grids[own]
    shape = [len(values) for values in axes.values()]
    first = sum(count(earlier) for earlier in grids[:own])
    near = table["near_tie"].to_numpy()[first : first + count(axes)].reshape(shape)
    at = [int(index) for index in np.unravel_index(winner - first, shape)]
    width, spans = plateau_of(near, at, axes)
    points = [
        point(table, row, axes, grid)
        for row in (winner, int(np.lexsort((cost, -f1))[0]), int(np.lexsort((-f1, cost))[0]))
    ]
    table = table.drop_duplicates(names, ignore_index=True) if len(grids) > 1 else table
    return SweepResult(
        table=table,
        winner=points[0],
        best_by_f1=points[1],
        best_unguarded=points[2],
        plateau_width=width,
        plateau=spans,
        axes=grids[0],
        combinations=len(table),
        seconds=clock.seconds,
        compile_s=compile_s,
        metric=metric,
        guard=guard,
        thinned=thinned,
    )


@cache
def warm_up() -> float:
    """Compile what a sweep runs, or read it from Numba's cache on disk; return the seconds.

    The first call in a process alone takes time: 7 s where nothing is cached, else 0.2 s.
    """
    start = time.perf_counter()
    maps = np.zeros((3, 2, 2, 2), np.float32)
    maps[:, 0, 0, 0] = 0.5
    labels = np.ones((2, 2, 2), np.uint8)
    for decoder in (
        "decode_instance_binary_contour_distance",
        "decode_instance_watershed_distance",
    ):
        grid = Grid(decoder, {"distance_threshold.seed": (0.1,)})
        axes = checked_axes(grid)
        volume = SweptVolume(maps, labels, None, grid, axes, entropy=True)
        volume.run(slow_combinations(axes), 1)
        volume.sums(axes)
    return time.perf_counter() - start
