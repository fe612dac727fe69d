"""Checkpoints of other tools, read without running anything in them.

A Lightning checkpoint holds, beside its tensors, pickled objects of classes that are not installed
here. Tensors are rebuilt by this module; every other name becomes an inert object that keeps what
was stored for it and does nothing. No name in the file is ever imported or called.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from hydralv_tune.artifacts.records import load_checkpoint
from hydralv_tune.config.errors import CheckpointError

DTYPES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}  # fmt: skip
"""Storages by the name under which torch pickles them."""


class InertObject:
    """What a checkpoint stored for an object of an unknown class.

    It answers every step of unpickling by keeping its operands: arguments, state, items.
    """

    pickled_name: ClassVar[str] = "?"

    def __new__(cls, *arguments: Any, **named: Any) -> InertObject:
        """Return an object that keeps what the class, or function, was called with."""
        made = super().__new__(cls)
        made.__dict__.update(arguments=arguments, state=named, items=[])
        return made

    def __init__(self, *arguments: Any, **named: Any) -> None:
        """Do nothing: `__new__` has kept the arguments."""

    def __setstate__(self, state: Any) -> None:
        """Keep the state."""
        self.__dict__["state"] = state

    def append(self, item: Any) -> None:
        """Keep an item of what was a list or a set."""
        self.__dict__["items"].append(item)

    add = append

    def extend(self, items: Any) -> None:
        """Keep the items of what was a list."""
        self.__dict__["items"].extend(items)

    def __setitem__(self, key: Any, value: Any) -> None:
        """Keep an entry of what was a mapping."""
        self.__dict__["items"].append((key, value))

    def __repr__(self) -> str:
        """Return the name it was pickled under."""
        return f"<inert {self.pickled_name}>"


class _Storage:
    """The type of a storage, which torch pickles by name."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype


class _Unpickler(pickle.Unpickler):
    """Unpickler that resolves no name outside this module."""

    def __init__(self, archive: zipfile.ZipFile, prefix: str) -> None:
        content = _stored(archive, f"{prefix}data.pkl")
        _check_operations(content)
        super().__init__(io.BytesIO(content))
        self.archive, self.prefix = archive, prefix
        self.storages: dict[str, Tensor] = {}
        self.classes: dict[str, type[InertObject]] = {}

    def find_class(self, module: str, name: str) -> Any:
        """Return one of this module's own functions, or an inert class of that name."""
        known = _KNOWN.get((module, name))
        if known is not None:
            return known
        if module in ("torch", "torch.storage") and name in DTYPES:
            return _Storage(DTYPES[name])
        pickled = f"{module}.{name}"
        if pickled not in self.classes:
            self.classes[pickled] = type("InertObject", (InertObject,), {"pickled_name": pickled})
        return self.classes[pickled]

    def persistent_load(self, identity: Any) -> Tensor:
        """Return the flat tensor of a storage record."""
        kind, storage, key, _, count = identity
        if kind != "storage" or not isinstance(storage, _Storage):
            raise ValueError(f"unknown kind of record {kind!r}")
        if key not in self.storages:
            self.storages[key] = self._read(str(key), storage.dtype)
        flat = self.storages[key]
        if flat.dtype != storage.dtype or flat.numel() < count:
            raise ValueError(f"storage {key} is shorter than it claims to be")
        return flat

    def _read(self, key: str, dtype: torch.dtype) -> Tensor:
        """Return the bytes of a record as a flat tensor."""
        content = _stored(self.archive, f"{self.prefix}data/{key}")
        return (
            torch.frombuffer(bytearray(content), dtype=dtype)
            if content
            else torch.empty(0, dtype=dtype)
        )


class _RebuildTensor:
    """Stands for torch's function of that name; without attributes that a file could set."""

    __slots__ = ()

    def __call__(self, storage: Any, offset: int, size: Any, stride: Any, *_: Any) -> Tensor:
        """Return a tensor over a storage; sizes that reach beyond it are refused."""
        if not isinstance(storage, Tensor) or math.prod(size) > storage.numel():
            raise ValueError("a tensor is larger than its storage")
        return torch.as_strided(storage, tuple(size), tuple(stride), int(offset)).clone()


class _RebuildParameter:
    """Stands for torch's function that wraps a tensor as a parameter."""

    __slots__ = ()

    def __call__(self, data: Any, *_: Any) -> Any:
        """Return the tensor itself."""
        return data


_KNOWN = {
    ("torch._utils", "_rebuild_tensor_v2"): _RebuildTensor(),
    ("torch._utils", "_rebuild_parameter"): _RebuildParameter(),
    ("collections", "OrderedDict"): OrderedDict,
}
"""The only names that are resolved; the callables are this module's own."""


def read_inert_checkpoint(path: str | Path) -> dict[str, Any]:
    """Return the content of any checkpoint that torch wrote, without running anything in it.

    Args:
        path: A file as `torch.save` writes it since version 1.6, such as Lightning's `last.ckpt`.

    Returns:
        The stored mapping: tensors on the CPU, plain values, and an `InertObject` for every object
        of a class that is not torch's.

    Raises:
        CheckpointError: There is no such file, or it is damaged or no such checkpoint.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"{path}: no such checkpoint.")
    try:
        with zipfile.ZipFile(path) as archive:
            content = _Unpickler(archive, _prefix(archive)).load()
    except Exception as error:  # a damaged or hostile pickle raises whatever it provokes
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{path}: cannot be read as a checkpoint; nothing in it was run: {reason[:200]}. "
            "Give a file that torch.save wrote."
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{path}: holds a {type(content).__name__}, but a checkpoint is a mapping."
        )
    return content


def read_foreign_checkpoint(path: str | Path) -> dict[str, Any]:
    """Return the content of a checkpoint of this tool or another; nothing in it is run.

    Of safetensors it is the tensors by name.

    Raises:
        CheckpointError: There is no such file, or it is damaged or no checkpoint.
    """
    if Path(path).suffix == ".safetensors":
        return _read_safetensors(Path(path))
    try:
        return load_checkpoint(path)
    except CheckpointError:
        if not zipfile.is_zipfile(path):
            raise
    return read_inert_checkpoint(path)


def _read_safetensors(path: Path) -> dict[str, Any]:
    """Return the tensors of a file of safetensors.

    Raises:
        CheckpointError: There is no such file, or it is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return dict(load_file(path))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: no safetensors can be read there ({error}).") from error


def plain_values(value: Any) -> Any:
    """Return a stored value as plain mappings, lists and scalars.

    An inert object becomes the mapping of its state, or its items, or its arguments. Tensors, and
    what holds itself, become None.

    Raises:
        CheckpointError: It is nested too deeply.
    """
    try:
        return _plain(value, {})
    except RecursionError as error:
        raise CheckpointError(
            "What the checkpoint holds beside its weights is nested too deeply to be read."
        ) from error


def _plain(value: Any, known: dict[int, Any]) -> Any:
    """Return the plain form of a value; `known` holds those of the objects met before."""
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if id(value) in known:
        return known[id(value)]
    known[id(value)] = None
    if isinstance(value, InertObject):
        state, items = value.__dict__["state"], value.__dict__["items"]
        if state or items:
            result = _plain(state or items, known)
        else:
            arguments = list(value.__dict__["arguments"])
            result = _plain(arguments[0] if len(arguments) == 1 else arguments, known)
    elif isinstance(value, Mapping):
        result = {str(key): _plain(entry, known) for key, entry in value.items()}
    elif isinstance(value, list | tuple | set | frozenset):
        result = [_plain(entry, known) for entry in value]
    else:
        result = None
    known[id(value)] = result
    return result


def _prefix(archive: zipfile.ZipFile) -> str:
    """Return the folder of the archive that holds the pickle.

    Raises:
        ValueError: It holds none, is big-endian, or is compressed, which torch's never is.
    """
    names = [name for name in archive.namelist() if name.split("/")[-1] == "data.pkl"]
    if len(names) != 1:
        raise ValueError("the archive holds no data.pkl")
    prefix = names[0].removesuffix("data.pkl")
    if archive.getinfo(names[0]).compress_type != zipfile.ZIP_STORED:
        raise ValueError("the archive is compressed")
    order = f"{prefix}byteorder"
    if order in archive.namelist() and _stored(archive, order).decode() != sys.byteorder:
        raise ValueError("it was written on a machine of another byte order")
    return prefix


def _check_operations(content: bytes) -> None:
    """Refuse a pickle that claims more memory than it has bytes, before any of it is followed.

    Raises:
        ValueError: A length reaches beyond the end, or a memo index beyond the operations.
    """
    for operation, argument, _ in pickletools.genops(content):
        if operation.name in ("PUT", "BINPUT", "LONG_BINPUT") and int(argument or 0) > len(content):
            raise ValueError("an index of the pickle lies beyond its end")


def _stored(archive: zipfile.ZipFile, name: str) -> bytes:
    """Return a record that is stored as it is, so that no small file unpacks to a huge one."""
    if archive.getinfo(name).compress_type != zipfile.ZIP_STORED:
        raise ValueError("the archive is compressed")
    return archive.read(name)
