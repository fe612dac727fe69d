"""What a message proposes is done, and then works: options, names, expressions and commands."""

from __future__ import annotations

import contextlib
import re
import shlex
import shutil
import sqlite3
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import scipy.ndimage
import yaml
import zarr
from test_databases import run_one
from test_truth import SHAPE, boxes, perfect

from hydralv_tune.cli.main import exit_code
from hydralv_tune.data.volumes import read_array, write_array

Words = list[str]


class Case(NamedTuple):
    """A mistake and the step that its message proposes.

    Args:
        words: Of the wrong command, in a folder with the files of `made`.
        proposed: What the message proposes, the groups being what is used.
        mended: The right command, of the wrong words and the groups; it may write files.
        code: Exit code of the wrong command.
    """

    words: str
    proposed: str
    mended: Callable[[Words, Sequence[str]], Words]
    code: int = 2


def added(words: Words, found: Sequence[str]) -> Words:
    """Return the words with a proposed option after them."""
    return [*words, *shlex.split(found[0])]


def replaced(old: str) -> Callable[[Words, Sequence[str]], Words]:
    """Return what puts a proposed name or path in the place of a word."""
    return lambda words, found: [found[0] if word == old else word for word in words]


def evaluated(name: str, file: str) -> Callable[[Words, Sequence[str]], Words]:
    """Return what computes a proposed expression of a file's array, and saves it in its place."""

    def mend(words: Words, found: Sequence[str]) -> Words:
        import h5py

        with h5py.File(file) as opened:
            array = opened["main"][...]
        known = {name: array, "labels": array, "numpy": np, "scipy": scipy}
        expression = found[0] if "(" in found[0] or "[" in found[0] or "/" in found[0] else (
            f"{found[0]}({name})"
        )  # fmt: skip
        result = eval(expression, known)
        write_array(file, result[0] if isinstance(result, tuple) else result)
        return words

    return mend


CASES = {
    "a negative label": Case(
        "inspect --image im.h5 --label negative.h5", r"say so with (--ignore-label -1)\.", added
    ),
    "a negative label in score": Case(
        "score --prediction label.h5 --label negative.h5", r"with (--ignore-label -1)\.", added
    ),
    "a negative label in sweep": Case(
        "sweep --probabilities p.h5 --label negative.h5 --space smoke",
        r"with (--ignore-label -1)\.", added,
    ),
    "whole numbers as floats": Case(
        "inspect --image im.h5 --label floats.h5", r"(labels\.astype\('uint16'\))",
        evaluated("labels", "floats.h5"),
    ),
    "a label without instances": Case(
        "inspect --image im.h5 --label bool.h5", r"with (scipy\.ndimage\.label)\.",
        evaluated("labels", "bool.h5"),
    ),
    "values that are not finite": Case(
        "inspect --image nan.h5", r"with (numpy\.nan_to_num),", evaluated("image", "nan.h5")
    ),
    "channels at the end": Case(
        "decode --probabilities last.h5 --out o.h5", r"(numpy\.moveaxis\(p, 3, 0\))",
        evaluated("p", "last.h5"),
    ),
    "an axis for the batch": Case(
        "decode --probabilities batch.h5 --out o.h5", r"length 1: (p\[0\])",
        evaluated("p", "batch.h5"),
    ),
    "two datasets": Case(
        "inspect --image two.h5", r"for example (two\.h5:a)\.", replaced("two.h5")
    ),
    "a mask for one of two": Case(
        "inspect --image im.h5 --image im2.h5 --mask mask.h5", r"'(--mask none)' stands", added
    ),
    "a scored mask for one of two": Case(
        "inspect --image im.h5 --image im2.h5 --scored-mask mask.h5",
        r"'(--scored-mask none)' stands", added,
    ),
    "a name with a slip": Case("check basline", r"'(baseline)'", replaced("basline")),
    "a space with a slip": Case(
        "sweep --probabilities p.h5 --label label.h5 --space smok", r"'(smoke)'", replaced("smok")
    ),
    "a decoder with a slip": Case(
        "decode --probabilities p.h5 --out o.h5 --decoder decode_instance_binary_contour_distanc",
        r"'(decode_instance_binary_contour_distance)'",
        replaced("decode_instance_binary_contour_distanc"),
    ),
    "a setting without a value": Case(
        "train smoke --image im.h5 --label label.h5 --out t --set lr",
        r"Try --set (\S+)\.$", lambda _, found: ["check", "mine.yaml"] if setting(found[0]) else [],
    ),
    "a key with a slip": Case(
        "check slip.yaml", r"'optimization\.(optimizer)'",
        lambda words, found: renamed("slip.yaml", "optimiser", found[0]) and words,
    ),
    "two slashes for three": Case(
        "status --storage sqlite://study.db --study s", r"Write (sqlite:///study\.db)\.",
        replaced("sqlite://study.db"),
    ),
    "a path for a URL": Case(
        "status --storage study.db --study s", r"like (sqlite:///study\.db)\.",
        replaced("study.db"),
    ),
    "a study with a slip": Case(
        "status --storage sqlite:///study.db --study t", r"Known: (s)\b", replaced("t")
    ),
    "two studies in one file": Case(
        "status --storage sqlite:///two.db", r"(Name one with --study)",
        lambda words, _: [*words, "--study", "s"],
    ),
    "an array that a group has under another name": Case(
        "inspect --image group.zarr", r"for example (group\.zarr:\S+)\.", replaced("group.zarr")
    ),
    "a plate": Case(
        "inspect --image plate.zarr", r"for example (plate\.zarr:A/1/0)\.", replaced("plate.zarr")
    ),
}  # fmt: skip


def setting(text: str) -> bool:
    """Write the candidate that a proposed setting makes of `smoke`."""
    key, _, value = text.partition("=")
    nested: Any = yaml.safe_load(value)
    for step in reversed(key.split(".")):
        nested = {step: nested}
    Path("mine.yaml").write_text(yaml.safe_dump(nested))
    return True


def renamed(file: str, old: str, new: str) -> bool:
    """Put another key in the place of one."""
    Path(file).write_text(Path(file).read_text().replace(old, new))
    return True


@pytest.fixture
def made(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with the wrong files, as the working folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OPTUNA_STORAGE", raising=False)
    shutil.copytree(files, tmp_path, dirs_exist_ok=True)
    return tmp_path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder that the wrong files are copied from."""
    folder = tmp_path_factory.mktemp("wrong")
    with contextlib.chdir(folder):
        write_files()
    return folder


def write_files() -> None:
    """Write the wrong files into the working folder."""
    image = np.random.default_rng(0).integers(0, 255, SHAPE, np.uint8)
    label, p = boxes(), perfect(boxes())
    nan = image.astype(np.float32)
    nan[0, 0, 0] = np.nan
    arrays = {
        "im": image, "im2": image, "label": label, "mask": np.ones(SHAPE, np.uint8), "p": p,
        "negative": np.where(label == 2, -1, label.astype(np.int16)), "nan": nan,
        "floats": label.astype(np.float32), "bool": label > 0, "last": np.moveaxis(p, 0, -1),
        "batch": p[None],
    }  # fmt: skip
    import h5py

    for name, array in arrays.items():
        with h5py.File(f"{name}.h5", "w") as file:
            file["main"] = array
    with h5py.File("two.h5", "w") as file:
        file["a"] = file["b"] = image
    group = zarr.open_group("group.zarr", mode="w")
    for name in ("one", "two"):
        group.create_array(name, data=image)
    plate = zarr.open_group("plate.zarr", mode="w", zarr_format=2)
    plate.attrs["plate"] = {"version": "0.4", "wells": [{"path": "A/1"}]}
    well = plate.require_group("A/1/0")
    well.create_array("0", data=image)
    axes = [{"name": name, "type": "space"} for name in "zyx"]
    scale = [{"type": "scale", "scale": [1.0, 1.0, 1.0]}]
    datasets = [{"path": "0", "coordinateTransformations": scale}]
    well.attrs["multiscales"] = [{"version": "0.4", "axes": axes, "datasets": datasets}]
    Path("slip.yaml").write_text("optimization: {optimiser: {lr: 1.0e-3}}\n")
    run_one(Path("s").absolute(), "sqlite:///study.db")
    shutil.copy("study.db", "two.db")
    run_one(Path("t").absolute(), "sqlite:///two.db", "t")


@pytest.mark.parametrize("name", CASES)
def test_what_a_message_proposes_works(
    made: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    case = CASES[name]
    words = shlex.split(case.words)
    assert exit_code(words) == case.code
    said = " ".join(capsys.readouterr().err.split())
    found = re.search(case.proposed, said)
    assert found is not None, said
    mended = case.mended(words, found.groups())
    assert exit_code(mended) == 0, capsys.readouterr().err


def test_a_study_whose_file_is_gone_is_made_again_by_the_command_that_is_proposed(
    made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from test_databases import leave_record, make_space

    from hydralv_tune.launch.start import Start
    from hydralv_tune.study.driver import Driver
    from hydralv_tune.study.trial_views import Asked, TrialResult

    out = made / "o ut"  # a path that a shell must be told to keep whole
    storage = f"sqlite:///{out / 'study.db'}"
    out.mkdir()
    study = Start(storage, "s", make_space(), out).open({"im": "abc"})
    with Driver(study, out=out) as driver:
        trial = driver.ask(9)
        assert isinstance(trial, Asked)
        metrics = leave_record(out, trial, "complete")
        driver.tell(trial.number, TrialResult("COMPLETE", 0.2, -0.3, {"metrics": metrics}))
    study.close()
    (out / "study.db").unlink()
    assert exit_code(["status", "--storage", storage, "--study", "s"]) == 2
    said = capsys.readouterr().err
    found = re.search(r"`hydralv-tune (recover .*?)`", said)
    assert found is not None, said
    assert exit_code(shlex.split(found[1])) == 0, capsys.readouterr().err
    assert exit_code(["status", str(out), "--json"]) == 0
    assert '"complete": 1' in capsys.readouterr().out
    with sqlite3.connect(out / "study.db") as connection:
        assert connection.execute("SELECT count(*) FROM trials").fetchone() == (1,)


def test_the_arrays_of_the_table_are_what_they_are_called(made: Path) -> None:
    np.testing.assert_array_equal(read_array("p.h5"), np.moveaxis(_raw("last.h5"), -1, 0))


def _raw(file: str) -> np.ndarray:
    import h5py

    with h5py.File(file) as opened:
        return np.asarray(opened["main"])
