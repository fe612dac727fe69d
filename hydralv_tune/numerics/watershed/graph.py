"""What seeds and flood need of one volume, gathered section by section.

A box holds the domain with one layer of wall around it, so that a neighbour is found by adding
an offset, without a test for borders.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from hydralv_tune.numerics.metrics.contingency import checked_mask
from hydralv_tune.numerics.watershed.compiled import kernel

Array = npt.NDArray[Any]
Ints = npt.NDArray[np.int32]

CHANNELS = ("binary", "contour", "distance")
LOWEST = (0.0, 0.0, -1.0)
FLOOR = 0.1
SLACK = 1e-3
"""How far a value may leave its range: float16 rounds, and a mean of flips may pass 1 by an ulp."""
HIGHEST_BITS, LOWEST_BITS = np.array([1, -1], np.float16).view(np.uint16)
MOST_PLACES = 2**31 - 1
DOMAIN, SEED, NEEDED, BASIN = 1, 2, 4, 8


@dataclass(frozen=True)
class Box:
    """A part of a volume with one layer of wall around it.

    `low` is its first voxel in the volume, `padded` its size with the wall. `faces` are the
    offsets of the 6 neighbours in raster order, `before` those of the 13 that precede a voxel.
    """

    shape: tuple[int, int, int]
    low: tuple[int, int, int]
    padded: tuple[int, int, int]
    faces: npt.NDArray[np.int64]
    before: npt.NDArray[np.int64]

    def __len__(self) -> int:
        """Return the number of places, the wall included."""
        return self.padded[0] * self.padded[1] * self.padded[2]

    @property
    def inside(self) -> tuple[slice, slice, slice]:
        """Return the part of the volume that lies in the box."""
        z, y, x = (
            slice(low, low + side - 2) for low, side in zip(self.low, self.padded, strict=True)
        )
        return z, y, x

    def voxels_of(self, places: Ints) -> npt.NDArray[np.int64]:
        """Return the flat indices into the volume of places of the box."""
        _, high, wide = self.padded
        z, rest = np.divmod(places.astype(np.int64), high * wide)
        y, x = np.divmod(rest, wide)
        z, y, x = z + self.low[0] - 1, y + self.low[1] - 1, x + self.low[2] - 1
        voxels: npt.NDArray[np.int64] = (z * self.shape[1] + y) * self.shape[2] + x
        return voxels


def box_of(shape: tuple[int, ...], valid: Array | None, *, margin: int = 0) -> Box:
    """Return the box around the valid voxels, or around the whole volume.

    Args:
        shape: (Z, Y, X) of the volume.
        valid: (Z, Y, X), bool, or none.
        margin: Voxels around the valid ones that belong to the box, as far as the volume goes.

    Raises:
        ValueError: The box has more voxels than 32-bit places can name.
    """
    low, high = [0, 0, 0], [int(side) for side in shape]
    if valid is not None and valid.any():
        spans = [np.flatnonzero(valid.any(axis=axes)) for axes in ((1, 2), (0, 2), (0, 1))]
        low = [max(int(span[0]) - margin, 0) for span in spans]
        high = [min(int(span[-1]) + 1 + margin, h) for span, h in zip(spans, high, strict=True)]
    padded = [h - first + 2 for h, first in zip(high, low, strict=True)]
    if padded[0] * padded[1] * padded[2] > MOST_PLACES:
        raise ValueError(
            f"the box around the mask has {padded[0]} x {padded[1]} x {padded[2]} voxels, but a "
            f"flood handles {MOST_PLACES:,}. Crop the volume, or give a mask with a smaller box."
        )
    return box_with_wall((int(shape[0]), int(shape[1]), int(shape[2])), low, padded)


def box_with_wall(shape: tuple[int, int, int], low: Sequence[int], padded: Sequence[int]) -> Box:
    """Return a box of a volume by its first voxel and its size with the wall, (Z, Y, X) each."""
    strides = np.array([padded[1] * padded[2], padded[2], 1], np.int64)
    steps = np.stack(np.meshgrid(*[[-1, 0, 1]] * 3, indexing="ij"), -1).reshape(-1, 3)
    return Box(
        shape=shape,
        low=(low[0], low[1], low[2]),
        padded=(padded[0], padded[1], padded[2]),
        faces=np.concatenate([-strides, strides[::-1]]),
        before=(steps @ strides)[:13].astype(np.int64),
    )


@dataclass(frozen=True)
class WatershedGraph:
    """The surface that is flooded: its nodes in raster order, and bits for the rest.

    A node is a voxel that may be a seed, that some combination calls foreground, or whose
    distance is above 0. The other voxels of the domain, the background, are only flooded through.

    `nodes` holds places in the box and `where` the node at a place, -1 for none. `values` is
    (channels, nodes) float32 with the contour negated, so that every test is `value >
    threshold`. The lowest rank floods first; rank `levels` is that of the background. `needed` is
    1 for a node whose label is scored or returned, and `needed_count` their number. `unvisited`
    has a bit for each place of the domain, `known` for each node. Memory: 4.25 bytes a place of
    the box and 25 a node.
    """

    box: Box
    nodes: Ints
    where: Ints
    values: npt.NDArray[np.float32]
    candidates: Ints
    ranks: Ints
    levels: int
    needed: npt.NDArray[np.uint8]
    needed_count: int
    unvisited: npt.NDArray[np.uint64]
    known: npt.NDArray[np.uint64]
    background: int


def checked_probabilities(probabilities: Array) -> Array:
    """Return probabilities of the right shape and type; their range is checked while read.

    Args:
        probabilities: (3, Z, Y, X); binary and boundary in [0, 1], distance in [-1, 1]. They may
            lie on disk: `probabilities[:, z]` is all that is read of them.

    Raises:
        ValueError: Channels are missing, or they hold no floats.
    """
    on_disk = isinstance(getattr(probabilities, "dtype", None), np.dtype)
    array = probabilities if on_disk else np.asarray(probabilities)
    if array.ndim != 4 or array.shape[0] != 3:
        raise ValueError(
            f"probabilities have shape {array.shape}, but must have (3, Z, Y, X): "
            "binary, boundary, distance"
        )
    if not np.issubdtype(array.dtype, np.floating):
        raise ValueError(f"probabilities have dtype {array.dtype}, but must be float16 or float32")
    return array


def check_range(channel: int, values: Array) -> None:
    """Refuse values that are no number or outside the range of their channel.

    Raises:
        ValueError: They are.
    """
    if values.dtype == np.float16 and values.size:
        # Halves of one sign are in the order of their bits, what is no number beyond all others.
        bits = values.view(np.uint16)
        lowest = LOWEST_BITS if LOWEST[channel] < 0 else np.uint16(0x8000)
        if bits.view(np.int16).max() <= HIGHEST_BITS and bits.max() <= lowest:
            return
    low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 0.0)
    name = CHANNELS[channel]
    if not (np.isfinite(low) and np.isfinite(high)):
        raise ValueError(f"the {name} channel holds values that are not finite (NaN or inf)")
    if low < LOWEST[channel] - SLACK or high > 1.0 + SLACK:
        raise ValueError(
            f"the {name} channel spans [{low:.4g}, {high:.4g}], but [{LOWEST[channel]:g}, 1] is "
            "its range. Give probabilities after the activation, not logits."
        )


@kernel
def _scan(
    values: Any, offsets: Any, bounded: bool, floor: float, seeds: Any, limits: Any, first: int,
    unvisited: Any,
) -> Any:  # fmt: skip
    """Return the flags of a section's voxels, and set the bits of the domain.

    Args:
        values: (channels, voxels), float32, the contour negated.
        offsets: (voxels,), from the place `first` in the box.
        bounded: Only voxels with channel 0 above `floor` or the last above 0 are in the domain.
        seeds, limits: (channels,), float64: the lowest thresholds of seeds and foreground.
        first: The place of the section's first voxel.
        unvisited: Bits of the box.
    """
    last = values.shape[0] - 1
    flags = np.zeros(values.shape[1], np.uint8)
    for voxel in range(values.shape[1]):
        basin = values[last, voxel] > 0
        if bounded and not basin and not values[0, voxel] > floor:
            continue
        seed = True
        needed = True
        for channel in range(values.shape[0]):
            seed &= values[channel, voxel] > seeds[channel]
            needed &= values[channel, voxel] > limits[channel]
        place = first + offsets[voxel]
        unvisited[place >> 6] |= np.uint64(1) << np.uint64(place & 63)
        flags[voxel] = DOMAIN | SEED * seed | NEEDED * needed | BASIN * basin
    return flags


@kernel
def bits_of(places: Any, count: int) -> Any:
    """Return bits, packed by 64, that are set at the given places."""
    bits = np.zeros((count >> 6) + 1, np.uint64)
    for place in places:
        bits[place >> 6] |= np.uint64(1) << np.uint64(place & 63)
    return bits


@kernel
def has(bits: Any, place: int) -> bool:
    """Return whether the bit of a place is set."""
    return bits[place >> 6] & (np.uint64(1) << np.uint64(place & 63)) != 0


@kernel
def take(bits: Any, place: int) -> bool:
    """Return whether the bit of a place is set, and clear it."""
    if not has(bits, place):
        return False
    bits[place >> 6] ^= np.uint64(1) << np.uint64(place & 63)
    return True


def _nothing(channels: Sequence[int]) -> tuple[list[Ints], list[Array], list[Array]]:
    """Return the lists that sections are gathered in, with an empty one to start with."""
    empty = np.zeros(0, np.int32)
    return [empty], [np.zeros((len(channels), 0), np.float32)], [np.zeros(0, np.uint8)]


def graph_of(
    maps: Array, channels: Sequence[int], box: Box, valid: Array | None, *,
    floor: float | None, seeds: Sequence[float], limits: Sequence[float],
) -> WatershedGraph:  # fmt: skip
    """Return the graph of probability maps, read section by section to save memory.

    Args:
        maps: (3, Z, Y, X), floats.
        channels: Which of them count, the distance last.
        box: Where.
        valid: (Z, Y, X), bool, or none.
        floor: Only voxels with binary above it or distance above 0 are flooded; none: all.
        seeds: For each channel, the lowest threshold of a seed, the contour negated.
        limits: The same of the foreground.

    Raises:
        ValueError: A channel holds values outside its range.
    """
    _, high, wide = box.padded
    unvisited = np.zeros((len(box) >> 6) + 1, np.uint64)
    lowest, least = np.array(seeds, np.float64), np.array(limits, np.float64)
    inside = box.inside
    domain_voxels = 0
    nodes, values, flags = _nothing(channels)
    everywhere = np.nonzero(np.ones((high - 2, wide - 2) if valid is None else (0, 0), bool))
    for z in range(maps.shape[1]):
        section = np.asarray(maps[:, z])
        for channel in range(3):
            check_range(channel, section[channel])
        if not inside[0].start <= z < inside[0].stop:
            continue
        y, x = everywhere if valid is None else np.nonzero(valid[z, inside[1], inside[2]])
        own = np.stack([section[channel, inside[1], inside[2]][y, x] for channel in channels])
        own = own.astype(np.float32)
        for index, channel in enumerate(channels):
            if channel == 1:
                np.negative(own[index], out=own[index])
        first, offsets = ((z - inside[0].start + 1) * high + 1) * wide + 1, y * wide + x
        found = _scan(
            own, offsets, floor is not None, floor or 0.0, lowest, least, first, unvisited
        )
        domain_voxels += int(np.count_nonzero(found))
        at = np.flatnonzero(found > DOMAIN)
        nodes.append((first + offsets[at]).astype(np.int32))
        values.append(own[:, at])
        flags.append(found[at])
    return gathered(
        box, np.concatenate(nodes), np.concatenate(values, 1), np.concatenate(flags), unvisited,
        domain_voxels,
    )  # fmt: skip


def gathered(
    box: Box, nodes: Ints, values: Array, flags: Array, unvisited: Array, domain_voxels: int
) -> WatershedGraph:
    """Return the graph of nodes, ranked by their distance where it is above 0.

    Args:
        box: Where they are.
        nodes: Places in the box, in raster order.
        values: (channels, nodes), float32, the contour negated.
        flags: (nodes,), sums of `SEED`, `NEEDED` and `BASIN`.
        unvisited: Bits of the domain.
        domain_voxels: How many are set.
    """
    where = np.full(len(box), -1, np.int32)
    where[nodes] = np.arange(len(nodes), dtype=np.int32)
    ranks, levels = ranked(values[-1], (flags & BASIN) > 0)
    needed = ((flags & NEEDED) > 0).astype(np.uint8)
    return WatershedGraph(
        box=box,
        nodes=nodes,
        where=where,
        values=values,
        candidates=np.flatnonzero(flags & SEED).astype(np.int32),
        ranks=ranks,
        levels=levels,
        needed=needed,
        needed_count=int(np.count_nonzero(needed)),
        unvisited=unvisited,
        known=bits_of(nodes, len(box)),
        background=domain_voxels - int(np.count_nonzero(flags & BASIN)),
    )


def ranked(depth: Array, basin: Array) -> tuple[Ints, int]:
    """Return the rank of each node, the deepest first and the background last, and their number."""
    levels = np.unique(depth[basin])
    ranks = np.full(len(depth), len(levels), np.int32)
    ranks[basin] = len(levels) - 1 - np.searchsorted(levels, depth[basin])
    return ranks, len(levels)


def contour_graph(
    probabilities: Array, mask: Array | None, *, seeds: Sequence[float],
    limits: Sequence[float], flood: str = "support", floor: float = FLOOR,
) -> WatershedGraph:  # fmt: skip
    """Return the graph of the decoder `decode_instance_binary_contour_distance`.

    Args:
        probabilities: (3, Z, Y, X), floats.
        mask: (Z, Y, X) or none.
        seeds: The lowest seed threshold of each channel, the contour negated.
        limits: The same of the foreground.
        flood, floor: Of the decoder.

    Raises:
        ValueError: `flood` or `floor` is out of range, or the input is.
    """
    if flood not in ("support", "volume"):
        raise ValueError(f"Unknown flood '{flood}'. Known: support, volume.")
    if isinstance(floor, bool) or not isinstance(floor, int | float) or not 0.0 <= floor <= 1.0:
        raise ValueError(f"floor is {floor!r}, but it is a probability in [0, 1]")
    maps = checked_probabilities(probabilities)
    valid = checked_mask(mask, maps.shape[1:])
    bound = floor if flood == "support" else None
    box = box_of(maps.shape[1:], valid)
    return graph_of(maps, (0, 1, 2), box, valid, floor=bound, seeds=seeds, limits=limits)


def distance_graph(
    probabilities: Array, mask: Array | None, *, seed: float, lowest: float
) -> WatershedGraph:
    """Return what the decoder `decode_instance_watershed_distance` needs before its foreground.

    Args:
        probabilities: (3, Z, Y, X), floats.
        mask: (Z, Y, X) or none.
        seed: The lowest seed threshold.
        lowest: The lowest threshold of all; nothing under it matters.

    Raises:
        ValueError: The input is out of range.
    """
    maps = checked_probabilities(probabilities)
    valid = checked_mask(mask, maps.shape[1:])
    # One voxel more on each side: what is outside the mask is background, as far as there is any.
    box = box_of(maps.shape[1:], valid, margin=1)
    return graph_of(maps, (2,), box, valid, floor=None, seeds=[seed], limits=[lowest])


def foreground_graph(graph: WatershedGraph, threshold: float) -> WatershedGraph:
    """Return the graph cut to distance > threshold, ranked by the distance recomputed there."""
    allowed = graph.values[0] > np.float64(threshold)
    foreground = bits_of(graph.nodes[allowed], len(graph.box))
    squares = squared_distances(
        graph.nodes, allowed, graph.where, np.array(graph.box.padded, np.int64)
    )
    ranks, levels = ranked(squares, allowed)
    return replace(
        graph, ranks=ranks, levels=levels, needed=allowed.astype(np.uint8),
        needed_count=int(np.count_nonzero(allowed)), unvisited=foreground, background=0,
    )  # fmt: skip


NO_BACKGROUND = 2**40


@kernel
def squared_distances(nodes: Any, allowed: Any, where: Any, padded: Any) -> Any:
    """Return the squared distance of each allowed node to the nearest voxel that is not.

    Exact, one axis after the other, in voxels. The wall is no background. Only foreground is
    visited, in whole numbers: SciPy's transform takes 3 s and 0.5 GB for the same on a volume
    of 13.6 million voxels, for every threshold.

    Args:
        nodes: Places in the box, in raster order.
        allowed: (nodes,), bool.
        where: Of `WatershedGraph`.
        padded: (3,), the size of the box with its wall.

    Source: Saito and Toriwaki 1994, doi:10.1016/0031-3203(94)90133-3.
    """
    squares = np.where(allowed, np.int64(NO_BACKGROUND), np.int64(0))
    for axis in range(2, -1, -1):
        stride = 1
        for inner in range(axis + 1, 3):
            stride *= padded[inner]
        before = squares.copy()
        for node in range(len(nodes)):
            if not allowed[node]:
                continue
            at = (nodes[node] // stride) % padded[axis]
            best = before[node]
            for sign in (-1, 1):
                room = at - 1 if sign < 0 else padded[axis] - 2 - at
                step = 1
                while step <= room and step * step < best:
                    other = where[nodes[node] + sign * step * stride]
                    there = before[other] if other >= 0 else 0
                    best = min(best, there + step * step)
                    step += 1
            squares[node] = best
    return squares
