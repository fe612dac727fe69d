"""Probabilities to instances: `DECODERS` holds each decoder under its name.

To add one, write a function of (probabilities, mask, keyword arguments) and enter it there.
Neither decoder writes to its input.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from hydralv_tune.numerics.watershed.flood import Workspace, keep_large
from hydralv_tune.numerics.watershed.graph import (
    CHANNELS,
    FLOOR,
    WatershedGraph,
    contour_relief,
    distance_relief,
    foreground_relief,
)

Array = npt.NDArray[Any]
Labels = npt.NDArray[np.int32]
Pair = Sequence[float | None]
Decoder = Callable[..., Labels]


def checked_pair(name: str, pair: Pair) -> tuple[float, float | None]:
    """Return a threshold pair (seed, foreground); None or infinity switches a contour test off.

    Raises:
        ValueError: It is no pair of finite numbers, or None stands elsewhere.
    """
    if isinstance(pair, str) or not isinstance(pair, Sequence) or len(pair) != 2:
        raise ValueError(f"{name} is {pair!r}, but it is a pair: [seed, foreground]")
    seed, foreground = (checked_threshold(name, value) for value in pair)
    return (np.inf if seed is None else seed), foreground


def checked_threshold(name: str, value: Any) -> float | None:
    """Return one threshold; None, which only a contour threshold may be, is off.

    Raises:
        ValueError: It is no finite number.
    """
    if name.startswith("contour_threshold") and (value is None or value == np.inf):
        return None
    number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    if not number or not np.isfinite(value):
        raise ValueError(f"{name} holds {value!r}, but a threshold is a finite number")
    return float(value)


def checked_size(name: str, size: Any) -> int:
    """Return a size in voxels.

    Raises:
        ValueError: It is no integer from 0 on.
    """
    number = isinstance(size, int | float | np.number) and not isinstance(size, bool)
    if not number or not np.isfinite(size) or int(size) != size or size < 0:
        raise ValueError(f"{name} is {size!r}, but it is a number of voxels from 0 on")
    return int(size)


def above(channel: int, threshold: float | None) -> float:
    """Return the threshold for `value > threshold`, with the contour negated."""
    if channel == 1:
        return -np.inf if threshold is None else -float(threshold)
    if threshold is None:
        raise ValueError(f"{CHANNELS[channel]}_threshold is None, but only contour may be off")
    return float(threshold)


def _labels_of(
    relief: WatershedGraph, seeds: Array, min_seed_size: int, min_instance_size: int
) -> Labels:
    """Return the volume of labels after seeds and flood, renumbered from 1.

    Args:
        relief: Its wanted nodes are the foreground.
        seeds: (channels,), float64, the seed thresholds.
        min_seed_size, min_instance_size: In voxels.
    """
    space = Workspace(relief)
    kept, names, _ = keep_large(*space.seeds(seeds), min_seed_size)
    labels = np.where(relief.wanted, space.flooded(kept, names), 0)
    sizes = np.bincount(labels, minlength=1)
    large = sizes >= max(min_instance_size, 1)
    large[0] = False
    renamed = np.where(large, np.cumsum(large), 0).astype(np.int32)
    volume = np.zeros(relief.box.shape, np.int32)
    found = np.flatnonzero(labels)
    volume.ravel()[relief.box.voxels_of(relief.nodes[found])] = renamed[labels[found]]
    return volume


def decode_instance_binary_contour_distance(
    probabilities: Array,
    mask: Array | None = None,
    *,
    binary_threshold: Pair = (0.5, 0.7),
    contour_threshold: Pair = (0.8, None),
    distance_threshold: Pair = (0.5, -0.5),
    min_seed_size: int = 4,
    min_instance_size: int = 0,
    flood: str = "support",
    floor: float = FLOOR,
) -> Labels:
    """Return instances: seeds from three maps, a watershed on the distance, then foreground.

    Each pair is (seed, foreground). Seeds are 26-connected components of binary > seed,
    contour < seed, distance > seed. The flood does not depend on the foreground thresholds.

    Args:
        probabilities: (3, Z, Y, X), float16 or float32.
        mask: (Z, Y, X); only voxels above 0 are decoded. The whole volume where there is none.
        binary_threshold: In [0, 1].
        contour_threshold: In [0, 1]; above 1 or None is off.
        distance_threshold: In [-1, 1].
        min_seed_size: Seeds under so many voxels are dropped.
        min_instance_size: Instances under so many voxels are dropped.
        flood: `support` floods only where binary > floor or distance > 0; `volume` floods the
            whole mask, as PyTorch Connectomics does.
        floor: Probability.

    Returns:
        (Z, Y, X), int32, ids from 1, 0 is background; empty where there is no seed.

    Raises:
        ValueError: The input or an argument breaks its rule.
    """
    pairs = [
        checked_pair("binary_threshold", binary_threshold),
        checked_pair("contour_threshold", contour_threshold),
        checked_pair("distance_threshold", distance_threshold),
    ]
    least = checked_size("min_seed_size", min_seed_size)
    smallest = checked_size("min_instance_size", min_instance_size)
    seeds = [above(channel, pair[0]) for channel, pair in enumerate(pairs)]
    limits = [above(channel, pair[1]) for channel, pair in enumerate(pairs)]
    relief = contour_relief(
        probabilities, mask, seeds=seeds, limits=limits, flood=flood, floor=floor
    )
    return _labels_of(relief, np.array(seeds), least, smallest)


def decode_instance_watershed_distance(
    probabilities: Array,
    mask: Array | None = None,
    *,
    distance_threshold: Pair = (0.5, 0.0),
    min_seed_size: int = 4,
    min_instance_size: int = 0,
) -> Labels:
    """Return instances from the distance alone.

    Foreground is distance > foreground, seeds are 26-connected components of distance > seed
    (cut to the foreground), and the flood runs inside the foreground on the Euclidean distance
    recomputed from it.

    Args:
        probabilities: (3, Z, Y, X), float16 or float32.
        mask: (Z, Y, X); only voxels above 0 are decoded.
        distance_threshold: (seed, foreground) in [-1, 1].
        min_seed_size: Seeds under so many voxels are dropped.
        min_instance_size: Instances under so many voxels are dropped.

    Returns:
        (Z, Y, X), int32, ids from 1, 0 is background.

    Raises:
        ValueError: The input or an argument breaks its rule.
    """
    seed, foreground = checked_pair("distance_threshold", distance_threshold)
    low = above(2, foreground)
    least = checked_size("min_seed_size", min_seed_size)
    smallest = checked_size("min_instance_size", min_instance_size)
    relief = distance_relief(probabilities, mask, seed=seed, lowest=min(seed, low))
    relief = foreground_relief(relief, low)
    return _labels_of(relief, np.array([seed]), least, smallest)


DECODERS: dict[str, Decoder] = {
    "decode_instance_binary_contour_distance": decode_instance_binary_contour_distance,
    "decode_instance_watershed_distance": decode_instance_watershed_distance,
    "decode_distance_watershed": decode_instance_watershed_distance,
}


def decoder_arguments(name: str) -> dict[str, Any]:
    """Return the arguments of a decoder and their defaults.

    Raises:
        ValueError: No decoder has that name.
    """
    if name not in DECODERS:
        raise ValueError(f"Unknown decoder '{name}'. Known: {', '.join(sorted(DECODERS))}.")
    return {
        key: list(parameter.default) if isinstance(parameter.default, tuple) else parameter.default
        for key, parameter in inspect.signature(DECODERS[name]).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }


def decode(name: str, probabilities: Array, mask: Array | None = None, **arguments: Any) -> Labels:
    """Return the instances that the decoder of that name finds.

    Args:
        name: A key of `DECODERS`.
        probabilities: (3, Z, Y, X), float16 or float32.
        mask: (Z, Y, X); only voxels above 0 are decoded.
        arguments: Of the decoder; what is left out takes its default.

    Returns:
        (Z, Y, X), int32, ids from 1, 0 is background.

    Raises:
        ValueError: The name or an argument is unknown, or the input breaks its rule.
    """
    known = decoder_arguments(name)
    for key in arguments:
        if key not in known:
            raise ValueError(f"Unknown argument '{key}' of {name}. Known: {', '.join(known)}.")
    return DECODERS[name](probabilities, mask, **arguments)
