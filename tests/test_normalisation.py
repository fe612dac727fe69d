"""One rule from intensities to network input, fitted once, the same for both who use it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hydralv_tune.config.candidate import Data
from hydralv_tune.numerics.normalisation import (
    FILLS,
    MODES,
    equalised,
    fit_normalisation,
    normalise,
)
from hydralv_tune.trial.fitted_normalisation import (
    as_it_was_trained,
    fit_image,
    stream_normalisation,
)


def volume(seed: int = 0) -> np.ndarray:
    """Return sections whose brightness and contrast jump, as real ones do."""
    rng = np.random.default_rng(seed)
    means, spreads = rng.uniform(86, 211, 6), rng.uniform(5, 20, 6)
    noise = rng.normal(size=(6, 32, 40))
    return np.clip(means[:, None, None] + spreads[:, None, None] * noise, 1, 255).astype(np.uint8)


def test_zero_one_spans_the_volume() -> None:
    image = volume()
    result = normalise(image, mode="0-1")
    assert result.dtype == np.float32
    low, high = int(image.min()), int(image.max())
    assert np.allclose(result, (image - float(low)) / (high - low), atol=1e-6)


def test_percentiles_clip_both_ends() -> None:
    image = np.arange(1, 1001, dtype=np.float32).reshape(1, 20, 50)
    result = normalise(image, mode="0-1", clip_low=0.1, clip_high=0.9)
    assert (result == 0).sum() == 100
    assert (result > 1 - 1e-6).sum() == 100
    low, high = np.quantile(image, [0.1, 0.9])
    assert np.allclose(result, np.clip((image - low) / (high - low), 0, 1), atol=1e-6)


def test_sections_are_standardised_each_and_the_volume_as_one() -> None:
    image = volume()
    sections = normalise(image, mode="z_section")
    assert np.allclose(sections.mean((1, 2)), 0, atol=1e-4)
    assert np.allclose(sections.std((1, 2)), 1, atol=1e-4)
    whole = normalise(image, mode="z_volume")
    assert abs(whole.mean()) < 1e-4
    assert abs(whole.std() - 1) < 1e-4
    assert np.ptp(whole.mean((1, 2))) > 1  # the jumps are left


@pytest.mark.parametrize("mode", MODES)
def test_a_section_that_is_missing_gives_numbers_and_moves_no_other(mode: str) -> None:
    image = volume()
    without = normalise(np.delete(image, 2, axis=0), mode=mode)
    image[2] = 128
    result = normalise(image, mode=mode)
    assert np.isfinite(result).all()
    assert np.allclose(np.delete(result, 2, axis=0), without, atol=1e-5)
    if mode == "z_section":
        assert not result[2].any()


@pytest.mark.parametrize("value", [0, 7, 255])
@pytest.mark.parametrize("mode", MODES)
def test_a_constant_volume_gives_numbers(mode: str, value: int) -> None:
    result = normalise(np.full((3, 4, 5), value, np.uint8), mode=mode)
    assert np.isfinite(result).all()
    if mode != "none":
        assert not result.any()


@pytest.mark.parametrize("mode", ["z_volume", "z_section"])
def test_fill_around_the_image_counts_for_nothing(mode: str) -> None:
    image = volume()
    filled = np.zeros((6, 64, 64), np.uint8)
    filled[:, 16:48, 12:52] = image
    inside = normalise(filled, mode=mode)[:, 16:48, 12:52]
    assert np.allclose(inside, normalise(image, mode=mode), atol=1e-5)


@pytest.mark.parametrize("shares", [(0.0, 1.0), (0.01, 0.99)])
@pytest.mark.parametrize("value", [0, 1, 128, 255])
@pytest.mark.parametrize("mode", MODES)
def test_padding_of_any_value_changes_no_voxel_of_the_tissue(
    mode: str, value: int, shares: tuple[float, float]
) -> None:
    image = volume()
    padded = np.full((6, 64, 64), value, np.uint8)
    padded[:, 16:48, 12:52] = image
    arguments = {"mode": mode, "clip_low": shares[0], "clip_high": shares[1]}
    inside = normalise(padded, **arguments)[:, 16:48, 12:52]
    assert np.allclose(inside, normalise(image, **arguments), atol=1e-5)
    # The same where the padding stands on one side alone, or is a hole in the middle.
    one_sided = np.concatenate([image, np.full((6, 32, 20), value, np.uint8)], axis=2)
    beside = normalise(one_sided, **arguments)[:, :, :40]
    assert np.allclose(beside, normalise(image, **arguments), atol=1e-5)


def test_a_section_that_is_fill_alone_does_not_stretch_the_range() -> None:
    image = np.random.default_rng(0).normal(30000, 300, (4, 32, 32)).astype(np.uint16)
    lost = np.concatenate([image, np.zeros((2, 32, 32), np.uint16)])
    assert np.allclose(normalise(lost)[:4], normalise(image), atol=1e-6)
    assert not normalise(lost)[4:].any()


@pytest.mark.parametrize("clips", [(0.0, 1.0), (0.02, 0.98)])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("mode", MODES)
def test_what_is_read_by_section_is_normalised_as_in_memory(
    mode: str, fill: str, dtype: type, clips: tuple[float, float]
) -> None:
    image = np.zeros((6, 64, 64), dtype)
    image[:, 16:48, 12:52] = volume()
    image[3] = 9
    chosen = {"normalize": mode, "fill": fill, "clip_percentile_low": clips[0],
              "clip_percentile_high": clips[1]}  # fmt: skip
    data = Data.model_validate({"image_transform": chosen})
    streamed, (_, whole) = stream_normalisation(image, data), fit_image(image, data)
    for name in ("low", "high", "offset", "scale"):
        assert np.allclose(getattr(streamed, name), getattr(whole, name), rtol=1e-3), name


def test_equalised_sections_have_even_contrast_and_know_no_other_section() -> None:
    image = volume()
    data = Data.model_validate({"image_transform": {"normalize": "clahe"}})
    inside, fitted = fit_image(image, data)
    result = fitted.apply(inside)
    assert inside.dtype == np.uint8
    assert result.min() == 0.0
    assert result.max() == 1.0
    # Means of 86 to 211 and spreads of 5 to 20 become alike.
    assert np.ptp(result.mean((1, 2))) < 0.1
    assert np.ptp(result.std((1, 2))) < 0.1
    image[2] = 9
    again, _ = fit_image(image, data)
    assert not again[2].any()
    assert np.array_equal(np.delete(again, 2, 0), np.delete(inside, 2, 0))
    assert np.array_equal(fit_image(image * 100.0, data)[0], again)


def test_a_tile_clips_what_most_of_it_is() -> None:
    image = np.full((70, 70), 100, np.uint8)
    image[:, ::7] = 101
    image[0, :2] = 0, 255
    # Unclipped, two neighbouring grey levels would end 52 apart.
    assert 0 < np.ptp(equalised(image)[20:50, 20:50].astype(int)) <= 4
    with pytest.raises(ValueError, match="not finite"):
        equalised(np.array([[0.0, np.nan], [1.0, 2.0]]))


def test_tissue_that_saturates_or_has_few_grey_levels_is_not_lost() -> None:
    rng = np.random.default_rng(0)
    few = rng.integers(0, 8, (3, 64, 64)).astype(np.uint8) * 30
    assert np.allclose(normalise(few), few / 210, atol=1e-6)
    two = np.zeros((3, 32, 32), np.uint8)
    two[:, 8:20, 8:20] = 200
    assert set(np.unique(normalise(two))) == {0.0, 1.0}


def test_a_checkpoint_of_before_keeps_what_it_was_trained_with() -> None:
    old = {"data": {"image_transform": {"normalize": "0-1"}, "patch_size": [4, 16, 16]}}
    kept = as_it_was_trained(old)["data"]
    assert kept["image_transform"] == {"normalize": "0-1", "fill": "zeros"}
    assert kept["patch_size"] == [4, 16, 16]
    assert as_it_was_trained({})["data"]["image_transform"]["fill"] == "zeros"
    now = {"data": {"image_transform": {"fill": "constant"}}}
    assert as_it_was_trained(now) == now
    image = np.zeros((6, 64, 64), np.uint8)
    image[:, 16:48, 12:52] = volume()
    # Padding stretched the range: the network has learnt that, so it goes on seeing it.
    assert np.allclose(normalise(image, fill="zeros"), image / image.max(), atol=1e-6)


def test_statistics_come_from_the_mask_and_a_section_without_any_from_itself() -> None:
    image = volume()
    mask = np.zeros(image.shape, bool)
    mask[1:, 8:20, 8:30] = True
    result = normalise(image, mode="z_section", mask=mask)
    for z in range(1, 6):
        assert abs(result[z][mask[z]].mean()) < 1e-4
        assert abs(result[z][mask[z]].std() - 1) < 1e-4
    assert abs(result[0].std() - 1) < 1e-4


@pytest.mark.parametrize("mode", MODES)
def test_tensors_and_arrays_become_the_same(mode: str) -> None:
    image = volume()
    ours = normalise(torch.from_numpy(image), mode=mode, clip_low=0.02, clip_high=0.98)
    assert isinstance(ours, torch.Tensor)
    array = normalise(image, mode=mode, clip_low=0.02, clip_high=0.98)
    assert np.allclose(ours.numpy(), array, atol=1e-6)


def test_what_is_fitted_on_the_volume_applies_to_it_in_any_type() -> None:
    image = volume()
    fitted = fit_normalisation(image, mode="z_section")
    assert np.allclose(fitted.apply(image), fitted.apply(image.astype(np.float64)), atol=1e-6)
    before = image.copy()
    fitted.apply(image)
    assert np.array_equal(image, before)
    with pytest.raises(ValueError, match=r"\(6, Y, X\)"):
        fitted.apply(image[:3])


def test_wrong_input_is_refused_with_a_reason() -> None:
    image = volume()
    with pytest.raises(ValueError, match="Unknown normalisation 'zscore'"):
        normalise(image, mode="zscore")
    with pytest.raises(ValueError, match=r"They are shares: 0\.01, not 1"):
        normalise(image, clip_low=1, clip_high=99)
    with pytest.raises(ValueError, match="mask has shape"):
        normalise(image, mask=np.ones((1, 2, 3)))
    with pytest.raises(ValueError, match="not finite"):
        normalise(np.full((2, 3, 4), np.nan))
    with pytest.raises(ValueError, match=r"\(Z, Y, X\)"):
        normalise(image[0])


@pytest.mark.parametrize("section", [0, 3, 5])
def test_a_voxel_that_is_no_number_is_refused_wherever_the_volume_lies(section: int) -> None:
    image = volume().astype(np.float32)
    image[section, 4, 5] = np.nan
    for fit in (fit_image, stream_normalisation):
        with pytest.raises(ValueError, match="not finite"):
            fit(image, Data())


def test_values_beyond_single_precision_are_refused() -> None:
    image = volume().astype(np.float64) * 1e300
    for fit in (fit_image, stream_normalisation):
        with pytest.raises(ValueError, match=r"to 2\.\d*e\+302, more than single precision"):
            fit(image, Data())
