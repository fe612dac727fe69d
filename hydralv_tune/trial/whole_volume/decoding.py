"""Decode a volume in blocks to the instances that decoding at once gives.

A flood never leaves its domain (the support of `flood: support`, the mask of `flood: volume`, the
foreground of the distance decoder), and a seed never joins two parts of it. So each 26-connected
component of the domain can be decoded alone, whole, and nothing is guessed at borders of blocks.
Within a component the order of equals in the queue is that of the whole volume.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import sparse

from hydralv_tune.config.errors import InputError
from hydralv_tune.numerics.watershed.decoders import DECODERS, decode, decoder_arguments
from hydralv_tune.numerics.watershed.flood import regions

Array = npt.NDArray[Any]
Ints = npt.NDArray[np.int64]
Size3 = tuple[int, int, int]
Box = tuple[slice, slice, slice]
Domain = Callable[[Array, Array | None], npt.NDArray[np.bool_]]

PLACE_BYTES = 12
"""What decoding takes at its peak for each voxel of a block: places of the graph, labels, mask."""
NODE_BYTES = 120
"""What it takes besides for each voxel that may be seed or foreground: values, ranks, queues."""
MAP_BYTES = 6
"""Of the probabilities of a voxel, where a decoder wants them in memory."""
READ_BYTES = 20
"""What it takes to read a voxel of a slab while a block is decoded, unpacked chunks included."""
SLAB_BYTES = 40
"""What it takes to label a voxel of a slab."""
SLAB = 16
"""Sections that are read at once from what lies on disk: a chunk holds as many."""


def domain_of(name: str, arguments: Mapping[str, Any]) -> Domain | None:
    """Return what tells the domain of a decoder, or None where it has none.

    Args:
        name: A key of `DECODERS`.
        arguments: Of the decoder; what is left out takes its default.

    Returns:
        A function of probabilities (3, z, y, x) and mask (z, y, x), or None for all, to booleans.
    """
    used = {**decoder_arguments(name), **arguments}
    domain = DECODERS[name].domain
    return None if domain is None else lambda maps, mask: domain(maps, mask, used)


def nodes_of(name: str, arguments: Mapping[str, Any]) -> Domain | None:
    """Return what tells the voxels that take most of the memory, likewise; the domain if None."""
    used = {**decoder_arguments(name), **arguments}
    nodes = DECODERS[name].nodes
    return None if nodes is None else lambda maps, mask: nodes(maps, mask, used)


class MapsOnDisk:
    """A box of probabilities that is read a few sections at a time, as `maps[:, z]`.

    Args:
        stored: (3, Z, Y, X) on disk.
        box: Which part of them.
    """

    ndim = 4

    def __init__(self, stored: Any, box: Box) -> None:
        self._stored, self._box = stored, box
        self.shape = (3, *(part.stop - part.start for part in box))
        self.dtype = np.dtype(stored.dtype)
        self._first, self._slab = 0, np.zeros((3, 0), self.dtype)

    def __getitem__(self, where: tuple[slice, int]) -> Array:
        """Return channels of one section, (c, y, x)."""
        channels, z = where
        if not self._first <= z < self._first + self._slab.shape[1]:
            place = self._box[0].start + z
            # Whole chunks, so that each is unpacked once.
            end = min(place - place % SLAB + SLAB, self._box[0].stop)
            self._first = z
            self._slab = np.asarray(self._stored[(slice(None), slice(place, end), *self._box[1:])])
        return self._slab[channels, z - self._first]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        """Return all of it in memory."""
        return np.asarray(self._stored[(slice(None), *self._box)], dtype)


@dataclass(frozen=True)
class Components:
    """The 26-connected components of a domain.

    Args:
        roots: (provisional ids + 1,), the component of each provisional label; 0 is none.
        boxes: (components + 1, 3, 2), first and end voxel along each axis.
        voxels: (components + 1,), their sizes.
        nodes: (components + 1,), how many of those take most of the memory.
    """

    roots: Array
    boxes: Array
    voxels: Ints
    nodes: Ints

    def __len__(self) -> int:
        return len(self.boxes) - 1


def label_components(
    slabs: Sequence[slice], domain_at: Callable[[slice], tuple[Array, Array]],
    write: Callable[[slice, Array], None],
) -> Components:  # fmt: skip
    """Label a domain slab by slab, and find what belongs together across them.

    Args:
        slabs: Of sections, in order and without gaps.
        domain_at: Domain and nodes of a slab, both (z, y, x) booleans.
        write: Keeps the provisional labels (z, y, x) of a slab, uint32.
    """
    total = 0
    pairs: list[Array] = []
    boxes: list[Array] = [np.zeros((1, 3, 2), np.int32)]  # there may be millions of them
    voxels: list[Ints] = [np.zeros((1, 2), np.int64)]
    last: Array | None = None
    for slab in slabs:
        domain, nodes = domain_at(slab)
        labels, spans, sizes = regions(domain, nodes, total)
        spans[:, 0] += slab.start
        boxes.append(spans.astype(np.int32))
        voxels.append(sizes)
        if last is not None:
            pairs.append(_touching(last, labels[0]))
        write(slab, labels)
        last, total = labels[-1].copy(), total + len(spans)
    return _joined(total, pairs, np.concatenate(boxes), np.concatenate(voxels))


def _touching(above_: Array, below: Array) -> Array:
    """Return the pairs of labels of two sections that are 26-neighbours, (pairs, 2)."""
    padded = np.pad(above_, 1)
    y, x = np.nonzero(below)
    own = below[y, x].astype(np.uint64)
    # Both in one number: sorting rows of two would take ten times as long.
    keys = [np.zeros(0, np.uint64)]
    for step in np.ndindex(3, 3):
        other = padded[y + step[0], x + step[1]].astype(np.uint64)
        both = other > 0
        keys.append(np.unique(other[both] << np.uint64(32) | own[both]))
    found = np.unique(np.concatenate(keys))
    return np.stack([found >> np.uint64(32), found & np.uint64(2**32 - 1)], 1)


def _joined(total: int, pairs: Sequence[Array], boxes: Array, voxels: Ints) -> Components:
    """Return the components after provisional labels that touch are joined."""
    edges = np.concatenate([np.zeros((0, 2), np.int64), *pairs]).astype(np.int64)
    graph = sparse.coo_matrix(
        (np.ones(len(edges)), (edges[:, 0], edges[:, 1])), shape=(total + 1,) * 2
    )
    count, roots = sparse.csgraph.connected_components(graph, directed=False)
    # Provisional label 0 is background and touches nothing; it becomes component 0.
    first = np.sort(np.unique(roots, return_index=True)[1])
    order = np.zeros(count, np.uint32)
    order[roots[first]] = np.arange(count)
    roots = order[roots]
    # Most components are of one label: only what others add to the first is looked at one by one.
    joined, sizes = boxes[first], voxels[first]
    others = np.ones(total + 1, bool)
    others[first] = False
    others = np.flatnonzero(others)
    np.minimum.at(joined[:, :, 0], roots[others], boxes[others, :, 0])
    np.maximum.at(joined[:, :, 1], roots[others], boxes[others, :, 1])
    np.add.at(sizes, roots[others], voxels[others])
    return Components(roots=roots, boxes=joined, voxels=sizes[:, 0], nodes=sizes[:, 1])


@dataclass(frozen=True)
class Blocks:
    """What is decoded together: all components whose labels are of one block.

    Args:
        boxes: The part of the volume that holds them all, and a voxel around them where there is
            one.
        of_label: (provisional ids + 1,) uint32, the number of the block of each provisional label,
            from 1; 0 where nothing is to be decoded. None where the volume is one block.
    """

    boxes: list[Box]
    of_label: Array | None = None

    def __len__(self) -> int:
        return len(self.boxes)


def plan_blocks(
    shape: Size3, components: Components, *, memory_bytes: float, kept_bytes: float = 0,
    place_bytes: float = PLACE_BYTES,
) -> Blocks:  # fmt: skip
    """Return blocks that hold every component whole and fit into the memory, in raster order.

    A component without a voxel that may be seed or foreground holds no instance and is left out.

    Args:
        shape: (z, y, x) of the volume.
        components: Of the domain.
        memory_bytes: What decoding a block may take.
        kept_bytes: What of it is in use already; at least half of it is left for the block.
        place_bytes: What it takes for each voxel of the block's box, its nodes apart.

    Raises:
        InputError: One component alone does not fit.
    """
    parts: list[tuple[Box, Ints]] = []
    most = max(memory_bytes - kept_bytes, memory_bytes / 2)
    every = np.flatnonzero(components.nodes)
    # Sides first: there may be millions of components, and each half is looked at as a whole.
    waiting = [(every, np.ascontiguousarray(components.boxes[every].transpose(1, 2, 0)))]
    while waiting:
        chosen, sides = waiting.pop()
        if not len(chosen):
            continue
        low = np.maximum(sides[:, 0].min(1) - 1, 0)
        high = np.minimum(sides[:, 1].max(1) + 1, shape)
        nodes = int(components.nodes[chosen].sum())
        needed = math.prod((high - low).tolist()) * place_bytes + nodes * NODE_BYTES
        if needed <= most:
            z, y, x = (slice(int(a), int(b)) for a, b in zip(low, high, strict=True))
            parts.append(((z, y, x), chosen))
            continue
        if len(chosen) == 1:
            size, allowed = (high - low).tolist(), math.ceil((needed + kept_bytes) / 1e9 + 1)
            raise InputError(
                f"--memory-gb: one connected region of {int(components.voxels[chosen[0]]):,} "
                f"voxels spans {size[0]} x {size[1]} x {size[2]} voxels (z, y, x), and is decoded "
                f"as one: that takes {needed / 1e9:.1f} GB of the memory for decoding. Allow "
                f"{allowed} GB, give a mask of the tissue, or cut the region with --set "
                "flood=support and a higher floor, for example --set floor=0.3."
            )
        middle = sides[:, 0] + sides[:, 1]
        axis = int(np.argmax(np.ptp(middle, axis=1) if len(chosen) > 2 else high - low))
        half = len(chosen) // 2
        order = np.argpartition(middle[axis], half)
        for part in (np.sort(order[half:]), np.sort(order[:half])):
            waiting.append((chosen[part], sides[:, :, part]))
    parts.sort(key=lambda part: [side.start for side in part[0]])
    of_component = np.zeros(len(components) + 1, np.uint32)
    for number, (_, chosen) in enumerate(parts, 1):
        of_component[chosen] = number
    return Blocks([box for box, _ in parts], of_component[components.roots])


def decode_block(
    blocks: Blocks, number: int, maps: Any, provisional: Any, name: str,
    arguments: Mapping[str, Any],
) -> npt.NDArray[np.int32]:  # fmt: skip
    """Return the instances of a block, (z, y, x) of its box, ids from 1.

    Args:
        blocks: Several, of the components of a domain.
        number: Which of them, from 0.
        maps: (3, z, y, x), the probabilities of its box, in memory or on disk.
        provisional: (Z, Y, X), the provisional labels of the volume, in memory or on disk.
        name: Of the decoder.
        arguments: Of the decoder.
    """
    box = blocks.boxes[number]
    assert blocks.of_label is not None
    own = blocks.of_label == number + 1
    mask = np.zeros([part.stop - part.start for part in box], bool)
    for z in range(0, len(mask), SLAB):
        first = box[0].start + z
        sections = slice(first, min(first + SLAB, box[0].stop))
        mask[z : z + SLAB] = own[np.asarray(provisional[(sections, *box[1:])])]
    return decode(name, maps, mask, **arguments)


def sections_of(shape: Size3, *, memory_bytes: float) -> Iterator[slice]:
    """Return slabs of sections that fit into the memory, of whole chunks or at least a section."""
    depth = max(int(memory_bytes / (SLAB_BYTES * shape[1] * shape[2])), 1)
    depth = depth - depth % SLAB if depth > SLAB else depth
    return (slice(z, min(z + depth, shape[0])) for z in range(0, shape[0], depth))
