"""Probabilities of a volume from windows, section by section as they become final.

Windows that begin at one section are a layer; what lies before the next layer is final and leaves
the memory. `predict` and the segmentation of large volumes both take their values from here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from monai.data.utils import compute_importance_map
from torch import Tensor

from hydralv_tune.config.candidate import Candidate
from hydralv_tune.config.errors import TrialFailed

Array = npt.NDArray[Any]
Size3 = tuple[int, int, int]
Span = tuple[int, int]
Predictor = Callable[[Tensor], Tensor]
Wanted = Callable[[Span, Span, Span], Array | None]

BACKGROUND = (0.0, 0.0, -1.0)
"""What a window that the mask leaves out is: neither instance nor boundary, distance outside."""
LOWEST = (0.0, 0.0, -1.0)


class Padded(Protocol):
    """A padded, normalised volume that is read box by box."""

    def read(self, z: Span, y: Span, x: Span) -> npt.NDArray[np.float32]: ...


@dataclass(frozen=True)
class Windows:
    """How a volume is cut, padded and joined again.

    Args:
        shape: (z, y, x) of the padded volume.
        before: Voxels padded before each axis.
        size: (z, y, x) of a window.
        overlap: Share of a window that the next one covers again.
        count: Number of windows.
    """

    shape: Size3
    before: Size3
    size: Size3
    overlap: float
    count: int


@dataclass(frozen=True)
class Lane:
    """A part of the volume that is predicted by itself, from its first section to its last.

    Args:
        low: (z, y, x) of its first voxel in the volume.
        high: (z, y, x) past its last.
    """

    low: Size3
    high: Size3


def starts_of(windows: Windows) -> tuple[list[int], list[int], list[int]]:
    """Return where windows begin along each padded axis: steps, the last one at the border."""
    starts = []
    for whole, size in zip(windows.shape, windows.size, strict=True):
        step = size if whole == size else max(int(size * (1 - windows.overlap)), 1)
        count = math.ceil((whole - size) / step) + 1
        starts.append([min(index * step, whole - size) for index in range(count)])
    return starts[0], starts[1], starts[2]


def predicted_sections(
    image: Padded, candidate: Candidate, windows: Windows, lane: Lane, *,
    predictor: Predictor, wanted: Wanted, batch: int, device: torch.device,
    progress: Callable[[int], None], start: int | None = None, home: torch.device | None = None,
) -> Iterator[tuple[int, npt.NDArray[np.float16]]]:  # fmt: skip
    """Yield final probabilities of a lane, from its first section on.

    Args:
        image: The padded volume.
        candidate: Its `inference.sliding_window`.
        windows: How the volume is cut.
        lane: Which part.
        predictor: (B, 1, z, y, x) windows to (B, 3, z, y, x) probabilities.
        wanted: Whether a box of the padded volume, given by its spans, touches the mask: an array
            of the box, or None where all of it counts.
        batch: Windows at once.
        device: Where the network is.
        progress: Called with the number of windows done since the last call.
        start: Begin at this section of the volume, which an earlier call has reached.
        home: Where a layer and its sums are; where the network is if None.

    Yields:
        (first section, (3, z, y, x) float16) without gaps.

    Raises:
        TrialFailed: The network gives values that are not finite.
    """
    window = candidate.inference.sliding_window
    size, before = windows.size, windows.before
    low = [v + b for v, b in zip(lane.low, before, strict=True)]
    high = [v + b for v, b in zip(lane.high, before, strict=True)]
    home = device if home is None else home
    emitted = low[0] if start is None else start + before[0]
    weight = compute_importance_map(
        size, mode=window.blending, sigma_scale=window.sigma_scale, device=home,
        dtype=torch.float32,
    )  # fmt: skip
    columns = [
        [first for first in starts if first < high[axis] and first + size[axis] > low[axis]]
        for axis, starts in enumerate(starts_of(windows))
    ]
    layers = [z for z in columns[0] if z + size[0] > emitted]
    span_y = (min(columns[1]), max(columns[1]) + size[1])
    span_x = (min(columns[2]), max(columns[2]) + size[2])
    sides = (high[1] - low[1], high[2] - low[2])
    sums = torch.zeros((3, size[0], *sides), device=home)
    weights = torch.zeros((size[0], *sides), device=home)
    background = torch.tensor(BACKGROUND, device=home).view(3, 1, 1, 1)
    top = layers[0]
    for number, z in enumerate(layers):
        _roll(sums, weights, z - top)
        top = z
        span_z = (z, z + size[0])
        layer = torch.from_numpy(image.read(span_z, span_y, span_x)).to(home)
        mask = wanted(span_z, span_y, span_x)
        places = list(product(columns[1], columns[2]))
        corners = {(y, x): (y - span_y[0], x - span_x[0]) for y, x in places}
        chosen = [
            place for place, (y, x) in corners.items()
            if mask is None or mask[:, y : y + size[1], x : x + size[2]].any()
        ]  # fmt: skip
        progress(len(places) - len(chosen))
        results = _results(
            layer, [corners[place] for place in chosen], size, predictor, batch, device, progress
        )
        left_out = set(places).difference(chosen)
        for y, x in places:
            inner_y, outer_y = _overlap(y, size[1], low[1], high[1])
            inner_x, outer_x = _overlap(x, size[2], low[2], high[2])
            part = weight[:, inner_y, inner_x]
            value = background if (y, x) in left_out else next(results)[:, :, inner_y, inner_x]
            sums[:, :, outer_y, outer_x] += value * part
            weights[:, outer_y, outer_x] += part
        end = high[0] if number + 1 == len(layers) else min(layers[number + 1], high[0])
        if end > emitted:
            inside = slice(emitted - top, end - top)
            yield emitted - before[0], _final(sums[:, inside] / weights[inside])
            emitted = end


def _overlap(first: int, side: int, low: int, high: int) -> tuple[slice, slice]:
    """Return where a window and a lane overlap, counted from the first and from the second."""
    start, end = max(first, low), min(first + side, high)
    return slice(start - first, end - first), slice(start - low, end - low)


def _results(
    layer: Tensor, corners: Sequence[tuple[int, int]], size: Size3, predictor: Predictor,
    batch: int, device: torch.device, progress: Callable[[int], None],
) -> Iterator[Tensor]:  # fmt: skip
    """Yield the probabilities of windows of a layer, of which one batch is in memory.

    Args:
        corners: Where the windows begin.
    """
    # Of nearly equal size: a window that is left over alone costs as much as two.
    parts = np.array_split(np.arange(len(corners)), max(math.ceil(len(corners) / batch), 1))
    for part in parts if corners else ():
        inputs = [
            layer[None, :, y : y + size[1], x : x + size[2]]
            for y, x in (corners[index] for index in part)
        ]
        with torch.inference_mode():
            found = predictor(torch.stack(inputs).to(device)).to(layer.device)
        progress(len(inputs))
        yield from found


def _roll(sums: Tensor, weights: Tensor, step: int) -> None:
    """Move the sums of a layer up by some sections; those at its end begin at 0."""
    if not step:
        return
    for values in (sums, weights):
        depth = values.shape[-3]
        kept = max(depth - step, 0)
        if kept:
            values[..., :kept, :, :] = values[..., step:, :, :].clone()
        values[..., kept:, :, :] = 0


def _final(probabilities: Tensor) -> npt.NDArray[np.float16]:
    """Return probabilities within their ranges.

    Raises:
        TrialFailed: Some are not finite.
    """
    if not bool(torch.isfinite(probabilities).all()):
        raise TrialFailed(
            "prediction",
            "the network gives values that are not finite; its training diverged. Try a smaller "
            "learning rate",
            retry=False,
        )
    lowest = torch.tensor(LOWEST, device=probabilities.device).view(3, 1, 1, 1)
    result: npt.NDArray[np.float16] = (
        probabilities.clamp(lowest, torch.ones_like(lowest)).half().cpu().numpy()
    )
    return result
