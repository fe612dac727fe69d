"""What people and other programs do to a study's database, and where they put it."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import optuna
import pytest
from study_checks import make_space

from hydralv_tune.config.errors import InputError, StudyError
from hydralv_tune.launch.start import Start
from hydralv_tune.study.driver import Driver
from hydralv_tune.study.find import STORAGE_VARIABLE, find_study
from hydralv_tune.study.storage_url import masked, parse_storage, without_secrets
from hydralv_tune.study.study import Study, open_all, open_readonly
from hydralv_tune.study.study_folder import owner_of
from hydralv_tune.study.trial_views import TrialResult


def content(database: Path) -> str:
    """Return everything that is in an SQLite file."""
    with sqlite3.connect(database) as connection:
        return "\n".join(connection.iterdump())


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
    if kind != "no trials":
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
