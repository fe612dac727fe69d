"""A driver process for the tests: a real study on real Ray, with a trial function that only waits.

`python fake_study.py CONFIG.json` runs it, writes events as JSON lines on stdout and the facts
last. Interrupted, it exits with 130, as the command line does.

The trial keeps its place in `state.json` of its folder, as a real one does in its checkpoint, and
writes every step that it makes into `steps.log`, so that a test sees what was made twice.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

SPACE = {
    "name": "fake",
    "base": "start",
    "recipes": {"start": {}},
    "parameters": {
        "optimization.optimizer.lr": {"float": [1e-5, 1e-1], "log": True},
        "optimization.optimizer.weight_decay": {"float": [0.0, 0.1]},
    },
    "objective": {"stop_at": None},
    "sampler": {"startup_trials": 5},
    "pruner": {"name": "none"},
}


def metrics(error: float, f1: float = 0.8) -> dict[str, float]:
    """Return the figures of a segmentation."""
    return {
        "adapted_rand_error": error,
        "adapted_rand_error_foreground": min(1.0, error + 0.1),
        "f1_iou50": f1,
    }


def make_trial(config: dict[str, Any]) -> Any:
    """Return a trial function that behaves as `config` says.

    Keys: `steps`, `step_s`, `ends` (number of the first attempt -> `nan`, `error`, `crash`,
    `hang`, `hog`, `bad`, `infeasible`), `rates` (end -> share, drawn anew for each attempt),
    `seed`.
    """

    def trial(spec: dict[str, Any], report: Any) -> dict[str, Any]:
        folder = Path(spec["out"])
        root, number, begun = spec["root"], spec["number"], time.time()
        state = folder / "state.json"
        done = json.loads(state.read_text())["step"] if state.exists() else 0
        end = config.get("ends", {}).get(str(root))
        draw = random.Random(f"{config.get('seed', 0)}-{number}").random()
        for name, share in config.get("rates", {}).items():
            if end is None and draw < share:
                end = name
            draw -= share
        optimizer = spec["candidate"]["optimization"]["optimizer"]
        error = min(0.9, 0.05 + abs(optimizer["lr"] - 1e-3) * 50 + optimizer["weight_decay"])
        error = 0.95 if end == "bad" else error
        steps = config.get("steps", 3)
        for step in range(done + 1, steps + 1):
            time.sleep(config.get("step_s", 0.02))
            if step == 2 and end == "error":
                raise ValueError("a value that cannot work")
            if step == 2 and end == "hang":
                while True:
                    time.sleep(1.0)
            if step == 2 and end == "hog" and number == root:
                hoard = []
                while len(hoard) < 64:  # 8 GB: far beyond the limit that the test sets
                    hoard.append(bytearray(os.urandom(1)) * (1 << 27))
                    time.sleep(0.05)
            value = float("nan") if step == 2 and end == "nan" else error + 0.5 / step
            temporary = folder / f".state-{number}"
            temporary.write_text(json.dumps({"step": step}))
            os.replace(temporary, state)
            with (folder / "steps.log").open("a") as log:
                log.write(f"{number} {step} {os.getpid()}\n")
            if step == 2 and end == "crash" and (number == root or config.get("crash_again")):
                os.kill(os.getpid(), signal.SIGKILL)
            report(
                {
                    "step": step,
                    "epoch": step,
                    "value": value,
                    "metrics": metrics(error + 0.5 / step),
                    "losses": {"total": 1.0 / step},
                    "seconds": 0.1 * step,
                    "checkpoint": str(state),
                }
            )
        devices = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        (folder / "devices.json").write_text(json.dumps([begun, time.time(), devices]))
        return {
            "metrics": metrics(error, 0.3 if end == "infeasible" else 0.8),
            "decoding": {"name": "decode_instance_binary_contour_distance", "kwargs": {}},
            "losses": {"total": 0.1},
            "checkpoint": str(state),
        }

    return trial


def main(config: dict[str, Any]) -> int:
    """Run a study and return the exit code."""
    from hydralv_tune.config.errors import InputError
    from hydralv_tune.config.search_space import space_from_mapping
    from hydralv_tune.launch import live_trial
    from hydralv_tune.launch.coordinator import StudyFailed
    from hydralv_tune.launch.run import StudyInterrupted, run_study

    def say(**fields: Any) -> None:
        print(json.dumps(fields), flush=True, file=sys.__stdout__)

    space = {**SPACE, **config.get("space", {})}
    live_trial.LEAST_START_S = config.get("least_start_s", live_trial.LEAST_START_S)
    try:
        facts = run_study(
            space_from_mapping(space),
            [],
            study=config.get("study", "fake"),
            storage=config["storage"],
            out=Path(config["out"]),
            trials=config["trials"],
            trial_function=make_trial(config),
            on_event=lambda e: say(event=e.kind, number=e.number, **dict(e.fields)),
            **config.get("options", {}),
        )
    except StudyInterrupted as error:
        say(interrupted=str(error), facts=error.facts)
        return 130
    except StudyFailed as error:
        say(failed=str(error))
        return 1
    except InputError as error:
        say(error=str(error))
        return 2
    say(facts=facts)
    return 0


if __name__ == "__main__":
    # A driver that is killed must not leave its parent waiting for a pipe.
    sys.exit(main(json.loads(Path(sys.argv[1]).read_text())))
