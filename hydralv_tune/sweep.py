"""Score every combination of decoding thresholds, exactly, on probabilities predicted once.

One flood serves every foreground combination, equal seed masks are flooded once, and seeds,
flood and sums are those of `decode` and `score`, so the results are equal.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from threading import Lock
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pandas as pd

from hydralv_tune import metrics
from hydralv_tune.decoding import (
    EVERYWHERE,
    Field,
    above,
    checked_probabilities,
    checked_size,
    contour_field,
    decoder_arguments,
    distance_field,
    foreground_ranks,
)
from hydralv_tune.flood import components, fingerprint, flood, keep_large, tally

Array = npt.NDArray[Any]

PAIRS = ("binary_threshold", "contour_threshold", "distance_threshold")
SIZES = ("min_seed_size", "min_instance_size")
NEAR_TIE = 0.002
METRICS = ("adapted_rand_error", "adapted_rand_error_foreground", "f1_iou50")


class GridLike(Protocol):
    """What a grid must offer; `Grid` and the search space's grid both do."""

    @property
    def decoder(self) -> str: ...
    @property
    def axes(self) -> Mapping[str, Sequence[Any]]: ...
    @property
    def fixed(self) -> Mapping[str, Any]: ...
    @property
    def refine(self) -> int: ...


@dataclass(frozen=True)
class Grid:
    """The combinations to score: `binary_threshold.seed` and the like, and plain sizes."""

    decoder: str
    axes: Mapping[str, Sequence[Any]]
    fixed: Mapping[str, Any] = field(default_factory=dict)
    refine: int = 0


@dataclass(frozen=True)
class SweepPoint:
    """One combination: the decoder's arguments and every figure it gets."""

    arguments: dict[str, Any]
    metrics: dict[str, float | int]

    def as_mapping(self) -> dict[str, Any]:
        """Return arguments and figures as plain JSON types, in one mapping."""
        return {**self.arguments, **self.metrics}


@dataclass(frozen=True)
class SweepResult:
    """Every combination, and the three worth a look."""

    table: pd.DataFrame
    winner: SweepPoint
    best_by_f1: SweepPoint
    best_unguarded: SweepPoint
    plateau_width: int
    plateau: dict[str, list[Any]]
    axes: dict[str, tuple[Any, ...]]
    combinations: int
    seconds: float
    metric: str
    thinned: str | None

    def as_mapping(self) -> dict[str, Any]:
        """Return what a record keeps, as plain JSON types."""
        return {
            "combinations": self.combinations,
            "seconds": self.seconds,
            "combinations_per_s": self.combinations / max(self.seconds, 1e-9),
            "best": self.winner.as_mapping(),
            "winner": self.winner.as_mapping(),
            "best_by_f1": self.best_by_f1.as_mapping(),
            "best_unguarded": self.best_unguarded.as_mapping(),
            "plateau_width": self.plateau_width,
            "plateau": self.plateau,
            "thinned": self.thinned,
        }

    def best_rows(self, count: int) -> list[dict[str, Any]]:
        """Return the best combinations as plain rows, the winner's rule first."""
        rows = self.table.sort_values(
            ["within_guard", self.metric, "f1_iou50"],
            ascending=[False, self.metric == "f1_iou50", False],
            kind="stable",
        ).head(count)
        return [{str(k): _plain(v) for k, v in row.items()} for row in rows.to_dict("records")]

    def heatmap(self) -> pd.DataFrame:
        """Return the best value over the two axes that matter most, as rows and columns.

        An axis matters by the spread of the best value along it. One column remains where
        only one axis has several values.
        """
        pick = "max" if self.metric == "f1_iou50" else "min"
        moving = [name for name, values in self.axes.items() if len(values) > 1]
        spread = {
            name: float(np.ptp(self.table.groupby(name)[self.metric].agg(pick).to_numpy()))
            for name in moving
        }
        names = sorted(moving, key=lambda name: -spread[name])[:2] or list(self.axes)[:1]
        best = self.table.groupby(names)[self.metric].agg(pick)
        return best.unstack() if len(names) == 2 else best.to_frame()


def _plain(value: Any) -> Any:
    """Return a NumPy scalar as a Python one; no threshold, infinity, becomes None."""
    value = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(value, float) and not np.isfinite(value) else value


def checked_axes(grid: GridLike) -> dict[str, tuple[Any, ...]]:
    """Return every axis of the decoder in order; what the grid leaves out has one value.

    Raises:
        ValueError: The decoder or an axis is unknown, an axis is empty, or a value is wrong.
    """
    known = decoder_arguments(grid.decoder)
    defaults = {**known, **grid.fixed}
    for key in grid.fixed:
        if key not in known:
            raise ValueError(f"Unknown argument '{key}' of {grid.decoder}. Known: {sorted(known)}.")
    axes: dict[str, tuple[Any, ...]] = {}
    for name in (name for name in (*PAIRS, *SIZES) if name in known):
        if name in SIZES:
            axes[name] = (defaults[name],)
            continue
        if not isinstance(defaults[name], Sequence) or len(defaults[name]) != 2:
            raise ValueError(f"{name} is {defaults[name]!r}, but it is a pair: [seed, foreground]")
        for part, value in zip(("seed", "foreground"), defaults[name], strict=True):
            axes[f"{name}.{part}"] = (value,)
    for name, values in grid.axes.items():
        if name not in axes:
            raise ValueError(f"Unknown axis '{name}' of {grid.decoder}. Known: {', '.join(axes)}.")
        if isinstance(values, str) or not isinstance(values, Sequence) or not len(values):
            raise ValueError(f"axis {name} is {values!r}, but it needs at least one value")
        axes[name] = tuple(values)
    for name, values in axes.items():
        axes[name] = tuple(dict.fromkeys(_axis_value(name, value) for value in values))
    return axes


def _axis_value(name: str, value: Any) -> float | int:
    """Return one checked value of an axis; None of a contour is infinity."""
    if name in SIZES:
        return checked_size(name, value)
    if value is None and name.startswith("contour_threshold"):
        return float(np.inf)
    if not isinstance(value, int | float | np.number) or isinstance(value, bool):
        raise ValueError(f"{name} holds {value!r}, but a threshold is a number")
    if np.isnan(value) or (np.isinf(value) and not name.startswith("contour")):
        raise ValueError(f"{name} holds {value!r}, but a threshold is a finite number")
    return float(value)


@dataclass(frozen=True)
class _Volume:
    """One volume made ready: what the flood needs, and the truth at each node."""

    field: Field
    truth: npt.NDArray[np.int32]
    truth_sizes: npt.NDArray[np.int64]
    voxels: int
    words: npt.NDArray[np.uint64]


def _prepare(maps: Array, labels: Array, mask: Array | None, grid: GridLike, low: float) -> _Volume:
    """Return a volume made ready for every combination."""
    maps = checked_probabilities(maps)
    labels = metrics.checked_labels(labels, "label")
    if labels.shape != maps.shape[1:]:
        raise ValueError(f"label has shape {labels.shape}, but probabilities have {maps.shape[1:]}")
    valid = metrics.checked_mask(mask, labels.shape)
    if "flood" in decoder_arguments(grid.decoder):
        extra = {key: grid.fixed[key] for key in ("flood", "floor") if key in grid.fixed}
        ready = contour_field(maps, mask, **extra)
    else:
        ready = distance_field(maps[2], mask, low)
    inside = labels > 0 if valid is None else (labels > 0) & valid
    ids, sizes = np.unique(labels[inside], return_counts=True)
    if not len(ids):
        raise ValueError(metrics.EMPTY_TRUTH)
    at_nodes = labels.ravel()[ready.nodes.voxel]
    truth = np.where(at_nodes > 0, np.searchsorted(ids, at_nodes) + 1, 0).astype(np.int32)
    words = np.random.default_rng(0).integers(0, 2**64, (2, len(truth)), np.uint64, endpoint=False)
    voxels = labels.size if valid is None else int(np.count_nonzero(valid))
    return _Volume(ready, truth, sizes.astype(np.int64), voxels, words)


def _cells(values: Array, axes: Sequence[Sequence[float]]) -> tuple[Array, tuple[int, int, int]]:
    """Return, for each node, the last cell it passes in sorted thresholds (-1: none)."""
    cell = np.zeros(values.shape[1], np.int64)
    none = np.zeros(values.shape[1], bool)
    for channel, axis in enumerate(axes):
        limits = np.sort([above(channel, limit) for limit in axis])
        passed = np.searchsorted(limits, values[channel].astype(np.float64), side="left")
        none |= passed == 0
        cell = cell * len(axis) + passed - 1
    cell[none] = -1
    return cell.astype(np.int32), (len(axes[0]), len(axes[1]), len(axes[2]))


class _Once:
    """Compute each key once, whichever thread comes first."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._found: dict[Any, Future[Array]] = {}

    def get(self, key: Any, compute: Any) -> Array:
        """Return what `compute` gives for the key."""
        with self._lock:
            waiting = self._found.get(key)
            if waiting is None:
                own = self._found[key] = Future()
        if waiting is not None:
            return waiting.result()
        try:
            own.set_result(compute())
        except BaseException as error:
            own.set_exception(error)
        return own.result()


def _contour_sums(volume: _Volume, axes: Mapping[str, Sequence[Any]], threads: int) -> Array:
    """Return sums (6, seeds b, c, d, seed sizes, instance sizes, foreground b, c, d)."""
    ready, nodes = volume.field, volume.field.nodes
    foreground = [axes[f"{name}.foreground"] for name in PAIRS]
    cell, bins = _cells(ready.values, foreground)
    least = np.array(axes["min_instance_size"], np.int64)
    seed_axes = [axes[f"{name}.seed"] for name in PAIRS]
    sizes = axes["min_seed_size"]
    lengths = [len(axis) for axis in seed_axes]
    sums = np.empty(
        (6, int(np.prod(lengths)), len(sizes), len(least), int(np.prod(bins))), np.int64
    )
    once = _Once()

    def one(task: tuple[int, tuple[float, ...]]) -> None:
        index, seeds = task
        limits = np.array([above(channel, value) for channel, value in enumerate(seeds)])
        found = components(ready.values, limits, nodes.where, nodes.position, nodes.before)
        for place, size in enumerate(sizes):
            kept, names, _ = keep_large(*found, size)

            def compute(kept: Array = kept, names: Array = names) -> Array:
                labels = flood(
                    kept, names, ready.ranks, ready.levels, EVERYWHERE, nodes.where,
                    nodes.position, nodes.faces,
                )  # fmt: skip
                return tally(labels, volume.truth, cell, bins, volume.truth_sizes, least)

            sums[:, index, place] = once.get(fingerprint(kept, volume.words), compute)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(one, enumerate(itertools.product(*seed_axes))))
    sums = sums.reshape(6, *lengths, len(sizes), len(least), *bins)
    # The sums stand in the order of sorted thresholds; back to the order of the grid.
    for channel, axis in enumerate(foreground):
        order = np.argsort(np.argsort([above(channel, limit) for limit in axis]))
        sums = np.take(sums, order, axis=6 + channel)
    return sums


def _distance_sums(volume: _Volume, axes: Mapping[str, Sequence[Any]], threads: int) -> Array:
    """Return sums (6, seeds, foregrounds, seed sizes, instance sizes)."""
    ready, nodes = volume.field, volume.field.nodes
    seeds, limits = axes["distance_threshold.seed"], axes["distance_threshold.foreground"]
    least = np.array(axes["min_instance_size"], np.int64)
    sizes = axes["min_seed_size"]
    sums = np.empty((6, len(seeds), len(limits), len(sizes), len(least)), np.int64)

    def one(task: tuple[int, float]) -> None:
        column, limit = task
        allowed, ranks, levels = foreground_ranks(ready, limit)
        cell = np.where(allowed, 0, -1).astype(np.int32)
        bounds = allowed if len(allowed) else EVERYWHERE
        for row, seed in enumerate(seeds):
            found = components(
                ready.values, np.array([seed]), nodes.where, nodes.position, nodes.before
            )
            for place, size in enumerate(sizes):
                kept, names, _ = keep_large(*found, size)
                labels = flood(
                    kept, names, ranks, levels, bounds, nodes.where, nodes.position, nodes.faces
                )
                got = tally(labels, volume.truth, cell, (1, 1, 1), volume.truth_sizes, least)
                sums[:, row, column, place] = got[:, :, 0]

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(one, enumerate(limits)))
    return sums


def _order(axes: Mapping[str, Any]) -> list[str]:
    """Return the names of the axes in the order of the sums."""
    seeds = [name for name in axes if name.endswith(".seed")]
    limits = [name for name in axes if name.endswith(".foreground")]
    return [*seeds, *SIZES, *limits] if len(seeds) == 3 else [*seeds, *limits, *SIZES]


def _table(sums: Array, volumes: Sequence[_Volume], axes: Mapping[str, Sequence[Any]]) -> Any:
    """Return the table of all combinations, in the order of `_order`."""
    pairs, inside, whole, covered, instances, matched = sums.reshape(6, -1)
    truth_voxels = sum(int(volume.truth_sizes.sum()) for volume in volumes)
    truth_squares = sum(int(np.square(volume.truth_sizes).sum()) for volume in volumes)
    true = sum(len(volume.truth_sizes) for volume in volumes)
    shared: dict[str, Any] = {
        "pair_squares": pairs,
        "truth_squares": truth_squares,
        "uncovered_share": (truth_voxels - covered) / np.float64(sum(v.voxels for v in volumes)),
    }
    error, precision, recall = metrics.rand_from_sums(segment_squares=inside, **shared)
    grown = metrics.rand_from_sums(segment_squares=whole, **shared)
    names = _order(axes)
    columns = np.meshgrid(*[np.array(axes[name]) for name in names], indexing="ij")
    table = {name: column.ravel() for name, column in zip(names, columns, strict=True)}
    return pd.DataFrame(
        {
            **table,
            "adapted_rand_error": error,
            "adapted_rand_precision": precision,
            "adapted_rand_recall": recall,
            "adapted_rand_error_foreground": grown[0],
            "f1_iou50": metrics.f1_from_counts(matched=matched, predicted=instances, true=true),
            "instances_predicted": instances,
            "matched_iou50": matched,
        }
    )


def _depths(near: Array) -> Array:
    """Return how many steps each combination lies inside its plateau, 0 outside."""
    depth = near.astype(np.int64)
    inner = near
    while inner.any():
        smaller = inner.copy()
        for axis, length in enumerate(near.shape):
            if length > 1:
                padded = np.pad(inner, [(int(a == axis),) * 2 for a in range(near.ndim)])
                smaller &= np.take(padded, range(length), axis)
                smaller &= np.take(padded, range(2, length + 2), axis)
        if smaller.all():
            break
        depth += smaller
        inner = smaller
    return depth


def _choose(table: pd.DataFrame, shape: Sequence[int], metric: str, guard: float) -> Any:
    """Return (winner's row, best by F1, best unguarded, near ties as an array of the axes)."""
    cost = table[metric].to_numpy() * (-1.0 if metric == "f1_iou50" else 1.0)
    f1 = table["f1_iou50"].to_numpy()
    within = f1 >= f1.max() - guard
    table["within_guard"] = within
    near = within & (cost <= cost[within].min() + NEAR_TIE)
    depth = _depths(near.reshape(shape)).ravel()
    rows = np.flatnonzero(near)
    winner = int(rows[np.lexsort((cost[rows], -depth[rows], -f1[rows]))[0]])
    best_f1 = int(np.lexsort((cost, -f1))[0])
    return winner, best_f1, int(np.lexsort((-f1, cost))[0]), near.reshape(shape)


def _point(table: pd.DataFrame, row: int, names: Sequence[str], grid: GridLike) -> SweepPoint:
    """Return one row under the decoder's own argument names."""
    values = {str(key): _plain(value) for key, value in table.iloc[row].to_dict().items()}
    arguments: dict[str, Any] = {}
    for name in decoder_arguments(grid.decoder):
        if name in SIZES:
            arguments[name] = int(values[name])
        elif name in PAIRS:
            arguments[name] = [values[f"{name}.seed"], values[f"{name}.foreground"]]
        else:
            arguments[name] = grid.fixed.get(name, decoder_arguments(grid.decoder)[name])
    figures = {key: value for key, value in values.items() if key not in names}
    figures.pop("within_guard", None)
    for key in ("instances_predicted", "matched_iou50"):
        figures[key] = int(figures[key])
    return SweepPoint(arguments, figures)


def _thin(axes: dict[str, tuple[Any, ...]], share: float) -> dict[str, tuple[Any, ...]]:
    """Return the axes with every other value of the longest seed axis gone until they fit."""
    slow = [name for name in axes if name.endswith(".seed") or name == "min_seed_size"]
    if sum(name.endswith(".seed") for name in axes) == 1:
        slow.append("distance_threshold.foreground")
    whole = float(np.prod([len(axes[name]) for name in slow]))
    axes = dict(axes)
    while np.prod([len(axes[name]) for name in slow]) > max(share * whole, 1.0):
        longest = max(slow, key=lambda name: len(axes[name]))
        axes[longest] = axes[longest][::2]
    return axes


def _finer(axes: Mapping[str, tuple[Any, ...]], point: Mapping[str, Any]) -> dict[str, Any]:
    """Return axes of three values around a combination, half a step apart."""
    finer: dict[str, Any] = {}
    for name, values in axes.items():
        own = point[name]
        ordered = sorted(set(values))
        if len(ordered) == 1 or not np.isfinite(own):
            finer[name] = (own,)
            continue
        at = ordered.index(own)
        near = [ordered[i] for i in (at - 1, at + 1) if 0 <= i < len(ordered)]
        middles = [(own + other) / 2 for other in near if np.isfinite(other)]
        if name in SIZES:
            middles = [round(middle) for middle in middles]
        finer[name] = tuple(sorted({own, *middles}))
    return finer


def _listed(values: Any) -> list[Any]:
    """Return one volume, or several, as a list."""
    return list(values) if isinstance(values, list | tuple) else [values]


def _volumes(probabilities: Any, labels: Any, mask: Any) -> Iterator[tuple[Array, Array, Any]]:
    """Return the volumes one by one."""
    maps, truths = _listed(probabilities), _listed(labels)
    masks = [None] * len(maps) if mask is None else _listed(mask)
    if not len(maps) == len(truths) == len(masks) or not maps:
        raise ValueError(
            f"{len(maps)} probabilities, {len(truths)} labels and {len(masks)} masks: give as "
            "many of each"
        )
    return zip(maps, truths, masks, strict=True)


def _sums(volumes: Sequence[_Volume], axes: Mapping[str, Any], threads: int) -> Array:
    """Return the sums of all volumes together."""
    one = _contour_sums if "binary_threshold.seed" in axes else _distance_sums
    total = one(volumes[0], axes, threads)
    for volume in volumes[1:]:
        total += one(volume, axes, threads)
    return total


def _in_time(
    volumes: Sequence[_Volume], axes: dict[str, tuple[Any, ...]], left_s: float, threads: int
) -> tuple[dict[str, tuple[Any, ...]], str | None]:
    """Return the axes thinned to the time that is left, and a line that says so."""
    trial = _thin(axes, 0.0)
    _sums(volumes, trial, threads)  # the first call may read compiled code from disk
    start = time.perf_counter()
    _sums(volumes, trial, threads)
    one = time.perf_counter() - start
    slow = [name for name in axes if len(trial[name]) != len(axes[name])]
    floods = float(np.prod([len(axes[name]) for name in slow])) if slow else 1.0
    needed = one * floods / max(threads, 1)
    if needed <= left_s:
        return axes, None
    thinned = _thin(axes, max(left_s, 0.0) / needed)
    before, after = (int(np.prod([len(v) for v in a.values()])) for a in (axes, thinned))
    if after == before:
        return axes, None
    return thinned, (
        f"{after:,} of {before:,} combinations scored: all would have taken about "
        f"{needed:.1f} s, and {max(left_s, 0.0):.1f} s were left"
    )


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
    the one deepest inside its plateau.

    Args:
        probabilities: (3, Z, Y, X) floats, or a list of such.
        labels: (Z, Y, X) integers, or as many.
        mask: (Z, Y, X), or as many, or none.
        grid: `Grid`, or what looks like one.
        objective: Has `metric` and `guard.f1_below_best`; adapted Rand error and 0.05 without.
        time_limit_s: The grid is thinned to fit, and `thinned` says so.
        threads: As many as there are cores without.

    Raises:
        ValueError: The input or the grid breaks a rule, or no volume has truth in its mask.
    """
    start = time.perf_counter()
    metric = str(getattr(objective, "metric", "adapted_rand_error"))
    guard = float(getattr(getattr(objective, "guard", None), "f1_below_best", 0.05))
    if metric not in METRICS:
        raise ValueError(
            f"The sweep cannot order combinations by '{metric}': variation of information does "
            f"not add up over instances. Choose one of {', '.join(METRICS)}."
            if metric == "voi"
            else f"Unknown metric '{metric}'. Known: {', '.join(METRICS)}."
        )
    threads = threads or len(os.sched_getaffinity(0))
    axes = checked_axes(grid)
    # Nothing under the lowest threshold matters to the decoder that reads the distance alone.
    low = min(v for name in axes if name.startswith("distance") for v in axes[name])
    volumes = [
        _prepare(maps, truth, valid, grid, low)
        for maps, truth, valid in _volumes(probabilities, labels, mask)
    ]
    thinned = None
    if time_limit_s is not None:
        left = time_limit_s - (time.perf_counter() - start)
        axes, thinned = _in_time(volumes, axes, left, threads)
    result = _scored(volumes, axes, grid, metric, guard, threads)
    for _ in range(grid.refine):
        late = time_limit_s is not None and time.perf_counter() - start > time_limit_s
        if late:
            break
        result = _refined(result, volumes, grid, guard, threads)
    return replace(result, seconds=time.perf_counter() - start, thinned=thinned)


def _scored(
    volumes: Sequence[_Volume], axes: dict[str, tuple[Any, ...]], grid: GridLike, metric: str,
    guard: float, threads: int,
) -> SweepResult:  # fmt: skip
    """Return the result over one grid."""
    table = _table(_sums(volumes, axes, threads), volumes, axes)
    names = _order(axes)
    shape = [len(axes[name]) for name in names]
    winner, best_f1, unguarded, near = _choose(table, shape, metric, guard)
    at = np.unravel_index(winner, shape)
    plateau: dict[str, list[Any]] = {}
    for axis, name in enumerate(names):
        line = near[tuple(slice(None) if a == axis else i for a, i in enumerate(at))]
        plateau[name] = [_plain(v) for v, hit in zip(axes[name], line, strict=True) if hit]
    return SweepResult(
        table=table,
        winner=_point(table, winner, names, grid),
        best_by_f1=_point(table, best_f1, names, grid),
        best_unguarded=_point(table, unguarded, names, grid),
        plateau_width=int(near.sum()),
        plateau=plateau,
        axes={name: axes[name] for name in names},
        combinations=len(table),
        seconds=0.0,
        metric=metric,
        thinned=None,
    )


def _refined(
    result: SweepResult, volumes: Sequence[_Volume], grid: GridLike, guard: float, threads: int
) -> SweepResult:
    """Return the result with a finer grid around its winner added."""
    own: dict[str, Any] = {}
    for name in result.axes:
        key, _, part = name.partition(".")
        value = result.winner.arguments[key]
        value = value if not part else value[part == "foreground"]
        own[name] = np.inf if value is None else value
    finer = _scored(volumes, _finer(result.axes, own), grid, result.metric, guard, threads)
    names = list(result.axes)
    table = pd.concat([result.table, finer.table]).drop_duplicates(names, ignore_index=True)
    # In the joined table there is no grid to lie deep in: ties beyond F1 go to the first.
    winner, best_f1, unguarded, _ = _choose(table, [len(table)], result.metric, guard)
    return replace(
        result,
        table=table,
        axes=finer.axes,
        winner=_point(table, winner, names, grid),
        best_by_f1=_point(table, best_f1, names, grid),
        best_unguarded=_point(table, unguarded, names, grid),
        combinations=len(table),
    )
