"""The live view of a running study: a table on a terminal, one line per event elsewhere."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Protocol

from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from hydralv_tune.cli.console import format_value, say, stderr
from hydralv_tune.numerics.metrics.scores import HEADLINE

STATES = {
    "trial_finished": "complete",
    "trial_pruned": "pruned",
    "trial_failed": "fail",
}

TOLD = {
    "trial_started": ("warm_start", "architecture", "attempt", "params"),
    "evaluation": ("step", "epoch", *HEADLINE, "seconds"),
}
"""The fields worth a line of a log; every field of the other events is."""

COLUMNS = ("trial", "recipe", "epoch", "evaluation", "loss", "error", "F1", "ETA", "GPU memory")


class EventLike(Protocol):
    """What the view reads of an event; `launch.Event` has it."""

    @property
    def kind(self) -> str: ...
    @property
    def number(self) -> int | None: ...
    @property
    def fields(self) -> Mapping[str, Any]: ...


def event_line(event: EventLike) -> str:
    """Return one event as a line for a log file.

    Args:
        event: What happened, to which trial.
    """
    what = event.kind.replace("_", " ")
    who = "" if event.number is None else f" {event.number}"
    told = {name: event.fields.get(name) for name in TOLD.get(event.kind, tuple(event.fields))}
    told = {name: value for name, value in told.items() if value is not None}
    return f"{what}{who}" + (f": {format_value(told)}" if told else "")


def clock(seconds: float | None) -> str:
    """Return seconds as h:mm:ss, a dash where unknown."""
    if seconds is None:
        return "–"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class LiveView:
    """Show trials by state, the best score and each running trial, until it is left.

    Args:
        study: Name of the study.
        trials: Finished trials that the study aims at.
    """

    def __init__(self, study: str, *, trials: int) -> None:
        self._study = study
        self._trials = trials
        self._counts: Counter[str] = Counter()
        self._running: dict[int, dict[str, Any]] = {}
        self._best: dict[str, Any] | None = None
        self._started = time.monotonic()
        self._live = (
            Live(self, console=stderr, refresh_per_second=2, transient=True)
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
        if self._live is None or event.kind in (*STATES, "retry", "stopped", "waiting"):
            say(event_line(event))
        number = -1 if event.number is None else event.number
        if event.kind == "trial_started":
            self._running[number] = dict(event.fields)
        elif event.kind == "evaluation":
            self._running.setdefault(number, {}).update(event.fields)
        elif event.kind in STATES:
            self._running.pop(number, None)
            self._counts[STATES[event.kind]] += 1
            self._keep_best(event)

    def _keep_best(self, event: EventLike) -> None:
        """Remember the event if no earlier trial of this run finished better."""
        value = event.fields.get("value")
        if event.kind != "trial_finished" or value is None:
            return
        if self._best is None or value < self._best["value"]:
            self._best = {"number": event.number, **event.fields}

    def _left_s(self) -> float | None:
        """Return the seconds to the end of the budget at the pace so far."""
        done = self._counts["complete"] + self._counts["pruned"]
        if not done:
            return None
        pace = (time.monotonic() - self._started) / done
        return max(self._trials - done, 0) * pace

    def __rich__(self) -> Group:
        """Return what stands on the terminal now."""
        counts = {state: self._counts[state] for state in ("complete", "pruned", "fail")}
        head = Text(
            f"Study {self._study}: {format_value(counts)}, running {len(self._running)}, "
            f"aim {self._trials}, {clock(time.monotonic() - self._started)} so far, "
            f"{clock(self._left_s())} to go"
        )
        table = Table(box=None, pad_edge=False)
        for name in COLUMNS:
            table.add_column(name, justify="right")
        for number, facts in sorted(self._running.items()):
            table.add_row(str(number), *_cells(facts))
        parts: list[Any] = [head, table]
        if self._best is not None:
            told = {name: self._best.get(name) for name in HEADLINE}
            parts.append(Text(f"Best: trial {self._best['number']}, {format_value(told)}"))
        parts.append(Text("Ctrl-C saves and stops; the same command goes on.", style="dim"))
        return Group(*parts)


def _cells(facts: Mapping[str, Any]) -> list[str]:
    """Return the cells of one running trial."""
    recipe = facts.get("warm_start") or facts.get("architecture")
    memory = facts.get("gpu_memory_gb")
    return [
        "–" if recipe is None else str(recipe),
        _of(facts.get("epoch"), facts.get("epochs")),
        _of(facts.get("step"), facts.get("evaluations")),
        format_value((facts.get("losses") or {}).get("total")),
        format_value(facts.get("adapted_rand_error")),
        format_value(facts.get("f1_iou50")),
        clock(_left_s(facts)),
        "–" if memory is None else f"{memory:.1f} GB",
    ]


def _left_s(facts: Mapping[str, Any]) -> float | None:
    """Return the seconds to the end of a trial at its pace so far."""
    epoch, epochs, seconds = (facts.get(name) for name in ("epoch", "epochs", "seconds"))
    if not epoch or epochs is None or seconds is None:
        return None
    return float(seconds) / epoch * max(epochs - epoch, 0)


def _of(done: Any, total: Any) -> str:
    """Return `done/total`, as far as they are known."""
    if done is None:
        return "–"
    return str(done) if total is None else f"{done}/{total}"
