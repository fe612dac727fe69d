"""One trial in a worker process: runs the trial function and says how it went; knows no Ray.

A trial function is `function(spec, report) -> record`: `spec` is the plain mapping of a
`TrialSpec`, `report` takes each `Evaluation` (or its mapping), and `record` is the mapping of a
`TrialRecord`. It continues from the checkpoint in `spec["out"]` by itself.
"""

from __future__ import annotations

import json
import math
import os
import socket
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from hydralv_tune.disk.mirror import Mirror
from hydralv_tune.vocabulary.errors import HydraLVError, TrialFailed, TrialInterrupted

Send = Callable[[dict[str, Any]], None]
OWNER_FILE = "attempt.json"
TRACEBACK_CHARACTERS = 4000


class TrialFunction(Protocol):
    """What a worker runs."""

    def __call__(self, spec: dict[str, Any], report: Reporter) -> Mapping[str, Any]: ...


class Reporter:
    """What a trial function calls: it sends evaluations and stops the trial when told.

    Args:
        send: Takes a message to the driver and returns once that has decided.
        should_stop: Whether the driver asks for the end.
        folder: Folder of the trial, shared by all its attempts.
        number: The trial's number, the latest of which owns the folder.
        mirror: Where the folder is copied to before each message, if anywhere.
    """

    def __init__(
        self,
        send: Send,
        should_stop: Callable[[], bool],
        folder: Path,
        number: int,
        mirror: Mirror | None = None,
    ) -> None:
        self._send, self._should_stop = send, should_stop
        self._folder, self._number, self._mirror = folder, number, mirror

    def __call__(self, evaluation: Any) -> None:
        """Send one evaluation.

        Raises:
            TrialFailed: The objective is not finite.
            TrialInterrupted: The trial is to end here.
        """
        message = evaluation if isinstance(evaluation, Mapping) else evaluation.as_mapping()
        value = float(message["value"])
        if not math.isfinite(value):
            raise TrialFailed("training", f"the objective is {value}", retry=False)
        self.check()
        if self._mirror is not None:
            self._mirror.push()
        self._send({**message, "kind": "evaluation"})
        self.check()

    def check(self) -> None:
        """Raise `TrialInterrupted` if the trial is to end."""
        if self.should_stop():
            raise TrialInterrupted(f"trial {self._number} was asked to stop")

    def should_stop(self) -> bool:
        """Return whether the trial is to save and end.

        A later attempt takes the folder over when this one's driver was silent for too long, and
        two writers must not share it.
        """
        return self._should_stop() or folder_owner(self._folder) not in (None, self._number)

    def claim(self) -> None:
        """Make this attempt the owner of the folder."""
        self._folder.mkdir(parents=True, exist_ok=True)
        # Not by `records`, which brings PyTorch: a worker that starts is to be light.
        temporary = self._folder / f".{OWNER_FILE}.{self._number}"
        temporary.write_text(json.dumps({"number": self._number}))
        os.replace(temporary, self._folder / OWNER_FILE)


def folder_owner(folder: Path) -> int | None:
    """Return the number of the attempt that owns a trial's folder, or None."""
    try:
        return int(json.loads((folder / OWNER_FILE).read_text())["number"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


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
        checkpoints: URL that the trial's folder is mirrored to; None where all nodes see it.
        place: What the launcher knows of where this runs, for the record.
    """
    folder, mirror = Path(spec["out"]), None
    try:
        if checkpoints is not None:
            mirror = Mirror(folder, checkpoints, str(spec["root"]))
            mirror.pull()
        report = Reporter(send, should_stop, folder, int(spec["number"]), mirror)
        report.claim()
        send({"kind": "started", **whereabouts(), **(place or {})})
        record = function(spec, report)
        if mirror is not None:
            mirror.push()
        send({"kind": "final", "record": plain(dict(record))})
    except TrialInterrupted:
        send({"kind": "interrupted"})
    # The trial's boundary: whatever it raises is its end, told with the reason.
    except Exception as error:
        send(failure(error))


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


def plain(value: Any) -> Any:
    """Return a value of JSON types alone: NaN and infinity as None, paths and scalars as text."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, bool | int | str) or value is None:
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if hasattr(value, "item"):
        return plain(value.item())
    return str(value)


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
