"""One trial from volumes to record: train, evaluate, keep the best, go on after a kill.

It knows neither Optuna nor Ray: what it is told is plain, and so is what it reports.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from signal import SIGINT, SIGTERM
from types import FrameType
from typing import Any

import torch

from hydralv_tune.artifacts import records
from hydralv_tune.artifacts.records import TrialRecord
from hydralv_tune.artifacts.writing import write_atomically
from hydralv_tune.config.errors import HydraLVError, InputError, TrialFailed, TrialTakenOver
from hydralv_tune.config.yaml_io import dump_yaml
from hydralv_tune.data.volumes import Volume
from hydralv_tune.numerics.cores import usable_cores
from hydralv_tune.numerics.networks.memory import is_out_of_memory
from hydralv_tune.trial.record import check_continues
from hydralv_tune.trial.scoring.prediction import pick_device
from hydralv_tune.trial.spec import Evaluation, TrialSpec
from hydralv_tune.trial.state import TrialRun
from hydralv_tune.trial.training.lazy_reader import held_out_volumes, read_or_open

Report = Callable[[Evaluation], None]
Progress = Callable[[int, int], None]


def run_trial(
    spec: TrialSpec,
    report: Report,
    volumes: Sequence[Volume] | None = None,
    progress: Progress | None = None,
    live: Callable[[Mapping[str, Any]], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> TrialRecord:
    """Train, evaluate and record one trial, and return its record.

    A folder with a checkpoint is continued; the evaluations it holds are reported again first.
    Where they swept other thresholds than are asked for now, their best checkpoint is scored anew.
    A finished trial of the same candidate and volumes returns its record at once.

    Args:
        spec: What to do.
        report: Told each evaluation; what it raises ends the trial and passes through.
        volumes: Already read; read from the spec's paths without.
        progress: Told optimizer steps done and in all.
        live: Told every few seconds of training: steps `done`, `total`, and the mean `loss`.
        should_stop: Asked before each step; the trial then saves its state and raises.

    Raises:
        InputError: The candidate does not fit the volumes, or the folder holds another trial.
        TrialFailed: It cannot be finished; `retry` says whether another attempt may.
        TrialInterrupted: `should_stop` said so.
    """
    out = Path(spec.out)
    with stage("reading"):
        given = _read(spec) if volumes is None else list(volumes)
        held_out = held_out_volumes(spec.candidate.data, spec.volumes)
    found = _finished(spec, [*given, *held_out])
    if found is not None:
        return found
    device = pick_device(spec.device)
    if device.type == "cuda":
        # Events and fresh tensors go to the current GPU.
        torch.cuda.set_device(device)
    deadline = None if spec.timeout_s is None else time.monotonic() + spec.timeout_s
    with _threads(spec.threads or spec.candidate.system.cpu_threads):
        with stage("preparing"):
            run = TrialRun(spec, given, held_out, device)
            out.mkdir(parents=True, exist_ok=True)
            run.resume()
            write_atomically(out / "config.yaml", dump_yaml(spec.candidate.as_mapping()).encode())

        def stop() -> bool:
            if deadline is not None and time.monotonic() > deadline:
                raise _TimeIsUp
            return should_stop is not None and should_stop()

        try:
            with stage("evaluation"):
                run.score_anew()
            for row in run.history:
                report(_evaluation(row))
            while not run.is_trained:
                try:
                    with stage("training"):
                        run.train(stop, progress, live)
                except _TimeIsUp:
                    if not run.history:
                        reason = f"took longer than {spec.timeout_s:g} s, without any evaluation"
                        raise TrialFailed("training", reason, retry=False) from None
                    run.end_early(f"its time of {spec.timeout_s:g} s was over")
                    break
                with stage("evaluation"):
                    row = run.evaluate()
                report(_evaluation(row))
            with stage("evaluation"):
                return run.finish()
        except TrialTakenOver:
            raise  # the folder is another attempt's
        except BaseException as error:
            run.record_end(error)
            raise
        finally:
            run.close()


class _TimeIsUp(HydraLVError):
    """A trial has trained for as long as it may."""


def _evaluation(row: Mapping[str, Any]) -> Evaluation:
    """Return what a row of the history reports."""
    return Evaluation(
        step=int(row["evaluation"]),
        epoch=int(row["epoch"]),
        value=float(row["best_value"]),
        best_f1_iou50=row.get("best_f1_iou50"),
        metrics=dict(row["metrics"]),
        losses=dict(row["losses"]),
        seconds=float(row["seconds"]),
        checkpoint=row["checkpoint"],
        gpu_memory_gb=row.get("gpu_memory_gb"),
        best_folds=row.get("best_folds"),
    )


def _finished(spec: TrialSpec, volumes: Sequence[Volume]) -> TrialRecord | None:
    """Return the record of a complete trial; None where other thresholds are asked for.

    Args:
        spec: What is asked for.
        volumes: All that it trains on or scores: their content tells whether the record answers.

    Raises:
        InputError: It is that of another candidate or of other volumes.
    """
    path = Path(spec.out) / "record.json"
    if not path.exists():
        return None
    record = records.read_record(path)
    if record.state != "complete":
        return None
    fingerprints = [volume.fingerprint() for volume in volumes]
    check_continues(spec.out, record.config, record.volumes, spec.candidate, fingerprints)
    swept = {"objective": record.objective, "grid": record.grid}
    # The training is done, and `TrialRun` will know; another grid only needs another sweep.
    return record if swept == spec.ranking else None


def _read(spec: TrialSpec) -> list[Volume]:
    """Return the volumes of a spec; those over `data.memory_limit_gb` stay on disk.

    Raises:
        VolumeError: One cannot be read.
    """
    limit_gb = spec.candidate.data.memory_limit_gb
    return [read_or_open(paths, limit_gb) for paths in spec.volumes]


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Turn what goes wrong in a stage of a trial into `TrialFailed`: the trial's boundary.

    Args:
        name: `reading`, `preparing`, `training`, `evaluation`.
    """
    try:
        yield
    except HydraLVError:
        raise
    except OSError as error:
        reason = f"{error.strerror or error}: {error.filename or 'no file named'}"
        raise TrialFailed(name, reason, retry=True) from error
    except Exception as error:
        if is_out_of_memory(error):
            raise TrialFailed(name, f"out of memory: {_line(error)}", retry=True) from error
        raise TrialFailed(name, f"{type(error).__name__}: {_line(error)}", retry=False) from error


def _line(error: Exception) -> str:
    """Return the first line of an error's text."""
    text = str(error).strip()
    return text.splitlines()[0] if text else "no reason given"


@contextmanager
def stop_on_signal() -> Iterator[Callable[[], bool]]:
    """Yield a `should_stop` that is true once Ctrl-C or SIGTERM came; the second one ends at once.

    Only for the main thread of a process of its own.
    """
    asked = False

    def remember(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    before = {number: signal.signal(number, remember) for number in (SIGINT, SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Let torch use so many CPU threads for a while; all that this process may use without."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or usable_cores())
    try:
        yield
    finally:
        torch.set_num_threads(before)


__all__ = ["Evaluation", "InputError", "TrialRecord", "TrialSpec", "run_trial", "stop_on_signal"]
