"""The real command line stopped in the middle: it says how to go on, and the same words do."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from commands_in_a_process import environment, small_run

from hydralv_tune.artifacts.records import TrialRecord, load_checkpoint, read_record
from hydralv_tune.study.study import open_readonly

TRIALS = 2
TRAINING = {
    "data": {"iter_num_per_epoch": 40},
    "optimization": {"max_epochs": 6},
    "monitor": {"evaluation": {"count": 3}, "early_stopping": {"enabled": False}},
}


def start(words: list[str], folder: Path, name: str) -> subprocess.Popen[bytes]:
    """Start a command as a shell does, in a process group of its own."""
    with (folder / f"{name}.out").open("wb") as out, (folder / f"{name}.err").open("wb") as err:
        return subprocess.Popen(
            words, cwd=folder, stdout=out, stderr=err, env=environment(), start_new_session=True,
            # Tests that a shell runs in the background inherit that Ctrl-C is ignored.
            preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip


def until_one_was_evaluated(process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until a trial has been evaluated once; the other may be anywhere before that."""
    deadline = time.monotonic() + 240
    while ": evaluation 1/" not in log.read_text():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)


def send(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    """Send a signal as it comes: Ctrl-C to all that the terminal started, others to the one."""
    if number == signal.SIGINT:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)


def saved_in(folder: Path, root: int) -> tuple[TrialRecord, int] | None:
    """Return record and step of a trial that was stopped at work; None where it had not begun."""
    place = folder / "out" / "trials" / str(root)
    if not (place / "last.ckpt").exists():
        return None
    record = read_record(place / "record.json")
    assert record.state == "interrupted"
    step = int(load_checkpoint(place / "last.ckpt")["folds"][0]["step"])
    assert step >= (record.history[-1]["step"] if record.history else 0)
    return record, step


def stopped_run(tmp_path: Path, number: signal.Signals) -> tuple[list[str], str]:
    """Stop a run in the middle; return its words and what it has said on stderr."""
    words = small_run(tmp_path, TRAINING, "--out", "out", "--trials", str(TRIALS), "--json")
    process = start(words, tmp_path, "first")
    try:
        until_one_was_evaluated(process, tmp_path / "first.err")
        send(process, number)
        assert process.wait(60) == 130, (tmp_path / "first.err").read_text()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    said = (tmp_path / "first.err").read_text()
    assert f"Stopped by {number.name}. Run the same command again to go on." in said
    assert "Traceback" not in said
    text = (tmp_path / "first.out").read_text()
    assert not text or isinstance(json.loads(text), dict)
    return words, said


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_a_stopped_run_saves_and_the_same_command_ends_with_exactly_its_trials(
    tmp_path: Path, number: signal.Signals
) -> None:
    words, said = stopped_run(tmp_path, number)
    before = {root: saved_in(tmp_path, root) for root in range(TRIALS)}
    assert any(saved is not None for saved in before.values())
    facts = go_on(words, tmp_path)
    assert facts["trials"] == {
        "complete": TRIALS, "pruned": 0, "fail": said.count(" starts, "), "running": 0,
        "waiting": 0,
    }  # fmt: skip
    for root, saved in before.items():
        if saved is not None:
            check_it_went_on(tmp_path, root, *saved)
    views = open_readonly(f"sqlite:///{tmp_path / 'out' / 'study.db'}", "small").trials()
    stopped = {view.number: view for view in views if view.state == "FAIL"}
    assert all(number.name in view.user_attrs["reason"] for view in stopped.values())
    assert all(view.attempt == 1 for view in views)
    assert {view.user_attrs["retry_of"] for view in views if "retry_of" in view.user_attrs} == set(
        stopped
    )


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_stopped_run_goes_on_under_a_changed_grid_with_extend(tmp_path: Path) -> None:
    words, _ = stopped_run(tmp_path, signal.SIGTERM)
    evaluated = [
        root
        for root in range(TRIALS)
        if (saved := saved_in(tmp_path, root)) is not None and saved[0].history
    ]
    assert evaluated
    space = yaml.safe_load((tmp_path / "small.yaml").read_text())
    space["decoding"]["grid"]["min_seed_size"] = [3]
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(space))
    facts = go_on([*words, "--extend"], tmp_path)
    assert facts["trials"]["complete"] == TRIALS
    for root in range(TRIALS):
        record = read_record(tmp_path / "out" / "trials" / str(root) / "record.json")
        assert record.grid["grid"]["min_seed_size"] == [3]
        assert record.decoding is not None
        assert record.decoding["kwargs"]["min_seed_size"] == 3
        assert any("another grid" in note for note in record.notes) == (root in evaluated)


def go_on(words: list[str], folder: Path) -> dict[str, Any]:
    """Run the same words again to the end and return what they print."""
    process = start(words, folder, "second")
    try:
        assert process.wait(240) == 0, (folder / "second.err").read_text()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    facts: dict[str, Any] = json.loads((folder / "second.out").read_text())
    return facts


def check_it_went_on(folder: Path, root: int, before: TrialRecord, step: int) -> None:
    """Check that a trial did the rest of its steps, and none a second time."""
    record = read_record(folder / "out" / "trials" / str(root) / "record.json")
    assert record.state == "complete"
    assert f"continued from step {step}" in record.notes
    assert record.history[: len(before.history)] == before.history
    assert [row["evaluation"] for row in record.history] == [1, 2, 3]
