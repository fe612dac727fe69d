"""Train every candidate of `space.yaml` on every volume, and write the tables of `search.py`.

`python benchmarks/search_table/train_curves.py [--processes 2] [--volumes a b c] [--minutes M]`
takes half an hour on two cores for the three phantoms and writes `curves.csv.gz` (a row per
evaluation) and `thresholds.csv.gz` (the baseline's last network under every combination of decoding
thresholds) beside itself. Candidates that are in the tables are not trained again, so it may be
stopped and started; `--minutes` stops it by itself.

The two real volumes, `hydra` and `mito`, are not part of the repository: `--data FOLDER` is where
`hydra-11-5` and `vnc-mito` lie. A crop of each is trained on in its low half along y and scored in
the other, with four rates instead of six.
"""

from __future__ import annotations

import argparse
import itertools
import math
import multiprocessing
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import torch

from hydralv_tune.config.errors import TrialFailed, TrialInterrupted
from hydralv_tune.config.search_space import SearchSpace
from hydralv_tune.config.search_space_files import load_space
from hydralv_tune.data.volumes import Volume
from hydralv_tune.numerics.cores import usable_cores
from hydralv_tune.numerics.metrics import scores
from hydralv_tune.numerics.phantom.volume import make_phantom
from hydralv_tune.numerics.watershed.decoders import decode
from hydralv_tune.trial.fitted_normalisation import with_normalisation
from hydralv_tune.trial.run import Evaluation, TrialSpec, run_trial
from hydralv_tune.trial.scoring.prediction import load_network, pick_device, predict
from hydralv_tune.trial.scoring.sweep.sweep import sweep
from hydralv_tune.trial.splits import slab

HERE = Path(__file__).parent
CURVES, THRESHOLDS = HERE / "curves.csv.gz", HERE / "thresholds.csv.gz"
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
"""What the learning rate is tabulated at on phantoms; `search.py` mixes the curves of two."""

RATES_OF_REAL = (1e-4, 1e-3, 1e-2, 3e-2)
"""The same on real volumes."""

LR = "optimization.optimizer.lr"
PHANTOMS = {
    "a": {"shape": (24, 112, 112), "instances": 14, "seed": 1},
    "b": {"shape": (20, 128, 128), "instances": 18, "seed": 2},
    "c": {"shape": (32, 96, 96), "instances": 12, "seed": 3},
}


@dataclass(frozen=True)
class RealCrop:
    """What is cut out of a real volume.

    Args:
        folder: Where its files lie, under the folder of all data.
        files: Of image, label and mask; without the last, its mask is everywhere.
        box: Of the crop, z, y, x.
        smallest: `min_instance_size` that is swept, in voxels of the crop.
    """

    folder: str
    files: tuple[str, ...]
    box: tuple[slice, slice, slice]
    smallest: tuple[int, int]


REAL = {
    # Where vesicles are densest: 39 in the low half, 59 in the high one.
    "hydra": RealCrop("hydra-11-5", ("im_sparse.h5", "label.h5", "im_sparse_valid.h5"),
                      (slice(16, 48), slice(256, 512), slice(192, 384)), (0, 200)),
    # Every second voxel of a section: 9 and 10 mitochondria.
    "mito": RealCrop("vnc-mito", ("im.h5", "label.h5"),
                     (slice(None), slice(None, None, 2), slice(None, None, 2)), (0, 200)),
}  # fmt: skip
HALVES = {"data": {"split": {"kind": "holdout", "fraction": 0.5, "axis": 1, "margin": 8}}}
"""What is set over each candidate on a real volume."""

TIMED = 12
"""Combinations of thresholds whose decoding and scoring are timed."""


def volume_of(name: str, data: Path) -> Volume:
    """Return one of the volumes; a real one is read from the folder of all data."""
    if name in REAL:
        crop = REAL[name]
        arrays = []
        for file in crop.files:
            with h5py.File(data / crop.folder / file) as opened:
                arrays.append(np.ascontiguousarray(opened["main"][crop.box]))
        label, mask = arrays[1].astype(np.int32), arrays[2] > 0 if len(arrays) > 2 else None
        return Volume(name, arrays[0], label, mask)
    made = make_phantom(**PHANTOMS[name])  # type: ignore[arg-type]
    return Volume(name, made.image, made.label, made.mask > 0, made.voxel_size_nm)


def space_of(name: str) -> SearchSpace:
    """Return the space that is tabulated, with the sizes of a volume's instances."""
    space = load_space(HERE / "space.yaml")
    if name not in REAL:
        return space
    swept = {**space.decoding.grid, "min_instance_size": list(REAL[name].smallest)}
    return space.model_copy(update={"decoding": space.decoding.model_copy(update={"grid": swept})})


def grid(space: SearchSpace, name: str) -> Iterator[dict[str, Any]]:
    """Yield the parameters of every candidate that is tabulated on a volume."""
    keys = list(space.parameters)
    rates = RATES_OF_REAL if name in REAL else RATES
    values = [rates if key == LR else space.parameters[key].choices for key in keys]
    for chosen in itertools.product(*values):
        yield dict(zip(keys, chosen, strict=True))


def train(task: tuple[str, dict[str, Any], Path]) -> tuple[pd.DataFrame, pd.DataFrame | None]:
    """Train one candidate; return its evaluations, and the baseline's thresholds."""
    name, params, data = task
    torch.set_num_threads(1)
    space, volume = space_of(name), volume_of(name, data)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="search_table_") as out:
        spec = TrialSpec(
            number=0, root=0, objective=space.objective,
            candidate=space.candidate(params, HALVES if name in REAL else None),
            grid=space.decoding, volumes=[], out=out, threads=1,
        )  # fmt: skip
        start = time.perf_counter()

        def note(evaluation: Evaluation) -> None:
            rows.append(
                {"evaluation": evaluation.step, "seconds": time.perf_counter() - start,
                 "value": evaluation.value, "f1": evaluation.best_f1_iou50}
            )  # fmt: skip
            if evaluation.step == evaluations and not baseline:
                raise TrialInterrupted("all is known")  # the rest, drawing, is not needed

        baseline = params == space.warm_start("baseline").params
        evaluations = spec.candidate.monitor.evaluation.count

        try:
            record = run_trial(spec, note, volumes=[volume])
        except TrialInterrupted:
            return _labelled(name, params, rows), None
        except TrialFailed:
            failed = {"evaluation": 0, "seconds": time.perf_counter() - start}
            return _labelled(name, params, [*rows, failed]), None
        assert record.checkpoint is not None
        return _labelled(name, params, rows), _thresholds(space, volume, record.checkpoint)


def _labelled(name: str, params: dict[str, Any], rows: list[dict[str, Any]]) -> pd.DataFrame:
    """Return the rows of a trial as they stand in the table."""
    return pd.DataFrame(rows).round(5).assign(phantom=name, **params)


def _thresholds(space: SearchSpace, volume: Volume, checkpoint: str) -> pd.DataFrame:
    """Return the error and F1 of every combination, and what decoding and scoring one costs.

    That is on the part of the volume that is scored.
    """
    device = pick_device("cpu")
    network, candidate = load_network(checkpoint, device=device)
    volume = with_normalisation(volume, candidate.data)
    if volume.name in REAL:
        length = volume.image.shape[1]
        volume = slab(volume, 1, length - length // 2, length)
    maps = predict(
        network, volume.image, candidate, device=device, mask=volume.mask,
        normalisation=volume.normalisation,
    )  # fmt: skip
    swept = sweep(
        [maps], [volume.label], [volume.mask], space.decoding, objective=space.objective, threads=1
    )
    table = swept.table[[*swept.axes, "adapted_rand_error", "f1_iou50"]]
    kwargs = swept.winner.arguments
    decode(space.decoding.decoder, maps, volume.mask, **kwargs)  # what is compiled is compiled
    assert volume.label is not None
    start = time.perf_counter()
    for _ in range(TIMED):
        segments = decode(space.decoding.decoder, maps, volume.mask, **kwargs)
        scores.score_labels(prediction=segments, truth=volume.label, mask=volume.mask)
    cost = (time.perf_counter() - start) / TIMED
    return table.assign(phantom=volume.name.partition("[")[0], seconds=round(cost, 5))


def main() -> None:
    """Train what the tables lack, and write them after each trial."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, default=usable_cores())
    parser.add_argument("--volumes", nargs="*", default=list(PHANTOMS), choices=[*PHANTOMS, *REAL])
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin nothing after that")
    parser.add_argument("--data", type=Path, default=HERE.parents[2] / "shared" / "data")
    arguments = parser.parse_args()
    end = time.monotonic() + 60 * arguments.minutes
    space = load_space(HERE / "space.yaml")
    curves = [pd.read_csv(CURVES)] if CURVES.exists() else []
    thresholds = [pd.read_csv(THRESHOLDS)] if THRESHOLDS.exists() else []
    known = set()
    if curves:
        columns = ["phantom", *space.parameters]
        known = set(curves[0][columns].itertuples(index=False, name=None))
    tasks = [
        (name, params, arguments.data)
        for name in arguments.volumes
        for params in grid(space, name)
        if (name, *params.values()) not in known
    ]
    print(f"{len(tasks)} trainings in {arguments.processes} processes", flush=True)
    start = time.perf_counter()
    with multiprocessing.get_context("spawn").Pool(arguments.processes) as pool:
        for done, (curve, found) in enumerate(pool.imap_unordered(train, tasks), 1):
            curves.append(curve)
            if found is not None:
                thresholds.append(found)
                _write(pd.concat(thresholds), THRESHOLDS)
            _write(pd.concat(curves), CURVES)
            print(f"{done} trained, {time.perf_counter() - start:.0f} s", flush=True)
            if time.monotonic() > end:
                pool.terminate()
                break


def _write(table: pd.DataFrame, path: Path) -> None:
    """Write a table whole or not at all, with the same bytes for the same content."""
    temporary = path.with_suffix(".part")
    table.to_csv(temporary, index=False, compression={"method": "gzip", "mtime": 1})
    temporary.replace(path)


if __name__ == "__main__":
    main()
