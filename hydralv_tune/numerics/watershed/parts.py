"""Parts of a volume that no flood joins, so that each is swept by itself.

No label passes from one part to another, and every sum of a sweep adds up over instances. A part
is small, so it stays in the processor's cache, and few of the seed masks of a grid differ in it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hydralv_tune.numerics.watershed.compiled import kernel
from hydralv_tune.numerics.watershed.flood import components, fingerprint, flood, keep_large
from hydralv_tune.numerics.watershed.graph import (
    BASIN,
    NEEDED,
    SEED,
    Ints,
    WatershedGraph,
    bits_of,
    box_with_wall,
    gathered,
    take,
)
from hydralv_tune.numerics.watershed.threshold_sums import threshold_sums

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Part:
    """A part of a graph: its own graph, and which nodes of the whole are its nodes, ascending."""

    graph: WatershedGraph
    nodes: Ints


class Parts:
    """The parts of a graph that hold a candidate for a seed; what holds none is never labelled.

    Voxels of the domain that touch by a face are of one part, and so are candidates that touch by
    a corner, since one seed may hold both.

    Memory: 4 bytes a voxel of the parts, and 4 a node.
    """

    def __init__(self, graph: WatershedGraph) -> None:
        self._graph = graph
        is_candidate = np.zeros(len(graph.nodes), bool)
        is_candidate[graph.candidates] = True
        self._is_candidate = is_candidate
        around = np.concatenate([graph.box.before, -graph.box.before[::-1]])
        domain = int(np.bitwise_count(graph.unvisited).sum())
        self._places, self._starts = _gather(
            graph.candidates, is_candidate, graph.nodes, graph.where, graph.unvisited.copy(),
            graph.box.faces, around, domain,
        )  # fmt: skip
        self.of_node = np.full(len(graph.nodes), -1, np.int32)
        _number(self._places, self._starts, graph.where, self.of_node)

    def __len__(self) -> int:
        """Return the number of parts."""
        return len(self._starts) - 1

    @property
    def sizes(self) -> Array:
        """Return the number of voxels of each part."""
        return np.diff(self._starts)

    def __getitem__(self, number: int) -> Part:
        """Return one part, with a graph in the smallest box that holds it."""
        whole = self._graph
        places = np.sort(self._places[self._starts[number] : self._starts[number + 1]])
        _, high, wide = whole.box.padded
        z, rest = np.divmod(places, high * wide)
        y, x = np.divmod(rest, wide)
        low = [int(axis.min()) - 1 for axis in (z, y, x)]
        padded = [int(axis.max()) - first + 2 for axis, first in zip((z, y, x), low, strict=True)]
        box = box_with_wall(
            whole.box.shape,
            [own + first for own, first in zip(whole.box.low, low, strict=True)],
            padded,
        )
        _, high, wide = padded
        here = (((z - low[0]) * high + y - low[1]) * wide + x - low[2]).astype(np.int32)
        nodes = whole.where[places]
        is_node = nodes >= 0
        nodes = nodes[is_node]
        flags = SEED * self._is_candidate[nodes] + NEEDED * whole.needed[nodes]
        flags = flags + BASIN * (whole.ranks[nodes] < whole.levels)
        values = np.ascontiguousarray(whole.values[:, nodes])
        unvisited = bits_of(here, len(box))
        return Part(gathered(box, here[is_node], values, flags, unvisited, len(places)), nodes)


@kernel
def _gather(
    candidates: Any, is_candidate: Any, position: Any, where: Any, unvisited: Any, faces: Any,
    around: Any, domain: int,
) -> Any:  # fmt: skip
    """Return the places of all parts, one part after the other, and where each begins."""
    places = np.empty(domain, np.int32)
    starts = [0]
    ends = 0
    for first in candidates:
        if not take(unvisited, np.int64(position[first])):
            continue
        places[ends] = position[first]
        at = ends
        ends += 1
        while at < ends:
            place = np.int64(places[at])
            at += 1
            for step in faces:
                if take(unvisited, place + step):
                    places[ends] = place + step
                    ends += 1
            node = where[place]
            if node < 0 or not is_candidate[node]:
                continue
            for step in around:
                beside = where[place + step]
                if beside >= 0 and is_candidate[beside] and take(unvisited, place + step):
                    places[ends] = place + step
                    ends += 1
        starts.append(ends)
    return places[:ends].copy(), np.array(starts)


@kernel
def _number(places: Any, starts: Any, where: Any, of_node: Any) -> None:
    """Write the part of each node; -1 stays where it has none."""
    for part in range(len(starts) - 1):
        for at in range(starts[part], starts[part + 1]):
            node = where[places[at]]
            if node >= 0:
                of_node[node] = part


@kernel
def sums_of_part(
    names: Any, values: Any, candidates: Any, where: Any, position: Any, before: Any, faces: Any,
    ranks: Any, levels: int, needed: Any, needed_count: int, unvisited: Any, known: Any,
    background: int, thresholds: Any, least_seeds: Any, scored: Any, truth: Any, cell: Any,
    bins: Any, truth_sizes: Any, least: Any, sums: Any, marks: Any,
) -> None:  # fmt: skip
    """Add the sums of a part for each set of seeds, and the fingerprint of its seeds.

    Seeds that were met before in this part are not flooded again.

    Args:
        names: (nodes,), int32, the number of each node in the whole graph.
        values, candidates, where, position, before, faces, ranks, levels, needed, needed_count,
            unvisited, known, background: Of `WatershedGraph` and its box.
        thresholds: (combinations, channels), float64, what a seed must be above.
        least_seeds: (combinations,), int64, the smallest seed.
        scored, truth, cell: (scored nodes,), sorted by truth; bins, truth_sizes, least: as for
            `threshold_sums`.
        sums: (combinations, 6, sizes, foreground combinations), int64; added to.
        marks: (combinations, 2), uint64; added to.
    """
    own = np.empty((len(thresholds), 2), np.uint64)
    seeds, label, sizes = components(values, thresholds[0], candidates, where, position, before)
    for index in range(len(thresholds)):
        if index > 0 and not (thresholds[index] == thresholds[index - 1]).all():
            seeds, label, sizes = components(
                values, thresholds[index], candidates, where, position, before
            )
        kept, _, _ = keep_large(seeds, label, sizes, least_seeds[index])
        own[index, 0], own[index, 1] = fingerprint(names[kept])
        marks[index, 0] += own[index, 0]
        marks[index, 1] += own[index, 1]
    first, follows = _same(own)
    labels = np.empty(len(position), np.int32)
    queued = np.empty(len(position), np.int32)
    now, later = np.empty(background, np.int64), np.empty(background, np.int64)
    for index in range(len(thresholds)):
        if not first[index] or (own[index] == 0).all():
            continue
        seeds, label, sizes = components(
            values, thresholds[index], candidates, where, position, before
        )
        kept, kept_labels, _ = keep_large(seeds, label, sizes, least_seeds[index])
        labels[:] = 0
        flood(
            kept, kept_labels, ranks, levels, needed, needed_count, unvisited.copy(), known, where,
            position, faces, labels, queued, now, later,
        )  # fmt: skip
        found, _ = threshold_sums(labels[scored], truth, cell, bins, truth_sizes, least, False)
        same = index
        while same >= 0:
            sums[same] += found
            same = follows[same]


@kernel
def _same(marks: Any) -> Any:
    """Return which rows are the first of their kind, and the next row of the same kind (-1: none).

    Args:
        marks: (rows, 2), uint64, well mixed.
    """
    slots = 1
    while slots < 2 * len(marks):
        slots *= 2
    last = np.full(slots, -1, np.int64)
    first = np.zeros(len(marks), np.bool_)
    follows = np.full(len(marks), -1, np.int64)
    for row in range(len(marks)):
        slot = np.int64(marks[row, 0] & np.uint64(slots - 1))
        while last[slot] >= 0 and not (marks[last[slot]] == marks[row]).all():
            slot = (slot + 1) & (slots - 1)
        first[row] = last[slot] < 0
        if last[slot] >= 0:
            follows[last[slot]] = row
        last[slot] = row
    return first, follows
