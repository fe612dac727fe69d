"""The sweep equals decode and score, combination by combination, and its rule picks as it says."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from hydralv_tune.artifacts.sweep_figures import draw_heatmap
from hydralv_tune.config.errors import ConfigError
from hydralv_tune.config.search_space import Objective, objective_value
from hydralv_tune.config.validation import validated
from hydralv_tune.numerics.metrics.contingency import ContingencyTable, contingency_table, joined
from hydralv_tune.numerics.metrics.scores import METRICS, Metric
from hydralv_tune.numerics.metrics.scores import score as score_table
from hydralv_tune.numerics.metrics.scores import score_labels as score
from hydralv_tune.numerics.phantom.degradation import degraded_probabilities
from hydralv_tune.numerics.phantom.volume import make_phantom
from hydralv_tune.numerics.watershed.decoders import DECODERS, Decoder, decode, read_arguments
from hydralv_tune.trial.scoring.sweep.grid import checked_axes, count_combinations
from hydralv_tune.trial.scoring.sweep.sweep import Grid, SweepResult, sweep

CONTOUR = "decode_instance_binary_contour_distance"
DISTANCE = "decode_instance_watershed_distance"
NAMES = ("binary_threshold", "contour_threshold", "distance_threshold")
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
DISTANCE_AXES: dict[str, list[Any]] = {
    "distance_threshold.seed": [0.3, 0.5, -0.2],
    "distance_threshold.foreground": [0.0, -0.5, 0.2],
    "min_seed_size": [1, 10],
    "min_instance_size": [0, 60],
}
VOI = SimpleNamespace(metric="voi", guard=SimpleNamespace(f1_below_best=0.05))
Volume = tuple[np.ndarray, np.ndarray, np.ndarray | None]


def spheres(seed: int = 0, shape: tuple[int, int, int] = (12, 40, 40)) -> np.ndarray:
    """Return labels of touching balls."""
    rng = np.random.default_rng(seed)
    labels = np.zeros(shape, np.int32)
    grid = np.indices(shape)
    for name in range(1, 12):
        centre = [rng.integers(0, side) for side in shape]
        away = sum(((g - c) / s) ** 2 for g, c, s in zip(grid, centre, (3, 6, 6), strict=True))
        labels[(away < 1) & (labels == 0)] = name
    return labels


def noisy(seed: int = 0) -> Volume:
    """Return probabilities of balls, with much noise, and the balls."""
    truth = spheres(seed)
    return degraded_probabilities(truth, seed=seed, noise=0.3), truth, None


def phantom() -> Volume:
    made = make_phantom(shape=(18, 80, 80), instances=8, seed=1)
    return degraded_probabilities(made.label, seed=1, noise=0.25), made.label, made.mask


def hydra(shared_data: Path) -> Volume:
    here = np.s_[20:36, 340:460, 380:500]
    with h5py.File(shared_data / "hydra-7-13" / "label.h5") as file:
        truth = file["main"][here].astype(np.int32)
    with h5py.File(shared_data / "hydra-7-13" / "mask.h5") as file:
        mask = file["main"][here] > 0
    return degraded_probabilities(truth, seed=2, noise=0.2), truth, mask


def public(shared_data: Path) -> Volume:
    vectors = np.load(shared_data / "pytc-decoding" / "vectors.npz")
    here = np.s_[:18, :110, :110]
    return vectors["probabilities"][:, *here], vectors["labels"][here], None


def arguments_of(row: dict[str, Any], grid: Grid) -> dict[str, Any]:
    """Return the decoder's arguments of one row of the table."""
    arguments: dict[str, Any] = dict(grid.fixed)
    for key in checked_axes(grid):
        name, _, part = key.partition(".")
        arguments[name] = (
            [row[f"{name}.seed"], row[f"{name}.foreground"]] if part else int(row[name])
        )
    return arguments


def assert_equal_to_decode_and_score(grid: Grid, volume: Volume, picks: int, seed: int = 1) -> int:
    """Compare rows of a sweep, chosen at random, with decode and score; return how many."""
    maps, truth, mask = volume
    result = sweep(maps, truth, mask, grid, objective=VOI, threads=2)
    assert result.combinations == count_combinations(checked_axes(grid))
    chosen = np.random.default_rng(seed).permutation(result.combinations)[:picks]
    for row in result.table.iloc[chosen].to_dict("records"):
        labels = decode(grid.decoder, maps, mask, **arguments_of(row, grid))
        wanted = score(prediction=labels, truth=truth, mask=mask).as_dict()
        for key in (
            "adapted_rand_error", "adapted_rand_error_foreground", "adapted_rand_precision",
            "adapted_rand_recall", "f1_iou50", "voi_split", "voi_merge", "instances_predicted",
            "matched_iou50",
        ):  # fmt: skip
            assert row[key] == pytest.approx(wanted[key], abs=1e-12), (key, row)
    return len(chosen)


@pytest.mark.parametrize("flood", ["support", "volume"])
def test_sweep_equals_decode_and_score_on_a_phantom(flood: str) -> None:
    grid = Grid(CONTOUR, AXES, {"flood": flood})
    assert assert_equal_to_decode_and_score(grid, phantom(), 100) == 100


@pytest.mark.parametrize("flood", ["support", "volume"])
def test_sweep_equals_decode_and_score_on_degraded_hydra(shared_data: Path, flood: str) -> None:
    grid = Grid(CONTOUR, AXES, {"flood": flood})
    assert assert_equal_to_decode_and_score(grid, hydra(shared_data), 100) == 100


@pytest.mark.parametrize("flood", ["support", "volume"])
def test_sweep_equals_decode_and_score_on_the_public_vectors(shared_data: Path, flood: str) -> None:
    grid = Grid(CONTOUR, AXES, {"flood": flood})
    assert assert_equal_to_decode_and_score(grid, public(shared_data), 100) == 100


@pytest.mark.parametrize("masked", [True, False])
def test_sweep_of_the_distance_alone_equals_decode_and_score(masked: bool) -> None:
    maps, truth, _ = noisy(3)
    mask = np.zeros(truth.shape, bool)
    mask[2:, 5:35, 3:38] = True
    volume = (maps, truth, mask if masked else None)
    assert assert_equal_to_decode_and_score(Grid(DISTANCE, DISTANCE_AXES), volume, 36) == 36


@pytest.mark.parametrize("flood", ["support", "volume"])
def test_sweep_of_split_instances_equals_decode_and_score(shared_data: Path, flood: str) -> None:
    grid = Grid(CONTOUR, AXES, {"flood": flood, "split_components": True})
    volume = hydra(shared_data)
    assert assert_equal_to_decode_and_score(grid, volume, 60) == 60
    apart, whole = (
        sweep(*volume, Grid(CONTOUR, AXES, {"flood": flood, "split_components": on})).table
        for on in (True, False)
    )
    assert (apart.instances_predicted > whole.instances_predicted).any()
    quality = SimpleNamespace(metric="pq", guard=VOI.guard)
    axes = {"binary_threshold.foreground": [0.2, 0.5], "min_instance_size": [0, 60]}
    grid = Grid(CONTOUR, axes, {"flood": flood, "split_components": True})
    for row in sweep(*volume, grid, objective=quality).table.to_dict("records"):
        labels = decode(CONTOUR, volume[0], volume[2], **arguments_of(row, grid))
        wanted = score(prediction=labels, truth=volume[1], mask=volume[2]).as_dict()
        assert row["pq"] == pytest.approx(wanted["pq"], abs=1e-12)
    grid = Grid(DISTANCE, DISTANCE_AXES, {"split_components": True})
    assert assert_equal_to_decode_and_score(grid, noisy(3), 36) == 36


def test_two_volumes_score_as_the_two_side_by_side() -> None:
    maps, truths, _ = zip(noisy(1), noisy(2), strict=True)
    grid = Grid(CONTOUR, {"distance_threshold.seed": [0.1, 0.3], "min_seed_size": [1, 8]})
    result = sweep(maps, truths, None, grid, objective=VOI)
    joined = np.concatenate([truths[0], np.where(truths[1] > 0, truths[1] + 1000, 0)])
    for row in result.table.to_dict("records"):
        one, two = (decode(CONTOUR, m, **arguments_of(row, grid)) for m in maps)
        wanted = score(
            prediction=np.concatenate([one, np.where(two > 0, two + 1000, 0)]), truth=joined
        ).as_dict()
        for key in ("adapted_rand_error", "adapted_rand_error_foreground", "f1_iou50", "voi_merge"):
            assert row[key] == pytest.approx(wanted[key], abs=1e-12)


def slow_decode(
    maps: np.ndarray, seeds: list[float], limits: list[float], domain: np.ndarray,
    sizes: tuple[int, int],
) -> np.ndarray:  # fmt: skip
    """Return labels straight from the definition: one queue, sorted anew at every step."""
    signs = np.array([1, -1, 1])[:, None, None, None]
    values = maps.astype(np.float64) * signs
    is_seed = domain & (values > np.reshape(seeds, (3, 1, 1, 1)) * signs).all(0)
    labels = ndimage.label(is_seed, np.ones((3, 3, 3)))[0]
    for name in range(1, labels.max() + 1):
        if np.count_nonzero(labels == name) < sizes[0]:
            labels[labels == name] = 0
    height = -np.maximum(maps[2].astype(np.float64), 0)
    queue = [(height[tuple(v)], i, tuple(v)) for i, v in enumerate(np.argwhere(labels))]
    age = len(queue)
    while queue:
        first = min(queue)
        queue.remove(first)
        for step in ((-1, 0, 0), (0, -1, 0), (0, 0, -1), (0, 0, 1), (0, 1, 0), (1, 0, 0)):
            other = tuple(int(a + b) for a, b in zip(first[2], step, strict=True))
            inside = all(0 <= a < n for a, n in zip(other, labels.shape, strict=True))
            if inside and domain[other] and labels[other] == 0:
                labels[other] = labels[first[2]]
                queue.append((height[other], age, other))
                age += 1
    labels = np.where((values > np.reshape(limits, (3, 1, 1, 1)) * signs).all(0), labels, 0)
    for name in range(1, labels.max() + 1):
        if np.count_nonzero(labels == name) < sizes[1]:
            labels[labels == name] = 0
    return labels


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(["volume", "support"]), st.booleans())
def test_tiny_volumes_equal_a_slow_reference(seed: int, flood: str, masked: bool) -> None:
    rng = np.random.default_rng(seed)
    shape = (3, *rng.integers(2, 5, 3))
    maps = (rng.integers(0, 5, shape) / 4).astype(np.float32)
    maps[2] = rng.integers(-2, 4, shape[1:]) / 3
    truth = rng.integers(0, 3, shape[1:])
    truth.flat[0] = 1
    mask = rng.random(shape[1:]) < 0.8 if masked else np.ones(shape[1:], bool)
    mask.flat[0] = True
    domain = mask & ((maps[0] > 0.3) | (maps[2] > 0)) if flood == "support" else mask
    axes = {
        "binary_threshold.seed": [0.3, 0.6],
        "binary_threshold.foreground": [0.1, 0.6],
        "contour_threshold.seed": [0.9, None],
        "contour_threshold.foreground": [0.6, 2.0],
        "distance_threshold.seed": [-0.5, 0.4],
        "distance_threshold.foreground": [-0.5, 0.1],
        "min_seed_size": [0, 2],
        "min_instance_size": [0, 3],
    }
    grid = Grid(CONTOUR, axes, {"flood": flood, "floor": 0.3})
    table = sweep(maps, truth, mask if masked else None, grid, threads=1).table
    for row in table.sample(12, random_state=seed).to_dict("records"):
        labels = slow_decode(
            maps, [row[f"{n}.seed"] for n in NAMES], [row[f"{n}.foreground"] for n in NAMES],
            domain, (row["min_seed_size"], row["min_instance_size"]),
        )  # fmt: skip
        wanted = score(prediction=labels, truth=truth, mask=mask).as_dict()
        for key in ("adapted_rand_error", "adapted_rand_error_foreground", "f1_iou50"):
            assert row[key] == pytest.approx(wanted[key], abs=1e-12)


def test_winner_decodes_to_the_score_that_was_said() -> None:
    maps, truth, _ = noisy()
    result = sweep(maps, truth, None, Grid(CONTOUR, AXES, refine=2))
    for one in (result.winner, result.best_by_f1, result.best_unguarded):
        labels = decode(CONTOUR, maps, **one.arguments)
        assert one.metrics["adapted_rand_error"] == pytest.approx(
            score(prediction=labels, truth=truth).adapted_rand_error, abs=1e-12
        )
    assert result.winner.metrics["f1_iou50"] >= result.best_by_f1.metrics["f1_iou50"] - 0.05
    assert (
        result.best_unguarded.metrics["adapted_rand_error"] == result.table.adapted_rand_error.min()
    )
    json.dumps(result.as_mapping(), allow_nan=False)


def test_refinement_adds_combinations_and_never_loses() -> None:
    maps, truth, _ = noisy()
    coarse = sweep(maps, truth, None, Grid(CONTOUR, AXES))
    fine = sweep(maps, truth, None, Grid(CONTOUR, AXES, refine=2))
    assert fine.combinations > coarse.combinations
    assert not fine.table.duplicated(list(fine.axes)).any()
    within = fine.table[fine.table.within_guard]
    assert within.adapted_rand_error.min() <= coarse.winner.metrics["adapted_rand_error"]
    assert fine.best_by_f1.metrics["f1_iou50"] >= coarse.best_by_f1.metrics["f1_iou50"]


def test_threads_do_not_change_the_table() -> None:
    maps, truth, _ = noisy()
    one, many = (sweep(maps, truth, None, Grid(CONTOUR, AXES), threads=n).table for n in (1, 4))
    pd.testing.assert_frame_equal(one, many)


def test_voi_is_a_metric_like_the_others() -> None:
    maps, truth, _ = noisy()
    result = sweep(maps, truth, None, Grid(CONTOUR, AXES), objective=VOI)
    within = result.table[result.table.within_guard]
    assert result.winner.metrics["voi"] <= within.voi.min() + 0.002
    labels = decode(CONTOUR, maps, **result.winner.arguments)
    wanted = score(prediction=labels, truth=truth)
    assert result.winner.metrics["voi"] == pytest.approx(wanted.voi_split + wanted.voi_merge)


def test_no_seed_anywhere_is_error_one() -> None:
    maps, truth, _ = noisy()
    result = sweep(maps, truth, None, Grid(CONTOUR, {"binary_threshold.seed": [1.0]}))
    assert result.winner.metrics["adapted_rand_error"] == 1.0
    assert result.winner.metrics["instances_predicted"] == 0
    assert result.winner.metrics["f1_iou50"] == 0.0


def test_time_limit_of_nothing_leaves_one_flood_and_says_so() -> None:
    maps, truth, _ = noisy()
    result = sweep(maps, truth, None, Grid(CONTOUR, AXES, refine=1), time_limit_s=0.0)
    whole = count_combinations(checked_axes(Grid(CONTOUR, AXES)))
    assert result.combinations == 3 * 3 * 2 * 2
    assert result.thinned is not None
    assert f"{result.combinations:,} of {whole:,} combinations" in result.thinned
    assert "1 rounds of refinement left out" in result.thinned
    labels = decode(CONTOUR, maps, **result.winner.arguments)
    wanted = score(prediction=labels, truth=truth).adapted_rand_error
    assert result.winner.metrics["adapted_rand_error"] == pytest.approx(wanted, abs=1e-12)


def test_limited_sweep_ends_near_its_limit() -> None:
    maps, truth, _ = noisy()
    many = np.linspace(0.05, 0.95, 12).tolist()
    axes = {f"{name}.seed": many for name in NAMES} | {"min_seed_size": [1, 2, 4, 8]}
    sweep(maps, truth, None, Grid(CONTOUR, {}))
    start = time.perf_counter()
    result = sweep(maps, truth, None, Grid(CONTOUR, axes), time_limit_s=0.4, threads=1)
    assert time.perf_counter() - start < 2.0
    assert result.thinned is not None
    assert result.combinations > 1


def test_ample_time_thins_nothing() -> None:
    maps, truth, _ = noisy()
    free = sweep(maps, truth, None, Grid(CONTOUR, AXES)).table
    limited = sweep(maps, truth, None, Grid(CONTOUR, AXES), time_limit_s=600.0)
    assert limited.thinned is None
    pd.testing.assert_frame_equal(free, limited.table)


def test_input_is_left_alone() -> None:
    maps, truth, _ = noisy()
    before = maps.copy(), truth.copy()
    sweep(maps, truth, None, Grid(CONTOUR, {"min_seed_size": [1, 8]}))
    assert np.array_equal(maps, before[0])
    assert np.array_equal(truth, before[1])


@pytest.mark.parametrize(
    ("axes", "reason"),
    [
        ({"binary_threshold.seed": []}, "at least one value"),
        ({"binary_threshold": [0.5]}, "Unknown axis"),
        ({"distance_threshold.seed": [None]}, "finite number"),
        ({"min_seed_size": [-1]}, "voxels from 0"),
        ({"min_seed_size": [1.5]}, "voxels from 0"),
        ({"binary_threshold.seed": [float("nan")]}, "finite"),
        ({"binary_threshold.seed": 0.5}, "at least one value"),
        ({name: list(range(200)) for name in ("min_seed_size", "min_instance_size")}
         | {"binary_threshold.seed": np.linspace(0, 1, 100).tolist()}, "is the most"),
    ],
)  # fmt: skip
def test_wrong_grids_are_refused(axes: dict[str, Any], reason: str) -> None:
    maps, truth, _ = noisy()
    with pytest.raises(ValueError, match=reason):
        sweep(maps, truth, None, Grid(CONTOUR, axes))


@pytest.mark.parametrize(
    ("fixed", "reason"),
    [
        ({"binary_threshold": [0.5]}, "pair"),
        ({"threshold": 0.5}, "Unknown argument"),
        ({"flood": "river"}, "Unknown flood"),
        ({"floor": 2.0}, "probability"),
    ],
)
def test_wrong_fixed_arguments_are_refused(fixed: dict[str, Any], reason: str) -> None:
    maps, truth, _ = noisy()
    with pytest.raises(ValueError, match=reason):
        sweep(maps, truth, None, Grid(CONTOUR, {}, fixed))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m, t: (m[:2], t, None), r"\(3, Z, Y, X\)"),
        (lambda m, t: (m * np.float16(4), t, None), "range"),
        (lambda m, t: (np.where(m > 0.9, np.nan, m), t, None), "not finite"),
        (lambda m, t: (m.astype(np.int32), t, None), "dtype"),
        (lambda m, t: (m, t[1:], None), "label has shape"),
        (lambda m, t: (m, t.astype(float), None), "integers"),
        (lambda m, t: (m, t, t == 0), "no labelled voxel"),
        (lambda m, t: (m, t, np.zeros(t.shape)), "no valid voxel"),
        (lambda m, t: (m, t, np.ones((2, 2, 2))), "mask has shape"),
        (lambda m, t: ([m, m], [t], None), "same number of each"),
        (lambda m, t: ([m, m], [t, np.zeros_like(t)], None), "volume 2 of 2"),
    ],
)
def test_wrong_input_is_refused(change: Callable[..., Any], reason: str) -> None:
    maps, truth, _ = noisy()
    with pytest.raises(ValueError, match=reason):
        sweep(*change(maps, truth), Grid(CONTOUR, {}))


def test_wrong_settings_are_refused() -> None:
    maps, truth, _ = noisy()
    with pytest.raises(ValueError, match="must be at least 1"):
        sweep(maps, truth, None, Grid(CONTOUR, {}), threads=0)
    with pytest.raises(ValueError, match="0 or more seconds"):
        sweep(maps, truth, None, Grid(CONTOUR, {}), time_limit_s=float("nan"))
    with pytest.raises(ValueError, match="Unknown metric"):
        sweep(maps, truth, None, Grid(CONTOUR, {}), objective=SimpleNamespace(metric="accuracy"))


def swept() -> SweepResult:
    maps, truth, _ = noisy()
    return sweep(maps, truth, None, Grid(CONTOUR, AXES))


def test_best_rows_are_distinct_outcomes_and_begin_with_the_winner() -> None:
    result = swept()
    rows = result.best_rows(10)
    assert len(rows) == 10
    assert rows[0]["error"] == result.winner.metrics["adapted_rand_error"]
    assert rows[0]["found"] == result.winner.metrics["instances_predicted"]
    outcomes = [(row["error"], row["foreground"], row["f1"], row["found"]) for row in rows]
    assert len(set(outcomes)) == 10
    assert sum(row["alike"] for row in result.best_rows(10**6)) == result.combinations


def test_heatmap_is_a_picture_that_holds_the_winners_error(tmp_path: Path) -> None:
    result = swept()
    assert np.isclose(
        result.heatmap().to_numpy(), result.winner.metrics["adapted_rand_error"]
    ).any()
    path = draw_heatmap(result, tmp_path / "sweep.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 10_000


MEMORY = """
import numpy as np
from hydralv_tune.trial.scoring.sweep.sweep import Grid, sweep
maps = np.zeros((3, 51, 516, 516), np.float16)
maps[2] = -1
truth = np.zeros((51, 516, 516), np.uint16)
rng = np.random.default_rng(0)
for name, (z, y, x) in enumerate(rng.integers(4, (47, 500, 500), (51, 3)), 1):
    blob = np.s_[z - 4 : z + 4, y - 4 : y + 8, x - 4 : x + 8]
    truth[blob] = name
    maps[0][blob] = 0.9
    maps[2][blob] = rng.random((8, 12, 12))
far = rng.random(truth.shape, np.float32) < 1e-4
maps[0][far] = 0.8
maps[2][far] = -0.1
axes = {"distance_threshold.seed": [0.5, 0.7], "distance_threshold.foreground": [-0.5, 0.0]}
result = sweep(maps, truth, None, Grid(
    "decode_instance_binary_contour_distance", axes, {"flood": "volume"}))
assert result.combinations == 4
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(int(peak.split()[1]) / 1024)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_memory_stays_under_1_gb_on_the_plans_volume_without_a_mask() -> None:
    done = subprocess.run(
        [sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True, timeout=200
    )
    assert float(done.stdout) < 1000


def threshold_and_label(
    maps: np.ndarray, mask: np.ndarray | None = None, *, level: float = 0.5, min_size: int = 0
) -> np.ndarray:
    """Return the connected components of the binary map above a level."""
    inside = maps[0] > level if mask is None else (maps[0] > level) & (mask > 0)
    labels = ndimage.label(inside)[0]
    sizes = np.bincount(labels.ravel())
    return np.where(sizes[labels] >= min_size, labels, 0).astype(np.int32)


def test_decoder_without_a_sweep_form_is_decoded_for_each_combination(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    entry = Decoder(threshold_and_label, read_arguments(threshold_and_label))
    monkeypatch.setitem(DECODERS, "threshold_and_label", entry)
    maps, truths, _ = zip(noisy(1), noisy(2), strict=True)
    grid = Grid("threshold_and_label", {"level": [0.4, 0.55, 0.7], "min_size": [0, 40]}, refine=1)
    result = sweep(maps, truths, None, grid, objective=VOI)
    assert result.note is not None
    assert "no sweep form" in result.note
    assert result.winner.arguments.keys() == {"level", "min_size"}
    assert isinstance(result.winner.arguments["min_size"], int)
    assert result.combinations > 6
    for row in result.table.to_dict("records"):
        wanted = score_table(
            joined([
                contingency_table(
                    prediction=threshold_and_label(
                        one, level=row["level"], min_size=int(row["min_size"])
                    ),
                    truth=truth,
                )
                for one, truth in zip(maps, truths, strict=True)
            ])
        )  # fmt: skip
        for name in ("adapted_rand_error", "adapted_rand_error_foreground", "f1_iou50", "voi"):
            assert row[name] == pytest.approx(getattr(wanted, name), abs=1e-12)
    limited = sweep(maps, truths, None, grid, time_limit_s=0.0)
    assert limited.combinations == 1


def test_registered_metric_is_an_objective_like_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def largest(table: ContingencyTable) -> float:
        """Return the size of the largest segment: a figure of one table alone."""
        return float(table.segment_sizes.max()) if len(table.segment_ids) else 0.0

    monkeypatch.setitem(METRICS, "largest", Metric("largest", "largest segment", "lower", largest))
    objective = Objective(metric="largest")
    maps, truths, _ = zip(noisy(1), noisy(2), strict=True)
    axes = {"distance_threshold.seed": [0.1, 0.5], "binary_threshold.foreground": [0.3, 0.7]}
    result = sweep(maps, truths, None, Grid(CONTOUR, axes), objective=objective)
    for row in result.table.to_dict("records"):
        sizes = [
            np.bincount(decode(CONTOUR, one, **arguments_of(row, Grid(CONTOUR, axes))).ravel())[1:]
            for one in maps
        ]
        assert row["largest"] == max(int(size.max(initial=0)) for size in sizes)
    assert result.winner.metrics["largest"] == objective_value(result.winner.metrics, objective)
    with pytest.raises(ConfigError, match="largests"):
        validated(Objective, {"metric": "largests"}, "here")


@pytest.mark.parametrize("name", [name for name, metric in METRICS.items() if metric.stacked])
def test_every_metric_may_be_the_objective_and_is_what_score_says(name: str) -> None:
    maps, truths, _ = zip(noisy(1), noisy(2), strict=True)
    axes = {"distance_threshold.seed": [0.1, 0.5], "distance_threshold.foreground": [-0.5, 0.2],
            "contour_threshold.foreground": [0.5, None], "min_instance_size": [0, 60]}  # fmt: skip
    grid = Grid(CONTOUR, axes)
    table = sweep(maps, truths, None, grid, objective=SimpleNamespace(metric=name)).table
    for row in table.to_dict("records"):
        tables = [
            contingency_table(prediction=decode(CONTOUR, m, **arguments_of(row, grid)), truth=t)
            for m, t in zip(maps, truths, strict=True)
        ]
        assert row[name] == pytest.approx(score_table(joined(tables)).metrics[name], abs=1e-12)
