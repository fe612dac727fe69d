"""Trials that the pruner stops are paused: they go on when they are among the best of all."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from study_checks import check_truth, make_space
from test_study import METRICS, abandon, asked
from test_trial import brief, final_weights, run, spec

from hydralv_tune.config.errors import TrialInterrupted
from hydralv_tune.study.driver import Driver
from hydralv_tune.study.study import open_readonly
from hydralv_tune.study.trial_views import Asked, TrialResult
from hydralv_tune.trial.spec import Evaluation

STEPS = 4
PAUSING = {"name": "median", "warmup_evaluations": 1, "startup_trials": 2, "patience": 0,
           "revive": 0.34}  # fmt: skip
QUICK = {"heartbeat_s": 1.0, "grace_s": 8.0}


def paused(**attributes: Any) -> TrialResult:
    """Return how a trial ends that the pruner stopped, as the coordinator tells it."""
    return TrialResult("PRUNED", None, -0.3, {"resumable": True, "metrics": METRICS, **attributes})


def trained(driver: Driver, trial: Asked, errors: list[float], done: dict[int, int]) -> str:
    """Run a trial from its checkpoint to its end, or until it is paused; return its state."""
    for step in range(done.get(trial.root, 0) + 1, STEPS + 1):
        done[trial.root] = step
        if driver.report(trial.number, step, errors[step - 1], -0.3) == "prune":
            assert driver.tell(trial.number, paused()) == "told"
            return "PRUNED"
    ended = TrialResult("COMPLETE", errors[-1], -0.3, {"metrics": METRICS})
    assert driver.tell(trial.number, ended) == "told"
    return "COMPLETE"


def test_a_paused_trial_goes_on_once_it_is_among_the_best(
    storage: str, make_driver: Callable[..., Driver]
) -> None:
    space = make_space(pruner=PAUSING, sampler={"name": "random"})
    driver, done = make_driver(storage, space), dict[int, int]()
    for error in (0.2, 0.3):
        assert trained(driver, asked(driver, 8), [error] * STEPS, done) == "COMPLETE"
    slow = asked(driver, 8)
    late = [0.4, 0.35, 0.1, 0.05]  # it would be the best of all
    assert trained(driver, slow, late, done) == "PRUNED"
    assert done[slow.root] == 1
    (told,) = [t for t in driver.study.trials() if t.state == "PRUNED"]
    assert driver.study.optuna.trials[told.number].user_attrs["resumable"] is True
    ends = []
    while True:
        trial = asked(driver, 12)
        if trial.retry_of is not None:
            break
        ends.append(trained(driver, trial, [0.6] * STEPS, done))
    assert set(ends) == {"PRUNED"}
    # Not before it was among the first third, and not long after.
    assert len(ends) == 3  # 2 of 6 are ahead of it
    assert (trial.retry_of, trial.root, trial.attempt) == (slow.number, slow.root, 1)
    assert dict(trial.params) == dict(slow.params)
    frozen = driver.study.trials()[trial.number]
    assert dict(frozen.intermediate) == {1: 0.4}
    counts = driver.study.facts()["trials"]
    assert (counts["pruned"], counts["running"]) == (3, 1)  # it is counted once
    assert trained(driver, trial, late, done) == "COMPLETE"  # and is pruned no more
    facts = driver.study.facts()
    assert facts["best"]["number"] == trial.number
    assert facts["trials"] == {"complete": 3, "pruned": 3, "fail": 0, "running": 0, "waiting": 0}
    assert asked(driver, 12).retry_of is None  # the others are worse, and it goes on but once


@pytest.mark.parametrize(
    "storage", ["sqlite", pytest.param("postgresql", marks=pytest.mark.slow)], indirect=True
)
def test_the_number_of_trials_is_the_same_with_and_without_pauses(
    storage: str, make_driver: Callable[..., Driver]
) -> None:
    ended = {}
    for revive in (0.0, 0.5):
        space = make_space(pruner={**PAUSING, "revive": revive}, sampler={"name": "random"})
        driver, done = make_driver(f"{storage}", space), dict[int, int]()
        chance, asks = random.Random(3), 0
        while isinstance(trial := driver.ask(20), Asked):
            asks += 1
            trained(driver, trial, [chance.random() / step for step in range(1, 5)], done)
        counts = driver.study.facts()["trials"]
        assert counts["complete"] + counts["pruned"] == 20
        ended[revive] = (counts["complete"], asks)
        driver.study.optuna._storage.delete_study(driver.study.optuna._study_id)
    assert ended[0.0][1] == 20  # nothing went on
    assert ended[0.5][1] > 20


def test_where_nothing_is_left_to_try_the_paused_ones_go_on(
    storage: str, make_driver: Callable[..., Driver]
) -> None:
    space = make_space(
        parameters={"data.augmentation.preset": {"choice": ["none", "some", "all"]}},
        pruner={**PAUSING, "startup_trials": 1, "revive": 0.01},
    )
    driver, done = make_driver(storage, space), dict[int, int]()
    errors, states = iter([0.1, 0.5, 0.4, 0.4, 0.5]), []
    while isinstance(trial := driver.ask(100), Asked):
        states.append((trained(driver, trial, [next(errors)] * STEPS, done), trial.retry_of))
    assert trial == "done"
    assert states == [
        ("COMPLETE", None), ("PRUNED", None), ("PRUNED", None), ("COMPLETE", 2), ("COMPLETE", 1),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "storage", ["sqlite", pytest.param("postgresql", marks=pytest.mark.slow)], indirect=True
)
def test_twelve_kills_with_paused_trials_lose_nothing_and_train_nothing_twice(
    storage: str, make_driver: Callable[..., Driver]
) -> None:
    """Kills come while a trial is asked for, trained, or was told, also one that goes on."""
    space = make_space(pruner={**PAUSING, "revive": 0.5}, sampler={"name": "random"})
    chance, steps, kills = random.Random(7), dict[int, list[tuple[int, int]]](), 0
    driver, wanted, revived_when_killed = make_driver(storage, space), 24, 0
    while (trial := driver.ask(wanted)) != "done":
        assert isinstance(trial, Asked)
        made = steps.setdefault(trial.root, [])
        first, quality = (random.Random(trial.root + i).random() for i in (0, 1000))
        dies_at = chance.randint(0, STEPS) if kills < 12 and chance.random() < 0.35 else None
        state = None
        for step in range(len(made) + 1, STEPS + 1):
            if dies_at is not None and step > dies_at:
                break
            made.append((trial.number, step))
            seen = first if step == 1 else quality
            if driver.report(trial.number, step, seen, -0.3) == "prune":
                driver.tell(trial.number, paused())
                state = "PRUNED"
                break
        if dies_at is not None:
            kills += 1
            revived_when_killed += trial.retry_of is not None and state is None
            abandon(driver)
            driver = make_driver(storage, space)
        elif state is None:
            driver.tell(trial.number, TrialResult("COMPLETE", quality, -0.3, {"metrics": METRICS}))
    assert kills == 12
    assert revived_when_killed > 0
    trials = driver.study.trials()
    went_on = [t for t in trials if t.user_attrs.get("revived") and t.state == "COMPLETE"]
    assert went_on
    check_truth(driver.study, steps, wanted)


@pytest.mark.slow
def test_a_real_run_pauses_and_goes_on_and_makes_no_step_twice(fake_study: Any) -> None:
    space = {"pruner": {**PAUSING, "revive": 0.5}, "sampler": {"name": "random"}}
    config = {"trials": 14, "steps": 5, "step_s": 0.05, "space": space, "options": QUICK}
    driver = fake_study.start(**config)
    fake_study.until(lambda rows: sum(r.get("event") == "trial_pruned" for r in rows) >= 3)
    driver.kill()
    driver.wait(30)
    facts = fake_study.run(**config)
    study = open_readonly(facts["storage"], "fake")
    check_truth(study, fake_study.steps(), 14)
    revived = [t for t in study.trials() if t.user_attrs.get("revived")]
    assert any(t.state == "COMPLETE" for t in revived)


def test_a_paused_training_that_goes_on_ends_at_the_weights_of_one_never_paused(
    make_driver: Callable[..., Driver], tmp_path: Path
) -> None:
    monitor = {"evaluation": {"count": 4}, "early_stopping": {"enabled": False}}
    chosen, whole, out = brief(monitor=monitor), tmp_path / "whole", tmp_path / "paused"
    run(spec(whole, chosen))
    driver = make_driver(
        f"sqlite:///{tmp_path / 's.db'}",
        make_space(pruner={**PAUSING, "startup_trials": 1, "revive": 1.0}),
    )
    first, second = asked(driver, 3), asked(driver, 3)
    assert trained(driver, first, [0.0] * STEPS, {}) == "COMPLETE"
    evaluations = []

    def part(trial: Asked) -> Callable[[Evaluation], None]:
        def hear(evaluation: Evaluation) -> None:
            evaluations.append((trial.number, evaluation.step))
            if driver.report(trial.number, evaluation.step, evaluation.value, -0.3) == "prune":
                raise TrialInterrupted("paused")

        return hear

    with pytest.raises(TrialInterrupted):
        run(spec(out, chosen, number=second.number, root=second.root), part(second))
    assert driver.tell(second.number, paused()) == "told"
    revived = asked(driver, 3)
    assert (revived.retry_of, revived.root) == (second.number, second.root)
    run(spec(out, chosen, number=revived.number, root=revived.root), part(revived))
    # The first evaluation is not trained again: it is told again, since a database may lack it.
    assert evaluations == [(second.number, 1), *((revived.number, step) for step in (1, 2, 3, 4))]
    expected, got = final_weights(whole), final_weights(out)
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[key], got[key]) for key in expected)
