"""What a study's trials say: frozen views, and the rules that count, rank and retry them.

Nothing here knows the database, so every rule can be read and tested on plain values.
"""

from __future__ import annotations

import math
import os
import platform
import socket
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from hydralv_tune.numerics.metrics.registry import HEADLINE

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

FINISHED = ("COMPLETE", "PRUNED")

CONSTRAINTS = "constraints"
"""System attribute of a trial that Optuna, and its dashboard, read constraints from."""

OBJECTIVE = "hydralv_tune:objective"
"""System attribute of a trial: its objective, where Optuna was given another value to rank it."""

BEHIND = 1000.0
"""What a violation of the guard is added to: more than any objective."""

AT_MOST_ONE = ("adapted_rand_error", "adapted_rand_error_foreground", "f1_iou50")
"""Metrics whose objective is never above 1."""

VIOLATIONS = "violations"
"""Attribute of a trial: by how much the guard was violated at each evaluation, by step."""

FOLD_VALUES = "fold_values"
"""Attribute of a cross-validated trial: the objective of each fold, by step."""


RESUMABLE = "resumable"
"""Attribute of a PRUNED trial: its checkpoint is kept, and it may go on from there."""

REVIVED = "revived"
"""Attribute of a trial that goes on after it was pruned; it is pruned no more."""

GUIDED = "guided"
"""Attribute of a trial that earlier studies proposed before a recipe that waits."""

REPEAT_OF = "repeat_of"
"""Attribute of a trial that trains another one again with another seed: the number of that one."""

SEED_SHIFT = "seed_shift"
"""Attribute of such a repeat: what is added to the seed of its candidate, from 1."""

REPEATS = "repeats"
"""Attribute of such a repeat: how many there are to be of the same trial."""

GRACE_S = 120.0
"""Without a sign of life for so long, nobody is thought to work on a trial any more."""

NOISE = "noise"
"""Attribute of a COMPLETE trial: standard deviation of its value over the instances scored."""

OVERRIDES = "overrides"
"""Attribute of a trial: the partial candidate that was enqueued for it."""

LONGEST_FIGURE = 80
"""Characters of a user attribute that still fit a row of the dashboard's table."""

PREFIX = "hydralv_tune:"
"""Of the system attributes in which a trial or a study keeps what nobody sorts or plots."""


def attributes_of(trial: FrozenTrial) -> dict[str, Any]:
    """Return what a trial keeps beside its values.

    The user attributes are short figures that people sort and plot by; all else stands in system
    attributes, since a page shows every user attribute in full. Studies of the first version have
    all in user attributes.
    """
    own = {
        key.removeprefix(PREFIX): value
        for key, value in trial.system_attrs.items()
        if key.startswith(PREFIX)
    }
    return {**trial.user_attrs, **own}


@dataclass(frozen=True)
class TrialView:
    """One trial of a study, as the database has it.

    Args:
        number: Its number in the study.
        state: `COMPLETE`, `PRUNED`, `FAIL`, `RUNNING` or `WAITING`.
        value: The objective, minimised; None where there is none.
        params: Searched values, lists as JSON text (`space.encode`).
        user_attrs: From `attributes_of`: `reason`, `driver`, `host`, `device`, `seconds`,
            `checkpoint`, `metrics`, `decoding`, `losses`, `sweep` and what else was recorded.
        intermediate: Objective so far at each evaluation, by step.
        violation: By how much the study's guard is violated; 0 or less is feasible; None where
            it was never known.
        started: Start in local time.
        finished: End in local time.
        requested: Encoded values that it was enqueued with.
        is_foreign: Whether another program added it, finished, to this study.
    """

    number: int
    state: str
    value: float | None
    params: Mapping[str, Any]
    user_attrs: Mapping[str, Any]
    intermediate: Mapping[int, float]
    violation: float | None
    started: datetime | None
    finished: datetime | None
    requested: Mapping[str, Any] = field(default_factory=dict)
    is_foreign: bool = False

    @property
    def root(self) -> int:
        """Return the number of the first attempt, which names the folder of all attempts."""
        return int(self.user_attrs.get("root", self.number))

    @property
    def attempt(self) -> int:
        """Return which attempt this is, from 1; interruptions are not counted."""
        return int(self.user_attrs.get("attempt", 1))

    @property
    def is_feasible(self) -> bool:
        """Return whether the study's guard holds."""
        return self.violation is None or self.violation <= 0

    @property
    def is_imported(self) -> bool:
        """Return whether it is a trial of an earlier study, which this one only learns from."""
        return "imported_from" in self.user_attrs

    @property
    def is_repeat(self) -> bool:
        """Return whether it trains another trial of this study again with another seed."""
        return REPEAT_OF in self.user_attrs

    @property
    def seconds(self) -> float:
        """Return the seconds it has taken so far; 0 before it starts."""
        recorded = self.user_attrs.get("seconds")
        if isinstance(recorded, int | float):
            return float(recorded)
        if self.started is None:
            return 0.0
        return max(0.0, ((self.finished or datetime.now()) - self.started).total_seconds())


def count_states(trials: Iterable[TrialView]) -> dict[str, int]:
    """Return how many trials are in each state, under the names of the contract.

    Trials imported from another study, or added by another program, are not counted: this study
    did not run them; nor are finished repeats, since the number of trials is one of candidates. One
    that was paused and goes on counts as what it is now.
    """
    counts = dict.fromkeys(("complete", "pruned", "fail", "running", "waiting"), 0)
    known = list(trials)
    gone = superseded(known)
    for trial in known:
        revived = trial.state == "PRUNED" and trial.number in gone
        elsewhere = trial.is_imported or (
            (trial.is_foreign or trial.is_repeat) and trial.state in FINISHED
        )
        if not (revived or elsewhere):
            counts[trial.state.lower()] += 1
    return counts


def count_outcomes(trials: Iterable[TrialView]) -> dict[str, int]:
    """Return the same for people, to whom an interrupted trial, which goes on, is no failure."""
    known = list(trials)
    counts = count_states(known)
    interrupted = sum(trial.user_attrs.get("retry") == "free" for trial in known)
    return {**counts, "fail": counts["fail"] - interrupted, "interrupted": interrupted}


def best_trial(trials: Iterable[TrialView]) -> TrialView | None:
    """Return the best COMPLETE trial, or None; a repeat of another one is none.

    Any feasible trial is better than one that violates the guard; among those that violate it,
    the one nearest to it is best. Where that one was trained again with other seeds, the best is
    the one with the best mean over its seeds among those of which all repeats are complete.
    """
    complete = [t for t in trials if t.state == "COMPLETE" and not (t.is_imported or t.is_foreign)]
    first = min(
        (trial for trial in complete if not trial.is_repeat),
        key=lambda t: rank(t.violation, t.value, t.number),
        default=None,
    )
    repeated = [seeds for seeds in trials_by_seed(complete) if len(seeds) >= wanted_seeds(seeds)]
    if first is None or all(seeds[0].number != first.number for seeds in repeated):
        return first
    return min(repeated, key=mean_rank)[0]


def trials_by_seed(trials: Iterable[TrialView]) -> list[list[TrialView]]:
    """Return each COMPLETE trial that was repeated, with its complete repeats after it."""
    complete = {trial.number: trial for trial in trials if trial.state == "COMPLETE"}
    found: dict[int, list[TrialView]] = {}
    for trial in complete.values():
        first = complete.get(trial.user_attrs.get(REPEAT_OF, -1))
        if first is not None:
            found.setdefault(first.number, [first]).append(trial)
    return list(found.values())


def wanted_seeds(seeds: Sequence[TrialView]) -> int:
    """Return how many trainings are wanted of a trial of `trials_by_seed`, its own included."""
    return 1 + max(int(repeat.user_attrs[REPEATS]) for repeat in seeds[1:])


def mean_rank(seeds: Sequence[TrialView]) -> tuple[float, float, int]:
    """Return what trials are ordered by over their seeds: the means of what `rank` says."""
    ranks = [rank(trial.violation, trial.value, trial.number) for trial in seeds]
    return fmean(one[0] for one in ranks), fmean(one[1] for one in ranks), seeds[0].number


def rank(violation: float | None, value: float | None, number: int) -> tuple[float, float, int]:
    """Return what COMPLETE trials are ordered by: violation of the guard, value, number."""
    return (max(0.0, violation or 0.0), math.inf if value is None else value, number)


def violation_of(trial: FrozenTrial) -> float | None:
    """Return by how much a trial violates the guard; None where that was never known."""
    return max(trial.constraints.values(), default=None)


def ranked_value(value: float, violation: float | None, metric: str) -> float:
    """Return the value that Optuna ranks a COMPLETE trial by: the objective where the guard holds.

    Optuna's storage, and so its dashboard, calls the trial with the smallest value the best one
    and looks at no constraint. A trial that violates the guard is therefore given a value behind
    every objective, by its violation, which is the order of `rank`.

    Args:
        value: The objective, minimised.
        violation: By how much the guard is violated, if that is known.
        metric: `objective.metric`.
    """
    if violation is None or violation <= 0:
        return value
    return (1.0 if metric in AT_MOST_ONE else BEHIND) + violation


def describe_best(trial: TrialView | None) -> dict[str, Any] | None:
    """Return the best trial under the keys of the contract."""
    if trial is None:
        return None
    metrics = trial.user_attrs.get("metrics") or {}
    return {
        "number": trial.number,
        **{name: metrics.get(name) for name in HEADLINE},
        "params": dict(trial.params),
        "decoding": trial.user_attrs.get("decoding"),
        "value": trial.value,
        "feasible": trial.is_feasible,
        "warm_start": trial.user_attrs.get("warm_start"),
    }


def guard_warnings(best: TrialView | None, guard_f1: float) -> list[str]:
    """Return a warning where the best trial violates the guard, since then every trial does."""
    if best is None or best.is_feasible:
        return []
    f1 = (best.user_attrs.get("metrics") or {}).get("f1_iou50")
    reached = "" if f1 is None else f" (F1 {f1:.3f})"
    return [
        f"no trial meets the guard of F1 ≥ {guard_f1:g}; trial {best.number} "
        f"comes nearest{reached}. "
        "Look at its contact sheet first: adapted Rand error does not see false positives."
    ]


def state_word(state: str, reason: str | None = None) -> str:
    """Return the state of a trial in a word for people: an interruption is no failure."""
    if state == "FAIL":
        first = (reason or "").partition(":")[0]
        return first if first in ("interrupted", "orphaned") else "failed"
    return state.lower()


def seconds_left(progress: Mapping[str, Any]) -> float | None:
    """Return the seconds that a running trial still needs at its pace so far; None where unknown.

    Args:
        progress: `epoch`, `epochs` and `seconds`, as far as they are known.
    """
    epoch, epochs, seconds = (progress.get(name) for name in ("epoch", "epochs", "seconds"))
    if not epoch or epochs is None or seconds is None:
        return None
    return float(seconds) / float(epoch) * max(float(epochs) - float(epoch), 0.0)


def figures_of(trial: TrialView) -> dict[str, Any]:
    """Return the short figures of a trial that people sort and plot by, where they are known."""
    attributes = trial.user_attrs
    metrics, gpus = attributes.get("metrics") or {}, attributes.get("gpus")
    figures = {
        "f1_iou50": metrics.get("f1_iou50"),
        "error_foreground": metrics.get("adapted_rand_error_foreground"),
        **{name: _count(metrics.get(name)) for name in ("missed", "split", "merged", "invented")},
        "recipe": attributes.get("warm_start"),
        "epochs": attributes.get("epoch") or (attributes.get("training") or {}).get("epochs_done"),
        "minutes": round(trial.seconds / 60, 2),
        "gpu_hours": None if gpus is None else round(trial.seconds * gpus / 3600, 4),
        RESUMABLE: attributes.get(RESUMABLE),
        "state_reason": str(attributes.get("reason") or "")[:LONGEST_FIGURE] or None,
    }
    return {name: value for name, value in figures.items() if value is not None}


def _count(ids: Any) -> Any:
    """Return the length of a list of ids, or a count as it is."""
    return len(ids) if isinstance(ids, list) else ids


def gpu_hours(trials: Iterable[TrialView]) -> float:
    """Return the GPU-hours of all trials, the running and the failed ones included."""
    return sum(t.seconds * float(t.user_attrs.get("gpus") or 0.0) for t in trials) / 3600


def is_tried(trial: TrialView) -> bool:
    """Return whether a trial's candidate was trained, is being trained, or has failed.

    A trial that no driver came to own was never trained, and one that waits is not yet. What
    failed is not tried anew: where that can help, a retry does it.
    """
    if trial.is_imported or trial.state == "WAITING" or "duplicate_of" in trial.user_attrs:
        return False
    return trial.is_foreign or "owner" in trial.user_attrs


def is_ended(trial: TrialView) -> bool:
    """Return whether this study ran a candidate to its end, or until it was pruned."""
    known = bool(trial.intermediate) or trial.value is not None
    elsewhere = trial.is_imported or trial.is_foreign or trial.is_repeat
    return trial.state in FINISHED and known and not elsewhere


def complete_candidates(trials: Iterable[TrialView]) -> list[TrialView]:
    """Return the complete trials of a study's search: none of another study, and no repeat."""
    return [trial for trial in trials if trial.state == "COMPLETE" and is_ended(trial)]


def latest_ended(trials: Sequence[TrialView]) -> list[TrialView]:
    """Return the ended trials, without those attempts that another one followed."""
    gone = superseded(trials)
    return [trial for trial in trials if is_ended(trial) and trial.number not in gone]


def superseded(trials: Iterable[TrialView]) -> set[int]:
    """Return the numbers of the attempts that another one followed, from the same checkpoint."""
    return {trial.user_attrs["retry_of"] for trial in trials if "retry_of" in trial.user_attrs}


def recipe_of(
    attributes: Mapping[str, Any], recipes: Mapping[str, Mapping[str, Any]]
) -> Mapping[str, Any] | None:
    """Return the partial candidate that a trial set beside its parameters; empty without.

    Args:
        attributes: Of the trial.
        recipes: Of the space.

    Returns:
        None where the space has dropped the recipe since.
    """
    if OVERRIDES in attributes:
        return dict(attributes[OVERRIDES])
    name = attributes.get("warm_start")
    return {} if name is None else recipes.get(name)


def duplicate_of(
    params: Mapping[str, Any],
    warm_start: str | None,
    trials: Iterable[TrialView],
    *,
    number: int,
) -> int | None:
    """Return the number of an earlier trial with the same parameters, or None.

    Recipes may set keys outside the searched ones, so a warm start is only a duplicate of itself.

    Args:
        params: Encoded values of the new trial.
        warm_start: Its recipe, if any.
        trials: All trials of the study.
        number: The new trial's own number.
    """
    for trial in trials:
        if trial.number == number or not is_tried(trial):
            continue
        same = dict(trial.params) == dict(params)
        if same and trial.user_attrs.get("warm_start") == warm_start:
            return trial.number
    return None


@cache
def machine_identity() -> str:
    """Return what tells one machine, boot and process table from another."""
    parts = [socket.gethostname()]
    for read in (_boot_id, _process_namespace):
        try:
            parts.append(read())
        except OSError:
            parts.append(platform.node())
    return "/".join(parts)


def _boot_id() -> str:
    """Return the kernel's identity of this boot."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _process_namespace() -> str:
    """Return the namespace in which process ids mean something."""
    return os.readlink("/proc/self/ns/pid")


def own_process() -> dict[str, Any]:
    """Return what lets another process on this machine see whether this one lives."""
    pid = os.getpid()
    return {"machine": machine_identity(), "pid": pid, "start": process_start(pid)}


def process_start(pid: int) -> str | None:
    """Return what tells a process from a later one of the same number; None where it is gone.

    On Linux it is the tick since boot: a time of day would shift whenever the clock is set.

    Args:
        pid: Of any process on this machine.
    """
    try:
        # After the program's name, which may hold anything: the state first, the start 20th.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in "ZX" else fields[19]
    except (OSError, IndexError):
        pass
    import psutil

    try:
        return f"{psutil.Process(pid).create_time():.0f}"
    except psutil.Error:
        return None


def is_surely_dead(process: Mapping[str, Any] | None) -> bool:
    """Return whether a driver's process is known to be gone.

    Args:
        process: From `own_process`; of another machine, nothing is known and its heartbeat
            decides.
    """
    if not process or process.get("machine") != machine_identity():
        return False
    return process_start(int(process["pid"])) != process.get("start")


@dataclass(frozen=True)
class Asked:
    """A trial that a driver has claimed.

    Args:
        number: Its number.
        root: Number of the first attempt; it names the folder.
        attempt: From 1.
        retry_of: Number of the attempt before, if any.
        params: Encoded values of the active parameters.
        warm_start: Recipe it comes from, if any.
        overrides: Partial candidate beside the parameters, of a candidate that was enqueued.
        seed_shift: What is added to the seed of its candidate; 0 but for a repeat.
    """

    number: int
    root: int
    attempt: int
    retry_of: int | None
    params: Mapping[str, Any]
    warm_start: str | None
    overrides: Mapping[str, Any] | None = None
    seed_shift: int = 0


@dataclass(frozen=True)
class TrialResult:
    """How a trial ended.

    Args:
        state: `COMPLETE`, `PRUNED` or `FAIL`.
        value: Objective, minimised; for COMPLETE alone.
        violation: By how much the study's guard is violated.
        attributes: User attributes, plain JSON types.
        retry: Of a FAIL: `no`, `counted` (a crash) or `free` (an interruption).
    """

    state: str
    value: float | None = None
    violation: float | None = None
    attributes: Mapping[str, Any] = field(default_factory=dict)
    retry: str = "no"

    def as_mapping(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return asdict(self)

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any]) -> TrialResult:
        """Return what `as_mapping` gave."""
        return cls(**mapping)
