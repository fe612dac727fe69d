"""The state of a running trial: its folds, its history, its best checkpoint, its files."""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hydralv_tune.artifacts import records
from hydralv_tune.artifacts.records import TrialRecord
from hydralv_tune.artifacts.tensorboard import EventWriter
from hydralv_tune.config.candidate import Candidate
from hydralv_tune.config.errors import InputError, TrialFailed, TrialInterrupted, as_input_error
from hydralv_tune.data.volumes import Volume
from hydralv_tune.numerics.randomness import seeded
from hydralv_tune.trial.fitted_normalisation import as_it_was_trained
from hydralv_tune.trial.pictures import draw_trial
from hydralv_tune.trial.record import (
    check_continues,
    device_facts,
    over_folds,
    plan_findings,
    progress_facts,
    training_facts,
    volume_facts,
)
from hydralv_tune.trial.scoring.evaluation import Outcome, Unit, better, evaluate
from hydralv_tune.trial.scoring.prediction import LowMemoryWarning, network_of
from hydralv_tune.trial.section_targets import section_targets
from hydralv_tune.trial.spec import TrialSpec
from hydralv_tune.trial.splits import Fold, SplitPlan, needed_margin, split_volumes
from hydralv_tune.trial.training.lazy_reader import (
    LazySource,
    as_lazy,
    is_lazy,
    is_too_large,
    part_to_score,
)
from hydralv_tune.trial.training.loop import (
    LOG_STEPS,
    Trainer,
    check_stopping,
    load_external_weights,
)
from hydralv_tune.trial.training.sampling import PatchSampler, ResidentVolume, Source

LIVE_EVERY_S = 3.0
"""Seconds between two lines of progress; a driver that is far away needs no more."""

DRAWING_SHARE = 0.05
"""The share of the training time that drawing may take while a trial trains."""

FIRST_DRAWING_S = 1.0
"""What drawing is taken to need before it has been measured."""

LEAST_SWEEP_S = 2.0
"""An intermediate sweep may take so long whatever its share: tiny trainings would starve."""

BATCHES_AHEAD = 3
"""Batches read ahead from a volume on disk."""

TRAINING_FORMAT = "hydralv_tune training"
TRAINING_VERSION = 2
"""Of the state of a training; one of another version lacks what this one goes on from."""


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


def planned_split(
    candidate: Candidate, volumes: Sequence[Volume], held_out: Sequence[Volume]
) -> SplitPlan:
    """Return what a candidate trains on and is scored on.

    Args:
        candidate: With its network, whose receptive field is the margin between the two.
        volumes: Trained on and scored.
        held_out: Scored only.

    Raises:
        InputError: The volumes cannot be split so.
    """
    with as_input_error("model"):
        field = needed_margin(candidate)
    return split_volumes(volumes, candidate.data, receptive_field=field, held_out=held_out)


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
        limit = spec.candidate.data.memory_limit_gb
        volumes, held_out = (
            [as_lazy(volume) if is_too_large(volume, limit) else volume for volume in group]
            for group in (volumes, held_out)
        )
        self.spec = spec
        self.candidate: Candidate = _as_begun(spec.candidate, Path(spec.out))
        self.device = device
        self.out = Path(spec.out)
        self.volumes = [*volumes, *held_out]
        self.notes = [f"{v.name}: {v.note}" for v in self.volumes if v.note is not None]
        self.history: list[dict[str, Any]] = []
        self.best: dict[str, Any] = {}
        self.spent = {"evaluation": 0.0, "earlier": 0.0}
        self.began = time.perf_counter()
        self.weights: str | None = None
        self._ranking = spec.ranking
        self._outcome: Outcome | None = None
        self._drawing_s = FIRST_DRAWING_S
        self._shown_at = -math.inf
        self._monitor: EventWriter | None = None
        self._begins_at: int | None = None
        check_stopping(self.candidate)
        self.fingerprints = [volume.fingerprint() for volume in self.volumes]
        self.split = planned_split(self.candidate, volumes, held_out)
        self._sources: dict[int, Source] = {}
        self.folds = [self._fold(index, fold) for index, fold in enumerate(self.split.folds)]
        self.plan = self.folds[0].trainer.plan

    def _fold(self, index: int, fold: Fold) -> FoldRun:
        """Return the trainer of a fold, at its start."""
        data, seed = self.candidate.data, self.candidate.system.seed + 1000 * index
        lazy = any(is_lazy(volume) for volume in fold.train)
        sampler = PatchSampler(
            [self._source(volume) for volume in fold.train],
            patch_size=data.patch_size,
            foreground_share=data.sampling.foreground_share,
            seed=seed,
            ahead=BATCHES_AHEAD if lazy else 0,
        )
        with seeded(seed, self.device):
            network = network_of(self.candidate)
            # A state to go on from holds what became of them; their file may be gone by then.
            if not records.has_checkpoint(self.out / "last.ckpt"):
                self.weights = load_external_weights(network, self.candidate.model)
        # Channels last: 1.0 to 2.3 times faster on a CPU (measured on four small networks).
        network.to(self.device).to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
        trainer = Trainer(self.candidate, network, sampler, self.device, seed=seed)
        score = tuple(self._scorable(volume) for volume in fold.score)
        return FoldRun(fold.name, trainer, score)

    def _source(self, volume: Volume) -> Source:
        """Return where patches of a volume come from: one upload for all folds that train on it."""
        key = id(volume)
        if key not in self._sources:
            kind = LazySource if is_lazy(volume) else ResidentVolume
            data, seed = self.candidate.data, self.candidate.system.seed
            self._sources[key] = kind(volume, data, self.device, seed)
        return self._sources[key]

    def _scorable(self, volume: Volume) -> Volume:
        """Return the volume, or those of its sections that can be scored in memory."""
        part = part_to_score(volume, self.candidate.data)
        if part.name != volume.name:
            self.notes.append(
                f"Volume '{volume.name}' is over data.memory_limit_gb: it is read lazily, and "
                f"scored on {part.name}, the sections with most truth that fit"
            )
        return part

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
            raise InputError(f"{path}: holds no state of a training. Give another --out.")
        if state.get("version") != TRAINING_VERSION:
            raise InputError(
                f"{path}: is the state of a training in format {state.get('version')}, but this "
                f"version of the tool goes on from {TRAINING_VERSION}. Give another --out."
            )
        check_continues(
            str(self.out), state["candidate"], state["volumes"], self.candidate, self.fingerprints
        )
        for fold, kept in zip(self.folds, state["folds"], strict=True):
            fold.trainer.load_state_dict(kept)
        self.history = list(state["history"])
        self.best = dict(state["best"])
        self.notes, self.weights = list(state["notes"]), state["weights"]
        self._ranking = state["ranking"]
        self.spent = {"evaluation": float(state["evaluation_s"]), "earlier": float(state["s"])}
        self.notes += [str(warning.message) for warning in caught]
        steps = dict.fromkeys(fold.trainer.step for fold in self.folds)
        self.notes.append(f"continued from step {', '.join(map(str, steps))}")

    def score_anew(self) -> None:
        """Score the best checkpoint again if objective, grid or guard have changed since."""
        changed = [key for key, kept in self._ranking.items() if kept != self.spec.ranking[key]]
        self._ranking = self.spec.ranking
        if not changed or not self.best:
            return
        start = time.perf_counter()
        outcome = self._score(self._best_units(), limited=not self.is_trained)
        before, at, count = self.best["value"], self.best["evaluation"], len(self.history)
        self._outcome = outcome
        anew = {"metrics": _without_lists(outcome.metrics), "decoding": outcome.decoding}
        self.best = {**_best_of(outcome, at), "anew": anew}
        # What the study has learnt of the rows before stays; from the last one on, this counts.
        self.history[-1] |= self._best_so_far()
        self.notes.append(
            f"up to evaluation {count} the checkpoints were ranked by another "
            f"{' and '.join(changed)}; the best one, of evaluation {at}, was scored again: "
            f"{outcome.value:.4f} instead of {before:.4f}"
        )
        self._save_best(outcome, weights=False)
        self._draw(outcome)
        self.spent["evaluation"] += time.perf_counter() - start
        self._save()
        self._record("running").write()

    def train(
        self,
        should_stop: Callable[[], bool],
        progress: Callable[[int, int], None] | None,
        live: Callable[[Mapping[str, Any]], None] | None = None,
    ) -> None:
        """Train every fold up to the next evaluation.

        Raises:
            TrialInterrupted: As `should_stop` says; the state is saved.
            TrialFailed: A loss is not finite, or memory runs out.
        """
        target = self.plan.evaluations[len(self.history)]
        whole = self.plan.steps * len(self.folds)
        if self._begins_at is None:
            self._begins_at = self._step

        def show(step: int) -> None:
            if step % LOG_STEPS == 0:
                self._show_losses()
            done = sum(fold.trainer.step for fold in self.folds)
            if progress is not None:
                progress(done, whole)
            if live is not None and time.monotonic() - self._shown_at > LIVE_EVERY_S:
                self._shown_at = time.monotonic()
                logs = [fold.trainer.log for fold in self.folds if fold.trainer.log.count]
                loss = logs[-1].total_so_far() if logs else None
                live({"done": done, "total": whole, "loss": loss})

        try:
            for fold in self.folds:
                fold.trainer.run_to(target, should_stop=should_stop, progress=show)
        except TrialInterrupted:
            self._save()
            raise

    def evaluate(self) -> dict[str, Any]:
        """Evaluate the networks as they are; keep the best; save; return the row of history."""
        start = time.perf_counter()
        outcome = self._score(self.folds, limited=True)
        number = len(self.history) + 1
        guard = self.spec.objective.guard.f1_below_best
        seen = max((float(row["metrics"]["f1_iou50"]) for row in self.history), default=0.0)
        won = better(outcome, self.best.get("value"), float(self.best.get("f1", 0.0)), guard, seen)
        if won:
            self._outcome = outcome
            self.best = _best_of(outcome, number)
            self._save_best(outcome)
        self.history.append(self._row(number, outcome, won))
        if won and self._drawing_s <= DRAWING_SHARE * self._trained_s:
            self._draw(outcome)  # here too, since a trial that is pruned never comes to `finish`
        self.spent["evaluation"] += time.perf_counter() - start
        self._save()
        self._record("running").write()
        self._show(outcome)
        return self.history[-1]

    def end_early(self, reason: str) -> None:
        """Train no further: the best evaluation so far stands, and the record says why."""
        self.notes.append(f"ended after {self._step} of {self.plan.steps} steps: {reason}")

    def finish(self) -> TrialRecord:
        """Score the best checkpoint with every threshold, draw it, and return the record."""
        start = time.perf_counter()
        outcome = self._outcome
        if outcome is None or outcome.sweep.thinned is not None:
            outcome = self._score(self._best_units(), limited=False)
            self._save_best(outcome, weights=False)
        self.spent["evaluation"] += time.perf_counter() - start
        self._draw(outcome)
        record = self._record("complete", outcome)
        record.write()
        figures = ("adapted_rand_error", "adapted_rand_error_foreground", "f1_iou50")
        self._shown_on().compare(
            record.config, {name: float(outcome.metrics[name]) for name in figures}
        )
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
        """Write what TensorBoard has pending, and end the readers."""
        for fold in self.folds:
            fold.trainer.sampler.close()
        if self._monitor is not None:
            self._monitor.close()

    @property
    def _trained_s(self) -> float:
        """Return the seconds of training alone."""
        return sum(fold.trainer.seconds for fold in self.folds)

    def _score(self, units: Sequence[Unit], *, limited: bool) -> Outcome:
        """Return what networks are worth; `limited` thins a sweep that would take too long."""
        share = self.candidate.monitor.evaluation.sweep_time_share
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", LowMemoryWarning)
            outcome = evaluate(
                units,
                self.candidate,
                self.spec.grid,
                self.spec.objective,
                device=self.device,
                threads=self.spec.threads or self.candidate.system.cpu_threads,
                time_limit_s=max(share * self._trained_s, LEAST_SWEEP_S) if limited else None,
            )
        for warning in caught:
            if not issubclass(warning.category, LowMemoryWarning):
                warnings.warn(warning.message, stacklevel=2)
            elif str(warning.message) not in self.notes:
                self.notes.append(str(warning.message))
        return outcome

    def _best_so_far(self) -> dict[str, Any]:
        """Return what a row of the history says of the best checkpoint."""
        folds = self.best["folds"] if len(self.folds) > 1 else None
        return {
            "best_value": self.best["value"],
            "best_f1_iou50": self.best["f1"],
            "best_folds": folds,
        }

    def _row(self, number: int, outcome: Outcome, won: bool) -> dict[str, Any]:
        """Return one row of the history."""
        trained = {fold.name: progress_facts(fold.trainer) for fold in self.folds}
        return {
            "evaluation": number,
            **over_folds(trained),
            "value": outcome.value,
            **self._best_so_far(),
            "is_best": won,
            "metrics": _without_lists(outcome.metrics),
            "decoding": outcome.decoding,
            "folds": [
                {**fold, **trained[fold["name"]], "metrics": _without_lists(fold["metrics"])}
                for fold in outcome.folds
            ] if len(outcome.folds) > 1 else [],
            "thinned": outcome.sweep.thinned,
            "evaluation_s": outcome.seconds,
            "seconds": self.seconds,
            "gpu_memory_gb": (
                torch.cuda.max_memory_allocated(self.device) / 1e9
                if self.device.type == "cuda" else None
            ),
            "checkpoint": str(self.out / "best.ckpt"),
        }  # fmt: skip

    def _save(self) -> None:
        """Write `last.ckpt`."""
        records.save_checkpoint(
            self.out / "last.ckpt",
            {
                "format": TRAINING_FORMAT,
                "version": TRAINING_VERSION,
                "candidate": self.candidate.as_mapping(),
                "volumes": [{"fingerprint": value} for value in self.fingerprints],
                "folds": [fold.trainer.state_dict() for fold in self.folds],
                "history": records.plain(self.history),
                "best": self.best,
                "notes": self.notes,
                "ranking": self._ranking,
                "weights": self.weights,
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

    @property
    def _step(self) -> int:
        """Return the optimizer steps that the foremost fold has done: the x axis of TensorBoard."""
        return max(fold.trainer.step for fold in self.folds)

    def _shown_on(self) -> EventWriter:
        """Return what writes to TensorBoard."""
        if self._monitor is None:
            begins_at = self._step if self._begins_at is None else self._begins_at
            self._monitor = EventWriter(self.out / "tensorboard", step=begins_at)
        return self._monitor

    def _show_losses(self) -> None:
        """Write the losses of the last steps of each fold to TensorBoard."""
        for fold in self.folds:
            losses = fold.trainer.recent_losses()
            name = f"loss every {LOG_STEPS} steps"
            name += f" {fold.name}" if len(self.folds) > 1 else ""
            if losses:
                self._shown_on().scalars(fold.trainer.step, {name: losses})

    def _show(self, outcome: Outcome) -> None:
        """Write the evaluation to TensorBoard."""
        row, monitor = self.history[-1], self._shown_on()
        monitor.scalars(
            self._step,
            {
                "loss": row["losses"],
                "score": row["metrics"],
                "weight": row["task_weights"],
                "trial": {"value": row["value"], "best_value": row["best_value"], "lr": row["lr"]},
            },
        )
        volume = self.folds[0].score[0]
        monitor.slices(
            self._step, volume, outcome.probabilities[0], outcome.segmentations[0],
            partial(section_targets, self.candidate.data, volume),
        )  # fmt: skip

    def _draw(self, outcome: Outcome) -> None:
        """Write table and pictures of the best checkpoint."""
        start = time.perf_counter()
        draw_trial(outcome, self.history, self.folds[0].score[0], self.out)
        self._drawing_s = time.perf_counter() - start

    def _record(self, state: str, outcome: Outcome | None = None) -> TrialRecord:
        """Return the record as things stand."""
        last = self.history[-1] if self.history else {}
        best = self.best.get("anew") or next(
            (row for row in self.history if row["evaluation"] == self.best.get("evaluation")), {}
        )
        metrics = best.get("metrics", {}) if outcome is None else outcome.metrics
        losses = last.get("losses", {})
        thinned = [f"evaluation {row['evaluation']}: {row['thinned']}"
                   for row in self.history if row.get("thinned")]  # fmt: skip
        stopped = [last["stopped"]] if last.get("stopped") else []
        if self._monitor is not None and self._monitor.problem is not None:
            stopped.append(self._monitor.problem)
        return TrialRecord(
            state=state,
            number=self.spec.number,
            root=self.spec.root,
            study=self.spec.study,
            out=self.spec.out,
            config=self.candidate.as_mapping(),
            **self.spec.ranking,
            provenance=records.provenance(),
            seed=self.candidate.system.seed,
            device=device_facts(self.device),
            split=self.split.as_mapping(),
            volumes=volume_facts(self.volumes, self.fingerprints, self.spec.volumes),
            training=training_facts(
                [fold.trainer for fold in self.folds],
                evaluation_s=self.spent["evaluation"],
                trial_s=self.seconds,
            ),
            history=self.history,
            sweep=None if outcome is None else outcome.sweep.as_mapping(),
            metrics=metrics,
            losses=losses,
            value=self.best.get("value") if outcome is None else outcome.value,
            noise=None if outcome is None else outcome.noise(self.spec.objective),
            decoding=best.get("decoding") if outcome is None else outcome.decoding,
            checkpoint=str(self.out / "best.ckpt") if self.best else None,
            folds=[] if outcome is None or len(outcome.folds) == 1 else list(outcome.folds),
            verdicts=plan_findings([f.trainer.epoch_losses for f in self.folds], self.plan.epochs,
                              losses, metrics),
            weights=self.weights,
            notes=[*self.notes, *(n for f in self.folds for n in f.trainer.notes), *stopped,
                   *thinned],
        )  # fmt: skip


def _as_begun(candidate: Candidate, out: Path) -> Candidate:
    """Return the candidate, normalised as a version without `fill` did if that began the trial.

    Args:
        candidate: What is asked for.
        out: Folder of the trial.
    """
    try:
        config = json.loads((out / "record.json").read_text(encoding="utf-8"))["config"]
        begun = as_it_was_trained(config)["data"]["image_transform"]["fill"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return candidate  # nothing was begun there, or `resume` will say what is wrong with it
    if begun == candidate.data.image_transform.fill or "fill" in config["data"]["image_transform"]:
        return candidate
    transform = candidate.data.image_transform.model_copy(update={"fill": begun})
    data = candidate.data.model_copy(update={"image_transform": transform})
    return candidate.model_copy(update={"data": data})


def _best_of(outcome: Outcome, evaluation: int) -> dict[str, Any]:
    """Return what is kept of the best evaluation so far."""
    return {
        "value": outcome.value,
        "f1": outcome.f1,
        "folds": [fold["value"] for fold in outcome.folds],
        "evaluation": evaluation,
        "thinned": outcome.sweep.thinned,
    }


def _without_lists(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return the figures without the lists of ids, which only the last segmentation needs."""
    return {key: value for key, value in metrics.items() if not isinstance(value, list | tuple)}
