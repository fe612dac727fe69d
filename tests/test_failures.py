"""What breaks on the way, really broken: drivers and databases that die."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from study_checks import check_truth, evaluations, with_password

from hydralv_tune.study.study import open_readonly

QUICK = {"heartbeat_s": 1.0, "grace_s": 8.0}


def test_a_driver_killed_in_the_middle_is_taken_up_by_the_next(fake_study: Any) -> None:
    config = {"trials": 2, "steps": 8, "step_s": 0.3}
    driver = fake_study.start(**config)
    fake_study.until(evaluations(5))
    driver.kill()
    driver.wait(30)
    facts = fake_study.run(**config)
    study = open_readonly(facts["storage"], "fake")
    check_truth(study, fake_study.steps(), 2)
    orphans = [t for t in study.trials() if t.state == "FAIL"]
    assert orphans
    assert all("process is gone" in trial.user_attrs["reason"] for trial in orphans)
    assert {t.user_attrs["retry_of"] for t in study.trials() if "retry_of" in t.user_attrs} == {
        trial.number for trial in orphans
    }


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_drivers_killed_at_random_lose_nothing(fake_study: Any) -> None:
    chance = random.Random(5)
    config = {"trials": 12, "steps": 10, "step_s": 0.6}
    kills = 0
    while kills < 10:
        driver = fake_study.start(**config)
        # Now before Ray is up, mostly in the middle of trials, asks and tells.
        if chance.random() < 0.8:
            while not fake_study.said() and driver.poll() is None:
                time.sleep(0.05)
        deadline = time.monotonic() + chance.uniform(0.1, 9.0)
        while time.monotonic() < deadline and driver.poll() is None:
            time.sleep(0.02)
        if driver.poll() is not None:
            assert driver.returncode == 0, fake_study.errors()
            config["trials"] += 4  # it was faster than the killer
            continue
        driver.kill()
        driver.wait(30)
        kills += 1
    facts = fake_study.run(timeout_s=600, **config)
    check_truth(open_readonly(facts["storage"], "fake"), fake_study.steps(), config["trials"])


def test_postgresql_stopped_for_20_seconds_costs_no_result(fake_study: Any, postgres: Any) -> None:
    storage = postgres.new_database()
    driver = fake_study.start(
        storage=storage, trials=4, steps=6, step_s=0.5, options={"heartbeat_s": 1.0}
    )
    fake_study.until(evaluations(4))
    before = len(fake_study.said())
    postgres.stop()
    try:
        time.sleep(20)
    finally:
        postgres.start()
    assert driver.poll() is None, fake_study.errors()
    during = fake_study.said()[before:]
    assert fake_study.wait(driver, 240) == 0, fake_study.errors()
    rows = fake_study.said()
    assert any(row.get("event") == "waiting" for row in rows)
    assert any(row.get("kept") for row in during), "no result came while the database was away"
    study = open_readonly(storage, "fake")
    check_truth(study, fake_study.steps(), 4)
    assert not [t for t in study.trials() if t.state == "FAIL"]
    assert not list(fake_study.folder.glob("journal-*"))
    for trial in study.trials():
        assert sorted(trial.intermediate) == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_drivers_share_a_study_and_one_takes_over_from_the_other(
    fake_study: Any, postgres: Any
) -> None:
    # The server trusts everybody; the password is there to be looked for afterwards.
    storage = with_password(postgres.new_database(), "s3cr3t")
    config = {
        "storage": storage, "trials": 14, "steps": 6, "step_s": 0.5,
        "options": {**QUICK, "cpus_per_trial": 1},
    }  # fmt: skip
    first = fake_study.start(**config)
    second = fake_study.start(**config)
    for index in (0, 1):
        fake_study.until(evaluations(4), index)
    first.kill()
    first.wait(30)
    assert fake_study.wait(second, 400) == 0, fake_study.errors()
    study = open_readonly(storage, "fake")
    check_truth(study, fake_study.steps(), 14)
    drivers = {t.user_attrs["owner"]["pid"] for t in study.trials() if t.state == "COMPLETE"}
    assert second.pid in drivers
    orphans = [t for t in study.trials() if t.state == "FAIL" and "owner" in t.user_attrs]
    assert orphans
    assert {t.user_attrs["owner"]["pid"] for t in orphans} == {first.pid}
    for process in (first, second):
        for path in Path("/tmp/ray").glob(f"session_*_{process.pid}/logs/*"):
            assert not path.is_file() or b"s3cr3t" not in path.read_bytes(), path
    written = [p for p in fake_study.folder.rglob("*") if p.is_file() and p.suffix != ".json"]
    assert written
    assert not [path for path in written if b"s3cr3t" in path.read_bytes()]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_late_results_of_a_driver_that_was_stopped_are_refused(
    fake_study: Any, postgres: Any
) -> None:
    storage = postgres.new_database()
    config = {
        "storage": storage, "trials": 10, "steps": 6, "step_s": 0.5, "options": dict(QUICK),
    }  # fmt: skip
    first = fake_study.start(**config)
    second = fake_study.start(**config)
    for index in (0, 1):
        fake_study.until(evaluations(2), index)
    first.send_signal(signal.SIGSTOP)
    study = open_readonly(storage, "fake")
    deadline = time.monotonic() + 120
    while not [t for t in study.trials() if "no sign of life" in t.user_attrs.get("reason", "")]:
        assert time.monotonic() < deadline, "the stopped driver was never taken over"
        time.sleep(0.5)
    first.send_signal(signal.SIGCONT)
    codes = {fake_study.wait(first, 300), fake_study.wait(second, 300)}
    assert codes == {0}, (fake_study.errors(0), fake_study.errors(1))
    refused = [r for r in fake_study.said(0) if "refused" in str(r.get("reason"))]
    assert refused
    views = {trial.number: trial for trial in study.trials()}
    assert all(views[row["number"]].state == "FAIL" for row in refused)
    check_truth(study, fake_study.steps(), 10)
