"""Paste whole instances of one patch into the background of another, distance and all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hydralv_tune.patches import Patches, rows, whole

BUCKETS = 4096
"""Ids are counted in a table by their remainder: two that share a row are pasted or left out
together, and no list of ids has to come back from the device."""

PASTED = 1 << 30
"""Bit that keeps a pasted id apart from the ids of the patch: both may come from one volume."""


TOO_MANY = 1e9
"""What a voxel that forbids its instance adds to the instance's size."""


@dataclass(frozen=True)
class _Sample:
    """One patch: image, labels and edt, and voxels that an instance may not have (Z, Y, X)."""

    image: Tensor
    labels: Tensor
    edt: Tensor
    bad: Tensor


def copy_paste(patches: Patches, knobs: Mapping[str, Any], generator: torch.Generator) -> Patches:
    """Return patches of which some have instances of another sample in their background.

    An instance is pasted whole or not at all: only where all of it lies on background inside the
    mask, `border` voxels clear of what is there. One that the rim or the mask cuts is left out:
    its flat side would be taken for a surface. The source is shifted and mirrored as a whole, and
    its brightness set to the target's, section by section.

    Args:
        patches: The batch; with one sample it is its own source.
        knobs: `prob`; `max_obj_ratio`: largest instance, as a share of the patch; `border`:
            voxels within the section kept free around what is there.
        generator: A generator on the CPU.

    Source:
        Ghiasi et al. 2021, doi:10.1109/CVPR46437.2021.00294.
    """
    total = len(patches)
    chosen = rows(generator, total, knobs["prob"])
    if not chosen:
        return patches
    tensors = [patches.image.clone(), patches.labels.clone(), patches.edt.clone()]
    for row in chosen:
        other = (row + whole(generator, 1, total - 1)) % total if total > 1 else row
        source = _shifted(_sample(patches, other), generator)
        keep = torch.rand(BUCKETS, generator=generator) < 0.5
        pasted = _paste(_sample(patches, row), source, keep, knobs)
        tensors[0][row, 0], tensors[1][row], tensors[2][row] = pasted
    return replace(patches, image=tensors[0], labels=tensors[1], edt=tensors[2])


def _sample(patches: Patches, row: int) -> _Sample:
    """Return one patch."""
    return _Sample(patches.image[row, 0], patches.labels[row], patches.edt[row], ~patches.mask[row])


def _shifted(source: _Sample, generator: torch.Generator) -> _Sample:
    """Return the source mirrored and rolled within the section, its cut instances marked bad."""
    _, height, width = source.labels.shape
    axes = [axis for axis in (-3, -2, -1) if whole(generator, 0, 1)]
    by = (whole(generator, 0, height - 1), whole(generator, 0, width - 1))

    def moved(tensor: Tensor) -> Tensor:
        return torch.roll(torch.flip(tensor, axes), by, (-2, -1))

    bad = _with_rim(source.bad)
    return _Sample(moved(source.image), moved(source.labels), moved(source.edt), moved(bad))


def _paste(
    target: _Sample, source: _Sample, keep: Tensor, knobs: Mapping[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return image, labels and edt of the target with the source's instances in it."""
    taken = target.labels > 0
    # The roll joins opposite rims: what crosses there was whole only before it.
    bad = _with_rim(source.bad | target.bad | _grown(taken, int(knobs["border"]), depth=1))
    bucket = source.labels.bitwise_and(BUCKETS - 1).flatten().long()
    price = bad.flatten().float().mul_(TOO_MANY).add_(1.0)
    sizes = torch.zeros(BUCKETS, device=price.device).scatter_add_(0, bucket, price)
    allowed = sizes <= float(knobs["max_obj_ratio"]) * bucket.numel()
    allowed &= keep.to(allowed.device, non_blocking=True)
    occupied = source.labels > 0
    inside = allowed.index_select(0, bucket).reshape(occupied.shape) & occupied
    # The membrane around an instance belongs to its look.
    halo = _grown(inside, 1, depth=0)
    shift = _background_mean(target.image, ~taken) - _background_mean(source.image, ~occupied)
    image = torch.where(halo, source.image + shift, target.image)
    labels = torch.where(inside, source.labels | PASTED, target.labels)
    return image, labels, torch.where(inside, source.edt, target.edt)


def _with_rim(voxels: Tensor) -> Tensor:
    """Mark the outermost voxels too, in place; of an axis only where it has several."""
    for axis, n in enumerate(voxels.shape):
        if n > 1:
            voxels.select(axis, 0).fill_(True)
            voxels.select(axis, n - 1).fill_(True)
    return voxels


def _grown(voxels: Tensor, steps: int, *, depth: int) -> Tensor:
    """Return voxels grown by a box of `steps` within the section and `depth` across."""
    grown = voxels.clone()
    for axis, reach in enumerate((depth, steps, steps)):
        # A step at a time on booleans: on a CPU far faster than pooling.
        for _ in range(min(reach, voxels.shape[axis] - 1)):
            n = voxels.shape[axis] - 1
            before = grown.clone()
            grown.narrow(axis, 0, n).logical_or_(before.narrow(axis, 1, n))
            grown.narrow(axis, 1, n).logical_or_(before.narrow(axis, 0, n))
    return grown


def _background_mean(image: Tensor, background: Tensor) -> Tensor:
    """Return the mean of the background of each section (Z, 1, 1)."""
    counted = background.float()
    total = (image * counted).sum((1, 2), keepdim=True)
    return total / counted.sum((1, 2), keepdim=True).clamp(min=1.0)
