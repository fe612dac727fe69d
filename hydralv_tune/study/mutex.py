"""One driver at a time: the study mutex that guards reconcile, count and ask.

It is crash-safe by construction: the operating system releases a `flock` with its process, and
PostgreSQL an advisory lock with its transaction.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
from types import TracebackType

import sqlalchemy
from filelock import FileLock, Timeout
from sqlalchemy.engine import URL, Connection
from sqlalchemy.exc import SQLAlchemyError

from hydralv_tune.config.errors import HydraLVError
from hydralv_tune.study.storage_url import engine_options, reason_of, sqlite_file

POLL_S = 0.02


class MutexLost(HydraLVError):
    """The mutex was not obtained, or the database let go of it while it was held."""


class StudyMutex:
    """A lock that all drivers of one study share; re-entrant within one thread.

    Args:
        url: Storage of the study.
        study: Its name; on SQLite all studies of one file share a lock.
        timeout_s: How long to wait before `MutexLost`.
    """

    def __init__(self, url: URL, study: str, *, timeout_s: float = 120.0) -> None:
        self._url = url
        self._timeout_s = timeout_s
        self._thread_lock = threading.RLock()
        self._depth = 0
        self._file_lock: FileLock | None = None
        self._connection: Connection | None = None
        self._engine: sqlalchemy.Engine | None = None
        digest = hashlib.blake2b(study.encode(), digest_size=8).digest()
        self._key = int.from_bytes(digest, "big", signed=True)

    def __enter__(self) -> StudyMutex:
        self._thread_lock.acquire()
        try:
            if self._depth == 0:
                self._acquire()
            self._depth += 1
        except BaseException:
            self._thread_lock.release()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._depth -= 1
        try:
            if self._depth == 0:
                self._release()
        except MutexLost:
            # An error of the body tells more than the lock that went with it.
            if kind is None:
                raise
        finally:
            self._thread_lock.release()

    def close(self) -> None:
        """Close the connection or file that the lock needs."""
        with self._thread_lock:
            self._drop_connection()
            if self._engine is not None:
                self._engine.dispose()
                self._engine = None

    def _acquire(self) -> None:
        """Wait for the lock of the storage's kind."""
        if sqlite_file(self._url) is not None:
            self._acquire_file()
        else:
            self._acquire_advisory()

    def _release(self) -> None:
        """Let the lock go."""
        if self._file_lock is not None:
            self._file_lock.release()
        if self._connection is not None:
            try:
                self._connection.commit()
            except SQLAlchemyError as error:
                self._drop_connection()
                raise MutexLost(f"the study mutex was lost: {reason_of(error)}") from None

    def _acquire_file(self) -> None:
        """Lock the file beside the database."""
        path = sqlite_file(self._url)
        assert path is not None
        if self._file_lock is None:
            self._file_lock = FileLock(
                f"{path}.lock",
                timeout=self._timeout_s,
                poll_interval=POLL_S,
                thread_local=False,  # `_thread_lock` sees to the threads
            )
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file_lock.acquire()
        except Timeout:
            raise MutexLost(
                f"{path}.lock has been held by another driver for {self._timeout_s:.0f} s"
            ) from None
        except (OSError, NotImplementedError) as error:
            reason = getattr(error, "strerror", None) or error
            raise MutexLost(
                f"{path}.lock cannot be locked ({reason}); keep an SQLite file where files can be "
                "locked, on a local disk, or the study in PostgreSQL"
            ) from None

    def _acquire_advisory(self) -> None:
        """Take PostgreSQL's advisory lock, in a transaction that ends with it."""
        try:
            if self._connection is None:
                if self._engine is None:
                    options = engine_options(self._url)["connect_args"]
                    self._engine = sqlalchemy.create_engine(
                        self._url, poolclass=sqlalchemy.NullPool, connect_args=options
                    )
                self._connection = self._engine.connect()
            self._take(self._connection)
        except SQLAlchemyError as error:
            self._drop_connection()
            raise MutexLost(f"the study mutex cannot be had: {reason_of(error)}") from None

    def _take(self, connection: Connection) -> None:
        """Wait for the advisory lock on the server, which queues the drivers fairly."""
        limit_ms = int(self._timeout_s * 1000)
        connection.execute(sqlalchemy.text(f"SET LOCAL lock_timeout = {limit_ms}"))
        connection.execute(
            sqlalchemy.text("SELECT pg_advisory_xact_lock(:key)"), {"key": self._key}
        )

    def _drop_connection(self) -> None:
        """Forget a connection that is broken or no longer needed."""
        if self._connection is not None:
            with contextlib.suppress(SQLAlchemyError):
                self._connection.invalidate()
            with contextlib.suppress(SQLAlchemyError):
                self._connection.close()
            self._connection = None
