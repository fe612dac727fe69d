"""Leave out what no flood of a grid needs to cross.

A flood crosses the background, where nothing is above the surface, breadth first. So a voxel of
it decides the label of a needed node only on a shortest way from a seed to that node. How long
the way can be is known from the flood with the fewest seeds of all: more seeds make no way
longer. What lies too far from every node, or from all that may be a seed, is cut off.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from hydralv_tune.numerics.watershed.compiled import kernel
from hydralv_tune.numerics.watershed.flood import components, keep_large
from hydralv_tune.numerics.watershed.graph import Ints, WatershedGraph, bits_of, has, take

FAR = 255
"""The longest way that is told from longer ones: a voxel takes one byte."""
NEVER = 2**30


def pruned(
    graph: WatershedGraph,
    thresholds: npt.NDArray[np.float64],
    least_seed: int,
    near: npt.NDArray[np.uint8],
) -> WatershedGraph:
    """Return the graph without the background that no flood from these seeds, or more, needs.

    Every needed node gets the label that it gets in the whole graph.

    Args:
        graph: What is flooded.
        thresholds: (channels,), float64: the highest that a seed must be above.
        least_seed: The largest size that a seed must have.
        near: Of `steps_from_any_seed`.
    """
    found = components(
        graph.values, thresholds, graph.candidates, graph.where, graph.nodes, graph.box.before
    )
    seeds, _, _ = keep_large(*found, least_seed)
    steps = np.full(len(graph.nodes), NEVER, np.int32)
    _steps(
        seeds, graph.ranks, graph.levels, graph.needed, graph.needed_count,
        graph.unvisited.copy(), graph.known, graph.where, graph.nodes, graph.box.faces, steps,
        np.zeros(0, np.uint8),
    )  # fmt: skip
    needed = np.flatnonzero(graph.needed)
    far_first = needed[np.argsort(-steps[needed], kind="stable")].astype(np.int32)
    kept = bits_of(graph.nodes[_sources(graph)], len(graph.box))
    _keep(
        far_first, steps, near, graph.ranks, graph.levels, graph.unvisited.copy(), graph.known,
        graph.where, graph.nodes, graph.box.faces, kept,
    )  # fmt: skip
    kept &= graph.unvisited
    basins = int(np.count_nonzero(graph.ranks < graph.levels))
    return replace(graph, unvisited=kept, background=int(np.bitwise_count(kept).sum()) - basins)


def steps_from_any_seed(graph: WatershedGraph) -> npt.NDArray[np.uint8]:
    """Return the steps through the background from the nearest place that may be a seed or basin.

    Returns:
        (places of the box,), `FAR` where it is that or more.
    """
    near = np.full(len(graph.box), FAR, np.uint8)
    _steps(
        _sources(graph), graph.ranks, graph.levels, graph.needed, NEVER,
        graph.unvisited.copy(), graph.known, graph.where, graph.nodes, graph.box.faces,
        np.empty(len(graph.nodes), np.int32), near,
    )  # fmt: skip
    return near


def _sources(graph: WatershedGraph) -> Ints:
    """Return the nodes that may be a seed, or are reached from one without crossing background."""
    is_source = graph.ranks < graph.levels
    is_source[graph.candidates] = True
    return np.flatnonzero(is_source).astype(np.int32)


@kernel
def _pushed(queue: Any, ends: int, place: int) -> Any:
    """Return the queue with a place behind its end, longer where it was full."""
    if ends == len(queue):
        queue = np.concatenate((queue, np.empty(len(queue), np.int32)))
    queue[ends] = place
    return queue


@kernel
def _steps(
    seeds: Any, ranks: Any, levels: int, needed: Any, needed_left: int, unvisited: Any, known: Any,
    where: Any, position: Any, faces: Any, of_node: Any, of_place: Any,
) -> None:  # fmt: skip
    """Write how many voxels of the background a flood from the seeds enters on the way to each.

    Args:
        seeds: Nodes.
        ranks, levels, needed, unvisited, known, where, position, faces: As for `flood`.
        needed_left: It ends when so many needed nodes are reached.
        of_node: (nodes,), int32; written to.
        of_place: (places,), uint8, or empty; written to.
    """
    now, later = np.empty(1024, np.int32), np.empty(1024, np.int32)
    now_ends, later_ends, level = 0, 0, 0
    for node in seeds:
        place = np.int64(position[node])
        if not take(unvisited, place):
            continue
        needed_left -= needed[node]
        of_node[node] = ranks[node] >= levels
        if len(of_place):
            of_place[place] = of_node[node]
        if ranks[node] < levels:
            now = _pushed(now, now_ends, place)
            now_ends += 1
        else:
            later = _pushed(later, later_ends, place)
            later_ends += 1
    while needed_left > 0 and now_ends + later_ends > 0:
        at = 0
        while at < now_ends:
            place = np.int64(now[at])
            at += 1
            for offset in faces:
                other = place + offset
                if not take(unvisited, other):
                    continue
                step = level + 1
                if has(known, other):
                    node = where[other]
                    step -= ranks[node] < levels
                    of_node[node] = step
                    needed_left -= needed[node]
                if len(of_place):
                    of_place[other] = min(step, FAR)
                if step == level:
                    now = _pushed(now, now_ends, other)
                    now_ends += 1
                else:
                    later = _pushed(later, later_ends, other)
                    later_ends += 1
        now, later = later, now
        now_ends, later_ends = later_ends, 0
        level += 1


@kernel
def _keep(
    far_first: Any, steps: Any, near: Any, ranks: Any, levels: int, unvisited: Any, known: Any,
    where: Any, position: Any, faces: Any, kept: Any,
) -> None:  # fmt: skip
    """Set the bits of what may lie on a shortest way to a needed node.

    From each needed node as many steps are taken back as the longest way to it has; a voxel is
    kept where no fewer of them are left than it is away from anything that may be a seed.

    Args:
        far_first: The needed nodes, by falling `steps`.
        steps: (nodes,), int32, of the flood with the fewest seeds.
        near: (places,), uint8.
        ranks, levels, unvisited, known, where, position, faces: As for `flood`.
        kept: Bits of places; set.
    """
    # Of those with as many steps left: what came from the level before, then basins, which cost
    # no step to leave, then the background.
    came, basins = np.empty(1024, np.int32), np.empty(1024, np.int32)
    plains, later = np.empty(1024, np.int32), np.empty(1024, np.int32)
    came_ends, begun = 0, 0
    left = steps[far_first[0]] if len(far_first) else 0
    while left >= 0 and (came_ends > 0 or begun < len(far_first)):
        if came_ends == 0:
            left = min(left, steps[far_first[begun]])
        while begun < len(far_first) and steps[far_first[begun]] >= left:
            place = np.int64(position[far_first[begun]])
            begun += 1
            if take(unvisited, place):
                came = _pushed(came, came_ends, place)
                came_ends += 1
        basin_ends, plain_ends, later_ends = 0, 0, 0
        for at in range(came_ends):
            place = np.int64(came[at])
            if has(known, place) and ranks[where[place]] < levels:
                basins = _pushed(basins, basin_ends, place)
                basin_ends += 1
            else:
                plains = _pushed(plains, plain_ends, place)
                plain_ends += 1
        at = 0
        while at < basin_ends:
            place = np.int64(basins[at])
            at += 1
            for offset in faces:
                other = place + offset
                if not take(unvisited, other):
                    continue
                if has(known, other) and ranks[where[other]] < levels:
                    basins = _pushed(basins, basin_ends, other)
                    basin_ends += 1
                else:
                    plains = _pushed(plains, plain_ends, other)
                    plain_ends += 1
        for at in range(plain_ends):
            place = np.int64(plains[at])
            if left < near[place]:
                continue  # nor is anything beyond it
            kept[place >> 6] |= np.uint64(1) << np.uint64(place & 63)
            for offset in faces:
                other = place + offset
                if take(unvisited, other):
                    later = _pushed(later, later_ends, other)
                    later_ends += 1
        came, later = later, came
        came_ends = later_ends
        left -= 1
