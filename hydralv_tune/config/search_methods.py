"""Samplers and pruners that a search space may name.

Their tables stand in `study/`, above this floor, since they make objects of Optuna's. A space is
checked here, so the tables are looked up when it is: what was registered at run time is known.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any


def samplers() -> Mapping[str, Any]:
    """Return the entries of all samplers by name; each has a `summary`."""
    table: Mapping[str, Any] = import_module("hydralv_tune.study.samplers").SAMPLERS
    return table


def pruners() -> Mapping[str, Any]:
    """Return the entries of all pruners by name; each has a `summary` and `least_folds`."""
    table: Mapping[str, Any] = import_module("hydralv_tune.study.pruners").PRUNERS
    return table
