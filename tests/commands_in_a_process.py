"""Commands run as a user runs them, in a process of their own; what several tests share."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from functools import partial
from pathlib import Path
from typing import Any

import yaml

SMALL_DECODING: dict[str, Any] = {
    "grid": {
        "binary_threshold": {"seed": [0.3, 0.5, 0.7], "foreground": [0.3, 0.5]},
        "contour_threshold": {"seed": [None], "foreground": [None]},
        "distance_threshold": {"seed": [0.0, 0.3], "foreground": [-0.5, 0.0]},
        "min_seed_size": [2],
    }
}
"""A few combinations of thresholds."""

SMALL_SPACE: dict[str, Any] = {
    "base": "smoke",
    "warm_starts": ["smoke"],
    "fixed": {
        "model": {"architecture": "monai_unet", "filters": [4, 8]},
        "data": {"patch_size": [8, 32, 32]},
        "system": {"training": {"batch_size": 2}, "cpu_threads": 1},
        "inference": {"sliding_window": {"window_size": [8, 64, 64]}},
    },
    "parameters": {"optimization.optimizer.lr": {"float": [1e-3, 1e-2], "log": True}},
    "decoding": SMALL_DECODING,
    "pruner": {"name": "none"},
}
"""Trials of seconds; `optimization` and `monitor` say of how many."""


def small_run(folder: Path, training: dict[str, Any], *words: str) -> list[str]:
    """Return the words of a real `run` on a small phantom, made and searched in a folder.

    Args:
        folder: Where phantom and space are written.
        training: Blocks of the candidate beside those of `SMALL_SPACE`.
        words: Further ones.
    """
    from hydralv_tune.data.volumes import write_array
    from hydralv_tune.numerics.phantom.volume import make_phantom

    made = make_phantom(shape=(16, 96, 96), instances=6, seed=3)
    for name, array in (("im", made.image), ("label", made.label), ("mask", made.mask)):
        write_array(folder / f"{name}.h5", array, voxel_size_nm=made.voxel_size_nm)
    fixed = dict(SMALL_SPACE["fixed"])
    for block, keys in training.items():
        fixed[block] = {**fixed.get(block, {}), **keys}
    (folder / "small.yaml").write_text(yaml.safe_dump({**SMALL_SPACE, "fixed": fixed}))
    files = [
        w for n in ("image", "label", "mask") for w in (f"--{n}", f"{n.removesuffix('age')}.h5")
    ]
    return [sys.executable, "-m", "hydralv_tune", "run", "small.yaml", *files, *words]


def environment() -> dict[str, str]:
    """Return an environment of one thread and no colours."""
    return {**os.environ, "NO_COLOR": "1", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def serve_and_stop(words: list[str], folder: Path) -> None:
    """Start the dashboard on a free port, open it, and end it as a user does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        words = [*words, "--port", str(free.getsockname()[1])]
    process = subprocess.Popen(
        [sys.executable, "-m", "hydralv_tune", *words],
        stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, cwd=folder,
        env=environment(),
        # Tests that a shell runs in the background inherit that Ctrl-C is ignored.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    assert process.stderr is not None
    try:
        said = ""
        while not (found := re.search(r"http://127\.0\.0\.1:\d+/", said)):
            line = process.stderr.readline()
            assert line, said
            said += line
        with urllib.request.urlopen(found.group(0), timeout=30) as answer:
            assert answer.status == 200
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) in (0, 130)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        process.stderr.close()
