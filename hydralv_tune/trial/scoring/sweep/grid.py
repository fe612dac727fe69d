"""The combinations of a sweep: axes checked, halved to save time, refined around a winner."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from hydralv_tune.config.errors import unknown_name
from hydralv_tune.numerics.watershed.decoders import DECODERS, arguments_of

FINEST = 0.01
"""The smallest step of a refinement: below it a threshold fits the noise of one volume."""


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


class Axes(dict[str, tuple[Any, ...]]):
    """The sorted values of each axis, in the order of the table.

    The first `slow` axes are those of which each combination costs a flood, or a decoding.
    """

    def __init__(self, values: Mapping[str, tuple[Any, ...]], slow: int) -> None:
        super().__init__(values)
        self._slow = slow

    @property
    def slow(self) -> list[str]:
        """Return the names of the slow axes."""
        return list(self)[: self._slow]

    def with_values(self, values: Mapping[str, tuple[Any, ...]]) -> Axes:
        """Return the same axes with other values."""
        return Axes({name: values.get(name, own) for name, own in self.items()}, self._slow)

    def keys_of(self) -> Iterator[tuple[Any, ...]]:
        """Return every combination of the slow axes, in the order of the table."""
        return itertools.product(*(self[name] for name in self.slow))


def checked_axes(grid: GridLike) -> Axes:
    """Return every axis of the decoder in the order of the table, its values sorted.

    Raises:
        ValueError: The decoder or an axis is unknown, an axis is empty, a value is wrong, or the
            combinations are too many.
    """
    known = arguments_of(grid.decoder)
    decoder = DECODERS[grid.decoder]
    for key in grid.fixed:
        if key not in known:
            raise ValueError(unknown_name(f"argument of {grid.decoder}", key, known))
    values: dict[str, Sequence[Any]] = {}
    for name, argument in known.items():
        given = grid.fixed.get(name, argument.default)
        pair = argument.checked_pair(name, given) if argument.kind == "pair" else (given,)
        values.update(zip(argument.axes(name), ((entry,) for entry in pair), strict=False))
    for name, entries in grid.axes.items():
        if name not in decoder.axes:
            raise ValueError(unknown_name(f"axis of {grid.decoder}", name, decoder.axes))
        if isinstance(entries, str) or not isinstance(entries, Sequence) or not len(entries):
            raise ValueError(
                f"axis {name} is {entries!r}, but it needs at least one value; leave it out to "
                "keep the decoder's default"
            )
        values[name] = entries
    checked = {
        axis: tuple(sorted({known[axis.partition(".")[0]].checked(axis, v) for v in values[axis]}))
        for axis in decoder.axes
    }
    most = decoder.most_combinations
    if count_combinations(checked) > most:
        why = (
            "" if decoder.sweep else f" since {grid.decoder} has no sweep form and must decode each"
        )
        raise ValueError(
            f"the grid has {count_combinations(checked):,} combinations, but {most:,} is the most"
            f"{why}; shorten its axes and let `refine` look closer"
        )
    return Axes(checked, len(decoder.slow_axes))


def decoder_arguments_at(grid: GridLike, point: Mapping[str, Any]) -> dict[str, Any]:
    """Return the decoder's arguments of one combination, as plain JSON types.

    Args:
        grid: Decoder and fixed arguments.
        point: The value on each axis.
    """
    arguments: dict[str, Any] = {}
    for name, argument in arguments_of(grid.decoder).items():
        entries = [plain_threshold(point[axis]) for axis in argument.axes(name) if axis in point]
        if argument.kind == "pair":
            arguments[name] = entries
        elif entries:
            whole = argument.kind in ("integer", "size")
            arguments[name] = int(entries[0]) if whole else entries[0]
        else:
            arguments[name] = grid.fixed.get(name, argument.default)
    return arguments


def plain_threshold(value: Any) -> Any:
    """Return a NumPy scalar as a Python one; no threshold, infinity, becomes None."""
    value = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(value, float) and not np.isfinite(value) else value


def count_combinations(axes: Mapping[str, Sequence[Any]]) -> int:
    """Return the number of combinations."""
    return math.prod(len(values) for values in axes.values())


def halvings(axes: Axes) -> list[Axes]:
    """Return nested grids, from one value on each slow axis to the whole grid.

    Each is the next with every other value of its longest slow axis gone, so that a sweep can
    end after any of them.
    """
    grids = [axes]
    while True:
        longest = max(axes.slow, key=lambda name: len(axes[name]), default=None)
        if longest is None or len(axes[longest]) == 1:
            return grids[::-1]
        axes = axes.with_values({longest: axes[longest][1::2]})
        grids.append(axes)


def finer(axes: Axes, point: Mapping[str, Any], step: float) -> Axes:
    """Return axes of up to three values around a combination.

    Args:
        axes: The first grid.
        point: The value on each axis that stays in the middle.
        step: How far to go, as a share of the way to the neighbours on the first grid.
    """
    around: dict[str, tuple[Any, ...]] = {}
    for name, values in axes.items():
        own = point[name]
        if len(values) == 1 or not np.isfinite(own):
            around[name] = (own,)
            continue
        below = [v for v in values if v < own and np.isfinite(v)]
        over = [v for v in values if v > own and np.isfinite(v)]
        ways = [v - own for v in (*below[-1:], *over[:1])]
        if all(isinstance(value, int) for value in values):
            near = [round(own + way * step) for way in ways]
        else:
            near = [round(own + math.copysign(_hundredths(abs(way), step), way), 10)
                    for way in ways]  # fmt: skip
        around[name] = tuple(sorted({own, *near}))
    return axes.with_values(around)


def _hundredths(way: float, share: float) -> float:
    """Return a share of a way in hundredths, one at least; of a shorter way the share itself."""
    return way * share if way < FINEST else max(round(way * share, 2), FINEST)
