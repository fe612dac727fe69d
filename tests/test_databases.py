"""What people and other programs do to a study's database, and where they put it."""

from __future__ import annotations

import gc
import itertools
import os
import random
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import optuna
import pytest
import sqlalchemy
from optuna.trial import TrialState
from study_checks import make_space, on_databases

from hydralv_tune.artifacts.records import TrialRecord
from hydralv_tune.config.errors import ConfigError, InputError, StudyError
from hydralv_tune.launch.cluster import ray_cluster
from hydralv_tune.launch.start import Start
from hydralv_tune.study.database import DatabaseAway, no_collection
from hydralv_tune.study.driver import Driver
from hydralv_tune.study.find import STORAGE_VARIABLE, find_study
from hydralv_tune.study.recover import recover_study
from hydralv_tune.study.storage_url import masked, parse_storage, sqlite_file, without_secrets
from hydralv_tune.study.study import Study, open_all, open_readonly, study_names
from hydralv_tune.study.study_folder import owner_of
from hydralv_tune.study.trial_views import Asked, TrialResult, count_states


def content(database: Path) -> str:
    """Return everything that is in an SQLite file."""
    with sqlite3.connect(database) as connection:
        return "\n".join(connection.iterdump())


def test_garbage_is_looked_for_again_after_trials_were_read() -> None:
    with no_collection():
        with no_collection():
            pass
        assert not gc.isenabled()
    assert gc.isenabled()
    with suppress(KeyError), no_collection():
        raise KeyError
    assert gc.isenabled()


def run_one(folder: Path, storage: str, name: str = "s") -> None:
    """Leave a study of one finished trial in a folder."""
    study = Start(storage, name, make_space(name=name), folder).open({})
    with Driver(study, out=folder) as driver:
        trial = driver.ask(1)
        assert not isinstance(trial, str)
        (folder / "trials" / str(trial.root)).mkdir(parents=True)
        driver.tell(trial.number, TrialResult("COMPLETE", 0.1, 0.0, {}))
    study.close()


@pytest.mark.parametrize(
    ("url", "mended"),
    [
        ("sqlite://runs/s.db", "2 slashes after 'sqlite:'.*Write sqlite:///runs/s.db"),
        ("sqlite:runs/s.db", "0 slashes after 'sqlite:'.*Write sqlite:///runs/s.db"),
        ("sqlite:/abs/s.db", "1 slash after 'sqlite:'.*Write sqlite:////abs/s.db"),
        ("sqlite:////~/s.db", "it has 4 slashes. Write sqlite:///~/s.db"),
        ("runs/s.db", "is a path and no database URL. Write it like sqlite:///runs/s.db"),
        ("postgresql:/u:secret@h/d", r"Write postgresql://u:\*\*\*@h/d"),
    ],
)
def test_the_slashes_of_a_url_are_corrected(url: str, mended: str) -> None:
    with pytest.raises(StudyError, match=mended) as caught:
        parse_storage(url)
    assert "secret" not in str(caught.value)


def test_home_and_variables_stand_for_their_value_in_a_url(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("LAB", "x1")
    monkeypatch.delenv("UNSET", raising=False)
    assert masked(parse_storage("sqlite:///~/s.db")) == f"sqlite:///{tmp_path}/s.db"
    assert masked(parse_storage("sqlite:///runs/$LAB/s.db")) == "sqlite:///runs/x1/s.db"
    with pytest.raises(InputError, match="variable \\$UNSET is not set"):
        parse_storage("sqlite:///$UNSET/s.db")
    assert masked(parse_storage("postgresql:///d")) == "postgresql+psycopg:///d"


def test_no_secret_is_kept_with_a_folder() -> None:
    url = "postgresql://u:p@h:5/d?sslpassword=x&sslmode=require"
    assert without_secrets(parse_storage(url)) == "postgresql+psycopg://u@h:5/d?sslmode=require"


def test_a_study_is_found_by_folder_file_url_variable_or_as_the_newest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(STORAGE_VARIABLE, raising=False)
    with pytest.raises(StudyError, match="none under runs/"):
        find_study()
    for name in ("a", "b"):
        run_one(tmp_path / "runs" / name, f"sqlite:///runs/{name}/study.db", name)
    os.utime("runs/a/study.db", (1, 1))
    assert (find_study().name, find_study().folder) == ("b", Path("runs/b"))
    assert find_study("runs/a").storage == "sqlite:///runs/a/study.db"
    assert find_study("runs/a/study.db").name == "a"
    assert find_study("sqlite:///runs/a/study.db").name == "a"
    assert find_study(storage="sqlite:///runs/a/study.db", study="x").name == "x"
    monkeypatch.setenv(STORAGE_VARIABLE, "sqlite:///runs/a/study.db")
    assert find_study().name == "a"
    assert find_study("runs/b").name == "b"
    monkeypatch.delenv(STORAGE_VARIABLE)
    with pytest.raises(StudyError, match="both name a storage"):
        find_study("sqlite:///x.db", storage="sqlite:///y.db")
    with pytest.raises(StudyError, match=r"runs: holds no study\.db"):
        find_study("runs")
    with pytest.raises(StudyError, match="there is no such folder"):
        find_study("nowhere")
    optuna.create_study(study_name="theirs", storage="sqlite:///runs/a/study.db")
    with pytest.raises(StudyError, match=r"holds 2 studies: a, theirs\. Name one with --study"):
        find_study("sqlite:///runs/a/study.db")
    assert find_study("runs/a").name == "a", "the folder says whose it is"


def test_a_folder_is_enough_where_the_database_is_elsewhere(storage: str, tmp_path: Path) -> None:
    run_one(tmp_path / "out", storage)
    found = find_study(tmp_path / "out")
    assert found.name == "s"
    assert open_readonly(found.storage, found.name, found.folder).out == tmp_path / "out"


@pytest.mark.parametrize("marked", [True, False])
def test_a_study_that_was_moved_or_copied_has_its_folder_beside_its_file(
    tmp_path: Path, marked: bool
) -> None:
    first, second, third = (tmp_path / name for name in ("cluster", "laptop", "stick"))
    run_one(first, f"sqlite:///{first / 'study.db'}")
    if not marked:
        (first / "study.json").unlink()
    shutil.copytree(first, third)
    first.rename(second)
    moved = open_readonly(f"sqlite:///{second / 'study.db'}", "s")
    assert moved.out == second
    assert moved.folder_of(moved.trials()[0]) == second / "trials" / "0"
    moved.close()
    (tmp_path / "link").symlink_to(third)
    copied = open_readonly(f"sqlite:///{tmp_path / 'link' / 'study.db'}", "s")
    assert copied.out is not None
    assert copied.out.samefile(third)
    copied.close()
    # It goes on where it is now, and the other copy is left alone.
    Start(f"sqlite:///{third / 'study.db'}", "s", make_space(), third).open({}).close()
    assert owner_of(third) is not None


@pytest.mark.parametrize("kind", ["maximize", "two objectives", "no trials", "minimize"])
def test_a_study_of_another_program_is_refused_and_left_alone(tmp_path: Path, kind: str) -> None:
    database = tmp_path / "lab.db"
    storage = f"sqlite:///{database}"
    directions = {"maximize": ["maximize"], "two objectives": ["minimize", "maximize"]}
    theirs = optuna.create_study(
        study_name="s", storage=storage, directions=directions.get(kind, ["minimize"])
    )
    if kind == "no trials":  # nor is it ours for a note of that name
        theirs.set_user_attr("space", "the final frontier")
    else:
        values = [0.5, 1.0][: len(theirs.directions)]
        theirs.add_trial(
            optuna.trial.create_trial(
                values=values, params={"lr": 0.5},
                distributions={"lr": optuna.distributions.FloatDistribution(0, 1)},
            )
        )  # fmt: skip
    before = content(database)
    start = Start(storage, "s", make_space(), tmp_path / "out")
    for refused in (
        lambda: start.check({}),
        lambda: start.open({}),
        lambda: open_readonly(storage, "s"),
        lambda: Study.open(storage, "s", space=make_space(), create=True),
    ):
        with pytest.raises(StudyError, match=r"was not made by hydralv-tune.*another --study"):
            refused()
    assert content(database) == before
    assert open_all(storage) == []
    run_one(tmp_path / "out", storage, "ours")
    assert [study.name for study in open_all(storage)] == ["ours"]


@pytest.mark.parametrize(
    "statement",
    [
        "CREATE TABLE studies (x)",
        "CREATE TABLE studies (study_id INTEGER, study_name TEXT)",
        "CREATE TABLE version_info (version_info_id INTEGER, schema_version INTEGER,"
        " library_version TEXT); CREATE TABLE studies (x)",
    ],
)
def test_tables_of_another_program_are_refused_and_left_alone(
    tmp_path: Path, statement: str
) -> None:
    database = tmp_path / "theirs.db"
    storage = f"sqlite:///{database}"
    with sqlite3.connect(database) as connection:
        connection.executescript(statement)
    before = content(database)
    for refused in (
        lambda: Start(storage, "s", make_space(), tmp_path / "out").check({}),
        lambda: Start(storage, "s", make_space(), tmp_path / "out").open({}),
        lambda: open_readonly(storage, "s"),
        lambda: open_all(storage),
        lambda: study_names(storage),
    ):
        with pytest.raises(StudyError, match=r"has other tables now|was made by another Optuna"):
            refused()
    assert content(database) == before


def test_a_database_of_another_optuna_says_how_to_upgrade_a_copy_of_it(tmp_path: Path) -> None:
    database = tmp_path / "old study.db"
    run_one(tmp_path / "out", f"sqlite:///{database}")
    with sqlite3.connect(database) as connection:
        connection.execute("UPDATE version_info SET library_version = '2.10.1'")
        connection.execute("UPDATE alembic_version SET version_num = 'v3.0.0.d'")
        connection.execute("DROP INDEX IF EXISTS trials_study_id_key")
    with pytest.raises(StudyError, match=r"made by Optuna 2\.10\.1: here is Optuna") as caught:
        open_readonly(f"sqlite:///{database}", "s")
    # What the message proposes is done, by the shell that people would paste it into.
    words = str(caught.value).partition("Upgrade a copy of it: ")[2]
    bin_folder = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{bin_folder}:{os.environ['PATH']}"}
    subprocess.run(words, shell=True, check=True, env=environment, capture_output=True)
    open_readonly(f"sqlite:///{tmp_path / 'old study-upgraded.db'}", "s").close()
    with sqlite3.connect(database) as connection:
        connection.execute("UPDATE alembic_version SET version_num = 'v9.9.9.z'")
    with pytest.raises(StudyError, match="newer"):
        open_readonly(f"sqlite:///{database}", "s")


LR_KEY = "optimization.optimizer.lr"


class FakeTrial:
    """A trial of milliseconds that keeps its place in its folder and logs every step it makes."""

    STEPS = 4

    def __init__(self, asked: Asked, out: Path) -> None:
        self.number, self.error = asked.number, float(asked.params[LR_KEY])
        self.folder = out / "trials" / str(asked.root)
        self.folder.mkdir(parents=True, exist_ok=True)
        place = self.folder / "step"
        self.step = int(place.read_text()) if place.exists() else 0

    def advance(self, driver: Driver) -> bool:
        """Make one step or end, and return whether the trial is over."""
        if self.step == self.STEPS:
            driver.tell(self.number, TrialResult("COMPLETE", self.error, -0.3, {}))
            return True
        self.step += 1
        with (self.folder / "steps.log").open("a") as log:
            log.write(f"{self.step}\n")
        (self.folder / "step").write_text(str(self.step))
        return driver.report(self.number, self.step, self.error + 1 / self.step) == "refused"


def drive(driver: Driver, out: Path, target: int, meddle: Callable[[], None], at: int) -> None:
    """Run two trials at a time until the study is done or gone; meddle at one moment."""
    live: dict[int, FakeTrial] = {}
    deadline = time.monotonic() + 60.0
    for turn in itertools.count():
        assert time.monotonic() < deadline, "the driver neither ends nor goes on"
        if turn == at:
            meddle()
        with suppress(DatabaseAway):
            for number in driver.poll():
                live.pop(number, None)
        if driver.gone is not None:
            return
        if len(live) < 2:
            try:
                trial = driver.ask(target)
            except DatabaseAway:
                time.sleep(0.05)
                continue
            if trial == "done" and not live:
                return
            if isinstance(trial, Asked):
                live[trial.number] = FakeTrial(trial, out)
        for number in list(live):
            if live[number].advance(driver):
                del live[number]


class Meddler:
    """What others do to the database of a running study, one method each.

    Args:
        storage: Of the study `s`.
        space: That it searches.
        folder: For copies.
    """

    def __init__(self, storage: str, folder: Path) -> None:
        self.storage, self.folder = storage, folder
        self.url = parse_storage(storage)
        self.path = sqlite_file(self.url)
        self.later: threading.Timer | None = None
        if self.path is not None:
            shutil.copy(self.path, folder / "early.db")

    def _study(self) -> optuna.Study:
        return optuna.load_study(study_name="s", storage=self._optuna())

    def _optuna(self) -> str:
        return self.url.render_as_string(hide_password=False)

    def _run(self, *statements: str) -> None:
        engine = sqlalchemy.create_engine(self.url)
        with engine.begin() as connection:
            for statement in statements:
                connection.execute(sqlalchemy.text(statement))
        engine.dispose()

    def delete_the_study(self) -> None:
        optuna.delete_study(study_name="s", storage=self._optuna())

    def put_another_study_in_its_place(self) -> None:
        self.delete_the_study()
        theirs = optuna.create_study(
            study_name="s", storage=self._optuna(), directions=["maximize", "minimize"]
        )
        theirs.enqueue_trial({"x": 1})

    def enqueue_what_cannot_be(self) -> None:
        study = self._study()
        for params in ({LR_KEY: 5.0}, {LR_KEY: "fast"}, {LR_KEY: None}, {"x": 1}, {LR_KEY: [1]}):
            study.enqueue_trial(params)

    def fail_a_running_trial(self) -> None:
        for trial in self._study().get_trials(states=(TrialState.RUNNING,))[:1]:
            self._study().tell(trial.number, state=TrialState.FAIL)

    def ask_and_never_tell(self) -> None:
        self._study().ask()

    def add_a_finished_trial(self) -> None:
        distribution = optuna.distributions.FloatDistribution(1e-5, 1e-1, log=True)
        self._study().add_trial(
            optuna.trial.create_trial(
                value=0.0, params={LR_KEY: 1e-3}, distributions={LR_KEY: distribution}
            )
        )

    def run_another_study_beside_it(self) -> None:
        theirs = optuna.create_study(study_name="theirs", storage=self._optuna())
        theirs.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=2)

    def make_it_read_only_for_a_moment(self) -> None:
        name = self.url.database
        if self.path is not None:
            other = sqlite3.connect(self.path, check_same_thread=False, timeout=20)
            other.execute("BEGIN EXCLUSIVE")
            self.later = threading.Timer(1.0, other.close)
        else:
            quoted = f'ALTER DATABASE "{name}" SET default_transaction_read_only ='
            self._run(f"{quoted} on")
            self._run(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = "
                      f"'{name}' AND pid <> pg_backend_pid()")  # fmt: skip
            undo = ("SET TRANSACTION READ WRITE", f"{quoted} off")
            self.later = threading.Timer(1.0, lambda: self._run(*undo))
        self.later.start()

    def rename_a_table(self) -> None:
        self._run("ALTER TABLE trials RENAME TO trials_of_before")

    def migrate_it_to_a_newer_optuna(self) -> None:
        self._run(
            "UPDATE alembic_version SET version_num = 'v9.9.9.z'",
            "UPDATE version_info SET library_version = '9.0.0'",
            "ALTER TABLE trial_heartbeats RENAME TO trial_signs_of_life",
            "ALTER TABLE trials RENAME COLUMN datetime_start TO started_at",
        )

    def put_the_tables_of_an_older_optuna_in_it(self) -> None:
        self._run(
            "UPDATE version_info SET library_version = '2.10.1'",
            "UPDATE alembic_version SET version_num = 'v2.6.0.a'",
            "DROP TABLE trial_heartbeats",
            "ALTER TABLE trial_intermediate_values DROP COLUMN intermediate_value_type",
        )

    def remove_the_file(self) -> None:
        assert self.path is not None
        self.path.unlink()

    def replace_the_file(self) -> None:
        assert self.path is not None
        (self.folder / "early.db").replace(self.path)

    def copy_an_older_state_over_it(self) -> None:
        assert self.path is not None
        shutil.copy(self.folder / "early.db", self.path)


CHANGED_TABLES = (
    "rename_a_table", "migrate_it_to_a_newer_optuna", "put_the_tables_of_an_older_optuna_in_it",
)  # fmt: skip
EVERYWHERE = (
    "delete_the_study", "put_another_study_in_its_place",
    "enqueue_what_cannot_be", "fail_a_running_trial", "ask_and_never_tell", "add_a_finished_trial",
    "run_another_study_beside_it", "make_it_read_only_for_a_moment", *CHANGED_TABLES,
)  # fmt: skip
ON_FILES = ("remove_the_file", "replace_the_file", "copy_an_older_state_over_it")
ENDS = {
    "delete_the_study", "put_another_study_in_its_place", *ON_FILES, *CHANGED_TABLES,
}  # fmt: skip
"""After these the study cannot simply go on."""


def chaos(storage: str, folder: Path, what: str, at: int) -> str:
    """Meddle with a study at one turn of its driver, start it again, check, and say how it ended.

    Args:
        storage: An empty database.
        folder: For the study's folder, and copies of the database.
        what: A method of `Meddler`.
        at: The turn; a study that nobody meddles with takes some fifteen.
    """
    target, out = 5, folder / "out"
    start = Start(storage, "s", make_space(), out)
    study = start.open({})
    meddler = Meddler(storage, folder)
    try:
        with Driver(study, out=out) as driver:
            drive(driver, out, target, getattr(meddler, what), at)
            gone = driver.gone_reason
    finally:
        study.close()
        if meddler.later is not None:
            meddler.later.join()
    if gone is not None:
        assert what in ENDS, gone
        assert "recover" in gone
    before = content(meddler.path) if what == "put_another_study_in_its_place" and (
        meddler.path is not None) else None  # fmt: skip
    refusal, again = "", None
    try:
        start.check({})
        again = start.open({})
    except StudyError as error:
        refusal = str(error)
    if before is not None and meddler.path is not None:
        assert content(meddler.path) == before, "what is another's was written into"
    if again is None:
        assert what in ENDS, refusal
        return "refused"
    with Driver(again, out=out) as driver:
        drive(driver, out, target, lambda: None, -1)
        assert driver.gone is None
    trials = again.trials()
    counts = count_states(trials)
    assert counts["complete"] == target, counts
    assert counts["running"] == counts["waiting"] == 0, counts
    again.close()
    for log in (out / "trials").glob("*/steps.log"):
        steps = log.read_text().split()
        assert steps == sorted(set(steps)), f"{what}: a step was made twice: {log.parent} {steps}"
    for trial in trials:
        if "enqueued by hand" in trial.user_attrs.get("reason", ""):
            assert trial.state == "FAIL"
            assert "retry_of" not in trial.user_attrs
    return "finished"


@pytest.mark.parametrize(
    ("storage", "what"),
    on_databases(
        EVERYWHERE,
        ["delete_the_study", "fail_a_running_trial", "make_it_read_only_for_a_moment",
         "rename_a_table"],
    ),
    indirect=["storage"],
)  # fmt: skip
def test_what_others_do_to_a_running_study_ends_in_order_or_does_no_harm(
    storage: str, tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hydralv_tune.study.storage_url.BUSY_TIMEOUT_S", 0.2)
    ended = chaos(storage, tmp_path, what, at=1 + len(what) % 5)
    assert ended == ("refused" if what in ENDS else "finished")


@pytest.mark.parametrize("what", ON_FILES)
def test_a_file_that_goes_away_under_a_running_study_ends_it_in_order(
    tmp_path: Path, what: str
) -> None:
    chaos(f"sqlite:///{tmp_path / 'study.db'}", tmp_path, what, at=7)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("what", [*EVERYWHERE, *ON_FILES])
@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_what_others_do_at_any_moment_ends_in_order_or_does_no_harm(
    tmp_path: Path,
    what: str,
    kind: str,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`HYDRALV_CHAOS_ROUNDS` is the number of rounds on SQLite; PostgreSQL has a third of them."""
    if kind == "postgresql" and what in ON_FILES:
        pytest.skip("a database on a server is no file")
    monkeypatch.setattr("hydralv_tune.study.storage_url.BUSY_TIMEOUT_S", 0.2)
    rounds = int(os.environ.get("HYDRALV_CHAOS_ROUNDS", "2"))
    ends: list[str] = []
    for number in range(rounds if kind == "sqlite" else -(-rounds // 3)):
        folder = tmp_path / str(number)
        folder.mkdir()
        storage = f"sqlite:///{folder / 'study.db'}"
        if kind == "postgresql":
            storage = str(request.getfixturevalue("postgres").new_database())
        at = random.Random(f"{what}-{kind}-{number}").randrange(14)
        ends.append(chaos(storage, folder, what, at))
    assert what in ENDS or set(ends) == {"finished"}, ends


AGAIN = {"confirm": {"top": 1, "seeds": 2}}


def leave_record(folder: Path, trial: Asked, state: str) -> dict[str, float]:
    """Leave a trial's record as its worker does, and return its figures."""
    metrics = {"adapted_rand_error": 0.2, "adapted_rand_error_foreground": 0.3, "f1_iou50": 0.8}
    place = folder / "trials" / str(trial.root)
    place.mkdir(parents=True)
    config = make_space().candidate(trial.params).as_mapping()
    config["system"]["seed"] += trial.seed_shift
    record = TrialRecord(
        state=state, number=trial.number, root=trial.root, study="s", out=str(place),
        config=config, objective={}, provenance={}, seed=config["system"]["seed"],
        device={}, split={}, training={},
        volumes=[{"name": "im", "image": "im.h5", "fingerprint": "abc"}],
        history=[{"evaluation": 1, "best_value": 0.3, "seconds": 2.0}],
        metrics=metrics if state == "complete" else {},
    )  # fmt: skip
    record.write()
    return metrics


def test_a_study_is_made_again_from_the_records_of_its_trials_and_goes_on(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path / 'study.db'}"
    study = Start(storage, "s", make_space(), tmp_path).open({"im": "abc"})
    with Driver(study, out=tmp_path) as driver:
        for state in ("complete", "complete", "interrupted"):
            trial = driver.ask(9)
            assert isinstance(trial, Asked)
            metrics = leave_record(tmp_path, trial, state)
            if state == "complete":
                driver.tell(trial.number, TrialResult("COMPLETE", 0.2, -0.3, {"metrics": metrics}))
    before = [(t.number, dict(t.params), t.value) for t in study.trials()]
    study.close()
    (tmp_path / "study.db").unlink()
    with pytest.raises(StudyError, match="hydralv-tune recover"):
        Start(storage, "s", make_space(), tmp_path).check({})
    assert recover_study(tmp_path)["trials"]["complete"] == 2
    study = Start(storage, "s", make_space(), tmp_path).open({"im": "abc"})
    after = [(t.number, dict(t.params), t.value) for t in study.trials()]
    assert after == before
    with Driver(study, out=tmp_path) as driver:
        trial = driver.ask(9)
        assert isinstance(trial, Asked)
        assert (trial.root, trial.retry_of) == (2, 2), "what was under way goes on"
    study.close()
    with pytest.raises(StudyError, match="holds study 's' already"):
        recover_study(tmp_path)
    with pytest.raises(StudyError, match=r"holds no space\.yaml"):
        recover_study(tmp_path / "trials")


def test_a_study_that_is_made_again_knows_which_trials_were_repeats(tmp_path: Path) -> None:
    storage, space = f"sqlite:///{tmp_path / 'study.db'}", make_space(budget=AGAIN)
    study = Start(storage, "s", space, tmp_path).open({"im": "abc"})
    with Driver(study, out=tmp_path) as driver:
        for ask in (driver.ask, driver.ask, driver.ask_again, driver.ask_again):
            trial = ask(2)
            assert isinstance(trial, Asked)
            metrics = leave_record(tmp_path, trial, "complete")
            driver.tell(trial.number, TrialResult("COMPLETE", 0.2, -0.3, {"metrics": metrics}))
    before = study.facts()
    study.close()
    (tmp_path / "study.db").unlink()
    del before["learned_from"]  # no record says what earlier studies taught
    assert recover_study(tmp_path) == before
    study = Start(storage, "s", space, tmp_path).open({"im": "abc"})
    with Driver(study, out=tmp_path) as driver:
        assert (driver.ask(2), driver.ask_again(2)) == ("done", "done")
    study.close()


def test_candidates_are_enqueued_all_or_none_and_carry_what_they_set(
    storage: str, tmp_path: Path
) -> None:
    study = Start(storage, "s", make_space(), tmp_path).open({})
    good = {"optimization": {"optimizer": {"lr": 0.02}}, "system": {"seed": 7}}
    with pytest.raises(ConfigError, match="5"):
        study.enqueue_all({"good": good, "bad": {"optimization": {"optimizer": {"lr": 5.0}}}})
    assert study.trials() == []
    with Driver(study, out=tmp_path) as driver:
        assert study.enqueue_all({"good": good}) == [0]
        with pytest.raises(StudyError, match="trial 0 of study 's' is that candidate already"):
            study.enqueue_all({"good": good})
        trial = driver.ask(9)
        assert isinstance(trial, Asked)
        assert (trial.warm_start, trial.params[LR_KEY]) == ("good", 0.02)
        assert trial.overrides == good
        driver.tell(trial.number, TrialResult("FAIL", retry="free", attributes={"reason": "x"}))
        again = driver.ask(9)
        assert isinstance(again, Asked)
        assert (again.retry_of, again.overrides) == (0, good)
    study.close()


def test_a_cluster_of_another_ray_is_named_with_both_versions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def init(**_: object) -> None:
        raise RuntimeError(
            "Version mismatch: The cluster was started with:\n    Ray: 2.40.0\n    Python: 3.11.7\n"
            "This process on node 10.0.0.1 was started with:\n    Ray: 2.60.0\n    Python: 3.12.1\n"
        )

    monkeypatch.setattr("hydralv_tune.launch.cluster.ray.init", init)
    with (
        pytest.raises(
            InputError, match=r"runs Ray 2\.40\.0 on Python 3\.11\.7, here are Ray 2\.60"
        ),
        ray_cluster("127.0.0.1:6379", []),
    ):
        pass
