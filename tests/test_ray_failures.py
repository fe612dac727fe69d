"""What breaks under a study, really broken: Ray's daemons, a machine's memory, a whole node."""

from __future__ import annotations

from typing import Any

import psutil
import pytest
from ray_cluster import ENVIRONMENT, ray_cluster
from study_checks import check_truth, evaluations

from hydralv_tune.study.study import open_readonly


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


@pytest.mark.timeout(600)
def test_a_worker_killed_for_want_of_memory_is_retried_and_the_study_goes_on(
    fake_study: Any,
) -> None:
    memory = psutil.virtual_memory()
    limit = (memory.total - memory.available + 4e9) / memory.total
    config = {"trials": 3, "steps": 4, "step_s": 0.2, "ends": {"1": "hog"}}
    environment = {"RAY_memory_usage_threshold": f"{limit:.3f}"}
    assert fake_study.wait(fake_study.start(environment, **config)) == 0, fake_study.errors()
    study = open_readonly(fake_study.said()[-1]["facts"]["storage"], "fake")
    check_truth(study, fake_study.steps(), 3)
    reasons = [t.user_attrs["reason"] for t in study.trials() if t.state == "FAIL"]
    assert any("low on memory" in reason for reason in reasons), reasons


def two_at_work(rows: list[dict[str, Any]]) -> bool:
    """Return whether two trials that have not ended were evaluated."""
    evaluated = {row["number"] for row in rows if row.get("event") == "evaluation"}
    return len(evaluated - {r["number"] for r in rows if r.get("event") == "trial_finished"}) >= 2


@pytest.mark.timeout(900)
def test_a_node_of_a_cluster_dies_and_the_study_goes_on(fake_study: Any) -> None:
    """Two nodes on one machine; each worker says which one it is on by its parent."""
    with ray_cluster({"num_cpus": 1}, {"num_cpus": 1}) as (address, kill_last):
        driver = fake_study.start(
            trials=2, steps=40, step_s=0.5, options={"ray_address": address, "cpus_per_trial": 1},
            environment=ENVIRONMENT,
        )  # fmt: skip
        # One core a node: two at work at once are on both.
        fake_study.until(two_at_work, timeout_s=240)
        study = open_readonly(f"sqlite:///{fake_study.folder / 'study.db'}", "fake")
        kill_last()
        assert fake_study.wait(driver, 400) == 0, fake_study.errors()
        check_truth(study, fake_study.steps(), 2)
        assert len({t.user_attrs["node"] for t in study.trials() if "node" in t.user_attrs}) == 2
        dead = [t for t in study.trials() if t.state == "FAIL"]
        assert dead
        assert all(t.user_attrs["retry"] == "counted" for t in dead)
