"""What a trial leaves behind: checkpoints, its record, and where both came from.

Everything is written whole or not at all: into a temporary file beside the place, flushed to the
disk, then renamed. A full disk or a killed process leaves the version before as it was.
"""

from __future__ import annotations

import io
import json
import math
import os
import pickle
import platform
import subprocess
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from hydralv_tune.artifacts.writing import flush_folder, write_atomically
from hydralv_tune.config.errors import CheckpointError, InputError
from hydralv_tune.numerics.cores import usable_cores
from hydralv_tune.numerics.metrics.registry import SUMMARY

FORMAT = "hydralv_tune"
FORMAT_VERSION = 2
"""Of checkpoints; in version 1 `norm: group` had 8 groups or the power of two that fits."""
PLAN_TARGETS: tuple[tuple[str, str, str, float], ...] = (
    ("adapted_rand_error", "adapted Rand error", "<", 0.05),
    ("adapted_rand_precision", "precision", ">", 0.95),
    ("adapted_rand_recall", "recall", ">", 0.95),
    ("loss.plan_total", "total loss", "<", 0.2),
    ("loss.label", "label loss", "<", 0.1),
    ("loss.boundary", "boundary loss", "<", 0.1),
    ("loss.edt", "distance loss", "<", 0.01),
)
"""What the plan wants on the training volume: key, label, whether below or above, limit."""
PACKAGES = (
    "hydralv-tune", "torch", "monai", "numpy", "scipy", "scikit-image", "numba", "pydantic",
    "optuna", "ray",
)  # fmt: skip


def write_json(path: str | Path, value: Any) -> Path:
    """Write plain values as JSON; not-a-number and infinity become null, as JSON has neither."""
    text = json.dumps(plain(value), indent=2, allow_nan=False)
    return write_atomically(path, (text + "\n").encode())


def read_json(path: str | Path) -> Any:
    """Return the value of a JSON file.

    Raises:
        InputError: It cannot be read, or holds no JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise InputError(
            f"{path}: holds no JSON ({error}). Delete it to have it made again."
        ) from error


def plain(value: Any) -> Any:
    """Return NumPy and torch scalars, tuples, paths and mappings as plain JSON types."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int | bool):
        return value
    return str(value)


def previous(path: str | Path) -> Path:
    """Return where the checkpoint before is kept: `last.ckpt` -> `last.previous.ckpt`."""
    path = Path(path)
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def save_checkpoint(path: str | Path, state: Mapping[str, Any]) -> Path:
    """Write a checkpoint atomically, keep the one before, and return the path.

    Args:
        path: Where it goes.
        state: Tensors and plain Python values in mappings, lists and tuples.

    Raises:
        OSError: The disk is full; the older checkpoints are untouched.
    """
    import torch

    path = Path(path)
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    # The new one is safe on the disk before the old one moves: at any moment one good is left.
    fresh = write_atomically(path.with_name(f".{path.name}.new"), buffer.getvalue())
    if path.exists():
        os.replace(path, previous(path))
    os.replace(fresh, path)
    flush_folder(path.parent)
    return path


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Return the content of a checkpoint, on the CPU, read with `weights_only=True`.

    Where it is damaged or gone, the one before is read and a warning says so.

    Raises:
        CheckpointError: Neither can be read.
    """
    path = Path(path)
    older = previous(path)
    try:
        return _load(path)
    except CheckpointError as error:
        if not older.exists():
            raise
        found = _load(older)
        warnings.warn(f"{error} The one before, {older.name}, is used.", stacklevel=2)
        return found


def _load(path: Path) -> dict[str, Any]:
    """Return one checkpoint, or say what is wrong with it."""
    if not path.exists():
        raise CheckpointError(f"{path}: no such checkpoint.")
    import torch

    try:
        with warnings.catch_warnings():
            # What torch has to say about a foreign pickle helps nobody who gave the wrong file.
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # torch's own message advises to load it all the same, which would run what is in it.
        raise CheckpointError(
            f"{path}: is damaged, or holds more than weights; nothing in it was run. "
            "Give best.ckpt of a trial, or an exported checkpoint."
        ) from error
    except Exception as error:  # torch raises whatever a damaged archive provokes
        # Its words are of the archive's inside, which helps nobody who gave the wrong file.
        raise CheckpointError(
            f"{path}: is no checkpoint, or a damaged one. Give best.ckpt of a trial or an exported "
            "checkpoint; copy it again where it is one."
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{path}: holds a {type(content).__name__}, but a checkpoint is a mapping."
        )
    return content


def has_checkpoint(path: str | Path) -> bool:
    """Return whether a checkpoint, or the one before, is there."""
    return Path(path).exists() or previous(path).exists()


def provenance() -> dict[str, Any]:
    """Return what made a record: versions, git commit, host, processor."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "package": {"version": versions.get("hydralv-tune"), **_git()},
        "versions": {"python": platform.python_version(), **versions},
        "host": {
            "name": platform.node(),
            "system": platform.platform(),
            "processor": _processor(),
            "cores": usable_cores(),
        },
    }


@cache
def _git() -> dict[str, Any]:
    """Return commit and state of the checkout the package runs from; none where it is installed."""
    folder = Path(__file__).resolve().parent

    def ask(*words: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=10,
                check=False,
            )  # fmt: skip
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # A package installed inside someone else's checkout must not borrow its commit.
    if not ask("ls-files", "--error-unmatch", __file__):
        return {"git_commit": None, "git_changed": None}
    changed = ask("status", "--porcelain", "--untracked-files=no", "--", str(folder))
    return {"git_commit": ask("rev-parse", "HEAD"), "git_changed": bool(changed)}


@cache
def _processor() -> str:
    """Return the name of the processor."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


@dataclass(frozen=True)
class TrialRecord:
    """Everything that a trial leaves behind, in plain JSON types.

    Args:
        state: `running`, `complete`, `fail` or `interrupted`.
        number: Of the trial in its study.
        root: Of the trial whose checkpoint it goes on from; its own where it is the first.
        study: Name, where there is one.
        out: Folder of the trial.
        config: The whole candidate.
        objective: Metric and guards.
        grid: Combinations of thresholds that were swept.
        provenance: As `provenance()` gives.
        seed: Of weights, patches and augmentation.
        device: What it ran on.
        split: What was trained on, what was scored, and one sentence that says so.
        volumes: Name, paths, shape, voxel size and fingerprint of each.
        training: Batch, steps, patches, speed, and where the time went.
        history: One mapping per evaluation.
        sweep: Of the best checkpoint, as `SweepResult.as_mapping()` gives.
        metrics: Every figure of the best checkpoint's segmentation.
        losses: Of the last evaluation: `total`, each task, each loss.
        value: What the study minimises.
        noise: Its standard deviation over instances drawn anew, or its standard error over folds.
        decoding: `{name, kwargs}` of the winner.
        checkpoint: The best one.
        folds: With cross-validation, the figures of each fold.
        verdicts: The plan's checkpoints, one line each.
        weights: What of the external weights matched.
        notes: What happened on the way that a reader should know.
        error: Why it failed.
    """

    state: str
    number: int
    root: int
    study: str | None
    out: str
    config: dict[str, Any]
    objective: dict[str, Any]
    provenance: dict[str, Any]
    seed: int
    device: dict[str, Any]
    split: dict[str, Any]
    volumes: list[dict[str, Any]]
    training: dict[str, Any]
    grid: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    sweep: dict[str, Any] | None = None
    metrics: dict[str, Any] = field(default_factory=dict)
    losses: dict[str, float | None] = field(default_factory=dict)
    value: float | None = None
    noise: float | None = None
    decoding: dict[str, Any] | None = None
    checkpoint: str | None = None
    folds: list[dict[str, Any]] = field(default_factory=list)
    verdicts: list[str] = field(default_factory=list)
    weights: str | None = None
    notes: list[str] = field(default_factory=list)
    error: str | None = None

    @property
    def path(self) -> Path:
        """Return where the record lies."""
        return Path(self.out) / "record.json"

    def as_mapping(self) -> dict[str, Any]:
        """Return the record as plain JSON types."""
        mapping: dict[str, Any] = plain(asdict(self))
        return mapping

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any]) -> TrialRecord:
        """Return the record that a mapping holds.

        Raises:
            InputError: A field is missing; unknown ones, of a later version, are left out.
        """
        known = {entry.name for entry in fields(cls)}
        try:
            return cls(**{key: value for key, value in mapping.items() if key in known})
        except TypeError as error:
            raise InputError(f"record.json: {error}. It was cut short: delete it.") from error

    def write(self) -> Path:
        """Write `record.json` atomically and return its path."""
        return write_json(self.path, self.as_mapping())

    def summary(self) -> dict[str, Any]:
        """Return what `train --json` prints."""
        return {
            **{name: self.metrics.get(name) for name in SUMMARY},
            "value": self.value,
            "losses": self.losses,
            "decoding": self.decoding,
            "split": self.split.get("kind"),
            "verdicts": self.verdicts,
            "notes": self.notes,
            "checkpoint": self.checkpoint,
            "record": str(self.path),
        }


def read_record(path: str | Path) -> TrialRecord:
    """Return the record of a trial.

    Raises:
        InputError: The file cannot be read or holds no record.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds a {type(content).__name__}, but a record is a mapping.")
    return TrialRecord.from_mapping(content)


def without_seed(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a candidate without its seed and what has no part in the training."""
    system = {k: v for k, v in config.get("system", {}).items() if k not in ("seed", "cpu_threads")}
    free = ("experiment_name", "description", "system")
    return {**{key: value for key, value in config.items() if key not in free}, "system": system}
