"""Machines as they are: read-only installations, no home, long or missing temporary folders."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from commands_in_a_process import environment

from hydralv_tune.cli.main import exit_code
from hydralv_tune.config.errors import InputError
from hydralv_tune.launch.cluster import LONGEST_SOCKET, SOCKET_BYTES, ray_folder
from hydralv_tune.study.study import open_readonly

PACKAGE = Path(__file__).parents[1] / "hydralv_tune"
WHERE_IS_THE_CACHE = """
import numba
from hydralv_tune.numerics.watershed.flood import _root
print(numba.config.CACHE_DIR, type(_root._cache).__name__)
"""


@pytest.fixture
def read_only(tmp_path: Path) -> Path:
    """Return a folder with an installation that takes no cache, not even one of the superuser's."""
    copied = tmp_path / "site" / "hydralv_tune"
    shutil.copytree(PACKAGE, copied, ignore=shutil.ignore_patterns("__pycache__"))
    (copied / "numerics" / "watershed" / "__pycache__").write_text("no folder")
    (tmp_path / "tmp").mkdir()
    return tmp_path


def cache_of(folder: Path, **variables: str) -> tuple[str, str]:
    """Return where kernels are cached there without a home folder, and what was said of it."""
    cleared = {k: v for k, v in environment().items() if not k.startswith(("NUMBA_", "XDG_"))}
    done = subprocess.run(
        [sys.executable, "-c", WHERE_IS_THE_CACHE], cwd=folder, capture_output=True, text=True,
        check=False, env={
            **cleared, "PYTHONPATH": str(folder / "site"), "HOME": "/dev/null/none",
            "TMPDIR": str(folder / "tmp"), **variables,
        },
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip(), done.stderr


def test_kernels_are_cached_in_the_temporary_folder_where_nothing_else_takes_them(
    read_only: Path,
) -> None:
    cached, said = cache_of(read_only)
    (folder,) = (read_only / "tmp").glob("hydralv-tune-numba-*")
    assert cached == f"{folder} FunctionCache"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert said.count("NUMBA_CACHE_DIR") == 1
    assert str(folder) in said


def test_a_folder_that_others_can_write_to_holds_no_cache(read_only: Path) -> None:
    folder = read_only / "tmp" / f"hydralv-tune-numba-{os.getuid()}"
    folder.mkdir()
    folder.chmod(0o777)
    cached, said = cache_of(read_only)
    assert cached == "NullCache"
    assert "compiles them anew" in said
    assert said.count("NUMBA_CACHE_DIR") == 1
    assert not any(folder.iterdir())


def test_the_variable_that_the_warning_names_is_heeded(read_only: Path) -> None:
    chosen = read_only / "chosen"
    assert cache_of(read_only, NUMBA_CACHE_DIR=str(chosen)) == (f"{chosen} FunctionCache", "")


def test_ray_keeps_its_sockets_where_their_paths_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    fits = tmp_path.root + "t" * (SOCKET_BYTES - len(LONGEST_SOCKET) - 2)
    monkeypatch.setattr("os.access", lambda path, mode: path in (fits, fits + "t", "/tmp"))
    for folder, ray in ((fits, fits), (fits + "t", "/tmp"), ("", "/tmp"), ("gone", "/tmp")):
        monkeypatch.setenv("TMPDIR", folder)
        assert ray_folder() == f"{ray}/ray"
    monkeypatch.setenv("RAY_TMPDIR", fits + "t")
    with pytest.raises(InputError, match=f"Set RAY_TMPDIR .* at most {len(fits)} bytes"):
        ray_folder()
    monkeypatch.setenv("RAY_TMPDIR", fits)
    assert ray_folder() == f"{fits}/ray"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["long", "gone"])
def test_a_study_runs_whatever_the_temporary_folder(
    fake_study: Any, tmp_path: Path, kind: str
) -> None:
    folder = tmp_path / ("long" * 40 if kind == "long" else "gone")
    if kind == "long":
        folder.mkdir()
    driver = fake_study.start({"TMPDIR": str(folder)}, trials=1, steps=1)
    assert fake_study.wait(driver) == 0, fake_study.errors()
    storage = fake_study.said()[-1]["facts"]["storage"]
    assert [trial.state for trial in open_readonly(storage, "fake").trials()] == ["COMPLETE"]
    assert kind == "gone" or not (folder / "ray").exists()


def test_a_working_folder_that_was_removed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert exit_code(["check", "baseline"]) == 2
    assert "the folder that you are in was removed" in capsys.readouterr().err
