"""Is the best trial luck? The best of a search are trained again with other seeds.

A repeat is a trial as any other, with the parameters of the one that it repeats and another seed.
It is no candidate: it counts for no number of trials, is never pruned, and teaches nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from hydralv_tune.config.search_space import ConfirmBudget, SearchSpace
from hydralv_tune.numerics.formatting import counted
from hydralv_tune.numerics.metrics.registry import METRICS
from hydralv_tune.study.trial_views import (
    OVERRIDES,
    REPEAT_OF,
    REPEATS,
    SEED_SHIFT,
    TrialView,
    best_trial,
    complete_candidates,
    rank,
    trials_by_seed,
    wanted_seeds,
)

SHARE = 0.1
"""Share of the trials of a study that repeats may be where the space does not ask for them."""


def budget_of(space: SearchSpace, target: int) -> ConfirmBudget:
    """Return how many trials are repeated, and how often.

    Args:
        space: Of the study.
        target: Finished trials that it aims at.
    """
    if space.budget.confirm is not None:
        return space.budget.confirm
    usual = ConfirmBudget()
    has_room = usual.top * usual.seeds <= SHARE * target
    return usual if has_room else ConfirmBudget(top=0)


def missing_repeats(
    space: SearchSpace, trials: Sequence[TrialView], target: int
) -> list[tuple[TrialView, dict[str, Any]]]:
    """Return which trials are still to be repeated, each with the attributes of that repeat.

    Each trial is repeated with the same seeds whoever asks, so none is trained twice.

    Args:
        space: Of the study.
        trials: All of it, of which the search is over.
        target: Finished trials that it aims at.
    """
    budget = budget_of(space, target)
    known = {(t.user_attrs.get(REPEAT_OF), t.user_attrs.get(SEED_SHIFT)) for t in trials}
    best = sorted(complete_candidates(trials), key=lambda t: rank(t.violation, t.value, t.number))
    return [
        (
            trial,
            {
                REPEAT_OF: trial.number,
                SEED_SHIFT: shift,
                REPEATS: budget.seeds,
                **{
                    key: trial.user_attrs[key]
                    for key in ("warm_start", OVERRIDES)
                    if key in trial.user_attrs
                },
            },
        )
        for trial in best[: budget.top]
        for shift in range(1, budget.seeds + 1)
        if (trial.number, shift) not in known
    ]


def confirmations(trials: Sequence[TrialView]) -> list[dict[str, Any]]:
    """Return mean and spread of each trial that was trained again, in the order of the search.

    Returns:
        Of each `trial`, `mean`, `spread` (standard deviation), `seeds` (trainings) and `values` of
        the objective, and `wanted` trainings.
    """
    again = trials_by_seed(trials)
    again.sort(key=lambda seeds: rank(seeds[0].violation, seeds[0].value, seeds[0].number))
    found = []
    for seeds in again:
        values = [float(one.value) for one in seeds if one.value is not None]
        found.append(
            {
                "trial": seeds[0].number,
                "mean": fmean(values),
                "spread": stdev(values),
                "seeds": len(values),
                "values": values,
                "wanted": wanted_seeds(seeds),
            }
        )
    return found


def confirmed(space: SearchSpace, trials: Sequence[TrialView]) -> dict[str, Any] | None:
    """Return what repeats say of the best trial, with a sentence; None where there are none."""
    best, found = best_trial(trials), confirmations(trials)
    mine = next((one for one in found if best is not None and one["trial"] == best.number), None)
    return None if mine is None else {**mine, "sentence": _sentence(space, mine, found)}


def _sentence(
    space: SearchSpace, best: Mapping[str, Any], found: Sequence[Mapping[str, Any]]
) -> str:
    """Return what repeats say of the best trial, as a reader needs it."""
    what = METRICS[space.objective.metric].cost_label
    parts = [
        f"Trial {best['trial']} has a mean {what} of {best['mean']:.4f} over "
        f"{counted(best['seeds'], 'seed')}, with a standard deviation of {best['spread']:.4f}"
    ]
    if best["seeds"] < best["wanted"]:
        parts.append(f"; {best['wanted'] - best['seeds']} more are wanted")
    first = found[0]
    if first["trial"] != best["trial"]:
        parts.append(
            f"; trial {first['trial']}, the best of the search at {first['values'][0]:.4f}, has "
            f"{first['mean']:.4f}"
        )
    return "".join(parts) + "."
