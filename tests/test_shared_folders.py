"""A trial's folder on several nodes: the latest attempt owns it, and its state counts as a whole.

A node is a folder here, and the store a third one; files, locks and threads are real.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from hydralv_tune.artifacts.checkpoint_store import CheckpointStore, trial_name
from hydralv_tune.config.errors import InputError, TrialInterrupted, TrialTakenOver
from hydralv_tune.launch.trial_folder import FolderClaim, fetch_folder, folder_owner
from hydralv_tune.launch.worker import run_worker

FIGURES = {"adapted_rand_error": 0.2, "adapted_rand_error_foreground": 0.3, "f1_iou50": 0.8}


def node(folder: Path, files: dict[str, str] | None = None) -> Path:
    """Return the folder of a trial on a node, with these files."""
    folder.mkdir(exist_ok=True)
    for name, text in (files or {}).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def held(folder: Path) -> dict[str, str]:
    """Return the files of a trial's folder, but for its log and those of the node alone."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    texts = {path.relative_to(folder).as_posix(): path.read_text() for path in paths}
    return {
        name: text for name, text in texts.items() if not name.startswith(".") and name != "log.txt"
    }


class Trial:
    """A trial whose attempts run on nodes that share a store alone."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.store = folder, str(folder / "store")

    def mirror(self, on: str) -> CheckpointStore:
        """Return the mirror of a node."""
        return CheckpointStore(node(self.folder / on), self.store, "study/0")

    def run(
        self,
        number: int,
        on: str,
        *,
        until: int = 8,
        then: Callable[[int], None] = lambda step: None,
        store: bool = True,
    ) -> list[dict[str, Any]]:
        """Run an attempt, which goes on from its `state`, and return what it sends.

        Args:
            number: Of the attempt.
            on: Name of the node.
            until: The last step.
            then: Called with each step before it is reported; what it raises ends the attempt.
            store: Whether the attempt knows the store.
        """

        def function(spec: dict[str, Any], report: Any) -> dict[str, Any]:
            state = Path(spec["out"]) / "state"
            done = int(state.read_text()) if state.exists() else 0
            for step in range(done + 1, until + 1):
                state.write_text(str(step))
                then(step)
                report({"step": step, "value": 1 / step, "metrics": FIGURES})
            (state.parent / "record.json").write_text(f"complete, by attempt {number}")
            return {"metrics": FIGURES}

        sent: list[dict[str, Any]] = []
        spec = {"out": str(self.folder / on), "number": number, "root": 0, "study": "study"}
        run_worker(
            spec,
            send=sent.append,
            should_stop=lambda: False,
            function=function,
            checkpoints=self.store if store else None,
        )
        return sent


def steps(sent: list[dict[str, Any]]) -> list[int]:
    """Return the steps that were reported."""
    return [message["step"] for message in sent if message["kind"] == "evaluation"]


def dies_at(step: int) -> Callable[[int], None]:
    """Return what ends an attempt at a step, before that is pushed."""

    def die(now: int) -> None:
        if now == step:
            raise OSError("the node goes down")

    return die


def interrupted_at(step: int) -> Callable[[int], None]:
    """Return what ends an attempt at a step in order, once it has saved and before it reports."""

    def interrupt(now: int) -> None:
        if now == step:
            raise TrialInterrupted("asked to stop")

    return interrupt


def push_unseen(trial: Trial, version: str, files: dict[str, str]) -> None:
    """Put a version into the store as if its attempt had looked before a later one began."""
    place = Path(trial.store, "study", "0")
    node(place / version, files)
    node(place, {f"{version}.json": json.dumps(dict.fromkeys(files, version))})


@pytest.fixture
def trial(tmp_path: Path) -> Trial:
    """Return a trial."""
    return Trial(tmp_path)


def test_a_retry_on_another_node_goes_on_from_the_mirrored_state(trial: Trial) -> None:
    assert steps(trial.run(3, "a", then=dies_at(3))) == [1, 2]
    assert steps(trial.run(4, "b", until=4)) == [3, 4]


def test_what_an_interrupted_attempt_saved_is_not_done_again_on_another_node(trial: Trial) -> None:
    sent = trial.run(3, "a", then=interrupted_at(3))
    assert steps(sent) == [1, 2]
    assert sent[-1] == {"kind": "interrupted"}
    assert steps(trial.run(4, "b", until=5)) == [4, 5]


def test_an_interrupted_attempt_that_was_taken_over_pushes_and_says_nothing(trial: Trial) -> None:
    def later(step: int) -> None:
        if step == 2:
            trial.mirror("b").begin(2)
            raise TrialInterrupted("asked to stop")

    assert [message["kind"] for message in trial.run(1, "a", then=later)] == [
        "started", "evaluation",
    ]  # fmt: skip
    assert steps(trial.run(3, "c", until=2)) == [2]


def test_an_interrupted_attempt_whose_push_fails_says_so_and_ends_in_order(
    trial: Trial, capsys: pytest.CaptureFixture[str]
) -> None:
    def lose_the_store(step: int) -> None:
        if step == 2:
            in_the_way = Path(trial.store, "study", "0", "1.2", "state")
            in_the_way.mkdir(parents=True)
            raise TrialInterrupted("asked to stop")

    assert trial.run(1, "a", then=lose_the_store)[-1] == {"kind": "interrupted"}
    assert "trial 1: its last steps stay on this node" in capsys.readouterr().err
    assert steps(trial.run(2, "a", until=3)) == [3]


def test_the_third_attempt_goes_on_from_the_second_not_from_what_its_node_had(
    trial: Trial,
) -> None:
    assert steps(trial.run(1, "a", then=dies_at(3))) == [1, 2]
    node(trial.folder / "a", {"record.json": "fail, by attempt 1"})
    assert steps(trial.run(2, "b", until=9, then=dies_at(9))) == [3, 4, 5, 6, 7, 8]
    found: list[dict[str, str]] = []
    third = trial.run(3, "a", until=9, then=lambda step: found.append(held(trial.folder / "a")))
    assert steps(third) == [9]
    assert found == [{"state": "9"}]  # no record of attempt 1
    trial.mirror("c").pull()
    assert held(trial.folder / "c") == {"state": "9", "record.json": "complete, by attempt 3"}


def test_the_winner_s_folder_replaces_what_an_earlier_attempt_left_on_the_driver_s_node(
    trial: Trial,
) -> None:
    trial.run(1, "driver", then=dies_at(2))
    node(trial.folder / "driver", {"record.json": "fail, by attempt 1", "sweep.png": "old"})
    trial.run(2, "b")
    for on in ("driver", "b"):
        fetch_folder(trial.folder / on, 2, url=trial.store, name="study/0")
        assert held(trial.folder / on) == {"state": "8", "record.json": "complete, by attempt 2"}


def test_the_winner_s_folder_waits_for_a_worker_that_is_still_at_it(trial: Trial) -> None:
    trial.run(2, "b")
    late = FolderClaim(node(trial.folder / "driver", {"record.json": "attempt 1"}), 1)
    late.take()
    with ThreadPoolExecutor() as pool:
        fetched = pool.submit(
            fetch_folder, trial.folder / "driver", 2, url=trial.store, name="study/0"
        )
        while not late.is_lost():
            assert not fetched.done()
        node(trial.folder / "driver", {"record.json": "interrupted, by attempt 1"})  # it saves
        late.let_go()
        fetched.result(30)
    assert held(trial.folder / "driver")["record.json"] == "complete, by attempt 2"
    with pytest.raises(TrialTakenOver), late.aside():
        pass


def test_the_node_that_wrote_last_keeps_what_it_could_not_push(trial: Trial) -> None:
    trial.run(1, "a", then=dies_at(3))
    assert steps(trial.run(2, "a", then=dies_at(4))) == []  # step 3 is there, 4 is not pushed
    assert steps(trial.run(3, "a", until=5)) == [5]


def test_an_attempt_that_died_before_its_first_push_counts_on_its_node_alone(
    trial: Trial,
) -> None:
    trial.run(1, "a", then=dies_at(3))
    assert steps(trial.run(2, "b", then=dies_at(4))) == [3]
    assert steps(trial.run(3, "c", then=dies_at(4))) == []  # it has step 4 here, unpushed
    assert steps(trial.run(4, "b", then=dies_at(5))) == []
    assert steps(trial.run(5, "b", then=dies_at(6))) == []
    assert steps(trial.run(6, "c", until=5)) == [5]


def test_a_push_that_comes_in_late_does_not_replace_what_a_later_attempt_has_done(
    trial: Trial,
) -> None:
    trial.run(1, "a", then=dies_at(3))
    assert steps(trial.run(2, "b", then=dies_at(3))) == []
    push_unseen(trial, "1.9", {"state": "2"})
    assert steps(trial.run(3, "b", until=4)) == [4]


def test_a_run_without_the_store_is_newer_than_what_lies_there(trial: Trial) -> None:
    trial.run(1, "b", then=dies_at(3))
    trial.run(2, "a", store=False)
    fetch_folder(trial.folder / "a", 2, url=trial.store, name="study/0")
    assert held(trial.folder / "a")["record.json"] == "complete, by attempt 2"


def test_a_push_that_ends_half_way_leaves_the_one_before_as_a_whole(trial: Trial) -> None:
    a = trial.mirror("a")
    a.begin(1)
    node(trial.folder / "a", {"best.ckpt": "1", "last.ckpt": "1"})
    a.push(1)
    node(trial.folder / "a", {"best.ckpt": "22", "last.ckpt": "22"})
    in_the_way = Path(trial.store, "study", "0", "1.2", "last.ckpt")
    in_the_way.mkdir(parents=True)
    with pytest.raises(OSError, match="directory"):
        a.push(1)
    assert in_the_way.with_name("best.ckpt").read_text() == "22"  # it came so far
    trial.mirror("b").begin(2)
    assert held(trial.folder / "b") == {"best.ckpt": "1", "last.ckpt": "1"}
    # Its own node, where nothing is lost, goes on from what it has.
    a.pull()
    assert held(trial.folder / "a") == {"best.ckpt": "22", "last.ckpt": "22"}


def test_a_pull_that_ends_half_way_leaves_the_folder_as_a_whole(trial: Trial) -> None:
    b = trial.mirror("b")
    node(trial.folder / "b", {"best.ckpt": "2", "last.ckpt": "2"})
    b.push(2)
    a = trial.mirror("a")
    node(trial.folder / "a", {"best.ckpt": "1", "last.ckpt": "1"})
    stored = Path(trial.store, "study", "0", "2.1", "last.ckpt")
    stored.rename(stored.with_name("away"))
    with pytest.raises(FileNotFoundError):
        a.pull()
    assert held(trial.folder / "a") == {"best.ckpt": "1", "last.ckpt": "1"}
    stored.with_name("away").rename(stored)
    assert a.pull() == 2
    assert held(trial.folder / "a") == {"best.ckpt": "2", "last.ckpt": "2"}


def test_a_file_is_copied_only_when_it_has_changed_and_old_versions_are_cleared_away(
    trial: Trial,
) -> None:
    a = trial.mirror("a")
    a.begin(1)
    node(trial.folder / "a", {"config.yaml": "c", "fold_0/best.ckpt": "1", "last.ckpt": "1"})
    assert a.push(1) == 3
    assert a.push(1) == 0
    for step in ("22", "333"):
        node(trial.folder / "a", {"last.ckpt": step})
        assert a.push(1) == 1
    (trial.folder / "a" / "fold_0" / "best.ckpt").unlink()
    assert a.push(1) == 0
    place = Path(trial.store, "study", "0")
    assert {p.relative_to(place).as_posix() for p in place.rglob("*") if p.is_file()} == {
        "1.4.json", "1.1/config.yaml", "1.3/last.ckpt",
    }  # fmt: skip
    b = trial.mirror("b")
    b.begin(2)
    assert held(trial.folder / "b") == {"config.yaml": "c", "last.ckpt": "333"}
    assert b.push(2) == 2
    assert sorted(path.name for path in place.iterdir()) == ["2.1", "2.1.json"]


def test_a_late_attempt_leaves_the_shared_copy_of_a_complete_one_alone(trial: Trial) -> None:
    complete = {"state": "8", "record.json": "complete, by attempt 4"}

    def sleeps(step: int) -> None:
        if step == 2:
            assert trial.run(4, "b")[-1]["kind"] == "final"

    late = trial.run(3, "a", then=sleeps)
    assert [message["kind"] for message in late] == ["started", "evaluation"]
    trial.mirror("c").pull()
    assert held(trial.folder / "c") == complete
    with pytest.raises(TrialTakenOver, match="attempt 4 has taken"):
        trial.mirror("a").push(3)
    # Nor does it count where its files came in after the last check.
    push_unseen(trial, "3.9", {"state": "3"})
    trial.mirror("d").pull()
    assert held(trial.folder / "d") == complete


def test_an_attempt_learns_from_the_store_that_it_slept_too_long(trial: Trial) -> None:
    ends: list[BaseException] = []

    def function(spec: dict[str, Any], report: Any) -> dict[str, Any]:
        try:
            report({"step": 1, "value": 0.5, "metrics": FIGURES})
        except BaseException as error:
            ends.append(error)
            raise
        raise AssertionError("it goes on")

    def send(message: dict[str, Any]) -> None:
        if message["kind"] == "evaluation":
            trial.run(4, "b")

    spec = {"out": str(trial.folder / "a"), "number": 3, "root": 0, "study": "study"}
    run_worker(
        spec, send=send, should_stop=lambda: False, function=function, checkpoints=trial.store
    )
    (end,) = ends
    assert isinstance(end, TrialTakenOver)


def test_a_worker_that_comes_too_late_says_why_it_does_not_begin(trial: Trial) -> None:
    trial.run(4, "b")
    for on in ("a", "b"):  # which have met attempt 4 in the store, and on the node itself
        (sent,) = trial.run(3, on)
        assert (sent["kind"], sent["retry"]) == ("failed", "no")
        assert "attempt 4 has taken trial 3 over" in sent["reason"]
    trial.mirror("c").pull()
    assert held(trial.folder / "c")["record.json"] == "complete, by attempt 4"


def test_whoever_takes_over_in_the_middle_of_pushes_gets_one_of_them_as_a_whole(
    tmp_path: Path,
) -> None:
    checkpoints = [f"{letter}.ckpt" for letter in "uvwxyz"]
    pictures = {f"pictures/{number}.png": "p" for number in range(100)}  # read before those

    def pushes(trial: Trial, pushed: threading.Event) -> None:
        mirror = trial.mirror("a")
        mirror.begin(3)
        node(trial.folder / "a", pictures)
        for step in range(1000):
            node(trial.folder / "a", dict.fromkeys(checkpoints, f"step {step} " * 50_000))
            mirror.push(3)
            pushed.set()

    for turn in range(15):
        trial, pushed = Trial(node(tmp_path / str(turn))), threading.Event()
        with ThreadPoolExecutor() as pool:
            late = pool.submit(pushes, trial, pushed)
            assert pushed.wait(30)
            time.sleep(0.002 * turn)
            following = trial.mirror("b")
            following.begin(4)
            assert isinstance(late.exception(30), TrialTakenOver)
        got = held(trial.folder / "b")
        assert len(got) == len(checkpoints) + len(pictures)
        assert len({got[name] for name in checkpoints}) == 1
        following.push(4)
        trial.mirror("c").pull()
        assert held(trial.folder / "c") == got


def test_what_a_store_says_cannot_leave_the_folder(trial: Trial) -> None:
    place = Path(trial.store, "study", "0")
    place.mkdir(parents=True)
    for name in ("../x", "/x", "a/../../x", ".version.json", ""):
        (place / "1.1.json").write_text(json.dumps({name: "1.1"}))
        with pytest.raises(InputError, match="no file of a trial's folder"):
            trial.mirror("a").pull()
    with pytest.raises(InputError, match="cannot be used"):
        CheckpointStore(trial.folder, "nosuch://bucket/x", "7")


def test_studies_that_share_a_store_have_places_of_their_own(tmp_path: Path) -> None:
    names = ["a", "a/b", "..", ".hidden", "a%2Fb", "a\\b"]
    places = {trial_name(name, 0) for name in names}
    assert len(places) == len(names)
    for place in places:
        assert (tmp_path / place).resolve().parent.parent == tmp_path.resolve()


def test_an_earlier_attempt_that_comes_late_does_not_take_the_folder_from_a_later_one(
    tmp_path: Path,
) -> None:
    later = FolderClaim(tmp_path, 4)
    later.take()
    for holds in (True, False):  # while the later one works, and while it awaits an answer
        late = FolderClaim(tmp_path, 3, wait_s=0.2)
        with pytest.raises(TrialTakenOver, match="attempt 4 has taken"):
            late.take()
        assert folder_owner(tmp_path) == 4
        assert not later.is_lost()
        if holds:
            later.let_go()
    with later.aside():
        pass
    later.let_go()


def test_of_attempts_that_come_at_once_the_latest_has_the_folder(tmp_path: Path) -> None:
    for turn in range(20):
        folder = tmp_path / str(turn)
        at_once = threading.Barrier(4)

        def takes(
            number: int, folder: Path = folder, at_once: threading.Barrier = at_once
        ) -> FolderClaim:
            claim = FolderClaim(folder, number, wait_s=30)
            at_once.wait(30)
            claim.take()
            claim.let_go()
            return claim

        with ThreadPoolExecutor(4) as pool:
            claims = [pool.submit(takes, number) for number in (3, 10, 9, 4)]
            assert not claims[1].result(60).is_lost()
            ends = [claim.exception(60) for claim in claims]
        assert folder_owner(folder) == 10
        assert all(end is None or isinstance(end, TrialTakenOver) for end in ends)
