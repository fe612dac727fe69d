"""Train one recipe on half of a real volume for some minutes, and score both halves.

Run it alone: `.venv/bin/python benchmarks/real_volumes.py [--minutes 10] [--data FOLDER]`. The
volumes are not part of the repository; the folder holds `hydra-11-5` (sparse real EM of Hydra with
`im_sparse_valid` as mask) and `vnc-mito` (mitochondria). Thresholds are swept on the held-out half,
so its score is optimistic in them alone; the score of the trained half uses the same thresholds.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from _timed_training import sentence, show_scores, train_for

from hydralv_tune.artifacts.records import TrialRecord
from hydralv_tune.config.search_space import SearchSpace
from hydralv_tune.config.search_space_files import load_space
from hydralv_tune.config.validation import merged
from hydralv_tune.data.volumes import Volume, read_volume, volume_paths
from hydralv_tune.numerics.cores import usable_cores
from hydralv_tune.numerics.metrics import scores
from hydralv_tune.numerics.watershed.decoders import decode
from hydralv_tune.trial.fitted_normalisation import with_normalisation
from hydralv_tune.trial.scoring.prediction import load_network, pick_device, predict
from hydralv_tune.trial.splits import slab

VOLUMES = {
    "hydra-11-5": ("im_sparse.h5", "label.h5", "im_sparse_valid.h5", 2),
    "vnc-mito": ("im.h5", "label.h5", None, 1),
}
"""Image, labels, mask, and the axis that is cut: the one whose halves hold most alike."""

MARGIN = 8
RECIPE: dict[str, Any] = {
    "model": {
        "loss_kwargs": [
            {}, {"foreground_weight": "balanced"}, {}, {"foreground_weight": "balanced"},
            {"beta": 0.1, "tanh": True, "foreground_weight": "balanced"},
        ]
    },
    "data": {
        "iter_num_per_epoch": 20,
        "augmentation": {"affine": {"enabled": True}, "intensity": {"enabled": True}},
        "split": {"kind": "holdout", "fraction": 0.5, "margin": MARGIN},
    },
    "monitor": {"evaluation": {"count": 2}},
}  # fmt: skip
"""What is set over `trials/smoke.yaml`: losses weighted toward foreground, affine and
intensity augmentation beside flips and turns, half held out."""


def main() -> None:
    """Print the scores of both halves of each volume that is there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--volumes", nargs="*", default=list(VOLUMES), choices=list(VOLUMES))
    default = Path(__file__).parents[2] / "shared" / "data"
    parser.add_argument("--data", type=Path, default=default)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for name in arguments.volumes:
        folder = arguments.data / name
        if not folder.is_dir():
            print(f"{name}: not in {arguments.data}, so it is not measured.")
            continue
        report(name, folder, arguments.minutes * 60, arguments.threads)


def report(name: str, folder: Path, seconds: float, threads: int) -> None:
    """Train on the low half of a volume for so long, and print the scores of both halves."""
    volume, axis = real_volume(name, folder)
    record, spent = train_for(
        seconds, volume, "smoke", merged(RECIPE, {"data": {"split": {"axis": axis}}}),
        space=_space(), threads=threads,
    )  # fmt: skip
    print(f"{name}: {sentence(record, spent, threads)}")
    show_scores("held-out half", record.metrics)
    show_scores(
        "trained half, same thresholds", record.metrics | _of_trained_half(volume, axis, record)
    )


def real_volume(name: str, folder: Path) -> tuple[Volume, int]:
    """Return one of `VOLUMES`, read from its folder, and the axis along which it is cut."""
    image, label, mask, axis = VOLUMES[name]
    (paths,) = volume_paths(
        [folder / image], [folder / label], [] if mask is None else [folder / mask]
    )
    return replace(read_volume(paths), name=name), axis


def _space() -> SearchSpace:
    """Return hydra_lv, with sizes for instances that fill thousands of voxels."""
    space = load_space("hydra_lv")
    grid = {**space.decoding.grid, "min_instance_size": [0, 50, 200, 1000]}
    decoding = space.decoding.model_copy(update={"grid": grid})
    return space.model_copy(update={"decoding": decoding})


def _of_trained_half(volume: Volume, axis: int, record: TrialRecord) -> dict[str, Any]:
    """Return the figures of the half that was trained on, decoded as the record says."""
    length = volume.image.shape[axis]
    assert record.checkpoint is not None
    assert record.decoding is not None
    device = pick_device("auto")
    network, candidate = load_network(record.checkpoint, device=device)
    whole = with_normalisation(volume, candidate.data)
    part = slab(whole, axis, 0, length - round(0.5 * length) - MARGIN)
    maps = predict(
        network, part.image, candidate, device=device, mask=part.mask,
        normalisation=part.normalisation,
    )  # fmt: skip
    segments = decode(record.decoding["name"], maps, part.mask, **record.decoding["kwargs"])
    assert part.label is not None
    scored = scores.score_labels(prediction=segments, truth=part.label, mask=part.mask)
    return {**scored.as_dict(), **{f"{key}_count": n for key, n in scored.counts.items()}}


if __name__ == "__main__":
    main()
