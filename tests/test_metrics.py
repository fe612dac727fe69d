"""Metrics: cases worked by hand, known figures of a real volume, and what must never change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import mutual_info_score

from hydralv_tune.numerics.metrics.scores import (
    adapted_rand,
    adapted_rand_foreground,
    contingency_table,
    match_instances,
    skimage_adapted_rand_error,
    variation_of_information,
)
from hydralv_tune.numerics.metrics.scores import score_labels as score


def row(*ids: int) -> np.ndarray:
    """Return a volume of one row."""
    return np.array(ids, np.int32)[None, None]


def rand_of(prediction: np.ndarray, truth: np.ndarray, mask: Any = None) -> Any:
    return adapted_rand(contingency_table(prediction=prediction, truth=truth, mask=mask))


def grown_of(prediction: np.ndarray, truth: np.ndarray) -> Any:
    return adapted_rand_foreground(contingency_table(prediction=prediction, truth=truth))


def matching_of(prediction: np.ndarray, truth: np.ndarray) -> Any:
    return match_instances(contingency_table(prediction=prediction, truth=truth))


TWO = row(1, 1, 1, 1, 0, 0, 2, 2, 2, 2)


def test_perfect_segmentation_has_error_zero_and_f1_one() -> None:
    result = score(prediction=TWO, truth=TWO)
    assert result.adapted_rand_error == 0
    assert result.adapted_rand_error_foreground == 0
    assert (result.voi_split, result.voi_merge) == (0, 0)
    assert result.f1_iou50 == 1
    assert result.counts == {"missed": 0, "split": 0, "merged": 0, "invented": 0}


def test_merge_lowers_precision_not_recall() -> None:
    # Both truths in one segment: AB = 4² + 4² = 32, Σ b² = 8² = 64, Σ a² = 32.
    rand = rand_of(row(7, 7, 7, 7, 0, 0, 7, 7, 7, 7), TWO)
    assert (rand.precision, rand.recall) == (0.5, 1.0)
    assert rand.error == pytest.approx(1 - 2 * 0.5 / 1.5)
    assert matching_of(row(7, 7, 7, 7, 0, 0, 7, 7, 7, 7), TWO).merged == (7,)


def test_split_lowers_recall_not_precision() -> None:
    # The first truth in halves: AB = 2² + 2² + 4² = 24 = Σ b², Σ a² = 32.
    prediction = row(1, 1, 3, 3, 0, 0, 2, 2, 2, 2)
    rand = rand_of(prediction, TWO)
    assert (rand.precision, rand.recall) == (1.0, 0.75)
    assert matching_of(prediction, TWO).split == (1,)


def test_missed_truth_counts_once_over_all_voxels() -> None:
    # c = 4 of N = 10 voxels: AB = 16 + 0.4, Σ b² + 0.4 = 16.4, Σ a² = 32.
    prediction = row(1, 1, 1, 1, 0, 0, 0, 0, 0, 0)
    rand = rand_of(prediction, TWO)
    assert rand.precision == 1.0
    assert rand.recall == pytest.approx(16.4 / 32)
    matching = matching_of(prediction, TWO)
    assert matching.missed == (2,)
    assert matching.f1 == pytest.approx(2 / 3)


def test_swollen_instance_is_free_except_in_the_foreground_form_and_f1() -> None:
    truth = row(1, 1, 0, 0, 0, 0, 0, 0, 0, 0)
    prediction = row(1, 1, 1, 1, 1, 1, 1, 1, 1, 1)
    assert rand_of(prediction, truth).error == 0
    # AB = 2² = 4, Σ |S|² = 10² = 100, Σ a² = 4: precision 0.04, recall 1.
    assert grown_of(prediction, truth).error == pytest.approx(1 - 2 * 0.04 / 1.04)
    assert matching_of(prediction, truth).f1 == 0


def test_invented_instance_is_free_except_in_the_foreground_form_and_f1() -> None:
    truth = row(1, 1, 1, 0, 0, 0)
    prediction = row(1, 1, 1, 0, 2, 2)
    assert rand_of(prediction, truth).error == 0
    # AB = 9, Σ |S|² = 9 + 4: precision 9/13.
    assert grown_of(prediction, truth).precision == pytest.approx(9 / 13)
    matching = matching_of(prediction, truth)
    assert matching.invented == (2,)
    assert (matching.precision, matching.recall) == (0.5, 1.0)


def test_empty_prediction_is_error_one() -> None:
    result = score(prediction=np.zeros_like(TWO), truth=TWO)
    assert result.adapted_rand_error == 1
    assert result.adapted_rand_error_foreground == 1
    assert result.f1_iou50 == 0
    assert result.missed == (1, 2)


def test_voi_of_a_split_in_halves_is_one_bit_of_its_share() -> None:
    # Half the truth voxels are split evenly in two: H(segment | truth) = 0.5 bit.
    split, merge = variation_of_information(
        contingency_table(prediction=row(1, 1, 3, 3, 0, 0, 2, 2, 2, 2), truth=TWO)
    )
    assert (split, merge) == pytest.approx((0.5, 0.0))


def test_voi_of_a_merge_of_equals_is_one_bit() -> None:
    split, merge = variation_of_information(
        contingency_table(prediction=row(7, 7, 7, 7, 0, 0, 7, 7, 7, 7), truth=TWO)
    )
    assert (split, merge) == pytest.approx((0.0, 1.0))


def test_iou_of_exactly_a_half_is_no_match() -> None:
    assert matching_of(row(1, 1, 0, 0), row(1, 1, 1, 1)).matched == 0
    assert matching_of(row(1, 1, 1, 0), row(1, 1, 1, 1)).matched == 1


def test_mask_takes_voxels_out_of_every_count() -> None:
    mask = row(1, 1, 1, 1, 1, 1, 0, 0, 0, 0)
    prediction = row(1, 1, 1, 1, 0, 0, 9, 9, 3, 3)
    result = score(prediction=prediction, truth=TWO, mask=mask)
    assert result.adapted_rand_error == 0
    assert (result.instances_true, result.instances_predicted) == (1, 1)
    # N is the mask's: c/N = 2/6 where half of the one truth is missed.
    rand = rand_of(row(1, 1, 0, 0, 0, 0, 0, 0, 0, 0), TWO, mask)
    assert rand.recall == pytest.approx((4 + 2 / 6) / 16)


def test_half_covered_objects_and_half_missed_ones_score_alike() -> None:
    """The plan's reading of recall 0.389 as 61 % missed vesicles is not the only one."""
    truth = np.repeat(np.arange(1, 52), 100)[None, None]
    covered = np.where(np.arange(truth.size) % 100 < 62, truth, 0)
    missed = np.where(truth > 31, truth, 0)
    assert rand_of(covered, truth).error == pytest.approx(0.440, abs=0.006)
    assert rand_of(missed, truth).error == pytest.approx(0.437, abs=0.006)
    assert matching_of(covered, truth).missed == ()
    assert len(matching_of(missed, truth).missed) == 31


def test_known_figures_of_a_real_volume(shared_data: Path) -> None:
    arrays = {}
    for name in ("pred", "label", "mask"):
        with h5py.File(shared_data / "hydra-11-5" / f"{name}.h5") as file:
            arrays[name] = file["main"][:]
    within = score(prediction=arrays["pred"], truth=arrays["label"], mask=arrays["mask"])
    assert round(within.adapted_rand_error, 3) == 0.084
    assert round(within.adapted_rand_error_foreground, 3) == 0.332
    assert round(within.skimage_adapted_rand_error, 3) == 0.403
    assert (within.matched_iou50, within.instances_true) == (203, 265)
    assert within.instances_predicted == 271
    whole = rand_of(arrays["pred"], arrays["label"])
    assert round(whole.error, 3) == 0.091
    sk = skimage_adapted_rand_error(
        contingency_table(prediction=arrays["pred"], truth=arrays["label"])
    )
    assert round(sk, 3) == 0.476


volumes = st.integers(0, 10**6).map(
    lambda seed: np.random.default_rng(seed).integers(0, 4, (2, 2, 3, 4))
)


def slow_rand(prediction: np.ndarray, truth: np.ndarray, whole: bool) -> tuple[float, float]:
    """Return (precision, recall) straight from the definition."""
    pairs = {
        (i, j): int(np.sum((truth == i) & (prediction == j)))
        for i in np.unique(truth[truth > 0])
        for j in np.unique(prediction)
    }
    share = sum(n for (_, j), n in pairs.items() if j == 0) / truth.size
    both = sum(n * n for (_, j), n in pairs.items() if j > 0)
    if both == 0:
        return 0.0, 0.0
    segments = [
        np.sum((prediction == j) & (whole | (truth > 0)))
        for j in np.unique(prediction[prediction > 0])
    ]
    below = sum(int(s) ** 2 for s in segments) + share
    truths = sum(int(np.sum(truth == i)) ** 2 for i in np.unique(truth[truth > 0]))
    return (both + share) / below, (both + share) / truths


@settings(max_examples=100, deadline=None)
@given(volumes)
def test_adapted_rand_equals_its_definition(pair: np.ndarray) -> None:
    prediction, truth = pair
    truth.flat[0] = 1
    rand, grown = rand_of(prediction, truth), grown_of(prediction, truth)
    assert (rand.precision, rand.recall) == pytest.approx(slow_rand(prediction, truth, False))
    assert (grown.precision, grown.recall) == pytest.approx(slow_rand(prediction, truth, True))
    assert 0 <= rand.error <= 1


@settings(max_examples=100, deadline=None)
@given(volumes)
def test_voi_is_entropy_less_mutual_information(pair: np.ndarray) -> None:
    prediction, truth = pair
    truth.flat[0] = 1
    own, found = truth[truth > 0], prediction[truth > 0]
    shared = mutual_info_score(own, found) / np.log(2)

    def entropy(ids: np.ndarray) -> float:
        share = np.unique(ids, return_counts=True)[1] / ids.size
        return float(-np.sum(share * np.log2(share)))

    split, merge = variation_of_information(contingency_table(prediction=prediction, truth=truth))
    assert split == pytest.approx(entropy(found) - shared, abs=1e-9)
    assert merge == pytest.approx(entropy(own) - shared, abs=1e-9)


@settings(max_examples=50, deadline=None)
@given(volumes, st.permutations(range(1, 5)))
def test_relabelling_changes_nothing(pair: np.ndarray, names: list[int]) -> None:
    prediction, truth = pair
    truth.flat[0] = 1
    renamed = np.array([0, *names])[prediction] * 1000
    one = score(prediction=prediction, truth=truth)
    two = score(prediction=renamed, truth=truth)
    assert one.adapted_rand_error == pytest.approx(two.adapted_rand_error, abs=1e-12)
    assert one.f1_iou50 == two.f1_iou50
    assert one.voi_split == pytest.approx(two.voi_split, abs=1e-12)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"truth": np.zeros_like(TWO)}, "no labelled voxel"),
        ({"truth": TWO[..., :5]}, "shape"),
        ({"truth": TWO.astype(float)}, "integers"),
        ({"prediction": -TWO}, "start at 0"),
        ({"mask": np.zeros_like(TWO)}, "no valid voxel"),
        ({"mask": np.ones((2, 2, 2))}, "mask has shape"),
    ],
)
def test_wrong_input_is_refused(change: dict[str, np.ndarray], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        score(**{"prediction": TWO, "truth": TWO, **change})


def test_iou_under_a_half_is_refused() -> None:
    with pytest.raises(ValueError, match=r"0\.5 <= iou"):
        match_instances(contingency_table(prediction=TWO, truth=TWO), iou=0.4)


def test_sizes_are_told_in_thirds_of_the_truths_each_with_its_recall() -> None:
    # Truths of 1, 2, 3, 4, 5 and 6 voxels; 1, 4 and 6 are found.
    truth = np.repeat([1, 0, 2, 0, 3, 0, 4, 0, 5, 0, 6], [1, 1, 2, 1, 3, 1, 4, 1, 5, 1, 6])
    found = np.where(np.isin(truth, (1, 4, 6)), truth, 0)
    result = score(prediction=found[None, None], truth=truth[None, None])
    assert (result.recall_small, result.recall_medium, result.recall_large) == (0.5, 0.5, 0.5)
    own = result.as_dict((10.0, 2.0, 1.0))["by_size"]
    assert {name: (one["smallest_voxels"], one["largest_voxels"]) for name, one in own.items()} == {
        "small": (1, 2), "medium": (3, 4), "large": (5, 6),
    }  # fmt: skip
    assert (own["large"]["smallest_nm3"], own["large"]["largest_nm3"]) == (100.0, 120.0)
    assert own["small"]["missed"] == 1
    assert "smallest_nm3" not in result.as_dict()["by_size"]["small"]


def test_a_third_without_truths_has_a_recall_of_one() -> None:
    result = score(prediction=np.zeros_like(TWO), truth=TWO)  # both of one size: all are small
    assert (result.recall_small, result.recall_medium, result.recall_large) == (0.0, 1.0, 1.0)
    assert result.as_dict((1.0, 1.0, 1.0))["by_size"]["large"]["smallest_nm3"] is None
