"""What the benchmarks that train share: a candidate trained for so long, and its scores."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydralv_tune.artifacts.records import TrialRecord
from hydralv_tune.config.candidate import Candidate
from hydralv_tune.config.files import load_candidate
from hydralv_tune.config.search_space import SearchSpace
from hydralv_tune.config.validation import merged
from hydralv_tune.data.volumes import Volume
from hydralv_tune.trial.run import TrialSpec, run_trial

TRAINING_SHARE = 0.8
"""Of the time asked for; evaluations, which predict and sweep the volume, take the rest."""


def train_for(
    seconds: float,
    volume: Volume,
    name: str,
    overrides: Mapping[str, Any],
    *,
    space: SearchSpace,
    threads: int,
) -> tuple[TrialRecord, float]:
    """Return the record of a candidate trained for about so long, and the seconds it took.

    Args:
        seconds: Wanted; how many epochs fit is found by training two of them first.
        volume: Trained and scored on.
        name: Of a candidate in `trials/`.
        overrides: A partial candidate over it.
        space: Its thresholds, or the candidate's own, are swept for its objective.
        threads: Of the CPU.
    """
    probe = {"optimization": {"max_epochs": 2, "scheduler": {"warmup_epochs": 1}},
             "monitor": {"evaluation": {"count": 1}}}  # fmt: skip
    rate = trained(
        [volume], load_candidate(name, merged(overrides, probe)), space, threads
    ).training
    epochs = max(int(TRAINING_SHARE * seconds * rate["steps_per_s"] / rate["steps_per_epoch"]), 10)
    longer = {"optimization": {"max_epochs": epochs, "scheduler": {"warmup_epochs": epochs // 10}}}
    started = time.perf_counter()
    record = trained([volume], load_candidate(name, merged(overrides, longer)), space, threads)
    return record, time.perf_counter() - started


def trained(
    volumes: Sequence[Volume],
    candidate: Candidate,
    space: SearchSpace,
    threads: int,
    out: Path | None = None,
) -> TrialRecord:
    """Return the record of a trial in a new folder.

    Args:
        volumes: Trained and scored on.
        candidate: What is trained.
        space: Its thresholds, or the candidate's own, are swept for its objective.
        threads: Of the CPU.
        out: The folder, emptied before; a temporary one without.
    """
    if out is None:
        out = Path(tempfile.mkdtemp(prefix="hydralv_benchmark_"))
    shutil.rmtree(out, ignore_errors=True)
    spec = TrialSpec(
        number=0, root=0, candidate=candidate, objective=space.objective,
        grid=candidate.test.decoding_grid or space.decoding, volumes=[], out=str(out),
        threads=threads,
    )  # fmt: skip
    return run_trial(spec, lambda _: None, volumes=volumes)


def sentence(record: TrialRecord, seconds: float, threads: int) -> str:
    """Return what a training was, for people."""
    steps, batch = record.training["steps_done"], record.training["effective_batch"]
    return (
        f"{steps} steps of {batch} patches, {seconds:.0f} s in all, {threads} threads; "
        f"{record.split['sentence']}"
    )


def show_scores(part: str, figures: Mapping[str, Any]) -> None:
    """Print the scores of a part of a volume."""
    counts = ", ".join(
        f"{figures[f'{key}_count']} {key}" for key in ("missed", "split", "merged", "invented")
    )
    print(f"  {part:<32} error {figures['adapted_rand_error']:.3f}, foreground form "
          f"{figures['adapted_rand_error_foreground']:.3f}, F1 {figures['f1_iou50']:.3f} "
          f"({figures['matched_iou50']} of {figures['instances_true']} matched; {counts})",
          flush=True)  # fmt: skip
