"""Augment a batch of patches on the device that holds it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from hydralv_tune.numerics.augmentation import warps
from hydralv_tune.numerics.augmentation.patches import Patches, host_generator, rows
from hydralv_tune.numerics.augmentation.registry import (
    AUGMENTATIONS,
    Augmentation,
    Knobs,
    check_augmentation,
)

Warp = Callable[[warps.Coordinates, int, Knobs, torch.Generator], None]


def augment(
    patches: Patches,
    chosen: Mapping[str, Knobs],
    generator: torch.Generator,
    drawn: list[list[str]] | None = None,
) -> Patches:
    """Return the batch after all chosen augmentations, each sample drawn on its own.

    Warps of one sample are joined and read once. The same generator state gives the same result.

    Args:
        patches: The batch; it is left as it is.
        chosen: Knobs by augmentation, from `resolve_preset`.
        generator: A generator, best on the CPU: one on a GPU makes the host wait once a call.
        drawn: A list for each sample, to which the names of what was applied to it are added.

    Raises:
        ValueError: Tensors that do not belong together, an unknown augmentation.
    """
    patches.check()
    for name in chosen:
        if name not in AUGMENTATIONS:
            check_augmentation(name, {})
    host = host_generator(generator)
    applied = {name: entry for name, entry in AUGMENTATIONS.items() if name in chosen}
    warped = [name for name, entry in applied.items() if entry.warp is not None]
    joined = [
        (applied[name].resolved(), {**applied[name].defaults, **chosen[name]}) for name in warped
    ]
    for name, augmentation in applied.items():
        before = patches
        if augmentation.warp is None:
            patches = apply_one(augmentation, patches, chosen[name], host)
            touched = {name: _changed(before, patches)} if drawn is not None else {}
        elif joined:
            patches, plan = _warped(patches, joined, host)
            joined, touched = [], dict(zip(warped, map(sorted, plan), strict=True))
        else:
            continue
        if drawn is not None:
            for one, samples in touched.items():
                for sample in samples:
                    drawn[sample].append(one)
    return patches


def _changed(before: Patches, after: Patches) -> list[int]:
    """Return the samples whose image or labels an augmentation changed."""
    image = (before.image != after.image).flatten(1).any(1)
    labels = (before.labels != after.labels).flatten(1).any(1)
    return [int(sample) for sample in torch.nonzero(image | labels)]


def _warped(
    patches: Patches, steps: Sequence[tuple[Warp, Knobs]], generator: torch.Generator
) -> tuple[Patches, list[set[int]]]:
    """Return the batch with all warps of a sample in one resampling, and the samples of each."""
    plan = [set(rows(generator, len(patches), knobs["prob"])) for _, knobs in steps]
    touched = sorted(set().union(*plan))
    if not touched:
        return patches, plan
    where = warps.Coordinates.identity(patches, touched)
    for index, row in enumerate(touched):
        for (warp, knobs), drawn in zip(steps, plan, strict=True):
            if row in drawn:
                warp(where, index, knobs, generator)
    return warps.resample(patches, where), plan


def apply_one(
    augmentation: Augmentation, patches: Patches, knobs: Knobs, generator: torch.Generator
) -> Patches:
    """Return the batch after one augmentation, defaults standing in for knobs that are not set.

    Args:
        augmentation: An entry of `AUGMENTATIONS`.
        patches: The batch; it is left as it is.
        knobs: Some or all of its knobs.
        generator: A generator, best on the CPU.
    """
    full, host = {**augmentation.defaults, **knobs}, host_generator(generator)
    if augmentation.warp is not None:
        return _warped(patches, [(augmentation.resolved(), full)], host)[0]
    changed: Patches = augmentation.resolved()(patches, full, host)
    return changed
