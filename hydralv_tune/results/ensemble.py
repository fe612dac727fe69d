"""The ensemble of a study: networks of finished trials, averaged where that gains more than noise.

`ensemble.json` in the study's folder says what was found. Where the ensemble is kept,
`ensemble.ckpt` with its networks and `ensemble.yaml` with its thresholds lie beside it; they are
taken wherever an exported trial is.
"""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field, ValidationError

from hydralv_tune.artifacts.records import (
    FORMAT,
    FORMAT_VERSION,
    load_checkpoint,
    read_json,
    write_json,
)
from hydralv_tune.artifacts.writing import write_atomically
from hydralv_tune.config.candidate import DecodingGrid
from hydralv_tune.config.errors import HydraLVError, InputError, StudyError, as_input_error
from hydralv_tune.config.files import decoding_step
from hydralv_tune.data.volumes import Volume
from hydralv_tune.numerics.formatting import counted, figure, signed
from hydralv_tune.numerics.metrics.registry import METRICS, SUMMARY
from hydralv_tune.results.best_trial import BestTrial, chosen_trial
from hydralv_tune.results.export.certificate import write_certificate
from hydralv_tune.results.export.export import (
    check_places,
    check_table,
    exported_text,
    own_commands,
    write_table,
    write_weights,
)
from hydralv_tune.results.scored_volumes import fold_checkpoints, predicted_parts, split_of
from hydralv_tune.study.ending import search_is_over
from hydralv_tune.study.study import Study, open_readonly
from hydralv_tune.study.study_folder import ENSEMBLE_FILES
from hydralv_tune.study.trial_views import rank
from hydralv_tune.trial.scoring.ensemble import (
    LEVEL,
    CrossFitted,
    Picks,
    cross_fitted,
    selection_of,
    shares_of,
)
from hydralv_tune.trial.scoring.prediction import pick_device
from hydralv_tune.trial.splits import SplitPlan, describe

FACTS, WEIGHTS, THRESHOLDS = ENSEMBLE_FILES
MEMBERS = 3
CANDIDATES = 8
"""The best trials are looked at, so many at most: each average is swept over the whole grid."""
PREDICTION_SHARE = 0.5
"""Share of the time limit after which no further trial is predicted."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class _Candidate:
    """A trial whose networks may be averaged, with what they predict where it was scored."""

    trial: BestTrial
    plan: SplitPlan
    maps: Sequence[Any]
    seconds: float

    @property
    def checkpoints(self) -> list[Path]:
        """Return the checkpoint of each of its folds."""
        return fold_checkpoints(self.trial, self.plan)


def find_ensemble(
    storage: str, name: str, folder: Path | None = None, *, members: int = MEMBERS,
    limit_s: float | None = None, device: str = "auto", threads: int | None = None,
    say: Say = lambda sentence: None,
) -> dict[str, Any]:  # fmt: skip
    """Look for the best average of a study's networks, keep it where it gains, and return facts.

    An ensemble that an earlier look found stays where that one saw more: more trials or members,
    or the same trials with more time.

    Args:
        storage: Of the study.
        name: Of the study.
        folder: Where the study is now; where the database says so by default.
        members: Different trials that are averaged at most.
        limit_s: What it may take: fewer trials are looked at and grids are thinned to fit.
        device: As for `pick_device`.
        threads: Of the sweeps; as many as there are cores without.
        say: Told what is being done.

    Returns:
        The keys of the command `ensemble`, as plain JSON types. They are in the study's folder too,
        unless `kept` is `earlier`, not `ensemble` or `single`: then those of that look are.

    Raises:
        StudyError: No such storage or study, or fewer than two trials can be compared.
        InputError: There is no such device, a volume has changed, or what was scored holds a single
            instance.
    """
    began = time.perf_counter()
    pick_device(device)
    study = open_readonly(storage, name, folder)
    try:
        if study.out is None:
            raise StudyError(f"Study '{name}' in {storage} has no folder yet. Run it first.")
        found, volumes, left_out = _candidates(study, began, limit_s, device, say)
        space = study.space
        left = None if limit_s is None else max(limit_s - (time.perf_counter() - began), 0.0)
        # As it was swept: trials of earlier versions left a grid of the candidate's own aside.
        grid = DecodingGrid.model_validate(found[0].trial.record.grid or space.decoding)
        selection = selection_of(
            [one.maps for one in found], volumes, grid, space.objective,
            threads=threads,
            # Each fold, and everything: all trials alone, then one round of averages at least.
            sweep_s=None if left is None else left / (8 * len(found)),
            deadline=None if left is None else time.perf_counter() + left,
        )  # fmt: skip
        say(f"Averages of {len(found)} trials are swept.")
        with as_input_error(f"Study '{name}'"):
            chosen = cross_fitted(selection, members)
        look = {"trials": len(found), "members": members, "timeout_s": limit_s}
        facts = _facts(study, found, chosen, left_out, look)
        facts["seconds"] = round(time.perf_counter() - began, 3)
        _write(study, found, chosen, facts)
        return facts
    finally:
        study.close()


def ensemble_after_study(
    storage: str, name: str, trials: int, say: Say, folder: Path | None = None
) -> None:
    """Look for the ensemble of a study that has just ended, as `budget.ensemble` says.

    Nothing is done where trials are missing, as after a time limit, which is said, or where they
    are those of the last time. The study is finished: whatever goes wrong here is said, and costs
    nothing else.

    Args:
        storage: Of the study.
        name: Of the study.
        trials: Finished trials that the study aims at.
        say: Told what came out, or why nothing did.
        folder: Where the study is now; where the database says so by default.
    """
    try:
        study = open_readonly(storage, name, folder)
        try:
            budget, out, complete = study.space.budget.ensemble, study.out, _complete(study)
            views = study.trials()
            spent = sum(view.seconds for view in views)
            has_ended = search_is_over(study.space, views, trials)
        finally:
            study.close()
        if not budget.members or out is None or len(complete) < 2:
            return
        if not has_ended:
            say(
                "No ensemble was looked for, since trials are missing: "
                f"{_command(out)} looks among those that are complete."
            )
            return
        kept = _facts_before(out)
        if kept is not None and kept["considered"] == complete:
            return
        facts = find_ensemble(
            storage, name, folder, members=budget.members, limit_s=budget.time_share * spent,
            say=say,
        )  # fmt: skip
        say(facts["sentence"])
    except Exception as error:
        known = isinstance(error, HydraLVError)
        reason = str(error) if known else f"{type(error).__name__}: {' '.join(str(error).split())}"
        say(f"No ensemble was found: {reason}")


class _Single(BaseModel):
    """The best trial alone in the facts of an ensemble."""

    trial: int


class _Member(_Single):
    """A trial of an ensemble in its facts."""

    networks: int


class _Look(BaseModel):
    """What was looked at in the facts of an ensemble: trials, members at most, time."""

    trials: int
    members: int
    timeout_s: float | None


class _Facts(BaseModel):
    """The facts of an ensemble, as far as they are read again."""

    kept: Literal["ensemble", "single"]
    sentence: str
    members: list[_Member] = Field(min_length=1)
    single: _Single
    considered: list[int]
    looked_at: _Look | None = None
    cells: int
    adapted_rand_error: float | None = None
    adapted_rand_error_foreground: float | None = None
    f1_iou50: float | None = None


def kept_facts(folder: Path | None) -> dict[str, Any] | None:
    """Return what was found of the ensemble of a study, or None where none was looked for.

    Raises:
        InputError: The file is damaged, or not one that `ensemble` wrote.
    """
    path = None if folder is None else folder / FACTS
    if path is None or not path.is_file():
        return None
    facts: dict[str, Any] = read_json(path)
    try:
        _Facts.model_validate(facts if isinstance(facts, dict) else {})
    except ValidationError as error:
        first = error.errors()[0]
        place = "".join(f"{part}: " for part in first["loc"])
        raise InputError(
            f"{path}: is not what `ensemble` writes ({place}{first['msg']}). Make it again with "
            f"{_command(folder)}."
        ) from error
    return facts


def _facts_before(folder: Path) -> dict[str, Any] | None:
    """Return what was found before; None also where that cannot be read, and is made anew."""
    with suppress(InputError):
        return kept_facts(folder)
    return None


def outdated(study: Study, facts: Mapping[str, Any]) -> str | None:
    """Return that an ensemble was looked for among other trials than there are now, or None.

    Args:
        study: Open.
        facts: Of the ensemble.
    """
    before, now = facts["considered"], _complete(study)
    if set(before) == set(now):
        return None
    return (
        f"The ensemble was looked for among {counted(len(before), 'complete trial')}; the study "
        f"has {len(now)} now. Look again with {_command(study.out)}."
    )


def _command(folder: Path | None) -> str:
    """Return the command that looks for the ensemble of a study."""
    return f"`{shlex.join(['hydralv-tune', 'ensemble', str(folder or 'FOLDER')])}`"


def export_ensemble(
    storage: str, name: str, out: Path, folder: Path | None = None, *, table: Path | None = None
) -> dict[str, Any]:
    """Write the ensemble of a study, networks and thresholds, and return where and how to use it.

    Args:
        storage: Of the study.
        name: Of the study.
        out: The YAML file; the checkpoint goes beside it under the same stem. A .safetensors file
            there, of an earlier export of one network, is removed.
        folder: Where the study is now; where the database says so by default.
        table: Also write all trials here, as CSV or Parquet by its suffix.

    Raises:
        StudyError: No such storage or study.
        InputError: None was looked for, the best trial alone was kept, a suffix is unknown, or a
            file of the study is gone or would be replaced. Nothing is written then.
    """
    if table is not None:
        check_table(table)
    study = open_readonly(storage, name, folder)
    try:
        check_places(study, out, table)
        facts = kept_facts(study.out)
        if facts is None or study.out is None:
            raise InputError(
                f"export --ensemble: study '{name}' has none yet. Look for it with "
                f"{_command(study.out)}."
            )
        if facts["kept"] != "ensemble":
            raise InputError(
                f"export --ensemble: {facts['sentence']} Export that trial, without --ensemble."
            )
        for path in (study.out / WEIGHTS, study.out / THRESHOLDS):
            if not path.is_file():
                raise InputError(
                    f"export --ensemble: {path} is gone. Make it again with {_command(study.out)}."
                )
        best = chosen_trial(study, int(facts["members"][0]["trial"]))
        guard, f1 = study.space.objective.guard.f1_iou50, facts.get("f1_iou50")
        told = outdated(study, facts)
        warnings = [] if told is None else [told]
        if f1 is None or f1 < guard:
            warnings.append(
                f"The ensemble does not meet the guard of F1 ≥ {guard:g} (F1 {figure(f1)})."
            )
        checkpoint, other = out.with_suffix(".ckpt"), out.with_suffix(".safetensors")
        write_atomically(checkpoint, (study.out / WEIGHTS).read_bytes())
        if other.is_file():
            other.unlink()
            warnings.append(f"{other} held the weights of an earlier export and was removed.")
        write_atomically(out, (study.out / THRESHOLDS).read_bytes())
        commands = own_commands(best, out, checkpoint)
        certificate = write_certificate(best, out, facts)
    finally:
        study.close()
    document: dict[str, Any] = {
        "out": str(out),
        "checkpoint": str(checkpoint),
        "certificate": str(certificate),
        # It is made of trials; none of it can be trained in one.
        "commands": [line for line in commands if not line.startswith("hydralv-tune train")],
        "warnings": warnings,
    }
    if table is not None:
        document["table"] = str(write_table(storage, name, table))
    return document


def _complete(study: Study) -> list[int]:
    """Return the numbers of the complete trials of a study itself, the best first."""
    views = [
        view
        for view in study.trials()
        if view.state == "COMPLETE" and not (view.is_imported or view.is_foreign)
    ]
    views.sort(key=lambda view: rank(view.violation, view.value, view.number))
    return [view.number for view in views]


def _candidates(
    study: Study, began: float, limit_s: float | None, device: str, say: Say
) -> tuple[list[_Candidate], list[Volume], list[str]]:
    """Return the best trials that were scored on the same, what that is, and who is left out."""
    found: list[_Candidate] = []
    volumes: list[Volume] = []
    left_out: list[str] = []
    complete = _complete(study)
    for number in complete:
        late = limit_s is not None and time.perf_counter() - began > PREDICTION_SHARE * limit_s
        if len(found) == CANDIDATES or (late and len(found) > 1):
            left_out.append(f"{len(complete) - len(found)} trials behind the first {len(found)}")
            break
        try:
            trial = chosen_trial(study, number)
            plan = split_of(trial)
            for path in fold_checkpoints(trial, plan):
                load_checkpoint(path)
        except (InputError, OSError) as error:
            left_out.append(f"trial {number}: {error}")
            continue
        if found and trial.step.name != found[0].trial.step.name:
            left_out.append(f"trial {number}: decoded otherwise than the best one")
            continue
        parts = [part for fold in plan.folds for part in fold.score]
        if found and [*map(describe, parts)] != [*map(describe, volumes)]:
            left_out.append(f"trial {number}: scored on other parts than the best one")
            continue
        say(f"Trial {number} is predicted where it was scored.")
        start = time.perf_counter()
        maps = [maps for _, maps in predicted_parts(trial, plan, device)]
        found.append(_Candidate(trial, plan, maps, time.perf_counter() - start))
        volumes = volumes or parts
    if len(found) < 2:
        because = f" Left out: {'; '.join(left_out)}." if left_out else ""
        there = "there are 0."
        if found:
            there = (
                f"there is 1: trial {found[0].trial.view.number}, the best. What is averaged with "
                "it needs its channels, its decoder and its scored parts."
            )
        raise StudyError(
            f"Study '{study.name}': an ensemble needs two complete trials with checkpoints, and "
            f"{there}{because}"
        )
    return found, volumes, left_out


def _facts(
    study: Study, found: Sequence[_Candidate], chosen: CrossFitted, left_out: Sequence[str],
    look: Mapping[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """Return what the command says, as plain JSON types."""
    objective = study.space.objective
    kept = "ensemble" if chosen.is_better else "single"
    if _saw_more(study, look):
        kept = "earlier"
    single = found[chosen.single[0]]

    def trials(picks: Picks) -> dict[str, float]:
        return {str(found[one].trial.view.number): share for one, share in shares_of(picks).items()}

    picked = [(found[one], share) for one, share in shares_of(chosen.picks).items()]
    cost = sum(one.seconds * len(one.checkpoints) for one, _ in picked) / single.seconds
    facts: dict[str, Any] = {
        "study": study.name,
        "kept": kept,
        "members": [
            {
                "trial": one.trial.view.number,
                "share": share,
                "networks": len(one.checkpoints),
                "architecture": one.trial.candidate.model.architecture,
                "value": one.trial.view.value,
            }
            for one, share in sorted(picked, key=lambda pair: -pair[1])
        ],
        **_summary(chosen.metrics),
        "objective": objective.metric,
        "gain": chosen.gain,
        "gain_interval": list(chosen.interval),
        "single": {"trial": single.trial.view.number, **_summary(chosen.single_metrics)},
        "where_chosen": _summary(chosen.point.metrics),
        "prediction_cost": cost,
        "folds": [
            {"ensemble": trials(picks), "single": trials(alone)} for picks, alone in chosen.folds
        ],
        "cells": chosen.cells,
        "decoding": {"name": single.trial.step.name, "kwargs": chosen.point.arguments},
        "considered": _complete(study),
        "looked_at": dict(look),
        "left_out": list(left_out),
    }
    return {**facts, "sentence": _sentence(facts)}


def _saw_more(study: Study, look: Mapping[str, Any]) -> bool:
    """Return whether an earlier look, of which an ensemble is kept, saw more than one now.

    Args:
        study: Open.
        look: How many `trials` were looked at, `members` at most, and the limit `timeout_s`.
    """
    assert study.out is not None, "checked before"
    facts = _facts_before(study.out)
    earlier = None if facts is None else facts.get("looked_at")
    if facts is None or earlier is None or facts["kept"] != "ensemble":
        return False
    if not all((study.out / name).is_file() for name in (WEIGHTS, THRESHOLDS)):
        return False
    limits = [math.inf if one["timeout_s"] is None else one["timeout_s"] for one in (earlier, look)]
    return (
        earlier["members"] > look["members"]
        or earlier["trials"] > look["trials"]
        or (limits[0] > limits[1] and set(facts["considered"]) == set(_complete(study)))
    )


def _summary(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return the figures that every summary has."""
    return {name: metrics[name] for name in SUMMARY if metrics.get(name) is not None}


def _sentence(facts: Mapping[str, Any]) -> str:
    """Return what was found, as a reader needs it."""
    verdict = f"trial {facts['single']['trial']} alone is kept"
    if facts["kept"] == "earlier":
        verdict = (
            f"the ensemble that an earlier look at more found is kept (delete {FACTS} and look "
            "again to replace it)"
        )
    if facts["looked_at"]["members"] == 1:
        return f"No average was looked for, since one member was asked for: {verdict}."
    if len(facts["members"]) == 1:
        return f"No average of trials is better than the best of them alone: {verdict}."
    names = ", ".join(f"{one['trial']} ({one['share']:.2g})" for one in facts["members"])
    low, high = facts["gain_interval"]
    what = METRICS[facts["objective"]].cost_label
    change = (
        f"Averaging trials {names} changes {what} by {signed(-facts['gain'])} "
        f"({LEVEL:.0%} interval {signed(-high)} to {signed(-low)}, over {facts['cells']} parts of "
        "space) against the best single trial, on instances that neither selection nor thresholds "
        "saw"
    )
    if facts["kept"] == "ensemble":
        times = f"{facts['prediction_cost']:.1f} times"
        return f"{change}. It is kept; prediction takes {times} as long."
    found = (
        "It is worse" if high < 0 else "That is within the noise" if low <= 0 else "It is better"
    )
    return f"{change}. {found}: {verdict}."


def _write(
    study: Study, found: Sequence[_Candidate], chosen: CrossFitted, facts: dict[str, Any]
) -> None:
    """Write the facts, and networks and thresholds where the ensemble is kept; none beside more."""
    assert study.out is not None, "checked before"
    weights, thresholds = study.out / WEIGHTS, study.out / THRESHOLDS
    if facts["kept"] == "earlier":
        facts |= {"out": str(thresholds), "checkpoint": str(weights)}
        return
    if facts["kept"] == "ensemble":
        members = []
        for one, share in shares_of(chosen.picks).items():
            paths = found[one].checkpoints
            for path in paths:
                content = load_checkpoint(path)
                kept = {key: content[key] for key in ("version", "candidate", "weights")}
                members.append({**kept, "share": share / len(paths)})
        write_weights(weights, {"format": FORMAT, "version": FORMAT_VERSION, "members": members})
        first = found[max(shares_of(chosen.picks).items(), key=lambda pair: pair[1])[0]].trial
        step = decoding_step(facts["decoding"]["name"], facts["decoding"]["kwargs"])
        lines = [
            f"The ensemble of study '{study.name}': {len(members)} networks, in the checkpoint of "
            "the same name beside this file.",
            facts["sentence"],
            f"What stands below but for the thresholds is trial {first.view.number}, its heaviest; "
            "`train` of this file trains that one alone.",
        ]
        write_atomically(thresholds, exported_text(replace(first, step=step), lines).encode())
        facts |= {"out": str(thresholds), "checkpoint": str(weights)}
    else:
        for path in (weights, thresholds):
            path.unlink(missing_ok=True)
        facts |= {"out": None, "checkpoint": None}
    write_json(study.out / FACTS, facts)
