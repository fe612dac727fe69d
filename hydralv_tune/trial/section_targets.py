"""What a candidate is trained on, of one section: for pictures."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from hydralv_tune.config.candidate import Data
from hydralv_tune.data.volumes import Volume
from hydralv_tune.numerics.targets import instance_boundary, instance_edt
from hydralv_tune.trial.training.sampling import (
    boundary_arguments,
    distance_arguments,
    known_voxel_size,
)

Array = npt.NDArray[Any]


def section_targets(data: Data, volume: Volume, z: int) -> npt.NDArray[np.float32]:
    """Return the three targets of a section, from as much of the volume as they depend on.

    Args:
        data: `data` of the candidate.
        volume: With a label, in memory.
        z: The section.

    Returns:
        float32 (3, Y, X): binary, boundary, distance.
    """
    label = volume.label
    assert label is not None, "checked by the split"
    boundary = boundary_arguments(data)
    thickness = int(boundary.get("thickness", 1))
    first = max(z - thickness, 0)
    start, whole = _instances_of(label, z)
    return np.stack(
        [
            label[z] > 0,
            instance_boundary(label[first : z + thickness + 1], **boundary)[z - first],
            instance_edt(whole, **_distance_arguments(data, volume))[z - start],
        ]
    ).astype(np.float32)


def _distance_arguments(data: Data, volume: Volume) -> dict[str, Any]:
    """Return the arguments of the distance; a volume that is only scored may lack a voxel size."""
    if known_voxel_size(data, volume) is None:
        unit = data.label_transform.model_copy(update={"edt_voxel_size": "unit"})
        data = data.model_copy(update={"label_transform": unit})
    return distance_arguments(data, volume)


def _instances_of(label: Array, z: int) -> tuple[int, Array]:
    """Return the instances of a section as far as they reach, a section more, and its first."""
    ids = np.unique(label[z])
    ids = ids[ids > 0]
    start, stop = z, z + 1
    while start > 0 and np.isin(label[start], ids).any():
        start -= 1
    while stop < len(label) and np.isin(label[stop - 1], ids).any():
        stop += 1
    slab = label[start:stop]
    return start, np.where(np.isin(slab, ids), slab, 0)
