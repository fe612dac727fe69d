"""What earlier studies teach a new one: ranks, the model over them, and how a run names them."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from study_checks import DECAY, LR, make_space

from hydralv_tune.config.errors import StudyError
from hydralv_tune.launch.start import Start
from hydralv_tune.study.driver import Driver
from hydralv_tune.study.earlier import GUIDED_TRIALS, Guide, Lesson, lesson_of, ranks_of, shelf
from hydralv_tune.study.optuna_private import enqueue
from hydralv_tune.study.proposals import TriedCandidates
from hydralv_tune.study.study import Study, open_readonly
from hydralv_tune.study.trial_views import GUIDED, Asked, TrialResult, TrialView

LOSS = "model.loss_balancing.strategy"
DROPOUT = "model.dropout"
PARAMETERS = {
    LR: {"float": [1e-5, 1e-1], "log": True},
    LOSS: {"choice": ["none", "uncertainty", "gradnorm"]},
    DROPOUT: {"float": [0.0, 0.5], "when": {LOSS: ["none"]}},
}


def view(number: int, state: str = "COMPLETE", **fields: Any) -> TrialView:
    """Return a trial that a driver has run."""
    given = {
        "value": None, "params": {}, "user_attrs": {}, "intermediate": {}, "violation": None,
        "started": datetime.now(), "finished": None, **fields,
    }  # fmt: skip
    given["user_attrs"] = {"owner": {"pid": 1}, **given["user_attrs"]}
    return TrialView(number, state, **given)


def evaluated(
    number: int, values: Sequence[float], state: str = "COMPLETE", over: Sequence[float] = ()
) -> TrialView:
    """Return a trial with evaluations, of which each may violate the guard."""
    return view(
        number,
        state,
        value=values[-1],
        intermediate=dict(enumerate(values, 1)),
        violation=over[-1] if over else None,
        user_attrs={"violations": {str(step): each for step, each in enumerate(over, 1)}},
    )


def test_ranks_put_the_guard_first_and_compare_what_was_pruned_at_its_last_evaluation() -> None:
    trials = [
        evaluated(0, [0.9, 0.5, 0.3]),
        evaluated(1, [0.8, 0.6, 0.4]),
        evaluated(2, [0.1, 0.1, 0.1], over=[0.4, 0.4, 0.4]),  # blobs: the smallest error of all
        evaluated(3, [0.85], "PRUNED"),  # ahead of 0 and behind 1, as far as it went
    ]
    assert list(ranks_of(trials)) == pytest.approx([1 / 3, 1 / 3, 1, 1 / 3])
    assert list(ranks_of([view(0, value=0.3), view(1, value=0.2)])) == [1, 0]
    assert list(ranks_of([evaluated(0, [0.3]), evaluated(1, [0.3])])) == [0.5, 0.5]


def draws(space: Any, count: int, seed: int) -> list[dict[str, Any]]:
    """Return random candidates of a space."""
    from hydralv_tune.study.proposals import random_params

    generator = random.Random(seed)
    return [random_params(space, generator) for _ in range(count)]


def error_of(params: dict[str, Any]) -> float:
    """Return an error that is least for a rate of 1e-2 and no balancing."""
    return abs(math.log10(params[LR]) + 2) + (0.0 if params[LOSS] == "none" else 1.0)


def lesson(space: Any, sign: float = 1.0, count: int = 30) -> Lesson:
    """Return what a study of random candidates teaches."""
    params = draws(space, count, 5)
    trials = [view(i, value=sign * error_of(each), params=each) for i, each in enumerate(params)]
    found = lesson_of(space, trials, "earlier")
    assert found is not None
    return found


def proposals(space: Any, lessons: Sequence[Lesson], count: int) -> list[dict[str, Any]]:
    """Return what is tried first, each told its error before the next is asked for.

    Where the sampler is to propose, that is a random candidate.
    """
    guide, tried = Guide(space, lessons), TriedCandidates(space, 0.05)
    trials: list[TrialView] = []
    for number in range(count):
        params = guide.propose(trials, tried, random.Random(number))
        params = params or draws(space, 1, 100 + number)[0]
        trials.append(view(number, value=error_of(params), params=params))
        tried.update(trials)
    return [dict(trial.params) for trial in trials]


def test_what_did_well_in_an_earlier_study_is_tried_first() -> None:
    space = make_space(parameters=PARAMETERS)
    first = proposals(space, [lesson(space)], 3)
    assert np.mean([error_of(params) for params in first]) < 0.6
    assert np.mean([error_of(params) for params in draws(space, 200, 1)]) > 1.5


def test_without_earlier_studies_the_model_learns_from_the_trials_of_its_own() -> None:
    space = make_space(parameters=PARAMETERS)
    guide, tried = Guide(space, [], alone=True), TriedCandidates(space, 0.05)
    trials: list[TrialView] = []
    for number in range(GUIDED_TRIALS + 5):
        params = guide.propose(trials, tried, random.Random(number))
        # Random ones before, and the sampler's after.
        assert (params is None) == (number < 3 or number >= GUIDED_TRIALS)
        params = params or draws(space, 1, 100 + number)[0]
        trials.append(view(number, value=error_of(dict(params)), params=params))
        tried.update(trials)
    errors = [error_of(dict(trial.params)) for trial in trials]
    assert min(errors[3:15]) < 0.2
    assert np.mean(errors[3:40]) < 0.7 * np.mean([error_of(p) for p in draws(space, 200, 1)])
    assert Guide(space, []).propose(trials[:9], tried, random.Random(0)) is None


def test_a_misleading_study_is_soon_not_believed_any_more() -> None:
    space = make_space(parameters=PARAMETERS)
    tried = [error_of(params) for params in proposals(space, [lesson(space, -1.0)], 18)]
    assert np.mean(tried[:2]) > 2.0  # it did lead astray
    assert np.mean(tried[12:]) < 1.0


def test_a_lesson_that_trials_contradict_serves_the_other_way_round() -> None:
    space = make_space(parameters=PARAMETERS)

    def reached(lessons: Sequence[Lesson]) -> float:
        errors = []
        for seed in range(6):
            params = draws(space, 12, 5 + seed)
            trials = [view(i, value=error_of(each), params=each) for i, each in enumerate(params)]
            guide, tried = Guide(space, lessons, alone=True), TriedCandidates(space, 0.05)
            tried.update(trials)
            proposed = [guide.propose(trials, tried, random.Random(i)) for i in range(5)]
            errors += [error_of(dict(each)) for each in proposed if each is not None]
        assert len(errors) == 30
        return float(np.mean(errors))

    assert reached([lesson(space, -1.0)]) < 0.7 * reached([])


def test_a_lesson_serves_a_space_with_other_keys_choices_and_ranges() -> None:
    space = make_space(parameters=PARAMETERS)
    other = make_space(
        parameters={
            LR: {"float": [1e-4, 1e-1], "log": True},
            LOSS: {"choice": ["gradnorm", "none"]},
            "optimization.optimizer.weight_decay": {"float": [0.0, 0.1]},
        }
    )
    first = proposals(other, [lesson(space)], 5)[::2]  # those between are the sampler's
    assert [params[LOSS] for params in first] == ["none"] * 3
    assert all(1e-3 < params[LR] < 0.1 for params in first)
    decays = [params["optimization.optimizer.weight_decay"] for params in first]
    assert len(set(decays)) == 3  # of that, nothing is known
    apart = make_space(parameters={"optimization.optimizer.weight_decay": {"float": [0.0, 0.1]}})
    assert Guide(apart, [lesson(space)]).lessons == []
    assert (
        Guide(apart, [lesson(space)]).propose([], TriedCandidates(apart, 0.1), random.Random(0))
        is None
    )


def test_the_sampler_takes_over_once_the_study_knows_enough_itself() -> None:
    space = make_space(parameters=PARAMETERS)
    guide, tried = Guide(space, [lesson(space)]), TriedCandidates(space, 0.0)
    drawn = draws(space, GUIDED_TRIALS, 2)
    trials = [view(i, value=error_of(each), params=each) for i, each in enumerate(drawn)]
    assert guide.propose(trials[:-1], tried, random.Random(0)) is not None
    assert guide.propose(trials, tried, random.Random(0)) is None


def test_a_study_of_few_trials_teaches_nothing_and_one_of_many_a_part() -> None:
    space = make_space(parameters=PARAMETERS)
    params = draws(space, 300, 3)
    trials = [view(i, value=error_of(each), params=each) for i, each in enumerate(params)]
    assert lesson_of(space, trials[:4], "few") is None
    many = lesson_of(space, trials, "many", most=50)
    assert many is not None
    assert len(many.params) == len(many.ranks) == 50
    assert min(many.ranks) == 0
    assert max(many.ranks) == 1
    assert Lesson.from_mapping(many.as_mapping()).keys == many.keys


def earlier(storage: str, name: str, trials: int) -> None:
    """Make a study with so many trials."""
    space = make_space(parameters=PARAMETERS, warm_starts=[])
    study = Study.open(storage, name, space=space, create=True)
    with Driver(study, out=Path(storage.removeprefix("sqlite:///")).parent) as driver:
        for _ in range(trials):
            asked = driver.ask(trials)
            assert isinstance(asked, Asked)
            driver.tell(asked.number, TrialResult("COMPLETE", error_of(dict(asked.params))))
    study.close()


def start(folder: Path, *learn_from: str, **changes: Any) -> Start:
    """Return the start of a run in a folder of its own."""
    space = make_space(parameters=PARAMETERS, warm_starts=[], **changes)
    return Start(f"sqlite:///{folder}/study.db", "new", space, folder, learn_from=learn_from)


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a database with a study of twelve trials and one of two."""
    path = tmp_path_factory.mktemp("taught") / "study.db"
    earlier(f"sqlite:///{path}", "long", 12)
    earlier(f"sqlite:///{path}", "short", 2)
    return path


@pytest.mark.parametrize("form", ["{path}/long", "sqlite:///{path}/long", "{folder}/long"])
def test_a_run_learns_from_earlier_studies_and_records_it(
    taught: Path, tmp_path: Path, form: str
) -> None:
    place = form.format(path=taught, folder=taught.parent)
    wanted = start(tmp_path, place)
    wanted.check({})
    study = wanted.open({})
    (told,) = study.facts()["learned_from"]
    assert told["source"].startswith("long in sqlite:///")
    assert (told["trials"], told["parameters"]) == (12, [LR, LOSS, DROPOUT])
    with Driver(study, out=tmp_path) as driver:
        rates = []
        for _ in range(3):
            asked = driver.ask(10)
            assert isinstance(asked, Asked)
            rates.append(error_of(dict(asked.params)))
    study.close()
    again = start(tmp_path, place)
    reopened = again.open({})
    assert len(reopened.facts()["learned_from"]) == 1  # the same command, not twice
    reopened.close()
    off = start(tmp_path, "none").open({})
    assert off.facts()["learned_from"] == []
    off.close()
    assert open_readonly(wanted.storage, "new").lessons == []


def test_the_first_proposals_of_a_driver_are_those_of_the_lesson(
    storage: str, make_driver: Callable[..., Driver], tmp_path: Path
) -> None:
    space = make_space(parameters=PARAMETERS, warm_starts=[], sampler={"name": "random"})
    study = Study.open(storage, "s", space=space, create=True)
    study.remember_lessons([lesson(space)])
    study.close()
    drivers = [make_driver(storage, space), make_driver(storage, space)]
    asked = [drivers[index % 2].ask(10) for index in range(6)]
    errors = [error_of(dict(trial.params)) for trial in asked if isinstance(trial, Asked)]
    assert len(errors) == 6
    assert np.mean(errors[:3]) < 0.8
    assert len({tuple(trial.params.items()) for trial in asked if isinstance(trial, Asked)}) == 6


RECIPES = {
    "start": {},
    "bad": {
        "optimization": {"optimizer": {"lr": 1e-5}},
        "model": {"loss_balancing": {"strategy": "gradnorm"}},
    },
    "good": {
        "optimization": {"optimizer": {"lr": 1e-2}},
        "model": {"loss_balancing": {"strategy": "none"}, "dropout": 0.1},
    },
    "other": {"optimization": {"optimizer": {"lr": 1e-2, "weight_decay": 0.05}}},
    "more": {
        "optimization": {"optimizer": {"lr": 1e-2}, "max_epochs": 700},
        "model": {"loss_balancing": {"strategy": "none"}, "dropout": 0.1},
    },
}


def test_recipes_that_earlier_studies_advise_against_wait(
    storage: str, make_driver: Callable[..., Driver]
) -> None:
    space = make_space(parameters=PARAMETERS, recipes=RECIPES, warm_starts=["bad", "good"])
    study = Study.open(storage, "s", space=space, create=True)
    study.remember_lessons([lesson(space), lesson(space, count=20)])
    driver = make_driver(storage, space)
    asked = []
    for number in range(4):
        trial = driver.ask(10)
        assert isinstance(trial, Asked)
        asked.append(trial)
        result = TrialResult("COMPLETE", error_of(dict(trial.params)), -0.1)
        assert driver.tell(trial.number, result) == "told"
        if number == 0:  # as a driver leaves it that dies before it claims what it enqueued
            enqueue(study.optuna, {LR: 2e-2, LOSS: "none", DROPOUT: 0.3}, {GUIDED: True})
            enqueue(study.optuna, {LR: 3e-2, LOSS: "none", DROPOUT: 0.3}, {})  # and by hand
    study.close()
    assert [trial.params[LR] for trial in asked[1:3]] == [2e-2, 3e-2]
    # Something that they advise against is tried in the end, to learn whether they are right.
    assert [trial.warm_start == "bad" for trial in asked] == [False, False, False, True]
    trials = {trial.number: trial for trial in driver.study.trials()}
    assert all("owner" in trial.user_attrs for trial in trials.values() if trial.state != "WAITING")


@pytest.mark.parametrize(
    ("warm_starts", "lessons", "target", "first"),
    [
        (["bad", "good"], 2, 2, ["bad", "good"]),  # no room for anything else
        (["bad", "good"], 2, 3, ["good", "bad"]),
        (["bad", "good"], 1, 3, ["bad", "good"]),  # one study alone may be no better
        (["bad", "more"], 2, 9, ["bad", "more"]),  # one sets what nobody searches
        (["bad", "good", "other"], 2, 9, ["bad", "good", "other"]),  # they know no decay
    ],
)
def test_every_recipe_is_trained_within_the_number_of_trials(
    warm_starts: list[str], lessons: int, target: int, first: list[str], storage: str,
    make_driver: Callable[..., Driver],
) -> None:  # fmt: skip
    searched = {**PARAMETERS, DECAY: {"float": [0.0, 0.1]}} if "other" in first else PARAMETERS
    space = make_space(parameters=searched, recipes=RECIPES, warm_starts=warm_starts)
    study = Study.open(storage, "s", space=space, create=True)
    good = {LR: 1e-2, LOSS: "none", DROPOUT: 0.1}
    others = {LR: 1e-5, LOSS: "gradnorm"}
    params = (good, *[others] * 9)
    ranks = (0.0, *[0.6] * 9)
    study.remember_lessons(
        [Lesson(f"{i}", tuple(PARAMETERS), params, ranks) for i in range(lessons)]
    )
    study.close()
    driver, names = make_driver(storage, space), []
    while isinstance(trial := driver.ask(target), Asked):
        names.append(trial.warm_start)
        driver.tell(trial.number, TrialResult("COMPLETE", error_of(dict(trial.params)), -0.1))
    assert len(names) == target
    assert [name for name in names if name] == first


@pytest.mark.parametrize(
    ("places", "words"),
    [
        (["{folder}/nosuch"], "--learn-from .*: Unknown study 'nosuch'. Known: long"),
        (["{path}"], "holds 2 studies: long, short"),
        (["{path}/short"], "fewer than 5 finished trials"),
        (["none", "{path}/long"], "`none` stands beside a study"),
        (["/no/such/folder"], "--learn-from /no/such/folder"),
        (["postgresql+psycopg://u:secret@127.0.0.1:9/db/s"], "does not answer"),
    ],
)
def test_what_cannot_be_learned_from_is_refused_before_anything_is_written(
    taught: Path, tmp_path: Path, places: list[str], words: str
) -> None:
    named = [place.format(path=taught, folder=taught.parent) for place in places]
    with pytest.raises(StudyError, match=words) as error:
        start(tmp_path / "new", *named).check({})
    assert "secret" not in str(error.value)
    assert not (tmp_path / "new").exists()


def test_a_study_does_not_learn_from_itself_nor_from_one_that_searches_something_else(
    taught: Path, tmp_path: Path
) -> None:
    space = make_space(parameters={"model.deep_supervision": {"choice": [True, False]}})
    storage = f"sqlite:///{tmp_path}/study.db"
    with pytest.raises(StudyError, match="searches no parameter that this space does"):
        Start(storage, "new", space, tmp_path, learn_from=[f"{taught}/long"]).check({})
    itself = Start(f"sqlite:///{taught}", "long", space, tmp_path, learn_from=[f"{taught}/long"])
    with pytest.raises(StudyError, match="that is this study itself"):
        itself._lessons()


def test_a_new_study_takes_the_shelf_for_what_it_knows_and_only_where_nothing_else_is_said(
    tmp_path: Path,
) -> None:
    for name, options, learned in (
        ("a", {}, len(shelf())),
        ("b", {"sampler": {"name": "random"}}, 0),
    ):
        study = start(tmp_path / name, **options).open({})
        told = study.facts()["learned_from"]
        assert len(told) == learned
        assert all(entry["parameters"] == [LR] for entry in told)
        study.close()
    begun = Study.open(
        f"sqlite:///{tmp_path}/a/other.db", "new", space=start(tmp_path).space, create=True
    )
    with Driver(begun, out=tmp_path) as driver:
        driver.ask(1)
    begun.close()
    of_before = Start(f"sqlite:///{tmp_path}/a/other.db", "new", start(tmp_path).space, tmp_path)
    continued = of_before.open({})
    assert continued.facts()["learned_from"] == []
    continued.close()
