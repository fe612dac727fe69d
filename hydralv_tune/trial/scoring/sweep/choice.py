"""Which combination of a sweep wins, and how safe its place is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from skimage.segmentation import flood

from hydralv_tune.numerics.metrics.registry import METRICS
from hydralv_tune.trial.scoring.sweep.grid import plain_threshold

Array = npt.NDArray[Any]

NEAR_TIE = 0.002
BOOKKEEPING = ("round", "within_guard", "near_tie", "depth")


@dataclass(frozen=True)
class SweepPoint:
    """One combination: the decoder's arguments and every figure of its segmentation."""

    arguments: dict[str, Any]
    metrics: dict[str, Any]

    def as_mapping(self) -> dict[str, Any]:
        """Return arguments and figures as plain JSON types, in one mapping."""
        return {**self.arguments, **self.metrics}


def depths(near: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
    """Return how many steps each combination lies inside its plateau, 0 outside.

    Beyond the last value of an axis nothing is known, so it counts as outside. Axes of a grid
    are short, so most combinations lie one step inside: up to half a step more tells, by the
    share of neighbours that lie as deep, the one in the middle from the one on a corner.
    """
    inner = near.reshape([side for side in near.shape if side > 1])
    deep = inner.astype(np.int64)
    if inner.ndim == 0:
        return deep.reshape(near.shape).astype(np.float64)
    while inner.any():
        inner = _eroded(inner)
        deep += inner
    as_deep = np.zeros(deep.shape)
    for axis in range(deep.ndim):
        # Swapped views: writing to them writes to the arrays.
        steps, seen = np.moveaxis(deep, axis, 0), np.moveaxis(as_deep, axis, 0)
        seen[1:] += steps[:-1] >= steps[1:]
        seen[:-1] += steps[1:] >= steps[:-1]
    return (deep + (deep > 0) * as_deep / (4 * deep.ndim)).reshape(near.shape)


def _eroded(inner: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Return what has all its neighbours; eight axes take SciPy fifty times as long."""
    kept = inner.copy()
    for axis in range(inner.ndim):
        into, before = np.moveaxis(kept, axis, 0), np.moveaxis(inner, axis, 0)
        into[1:] &= before[:-1]
        into[:-1] &= before[1:]
        into[[0, -1]] = False
    return kept


def rate(table: pd.DataFrame, shapes: Sequence[Sequence[int]], metric: str, guard: float) -> None:
    """Write to the table what is within the guard, what nearly ties for the best, and how deep.

    Args:
        table: Grids one below the other, numbered by `round`; changed in place.
        shapes: The lengths of the axes of each grid. A step of round n is half of round n - 1.
        metric: What is compared.
        guard: How far F1 may be below the best F1.
    """
    cost = costs(table, metric)
    f1 = table["f1_iou50"].to_numpy()
    within = f1 >= f1.max() - guard
    near = within & (cost <= cost[within].min() + NEAR_TIE)
    depth = np.zeros(len(table))
    first = 0
    for number, shape in enumerate(shapes):
        last = first + int(np.prod(shape))
        depth[first:last] = depths(near[first:last].reshape(shape)).ravel() * 0.5**number
        first = last
    table["within_guard"], table["near_tie"], table["depth"] = within, near, depth


def costs(table: pd.DataFrame, metric: str) -> Array:
    """Return the metric as something to be minimised."""
    return np.asarray(METRICS[metric].cost(table[metric].to_numpy()))


def by_rule(table: pd.DataFrame, metric: str) -> npt.NDArray[np.int64]:
    """Return the rows, best first: near-ties by F1, then depth; the rest by the metric.

    Rows that break the guard come last.
    """
    cost, f1 = costs(table, metric), table["f1_iou50"].to_numpy()
    near = table["near_tie"].to_numpy()
    depth = table["depth"].to_numpy()
    first = np.where(near, -f1, np.inf)
    second = np.where(near, -depth, np.inf)
    order = np.lexsort((-f1, cost, second, first, ~near, ~table["within_guard"].to_numpy()))
    return np.asarray(order, np.int64)


def plateau_of(
    near: npt.NDArray[np.bool_], at: Sequence[int], axes: Mapping[str, Sequence[Any]]
) -> tuple[int, Any]:
    """Return how many combinations the plateau around one holds, and its span on each axis.

    A plateau is what near-ties reach from each other by single steps.
    """
    plateau = flood(near, tuple(at), connectivity=1)
    spans: dict[str, list[Any]] = {}
    for axis, (name, values) in enumerate(axes.items()):
        line = plateau[tuple(slice(None) if a == axis else i for a, i in enumerate(at))]
        low = high = at[axis]
        while low > 0 and line[low - 1]:
            low -= 1
        while high + 1 < len(line) and line[high + 1]:
            high += 1
        spans[name] = [plain_threshold(value) for value in values[low : high + 1]]
    return int(plateau.sum()), spans
