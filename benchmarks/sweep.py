"""Measure the sweep against decode-and-score of the full volume with scikit-image's watershed.

On the plan's phantom with degraded targets as probabilities: combinations per second, peak
memory, the ratio to the reference of the same run, growth with voxels and with combinations.

`.venv/bin/python benchmarks/sweep.py --label label.h5 --mask mask.h5` does the same on a real
annotation, without the growth. `--rows` picks rows, and `--folder` keeps the volume between calls.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from _targets import verdict

from hydralv_tune.numerics.cores import usable_cores

CONTOUR = "decode_instance_binary_contour_distance"
AXES: dict[str, list[Any]] = {
    "binary_threshold.seed": [0.3, 0.4, 0.5, 0.6, 0.7],
    "binary_threshold.foreground": [0.2, 0.3, 0.4, 0.5, 0.6, 0.7],
    "contour_threshold.seed": [0.4, 0.6, 0.8, None],
    "contour_threshold.foreground": [0.5, 0.7, 0.9, None],
    "distance_threshold.seed": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6],
    "distance_threshold.foreground": [-0.5, -0.2, 0.0, 0.1],
    "min_seed_size": [1, 4, 16],
    "min_instance_size": [0, 30, 200],
}
SMALL: dict[str, list[Any]] = {
    "distance_threshold.seed": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6],
    "binary_threshold.foreground": [0.2, 0.3, 0.4, 0.5, 0.6, 0.7],
    "distance_threshold.foreground": [-0.5, -0.2, 0.0],
}
ROWS = ("volume, mask", "support, mask", "volume, no mask", "support, no mask", "growth")
TIMES = 2e6
"""What the flood that PyTorch Connectomics runs should reach on the plan's phantom, in its mask."""
SECONDS = {"volume, mask": 15.0, "support, mask": 10.0, "volume, no mask": 45.0,
           "support, no mask": 20.0}  # fmt: skip
"""Of an annotation of 60 million voxels, on two cores."""
LARGE, PEAK_MB = 60e6, 1500.0
PIECE, PIECE_INSTANCES = (24, 128, 128), 24
GROWN = (1, 3, 10, 30, 100)
LINEAR = 1.3
"""How much more than ten times the CPU seconds ten times the voxels may take."""
REFERENCE = {
    "binary_threshold": (0.5, 0.3), "contour_threshold": (0.8, 0.9),
    "distance_threshold": (0.3, -0.5), "min_seed_size": 4, "min_instance_size": 30,
}  # fmt: skip


def growing_axes(tens: int) -> dict[str, list[Any]]:
    """Return axes of 10 to the power of `tens` combinations, on four axes at most."""
    names = ("distance_threshold.seed", "binary_threshold.foreground", "binary_threshold.seed",
             "distance_threshold.foreground", "contour_threshold.foreground")  # fmt: skip
    spans = ((0.1, 0.7), (0.2, 0.7), (0.3, 0.7), (-0.6, 0.1), (0.3, 0.95))
    return {
        name: np.linspace(*span, 10).round(3).tolist()
        for name, span in zip(names[:tens], spans[:tens], strict=True)
    }


def make_volume(folder: Path, label: Path | None, mask: Path | None) -> None:
    """Write labels, mask and degraded targets as arrays that can be mapped."""
    from hydralv_tune.data.volumes import read_labels, read_mask
    from hydralv_tune.numerics.phantom.degradation import degraded_probabilities
    from hydralv_tune.numerics.phantom.volume import make_phantom

    if label is None:
        made = make_phantom()
        labels, valid = made.label, made.mask > 0
    else:
        labels = read_labels(label)
        valid = np.ones(labels.shape, bool) if mask is None else read_mask(mask) > 0
    np.save(folder / "maps.npy", degraded_probabilities(labels))
    np.save(folder / "labels.npy", labels)
    np.save(folder / "mask.npy", valid)


def make_piece(folder: Path) -> None:
    """Write a small phantom alike, of which many together are the larger volumes of the growth."""
    from hydralv_tune.numerics.phantom.degradation import degraded_probabilities
    from hydralv_tune.numerics.phantom.volume import make_phantom

    made = make_phantom(PIECE, instances=PIECE_INSTANCES)
    folder.mkdir()
    np.save(folder / "maps.npy", degraded_probabilities(made.label))
    np.save(folder / "labels.npy", made.label)
    np.save(folder / "mask.npy", made.mask > 0)


def reference(folder: Path) -> dict[str, float]:
    """Decode and score one combination on the full volume, as one does without this package."""
    from scipy import ndimage
    from skimage.metrics import adapted_rand_error
    from skimage.segmentation import watershed

    from hydralv_tune.numerics.metrics.scores import score_labels as score

    maps = np.load(folder / "maps.npy")
    labels, mask = np.load(folder / "labels.npy"), np.load(folder / "mask.npy")
    binary, contour, distance = maps.astype(np.float32)
    best = np.inf
    for _ in range(1 if maps.size > 3 * LARGE else 2):
        start = time.perf_counter()
        passed = []
        for part in (0, 1):
            passed.append(
                (binary > REFERENCE["binary_threshold"][part])
                & (contour < REFERENCE["contour_threshold"][part])
                & (distance > REFERENCE["distance_threshold"][part])
            )
        seeds, _ = ndimage.label(passed[0], np.ones((3, 3, 3)))
        sizes = np.bincount(seeds.ravel())
        seeds[sizes[seeds] < REFERENCE["min_seed_size"]] = 0
        segments = watershed(-np.maximum(distance, 0), seeds)
        segments[~passed[1]] = 0
        sizes = np.bincount(segments.ravel())
        segments[sizes[segments] < REFERENCE["min_instance_size"]] = 0
        adapted_rand_error(labels.astype(np.int32), segments)
        best = min(best, time.perf_counter() - start)
    whole = score(prediction=segments, truth=labels)
    inside = score(prediction=segments, truth=labels, mask=mask)
    return {"seconds": best, "error": whole.adapted_rand_error, "masked": inside.adapted_rand_error}


def work(folder: Path, task: dict[str, Any]) -> dict[str, Any]:
    """Run one sweep in this process, and say how long it took and how much memory it had."""
    from hydralv_tune.numerics.metrics.scores import score_labels as score
    from hydralv_tune.numerics.watershed.decoders import decode
    from hydralv_tune.trial.scoring.sweep.sweep import Grid, sweep, warm_up

    compile_s = warm_up()
    maps, labels = np.load(folder / "maps.npy"), np.load(folder / "labels.npy")
    mask = np.load(folder / "mask.npy") if task["masked"] else None
    times = task.get("times", 1)
    if times > 1:
        maps = np.concatenate([maps] * times, axis=1)
        top = int(labels.max())
        labels = np.concatenate(
            [np.where(labels > 0, labels + n * top, 0).astype(np.int32) for n in range(times)]
        )
        mask = None if mask is None else np.concatenate([mask] * times)
    grid = Grid(CONTOUR, task["axes"], {"flood": task["flood"]})
    cpu = time.process_time()
    result = sweep(maps, labels, mask, grid)
    cpu = time.process_time() - cpu
    status = Path("/proc/self/status").read_text().splitlines()
    peak = next(line for line in status if line.startswith("VmHWM"))
    away = 0.0
    rows = result.table.sample(task.get("checked", 0), random_state=0).to_dict("records")
    for row in rows:
        arguments = {**grid.fixed, "min_seed_size": int(row["min_seed_size"]),
                     "min_instance_size": int(row["min_instance_size"])}  # fmt: skip
        for name in ("binary", "contour", "distance"):
            pair = [row[f"{name}_threshold.{part}"] for part in ("seed", "foreground")]
            arguments[f"{name}_threshold"] = pair
        found = score(
            prediction=decode(CONTOUR, maps, mask, **arguments), truth=labels, mask=mask
        ).as_dict()
        for key in ("adapted_rand_error", "adapted_rand_error_foreground", "f1_iou50",
                    "adapted_rand_precision", "adapted_rand_recall"):  # fmt: skip
            away = max(away, abs(row[key] - found[key]))
    return {
        "combinations": result.combinations, "seconds": result.seconds, "cpu_s": cpu,
        "peak_mb": int(peak.split()[1]) / 1024, "compile_s": compile_s, "away": away,
        "checked": len(rows),
    }  # fmt: skip


def apart(folder: Path, task: dict[str, Any], **environment: str) -> dict[str, Any]:
    """Do a task in a process of its own, so that its peak memory is its own."""
    done = subprocess.run(
        [sys.executable, __file__, "--part", str(folder), json.dumps(task)],
        capture_output=True, text=True, env={**os.environ, **environment},
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(done.stderr)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def line(name: str, got: dict[str, Any], seconds: float) -> str:
    """Return one row of the report."""
    pace = got["combinations"] / got["seconds"]
    return (
        f"{name:28} {got['combinations']:9,} {got['seconds']:8.2f} {got['cpu_s']:8.2f} "
        f"{pace:12,.0f} {pace * seconds:12,.0f} {got['peak_mb']:8.0f}"
    )


def row(folder: Path, name: str, seconds: float, voxels: int) -> dict[str, Any]:
    """Print one row, and what of it has a target; return its figures."""
    flood, _, masked = name.partition(", ")
    task = {"masked": masked == "mask", "flood": flood, "axes": AXES, "checked": 8}
    got = apart(folder, task)
    print(line(name, got, seconds))
    print(f"  {got['checked']} of them against decode and score: at most {got['away']:.1e} apart"
          f"{verdict(got['away'], at_most=0)}")  # fmt: skip
    if voxels > LARGE:
        print(f"  {got['seconds']:.1f} s{verdict(got['seconds'], at_most=SECONDS[name])}")
        print(f"  peak {got['peak_mb']:.0f} MB{verdict(got['peak_mb'], at_most=PEAK_MB)}")
    elif name == ROWS[0]:
        times = seconds * got["combinations"] / got["seconds"]
        print(f"  {times:,.0f} times the reference{verdict(times, at_least=TIMES)}")
    sys.stdout.flush()
    return got


def growth(folder: Path, seconds: float, picture: Path | None) -> None:
    """Print rows for more voxels and for more combinations, and draw the former."""
    piece = folder / "piece"
    if not piece.exists():
        make_piece(piece)
    found = []
    for times in GROWN:
        task = {"masked": True, "flood": "volume", "axes": AXES, "times": times}
        found.append(apart(piece, task))
        print(line(f"{times:3d} x a piece, mask", found[-1], seconds), flush=True)
    for few, many in ((0, 2), (2, 4)):
        ratio = found[many]["cpu_s"] / found[few]["cpu_s"]
        limit = LINEAR * GROWN[many] / GROWN[few]
        print(f"  CPU seconds of {GROWN[many]} pieces are {ratio:.1f} times those of {GROWN[few]}"
              f"{verdict(ratio, at_most=limit)}")  # fmt: skip
    if picture is not None:
        draw(found, picture)
    for tens in (2, 3, 4, 5):
        task = {"masked": True, "flood": "volume", "axes": growing_axes(tens)}
        print(line(f"10^{tens} combinations, mask", apart(folder, task), seconds), flush=True)


def draw(found: list[dict[str, Any]], picture: Path) -> None:
    """Draw CPU seconds over voxels, beside what is linear."""
    from matplotlib.figure import Figure

    voxels = np.array([float(np.prod(PIECE)) * times / 1e6 for times in GROWN])
    taken = np.array([got["cpu_s"] for got in found])
    figure = Figure(figsize=(5, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.loglog(voxels, taken, "o-", label="measured")
    axes.loglog(voxels, taken[-1] * voxels / voxels[-1], "--", color="grey", label="linear")
    axes.set(xlabel="million voxels", ylabel="CPU seconds for 103,680 combinations")
    axes.legend()
    figure.savefig(picture, dpi=120)


def main() -> None:
    """Print the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--label", type=Path, help="instance ids to sweep instead of the phantom")
    parser.add_argument("--mask", type=Path, help="where they count; without it, everywhere")
    parser.add_argument("--folder", type=Path, help="keep the volume here, and take it from here")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--plot", type=Path, help="file to draw the growth into")
    parser.add_argument("--quick", action="store_true", help="the two rows with a mask alone")
    arguments = parser.parse_args()
    rows = ROWS[:2] if arguments.quick else arguments.rows
    with tempfile.TemporaryDirectory() as name:
        folder = arguments.folder or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "mask.npy").exists():
            make_volume(folder, arguments.label, arguments.mask)
        labels, valid = (np.load(folder / f"{kind}.npy") for kind in ("labels", "mask"))
        shape, voxels = "x".join(str(side) for side in labels.shape), labels.size
        print(f"{shape} voxels, {len(np.unique(labels)) - 1} instances, mask {valid.mean():.1%}; "
              f"{usable_cores()} cores, load average before {os.getloadavg()[0]:.1f}",
              flush=True)  # fmt: skip
        del labels, valid
        seconds = reference_seconds(folder)
        print(f"reference: scikit-image, full volume, 1 combination: {seconds:.2f} s")
        print(f"{'sweep':28} {'combin.':>9} {'seconds':>8} {'CPU s':>8} {'per second':>12} "
              f"{'x reference':>12} {'peak MB':>8}", flush=True)  # fmt: skip
        for row_name in rows:
            if row_name != "growth":
                row(folder, row_name, seconds, voxels)
            elif arguments.label is None:
                growth(folder, seconds, arguments.plot)
        print("equal result is said of the volume flood; support is another decoder")
        if not arguments.quick:
            cold = apart(folder, {"masked": True, "flood": "support", "axes": {}},
                         NUMBA_CACHE_DIR=str(Path(name) / "numba"))  # fmt: skip
            print(f"compiled in {cold['compile_s']:.1f} s with no cache, which is not in the "
                  "seconds above")  # fmt: skip
        print(f"load average after {os.getloadavg()[0]:.1f}")


def reference_seconds(folder: Path) -> float:
    """Return what the reference takes for one combination in this run."""
    return float(apart(folder, {"reference": True})["seconds"])


if __name__ == "__main__":
    if sys.argv[1:2] == ["--part"]:
        place, given = Path(sys.argv[2]), json.loads(sys.argv[3])
        print(json.dumps(reference(place) if "reference" in given else work(place, given)))
    else:
        main()
