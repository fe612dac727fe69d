"""What hangs frees its place, what is asked to stop saves, and what was mended goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from study_checks import check_truth, evaluations

from hydralv_tune.launch.coordinator import MAX_CONSECUTIVE_FAILURES
from hydralv_tune.launch.ray_adapters import STOP_ANSWER_S
from hydralv_tune.study.study import open_readonly

HANGS_ONCE = """
# Lets the process of one trial hang for ever as it imports. That of the stop flag imports the same
# module, but not to read the handle of an actor.
import os, sys, time, traceback

class Hangs:
    def find_spec(self, name, path=None, target=None):
        if name == "hydralv_tune.launch.worker":
            names = {frame.name for frame in traceback.extract_stack()}
            if "_deserialization_helper" not in names:
                return None
            try:
                os.close(os.open(os.environ["HANGS_ONCE"], os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                return None
            time.sleep(3600)
        return None

if "default_worker.py" in " ".join(sys.orig_argv):
    sys.meta_path.insert(0, Hangs())
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_worker_that_hangs_as_it_imports_frees_its_place(fake_study: Any, tmp_path: Path) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(HANGS_ONCE)
    paths = [str(tmp_path / "site"), os.environ.get("PYTHONPATH", "")]
    environment = {"PYTHONPATH": ":".join(paths), "HANGS_ONCE": str(tmp_path / "hung")}
    config = {
        "trials": 3, "steps": 3, "least_start_s": 20.0,
        "space": {"budget": {"trial_timeout_s": 20.0}},
    }  # fmt: skip
    assert fake_study.wait(fake_study.start(environment, **config)) == 0, fake_study.errors()
    assert (tmp_path / "hung").exists()
    study = open_readonly(fake_study.said()[-1]["facts"]["storage"], "fake")
    check_truth(study, fake_study.steps(), 3)
    trials = study.trials()
    hung = [t for t in trials if t.state == "FAIL"]  # on a busy machine another may be late too
    assert hung
    assert all("its process had not started after" in t.user_attrs["reason"] for t in hung)
    assert all([t for t in trials if t.root == one.root][-1].state == "COMPLETE" for one in hung)


@pytest.mark.slow
def test_workers_are_still_told_to_stop_after_the_flag_did_not_answer(fake_study: Any) -> None:
    # Killed unsaved, they would be so only after a minute and more.
    config = {"trials": 2, "steps": 400, "step_s": 0.4, "options": {"save_s": 90.0}}
    driver = fake_study.start(**config)
    fake_study.until(evaluations(2))
    (flag,) = [
        child
        for child in psutil.Process(driver.pid).children(recursive=True)
        if "StopFlag" in " ".join(child.cmdline())
    ]
    flag.send_signal(signal.SIGSTOP)
    time.sleep(STOP_ANSWER_S + 5.0)
    flag.send_signal(signal.SIGCONT)
    driver.send_signal(signal.SIGTERM)
    asked = time.monotonic()
    assert fake_study.wait(driver, 200) == 130
    assert time.monotonic() - asked < 60.0, "the workers were not told, but killed"
    assert fake_study.said()[-1]["facts"]["trials"]["waiting"] == 2


@pytest.mark.slow
def test_a_mended_study_outlives_its_next_failure(fake_study: Any) -> None:
    failing = {"trials": 3, "steps": 3, "rates": {"error": 1.0}}
    driver = fake_study.start(**failing)
    assert fake_study.wait(driver) == 1, fake_study.errors()
    assert "trials in a row failed" in fake_study.said()[-1]["failed"]
    before = open_readonly(f"sqlite:///{fake_study.folder / 'study.db'}", "fake").trials()
    failed = sum(t.state == "FAIL" and t.user_attrs["retry"] == "no" for t in before)
    assert failed >= MAX_CONSECUTIVE_FAILURES
    # Mended, but for the next trials: whichever of them is first.
    ends = {str(len(before) + more): "error" for more in range(2)}
    ends |= {str(t.root): "error" for t in before if t.state == "WAITING"}
    facts = fake_study.run(trials=3, steps=3, ends=ends)
    assert facts["trials"]["complete"] == 3
    assert facts["trials"]["fail"] > len([t for t in before if t.state == "FAIL"])


FLAGS = '''
"""Six flags on a cluster of two nodes: prints this process's node and theirs."""
import json
import sys

import ray
from ray.cluster_utils import Cluster

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
cluster.add_node(num_cpus=1)
cluster.wait_for_nodes()
ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
try:
    from hydralv_tune.launch.ray_adapters import make_flag

    flags = [make_flag() for _ in range(6)]
    assert not any(ray.get([flag.is_raised.remote() for flag in flags]))
    homes = [row["Address"]["NodeID"] for row in ray._private.state.actors().values()]
    print(json.dumps({"here": ray.get_runtime_context().get_node_id(), "flags": homes}))
finally:
    ray.shutdown()
    cluster.shutdown()
'''


@pytest.mark.slow
def test_the_stop_flag_stays_on_the_driver_s_node(tmp_path: Path) -> None:
    """Else the death of any node could take it, and the workers of all others were killed."""
    (tmp_path / "flags.py").write_text(FLAGS)
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    done = subprocess.run(
        [sys.executable, str(tmp_path / "flags.py")],
        capture_output=True, text=True, env=environment, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    where = json.loads(done.stdout.splitlines()[-1])
    assert where["flags"] == [where["here"]] * 6
