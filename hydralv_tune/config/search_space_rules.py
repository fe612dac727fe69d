"""The rules of a search space: every searched key is real, and every value gives a candidate."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

from hydralv_tune.config.candidate import Candidate, Model, Split
from hydralv_tune.config.candidate_rules import KnownBlocks
from hydralv_tune.config.decoding_rules import check_grid
from hydralv_tune.config.errors import ConfigError
from hydralv_tune.config.files import NETWORK_KEYS
from hydralv_tune.config.search_methods import pruners, samplers
from hydralv_tune.config.search_space import Parameter, SearchSpace
from hydralv_tune.config.validation import (
    MISSING,
    check_keys,
    key_paths,
    known_step,
    leaves,
    nearest_key,
    refuse,
    shown,
    value_at,
)

DRAWS = 24
"""Random points whose candidate is built too: a rule may join two searched keys."""
OPEN = "data.augmentation."


def check_space(space: SearchSpace, place: str) -> None:
    """Check every rule of a search space but that of `export`, which `only_portable` applies.

    Raises:
        ConfigError: The first rule that is broken.
    """
    # A value is checked over the base, whose own network need not go over.
    space = space.model_copy(update={"export": None})
    check_keys(space.fixed, Candidate, f"{place}: fixed")
    earlier: dict[str, Parameter] = {}
    for key, parameter in space.parameters.items():
        _check_parameter(space, key, parameter, place)
        _check_conditions(key, parameter, earlier, place)
        earlier[key] = parameter
    _check_weights(space, place)
    check_grid(space.decoding, place, "decoding.")
    known = KnownBlocks(base=space.base_mapping())
    try:
        split = space.candidate({}, known=known).data.split
    except ConfigError as error:
        raise ConfigError(
            f"{place}: base '{space.base}' with `fixed`: {_without_place(error)}"
        ) from error
    _check_search_methods(space, split, place)
    for key, parameter in space.parameters.items():
        for value in extremes(parameter):
            params = with_conditions(space, {key: value})
            what = f"{place}: parameters.{key}: the value {shown(value)}"
            _check_point(space, params, split, what, known)
    generator = random.Random(0)
    for _ in range(DRAWS if space.parameters else 0):
        params = drawn(space, generator)
        what = f"{place}: parameters: the combination {params}"
        _check_point(space, params, split, what, known)
    for name in space.warm_starts:
        start = space.warm_start(name)
        what = f"{place}: warm_starts: '{name}'"
        _check_point(space, start.params, split, what, known, start.overrides)
    if len(set(space.warm_starts)) != len(space.warm_starts):
        refuse(place, "warm_starts", space.warm_starts, "a name stands twice")


def _check_search_methods(space: SearchSpace, split: Split, place: str) -> None:
    """Check that sampler and pruner are known, and that the pruner has the folds it compares."""
    for key, name, table in (
        ("sampler.name", space.sampler.name, samplers()),
        ("pruner.name", space.pruner.name, pruners()),
    ):
        if name not in table:
            refuse(place, key, name, "it is unknown", known_step(name, table))
    least = pruners()[space.pruner.name].least_folds
    if split.networks < least:
        rule = f"it compares at least {least} folds"
        refuse(
            place, "pruner.name", space.pruner.name, rule, "Set fixed.data.split, or take median."
        )


def _check_weights(space: SearchSpace, place: str) -> None:
    """Refuse pretrained weights for every trial where the network that they fit is searched."""
    weights = value_at(space.fixed, "model.external_weights_path")
    if weights in (MISSING, None):
        return
    network = {f"model.{key}" for key in NETWORK_KEYS}
    for key, parameter in space.parameters.items():
        blocks = parameter.choice.values() if isinstance(parameter.choice, dict) else []
        touched = {key} | {path for block in blocks for path, _ in leaves(block)}
        if touched & network:
            raise ConfigError(
                f"{place}: fixed.model.external_weights_path is {shown(weights)}, but "
                f"parameters.{key} searches the network, which voids the weights. Search "
                "model.external_weights_path too, with a `when` for the network they belong to."
            )


def _without_place(error: ConfigError) -> str:
    """Return a message without its first part, which names another place."""
    return str(error).partition(": ")[2]


def _check_point(
    space: SearchSpace,
    params: Mapping[str, Any],
    of_all: Split,
    what: str,
    known: KnownBlocks,
    recipe: Mapping[str, Any] | None = None,
) -> None:
    """Check that a point of the space gives a valid candidate, scored as all others are."""
    try:
        split = space.candidate(params, recipe, known).data.split
    except ConfigError as error:
        raise ConfigError(f"{what} gives no valid candidate: {_without_place(error)}") from error
    if split != of_all:
        raise ConfigError(
            f"{what} has the data.split {split.kind}, but the base has {of_all.kind}, or another "
            "one of that kind: errors of the two would be ranked as one. Set it in `fixed`."
        )


def _check_parameter(space: SearchSpace, key: str, parameter: Parameter, place: str) -> None:
    """Check one parameter by itself: its key, its kind, its bounds."""
    here = f"parameters.{key}"
    kinds = [parameter.float_ is not None, parameter.int_ is not None, parameter.choice is not None]
    if sum(kinds) != 1:
        raise ConfigError(
            f"{place}: {here} has {sum(kinds)} of float, int and choice, but must have one. "
            "Try {float: [1e-5, 1e-3], log: true}."
        )
    _check_bounds(parameter, here, place)
    if isinstance(parameter.choice, dict):
        for name, block in parameter.choice.items():
            check_keys(block, Candidate, f"{place}: {here}.choice.{name}")
            if not block:
                refuse(place, f"{here}.choice.{name}", block, "a named choice says something")
        return
    declared = {f"model.{name}" for name in Model.open_keys()}  # by architectures from outside
    if key not in {*key_paths(Candidate), *declared} and not key.startswith(OPEN):
        near = nearest_key(Candidate, key)
        hint = f"Did you mean '{near}'?" if near else "See docs/config.md."
        raise ConfigError(f"{place}: {here} is no key of a candidate. {hint}")
    for path, value in leaves(space.fixed):
        if path == key or path.startswith(f"{key}."):
            raise ConfigError(
                f"{place}: {here} is searched, but fixed.{path} is {shown(value)} and wins. "
                "Drop one of the two."
            )


def _check_bounds(parameter: Parameter, here: str, place: str) -> None:
    """Check range, log, step and choices."""
    if parameter.choice is not None:
        if parameter.log or parameter.step:
            refuse(place, here, "a choice", "log and step belong to a range")
        choices = [repr(choice) for choice in parameter.choices]
        if not choices:
            refuse(place, f"{here}.choice", parameter.choice, "it needs at least one value")
        if len(set(choices)) != len(choices):
            refuse(place, f"{here}.choice", parameter.choice, "a value stands twice")
        return
    kind = "int" if parameter.int_ is not None else "float"
    low, high = parameter.int_ or parameter.float_ or (0, 0)
    if not low < high:
        refuse(place, f"{here}.{kind}", [low, high], "the lowest must be below the highest")
    if parameter.log and low <= 0:
        refuse(place, f"{here}.{kind}[0]", low, "a log range must start above 0",
               "Try 1." if kind == "int" else "Try 1e-5.")  # fmt: skip
    if parameter.step and (kind == "float" or parameter.log):
        refuse(place, f"{here}.step", parameter.step, "a step belongs to an int without log")
    if parameter.step and (high - low) % parameter.step:
        end = high - (high - low) % parameter.step
        refuse(place, f"{here}.int", [low, high], f"the range is no multiple of step "
               f"{parameter.step}", f"Try [{low}, {end}].")  # fmt: skip


def _check_conditions(
    key: str, parameter: Parameter, earlier: Mapping[str, Parameter], place: str
) -> None:
    """Check that a condition names an earlier parameter and values that it can have."""
    for name, values in parameter.when.items():
        here = f"parameters.{key}.when.{name}"
        if name not in earlier:
            refuse(place, here, values, "a condition names a parameter that stands before it",
                   known_step(name, earlier) if earlier else "Move it up.")  # fmt: skip
        if not values:
            refuse(place, here, values, "it needs at least one value")
        named = isinstance(earlier[name].choice, dict)
        for value in values:
            possible = (
                value in earlier[name].choices
                if named
                else earlier[name].encoded(value) is not MISSING
            )
            if not possible:
                refuse(place, here, value, f"{name} is {earlier[name].allowed()}")


def extremes(parameter: Parameter) -> list[Any]:
    """Return every choice, or both ends of a range, as a database holds them."""
    if parameter.choice is not None:
        return list(parameter.choices)
    return list(parameter.float_ or parameter.int_ or ())


def with_conditions(space: SearchSpace, params: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values together with what their conditions ask for."""
    whole = dict(params)
    waiting = list(params)
    while waiting:
        for name, values in space.parameters[waiting.pop()].when.items():
            if name not in whole:
                parameter = space.parameters[name]
                named = isinstance(parameter.choice, dict)
                whole[name] = values[0] if named else parameter.encoded(values[0])
                waiting.append(name)
    return whole


def drawn(space: SearchSpace, generator: random.Random) -> dict[str, Any]:
    """Return a random point: a value of every active parameter, as a database holds it."""
    params: dict[str, Any] = {}
    for key, parameter in space.parameters.items():
        if not space.is_active(key, params):
            continue
        if parameter.choice is not None:
            params[key] = generator.choice(parameter.choices)
        elif parameter.int_ is not None:
            low, high = parameter.int_
            params[key] = generator.randrange(low, high + 1, parameter.step or 1)
        else:
            params[key] = generator.uniform(*(parameter.float_ or (0.0, 0.0)))
    return params
