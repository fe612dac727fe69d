"""The best trials of a search are trained again with other seeds, and the best mean wins."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState
from study_checks import make_space
from test_study import abandon, asked, complete

from hydralv_tune.artifacts.records import read_record
from hydralv_tune.config.search_space import ConfirmBudget, SearchSpace
from hydralv_tune.results.export.export import export_best
from hydralv_tune.results.report.report import write_report
from hydralv_tune.study.confirm import budget_of, missing_repeats
from hydralv_tune.study.driver import Driver
from hydralv_tune.study.earlier import lesson_of
from hydralv_tune.study.ending import search_is_over
from hydralv_tune.study.study import Study, open_readonly
from hydralv_tune.study.trial_views import Asked, TrialResult

CONFIRM = {"budget": {"confirm": {"top": 2, "seeds": 2}}}
QUICK = {"heartbeat_s": 1.0, "grace_s": 8.0}


def searched(driver: Driver, values: list[float]) -> list[Asked]:
    """Train so many candidates to these values, and check that there are no more."""
    trials = []
    for value in values:
        trials.append(asked(driver, len(values)))
        assert driver.tell(trials[-1].number, complete(value)) == "told"
    assert driver.ask(len(values)) == "done"
    return trials


def again(driver: Driver, target: int) -> Asked:
    """Ask for a repeat, which there must be."""
    trial = driver.ask_again(target)
    assert isinstance(trial, Asked), trial
    return trial


def test_the_best_by_their_mean_is_the_best_and_the_number_of_trials_stays(
    storage: str, make_driver: Callable[..., Driver]
) -> None:
    driver = make_driver(storage, make_space(**CONFIRM))
    trials = searched(driver, [0.3, 0.1, 0.2, 0.4])
    lucky, steady = trials[1], trials[2]
    values = {lucky.number: iter([0.35, 0.45]), steady.number: iter([0.22, 0.21])}
    seeds = []
    while isinstance(trial := driver.ask_again(4), Asked):
        of = driver.study.trials()[trial.number].user_attrs["repeat_of"]
        assert dict(trial.params) == dict(trials[of].params)
        assert driver.study.best().number == lucky.number  # until both have all their seeds
        seeds.append((of, trial.seed_shift))
        assert driver.report(trial.number, 1, 0.9, -0.3) == "go"
        driver.tell(trial.number, complete(next(values[of])))
    assert trial == "done"
    assert seeds == [(1, 1), (1, 2), (2, 1), (2, 2)]
    facts = driver.study.facts()
    assert facts["best"]["number"] == steady.number
    assert facts["trials"] == {"complete": 4, "pruned": 0, "fail": 0, "running": 0, "waiting": 0}
    confirmed = facts["confirmed"]
    assert confirmed["mean"] == pytest.approx(0.21)
    assert confirmed["spread"] == pytest.approx(0.01)
    assert confirmed["seeds"] == 3
    assert "trial 1, the best of the search at 0.1000, has 0.3000" in confirmed["sentence"]
    assert {t.state for t in driver.study.optuna.trials} == {TrialState.COMPLETE}
    assert list(driver.study.table()["repeat_of"].dropna()) == [1, 1, 2, 2]


def test_a_repeat_that_fails_for_good_confirms_nothing(
    storage: str, make_driver: Callable[..., Driver]
) -> None:
    driver = make_driver(storage, make_space(**CONFIRM))
    searched(driver, [0.1, 0.2, 0.3])
    for value in (0.15, None, 0.12, 0.12):
        trial = again(driver, 3)
        diverged = TrialResult("FAIL", attributes={"reason": "the loss is not a number"})
        driver.tell(trial.number, diverged if value is None else complete(value))
    assert driver.ask_again(3) == "done"  # what fails for good is not trained again
    facts = driver.study.facts()
    assert facts["best"]["number"] == 0
    assert (facts["confirmed"]["seeds"], facts["confirmed"]["wanted"]) == (2, 3)
    assert "1 more are wanted" in facts["confirmed"]["sentence"]


def test_kills_train_no_repeat_twice_and_lose_none(
    storage: str, make_driver: Callable[..., Driver]
) -> None:
    space = make_space(budget={"confirm": {"top": 3, "seeds": 2}})
    driver = make_driver(storage, space)
    searched(driver, [0.5, 0.1, 0.2, 0.3])
    chance, kills, steps = random.Random(1), 0, dict[int, list[int]]()
    while isinstance(trial := driver.ask_again(4), Asked):
        made = steps.setdefault(trial.root, [])
        dies = kills < 8 and chance.random() < 0.6
        for step in range(len(made) + 1, chance.randint(1, 3) if dies else 4):
            made.append(step)
            driver.report(trial.number, step, 0.3, -0.3)
        if dies:
            kills += 1
            abandon(driver)
            driver = make_driver(storage, space)
        else:
            driver.tell(trial.number, complete(0.3))
    assert kills >= 4
    repeats = [t for t in driver.study.trials() if t.is_repeat and t.state == "COMPLETE"]
    told = [(t.user_attrs["repeat_of"], t.user_attrs["seed_shift"]) for t in repeats]
    assert sorted(told) == [(n, s) for n in (1, 2, 3) for s in (1, 2)]
    assert all(made == [1, 2, 3] for made in steps.values())
    assert driver.study.facts()["trials"]["complete"] == 4


def study_of(storage: str, space: SearchSpace) -> Study:
    """Return a new study under the name of its space."""
    return Study.open(storage, space.name, space=space, create=True)


def test_repeats_teach_neither_sampler_nor_pruner_nor_a_later_study(
    storage: str, make_driver: Callable[..., Driver]
) -> None:
    """A search that goes on after its best were repeated proposes what it would have without."""
    proposed, verdicts = [], []
    for confirm in ({"top": 2, "seeds": 3}, {"top": 0}):
        space = make_space(
            budget={"confirm": confirm},
            pruner={"name": "median", "warmup_evaluations": 1, "startup_trials": 2},
        )
        driver = make_driver(storage, space)
        for number in range(8):
            trial = asked(driver, 8)
            driver.report(trial.number, 1, 0.1 * number, -0.3)
            driver.tell(trial.number, complete(0.1 * number))
        while isinstance(trial := driver.ask_again(8), Asked):
            driver.report(trial.number, 1, 0.0, -0.3)  # would move the median
            driver.tell(trial.number, complete(0.0))
        # The seed of a proposal is the number of trials, so both must have as many.
        while len(driver.study.frozen()) < 14:
            driver.study.optuna.add_trial(optuna.trial.create_trial(state=TrialState.FAIL))
        later = make_space(name="later")
        lesson = lesson_of(space, driver.study.trials(), "earlier")
        assert lesson is not None
        assert len(lesson.ranks) == 8
        assert study_of(storage, later).import_trials(driver.study) == 8
        trial = asked(driver, 20)
        proposed.append(dict(trial.params))
        verdicts.append(driver.report(trial.number, 1, 0.3, -0.3))
        for name in ("s", "later"):
            optuna.delete_study(study_name=name, storage=driver.study.rdb)
    assert proposed[0] == proposed[1]
    assert verdicts == ["go", "go"]


@pytest.mark.parametrize(
    ("budget", "target", "top"),
    [({}, 60, 3), ({}, 59, 0), ({"confirm": {"top": 1}}, 4, 1), ({"confirm": {"top": 0}}, 60, 0)],
)
def test_without_a_word_in_the_space_a_tenth_of_the_trials_is_repeated(
    budget: dict[str, Any], target: int, top: int
) -> None:
    assert budget_of(make_space(budget=budget), target).top == top


def test_a_goal_that_was_reached_ends_a_search_for_good(
    storage: str, make_driver: Callable[..., Driver]
) -> None:
    space = make_space(objective={"stop_at": 0.15}, **CONFIRM)
    driver = make_driver(storage, space)
    for value in (0.3, 0.1):
        driver.tell(asked(driver, 10).number, complete(value))
    assert search_is_over(space, driver.study.trials(), 10)
    for value in (0.9, 0.9, 0.2, 0.2):
        driver.tell(again(driver, 10).number, complete(value))
    assert driver.study.best().number == 0  # by its mean, though it is not under the goal
    assert search_is_over(space, driver.study.trials(), 10)
    assert missing_repeats(space, driver.study.trials(), 10) == []


def test_report_and_certificate_say_what_the_repeats_found(
    finished_study: Any, tmp_path: Path
) -> None:
    copy = finished_study.copied_to(tmp_path / "study")
    study = Study.open(copy.storage, copy.name)
    budget = study.space.budget.model_copy(update={"confirm": ConfirmBudget(top=1, seeds=2)})
    study.remember("space", study.space.model_copy(update={"budget": budget}).as_mapping())
    study.close()
    study = Study.open(copy.storage, copy.name)
    best = study.best()
    assert best is not None
    with Driver(study, out=copy.folder) as driver:
        for value in (0.3, 0.5):
            trial = again(driver, 4)
            record = read_record(copy.folder / "trials" / str(best.root) / "record.json")
            record.config["system"]["seed"] += trial.seed_shift
            out = str(copy.folder / "trials" / str(trial.number))
            seed = record.config["system"]["seed"]
            replace(record, number=trial.number, seed=seed, value=value, out=out).write()
            driver.tell(trial.number, complete(value))
    study.close()
    write_report(copy.storage, copy.name, tmp_path / "report")
    for name in ("report.md", "index.html"):
        text = (tmp_path / "report" / name).read_text()
        assert f"Trial {best.number} has a mean adapted Rand error of" in text
        assert f"trial {best.number} with another seed" in text
    export_best(copy.storage, copy.name, tmp_path / "best.yaml")
    certificate = (tmp_path / "best.certificate.md").read_text()
    assert "**Seeds**: 3: mean" in certificate
    assert "to 0.5000; the exported one is seed 42" in certificate


@pytest.mark.slow
def test_a_real_run_repeats_goes_on_after_a_kill_and_uses_other_seeds(fake_study: Any) -> None:
    config = {"trials": 4, "steps": 4, "step_s": 0.05, "space": CONFIRM, "options": QUICK}
    driver = fake_study.start(**config)
    fake_study.until(lambda rows: sum(r.get("event") == "trial_finished" for r in rows) >= 5)
    driver.kill()
    driver.wait(30)
    facts = fake_study.run(**config)
    assert facts["trials"]["complete"] == 4
    assert facts["confirmed"]["seeds"] == 3
    trials = open_readonly(facts["storage"], "fake").trials()
    repeats = [t for t in trials if t.is_repeat and t.state == "COMPLETE"]
    assert len(repeats) == 4
    for steps in fake_study.steps().values():
        assert [step for _, step in steps] == sorted({step for _, step in steps})
