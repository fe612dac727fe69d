"""Turn instance labels into what a network learns: binary, boundary and distance.

Binary and boundary are cheap and depend only on a voxel's neighbours, so `derive_targets` makes
them on the device after a patch was warped. The distance needs a whole instance, which a patch
may cut, so it is computed once on the volume and warped along with the patch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.ndimage import binary_fill_holes, distance_transform_edt, find_objects
from skimage.measure import label as label_pieces
from torch import Tensor

OUTSIDE = -1.0
QUANTIZE_LEVELS = 10
EDGE_MODES = ("all", "seg-all", "seg-no-bg", "inner")
MODES = ("2d", "3d")

Labels = npt.NDArray[np.integer[Any]]
Window = tuple[slice, ...]


def binary_target(labels: Labels) -> npt.NDArray[np.bool_]:
    """Return whether a voxel belongs to any instance.

    Args:
        labels: Instance ids of any integer type, 0 outside; any shape.

    Raises:
        ValueError: The labels are not integers.
    """
    return np.asarray(_checked(labels) > 0)


def instance_boundary(
    labels: Labels, *, thickness: int = 1, edge_mode: str = "all", mode: str = "2d"
) -> npt.NDArray[np.bool_]:
    """Return whether a different label lies within `thickness` steps of a voxel.

    Both sides of an edge are marked. The rim of the volume is no edge, so the target of a patch
    never depends on where it was cut.

    Args:
        labels: Instance ids (Z, Y, X), 0 outside.
        thickness: Steps along the axes, from 1.
        edge_mode: `all` and `seg-all` count every edge of an instance, `seg-no-bg` only edges
            between two instances. The first two are one for ids from 0; both names are kept.
            `inner` marks the instances' own side alone, so that an instance is a border around a
            core.
        mode: `2d` looks for neighbours within the section, `3d` across sections too.

    Returns:
        Shape of `labels`.

    Raises:
        ValueError: An unknown mode, a thickness under 1, labels that are not (Z, Y, X) integers.

    Source:
        `instance_boundary` of PyTorch Connectomics, equal to it at thickness 1; `inner` is the
        border of nnU-Net's border and core.
    """
    volume = _checked(labels, dimensions=3)
    _check_boundary(thickness, edge_mode, mode)
    boundary = np.zeros(volume.shape, dtype=bool)
    _mark_boundary(volume, boundary, thickness, edge_mode, mode)
    return boundary


def instance_edt(
    labels: Labels,
    *,
    mode: str = "3d",
    voxel_size_nm: Sequence[float] | None = None,
    quantize: bool = False,
) -> npt.NDArray[np.float32]:
    """Return each instance's distance to its own surface over its largest distance.

    The work is done per instance, in its bounding box. Holes count as inside. Pieces of one id
    that do not touch (26 neighbours) are instances of their own: a small piece is normalised by
    its own maximum.

    Args:
        labels: Instance ids (Z, Y, X), 0 outside.
        mode: `3d`, or `2d` for the distance within each section.
        voxel_size_nm: Voxel size (z, y, x); unit voxels without it. Only the ratio matters, since
            the distance is divided by the instance's own maximum.
        quantize: Return the class 0 (outside) to 10 instead of the distance.

    Returns:
        float32, shape of `labels`; above 0 and at most 1 inside, -1 outside.

    Raises:
        ValueError: An unknown mode, a voxel size that is not three positive numbers, labels that
            are not (Z, Y, X) integers.

    Source:
        `instance_edt` of PyTorch Connectomics, which knows unit voxels only.
    """
    volume = _checked(labels, dimensions=3)
    if mode not in MODES:
        raise ValueError(f"instance_edt: mode is {mode!r}. Known: {', '.join(MODES)}.")
    sampling = _sampling(voxel_size_nm)
    distance = np.full(volume.shape, OUTSIDE, dtype=np.float32)
    if mode == "3d":
        _fill_distances(volume, sampling, distance)
    else:
        for section, into in zip(volume, distance, strict=True):
            _fill_distances(section, sampling[1:], into)
    if not quantize:
        return distance
    bins = [OUTSIDE, *(level / QUANTIZE_LEVELS for level in range(QUANTIZE_LEVELS)), 1.1]
    return np.asarray(np.digitize(distance, bins) - 1, dtype=np.float32)


TARGETS: dict[str, Callable[..., npt.NDArray[Any]]] = {
    "binary": binary_target,
    "instance_boundary": instance_boundary,
    "instance_edt": instance_edt,
}


def derive_targets(
    labels: Tensor,
    edt: Tensor,
    *,
    thickness: int = 1,
    edge_mode: str = "all",
    mode: str = "2d",
) -> Tensor:
    """Return the three targets of a batch of patches, on the device of the patches.

    Args:
        labels: Instance ids (B, Z, Y, X), any integer type, after the warp.
        edt: Distance (B, Z, Y, X), computed on the volume and warped along.
        thickness: As in `instance_boundary`.
        edge_mode: As in `instance_boundary`.
        mode: As in `instance_boundary`.

    Returns:
        float32 (B, 3, Z, Y, X): binary, boundary, distance.

    Raises:
        ValueError: Shapes that differ or are not (B, Z, Y, X), or an unknown mode.
    """
    if labels.ndim != 4 or labels.shape != edt.shape:
        raise ValueError(
            f"derive_targets: labels {tuple(labels.shape)} and edt {tuple(edt.shape)} must both "
            "be (B, Z, Y, X)."
        )
    _check_boundary(thickness, edge_mode, mode)
    boundary = torch.zeros(labels.shape, dtype=torch.bool, device=labels.device)
    _mark_boundary(labels, boundary, thickness, edge_mode, mode)
    targets = torch.empty(
        (labels.shape[0], 3, *labels.shape[1:]), dtype=torch.float32, device=labels.device
    )
    targets[:, 0] = labels > 0
    targets[:, 1] = boundary
    targets[:, 2] = edt
    return targets


def _mark_boundary(labels: Any, boundary: Any, thickness: int, edge_mode: str, mode: str) -> None:
    """Mark boundary voxels in place; numpy arrays and tensors alike, the last axes (z, y, x)."""
    axes = (-3, -2, -1) if mode == "3d" else (-2, -1)
    for axis in axes:
        low, high = _neighbours(axis)
        edge = labels[low] != labels[high]
        if edge_mode == "seg-no-bg":
            edge &= (labels[low] > 0) & (labels[high] > 0)
        boundary[low] |= edge
        boundary[high] |= edge
    for _ in range(thickness - 1):
        before = boundary.clone() if isinstance(boundary, Tensor) else boundary.copy()
        for axis in axes:
            low, high = _neighbours(axis)
            boundary[low] |= before[high]
            boundary[high] |= before[low]
    if edge_mode == "inner":
        boundary &= labels > 0


def _neighbours(axis: int) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Return the index of every voxel but the last along an axis from the end, and of the next."""
    behind = (slice(None),) * (-axis - 1)
    return (..., slice(None, -1), *behind), (..., slice(1, None), *behind)


def _fill_distances(labels: Labels, sampling: Sequence[float], into: npt.NDArray[Any]) -> None:
    """Write the normalised distance of each instance of a section or a volume."""
    for window, instance in _instances(labels):
        inside = np.asarray(binary_fill_holes(instance))
        if inside.all():
            # No background in reach: scipy would measure to a voxel that does not exist. The rim
            # stands in for it, so that an instance that fills its window still has a middle.
            padded = distance_transform_edt(np.pad(inside, 1), sampling)
            distance = padded[(slice(1, -1),) * inside.ndim]
        else:
            distance = distance_transform_edt(inside, sampling)
        # Where an instance lies in the filled hole of another, the larger distance counts.
        np.maximum(into[window], distance / distance.max(), out=into[window], where=inside)


def _instances(labels: Labels) -> Iterator[tuple[Window, npt.NDArray[np.bool_]]]:
    """Yield window and mask of each connected piece of each id, the window wider by a voxel."""
    pieces = connected_pieces(labels)
    for piece, box in enumerate(find_objects(pieces), start=1):
        if box is None:
            continue
        window = tuple(slice(max(s.start - 1, 0), s.stop + 1) for s in box)
        yield window, pieces[window] == piece


def connected_pieces(labels: Labels) -> npt.NDArray[np.int32]:
    """Return the labels with each connected piece of each id (all neighbours) under its own id.

    Args:
        labels: Instance ids, 0 outside; two or three axes.
    """
    return np.asarray(label_pieces(labels, background=0, connectivity=labels.ndim), dtype=np.int32)


def _sampling(voxel_size_nm: Sequence[float] | None) -> tuple[float, float, float]:
    """Return the voxel size, or unit voxels."""
    if voxel_size_nm is None:
        return (1.0, 1.0, 1.0)
    size = tuple(float(value) for value in voxel_size_nm)
    if len(size) != 3 or not all(np.isfinite(value) and value > 0 for value in size):
        raise ValueError(
            f"instance_edt: voxel_size_nm is {list(voxel_size_nm)}, but must be three positive "
            "numbers (z, y, x), as 30, 8, 8."
        )
    return (size[0], size[1], size[2])


def _checked(labels: Labels, dimensions: int | None = None) -> Labels:
    """Return the labels, or say what they should be."""
    array = np.asarray(labels)
    if array.dtype.kind not in "iub":
        raise ValueError(f"Labels are {array.dtype}, but instance ids must be integers.")
    if dimensions is not None and array.ndim != dimensions:
        raise ValueError(f"Labels have shape {array.shape}, but must be (Z, Y, X).")
    return array


def _check_boundary(thickness: int, edge_mode: str, mode: str) -> None:
    """Refuse what `instance_boundary` does not know."""
    if mode not in MODES:
        raise ValueError(f"instance_boundary: mode is {mode!r}. Known: {', '.join(MODES)}.")
    if edge_mode not in EDGE_MODES:
        raise ValueError(
            f"instance_boundary: edge_mode is {edge_mode!r}. Known: {', '.join(EDGE_MODES)}."
        )
    if thickness < 1:
        raise ValueError(f"instance_boundary: thickness is {thickness}, but must be 1 or more.")
