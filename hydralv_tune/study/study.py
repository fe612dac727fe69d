"""One Optuna study: opened, read, and changed as a whole."""

from __future__ import annotations

import contextlib
import itertools
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState

from hydralv_tune.config.errors import StudyError
from hydralv_tune.config.search_space import SearchSpace, WarmStart, space_from_mapping
from hydralv_tune.study.confirm import confirmed
from hydralv_tune.study.database import (
    DatabaseAway,
    NoStudies,
    StudyGone,
    database_errors,
    gone_before,
    load_named,
    no_collection,
    open_storage,
    while_opening,
)
from hydralv_tune.study.distributions import (
    OWN_SPACE,
    distribution_of,
    elsewhere,
    imported_trial,
    require_comparable,
    require_compatible,
)
from hydralv_tune.study.earlier import Lesson
from hydralv_tune.study.ending import outlook
from hydralv_tune.study.mutex import StudyMutex
from hydralv_tune.study.optuna_private import (
    StudyWithout,
    create_study,
    enqueue,
    owner_of_note,
    rank_again,
    set_study_attribute,
    study_attributes,
    trial_id,
)
from hydralv_tune.study.proposals import TriedCandidates, is_plain
from hydralv_tune.study.storage_url import masked, parse_storage, probe, sqlite_file
from hydralv_tune.study.study_folder import holds_results, owner_of
from hydralv_tune.study.trial_views import (
    CONSTRAINTS,
    FINISHED,
    OBJECTIVE,
    OVERRIDES,
    REPEAT_OF,
    TrialView,
    attributes_of,
    best_trial,
    count_states,
    describe_best,
    guard_warnings,
    ranked_value,
    recipe_of,
    violation_of,
)

if TYPE_CHECKING:
    import pandas as pd

FEWEST_FOR_IMPORTANCE = 20
"""COMPLETE trials under which it is too early to say which parameter matters."""

ARTIFACTS = "artifacts:"
"""Start of the system attributes in which Optuna keeps the artifacts of a trial."""

SPACE, OUT, VOLUMES, IDENTITY = "space", "out", "volumes", "identity"
WANTED = "wanted"
"""Attribute of a study: how many finished trials the last `run` wanted."""
LESSONS = "lessons"
"""Attribute of a study: what earlier studies teach it, as `Lesson.as_mapping` gives it."""


class Study:
    """An open study. Use `Study.open` or `open_readonly`."""

    def __init__(
        self, storage: RDBStorage, study: optuna.Study, shown: str, folder: Path | None = None
    ) -> None:
        self.rdb = storage
        self._folder = folder
        self._located: tuple[str, Path] | None = None
        self.optuna = study
        self.storage = shown
        self.name = study.study_name
        self._space: SearchSpace | None = None
        self._finished: dict[int, TrialView] = {}

    @classmethod
    def open(
        cls,
        storage: str,
        name: str,
        *,
        space: SearchSpace | None = None,
        create: bool = False,
        extend: bool = False,
        folder: Path | None = None,
    ) -> Study:
        """Open a study, or make it.

        Args:
            storage: `sqlite:///FILE` or `postgresql+psycopg://…`.
            name: Name of the study.
            space: What it searches; needed to make it. The stored space must equal it.
            create: Make database and study where they do not exist; otherwise nothing is written.
            extend: Accept a space that differs from the stored one.
            folder: Where its trials are now; where the database says so by default.

        Raises:
            StudyError: The storage does not exist or answer, there is no such study or another
                program made it, or the space has changed.
        """
        url = parse_storage(storage)
        probe(url, create=create)
        if not create:
            with while_opening(url):
                rdb = open_storage(url, create=False)
                return cls(rdb, load_ours(rdb, name, masked(url)), masked(url), folder)
        assert space is not None, "a study is made from its space"
        mutex = StudyMutex(url, name)
        try:
            with database_errors(), mutex:
                rdb = open_storage(url, create=True)
                if name not in optuna.get_all_study_names(rdb):
                    create_study(rdb, name, {SPACE: space.as_mapping()})
                study = cls(rdb, load_ours(rdb, name, masked(url)), masked(url), folder)
                study._settle_space(space, extend=extend)
                study._enqueue_warm_starts()
        except DatabaseAway as error:
            raise StudyError(f"--storage: {masked(url)} does not answer: {error}.") from None
        except StudyGone as error:
            raise gone_before(masked(url), name, error) from None
        finally:
            mutex.close()
        return study

    @property
    def wanted(self) -> int:
        """Return how many finished trials the last `run` wanted."""
        return int(self._attributes().get(WANTED) or self.space.budget.trials)

    @property
    def space(self) -> SearchSpace:
        """Return the space that the study searches."""
        if self._space is None:
            self._space = space_from_mapping(self._attributes()[SPACE])
        return self._space

    @property
    def out(self) -> Path | None:
        """Return the folder of the study, or None where it has none yet.

        It may have been moved or copied with its SQLite file; then the folder that the file lies in
        is taken, if that is marked as this study's.
        """
        text = self._attributes().get(OUT)
        if not text:
            return None
        if self._located is None or self._located[0] != text:
            self._located = text, self._locate(Path(text))
        return self._located[1]

    def _locate(self, stored: Path) -> Path:
        """Return where the folder of the study is now."""
        database = sqlite_file(self.rdb.engine.url)
        beside = None if database is None else database.absolute().parent
        for folder in filter(None, (self._folder, beside)):
            owner = owner_of(folder)
            if owner is not None and owner.identity == self.identity:
                return folder
            if owner is None and not stored.is_dir() and holds_results(folder):
                return folder  # of a version that did not mark its folders
        return stored

    @property
    def identity(self) -> str | None:
        """Return what tells the study from any other, of the same name too; None before its run."""
        return self._attributes().get(IDENTITY)

    def _attributes(self) -> dict[str, Any]:
        """Return what the database keeps of the study."""
        with self._errors():
            return study_attributes(self.optuna)

    def folder_of(self, trial: TrialView) -> Path | None:
        """Return the folder that holds all attempts of a trial.

        It is built from a number, so nothing in the database can point outside the study's folder.
        """
        return None if self.out is None else self.out / "trials" / str(trial.root)

    def frozen(self) -> list[FrozenTrial]:
        """Return all trials as Optuna has them, not to be changed.

        Raises:
            DatabaseAway: The database does not answer right now.
        """
        with self._errors(), no_collection():
            return self.optuna.get_trials(deepcopy=False)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Turn errors of the database into ours, with the name of the study."""
        try:
            with database_errors():
                yield
        except StudyGone as error:
            place = f"Study '{self.name}' in {self.storage}"
            raise StudyGone(error.what, f"{place} {error.what}.") from None

    def trials(self, frozen: Sequence[FrozenTrial] | None = None) -> list[TrialView]:
        """Return all trials, in order of their numbers; `frozen` where they were just read."""
        views = []
        for trial in self.frozen() if frozen is None else frozen:
            view = self._finished.get(trial.number)
            if view is None:
                view = view_of(trial)
                if trial.state.is_finished():  # and cannot change any more
                    self._finished[trial.number] = view
            views.append(view)
        return views

    def best(self) -> TrialView | None:
        """Return the best feasible COMPLETE trial, or the one nearest to feasible, or None."""
        return best_trial(self.trials())

    def facts(self) -> dict[str, Any]:
        """Return what `run` and `status` print: study, storage, trials, best, best_config."""
        trials = self.trials()
        best = best_trial(trials)
        config = None
        if best is not None and (folder := self.folder_of(best)) is not None:
            config = folder / "config.yaml"
        return {
            "study": self.name,
            "storage": self.storage,
            "trials": count_states(trials),
            "best": describe_best(best),
            "best_config": str(config) if config is not None and config.is_file() else None,
            "warnings": guard_warnings(best, self.space.objective.guard.f1_iou50),
            **({} if self.lessons is None else {"learned_from": self.learned_from()}),
            **({} if (going_on := outlook(self.space, trials)) is None else {"going_on": going_on}),
            **({} if (again := confirmed(self.space, trials)) is None else {"confirmed": again}),
        }

    def table(self) -> pd.DataFrame:
        """Return one row per finished trial: number, state, value, params, figures, seconds."""
        rows = []
        for trial in self.trials():
            if trial.state not in (*FINISHED, "FAIL"):
                continue
            figures = trial.user_attrs.get("metrics") or {}
            rows.append(
                {
                    "number": trial.number,
                    "root": trial.root,
                    "attempt": trial.attempt,
                    "state": trial.state,
                    "value": trial.value,
                    "feasible": trial.is_feasible,
                    "seconds": trial.seconds,
                    "reason": trial.user_attrs.get("reason"),
                    "warm_start": trial.user_attrs.get("warm_start"),
                    "repeat_of": trial.user_attrs.get(REPEAT_OF),
                    "started": trial.started,
                    "finished": trial.finished,
                    **{f"params.{key}": value for key, value in trial.params.items()},
                    **{
                        f"metrics.{key}": value
                        for key, value in figures.items()
                        if isinstance(value, int | float | str)
                    },
                }
            )
        import pandas as pd

        return pd.DataFrame(rows)

    def remember(self, key: str, value: Any) -> None:
        """Store a fact about the study.

        Args:
            key: Name of the user attribute.
            value: Plain JSON types.
        """
        if self._attributes().get(key) == value:
            return
        if key == SPACE:
            set_study_attribute(self.optuna, key, value)
        else:
            self.optuna.set_user_attr(key, value)

    def importances(self) -> dict[str, float]:
        """Return how much each parameter matters for a good value, as shares, largest first.

        By PED-ANOVA over the COMPLETE trials, as the Optuna dashboard computes it. Empty while
        there are fewer than `FEWEST_FOR_IMPORTANCE`, or where all are alike.
        """
        complete = [t for t in self.trials() if t.state == "COMPLETE" and not t.is_repeat]
        if len(complete) < FEWEST_FOR_IMPORTANCE or len({t.value for t in complete}) < 2:
            return {}
        evaluator = optuna.importance.PedAnovaImportanceEvaluator()
        shown: Any = StudyWithout(self.optuna, REPEAT_OF)
        return dict(
            optuna.importance.get_param_importances(
                shown, evaluator=evaluator, target=lambda trial: float(trial.values[0])
            )
        )

    def kind_of(self, name: str) -> str:
        """Return what Optuna calls the distribution of a parameter that is searched now."""
        parameter = self.space.parameters.get(name)
        return "" if parameter is None else type(distribution_of(parameter)).__name__

    def attach(self, number: int | None, path: Path, store: Any) -> str:
        """Store a file as an artifact of a trial, or of the study, and return its id.

        Args:
            number: The trial; None for the study. An artifact must be there before `tell`.
            path: The file.
            store: Has `write(id, file)`, as Optuna's artifact stores.

        Raises:
            DatabaseAway: Try again later.
            StudyError: There is no such trial, or it is finished.
        """
        with database_errors():
            owner = self.optuna if number is None else trial_by_number(self.optuna, number)
            if owner is None:
                raise StudyError(f"Study '{self.name}' has no trial {number}.")
            try:
                return optuna.artifacts.upload_artifact(
                    artifact_store=store,
                    file_path=str(path),
                    study_or_trial=owner,
                    storage=self.rdb,
                )
            except optuna.exceptions.UpdateFinishedTrialError:
                raise StudyError(
                    f"Trial {number} of study '{self.name}' is finished; it takes no more files."
                ) from None

    def replace_artifacts(self, number: int, paths: Sequence[Path], store: Any) -> None:
        """Store files as artifacts of a trial; those of the same names give way.

        Args:
            number: The trial.
            paths: The files.
            store: Has `write(id, file)` and `remove(id)`.

        Raises:
            DatabaseAway: Try again later.
            StudyError: There is no such trial, or it is finished.
        """
        frozen = trial_by_number(self.optuna, number)
        attributes = {} if frozen is None else frozen.system_attrs
        for key, value in attributes.items():
            old = json.loads(value) if key.startswith(ARTIFACTS) else None
            if frozen is not None and old and old["filename"] in {path.name for path in paths}:
                with database_errors():
                    self.rdb.set_trial_system_attr(trial_id(frozen), key, "null")
                with contextlib.suppress(OSError):
                    store.remove(old["artifact_id"])
        for path in paths:
            self.attach(number, path, store)

    def name_objective(self, label: str) -> None:
        """Give the values of the study a name, for the axes of the dashboard."""
        if self.optuna.metric_names is None:
            with warnings.catch_warnings(), database_errors():
                warnings.simplefilter("ignore")  # Optuna calls the method experimental
                self.optuna.set_metric_names([label])

    def write_note(self, number: int | None, text: str) -> None:
        """Write the note that the dashboard shows of a trial, or of the study.

        Args:
            number: The trial; None for the study.
            text: Markdown.
        """
        from optuna_dashboard import save_note  # slow to import, and only drivers write notes

        owner: Any = self.optuna
        if number is not None:
            frozen = trial_by_number(self.optuna, number)
            if frozen is None:
                raise StudyError(f"Study '{self.name}' has no trial {number}.")
            owner = owner_of_note(self.optuna, self.rdb, frozen)
        with database_errors():
            save_note(owner, text)

    def close(self) -> None:
        """Close the connections of this process."""
        self.rdb.remove_session()
        self.rdb.engine.dispose()

    def import_trials(self, source: Study) -> int:
        """Add the finished trials of an earlier study whose parameters fit; return how many.

        They teach the sampler and count for nothing else. Running it again adds none twice.

        Args:
            source: The earlier study; its values are computed anew for this objective.
        """
        mutex = StudyMutex(self.rdb.engine.url, self.name)  # another driver may import them too
        try:
            with database_errors(), mutex:
                known = {trial.user_attrs.get("imported_from") for trial in self.trials()}
                added = 0
                for trial in source.frozen():
                    label = f"{source.name}#{trial.number}"
                    recipe = source.recipe_of(trial)
                    if label in known or recipe is None or REPEAT_OF in attributes_of(trial):
                        continue
                    imported = imported_trial(trial, label, self.space, recipe)
                    if imported is not None:
                        self.optuna.add_trial(imported)
                        added += 1
                return added
        finally:
            mutex.close()

    def recipe_of(self, trial: FrozenTrial) -> Mapping[str, Any] | None:
        """Return the partial candidate that a trial set beside its parameters; empty without.

        None where the space has dropped the recipe since.
        """
        return recipe_of(attributes_of(trial), self.space.recipes)

    @property
    def lessons(self) -> list[Lesson] | None:
        """Return what earlier studies teach this one; None where that was never settled."""
        stored = self._attributes().get(LESSONS)
        return None if stored is None else [Lesson.from_mapping(entry) for entry in stored]

    def remember_lessons(self, lessons: Sequence[Lesson]) -> None:
        """Store what earlier studies teach, for every driver of this one."""
        with self._errors():
            set_study_attribute(self.optuna, LESSONS, [each.as_mapping() for each in lessons])

    def learned_from(self) -> list[dict[str, Any]]:
        """Return the earlier studies that teach this one: source, trials, shared parameters."""
        return [
            {
                "source": lesson.source,
                "trials": len(lesson.ranks),
                "parameters": [key for key in self.space.parameters if key in lesson.keys],
            }
            for lesson in self.lessons or []
        ]

    def has_begun(self) -> bool:
        """Return whether a trial of this study has ever been started."""
        return any(trial.state.name != "WAITING" for trial in self.frozen())

    def check_space(self, space: SearchSpace, *, extend: bool) -> None:
        """Refuse a space that differs from the stored one; nothing is stored.

        Args:
            space: What is to be searched.
            extend: Accept a change, where Optuna can take it.

        Raises:
            StudyError: It has changed.
        """
        stored = self._attributes().get(SPACE)
        if stored is None or stored == space.as_mapping():
            return
        before = space_from_mapping(stored)
        same = before.digest() == space.digest()
        differences = [] if same else before.differences(space)
        if differences and not extend:
            lines = "\n".join(f"  {line}" for line in differences)
            raise StudyError(
                f"Study '{self.name}' in {self.storage} was made with another search space:\n"
                f"{lines}\nTake another --study name, accept the change with --extend, or "
                f"{OWN_SPACE}."
            )
        require_comparable(before, space, self.name)
        require_compatible(before, space, self.name)

    def _settle_space(self, space: SearchSpace, *, extend: bool) -> None:
        """Store the space of a new study, or refuse one that has changed."""
        self.check_space(space, extend=extend)
        self._space = space
        self.remember(SPACE, space.as_mapping())

    def check_volumes(self, fingerprints: Mapping[str, str]) -> None:
        """Refuse other volumes than before, since values would not compare; nothing is stored.

        Args:
            fingerprints: Hash of each volume's content, by its name.

        Raises:
            StudyError: The volumes are others than before.
        """
        stored = self._attributes().get(VOLUMES)
        if fingerprints and stored is not None and stored != dict(fingerprints):
            changed = sorted(set(stored.items()) ^ set(fingerprints.items()))
            names = ", ".join(dict.fromkeys(name for name, _ in changed))
            raise StudyError(
                f"Study '{self.name}' in {self.storage} was scored on other volumes; changed: "
                f"{names}. Errors of the two would be ranked as one. {elsewhere(self.name)}"
            )

    def settle_volumes(self, fingerprints: Mapping[str, str]) -> None:
        """Store what the study is scored on, or refuse it, as `check_volumes` says."""
        self.check_volumes(fingerprints)
        if fingerprints:
            self.remember(VOLUMES, dict(fingerprints))

    def enqueue_all(self, candidates: Mapping[str, Mapping[str, Any]]) -> list[int]:
        """Enqueue candidates, all or none, and return the numbers of their trials.

        The study may be running: its driver takes them next.

        Args:
            candidates: Partial or whole, by what their trials are called. What one sets beside the
                searched keys holds for its trial.

        Raises:
            ConfigError: A searched key has a value that the space does not have, or a candidate
                breaks a rule.
            StudyError: The study has one of them already.
        """
        recipes = {name: dict(candidate) for name, candidate in candidates.items()}
        space = self.space.model_copy(update={"recipes": {**self.space.recipes, **recipes}})
        starts = [space.warm_start(name) for name in candidates]
        for start in starts:
            space.candidate(start.params, start.overrides)
        mutex = StudyMutex(self.rdb.engine.url, self.name)
        try:
            with self._errors(), mutex:
                trials = self.trials()
                for start in starts:
                    self._refuse_known(start, trials)
                taken = {trial.user_attrs.get("warm_start") for trial in trials}
                for start in starts:
                    names = itertools.chain(
                        [start.name], map(f"{start.name}-{{}}".format, range(2, 99))
                    )
                    name = next(name for name in names if name not in taken)
                    attributes = {"warm_start": name, OVERRIDES: start.overrides}
                    enqueue(self.optuna, start.params, attributes)
                return [trial.number for trial in self.frozen()[len(trials) :]]
        except DatabaseAway as error:
            raise StudyError(f"--storage: {self.storage} does not answer: {error}.") from None
        finally:
            mutex.close()

    def near_trials(self, numbers: Sequence[int]) -> dict[int, int]:
        """Return which enqueued trials are near to a tried one, each with the first such.

        They are run nevertheless, unlike a sampler's proposal.

        Args:
            numbers: Of trials that wait.
        """
        trials = self.trials()
        tried = TriedCandidates(self.space, self.space.sampler.min_distance)
        tried.update(trials)
        found = {}
        for trial in trials:
            if trial.number in numbers and is_plain(self.space, trial):
                near = tried.near(trial.requested)
                if near is not None:
                    found[trial.number] = near
        return found

    def _refuse_known(self, start: WarmStart, trials: Sequence[TrialView]) -> None:
        """Refuse a candidate that a trial of the study is already."""
        for trial in trials:
            params = trial.params or trial.requested
            same = trial.user_attrs.get(OVERRIDES) == start.overrides
            if same and dict(params) == start.params and trial.state != "FAIL":
                raise StudyError(
                    f"{start.name}: trial {trial.number} of study '{self.name}' is that candidate "
                    f"already; it is {trial.state.lower()}."
                )

    def _enqueue_warm_starts(self) -> None:
        """Enqueue every recipe of the space that is not in the study yet."""
        known = {attributes_of(trial).get("warm_start") for trial in self.frozen()}
        for name in self.space.warm_starts:
            if name not in known:
                start = self.space.warm_start(name)
                enqueue(self.optuna, start.params, {"warm_start": name})


def open_readonly(storage: str, name: str, folder: Path | None = None) -> Study:
    """Open a study without writing anything.

    Args:
        storage: URL of its database.
        name: Its name.
        folder: Where its trials are now; where the database says so by default.

    Raises:
        StudyError: The storage or the study does not exist, or the database does not answer.
    """
    return Study.open(storage, name, folder=folder)


def open_if_exists(storage: str, name: str) -> Study | None:
    """Open a study without writing anything, or return None where it is still to be made.

    Raises:
        StudyError: The storage does not answer, or could not be made.
    """
    url = parse_storage(storage)
    probe(url, create=True)
    path = sqlite_file(url)
    if path is not None and not path.exists():
        return None
    with while_opening(url):
        try:
            rdb = open_storage(url, create=False)
        except NoStudies:
            return None
        if name in optuna.get_all_study_names(rdb):
            return Study(rdb, load_ours(rdb, name, masked(url)), masked(url))
    rdb.engine.dispose()
    return None


def study_names(storage: str) -> list[str]:
    """Return the names of the studies in a storage.

    Raises:
        StudyError: The storage does not exist or does not answer.
    """
    url = parse_storage(storage)
    probe(url, create=False)
    with while_opening(url):
        try:
            rdb = open_storage(url, create=False)
        except NoStudies:
            return []
        try:
            return sorted(optuna.get_all_study_names(rdb))
        finally:
            rdb.engine.dispose()


def open_all(storage: str) -> list[Study]:
    """Open every study of ours in a storage without writing anything.

    Raises:
        StudyError: The storage does not exist or answer, or there is no study in it.
    """
    url = parse_storage(storage)
    probe(url, create=False)
    with while_opening(url):
        rdb = open_storage(url, create=False)
        names = optuna.get_all_study_names(rdb)
        found = [optuna.load_study(study_name=name, storage=rdb) for name in names]
        ours = [study for study in found if is_ours(study)]
    if not names:
        raise StudyError(f"--storage: {masked(url)} holds no study. Start one with `run`.")
    return [Study(rdb, study, masked(url)) for study in ours]


def is_ours(study: optuna.Study) -> bool:
    """Return whether hydralv-tune made a study: its search space is stored in it."""
    return isinstance(study_attributes(study).get(SPACE), Mapping)


def load_ours(storage: RDBStorage, name: str, shown: str) -> optuna.Study:
    """Load a study that hydralv-tune made.

    Raises:
        StudyError: There is no study of that name, or another program made it.
    """
    study = load_named(storage, name, shown)
    if not is_ours(study):
        directions = ", ".join(direction.name.lower() for direction in study.directions)
        raise StudyError(
            f"--study: study '{name}' in {shown} was not made by hydralv-tune: no search space is "
            f"stored in it, direction {directions}. Take another --study name."
        )
    return study


def facts_of(storage: str, name: str) -> dict[str, Any]:
    """Return what `status` prints about a study.

    Raises:
        StudyError: As `open_readonly`.
    """
    study = open_readonly(storage, name)
    try:
        return study.facts()
    finally:
        study.close()


def rank_by_guard(study: Study) -> None:
    """Rank the trials of a study of version 0.1.0 as this version ranks them.

    That one told Optuna the plain objective of a trial that violates the guard, and Optuna's own
    dashboard then called it the best.

    Args:
        study: Its space says what the objective is; to be called under the study mutex.
    """
    metric = study.space.objective.metric
    ranked = {}
    for trial in study.frozen():
        value, violation = trial.value, violation_of(trial)
        ours = {OBJECTIVE, CONSTRAINTS} & set(trial.system_attrs)
        if trial.state != TrialState.COMPLETE or ours or value is None:
            continue
        if violation is None or violation <= 0:
            continue
        known = {OBJECTIVE: value, CONSTRAINTS: [violation]}
        ranked[trial_id(trial)] = (ranked_value(value, violation, metric), known)
    if ranked:
        rank_again(study.rdb, ranked)


def trial_by_number(study: optuna.Study, number: int) -> FrozenTrial | None:
    """Return a trial, fresh from the database, or None where there is none of that number."""
    for trial in study.get_trials(deepcopy=False):
        if trial.number == number:
            return trial
    return None


def view_of(trial: FrozenTrial) -> TrialView:
    """Return a trial as a frozen view."""
    attributes = attributes_of(trial)
    return TrialView(
        number=trial.number,
        state=trial.state.name,
        value=trial.system_attrs.get(OBJECTIVE, trial.value) if trial.values else None,
        params=trial.params,
        user_attrs=attributes,
        is_foreign=trial.state.is_finished() and not {"owner", "metrics"} & set(attributes),
        intermediate=trial.intermediate_values,
        violation=violation_of(trial),
        started=trial.datetime_start,
        finished=trial.datetime_complete,
        requested=trial.system_attrs.get("fixed_params", {}),
    )
