"""What others register: found in every process that needs it, workers of a study included.

A package that is installed names a module under the entry points `hydralv_tune.plugins`; a script
or a module that is not installed stands in the variable `HYDRALV_TUNE_PLUGINS`. Both are imported
before a configuration is checked. What a running script or notebook has registered by itself goes
to the workers with the study.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial, wraps
from importlib import import_module
from importlib.metadata import entry_points
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from hydralv_tune.config.errors import InputError
from hydralv_tune.config.paths import expanded_path

P = ParamSpec("P")
R = TypeVar("R")

GROUP = "hydralv_tune.plugins"
VARIABLE = "HYDRALV_TUNE_PLUGINS"


@dataclass(frozen=True)
class Registration:
    """One call of a `register_` function.

    Args:
        function: The function, as `module:name`.
        arguments: By position.
        keywords: By name.
    """

    function: str
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]

    @property
    def key(self) -> tuple[str, str]:
        """Return what was registered: the function, and the name in its table."""
        first = self.arguments[0] if self.arguments else next(iter(self.keywords.values()))
        return self.function, str(getattr(first, "name", first))


_made: dict[tuple[str, str], Registration] = {}
_of_plugins: set[tuple[str, str]] = set()
"""What plugins have registered."""


def recorded(function: Callable[P, R]) -> Callable[P, R]:
    """Return a `register_` function whose calls are kept for the workers of a study."""
    address = f"{function.__module__}:{function.__name__}"

    @wraps(function)
    def register(*arguments: P.args, **keywords: P.kwargs) -> R:
        result = function(*arguments, **keywords)
        made = Registration(address, arguments, keywords)
        _made[made.key] = made
        return result

    return register


def registrations() -> list[Registration]:
    """Return what was registered in this process, but by plugins, which a worker imports itself.

    A worker cannot unpickle a function of a plugin's file before it has imported that file.
    """
    return [made for key, made in _made.items() if key not in _of_plugins]


def register_again(others: Sequence[Registration]) -> None:
    """Register in a worker what its driver has registered, where plugins have not done so here."""
    load_plugins()
    for one in others:
        if one.key not in _made:
            module, _, function = one.function.partition(":")
            recorded(getattr(import_module(module), function))(*one.arguments, **one.keywords)


_begun: set[str] = set()


@cache
def _installed() -> dict[str, Callable[[], Any]]:
    """Return how each installed plugin is imported; looking for them takes 20 ms, so once."""
    found = entry_points(group=GROUP)
    return {f"plugin '{entry.name}' ({entry.value})": entry.load for entry in found}


def load_plugins() -> None:
    """Import every plugin once.

    A plugin that is being imported may come by here itself, so each counts from its beginning.

    Raises:
        InputError: One cannot be imported, or fails while it registers.
    """
    plugins = dict(_installed())
    for name in filter(None, os.environ.get(VARIABLE, "").split(os.pathsep)):
        plugins[f"{VARIABLE}: {name}"] = partial(_import, name)
    for place in [place for place in plugins if place not in _begun]:
        _begun.add(place)
        before = set(_made)
        try:
            _load(place, plugins[place])
            _of_plugins.update(_made.keys() - before)
        except InputError:
            _begun.discard(place)
            raise


def _load(place: str, load: Callable[[], Any]) -> None:
    """Import one plugin.

    Raises:
        InputError: It fails, with its reason.
    """
    try:
        load()
    except Exception as error:
        raise InputError(
            f"{place}: cannot be loaded: {type(error).__name__}: {error}. Mend or uninstall it."
        ) from error


def _import(name: str) -> None:
    """Import a module by its name, or a file."""
    if not name.endswith(".py"):
        import_module(name)
        return
    path = expanded_path(name).resolve()
    spec = spec_from_file_location(f"hydralv_tune_plugin_{path.stem}", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise FileNotFoundError(f"there is no file {Path(name)}")
    module = module_from_spec(spec)
    # Workers unpickle functions of a module by its name.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
