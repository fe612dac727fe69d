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


def augment(patches: Patches, chosen: Mapping[str, Knobs], generator: torch.Generator) -> Patches:
    """Return the batch after all chosen augmentations, each sample drawn on its own.

    Warps of one sample are joined and read once. The same generator state gives the same result.

    Args:
        patches: The batch; it is left as it is.
        chosen: Knobs by augmentation, from `resolve_preset`.
        generator: A generator, best on the CPU: one on a GPU makes the host wait once a call.

    Raises:
        ValueError: Tensors that do not belong together, an unknown augmentation.
    """
    patches.check()
    for name in chosen:
        if name not in AUGMENTATIONS:
            check_augmentation(name, {})
    host = host_generator(generator)
    joined = [
        (augmentation.resolved(), {**augmentation.defaults, **chosen[name]})
        for name, augmentation in AUGMENTATIONS.items()
        if name in chosen and augmentation.warp is not None
    ]
    for name, augmentation in AUGMENTATIONS.items():
        if name not in chosen:
            continue
        if augmentation.warp is None:
            patches = augmentation.apply(patches, chosen[name], host)
        elif joined:
            patches, joined = _warped(patches, joined, host), []
    return patches


def _warped(
    patches: Patches, steps: Sequence[tuple[Warp, Knobs]], generator: torch.Generator
) -> Patches:
    """Return the batch with all warps of a sample in one resampling."""
    plan = [set(rows(generator, len(patches), knobs["prob"])) for _, knobs in steps]
    touched = sorted(set().union(*plan))
    if not touched:
        return patches
    where = warps.Coordinates.identity(patches, touched)
    for index, row in enumerate(touched):
        for (warp, knobs), drawn in zip(steps, plan, strict=True):
            if row in drawn:
                warp(where, index, knobs, generator)
    return warps.resample(patches, where)


def apply_one(
    augmentation: Augmentation, patches: Patches, knobs: Knobs, generator: torch.Generator
) -> Patches:
    """Return the batch after one augmentation, defaults standing in for knobs that are not set."""
    full, host = {**augmentation.defaults, **knobs}, host_generator(generator)
    if augmentation.warp is not None:
        return _warped(patches, [(augmentation.resolved(), full)], host)
    changed: Patches = augmentation.resolved()(patches, full, host)
    return changed
