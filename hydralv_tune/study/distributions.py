"""A search space in Optuna's terms: distributions, suggestions, and trials of another study."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial, TrialState

from hydralv_tune.config.errors import StudyError
from hydralv_tune.config.search_space import (
    Parameter,
    SearchSpace,
    guard_violation,
    objective_value,
)
from hydralv_tune.study.optuna_private import contains
from hydralv_tune.study.trial_views import (
    CONSTRAINTS,
    OBJECTIVE,
    PREFIX,
    attributes_of,
    ranked_value,
)


def distribution_of(parameter: Parameter) -> BaseDistribution:
    """Return Optuna's distribution of a searched key."""
    if parameter.float_ is not None:
        return optuna.distributions.FloatDistribution(*parameter.float_, log=parameter.log)
    if parameter.int_ is not None:
        low, high = parameter.int_
        return optuna.distributions.IntDistribution(
            low, high, log=parameter.log, step=parameter.step or 1
        )
    return optuna.distributions.CategoricalDistribution(parameter.choices)


def misfit(space: SearchSpace, params: Mapping[str, Any]) -> str | None:
    """Return why parameters are none of a space, or None where they may be.

    Args:
        space: What is searched.
        params: Encoded values of some of its keys, as they were enqueued.
    """
    for key, value in params.items():
        parameter = space.parameters.get(key)
        if parameter is None:
            return f"{key} is not searched by this study"
        if not contains(distribution_of(parameter), value):
            return f"{key} is {value!r}, but it must be {parameter.allowed()}"
    return None


def suggest(space: SearchSpace, trial: optuna.Trial) -> dict[str, Any]:
    """Return the values of a trial's active parameters, in the order of the space's file.

    Args:
        space: What is searched.
        trial: A trial that was just asked for; values that were enqueued for it are kept.
    """
    params: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for key, parameter in space.parameters.items():
            if space.is_active(key, params):
                params[key] = _suggest_one(key, parameter, trial)
    return params


def _suggest_one(key: str, parameter: Parameter, trial: optuna.Trial) -> Any:
    """Return one value."""
    if parameter.float_ is not None:
        return trial.suggest_float(key, *parameter.float_, log=parameter.log)
    if parameter.int_ is not None:
        low, high = parameter.int_
        return trial.suggest_int(key, low, high, step=parameter.step or 1, log=parameter.log)
    return trial.suggest_categorical(key, parameter.choices)


def require_comparable(before: SearchSpace, space: SearchSpace, name: str) -> None:
    """Refuse a changed space after which the values of new trials would mean something else."""
    anywhere = {"stop_at": None}
    changed = []
    if before.objective.model_copy(update=anywhere) != space.objective.model_copy(update=anywhere):
        changed.append("objective")
    if before.candidate({}).data.split != space.candidate({}).data.split:
        changed.append("data.split")
    if changed:
        raise StudyError(
            f"Study '{name}': {' and '.join(changed)} cannot change within a study, since values "
            f"of before and after could not be compared. {elsewhere(name)}"
        )


def require_compatible(before: SearchSpace, space: SearchSpace, name: str) -> None:
    """Refuse a changed space that Optuna cannot hold in one study."""
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


OWN_SPACE = "go on with the space that it has: space.yaml in its folder"
"""What one may always do with a study."""


def elsewhere(name: str) -> str:
    """Return what to do instead of changing a study."""
    return f"Take another --study name and add --warm-start-from {name}, or {OWN_SPACE}."


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
    metrics = attributes_of(trial).get("metrics")
    if trial.state not in (TrialState.COMPLETE, TrialState.PRUNED) or not metrics:
        return None
    params: dict[str, Any] = {}
    distributions: dict[str, BaseDistribution] = {}
    for key, parameter in space.parameters.items():
        if not space.is_active(key, params):
            continue
        distribution = distribution_of(parameter)
        if key not in trial.params or not contains(distribution, trial.params[key]):
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
        system_attrs={
            f"{PREFIX}imported_from": label,
            f"{PREFIX}metrics": metrics,
            OBJECTIVE: value,
            **({} if violation is None else {CONSTRAINTS: [violation]}),
        },
    )
