"""Which attempt works in a trial's folder: the latest one, and only once the others have let go."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from hydralv_tune.artifacts.checkpoint_store import CheckpointStore
from hydralv_tune.config.errors import TrialTakenOver

HAND_OVER_S = 120.0
LOCK_FILE, OWNER_FILES = ".attempt.lock", ".attempt-"


class FolderClaim:
    """The claim of one attempt to the folder that all attempts of a trial share.

    A driver that died or was silent for too long may leave a worker that does not know yet. So
    the next attempt says that the folder is its own and waits for the lock, which the worker before
    holds as long as it may write. That one sees at its next step that the folder is no longer its
    own, saves, and lets go; if it is dead the lock is free.

    Each attempt says so in a file of its own, `.attempt-NUMBER`, and the highest number owns the
    folder: whoever comes in whatever order, an earlier attempt cannot take it from a later one.
    The lock alone makes the later one wait. Where it does not reach from machine to machine (NFS
    mounted with `local_lock=flock` or `all`, Lustre with `localflock`), nothing here can tell: the
    later one begins at once, and what the earlier one saves at its last step may come in between.
    An NFS client may also cache a folder's listing: the earlier one then sees up to a minute late
    that it has lost the folder, which is less than the lock is waited for.

    Args:
        folder: Of the trial.
        number: Of the attempt, which is that of its trial in the study.
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
            TrialTakenOver: A later attempt owns it.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        (self._folder / f"{OWNER_FILES}{self._number}").touch()
        self._hold()

    def is_lost(self) -> bool:
        """Return whether a later attempt owns the folder."""
        owner = folder_owner(self._folder)
        return owner is not None and owner > self._number

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
            raise TrialTakenOver(
                f"attempt {folder_owner(self._folder)} goes on with what trial {self._number} was "
                f"to do, as {self._folder} says"
            )


def folder_owner(folder: Path) -> int | None:
    """Return the number of the attempt that owns a trial's folder, or None."""
    numbers = [path.name.removeprefix(OWNER_FILES) for path in folder.glob(f"{OWNER_FILES}*")]
    return max((int(number) for number in numbers if number.isdecimal()), default=None)


def fetch_folder(folder: Path, number: int, *, url: str, name: str) -> None:
    """Make a trial's folder on this node what its last attempt left at the URL.

    Args:
        folder: Of the trial, where an earlier attempt may have left something else.
        number: Of the attempt.
        url: As `CheckpointStore` takes it.
        name: As `checkpoint_store.trial_name` gives it.

    Raises:
        TrialTakenOver: A later attempt works in the folder.
    """
    claim = FolderClaim(folder, number)
    claim.take()  # a worker of an earlier attempt may still be at it
    try:
        CheckpointStore(folder, url, name).pull()
    finally:
        claim.let_go()
