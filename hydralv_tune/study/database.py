"""Databases of studies: how they are opened, and what it means when one does not answer."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import optuna
import sqlalchemy
from optuna.exceptions import StorageInternalError
from optuna.storages import RDBStorage
from optuna.storages._rdb import models
from optuna.storages._rdb.storage import _create_scoped_session
from sqlalchemy import exc as sqlalchemy_errors

from hydralv_tune.config.errors import HydraLVError, StudyError, unknown_name
from hydralv_tune.study.mutex import MutexLost
from hydralv_tune.study.storage_url import engine_options, masked, reason_of, sqlite_file

optuna.logging.set_verbosity(optuna.logging.WARNING)


class DatabaseAway(HydraLVError):
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


def open_storage(url: sqlalchemy.engine.URL, *, create: bool) -> RDBStorage:
    """Return Optuna's storage of a URL.

    Args:
        url: From `parse_storage`.
        create: Make the tables where there are none.
    """
    storage = RDBStorage(
        url_template(url), engine_kwargs=engine_options(url), skip_table_creation=not create
    )
    if sqlite_file(url) is not None:
        # As safe as deleting the rollback journal at each commit, and half as slow. A write-ahead
        # log would be faster still, but breaks on shared folders.
        @sqlalchemy.event.listens_for(storage.engine, "connect")
        def _(connection: Any, record: object) -> None:
            connection.execute("PRAGMA journal_mode = TRUNCATE")

        storage.engine.dispose()  # connections made before
    return storage


def set_attributes(storage: RDBStorage, trial_id: int, attributes: Mapping[str, Any]) -> None:
    """Store user attributes of a trial in one transaction; Optuna itself takes one for each.

    Args:
        storage: That holds the trial.
        trial_id: Of a trial that is not finished.
        attributes: Plain JSON types by name.

    Raises:
        UpdateFinishedTrialError: The trial is finished.
    """
    with _create_scoped_session(storage.scoped_session, True) as session:
        for key, value in attributes.items():
            storage._set_trial_attr_without_commit(
                session, models.TrialUserAttributeModel, trial_id, key, value
            )


def store_evaluation(
    storage: RDBStorage, trial_id: int, step: int, value: float, beside: Mapping[str, Any]
) -> None:
    """Store an intermediate value and what is known beside it, in one transaction.

    Args:
        storage: That holds the trial.
        trial_id: Of a trial that is not finished.
        step: Evaluation, from 1.
        value: Objective so far.
        beside: What each user attribute of that name holds of this step, as `VIOLATIONS` does;
            None is left out.

    Raises:
        UpdateFinishedTrialError: The trial is finished.
    """
    with _create_scoped_session(storage.scoped_session, True) as session:
        storage._set_trial_intermediate_value_without_commit(session, trial_id, step, value)
        model = models.TrialUserAttributeModel
        trial = models.TrialModel.find_or_raise_by_id(trial_id, session)
        for key, of_step in beside.items():
            if of_step is None:
                continue
            stored = model.find_by_trial_and_key(trial, key, session)
            known = {} if stored is None else json.loads(str(stored.value_json))
            storage._set_trial_attr_without_commit(
                session, model, trial_id, key, {**known, str(step): of_step}
            )


def url_template(url: sqlalchemy.engine.URL) -> str:
    """Return a URL as Optuna wants it, which fills in braces."""
    return url.render_as_string(hide_password=False).replace("{", "{{").replace("}", "}}")


def has_tables(url: sqlalchemy.engine.URL, options: Mapping[str, Any]) -> bool:
    """Return whether a database has tables of studies, without making any."""
    engine = sqlalchemy.create_engine(url, **options)
    try:
        return sqlalchemy.inspect(engine).has_table("studies")
    finally:
        engine.dispose()


def require_tables(url: sqlalchemy.engine.URL, options: Mapping[str, Any]) -> None:
    """Refuse a database that holds no study at all, without making tables in it."""
    if not has_tables(url, options):
        raise StudyError(f"--storage: {masked(url)} holds no study. Start one with `run`.")


def load_named(storage: RDBStorage, name: str, shown: str) -> optuna.Study:
    """Load a study by name, or say which names there are."""
    try:
        return optuna.load_study(study_name=name, storage=storage)
    except KeyError:
        names = optuna.get_all_study_names(storage)
        if not names:
            raise StudyError(f"--storage: {shown} holds no study. Start one with `run`.") from None
        raise StudyError(f"{shown}: {unknown_name('study', name, names)}") from None
