"""How a study goes, for people: a table on a terminal, one line an event elsewhere and in a log."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from hydralv_tune.cli.console import console, format_value, say
from hydralv_tune.config.errors import HydraLVError
from hydralv_tune.numerics.formatting import duration, short_names

if TYPE_CHECKING:
    from hydralv_tune.study.progress import RunningTrial, StudyProgress

REFRESH_S = 10.0
"""Seconds after which the database is read again, for the trials of other drivers."""

ENDS = ("trial_finished", "trial_pruned", "trial_failed")
COLUMNS = ("trial", "recipe", "epoch", "eval", "steps", "s/step", "loss", "error", "F1", "left")
WIDE = 90
"""Columns of a terminal that has room for whole names."""
COLUMNS_OF_STATUS = ("trial", "recipe", "epoch", "eval", "error", "F1", "left", "heard", "host")


class EventLike(Protocol):
    """What the view reads of an event; `launch.Event` has it."""

    @property
    def kind(self) -> str: ...
    @property
    def number(self) -> int | None: ...
    @property
    def fields(self) -> Mapping[str, Any]: ...


def event_line(event: EventLike) -> str:
    """Return one event as a sentence.

    Args:
        event: What happened, to which trial.
    """
    fields = event.fields
    trial = f"trial {event.number}"
    if event.kind == "stage":
        return str(fields["text"])
    if event.kind == "trial_started":
        recipe = fields.get("warm_start") or fields.get("architecture")
        chosen = fields.get("params") or {}
        names = short_names(chosen)
        params = {names[key]: value for key, value in chosen.items()}
        return f"{trial} starts" + "".join(
            f", {part}"
            for part in (recipe, format_value(params) if params else None)
            if part is not None
        )
    if event.kind == "evaluation":
        return (
            f"{trial}: evaluation {_of(fields.get('step'), fields.get('evaluations'))}, "
            + _list(
                epoch=_of(fields.get("epoch"), fields.get("epochs")),
                error=_figure(fields.get("adapted_rand_error")),
                F1=_figure(fields.get("f1_iou50")),
                loss=_figure((fields.get("losses") or {}).get("total")),
            )
        )
    if event.kind == "trial_finished":
        return f"{trial} complete: " + _list(
            error=_figure(fields.get("adapted_rand_error")),
            foreground=_figure(fields.get("adapted_rand_error_foreground")),
            F1=_figure(fields.get("f1_iou50")),
        )
    if event.kind in ("trial_pruned", "trial_failed"):
        return _ended(trial, fields, pruned=event.kind == "trial_pruned")
    if event.kind == "retry":
        return f"{trial} continues trial {fields.get('retry_of')}, attempt {fields.get('attempt')}"
    return f"{event.kind}: {fields['reason']}" if fields.get("reason") else event.kind


def _ended(trial: str, fields: Mapping[str, Any], *, pruned: bool) -> str:
    """Return how a trial ended that is not complete."""
    reason = str(fields.get("reason") or "no reason given")
    if pruned:
        return f"{trial} {reason if reason.startswith('pruned') else f'pruned: {reason}'}"
    if reason.startswith("interrupted"):
        place = _of(fields.get("epoch"), fields.get("epochs")).replace("/", " of ")
        at = "" if place == "–" else f" at epoch {place}"
        return f"{trial} saved{at}, goes on with the same command"
    return f"{trial} failed: {reason}"


def _list(**figures: str) -> str:
    """Return what is known, with its names, in a row."""
    return ", ".join(f"{name} {text}" for name, text in figures.items() if text != "–")


def _figure(value: Any) -> str:
    """Return a score with four digits after the point; a dash where it is not known."""
    return "–" if value is None else format_value(float(value))


def _of(done: Any, total: Any) -> str:
    """Return `done/total`, as far as they are known."""
    if done is None:
        return "–"
    return str(done) if total is None else f"{done}/{total}"


def clock(seconds: float | None) -> str:
    """Return seconds as h:mm:ss, a dash where unknown."""
    if seconds is None:
        return "–"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class LiveView:
    """Shows counts, the best trial and each running trial, until it is left.

    Counts, best and time left are those of the database, so that a continued study shows what it
    has; steps and losses come from the events of this run.

    Args:
        study: Name of the study.
        trials: Finished trials that the study aims at.
        progress: Returns how the study stands; None before there is one.
        log: File that each line goes to as well.
        limit_s: Seconds after which this run ends, whatever is missing.
    """

    def __init__(
        self,
        study: str,
        *,
        trials: int,
        progress: Callable[[], StudyProgress | None] = lambda: None,
        log: Path | None = None,
        limit_s: float | None = None,
    ) -> None:
        self._study, self._trials, self._log = study, trials, log
        self._read_progress = progress
        self._ends = None if limit_s is None else time.monotonic() + limit_s
        self._progress: StudyProgress | None = None
        self._read_at = time.monotonic()
        self._stage = ""
        self._pending: list[str] = []
        self._steps: dict[int, dict[str, Any]] = {}
        stderr = console(stderr=True)
        self._live = (
            Live(self, console=stderr, refresh_per_second=1, transient=True)
            if stderr.is_terminal
            else None
        )

    def __enter__(self) -> LiveView:
        """Start drawing."""
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop drawing."""
        if self._live is not None:
            self._live.stop()

    def on_event(self, event: EventLike) -> None:
        """Take one event of the study in.

        Args:
            event: What happened, to which trial.
        """
        number = -1 if event.number is None else event.number
        changed = event.kind in (*ENDS, "trial_started", "evaluation")
        if changed or time.monotonic() - self._read_at > REFRESH_S:
            self._refresh()
        if event.kind == "stage":
            self._stage = str(event.fields["text"])
        elif event.kind in ENDS:
            self._steps.pop(number, None)
        elif event.number is not None:
            self._steps.setdefault(number, {}).update(event.fields)
        if event.kind != "progress":
            known = self._steps.get(number, {}) if event.kind == "evaluation" else event.fields
            self._say(
                event_line(_Known(event.kind, event.number, {**known, **event.fields})), event
            )

    def _say(self, text: str, event: EventLike) -> None:
        """Print a line with the clock and where the study stands, and write it into the log."""
        line = f"{datetime.now():%H:%M:%S} {self._standing()}{text}"
        self._pending.append(line)
        if event.kind == "stage":
            return  # a run that is refused while it reads leaves one message and no file
        if self._log is not None:
            day = f"{datetime.now():%Y-%m-%d}"
            with suppress(OSError), self._log.open("a", encoding="utf-8") as log:
                log.writelines(f"{day} {pending}\n" for pending in self._pending)
        if self._live is None or event.kind in (*ENDS, "retry", "stopped", "waiting"):
            for pending in self._pending if self._live is None else [line]:
                say(pending)
        self._pending.clear()

    def _standing(self) -> str:
        """Return finished trials and the best one in brackets, once there is a study."""
        now = self._progress
        if now is None:
            return ""
        best = (
            ""
            if now.best is None
            else f", best {_figure(now.best['value'])} trial {now.best['number']}"
        )
        return f"[{now.finished}/{now.target}{best}] "

    def _refresh(self) -> None:
        """Read how the study stands; what was read before stays where nothing answers."""
        self._read_at = time.monotonic()
        with suppress(HydraLVError):
            self._progress = self._read_progress() or self._progress

    def __rich__(self) -> Group:
        """Return what stands on the terminal now."""
        if self._progress is None:
            return Group(Text(f"Study {self._study}: {self._stage or 'starting'}"))
        hint = Text("Ctrl-C saves and stops; the same command continues.", style="dim")
        stops_s = None if self._ends is None else max(self._ends - time.monotonic(), 0.0)
        return Group(progress_table(self._progress, self._steps, stops_s), hint)


class _Known:
    """An event with what was known before it."""

    def __init__(self, kind: str, number: int | None, fields: Mapping[str, Any]) -> None:
        self.kind, self.number, self.fields = kind, number, fields


def progress_table(
    progress: StudyProgress,
    steps: Mapping[int, Mapping[str, Any]] | None = None,
    stops_s: float | None = None,
) -> Group:
    """Return counts, best and running trials; it fits 80 columns, and 24 rows with few cut off.

    Args:
        progress: How the study stands.
        steps: Steps, total and loss of the trials of this driver; without them each row says when
            a trial was last heard of, and where it runs.
        stops_s: Seconds after which this run ends, whatever is missing.
    """
    gone = (datetime.now() - progress.at).total_seconds()
    left = None if progress.left_s is None else max(progress.left_s - gone, 0.0)
    counts = ", ".join(f"{number} {name}" for name, number in progress.counts.items() if number)
    counts = counts or "no trial yet"
    if stops_s is not None and (left is None or left > stops_s):
        counts += f"; this run stops in {duration(stops_s)}"
    to_go = ", time left not known yet" if left is None else f", about {duration(left)} left"
    if not progress.running and progress.finished >= progress.target:
        to_go = ""
    elif not progress.running:
        to_go = ", nothing runs now" + ("" if left is None else f", about {duration(left)} to go")
    parts: list[Any] = [
        Text(
            f"Study {progress.study}: {progress.finished} of {progress.target} finished{to_go}",
            style="bold",
        ),
        Text(counts),
        best_line(progress.best, progress.guard_f1),
    ]
    live = steps is not None
    names = COLUMNS if live else COLUMNS_OF_STATUS
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for name in names:
        table.add_column(
            name, justify="left" if name in ("recipe", "host") else "right", no_wrap=True
        )
    stderr = console(stderr=True)
    longest = 18 if stderr.size.width >= WIDE or not live else 10
    room = max(stderr.size.height - 8, 3) if stderr.is_terminal else len(progress.running)
    for trial in progress.running[:room]:
        known = (steps or {}).get(trial.number, {}) if live else None
        table.add_row(*_cells(trial, known, gone, longest))
    if progress.running:
        parts.append(table)
    if len(progress.running) > room:
        parts.append(Text(f"and {len(progress.running) - room} more trials running"))
    parts += [Text(f"warning: {warning}", style="yellow") for warning in progress.warnings]
    return Group(*parts)


def best_line(best: Mapping[str, Any] | None, guard_f1: float) -> Text:
    """Return the best trial in a line, with a warning where it violates the guard."""
    if best is None:
        return Text("Best: no trial is complete yet")
    figures = _list(
        error=_figure(best.get("adapted_rand_error")),
        foreground=_figure(best.get("adapted_rand_error_foreground")),
        F1=_figure(best.get("f1_iou50")),
    )
    if best.get("feasible", True):
        return Text(f"Best: trial {best['number']}, {figures}", style="green")
    return Text(
        f"Best: trial {best['number']}, {figures}; "
        f"no trial meets the guard (F1 ≥ {guard_f1:g}) yet",
        style="yellow",
    )


def _cells(
    trial: RunningTrial, steps: Mapping[str, Any] | None, gone: float, longest: int
) -> list[str]:
    """Return the cells of a running trial; `longest` is what of its recipe's name there is room."""
    number = str(trial.number) if trial.root == trial.number else f"{trial.number} ({trial.root})"
    left = None if trial.left_s is None else max(trial.left_s - gone, 0.0)
    recipe = (trial.recipe or "–")[:longest]
    epoch = _of(trial.epoch, trial.epochs)
    evaluation = _of(trial.evaluation, trial.evaluations)
    scores = [_figure(trial.value), _figure(trial.f1)]
    if steps is None:
        heard = "–" if trial.heard_s is None else f"{duration(trial.heard_s + gone)} ago"
        return [number, recipe, epoch, evaluation, *scores, clock(left), heard, trial.host or "–"]
    if steps.get("left_s") is not None:  # of a moment ago; the database says it every half minute
        left = min(steps["left_s"], math.inf if trial.most_s is None else trial.most_s)
    loss = steps.get("loss", (steps.get("losses") or {}).get("total"))
    pace = "–" if steps.get("step_s") is None else f"{steps['step_s']:.2g}"
    done, total = steps.get("done"), steps.get("total")
    if trial.epochs and done is not None and total:
        epoch = _of(int(done / total * trial.epochs), trial.epochs)
    return [
        number,
        recipe,
        epoch,
        evaluation,
        _of(done, total),
        pace,
        _figure(loss),
        *scores,
        clock(left),
    ]
