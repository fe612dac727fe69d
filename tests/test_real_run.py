"""A real `run` seen from outside: who reaches its Ray, what that knows, what it holds in memory."""

from __future__ import annotations

import ipaddress
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
from commands_in_a_process import environment, small_run
from study_checks import with_password

from hydralv_tune.data.volumes import VolumePaths, read_volume

PASSWORD = "s3cr3t-of-the-database"
TRIALS = 4
pytestmark = pytest.mark.timeout(600)


@dataclass
class Seen:
    """What was seen of a run while it was at work."""

    listening: set[tuple[str, int]] = field(default_factory=set)
    said: set[str] = field(default_factory=set)
    """Command lines and environments of Ray's processes."""
    usage: set[str | None] = field(default_factory=set)
    gcs: str = ""
    token: str = ""
    inside: dict[str, Any] = field(default_factory=dict)
    """What the inspector prints last, once most trials are finished."""
    refusals: dict[str, str] = field(default_factory=dict)
    """What the inspector says on stderr without the right token; empty where it was let in."""
    volume_bytes: int = 0


def look(driver: psutil.Process, seen: Seen) -> None:
    """Take in what the processes of a run show of themselves now."""
    for process in [driver, *driver.children(recursive=True)]:
        try:
            words, variables = process.cmdline(), process.environ()
            sockets = process.net_connections(kind="tcp")
        except (psutil.Error, OSError):
            continue  # it has just ended
        seen.listening |= {(c.laddr.ip, c.laddr.port) for c in sockets if c.status == "LISTEN"}
        if process == driver:
            continue  # what its own command line shows is looked at where that is hidden
        seen.said |= {*words, *(f"{key}={value}" for key, value in variables.items())}
        if "raylet" in process.name():
            seen.token = variables.get("RAY_AUTH_TOKEN", "")
            seen.gcs = next(iter(re.findall(r"gcs-address=(\S+)", " ".join(words))), "")
        if "raylet" in process.name() or "gcs_server" in process.name():
            seen.usage.add(variables.get("RAY_USAGE_STATS_ENABLED"))


def inspect(address: str, variables: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Ask a running Ray as another process of this machine would."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    script = Path(__file__).with_name("ray_inspector.py")
    return subprocess.run(
        [sys.executable, str(script), address],
        capture_output=True, text=True, env={**kept, **variables}, timeout=120, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory, postgres: Any) -> Seen:
    """Return what was seen of one real run on PostgreSQL, whose URL has a password."""
    folder = tmp_path_factory.mktemp("run")
    training = {
        "data": {"iter_num_per_epoch": 8},
        "optimization": {"max_epochs": 2},
        "monitor": {"evaluation": {"count": 1}},
    }
    storage = with_password(postgres.new_database(), PASSWORD)
    words = small_run(folder, training, "--storage", storage, "--trials", str(TRIALS))
    found = Seen()
    volume = read_volume(VolumePaths("im", *(str(folder / f"{n}.h5") for n in ("im", "label"))))
    assert volume.label is not None
    found.volume_bytes = volume.image.nbytes + volume.label.nbytes
    log = folder / "err.txt"
    with log.open("w") as err:
        process = subprocess.Popen(
            words, cwd=folder, stdout=subprocess.DEVNULL, stderr=err, env=environment()
        )
    try:
        watch(process, log, found)
        assert process.wait(240) == 0, log.read_text()
    finally:
        process.kill()
        process.wait()
    return found


def watch(process: subprocess.Popen[bytes], log: Path, found: Seen) -> None:
    """Watch a run to the end, and look into its Ray as often as another trial has finished."""
    driver, finished = psutil.Process(process.pid), 0
    deadline = time.monotonic() + 240
    while process.poll() is None and time.monotonic() < deadline:
        look(driver, found)
        now = len(re.findall(r"trial \d+ complete", log.read_text()))
        if now != finished and now < TRIALS:
            answer = inspect(found.gcs, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": found.token})
            # A slow answer may come when all has ended.
            if answer.returncode == 0:
                found.inside, finished = {**json.loads(answer.stdout), "finished": now}, now
            if not found.refusals:
                wrong = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}
                for name, variables in (("wrong", wrong), ("none", {"RAY_AUTH_MODE": "disabled"})):
                    found.refusals[name] = inspect(found.gcs, variables).stderr
        time.sleep(0.4)


def test_nobody_reaches_its_ray_from_another_machine(seen: Seen) -> None:
    assert int(seen.gcs.split(":")[1]) in {port for _, port in seen.listening}
    for host, port in seen.listening:
        address = ipaddress.ip_address(host)
        mapped = getattr(address, "ipv4_mapped", None)
        assert (mapped or address).is_loopback, (host, port)


def test_nobody_without_the_token_is_let_in(seen: Seen) -> None:
    assert seen.inside, "not even the right token was let in"
    assert len(seen.token) >= 32
    for name, said in seen.refusals.items():
        assert "AuthenticationError" in said, (name, said)
    assert set(seen.refusals) == {"wrong", "none"}


def test_it_sends_no_usage_statistics(seen: Seen) -> None:
    assert seen.usage == {"0"}
    # Ray's releases switch them off in `ray.init` too; whatever a Ray does, we said so before.
    code = (
        "import hydralv_tune.launch\n"
        "from ray._common.usage.usage_lib import usage_stats_enabled\n"
        "print(usage_stats_enabled())"
    )
    kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=kept, check=True
    )
    assert answer.stdout.split() == ["False"]


def test_ray_is_never_told_the_password_of_the_database(seen: Seen) -> None:
    assert any("raylet" in text for text in seen.said)
    assert not [text for text in seen.said if PASSWORD in text]
    assert any('entrypoint: "hydralv-tune"' in job for job in seen.inside["jobs"])
    assert not [job for job in seen.inside["jobs"] if PASSWORD in job]


def test_the_volumes_lie_in_memory_once_for_all_trials(seen: Seen) -> None:
    assert seen.inside["finished"] >= 2
    assert seen.volume_bytes <= seen.inside["bytes_now"] < 2 * seen.volume_bytes
    # Made in all since Ray started: nothing was put there and taken away again for each trial.
    assert seen.inside["bytes_made"] < 2 * seen.volume_bytes
