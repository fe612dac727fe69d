"""The folder of a trial: whose it is, and where it is copied to.

A newer attempt announces itself and waits until the older one releases the lock.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from hydralv_tune.artifacts.checkpoint_store import CheckpointStore, Version, set_version_here
from hydralv_tune.config.errors import TrialTakenOver

HAND_OVER_S = 120.0
LOCK_FILE, OWNER_FILES = ".attempt.lock", ".attempt-"


class FolderClaim:
    """The claim of one attempt to the folder that all attempts of a trial share.

    A driver that died or was silent for too long may leave a worker that still writes. So the next
    attempt first announces itself in a file `.attempt-NUMBER`, then waits for the lock that the
    worker holds while it writes. The worker sees the announcement at its next step, saves, and
    releases the lock; the lock of a dead worker is free.

    The highest number owns the folder, so an earlier attempt cannot take it from a later one,
    in whatever order they come. Where locks do not reach from machine to machine (NFS mounted with
    `local_lock=flock` or `all`, Lustre with `localflock`), the later attempt begins at once, and
    the last save of the earlier one may fall in between. An NFS client may cache a listing for up
    to a minute, less than the lock is waited for.

    Args:
        folder: Of the trial.
        number: Of the attempt, which is that of its trial in the study.
        wait_s: How long a lock is waited for. A worker that hangs must not keep a trial for ever.
    """

    def __init__(self, folder: Path, number: int, *, wait_s: float = HAND_OVER_S) -> None:
        self._folder, self._number = folder, number
        self._lock = FileLock(folder / LOCK_FILE, timeout=wait_s, thread_local=False)
        self.note: str | None = None
        """Why another attempt may be at work in the folder too, or None."""

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
                self.note = f"an earlier attempt held the folder {waited}; this one began then"
            except OSError as error:  # a file system without locks
                self.note = f"the folder cannot be locked: {error}"
        if self.is_lost():
            self.let_go()
            raise TrialTakenOver(
                f"attempt {folder_owner(self._folder)} has taken trial {self._number} over, as "
                f"{self._folder} shows"
            )


class TrialFolder(FolderClaim):
    """The folder of a trial as one attempt works in it: claimed, and copied where a URL is given.

    Args:
        folder: On this node.
        number: Of the attempt.
        url: Where it is copied to, and fetched from where another node has gone further; None where
            all nodes see the folder.
        name: Of the trial under the URL, as `checkpoint_store.trial_name` gives it.
    """

    def __init__(
        self, folder: Path, number: int, *, url: str | None = None, name: str = ""
    ) -> None:
        super().__init__(folder, number)
        self._url, self._name = url, name
        self._store: CheckpointStore | None = None

    def take(self) -> None:
        """Own the folder, and make it what the latest attempt left.

        Raises:
            TrialTakenOver: A later attempt owns it.
            InputError: The URL is of no file system that is known here.
        """
        super().take()
        if self._url is None:
            # A later run may copy the folder.
            set_version_here(self._folder, Version(self._number, 0))
        else:
            self._store = CheckpointStore(self._folder, self._url, self._name)
            self._store.begin(self._number)

    def push(self) -> None:
        """Copy what has changed.

        Raises:
            TrialTakenOver: A later attempt has begun.
        """
        if self._store is not None:
            self._store.push(self._number)

    def check(self) -> None:
        """Raise `TrialTakenOver` where a later attempt has begun at the URL."""
        if self._store is not None:
            self._store.check(self._number)


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
