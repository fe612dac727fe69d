"""Trials share the devices that they asked to share, and no others.

Ray counts the devices of a node, so four GPUs can be had where there is none.
"""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from ray_cluster import ENVIRONMENT, ray_cluster
from study_checks import check_truth

from hydralv_tune.study.study import open_readonly

GPUS = 4


def stays(folder: Any) -> list[tuple[float, float, list[str]]]:
    """Return when each trial that ended began and ended, and which devices it saw."""
    rows = [json.loads(path.read_text()) for path in folder.glob("trials/*/devices.json")]
    return [(begun, ended, devices.split(",")) for begun, ended, devices in rows]


def most_at_once(rows: list[tuple[float, float, list[str]]], device: str) -> int:
    """Return how many trials were on a device at the same time."""
    here = [(begun, ended) for begun, ended, devices in rows if device in devices]
    return max((sum(b <= at < e for b, e in here) for at, _ in here), default=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("share", "trials"),
    [(0.5, 10), (1.0, 6), (2.0, 4), (0.25, 16)],
)  # fmt: skip
@pytest.mark.timeout(600)
def test_a_device_has_as_many_trials_as_fit(fake_study: Any, share: float, trials: int) -> None:
    with ray_cluster({"num_cpus": 16, "num_gpus": GPUS}) as (address, _):
        driver = fake_study.start(
            trials=trials, steps=3, step_s=0.5, environment=ENVIRONMENT,
            options={"ray_address": address, "cpus_per_trial": 1, "gpus_per_trial": share},
        )  # fmt: skip
        assert fake_study.wait(driver, 400) == 0, fake_study.errors()
    check_truth(open_readonly(fake_study.said()[-1]["facts"]["storage"], "fake"),
                fake_study.steps(), trials)  # fmt: skip
    rows = stays(fake_study.folder)
    assert len(rows) == trials
    seen = {device for _, _, devices in rows for device in devices}
    assert seen <= {str(number) for number in range(GPUS)}
    assert {len(devices) for _, _, devices in rows} == {math.ceil(share)}
    assert max(most_at_once(rows, device) for device in seen) <= max(1, round(1 / share))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_studies_on_one_cluster_share_no_device_that_is_taken(
    fake_study: Any, tmp_path: Any
) -> None:
    """Four GPUs on two nodes, one of which dies; both studies end with all their trials."""
    nodes = [{"num_cpus": 8, "num_gpus": 2}] * 2
    with ray_cluster(*nodes) as (address, kill_last):
        options = {"ray_address": address, "cpus_per_trial": 1, "gpus_per_trial": 1.0}
        drivers = [
            fake_study.start(
                trials=6, steps=8, step_s=1.0, environment=ENVIRONMENT, options=options,
                storage=f"sqlite:///{tmp_path / name}.db", out=str(tmp_path / name),
            )
            for name in ("one", "two")
        ]  # fmt: skip
        for index in range(2):
            fake_study.until(lambda rows: any(r.get("event") == "evaluation" for r in rows), index)
        kill_last()
        for driver in drivers:
            assert fake_study.wait(driver, 400) == 0, fake_study.errors()
    for name in ("one", "two"):
        study = open_readonly(f"sqlite:///{tmp_path / name}.db", "fake")
        assert sum(trial.state == "COMPLETE" for trial in study.trials()) == 6
