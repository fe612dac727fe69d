"""Where the patches of a volume may lie: voxels of its mask and of its instances."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hydralv_tune.disk.volumes import Sections

Ints = npt.NDArray[np.int64]

MOST_PLACES = 1 << 20
"""Voxels remembered as places to sample from, of the mask and of the instances each: 8 MB."""


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


def find_places(
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
        self._parts: list[tuple[Ints, Ints, npt.NDArray[np.float64]]] = [
            (empty, empty, np.zeros(0))
        ]
        self._new = 0
        self._full, self._cutoffs = empty, np.zeros(0)

    def add(self, ids: Ints, flat: Ints) -> None:
        """Take voxels in, each with the id of its group."""
        keys = self._rng.random(len(flat))
        if len(self._full):
            # A full group takes nothing above its largest key: what is sorted stays small.
            at = np.searchsorted(self._full, ids).clip(max=len(self._full) - 1)
            wanted = (self._full[at] != ids) | (keys < self._cutoffs[at])
            ids, flat, keys = ids[wanted], flat[wanted], keys[wanted]
        self._parts.append((ids, flat, keys))
        self._new += len(flat)
        if self._new > MOST_PLACES:
            self._thin()

    def result(self) -> tuple[Ints, Ints]:
        """Return ids and flat indices, sorted by both."""
        if sum(len(flat) for _, flat, _ in self._parts) > MOST_PLACES:
            self._thin()
        ids, flat = (np.concatenate([part[i] for part in self._parts]) for i in range(2))
        order = np.lexsort((flat, ids))
        return ids[order], flat[order]

    def _thin(self) -> None:
        """Drop the largest keys of each group that is over its share."""
        ids, flat, keys = (np.concatenate(column) for column in zip(*self._parts, strict=True))
        order = np.lexsort((keys, ids))
        ids, flat, keys = ids[order], flat[order], keys[order]
        groups, first, sizes = np.unique(ids, return_index=True, return_counts=True)
        limit = max(MOST_PLACES // len(groups), 1)
        full = sizes >= limit
        self._full, self._cutoffs = groups[full], keys[first[full] + limit - 1]
        kept = np.arange(len(ids)) - np.repeat(first, sizes) < limit
        self._parts, self._new = [(ids[kept], flat[kept], keys[kept])], 0
