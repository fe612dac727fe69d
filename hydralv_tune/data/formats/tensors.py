"""Arrays and files that tensorstore opens, here or elsewhere, read when asked for."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hydralv_tune.config.errors import InputError, VolumeError
from hydralv_tune.data.formats import check_installed

FEW_RETRIES = {"max_retries": 3, "initial_delay": "500ms", "max_delay": "4s"}
"""While a volume is opened: some seconds. tensorstore's own 32, good for what is read later, would
keep a wrong address waiting for a quarter of an hour."""
MISSING = ("HTTP code 403", "HTTP code: 403", "PERMISSION_DENIED")
"""What stores answer for what is not there to someone who may not list them."""


def store_of(place: Path | str) -> Mapping[str, Any] | str:
    """Return what tensorstore needs to reach a folder, or what a URL names."""
    return f"{place}/" if isinstance(place, str) else {"driver": "file", "path": f"{place}/"}


def read_file(place: Path | str, name: str) -> bytes | None:
    """Return the content of a file in a folder or at a URL; None where there is none.

    Raises:
        InputError: tensorstore is not installed.
        VolumeError: Nobody answers. tensorstore raises ValueError for what else goes wrong.
    """
    check_installed(f"What is elsewhere ({place})", "tensorstore")
    import tensorstore

    few = dict.fromkeys((f"{kind}_request_retries" for kind in ("http", "gcs", "s3")), FEW_RETRIES)
    store = tensorstore.KvStore.open(store_of(place), context=tensorstore.Context(few)).result()
    try:
        content = store.read(name).result()
    except ValueError as error:
        if any(word in str(error) for word in MISSING):
            return None
        if "retry attempts failed" not in str(error):
            raise
        reason = str(error).partition("failed: ")[2][:200]
        raise VolumeError(
            f"{place}: no answer from there ({reason}). Check the address and the network."
        ) from error
    return bytes(content.value) if content.state == "value" else None


def read_mapping(url: str, name: str) -> dict[str, Any]:
    """Return the content of a JSON file at a URL; empty where there is none.

    Some servers answer with a page, or send elsewhere, for whatever they do not have.

    Raises:
        InputError: As for `read_file`.
    """
    try:
        content = json.loads(read_file(url, name) or b"{}")
    except InputError:
        raise
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def parents_of(url: str) -> list[str]:
    """Return the URLs above one, the nearest first, down to its host."""
    parents, above = [], url.rpartition("/")[0]
    while "://" in above:
        parents.append(above)
        above = above.rpartition("/")[0]
    return parents


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
