"""YAML without surprises: nothing runs code, `1e-5` is a number, no key stands twice."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from hydralv_tune.config.errors import ConfigError

# PyYAML follows YAML 1.1, in which `1e-5` is a string because it has no point.
_FLOAT = re.compile(
    r"""^(?:[-+]?(?:[0-9][0-9_]*)\.[0-9_]*(?:[eE][-+]?[0-9]+)?
        |[-+]?(?:[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)
        |[-+]?\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?
        |[-+]?\.(?:inf|Inf|INF)
        |\.(?:nan|NaN|NAN))$""",
    re.VERBOSE,
)


def _mapping(loader: Any, node: yaml.MappingNode) -> dict[Any, Any]:
    """Return a mapping, and refuse a key that stands twice."""
    loader.flatten_mapping(node)
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str | int | float | bool):
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {key!r} is no plain word", key_node.start_mark
            )
        if key in seen:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key '{key}' stands twice", key_node.start_mark
            )
        seen.add(key)
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


def _strict(base: Any) -> Any:
    """Return a safe loader that reads YAML 1.2 floats and refuses a key given twice.

    Args:
        base: The loader it is made from: that of libyaml, or the one in Python.
    """
    loader: Any = type("Loader", (base,), {})
    loader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in pairs if tag != "tag:yaml.org,2002:float"]
        for first, pairs in base.yaml_implicit_resolvers.items()
    }
    loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))
    loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
    return loader


_Loader = _strict(yaml.SafeLoader)
_FastLoader = _strict(getattr(yaml, "CSafeLoader", yaml.SafeLoader))
"""Seven times as fast; the other one says better what is wrong."""


MOST_VALUES = 1_000_000
"""Values of a file, aliases written out; a configuration has hundreds."""


class _Dumper(yaml.SafeDumper):
    """A safe dumper that writes short lists on one line, as people write them."""


def _list(dumper: _Dumper, values: Any) -> yaml.Node:
    """Return a list node, on one line where it holds plain values only."""
    flat = all(not isinstance(value, Mapping) for value in values)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", values, flow_style=flat)


_Dumper.add_representer(list, _list)
_Dumper.add_representer(tuple, _list)


def parse_yaml(text: str, place: str) -> Any:
    """Return the value of a YAML text.

    Args:
        text: YAML of one document.
        place: File or option it came from, for the message.

    Raises:
        ConfigError: It does not parse, holds a key twice, asks for a Python object, or is nested or
            repeated beyond measure.
    """
    value = _loaded(text, place)
    try:
        count = _unfolded(value, {})
    except RecursionError as error:
        raise ConfigError(f"{place}: nested too deeply to be read.") from error
    if count > MOST_VALUES:
        raise ConfigError(
            f"{place}: its aliases repeat so much that it holds {count:.0e} values, of which "
            f"{MOST_VALUES:.0e} are read."
        )
    return value


def _unfolded(value: Any, known: dict[int, int]) -> int:
    """Return how many values there are, aliases written out; `known` has those counted."""
    if not isinstance(value, dict | list):
        return 1
    if id(value) not in known:
        entries = value.values() if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_unfolded(entry, known) for entry in entries)
    return known[id(value)]


def _loaded(text: str, place: str) -> Any:
    """Return the value of a YAML text, with one object for each alias."""
    with suppress(yaml.YAMLError, RecursionError):
        return yaml.load(text, Loader=_FastLoader)
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}, column {mark.column + 1}:" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError(f"{place}:{where} this is no valid YAML: {problem}.") from error
    except RecursionError as error:
        raise ConfigError(f"{place}: nested too deeply to be read.") from error


def read_yaml_mapping(path: Path) -> dict[str, Any]:
    """Return the mapping that a YAML file holds; an empty file is an empty mapping.

    Raises:
        ConfigError: The file cannot be read, does not parse, or holds no mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no UTF-8 text"
        raise ConfigError(f"{path}: cannot be read: {reason}.") from error
    value = parse_yaml(text, str(path))
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigError(
            f"{path}: holds a {type(value).__name__}, but must be a mapping of keys to values."
        )
    return value


def dump_yaml(value: Any) -> str:
    """Return plain values as YAML, in the order given."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
