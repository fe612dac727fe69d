"""Paste whole instances of one patch into the background of another, distance and all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hydralv_tune.patches import Patches, rows, whole

BUCKETS = 4096
"""Ids are counted in a table by their remainder: two that share a row are pasted or left out
together, and no list of ids has to come back from the device."""

PASTED = 1 << 30
"""Bit that keeps a pasted id apart from the ids of the patch: both may come from one volume."""


@dataclass(frozen=True)
class _Sample:
    """One patch: image, labels, edt and mask (Z, Y, X)."""

    image: Tensor
    labels: Tensor
    edt: Tensor
    mask: Tensor


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
    return _Sample(patches.image[row, 0], patches.labels[row], patches.edt[row], patches.mask[row])


def _shifted(source: _Sample, generator: torch.Generator) -> _Sample:
    """Return the source without cut instances, mirrored and rolled within the section."""
    _, height, width = source.labels.shape
    labels = _without(source.labels, _rim(source.labels) | ~source.mask)
    axes = [axis for axis in (-3, -2, -1) if whole(generator, 0, 1)]
    by = (whole(generator, 0, height - 1), whole(generator, 0, width - 1))

    def moved(tensor: Tensor) -> Tensor:
        return torch.roll(torch.flip(tensor, axes), by, (-2, -1))

    return _Sample(moved(source.image), moved(labels), moved(source.edt), moved(source.mask))


def _paste(
    target: _Sample, source: _Sample, keep: Tensor, knobs: Mapping[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return image, labels and edt of the target with the source's instances in it."""
    border = int(knobs["border"])
    # The roll joins opposite rims: what crosses there was whole only before it.
    bad = _rim(source.labels) | ~target.mask | _grown(target.labels > 0, border, depth=1)
    sizes = _counts(source.labels, torch.ones_like(source.labels, dtype=torch.bool))
    fits = sizes <= float(knobs["max_obj_ratio"]) * source.labels.numel()
    allowed = fits & keep.to(fits.device, non_blocking=True)
    labels = _without(source.labels, bad | ~allowed[source.labels.remainder(BUCKETS).long()])
    inside = labels > 0
    # The membrane around an instance belongs to its look.
    halo = _grown(inside, 1, depth=0)
    shift = _background_mean(target) - _background_mean(source)
    image = torch.where(halo, source.image + shift, target.image)
    merged = torch.where(inside, labels | PASTED, target.labels)
    return image, merged, torch.where(inside, source.edt, target.edt)


def _without(labels: Tensor, bad: Tensor) -> Tensor:
    """Return labels without every instance that has a bad voxel."""
    touched = _counts(labels, bad) > 0
    return torch.where(touched[labels.remainder(BUCKETS).long()], 0, labels)


def _counts(labels: Tensor, voxels: Tensor) -> Tensor:
    """Return the number of marked voxels of each row of ids (BUCKETS,)."""
    counts = torch.zeros(BUCKETS, device=labels.device)
    bucket = labels.remainder(BUCKETS).long().flatten()
    return counts.scatter_add_(0, bucket, (voxels & (labels > 0)).flatten().float())


def _rim(labels: Tensor) -> Tensor:
    """Return the outermost voxels of a patch; of its sections only where there are several."""
    rim = torch.zeros_like(labels, dtype=torch.bool)
    for axis, n in enumerate(labels.shape):
        if n > 1:
            rim.select(axis, 0).fill_(True)
            rim.select(axis, n - 1).fill_(True)
    return rim


def _grown(voxels: Tensor, steps: int, *, depth: int) -> Tensor:
    """Return voxels grown by a box of `steps` within the section and `depth` across."""
    size = (2 * depth + 1, 2 * steps + 1, 2 * steps + 1)
    grown = F.max_pool3d(voxels[None, None].float(), size, 1, (depth, steps, steps))
    return grown[0, 0] > 0


def _background_mean(sample: _Sample) -> Tensor:
    """Return the mean of the background of each section (Z, 1, 1)."""
    background = (sample.labels == 0).float()
    total = (sample.image * background).sum((1, 2), keepdim=True)
    return total / background.sum((1, 2), keepdim=True).clamp(min=1.0)
