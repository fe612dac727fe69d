"""Move voxels: flips, quarter turns, and one resampling for all smooth warps of a patch.

Affine, elastic and misalignment do not touch the image. Each changes the coordinates that output
voxels are read from, and `resample` reads once: linearly for the image and the distance, from the
nearest voxel for labels and mask. Where a coordinate lies outside the patch, the patch is
mirrored and the mask is False.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from hydralv_tune.numerics.augmentation.patches import (
    Patches,
    VoxelSize,
    device_generator,
    happens,
    rows,
    uniform,
    whole,
)

Knobs = Mapping[str, Any]

STEEPEST = 0.2
"""Largest elastic displacement per sigma: beyond, neighbours swap places and the image folds."""


def flip(patches: Patches, knobs: Knobs, generator: torch.Generator) -> Patches:
    """Return patches of which some are mirrored along one or more axes.

    Args:
        patches: The batch.
        knobs: `prob`; `spatial_axis`: the axes (0 is z) to choose from. With `prob` a sample is
            mirrored along a random set of them, never the empty one.
        generator: A generator on the CPU.
    """
    axes = _listed(knobs["spatial_axis"])
    chosen: dict[int, list[int]] = {}
    for row in rows(generator, len(patches), knobs["prob"]):
        bits = whole(generator, 1, 2 ** len(axes) - 1)
        chosen[row] = [axis - 3 for i, axis in enumerate(axes) if bits >> i & 1]
    if not chosen:
        return patches
    return _each(patches, lambda row, t: torch.flip(t, chosen[row]) if row in chosen else t)


def rotate(patches: Patches, knobs: Knobs, generator: torch.Generator) -> Patches:
    """Return patches of which some are turned by 90, 180 or 270 degrees.

    Args:
        patches: The batch; where the two axes are of different length, only by 180.
        knobs: `prob`; `spatial_axes`: the two axes of the plane, (1, 2) for the section.
        generator: A generator on the CPU.
    """
    first, second = _listed(knobs["spatial_axes"])
    square = patches.shape[first] == patches.shape[second]
    chosen = {
        row: whole(generator, 1, 3) if square else 2
        for row in rows(generator, len(patches), knobs["prob"])
    }
    if not chosen:
        return patches
    plane = (first - 3, second - 3)
    sizes = [list(size) if size else None for size in patches.voxel_sizes_nm]
    for row, turns in chosen.items():
        size = sizes[row] if sizes else None
        if size is not None and turns % 2:
            size[first], size[second] = size[second], size[first]
    turned = tuple(None if size is None else (size[0], size[1], size[2]) for size in sizes)
    return _each(
        replace(patches, voxel_sizes_nm=turned),
        lambda row, t: torch.rot90(t, chosen[row], plane) if row in chosen else t,
    )


@dataclass
class Coordinates:
    """Where each output voxel of some samples is read from, in voxels.

    Args:
        rows: The samples of the batch that are warped.
        points: (n, 3, Z, Y, X), components (z, y, x); changed in place by each warp.
        shape: Shape of a patch.
        voxel_sizes: Voxel size (z, y, x) of each warped sample, in any unit.
    """

    rows: list[int]
    points: Tensor
    shape: tuple[int, int, int]
    voxel_sizes: list[VoxelSize]

    @classmethod
    def identity(cls, patches: Patches, chosen: Sequence[int]) -> Coordinates:
        """Return coordinates that change nothing."""
        points = patches.image.new_empty((len(chosen), 3, *patches.shape))
        for axis, n in enumerate(patches.shape):
            sides = [-1 if other == axis else 1 for other in range(3)]
            points[:, axis] = torch.arange(n, device=points.device).reshape(sides)
        sizes = [patches.voxel_size(row) for row in chosen]
        return cls(list(chosen), points, patches.shape, sizes)


def misalign(where: Coordinates, row: int, knobs: Knobs, generator: torch.Generator) -> None:
    """Shift or turn one section, or all from one on, as a stack that was aligned badly.

    Args:
        where: Coordinates to change.
        row: Index among the warped samples.
        knobs: `displacement`: largest shift in voxels; `rotate_ratio`: share of cases that turn
            about the middle, by at most the angle that moves the rim by `displacement`.
        generator: A generator on the CPU.
    """
    depth, height, width = where.shape
    if depth < 2:
        return
    start = whole(generator, 1, depth - 1)
    stop = start + 1 if happens(generator, 0.5) else depth
    section = where.points[row, 1:, start:stop]
    reach = float(knobs["displacement"])
    if happens(generator, knobs["rotate_ratio"]):
        angle = uniform(generator, (-1.0, 1.0)) * math.atan(2 * reach / max(height, width))
        y, x = section[0] - (height - 1) / 2, section[1] - (width - 1) / 2
        section[0] = math.cos(angle) * y - math.sin(angle) * x + (height - 1) / 2
        section[1] = math.sin(angle) * y + math.cos(angle) * x + (width - 1) / 2
        return
    # Whole voxels, so that a shift alone does not smooth the image.
    section[0] += whole(generator, -int(reach), int(reach))
    section[1] += whole(generator, -int(reach), int(reach))


def deform(where: Coordinates, row: int, knobs: Knobs, generator: torch.Generator) -> None:
    """Displace by a smooth random field within the sections.

    Sections stay flat: a displacement along z of a voxel is four times one within the section
    here. Across sections the field changes as smoothly as within, measured in nanometres.

    Args:
        where: Coordinates to change.
        row: Index among the warped samples.
        knobs: `sigma_range`: smoothness in voxels within the section; `magnitude_range`: the
            strength, in the sense of MONAI's 2-D elastic (a uniform field times the strength,
            then smoothed): the displacement is 0.16 * strength / sigma voxels (root mean square),
            at most a fifth of sigma.
        generator: A generator on the CPU.
    """
    sigma = max(uniform(generator, knobs["sigma_range"]), 0.5)
    strength = uniform(generator, knobs["magnitude_range"])
    size_z, size_y, size_x = where.voxel_sizes[row]
    spacing = (sigma * min(size_y, size_x) / size_z, sigma, sigma)
    # Knots three sigma apart, cubic between them, are as steep as noise smoothed by sigma.
    knots = [
        max(math.ceil((n - 1) / (3 * step)), 1) + 1
        for n, step in zip(where.shape, spacing, strict=True)
    ]
    device = where.points.device
    coarse = torch.randn(
        (1, 2 * knots[0], knots[1], knots[2]),
        generator=device_generator(generator, device),
        device=device,
    )
    depth, height, width = where.shape
    fine = F.interpolate(coarse, (height, width), mode="bicubic", align_corners=True)
    field = fine.reshape(2, knots[0], height * width)
    if knots[0] != depth:
        field = F.interpolate(
            field.transpose(1, 2), depth, mode="linear", align_corners=True
        ).transpose(1, 2)
    rms = strength / math.sqrt(3.0) / (2.0 * math.sqrt(math.pi) * sigma)
    rms = min(rms, STEEPEST * sigma)
    scale = rms / field.std().clamp(min=1e-6)
    where.points[row, 1:] += field.reshape(2, depth, height, width) * scale


def affine(where: Coordinates, row: int, knobs: Knobs, generator: torch.Generator) -> None:
    """Turn, scale and shear about the middle, in nanometres where the voxel size is known.

    In voxels of 30x8x8 nm a turn about y by 0.1 would tilt the sections by 0.37: in nanometres
    it is a rigid one, and a patch keeps its shape.

    Args:
        where: Coordinates to change.
        row: Index among the warped samples.
        knobs: Per axis (z, y, x): `rotate_range`: largest angle about it in radians;
            `scale_range`: largest relative change of its length; `shear_range`: largest shift
            along it per unit along each other axis.
        generator: A generator on the CPU.
    """
    matrix = np.eye(3)
    for axis, reach in enumerate(knobs["rotate_range"]):
        angle = uniform(generator, (-float(reach), float(reach)))
        first, second = (other for other in range(3) if other != axis)
        turn = np.eye(3)
        turn[first, first] = turn[second, second] = math.cos(angle)
        turn[first, second], turn[second, first] = -math.sin(angle), math.sin(angle)
        matrix = matrix @ turn
    shear = np.eye(3)
    for axis, reach in enumerate(knobs["shear_range"]):
        for other in range(3):
            if other != axis:
                shear[axis, other] = uniform(generator, (-float(reach), float(reach)))
    scale = [1.0 + uniform(generator, (-float(r), float(r))) for r in knobs["scale_range"]]
    size = np.array(where.voxel_sizes[row])
    matrix = (matrix @ shear @ np.diag(scale)) * size / size[:, None]
    middle = (np.array(where.shape) - 1) / 2
    moved = torch.addmm(
        _sent(middle - matrix @ middle, where.points)[:, None],
        _sent(matrix, where.points),
        where.points[row].reshape(3, -1),
    )
    where.points[row] = moved.reshape(where.points[row].shape)


def _sent(values: npt.ArrayLike, like: Tensor) -> Tensor:
    """Return a few numbers as float32 on the device of a tensor, without waiting for it."""
    return torch.from_numpy(np.asarray(values, dtype=np.float32)).to(like.device, non_blocking=True)


def resample(patches: Patches, where: Coordinates) -> Patches:
    """Return the patches read at the coordinates.

    The distance is interpolated with 0 outside instances and stays -1 where the nearest voxel
    lies outside.

    Args:
        patches: The batch.
        where: Coordinates of the samples to change; used up.
    """
    whole_batch = where.rows == list(range(len(patches)))
    index = torch.tensor(where.rows).to(patches.image.device, non_blocking=True)

    def picked(tensor: Tensor) -> Tensor:
        return tensor if whole_batch else tensor.index_select(0, index)

    def placed(tensor: Tensor, new: Tensor) -> Tensor:
        return new if whole_batch else tensor.index_copy(0, index, new)

    outside = _mirror(where)
    edt = picked(patches.edt)
    smooth = _linear(torch.cat([picked(patches.image), edt.clamp(min=0.0)[:, None]], 1), where)
    nearest = _nearest(where)
    labels = picked(patches.labels).flatten(1).gather(1, nearest)
    inside = edt.flatten(1).gather(1, nearest) > 0
    mask = picked(patches.mask).flatten(1).gather(1, nearest).reshape(edt.shape) & ~outside
    distance = torch.where(inside.reshape(edt.shape), smooth[:, 1], -1.0)
    return replace(
        patches,
        image=placed(patches.image, smooth[:, :1]),
        labels=placed(patches.labels, labels.reshape(edt.shape)),
        edt=placed(patches.edt, distance),
        mask=placed(patches.mask, mask),
    )


def _mirror(where: Coordinates) -> Tensor:
    """Bring all coordinates into the patch in place, and return which were outside (n, Z, Y, X).

    They are mirrored at the rim once; what lies further out than a patch takes the rim's value.
    """
    points = where.points
    last = _sent([n - 1 for n in where.shape], points).reshape(3, 1, 1, 1)
    beyond = (points - last / 2).abs_() > (last + 1) / 2
    outside = beyond[:, 0] | beyond[:, 1] | beyond[:, 2]
    points.abs_().sub_(last).abs_().neg_().add_(last).clamp_(min=0.0)
    return outside


def _linear(volumes: Tensor, where: Coordinates) -> Tensor:
    """Return volumes (n, C, Z, Y, X) read linearly at coordinates inside the patch.

    The sections are laid one below the other and read twice in two dimensions, from the section
    above and the one below: on a CPU torch's 2-D sampling is vectorised and its 3-D one is not
    (measured 0.6 against 5.5 ms for two channels of 16x96x96).
    """
    n, channels, depth, height, width = volumes.shape
    atlas = volumes.reshape(n, channels, depth * height, width)
    z, y, x = where.points.unbind(1)
    above = z.floor()
    grid = torch.empty((n, depth * height, width, 2), device=volumes.device)
    flat = grid.view(n, depth, height, width, 2)
    torch.mul(x, 2.0 / max(width - 1, 1), out=flat[..., 0]).sub_(1.0)
    step = 2.0 / max(depth * height - 1, 1)
    torch.add(y, above, alpha=height, out=flat[..., 1]).mul_(step).sub_(1.0)

    def read() -> Tensor:
        return F.grid_sample(atlas, grid, padding_mode="border", align_corners=True)

    upper = read()
    below = (above + 1.0).clamp_(max=depth - 1).sub_(above)
    flat[..., 1].add_(below, alpha=height * step)
    share = (z - above).reshape(n, 1, depth * height, width)
    mixed = read().sub_(upper).mul_(share).add_(upper)
    return mixed.reshape(volumes.shape)


def _nearest(where: Coordinates) -> Tensor:
    """Return the flat index (n, Z*Y*X) of the voxel nearest to coordinates inside the patch."""
    _, height, width = where.shape
    points = where.points
    if math.prod(where.shape) >= 2**24:
        points = points.double()  # float32 counts to 2**24 only
    z, y, x = points.round().unbind(1)
    return z.mul_(height).add_(y).mul_(width).add_(x).flatten(1).long()


def _each(patches: Patches, turn: Any) -> Patches:
    """Return patches with a function of (row, tensor) applied to every sample of every tensor."""

    def turned(batch: Tensor) -> Tensor:
        return torch.stack([turn(row, sample) for row, sample in enumerate(batch)])

    return replace(
        patches,
        image=turned(patches.image),
        labels=turned(patches.labels),
        edt=turned(patches.edt),
        mask=turned(patches.mask),
    )


def _listed(value: Any) -> list[int]:
    """Return a number or a sequence of numbers as a list."""
    return [int(value)] if isinstance(value, int) else [int(item) for item in value]
