"""TensorBoard shows what a candidate trains, not what another might."""

from __future__ import annotations

from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from hydralv_tune.artifacts.tensorboard import HEADER
from hydralv_tune.config.candidate import Data, DecodingGrid
from hydralv_tune.config.files import candidate_from_mapping
from hydralv_tune.config.search_space import Objective
from hydralv_tune.data.volumes import Volume
from hydralv_tune.numerics.targets import derive_targets, instance_edt
from hydralv_tune.trial.run import TrialSpec, run_trial
from hydralv_tune.trial.section_targets import section_targets

NM = (30.0, 8.0, 8.0)


def volume(voxel_size_nm: tuple[float, float, float] | None = NM) -> Volume:
    """Return a volume (9, 24, 32): balls that touch, a cut one, one id in two pieces."""
    label = np.zeros((9, 24, 32), np.uint16)
    grid = np.indices(label.shape)
    centres = [(4, 8, 8), (4, 8, 15), (0, 17, 24), (4, 17, 8), (8, 17, 8)]
    for number, centre in zip((1, 2, 3, 7, 7), centres, strict=True):
        away = sum((g - c) ** 2 * w for g, c, w in zip(grid, centre, (5, 1, 1), strict=True))
        label[(away < 20) & (label == 0)] = number
    image = np.where(label > 0, 190, 80) + np.random.default_rng(0).normal(0, 10, label.shape)
    return Volume("v", image.astype(np.uint8), label, None, voxel_size_nm)


def labels(boundary: dict[str, Any], distance: dict[str, Any], size: str) -> dict[str, Any]:
    """Return a `label_transform`."""
    return {
        "targets": [
            {"name": "binary"},
            {"name": "instance_boundary", "kwargs": boundary},
            {"name": "instance_edt", "kwargs": distance},
        ],
        "edt_voxel_size": size,
    }


LOSS = "loss every 50 steps/total"
CASES = [
    ({}, {}, "unit"),
    ({"thickness": 2, "mode": "3d"}, {"mode": "2d"}, "unit"),
    ({"thickness": 3, "edge_mode": "seg-no-bg"}, {"mode": "3d"}, "volume"),
]


def of_the_whole(
    given: Volume, boundary: dict[str, Any], distance: dict[str, Any], size: str
) -> np.ndarray:
    """Return the targets (3, Z, Y, X) as training derives them of the whole volume."""
    voxel = {"voxel_size_nm": NM} if size == "volume" else {}
    edt = instance_edt(given.label, **distance, **voxel)
    whole = torch.from_numpy(given.label.astype(np.int32))[None]
    return derive_targets(whole, torch.from_numpy(edt)[None], **boundary)[0].numpy()


@pytest.mark.parametrize(("boundary", "distance", "size"), CASES)
def test_the_targets_of_a_section_are_those_of_the_whole_volume(
    boundary: dict[str, Any], distance: dict[str, Any], size: str
) -> None:
    given = volume()
    data = Data.model_validate({"label_transform": labels(boundary, distance, size)})
    whole = of_the_whole(given, boundary, distance, size)
    for z in range(len(given.label)):
        np.testing.assert_array_equal(section_targets(data, given, z), whole[:, z])


def test_a_scored_volume_of_unknown_voxel_size_is_drawn_all_the_same() -> None:
    unknown = volume(voxel_size_nm=None)
    data = Data.model_validate({"label_transform": labels({}, {}, "volume")})
    expected = of_the_whole(unknown, {}, {}, "unit")
    np.testing.assert_array_equal(section_targets(data, unknown, 4), expected[:, 4])


def test_a_trial_shows_image_three_targets_three_maps_and_segments(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    boundary, distance, size = CASES[2]
    chosen = candidate_from_mapping(
        {
            "system": {"training": {"batch_size": 2}},
            "model": {"architecture": "monai_unet", "filters": [4, 8], "num_res_units": 0},
            "data": {"patch_size": [4, 16, 16], "pad_size": [0, 0, 0], "iter_num_per_epoch": 4,
                     "label_transform": labels(boundary, distance, size)},
            "optimization": {"max_epochs": 2, "scheduler": {"warmup_epochs": 0},
                             "accumulate_grad_batches": 1},
            "monitor": {"evaluation": {"count": 2}},
            "inference": {"sliding_window": {"window_size": [4, 16, 16]}},
        },
        place="test",
    )  # fmt: skip
    given = volume()
    run_trial(
        TrialSpec(
            number=0, root=0, candidate=chosen, objective=Objective(), volumes=[], study="s",
            grid=DecodingGrid.model_validate({"grid": {"min_seed_size": [1]}}),
            out=str(tmp_path), device="cpu", threads=1,
        ),
        lambda _: None,
        volumes=[given],
    )  # fmt: skip
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    tags = events.Tags()["images"]
    assert len(tags) == 2
    whole = of_the_whole(given, boundary, distance, size)
    for tag in tags:
        z = int(tag.rpartition("_")[2])
        shown = whole[:, z] * [[[1]], [[1]], [[0.5]]] + [[[0]], [[0]], [[0.5]]]
        steps = events.Images(tag)
        assert [event.step for event in steps] == [2, 4]  # optimizer steps of the evaluations
        for event in steps:
            picture = np.asarray(Image.open(BytesIO(event.encoded_image_string)).convert("L"))
            panels = np.split(picture[HEADER:], 8, axis=1)
            assert picture[:HEADER].any()
            for panel, target in zip(panels[1:4], shown, strict=True):
                np.testing.assert_allclose(panel / 255, target, atol=1 / 255)


def test_losses_come_every_fifty_steps_and_trials_can_be_compared(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    chosen = candidate_from_mapping(
        {
            "system": {"training": {"batch_size": 1}},
            "model": {"architecture": "monai_unet", "filters": [4, 8], "num_res_units": 0},
            "data": {"patch_size": [4, 16, 16], "pad_size": [0, 0, 0], "iter_num_per_epoch": 60},
            "optimization": {"max_epochs": 2, "scheduler": {"warmup_epochs": 0},
                             "accumulate_grad_batches": 1},
            "monitor": {"evaluation": {"count": 1}},
            "inference": {"sliding_window": {"window_size": [4, 16, 16]}},
        },
        place="test",
    )  # fmt: skip
    spec = TrialSpec(
        number=0, root=0, candidate=chosen, objective=Objective(), volumes=[], study="s",
        grid=DecodingGrid.model_validate({"grid": {"min_seed_size": [1]}}),
        out=str(tmp_path), device="cpu", threads=1,
    )  # fmt: skip
    run_trial(spec, lambda _: None, volumes=[volume()])
    # Scored again under another grid, it trains nothing, and hides nothing of what it wrote.
    other = DecodingGrid.model_validate({"grid": {"min_seed_size": [1, 6]}})
    record = run_trial(replace(spec, grid=other), lambda _: None, volumes=[volume()])
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars(LOSS)] == [50, 100]
    first, second = (event.value for event in events.Scalars(LOSS))
    assert second < first
    assert [event.step for event in events.Scalars("score/f1_iou50")] == [120]
    result = events.Scalars("result/f1_iou50")[-1]
    assert result.value == pytest.approx(record.metrics["f1_iou50"])
    compared = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    assert b"optimization.optimizer.lr" in compared
