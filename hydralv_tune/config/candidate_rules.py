"""The rules of a candidate that no single key can tell: tables of names, and key against key.

The tables stand in modules that import torch, so they are imported where they are asked.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from hydralv_tune.config.candidate import Candidate
from hydralv_tune.config.decoding_rules import check_decoding_step, check_grid
from hydralv_tune.config.errors import ConfigError
from hydralv_tune.config.validation import known_step, refuse

CHANNELS = 3
TOTALS = {"total", "plan_total"}
"""Losses that are recorded beside those of the tasks."""
WATCHED = "train_loss_total_epoch"
"""What early stopping watches."""
ACTIVATIONS = ("sigmoid", "sigmoid", "tanh")
TARGETS: dict[str, dict[str, tuple[Any, ...]]] = {
    "binary": {},
    "instance_boundary": {
        "edge_mode": ("all", "seg-all", "seg-no-bg", "inner"),
        "mode": ("2d", "3d"),
    },
    "instance_edt": {"mode": ("2d", "3d"), "quantize": (False,)},
}
"""The targets in the order of the channels, and the values that each argument may have."""
MOST_NETWORKS = 64
"""That a trial may train for its split."""


def check_candidate(candidate: Candidate, place: str, known: KnownBlocks | None = None) -> None:
    """Check every rule that reaches over more than one key.

    Args:
        candidate: To check.
        place: Where it came from, for the message.
        known: Where given, a rule that these very blocks have passed is not checked again.

    Raises:
        ConfigError: The first rule that is broken.
    """
    for rule, blocks in RULES:
        key = (rule, *(id(getattr(candidate, name)) for name in blocks))
        if known is None or key not in known.passed:
            rule(candidate, place)
        if known is not None:
            known.passed.add(key)


@dataclass
class KnownBlocks:
    """Blocks that were found valid, so that of many candidates only what differs is checked."""

    blocks: dict[tuple[str, str], Any] = field(default_factory=dict)
    """A block's model by its name and what it says."""
    base: dict[str, Any] | None = None
    """The whole mapping under all of them, where it is one space that is checked."""
    passed: set[tuple[Any, ...]] = field(default_factory=set)
    """A rule and the identities of the blocks that have passed it, all of which are in `blocks`."""

    def filled(self, mapping: Mapping[str, Any]) -> dict[str, Any]:
        """Return the mapping with the models of the blocks that are known already."""
        return {
            name: self.blocks.get((name, repr(block)), block) for name, block in mapping.items()
        }

    def add(self, mapping: Mapping[str, Any], candidate: Candidate) -> None:
        """Take in the blocks of a candidate that is valid key by key."""
        for name, block in mapping.items():
            self.blocks.setdefault((name, repr(block)), getattr(candidate, name))


def check_test(candidate: Candidate, place: str) -> None:
    """Check the decoding steps and the grid of thresholds."""
    for index, step in enumerate(candidate.test.decoding):
        check_decoding_step(step, place, f"test.decoding[{index}].")
    if not any(step.enabled for step in candidate.test.decoding):
        refuse(place, "test.decoding[0].enabled", False, "one step must be enabled")
    if candidate.test.decoding_grid is not None:
        check_grid(candidate.test.decoding_grid, place, "test.decoding_grid.")


def check_network(candidate: Candidate, place: str) -> None:
    """Check the architecture, its keys, and that patch and window fit it."""
    from hydralv_tune.numerics.networks.registry import (
        ARCHITECTURES,
        divisor,
        ignored_keys,
        network_arguments,
        supervised_levels,
    )

    model = candidate.model
    name = model.architecture
    if name not in ARCHITECTURES:
        refuse(place, "model.architecture", name, "no architecture has that name",
               known_step(name, ARCHITECTURES))  # fmt: skip
    keys = network_arguments(model.model_dump(mode="json"))
    for sentence in ignored_keys(name, keys).values():
        raise ConfigError(f"{place}: model.{sentence}")
    window = candidate.inference.sliding_window.window_size or candidate.data.patch_size
    fault = _network_fault(name, json.dumps(keys, sort_keys=True), candidate.data.patch_size)
    if fault is not None:
        raise ConfigError(f"{place}: {fault}")
    needed = divisor(name, keys)
    if any(side % d for side, d in zip(window, needed, strict=True)):
        near = [max(1, round(side / d)) * d for side, d in zip(window, needed, strict=True)]
        refuse(place, "inference.sliding_window.window_size", window,
               f"{name} needs multiples of {list(needed)} (z, y, x)", f"Try {near}.")  # fmt: skip
    weights = model.deep_supervision_weights
    if weights is not None and (not weights or not weights[0]):
        refuse(place, "model.deep_supervision_weights", weights,
               "the first weighs the finest level and must be above 0")  # fmt: skip
    if weights is not None and not model.deep_supervision:
        refuse(place, "model.deep_supervision_weights", weights,
               "model.deep_supervision is false", "Set that to true, or drop these.")  # fmt: skip
    if weights is not None:
        heads = supervised_levels(name, keys)
        if len(weights) < heads:
            refuse(place, "model.deep_supervision_weights", weights,
                   f"{name} gives logits at {heads} levels",
                   f"Give {heads} weights, from fine to coarse.")  # fmt: skip


@lru_cache(maxsize=512)
def _network_fault(name: str, keys: str, patch_size: tuple[int, int, int]) -> str | None:
    """Return what the architecture says against its keys or the patch."""
    from hydralv_tune.numerics.networks.registry import (
        architecture,
        build_network,
        check_patch_size,
        checked_keys,
    )

    arguments = json.loads(keys)
    try:
        checked_keys(name, arguments)
        if architecture(name).checked_by_building:
            import torch

            # On `meta` a network has shapes and no memory.
            with torch.device("meta"):
                build_network(name, **arguments)
    except ValueError as error:
        text = str(error)
        return f"model: {text}" if text.startswith("Unknown") else f"model.{text}"
    try:
        check_patch_size(name, arguments, patch_size)
    except ValueError as error:
        return f"data.patch_size: {error}"
    return None


def check_losses(candidate: Candidate, place: str) -> None:
    """Check names, weights, arguments and tasks of the losses."""
    from hydralv_tune.numerics.losses.registry import LOSSES

    model = candidate.model
    count = len(model.loss_functions)
    for index, name in enumerate(model.loss_functions):
        if name not in LOSSES:
            refuse(place, f"model.loss_functions[{index}]", name, "no loss has that name",
                   known_step(name, LOSSES))  # fmt: skip
    if len(model.loss_weights) != count:
        refuse(place, "model.loss_weights", model.loss_weights,
               f"model.loss_functions has {count} losses", f"Give {count} weights.")  # fmt: skip
    if not any(model.loss_weights):
        refuse(place, "model.loss_weights", model.loss_weights, "one must be above 0")
    if model.loss_kwargs and len(model.loss_kwargs) != count:
        refuse(place, "model.loss_kwargs", model.loss_kwargs,
               f"model.loss_functions has {count} losses",
               f"Give {count} mappings, {{}} for the defaults.")  # fmt: skip
    for index, (name, kwargs) in enumerate(
        zip(model.loss_functions, model.loss_kwargs, strict=False)
    ):
        _check_loss(name, kwargs, place, f"model.loss_kwargs[{index}]")
    _check_tasks(model.multi_task_config, model.loss_functions, place)


def _check_loss(name: str, kwargs: dict[str, Any], place: str, path: str) -> None:
    """Check the arguments of one loss: their names, then the loss itself on a few voxels."""
    from hydralv_tune.numerics.losses.registry import loss_arguments

    known = loss_arguments(name)
    for key, value in kwargs.items():
        if key not in known:
            refuse(place, f"{path}.{key}", value, f"{name} has no such argument",
                   known_step(key, known))  # fmt: skip
    fault = _loss_fault(name, json.dumps(kwargs, sort_keys=True))
    if fault is not None:
        raise ConfigError(f"{place}: {path}: {fault}")


@lru_cache(maxsize=512)
def _loss_fault(name: str, kwargs: str) -> str | None:
    """Return what a loss says against its arguments, by running it on a few voxels."""
    from hydralv_tune.numerics.losses.registry import check_loss

    try:
        check_loss(name, json.loads(kwargs))
    except ValueError as error:
        return str(error)
    return None


def _check_tasks(tasks: list[list[Any]], functions: Sequence[str], place: str) -> None:
    """Check that every channel has one task and every loss at least one."""
    path, losses = "model.multi_task_config", len(functions)
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
                refuse(place, here, task, f"the losses are numbered 0 to {losses - 1}")
        if not chosen:
            refuse(place, here, task, "it needs a loss")
        channels += range(first, end)
        used |= set(chosen)
    names = [task[2] for task in tasks]
    if len(set(names)) != len(tasks):
        refuse(place, path, tasks, "each task needs a name of its own")
    terms = {f"{task[2]}_{functions[loss]}_{loss}" for task in tasks for loss in task[3]}
    taken = [name for name in names if name in terms | TOTALS]
    if taken:
        refuse(place, f"{path}[{names.index(taken[0])}]", tasks[names.index(taken[0])],
               f"{taken[0]} is recorded as a loss of its own",
               "Give the task another name.")  # fmt: skip
    if sorted(channels) != list(range(CHANNELS)):
        refuse(place, path, tasks, f"each of the {CHANNELS} channels needs exactly one task")
    unused = sorted(set(range(losses)) - used)
    if unused:
        refuse(place, path, tasks, f"no task uses loss {unused[0]} of model.loss_functions",
               "Name it in a task, or drop it.")  # fmt: skip


def check_optimization(candidate: Candidate, place: str) -> None:
    """Check rates against rates, warm-up against training, and the stopping rules."""
    optimization = candidate.optimization
    schedule, lr = optimization.scheduler, optimization.optimizer.lr
    if schedule.warmup_epochs and schedule.warmup_epochs >= optimization.max_epochs:
        refuse(place, "optimization.scheduler.warmup_epochs", schedule.warmup_epochs,
               f"optimization.max_epochs is {optimization.max_epochs}, so the warm-up would never "
               "end", f"Try {optimization.max_epochs // 10}.")  # fmt: skip
    if schedule.min_lr > lr:
        refuse(place, "optimization.scheduler.min_lr", schedule.min_lr,
               f"optimization.optimizer.lr is {lr}, and the lowest rate cannot be above it",
               f"Try {lr / 100:g}.")  # fmt: skip
    if 1.0 in optimization.optimizer.betas:
        refuse(place, "optimization.optimizer.betas", optimization.optimizer.betas,
               "both must be below 1", "Try [0.9, 0.999].")  # fmt: skip
    stop = candidate.monitor.early_stopping
    if stop.enabled and stop.monitor != WATCHED:
        refuse(place, "monitor.early_stopping.monitor", stop.monitor,
               "only the total training loss is watched; the pruner watches the score",
               f"Set it to {WATCHED}.")  # fmt: skip
    if None not in (stop.threshold, stop.divergence_threshold) and (
        (stop.threshold or 0) >= (stop.divergence_threshold or 0)
    ):
        refuse(
            place,
            "monitor.early_stopping.threshold",
            stop.threshold,
            f"divergence_threshold is {stop.divergence_threshold}, which is not above it",
        )


def check_data(candidate: Candidate, place: str) -> None:
    """Check clipping, targets, padding, voxel size and split."""
    data = candidate.data
    low, high = data.image_transform.clip_percentile_low, data.image_transform.clip_percentile_high
    if low >= high:
        refuse(place, "data.image_transform.clip_percentile_low", low,
               f"clip_percentile_high is {high}, and low must be below it")  # fmt: skip
    if data.image_transform.normalize == "clahe" and (low, high) != (0.0, 1.0):
        refuse(place, "data.image_transform.normalize", "clahe",
               "it stretches each section over its own range, so nothing is clipped before: leave "
               "clip_percentile_low at 0.0 and clip_percentile_high at 1.0")  # fmt: skip
    _check_targets(candidate, place)
    for key in ("train_resolution", "val_resolution"):
        size = getattr(data, key)
        if size is not None and (len(size) != 3 or not all(0 < side < math.inf for side in size)):
            refuse(place, f"data.{key}", size, "it is three lengths in nm above 0 (z, y, x)",
                   "Try [30, 8, 8].")  # fmt: skip
    if data.split.volumes and data.split.kind != "volumes":
        refuse(place, "data.split.volumes", data.split.volumes,
               f"data.split.kind is {data.split.kind}", "Set it to volumes.")  # fmt: skip
    if data.split.kind == "blocks" and data.split.networks < 2:
        refuse(place, "data.split.blocks", list(data.split.blocks),
               "one block is held out at a time, so there must be two at least",
               "Try [1, 2, 2].")  # fmt: skip
    if data.split.networks > MOST_NETWORKS:
        key, step = ("blocks", "[1, 2, 2]") if data.split.kind == "blocks" else ("folds", "5")
        refuse(place, f"data.split.{key}", getattr(data.split, key),
               f"each of the {data.split.networks:,} {key} trains a network, and a trial trains at "
               f"most {MOST_NETWORKS}", f"Try {step}.")  # fmt: skip
    if len(set(data.split.volumes)) != len(data.split.volumes):
        refuse(place, "data.split.volumes", data.split.volumes, "a name stands twice")


def _check_targets(candidate: Candidate, place: str) -> None:
    """Check that the targets are the three, in the order of the channels."""
    path = "data.label_transform.targets"
    targets = candidate.data.label_transform.targets
    if [target.name for target in targets] != list(TARGETS):
        refuse(place, path, [target.name for target in targets],
               f"the channels are {', '.join(TARGETS)}, in this order")  # fmt: skip
    for index, target in enumerate(targets):
        for key, value in target.kwargs.items():
            here = f"{path}[{index}].kwargs.{key}"
            if key == "thickness" and target.name == "instance_boundary":
                if type(value) is not int or value < 1:
                    refuse(place, here, value, "it is a whole number of voxels from 1 on")
            elif key not in TARGETS[target.name]:
                known = list(TARGETS[target.name]) + ["thickness"] * (index == 1)
                refuse(place, here, value, f"{target.name} has no such argument",
                       known_step(key, known) if known else "It has none.")  # fmt: skip
            elif value not in TARGETS[target.name][key]:
                rule = ", ".join(str(allowed).lower() for allowed in TARGETS[target.name][key])
                refuse(place, here, value, f"it must be one of {rule}")


def check_augmentations(candidate: Candidate, place: str) -> None:
    """Check the names of the augmentations and their knobs."""
    from hydralv_tune.numerics.augmentation.registry import AUGMENTATIONS, check_augmentation

    for name, knobs in candidate.data.augmentation.settings.items():
        here = f"data.augmentation.{name}"
        if name not in AUGMENTATIONS:
            refuse(place, here, knobs, "no augmentation has that name",
                   known_step(name, AUGMENTATIONS))  # fmt: skip
        if not isinstance(knobs, dict):
            refuse(place, here, knobs, "it must be a mapping of knobs", "Try {enabled: true}.")
        known = ["enabled", *AUGMENTATIONS[name].defaults]
        for knob, value in knobs.items():
            if knob not in known:
                refuse(place, f"{here}.{knob}", value, f"{name} has no such knob",
                       known_step(knob, known))  # fmt: skip
        try:
            check_augmentation(name, knobs)
        except ValueError as error:
            raise ConfigError(f"{place}: data.augmentation.{error}") from error


def check_inference(candidate: Candidate, place: str) -> None:
    """Check axes and activations of the prediction."""
    path = "inference.test_time_augmentation"
    tta = candidate.inference.test_time_augmentation
    flips = [] if tta.flip_axes in (None, "all") else list(tta.flip_axes or [])
    for entry in flips:
        axes = entry if isinstance(entry, list) else [entry]
        if not all(type(axis) is int and 0 <= axis <= 2 for axis in axes):
            refuse(place, f"{path}.flip_axes", tta.flip_axes, "axes are 0 (z), 1 (y), 2 (x)",
                   "Try all.")  # fmt: skip
    planes = [] if tta.rotation90_axes in (None, "all") else list(tta.rotation90_axes or [])
    for plane in planes:
        if len(plane) != 2 or len(set(plane) & {0, 1, 2}) != 2:
            refuse(place, f"{path}.rotation90_axes", tta.rotation90_axes,
                   "a plane is two of 0 (z), 1 (y), 2 (x)", "Try [[1, 2]].")  # fmt: skip
    if not set(tta.rotate90_k or []) <= {0, 1, 2, 3}:
        refuse(place, f"{path}.rotate90_k", tta.rotate90_k, "quarter turns are 0 to 3")
    if tta.enabled:
        _check_turned_window(candidate, place, f"{path}.rotation90_axes")
    _check_activations(tta.channel_activations, place, f"{path}.channel_activations")


def _check_turned_window(candidate: Candidate, place: str, path: str) -> None:
    """Check that the architecture can take the window as quarter turns give it."""
    from hydralv_tune.numerics.networks.registry import divisor, network_arguments
    from hydralv_tune.numerics.test_time_augmentation import distinct_transforms, unfit_turn

    tta, model = candidate.inference.test_time_augmentation, candidate.model
    window = candidate.inference.sliding_window.window_size or candidate.data.patch_size
    needed = divisor(model.architecture, network_arguments(model.model_dump(mode="json")))
    transforms = distinct_transforms(tta.flip_axes, tta.rotation90_axes, tta.rotate90_k)
    turned = unfit_turn(transforms, window, needed)
    if turned is not None:
        refuse(place, path, tta.rotation90_axes,
               f"it turns the window {list(window)} into {list(turned)} (z, y, x), and "
               f"{model.architecture} needs multiples of {list(needed)}",
               "Try [[1, 2]], or null.")  # fmt: skip


def _check_activations(entries: list[list[Any]], place: str, path: str) -> None:
    """Check that the channels end up as probabilities: two by sigmoid, the distance by tanh."""
    found: dict[int, str] = {}
    for entry in entries:
        if len(entry) != 3 or not all(type(bound) is int for bound in entry[:2]):
            refuse(place, path, entries, "an entry is [first channel, end, activation]",
                   "Try [0, 1, sigmoid].")  # fmt: skip
        first, end, name = entry
        for channel in range(first, end):
            if channel in found:
                refuse(place, path, entries, f"channel {channel} stands twice")
            found[channel] = name
    wanted = dict(enumerate(ACTIVATIONS))
    if found != wanted:
        refuse(place, path, entries,
               "binary and boundary are probabilities (sigmoid) and the distance is in [-1, 1] "
               "(tanh)", "Try [[0, 2, sigmoid], [2, 3, tanh]].")  # fmt: skip


Rule = Callable[[Candidate, str], None]
RULES: tuple[tuple[Rule, tuple[str, ...]], ...] = (
    (check_network, ("model", "data", "inference")),
    (check_losses, ("model",)),
    (check_optimization, ("optimization", "monitor")),
    (check_data, ("data",)),
    (check_augmentations, ("data",)),
    (check_inference, ("inference", "model", "data")),
    (check_test, ("test",)),
)
"""Each rule, and the blocks of a candidate that it reads."""
