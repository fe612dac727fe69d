"""The rules of a candidate that no single key can tell: tables of names, and key against key."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, NoReturn

from hydralv_tune.errors import ConfigError
from hydralv_tune.validation import shown

if TYPE_CHECKING:
    from hydralv_tune.candidate import Candidate, DecodingGrid, DecodingStep

CHANNELS = 3
RANGES = {"binary_threshold": (0.0, 1.0), "contour_threshold": (0.0, None),
          "distance_threshold": (-1.0, 1.0)}  # fmt: skip
TARGETS = {
    "binary": {},
    "instance_boundary": {"thickness": 1, "edge_mode": "all", "mode": "2d"},
    "instance_edt": {"mode": "3d", "quantize": False},
}


def refuse(place: str, path: str, value: Any, rule: str, step: str = "") -> NoReturn:
    """Raise the error of a value that breaks a rule.

    Raises:
        ConfigError: Always.
    """
    raise ConfigError(f"{place}: {path} is {shown(value)}, but {rule}.{' ' + step if step else ''}")


def known_step(value: object, known: Sequence[str]) -> str:
    """Return the next step for a name outside a table."""
    near = get_close_matches(str(value), known, n=1)
    hint = f"Did you mean '{near[0]}'? " if near else ""
    return f"{hint}Known: {', '.join(sorted(known))}."


def check_candidate(candidate: Candidate, place: str) -> None:
    """Check every rule that reaches over more than one key.

    Raises:
        ConfigError: The first rule that is broken.
    """
    check_losses(candidate, place)
    check_optimization(candidate, place)
    check_data(candidate, place)
    for index, step in enumerate(candidate.test.decoding):
        check_decoding_step(step, place, f"test.decoding[{index}].")
    if candidate.test.decoding_grid is not None:
        check_grid(candidate.test.decoding_grid, place, "test.decoding_grid.")


def check_losses(candidate: Candidate, place: str) -> None:
    """Check that weights, arguments and tasks fit the losses."""
    model = candidate.model
    count = len(model.loss_functions)
    if len(model.loss_weights) != count:
        refuse(place, "model.loss_weights", model.loss_weights,
               f"model.loss_functions has {count} losses", f"Give {count} weights.")  # fmt: skip
    if not any(model.loss_weights):
        refuse(place, "model.loss_weights", model.loss_weights, "one must be above 0")
    if model.loss_kwargs and len(model.loss_kwargs) != count:
        refuse(place, "model.loss_kwargs", model.loss_kwargs,
               f"model.loss_functions has {count} losses",
               f"Give {count} mappings, {{}} for the defaults.")  # fmt: skip
    _check_tasks(model.multi_task_config, count, place)


def _check_tasks(tasks: list[list[Any]], losses: int, place: str) -> None:
    """Check that every channel and every loss has its task."""
    path = "model.multi_task_config"
    channels: list[int] = []
    used: set[int] = set()
    for index, task in enumerate(tasks):
        here = f"{path}[{index}]"
        shape = len(task) == 4 and isinstance(task[2], str) and isinstance(task[3], list)
        if not shape or not all(type(entry) is int for entry in [*task[:2], *task[3]]):
            refuse(place, here, task, "it is [first channel, end, task, [losses]]",
                   'Try [0, 1, "label", [0, 1]].')  # fmt: skip
        first, end, _, chosen = task
        if not 0 <= first < end <= CHANNELS:
            refuse(place, here, task, f"its channels must lie in 0 to {CHANNELS}")
        for loss in chosen:
            if not 0 <= loss < losses:
                refuse(place, here, task, f"the losses are 0 to {losses - 1}")
        if not chosen:
            refuse(place, here, task, "it needs a loss")
        channels += range(first, end)
        used |= set(chosen)
    if sorted(channels) != list(range(CHANNELS)):
        refuse(place, path, tasks, f"each of the {CHANNELS} channels needs exactly one task")
    if used != set(range(losses)):
        unused = sorted(set(range(losses)) - used)
        refuse(place, path, tasks, f"no task uses loss {unused[0]} of model.loss_functions",
               "Name it in a task, or drop it.")  # fmt: skip


def check_optimization(candidate: Candidate, place: str) -> None:
    """Check rates against rates and warm-up against training."""
    optimization = candidate.optimization
    schedule, lr = optimization.scheduler, optimization.optimizer.lr
    if schedule.warmup_epochs >= optimization.max_epochs and schedule.warmup_epochs:
        refuse(place, "optimization.scheduler.warmup_epochs", schedule.warmup_epochs,
               f"optimization.max_epochs is {optimization.max_epochs}, so the warm-up would never "
               "end", f"Try {optimization.max_epochs // 10}.")  # fmt: skip
    if schedule.min_lr > lr:
        refuse(place, "optimization.scheduler.min_lr", schedule.min_lr,
               f"optimization.optimizer.lr is {lr}, and the lowest rate cannot be above it",
               f"Try {lr / 100:g}.")  # fmt: skip


def check_data(candidate: Candidate, place: str) -> None:
    """Check clipping, targets and split."""
    data = candidate.data
    low, high = data.image_transform.clip_percentile_low, data.image_transform.clip_percentile_high
    if low >= high:
        refuse(place, "data.image_transform.clip_percentile_low", low,
               f"clip_percentile_high is {high}, and low must be below it")  # fmt: skip


def check_decoding_step(step: DecodingStep, place: str, path: str) -> None:
    """Check the decoder's name and the arguments of one step.

    Raises:
        ConfigError: The decoder or an argument is unknown, or a value breaks its rule.
    """
    from hydralv_tune.decoding import DECODERS, decoder_arguments

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
    from hydralv_tune.candidate import DecodingStep
    from hydralv_tune.decoding import decoder_arguments

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
