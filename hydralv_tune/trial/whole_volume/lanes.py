"""The lanes of a volume: parts that are predicted one by one, each within the memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product

from hydralv_tune.trial.scoring.stitching import Lane, Span, Windows

BYTES_A_VOXEL = 4 * (3 + 1 + 2)
"""Of a lane's layer: sums of three channels, their weight, image and one temporary, float32."""


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
    """Return an axis in parts of nearly equal length, cut at multiples of 16."""
    step = math.ceil(side / count)
    if count > 1:
        step = math.ceil(step / 16) * 16
    return [(first, min(first + step, side)) for first in range(0, side, step)]
