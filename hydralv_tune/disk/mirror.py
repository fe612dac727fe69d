"""A trial's folder mirrored to a shared folder or an object store, for nodes that share no disk."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from hydralv_tune.vocabulary.errors import InputError

# What belongs to one node and one moment.
LOCAL_ONLY = ("attempt.json",)
UNFINISHED = ".part"
"""End of a name that is still being copied, or was when its node died."""


class Mirror:
    """Keeps a folder and its copy at a URL alike; each file is copied only when it has changed.

    Args:
        folder: On this node.
        url: A path, or a URL that pyarrow knows: `file://`, `s3://`, `gs://`, `abfs://`, `hdfs://`.
        name: Of the folder under the URL; plain letters and digits.

    Raises:
        InputError: The URL is of no file system that is known here.
    """

    def __init__(self, folder: Path, url: str, name: str) -> None:
        self._folder = folder
        self._files, root = file_system(url)
        self._root = f"{root.rstrip('/')}/{name}"
        self._seen: dict[str, tuple[int, int]] = {}

    def pull(self) -> int:
        """Copy what the URL has and this node has not, and return how many files.

        A file that is here already stays: this node wrote it last, or pulled it before.
        """
        from pyarrow import fs

        selector = fs.FileSelector(self._root, recursive=True, allow_not_found=True)
        copied = 0
        for info in self._files.get_file_info(selector):
            relative = os.path.relpath(info.path, self._root)
            target = (self._folder / relative).resolve()
            # Names come from elsewhere and must not leave the folder.
            if not info.is_file or not target.is_relative_to(self._folder.resolve()):
                continue
            if target.name.startswith(".") or target.name.endswith(UNFINISHED) or target.exists():
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = target.with_name(f".{target.name}.pulled")
            with self._files.open_input_stream(info.path) as source:
                temporary.write_bytes(source.read())
            os.replace(temporary, target)
            self._seen[relative] = _state(target)
            copied += 1
        return copied

    def push(self) -> int:
        """Copy every file that has changed since, and return how many."""
        copied = 0
        for path in sorted(self._folder.rglob("*")):
            relative = str(path.relative_to(self._folder))
            skipped = path.name.startswith(".") or path.name in LOCAL_ONLY
            if skipped or not path.is_file() or self._seen.get(relative) == _state(path):
                continue
            state = _state(path)
            target = f"{self._root}/{relative}"
            self._files.create_dir(os.path.dirname(target), recursive=True)
            # A reader sees the file before or the whole new one: stores rename or replace whole.
            with self._files.open_output_stream(f"{target}{UNFINISHED}") as sink:
                sink.write(path.read_bytes())
            self._files.move(f"{target}{UNFINISHED}", target)
            self._seen[relative] = state
            copied += 1
        return copied


def file_system(url: str) -> tuple[Any, str]:
    """Return the file system of a URL or path, and the path in it.

    Raises:
        InputError: pyarrow knows no such file system, or cannot reach it.
    """
    from pyarrow import ArrowException, fs

    try:
        if "://" not in url:
            return fs.LocalFileSystem(), str(Path(url).expanduser().resolve())
        files, path = fs.FileSystem.from_uri(url)
    except (ArrowException, OSError, ValueError) as error:
        raise InputError(
            f"--checkpoints: '{url}' cannot be used: {error}. Give a shared folder, or a URL of "
            "pyarrow's, such as s3://bucket/studies."
        ) from error
    return files, path


def _state(path: Path) -> tuple[int, int]:
    """Return what tells that a file has changed."""
    status = path.stat()
    return (status.st_size, status.st_mtime_ns)
