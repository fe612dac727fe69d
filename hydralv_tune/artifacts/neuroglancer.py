"""A view in neuroglancer: image, truth, segmentation and a point on each wrong instance."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from hydralv_tune.artifacts.writing import write_atomically
from hydralv_tune.data.formats.files import create_array, open_lazy
from hydralv_tune.numerics.metrics.contingency import SLAB, ContingencyTable
from hydralv_tune.numerics.metrics.instance_errors import segment_kinds, truth_kinds

Point = tuple[str, int, tuple[int, int, int]]
"""What is wrong, the id, and a voxel (z, y, x) of the instance."""

SERVER = "http://127.0.0.1:9000"
BLOCK_SECTIONS = 64
"""Sections in memory at once while a volume is written: a block of precomputed holds as many."""


class Sliceable(Protocol):
    """(Z, Y, X) in memory or on disk."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, part: slice) -> Any: ...


def wrong_instances(
    prediction: Sliceable, truth: Sliceable, compared: ContingencyTable
) -> list[Point]:
    """Return a point on each instance that is missed, split, merged or invented.

    Args:
        prediction: (Z, Y, X) labels, in memory or on disk; read slab by slab.
        truth: (Z, Y, X) labels, likewise.
        compared: The table of both.
    """
    wrong = {i: kind for i, kind in truth_kinds(compared).items() if kind != "true"}
    invented = {i: kind for i, kind in segment_kinds(compared).items() if kind == "invented"}
    return [
        (kinds[number], number, place)
        for labels, kinds in ((truth, wrong), (prediction, invented))
        for number, place in _inside(labels, sorted(kinds)).items()
    ]


def _slabs(labels: Sliceable) -> Iterator[slice]:
    """Return slabs of a few sections, from the first section to the last."""
    return (slice(z, min(z + SLAB, labels.shape[0])) for z in range(0, labels.shape[0], SLAB))


def _inside(labels: Sliceable, ids: Sequence[int]) -> dict[int, tuple[int, int, int]]:
    """Return for each id its voxel (z, y, x) nearest to its centre, which may lie outside it."""
    numbers = np.array(ids, np.int64)
    count = np.zeros(len(ids))
    total = np.zeros((len(ids), 3))
    for voxels, rows in _voxels_of(labels, numbers):
        count += np.bincount(rows, minlength=len(ids))
        for axis in range(3):
            total[:, axis] += np.bincount(rows, voxels[:, axis], minlength=len(ids))
    centres = total / np.maximum(count, 1)[:, None]
    nearest = np.full(len(ids), np.inf)
    places = np.zeros((len(ids), 3), np.int64)
    for voxels, rows in _voxels_of(labels, numbers):
        apart = np.linalg.norm(voxels - centres[rows], axis=1)
        order = np.lexsort((apart, rows))
        found, first = np.unique(rows[order], return_index=True)
        best = order[first]
        closer = apart[best] < nearest[found]
        nearest[found[closer]] = apart[best[closer]]
        places[found[closer]] = voxels[best[closer]]
    return {number: (int(z), int(y), int(x)) for number, (z, y, x) in zip(ids, places, strict=True)}


def _voxels_of(
    labels: Sliceable, numbers: npt.NDArray[np.int64]
) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
    """Yield, slab by slab, voxels (n, 3) of the given ids, and the row (n,) of each one's id."""
    for part in _slabs(labels):
        values = np.asarray(labels[part])
        voxels = np.argwhere(np.isin(values, numbers))
        rows = np.searchsorted(numbers, values[tuple(voxels.T)].astype(np.int64))
        voxels[:, 0] += part.start
        yield voxels, rows


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


def write_view(
    folder: str | Path,
    volumes: Mapping[str, str | Path],
    *,
    compared: ContingencyTable | None = None,
    progress: Callable[[str, int, int], None] = lambda step, done, whole: None,
) -> Path:
    """Write volumes as neuroglancer reads them, a state that shows them, and return its path.

    Args:
        folder: A folder to serve; `NAME.precomputed` and `state.json` go there.
        volumes: Files by name: `image`, `segmentation`, and `truth` where there is one.
        compared: The table of segmentation and truth; then each wrong instance gets a point.
        progress: Told the step, the sections done and those there are.

    Raises:
        VolumeError: A file cannot be read, or the folder cannot be written.
    """
    target = Path(folder)
    with ExitStack() as stack:
        opened = {
            name: stack.enter_context(open_lazy(path, ndim=3)) for name, path in volumes.items()
        }
        placed = [*opened.values()]  # the image first; a mask may have told the segmentation
        size = next((one.voxel_size_nm for one in placed if one.voxel_size_nm), (1.0, 1.0, 1.0))
        origin = next((one.origin_nm for one in placed if one.origin_nm), (0.0, 0.0, 0.0))
        for name, array in opened.items():
            dtype = _shown_type(array.dtype, image=name == "image")
            with create_array(
                target / f"{name}.precomputed", array.shape, dtype, voxel_size_nm=size,
                origin_nm=origin,
            ) as out:  # fmt: skip
                for z in range(0, array.shape[0], BLOCK_SECTIONS):
                    end = min(z + BLOCK_SECTIONS, array.shape[0])
                    out[z:end, :, :] = array[z:end].astype(dtype)
                    progress(f"write {name}", end, array.shape[0])
        points: list[Point] = []
        if compared is not None:
            points = wrong_instances(opened["segmentation"], opened["truth"], compared)
    state = neuroglancer_state(
        {name: f"precomputed://{SERVER}/{name}.precomputed" for name in volumes},
        voxel_size_nm=size, origin_nm=origin, points=points,
    )  # fmt: skip
    return write_neuroglancer_state(target / "state.json", state)


def _shown_type(dtype: np.dtype[Any], *, image: bool) -> np.dtype[Any]:
    """Return the type that the precomputed format takes for an image or a segmentation."""
    if image:
        return np.dtype(np.uint8 if dtype in (np.uint8, np.bool_) else np.float32)
    return np.dtype(np.uint64 if dtype.itemsize == 8 else np.uint32)


def write_neuroglancer_state(path: str | Path, state: Mapping[str, Any]) -> Path:
    """Write a state as JSON, to be pasted into neuroglancer's editor, and return its path."""
    return write_atomically(path, (json.dumps(state, indent=1) + "\n").encode())
