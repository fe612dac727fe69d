"""The combinations of a sweep: axes checked, halved to save time, refined around a winner."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from hydralv_tune.config.errors import unknown_name
from hydralv_tune.numerics.watershed.decoders import (
    DECODERS,
    checked_size,
    checked_threshold,
    decode_instance_binary_contour_distance,
    decode_instance_watershed_distance,
    decoder_arguments,
)

PAIRS = ("binary_threshold", "contour_threshold", "distance_threshold")
SIZES = ("min_seed_size", "min_instance_size")
MOST_COMBINATIONS = 1_000_000
"""450 bytes a combination while the table is made: this many are 0.45 GB."""

SWEPT = (decode_instance_binary_contour_distance, decode_instance_watershed_distance)

Axes = dict[str, tuple[Any, ...]]


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
    """The combinations to score: `binary_threshold.seed` and the like, and plain sizes.

    Args:
        decoder: A key of `DECODERS`.
        axes: Values of each axis; what is left out has the one value of `fixed` or the default.
        fixed: Arguments of the decoder that all combinations share.
        refine: Rounds of a finer grid around the winner.
    """

    decoder: str
    axes: Mapping[str, Sequence[Any]]
    fixed: Mapping[str, Any] = field(default_factory=dict)
    refine: int = 0


def checked_axes(grid: GridLike) -> Axes:
    """Return every axis of the decoder in the order of the table, its values sorted.

    Raises:
        ValueError: The decoder or an axis is unknown or not swept, an axis is empty, a value is
            wrong, or the combinations are too many.
    """
    known = decoder_arguments(grid.decoder)
    if DECODERS[grid.decoder] not in SWEPT:
        raise ValueError(
            f"decoder '{grid.decoder}' can be run but not swept: the sweep takes seeds and floods "
            f"apart, and knows how for {', '.join(one.__name__ for one in SWEPT)} alone"
        )
    for key in grid.fixed:
        if key not in known:
            raise ValueError(unknown_name(f"argument of {grid.decoder}", key, known))
    axes = _single_values({**known, **grid.fixed})
    for name, values in grid.axes.items():
        if name not in axes:
            raise ValueError(unknown_name(f"axis of {grid.decoder}", name, axes))
        if isinstance(values, str) or not isinstance(values, Sequence) or not len(values):
            raise ValueError(
                f"axis {name} is {values!r}, but it needs at least one value; leave it out to "
                "keep the decoder's default"
            )
        axes[name] = tuple(values)
    for name, values in axes.items():
        axes[name] = tuple(sorted({_axis_value(name, value) for value in values}))
    if count(axes) > MOST_COMBINATIONS:
        raise ValueError(
            f"the grid has {count(axes):,} combinations, but {MOST_COMBINATIONS:,} is the most; "
            "shorten its axes and let `refine` look closer"
        )
    return {name: axes[name] for name in ordered(axes)}


def _single_values(defaults: Mapping[str, Any]) -> Axes:
    """Return axes of one value each from a decoder's arguments."""
    axes: Axes = {}
    for name in PAIRS:
        if name not in defaults:
            continue
        pair = defaults[name]
        if isinstance(pair, str) or not isinstance(pair, Sequence) or len(pair) != 2:
            raise ValueError(f"{name} is {pair!r}, but it is a pair: [seed, foreground]")
        axes[f"{name}.seed"], axes[f"{name}.foreground"] = (pair[0],), (pair[1],)
    return {**axes, **{name: (defaults[name],) for name in SIZES}}


def _axis_value(name: str, value: Any) -> float | int:
    """Return one checked value of an axis; a contour that is off is infinity."""
    if name in SIZES:
        return checked_size(name, value)
    checked = checked_threshold(name, value)
    return float(np.inf) if checked is None else checked


def ordered(names: Mapping[str, Any]) -> list[str]:
    """Return the names of the axes in the order of the table: what is slow to change first."""
    slow = slow_axes(names)
    return [*slow, "min_instance_size", *(n for n in names if n not in (*slow, *SIZES))]


def slow_axes(names: Mapping[str, Any]) -> list[str]:
    """Return the axes of which each value costs seeds or a flood."""
    seeds = [name for name in names if name.endswith(".seed")]
    if len(seeds) == 1:
        seeds.append("distance_threshold.foreground")
    return [*seeds, "min_seed_size"]


def count(axes: Mapping[str, Sequence[Any]]) -> int:
    """Return the number of combinations."""
    product = 1
    for values in axes.values():
        product *= len(values)
    return product


def slow_combinations(axes: Mapping[str, Sequence[Any]]) -> Iterator[tuple[Any, ...]]:
    """Return every combination of the slow axes, in the order of the table."""
    return itertools.product(*(axes[name] for name in slow_axes(axes)))


def halvings(axes: Axes) -> list[Axes]:
    """Return nested grids, from one value on each slow axis to the whole grid.

    Each is the next with every other value of its longest slow axis gone, so that a sweep can
    end after any of them.
    """
    grids = [axes]
    while True:
        axes = dict(grids[-1])
        longest = max(slow_axes(axes), key=lambda name: len(axes[name]))
        if len(axes[longest]) == 1:
            return grids[::-1]
        axes[longest] = axes[longest][1::2]
        grids.append(axes)


def finer(axes: Axes, point: Mapping[str, Any], step: float) -> Axes:
    """Return axes of up to three values around a combination.

    Args:
        axes: The first grid.
        point: The value on each axis that stays in the middle.
        step: How far to go, as a share of the way to the neighbours on the first grid.
    """
    around: Axes = {}
    for name, values in axes.items():
        own = point[name]
        if len(values) == 1 or not np.isfinite(own):
            around[name] = (own,)
            continue
        below = [v for v in values if v < own and np.isfinite(v)]
        over = [v for v in values if v > own and np.isfinite(v)]
        near = [round(own + (v - own) * step, 10) for v in (*below[-1:], *over[:1])]
        if name in SIZES:
            near = [round(value) for value in near]
        around[name] = tuple(sorted({own, *near}))
    return around
