"""What the Optuna dashboard shows of a trial and of a study: notes, pictures, files to download."""

from __future__ import annotations

import os
import shutil
import uuid
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, BinaryIO

from hydralv_tune.artifacts.records import TrialRecord, read_record
from hydralv_tune.artifacts.writing import write_atomically
from hydralv_tune.config.errors import HydraLVError
from hydralv_tune.config.search_space import SearchSpace
from hydralv_tune.numerics.formatting import figure, number_of, objective_label
from hydralv_tune.numerics.metrics.scores import METRICS, SUMMARY
from hydralv_tune.study.database import database_errors
from hydralv_tune.study.driver import Driver
from hydralv_tune.study.study import Study, open_readonly
from hydralv_tune.study.trial_views import TrialView, best_trial, count_states

ARTIFACTS = ("contact_sheet.png", "sweep.png", "losses.png", "best.ckpt", "config.yaml")
"""Files of a trial's folder that the dashboard offers."""

COUNTS = ("missed", "split", "merged", "invented")


class ArtifactFolder:
    """A folder of artifacts, as Optuna's stores are; a file on the same disk is linked, not copied.

    Args:
        folders: Where artifacts lie; new ones go into the first.
    """

    def __init__(self, *folders: Path) -> None:
        self.folders = folders

    def open_reader(self, artifact_id: str) -> BinaryIO:
        """Return the open file of an artifact.

        Raises:
            FileNotFoundError: There is none of that id.
        """
        for folder in self.folders:
            path = folder / _checked(artifact_id)
            if path.is_file():
                return path.open("rb")
        raise FileNotFoundError(f"no artifact {artifact_id} in {', '.join(map(str, self.folders))}")

    def write(self, artifact_id: str, content_body: IO[bytes]) -> None:
        """Store the content of an open file under an id."""
        place = self.folders[0] / _checked(artifact_id)
        place.parent.mkdir(parents=True, exist_ok=True)
        name = getattr(content_body, "name", None)
        # A checkpoint of 170 MB a trial is not stored twice. The trial replaces its files by
        # renaming, so a link keeps the content it had.
        if isinstance(name, str) and Path(name).is_file():
            try:
                os.link(name, place)
                return
            except OSError:
                shutil.copyfile(name, place)
                return
        write_atomically(place, content_body.read())

    def remove(self, artifact_id: str) -> None:
        """Delete an artifact."""
        for folder in self.folders:
            (folder / _checked(artifact_id)).unlink(missing_ok=True)


def _checked(artifact_id: str) -> str:
    """Return an id that is one: it comes from the database and must not leave the folder."""
    return str(uuid.UUID(artifact_id))


def artifact_folder(study: Study) -> ArtifactFolder | None:
    """Return where the artifacts of a study go, or None where it has no folder."""
    return None if study.out is None else ArtifactFolder(study.out / "artifacts")


def publish_trial_end(
    driver: Driver, number: int, state: str, attributes: Mapping[str, Any]
) -> None:
    """Attach pictures, checkpoint and notes to a trial that has come to its end.

    It is what `run_study` calls before it tells a trial. What cannot be attached is left out: a
    note must not cost a result.

    Args:
        driver: That has run the trial.
        number: Of the trial.
        state: `COMPLETE`, `PRUNED` or `FAIL`.
        attributes: What is about to be told.
    """
    study = driver.study
    if study.out is None:
        return
    folder = study.out / "trials" / str(int(attributes.get("root", number)))
    # A note must not cost a result: what cannot be written now is left out.
    with suppress(HydraLVError, OSError), database_errors():
        publish_trial(study, number, state, folder, attributes)
        publish_study(study)


def publish_trial(
    study: Study, number: int, state: str, folder: Path, attributes: Mapping[str, Any]
) -> None:
    """Attach a trial's files and write its note.

    Args:
        study: An open study.
        number: Of the trial; artifacts must be there before it is told.
        state: How it ended.
        folder: Of the trial.
        attributes: `reason`, `metrics`, `losses`, `decoding`, `warm_start`, as they are told.

    Raises:
        DatabaseAway: The database does not answer.
        OSError: The artifact folder cannot be written.
    """
    store = artifact_folder(study)
    if store is not None:
        for name in ARTIFACTS:
            if (folder / name).is_file():
                study.attach(number, folder / name, store)
    record = read_record(folder / "record.json") if (folder / "record.json").is_file() else None
    study.write_note(number, trial_note(number, state, attributes, record))


def publish_study_end(storage: str, name: str) -> None:
    """Write the note of a study once its run is over; it counts the last trial too."""
    with suppress(HydraLVError, OSError), database_errors():
        study = open_readonly(storage, name)
        try:
            publish_study(study)
        finally:
            study.close()


def publish_study(study: Study) -> None:
    """Write the note of a study as it stands, and what its values are called."""
    if study.optuna.metric_names is None:
        with warnings.catch_warnings():  # the name is for the dashboard's axes alone
            warnings.simplefilter("ignore")
            study.optuna.set_metric_names([objective_label(study.space.objective.metric)])
    trials = study.trials()
    best = best_trial(trials)
    record = None
    if best is not None and (folder := study.folder_of(best)) is not None:
        path = folder / "record.json"
        record = read_record(path) if path.is_file() else None
    study.write_note(None, study_note(study, study.space, trials, record))


def study_note(
    study: Study, space: SearchSpace, trials: list[TrialView], record: TrialRecord | None
) -> str:
    """Return what a study is about, how it stands, and what to do next, as Markdown.

    Args:
        study: Its name and storage.
        space: What it searches.
        trials: As they stand.
        record: Of the best trial, where there is one.
    """
    count, best = count_states(trials), best_trial(trials)
    finished = count["complete"] + count["pruned"]
    budget = space.budget
    limits = [f"{budget.trials} trials"]
    if budget.timeout_s:
        limits.append(f"{budget.timeout_s:g} s a run")
    if budget.gpu_hours:
        limits.append(f"{budget.gpu_hours:g} GPU-hours")
    guard = space.objective.guard.f1_iou50
    lines = [
        f"## {study.name}",
        f"**Objective** {space.objective.metric}, smaller is better; a trial under F1 {guard:g} "
        "violates the guard.",
        f"**Budget** {', '.join(limits)}.",
        f"**So far** {finished} finished: "
        + ", ".join(f"{number} {state}" for state, number in count.items() if number)
        + ".",
    ]
    if record is not None:
        lines.append(f"**Data** {_data(record)}.")
        lines.append(f"**Split** {record.split.get('sentence') or record.split.get('kind')}.")
    if best is not None:
        metrics = best.user_attrs.get("metrics") or {}
        told = ", ".join(f"{METRICS[key].label} {figure(metrics.get(key))}" for key in SUMMARY)
        lines.append(f"**Best so far** trial {best.number}: {told}.")
    lines.append(f"**Next** {_next(study, best, finished, space)}")
    return "\n\n".join(lines) + "\n"


def _data(record: TrialRecord) -> str:
    """Return the volumes of a record in words."""
    return "; ".join(
        f"`{entry.get('name')}` {' × '.join(map(str, entry.get('shape') or ()))}, fingerprint "
        f"`{entry.get('fingerprint')}`"
        for entry in record.volumes
    )


def _next(study: Study, best: TrialView | None, finished: int, space: SearchSpace) -> str:
    """Return what a user would do now."""
    options = f"--storage {study.storage} --study {study.name}"
    if best is None:
        return "wait for the first trial; `hydralv-tune status` says how it stands."
    if not best.is_feasible:
        return (
            "no trial meets the guard yet. Look at the contact sheets; `trials/overfit_check.yaml` "
            "says within minutes whether the network can learn the volume at all."
        )
    report = f"`hydralv-tune report {options} --out report` says what limits the score."
    if finished < space.budget.trials:
        return f"running `hydralv-tune run` again continues it. {report}"
    return f"`hydralv-tune export {options} --out best.yaml` takes the best one away. {report}"


def trial_note(
    number: int, state: str, attributes: Mapping[str, Any], record: TrialRecord | None
) -> str:
    """Return what became of a trial, as Markdown.

    Args:
        number: Of the trial.
        state: How it ended.
        attributes: `reason`, `metrics`, `losses`, `decoding`, `warm_start`.
        record: What it left, where there is something.
    """
    lines = [f"## Trial {number}: {state.lower()}"]
    for key in ("reason", "warm_start"):
        if attributes.get(key):
            lines.append(f"**{key.replace('_', ' ')}** {_plain(attributes[key])}")
    metrics = attributes.get("metrics") or (record.metrics if record else {})
    if metrics:
        lines.append(_table([(METRICS[key].label, figure(metrics.get(key))) for key in SUMMARY]))
        counts = [f"{number_of(metrics[k])} {k}" for k in COUNTS if metrics.get(k) is not None]
        if counts:
            true, matched = metrics.get("instances_true"), metrics.get("matched_iou50")
            lines.append(f"**Instances** {matched} of {true} matched, {', '.join(counts)}.")
    decoding = attributes.get("decoding") or (record.decoding if record else None) or {}
    if decoding:
        kwargs = decoding.get("kwargs") or {}
        rows = [(f"`{k}`", f"`{_threshold(v)}`") for k, v in kwargs.items()]
        lines += [f"**Thresholds** of `{decoding.get('name')}`", _table(rows)]
    losses = attributes.get("losses") or (record.losses if record else {})
    if losses:
        lines += ["**Losses**", _table([(f"`{k}`", figure(v)) for k, v in losses.items()])]
    if record is not None:
        lines += ["**Verdict**", "\n".join(f"- {_plain(line)}" for line in record.verdicts)]
        lines += [f"> {_plain(note)}" for note in record.notes]
    return "\n\n".join(line for line in lines if line) + "\n"


def _threshold(value: Any) -> str:
    """Return a decoder's argument as people read it; None is a test that is off."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(_threshold(entry) for entry in value)}]"
    return "off" if value is None else str(value)


def _plain(text: Any) -> str:
    """Return text in one line, with nothing that Markdown would take for HTML."""
    return " ".join(str(text).split()).replace("<", "&lt;")


def _table(rows: list[tuple[str, str]]) -> str:
    """Return a table of names and values."""
    lines = [f"| {name} | {value} |" for name, value in rows]
    return "\n".join(["| | |", "|---|---|", *lines]) if lines else ""
