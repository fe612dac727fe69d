"""The live view shows what the database says, tells each event once, and invents no figure."""

from __future__ import annotations

import io
import json
import sqlite3
import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from hydralv_tune.cli.live_view import LiveView, clock, event_line, progress_table
from hydralv_tune.cli.main import exit_code
from hydralv_tune.config.search_space import space_from_mapping
from hydralv_tune.launch.live_trial import LiveTrial
from hydralv_tune.launch.start import Start
from hydralv_tune.results.publish import study_note
from hydralv_tune.study.driver import Driver
from hydralv_tune.study.progress import study_progress, time_left
from hydralv_tune.study.study import Study
from hydralv_tune.study.trial_views import Asked, TrialResult


@dataclass(frozen=True)
class Happened:
    """An event as the launcher sends it."""

    kind: str
    number: int | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)


STORY = [
    Happened("stage", None, {"text": "Starting Ray."}),
    Happened("trial_started", 0, {"warm_start": "smoke", "architecture": "rsunet", "epochs": 10,
                                  "evaluations": 4, "params": {"optimizer.lr": 0.25}}),
    Happened("evaluation", 0, {"step": 2, "epoch": 5, "adapted_rand_error": 0.25, "seconds": 61.0,
                               "f1_iou50": 0.75, "losses": {"total": 0.5, "label": 0.375}}),
    Happened("trial_finished", 1, {"value": 0.125, "adapted_rand_error": 0.125,
                                   "adapted_rand_error_foreground": 0.375, "f1_iou50": 0.875}),
    Happened("trial_failed", 2, {"reason": "training: loss is NaN at step 7", "retry": False}),
    Happened("trial_failed", 3, {"reason": "interrupted: stopped by SIGINT", "epoch": 13,
                                 "epochs": 18}),
]  # fmt: skip


def shown(view: Any, width: int = 80, height: int = 24) -> str:
    """Return what is drawn on a terminal of some size."""
    console = Console(width=width, height=height, record=True, file=io.StringIO())
    console.print(view)
    return console.export_text()


class Story:
    """A study on SQLite whose trials take no time."""

    def __init__(self, folder: Path) -> None:
        space = space_from_mapping({
            "base": "smoke", "budget": {"trials": 6}, "pruner": {"name": "none"},
            "parameters": {"optimization.optimizer.lr": {"float": [1e-4, 1e-2]}},
        })  # fmt: skip
        self.folder, self.storage = folder, f"sqlite:///{folder / 'study.db'}"
        self.study = Study.open(self.storage, "story", space=space, create=True)
        self.study.remember("out", str(folder))

    def ask(self, driver: Driver) -> Asked:
        """Return the next trial."""
        asked = driver.ask(6)
        assert isinstance(asked, Asked)
        return asked

    def tell(self, driver: Driver, error: float, f1: float, seconds: float = 60.0) -> int:
        """Run a trial to its end and return its number."""
        number = self.ask(driver).number
        metrics = {"adapted_rand_error": error, "f1_iou50": f1}
        attributes = {"metrics": metrics, "seconds": seconds}
        driver.tell(number, TrialResult("COMPLETE", error, 0.5 - f1, attributes))
        return number


@pytest.fixture
def story(tmp_path: Path) -> Iterator[Story]:
    """Return a study that is made, with no trial yet."""
    made = Story(tmp_path)
    yield made
    made.study.close()


def test_figures_are_those_of_the_database_after_a_resume(story: Story) -> None:
    with Driver(story.study, out=story.folder) as first:
        story.tell(first, 0.045, 0.17)
        best = story.tell(first, 0.148, 0.64)
        cut = story.ask(first).number
        first.tell(cut, TrialResult("FAIL", attributes={"reason": "interrupted"}, retry="free"))
    with Driver(story.study, out=story.folder) as second:
        again = story.ask(second)
        second.describe(again.number, {"epoch": 2, "epochs": 8, "evaluations": 4, "spent_s": 30.0,
                                       "f1_iou50": 0.6, "host": "node7"})  # fmt: skip
        second.report(again.number, 1, 0.3)
        view = LiveView("story", trials=6, progress=lambda: study_progress(story.study))
        view.on_event(Happened("progress", again.number, {"done": 25, "total": 100, "loss": 0.5}))
        view.on_event(Happened("evaluation", again.number, {"step": 1, "epoch": 2}))
        text = shown(view)
        status = shown(progress_table(study_progress(story.study)))
    facts = story.study.facts()
    assert facts["best"]["number"] == best
    note = study_note(story.study, story.study.space, story.study.trials(), None)
    assert "2 complete, 1 running, 1 interrupted" in note
    assert f"{facts['trials']['complete']} of 6 finished" in text
    assert f"Best: trial {best}, error 0.1480" in text
    assert "1 interrupted" in text
    assert "fail" not in text
    row = next(line for line in text.splitlines() if "25/100" in line)
    for word in ("2/8", "1/4", "0.5000", "0.3000", "0.6000", "1:"):
        assert word in row
    row = next(line for line in status.splitlines() if "node7" in line)
    assert "2/8" in row
    assert "ago" in row


def test_best_of_a_study_without_a_feasible_trial_is_a_warning(story: Story) -> None:
    with Driver(story.study, out=story.folder) as driver:
        story.tell(driver, 0.045, 0.17)
    text = shown(progress_table(study_progress(story.study)), width=120)
    assert "no trial meets the guard (F1 ≥ 0.5)" in text
    assert "trial 0 comes nearest (F1 0.170)" in " ".join(story.study.facts()["warnings"])


def test_nothing_essential_is_lost_with_24_trials_on_a_small_terminal(story: Story) -> None:
    with Driver(story.study, out=story.folder) as driver:
        number = story.ask(driver).number
        now = study_progress(story.study)
    rows = [{**now.running[0].__dict__, "number": n, "recipe": "a_recipe_of_a_long_name",
             "epoch": 12, "epochs": 1000, "evaluations": 10, "value": 0.1234,
             "f1": 0.5, "left_s": 86400.0, "host": "node"} for n in range(24)]  # fmt: skip
    many = type(now)(**{**now.__dict__, "running": [type(now.running[0])(**row) for row in rows]})
    steps = {n: {"done": 1234, "total": 99999, "loss": 0.1234, "step_s": 0.4321, "left_s": 86399.0}
             for n in range(24)}  # fmt: skip
    text = shown(progress_table(many, steps))
    for word in ("finished", "Best", "12/1000", "0.1234", "0.5000", "0.43", "23:59:59"):
        assert word in text
    assert max(map(len, text.splitlines())) <= 80
    assert number == 0


def test_time_left_is_shared_by_the_places_and_counts_down(story: Story) -> None:
    with Driver(story.study, out=story.folder) as driver:
        story.tell(driver, 0.1, 0.9, seconds=100.0)
        trials = [story.ask(driver).number for _ in range(2)]
        assert study_progress(story.study).left_s == pytest.approx((5 * 100.0) / 2)
        for number in trials:
            driver.describe(number, {"epoch": 1, "epochs": 4, "spent_s": 10.0})
        now = study_progress(story.study)
        assert now.left_s == pytest.approx((2 * 30.0 + 3 * 100.0) / 2, abs=30.0)
        assert time_left(story.study.trials(), now.running, 3) == pytest.approx(30.0, abs=30.0)


def test_time_left_is_known_from_trials_that_run_and_no_more_than_their_limit(
    tmp_path: Path,
) -> None:
    space = space_from_mapping({"parameters": {"optimization.optimizer.lr": {"choice": [0.1, 1]}},
                                "budget": {"trials": 3, "trial_timeout_s": 500.0}})  # fmt: skip
    study = Study.open(f"sqlite:///{tmp_path / 'study.db'}", "s", space=space, create=True)
    with closing(study), Driver(study, out=tmp_path) as driver:
        asked = driver.ask(3)
        assert isinstance(asked, Asked)
        told = {"epoch": 0, "epochs": 4, "left_s": 100.0, "evaluated_at": time.time()}
        driver.describe(asked.number, told)
        now = study_progress(study)
        assert now.running[0].left_s == pytest.approx(100.0, abs=20.0)
        assert now.left_s == pytest.approx(300.0, abs=60.0)
        assert "this run stops in 34 s" in shown(progress_table(now, {}, 34.0))
        assert "stops" not in shown(progress_table(now, {}, 3400.0))
        driver.describe(asked.number, {"left_s": 9999.0, "evaluated_at": time.time()})
        assert study_progress(study).running[0].left_s == pytest.approx(500.0, abs=20.0)


def test_a_trial_of_which_nothing_is_heard_is_not_said_to_go_on(story: Story) -> None:
    with Driver(story.study, out=story.folder) as driver:
        story.tell(driver, 0.1, 0.9)
        number = story.ask(driver).number
        driver.describe(number, {"left_s": 60.0, "evaluated_at": time.time()})
        assert study_progress(story.study).warnings == []
    database = sqlite3.connect(story.folder / "study.db")
    with closing(database), database:
        database.execute("update trial_heartbeats set heartbeat = datetime('now', '-3 hours')")
    now = study_progress(story.study)
    assert (now.running[0].left_s, now.running[0].is_silent) == (None, True)
    text = " ".join(shown(progress_table(now)).split())
    assert f"nothing was heard of trial {number} for 3 h" in text
    assert "nobody works on it any more" in text


def test_pace_and_time_left_are_those_of_this_attempt() -> None:
    asked = Asked(number=3, root=1, attempt=2, retry_of=1, params={}, warm_start=None)
    live = LiveTrial(asked)
    assert "left_s" not in live.advance({"done": 500, "total": 1000, "loss": None})
    began, steps = live.began or (0.0, 0)
    live.began = began - 10.0, steps
    now = live.advance({"done": 520, "total": 1000, "loss": 0.1})
    assert now["step_s"] == pytest.approx(0.5, rel=0.2)
    assert now["left_s"] == pytest.approx(240.0, rel=0.2)


def test_a_finished_study_has_no_time_left(story: Story) -> None:
    with Driver(story.study, out=story.folder) as driver:
        story.tell(driver, 0.1, 0.9)
    text = shown(progress_table(study_progress(story.study, 1)))
    assert "1 of 1 finished" in text
    assert "left" not in text


def test_a_study_aims_at_what_its_last_run_wanted(tmp_path: Path) -> None:
    space = space_from_mapping({"parameters": {"optimization.optimizer.lr": {"choice": [0.1, 1]}},
                                "budget": {"trials": 16}})  # fmt: skip
    aims = []
    for wanted in (None, 4, None, 6):
        start = Start(f"sqlite:///{tmp_path / 'study.db'}", "s", space, tmp_path, wanted=wanted)
        study = start.open({})
        aims.append(study_progress(study).target)
        study.close()
    assert aims == [16, 4, 4, 6]


def test_what_starting_a_worker_takes_is_not_gone_from_the_time_left(story: Story) -> None:
    with Driver(story.study, out=story.folder) as driver:
        number = story.ask(driver).number
        time.sleep(2.0)
        known = {"epoch": 1, "epochs": 3, "spent_s": 1.0, "evaluated_at": time.time()}
        driver.describe(number, known)
        assert study_progress(story.study).running[0].left_s == pytest.approx(2.0, abs=0.9)


def test_status_watches_as_one_document_a_line(
    story: Story, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    turns = iter([None, None])

    def sleep(_: float) -> None:
        if next(turns, "over") == "over":
            raise KeyboardInterrupt

    monkeypatch.setattr("hydralv_tune.cli.studies.time.sleep", sleep)
    assert exit_code(["status", str(story.folder), "--watch", "--json"]) == 130
    lines = capfd.readouterr().out.splitlines()
    assert [json.loads(line)["study"] for line in lines] == ["story"] * 3


def test_status_lists_the_running_trials_as_a_document_too(
    story: Story, capfd: pytest.CaptureFixture[str]
) -> None:
    with Driver(story.study, out=story.folder) as driver:
        number = story.ask(driver).number
        told = {"epoch": 3, "epochs": 8, "left_s": 90.0, "evaluated_at": time.time()}
        driver.describe(number, told)
        assert exit_code(["status", str(story.folder), "--json"]) == 0
    facts = json.loads(capfd.readouterr().out)
    (running,) = facts["running"]
    assert (running["number"], running["epoch"], running["epochs"]) == (number, 3, 8)
    assert running["left_s"] == pytest.approx(90.0, abs=30.0)
    assert facts["target"] == 6
    assert facts["left_s"] > 90.0


def test_a_folder_is_enough_and_no_folder_is_the_newest(
    story: Story, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert exit_code(["status", str(story.folder)]) == 0
    assert "Study story: 0 of 6 finished" in capfd.readouterr().out
    (tmp_path / "here" / "runs").mkdir(parents=True)
    (tmp_path / "here" / "runs" / "it").symlink_to(story.folder)
    monkeypatch.chdir(tmp_path / "here")
    assert exit_code(["status"]) == 0
    assert "Study story" in capfd.readouterr().out
    monkeypatch.setenv("OPTUNA_STORAGE", story.storage)
    monkeypatch.chdir(tmp_path)
    assert exit_code(["status"]) == 0
    monkeypatch.delenv("OPTUNA_STORAGE")
    assert exit_code(["status"]) == 2
    assert "none under runs" in capfd.readouterr().err


def test_without_a_terminal_each_event_is_one_line_and_stands_in_the_log(
    capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with LiveView("hydra", trials=10, log=tmp_path / "run.log") as view:
        for event in STORY:
            view.on_event(event)
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == len(STORY)
    assert lines[2].endswith(
        "trial 0: evaluation 2/4, epoch 5/10, error 0.2500, F1 0.7500, loss 0.5000"
    )
    assert lines[4].endswith("trial 2 failed: training: loss is NaN at step 7")
    assert lines[5].endswith("trial 3 saved at epoch 13 of 18, goes on with the same command")
    assert [line.split()[0].count(":") for line in lines] == [2] * len(STORY)
    logged = (tmp_path / "run.log").read_text().splitlines()
    assert [line.split(maxsplit=1)[1] for line in logged] == lines


def test_lines_say_where_the_study_stands(story: Story, capfd: pytest.CaptureFixture[str]) -> None:
    with Driver(story.study, out=story.folder) as driver:
        number = story.tell(driver, 0.044, 0.9)
    view = LiveView("story", trials=6, progress=lambda: study_progress(story.study))
    capfd.readouterr()
    view.on_event(Happened("trial_finished", number, {"adapted_rand_error": 0.044}))
    assert f"[1/6, best 0.0440 trial {number}] trial {number} complete" in capfd.readouterr().err


def test_event_lines_leave_out_what_is_not_known() -> None:
    assert event_line(Happened("waiting")) == "waiting"
    assert event_line(Happened("trial_started", 1, {"warm_start": None})) == "trial 1 starts"
    shown = {
        "data.augmentation.affine.enabled": True, "data.augmentation.intensity.enabled": False,
        "optimization.optimizer.lr": 0.01,
    }  # fmt: skip
    assert event_line(Happened("trial_started", 1, {"params": shown})) == (
        "trial 1 starts, affine.enabled True, intensity.enabled False, lr 0.0100"
    )
    assert event_line(Happened("evaluation", 1, {"step": 1})) == "trial 1: evaluation 1, "


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
    assert "mine[z 10:14]" in capfd.readouterr().err
    assert "Study [/a]" in shown(view)
