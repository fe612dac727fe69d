"""The rules of a search space: every searched key is real, and every value gives a candidate."""

from __future__ import annotations

from hydralv_tune.candidate_rules import check_grid
from hydralv_tune.space import SearchSpace


def check_space(space: SearchSpace, place: str) -> None:
    """Check every rule of a search space.

    Raises:
        ConfigError: The first rule that is broken.
    """
    space.candidate({})
    check_grid(space.decoding, place, "decoding.")
    for name in space.warm_starts:
        space.warm_start(name)
