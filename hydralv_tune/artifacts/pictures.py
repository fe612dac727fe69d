"""Pictures of a segmentation beside its ground truth, and of a training.

Five colours say what became of an instance. They are of the palette by Okabe and Ito, which
people with any of the common colour deficiencies can tell apart, and truth is a solid line where
prediction is a dashed one, so that colour alone carries nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from scipy import ndimage
from skimage.measure import find_contours

from hydralv_tune.artifacts.writing import write_atomically
from hydralv_tune.numerics.metrics.instance_errors import KINDS, segment_kinds, truth_kinds
from hydralv_tune.numerics.metrics.scores import (
    HEADLINE,
    InstanceMatching,
    contingency_table,
    match_instances,
)

Array = npt.NDArray[Any]

COLOURS = {
    "true": "#009E73",
    "missed": "#D55E00",
    "split": "#56B4E9",
    "merged": "#F0E442",
    "invented": "#CC79A7",
}
"""One colour per kind. Source: Okabe and Ito, https://jfly.uni-koeln.de/color/."""

MARGIN = 8
"""Voxels shown around what is cropped to."""

SMALLEST_WINDOW = 96
"""Voxels of the side of a section's window, so that a lone instance keeps its surroundings."""

TASKS = ("total", "label", "boundary", "edt")
"""Losses that are drawn where they are there; the terms that they are made of are not."""

DASHES = (0, (2.2, 1.2))
"""Line style of a prediction."""

OUTSIDE_MASK = 0.45
"""Brightness left outside the mask, where nothing is scored."""


def draw_contact_sheet(
    *,
    image: Array,
    truth: Array,
    prediction: Array,
    mask: Array | None,
    path: Path,
    title: str | None = None,
    sections: int = 6,
) -> Path:
    """Draw sections with the contours of truth and prediction, as a PNG.

    The sections are those that together show the most instances that went wrong, then the
    most instances at all.

    Args:
        image: (Z, Y, X), any real dtype.
        truth: (Z, Y, X), integers; 0 is background.
        prediction: (Z, Y, X), integers; 0 is background.
        mask: (Z, Y, X); what is outside is shown darker, and neither scored nor outlined.
        path: Where the PNG goes.
        title: A line over the sheet.
        sections: Most sections to show.

    Raises:
        ValueError: Shapes differ.
    """
    table = contingency_table(prediction=prediction, truth=truth, mask=mask)
    inside = np.ones(truth.shape, bool) if mask is None else np.asarray(mask) > 0
    truth, prediction = np.where(inside, truth, 0), np.where(inside, prediction, 0)
    of_truth, of_segment = truth_kinds(table), segment_kinds(table)
    shown = choose_sections(truth, prediction, of_truth, of_segment, count=sections)
    columns = min(3, len(shown))
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(4.4 * columns, 4.7 * rows + 0.9), layout="constrained")
    for axes, z in zip(figure.subplots(rows, columns, squeeze=False).flat, shown, strict=False):
        here = (z, *_window((truth[z] > 0) | (prediction[z] > 0)))
        grey = _grey(image[here]) * np.where(inside[here], 1.0, OUTSIDE_MASK)
        axes.imshow(grey, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        _outline(axes, truth[here], of_truth, "solid", 1.6)
        _outline(axes, prediction[here], of_segment, DASHES, 1.3)
        y, x = here[1], here[2]
        place = f"section {z}, y {y.start}–{y.stop}, x {x.start}–{x.stop}"
        axes.set_title(place, fontsize=10, loc="left")
    for axes in figure.axes:
        axes.set_axis_off()
    _legend(figure, match_instances(table), len(of_truth), title)
    return _save(figure, path)


def choose_sections(
    truth: Array,
    prediction: Array,
    of_truth: Mapping[int, str],
    of_segment: Mapping[int, str],
    *,
    count: int,
) -> list[int]:
    """Return the sections that show the most of what went wrong, in ascending order.

    Args:
        truth: (Z, Y, X) labels.
        prediction: (Z, Y, X) labels.
        of_truth: Verdict of each id of the truth.
        of_segment: Verdict of each id of the prediction.
        count: Most sections to return.
    """
    seen: list[set[tuple[str, int]]] = []
    for plane, guess in zip(truth, prediction, strict=True):
        names = {("truth", int(i)) for i in np.unique(plane) if i}
        seen.append(names | {("segment", int(i)) for i in np.unique(guess) if i})

    def worth(names: set[tuple[str, int]]) -> float:
        kinds = ((of_truth if kind == "truth" else of_segment).get(i, "true") for kind, i in names)
        return sum(0.1 if kind == "true" else 1.0 for kind in kinds)

    chosen: list[int] = []
    left = [set(names) for names in seen]
    while len(chosen) < min(count, len(truth)):
        rest = [z for z in range(len(truth)) if z not in chosen]
        # What is new first; then what is far from the sections already shown.
        far = {z: min((abs(z - other) for other in chosen), default=1) for z in rest}
        best = max(
            rest,
            key=lambda z: (worth(left[z]), worth(seen[z]) * far[z], -abs(z - len(truth) / 2)),
        )
        if chosen and not seen[best]:
            break
        chosen.append(best)
        left = [names - seen[best] for names in left]
    return sorted(chosen)


def _window(either: Array) -> tuple[slice, slice]:
    """Return a square around all instances of a section, the whole section where there is none."""
    if not either.any():
        return slice(0, either.shape[0]), slice(0, either.shape[1])
    box = ndimage.find_objects(either.astype(np.uint8))[0]
    side = max(SMALLEST_WINDOW, *(s.stop - s.start + 2 * MARGIN for s in box))
    slices = []
    for s, size in zip(box, either.shape, strict=True):
        start = min(max((s.start + s.stop - side) // 2, 0), max(size - side, 0))
        slices.append(slice(start, min(start + side, size)))
    return slices[0], slices[1]


def _grey(image: Array) -> npt.NDArray[np.float64]:
    """Return an image stretched to [0, 1] between its 1st and 99th percentile."""
    values = np.asarray(image, np.float64)
    # Sparse volumes are zero where there is no image; those voxels would set the contrast.
    known = values[values != 0] if (values != 0).any() else values
    low, high = np.percentile(known, (1, 99))
    return np.clip((values - low) / max(high - low, 1e-12), 0.0, 1.0)


def _outline(axes: Axes, plane: Array, kinds: Mapping[int, str], style: Any, width: float) -> None:
    """Draw the contour of each instance of a section in the colour of its kind."""
    lines, colours = [], []
    ids = [int(i) for i in np.unique(plane) if i]
    dense = np.searchsorted(ids, plane) + 1 if ids else plane
    boxes = ndimage.find_objects(np.where(plane > 0, dense, 0).astype(np.int32))
    for i, box in zip(ids, boxes, strict=True):
        alone = np.pad(plane[box] == i, 1)
        start = np.array([box[0].start - 1, box[1].start - 1])
        for contour in find_contours(alone.astype(float), 0.5):
            lines.append((contour + start)[:, ::-1])
            colours.append(COLOURS[kinds.get(i, "true")])
    axes.add_collection(LineCollection(lines, colors=colours, linestyles=[style], linewidths=width))


def _legend(figure: Figure, matching: InstanceMatching, truths: int, title: str | None) -> None:
    """Put the title above and the counts of each kind below the sheet."""
    handles = []
    for kind in KINDS:
        if kind == "true":
            label = f"true, {matching.matched} of {truths} at IoU 0.5"
        else:
            label = f"{kind} {len(getattr(matching, kind))}"
        handles.append(Line2D([], [], color=COLOURS[kind], linewidth=4, label=label))
    handles.append(Line2D([], [], color="0.25", linewidth=1.5, label="ground truth"))
    handles.append(
        Line2D([], [], color="0.25", linewidth=1.5, linestyle=DASHES, label="prediction")
    )
    figure.legend(
        handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=10,
        handlelength=1.6, columnspacing=1.2,
    )  # fmt: skip
    if title:
        figure.suptitle(title, fontsize=12, x=0.01, ha="left", fontweight="bold")


def draw_losses(history: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Draw the losses and the scores over the epochs of a training, as a PNG.

    Args:
        history: One mapping per evaluation with `epoch`, `losses` (name to value), `metrics`
            (with `adapted_rand_error` and the like) and, optionally, `value`. Values that are
            missing or None are left out.
        path: Where the PNG goes.
    """
    figure = Figure(figsize=(8.4, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    epochs = [float(row.get("epoch", i + 1)) for i, row in enumerate(history)]
    losses = [row.get("losses") or {} for row in history]
    tasks = [name for name in TASKS if any(name in row for row in losses)]
    _curves(left, epochs, losses, tasks or None)
    _curves(right, epochs, [row.get("metrics") or {} for row in history], HEADLINE)
    left.set_title("Losses", loc="left", fontsize=11)
    right.set_title("Scores", loc="left", fontsize=11)
    shown = [value for line in left.get_lines() for value in np.asarray(line.get_ydata())]
    if shown and min(shown) > 0 and max(shown) / min(shown) > 20:
        left.set_yscale("log")
    right.set_ylim(0, 1)
    for axes in (left, right):
        axes.set_xlabel("epoch")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_lines():
            axes.legend(frameon=False, fontsize=8)
    return _save(figure, path)


def _curves(
    axes: Axes,
    epochs: Sequence[float],
    rows: Sequence[Mapping[str, Any]],
    names: Sequence[str] | None,
) -> None:
    """Draw one line per name; all numeric names of the rows where none are given."""
    palette = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
    found = list(dict.fromkeys(name for row in rows for name in row)) if names is None else names
    number = 0
    for name in found:
        points = [
            (epoch, float(row[name]))
            for epoch, row in zip(epochs, rows, strict=True)
            if isinstance(row.get(name), int | float) and np.isfinite(row[name])
        ]
        if not points:
            continue
        x, y = zip(*points, strict=True)
        total = name == "total"
        axes.plot(
            x, y, label=name.replace("_", " "), marker="o", markersize=3,
            color="#000000" if total else palette[number % len(palette)],
            linewidth=2.2 if total else 1.4,
        )  # fmt: skip
        number += not total


def _save(figure: Figure, path: Path) -> Path:
    """Write the figure as a PNG, atomically, and return its path."""
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    write_atomically(path, buffer.getvalue())
    return path
