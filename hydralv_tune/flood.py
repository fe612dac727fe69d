"""Seeds and flood on a compact list of voxels: the one implementation that decode and sweep share.

A node is a voxel of the domain. `where` maps the padded bounding box to nodes, -1 outside, so
neighbours are found by adding an offset to a node's position, and no test for borders is needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Nodes:
    """The voxels that a flood may reach, in raster order.

    `position` is a node's place in the padded box, `voxel` its flat place in the volume.
    `faces` holds the 6 neighbour offsets, `before` the 13 of the 26 that precede a voxel.
    """

    shape: tuple[int, int, int]
    voxel: npt.NDArray[np.int64]
    position: npt.NDArray[np.int64]
    where: npt.NDArray[np.int32]
    faces: npt.NDArray[np.int64]
    before: npt.NDArray[np.int64]

    def __len__(self) -> int:
        """Return the number of nodes."""
        return len(self.voxel)


def nodes_of(domain: Array) -> Nodes:
    """Return the nodes of a domain.

    Args:
        domain: (Z, Y, X), bool.
    """
    shape = (int(domain.shape[0]), int(domain.shape[1]), int(domain.shape[2]))
    voxel = np.flatnonzero(domain)
    if not len(voxel):
        low, box = np.zeros(3, np.int64), np.ones(3, np.int64)
    else:
        spans = [np.flatnonzero(domain.any(axis=axes)) for axes in ((1, 2), (0, 2), (0, 1))]
        low = np.array([span[0] for span in spans])
        box = np.array([span[-1] - span[0] + 1 for span in spans])
    padded = box + 2
    z, y, x = np.unravel_index(voxel, shape)
    strides = np.array([padded[1] * padded[2], padded[2], 1], np.int64)
    position = (z - low[0] + 1) * strides[0] + (y - low[1] + 1) * strides[1] + (x - low[2] + 1)
    where = np.full(int(padded.prod()), -1, np.int32)
    where[position] = np.arange(len(voxel), dtype=np.int32)
    offsets = (np.stack(np.meshgrid(*[[-1, 0, 1]] * 3, indexing="ij"), -1).reshape(-1, 3)) @ strides
    faces = np.array([-strides[0], -strides[1], -1, 1, strides[1], strides[0]], np.int64)
    return Nodes(shape, voxel, position, where, faces, offsets[:13].astype(np.int64))


def flood_ranks(height: Array) -> tuple[npt.NDArray[np.int32], int]:
    """Return the rank of each node's height, lowest first, and the number of ranks."""
    levels, ranks = np.unique(height, return_inverse=True)
    return ranks.astype(np.int32), len(levels)


@njit(cache=True, nogil=True)
def _root(parent: Any, node: int) -> int:
    while parent[node] != node:
        parent[node] = parent[parent[node]]
        node = parent[node]
    return node


@njit(cache=True, nogil=True)
def components(values: Any, thresholds: Any, where: Any, position: Any, before: Any) -> Any:
    """Return (seed nodes, component of each, component sizes), 26-connected.

    Args:
        values: (channels, nodes), float32; a seed is above the threshold in every channel.
        thresholds: (channels,), float64.
        where, position, before: Of `Nodes`.
    """
    count = values.shape[1]
    place = np.full(count, -1, np.int32)
    seeds = np.empty(count, np.int32)
    found = 0
    for node in range(count):
        above = True
        for channel in range(values.shape[0]):
            if not values[channel, node] > thresholds[channel]:
                above = False
                break
        if above:
            place[node] = found
            seeds[found] = node
            found += 1
    parent = np.arange(found).astype(np.int32)
    for index in range(found):
        at = position[seeds[index]]
        for offset in before:
            other = where[at + offset]
            if other >= 0 and place[other] >= 0:
                one = _root(parent, index)
                two = _root(parent, place[other])
                if one < two:
                    parent[two] = one
                elif two < one:
                    parent[one] = two
    label = np.empty(found, np.int32)
    sizes = np.zeros(found, np.int64)
    total = 0
    for index in range(found):
        top = _root(parent, index)
        if top == index:
            label[index] = total
            total += 1
        else:
            label[index] = label[top]
        sizes[label[index]] += 1
    return seeds[:found].copy(), label, sizes[:total].copy()


@njit(cache=True, nogil=True)
def keep_large(seeds: Any, label: Any, sizes: Any, least: int) -> Any:
    """Return (seed nodes, labels from 1, number of labels) of components of `least` voxels."""
    renamed = np.zeros(len(sizes), np.int32)
    total = 0
    for index in range(len(sizes)):
        if sizes[index] >= least:
            total += 1
            renamed[index] = total
    kept = 0
    nodes = np.empty(len(seeds), np.int32)
    labels = np.empty(len(seeds), np.int32)
    for index in range(len(seeds)):
        if renamed[label[index]] > 0:
            nodes[kept] = seeds[index]
            labels[kept] = renamed[label[index]]
            kept += 1
    return nodes[:kept].copy(), labels[:kept].copy(), total


@njit(cache=True, nogil=True)
def fingerprint(seeds: Any, words: Any) -> Any:
    """Return two sums of the seeds' random 64-bit words: equal for equal seed masks."""
    one = np.uint64(0)
    two = np.uint64(0)
    for node in seeds:
        one += words[0, node]
        two += words[1, node]
    return one, two


@njit(cache=True, nogil=True)
def _lowest_bit(word: Any) -> int:
    bit = 0
    for width in (32, 16, 8, 4, 2, 1):
        if word & ((np.uint64(1) << np.uint64(width)) - np.uint64(1)) == 0:
            word >>= np.uint64(width)
            bit += width
    return bit


@njit(cache=True, nogil=True)
def _push(node: int, rank: int, head: Any, tail: Any, follows: Any, bits: Any, tops: Any) -> None:
    follows[node] = -1
    if head[rank] < 0:
        head[rank] = node
        bits[rank >> 6] |= np.uint64(1) << np.uint64(rank & 63)
        tops[rank >> 12] |= np.uint64(1) << np.uint64((rank >> 6) & 63)
    else:
        follows[tail[rank]] = node
    tail[rank] = node


@njit(cache=True, nogil=True)
def flood(
    seeds: Any, seed_labels: Any, ranks: Any, levels: int, allowed: Any, where: Any, position: Any,
    faces: Any,
) -> Any:  # fmt: skip
    """Return the label of each node, 0 where no seed reaches it.

    A watershed: lowest rank first, first in first out within a rank. Each node enters the
    queue once, so a linked list per rank holds the queue, and two levels of bits find the
    lowest rank that is not empty.

    Args:
        seeds, seed_labels: Nodes in raster order, labels from 1.
        ranks: (nodes,), int32; `levels` is their number.
        allowed: (nodes,), bool; the flood stays there. Empty: everywhere.
        where, position, faces: Of `Nodes`.
    """
    count = len(ranks)
    labels = np.zeros(count, np.int32)
    head = np.full(levels, -1, np.int32)
    tail = np.full(levels, -1, np.int32)
    follows = np.empty(count, np.int32)
    bits = np.zeros((levels >> 6) + 1, np.uint64)
    tops = np.zeros((levels >> 12) + 1, np.uint64)
    bounded = len(allowed) > 0
    for index in range(len(seeds)):
        node = seeds[index]
        if bounded and not allowed[node]:
            continue
        labels[node] = seed_labels[index]
        _push(node, ranks[node], head, tail, follows, bits, tops)
    while True:
        top = -1
        for index in range(len(tops)):
            if tops[index] != 0:
                top = index
                break
        if top < 0:
            return labels
        word = (top << 6) + _lowest_bit(tops[top])
        rank = (word << 6) + _lowest_bit(bits[word])
        node = head[rank]
        head[rank] = follows[node]
        if head[rank] < 0:
            bits[word] &= ~(np.uint64(1) << np.uint64(rank & 63))
            if bits[word] == 0:
                tops[top] &= ~(np.uint64(1) << np.uint64(word & 63))
        at = position[node]
        for offset in faces:
            other = where[at + offset]
            if other >= 0 and labels[other] == 0 and not (bounded and not allowed[other]):
                labels[other] = labels[node]
                _push(other, ranks[other], head, tail, follows, bits, tops)


@njit(cache=True, nogil=True)
def _suffix_sums(row: Any, bins: Any) -> None:
    """Sum from the back along each of three axes, in place."""
    one, two, three = bins
    for b in range(one):
        for c in range(two):
            at = (b * two + c) * three
            for d in range(three - 2, -1, -1):
                row[at + d] += row[at + d + 1]
    for b in range(one):
        for c in range(two - 2, -1, -1):
            at = (b * two + c) * three
            for d in range(three):
                row[at + d] += row[at + three + d]
    for b in range(one - 2, -1, -1):
        at = b * two * three
        for cd in range(two * three):
            row[at + cd] += row[at + two * three + cd]


@njit(cache=True, nogil=True)
def tally(labels: Any, truth: Any, cell: Any, bins: Any, truth_sizes: Any, least: Any) -> Any:
    """Return exact sums over instances for every foreground combination.

    One histogram for each instance and each of its overlaps, summed from the back, holds its
    size under every foreground combination at once. Nodes are sorted by (instance, truth), so
    four rows of memory are enough.

    Args:
        labels: (nodes,), int32, from the flood.
        truth: (nodes,), int32; 0 is background, else an index into `truth_sizes` plus 1.
        cell: (nodes,), int32; the last foreground combination a node passes, -1 for none.
        bins: The lengths of the three foreground axes.
        truth_sizes: (truths,), int64.
        least: (sizes,), int64, each a `min_instance_size`.

    Returns:
        (6, sizes, combinations), int64: Σ n_ij², Σ b_j², Σ |S_j|², covered truth voxels,
        instances, matches above IoU 0.5.
    """
    width = bins[0] * bins[1] * bins[2]
    sums = np.zeros((6, len(least), width), np.int64)
    count = 0
    keys = np.empty(len(labels), np.int64)
    nodes = np.empty(len(labels), np.int32)
    for node in range(len(labels)):
        if labels[node] > 0 and cell[node] >= 0:
            keys[count] = np.int64(labels[node]) * (len(truth_sizes) + 1) + truth[node]
            nodes[count] = node
            count += 1
    order = np.argsort(keys[:count], kind="mergesort")
    whole = np.zeros(width, np.int64)
    inside = np.zeros(width, np.int64)
    row = np.zeros(width, np.int64)
    start = 0
    while start < count:
        label = labels[nodes[order[start]]]
        stop = start
        whole[:] = 0
        inside[:] = 0
        while stop < count and labels[nodes[order[stop]]] == label:
            node = nodes[order[stop]]
            whole[cell[node]] += 1
            if truth[node] > 0:
                inside[cell[node]] += 1
            stop += 1
        _suffix_sums(whole, bins)
        _suffix_sums(inside, bins)
        for size in range(len(least)):
            for f in range(width):
                if whole[f] > 0 and whole[f] >= least[size]:
                    sums[1, size, f] += inside[f] * inside[f]
                    sums[2, size, f] += whole[f] * whole[f]
                    sums[3, size, f] += inside[f]
                    sums[4, size, f] += 1
        at = start
        while at < stop:
            name = truth[nodes[order[at]]]
            row[:] = 0
            while at < stop and truth[nodes[order[at]]] == name:
                row[cell[nodes[order[at]]]] += 1
                at += 1
            if name == 0:
                continue
            _suffix_sums(row, bins)
            own = truth_sizes[name - 1]
            for size in range(len(least)):
                for f in range(width):
                    if row[f] > 0 and whole[f] >= least[size]:
                        sums[0, size, f] += row[f] * row[f]
                        if 2 * row[f] > whole[f] + own - row[f]:
                            sums[5, size, f] += 1
        start = stop
    return sums
