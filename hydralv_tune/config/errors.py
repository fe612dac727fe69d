"""The whole error tree. A message names the place, the value, the rule and the next step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches


class HydraLVError(Exception):
    """Base of every error that this package raises on purpose."""


class InputError(HydraLVError, ValueError):
    """The user's input is wrong: a file, a value, a key. The command line exits with 2."""


class ConfigError(InputError):
    """A candidate or a search space breaks a rule."""


class VolumeError(InputError):
    """A volume cannot be read, or its content breaks a rule."""


class CheckpointError(InputError):
    """A checkpoint cannot be read, or does not fit the network."""


class StudyError(InputError):
    """A study or its storage does not exist, does not answer, or does not fit the space."""


class TrialFailed(HydraLVError):
    """A trial failed while it worked; the study goes on.

    Args:
        stage: Where it failed: `training`, `prediction`, `sweep`, `worker`.
        reason: One line for the record.
        retry: Whether the same parameters may succeed another time (out of memory, a dead
            worker) or will not (not-a-number loss, a wrong value).
    """

    def __init__(self, stage: str, reason: str, *, retry: bool) -> None:
        super().__init__(f"{stage}: {reason}")
        self.stage = stage
        self.reason = reason
        self.retry = retry

    def __reduce__(self) -> tuple[object, ...]:
        """Rebuild with keyword arguments, so that it survives the way from worker to driver."""
        return (_rebuild_trial_failed, (self.stage, self.reason, self.retry))


def _rebuild_trial_failed(stage: str, reason: str, retry: bool) -> TrialFailed:
    """Return the error that was pickled."""
    return TrialFailed(stage, reason, retry=retry)


class TrialInterrupted(HydraLVError):
    """A trial was asked to stop, saved its state and can be continued."""

    exit_code = 130


class TrialTakenOver(TrialInterrupted):
    """Another attempt works in the trial's folder now: this one must not even save."""


def unknown_name(kind: str, name: object, known: Iterable[str]) -> str:
    """Return the message for a name outside a table, with the nearest known one first.

    Args:
        kind: What the table holds, in the singular: `architecture`, `key`.
        name: The name received.
        known: The names in the table.
    """
    names = sorted(known)
    near = get_close_matches(str(name), names, n=1)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    return f"Unknown {kind} '{name}'.{hint} Known: {', '.join(names)}."


@contextmanager
def as_input_error(place: str) -> Iterator[None]:
    """Turn a `ValueError` of the numerics, which know no files, into an error that names one.

    Args:
        place: File, volume or option that the values came from.
    """
    try:
        yield
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"{place}: {error}") from error
