"""Results that wait for the database: JSON lines on the local disk, told once it answers."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

PREFIX = "journal-"
SUFFIX = ".jsonl"


class Journal:
    """An append-only file of entries that were not told yet; each is on the disk when written.

    Args:
        path: The file; it exists only while something waits.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()

    def append(self, entry: Mapping[str, Any]) -> None:
        """Write one entry and flush it to the disk.

        Args:
            entry: Plain JSON types.
        """
        line = json.dumps(entry) + "\n"
        with self._lock:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())

    def entries(self) -> list[dict[str, Any]]:
        """Return what waits, oldest first; a line cut off by a crash is left out."""
        try:
            text = self.path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return []
        entries = []
        for line in text.splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            if isinstance(entry, dict):
                entries.append(entry)
        return entries

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
        if not entries:
            self.path.unlink(missing_ok=True)
            return
        temporary = self.path.with_suffix(".tmp")
        with temporary.open("w", encoding="utf-8") as file:
            file.write("".join(json.dumps(entry) + "\n" for entry in entries))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.path)


def journals_in(folder: Path) -> list[Journal]:
    """Return the journals that drivers left in a folder, oldest first.

    Args:
        folder: OUT of a study.
    """
    paths = sorted(folder.glob(f"{PREFIX}*{SUFFIX}"), key=lambda path: path.stat().st_mtime)
    return [Journal(path) for path in paths]
