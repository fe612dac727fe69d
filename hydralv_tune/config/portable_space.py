"""A search space with `export: pytc`, reduced to what PyTorch Connectomics can run too."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from hydralv_tune.config.errors import ConfigError
from hydralv_tune.config.files import NETWORK_KEYS
from hydralv_tune.config.pytc_portability import obstacles
from hydralv_tune.config.search_space import Parameter, SearchSpace, encode, same
from hydralv_tune.config.validation import leaves, shown

COMBINATIONS = 5_000
"""Networks that are tried one by one; a space with more is refused rather than searched for."""


def only_portable(space: SearchSpace, place: str) -> tuple[SearchSpace, list[str]]:
    """Return a space whose every proposal goes over, and what was left out for it.

    Every combination of the choices that make the network is tried. A choice that goes over in
    none of them is left out, and with it what depends on it; a combination of choices that are
    kept but do not go together is refused, since a sampler would propose it.

    Args:
        space: Checked, and without `export` yet.
        place: Its file, for messages.

    Returns:
        The reduced space, and a sentence for each choice, parameter and warm start left out.

    Raises:
        ConfigError: Nothing goes over, or choices that go over alone do not go together.
    """
    kept: dict[str, list[Any]] = {key: [] for key in _of_the_network(space)}
    against: dict[tuple[str, str], str] = {}
    for params in _combinations(space, list(kept), place):
        reasons = obstacles(space.candidate(params))
        for key, value in params.items():
            if reasons:
                against.setdefault((key, shown(value)), reasons[0])
            elif not any(same(value, other) for other in kept[key]):
                kept[key].append(value)
    reduced, left_out = _reduced(space, kept, against)
    active = list(_of_the_network(reduced))
    for params in _combinations(reduced, active, place):
        reasons = obstacles(reduced.candidate(params))
        if reasons:
            values = ", ".join(f"{key} {shown(value)}" for key, value in params.items())
            raise ConfigError(
                f"{place}: export is pytc, but "
                + (
                    f"the combination of {values}"
                    if values
                    else f"base '{space.base}' with `fixed`"
                )
                + f" cannot go over. {reasons[0]} "
                "Tie such keys in one `choice` of named partial candidates, or set one in `fixed`."
            )
    starts = []
    for name in reduced.warm_starts:
        overrides = reduced.recipes.get(name)
        if overrides is None:
            overrides = space.warm_start(name).overrides
        reasons = obstacles(reduced.candidate({}, overrides))
        if reasons:
            left_out.append(f"warm start '{name}': {reasons[0]}")
        else:
            starts.append(name)
    return reduced.model_copy(update={"warm_starts": starts, "export": "pytc"}), left_out


def _of_the_network(space: SearchSpace) -> Iterator[str]:
    """Yield, in order, the parameters that decide the network, and those they depend on."""
    network = {f"model.{key}" for key in NETWORK_KEYS}
    chosen: set[str] = set()
    for key, parameter in reversed(space.parameters.items()):
        blocks = parameter.choice.values() if isinstance(parameter.choice, dict) else []
        touched = {key} | {path for block in blocks for path, _ in leaves(block)}
        if touched & network or key in chosen:
            chosen |= {key, *parameter.when}
    yield from (key for key in space.parameters if key in chosen)


def _combinations(space: SearchSpace, keys: list[str], place: str) -> Iterator[dict[str, Any]]:
    """Yield the values of some parameters in every combination that can be proposed."""
    made: list[dict[str, Any]] = [{}]
    for key in keys:
        parameter = space.parameters[key]
        values = parameter.choices or list(parameter.float_ or parameter.int_ or ())
        made = list(
            itertools.chain.from_iterable(
                [{**params, key: value} for value in values]
                if space.is_active(key, params)
                else [params]
                for params in made
            )
        )
        if len(made) > COMBINATIONS:
            raise ConfigError(
                f"{place}: export is pytc, but the network is searched in more than "
                f"{COMBINATIONS:,} combinations, too many to check. Search fewer keys of `model`."
            )
    yield from made


def _reduced(
    space: SearchSpace, kept: Mapping[str, list[Any]], against: Mapping[tuple[str, str], str]
) -> tuple[SearchSpace, list[str]]:
    """Return the space with the choices that were kept, and what was left out, with the reason."""
    parameters: dict[str, Parameter] = {}
    left_out: list[str] = []
    for key, parameter in space.parameters.items():
        when = {
            name: [
                value
                for value in values
                if name not in kept or any(same(encode(value), good) for good in kept[name])
            ]
            for name, values in parameter.when.items()
            if name in parameters
        }
        if len(when) < len(parameter.when) or not all(when.values()):
            left_out.append(f"{key}: only searched for what is left out")
            continue
        choice = parameter.choice
        if key in kept and choice is not None:
            names = parameter.choices
            good = [any(same(name, other) for other in kept[key]) for name in names]
            lost = [shown(name) for name, stays in zip(names, good, strict=True) if not stays]
            left_out += [f"{key} {name}: {against[key, name]}" for name in lost]
            if not any(good):
                continue
            if isinstance(choice, dict):
                choice = {name: block for name, block in choice.items() if name in kept[key]}
            else:
                choice = [v for v, stays in zip(choice, good, strict=True) if stays]
        parameters[key] = parameter.model_copy(update={"choice": choice, "when": when})
    return space.model_copy(update={"parameters": parameters}), left_out
