"""Train every candidate of `space.yaml` on every phantom, and write the tables of `search.py`.

`python benchmarks/search_table/train_curves.py [--processes 2]` takes half an hour on two cores and
writes `curves.csv.gz` (a row per evaluation) and `thresholds.csv.gz` (the baseline's last network
under every combination of decoding thresholds) beside itself. Candidates that are in the tables
are not trained again, so it may be stopped and started.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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
from hydralv_tune.trial.run import Evaluation, TrialSpec, run_trial
from hydralv_tune.trial.scoring.prediction import load_network, pick_device, predict
from hydralv_tune.trial.scoring.sweep.sweep import sweep

HERE = Path(__file__).parent
CURVES, THRESHOLDS = HERE / "curves.csv.gz", HERE / "thresholds.csv.gz"
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
"""What the learning rate is tabulated at; `search.py` takes the nearest."""

LR = "optimization.optimizer.lr"
PHANTOMS = {
    "a": {"shape": (24, 112, 112), "instances": 14, "seed": 1},
    "b": {"shape": (20, 128, 128), "instances": 18, "seed": 2},
    "c": {"shape": (32, 96, 96), "instances": 12, "seed": 3},
}
TIMED = 12
"""Combinations of thresholds whose decoding and scoring are timed."""


def phantom(name: str) -> Volume:
    """Return one of the volumes."""
    made = make_phantom(**PHANTOMS[name])  # type: ignore[arg-type]
    return Volume(name, made.image, made.label, made.mask > 0, made.voxel_size_nm)


def grid(space: SearchSpace) -> Iterator[dict[str, Any]]:
    """Yield the parameters of every candidate that is tabulated."""
    keys = list(space.parameters)
    values = [RATES if key == LR else space.parameters[key].choices for key in keys]
    for chosen in itertools.product(*values):
        yield dict(zip(keys, chosen, strict=True))


def train(task: tuple[str, dict[str, Any]]) -> tuple[pd.DataFrame, pd.DataFrame | None]:
    """Train one candidate; return its evaluations, and the baseline's thresholds."""
    name, params = task
    torch.set_num_threads(1)
    space, volume = load_space(HERE / "space.yaml"), phantom(name)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="search_table_") as out:
        spec = TrialSpec(
            number=0, root=0, candidate=space.candidate(params), objective=space.objective,
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
    """Return the error and F1 of every combination, and what decoding and scoring one costs."""
    device = pick_device("cpu")
    network, candidate = load_network(checkpoint, device=device)
    maps = predict(network, volume.image, candidate, device=device, mask=volume.mask)
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
    return table.assign(phantom=volume.name, seconds=round(cost, 5))


def main() -> None:
    """Train what the tables lack, and write them after each trial."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, default=usable_cores())
    processes = parser.parse_args().processes
    space = load_space(HERE / "space.yaml")
    curves = [pd.read_csv(CURVES)] if CURVES.exists() else []
    thresholds = [pd.read_csv(THRESHOLDS)] if THRESHOLDS.exists() else []
    known = set()
    if curves:
        columns = ["phantom", *space.parameters]
        known = set(curves[0][columns].itertuples(index=False, name=None))
    tasks = [
        (name, params)
        for params in grid(space)
        for name in PHANTOMS
        if (name, *params.values()) not in known
    ]
    print(f"{len(tasks)} trainings in {processes} processes", flush=True)
    start = time.perf_counter()
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        for done, (curve, found) in enumerate(pool.imap_unordered(train, tasks), 1):
            curves.append(curve)
            if found is not None:
                thresholds.append(found)
            if done % 12 == 0 or done == len(tasks):
                _write(pd.concat(curves), CURVES)
                if thresholds:
                    _write(pd.concat(thresholds), THRESHOLDS)
                print(f"{done} trained, {time.perf_counter() - start:.0f} s", flush=True)


def _write(table: pd.DataFrame, path: Path) -> None:
    """Write a table whole or not at all, with the same bytes for the same content."""
    temporary = path.with_suffix(".part")
    table.to_csv(temporary, index=False, compression={"method": "gzip", "mtime": 1})
    temporary.replace(path)


if __name__ == "__main__":
    main()
