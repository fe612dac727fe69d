"""A search knows when going on would gain less than its score is known."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from statistics import fmean
from typing import Any

import numpy as np
import pytest
from study_checks import make_space
from test_study import METRICS, asked

from hydralv_tune.numerics.metrics.contingency import contingency_table
from hydralv_tune.numerics.metrics.instance_errors import noise
from hydralv_tune.numerics.metrics.scores import score_labels
from hydralv_tune.study.driver import Driver
from hydralv_tune.study.ending import expected_gain, nothing_to_gain, outlook, search_is_over
from hydralv_tune.study.trial_views import TrialResult, TrialView


def view(number: int, value: float | None, **changed: Any) -> TrialView:
    """Return a trial of a search, complete where it has a value."""
    keys: dict[str, Any] = {
        "number": number, "state": "PRUNED" if value is None else "COMPLETE", "value": value,
        "params": {}, "user_attrs": {}, "intermediate": {1: 0.9}, "violation": -0.3,
        "started": None, "finished": None,
    }  # fmt: skip
    return TrialView(**{**keys, **changed})


def test_the_gain_is_what_the_second_half_brought_over_all_orders() -> None:
    values = [0.5, 0.2, 0.9, 0.35, 0.6, 0.45]
    best = min(values)
    slow = fmean(min(half) - best for half in itertools.combinations(values, 3))
    trials = [view(number, value) for number, value in enumerate(sorted(values))]
    # Repeated, so that there are enough: pruned ones are no better than the worst.
    assert expected_gain(trials) is None
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("hydralv_tune.study.ending.FEWEST", 6)
        assert expected_gain(trials) == pytest.approx(slow)  # the best came first
        late = [view(number, value) for number, value in enumerate(sorted(values)[::-1])]
        assert expected_gain(late) == pytest.approx(0.5 - best)  # and here in the second half
        stopped = [*trials, *(view(number, None) for number in range(6, 12))]
        assert expected_gain(stopped) > slow  # as many trials found as much with twice the work


def test_too_little_is_known_of_few_trials_and_of_trials_that_violate_the_guard() -> None:
    assert expected_gain([view(number, 0.1) for number in range(39)]) is None
    bad = [view(number, 0.1, violation=0.2) for number in range(40)]
    assert expected_gain(bad) is None
    assert outlook(make_space(), [view(number, 0.1) for number in range(40)]) is None  # no noise


def test_the_noise_is_that_of_instances_and_of_seeds() -> None:
    space = make_space(budget={"stop_when": "no_gain"})
    trials = [view(number, 0.1 + number / 100, user_attrs={"noise": 0.005}) for number in range(40)]
    alone = outlook(space, trials)
    assert alone is not None
    assert alone["noise"] == 0.005 < alone["gain"] < 0.01
    assert alone["is_worth_it"]
    again = view(40, 0.2, user_attrs={"repeat_of": 0, "seed_shift": 1, "repeats": 1})
    both = outlook(space, [*trials, again])
    assert both is not None
    assert both["seeds"] == pytest.approx(0.1 / 2**0.5)
    assert both["noise"] == pytest.approx((0.005**2 + 0.1**2 / 2) ** 0.5)
    assert both["gain"] == alone["gain"]  # a repeat is no candidate
    assert not both["is_worth_it"]
    assert "is expected to gain less than the noise" in both["sentence"]


def test_a_search_ends_where_nothing_is_to_be_gained_and_only_where_that_is_asked_for() -> None:
    trials = [view(number, 0.1 + number / 1000, user_attrs={"noise": 0.05}) for number in range(40)]
    asks, asks_not = make_space(budget={"stop_when": "no_gain"}), make_space()
    assert nothing_to_gain(asks, trials) is not None
    assert search_is_over(asks, trials, 60)
    assert nothing_to_gain(asks_not, trials) is None
    assert not search_is_over(asks_not, trials, 60)


def test_the_facts_of_a_study_say_whether_going_on_is_worth_it(
    storage: str, make_driver: Callable[..., Driver], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hydralv_tune.study.ending.FEWEST", 20)
    driver = make_driver(storage, make_space(sampler={"name": "random"}))
    for number in range(20):
        told = {"metrics": METRICS, "noise": 0.05}
        driver.tell(
            asked(driver, 20).number, TrialResult("COMPLETE", 0.2 + number / 1000, -0.3, told)
        )
    going_on = driver.study.facts()["going_on"]
    assert going_on["noise"] == 0.05
    assert 0 < going_on["gain"] < 0.01
    assert not going_on["is_worth_it"]


def test_the_noise_of_a_score_is_its_spread_over_instances_drawn_anew() -> None:
    """Of ten equal instances three are missed: F1 is that of a binomial share."""
    truth = np.zeros((4, 4, 60), np.int32)
    for number in range(10):
        truth[:, :, 6 * number : 6 * number + 4] = number + 1
    found = np.where(np.isin(truth, [2, 5, 9]), 0, truth)
    table = contingency_table(prediction=found, truth=truth, mask=None)
    draws = np.random.default_rng(3).binomial(10, 0.7, 20000)
    expected = np.std(2 * draws / (10 + draws))
    assert noise(table, "f1_iou50") == pytest.approx(expected, rel=0.05)
    assert noise(table, "voi_split") is None
    assert score_labels(prediction=found, truth=truth).f1_iou50 == pytest.approx(14 / 17)
