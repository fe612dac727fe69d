"""Studies of several storages as the Optuna dashboard reads them: as one, with short attributes."""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from typing import Any

import optuna
from optuna.storages import BaseStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from hydralv_tune.study.optuna_private import (
    id_of_study,
    moved_study,
    moved_trial,
    read_trials,
    trial_id,
)
from hydralv_tune.study.study import Study, view_of
from hydralv_tune.study.trial_views import (
    CONSTRAINTS,
    REPEATS,
    TrialView,
    best_trial,
    figures_of,
    violation_of,
)

SPAN = 10**9
"""Ids of the second storage begin here, those of the third at twice that, and so on."""

LONGEST = 80
"""Characters of an attribute that still fits a row of the dashboard's table."""

HIDDEN = {"pid", "root", "owner", "driver", "record", "checkpoint", "cuda_visible_devices", "retry",
          "evaluated_at", "evaluations", "left_s", "spent_s", REPEATS}  # fmt: skip
"""User attributes that nobody compares trials by."""

HIDDEN_OF_STUDY = {"identity", "out", "wanted"}
"""User attributes of a study that only the tool reads."""

OF_A_TRIAL = re.compile(r"^(dashboard:(?:artifacts:)?)(\d+)(:.*)$", re.S)
STOPPED = "stopped from the dashboard"


def short_attributes(view: TrialView) -> dict[str, Any]:
    """Return what of a trial is worth a column: short scalars that can be sorted and plotted.

    Studies of the first version kept whole mappings as user attributes; their figures are read
    from those.
    """
    attributes, known = view.user_attrs, figures_of(view)
    given = {key: value for key, value in attributes.items() if key not in HIDDEN}
    shown = {**known, **given}
    renamed = ("warm_start", "reason", "seconds", "gpus", "epoch")
    return {
        key: value[: LONGEST - 1] + "…"
        if isinstance(value, str) and len(value) > LONGEST
        else value
        for key, value in shown.items()
        if isinstance(value, str | int | float) and key not in renamed
    }


def shared_and_all_distributions(
    trials: Iterable[FrozenTrial],
) -> tuple[list[tuple[str, Any]], list[tuple[str, Any]]]:
    """Return name and distribution of what every trial that did not fail has, and of what any has.

    The widest range of a parameter is the one of its last trial: ranges of a study only widen.
    """
    every: dict[str, Any] = {}
    shared: set[str] | None = None
    for trial in trials:
        if trial.state != TrialState.FAIL and trial.distributions:
            every.update(trial.distributions)
            names = set(trial.distributions)
            shared = names if shared is None else shared & names
    rows = sorted(every.items())
    return [row for row in rows if row[0] in (shared or ())], rows


def _delegated(name: str) -> Callable[..., Any]:
    """Return a method that asks the storage which an id belongs to."""

    def call(self: StudiesView, number: int, *arguments: Any, **options: Any) -> Any:
        storage, own = self.storage_of(number)
        return getattr(storage, name)(own, *arguments, **options)

    call.__name__ = name
    return call


class StudiesView(BaseStorage):
    """Several storages as one.

    A trial is shown with its objective, with the constraint where the dashboard looks for it, and
    with `short_attributes`. The best trial is the one that `status` names.

    Args:
        studies: Open studies, grouped by storage; studies of one storage share its connection.
    """

    def __init__(self, studies: Sequence[Study]) -> None:
        storages = list(dict.fromkeys(study.rdb for study in studies))
        self._storages = [optuna.storages.get_storage(storage) for storage in storages]
        self._studies = {
            storages.index(study.rdb) * SPAN + id_of_study(study.optuna): study for study in studies
        }
        self._databases = storages
        # By study and trial: what is finished does not change any more.
        self._finished: dict[int, dict[int, FrozenTrial]] = {}
        self._complete: dict[int, dict[int, TrialView]] = {}

    delete_study = _delegated("delete_study")
    set_study_user_attr = _delegated("set_study_user_attr")
    get_study_directions = _delegated("get_study_directions")
    get_study_user_attrs = _delegated("get_study_user_attrs")
    create_new_trial = _delegated("create_new_trial")
    set_trial_param = _delegated("set_trial_param")
    set_trial_intermediate_value = _delegated("set_trial_intermediate_value")
    set_trial_user_attr = _delegated("set_trial_user_attr")
    set_trial_system_attr = _delegated("set_trial_system_attr")

    def storage_of(self, number: int) -> tuple[BaseStorage, int]:
        """Return the storage that an id belongs to, and the id there."""
        return self._storages[number // SPAN], number % SPAN

    def study_of(self, study_id: int) -> Study | None:
        """Return the study of an id; None where the dashboard has made it since."""
        return self._studies.get(study_id)

    def create_new_study(
        self, directions: Sequence[StudyDirection], study_name: str | None = None
    ) -> int:
        """Make a study in the first storage."""
        return self._storages[0].create_new_study(directions, study_name)

    def get_study_id_from_name(self, study_name: str) -> int:
        """Return the id of a study by the name that is shown."""
        for study in self.get_all_studies():
            if study.study_name == study_name:
                return id_of_study(study)
        raise KeyError(study_name)

    def get_study_name_from_id(self, study_id: int) -> str:
        """Return the name that is shown, which says the place where two studies share a name."""
        storage, own = self.storage_of(study_id)
        name = storage.get_study_name_from_id(own)
        study = self.study_of(study_id)
        shared = sum(other.name == name for other in self._studies.values()) > 1
        return f"{name} in {study.out or study.storage}" if shared and study is not None else name

    def get_study_system_attrs(self, study_id: int) -> dict[str, Any]:
        """Return the notes and names of a study, with the ids that are shown."""
        storage, own = self.storage_of(study_id)
        shift = study_id - own
        return {
            self._shifted(key, shift): value
            for key, value in storage.get_study_system_attrs(own).items()
        }

    def set_study_system_attr(self, study_id: int, key: str, value: Any) -> None:
        """Store a note, under the ids of its storage."""
        storage, own = self.storage_of(study_id)
        storage.set_study_system_attr(own, self._shifted(key, own - study_id), value)

    def get_all_studies(self) -> list[Any]:
        """Return all studies with what fits a row of their attributes."""
        shown = []
        for index, storage in enumerate(self._storages):
            for frozen in storage.get_all_studies():
                study = moved_study(frozen, index * SPAN)
                study.study_name = self.get_study_name_from_id(id_of_study(study))
                study.user_attrs = {
                    key: value
                    for key, value in frozen.user_attrs.items()
                    if key not in HIDDEN_OF_STUDY
                    and (
                        isinstance(value, int | float)
                        or (isinstance(value, str) and len(value) <= LONGEST)
                    )
                }
                study.system_attrs = {
                    self._shifted(key, index * SPAN): value
                    for key, value in frozen.system_attrs.items()
                }
                shown.append(study)
        return shown

    def get_trial(self, trial_id: int) -> FrozenTrial:
        """Return a trial as it is shown."""
        storage, own = self.storage_of(trial_id)
        return self._show(storage.get_trial(own), trial_id - own)

    def get_all_trials(
        self,
        study_id: int,
        deepcopy: bool = True,
        states: Container[TrialState] | None = None,
    ) -> list[FrozenTrial]:
        """Return the trials of a study as they are shown."""
        shift = study_id // SPAN * SPAN
        storage = self._databases[study_id // SPAN]
        kept = self._finished.setdefault(study_id, {})
        shown = dict(kept)
        for trial in read_trials(storage, study_id - shift, {key - shift for key in kept}):
            key = trial_id(trial) + shift
            shown[key] = self._show(trial, shift)
            if trial.state.is_finished():
                kept[key] = shown[key]
            if trial.state == TrialState.COMPLETE:
                self._complete.setdefault(study_id, {})[key] = view_of(trial)
        trials = sorted(shown.values(), key=lambda trial: trial.number)
        return [trial for trial in trials if states is None or trial.state in states]

    def get_best_trial(self, study_id: int) -> FrozenTrial:
        """Return the trial that `status` calls the best.

        Raises:
            ValueError: No trial is complete.
        """
        trials = {trial.number: trial for trial in self.get_all_trials(study_id, deepcopy=False)}
        best = best_trial(self._complete.get(study_id, {}).values())
        if best is None:
            raise ValueError("No trials are completed yet.")
        return trials[best.number]

    def set_trial_state_values(
        self, trial_id: int, state: TrialState, values: Sequence[float] | None = None
    ) -> bool:
        """End a trial, and say where that was asked for."""
        storage, own = self.storage_of(trial_id)
        if state == TrialState.FAIL and not storage.get_trial(own).state.is_finished():
            storage.set_trial_user_attr(own, "reason", STOPPED)
        return storage.set_trial_state_values(own, state, values)

    def remove_session(self) -> None:
        """Close the connections of this thread."""
        for storage in self._storages:
            storage.remove_session()

    @staticmethod
    def _shifted(key: str, shift: int) -> str:
        """Return the name of an attribute of a study with the id of the trial in it shifted."""
        match = OF_A_TRIAL.match(key) if shift else None
        return f"{match[1]}{int(match[2]) + shift}{match[3]}" if match else key

    def _show(self, trial: FrozenTrial, shift: int) -> FrozenTrial:
        """Return a trial as it is shown."""
        view, violation = view_of(trial), violation_of(trial)
        system: Mapping[str, Any] = trial.system_attrs
        if violation is not None:
            system = {**system, CONSTRAINTS: [violation]}
        shown = moved_trial(trial, shift, system)
        shown.user_attrs = short_attributes(view)
        if view.value is not None:
            shown.values = [view.value]
        return shown
