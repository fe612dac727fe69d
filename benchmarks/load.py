"""A study of thousands of trials on PostgreSQL, with several drivers that are killed now and then.

`.venv/bin/python benchmarks/load.py [--trials 5000] [--minutes 20] [--filled 0]` starts drivers in
processes of their own; each plays the workers of its trials, which do no work. Once so many trials
are finished, or the time is up, it asks whether any was lost or finished twice, how long an ask
took, whether the drivers' memory grew, and how long report and dashboard take. What an ask takes
with nobody beside it says `overhead.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import psutil
from _targets import verdict
from overhead import METRICS, SPACE, fill, storages

from hydralv_tune.config.search_space import space_from_mapping
from hydralv_tune.results.dashboard import make_dashboard
from hydralv_tune.results.report.report import write_report
from hydralv_tune.study.driver import Driver
from hydralv_tune.study.study import Study
from hydralv_tune.study.trial_views import Asked, TrialResult

NAME = "load"
DRIVERS, WORKERS, EVALUATIONS = 4, 64, 5
TRIAL_S = 12.0
"""What a trial takes: 64 workers finish 5,000 in about 16 minutes."""
KILL_S = 60.0
"""Seconds from one kill to the next."""
PAGE_S, GROWTH = 10.0, 1.25
"""A page may take so long, and the memory of a driver may be so much more at the end."""


def drive(storage: str, out: Path, target: int) -> None:
    """Be one driver, and its share of the workers, until the study has so many trials.

    Each line of the standard output is an ask's seconds, or the number of a trial that was told.
    """
    study = opened(storage)
    draw = random.Random(os.getpid())
    places: list[tuple[int, int, float] | None] = [None] * (WORKERS // DRIVERS)
    with Driver(study, out=out, heartbeat_s=5.0, grace_s=20.0) as driver:
        while True:
            rested = True
            for index, place in enumerate(places):
                if place is None:
                    began = time.monotonic()
                    asked = driver.ask(target)
                    if isinstance(asked, Asked):
                        say("asked", number=asked.number, seconds=time.monotonic() - began)
                        places[index] = (asked.number, 0, time.monotonic())
                        rested = False
                    elif asked == "done" and not any(places):
                        return
                    elif index:
                        break  # the others would hear the same
                    continue
                number, step, due = place
                if time.monotonic() < due:
                    continue
                rested = False
                if step == EVALUATIONS:
                    outcome = TrialResult("COMPLETE", draw.random(), -0.3, {"metrics": METRICS})
                    if driver.tell(number, outcome) == "told":
                        say("told", number=number)
                    places[index] = None
                    continue
                answer = driver.report(number, step + 1, draw.random(), -0.3)
                if answer == "prune":
                    if driver.tell(number, TrialResult("PRUNED")) == "told":
                        say("told", number=number)
                    places[index] = None
                elif answer == "refused":
                    places[index] = None
                else:
                    wait = TRIAL_S / EVALUATIONS * draw.uniform(0.8, 1.2)
                    places[index] = (number, step + 1, time.monotonic() + wait)
            if rested:
                time.sleep(0.05)


def say(what: str, **more: Any) -> None:
    """Write one line for the parent."""
    print(
        json.dumps({"what": what, "memory_mb": psutil.Process().memory_info().rss / 1e6, **more}),
        flush=True,
    )


def opened(storage: str, *, create: bool = False) -> Study:
    """Return the study; its pruner is the one that spaces have where they say nothing."""
    space = {key: value for key, value in SPACE.items() if key != "pruner"} | {"name": NAME}
    return Study.open(storage, NAME, space=space_from_mapping(space), create=create)


class Drivers:
    """The driver processes; each line that one writes is kept with the time and the process."""

    def __init__(self, storage: str, folder: Path, target: int) -> None:
        self.storage, self.folder, self.target = storage, folder, target
        self.lines: list[dict[str, Any]] = []
        self.running: list[subprocess.Popen[str]] = []
        self.readers: list[threading.Thread] = []

    def start(self) -> None:
        """Start one more."""
        out = self.folder / f"out-{len(self.readers)}"
        out.mkdir()
        process = subprocess.Popen(
            [sys.executable, __file__, "--drive", self.storage, str(out), str(self.target)],
            stdout=subprocess.PIPE,
            text=True,
        )
        self.running.append(process)
        self.readers.append(threading.Thread(target=self._read, args=(process,), daemon=True))
        self.readers[-1].start()

    def _read(self, process: subprocess.Popen[str]) -> None:
        """Keep what a process writes."""
        assert process.stdout is not None
        for line in process.stdout:
            if line.endswith("\n"):  # of a killed process the last may be cut
                self.lines.append({"pid": process.pid, "at": time.monotonic(), **json.loads(line)})

    def kill_one(self, draw: random.Random) -> None:
        """Kill one as the kernel does, and start another."""
        process = self.running.pop(draw.randrange(len(self.running)))
        process.send_signal(signal.SIGKILL)
        process.wait()
        self.start()

    def stop(self) -> None:
        """End all."""
        for process in self.running:
            process.terminate()
            process.wait()
        for reader in self.readers:
            reader.join(timeout=10)


def run(storage: str, folder: Path, target: int, filled: int, seconds: float) -> None:
    """Run the study, and print what has a target."""
    opened(storage, create=True).close()
    if filled:
        fill(storage, NAME, filled)
    drivers, draw = Drivers(storage, folder, target), random.Random(0)
    for _ in range(DRIVERS):
        drivers.start()
    began = killed_at = time.monotonic()
    kills = 0
    while time.monotonic() - began < seconds and any(p.poll() is None for p in drivers.running):
        time.sleep(0.5)
        if time.monotonic() - killed_at > KILL_S and all(p.poll() is None for p in drivers.running):
            drivers.kill_one(draw)
            killed_at, kills = time.monotonic(), kills + 1
    spent = time.monotonic() - began
    in_time = all(process.poll() == 0 for process in drivers.running)
    drivers.stop()
    show(storage, drivers.lines, target, filled, f"{kills} kills, {spent / 60:.1f} min", in_time)


def show(
    storage: str, lines: list[dict[str, Any]], target: int, filled: int, how: str, in_time: bool
) -> None:
    """Print counts, asks and memory, and what the database says of every trial that was told."""
    study = opened(storage)
    states = {trial.number: trial.state for trial in study.trials()}
    study.close()
    counts = Counter(states.values())
    ended = counts["COMPLETE"] + counts["PRUNED"]
    print(f"{how}: {dict(counts)}")
    if in_time:
        print(f"finished {ended}{verdict(ended, at_least=target, at_most=target)}")
    told = Counter(line["number"] for line in lines if line["what"] == "told")
    lost = sum(states.get(number) not in ("COMPLETE", "PRUNED") for number in told)
    twice = sum(count > 1 for count in told.values())
    print(f"told {len(told)} of the {ended - filled} that ended")
    print(f"lost {lost}{verdict(lost, at_most=0)}")
    print(f"ended twice {twice}{verdict(twice, at_most=0)}")
    asks = [line for line in lines if line["what"] == "asked"]
    for low in range(0, max(states, default=0) + 1, 1000):
        times = [line["seconds"] for line in asks if low <= line["number"] < low + 1000]
        if times:
            times.sort()
            print(f"ask from {low} trials: median {statistics.median(times):.3f} s, of a hundred "
                  f"the slowest {times[int(0.99 * (len(times) - 1))]:.3f} s, with the wait for "
                  "other drivers")  # fmt: skip
    for early, late in memory(lines):
        print(f"memory of a driver after its first minute and at its end: {early:.0f} MB, "
              f"{late:.0f} MB{verdict(late / early, at_most=GROWTH)}")  # fmt: skip


def memory(lines: list[dict[str, Any]]) -> Iterator[tuple[float, float]]:
    """Yield what drivers that lived for three minutes had after one, and had in the end."""
    for pid in dict.fromkeys(line["pid"] for line in lines):
        own = [line for line in lines if line["pid"] == pid]
        if own[-1]["at"] - own[0]["at"] > 180:
            after = next(line for line in own if line["at"] - own[0]["at"] > 60)
            yield after["memory_mb"], own[-1]["memory_mb"]


def pages(storage: str, folder: Path, trials: int) -> None:
    """Print how long report and dashboard of a real study take, its two trials copied."""
    tune, volume = [sys.executable, "-m", "hydralv_tune"], folder / "volume"
    shape = ["--shape", "16", "96", "96", "--instances", "6"]
    subprocess.run([*tune, "phantom", str(volume), *shape], check=True, stdout=subprocess.DEVNULL)
    words = [*tune, "run", "smoke", "--trials", "2"]
    for option, file in (("--image", "im"), ("--label", "label"), ("--mask", "mask")):
        words += [option, str(volume / f"{file}.h5")]
    words += ["--storage", storage, "--study", "pages", "--out", str(folder / "pages")]
    words += ["--set", "optimization.max_epochs=2", "--set", "data.iter_num_per_epoch=5"]
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
    study = optuna.load_study(study_name="pages", storage=storage)
    real = [trial for trial in study.get_trials(deepcopy=False) if trial.state.is_finished()]
    for number in range(len(real), trials):
        one = real[number % len(real)]
        study.add_trial(
            optuna.trial.create_trial(
                state=one.state, value=(one.value or 0.0) + 1e-4 * number, params=one.params,
                distributions=one.distributions, user_attrs=one.user_attrs,
                system_attrs=one.system_attrs, intermediate_values=one.intermediate_values,
            )
        )  # fmt: skip
    began = time.monotonic()
    write_report(storage, "pages", folder / "report")
    spent = time.monotonic() - began
    print(f"report of {trials} trials {spent:.1f} s{verdict(spent, at_most=PAGE_S)}")
    with make_dashboard(storage, port=0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        began = time.monotonic()
        studies = json.loads(page(address, "api/studies"))["study_summaries"]
        (number,) = (one["study_id"] for one in studies if one["study_name"] == "pages")
        size = len(page(address, "dashboard")) + len(page(address, f"api/studies/{number}"))
        spent = time.monotonic() - began
        server.shutdown()
    print(f"dashboard of them {spent:.1f} s, {size / 1e6:.1f} MB"
          f"{verdict(spent, at_most=PAGE_S)}")  # fmt: skip


def page(address: str, name: str) -> bytes:
    """Return what the dashboard answers."""
    with urllib.request.urlopen(f"{address}/{name}") as answer:
        return bytes(answer.read())


def main() -> None:
    """Run the study on PostgreSQL, and open the pages of one as long."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=5000, help="of the study in the end")
    parser.add_argument("--filled", type=int, default=0, help="of them there before")
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--drive", nargs=3, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.drive:
        drive(chosen.drive[0], Path(chosen.drive[1]), int(chosen.drive[2]))
        return
    with tempfile.TemporaryDirectory(prefix="hydralv-load-") as text:
        folder = Path(text)
        folder.chmod(0o755)
        with storages(folder) as urls:
            run(urls["PostgreSQL"], folder, chosen.trials, chosen.filled, chosen.minutes * 60)
            pages(urls["PostgreSQL"], folder, chosen.trials)


if __name__ == "__main__":
    main()
