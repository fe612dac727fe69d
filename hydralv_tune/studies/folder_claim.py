"""Which attempt works in a trial's folder: the latest one, and only once the others have let go."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from hydralv_tune.vocabulary.errors import TrialTakenOver

HAND_OVER_S = 120.0
OWNER_FILE, LOCK_FILE = "attempt.json", ".attempt.lock"


class FolderClaim:
    """The claim of one attempt to the folder that all attempts of a trial share.

    A driver that died or was silent for too long may leave a worker that does not know yet. So
    the next attempt says that the folder is its own and waits for the lock, which the worker before
    holds as long as it may write. That one sees at its next step that the folder is no longer its
    own, saves, and lets go; if it is dead the lock is free.

    Args:
        folder: Of the trial.
        number: Of the attempt; the latest one that claims the folder owns it.
        wait_s: How long a lock is waited for. A worker that hangs must not keep a trial for ever.
    """

    def __init__(self, folder: Path, number: int, *, wait_s: float = HAND_OVER_S) -> None:
        self._folder, self._number = folder, number
        self._lock = FileLock(folder / LOCK_FILE, timeout=wait_s, thread_local=False)
        self.note: str | None = None
        """Why the folder was not had alone, or None."""

    def take(self) -> None:
        """Own the folder, and wait until no earlier attempt works in it.

        Raises:
            TrialTakenOver: A later attempt took it meanwhile.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        # Not by `records`, which brings PyTorch: a worker that starts is to be light.
        temporary = self._folder / f".{OWNER_FILE}.{self._number}"
        temporary.write_text(json.dumps({"number": self._number}))
        os.replace(temporary, self._folder / OWNER_FILE)
        self._hold()

    def is_lost(self) -> bool:
        """Return whether a later attempt owns the folder."""
        return folder_owner(self._folder) not in (None, self._number)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Let go for a block that does not touch the folder and may wait long, then hold it again.

        Raises:
            TrialTakenOver: A later attempt took the folder meanwhile. Nothing may be written.
        """
        self.let_go()
        try:
            yield
        finally:  # whatever ends the block, what follows may write
            self._hold()

    def let_go(self) -> None:
        """Let the next attempt work in the folder."""
        self._lock.release()

    def _hold(self) -> None:
        """Wait for the lock; go on without it where that would take too long."""
        if self.note is None:
            try:
                self._lock.acquire(cancel_check=self.is_lost)
            except Timeout:
                waited = f"for {self._lock.timeout:g} s"
                self.note = f"an earlier attempt held the folder {waited} and is not waited for"
            except OSError as error:  # a file system without locks
                self.note = f"the folder cannot be locked: {error}"
        if self.is_lost():
            self.let_go()
            raise TrialTakenOver(f"another attempt goes on with what trial {self._number} did")


def folder_owner(folder: Path) -> int | None:
    """Return the number of the attempt that owns a trial's folder, or None."""
    try:
        return int(json.loads((folder / OWNER_FILE).read_text())["number"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
