"""Versions of a trial's folder in a shared folder or an object store, for nodes without one disk.

What lies at the URL is never changed, only added to and cleared away; attempts do not share names:

    4.0.json         attempt 4 has begun
    4.2.json         its second push, whole: which push copied each file of the folder
    4.2/best.ckpt    a file that this push copied

The highest version (attempt, push) is the state of the trial, as a whole. Its list is written last,
so a push that ends half-way leaves the version before. An attempt that a later one has taken over
can only write versions that count for nothing.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from hydralv_tune.artifacts.writing import write_atomically
from hydralv_tune.config.errors import InputError, TrialTakenOver

HERE_FILE = ".version.json"
"""Says which version the folder on this node holds; missing while it is being replaced."""

COPY_BYTES = 8 * 2**20


class Version(NamedTuple):
    """A state of a trial; the later one compares as greater.

    Args:
        attempt: Number of the attempt that left it.
        push: Of that attempt, from 1; 0 before the first.
    """

    attempt: int
    push: int

    def __str__(self) -> str:
        return f"{self.attempt}.{self.push}"


NOTHING = Version(-1, 0)


class CheckpointStore:
    """A trial's folder and its versions at a URL; a push copies what has changed since the last.

    It relies on a store that lists a file once it is written: so do POSIX file systems, S3, Google
    Cloud Storage and Azure. An attempt that has been taken over learns of it at its next push or
    check, and may train on until then. Where a listing lags (NFS clients may cache one for a
    minute), it learns of it later, and the attempt after it may begin from the version before
    the last, or fail over a file that was cleared away and be tried again. Either way, nothing of
    an earlier attempt is ever taken for newer than what a later one left.

    Args:
        folder: On this node.
        url: A path, or a URL that pyarrow knows: `file://`, `s3://`, `gs://`, `abfs://`, `hdfs://`.
        name: Of the trial's place under the URL, as `trial_name` gives it.

    Raises:
        InputError: The URL is of no file system that is known here.
    """

    def __init__(self, folder: Path, url: str, name: str) -> None:
        self._folder = folder
        self._files, root = file_system(url)
        self._root = f"{root.rstrip('/')}/{name}"
        # Of each file: how it was when it was copied, and by which version.
        self._copied: dict[str, tuple[tuple[int, int], Version]] = {}

    def begin(self, attempt: int) -> None:
        """Say that an attempt begins, and make the folder what the latest one left.

        Raises:
            TrialTakenOver: A later attempt has begun.
            InputError: What the latest one left names files outside the folder.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        self._write_list(Version(attempt, 0), {})
        self.check(attempt)
        self.pull()
        # What the folder holds from now on is newer than all that earlier attempts left.
        set_version_here(self._folder, Version(attempt, 0))

    def check(self, attempt: int) -> Version:
        """Return the latest version at the URL, which is of this attempt or of an earlier one.

        Raises:
            TrialTakenOver: A later attempt has begun.
        """
        latest = max(self._versions(), default=NOTHING)
        if latest.attempt > attempt:
            raise TrialTakenOver(
                f"attempt {latest.attempt} has taken trial {attempt} over, as {self._root} shows. "
                "If this study has no such trial, another study of the same name lies there: give "
                "another --checkpoints."
            )
        return latest

    def pull(self) -> int:
        """Replace what the folder holds by the latest push, and return how many files that has.

        A folder that holds that version or a newer one stays as it is. Otherwise the files that the
        push does not have are removed: they are of an earlier attempt.

        Raises:
            InputError: The push names files outside the folder.
        """
        latest = max((v for v in self._versions() if v.push > 0), default=NOTHING)
        if latest <= version_here(self._folder):
            return 0
        sources = self._read_list(latest)
        self._folder.mkdir(parents=True, exist_ok=True)
        # All is here before anything is replaced, so a copy that fails leaves the folder whole.
        fetched = {name: self._fetch(name, version) for name, version in sources.items()}
        (self._folder / HERE_FILE).unlink(missing_ok=True)
        for name, path in self._own_files():
            if name not in fetched:
                path.unlink()
        for name, temporary in fetched.items():
            os.replace(temporary, self._folder / name)
        set_version_here(self._folder, latest)
        return len(fetched)

    def push(self, attempt: int) -> int:
        """Leave the folder as the attempt's next version, and return how many files were copied.

        Nothing is left where nothing has changed.

        Raises:
            TrialTakenOver: A later attempt has begun.
        """
        version = Version(attempt, self.check(attempt).push + 1)
        copied = {name: self._copy(name, path, version) for name, path in self._own_files()}
        if copied == self._copied:
            return 0
        # First here: a node that dies in between holds at least what it has left at the URL.
        set_version_here(self._folder, version)
        self._write_list(version, {name: str(source) for name, (_, source) in copied.items()})
        self._copied = copied
        # Whoever has begun by now may be reading the version before: it is theirs to clear away.
        self.check(attempt)
        self._clear_before(version, {f"{source}/{name}" for name, (_, source) in copied.items()})
        return sum(source == version for _, source in copied.values())

    def _own_files(self) -> Iterator[tuple[str, Path]]:
        """Yield name and path of the folder's files, but for those that concern this node alone."""
        for path in sorted(self._folder.rglob("*")):
            name = path.relative_to(self._folder)
            if not any(part.startswith(".") for part in name.parts) and path.is_file():
                yield name.as_posix(), path

    def _versions(self) -> list[Version]:
        """Return the versions at the URL, those of push 0 included."""
        found = [info.base_name for info in self._listed(self._root) if info.is_file]
        return [version_of(name) for name in found if name.endswith(".json")]

    def _listed(self, path: str, *, recursive: bool = False) -> Any:
        """Return what lies under a path at the URL."""
        from pyarrow import fs

        selector = fs.FileSelector(path, recursive=recursive, allow_not_found=True)
        return self._files.get_file_info(selector)

    def _read_list(self, version: Version) -> dict[str, Version]:
        """Return the files of a version, and of each which version copied it."""
        path = f"{self._root}/{version}.json"
        with self._files.open_input_stream(path) as source:
            entries = json.loads(source.read())
        files = {str(name): version_of(str(copied_by)) for name, copied_by in entries.items()}
        # Names come from elsewhere and must not leave the folder.
        for name, copied_by in files.items():
            parts = PurePosixPath(name).parts
            if not parts or copied_by == NOTHING or any(p.startswith(("/", ".")) for p in parts):
                raise InputError(
                    f"{path}: '{name}' is no file of a trial's folder. Remove the list."
                )
        return files

    def _write_list(self, version: Version, files: dict[str, str]) -> None:
        """Write the list of a version, whole or not at all."""
        path = f"{self._root}/{version}.json"
        self._files.create_dir(self._root, recursive=True)
        with self._files.open_output_stream(f"{path}.part") as sink:
            sink.write(json.dumps(files).encode())
        self._files.move(f"{path}.part", path)

    def _fetch(self, name: str, version: Version) -> Path:
        """Copy a file from the URL beside its place, and return where it is."""
        target = self._folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.pulled")
        source_path = f"{self._root}/{version}/{name}"
        with self._files.open_input_stream(source_path) as source, temporary.open("wb") as sink:
            shutil.copyfileobj(source, sink, COPY_BYTES)
        return temporary

    def _copy(self, name: str, path: Path, version: Version) -> tuple[tuple[int, int], Version]:
        """Copy a file to the URL if it has changed; return its state and which version has it."""
        state = _state(path)
        before = self._copied.get(name)
        if before is not None and before[0] == state:
            return before
        target = f"{self._root}/{version}/{name}"
        self._files.create_dir(os.path.dirname(target), recursive=True)
        with path.open("rb") as source, self._files.open_output_stream(target) as sink:
            shutil.copyfileobj(source, sink, COPY_BYTES)
        return state, version

    def _clear_before(self, latest: Version, kept: Collection[str]) -> None:
        """Remove versions before the latest from the URL, but for the files that it still uses."""
        for info in self._listed(self._root):
            version = version_of(info.base_name)
            if version == NOTHING or version >= latest:
                continue
            # Somebody else may clear away the same.
            with suppress(FileNotFoundError):
                if info.is_file:
                    self._files.delete_file(info.path)
                elif not any(name.startswith(f"{version}/") for name in kept):
                    self._files.delete_dir(info.path)
                else:
                    self._clear_folder(info.path, kept)

    def _clear_folder(self, folder: str, kept: Collection[str]) -> None:
        """Remove the files of a version's folder that are not kept."""
        for info in self._listed(folder, recursive=True):
            if info.is_file and os.path.relpath(info.path, self._root) not in kept:
                self._files.delete_file(info.path)


def version_here(folder: Path) -> Version:
    """Return which version a folder on this node holds; `NOTHING` where it does not say."""
    try:
        return Version(*map(int, json.loads((folder / HERE_FILE).read_text())))
    except (OSError, ValueError, TypeError):
        return NOTHING


def set_version_here(folder: Path, version: Version) -> None:
    """Say which version a folder on this node holds, or will while its attempt works on."""
    write_atomically(folder / HERE_FILE, json.dumps(version).encode())


def trial_name(study: str, root: int) -> str:
    """Return the place of a trial's folder under a URL that several studies may share.

    Args:
        study: Its name, which may hold any printable character.
        root: Number of the trial's first attempt.
    """
    # One folder, and none that leads elsewhere.
    plain = re.sub(r"[/\\%]|^\.", lambda found: f"%{ord(found[0]):02X}", study)
    return f"{plain}/{root}"


def version_of(name: str) -> Version:
    """Return the version that a list or a folder at the URL is of; `NOTHING` for another name."""
    found = re.fullmatch(r"(\d+)\.(\d+)(\.json)?", name)
    return NOTHING if found is None else Version(int(found[1]), int(found[2]))


def file_system(url: str) -> tuple[Any, str]:
    """Return the file system of a URL or path, and the path in it.

    Raises:
        InputError: pyarrow knows no such file system, or cannot reach it.
    """
    from pyarrow import ArrowException, fs

    try:
        if "://" not in url:
            return fs.LocalFileSystem(), str(Path(url).expanduser().resolve())
        files, path = fs.FileSystem.from_uri(url)
    except (ArrowException, OSError, ValueError) as error:
        raise InputError(
            f"--checkpoints: '{url}' cannot be used: {error}. Give a shared folder, or a URL of "
            "pyarrow's, such as s3://bucket/studies."
        ) from error
    return files, path


def _state(path: Path) -> tuple[int, int]:
    """Return what tells that a file has changed."""
    status = path.stat()
    return (status.st_size, status.st_mtime_ns)
