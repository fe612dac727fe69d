"""The best trial of a study with everything it left behind: what export and report start from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydralv_tune.artifacts.records import TrialRecord, has_checkpoint, read_record
from hydralv_tune.config.candidate import Candidate, DecodingStep
from hydralv_tune.config.errors import InputError, StudyError
from hydralv_tune.config.files import candidate_from_mapping, decoding_step
from hydralv_tune.config.pytc_portability import obstacles
from hydralv_tune.data.volumes import VolumePaths
from hydralv_tune.study.study import Study, open_readonly
from hydralv_tune.study.trial_views import TrialView, best_trial, count_outcomes


@dataclass(frozen=True)
class BestTrial:
    """The best trial.

    Args:
        study: The open study.
        view: The trial as the database has it.
        record: What it left in its folder.
        folder: Its folder.
        candidate: What was trained.
        step: The decoder with the winning thresholds.
    """

    study: Study
    view: TrialView
    record: TrialRecord
    folder: Path
    candidate: Candidate
    step: DecodingStep

    @property
    def checkpoint(self) -> Path:
        """Return the best checkpoint.

        Raises:
            InputError: It is gone.
        """
        path = self.folder / "best.ckpt"
        if not has_checkpoint(path):
            raise InputError(
                f"{path}: trial {self.view.number} of study '{self.study.name}' has no checkpoint "
                "any more. Put its folder back, or run the study again for a new best trial."
            )
        return path

    @property
    def leads(self) -> bool:
        """Return whether it is the best trial of its study, not one chosen otherwise."""
        best = self.study.best()
        return best is not None and best.number == self.view.number

    @property
    def volumes(self) -> list[VolumePaths]:
        """Return where the volumes lie; those that the candidate itself names are left out."""
        return [volume_paths_of(entry) for entry in self.record.volumes if entry.get("image")]

    @property
    def voxel_size_nm(self) -> list[float] | None:
        """Return the voxel size (z, y, x) of the first volume, where it is known."""
        sizes = [entry.get("voxel_size_nm") for entry in self.record.volumes]
        return list(sizes[0]) if sizes and sizes[0] else None


def volume_paths_of(entry: dict[str, Any]) -> VolumePaths:
    """Return the paths that a record keeps of a volume."""
    return VolumePaths(
        name=str(entry["name"]),
        image=str(entry["image"]),
        label=entry.get("label"),
        mask=entry.get("mask"),
        scored_mask=entry.get("scored_mask"),
        ignore_labels=tuple(entry.get("ignore_labels") or ()),
    )


@contextmanager
def load_best_trial(
    storage: str,
    name: str,
    folder: Path | None = None,
    *,
    number: int | None = None,
    portable: bool = False,
) -> Iterator[BestTrial]:
    """Open a study for reading and yield its best trial.

    Args:
        storage: URL of the database.
        name: Name of the study.
        folder: Where its trials are now; where the database says so by default.
        number: Of the trial to take instead of the best.
        portable: Whether to take the best of those whose network PyTorch Connectomics has.

    Raises:
        StudyError: No such storage or study, or no trial is finished.
        InputError: The trial's folder or its record is gone.
    """
    study = open_readonly(storage, name, folder)
    try:
        yield chosen_trial(study, number, portable)
    finally:
        study.close()


def best_portable(study: Study) -> TrialView | None:
    """Return the best finished trial whose network PyTorch Connectomics has, or None."""
    return best_trial([view for view in study.trials() if _goes_over(study, view)])


def _goes_over(study: Study, view: TrialView) -> bool:
    """Return whether the network of a trial, as its record has it, exists in that tool."""
    folder = study.folder_of(view)
    if view.state != "COMPLETE" or folder is None or not (folder / "record.json").is_file():
        return False
    config = read_record(folder / "record.json").config
    return not obstacles(candidate_from_mapping(config, place=str(folder), base={}))


def chosen_trial(study: Study, number: int | None = None, portable: bool = False) -> BestTrial:
    """Return the best trial of an open study, or the one asked for.

    Args:
        study: Open.
        number: As for `load_best_trial`.
        portable: As for `load_best_trial`.

    Raises:
        StudyError: As for `load_best_trial`.
        InputError: As for `load_best_trial`.
    """
    view = study.best()
    if portable:
        view = best_portable(study)
        if view is None:
            raise InputError(
                f"export --best-portable: no finished trial of study '{study.name}' has a network "
                "that PyTorch Connectomics has. Put `export: pytc` into the search space."
            )
    if number is not None:
        found = {trial.number: trial for trial in study.trials() if trial.state == "COMPLETE"}
        if number not in found:
            known = ", ".join(map(str, sorted(found))) or "none"
            raise InputError(f"export --trial: {number} is no finished trial. Known: {known}.")
        view = found[number]
    if view is None:
        counts = count_outcomes(study.trials())
        states = ", ".join(f"{number} {state}" for state, number in counts.items() if number)
        raise StudyError(
            f"Study '{study.name}' in {study.storage} has no complete trial yet "
            f"({states or 'no trial at all'}). "
            + (
                "`hydralv-tune status` shows how far the running ones are."
                if counts["running"]
                else "Continue it with the command that started it."
            )
        )
    folder, record = record_of(study, view)
    place = str(folder / "record.json")
    decoding = record.decoding or {}
    if "name" not in decoding:
        raise InputError(f"{place}: says no decoding, though the trial is COMPLETE. Run it again.")
    return BestTrial(
        study=study,
        view=view,
        record=record,
        folder=folder,
        candidate=candidate_from_mapping(record.config, place=place, base={}),
        step=decoding_step(str(decoding["name"]), dict(decoding.get("kwargs") or {})),
    )


def record_of(study: Study, view: TrialView) -> tuple[Path, TrialRecord]:
    """Return the folder of a trial and the record in it.

    Raises:
        InputError: The folder or the record is gone.
    """
    folder = study.folder_of(view)
    if folder is None or not (folder / "record.json").is_file():
        raise InputError(
            f"{folder}: the folder of trial {view.number} of study '{study.name}' holds no "
            "record.json. The database keeps no weights: run this where the study's folder is."
        )
    return folder, read_record(folder / "record.json")
