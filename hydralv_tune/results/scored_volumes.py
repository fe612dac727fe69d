"""What the best trial was scored on, with its segmentation: for the report and for exports."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from hydralv_tune.artifacts.records import plain, read_json, write_json
from hydralv_tune.config.errors import InputError, as_input_error
from hydralv_tune.data.volumes import Volume, read_labels
from hydralv_tune.numerics.metrics.contingency import (
    ContingencyTable,
    contingency_table,
    joined,
    offsets,
)
from hydralv_tune.numerics.metrics.instance_errors import InstanceError, instance_errors
from hydralv_tune.numerics.metrics.scores import score
from hydralv_tune.numerics.watershed.decoders import decode
from hydralv_tune.results.best_trial import BestTrial
from hydralv_tune.trial.scoring.prediction import load_network, pick_device, predict
from hydralv_tune.trial.splits import SplitPlan, describe, needed_margin, split_volumes
from hydralv_tune.trial.training.lazy_reader import held_out_volumes, part_to_score, read_or_open

Array = npt.NDArray[Any]

TRAINED_ON = "trained_on.json"
"""File of a trial's folder with its figures on what it was trained on."""


@dataclass(frozen=True)
class ScoredVolume:
    """One volume, or the part of it that was scored, with the best trial's segmentation of it.

    Args:
        volume: Image, label and mask of the part.
        prediction: (Z, Y, X) labels, 0 outside the mask.
    """

    volume: Volume
    prediction: Array

    @cached_property
    def inside_prediction(self) -> Array:
        """Return the segments inside the mask."""
        return self._inside(self.prediction)

    @cached_property
    def truth(self) -> Array:
        """Return the labels inside the mask."""
        assert self.volume.label is not None, "what is scored has labels"
        return self._inside(self.volume.label)

    @cached_property
    def table(self) -> ContingencyTable:
        """Return the overlaps of truth and segmentation inside the mask."""
        return contingency_table(
            prediction=self.prediction, truth=self.truth, mask=self.volume.where_scored
        )

    @cached_property
    def boxes(self) -> tuple[dict[int, tuple[slice, ...]], dict[int, tuple[slice, ...]]]:
        """Return where each instance of the truth, and each segment, lies."""
        return _boxes(self.truth), _boxes(self.inside_prediction)

    def _inside(self, labels: Array) -> Array:
        """Return the labels with 0 outside the mask."""
        inside = self.volume.where_scored
        return labels if inside is None else np.where(inside, labels, 0)


def _boxes(labels: Array) -> dict[int, tuple[slice, ...]]:
    """Return the bounding box of each id; ids may be far apart."""
    ids, dense = np.unique(labels, return_inverse=True)
    found = ndimage.find_objects(dense.reshape(labels.shape) + 1)
    return {int(i): box for i, box in zip(ids, found, strict=True) if i and box is not None}


@dataclass(frozen=True)
class Instance:
    """One instance with what became of it, in the ids of its volume."""

    part: int
    error: InstanceError


@dataclass(frozen=True)
class Judgement:
    """All scored volumes together.

    Args:
        parts: The volumes.
        table: Their overlaps as one.
        instances: Every truth and every false positive, the costliest first.
        joined: The same with ids that are unique over all volumes, as `table` has them.
    """

    parts: list[ScoredVolume]
    table: ContingencyTable
    instances: list[Instance]
    joined: list[InstanceError]


def scored_volumes(best: BestTrial) -> list[ScoredVolume]:
    """Return what the best trial was scored on, with its segmentations.

    They are read from the trial's folder, or predicted and decoded again where they are gone.

    Raises:
        InputError: A volume is gone or has changed, or so has a checkpoint.
    """
    plan = split_of(best)
    parts = [(index, part) for index, fold in enumerate(plan.folds) for part in fold.score]
    scored = []
    for number, (_, part) in enumerate(parts):
        path = best.folder / f"segmentation_{number}.h5"
        if not path.is_file():
            return _decoded_again(best, plan, {})
        segments = read_labels(path)
        if segments.shape != part.image.shape:
            raise InputError(
                f"{path}: has shape {segments.shape}, but {part.name} has {part.image.shape}. "
                "Delete it to have it made again."
            )
        scored.append(ScoredVolume(part, segments))
    return scored


def split_of(best: BestTrial) -> SplitPlan:
    """Return the split of the trial over its volumes, which must be those it was trained on.

    Of a volume over `data.memory_limit_gb` the same sections are scored as in the trial.
    """
    record, candidate = best.record, best.candidate
    limit_gb = candidate.data.memory_limit_gb
    volumes = [read_or_open(paths, limit_gb) for paths in best.volumes]
    held_out = held_out_volumes(candidate.data, best.volumes)
    for volume, entry in zip([*volumes, *held_out], record.volumes, strict=True):
        if volume.fingerprint() != entry.get("fingerprint"):
            raise InputError(
                f"Volume '{volume.name}': its fingerprint is {volume.fingerprint()}, but the trial "
                f"was scored on {entry.get('fingerprint')}. Put the volume back as it was."
            )
    plan = split_volumes(
        volumes, candidate.data, receptive_field=needed_margin(candidate), held_out=held_out
    )
    folds = [replace(fold, score=_as_scored(fold.score, best)) for fold in plan.folds]
    return replace(plan, folds=tuple(folds))


def _decoded_again(best: BestTrial, plan: SplitPlan, changed: dict[str, Any]) -> list[ScoredVolume]:
    """Return the scored volumes, predicted and decoded, with some decoder arguments changed."""
    scored = []
    arguments = {**best.step.decoder_arguments(), **changed}
    for part, maps in predicted_parts(best, plan):
        with as_input_error(f"Volume '{part.name}'"):
            segments = decode(best.step.name, maps, part.mask, **arguments)
        scored.append(ScoredVolume(part, segments))
    return scored


def predicted_parts(
    best: BestTrial, plan: SplitPlan, device: str = "auto"
) -> Iterator[tuple[Volume, Array]]:
    """Yield each volume that a trial was scored on, with the probabilities of its fold's network.

    Args:
        best: The trial.
        plan: Its split, as `split_of` gives.
        device: As for `pick_device`.

    Raises:
        InputError: A checkpoint is gone, or a volume cannot be predicted.
    """
    where = pick_device(device)
    for fold, path in zip(plan.folds, fold_checkpoints(best, plan), strict=True):
        network, candidate = load_network(path, device=where)
        for part in fold.score:
            with as_input_error(f"Volume '{part.name}'"):
                maps = predict(
                    network, part.image, candidate, device=where, mask=part.mask,
                    normalisation=part.normalisation,
                )  # fmt: skip
            yield part, maps


def fold_checkpoints(best: BestTrial, plan: SplitPlan) -> list[Path]:
    """Return the checkpoint of each fold."""
    if len(plan.folds) == 1:
        return [best.checkpoint]
    return [best.folder / fold.name / "best.ckpt" for fold in plan.folds]


def score_under_volume_flood(best: BestTrial) -> dict[str, Any]:
    """Return the best trial's figures with the flood that PyTorch Connectomics runs.

    Raises:
        InputError: A volume or a checkpoint is gone or has changed.
    """
    if best.step.decoder_arguments().get("flood") == "volume" or (
        best.step.name != "decode_instance_binary_contour_distance"
    ):
        return best.record.metrics
    parts = _decoded_again(best, split_of(best), {"flood": "volume"})
    return score(joined([part.table for part in parts])).as_dict()


def figures_where_trained(best: BestTrial) -> dict[str, Any]:
    """Return the best trial's figures on what it was trained on, under its thresholds.

    Where the trial was scored on that, they are those of its record. Otherwise its networks predict
    it, once: the figures stay in the trial's folder, where that can be written.

    Raises:
        InputError: A volume or a checkpoint is gone or has changed.
    """
    if best.record.split.get("kind") in (None, "none"):
        return best.record.metrics
    plan, kept = split_of(best), best.folder / TRAINED_ON
    paths = fold_checkpoints(best, plan)
    arguments = best.step.decoder_arguments()
    made_of = plain(
        {
            "weights": [sha256(path.read_bytes()).hexdigest() for path in paths],
            "decoder": best.step.name,
            "arguments": arguments,
            "parts": [[describe(part) for part in fold.train] for fold in plan.folds],
        }
    )
    if kept.is_file():
        found = read_json(kept)
        if {key: found.get(key) for key in made_of} == made_of:
            return dict(found["metrics"])
    trained = replace(
        plan, folds=tuple(replace(fold, score=_as_scored(fold.train, best)) for fold in plan.folds)
    )
    tables = []
    for part, maps in predicted_parts(best, trained):
        with as_input_error(f"Volume '{part.name}'"):
            segments = decode(best.step.name, maps, part.mask, **arguments)
        tables.append(ScoredVolume(part, segments).table)
    metrics: dict[str, Any] = plain(score(joined(tables)).as_dict())
    with suppress(OSError):
        write_json(kept, {**made_of, "metrics": metrics})
    return metrics


def _as_scored(parts: Sequence[Volume], best: BestTrial) -> tuple[Volume, ...]:
    """Return parts in memory, of one that is read lazily the sections with most truth."""
    return tuple(part_to_score(part, best.candidate.data) for part in parts)


def judge_all(parts: list[ScoredVolume]) -> Judgement:
    """Return what became of every instance of all volumes, by what its correction gains in all."""
    tables = [part.table for part in parts]
    table, (truths, segments) = joined(tables), offsets(tables)
    errors = instance_errors(table)
    instances = []
    for error in errors:
        rows = segments if error.truth_id is None else truths
        part = int(np.searchsorted(rows, error.row, side="right")) - 1
        truth, ids = error.truth_id, error.segment_ids
        if len(parts) > 1:  # an id is then the number of a row, from 1
            own = tables[part]
            ids = tuple(int(own.segment_ids[one - 1 - segments[part]]) for one in ids)
            truth = None if truth is None else int(own.truth_ids[truth - 1 - truths[part]])
        instances.append(Instance(part, replace(error, truth_id=truth, segment_ids=ids)))
    return Judgement(parts, table, instances, errors)
