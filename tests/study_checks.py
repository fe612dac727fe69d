"""What tests ask of a study that went through something."""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import Any

import pytest
from sqlalchemy.engine import make_url

from hydralv_tune.config.search_space import SearchSpace, space_from_mapping
from hydralv_tune.study.study import Study
from hydralv_tune.study.trial_views import superseded

LR, DECAY = "optimization.optimizer.lr", "optimization.optimizer.weight_decay"


def make_space(**changes: Any) -> SearchSpace:
    """Return a small space."""
    return space_from_mapping(
        {
            "name": "s",
            "base": "start",
            "recipes": {"start": {}},
            "parameters": {
                LR: {"float": [1e-5, 1e-1], "log": True},
                DECAY: {"float": [0.0, 0.1]},
            },
            "sampler": {"startup_trials": 3},
            "pruner": {"name": "none"},
            **changes,
        }
    )


def on_databases(names: Iterable[str], both: Container[str] = ()) -> list[Any]:
    """Return each name on SQLite and on PostgreSQL, for the fixture `storage`.

    On PostgreSQL those not in `both` are for the soak: what they try is the same code there.
    """
    return [
        pytest.param(kind, name, marks=() if kind == "sqlite" or name in both else pytest.mark.slow)
        for kind in ("sqlite", "postgresql")
        for name in names
    ]


def evaluations(count: int) -> Any:
    """Return whether a driver has seen so many evaluations."""
    return lambda rows: sum(row.get("event") == "evaluation" for row in rows) >= count


def with_password(url: str, password: str) -> str:
    """Return a storage URL with a password."""
    made = make_url(url).set(password=password)
    return made.render_as_string(hide_password=False)


def check_truth(study: Study, folder_steps: dict[int, list[tuple[int, int]]], trials: int) -> None:
    """Check that exactly so many trials are finished, none twice, none left running.

    Args:
        study: After the last driver ended.
        folder_steps: (trial, step) of every step made, by root.
        trials: Finished trials wanted.
    """
    views = study.trials()
    gone = superseded(views)  # a paused trial that went on is what it became
    finished = [t for t in views if t.state in ("COMPLETE", "PRUNED") and t.number not in gone]
    assert len(finished) == trials
    assert not [t for t in views if t.state == "RUNNING"]
    assert len({t.root for t in finished}) == trials
    assert len({tuple(sorted(t.params.items())) for t in finished}) == trials
    followed = [t.user_attrs["retry_of"] for t in views if "retry_of" in t.user_attrs]
    assert len(followed) == len(set(followed))
    for trial in views:
        if trial.state == "FAIL":
            assert trial.value is None
            assert trial.user_attrs["reason"]
    for steps in folder_steps.values():
        # A checkpoint may be one step ahead of the database, never behind: nothing is made twice.
        assert [step for _, step in steps] == sorted({step for _, step in steps})
