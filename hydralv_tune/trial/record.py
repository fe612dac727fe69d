"""What a record says of a trial: volumes, speed, device, the plan's checkpoints; what may go on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from hydralv_tune.artifacts.records import PLAN_TARGETS
from hydralv_tune.config.candidate import Candidate
from hydralv_tune.config.errors import InputError
from hydralv_tune.data.formats.location import absolute
from hydralv_tune.data.volumes import Volume, VolumePaths
from hydralv_tune.numerics.networks.weights import parameter_count
from hydralv_tune.trial.fitted_normalisation import as_it_was_trained
from hydralv_tune.trial.training.loop import Trainer

ROLES = ("image", "label", "mask", "scored_mask")
FREE_KEYS = ("experiment_name", "description", "system.cpu_threads", "test.decoding_grid")
"""Keys that a continued trial may change: none of them has a part in the training."""


def volume_facts(
    volumes: Sequence[Volume], fingerprints: Sequence[str], paths: Sequence[VolumePaths]
) -> list[dict[str, Any]]:
    """Return what was trained on and scored.

    Args:
        volumes: Of the trial.
        fingerprints: One for each.
        paths: Where those of them that come from files lie, found by name.
    """
    places = {entry.name: entry for entry in paths}
    facts = []
    for volume, fingerprint in zip(volumes, fingerprints, strict=True):
        where = places.get(volume.name)
        facts.append(
            {
                "name": volume.name,
                **{role: _place_of(where, role) for role in ROLES},
                "ignore_labels": [] if where is None else list(where.ignore_labels),
                "shape": volume.image.shape,
                "dtype": str(volume.image.dtype),
                "voxel_size_nm": volume.voxel_size_nm,
                "fingerprint": fingerprint,
            }
        )
    return facts


def _place_of(where: VolumePaths | None, role: str) -> str | None:
    """Return where a file of a volume lies, from any folder."""
    path = None if where is None else getattr(where, role)
    return None if path is None else absolute(path)


def training_facts(
    trainers: Sequence[Trainer], *, evaluation_s: float, trial_s: float
) -> dict[str, Any]:
    """Return batch, steps, speed, and where the time went.

    Args:
        trainers: One, or one per fold.
        evaluation_s: Seconds spent on evaluations.
        trial_s: Seconds spent on the trial.
    """
    parts: dict[str, float] = {}
    for trainer in trainers:
        for name, seconds in trainer.clock.seconds.items():
            parts[name] = parts.get(name, 0.0) + seconds
    training = sum(parts.values())
    parts["evaluation"] = evaluation_s
    whole = max(sum(parts.values()), 1e-9)
    steps = sum(trainer.step for trainer in trainers)
    patches = sum(trainer.patches for trainer in trainers)
    plan = trainers[0].plan
    return {
        "parameters": parameter_count(trainers[0].network),
        "batch_size": plan.batch_size,
        "accumulate_grad_batches": plan.accumulate,
        "effective_batch": plan.effective_batch,
        "steps": plan.steps,
        "steps_done": max(trainer.step for trainer in trainers),
        "steps_done_by_fold": [trainer.step for trainer in trainers],
        "steps_per_epoch": plan.steps_per_epoch,
        "epochs": plan.epochs,
        "patches": patches,
        "patches_per_epoch": plan.patches_per_epoch,
        "steps_per_s": steps / training if training else None,
        "patches_per_s": patches / training if training else None,
        "seconds": {**parts, "trial": trial_s},
        "share": {name: seconds / whole for name, seconds in parts.items()},
    }


def progress_facts(trainer: Trainer) -> dict[str, Any]:
    """Return where a training is, and the losses since the last call."""
    return {
        "step": trainer.step,
        "epoch": trainer.epoch,
        "lr": float(trainer.optimizer.param_groups[0]["lr"]),
        "losses": trainer.losses(),
        "task_weights": {
            task: float(weight) for task, weight in trainer.loss.task_weights().items()
        },
        "stopped": trainer.stopped,
    }


def over_folds(folds: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return where several folds are, as if they were one.

    Losses and task weights are means over the folds, of one that stopped early its last; the rest
    is that of the fold that came furthest.

    Args:
        folds: As `progress_facts` gives, by the folds' names.
    """
    rows = list(folds.values())

    def mean(key: str) -> dict[str, float]:
        return {name: sum(row[key][name] for row in rows) / len(rows) for name in rows[0][key]}

    stopped = [
        f"{name} {row['stopped']}" if len(rows) > 1 else str(row["stopped"])
        for name, row in folds.items()
        if row["stopped"]
    ]
    return {
        **max(rows, key=lambda row: int(row["step"])),
        "losses": mean("losses"),
        "task_weights": mean("task_weights"),
        "stopped": "; ".join(stopped) or None,
    }


def check_continues(
    out: str,
    kept: Mapping[str, Any],
    kept_volumes: Sequence[Mapping[str, Any]],
    candidate: Candidate,
    fingerprints: Sequence[str],
) -> None:
    """Refuse to go on in the folder of another candidate or of other volumes.

    Args:
        out: Folder of the trial.
        kept: The candidate that the folder is of.
        kept_volumes: Each with its `fingerprint`.
        candidate: The one asked for.
        fingerprints: Of the volumes given, those held out included.

    Raises:
        InputError: They differ.
    """
    # Keys that did not exist yet have the value that the version of then stood for.
    old = Candidate.model_validate(as_it_was_trained(kept)).as_mapping()
    different = _first_difference(old, candidate.as_mapping(), "")
    if different is not None:
        key, old, new = different
        raise InputError(
            f"{out}: holds a trial with {key} = {old!r}, but the candidate has {new!r}. Give "
            "another --out, or the same candidate to continue it."
        )
    old_prints = [volume.get("fingerprint") for volume in kept_volumes]
    # All of them: a prefix would go on with fewer volumes than the record names.
    if old_prints != list(fingerprints):
        raise InputError(
            f"{out}: holds a trial of other volumes (fingerprints {old_prints} there, "
            f"{list(fingerprints)} given). Give another --out."
        )


def _first_difference(old: Any, new: Any, path: str) -> tuple[str, Any, Any] | None:
    """Return key, old and new value of the first difference that matters."""
    if path in FREE_KEYS:
        return None
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in dict.fromkeys([*old, *new]):
            below = f"{path}.{key}" if path else str(key)
            found = _first_difference(old.get(key), new.get(key), below)
            if found is not None:
                return found
        return None
    return None if old == new else (path, old, new)


def plan_findings(
    epoch_losses: Sequence[Sequence[float]],
    epochs: int,
    losses: Mapping[str, float],
    metrics: Mapping[str, Any],
) -> list[str]:
    """Return the plan's checkpoints as sentences.

    The loss is half the plain sum of all losses, as the plan's 0.555 is made; the optimised total
    depends on weights and balancing and cannot be compared.

    Args:
        epoch_losses: That loss in each epoch so far, of each fold.
        epochs: In all.
        losses: Of the last evaluation; empty before the first.
        metrics: Of its best checkpoint; empty before the first.
    """
    lines = []
    fifth = math.ceil(epochs / 5)
    reached = [fold[fifth - 1] for fold in epoch_losses if len(fold) >= fifth]
    if reached:
        loss = sum(reached) / len(reached)
        if loss < 0.3:
            meaning = "under 0.3: on track"
        elif loss > 0.4:
            meaning = "above 0.4: change the architecture"
        else:
            meaning = "between 0.3 and 0.4: neither on track nor lost"
        lines.append(f"loss {loss:.3f} in epoch {fifth} of {epochs}, {meaning}")
    figures = {**metrics, **{f"loss.{name}": value for name, value in losses.items()}}
    for key, label, sign, limit in PLAN_TARGETS:
        value = figures.get(key)
        if value is not None:
            met = value < limit if sign == "<" else value > limit
            state = "met" if met else "not met"
            lines.append(f"{label} {value:.4g}, wanted {sign} {limit:g}: {state}")
    return lines


def device_facts(device: torch.device) -> dict[str, Any]:
    """Return what a trial ran on."""
    facts: dict[str, Any] = {"type": device.type, "threads": torch.get_num_threads()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "name": properties.name,
            "memory_gb": round(properties.total_memory / 1e9, 1),
            "peak_gb": round(torch.cuda.max_memory_allocated(device) / 1e9, 2),
            "cuda": torch.version.cuda,
        }
    return facts
