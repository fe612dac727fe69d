"""A study on Ray: every end is told as it was; budgets, signals and resources are kept."""

from __future__ import annotations

import json
import math
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import numpy as np
import psutil
import pytest
from commands_in_a_process import environment
from study_checks import check_truth, evaluations

from hydralv_tune.artifacts.records import plain
from hydralv_tune.cli.live_view import event_line
from hydralv_tune.config.errors import (
    ConfigError,
    InputError,
    TrialFailed,
    TrialInterrupted,
    TrialTakenOver,
    VolumeError,
)
from hydralv_tune.config.search_space import space_from_mapping
from hydralv_tune.data.volumes import VolumePaths, read_volume, write_array
from hydralv_tune.launch.cluster import Resources, check_before_ray
from hydralv_tune.launch.coordinator import (
    MAX_CONSECUTIVE_FAILURES,
    Coordinator,
    Event,
    StudyFailed,
)
from hydralv_tune.launch.live_trial import LEAST_START_S
from hydralv_tune.launch.ray_private import PRIVATE_NAMES
from hydralv_tune.launch.run import _specification, open_volumes
from hydralv_tune.launch.trial_folder import FolderClaim, folder_owner
from hydralv_tune.launch.worker import failure, run_worker
from hydralv_tune.numerics.phantom.volume import make_phantom
from hydralv_tune.study.driver import Driver
from hydralv_tune.study.study import Study, open_readonly
from hydralv_tune.study.trial_views import Asked
from hydralv_tune.trial.training.lazy_reader import is_lazy

FIGURES = {"adapted_rand_error": 0.2, "adapted_rand_error_foreground": 0.3, "f1_iou50": 0.8}


def test_one_study_tells_every_end_as_it_was(fake_study: Any) -> None:
    facts = fake_study.run(
        trials=6,
        steps=4,
        # The retry of trial 1 takes a number too; which one depends on when its worker dies.
        ends={"0": "nan", "1": "crash", "2": "hang", "3": "error", "4": "infeasible", "5": "error",
              "6": "infeasible", "7": "bad", "8": "bad"},
        space={
            "pruner": {"name": "median", "warmup_evaluations": 2, "startup_trials": 2,
                       "patience": 0},
            "budget": {"trial_timeout_s": 15},
        },
        # A study that is taught prunes nothing before it has twelve complete trials.
        options={"learn_from": ["none"]},
    )  # fmt: skip
    study = open_readonly(facts["storage"], "fake")
    trials = {trial.number: trial for trial in study.trials()}
    by_root = {trial.root: trial for trial in trials.values()}  # the last attempt of each
    counts = facts["trials"]
    assert counts["complete"] + counts["pruned"] == 6
    assert counts["running"] == 0
    wrong = [root for root in (3, 5) if root in by_root]
    assert wrong
    expected = {
        0: "objective is nan",
        2: "timeout",
        **dict.fromkeys(wrong, "a value that cannot work"),
    }
    for root, words in expected.items():
        assert by_root[root].state == "FAIL"
        assert words in by_root[root].user_attrs["reason"]
        assert by_root[root].value is None
    assert trials[1].state == "FAIL"
    assert "process died" in trials[1].user_attrs["reason"]
    assert by_root[1].attempt == 2
    assert by_root[1].state == "COMPLETE"
    # The retry went on from the checkpoint: each step was made once, the last one by the retry.
    assert [step for _, step in fake_study.steps()[1]] == [1, 2, 3, 4]
    assert fake_study.steps()[1][-1][0] == by_root[1].number
    assert sorted(by_root[1].intermediate) == [1, 3, 4]
    complete = [trial for trial in trials.values() if trial.state == "COMPLETE"]
    assert any(trial.state == "PRUNED" for trial in trials.values())
    for trial in trials.values():
        for key in ("driver", "host", "seconds", "gpus", "owner"):
            assert key in trial.user_attrs, (trial.number, key)
        if trial.state == "PRUNED":
            assert trial.value == trial.intermediate[max(trial.intermediate)]
    infeasible = [trial for trial in complete if not trial.is_feasible]
    assert {trial.root for trial in infeasible} <= {4, 6}
    assert infeasible
    assert facts["best"]["feasible"]
    assert facts["best"]["adapted_rand_error"] == min(t.value for t in complete if t.is_feasible)
    # stdout holds the caller's lines alone, whatever Ray has to say.
    lines = (fake_study.folder / "driver-0.out").read_text().splitlines()
    assert all(isinstance(json.loads(line), dict) for line in lines)
    kinds = {row.get("event") for row in fake_study.said()}
    assert {"trial_started", "evaluation", "trial_finished", "trial_pruned", "trial_failed",
            "retry"} <= kinds  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_saves_and_the_same_command_goes_on(
    fake_study: Any, number: signal.Signals
) -> None:
    config = {"trials": 2, "steps": 8, "step_s": 0.4}
    driver = fake_study.start(**config)
    fake_study.until(evaluations(4))
    driver.send_signal(number)
    assert fake_study.wait(driver, 120) == 130
    facts = fake_study.said()[-1]["facts"]
    assert facts["trials"]["running"] == 0
    assert facts["trials"]["complete"] == 0
    assert facts["trials"]["waiting"] == facts["trials"]["fail"] == 2
    if number == signal.SIGHUP:
        return  # what follows is the same
    facts = fake_study.run(**config)
    assert facts["trials"] == {"complete": 2, "pruned": 0, "fail": 2, "running": 0, "waiting": 0}
    study = open_readonly(facts["storage"], "fake")
    assert all(trial.attempt == 1 for trial in study.trials())
    assert all("SIGTERM" in t.user_attrs["reason"] for t in study.trials() if t.state == "FAIL")
    for steps in fake_study.steps().values():
        assert [step for _, step in steps] == list(range(1, 9))


@pytest.mark.slow
def test_scancel_ends_every_process_at_once_and_is_an_interruption(fake_study: Any) -> None:
    """SLURM sends SIGTERM to all processes of a job: driver, Ray's daemons and workers."""
    config = {"trials": 2, "steps": 8, "step_s": 0.4}
    driver = fake_study.start(**config)
    fake_study.until(evaluations(4))
    family = [psutil.Process(driver.pid)]
    family += family[0].children(recursive=True)
    assert any("raylet" in process.name() for process in family)
    for process in family:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGTERM)
    assert fake_study.wait(driver, 120) == 130, fake_study.errors()
    assert "Ray" not in fake_study.errors()
    facts = fake_study.run(**config)
    study = open_readonly(facts["storage"], "fake")
    check_truth(study, fake_study.steps(), 2)
    assert all(trial.attempt == 1 for trial in study.trials()), "an interruption is no fault"


class TwoNodes:
    """A cluster of two nodes as Ray describes it, and a third that died."""

    @staticmethod
    def nodes() -> list[dict[str, Any]]:
        """Return what each node has."""
        return [
            {"Alive": True, "Resources": {"CPU": 8.0, "GPU": 2.0}},
            {"Alive": True, "Resources": {"CPU": 3.0}},
            {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}},
        ]

    @staticmethod
    def cluster_resources() -> dict[str, float]:
        """Return what the living nodes have together."""
        return {"CPU": 11.0, "GPU": 2.0}


@pytest.mark.parametrize(
    ("gpus", "cpus", "slots", "takes"),
    [
        (None, None, 2, (1.0, 4)),  # a GPU each, and the cores of its node divided
        (0.5, 1, 4, (0.5, 1)),
        (0.0, 2, 5, (0.0, 2)),  # four on the first node, one on the second
        (0.0, None, 11, (0.0, 1)),
    ],
)
def test_as_many_trials_run_at_once_as_fit_into_living_nodes(
    monkeypatch: pytest.MonkeyPatch,
    gpus: float | None,
    cpus: int | None,
    slots: int,
    takes: tuple[float, int],
) -> None:
    monkeypatch.setattr("hydralv_tune.launch.cluster.ray", TwoNodes)
    resources = Resources(gpus, cpus)
    assert (resources.gpus, resources.cpus) == takes
    assert resources.slots() == slots


def test_a_cluster_too_small_for_a_trial_is_wrong_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hydralv_tune.launch.cluster.ray", TwoNodes)
    with pytest.raises(InputError, match="99 GPUs"):
        Resources(99.0, 1)


def test_what_listens_but_is_not_ray_is_wrong_input() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

        def answer() -> None:
            with server.accept()[0] as connection:
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(InputError, match="is not Ray"):
            check_before_ray(f"ray://127.0.0.1:{port}", None, None)
        thread.join()


class Rig:
    """A coordinator on a real study in SQLite, and what it has said."""

    def __init__(self, folder: Path, space: Mapping[str, Any], **options: Any) -> None:
        self.events: list[Event] = []
        mapping = {
            "name": "s",
            "base": "start",
            "recipes": {"start": {}},
            "parameters": {"optimization.optimizer.lr": {"float": [1e-5, 1e-1], "log": True}},
            "pruner": {"name": "none"},
            **space,
        }
        study = Study.open(
            f"sqlite:///{folder / 's.db'}", "s", space=space_from_mapping(mapping), create=True
        )
        self.driver = Driver(study, out=folder)
        self.driver.__enter__()
        settings: dict[str, Any] = {
            "trials": 50,
            "specification": lambda asked: {"number": asked.number},
            "slots": lambda: 2,
            "gpus_per_trial": 0.0,
            "timeout_s": None,
            "save_s": 30.0,
            "on_event": self.events.append,
            "on_trial_end": None,
        }
        self.coordinator = Coordinator(self.driver, **{**settings, **options})

    def kinds(self) -> list[str]:
        """Return what kinds of events there were."""
        return [event.kind for event in self.events]

    def finish(self, key: str, **figures: float) -> None:
        """Let a trial come to its end."""
        record = {"metrics": {**FIGURES, **figures}, "checkpoint": "c", "config": {"big": 1}}
        self.coordinator.on_message(key, {"kind": "final", "record": record})


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Any]:
    """Return what makes a rig."""
    rigs: list[Rig] = []

    def make(space: Mapping[str, Any] | None = None, **options: Any) -> Rig:
        rigs.append(Rig(tmp_path, space or {}, **options))
        return rigs[-1]

    yield make
    for one in rigs:
        one.driver.__exit__()
        one.driver.study.close()


def test_no_more_trials_are_live_than_fit(rig: Any) -> None:
    coordinator = rig().coordinator
    assert isinstance(coordinator.suggest("a"), dict)
    assert isinstance(coordinator.suggest("b"), dict)
    assert coordinator.suggest("c") == "wait"


def test_the_goal_ends_a_study_and_what_runs_is_enqueued_again(rig: Any) -> None:
    one = rig({"objective": {"stop_at": 0.1}})
    coordinator = one.coordinator
    coordinator.suggest("a")
    coordinator.suggest("b")
    one.finish("a", adapted_rand_error=0.05, f1_iou50=0.2)  # under the goal, but blobs
    assert isinstance(coordinator.suggest("c"), dict)
    one.finish("c", adapted_rand_error=0.05)
    assert coordinator.suggest("d") == "done"
    assert "reached the goal" in one.events[-1].fields["reason"]
    coordinator.on_message("b", {"kind": "interrupted"})
    assert one.driver.study.facts()["trials"] == {
        "complete": 2, "pruned": 0, "fail": 1, "running": 0, "waiting": 1,
    }  # fmt: skip


def test_a_search_with_nothing_to_gain_ends_and_what_runs_goes_on(
    rig: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hydralv_tune.study.ending.FEWEST", 20)
    one = rig({"budget": {"stop_when": "no_gain"}})
    for number in range(20):
        assert isinstance(one.coordinator.suggest(str(number)), dict)
        if number == 0:
            assert isinstance(one.coordinator.suggest("late"), dict)
        metrics = {**FIGURES, "adapted_rand_error": 0.2 + number / 1000}
        record = {"metrics": metrics, "noise": 0.1, "checkpoint": "c"}
        one.coordinator.on_message(str(number), {"kind": "final", "record": record})
    assert one.coordinator.suggest("more") == "done"
    assert one.coordinator.search_is_over
    assert "is expected to gain less than the noise" in one.events[-1].fields["reason"]
    assert one.coordinator.tick() == []
    one.finish("late")
    assert one.driver.study.facts()["trials"]["complete"] == 21
    assert one.kinds().count("stopped") == 1


def test_gpu_hours_end_a_study(rig: Any) -> None:
    one = rig({"budget": {"gpu_hours": 1e-9}}, gpus_per_trial=1.0)
    one.coordinator.suggest("a")
    one.coordinator.started("a")
    one.coordinator.live["a"].placed -= 10.0
    one.finish("a")
    assert one.coordinator.suggest("b") == "done"
    assert "GPU-hours" in one.events[-1].fields["reason"]


def test_wall_clock_ends_a_run(rig: Any) -> None:
    one = rig(timeout_s=1e-6, save_s=0.0)
    one.coordinator.suggest("a")
    one.coordinator.started("a")
    assert one.coordinator.tick() == []
    assert one.coordinator.tick() == ["a"]
    one.coordinator.on_death("a", "killed")
    assert one.coordinator.suggest("b") == "done"
    trials = one.driver.study.trials()
    assert [t.state for t in trials] == ["FAIL", "WAITING"]
    assert "the time of this run is over" in trials[0].user_attrs["reason"]


def test_a_hang_is_failed_and_not_tried_again(rig: Any) -> None:
    one = rig({"budget": {"trial_timeout_s": 5.0}})
    one.coordinator.suggest("a")
    one.coordinator.started("a")
    assert one.coordinator.tick() == []
    one.coordinator.live["a"].started -= 6.0  # it may be scoring what it has
    assert one.coordinator.tick() == []
    one.coordinator.live["a"].started -= 2.0
    assert one.coordinator.tick() == ["a"]
    one.coordinator.on_death("a", "killed")
    (trial,) = one.driver.study.trials()
    assert (trial.state, trial.user_attrs["retry"]) == ("FAIL", "no")
    assert "timeout" in trial.user_attrs["reason"]


def test_a_process_that_hangs_before_it_works_frees_its_place_and_is_tried_again(rig: Any) -> None:
    one = rig({"budget": {"trial_timeout_s": 5.0}})
    one.coordinator.suggest("a")
    assert (
        one.coordinator.tick() == []
    )  # it waits for a place in a busy cluster, as long as that takes
    one.coordinator.placed("a")
    one.coordinator.live["a"].placed -= LEAST_START_S - 60.0  # PyTorch comes from a slow disk
    assert one.coordinator.tick() == []
    one.coordinator.live["a"].placed -= 61.0
    assert one.coordinator.tick() == ["a"]
    one.coordinator.on_death("a", "killed")
    first, second = one.driver.study.trials()
    assert (first.state, first.user_attrs["retry"]) == ("FAIL", "counted")
    assert re.search(r"not started after 30\d s", first.user_attrs["reason"])
    assert first.user_attrs["seconds"] > 300
    assert (second.state, second.attempt) == ("WAITING", 2)


def test_what_was_never_to_time_out_may_take_as_long_as_it_likes(rig: Any) -> None:
    one = rig()
    one.coordinator.suggest("a")
    one.coordinator.placed("a")
    one.coordinator.live["a"].placed -= 1e6
    assert one.coordinator.tick() == []


def test_a_space_with_nothing_left_to_try_says_so(rig: Any) -> None:
    lr = {"optimization.optimizer.lr": {"choice": [1e-3, 1e-2]}}
    one = rig({"parameters": lr}, trials=20)
    for key in "ab":
        assert isinstance(one.coordinator.suggest(key), dict)
        one.finish(key)
        one.coordinator._next_ask = 0.0
    assert one.coordinator.suggest("c") == "done"
    assert one.events[-1].kind == "stopped"
    reason = "the space has no more combinations: 2 of 20 trials"
    assert one.events[-1].fields["reason"] == reason
    assert event_line(one.events[-1]) == f"stopped: {reason}"


def test_a_study_that_reaches_its_number_has_nothing_to_explain(rig: Any) -> None:
    one = rig(trials=1)
    one.coordinator.suggest("a")
    one.finish("a")
    assert one.coordinator.suggest("b") == "done"
    assert "stopped" not in one.kinds()


def test_a_study_in_which_everything_fails_ends_with_the_reason(rig: Any) -> None:
    def specification(asked: Any) -> dict[str, Any]:
        raise ConfigError("model.filters: too many")

    coordinator = rig(specification=specification).coordinator
    for index in range(100):
        if coordinator.suggest(str(index)) == "done":
            break
    assert isinstance(coordinator.failure, StudyFailed)
    assert "too many" in str(coordinator.failure)
    assert index == MAX_CONSECUTIVE_FAILURES


def test_failures_in_a_row_are_those_of_this_run(rig: Any) -> None:
    def fail(one: Rig, count: int) -> None:
        for index in range(count):
            one.coordinator.suggest(str(index))
            message = {"reason": "wrong", "retry": "no"}
            one.coordinator.on_message(str(index), {"kind": "failed", **message})

    before = rig()
    fail(before, MAX_CONSECUTIVE_FAILURES)
    assert before.coordinator.failure is not None
    mended = rig()
    fail(mended, MAX_CONSECUTIVE_FAILURES - 1)
    assert mended.coordinator.failure is None
    mended.coordinator.suggest("good")
    mended.finish("good")
    fail(mended, MAX_CONSECUTIVE_FAILURES - 1)
    assert mended.coordinator.failure is None
    fail(mended, 1)
    assert "12 trials in a row failed, the last one with: wrong" in str(mended.coordinator.failure)


def test_an_objective_that_is_no_number_is_a_fail_and_no_score(rig: Any) -> None:
    one = rig()
    one.coordinator.suggest("a")
    one.finish("a", adapted_rand_error=float("nan"))
    one.coordinator.suggest("b")
    one.coordinator.on_message("b", {"kind": "final", "record": {"metrics": {}}})
    assert [(t.state, t.value) for t in one.driver.study.trials()] == [("FAIL", None)] * 2


def test_the_hook_sees_each_end_before_it_is_told_and_cannot_cost_it(rig: Any) -> None:
    seen: list[Any] = []

    def hook(driver: Driver, number: int, state: str, attributes: Mapping[str, Any]) -> None:
        seen.append((number, state, attributes["metrics"]["f1_iou50"]))
        driver.study.write_note(number, "a note")
        raise RuntimeError("the picture cannot be drawn")

    one = rig(on_trial_end=hook)
    one.coordinator.suggest("a")
    with pytest.warns(UserWarning, match="cannot be drawn"):
        one.finish("a")
    assert seen == [(0, "COMPLETE", 0.8)]
    (frozen,) = one.driver.study.frozen()
    # The dashboard keeps the notes of trials with the study.
    assert "a note" in json.dumps(one.driver.study.rdb.get_study_system_attrs(1))
    assert frozen.state.name == "COMPLETE"
    assert "config" not in frozen.user_attrs


def worker(
    folder: Path, function: Any, *, number: int = 3, stop: bool = False, answer: Any = None
) -> list[dict[str, Any]]:
    """Run a worker here and return what it sends; `answer` is called with each message."""
    sent: list[dict[str, Any]] = []

    def send(message: dict[str, Any]) -> None:
        sent.append(message)
        if answer is not None:
            answer(message)

    spec = {"out": str(folder), "number": number}
    run_worker(spec, send=send, should_stop=lambda: stop, function=function)
    return sent


def evaluation(value: float) -> dict[str, Any]:
    """Return an evaluation of a value."""
    return {"step": 1, "value": value, "metrics": FIGURES}


def test_a_worker_says_how_it_started_went_and_ended(tmp_path: Path) -> None:
    def function(spec: dict[str, Any], report: Any) -> dict[str, Any]:
        report(evaluation(0.5))
        return {"metrics": FIGURES, "path": tmp_path, "nan": float("nan")}

    sent = worker(tmp_path, function)
    assert [message["kind"] for message in sent] == ["started", "evaluation", "final"]
    assert sent[-1]["record"]["path"] == str(tmp_path)
    assert sent[-1]["record"]["nan"] is None
    json.dumps(sent, allow_nan=False)
    assert folder_owner(tmp_path) == 3


def test_a_worker_stops_when_told(tmp_path: Path) -> None:
    def function(spec: dict[str, Any], report: Any) -> dict[str, Any]:
        report(evaluation(0.5))
        return {}

    assert [m["kind"] for m in worker(tmp_path, function, stop=True)] == ["started", "interrupted"]


def test_the_next_attempt_waits_until_the_one_before_has_saved(tmp_path: Path) -> None:
    order: list[str] = []
    first_works = threading.Event()

    def first(spec: dict[str, Any], report: Any) -> dict[str, Any]:
        first_works.set()
        while not report.should_stop():
            time.sleep(0.01)
        time.sleep(0.3)  # saves
        order.append("first saved")
        raise TrialInterrupted("saved")

    def second(spec: dict[str, Any], report: Any) -> dict[str, Any]:
        order.append("second began")
        return {"metrics": FIGURES}

    with ThreadPoolExecutor() as pool:
        before = pool.submit(worker, tmp_path, first, number=3)
        assert first_works.wait(10)
        after = worker(tmp_path, second, number=4)
        assert [m["kind"] for m in before.result()] == ["started", "interrupted"]
    assert [m["kind"] for m in after] == ["started", "final"]
    assert "hand_over" not in after[0]
    assert order == ["first saved", "second began"]
    assert folder_owner(tmp_path) == 4


@pytest.mark.parametrize("is_ended_by_ray", [False, True])
def test_an_attempt_whose_driver_slept_writes_nothing_once_another_has_gone_on(
    tmp_path: Path, is_ended_by_ray: bool
) -> None:
    ends: list[BaseException] = []

    def function(spec: dict[str, Any], report: Any) -> dict[str, Any]:
        try:
            report(evaluation(0.5))
        except BaseException as error:
            ends.append(error)
            raise
        return {"metrics": FIGURES}

    def sleeps(message: dict[str, Any]) -> None:
        if message["kind"] == "evaluation":
            # The folder is free while an answer is awaited, so the other attempt need not wait.
            other = worker(tmp_path, lambda spec, report: {"metrics": FIGURES}, number=4)
            assert [m["kind"] for m in other] == ["started", "final"]
            if is_ended_by_ray:
                sys.exit(0)

    sent = worker(tmp_path, function, answer=sleeps)
    assert [m["kind"] for m in sent] == ["started", "evaluation"]
    (end,) = ends
    assert isinstance(end, TrialTakenOver)


def test_a_worker_that_hangs_does_not_keep_a_folder_for_ever(tmp_path: Path) -> None:
    hangs = FolderClaim(tmp_path, 3)
    hangs.take()
    following = FolderClaim(tmp_path, 4, wait_s=0.2)
    following.take()
    assert following.note is not None
    assert "held the folder for 0.2 s" in following.note
    with following.aside():  # nor is it waited for again
        pass
    with pytest.raises(TrialTakenOver), hangs.aside():
        pass
    hangs.let_go()


@pytest.mark.parametrize(
    ("error", "retry"),
    [
        (TrialFailed("training", "the loss is nan", retry=False), "no"),
        (TrialFailed("training", "out of memory", retry=True), "counted"),
        (ConfigError("model: wrong"), "no"),
        (ValueError("wrong"), "no"),
        (OSError("the share is gone"), "counted"),
        (RuntimeError("CUDA error"), "counted"),
    ],
)
def test_what_may_pass_another_time_is_tried_again(error: Exception, retry: str) -> None:
    message = failure(error)
    assert message["retry"] == retry
    assert message["reason"]


def test_an_interrupted_trial_is_no_failure(tmp_path: Path) -> None:
    def function(spec: dict[str, Any], report: Any) -> dict[str, Any]:
        raise TrialInterrupted("saved")

    assert worker(tmp_path, function)[-1]["kind"] == "interrupted"


def test_a_nan_objective_ends_the_trial(tmp_path: Path) -> None:
    def function(spec: dict[str, Any], report: Any) -> dict[str, Any]:
        report(evaluation(float("inf")))
        return {}

    last = worker(tmp_path, function)[-1]
    assert (last["kind"], last["retry"]) == ("failed", "no")


def test_plain_values_are_json(tmp_path: Path) -> None:
    value = {"a": np.float32(1.5), 2: (np.int64(3), tmp_path), "b": float("inf"), "c": True}
    assert plain(value) == {"a": 1.5, "2": [3, str(tmp_path)], "b": None, "c": True}


LARGE = (48, 1024, 1024)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> VolumePaths:
    """Return a volume of 48 MB for each array, in chunks of a section."""
    folder = tmp_path_factory.mktemp("large")
    for name in ("im", "label", "mask"):
        with h5py.File(folder / f"{name}.h5", "w") as file:
            array = file.create_dataset("main", LARGE, np.uint8, chunks=(1, *LARGE[1:]))
            array[5] = np.arange(LARGE[2]) % 3
    return VolumePaths("v", *(str(folder / f"{name}.h5") for name in ("im", "label", "mask")))


def lazy_space(limit_gb: float) -> Any:
    """Return a space whose volumes stay on disk from so many gigabytes on."""
    return space_from_mapping(
        {
            "name": "s",
            "base": "start",
            "recipes": {"start": {}},
            "fixed": {"data": {"memory_limit_gb": limit_gb, "patch_size": [8, 64, 64]}},
            "parameters": {"optimization.optimizer.lr": {"float": [1e-5, 1e-1], "log": True}},
        }
    )


def test_a_volume_over_the_limit_is_checked_and_known_by_its_sections(large: VolumePaths) -> None:
    (whole,) = open_volumes(lazy_space(100.0), [large])
    assert not is_lazy(whole)
    expected = whole.fingerprint()
    del whole
    tracemalloc.start()
    try:
        (lazy,) = open_volumes(lazy_space(0.01), [large])
        assert is_lazy(lazy)
        assert lazy.fingerprint() == expected
        assert tracemalloc.get_traced_memory()[1] < 0.3 * math.prod(LARGE)
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("float labels", "must be integers"),
        ("negative labels", "16384 labels are negative"),
        ("no labels", "no labelled voxel"),
        ("nothing in the mask", "inside the mask"),
        ("NaN", r"NaN or infinite \(first: NaN at \(5, 0, 0\)\)"),
        ("bool image", "dtype bool"),
        ("shapes differ", "shape"),
    ],
)
def test_a_wrong_volume_over_the_limit_is_refused(tmp_path: Path, kind: str, words: str) -> None:
    shape = (16, 128, 128)
    arrays = {name: np.zeros(shape, np.uint8) for name in ("im", "label", "mask")}
    for array in arrays.values():
        array[5] = 1
    if kind == "float labels":
        arrays["label"] = arrays["label"].astype(np.float32)
    elif kind == "negative labels":
        arrays["label"] = -arrays["label"].astype(np.int16)
    elif kind == "no labels":
        arrays["label"][:] = 0
    elif kind == "nothing in the mask":
        arrays["mask"][:] = arrays["label"] == 0
    elif kind == "NaN":
        arrays["im"] = np.where(arrays["im"] == 1, np.nan, 0.0).astype(np.float32)
    elif kind == "bool image":
        arrays["im"] = arrays["im"] == 1
    else:
        arrays["mask"] = arrays["mask"][1:]
    for name, array in arrays.items():
        with h5py.File(tmp_path / f"{name}.h5", "w") as file:
            file["main"] = array
    paths = VolumePaths("v", *(str(tmp_path / f"{name}.h5") for name in ("im", "label", "mask")))
    with pytest.raises(VolumeError, match=words):
        open_volumes(lazy_space(1e-6), [paths])


@pytest.mark.slow
def test_a_study_of_a_volume_over_the_limit_reads_it_in_its_workers(tmp_path: Path) -> None:
    made = make_phantom(shape=(12, 96, 96), instances=5, seed=1)
    files = {name: str(tmp_path / f"{name}.h5") for name in ("im", "label", "mask")}
    for name, array in (("im", made.image), ("label", made.label), ("mask", made.mask)):
        write_array(files[name], array)
    settings = (
        "data.memory_limit_gb=0.0005", "optimization.max_epochs=2", "data.iter_num_per_epoch=4",
        "monitor.evaluation.count=1", "data.patch_size=[8,32,32]",
        "inference.sliding_window.window_size=[8,64,64]",
    )  # fmt: skip
    words = [
        "run", "smoke", "--image", files["im"], "--label", files["label"], "--mask", files["mask"],
        "--out", str(tmp_path / "out"), "--trials", "1", "--json",
        *(word for setting in settings for word in ("--set", setting)),
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "hydralv_tune", *words],
        capture_output=True, text=True, env=environment(), timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    best = json.loads(done.stdout)["best"]["number"]
    record = json.loads((tmp_path / "out" / "trials" / str(best) / "record.json").read_text())
    assert any("read lazily" in note for note in record["notes"])
    whole = read_volume(VolumePaths("v", files["im"], files["label"], files["mask"]))
    assert record["volumes"][0]["fingerprint"] == whole.fingerprint()


@pytest.mark.parametrize(
    ("owner", "name"), [(owner, name) for owner, names in PRIVATE_NAMES for name in names]
)
def test_ray_still_has_the_private_name(owner: Any, name: str) -> None:
    set_when_made = getattr(getattr(owner, "__init__", None), "__code__", None)
    there = hasattr(owner, name) or (set_when_made and name in set_when_made.co_names)
    assert there, f"this release of Ray has moved {owner.__name__}.{name}: mend launch/ray_private"


def test_a_trial_sweeps_the_grid_of_its_candidate_and_else_that_of_its_study(
    tmp_path: Path,
) -> None:
    own = {"decoder": "decode_distance_watershed", "grid": {"min_seed_size": [3, 9]}}
    space = space_from_mapping(
        {
            "base": "smoke",
            "recipes": {"own": {"test": {"decoding_grid": own}}, "plain": {}},
            "warm_starts": ["own", "plain"],
        }
    )
    make = _specification(space, [], tmp_path, "s", SimpleNamespace(gpus=0.0, cpus=1))  # type: ignore[arg-type]
    for number, name in enumerate(space.warm_starts):
        spec = make(Asked(number, number, 1, None, space.warm_start(name).params, name))
        assert spec["grid"] == spec["candidate"]["test"]["decoding_grid"]
        swept = own["decoder"] if name == "own" else space.decoding.decoder
        assert spec["grid"]["decoder"] == swept
