"""How long people wait for a first answer, against the bare import of what it needs.

Command and reference run in turns, so that both meet the same machine; the figure is the ratio of
the medians of CPU seconds, user and system, of each process. What serves or trains is ended at its
first line. The bytecode of all modules is at hand, as it is from a user's second command on.
"""

from __future__ import annotations

import os
import pty
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from _targets import verdict

TURNS = 3
ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
WITNESS = Path(__file__).parents[1] / "tests" / "witness" / "version_1"
BARE = ["-c", "import pydantic, yaml, typer, rich"]
DASHBOARD = ["-c", "import optuna_dashboard"]
OPTUNA = [
    "-c",
    "import pydantic, yaml, typer, rich, sqlalchemy, alembic.context, optuna; "
    "optuna.storages.RDBStorage",
]
"""Optuna's storage of a database, which imports Alembic as it is opened."""
VOLUME = "--image volumes/im.h5 --label volumes/label.h5"
COMMANDS: dict[str, tuple[list[str], float, str]] = {
    "check baseline": (BARE, 2.0, ""),
    "check hydra_lv": (BARE, 2.0, ""),
    "run smok --image x.h5 --label y.h5": (BARE, 2.0, ""),
    "run smoke --image x.h5 --label y.h5": (BARE, 2.0, ""),
    f"run smoke {VOLUME}": (BARE, 2.0, "Checking"),
    "train basline --image x.h5 --label y.h5 --out z": (BARE, 2.0, ""),
    "predict --checkpoint x.ckpt --image y.h5 --out z.h5": (BARE, 2.0, ""),
    "score --prediction a.h5 --label b.h5": (BARE, 2.0, ""),
    "status nowhere": (BARE, 2.0, ""),
    "status --storage sqlite:///nope.db --study s": (OPTUNA, 2.0, ""),
    "status finished": (OPTUNA, 2.0, ""),
    "dashboard nowhere": (BARE, 2.0, ""),
    "dashboard finished --port 8765": (DASHBOARD, 1.5, "Dashboard:"),
}
"""Of each command: the reference, the limit, and the word at which it is ended."""


def cpu_s(words: Sequence[str], folder: str, until: str = "") -> float:
    """Return the CPU seconds of a Python process.

    Args:
        words: Its arguments.
        folder: Where it runs.
        until: What stderr holds when it is ended; nothing lets it run to its end.
    """
    screen, end = pty.openpty()  # `run` writes its first line on a terminal only
    process = subprocess.Popen(
        [sys.executable, *words], cwd=folder, env={**ENVIRONMENT, "NO_COLOR": "1"},
        stdout=subprocess.DEVNULL, stderr=end if until else subprocess.DEVNULL,
    )  # fmt: skip
    os.close(end)
    seen = b""
    while until and until.encode() not in seen:
        seen += os.read(screen, 4096)
    if until:
        process.send_signal(signal.SIGKILL)
    os.close(screen)
    usage = os.wait4(process.pid, 0)[2]
    process.returncode = 0
    return usage.ru_utime + usage.ru_stime


def main() -> int:
    """Print a row for each command; return 1 where one is above its limit."""
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        for name in ("volumes", "finished"):
            shutil.copytree(WITNESS / name, Path(folder) / name)
        for command, (reference, limit, until) in COMMANDS.items():
            ours, bare = [], []
            cpu_s(["-m", "hydralv_tune", *command.split()], folder, until)
            for _ in range(TURNS):
                ours.append(cpu_s(["-m", "hydralv_tune", *command.split()], folder, until))
                bare.append(cpu_s(reference, folder))
            ratio = statistics.median(ours) / statistics.median(bare)
            failed += ratio > limit
            print(
                f"{command:<55} {statistics.median(ours):6.2f} s "
                f"{statistics.median(bare):6.2f} s  {ratio:5.2f} times"
                f"{verdict(ratio, at_most=limit)}",
                flush=True,
            )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
