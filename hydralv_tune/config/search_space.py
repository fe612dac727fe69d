"""The search space: what a study samples, what it sweeps, what it minimises, when it ends."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator
from pydantic_core import PydanticKnownError

from hydralv_tune.config.candidate import Candidate, DecodingGrid
from hydralv_tune.config.candidate_rules import KnownBlocks
from hydralv_tune.config.errors import ConfigError, unknown_name
from hydralv_tune.config.files import (
    candidate_from_mapping,
    layered,
    load_candidate,
    whole_candidate,
)
from hydralv_tune.config.paths import find_file
from hydralv_tune.config.pytc_portability import obstacles
from hydralv_tune.config.strict_model import Count, NotNegative, Positive, Share, StrictModel, Whole
from hydralv_tune.config.validation import (
    MISSING,
    leaves,
    merged,
    nested,
    shown,
    validated,
    value_at,
)
from hydralv_tune.config.yaml_io import dump_yaml, read_yaml_mapping


class Parameter(StrictModel):
    """One searched key: `float: [lo, hi]`, `int: [lo, hi]` or `choice`.

    A `choice` list holds values of the key. A `choice` mapping holds named partial candidates:
    the parameter's name is then free, and the chosen block is merged into the candidate.
    """

    float_: tuple[float, float] | None = Field(
        None, alias="float", strict=False, description="Lowest and highest."
    )
    int_: tuple[int, int] | None = Field(
        None, alias="int", strict=False, description="Lowest and highest."
    )
    choice: list[Any] | dict[str, dict[str, Any]] | None = Field(
        None, description="Values of the key, or named partial candidates."
    )
    log: bool = Field(False, description="Sample the logarithm of a range.")
    step: Count | None = Field(None, description="Of an int; null: 1.")
    when: dict[str, list[Any]] = Field(
        default_factory=dict, description="Earlier parameters and the values they must have."
    )

    @property
    def choices(self) -> list[str | int | float | bool | None]:
        """Return the choices as a database can hold them: a list as its JSON text."""
        if isinstance(self.choice, dict):
            return list(self.choice)
        return [encode(value) for value in self.choice or []]

    def decoded(self, value: Any) -> Any:
        """Return the value of the key for a value that a database held.

        Raises:
            ValueError: It is none of the choices.
        """
        if self.choice is None:
            return float(value) if self.float_ is not None else int(value)
        for name, choice in zip(self.choices, self._values(), strict=True):
            if same(name, value):
                return choice
        raise ValueError(f"{shown(value)} is none of the choices {self.choices}")

    def encoded(self, value: Any) -> Any:
        """Return the database's form of a value of the key, or `MISSING` where it is outside."""
        if self.choice is None:
            low, high = self.float_ or self.int_ or (0, 0)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not low <= value <= high:
                return MISSING
            if self.float_ is not None:
                return float(value)
            on_grid = value == int(value) and (value - low) % (self.step or 1) == 0
            return int(value) if on_grid else MISSING
        for name, choice in zip(self.choices, self._values(), strict=True):
            if same(choice, value):
                return name
        return MISSING

    def _values(self) -> list[Any]:
        """Return the choices themselves."""
        return list(self.choice.values() if isinstance(self.choice, dict) else self.choice or [])

    def allowed(self) -> str:
        """Return the values allowed, in words."""
        if self.choice is not None:
            return f"one of {', '.join(shown(name) for name in self.choices)}"
        low, high = self.float_ or self.int_ or (0, 0)
        return f"in [{low:g}, {high:g}]" + (f" in steps of {self.step}" if self.step else "")


def same(one: Any, other: Any) -> bool:
    """Return whether two values are one choice: true is not 1, [1, 2] is (1, 2)."""
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def encode(value: Any) -> str | int | float | bool | None:
    """Return a value as a database can hold it: a list or mapping as JSON text."""
    if isinstance(value, list | tuple | dict):
        return json.dumps(value, sort_keys=True)
    return value


class Guard(StrictModel):
    """`objective.guard`: what adapted Rand error alone cannot see."""

    f1_below_best: Share = Field(0.05, description="The sweep's: how far below the best F1.")
    f1_iou50: Share = Field(0.5, description="The study's: a winner under it is infeasible.")


class Objective(StrictModel):
    """`objective`."""

    metric: str = Field(
        "adapted_rand_error",
        description="What the sweep and the study optimise: a name of docs/metrics.md.",
    )
    guard: Guard = Field(default_factory=Guard)
    stop_at: NotNegative | None = Field(
        0.02, description="The study stops once a feasible trial is under it; null: never."
    )

    @field_validator("metric")
    @classmethod
    def _known(cls, metric: str) -> str:
        """Refuse a name that is not in the table of metrics, as it stands now."""
        from hydralv_tune.numerics.metrics.registry import METRICS

        if metric not in METRICS:
            *most, last = (f"'{name}'" for name in METRICS)
            expected = f"{', '.join(most)} or {last}"
            raise PydanticKnownError("literal_error", {"expected": expected})
        return metric


class EnsembleBudget(StrictModel):
    """`budget.ensemble`: the average of several networks, looked for when a study is over."""

    members: Whole = Field(3, description="Different networks at most; 0: none is looked for.")
    time_share: Annotated[float, Field(gt=0, le=1)] = Field(
        0.1, description="Of the time that all trials took together."
    )


class ConfirmBudget(StrictModel):
    """`budget.confirm`: the best trials, trained again with other seeds when a search is over."""

    top: Whole = Field(
        3,
        description="So many of the best trials; 0: none. Without `budget.confirm`: 3 with 2 seeds "
        "where those are at most a tenth of the trials, else none.",
    )
    seeds: Count = Field(2, description="Further trainings of each, with other seeds.")


class Budget(StrictModel):
    """`budget`: whichever limit comes first ends the study."""

    trials: Count = Field(60, description="COMPLETE and PRUNED trials in all.")
    timeout_s: Positive | None = Field(None, description="Wall clock of one `run`.")
    gpu_hours: Positive | None = Field(None, description="Summed over all trials.")
    trial_timeout_s: Positive | None = Field(
        None,
        description="A trial that takes longer trains no further, and its best evaluation counts. "
        "It fails where it has none, or where it has not ended after half of this again.",
    )
    retries: Whole = Field(2, description="Further attempts after a crash or out of memory.")
    stop_when: Literal["no_gain"] | None = Field(
        None,
        description="`no_gain`: the search ends once as many trials again are expected to gain "
        "less than the noise of the score.",
    )
    confirm: ConfirmBudget | None = None
    ensemble: EnsembleBudget = Field(default_factory=EnsembleBudget)


class Sampler(StrictModel):
    """`sampler`."""

    name: str = Field("tpe", description="A name of the table Samplers.")
    seed: Whole = Field(0, description="Of the sampling.")
    startup_trials: Whole = Field(5, description="Random ones before the model is asked.")
    min_distance: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.05,
        description="A proposal is drawn again where an earlier trial has the same choices and all "
        "numbers within this share of their ranges, log where log; 0: only where it is equal.",
    )


class Pruner(StrictModel):
    """`pruner`: steps are evaluations."""

    name: str = Field("median", description="A name of the table Pruners.")
    warmup_evaluations: Whole = Field(3, description="Nothing is pruned before.")
    startup_trials: Whole = Field(
        5,
        description="Finished trials before anything is pruned; at least 12 where earlier studies "
        "teach, since what they propose is good on the whole.",
    )
    patience: Whole = Field(
        2,
        description="Of `median` and `percentile`: evaluations without improvement before pruning.",
    )
    percentile: Annotated[float, Field(gt=0, lt=100)] = Field(
        25.0, description="Of `percentile`: this share of trials is kept at each step."
    )
    revive: Share = Field(
        0.25,
        description="A pruned trial goes on from its checkpoint once it is among this share of all "
        "trials, compared at equal evaluations; 0: never.",
    )


@dataclass(frozen=True)
class WarmStart:
    """A recipe as a first trial: the searched values it holds, and all that it says."""

    name: str
    params: dict[str, Any]
    overrides: dict[str, Any] = field(default_factory=dict)


class SearchSpace(StrictModel):
    """Everything that determines a study, apart from the volumes."""

    name: str = Field("", description="The file's name where none is given.")
    description: str | None = Field(None, description="A sentence for people.")
    base: str = Field("baseline", description="The candidate that is varied.")
    fixed: dict[str, Any] = Field(
        default_factory=dict,
        description="A partial candidate that holds for every trial, warm starts included.",
    )
    warm_starts: list[str] = Field(default_factory=list, description="Enqueued first.")
    recipes: dict[str, dict[str, Any]] = Field(
        default_factory=dict,
        description="Partial candidates by name; those of `base` and `warm_starts` that stand in "
        "files are read into it, so that a stored space is whole.",
    )
    parameters: dict[str, Parameter] = Field(
        default_factory=dict, description="Searched keys; a condition names an earlier one."
    )
    export: Literal["pytc"] | None = Field(
        None,
        description="`pytc`: propose only networks that PyTorch Connectomics has too; other "
        "choices and warm starts are left out, and `check` names them.",
    )
    decoding: DecodingGrid = Field(default_factory=DecodingGrid)
    objective: Objective = Field(default_factory=Objective)
    budget: Budget = Field(default_factory=Budget)
    sampler: Sampler = Field(default_factory=Sampler)
    pruner: Pruner = Field(default_factory=Pruner)

    def as_mapping(self) -> dict[str, Any]:
        """Return the space as plain JSON types; `space_from_mapping` reads it back."""
        return self.model_dump(mode="json", by_alias=True)

    def base_mapping(self) -> dict[str, Any]:
        """Return the whole mapping of the candidate that is varied."""
        if self.base not in self.recipes:
            return load_candidate(self.base).as_mapping()
        place = f"{self.name}: base '{self.base}'"
        return _base_mapping(json.dumps(self.recipes[self.base]), place)

    def is_active(self, key: str, params: Mapping[str, Any]) -> bool:
        """Return whether a parameter is searched, given the values of the earlier ones.

        Args:
            key: Of a parameter.
            params: Values as the database holds them.
        """
        return all(
            name in params
            and self.is_active(name, params)
            and any(same(params[name], encode(value)) for value in values)
            for name, values in self.parameters[key].when.items()
        )

    def candidate(
        self,
        params: Mapping[str, Any],
        overrides: Mapping[str, Any] | None = None,
        known: KnownBlocks | None = None,
    ) -> Candidate:
        """Return the candidate of a trial: base, then recipe, then searched values, then fixed.

        Args:
            params: Values of the active parameters as the database holds them; one that is left
                out keeps the value of the recipe or the base.
            overrides: The partial candidate of a recipe.
            known: Blocks of candidates checked before, see `whole_candidate`.

        Raises:
            ConfigError: A parameter or a choice is unknown, or the result breaks a rule.
        """
        place = self.name or "search space"
        candidate = whole_candidate(self.whole_mapping(params, overrides, known), place, known)
        # The base alone is no proposal where something is searched.
        if self.export is not None and (params or overrides or not self.parameters):
            reasons = obstacles(candidate)
            if reasons:
                raise ConfigError(
                    f"{place}: export is {self.export}, but PyTorch Connectomics lacks this "
                    f"network. {reasons[0]}"
                )
        return candidate

    def whole_mapping(
        self,
        params: Mapping[str, Any],
        overrides: Mapping[str, Any] | None = None,
        known: KnownBlocks | None = None,
    ) -> dict[str, Any]:
        """Return the mapping of `candidate`, its rules not checked yet.

        Raises:
            ConfigError: A parameter or a choice is unknown.
        """
        searched: dict[str, Any] = {}
        for key in params:
            if key not in self.parameters:
                raise ConfigError(f"{self.name}: {unknown_name('parameter', key, self.parameters)}")
        for key, parameter in self.parameters.items():
            if key not in params or not self.is_active(key, params):
                continue
            try:
                value = parameter.decoded(params[key])
            except ValueError as error:
                raise ConfigError(f"{self.name}: {key}: {error}.") from error
            named = isinstance(parameter.choice, dict)
            searched = merged(searched, value if named else nested(key, value))
        base = self.base_mapping() if known is None or known.base is None else known.base
        base = layered(base, overrides or {})
        return layered(base, searched, self.fixed)

    def warm_start(self, name: str) -> WarmStart:
        """Return a recipe as a first trial.

        Args:
            name: Of a recipe of this space, a bare name in `trials/`, or a path.

        Raises:
            ConfigError: A searched key has a value outside the space.
        """
        overrides = self.recipes.get(name)
        if overrides is None:
            overrides = read_yaml_mapping(find_file(name, "trials"))
        whole = self.candidate({}, overrides).as_mapping()
        params: dict[str, Any] = {}
        for key, parameter in self.parameters.items():
            if not self.is_active(key, params):
                continue
            if isinstance(parameter.choice, dict):
                found: Any = next(
                    (choice for choice, block in parameter.choice.items() if _holds(whole, block)),
                    MISSING,
                )
                value: Any = "none of the named choices"
            else:
                value = value_at(whole, key)
                found = MISSING if value is MISSING else parameter.encoded(value)
            if found is MISSING:
                raise ConfigError(
                    f"{self.name}: warm_starts: '{name}' has {key} = {shown(value)}, but the "
                    f"space searches {parameter.allowed()}. Widen the space, or drop '{name}'."
                )
            params[key] = found
        return WarmStart(name, params, dict(overrides))

    def digest(self) -> str:
        """Return a hash of everything that decides what a value of a trial means."""
        text = json.dumps(self._identity(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def _identity(self) -> dict[str, Any]:
        """Return the space without what a study may change on its way: budget and the like."""
        mapping = self.as_mapping()
        for key in ("name", "description", "budget", "sampler", "pruner", "warm_starts",
                    "export"):  # fmt: skip
            mapping.pop(key)
        mapping["recipes"] = {"base": self.base_mapping()}
        return mapping

    def differences(self, other: SearchSpace) -> list[str]:
        """Return a line for each key on which the two spaces disagree, this one's value first."""
        mine, theirs = (dict(leaves(space._identity())) for space in (self, other))
        return [
            f"{key}: {shown(mine[key]) if key in mine else 'absent'} -> "
            f"{shown(theirs[key]) if key in theirs else 'absent'}"
            for key in dict.fromkeys([*mine, *theirs])
            if not same(mine.get(key, MISSING), theirs.get(key, MISSING))
        ]


@lru_cache(maxsize=32)
def _base_mapping(recipe: str, place: str) -> dict[str, Any]:
    """Return the whole mapping of a recipe; a study asks at every trial, and it never changes."""
    return candidate_from_mapping(json.loads(recipe), place=place).as_mapping()


def _holds(whole: Mapping[str, Any], block: Mapping[str, Any]) -> bool:
    """Return whether a whole candidate says everything that a partial one does."""
    return all(same(value_at(whole, path), value) for path, value in leaves(block))


def objective_value(metrics: Mapping[str, Any], objective: Objective) -> float:
    """Return what a study minimises: an error as it is, 1 - F1, the size of a bias.

    Args:
        metrics: As the sweep's winner has them.
        objective: Its metric.
    """
    from hydralv_tune.numerics.metrics.registry import METRICS

    name = objective.metric
    if name == "voi" and name not in metrics:  # a record of the first version
        return float(metrics["voi_split"]) + float(metrics["voi_merge"])
    return float(METRICS[name].cost(metrics[name]))


def guard_violation(f1: float | None, objective: Objective) -> float | None:
    """Return by how much the study's guard is violated; 0 or less is feasible.

    Args:
        f1: F1 at IoU 0.5; None where it is unknown, and so is the answer.
        objective: Its guard.
    """
    return None if f1 is None else objective.guard.f1_iou50 - float(f1)


def space_from_mapping(mapping: Mapping[str, Any], place: str | None = None) -> SearchSpace:
    """Return the space of a mapping, its keys and types checked.

    Args:
        mapping: As `SearchSpace.as_mapping` gives it, or as a file holds it.
        place: File, for the message.

    Raises:
        ConfigError: A key is unknown, or a value breaks a rule.
    """
    return validated(SearchSpace, mapping, place or str(mapping.get("name") or "search space"))


def thresholds_yaml(decoder: str, arguments: Mapping[str, Any]) -> str:
    """Return a partial candidate, as YAML, that decodes with these arguments.

    Args:
        decoder: A name of the table of decoders.
        arguments: Of the decoder; an infinite contour threshold is written as null, which is off.
    """

    def plain(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [plain(entry) for entry in value]
        return None if isinstance(value, float) and value == float("inf") else value

    kwargs = {key: plain(value) for key, value in arguments.items()}
    return dump_yaml({"test": {"decoding": [{"name": decoder, "kwargs": kwargs}]}})
