"""How long people wait for a first answer, against the bare import of what it needs.

Command and reference run in turns, so that both meet the same machine; the figure is the ratio of
the medians of CPU seconds, user and system, of each process.
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence

TURNS = 5
BARE = ["-c", "import pydantic, yaml, typer, rich"]
DASHBOARD = ["-c", "import optuna_dashboard"]
OPTUNA = ["-c", "import pydantic, yaml, typer, rich, optuna, optuna.storages"]
COMMANDS: dict[str, tuple[list[str], float]] = {
    "check baseline": (BARE, 2.0),
    "check hydra_lv": (BARE, 2.0),
    "run smok --image x.h5 --label y.h5": (BARE, 2.0),
    "run smoke --image x.h5 --label y.h5": (BARE, 2.0),
    "train basline --image x.h5 --label y.h5 --out z": (BARE, 2.0),
    "predict --checkpoint x.ckpt --image y.h5 --out z.h5": (BARE, 2.0),
    "score --prediction a.h5 --label b.h5": (BARE, 2.0),
    "status nowhere": (BARE, 2.0),
    "status --storage sqlite:///nope.db --study s": (OPTUNA, 2.0),
    "dashboard nowhere": (DASHBOARD, 1.5),
}


def cpu_s(words: Sequence[str], folder: str) -> float:
    """Return the CPU seconds of a Python process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        [sys.executable, *words], cwd=folder, check=False, env={**os.environ, "NO_COLOR": "1"},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> int:
    """Print a row for each command; return 1 where one is above its limit."""
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        for command, (reference, limit) in COMMANDS.items():
            ours, bare = [], []
            for _ in range(TURNS):
                ours.append(cpu_s(["-m", "hydralv_tune", *command.split()], folder))
                bare.append(cpu_s(reference, folder))
            ratio = statistics.median(ours) / statistics.median(bare)
            failed += ratio > limit
            print(
                f"{command:<55} {statistics.median(ours):6.2f} s "
                f"{statistics.median(bare):6.2f} s  {ratio:5.2f} times (limit {limit:g})"
            )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
