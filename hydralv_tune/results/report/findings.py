"""What a study teaches beyond its best trial: what each change bought, whether less would do."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hydralv_tune.study.trial_views import TrialView

FEWEST_FOR_ESTIMATE = 12
"""Complete trials under which a model of the search says nothing."""

FEWEST_FOR_RANKS = 5
AGREEMENT = 0.9
"""Rank correlation from which on an earlier evaluation ranks trials as the last one does."""


@dataclass(frozen=True)
class Change:
    """One step on the way from the baseline to the best trial.

    Args:
        key: Parameter that changes; empty for the baseline.
        before: Its value before.
        after: Its value after.
        value: Objective after the change.
        trained: Number of the trial that was trained so; None where the value is estimated.
    """

    key: str
    before: Any
    after: Any
    value: float
    trained: int | None


@dataclass(frozen=True)
class Ranks:
    """How the ranks at an earlier evaluation agree with the final ones.

    Args:
        trials: Complete trials compared.
        rows: Evaluation, share of the training, and Spearman's rank correlation.
        half: Correlation at half of the evaluations.
        rank: Place of the best trial at half of the evaluations, from 1.
    """

    trials: int
    rows: Sequence[tuple[int, float, float]]
    half: float
    rank: int

    @property
    def half_would_do(self) -> bool:
        """Return whether half of the training would have named the same trials."""
        return self.half >= AGREEMENT and self.rank <= 2


@dataclass(frozen=True)
class Stopped:
    """The trials that were pruned.

    Args:
        count: How many.
        evaluation: Median evaluation at which they were stopped.
        ahead: How many stood better than the median of the complete trials then.
    """

    count: int
    evaluation: int
    ahead: int


def changes(
    baseline: TrialView | None, best: TrialView, trials: Sequence[TrialView]
) -> list[Change]:
    """Return what each change from the baseline to the best trial bought, largest first.

    A step that some trial was trained with has that trial's value. The others are estimated by a
    random forest over the complete trials; empty where there are too few of them.
    """
    complete = [t for t in trials if t.state == "COMPLETE" and t.value is not None]
    if baseline is None or baseline.value is None or baseline.number == best.number:
        return []
    names = sorted({*baseline.params, *best.params})
    differing = [n for n in names if baseline.params.get(n) != best.params.get(n)]
    known = {_frozen(t.params): t for t in reversed(complete)}
    if not differing or best.value is None:
        return []
    estimate = None
    if len(complete) >= FEWEST_FOR_ESTIMATE:
        estimate = _model(complete)
    elif len(differing) > 1:
        return []
    path = [Change("", None, None, baseline.value, baseline.number)]
    now = dict(baseline.params)
    while differing:
        steps = []
        for name in differing:
            after = {**now, name: best.params.get(name)}
            after = {key: value for key, value in after.items() if value is not None}
            trained = best if len(differing) == 1 else known.get(_frozen(after))
            if trained is not None and trained.value is not None:
                value, number = trained.value, trained.number
            elif estimate is not None:
                value, number = estimate(after), None
            else:
                continue
            steps.append((value, name, number, after))
        value, name, number, after = min(steps, key=lambda step: step[0])
        path.append(Change(name, now.get(name), best.params.get(name), value, number))
        now = after
        differing.remove(name)
    return path


def _frozen(params: Mapping[str, Any]) -> frozenset[tuple[str, str]]:
    """Return parameters as something to compare by."""
    return frozenset((key, repr(value)) for key, value in params.items() if value is not None)


def _model(complete: Sequence[TrialView]) -> Any:
    """Return what estimates the objective of parameters."""
    from sklearn.ensemble import RandomForestRegressor

    names = sorted({name for trial in complete for name in trial.params})
    words = {
        name: {
            word: i for i, word in enumerate(sorted({repr(t.params.get(name)) for t in complete}))
        }
        for name in names
    }

    def encoded(params: Mapping[str, Any]) -> list[float]:
        row = []
        for name in names:
            value = params.get(name)
            if isinstance(value, int | float) and not isinstance(value, bool):
                row.append(math.log10(value) if 0 < value < 0.1 else float(value))
            else:
                row.append(float(words[name].get(repr(value), -1)))
        return row

    forest = RandomForestRegressor(n_estimators=200, random_state=0)
    forest.fit([encoded(t.params) for t in complete], [t.value for t in complete])
    return lambda params: float(forest.predict([encoded(params)])[0])


def early_ranks(trials: Sequence[TrialView]) -> Ranks | None:
    """Return whether early evaluations rank the complete trials as the last one does.

    None where fewer than five complete trials have evaluations in common, or all are alike.
    """
    from scipy.stats import spearmanr

    complete = [
        t for t in trials if t.state == "COMPLETE" and t.value is not None and t.intermediate
    ]
    if len(complete) < FEWEST_FOR_RANKS:
        return None
    steps = sorted(set.intersection(*(set(t.intermediate) for t in complete)))
    final: npt.NDArray[np.float64] = np.array([t.value for t in complete], float)
    if len(steps) < 2 or np.ptp(final) == 0:
        return None
    rows = []
    for step in steps:
        values = np.array([t.intermediate[step] for t in complete])
        rho = float(spearmanr(values, final).statistic) if np.ptp(values) > 0 else 0.0
        rows.append((step, step / steps[-1], rho))
    half = max((row for row in rows if row[1] <= 0.5), default=rows[0])
    then = [t.intermediate[half[0]] for t in complete]
    rank = 1 + sum(value < then[int(final.argmin())] for value in then)
    return Ranks(len(complete), rows, half[2], rank)


def stopped(trials: Sequence[TrialView]) -> Stopped | None:
    """Return where the pruned trials stood when they were stopped; None where there are none."""
    pruned = [t for t in trials if t.state == "PRUNED" and t.intermediate and not t.is_imported]
    if not pruned:
        return None
    complete = [t for t in trials if t.state == "COMPLETE"]
    ahead = 0
    for trial in pruned:
        last = max(trial.intermediate)
        others = [t.intermediate[last] for t in complete if last in t.intermediate]
        ahead += bool(others) and trial.intermediate[last] < float(np.median(others))
    steps = sorted(max(trial.intermediate) for trial in pruned)
    return Stopped(len(pruned), steps[len(steps) // 2], ahead)


def parameters_of(trial: TrialView) -> int | None:
    """Return how many parameters the network of a trial has, where that is recorded."""
    count = (trial.user_attrs.get("training") or {}).get("parameters")
    return int(count) if count else None
