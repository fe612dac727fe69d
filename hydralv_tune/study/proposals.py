"""What a study tries next: the sampler's proposals, without those that were tried before."""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState

from hydralv_tune.config.search_space import Parameter, SearchSpace
from hydralv_tune.config.validation import MISSING
from hydralv_tune.study.distributions import distribution_of
from hydralv_tune.study.optuna_private import StudyWithout, contains
from hydralv_tune.study.trial_views import REPEAT_OF, TrialView, is_tried, recipe_of

DRAWS = 2
"""Proposals that a sampler is asked for before an untried candidate is drawn at random."""

UNIFORM_DRAWS = 300
"""Random candidates that are looked at before a smaller distance must do."""

Choices = tuple[tuple[str, str], ...]


def position(parameter: Parameter, value: float) -> float:
    """Return where a number lies in its range: 0 at the lower end, 1 at the upper, log where log.

    Args:
        parameter: A `float` or an `int`.
        value: Of it; one outside the range gives a position outside 0 to 1.
    """
    low, high = parameter.float_ or parameter.int_ or (0.0, 1.0)
    if low == high:
        return 0.0
    if parameter.log:
        return math.log(value / low) / math.log(high / low)
    return (value - low) / (high - low)


def random_params(
    space: SearchSpace, generator: random.Random, fixed: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return the values of the active parameters of a random candidate, in the space's order.

    Args:
        space: What is searched.
        generator: Of the random numbers.
        fixed: Values that are given.
    """
    params: dict[str, Any] = {}
    for key, parameter in space.parameters.items():
        if space.is_active(key, params):
            params[key] = (fixed or {}).get(key, MISSING)
            if params[key] is MISSING:
                params[key] = _drawn_one(parameter, generator)
    return params


def _drawn_one(parameter: Parameter, generator: random.Random) -> Any:
    """Return a random value of a parameter, as the database holds it."""
    if parameter.choice is not None:
        return generator.choice(parameter.choices)
    low, high = parameter.float_ or parameter.int_ or (0.0, 1.0)
    half = 0.0 if parameter.int_ is None else 0.5  # every integer has an interval of its own
    if parameter.log:
        value = math.exp(generator.uniform(math.log(low - half), math.log(high + half)))
    else:
        value = generator.uniform(low, high)
    if parameter.int_ is None:
        return min(max(value, low), high)
    step = parameter.step or 1
    steps = (high - low) // step
    index = round((value - low) / step) if parameter.log else generator.randint(0, int(steps))
    return int(low) + step * int(min(max(index, 0), steps))


class TriedCandidates:
    """The candidates of a study that need no second training, to be looked up quickly.

    Args:
        space: What is searched.
        distance: Two candidates of the same choices are near where each number of one is within
            this share of its range of the other's, log where log; 0 means equal.
    """

    def __init__(self, space: SearchSpace, distance: float) -> None:
        self.space = space
        self.distance = distance
        self._known: set[int] = set()
        self._numbers: dict[Choices, list[tuple[tuple[float, ...], int]]] = defaultdict(list)

    def update(self, trials: Iterable[TrialView]) -> None:
        """Take in the trials of the study that are new; what was tried stays tried.

        A recipe that sets more than is searched is another candidate than its parameters alone,
        so it is left out.

        Args:
            trials: All of the study, in order of their numbers.
        """
        for trial in trials:
            if trial.number not in self._known and is_tried(trial):
                self._known.add(trial.number)
                if trial.params and is_plain(self.space, trial):
                    self.add(trial.params, trial.number)

    def add(self, params: Mapping[str, Any], number: int = -1) -> None:
        """Take in one candidate, under the number of its trial."""
        choices, numbers = self._split(params)
        self._numbers[choices].append((numbers, number))

    def near(self, params: Mapping[str, Any], distance: float | None = None) -> int | None:
        """Return the number of the first trial that is near to a candidate, or None.

        Args:
            params: Values of its active parameters.
            distance: Another one than the study's.
        """
        within = self.distance if distance is None else distance
        choices, numbers = self._split(params)
        for others, number in self._numbers.get(choices, ()):
            if numbers == others or all(
                abs(mine - other) < within for mine, other in zip(numbers, others, strict=True)
            ):
                return number
        return None

    def untried(
        self, generator: random.Random, fixed: Mapping[str, Any] | None = None
    ) -> dict[str, Any] | None:
        """Return a random candidate that is near to none, or None where all have been tried.

        Where none is found, the space is too full for the distance, and a smaller one must do.

        Args:
            generator: Of the random numbers.
            fixed: Values that are given.
        """
        for distance in dict.fromkeys((self.distance, self.distance / 4, 0.0)):
            for _ in range(UNIFORM_DRAWS):
                params = random_params(self.space, generator, fixed)
                if self.near(params, distance) is None:
                    return params
        return None

    def _split(self, params: Mapping[str, Any]) -> tuple[Choices, tuple[float, ...]]:
        """Return what two candidates must share to be near, and where their numbers lie."""
        choices, numbers = [], []
        for key in sorted(params):
            parameter = self.space.parameters.get(key)
            if parameter is None or parameter.choice is not None:
                choices.append((key, repr(params[key])))
            else:
                choices.append((key, ""))
                numbers.append(position(parameter, params[key]))
        return tuple(choices), tuple(numbers)


def is_plain(space: SearchSpace, trial: TrialView) -> bool:
    """Return whether a trial set nothing beside its parameters that changes the candidate."""
    recipe = recipe_of(trial.user_attrs, space.recipes)
    if not recipe:
        return recipe is not None
    params = trial.params or trial.requested
    known = {key: value for key, value in params.items() if key in space.parameters}
    return space.candidate(known, recipe) == space.candidate(known)


class ProposesFirst(Protocol):
    """What may propose a candidate instead of the sampler."""

    def propose(
        self,
        trials: Sequence[TrialView],
        tried: TriedCandidates,
        generator: random.Random,
        fixed: Mapping[str, Any] | None = None,
    ) -> Mapping[str, Any] | None:
        """Return an untried candidate, or None where the sampler is to propose."""


class ProposalSampler(BaseSampler):
    """Any sampler, asked again where what it proposes was tried before.

    After `DRAWS` proposals that were all tried, the candidate is drawn at random among those that
    were not. Where every candidate was tried, the sampler's own proposal stands.

    Args:
        wrapped: Whose proposals these are.
        tried: Of the study, as it is now.
        seed: Of the random candidates.
        trials: The study's, as they are now.
        guide: Proposes before the sampler does.
    """

    def __init__(
        self,
        wrapped: BaseSampler,
        tried: TriedCandidates,
        seed: int,
        trials: Sequence[TrialView] = (),
        guide: ProposesFirst | None = None,
    ) -> None:
        self._wrapped, self._tried = wrapped, tried
        self._trials, self._guide = trials, guide
        self._generator = random.Random(seed)
        self._distributions = {
            key: distribution_of(parameter) for key, parameter in tried.space.parameters.items()
        }

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """Return the whole space: `sample_relative` proposes every active parameter."""
        return self._distributions

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Return a candidate that was not tried before, if there is one."""
        shown: Any = StudyWithout(study, REPEAT_OF)
        fixed = trial.system_attrs.get("fixed_params", {})
        if self._guide is not None:
            guided = self._guide.propose(self._trials, self._tried, self._generator, fixed)
            if guided is not None:
                return dict(guided)
        within = self._wrapped.infer_relative_search_space(shown, trial)
        first: dict[str, Any] | None = None
        for _ in range(DRAWS):
            params = self._proposed(shown, trial, within, fixed)
            if self._tried.near(params) is None:
                return params
            first = first or params
        return self._tried.untried(self._generator, fixed) or first or {}

    def _proposed(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        within: dict[str, BaseDistribution],
        fixed: Mapping[str, Any],
    ) -> dict[str, Any]:
        """Return a proposal of the wrapped sampler, as Optuna puts one together."""
        joint = self._wrapped.sample_relative(study, trial, within)
        params: dict[str, Any] = {}
        for key, distribution in self._distributions.items():
            if not self._tried.space.is_active(key, params):
                continue
            if key in fixed:
                params[key] = fixed[key]
            elif key in joint and contains(distribution, joint[key]):
                params[key] = joint[key]
            else:
                params[key] = self.sample_independent(study, trial, key, distribution)
        return params

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """Return what the wrapped sampler proposes for one parameter."""
        return self._wrapped.sample_independent(study, trial, param_name, param_distribution)

    def reseed_rng(self) -> None:
        """Change the seed of the wrapped sampler."""
        self._wrapped.reseed_rng()

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """Tell the wrapped sampler of a new trial."""
        self._wrapped.before_trial(study, trial)

    def after_trial(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        state: TrialState,
        values: Sequence[float] | None,
    ) -> None:
        """Tell the wrapped sampler of the end of a trial."""
        self._wrapped.after_trial(study, trial, state, values)
