"""What version 0.1.0 left on the disk is read, continued and taken away by this version.

How `witness/version_1` was made, and what to do when a format changes, stands in its README.md.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from commands_in_a_process import environment

from hydralv_tune.artifacts.records import load_checkpoint, read_record
from hydralv_tune.study.study import open_readonly

WITNESS = Path(__file__).parent / "witness" / "version_1"
EXPECTED: dict[str, Any] = json.loads((WITNESS / "expected.json").read_text())
FIGURES = ("adapted_rand_error", "adapted_rand_error_foreground", "f1_iou50")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Return a copy of the witness, as a user has one who has moved a study."""
    folder = tmp_path / "moved"
    shutil.copytree(WITNESS, folder)
    return folder


def command(place: Path, words: list[str]) -> Any:
    """Run a command in a folder and return what it prints, which is one JSON document."""
    done = subprocess.run(
        [sys.executable, "-m", "hydralv_tune", *words],
        cwd=place, env=environment(), capture_output=True, text=True, timeout=800, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def nearly(value: float) -> Any:
    """Return what equals a figure of what was trained, which another processor rounds otherwise."""
    return pytest.approx(value, abs=EXPECTED["tolerance"])


def told(facts: dict[str, Any]) -> dict[str, Any]:
    """Return what `run` and `status` say of a study, but for where it lies."""
    return {key: facts[key] for key in ("study", "trials", "best")}


def check_history(record: Path, expected: dict[str, Any]) -> None:
    """Check that a trial kept the evaluations it had, did the rest, and says where it went on."""
    found = read_record(record)
    assert found.state == "complete"
    assert f"continued from step {expected['stopped_at_step']}" in found.notes
    rows = [{key: row[key] for key in ("evaluation", "step", "value")} for row in found.history]
    kept = len(expected["history_before"])
    assert rows[:kept] == expected["history_before"]
    assert [row["step"] for row in rows] == [row["step"] for row in expected["history_after"]]
    for row, wanted in zip(rows, expected["history_after"], strict=True):
        assert row["value"] == nearly(wanted["value"])


@pytest.mark.parametrize("study", ["finished", "interrupted"])
def test_status_says_of_a_study_what_it_said_then(place: Path, study: str) -> None:
    assert told(command(place, EXPECTED[study]["status"])) == EXPECTED[study]["before"]


@pytest.mark.timeout(900)
def test_a_finished_study_is_whole_at_its_new_place(place: Path) -> None:
    expected = EXPECTED["finished"]
    check_finished_trials(place)
    facts = command(place, expected["run"])  # trains nothing, and takes the new place over
    assert told(facts) == expected["after"]
    assert Path(facts["best_config"]) == place / "finished" / "trials" / "1" / "config.yaml"
    document = command(place, expected["export"])
    assert document["out"] == "again/best.yaml"
    exported, before = place / "again" / "best.ckpt", place / "exported" / "best.ckpt"
    assert same_weights(load_checkpoint(exported), load_checkpoint(before))
    check_same_choices(place / "exported" / "best.yaml", place / "again" / "best.yaml")
    page = Path(place / command(place, expected["report"])["out"])
    assert page.stat().st_size > 10_000
    text = page.with_name("report.md").read_text()
    for words in expected["report_says"]:
        assert words in text
    check_finished_trials(place)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_finished_study_takes_one_more_trial(place: Path) -> None:
    expected = EXPECTED["finished"]
    facts = command(place, expected["extend"])
    wanted = expected["after_extend"]
    assert facts["trials"]["complete"] + facts["trials"]["pruned"] == wanted["finished"]
    assert facts["trials"]["fail"] == wanted["fail"]
    assert sum(facts["trials"].values()) == wanted["trials"]
    assert facts["best"]["value"] <= expected["after"]["best"]["value"]
    check_finished_trials(place)


def check_finished_trials(place: Path) -> None:
    """Check that the trials of the finished study are in the database as they were."""
    expected = EXPECTED["finished"]
    study = open_readonly(f"sqlite:///{place / 'finished' / 'study.db'}", "finished")
    try:
        views = study.trials()[: len(expected["states"])]
    finally:
        study.close()
    assert [view.state for view in views] == expected["states"]
    for view, value, reason, rows in zip(
        views, expected["values"], expected["reasons"], expected["intermediate"], strict=True
    ):
        assert view.state != "COMPLETE" or view.value == value
        assert reason is None or reason in view.user_attrs["reason"]
        # The study learns of the best value so far.
        best_so_far = [min(value for _, value in rows[: i + 1]) for i in range(len(rows))]
        assert list(view.intermediate.values()) == best_so_far


def same_weights(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Return whether two checkpoints hold the same tensors under the same names."""
    weights = one["weights"], other["weights"]
    return weights[0].keys() == weights[1].keys() and all(
        bool((weights[0][name] == weights[1][name]).all()) for name in weights[0]
    )


def check_same_choices(before: Path, after: Path) -> None:
    """Check that an exported file says what the one of then says; it may say more."""

    def check(old: Any, new: Any, key: str) -> None:
        if not isinstance(old, dict):
            assert new == old, key
            return
        for name, value in old.items():
            check(value, new.get(name), f"{key}.{name}")

    check(yaml.safe_load(before.read_text()), yaml.safe_load(after.read_text()), "exported")


@pytest.mark.timeout(900)
def test_an_exported_checkpoint_gives_its_score_by_the_commands_of_then(place: Path) -> None:
    predict, decode, score, _ = (shlex.split(text)[1:] for text in EXPECTED["exported"]["commands"])
    command(place, ["check", "exported/best.yaml", "--json"])
    command(place, [*predict, "--json"])
    command(place, [*decode, "--json"])
    found = command(place, [*score, "--json"])
    wanted = EXPECTED["exported"]["score"]
    assert {key: found[key] for key in wanted} == {key: nearly(wanted[key]) for key in wanted}


@pytest.mark.timeout(900)
def test_an_interrupted_study_goes_on_where_it_was_stopped(place: Path) -> None:
    expected = EXPECTED["interrupted"]
    after = expected["after"]
    facts = command(place, expected["run"])
    assert facts["trials"] == after["trials"]
    best = facts["best"]
    for key in ("number", "params", "warm_start", "feasible"):
        assert best[key] == after["best"][key]
    for key in ("adapted_rand_error", "value"):
        assert best[key] == nearly(after["best"][key])
    folder = place / "interrupted" / "trials" / str(expected["root"])
    assert Path(facts["best_config"]) == folder / "config.yaml"
    check_history(folder / "record.json", expected)
    ended = read_record(place / "interrupted" / "trials" / "0" / "record.json")
    assert ended.value == expected["before"]["best"]["value"]
    command(place, expected["export"])
    trained = load_checkpoint(folder / "best.ckpt")
    assert same_weights(load_checkpoint(place / "again" / "interrupted.ckpt"), trained)


@pytest.mark.timeout(900)
def test_a_training_goes_on_where_it_was_stopped(place: Path) -> None:
    expected = EXPECTED["half_train"]
    after = expected["after"]
    found = command(place, expected["train"])
    for key in ("adapted_rand_error", "value"):
        assert found[key] == nearly(after[key])
    assert found["losses"]["total"] == nearly(after["total_loss"])
    for key in ("notes", "checkpoint", "record"):
        assert found[key] == after[key]
    check_history(place / "half_train" / "record.json", expected)


@pytest.mark.parametrize("study", ["finished", "interrupted"])
def test_the_dashboard_shows_the_trials_notes_and_pictures_of_then(place: Path, study: str) -> None:
    expected = EXPECTED[study]["before"]
    shown, listed = dashboard_of(place, f"sqlite:///{study}/study.db")
    assert [entry["study_name"] for entry in listed["study_summaries"]] == [study]
    states = [trial["state"].lower() for trial in shown["trials"]]
    assert {state: states.count(state) for state in expected["trials"]} == expected["trials"]
    best = shown["trials"][expected["best"]["number"]]
    assert best["values"] == [expected["best"]["value"]]
    assert "matched" in best["note"]["body"]
    assert {entry["filename"] for entry in best["artifacts"]} == {
        "contact_sheet.png", "sweep.png", "losses.png", "best.ckpt", "config.yaml",
    }  # fmt: skip
    assert f"**Best so far** trial {expected['best']['number']}" in shown["note"]["body"]


def dashboard_of(place: Path, storage: str) -> tuple[Any, Any]:
    """Start the dashboard, and return its study 1 and its list of studies."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    process = subprocess.Popen(
        [sys.executable, "-m", "hydralv_tune", "dashboard", "--storage", storage, "--port", port],
        stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, cwd=place, env=environment(),
        # Tests that a shell runs in the background inherit that Ctrl-C is ignored.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    assert process.stderr is not None
    try:
        said = ""
        while not (found := re.search(r"http://127\.0\.0\.1:\d+", said)):
            line = process.stderr.readline()
            assert line, said
            said += line
        answers = []
        for path in ("/api/studies/1", "/api/studies"):
            with urllib.request.urlopen(found.group(0) + path, timeout=60) as answer:
                answers.append(json.loads(answer.read()))
        return answers[0], answers[1]
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def test_the_witness_is_small_and_names_no_machine() -> None:
    files = [path for path in WITNESS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 2_000_000
    for path in files:
        found = re.search(rb"/(home|root|work|tmp|Users)/[^\s\"]{0,60}", path.read_bytes())
        assert found is None, (path, found)
