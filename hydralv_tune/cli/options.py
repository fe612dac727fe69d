"""Options that several commands share, and the checks of what they name.

Light to import: names and paths are refused before any library is loaded.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hydralv_tune.artifacts.writing import why_not_writable
from hydralv_tune.cli.console import say
from hydralv_tune.config.errors import InputError
from hydralv_tune.config.paths import expanded, expanded_path, expanded_url
from hydralv_tune.data.formats import NAMES, SUFFIXES, suffix_of
from hydralv_tune.data.formats.location import (
    ANY_URL,
    LOCAL_URL,
    Location,
    format_of,
    format_to_write,
    locate,
)

if TYPE_CHECKING:
    from hydralv_tune.data.volume_paths import VolumePaths


def local_path(path: str | Path) -> Path:
    """Return a path with `~` and `$VARIABLES` expanded; of a URL that means one here, that path.

    Raises:
        InputError: A URL of something that is elsewhere, or as for `expanded`.
    """
    text = os.fspath(path)  # the default of an option is a path
    if LOCAL_URL.match(text):
        return Path(str(locate(text)))
    if ANY_URL.match(text):
        raise InputError(f"{text}: a URL, but a path on this machine is needed. Name one.")
    return expanded_path(text)


def path_option(*names: str, help: str) -> Any:
    """Return an option whose value is one path, as `local_path` reads it."""
    return typer.Option(*names, help=help, parser=local_path, metavar="PATH")


def text_option(*names: str, help: str, parser: Callable[[str], str] = expanded) -> Any:
    """Return an option for `file`, `file:dataset` or URL, expanded likewise."""
    return typer.Option(*names, help=help, parser=parser, metavar="PATH")


def completed(kind: str) -> Callable[[str], list[str]]:
    """Return the completion of an argument: bare names of a folder of YAML files, then files.

    Args:
        kind: `trials` or `search_spaces`.
    """

    def complete(incomplete: str) -> list[str]:
        from hydralv_tune.config.paths import known_names

        given = Path(incomplete)
        folder = given if incomplete.endswith("/") else given.parent
        files = [
            str(path) + ("/" if path.is_dir() else "")
            for path in sorted(folder.glob("*"))
            if path.is_dir() or path.suffix in (".yaml", ".yml")
        ]
        return [name for name in [*known_names(kind), *files] if name.startswith(incomplete)]

    return complete


def completed_keys(incomplete: str) -> list[str]:
    """Return the completion of `--set`: keys of a candidate, up to the next point."""
    from hydralv_tune.config.candidate import Candidate
    from hydralv_tune.config.validation import key_paths

    depth = incomplete.count(".") + 1
    found = [path for path in key_paths(Candidate) if path.startswith(incomplete)]
    blocks = {path for path in found if any(other.startswith(f"{path}.") for other in found)}
    return [
        f"{path}." if path in blocks else f"{path}="
        for path in found
        if path.count(".") + 1 == depth
    ]


Images = Annotated[
    list[str], text_option("--image", help=f"Image volume: {NAMES}. May be repeated.")
]
Labels = Annotated[
    list[str] | None, text_option("--label", help="Instance labels, one for each image.")
]
Masks = Annotated[
    list[str] | None,
    text_option(
        "--mask",
        help="Where there is tissue, one for each image; `none` where there is no mask.",
    ),
]
ScoredMasks = Annotated[
    list[str] | None,
    text_option(
        "--scored-mask", help="Where the truth is known, one for each image. Default: the mask."
    ),
]
IgnoreLabels = Annotated[
    list[int] | None,
    typer.Option("--ignore-label", help="An id that means 'no label'. May be repeated."),
]
# Read as lists, of which `one_file` takes the one: else all but the last would be dropped silently.
OneImage = Annotated[list[str], text_option("--image", help=f"Image volume: {NAMES}.")]
OneLabel = Annotated[list[str], text_option("--label", help=f"Instance labels: {NAMES}.")]
OneMask = Annotated[
    list[str] | None, text_option("--mask", help="Where there is tissue; the rest is ignored.")
]
OneScoredMask = Annotated[
    list[str] | None,
    text_option("--scored-mask", help="Where the truth is known. Default: the mask."),
]
OneProbabilities = Annotated[
    list[str], text_option("--probabilities", help="(3, Z, Y, X) probabilities.")
]
Json = Annotated[bool, typer.Option("--json", help="Print exactly one JSON document.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", help="key=value, the value read as YAML.", autocompletion=completed_keys),
]
CandidateName = Annotated[
    str,
    typer.Argument(help="A file, or a name in trials/.", autocompletion=completed("trials")),
]
Storage = Annotated[
    str,
    text_option("--storage", help="sqlite:///FILE, or postgresql+psycopg://…", parser=expanded_url),
]
OptionalStorage = Annotated[
    str | None,
    text_option(
        "--storage",
        help="Database of the study. Default: sqlite:///OUT/study.db",
        parser=expanded_url,
    ),
]


def one_file(option: str, given: Sequence[str]) -> str:
    """Return the file that an option of a command for one volume names, a pattern expanded.

    Raises:
        InputError: They are several, or the pattern matches none.
    """
    from hydralv_tune.data.volume_paths import files_of

    found = files_of(given)
    if len(found) != 1:
        raise InputError(
            f"{option}: {len(found)} files are given ({', '.join(found[:3])}"
            f"{', ...' if len(found) > 3 else ''}), but this command takes one volume. Run it once "
            "for each."
        )
    return found[0]


def one_or_none(option: str, given: Sequence[str] | None) -> str | None:
    """Return that of `one_file`, or None where the option is left out."""
    return one_file(option, given) if given else None


def volumes_given(
    images: Sequence[str],
    labels: Sequence[str],
    masks: Sequence[str],
    scored_masks: Sequence[str],
    ignore_labels: Sequence[int],
) -> list[VolumePaths]:
    """Return the volumes that options name; of several, say which files belong together."""
    from hydralv_tune.data.volume_paths import pairs, volume_paths

    volumes = volume_paths(images, labels, masks, scored_masks, ignore_labels)
    for volume in volumes:
        check_inputs(volume.image, volume.label, volume.mask, volume.scored_mask)
    for line in pairs(volumes) if len(volumes) > 1 else ():
        say(line)
    return volumes


def check_inputs(*paths: str | None) -> None:
    """Refuse files that are missing or of no known format, before any library is loaded.

    Args:
        paths: `file`, `file:dataset` or URL; None and `none` name no file.

    Raises:
        VolumeError: The first that is.
    """
    from hydralv_tune.data.volume_paths import NO_MASK

    for path in paths:
        if path not in (None, NO_MASK):
            format_of(locate(path))


def check_folder(option: str, path: Path, inputs: Collection[str | Path | None] = ()) -> None:
    """Refuse a place where no folder can be made, before any work is done for it.

    Args:
        option: What the user calls it, for the message.
        path: The folder; it need not exist yet.
        inputs: Files and folders that the command reads, which it must not write into.

    Raises:
        InputError: A file stands in its way, its folder cannot be written, or it lies in one of
            the inputs.
    """
    for given in inputs:
        if given is not None and _real(path).is_relative_to(_real(locate(given).path)):
            raise InputError(
                f"{option}: {path} lies in {given}, which the command reads. Name a folder outside."
            )
    reason = why_not_writable(path)
    if reason is not None:
        raise InputError(
            f"{option}: {path}: {reason}. Name another folder, or change its permissions."
        )


def check_file_out(
    option: str, path: Path, suffixes: Collection[str], inputs: Collection[str | Path | None] = ()
) -> None:
    """Refuse a file that cannot be written or must not be, before any work is done for it.

    Args:
        option: What the user calls it, for the message.
        path: The file; `file:dataset` is a dataset of it.
        suffixes: What its name may end with.
        inputs: Files that the command reads, which it must not replace.

    Raises:
        InputError: The suffix is another, a folder of that name exists, the folder cannot be
            written, or an input or something else would be lost.
    """
    location = locate(path)
    file = location.path
    if location.url is not None or suffix_of(file) not in suffixes:
        raise InputError(
            f"{option}: {path} ends with '{file.suffix}', but must end with one of "
            f"{', '.join(suffixes)}. Name the file so."
        )
    kind = SUFFIXES.get(suffix_of(file))
    if file.is_dir() and not (kind is not None and kind.marks):
        raise InputError(f"{option}: {path} is a folder, but must be a file. Name a file in it.")
    check_folder(option, file.parent)
    for given in inputs:
        if given is not None:
            _check_apart(option, location, given)
    if kind is not None:
        format_to_write(location)


def _check_apart(option: str, out: Location, given: str | Path) -> None:
    """Refuse an output that replaces what the command reads, or that lies in it.

    Another dataset of the same file is none of both.
    """
    here, there = _real(out), _real(given)
    if out.dataset is not None and here != there and here.is_relative_to(there):
        from hydralv_tune.data.formats.files import open_lazy

        with open_lazy(given) as lazy:  # of a file without a name, the array that is read
            there = _real(lazy.place or there)
    if there.is_relative_to(here):
        raise InputError(
            f"{option}: {out} is what the command reads or writes, and would be lost. Name another."
        )
    file, read = _real(out.path), _real(locate(given).path)
    if here.is_relative_to(there) or (file != read and file.is_relative_to(read)):
        raise InputError(
            f"{option}: {out} lies in {given}, which the command uses. Name a file outside."
        )


def _real(path: str | Path | Location) -> Path:
    """Return where a file or folder is, links followed, and then its dataset as if it were one."""
    location = path if isinstance(path, Location) else locate(path)
    file = location.path
    if location.url is not None:
        return Path(f"//{location.url}")
    return Path(os.path.realpath(file), *([location.dataset] if location.dataset else []))
