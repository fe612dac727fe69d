"""How a study searches: samplers and pruners by name, and Optuna's form of a search space."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from copy import copy
from types import SimpleNamespace
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from hydralv_tune.config.errors import StudyError
from hydralv_tune.config.search_space import (
    Parameter,
    Pruner,
    Sampler,
    SearchSpace,
    guard_violation,
    objective_value,
)
from hydralv_tune.study.trial_views import FOLD_VALUES, VIOLATIONS, rank

CONSTRAINTS = "constraints"
"""System attribute of a trial that Optuna, and its dashboard, read constraints from."""

OBJECTIVE = "hydralv_tune:objective"
"""System attribute of a trial: its objective, where Optuna was told another value to rank it."""

BEHIND = 1000.0
"""What a violation is added to: more than any objective."""

AT_MOST_ONE = ("adapted_rand_error", "adapted_rand_error_foreground", "f1_iou50")
"""Metrics whose objective is never above 1."""


def violation_of(trial: FrozenTrial) -> float | None:
    """Return by how much a trial violates the guard; None where that was never known."""
    return max(trial.constraints.values(), default=None)


def ranked_value(value: float, violation: float | None, metric: str) -> float:
    """Return the value that Optuna ranks a COMPLETE trial by: the objective where the guard holds.

    Optuna's storage, and so its dashboard, calls the trial with the smallest value the best one
    and looks at no constraint. A trial that violates the guard is therefore told a value behind
    every objective, by its violation, which is the order of `trial_views.rank`.

    Args:
        value: The objective, minimised.
        violation: By how much the guard is violated, if that is known.
        metric: `objective.metric`.
    """
    if violation is None or violation <= 0:
        return value
    return (1.0 if metric in AT_MOST_ONE else BEHIND) + violation


def make_sampler(sampler: Sampler, count: int) -> optuna.samplers.BaseSampler:
    """Return the sampler of a name.

    Args:
        sampler: Name, seed and start-up trials.
        count: Trials so far; it moves the seed.
    """
    seed = (sampler.seed * 1_000_003 + count) % 2**32
    startup = sampler.startup_trials
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        if sampler.name == "random":
            return optuna.samplers.RandomSampler(seed=seed)
        if sampler.name == "gp":
            return optuna.samplers.GPSampler(
                seed=seed, n_startup_trials=startup, warn_independent_sampling=False
            )
        if sampler.name == "qmc":
            return optuna.samplers.QMCSampler(
                seed=sampler.seed, scramble=True, warn_independent_sampling=False
            )
        if sampler.name == "cmaes":
            return _CmaEsWithoutPickle(
                seed=sampler.seed, n_startup_trials=startup, warn_independent_sampling=False
            )
        return optuna.samplers.TPESampler(
            n_startup_trials=startup, group=True, constant_liar=True, seed=seed
        )


class _CmaEsWithoutPickle(optuna.samplers.CmaEsSampler):
    """CMA-ES whose state stays in this process: no pickle goes to the database or comes from it.

    A relaunched driver starts the strategy anew and feeds it the generations of the history.
    """

    _state: str | None = None

    def _split_optimizer_str(self, optimizer_str: str) -> dict[str, str]:
        """Keep the state here and give the storage nothing."""
        self._state = optimizer_str
        return {}

    def _restore_optimizer(self, completed_trials: list[FrozenTrial]) -> Any:
        """Return the state that this process kept."""
        import pickle

        return None if self._state is None else pickle.loads(bytes.fromhex(self._state))


class _Patient(optuna.pruners.BasePruner):
    """Lets another pruner decide once the best value has stood still for some evaluations.

    Optuna's `PatientPruner` never prunes here: it waits for a value worse than before, and the
    best value so far cannot get worse.
    """

    def __init__(self, wrapped: optuna.pruners.BasePruner, patience: int, warmup: int) -> None:
        self._wrapped, self._patience, self._warmup = wrapped, patience, warmup

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        """Return whether the trial is to be pruned."""
        steps = sorted(trial.intermediate_values)
        if len(steps) <= max(self._patience, self._warmup - 1):
            return False
        before = trial.intermediate_values[steps[-1 - self._patience]]
        if trial.intermediate_values[steps[-1]] < before:
            return False
        return self._wrapped.prune(study, trial)


class _GuardFirst(optuna.pruners.BasePruner):
    """Shows another pruner the evaluations ranked as the study ranks trials: guard first.

    Adapted Rand error cannot see false positives: a network that has learned nothing yet often
    has a smaller one, as a few large blobs, than the best trial has at the same evaluation.
    A value that violates the guard therefore comes after all that do not, by the violation. The
    database keeps the error as it is.
    """

    def __init__(self, wrapped: optuna.pruners.BasePruner) -> None:
        self._wrapped = wrapped

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        """Return whether the trial is to be pruned."""
        ranked: Any = _RankedStudy(study)
        return self._wrapped.prune(ranked, _ranked(trial))


class _OverFolds(optuna.pruners.BasePruner):
    """Wilcoxon's test over the folds of a cross-validation: is the trial worse in most of them?

    The trial is compared with the best one as that was at the same evaluation, fold by fold, and
    what violated the guard comes after what did not.
    """

    def __init__(self, warmup: int, startup: int) -> None:
        self._wrapped = optuna.pruners.WilcoxonPruner()
        self._warmup, self._startup = warmup, startup

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        """Return whether the trial is to be pruned."""
        step = trial.last_step
        complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        own = [other for other in complete if FOLD_VALUES in other.user_attrs]
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
    over = (trial.user_attrs.get(VIOLATIONS) or {}).get(str(step), 0.0)
    behind = BEHIND + over if over > 0 else 0.0
    values = (trial.user_attrs.get(FOLD_VALUES) or {}).get(str(step), [])
    shown = copy(trial)
    shown.intermediate_values = {fold: value + behind for fold, value in enumerate(values)}
    return shown


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
    violations = trial.user_attrs.get(VIOLATIONS)
    if not violations:
        return trial
    shown = copy(trial)
    shown.intermediate_values = {
        step: value if (over := violations.get(str(step), 0.0)) <= 0 else BEHIND + over
        for step, value in trial.intermediate_values.items()
    }
    return shown


def make_pruner(pruner: Pruner) -> optuna.pruners.BasePruner:
    """Return the pruner of a name; steps are evaluations, from 1."""
    startup, warmup = pruner.startup_trials, pruner.warmup_evaluations
    wrapped: optuna.pruners.BasePruner
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        if pruner.name == "none":
            return optuna.pruners.NopPruner()
        if pruner.name == "hyperband":
            return _GuardFirst(optuna.pruners.HyperbandPruner(min_resource=max(1, warmup)))
        if pruner.name == "successive_halving":
            return _GuardFirst(optuna.pruners.SuccessiveHalvingPruner(min_resource=max(1, warmup)))
        if pruner.name == "wilcoxon":
            return _OverFolds(warmup, startup)
        percentile = 50.0 if pruner.name == "median" else pruner.percentile
        wrapped = optuna.pruners.PercentilePruner(
            percentile, n_startup_trials=startup, n_warmup_steps=warmup
        )
    return _GuardFirst(_Patient(wrapped, pruner.patience, warmup))


def suggest(space: SearchSpace, trial: optuna.Trial) -> dict[str, Any]:
    """Return the values of a trial's active parameters, in the order of the space's file.

    Args:
        space: What is searched.
        trial: A trial that was just asked for; what was enqueued for it is what it gets.
    """
    params: dict[str, Any] = {}
    for key, parameter in space.parameters.items():
        if space.is_active(key, params):
            params[key] = _suggest_one(key, parameter, trial)
    return params


def _suggest_one(key: str, parameter: Parameter, trial: optuna.Trial) -> Any:
    """Return one value."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if parameter.float_ is not None:
            return trial.suggest_float(key, *parameter.float_, log=parameter.log)
        if parameter.int_ is not None:
            low, high = parameter.int_
            step = parameter.step or 1
            return trial.suggest_int(key, low, high, step=step, log=parameter.log)
        return trial.suggest_categorical(key, parameter.choices)


def distribution_of(parameter: Parameter) -> optuna.distributions.BaseDistribution:
    """Return Optuna's form of a searched key."""
    if parameter.float_ is not None:
        return optuna.distributions.FloatDistribution(*parameter.float_, log=parameter.log)
    if parameter.int_ is not None:
        low, high = parameter.int_
        return optuna.distributions.IntDistribution(
            low, high, log=parameter.log, step=parameter.step or 1
        )
    return optuna.distributions.CategoricalDistribution(parameter.choices)


def require_comparable(before: SearchSpace, space: SearchSpace, name: str) -> None:
    """Refuse an extension after which the values of new trials mean something else."""
    anywhere = {"stop_at": None}
    changed = []
    if before.objective.model_copy(update=anywhere) != space.objective.model_copy(update=anywhere):
        changed.append("objective")
    if before.candidate({}).data.split != space.candidate({}).data.split:
        changed.append("data.split")
    if changed:
        raise StudyError(
            f"Study '{name}': {' and '.join(changed)} cannot change within a study: values of "
            f"before and after would be ranked as one. {elsewhere(name)}"
        )


def elsewhere(name: str) -> str:
    """Return what to do instead of changing a study."""
    return f"Take another --study name and add --warm-start-from {name}."


def require_compatible(before: SearchSpace, space: SearchSpace, name: str) -> None:
    """Refuse an extension that Optuna cannot take into one study."""
    for key, parameter in space.parameters.items():
        if key not in before.parameters:
            continue
        try:
            optuna.distributions.check_distribution_compatibility(
                distribution_of(before.parameters[key]), distribution_of(parameter)
            )
        except ValueError:
            raise StudyError(
                f"Study '{name}': the choices or the kind of {key} cannot change within a study, "
                f"only ranges can. {elsewhere(name)}"
            ) from None


def imported_trial(
    trial: FrozenTrial, label: str, space: SearchSpace, recipe: Mapping[str, Any]
) -> FrozenTrial | None:
    """Return a trial of another study as one of this space, or None where it does not fit.

    Value and guard are those of this space's objective. Its evaluations are left out: they were
    made of the other study's objective, at the steps of its own budget.

    Args:
        trial: Of the other study.
        label: Where it comes from.
        space: Of this study.
        recipe: The partial candidate that it set beside its parameters, if any.
    """
    metrics = trial.user_attrs.get("metrics")
    if trial.state not in (TrialState.COMPLETE, TrialState.PRUNED) or not metrics:
        return None
    params: dict[str, Any] = {}
    distributions: dict[str, optuna.distributions.BaseDistribution] = {}
    for key, parameter in space.parameters.items():
        if not space.is_active(key, params):
            continue
        distribution = distribution_of(parameter)
        if key not in trial.params:
            return None
        try:
            if not distribution._contains(distribution.to_internal_repr(trial.params[key])):
                return None
        except ValueError:
            return None
        params[key], distributions[key] = trial.params[key], distribution
    if set(params) != set(trial.params):
        return None
    # A recipe may set more than is searched here; then the parameters alone are another candidate.
    if recipe and space.candidate(params, recipe) != space.candidate(params):
        return None
    violation = guard_violation(metrics.get("f1_iou50"), space.objective)
    value = objective_value(metrics, space.objective)
    return optuna.trial.create_trial(
        state=trial.state,
        value=ranked_value(value, violation, space.objective.metric),
        params=params,
        distributions=distributions,
        user_attrs={"imported_from": label, "metrics": metrics},
        system_attrs={
            OBJECTIVE: value,
            **({} if violation is None else {CONSTRAINTS: [violation]}),
        },
    )
