"""What breaks on the way, really broken: drivers, databases, Ray and machines that die."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from sqlalchemy.engine import make_url

from hydralv_tune.studies.study import Study, open_readonly

QUICK = {"heartbeat_s": 1.0, "grace_s": 8.0}


def evaluations(count: int) -> Any:
    """Return whether a driver has seen so many evaluations."""
    return lambda rows: sum(row.get("event") == "evaluation" for row in rows) >= count


def with_password(url: str, password: str) -> str:
    """Return a storage URL with a password."""
    made = make_url(url).set(password=password)
    return made.render_as_string(hide_password=False)


def check_truth(study: Study, folder_steps: dict[int, list[tuple[int, int]]], trials: int) -> None:
    """Check that exactly so many trials are finished, none twice, none left running.

    Args:
        study: After the last driver ended.
        folder_steps: (trial, step) of every step made, by root.
        trials: Finished trials wanted.
    """
    views = study.trials()
    finished = [t for t in views if t.state in ("COMPLETE", "PRUNED")]
    assert len(finished) == trials
    assert not [t for t in views if t.state == "RUNNING"]
    assert len({t.root for t in finished}) == trials
    assert len({tuple(sorted(t.params.items())) for t in finished}) == trials
    followed = [t.user_attrs["retry_of"] for t in views if "retry_of" in t.user_attrs]
    assert len(followed) == len(set(followed))
    for trial in views:
        if trial.state == "FAIL":
            assert trial.value is None
            assert trial.user_attrs["reason"]
    for steps in folder_steps.values():
        # A checkpoint may be one step ahead of the database, never behind: nothing is made twice.
        assert [step for _, step in steps] == sorted({step for _, step in steps})


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


@pytest.mark.slow
def test_postgresql_stopped_for_20_seconds_costs_no_result(fake_study: Any, postgres: Any) -> None:
    storage = postgres.new_database()
    driver = fake_study.start(
        storage=storage, trials=8, steps=6, step_s=0.5, options={"heartbeat_s": 1.0}
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
    check_truth(study, fake_study.steps(), 8)
    assert not [t for t in study.trials() if t.state == "FAIL"]
    assert not list(fake_study.folder.glob("journal-*"))
    for trial in study.trials():
        assert sorted(trial.intermediate) == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["raylet", "gcs_server"])
def test_ray_killed_under_the_driver_ends_in_order_and_goes_on(
    fake_study: Any, victim: str
) -> None:
    config = {"trials": 3, "steps": 10, "step_s": 0.5}
    driver = fake_study.start(**config)
    fake_study.until(evaluations(4))
    daemons = [
        child
        for child in psutil.Process(driver.pid).children(recursive=True)
        if victim in child.name()
    ]
    assert daemons
    daemons[0].kill()
    assert fake_study.wait(driver, 200) not in (0, 2)
    facts = fake_study.run(**config)
    check_truth(open_readonly(facts["storage"], "fake"), fake_study.steps(), 3)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_worker_killed_for_want_of_memory_is_retried_and_the_study_goes_on(
    fake_study: Any,
) -> None:
    memory = psutil.virtual_memory()
    limit = (memory.total - memory.available + 3e9) / memory.total
    config = {"trials": 3, "steps": 4, "step_s": 0.2, "ends": {"1": "hog"}}
    environment = {"RAY_memory_usage_threshold": f"{limit:.3f}"}
    assert fake_study.wait(fake_study.start(environment, **config)) == 0, fake_study.errors()
    study = open_readonly(fake_study.said()[-1]["facts"]["storage"], "fake")
    check_truth(study, fake_study.steps(), 3)
    reasons = [t.user_attrs["reason"] for t in study.trials() if t.state == "FAIL"]
    assert any("low on memory" in reason for reason in reasons), reasons


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


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_node_of_a_cluster_dies_and_the_study_goes_on(fake_study: Any) -> None:
    """Two nodes on one machine; each worker says which one it is on by its parent."""
    fake_study.folder.mkdir(parents=True)
    script = fake_study.folder / "cluster.py"
    script.write_text(CLUSTER)
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    cluster = subprocess.Popen(
        [sys.executable, str(script)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert cluster.stdin is not None
    assert cluster.stdout is not None
    try:
        address = cluster.stdout.readline().strip()
        assert ":" in address, address
        driver = fake_study.start(
            trials=8, steps=8, step_s=0.5, options={"ray_address": address, "cpus_per_trial": 1},
            environment={"RAY_AUTH_MODE": "disabled"},
        )  # fmt: skip
        fake_study.until(evaluations(6), timeout_s=240)
        study = open_readonly(f"sqlite:///{fake_study.folder / 'study.db'}", "fake")
        running = [row["number"] for row in fake_study.said() if row["event"] == "trial_started"]
        assert len(running) >= 2, "only one trial ran at a time on two nodes of one core"
        cluster.stdin.write("kill\n")
        cluster.stdin.flush()
        assert cluster.stdout.readline().strip() == "killed"
        assert fake_study.wait(driver, 400) == 0, fake_study.errors()
        check_truth(study, fake_study.steps(), 8)
        assert len({t.user_attrs["node"] for t in study.trials() if "node" in t.user_attrs}) == 2
        dead = [t for t in study.trials() if t.state == "FAIL"]
        assert dead
        assert all(t.user_attrs["retry"] == "counted" for t in dead)
    finally:
        cluster.stdin.close()
        cluster.wait(60)
        cluster.stdout.close()


CLUSTER = '''
"""Two Ray nodes of one core each; a line on stdin kills the second, its end ends both."""
import sys

from ray.cluster_utils import Cluster

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
second = cluster.add_node(num_cpus=1)
cluster.wait_for_nodes()
print(cluster.address, flush=True)
try:
    for line in sys.stdin:
        cluster.remove_node(second, allow_graceful=False)
        print("killed", flush=True)
finally:
    cluster.shutdown()
'''
