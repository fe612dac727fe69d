"""Search spaces from files: found, read together with their recipes, checked."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from hydralv_tune.config.candidate import Candidate
from hydralv_tune.config.errors import ConfigError, InputError
from hydralv_tune.config.files import layered, load_candidate
from hydralv_tune.config.paths import find_file, shown_path, weights_file
from hydralv_tune.config.portable_space import only_portable
from hydralv_tune.config.search_space import SearchSpace, space_from_mapping
from hydralv_tune.config.search_space_rules import check_space, extremes, with_conditions
from hydralv_tune.config.validation import check_keys, shown, value_at
from hydralv_tune.config.yaml_io import read_yaml_mapping

PROPOSED = "# Proposed over"
"""How a file begins that was proposed for a volume, before the name of the space it changes."""


def load_space(name_or_path: str | Path, overrides: Mapping[str, Any] | None = None) -> SearchSpace:
    """Return the space of a file, or of a bare name in `search_spaces/`, every rule checked.

    Args:
        name_or_path: The file or the name.
        overrides: A partial candidate that holds for every trial, as `parse_overrides` returns it.

    Raises:
        ConfigError: There is no such file, or it breaks a rule.
    """
    path = find_file(str(name_or_path), "search_spaces")
    return read_space(read_yaml_mapping(path), path, overrides)


def read_space(
    mapping: Mapping[str, Any], path: Path, overrides: Mapping[str, Any] | None = None
) -> SearchSpace:
    """Return the space that a file holds, or would hold, every rule checked.

    Args:
        mapping: The file's content.
        path: Where it lies or is to lie: recipes beside it are read.
        overrides: As for `load_space`.

    Raises:
        ConfigError: It breaks a rule.
    """
    place = shown_path(path)
    space = space_from_mapping({"name": path.stem, **mapping}, place)
    recipes = dict(space.recipes)
    for name in (space.base, *space.warm_starts):
        if name not in recipes:
            # A recipe beside the space comes before a shipped one of that name.
            beside = path.parent / name
            file = beside if beside.is_file() else find_file(name, "trials")
            recipes[name] = read_yaml_mapping(file)
    asked = space.export
    space = space.model_copy(update={"recipes": recipes, "export": None})
    check_space(space, place)
    if overrides:
        space = with_fixed(space, overrides)
    return space if asked is None else _portable(space, place)


def _portable(space: SearchSpace, place: str) -> SearchSpace:
    """Return a checked space with `export`, and warn once of all that was left out for it."""
    reduced, left_out = only_portable(space, place)
    check_space(reduced, place)
    if left_out:
        listed = "".join(f"\n- {entry}" for entry in left_out)
        warnings.warn(f"{place}: export is {reduced.export}; left out:{listed}", stacklevel=3)
    return reduced


def with_fixed(
    space: SearchSpace, overrides: Mapping[str, Any], place: str = "--set"
) -> SearchSpace:
    """Return a space with a partial candidate that holds for every trial.

    Args:
        space: Is left as it is.
        overrides: Wins over what `fixed` says already.
        place: Where it came from, for the message.

    Raises:
        ConfigError: A key is unknown or searched, or a value gives no valid candidate.
    """
    check_keys(overrides, Candidate, place)
    fixed = space.model_copy(update={"fixed": layered(space.fixed, overrides)})
    check_space(fixed, place)
    return fixed


WEIGHTS = "model.external_weights_path"


@dataclass(frozen=True)
class CheckResult:
    """What `check` found in one file."""

    path: str
    kind: str
    ok: bool
    error: str | None = None


SPACE_KEYS = frozenset(SearchSpace.model_fields) - {"name", "description"}


def _kind_of(path: str) -> str:
    """Return `search space` or `candidate`, by the folder of a bare name or by the keys."""
    try:
        find_file(path, "search_spaces")
    except ConfigError:
        return "candidate"
    if not Path(path).is_file():
        return "search space"
    keys = {str(key) for key in read_yaml_mapping(Path(path))}
    known = keys & {*SPACE_KEYS, *Candidate.model_fields}
    # Misspelt keys speak only where no other does.
    near = keys if not known else set()
    of_space = known & SPACE_KEYS or any(get_close_matches(key, SPACE_KEYS, n=1) for key in near)
    return "search space" if of_space else "candidate"


def check_weights(candidate: Mapping[str, Any], place: str) -> None:
    """Refuse a candidate whose pretrained weights are not there.

    Args:
        candidate: Its mapping.
        place: Where it came from, for the message.

    Raises:
        ConfigError: There is no such file.
    """
    weights = value_at(candidate, WEIGHTS)
    if weights is not None and not weights_file(weights).is_file():
        raise ConfigError(
            f"{place}: model.external_weights_path is {weights}, but there is no such file. Check "
            "the path, or set it to null."
        )


def check_weights_of_space(space: SearchSpace) -> None:
    """Refuse a space whose base, warm start or choice names weights that are not there.

    Raises:
        ConfigError: There is no such file.
    """
    check_weights(space.whole_mapping({}), f"{space.name}: base '{space.base}'")
    for name in space.warm_starts:
        check_weights(space.whole_mapping({}, space.recipes.get(name)), f"{space.name}: '{name}'")
    for key, parameter in space.parameters.items():
        if key == WEIGHTS or isinstance(parameter.choice, dict):
            for value in extremes(parameter):
                place = f"{space.name}: parameters.{key}: the value {shown(value)}"
                check_weights(space.whole_mapping(with_conditions(space, {key: value})), place)


def check_file(path: str | Path) -> CheckResult:
    """Return whether a candidate or a search space is valid, and its first fault if not."""
    kind = "candidate or search space"
    try:
        kind = _kind_of(str(path))
        file = find_file(str(path), "search_spaces" if kind == "search space" else "trials")
        if not read_yaml_mapping(file):
            raise ConfigError(f"{path}: is empty, but a {kind} must set a key. Try `list`.")
        if kind == "search space":
            check_weights_of_space(load_space(path))
        else:
            check_weights(load_candidate(path).as_mapping(), str(path))
    except InputError as error:
        return CheckResult(str(path), kind, False, str(error))
    return CheckResult(str(path), kind, True)


def explain_file(path: str | Path) -> list[str]:
    """Return sentences on what a candidate or a search space amounts to."""
    from hydralv_tune.config.explanation import explain, explain_space

    if _kind_of(str(path)) == "candidate":
        return explain(load_candidate(path))
    return explain_space(load_space(path))
