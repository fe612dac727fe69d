"""Augmentations by name: their settings with defaults and rules, and the presets.

The checks here need no PyTorch. The order of the table is the order of work: what moves voxels
first, then what the microscope does to the image. To add one, write a function and call
`register_augmentation`.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hydralv_tune.numerics.augmentation.patches import Patches

Knobs = Mapping[str, Any]

PRESETS = ("none", "some", "all")


@dataclass(frozen=True)
class Augmentation:
    """One entry of the table.

    Args:
        defaults: Every knob with its default, `prob` among them.
        function: Function of (batch, knobs, CPU generator) that returns the changed batch, or its
            `module:name`; None for a warp.
        warp: Function of (coordinates, row, knobs, CPU generator) that changes where one sample
            is read, or its `module:name`; all warps of a sample share one resampling.
    """

    defaults: Mapping[str, Any]
    function: Callable[..., Patches] | str | None = None
    warp: Callable[..., None] | str | None = None

    def resolved(self) -> Callable[..., Any]:
        """Return the function, or the warp."""
        chosen = self.warp if self.function is None else self.function
        assert chosen is not None, "checked where it is registered"
        return pkgutil.resolve_name(chosen) if isinstance(chosen, str) else chosen


AUGMENTATIONS: dict[str, Augmentation] = {}


def register_augmentation(name: str, entry: Augmentation) -> None:
    """Add an augmentation to the end of the table, or replace the one of that name.

    Args:
        name: What `data.augmentation` calls it.
        entry: Its knobs and its function.

    Raises:
        ValueError: It has neither a function nor a warp, or both, or no knob `prob`.
    """
    if (entry.function is None) == (entry.warp is None):
        raise ValueError(f"Augmentation '{name}' must have either a function or a warp.")
    if "prob" not in entry.defaults or "enabled" in entry.defaults or name == "preset":
        raise ValueError(
            f"Augmentation '{name}' must have the knob prob, must leave enabled to the presets, "
            "and must not be called preset."
        )
    AUGMENTATIONS[name] = entry


_PACKAGE = "hydralv_tune.numerics.augmentation"
_WARPS, _INTENSITY = f"{_PACKAGE}.warps", f"{_PACKAGE}.intensity"
AUGMENTATIONS.update(
    {
        "copy_paste": Augmentation(
            {"prob": 0.3, "max_obj_ratio": 0.05, "border": 1},
            function=f"{_PACKAGE}.copy_paste:copy_paste",
        ),
        "flip": Augmentation({"prob": 0.5, "spatial_axis": (0, 1, 2)}, function=f"{_WARPS}:flip"),
        "rotate": Augmentation({"prob": 0.5, "spatial_axes": (1, 2)}, function=f"{_WARPS}:rotate"),
        "misalignment": Augmentation(
            {"prob": 0.3, "displacement": 8, "rotate_ratio": 0.3}, warp=f"{_WARPS}:misalign"
        ),
        "elastic": Augmentation(
            {"prob": 0.3, "sigma_range": (3.0, 6.0), "magnitude_range": (10.0, 20.0)},
            warp=f"{_WARPS}:deform",
        ),
        "affine": Augmentation(
            {
                "prob": 0.5,
                "rotate_range": (0.1, 0.1, 0.1),
                "scale_range": (0.1, 0.1, 0.1),
                "shear_range": (0.05, 0.05, 0.05),
            },
            warp=f"{_WARPS}:affine",
        ),
        "intensity": Augmentation(
            {
                "prob": 1.0,
                "gaussian_noise_prob": 0.5,
                "gaussian_noise_std": 0.03,
                "shift_intensity_prob": 0.5,
                "shift_intensity_offset": 0.1,
                "contrast_prob": 0.5,
                "contrast_range": (0.8, 1.2),
            },
            function=f"{_INTENSITY}:intensity",
        ),
        "cut_blur": Augmentation(
            {
                "prob": 0.2,
                "length_ratio": (0.1, 0.4),
                "down_ratio_range": (2.0, 8.0),
                "downsample_z": False,
            },
            function=f"{_INTENSITY}:cut_blur",
        ),
        "motion_blur": Augmentation(
            {"prob": 0.3, "sections": (1, 3), "kernel_size": 9},
            function=f"{_INTENSITY}:motion_blur",
        ),
        "cut_noise": Augmentation(
            {"prob": 0.3, "length_ratio": (0.1, 0.4), "noise_scale": (0.05, 0.15)},
            function=f"{_INTENSITY}:cut_noise",
        ),
        "missing_section": Augmentation(
            {
                "prob": 0.3,
                "num_sections": 2,
                "full_section_prob": 0.5,
                "partial_ratio_range": (0.25, 0.75),
                "fill_value_range": (0.0, 1.0),
            },
            function=f"{_INTENSITY}:missing_section",
        ),
        "cutout": Augmentation(
            {"prob": 0.3, "num_holes": (1, 3), "hole_size": (4, 16, 16)},
            function=f"{_INTENSITY}:cutout",
        ),
    }
)


def resolve_preset(
    preset: str, settings: Mapping[str, Mapping[str, Any]] | None = None
) -> dict[str, dict[str, Any]]:
    """Return the augmentations that a preset runs, with all knobs, in the order of work.

    Args:
        preset: `none`: nothing. `some`: those whose `enabled` is true. `all`: each one whose
            `enabled` is not false.
        settings: Knobs by augmentation; what is not given has its default.

    Returns:
        Knobs by augmentation; one whose probability is 0 is left out.

    Raises:
        ValueError: An unknown preset, augmentation or knob, or a value out of range.
    """
    if preset not in PRESETS:
        raise ValueError(f"Unknown augmentation preset '{preset}'. Known: {', '.join(PRESETS)}.")
    given = dict(settings or {})
    for name, knobs in given.items():
        check_augmentation(name, knobs)
    chosen: dict[str, dict[str, Any]] = {}
    for name, augmentation in AUGMENTATIONS.items():
        own = dict(given.get(name, {}))
        enabled = own.pop("enabled", None)
        wanted = enabled is True if preset == "some" else preset == "all" and enabled is not False
        knobs = {**augmentation.defaults, **own}
        if wanted and not _never(knobs):
            chosen[name] = knobs
    return chosen


def check_augmentation(name: str, knobs: Mapping[str, Any]) -> None:
    """Refuse an augmentation or knobs that would fail in training.

    Args:
        name: A name of `AUGMENTATIONS`.
        knobs: Some of its knobs, and `enabled`.

    Raises:
        ValueError: An unknown name or knob, or a value out of range.
    """
    if name not in AUGMENTATIONS:
        raise ValueError(
            f"Unknown augmentation '{name}'. Known: {', '.join(sorted(AUGMENTATIONS))}."
        )
    defaults = AUGMENTATIONS[name].defaults
    for knob, value in knobs.items():
        if knob == "enabled":
            if value is not None and not isinstance(value, bool):
                raise ValueError(f"{name}.enabled is {value!r}, but must be true or false.")
            continue
        if knob not in defaults:
            raise ValueError(f"{name} has no knob '{knob}'. Known: enabled, {', '.join(defaults)}.")
        problem = _problem(knob, value, defaults[knob])
        if problem:
            raise ValueError(f"{name}.{knob} is {value!r}, but must be {problem}.")


def _never(knobs: Knobs) -> bool:
    """Return whether the knobs let nothing happen."""
    if knobs["prob"] == 0:
        return True
    parts = [v for k, v in knobs.items() if k in INTENSITY_PROBABILITIES]
    return bool(parts) and not any(parts)


INTENSITY_PROBABILITIES = ("gaussian_noise_prob", "shift_intensity_prob", "contrast_prob")


def _problem(knob: str, value: Any, default: Any) -> str | None:
    """Return what a knob's value must be, or None where it is."""
    if isinstance(default, bool):
        return None if isinstance(value, bool) else "true or false"
    numbers = list(value) if isinstance(value, list | tuple) else [value]
    if not numbers or any(isinstance(n, bool) or not isinstance(n, int | float) for n in numbers):
        return "a number or a list of numbers"
    several = isinstance(value, list | tuple)
    if knob == "prob" or knob.endswith("_prob") or knob == "rotate_ratio":
        return None if not several and 0 <= numbers[0] <= 1 else "a number from 0 to 1"
    if knob == "spatial_axis":
        fits = len(set(numbers)) == len(numbers) and set(numbers) <= {0, 1, 2}
        fits &= all(isinstance(n, int) for n in numbers)
        return None if fits else "one or more of 0 (z), 1 (y), 2 (x)"
    if knob == "spatial_axes":
        fits = len(set(numbers)) == len(numbers) == 2 and set(numbers) <= {0, 1, 2}
        return None if fits else "two of 0 (z), 1 (y), 2 (x)"
    if any(not 0 <= n < float("inf") for n in numbers):
        return "not negative and finite"
    if several and isinstance(default, int | float) and knob != "num_sections":
        return "a single number"
    return _shape_problem(knob, value, numbers)


def _shape_problem(knob: str, value: Any, numbers: Sequence[float]) -> str | None:
    """Return what a knob of several numbers must be, or None where it is."""
    if knob in ("rotate_range", "scale_range", "shear_range"):
        return None if len(numbers) == 3 else "three numbers (z, y, x)"
    if knob == "hole_size":
        return None if len(numbers) in (1, 3) and min(numbers) >= 1 else "one or three sizes from 1"
    if knob == "kernel_size":
        odd = isinstance(value, int) and value >= 3 and value % 2 == 1
        return None if odd else "an odd number from 3"
    if isinstance(value, list | tuple) and (len(numbers) != 2 or numbers[0] > numbers[1]):
        return "a number, or the lowest and the highest"
    if knob in ("sections", "num_sections", "num_holes", "border") and any(n % 1 for n in numbers):
        return "whole numbers"
    if knob == "contrast_range" and min(numbers) <= 0:
        return "above 0"
    if knob == "down_ratio_range" and min(numbers) < 1:
        return "1 or more"
    return None
