"""Train one recipe on half of a real volume for some minutes, and score both halves.

Run it alone: `.venv/bin/python benchmarks/real_volumes.py [--minutes 10] [--data FOLDER]`. The
volumes are not part of the repository; the folder holds `hydra-11-5` (sparse real EM of Hydra with
`im_sparse_valid` as mask) and `vnc-mito` (mitochondria). Thresholds are swept on the held-out half,
so its score is optimistic in them alone; the score of the trained half uses the same thresholds.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from hydralv_tune.disk.records import TrialRecord
from hydralv_tune.disk.volumes import Volume, read_volume, volume_paths
from hydralv_tune.numerics import metrics
from hydralv_tune.numerics.decoding import decode
from hydralv_tune.one_trial.prediction import load_network, pick_device, predict
from hydralv_tune.one_trial.splits import slab
from hydralv_tune.one_trial.trial import TrialSpec, run_trial
from hydralv_tune.vocabulary.config import Candidate, load_candidate
from hydralv_tune.vocabulary.space import load_space

VOLUMES = {
    "hydra-11-5": ("im_sparse.h5", "label.h5", "im_sparse_valid.h5"),
    "vnc-mito": ("im.h5", "label.h5", None),
}
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
        "split": {"kind": "holdout", "axis": 1, "fraction": 0.5, "margin": MARGIN},
    },
    "monitor": {"evaluation": {"count": 2}},
}  # fmt: skip
"""What is set over `trials/smoke.yaml`: losses weighted toward foreground, half held out."""


def main() -> None:
    """Print the scores of both halves of each volume that is there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
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
    image, label, mask = VOLUMES[name]
    paths = volume_paths(
        [folder / image], [folder / label], [] if mask is None else [folder / mask]
    )
    volume = replace(read_volume(paths[0]), name=name)
    probe = {"optimization": {"max_epochs": 2}, "monitor": {"evaluation": {"count": 1}}}
    rate = _trained(volume, load_candidate("smoke", _over(RECIPE, probe)), threads).training
    # Two fifths are left for evaluations, which predict and sweep half a volume each.
    epochs = max(int(0.6 * seconds * rate["steps_per_s"] / rate["steps_per_epoch"]), 2)
    longer = {"optimization": {"max_epochs": epochs, "scheduler": {"warmup_epochs": 1}}}
    candidate = load_candidate("smoke", _over(RECIPE, longer))
    started = time.perf_counter()
    record = _trained(volume, candidate, threads)
    spent = time.perf_counter() - started
    steps, batch = record.training["steps_done"], record.training["effective_batch"]
    print(f"{name}: {steps} steps of {batch} patches, {spent:.0f} s in all, {threads} threads; "
          f"{record.split['sentence']}")  # fmt: skip
    show("held-out half", record.metrics)
    show("trained half, same thresholds", record.metrics | _of_trained_half(volume, record))


def _over(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Return a partial candidate laid over another."""
    return base | {
        key: _over(base[key], value) if isinstance(base.get(key), dict) else value
        for key, value in over.items()
    }


def _trained(volume: Volume, candidate: Candidate, threads: int) -> TrialRecord:
    """Return the record of a trial in a folder that is thrown away, its best checkpoint kept."""
    space = load_space("smoke")
    out = tempfile.mkdtemp(prefix="real_volumes_")
    spec = TrialSpec(
        number=0, root=0, candidate=candidate, objective=space.objective, grid=space.decoding,
        volumes=[], out=out, threads=threads,
    )  # fmt: skip
    return run_trial(spec, lambda _: None, volumes=[volume])


def _of_trained_half(volume: Volume, record: TrialRecord) -> dict[str, Any]:
    """Return the figures of the half that was trained on, decoded as the record says."""
    length = volume.image.shape[1]
    part = slab(volume, 1, 0, length - round(0.5 * length) - MARGIN)
    assert record.checkpoint is not None
    assert record.decoding is not None
    device = pick_device("auto")
    network, candidate = load_network(record.checkpoint, device=device)
    maps = predict(network, part.image, candidate, device=device, mask=part.mask)
    segments = decode(record.decoding["name"], maps, part.mask, **record.decoding["kwargs"])
    assert part.label is not None
    scored = metrics.score(prediction=segments, truth=part.label, mask=part.mask)
    return {**scored.as_dict(), **{f"{key}_count": n for key, n in scored.counts.items()}}


def show(part: str, figures: dict[str, Any]) -> None:
    """Print the scores of one half."""
    counts = ", ".join(
        f"{figures[f'{key}_count']} {key}" for key in ("missed", "split", "merged", "invented")
    )
    print(f"  {part:<32} error {figures['adapted_rand_error']:.3f}, foreground form "
          f"{figures['adapted_rand_error_foreground']:.3f}, F1 {figures['f1_iou50']:.3f} "
          f"({figures['matched_iou50']} of {figures['instances_true']} matched; {counts})",
          flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
