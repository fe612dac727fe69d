"""Results that wait for the database: JSON lines on the local disk, told once it answers."""

from __future__ import annotations

import json
import os
import threading
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from hydralv_tune.artifacts.writing import write_atomically

PREFIX = "journal-"
SUFFIX = ".jsonl"


class Journal:
    """An append-only file of entries that were not told yet.

    Each is on the disk when written. What a full disk does not take is kept in memory, and is
    written before anything later once there is room.

    Args:
        path: The file; it exists only while something waits.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._unwritten: list[dict[str, Any]] = []

    def append(self, entry: Mapping[str, Any]) -> None:
        """Write one entry and flush it to the disk, or warn and keep it in memory.

        Args:
            entry: Plain JSON types.
        """
        with self._lock:
            self._unwritten.append(dict(entry))
            try:
                _append(self.path, _lines(self._unwritten))
            except OSError as error:
                warnings.warn(
                    f"{self.path} cannot be written ({error.strerror or error}): "
                    f"{len(self._unwritten)} results wait in memory alone until the database "
                    "answers. Make room on that disk.",
                    stacklevel=2,
                )
            else:
                self._unwritten.clear()

    def entries(self) -> list[dict[str, Any]]:
        """Return what waits, oldest first; a line cut off by a crash is left out."""
        try:
            text = self.path.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            text = ""
        entries = []
        for line in text.splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            if isinstance(entry, dict):
                entries.append(entry)
        return [*entries, *self._unwritten]

    def drain(self, tell: Callable[[dict[str, Any]], None]) -> int:
        """Tell every entry in order and return how many; what is told is gone from the file.

        Args:
            tell: Called with each entry. When it raises, that entry and the later ones stay.
        """
        with self._lock:
            entries = self.entries()
            told = 0
            try:
                for entry in entries:
                    tell(entry)
                    told += 1
            finally:
                if told:
                    self._keep(entries[told:])
            return told

    def _keep(self, entries: list[dict[str, Any]]) -> None:
        """Replace the file by what still waits."""
        try:
            if entries:
                write_atomically(self.path, _lines(entries))
            else:
                self.path.unlink(missing_ok=True)
        except OSError:
            return  # all stays as it is: what is told twice, the database refuses
        self._unwritten.clear()


def _lines(entries: Iterable[Mapping[str, Any]]) -> bytes:
    """Return entries as JSON lines."""
    return "".join(json.dumps(entry) + "\n" for entry in entries).encode()


def _append(path: Path, data: bytes) -> None:
    """Add lines to a file and flush them to the disk: whole, or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        if end:
            file.seek(end - 1)
            if file.read(1) != b"\n":  # a line that a crash cut off must not spoil the next
                data = b"\n" + data
        rest = memoryview(data)
        try:
            while rest:
                rest = rest[file.write(rest) :]
            os.fsync(file.fileno())
        except OSError:
            with suppress(OSError):
                file.truncate(end)
            raise


def journals_in(folder: Path) -> list[Journal]:
    """Return the journals that drivers left in a folder, oldest first.

    Args:
        folder: OUT of a study.
    """
    paths = sorted(folder.glob(f"{PREFIX}*{SUFFIX}"), key=lambda path: path.stat().st_mtime)
    return [Journal(path) for path in paths]
