"""Every decoder of the table keeps the same promises, and one equals its public peer."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from hydralv_tune.decoding import DECODERS, decode, decoder_arguments
from hydralv_tune.metrics import adapted_rand, contingency_table

NAMES = sorted(DECODERS)


def two_blobs() -> np.ndarray:
    """Return probabilities of two cubes, 5 voxels wide, in a volume of background."""
    maps = np.zeros((3, 7, 16, 16), np.float16)
    maps[2] = -1
    for low in (1, 9):
        blob = np.s_[1:6, low : low + 5, low : low + 5]
        maps[0][blob] = 0.9
        maps[2][blob] = 0.1
        maps[2, 2:5, low + 1 : low + 4, low + 1 : low + 4] = 0.8
    return maps


@pytest.mark.parametrize("name", NAMES)
def test_two_blobs_become_two_instances(name: str) -> None:
    maps = two_blobs()
    labels = decode(name, maps)
    assert labels.dtype == np.int32
    assert labels.shape == maps.shape[1:]
    assert np.unique(labels).tolist() == [0, 1, 2]
    assert np.array_equal(labels > 0, maps[0] > 0)


@pytest.mark.parametrize("name", NAMES)
def test_input_is_left_alone_and_the_answer_is_the_same_twice(name: str) -> None:
    maps = np.random.default_rng(0).random((3, 6, 20, 20)).astype(np.float32)
    before = maps.copy()
    assert np.array_equal(decode(name, maps), decode(name, maps))
    assert np.array_equal(maps, before)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_decoded_outside_the_mask(name: str) -> None:
    maps = two_blobs()
    mask = np.zeros(maps.shape[1:], np.uint8)
    mask[:, :8] = 1
    labels = decode(name, maps, mask)
    assert labels.max() == 1
    assert not labels[mask == 0].any()


@pytest.mark.parametrize("name", NAMES)
def test_no_seed_gives_an_empty_segmentation(name: str) -> None:
    assert not decode(name, two_blobs(), distance_threshold=[0.95, 0.0]).any()


@pytest.mark.parametrize("name", NAMES)
def test_instances_under_the_least_size_are_dropped(name: str) -> None:
    assert decode(name, two_blobs(), min_instance_size=125).max() == 2
    assert decode(name, two_blobs(), min_instance_size=126).max() == 0


@pytest.mark.parametrize("name", NAMES)
def test_wrong_input_is_refused_with_a_reason(name: str) -> None:
    maps = two_blobs()
    with pytest.raises(ValueError, match=r"\(3, Z, Y, X\)"):
        decode(name, maps[:2])
    with pytest.raises(ValueError, match="not finite"):
        decode(name, np.where(maps > 0.5, np.float32(np.nan), maps))
    with pytest.raises(ValueError, match="range"):
        decode(name, maps * np.float16(3))
    with pytest.raises(ValueError, match="pair"):
        decode(name, maps, distance_threshold=[0.5])
    with pytest.raises(ValueError, match="Unknown argument"):
        decode(name, maps, thresholds=3)
    with pytest.raises(ValueError, match="mask has shape"):
        decode(name, maps, np.ones((1, 2, 3)))


@pytest.mark.parametrize("name", NAMES)
def test_defaults_of_the_arguments_are_told(name: str) -> None:
    assert {"distance_threshold", "min_seed_size"} <= set(decoder_arguments(name))


def test_volume_flood_equals_the_public_decoder(shared_data: Path) -> None:
    folder = shared_data / "pytc-decoding"
    vectors = np.load(folder / "vectors.npz")
    maps, truth = vectors["probabilities"], vectors["labels"]
    for index, wanted in enumerate(json.loads((folder / "combinations.json").read_text())):
        arguments = {k: v for k, v in wanted.items() if k.endswith(("threshold", "_size"))}
        labels = decode(
            "decode_instance_binary_contour_distance", maps, flood="volume", **arguments
        )
        assert labels.max() == wanted["instances"]
        rand = adapted_rand(contingency_table(prediction=labels, truth=truth))
        assert rand.error == pytest.approx(wanted["adapted_rand_error"], abs=0.004)
        if f"segmentation_{index}" in vectors:
            theirs = vectors[f"segmentation_{index}"]
            assert np.array_equal(labels > 0, theirs > 0)
            fit = adapted_rand(contingency_table(prediction=labels, truth=theirs.astype(np.int32)))
            assert fit.error < 0.01
