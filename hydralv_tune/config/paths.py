"""Paths as people write them: `~` and `$VARIABLES` stand for what a shell would put there.

A shell leaves them alone in `--out=~/runs`, in quotes and in URLs, and a YAML file has no shell.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from hydralv_tune.config.errors import InputError

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
