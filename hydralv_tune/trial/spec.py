"""What a trial is given, and what it reports while it trains."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from hydralv_tune.artifacts import records
from hydralv_tune.config.candidate import Candidate, DecodingGrid
from hydralv_tune.config.files import candidate_from_mapping
from hydralv_tune.config.search_space import Objective
from hydralv_tune.data.volumes import VolumePaths


@dataclass(frozen=True)
class TrialSpec:
    """Everything that a trial needs, in values that survive the way to another process.

    Args:
        number: Of the trial in its study.
        root: Of the trial whose folder and checkpoint it goes on with; its own for the first.
        candidate: What is trained.
        objective: What is minimised.
        grid: Combinations of thresholds that each evaluation sweeps.
        volumes: What is trained on and scored.
        out: Folder of the trial.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        threads: CPU threads; None: `system.cpu_threads`, or all.
        study: Name, where there is one.
        timeout_s: Wall clock after which it trains no further, and fails where nothing was
            evaluated yet; None: never.
    """

    number: int
    root: int
    candidate: Candidate
    objective: Objective
    grid: DecodingGrid
    volumes: list[VolumePaths]
    out: str
    device: str = "auto"
    threads: int | None = None
    study: str | None = None
    timeout_s: float | None = None

    @property
    def ranking(self) -> dict[str, Any]:
        """Return what makes a value of a checkpoint, as plain JSON types: objective and grid."""
        return {
            "objective": self.objective.model_dump(mode="json"),
            "grid": self.grid.model_dump(mode="json"),
        }

    def as_mapping(self) -> dict[str, Any]:
        """Return the spec as plain JSON types."""
        return {
            "number": self.number,
            "root": self.root,
            "candidate": self.candidate.as_mapping(),
            **self.ranking,
            "volumes": [asdict(paths) for paths in self.volumes],
            "out": self.out,
            "device": self.device,
            "threads": self.threads,
            "study": self.study,
            "timeout_s": self.timeout_s,
        }

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any]) -> TrialSpec:
        """Return the spec that `as_mapping` gave.

        Raises:
            InputError: A value breaks a rule.
        """
        place = f"trial {mapping['number']}"
        return cls(
            **{
                **mapping,
                "candidate": candidate_from_mapping(mapping["candidate"], place=place, base={}),
                "objective": Objective.model_validate(mapping["objective"]),
                "grid": DecodingGrid.model_validate(mapping["grid"]),
                "volumes": [VolumePaths(**paths) for paths in mapping["volumes"]],
            }
        )


@dataclass(frozen=True)
class Evaluation:
    """What a trial reports while it trains.

    Args:
        step: Of the evaluation, from 1.
        epoch: Epochs complete.
        value: Of the best checkpoint so far, minimised; 1 - F1 where F1 is the objective.
        best_f1_iou50: F1 at IoU 0.5 of that checkpoint, which the study's guard looks at; None
            in a training that began before this was recorded.
        metrics: Every figure of this evaluation.
        losses: Means since the evaluation before; of a fold that stopped early its last ones.
        seconds: Spent on the trial so far, earlier attempts included.
        checkpoint: The best one so far.
        gpu_memory_gb: The most that torch has held on the GPU; None on a CPU.
        best_folds: The objective of each fold at the best checkpoint, whose mean the value is;
            None without a cross-validation.
    """

    step: int
    epoch: int
    value: float
    best_f1_iou50: float | None
    metrics: dict[str, Any]
    losses: dict[str, float]
    seconds: float
    checkpoint: str | None
    gpu_memory_gb: float | None = None
    best_folds: list[float] | None = None

    def as_mapping(self) -> dict[str, Any]:
        """Return the evaluation as plain JSON types."""
        mapping: dict[str, Any] = records.plain(asdict(self))
        return mapping
