"""Where an array lies: a file or folder, a dataset in it, and which format that is of.

Light to import, so that a path is refused before any library is loaded.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import unquote

from hydralv_tune.config.errors import VolumeError
from hydralv_tune.config.paths import expanded
from hydralv_tune.data.formats import (
    FOLDER_OF_SECTIONS,
    FORMATS,
    PRECOMPUTED,
    SCHEMES,
    SUFFIXES,
    WRITABLE,
    Format,
    suffix_of,
)

SCHEME = "|".join(SCHEMES)
LOCAL_URL = re.compile(
    rf"^(?:(?:(?:{SCHEME})://)?file://(?:localhost(?=/))?|(?:{SCHEME})://(?!\w+://))(.+)$"
)
REMOTE_URL = re.compile(rf"^(?:({SCHEME})://)?((?:https?|gs|s3)://.+?)/*$")
PIPED_URL = re.compile(rf"^(.+?)/*\|(?:neuroglancer-)?({SCHEME}):/*(.*?)/*$")
"""As neuroglancer writes it: the place of a container, its format, and what is named in it."""
ANY_URL = re.compile(r"^\w[\w+.-]*://")
HEAD_BYTES = 4096 + 8
"""Read to tell formats apart."""


@dataclass(frozen=True)
class Location:
    """A file or folder, and the dataset in it where one is named.

    Args:
        path: On this machine; of a URL, its part behind the scheme.
        dataset: The array in it, or the key of a scale.
        url: Of what is elsewhere, the path of an array in it included.
        scheme: What stands before the URL for its format.
    """

    path: Path
    dataset: str | None = None
    url: str | None = None
    scheme: str | None = None

    def __str__(self) -> str:
        if self.url is not None:
            return f"{self.scheme}://{self.url}"
        return str(self.path) if self.dataset is None else self.of(self.dataset)

    def of(self, dataset: str) -> str:
        """Return what names an array in it."""
        return f"{self.path}:{dataset}" if self.url is None else f"{self}/{dataset}"


def locate(path: str | Path) -> Location:
    """Split `file:dataset`, and expand `~` and `$VARIABLES`.

    A colon counts only after a known suffix, so that other colons in a path stay what they are.
    `zarr://URL`, `n5://URL` and `precomputed://URL` are elsewhere; `file://PATH` is here, alone and
    after one of them, and so is what follows them without a URL.

    Raises:
        VolumeError: A URL whose format is not said, or that is of no known kind.
    """
    text = os.fspath(path)
    if (piped := PIPED_URL.match(text)) is not None:
        container, scheme, inner = piped.groups()
        text = "/".join(part for part in (f"{scheme}://{container}", inner) if part)
    if (found := REMOTE_URL.match(text)) is not None:
        scheme, url = found.groups()
        if scheme is None:
            raise VolumeError(
                f"{text}: of what is not on this machine, Zarr, N5 and precomputed are read, and a "
                f"URL does not say which it is. Put zarr://, n5:// or precomputed:// before it: "
                f"precomputed://{text}"
            )
        return Location(Path(url.partition("://")[2]), url=url, scheme=scheme)
    local = LOCAL_URL.match(text)
    if local is None and ANY_URL.match(text) and not os.path.exists(text):
        raise VolumeError(
            f"{text}: no URL of a known kind. Known: file://PATH, and after zarr://, n5:// or "
            "precomputed:// a path or an http://, https://, gs:// or s3:// URL."
        )
    location = _split(text if local is None else local.group(1))
    if local is not None and not location.path.exists():
        # As a browser shows it, %20 for a space.
        return _split(unquote(local.group(1)))
    return location


def _split(text: str) -> Location:
    """Return the file and the dataset of a path on this machine."""
    text = expanded(text)
    if ":" in text and not os.path.exists(text):
        file, _, dataset = text.rpartition(":")
        if suffix_of(Path(file)) in SUFFIXES:
            return Location(Path(file), dataset.strip("/") or None)
    return Location(Path(text))


def absolute(path: str) -> str:
    """Return a path, with its dataset, that means the same in another folder; a URL is one."""
    location = locate(path)
    if location.url is not None:
        return str(location)
    return str(replace(location, path=Path(os.path.abspath(location.path))))


def format_to_write(location: Location) -> Format:
    """Return the format that is written there, where nothing else is lost by it.

    Raises:
        VolumeError: The suffix is unknown, the format holds no datasets, a folder of that name is
            no volume of the format, or what is named is more than one dataset.
    """
    path = location.path
    kind = None if location.url else SUFFIXES.get(suffix_of(path))
    if kind is None or not kind.writable:
        raise VolumeError(
            f"{location}: '{path.suffix}' is no known format to write. Known suffixes: "
            f"{', '.join(WRITABLE)}."
        )
    if location.dataset is not None and (not kind.has_datasets or kind is PRECOMPUTED):
        raise VolumeError(f"{location}: a {kind.name} holds no datasets. Name the file alone.")
    if path.is_dir() and any(path.iterdir()) and not any((path / m).exists() for m in kind.marks):
        raise VolumeError(
            f"{location}: this folder is no {kind.name} volume, and what is in it would be lost. "
            "Name another, or move it away."
        )
    if location.dataset is not None and path.exists():
        kind.code.check_dataset(location)
    return kind


def format_of(location: Location) -> Format:
    """Return the format of a file or folder, by its content.

    Raises:
        VolumeError: It is missing, cannot be opened, or is of no known format.
    """
    path = location.path
    if location.scheme is not None:
        return SCHEMES[location.scheme]
    if not path.exists():
        near = sorted(p.name for p in path.parent.glob("*") if suffix_of(p) in SUFFIXES)
        there = f" In that folder: {', '.join(near[:5])}." if near else ""
        raise VolumeError(f"{location}: no such file.{there} Check the path.")
    known = SUFFIXES.get(suffix_of(path))
    if path.is_dir():
        for kind in FORMATS:
            if any((path / mark).exists() for mark in kind.marks):
                return kind
        if known is not None and known.marks_optional:
            return known
        if known is None and FOLDER_OF_SECTIONS.code.holds_sections(path):
            return FOLDER_OF_SECTIONS
        if known is None:
            raise VolumeError(
                f"{location}: this is a folder without pictures and without the metadata of Zarr, "
                "N5 or precomputed. Name a file, or such a folder."
            )
        raise VolumeError(
            f"{location}: this folder has no {known.name} metadata "
            f"({', '.join(known.marks) or 'it is a file'}); it is empty or was copied in part. "
            "Copy it again, or name another."
        )
    if not path.is_file():
        raise VolumeError(
            f"{location}: a pipe or a device, but a volume is read from a file. Write it to one "
            "first."
        )
    try:
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
    except OSError as error:
        raise VolumeError(
            f"{location}: cannot be opened ({error.strerror}). Check the permissions."
        ) from error
    for kind in FORMATS:
        if any(head[at : at + len(word)] == word for at, word in kind.magic):
            return kind
    if known is None and FOLDER_OF_SECTIONS.code.is_picture(path):
        raise VolumeError(
            f"{location}: a single picture. Give the folder that holds the sections of a stack, "
            f"one picture each: {path.parent}"
        )
    if known is None:
        raise VolumeError(f"{location}: of no known format. Known suffixes: {', '.join(SUFFIXES)}.")
    size = path.stat().st_size
    what = (
        "is empty" if size == 0 else f"({size} bytes) is no {known.name} file, or its head is lost"
    )
    raise VolumeError(f"{location}: the file {what}. Copy it again, or name another.")
