"""Paths as people write them: with `~` and `$VARIABLES`, or the bare name of a shipped file.

A shell leaves `~` alone in `--out=~/runs`, in quotes and in URLs, and a YAML file has no shell.
"""

from __future__ import annotations

import os
import re
from difflib import get_close_matches
from pathlib import Path

from hydralv_tune.config.errors import ConfigError, InputError

PACKAGE = Path(__file__).parents[1]
SQLITE = re.compile(r"^(sqlite(?:\+\w+)?:///)(?=[~$])(.*)$")


def expanded(path: str | Path) -> str:
    """Return a path with `~` and `$VARIABLES` expanded; one that exists as written stays.

    Raises:
        InputError: A variable is not set, or there is no such user.
    """
    text = os.fspath(path)
    written = any(os.path.exists(part) for part in (text, text.rpartition(":")[0]) if part)
    if written or not (text.startswith("~") or "$" in text):
        return text
    whole = os.path.expandvars(os.path.expanduser(text))
    if unset := re.search(r"\$(\w+|\{\w+\})", whole):
        raise InputError(
            f"{text}: the variable {unset.group()} is not set. Set it, or write the path out."
        )
    if whole.startswith("~"):
        home = whole.partition("/")[0]
        raise InputError(f"{text}: the home folder {home} is not known. Write the path out.")
    return whole


def expanded_path(path: str | Path) -> Path:
    """Return `expanded` as a path."""
    return Path(expanded(path))


def expanded_url(url: str) -> str:
    """Return a storage's URL with the path of an SQLite file expanded; others stay as they are.

    Raises:
        InputError: As for `expanded`.
    """
    found = SQLITE.match(url)
    return found.group(1) + expanded(found.group(2)) if found else url


def _folders(kind: str) -> list[Path]:
    """Return where files of a kind lie: beside the package in a checkout, inside it in a wheel."""
    return [folder for folder in (PACKAGE.parent / kind, PACKAGE / kind) if folder.is_dir()]


def known_names(kind: str) -> list[str]:
    """Return the bare names that exist, `trials` or `search_spaces` being the kind."""
    return sorted({path.stem for folder in _folders(kind) for path in folder.glob("*.yaml")})


def _shipped(path: Path, kind: str, suffix: str) -> Path | None:
    """Return the file of a kind that a bare name means, None where it means none."""
    if path.parent == Path():
        for folder in _folders(kind):
            if (folder / f"{path}{suffix}").is_file():
                return folder / f"{path}{suffix}"
    return None


def find_file(name: str, kind: str) -> Path:
    """Return the file of a path or a bare name.

    Args:
        name: A path, or the bare name of a file in the folder of that kind.
        kind: `trials` or `search_spaces`.

    Raises:
        ConfigError: There is no such file; the message names the nearest known one.
    """
    path = expanded_path(name)
    if path.is_file():
        return path
    shipped = None if path.suffix in (".yaml", ".yml") else _shipped(path, kind, ".yaml")
    if shipped is not None:
        return shipped
    known = known_names(kind)
    near = get_close_matches(path.stem, known, n=1)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    reason = "there is no such file" if not path.is_dir() else "it is a folder"
    raise ConfigError(
        f"{name}: {reason}, nor a bare name in {kind}/.{hint} Known: {', '.join(known)}."
    )


def weights_file(name: str | Path) -> Path:
    """Return the file of pretrained weights: a path, or the bare name of one in `trials/`.

    Whether there is such a file is for the caller to ask.
    """
    path = expanded_path(name)
    return path if path.is_file() else _shipped(path, "trials", ".safetensors") or path


def shown_path(path: Path) -> str:
    """Return a path as messages name it: relative where that is shorter."""
    for start in (Path.cwd(), PACKAGE.parent):
        if path.is_absolute() and path.is_relative_to(start):
            return str(path.relative_to(start))
    return str(path)
