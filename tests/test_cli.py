"""The command line keeps what the contract promises: exit codes, one JSON document, one message."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import psutil
import pytest
import yaml
from commands_in_a_process import environment

from hydralv_tune.cli.configurations import Kind
from hydralv_tune.cli.main import exit_code
from hydralv_tune.config.search_space_files import load_space
from hydralv_tune.data.volumes import read_array, write_array
from hydralv_tune.numerics.phantom.volume import make_phantom
from hydralv_tune.study.study import Study, open_readonly

Run = Callable[..., tuple[int, str, str]]
FLAGS = {"im": "--image", "label": "--label", "mask": "--mask"}
SCORE_KEYS = {
    "adapted_rand_error",
    "adapted_rand_precision",
    "adapted_rand_recall",
    "adapted_rand_error_foreground",
    "skimage_adapted_rand_error",
    "voi_split",
    "voi_merge",
    "instances_true",
    "instances_predicted",
    "matched_iou50",
    "precision_iou50",
    "recall_iou50",
    "f1_iou50",
    "missed",
    "split",
    "merged",
    "invented",
}
MORE_SCORE_KEYS = {
    "voi", "f1_iou30", "f1_iou75", "ap_iou50", "ap_iou75", "ap", "pq", "sq", "rq", "best_dice",
    "count_bias", "volume_bias", "by_size", "recall_small", "recall_medium", "recall_large",
}  # fmt: skip
"""Added in the second version."""


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    """Return a function that runs a command here and returns exit code, stdout and stderr."""

    def run_command(*words: object) -> tuple[int, str, str]:
        capfd.readouterr()
        code = exit_code([str(word) for word in words])
        captured = capfd.readouterr()
        return code, captured.out, captured.err

    return run_command


MARKUP = ("slab [z 10:14]", "[/a]", "[bold]x[/bold]", ":warning:")
"""Names that a terminal library would take for markup: dropped, an error, a style, an emoji."""


def write(path: Path, array: np.ndarray, dataset: str = "main") -> Path:
    """Write one HDF5 dataset and return its path."""
    with h5py.File(path, "a") as file:
        file[dataset] = array
    return path


@pytest.fixture(scope="module")
def volume(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return the files of a small phantom: im, label, mask, and degraded targets as p."""
    folder = tmp_path_factory.mktemp("volume")
    made = make_phantom(shape=(12, 96, 96), instances=5, seed=1)
    rng = np.random.default_rng(0)
    inside = (made.label > 0).astype(np.float32)
    maps = np.stack([inside * 0.8 + 0.1, 0.2 * inside, inside * 1.4 - 0.7])
    maps += rng.normal(0, 0.05, maps.shape).astype(np.float32)
    return {
        "im": write(folder / "im.h5", made.image),
        "label": write(folder / "label.h5", made.label),
        "mask": write(folder / "mask.h5", made.mask),
        "p": write(folder / "p.h5", np.clip(maps, [[[[0]]], [[[0]]], [[[-1]]]], 1).astype("f2")),
    }


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, volume: dict[str, Path]) -> Path:
    """Return the checkpoint of a training of two epochs."""
    out = tmp_path_factory.mktemp("trained")
    settings = (
        "optimization.max_epochs=2", "data.iter_num_per_epoch=2", "monitor.evaluation.count=1",
        "data.patch_size=[8,32,32]", "inference.sliding_window.window_size=[8,64,64]",
        "model.filters=[4,8]",
    )  # fmt: skip
    words = ["train", "smoke", "--image", str(volume["im"]), "--label", str(volume["label"])]
    words += ["--out", str(out), *(word for setting in settings for word in ("--set", setting))]
    assert exit_code(words) == 0
    return out / "best.ckpt"


def one_error(result: tuple[int, str, str]) -> str:
    """Return the message of a command that must have refused its input in one message."""
    code, out, err = result
    assert code == 2, err
    assert out == ""
    assert err.startswith("error: ")
    assert "Traceback" not in err
    return err


def test_score_of_truth_against_itself_is_perfect(run: Run, volume: dict[str, Path]) -> None:
    code, out, _ = run(
        "score", "--prediction", volume["label"], "--label", volume["label"], "--json"
    )
    document = json.loads(out)
    assert code == 0
    assert set(document) == SCORE_KEYS | MORE_SCORE_KEYS
    assert document["adapted_rand_error"] == pytest.approx(0, abs=1e-12)
    assert document["f1_iou50"] == 1
    assert document["missed"] == []


def test_score_on_real_vesicles_gives_the_published_figures(run: Run, shared_data: Path) -> None:
    folder = shared_data / "hydra-11-5"
    code, out, _ = run(
        "score", "--prediction", folder / "pred.h5", "--label", folder / "label.h5",
        "--mask", folder / "mask.h5", "--json",
    )  # fmt: skip
    document = json.loads(out)
    assert code == 0
    assert round(document["adapted_rand_error"], 3) == 0.084
    assert round(document["adapted_rand_error_foreground"], 3) == 0.332
    assert round(document["skimage_adapted_rand_error"], 3) == 0.403
    assert document["matched_iou50"] == 203
    assert document["instances_true"] == 265
    assert document["instances_predicted"] == 271


def test_sweep_winner_scores_the_same_through_decode_and_score(
    run: Run, volume: dict[str, Path], tmp_path: Path
) -> None:
    code, out, _ = run(
        "sweep", "--probabilities", volume["p"], "--label", volume["label"],
        "--mask", volume["mask"], "--space", "smoke", "--out", tmp_path / "best.yaml", "--json",
    )  # fmt: skip
    document = json.loads(out)
    assert code == 0
    assert {"combinations", "seconds", "combinations_per_s", "best", "best_by_f1",
            "best_unguarded"} <= set(document)  # fmt: skip
    step = yaml.safe_load((tmp_path / "best.yaml").read_text())["test"]["decoding"][0]
    settings = [f"--set={key}={json.dumps(value)}" for key, value in step["kwargs"].items()]
    segmentation = tmp_path / "seg.h5"
    code, out, _ = run(
        "decode", "--probabilities", volume["p"], "--mask", volume["mask"],
        "--decoder", step["name"], "--out", segmentation, "--json", *settings,
    )  # fmt: skip
    assert code == 0
    assert json.loads(out)["instances"] > 0
    _, out, _ = run(
        "score", "--prediction", segmentation, "--label", volume["label"],
        "--mask", volume["mask"], "--json",
    )  # fmt: skip
    scored = json.loads(out)
    for key in ("adapted_rand_error", "adapted_rand_error_foreground", "f1_iou50"):
        assert scored[key] == pytest.approx(document["best"][key], abs=1e-12)


def test_inspect_gives_the_contract_keys(run: Run, volume: dict[str, Path]) -> None:
    code, out, _ = run(
        "inspect", "--image", volume["im"], "--label", volume["label"],
        "--mask", volume["mask"], "--json",
    )  # fmt: skip
    document = json.loads(out)
    assert code == 0
    assert {"shape", "instances", "instance_size_voxels", "mask_fraction",
            "foreground_fraction", "warnings"} <= set(document)  # fmt: skip
    assert document["shape"] == [12, 96, 96]
    assert document["instances"] == 5


def test_every_shipped_file_passes_check(run: Run) -> None:
    root = Path(__file__).parents[1]
    files = [*root.glob("trials/*.yaml"), *root.glob("search_spaces/*.yaml")]
    assert len(files) >= 11
    code, out, _ = run("check", "--json", *files)
    assert code == 0, out
    assert all(row["ok"] for row in json.loads(out)["files"])


def bad_volume(kind: str, folder: Path, volume: dict[str, Path]) -> tuple[dict[str, Any], str]:
    """Return the options of a wrong input, and a word that its message must hold."""
    label = np.asarray(h5py.File(volume["label"])["main"])
    image = np.asarray(h5py.File(volume["im"])["main"])
    path = folder / "bad.h5"
    if kind == "missing":
        return {"image": folder / "absent.h5"}, "absent.h5"
    if kind == "truncated":
        path.write_bytes(volume["im"].read_bytes()[: volume["im"].stat().st_size // 2])
        return {"image": path}, "bad.h5"
    if kind == "not HDF5":
        path.write_text("this is no HDF5 file")
        return {"image": path}, "bad.h5"
    if kind == "2-D":
        return {"image": write(path, image[0])}, "bad.h5"
    if kind == "4-D":
        return {"image": write(path, image[None])}, "bad.h5"
    if kind == "two datasets":
        write(path, image, "first")
        return {"image": write(path, image, "second")}, "second"
    if kind == "float labels":
        return {"label": write(path, label.astype(np.float32))}, "float32"
    if kind == "negative labels":
        return {"label": write(path, label.astype(np.int32) - 1)}, "negative"
    if kind == "shapes differ":
        return {"label": write(path, label[1:])}, "shape"
    if kind == "empty label":
        return {"label": write(path, label * 0)}, "label"
    if kind == "empty inside mask":
        return {"mask": write(path, (label == 0).astype(np.uint8))}, "mask"
    assert kind == "NaN"
    broken = image.astype(np.float32)
    broken[3, 4, 5] = np.nan
    return {"image": write(path, broken)}, "NaN"


@pytest.mark.parametrize(
    "kind",
    [
        "missing", "truncated", "not HDF5", "2-D", "4-D", "two datasets", "float labels",
        "negative labels", "shapes differ", "empty label", "empty inside mask", "NaN",
    ],
)  # fmt: skip
@pytest.mark.parametrize("command", ["train", "run"])
def test_wrong_volumes_are_refused(
    run: Run, volume: dict[str, Path], tmp_path: Path, kind: str, command: str
) -> None:
    options, word = bad_volume(kind, tmp_path, volume)
    files = {"image": volume["im"], "label": volume["label"], "mask": volume["mask"], **options}
    words = [text for name, path in files.items() for text in (f"--{name}", path)]
    out = tmp_path / "out"
    message = one_error(run(command, "smoke", *words, "--out", out))
    assert word in message
    assert not out.exists()


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("data.patch_size=[64,512,512]", ["patch", "64"]),
        ("model.architecture=mednxt", ["mednxt", "mednext"]),
        ("model.loss_functions=[DiceLos]", ["DiceLos", "DiceLoss"]),
        ("data.augmentation.preset=lots", ["preset", "lots"]),
        ("optimization.optimizer.learning_rate=0.1", ["learning_rate", "lr"]),
        ("optimization.optimizer.lr=-1e-3", ["lr", "-0.001"]),
        ("model.loss_weights=[1,2]", ["loss_weights"]),
    ],
)
def test_wrong_settings_are_refused(
    run: Run, volume: dict[str, Path], tmp_path: Path, setting: str, words: list[str]
) -> None:
    out = tmp_path / "out"
    message = one_error(
        run(
            "train", "smoke", "--image", volume["im"], "--label", volume["label"],
            "--mask", volume["mask"], "--out", out, "--set", setting,
        )
    )  # fmt: skip
    for word in words:
        assert word in message
    assert not out.exists()


@pytest.mark.parametrize(
    "text",
    ["model: [1, 2", "a: 1\na: 2", "model: !!python/object/apply:os.system ['touch hacked']"],
    ids=["does not parse", "key twice", "runs code"],
)
def test_wrong_yaml_is_refused(
    run: Run, tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    code, _, err = run("check", path)
    assert code == 2
    assert err.startswith("error: ")
    assert "broken.yaml" in err
    assert not (tmp_path / "hacked").exists()


def test_status_of_an_absent_study_creates_nothing(run: Run, tmp_path: Path) -> None:
    database = tmp_path / "none.db"
    message = one_error(run("status", "--storage", f"sqlite:///{database}", "--study", "s"))
    assert "none.db" in message
    assert not database.exists()


def test_a_database_that_does_not_answer_keeps_its_password(run: Run) -> None:
    url = "postgresql+psycopg://user:topsecret@127.0.0.1:9/db"
    message = one_error(run("status", "--storage", url, "--study", "s"))
    assert "topsecret" not in message
    assert "127.0.0.1" in message


def test_unknown_commands_and_options_are_wrong_input(run: Run) -> None:
    assert "nosuch" in one_error(run("nosuch"))
    assert "--nosuch" in one_error(run("score", "--nosuch"))


def test_runs_as_a_module() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "hydralv_tune", "--help"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "COLUMNS": "120", "NO_COLOR": "1"},
    )
    for command in ("phantom", "inspect", "check", "score", "decode", "sweep", "train", "predict",
                    "run", "status", "export", "report", "dashboard", "demo"):  # fmt: skip
        assert command in result.stdout


def test_places_that_cannot_be_written_are_refused_before_any_work(
    run: Run, volume: dict[str, Path], tmp_path: Path
) -> None:
    taken = tmp_path / "taken"
    taken.write_text("a file")
    data = ["--image", volume["im"], "--label", volume["label"]]
    maps = ["--probabilities", volume["p"]]
    storage = ["--storage", f"sqlite:///{tmp_path / 'none.db'}", "--study", "s"]
    for words in (
        ["phantom", taken],
        ["inspect", *data, "--out", taken],
        ["train", "smoke", *data, "--out", taken],
        ["train", "smoke", *data, "--out", taken / "inside"],
        ["run", "smoke", *data, "--out", taken],
        ["decode", *maps, "--out", taken / "seg.h5"],
        ["decode", *maps, "--out", tmp_path],
        ["decode", *maps, "--out", tmp_path / "seg.xyz"],
        ["sweep", *maps, "--label", volume["label"], "--out", taken / "best.yaml"],
        ["sweep", *maps, "--label", volume["label"], "--out", tmp_path / "best.png"],
        ["export", *storage, "--out", taken / "best.yaml"],
        ["report", *storage, "--out", taken],
        ["demo", "--out", taken],
    ):
        assert "out" in one_error(run(*words)) or words[0] == "phantom"
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]
    assert taken.read_text() == "a file"


def test_an_input_is_never_replaced_by_the_output(run: Run, volume: dict[str, Path]) -> None:
    before = volume["p"].read_bytes()
    message = one_error(run("decode", "--probabilities", volume["p"], "--out", volume["p"]))
    assert "would be lost" in message
    assert volume["p"].read_bytes() == before


def content(folder: Path) -> dict[str, bytes]:
    """Return every file below a folder, with its bytes."""
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder that we are in, of inputs of every kind and of folders of the user's own.

    Each holds probabilities: where a name gives an image or labels, it is refused before it is
    opened.
    """
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    maps = rng.random((3, 4, 16, 16)).astype(np.float32)
    with h5py.File("s.h5", "w") as file:
        file["main"], file["other"], file["in/deep"] = maps, maps, maps
    with h5py.File("one.h5", "w") as file:
        file["raw"] = maps
    for name in ("raw", "other"):
        write_array(f"g.zarr:{name}", maps)
    write_array("im.ome.zarr", maps)
    Path("sections").mkdir()
    Path("sections/s_0.png").write_bytes(b"a picture")
    for name in ("user.zarr", "user.precomputed", "view/image.precomputed"):
        Path(name).mkdir(parents=True)
        Path(name, "notes.txt").write_text("mine")
    Path("link").symlink_to(".")
    Path("linked.zarr").symlink_to("g.zarr")
    return tmp_path


LOSING = [
    ("s.h5:main", "s.h5"),
    ("s.h5", "s.h5:main"),
    ("s.h5", "./o/../s.h5"),
    ("s.h5", "link/s.h5:main"),
    ("file://{here}/s.h5:other", "s.h5"),
    ("one.h5", "one.h5:raw"),
    ("s.h5:in/deep", "s.h5:in"),
    ("one.h5", "s.h5:in"),
    ("one.h5", "s.h5:other/seg"),
    ("g.zarr:raw", "g.zarr"),
    ("g.zarr/raw", "g.zarr"),
    ("g.zarr/raw", "g.zarr:raw"),
    ("g.zarr:raw", "linked.zarr:raw"),
    ("g.zarr:raw", "g.zarr/new.zarr"),
    ("s.h5", "g.zarr:raw/new"),
    ("im.ome.zarr", "im.ome.zarr"),
    ("im.ome.zarr", "im.ome.zarr:0"),
    ("im.ome.zarr", "im.ome.zarr:0/seg"),
    ("sections", "sections/seg.h5"),
    ("s.h5", "user.zarr"),
    ("s.h5", "user.precomputed"),
    ("s.h5", "new.precomputed:8_8_8"),
    ("s.h5", "new.tif:0"),
]


@pytest.mark.parametrize(("given", "out"), LOSING, ids=str)
@pytest.mark.parametrize(
    "words", [("segment", ".", "--image"), ("predict", "--checkpoint", "s.h5", "--image"),
              ("decode", "--probabilities")], ids=lambda words: str(words[0])
)  # fmt: skip
def test_no_output_takes_the_place_of_what_is_there(
    run: Run, inputs: Path, words: tuple[str, ...], given: str, out: str
) -> None:
    before = content(inputs)
    message = one_error(run(*words, given.format(here=inputs), "--out", out))
    assert message.startswith(("error: --out", f"error: {out}", f"error: {out.split(':')[0]}:"))
    assert content(inputs) == before


@pytest.mark.parametrize("out", ["file://{here}/a b.h5", "precomputed://{here}/a.precomputed"])
def test_a_url_of_this_machine_is_its_path(run: Run, inputs: Path, out: str) -> None:
    code, _, err = run("decode", "--probabilities", "s.h5", "--out", out.format(here=inputs))
    assert code == 0, err
    made = inputs / out.rpartition("/")[2]
    assert read_array(made).shape == (4, 16, 16)
    assert not list(inputs.glob("*:*")), "a folder named as the scheme"


@pytest.mark.parametrize(
    "words",
    [("decode", "--probabilities", "s.h5", "--out", "s3://bucket/x.h5"),
     ("decode", "--probabilities", "s.h5", "--out", "precomputed://gs://bucket/x.precomputed"),
     ("segment", ".", "--image", "s.h5", "--out", "a.h5", "--table", "https://place/t.csv"),
     ("segment", ".", "--image", "s.h5", "--out", "a.h5", "--neuroglancer", "gs://place/view"),
     ("predict", "--checkpoint", "s3://place/best.ckpt", "--image", "s.h5", "--out", "a.h5"),
     ("phantom", "s3://place/phantom")],
    ids=" ".join,
)  # fmt: skip
def test_a_url_of_another_place_is_no_path(run: Run, inputs: Path, words: tuple[str, ...]) -> None:
    before = content(inputs)
    message = one_error(run(*words))
    assert "a URL, but a path" in message
    assert "Value error" not in message
    assert content(inputs) == before


@pytest.mark.parametrize(
    "words",
    [("segment", ".", "--image", "s.h5", "--image", "one.h5", "--out", "a.h5"),
     ("segment", ".", "--image", "*.h5", "--out", "a.h5"),
     ("segment", ".", "--image", "s.h5", "--mask", "a.h5", "--mask", "b.h5", "--out", "a.h5"),
     ("segment", ".", "--image", "s.h5", "--label", "a.h5", "--label", "b.h5", "--out", "a.h5"),
     ("predict", "--checkpoint", "s.h5", "--image", "s.h5", "--image", "s.h5", "--out", "a.h5"),
     ("decode", "--probabilities", "s.h5", "--probabilities", "one.h5", "--out", "a.h5"),
     ("sweep", "--probabilities", "s.h5", "--label", "a.h5", "--label", "b.h5"),
     ("score", "--prediction", "s.h5", "--prediction", "one.h5", "--label", "s.h5"),
     ("score", "--prediction", "s.h5", "--label", "s.h5", "--scored-mask", "*.h5")],
    ids=" ".join,
)  # fmt: skip
def test_several_files_for_one_volume_are_refused(
    run: Run, inputs: Path, words: tuple[str, ...]
) -> None:
    before = content(inputs)
    assert "takes one volume" in one_error(run(*words))
    assert content(inputs) == before


def test_a_pattern_may_name_the_one_volume(run: Run, inputs: Path) -> None:
    code, out, err = run(
        "decode", "--probabilities", "on?.h5:raw", "--out", "a.h5", "--mask", "none", "--json"
    )
    assert code == 0, err
    assert read_array(inputs / "a.h5").max() == json.loads(out)["instances"]
    assert "no file matches" in one_error(run("score", "--prediction", "x*.h5", "--label", "s.h5"))


@pytest.mark.parametrize(
    ("given", "out"),
    [("s.h5", "s.h5:seg"), ("s.h5:other", "s.h5:in/seg"), ("one.h5", "one.h5:seg"),
     ("g.zarr:raw", "g.zarr:seg"), ("g.zarr/raw", "g.zarr:seg"), ("g.zarr:raw", "linked.zarr:seg"),
     ("s.h5:main", "linked.zarr"), ("im.ome.zarr", "im.ome.zarr:labels/seg")],
    ids=str,
)  # fmt: skip
def test_another_dataset_of_the_input_may_be_written_and_written_again(
    run: Run, inputs: Path, given: str, out: str
) -> None:
    before = read_array(given)
    for _ in range(2 if given != "one.h5" else 1):  # of two datasets one must be named
        code, _, err = run("decode", "--probabilities", given, "--out", out)
        assert code == 0, err
    kept = "one.h5:raw" if given == "one.h5" else given
    np.testing.assert_array_equal(read_array(kept), before)
    assert read_array(out).shape == before.shape[1:]


@pytest.mark.parametrize(
    "words",
    [("--out", "new.h5", "--neuroglancer", "view"),
     ("--out", "new/truth.precomputed", "--neuroglancer", "new"),
     ("--out", "new.zarr", "--neuroglancer", "new.zarr"),
     ("--out", "new.h5", "--table", "g.zarr/t.csv"),
     ("--out", "new.zarr", "--table", "new.zarr/t.csv"),
     ("--out", "new.h5", "--label", "view/image.precomputed", "--neuroglancer", "view")],
    ids=" ".join,
)  # fmt: skip
def test_table_and_view_replace_neither_inputs_nor_labels(
    run: Run, inputs: Path, words: tuple[str, ...]
) -> None:
    before = content(inputs)
    one_error(run("segment", ".", "--image", "g.zarr:raw", *words))
    assert content(inputs) == before


@pytest.mark.parametrize(
    "words",
    [("import", "a.yaml", "--out", "link/a.yaml"),
     ("import", "a.yaml", "--out", "b.yaml", "--space", "./b.yaml"),
     ("sweep", "--probabilities", "s.h5", "--label", "s.h5", "--space", "a.yaml", "--out",
      "link/a.yaml"),
     ("inspect", "--image", "s.h5", "--label", "s.h5", "--candidate", "a.yaml", "--propose",
      "./link/a.yaml")],
    ids=lambda words: str(words[0]),
)  # fmt: skip
def test_no_configuration_is_replaced_by_another(
    run: Run, inputs: Path, words: tuple[str, ...]
) -> None:
    Path("a.yaml").write_text("{}")
    before = content(inputs)
    assert "would be lost" in one_error(run(*words))
    assert content(inputs) == before


def test_a_phantom_replaces_a_phantom_but_no_volume_of_the_user(run: Run, tmp_path: Path) -> None:
    words = ["phantom", tmp_path, "--shape", 8, 48, 48, "--instances", 1, "--seed"]
    for seed in (0, 1):
        code, _, err = run(*words, seed)
        assert code == 0, err
    (tmp_path / "label.h5").unlink()
    write(tmp_path / "label.h5", np.ones((8, 48, 48), np.uint8))
    before = content(tmp_path)
    assert "label.h5 is no phantom" in one_error(run(*words, 2))
    assert content(tmp_path) == before


@pytest.mark.parametrize(
    "words",
    [("sweep", "--probabilities", "p.png", "--label", "l.h5", "--out", "p.yaml"),
     ("inspect", "--image", "sections", "--out", "sections"),
     ("inspect", "--image", "g.zarr:raw", "--out", "linked.zarr/sheet"),
     ("train", "smoke", "--image", "sections", "--label", "sections", "--out", "sections/a"),
     ("run", "smoke", "--image", "sections", "--label", "sections", "--out", "sections/a")],
    ids=lambda words: str(words[0]),
)  # fmt: skip
def test_nothing_is_written_into_an_input(run: Run, inputs: Path, words: tuple[str, ...]) -> None:
    shutil.copy("s.h5", "p.png")
    shutil.copy("s.h5", "p.yaml")  # so that the sweep's own check is passed
    before = content(inputs)
    assert "--out" in one_error(run(*words))
    assert content(inputs) == before


@pytest.mark.parametrize("name", ["a/b", "..", "../x", "", " ", "a\nb", "x" * 300])
def test_study_names_that_are_no_folder_are_refused(
    run: Run, volume: dict[str, Path], tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["run", "smoke", "--image", volume["im"], "--label", volume["label"], "--trials", 1]
    assert "--study" in one_error(run(*words, "--study", name))
    assert not list(tmp_path.iterdir())


def test_a_port_that_is_no_number_keeps_the_password(run: Run) -> None:
    url = "postgresql+psycopg://user:topsecret@127.0.0.1:port/db"
    message = one_error(run("status", "--storage", url, "--study", "s"))
    assert "topsecret" not in message


def test_a_pickle_as_checkpoint_is_refused_and_not_run(
    run: Run, volume: dict[str, Path], tmp_path: Path
) -> None:
    hacked, checkpoint = tmp_path / "hacked", tmp_path / "evil.ckpt"

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (hacked,)

    checkpoint.write_bytes(pickle.dumps(Evil()))
    message = one_error(
        run(
            "predict",
            "--checkpoint",
            checkpoint,
            "--image",
            volume["im"],
            "--out",
            tmp_path / "p.h5",
        )
    )
    assert "evil.ckpt" in message
    assert "weights_only" not in message, "torch's advice would run the pickle"
    assert not hacked.exists()


@pytest.mark.parametrize("kind", ["2-D", "4-D", "NaN", "missing", "truncated"])
def test_predict_refuses_a_wrong_image(
    run: Run, volume: dict[str, Path], tmp_path: Path, kind: str, checkpoint: Path
) -> None:
    options, word = bad_volume(kind, tmp_path, volume)
    out = tmp_path / "p.h5"
    message = one_error(
        run("predict", "--checkpoint", checkpoint, "--image", options["image"], "--out", out)
    )
    assert word in message
    assert not out.exists()


def test_predict_refuses_settings_that_the_checkpoint_fixes(
    run: Run, volume: dict[str, Path], tmp_path: Path, checkpoint: Path
) -> None:
    words = ["predict", "--checkpoint", checkpoint, "--image", volume["im"], "--out"]
    message = one_error(run(*words, tmp_path / "p.h5", "--set", "model.filters=[3,3]"))
    assert "'model' is fixed" in message
    assert "would be lost" in one_error(run(*words, volume["im"]))


def test_a_phantom_too_large_for_any_memory_is_refused_at_once(run: Run, tmp_path: Path) -> None:
    shape = ["--shape", "999999", "999999", "999999"]
    assert "voxels" in one_error(run("phantom", tmp_path / "x", *shape))
    assert "--seed" in one_error(run("phantom", tmp_path / "x", "--seed", "-1"))


def test_what_nobody_expected_is_told_in_one_line(
    run: Run, volume: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr("hydralv_tune.numerics.metrics.scores.score", fail)
    code, out, err = run("score", "--prediction", volume["label"], "--label", volume["label"])
    assert (code, out) == (1, "")
    assert err.startswith("error: RuntimeError: first line")
    assert err.count("\n") == 1
    assert "HYDRALV_TUNE_TRACEBACK" in err


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--gpus-per-trial", "999"], "999 GPUs"),
        (["--gpus-per-trial", "nan"], "--gpus-per-trial"),
        (["--cpus-per-trial", "999"], "999 CPU cores"),
        (["--ray-address", "127.0.0.1:9"], "127.0.0.1:9"),
        (["--ray-address", "nonsense"], "--ray-address nonsense"),
        (["--warm-start-from", "nosuch"], "--warm-start-from nosuch"),
        (["--storage", "sqlite:////sys/study.db"], "/sys"),
        (["--storage", "sqlite:///file::memory:?uri=true"], "names no file"),
        (["--storage", "postgresql+asyncpg://u:p@h/d"], "postgresql+psycopg://"),
    ],
)
def test_a_run_that_cannot_start_is_refused_before_the_study_is_made(
    run: Run,
    volume: dict[str, Path],
    tmp_path: Path,
    options: list[str],
    word: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "out"
    message = one_error(
        run(
            "run", "smoke", "--image", volume["im"], "--label", volume["label"], "--out", out,
            "--set", "data.patch_size=[12,64,64]", *options,
        )
    )  # fmt: skip
    assert word in message
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def tiny(finished_study: Any, tmp_path: Path) -> Path:
    """Return the folder of a finished study that a test may spoil, with its space in `tiny.yaml`.

    It is as before there were marks in the folders of studies.
    """
    folder = tmp_path / "tiny"
    shutil.copytree(finished_study.folder, folder)
    study = Study.open(
        f"sqlite:///{folder / 'study.db'}",
        "tiny",
        space=open_readonly(finished_study.storage, "tiny").space,
        create=True,
    )
    study.remember("out", str(folder))
    (folder / "tiny.yaml").write_text(yaml.safe_dump(study.space.as_mapping()))
    study.close()
    return folder


def test_a_refused_run_leaves_its_study_as_it_was(
    run: Run, tiny: Path, volume: dict[str, Path], tmp_path: Path
) -> None:
    storage = ["--storage", f"sqlite:///{tiny / 'study.db'}"]
    data = [word for n in ("im", "label", "mask") for word in (FLAGS[n], tiny / f"{n}.h5")]
    other = [word for n in ("im", "label", "mask") for word in (FLAGS[n], volume[n])]
    command = ["run", tiny / "tiny.yaml", *storage, "--trials", 3, "--study", "tiny"]
    code, first, err = run(*command, *data, "--out", tiny, "--json")
    assert code == 0, err
    assert json.loads(first)["best_config"] is not None
    database = (tiny / "study.db").read_bytes()
    elsewhere = tmp_path / "elsewhere"
    assert "other volumes" in one_error(run(*command, *other, "--out", tiny))
    assert f"--out {tiny}" in one_error(run(*command, *data, "--out", elsewhere))
    assert f"--out {tiny}" in one_error(run(*command, *other, "--out", elsewhere))
    command[-1] = "second"
    assert "belongs to study 'tiny'" in one_error(run(*command, *data, "--out", tiny))
    assert not elsewhere.exists()
    assert (tiny / "study.db").read_bytes() == database
    assert json.loads(run("status", *storage, "--study", "tiny", "--json")[1]) == json.loads(first)


def readable_by_all(process: psutil.Process) -> str:
    """Return the command line of a process, and the environment that its children got."""
    lines = [" ".join(process.cmdline())]
    for child in process.children(True):
        with suppress(psutil.Error):  # some of Ray's helpers end at once
            if child.cmdline() == process.cmdline():
                continue  # forked a moment ago, and not its own program yet
            lines.append(" ".join((*child.cmdline(), *child.environ().values())))
    return "\n".join(lines)


@pytest.mark.slow
def test_a_password_on_the_command_line_does_not_stay_there(
    postgres: Any, volume: dict[str, Path], tmp_path: Path
) -> None:
    url = postgres.new_database().replace("postgres:@", "postgres:topsecret@")
    assert "topsecret" in url
    words = [
        "run", "smoke", "--image", volume["im"], "--label", volume["label"], "--out", tmp_path,
        "--storage", url, "--set", "data.patch_size=[12,64,64]", "--trials", 1,
    ]  # fmt: skip
    process = psutil.Popen(
        [sys.executable, "-m", "hydralv_tune", *map(str, words)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment(),
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while len(process.children(True)) < 4:  # Ray's daemons and a worker
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.2)
        seen = readable_by_all(process)
        assert "--storage postgresql+psycopg://postgres:***@" in seen
        assert "topsecret" not in seen
    finally:
        process.terminate()
        said = process.communicate(timeout=120)[0]
    assert "topsecret" not in said
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in written if b"topsecret" in path.read_bytes()]


@pytest.mark.parametrize("name", MARKUP)
def test_a_name_that_looks_like_markup_is_told_as_it_is(
    run: Run,
    volume: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    storage = f"sqlite:///{tmp_path / 'study.db'}"
    Study.open(storage, name, space=load_space("smoke"), create=True).close()
    target = f"{name}/seg.h5"
    for words, told in (
        (["decode", "--probabilities", volume["p"], "--out", target], f"out{target}"),
        (["score", "--prediction", target, "--label", volume["label"]], f"{target}against"),
        (["status", "--storage", storage, "--study", name], f"Study{name}"),
    ):
        code, out, err = run(*words)
        assert code == 0, err
        # Long titles and cells are broken over lines.
        assert told.replace(" ", "") in "".join(out.split())


@pytest.mark.parametrize("kind", [kind for kind in Kind if kind is not Kind.studies])
def test_every_table_that_can_be_listed_has_entries(
    kind: Kind, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(["list", kind.value, "--json"]) == 0
    items = json.loads(capsys.readouterr().out)["items"]
    assert len(items) > 1
    assert all(item["name"] and item["kind"] == kind for item in items)
