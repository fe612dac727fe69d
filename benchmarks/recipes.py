"""Train the recipes of the nearest relatives on half of a real volume, and score the other half.

Run it alone: `.venv/bin/python benchmarks/recipes.py [--minutes 10] [--recipes NAME ...]`. Each is
trained for so long; its figures are kept in OUT/VOLUME_WIDTH/NAME.json, and what is kept there is
not trained again. Losses, targets, intensities and thresholds are those of `trials/`; patches and
batches are as small as two cores need, and so are networks unless `--width full`. Volumes as for
`real_volumes.py`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from _timed_training import train_for
from real_volumes import RECIPE, VOLUMES, real_volume

from hydralv_tune.artifacts.writing import write_atomically
from hydralv_tune.config.search_space_files import load_space
from hydralv_tune.config.validation import merged
from hydralv_tune.data.volumes import Volume
from hydralv_tune.numerics.cores import usable_cores
from hydralv_tune.trial.splits import slab

SMALL: dict[str, Any] = {
    "system": {"training": {"batch_size": 2}, "inference": {"batch_size": 4}},
    "data": {
        "patch_size": [16, 64, 64],
        "iter_num_per_epoch": 4,
        "split": {"kind": "holdout", "fraction": 0.5, "margin": 8},
    },
    "optimization": {"precision": "32", "ema": {"decay": 0.98, "warmup_steps": 20}},
    "monitor": {"evaluation": {"count": 1}, "early_stopping": {"enabled": False}},
    "inference": {
        "sliding_window": {"window_size": [16, 64, 64], "overlap": 0.25},
        "test_time_augmentation": {"enabled": False},
    },
}
SECTIONS = {"hydra-11-5": (27, 59), "vnc-mito": (0, 20)}
"""What of a volume is used, with about as many instances in both halves: on two cores the widest
networks would take an hour to predict half of `hydra-11-5`."""
FLAT = {"data": {"patch_size": [9, 64, 64]},
        "inference": {"sliding_window": {"window_size": [9, 64, 64]}}}  # fmt: skip
RECIPES: dict[str, dict[str, Any]] = {
    "smoke": RECIPE,
    "vesicle_xm": SMALL,
    "vesiclepy": merged(SMALL, FLAT),
    "nnunet_residual": SMALL,
}
"""What is set over each of `trials/`; the first is the recipe of `real_volumes.py`."""
QUARTER = {
    "vesicle_xm": [8, 16, 32, 64, 128],
    "vesiclepy": [8, 16, 24, 32, 40],
    "nnunet_residual": [8, 16, 32, 64, 128],
}
"""Channels at a quarter of the width: a step of the full one takes ten seconds of a core."""
FIGURES = ("adapted_rand_error", "adapted_rand_error_foreground", "f1_iou50")


def main() -> None:
    """Train what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--volume", default="hydra-11-5", choices=list(VOLUMES))
    parser.add_argument("--recipes", nargs="*", default=list(RECIPES), choices=list(RECIPES))
    default = Path(__file__).parents[2] / "shared" / "data"
    parser.add_argument("--data", type=Path, default=default)
    parser.add_argument("--width", default="quarter", choices=["quarter", "full"])
    parser.add_argument("--out", type=Path, default=Path("runs/recipes"))
    arguments = parser.parse_args()
    folder = arguments.data / arguments.volume
    if not folder.is_dir():
        print(f"{arguments.volume}: not in {arguments.data}, so it is not measured.")
        return
    torch.set_num_threads(arguments.threads)
    whole, axis = real_volume(arguments.volume, folder)
    volume = slab(whole, 0, *SECTIONS[arguments.volume])
    kept = arguments.out / f"{arguments.volume}_{arguments.width}"
    for name in arguments.recipes:
        if not (kept / f"{name}.json").is_file():
            changes = merged(RECIPES[name], {"data": {"split": {"axis": axis}}})
            if arguments.width == "quarter" and name in QUARTER:
                changes = merged(changes, {"model": {"filters": QUARTER[name]}})
            figures = measured(name, volume, changes, arguments.minutes * 60, arguments.threads)
            write_atomically(kept / f"{name}.json", json.dumps(figures, indent=1).encode())
    print(
        "| recipe | steps | patches a step | minutes | adapted Rand error | foreground form | F1 |"
    )
    print("|---|---|---|---|---|---|---|")
    for name in RECIPES:
        if (kept / f"{name}.json").is_file():
            row = json.loads((kept / f"{name}.json").read_text())
            scores = " | ".join(f"{row[key]:.3f}" for key in FIGURES)
            print(f"| {name} | {row['steps']} | {row['batch']} | {row['seconds'] / 60:.1f} | "
                  f"{scores} |")  # fmt: skip


def measured(
    name: str, volume: Volume, changes: dict[str, Any], seconds: float, threads: int
) -> dict[str, Any]:
    """Return what a recipe reaches on the half that it was not trained on.

    Args:
        name: Of `RECIPES`.
        volume: Cut in halves.
        changes: Over the recipe.
        seconds: Of training, about.
        threads: Of the CPU.
    """
    record, spent = train_for(
        seconds, volume, name, changes, space=load_space("hydra_lv"), threads=threads
    )
    figures = {key: record.metrics[key] for key in FIGURES}
    training = record.training
    return {
        "steps": training["steps_done"], "batch": training["effective_batch"], "seconds": spent,
        "decoding": record.decoding, **figures,
    }  # fmt: skip


if __name__ == "__main__":
    main()
