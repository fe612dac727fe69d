"""Probabilities to instances: `DECODERS` holds each decoder under its name.

To add one, write a function of (probabilities, mask, keyword arguments) and enter it there.
Neither decoder writes to its input.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.ndimage import distance_transform_edt

from hydralv_tune.flood import Nodes, components, flood, flood_ranks, keep_large, nodes_of
from hydralv_tune.metrics import checked_mask

Array = npt.NDArray[Any]
Labels = npt.NDArray[np.int32]
Pair = Sequence[float | None]
Decoder = Callable[..., Labels]

CHANNELS = ("binary", "contour", "distance")
LOWEST = (0.0, 0.0, -1.0)
FLOOR = 0.1
SLACK = 1e-3
"""How far a value may leave its range: float16 rounds, and a mean of flips may pass 1 by an ulp."""


def checked_probabilities(probabilities: Array) -> Array:
    """Return probabilities as floats.

    Args:
        probabilities: (3, Z, Y, X); binary and boundary in [0, 1], distance in [-1, 1].

    Raises:
        ValueError: Channels are missing, a value is no number or outside its range.
    """
    array = np.asarray(probabilities)
    if array.ndim != 4 or array.shape[0] != 3:
        raise ValueError(
            f"probabilities have shape {array.shape}, but (3, Z, Y, X) is due: "
            "binary, boundary, distance"
        )
    if not np.issubdtype(array.dtype, np.floating):
        raise ValueError(f"probabilities have dtype {array.dtype}, but float16 or float32 is due")
    for name, lowest, channel in zip(CHANNELS, LOWEST, array, strict=True):
        low, high = (float(channel.min()), float(channel.max())) if channel.size else (0.0, 0.0)
        if not (np.isfinite(low) and np.isfinite(high)):
            raise ValueError(f"the {name} channel holds values that are not finite (NaN or inf)")
        if low < lowest - SLACK or high > 1.0 + SLACK:
            raise ValueError(
                f"the {name} channel spans [{low:.4g}, {high:.4g}], but [{lowest:g}, 1] is its "
                "range. Give probabilities after the activation, not logits."
            )
    return array


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


@dataclass(frozen=True)
class Field:
    """What seeds and flood need of one volume: nodes, their values, and flood ranks.

    `values` is (channels, nodes) float32, with the contour negated so that every test is
    `value > threshold`.
    """

    nodes: Nodes
    values: npt.NDArray[np.float32]
    ranks: npt.NDArray[np.int32]
    levels: int


def contour_field(
    probabilities: Array, mask: Array | None, *, flood: str = "support", floor: float = FLOOR
) -> Field:
    """Return the field of the decoder `decode_instance_binary_contour_distance`.

    Raises:
        ValueError: `flood` or `floor` is out of range, or the input is.
    """
    if flood not in ("support", "volume"):
        raise ValueError(f"Unknown flood '{flood}'. Known: support, volume.")
    if not 0.0 <= floor <= 1.0:
        raise ValueError(f"floor is {floor}, but it is a probability in [0, 1]")
    maps = checked_probabilities(probabilities)
    shape = maps.shape[1:]
    valid = checked_mask(mask, shape)
    if flood == "support":
        # Compared as float64, as every threshold is: float16 would round the threshold.
        domain = (maps[0] > np.float64(floor)) | (maps[2] > 0)
        if valid is not None:
            domain &= valid
    else:
        domain = np.ones(shape, bool) if valid is None else valid
    nodes = nodes_of(domain)
    values = np.empty((3, len(nodes)), np.float32)
    for channel in range(3):
        values[channel] = maps[channel].ravel()[nodes.voxel]
    np.negative(values[1], out=values[1])
    ranks, levels = flood_ranks(-np.maximum(values[2], 0))
    return Field(nodes, values, ranks, levels)


def distance_field(distance: Array, mask: Array | None, lowest: float) -> Field:
    """Return the field of the decoder `decode_instance_watershed_distance`.

    Args:
        distance: (Z, Y, X), float.
        mask: (Z, Y, X) or none.
        lowest: The lowest threshold in use; nothing under it matters.
    """
    valid = checked_mask(mask, distance.shape)
    domain = distance > np.float64(lowest)
    if valid is not None:
        domain &= valid
    nodes = nodes_of(domain)
    values = distance.ravel()[nodes.voxel].astype(np.float32)[None]
    return Field(nodes, values, np.zeros(len(nodes), np.int32), 1)


def foreground_ranks(
    field: Field, threshold: float
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.int32], int]:
    """Return where the distance is foreground, and the ranks of the distance recomputed there."""
    nodes = field.nodes
    allowed = field.values[0] > np.float64(threshold)
    foreground = np.zeros(nodes.shape, bool)
    foreground.ravel()[nodes.voxel[allowed]] = True
    if not allowed.any() or foreground.all():
        return allowed, np.zeros(len(nodes), np.int32), 1
    spans = [np.flatnonzero(foreground.any(axis=axes)) for axes in ((1, 2), (0, 2), (0, 1))]
    box = tuple(slice(max(span[0] - 1, 0), span[-1] + 2) for span in spans)
    height = np.zeros(nodes.shape, np.float32)
    # The nearest background touches the foreground, so a box one voxel wider is enough.
    height[box] = distance_transform_edt(foreground[box])
    ranks, levels = flood_ranks(-height.ravel()[nodes.voxel])
    return allowed, ranks, levels


def _labels_of(nodes: Nodes, labels: Labels, min_instance_size: int) -> Labels:
    """Return the volume of labels, renumbered from 1, without instances under the size."""
    sizes = np.bincount(labels, minlength=1)
    kept = sizes >= max(min_instance_size, 1)
    kept[0] = False
    names = np.where(kept, np.cumsum(kept), 0).astype(np.int32)
    volume = np.zeros(nodes.shape, np.int32)
    volume.ravel()[nodes.voxel] = names[labels]
    return volume


EVERYWHERE = np.zeros(0, bool)


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
    field = contour_field(probabilities, mask, flood=flood, floor=floor)
    seeds = np.array([above(channel, pair[0]) for channel, pair in enumerate(pairs)])
    labels = flooded(field, seeds, least, EVERYWHERE, field.ranks, field.levels)
    for channel, pair in enumerate(pairs):
        labels[~(field.values[channel] > np.float64(above(channel, pair[1])))] = 0
    return _labels_of(field.nodes, labels, smallest)


def flooded(
    field: Field, seeds: Array, min_seed_size: int, allowed: Array, ranks: Array, levels: int
) -> Labels:
    """Return the label of each node after seeds and flood."""
    nodes = field.nodes
    found = components(field.values, seeds, nodes.where, nodes.position, nodes.before)
    kept, names, _ = keep_large(*found, min_seed_size)
    return flood(kept, names, ranks, levels, allowed, nodes.where, nodes.position, nodes.faces)  # type: ignore[no-any-return]


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
    maps = checked_probabilities(probabilities)
    field = distance_field(maps[2], mask, min(seed, low))
    allowed, ranks, levels = foreground_ranks(field, low)
    if not allowed.any():
        return np.zeros(field.nodes.shape, np.int32)
    labels = flooded(field, np.array([seed]), least, allowed, ranks, levels)
    return _labels_of(field.nodes, labels, smallest)


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
