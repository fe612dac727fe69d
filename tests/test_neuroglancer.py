"""The view of a result: layers, and a point on each instance that is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from hydralv_tune.artifacts.neuroglancer import wrong_instances
from hydralv_tune.data.volumes import write_array

HOW_TO = Path(__file__).parents[1] / "docs" / "howto" / "look-at-the-result.md"


def test_wrong_instances_are_found_with_a_voxel_of_their_own() -> None:
    truth, prediction = np.zeros((4, 20, 20), int), np.zeros((4, 20, 20), int)
    truth[:, 2:6, 2:6] = prediction[:, 2:6, 2:6] = 1
    truth[:, 2:6, 12:16] = 5
    prediction[:, 12:16, 2:6] = 9
    points = wrong_instances(prediction, truth)
    assert {(kind, number) for kind, number, _ in points} == {("missed", 5), ("invented", 9)}
    for kind, number, at in points:
        assert (truth if kind == "missed" else prediction)[at] == number


def test_the_code_of_the_how_to_writes_layers_and_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    truth = np.zeros((4, 20, 20), np.uint16)
    truth[:, 2:6, 12:16] = 5
    for name, array in (("im", truth * 9), ("label", truth), ("seg", truth * 0)):
        write_array(tmp_path / f"{name}.h5", array)
    monkeypatch.chdir(tmp_path)
    exec(HOW_TO.read_text().split("```python\n")[1].split("```")[0], {})
    state = json.loads((tmp_path / "view" / "state.json").read_text())
    assert state["dimensions"]["z"] == [30e-9, "m"]
    assert [layer["type"] for layer in state["layers"]] == [
        "image",
        "segmentation",
        "segmentation",
        "annotation",
    ]
    (point,) = state["layers"][-1]["annotations"]
    assert point["description"] == "missed 5"
    x, y, z = (int(n) for n in point["point"])
    assert truth[z, y, x] == 5
    for layer in state["layers"][:3]:
        name = layer["source"].rpartition("/")[2]
        assert (tmp_path / "view" / name / "info").exists()
