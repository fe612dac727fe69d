"""Change the image alone: noise, contrast, and the defects of an electron microscope's stack.

Labels, distance and mask stay: the network is asked for what is there, not for what is seen.
Strengths are shares of the range from black to white, `Patches.intensity_ranges`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hydralv_tune.numerics.augmentation.patches import (
    Patches,
    choice,
    count,
    device_generator,
    happens,
    rows,
    uniform,
    whole,
)

Knobs = Mapping[str, Any]


def intensity(patches: Patches, knobs: Knobs, generator: torch.Generator) -> Patches:
    """Return patches with another contrast, brightness and noise, each drawn on its own.

    Args:
        patches: The batch.
        knobs: `prob` of a sample to be considered at all; `contrast_prob`, `contrast_range`: the
            exponent of a gamma curve over the sample's own range; `shift_intensity_prob`,
            `shift_intensity_offset`: largest shift; `gaussian_noise_prob`, `gaussian_noise_std`.
        generator: A generator on the CPU.
    """
    considered = rows(generator, len(patches), knobs["prob"])
    plan = [
        (
            row,
            happens(generator, knobs["contrast_prob"]),
            happens(generator, knobs["shift_intensity_prob"]),
            happens(generator, knobs["gaussian_noise_prob"]),
        )
        for row in considered
    ]
    plan = [entry for entry in plan if any(entry[1:])]
    if not plan:
        return patches
    image = patches.image.clone()
    noise_generator = None
    for row, contrast, shift, noise in plan:
        sample = image[row]
        if contrast:
            _apply_gamma(sample, uniform(generator, knobs["contrast_range"]))
        if shift:
            reach = float(knobs["shift_intensity_offset"]) * patches.contrast(row)
            sample += uniform(generator, (-reach, reach))
        if noise:
            noise_generator = noise_generator or device_generator(generator, image.device)
            field = torch.empty_like(sample).normal_(generator=noise_generator)
            sample.add_(field, alpha=float(knobs["gaussian_noise_std"]) * patches.contrast(row))
    return patches.with_image(image)


def missing_section(patches: Patches, knobs: Knobs, generator: torch.Generator) -> Patches:
    """Return patches of which some miss sections, whole or in part, filled with one grey.

    Args:
        patches: The batch.
        knobs: `prob`; `num_sections`: how many, or a pair to draw from; `full_section_prob`:
            share of sections that are missing whole; `partial_ratio_range`: the part that is
            missing of the others; `fill_value_range`: the grey, 0 black to 1 white.
        generator: A generator on the CPU.
    """
    chosen = rows(generator, len(patches), knobs["prob"])
    if not chosen:
        return patches
    image = patches.image.clone()
    for row in chosen:
        black, white = patches.intensity_range(row)
        for z in _sections(patches.shape[0], knobs["num_sections"], generator):
            grey = black + uniform(generator, knobs["fill_value_range"]) * (white - black)
            section = image[row, 0, z]
            if not happens(generator, knobs["full_section_prob"]):
                section = _part(section, knobs["partial_ratio_range"], generator)
            section.fill_(grey)
    return patches.with_image(image)


def motion_blur(patches: Patches, knobs: Knobs, generator: torch.Generator) -> Patches:
    """Return patches of which some have sections smeared along a line of random direction.

    Args:
        patches: The batch.
        knobs: `prob`; `sections`: how many, or a pair to draw from; `kernel_size`: length of the
            line in voxels, odd.
        generator: A generator on the CPU.
    """
    places = [
        (row, z)
        for row in rows(generator, len(patches), knobs["prob"])
        for z in _sections(patches.shape[0], knobs["sections"], generator)
    ]
    if not places:
        return patches
    size = min(int(knobs["kernel_size"]), 2 * min(patches.shape[1:]) - 1)
    kernels = _line_kernels(size, [uniform(generator, (0.0, math.pi)) for _ in places])
    device = patches.image.device
    which = torch.tensor(places).to(device, non_blocking=True).unbind(1)
    sharp = patches.image[which[0], 0, which[1]][None]
    padded = F.pad(sharp, [size // 2] * 4, mode="reflect")
    kernels = kernels[:, None].to(device, non_blocking=True)
    blurred = F.conv2d(padded, kernels, groups=len(places))[0]
    image = patches.image.clone()
    image[which[0], 0, which[1]] = blurred
    return patches.with_image(image)


def cut_noise(patches: Patches, knobs: Knobs, generator: torch.Generator) -> Patches:
    """Return patches of which some have noise in a box.

    Args:
        patches: The batch.
        knobs: `prob`; `length_ratio`: edge of the box as a share of the patch, or a pair to draw
            from; `noise_scale`: largest change of a voxel, or a pair to draw from.
        generator: A generator on the CPU.
    """
    chosen = rows(generator, len(patches), knobs["prob"])
    if not chosen:
        return patches
    image = patches.image.clone()
    noise_generator = device_generator(generator, image.device)
    for row in chosen:
        box = image[row, 0][_box(patches.shape, knobs["length_ratio"], generator)]
        scale = uniform(generator, knobs["noise_scale"]) * patches.contrast(row)
        box += torch.empty_like(box).uniform_(-scale, scale, generator=noise_generator)
    return patches.with_image(image)


def cut_blur(patches: Patches, knobs: Knobs, generator: torch.Generator) -> Patches:
    """Return patches of which some are of lower resolution in a box.

    Args:
        patches: The batch.
        knobs: `prob`; `length_ratio`: as in `cut_noise`; `down_ratio_range`: how many times
            lower, within the section; `downsample_z`: across sections too.
        generator: A generator on the CPU.
    """
    chosen = rows(generator, len(patches), knobs["prob"])
    if not chosen:
        return patches
    image = patches.image.clone()
    for row in chosen:
        box = image[row, 0][_box(patches.shape, knobs["length_ratio"], generator)]
        ratio = uniform(generator, knobs["down_ratio_range"])
        depth = max(round(box.shape[0] / ratio), 1) if knobs["downsample_z"] else box.shape[0]
        coarse = (depth, *(max(round(n / ratio), 1) for n in box.shape[1:]))
        small = F.interpolate(box[None, None], coarse, mode="area")
        box.copy_(F.interpolate(small, box.shape, mode="trilinear", align_corners=False)[0, 0])
    return patches.with_image(image)


def cutout(patches: Patches, knobs: Knobs, generator: torch.Generator) -> Patches:
    """Return patches of which some have holes filled with the sample's mean.

    Args:
        patches: The batch.
        knobs: `prob`; `num_holes`: how many, or a pair to draw from; `hole_size`: edge in voxels,
            one number or (z, y, x), at most the patch.
        generator: A generator on the CPU.

    Source:
        DeVries and Taylor 2017, arXiv:1708.04552.
    """
    chosen = rows(generator, len(patches), knobs["prob"])
    if not chosen:
        return patches
    size = knobs["hole_size"]
    sizes = [size] if isinstance(size, int | float) else list(size)
    edges = sizes * 3 if len(sizes) == 1 else sizes
    lengths = [min(int(e), n) for e, n in zip(edges, patches.shape, strict=True)]
    image = patches.image.clone()
    for row in chosen:
        mean = image[row].mean()
        for _ in range(count(generator, knobs["num_holes"])):
            image[row, 0][_window(patches.shape, lengths, generator)] = mean
    return patches.with_image(image)


def _apply_gamma(sample: Tensor, gamma: float) -> None:
    """Bend the sample's own range by an exponent, in place, as MONAI's adjust-contrast."""
    low, high = torch.aminmax(sample)
    extent = (high - low).clamp(min=1e-7)
    sample.sub_(low).div_(extent).clamp_(0.0, 1.0).pow_(gamma).mul_(extent).add_(low)


def _sections(depth: int, span: Any, generator: torch.Generator) -> list[int]:
    """Return some sections: not the first or last, which have no neighbour to be told from."""
    if depth <= 2:
        return choice(generator, depth, min(count(generator, span), depth - 1))
    return [z + 1 for z in choice(generator, depth - 2, count(generator, span))]


def _part(section: Tensor, ratio: Any, generator: torch.Generator) -> Tensor:
    """Return the view of a part of a section at one of its four sides."""
    axis = whole(generator, 0, 1)
    n = section.shape[axis]
    length = min(max(round(uniform(generator, ratio) * n), 1), n)
    return section.narrow(axis, 0 if happens(generator, 0.5) else n - length, length)


def _box(
    shape: Sequence[int], ratio: Any, generator: torch.Generator
) -> tuple[slice, slice, slice]:
    """Return a box whose edges are shares of the patch."""
    lengths = [min(max(round(uniform(generator, ratio) * n), 1), n) for n in shape]
    return _window(shape, lengths, generator)


def _window(
    shape: Sequence[int], lengths: Sequence[int], generator: torch.Generator
) -> tuple[slice, slice, slice]:
    """Return a box of given edges at a random place."""
    starts = [whole(generator, 0, n - e) for n, e in zip(shape, lengths, strict=True)]
    z, y, x = (slice(s, s + e) for s, e in zip(starts, lengths, strict=True))
    return z, y, x


def _line_kernels(size: int, angles: Sequence[float]) -> Tensor:
    """Return kernels (n, size, size) of lines through their middle, each summing to 1."""
    half = (size - 1) / 2
    steps = torch.linspace(-half, half, 4 * size)
    turn = torch.tensor(angles)[:, None]
    at = torch.arange(size)

    def shares(along: Tensor) -> Tensor:
        """Return what each step (n, steps) gives linearly to each row or column."""
        return (1 - (along[..., None] + half - at).abs()).clamp_(min=0.0)

    kernels = shares(steps * turn.sin()).mT @ shares(steps * turn.cos())
    return kernels / kernels.sum((1, 2), keepdim=True)
