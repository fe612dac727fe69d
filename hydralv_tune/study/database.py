"""Databases of studies: how they are opened, and what it means when one does not answer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import optuna
import sqlalchemy
from optuna.exceptions import StorageInternalError
from optuna.storages import RDBStorage
from sqlalchemy import exc as sqlalchemy_errors

from hydralv_tune.errors import HydraLVError, StudyError, unknown_name
from hydralv_tune.mutex import MutexLost
from hydralv_tune.storage_url import masked, reason_of

optuna.logging.set_verbosity(optuna.logging.WARNING)


class DatabaseAway(HydraLVError):  # noqa: N818 - what happened
    """The database does not answer right now; what was to be told waits in the journal."""


@contextlib.contextmanager
def database_errors() -> Iterator[None]:
    """Turn what a lost connection or a locked file raises into `DatabaseAway`."""
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
    except StorageInternalError as error:
        if isinstance(error.__cause__, lost):
            raise DatabaseAway(reason_of(error.__cause__)) from None
        raise
    except lost as error:
        raise DatabaseAway(reason_of(error)) from None


def url_template(url: sqlalchemy.engine.URL) -> str:
    """Return a URL as Optuna wants it, which fills in braces."""
    return url.render_as_string(hide_password=False).replace("{", "{{").replace("}", "}}")


def require_tables(url: sqlalchemy.engine.URL, options: Mapping[str, Any]) -> None:
    """Refuse a database that holds no study at all, without making tables in it."""
    engine = sqlalchemy.create_engine(url, **options)
    try:
        if not sqlalchemy.inspect(engine).has_table("studies"):
            raise StudyError(f"--storage: {masked(url)} holds no study. Start one with `run`.")
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
        raise StudyError(f"--study: {unknown_name('study', name, names)} in {shown}") from None
