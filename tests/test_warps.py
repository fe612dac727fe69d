"""Warps by their geometry: rigid in nanometres, flat sections, and one faithful resampling."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from sample_patches import NM, SHAPE, applied, changed, random_patches, seeded
from torch import Tensor

from hydralv_tune.numerics.augmentation import warps
from hydralv_tune.numerics.augmentation.augment import apply_one
from hydralv_tune.numerics.augmentation.patches import Patches
from hydralv_tune.numerics.augmentation.registry import AUGMENTATIONS


class TestFlipAndRotate:
    def test_only_the_named_axes_are_mirrored(self) -> None:
        patches = random_patches()
        after = applied("flip", patches, spatial_axis=[2])
        assert torch.equal(after.image, patches.image.flip(-1))
        assert torch.equal(after.mask, patches.mask)

    def test_every_set_of_axes_occurs_and_never_the_empty_one(self) -> None:
        patches = random_patches(1, (3, 4, 5))
        seen = set()
        for seed in range(80):
            image = applied("flip", patches, seed).image
            for axes in range(8):
                dims = [-3 + axis for axis in range(3) if axes >> axis & 1]
                if torch.equal(image, patches.image.flip(dims)):
                    seen.add(axes)
        assert seen == set(range(1, 8))

    def test_prob_is_the_share_of_samples(self) -> None:
        patches = random_patches(400, (1, 2, 3))
        after = apply_one(AUGMENTATIONS["flip"], patches, {"prob": 0.3}, seeded())
        share = changed(patches, after).flatten(1).any(1).float().mean().item()
        assert share == pytest.approx(0.3, abs=0.07)

    def test_a_square_section_takes_all_three_turns(self) -> None:
        patches = random_patches(1)
        turns = {
            k
            for seed in range(30)
            for k in range(4)
            if torch.equal(
                applied("rotate", patches, seed).image, torch.rot90(patches.image, k, (-2, -1))
            )
        }
        assert turns == {1, 2, 3}

    def test_another_section_is_turned_by_180_alone(self) -> None:
        patches = random_patches(1, (10, 40, 36))
        for seed in range(5):
            after = applied("rotate", patches, seed)
            assert torch.equal(after.image, torch.rot90(patches.image, 2, (-2, -1)))

    def test_a_plane_with_z_turns_the_voxel_sizes_with_the_voxels(self) -> None:
        patches = random_patches(1, (40, 40, 36), voxel_size_nm=NM)
        turns = set()
        for seed in range(20):
            after = applied("rotate", patches, seed, spatial_axes=(0, 1))
            k = next(
                k for k in (1, 2, 3)
                if torch.equal(after.image, torch.rot90(patches.image, k, (-3, -2)))
            )  # fmt: skip
            assert after.voxel_sizes_nm == ((8.0, 30.0, 8.0) if k % 2 else NM,)
            turns.add(k)
        assert turns == {1, 2, 3}


class TestAffine:
    def coordinates(self, seed: int = 0, size: Any = NM, **knobs: Any) -> Tensor:
        """Return where voxels are read from after an affine warp (3, Z, Y, X)."""
        where = warps.Coordinates.identity(random_patches(1, voxel_size_nm=size), [0])
        full = {**AUGMENTATIONS["affine"].defaults, **knobs}
        warps.affine(where, 0, full, seeded(seed))
        return where.points[0]

    def test_a_turn_is_rigid_in_nanometres(self) -> None:
        still = {"scale_range": (0, 0, 0), "shear_range": (0, 0, 0)}
        points = self.coordinates(rotate_range=(0.3, 0.3, 0.3), **still)
        size = torch.tensor(NM)[:, None]
        corners = torch.tensor([[0, 0, 0], [9, 0, 0], [0, 39, 0], [0, 0, 39], [9, 39, 39]])
        before = corners.T * size
        after = torch.stack([points[:, z, y, x] for z, y, x in corners.tolist()], 1) * size
        torch.testing.assert_close(
            torch.cdist(after.T, after.T), torch.cdist(before.T, before.T), rtol=1e-4, atol=1e-2
        )
        assert not torch.allclose(before, after)

    def test_a_tilt_moves_few_sections_at_30_by_8_nm_and_more_at_unit_voxels(self) -> None:
        knobs = {"rotate_range": (0, 0.1, 0), "scale_range": (0, 0, 0), "shear_range": (0, 0, 0)}
        z = torch.arange(10.0)[:, None, None]
        physical, unit = (
            (self.coordinates(1, size, **knobs)[0] - z).abs().max() for size in (NM, None)
        )
        assert unit / physical == pytest.approx(30 / 8, rel=0.05)

    def test_a_turn_about_z_leaves_sections_alone(self) -> None:
        knobs = {"rotate_range": (0.5, 0, 0), "scale_range": (0, 0, 0), "shear_range": (0, 0, 0)}
        points = self.coordinates(**knobs)
        torch.testing.assert_close(points[0], torch.arange(10.0)[:, None, None].expand(SHAPE))

    def test_scale_is_per_axis_about_the_middle(self) -> None:
        knobs = {"rotate_range": (0, 0, 0), "scale_range": (0, 0.2, 0), "shear_range": (0, 0, 0)}
        points = self.coordinates(**knobs)
        factor = (points[1, 0, 39, 0] - points[1, 0, 0, 0]) / 39
        assert 0.8 <= factor <= 1.2
        assert factor != 1
        assert points[1, 0, :, 0].mean() == pytest.approx(19.5, abs=1e-3)
        assert points[2, 0, 0, 39] == 39

    def test_each_sample_of_a_batch_is_warped_in_its_own_voxel_size(self) -> None:
        sizes = (NM, (8.0, 8.0, 8.0), None)
        patches = random_patches(3)
        mixed = replace(patches, voxel_sizes_nm=sizes)
        knobs = {**AUGMENTATIONS["affine"].defaults, "rotate_range": (0.3, 0.3, 0.3)}
        smooth = {"sigma_range": 4.0, "magnitude_range": 15.0}
        for row, size in enumerate(sizes):
            for warp, full in ((warps.affine, knobs), (warps.deform, smooth)):
                where = warps.Coordinates.identity(mixed, [1, 2, 0])
                alone = warps.Coordinates.identity(random_patches(1, voxel_size_nm=size), [0])
                index = where.rows.index(row)
                warp(where, index, full, seeded(5))
                warp(alone, 0, full, seeded(5))
                torch.testing.assert_close(where.points[index], alone.points[0])

    def test_what_comes_from_outside_is_masked_out(self) -> None:
        patches = random_patches(1, voxel_size_nm=NM)
        knobs = {
            "rotate_range": (0, 0, 0),
            "scale_range": (0.5, 0.5, 0.5),
            "shear_range": (0, 0, 0),
        }
        for seed in range(6):
            where = warps.Coordinates.identity(patches, [0])
            warps.affine(where, 0, knobs, seeded(seed))
            points = where.points[0].clone()
            limits = torch.tensor(SHAPE)[:, None, None, None] - 0.5
            inside = ((points >= -0.5) & (points <= limits)).all(0)
            assert torch.equal(warps.resample(patches, where).mask[0], inside)


class TestElastic:
    def field(self, seed: int, sigma: float, strength: float) -> Tensor:
        shape = (12, 96, 96)
        where = warps.Coordinates.identity(random_patches(1, shape, voxel_size_nm=NM), [0])
        before = where.points[0].clone()
        warps.deform(where, 0, {"sigma_range": sigma, "magnitude_range": strength}, seeded(seed))
        return where.points[0] - before

    def test_sections_stay_flat(self) -> None:
        assert (self.field(0, 4.0, 20.0)[0] == 0).all()

    @pytest.mark.parametrize(("sigma", "strength"), [(3.0, 10.0), (6.0, 20.0)])
    def test_its_strength_is_that_of_a_smoothed_uniform_field(
        self, sigma: float, strength: float
    ) -> None:
        from scipy.ndimage import gaussian_filter

        random = np.random.default_rng(0)
        reference = gaussian_filter(random.uniform(-1, 1, (512, 512)), sigma) * strength
        rms = self.field(1, sigma, strength)[1:].std().item()
        assert rms == pytest.approx(reference.std(), rel=0.1)

    def test_it_is_smooth_enough_not_to_fold(self) -> None:
        # Stronger than the default range: neighbours never swap places.
        steps = [self.field(seed, 3.0, 40.0)[2].diff(dim=-1).min() for seed in range(8)]
        assert min(steps) > -1

    def test_neighbouring_sections_move_alike(self) -> None:
        field = self.field(2, 6.0, 20.0)[1]
        near = (field[1:] - field[:-1]).pow(2).mean()
        far = (field[6:] - field[:-6]).pow(2).mean()
        assert near < 0.5 * far


class TestMisalignment:
    def moved(self, seed: int, **knobs: Any) -> Tensor:
        where = warps.Coordinates.identity(random_patches(1), [0])
        before = where.points[0].clone()
        warps.misalign(where, 0, {"displacement": 8, "rotate_ratio": 0.0, **knobs}, seeded(seed))
        return where.points[0] - before

    def test_a_shift_is_whole_and_bounded(self) -> None:
        shifts = torch.stack([self.moved(seed) for seed in range(20)])
        assert (shifts == shifts.round()).all()
        assert shifts.abs().max() in (7, 8)
        assert (shifts[:, 0] == 0).all()

    def test_one_section_slips_or_all_that_follow_move(self) -> None:
        counts = set()
        for seed in range(60):
            sections = self.moved(seed).abs().sum((0, 2, 3)) > 0
            moved = torch.nonzero(sections).flatten().tolist()
            if moved:
                assert moved[0] >= 1
                assert moved in ([moved[0]], list(range(moved[0], 10)))
                counts.add(len(moved) == 1)
        assert counts == {True, False}

    def test_a_turn_moves_the_rim_by_at_most_the_displacement(self) -> None:
        moved = torch.stack([self.moved(seed, rotate_ratio=1.0) for seed in range(20)])
        assert 4 < moved[:, 1:, :, :, 0].abs().max() <= 8.5
        assert moved[:, 1:, :, 20, 20].abs().max() < 1

    def test_a_shift_alone_keeps_grey_values(self) -> None:
        patches = random_patches(1)
        after = applied("misalignment", patches, 3, rotate_ratio=0.0)
        inside = after.mask[0]
        values = torch.sort(after.image[0, 0][inside]).values
        pool = torch.sort(patches.image.flatten()).values
        nearest = pool[torch.searchsorted(pool, values).clamp(max=len(pool) - 1)]
        assert (nearest - values).abs().median() < 1e-4


class TestResample:
    def test_whole_coordinates_give_the_voxels_themselves(self) -> None:
        patches = random_patches(2)
        after = warps.resample(patches, warps.Coordinates.identity(patches, [0, 1]))
        torch.testing.assert_close(after.image, patches.image, atol=2e-4, rtol=0)
        torch.testing.assert_close(after.edt, patches.edt, atol=2e-4, rtol=0)
        assert torch.equal(after.labels, patches.labels)
        assert torch.equal(after.mask, patches.mask)

    def test_it_equals_sampling_in_three_dimensions(self) -> None:
        patches = random_patches(1)
        points = torch.rand((1, 3, *SHAPE), generator=seeded(2))
        last = torch.tensor(SHAPE)[None, :, None, None, None] - 1
        where = warps.Coordinates([0], points * last, SHAPE, [(1.0, 1.0, 1.0)])
        grid = (points * 2 - 1).flip(1).permute(0, 2, 3, 4, 1)
        wanted = torch.nn.functional.grid_sample(patches.image, grid, align_corners=True)
        after = warps.resample(patches, where)
        torch.testing.assert_close(after.image, wanted, atol=1e-3, rtol=0)

    def test_large_ids_survive(self) -> None:
        patches = random_patches(1)
        large = Patches(patches.image, patches.labels * (2**30 - 1), patches.edt, patches.mask)
        after = applied("affine", large, 1)
        assert set(after.labels.unique().tolist()) <= {0, 2**30 - 1, 2**31 - 2}

    def test_samples_that_are_not_chosen_stay_bit_for_bit(self) -> None:
        patches = random_patches(3)
        where = warps.Coordinates.identity(patches, [1])
        warps.affine(where, 0, AUGMENTATIONS["affine"].defaults, seeded())
        after = warps.resample(patches, where)
        for field in ("image", "labels", "edt", "mask"):
            for row in (0, 2):
                assert torch.equal(getattr(after, field)[row], getattr(patches, field)[row])
        assert not torch.equal(after.image[1], patches.image[1])

    def test_what_lies_outside_is_mirrored_not_black(self) -> None:
        patches = random_patches(1)
        where = warps.Coordinates.identity(patches, [0])
        where.points[0, 2] += 5
        after = warps.resample(patches, where)
        torch.testing.assert_close(
            after.image[..., -5:], patches.image[..., -6:-1].flip(-1), atol=2e-4, rtol=0
        )
        assert not after.mask[..., -5:].any()
        assert after.mask[..., :-5].all()
