"""One volume of a sweep: seeds and flood of each seed set, and the sums they give."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Lock
from typing import Any

import numpy as np
import numpy.typing as npt

from hydralv_tune.numerics.metrics import scores
from hydralv_tune.numerics.watershed.decoders import above, decoder_arguments
from hydralv_tune.numerics.watershed.flood import Workspace, fingerprint, keep_large
from hydralv_tune.numerics.watershed.graph import (
    WatershedGraph,
    contour_relief,
    distance_relief,
    foreground_relief,
)
from hydralv_tune.numerics.watershed.threshold_sums import tally
from hydralv_tune.trial.scoring.sweep.grid import PAIRS, Axes, GridLike, slow_combinations

Array = npt.NDArray[Any]
Key = Any  # a tuple of values of the slow axes
NO_LIMIT = float("inf")


@dataclass(frozen=True)
class Sums:
    """What all figures of a grid are made of, in the order of its table."""

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


def cells_of(values: Array, limits: Sequence[Sequence[float]]) -> tuple[Array, tuple[int, ...]]:
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


class SweptVolume:
    """A volume made ready for a grid, and the sums of every seed set met so far.

    Args:
        maps: (3, Z, Y, X), floats.
        labels: (Z, Y, X), integers.
        mask: (Z, Y, X), or none.
        grid: Decoder and fixed arguments.
        axes: The widest axes; later ones lie within.
        entropy: Whether sums of logarithms are wanted too.

    Raises:
        ValueError: The input breaks a rule, or the label has no voxel inside the mask.
    """

    def __init__(
        self, maps: Array, labels: Array, mask: Array | None, grid: GridLike, axes: Axes,
        *, entropy: bool,
    ) -> None:  # fmt: skip
        labels = scores.checked_labels(labels, "label")
        if labels.shape != np.shape(maps)[1:]:
            raise ValueError(
                f"label has shape {labels.shape}, but probabilities have {np.shape(maps)[1:]}"
            )
        valid = scores.checked_mask(mask, labels.shape)
        inside = labels > 0 if valid is None else (labels > 0) & valid
        ids, sizes = np.unique(labels[inside], return_counts=True)
        if not len(ids):
            raise ValueError(scores.EMPTY_TRUTH)
        self.truth_sizes = sizes.astype(np.int64)
        self.voxels = labels.size if valid is None else int(np.count_nonzero(valid))
        self._contour = "flood" in decoder_arguments(grid.decoder)
        self._relief = _relief(maps, mask, grid, axes)
        wanted = np.flatnonzero(self._relief.wanted)
        at = labels.ravel()[self._relief.box.voxels_of(self._relief.nodes[wanted])]
        truth = np.where(at > 0, np.searchsorted(ids, at) + 1, 0).astype(np.int32)
        # Sorted by truth here, once, so that each flood need only be sorted by its labels.
        order = np.argsort(truth, kind="stable")
        self._scored = wanted[order].astype(np.int32)
        self._truth = truth[order]
        self._entropy = entropy
        self._lock = Lock()
        self.fit(axes)

    def fit(self, axes: Axes) -> None:
        """Take the foreground thresholds and instance sizes of these axes; forget all sums."""
        self._least = np.array(axes["min_instance_size"], np.int64)
        self._limits: list[list[float]] = []
        if self._contour:
            self._limits = [
                sorted(above(channel, value) for value in axes[f"{name}.foreground"])
                for channel, name in enumerate(PAIRS)
            ]
        self._row_of: dict[Key, int] = {}
        self._known: dict[Any, int] = {}
        self._rows: list[tuple[Array, Array]] = []

    def run(self, keys: Iterable[Key], threads: int, deadline: float = NO_LIMIT) -> bool:
        """Flood what is new among the combinations of the slow axes; return whether all are done.

        Args:
            keys: Values of the slow axes.
            threads: How many work at once.
            deadline: In `time.perf_counter`; no flood is begun after it.
        """
        new = [key for key in keys if key not in self._row_of]
        for relief, cell, bins, tasks in self._passes(new):
            todo = iter(tasks)

            def work(relief: WatershedGraph = relief, cell: Array = cell, bins: Any = bins,
                     todo: Iterator[tuple[Key, list[Key]]] = todo) -> None:  # fmt: skip
                space = Workspace(relief)
                for seeds, same in todo:
                    if time.perf_counter() > deadline:
                        return
                    self._measure(space, cell, bins, seeds, same)

            if threads == 1 or len(tasks) == 1:
                work()
                continue
            with ThreadPoolExecutor(threads) as pool:
                try:
                    for future in [pool.submit(work) for _ in range(threads)]:
                        future.result()
                finally:
                    # After an error or Ctrl-C the others would finish the whole list first.
                    for _ in todo:
                        pass
        return all(key in self._row_of for key in new)

    def _passes(self, keys: list[Key]) -> Iterator[tuple[WatershedGraph, Array, Any, Any]]:
        """Return, for each relief to flood: it, its cells, and (seeds, their keys)."""
        groups: dict[Key, dict[Key, list[Key]]] = {}
        for key in keys:
            part = () if self._contour else (key[1],)
            seeds = key[:3] if self._contour else key[:1]
            groups.setdefault(part, {}).setdefault(seeds, []).append(key)
        for part, tasks in groups.items():
            if self._contour:
                cell, bins = cells_of(self._relief.values[:, self._scored], self._limits)
                yield self._relief, cell, bins, list(tasks.items())
            else:
                relief = foreground_relief(self._relief, part[0])
                cell = relief.wanted[self._scored].astype(np.int32) - 1
                yield relief, cell, (1, 1, 1), list(tasks.items())

    def _measure(
        self, space: Workspace, cell: Array, bins: Any, seeds: Key, keys: list[Key]
    ) -> None:
        """Find the seeds of one combination, and flood those that are met for the first time."""
        if self._contour:
            limits = np.array([above(channel, value) for channel, value in enumerate(seeds)])
        else:
            limits = np.array(seeds, np.float64)
        found = space.seeds(limits)
        for key in keys:
            kept, names, _ = keep_large(*found, key[-1])
            mark = (None if self._contour else key[1], *fingerprint(kept))
            with self._lock:
                row = self._known.get(mark)
                new = row is None
                if row is None:
                    row = self._known[mark] = len(self._rows)
                    self._rows.append((np.zeros(0), np.zeros(0)))
            if new:
                labels = space.flooded(kept, names)[self._scored]
                self._rows[row] = tally(
                    labels, self._truth, cell, bins, self.truth_sizes, self._least, self._entropy
                )
            self._row_of[key] = row

    def sums(self, axes: Axes) -> Sums:
        """Return the sums of a grid whose slow combinations have all been run."""
        at = np.array([self._row_of[key] for key in slow_combinations(axes)])
        counts, logs = (np.stack([row[part] for row in self._rows])[at] for part in (0, 1))
        return Sums(self._in_order(counts), self._in_order(logs), self.voxels, self.truth_sizes)

    def _in_order(self, rows: Array) -> Array:
        """Return (sums, combinations) of (slow, sums, sizes, foreground combinations)."""
        rows = np.moveaxis(rows, 1, 0)
        if self._contour:
            # A contour passes below its threshold, so its cells run the other way.
            lengths = [len(axis) for axis in self._limits]
            rows = rows.reshape(*rows.shape[:3], *lengths)[:, :, :, :, ::-1]
        return rows.reshape(len(rows), -1) if len(rows) else np.zeros((0, 0))


def _relief(maps: Array, mask: Array | None, grid: GridLike, axes: Axes) -> WatershedGraph:
    """Return the relief that serves every combination of the axes."""
    if "flood" not in decoder_arguments(grid.decoder):
        seeds, limits = axes["distance_threshold.seed"], axes["distance_threshold.foreground"]
        return distance_relief(maps, mask, seed=min(seeds), lowest=min(*seeds, *limits))
    lowest = {
        part: [
            min(above(channel, value) for value in axes[f"{name}.{part}"])
            for channel, name in enumerate(PAIRS)
        ]
        for part in ("seed", "foreground")
    }
    extra = {key: grid.fixed[key] for key in ("flood", "floor") if key in grid.fixed}
    return contour_relief(maps, mask, seeds=lowest["seed"], limits=lowest["foreground"], **extra)
