"""Patches with known instances, and an augmentation applied for certain; for the tests of both."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from hydralv_tune.numerics.augmentation.augment import apply_one
from hydralv_tune.numerics.augmentation.patches import Patches
from hydralv_tune.numerics.augmentation.registry import AUGMENTATIONS
from hydralv_tune.numerics.targets import instance_edt

SHAPE = (10, 40, 40)
NM = (30.0, 8.0, 8.0)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_patches(
    batch: int = 2, shape: tuple[int, int, int] = SHAPE, *, voxel_size_nm: Any = None, **kwargs: Any
) -> Patches:
    """Return patches of noise with two boxes as instances each, all of one voxel size."""
    labels = np.zeros((batch, *shape), dtype=np.int32)
    labels[:, 2:6, 5:13, 5:13] = 1
    labels[:, 4:8, 25:34, 20:30] = 2
    return Patches(
        image=torch.rand((batch, 1, *shape), generator=seeded(9)),
        labels=torch.from_numpy(labels),
        edt=torch.from_numpy(np.stack([instance_edt(volume) for volume in labels])),
        mask=torch.ones(labels.shape, dtype=torch.bool),
        voxel_sizes_nm=(voxel_size_nm,) * batch,
        **kwargs,
    )


def applied(name: str, patches: Patches, seed: int = 0, **knobs: Any) -> Patches:
    return apply_one(AUGMENTATIONS[name], patches, {"prob": 1.0, **knobs}, seeded(seed))


def changed(before: Patches, after: Patches) -> Tensor:
    """Return which voxels of the image differ (B, Z, Y, X)."""
    return (before.image != after.image)[:, 0]
