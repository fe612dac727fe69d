"""What people see: tables and progress on stderr, one JSON document on stdout."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

ProgressCallback = Callable[[int, int], None]


@cache
def console(*, stderr: bool = False) -> Console:
    """Return the console of a stream; Rich is imported only where a table or a bar is drawn.

    Names of studies, folders and recipes are a user's: what looks like markup or an emoji in them
    is none, so neither console knows any.
    """
    from rich.console import Console

    return Console(stderr=stderr, highlight=False, markup=False, emoji=False)


def _unwrapped(value: Any) -> Any:
    """Return Python's own numbers and lists for what NumPy holds, without importing it."""
    return value.tolist() if hasattr(value, "tolist") else value


def _finite(value: Any) -> Any:
    """Return the same structure with null for NaN and infinity, which JSON has no word for."""
    value = _unwrapped(value)
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def print_json(document: Mapping[str, Any], *, one_line: bool = False) -> None:
    """Print exactly one JSON document on stdout.

    Args:
        document: What is printed.
        one_line: On one line, as programs read documents that follow each other.
    """
    indent = None if one_line else 2
    sys.stdout.write(json.dumps(_finite(document), indent=indent, default=str) + "\n")
    sys.stdout.flush()


def say(text: str) -> None:
    """Print a line for people on stderr."""
    print(text, file=sys.stderr, flush=True)


def format_value(value: Any) -> str:
    """Return a value as people read it: four digits after the point, lists in brackets."""
    value = _unwrapped(value)
    if isinstance(value, float):
        if abs(value) >= 1000:
            return f"{value:,.1f}"
        return f"{value:.4g}" if 0 < abs(value) < 1e-3 else f"{value:.4f}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {format_value(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        shown = ", ".join(format_value(item) for item in value[:12])
        return f"[{shown}{', …' if len(value) > 12 else ''}]"
    return "–" if value is None else str(value)


def print_facts(title: str, facts: Mapping[str, Any]) -> None:
    """Print a two-column table of names and values on stdout."""
    from rich.table import Table

    table = Table(title=title, title_justify="left", show_header=False, box=None)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(str(name).replace("_", " "), format_value(value))
    console().print(table)


def print_rows(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print rows of the same keys as a table on stdout."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    # Narrow enough that the ten best combinations fit a terminal of 80 columns unbroken.
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, padding=0)
    for name in rows[0] if rows else []:
        table.add_column(str(name).replace("_", " "), justify="right", overflow="fold")
    for row in rows:
        table.add_row(*(format_value(value) for value in row.values()))
    console().print(table)


@contextmanager
def step_progress() -> Iterator[Callable[[str, int, int], None]]:
    """Show a bar for each step of a work on stderr; yield the callback `(step, done, whole)`.

    Where stderr is no terminal, a line says when a step begins and how far it is every minute.
    """
    with ExitStack() as stack:
        current, move, shown_at = "", None, 0.0

        def show(step: str, done: int, whole: int) -> None:
            nonlocal current, move, shown_at
            if step != current:
                current, shown_at = step, 0.0
                stack.close()
                move = stack.enter_context(progress_bar(step.capitalize()))
            assert move is not None
            move(done, whole)
            if not sys.stderr.isatty() and time.monotonic() - shown_at > 60:
                shown_at = time.monotonic()
                say(f"{step}: {done} of {whole}")

        yield show


@contextmanager
def progress_bar(description: str) -> Iterator[ProgressCallback]:
    """Show a bar on stderr and yield the callback `(done, total)` that moves it."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    terminal = console(stderr=True)
    with Progress(
        *columns, console=terminal, transient=True, disable=not terminal.is_terminal
    ) as progress:
        task = progress.add_task(description, total=None)

        def move(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        yield move
