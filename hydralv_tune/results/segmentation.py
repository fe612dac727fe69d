"""What a volume is segmented with: the weights and thresholds of a study, an export or a trial."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydralv_tune.config.candidate import Candidate, DecodingStep
from hydralv_tune.config.errors import InputError
from hydralv_tune.config.files import decoding_step, load_candidate
from hydralv_tune.data.formats.files import open_lazy
from hydralv_tune.data.truth import FEW_SECTIONS, annotated_sections, longest_run
from hydralv_tune.trial.whole_volume.segmentation import Model

CHECKPOINTS = (".ckpt", ".pt", ".pth")
YAML = (".yaml", ".yml")


def load_model(
    best: str, *, study: str | None = None, changed: Mapping[str, Any] | None = None
) -> Model:
    """Return weights and thresholds.

    Args:
        best: An exported YAML file with its checkpoint beside it, a checkpoint with its record or
            exported YAML file beside it, a study's folder or the URL of its storage.
        study: The name of the study, where a storage holds several.
        changed: Arguments of the decoder that replace the found ones.

    Raises:
        InputError: It is none of these, or a part of it is missing.
        CheckpointError: The checkpoint is damaged or of another tool.
        StudyError: There is no such study, or no trial of it is finished.
    """
    path = Path(best)
    if path.suffix in YAML:
        checkpoint, step = path.with_suffix(".ckpt"), _exported_step(path)
        if not checkpoint.is_file():
            raise InputError(
                f"{path}: its weights should lie beside it as {checkpoint.name}, as `export` "
                "writes them, but that file is missing. Put it there, or give the study's folder."
            )
    elif path.suffix in CHECKPOINTS:
        checkpoint, step = path, _step_beside(path)
    else:
        checkpoint, step = _of_study(best, study)
    members = _trained_as(checkpoint)
    step = _changed(step, changed)
    return Model(
        checkpoint, members[0][0], step.name, step.decoder_arguments(),
        members=members if len(members) > 1 else (),
    )  # fmt: skip


def load_thresholds(
    best: str, *, study: str | None = None, changed: Mapping[str, Any] | None = None
) -> DecodingStep:
    """Return decoder and thresholds alone; no weights are needed.

    Args:
        best: As for `load_model`; beside a YAML file no checkpoint is needed.
        study: As for `load_model`.
        changed: As for `load_model`.

    Raises:
        InputError: As for `load_model`.
        StudyError: As for `load_model`.
    """
    path = Path(best)
    if path.suffix in YAML:
        step = _exported_step(path)
    elif path.suffix in CHECKPOINTS:
        step = _step_beside(path)
    else:
        step = _of_study(best, study)[1]
    return _changed(step, changed)


def _changed(step: DecodingStep, changed: Mapping[str, Any] | None) -> DecodingStep:
    """Return a step with some of its arguments replaced."""
    if not changed:
        return step
    return decoding_step(step.name, {**step.decoder_arguments(), **changed})


def tissue_and_scored(mask: str | None, scored: str | None) -> tuple[str | None, str | None]:
    """Return the files that say where tissue is and where the truth is known, as a study does.

    A mask of annotated sections, given alone, says where the truth is known; where no more than
    two neighbouring sections are annotated, nothing says where tissue ends.

    Args:
        mask: Given as where tissue is, or None.
        scored: Given as where the truth is known, or None.

    Raises:
        InputError: The mask leaves out whole sections, so it cannot say where tissue is.
    """
    if mask is None:
        return None, scored
    with open_lazy(mask, ndim=3) as opened:
        occupied = [bool((section > 0).any()) for section in opened]
    if not annotated_sections(occupied):
        return mask, scored
    if scored is None and longest_run(occupied) <= FEW_SECTIONS:
        return None, mask
    raise InputError(
        f"{mask}: the mask leaves out whole sections, so it says what was annotated, not where "
        "tissue is, and instances would be cut at its sections. Leave --mask out, or give the "
        "tissue; score with --scored-mask."
    )


def _trained_as(checkpoint: Path) -> tuple[tuple[Candidate, float], ...]:
    """Return candidate and weight of each network of a checkpoint, whose weights fit."""
    from hydralv_tune.trial.scoring.prediction import load_members

    return tuple((one.candidate, one.share) for one in load_members(checkpoint))


def _exported_step(path: Path) -> DecodingStep:
    """Return the thresholds of an exported file."""
    steps = load_candidate(str(path), {}).test.decoding
    if not steps:
        raise InputError(
            f"{path}: test.decoding names no decoder, so there are no thresholds. Give a file that "
            "`export` wrote."
        )
    return steps[0]


def _step_beside(checkpoint: Path) -> DecodingStep:
    """Return the thresholds that were found for a checkpoint: its trial's, or those exported."""
    from hydralv_tune.artifacts.records import read_record

    record = checkpoint.with_name("record.json")
    if record.is_file():
        decoding = read_record(record).decoding or {}
        if "name" in decoding:
            return decoding_step(str(decoding["name"]), dict(decoding.get("kwargs") or {}))
    for suffix in YAML:
        if (exported := checkpoint.with_suffix(suffix)).is_file():
            return _exported_step(exported)
    raise InputError(
        f"{checkpoint}: thresholds are needed too, and neither record.json nor "
        f"{checkpoint.with_suffix('.yaml').name} lies beside it. Give the exported YAML file or "
        "the study's folder."
    )


def _of_study(best: str, study: str | None) -> tuple[Path, DecodingStep]:
    """Return checkpoint and thresholds of a study's best trial."""
    from hydralv_tune.results.best_trial import load_best_trial
    from hydralv_tune.study.find import find_study

    address = find_study(best, study=study)
    with load_best_trial(address.storage, address.name, address.folder) as trial:
        return trial.checkpoint, trial.step
