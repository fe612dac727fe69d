"""Numbers as people read them."""

from __future__ import annotations

from typing import Any

from hydralv_tune.numerics.metrics.scores import METRICS


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


def duration(seconds: float) -> str:
    """Return a time in the unit that people would use."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def objective_label(metric: str) -> str:
    """Return what the study minimises, in words."""
    known = METRICS.get(metric)
    return metric.replace("_", " ") if known is None else known.cost_label
