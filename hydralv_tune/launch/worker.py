"""One trial in a worker process: runs the trial function and says how it went; knows no Ray.

A trial function is `function(spec, report) -> record`: `spec` is the plain mapping of a
`TrialSpec`, `report` takes each `Evaluation` (or its mapping), and `record` is the mapping of a
`TrialRecord`. It continues from the checkpoint in `spec["out"]` by itself.
"""

from __future__ import annotations

import math
import os
import socket
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

from hydralv_tune.artifacts.checkpoint_store import trial_name
from hydralv_tune.artifacts.records import plain
from hydralv_tune.config.errors import HydraLVError, TrialFailed, TrialInterrupted, TrialTakenOver
from hydralv_tune.launch.trial_folder import TrialFolder

Send = Callable[[dict[str, Any]], None]
TRACEBACK_CHARACTERS = 4000


class TrialFunction(Protocol):
    """What a worker runs."""

    def __call__(self, spec: dict[str, Any], report: Reporter) -> Mapping[str, Any]: ...


class Reporter:
    """What a trial function calls: it sends evaluations and stops the trial on request.

    Args:
        send: Takes a message to the driver and returns once that has decided.
        should_stop: Whether the driver asks for the end.
        folder: Of the trial, which all its attempts share; pushed before an evaluation is sent.
        number: The trial's number.
    """

    def __init__(
        self,
        send: Send,
        should_stop: Callable[[], bool],
        folder: TrialFolder,
        number: int,
    ) -> None:
        self._send, self._should_stop = send, should_stop
        self._folder, self._number = folder, number

    def __call__(self, evaluation: Any) -> None:
        """Send one evaluation.

        Raises:
            TrialFailed: The objective is not finite.
            TrialInterrupted: The trial is to end here.
            TrialTakenOver: Another attempt works on it since.
        """
        message = evaluation if isinstance(evaluation, Mapping) else evaluation.as_mapping()
        value = float(message["value"])
        if not math.isfinite(value):
            raise TrialFailed("training", f"the objective is {value}", retry=False)
        self.check()
        self._folder.push()
        # A driver may sleep over the answer, and another take the trial over meanwhile.
        with self._folder.aside():
            self._send({**message, "kind": "evaluation"})
        self._folder.check()
        self.check()

    def progress(self, fields: Mapping[str, Any]) -> None:
        """Send how far the training is between two evaluations.

        Args:
            fields: `done`, `total` (optimizer steps) and `loss`.
        """
        with self._folder.aside():
            self._send({**plain(fields), "kind": "progress"})

    def check(self) -> None:
        """Raise `TrialInterrupted` if the trial is to end."""
        if self.should_stop():
            raise TrialInterrupted(f"trial {self._number} was asked to stop")

    def should_stop(self) -> bool:
        """Return whether the trial is to save and end."""
        return self._should_stop() or self._folder.is_lost()


def run_worker(
    spec: dict[str, Any],
    *,
    send: Send,
    should_stop: Callable[[], bool],
    function: TrialFunction,
    checkpoints: str | None = None,
    place: Mapping[str, Any] | None = None,
) -> None:
    """Run one trial and send how it started, went and ended; never raises for the trial's faults.

    Args:
        spec: Mapping of a `TrialSpec`.
        send: Takes a message of plain JSON types to the driver.
        should_stop: Asked now and then; true ends the trial without a fault.
        function: The trial function.
        checkpoints: URL that the trial's folder is copied to, and fetched from where another
            node has gone further; None where all nodes see the folder.
        place: What the launcher knows of where this runs, for the record.
    """
    path, number = Path(spec["out"]), int(spec["number"])
    name = "" if checkpoints is None else trial_name(spec["study"], spec["root"])
    folder = TrialFolder(path, number, url=checkpoints, name=name)
    has_begun = False
    try:
        folder.take()
        has_begun = True
        started = {"kind": "started", **whereabouts(), **(place or {})}
        if folder.note is not None:
            started["hand_over"] = folder.note
        with folder.aside():
            send(started)
        with _log_of(path, number):
            record = function(spec, Reporter(send, should_stop, folder, number))
        folder.push()
        last = {"kind": "final", "record": plain(dict(record))}
    except TrialTakenOver as error:
        if has_begun:
            return  # its driver has lost the trial too; there is nobody to tell
        last = failure(error)  # the database refuses it, or the folder is of another study
    except TrialInterrupted:
        last = {"kind": "interrupted"}
        if has_begun and not _is_pushed(folder, number):
            return
    # The trial's boundary: whatever it raises is its end, told with the reason.
    except Exception as error:
        last = failure(error)
    finally:
        folder.let_go()
    send(last)


def _is_pushed(folder: TrialFolder, number: int) -> bool:
    """Push what an interrupted trial has saved, so that no other node repeats its steps.

    Returns:
        False where a later attempt has taken the trial over: there is nobody to tell. What cannot
        be copied costs steps on another node, and is no fault of the trial.
    """
    try:
        folder.push()
    except TrialTakenOver:
        return False
    except Exception as error:
        print(f"trial {number}: its last steps stay on this node: {error}", file=sys.stderr)
    return True


@contextmanager
def _log_of(folder: Path, number: int) -> Iterator[None]:
    """Send what the trial prints, warns and fails with to `log.txt` of its folder."""
    try:
        log = (folder / "log.txt").open("a", buffering=1, encoding="utf-8")
    except OSError:
        yield  # a full disk costs the log, and is met by the trial itself
        return
    with log, redirect_stdout(log), redirect_stderr(log):
        print(f"{datetime.now():%Y-%m-%d %H:%M:%S} trial {number} on {socket.gethostname()}")
        try:
            yield
        except BaseException:
            traceback.print_exc()
            raise


def failure(error: Exception) -> dict[str, Any]:
    """Return the message of a failed trial.

    Args:
        error: What the trial function raised. What may pass another time (a full card, a lost
            file system) is tried again; what cannot (not a number, a wrong value) is not.
    """
    stage, reason = "worker", f"{type(error).__name__}: {error}".strip()
    retry = not isinstance(error, ValueError | TypeError | LookupError | AssertionError)
    if isinstance(error, HydraLVError):
        reason, retry = str(error), False
    if isinstance(error, TrialFailed):
        stage, reason, retry = error.stage, error.reason, error.retry
    trace = "".join(traceback.format_exception(error))[-TRACEBACK_CHARACTERS:]
    return {
        "kind": "failed",
        "stage": stage,
        "reason": reason[:TRACEBACK_CHARACTERS],
        "retry": "counted" if retry else "no",
        "traceback": trace,
    }


def whereabouts() -> dict[str, Any]:
    """Return host, process and visible devices of this worker."""
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "cuda_visible_devices": os.environ.get("CUDA_VISIBLE_DEVICES"),
    }


class StopFlag:
    """Tells every worker of this driver, on whatever machine, to save and end."""

    def __init__(self) -> None:
        self._raised = False

    def raise_it(self) -> None:
        """Ask the workers to end."""
        self._raised = True

    def is_raised(self) -> bool:
        """Return whether they are asked to."""
        return self._raised
