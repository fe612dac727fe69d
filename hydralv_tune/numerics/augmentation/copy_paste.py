"""Paste whole instances of one patch into the background of another, distance and all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hydralv_tune.numerics.augmentation.patches import Patches, device_generator, rows, whole

BUCKETS = 4096
"""Ids are counted in a table by their remainder: two that share a row are left out, or pasted,
together, and no list of ids has to come back from the device."""

PASTED = 1 << 30
"""Bit that keeps a pasted id apart from the ids of the patch: both may come from one volume."""

STRIDE = (1, 2, 2)
"""Places that are tried: a voxel more or less within the section is no other picture."""

TOO_MANY = 1e9
"""What a voxel that forbids its instance adds to the instance's size."""


@dataclass(frozen=True)
class _Sample:
    """One patch: image, labels and edt, and voxels where nothing may be cut or pasted (Z, Y, X)."""

    image: Tensor
    labels: Tensor
    edt: Tensor
    bad: Tensor


def copy_paste(patches: Patches, knobs: Mapping[str, Any], generator: torch.Generator) -> Patches:
    """Return patches of which some have an instance of another sample in their background.

    An instance is pasted whole, mirrored by chance, where its box with a border is free of other
    instances and inside the mask; where there is no such place, nothing is. One that the rim or
    the mask of its own patch cuts is never taken: its flat side would be learned as a surface.
    Its brightness is set to the target's, section by section.

    Args:
        patches: The batch; with one sample it is its own source.
        knobs: `prob`; `max_obj_ratio`: largest instance, as a share of the patch; `border`:
            voxels within the section kept free around what is there.
        generator: A generator on the CPU.

    Source:
        Ghiasi et al. 2021, doi:10.1109/CVPR46437.2021.00294, which lets objects cover others.
    """
    total = len(patches)
    chosen = rows(generator, total, knobs["prob"])
    if not chosen:
        return patches
    image, labels, edt = patches.image.clone(), patches.labels.clone(), patches.edt.clone()
    noise = device_generator(generator, image.device)
    for row in chosen:
        other = (row + whole(generator, 1, total - 1)) % total if total > 1 else row
        source = _mirrored(_sample(patches, other), generator)
        target = _sample(patches, row)
        instance = _chosen(source, float(knobs["max_obj_ratio"]), noise)
        if instance is not None:
            target = _paste(target, source, instance, int(knobs["border"]), noise)
        image[row, 0], labels[row], edt[row] = target.image, target.labels, target.edt
    return replace(patches, image=image, labels=labels, edt=edt)


def _sample(patches: Patches, row: int) -> _Sample:
    """Return one patch, its rim forbidden as what lies outside the mask is."""
    bad = ~patches.mask[row]
    for axis, n in enumerate(bad.shape):
        if n > 1:
            bad.select(axis, 0).fill_(True)
            bad.select(axis, n - 1).fill_(True)
    return _Sample(patches.image[row, 0], patches.labels[row], patches.edt[row], bad)


def _mirrored(source: _Sample, generator: torch.Generator) -> _Sample:
    """Return the source mirrored along a random set of axes."""
    axes = [axis for axis in (0, 1, 2) if whole(generator, 0, 1)]
    parts = (source.image, source.labels, source.edt, source.bad)
    return _Sample(*(torch.flip(part, axes) for part in parts))


def _known_empty(best: Tensor) -> bool:
    """Return whether nothing was found, where asking is free: on a CPU. Elsewhere go on blindly."""
    return best.device.type == "cpu" and float(best) == 0


def _chosen(source: _Sample, largest: float, noise: torch.Generator) -> Tensor | None:
    """Return the voxels of a random whole instance of at most a share of the patch, if any."""
    bucket = source.labels.bitwise_and(BUCKETS - 1).long()
    labelled = source.labels > 0
    price = source.bad.float().mul_(TOO_MANY).add_(1.0).mul_(labelled)
    sizes = torch.zeros(BUCKETS, device=price.device)
    sizes.scatter_add_(0, bucket.flatten(), price.flatten())
    worth = (sizes > 0) & (sizes <= largest * bucket.numel())
    score = torch.empty_like(sizes).uniform_(1e-3, 1.0, generator=noise) * worth
    best, pick = score.max(0)
    if _known_empty(best):
        return None
    return (bucket == pick) & labelled & (best > 0)


def _paste(
    target: _Sample, source: _Sample, instance: Tensor, border: int, noise: torch.Generator
) -> _Sample:
    """Return the target with an instance at a random free place, or as it is."""
    taken = target.labels > 0
    first, length = _box(instance)
    free = _free_places(target.bad | _grown(taken, border, depth=1), length)
    score = torch.empty_like(free).uniform_(1e-3, 1.0, generator=noise)
    best, place = score.mul_(free).flatten().max(0)
    if _known_empty(best):
        return target
    _, lines, columns = free.shape
    at = torch.stack(
        (
            place // (lines * columns),
            place // columns % lines * STRIDE[1],
            place % columns * STRIDE[2],
        )
    )
    depth, height, width = taken.shape
    # Box and instance lie inside both patches, so one flat offset moves every voxel.
    offset = ((first[0] - at[0]) * height + first[1] - at[1]) * width + first[2] - at[2]
    index = torch.arange(taken.numel(), device=free.device).add_(offset)
    index = index.clamp_(0, taken.numel() - 1)

    def moved(tensor: Tensor) -> Tensor:
        return tensor.flatten().gather(0, index).reshape(taken.shape)

    inside = moved(instance) & _within(taken.shape, at, length) & (best > 0)
    labels = moved(source.labels)
    # The membrane around an instance belongs to its look; a neighbour's body does not.
    halo = _grown(inside, 1, depth=0) & ~taken & (labels == 0) | inside
    section = torch.arange(depth, device=free.device).add_(first[0] - at[0]).clamp_(0, depth - 1)
    there = _section_means(source.image, source.labels == 0).index_select(0, section)
    shift = _section_means(target.image, ~taken) - there
    return _Sample(
        torch.where(halo, moved(source.image).add_(shift), target.image),
        torch.where(inside, labels.bitwise_or_(PASTED), target.labels),
        torch.where(inside, moved(source.edt), target.edt),
        target.bad,
    )


def _box(instance: Tensor) -> tuple[Tensor, Tensor]:
    """Return first voxel and lengths (3,) of the box of a mask, without asking the device."""
    firsts, lengths = [], []
    side = instance.any(2)
    for line in (side.any(1).float(), side.any(0).float(), instance.any(0).any(0).float()):
        first = line.argmax(0)
        firsts.append(first)
        lengths.append(line.numel() - line.flip(0).argmax(0) - first)
    return torch.stack(firsts), torch.stack(lengths)


def _free_places(forbidden: Tensor, length: Tensor) -> Tensor:
    """Return 1.0 where a free box of a length (3,) can begin, for every second row and column.

    A running sum along each axis holds the number of forbidden voxels of every box, so the length
    may stay on the device.
    """
    occupied = forbidden.float()
    fits: list[Tensor] = []
    for axis in (2, 1, 0):
        n = forbidden.shape[axis]
        start = torch.arange(0, n, STRIDE[axis], device=forbidden.device)
        stop = start + length[axis]
        total = F.pad(occupied.cumsum(axis), [0, 0] * (2 - axis) + [1, 0])
        occupied = total.index_select(axis, stop.clamp(max=n)) - total.index_select(axis, start)
        sides = [-1 if other == axis else 1 for other in range(3)]
        fits.append((stop <= n).reshape(sides))
    return ((occupied < 0.5) & fits[0] & fits[1] & fits[2]).float()


def _within(shape: tuple[int, ...], at: Tensor, length: Tensor) -> Tensor:
    """Return the voxels of the box with a first voxel (3,) and a length (3,)."""
    inside = torch.ones(shape, dtype=torch.bool, device=at.device)
    for axis, n in enumerate(shape):
        line = torch.arange(n, device=at.device) - at[axis]
        sides = [-1 if other == axis else 1 for other in range(3)]
        inside &= ((line >= 0) & (line < length[axis])).reshape(sides)
    return inside


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


def _section_means(image: Tensor, voxels: Tensor) -> Tensor:
    """Return the mean over some voxels of each section (Z, 1, 1)."""
    counted = voxels.float()
    total = (image * counted).sum((1, 2), keepdim=True)
    return total / counted.sum((1, 2), keepdim=True).clamp(min=1.0)
