"""One run of a study."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import ray
from ray import tune

from hydralv_tune.artifacts.checkpoint_store import file_system, trial_name
from hydralv_tune.config.errors import HydraLVError
from hydralv_tune.config.plugins import registrations
from hydralv_tune.config.search_space import SearchSpace
from hydralv_tune.data.volumes import Volume, VolumePaths
from hydralv_tune.launch.cluster import Resources, check_before_ray, ray_cluster
from hydralv_tune.launch.coordinator import Coordinator, Event, TrialHook
from hydralv_tune.launch.ray_adapters import (
    StudyScheduler,
    StudySearcher,
    make_flag,
    make_trainable,
)
from hydralv_tune.launch.start import Start
from hydralv_tune.launch.trial_folder import fetch_folder
from hydralv_tune.launch.voxel_sizes import searchable
from hydralv_tune.launch.worker import Reporter, TrialFunction
from hydralv_tune.numerics.formatting import counted
from hydralv_tune.study.confirm import missing_repeats
from hydralv_tune.study.database import DatabaseAway
from hydralv_tune.study.driver import HEARTBEAT_S, Driver
from hydralv_tune.study.study import Study
from hydralv_tune.study.trial_views import GRACE_S, Asked, process_start
from hydralv_tune.trial.state import planned_split
from hydralv_tune.trial.training.lazy_reader import held_out_volumes, is_lazy, read_or_open
from hydralv_tune.trial.training.sampling import check_patch_fits

ENDLESS = 10**9
ENDED_AT_ONCE = (
    "Ended at once. What the running trials trained since their last evaluation is lost; the same "
    "command goes on from there."
)
SAVE_S = 30.0
SCRATCH, SCRATCH_KEPT_S = "hydralv-tune-", 24 * 3600.0


class StudyInterrupted(HydraLVError):
    """The study was stopped in order by Ctrl-C, SIGTERM or SIGHUP and can go on.

    Args:
        reason: For people.
        facts: As `run_study` returns them.
    """

    exit_code = 130

    def __init__(self, reason: str, facts: dict[str, Any]) -> None:
        super().__init__(f"{reason}. Run the same command again to go on.")
        self.facts = facts


def run_study(
    space: SearchSpace,
    volumes: Sequence[VolumePaths],
    *,
    study: str,
    storage: str,
    out: Path,
    trials: int | None = None,
    timeout_s: float | None = None,
    gpus_per_trial: float | None = None,
    cpus_per_trial: int | None = None,
    ray_address: str | None = None,
    trial_function: TrialFunction | None = None,
    on_event: Callable[[Event], None] | None = None,
    on_trial_end: TrialHook | None = None,
    on_trial_running: TrialHook | None = None,
    extend: bool = False,
    warm_start_from: str | None = None,
    learn_from: Sequence[str] = (),
    checkpoints: str | None = None,
    heartbeat_s: float = HEARTBEAT_S,
    grace_s: float = GRACE_S,
    save_s: float = SAVE_S,
) -> dict[str, Any]:
    """Start a study, or continue it, and return its facts.

    Args:
        space: What is searched.
        volumes: What is trained on and scored.
        study: Name of the study.
        storage: `sqlite:///FILE` or `postgresql+psycopg://…`.
        out: Folder of the study; trials go to `out/trials/ROOT`, where ROOT is the number of a
            trial's first attempt. All machines must see it.
        trials: COMPLETE and PRUNED trials in all; the space's budget by default.
        timeout_s: Wall clock of this call; the space's budget by default.
        gpus_per_trial: May be a fraction; 1 where there is a GPU by default, else 0.
        cpus_per_trial: Cores and threads of a trial; all, divided by the trials that fit, by
            default on GPUs, and 1 on a CPU.
        ray_address: Cluster to join; by default one starts here and ends with the call.
        trial_function: What a worker runs; `trial.run_trial` by default.
        on_event: Takes each event in the caller's thread.
        on_trial_end: Called with driver, number, state and attributes before each trial is told.
        on_trial_running: Called alike when a trial starts and after each of its evaluations.
        extend: Accept a space that differs from the stored one.
        warm_start_from: Another study of the same storage whose fitting trials are learnt from.
        learn_from: Earlier studies that teach ranks; as in `Start`.
        checkpoints: Path or URL (`s3://…`, `gs://…`) that the trials' folders are copied to, for
            nodes that do not share `out`; the best trial's folder is fetched at the end.
        heartbeat_s: Seconds between two signs of life.
        grace_s: Silence after which other drivers take this one's trials over.
        save_s: Seconds that workers get to save after a stop.

    Raises:
        StudyError: The storage does not answer, space or volumes have changed, or `out` is not
            the study's; nothing is written then.
        InputError: The cluster does not answer or cannot hold a single trial, or the space does
            not fit the volumes.
        StudyInterrupted: Ctrl-C, SIGTERM or SIGHUP came.
        StudyFailed: Trial after trial fails, or Ray died.
    """
    out = out.expanduser().resolve()
    if checkpoints is not None:
        file_system(checkpoints)
    # Wrong input must leave nothing behind, so all that can be refused comes before the study.
    check_before_ray(ray_address, gpus_per_trial, cpus_per_trial)
    if trial_function is None:
        space = searchable(space, volumes)
    wanted, limit_s = trials or space.budget.trials, timeout_s or space.budget.timeout_s
    start = Start(
        storage, study, space, out, extend, warm_start_from, tuple(map(str, learn_from)), wanted
    )
    start.check({})  # before volumes are read, which may take long
    tell_stage(on_event, f"Reading {counted(len(volumes), 'volume')}.")
    read = [] if trial_function is not None else open_volumes(space, volumes)
    fingerprints = {volume.name: volume.fingerprint() for volume in read}
    start.check(fingerprints)
    if read:
        check_candidates(space, read, volumes)
    interrupted: str | None = None
    opened: Study | None = None
    tell_stage(on_event, f"Joining Ray at {ray_address}." if ray_address else "Starting Ray.")
    try:
        with ray_cluster(ray_address, [v for v in read if not is_lazy(v)]) as cluster:
            resources = Resources(gpus_per_trial, cpus_per_trial)
            opened = start.open(fingerprints)
            with Driver(opened, out=out, heartbeat_s=heartbeat_s, grace_s=grace_s) as driver:
                function = trial_function or _real_trial(volumes, read)
                deadline = time.monotonic() + limit_s if limit_s else None
                for again in (False, True):
                    coordinator = Coordinator(
                        driver,
                        trials=wanted,
                        again=again,
                        specification=_specification(space, volumes, out, study, resources),
                        slots=resources.slots,
                        gpus_per_trial=resources.gpus,
                        timeout_s=deadline and max(deadline - time.monotonic(), 1e-3),
                        save_s=save_s,
                        on_event=on_event,
                        on_trial_end=on_trial_end,
                        on_trial_running=on_trial_running,
                        ray_is_alive=cluster.is_alive,
                    )
                    cluster.last_words = coordinator.abandon
                    cluster.is_interrupted = partial(_wants_to_stop, coordinator)
                    interrupted = _tune(coordinator, resources, function, checkpoints)
                    if coordinator.failure is not None:
                        raise coordinator.failure
                    is_over = coordinator.search_is_over and interrupted is None
                    if not (is_over and _are_repeated(opened, wanted, on_event)):
                        break
        facts = _facts(opened, out, checkpoints)
    except DatabaseAway:
        if interrupted is None:
            raise
        facts = {}  # what is not told yet waits in the journal
    finally:
        if opened is not None:
            opened.close()
    if interrupted is not None:
        raise StudyInterrupted(interrupted, facts)
    return facts


def _wants_to_stop(coordinator: Coordinator) -> bool:
    """Return whether a signal came."""
    return coordinator.stop_wanted is not None


def _are_repeated(study: Study, trials: int, on_event: Callable[[Event], None] | None) -> bool:
    """Return whether trials of a study that is over are still to be trained again, and say so."""
    views = study.trials()
    again = [trial for trial, _ in missing_repeats(study.space, views, trials)]
    waiting = [t for t in views if t.is_repeat and t.state in ("WAITING", "RUNNING")]
    if again:
        numbers = ", ".join(str(number) for number in dict.fromkeys(one.number for one in again))
        tell_stage(on_event, f"The search is over. Trained again with other seeds: {numbers}.")
    return bool(again or waiting)


def tell_stage(on_event: Callable[[Event], None] | None, text: str) -> None:
    """Say what takes time before the first trial."""
    if on_event is not None:
        on_event(Event("stage", None, {"text": text}))


def _facts(study: Study, out: Path, checkpoints: str | None) -> dict[str, Any]:
    """Return the facts of a study, once the best trial's folder is here."""
    best = study.best()
    if checkpoints is not None and best is not None:
        name = trial_name(study.name, best.root)
        fetch_folder(out / "trials" / str(best.root), best.number, url=checkpoints, name=name)
    return study.facts()


def check_candidates(
    space: SearchSpace, volumes: Sequence[Volume], paths: Sequence[VolumePaths]
) -> None:
    """Refuse volumes that no trial could be trained or scored on, as `train` refuses them at once.

    Args:
        space: Its base is checked, and each warm start whose `data` differ from the base's.
        volumes: As `open_volumes` returns them.
        paths: Of the same.

    Raises:
        InputError: A part of the split has no truth, a held-out volume is unknown, and the like.
    """
    base = space.candidate({})
    starts = [space.candidate({}, space.warm_start(name).overrides) for name in space.warm_starts]
    for candidate in (base, *(start for start in starts if start.data != base.data)):
        planned_split(candidate, volumes, held_out_volumes(candidate.data, paths))


def open_volumes(space: SearchSpace, volumes: Sequence[VolumePaths]) -> list[Volume]:
    """Return the volumes of a study, checked; those over `data.memory_limit_gb` stay on disk.

    Args:
        space: Whose patches must fit.
        volumes: Where they lie.

    Raises:
        VolumeError: One cannot be read, or breaks a rule.
        InputError: No patch fits into one.
    """
    data = space.candidate({}).data
    opened = []
    for paths in volumes:
        volume = read_or_open(paths, data.memory_limit_gb)
        shape = zip(volume.image.shape, data.pad_size, strict=True)
        check_patch_fits(volume.name, [side + 2 * pad for side, pad in shape], data.patch_size)
        opened.append(volume)
    return opened


def _tune(
    coordinator: Coordinator, resources: Resources, function: TrialFunction, checkpoints: str | None
) -> str | None:
    """Let Ray Tune run trials while the coordinator has any; return the signal that ended it."""
    flag = make_flag()
    trainable = tune.with_resources(
        make_trainable(function, flag, checkpoints), {"cpu": resources.cpus, "gpu": resources.gpus}
    )
    with _signals(coordinator) as received:
        try:
            while not _fit(coordinator, flag, trainable, reuse_actors=not resources.gpus):
                pass
        except Exception:
            # `scancel` ends Ray's daemons with the signal that this process got: no fault of Ray.
            if not received or coordinator.ray_is_alive():
                raise
        finally:
            coordinator.abandon()
    return received[0] if received else None


def _fit(coordinator: Coordinator, flag: Any, trainable: Any, *, reuse_actors: bool) -> bool:
    """Run Ray Tune once, and return False where it gave up over processes that Ray killed.

    A node that runs low on memory has a worker killed, which ends Ray Tune as a whole: it knows
    errors of actors and of tasks only. What was live is told, and the next fit goes on.
    """
    scratch = _scratch_folder()
    tuner = tune.Tuner(
        trainable,
        tune_config=tune.TuneConfig(
            search_alg=StudySearcher(coordinator),
            scheduler=StudyScheduler(coordinator, flag),
            num_samples=ENDLESS,
            # A fresh process a trial frees a GPU's memory for sure. On a CPU it frees nothing that
            # matters, and costs 2 s against 0.5 s, and the imports of PyTorch and MONAI again.
            reuse_actors=reuse_actors,
        ),
        run_config=tune.RunConfig(
            name="study",
            storage_path=str(scratch),
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=0),
        ),
    )
    try:
        tuner.fit()
    except RuntimeError as error:
        if not isinstance(error.__cause__, ray.exceptions.OutOfMemoryError):
            raise
        coordinator.on_losses("worker: killed, since its machine ran low on memory")
        return False
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return True


def _scratch_folder() -> Path:
    """Return an empty folder for what Ray Tune writes; old ones of killed drivers are removed."""
    for path in Path(tempfile.gettempdir()).glob(f"{SCRATCH}*-*"):
        owner = path.name.removeprefix(SCRATCH).split("-")[0]
        with suppress(OSError):
            is_old = time.time() - path.stat().st_mtime > SCRATCH_KEPT_S
            if is_old and owner.isdigit() and process_start(int(owner)) is None:
                shutil.rmtree(path, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"{SCRATCH}{os.getpid()}-"))


def _specification(
    space: SearchSpace,
    volumes: Sequence[VolumePaths],
    out: Path,
    study: str,
    resources: Resources,
) -> Callable[[Asked], dict[str, Any]]:
    """Return what makes the `TrialSpec` mapping of a trial that was asked for."""

    def specification(asked: Asked) -> dict[str, Any]:
        overrides: Mapping[str, Any] = {}
        if asked.overrides is not None:
            overrides = asked.overrides
        elif asked.warm_start is not None:
            overrides = space.warm_start(asked.warm_start).overrides
        candidate = space.candidate(asked.params, overrides).as_mapping()
        # What decides the score stands in the candidate, so that its file alone repeats it.
        if candidate["test"]["decoding_grid"] is None:
            candidate["test"]["decoding_grid"] = space.decoding.model_dump(mode="json")
        if not resources.gpus and candidate["system"]["cpu_threads"] is None:
            candidate["system"]["cpu_threads"] = resources.cpus
        candidate["system"]["seed"] += asked.seed_shift
        return {
            "number": asked.number,
            "root": asked.root,
            "candidate": candidate,
            "objective": space.objective.model_dump(mode="json"),
            "grid": candidate["test"]["decoding_grid"],
            "volumes": [asdict(paths) for paths in volumes],
            "out": str(out / "trials" / str(asked.root)),
            "device": "auto" if resources.gpus else "cpu",
            "threads": resources.cpus,
            "study": study,
            "timeout_s": space.budget.trial_timeout_s,
        }

    return specification


def _real_trial(paths: Sequence[VolumePaths], volumes: Sequence[Volume]) -> TrialFunction:
    """Return the trial function of real work.

    The volumes lie once in Ray's memory; a lazy one is opened by each worker from its path.
    """
    places = list(paths)
    shared = ray.put([None if is_lazy(volume) else volume for volume in volumes])
    registered = registrations()

    def function(spec: dict[str, Any], report: Reporter) -> Mapping[str, Any]:
        import ray

        from hydralv_tune.config.plugins import register_again
        from hydralv_tune.trial.run import TrialSpec, run_trial
        from hydralv_tune.trial.training.lazy_reader import open_volume

        register_again(registered)
        record = run_trial(
            TrialSpec.from_mapping(spec),
            report,
            volumes=[
                open_volume(place) if volume is None else volume
                for place, volume in zip(places, ray.get(shared), strict=True)
            ],
            should_stop=report.should_stop,
            live=report.progress,
        )
        return {**record.as_mapping(), "record": str(record.path)}

    return function


@contextmanager
def _signals(coordinator: Coordinator) -> Iterator[list[str]]:
    """Turn Ctrl-C, SIGTERM and a closed terminal into an orderly stop; a second one ends at once.

    `nohup` has SIGHUP ignored, and that stays.
    """
    received: list[str] = []

    def handle(number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if received:
            raise KeyboardInterrupt(ENDED_AT_ONCE)
        received.append(f"Stopped by {name}")
        # Only noted here: an event printed from within a handler could meet a half-printed one.
        coordinator.stop_wanted = f"stopped by {name}"

    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    kinds = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        kinds.append(signal.SIGHUP)
    before = {kind: signal.signal(kind, handle) for kind in kinds}
    try:
        yield received
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)
