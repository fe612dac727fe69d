"""What `docs/plan_notes.md` says of the plan and is not tested beside the code that it is about.

The page names the test behind each of its points; the last test here finds them all.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hydralv_tune.config.errors import ConfigError
from hydralv_tune.config.files import load_candidate
from hydralv_tune.config.search_space import space_from_mapping
from hydralv_tune.config.search_space_files import load_space
from hydralv_tune.numerics.augmentation.registry import resolve_preset
from hydralv_tune.numerics.metrics.scores import score_labels as score
from hydralv_tune.numerics.watershed.decoders import decode

REPOSITORY = Path(__file__).parents[1]
PAGE = REPOSITORY / "docs" / "plan_notes.md"
CONTOUR = "decode_instance_binary_contour_distance"


def maps_of(binary: list[float], contour: list[float]) -> np.ndarray:
    """Return the three maps of a row of voxels, deep inside throughout."""
    maps = np.zeros((3, 1, 1, len(binary)), np.float32)
    maps[0, 0, 0], maps[1, 0, 0], maps[2] = binary, contour, 0.6
    return maps


def decoded(maps: np.ndarray, **arguments: Any) -> list[int]:
    """Return the labels of the row, the foreground being binary > 0.4 alone."""
    rest = {"binary_threshold": [0.5, 0.4], "min_seed_size": 1, **arguments}
    return [int(i) for i in decode(CONTOUR, maps, **rest)[0, 0]]


def test_a_lower_seed_threshold_adds_no_foreground_and_merges_neighbours() -> None:
    maps = maps_of([0.1, 0.9, 0.9, 0.45, 0.9, 0.9, 0.1], [0.0] * 7)
    apart = decoded(maps, binary_threshold=[0.5, 0.4])
    joined = decoded(maps, binary_threshold=[0.42, 0.4])
    assert (max(apart), max(joined)) == (2, 1)
    assert np.array_equal(np.array(apart) > 0, np.array(joined) > 0)
    # The second of the pair is what takes voxels away, or gives them back.
    assert np.count_nonzero(decoded(maps, binary_threshold=[0.5, 0.7])) == 4
    assert np.count_nonzero(apart) == 5


def test_a_lower_contour_seed_threshold_is_stricter() -> None:
    maps = maps_of([0.9] * 7, [0.2, 0.2, 0.2, 0.6, 0.2, 0.2, 0.2])
    found = [max(decoded(maps, contour_threshold=[seed, None])) for seed in (0.8, 0.5, 0.1)]
    assert found == [1, 2, 0], "one seed over the ridge, one on either side, none at all"


def test_a_larger_least_seed_loses_instances() -> None:
    maps = maps_of([0.9, 0.9, 0.9, 0.45, 0.9, 0.1, 0.1], [0.0] * 7)
    assert [max(decoded(maps, min_seed_size=size)) for size in (1, 2, 4)] == [2, 1, 0]


def test_a_vesicle_of_1396_voxels_counts_39_times_one_of_224() -> None:
    truth = np.repeat([1, 2, 0], [1396, 224, 98_380])[None, None]
    lost = [
        1 - score(prediction=np.where(truth == missed, 0, truth), truth=truth).adapted_rand_recall
        for missed in (1, 2)
    ]
    assert lost[0] / lost[1] == pytest.approx(39, abs=0.5)


def test_a_loss_is_no_objective_of_a_study() -> None:
    for name in ("loss", "total", "train_loss_total_epoch"):
        with pytest.raises(ConfigError, match=r"objective\.metric"):
            space_from_mapping({"objective": {"metric": name}})


def test_hydra_lv_searches_tversky_in_favour_of_precision_and_of_recall() -> None:
    losses = load_space("hydra_lv").parameters["loss_set"].choice
    assert isinstance(losses, dict)
    favoured = {
        kwargs["alpha"] > kwargs["beta"]
        for block in losses.values() for kwargs in block["model"]["loss_kwargs"]
        if {"alpha", "beta"} <= set(kwargs)
    }  # fmt: skip
    assert favoured == {True, False}


def test_the_overfit_check_has_nothing_that_works_against_fitting() -> None:
    candidate = load_candidate("overfit_check")
    augmentation = candidate.data.augmentation
    assert resolve_preset(augmentation.preset, augmentation.settings) == {}
    assert not candidate.model.dropout
    assert candidate.optimization.optimizer.weight_decay == 0
    assert candidate.model.loss_balancing.strategy == "none"


def test_both_names_of_the_distance_decoder_are_one() -> None:
    distance = np.random.default_rng(0).uniform(-1, 1, (6, 12, 12)).astype(np.float32)
    maps = np.stack([np.zeros_like(distance), np.zeros_like(distance), distance])
    one, other = (
        decode(name, maps, min_seed_size=1)
        for name in ("decode_instance_watershed_distance", "decode_distance_watershed")
    )
    assert one.any()
    assert np.array_equal(one, other)


def test_each_point_of_the_page_names_a_test_that_is_there() -> None:
    rows = re.findall(r"^\| (\d+) \| (.*) \|$", PAGE.read_text(), re.M)
    assert [int(number) for number, _ in rows] == list(range(1, 17))
    for number, cell in rows:
        named = re.findall(r"`(test_\w+\.py|conformance/test_\w+\.py)::(test_\w+)`", cell)
        assert named, f"point {number} names no test"
        for file, test in named:
            text = (REPOSITORY / "tests" / file).read_text()
            assert f"def {test}(" in text, f"point {number}: tests/{file} has no {test}"
