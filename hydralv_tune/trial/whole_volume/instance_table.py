"""A table of instances: where each lies, how large it is and what shape it has."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage
from skimage.measure import marching_cubes, mesh_surface_area, regionprops_table

if TYPE_CHECKING:
    import pandas as pd

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class InstanceTable:
    """One row an instance, as columns of equal length; `id` is the id in the segmentation."""

    columns: Mapping[str, Array]

    def __len__(self) -> int:
        return len(self.columns["id"])

    @classmethod
    def joined(cls, parts: Sequence[Mapping[str, Array]], firsts: Sequence[int]) -> InstanceTable:
        """Return the tables of several blocks as one.

        Args:
            parts: Of each block, with ids from 1.
            firsts: What is added to the ids of each.
        """
        moved = [
            {**part, "id": part["id"] + first}
            for part, first in zip(parts, firsts[:-1], strict=True)
        ]
        return cls({key: np.concatenate([part[key] for part in moved]) for key in moved[0]})

    def frame(self) -> pd.DataFrame:
        """Return the table as a DataFrame; columns in nm are left out where no size is known."""
        import pandas as pd

        table = pd.DataFrame(dict(self.columns))
        return table.dropna(axis=1, how="all") if len(table) else table


def instances_of(
    labels: Array, binary: Callable[[int], Array], mask: Array | None, *, first: Sequence[int],
    shape: Sequence[int], voxel_size_nm: Sequence[float] | None,
    origin_nm: Sequence[float] | None,
) -> dict[str, Array]:  # fmt: skip
    """Return the columns of the instances in a box that holds each of them whole.

    Args:
        labels: (z, y, x), ids from 1 without gaps.
        binary: The probability of an instance in section z of the box, (y, x).
        mask: (z, y, x) booleans, or None.
        first: (z, y, x) of the box in the volume.
        shape: (Z, Y, X) of the volume.
        voxel_size_nm: (z, y, x), or None where it is not known.
        origin_nm: (z, y, x) of the volume's first voxel; 0 where None.

    Returns:
        `id`; `centroid_z`, `_y`, `_x` in voxels of the volume and `centroid_z_nm` … in nm;
        `box_z0` … `box_x1`, the bounding box, end excluded; `voxels`, `volume_nm3`;
        `equivalent_diameter_nm`; `surface_nm2` of the mesh around its voxels, whose steps make it
        some 10 to 15 % larger than a smooth surface; `sphericity`, from that surface; `sections`;
        `touches_border`, of the volume; `touches_mask`, its end;
        `probability`, the mean. Columns in nm are NaN where the voxel size is not known.
    """
    found = regionprops_table(labels, properties=("label", "centroid", "bbox", "num_pixels"))
    spacing = np.array([np.nan] * 3 if voxel_size_nm is None else voxel_size_nm, float)
    origin = np.zeros(3) if origin_nm is None else np.asarray(origin_nm, float)
    low = np.array(first)
    columns: dict[str, Array] = {"id": found["label"].astype(np.int64)}
    boxes = np.stack([found[f"bbox-{i}"] for i in range(6)], 1).astype(np.int64).reshape(-1, 2, 3)
    centres = np.stack([found[f"centroid-{axis}"] for axis in range(3)], 1) + low
    for axis, letter in enumerate("zyx"):
        columns[f"centroid_{letter}"] = centres[:, axis]
        columns[f"centroid_{letter}_nm"] = centres[:, axis] * spacing[axis] + origin[axis]
        columns[f"box_{letter}0"] = boxes[:, 0, axis] + low[axis]
        columns[f"box_{letter}1"] = boxes[:, 1, axis] + low[axis]
    voxels = found["num_pixels"].astype(np.int64)
    volume = voxels * float(np.prod(spacing))
    columns |= {"voxels": voxels, "volume_nm3": volume}
    columns["equivalent_diameter_nm"] = np.cbrt(6 * volume / math.pi)
    surfaces = np.array(
        [_surface(labels, i, box, spacing) for i, box in zip(columns["id"], boxes, strict=True)],
        float,
    )
    columns["surface_nm2"] = surfaces
    columns["sphericity"] = np.divide(
        math.pi ** (1 / 3) * np.cbrt(6 * volume) ** 2, surfaces,
        out=np.full(len(surfaces), np.nan), where=surfaces > 0,
    )  # fmt: skip
    columns["sections"] = boxes[:, 1, 0] - boxes[:, 0, 0]
    ends = np.array(shape)
    columns["touches_border"] = ((boxes[:, 0] + low == 0) | (boxes[:, 1] + low == ends)).any(1)
    columns["touches_mask"] = np.array(
        [_at_the_mask(labels, mask, i, box) for i, box in zip(columns["id"], boxes, strict=True)],
        bool,
    )
    columns["probability"] = _mean(labels, binary, len(voxels))[columns["id"] - 1]
    return columns


def _mean(labels: Array, binary: Callable[[int], Array], count: int) -> Array:
    """Return the mean probability of each id from 1, read section by section."""
    sums, sizes = np.zeros(count + 1), np.zeros(count + 1)
    for z, section in enumerate(labels):
        inside = section > 0
        if inside.any():
            ids, weights = section[inside], np.asarray(binary(z)[inside], np.float64)
            sums += np.bincount(ids, weights, minlength=count + 1)
            sizes += np.bincount(ids, minlength=count + 1)
    return sums[1:] / np.maximum(sizes[1:], 1)


def _surface(labels: Array, number: int, box: Array, spacing: Array) -> float:
    """Return the area of an instance's surface in nm², NaN where the voxel size is not known."""
    if np.isnan(spacing).any():
        return math.nan
    part = labels[tuple(slice(a, b) for a, b in zip(*box, strict=True))] == number
    vertices, faces, _, _ = marching_cubes(
        np.pad(part, 1).astype(np.float32), 0.5, spacing=tuple(spacing)
    )
    return float(mesh_surface_area(vertices, faces))


def _at_the_mask(labels: Array, mask: Array | None, number: int, box: Array) -> bool:
    """Return whether an instance has a voxel beside one outside the mask."""
    if mask is None:
        return False
    around = tuple(slice(max(a - 1, 0), b + 1) for a, b in zip(*box, strict=True))
    inner = ndimage.binary_erosion(mask[around] > 0, border_value=1)
    return bool((~inner & (labels[around] == number)).any())


def voxels_of(table: Mapping[str, Array], labels: Array, first: Sequence[int]) -> Array:
    """Return a voxel of each instance, (instances, 3), z, y, x in the volume.

    Args:
        table: Of `instances_of`.
        labels: (z, y, x), that it was made of.
        first: (z, y, x) of their box in the volume.
    """
    low, high = (
        np.stack([table[f"box_{axis}{end}"] for axis in "zyx"], 1) - np.asarray(first)
        for end in (0, 1)
    )
    found = low.copy()
    for row, (number, (z, y, x), (_, y_end, x_end)) in enumerate(
        zip(table["id"], low, high, strict=True)
    ):
        found[row, 1:] += np.argwhere(labels[z, y:y_end, x:x_end] == number)[0]
    return np.asarray(found + np.asarray(first))
