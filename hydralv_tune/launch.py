"""Run a study on Ray; the only file that imports Ray.

    facts = run_study(space, volumes, study="hydra", storage="sqlite:///runs/hydra/study.db",
                      out=Path("runs/hydra"), trials=60, gpus_per_trial=1.0,
                      on_event=lambda event: print(event.kind, event.number, event.fields))

starts the study, or continues the one of that name, until `trials` are COMPLETE or PRUNED in all,
or a budget of the space ends it, and returns what `status --json` prints. Ctrl-C and SIGTERM let
the workers save and raise `StudyInterrupted`, which carries the same facts; the same call goes on.

Events (`bridge.Event`: kind, number, fields) are `trial_started`, `evaluation`,
`trial_finished`, `trial_pruned`, `trial_failed`, `retry`, `waiting` and `stopped`.

One bridge has two faces towards Ray Tune: a `Searcher` that asks the study and a
`TrialScheduler` that hands it every result and stops what it prunes. Ray keeps no state that
matters: `Tuner.restore` is never used, and the database decides.
"""

from __future__ import annotations

import json
import logging
import math
import os
import secrets
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AIR_NEW_OUTPUT": "0",  # the new one prints on stdout whatever the verbosity
    "RAY_DISABLE_IMPORT_WARNING": "1",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # volumes and folders keep their relative meaning
    "RAY_TQDM_PATCH_PRINT": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_FORCE_TRIAL_CLEANUP_S": "10",  # a worker that does not end by itself is killed
    "TUNE_GLOBAL_CHECKPOINT_S": "600",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "TUNE_RESULT_BUFFER_LENGTH": "1",
    "TUNE_WARN_INSUFFICENT_RESOURCE_THRESHOLD_S": "3600",
}
for _name, _value in ENVIRONMENT.items():
    os.environ.setdefault(_name, _value)

import ray  # noqa: E402 - Ray reads its environment on import
from ray import tune  # noqa: E402
from ray.tune.schedulers import TrialScheduler  # noqa: E402
from ray.tune.search import Searcher  # noqa: E402

from hydralv_tune.bridge import Bridge, Event, StudyFailed  # noqa: E402
from hydralv_tune.errors import HydraLVError, InputError  # noqa: E402
from hydralv_tune.mirror import Mirror  # noqa: E402
from hydralv_tune.sampling import check_patch_fits  # noqa: E402
from hydralv_tune.space import SearchSpace  # noqa: E402
from hydralv_tune.study import (  # noqa: E402
    GRACE_S,
    HEARTBEAT_S,
    OUT,
    DatabaseAway,
    Driver,
    Study,
    open_readonly,
)
from hydralv_tune.trial_view import Asked  # noqa: E402
from hydralv_tune.volumes import Volume, VolumePaths, read_volume  # noqa: E402
from hydralv_tune.worker import Reporter, TrialFunction  # noqa: E402

__all__ = ["Event", "StudyFailed", "StudyInterrupted", "run_study"]

MESSAGE = "hydralv"
ENDLESS = 10**9
SAVE_S = 30.0
STOP_POLL_S = 1.0
RESOURCES_EVERY_S = 3.0
OBJECT_STORE_BYTES = 200 * 2**20

TrialEndHook = Callable[[Driver, int, str, Mapping[str, Any]], None]


class StudyInterrupted(HydraLVError):  # noqa: N818 - what happened, as TrialFailed
    """The study was stopped in order by Ctrl-C or SIGTERM and can go on.

    Args:
        reason: For people.
        facts: As `run_study` returns them.
    """

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
    on_trial_end: TrialEndHook | None = None,
    extend: bool = False,
    warm_start_from: str | None = None,
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
        extend: Accept a space that differs from the stored one.
        warm_start_from: Another study of the same storage whose fitting trials are learnt from.
        checkpoints: Path or URL (`s3://…`, `gs://…`) that the trials' folders are mirrored to, for
            nodes that do not share `out`; the best trial's folder is fetched at the end.
        heartbeat_s: Seconds between two signs of life.
        grace_s: Silence after which other drivers take this one's trials over.
        save_s: Seconds that workers get to save after a stop.

    Raises:
        StudyError: The storage does not answer, or the space has changed.
        InputError: The cluster cannot hold a single trial.
        StudyInterrupted: Ctrl-C or SIGTERM came.
        StudyFailed: Trial after trial fails.
    """
    out = out.expanduser().resolve()
    # Wrong input must leave nothing behind, so the volumes come before the study.
    read = [] if trial_function is not None else [read_volume(paths) for paths in volumes]
    _check_patches(space, read)
    interrupted: str | None = None
    opened = Study.open(storage, study, space=space, create=True, extend=extend)
    try:
        opened.remember(OUT, str(out))
        if warm_start_from is not None:
            source = open_readonly(storage, warm_start_from)
            opened.import_trials(source)
            source.close()
        opened.settle_volumes({v.name: v.fingerprint() for v in read}, extend=extend)
        with (
            _ray(ray_address, read),
            Driver(opened, out=out, heartbeat_s=heartbeat_s, grace_s=grace_s) as driver,
        ):
            resources = _Resources(gpus_per_trial, cpus_per_trial)
            bridge = Bridge(
                driver,
                trials=trials or space.budget.trials,
                specification=_specification(space, volumes, out, study, resources),
                slots=resources.slots,
                gpus_per_trial=resources.gpus,
                timeout_s=timeout_s or space.budget.timeout_s,
                save_s=save_s,
                on_event=on_event,
                on_trial_end=on_trial_end,
            )
            function = trial_function or _real_trial(read)
            interrupted = _tune(bridge, resources, function, checkpoints)
        if bridge.failure is not None:
            raise bridge.failure
        facts = _facts(opened, out, checkpoints)
    except DatabaseAway:
        if interrupted is None:
            raise
        facts = {}  # what is not told yet waits in the journal
    finally:
        opened.close()
    if interrupted is not None:
        raise StudyInterrupted(interrupted, facts)
    return facts


def _facts(study: Study, out: Path, checkpoints: str | None) -> dict[str, Any]:
    """Return the facts of a study, once the best trial's folder is here."""
    best = study.best()
    if checkpoints is not None and best is not None:
        Mirror(out / "trials" / str(best.root), checkpoints, str(best.root)).pull()
    return study.facts()


def _check_patches(space: SearchSpace, volumes: Sequence[Volume]) -> None:
    """Refuse a space whose patches fit no volume, before the first trial is asked for."""
    data = space.candidate({}).data
    for volume in volumes:
        sides = [
            side + 2 * pad for side, pad in zip(volume.image.shape, data.pad_size, strict=True)
        ]
        check_patch_fits(volume.name, sides, data.patch_size)


def _tune(
    bridge: Bridge, resources: _Resources, function: TrialFunction, checkpoints: str | None
) -> str | None:
    """Let Ray Tune run trials until the bridge has no more; return the signal that ended it."""
    flag = ray.remote(num_cpus=0)(_StopFlag).remote()
    scratch = Path(tempfile.mkdtemp(prefix="hydralv-tune-"))
    faces = _Searcher(bridge), _Scheduler(bridge, flag)
    tuner = tune.Tuner(
        tune.with_resources(
            _trainable(function, flag, checkpoints), {"cpu": resources.cpus, "gpu": resources.gpus}
        ),
        tune_config=tune.TuneConfig(
            search_alg=faces[0], scheduler=faces[1], num_samples=ENDLESS, reuse_actors=False
        ),
        run_config=tune.RunConfig(
            name="study",
            storage_path=str(scratch),
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=0),
        ),
    )
    with _signals(bridge) as received:
        try:
            tuner.fit()
        finally:
            bridge.abandon()
            shutil.rmtree(scratch, ignore_errors=True)
    return received[0] if received else None


def _trainable(
    function: TrialFunction, flag: Any, checkpoints: str | None
) -> Callable[[dict[str, Any]], None]:
    """Return the function that Ray runs in a fresh process for each trial."""

    # A function inside a function travels whole. One of this module would travel by name, and
    # make every worker import the study, its database and PyTorch before its first step.
    poll_s = STOP_POLL_S
    message_key = MESSAGE

    def trial(config: dict[str, Any]) -> None:
        import json
        import threading
        import time

        import ray
        from ray import tune

        from hydralv_tune.worker import run_worker

        stop = threading.Event()

        def watch() -> None:
            while not stop.is_set():
                time.sleep(poll_s)
                try:
                    if ray.get(flag.is_raised.remote(), timeout=30.0):
                        stop.set()
                except ray.exceptions.RayError:
                    return

        threading.Thread(target=watch, daemon=True).start()
        run_worker(
            json.loads(config["spec"]),
            # One text, since Ray flattens mappings.
            send=lambda message: tune.report({message_key: json.dumps(message)}),
            should_stop=stop.is_set,
            function=function,
            checkpoints=checkpoints,
        )

    return trial


class _StopFlag:
    """Tells every worker of this driver, on whatever machine, to save and end."""

    def __init__(self) -> None:
        self._raised = False

    def raise_it(self) -> None:
        """Ask the workers to end."""
        self._raised = True

    def is_raised(self) -> bool:
        """Return whether they are asked to."""
        return self._raised


class _Face:
    """Keeps a bridge out of Ray's pickles: it holds locks, and a storage URL with a password."""

    def __init__(self, bridge: Bridge | None = None) -> None:
        super().__init__()
        self._bridge = bridge

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._bridge = None

    def __deepcopy__(self, memo: object) -> _Face:
        return self

    def save(self, *_: object) -> None:
        """Save nothing: the database is the state."""

    def restore(self, *_: object) -> None:
        """Restore nothing."""

    @property
    def bridge(self) -> Bridge:
        """Return the bridge, which only the driver's own process has."""
        assert self._bridge is not None, "a face was unpickled"
        return self._bridge


class _Searcher(_Face, Searcher):
    """The face that asks."""

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """Return the next trial, None to be asked again, or that there are no more."""
        self.bridge.tick()
        spec = self.bridge.suggest(trial_id)
        if spec == "done":
            return str(Searcher.FINISHED)
        return None if isinstance(spec, str) else {"spec": json.dumps(spec)}

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Tell a trial that ended without saying so."""
        self.bridge.on_death(trial_id, "worker: ended without a result")


class _Scheduler(_Face, TrialScheduler):
    """The face that reports, prunes and stops."""

    def __init__(self, bridge: Bridge | None = None, flag: Any = None) -> None:
        super().__init__(bridge)
        self._flag, self._flag_raised = flag, False
        self._trials: dict[str, Any] = {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._flag, self._trials = None, {}

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Remember Ray's trial, to be able to stop it."""
        self._trials[trial.trial_id] = trial

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Hand a message to the bridge and do what it decides."""
        text = result.get(MESSAGE)
        if text is None:
            return str(TrialScheduler.CONTINUE)
        decision = self.bridge.on_message(trial.trial_id, json.loads(text))
        return str(TrialScheduler.CONTINUE if decision == "go" else TrialScheduler.STOP)

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        """Tell a trial whose process died."""
        self._trials.pop(trial.trial_id, None)
        self.bridge.on_death(trial.trial_id, _death(trial))

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: object) -> None:
        """Forget a trial that ended."""
        self._trials.pop(trial.trial_id, None)

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        """Forget a trial that never started."""
        self._trials.pop(trial.trial_id, None)

    def choose_trial_to_run(self, tune_controller: Any) -> Any:
        """Do what is due at every turn of Ray's loop, and return the next pending trial."""
        for key, how in self.bridge.tick().items():
            self._end(tune_controller, key, how)
        if self.bridge.stop_reason is not None and not self._flag_raised:
            self._flag_raised = True
            self._flag.raise_it.remote()
        pending = (t for t in tune_controller.get_trials() if t.status == "PENDING")
        return next(pending, None)

    def _end(self, tune_controller: Any, key: str, how: str) -> None:
        """Stop a trial: its process at once, or the trial where it has none yet."""
        trial = self._trials.get(key)
        if trial is None:
            self.bridge.on_death(key, "worker: Ray does not know the trial")
            return
        actor = trial.temporary_state.ray_actor
        if how == "kill" and actor is not None:
            ray.kill(actor, no_restart=True)
        else:
            tune_controller.stop_trial(trial)

    def debug_string(self) -> str:
        """Return a line for Ray's own output, which is off."""
        return "the study decides"


class _Resources:
    """What a trial takes and how many fit into the cluster now."""

    def __init__(self, gpus_per_trial: float | None, cpus_per_trial: int | None) -> None:
        total = ray.cluster_resources()
        gpus, cpus = total.get("GPU", 0.0), total.get("CPU", 1.0)
        self.gpus = float((1.0 if gpus else 0.0) if gpus_per_trial is None else gpus_per_trial)
        if cpus_per_trial is None:
            at_once = max(1, int(gpus / self.gpus)) if self.gpus else int(cpus)
            cpus_per_trial = max(1, int(cpus // at_once))
        self.cpus = cpus_per_trial
        self._next_look, self._slots = 0.0, 0
        if self.slots() < 1:
            raise InputError(
                f"run: a trial takes {self.cpus} CPU cores and {self.gpus:g} GPUs, but the Ray "
                f"cluster has {cpus:g} and {gpus:g}. Lower --cpus-per-trial or --gpus-per-trial."
            )

    def slots(self) -> int:
        """Return how many trials fit into the nodes that are alive."""
        now = time.monotonic()
        if now >= self._next_look:
            self._next_look = now + RESOURCES_EVERY_S
            self._slots = sum(self._fit(node["Resources"]) for node in ray.nodes() if node["Alive"])
        return self._slots

    def _fit(self, resources: Mapping[str, float]) -> int:
        """Return how many trials fit into one node."""
        by_cpu = resources.get("CPU", 0.0) / self.cpus
        by_gpu = resources.get("GPU", 0.0) / self.gpus if self.gpus else math.inf
        return int(min(by_cpu, by_gpu) + 1e-9)


def _specification(
    space: SearchSpace,
    volumes: Sequence[VolumePaths],
    out: Path,
    study: str,
    resources: _Resources,
) -> Callable[[Asked], dict[str, Any]]:
    """Return what makes the `TrialSpec` mapping of a trial that was asked for."""

    def specification(asked: Asked) -> dict[str, Any]:
        overrides: Mapping[str, Any] = {}
        if asked.warm_start is not None:
            overrides = space.warm_start(asked.warm_start).overrides
        candidate = space.candidate(asked.params, overrides).as_mapping()
        # What decides the score stands in the candidate, so that its file alone repeats it.
        if candidate["test"]["decoding_grid"] is None:
            candidate["test"]["decoding_grid"] = space.decoding.model_dump(mode="json")
        if not resources.gpus and candidate["system"]["cpu_threads"] is None:
            candidate["system"]["cpu_threads"] = resources.cpus
        return {
            "number": asked.number,
            "root": asked.root,
            "candidate": candidate,
            "objective": space.objective.model_dump(mode="json"),
            "grid": space.decoding.model_dump(mode="json"),
            "volumes": [asdict(paths) for paths in volumes],
            "out": str(out / "trials" / str(asked.root)),
            "device": "auto" if resources.gpus else "cpu",
            "threads": resources.cpus,
            "study": study,
            "timeout_s": space.budget.trial_timeout_s,
        }

    return specification


def _real_trial(volumes: Sequence[Volume]) -> TrialFunction:
    """Return the trial function of real work; the volumes lie once in Ray's memory."""
    shared = ray.put(list(volumes))

    def function(spec: dict[str, Any], report: Reporter) -> Mapping[str, Any]:
        import ray

        from hydralv_tune.trial import TrialSpec, run_trial

        record = run_trial(
            TrialSpec.from_mapping(spec),
            report,
            volumes=ray.get(shared),
            should_stop=report.should_stop,
        )
        return {**record.as_mapping(), "record": str(record.path)}

    return function


def _death(trial: Any) -> str:
    """Return why the process of a Ray trial died, in one line."""
    text = ""
    with suppress(OSError, TypeError):
        text = " ".join(Path(trial.error_file).read_text().split())
    if "OutOfMemory" in text or "running low on memory" in text:
        return "worker: out of memory, killed by Ray"
    return f"worker: its process died: {text[-400:] or 'no reason known'}"


@contextmanager
def _ray(address: str | None, volumes: Sequence[Volume]) -> Iterator[None]:
    """Join a Ray cluster, or start one with room for the volumes that ends with this block."""
    level = logging.ERROR
    # Ray hands its cluster the command line of this process, where a storage URL may stand.
    ray._private.utils.get_entrypoint_name = lambda: "hydralv-tune"
    # What its daemons say of dead workers is told as an event, in our words.
    ray._private.worker.print_to_stdstream = lambda *_, **__: None
    if address is not None:
        ray.init(address=address, log_to_driver=False, logging_level=level)
    else:
        # Whoever can reach Ray's ports can run code: loopback only, and a token besides. Ray
        # has this switch for Windows and macOS; without it, it listens on every interface.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        ray._private.ray_constants.ENABLE_RAY_CLUSTER = False
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        ray.init(
            address="local",
            include_dashboard=False,
            log_to_driver=False,
            logging_level=level,
            object_store_memory=OBJECT_STORE_BYTES + 2 * sum(map(_bytes, volumes)),
        )
    for name in ("ray", "ray.tune"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        # Ray prints what its daemons say on stdout, which belongs to the caller's document.
        with redirect_stdout(sys.stderr):
            yield
    finally:
        ray.shutdown()


def _bytes(volume: Volume) -> int:
    """Return the bytes of a volume's arrays."""
    arrays = (volume.image, volume.label, volume.mask)
    return sum(array.nbytes for array in arrays if array is not None)


@contextmanager
def _signals(bridge: Bridge) -> Iterator[list[str]]:
    """Turn Ctrl-C and SIGTERM into an orderly stop; a second one ends at once."""
    received: list[str] = []

    def handle(number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if received:
            raise KeyboardInterrupt
        received.append(f"Stopped by {name}")
        # Only noted here: an event printed from within a handler could meet a half-printed one.
        bridge.stop_wanted = f"stopped by {name}"

    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    before = {kind: signal.signal(kind, handle) for kind in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)
