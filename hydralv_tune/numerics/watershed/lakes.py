"""Floods of single lakes, and which of two voxels one flood of all lakes would leave first.

A lake is a set of voxels of positive distance that touch by faces. Until every lake is full no
background is flooded, and no lake touches another, so each is flooded by itself: it stays in the
processor's cache, and its last flood serves again where its seeds are the same. Whom the
background beside two lakes belongs to depends on which shore a flood of all lakes leaves first.

A lake leaves its voxels in stretches. A stretch begins with a voxel of a rank no lower than any
before, and ends before the next such one: what lies between is lower, and no other lake can come
between. Stretches of all lakes are in the order of their ranks; those of one rank are in the order
in which their first voxels were queued, which is that of the stretches that queued them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from hydralv_tune.numerics.watershed.compiled import kernel
from hydralv_tune.numerics.watershed.flood import lowest_bit
from hydralv_tune.numerics.watershed.graph import Ints

Array = npt.NDArray[Any]


class Lakes(NamedTuple):
    """The lakes of a part, one after the other.

    A slot is a place in this order; the slots of a lake are in raster order of their voxels.

    Args:
        starts: (lakes + 1,), int32, where each lake's slots begin.
        of: (slots,), int32, the lake of each.
        elements: (slots,), int32, which voxel of the part each is.
        slot: (elements,), int32, the slot of each voxel, -1 for background and for none.
        faces: (slots, 6), int32, the slots beside each, in raster order; -1 for none.
        ranks: (slots,), int32, in the lake.
        rank: (slots,), int32, in the part.
        queues: (slots + lakes,), int32: from `starts[lake] + lake` on, where the queue of each
            rank of a lake begins, counted from its first slot.
        is_shore: (slots,), whether a voxel touches background.
        needed: (lakes,), int64, how many of its voxels are needed.
        most: The most slots of a lake.
    """

    starts: Ints
    of: Ints
    elements: Ints
    slot: Ints
    faces: Ints
    ranks: Ints
    rank: Ints
    queues: Ints
    is_shore: npt.NDArray[np.bool_]
    needed: npt.NDArray[np.int64]
    most: int


class LakeRoom(NamedTuple):
    """What one thread remembers of the last flood of each lake: 40 bytes a slot and 20 a lake.

    Args:
        marks: (lakes, 2), uint64, of the seeds.
        origin: (slots,), int32, the slot of the seed that reached each.
        queued_in, left_in: (slots,), int32, the stretch that queued each, -1 for a seed, and the
            one in which it was left.
        left_at: (slots,), int32, when each was left, counted in its lake.
        rank, parent, opening: Of each stretch, from the lake's first slot on: its rank in the
            part, the stretch that queued its first voxel or -1, and that voxel's slot.
        queue, ends, bits, tops: Of the flood of one lake.
        label_of: (slots,), int32, of the seeds.
    """

    marks: npt.NDArray[np.uint64]
    origin: Ints
    queued_in: Ints
    left_in: Ints
    left_at: Ints
    rank: Ints
    parent: Ints
    opening: Ints
    queue: Ints
    ends: Ints
    bits: npt.NDArray[np.uint64]
    tops: npt.NDArray[np.uint64]
    label_of: Ints


def lakes_of(beside: Ints, rank: Ints, needed: npt.NDArray[np.bool_], background: int) -> Lakes:
    """Return the lakes of a part.

    Args:
        beside: Of `Part`.
        rank: (elements,), int32; -1 for what is no voxel.
        needed: (elements,).
        background: The rank of the background.
    """
    is_basin = (rank >= 0) & (rank < background)
    of_element, count = _found(beside, is_basin)
    basins = np.flatnonzero(is_basin).astype(np.int32)
    order = np.argsort(of_element[basins], kind="stable")
    elements = basins[order]
    of = of_element[elements]
    starts = np.searchsorted(of, np.arange(count + 1)).astype(np.int32)
    slot = np.full(len(rank), -1, np.int32)
    slot[elements] = np.arange(len(elements), dtype=np.int32)
    ranks = np.empty(len(elements), np.int32)
    queues = np.zeros(len(elements) + count, np.int32)
    own = rank[elements].astype(np.int32)
    _rank_in_lakes(np.lexsort((own, of)), own, of, starts, ranks, queues)
    is_shore, faces = np.zeros(len(elements), bool), np.empty((len(elements), 6), np.int32)
    # In raster order, one after the other: all six at once are many times what is kept.
    before_z, before_y, after_y, after_z = beside[elements].T
    around = (before_z, before_y, elements - 1, elements + 1, after_y, after_z)
    for face, other in enumerate(around):
        is_shore |= rank[other] == background
        faces[:, face] = slot[other]
    return Lakes(
        starts=starts, of=of, elements=elements, slot=slot, faces=faces, ranks=ranks,
        rank=own, queues=queues,
        is_shore=is_shore, needed=np.bincount(of, needed[elements], count).astype(np.int64),
        most=int(np.diff(starts).max(initial=0)),
    )  # fmt: skip


def lake_room_of(lakes: Lakes) -> LakeRoom:
    """Return the memory for floods of lakes, with nothing remembered."""
    slots, count = len(lakes.elements), len(lakes.starts) - 1
    return LakeRoom(
        marks=np.zeros((count, 2), np.uint64),
        ends=np.empty(2 * lakes.most, np.int32),
        bits=np.zeros((lakes.most >> 6) + 1, np.uint64),
        tops=np.zeros((lakes.most >> 12) + 1, np.uint64),
        **{
            name: np.empty(slots, np.int32)
            for name in ("origin", "queued_in", "left_in", "left_at", "rank", "parent", "opening",
                         "queue", "label_of")
        },
    )  # fmt: skip


@kernel
def _found(beside: Any, is_basin: Any) -> Any:
    """Return the lake of each element that is a basin, and how many lakes there are."""
    of = np.full(len(is_basin), -1, np.int32)
    queue = np.empty(np.count_nonzero(is_basin), np.int32)
    count = 0
    for seed in range(len(is_basin)):
        if not is_basin[seed] or of[seed] >= 0:
            continue
        of[seed] = count
        queue[0] = seed
        at, end = 0, 1
        while at < end:
            element = np.int64(queue[at])
            at += 1
            for face in range(6):
                other = at_face(beside, element, face)
                if is_basin[other] and of[other] < 0:
                    of[other] = count
                    queue[end] = other
                    end += 1
        count += 1
    return of, count


@kernel
def _rank_in_lakes(order: Any, rank: Any, of: Any, starts: Any, ranks: Any, queues: Any) -> None:
    """Write the rank of each slot in its lake, and where each rank's queue begins.

    Args:
        order: Slots by lake, then by rank.
        rank: Of each slot in the part.
        of, starts, ranks, queues: Of `Lakes`; the last two are written to.
    """
    last, own = -1, 0
    for index in range(len(order)):
        slot = order[index]
        lake = of[slot]
        first = starts[lake]
        if index == first or rank[slot] != last:
            own = 0 if index == first else own + 1
            queues[first + lake + own] = index - first
        last = rank[slot]
        ranks[slot] = own


@kernel
def flood_lake(lakes: Any, lake: int, seeds: Any, start: int, stop: int, room: Any) -> None:
    """Flood one lake from its seeds, and remember what it took.

    Args:
        lakes: `Lakes`.
        lake: Which.
        seeds: Slots, those from `start` to `stop` of this lake, in raster order.
        room: `LakeRoom`; written to.
    """
    low, high = np.int64(lakes.starts[lake]), np.int64(lakes.starts[lake + 1])
    # Each look-up in a tuple of arrays counts a reference, so none is left in the loops.
    queue, ends, bits, tops = room.queue, room.ends, room.bits, room.tops
    ranks, queues, of_part, faces = lakes.ranks, lakes.queues, lakes.rank, lakes.faces
    origin, queued_in, left_in, left_at = room.origin, room.queued_in, room.left_in, room.left_at
    began, parent, opening = room.rank, room.parent, room.opening
    origin[low:high] = -1
    for own in range(high - low):
        ends[2 * own] = queues[low + lake + own]
        ends[2 * own + 1] = ends[2 * own]
    lowest: Any = len(tops)
    for index in range(start, stop):
        slot = np.int64(seeds[index])
        origin[slot] = slot
        queued_in[slot] = -1
        lowest = min(lowest, _push(slot, np.int64(ranks[slot]), low, queue, ends, bits, tops))
    top: Any = -1
    stretch, left = low - 1, 0
    while lowest < len(tops):
        if tops[lowest] == 0:
            lowest += 1
            continue
        word = (lowest << 6) + lowest_bit(tops[lowest])
        rank = (word << 6) + lowest_bit(bits[word])
        first = ends[2 * rank]
        ends[2 * rank] = first + 1
        if first + 1 == ends[2 * rank + 1]:
            bits[word] &= ~(np.uint64(1) << np.uint64(rank & 63))
            if bits[word] == 0:
                tops[lowest] &= ~(np.uint64(1) << np.uint64(word & 63))
        slot = np.int64(queue[low + first])
        if rank >= top:
            top = rank
            stretch += 1
            began[stretch] = of_part[slot]
            parent[stretch] = queued_in[slot]
            opening[stretch] = slot
        left_in[slot], left_at[slot] = stretch, left
        left += 1
        for face in range(6):
            reached = np.int64(faces[slot, face])
            if reached >= 0 and origin[reached] < 0:
                origin[reached] = origin[slot]
                queued_in[reached] = stretch
                lowest = min(
                    lowest, _push(reached, np.int64(ranks[reached]), low, queue, ends, bits, tops)
                )


@kernel
def _push(slot: Any, rank: Any, low: Any, queue: Any, ends: Any, bits: Any, tops: Any) -> int:
    """Put a slot at the end of its rank's queue; return the top word that holds its bit."""
    last = ends[2 * rank + 1]
    if ends[2 * rank] == last:
        bits[rank >> 6] |= np.uint64(1) << np.uint64(rank & 63)
        tops[rank >> 12] |= np.uint64(1) << np.uint64((rank >> 6) & 63)
    queue[low + last] = slot
    ends[2 * rank + 1] = last + 1
    return rank >> 12


@kernel
def is_earlier(
    one: int, two: int, of: Any, elements: Any, left_in: Any, left_at: Any, rank: Any, parent: Any,
    opening: Any,
) -> bool:  # fmt: skip
    """Return whether a flood of all lakes leaves a slot before another.

    Args:
        one, two: Slots; a seed of the background is a negative number, in raster order, since all
            seeds are queued before anything is left.
        of, elements: Of `Lakes`.
        left_in, left_at, rank, parent, opening: Of `LakeRoom`. A tuple of so many arrays would
            count a reference to each in every call.
    """
    if one < 0 or two < 0:
        return one < two
    if of[one] == of[two]:
        return left_at[one] < left_at[two]
    first, second = left_in[one], left_in[two]
    while rank[first] == rank[second]:
        if parent[first] < 0 and parent[second] < 0:
            return elements[opening[first]] < elements[opening[second]]
        if parent[first] < 0 or parent[second] < 0:
            return parent[first] < 0
        first, second = parent[first], parent[second]
    return rank[first] < rank[second]


@kernel
def make_plan(
    lakes: Any, beside: Any, is_background: Any, is_needed: Any, is_seeded: Any, alone: Any
) -> Any:
    """Return how the background is crossed, breadth first, from some lakes and single seeds.

    A voxel of the background belongs to whom reaches it in the fewest steps, so the steps do not
    depend on where in a lake its seeds are: one plan serves many sets of seeds. A lake without a
    seed takes no step and goes as a whole to who enters it.

    Args:
        lakes: `Lakes`.
        beside, is_background, is_needed: Of `Part`.
        is_seeded: (lakes,).
        alone: Elements of the seeds in no lake, int64.

    Returns:
        What is reached, in order, int32: an element, or -1 less the lake; where the sources of
        each begin among all sources, int32; the sources, int32: a slot on the shore of a seeded
        lake, or -1 less the index of what was reached a step before. A seed has none.
    """
    reached, step, index_of, lake_step, lake_index = _reached_from(
        lakes, beside, is_background, is_needed, is_seeded, alone
    )
    source_starts, sources = _sources_of(
        lakes, beside, is_background, is_seeded, len(alone), reached, step, index_of, lake_step,
        lake_index,
    )  # fmt: skip
    return reached, source_starts, sources


@kernel
def _reached_from(
    lakes: Any, beside: Any, is_background: Any, is_needed: Any, is_seeded: Any, alone: Any
) -> Any:
    """Return what is reached, in order, until nothing that is needed is left.

    Returns:
        `reached` of the plan; of each element and of each lake the step in which it was reached,
        from 1, and its index in `reached`.
    """
    of, slot_of = lakes.of, lakes.slot
    step, index_of = np.zeros(len(beside), np.int32), np.empty(len(beside), np.int32)
    lake_step, lake_index = np.zeros(len(is_seeded), np.int32), np.empty(len(is_seeded), np.int32)
    reached = np.empty(np.count_nonzero(is_background) + len(is_seeded), np.int32)
    left = np.count_nonzero(is_needed)
    end = 0
    for element in alone:
        step[element] = 1
        index_of[element] = end
        reached[end] = element
        left -= is_needed[element]
        end += 1
    for lake in range(len(is_seeded)):
        if is_seeded[lake]:
            left -= lakes.needed[lake]
    if left > 0:
        for lake in range(len(is_seeded)):
            if is_seeded[lake]:
                end, needed = _reach_from_lake(
                    lakes, lake, 1, beside, is_background, is_needed, step, index_of, reached, end
                )
                left -= needed
    begin, now = 0, 1
    while left > 0 and begin < end:
        last = end
        for index in range(begin, last):
            for face in range(6):
                slot = slot_of[at_face(beside, np.int64(reached[index]), face)]
                if slot >= 0 and not is_seeded[of[slot]] and lake_step[of[slot]] == 0:
                    lake_step[of[slot]] = now
                    lake_index[of[slot]] = end
                    reached[end] = -1 - of[slot]
                    left -= lakes.needed[of[slot]]
                    end += 1
        now += 1
        first_lake, last_lake = last, end
        for index in range(begin, last):
            end, needed = _reach(
                np.int64(reached[index]), now, beside, is_background, is_needed, step, index_of,
                reached, end,
            )  # fmt: skip
            left -= needed
        for index in range(first_lake, last_lake):
            end, needed = _reach_from_lake(
                lakes, -1 - reached[index], now, beside, is_background, is_needed, step, index_of,
                reached, end,
            )  # fmt: skip
            left -= needed
        begin = last_lake
    return reached[:end], step, index_of, lake_step, lake_index


@kernel
def _sources_of(
    lakes: Any, beside: Any, is_background: Any, is_seeded: Any, seeds: int, reached: Any,
    step: Any, index_of: Any, lake_step: Any, lake_index: Any,
) -> Any:  # fmt: skip
    """Return where the sources of each begin, and the sources.

    Args:
        lakes, beside, is_background, is_seeded: Of `make_plan`.
        seeds: How many of the first that are reached are seeds in no lake.
        reached, step, index_of, lake_step, lake_index: Of `_reached_from`.
    """
    starts, of, slot_of = lakes.starts, lakes.of, lakes.slot
    elements, is_shore = lakes.elements, lakes.is_shore
    source_starts = np.empty(len(reached) + 1, np.int32)
    sources = np.empty(6 * (len(reached) + len(elements)), np.int32)  # what is unused costs nothing
    count = 0
    for index in range(len(reached)):
        source_starts[index] = count
        if reached[index] < 0:
            lake = -1 - reached[index]
            for slot in range(starts[lake], starts[lake + 1]):
                if is_shore[slot]:
                    for face in range(6):
                        other = at_face(beside, np.int64(elements[slot]), face)
                        if is_background[other] and step[other] == lake_step[lake]:
                            sources[count] = -1 - index_of[other]
                            count += 1
            continue
        if index < seeds:
            continue
        element = np.int64(reached[index])
        before = step[element] - 1
        for face in range(6):
            other = at_face(beside, element, face)
            slot = slot_of[other]
            if slot >= 0:
                lake = of[slot]
                if is_seeded[lake]:
                    if before == 0:
                        sources[count] = slot
                        count += 1
                elif before > 0 and lake_step[lake] == before:
                    sources[count] = -1 - lake_index[lake]
                    count += 1
            elif before > 0 and is_background[other] and step[other] == before:
                sources[count] = -1 - index_of[other]
                count += 1
    source_starts[len(reached)] = count
    return source_starts, sources[:count]


@kernel
def at_face(beside: Any, element: Any, face: int) -> Any:
    """Return the neighbour at one of six faces, the four of `beside` and then those along x."""
    if face > 3:
        return element + 2 * face - 9
    return np.int64(beside[element, face])


@kernel
def _reach(
    element: int, now: int, beside: Any, is_background: Any, is_needed: Any, step: Any,
    index_of: Any, reached: Any, end: int,
) -> Any:  # fmt: skip
    """Reach the background beside a voxel; return where `reached` ends and how much is needed."""
    needed = 0
    for face in range(6):
        other = at_face(beside, element, face)
        if is_background[other] and step[other] == 0:
            step[other] = now
            index_of[other] = end
            reached[end] = other
            needed += is_needed[other]
            end += 1
    return end, needed


@kernel
def _reach_from_lake(
    lakes: Any, lake: int, now: int, beside: Any, is_background: Any, is_needed: Any, step: Any,
    index_of: Any, reached: Any, end: int,
) -> Any:  # fmt: skip
    """Do the same beside every voxel of a lake's shore."""
    elements, is_shore = lakes.elements, lakes.is_shore
    total = 0
    for slot in range(lakes.starts[lake], lakes.starts[lake + 1]):
        if is_shore[slot]:
            end, needed = _reach(
                np.int64(elements[slot]), now, beside, is_background, is_needed, step, index_of,
                reached, end,
            )  # fmt: skip
            total += needed
    return end, total


@kernel
def follow_plan(plan: Any, lakes: Any, room: Any, labels: Any) -> None:
    """Write the labels of what a plan reaches.

    Of several sources, the one whose way began at the shore that was left first has it.

    Args:
        plan: Of `make_plan`.
        lakes, room: `Lakes` and `LakeRoom`.
        labels: (elements,), int32; those of the seeds in no lake are known.
    """
    reached, source_starts, sources = plan
    of, elements, starts = lakes.of, lakes.elements, lakes.starts
    left_in, left_at, rank = room.left_in, room.left_at, room.rank
    parent, opening, origin, label_of = room.parent, room.opening, room.origin, room.label_of
    root = np.empty(len(reached), np.int32)
    for index in range(len(reached)):
        start, stop = source_starts[index], source_starts[index + 1]
        if start == stop:
            root[index] = reached[index] - len(labels)
            continue
        best = sources[start] if sources[start] >= 0 else root[-1 - sources[start]]
        for at in range(start + 1, stop):
            other = sources[at] if sources[at] >= 0 else root[-1 - sources[at]]
            if other != best and is_earlier(
                other, best, of, elements, left_in, left_at, rank, parent, opening
            ):
                best = other
        root[index] = best
        label = label_of[origin[best]] if best >= 0 else labels[best + len(labels)]
        if reached[index] >= 0:
            labels[reached[index]] = label
        else:
            lake = -1 - reached[index]
            for slot in range(starts[lake], starts[lake + 1]):
                labels[elements[slot]] = label
