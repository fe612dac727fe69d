"""Augmentations by what each one says it does, the presets, and one resampling for all warps."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from sample_patches import NM, SHAPE, applied, changed, random_patches, seeded

from hydralv_tune.numerics.augmentation import warps
from hydralv_tune.numerics.augmentation.augment import augment
from hydralv_tune.numerics.augmentation.copy_paste import PASTED
from hydralv_tune.numerics.augmentation.patches import Patches
from hydralv_tune.numerics.augmentation.registry import (
    AUGMENTATIONS,
    check_augmentation,
    resolve_preset,
)


class TestPresets:
    def test_none_runs_nothing(self) -> None:
        assert resolve_preset("none", {"flip": {"enabled": True}}) == {}

    def test_some_runs_what_is_switched_on(self) -> None:
        chosen = resolve_preset(
            "some",
            {
                "flip": {"enabled": True, "prob": 0.8},
                "rotate": {"prob": 0.9},
                "affine": {"enabled": False},
            },
        )
        assert list(chosen) == ["flip"]
        assert chosen["flip"] == {"prob": 0.8, "spatial_axis": (0, 1, 2)}

    def test_all_runs_what_is_not_switched_off(self) -> None:
        chosen = resolve_preset("all", {"cutout": {"enabled": False}, "flip": {"prob": 0.8}})
        assert set(chosen) == set(AUGMENTATIONS) - {"cutout"}
        assert chosen["flip"]["prob"] == 0.8

    def test_what_never_happens_is_left_out(self) -> None:
        quiet = dict.fromkeys(("gaussian_noise_prob", "shift_intensity_prob", "contrast_prob"), 0.0)
        chosen = resolve_preset("all", {"elastic": {"prob": 0}, "intensity": quiet})
        assert set(chosen) == set(AUGMENTATIONS) - {"elastic", "intensity"}

    def test_the_blocks_of_the_plan_are_accepted_as_they_stand(self) -> None:
        chosen = resolve_preset(
            "all",
            {
                "flip": {"enabled": True, "prob": 0.8, "spatial_axis": [0, 1, 2]},
                "rotate": {"enabled": True, "prob": 0.8, "spatial_axes": [1, 2]},
                "affine": {
                    "enabled": True,
                    "prob": 0.5,
                    "rotate_range": [0.1, 0.1, 0.1],
                    "scale_range": [0.1, 0.1, 0.1],
                    "shear_range": [0.05, 0.05, 0.05],
                },
                "intensity": {
                    "enabled": True,
                    "gaussian_noise_prob": 0.5,
                    "gaussian_noise_std": 0.03,
                    "shift_intensity_prob": 0.6,
                    "shift_intensity_offset": 0.1,
                    "contrast_prob": 0.6,
                    "contrast_range": [0.8, 1.2],
                },
                "misalignment": {"prob": 0.4, "displacement": 8, "rotate_ratio": 0.3},
                "missing_section": {"enabled": True, "prob": 0.3, "num_sections": 2},
                "motion_blur": {"prob": 0.3, "sections": [2, 2], "kernel_size": 9},
            },
        )
        assert chosen["flip"] == {"prob": 0.8, "spatial_axis": [0, 1, 2]}
        assert chosen["rotate"] == {"prob": 0.8, "spatial_axes": [1, 2]}
        assert chosen["affine"]["shear_range"] == [0.05, 0.05, 0.05]
        assert chosen["intensity"]["contrast_range"] == [0.8, 1.2]
        assert chosen["misalignment"]["rotate_ratio"] == 0.3
        assert chosen["missing_section"]["num_sections"] == 2
        assert chosen["motion_blur"]["sections"] == [2, 2]
        patches = random_patches()
        after = augment(patches, chosen, seeded())
        assert changed(patches, after).flatten(1).any(1).all()
        assert set(after.labels.unique().tolist()) <= {0, 1, 2}

    @pytest.mark.parametrize(
        ("preset", "settings", "message"),
        [
            ("most", {}, r"Unknown augmentation preset 'most'\. Known: none, some, all"),
            ("some", {"flop": {}}, r"Unknown augmentation 'flop'\. Known: affine"),
            ("none", {"flip": {"prob": 2}}, r"flip\.prob is 2, but must be a number from 0 to 1"),
            ("all", {"flip": {"enabled": "yes"}}, r"flip\.enabled is 'yes', but must be true or"),
        ],
    )
    def test_wrong_ones_are_refused(
        self, preset: str, settings: dict[str, dict[str, Any]], message: str
    ) -> None:
        with pytest.raises(ValueError, match=message):
            resolve_preset(preset, settings)

    @pytest.mark.parametrize(
        ("name", "knob", "value", "rule"),
        [
            ("flip", "spatial_axis", [0, 3], "one or more of 0"),
            ("rotate", "spatial_axes", [1, 1], "two of 0"),
            ("rotate", "spatial_axes", 1, "two of 0"),
            ("affine", "rotate_range", [0.1, 0.1], "three numbers"),
            ("affine", "scale_range", [0.1, -0.1, 0.1], "not negative"),
            ("elastic", "sigma_range", [6, 3], "the lowest and the highest"),
            ("intensity", "gaussian_noise_std", float("inf"), "finite"),
            ("intensity", "contrast_range", [0.0, 1.2], "above 0"),
            ("misalignment", "rotate_ratio", 1.2, "from 0 to 1"),
            ("missing_section", "num_sections", [1, 2.5], "whole numbers"),
            ("motion_blur", "kernel_size", 8, "an odd number from 3"),
            ("cutout", "hole_size", [4, 16], "one or three sizes"),
            ("cut_blur", "downsample_z", 1, "true or false"),
            ("cut_noise", "length_ratio", "long", "a number or a list"),
        ],
    )
    def test_knobs_out_of_range_are_refused(
        self, name: str, knob: str, value: object, rule: str
    ) -> None:
        with pytest.raises(ValueError, match=rf"{name}\.{knob} is .*{rule}"):
            check_augmentation(name, {knob: value})


class TestAugment:
    def test_nothing_chosen_returns_the_batch(self) -> None:
        patches = random_patches()
        assert augment(patches, {}, seeded()) is patches

    def test_all_at_once_is_repeatable_and_consistent(self) -> None:
        patches = random_patches(4, voxel_size_nm=NM)
        chosen = resolve_preset("all")
        first, second = (augment(patches, chosen, seeded(7)) for _ in range(2))
        for field in ("image", "labels", "edt", "mask"):
            assert torch.equal(getattr(first, field), getattr(second, field))
        assert torch.equal(first.edt > 0, first.labels > 0)
        assert first.image.isfinite().all()

    def test_a_generator_goes_on_from_its_state(self) -> None:
        patches, chosen = random_patches(), resolve_preset("all")
        generator = seeded(3)
        augment(patches, chosen, generator)
        state = generator.get_state()
        wanted = augment(patches, chosen, generator)
        restored = torch.Generator()
        restored.set_state(state)
        assert torch.equal(augment(patches, chosen, restored).image, wanted.image)

    def test_joined_warps_read_the_image_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        calls = []
        read = warps.resample
        monkeypatch.setattr(warps, "resample", lambda *a: calls.append(1) or read(*a))
        certain = {name: {"prob": 1.0} for name in ("affine", "elastic", "misalignment")}
        augment(random_patches(), certain, seeded())
        assert len(calls) == 1

    def test_what_was_applied_is_named_for_each_sample(self) -> None:
        patches = random_patches()
        drawn: list[list[str]] = [[] for _ in patches.image]
        certain = {name: {"prob": 1.0} for name in ("intensity", "misalignment")}
        augment(patches, {**certain, "flip": {"prob": 0.0}}, seeded(), drawn)
        assert [sorted(names) for names in drawn] == [["intensity", "misalignment"]] * len(drawn)

    def test_patches_that_do_not_fit_are_refused(self) -> None:
        good = random_patches()
        with pytest.raises(ValueError, match="Patches do not fit"):
            augment(Patches(good.image[:1], good.labels, good.edt, good.mask), {}, seeded())
        with pytest.raises(ValueError, match="Patches have the types"):
            augment(Patches(good.image, good.labels, good.edt, good.mask.float()), {}, seeded())

    def test_an_unknown_name_is_refused(self) -> None:
        with pytest.raises(ValueError, match="Unknown augmentation 'flop'"):
            augment(random_patches(), {"flop": {}}, seeded())


class TestIntensity:
    only_noise: ClassVar = {
        "shift_intensity_prob": 0.0,
        "contrast_prob": 0.0,
        "gaussian_noise_prob": 1.0,
    }
    only_shift: ClassVar = {
        "shift_intensity_prob": 1.0,
        "contrast_prob": 0.0,
        "gaussian_noise_prob": 0.0,
    }
    only_gamma: ClassVar = {
        "shift_intensity_prob": 0.0,
        "contrast_prob": 1.0,
        "gaussian_noise_prob": 0.0,
    }

    @pytest.mark.parametrize("span", [(0.0, 1.0), (-3.0, 3.0)], ids=str)
    def test_noise_is_a_share_of_the_range(self, span: tuple[float, float]) -> None:
        patches = random_patches(intensity_ranges=(span,) * 2)
        after = applied("intensity", patches, gaussian_noise_std=0.05, **self.only_noise)
        noise = (after.image - patches.image).std().item()
        assert noise == pytest.approx(0.05 * (span[1] - span[0]), rel=0.03)

    def test_a_shift_is_one_number_per_sample(self) -> None:
        patches = random_patches(6)
        after = applied("intensity", patches, shift_intensity_offset=0.1, **self.only_shift)
        shift = (after.image - patches.image).flatten(1)
        assert shift.std(dim=1).max() < 1e-6
        assert shift.mean(1).abs().max() <= 0.1 + 1e-6
        assert shift.mean(1).std() > 0.01

    def test_contrast_bends_between_the_same_ends(self) -> None:
        patches = random_patches(1)
        after = applied("intensity", patches, contrast_range=(2.0, 2.0), **self.only_gamma)
        low, high = patches.image.aminmax()
        wanted = ((patches.image - low) / (high - low)) ** 2 * (high - low) + low
        torch.testing.assert_close(after.image, wanted)

    def test_a_flat_image_stays_finite(self) -> None:
        flat = random_patches(1).with_image(torch.full((1, 1, *SHAPE), 0.4))
        after = applied("intensity", flat, contrast_range=(0.5, 0.5), **self.only_gamma)
        torch.testing.assert_close(after.image, flat.image)


class TestSections:
    def test_so_many_sections_go_missing_and_never_the_outer_ones(self) -> None:
        patches = random_patches(3)
        after = applied("missing_section", patches, num_sections=2, full_section_prob=1.0)
        missing = changed(patches, after).all(-1).all(-1)
        assert (missing.sum(1) == 2).all()
        assert not missing[:, [0, -1]].any()
        grey = after.image[:, 0][missing].flatten(1)
        assert (grey == grey[:, :1]).all()

    def test_a_pair_is_a_range(self) -> None:
        patches = random_patches(30)
        after = applied("missing_section", patches, num_sections=(1, 3), full_section_prob=1.0)
        counts = changed(patches, after).any(-1).any(-1).sum(1)
        assert set(counts.tolist()) == {1, 2, 3}

    def test_a_part_is_missing_at_one_side(self) -> None:
        patches = random_patches(8)
        after = applied(
            "missing_section", patches, num_sections=1, full_section_prob=0.0,
            partial_ratio_range=(0.25, 0.5),
        )  # fmt: skip
        share = changed(patches, after).float().sum((1, 2, 3)) / (40 * 40)
        assert share.min() >= 0.24
        assert share.max() <= 0.51

    def test_the_grey_lies_between_black_and_white(self) -> None:
        patches = random_patches(8, intensity_ranges=((-2.0, 4.0),) * 8)
        after = applied(
            "missing_section", patches, full_section_prob=1.0, fill_value_range=(1.0, 1.0)
        )
        assert (after.image[:, 0][changed(patches, after)] == 4.0).all()

    def test_so_many_sections_are_blurred_and_keep_their_mean(self) -> None:
        patches = random_patches(3)
        after = applied("motion_blur", patches, sections=[2, 2], kernel_size=9)
        blurred = changed(patches, after).any(-1).any(-1)
        assert (blurred.sum(1) == 2).all()
        before, now = patches.image[:, 0][blurred], after.image[:, 0][blurred]
        torch.testing.assert_close(now.mean((1, 2)), before.mean((1, 2)), atol=0.02, rtol=0)
        assert (now.std((1, 2)) < 0.7 * before.std((1, 2))).all()

    def test_the_blur_is_along_a_line(self) -> None:
        dot = torch.zeros(1, 1, *SHAPE)
        dot[..., 20, 20] = 1
        patches = random_patches(1).with_image(dot)
        after = applied("motion_blur", patches, sections=1, kernel_size=9)
        section = after.image[0, 0][changed(patches, after)[0].any(-1).any(-1)][0]
        assert section.sum() == pytest.approx(1, abs=1e-4)
        points = torch.nonzero(section > 1e-3).float()
        spread = torch.linalg.svdvals(points - points.mean(0))
        assert spread[1] < 0.35 * spread[0]
        assert 6 <= (points.max(0).values - points.min(0).values).max() <= 8


class TestBoxes:
    def test_noise_stays_in_a_box_of_the_given_share(self) -> None:
        patches = random_patches(6)
        after = applied("cut_noise", patches, length_ratio=0.5, noise_scale=0.1)
        share = changed(patches, after).float().mean((1, 2, 3))
        torch.testing.assert_close(share, torch.full((6,), 0.125), atol=0.002, rtol=0)
        assert 0.08 < (after.image - patches.image).abs().max() <= 0.1 + 1e-6

    def test_blur_stays_in_its_box_and_lowers_detail(self) -> None:
        patches = random_patches(4)
        after = applied("cut_blur", patches, length_ratio=0.5, down_ratio_range=(4.0, 4.0))
        inside = changed(patches, after)
        assert 0.1 < inside.float().mean() <= 0.126
        assert after.image[:, 0][inside].std() < 0.6 * patches.image[:, 0][inside].std()

    def test_holes_have_number_size_and_mean(self) -> None:
        patches = random_patches(5)
        after = applied("cutout", patches, num_holes=1, hole_size=(3, 8, 10))
        holes = changed(patches, after)
        assert holes.sum((1, 2, 3)).tolist() == [240] * 5
        for row in range(5):
            filled = after.image[row, 0][holes[row]]
            assert (filled == filled[0]).all()
            assert filled[0] == pytest.approx(patches.image[row].mean().item())

    def test_a_hole_larger_than_the_patch_is_the_patch(self) -> None:
        after = applied("cutout", random_patches(1), num_holes=1, hole_size=100)
        assert after.image.std() < 1e-6


class TestCopyPaste:
    def test_an_instance_is_pasted_whole_and_beside_the_others(self) -> None:
        patches = random_patches(2, (12, 64, 64))
        pasted = 0
        for seed in range(10):
            after = applied("copy_paste", patches, seed)
            for row in range(2):
                new = after.labels[row] >= PASTED
                ids = after.labels[row][new].unique()
                assert len(ids) <= 1
                if not len(ids):
                    continue
                pasted += 1
                original = patches.labels[1 - row] == ids[0] - PASTED
                assert new.sum() == original.sum()
                grown = (
                    new | new.roll(1, -1) | new.roll(-1, -1) | new.roll(1, -2) | new.roll(-1, -2)
                )
                assert not (grown & (patches.labels[row] > 0)).any()
                torch.testing.assert_close(
                    after.edt[row][new].sort().values, patches.edt[1 - row][original].sort().values
                )
        assert pasted >= 15

    def test_nothing_is_pasted_outside_the_mask(self) -> None:
        patches = random_patches(2, (12, 64, 64))
        mask = torch.zeros_like(patches.mask)
        mask[..., :34] = True
        half = Patches(patches.image, patches.labels, patches.edt, mask)
        for seed in range(10):
            after = applied("copy_paste", half, seed)
            assert not ((after.labels >= PASTED) & ~mask).any()

    def test_instances_that_the_rim_cuts_are_never_taken(self) -> None:
        patches = random_patches(2, (8, 40, 40))
        labels = torch.zeros_like(patches.labels)
        labels[:, 2:6, :9, 10:20] = 3
        cut = Patches(patches.image, labels, (labels > 0).float() * 2 - 1, patches.mask)
        for seed in range(8):
            assert torch.equal(applied("copy_paste", cut, seed).labels, labels)

    def test_a_large_instance_is_not_taken(self) -> None:
        patches = random_patches(2, (12, 64, 64))
        after = applied("copy_paste", patches, 0, max_obj_ratio=1e-4)
        assert torch.equal(after.labels, patches.labels)

    def test_brightness_follows_the_target_section(self) -> None:
        patches = random_patches(2, (12, 64, 64))
        lit = (patches.labels > 0).float()[:, None] * 0.5 + torch.tensor([1.0, 5.0]).reshape(
            2, 1, 1, 1, 1
        )
        for seed in range(4):
            after = applied("copy_paste", patches.with_image(lit), seed)
            for row, level in enumerate((1.0, 5.0)):
                new = after.labels[row] >= PASTED
                if new.any():
                    values = after.image[row, 0][new]
                    torch.testing.assert_close(values, torch.full_like(values, level + 0.5))


def test_a_line_kernel_sums_to_one_in_every_direction_and_lies_along_it() -> None:
    from hydralv_tune.numerics.augmentation.intensity import _line_kernels

    angles = np.linspace(0, math.pi, 9).tolist()
    kernels = _line_kernels(7, angles)
    torch.testing.assert_close(kernels.sum((1, 2)), torch.ones(9))
    assert kernels.min() >= 0
    torch.testing.assert_close(kernels, kernels.flip(1, 2), atol=0.03, rtol=0)
    rows = torch.arange(7.0) - 3
    for kernel, angle in zip(kernels, angles, strict=True):
        along = rows[:, None] * math.sin(angle) + rows * math.cos(angle)
        across = rows[:, None] * math.cos(angle) - rows * math.sin(angle)
        assert (kernel * along**2).sum() > 3
        assert (kernel * across**2).sum() < 0.4
