"""Stand-ins for a network's output: the targets of known labels, blurred and made noisy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.ndimage import gaussian_filter

from hydralv_tune.numerics.targets import binary_target, instance_boundary, instance_edt

CHANNELS: tuple[tuple[Callable[[npt.NDArray[Any]], npt.NDArray[Any]], float], ...] = (
    (binary_target, 0.0),
    (instance_boundary, 0.0),
    (instance_edt, -1.0),
)
"""The target of each channel, with the lowest value it takes."""

GRAIN = 2.0
"""The width of the noise in voxels: a network errs in patches, not in single voxels."""


def degraded_probabilities(
    labels: npt.NDArray[Any], *, seed: int = 0, blur: float = 0.8, noise: float = 0.13
) -> npt.NDArray[np.float16]:
    """Return probabilities as a middling network would predict them for these labels.

    Args:
        labels: (Z, Y, X), integers; 0 is background.
        seed: Of the noise.
        blur: Width in voxels of the blur of the targets.
        noise: Standard deviation of the noise.

    Returns:
        (3, Z, Y, X), float16: binary and boundary in [0, 1], distance in [-1, 1].
    """
    rng = np.random.default_rng(seed)
    maps = np.empty((3, *labels.shape), np.float16)
    for channel, (target, lowest) in enumerate(CHANNELS):
        grain = gaussian_filter(rng.standard_normal(labels.shape, dtype=np.float32), GRAIN)
        grain *= noise / max(float(grain.std()), 1e-9)
        clean = gaussian_filter(target(labels).astype(np.float32), blur)
        maps[channel] = np.clip(clean + grain, lowest, 1.0)
    return maps
