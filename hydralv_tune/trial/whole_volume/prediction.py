"""Probabilities of a volume of any size, written section by section as they become final.

Windows are taken in the order and with the weights of `predict`. Those that begin at one section
are a layer; what lies before the next layer is final and leaves the memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from monai.data.utils import compute_importance_map
from torch import Tensor

from hydralv_tune.config.candidate import Candidate
from hydralv_tune.config.errors import TrialFailed
from hydralv_tune.trial.scoring.prediction import BACKGROUND, LOWEST, Size3, Windows
from hydralv_tune.trial.whole_volume.padded_image import PaddedImage, Span

Array = npt.NDArray[Any]
Predictor = Callable[[Tensor], Tensor]
Wanted = Callable[[Span, Span, Span], Array | None]
BYTES_A_VOXEL = 4 * (3 + 1 + 2)
"""Of a lane's layer: sums of three channels, their weight, image and one temporary, float32."""


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


def plan_lanes(
    shape: Sequence[int], windows: Windows, *, memory_bytes: float, least: int = 1
) -> list[Lane]:
    """Return the lanes of a volume, each small enough to be predicted within the memory.

    One lane, where it fits, computes every window once; windows at a border between lanes are
    computed for both.

    Args:
        shape: (z, y, x) of the volume.
        windows: How it is cut.
        memory_bytes: What the sums of one layer may take.
        least: How many lanes there are at least, as far as the sections go: one a worker.
    """
    columns = [1, 1]
    while True:
        sides = [math.ceil(shape[1 + axis] / columns[axis]) for axis in range(2)]
        wide = [
            min(s + 2 * w, p)
            for s, w, p in zip(sides, windows.size[1:], windows.shape[1:], strict=True)
        ]
        if windows.size[0] * wide[0] * wide[1] * BYTES_A_VOXEL <= memory_bytes or max(sides) == 1:
            break
        columns[0 if sides[0] >= sides[1] else 1] += 1
    rows = min(max(math.ceil(least / math.prod(columns)), 1), math.ceil(shape[0] / windows.size[0]))
    cuts = [_cuts(shape[0], rows), _cuts(shape[1], columns[0]), _cuts(shape[2], columns[1])]
    return [Lane((z[0], y[0], x[0]), (z[1], y[1], x[1])) for z, y, x in product(*cuts)]


def _cuts(side: int, count: int) -> list[Span]:
    """Return an axis in parts of nearly equal length, cut at multiples of 16 where it can be."""
    step = math.ceil(side / count)
    if count > 1 and step > 16:
        step = math.ceil(step / 16) * 16
    return [(first, min(first + step, side)) for first in range(0, side, step)]


def predicted_sections(
    image: PaddedImage, candidate: Candidate, windows: Windows, lane: Lane, *,
    predictor: Predictor, wanted: Wanted, batch: int, device: torch.device,
    progress: Callable[[int], None], start: int | None = None,
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

    Yields:
        (first section, (3, z, y, x) float16) without gaps.

    Raises:
        TrialFailed: The network gives values that are not finite.
    """
    window = candidate.inference.sliding_window
    size, before = windows.size, windows.before
    low = [v + b for v, b in zip(lane.low, before, strict=True)]
    high = [v + b for v, b in zip(lane.high, before, strict=True)]
    emitted = low[0] if start is None else start + before[0]
    weight = compute_importance_map(
        size, mode=window.blending, sigma_scale=window.sigma_scale, device=device,
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
    sums = torch.zeros((3, size[0], *sides), device=device)
    weights = torch.zeros((size[0], *sides), device=device)
    background = torch.tensor(BACKGROUND, device=device).view(3, 1, 1, 1)
    top = layers[0]
    for number, z in enumerate(layers):
        _roll(sums, weights, z - top)
        top = z
        span_z = (z, z + size[0])
        layer = torch.from_numpy(image.read(span_z, span_y, span_x)).to(device)
        mask = wanted(span_z, span_y, span_x)
        places = list(product(columns[1], columns[2]))
        corners = {(y, x): (y - span_y[0], x - span_x[0]) for y, x in places}
        chosen = [
            place for place, (y, x) in corners.items()
            if mask is None or mask[:, y : y + size[1], x : x + size[2]].any()
        ]  # fmt: skip
        results = _results(layer, [corners[place] for place in chosen], size, predictor, batch)
        found = dict(zip(chosen, results, strict=True))
        for y, x in places:
            inner_y, outer_y = _overlap(y, size[1], low[1], high[1])
            inner_x, outer_x = _overlap(x, size[2], low[2], high[2])
            part = weight[:, inner_y, inner_x]
            value = found[y, x][:, :, inner_y, inner_x] if (y, x) in found else background
            sums[:, :, outer_y, outer_x] += value * part
            weights[:, outer_y, outer_x] += part
        progress(len(places))
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
    layer: Tensor, corners: Sequence[tuple[int, int]], size: Size3, predictor: Predictor, batch: int
) -> list[Tensor]:
    """Return the probabilities of the windows of a layer that begin at the given corners."""
    results: list[Tensor] = []
    with torch.inference_mode():
        for first in range(0, len(corners), batch):
            inputs = [
                layer[None, :, y : y + size[1], x : x + size[2]]
                for y, x in corners[first : first + batch]
            ]
            results.extend(predictor(torch.stack(inputs)))
    return results


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
