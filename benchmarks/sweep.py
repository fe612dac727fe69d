"""Measure the sweep against decode-and-score of the full volume with scikit-image's watershed.

On the plan's phantom with degraded targets as probabilities: combinations per second, peak
memory, the ratio to the reference of the same run, growth with voxels and with combinations.

`.venv/bin/python benchmarks/sweep.py --label label.h5 --mask mask.h5` does the same on a real
annotation, without the growth.
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
    """Write labels, mask and degraded targets as arrays that can be mapped; say what they are."""
    from hydralv_tune.data.volumes import read_labels, read_mask
    from hydralv_tune.numerics.phantom.degradation import degraded_probabilities
    from hydralv_tune.numerics.phantom.volume import make_phantom

    if label is None:
        made = make_phantom()
        labels, valid, name = made.label, made.mask > 0, "the plan's phantom"
    else:
        labels, name = read_labels(label), label.name
        valid = np.ones(labels.shape, bool) if mask is None else read_mask(mask) > 0
    np.save(folder / "maps.npy", degraded_probabilities(labels))
    np.save(folder / "labels.npy", labels)
    np.save(folder / "mask.npy", valid)
    instances, shape = len(np.unique(labels)) - 1, "x".join(str(side) for side in labels.shape)
    print(f"{name}: {shape}, {instances} instances, mask {valid.mean():.1%}", flush=True)


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
    for _ in range(2):
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
            [np.where(labels > 0, labels + n * top, 0).astype(np.uint16) for n in range(times)]
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


def growth(folder: Path, seconds: float) -> None:
    """Print rows for more voxels and for more combinations."""
    for times in (1, 3, 10):
        task = {"masked": True, "flood": "volume", "axes": SMALL, "times": times}
        print(line(f"{times:2d} x the voxels, mask", apart(folder, task), seconds))
    for tens in (2, 3, 4, 5):
        task = {"masked": True, "flood": "volume", "axes": growing_axes(tens)}
        print(line(f"10^{tens} combinations, mask", apart(folder, task), seconds))


def main() -> None:
    """Print the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--label", type=Path, help="instance ids to sweep instead of the phantom")
    parser.add_argument("--mask", type=Path, help="where they count; without it, everywhere")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        load = os.getloadavg()[0]
        print(f"{usable_cores()} cores, load average before {load:.1f}", flush=True)
        make_volume(folder, arguments.label, arguments.mask)
        cold = apart(folder, {"masked": True, "flood": "support", "axes": {}},
                     NUMBA_CACHE_DIR=str(folder / "numba"))  # fmt: skip
        peer = apart(folder, {"reference": True})
        print(f"reference: scikit-image, full volume, 1 combination: {peer['seconds']:.2f} s")
        print(f"{'sweep':28} {'combin.':>9} {'seconds':>8} {'CPU s':>8} {'per second':>12} "
              f"{'x reference':>12} {'peak MB':>8}")  # fmt: skip
        for masked in (True, False):
            for flood in ("volume", "support"):
                task = {"masked": masked, "flood": flood, "axes": AXES, "checked": 8}
                got = apart(folder, task)
                print(line(f"{flood}, {'mask' if masked else 'no mask'}", got, peer["seconds"]))
                print(f"  {got['checked']} of them against decode and score: at most "
                      f"{got['away']:.1e} apart", flush=True)  # fmt: skip
        print(f"compiled in {cold['compile_s']:.1f} s with no cache, read from it in "
              f"{got['compile_s']:.2f} s, neither in the seconds above")  # fmt: skip
        print("equal result is said of the volume flood; support is another decoder")
        if arguments.label is None:
            growth(folder, peer["seconds"])
        print(f"load average after {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--part"]:
        place, given = Path(sys.argv[2]), json.loads(sys.argv[3])
        print(json.dumps(reference(place) if "reference" in given else work(place, given)))
    else:
        main()
