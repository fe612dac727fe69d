"""Places on disk: whether something can be written there."""

from __future__ import annotations

import tempfile
from pathlib import Path


def why_not_writable(folder: Path) -> str | None:
    """Return why no file can be made in a folder that need not exist yet, or None where one can.

    It is tried, since permissions alone say too little: for root they allow everything, and in
    `/sys` nothing can be made all the same. Nothing is left behind.

    Args:
        folder: Where something is to be written; folders on the way to it may be missing.
    """
    place = folder.absolute()
    try:
        while not place.exists() and place != place.parent:
            place = place.parent
        if not place.is_dir():
            return f"{place} is a file, not a folder"
        with tempfile.TemporaryFile(dir=place):
            return None
    except OSError as error:
        return f"{place} cannot be written ({error.strerror or error})"
