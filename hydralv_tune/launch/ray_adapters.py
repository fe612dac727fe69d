"""What Ray Tune sees of a study: a searcher, a scheduler and a trainable."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from hydralv_tune.launch.coordinator import Coordinator
from hydralv_tune.launch.ray_private import actor_of
from hydralv_tune.launch.worker import StopFlag, TrialFunction

MESSAGE = "hydralv"
STOP_POLL_S = 1.0
STOP_ANSWER_S = 10.0


class _RayAdapter:
    """Keeps a coordinator out of Ray's pickles: it holds locks, and a URL with a password."""

    def __init__(self, coordinator: Coordinator | None = None) -> None:
        super().__init__()
        self._coordinator = coordinator

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._coordinator = None

    def __deepcopy__(self, memo: object) -> _RayAdapter:
        return self

    def save(self, *_: object) -> None:
        """Save nothing: the database is the state."""

    def restore(self, *_: object) -> None:
        """Restore nothing."""

    @property
    def coordinator(self) -> Coordinator:
        """Return the coordinator, which only the driver's own process has."""
        assert self._coordinator is not None, "an adapter was unpickled"
        return self._coordinator


class StudySearcher(_RayAdapter, Searcher):
    """Gives Ray Tune the trials that the study asks for."""

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """Return the next trial, None to be asked again, or that there are no more."""
        self.coordinator.tick()
        spec = self.coordinator.suggest(trial_id)
        if spec == "done":
            return str(Searcher.FINISHED)
        return None if isinstance(spec, str) else {"spec": json.dumps(spec)}

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Handle a trial that ended without a last message."""
        self.coordinator.on_death(trial_id, "worker: ended without a result")


class StudyScheduler(_RayAdapter, TrialScheduler):
    """Takes the results of Ray Tune's trials in, and stops what the study prunes."""

    def __init__(self, coordinator: Coordinator | None = None, flag: Any = None) -> None:
        super().__init__(coordinator)
        self._flag, self._flag_raised = flag, False
        self._trials: dict[str, Any] = {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._flag, self._trials = None, {}

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Remember Ray's trial, to be able to stop it."""
        self._trials[trial.trial_id] = trial

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Hand a message to the coordinator and do what it decides."""
        text = result.get(MESSAGE)
        if text is None:
            return str(TrialScheduler.CONTINUE)
        decision = self.coordinator.on_message(trial.trial_id, json.loads(text))
        return str(TrialScheduler.CONTINUE if decision == "go" else TrialScheduler.STOP)

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        """Handle a trial whose process died."""
        self._trials.pop(trial.trial_id, None)
        self.coordinator.on_death(trial.trial_id, _death(trial))

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: object) -> None:
        """Forget a trial that ended."""
        self._trials.pop(trial.trial_id, None)

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        """Forget a trial that never started."""
        self._trials.pop(trial.trial_id, None)

    def choose_trial_to_run(self, tune_controller: Any) -> Any:
        """Do the periodic work of the study, and return the next pending trial."""
        for key in self.coordinator.tick():
            self._end(tune_controller, key)
        for key in list(self.coordinator.live):
            trial = self._trials.get(key)
            if actor_of(tune_controller, trial) is not None:
                self.coordinator.placed(key)
            # An actor that could not be re-used ends its next trial without a word.
            if trial is not None and trial.status in ("ERROR", "TERMINATED"):
                self.coordinator.on_death(key, "worker: its process could not be had")
        if self.coordinator.stop_reason is not None and not self._flag_raised:
            self._flag_raised = True
            self._flag.raise_it.remote()
        pending = (t for t in tune_controller.get_trials() if t.status == "PENDING")
        return next(pending, None)

    def _end(self, tune_controller: Any, key: str) -> None:
        """End a trial's process at once, or the trial where it has none yet."""
        trial = self._trials.get(key)
        if trial is None:
            self.coordinator.on_death(key, "worker: Ray does not know the trial")
            return
        actor = actor_of(tune_controller, trial)
        if actor is None:
            tune_controller.stop_trial(trial)
        else:
            ray.kill(actor, no_restart=True)

    def debug_string(self) -> str:
        """Return a line for Ray's own output, which is off."""
        return "the study decides"


def _death(trial: Any) -> str:
    """Return why the process of a Ray trial died, in one line."""
    text = ""
    with suppress(OSError, TypeError):
        text = " ".join(Path(trial.error_file).read_text().split())
    if "OutOfMemory" in text or "running low on memory" in text:
        return "worker: out of memory, killed by Ray"
    return f"worker: its process died: {text[-400:] or 'no reason known'}"


def make_flag() -> Any:
    """Return a `StopFlag` on the node of this process: another node may die with what it holds."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0)(StopFlag).options(scheduling_strategy=here).remote()


def make_trainable(
    function: TrialFunction, flag: Any, checkpoints: str | None
) -> Callable[[dict[str, Any]], None]:
    """Return the function that Ray runs for each trial."""

    # A function inside a function travels whole. One of this module would travel by name, and
    # make every worker import the study, its database and PyTorch before its first step.
    poll_s, answer_s = STOP_POLL_S, STOP_ANSWER_S
    message_key = MESSAGE

    def trial(config: dict[str, Any]) -> None:
        import json

        import ray

        from hydralv_tune.launch.worker import run_worker

        stop, over = threading.Event(), threading.Event()

        def watch() -> None:
            while not over.wait(poll_s):
                try:
                    if ray.get(flag.is_raised.remote(), timeout=answer_s):
                        stop.set()
                        return
                except ray.exceptions.RayError:
                    continue  # whoever does not answer now may do so the next time

        threading.Thread(target=watch, daemon=True).start()
        try:
            run_worker(
                json.loads(config["spec"]),
                # One text, since Ray flattens mappings.
                send=lambda message: tune.report({message_key: json.dumps(message)}),
                should_stop=stop.is_set,
                function=function,
                checkpoints=checkpoints,
                place={"node": ray.get_runtime_context().get_node_id()},
            )
        finally:
            over.set()

    return trial
