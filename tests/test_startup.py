"""Nobody waits for a library that a command does not use: which modules each must not import."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from commands_in_a_process import environment

HEAVY = {
    "torch", "monai", "ray", "numba", "matplotlib", "plotly", "pandas", "scipy", "skimage",
    "optuna", "sqlalchemy", "sklearn", "h5py", "tifffile", "zarr",
}  # fmt: skip
COMMANDS = {
    "": HEAVY,
    "--help": HEAVY,
    "run --help": HEAVY,
    "check baseline": HEAVY,
    "check baselin": HEAVY,
    "check hydra_lv": HEAVY,
    "list": HEAVY - {"optuna", "sqlalchemy"},
    "run smok --image x.h5 --label y.h5": HEAVY,
    "run smoke --image x.h5 --label y.h5": HEAVY,
    "train basline --image x.h5 --label y.h5 --out z": HEAVY,
    "train smoke --image x.h5 --label y.h5 --out z": HEAVY,
    "predict --checkpoint x.ckpt --image y.h5 --out z.h5": HEAVY,
    "score --prediction a.h5 --label b.h5": HEAVY - {"h5py"},
    "decode --probabilities a.h5 --out b.h5": HEAVY - {"h5py"},
    "status --storage sqlite:///nope.db --study s": HEAVY - {"optuna", "sqlalchemy", "pandas"},
    "status nowhere": HEAVY - {"optuna", "sqlalchemy", "pandas"},
}
PROGRAM = """
import sys
from hydralv_tune.cli.main import exit_code
code = exit_code(sys.argv[2:])
found = [name for name in sys.argv[1].split(",") if name in sys.modules]
sys.exit(f"imported {found}" if found else 0)
"""


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: words or "nothing")
def test_a_command_imports_no_library_that_it_does_not_use(words: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, ",".join(sorted(COMMANDS[words])), *words.split()],
        capture_output=True, text=True, check=False, env=environment(), timeout=60, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
