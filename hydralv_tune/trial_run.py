"""The state of a running trial: its folds, its history, its best checkpoint, its files."""

from __future__ import annotations

import io
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hydralv_tune import records
from hydralv_tune.architectures import network_arguments, parameter_count, receptive_field
from hydralv_tune.config import Candidate
from hydralv_tune.errors import InputError, TrialFailed, TrialInterrupted, as_input_error
from hydralv_tune.evaluation import Outcome, better, evaluate
from hydralv_tune.figures import draw_heatmap
from hydralv_tune.monitoring import Monitor
from hydralv_tune.pictures import draw_contact_sheet, draw_losses
from hydralv_tune.prediction import network_of
from hydralv_tune.records import TrialRecord
from hydralv_tune.sampling import PatchSampler, ResidentVolume
from hydralv_tune.splits import Fold, split_volumes
from hydralv_tune.training import (
    Trainer,
    check_stopping,
    is_out_of_memory,
    load_external_weights,
    seeded,
)
from hydralv_tune.volumes import Volume, write_array

if TYPE_CHECKING:
    from hydralv_tune.trial import TrialSpec

LEAST_SWEEP_S = 2.0
"""An intermediate sweep may take so long whatever its share: tiny trainings would starve."""

TRAINING_FORMAT = "hydralv_tune training"
FREE_KEYS = ("experiment_name", "description")
"""Keys that a continued trial may change."""


@dataclass(frozen=True)
class FoldRun:
    """One fold: its trainer and what it is scored on."""

    name: str
    trainer: Trainer
    score: tuple[Volume, ...]

    @property
    def network(self) -> nn.Module:
        """Return the network to evaluate."""
        return self.trainer.evaluated


@dataclass(frozen=True)
class BestUnit:
    """The best network of a fold, and what it is scored on."""

    name: str
    network: nn.Module
    score: tuple[Volume, ...]


class TrialRun:
    """A trial between its volumes and its record.

    Args:
        spec: What to do.
        volumes: Trained on and scored.
        held_out: Scored only.
        device: Where it runs.

    Raises:
        InputError: The candidate does not fit the volumes.
    """

    def __init__(
        self,
        spec: TrialSpec,
        volumes: list[Volume],
        held_out: list[Volume],
        device: torch.device,
    ) -> None:
        self.spec = spec
        self.candidate: Candidate = spec.candidate
        self.device = device
        self.out = Path(spec.out)
        self.volumes = [*volumes, *held_out]
        self.notes: list[str] = []
        self.history: list[dict[str, Any]] = []
        self.best: dict[str, Any] = {}
        self.spent = {"evaluation": 0.0, "earlier": 0.0}
        self.began = time.perf_counter()
        self.weights: str | None = None
        self._outcome: Outcome | None = None
        self._monitor: Monitor | None = None
        check_stopping(self.candidate)
        self.fingerprints = [volume.fingerprint() for volume in self.volumes]
        model = self.candidate.model
        with as_input_error("model"):
            field = receptive_field(model.architecture, network_arguments(model.model_dump()))
        self.split = split_volumes(
            volumes, self.candidate.data.split, receptive_field=field, held_out=held_out
        )
        self.folds = [self._fold(index, fold) for index, fold in enumerate(self.split.folds)]
        self.plan = self.folds[0].trainer.plan

    def _fold(self, index: int, fold: Fold) -> FoldRun:
        """Return the trainer of a fold, at its start."""
        data, seed = self.candidate.data, self.candidate.system.seed + 1000 * index
        sampler = PatchSampler(
            [ResidentVolume(volume, data, self.device, seed) for volume in fold.train],
            patch_size=data.patch_size,
            foreground_share=data.sampling.foreground_share,
            seed=seed,
        )
        with seeded(seed, self.device):
            network = network_of(self.candidate)
            self.weights = load_external_weights(network, self.candidate.model)
        network = network.to(self.device)
        trainer = Trainer(self.candidate, network, sampler, self.device, seed=seed)
        return FoldRun(fold.name, trainer, fold.score)

    @property
    def seconds(self) -> float:
        """Return the seconds spent on the trial, earlier attempts included."""
        return self.spent["earlier"] + time.perf_counter() - self.began

    @property
    def is_trained(self) -> bool:
        """Return whether every evaluation is done, or every fold stopped early and was scored."""
        if len(self.history) >= len(self.plan.evaluations):
            return True
        stopped = all(fold.trainer.stopped for fold in self.folds)
        return bool(self.history) and stopped and bool(self.history[-1].get("stopped"))

    def resume(self) -> None:
        """Go on from `last.ckpt`, where there is one.

        Raises:
            InputError: It is that of another candidate or of other volumes, or it is damaged.
        """
        path = self.out / "last.ckpt"
        if not records.has_checkpoint(path):
            return
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            state = records.load_checkpoint(path)
        if state.get("format") != TRAINING_FORMAT:
            raise InputError(f"{path}: is no state of a training. Give another --out.")
        check_continues(
            str(self.out), state["candidate"], state["volumes"], self.candidate, self.fingerprints
        )
        for fold, kept in zip(self.folds, state["folds"], strict=True):
            fold.trainer.load_state_dict(kept)
        self.history = list(state["history"])
        self.best = dict(state["best"])
        self.notes = list(state["notes"])
        self.spent = {"evaluation": float(state["evaluation_s"]), "earlier": float(state["s"])}
        self.notes += [str(warning.message) for warning in caught]
        self.notes.append(f"continued from step {self.folds[0].trainer.step}")

    def train(
        self, should_stop: Callable[[], bool], progress: Callable[[int, int], None] | None
    ) -> None:
        """Train every fold up to the next evaluation.

        Raises:
            TrialInterrupted: As `should_stop` says; the state is saved.
            TrialFailed: A loss is not finite, or memory runs out.
        """
        target = self.plan.evaluations[len(self.history)]
        whole = self.plan.steps * len(self.folds)

        def show(_: int) -> None:
            if progress is not None:
                progress(sum(fold.trainer.step for fold in self.folds), whole)

        try:
            for fold in self.folds:
                fold.trainer.run_to(target, should_stop=should_stop, progress=show)
        except TrialInterrupted:
            self._save()
            raise

    def evaluate(self) -> dict[str, Any]:
        """Evaluate the networks as they are; keep the best; save; return the row of history."""
        start = time.perf_counter()
        trained = sum(fold.trainer.seconds for fold in self.folds)
        share = self.candidate.monitor.evaluation.sweep_time_share
        outcome = evaluate(
            self.folds,
            self.candidate,
            self.spec.grid,
            self.spec.objective,
            device=self.device,
            threads=self._sweep_threads,
            time_limit_s=max(share * trained, LEAST_SWEEP_S),
        )
        number = len(self.history) + 1
        guard = self.spec.objective.guard.f1_below_best
        won = better(outcome, self.best.get("value"), float(self.best.get("f1", 0.0)), guard)
        if won:
            self._outcome = outcome
            self.best = {
                "value": outcome.value, "f1": outcome.f1, "evaluation": number,
                "thinned": outcome.sweep.thinned,
            }  # fmt: skip
            self._save_best(outcome)
        self.history.append(self._row(number, outcome, won))
        self.spent["evaluation"] += time.perf_counter() - start
        self._save()
        self._record("running").write()
        self._show(number, outcome)
        return self.history[-1]

    def finish(self) -> TrialRecord:
        """Score the best checkpoint with every threshold, draw it, and return the record."""
        start = time.perf_counter()
        outcome = self._outcome
        if outcome is None or outcome.sweep.thinned is not None:
            outcome = evaluate(
                self._best_units(),
                self.candidate,
                self.spec.grid,
                self.spec.objective,
                device=self.device,
                threads=self._sweep_threads,
            )
            self._save_best(outcome, weights=False)
        self.spent["evaluation"] += time.perf_counter() - start
        self._draw(outcome)
        record = self._record("complete", outcome)
        record.write()
        return record

    def record_end(self, error: BaseException) -> None:
        """Write why the trial ended, where the folder lets one."""
        if isinstance(error, TrialInterrupted | KeyboardInterrupt):
            state = "interrupted"
        else:
            state = "fail" if isinstance(error, TrialFailed | InputError) else "stopped"
        # A full disk is why it failed; it must not hide that.
        with suppress(OSError):
            if self.out.is_dir():
                replace(self._record(state), error=str(error) or type(error).__name__).write()

    def close(self) -> None:
        """Write what TensorBoard has pending."""
        if self._monitor is not None:
            self._monitor.close()

    @property
    def _sweep_threads(self) -> int | None:
        """Return the threads of the sweep."""
        return self.spec.threads or self.candidate.system.cpu_threads

    def _row(self, number: int, outcome: Outcome, won: bool) -> dict[str, Any]:
        """Return one row of the history."""
        trainers = [fold.trainer for fold in self.folds]
        losses = [trainer.losses() for trainer in trainers]
        stopped = [trainer.stopped for trainer in trainers]
        return {
            "evaluation": number,
            "step": trainers[0].step,
            "epoch": trainers[0].epoch,
            "lr": float(trainers[0].optimizer.param_groups[0]["lr"]),
            "losses": {
                key: sum(one[key] for one in losses) / len(losses) for key in losses[0]
            },
            "task_weights": {
                task: float(weight) for task, weight in trainers[0].loss.task_weights().items()
            },
            "value": outcome.value,
            "best_value": self.best["value"],
            "is_best": won,
            "metrics": _without_lists(outcome.metrics),
            "decoding": outcome.decoding,
            "folds": [
                {**fold, "metrics": _without_lists(fold["metrics"])} for fold in outcome.folds
            ] if len(outcome.folds) > 1 else [],
            "thinned": outcome.sweep.thinned,
            "evaluation_s": outcome.seconds,
            "seconds": self.seconds,
            "checkpoint": str(self.out / "best.ckpt"),
            "stopped": "; ".join(reason for reason in stopped if reason) or None,
        }  # fmt: skip

    def _save(self) -> None:
        """Write `last.ckpt`."""
        records.save_checkpoint(
            self.out / "last.ckpt",
            {
                "format": TRAINING_FORMAT,
                "version": records.FORMAT_VERSION,
                "candidate": self.candidate.as_mapping(),
                "volumes": [{"fingerprint": value} for value in self.fingerprints],
                "folds": [fold.trainer.state_dict() for fold in self.folds],
                "history": records.plain(self.history),
                "best": self.best,
                "notes": self.notes,
                "evaluation_s": self.spent["evaluation"],
                "s": self.seconds,
            },
        )

    def _best_path(self, index: int) -> Path:
        """Return where the best checkpoint of a fold lies."""
        if len(self.folds) == 1:
            return self.out / "best.ckpt"
        return self.out / self.folds[index].name / "best.ckpt"

    def _save_best(self, outcome: Outcome, *, weights: bool = True) -> None:
        """Write the best checkpoint of each fold, in the form that is exported."""
        for index, fold in enumerate(self.folds):
            path = self._best_path(index)
            if weights:
                kept = fold.network.state_dict()
            else:
                kept = records.load_checkpoint(path)["weights"]
            content = {
                "format": records.FORMAT,
                "version": records.FORMAT_VERSION,
                "candidate": self.candidate.as_mapping(),
                "weights": {key: value.detach().cpu() for key, value in kept.items()},
                "decoding": records.plain(outcome.decoding),
                "metrics": records.plain(outcome.folds[index]["metrics"]),
            }
            records.save_checkpoint(path, content)
            best_fold = min(range(len(outcome.folds)), key=lambda i: outcome.folds[i]["value"])
            if len(self.folds) > 1 and index == best_fold:
                records.save_checkpoint(self.out / "best.ckpt", content)

    def _best_units(self) -> list[BestUnit]:
        """Return the best network of each fold, read from its checkpoint."""
        units = []
        for index, fold in enumerate(self.folds):
            network = network_of(self.candidate)
            network.load_state_dict(records.load_checkpoint(self._best_path(index))["weights"])
            units.append(BestUnit(fold.name, network.to(self.device).eval(), fold.score))
        return units

    def _show(self, number: int, outcome: Outcome) -> None:
        """Write the evaluation to TensorBoard."""
        if self._monitor is None:
            self._monitor = Monitor(self.out / "tensorboard", step=number - 1)
        row = self.history[-1]
        self._monitor.scalars(
            number,
            {
                "loss": row["losses"],
                "score": row["metrics"],
                "weight": row["task_weights"],
                "trial": {"value": row["value"], "best_value": row["best_value"], "lr": row["lr"]},
            },
        )
        self._monitor.slices(
            number, self.folds[0].score[0], outcome.probabilities[0], outcome.segmentations[0]
        )

    def _draw(self, outcome: Outcome) -> None:
        """Write table and pictures of the best checkpoint."""
        buffer = io.BytesIO()
        outcome.sweep.table.to_parquet(buffer, index=False)
        records.write_atomically(self.out / "sweep.parquet", buffer.getvalue())
        draw_heatmap(outcome.sweep, self.out / "sweep.png")
        draw_losses(self.history, self.out / "losses.png")
        # In the order of the folds and their parts, for the report's instance by instance.
        for index, segmentation in enumerate(outcome.segmentations):
            write_array(self.out / f"segmentation_{index}.h5", segmentation)
        volume = self.folds[0].score[0]
        assert volume.label is not None, "checked by the split"
        draw_contact_sheet(
            image=volume.image,
            truth=volume.label,
            prediction=outcome.segmentations[0],
            mask=volume.mask,
            path=self.out / "contact_sheet.png",
            title=f"{volume.name}: adapted Rand error "
            f"{outcome.metrics['adapted_rand_error']:.3f}, F1 {outcome.f1:.3f}",
        )

    def _record(self, state: str, outcome: Outcome | None = None) -> TrialRecord:
        """Return the record as things stand."""
        last = self.history[-1] if self.history else {}
        best = next((row for row in self.history if row["evaluation"] ==
                     self.best.get("evaluation")), {})  # fmt: skip
        metrics = best.get("metrics", {}) if outcome is None else outcome.metrics
        losses = last.get("losses", {})
        thinned = [f"evaluation {row['evaluation']}: {row['thinned']}"
                   for row in self.history if row.get("thinned")]  # fmt: skip
        stopped = [last["stopped"]] if last.get("stopped") else []
        return TrialRecord(
            state=state,
            number=self.spec.number,
            root=self.spec.root,
            study=self.spec.study,
            out=self.spec.out,
            config=self.candidate.as_mapping(),
            objective=self.spec.objective.model_dump(mode="json"),
            provenance=records.provenance(),
            seed=self.candidate.system.seed,
            device=device_facts(self.device),
            split=self.split.as_mapping(),
            volumes=self._volume_facts(),
            training=self._training_facts(),
            history=self.history,
            sweep=None if outcome is None else outcome.sweep.as_mapping(),
            metrics=metrics,
            losses=losses,
            value=self.best.get("value") if outcome is None else outcome.value,
            decoding=best.get("decoding") if outcome is None else outcome.decoding,
            checkpoint=str(self.out / "best.ckpt") if self.best else None,
            folds=[] if outcome is None or len(outcome.folds) == 1 else list(outcome.folds),
            verdicts=verdicts(self.history, metrics, self.plan.steps),
            weights=self.weights,
            notes=[*self.notes, *(n for f in self.folds for n in f.trainer.notes), *stopped,
                   *thinned],
        )  # fmt: skip

    def _volume_facts(self) -> list[dict[str, Any]]:
        """Return what was trained on and scored."""
        paths = {entry.name: entry for entry in self.spec.volumes}
        facts = []
        for volume, fingerprint in zip(self.volumes, self.fingerprints, strict=True):
            where = paths.get(volume.name)
            facts.append(
                {
                    "name": volume.name,
                    "image": None if where is None else where.image,
                    "label": None if where is None else where.label,
                    "mask": None if where is None else where.mask,
                    "shape": volume.image.shape,
                    "dtype": str(volume.image.dtype),
                    "voxel_size_nm": volume.voxel_size_nm,
                    "fingerprint": fingerprint,
                }
            )
        return facts

    def _training_facts(self) -> dict[str, Any]:
        """Return batch, steps, speed, and where the time went."""
        trainers = [fold.trainer for fold in self.folds]
        parts: dict[str, float] = {}
        for trainer in trainers:
            for name, seconds in trainer.clock.seconds.items():
                parts[name] = parts.get(name, 0.0) + seconds
        training = sum(parts.values())
        parts["evaluation"] = self.spent["evaluation"]
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
            "steps_done": trainers[0].step,
            "steps_per_epoch": plan.steps_per_epoch,
            "epochs": plan.epochs,
            "patches": patches,
            "patches_per_epoch": plan.patches_per_epoch,
            "steps_per_s": steps / training if training else None,
            "patches_per_s": patches / training if training else None,
            "seconds": {**parts, "trial": self.seconds},
            "share": {name: seconds / whole for name, seconds in parts.items()},
        }


def check_continues(
    out: str,
    kept: Mapping[str, Any],
    kept_volumes: Sequence[Mapping[str, Any]],
    candidate: Candidate,
    fingerprints: Sequence[str] | None,
) -> None:
    """Refuse to go on in the folder of another candidate or of other volumes.

    Args:
        out: Folder of the trial.
        kept: The candidate that the folder is of.
        kept_volumes: Each with its `fingerprint`.
        candidate: The one asked for.
        fingerprints: Of the volumes given; None where they were not read.

    Raises:
        InputError: They differ.
    """
    different = _first_difference(kept, candidate.as_mapping(), "")
    if different is not None:
        key, old, new = different
        raise InputError(
            f"{out}: holds a trial with {key} = {old!r}, but the candidate has {new!r}. Give "
            "another --out, or the same candidate to continue it."
        )
    if fingerprints is not None:
        old_prints = [volume.get("fingerprint") for volume in kept_volumes]
        if old_prints[: len(fingerprints)] != list(fingerprints):
            raise InputError(
                f"{out}: holds a trial of other volumes (fingerprints {old_prints} there, "
                f"{list(fingerprints)} given). Give another --out."
            )


def _first_difference(old: Any, new: Any, path: str) -> tuple[str, Any, Any] | None:
    """Return key, old and new value of the first difference that matters."""
    if path in FREE_KEYS or path == "system.cpu_threads":
        return None
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in dict.fromkeys([*old, *new]):
            below = f"{path}.{key}" if path else str(key)
            found = _first_difference(old.get(key), new.get(key), below)
            if found is not None:
                return found
        return None
    return None if old == new else (path, old, new)


def verdicts(
    history: Sequence[Mapping[str, Any]], metrics: Mapping[str, Any], steps: int
) -> list[str]:
    """Return the plan's checkpoints as sentences.

    The loss is half the plain sum of all losses, as the plan's 0.555 is made; the optimised total
    depends on weights and balancing and cannot be compared.

    Args:
        history: Of the trial.
        metrics: Of its best checkpoint.
        steps: Optimizer steps in all.
    """
    lines = []
    fifth = next((row for row in history if row["step"] >= 0.2 * steps), None)
    if fifth is not None:
        loss = float(fifth["losses"]["plan_total"])
        if loss < 0.3:
            said = "under 0.3: on track"
        elif loss > 0.4:
            said = "above 0.4: change the architecture"
        else:
            said = "between 0.3 and 0.4: neither on track nor lost"
        lines.append(f"loss {loss:.3f} after {fifth['step'] / steps:.0%} of the run, {said}")
    wanted = []
    if history:
        losses = history[-1]["losses"]
        limits = {"plan_total": 0.2, "label": 0.1, "boundary": 0.1, "edt": 0.01}
        wanted += [(n, losses[n], "<", limit) for n, limit in limits.items() if n in losses]
    if metrics:
        wanted += [
            ("adapted Rand error", metrics["adapted_rand_error"], "<", 0.05),
            ("precision", metrics["adapted_rand_precision"], ">", 0.95),
            ("recall", metrics["adapted_rand_recall"], ">", 0.95),
        ]
    for name, value, sign, limit in wanted:
        met = value < limit if sign == "<" else value > limit
        lines.append(f"{name} {value:.4g}, wanted {sign} {limit:g}: {'met' if met else 'not met'}")
    return lines


def _without_lists(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return the figures without the lists of ids, which only the last segmentation needs."""
    return {key: value for key, value in metrics.items() if not isinstance(value, list | tuple)}


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


__all__ = ["BestUnit", "FoldRun", "TrialRun", "check_continues", "is_out_of_memory", "verdicts"]
