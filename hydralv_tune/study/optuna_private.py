"""Everything that the package uses of Optuna beyond its public interface.

`tests/test_study.py` checks each name, and says which one a new release of Optuna has moved.
"""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Container, Mapping
from functools import cached_property, lru_cache
from types import SimpleNamespace
from typing import Any

import optuna
import sqlalchemy
from optuna.distributions import BaseDistribution
from optuna.storages import RDBStorage
from optuna.storages._rdb import models
from optuna.storages._rdb.storage import _create_scoped_session
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from hydralv_tune.study.trial_views import PREFIX

PRIVATE_NAMES: tuple[tuple[Any, tuple[str, ...]], ...] = (
    (
        RDBStorage,
        ("_set_trial_attr_without_commit", "_set_trial_intermediate_value_without_commit"),
    ),
    (models.StudyModel, ("study_id", "study_name", "directions")),
    (models.StudyDirectionModel, ("direction", "objective")),
    (models.StudySystemAttributeModel, ("study_id", "key", "value_json")),
    (models.TrialModel, ("find_or_raise_by_id",)),
    (models.TrialSystemAttributeModel, ("find_by_trial_and_key",)),
    (models.TrialValueModel, ("trial_id", "value")),
    (models.TrialHeartbeatModel, ("trial_id", "heartbeat")),
    (models, ("NOT_FOUND_MSG",)),
    (BaseDistribution, ("_contains",)),
    (optuna.samplers.CmaEsSampler, ("_split_optimizer_str", "_restore_optimizer")),
    (optuna.Study, ("_get_trials",)),
)
"""Private names, or public names of private classes, by owner."""


NOT_FOUND = models.NOT_FOUND_MSG
"""What Optuna says where a study or a trial is not in the database any more."""


def trial_id(trial: FrozenTrial | optuna.Trial) -> int:
    """Return the key of a trial in the database, which is not its number."""
    return trial._trial_id


def id_of_study(study: Any) -> int:
    """Return the key of a study in the database."""
    found: int = study._study_id
    return found


def moved_study(study: Any, shift: int) -> Any:
    """Return a copy of a frozen study under another id.

    Args:
        study: As a storage returns it.
        shift: What is added to its id.
    """
    moved = copy.copy(study)
    moved._study_id += shift
    return moved


def moved_trial(trial: FrozenTrial, shift: int, system: Mapping[str, Any]) -> FrozenTrial:
    """Return a copy of a trial under another id, with other system attributes.

    Args:
        trial: As a storage returns it.
        shift: What is added to its id.
        system: The attributes that the copy has.
    """
    moved = copy.copy(trial)
    moved._trial_id += shift
    moved._system_attrs = dict(system)
    return moved


def contains(distribution: BaseDistribution, value: Any) -> bool:
    """Return whether a distribution can yield a value."""
    try:
        return distribution._contains(distribution.to_internal_repr(value))
    except (ValueError, TypeError):
        return False


def create_study(storage: RDBStorage, name: str, attributes: Mapping[str, Any]) -> None:
    """Make a study that minimises, with its attributes, in one transaction.

    Optuna takes several. A study without a search space is then never one of ours half made, but
    another program's.

    Args:
        storage: That has no study of the name; to be called under the study mutex.
        name: Of the study.
        attributes: Plain JSON types by name.
    """
    direction = models.StudyDirectionModel(direction=StudyDirection.MINIMIZE, objective=0)
    with _create_scoped_session(storage.scoped_session) as session:
        study = models.StudyModel(study_name=name, directions=[direction])
        session.add(study)
        session.flush()
        for key, value in attributes.items():
            session.add(
                models.StudySystemAttributeModel(
                    study_id=study.study_id, key=f"{PREFIX}{key}", value_json=json.dumps(value)
                )
            )


def set_attributes(
    storage: RDBStorage,
    trial_id: int,
    attributes: Mapping[str, Any],
    figures: Mapping[str, Any] | None = None,
) -> None:
    """Store attributes of a trial in one transaction; Optuna itself takes one for each.

    Args:
        storage: That holds the trial.
        trial_id: Of a trial that is not finished.
        attributes: Plain JSON types by name; kept as `trial_views.attributes_of` reads them.
        figures: Short figures for user attributes.

    Raises:
        UpdateFinishedTrialError: The trial is finished.
    """
    with _create_scoped_session(storage.scoped_session, True) as session:
        for key, value in attributes.items():
            storage._set_trial_attr_without_commit(
                session, models.TrialSystemAttributeModel, trial_id, f"{PREFIX}{key}", value
            )
        for key, value in (figures or {}).items():
            storage._set_trial_attr_without_commit(
                session, models.TrialUserAttributeModel, trial_id, key, value
            )


def rank_again(storage: RDBStorage, values: Mapping[int, tuple[float, Mapping[str, Any]]]) -> None:
    """Give finished trials other values in one transaction; Optuna itself refuses to.

    Args:
        storage: That holds the trials.
        values: Of each trial, by its key: what it is ranked by, and system attributes beside it.
    """
    model = models.TrialSystemAttributeModel
    with _create_scoped_session(storage.scoped_session) as session:
        for key, (value, system) in values.items():
            session.query(models.TrialValueModel).filter_by(trial_id=key).update({"value": value})
            session.add_all(
                model(trial_id=key, key=name, value_json=json.dumps(known))
                for name, known in system.items()
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
        beside: What each attribute of that name holds of this step, as `VIOLATIONS` does;
            None is left out.

    Raises:
        UpdateFinishedTrialError: The trial is finished.
    """
    with _create_scoped_session(storage.scoped_session, True) as session:
        storage._set_trial_intermediate_value_without_commit(session, trial_id, step, value)
        model = models.TrialSystemAttributeModel
        trial = models.TrialModel.find_or_raise_by_id(trial_id, session)
        for key, of_step in beside.items():
            if of_step is None:
                continue
            name = f"{PREFIX}{key}"
            stored = model.find_by_trial_and_key(trial, name, session)
            known = {} if stored is None else json.loads(str(stored.value_json))
            storage._set_trial_attr_without_commit(
                session, model, trial_id, name, {**known, str(step): of_step}
            )


def count_trials(study: optuna.Study) -> int:
    """Return how many trials a study has, fresh from the database."""
    return study._storage.get_n_trials(study._study_id)


def study_attributes(study: optuna.Study) -> dict[str, Any]:
    """Return what a study keeps: user attributes, and system attributes of ours."""
    system = study._storage.get_study_system_attrs(study._study_id)
    own = {k.removeprefix(PREFIX): v for k, v in system.items() if k.startswith(PREFIX)}
    return {**study.user_attrs, **own}


def set_study_attribute(study: optuna.Study, key: str, value: Any) -> None:
    """Store what no page shows of a study, as `study_attributes` reads it."""
    study._storage.set_study_system_attr(study._study_id, f"{PREFIX}{key}", value)


def enqueue(study: optuna.Study, params: Mapping[str, Any], attributes: Mapping[str, Any]) -> None:
    """Enqueue a trial with parameters and attributes, as `Study.enqueue_trial` does.

    Args:
        study: That the trial is for.
        params: Encoded values; the sampler chooses the others.
        attributes: As `trial_views.attributes_of` reads them.
    """
    own = {f"{PREFIX}{key}": value for key, value in attributes.items()}
    study.add_trial(
        optuna.trial.create_trial(
            state=TrialState.WAITING, system_attrs={"fixed_params": dict(params), **own}
        )
    )


FEW = 400
"""Trials that are asked for one by one; more are read with their whole study."""


def read_trials(storage: RDBStorage, study_id: int, known: Container[int]) -> list[FrozenTrial]:
    """Return the trials of a study that are not known yet, in the order of their numbers.

    Optuna makes an object of each row and reads each distribution anew: a study of five thousand
    trials takes it twenty seconds, and this two.

    Args:
        storage: That holds the study.
        study_id: Key of the study in it.
        known: Keys of trials that the caller has, which are left out.
    """
    trials = models.TrialModel.__table__

    def rows(model: Any, *names: str) -> Any:
        table = model.__table__
        query = sqlalchemy.select(*(table.c[name] for name in names))
        if table is not trials:
            query = query.join(trials, trials.c.trial_id == table.c.trial_id)
        few = [row[0] for row in found] if len(found) <= FEW else []
        wanted = trials.c.trial_id.in_(few) if few else trials.c.study_id == study_id
        return connection.execute(query.where(wanted))

    with storage.engine.connect() as connection:
        found: list[Any] = []
        names: tuple[str, ...]
        names = ("trial_id", "number", "state", "datetime_start", "datetime_complete")
        found = [row for row in rows(models.TrialModel, *names) if row[0] not in known]
        if not found:
            return []
        parts: dict[int, list[dict[Any, Any]]] = {row[0]: [{} for _ in range(6)] for row in found}
        names = ("trial_id", "param_name", "param_value", "distribution_json")
        for key, name, internal, text in rows(models.TrialParamModel, *names):
            if key in parts:
                distribution = _distribution(text)
                parts[key][0][name] = distribution.to_external_repr(internal)
                parts[key][1][name] = distribution
        attributes = (models.TrialUserAttributeModel, models.TrialSystemAttributeModel)
        for index, model in enumerate(attributes, start=2):
            for key, name, text in rows(model, "trial_id", "key", "value_json"):
                if key in parts:
                    parts[key][index][name] = json.loads(text)
        step = models.TrialIntermediateValueModel
        names = ("trial_id", "step", "intermediate_value", "intermediate_value_type")
        for key, number, stored, kind in rows(step, *names):
            if key in parts:
                parts[key][4][number] = step.stored_repr_to_intermediate_value(stored, kind)
        value = models.TrialValueModel
        for key, stored, kind in rows(value, "trial_id", "value", "value_type"):
            if key in parts:
                parts[key][5][0] = value.stored_repr_to_value(stored, kind)
    return [
        FrozenTrial(
            number=number, state=state, value=parts[key][5].get(0), datetime_start=started,
            datetime_complete=ended, params=parts[key][0], distributions=parts[key][1],
            user_attrs=parts[key][2], system_attrs=parts[key][3],
            intermediate_values=parts[key][4], trial_id=key,
        )
        for key, number, state, started, ended in sorted(found, key=lambda row: row[1])
    ]  # fmt: skip


@lru_cache(maxsize=4096)
def _distribution(text: str) -> BaseDistribution:
    """Return a distribution from its text; thousands of trials share a few."""
    return optuna.distributions.json_to_distribution(text)


def waiting_trials(study: optuna.Study) -> list[FrozenTrial]:
    """Return the enqueued trials of a study, fresh from the database."""
    return study._storage.get_all_trials(
        study._study_id, deepcopy=False, states=(TrialState.WAITING,)
    )


def claim_waiting(study: optuna.Study, trial: FrozenTrial) -> optuna.Trial | None:
    """Make one enqueued trial a running one of this process; None where another was faster."""
    if not study._storage.set_trial_state_values(trial._trial_id, TrialState.RUNNING):
        return None
    return optuna.Trial(study, trial._trial_id)


class StudyWithout:
    """A study as samplers and pruners see it where they are not to see some of its trials.

    Args:
        study: The whole study.
        attribute: Of the hidden trials, as `trial_views.attributes_of` reads it.
    """

    def __init__(self, study: Any, attribute: str) -> None:
        self._study, self._hidden = study, f"{PREFIX}{attribute}"

    def __getattr__(self, name: str) -> Any:
        return getattr(self._study, name)

    @cached_property
    def _shown(self) -> list[FrozenTrial]:
        """Return the trials that are not hidden, read once: samplers ask several times a trial."""
        trials = self._study.get_trials(deepcopy=False)
        return [trial for trial in trials if self._hidden not in trial.system_attrs]

    def get_trials(
        self, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        """Return the trials that are not hidden, as they were when first asked for."""
        found = [trial for trial in self._shown if states is None or trial.state in states]
        return copy.deepcopy(found) if deepcopy else found

    def _get_trials(
        self,
        deepcopy: bool = True,
        states: Container[TrialState] | None = None,
        use_cache: bool = False,
    ) -> list[FrozenTrial]:
        """Return the same, as Optuna's samplers ask for it."""
        return self.get_trials(deepcopy, states)


def owner_of_note(study: optuna.Study, storage: RDBStorage, trial: FrozenTrial) -> Any:
    """Return what `optuna_dashboard.save_note` takes for a trial that may be finished.

    It uses the identity alone; a real `Trial` would ask the sampler for parameters first.
    """
    return SimpleNamespace(storage=storage, study=study, _trial_id=trial._trial_id)


class CmaEsWithoutPickle(optuna.samplers.CmaEsSampler):
    """CMA-ES whose state stays in this process: no pickle goes to the database or comes from it.

    A restarted driver starts the strategy anew and feeds it the generations of the history.
    """

    _state: str | None = None

    def _split_optimizer_str(self, optimizer_str: str) -> dict[str, str]:
        """Keep the state here and give the storage nothing."""
        self._state = optimizer_str
        return {}

    def _restore_optimizer(self, completed_trials: list[FrozenTrial]) -> Any:
        """Return the state that this process kept."""
        return None if self._state is None else pickle.loads(bytes.fromhex(self._state))
