"""Databases of studies: how they are opened, and what it means when one does not answer."""

from __future__ import annotations

import contextlib
import gc
import re
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

import optuna
import sqlalchemy
from optuna.exceptions import StorageInternalError
from optuna.storages import RDBStorage
from sqlalchemy import exc as sqlalchemy_errors

from hydralv_tune.config.errors import HydraLVError, StudyError, unknown_name
from hydralv_tune.study.mutex import MutexLost
from hydralv_tune.study.optuna_private import NOT_FOUND
from hydralv_tune.study.storage_url import engine_options, masked, reason_of, sqlite_file

# What it warns of, such as tables that went away, is told in our words.
optuna.logging.set_verbosity(optuna.logging.ERROR)


MOVED_TABLES = re.compile(r"no such (table|column)|(relation|column) .* does not exist")
OPTUNA_TABLES = {"studies", "trials", "version_info", "alembic_version"}
"""Optuna makes what is missing of the last two, even in a database that is not its own."""
READ_ONLY = re.compile(r"readonly database|read-only (transaction|file system)", re.IGNORECASE)


class DatabaseAway(HydraLVError):
    """The database does not answer right now; what was to be told waits in the journal."""


class StudyGone(HydraLVError):
    """The study was deleted, or its database removed, replaced or changed, while it was open.

    Args:
        what: Of the study or its database, in words that follow "Study 's' in STORAGE".
        text: The whole message.
    """

    def __init__(self, what: str, text: str | None = None) -> None:
        super().__init__(text or what)
        self.what = what


def gone_before(storage: str, name: str, error: StudyGone) -> StudyError:
    """Return the refusal of a study that was lost before it is run.

    Args:
        storage: Its URL, masked.
        name: Of the study.
        error: What became of it.
    """
    return StudyError(
        f"--storage: study '{name}' in {storage} {error.what}. Put the database back as it was, or "
        "move it away and make the study again from its trials: `hydralv-tune recover OUT`."
    )


class NoStudies(StudyError):
    """A database without any tables of studies."""


class DatabaseFile:
    """Notices when the SQLite file of an open study is removed or replaced by another.

    Connections that are open go on reading and writing a file that nobody can find any more.

    Args:
        url: Of the database; one on a server is never found changed.
    """

    def __init__(self, url: sqlalchemy.engine.URL) -> None:
        self._path = sqlite_file(url)
        self._opened = self._identity()

    def _identity(self) -> tuple[int, int] | None:
        """Return what tells the file from any other in its place."""
        if self._path is None:
            return None
        try:
            status = self._path.stat()
        except FileNotFoundError:
            return None
        except OSError:  # a shared folder that does not answer: nothing is known
            return self._opened
        return status.st_dev, status.st_ino

    def check(self) -> None:
        """Raise `StudyGone` where the file is not the one that was opened."""
        now = self._identity()
        if now != self._opened:
            raise StudyGone("was removed" if now is None else "was replaced by another file")


@contextlib.contextmanager
def database_errors() -> Iterator[None]:
    """Turn what a lost connection or a locked file raises into `DatabaseAway`.

    What a deleted study or changed tables raise becomes `StudyGone`.
    """
    lost = (
        sqlalchemy_errors.OperationalError,
        sqlalchemy_errors.InterfaceError,
        sqlalchemy_errors.InternalError,
        sqlalchemy_errors.TimeoutError,
    )
    try:
        yield
    except MutexLost as error:
        raise DatabaseAway(str(error)) from None
    except (KeyError, ValueError) as error:
        if error.args != (NOT_FOUND,):
            raise
        raise StudyGone("was deleted") from None
    except (StorageInternalError, sqlalchemy_errors.SQLAlchemyError) as error:
        cause = error.__cause__ if isinstance(error, StorageInternalError) else error
        reason = reason_of(cause) if cause is not None else str(error)
        if MOVED_TABLES.search(reason):
            raise StudyGone(f"has other tables now ({reason})") from None
        if READ_ONLY.search(reason):
            raise DatabaseAway(f"it is read-only; let this user write it ({reason})") from None
        if isinstance(cause, lost):
            raise DatabaseAway(reason) from None
        raise


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """Look for no garbage while thousands of trials are read.

    They are millions of new objects of which none is garbage, and looking through all of them again
    and again takes longer than reading them.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@contextlib.contextmanager
def while_opening(url: sqlalchemy.engine.URL) -> Iterator[None]:
    """Turn what a database raises while it is opened to be read into a refusal."""
    try:
        with database_errors():
            yield
    except DatabaseAway as error:
        raise StudyError(f"--storage: {masked(url)} does not answer: {error}.") from None
    except StudyGone as error:
        raise StudyError(
            f"--storage: {masked(url)} {error.what}. Name the database of a study, put this one "
            "back as it was, or make the study again from its trials: `hydralv-tune recover OUT`."
        ) from None


def open_storage(url: sqlalchemy.engine.URL, *, create: bool) -> RDBStorage:
    """Return Optuna's storage of a URL.

    Args:
        url: From `parse_storage`.
        create: Make the tables where there are none at all; single missing ones are not made.

    Raises:
        NoStudies: There are no tables of studies, and none are to be made.
        StudyError: Another version of Optuna made its tables.
        StudyGone: Another program made them, or some are missing.
    """
    options = engine_options(url)
    found = tables(url, options)
    if not create and "studies" not in found:
        raise NoStudies(f"--storage: {masked(url)} holds no study. Start one with `run`.")
    if "studies" in found and not found >= OPTUNA_TABLES:
        missing = ", ".join(sorted(OPTUNA_TABLES - found))
        raise StudyGone(f"has other tables now (no such table: {missing})")
    skipped = not create or "studies" in found
    try:
        storage = RDBStorage(url_template(url), engine_kwargs=options, skip_table_creation=skipped)
    except RuntimeError as error:  # the tables are of another Optuna
        raise StudyError(f"--storage: {masked(url)} {_other_optuna(url, str(error))}") from None
    if sqlite_file(url) is not None:
        # As safe as deleting the rollback journal at each commit, and half as slow. A write-ahead
        # log would be faster still, but breaks on shared folders.
        @sqlalchemy.event.listens_for(storage.engine, "connect")
        def _(connection: Any, record: object) -> None:
            connection.execute("PRAGMA journal_mode = TRUNCATE")

        storage.engine.dispose()  # connections made before
    return storage


def _other_optuna(url: sqlalchemy.engine.URL, reason: str) -> str:
    """Return what to do with a database whose tables another version of Optuna made."""
    found = re.search(r"set up by optuna ([\w.]+)", reason)
    made = f"was made by Optuna {found[1]}" if found else "was made by another Optuna"
    ours = f"here is Optuna {optuna.__version__}"
    if "storage upgrade" not in reason:
        return f"{made}, which is newer: {ours}. Install that version of Optuna beside it."
    path = sqlite_file(url)
    if path is None:
        upgrade = f"optuna storage upgrade --storage {masked(url)}"
        return f"{made}: {ours}. Make a backup of it, then upgrade it: {upgrade}"
    copy = path.with_name(f"{path.stem}-upgraded{path.suffix}")
    words = shlex.join(["cp", str(path), str(copy)])
    upgrade = shlex.join(["optuna", "storage", "upgrade", "--storage", f"sqlite:///{copy}"])
    return f"{made}: {ours}. Upgrade a copy of it: {words} && {upgrade}"


def url_template(url: sqlalchemy.engine.URL) -> str:
    """Return a URL as Optuna wants it, which fills in braces."""
    return url.render_as_string(hide_password=False).replace("{", "{{").replace("}", "}}")


def tables(url: sqlalchemy.engine.URL, options: Mapping[str, Any]) -> set[str]:
    """Return the names of the tables of a database."""
    engine = sqlalchemy.create_engine(url, **options)
    try:
        return set(sqlalchemy.inspect(engine).get_table_names())
    finally:
        engine.dispose()


def load_named(storage: RDBStorage, name: str, shown: str) -> optuna.Study:
    """Load a study by name, or say which names there are."""
    try:
        return optuna.load_study(study_name=name, storage=storage)
    except KeyError:
        names = optuna.get_all_study_names(storage)
        if not names:
            raise StudyError(f"--storage: {shown} holds no study. Start one with `run`.") from None
        raise StudyError(f"{shown}: {unknown_name('study', name, names)}") from None
