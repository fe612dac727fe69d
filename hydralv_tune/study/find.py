"""Where a study is: from its folder, its storage URL, the environment, or the newest in `runs/`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hydralv_tune.config.errors import StudyError
from hydralv_tune.config.paths import expanded_path
from hydralv_tune.config.secrets import mask_passwords
from hydralv_tune.study.study_folder import DATABASE, owner_of

STORAGE_VARIABLE = "OPTUNA_STORAGE"
RUNS = Path("runs")
SQLITE_MAGIC = b"SQLite format 3\0"


@dataclass(frozen=True)
class StudyAddress:
    """Where a study is.

    Args:
        storage: URL of its database.
        name: Of the study in it.
        folder: Of its trials, where a folder was given; the database knows it otherwise.
    """

    storage: str
    name: str
    folder: Path | None = None


def find_study(
    place: str | Path | None = None, *, storage: str | None = None, study: str | None = None
) -> StudyAddress:
    """Return where a study is.

    Args:
        place: Its folder, the SQLite file, or the URL of its storage. Without it and without
            `storage`, `OPTUNA_STORAGE` is taken, and else the newest study under `runs/`.
        storage: URL of its storage.
        study: Its name; needed only where the storage holds several.

    Raises:
        StudyError: There is no such study, or the storage holds several.
    """
    if place is None or storage is not None or "://" in str(place):
        if place is not None and storage is not None and not _is_folder(place):
            raise StudyError(
                f"{mask_passwords(str(place))} and --storage {mask_passwords(storage)} both name a "
                "storage. Give one of the two."
            )
        folder = None if place is None or not _is_folder(place) else expanded_path(place)
        url = storage or (None if folder else place) or os.environ.get(STORAGE_VARIABLE)
        if url is not None:
            return StudyAddress(str(url), study or _only(str(url)), folder)
        place = _newest(RUNS)
    path = expanded_path(place)
    if path.is_file():
        _refuse_other_file(path)
        url = f"sqlite:///{path}"
        return StudyAddress(url, study or _only(url))
    database, name = _of_folder(path)
    return StudyAddress(database, study or name or _only(database), path)


def find_study_within(place: str) -> StudyAddress:
    """Return where a study is that one text names: FOLDER, FILE or URL, and `/STUDY` where needed.

    Args:
        place: As `--learn-from` takes it.

    Raises:
        StudyError: There is no such study, or the storage holds several and none is named.
    """
    base, mark, query = place.partition("?")
    whole, _, name = base.rpartition("/")
    _, is_sqlite, file = base.partition("sqlite:///")
    if "://" in base and not is_sqlite:
        names_study = base.count("/") > 3  # scheme://server/database/STUDY
    else:
        path = Path(file) if is_sqlite else expanded_path(base)
        names_study = not path.exists() and path.parent.exists()
        names_study &= not is_sqlite or path.parent.is_file()
    return find_study(whole + mark + query, study=name) if names_study else find_study(place)


def _is_folder(place: str | Path) -> bool:
    """Return whether a place is a folder rather than a URL or a file."""
    return "://" not in str(place) and expanded_path(place).is_dir()


def check_place(place: str | Path | None) -> None:
    """Refuse a folder or file that holds no study, without asking a database or importing Optuna.

    Args:
        place: As for `find_study`; None is the storage of the environment, or the newest study.

    Raises:
        StudyError: There is no such place, or it holds no study.
    """
    if place is None and STORAGE_VARIABLE not in os.environ:
        place = _newest(RUNS)
    if place is None or "://" in str(place):
        return
    path = expanded_path(place)
    if path.is_file():
        _refuse_other_file(path)
    elif not (path / DATABASE).is_file():
        _of_folder(path)


def _refuse_other_file(path: Path) -> None:
    """Refuse a file that is no SQLite database."""
    with path.open("rb") as file:
        head = file.read(len(SQLITE_MAGIC))
    if head not in (SQLITE_MAGIC, b""):
        raise StudyError(
            f"{path}: is no database of a study, since it is no file of SQLite. Give the folder "
            "that `run` wrote, or the URL of the study's storage."
        )


def _of_folder(folder: Path) -> tuple[str, str | None]:
    """Return the storage URL of a study's folder, and the name of its study where that is known.

    A database that lies in the folder is preferred to the one that the folder was made for: the
    two may have been copied here together.
    """
    owner = owner_of(folder)
    if (folder / DATABASE).is_file():
        url = f"sqlite:///{folder / DATABASE}"
        names = _names(url)
        return url, owner.study if owner is not None and owner.study in names else None
    if owner is not None:
        place = os.environ.get(STORAGE_VARIABLE) or owner.storage
        if place is not None:
            return place, owner.study
        raise StudyError(
            f"{folder} is the folder of study '{owner.study}', whose database is not in it. Give "
            "the URL of that one instead."
        )
    if not folder.exists():
        raise StudyError(
            f"{folder}: there is no such folder. Give the folder that `run` wrote, or the URL of "
            "the study's storage."
        )
    raise StudyError(
        f"{folder}: holds no {DATABASE}. Give the folder that `run` wrote, or the URL of the "
        "study's storage."
    )


def _newest(runs: Path) -> Path:
    """Return the folder of the study whose database was written last."""
    found: Sequence[Path] = [
        *runs.glob(f"*/{DATABASE}"),
        *(path for path in runs.glob("*/study.json") if not (path.parent / DATABASE).exists()),
    ]
    if not found:
        raise StudyError(
            f"No study is named, and there is none under {runs}/. Give the folder of a study, or "
            "--storage and --study."
        )
    return max(found, key=lambda path: path.stat().st_mtime).parent


def _names(url: str) -> list[str]:
    """Return the names of the studies in a storage."""
    from hydralv_tune.study.study import study_names  # Optuna is slow to import

    return study_names(url)


def _only(url: str) -> str:
    """Return the name of the one study in a storage."""
    names = _names(url)
    if len(names) == 1:
        return names[0]
    if not names:
        raise StudyError(f"{mask_passwords(url)} holds no study. Start one with `run`.")
    known = ", ".join(names[:12])
    raise StudyError(
        f"{mask_passwords(url)} holds {len(names)} studies: {known}. Name one with --study."
    )
