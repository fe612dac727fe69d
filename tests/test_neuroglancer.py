"""The view of a result: layers, and a point on each instance that is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from hydralv_tune.artifacts.neuroglancer import Point, wrong_instances
from hydralv_tune.data.volumes import open_lazy, read_array, write_array
from hydralv_tune.numerics.metrics.contingency import of_one_volume, slab_tables
from hydralv_tune.results.segmentation_score import assess


def points_on(prediction: np.ndarray, truth: np.ndarray, *masks: Any, **rest: Any) -> list[Point]:
    """Return a point on each wrong instance."""
    tables = list(slab_tables(prediction, truth, *masks, **rest))
    return wrong_instances(prediction, truth, of_one_volume(tables))


def test_wrong_instances_are_found_with_a_voxel_of_their_own() -> None:
    truth, prediction = np.zeros((4, 20, 20), int), np.zeros((4, 20, 20), int)
    truth[:, 2:6, 2:6] = prediction[:, 2:6, 2:6] = 1
    truth[:, 2:6, 12:16] = 5
    prediction[:, 12:16, 2:6] = 9
    points = points_on(prediction, truth)
    assert {(kind, number) for kind, number, _ in points} == {("missed", 5), ("invented", 9)}
    for kind, number, at in points:
        assert (truth if kind == "missed" else prediction)[at] == number


def test_an_instance_over_many_sections_has_one_point_near_its_centre() -> None:
    truth = np.zeros((50, 24, 24), np.uint16)
    # A ring, whose centre lies outside of it.
    truth[:, 4:20, 4:20] = 7
    truth[:, 8:16, 8:16] = 0
    ((kind, number, (z, y, x)),) = points_on(np.zeros_like(truth), truth)
    assert (kind, number, z) == ("missed", 7, 24)
    assert truth[z, y, x] == 7
    voxels = np.argwhere(truth == 7)
    apart = np.linalg.norm(voxels - voxels.mean(0), axis=1)
    assert np.linalg.norm(np.array([z, y, x]) - voxels.mean(0)) == apart.min()


def test_what_lies_outside_the_mask_or_is_ignored_is_no_fault() -> None:
    truth = np.zeros((4, 20, 20), np.int64)
    truth[:, 2:6, 2:6], truth[:, 2:6, 12:16] = 3, 4
    nothing = np.zeros_like(truth)
    left = np.zeros(truth.shape, bool)
    left[:, :, :10] = True
    assert [number for _, number, _ in points_on(nothing, truth, [left])] == [3]
    assert [number for _, number, _ in points_on(nothing, truth, ignore=[3])] == [4]


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_view_has_layers_that_are_read_and_a_state_that_names_them(
    tmp_path: Path, dtype: type
) -> None:
    pytest.importorskip("tensorstore")
    rng = np.random.default_rng(0)
    image = rng.integers(0, 200, (5, 30, 600)).astype(dtype)
    truth = np.zeros(image.shape, np.uint8)
    truth[:, 2:6, 12:16] = 5
    placed = {"voxel_size_nm": (30, 8, 8), "origin_nm": (300, 80, 160)}
    for name, array in (("im", image), ("label", truth), ("seg", truth * 0)):
        write_array(tmp_path / f"{name}.h5", array, **placed)
    assessed = assess(
        tmp_path / "seg.h5", pd.DataFrame({"id": []}), image=str(tmp_path / "im.h5"),
        label=str(tmp_path / "label.h5"), view=tmp_path / "view",
    )  # fmt: skip
    path = assessed.view
    assert path is not None
    assert assessed.figures["missed"] == [5]
    state = json.loads(path.read_text())
    assert state["dimensions"]["z"] == [30e-9, "m"]
    assert [(layer["name"], layer["type"]) for layer in state["layers"]] == [
        ("image", "image"),
        ("truth", "segmentation"),
        ("segmentation", "segmentation"),
        ("wrong instances", "annotation"),
    ]
    (point,) = state["layers"][-1]["annotations"]
    assert point["description"] == "missed 5"
    # Precomputed counts from the origin of the space: 300 / 30, 80 / 8 and 160 / 8 voxels.
    x, y, z = (int(n) for n in point["point"])
    assert truth[z - 10, y - 10, x - 20] == 5
    for layer, written in zip(state["layers"], (image, truth), strict=False):
        place = tmp_path / "view" / layer["source"].rpartition("/")[2]
        information = json.loads((place / "info").read_text())
        assert information["type"] == layer["type"]
        np.testing.assert_array_equal(read_array(place), written)
        # The pyramid: every other voxel in y and x, until a side fits; sections stay.
        (_, *coarse) = information["scales"]
        assert [scale["resolution"] for scale in coarse] == [[16, 16, 30], [32, 32, 30]]
        with open_lazy(f"{place}:{coarse[1]['key']}", ndim=3) as level:
            assert level.voxel_size_nm == (30, 32, 32)
            y0 = round(level.origin_nm[1] / 32) * 4 - 10
            np.testing.assert_array_equal(level[...], written[:, y0::4, ::4])
