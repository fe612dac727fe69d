"""One of each is registered from outside, by the code of the how-tos; a study runs with them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from commands_in_a_process import environment

REPOSITORY = Path(__file__).parents[1]
KINDS = ("a-metric", "a-decoder", "an-architecture", "a-loss", "an-augmentation", "a-sampler")
SPACE: dict[str, Any] = {
    "name": "registered",
    "base": "smoke",
    "fixed": {
        "model": {
            "architecture": "stack", "loss_weights": [1, 1, 1, 1, 1],
            "loss_functions": ["DiceLoss", "PowerLoss", "DiceLoss", "PowerLoss", "SmoothL1Loss"],
            "loss_kwargs": [{}, {"power": 2.0}, {}, {}, {}],
        },
        "data": {
            "iter_num_per_epoch": 4, "patch_size": [8, 32, 32],
            "augmentation": {"preset": "some", "brighten": {"enabled": True, "strength": 0.2}},
        },
        "optimization": {"max_epochs": 2},
        "monitor": {"evaluation": {"count": 1}},
        "system": {"training": {"batch_size": 2}, "cpu_threads": 1},
        "inference": {"sliding_window": {"window_size": [8, 64, 64]}},
    },
    "parameters": {
        "optimization.optimizer.lr": {"float": [1e-3, 1e-2], "log": True},
        "model.stack_width": {"choice": [2, 4]},
    },
    "decoding": {"decoder": "decode_by_components", "grid": {"threshold": [0.3, 0.5]}},
    "objective": {"metric": "count_error", "stop_at": None},
    "sampler": {"name": "other_random"},
    "pruner": {"name": "none"},
}  # fmt: skip
STUDY = """
import json, sys
from hydralv_tune.config.search_space_files import load_space
made = ht.make_phantom(shape=(16, 96, 96), instances=6, seed=3)
volume = ht.Volume("phantom", made.image, made.label, made.mask, made.voxel_size_nm)
study = ht.run_study("space.yaml", [volume], "study", ht.RunOptions(trials=2, cpus_per_trial=1))
print(json.dumps({"best": study.best, "states": list(study.trials["state"])}, default=str))
"""


def code_of_the_pages() -> str:
    """Return the Python of all how-tos that add something."""
    pages = [(REPOSITORY / f"docs/howto/add-{kind}.md").read_text() for kind in KINDS]
    return "\n".join(
        b for page in pages for b in re.findall(r"^```python\n(.*?)^```", page, re.S | re.M)
    )


@pytest.mark.timeout(600)
def test_a_study_runs_with_one_of_each_that_a_script_has_registered(tmp_path: Path) -> None:
    (tmp_path / "space.yaml").write_text(json.dumps(SPACE))
    (tmp_path / "script.py").write_text(code_of_the_pages() + STUDY)
    done = subprocess.run(
        [sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, check=False,
        env={**environment(), "PYTHONPATH": str(REPOSITORY)}, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["states"] == ["COMPLETE", "COMPLETE"]
    assert "threshold" in json.dumps(told["best"]["decoding"])


def test_a_module_in_the_environment_is_known_to_every_command(tmp_path: Path) -> None:
    (tmp_path / "space.yaml").write_text(json.dumps(SPACE))
    (tmp_path / "mine.py").write_text(code_of_the_pages())

    def ours(plugins: str, *words: str, command: str = "check") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "hydralv_tune", command, *(words or ("space.yaml",))],
            cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120,
            env={**environment(), "PYTHONPATH": str(REPOSITORY), "HYDRALV_TUNE_PLUGINS": plugins},
        )  # fmt: skip

    assert ours(str(tmp_path / "mine.py")).returncode == 0
    for kind, name in (("decoders", "by_components"), ("metrics", "count_error")):
        assert name in ours(str(tmp_path / "mine.py"), kind, command="list").stdout
    without = ours("")
    assert (without.returncode, "error: space.yaml: " in without.stderr) == (2, True)
    lost = ours(os.pathsep.join(["no_such_module_here"]))
    assert lost.returncode == 2
    assert "HYDRALV_TUNE_PLUGINS: no_such_module_here: cannot be loaded" in lost.stderr


def test_an_entry_point_of_an_installed_package_is_known_to_every_command(tmp_path: Path) -> None:
    site = tmp_path / "site"
    (site / "lab-1.0.dist-info").mkdir(parents=True)
    (site / "lab-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: lab\n")
    entry = site / "lab-1.0.dist-info" / "entry_points.txt"
    page = (REPOSITORY / "docs/howto/add-a-metric.md").read_text()
    (site / "lab_metrics.py").write_text(
        "\n".join(re.findall(r"^```python\n(.*?)^```", page, re.S | re.M))
    )

    def listed(module: str) -> subprocess.CompletedProcess[str]:
        entry.write_text(f"[hydralv_tune.plugins]\nof_the_lab = {module}\n")
        return subprocess.run(
            [sys.executable, "-m", "hydralv_tune", "list", "metrics"],
            cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120,
            env={**environment(), "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(site)])},
        )  # fmt: skip

    assert "count_error" in listed("lab_metrics").stdout
    lost = listed("no_such_module")
    assert lost.returncode == 2
    assert "plugin 'of_the_lab' (no_such_module): cannot be loaded" in lost.stderr
