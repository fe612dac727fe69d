"""The straight line, as a user walks it: phantom, study, export, prediction, sweep, score."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import pytest
import yaml

from hydralv_tune.artifacts.checkpoint_store import CheckpointStore
from hydralv_tune.data.volumes import open_lazy, read_labels, read_mask, write_array
from hydralv_tune.numerics.metrics.contingency import contingency_table
from hydralv_tune.numerics.metrics.instance_errors import truth_kinds
from hydralv_tune.numerics.phantom.volume import make_phantom

pytestmark = pytest.mark.timeout(900)
PHANTOM = ("--shape", "16", "96", "96", "--instances", "6", "--seed", "3")
QUICK = (
    "--set=optimization.max_epochs=4",
    "--set=data.iter_num_per_epoch=24",
    "--set=monitor.evaluation.count=2",
    "--set=data.patch_size=[16,32,32]",
)


def hydralv(*words: object, cwd: Path) -> dict[str, Any]:
    """Run one command in a process of its own and return its JSON document."""
    result = subprocess.run(
        [sys.executable, "-m", "hydralv_tune", *[str(word) for word in words], "--json"],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "NO_COLOR": "1"},
        timeout=560,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a small phantom in it."""
    path = tmp_path_factory.mktemp("main_job")
    document = hydralv("phantom", "phantom", *PHANTOM, cwd=path)
    assert document["instances"] == 6
    return path


def data(*names: str) -> list[str]:
    """Return the options that name the phantom's volumes."""
    return [word for name in names for word in (f"--{name}", f"phantom/{FILES[name]}")]


FILES = {"image": "im.h5", "label": "label.h5", "mask": "mask.h5"}


@pytest.fixture(scope="module")
def study(folder: Path) -> dict[str, Any]:
    """Return the facts of a study of two trials."""
    return hydralv(
        "run", "smoke", *data("image", "label", "mask"), "--study", "s", "--out", "runs/s",
        "--trials", "2", "--checkpoints", "mirror", *QUICK, cwd=folder,
    )  # fmt: skip


def test_a_study_finishes_with_a_truthful_account(study: dict[str, Any], folder: Path) -> None:
    assert study["study"] == "s"
    assert study["trials"]["complete"] + study["trials"]["pruned"] == 2
    assert study["trials"]["running"] == 0
    assert 0 <= study["best"]["adapted_rand_error"] <= 1
    storage = "sqlite:///runs/s/study.db"
    assert hydralv("status", "--storage", storage, "--study", "s", cwd=folder) == study
    checkpoints = list((folder / "runs" / "s" / "trials").rglob("best.ckpt"))
    assert checkpoints
    for checkpoint in checkpoints:
        CheckpointStore(
            folder / "fetched", str(folder / "mirror"), f"s/{checkpoint.parent.name}"
        ).pull()
        assert (folder / "fetched" / "best.ckpt").read_bytes() == checkpoint.read_bytes()
        shutil.rmtree(folder / "fetched")


def test_continuing_a_finished_study_trains_nothing_more(
    study: dict[str, Any], folder: Path
) -> None:
    again = hydralv(
        "run", "smoke", *data("image", "label", "mask"), "--study", "s", "--out", "runs/s",
        "--trials", "2", *QUICK, cwd=folder,
    )  # fmt: skip
    assert again["trials"] == study["trials"]
    assert again["best"] == study["best"]


def test_the_exported_commands_give_the_score_of_the_study(
    study: dict[str, Any], folder: Path
) -> None:
    exported = hydralv(
        "export", "--storage", "sqlite:///runs/s/study.db", "--study", "s", "--out",
        "best.yaml", cwd=folder,
    )  # fmt: skip
    best = study["best"]
    step = yaml.safe_load((folder / "best.yaml").read_text())["test"]["decoding"][0]
    assert {"name": step["name"], "kwargs": step["kwargs"]} == best["decoding"]
    assert all(shlex.split(command)[0] == "hydralv-tune" for command in exported["commands"])
    hydralv(
        "predict", "--checkpoint", exported["checkpoint"], *data("image"), "--out", "p.h5",
        cwd=folder,
    )  # fmt: skip
    settings = [f"--set={key}={json.dumps(value)}" for key, value in step["kwargs"].items()]
    decoded = hydralv(
        "decode", "--probabilities", "p.h5", *data("mask"), "--out", "seg.h5",
        "--decoder", step["name"], *settings, cwd=folder,
    )  # fmt: skip
    with h5py.File(folder / "seg.h5") as file:
        assert int(file["main"][:].max()) == decoded["instances"]
    scored = hydralv("score", "--prediction", "seg.h5", *data("label", "mask"), cwd=folder)
    for name in ("adapted_rand_error", "adapted_rand_error_foreground", "f1_iou50"):
        assert scored[name] == pytest.approx(best[name], abs=1e-9), name


@pytest.mark.parametrize(
    "best",
    ["runs/s", *(pytest.param(f"exported/best.{suffix}", marks=pytest.mark.slow)
                 for suffix in ("yaml", "ckpt"))],
)  # fmt: skip
def test_segment_gives_the_score_of_the_study(
    study: dict[str, Any], folder: Path, best: str
) -> None:
    (folder / "exported").mkdir(exist_ok=True)
    hydralv("export", "runs/s", "--out", "exported/best.yaml", cwd=folder)
    found = hydralv(
        "segment", best, *data("image", "label", "mask"), "--out", "whole.h5", "--table",
        "whole.csv", "--memory-gb", "4", "--neuroglancer", "view", cwd=folder,
    )  # fmt: skip
    state = json.loads((folder / found["neuroglancer"]).read_text())
    # A truth that is merged and split is one point, and so is each truth of what is merged.
    points: dict[str, list[int]] = {kind: [] for kind in ("missed", "split", "merged", "invented")}
    for layer in state["layers"]:
        for point in layer.get("annotations", ()):
            kind, number = point["description"].split()
            points[kind].append(int(number))
    assert sorted(points["missed"]) == found["missed"]
    assert sorted(points["invented"]) == found["invented"]
    assert set(points["split"]) <= set(found["split"]) <= {*points["split"], *points["merged"]}
    assert len(points["merged"]) >= len(found["merged"])
    compared = contingency_table(
        prediction=read_labels(folder / "whole.h5"),
        truth=read_labels(folder / "phantom/label.h5"),
        mask=read_mask(folder / "phantom/mask.h5"),
    )
    wrong = [kind for kind in truth_kinds(compared).values() if kind != "true"]
    assert sum(map(len, points.values())) == len(wrong) + len(found["invented"])
    for name in ("adapted_rand_error", "adapted_rand_error_foreground", "f1_iou50"):
        assert found[name] == study["best"][name], name
    scored = hydralv("score", "--prediction", "whole.h5", *data("label", "mask"), cwd=folder)
    assert {key: found[key] for key in scored} == scored
    rows = pd.read_csv(folder / "whole.csv")
    assert list(rows["id"]) == list(range(1, found["instances"] + 1))
    with h5py.File(folder / "whole.h5") as file:
        sizes = np.bincount(file["main"][:].ravel())
    assert list(rows["voxels"]) == list(sizes[1:])
    assert set(rows["verdict"]) <= {"true", "split", "merged", "invented"}
    assert (rows["verdict"] == "invented").sum() == len(found["invented"])


def test_training_the_exported_config_again_gives_the_same_error(
    study: dict[str, Any], folder: Path
) -> None:
    hydralv(
        "export", "--storage", "sqlite:///runs/s/study.db", "--study", "s", "--out",
        "again.yaml", cwd=folder,
    )  # fmt: skip
    trained = hydralv(
        "train", "again.yaml", *data("image", "label", "mask"), "--out", "runs/again", cwd=folder
    )
    assert trained["adapted_rand_error"] == pytest.approx(
        study["best"]["adapted_rand_error"], abs=0.01
    )
    assert Path(folder / trained["checkpoint"]).is_file()
    record = json.loads((folder / trained["record"]).read_text())
    assert record["seed"] is not None


@pytest.mark.slow
def test_real_em_runs_through(shared_data: Path, tmp_path: Path) -> None:
    for name in ("im", "label"):  # a corner of it, so that this takes a minute
        with open_lazy(shared_data / "vnc-mito" / f"{name}.h5", ndim=3) as whole:
            write_array(
                tmp_path / f"{name}.h5", whole[:16, :160, :160],
                voxel_size_nm=whole.voxel_size_nm,
            )  # fmt: skip
    document = hydralv(
        "run", "smoke", "--image", "im.h5", "--label", "label.h5", "--study", "mito",
        "--out", "runs/mito", "--trials", "1", *QUICK, cwd=tmp_path,
    )  # fmt: skip
    assert document["trials"]["complete"] == 1
    assert 0 <= document["best"]["adapted_rand_error"] <= 1


@pytest.mark.slow
def test_from_a_precomputed_image_to_a_view_in_neuroglancer(tmp_path: Path) -> None:
    """As a newcomer goes, by commands alone; the volume is as a public archive has it."""
    made = make_phantom((16, 96, 96), instances=6, seed=3)
    for name, array in (("image", made.image), ("label", made.label.astype(np.uint32))):
        write_array(
            tmp_path / f"{name}.precomputed", array, voxel_size_nm=(30, 8, 8),
            origin_nm=(300, 80, 160),
        )  # fmt: skip
    image = f"precomputed://file://{tmp_path}/image.precomputed"
    volume = ["--image", image, "--label", f"precomputed://file://{tmp_path}/label.precomputed"]
    run = hydralv("run", "smoke", *volume, "--study", "n", "--trials", "1", *QUICK, cwd=tmp_path)
    assert run["trials"]["complete"] == 1
    found = hydralv(
        "segment", "runs/n", *volume, "--out", "seg.ome.zarr", "--table", "vesicles.parquet",
        "--neuroglancer", "view", cwd=tmp_path,
    )  # fmt: skip
    assert found["adapted_rand_error"] == run["best"]["adapted_rand_error"]
    assert len(pd.read_parquet(tmp_path / "vesicles.parquet")) == found["instances"]
    with open_lazy(tmp_path / "seg.ome.zarr", ndim=3) as labels:
        assert labels.voxel_size_nm == (30, 8, 8)
        assert labels.origin_nm == (300, 80, 160)
        written = labels[...]
    state = json.loads((tmp_path / found["neuroglancer"]).read_text())
    layers = {layer["name"]: layer for layer in state["layers"]}
    assert {"image", "truth", "segmentation"} <= set(layers)
    for name, array in (("image", made.image), ("truth", made.label), ("segmentation", written)):
        folder = tmp_path / "view" / layers[name]["source"].rpartition("/")[2]
        with open_lazy(folder, ndim=3) as shown:
            assert np.array_equal(shown[...], array), name
            assert shown.origin_nm == (300, 80, 160)
