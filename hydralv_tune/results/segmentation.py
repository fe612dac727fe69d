"""What a volume is segmented with: the weights and thresholds of a study, an export or a trial."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydralv_tune.config.candidate import Candidate, DecodingStep
from hydralv_tune.config.errors import InputError, StudyError
from hydralv_tune.config.files import decoding_step, load_candidate
from hydralv_tune.data.formats import SUFFIXES, suffix_of
from hydralv_tune.data.formats.files import open_lazy, open_mask
from hydralv_tune.data.truth import Gap, gaps_to_fill
from hydralv_tune.data.volumes import occupied_sections
from hydralv_tune.trial.whole_volume.segmentation import Segmenter

CHECKPOINTS = (".ckpt", ".pt", ".pth")
YAML = (".yaml", ".yml")


def load_model(
    best: str, *, study: str | None = None, changed: Mapping[str, Any] | None = None
) -> Segmenter:
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
    return Segmenter(
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


def gaps_of_tissue(image: str, mask: str | None, scored: str | None) -> list[Gap] | None:
    """Return across which sections that a mask leaves out tissue goes on, as a study takes it.

    Args:
        image: The file of the image.
        mask: That which says where tissue is, or None.
        scored: That which says where the truth is known, or None.

    Returns:
        None where decoding goes on everywhere; none where the mask marks tissue as it is.

    Raises:
        VolumeError: The mask is one in which nothing counts, or holds no numbers.
    """
    if mask is None:
        return []
    with open_lazy(image, ndim=3) as opened:
        shape = opened.shape
    with open_mask(mask, shape) as sections:
        occupied = occupied_sections(mask, sections)
    return gaps_to_fill(occupied) if scored is None else []


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
    from hydralv_tune.study.find import check_place, find_study

    path = Path(best)
    if path.is_file() and suffix_of(path) in SUFFIXES:
        raise InputError(
            f"{best}: is a volume, where weights or thresholds are needed: an exported "
            "YAML file, a checkpoint, or the folder of a study. Name one of these."
        )
    try:
        check_place(best)
    except StudyError as error:
        if not (checkpoint := path / "best.ckpt").is_file():
            raise
        raise InputError(
            f"{best}: is the folder of a trial, not of a study. Give its checkpoint: {checkpoint}"
        ) from error
    try:
        address = find_study(best, study=study)
        with load_best_trial(address.storage, address.name, address.folder) as trial:
            return trial.checkpoint, trial.step
    except StudyError as error:
        # Here the place of a study is no option.
        raise StudyError(str(error).removeprefix("--storage: ")) from error
