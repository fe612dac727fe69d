"""Nobody waits for a library that a command does not use: which modules each must not import."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from commands_in_a_process import environment

WITNESS = Path(__file__).parent / "witness" / "version_1" / "finished"
HEAVY = {
    "torch", "monai", "ray", "numba", "matplotlib", "plotly", "pandas", "scipy", "skimage",
    "optuna", "sqlalchemy", "sklearn", "h5py", "tifffile", "zarr", "optuna_dashboard",
}  # fmt: skip
COMMANDS = {
    "": HEAVY,
    "--help": HEAVY,
    "run --help": HEAVY,
    "check baseline": HEAVY | {"numpy"},
    "check baselin": HEAVY | {"numpy"},
    "check hydra_lv": HEAVY | {"numpy"},
    "list": HEAVY,
    "run smok --image x.h5 --label y.h5": HEAVY | {"numpy", "yaml"},
    "run smoke --image x.h5 --label y.h5": HEAVY | {"numpy"},
    "train basline --image x.h5 --label y.h5 --out z": HEAVY | {"numpy", "yaml"},
    "train smoke --image x.h5 --label y.h5 --out z": HEAVY | {"numpy"},
    "predict --checkpoint x.ckpt --image y.h5 --out z.h5": HEAVY | {"numpy"},
    "score --prediction a.h5 --label b.h5": HEAVY | {"numpy"},
    "decode --probabilities a.h5 --out b.h5": HEAVY | {"numpy"},
    "sweep --probabilities a.h5 --label b.h5": HEAVY | {"numpy"},
    "inspect --image a.h5": HEAVY | {"numpy"},
    "status --storage sqlite:///nope.db --study s": HEAVY - {"optuna", "sqlalchemy"},
    "status nowhere": HEAVY | {"numpy"},
    f"status {WITNESS}": HEAVY - {"optuna", "sqlalchemy"},
    "dashboard nowhere": HEAVY | {"numpy"},
    "report nowhere": HEAVY | {"numpy"},
    "export nowhere": HEAVY | {"numpy"},
    "segment nowhere --image x.h5 --out y.h5": HEAVY | {"numpy"},
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


def test_the_dashboard_of_a_study_needs_no_network_library(tmp_path: Path) -> None:
    program = (
        "import sys; from hydralv_tune.results.dashboard import make_dashboard; "
        "make_dashboard(sys.argv[1], port=0).server_close(); "
        "heavy = {'torch', 'monai', 'ray', 'numba', 'matplotlib'}; "
        "found = heavy & sys.modules.keys(); "
        "sys.exit(f'imported {found}' if found else 0)"
    )
    copy = tmp_path / "study"
    shutil.copytree(WITNESS, copy)
    done = subprocess.run(
        [sys.executable, "-c", program, str(copy)],
        capture_output=True, text=True, check=False, env=environment(), timeout=120, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
