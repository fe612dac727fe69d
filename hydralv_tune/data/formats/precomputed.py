"""Neuroglancer's precomputed volumes, on disk or in a public bucket: scales, offsets, x first."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from hydralv_tune.config.errors import VolumeError
from hydralv_tune.data.formats.interface import Stored, WritableArray
from hydralv_tune.data.formats.location import Location
from hydralv_tune.data.formats.tensors import Tensors, read_file, store_of
from hydralv_tune.data.voxel_size import Placement, in_nm

BLOCK = (64, 64, 64)
SMALLEST_LEVEL = 256
"""Voxels of the longest side of a pyramid's coarsest level."""
DRIVER = "neuroglancer_precomputed"


def open_stored(location: Location) -> Stored:
    """Open the finest scale, or the one whose key is named as the dataset.

    Raises:
        VolumeError: There is no such scale. tensorstore raises what else it cannot read.
    """
    scales = _information(location)["scales"]
    keys = [str(scale["key"]) for scale in scales]
    if location.dataset is not None and location.dataset not in keys:
        raise VolumeError(
            f"{location}: there is no scale '{location.dataset}'. It has: {', '.join(keys)}."
        )
    index = 0 if location.dataset is None else keys.index(location.dataset)
    array = Tensors(
        {"driver": DRIVER, "kvstore": store_of(location.url or location.path), "scale_index": index}
    )
    scale = scales[index]
    size = in_nm(scale["resolution"][::-1], [1.0] * 3)
    offset = scale.get("voxel_offset", [0, 0, 0])
    origin = None
    if size is not None:
        places = [o * s for o, s in zip(offset[::-1], size, strict=True)]
        origin = in_nm(places, [1.0] * 3, positive=False)
    return Stored(array, ("x", "y", "z", "c"), Placement(size, origin), array.chunks)


@contextmanager
def create(
    location: Location,
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    chunks: tuple[int, ...] | None,
    placement: Placement,
) -> Iterator[WritableArray]:
    """Give a volume to write to: a segmentation where its integers have over 8 bits, else an image.

    Its voxel size is 1 nm where none is known, since the format must have one; its origin is
    rounded to whole voxels. Coarser scales, every other voxel each, follow at the end.
    """
    import tensorstore

    if len(shape) not in (3, 4):
        raise VolumeError(
            f"{location}: shape {shape}, but precomputed holds (Z, Y, X) or channels."
        )
    segmentation = dtype.kind in "iu" and dtype.itemsize > 1 and len(shape) == 3
    stored = _stored_type(dtype, segmentation)
    size = placement.voxel_size_nm or (1.0, 1.0, 1.0)
    origin = placement.origin_nm or (0.0, 0.0, 0.0)
    wide = stored.itemsize >= 4 and segmentation
    scale: dict[str, Any] = {
        "size": list(shape[:-4:-1]),
        "resolution": list(size[::-1]),
        "voxel_offset": [round(o / s) for o, s in zip(origin[::-1], size[::-1], strict=True)],
        "chunk_size": list(BLOCK),
        "encoding": "compressed_segmentation" if wide else "raw",
    }
    if wide:
        scale["compressed_segmentation_block_size"] = [8, 8, 8]
    location.path.mkdir(parents=True)
    specification: dict[str, Any] = {
        "driver": DRIVER,
        "kvstore": {"driver": "file", "path": f"{location.path}/"},
        "multiscale_metadata": {
            "type": "segmentation" if segmentation else "image",
            "data_type": stored.name,
            "num_channels": shape[0] if len(shape) == 4 else 1,
        },
    }
    store = tensorstore.open(
        {**specification, "scale_metadata": scale}, create=True, open=True
    ).result()
    yield _Writer(store[tensorstore.d[:].translate_to[0]], shape, stored)
    while max(scale["size"][:2]) > SMALLEST_LEVEL:
        store, scale = _halved(store, specification, scale)


def _halved(
    store: Any, specification: Mapping[str, Any], scale: Mapping[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """Write the next scale, every other voxel of the one before, and return it."""
    import tensorstore

    # Sections are thicker than pixels: z is halved once the pixels are as large.
    x, y, z = scale["resolution"]
    steps = (2, 2, 2 if z <= x else 1)
    coarse = tensorstore.downsample(store, [*steps, 1], method="stride")
    low, size = coarse.domain.inclusive_min[:3], coarse.shape[:3]
    following = {
        **scale,
        "size": list(size),
        "voxel_offset": list(low),
        "resolution": [r * s for r, s in zip((x, y, z), steps, strict=True)],
    }
    target = tensorstore.open(
        {**specification, "scale_metadata": following}, create=True, open=True
    ).result()
    for first in range(low[2], low[2] + size[2], BLOCK[2]):
        part = slice(first, min(first + BLOCK[2], low[2] + size[2]))
        target[:, :, part].write(coarse[:, :, part].read().result()).result()
    return target, following


def _stored_type(dtype: np.dtype[Any], segmentation: bool) -> np.dtype[Any]:
    """Return the type that neuroglancer shows: unsigned ids, bytes, or single precision."""
    if segmentation:
        return np.dtype(np.uint64 if dtype.itemsize == 8 else np.uint32)
    return np.dtype(np.uint8 if dtype in (np.uint8, np.bool_) else np.float32)


class _Writer:
    """Takes boxes in z, y, x and writes them as x, y, z.

    Args:
        store: Of tensorstore, (x, y, z, c).
        shape: (Z, Y, X), or channels first.
        dtype: That it is stored in.
    """

    def __init__(self, store: Any, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self._store, self._shape, self._dtype = store, shape, dtype

    def __setitem__(self, box: Any, values: np.ndarray) -> None:
        """Write a box."""
        parts = list(box) if isinstance(box, tuple) else [box]
        parts = [part for part in parts if part is not Ellipsis]
        parts += [slice(None)] * (len(self._shape) - len(parts))
        where = [slice(*p.indices(n)) for p, n in zip(parts, self._shape, strict=True)]
        block = np.broadcast_to(values, [s.stop - s.start for s in where]).astype(self._dtype)
        if block.ndim == 3:
            where, block = [slice(0, 1), *where], block[None]
        self._store[tuple(where[::-1])].write(block.T).result()


def _information(location: Location) -> Mapping[str, Any]:
    """Return the content of `info`."""
    content = read_file(location.url or location.path, "info")
    if content is None:
        raise VolumeError(
            f"{location}: there is no file 'info' in it, so it is no precomputed volume, or not a "
            "public one. Check the path."
        )
    information = json.loads(content)
    if information.get("type") not in ("image", "segmentation") or not information.get("scales"):
        raise VolumeError(
            f"{location}: its info is of type {information.get('type')!r}, not an image or a "
            "segmentation. Name the folder of a volume."
        )
    return dict(information)
