"""How the intensities of a volume become network input: fitted once, on the whole of it.

Training and prediction share what is found here. A part of a volume, cut to be held out or to fit
into memory, is normalised as sections of the whole: that is what a user has who predicts it.
Sections that are equalised (`normalize: clahe`) are so once, before anything is cut from them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hydralv_tune.config.candidate import Data, ImageTransform
from hydralv_tune.config.errors import as_input_error
from hydralv_tune.data.volumes import Sections, Volume, windowed
from hydralv_tune.numerics.normalisation import (
    NOT_FINITE,
    Normalisation,
    equalised,
    fit_normalisation,
    normalisation_of,
    tissue_values,
)

Array = npt.NDArray[Any]
Size3 = tuple[int, int, int]

EQUALISED = (0.0, 255.0)
"""Range of equalised sections."""
PAD_MODES = {"reflect": "reflect", "constant": "constant", "replicate": "edge"}


def with_normalisation(volume: Volume, data: Data, scratch: Path | None = None) -> Volume:
    """Return a volume that carries how it is normalised, its sections equalised where asked.

    Args:
        volume: In memory or on disk; as it is where it carries that already.
        data: `data` of the candidate.
        scratch: File for the equalised sections of a volume on disk, a byte a voxel; one without
            a name, gone with the process, where none is given.

    Raises:
        InputError: The image holds values that are not finite.
    """
    if volume.normalisation is not None:
        return volume
    image: Any = volume.image
    with as_input_error(f"Volume '{volume.name}'"):
        if isinstance(image, np.ndarray):
            image, fitted = fit_image(image, data)
            return replace(volume, image=image, normalisation=fitted)
        if data.image_transform.normalize == "clahe":
            image = windowed(_equalised_on_disk(image, image.shape, scratch))
            fitted = normalisation_of("0-1", *EQUALISED, (), image.shape[0])
        else:
            fitted = stream_normalisation(image, data)
        return replace(volume, image=image, normalisation=fitted)


def _equalised_on_disk(sections: Iterable[Array], shape: Size3, scratch: Path | None) -> Array:
    """Return equalised sections (Z, Y, X), uint8, that lie in a file."""
    with tempfile.TemporaryFile() if scratch is None else scratch.open("w+b") as file:
        into = np.memmap(file, np.uint8, "w+", shape=shape)
    for z, section in enumerate(sections):
        into[z] = equalised(section)
    into.flush()
    return into


def fit_image(image: Array, data: Data) -> tuple[Array, Normalisation]:
    """Return an image in memory, its sections equalised where asked, and how it is normalised.

    Args:
        image: (Z, Y, X).
        data: `data` of the candidate.

    Raises:
        ValueError: The image holds values that are not finite.
    """
    chosen = data.image_transform
    if chosen.normalize == "clahe":
        image = np.stack([equalised(section) for section in image])
        return image, normalisation_of("0-1", *EQUALISED, (), len(image))
    return image, fit_normalisation(
        image,
        mode=chosen.normalize,
        clip_low=chosen.clip_percentile_low,
        clip_high=chosen.clip_percentile_high,
        fill=chosen.fill,
    )


def stream_normalisation(image: Sections, data: Data) -> Normalisation:
    """Return how a volume is normalised, as `fit_normalisation`, reading a section at a time.

    Percentiles come from a histogram of whole numbers, exact for 8 and 16 bits; of other types
    from a sample of each section.

    Args:
        image: (Z, Y, X).
        data: `data` of the candidate.

    Raises:
        ValueError: The image holds values that are not finite.
    """
    chosen = data.image_transform
    low, high = _clip_range(image, chosen)
    sections = (tissue_values(section, chosen.fill) for section in image)
    return normalisation_of(chosen.normalize, low, high, sections, image.shape[0])


def _clip_range(image: Sections, chosen: ImageTransform) -> tuple[float, float]:
    """Return the intensities at the two shares."""
    low, high = chosen.clip_percentile_low, chosen.clip_percentile_high
    ends: list[tuple[float, float]] = []  # of each section
    whole: list[tuple[float, float]] = []
    samples: list[Array] = []
    counts = np.zeros(1 << 16, np.int64)
    histogram = image.dtype.kind in "iu" and image.dtype.itemsize <= 2
    darkest = np.iinfo(image.dtype).min if histogram else 0
    for section in image:
        tissue = tissue_values(section, chosen.fill)
        whole.append((float(section.min()), float(section.max())))
        if not np.isfinite(whole[-1]).all():
            raise ValueError(NOT_FINITE)
        if not tissue.size:
            continue
        ends.append((float(tissue.min()), float(tissue.max())))
        if (low, high) == (0.0, 1.0):
            continue
        if histogram:
            counts += np.bincount(tissue.astype(np.int64) - darkest, minlength=len(counts))
        else:
            samples.append(tissue[:: max(tissue.size // 4096, 1)])
    if histogram and counts.any():
        # Two values of the sorted volume around each quantile, as NumPy interpolates them.
        ranks = np.array([low, high]) * (counts.sum() - 1)
        cumulative = np.cumsum(counts)
        below = np.searchsorted(cumulative, np.floor(ranks), side="right")
        after = np.searchsorted(cumulative, np.ceil(ranks), side="right")
        found = darkest + below + (after - below) * (ranks - np.floor(ranks))
        return float(found[0]), float(found[1])
    if samples:
        first, last = np.quantile(np.concatenate(samples), [low, high])
        return float(first), float(last)
    lows, highs = zip(*(whole if chosen.fill == "zeros" or not ends else ends), strict=True)
    return min(lows), max(highs)


def as_it_was_trained(candidate: Mapping[str, Any]) -> dict[str, Any]:
    """Return a stored candidate with what the version that wrote it did without a key for it.

    Args:
        candidate: The mapping in a checkpoint or a record.
    """
    data = dict(candidate.get("data") or {})
    data["image_transform"] = {"fill": "zeros", **(data.get("image_transform") or {})}
    return {**candidate, "data": data}


def padded_normalisation(fitted: Normalisation, pad: int, mode: str) -> Normalisation:
    """Return the statistics of the sections, those of the rim as the rim itself."""
    if not pad:
        return fitted
    kind = "edge" if mode == "constant" else PAD_MODES[mode]
    low, high, offset, scale = (
        np.pad(values, pad, mode=kind)  # type: ignore[call-overload]
        for values in (fitted.low, fitted.high, fitted.offset, fitted.scale)
    )
    return Normalisation(low=low, high=high, offset=offset, scale=scale)
