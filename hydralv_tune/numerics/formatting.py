"""Numbers and names as people read them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from hydralv_tune.numerics.metrics.registry import METRICS


def number_of(value: Any) -> int | float | None:
    """Return a figure, a count as a whole number, the length of a list of ids, or None."""
    if isinstance(value, list | tuple):
        return len(value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return value
    return None


def figure(value: Any) -> str:
    """Return a figure with four digits after the point, a count without any."""
    number = number_of(value)
    if number is None:
        return "–"
    return f"{number:,}" if isinstance(number, int) else f"{number:.4f}"


def signed(value: Any) -> str:
    """Return a change with its sign."""
    number = number_of(value)
    if number is None:
        return "–"
    text = figure(abs(number))
    return f"±{text}" if number == 0 else f"{'+' if number > 0 else '−'}{text}"


def counted(number: int, word: str) -> str:
    """Return a number with its word in the singular or the plural."""
    return f"{number:,} {word}{'' if number == 1 else 's'}"


def short_names(paths: Iterable[str]) -> dict[str, str]:
    """Return the shortest end of each dotted path that no other one shares.

    Args:
        paths: Such as `data.augmentation.affine.enabled`, of which `affine.enabled` may be enough.
    """
    every = [path.split(".") for path in dict.fromkeys(paths)]
    names = {}
    for parts in every:
        others = [other for other in every if other != parts]
        kept = next(
            (n for n in range(1, len(parts)) if all(o[-n:] != parts[-n:] for o in others)),
            len(parts),
        )
        names[".".join(parts)] = ".".join(parts[-kept:])
    return names


def duration(seconds: float) -> str:
    """Return a time as people say it: 45 s, 1 min 30 s, 2 h 5 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 10:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if minutes else f"{hours} h"


def millions(count: float) -> str:
    """Return a count of parameters: 42.6 M, or as it is below ten thousand."""
    return f"{count / 1e6:.1f} M" if count >= 1e6 else f"{count:,.0f}"


def voxel_size(size_nm: Sequence[float]) -> str:
    """Return the size of a voxel along z, y, x: 30×8×8."""
    return "×".join(f"{side:g}" for side in size_nm)


def objective_label(metric: str) -> str:
    """Return what the study minimises, in words."""
    known = METRICS.get(metric)
    return metric.replace("_", " ") if known is None else known.cost_label


def or_off(threshold: Any) -> Any:
    """Return a threshold, or a list of them, with a word for None, which is no test."""
    if isinstance(threshold, list | tuple):
        return [or_off(value) for value in threshold]
    return "off" if threshold is None else threshold
