"""Parts of a volume that no flood joins, so that each is swept by itself.

No label passes from one part to another, and every sum of a sweep adds up over instances. A part
is small, so it stays in the processor's cache, and few of the seed masks of a grid differ in it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from hydralv_tune.numerics.watershed.compiled import kernel
from hydralv_tune.numerics.watershed.flood import components, fingerprint, keep_large
from hydralv_tune.numerics.watershed.graph import Ints, WatershedGraph, take
from hydralv_tune.numerics.watershed.lakes import (
    LakeRoom,
    Lakes,
    flood_lake,
    follow_plan,
    lake_room_of,
    lakes_of,
    make_plan,
)
from hydralv_tune.numerics.watershed.threshold_sums import threshold_sums

Array = npt.NDArray[Any]
Flags = npt.NDArray[np.bool_]


class Part(NamedTuple):
    """A part of a graph as the kernels take it.

    Its voxels are elements, one after the other in raster order. Before each row of them lies an
    element that is none, so that the neighbours along x are the elements before and after.

    Args:
        names: (candidates,), int32, which node of the whole graph each candidate for a seed is.
        values: (channels, candidates), float32.
        position: (candidates,), int32, places in the whole box, ascending.
        elements: (candidates,), int32.
        candidates: (candidates,), int32, their numbers: 0, 1, 2 …
        before: Of the whole box.
        beside: (elements, 4), int32, the neighbours at z - 1, y - 1, y + 1 and z + 1; 0 for none.
        is_background, is_needed: (elements,), of the voxels outside lakes, and of all.
        lakes: `Lakes`.
    """

    names: Ints
    values: Array
    position: Ints
    elements: Ints
    candidates: Ints
    before: Array
    beside: Ints
    is_background: Flags
    is_needed: Flags
    lakes: Lakes


class Room(NamedTuple):
    """The memory one thread needs to flood a part again and again, beside that of a plan.

    Args:
        lakes: `LakeRoom`.
        labels: (elements,), int32.
    """

    lakes: LakeRoom
    labels: Ints


def room_of(part: Part) -> Room:
    """Return the memory for floods of a part."""
    return Room(lakes=lake_room_of(part.lakes), labels=np.empty(len(part.beside), np.int32))


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

    def part(self, number: int, nodes: Ints) -> tuple[Part, Ints]:
        """Return one part, and the elements of some of its nodes.

        Args:
            number: Of the part.
            nodes: Of the whole graph.
        """
        whole = self._graph
        places = np.sort(self._places[self._starts[number] : self._starts[number + 1]])
        # One element that is no voxel before each row, and one at the end.
        elements = np.arange(len(places), dtype=np.int32)
        elements += np.cumsum(np.diff(places, prepend=np.int32(-2)) != 1, dtype=np.int32)
        beside = np.zeros((int(elements[-1]) + 2, 4), np.int32)
        faces = whole.box.faces
        for column, face in enumerate((faces[0], faces[1], faces[4], faces[5])):
            _find_beside(places, elements, face, beside[:, column])
        own = whole.where[places]
        is_node = own >= 0
        own = own[is_node]
        known, ranks = np.unique(whole.ranks[own], return_inverse=True)
        background = len(known) - int(known[-1] == whole.levels)
        rank = np.full(len(beside), -1, np.int32)
        rank[elements] = background
        rank[elements[is_node]] = ranks
        is_needed = np.zeros(len(beside), bool)
        is_needed[elements[is_node]] = whole.needed[own] > 0
        is_candidate = self._is_candidate[own]
        names = own[is_candidate]
        part = Part(
            names=names,
            values=np.ascontiguousarray(whole.values[:, names]),
            position=places[is_node][is_candidate],
            elements=elements[is_node][is_candidate],
            candidates=np.arange(len(names), dtype=np.int32),
            before=whole.box.before,
            beside=beside,
            is_background=rank == background,
            is_needed=is_needed,
            lakes=lakes_of(beside, rank, is_needed, background),
        )
        return part, elements[np.searchsorted(places, whole.nodes[nodes])]


@kernel
def _find_beside(places: Any, elements: Any, offset: int, beside: Any) -> None:
    """Write the element of the voxel at an offset from each voxel; nothing where there is none.

    Args:
        places: Ascending.
        elements: Of the places.
        offset: In places.
        beside: (elements,), int32; written to.
    """
    other = 0
    for index in range(len(places)):
        wanted = places[index] + offset
        while other < len(places) and places[other] < wanted:
            other += 1
        if other < len(places) and places[other] == wanted:
            beside[elements[index]] = elements[other]


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
    return places[:ends], np.array(starts)


@kernel
def _number(places: Any, starts: Any, where: Any, of_node: Any) -> None:
    """Write the part of each node; -1 stays where it has none."""
    for part in range(len(starts) - 1):
        for at in range(starts[part], starts[part + 1]):
            node = where[places[at]]
            if node >= 0:
                of_node[node] = part


@kernel
def mark_seeds(
    part: Any, thresholds: Any, least_seeds: Any, start: int, stop: int, marks: Any
) -> None:
    """Write the fingerprint of a part's seeds for some of the sets of thresholds.

    Args:
        part: A `Part`.
        thresholds: (combinations, channels), float64, what a seed must be above.
        least_seeds: (combinations,), int64, the smallest seed.
        start, stop: Which combinations.
        marks: (combinations, 2), uint64; written to.
    """
    seeds, label, sizes = _components(part, thresholds[start])
    for index in range(start, stop):
        if index > start and not (thresholds[index] == thresholds[index - 1]).all():
            seeds, label, sizes = _components(part, thresholds[index])
        kept, _, _ = keep_large(seeds, label, sizes, least_seeds[index])
        marks[index, 0], marks[index, 1] = fingerprint(part.names[kept])


@kernel
def _components(part: Any, thresholds: Any) -> Any:
    """Return what `components` does of a part's candidates."""
    return components(part.values, thresholds, part.candidates, part.position, part.before)


@kernel
def add_sums(
    part: Any, room: Any, thresholds: Any, least_seeds: Any, rows: Any, follows: Any, scored: Any,
    truth: Any, cell: Any, bins: Any, truth_sizes: Any, least: Any, sums: Any,
) -> None:  # fmt: skip
    """Flood a part from some sets of seeds, and add its sums for all combinations that have them.

    Args:
        part, room: A `Part`, and a `Room` for it.
        thresholds, least_seeds: As for `mark_seeds`.
        rows: Combinations, each with another set of seeds.
        follows: (combinations,), int64, the next one with the same seeds, -1 for none.
        scored: (scored nodes,), int32, elements, sorted by truth; truth, cell alike, and bins,
            truth_sizes, least: as for `threshold_sums`.
        sums: (combinations, 6, sizes, foreground combinations), int64; added to.
    """
    labels = room.labels
    none = np.zeros(0, np.int32), np.zeros(1, np.int32), np.zeros(0, np.int32)
    plan = none
    planned = (np.uint64(0), np.uint64(0))
    for row in rows:
        seeds, label, sizes = _components(part, thresholds[row])
        kept, kept_labels, _ = keep_large(seeds, label, sizes, least_seeds[row])
        labels[:] = 0
        is_seeded, alone = _flood_lakes(part, room, part.elements[kept], kept_labels)
        sources = fingerprint(np.concatenate((np.flatnonzero(is_seeded), -1 - alone)))
        if sources != planned:
            plan = none  # the last one goes before the next is made
            plan = make_plan(
                part.lakes, part.beside, part.is_background, part.is_needed, is_seeded, alone
            )
            planned = sources
        follow_plan(plan, part.lakes, room.lakes, labels)
        found, _ = threshold_sums(labels[scored], truth, cell, bins, truth_sizes, least, False)
        same = row
        while same >= 0:
            sums[same] += found
            same = follows[same]


@kernel
def _flood_lakes(part: Any, room: Any, seeds: Any, seed_labels: Any) -> Any:
    """Write the labels of all lakes that have a seed and of the seeds in no lake; return both.

    A lake whose seeds are those of its last flood is not flooded again: labels are of the seeds.
    """
    lakes, own, labels = part.lakes, room.lakes, room.labels
    starts, of, slot_of, elements = (
        lakes.starts, lakes.of, lakes.slot, lakes.elements
    )  # fmt: skip
    origin, marks = own.origin, own.marks
    count = len(starts) - 1
    # Seeds lake by lake, in raster order.
    begins = np.zeros(count + 1, np.int64)
    for element in seeds:
        slot = slot_of[element]
        if slot >= 0:
            begins[of[slot] + 1] += 1
    for lake in range(count):
        begins[lake + 1] += begins[lake]
    ends = begins[:-1].copy()
    slots = np.empty(begins[count], np.int32)
    alone, end = np.empty(len(seeds) - begins[count], np.int64), 0
    label_of = own.label_of
    for index in range(len(seeds)):
        slot = slot_of[seeds[index]]
        if slot >= 0:
            slots[ends[of[slot]]] = slot
            ends[of[slot]] += 1
            label_of[slot] = seed_labels[index]
        else:
            alone[end] = seeds[index]
            labels[seeds[index]] = seed_labels[index]
            end += 1
    is_seeded = np.zeros(count, np.bool_)
    for lake in range(count):
        start, stop = begins[lake], begins[lake + 1]
        if start == stop:
            continue
        is_seeded[lake] = True
        one, two = fingerprint(slots[start:stop])
        if marks[lake, 0] != one or marks[lake, 1] != two:
            flood_lake(lakes, lake, slots, start, stop, own)
            marks[lake, 0] = one
            marks[lake, 1] = two
        for slot in range(starts[lake], starts[lake + 1]):
            labels[elements[slot]] = label_of[origin[slot]]
    return is_seeded, alone


@kernel
def same_rows(marks: Any) -> Any:
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
