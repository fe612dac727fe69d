"""Predict, sweep, decode, score: what one set of networks is worth."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from hydralv_tune.config.candidate import Candidate
from hydralv_tune.config.errors import TrialFailed, as_input_error
from hydralv_tune.config.search_space import Objective, objective_value
from hydralv_tune.data.volumes import Volume
from hydralv_tune.numerics.metrics.contingency import ContingencyTable, contingency_table, joined
from hydralv_tune.numerics.metrics.instance_errors import noise
from hydralv_tune.numerics.metrics.scores import score
from hydralv_tune.numerics.watershed.decoders import decode
from hydralv_tune.trial.scoring.prediction import predict
from hydralv_tune.trial.scoring.sweep.sweep import GridLike, SweepResult, sweep

Array = npt.NDArray[Any]


class Unit(Protocol):
    """A network and the volumes it is scored on."""

    @property
    def name(self) -> str: ...
    @property
    def network(self) -> nn.Module: ...
    @property
    def score(self) -> Sequence[Volume]: ...


@dataclass(frozen=True)
class Outcome:
    """What an evaluation found.

    Args:
        value: What the study minimises; with several folds their mean.
        metrics: Every figure of the winner's segmentation, over all volumes together; with
            several folds, errors and F1 are means over the folds.
        sweep: Every combination of thresholds.
        decoding: `{name, kwargs}` of the winner.
        folds: Name, value and figures of each fold.
        volumes: Name and figures of each volume scored.
        segmentations: Of each volume, in order.
        probabilities: Of each volume, in order.
        tables: Overlaps of truth and segmentation of each volume, in order.
        seconds: Of prediction, sweep and score.
    """

    value: float
    metrics: dict[str, Any]
    sweep: SweepResult
    decoding: dict[str, Any]
    folds: tuple[dict[str, Any], ...]
    volumes: tuple[dict[str, Any], ...]
    segmentations: tuple[Array, ...]
    probabilities: tuple[Array, ...]
    tables: tuple[ContingencyTable, ...]
    seconds: dict[str, float]

    @property
    def f1(self) -> float:
        """Return F1 at IoU 0.5."""
        return float(self.metrics["f1_iou50"])

    def noise(self, objective: Objective) -> float | None:
        """Return how well the value is known: its standard deviation over instances drawn anew.

        With several folds it is the standard error of their mean; None where the metric has none.
        """
        if len(self.folds) > 1:
            return float(np.std([fold["value"] for fold in self.folds], ddof=1)) / math.sqrt(
                len(self.folds)
            )
        return noise(joined(self.tables), objective.metric)


def evaluate(
    units: Sequence[Unit],
    candidate: Candidate,
    grid: GridLike,
    objective: Objective,
    *,
    device: torch.device,
    threads: int | None = None,
    time_limit_s: float | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Outcome:
    """Return what the networks are worth under the best common thresholds.

    Args:
        units: One, or one per fold; all are decoded with the same thresholds.
        candidate: Its inference settings.
        grid: Combinations of thresholds.
        objective: What is minimised, and the guard.
        device: Where the networks are.
        threads: Of the sweep.
        time_limit_s: The sweep is thinned to fit.
        progress: Told windows done and windows in all.

    Raises:
        TrialFailed: The prediction holds values that are not finite, or does not fit in memory.
        InputError: The grid or the volumes break a rule.
    """
    start = time.perf_counter()
    volumes = [volume for unit in units for volume in unit.score]
    maps = []
    for unit in units:
        for volume in unit.score:
            with as_input_error(f"Volume '{volume.name}'"):
                maps.append(
                    predict(
                        unit.network, volume.image, candidate, device=device,
                        progress=progress, mask=volume.mask, normalisation=volume.normalisation,
                    )
                )  # fmt: skip
    predicted = time.perf_counter()
    with as_input_error("sweep"):
        swept = sweep(
            maps,
            [volume.label for volume in volumes],
            [volume.mask for volume in volumes],
            grid,
            scored_mask=[volume.scored_mask for volume in volumes],
            objective=objective,
            time_limit_s=time_limit_s,
            threads=threads,
        )
    after_sweep = time.perf_counter()
    arguments = swept.winner.arguments
    with as_input_error("decoding"):
        segments = [
            decode(grid.decoder, probabilities, volume.mask, **arguments)
            for probabilities, volume in zip(maps, volumes, strict=True)
        ]
    tables = [_table(volume, segment) for volume, segment in zip(volumes, segments, strict=True)]
    left = iter(tables)
    scored = [(unit.name, _figures([next(left) for _ in unit.score])) for unit in units]
    folds = tuple(
        {"name": name, "value": objective_value(figures, objective), "metrics": figures}
        for name, figures in scored
    )
    together = _figures(tables)
    figures = together if len(units) == 1 else {**together, **_means([f for _, f in scored])}
    return Outcome(
        value=float(np.mean([fold["value"] for fold in folds])),
        metrics=figures,
        sweep=swept,
        decoding={"name": grid.decoder, "kwargs": arguments},
        folds=folds,
        volumes=tuple(
            {"name": volume.name, "metrics": _figures([table])}
            for volume, table in zip(volumes, tables, strict=True)
        )
        if len(volumes) > 1
        else (),
        segmentations=tuple(segments),
        probabilities=tuple(maps),
        tables=tuple(tables),
        seconds={
            "prediction": predicted - start,
            "sweep": after_sweep - predicted,
            "score": time.perf_counter() - after_sweep,
        },
    )


def _table(volume: Volume, segments: Array) -> ContingencyTable:
    """Return the overlaps of truth and segments where the volume is scored.

    Raises:
        TrialFailed: There is no truth.
    """
    assert volume.label is not None, "checked by the split"
    with _as_failure():
        table = contingency_table(prediction=segments, truth=volume.label, mask=volume.where_scored)
    if volume.label_ids is None:
        return table
    return replace(table, truth_ids=volume.label_ids[table.truth_ids.astype(np.int64) - 1])


def _figures(tables: Sequence[ContingencyTable]) -> dict[str, Any]:
    """Return every figure over several volumes; the ids of a single one are kept.

    Raises:
        TrialFailed: There is no truth.
    """
    with _as_failure():
        scored = score(joined(tables))
    return {**scored.as_dict(), **{f"{key}_count": n for key, n in scored.counts.items()}}


@contextmanager
def _as_failure() -> Iterator[None]:
    """Turn what cannot be scored into a failure of the trial."""
    try:
        yield
    except ValueError as error:
        raise TrialFailed("score", str(error), retry=False) from error


def _means(folds: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the means over folds of what is no count and no list."""
    return {
        key: float(np.mean([fold[key] for fold in folds]))
        for key, value in folds[0].items()
        if isinstance(value, float)
    }


def better(
    new: Outcome, best_value: float | None, best_f1: float, guard: float, seen_f1: float = 0.0
) -> bool:
    """Return whether an evaluation replaces the best one so far.

    The rule is the sweep's: a checkpoint whose F1 is more than `guard` below the best F1 of all
    evaluations loses, whatever its error; otherwise the smaller value wins. Without it, an early
    blob of small error would outlive every good checkpoint after it.

    Args:
        new: The evaluation.
        best_value: Of the best one so far, None where there is none.
        best_f1: Of the best one so far.
        guard: `objective.guard.f1_below_best`.
        seen_f1: The best F1 of all evaluations before. To compare with `best_f1` instead would
            let F1 fall by almost `guard` at every evaluation.
    """
    limit = max(new.f1, best_f1, seen_f1) - guard
    if best_value is None or best_f1 < limit:
        return True
    return new.f1 >= limit and new.value < best_value
