"""The phantom is what it says, and detecting every dark ring in it does not pay."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from scipy import ndimage

from hydralv_tune.numerics.metrics import scores
from hydralv_tune.numerics.phantom.bodies import CONNECT_26
from hydralv_tune.numerics.phantom.volume import Phantom, make_phantom

SMALL = (24, 128, 128)


@functools.cache
def small(seed: int = 0) -> Phantom:
    """Return the phantom of the demo."""
    return make_phantom(SMALL, instances=14, seed=seed)


@functools.cache
def default() -> Phantom:
    """Return the phantom of the plan's size."""
    return make_phantom()


def sizes_of(label: np.ndarray) -> np.ndarray:
    """Return the voxels of each id."""
    return np.bincount(label.ravel())[1:]


@pytest.mark.slow
def test_the_default_has_the_figures_of_the_plan() -> None:
    made = default()
    sizes = sizes_of(made.label)
    assert made.image.shape == made.label.shape == made.mask.shape == (51, 516, 516)
    assert (made.image.dtype, made.label.dtype, made.mask.dtype) == (
        np.dtype("uint8"),
        np.dtype("uint16"),
        np.dtype("uint8"),
    )
    assert made.voxel_size_nm == (30.0, 8.0, 8.0)
    assert len(sizes) == 51
    assert (sizes.min(), sizes.max()) == (224, 1396)
    assert np.median(sizes) == pytest.approx(555, abs=5)
    assert sizes.mean() == pytest.approx(596, abs=10)
    assert made.mask.mean() == pytest.approx(0.021, abs=1e-4)
    assert (made.label > 0).sum() / made.mask.sum() == pytest.approx(0.107, abs=0.005)


@pytest.mark.slow
def test_sections_differ_in_brightness_as_in_the_plan() -> None:
    means = default().image.mean(axis=(1, 2))
    assert means.min() == pytest.approx(86, abs=2)
    assert means.max() == pytest.approx(211, abs=2)
    assert np.abs(np.diff(means)).max() > 15


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_instances_are_whole_apart_and_inside_the_mask(seed: int) -> None:
    made = small(seed)
    sizes = sizes_of(made.label)
    assert len(sizes) == 14
    assert ((sizes >= 224) & (sizes <= 1396)).all()
    assert (made.mask[made.label > 0] == 1).all()
    assert not ((made.label > 0) & (made.distractors > 0)).any()
    for one in range(1, 15):
        assert ndimage.label(made.label == one, CONNECT_26)[1] == 1


@pytest.mark.slow
def test_some_instances_touch() -> None:
    label = default().label
    pairs = set()
    for axis in range(3):
        a, b = (np.moveaxis(label, axis, 0)[s] for s in (slice(None, -1), slice(1, None)))
        meets = (a != b) & (a > 0) & (b > 0)
        pairs |= set(zip(a[meets].tolist(), b[meets].tolist(), strict=True))
    assert 2 <= len({tuple(sorted(pair)) for pair in pairs}) <= 25


def test_vesicles_are_flat_in_voxels_and_round_in_nanometres() -> None:
    boxes = ndimage.find_objects(small().label)
    extent = np.median([[s.stop - s.start for s in box] for box in boxes], axis=0)
    height, width, length = extent * (30, 8, 8)
    assert extent[0] < 0.5 * extent[1]
    assert height / np.sqrt(width * length) == pytest.approx(1, abs=0.3)


def test_the_same_seed_gives_the_same_volume_and_another_another() -> None:
    again = make_phantom(SMALL, instances=14, seed=0)
    for name in ("image", "label", "mask", "distractors"):
        np.testing.assert_array_equal(getattr(again, name), getattr(small(), name))
    assert (small(1).image != small(0).image).mean() > 0.5
    assert (small(1).label != small(0).label).any()


@pytest.mark.parametrize(
    ("shape", "instances"),
    [
        ((8, 48, 48), 1),
        ((12, 96, 96), 5),
        ((16, 96, 96), 6),
        ((20, 97, 131), 9),
        ((30, 64, 200), 9),
    ],
)
@pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2))])
def test_small_shapes_hold_the_instances_asked_for(
    shape: tuple[int, int, int], instances: int, seed: int
) -> None:
    made = make_phantom(shape, instances=instances, seed=seed)
    assert made.image.shape == shape
    assert len(np.unique(made.label)) - 1 == instances
    assert made.mask.mean() < 0.5


@pytest.mark.parametrize(
    ("shape", "instances", "words"),
    [
        ((4, 128, 128), 3, ["(4, 128, 128)", "(8, 48, 48)"]),
        ((24, 40, 128), 3, ["too small"]),
        ((12, 96, 96), 500, ["500 instances", "at most"]),
        ((12, 96, 96), 0, ["instances is 0"]),
    ],
)
def test_what_cannot_be_is_refused(
    shape: tuple[int, int, int], instances: int, words: list[str]
) -> None:
    with pytest.raises(ValueError, match=r"instances|shape") as caught:
        make_phantom(shape, instances=instances)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.slow
def test_distractors_lie_inside_the_mask_and_outside() -> None:
    made = default()
    inside = np.unique(made.distractors[made.mask > 0])
    outside = np.unique(made.distractors[made.mask == 0])
    assert len(inside) - 1 > 0.6 * 51
    assert len(outside) - 1 > 300


@pytest.mark.parametrize("which", [small, pytest.param(default, marks=pytest.mark.slow)])
def test_outlining_every_body_perfectly_is_still_wrong(which: object) -> None:
    made = which()  # type: ignore[operator]
    everything = made.label.astype(np.int32) + (made.distractors.astype(np.int32) + 1000) * (
        made.distractors > 0
    )
    scored = scores.score_labels(prediction=everything, truth=made.label, mask=made.mask > 0)
    assert scored.recall_iou50 == 1
    assert scored.f1_iou50 < 0.85


def by_section(made: Phantom) -> np.ndarray:
    """Return the image with median 0 and deviation 1 of the mask in every section."""
    image = made.image.astype(np.float32)
    for section, mask in zip(image, made.mask > 0, strict=True):
        values = section[mask] if mask.any() else section
        section -= np.median(values)
        section /= max(float(values.std()), 1.0)
    return image


def sized(labels: np.ndarray) -> np.ndarray:
    """Return the labels whose size is that of a vesicle."""
    sizes = np.bincount(labels.ravel())
    keep = (sizes >= 100) & (sizes <= 3000)
    keep[0] = False
    return np.where(keep[labels], labels, 0)


def dark_blobs(image: np.ndarray, mask: np.ndarray, level: float) -> np.ndarray:
    """Return what stands out in a Laplacian of Gaussian of a vesicle's size."""
    response = ndimage.gaussian_laplace(image, (1.3, 5, 5)) * 25
    return sized(ndimage.label((response > level) & mask)[0])


def filled_rings(image: np.ndarray, mask: np.ndarray, level: float) -> np.ndarray:
    """Return dark rings with their lumen, found section by section."""
    dark = ndimage.gaussian_filter(image, (0.5, 1, 1)) < -level
    dark &= ndimage.binary_erosion(mask, np.ones((1, 3, 3)), iterations=2)
    filled = np.stack([ndimage.binary_fill_holes(section) for section in dark])
    return sized(ndimage.label(ndimage.binary_opening(filled, np.ones((1, 3, 3))))[0])


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("detector", [dark_blobs, filled_rings])
def test_a_detector_of_dark_rings_scores_badly(detector: object, seed: int) -> None:
    made = small(seed)
    image, mask = by_section(made), made.mask > 0
    best = max(
        scores.score_labels(
            prediction=detector(image, mask, level),  # type: ignore[operator]
            truth=made.label,
            mask=mask,
        ).f1_iou50
        for level in (0.2, 0.4, 0.7, 1.0, 1.5, 2.0)
    )
    assert best < 0.6


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_lumen_tells_vesicles_from_their_likes(seed: int) -> None:
    """What a network must learn is there: the lumen, seen against the section around it."""
    made = small(seed)
    image = by_section(made)
    core = (0.5, 1.5, 1.5)
    smooth = ndimage.gaussian_filter(image, core)

    def lumens(labels: np.ndarray) -> np.ndarray:
        ids = np.unique(labels[(labels > 0) & (made.mask > 0)])
        inside = ndimage.grey_erosion(labels, footprint=np.ones((1, 7, 7)))
        return np.asarray([smooth[inside == one].mean() for one in ids if (inside == one).any()])

    vesicles, others = lumens(made.label), lumens(made.distractors)
    between = (others[:, None] > vesicles.max() - 0.15) | (others[:, None] < vesicles.min() + 0.15)
    assert between.mean() > 0.85
