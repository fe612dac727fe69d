"""Which combination wins, and which combinations there are."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pandas as pd
import pytest

from hydralv_tune.numerics.watershed.decoders import DECODERS, Decoder, read_arguments
from hydralv_tune.trial.scoring.sweep.choice import by_rule, depths, plateau_of, rate
from hydralv_tune.trial.scoring.sweep.grid import checked_axes, count_combinations, finer, halvings
from hydralv_tune.trial.scoring.sweep.sweep import Grid

CONTOUR = "decode_instance_binary_contour_distance"
AXES: dict[str, list[Any]] = {
    "binary_threshold.seed": [0.5, 0.9, 0.7],
    "contour_threshold.seed": [0.5, None],
    "distance_threshold.foreground": [-0.5, 0.0],
    "min_seed_size": [8, 1, 8],
    "min_instance_size": [0, 60],
}


def test_axes_are_sorted_and_hold_each_value_once() -> None:
    axes = checked_axes(Grid(CONTOUR, AXES))
    assert axes["binary_threshold.seed"] == (0.5, 0.7, 0.9)
    assert axes["contour_threshold.seed"] == (0.5, np.inf)
    assert axes["min_seed_size"] == (1, 8)
    assert axes["contour_threshold.foreground"] == (np.inf,)
    assert count_combinations(axes) == 3 * 2 * 2 * 2 * 2


def test_plateau_is_what_near_ties_reach_step_by_step() -> None:
    near = np.array([[True, True, False, True], [False, True, False, True]])
    axes = {"a": (1, 2), "b": (10, 20, 30, 40)}
    assert plateau_of(near, (0, 1), axes) == (3, {"a": [1, 2], "b": [10, 20]})
    assert plateau_of(near, (1, 3), axes) == (2, {"a": [1, 2], "b": [40]})


def ranked(rows: list[tuple[float, float]], guard: float = 0.05) -> list[int]:
    """Return the order of (error, F1) rows on one axis."""
    table = pd.DataFrame(rows, columns=["adapted_rand_error", "f1_iou50"])
    rate(table, [[len(rows)]], "adapted_rand_error", guard)
    return by_rule(table, "adapted_rand_error").tolist()


def test_smallest_error_with_poor_f1_does_not_win() -> None:
    assert ranked([(0.045, 0.17), (0.148, 0.64), (0.12, 0.60)]) == [2, 1, 0]


def test_near_ties_go_to_the_higher_f1() -> None:
    assert ranked([(0.1000, 0.60), (0.1019, 0.63), (0.1021, 0.64)])[0] == 1


def test_equal_f1_goes_to_the_one_deepest_in_its_plateau() -> None:
    edge_first = [(0.1, 0.6), (0.101, 0.6), (0.1005, 0.6), (0.101, 0.6), (0.101, 0.6), (0.3, 0.6)]
    assert ranked(edge_first)[0] == 2


def test_depth_counts_steps_to_the_nearest_edge() -> None:
    near = np.zeros((5, 1, 6), bool)
    near[:, 0, 1:] = True
    assert np.floor(depths(near))[:, 0].tolist() == [
        [0, 1, 1, 1, 1, 1],
        [0, 1, 2, 2, 2, 1],
        [0, 1, 2, 3, 2, 1],
        [0, 1, 2, 2, 2, 1],
        [0, 1, 1, 1, 1, 1],
    ]
    assert depths(np.ones((1, 1), bool)).tolist() == [[1]]


def test_middle_of_a_plateau_one_step_deep_is_deeper_than_its_corner() -> None:
    depth = depths(np.ones((2, 3, 3), bool))
    assert depth[0, 1, 1] == depth.max() < 2
    assert depth[0, 0, 0] == depth.min() > 1


def test_halvings_are_nested_and_end_in_one_flood() -> None:
    axes = checked_axes(Grid(CONTOUR, AXES))
    grids = halvings(axes)
    assert grids[-1] == axes
    assert all(len(grids[0][name]) == 1 for name in axes.slow)
    for small, large in itertools.pairwise(grids):
        assert count_combinations(small) < count_combinations(large)
        assert all(set(small[name]) <= set(large[name]) for name in axes)


def test_finer_axes_go_half_way_to_the_neighbours() -> None:
    axes = checked_axes(Grid(CONTOUR, {"binary_threshold.seed": [0.5, 0.7, 0.9],
                                       "contour_threshold.seed": [0.5, None],
                                       "min_seed_size": [1, 8]}))  # fmt: skip
    point = {name: values[0] for name, values in axes.items()}
    point |= {"binary_threshold.seed": 0.7, "contour_threshold.seed": 0.5}
    around = finer(axes, point, 0.5)
    assert around["binary_threshold.seed"] == (0.6, 0.7, 0.8)
    assert around["contour_threshold.seed"] == (0.5,)
    assert around["min_seed_size"] == (1, 4)


def test_refinement_ends_at_hundredths() -> None:
    axes = checked_axes(Grid(CONTOUR, {"binary_threshold.seed": [0.9, 0.97, 0.99]}))
    point = {name: values[0] for name, values in axes.items()}

    def around(seed: float, step: float) -> tuple[float, ...]:
        return finer(axes, point | {"binary_threshold.seed": seed}, step)["binary_threshold.seed"]

    assert around(0.99, 0.5) == (0.98, 0.99)
    assert around(0.97, 0.5) == (0.94, 0.97, 0.98)
    assert around(0.93, 0.25) == (0.92, 0.93, 0.94)
    assert around(0.9, 2.0**-9) == (0.9, 0.91)


def test_decoder_without_a_sweep_form_is_swept_over_its_numbers_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def decode_mine(
        maps: np.ndarray, mask: object = None, *, level: float = 0.5, rounds: int = 2,
        pair: tuple[float, float] = (0.5, 0.1), mode: str = "fast",
    ) -> np.ndarray:  # fmt: skip
        return np.zeros(maps.shape[1:], np.int32)

    monkeypatch.setitem(DECODERS, "decode_mine", Decoder(decode_mine, read_arguments(decode_mine)))
    axes = checked_axes(Grid("decode_mine", {"level": [0.7, 0.2], "pair.seed": [0.9]}))
    assert list(axes) == ["level", "rounds", "pair.seed", "pair.foreground"] == axes.slow
    assert axes == {
        "level": (0.2, 0.7), "rounds": (2,), "pair.seed": (0.9,), "pair.foreground": (0.1,),
    }  # fmt: skip
    with pytest.raises(ValueError, match="Unknown axis"):
        checked_axes(Grid("decode_mine", {"mode": ["slow"]}))
    with pytest.raises(ValueError, match="whole number"):
        checked_axes(Grid("decode_mine", {"rounds": [1.5]}))
    with pytest.raises(ValueError, match="must decode each"):
        checked_axes(Grid("decode_mine", {"level": np.linspace(0, 1, 10_001).tolist()}))
