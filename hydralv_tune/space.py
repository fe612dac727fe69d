"""The search space: what a study samples, what it sweeps, what it minimises, when it ends."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import Field

from hydralv_tune.config import Count, DecodingGrid, NotNegative, Positive, Section, Share, Whole

METRICS = ("adapted_rand_error", "adapted_rand_error_foreground", "f1_iou50", "voi")


class Parameter(Section):
    """One searched key: `float: [lo, hi]`, `int: [lo, hi]` or `choice`.

    A `choice` list holds values of the key. A `choice` mapping holds named partial candidates:
    the parameter's name is then free, and the chosen block is merged into the candidate.
    """

    float_: tuple[float, float] | None = Field(None, alias="float", strict=False)
    int_: tuple[int, int] | None = Field(None, alias="int", strict=False)
    choice: list[Any] | dict[str, dict[str, Any]] | None = None
    log: bool = False
    step: Count | None = None
    when: dict[str, list[Any]] = Field(default_factory=dict)

    @property
    def choices(self) -> list[str | int | float | bool | None]:
        """Return the choices as a database can hold them: a list as its JSON text."""
        if isinstance(self.choice, dict):
            return list(self.choice)
        return [encode(value) for value in self.choice or []]


def encode(value: Any) -> str | int | float | bool | None:
    """Return a value as a database can hold it: a list or mapping as JSON text."""
    if isinstance(value, list | tuple | dict):
        return json.dumps(value, sort_keys=True)
    return value  # type: ignore[no-any-return]


class Guard(Section):
    """`objective.guard`: what adapted Rand error alone cannot see."""

    f1_below_best: Share = Field(0.05, description="The sweep's: how far below the best F1.")
    f1_iou50: Share = Field(0.5, description="The study's: a winner under it is infeasible.")


class Objective(Section):
    """`objective`."""

    metric: Literal["adapted_rand_error", "adapted_rand_error_foreground", "f1_iou50", "voi"] = (
        "adapted_rand_error"
    )
    guard: Guard = Guard()
    stop_at: NotNegative | None = Field(
        0.02, description="The study stops once a feasible trial is under it; null: never."
    )


class Budget(Section):
    """`budget`: whichever limit comes first ends the study."""

    trials: Count = Field(60, description="COMPLETE and PRUNED trials in all.")
    timeout_s: Positive | None = Field(None, description="Wall clock of one `run`.")
    gpu_hours: Positive | None = Field(None, description="Summed over all trials.")
    trial_timeout_s: Positive | None = Field(None, description="A trial that hangs is failed.")
    retries: Whole = Field(2, description="Further attempts after a crash or out of memory.")


class Sampler(Section):
    """`sampler`."""

    name: Literal["tpe", "gp", "random", "cmaes", "qmc"] = "tpe"
    seed: Whole = 0
    startup_trials: Whole = Field(10, description="Random ones before the model is asked.")


class Pruner(Section):
    """`pruner`: steps are evaluations."""

    name: Literal[
        "median", "percentile", "hyperband", "successive_halving", "wilcoxon", "none"
    ] = "median"
    warmup_evaluations: Whole = Field(3, description="Nothing is pruned before.")
    startup_trials: Whole = Field(5, description="Finished trials before anything is pruned.")
    patience: Whole = Field(1, description="Evaluations without improvement before pruning.")
    percentile: Annotated[float, Field(gt=0, lt=100)] = 25.0


class SearchSpace(Section):
    """Everything that determines a study, apart from the volumes."""

    name: str = ""
    base: str = Field("baseline", description="The candidate that is varied.")
    fixed: dict[str, Any] = Field(
        default_factory=dict,
        description="A partial candidate that holds for every trial, warm starts included.",
    )
    warm_starts: list[str] = Field(default_factory=list, description="Enqueued first.")
    parameters: dict[str, Parameter] = Field(default_factory=dict)
    decoding: DecodingGrid = DecodingGrid()
    objective: Objective = Objective()
    budget: Budget = Budget()
    sampler: Sampler = Sampler()
    pruner: Pruner = Pruner()
