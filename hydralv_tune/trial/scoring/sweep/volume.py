"""One volume of a sweep: what each combination of the slow axes gives, measured once."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.linalg import block_diag

from hydralv_tune.numerics.metrics.contingency import (
    EMPTY_TRUTH,
    ContingencyTable,
    checked_mask,
    contingency_table,
    split_unknown,
)
from hydralv_tune.numerics.metrics.scores import log_terms, match_instances
from hydralv_tune.numerics.watershed.decoders import DECODERS, SweepForm, decode
from hydralv_tune.numerics.watershed.flood import Workspace, fingerprint, keep_large, split
from hydralv_tune.numerics.watershed.graph import WatershedGraph
from hydralv_tune.numerics.watershed.parts import (
    Part,
    Parts,
    add_sums,
    mark_seeds,
    room_of,
    same_rows,
)
from hydralv_tune.numerics.watershed.pruning import pruned
from hydralv_tune.numerics.watershed.threshold_sums import COUNTS, threshold_sums, threshold_tables
from hydralv_tune.trial.scoring.sweep.grid import Axes, GridLike, decoder_arguments_at

Array = npt.NDArray[Any]
Key = Any  # a tuple of values of the slow axes
NO_LIMIT = float("inf")


@dataclass(frozen=True)
class Sums:
    """What the figures of a grid are made of, in the order of its table."""

    counts: npt.NDArray[np.int64]
    logs: npt.NDArray[np.float64]
    voxels: int
    truth_sizes: npt.NDArray[np.int64]

    def __add__(self, other: Sums) -> Sums:
        """Return the sums of two volumes, each with instances of its own."""
        return Sums(
            counts=self.counts + other.counts,
            logs=self.logs + other.logs,
            voxels=self.voxels + other.voxels,
            truth_sizes=np.concatenate([self.truth_sizes, other.truth_sizes]),
        )


class SweptVolume(ABC):
    """A volume made ready for a grid, and the sums of every combination met so far.

    Args:
        maps: (3, Z, Y, X), floats.
        labels: (Z, Y, X), integers.
        mask: (Z, Y, X), where is tissue, or none.
        scored: (Z, Y, X), where the truth is known, or none: where the mask is.
        grid: Decoder and fixed arguments.
        axes: The widest axes; later ones lie within.
        entropy: Whether sums of logarithms are needed too.

    Raises:
        ValueError: The input breaks a rule, or the label has no voxel where it is scored.
    """

    def __init__(
        self, maps: Array, labels: Array, mask: Array | None, scored: Array | None, grid: GridLike,
        axes: Axes, *, entropy: bool,
    ) -> None:  # fmt: skip
        labels, unknown = split_unknown(labels, "label")
        if labels.shape != maps.shape[1:]:
            raise ValueError(
                f"label has shape {labels.shape}, but probabilities have {maps.shape[1:]}"
            )
        valid = scored_mask(mask, scored, labels.shape)
        if unknown is not None:
            valid = ~unknown if valid is None else valid & ~unknown
        own = labels if valid is None else labels[valid]
        self._ids, sizes = np.unique(own[own > 0], return_counts=True)
        if not len(self._ids):
            raise ValueError(EMPTY_TRUTH)
        self.truth_sizes = sizes.astype(np.int64)
        self.voxels = labels.size if valid is None else int(np.count_nonzero(valid))
        self._labels, self._valid, self._maps, self._mask = labels, valid, maps, mask
        self._grid, self._entropy = grid, entropy
        self.fit(axes)

    def fit(self, axes: Axes) -> None:
        """Take the axes of a grid within the first; forget all sums."""
        self._axes = axes
        self.row_of: dict[Key, int] = {}
        self._rows: list[tuple[Array, Array]] = []

    @abstractmethod
    def run(self, keys: Iterable[Key], threads: int, deadline: float = NO_LIMIT) -> bool:
        """Measure what is new among combinations of the slow axes; return whether all are done.

        Args:
            keys: Values of the slow axes.
            threads: How many work at once.
            deadline: In `time.perf_counter`; nothing is begun after it.
        """

    @abstractmethod
    def stack(self, key: Key) -> ContingencyTable:
        """Return the tables of all combinations that share these values of the slow axes."""

    def sums(self, axes: Axes) -> Sums:
        """Return the sums of a grid whose slow combinations have all been run."""
        at = np.array([self.row_of[key] for key in axes.keys_of()])
        counts, logs = (np.stack([row[part] for row in self._rows])[at] for part in (0, 1))
        return Sums(self._in_order(counts), self._in_order(logs), self.voxels, self.truth_sizes)

    def _in_order(self, rows: Array) -> Array:
        """Return (sums, combinations) of (slow, sums, sizes, foreground combinations)."""
        rows = np.moveaxis(rows, 1, 0)
        return rows.reshape(len(rows), -1) if len(rows) else np.zeros((0, 0))


def scored_mask(mask: Array | None, scored: Array | None, shape: tuple[int, ...]) -> Array | None:
    """Return where the score is made: in the tissue, and there where the truth is known."""
    tissue, known = checked_mask(mask, shape), checked_mask(scored, shape)
    return known if tissue is None else tissue if known is None else tissue & known


class DecodedVolume(SweptVolume):
    """A volume of which every combination is decoded: for a decoder without a sweep form."""

    def run(self, keys: Iterable[Key], threads: int, deadline: float = NO_LIMIT) -> bool:
        """Decode and score each new combination, one after the other."""
        for key in keys:
            if key in self.row_of:
                continue
            if time.perf_counter() > deadline:
                return False
            self.row_of[key] = len(self._rows)
            self._rows.append(_sums_of(self._table(key), self._entropy))
        return True

    def stack(self, key: Key) -> ContingencyTable:
        """Return the table of one combination."""
        return self._table(key)

    def _table(self, key: Key) -> ContingencyTable:
        """Return the table of one combination, decoded anew."""
        point = dict(zip(self._axes, key, strict=True))
        segments = decode(
            self._grid.decoder, self._maps, self._mask, **decoder_arguments_at(self._grid, point)
        )
        return contingency_table(prediction=segments, truth=self._labels, mask=self._valid)


def _sums_of(table: ContingencyTable, entropy: bool) -> tuple[Array, Array]:
    """Return what `threshold_sums` gives, of one table: (6, 1, 1) and (2, 1, 1)."""
    inside = table.segment_sizes_in_truth
    counts = [
        np.square(table.pair_voxels).sum(), np.square(inside).sum(),
        np.square(table.segment_sizes).sum(), table.pair_voxels.sum(),
        table.instances_predicted, match_instances(table).matched,
    ]  # fmt: skip
    missed = log_terms(table.truth_sizes - table.truth_sizes_found).sum()
    logs = [log_terms(table.pair_voxels).sum() + missed, log_terms(inside).sum()] if entropy else []
    return np.array(counts, np.int64)[:, None, None], np.array(logs, float)[:, None, None]


WORTH_PRUNING = 6
"""Sets of seeds from which it pays to prune: that takes about as long as three floods."""

LARGE_PART = 2**16
"""Voxels from which a part is flooded by all threads together."""

SHARED_ROWS = 16
"""Sets of seeds of a large part that a thread takes at once: neighbours share most floods."""


@dataclass(frozen=True)
class _Scored:
    """The scored nodes of a graph, or elements of a part, sorted by truth for `threshold_sums`."""

    nodes: Array
    truth: Array
    cell: Array
    bins: Any


@dataclass
class _Row:
    """The sums of one set of seeds, and which combinations have it."""

    of: list[int] = field(default_factory=list)
    sums: Any = 0
    logs: Any = 0


class _Total:
    """The sums of each combination of the slow axes, and a mark of its seeds: both add up.

    Args:
        tasks: The seed thresholds, and the combinations that share them.
        signs: What turns a threshold into one that a channel must be above.
        width: How many instance sizes and foreground combinations there are.
        entropy: Whether there are sums of logarithms too.
    """

    def __init__(
        self, tasks: Sequence[tuple[Key, list[Key]]], signs: Sequence[int],
        width: tuple[int, int], entropy: bool,
    ) -> None:  # fmt: skip
        self.keys = [key for _, same in tasks for key in same]
        self.least_seeds = np.array([key[-1] for key in self.keys], np.int64)
        self.thresholds = np.array(
            [np.multiply(seeds, signs) for seeds, same in tasks for _ in same], np.float64
        )
        ends = np.cumsum([len(same) for _, same in tasks])
        self.groups = [
            range(end - len(same), end) for end, (_, same) in zip(ends, tasks, strict=True)
        ]
        self.marks = np.zeros((len(self.keys), 2), np.uint64)
        self.sums = np.zeros((len(self.keys), COUNTS, *width), np.int64)
        self.logs = np.zeros((len(self.keys), 2 if entropy else 0, *width))

    def empty(self) -> _Total:
        """Return the same combinations with no sums yet, for one thread to add to."""
        other = copy(self)
        other.marks, other.sums = np.zeros_like(self.marks), np.zeros_like(self.sums)
        return other


def _in_threads(work: Callable[[], bool], rest: Iterator[Any], threads: int) -> bool:
    """Let threads take from the same iterator until it is empty; return whether all ended well."""
    if threads == 1:
        return work()
    with ThreadPoolExecutor(threads) as pool:
        try:
            futures = [pool.submit(work) for _ in range(threads)]
            return all([future.result() for future in futures])  # noqa: C419, each may raise
        finally:
            # After an error or Ctrl-C the others would finish the whole list first.
            for _ in rest:
                pass


class FloodedVolume(SweptVolume):
    """A volume of which each set of seeds is flooded once, for all foreground thresholds."""

    def __init__(
        self, maps: Array, labels: Array, mask: Array | None, scored: Array | None, grid: GridLike,
        axes: Axes, *, entropy: bool,
    ) -> None:  # fmt: skip
        form = DECODERS[grid.decoder].sweep
        assert form is not None, "checked by the caller"
        self._form: SweepForm = form
        self._split = bool(grid.fixed.get("split_components", False))
        self._lock = Lock()
        super().__init__(maps, labels, mask, scored, grid, axes, entropy=entropy)
        labels, valid = self._labels, self._valid
        self._graph = form.graph(maps, mask, axes, grid.fixed)
        needed = np.flatnonzero(self._graph.needed)
        voxels = self._graph.box.voxels_of(self._graph.nodes[needed])
        at = labels.ravel()[voxels]
        truth = np.where(at > 0, np.searchsorted(self._ids, at) + 1, 0).astype(np.int32)
        if valid is not None:
            truth[~valid.ravel()[voxels]] = -1
        # Sorted by truth here, once, so that each flood need only be sorted by its labels.
        order = np.argsort(truth, kind="stable")
        self._scored = needed[order].astype(np.int32)
        self._truth = truth[order]
        self._kept: tuple[WatershedGraph, Array, int] | None = None
        del self._labels, self._valid, self._maps, self._mask

    def fit(self, axes: Axes) -> None:
        """Take the foreground thresholds and instance sizes of these axes; forget all sums."""
        super().fit(axes)
        self._least = np.array(axes["min_instance_size"], np.int64)
        signs = self._form.signs
        self._limits = [
            sorted(sign * value for value in axes[name])
            for name, sign in zip(self._form.foreground, signs, strict=False)
        ]
        self._known: dict[Any, int] = {}

    def run(self, keys: Iterable[Key], threads: int, deadline: float = NO_LIMIT) -> bool:
        """Flood what is new among combinations of the slow axes; return whether all are done."""
        new = [key for key in keys if key not in self.row_of]
        for graph, cell, bins, tasks in self._passes(new):
            width = (len(self._least), int(np.prod(bins)))
            total = _Total(tasks, self._form.signs, width, self._entropy)
            scored = _Scored(self._scored, self._truth, cell, bins)
            # A seed may lie beside a flood that is cut, and entropy wants each truth as a whole.
            is_pruned = self._form.cut is None and len(total.keys) >= WORTH_PRUNING
            if is_pruned:
                graph = self._pruned(graph, total)
            if is_pruned and not self._entropy and not self._split:
                is_done = self._by_part(Parts(graph), scored, total, threads, deadline)
            else:
                is_done = self._by_key(graph, scored, total, threads, deadline)
            if not is_done:
                return False
            for index, key in enumerate(total.keys):
                mark = (key[len(self._form.seeds) : -1], *total.marks[index].tolist())
                row = self.row_of[key] = self._known.setdefault(mark, len(self._rows))
                if row == len(self._rows):
                    self._rows.append((total.sums[index], total.logs[index]))
        return True

    def _pruned(self, graph: WatershedGraph, total: _Total) -> WatershedGraph:
        """Return a graph without what none of the combinations needs."""
        highest, largest = total.thresholds.max(axis=0), int(total.least_seeds.max())
        kept = pruned(graph, highest, largest)
        self._kept = kept, highest, largest
        return kept

    def _by_part(
        self, parts: Parts, scored: _Scored, total: _Total, threads: int, deadline: float
    ) -> bool:
        """Flood part by part: a large one by all threads together, small ones by one each."""
        part_of = parts.of_node[scored.nodes]
        order = np.argsort(part_of, kind="stable")
        begins = np.searchsorted(part_of[order], np.arange(len(parts) + 1))

        def ready(number: int) -> tuple[Part, _Scored]:
            own = order[begins[number] : begins[number + 1]]
            part, elements = parts.part(number, scored.nodes[own])
            return part, _Scored(elements, scored.truth[own], scored.cell[own], scored.bins)

        by_size = np.argsort(-parts.sizes, kind="stable")
        todo = [int(number) for number in by_size if begins[number] < begins[number + 1]]
        large = [number for number in todo if parts.sizes[number] >= LARGE_PART]
        for number in large:
            if not self._one_part(*ready(number), total, threads, deadline):
                return False
        rest = iter(todo[len(large) :])

        def work() -> bool:
            own = total.empty()
            for number in rest:
                if not self._one_part(*ready(number), own, 1, deadline):
                    return False
            with self._lock:
                total.sums += own.sums
                total.marks += own.marks
            return True

        return _in_threads(work, rest, threads)

    def _one_part(
        self, part: Part, scored: _Scored, total: _Total, threads: int, deadline: float
    ) -> bool:
        """Flood a part for each set of seeds that is met in it for the first time."""
        marks = np.empty_like(total.marks)
        # One call for a small part, since there are many; one call a flood for threads to share.
        groups = iter(total.groups if threads > 1 else [range(len(total.keys))])

        def mark() -> bool:
            for group in groups:
                mark_seeds(
                    part, total.thresholds, total.least_seeds, group.start, group.stop, marks
                )
            return True

        _in_threads(mark, groups, threads)
        is_first, follows = same_rows(marks)
        # Threads take different rows, and no two rows are followed by the same combination.
        new = np.flatnonzero(is_first & marks.any(axis=1))
        rows = iter(np.array_split(new, max(len(new) // SHARED_ROWS, 1)) if threads > 1 else [new])

        def work() -> bool:
            room = room_of(part)
            for some in rows:
                if time.perf_counter() > deadline:
                    return False
                add_sums(
                    part, room, total.thresholds, total.least_seeds, some, follows,
                    scored.nodes, scored.truth, scored.cell, scored.bins, self.truth_sizes,
                    self._least, total.sums,
                )  # fmt: skip
            return True

        is_done = _in_threads(work, rows, threads)
        total.marks += marks
        return is_done

    def _by_key(
        self, graph: WatershedGraph, scored: _Scored, total: _Total, threads: int, deadline: float
    ) -> bool:
        """Flood one graph for each set of seeds that is met in it for the first time."""
        known: dict[tuple[int, int], _Row] = {}
        rest = iter(total.groups)

        def work() -> bool:
            space = Workspace(graph)
            for group in rest:
                if time.perf_counter() > deadline:
                    return False
                found = space.seeds(total.thresholds[group[0]])
                for index in group:
                    kept, names, _ = keep_large(*found, total.least_seeds[index])
                    mark = fingerprint(kept)
                    with self._lock:
                        is_new = mark not in known
                        row = known.setdefault(mark, _Row())
                        row.of.append(index)
                    total.marks[index] += np.array(mark, np.uint64)
                    if is_new:
                        labels = space.flooded(kept, names)
                        found_sums = [
                            threshold_sums(*parts, self.truth_sizes, self._least, self._entropy)
                            for parts in self._instances(graph, labels, scored)
                        ]
                        row.sums, row.logs = (
                            np.concatenate(sums, axis=2) for sums in zip(*found_sums, strict=True)
                        )
            return True

        if not _in_threads(work, rest, threads):
            return False
        for row in known.values():
            total.sums[row.of] += row.sums
            total.logs[row.of] += row.logs
        return True

    def stack(self, key: Key) -> ContingencyTable:
        """Return the tables of all combinations of one flood, which is made anew."""
        ((graph, cell, bins, ((seeds, _),)),) = self._passes([key])
        if self._kept is not None:
            kept_graph, highest, largest = self._kept
            # What was cut off for fewer seeds is not needed for these either.
            if (self._thresholds(seeds) <= highest).all() and key[-1] <= largest:
                graph = kept_graph
        space = Workspace(graph)
        kept, names, _ = keep_large(*space.seeds(self._thresholds(seeds)), key[-1])
        labels = space.flooded(kept, names)
        tables = [
            threshold_tables(*found)
            for found in self._instances(
                graph, labels, _Scored(self._scored, self._truth, cell, bins)
            )
        ]
        full, whole, both = (block_diag(*(table[part] for table in tables)) for part in (0, 1, 4))
        starts = np.cumsum([0, *(len(table[0]) for table in tables)])
        segment = np.concatenate(
            [table[2] + start for table, start in zip(tables, starts, strict=False)]
        )
        own = np.concatenate([table[3] for table in tables])
        # Sizes and foreground combinations become one axis, in the order of the table.
        kept = np.stack([full >= max(least, 1) for least in self._least], axis=1)
        columns = np.arange(len(self._least) * full.shape[1])
        columns = self._in_order(columns.reshape(1, 1, len(self._least), -1))[0]
        width = len(columns)
        sizes = (whole[:, None] * kept).reshape(len(whole), width)[:, columns]
        voxels = (both[:, None] * kept[segment]).reshape(len(both), width)[:, columns]
        return ContingencyTable(
            voxels=self.voxels,
            truth_ids=self._ids.astype(np.uint64),
            truth_sizes=self.truth_sizes,
            segment_ids=np.arange(1, len(whole) + 1, dtype=np.uint64),
            segment_sizes=sizes,
            pair_truth=own,
            pair_segment=segment,
            pair_voxels=voxels,
        )

    def _thresholds(self, seeds: Key) -> Array:
        """Return what each channel must be above to be a seed."""
        return np.array(seeds, np.float64) * self._form.signs

    def _passes(self, keys: list[Key]) -> Iterator[tuple[WatershedGraph, Array, Any, Any]]:
        """Return, for each graph to flood: it, its cells, and (seeds, their keys)."""
        groups: dict[Key, dict[Key, list[Key]]] = {}
        channels = len(self._form.seeds)
        for key in keys:
            groups.setdefault(key[channels:-1], {}).setdefault(key[:channels], []).append(key)
        for part, tasks in groups.items():
            graph = self._graph
            if self._form.cut is not None:
                graph = self._form.cut(graph, *part)
            if self._form.foreground:
                cell, bins = last_cells(graph.values[:, self._scored], self._limits)
            else:
                cell, bins = graph.needed[self._scored].astype(np.int32) - 1, (1, 1, 1)
            yield graph, cell, bins, list(tasks.items())

    def _instances(
        self, graph: WatershedGraph, labels: Array, scored: _Scored
    ) -> Iterator[tuple[Array, Array, Array, tuple[int, ...]]]:
        """Return what `threshold_sums` takes first: labels, truth, cells, bins.

        One for all foreground combinations, or one for each where their instances are split,
        since which pieces there are depends on what is foreground.
        """
        at = labels[scored.nodes]
        if not self._split:
            yield at, scored.truth, scored.cell, scored.bins
            return
        passed = np.stack(np.unravel_index(np.maximum(scored.cell, 0), scored.bins))
        for combination in np.ndindex(*scored.bins):
            inside = (scored.cell >= 0) & (passed >= np.reshape(combination, (-1, 1))).all(axis=0)
            shown = np.zeros(len(labels), np.int32)
            shown[scored.nodes] = np.where(inside, at, 0)
            pieces = split(shown, graph)[scored.nodes]
            yield pieces, scored.truth, inside.astype(np.int32) - 1, (1, 1, 1)

    def _in_order(self, rows: Array) -> Array:
        """Return (sums, combinations) of (slow, sums, sizes, foreground combinations)."""
        lengths = [len(axis) for axis in self._limits]
        if lengths and len(rows):
            rows = rows.reshape(*rows.shape[:3], *lengths)
            # What passes below its threshold has its cells the other way round.
            turned = tuple(3 + axis for axis, sign in enumerate(self._form.signs) if sign < 0)
            rows = np.flip(rows, turned)
        return super()._in_order(rows)


def last_cells(values: Array, limits: Sequence[Sequence[float]]) -> tuple[Array, tuple[int, ...]]:
    """Return, for each node, the last cell it passes among sorted limits (-1: none), and bins.

    Args:
        values: (channels, nodes), float32.
        limits: For each channel the limits that a value must be above, ascending.
    """
    cell = np.zeros(values.shape[1], np.int64)
    none = np.zeros(values.shape[1], bool)
    for channel, axis in enumerate(limits):
        passed = np.searchsorted(np.array(axis), values[channel].astype(np.float64), side="left")
        none |= passed == 0
        cell = cell * len(axis) + passed - 1
    cell[none] = -1
    bins = (*(len(axis) for axis in limits), 1, 1)[:3]
    return cell.astype(np.int32), bins
