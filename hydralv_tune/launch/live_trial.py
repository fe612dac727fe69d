"""A trial that a driver runs now: since when, whether it takes too long, what is kept of it."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from hydralv_tune.study.trial_views import Asked

# A process has this long at least to say that it works: PyTorch from a cold disk, a large state
# from a store, and the two minutes that an earlier attempt gets to leave the folder.
LEAST_START_S = 300.0
# Of its limit: a worker ends by itself at the limit, and has to score and draw what it has.
HANGS_AFTER = 1.5
# User attributes are read by every ask; whatever is large belongs into the trial's folder.
MAX_ATTRIBUTE_CHARACTERS = 20_000
KEPT = (
    "metrics", "losses", "decoding", "checkpoint", "record", "sweep", "verdicts", "notes",
    "device", "split", "training", "folds", "weights", "epoch", "noise",
)  # fmt: skip

KillReason = Literal["refused", "interrupted", "hang", "no start"]


@dataclass
class LiveTrial:
    """A trial that this driver runs now.

    Args:
        asked: What was asked for.
        placed: Clock when Ray had a process for it; before that it waits for a place.
        started: Clock when its worker said that it works.
        last: Its last evaluation.
        where: What its worker said of where it runs.
        progress: Steps and loss that its worker said last.
        began: Clock and steps when its worker first said how many are done.
        told: Clock when its steps were last written into the database.
        plan: Its recipe and what it sets out to do: architecture, epochs, evaluations.
        kill_reason: Why its process is to be ended, once that is decided.
    """

    asked: Asked
    placed: float | None = None
    started: float | None = None
    last: dict[str, Any] = field(default_factory=dict)
    where: dict[str, Any] = field(default_factory=dict)
    progress: dict[str, Any] = field(default_factory=dict)
    began: tuple[float, int] | None = None
    told: float = -math.inf
    plan: dict[str, Any] = field(default_factory=dict)
    kill_reason: KillReason | None = None

    def reached(self) -> dict[str, Any]:
        """Return epoch and epochs that its training has reached, as far as they are known."""
        epochs, epoch = self.plan.get("epochs"), self.last.get("epoch")
        if epochs and self.progress.get("total"):
            epoch = int(self.progress["done"] / self.progress["total"] * epochs)
        return {"epoch": epoch, "epochs": epochs}

    def advance(self, progress: Mapping[str, Any]) -> dict[str, Any]:
        """Take in steps and loss, and return them with the pace of this attempt.

        Args:
            progress: `done` and `total` steps, those of earlier attempts included, and `loss`.

        Returns:
            The same with `step_s`, seconds a step, evaluations included, and `left_s`.
        """
        now, done, total = time.monotonic(), progress.get("done"), progress.get("total")
        self.progress = dict(progress)
        if done is not None and self.began is None:
            self.began = now, done
        elif done is not None and self.began is not None and done > self.began[1]:
            step_s = (now - self.began[0]) / (done - self.began[1])
            left = None if total is None else step_s * (total - done)
            self.progress |= {"step_s": step_s, "left_s": left}
        return self.progress

    @property
    def seconds(self) -> float:
        """Return how long it has held its place; 0 before it has one."""
        return 0.0 if self.placed is None else time.monotonic() - self.placed

    def overdue(self, limit_s: float | None) -> KillReason | None:
        """Return whether it hangs, at work or before, or None.

        Args:
            limit_s: `budget.trial_timeout_s`; None: nothing is too long.
        """
        limit = limit_s or math.inf
        if self.started is not None:
            return "hang" if time.monotonic() - self.started > HANGS_AFTER * limit else None
        # One that waits for a place in a busy cluster is in nobody's way.
        return "no start" if self.seconds > max(limit, LEAST_START_S) else None


def kept_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parts of a record or an evaluation that belong into the database."""
    return {
        key: value
        for key, value in record.items()
        if key in KEPT and value is not None and len(json.dumps(value)) <= MAX_ATTRIBUTE_CHARACTERS
    }
