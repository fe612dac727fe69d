"""How a study stands now, from its database alone: counts, best, running trials, time left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from typing import Any

import sqlalchemy
from optuna.trial import TrialState

from hydralv_tune.numerics.formatting import duration
from hydralv_tune.study.database import database_errors
from hydralv_tune.study.optuna_private import trial_id
from hydralv_tune.study.study import Study
from hydralv_tune.study.trial_views import (
    GRACE_S,
    TrialView,
    best_trial,
    count_outcomes,
    describe_best,
    seconds_left,
)


@dataclass(frozen=True)
class RunningTrial:
    """One trial that runs.

    Args:
        number: Number of the trial.
        root: Number of its first attempt, which names its folder.
        recipe: Recipe or architecture, where that is known.
        epoch: Epochs done at the last evaluation.
        epochs: Epochs in all.
        evaluation: Evaluations done.
        evaluations: Evaluations in all.
        value: Objective of its best checkpoint so far.
        f1: F1 at IoU 0.5 of that checkpoint.
        spent_s: Seconds since it was asked for.
        left_s: Seconds that it still needs, or may still take; None where nothing tells.
        most_s: Seconds that its time limit leaves it; None without a limit.
        heard_s: Seconds since its driver's last sign of life; None where there was none.
        host: Machine that it runs on.
    """

    number: int
    root: int
    recipe: str | None
    epoch: int | None
    epochs: int | None
    evaluation: int
    evaluations: int | None
    value: float | None
    f1: float | None
    spent_s: float
    left_s: float | None
    most_s: float | None
    heard_s: float | None
    host: str | None

    @property
    def is_silent(self) -> bool:
        """Return whether its driver has not been heard of for so long that nobody works on it."""
        return self.heard_s is not None and self.heard_s > GRACE_S


@dataclass(frozen=True)
class StudyProgress:
    """A study at one moment.

    Args:
        study: Name of the study.
        target: Finished trials that it aims at.
        counts: Trials by state; interrupted ones, which go on, stand apart from the failed.
        best: As `describe_best` gives it.
        running: The running trials.
        left_s: Seconds until the target is reached; None where no trial says how long one takes.
        guard_f1: F1 at IoU 0.5 under which a trial violates the guard.
        at: When this was read.
    """

    study: str
    target: int
    counts: Mapping[str, int]
    best: Mapping[str, Any] | None
    running: Sequence[RunningTrial]
    left_s: float | None
    guard_f1: float
    at: datetime = field(default_factory=datetime.now)

    @property
    def warnings(self) -> list[str]:
        """Return what is wrong with the running trials."""
        silent = [trial for trial in self.running if trial.is_silent]
        if not silent:
            return []
        names = " and ".join(str(trial.number) for trial in silent[:3])
        names += f" and {len(silent) - 3} more" if len(silent) > 3 else ""
        heard = min(trial.heard_s or 0.0 for trial in silent)
        return [
            f"nothing was heard of trial {names} for {duration(heard)}: nobody works on it any "
            "more. The command that started the study goes on with it."
        ]

    def as_facts(self) -> dict[str, Any]:
        """Return what `status --json` prints beside the study's facts, while trials run."""
        if not self.running:
            return {}
        return {
            "target": self.target,
            "left_s": self.left_s,
            "running": [asdict(trial) for trial in self.running],
        }

    @property
    def finished(self) -> int:
        """Return how many trials are complete or pruned."""
        return self.counts["complete"] + self.counts["pruned"]


def study_progress(study: Study, target: int | None = None) -> StudyProgress:
    """Return how a study stands.

    Args:
        study: An open study.
        target: Finished trials that it aims at; what the last `run` wanted by default.

    Raises:
        DatabaseAway: The database does not answer.
    """
    views, now = study.trials(), datetime.now()
    aim = target or study.wanted
    ages = _heartbeat_ages(study)
    limit_s = study.space.budget.trial_timeout_s
    running = [_running(v, ages.get(v.number), limit_s, now) for v in views if v.state == "RUNNING"]
    return StudyProgress(
        study=study.name,
        target=aim,
        counts=count_outcomes(views),
        best=describe_best(best_trial(views)),
        running=running,
        left_s=time_left(views, running, aim),
        guard_f1=study.space.objective.guard.f1_iou50,
        at=now,
    )


def _running(
    view: TrialView, heard_s: float | None, limit_s: float | None, now: datetime
) -> RunningTrial:
    """Return a running trial; `limit_s` is what a trial may take."""
    known = view.user_attrs
    spent = 0.0 if view.started is None else (now - view.started).total_seconds()
    left = known.get("left_s")
    if left is None:
        left = seconds_left({**known, "seconds": known.get("spent_s")})
    if left is not None:
        # The time since that was told is gone too, or the clock would stand still until the next.
        at = known.get("evaluated_at")
        since = (
            spent - float(known["spent_s"])
            if at is None  # an older driver: what starting the worker took counts as gone
            else now.timestamp() - float(at)
        )
        left = max(float(left) - max(since, 0.0), 0.0)
    most = None if limit_s is None else max(limit_s - spent, 0.0)
    if left is not None and most is not None:
        left = min(left, most)
    recipe = known.get("warm_start") or known.get("architecture")
    running = RunningTrial(
        number=view.number,
        root=view.root,
        recipe=None if recipe is None else str(recipe),
        epoch=known.get("epoch"),
        epochs=known.get("epochs"),
        evaluation=max(view.intermediate, default=0),
        evaluations=known.get("evaluations"),
        value=view.intermediate[max(view.intermediate)] if view.intermediate else None,
        f1=known.get("f1_iou50"),
        spent_s=spent,
        left_s=left,
        most_s=most,
        heard_s=heard_s,
        host=known.get("host"),
    )
    return replace(running, left_s=None, most_s=None) if running.is_silent else running


def time_left(
    views: Sequence[TrialView], running: Sequence[RunningTrial], target: int
) -> float | None:
    """Return the seconds until so many trials are finished, on as many places as are taken now.

    What the running trials still need, and what those that are missing beside them will take, is
    shared by the places. What one takes is known from those that ended, before that from those
    that run. None where neither says.
    """
    running = [trial for trial in running if not trial.is_silent]
    ended = [v for v in views if v.state in ("COMPLETE", "PRUNED") and not v.is_imported]
    taken = [view.seconds for view in ended] or [
        trial.spent_s + trial.left_s for trial in running if trial.left_s is not None
    ]
    usual = sum(taken) / len(taken) if taken else None
    rest = [usual if trial.left_s is None else trial.left_s for trial in running]
    finished = [view for view in ended if not view.is_repeat]
    missing = max(target - len(finished) - len(running), 0)
    missing += sum(view.is_repeat and view.state == "WAITING" for view in views)
    if missing:
        rest += [usual] * missing
    if any(seconds is None for seconds in rest):
        return None
    return sum(seconds for seconds in rest if seconds is not None) / max(len(running), 1)


def _heartbeat_ages(study: Study) -> dict[int, float]:
    """Return the seconds since each running trial's sign of life, by the database's clock."""
    beats = sqlalchemy.table(
        "trial_heartbeats",
        sqlalchemy.column("trial_id"),
        sqlalchemy.column("heartbeat", sqlalchemy.DateTime),
    )
    numbers = {trial_id(t): t.number for t in study.frozen() if t.state == TrialState.RUNNING}
    if not numbers:
        return {}
    query = sqlalchemy.select(beats.c.trial_id, beats.c.heartbeat, sqlalchemy.func.now()).where(
        beats.c.trial_id.in_(list(numbers))
    )
    with database_errors(), study.rdb.engine.connect() as connection:
        rows = connection.execute(query).all()
    return {
        numbers[trial]: (at.replace(tzinfo=None) - beat.replace(tzinfo=None)).total_seconds()
        for trial, beat, at in rows
    }
