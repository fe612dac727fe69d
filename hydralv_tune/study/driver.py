"""The one process that asks and tells the trials of a study it runs, and nobody else's."""

from __future__ import annotations

import contextlib
import math
import random
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import optuna
import sqlalchemy
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState

from hydralv_tune.study.confirm import missing_repeats
from hydralv_tune.study.database import DatabaseAway, DatabaseFile, StudyGone, database_errors
from hydralv_tune.study.distributions import misfit, suggest
from hydralv_tune.study.earlier import GUIDED_SAMPLER, WAITED_FOR, Guide, pruner_with
from hydralv_tune.study.journal import PREFIX, SUFFIX, Journal, journals_in
from hydralv_tune.study.mutex import StudyMutex
from hydralv_tune.study.optuna_private import (
    StudyWithout,
    claim_waiting,
    count_trials,
    enqueue,
    set_attributes,
    store_evaluation,
    trial_id,
    waiting_trials,
)
from hydralv_tune.study.paused import trial_to_revive
from hydralv_tune.study.proposals import ProposalSampler, TriedCandidates, is_plain
from hydralv_tune.study.pruners import make_pruner
from hydralv_tune.study.retries import missing_successors, successor_attributes
from hydralv_tune.study.samplers import make_sampler, sampler_entry
from hydralv_tune.study.study import Study, rank_by_guard, trial_by_number, view_of
from hydralv_tune.study.study_folder import recover_command
from hydralv_tune.study.trial_views import (
    CONSTRAINTS,
    FOLD_VALUES,
    GRACE_S,
    GUIDED,
    OBJECTIVE,
    OVERRIDES,
    REPEAT_OF,
    REVIVED,
    SEED_SHIFT,
    VIOLATIONS,
    Asked,
    TrialResult,
    TrialView,
    attributes_of,
    count_states,
    duplicate_of,
    figures_of,
    is_surely_dead,
    own_process,
    ranked_value,
)

HEARTBEAT_S = 30.0
EXEMPT = {"retry_of", "warm_start", GUIDED, REPEAT_OF}  # what nobody enqueued by hand
ABANDONED_S = 3600.0  # of a journal, after which its driver on another machine is not awaited


class Driver:
    """One process that asks and tells: the only writer of its trials.

    Args:
        study: An open study.
        out: Folder of the study on this machine, where results wait while the database is away.
        heartbeat_s: Seconds between two signs of life.
        grace_s: Silence after which another driver takes this one's trials over.
    """

    def __init__(
        self,
        study: Study,
        *,
        out: Path,
        heartbeat_s: float = HEARTBEAT_S,
        grace_s: float = GRACE_S,
    ) -> None:
        self.study = study
        self.space = study.space
        self.process = own_process()
        self.name = f"{self.process['machine'].split('/')[0]}/{self.process['pid']}"
        self.identity = uuid.uuid4().hex
        self.heartbeat_s, self.grace_s = heartbeat_s, grace_s
        self.out = out
        self._mutex = StudyMutex(study.rdb.engine.url, study.name)
        self._live: dict[int, optuna.Trial] = {}
        self.gone: StudyGone | None = None
        """Why the study can never be asked again; None while it can."""
        self._file = DatabaseFile(study.rdb.engine.url)
        self._study_identity, self._trials_seen = study.identity, 0
        self._journal = Journal(out / f"{PREFIX}{self.identity}{SUFFIX}")
        # Both monotonic: when the database last answered, and since when without a long pause.
        self._answered_at, self._answering_since = -math.inf, math.inf
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._sampler = make_sampler(self.space.sampler, 0)
        self._tried = TriedCandidates(self.space, self.space.sampler.min_distance)
        self._guide = Guide(
            self.space, study.lessons or [], alone=self.space.sampler.name == GUIDED_SAMPLER
        )
        self._pruner = make_pruner(pruner_with(self._guide.lessons, self.space.pruner))

    def __enter__(self) -> Driver:
        with self._database(), self._mutex:
            self.adopt_journals()
            rank_by_guard(self.study)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(timeout=5.0)
        with contextlib.suppress(DatabaseAway, StudyGone):
            self.poll()
        self._mutex.close()

    @property
    def live(self) -> frozenset[int]:
        """Return the numbers of the trials that this driver answers for."""
        return frozenset(self._live)

    @property
    def gone_reason(self) -> str | None:
        """Return what became of the study and what to do, or None while it is there."""
        if self.gone is None:
            return None
        return (
            f"Study '{self.study.name}' in {self.study.storage} {self.gone.what} while it ran. Its "
            f"trials are in {self.out / 'trials'}. To go on with what the database holds now, run "
            f"the same command again; to make the study again from its trials, first run "
            f"`{recover_command(self.out)}`."
        )

    @property
    def waiting_results(self) -> int:
        """Return how many results wait in the journal."""
        return len(self._journal.entries())

    def ask(self, target: int) -> Asked | Literal["wait", "done"]:
        """Return the next trial, or whether to wait for others or to end.

        Args:
            target: COMPLETE and PRUNED trials wanted in all.

        Raises:
            DatabaseAway: Try again later.
        """
        return self._ask(lambda: self._next_trial(target))

    def ask_again(self, target: int) -> Asked | Literal["wait", "done"]:
        """Return the next repeat of one of the best trials, once the search is over.

        Args:
            target: As for `ask`.

        Raises:
            DatabaseAway: Try again later.
        """
        return self._ask(lambda: self._next_repeat(target))

    def _ask(
        self, next_one: Callable[[], Asked | Literal["wait", "done"]]
    ) -> Asked | Literal["wait", "done"]:
        """Bring the study up to date and return what is next, under the mutex."""
        before = set(self._live)
        try:
            with self._database(), self._mutex:
                self._check_identity()
                self._flush()
                self.reconcile()
                self._fail_misfits()
                return next_one()
        except StudyGone:
            return "done"
        except (DatabaseAway, UpdateFinishedTrialError) as error:
            # Nobody will run a trial that was claimed just before: it is to be found an orphan.
            for number in set(self._live) - before:
                self._live.pop(number)
            if isinstance(error, DatabaseAway):
                raise
            return "wait"  # this process slept, and another driver found the trial an orphan

    def _next_trial(self, target: int) -> Asked | Literal["wait", "done"]:
        """Return a new trial if one is wanted; under the mutex."""
        trials = self.study.trials()
        counts = _of_the_search(trials)
        finished = counts["complete"] + counts["pruned"]
        if finished >= target:
            return "done"
        if finished + counts["running"] >= target:
            return "wait"
        recipes = self._recipes_that_may_wait(trials, target - finished - counts["running"])
        while counts["waiting"] and not recipes:
            asked = self._new_trial(trials)
            if asked is not None:
                return asked
            trials = self.study.trials()
            counts = _of_the_search(trials)
        self._tried.update(trials)
        is_full = self._tried.untried(random.Random(len(trials))) is None
        share = self.space.pruner.revive
        paused = trial_to_revive(trials, 1.0 if is_full and share else share)
        if paused is not None:
            enqueue(self.study.optuna, paused.params, successor_attributes(paused))
        elif recipes:
            return self._new_trial(trials, claimed=self._before_recipes(trials, recipes)) or "wait"
        elif is_full:
            return "wait" if counts["running"] else "done"
        return self._new_trial(trials) or "wait"

    def _recipes_that_may_wait(self, trials: Sequence[TrialView], room: int) -> list[TrialView]:
        """Return the waiting trials where earlier studies say what to try first; none without.

        They wait for `WAITED_FOR` earlier studies, where all recipes set nothing beside what this
        study and an earlier one search, since of more no earlier study can tell; and no longer than
        there is room for all of them.

        Args:
            trials: Of the study.
            room: Trials that may still be started.
        """
        waiting = [trial for trial in trials if trial.state == "WAITING" and not trial.is_repeat]
        recipes = [
            trial
            for trial in waiting
            if "warm_start" in trial.user_attrs and "retry_of" not in trial.user_attrs
        ]
        lessons = self._guide.lessons
        known = len(lessons) >= WAITED_FOR and all(
            is_plain(self.space, trial)
            and any(trial.requested.keys() <= set(each.keys) for each in lessons)
            for trial in recipes
        )
        return recipes if known and len(waiting) < room else []

    def _before_recipes(
        self, trials: list[TrialView], recipes: Sequence[TrialView]
    ) -> optuna.Trial | None:
        """Claim what goes before the first recipe: what else waits, or what earlier studies say."""
        others = [
            trial
            for trial in waiting_trials(self.study.optuna)
            if "retry_of" in attributes_of(trial)
            or not {"warm_start", REPEAT_OF} & set(attributes_of(trial))
        ]
        if others:  # by hand, or by a driver that died before it claimed it
            return claim_waiting(
                self.study.optuna, min(others, key=lambda t: "retry_of" not in attributes_of(t))
            )
        asked = [trial.requested for trial in recipes]
        generator = random.Random(self.space.sampler.seed * 1_000_003 + len(trials))
        chosen = self._guide.propose(trials, self._tried, generator, waiting=asked)
        if chosen is None:
            return None
        for trial, params in zip(recipes, asked, strict=True):
            if params is chosen:
                (frozen,) = (t for t in self.study.frozen() if t.number == trial.number)
                return claim_waiting(self.study.optuna, frozen)
        enqueue(self.study.optuna, chosen, {GUIDED: True})
        return self._waiting_with(GUIDED)

    def _next_repeat(self, target: int) -> Asked | Literal["wait", "done"]:
        """Return the next repeat, whoever enqueued it; under the mutex."""
        for trial, attributes in missing_repeats(self.space, self.study.trials(), target):
            enqueue(self.study.optuna, trial.params, attributes)
        trials = self.study.trials()
        states = {trial.state for trial in trials if trial.is_repeat}
        if "WAITING" in states:
            return self._new_trial(trials, REPEAT_OF) or "wait"
        return "wait" if "RUNNING" in states else "done"

    def report(
        self,
        number: int,
        step: int,
        value: float,
        violation: float | None = None,
        folds: Sequence[float] | None = None,
    ) -> Literal["go", "prune", "refused"]:
        """Store an intermediate value and return whether the trial goes on.

        Args:
            number: The trial.
            step: Evaluation, from 1.
            value: Objective so far, minimised.
            violation: By how much the checkpoint of that value violates the guard.
            folds: The objective of each fold, whose mean the value is.
        """
        beside = {VIOLATIONS: violation, FOLD_VALUES: None if folds is None else list(folds)}
        trial = self._live.get(number)
        if trial is None:
            return "refused"
        try:
            with self._database():
                self._flush()
                store_evaluation(self.study.rdb, trial_id(trial), step, value, beside)
                # Fresh: `trial.should_prune` would look at what it has reported by itself.
                frozen = self.study.rdb.get_trial(trial_id(trial))
                if {REVIVED, REPEAT_OF} & set(attributes_of(frozen)):
                    return "go"
                shown: Any = StudyWithout(self.study.optuna, REPEAT_OF)
                return "prune" if self._pruner.prune(shown, frozen) else "go"
        except (UpdateFinishedTrialError, StudyGone):
            self._live.pop(number, None)
            return "refused"
        except DatabaseAway:
            kept = {"number": number, "step": step, "value": value, "beside": beside}
            self._keep({"kind": "report", **kept})
            return "go"

    def describe(self, number: int, attributes: Mapping[str, Any]) -> None:
        """Store short user attributes of a running trial, for whoever watches the study.

        They must not cost a result: a database that does not answer is left alone.

        Args:
            number: The trial.
            attributes: Plain scalars; None is left out.
        """
        trial = self._live.get(number)
        known = {key: value for key, value in attributes.items() if value is not None}
        if trial is not None and known:
            with contextlib.suppress(DatabaseAway, UpdateFinishedTrialError), self._database():
                set_attributes(self.study.rdb, trial_id(trial), known)

    def reason_of(self, number: int) -> str | None:
        """Return why a trial ended that the database has taken away, where that is stored."""
        with contextlib.suppress(DatabaseAway), self._database():
            frozen = trial_by_number(self.study.optuna, number)
            return None if frozen is None else frozen.user_attrs.get("reason")
        return None

    def tell(self, number: int, outcome: TrialResult) -> Literal["told", "kept", "refused"]:
        """End a trial in the database, or keep its result until that answers.

        A result of a trial that another driver has taken over is refused: the database wins.
        """
        if number not in self._live:
            return "refused"
        try:
            with self._database(), self._mutex:
                self._flush()
                told = self._tell_now(number, outcome, self.identity)
                if told and outcome.state == "FAIL":
                    self.reconcile()
                return "told" if told else "refused"
        except StudyGone:
            self._live.pop(number, None)
            return "refused"
        except DatabaseAway:
            self._keep({"kind": "tell", "number": number, "outcome": outcome.as_mapping()})
            return "kept"

    def poll(self) -> frozenset[int]:
        """Tell what waits, and return the trials that the database has taken away.

        Raises:
            DatabaseAway: Try again later.
        """
        states: dict[int, TrialState] = {}
        with contextlib.suppress(StudyGone), self._database():
            self._flush()
            states = {trial.number: trial.state for trial in self.study.frozen()}
            self._answered()
        lost = frozenset(n for n in self._live if states.get(n) != TrialState.RUNNING)
        for number in lost:
            self._live.pop(number, None)
        return lost

    def adopt_journals(self) -> None:
        """Tell the results that dead drivers left in this folder; to be called under the mutex."""
        for journal in journals_in(self.out):
            entries = journal.entries()
            abandoned = time.time() - journal.path.stat().st_mtime > ABANDONED_S
            if entries and (abandoned or is_surely_dead(entries[0].get("process"))):
                journal.drain(self._tell_entry)

    def _flush(self) -> None:
        """Tell what waits, in order: a later result must not overtake an earlier one."""
        if self._journal.entries():
            with self._mutex:
                self._journal.drain(self._tell_entry)
                self.reconcile()

    @contextlib.contextmanager
    def _database(self) -> Iterator[None]:
        """Turn a database that does not answer into `DatabaseAway`, and remember that it was.

        Raises:
            DatabaseAway: Try again later.
            StudyGone: The study is not there any more, and never will be for this driver.
        """
        try:
            if self.gone is not None:
                raise self.gone
            self._file.check()
            try:
                with database_errors():
                    yield
            except DatabaseAway:
                self._answered_at = -math.inf
                # A session that was begun while the database was read-only stays so.
                self.study.rdb.engine.dispose()
                self._file.check()  # that may be why
                raise
        except StudyGone as error:
            self.gone = error
            raise

    def _check_identity(self) -> None:
        """Raise `StudyGone` where the database holds another study of the name, or an older copy.

        A file that is copied over the open one keeps its identity on the disk.
        """
        if self.study.identity != self._study_identity:
            raise StudyGone("was replaced by another study of the same name")
        count = count_trials(self.study.optuna)
        if count < self._trials_seen:
            raise StudyGone(
                f"was replaced by an older copy: {self._trials_seen - count} trials less"
            )
        self._trials_seen = count

    def _fail_misfits(self) -> None:
        """Fail what somebody enqueued by hand with values that the space does not have.

        Optuna would take some of them as they are and end this process over others.
        """
        for trial in waiting_trials(self.study.optuna):
            reason = misfit(self.space, trial.system_attrs.get("fixed_params") or {})
            if reason is None or EXEMPT & set(attributes_of(trial)):
                continue
            claimed = claim_waiting(self.study.optuna, trial)
            if claimed is not None:
                note = f"enqueued by hand: {reason}. Enqueue it again with a value of the space."
                set_attributes(self.study.rdb, trial_id(trial), {"reason": note, "retry": "no"})
                self.study.optuna.tell(trial.number, state=TrialState.FAIL)

    def _answered(self) -> None:
        """Take in that the database answers."""
        now = time.monotonic()
        if now - self._answered_at > self.grace_s:
            self._answering_since = now
        self._answered_at = now

    def reconcile(self) -> None:
        """Fail the trials whose driver is gone and give each FAIL that deserves it one successor.

        To be called under the mutex; it may be called any number of times.
        """
        # First: a trial whose result a dead driver left behind is no orphan.
        self.adopt_journals()
        ages = self._heartbeat_ages()
        frozen = self.study.frozen()
        orphans = [
            (trial, reason)
            for trial in frozen
            if trial.state == TrialState.RUNNING and trial.number not in self._live
            if (reason := self._orphaned(trial, ages.get(trial_id(trial)))) is not None
        ]
        for trial, reason in orphans:
            self._fail_orphan(trial, reason)
        views = self.study.trials(self.study.frozen() if orphans else frozen)
        for view in missing_successors(views, retries=self.space.budget.retries):
            # One that was killed while it was being asked for has only part of its parameters.
            params = view.params if "owner" in view.user_attrs else view.requested
            enqueue(self.study.optuna, params, successor_attributes(view))

    def _orphaned(self, trial: FrozenTrial, age_s: float | None) -> str | None:
        """Return why nobody works on a RUNNING trial any more, or None where somebody does."""
        owner = attributes_of(trial).get("owner")
        if owner is None or owner.get("identity") == self.identity:
            return "orphaned: its driver died while it asked for the trial"
        if is_surely_dead(owner):
            return "orphaned: its driver's process is gone"
        # While the database was away, or this process slept, nobody could be heard.
        listened_s = time.monotonic() - self._answering_since
        if listened_s > self.grace_s and (age_s is None or age_s > self.grace_s):
            silence = "at all" if age_s is None else f"for {age_s:.0f} s"
            return f"orphaned: no sign of life of its driver {silence}"
        return None

    def _fail_orphan(self, trial: FrozenTrial, reason: str) -> None:
        """Tell an orphan as FAIL; whatever was asked for on purpose is asked for again."""
        wanted = "owner" in attributes_of(trial) or bool(trial.system_attrs.get("fixed_params"))
        attributes = {"reason": reason, "retry": "free" if wanted else "no"}
        with contextlib.suppress(UpdateFinishedTrialError):
            set_attributes(self.study.rdb, trial_id(trial), attributes)
        with contextlib.suppress(UpdateFinishedTrialError, ValueError):
            self.study.optuna.tell(trial.number, state=TrialState.FAIL)

    def _new_trial(
        self,
        trials: list[TrialView],
        only: str | None = None,
        claimed: optuna.Trial | None = None,
    ) -> Asked | None:
        """Ask Optuna for a trial and claim it; None where its parameters were tried before.

        Args:
            trials: Of the study, as they are now, but for one that was just enqueued.
            only: Attribute that the trial must have, of those that wait.
            claimed: The trial, where it is claimed already.
        """
        study = self.study.optuna
        self._tried.update(trials)
        seed = self.space.sampler.seed * 1_000_003 + len(trials)
        study.sampler = ProposalSampler(
            self._sampler_for(len(trials)), self._tried, seed, trials, self._guide
        )
        trial = claimed or self._waiting_with(only or "retry_of")
        if trial is None:
            if only is not None:
                return None
            trial = study.ask()
        self.study.rdb.record_heartbeat(trial_id(trial))
        params = suggest(self.space, trial)
        attributes = attributes_of(self.study.rdb.get_trial(trial_id(trial)))
        warm_start = attributes.get("warm_start")
        retry_of = attributes.get("retry_of")
        earlier = duplicate_of(params, warm_start, trials, number=trial.number)
        if earlier is not None and retry_of is None and REPEAT_OF not in attributes:
            reason = f"duplicate of trial {earlier}, not trained again"
            repeated = {"duplicate_of": earlier, "reason": reason}
            set_attributes(self.study.rdb, trial_id(trial), repeated)
            study.tell(trial, state=TrialState.FAIL)
            return None
        self._inherit(trial, retry_of, trials)
        # Last of all: a RUNNING trial without an owner was never fully asked for.
        owner = {**self.process, "identity": self.identity}
        claim = {"driver": self.name, "owner": owner}
        set_attributes(self.study.rdb, trial_id(trial), claim)
        self._live[trial.number] = trial
        return Asked(
            number=trial.number,
            root=int(attributes.get("root", trial.number)),
            attempt=int(attributes.get("attempt", 1)),
            retry_of=retry_of,
            params=params,
            warm_start=warm_start,
            overrides=attributes.get(OVERRIDES),
            seed_shift=int(attributes.get(SEED_SHIFT, 0)),
        )

    def _waiting_with(self, attribute: str) -> optuna.Trial | None:
        """Return the first waiting trial that has an attribute, now running, or None.

        Optuna takes what waits in the order of its numbers. A trial that was nearly done would
        then stay behind recipes that have not begun, and in a small budget for ever.
        """
        for trial in waiting_trials(self.study.optuna):
            if attribute in attributes_of(trial):
                with contextlib.suppress(UpdateFinishedTrialError):
                    claimed = claim_waiting(self.study.optuna, trial)
                    if claimed is not None:
                        return claimed
        return None

    def _inherit(self, trial: optuna.Trial, retry_of: int | None, trials: list[TrialView]) -> None:
        """Give a retry the evaluations of the attempt before, from whose checkpoint it goes on."""
        for view in trials:
            if view.number == retry_of:
                known = {k: view.user_attrs.get(k) or {} for k in (VIOLATIONS, FOLD_VALUES)}
                for step, value in view.intermediate.items():
                    if math.isfinite(value):
                        beside = {key: by_step.get(str(step)) for key, by_step in known.items()}
                        store_evaluation(self.study.rdb, trial_id(trial), step, value, beside)

    def _sampler_for(self, count: int) -> optuna.samplers.BaseSampler:
        """Return the sampler of the next trial, which goes on where it is a sequence."""
        is_sequence = sampler_entry(self.space.sampler.name).is_sequence
        return self._sampler if is_sequence else make_sampler(self.space.sampler, count)

    def _tell_now(self, number: int, outcome: TrialResult, identity: str) -> bool:
        """End a trial if the database still has it RUNNING and owned by this driver."""
        study = self.study.optuna
        frozen = trial_by_number(study, number)
        owner = (attributes_of(frozen).get("owner") or {}) if frozen is not None else {}
        if (
            frozen is None
            or frozen.state != TrialState.RUNNING
            or owner.get("identity") != identity
        ):
            self._live.pop(number, None)
            return False
        retry = {"retry": outcome.retry} if outcome.state == "FAIL" else {}
        try:
            known = {**outcome.attributes, **retry}
            view = view_of(frozen)
            figures = figures_of(replace(view, user_attrs={**view.user_attrs, **known}))
            set_attributes(self.study.rdb, trial_id(frozen), known, figures)
            system: dict[str, Any] = {}
            if outcome.violation is not None and math.isfinite(outcome.violation):
                system[CONSTRAINTS] = [float(outcome.violation)]
            value = outcome.value if outcome.state == "COMPLETE" else None
            if value is not None:
                system[OBJECTIVE] = value
                value = ranked_value(value, outcome.violation, self.space.objective.metric)
            for key, known in system.items():
                self.study.rdb.set_trial_system_attr(trial_id(frozen), key, known)
            study.tell(number, value, state=TrialState[outcome.state])
        except UpdateFinishedTrialError:
            told = False  # this process slept under the mutex, and another took the trial over
        else:
            told = True
        # Only now: until it is told, a trial must not look like an orphan.
        self._live.pop(number, None)
        return told

    def _keep(self, entry: Mapping[str, Any]) -> None:
        """Write into the journal what cannot be told now."""
        self._journal.append({**entry, "identity": self.identity, "process": self.process})

    def _tell_entry(self, entry: dict[str, Any]) -> None:
        """Tell one entry of a journal; what the database no longer wants is dropped."""
        number, identity = int(entry["number"]), str(entry["identity"])
        with self._database(), self._mutex:
            if entry["kind"] == "tell":
                self._tell_now(number, TrialResult.from_mapping(entry["outcome"]), identity)
                return
            frozen = trial_by_number(self.study.optuna, number)
            if frozen is not None and frozen.state == TrialState.RUNNING:
                with contextlib.suppress(UpdateFinishedTrialError):
                    store_evaluation(
                        self.study.rdb,
                        trial_id(frozen),
                        int(entry["step"]),
                        float(entry["value"]),
                        dict(entry["beside"]),
                    )

    def _heartbeat_ages(self) -> dict[int, float]:
        """Return the seconds since each RUNNING trial's sign of life, by the database's clock."""
        beats = sqlalchemy.table(
            "trial_heartbeats",
            sqlalchemy.column("trial_id", sqlalchemy.Integer),
            sqlalchemy.column("heartbeat", sqlalchemy.DateTime),
        )
        running = [trial_id(t) for t in self.study.frozen() if t.state == TrialState.RUNNING]
        if not running:
            return {}
        query = sqlalchemy.select(beats.c.trial_id, beats.c.heartbeat, sqlalchemy.func.now()).where(
            beats.c.trial_id.in_(running)
        )
        with self.study.rdb.engine.connect() as connection:
            rows = connection.execute(query).all()
        self._answered()
        return {
            trial: (now.replace(tzinfo=None) - beat.replace(tzinfo=None)).total_seconds()
            for trial, beat, now in rows
        }

    def _beat(self) -> None:
        """Record a sign of life of every live trial until the driver ends."""
        while not self._stop.wait(self.heartbeat_s):
            for trial in list(self._live.values()):
                # A database that is away is met by the driver's own thread too, which says so.
                # Whatever else goes wrong with one sign of life must not end the later ones.
                with contextlib.suppress(Exception), self._database():
                    self.study.rdb.record_heartbeat(trial_id(trial))
        self.study.rdb.remove_session()


def _of_the_search(trials: Sequence[TrialView]) -> dict[str, int]:
    """Return how many trials are in each state, without repeats, which are no candidates."""
    return count_states(trial for trial in trials if not trial.is_repeat)
