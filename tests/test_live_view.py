"""The live view tells each event once, and never invents a figure it was not given."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
from rich.console import Console

from hydralv_tune.cli.console import stderr
from hydralv_tune.cli.live_view import LiveView, clock, event_line


@dataclass(frozen=True)
class Happened:
    """An event as the launcher sends it."""

    kind: str
    number: int | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)


STORY = [
    Happened("trial_started", 0, {"warm_start": "smoke", "architecture": "rsunet", "epochs": 10,
                                  "evaluations": 4, "params": {"lr": 0.25}}),
    Happened("trial_started", 1, {"warm_start": None, "architecture": "mednext"}),
    Happened("evaluation", 0, {"step": 2, "epoch": 5, "adapted_rand_error": 0.25, "seconds": 61.0,
                               "f1_iou50": 0.75, "losses": {"total": 0.5, "label": 0.375}}),
    Happened("trial_finished", 1, {"value": 0.125, "adapted_rand_error": 0.125,
                                   "adapted_rand_error_foreground": 0.375, "f1_iou50": 0.875}),
    Happened("trial_failed", 2, {"reason": "training: loss is NaN at step 7", "retry": False}),
]  # fmt: skip


def shown(view: LiveView) -> str:
    """Return what the view would draw on a wide terminal."""
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(view)
    return console.export_text()


def test_running_trials_show_their_progress_and_the_best_shows_its_f1() -> None:
    view = LiveView("hydra", trials=10)
    for event in STORY:
        view.on_event(event)
    text = shown(view)
    assert "complete 1, pruned 0, fail 1, running 1" in text
    running = next(line for line in text.splitlines() if "smoke" in line)
    for word in ("5/10", "2/4", "0.2500", "0.7500", "0.5000", "1:01"):
        assert word in running
    assert "Best: trial 1, adapted_rand_error 0.1250" in text
    assert "adapted_rand_error_foreground 0.3750" in text
    assert "f1_iou50 0.8750" in text


def test_a_figure_that_was_not_given_is_a_dash() -> None:
    view = LiveView("hydra", trials=10)
    view.on_event(STORY[1])
    running = next(line for line in shown(view).splitlines() if "mednext" in line)
    assert running.count("–") == 7


def test_a_worse_trial_does_not_replace_the_best() -> None:
    view = LiveView("hydra", trials=10)
    view.on_event(STORY[3])
    view.on_event(Happened("trial_finished", 4, {"value": 0.5, "adapted_rand_error": 0.5}))
    assert "Best: trial 1" in shown(view)


def test_without_a_terminal_each_event_is_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    with LiveView("hydra", trials=10) as view:
        for event in STORY:
            view.on_event(event)
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == len(STORY)
    assert lines[-1] == (
        "trial failed 2: reason training: loss is NaN at step 7, retry False"
    )  # fmt: skip


def test_an_evaluation_is_told_in_one_short_line() -> None:
    told = event_line(STORY[2])
    assert told == (
        "evaluation 0: step 2, epoch 5, adapted_rand_error 0.2500, f1_iou50 0.7500, seconds 61.0000"
    )


def test_event_lines_leave_out_what_is_not_known() -> None:
    assert event_line(Happened("waiting")) == "waiting"
    assert "warm_start" not in event_line(STORY[1])


@pytest.mark.parametrize(
    ("seconds", "text"), [(None, "–"), (9, "0:09"), (61, "1:01"), (3725, "1:02:05")]
)
def test_seconds_read_as_a_clock(seconds: float | None, text: str) -> None:
    assert clock(seconds) == text


def test_names_that_look_like_markup_are_shown_as_they_are(
    capfd: pytest.CaptureFixture[str],
) -> None:
    view = LiveView("[/a]", trials=10)
    view.on_event(Happened("trial_started", 0, {"warm_start": "mine[z 10:14]", "params": {}}))
    capfd.readouterr()
    stderr.print(view)
    told = capfd.readouterr().err
    assert "Study [/a]:" in told
    assert "mine[z 10:14]" in told
