"""What a machine has for a study, and what is missing."""

from __future__ import annotations

import platform
import shutil
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch

from hydralv_tune.config.errors import InputError
from hydralv_tune.numerics.cores import usable_cores

PACKAGES = ("torch", "optuna", "ray", "monai", "numpy", "scikit-image", "numba", "sqlalchemy")
LEAST_DISK_GB = 5.0
LEAST_MEMORY_GB = 4.0
GIGA = 1e9


def examine(storage: str | None) -> dict[str, Any]:
    """Return what is there, and under `missing` one sentence for each thing that is not.

    Args:
        storage: URL of a study's database to try, or None.
    """
    missing: list[str] = []
    gpus = _gpus()
    if not gpus:
        missing.append("no GPU that torch can use; trials run on the CPU")
    memory = psutil.virtual_memory().available / GIGA
    disk = shutil.disk_usage(Path.cwd()).free / GIGA
    if memory < LEAST_MEMORY_GB:
        missing.append(f"memory: {memory:.1f} GB free, but a study needs {LEAST_MEMORY_GB:.0f} GB")
    if disk < LEAST_DISK_GB:
        missing.append(f"disk: {disk:.1f} GB free here, but a study needs {LEAST_DISK_GB:.0f} GB")
    findings = {
        "python": f"{platform.python_version()} at {sys.executable}",
        **_versions(missing),
        "cuda": torch.version.cuda or "none in this build of torch",
        "gpus": gpus,
        "cpu_cores": usable_cores(),
        "memory_free_gb": round(memory, 1),
        "disk_free_gb": round(disk, 1),
    }
    if storage is not None:
        findings["database"] = _database(storage, missing)
    return {**findings, "missing": missing}


def _gpus() -> list[str]:
    """Return a line for each GPU: its name and memory."""
    lines = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        name = torch.cuda.get_device_name(index)
        lines.append(f"{index}: {name}, {free / GIGA:.1f} of {total / GIGA:.1f} GB free")
    return lines


def _versions(missing: list[str]) -> dict[str, str]:
    """Return the version of each package, and note those that are not installed."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            missing.append(f"package {name}; run `make install`")
    return versions


def _database(storage: str, missing: list[str]) -> str:
    """Return what stands in a database, or why it does not answer."""
    from hydralv_tune.study.study import study_names

    try:
        names = study_names(storage)
    except InputError as error:
        missing.append(str(error))
        return "does not answer"
    return f"answers, {len(names)} studies: {', '.join(names) or 'none'}"
