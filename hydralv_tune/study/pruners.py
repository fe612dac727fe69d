"""The pruners of a study by name: one entry each, open for more.

Optuna is imported when a pruner is made, so that a search space is checked without it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Protocol

from hydralv_tune.config.errors import InputError, unknown_name
from hydralv_tune.config.search_space import Pruner
from hydralv_tune.study.trial_views import (
    BEHIND,
    FOLD_VALUES,
    VIOLATIONS,
    attributes_of,
    rank,
    violation_of,
)

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial


class PrunesTrials(Protocol):
    """What decides whether a trial is stopped early; every pruner of Optuna's does."""

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        """Return whether the trial is to be stopped."""


@dataclass(frozen=True)
class PrunerEntry:
    """A pruner that a search space may name; its steps are evaluations, from 1.

    Args:
        make: Returns the pruner from the settings of the space.
        summary: One line for the documentation.
        least_folds: Folds of cross-validation that it needs at least.
    """

    make: Callable[[Pruner], PrunesTrials]
    summary: str
    least_folds: int = 1


class _Patient:
    """Lets another pruner decide once the best value has not improved for some evaluations.

    Optuna's `PatientPruner` never prunes here: it waits for a value worse than before, and the
    best value so far cannot get worse.
    """

    def __init__(self, wrapped: PrunesTrials, patience: int, warmup: int) -> None:
        self._wrapped, self._patience, self._warmup = wrapped, patience, warmup

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        """Return whether the trial is to be stopped."""
        steps = sorted(trial.intermediate_values)
        if len(steps) <= max(self._patience, self._warmup - 1):
            return False
        before = trial.intermediate_values[steps[-1 - self._patience]]
        if trial.intermediate_values[steps[-1]] < before:
            return False
        return self._wrapped.prune(study, trial)


class GuardFirst:
    """Shows another pruner the evaluations ranked as the study ranks trials: guard first.

    Adapted Rand error cannot see false positives: a network that has learned nothing yet often
    has a smaller one, as a few large blobs, than the best trial has at the same evaluation.
    A value that violates the guard therefore comes after all that do not, by the violation. The
    database keeps the error as it is.
    """

    def __init__(self, wrapped: PrunesTrials) -> None:
        self._wrapped = wrapped

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        """Return whether the trial is to be stopped."""
        ranked: Any = _RankedStudy(study)
        return self._wrapped.prune(ranked, _ranked(trial))


class _RankedStudy:
    """A study whose trials are seen by `_ranked`; everything else is the study's own."""

    def __init__(self, study: optuna.Study) -> None:
        self._study = study

    def __getattr__(self, name: str) -> Any:
        return getattr(self._study, name)

    def get_trials(self, *arguments: Any, **options: Any) -> list[FrozenTrial]:
        """Return the trials, ranked."""
        return [_ranked(trial) for trial in self._study.get_trials(*arguments, **options)]


def _ranked(trial: FrozenTrial) -> FrozenTrial:
    """Return a trial whose evaluations that violate the guard come after all that do not."""
    violations = attributes_of(trial).get(VIOLATIONS)
    if not violations:
        return trial
    shown = copy(trial)
    shown.intermediate_values = {
        step: value if (over := violations.get(str(step), 0.0)) <= 0 else BEHIND + over
        for step, value in trial.intermediate_values.items()
    }
    return shown


class _OverFolds:
    """Wilcoxon's test over the folds of a cross-validation: is the trial worse in most of them?

    The trial is compared, fold by fold, with the best trial at the same evaluation. Evaluations
    that violate the guard come after all that do not.
    """

    def __init__(self, settings: Pruner) -> None:
        from optuna.pruners import WilcoxonPruner

        self._wrapped = WilcoxonPruner()
        self._warmup, self._startup = settings.warmup_evaluations, settings.startup_trials

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        """Return whether the trial is to be stopped."""
        from optuna.trial import TrialState

        step = trial.last_step
        complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        own = [other for other in complete if FOLD_VALUES in attributes_of(other)]
        if step is None or step < self._warmup or len(own) < max(self._startup, 1):
            return False
        first = min(own, key=lambda t: rank(violation_of(t), t.value, t.number))
        best, judged = _of_folds(first, step), _of_folds(trial, step)
        if len(best.intermediate_values) != len(judged.intermediate_values):
            return False
        shown: Any = SimpleNamespace(best_trial=best, direction=study.direction)
        return self._wrapped.prune(shown, judged)


def _of_folds(trial: FrozenTrial, step: int) -> FrozenTrial:
    """Return a trial whose intermediate values are those of its folds at one evaluation."""
    over = (attributes_of(trial).get(VIOLATIONS) or {}).get(str(step), 0.0)
    behind = BEHIND + over if over > 0 else 0.0
    values = (attributes_of(trial).get(FOLD_VALUES) or {}).get(str(step), [])
    shown = copy(trial)
    shown.intermediate_values = {fold: value + behind for fold, value in enumerate(values)}
    return shown


def _percentile(settings: Pruner, percentile: float) -> PrunesTrials:
    """Return a pruner that keeps a share of the trials at each evaluation."""
    from optuna.pruners import PercentilePruner

    warmup = settings.warmup_evaluations
    wrapped = PercentilePruner(
        percentile, n_startup_trials=settings.startup_trials, n_warmup_steps=warmup
    )
    return GuardFirst(_Patient(wrapped, settings.patience, warmup))


def _hyperband(settings: Pruner) -> PrunesTrials:
    """Return Hyperband."""
    from optuna.pruners import HyperbandPruner

    return GuardFirst(HyperbandPruner(min_resource=max(1, settings.warmup_evaluations)))


def _successive_halving(settings: Pruner) -> PrunesTrials:
    """Return asynchronous successive halving."""
    from optuna.pruners import SuccessiveHalvingPruner

    return GuardFirst(SuccessiveHalvingPruner(min_resource=max(1, settings.warmup_evaluations)))


def _none(settings: Pruner) -> PrunesTrials:
    """Return the pruner that stops nothing."""
    from optuna.pruners import NopPruner

    return NopPruner()


PRUNERS: dict[str, PrunerEntry] = {
    "median": PrunerEntry(
        lambda settings: _percentile(settings, 50.0),
        "Stops what is worse than half of the trials at the same evaluation.",
    ),
    "percentile": PrunerEntry(
        lambda settings: _percentile(settings, settings.percentile),
        "Keeps the share `percentile` of the trials at each evaluation.",
    ),
    "hyperband": PrunerEntry(_hyperband, "Hyperband; several brackets of successive halving."),
    "successive_halving": PrunerEntry(
        _successive_halving, "Keeps a quarter of the trials at each rung."
    ),
    "wilcoxon": PrunerEntry(
        _OverFolds, "Compares with the best trial fold by fold; at least 4 folds.", least_folds=4
    ),
    "none": PrunerEntry(_none, "Stops nothing."),
}


def register_pruner(
    name: str, make: Callable[[Pruner], PrunesTrials], *, summary: str, least_folds: int = 1
) -> None:
    """Add a pruner that search spaces may name from now on.

    Args:
        name: As `pruner.name` of a search space gives it.
        make: Returns an Optuna pruner from the space's `pruner` block. Wrap it in `GuardFirst` so
            that an evaluation that violates the guard counts as worse than any that does not.
        summary: One line for the documentation.
        least_folds: Folds of cross-validation that it needs at least.

    Raises:
        InputError: The name is taken.
    """
    if name in PRUNERS:
        raise InputError(f"register_pruner: '{name}' is registered already. Choose another name.")
    PRUNERS[name] = PrunerEntry(make, summary, least_folds)


def make_pruner(settings: Pruner) -> PrunesTrials:
    """Return the pruner of a search space.

    Args:
        settings: The space's `pruner` block.

    Raises:
        InputError: The name is not registered in this process.
    """
    import optuna

    if settings.name not in PRUNERS:
        raise InputError(f"pruner.name: {unknown_name('pruner', settings.name, PRUNERS)}")

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return PRUNERS[settings.name].make(settings)
