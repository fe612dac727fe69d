"""What the Optuna dashboard shows of a trial and of a study: notes, pictures, files to download."""

from __future__ import annotations

import os
import shlex
import shutil
import uuid
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import IO, Any, BinaryIO

from hydralv_tune.artifacts.records import TrialRecord, read_record
from hydralv_tune.artifacts.writing import write_atomically
from hydralv_tune.config.errors import HydraLVError
from hydralv_tune.config.search_space import SearchSpace
from hydralv_tune.numerics.formatting import duration, figure, number_of, objective_label, or_off
from hydralv_tune.numerics.metrics.registry import METRICS, SUMMARY
from hydralv_tune.study.database import database_errors
from hydralv_tune.study.driver import Driver
from hydralv_tune.study.study import Study, open_readonly
from hydralv_tune.study.trial_views import (
    TrialView,
    best_trial,
    count_outcomes,
    seconds_left,
    state_word,
)

PICTURES = ("contact_sheet.png", "sweep.png", "losses.png")
"""Pictures of a trial's folder, which change while it runs."""

ARTIFACTS = (*PICTURES, "best.ckpt", "config.yaml")
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


def publish_trial_change(
    driver: Driver, number: int, state: str, attributes: Mapping[str, Any]
) -> None:
    """Bring the pages of a trial and of the study up to date.

    `run_study` calls it when a trial starts, at each of its evaluations, and before its end is
    told. What cannot be written is left out: a note must not cost a result.

    Args:
        driver: The driver that runs the trial.
        number: Number of the trial.
        state: `RUNNING`, `COMPLETE`, `PRUNED` or `FAIL`.
        attributes: What is known of it now: user attributes, or the fields of an evaluation.
    """
    study = driver.study
    if study.out is None:
        return
    folder = study.out / "trials" / str(int(attributes.get("root", number)))
    with suppress(HydraLVError, OSError), database_errors():
        publish_trial(study, number, state, folder, attributes)
        if state != "RUNNING" or "step" not in attributes:
            publish_study(study)


def publish_trial(
    study: Study, number: int, state: str, folder: Path, attributes: Mapping[str, Any]
) -> None:
    """Attach the files of a trial and write its note.

    Args:
        study: An open study.
        number: Number of the trial, which must not be finished: artifacts are refused then.
        state: `RUNNING`, `COMPLETE`, `PRUNED` or `FAIL`.
        folder: Folder of the trial.
        attributes: `reason`, `metrics`, `losses`, `decoding`, `warm_start`; of a running trial
            `step`, `evaluations`, `epoch`, `epochs`, `seconds`, `host` too.

    Raises:
        DatabaseAway: The database does not answer.
        OSError: The artifact folder cannot be written.
    """
    store = artifact_folder(study)
    if store is not None:
        names = PICTURES if state == "RUNNING" else ARTIFACTS
        study.replace_artifacts(
            number, [folder / n for n in names if (folder / n).is_file()], store
        )
    path = folder / "record.json"
    record = read_record(path) if path.is_file() else None
    study.write_note(number, trial_note(number, state, attributes, record))


def publish_study_end(storage: str, name: str) -> None:
    """Write the note of a study once its run is over, so that it counts the last trial too."""
    with suppress(HydraLVError, OSError), database_errors():
        study = open_readonly(storage, name)
        try:
            publish_study(study)
        finally:
            study.close()


def publish_study(study: Study) -> None:
    """Write the note of a study as it stands, and the name of its objective."""
    study.name_objective(objective_label(study.space.objective.metric))
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
    """Return what a study searches, how it stands and what to do next, as Markdown.

    Args:
        study: Its name and storage.
        space: Its search space.
        trials: All its trials.
        record: Record of the best trial, if there is one.
    """
    count, best = count_outcomes(trials), best_trial(trials)
    finished = count["complete"] + count["pruned"]
    budget = space.budget
    limits = [f"{study.wanted} trials"]
    if budget.timeout_s:
        limits.append(f"{duration(budget.timeout_s)} a run")
    if budget.gpu_hours:
        limits.append(f"{budget.gpu_hours:g} GPU-hours")
    guard = space.objective.guard.f1_iou50
    counts = ", ".join(f"{number} {state}" for state, number in count.items() if number)
    lines = [
        f"## {study.name}",
        f"**Objective** {space.objective.metric}, minimised. A trial with F1 below {guard:g} "
        "violates the guard and ranks behind every trial that does not.",
        f"**Budget** {', '.join(limits)}.",
        f"**So far** {finished} finished: {counts or 'no trial yet'}.",
    ]
    if record is not None:
        lines.append(f"**Data** {_data(record)}.")
        lines.append(f"**Split** {record.split.get('sentence') or record.split.get('kind')}.")
    if best is not None:
        metrics = best.user_attrs.get("metrics") or {}
        figures = ", ".join(f"{METRICS[key].label} {figure(metrics.get(key))}" for key in SUMMARY)
        guarded = "" if best.is_feasible else " It violates the guard; no trial meets it yet."
        lines.append(f"**Best so far** trial {best.number}: {figures}.{guarded}")
    lines.append(f"**Next** {_next(study, best, finished)}")
    return "\n\n".join(lines) + "\n"


def _data(record: TrialRecord) -> str:
    """Return the volumes of a record in words."""
    return "; ".join(
        f"`{entry.get('name')}` {' × '.join(map(str, entry.get('shape') or ()))}, fingerprint "
        f"`{entry.get('fingerprint')}`"
        for entry in record.volumes
    )


def _next(study: Study, best: TrialView | None, finished: int) -> str:
    """Return what to do now."""
    options = shlex.join(["--storage", study.storage, "--study", study.name])
    if best is None:
        return f"wait for the first trial. `hydralv-tune status {options}` says how it stands."
    if not best.is_feasible:
        return (
            "look at the contact sheets: no trial meets the guard yet. Training "
            "`overfit_check` shows within minutes whether the network can learn the volume."
        )
    report = f"`hydralv-tune report {options} --out report` says what limits the score."
    if finished < study.wanted:
        return f"run the same command again to continue. {report}"
    return (
        f"`hydralv-tune export {options} --out best.yaml` writes the best configuration. {report}"
    )


def trial_note(
    number: int, state: str, attributes: Mapping[str, Any], record: TrialRecord | None
) -> str:
    """Return how a trial goes or how it ended, as Markdown.

    Args:
        number: Number of the trial.
        state: `RUNNING`, `COMPLETE`, `PRUNED` or `FAIL`.
        attributes: As in `publish_trial`.
        record: What it left in its folder, if anything.
    """
    lines = [f"## Trial {number}: {state_word(state, attributes.get('reason'))}"]
    if state == "RUNNING":
        lines.append(_progress(attributes))
    for key, title in (("reason", "reason"), ("warm_start", "recipe")):
        if attributes.get(key):
            lines.append(f"**{title}** {_plain(attributes[key])}")
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
        lines += ["**Findings**", "\n".join(f"- {_plain(line)}" for line in record.verdicts)]
        lines += [f"> {_plain(note)}" for note in record.notes]
    return "\n\n".join(line for line in lines if line) + "\n"


def _progress(attributes: Mapping[str, Any]) -> str:
    """Return how far a running trial is, how long it still needs, and where it runs."""
    parts = []
    for done, whole, word in (("epoch", "epochs", "epoch"), ("step", "evaluations", "evaluation")):
        if attributes.get(done) is not None:
            of = f" of {attributes[whole]}" if attributes.get(whole) else ""
            parts.append(f"{word} {attributes[done]}{of}")
    if (left := seconds_left(attributes)) is not None:
        parts.append(f"{duration(left)} left at {datetime.now():%H:%M}")
    if attributes.get("host"):
        parts.append(f"on {attributes['host']}")
    if "root" in attributes:
        parts.append(f"folder trials/{attributes['root']}")
    return f"**Progress** {', '.join(parts)}." if parts else ""


def _threshold(value: Any) -> str:
    """Return a decoder's argument as people read it; None is a test that is off."""
    shown = or_off(value)
    return f"[{', '.join(map(str, shown))}]" if isinstance(shown, list) else str(shown)


def _plain(text: Any) -> str:
    """Return text in one line, with nothing that Markdown would take for HTML."""
    return " ".join(str(text).split()).replace("<", "&lt;")


def _table(rows: list[tuple[str, str]]) -> str:
    """Return a table of names and values."""
    lines = [f"| {name} | {value} |" for name, value in rows]
    return "\n".join(["| | |", "|---|---|", *lines]) if lines else ""
