"""A sweep gives the same sums however it takes a volume apart."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from hydralv_tune.numerics.watershed.decoders import CONTOUR
from hydralv_tune.numerics.watershed.parts import Parts
from hydralv_tune.numerics.watershed.pruning import pruned, steps_from_any_seed
from hydralv_tune.trial.scoring.sweep import volume
from hydralv_tune.trial.scoring.sweep.grid import Axes, Grid, checked_axes
from hydralv_tune.trial.scoring.sweep.volume import FloodedVolume

Case = tuple[np.ndarray, np.ndarray, np.ndarray | None, Grid]


def a_case(seed: int) -> Case:
    """Return maps, labels, mask and grid, all at random: noise fine and coarse, many ties."""
    rng = np.random.default_rng(seed)
    shape = tuple(int(side) for side in rng.integers(3, 26, 3))
    width = rng.uniform(0, 2)

    def noise() -> np.ndarray:
        grain = gaussian_filter(rng.standard_normal(shape), width)
        return grain / max(float(grain.std()), 1e-9)

    def some(*values: float) -> list[float]:
        return sorted(set(rng.choice(values, rng.integers(1, len(values) + 1)).tolist()))

    binary = np.clip(noise() * 0.3 + rng.uniform(0, 0.6), 0, 1)
    contour = np.clip(noise() * 0.3 + rng.uniform(0, 0.5), 0, 1)
    distance = np.clip(noise() * rng.uniform(0.1, 0.6) + rng.uniform(-0.8, 0.2), -1, 1)
    if seed % 2:
        distance = np.round(distance, 1)
    labels = (np.cumsum(noise() > 1).reshape(shape) * (noise() > 0.3)) % 40
    mask = None if seed % 3 == 0 else noise() > rng.uniform(-1.5, 0.3)
    middle = tuple(side // 2 for side in shape)
    labels[middle] = 5
    if mask is not None:
        mask[middle] = True
    axes = {
        "binary_threshold.seed": some(0.1, 0.3, 0.5, 0.7),
        "binary_threshold.foreground": some(0.0, 0.2, 0.4, 0.6),
        "contour_threshold.seed": some(0.2, 0.5, 0.8),
        "contour_threshold.foreground": some(0.3, 0.6, 0.9),
        "distance_threshold.seed": some(-0.6, -0.3, 0.0, 0.1, 0.3, 0.5),
        "distance_threshold.foreground": some(-0.9, -0.5, 0.0, 0.1),
        "min_seed_size": some(1, 2, 5, 20),
        "min_instance_size": some(0, 5, 30),
    }
    fixed: dict[str, Any] = {"flood": "volume"}
    if seed % 4 < 2:
        fixed = {"flood": "support", "floor": float(rng.choice([0.0, 0.1, 0.3]))}
    maps = np.stack([binary, contour, distance]).astype(np.float16 if seed % 5 else np.float32)
    return maps, labels.astype(np.int64), mask, Grid(CONTOUR, axes, fixed)


def swept(case: Case, *, entropy: bool = False) -> tuple[FloodedVolume, Axes]:
    maps, labels, mask, grid = case
    axes = checked_axes(grid)
    ready = FloodedVolume(maps, labels, mask, None, grid, axes, entropy=entropy)
    assert ready.run(axes.keys_of(), threads=2)
    return ready, axes


@pytest.mark.parametrize("seed", range(24))
def test_parts_and_pruning_change_no_sum(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = a_case(seed)
    with monkeypatch.context() as plain:
        plain.setattr(volume, "WORTH_PRUNING", 10**9)
        ready, axes = swept(case)
        expected = ready.sums(axes).counts
        rows = [ready.row_of[key] for key in axes.keys_of()]
    for worth, large in ((1, 10**9), (1, 1), (1, 300)):
        monkeypatch.setattr(volume, "WORTH_PRUNING", worth)
        monkeypatch.setattr(volume, "LARGE_PART", large)
        ready, axes = swept(case)
        np.testing.assert_array_equal(ready.sums(axes).counts, expected)
        again = [ready.row_of[key] for key in axes.keys_of()]
        # Equal seeds share a row, so that a metric of one's own is computed once for them.
        assert len(set(again)) <= len(set(rows))
    ready, axes = swept(case, entropy=True)
    np.testing.assert_array_equal(ready.sums(axes).counts, expected)


def test_the_cases_have_instances_several_parts_and_something_to_prune() -> None:
    found, parts, cut = 0, 0, 0
    for seed in range(24):
        maps, labels, mask, grid = a_case(seed)
        axes = checked_axes(grid)
        ready = FloodedVolume(maps, labels, mask, None, grid, axes, entropy=False)
        assert ready.run(axes.keys_of(), threads=1)
        found += int(ready.sums(axes).counts[4].max()) > 0
        graph = ready._graph
        less = pruned(
            graph, np.array([max(axes["binary_threshold.seed"]),
                             -min(axes["contour_threshold.seed"]),
                             max(axes["distance_threshold.seed"])]),
            int(max(axes["min_seed_size"])), steps_from_any_seed(graph),
        )  # fmt: skip
        cut += int(np.bitwise_count(less.unvisited).sum() < np.bitwise_count(graph.unvisited).sum())
        parts += len(Parts(less)) > 1
    assert found >= 18
    assert parts >= 4
    assert cut >= 8
