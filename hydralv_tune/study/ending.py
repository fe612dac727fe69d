"""When a search is over: its number or its goal is reached, or going on would gain too little."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Any

import numpy as np

from hydralv_tune.config.search_space import SearchSpace
from hydralv_tune.numerics.metrics.registry import METRICS
from hydralv_tune.study.confirm import confirmations
from hydralv_tune.study.trial_views import (
    NOISE,
    TrialView,
    best_trial,
    complete_candidates,
    count_states,
    latest_ended,
)

FEWEST = 40
"""Ended trials under which nothing is said of more: from 20 on, replayed studies that ended where
the gain fell below a noise of 0.01 lost 0.016 in the mean; from 40 on, 0.005 (docs/search.md)."""

FEWEST_FEASIBLE = 5
"""Complete trials that meet the guard, of those."""


def search_is_over(space: SearchSpace, trials: Sequence[TrialView], target: int) -> bool:
    """Return whether a study has all its trials, or its goal, or nothing to gain where that counts.

    What comes after a search, repeats and the ensemble, waits for this.

    Args:
        space: Of the study.
        trials: All of it.
        target: Finished trials that it aims at.
    """
    counts = count_states(trials)
    is_full = counts["complete"] + counts["pruned"] >= target
    reached = trial_under_goal(space, trials) is not None
    return is_full or reached or nothing_to_gain(space, trials) is not None


def trial_under_goal(space: SearchSpace, trials: Sequence[TrialView]) -> TrialView | None:
    """Return the first feasible trial under `objective.stop_at`, or None."""
    goal = -math.inf if space.objective.stop_at is None else space.objective.stop_at
    for trial in complete_candidates(trials):
        if trial.is_feasible and trial.value is not None and trial.value < goal:
            return trial
    return None


def nothing_to_gain(space: SearchSpace, trials: Sequence[TrialView]) -> str | None:
    """Return why `budget.stop_when` ends a search, in a sentence, or None where it does not."""
    facts = outlook(space, trials) if space.budget.stop_when == "no_gain" else None
    return None if facts is None or facts["is_worth_it"] else str(facts["sentence"])


def expected_gain(trials: Sequence[TrialView]) -> float | None:
    """Return what as many trials again may be expected to gain; None where too few have ended.

    The second half of the trials gained over the first what a doubling last gained, and each
    doubling gains less than the one before. It is taken in the order that the trials came in, and
    as the mean over all orders; the larger counts.

    Args:
        trials: Of a study.
    """
    ended = sorted(latest_ended(trials), key=lambda trial: trial.number)
    values = np.array(
        [
            trial.value
            if trial.state == "COMPLETE" and trial.is_feasible and trial.value is not None
            else math.inf
            for trial in ended
        ]
    )
    known = np.isfinite(values)
    if len(values) < FEWEST or known.sum() < FEWEST_FEASIBLE:
        return None
    values[~known] = values[known].max()
    count, half = len(values), len(values) // 2
    # The chance that the best of a random half is the i-th of all: those before it are left out.
    places = np.arange(half + 1)
    left_out = np.cumprod(np.r_[1.0, (half - places[:-1]) / (count - places[:-1])])
    chances = left_out * (count - half) / (count - places)
    shuffled = float(np.sort(values)[: half + 1] @ chances) - values.min()
    return max(shuffled, float(values[: count - half].min() - values.min()))


def noise_of(trials: Sequence[TrialView]) -> dict[str, float | None]:
    """Return how well the value of the best trial is known, as standard deviations.

    Returns:
        Over the `instances` that it was scored on, and over `seeds`; None where that is unknown.
    """
    best = best_trial(trials)
    instances = None if best is None else best.user_attrs.get(NOISE)
    spreads = [one["spread"] for one in confirmations(trials)]
    seeds = math.sqrt(fmean(spread**2 for spread in spreads)) if spreads else None
    return {"instances": instances, "seeds": seeds}


def outlook(space: SearchSpace, trials: Sequence[TrialView]) -> dict[str, Any] | None:
    """Return whether going on is worth it, with a sentence; None where that cannot be said.

    Args:
        space: Of the study.
        trials: All of it.

    Returns:
        `gain` of as many trials again, `noise` (standard deviation) of the score, its parts
        `instances` and `seeds`, `is_worth_it`, `sentence`.
    """
    gain, parts = expected_gain(trials), noise_of(trials)
    known = [value for value in parts.values() if value is not None]
    if gain is None or not known:
        return None
    noise = math.hypot(*known)
    facts = {"gain": gain, "noise": noise, **parts, "is_worth_it": gain >= noise}
    return {**facts, "sentence": _sentence(space, facts)}


def _sentence(space: SearchSpace, facts: dict[str, Any]) -> str:
    """Return whether going on is worth it, as a reader needs it."""
    what = METRICS[space.objective.metric].cost_label
    words = {"instances": "the instances scored", "seeds": "the seed"}
    of = " and ".join(word for key, word in words.items() if facts[key] is not None)
    verdict = "may gain more" if facts["is_worth_it"] else "is expected to gain less"
    return (
        f"Going on {verdict} than the noise: as many trials again would gain about "
        f"{facts['gain']:.4f} of {what}, which is known to ±{facts['noise']:.4f} ({of})."
    )
