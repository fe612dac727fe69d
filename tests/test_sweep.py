"""The sweep equals decode and score, combination by combination."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from hydralv_tune.decoding import decode
from hydralv_tune.metrics import (
    adapted_rand,
    adapted_rand_foreground,
    contingency_table,
    match_instances,
)
from hydralv_tune.sweep import Grid, SweepResult, sweep

CONTOUR = "decode_instance_binary_contour_distance"
DISTANCE = "decode_instance_watershed_distance"
AXES: dict[str, list[Any]] = {
    "binary_threshold.seed": [0.5, 0.9, 0.7],
    "binary_threshold.foreground": [0.7, 0.2, 0.5],
    "contour_threshold.seed": [0.5, 0.8],
    "contour_threshold.foreground": [0.6, None, 13.1],
    "distance_threshold.seed": [0.1, 0.5],
    "distance_threshold.foreground": [-0.5, 0.0],
    "min_seed_size": [1, 8],
    "min_instance_size": [0, 60],
}


def degraded(labels: np.ndarray, seed: int) -> np.ndarray:
    """Return probabilities made of the labels' targets, blurred and noisy."""
    rng = np.random.default_rng(seed)
    binary = (labels > 0).astype(np.float32)
    edge = np.zeros(labels.shape, np.float32)
    for axis in (1, 2):
        differs = np.diff(labels, axis=axis) != 0
        edge += np.pad(differs, [(0, int(a == axis)) for a in range(3)])
    distance = ndimage.distance_transform_edt(binary) / 6
    maps = np.stack([binary, np.minimum(edge, 1), np.where(binary > 0, distance, -1)])
    for channel in range(3):
        noise = ndimage.gaussian_filter(rng.normal(size=labels.shape), 1.5)
        maps[channel] = ndimage.gaussian_filter(maps[channel], 0.7) + noise * 1.5
    return np.clip(maps, np.array([0, 0, -1])[:, None, None, None], 1).astype(np.float16)


def spheres(seed: int = 0, shape: tuple[int, int, int] = (16, 48, 48)) -> np.ndarray:
    """Return labels of touching balls."""
    rng = np.random.default_rng(seed)
    labels = np.zeros(shape, np.int32)
    grid = np.indices(shape)
    for name in range(1, 15):
        centre = [rng.integers(0, side) for side in shape]
        away = sum(((g - c) / s) ** 2 for g, c, s in zip(grid, centre, (3, 6, 6), strict=True))
        labels[(away < 1) & (labels == 0)] = name
    return labels


def agree(result: SweepResult, grid: Grid, maps: Any, truth: Any, mask: Any, count: int) -> None:
    """Compare randomly chosen rows with decode and score."""
    picks = np.random.default_rng(1).permutation(len(result.table))[:count]
    cache: dict[Any, Any] = {}
    for row in result.table.iloc[picks].to_dict("records"):
        arguments: dict[str, Any] = dict(grid.fixed)
        for key in grid.axes:
            name, _, part = str(key).partition(".")
            arguments[name] = (
                [row[f"{name}.seed"], row[f"{name}.foreground"]] if part else int(row[name])
            )
        key = str(arguments)
        if key not in cache:
            labels = decode(grid.decoder, maps, mask, **arguments)
            cache[key] = contingency_table(prediction=labels, truth=truth, mask=mask)
        table = cache[key]
        rand = adapted_rand(table)
        assert row["adapted_rand_error"] == pytest.approx(rand.error, abs=1e-12)
        assert row["adapted_rand_precision"] == pytest.approx(rand.precision, abs=1e-12)
        assert row["adapted_rand_recall"] == pytest.approx(rand.recall, abs=1e-12)
        grown = adapted_rand_foreground(table).error
        assert row["adapted_rand_error_foreground"] == pytest.approx(grown, abs=1e-12)
        assert row["f1_iou50"] == pytest.approx(match_instances(table).f1, abs=1e-12)


@pytest.mark.parametrize("flood", ["support", "volume"])
@pytest.mark.parametrize("masked", [True, False])
def test_sweep_equals_decode_and_score_on_touching_balls(flood: str, masked: bool) -> None:
    truth = spheres()
    maps = degraded(truth, 0)
    mask = np.zeros(truth.shape, bool)
    mask[2:, 5:40, 3:44] = True
    chosen = mask if masked else None
    grid = Grid(CONTOUR, AXES, {"flood": flood})
    result = sweep(maps, truth, chosen, grid)
    assert result.combinations == 3 * 3 * 2 * 3 * 2 * 2 * 2 * 2
    agree(result, grid, maps, truth, chosen, 130)


def test_sweep_of_the_distance_alone_equals_decode_and_score() -> None:
    truth = spheres(3)
    maps = degraded(truth, 3)
    axes = {
        "distance_threshold.seed": [0.3, 0.5, -0.2],
        "distance_threshold.foreground": [0.0, -0.5, 0.2],
        "min_seed_size": [1, 10],
        "min_instance_size": [0, 60],
    }
    grid = Grid(DISTANCE, axes)
    agree(sweep(maps, truth, None, grid), grid, maps, truth, None, 40)


def test_sweep_equals_decode_and_score_on_the_public_vectors(shared_data: Path) -> None:
    vectors = np.load(shared_data / "pytc-decoding" / "vectors.npz")
    maps, truth = vectors["probabilities"], vectors["labels"]
    grid = Grid(CONTOUR, AXES)
    agree(sweep(maps, truth, None, grid), grid, maps, truth, None, 60)


def test_sweep_equals_decode_and_score_on_degraded_hydra(shared_data: Path) -> None:
    with h5py.File(shared_data / "hydra-7-13" / "label.h5") as file:
        truth = file["main"][10:40, 300:600, 300:600].astype(np.int32)
    with h5py.File(shared_data / "hydra-7-13" / "mask.h5") as file:
        mask = file["main"][10:40, 300:600, 300:600] > 0
    maps = degraded(truth, 5)
    grid = Grid(CONTOUR, AXES)
    agree(sweep(maps, truth, mask, grid), grid, maps, truth, mask, 60)


def test_two_volumes_score_as_the_two_side_by_side() -> None:
    one, two = spheres(1), spheres(2)
    maps = [degraded(one, 1), degraded(two, 2)]
    grid = Grid(CONTOUR, {"distance_threshold.seed": [0.1, 0.3], "min_seed_size": [1, 8]})
    result = sweep(maps, [one, two], None, grid)
    for row in result.table.to_dict("records"):
        parts = [
            decode(CONTOUR, m, distance_threshold=[row["distance_threshold.seed"], -0.5],
                   min_seed_size=int(row["min_seed_size"]))
            for m in maps
        ]  # fmt: skip
        joined = np.concatenate([parts[0], np.where(parts[1] > 0, parts[1] + 1000, 0)])
        truth = np.concatenate([one, np.where(two > 0, two + 1000, 0)])
        table = contingency_table(prediction=joined, truth=truth)
        assert row["adapted_rand_error"] == pytest.approx(adapted_rand(table).error, abs=1e-12)


def slow_reference(maps: np.ndarray, seeds: list[float], limits: list[float]) -> np.ndarray:
    """Return labels straight from the definition, one queue, on the whole volume."""
    signs = np.array([1, -1, 1])[:, None, None, None]
    values = maps.astype(np.float64) * signs
    is_seed = (values > np.reshape(seeds, (3, 1, 1, 1)) * signs).all(0)
    labels = ndimage.label(is_seed, np.ones((3, 3, 3)))[0]
    height = -np.maximum(maps[2].astype(np.float64), 0)
    queue = [(height[tuple(v)], i, tuple(v)) for i, v in enumerate(np.argwhere(labels))]
    age = len(queue)
    while queue:
        first = min(queue)
        queue.remove(first)
        for step in ((-1, 0, 0), (0, -1, 0), (0, 0, -1), (0, 0, 1), (0, 1, 0), (1, 0, 0)):
            other = tuple(int(a + b) for a, b in zip(first[2], step, strict=True))
            inside = all(0 <= a < n for a, n in zip(other, labels.shape, strict=True))
            if inside and labels[other] == 0:
                labels[other] = labels[first[2]]
                queue.append((height[other], age, other))
                age += 1
    return np.where((values > np.reshape(limits, (3, 1, 1, 1)) * signs).all(0), labels, 0)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6))
def test_tiny_volumes_equal_a_slow_reference(seed: int) -> None:
    rng = np.random.default_rng(seed)
    shape = (3, *rng.integers(2, 5, 3))
    maps = (rng.integers(0, 5, shape) / 4).astype(np.float32)
    truth = rng.integers(0, 3, shape[1:])
    truth.flat[0] = 1
    axes = {
        "binary_threshold.seed": [0.3, 0.6],
        "binary_threshold.foreground": [0.1, 0.6],
        "contour_threshold.seed": [0.9],
        "contour_threshold.foreground": [0.6, 2.0],
        "distance_threshold.seed": [0.1, 0.6],
        "distance_threshold.foreground": [-0.1, 0.1],
        "min_seed_size": [1],
        "min_instance_size": [0],
    }
    result = sweep(maps, truth, None, Grid(CONTOUR, axes, {"flood": "volume"}), threads=1)
    for row in result.table.to_dict("records"):
        names = ("binary_threshold", "contour_threshold", "distance_threshold")
        labels = slow_reference(
            maps, [row[f"{n}.seed"] for n in names], [row[f"{n}.foreground"] for n in names]
        )
        table = contingency_table(prediction=labels, truth=truth)
        assert row["adapted_rand_error"] == pytest.approx(adapted_rand(table).error, abs=1e-12)
        assert row["f1_iou50"] == pytest.approx(match_instances(table).f1, abs=1e-12)


def test_winner_is_decoded_to_the_score_that_was_said() -> None:
    truth = spheres()
    maps = degraded(truth, 0)
    result = sweep(maps, truth, None, Grid(CONTOUR, AXES, refine=1))
    assert len(result.table) > np.prod([len(v) for v in AXES.values()])
    for point in (result.winner, result.best_by_f1, result.best_unguarded):
        table = contingency_table(prediction=decode(CONTOUR, maps, **point.arguments), truth=truth)
        assert point.metrics["adapted_rand_error"] == pytest.approx(adapted_rand(table).error)
    assert result.winner.metrics["f1_iou50"] >= result.best_by_f1.metrics["f1_iou50"] - 0.05
    assert result.heatmap().shape[0] > 1


def test_no_seed_anywhere_is_error_one() -> None:
    truth = spheres()
    result = sweep(degraded(truth, 0), truth, None, Grid(CONTOUR, {"binary_threshold.seed": [1.0]}))
    assert result.winner.metrics["adapted_rand_error"] == 1.0
    assert result.winner.metrics["instances_predicted"] == 0


def test_time_limit_thins_the_grid_and_says_so() -> None:
    truth = spheres()
    result = sweep(degraded(truth, 0), truth, None, Grid(CONTOUR, AXES), time_limit_s=0.0)
    assert result.combinations < np.prod([len(v) for v in AXES.values()])
    assert result.thinned is not None
    assert str(result.combinations) in result.thinned


@pytest.mark.parametrize(
    ("axes", "reason"),
    [
        ({"binary_threshold.seed": []}, "at least one value"),
        ({"binary_threshold": [0.5]}, "Unknown axis"),
        ({"distance_threshold.seed": [None]}, "finite number"),
        ({"min_seed_size": [-1]}, "voxels from 0"),
        ({"binary_threshold.seed": [float("nan")]}, "finite"),
    ],
)
def test_wrong_grids_are_refused(axes: dict[str, Any], reason: str) -> None:
    truth = spheres()
    with pytest.raises(ValueError, match=reason):
        sweep(degraded(truth, 0), truth, None, Grid(CONTOUR, axes))


def test_label_without_truth_in_the_mask_is_refused() -> None:
    truth = spheres()
    with pytest.raises(ValueError, match="no labelled voxel"):
        sweep(degraded(truth, 0), truth, truth == 0, Grid(CONTOUR, {}))
