"""Rules of the study on real databases, SQLite and PostgreSQL, without Ray."""

from __future__ import annotations

import math
import pickle
import resource
import sqlite3
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import optuna
import pytest
import sqlalchemy
from optuna.trial import TrialState
from study_checks import DECAY, LR, make_space, on_databases

from hydralv_tune.config.errors import ConfigError, InputError, StudyError
from hydralv_tune.config.search_space_rules import check_space
from hydralv_tune.config.secrets import mask_passwords
from hydralv_tune.launch.start import Start
from hydralv_tune.study.database import DatabaseAway
from hydralv_tune.study.distributions import distribution_of
from hydralv_tune.study.driver import Driver
from hydralv_tune.study.journal import PREFIX, SUFFIX, Journal
from hydralv_tune.study.mutex import MutexLost, StudyMutex
from hydralv_tune.study.optuna_private import PRIVATE_NAMES, set_attributes
from hydralv_tune.study.proposals import TriedCandidates
from hydralv_tune.study.pruners import PRUNERS, register_pruner
from hydralv_tune.study.samplers import SAMPLERS, register_sampler
from hydralv_tune.study.storage_url import masked, parse_storage
from hydralv_tune.study.study import (
    Study,
    facts_of,
    open_if_exists,
    open_readonly,
    study_names,
    view_of,
)
from hydralv_tune.study.study_folder import MARKER, Owner, claim_out, owner_of
from hydralv_tune.study.trial_views import (
    Asked,
    TrialResult,
    is_surely_dead,
    own_process,
    process_start,
)

METRICS = {"adapted_rand_error": 0.2, "adapted_rand_error_foreground": 0.3, "f1_iou50": 0.8}


def asked(driver: Driver, target: int = 100) -> Asked:
    """Ask for a trial, which there must be."""
    trial = driver.ask(target)
    assert isinstance(trial, Asked), trial
    return trial


def complete(value: float, **attributes: Any) -> TrialResult:
    """Return the outcome of a trial that came to its end."""
    return TrialResult("COMPLETE", value, -0.3, {"metrics": METRICS, **attributes})


def listen(driver: Driver, seconds: float) -> None:
    """Let a driver look at the database for some seconds, as the coordinator lets it."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        driver.poll()
        time.sleep(0.2)


def abandon(driver: Driver) -> None:
    """Make a driver look like one whose process is gone."""
    driver._stop.set()
    for number in driver.live:
        trial = driver._live[number]
        gone = {"owner": {**own_process(), "start": "1", "identity": "gone"}}
        set_attributes(driver.study.rdb, trial._trial_id, gone)
    driver._live.clear()


def test_states_values_and_attributes_are_what_was_told(
    storage: str, make_driver: Callable[..., Driver]
) -> None:
    driver = make_driver(storage)
    first, second, third = asked(driver), asked(driver), asked(driver)
    assert driver.report(first.number, 1, 0.5) == "go"
    assert driver.tell(first.number, complete(0.2, seconds=3.5, host="h", checkpoint="c")) == "told"
    driver.report(second.number, 1, 0.7)
    driver.tell(second.number, TrialResult("PRUNED", attributes={"reason": "pruned"}))
    driver.tell(third.number, TrialResult("FAIL", attributes={"reason": "loss is nan"}))
    trials = driver.study.trials()
    assert [t.state for t in trials] == ["COMPLETE", "PRUNED", "FAIL"]
    assert [t.value for t in trials] == [0.2, 0.7, None]
    assert dict(trials[0].intermediate) == {1: 0.5}
    assert trials[0].user_attrs["host"] == "h"
    assert trials[0].seconds == 3.5
    assert trials[2].user_attrs["reason"] == "loss is nan"
    facts = facts_of(storage, "s")
    assert facts["trials"] == {"complete": 1, "pruned": 1, "fail": 1, "running": 0, "waiting": 0}
    assert facts["best"]["number"] == first.number
    assert facts["best"]["adapted_rand_error"] == 0.2
    assert facts["best"]["params"] == dict(first.params)
    table = driver.study.table()
    assert list(table["state"]) == ["COMPLETE", "PRUNED", "FAIL"]
    assert f"params.{LR}" in table


def test_no_more_trials_are_asked_than_are_wanted(
    storage: str, make_driver: Callable[..., Driver]
) -> None:
    driver = make_driver(storage)
    first, second = asked(driver, 2), asked(driver, 2)
    assert driver.ask(2) == "wait"
    driver.tell(first.number, complete(0.3))
    assert driver.ask(2) == "wait"
    driver.tell(second.number, TrialResult("FAIL", attributes={"reason": "nan"}))
    third = asked(driver, 2)
    driver.tell(third.number, complete(0.4))
    assert driver.ask(2) == "done"


def test_a_crash_is_retried_so_many_times_with_the_same_parameters(
    storage: str, make_driver: Callable[..., Driver]
) -> None:
    driver = make_driver(storage, make_space(budget={"retries": 2}))
    trial = asked(driver)
    driver.report(trial.number, 1, 0.4)
    numbers = [trial.number]
    for attempt in (2, 3):
        driver.tell(trial.number, TrialResult("FAIL", retry="counted"))
        retry = asked(driver)
        assert dict(retry.params) == dict(trial.params)
        assert (retry.root, retry.attempt) == (numbers[0], attempt)
        assert retry.retry_of == numbers[-1]
        assert driver.study.trials()[retry.number].intermediate == {1: 0.4}
        numbers.append(retry.number)
        trial = retry
    driver.tell(trial.number, TrialResult("FAIL", retry="counted"))
    fresh = asked(driver)
    assert fresh.retry_of is None
    assert dict(fresh.params) != dict(trial.params)


def test_what_fails_for_ever_is_not_retried_and_an_interruption_costs_nothing(
    storage: str, make_driver: Callable[..., Driver]
) -> None:
    driver = make_driver(storage, make_space(budget={"retries": 0}))
    broken = asked(driver)
    driver.tell(broken.number, TrialResult("FAIL", retry="no"))
    assert asked(driver).retry_of is None
    stopped = asked(driver)
    driver.tell(stopped.number, TrialResult("FAIL", retry="free"))
    retry = asked(driver)
    assert (retry.retry_of, retry.attempt) == (stopped.number, 1)


def test_orphans_of_a_dead_process_are_taken_over_at_once_and_only_once(
    storage: str, make_driver: Callable[..., Driver]
) -> None:
    dead = make_driver(storage)
    trial = asked(dead)
    dead.report(trial.number, 1, 0.6)
    abandon(dead)
    first, second = make_driver(storage), make_driver(storage)
    retry = asked(first)
    assert retry.retry_of == trial.number
    assert asked(second).retry_of is None
    for driver in (first, second, first):
        with driver._mutex:
            driver.reconcile()
    trials = first.study.trials()
    assert trials[trial.number].state == "FAIL"
    assert "orphaned" in trials[trial.number].user_attrs["reason"]
    assert sum(t.user_attrs.get("retry_of") == trial.number for t in trials) == 1


def test_a_silent_driver_is_taken_over_after_the_grace_and_its_late_results_are_refused(
    storage: str, make_driver: Callable[..., Driver]
) -> None:
    silent = make_driver(storage, heartbeat_s=600)
    trial, other = asked(silent), asked(silent)
    awake = make_driver(storage, grace_s=2.0)
    assert asked(awake).retry_of is None
    listen(awake, 3.2)
    assert asked(awake).retry_of == trial.number
    assert silent.report(trial.number, 1, 0.3) == "refused"
    assert silent.tell(trial.number, complete(0.1)) == "refused"
    assert silent.poll() == {other.number}
    assert silent.tell(other.number, complete(0.1)) == "refused"
    states = [t.state for t in awake.study.trials()]
    assert states[trial.number] == states[other.number] == "FAIL"
    assert "COMPLETE" not in states


def test_a_driver_with_a_heartbeat_keeps_its_trials(
    storage: str, make_driver: Callable[..., Driver]
) -> None:
    busy = make_driver(storage, heartbeat_s=0.3)
    trial = asked(busy)
    other = make_driver(storage, grace_s=2.0)
    listen(other, 3.5)
    assert asked(other).retry_of is None
    assert busy.tell(trial.number, complete(0.3)) == "told"


def test_an_outage_longer_than_the_grace_makes_no_driver_rob_another(
    postgres: Any, make_driver: Callable[..., Driver]
) -> None:
    storage = postgres.new_database()
    busy = make_driver(storage, grace_s=3.0, heartbeat_s=0.5)
    other = make_driver(storage, grace_s=3.0, heartbeat_s=0.5)
    trial = asked(busy)
    listen(other, 3.5)  # long enough to judge by what it hears
    postgres.stop()
    try:
        assert busy.tell(trial.number, complete(0.1)) == "kept"
        end = time.monotonic() + 5.0
        while time.monotonic() < end:
            with pytest.raises(DatabaseAway):
                other.poll()
            time.sleep(0.5)
    finally:
        postgres.start()
    # It comes first, over a connection that is broken at first, and leaves the trial alone.
    retry = None
    while retry is None:
        with suppress(DatabaseAway):
            retry = asked(other)
    assert retry.retry_of is None
    busy.poll()
    assert busy.study.trials()[trial.number].state == "COMPLETE"


def test_a_driver_that_sleeps_while_it_asks_or_tells_gives_way(
    postgres: Any, make_driver: Callable[..., Driver]
) -> None:
    """PostgreSQL ends the transaction of a sleeper, and with it the mutex."""
    storage = postgres.new_database()
    other = make_driver(storage)
    orphaned: list[int] = []

    def nap(sleeper: Driver) -> None:
        connection = sleeper._mutex._connection
        pid = connection.exec_driver_sql("select pg_backend_pid()").scalar_one()
        with other.study.rdb.engine.connect() as judge:
            judge.exec_driver_sql(f"select pg_terminate_backend({pid})")
        for view in other.study.trials():
            if view.state == "RUNNING":
                other.study.optuna.tell(view.number, state=TrialState.FAIL)
                orphaned.append(view.number)

    class Sleeper(Driver):
        asleep = False

        def _inherit(self, *arguments: Any) -> None:
            super()._inherit(*arguments)
            if self.asleep:
                nap(self)

    study = Study.open(storage, "s", space=make_space(), create=True)
    with Sleeper(study, out=other.out) as sleeper:
        sleeper.asleep = True
        assert sleeper.ask(9) == "wait"
        assert orphaned == [0]
        assert sleeper.live == frozenset()
        sleeper.asleep = False
        trial = asked(sleeper)

        class Late(Mapping[str, Any]):
            """Attributes that are read late: after the state was seen, before they are written."""

            def __getitem__(self, key: str) -> Any:
                return {"metrics": METRICS}[key]

            def __len__(self) -> int:
                return 1

            def __iter__(self) -> Iterator[str]:
                nap(sleeper)
                return iter(["metrics"])

        late = TrialResult("COMPLETE", 0.1, -0.3, Late())
        with suppress(MutexLost), sleeper._mutex:
            assert not sleeper._tell_now(trial.number, late, sleeper.identity)
        assert sleeper.live == frozenset()
        assert orphaned == [0, trial.number]
        assert study.trials()[trial.number].state == "FAIL"
    study.close()


def test_results_that_a_dead_driver_left_are_told_by_one_that_runs_already(
    storage: str, make_driver: Callable[..., Driver]
) -> None:
    running, dead = make_driver(storage), make_driver(storage)
    failed, done = asked(dead), asked(dead)
    gone = {**own_process(), "start": "1"}
    identity = dead.identity
    owner = {"owner": {**gone, "identity": identity}}
    for trial in (failed, done):
        set_attributes(dead.study.rdb, dead._live[trial.number]._trial_id, owner)
    dead._stop.set()
    dead._live.clear()
    journal = Journal(running.out / f"{PREFIX}{identity}{SUFFIX}")
    for trial, outcome in ((failed, TrialResult("FAIL", retry="counted")), (done, complete(0.1))):
        told = {"kind": "tell", "number": trial.number, "outcome": outcome.as_mapping()}
        journal.append({**told, "identity": identity, "process": gone})
    retry = asked(running)
    states = [view.state for view in running.study.trials()]
    assert (states[failed.number], states[done.number]) == ("FAIL", "COMPLETE")
    assert (retry.retry_of, retry.attempt) == (failed.number, 2)
    assert not journal.path.exists()


def test_a_driver_killed_while_asking_leaves_no_running_trial(
    storage: str, make_driver: Callable[..., Driver]
) -> None:
    driver = make_driver(storage)
    driver.study.optuna.ask()  # RUNNING, without parameters, owner or heartbeat
    asked(driver)
    first = driver.study.trials()[0]
    assert first.state == "FAIL"
    assert "while it asked" in first.user_attrs["reason"]
    assert not any(t.user_attrs.get("retry_of") == 0 for t in driver.study.trials())


def test_warm_starts_come_first_once_and_keep_their_recipe_over_retries(
    storage: str, make_driver: Callable[..., Driver]
) -> None:
    recipes = {
        "start": {},
        "high": {"optimization": {"optimizer": {"lr": 0.01, "weight_decay": 0.05}}},
    }
    space = make_space(warm_starts=["high", "start"], recipes=recipes)
    driver = make_driver(storage, space)
    again = make_driver(storage, space)
    first, second, third = asked(driver), asked(again), asked(driver)
    assert [t.warm_start for t in (first, second, third)] == ["high", "start", None]
    assert first.params[LR] == 0.01
    driver.tell(first.number, TrialResult("FAIL", retry="counted"))
    assert asked(driver).warm_start == "high"


def test_what_was_begun_goes_on_before_a_recipe_that_was_not(
    storage: str, make_driver: Callable[..., Driver]
) -> None:
    rates = {"first": 2e-3, "second": 5e-3}
    recipes = {name: {"optimization": {"optimizer": {"lr": lr}}} for name, lr in rates.items()}
    space = make_space(warm_starts=list(rates), recipes={"start": {}, **recipes})
    driver = make_driver(storage, space)
    first = asked(driver)
    driver.tell(first.number, TrialResult("FAIL", retry="free"))
    again = asked(driver)
    assert (again.retry_of, again.warm_start) == (first.number, "first")
    assert asked(driver).warm_start == "second"


@pytest.mark.parametrize(
    ("storage", "sampler"), on_databases(SAMPLERS, ["tpe"]), indirect=["storage"]
)
def test_what_was_tried_is_not_proposed_again(
    storage: str, make_driver: Callable[..., Driver], sampler: str
) -> None:
    space = make_space(
        parameters={"model.loss_balancing.strategy": {"choice": ["none", "uncertainty"]}},
        sampler={"name": sampler, "startup_trials": 1},
    )
    driver = make_driver(storage, space)
    seen = set()
    for _ in range(30):
        trial = driver.ask(100)
        if not isinstance(trial, Asked):
            break
        value = trial.params["model.loss_balancing.strategy"]
        assert value not in seen
        seen.add(value)
        driver.tell(trial.number, complete(0.3))
    assert trial == "done"
    assert seen == {"none", "uncertainty"}
    assert [t.state for t in driver.study.trials()] == ["COMPLETE", "COMPLETE"]


@pytest.mark.parametrize(
    ("storage", "sampler"), on_databases(SAMPLERS, ["tpe"]), indirect=["storage"]
)
def test_no_proposal_is_near_to_what_was_tried_or_runs(
    storage: str, make_driver: Callable[..., Driver], sampler: str
) -> None:
    parameters = {
        LR: {"float": [1e-4, 1e-2], "log": True},
        "model.loss_balancing.strategy": {"choice": ["none", "uncertainty"]},
    }
    settings = {"name": sampler, "startup_trials": 2, "min_distance": 0.1}
    space = make_space(parameters=parameters, sampler=settings, warm_starts=[])
    drivers = [make_driver(storage, space), make_driver(storage, space)]
    seen: list[tuple[str, float]] = []
    for index in range(9):
        trial = asked(drivers[index % 2])
        place = math.log10(trial.params[LR] / 1e-4) / 2
        choice = trial.params["model.loss_balancing.strategy"]
        assert all(other != choice or abs(place - at) >= 0.1 for other, at in seen)
        seen.append((choice, place))
        if index % 3:  # every third one runs on; of the others, one fails for good
            ended = complete(abs(place - 0.5)) if index % 3 == 1 else TrialResult("FAIL")
            drivers[index % 2].tell(trial.number, ended)


def test_where_the_space_is_full_a_smaller_distance_must_do(
    storage: str, make_driver: Callable[..., Driver]
) -> None:
    space = make_space(
        parameters={LR: {"float": [1e-4, 1e-2], "log": True}}, sampler={"min_distance": 0.4}
    )
    driver = make_driver(storage, space)
    rates = [asked(driver).params[LR] for _ in range(12)]
    assert len(set(rates)) == 12


def test_what_is_enqueued_by_hand_is_run_though_it_is_near_but_not_where_it_is_equal(
    storage: str, make_driver: Callable[..., Driver]
) -> None:
    space = make_space(
        parameters={LR: {"float": [1e-4, 1e-2], "log": True}},
        warm_starts=[],
        sampler={"min_distance": 0.1},
    )
    driver = make_driver(storage, space)
    driver.study.optuna.enqueue_trial({LR: 1e-3})
    first = asked(driver)
    driver.study.optuna.enqueue_trial({LR: 1.01e-3})
    assert asked(driver).params[LR] == 1.01e-3
    for _ in range(5):
        driver.study.optuna.enqueue_trial({LR: 1e-3})
    assert abs(math.log10(asked(driver).params[LR] / 1e-3)) >= 0.2
    equal = [t for t in driver.study.trials() if t.state == "FAIL"]
    assert [t.user_attrs["reason"] for t in equal] == [
        f"duplicate of trial {first.number}, not trained again"
    ] * 5
    (number,) = driver.study.enqueue_all({"mine": {"optimization": {"optimizer": {"lr": 9.9e-4}}}})
    assert driver.study.near_trials([number]) == {number: first.number}


def test_a_recipe_that_sets_more_than_is_searched_keeps_no_proposal_away() -> None:
    space = make_space(
        parameters={"model.loss_balancing.strategy": {"choice": ["none", "uncertainty"]}},
        recipes={"start": {}, "wider": {"optimization": {"optimizer": {"lr": 3e-3}}}},
    )
    params = {"model.loss_balancing.strategy": "none"}
    for recipe, near in (("start", 0), ("wider", None), ("dropped since", None)):
        trial = optuna.trial.create_trial(
            value=0.3,
            params=params,
            distributions={key: distribution_of(space.parameters[key]) for key in params},
            user_attrs={"owner": {"pid": 1}, "warm_start": recipe},
        )
        tried = TriedCandidates(space, 0.1)
        trial.number = 0
        tried.update([view_of(trial)])
        assert tried.near(params) == near, recipe


@pytest.mark.parametrize("retry", ["no", "counted"])
def test_what_failed_for_good_is_not_trained_again(
    storage: str, make_driver: Callable[..., Driver], retry: str
) -> None:
    space = make_space(
        parameters={"model.loss_balancing.strategy": {"choice": ["none", "uncertainty"]}},
        sampler={"name": "random"},
        budget={"retries": 1},
    )
    driver = make_driver(storage, space)
    trained = []
    while isinstance(trial := driver.ask(100), Asked):
        trained.append(trial.params["model.loss_balancing.strategy"])
        good = trained[-1] == "none"
        driver.tell(trial.number, complete(0.3) if good else TrialResult("FAIL", retry=retry))
    assert trial == "done"
    assert trained.count("none") == 1
    assert trained.count("uncertainty") == (1 if retry == "no" else 2)


def test_the_best_trial_is_the_best_feasible_one(
    storage: str, make_driver: Callable[..., Driver]
) -> None:
    driver = make_driver(storage)
    blobs, near, good = asked(driver), asked(driver), asked(driver)
    driver.tell(blobs.number, TrialResult("COMPLETE", 0.01, 0.3, {"metrics": METRICS}))
    assert not driver.study.best().is_feasible
    driver.tell(near.number, TrialResult("COMPLETE", 0.4, 0.1, {"metrics": METRICS}))
    assert driver.study.best().number == near.number
    driver.tell(good.number, TrialResult("COMPLETE", 0.5, -0.1, {"metrics": METRICS}))
    best = driver.study.best()
    assert (best.number, best.is_feasible) == (good.number, True)
    assert driver.study.optuna.best_trial.number == good.number


@pytest.mark.parametrize("name", ["median", "percentile", "successive_halving", "hyperband"])
def test_pruners_stop_what_stands_still_far_behind(
    tmp_path: Path, make_driver: Callable[..., Driver], name: str
) -> None:
    pruner = {"name": name, "warmup_evaluations": 2, "startup_trials": 2, "patience": 1}
    driver = make_driver(f"sqlite:///{tmp_path / 'p.db'}", make_space(pruner=pruner))
    for value in (0.2, 0.25, 0.3, 0.22, 0.21, 0.24):
        trial = asked(driver)
        for step in range(1, 9):
            driver.report(trial.number, step, value + 0.4 / step)
        driver.tell(trial.number, complete(value))
    trial = asked(driver)
    decisions = [driver.report(trial.number, step, 0.95) for step in range(1, 9)]
    assert decisions[0] == "go"
    assert "prune" in decisions


def test_wilcoxon_compares_the_folds_with_those_of_the_best_trial_at_the_same_evaluation(
    storage: str, make_driver: Callable[..., Driver]
) -> None:
    split = {"kind": "cross_validation", "folds": 4, "margin": 0}
    pruner = {"name": "wilcoxon", "warmup_evaluations": 2, "startup_trials": 1}
    space = make_space(pruner=pruner, fixed={"data": {"split": split}})
    driver = make_driver(storage, space)
    best = [0.30, 0.20, 0.25, 0.22]

    def judged(folds: list[float], violation: float = -0.2) -> list[str]:
        trial = asked(driver)
        said = []
        for step, above in ((1, 0.3), (2, 0.2), (3, 0.1)):
            now = [value + above for value in folds]
            said.append(driver.report(trial.number, step, sum(now) / 4, violation, now))
            if said[-1] == "prune":
                break
        end = complete(sum(folds) / 4) if said[-1] == "go" else TrialResult("PRUNED")
        driver.tell(trial.number, end)
        return said

    assert judged(best) == ["go", "go", "go"]
    assert judged([value + 0.05 for value in best]) == ["go", "prune"]
    assert judged([0.9, 0.19, 0.24, 0.21]) == ["go", "go", "go"]  # worse in the mean, in one fold
    assert judged([value - 0.1 for value in best], violation=0.4) == ["go", "prune"]
    retried = asked(driver)
    driver.report(retried.number, 1, 0.5, -0.2, best)
    driver.tell(retried.number, TrialResult("FAIL", retry="free"))
    number = asked(driver).number
    again = driver.study.trials()[number]
    assert again.user_attrs["fold_values"] == {"1": best}


def test_a_trial_that_still_improves_is_not_pruned(
    tmp_path: Path, make_driver: Callable[..., Driver]
) -> None:
    pruner = {"name": "median", "warmup_evaluations": 2, "startup_trials": 2, "patience": 1}
    driver = make_driver(f"sqlite:///{tmp_path / 'p.db'}", make_space(pruner=pruner))
    for value in (0.2, 0.25, 0.3):
        trial = asked(driver)
        for step in range(1, 6):
            driver.report(trial.number, step, value)
        driver.tell(trial.number, complete(value))
    trial = asked(driver)
    values = [0.9, 0.8, 0.7, 0.6]
    decisions = [driver.report(trial.number, i, v) for i, v in enumerate(values, start=1)]
    assert decisions == ["go"] * 4
    assert driver.report(trial.number, 5, 0.6) == "prune"


@pytest.mark.parametrize(
    ("storage", "name"),
    on_databases(["median", "percentile", "successive_halving", "hyperband"], ["median"]),
    indirect=["storage"],
)
def test_a_small_error_that_violates_the_guard_keeps_no_trial_alive(
    storage: str, make_driver: Callable[..., Driver], name: str
) -> None:
    pruner = {"name": name, "warmup_evaluations": 2, "startup_trials": 2, "patience": 1}
    driver = make_driver(storage, make_space(pruner=pruner))
    for value in (0.2, 0.25, 0.3, 0.22, 0.21, 0.24):
        trial = asked(driver)
        for step in range(1, 9):
            driver.report(trial.number, step, value, 0.4 if step == 1 else -0.2)
        driver.tell(trial.number, complete(value))
    blobs = asked(driver)
    assert "prune" in [driver.report(blobs.number, step, 0.01, 0.5) for step in range(1, 9)]
    shown = driver.study.trials()[blobs.number]
    assert set(shown.intermediate.values()) == {0.01}  # the error stays what it is
    good = asked(driver)
    assert {driver.report(good.number, step, 0.15, -0.3) for step in range(1, 9)} == {"go"}


def test_a_sampler_and_a_pruner_registered_at_run_time_are_used(
    tmp_path: Path, make_driver: Callable[..., Driver], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hydralv_tune.study.samplers.SAMPLERS", dict(SAMPLERS))
    monkeypatch.setattr("hydralv_tune.study.pruners.PRUNERS", dict(PRUNERS))
    made: list[tuple[int, int]] = []

    class StopsAll(optuna.pruners.BasePruner):
        def prune(self, study: optuna.Study, trial: Any) -> bool:
            return True

    def make(seed: int, startup_trials: int) -> optuna.samplers.BaseSampler:
        made.append((seed, startup_trials))
        return optuna.samplers.RandomSampler(seed=seed)

    named = {"sampler": {"name": "lab", "startup_trials": 3}, "pruner": {"name": "strict"}}
    with pytest.raises(ConfigError, match=r"sampler.name is 'lab', but it is unknown. Known: cmae"):
        check_space(make_space(**named), "here")
    register_sampler("lab", make, summary="Of a lab.")
    with pytest.raises(ConfigError, match=r"pruner.name is 'strict', but it is unknown"):
        check_space(make_space(**named), "here")
    register_pruner("strict", lambda _: StopsAll(), summary="Stops all.")
    with pytest.raises(InputError, match="'lab' is registered already"):
        register_sampler("lab", make, summary="Again.")
    check_space(make_space(**named), "here")
    driver = make_driver(f"sqlite:///{tmp_path / 's.db'}", make_space(**named))
    first, second = driver.ask(9), driver.ask(9)
    assert not isinstance(first, str)
    assert not isinstance(second, str)
    assert driver.report(first.number, 1, 0.5) == "prune"
    assert [startup for _, startup in made] == [3] * len(made)
    assert len({seed for seed, _ in made}) >= 2, "each trial has a seed of its own"


@pytest.mark.parametrize(
    ("owner", "name"), [(owner, name) for owner, names in PRIVATE_NAMES for name in names]
)
def test_optuna_still_has_the_private_name(owner: Any, name: str) -> None:
    assert hasattr(owner, name), (
        f"this release of Optuna has moved {owner.__name__}.{name}: mend study/optuna_private.py"
    )


@pytest.mark.parametrize("name", ["tpe", "gp", "random", "cmaes", "qmc"])
def test_samplers_search_by_name_and_no_pickle_goes_to_the_database(
    tmp_path: Path, make_driver: Callable[..., Driver], name: str
) -> None:
    storage = f"sqlite:///{tmp_path / 'x.db'}"
    sampler = {"name": name, "startup_trials": 3}
    space = make_space(sampler=sampler)
    for _ in range(2):  # a relaunch goes on
        driver = make_driver(storage, space)
        for _ in range(5):
            trial = asked(driver)
            driver.tell(trial.number, complete(abs(math.log10(trial.params[LR]) + 3)))
    trials = driver.study.trials()
    assert len({tuple(t.params.items()) for t in trials}) == 10
    attributes = [a for t in driver.study.frozen() for a in t.system_attrs]
    assert not any("optimizer" in a for a in attributes)


class Trap:
    """An object whose pickle makes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def test_a_pickle_in_the_database_is_never_loaded(
    tmp_path: Path, make_driver: Callable[..., Driver]
) -> None:
    trap = tmp_path / "sprung"
    space = make_space(sampler={"name": "cmaes", "startup_trials": 1})
    driver = make_driver(f"sqlite:///{tmp_path / 'x.db'}", space)
    for _ in range(3):
        trial = asked(driver)
        for prefix in ("cma", "sepcma", "cmawm"):
            driver.study.rdb.set_trial_system_attr(
                driver._live[trial.number]._trial_id,
                f"{prefix}:optimizer:0",
                pickle.dumps(Trap(trap)).hex(),
            )
        driver.tell(trial.number, complete(0.3))
    asked(driver)
    assert not trap.exists()
    pickle.loads(pickle.dumps(Trap(trap)))
    assert trap.exists()


def test_a_second_driver_does_not_draw_the_same_trials(
    storage: str, make_driver: Callable[..., Driver]
) -> None:
    one, two = make_driver(storage), make_driver(storage)
    params = [dict(asked(driver).params) for driver in (one, two, one, two)]
    assert len({tuple(p.items()) for p in params}) == 4


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an SQLite file for one writer, as another program may."""
    writer = sqlite3.connect(path, isolation_level=None)
    writer.execute("BEGIN EXCLUSIVE")
    try:
        yield
    finally:
        writer.execute("ROLLBACK")
        writer.close()


def test_results_wait_in_the_journal_while_sqlite_is_locked(
    tmp_path: Path, make_driver: Callable[..., Driver], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hydralv_tune.study.storage_url.BUSY_TIMEOUT_S", 0.2)
    path = tmp_path / "study.db"
    driver = make_driver(f"sqlite:///{path}", heartbeat_s=600)
    first, second = asked(driver), asked(driver)
    with locked(path):
        assert driver.report(first.number, 1, 0.4) == "go"
        assert driver.tell(first.number, complete(0.2)) == "kept"
        assert driver.waiting_results == 2
        with pytest.raises(DatabaseAway):
            driver.ask(10)
        with pytest.raises(DatabaseAway):
            driver.poll()
        assert driver.waiting_results == 2
    # What waits is told before anything else, and its trial is nobody's orphan until then.
    third = asked(driver)
    assert third.retry_of is None
    assert driver.waiting_results == 0
    told = driver.study.trials()[first.number]
    assert (told.state, told.value, dict(told.intermediate)) == ("COMPLETE", 0.2, {1: 0.4})
    assert driver.tell(second.number, complete(0.3)) == "told"


def test_the_journal_of_a_dead_driver_is_told_by_the_next_one(
    tmp_path: Path, make_driver: Callable[..., Driver]
) -> None:
    storage = f"sqlite:///{tmp_path / 'study.db'}"
    dead = make_driver(storage)
    trial = asked(dead)
    outcome = complete(0.15)
    entry = {"kind": "tell", "number": trial.number, "outcome": outcome.as_mapping()}
    process = {**own_process(), "start": "1"}
    dead._journal.append({**entry, "identity": dead.identity, "process": process})
    dead._live.clear()
    make_driver(storage)
    told = dead.study.trials()[trial.number]
    assert (told.state, told.value) == ("COMPLETE", 0.15)


def test_a_journal_survives_a_line_that_was_cut_off(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal-x.jsonl")
    journal.append({"a": 1})
    journal.append({"a": 2})
    with journal.path.open("a") as file:
        file.write('{"a": 3')
    told: list[dict[str, Any]] = []

    def tell(entry: dict[str, Any]) -> None:
        if entry["a"] == 2 and not told[1:]:
            told.append(entry)
            raise DatabaseAway("away")
        told.append(entry)

    with pytest.raises(DatabaseAway):
        journal.drain(tell)
    assert [entry["a"] for entry in journal.entries()] == [2]
    assert journal.drain(tell) == 1
    assert not journal.path.exists()


@contextmanager
def full_disk(limit: int) -> Iterator[None]:
    """Let no file of this process grow beyond so many bytes; what is written stops in mid-line."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_costs_no_result_and_spoils_no_line(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal-x.jsonl")
    journal.append({"a": 1})
    kept = journal.path.read_bytes()
    with full_disk(len(kept) + 4), pytest.warns(UserWarning, match="in memory alone"):
        journal.append({"a": 2})
    assert journal.path.read_bytes() == kept
    assert [entry["a"] for entry in journal.entries()] == [1, 2]
    journal.append({"a": 3})
    assert [entry["a"] for entry in Journal(journal.path).entries()] == [1, 2, 3]
    told: list[int] = []
    with full_disk(0):
        assert journal.drain(lambda entry: told.append(entry["a"])) == 3
    assert told == [1, 2, 3]
    assert journal.entries() == []


def test_a_line_that_was_cut_off_does_not_spoil_the_next(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal-x.jsonl")
    journal.append({"a": 1})
    with journal.path.open("a") as file:
        file.write('{"a": 2')
    journal.append({"a": 3})
    assert [entry["a"] for entry in journal.entries()] == [1, 3]


def test_results_are_told_though_neither_database_nor_disk_takes_them(
    tmp_path: Path, make_driver: Callable[..., Driver], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hydralv_tune.study.storage_url.BUSY_TIMEOUT_S", 0.2)
    path = tmp_path / "study.db"
    driver = make_driver(f"sqlite:///{path}", heartbeat_s=600)
    trial = asked(driver)
    with locked(path):
        with full_disk(4), pytest.warns(UserWarning, match="Make room"):
            assert driver.tell(trial.number, complete(0.2)) == "kept"
        driver._journal.path.unlink()
        assert driver.waiting_results == 1
    asked(driver)
    assert driver.study.trials()[trial.number].value == 0.2
    assert driver.waiting_results == 0


def begin(storage: str, out: Path, study: str = "s", **options: Any) -> Start:
    """Return the start of a run."""
    return Start(storage, study, options.pop("space", make_space()), out, **options)


def with_trial(folder: Path) -> Path:
    """Put a trial into a folder and return it."""
    (folder / "trials" / "0").mkdir(parents=True)
    return folder


def attributes_of(storage: str) -> dict[str, Any]:
    """Return what is stored about study `s`."""
    study = open_readonly(storage, "s")
    try:
        return dict(study.optuna.user_attrs)
    finally:
        study.close()


def test_a_start_that_is_refused_changes_neither_study_nor_folders(
    storage: str, tmp_path: Path
) -> None:
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    begin(storage, home).open({"im": "1"}).close()
    before = attributes_of(storage)
    assert before["out"] == str(home)
    wider = make_space(parameters={LR: {"float": [1e-6, 1e-1], "log": True}})
    pupil = begin(storage, elsewhere, warm_start_from="nosuch", extend=True)
    for start, image, words in (
        (begin(storage, elsewhere), "2", "other volumes; changed: im"),
        (begin(storage, elsewhere, extend=True), "2", "other volumes; changed: im"),
        (begin(storage, elsewhere, space=wider), "1", "another search space"),
        (pupil, "1", "warm-start-from nosuch"),
    ):
        with pytest.raises(StudyError, match=words):
            start.check({"im": image})
    with_trial(home)
    moved = begin(storage, elsewhere)
    for refuse in (moved.check, moved.open):
        with pytest.raises(StudyError, match="keeps its trials in") as caught:
            refuse({"im": "1"})
        assert f"--out {home}" in str(caught.value)
    assert attributes_of(storage) == before
    assert not elsewhere.exists()


def test_a_study_goes_on_where_its_folder_was_moved_to(storage: str, tmp_path: Path) -> None:
    home, moved, link = tmp_path / "home", tmp_path / "moved", tmp_path / "link"
    begin(storage, with_trial(home) / "s").open({}).close()
    with_trial(home / "s").rename(moved)
    begin(storage, moved).open({}).close()
    assert attributes_of(storage)["out"] == str(moved)
    link.symlink_to(moved)
    begin(storage, link).check({})


def test_results_that_wait_hold_a_study_in_its_folder(storage: str, tmp_path: Path) -> None:
    home = tmp_path / "home"
    begin(storage, home).open({}).close()
    Journal(home / "journal-x.jsonl").append({"kind": "tell"})
    with pytest.raises(StudyError, match="keeps its trials in"):
        begin(storage, tmp_path / "elsewhere").check({})


def test_a_folder_belongs_to_one_study(storage: str, tmp_path: Path) -> None:
    home = tmp_path / "home"
    for _ in range(2):  # two drivers of one study share it
        begin(storage, home).open({}).close()
    other = begin(storage, home, "other")
    with pytest.raises(StudyError, match="belongs to study 's'"):
        other.check({})
    assert study_names(storage) == ["s"]
    study = open_readonly(storage, "s")
    study.rdb.delete_study(study.optuna._study_id)
    study.close()
    with pytest.raises(StudyError, match="another study of the name 's'"):
        begin(storage, home).check({})
    assert study_names(storage) == []


def test_an_empty_database_answers(storage: str) -> None:
    if storage.startswith("sqlite"):
        Path(storage.removeprefix("sqlite:///")).touch()
    assert study_names(storage) == []


@pytest.mark.parametrize("password", [None, "wrong"])
def test_a_missing_password_is_asked_for_where_it_belongs(
    postgres: Any, password: str | None
) -> None:
    name = f"u{uuid.uuid4().hex[:8]}"
    postgres.server.psql(f"CREATE ROLE {name} LOGIN PASSWORD 'right';")
    rules = postgres.folder / "data" / "pg_hba.conf"
    trusting = rules.read_text()
    rules.write_text(f"local all {name} scram-sha-256\nhost all {name} all md5\n{trusting}")
    postgres.server.psql("SELECT pg_reload_conf();")
    url = sqlalchemy.make_url(postgres.url()).set(username=name)
    try:
        assert isinstance(study_names(url.set(password="right").render_as_string(False)), list)
        with pytest.raises(StudyError, match="lets nobody in without") as caught:
            study_names(url.set(password=password).render_as_string(False))
    finally:
        rules.write_text(trusting)
    assert f":5432:postgres:{name}:PASSWORD" in str(caught.value)
    assert "wrong" not in str(caught.value)


def test_a_folder_from_before_such_marks_is_its_studys(storage: str, tmp_path: Path) -> None:
    home = with_trial(tmp_path / "home")
    with pytest.raises(StudyError, match="are another's"):
        begin(storage, home).check({})
    old = Study.open(storage, "s", space=make_space(), create=True)
    old.remember("out", str(home))
    old.close()
    begin(storage, home).check({})
    assert not (home / MARKER).exists()
    begin(storage, home).open({}).close()
    owner = owner_of(home)
    assert owner is not None
    assert owner == Owner("s", attributes_of(storage)["identity"])


def test_of_two_studies_that_come_at_once_one_has_the_folder(tmp_path: Path) -> None:
    for index in range(20):
        folder, barrier = tmp_path / str(index), threading.Barrier(4)

        def claim(name: str, folder: Path = folder, barrier: Any = barrier) -> str | None:
            barrier.wait()
            try:
                claim_out(folder, Owner(name, name))
            except StudyError:
                return None
            return name

        with ThreadPoolExecutor(4) as pool:
            winners = [name for name in pool.map(claim, "abcd") if name is not None]
        owner = owner_of(folder)
        assert owner is not None
        assert winners == [owner.study]
        assert [path.name for path in folder.iterdir()] == [MARKER]


def test_a_start_that_cannot_be_leaves_nothing_behind(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path / 'study.db'}"
    with pytest.raises(StudyError, match=r"warm-start-from nosuch.*does not exist"):
        begin(storage, tmp_path / "out", warm_start_from="nosuch").check({})
    for place in ("/proc", "/sys", "/proc/self/fd"):
        with pytest.raises(StudyError, match="cannot be made"):
            begin(f"sqlite:///{place}/x/study.db", tmp_path / "out").check({})
        with pytest.raises(StudyError, match=f"--out: {place}"):
            begin(storage, Path(place) / "x").check({})
    assert list(tmp_path.iterdir()) == []


def test_a_database_that_cannot_be_locked_is_refused_before_anything_runs(tmp_path: Path) -> None:
    path = tmp_path / "study.db"
    Path(f"{path}.lock").mkdir()
    with pytest.raises(StudyError, match=r"study\.db\.lock cannot be locked"):
        Study.open(f"sqlite:///{path}", "s", space=make_space(), create=True)
    assert not path.exists()


def test_a_study_is_looked_for_without_a_trace(storage: str, tmp_path: Path) -> None:
    assert open_if_exists(storage, "s") is None
    assert list(tmp_path.iterdir()) == []
    Study.open(storage, "s", space=make_space(), create=True).close()
    assert open_if_exists(storage, "other") is None
    found = open_if_exists(storage, "s")
    assert found is not None
    found.close()


def test_a_changed_space_is_refused_with_the_difference_or_accepted_when_told(
    tmp_path: Path, make_driver: Callable[..., Driver]
) -> None:
    storage = f"sqlite:///{tmp_path / 'study.db'}"
    asked(make_driver(storage))
    wider = make_space(
        parameters={LR: {"float": [1e-6, 1e-1], "log": True}, DECAY: {"float": [0.0, 0.1]}}
    )
    with pytest.raises(StudyError, match=r"1e-05.*1e-06") as caught:
        Study.open(storage, "s", space=wider, create=True)
    assert "--extend" in str(caught.value)
    Study.open(storage, "s", space=wider, create=True, extend=True)
    assert open_readonly(storage, "s").space.parameters[LR].float_ == (1e-6, 1e-1)
    # A larger budget is no change of the space.
    Study.open(storage, "s", space=wider.model_copy(update={"budget": wider.budget}), create=True)
    choices = make_space(parameters={LR: {"choice": [1e-3, 1e-4]}, DECAY: {"float": [0.0, 0.1]}})
    with pytest.raises(StudyError, match="cannot change within a study"):
        Study.open(storage, "s", space=choices, create=True, extend=True)


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("objective", {"objective": {"metric": "f1_iou50"}}),
        ("objective", {"objective": {"guard": {"f1_iou50": 0.9}}}),
        ("data.split", {"fixed": {"data": {"split": {"kind": "holdout"}}}}),
    ],
)
def test_what_the_values_mean_cannot_change_within_a_study(
    tmp_path: Path, make_driver: Callable[..., Driver], what: str, change: dict[str, Any]
) -> None:
    storage = f"sqlite:///{tmp_path / 'study.db'}"
    driver = make_driver(storage)
    driver.tell(asked(driver).number, complete(0.3))
    with pytest.raises(StudyError, match=f"{what} cannot change .* --warm-start-from s"):
        Study.open(storage, "s", space=make_space(**change), create=True, extend=True)
    assert open_readonly(storage, "s").space == driver.space
    other_goal = make_space(objective={"stop_at": 0.001})
    Study.open(storage, "s", space=other_goal, create=True, extend=True)


def test_other_volumes_are_refused(tmp_path: Path) -> None:
    study = Study.open(f"sqlite:///{tmp_path / 's.db'}", "s", space=make_space(), create=True)
    study.settle_volumes({"a": "1234"})
    study.settle_volumes({"a": "1234"})
    with pytest.raises(StudyError, match="other volumes; changed: a"):
        study.settle_volumes({"a": "9999"})
    assert study.optuna.user_attrs["volumes"] == {"a": "1234"}


def test_trials_of_an_earlier_study_teach_and_count_for_nothing(
    tmp_path: Path, make_driver: Callable[..., Driver]
) -> None:
    storage = f"sqlite:///{tmp_path / 'study.db'}"
    driver = make_driver(storage)
    inside = asked(driver)
    driver.tell(inside.number, complete(0.2))
    failed = asked(driver)
    driver.tell(failed.number, TrialResult("FAIL"))
    narrow = {LR: {"float": [inside.params[LR] * 0.9, 0.1], "log": True}, DECAY: {"float": [0, 1]}}
    later = Study.open(storage, "later", space=make_space(parameters=narrow), create=True)
    assert later.import_trials(driver.study) == 1
    assert later.import_trials(driver.study) == 0
    facts = later.facts()
    assert facts["trials"]["complete"] == 0
    assert facts["best"] is None
    assert later.trials()[0].value == METRICS["adapted_rand_error"]
    elsewhere = {LR: {"float": [1e-7, 1e-6], "log": True}, DECAY: {"float": [0, 1]}}
    other = Study.open(storage, "other", space=make_space(parameters=elsewhere), create=True)
    assert other.import_trials(driver.study) == 0


def test_trials_of_an_earlier_study_are_seen_by_the_objective_of_this_one(
    tmp_path: Path, make_driver: Callable[..., Driver]
) -> None:
    recipes = {
        "start": {},
        "plain": {"optimization": {"optimizer": {"lr": 0.01}}},
        "other": {"optimization": {"optimizer": {"lr": 0.02}, "max_epochs": 700}},
    }
    storage = f"sqlite:///{tmp_path / 'study.db'}"
    driver = make_driver(storage, make_space(recipes=recipes, warm_starts=["plain", "other"]))
    for _ in recipes:
        trial = asked(driver)
        driver.report(trial.number, 1, 0.4, -0.3)
        driver.tell(trial.number, complete(0.2))
    strict = {"metric": "f1_iou50", "guard": {"f1_iou50": 0.9}}
    later = Study.open(storage, "later", space=make_space(objective=strict), create=True)
    assert later.import_trials(driver.study) == 2  # what `other` sets beside is not searched here
    labels = [view.user_attrs["imported_from"] for view in later.trials()]
    assert labels == ["s#0", "s#2"]
    for view in later.trials():
        assert view.value == pytest.approx(1 - METRICS["f1_iou50"])
        assert view.violation == pytest.approx(0.9 - METRICS["f1_iou50"])
        assert not view.intermediate


def test_reading_creates_nothing_and_says_what_is_missing(tmp_path: Path) -> None:
    absent = tmp_path / "absent.db"
    with pytest.raises(StudyError, match=r"absent\.db does not exist"):
        open_readonly(f"sqlite:///{absent}", "s")
    assert list(tmp_path.iterdir()) == []
    empty = tmp_path / "empty.db"
    sqlite3.connect(empty).close()
    empty.touch()
    with pytest.raises(StudyError, match="holds no study"):
        open_readonly(f"sqlite:///{empty}", "s")
    assert empty.stat().st_size == 0
    text = tmp_path / "text.db"
    text.write_text("no database at all, only words")
    with pytest.raises(StudyError, match="does not answer"):
        open_readonly(f"sqlite:///{text}", "s")
    full = tmp_path / "full.db"
    Study.open(f"sqlite:///{full}", "hydra", space=make_space(), create=True).close()
    with pytest.raises(StudyError, match="Did you mean 'hydra'"):
        open_readonly(f"sqlite:///{full}", "hydar")
    assert study_names(f"sqlite:///{full}") == ["hydra"]


def test_passwords_are_masked_everywhere(tmp_path: Path) -> None:
    url = "postgresql://me:s3cr3t@127.0.0.1:1/db?connect_timeout=2"
    for create in (True, False):
        with pytest.raises(StudyError) as caught:
            Study.open(url, "s", space=make_space(), create=create)
        assert "s3cr3t" not in str(caught.value)
        assert caught.value.__cause__ is None
        assert "127.0.0.1" in str(caught.value)
    assert (
        masked(parse_storage(url)) == "postgresql+psycopg://me:***@127.0.0.1:1/db?connect_timeout=2"
    )
    assert mask_passwords("x://a:b@c y://d:e@f?password=g&h=1") == (
        "x://a:***@c y://d:***@f?password=***&h=1"
    )


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("x://u:top secret@h:1/d", "x://u:***@h:1/d"),
        ("x://u:top@secret@h/d", "x://u:***@h/d"),
        ("x://me@corp:secret@h/d", "x://me@corp:***@h/d"),
        ("x://u:sec/ret?#@h/d", "x://u:***@h/d"),
        ("x://u@h/d?sslpassword=secret&a=1", "x://u@h/d?sslpassword=***&a=1"),
        ("x://u@h/d?a=1&Client_Secret=s e c", "x://u@h/d?a=1&Client_Secret=***"),
        ("x://u@h/d?auth.token=secret", "x://u@h/d?auth.token=***"),
        ("host=h password = 's e' user=u", "host=h password = *** user=u"),
        ("password authentication failed", "password authentication failed"),
    ],
)
def test_a_secret_is_hidden_whole(url: str, shown: str) -> None:
    assert mask_passwords(url) == shown
    assert mask_passwords(shown) == shown


def test_secrets_in_the_query_of_a_url_do_not_stay_with_a_study() -> None:
    url = parse_storage("postgresql://u:p@h/d?sslpassword=secret&sslmode=require")
    assert masked(url) == "postgresql+psycopg://u:***@h/d?sslmode=require&sslpassword=***"
    assert url.query["sslpassword"] == "secret"


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("study.db", "no database URL"),
        ("mysql://a:b@c/d", "SQLite or PostgreSQL"),
        ("sqlite://", "names no file"),
        ("sqlite:///:memory:", "names no file"),
        ("sqlite:///file::memory:?uri=true", "names no file"),
        ("sqlite:///file:study.db?uri=true", "SQLite URI"),
        ("sqlite:///file:x?mode=memory&cache=shared&uri=true", "names no file"),
        ("sqlite+aiosqlite:///study.db", "studies use pysqlite"),
        ("postgresql+asyncpg://a:b@c/d", r"'asyncpg'.*postgresql\+psycopg://"),
        ("postgresql+pg8000://a:b@c/d", r"'pg8000'.*postgresql\+psycopg://"),
        ("postgresql://a:b@b@c/d", "%40"),
    ],
)
def test_storages_that_cannot_hold_a_study_are_refused(url: str, words: str) -> None:
    with pytest.raises(StudyError, match=words):
        parse_storage(url)


def test_names_in_the_database_cannot_leave_the_output_folder(
    tmp_path: Path, make_driver: Callable[..., Driver]
) -> None:
    driver = make_driver(f"sqlite:///{tmp_path / 's.db'}")
    trial = asked(driver)
    driver.study.remember("out", str(tmp_path))
    driver.tell(trial.number, complete(0.1, checkpoint="/etc/passwd", record="../../x"))
    view = driver.study.best()
    assert driver.study.folder_of(view) == tmp_path / "trials" / "0"


def test_the_mutex_excludes_other_processes_and_falls_with_its_holder(storage: str) -> None:
    script = (
        "import sys, time\n"
        "from hydralv_tune.study.mutex import StudyMutex\n"
        "from hydralv_tune.study.storage_url import parse_storage\n"
        f"with StudyMutex(parse_storage({storage!r}), 's'):\n"
        "    print('held', flush=True)\n"
        "    time.sleep(60)\n"
    )
    holder = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(MutexLost), StudyMutex(parse_storage(storage), "s", timeout_s=0.5):
            pass
        holder.kill()
        holder.wait(10)
        with StudyMutex(parse_storage(storage), "s", timeout_s=10) as mutex, mutex:
            pass
    finally:
        holder.kill()
        holder.wait(10)
        holder.stdout.close()


def test_a_process_is_known_by_its_start_and_a_zombie_is_dead() -> None:
    assert not is_surely_dead(own_process())
    assert is_surely_dead({**own_process(), "start": "1"})
    assert not is_surely_dead({**own_process(), "machine": "elsewhere", "start": "1"})
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    process = {**own_process(), "pid": child.pid, "start": process_start(child.pid)}
    assert not is_surely_dead(process)
    child.kill()
    deadline = time.monotonic() + 10
    while not is_surely_dead(process):  # while nobody has waited for it, it is a zombie
        assert time.monotonic() < deadline
    child.wait()
    assert is_surely_dead(process)


def test_many_threads_asking_never_pass_the_target(
    storage: str, make_driver: Callable[..., Driver]
) -> None:
    drivers = [make_driver(storage) for _ in range(3)]
    errors: list[BaseException] = []

    def work(driver: Driver) -> None:
        try:
            while (trial := driver.ask(12)) != "done":
                if isinstance(trial, Asked):
                    driver.tell(trial.number, complete(0.5))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(driver,)) for driver in drivers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors
    facts = drivers[0].study.facts()["trials"]
    assert facts == {"complete": 12, "pruned": 0, "fail": 0, "running": 0, "waiting": 0}
