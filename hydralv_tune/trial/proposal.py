"""Space, patch, batch, split and budget that fit a volume and the machine: what to start with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil
import torch

from hydralv_tune.config.candidate import Candidate, Data, Split
from hydralv_tune.config.errors import ConfigError, InputError, VolumeError
from hydralv_tune.config.paths import find_file
from hydralv_tune.config.search_space_files import PROPOSED, load_space
from hydralv_tune.config.validation import merged
from hydralv_tune.config.yaml_io import dump_yaml, read_yaml_mapping
from hydralv_tune.data.volumes import Volume
from hydralv_tune.numerics.cores import usable_cores
from hydralv_tune.numerics.networks.registry import divisor, network_arguments
from hydralv_tune.trial.fitted_normalisation import with_normalisation
from hydralv_tune.trial.planning import instance_reach, training_memory_gb
from hydralv_tune.trial.scoring.prediction import network_of
from hydralv_tune.trial.splits import AXES, split_volumes
from hydralv_tune.trial.training.sampling import check_patch_fits

Array = npt.NDArray[Any]
Size3 = tuple[int, int, int]

AROUND = 2.0
"""A patch is so many times as large as a large instance, so that most see one whole."""
LARGE_PERCENTILE = 90
MEMORY_SHARE = 0.8
BATCHES = (1, 2, 4, 8)
HELD_OUT = 0.25
ENOUGH_TO_HOLD_OUT = 20
"""Instances from which on a quarter of the volume holds a few of them."""


@dataclass(frozen=True)
class Machine:
    """What a trial has to itself.

    Args:
        gpu_gb: Memory of the GPU; None without one.
        cores: CPU cores.
        memory_gb: Free memory of the machine.
    """

    gpu_gb: float | None
    cores: int
    memory_gb: float

    @classmethod
    def here(cls) -> Machine:
        """Return this machine."""
        gpu = None
        if torch.cuda.is_available():
            gpu = torch.cuda.get_device_properties(0).total_memory / 1e9
        return cls(gpu, usable_cores(), psutil.virtual_memory().available / 1e9)


@dataclass(frozen=True)
class Proposal:
    """What to start with, and why.

    Args:
        base: Name of the shipped space that it changes.
        mapping: The changed space, as a file holds it.
        reasons: A sentence for each choice.
    """

    base: str
    mapping: dict[str, Any]
    reasons: tuple[str, ...]

    def text(self) -> str:
        """Return the space as a YAML file that says why."""
        reasons = "".join(f"# {line}\n" for line in self.reasons)
        return f"{PROPOSED} {self.base}.\n{reasons}" + dump_yaml(self.mapping)

    def facts(self) -> dict[str, Any]:
        """Return the choices as plain JSON types."""
        fixed = self.mapping["fixed"]
        return {
            "space": self.base,
            "patch_size": fixed["data"]["patch_size"],
            "batch_size": fixed["system"]["training"]["batch_size"],
            "split": fixed["data"]["split"],
            "budget": self.mapping["budget"],
            "reasons": list(self.reasons),
        }


def propose(volume: Volume, machine: Machine) -> Proposal:
    """Return what to start with on a volume.

    Args:
        volume: With labels.
        machine: What a trial has.

    Raises:
        InputError: There is no instance to go by.
    """
    extents = _extents(volume)
    name = "hydra_lv" if machine.gpu_gb is not None else "hydra_lv_small"
    space = load_space(name)
    candidates = [
        space.candidate({}, space.warm_start(start).overrides) for start in space.warm_starts
    ]
    first, step = candidates[0], _multiples(candidates)
    patch, split, why = _patch_and_split(volume, first.data, extents, step)
    where = f"a GPU of {machine.gpu_gb:.0f} GB" if machine.gpu_gb else f"{machine.cores} CPU cores"
    batch, needed = _batch(candidates, patch, machine)
    # A trial trains on as many voxels as with the shipped patch and batch.
    shipped, before = math.prod(first.data.patch_size), first.system.training.batch_size
    epochs = round(first.optimization.max_epochs * shipped / math.prod(patch))
    fixed: dict[str, Any] = {
        "data": {"patch_size": list(patch), "split": split},
        "system": {"training": {"batch_size": batch}},
        "inference": {"sliding_window": {"window_size": list(patch)}},
        "optimization": {"max_epochs": max(epochs, 1)},
    }
    pads = _pads(patch, volume.image.shape)
    if any(pads):
        fixed["data"]["pad_size"] = pads
    base = read_yaml_mapping(find_file(name, "search_spaces"))
    mapping = merged(base, {"fixed": fixed})
    reasons = [
        f"{name}: there is {where}.",
        f"Patch {list(patch)}: {LARGE_PERCENTILE} % of the instances are within "
        f"{[round(side) for side in extents[1]]} voxels (z, y, x); {AROUND:g} times that, as far "
        f"as {shipped:,} voxels and what is left to train on of {list(volume.image.shape)} allow, "
        f"in multiples of {list(step)}.",
        f"Batch {batch} (shipped {before}): the largest of the first networks then takes "
        f"{needed:.1f} GB to train.",
        why,
        f"{epochs} epochs, so that a trial sees as many voxels as with the shipped patch.",
    ]
    return Proposal(name, mapping, tuple(reasons))


def _extents(volume: Volume) -> tuple[int, npt.NDArray[np.float64]]:
    """Return how many instances there are, and how large (z, y, x) the larger ones are."""
    assert volume.label is not None, "checked by the command"
    label = volume.label if volume.mask is None else np.where(volume.mask, volume.label, 0)
    reach = instance_reach(label)
    if not len(reach):
        raise InputError(
            f"Volume '{volume.name}': there is no labelled instance inside the mask, so nothing "
            "says how large a patch must be. Check --label and --mask."
        )
    return len(reach), np.percentile(reach, LARGE_PERCENTILE, axis=0)


def _multiples(candidates: Sequence[Candidate]) -> Size3:
    """Return what a patch must be a multiple of for the networks of the first trials.

    Networks that are searched beside them may have one level more, so y and x are multiples of 16.
    """
    needed = [
        divisor(one.model.architecture, network_arguments(one.model.model_dump()))
        for one in candidates
    ]
    z, y, x = (math.lcm(*sides) for sides in zip(*needed, strict=True))
    return z, math.lcm(y, 16), math.lcm(x, 16)


def _patch(shape: Sequence[int], extents: tuple[int, Array], step: Size3, *, most: int) -> Size3:
    """Return the patch: as large as is wanted, the volume has, and the voxels allow."""
    largest = [max(side // s, 1) * s for side, s in zip(shape, step, strict=True)]
    wanted = [
        min(max(math.ceil(AROUND * side / s), 1) * s, end)
        for side, s, end in zip(extents[1], step, largest, strict=True)
    ]
    # In each turn the axis that is the largest against what is wanted, or is still small, moves.
    while math.prod(wanted) > most:
        ratios = [
            wanted[axis] / float(extents[1][axis]) if wanted[axis] > step[axis] else 0.0
            for axis in range(3)
        ]
        axis = int(np.argmax(ratios))
        if ratios[axis] == 0.0:
            break
        wanted[axis] -= step[axis]
    while True:
        grown = [
            axis
            for axis in range(3)
            if wanted[axis] + step[axis] <= largest[axis]
            and math.prod(wanted) // wanted[axis] * (wanted[axis] + step[axis]) <= most
        ]
        if not grown:
            break
        axis = min(grown, key=lambda one: wanted[one] / float(extents[1][one]))
        wanted[axis] += step[axis]
    return wanted[0], wanted[1], wanted[2]


def _batch(candidates: Sequence[Candidate], patch: Size3, machine: Machine) -> tuple[int, float]:
    """Return the largest batch that fits, up to the shipped one, and what the worst network takes.

    On a CPU as many trials as cores share the memory.
    """
    room = MEMORY_SHARE * (
        machine.memory_gb / max(machine.cores, 1) if machine.gpu_gb is None else machine.gpu_gb
    )
    shipped = candidates[0].system.training.batch_size
    chosen: tuple[int, float] | None = None
    for batch in (size for size in BATCHES if size <= max(shipped, 1)):
        needed = max(_memory(one, patch, batch) for one in candidates)
        if chosen is None or needed <= room:
            chosen = batch, needed
    assert chosen is not None, "there is a batch of 1"
    return chosen


def _memory(candidate: Candidate, patch: Size3, batch: int) -> float:
    """Return the GB that a training of a candidate takes with another patch and batch."""
    data = candidate.data.model_copy(update={"patch_size": patch})
    training = candidate.system.training.model_copy(update={"batch_size": batch})
    system = candidate.system.model_copy(update={"training": training})
    changed = candidate.model_copy(update={"data": data, "system": system})
    return training_memory_gb(changed, network_of(changed))


def _pads(patch: Size3, shape: Sequence[int]) -> list[int]:
    """Return the voxels to add on both sides of each axis that is shorter than the patch."""
    return [max(math.ceil((side - whole) / 2), 0) for side, whole in zip(patch, shape, strict=True)]


def _patch_and_split(
    volume: Volume, data: Data, extents: tuple[int, Array], step: Size3
) -> tuple[Size3, dict[str, Any], str]:
    """Return the patch, what is held out, and why: the first cut that training accepts."""
    volume = with_normalisation(volume, data)
    count, reach = extents
    against = f"{count} instances are too few to part"
    cuts = _cuts(volume.image.shape, reach) if count >= ENOUGH_TO_HOLD_OUT else []
    for number, split in enumerate(cuts):
        patch = _patch_beside(volume, data, split, extents, step)
        axis, whole = AXES[split.axis], math.ceil(float(reach[split.axis]))
        if isinstance(patch, str):
            if number == 0:
                against = f"at the {split.side} end of {axis}, the longest axis, {patch}"
            continue
        if split.margin == whole:
            margin = f"one large instance ({whole} voxels)"
        else:
            margin = f"{split.margin} voxels, less than a large instance ({whole})"
        where = "the longest axis" if number == 0 else f"at its {split.side} end"
        why = f"A quarter along {axis}, {where}, is held out, with a margin of {margin}"
        why += "." if number == 0 else f": {against}."
        return patch, split.model_dump(exclude_unset=True), why
    why = f"Nothing is held out: {against}{', and no other cut is better' if cuts else ''}. "
    why += "The figures are then optimistic, and the report says so."
    patch = _patch(volume.image.shape, extents, step, most=math.prod(data.patch_size))
    return patch, {"kind": "none"}, why


def _cuts(shape: Sequence[int], reach: Array) -> list[Split]:
    """Return the slabs that may be held out, the best first: along a long axis, at the high end.

    The margin is one large instance or, where no such cut will do, a quarter of the axis.
    """
    axes = sorted(range(3), key=lambda axis: -shape[axis])
    margins = [(axis, math.ceil(float(reach[axis]))) for axis in axes]
    margins += [(axis, shape[axis] // 4) for axis, whole in margins if shape[axis] // 4 < whole]
    kind = {"kind": "holdout", "fraction": HELD_OUT}
    return [
        Split.model_validate({**kind, "axis": axis, "side": side, "margin": margin})
        for axis, margin in margins
        for side in ("high", "low")
    ]


def _patch_beside(
    volume: Volume, data: Data, split: Split, extents: tuple[int, Array], step: Size3
) -> Size3 | str:
    """Return the patch for what a cut leaves to train on, or what is against the cut."""
    shape, margin = volume.image.shape, split.margin or 0
    if 2 * margin > (1 - HELD_OUT) * shape[split.axis]:
        return f"a margin of {margin} voxels leaves too little to train on"
    try:
        plan = split_volumes(
            [volume], data.model_copy(update={"split": split}), receptive_field=shape
        )
    except VolumeError:
        return "one of the two parts has no truth"
    (part,) = plan.folds[0].train
    patch = _patch(part.image.shape, extents, step, most=math.prod(data.patch_size))
    pads = _pads(patch, shape)
    padded = [side + 2 * pad for side, pad in zip(part.image.shape, pads, strict=True)]
    try:
        check_patch_fits(volume.name, padded, patch)
    except ConfigError:
        return "what is left to train on is smaller than a patch"
    return patch
