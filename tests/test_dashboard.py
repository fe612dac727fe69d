"""The dashboard opens in a real browser, shows what `run` left, and lets nobody change it."""

from __future__ import annotations

import http.client
import json
import shutil
import sqlite3
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from wsgiref.simple_server import make_server

import optuna_dashboard
import pytest

from hydralv_tune.artifacts.pictures import draw_losses
from hydralv_tune.config.errors import InputError, StudyError
from hydralv_tune.config.search_space import space_from_mapping
from hydralv_tune.results.dashboard import (
    AccessGuard,
    _Handler,
    _Server,
    application,
    make_dashboard,
    serve,
)
from hydralv_tune.results.publish import (
    ARTIFACTS,
    ArtifactFolder,
    publish_study,
    publish_trial_change,
)
from hydralv_tune.study.dashboard_view import StudiesView
from hydralv_tune.study.driver import Driver
from hydralv_tune.study.retries import needs_successor
from hydralv_tune.study.study import Study, open_readonly
from hydralv_tune.study.trial_views import TrialResult


@contextmanager
def served(made: Any) -> Iterator[str]:
    """Serve a WSGI application and yield its address."""
    with make_server("127.0.0.1", 0, made, _Server, _Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@contextmanager
def window(chromium: Any, width: int) -> Iterator[None]:
    """Let a browser have so many pixels of width for a while."""
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    chromium.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    yield
    chromium.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@pytest.fixture(scope="module")
def address(finished_study: Any) -> Iterator[str]:
    """Serve the dashboard of the finished study and return its address."""
    with make_dashboard(finished_study.storage, port=0) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def ask(address: str, method: str, path: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
    """Return status, headers and body of an answer."""
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=30)
    connection.request(method, path, body=b"{}" if method != "GET" else None, headers=headers)
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer.status, {k.lower(): v for k, v in answer.getheaders()}, body


def until(done: Callable[[], Any], seconds: float = 30.0) -> Any:
    """Wait until something is true, and return it."""
    end = time.monotonic() + seconds
    while not (found := done()):
        assert time.monotonic() < end, "the page did not get there"
        time.sleep(0.2)
    return found


def test_a_trial_page_shows_note_and_pictures(address: str, chromium: Any) -> None:
    chromium.get_log("browser")
    chromium.get(f"{address}/dashboard/studies/1/trials?numbers=0")
    text = until(lambda: _text_with(chromium, "Thresholds"))
    assert "adapted Rand error" in text
    assert "matched" in text
    assert "missed" in text
    assert "binary_threshold" in text
    images = until(lambda: _images(chromium, 3))
    assert all(width > 200 for width in images)
    for name in ARTIFACTS:
        assert name in text
    assert severe(chromium) == []


def _text_with(chromium: Any, word: str) -> str:
    """Return the text of the page once a word is in it."""
    text = str(chromium.execute_script("return document.body.innerText"))
    return text if word in text else ""


def _images(chromium: Any, count: int) -> list[int]:
    """Return the widths of the artifacts that are drawn, once they are so many."""
    widths = chromium.execute_script(
        "return [...document.images].filter(i => i.src.includes('/artifacts/') && i.complete)"
        ".map(i => i.naturalWidth)"
    )
    return list(widths) if len(widths) >= count else []


def severe(chromium: Any) -> list[Any]:
    """Return the errors of the console."""
    return [entry for entry in chromium.get_log("browser") if entry["level"] == "SEVERE"]


@pytest.mark.parametrize(
    ("path", "word"),
    [
        ("/dashboard", "tiny"),
        ("/dashboard/studies/1", "History"),
        ("/dashboard/studies/1/analytics", "Hyperparameter Relationships"),
        ("/dashboard/studies/1/note", "Best so far"),
        ("/dashboard/studies/1/trials?numbers=3", "pruned at evaluation 1"),
        ("/dashboard/studies/1/trials?numbers=4", "<b>at step 3</b>"),
    ],
)
def test_pages_open_without_an_error(address: str, chromium: Any, path: str, word: str) -> None:
    chromium.get_log("browser")
    chromium.get(address + path)
    until(lambda: _text_with(chromium, word))
    assert severe(chromium) == []


def test_study_note_says_what_comes_next(address: str, finished_study: Any) -> None:
    study = json.loads(ask(address, "GET", "/api/studies/1")[2])
    note = study["note"]["body"]
    for word in ("**Objective** adapted_rand_error", "**Budget** 3 trials", "1 pruned", "1 fail",
                 "fingerprint", "**Best so far** trial", "hydralv-tune export"):  # fmt: skip
        assert word in note
    assert f"--storage {finished_study.storage}" in note


def test_intermediate_values_and_constraints_are_there_to_be_drawn(address: str) -> None:
    trials = json.loads(ask(address, "GET", "/api/studies/1")[2])["trials"]
    assert [t["state"] for t in trials] == ["Complete"] * 3 + ["Pruned", "Fail"]
    assert all(len(t["intermediate_values"]) == 2 for t in trials[:3])


def test_artifacts_are_what_the_trial_left(address: str, finished_study: Any) -> None:
    trials = json.loads(ask(address, "GET", "/api/studies/1")[2])["trials"]
    left = {a["filename"]: a["artifact_id"] for a in trials[0]["artifacts"]}
    assert set(left) == set(ARTIFACTS)
    status, headers, body = ask(address, "GET", f"/artifacts/1/1/{left['config.yaml']}")
    assert status == 200
    assert body == (finished_study.folder / "trials" / "0" / "config.yaml").read_bytes()
    assert not any(name.startswith("access-control-") for name in headers)


def test_a_trial_that_was_taken_over_takes_no_more_files(
    finished_study: Any, tmp_path: Path
) -> None:
    study = open_readonly(finished_study.storage, "tiny")
    picture = draw_losses([], tmp_path / "late.png")
    with pytest.raises(StudyError, match="Trial 0 of study 'tiny' is finished"):
        study.attach(0, picture, ArtifactFolder(tmp_path / "artifacts"))
    with pytest.raises(StudyError, match="no trial 99"):
        study.write_note(99, "a note")
    study.close()


def test_axes_are_named_after_the_objective(address: str) -> None:
    assert json.loads(ask(address, "GET", "/api/studies/1")[2])["objective_names"] == [
        "adapted Rand error"
    ]


def test_a_checkpoint_is_not_stored_twice(finished_study: Any) -> None:
    kept = (finished_study.folder / "trials" / "0" / "best.ckpt").stat()
    inodes = {path.stat().st_ino for path in (finished_study.folder / "artifacts").iterdir()}
    assert kept.st_ino in inodes


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("DELETE", "/api/studies/1"),
        ("PUT", "/api/studies/1/note"),
        ("POST", "/api/studies/1/rename"),
        ("POST", "/api/studies"),
        ("POST", "/api/trials/1/user-attrs"),
        ("POST", "/incompatible-rdb-schema"),
        ("PATCH", "/api/studies/1"),
    ],
)
def test_nothing_can_be_changed(address: str, finished_study: Any, method: str, path: str) -> None:
    status, headers, body = ask(address, method, path)
    assert status == 405
    assert "--writable" in json.loads(body)["reason"]
    assert headers["allow"] == "GET, HEAD"
    study = open_readonly(finished_study.storage, "tiny")
    assert len(study.trials()) == 5
    study.close()


def test_a_browser_cannot_delete_either(address: str, chromium: Any, finished_study: Any) -> None:
    chromium.get(f"{address}/dashboard")
    status = chromium.execute_async_script(
        "const done = arguments[0];"
        "fetch('/api/studies/1', {method: 'DELETE'})"
        ".then(r => done(r.status), e => done(String(e)))"
    )
    assert status == 405
    open_readonly(finished_study.storage, "tiny").close()


def test_another_name_for_this_machine_is_refused(address: str) -> None:
    assert ask(address, "GET", "/api/studies", Host="evil.example:8080")[0] == 403
    assert ask(address, "GET", "/api/studies", Host="localhost:8080")[0] == 200


def test_writable_lets_its_own_pages_change_and_no_others() -> None:
    seen: list[str] = []

    def inner(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        seen.append(environ["REQUEST_METHOD"])
        start_response("204 No Content", [("Access-Control-Allow-Origin", "*")])
        return [b""]

    def call(guard: AccessGuard, **environ: str) -> tuple[str, list[Any]]:
        answered: list[Any] = []
        guard(
            {"REQUEST_METHOD": "DELETE", "HTTP_HOST": "127.0.0.1:8080", **environ},
            lambda status, headers, *_: answered.append((status, headers)),
        )
        return answered[0]

    assert call(AccessGuard(inner))[0].startswith("405")
    writable = AccessGuard(inner, writable=True)
    assert call(writable, HTTP_ORIGIN="https://evil.example")[0].startswith("403")
    assert seen == []
    status, headers = call(writable, HTTP_ORIGIN="http://127.0.0.1:8080")
    assert (status, headers) == ("204 No Content", [])
    assert seen == ["DELETE"]


def test_it_listens_on_this_machine_alone(finished_study: Any) -> None:
    with make_dashboard(finished_study.storage, port=0) as server:
        assert server.server_address[0] == "127.0.0.1"
        with pytest.raises(InputError, match=r"--port: 127\.0\.0\.1:\d+ cannot be bound"):
            make_dashboard(finished_study.storage, port=server.server_port)


def test_serve_says_where_it_is_and_ends_on_ctrl_c(finished_study: Any) -> None:
    told: list[str] = []

    def ready(url: str) -> None:
        told.append(url)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        serve(finished_study.storage, port=0, ready=ready)
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(told[0], timeout=5)


def test_storage_that_does_not_exist_is_refused(tmp_path: Any) -> None:
    with pytest.raises(StudyError):
        make_dashboard(f"sqlite:///{tmp_path / 'none.db'}", port=0)
    assert not list(tmp_path.iterdir())


def test_a_study_in_postgresql_is_shown_and_its_password_is_not(
    postgres: Any, tmp_path: Path
) -> None:
    storage = postgres.new_database().replace("//postgres:@", "//postgres:s3cret@")
    storage = storage.replace("//postgres@", "//postgres:s3cret@")
    assert "s3cret" in storage
    space = space_from_mapping(
        {"base": "smoke", "parameters": {"optimization.optimizer.lr": {"float": [1e-4, 1e-2]}}}
    )
    study = Study.open(storage, "shared", space=space, create=True)
    study.remember("out", str(tmp_path))
    with Driver(study, out=tmp_path) as driver:
        asked = driver.ask(1)
        assert not isinstance(asked, str)
        folder = tmp_path / "trials" / str(asked.root)
        draw_losses([], folder / "losses.png")
        attributes = {"root": asked.root, "metrics": {"f1_iou50": 0.75, "missed": [3, 4]}}
        publish_trial_change(driver, asked.number, "COMPLETE", attributes)
        driver.tell(asked.number, TrialResult("COMPLETE", 0.2, 0.0, attributes))
    publish_study(study)
    study.close()
    with make_dashboard(storage, port=0) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        address = f"http://127.0.0.1:{server.server_port}"
        body = ask(address, "GET", "/api/studies/1")[2]
        found = json.loads(body)
        artifact = found["trials"][0]["artifacts"][0]
        picture = ask(address, "GET", f"/artifacts/1/1/{artifact['artifact_id']}")[2]
        refused = ask(address, "DELETE", "/api/studies/1")[0]
        server.shutdown()
        thread.join()
    assert b"s3cret" not in body
    assert "0.7500" in found["trials"][0]["note"]["body"]
    assert "2 missed" in found["trials"][0]["note"]["body"]
    assert (artifact["filename"], picture[:4]) == ("losses.png", b"\x89PNG")
    assert refused == 405


@pytest.mark.parametrize("name", ["../../etc/passwd", "x", "/etc/passwd", ""])
def test_an_id_from_the_database_cannot_leave_the_folder(tmp_path: Any, name: str) -> None:
    with pytest.raises(ValueError, match="UUID"):
        ArtifactFolder(tmp_path).open_reader(name)


@pytest.fixture
def fooled(tmp_path: Path) -> Study:
    """Return a study whose smallest error violates the guard, and whose best trial does not."""
    space = space_from_mapping(
        {"base": "smoke", "parameters": {"optimization.optimizer.lr": {"float": [1e-4, 1e-2]}}}
    )
    storage = f"sqlite:///{tmp_path / 'study.db'}"
    study = Study.open(storage, "fooled", space=space, create=True)
    study.remember("out", str(tmp_path))
    with Driver(study, out=tmp_path) as driver:
        for error, f1 in ((0.045, 0.17), (0.148, 0.64), (0.2, 0.7)):
            asked = driver.ask(9)
            assert not isinstance(asked, str)
            metrics = {"adapted_rand_error": error, "f1_iou50": f1}
            driver.tell(
                asked.number, TrialResult("COMPLETE", error, 0.5 - f1, {"metrics": metrics})
            )
    return study


def test_both_dashboards_name_the_best_trial_that_status_names(
    fooled: Study, chromium: Any
) -> None:
    best = fooled.facts()["best"]
    assert (best["number"], best["value"], best["feasible"]) == (1, 0.148, True)
    assert [view.value for view in fooled.trials()] == [0.045, 0.148, 0.2]
    for made in (optuna_dashboard.wsgi(fooled.storage), application([fooled])):
        with served(made) as address:
            found = json.loads(ask(address, "GET", "/api/studies/1")[2])
            chromium.get(f"{address}/dashboard/studies/1")
            text = until(lambda: _text_with(chromium, "number="))
        assert [trial["number"] for trial in found["best_trials"]] == [1]
        assert found["trials"][0]["constraints"] == [pytest.approx(0.33)]
        assert found["trials"][1]["constraints"] == [pytest.approx(-0.14)]
        assert "Best Trial (number=1)" in text


def test_going_on_with_a_study_of_the_first_version_ranks_it_for_the_stock_dashboard(
    fooled: Study, tmp_path: Path
) -> None:
    facts = fooled.facts()
    with sqlite3.connect(tmp_path / "study.db") as database:
        database.execute("UPDATE trial_values SET value = 0.045 WHERE value > 1")
        database.execute("DELETE FROM trial_system_attributes WHERE key = 'hydralv_tune:objective'")
        database.execute(
            "UPDATE trial_system_attributes SET key = 'constraints:f1', "
            "value_json = substr(value_json, 2, length(value_json) - 2) WHERE key = 'constraints'"
        )

    def stock_and_ours() -> tuple[list[int], int]:
        with served(optuna_dashboard.wsgi(f"sqlite:///{tmp_path / 'study.db'}")) as address:
            found = json.loads(ask(address, "GET", "/api/studies/1")[2])
        old = Study.open(f"sqlite:///{tmp_path / 'study.db'}", "fooled")
        best = old.facts()["best"]
        old.close()
        assert best == facts["best"]
        return [trial["number"] for trial in found["best_trials"]], best["number"]

    assert stock_and_ours() == ([0], 1)
    for _ in range(2):
        study = Study.open(f"sqlite:///{tmp_path / 'study.db'}", "fooled")
        with Driver(study, out=tmp_path):
            pass
        assert stock_and_ours() == ([1], 1)


def test_a_running_trial_has_note_and_picture_and_the_study_a_name_from_the_start(
    fooled: Study, chromium: Any
) -> None:
    folder = fooled.out
    assert folder is not None
    with Driver(fooled, out=folder) as driver:
        asked = driver.ask(9)
        assert not isinstance(asked, str)
        known: dict[str, Any] = {"root": asked.root, "epochs": 8, "evaluations": 4}
        publish_trial_change(driver, asked.number, "RUNNING", known)
        with served(application([fooled])) as address:
            found = json.loads(ask(address, "GET", "/api/studies/1")[2])
            assert "**Objective** adapted_rand_error" in found["note"]["body"]
            assert found["objective_names"] == ["adapted Rand error"]
            for step, f1 in ((1, 0.25), (2, 0.75)):
                draw_losses([], folder / "trials" / str(asked.root) / "losses.png")
                told = {"step": step, "epoch": 2 * step, "seconds": 60.0 * step, "host": "node7",
                        "metrics": {"f1_iou50": f1}}  # fmt: skip
                publish_trial_change(driver, asked.number, "RUNNING", {**known, **told})
            found = json.loads(ask(address, "GET", "/api/studies/1")[2])
            trial = found["trials"][asked.number]
            assert [artifact["filename"] for artifact in trial["artifacts"]] == ["losses.png"]
            chromium.get(f"{address}/dashboard/studies/1/trials?numbers={asked.number}")
            text = until(lambda: _text_with(chromium, "node7"))
    assert "epoch 4 of 8, evaluation 2 of 4, 2 min left at " in text
    assert "0.7500" in text


def test_two_trials_side_by_side_need_no_sideways_scroll(fooled: Study, chromium: Any) -> None:
    long = {"metrics": {f"figure_{i}": i / 7 for i in range(200)}, "sweep": {"plateau": "x" * 5000}}
    folder = fooled.out
    assert folder is not None
    with Driver(fooled, out=folder) as driver:
        for _ in range(2):
            asked = driver.ask(9)
            assert not isinstance(asked, str)
            driver.tell(asked.number, TrialResult("COMPLETE", 0.3, -0.1, long))
    with served(application([fooled])) as address, window(chromium, 1440):
        chromium.get(f"{address}/dashboard/studies/1/trials?numbers=3,4")
        until(lambda: _text_with(chromium, "Trial 4 (trial_id"))
        widths = chromium.execute_script(
            "return [document.documentElement.scrollWidth, innerWidth]"
        )
        tallest = chromium.execute_script(
            "return Math.max(0, ...[...document.querySelectorAll('tr')].map(r => r.offsetHeight))"
        )
    assert widths[0] <= widths[1]
    assert tallest < 120


def test_on_a_phone_a_study_is_one_column(fooled: Study, chromium: Any) -> None:
    with served(application([fooled])) as address, window(chromium, 400):
        chromium.get(f"{address}/dashboard/studies/1")
        until(lambda: _text_with(chromium, "Best Trial"))
        page, cards = chromium.execute_script(
            "return [document.documentElement.scrollWidth,"
            " [...document.querySelectorAll('.MuiGrid-item')].map(c => c.offsetWidth)]"
        )
    assert page <= 400
    assert min(cards) > 250


def test_what_is_refused_is_hidden_and_the_page_says_why(fooled: Study, chromium: Any) -> None:
    shown = {}
    for writable in (False, True):
        with served(application([fooled], writable=writable)) as address:
            chromium.get(f"{address}/dashboard")
            until(lambda: _text_with(chromium, "fooled"))
            time.sleep(1.0)
            shown[writable] = (
                chromium.execute_script(
                    "return [...document.querySelectorAll('button[aria-label=\"delete study\"]')]"
                    ".filter(b => b.offsetParent !== null).length"
                ),
                chromium.execute_script("return document.body.innerText"),
            )
    assert shown[False][0] == 0
    assert "--writable" in shown[False][1]
    assert shown[True][0] == 1
    assert "--writable" not in shown[True][1]


def test_failing_a_running_trial_on_the_page_ends_it_and_is_told(fooled: Study) -> None:
    folder = fooled.out
    assert folder is not None
    with Driver(fooled, out=folder) as driver:
        asked = driver.ask(9)
        assert not isinstance(asked, str)
        with served(application([fooled], writable=True)) as address:
            connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=30)
            connection.request(
                "POST", f"/api/trials/{asked.number + 1}/tell", b'{"state": "Fail"}',
                {"Content-Type": "application/json"},
            )  # fmt: skip
            assert connection.getresponse().status == 204
            connection.close()
        assert driver.poll() == {asked.number}
        assert driver.reason_of(asked.number) == "stopped from the dashboard"
    view = fooled.trials()[asked.number]
    assert view.state == "FAIL"
    assert not needs_successor(view, retries=2)


def test_studies_of_two_storages_stand_on_one_page(
    fooled: Study, finished_study: Any, chromium: Any
) -> None:
    other = open_readonly(finished_study.storage, "tiny")
    with served(application([fooled, other])) as address:
        found = json.loads(ask(address, "GET", "/api/studies")[2])["study_summaries"]
        assert [study["study_name"] for study in found] == ["fooled", "tiny"]
        second = json.loads(ask(address, "GET", f"/api/studies/{found[1]['study_id']}")[2])
        chromium.get(f"{address}/dashboard/studies/{found[1]['study_id']}/trials?numbers=")
        until(lambda: _text_with(chromium, "tiny"))
    other.close()
    assert "**Budget** 3 trials" in second["note"]["body"]
    assert "Thresholds" in second["trials"][0]["note"]["body"]


def grow(database: Path, trials: int) -> None:
    """Copy the trials of a study in SQLite until there are so many."""
    tables = ("trial_values", "trial_params", "trial_user_attributes", "trial_system_attributes",
              "trial_intermediate_values")  # fmt: skip
    with sqlite3.connect(database) as connection:
        ask = connection.execute
        while (count := ask("select count(*) from trials").fetchone()[0]) < trials:
            top = ask("select max(trial_id) from trials").fetchone()[0]
            more = min(count, trials - count)
            ask(
                "insert into trials(trial_id, number, study_id, state, datetime_start,"
                f" datetime_complete) select trial_id + {top}, number + {count}, study_id, state,"
                f" datetime_start, datetime_complete from trials where number < {more}"
            )
            for table in tables:
                names = [row[1] for row in ask(f"pragma table_info({table})")][1:]
                rest = ", ".join(name for name in names if name != "trial_id")
                ask(
                    f"insert into {table}(trial_id, {rest}) select trial_id + {top}, {rest}"
                    f" from {table} where trial_id in"
                    f" (select trial_id from trials where number < {more})"
                )
            connection.commit()
    connection.close()


def test_five_thousand_trials_are_shown_as_optuna_reads_them(
    fooled: Study, chromium: Any, tmp_path: Path
) -> None:
    grow(tmp_path / "study.db", 5000)
    view = StudiesView([fooled])
    shown = {trial.number: trial for trial in view.get_all_trials(1)}
    assert len(shown) == 5000
    for frozen in (fooled.rdb.get_trial(key) for key in (1, 2, 2500, 5000)):
        own = shown[frozen.number]
        assert own.params == frozen.params
        assert own.distributions == frozen.distributions
        assert own.intermediate_values == frozen.intermediate_values
        assert (own.state, own.datetime_start) == (frozen.state, frozen.datetime_start)
    with served(application([fooled])) as address:
        first = time.process_time()
        chromium.get(f"{address}/dashboard")
        until(lambda: _text_with(chromium, "fooled"))
        body = ask(address, "GET", "/api/studies/1")[2]
        spent = time.process_time() - first
        again = time.process_time()
        ask(address, "GET", "/api/studies/1?after=5000")
        spent_again = time.process_time() - again
    found = json.loads(body)
    assert len(found["trials"]) == 5000
    assert [trial["number"] for trial in found["best_trials"]] == [1]
    # Processor time, since other work may share the machine.
    assert spent < 6.0
    assert spent_again < 1.0


def test_writable_really_writes(finished_study: Any, tmp_path: Path) -> None:
    shutil.copy(finished_study.folder / "study.db", tmp_path / "study.db")
    storage = f"sqlite:///{tmp_path / 'study.db'}"
    with make_dashboard(storage, port=0, writable=True) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        status, _, _ = ask(f"http://127.0.0.1:{server.server_port}", "DELETE", "/api/studies/1")
        server.shutdown()
        thread.join()
    assert status == 204
    with pytest.raises(StudyError):
        open_readonly(storage, "tiny")
