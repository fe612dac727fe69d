"""When a trial that failed is tried again: what each kind of failure costs, and who follows whom.

A FAIL says in its attribute `retry` which kind it is: `no` would fail again (a loss that is not
finite, a wrong value), `counted` may succeed (a crash, a full card), and `free` did nothing wrong
(an orphan, an interruption).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hydralv_tune.study.trial_views import (
    OVERRIDES,
    REPEAT_OF,
    REPEATS,
    REVIVED,
    SEED_SHIFT,
    TrialView,
    superseded,
)

MAX_RESTARTS = 20
"""After so many a trial is given up, or one that kills its driver would do so for ever."""


def needs_successor(trial: TrialView, *, retries: int) -> bool:
    """Return whether a FAIL deserves another attempt.

    An orphan and an interrupted trial did nothing wrong and go on without costing an attempt; a
    crash is tried `retries` times more; what would fail again is not tried again.

    Args:
        trial: Any trial.
        retries: `budget.retries`.
    """
    if trial.state != "FAIL":
        return False
    kind = trial.user_attrs.get("retry")
    if kind == "free":
        return int(trial.user_attrs.get("restarts", 0)) < MAX_RESTARTS
    return kind == "counted" and trial.attempt <= retries


def successor_attributes(trial: TrialView) -> dict[str, Any]:
    """Return the user attributes of the attempt that follows a FAIL, or a paused trial."""
    attributes = {
        "root": trial.root,
        "retry_of": trial.number,
        "attempt": trial.attempt + (trial.user_attrs.get("retry") == "counted"),
        "restarts": int(trial.user_attrs.get("restarts", 0))
        + (trial.user_attrs.get("retry") == "free"),
    }
    if trial.state == "PRUNED":
        attributes[REVIVED] = True
    for key in ("warm_start", OVERRIDES, REVIVED, REPEAT_OF, SEED_SHIFT, REPEATS):
        if key in trial.user_attrs:
            attributes[key] = trial.user_attrs[key]
    return attributes


def missing_successors(trials: Sequence[TrialView], *, retries: int) -> list[TrialView]:
    """Return every FAIL that deserves another attempt and has none yet."""
    followed = superseded(trials)
    return [
        trial
        for trial in trials
        if trial.number not in followed and needs_successor(trial, retries=retries)
    ]
