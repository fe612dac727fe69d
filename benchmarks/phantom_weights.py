"""Train a small network on endless random phantoms, and ask whether fine-tuning gains from it.

`.venv/bin/python benchmarks/phantom_weights.py train [--minutes 60] [--out FOLDER]` makes the
weights: each round trains on phantoms that no round before has seen, and starts with the weights of
the last. Their vesicles are bright or dark, with rims from none to black, in voxels of many sizes.
The same command goes on.

`.venv/bin/python benchmarks/phantom_weights.py compare [--minutes 2 5 10] [--data FOLDER]`
fine-tunes on one half of each real volume, with the weights that ship and from scratch, on the same
number of patches, and prints the F1 of the other half; `--weights FILE` compares others.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from _timed_training import trained
from real_volumes import MARGIN, VOLUMES, real_volume

from hydralv_tune.artifacts.writing import write_atomically
from hydralv_tune.config.candidate import Candidate
from hydralv_tune.config.files import whole_candidate
from hydralv_tune.config.search_space_files import load_space
from hydralv_tune.config.validation import merged
from hydralv_tune.data.volumes import Volume
from hydralv_tune.numerics.phantom.volume import make_phantom, random_style
from hydralv_tune.results.export.models import write_safetensors
from hydralv_tune.trial.scoring.prediction import load_network

SPACE = load_space("hydra_lv_small")
SHAPE, INSTANCES, PHANTOMS, HELD_OUT = (24, 112, 192), 14, 48, 8
PATCHES_A_ROUND, PATCHES_AN_EPOCH = 1600, 40
RATES = (5e-3, 3e-3)
"""The highest learning rate of the first round and of those after it."""
TRAINED: dict[str, Any] = {
    "data": {
        "augmentation": {
            "affine": {"enabled": True},
            "intensity": {"enabled": True},
            "misalignment": {"enabled": True},
            "missing_section": {"enabled": True},
            "motion_blur": {"enabled": True},
        },
        "split": {"kind": "volumes", "volumes": [f"held-out-{n}" for n in range(HELD_OUT)]},
    },
    "monitor": {"evaluation": {"count": 1}},
}
STARTS = ("scratch", "phantom")
FIGURES = ("f1_iou50", "adapted_rand_error")


def main() -> None:
    """Make the weights, or compare with and without."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["train", "compare"], nargs="?", default="compare")
    parser.add_argument("--minutes", type=float, nargs="*", help="60 for train; 2 for compare")
    parser.add_argument("--out", type=Path, default=Path("runs/phantom_weights"))
    default = Path(__file__).parents[2] / "shared" / "data"
    parser.add_argument("--data", type=Path, default=default)
    parser.add_argument("--volumes", nargs="*", default=list(VOLUMES), choices=list(VOLUMES))
    parser.add_argument("--seeds", type=int, nargs="*", default=[1, 2, 3])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--weights", default="phantom", help="that are compared; those that ship")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.what == "train":
        train(arguments.out, 60 * (arguments.minutes or [60.0])[0], arguments.threads)
    else:
        arguments.minutes = arguments.minutes or [2.0]
        compare(arguments)


def train(out: Path, seconds: float, threads: int) -> None:
    """Train round after round for so long; each leaves `weights.ckpt` and a line of `rounds`."""
    rounds, weights = out / "rounds.jsonl", out / "weights.ckpt"
    done = len(rounds.read_text().splitlines()) if rounds.exists() else 0
    held_out = [
        replace(volume, name=f"held-out-{n}") for n, volume in enumerate(phantoms(0, HELD_OUT))
    ]
    end = time.monotonic() + seconds
    with ProcessPoolExecutor(1) as pool:
        following: Future[list[Volume]] = pool.submit(phantoms, first_seed(done), PHANTOMS)
        while time.monotonic() < end:
            volumes = following.result()
            following = pool.submit(phantoms, first_seed(done + 1), PHANTOMS)
            candidate = small_unet(
                TRAINED,
                str(weights) if done else None,
                PATCHES_A_ROUND,
                RATES[min(done, 1)],
                seed=done,
            )
            record = trained([*volumes, *held_out], candidate, SPACE, threads, out / "round")
            assert record.checkpoint is not None
            write_atomically(weights, Path(record.checkpoint).read_bytes())
            ship(weights, out / "phantom.safetensors")
            done += 1
            line = {"round": done, **{key: record.metrics[key] for key in FIGURES}}
            with rounds.open("a") as log:
                log.write(json.dumps(line) + "\n")
            print(line, flush=True)
        following.cancel()


def ship(checkpoint: Path, out: Path) -> None:
    """Write the weights as `trials/` holds them, with nothing of where they were made."""
    network, candidate = load_network(checkpoint)
    model = candidate.model.model_copy(update={"external_weights_path": None})
    write_safetensors(out, network, candidate.model_copy(update={"model": model}))


def first_seed(done: int) -> int:
    """Return the first seed of a round; those below HELD_OUT are held out."""
    return 1000 * (done + 1)


def phantoms(first: int, count: int) -> list[Volume]:
    """Return so many phantoms, two of three of a random style, every other without its mask."""
    volumes: list[Volume] = []
    seed = first
    while len(volumes) < count:
        try:
            style = random_style(seed) if seed % 3 else None
            instances = INSTANCES if style is None else round(INSTANCES / max(style.size, 1) ** 0.6)
            made = make_phantom(SHAPE, instances=instances, seed=seed, style=style)
        except ValueError:
            pass  # vesicles too large for so many of them
        else:
            volumes.append(
                Volume(
                    name=f"phantom-{seed}",
                    image=made.image,
                    label=made.label,
                    mask=made.mask > 0 if seed % 2 else None,
                    voxel_size_nm=made.voxel_size_nm,
                )
            )
        seed += 1
    return volumes


def small_unet(
    changes: dict[str, Any], weights: str | None, patches: int, rate: float, seed: int
) -> Candidate:
    """Return the first recipe of `hydra_lv_small`, changed."""
    epochs = max(patches // PATCHES_AN_EPOCH, 2)
    mapping = merged(
        SPACE.whole_mapping({}, SPACE.recipes["small_unet"]),
        {
            "system": {"seed": seed},
            "data": {"iter_num_per_epoch": PATCHES_AN_EPOCH},
            "model": {"external_weights_path": weights},
            "optimization": {
                "max_epochs": epochs,
                "optimizer": {"lr": rate},
                "scheduler": {"warmup_epochs": 1},
            },
        },
    )
    return whole_candidate(merged(mapping, changes), "small_unet")


def compare(arguments: argparse.Namespace) -> None:
    """Fine-tune what is missing, and print the figures of each and their means."""
    rows = []
    for name in arguments.volumes:
        folder = arguments.data / name
        if not folder.is_dir():
            print(f"{name}: not in {arguments.data}, so it is not measured.")
            continue
        volume, axis = real_volume(name, folder)
        split = {"kind": "holdout", "axis": axis, "fraction": 0.5, "margin": MARGIN}
        rows += compared(arguments, volume, {"data": {"split": split}})
    if not rows:
        return
    table = pd.DataFrame(rows)
    print(table.to_string(index=False))
    print(table.groupby(["volume", "minutes", "start"])[list(FIGURES)].mean().to_string())


def compared(
    arguments: argparse.Namespace, volume: Volume, changes: dict[str, Any]
) -> list[dict[str, Any]]:
    """Return the figures of the other half of a volume, those that are kept included.

    Both starts get the same patches: as many as fit into the minutes from scratch. Only the
    thresholds are chosen on that half, since nothing is evaluated before the end.
    """
    kept = arguments.out / f"{volume.name}.json"
    rows: list[dict[str, Any]] = json.loads(kept.read_text()) if kept.exists() else []
    every = (
        {"volume": volume.name, "minutes": minutes, "seed": seed, "start": start}
        for seed, minutes, start in itertools.product(arguments.seeds, arguments.minutes, STARTS)
    )
    missing = [key for key in every if not any(key.items() <= row.items() for row in rows)]
    if not missing:
        return rows
    out, threads = arguments.out / volume.name, arguments.threads
    changes = merged(changes, {"monitor": {"evaluation": {"count": 1}}})
    probe = small_unet(changes, None, 2 * PATCHES_AN_EPOCH, RATES[0], 0)
    pace = trained([volume], probe, SPACE, threads, out).training["patches_per_s"]
    for key in missing:
        # What the other start had, where it was trained in a call before.
        same = [
            row["patches"] for row in rows if all(row[k] == key[k] for k in ("minutes", "seed"))
        ]
        patches = same[0] if same else int(60 * key["minutes"] * pace)
        weights = arguments.weights if key["start"] == "phantom" else None
        chosen = small_unet(changes, weights, patches, RATES[0], key["seed"])
        record = trained([volume], chosen, SPACE, threads, out)
        rows.append({**key, "patches": patches, **{name: record.metrics[name] for name in FIGURES}})
        write_atomically(kept, json.dumps(rows, indent=1).encode())
        print(rows[-1], flush=True)
    return rows


if __name__ == "__main__":
    main()
