"""The folder of a study: it belongs to one study, as a small file in it says.

Trials lie in `OUT/trials/ROOT`, and every study counts its trials from 0: two studies in one folder
would take each other's checkpoints and records for their own.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from hydralv_tune.artifacts.writing import why_not_writable, write_atomically
from hydralv_tune.config.errors import InputError, StudyError
from hydralv_tune.study.journal import journals_in

MARKER = "study.json"
SPACE_FILE = "space.yaml"
"""Name of the file that keeps what the study searches, for `recover`."""
DATABASE = "study.db"
"""Name of the SQLite file of a study whose storage is not given."""
ENSEMBLE_FILES = ("ensemble.json", "ensemble.ckpt", "ensemble.yaml")
"""Names of what was found of a study's ensemble, of its networks, and of its thresholds."""
OWN_FILES = (MARKER, SPACE_FILE, DATABASE, *ENSEMBLE_FILES)
"""What a study keeps in its folder beside its trials, and what is made of it may not replace."""


@dataclass(frozen=True)
class Owner:
    """The study that a folder belongs to.

    Args:
        study: Its name, for people.
        identity: What tells it from every other study, of the same name too.
        storage: URL of its database, without a password; None in folders of earlier versions.
    """

    study: str
    identity: str
    storage: str | None = field(default=None, compare=False)


def owner_of(folder: Path) -> Owner | None:
    """Return whom a folder belongs to, or None where nothing in it says so."""
    try:
        found = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        return Owner(str(found["study"]), str(found["identity"]), found.get("storage"))
    except (OSError, ValueError, LookupError, TypeError):
        return None


def holds_results(folder: Path) -> bool:
    """Return whether there are trials in a folder, or results that wait for the database."""
    trials = folder / "trials"
    return (trials.is_dir() and any(trials.iterdir())) or bool(journals_in(folder))


def check_out(folder: Path, study: str, *, identity: str | None, stored: Path | None) -> None:
    """Refuse a folder that a study must not use; nothing is written.

    A stored folder that is not on this machine was moved, or is mounted elsewhere here.

    Args:
        folder: Where the study is to keep its trials, absolute.
        study: Name of the study.
        identity: Of the study; None where it is still to be made, or older than such marks.
        stored: Where the study has kept its trials so far, if anywhere.

    Raises:
        StudyError: It is another study's, it cannot be written, or the study's trials are in the
            stored one.
    """
    moved = stored is not None and not _same(stored, folder)
    if moved and stored is not None and stored.is_dir() and holds_results(stored):
        raise StudyError(
            f"--out: study '{study}' keeps its trials in {stored}, which is not {folder}. Give "
            f"--out {stored}, or move that folder to {folder} first."
        )
    owner = owner_of(folder)
    if owner is not None and owner.identity != identity:
        other = f"study '{owner.study}'"
        if owner.study == study:
            other = f"another study of the name '{study}', deleted or in another database"
        raise StudyError(
            f"--out: {folder} belongs to {other}, whose trials would be taken for those of this "
            "one. Give another --out, remove the folder if nobody needs it, or make its study "
            f"again with `{recover_command(folder)}`."
        )
    if owner is None and stored is None and holds_results(folder):
        raise StudyError(
            f"--out: {folder} holds trials, but study '{study}' has none yet, so they are "
            "another's. Give another --out, or remove the folder if nobody needs it."
        )
    reason = why_not_writable(folder)
    if reason is not None:
        raise StudyError(f"--out: {folder}: {reason}. Name another folder.")


def check_apart_from_study(option: str, files: Iterable[Path], folder: Path | None) -> None:
    """Refuse files that would replace what a study keeps, or lie among its trials.

    Args:
        option: What the user calls the files, for the message.
        files: What is to be written.
        folder: Of the study; any other study is known by the mark in its folder.

    Raises:
        InputError: One of the files is a study's own, or lies among its trials.
    """
    for file in files:
        place = Path(os.path.realpath(file.parent), file.name)
        studies = [parent for parent in place.parents if (parent / MARKER).is_file()]
        if folder is not None:
            studies.append(Path(os.path.realpath(folder)))
        for study in studies:
            among_trials = place.is_relative_to(os.path.realpath(study / "trials"))
            if among_trials or place in [study / name for name in OWN_FILES]:
                raise InputError(
                    f"{option}: {file} is where the study in {study} keeps what is its own. Name "
                    "another file, outside its folder trials."
                )


def claim_out(folder: Path, owner: Owner) -> None:
    """Make a folder and mark whom it belongs to; of two that come at once, the first has it.

    Raises:
        StudyError: It has become another study's.
        OSError: It cannot be written.
    """
    if owner_of(folder) is None:
        whole = write_atomically(
            folder / f".{MARKER}.{owner.identity}", json.dumps(asdict(owner)).encode()
        )
        try:
            os.link(whole, folder / MARKER)
        except OSError:  # somebody was faster, or it is broken, or there are no links here
            if owner_of(folder) is None:
                os.replace(whole, folder / MARKER)
        whole.unlink(missing_ok=True)
    check_out(folder, owner.study, identity=owner.identity, stored=folder)


def recover_command(folder: Path) -> str:
    """Return what a shell takes to make a study again from the records of its trials."""
    return shlex.join(["hydralv-tune", "recover", str(folder)])


def _same(one: Path, other: Path) -> bool:
    """Return whether two paths are one folder."""
    try:
        return one == other or one.samefile(other)
    except OSError:
        return False
