"""A view in neuroglancer: image, truth, segmentation and a point on each wrong instance."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hydralv_tune.artifacts.writing import write_atomically
from hydralv_tune.numerics.metrics.instance_errors import segment_kinds, truth_kinds
from hydralv_tune.numerics.metrics.scores import contingency_table

Labels = npt.NDArray[Any]
Point = tuple[str, int, tuple[int, int, int]]
"""What is wrong, the id, and a voxel (z, y, x) of the instance."""

SERVER = "http://127.0.0.1:9000"


def wrong_instances(prediction: Labels, truth: Labels, mask: Labels | None = None) -> list[Point]:
    """Return a point on each instance that is missed, split, merged or invented.

    Args:
        prediction: (Z, Y, X) labels.
        truth: (Z, Y, X) labels.
        mask: (Z, Y, X), where the score is made; everywhere where None.

    Raises:
        ValueError: Shapes differ.
    """
    table = contingency_table(prediction=prediction, truth=truth, mask=mask)
    points = [
        (kind, number, _inside(truth, number))
        for number, kind in truth_kinds(table).items()
        if kind != "true"
    ]
    invented = [i for i, kind in segment_kinds(table).items() if kind == "invented"]
    return points + [("invented", number, _inside(prediction, number)) for number in invented]


def _inside(labels: Labels, number: int) -> tuple[int, int, int]:
    """Return the voxel of an instance that is nearest to its centre, which may lie outside it."""
    voxels = np.argwhere(labels == number)
    apart = np.linalg.norm(voxels - voxels.mean(axis=0), axis=1)
    z, y, x = (int(n) for n in voxels[apart.argmin()])
    return z, y, x


def neuroglancer_state(
    layers: Mapping[str, str],
    *,
    voxel_size_nm: Sequence[float],
    origin_nm: Sequence[float] = (0.0, 0.0, 0.0),
    points: Sequence[Point] = (),
) -> dict[str, Any]:
    """Return the state of a neuroglancer viewer.

    Args:
        layers: Source by name; `image` is shown as an image, any other as a segmentation.
        voxel_size_nm: (z, y, x).
        origin_nm: (z, y, x) of the first voxel.
        points: Of `wrong_instances`, in voxels from the first one.
    """
    first = [round(o / s) for o, s in zip(origin_nm, voxel_size_nm, strict=True)]
    places = [[float(a + b) + 0.5 for a, b in zip(p, first, strict=True)][::-1] for *_, p in points]
    shown: list[dict[str, Any]] = [
        {"type": "image" if name == "image" else "segmentation", "source": source, "name": name}
        for name, source in layers.items()
    ]
    if points:
        annotations = [
            {
                "type": "point",
                "id": f"{kind}-{number}",
                "point": at,
                "description": f"{kind} {number}",
            }
            for (kind, number, _), at in zip(points, places, strict=True)
        ]
        shown.append(
            {
                "type": "annotation",
                "source": "local://annotations",
                "name": "wrong instances",
                "annotations": annotations,
            }
        )
    size = dict(zip("zyx", voxel_size_nm, strict=True))
    return {
        "dimensions": {axis: [float(f"{size[axis] * 1e-9:.12g}"), "m"] for axis in "xyz"},
        **({"position": places[0]} if places else {}),
        "layers": shown,
        "layout": "4panel",
    }


def write_neuroglancer_state(path: str | Path, state: Mapping[str, Any]) -> Path:
    """Write a state as JSON, to be pasted into neuroglancer's editor, and return its path."""
    return write_atomically(path, (json.dumps(state, indent=1) + "\n").encode())
