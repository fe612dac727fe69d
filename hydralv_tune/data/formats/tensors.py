"""Arrays that tensorstore opens: one slice an axis, read when asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


class Tensors:
    """An array of tensorstore that begins at 0 along each axis and gives NumPy arrays.

    Args:
        specification: As tensorstore takes it; an existing array is opened, for reading.
        context: Of tensorstore, where the specification needs one.
    """

    def __init__(self, specification: Mapping[str, Any], context: Any = None) -> None:
        import tensorstore

        store = tensorstore.open(
            dict(specification), read=True, open=True, context=context
        ).result()
        self._store = store[tensorstore.d[:].translate_to[0]]
        self.shape: tuple[int, ...] = tuple(self._store.shape)
        self.dtype: np.dtype[Any] = self._store.dtype.numpy_dtype
        self.chunks: tuple[int, ...] = tuple(
            int(n or 1) for n in store.chunk_layout.read_chunk.shape or ()
        )

    def __getitem__(self, box: Sequence[slice]) -> np.ndarray:
        """Return a box in memory."""
        return np.asarray(self._store[tuple(box)].read().result())
