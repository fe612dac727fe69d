"""Score every combination of decoding thresholds, exactly, on probabilities predicted once.

One flood serves every foreground combination, and equal seed masks are flooded once. Seeds,
flood and formulas are those of `decode` and `score`, so the results are equal. A decoder without
a sweep form is decoded and scored once for each combination.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, reduce
from operator import add
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from hydralv_tune.config.errors import unknown_name
from hydralv_tune.numerics.cores import usable_cores
from hydralv_tune.numerics.metrics.contingency import joined
from hydralv_tune.numerics.metrics.scores import (
    HEADLINE,
    METRICS,
    f1_from_counts,
    rand_from_sums,
    score,
    value_of,
    voi_from_sums,
)
from hydralv_tune.numerics.watershed import threshold_sums
from hydralv_tune.numerics.watershed.decoders import CONTOUR, DECODERS
from hydralv_tune.trial.scoring.sweep.choice import (
    BOOKKEEPING,
    SweepPoint,
    by_rule,
    costs,
    plateau_of,
    rate,
)
from hydralv_tune.trial.scoring.sweep.grid import (
    Axes,
    Grid,
    GridLike,
    checked_axes,
    count_combinations,
    decoder_arguments_at,
    finer,
    halvings,
    plain_threshold,
)
from hydralv_tune.trial.scoring.sweep.volume import (
    NO_LIMIT,
    WORTH_PRUNING,
    DecodedVolume,
    FloodedVolume,
    Sums,
    SweptVolume,
)

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
        note: A sentence on what made the sweep slow, else none.
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
    note: str | None = None

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
            "note": self.note,
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
        return [_short(row, self.axes, self.metric) for row in best.to_dict("records")]

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
        cost = METRICS[self.metric].cost(table[self.metric])
        rows = cost.groupby([table[name] for name in names]).idxmin()
        return table.loc[rows.to_numpy()].set_index(list(names))


def _short(row: Mapping[Any, Any], axes: Axes, metric: str) -> dict[str, Any]:
    """Return one row of the table with pairs in one column and short names."""
    short: dict[str, Any] = {}
    rest: dict[str, str] = {}
    for axis in axes:
        name, _, part = axis.partition(".")
        if part == "seed":
            words = (_limit(row[f"{name}.{p}"]) for p in ("seed", "foreground"))
            short[name.removesuffix("_threshold")] = ", ".join(words)
        elif not part:
            rest[axis] = axis.removesuffix("_size").replace("instance", "inst").replace("_", " ")
    rest |= {} if metric in HEADLINE else {metric: metric}
    rest |= dict(zip(HEADLINE, ("error", "foreground", "f1"), strict=True))
    rest |= {"instances_predicted": "found", "alike": "alike"}
    return {**short, **{new: plain_threshold(row[name]) for name, new in rest.items()}}


def _limit(value: float) -> str:
    """Return a threshold as short as it can be told."""
    return "off" if np.isinf(value) else f"{value:g}"


def sweep(
    probabilities: Any,
    labels: Any,
    mask: Any,
    grid: GridLike,
    *,
    scored_mask: Any = None,
    objective: Any = None,
    time_limit_s: float | None = None,
    threads: int | None = None,
) -> SweepResult:
    """Return every combination of the grid scored exactly, and the one that wins.

    Among the combinations whose F1 at IoU 0.5 is within `objective.guard.f1_below_best` of the
    best, the smallest adapted Rand error wins; ties within 0.002 go to the higher F1, then to
    the one deepest inside its plateau: it carries over to new data better than one on an edge.

    Memory beside the input: 5.5 bytes a voxel of each volume's box (the mask's bounding box)
    and 35 a node (a voxel that some combination could seed or call foreground, or of distance
    above 0); for each thread 8 bytes a node and 16 a voxel of the widest flood front; 450 bytes
    a combination, of which there may be a million. 100,000 combinations on the plan's volume of
    51 x 516 x 516, without a mask too, take 0.45 GB in all, Python and the input included; 1 GB
    is promised and tested.

    Args:
        probabilities: (3, Z, Y, X) floats, or a list of such; the sums of several volumes add
            up, and each volume keeps its own instances.
        labels: (Z, Y, X) integers, or as many.
        mask: (Z, Y, X), where there is tissue: the flood is confined to it. Or as many, or none.
        grid: `Grid`, or what looks like one.
        scored_mask: The same, where the truth is known: the score is made in it, and in the
            mask. Where the mask is without.
        objective: Has `metric`, a key of `METRICS`, and `guard.f1_below_best`; adapted Rand error
            and 0.05 without.
        time_limit_s: Nested grids from coarse to fine are scored until the next would not fit.
        threads: As many as there are cores without.

    Raises:
        ValueError: The input or the grid breaks a rule, or a volume has no truth in its mask.
    """
    metric, guard = _checked(objective, time_limit_s, threads)
    compile_s = warm_up()
    clock = _Clock(time.perf_counter(), NO_LIMIT if time_limit_s is None else time_limit_s)
    axes = checked_axes(grid)
    volumes = _volumes(probabilities, labels, mask, scored_mask, grid, axes, metric)
    runner = _Runner(volumes, threads or usable_cores(), clock)
    grids = [runner.first(axes)]
    tables = [_table(volumes, grids[0], metric)]
    for number in range(1, grid.refine + 1):
        around = _around(tables, grids, metric, guard, 0.5**number)
        if not runner.another(around):
            runner.rounds_left_out = grid.refine + 1 - number
            break
        grids.append(around)
        tables.append(_table(volumes, around, metric))
    table = _rated(tables, grids, metric, guard)
    chosen = _result(table, grids, grid, metric, guard, volumes)
    return replace(
        chosen,
        seconds=clock.seconds,
        compile_s=compile_s,
        thinned=runner.thinning_note(axes, grids),
        note=_note(grid, metric, runner),
    )


def _checked(objective: Any, time_limit_s: float | None, threads: int | None) -> tuple[str, float]:
    """Return metric and guard of an objective, all settings checked."""
    metric = str(getattr(objective, "metric", HEADLINE[0]))
    if metric not in METRICS:
        raise ValueError(unknown_name("metric", metric, METRICS))
    if time_limit_s is not None and not time_limit_s >= 0:
        raise ValueError(f"time_limit_s is {time_limit_s}, but must be 0 or more seconds")
    if threads is not None and threads < 1:
        raise ValueError(f"threads is {threads}, but it must be at least 1")
    return metric, float(getattr(getattr(objective, "guard", None), "f1_below_best", 0.05))


def _note(grid: GridLike, metric: str, runner: _Runner) -> str | None:
    """Return a sentence on what made the sweep slow, or none."""
    if DECODERS[grid.decoder].sweep is None:
        return (
            f"{grid.decoder} has no sweep form, so each of {runner.done:,} combinations was "
            f"decoded: {runner.seconds / max(runner.done, 1):.3g} s each"
        )
    if not METRICS[metric].stacked:
        return f"{metric} was computed for each combination alone, which takes most of the time"
    return None


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
            self._run(set(axes.keys_of()), NO_LIMIT)
            return axes
        reached: Axes | None = None
        seen: set[Any] = set()
        for nested in halvings(axes):
            new = set(nested.keys_of()) - seen
            # The coarsest grid, one flood, runs whatever the limit: a sweep has a result.
            if reached and not self._fits(len(new)):
                break
            if not self._run(new, self.clock.deadline if reached else NO_LIMIT):
                break
            reached, seen = nested, seen | new
        assert reached is not None, "the coarsest grid runs without a limit"
        return reached

    def another(self, axes: Axes) -> bool:
        """Flood one more grid, with foreground thresholds of its own, if there is time."""
        keys = set(axes.keys_of())
        if not self._fits(len(keys)):
            return False
        for volume in self.volumes:
            volume.fit(axes)
        return self._run(keys, self.clock.deadline)

    def thinning_note(self, axes: Axes, grids: Sequence[Axes]) -> str | None:
        """Return a sentence that says what the time limit cost, or none."""
        before, after = count_combinations(axes), count_combinations(grids[0])
        if before == after and not self.rounds_left_out:
            return None
        rounds = self.rounds_left_out
        refined = f", and {rounds} rounds of refinement left out" if rounds else ""
        whole = self.seconds / self.done * len(set(axes.keys_of()))
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
    probabilities: Any, labels: Any, mask: Any, scored: Any, grid: GridLike, axes: Axes, metric: str
) -> list[SweptVolume]:
    """Return the volumes made ready."""
    maps, truths = _listed(probabilities), _listed(labels)
    masks, known = ([None] * len(maps) if m is None else _listed(m) for m in (mask, scored))
    if not len(maps) == len(truths) == len(masks) == len(known) or not maps:
        raise ValueError(
            f"{len(maps)} probabilities, {len(truths)} labels, {len(masks)} masks and "
            f"{len(known)} scored masks: give the same number of each"
        )
    kind = DecodedVolume if DECODERS[grid.decoder].sweep is None else FloodedVolume
    ready: list[SweptVolume] = []
    for number, parts in enumerate(zip(maps, truths, masks, known, strict=True), 1):
        try:
            ready.append(kind(*parts, grid, axes, entropy=metric == "voi"))
        except ValueError as error:
            place = f"volume {number} of {len(maps)}: " if len(maps) > 1 else ""
            raise ValueError(f"{place}{error}") from error
    return ready


def _table(volumes: Sequence[SweptVolume], axes: Axes, metric: str) -> pd.DataFrame:
    """Return the table of all combinations of one grid."""
    columns = np.meshgrid(*[np.array(values) for values in axes.values()], indexing="ij")
    figures = {name: column.ravel() for name, column in zip(axes, columns, strict=True)}
    figures |= _figures(reduce(add, (volume.sums(axes) for volume in volumes)))
    if metric not in figures:
        figures[metric] = _from_stacks(volumes, axes, metric)
    return pd.DataFrame(figures)


def _figures(sums: Sums) -> dict[str, Any]:
    """Return the figures that every table of a sweep has, from sums over instances."""
    counts, sizes = sums.counts, sums.truth_sizes
    uncovered = int(sizes.sum()) - counts[threshold_sums.COVERED]
    shared: dict[str, Any] = {
        "pair_squares": counts[threshold_sums.PAIR_SQUARES],
        "truth_squares": np.square(sizes).sum(),
        "uncovered_share": uncovered / np.float64(sums.voxels),
    }
    error, precision, recall = rand_from_sums(
        segment_squares=counts[threshold_sums.SEGMENT_SQUARES], **shared
    )
    grown, _, _ = rand_from_sums(segment_squares=counts[threshold_sums.WHOLE_SQUARES], **shared)
    predicted, matched = counts[threshold_sums.INSTANCES], counts[threshold_sums.MATCHED]
    figures = {
        "adapted_rand_error": error,
        "adapted_rand_precision": precision,
        "adapted_rand_recall": recall,
        "adapted_rand_error_foreground": grown,
        "f1_iou50": f1_from_counts(matched=matched, predicted=predicted, true=np.array(len(sizes))),
        "instances_predicted": predicted,
        "matched_iou50": matched,
    }
    if len(sums.logs):
        split, merge = voi_from_sums(
            pair_logs=sums.logs[threshold_sums.PAIR_LOGS],
            segment_logs=sums.logs[threshold_sums.SEGMENT_LOGS],
            truth_sizes=sizes,
            uncovered=uncovered,
        )
        figures |= {"voi_split": split, "voi_merge": merge, "voi": split + merge}
    return figures


def _from_stacks(volumes: Sequence[SweptVolume], axes: Axes, metric: str) -> Array:
    """Return a metric of every combination that the sums do not give, flood by flood."""
    entry = METRICS[metric]
    known: dict[Any, Any] = {}
    values = []
    for key in axes.keys_of():
        rows = tuple(volume.row_of[key] for volume in volumes)
        if rows not in known:
            stack = joined([volume.stack(key) for volume in volumes])
            if entry.stacked or stack.pair_voxels.ndim == 1:
                known[rows] = np.atleast_1d(np.asarray(entry.of_table(stack), np.float64))
            else:
                columns = range(stack.segment_sizes.shape[1])
                known[rows] = np.array([value_of(entry, stack.column(c)) for c in columns])
        values.append(known[rows])
    return np.concatenate(values)


def _rated(
    tables: Sequence[pd.DataFrame], grids: Sequence[Axes], metric: str, guard: float
) -> pd.DataFrame:
    """Return all grids in one table, rated together."""
    table = pd.concat([t.assign(round=n) for n, t in enumerate(tables)], ignore_index=True)
    shapes = [[len(values) for values in axes.values()] for axes in grids]
    rate(table, shapes, metric, guard)
    return table


def _around(
    tables: Sequence[pd.DataFrame], grids: Sequence[Axes], metric: str, guard: float, step: float
) -> Axes:
    """Return a finer grid around the winner so far."""
    table = _rated(tables, grids, metric, guard)
    winner = table.iloc[by_rule(table, metric)[0]]
    return finer(grids[0], {name: winner[name] for name in grids[0]}, step)


def _result(
    table: pd.DataFrame, grids: Sequence[Axes], grid: GridLike, metric: str, guard: float,
    volumes: Sequence[SweptVolume],
) -> SweepResult:  # fmt: skip
    """Return the result of rated grids; a combination that two grids hold is kept once."""
    names = list(grids[0])
    winner = int(by_rule(table, metric)[0])
    cost, f1 = costs(table, metric), table["f1_iou50"].to_numpy()
    own = int(table["round"].iloc[winner])
    axes = grids[own]
    shape = [len(values) for values in axes.values()]
    first = sum(count_combinations(earlier) for earlier in grids[:own])
    near = table["near_tie"].to_numpy()[first : first + count_combinations(axes)].reshape(shape)
    at = [int(index) for index in np.unravel_index(winner - first, shape)]
    width, spans = plateau_of(near, at, axes)
    best = (winner, int(np.lexsort((cost, -f1))[0]), int(np.lexsort((-f1, cost))[0]))
    points = {
        row: _point({name: table[name].iloc[row] for name in names}, axes, grid, volumes)
        for row in set(best)
    }
    table = table.drop_duplicates(names, ignore_index=True) if len(grids) > 1 else table
    return SweepResult(
        table=table,
        winner=points[best[0]],
        best_by_f1=points[best[1]],
        best_unguarded=points[best[2]],
        plateau_width=width,
        plateau=spans,
        axes=grids[0],
        combinations=len(table),
        seconds=0.0,
        compile_s=0.0,
        metric=metric,
        guard=guard,
        thinned=None,
    )


def _point(
    row: Mapping[str, Any], axes: Axes, grid: GridLike, volumes: Sequence[SweptVolume]
) -> SweepPoint:
    """Return one row under the decoder's own argument names, with every figure of a score."""
    only = axes.with_values({name: (row[name],) for name in axes})
    (key,) = only.keys_of()
    for volume in volumes:
        volume.fit(only)
    table = joined([volume.stack(key) for volume in volumes])
    scored = score(table if table.pair_voxels.ndim == 1 else table.column(0)).as_dict()
    figures = {
        name: value
        for name, value in scored.items()
        if name in METRICS or name in ("instances_predicted", "matched_iou50", "by_size")
    }
    return SweepPoint(decoder_arguments_at(grid, row), figures)


@cache
def warm_up() -> float:
    """Compile what a sweep runs, or read it from Numba's cache on disk; return the seconds.

    The first call in a process alone takes time: 7 s where nothing is cached, else 0.2 s.
    """
    start = time.perf_counter()
    maps = np.zeros((3, 2, 2, 2), np.float32)
    maps[(0, 2), 0, 0, 0] = 0.9
    labels = np.ones((2, 2, 2), np.uint8)
    for decoder in (CONTOUR, "decode_instance_watershed_distance"):
        seeds = tuple(0.1 * step for step in range(1, WORTH_PRUNING + 1))
        axes = checked_axes(Grid(decoder, {"distance_threshold.seed": seeds}))
        volume = FloodedVolume(maps, labels, None, None, Grid(decoder, {}), axes, entropy=False)
        keys = list(axes.keys_of())
        for some in (keys[:1], keys):  # as a whole, and by part
            volume.fit(axes)
            volume.run(some, 1)
        volume.stack(keys[0])
    return time.perf_counter() - start
