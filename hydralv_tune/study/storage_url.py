"""Storage URLs of a study: normalised, masked for people, probed before anything is written."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import sqlalchemy
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError

from hydralv_tune.artifacts.writing import why_not_writable
from hydralv_tune.config.errors import StudyError
from hydralv_tune.config.paths import expanded
from hydralv_tune.config.secrets import HIDDEN, is_secret, mask_passwords
from hydralv_tune.study.study_folder import DATABASE, SPACE_FILE, recover_command

CONNECT_TIMEOUT_S = 10
BUSY_TIMEOUT_S = 15.0  # how long SQLite waits for another writer
# A driver that is stopped (SIGSTOP) inside the study mutex must not hold it for ever.
IDLE_IN_TRANSACTION_MS = 60_000
BEGINNING = re.compile(r"(?P<kind>sqlite|postgres(?:ql)?)(?:\+\w+)?:(?P<slashes>/*)")
PASSWORD = re.compile("no password supplied|password authentication failed")
EXAMPLES = "sqlite:///runs/study.db or postgresql+psycopg://user@host/database"
DRIVERS = {
    "sqlite": ("sqlite:///", "pysqlite"),
    "postgresql": ("postgresql+psycopg://", "psycopg"),
}
"""How a URL of each backend begins, and the name of the database driver that we install."""


def reason_of(error: BaseException) -> str:
    """Return the first line of a database error, without passwords."""
    text = mask_passwords(str(getattr(error, "orig", None) or error)).strip()
    return text.splitlines()[0] if text else type(error).__name__


def parse_storage(storage: str) -> URL:
    """Return a storage URL with our database drivers.

    Args:
        storage: `sqlite:///FILE`, or `postgresql+psycopg://…`; `postgresql://` and `postgres://`
            mean the latter, since psycopg is what is installed.

    Raises:
        StudyError: It is no URL, its database is neither SQLite nor PostgreSQL, it names another
            database driver, or no file.
        InputError: `~` or a variable in the path of an SQLite file is not known.
    """
    shown = mask_passwords(storage)
    _refuse_slashes(storage, shown)
    try:
        url = make_url(storage)
    except (ArgumentError, ValueError):  # ValueError: the port is no number
        raise StudyError(
            f"--storage: '{shown}' is no database URL. Write it like {EXAMPLES}."
        ) from None
    if url.drivername in ("postgres", "postgres+psycopg", "postgresql", "postgresql+psycopg2"):
        url = url.set(drivername="postgresql+psycopg")
    backend, _, driver = url.drivername.partition("+")
    if backend not in DRIVERS:
        raise StudyError(
            f"--storage: '{shown}' names the database '{backend}', but a study is "
            f"kept in SQLite or PostgreSQL. Write it like {EXAMPLES}."
        )
    beginning, installed = DRIVERS[backend]
    if driver not in ("", installed):
        raise StudyError(
            f"--storage: '{shown}' names the database driver '{driver}', but studies use "
            f"{installed}. Begin it with {beginning}"
        )
    if backend == "sqlite":
        _refuse_no_file(url, shown)
        if str(url.database).startswith("/~"):
            raise StudyError(
                f"--storage: '{shown}' names a folder '~' at the root, for it has 4 slashes. Write "
                f"{shown.replace(':////~', ':///~')} for your home folder."
            )
        url = url.set(database=expanded(str(url.database)))
    elif "@" in (url.host or ""):
        raise StudyError(
            f"--storage: '{shown}' has more than one '@'. Write those of the password as %40, or "
            "leave the password out and give it by PGPASSFILE."
        )
    return url


def _refuse_slashes(storage: str, shown: str) -> None:
    """Refuse a path where a URL is wanted, and a URL with too few slashes, with the right form."""
    begins = BEGINNING.match(storage)
    if begins is None:
        if "://" not in storage:
            raise StudyError(
                f"--storage: '{shown}' is a path and no database URL. Write it like "
                f"sqlite:///{shown}."
            )
        return
    kind, count, rest = begins["kind"], len(begins["slashes"]), storage[begins.end() :]
    wanted = 3 if kind == "sqlite" else 2
    if rest and count < wanted:
        # One slash before a path that begins at the root: SQLite's form of it has four.
        right = wanted + (kind == "sqlite" and count == 1)
        mended = mask_passwords(storage[: begins.start("slashes")] + "/" * right + rest)
        raise StudyError(
            f"--storage: {count} slash{'' if count == 1 else 'es'} after '{kind}:', but a URL of "
            f"that database has {wanted}. Write {mended}."
        )


def _refuse_no_file(url: URL, shown: str) -> None:
    """Refuse an SQLite URL that names no plain file: in memory, or an address of SQLite's own.

    Args:
        url: Of SQLite.
        shown: How messages call it.
    """
    in_memory = ":memory:" in (url.database or "") or url.query.get("mode") == "memory"
    if not url.database or in_memory:
        raise StudyError(
            f"--storage: '{shown}' names no file, so the study would end with this process. "
            "Write it like sqlite:///runs/study.db."
        )
    if str(url.database).startswith("file:") or "uri" in url.query:
        raise StudyError(
            f"--storage: '{shown}' is an SQLite URI, but a study is in a file that its lock can "
            "lie beside. Give the path itself, like sqlite:///runs/study.db."
        )


def masked(url: URL) -> str:
    """Return a URL as text without its password and other secrets."""
    query = {key: HIDDEN if is_secret(key) else value for key, value in url.query.items()}
    shown = url.set(query=query).render_as_string(hide_password=True)
    # `URL` would write our stars in the query as %2A.
    return shown.replace("%2A%2A%2A", HIDDEN)


def without_secrets(url: URL) -> str:
    """Return a URL to keep in a file: absolute, without its password and other secrets."""
    path = sqlite_file(url)
    if path is not None:
        return f"sqlite:///{path.absolute()}"
    secrets = [key for key in url.query if is_secret(key)]
    return url._replace(password=None).difference_update_query(secrets).render_as_string()


def sqlite_file(url: URL) -> Path | None:
    """Return the file of an SQLite URL, or None for a server."""
    if url.get_backend_name() != "sqlite":
        return None
    return Path(str(url.database))


def engine_options(url: URL) -> dict[str, Any]:
    """Return the SQLAlchemy engine options that make a study survive an absent database."""
    if sqlite_file(url) is not None:
        return {"connect_args": {"timeout": BUSY_TIMEOUT_S}}
    options = f"-c timezone=utc -c idle_in_transaction_session_timeout={IDLE_IN_TRANSACTION_MS}"
    return {
        # Connections that died with a restarted server are replaced before use.
        "pool_pre_ping": True,
        "pool_size": 5,
        "connect_args": {
            "connect_timeout": CONNECT_TIMEOUT_S,
            "application_name": "hydralv-tune",
            # Heartbeats are compared with the server's clock: every session must mean UTC.
            "options": options,
        },
    }


def probe(url: URL, *, create: bool) -> None:
    """Refuse a storage that does not exist or does not answer; nothing is created.

    Args:
        url: From `parse_storage`.
        create: Whether an SQLite file may be missing, since the study is to be made.

    Raises:
        StudyError: With the password masked.
    """
    path = sqlite_file(url)
    if path is not None:
        if path.is_dir():
            raise StudyError(f"--storage: {path} is a folder, but a study is one file.")
        if not path.exists():
            if create:
                _refuse_unwritable(path)
                return
            again = (
                f" The trials beside it make it again: `{recover_command(path.parent)}`."
                if (path.parent / SPACE_FILE).is_file() and path.name == DATABASE
                else ""
            )
            raise StudyError(
                f"--storage: {path} does not exist. Give the file that `run` wrote, "
                f"by default OUT/{DATABASE}.{again}"
            )
    engine = sqlalchemy.create_engine(url, poolclass=sqlalchemy.NullPool, **_without_pool(url))
    try:
        with engine.connect() as connection:
            if path is not None:
                connection.execute(sqlalchemy.text("SELECT name FROM sqlite_master LIMIT 1"))
            else:
                connection.execute(sqlalchemy.text("SELECT 1"))
    except (SQLAlchemyError, NoSuchModuleError, UnicodeError) as error:
        reason = reason_of(error)
        if PASSWORD.search(reason):
            raise StudyError(
                f"--storage: {masked(url)} lets nobody in without the right password: {reason}. "
                f"Give it in the variable PGPASSWORD, or in a file that only you can read and that "
                f"PGPASSFILE names, by default ~/.pgpass, as a line {_password_line(url)}"
            ) from None
        raise StudyError(
            f"--storage: {masked(url)} does not answer: {reason}. "
            "Check the address, and that the database runs."
        ) from None
    finally:
        engine.dispose()


def _password_line(url: URL) -> str:
    """Return the line of a password file that serves a URL; its host is compared as text."""
    parts = (url.host or "localhost", url.port or 5432, url.database or url.username, url.username)
    return ":".join(map(str, (*parts, "PASSWORD")))


def _refuse_unwritable(path: Path) -> None:
    """Refuse a place where the file of a new study cannot be made; nothing is left there."""
    reason = why_not_writable(path.parent)
    if reason is not None:
        raise StudyError(
            f"--storage: {path} cannot be made: {reason}. Name a file in a folder that can be "
            "written."
        )


def _without_pool(url: URL) -> dict[str, Any]:
    """Return the engine options that go with no pool at all."""
    options = engine_options(url)
    return {"connect_args": options["connect_args"]}
