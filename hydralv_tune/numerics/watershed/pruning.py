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
    graph: WatershedGraph, thresholds: npt.NDArray[np.float64], least_seed: int
) -> WatershedGraph:
    """Return the graph without the background that no flood from these seeds, or more, needs.

    Every needed node gets the label that it gets in the whole graph.

    Args:
        graph: What is flooded.
        thresholds: (channels,), float64: the highest that a seed must be above.
        least_seed: The largest size that a seed must have.
    """
    found = components(graph.values, thresholds, graph.candidates, graph.nodes, graph.box.before)
    seeds, _, _ = keep_large(*found, least_seed)
    steps = np.full(len(graph.nodes), NEVER, np.int32)
    _steps(
        seeds, graph.ranks, graph.levels, graph.needed, graph.needed_count,
        graph.unvisited.copy(), graph.known, graph.where, graph.nodes, graph.box.faces, steps,
    )  # fmt: skip
    needed = np.flatnonzero(graph.needed)
    far_first = needed[np.argsort(-steps[needed], kind="stable")].astype(np.int32)
    kept = bits_of(graph.nodes[_sources(graph)], len(graph.box))
    _keep(
        far_first, steps, _steps_from_any_seed(graph), graph.ranks, graph.levels,
        graph.unvisited.copy(), graph.known, graph.where, graph.nodes, graph.box.faces, kept,
    )  # fmt: skip
    kept &= graph.unvisited
    basins = int(np.count_nonzero(graph.ranks < graph.levels))
    return replace(graph, unvisited=kept, background=int(np.bitwise_count(kept).sum()) - basins)


def _steps_from_any_seed(graph: WatershedGraph) -> npt.NDArray[np.uint8]:
    """Return how many voxels of the background lie at least on a way from a seed or basin to each.

    It is the city block distance to the nearest place that may be one: no way through the domain
    is shorter, and it takes two passes in memory order, where a search takes one at random.

    Returns:
        (places of the box,), `FAR` where it is that or more.
    """
    near = np.full(len(graph.box), FAR, np.uint8)
    sources = _sources(graph)
    near[graph.nodes[sources]] = graph.ranks[sources] >= graph.levels
    _spread(near.reshape(graph.box.padded))
    return near


def _sources(graph: WatershedGraph) -> Ints:
    """Return the nodes that may be a seed, or are reached from one without crossing background."""
    is_source = graph.ranks < graph.levels
    is_source[graph.candidates] = True
    return np.flatnonzero(is_source).astype(np.int32)


@kernel
def _spread(near: Any) -> None:
    """Lower each value of (z, y, x), uint8, to one more than any of its 6 neighbours at most.

    Args:
        near: Written to; the top value stays where it is reached.
    """
    depth, height, width = near.shape
    for z in range(depth):
        for y in range(height):
            row = near[z, y]
            if z > 0:
                _lower(row, near[z - 1, y])
            if y > 0:
                _lower(row, near[z, y - 1])
            for x in range(1, width):
                if row[x] > row[x - 1]:
                    row[x] = min(row[x], row[x - 1] + 1)
    for z in range(depth - 1, -1, -1):
        for y in range(height - 1, -1, -1):
            row = near[z, y]
            if z < depth - 1:
                _lower(row, near[z + 1, y])
            if y < height - 1:
                _lower(row, near[z, y + 1])
            for x in range(width - 2, -1, -1):
                if row[x] > row[x + 1]:
                    row[x] = min(row[x], row[x + 1] + 1)


@kernel
def _lower(row: Any, beside: Any) -> None:
    """Lower each value of a row to one more than that beside it."""
    for x in range(len(row)):
        if row[x] > beside[x]:
            row[x] = min(row[x], beside[x] + 1)


@kernel
def _longer(queue: Any) -> Any:
    """Return the queue with as much room again behind it, for six neighbours at least."""
    return np.concatenate((queue, np.empty(len(queue) + 6, np.int32)))


@kernel
def _steps(
    seeds: Any, ranks: Any, levels: int, needed: Any, needed_left: int, unvisited: Any, known: Any,
    where: Any, position: Any, faces: Any, of_node: Any,
) -> None:  # fmt: skip
    """Write how many voxels of the background a flood from the seeds enters on the way to each.

    Args:
        seeds: Nodes.
        ranks, levels, needed, unvisited, known, where, position, faces: As for `flood`.
        needed_left: It ends when so many needed nodes are reached.
        of_node: (nodes,), int32; written to.
    """
    now, later = np.empty(len(seeds) + 1024, np.int32), np.empty(len(seeds) + 1024, np.int32)
    now_ends, later_ends, level = 0, 0, 0
    for node in seeds:
        place = np.int64(position[node])
        if not take(unvisited, place):
            continue
        needed_left -= needed[node]
        of_node[node] = ranks[node] >= levels
        if ranks[node] < levels:
            now[now_ends] = place
            now_ends += 1
        else:
            later[later_ends] = place
            later_ends += 1
    while needed_left > 0 and now_ends + later_ends > 0:
        at = 0
        while at < now_ends:
            place = np.int64(now[at])
            at += 1
            if now_ends + 6 > len(now):
                now = _longer(now)
            if later_ends + 6 > len(later):
                later = _longer(later)
            for offset in faces:
                other = place + offset
                if not take(unvisited, other):
                    continue
                if has(known, other):
                    node = where[other]
                    is_basin = ranks[node] < levels
                    of_node[node] = level + 1 - is_basin
                    needed_left -= needed[node]
                    if is_basin:
                        now[now_ends] = other
                        now_ends += 1
                        continue
                later[later_ends] = other
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
    came, later = np.empty(1024, np.int32), np.empty(1024, np.int32)
    basins, plains = np.empty(1024, np.int32), np.empty(1024, np.int32)
    came_ends, begun = 0, 0
    left = steps[far_first[0]] if len(far_first) else 0
    while left >= 0 and (came_ends > 0 or begun < len(far_first)):
        if came_ends == 0:
            left = min(left, steps[far_first[begun]])
        while begun < len(far_first) and steps[far_first[begun]] >= left:
            place = np.int64(position[far_first[begun]])
            begun += 1
            if take(unvisited, place):
                if came_ends + 6 > len(came):
                    came = _longer(came)
                came[came_ends] = place
                came_ends += 1
        basin_ends, plain_ends, later_ends = 0, 0, 0
        for at in range(came_ends):
            place = np.int64(came[at])
            if has(known, place) and ranks[where[place]] < levels:
                if basin_ends + 6 > len(basins):
                    basins = _longer(basins)
                basins[basin_ends] = place
                basin_ends += 1
            elif left >= near[place]:  # nor is anything beyond it where not
                if plain_ends + 6 > len(plains):
                    plains = _longer(plains)
                plains[plain_ends] = place
                plain_ends += 1
        at = 0
        while at < basin_ends:
            place = np.int64(basins[at])
            at += 1
            if basin_ends + 6 > len(basins):
                basins = _longer(basins)
            if plain_ends + 6 > len(plains):
                plains = _longer(plains)
            for offset in faces:
                other = place + offset
                if not take(unvisited, other):
                    continue
                if has(known, other) and ranks[where[other]] < levels:
                    basins[basin_ends] = other
                    basin_ends += 1
                elif left >= near[other]:
                    plains[plain_ends] = other
                    plain_ends += 1
        for at in range(plain_ends):
            place = np.int64(plains[at])
            kept[place >> 6] |= np.uint64(1) << np.uint64(place & 63)
            if later_ends + 6 > len(later):
                later = _longer(later)
            for offset in faces:
                other = place + offset
                if take(unvisited, other):
                    later[later_ends] = other
                    later_ends += 1
        came, later = later, came
        came_ends = later_ends
        left -= 1
