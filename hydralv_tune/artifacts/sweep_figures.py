"""Figures of a sweep."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, Protocol

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hydralv_tune.artifacts.writing import write_atomically
from hydralv_tune.numerics.metrics.registry import METRICS

MOST_NUMBERS = 12
"""Up to so many values on an axis, each cell carries its number."""


class SweptLike(Protocol):
    """What the heat-map needs of a sweep's result."""

    @property
    def metric(self) -> str: ...
    @property
    def combinations(self) -> int: ...
    @property
    def winner(self) -> Any: ...
    def heatmap(self, column: str | None = None) -> pd.DataFrame: ...


def draw_heatmap(result: SweptLike, path: str | Path) -> Path:
    """Draw what the sweep reaches over its two most important axes, and mark the winner.

    Each cell holds these two thresholds and leaves the others to the sweep's rule, guard
    included. F1 stands beside the metric, which cannot see swollen instances.

    Args:
        result: Of `sweep`.
        path: Where the PNG goes.

    Returns:
        The path.
    """
    columns = list(dict.fromkeys([result.metric, "f1_iou50"]))
    across = max(result.heatmap().shape[1], 3)
    figure = Figure(
        figsize=(len(columns) * max(1.9 + min(0.52 * across, 6.5), 4.0), 4.6),
        layout="constrained",
    )
    panels = figure.subplots(1, len(columns), squeeze=False)[0]
    for panel, column in zip(panels, columns, strict=True):
        _panel(figure, panel, result.heatmap(column), column, result.winner.arguments)
    many = f"{result.combinations:,} combination{'s' * (result.combinations > 1)}"
    figure.suptitle(f"{many}, the other thresholds chosen by the sweep's rule", fontsize=9)
    buffer = BytesIO()
    figure.savefig(buffer, dpi=150, format="png")
    return write_atomically(path, buffer.getvalue())


def _panel(
    figure: Figure, panel: Axes, table: pd.DataFrame, column: str, winner: Mapping[str, Any]
) -> None:
    """Draw one figure over two axes."""
    values = table.to_numpy(float)
    metric = METRICS[column]
    higher = metric.direction == "higher"
    better = "near 0" if metric.direction == "zero" else metric.direction
    colours = mpl.colormaps["viridis" if higher else "viridis_r"]
    image = panel.imshow(values, aspect="auto", cmap=colours, origin="lower")
    figure.colorbar(image, ax=panel, label=f"{metric.label} ({better} is better)")
    crossed = table.columns.name is not None
    _set_ticks(panel.set_yticks, list(table.index))
    panel.set_ylabel(_axis_name(str(table.index.name)))
    if crossed:
        _set_ticks(panel.set_xticks, list(table.columns))
        panel.set_xlabel(_axis_name(str(table.columns.name)))
    else:
        panel.set_xticks([])
    panel.tick_params(axis="x", labelrotation=45 if len(table.columns) > 8 else 0)
    y = _nearest(list(table.index), _own(winner, str(table.index.name)))
    x = _nearest(list(table.columns), _own(winner, str(table.columns.name))) if crossed else 0
    if max(values.shape) <= MOST_NUMBERS:
        for (row, place), value in np.ndenumerate(values):
            red, green, blue, _ = image.cmap(image.norm(value))
            dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.55
            panel.text(
                place, row, f"{value:.3f}", ha="center", va="center", fontsize=7,
                color="white" if dark else "black",
            )  # fmt: skip
    panel.add_patch(
        mpl.patches.Rectangle(
            (x - 0.47, y - 0.47), 0.94, 0.94, fill=False, edgecolor="red", linewidth=2
        )
    )
    panel.set_title("winner framed in red", fontsize=9, color="red")


def _set_ticks(set_ticks: Callable[..., Any], values: Sequence[Any]) -> None:
    """Label an axis, every value or, where they are many, every second, third and so on."""
    places = range(0, len(values), -(-len(values) // MOST_NUMBERS))
    set_ticks(list(places), [_label(values[place]) for place in places])


def _axis_name(name: str) -> str:
    """Return `binary_threshold.seed` as words."""
    name, _, part = name.partition(".")
    words = name.replace("_", " ")
    return f"{words}, {part}" if part else f"{words}{' in voxels' * words.endswith('size')}"


def _label(value: Any) -> str:
    """Return a threshold in as few digits as it needs."""
    return "off" if np.isinf(value) else f"{value:g}"


def _own(winner: Mapping[str, Any], axis: str) -> float:
    """Return the winner's value on an axis."""
    name, _, part = axis.partition(".")
    value = winner[name] if not part else winner[name][part == "foreground"]
    return float("inf") if value is None else float(value)


def _nearest(values: Sequence[Any], own: float) -> int:
    """Return which value is nearest; after a refinement the winner lies between two."""
    away = [0.0 if value == own else abs(float(value) - own) for value in values]
    return int(np.argmin(away))
