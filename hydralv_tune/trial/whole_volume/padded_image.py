"""Boxes of a volume as the network sees it, read from disk: padded and normalised as in the whole.

Padding is separable, so each axis has a table that says which voxel stands at a padded place.
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import numpy.typing as npt

from hydralv_tune.config.candidate import Candidate
from hydralv_tune.data.volumes import Sections
from hydralv_tune.numerics.normalisation import Normalisation
from hydralv_tune.trial.fitted_normalisation import padded_normalisation
from hydralv_tune.trial.scoring.prediction import PAD_MODES
from hydralv_tune.trial.scoring.stitching import Span, Windows

Array = npt.NDArray[Any]
Ints = npt.NDArray[np.int64]
OUTSIDE = -1
"""In a table of places: a constant stands there, no voxel."""


class PaddedImage:
    """A padded, normalised volume (z, y, x) that is read box by box.

    Each box equals the same part of the volume that `predict` pads and normalises at once.

    Args:
        image: (Z, Y, X), in memory or on disk.
        windows: How the volume is padded.
        candidate: Its `data.pad_size`, `data.pad_mode` and `inference.sliding_window`.
        normalisation: Of the sections of the image.
    """

    def __init__(
        self, image: Sections, windows: Windows, candidate: Candidate, normalisation: Normalisation
    ) -> None:
        data = candidate.data
        self._image = image
        self._normalisation = padded_normalisation(normalisation, data.pad_size[0], data.pad_mode)
        outer = candidate.inference.sliding_window.padding_mode
        self._context: list[Ints] = []
        self._rim: list[Ints] = []
        for axis in range(3):
            pad, before = data.pad_size[axis], windows.before[axis]
            context = _places(image.shape[axis], (pad, pad), data.pad_mode)
            rest = (before - pad, windows.shape[axis] - len(context) - (before - pad))
            self._context.append(context)
            self._rim.append(_places(len(context), rest, outer))

    def read(self, z: Span, y: Span, x: Span) -> npt.NDArray[np.float32]:
        """Return the box between first and end places of the padded volume, float32."""
        rims = [table[first:end] for table, (first, end) in zip(self._rim, (z, y, x), strict=True)]
        contexts = [
            table[np.maximum(rim, 0)] for table, rim in zip(self._context, rims, strict=True)
        ]
        voxels = [np.maximum(context, 0) for context in contexts]
        box = tuple(slice(int(v.min()), int(v.max()) + 1) for v in voxels)
        raw = np.asarray(cast(Any, self._image)[box])
        raw = raw[np.ix_(*(v - part.start for v, part in zip(voxels, box, strict=True)))]
        _fill(raw, contexts)
        fitted = self._normalisation
        sections = np.maximum(rims[0], 0)
        here = Normalisation(
            low=fitted.low[sections],
            high=fitted.high[sections],
            offset=fitted.offset[sections],
            scale=fitted.scale[sections],
        )
        result = here.apply(raw)
        _fill(result, rims)
        return result


def _places(side: int, widths: Span, mode: str) -> Ints:
    """Return for each place of a padded axis which voxel stands there, or `OUTSIDE`."""
    places = np.arange(side)
    if mode == "constant":
        return np.pad(places, widths, constant_values=OUTSIDE)
    return np.asarray(np.pad(places, widths, mode=cast(Any, PAD_MODES[mode])))


def _fill(box: Array, tables: list[Ints]) -> None:
    """Write 0 where a constant stands along any axis."""
    for axis, table in enumerate(tables):
        outside = table == OUTSIDE
        if outside.any():
            box[(*(slice(None),) * axis, outside)] = 0
