"""Figures that a trial leaves beside its tables."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import pandas as pd
from matplotlib.figure import Figure


class SweptLike(Protocol):
    """What the heat-map needs of a sweep's result."""

    @property
    def metric(self) -> str: ...
    def heatmap(self) -> pd.DataFrame: ...


def draw_heatmap(result: SweptLike, path: Path) -> Path:
    """Draw the sweep's best value over its two most important axes, as a PNG."""
    table = result.heatmap()
    figure = Figure(figsize=(6, 5), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(table.to_numpy(float), aspect="auto", cmap="viridis_r")
    axes.set_xticks(range(table.shape[1]), [str(value) for value in table.columns])
    axes.set_yticks(range(table.shape[0]), [str(value) for value in table.index])
    axes.set_xlabel(str(table.columns.name))
    axes.set_ylabel(str(table.index.name))
    figure.colorbar(image, label=result.metric)
    figure.savefig(path, dpi=150)
    return path
