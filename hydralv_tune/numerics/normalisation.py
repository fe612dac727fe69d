"""Image intensities to network input, by the same rule in training and in prediction."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from torch import Tensor

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]

MODES = ("0-1", "z_volume", "z_section", "none")
CLAHE_TILES = 7
"""Tiles along each side of a section."""
CLAHE_CLIP = 2.0
"""Most voxels of a grey level in a tile, as a multiple of what a flat histogram has."""
GREY_LEVELS = 256
FILLS = ("constant", "zeros")
FILL_SHARE = 0.05
"""From this share of a section on, voxels of one constant value are fill, not tissue."""
NOT_FINITE = "the image holds values that are not finite (NaN or inf)."
FLAT = 1e-6
"""A spread under this share of the largest value is rounding: such a section becomes 0."""


@dataclass(frozen=True)
class Normalisation:
    """What is done to every voxel of a section: clip to [low, high], then (v - offset) * scale.

    Args:
        low: (Z,) float32, least intensity kept.
        high: (Z,) float32, largest intensity kept.
        offset: (Z,) float32, intensity that becomes 0.
        scale: (Z,) float32, 0 where a section is constant.
    """

    low: Floats
    high: Floats
    offset: Floats
    scale: Floats

    def of_sections(self, start: int, stop: int) -> Normalisation:
        """Return what is done to some sections of the volume.

        Args:
            start: First section.
            stop: Section after the last.
        """
        return Normalisation(
            low=self.low[start:stop],
            high=self.high[start:stop],
            offset=self.offset[start:stop],
            scale=self.scale[start:stop],
        )

    @overload
    def apply(self, image: Array) -> Floats: ...
    @overload
    def apply(self, image: Tensor) -> Tensor: ...
    def apply(self, image: Array | Tensor) -> Floats | Tensor:
        """Return the image as the network gets it, float32 of the same shape.

        Args:
            image: (Z, Y, X) array, or a tensor of that shape on any device.

        Raises:
            ValueError: The image has another number of sections.
        """
        if image.ndim != 3 or image.shape[0] != len(self.low):
            raise ValueError(
                f"image has shape {tuple(image.shape)}, but must be ({len(self.low)}, Y, X)."
            )
        if not isinstance(image, np.ndarray):
            import torch

            lows, highs, offsets, scales = (
                torch.from_numpy(values).to(image.device)[:, None, None]
                for values in (self.low, self.high, self.offset, self.scale)
            )
            return (image.float().clamp(lows, highs) - offsets) * scales
        low, high, offset, scale = (
            values[:, None, None] for values in (self.low, self.high, self.offset, self.scale)
        )
        clipped = np.clip(image.astype(np.float32), low, high)
        return np.asarray((clipped - offset) * scale, np.float32)


def fit_normalisation(
    image: Array | Tensor,
    *,
    mode: str = "0-1",
    clip_low: float = 0.0,
    clip_high: float = 1.0,
    fill: str = "constant",
    mask: Array | Tensor | None = None,
) -> Normalisation:
    """Return how a volume is normalised.

    Neither range nor statistics come from constant sections, which are missing, nor from fill, so
    a volume is normalised alike with padding and without. They come from the mask where one is
    given. A prediction seldom knows the mask of the training: give one in both, or in neither.

    Args:
        image: (Z, Y, X), any number type.
        mode: `0-1` (clip per volume, then to [0, 1]), `z_volume` (mean 0, deviation 1 over the
            volume), `z_section` (over each section), `none` (clip only).
        clip_low: Share of the voxels, 0 to 1, that are clipped at the dark end.
        clip_high: Share from which on voxels are clipped at the bright end.
        fill: What is left out of a section once it is `FILL_SHARE` of it: `constant`, regions of
            one value; `zeros`, zeros alone and not from the range that shares of 0 and 1
            span, as checkpoints before version 2 were trained.
        mask: (Z, Y, X), voxels above 0 count; a section that it leaves out counts as a whole.

    Raises:
        ValueError: The mode is unknown, the shares are out of order, a shape differs, or the
            image holds values that are not finite.
    """
    if mode not in MODES:
        raise ValueError(f"Unknown normalisation '{mode}'. Known: {', '.join(MODES)}.")
    if not 0 <= clip_low < clip_high <= 1:
        raise ValueError(
            f"clip percentiles are {clip_low:g} and {clip_high:g}, but must satisfy "
            "0 <= low < high <= 1. They are shares: 0.01, not 1."
        )
    volume = _as_array(image)
    if volume.ndim != 3 or not volume.size:
        raise ValueError(f"image has shape {volume.shape}, but must be (Z, Y, X).")
    if mask is not None and tuple(mask.shape) != volume.shape:
        raise ValueError(f"mask has shape {tuple(mask.shape)}, but the image has {volume.shape}.")
    sections = _counted(volume, None if mask is None else _as_array(mask) > 0, fill)
    if clip_low == 0 and clip_high == 1:
        counted = [volume] if fill == "zeros" else [s for s in sections if s.size]
        # NumPy keeps a NaN of any section; Python's own minimum loses it.
        low = float(np.min([values.min() for values in counted]))
        high = float(np.max([values.max() for values in counted]))
    else:
        low, high = map(float, np.quantile(np.concatenate(sections), [clip_low, clip_high]))
    if not (np.isfinite(low) and np.isfinite(high)):
        raise ValueError(NOT_FINITE)
    return normalisation_of(mode, low, high, sections, len(volume))


def normalisation_of(
    mode: str, low: float, high: float, sections: Iterable[Array], depth: int
) -> Normalisation:
    """Return the normalisation that follows from the range of a volume and its sections.

    Args:
        mode: One of `MODES`.
        low: Least intensity kept.
        high: Largest intensity kept.
        sections: The voxels of each that statistics come from; read where the mode has any.
        depth: Number of sections.

    Raises:
        ValueError: The range is beyond that of single precision.
    """
    if max(abs(low), abs(high)) > float(np.finfo(np.float32).max):
        raise ValueError(
            f"the image holds values from {low:g} to {high:g}, more than single precision can "
            "hold. Scale it down."
        )
    if mode.startswith("z_"):
        moments = [_moments(section, low, high) for section in sections]
        mean, deviation, voxels = (np.array(column) for column in zip(*moments, strict=True))
    if mode == "z_section":
        offset, spread = mean, deviation
    elif mode == "z_volume":
        weights = voxels if voxels.any() else np.ones(depth)
        centre = np.average(mean, weights=weights)
        variance = np.average(deviation**2 + (mean - centre) ** 2, weights=weights)
        offset, spread = np.full(depth, centre), np.full(depth, np.sqrt(variance))
    elif mode == "0-1":
        offset, spread = np.full(depth, low), np.full(depth, high - low)
    else:
        offset, spread = np.zeros(depth), np.ones(depth)
    tiny = FLAT * max(abs(low), abs(high))
    scale = np.divide(1.0, spread, out=np.zeros(depth), where=spread > tiny)
    return Normalisation(
        low=np.full(depth, low, np.float32),
        high=np.full(depth, high, np.float32),
        offset=offset.astype(np.float32),
        scale=scale.astype(np.float32),
    )


def equalised(section: Array) -> npt.NDArray[np.uint8]:
    """Return a section with its contrast equalised tile by tile (CLAHE), 0 to 255.

    The whole section is needed, since its tiles are: a crop of the result is not that of a crop.

    Args:
        section: (Y, X), any number type. A constant one becomes 0.

    Raises:
        ValueError: It holds values that are not finite.

    Source:
        scikit-image's `equalize_adapthist`, with the tiles and the clip limit that OpenCV calls
        7 x 7 and 2.
    """
    from skimage.exposure import equalize_adapthist

    low, high = float(section.min()), float(section.max())
    if not np.isfinite([low, high]).all():
        raise ValueError(NOT_FINITE)
    if low == high:
        return np.zeros(section.shape, np.uint8)
    tile = [math.ceil(side / CLAHE_TILES) for side in section.shape]
    share = CLAHE_CLIP / GREY_LEVELS
    grey = (section - low) / (high - low)
    stretched = equalize_adapthist(grey, tile, clip_limit=share, nbins=GREY_LEVELS)
    return np.rint(stretched * (GREY_LEVELS - 1)).astype(np.uint8)


@overload
def normalise(image: Array, **arguments: Any) -> Floats: ...
@overload
def normalise(image: Tensor, **arguments: Any) -> Tensor: ...
def normalise(image: Array | Tensor, **arguments: Any) -> Floats | Tensor:
    """Return a volume as the network gets it, float32 of the same shape.

    Args:
        image: (Z, Y, X); a tensor stays on its device.
        arguments: As in `fit_normalisation`.

    Raises:
        ValueError: As there.
    """
    return fit_normalisation(image, **arguments).apply(image)


def _as_array(values: Array | Tensor) -> Array:
    """Return the values on the host."""
    return np.asarray(values.detach().cpu() if hasattr(values, "detach") else values)


def fill_of(section: Array, fill: str = "constant") -> npt.NDArray[np.bool_]:
    """Return the voxels of a section that hold no tissue (Y, X): zeros, or constant regions.

    A voxel lies in a constant region where it equals three neighbours that form a square with it.

    Args:
        section: (Y, X).
        fill: One of `FILLS`.
    """
    if fill == "zeros":
        zeros = section == 0
        return zeros if zeros.mean() >= FILL_SHARE else np.zeros_like(zeros)
    corner = section[1:, 1:]
    square = (corner == section[:-1, :-1]) & (corner == section[:-1, 1:])
    square &= corner == section[1:, :-1]
    flat = np.zeros(section.shape, bool)
    if square.mean() < FILL_SHARE / 2:
        return flat
    for rows in (slice(0, -1), slice(1, None)):
        for columns in (slice(0, -1), slice(1, None)):
            flat[rows, columns] |= square
    values, counts = np.unique(section[flat], return_counts=True)
    return flat & np.isin(section, values[counts >= FILL_SHARE * section.size])


def tissue_values(section: Array, fill: str = "constant") -> Array:
    """Return the voxels that range and statistics come from (N,): none of a constant section.

    Args:
        section: (Y, X).
        fill: One of `FILLS`.
    """
    if section.min() == section.max():
        return section[:0].ravel()
    return np.asarray(section[~fill_of(section, fill)])


def _counted(volume: Array, valid: Array | None, fill: str) -> list[Array]:
    """Return the voxels of each section that statistics come from; none of a constant one.

    A section that the mask leaves out counts wholly for itself: it is normalised too.
    """
    sections = []
    for z, section in enumerate(volume):
        if valid is not None and section.min() < section.max():
            inside = valid[z] & ~fill_of(section, fill)
            sections.append(section[inside] if inside.any() else tissue_values(section, fill))
        else:
            sections.append(tissue_values(section, fill))
    return sections if any(s.size for s in sections) else [s.ravel() for s in volume]


def _moments(values: Array, low: float, high: float) -> tuple[float, float, int]:
    """Return mean, standard deviation and number of the clipped values."""
    if not values.size:
        return 0.0, 0.0, 0
    clipped = np.clip(values.astype(np.float64), low, high)
    return float(clipped.mean()), float(clipped.std()), clipped.size
