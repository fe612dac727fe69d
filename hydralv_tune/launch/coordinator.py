"""What a driver does with Ray Tune's requests, results, ends and signals.

It knows neither Ray nor Optuna: `ray_adapters` connects it to Ray Tune, `study.driver` to Optuna.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from hydralv_tune.config.errors import ConfigError, HydraLVError
from hydralv_tune.config.search_space import SearchSpace, guard_violation, objective_value
from hydralv_tune.launch.live_trial import HANGS_AFTER, LiveTrial, kept_of
from hydralv_tune.numerics.metrics.registry import HEADLINE
from hydralv_tune.study.database import DatabaseAway, StudyGone
from hydralv_tune.study.driver import Driver
from hydralv_tune.study.ending import nothing_to_gain, trial_under_goal
from hydralv_tune.study.trial_views import Asked, TrialResult, count_states, gpu_hours

ASK_EVERY_S = 0.5
"""Between two questions whether there is another trial, where the answer was to wait."""

REST = 10.0
"""How much longer than the last answer took the pause before the next question is."""

POLL_EVERY_S = 3.0
TELL_EVERY_S = 30.0
"""How often the database is told how far a trial is between two evaluations."""
AWAY_RETRY_S = 2.0
MAX_CONSECUTIVE_FAILURES = 12

EventKind = Literal[
    "trial_started",
    "stage",
    "progress",
    "evaluation",
    "trial_finished",
    "trial_pruned",
    "trial_failed",
    "retry",
    "waiting",
    "stopped",
]


TrialHook = Callable[[Driver, int, str, Mapping[str, Any]], None]


@dataclass(frozen=True)
class Event:
    """Something that happened in a running study, for a live view.

    Args:
        kind: What.
        number: Of which trial; None where it is the whole study.
        fields: Figures and reasons by name.
    """

    kind: EventKind
    number: int | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)


RAY_DIED = "Ray's daemons on this machine died. Run the same command again to go on."


class StudyFailed(HydraLVError):
    """The work itself is broken, every trial fails or Ray died: going on would not help."""


class Coordinator:
    """The state of one `run`.

    Args:
        driver: An entered driver of the study.
        trials: COMPLETE and PRUNED trials wanted in all.
        again: Whether the search is over, and the best trials are trained again.
        specification: Returns the mapping of a trial's `TrialSpec`; may raise `ConfigError`.
        slots: Returns how many trials can run at once.
        gpus_per_trial: For the record and the budget.
        timeout_s: Wall clock of this run, or None.
        save_s: Seconds that workers get to save after a stop.
        on_event: Takes each event.
        on_trial_end: Called with driver, number, state and attributes before a trial is told.
        on_trial_running: Called alike when a trial starts and after each of its evaluations.
        ray_is_alive: Whether Ray can still run anything.
    """

    def __init__(
        self,
        driver: Driver,
        *,
        trials: int,
        again: bool = False,
        specification: Callable[[Asked], dict[str, Any]],
        slots: Callable[[], int],
        gpus_per_trial: float,
        timeout_s: float | None,
        save_s: float,
        on_event: Callable[[Event], None] | None,
        on_trial_end: TrialHook | None,
        on_trial_running: TrialHook | None = None,
        ray_is_alive: Callable[[], bool] = lambda: True,
    ) -> None:
        self.driver, self.trials = driver, trials
        self._ask = driver.ask_again if again else driver.ask
        self._again = again
        self.space: SearchSpace = driver.space
        self.live: dict[str, LiveTrial] = {}
        self.stop_wanted: str | None = None  # set by a signal, met at the next turn
        self.stop_reason: str | None = None
        self.failure: HydraLVError | None = None
        self.search_is_over = False  # its number or its goal is reached, or nothing is left to try
        self._stop_deadline = math.inf
        self._specification, self._slots = specification, slots
        self._gpus, self._save_s = gpus_per_trial, save_s
        self._deadline = time.monotonic() + timeout_s if timeout_s else math.inf
        self._on_event = on_event
        self._on_trial_end, self._on_trial_running = on_trial_end, on_trial_running
        self.ray_is_alive = ray_is_alive
        self._next_ask = self._next_poll = 0.0
        self._away_said = False
        self._failed_in_a_row = 0

    def suggest(self, key: str) -> dict[str, Any] | Literal["wait", "done"]:
        """Return the specification of the next trial, or whether to wait or to end.

        Args:
            key: Ray's name of the trial that would run it.
        """
        now = time.monotonic()
        if self.stop_reason is not None:
            return "done"
        if now < self._next_ask or len(self.live) >= self._slots():
            return "wait"
        try:
            if self._budget_is_spent():
                return "done"
            asked = self._ask(self.trials)
        except DatabaseAway as error:
            self._away(error)
            self._next_ask = now + AWAY_RETRY_S
            return "wait"
        except StudyGone as error:
            self.driver.gone = self.driver.gone or error
            asked = "done"
        self._away_said = False
        if asked == "done":
            if not self._stop_if_gone() and not self._again:
                self.search_is_over = True
                self._say_if_exhausted()
            return "done"
        if asked == "wait":
            answered = time.monotonic()
            self._next_ask = answered + max(ASK_EVERY_S, REST * (answered - now))
            return "wait"
        return self._start(key, asked)

    def placed(self, key: str) -> None:
        """Note that Ray has started a process for a trial, which may hang before it works."""
        if (live := self.live.get(key)) is not None and live.placed is None:
            live.placed = time.monotonic()

    def started(self, key: str) -> None:
        """Note that a trial's worker has begun."""
        self.placed(key)
        if (live := self.live.get(key)) is not None and live.started is None:
            live.started = time.monotonic()

    def on_message(self, key: str, message: dict[str, Any]) -> Literal["go", "stop"]:
        """Handle a worker's message, and return whether the trial goes on.

        Args:
            key: Ray's name of the trial.
            message: As `worker.run_worker` sends it.
        """
        live = self.live.get(key)
        if live is None:
            return "stop"
        self.started(key)
        kind = message["kind"]
        if kind == "started":
            live.where = {k: v for k, v in message.items() if k != "kind"}
            self.driver.describe(live.asked.number, {"host": live.where.get("host")})
            return "go"
        if kind == "progress":
            progress = live.advance({k: v for k, v in message.items() if k != "kind"})
            self.emit("progress", live.asked.number, seconds=live.seconds, **progress)
            if time.monotonic() - live.told > TELL_EVERY_S:
                live.told = time.monotonic()
                told = {"epoch": live.reached()["epoch"], "left_s": progress.get("left_s")}
                self.driver.describe(live.asked.number, {**told, "evaluated_at": time.time()})
            return "go"
        if kind == "evaluation":
            return self._evaluate(key, live, message)
        if kind == "final":
            self._finish(key, live, message["record"])
        elif kind == "failed":
            self._fail(key, live, message["reason"], message["retry"], message)
        else:
            self._interrupted(key, live)
        return "stop"

    def on_death(self, key: str, reason: str) -> None:
        """Handle the death of a trial's process, killed on purpose or not.

        Args:
            key: Ray's name of the trial.
            reason: What is known of it.
        """
        live = self.live.get(key)
        if live is None:
            return
        self._stop_without_ray()
        if live.kill_reason == "interrupted" or self.stop_reason is not None:
            self._interrupted(key, live)
        elif live.kill_reason == "hang":
            limit = HANGS_AFTER * (self.space.budget.trial_timeout_s or 0)
            self._fail(key, live, f"timeout: still running after {limit:g} s", "no")
        elif live.kill_reason == "no start":
            reason = f"timeout: its process had not started after {live.seconds:.0f} s"
            self._fail(key, live, reason, "counted")  # the machine's fault, not the trial's
        elif live.kill_reason == "refused":
            self._refused(key, live)
        else:
            self._fail(key, live, reason, "counted")

    def tick(self) -> list[str]:
        """Do the periodic work, and return Ray's names of the trials to be ended.

        Raises:
            StudyFailed: Ray died.
        """
        now = time.monotonic()
        self._stop_if_gone()
        if self._stop_without_ray():
            self.abandon()
            raise StudyFailed(RAY_DIED)
        if self.stop_wanted is not None:
            self.stop(self.stop_wanted)
        if now > self._deadline:
            self.stop("the time of this run is over")
        if now > self._next_poll:
            self._next_poll = now + POLL_EVERY_S
            self._poll()
        for live in self.live.values():
            if now > self._stop_deadline or (self.stop_reason and live.started is None):
                live.kill_reason = live.kill_reason or "interrupted"
            live.kill_reason = live.kill_reason or live.overdue(self.space.budget.trial_timeout_s)
        return [key for key, live in self.live.items() if live.kill_reason is not None]

    def stop(self, reason: str) -> None:
        """Ask for no more trials and let the running ones save; they are enqueued again.

        Args:
            reason: For people.
        """
        if self.stop_reason is None:
            self.stop_reason = reason
            self._stop_deadline = time.monotonic() + self._save_s
            self.emit("stopped", None, reason=reason)

    def _stop_if_gone(self) -> bool:
        """Stop the run where the study is gone from its database, and return whether it is."""
        reason = self.driver.gone_reason
        if reason is not None and self.failure is None:
            self.failure = StudyFailed(reason)
            self.stop("the study is gone from its database")
        return reason is not None

    def _stop_without_ray(self) -> bool:
        """Stop the run where Ray died, and return whether it did."""
        dead = not self.ray_is_alive()
        if dead:
            self.stop("Ray died")
        return dead

    def on_losses(self, reason: str) -> None:
        """Handle that Ray gave up all live trials at once, whichever of them caused it.

        Args:
            reason: What is known of it.
        """
        for key in list(self.live):
            self.on_death(key, reason)

    def abandon(self) -> None:
        """Tell Optuna that every live trial was interrupted: Ray or this process ends."""
        for key, live in list(self.live.items()):
            self._interrupted(key, live)

    def emit(self, kind: EventKind, number: int | None, **fields: Any) -> None:
        """Hand an event to whoever watches."""
        if self._on_event is not None:
            self._on_event(Event(kind, number, fields))

    def _start(self, key: str, asked: Asked) -> dict[str, Any] | Literal["wait"]:
        """Return the specification of a trial that was just asked for."""
        live = LiveTrial(asked)
        self.live[key] = live
        try:
            spec = self._specification(asked)
        except ConfigError as error:
            self._fail(key, live, f"config: {error}", "no")
            return "wait"
        if asked.retry_of is not None:
            self.emit("retry", asked.number, retry_of=asked.retry_of, attempt=asked.attempt)
        self.emit(
            "trial_started",
            asked.number,
            params=dict(asked.params),
            warm_start=asked.warm_start,
            attempt=asked.attempt,
            **_plan(spec.get("candidate") or {}),
        )
        self.driver.describe(asked.number, _plan(spec.get("candidate") or {}))
        live.plan = {"warm_start": asked.warm_start, **_plan(spec.get("candidate") or {})}
        self._publish(self._on_trial_running, live, "RUNNING", live.plan)
        return spec

    def _evaluate(
        self, key: str, live: LiveTrial, message: dict[str, Any]
    ) -> Literal["go", "stop"]:
        """Report an evaluation and return whether the trial goes on."""
        number = live.asked.number
        live.last = message
        step, value = int(message["step"]), float(message["value"])
        metrics = message.get("metrics") or {}
        violation = guard_violation(
            message.get("best_f1_iou50", metrics.get("f1_iou50")), self.space.objective
        )
        self.driver.describe(
            number,
            {
                "epoch": message.get("epoch"),
                "f1_iou50": message.get("best_f1_iou50", metrics.get("f1_iou50")),
                "spent_s": message.get("seconds"),
                "left_s": live.progress.get("left_s"),
                "evaluated_at": time.time(),
            },
        )
        decision = self.driver.report(number, step, value, violation, message.get("best_folds"))
        fields = {k: v for k, v in message.items() if k not in ("kind", "metrics", "losses")}
        shown = {**fields, **metrics, "losses": message.get("losses")}
        self.emit("evaluation", number, **shown)
        if decision == "refused":
            self._refused(key, live)
            return "stop"
        if decision == "prune":
            self._tell(
                key,
                live,
                "PRUNED",
                violation=violation,
                reason=f"pruned at evaluation {step}",
                resumable=True,
                **kept_of(message),
            )
            return "stop"
        self._publish(
            self._on_trial_running, live, "RUNNING", {**live.plan, **live.where, **message}
        )
        return "go"

    def _finish(self, key: str, live: LiveTrial, record: dict[str, Any]) -> None:
        """Tell Optuna the result of a trial that was trained to its end."""
        metrics = record.get("metrics") or {}
        try:
            value = objective_value(metrics, self.space.objective)
        except (KeyError, TypeError, ValueError):
            value = math.nan
        if not math.isfinite(value):
            self._fail(key, live, "the objective is not a number", "no")
            return
        self._tell(
            key,
            live,
            "COMPLETE",
            value=value,
            violation=guard_violation(metrics.get("f1_iou50"), self.space.objective),
            **kept_of(record),
        )

    def _fail(
        self,
        key: str,
        live: LiveTrial,
        reason: str,
        retry: str,
        message: Mapping[str, Any] | None = None,
    ) -> None:
        """Tell Optuna that a trial failed."""
        extra = {k: message[k] for k in ("stage", "traceback") if message and k in message}
        kept = {**kept_of(live.last), **extra}
        if self._tell(key, live, "FAIL", retry=retry, reason=reason, **kept):
            self._failed_in_a_row += 1
            self._stop_if_all_fail(reason)

    def _interrupted(self, key: str, live: LiveTrial) -> None:
        """Tell Optuna that a trial was interrupted; it is enqueued again."""
        reason = f"interrupted: {self.stop_reason or 'its driver ended'}"
        self._tell(key, live, "FAIL", retry="free", reason=reason, **kept_of(live.last))

    def _refused(self, key: str, live: LiveTrial) -> None:
        """Forget a trial that another driver has taken over."""
        self.live.pop(key, None)
        reason = self.driver.reason_of(live.asked.number)
        taken = "refused: another driver has taken the trial over"
        self.emit("trial_failed", live.asked.number, reason=reason or taken)

    def _tell(
        self,
        key: str,
        live: LiveTrial,
        state: str,
        *,
        value: float | None = None,
        violation: float | None = None,
        retry: str = "no",
        **attributes: Any,
    ) -> bool:
        """Tell Optuna and the view how a trial ended; return whether it was this driver's."""
        self.live.pop(key, None)
        number = live.asked.number
        known = {
            **live.where,
            "seconds": round(live.seconds, 3),
            "gpus": self._gpus,
            "attempt": live.asked.attempt,
            "root": live.asked.root,
            **{k: v for k, v in attributes.items() if v is not None},
        }
        self._publish(self._on_trial_end, live, state, known)
        told = self.driver.tell(
            number,
            TrialResult(state, value, violation, {**known, "driver": self.driver.name}, retry),
        )
        if told == "refused":
            self._refused(key, live)
            return False
        if state != "FAIL":
            self._failed_in_a_row = 0
        kinds: dict[str, EventKind] = {"COMPLETE": "trial_finished", "PRUNED": "trial_pruned"}
        metrics = known.get("metrics") or {}
        self.emit(
            kinds.get(state, "trial_failed"),
            number,
            value=value,
            reason=known.get("reason"),
            kept=True if told == "kept" else None,
            **live.reached(),
            **{name: metrics.get(name) for name in HEADLINE},
        )  # fmt: skip
        return True

    def _publish(
        self, hook: TrialHook | None, live: LiveTrial, state: str, known: Mapping[str, Any]
    ) -> None:
        """Call a hook with what is known of a trial; a picture or a note must not cost a result."""
        if hook is None:
            return
        number = live.asked.number
        try:
            hook(self.driver, number, state, {"root": live.asked.root, **known})
        except Exception as error:
            warnings.warn(f"trial {number}: not published: {error!r}", stacklevel=2)

    def _budget_is_spent(self) -> bool:
        """Stop the run where the goal is reached or the GPU-hours are used up."""
        trials = self.driver.study.trials()
        goal, first = self.space.objective.stop_at, trial_under_goal(self.space, trials)
        if first is not None and not self._again:
            self.stop(f"trial {first.number} reached the goal: {first.value:.4f} < {goal:g}")
            self.search_is_over = True
        reason = None if self._again else nothing_to_gain(self.space, trials)
        if reason is not None and not self.search_is_over:
            self.search_is_over = True  # what runs goes on to its end
            self.emit("stopped", None, reason=reason)
        limit = self.space.budget.gpu_hours
        if limit is not None and gpu_hours(trials) >= limit:
            self.stop(f"the budget of {limit:g} GPU-hours is spent")
        return self.stop_reason is not None or self.search_is_over

    def _say_if_exhausted(self) -> None:
        """Say so where the run ends because the space has nothing left to try."""
        with suppress(DatabaseAway):
            counts = count_states(self.driver.study.trials())
            finished = counts["complete"] + counts["pruned"]
            if finished < self.trials:
                reached = f"{finished} of {self.trials} trials"
                self.stop(f"the space has no more combinations: {reached}")

    def _stop_if_all_fail(self, reason: str) -> None:
        """End a run in which trial after trial fails; failures of earlier runs do not count.

        Args:
            reason: Of the last failure.
        """
        if self._failed_in_a_row >= MAX_CONSECUTIVE_FAILURES and self.failure is None:
            self.failure = StudyFailed(
                f"Study '{self.driver.study.name}': {self._failed_in_a_row} trials in a row "
                f"failed, the last one with: {reason}. Mend that and run the same command again."
            )
            self.stop("every trial fails")

    def _poll(self) -> None:
        """Tell Optuna the results that wait, and mark trials that the database took away."""
        try:
            lost = self.driver.poll()
        except DatabaseAway as error:
            self._away(error)
            return
        for live in self.live.values():
            if live.asked.number in lost:
                live.kill_reason = "refused"

    def _away(self, error: DatabaseAway) -> None:
        """Say once that the database does not answer."""
        if not self._away_said:
            self._away_said = True
            self.emit(
                "waiting",
                None,
                reason=f"the database does not answer ({error}); results wait in {self.folder}",
            )

    @property
    def folder(self) -> Path:
        """Return where results wait."""
        return self.driver.out


def _plan(candidate: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a candidate sets out to do, as far as it says so."""
    if not candidate:
        return {}
    return {
        "architecture": candidate["model"]["architecture"],
        "epochs": candidate["optimization"]["max_epochs"],
        "evaluations": candidate["monitor"]["evaluation"]["count"],
    }
