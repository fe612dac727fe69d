"""The study: one Optuna study in a database, and the only file that imports Optuna.

Reading, from anywhere, without writing:

    study = open_readonly(storage, name)     # StudyError: absent, silent, unknown name
    study.facts()                            # the keys of `status --json`
    study.trials()                           # list[TrialView], see trial_view.py
    study.best()                             # TrialView | None
    study.table()                            # DataFrame of the finished trials
    study.space, study.out, study.folder_of(view)
    facts_of(storage, name)                  # open_readonly(...).facts()

Driving, from `launch.run_study` alone:

    study = Study.open(storage, name, space=space, create=True, extend=False)
    with Driver(study, out=folder) as driver:
        driver.ask(target)                   # Asked | "wait" | "done"
        driver.report(number, step, value)   # "go" | "prune" | "refused"
        driver.tell(number, Outcome(...))    # False: refused, or kept in the journal
        driver.poll()                        # journal, numbers that the database has taken away
        driver.save_note(number, text), driver.attach_artifact(number, path)   # before tell

Every change is made under the study mutex. The database is the only lasting truth: `reconcile`
may run any number of times, and relaunching is resuming.
"""

from __future__ import annotations

import contextlib
import math
import threading
import uuid
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import optuna
import pandas as pd
import sqlalchemy
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import exc as sqlalchemy_errors

from hydralv_tune.errors import HydraLVError, StudyError, unknown_name
from hydralv_tune.journal import PREFIX, SUFFIX, Journal, journals_in
from hydralv_tune.mutex import MutexLost, StudyMutex
from hydralv_tune.space import (
    Parameter,
    Pruner,
    Sampler,
    SearchSpace,
    objective_value,
    space_from_mapping,
)
from hydralv_tune.storage_url import engine_options, masked, parse_storage, probe
from hydralv_tune.trial_view import (
    FINISHED,
    Asked,
    Outcome,
    TrialView,
    best_trial,
    count_states,
    describe_best,
    duplicate_of,
    is_surely_dead,
    missing_successors,
    own_process,
    successor_attributes,
)

HEARTBEAT_S = 30.0
GRACE_S = 120.0
DUPLICATE_TRIES = 3
UNTRIED_TRIES = 200
GUARD = "f1_iou50"
ARTIFACTS = "artifacts"
SPACE, OUT, VOLUMES = "space", "out", "volumes"

optuna.logging.set_verbosity(optuna.logging.WARNING)


class DatabaseAway(HydraLVError):  # noqa: N818 - what happened
    """The database does not answer right now; what was to be told waits in the journal."""


@contextlib.contextmanager
def _database() -> Iterator[None]:
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
            raise DatabaseAway(str(error.__cause__.args[:1])) from None
        raise
    except lost as error:
        raise DatabaseAway(str(error.args[:1])) from None


class Study:
    """An open study. Use `Study.open` or `open_readonly`."""

    def __init__(self, storage: RDBStorage, study: optuna.Study, shown: str) -> None:
        self.rdb = storage
        self.optuna = study
        self.storage = shown
        self.name = study.study_name
        self._space: SearchSpace | None = None

    @classmethod
    def open(
        cls,
        storage: str,
        name: str,
        *,
        space: SearchSpace | None = None,
        create: bool = False,
        extend: bool = False,
    ) -> Study:
        """Open a study, or make it.

        Args:
            storage: `sqlite:///FILE` or `postgresql+psycopg://…`.
            name: Name of the study.
            space: What it searches; needed to make it. The stored space must equal it.
            create: Make database and study where they do not exist; otherwise nothing is written.
            extend: Accept a space that differs from the stored one.

        Raises:
            StudyError: The storage does not exist or answer, there is no such study, or the
                space has changed.
        """
        url = parse_storage(storage)
        probe(url, create=create)
        options = engine_options(url)
        text = _template(url)
        if not create:
            _require_tables(url, options)
            rdb = RDBStorage(text, engine_kwargs=options, skip_table_creation=True)
            return cls(rdb, _load(rdb, name, masked(url)), masked(url))
        assert space is not None, "a study is made from its space"
        mutex = StudyMutex(url, name)
        try:
            with _database(), mutex:
                rdb = RDBStorage(text, engine_kwargs=options)
                study = cls(
                    rdb,
                    optuna.create_study(
                        storage=rdb, study_name=name, direction="minimize", load_if_exists=True
                    ),
                    masked(url),
                )
                study._settle_space(space, extend=extend)
                study._enqueue_warm_starts()
        except DatabaseAway as error:
            raise StudyError(f"--storage: {masked(url)} does not answer: {error}.") from None
        finally:
            mutex.close()
        return study

    @property
    def space(self) -> SearchSpace:
        """Return the space that the study searches."""
        if self._space is None:
            stored = self.optuna.user_attrs.get(SPACE)
            if stored is None:
                raise StudyError(
                    f"Study '{self.name}' in {self.storage} was not made by hydralv-tune: it has "
                    "no search space. Give the name of a study that `run` made."
                )
            self._space = space_from_mapping(stored)
        return self._space

    @property
    def out(self) -> Path | None:
        """Return the folder of the study, or None where none was told."""
        text = self.optuna.user_attrs.get(OUT)
        return Path(text) if text else None

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
        with _database():
            return self.optuna.get_trials(deepcopy=False)

    def trials(self) -> list[TrialView]:
        """Return all trials, in order of their numbers."""
        return [_view(trial) for trial in self.frozen()]

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
        return pd.DataFrame(rows)

    def remember(self, key: str, value: Any) -> None:
        """Store a fact about the study.

        Args:
            key: Name of the user attribute.
            value: Plain JSON types.
        """
        if self.optuna.user_attrs.get(key) != value:
            self.optuna.set_user_attr(key, value)

    def importances(self) -> dict[str, float]:
        """Return the share of the objective's spread that each parameter explains, largest first.

        Empty while there is too little to say: under four finished trials, or all alike.
        """
        complete = [t for t in self.trials() if t.state == "COMPLETE"]
        if len(complete) < 4 or len({t.value for t in complete}) < 2:
            return {}
        shared = set.intersection(*(set(t.params) for t in complete))
        moving = sorted(k for k in shared if len({str(t.params[k]) for t in complete}) > 1)
        if not moving:
            return {}
        return dict(
            optuna.importance.get_param_importances(
                self.optuna,
                evaluator=optuna.importance.FanovaImportanceEvaluator(seed=0),
                params=moving,
            )
        )

    def attach(self, number: int | None, path: Path, store: Any) -> str:
        """Store a file as an artifact of a trial, or of the study, and return its id.

        Args:
            number: The trial; None for the study. An artifact must be there before `tell`.
            path: The file.
            store: Has `write(id, file)`, as Optuna's artifact stores.

        Raises:
            DatabaseAway: Try again later.
            StudyError: There is no such trial.
        """
        owner = self.optuna if number is None else _by_number(self.optuna, number)
        if owner is None:
            raise StudyError(f"Study '{self.name}' has no trial {number}.")
        with _database():
            return optuna.artifacts.upload_artifact(
                artifact_store=store, file_path=str(path), study_or_trial=owner, storage=self.rdb
            )

    def write_note(self, number: int | None, text: str) -> None:
        """Write the note that the dashboard shows of a trial, or of the study.

        Args:
            number: The trial; None for the study.
            text: Markdown.
        """
        from optuna_dashboard import save_note  # slow to import, and only drivers write notes

        owner: Any = self.optuna
        if number is not None:
            frozen = _by_number(self.optuna, number)
            if frozen is None:
                raise StudyError(f"Study '{self.name}' has no trial {number}.")
            # Only the identity is used; a real `Trial` would ask the sampler first.
            owner = SimpleNamespace(storage=self.rdb, study=self.optuna, _trial_id=frozen._trial_id)
        with _database():
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
        known = {trial.user_attrs.get("imported_from") for trial in self.trials()}
        added = 0
        for trial in source.frozen():
            label = f"{source.name}#{trial.number}"
            imported = None if label in known else _imported(trial, label, self.space)
            if imported is not None:
                self.optuna.add_trial(imported)
                added += 1
        return added

    def _settle_space(self, space: SearchSpace, *, extend: bool) -> None:
        """Store the space of a new study, or refuse one that has changed."""
        stored = self.optuna.user_attrs.get(SPACE)
        mapping = space.as_mapping()
        if stored is not None and stored != mapping:
            before = space_from_mapping(stored)
            same = before.digest() == space.digest()
            differences = [] if same else before.differences(space)
            if differences and not extend:
                lines = "\n".join(f"  {line}" for line in differences)
                raise StudyError(
                    f"Study '{self.name}' in {self.storage} was made with another search space:\n"
                    f"{lines}\nTake another --study name, or accept the change with --extend."
                )
            _require_compatible(before, space, self.name)
        self._space = space
        self.remember(SPACE, mapping)

    def settle_volumes(self, fingerprints: Mapping[str, str], *, extend: bool) -> None:
        """Store what the study is scored on, or refuse other volumes: values would not compare.

        Args:
            fingerprints: Hash of each volume's content, by its name.
            extend: Accept a change.

        Raises:
            StudyError: The volumes are others than before.
        """
        stored = self.optuna.user_attrs.get(VOLUMES)
        if not fingerprints:
            return
        if stored is not None and stored != dict(fingerprints) and not extend:
            changed = sorted(set(stored.items()) ^ set(fingerprints.items()))
            names = ", ".join(dict.fromkeys(name for name, _ in changed))
            raise StudyError(
                f"Study '{self.name}' in {self.storage} was scored on other volumes; changed: "
                f"{names}. Take another --study name, or accept the change with --extend."
            )
        self.remember(VOLUMES, dict(fingerprints))

    def _enqueue_warm_starts(self) -> None:
        """Enqueue every recipe of the space that is not in the study yet."""
        known = {trial.user_attrs.get("warm_start") for trial in self.frozen()}
        for name in self.space.warm_starts:
            if name not in known:
                start = self.space.warm_start(name)
                self.optuna.enqueue_trial(dict(start.params), user_attrs={"warm_start": name})


def open_readonly(storage: str, name: str) -> Study:
    """Open a study without writing anything.

    Raises:
        StudyError: The storage or the study does not exist, or the database does not answer.
    """
    return Study.open(storage, name)


def study_names(storage: str) -> list[str]:
    """Return the names of the studies in a storage.

    Raises:
        StudyError: The storage does not exist, does not answer, or holds no study.
    """
    url = parse_storage(storage)
    probe(url, create=False)
    options = engine_options(url)
    _require_tables(url, options)
    rdb = RDBStorage(_template(url), engine_kwargs=options, skip_table_creation=True)
    try:
        with _database():
            return sorted(optuna.get_all_study_names(rdb))
    finally:
        rdb.engine.dispose()


def open_all(storage: str) -> list[Study]:
    """Open every study of a storage without writing anything.

    Raises:
        StudyError: The storage does not exist or answer, or there is no study in it.
    """
    url = parse_storage(storage)
    probe(url, create=False)
    options = engine_options(url)
    _require_tables(url, options)
    text = url.render_as_string(hide_password=False).replace("{", "{{").replace("}", "}}")
    rdb = RDBStorage(text, engine_kwargs=options, skip_table_creation=True)
    names = optuna.get_all_study_names(rdb)
    if not names:
        raise StudyError(f"--storage: {masked(url)} holds no study. Start one with `run`.")
    return [Study(rdb, _load(rdb, name, masked(url)), masked(url)) for name in names]


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


class Driver:
    """One process that asks and tells: the only writer of its trials.

    Args:
        study: An open study.
        out: Folder of the study on this machine, where results wait while the database is away.
        heartbeat_s: Seconds between two signs of life.
        grace_s: Silence after which another driver takes this one's trials over.
    """

    def __init__(
        self,
        study: Study,
        *,
        out: Path,
        heartbeat_s: float = HEARTBEAT_S,
        grace_s: float = GRACE_S,
    ) -> None:
        self.study = study
        self.space = study.space
        self.process = own_process()
        self.name = f"{self.process['machine'].split('/')[0]}/{self.process['pid']}"
        self.identity = uuid.uuid4().hex
        self.heartbeat_s, self.grace_s = heartbeat_s, grace_s
        self.out = out
        self._mutex = StudyMutex(study.rdb.engine.url, study.name)
        self._live: dict[int, optuna.Trial] = {}
        self._journal = Journal(out / f"{PREFIX}{self.identity}{SUFFIX}")
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        study.optuna.pruner = make_pruner(self.space.pruner)
        self._sampler = make_sampler(self.space.sampler, 0)

    def __enter__(self) -> Driver:
        with _database():
            self.adopt_journals()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(timeout=5.0)
        with contextlib.suppress(DatabaseAway):
            self.poll()
        self._mutex.close()

    @property
    def live(self) -> frozenset[int]:
        """Return the numbers of the trials that this driver answers for."""
        return frozenset(self._live)

    @property
    def waiting_results(self) -> int:
        """Return how many results wait in the journal."""
        return len(self._journal.entries())

    def ask(self, target: int) -> Asked | Literal["wait", "done"]:
        """Return the next trial, or whether to wait for others or to end.

        Args:
            target: COMPLETE and PRUNED trials wanted in all.

        Raises:
            DatabaseAway: Try again later.
        """
        with _database(), self._mutex:
            self.reconcile()
            counts = count_states(self.study.trials())
            finished = counts["complete"] + counts["pruned"]
            if finished >= target:
                return "done"
            if finished + counts["running"] >= target:
                return "wait"
            for _ in range(DUPLICATE_TRIES):
                asked = self._new_trial()
                if asked is not None:
                    return asked
            params = self._untried()
            if params is None:  # the space has no more combinations
                return "wait" if counts["running"] else "done"
            self.study.optuna.enqueue_trial(params)
            return self._new_trial() or "wait"

    def report(self, number: int, step: int, value: float) -> Literal["go", "prune", "refused"]:
        """Store an intermediate value and return whether the trial goes on.

        Args:
            number: The trial.
            step: Evaluation, from 1.
            value: Objective so far, minimised.
        """
        trial = self._live.get(number)
        if trial is None:
            return "refused"
        try:
            with _database(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a retry reports again what the one before did
                trial.report(value, step)
                return "prune" if trial.should_prune() else "go"
        except UpdateFinishedTrialError:
            self._live.pop(number, None)
            return "refused"
        except DatabaseAway:
            self._keep({"kind": "report", "number": number, "step": step, "value": value})
            return "go"

    def tell(self, number: int, outcome: Outcome) -> Literal["told", "kept", "refused"]:
        """End a trial in the database, or keep its result until that answers.

        A result of a trial that another driver has taken over is refused: the database wins.
        """
        if number not in self._live:
            return "refused"
        try:
            with _database(), self._mutex:
                return "told" if self._tell_now(number, outcome, self.identity) else "refused"
        except DatabaseAway:
            self._keep({"kind": "tell", "number": number, "outcome": outcome.as_mapping()})
            return "kept"

    def save_note(self, number: int, text: str) -> None:
        """Show a note on the trial's page of the Optuna dashboard, unless the database is away.

        Args:
            number: A live trial.
            text: Markdown.
        """
        import optuna_dashboard  # not needed to start a study

        if (trial := self._live.get(number)) is not None:
            with contextlib.suppress(DatabaseAway), _database():
                optuna_dashboard.save_note(trial, text)

    def attach_artifact(self, number: int, path: Path) -> None:
        """Copy a file to `out/artifacts` and show it on the trial's page.

        Args:
            number: A live trial.
            path: Of the file; a name in the database is made of random digits alone.
        """
        if (trial := self._live.get(number)) is not None and path.is_file():
            folder = self.out / ARTIFACTS
            folder.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(DatabaseAway), _database():
                optuna.artifacts.upload_artifact(
                    artifact_store=optuna.artifacts.FileSystemArtifactStore(folder),
                    file_path=str(path),
                    study_or_trial=trial,
                )

    def poll(self) -> frozenset[int]:
        """Tell what waits, and return the trials that the database has taken away.

        Raises:
            DatabaseAway: Try again later.
        """
        with _database():
            if self._journal.path.exists():
                self._journal.drain(self._tell_entry)
            states = {trial.number: trial.state for trial in self.study.frozen()}
        lost = frozenset(n for n in self._live if states.get(n) != TrialState.RUNNING)
        for number in lost:
            self._live.pop(number, None)
        return lost

    def adopt_journals(self) -> None:
        """Tell the results that dead drivers left in this folder."""
        for journal in journals_in(self.out):
            entries = journal.entries()
            if entries and is_surely_dead(entries[0].get("process")):
                journal.drain(self._tell_entry)

    def reconcile(self) -> None:
        """Fail the trials whose driver is gone and give each FAIL that deserves it one successor.

        To be called under the mutex; it may be called any number of times.
        """
        ages = self._heartbeat_ages()
        for trial in self.study.frozen():
            if trial.state == TrialState.RUNNING and trial.number not in self._live:
                reason = self._orphaned(trial, ages.get(trial._trial_id))
                if reason is not None:
                    self._fail_orphan(trial, reason)
        views = self.study.trials()
        for view in missing_successors(views, retries=self.space.budget.retries):
            # One that was killed while it was being asked for has only part of its parameters.
            params = view.params if "owner" in view.user_attrs else view.requested
            self.study.optuna.enqueue_trial(dict(params), user_attrs=successor_attributes(view))

    def _orphaned(self, trial: FrozenTrial, age_s: float | None) -> str | None:
        """Return why nobody works on a RUNNING trial any more, or None where somebody does."""
        owner = trial.user_attrs.get("owner")
        if owner is None or owner.get("identity") == self.identity:
            return "orphaned: its driver died while it asked for the trial"
        if is_surely_dead(owner):
            return "orphaned: its driver's process is gone"
        if age_s is None or age_s > self.grace_s:
            silence = "at all" if age_s is None else f"for {age_s:.0f} s"
            return f"orphaned: no sign of life of its driver {silence}"
        return None

    def _fail_orphan(self, trial: FrozenTrial, reason: str) -> None:
        """Tell an orphan as FAIL; whatever was asked for on purpose is asked for again."""
        wanted = "owner" in trial.user_attrs or bool(trial.system_attrs.get("fixed_params"))
        storage = self.study.rdb
        storage.set_trial_user_attr(trial._trial_id, "reason", reason)
        storage.set_trial_user_attr(trial._trial_id, "retry", "free" if wanted else "no")
        with contextlib.suppress(UpdateFinishedTrialError, ValueError):
            self.study.optuna.tell(trial.number, state=TrialState.FAIL)

    def _new_trial(self) -> Asked | None:
        """Ask Optuna for a trial and claim it; None where its parameters were tried before."""
        study = self.study.optuna
        trials = self.study.trials()
        study.sampler = self._sampler_for(len(trials))
        trial = study.ask()
        self.study.rdb.record_heartbeat(trial._trial_id)
        params = suggest(self.space, trial)
        attributes = dict(trial.user_attrs)
        warm_start = attributes.get("warm_start")
        retry_of = attributes.get("retry_of")
        earlier = duplicate_of(params, warm_start, trials, number=trial.number)
        if earlier is not None and retry_of is None:
            trial.set_user_attr("duplicate_of", earlier)
            trial.set_user_attr("reason", f"duplicate of trial {earlier}, not trained again")
            study.tell(trial, state=TrialState.FAIL)
            return None
        self._inherit(trial, retry_of, trials)
        trial.set_user_attr("driver", self.name)
        # Last of all: a RUNNING trial without an owner was never fully asked for.
        trial.set_user_attr("owner", {**self.process, "identity": self.identity})
        self._live[trial.number] = trial
        return Asked(
            number=trial.number,
            root=int(attributes.get("root", trial.number)),
            attempt=int(attributes.get("attempt", 1)),
            retry_of=retry_of,
            params=params,
            warm_start=warm_start,
        )

    def _untried(self) -> dict[str, Any] | None:
        """Return parameters drawn at random that no trial has, or None where none are found."""
        trials = self.study.trials()
        draw = optuna.samplers.RandomSampler(seed=len(trials)).sample_independent
        for _ in range(UNTRIED_TRIES):
            params: dict[str, Any] = {}
            for key, parameter in self.space.parameters.items():
                if self.space.is_active(key, params):
                    params[key] = draw(
                        self.study.optuna, self.study.frozen()[0], key, _distribution(parameter)
                    )
            if duplicate_of(params, None, trials, number=-1) is None:
                return params
        return None

    def _inherit(self, trial: optuna.Trial, retry_of: int | None, trials: list[TrialView]) -> None:
        """Give a retry the evaluations of the attempt before, from whose checkpoint it goes on."""
        for view in trials:
            if view.number == retry_of:
                for step, value in view.intermediate.items():
                    if math.isfinite(value):
                        trial.report(value, step)

    def _sampler_for(self, count: int) -> optuna.samplers.BaseSampler:
        """Return the sampler of the next trial.

        Each trial has a seed of its own, so that neither a second driver nor a relaunch draws the
        same random numbers again. CMA-ES and QMC are sequences and keep theirs.
        """
        if self.space.sampler.name in ("cmaes", "qmc"):
            return self._sampler
        return make_sampler(self.space.sampler, count)

    def _tell_now(self, number: int, outcome: Outcome, identity: str) -> bool:
        """End a trial if the database still has it RUNNING and owned by this driver."""
        study, storage = self.study.optuna, self.study.rdb
        frozen = _by_number(study, number)
        owner = (frozen.user_attrs.get("owner") or {}) if frozen is not None else {}
        self._live.pop(number, None) if identity == self.identity else None
        if frozen is None or frozen.state != TrialState.RUNNING:
            return False
        if owner.get("identity") != identity:
            return False
        for key, value in outcome.attributes.items():
            storage.set_trial_user_attr(frozen._trial_id, key, value)
        if outcome.state == "FAIL":
            storage.set_trial_user_attr(frozen._trial_id, "retry", outcome.retry)
        if outcome.violation is not None and math.isfinite(outcome.violation):
            optuna.Trial(study, frozen._trial_id).set_constraint(GUARD, outcome.violation)
        values = outcome.value if outcome.state == "COMPLETE" else None
        study.tell(number, values, state=TrialState[outcome.state])
        if outcome.state == "FAIL":
            self.reconcile()
        return True

    def _keep(self, entry: Mapping[str, Any]) -> None:
        """Write into the journal what cannot be told now."""
        self._journal.append({**entry, "identity": self.identity, "process": self.process})

    def _tell_entry(self, entry: dict[str, Any]) -> None:
        """Tell one entry of a journal; what the database no longer wants is dropped."""
        number, identity = int(entry["number"]), str(entry["identity"])
        with _database(), self._mutex:
            if entry["kind"] == "tell":
                self._tell_now(number, Outcome.from_mapping(entry["outcome"]), identity)
                return
            frozen = _by_number(self.study.optuna, number)
            if frozen is not None and frozen.state == TrialState.RUNNING:
                with contextlib.suppress(UpdateFinishedTrialError):
                    self.study.rdb.set_trial_intermediate_value(
                        frozen._trial_id, int(entry["step"]), float(entry["value"])
                    )

    def _heartbeat_ages(self) -> dict[int, float]:
        """Return the seconds since each RUNNING trial's sign of life, by the database's clock."""
        beats = sqlalchemy.table(
            "trial_heartbeats",
            sqlalchemy.column("trial_id", sqlalchemy.Integer),
            sqlalchemy.column("heartbeat", sqlalchemy.DateTime),
        )
        running = [t._trial_id for t in self.study.frozen() if t.state == TrialState.RUNNING]
        if not running:
            return {}
        query = sqlalchemy.select(beats.c.trial_id, beats.c.heartbeat, sqlalchemy.func.now()).where(
            beats.c.trial_id.in_(running)
        )
        with self.study.rdb.engine.connect() as connection:
            rows = connection.execute(query).all()
        return {
            trial: (now.replace(tzinfo=None) - beat.replace(tzinfo=None)).total_seconds()
            for trial, beat, now in rows
        }

    def _beat(self) -> None:
        """Record a sign of life of every live trial until the driver ends."""
        while not self._stop.wait(self.heartbeat_s):
            for trial in list(self._live.values()):
                # A database that is away is met by the driver's own thread too, which says so.
                with contextlib.suppress(DatabaseAway), _database():
                    self.study.rdb.record_heartbeat(trial._trial_id)
        self.study.rdb.remove_session()


def make_sampler(sampler: Sampler, count: int) -> optuna.samplers.BaseSampler:
    """Return the sampler of a name.

    Args:
        sampler: Name, seed and start-up trials.
        count: Trials so far; it moves the seed.
    """
    seed = (sampler.seed * 1_000_003 + count) % 2**32
    startup = sampler.startup_trials
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        if sampler.name == "random":
            return optuna.samplers.RandomSampler(seed=seed)
        if sampler.name == "gp":
            return optuna.samplers.GPSampler(seed=seed, n_startup_trials=startup)
        if sampler.name == "qmc":
            return optuna.samplers.QMCSampler(seed=sampler.seed, scramble=True)
        if sampler.name == "cmaes":
            return _CmaEsWithoutPickle(seed=sampler.seed, n_startup_trials=startup)
        return optuna.samplers.TPESampler(
            n_startup_trials=startup, group=True, constant_liar=True, seed=seed
        )


class _CmaEsWithoutPickle(optuna.samplers.CmaEsSampler):
    """CMA-ES whose state stays in this process: no pickle goes to the database or comes from it.

    A relaunched driver starts the strategy anew and feeds it the generations of the history.
    """

    _state: str | None = None

    def _split_optimizer_str(self, optimizer_str: str) -> dict[str, str]:
        """Keep the state here and give the storage nothing."""
        self._state = optimizer_str
        return {}

    def _restore_optimizer(self, completed_trials: list[FrozenTrial]) -> Any:
        """Return the state that this process kept."""
        import pickle

        return None if self._state is None else pickle.loads(bytes.fromhex(self._state))


class _Patient(optuna.pruners.BasePruner):
    """Lets another pruner decide once the best value has stood still for some evaluations.

    Optuna's `PatientPruner` never prunes here: it waits for a value worse than before, and the
    best value so far cannot get worse.
    """

    def __init__(self, wrapped: optuna.pruners.BasePruner, patience: int, warmup: int) -> None:
        self._wrapped, self._patience, self._warmup = wrapped, patience, warmup

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        """Return whether the trial is to be pruned."""
        steps = sorted(trial.intermediate_values)
        if len(steps) <= max(self._patience, self._warmup - 1):
            return False
        before = trial.intermediate_values[steps[-1 - self._patience]]
        if trial.intermediate_values[steps[-1]] < before:
            return False
        return self._wrapped.prune(study, trial)


def make_pruner(pruner: Pruner) -> optuna.pruners.BasePruner:
    """Return the pruner of a name; steps are evaluations, from 1."""
    startup, warmup = pruner.startup_trials, pruner.warmup_evaluations
    wrapped: optuna.pruners.BasePruner
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        if pruner.name == "none":
            return optuna.pruners.NopPruner()
        if pruner.name == "hyperband":
            return optuna.pruners.HyperbandPruner(min_resource=max(1, warmup))
        if pruner.name == "successive_halving":
            return optuna.pruners.SuccessiveHalvingPruner(min_resource=max(1, warmup))
        if pruner.name == "wilcoxon":
            return optuna.pruners.WilcoxonPruner(n_startup_steps=warmup)
        percentile = 50.0 if pruner.name == "median" else pruner.percentile
        wrapped = optuna.pruners.PercentilePruner(
            percentile, n_startup_trials=startup, n_warmup_steps=warmup
        )
    return _Patient(wrapped, pruner.patience, warmup)


def suggest(space: SearchSpace, trial: optuna.Trial) -> dict[str, Any]:
    """Return the values of a trial's active parameters, in the order of the space's file.

    Args:
        space: What is searched.
        trial: A trial that was just asked for; what was enqueued for it is what it gets.
    """
    params: dict[str, Any] = {}
    for key, parameter in space.parameters.items():
        if space.is_active(key, params):
            params[key] = _suggest_one(key, parameter, trial)
    return params


def _suggest_one(key: str, parameter: Parameter, trial: optuna.Trial) -> Any:
    """Return one value."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if parameter.float_ is not None:
            return trial.suggest_float(key, *parameter.float_, log=parameter.log)
        if parameter.int_ is not None:
            low, high = parameter.int_
            step = parameter.step or 1
            return trial.suggest_int(key, low, high, step=step, log=parameter.log)
        return trial.suggest_categorical(key, parameter.choices)


def _distribution(parameter: Parameter) -> optuna.distributions.BaseDistribution:
    """Return Optuna's form of a searched key."""
    if parameter.float_ is not None:
        return optuna.distributions.FloatDistribution(*parameter.float_, log=parameter.log)
    if parameter.int_ is not None:
        low, high = parameter.int_
        return optuna.distributions.IntDistribution(
            low, high, log=parameter.log, step=parameter.step or 1
        )
    return optuna.distributions.CategoricalDistribution(parameter.choices)


def _require_compatible(before: SearchSpace, space: SearchSpace, name: str) -> None:
    """Refuse an extension that Optuna cannot take into one study."""
    for key, parameter in space.parameters.items():
        if key not in before.parameters:
            continue
        try:
            optuna.distributions.check_distribution_compatibility(
                _distribution(before.parameters[key]), _distribution(parameter)
            )
        except ValueError:
            raise StudyError(
                f"Study '{name}': the choices or the kind of {key} cannot change within a study, "
                "only ranges can. Take another --study name and add --warm-start-from "
                f"{name}."
            ) from None


def _imported(trial: FrozenTrial, label: str, space: SearchSpace) -> FrozenTrial | None:
    """Return a trial of another study as one of this space, or None where it does not fit."""
    metrics = trial.user_attrs.get("metrics")
    if trial.state not in (TrialState.COMPLETE, TrialState.PRUNED) or not metrics:
        return None
    params: dict[str, Any] = {}
    distributions: dict[str, optuna.distributions.BaseDistribution] = {}
    for key, parameter in space.parameters.items():
        if not space.is_active(key, params):
            continue
        distribution = _distribution(parameter)
        if key not in trial.params:
            return None
        try:
            if not distribution._contains(distribution.to_internal_repr(trial.params[key])):
                return None
        except ValueError:
            return None
        params[key], distributions[key] = trial.params[key], distribution
    if set(params) != set(trial.params) or "warm_start" in trial.user_attrs:
        return None
    return optuna.trial.create_trial(
        state=trial.state,
        value=objective_value(metrics, space.objective),
        params=params,
        distributions=distributions,
        user_attrs={"imported_from": label, "metrics": metrics},
        system_attrs={f"constraints:{k}": v for k, v in trial.constraints.items()},
        intermediate_values=trial.intermediate_values,
    )


def _template(url: sqlalchemy.engine.URL) -> str:
    """Return a URL as Optuna wants it, which fills in braces."""
    return url.render_as_string(hide_password=False).replace("{", "{{").replace("}", "}}")


def _require_tables(url: sqlalchemy.engine.URL, options: Mapping[str, Any]) -> None:
    """Refuse a database that holds no study at all, without making tables in it."""
    engine = sqlalchemy.create_engine(url, **options)
    try:
        if not sqlalchemy.inspect(engine).has_table("studies"):
            raise StudyError(f"--storage: {masked(url)} holds no study. Start one with `run`.")
    finally:
        engine.dispose()


def _load(storage: RDBStorage, name: str, shown: str) -> optuna.Study:
    """Load a study by name, or say which names there are."""
    try:
        return optuna.load_study(study_name=name, storage=storage)
    except KeyError:
        names = optuna.get_all_study_names(storage)
        if not names:
            raise StudyError(f"--storage: {shown} holds no study. Start one with `run`.") from None
        raise StudyError(f"--study: {unknown_name('study', name, names)} in {shown}") from None


def _by_number(study: optuna.Study, number: int) -> FrozenTrial | None:
    """Return a trial, fresh from the database, or None where there is none of that number."""
    for trial in study.get_trials(deepcopy=False):
        if trial.number == number:
            return trial
    return None


def _view(trial: FrozenTrial) -> TrialView:
    """Return a trial as a frozen view."""
    constraints = trial.constraints.values()
    return TrialView(
        number=trial.number,
        state=trial.state.name,
        value=trial.value if trial.values else None,
        params=trial.params,
        user_attrs=trial.user_attrs,
        intermediate=trial.intermediate_values,
        violation=max(constraints) if constraints else None,
        started=trial.datetime_start,
        finished=trial.datetime_complete,
        requested=trial.system_attrs.get("fixed_params", {}),
    )
