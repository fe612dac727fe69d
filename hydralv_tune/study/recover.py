"""A study again from the records of its trials, where its database was lost."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from hydralv_tune.artifacts.records import TrialRecord, read_record, without_seed
from hydralv_tune.config.errors import ConfigError, StudyError
from hydralv_tune.config.search_space import (
    SearchSpace,
    guard_violation,
    objective_value,
    space_from_mapping,
)
from hydralv_tune.config.yaml_io import dump_yaml, read_yaml_mapping
from hydralv_tune.study.distributions import distribution_of
from hydralv_tune.study.study import IDENTITY, OUT, VOLUMES, Study, open_if_exists
from hydralv_tune.study.study_folder import DATABASE, SPACE_FILE, owner_of
from hydralv_tune.study.trial_views import (
    CONSTRAINTS,
    OBJECTIVE,
    PREFIX,
    REPEAT_OF,
    REPEATS,
    SEED_SHIFT,
    ranked_value,
)

NO_RECORD = "not recovered: this attempt left no record of its own"


def recover_study(folder: Path, storage: str | None = None) -> dict[str, Any]:
    """Make a study again from `trials/*/record.json` of its folder, and return its facts.

    Trials keep their numbers as far as folders have them. A complete trial is complete again; one
    that was under way goes on from its checkpoint when the study is run again.

    Args:
        folder: Of the study.
        storage: URL of the database to make it in; `FOLDER/study.db` by default.

    Raises:
        StudyError: The folder holds no space or no record, or the database holds the study.
        InputError: A record cannot be read.
    """
    folder = folder.absolute()
    if not (folder / SPACE_FILE).is_file():
        raise StudyError(
            f"{folder}: holds no {SPACE_FILE}, which says what the study searches. Give the folder "
            "that `run` wrote."
        )
    space = space_from_mapping(read_yaml_mapping(folder / SPACE_FILE))
    found = sorted(folder.glob("trials/*/record.json"), key=lambda path: path.parent.name)
    records = {int(p.parent.name): read_record(p) for p in found if p.parent.name.isdecimal()}
    if not records:
        raise StudyError(f"{folder}: no trial has left a trials/*/record.json. Nothing is made.")
    owner = owner_of(folder)
    name = owner.study if owner is not None else folder.name
    url = storage or f"sqlite:///{folder / DATABASE}"
    if (there := open_if_exists(url, name)) is not None:
        there.close()
        raise StudyError(
            f"--storage: {there.storage} holds study '{name}' already. Nothing is made."
        )
    repeats = _repeats(records, space)
    trials = [
        _trial(records.get(number), number, space, folder, repeats.get(number, {}))
        for number in range(max(records) + 1)
    ]
    study = Study.open(url, name, space=space.model_copy(update={"warm_starts": []}), create=True)
    try:
        for trial in trials:
            study.optuna.add_trial(trial)
        study.check_space(space, extend=True)
        study.remember("space", space.as_mapping())
        study.remember(IDENTITY, owner.identity if owner is not None else uuid.uuid4().hex)
        study.remember(VOLUMES, _fingerprints(records[min(records)]))
        study.remember(OUT, str(folder))
        return study.facts()
    except BaseException:
        optuna.delete_study(study_name=name, storage=study.rdb)
        raise
    finally:
        study.close()


def _fingerprints(record: TrialRecord) -> dict[str, str]:
    """Return the hash of each volume that the study was given, by its name."""
    return {
        str(entry["name"]): str(entry["fingerprint"])
        for entry in record.volumes
        if entry.get("image") and entry.get("fingerprint")
    }


def _repeats(records: Mapping[int, TrialRecord], space: SearchSpace) -> dict[int, dict[str, int]]:
    """Return the attributes of the trials that differ from an earlier one in their seed alone."""
    alike: dict[str, list[int]] = {}
    for number in sorted(records):
        alike.setdefault(dump_yaml(without_seed(records[number].config)), []).append(number)
    if "system.seed" in space.parameters:
        return {}
    return {
        number: {
            REPEAT_OF: first,
            SEED_SHIFT: records[number].seed - records[first].seed,
            REPEATS: len(repeats),
        }
        for first, *repeats in alike.values()
        for number in repeats
    }


def _trial(
    record: TrialRecord | None,
    number: int,
    space: SearchSpace,
    folder: Path,
    repeat: Mapping[str, int],
) -> FrozenTrial:
    """Return a trial as its record says, or a failed one in the place of a lost number."""
    known: dict[str, Any] = {"owner": {"identity": "recovered"}, "root": number, "attempt": 1}
    known |= repeat
    params = None if record is None else _params(space, record.config)
    if record is None or params is None:
        why = NO_RECORD if record is None else "not recovered: its parameters are not in the space"
        return _frozen(TrialState.FAIL, None, {}, {}, {**known, "reason": why, "retry": "no"}, {})
    known |= {
        "metrics": record.metrics, "losses": record.losses, "decoding": record.decoding,
        "seconds": float((record.history or [{}])[-1].get("seconds") or 0.0),
        "record": str(folder / "trials" / str(number) / "record.json"),
        "warm_start": _recipe(space, record.config),
    }  # fmt: skip
    steps = {int(row["evaluation"]): float(row["best_value"]) for row in record.history}
    distributions = {key: distribution_of(space.parameters[key]) for key in params}
    known = {key: value for key, value in known.items() if value is not None}
    if record.state != "complete":
        retry = "no" if record.state == "fail" else "free"
        reason = record.error or f"recovered: its record says {record.state}"
        known |= {"reason": reason, "retry": retry}
        trial = _frozen(TrialState.FAIL, None, params, distributions, known, steps)
    else:
        value = objective_value(record.metrics, space.objective)
        violation = guard_violation(record.metrics.get("f1_iou50"), space.objective)
        ranked = ranked_value(value, violation, space.objective.metric)
        trial = _frozen(TrialState.COMPLETE, ranked, params, distributions, known, steps)
        trial.system_attrs[OBJECTIVE] = value
        if violation is not None:
            trial.system_attrs[CONSTRAINTS] = [violation]
    written = (folder / "trials" / str(number) / "record.json").stat().st_mtime
    trial.datetime_complete = datetime.fromtimestamp(written)
    trial.datetime_start = trial.datetime_complete - timedelta(seconds=known["seconds"])
    return trial


def _frozen(
    state: TrialState,
    value: float | None,
    params: Mapping[str, Any],
    distributions: Mapping[str, Any],
    known: Mapping[str, Any],
    steps: Mapping[int, float],
) -> FrozenTrial:
    """Return a trial to be added."""
    return optuna.trial.create_trial(
        state=state,
        value=value,
        params=dict(params),
        distributions=dict(distributions),
        system_attrs={f"{PREFIX}{key}": entry for key, entry in known.items()},
        intermediate_values=dict(steps),
    )


def _params(space: SearchSpace, candidate: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the encoded values that a candidate has of the searched keys; None outside them."""
    recipes = {**space.recipes, "recovered": dict(candidate)}
    try:
        return dict(space.model_copy(update={"recipes": recipes}).warm_start("recovered").params)
    except ConfigError:
        return None


def _recipe(space: SearchSpace, candidate: Mapping[str, Any]) -> str | None:
    """Return the name of the warm start that a candidate was, if any."""
    for name in space.warm_starts:
        start = space.warm_start(name)
        if space.candidate(start.params, start.overrides).as_mapping() == candidate:
            return name
    return None
