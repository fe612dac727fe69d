"""The rules of decoding steps and of the grids that are swept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hydralv_tune.config.candidate import DecodingGrid, DecodingStep
from hydralv_tune.config.validation import known_step, refuse

RANGES = {
    "binary_threshold": (0.0, 1.0),
    "contour_threshold": (0.0, None),
    "distance_threshold": (-1.0, 1.0),
}
"""Of each map; a contour threshold above 1 switches that test off, as null does."""


def check_decoding_step(step: DecodingStep, place: str, path: str) -> None:
    """Check the decoder's name and the arguments of one step.

    Raises:
        ConfigError: The decoder or an argument is unknown, or a value breaks its rule.
    """
    from hydralv_tune.numerics.watershed.decoders import DECODERS, decoder_arguments

    if step.name not in DECODERS:
        refuse(place, f"{path}name", step.name, "no decoder has that name",
               known_step(step.name, sorted(DECODERS)))  # fmt: skip
    known = decoder_arguments(step.name)
    for key, value in step.decoder_arguments().items():
        here = f"{path}kwargs.{key}" if path else key
        if key not in known:
            refuse(place, here, value, f"{step.name} has no such argument",
                   known_step(key, sorted(known)))  # fmt: skip
        if key in RANGES:
            if not isinstance(value, list | tuple) or len(value) != 2:
                refuse(place, here, value, "it is a pair: [seed, foreground]")
            for entry in value:
                check_threshold(key, entry, place, here)
        else:
            check_argument(key, value, place, here)


def check_threshold(key: str, value: Any, place: str, path: str) -> None:
    """Check one threshold against the range of its map; only a contour may be off.

    Raises:
        ConfigError: It is no number in that range.
    """
    name = key.partition(".")[0]
    low, high = RANGES[name]
    if value is None and name == "contour_threshold":
        return
    if not isinstance(value, int | float) or isinstance(value, bool) or value != value:
        refuse(place, path, value, "a threshold is a number")
    if value < low or (high is not None and value > high):
        bounds = f"in [{low:g}, {high:g}]" if high is not None else f"at least {low:g}"
        refuse(place, path, value, f"a {name.replace('_', ' ')} must be {bounds}")


def check_argument(key: str, value: Any, place: str, path: str) -> None:
    """Check a decoder's argument that is no threshold.

    Raises:
        ConfigError: It breaks its rule.
    """
    if key == "flood":
        if value not in ("support", "volume"):
            refuse(place, path, value, "it is support or volume")
    elif key == "floor":
        check_threshold("binary_threshold", value, place, path)
    elif type(value) is not int or value < 0:
        refuse(place, path, value, "it is a whole number of voxels from 0 on")


def check_grid(grid: DecodingGrid, place: str, path: str) -> None:
    """Check the axes and the fixed arguments of a decoding grid.

    Raises:
        ConfigError: An axis is unknown or empty, or a value breaks its rule.
    """
    from hydralv_tune.numerics.watershed.decoders import decoder_arguments

    check_decoding_step(
        DecodingStep(name=grid.decoder, kwargs=dict(grid.fixed)), place, f"{path}fixed: "
    )
    known = decoder_arguments(grid.decoder)
    axes = [f"{key}.{part}" for key in known if key in RANGES for part in ("seed", "foreground")]
    axes += [key for key in known if key.startswith("min_")]
    for key, values in grid.grid.items():
        parts: Mapping[str, Any] = (
            {f"{key}.{part}": entry for part, entry in values.items()}
            if isinstance(values, Mapping)
            else {key: values}
        )
        for axis, entries in parts.items():
            here = f"{path}grid.{axis}"
            if axis not in axes:
                refuse(place, here, entries, f"{grid.decoder} has no such axis",
                       known_step(axis, axes))  # fmt: skip
            if not isinstance(entries, list | tuple) or not len(entries):
                refuse(place, here, entries, "an axis is a list of at least one value")
            for entry in entries:
                if "." in axis:
                    check_threshold(axis, entry, place, here)
                else:
                    check_argument(axis, entry, place, here)
