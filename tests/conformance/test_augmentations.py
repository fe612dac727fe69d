"""Every augmentation of the table: aligned, repeatable, off at probability 0, and fit for a device.

The landmark volume's image is a function of its labels, so after any augmentation that moves
voxels the one must still follow from the other.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hydralv_tune.numerics.augmentation.augment import apply_one, augment
from hydralv_tune.numerics.augmentation.copy_paste import PASTED
from hydralv_tune.numerics.augmentation.patches import Patches
from hydralv_tune.numerics.augmentation.registry import (
    AUGMENTATIONS,
    check_augmentation,
    resolve_preset,
)
from hydralv_tune.numerics.targets import derive_targets, instance_edt

MOVES_VOXELS = {"copy_paste", "flip", "rotate", "misalignment", "elastic", "affine"}
FIELDS = ("image", "labels", "edt", "mask")


@pytest.fixture(params=list(AUGMENTATIONS))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def always(name: str) -> dict[str, Any]:
    """Return the knobs with which it certainly happens."""
    knobs = AUGMENTATIONS[name].defaults
    return {
        **knobs,
        **{
            knob: 1.0
            for knob in knobs
            if knob == "prob" or (name == "intensity" and knob.endswith("_prob"))
        },
    }


def seen(labels: Tensor) -> Tensor:
    """Return the image of labels."""
    return ((labels.bitwise_and(PASTED - 1)) * 7 % 11).float() / 11 + 0.2 * (labels > 0)


def landmarks(batch: int = 3, shape: tuple[int, int, int] = (16, 64, 64)) -> Patches:
    """Return patches of a few ellipsoids, with what lies in one corner masked out."""
    random = np.random.default_rng(3)
    z, y, x = np.indices(shape)
    labels = np.zeros((batch, *shape), dtype=np.int32)
    for row in range(batch):
        for identity in range(1, 7):
            centre = [random.uniform(0.15, 0.85) * n for n in shape]
            radius = (3.6, random.uniform(5, 7), random.uniform(5, 7))
            inside = (
                ((z - centre[0]) / radius[0]) ** 2
                + ((y - centre[1]) / radius[1]) ** 2
                + ((x - centre[2]) / radius[2]) ** 2
            ) <= 1
            labels[row][inside & (labels[row] == 0)] = 10 * row + identity
    edt = np.stack([instance_edt(volume) for volume in labels])
    mask = torch.ones(labels.shape, dtype=torch.bool)
    mask[:, :, :6, :6] = False
    tensor = torch.from_numpy(labels)
    return Patches(
        image=seen(tensor)[:, None],
        labels=tensor,
        edt=torch.from_numpy(edt),
        mask=mask,
        voxel_sizes_nm=((30.0, 8.0, 8.0),) * batch,
    )


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def same(first: Patches, second: Patches) -> bool:
    return all(torch.equal(getattr(first, field), getattr(second, field)) for field in FIELDS)


def far_from_any_edge(labels: Tensor) -> Tensor:
    """Return voxels with one label alone around them, where interpolation cannot mix."""
    values = labels.bitwise_and(PASTED - 1).float()[:, None]
    high = F.max_pool3d(values, (3, 5, 5), 1, (1, 2, 2))
    low = -F.max_pool3d(-values, (3, 5, 5), 1, (1, 2, 2))
    return (high == low)[:, 0]


@pytest.mark.parametrize("seed", range(4))
def test_image_labels_and_distance_stay_aligned(name: str, seed: int) -> None:
    before = landmarks()
    after = apply_one(AUGMENTATIONS[name], before, always(name), seeded(seed))
    if name not in MOVES_VOXELS:
        for field in ("labels", "edt", "mask"):
            assert torch.equal(getattr(before, field), getattr(after, field))
        return
    # Outside the mask the patch is mirrored, and a mirrored neighbour need not be a neighbour.
    sure = far_from_any_edge(after.labels) & after.mask
    error = (after.image[:, 0] - seen(after.labels)).abs()
    assert (sure & (after.labels > 0)).sum() > 200
    assert error[sure].max() < 2e-3
    assert torch.equal(after.edt > 0, after.labels > 0)
    assert (after.edt[after.labels == 0] == -1).all()
    assert after.edt.max() <= 1


@pytest.mark.parametrize("name", ["flip", "rotate", "copy_paste"], indirect=True)
def test_a_rigid_move_takes_the_exact_distance_along(name: str) -> None:
    before = landmarks()
    after = apply_one(AUGMENTATIONS[name], before, always(name), seeded(1))
    assert not torch.equal(before.edt, after.edt)
    for labels, edt in zip(after.labels.numpy(), after.edt.numpy(), strict=True):
        np.testing.assert_allclose(edt, instance_edt(labels), atol=1e-5)


@pytest.mark.parametrize("name", ["affine", "elastic"], indirect=True)
def test_a_smooth_warp_takes_the_distance_along_nearly(name: str) -> None:
    after = apply_one(AUGMENTATIONS[name], landmarks(), always(name), seeded(1))
    for labels, edt in zip(after.labels.numpy(), after.edt.numpy(), strict=True):
        inside = labels > 0
        assert np.abs(edt - instance_edt(labels))[inside].mean() < 0.15


def test_it_changes_something_when_it_must(name: str) -> None:
    before = landmarks()
    results = [apply_one(AUGMENTATIONS[name], before, always(name), seeded(s)) for s in range(3)]
    assert not any(torch.equal(before.image, after.image) for after in results)


def test_probability_0_is_the_identity(name: str) -> None:
    before = landmarks()
    zero = {k: 0.0 for k in AUGMENTATIONS[name].defaults if k == "prob" or k.endswith("y_prob")}
    assert same(before, apply_one(AUGMENTATIONS[name], before, zero, seeded()))
    assert same(before, augment(before, {name: {"prob": 0.0}}, seeded()))


def test_one_seed_gives_one_result_and_another_another(name: str) -> None:
    before = landmarks()
    first, second, third = (
        apply_one(AUGMENTATIONS[name], before, always(name), seeded(s)) for s in (5, 5, 6)
    )
    assert same(first, second)
    assert not same(first, third)


def test_shapes_types_and_input_are_kept(name: str) -> None:
    before = landmarks()
    copies = {field: getattr(before, field).clone() for field in FIELDS}
    after = apply_one(AUGMENTATIONS[name], before, always(name), seeded(2))
    after.check()
    assert after.image.isfinite().all()
    for field, copy in copies.items():
        assert torch.equal(getattr(before, field), copy)
        assert getattr(after, field).shape == copy.shape
        assert getattr(after, field).dtype == copy.dtype
    assert after.voxel_sizes_nm == before.voxel_sizes_nm


def test_it_invents_no_instance(name: str) -> None:
    before = landmarks()
    after = apply_one(AUGMENTATIONS[name], before, always(name), seeded(2))
    pool = set(before.labels.unique().tolist())
    for row, labels in enumerate(after.labels):
        own = set(before.labels[row].unique().tolist()) | {0}
        known = own | ({i | PASTED for i in pool} if name == "copy_paste" else set())
        assert set(labels.unique().tolist()) <= known


def test_targets_follow_from_the_result(name: str) -> None:
    after = apply_one(AUGMENTATIONS[name], landmarks(), always(name), seeded(2))
    targets = derive_targets(after.labels, after.edt)
    assert torch.equal(targets[:, 0] > 0, targets[:, 2] > 0)
    assert targets.isfinite().all()


@pytest.mark.parametrize("shape", [(1, 24, 24), (2, 16, 16), (5, 20, 32), (4, 9, 7)], ids=str)
def test_odd_shapes_and_single_patches_work(name: str, shape: tuple[int, int, int]) -> None:
    patches = landmarks(1, shape)
    for seed in range(3):
        after = apply_one(AUGMENTATIONS[name], patches, always(name), seeded(seed))
        after.check()
        assert after.image.isfinite().all()


def test_the_host_never_asks_the_device(name: str) -> None:
    # Tensors on "meta" hold no values, so whatever would wait for one raises.
    there = landmarks()
    there = Patches(*(getattr(there, f).to("meta") for f in FIELDS), there.voxel_sizes_nm)
    after = apply_one(AUGMENTATIONS[name], there, always(name), seeded())
    assert after.image.device.type == "meta"
    assert after.image.shape == there.image.shape


def test_on_a_gpu_it_runs_without_waiting_and_repeats(name: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    there = landmarks()
    there = Patches(*(getattr(there, f).cuda() for f in FIELDS), there.voxel_sizes_nm)
    apply_one(AUGMENTATIONS[name], there, always(name), seeded(1))
    torch.cuda.set_sync_debug_mode("error")
    try:
        first = apply_one(AUGMENTATIONS[name], there, always(name), seeded(1))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    second = apply_one(AUGMENTATIONS[name], there, always(name), seeded(1))
    assert torch.equal(first.labels, second.labels)
    torch.testing.assert_close(first.image, second.image)


def test_each_sample_is_drawn_on_its_own(name: str) -> None:
    patches = landmarks(1)
    many = Patches(
        *(getattr(patches, f).repeat(6, *[1] * (getattr(patches, f).ndim - 1)) for f in FIELDS)
    )
    after = apply_one(AUGMENTATIONS[name], many, {**always(name), "prob": 0.5}, seeded(4))
    changed = [not torch.equal(a, b) for a, b in zip(many.image, after.image, strict=True)]
    assert any(changed)
    assert not all(changed)
    images = [after.image[row] for row in range(6) if changed[row]]
    if name != "flip":
        assert not all(torch.equal(images[0], image) for image in images[1:]) or len(images) == 1


def test_its_defaults_are_valid_and_not_off(name: str) -> None:
    defaults = AUGMENTATIONS[name].defaults
    check_augmentation(name, defaults)
    assert defaults["prob"] > 0
    assert name in resolve_preset("all")


def test_an_unknown_knob_is_refused_by_name(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} has no knob 'strength'. Known: enabled, "):
        check_augmentation(name, {"strength": 1})


@pytest.mark.parametrize("prob", [-0.1, 1.5, float("nan"), "often", True, [0.1, 0.2]], ids=str)
def test_a_wrong_probability_is_refused(name: str, prob: object) -> None:
    with pytest.raises(ValueError, match=rf"{name}\.prob is "):
        check_augmentation(name, {"prob": prob})


VALUES = (
    0, 0.0, 1, 2.5, 9, True, [0], [4], [0, 0], [1, 2], [0.0, 0.5], [2, 1], [0, 1, 2], [3, 3, 3],
    [1.0, 1.0, 1.0], "much", None,
)  # fmt: skip


def test_every_value_that_passes_the_check_can_be_run(name: str) -> None:
    """A knob that fails in training fails after hours, so whatever would is refused before."""
    accepted = 0
    for knob in AUGMENTATIONS[name].defaults:
        for value in VALUES:
            try:
                check_augmentation(name, {knob: value})
            except ValueError:
                continue
            accepted += 1
            knobs = {**always(name), knob: value}
            for seed in range(2):
                generator = torch.Generator().manual_seed(seed)
                result = apply_one(AUGMENTATIONS[name], tiny(), knobs, generator)
                result.check()
                assert result.image.isfinite().all()
    assert accepted > 2


def tiny() -> Patches:
    """Return two patches of a few voxels, each with an instance."""
    labels = torch.zeros((2, 4, 16, 16), dtype=torch.int32)
    labels[:, 1:3, 3:7, 3:7] = 3
    image = torch.rand((2, 1, 4, 16, 16), generator=torch.Generator().manual_seed(0))
    edt = torch.where(labels > 0, 1.0, -1.0)
    return Patches(image, labels, edt, torch.ones_like(labels, dtype=torch.bool))
