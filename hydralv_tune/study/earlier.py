"""What earlier studies teach a new one: which candidates to try first.

Values do not carry over between volumes, ranks do. So an earlier study is kept as a table of
candidates with the rank that each had in it, and a regression over the space says which rank a
candidate may be expected to have here.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hydralv_tune.config.search_space import Pruner, SearchSpace
from hydralv_tune.study.distributions import misfit
from hydralv_tune.study.proposals import TriedCandidates, is_plain, position, random_params
from hydralv_tune.study.trial_views import VIOLATIONS, TrialView, latest_ended

Floats = NDArray[np.float64]

FEWEST = 5
"""Finished trials of an earlier study under which its ranks say too little."""

MOST = 200
"""Trials that are kept of an earlier study."""

GUIDED_TRIALS = 80
"""Finished trials of a study until which earlier ones guide it; the sampler goes on from there."""

FADE_TRIALS = 30.0
"""Finished trials after which earlier studies have half of their weight."""

LENGTH = 0.25
"""Share of a range over which two numbers of a candidate resemble each other."""

OTHER = 2.0
"""Squared distance of two choices that differ, where `LENGTH` is one unit of length."""

NOISE = 0.3
"""Variance of a rank that no model explains, as a share of that between candidates."""

RANK_VARIANCE = 1 / 12
"""Variance of ranks that are spread evenly from 0 to 1."""

EXPLORE = 2.0
"""Standard deviations by which an uncertain candidate is preferred."""

GUIDED_SAMPLER = "tpe"
"""Sampler whose studies are guided though nobody names an earlier one."""

EXPLORE_ALONE = 1.5
"""The same without earlier studies."""

PRUNED_AFTER = 12
"""Complete trials of a guided study before any is pruned."""

EXPECTED_VARIANCE = 0.04
"""Variance over a space of the ranks that a lesson lets expect."""

TRUST_TRIALS = 2.0
"""Trials of this study that weigh as much as the belief that earlier ones are right."""

WAITED_FOR = 2
"""Earlier studies from which on recipes wait for what they say: one alone may be no better."""

POOL = 150
"""Random candidates from which the most promising one is taken."""

BEST = 5
"""Candidates of each study that are changed a little."""

MUTANTS = 10
"""Changed copies of each of the best candidates in that pool."""


@dataclass(frozen=True)
class Lesson:
    """The candidates of an earlier study, with their ranks in it.

    Args:
        source: Where it comes from, for people.
        keys: What it searched.
        params: Values of the active parameters of each trial, as the database holds them.
        ranks: Of each, 0 for the best and 1 for the worst.
    """

    source: str
    keys: tuple[str, ...]
    params: tuple[Mapping[str, Any], ...]
    ranks: tuple[float, ...]

    def as_mapping(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return {
            "source": self.source,
            "keys": list(self.keys),
            "params": [dict(params) for params in self.params],
            "ranks": [round(rank, 4) for rank in self.ranks],
        }

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any]) -> Lesson:
        """Return what `as_mapping` gave."""
        return cls(
            str(mapping["source"]),
            tuple(mapping["keys"]),
            tuple(mapping["params"]),
            tuple(map(float, mapping["ranks"])),
        )


def ranks_of(trials: Sequence[TrialView]) -> Floats:
    """Return the rank of each trial among all: 0 for the best, 1 for the worst.

    It is the share of the others that are ahead of a trial at the last evaluation that both have,
    guard first, so that what was pruned is compared fairly with what came to its end.

    Args:
        trials: Each with an evaluation at least, or a value.
    """
    last = np.array([max(trial.intermediate, default=1) for trial in trials])
    count, steps = len(trials), int(last.max(initial=1))
    over, value = np.zeros((count, steps)), np.full((count, steps), np.inf)
    for row, trial in enumerate(trials):
        known = trial.user_attrs.get(VIOLATIONS) or {}
        ends = max(trial.violation or 0.0, 0.0), np.inf if trial.value is None else trial.value
        shown = (np.inf, np.inf) if trial.intermediate else ends
        for step in range(1, steps + 1):
            if step in trial.intermediate:
                shown = max(known.get(str(step), 0.0), 0.0), trial.intermediate[step]
            if step == last[row] and trial.state == "COMPLETE":
                shown = ends
            over[row, step - 1], value[row, step - 1] = shown
    places = np.empty((count, steps))
    for step in range(steps):
        order = np.lexsort((value[:, step], over[:, step]))
        ordered = np.stack([over[order, step], value[order, step]])
        places[order, step] = np.cumsum(np.r_[0, np.any(ordered[:, 1:] != ordered[:, :-1], axis=0)])
    ahead = np.full(count, -0.5)  # each ties with itself
    lasts = np.unique(last)
    for mine in lasts:
        for theirs in lasts:
            step = min(mine, theirs) - 1
            own, others = places[last == mine, step], np.sort(places[last == theirs, step])
            ahead[last == mine] += np.searchsorted(others, own, "left") / 2
            ahead[last == mine] += np.searchsorted(others, own, "right") / 2
    return np.asarray(ahead / max(count - 1, 1), dtype=float)


def lesson_of(
    space: SearchSpace, trials: Sequence[TrialView], source: str, most: int = MOST
) -> Lesson | None:
    """Return what a study teaches, or None where it has too few finished trials.

    Args:
        space: That it searched.
        trials: All of it.
        source: Where it comes from, for people.
        most: Trials that are kept: evenly spread over the ranks.
    """
    known = [trial for trial in latest_ended(trials) if trial.params and is_plain(space, trial)]
    if len(known) < FEWEST:
        return None
    ranks = ranks_of(known)
    order = np.argsort(ranks)
    kept = order[np.linspace(0, len(known) - 1, min(most, len(known))).round().astype(int)]
    return Lesson(
        source,
        tuple(space.parameters),
        tuple(dict(known[index].params) for index in kept),
        tuple(float(ranks[index]) for index in kept),
    )


def shelf() -> list[Lesson]:
    """Return what ships with the package: the candidates of its benchmark, a volume each."""
    table = json.loads(files("hydralv_tune.study").joinpath("shelf.json").read_text("utf-8"))
    params = [dict(zip(table["keys"], row, strict=True)) for row in table["candidates"]]
    lessons = []
    for name, ranks in table["ranks"].items():
        trained = [index for index, rank in enumerate(ranks) if rank is not None]
        lessons.append(
            Lesson(
                f"shelf {table['version']}, {name}",
                tuple(table["keys"]),
                tuple(params[index] for index in trained),
                tuple(ranks[index] for index in trained),
            )
        )
    return lessons


class _Kernel:
    """How much candidates resemble each other in some parameters of a space.

    One half is the mean over the parameters, which generalises from few trials; the other half is
    their product, which knows combinations.
    """

    def __init__(self, space: SearchSpace, keys: Sequence[str]) -> None:
        self._parameters = {key: space.parameters[key] for key in keys}
        self._choices = {
            key: {_hashed(value): index for index, value in enumerate(parameter.choices)}
            for key, parameter in self._parameters.items()
        }

    def encoded(self, candidates: Sequence[Mapping[str, Any]]) -> Floats:
        """Return a row per candidate: positions in ranges and numbers of choices.

        NaN stands for what is not active, -1 for a choice that the space does not have.
        """
        table = np.full((len(candidates), len(self._parameters)), np.nan)
        for column, (key, parameter) in enumerate(self._parameters.items()):
            for row, params in enumerate(candidates):
                if key not in params:
                    continue
                value = params[key]
                if parameter.choice is not None:
                    table[row, column] = self._choices[key].get(_hashed(value), -1)
                elif isinstance(value, int | float) and (value > 0 or not parameter.log):
                    table[row, column] = position(parameter, value)
        return table

    def __call__(self, left: Floats, right: Floats) -> Floats:
        """Return the covariance of each of one table with each of another, 1 with itself."""
        total = np.zeros((len(left), len(right)))
        mean = np.zeros_like(total)
        for column, parameter in enumerate(self._parameters.values()):
            one, other = left[:, column, None], right[None, :, column]
            if parameter.choice is None:
                distance = ((one - other) / LENGTH) ** 2 / 2
                inactive = np.isnan(one) & np.isnan(other)
                distance = np.where(np.isnan(distance), OTHER * ~inactive, distance)
            else:
                differ = (one != other) & ~(np.isnan(one) & np.isnan(other))
                distance = OTHER * differ
            total += distance
            mean += np.exp(-distance)
        return (mean / max(len(self._parameters), 1) + np.exp(-total)) / 2


def _hashed(value: Any) -> tuple[bool, Any]:
    """Return a choice as a key under which true is not 1."""
    return isinstance(value, bool), value


class _LessonModel:
    """Gaussian process regression of the ranks of a lesson, over what both spaces search."""

    def __init__(self, space: SearchSpace, lesson: Lesson) -> None:
        self._kernel = _Kernel(space, [key for key in space.parameters if key in lesson.keys])
        self._table = self._kernel.encoded(lesson.params)
        self._centre = float(np.mean(lesson.ranks))
        covariance = self._kernel(self._table, self._table)
        covariance[np.diag_indices_from(covariance)] += NOISE
        self._weights = np.linalg.solve(covariance, np.array(lesson.ranks) - self._centre)

    def predict(self, candidates: Sequence[Mapping[str, Any]]) -> Floats:
        """Return the expected ranks of candidates, less those of a middling one."""
        table = self._kernel.encoded(candidates)
        return np.asarray(self._kernel(table, self._table) @ self._weights)


def pruner_with(lessons: Sequence[Lesson], pruner: Pruner) -> Pruner:
    """Return the settings of the pruner of a study that earlier ones guide.

    What they propose is good on the whole, and who is last among the good ones early says little:
    trained on, it was as often the best.
    """
    if not lessons:
        return pruner
    return pruner.model_copy(update={"startup_trials": max(pruner.startup_trials, PRUNED_AFTER)})


class Guide:
    """Chooses what a study tries first, from earlier studies and from its own trials so far.

    Args:
        space: What the study searches.
        lessons: Of earlier studies.
        alone: Whether it also proposes without any of them, from the study's own trials.
    """

    def __init__(self, space: SearchSpace, lessons: Sequence[Lesson], alone: bool = False) -> None:
        self.space = space
        self.alone = alone
        self.lessons = [
            lesson for lesson in lessons if any(key in space.parameters for key in lesson.keys)
        ]

    @cached_property
    def _models(self) -> list[_LessonModel]:
        """Return the model of each lesson, made when the first is asked."""
        return [_LessonModel(self.space, lesson) for lesson in self.lessons]

    @cached_property
    def _best(self) -> list[dict[str, Any]]:
        """Return the best candidates of each lesson, as far as this space has them."""
        return [
            {
                key: value
                for key, value in lesson.params[index].items()
                if misfit(self.space, {key: value}) is None
            }
            for lesson in self.lessons
            for index in np.argsort(lesson.ranks)[:BEST]
        ]

    def propose(
        self,
        trials: Sequence[TrialView],
        tried: TriedCandidates,
        generator: random.Random,
        fixed: Mapping[str, Any] | None = None,
        waiting: Sequence[Mapping[str, Any]] = (),
    ) -> Mapping[str, Any] | None:
        """Return the most promising untried candidate, or None where the sampler is to propose.

        Args:
            trials: Of this study, as they are now.
            tried: What they have tried.
            generator: Of the random numbers.
            fixed: Values that are given.
            waiting: Candidates that will be tried in any case; one of them is returned itself where
                it is the most promising, and none that is near to one of them.
        """
        ended = [t for t in latest_ended(trials) if t.params and is_plain(self.space, t)]
        if not (self.lessons or self.alone) or len(ended) >= GUIDED_TRIALS:
            return None
        # Nothing follows an attempt that runs.
        running = [
            t for t in trials if t.state == "RUNNING" and t.params and is_plain(self.space, t)
        ]
        if not self.lessons and len(ended) + len(running) < self.space.sampler.startup_trials:
            return None
        ranks = ranks_of(ended) if ended else np.zeros(0)
        pool = self._pool(
            [ended[i].params for i in np.argsort(ranks)[:BEST]], tried, generator, fixed
        )
        known = TriedCandidates(self.space, tried.distance)
        for params in waiting:
            known.add(params)
        pool = [*waiting, *(params for params in pool if known.near(params) is None)]
        if not pool:
            return None
        own = [trial.params for trial in (*ended, *running)]
        tried_before = [model.predict(own) if own else np.zeros(0) for model in self._models]
        there = [model.predict(pool) for model in self._models]
        if _lacks_contrast(tried_before, there):
            return None
        scores = self._scores(own, ranks, pool, tried_before, there)
        return pool[int(np.argmin(scores))]

    def _pool(
        self,
        best: Sequence[Mapping[str, Any]],
        tried: TriedCandidates,
        generator: random.Random,
        fixed: Mapping[str, Any] | None,
    ) -> list[Mapping[str, Any]]:
        """Return untried candidates: random ones, and the best known ones with changes."""
        found = [random_params(self.space, generator, fixed) for _ in range(POOL)]
        for params in [*best, *self._best]:
            for _ in range(MUTANTS):
                rate = generator.random()
                kept = {key: params[key] for key in params if generator.random() > rate}
                found.append(random_params(self.space, generator, {**kept, **(fixed or {})}))
        return [params for params in found if tried.near(params) is None]

    def _scores(
        self,
        own: Sequence[Mapping[str, Any]],
        ranks: Floats,
        pool: Sequence[Mapping[str, Any]],
        tried_before: Sequence[Floats],
        there: Sequence[Floats],
    ) -> Floats:
        """Return what is least for the most promising candidate of a pool.

        Each lesson is trusted as far as this study's trials agree with it. What they say beyond
        that is a Gaussian process of its own; one that runs makes its neighbours less uncertain.

        Args:
            own: Candidates of this study: the ended ones, then those that run.
            ranks: Of the ended ones.
            pool: Candidates to choose from.
            tried_before: Ranks that each lesson lets expect of `own`.
            there: The same of `pool`.
        """
        count = len(ranks)
        before, expected = np.zeros(len(own)), np.zeros(len(pool))
        for mine, its in zip(tried_before, there, strict=True):
            weight = _trust(mine[:count], ranks) / len(there)
            before, expected = before + weight * mine, expected + weight * its
        kernel = _Kernel(self.space, list(self.space.parameters))
        table, asked = kernel.encoded(own), kernel.encoded(pool)
        covariance = kernel(table, table)
        covariance[np.diag_indices_from(covariance)] += NOISE
        cross = kernel(asked, table)
        beyond = np.zeros(len(own))
        if count:
            beyond[:count] = (ranks - ranks.mean()) - (before[:count] - before[:count].mean())
        solved = np.linalg.solve(covariance, np.column_stack([beyond, cross.T]))
        variance = RANK_VARIANCE * np.maximum(1.0 - (cross * solved[:, 1:].T).sum(axis=1), 0.0)
        explore = EXPLORE if there else EXPLORE_ALONE
        return np.asarray(expected + cross @ solved[:, 0] - explore * np.sqrt(variance))


def _lacks_contrast(tried_before: Sequence[Floats], there: Sequence[Floats]) -> bool:
    """Return whether a study tried only what its lessons hold for good, and the sampler proposes.

    Ranks among those alone cannot tell whether the lessons are right, so every other trial is the
    sampler's until one has been tried that they advise against.

    Args:
        tried_before: Ranks that each lesson lets expect of what was tried.
        there: The same of what might be tried.
    """
    if not there:
        return False
    tried = np.mean(tried_before, axis=0)
    if len(tried) % 2 == 0:
        return False
    low, high = np.quantile(np.mean(there, axis=0), [0.1, 0.9])
    return bool(np.ptp(tried) < (high - low) / 3)


def _trust(expected: Floats, ranks: Floats) -> float:
    """Return the weight of a lesson: the slope of ranks over those expected, fading with both.

    The belief that it is right counts as `TRUST_TRIALS` trials that agree with it. A lesson that
    this study's trials contradict counts the other way round.

    Args:
        expected: What the lesson says of the ended trials of a study.
        ranks: Of those.
    """
    belief = TRUST_TRIALS * EXPECTED_VARIANCE
    agreement = spread = 0.0
    if len(ranks):
        centred = expected - expected.mean()
        agreement, spread = float(centred @ (ranks - ranks.mean())), float(centred @ centred)
    slope = (belief + agreement) / (belief + spread)
    return min(max(slope, -1.0), 2.0) * FADE_TRIALS / (FADE_TRIALS + len(ranks))
