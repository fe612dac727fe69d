"""The rules of decoding steps and of the grids that are swept."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from hydralv_tune.config.candidate import DecodingGrid, DecodingStep
from hydralv_tune.config.errors import ConfigError
from hydralv_tune.config.validation import known_step, refuse
from hydralv_tune.numerics.watershed.decoders import DECODERS, Argument


def check_decoding_step(step: DecodingStep, place: str, path: str) -> None:
    """Check the decoder's name and the arguments of one step.

    Raises:
        ConfigError: The decoder or an argument is unknown, or a value breaks its rule.
    """
    if step.name not in DECODERS:
        refuse(place, f"{path}name", step.name, "no decoder has that name",
               known_step(step.name, sorted(DECODERS)))  # fmt: skip
    known = DECODERS[step.name].arguments
    for key, value in step.decoder_arguments().items():
        here = f"{path}kwargs.{key}" if path else key
        if key not in known:
            refuse(place, here, value, f"{step.name} has no such argument",
                   known_step(key, sorted(known)))  # fmt: skip
        entries = [value]
        if known[key].kind == "pair":
            if not isinstance(value, list | tuple) or len(value) != 2:
                refuse(place, here, value, "it is a pair: [seed, foreground]")
            entries = list(value)
        _check_values(known[key], key, entries, place, here)


def check_grid(grid: DecodingGrid, place: str, path: str) -> None:
    """Check the axes and the fixed arguments of a decoding grid.

    Raises:
        ConfigError: An axis is unknown or empty, or a value breaks its rule.
    """
    check_decoding_step(
        DecodingStep(name=grid.decoder, kwargs=dict(grid.fixed)), place, f"{path}fixed: "
    )
    decoder = DECODERS[grid.decoder]
    for axis, entries in grid.entries.items():
        here = f"{path}grid.{axis}"
        if axis not in decoder.axes:
            refuse(place, here, entries, f"{grid.decoder} has no such axis",
                   known_step(axis, list(decoder.axes)))  # fmt: skip
        if not isinstance(entries, list | tuple) or not len(entries):
            refuse(place, here, entries, "an axis is a list of at least one value")
        _check_values(decoder.arguments[axis.partition(".")[0]], axis, entries, place, here)
    count = math.prod(len(set(entries)) for entries in grid.entries.values())
    if count > decoder.most_combinations:
        raise ConfigError(
            f"{place}: {path}grid has {count:,} combinations, but {decoder.most_combinations:,} is "
            f"the most for {grid.decoder}. Shorten its axes and let `refine` look closer."
        )


def _check_values(
    argument: Argument, key: str, values: Sequence[Any], place: str, path: str
) -> None:
    """Refuse the first value that breaks the rule of its argument."""
    for value in values:
        problem = argument.problem(key, value)
        if problem is not None:
            refuse(place, path, value, problem)
