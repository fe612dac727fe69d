"""Where the patches of a volume may lie: voxels of its mask and of its instances."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hydralv_tune.data.volumes import Sections

Ints = npt.NDArray[np.int64]

MOST_PLACES = 1 << 20
"""Voxels remembered as places to sample from, of the mask and of the instances each: 8 MB."""

KEY_BITS = 32
"""Of the random keys that decide which voxels are remembered."""


@dataclass(frozen=True)
class Places:
    """Where patches of one volume may lie.

    Args:
        name: Of the volume.
        shape: (z, y, x) with the padding.
        valid: Flat indices of voxels in the mask, a random subset where there are many; None
            where every voxel counts.
        valid_voxels: How many voxels count.
        instances: Flat indices of voxels of instances, grouped by instance.
        first: Start of each instance's group.
        sizes: Length of each group.
    """

    name: str
    shape: tuple[int, int, int]
    valid: Ints | None
    valid_voxels: int
    instances: Ints
    first: Ints
    sizes: Ints


def find_sampling_locations(
    name: str,
    label: Sections,
    mask: Sections | None,
    *,
    pad: Sequence[int],
    seed: int,
) -> Places:
    """Return where patches of a volume may lie, reading one section at a time.

    Args:
        name: Of the volume.
        label: (Z, Y, X) integers, in memory or on disk.
        mask: (Z, Y, X), above 0 where a voxel counts; None where every one does.
        pad: Voxels (z, y, x) added on both sides.
        seed: Of the subset that is remembered.
    """
    rng = np.random.default_rng(seed)
    depth, height, width = (side + 2 * p for side, p in zip(label.shape, pad, strict=True))
    valid, instances = _Kept(rng), _Kept(rng)
    voxels = 0
    masks = iter(mask) if mask is not None else None
    for z, section in enumerate(label):
        inside = section > 0
        if masks is not None:
            counts = next(masks) > 0
            inside &= counts
            found = _flat(counts, z, pad, height, width)
            valid.add(np.zeros_like(found), found)
            voxels += len(found)
        instances.add(section[inside].astype(np.int64), _flat(inside, z, pad, height, width))
    ids, flat = instances.result()
    _, first, sizes = np.unique(ids, return_index=True, return_counts=True)
    return Places(
        name=name,
        shape=(depth, height, width),
        valid=None if mask is None else valid.result()[1],
        valid_voxels=int(np.prod(label.shape)) if mask is None else voxels,
        instances=flat,
        first=first.astype(np.int64),
        sizes=sizes.astype(np.int64),
    )


def _flat(inside: npt.NDArray[Any], z: int, pad: Sequence[int], height: int, width: int) -> Ints:
    """Return the flat indices, in the padded volume, of the voxels of a section."""
    y, x = np.nonzero(inside)
    return (((z + pad[0]) * height + y + pad[1]) * width + x + pad[2]).astype(np.int64)


class _Kept:
    """Some `MOST_PLACES` of the voxels that are added, as many of each group as let all fit.

    Each voxel draws a random key, and those of the smallest keys stay. So every voxel of a group is
    as likely to be kept, whenever it came and however often the others were thinned.
    """

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng
        empty = np.zeros(0, np.int64)
        self._parts: list[tuple[Ints, Ints]] = [(empty, empty)]
        self._new = 0
        self._largest = empty

    def add(self, ids: Ints, flat: Ints) -> None:
        """Take voxels in, each with the id of its group, up to 31 bits."""
        # One number that sorts by group, then by key: five times faster than to sort by both.
        keys = ids << KEY_BITS | self._rng.integers(1 << KEY_BITS, size=len(flat))
        if len(self._largest):
            # A full group takes nothing above its largest key: what is to be sorted stays small.
            full = self._largest >> KEY_BITS
            at = np.searchsorted(full, ids).clip(max=len(full) - 1)
            wanted = (full[at] != ids) | (keys < self._largest[at])
            keys, flat = keys[wanted], flat[wanted]
        self._parts.append((keys, flat))
        self._new += len(flat)
        if self._new > MOST_PLACES:
            self._thin()

    def result(self) -> tuple[Ints, Ints]:
        """Return ids and flat indices, sorted by both."""
        if sum(len(flat) for _, flat in self._parts) > MOST_PLACES:
            self._thin()
        keys, flat = (np.concatenate(column) for column in zip(*self._parts, strict=True))
        order = np.argsort(flat)
        order = order[np.argsort(keys[order] >> KEY_BITS, kind="stable")]
        return keys[order] >> KEY_BITS, flat[order]

    def _thin(self) -> None:
        """Drop the largest keys of each group that is over its share."""
        keys, flat = (np.concatenate(column) for column in zip(*self._parts, strict=True))
        order = np.argsort(keys)
        keys, flat = keys[order], flat[order]
        _, first, sizes = np.unique(keys >> KEY_BITS, return_index=True, return_counts=True)
        limit = max(MOST_PLACES // len(sizes), 1)
        self._largest = keys[first[sizes >= limit] + limit - 1]
        kept = np.arange(len(keys)) - np.repeat(first, sizes) < limit
        self._parts, self._new = [(keys[kept], flat[kept])], 0
