"""Memory and time of `segment` on a large volume, against the same in memory; killed and continued.

Run it alone: `.venv/bin/python benchmarks/whole_volume.py [--shape 100 500 500]`. Each step is a
process of its own, whose peak memory the kernel tells. `--piece-s` kills a step after so many
seconds; the same command goes on with it, since that is what `segment` can do.

The network is small and has random weights; thresholds are quantiles of what it says of a corner,
so that a fixed share of the volume is decoded.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from _targets import verdict

from hydralv_tune.artifacts.records import FORMAT, FORMAT_VERSION
from hydralv_tune.config.files import candidate_from_mapping
from hydralv_tune.data.formats.files import create_array
from hydralv_tune.numerics.phantom.volume import make_phantom
from hydralv_tune.trial.scoring.prediction import network_of, predict

SIZE_NM = (30.0, 8.0, 8.0)
TILE = (25, 128, 128)
CELLS_APART = 4
"""Tissue lies in every so many tiles along y and x; the mask leaves out the rest."""
STEPS = ("masked", "whole", "memory", "memory_masked", "killed", "ray")
IN_MEMORY = """
import sys
from hydralv_tune.data.volumes import read_array, write_array
from hydralv_tune.numerics.watershed.decoders import decode
from hydralv_tune.results.segmentation import load_model
from hydralv_tune.trial.scoring.prediction import load_network, predict
best, image, out, *mask = sys.argv[1:]
model = load_model(best)
network, candidate = load_network(model.checkpoint)
inside = read_array(mask[0]) > 0 if mask else None
maps = predict(network, read_array(image), candidate, mask=inside)
labels = decode(model.decoder, maps, inside, **model.arguments)
write_array(out, labels.astype("uint32"), voxel_size_nm=(30, 8, 8))
"""
CLUSTER = """
import sys
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
for _ in range(int(sys.argv[1]) - 1):
    cluster.add_node(num_cpus=1)
cluster.wait_for_nodes()
print(cluster.address, flush=True)
sys.stdin.read()
cluster.shutdown()
"""


def main() -> None:
    """Make the volume where it is missing, run the steps, print what they took."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--shape", nargs=3, type=int, default=(200, 1000, 1000), metavar=("Z", "Y", "X")
    )
    parser.add_argument("--folder", type=Path, default=Path("runs/whole_volume"))
    parser.add_argument("--memory-gb", type=float, default=2.0)
    parser.add_argument("--overlap", type=float, default=0.25, help="Of windows; 0 is lighter.")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=STEPS)
    parser.add_argument("--piece-s", type=float, help="Kill a step after so many seconds.")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    folder = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "best.yaml").exists():
        prepare(folder, tuple(arguments.shape), arguments.overlap)
    bench = Bench(folder, arguments.memory_gb, arguments.threads, arguments.piece_s)
    for step in arguments.steps:
        getattr(bench, step)()
    print(json.dumps(bench.results, indent=1))
    show(bench.results, arguments.memory_gb)


def show(results: dict[str, dict[str, Any]], memory_gb: float) -> None:
    """Print a line for each figure that has a target, of the steps that were run to their end."""
    done = {name: kept for name, kept in results.items() if kept.get("done")}
    for name in ("masked", "whole"):
        if name in done:
            peak = done[name]["peak_gb"]
            print(f"{name}: peak {peak:.2f} GB{verdict(peak, at_most=memory_gb)}")
    for name, beside in (("masked", "memory_masked"), ("whole", "memory")):
        if {name, beside} <= done.keys():
            ratio = done[name]["seconds"] / done[beside]["seconds"]
            print(f"{name}: {ratio:.2f} times the time in memory{verdict(ratio, at_most=1.3)}")
    if {"ray_1", "ray_2"} <= done.keys():
        ratio = done["ray_1"]["seconds"] / done["ray_2"]["seconds"]
        print(f"two workers: {ratio:.2f} times as fast as one{verdict(ratio, at_least=1.6)}")
    for name, words in (("killed", "killed twice"), ("ray_2", "two workers")):
        if "same_file" in done.get(name, {}):
            same = done[name]["same_file"]
            print(f"{words}: same file as otherwise{verdict(same, at_least=1)}")


def prepare(folder: Path, shape: tuple[int, int, int], overlap: float) -> None:
    """Write image and mask, tile by tile, and a network with thresholds."""
    made = make_phantom(shape=TILE, instances=10, seed=1)
    # Tissue lies in every section, unlike in a mask of annotated sections, which is refused.
    tissue = np.broadcast_to((made.mask > 0).any(0), TILE)
    rest = np.zeros_like(tissue)
    row = np.concatenate([tissue, *[rest] * (CELLS_APART - 1)], axis=2)
    cells = np.concatenate([row, *[np.zeros_like(row)] * (CELLS_APART - 1)], axis=1)
    rng = np.random.default_rng(0)
    sizes = {"voxel_size_nm": SIZE_NM, "chunks": (16, 128, 128)}
    with (
        create_array(folder / "im.h5", shape, np.uint8, **sizes) as image,
        create_array(folder / "mask.h5", shape, np.uint8, **sizes) as mask,
    ):
        for z in range(0, shape[0], TILE[0]):
            slab = (min(TILE[0], shape[0] - z), *shape[1:])
            noise = rng.integers(-3, 4, slab, np.int8)
            shown = _repeated(made.image, slab).astype(np.int16) + noise
            image[z : z + slab[0], :, :] = np.clip(shown, 0, 255).astype("u1")
            mask[z : z + slab[0], :, :] = _repeated(cells, slab).astype("u1")
    settings: dict[str, Any] = {
        "model": {"architecture": "monai_unet", "filters": [4, 8]},
        "data": {"patch_size": [16, 96, 96]},
        "inference": {
            "sliding_window": {"window_size": [16, 96, 96], "overlap": overlap},
            "test_time_augmentation": {"enabled": False},
        },
    }
    candidate = candidate_from_mapping(settings, place="benchmark")
    torch.manual_seed(0)
    network = network_of(candidate).eval()
    maps = predict(network, made.image, candidate)
    low, middle, high = (float(np.quantile(maps[0], share)) for share in (0.95, 0.965, 0.98))
    settings["test"] = {
        "decoding": [
            {
                "name": "decode_instance_binary_contour_distance",
                "kwargs": {
                    "binary_threshold": [high, middle],
                    "contour_threshold": [None, None],
                    "distance_threshold": [-1.0, -1.0],
                    "min_seed_size": 8,
                    "floor": low,
                },
            }
        ]
    }
    weights = network.state_dict()
    # Its distance is below 0 everywhere, so that the floor alone bounds the support.
    head = [name for name, value in weights.items() if value.shape == (3,)][-1]
    weights[head] = weights[head] + torch.tensor([0.0, 0.0, -4.0])
    torch.save(
        {"format": FORMAT, "version": FORMAT_VERSION, "candidate": candidate.as_mapping(),
         "weights": weights}, folder / "best.ckpt",
    )  # fmt: skip
    (folder / "best.yaml").write_text(yaml.safe_dump(settings))


def _repeated(tile: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Return a tile, repeated along y and x to a shape that is no deeper than it."""
    copies = [-(-side // own) for side, own in zip(shape[1:], tile.shape[1:], strict=True)]
    return np.tile(tile, (1, *copies))[tuple(slice(0, side) for side in shape)]


class Bench:
    """Runs the steps, and keeps what they took in a file, over several calls too."""

    def __init__(self, folder: Path, memory_gb: float, threads: int, piece_s: float | None) -> None:
        self.folder, self.memory_gb, self.piece_s = folder, memory_gb, piece_s
        self._path = folder / "results.json"
        self.results: dict[str, Any] = (
            json.loads(self._path.read_text()) if self._path.exists() else {}
        )
        self._environment = {
            **os.environ,
            **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads)),
            "RAY_AUTH_MODE": "disabled",
            "RAY_USAGE_STATS_ENABLED": "0",
        }

    def masked(self) -> None:
        """Segment inside the mask."""
        self._run("masked", self._segment("masked.h5", "--mask", self.folder / "mask.h5"))

    def whole(self) -> None:
        """Segment everything."""
        self._run("whole", self._segment("whole.h5"))

    def memory(self) -> None:
        """Do the same in memory."""
        self._run("memory", self._in_memory("memory.h5"))

    def memory_masked(self) -> None:
        """Do the same in memory, inside the mask."""
        words = self._in_memory("memory_masked.h5", self.folder / "mask.h5")
        self._run("memory_masked", words)

    def killed(self) -> None:
        """Segment inside the mask, killed twice, and compare the files."""
        seconds = self.results["masked"]["seconds"]
        words = self._segment("killed.h5", "--mask", self.folder / "mask.h5")
        for share in (0.4, 0.4):  # the second one goes on where the first one ended
            code = self._process(words, share * seconds)[2]
            assert code == -signal.SIGKILL, f"it ended before it was killed, with {code}"
            print(f"killed after {share * seconds:.0f} s")
        self._run("killed", words)
        same = (self.folder / "killed.h5").read_bytes() == (self.folder / "masked.h5").read_bytes()
        self.results["killed"]["same_file"] = same
        self._save()

    def ray(self) -> None:
        """Segment on one Ray worker and on two."""
        for workers in (1, 2):
            with subprocess.Popen(
                [sys.executable, "-c", CLUSTER, str(workers)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=self._environment,
            ) as cluster:  # fmt: skip
                assert cluster.stdin is not None
                assert cluster.stdout is not None
                address = cluster.stdout.readline().strip()
                name = f"ray_{workers}"
                self._run(name, self._segment(f"{name}.h5", "--ray-address", address))
                cluster.stdin.close()
        self.results["ray_2"]["same_file"] = (self.folder / "ray_1.h5").read_bytes() == (
            self.folder / "ray_2.h5"
        ).read_bytes()
        self._save()

    def _segment(self, out: str, *options: object) -> list[str]:
        """Return the words of a command."""
        words = ["-m", "hydralv_tune", "segment", self.folder / "best.yaml", "--image",
                 self.folder / "im.h5", "--out", self.folder / out, "--memory-gb",
                 self.memory_gb, "--device", "cpu", *options, "--json"]  # fmt: skip
        return [sys.executable, *map(str, words)]

    def _in_memory(self, out: str, *mask: Path) -> list[str]:
        """Return the words of the same in memory."""
        words = [self.folder / "best.yaml", self.folder / "im.h5", self.folder / out, *mask]
        return [sys.executable, "-c", IN_MEMORY, *map(str, words)]

    def _run(self, name: str, words: list[str]) -> None:
        """Run a step, in pieces where that is asked for, and keep its figures."""
        known = self.results.get(name, {})
        if known.get("done"):
            return
        seconds, peak, code = self._process(words, self.piece_s)
        self.results[name] = {
            "seconds": round(known.get("seconds", 0) + seconds, 1),
            "peak_gb": round(max(known.get("peak_gb", 0), peak / 1e9), 3),
            "pieces": known.get("pieces", 0) + 1,
            "done": code == 0,
        }
        self._save()
        if code not in (0, -signal.SIGKILL):
            sys.exit(f"{name} ended with {code}")

    def _process(self, words: list[str], limit_s: float | None) -> tuple[float, float, int]:
        """Return seconds, peak bytes and exit code of a process that may be killed on the way."""
        started = time.perf_counter()
        process = subprocess.Popen(words, env=self._environment, stdout=subprocess.DEVNULL)
        timer = threading.Timer(limit_s or 1e9, process.kill)
        timer.start()
        _, status, usage = os.wait4(process.pid, 0)
        timer.cancel()
        process.returncode = os.waitstatus_to_exitcode(status)
        return time.perf_counter() - started, usage.ru_maxrss * 1024.0, process.returncode

    def _save(self) -> None:
        """Keep the figures for the next call."""
        self._path.write_text(json.dumps(self.results, indent=1))


if __name__ == "__main__":
    main()
