"""A sweep gives the same sums however it takes a volume apart."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter, label

from hydralv_tune.numerics.watershed.decoders import CONTOUR
from hydralv_tune.numerics.watershed.flood import components
from hydralv_tune.numerics.watershed.graph import contour_graph
from hydralv_tune.numerics.watershed.parts import Parts
from hydralv_tune.numerics.watershed.pruning import pruned
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
    found, parts, cut, lakes, alone = 0, 0, 0, 0, 0
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
            int(max(axes["min_seed_size"])),
        )  # fmt: skip
        cut += int(np.bitwise_count(less.unvisited).sum() < np.bitwise_count(graph.unvisited).sum())
        found_parts = Parts(less)
        parts += len(found_parts) > 1
        nothing = np.zeros(0, np.int32)
        own = [found_parts.part(number, nothing)[0] for number in range(len(found_parts))]
        # Floods of several lakes meet in the background, and some seeds lie in it.
        lakes += any(len(part.lakes.starts) > 3 and part.is_background.any() for part in own)
        alone += any(part.is_background[part.elements].any() for part in own)
    assert found >= 18
    assert parts >= 4
    assert cut >= 8
    assert lakes >= 8
    assert alone >= 4


def test_the_tables_of_one_combination_are_those_of_the_whole_volume(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(volume, "WORTH_PRUNING", 1)
    cut = 0
    for seed in range(8):
        ready, axes = swept(a_case(seed))
        kept = ready._kept
        assert kept is not None
        keys = list(axes.keys_of())
        for key in keys[:: max(len(keys) // 3, 1)]:
            ready._kept = kept
            quick = ready.stack(key)
            ready._kept = None
            whole = ready.stack(key)
            for name in ("segment_sizes", "pair_truth", "pair_segment", "pair_voxels"):
                np.testing.assert_array_equal(getattr(quick, name), getattr(whole, name))
        cut += not np.array_equal(kept[0].unvisited, ready._graph.unvisited)
    assert cut >= 3


@pytest.mark.parametrize("share", [0.05, 0.2, 0.5, 0.9, 1.0])
def test_components_are_those_of_scipy(share: float) -> None:
    rng = np.random.default_rng(int(100 * share))
    maps = np.zeros((3, 9, 11, 13), np.float32)
    maps[0] = rng.random(maps.shape[1:]) < share
    graph = contour_graph(maps, None, seeds=(0.5, -1.0, -1.0), limits=(0.5, -1.0, -1.0))
    found, component, sizes = components(
        graph.values, np.array([0.5, -1.0, -1.0]), graph.candidates, graph.nodes, graph.box.before
    )
    expected, count = label(maps[0] > 0.5, np.ones((3, 3, 3)))
    assert len(sizes) == count
    labels = np.zeros(expected.size, np.int64)
    labels[graph.box.voxels_of(graph.nodes[found])] = component + 1
    np.testing.assert_array_equal(labels.reshape(expected.shape), expected)
    np.testing.assert_array_equal(sizes, np.bincount(expected.ravel())[1:])


COMPILED = """
import sys
import numpy as np
from hydralv_tune.numerics.watershed import flood, graph, lakes, parts, pruning, threshold_sums
from hydralv_tune.trial.scoring.sweep import sweep, volume

def compiled():
    return {
        (module.__name__, name): len(own.signatures)
        for module in (flood, graph, lakes, parts, pruning, threshold_sums)
        for name, own in vars(module).items() if hasattr(own, "signatures")
    }

sweep.warm_up()
before = compiled()
assert before["hydralv_tune.numerics.watershed.parts", "add_sums"] == 1, before
rng = np.random.default_rng(0)
maps = rng.random((3, 12, 13, 14)).astype(np.float16)
labels = rng.integers(0, 5, maps.shape[1:]).astype(np.uint16)
volume.LARGE_PART = int(sys.argv[1])
for decoder in ("decode_instance_binary_contour_distance", "decode_instance_watershed_distance"):
    for seeds in ([0.5], [0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]):
        axes = {"distance_threshold.seed": seeds, "min_seed_size": [1, 4]}
        for mask in (None, labels > 0):
            sweep.sweep(maps, labels, mask, sweep.Grid(decoder, axes), threads=2)
after = compiled()
assert after == before, {name: count for name, count in after.items() if before[name] != count}
"""


@pytest.mark.parametrize("large", [1, 10**9])
def test_a_sweep_compiles_nothing_once_it_is_warm(large: int) -> None:
    """What is compiled later is not told as such: half a minute would count as the sweep's."""
    command = [sys.executable, "-c", COMPILED, str(large)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
