"""Patches are cut where they should be, normalised as in prediction, from memory and from disk."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from scipy import ndimage

from hydralv_tune.config.candidate import Data
from hydralv_tune.config.errors import ConfigError, VolumeError
from hydralv_tune.data.volumes import Volume, VolumePaths, write_array
from hydralv_tune.numerics.augmentation.augment import augment
from hydralv_tune.numerics.normalisation import equalised, fit_normalisation, normalise
from hydralv_tune.numerics.targets import instance_edt
from hydralv_tune.trial.fitted_normalisation import stream_normalisation
from hydralv_tune.trial.splits import slab, split_volumes
from hydralv_tune.trial.training import sampling_locations
from hydralv_tune.trial.training.lazy_reader import (
    LazySource,
    as_lazy,
    has_truth,
    is_lazy,
    is_too_large,
    open_volume,
    part_to_score,
    windowed,
)
from hydralv_tune.trial.training.sampling import (
    PatchSampler,
    ResidentVolume,
    crop,
    gather,
    resident_bytes,
)
from hydralv_tune.trial.training.sampling_locations import Places, find_sampling_locations

CPU = torch.device("cpu")
SIZE = (4, 16, 16)


def volume(seed: int = 0, *, masked: bool = True, name: str = "v") -> Volume:
    """Return a volume (12, 48, 56) of noise with four balls, the mask its left half."""
    rng = np.random.default_rng(seed)
    image = rng.integers(20, 230, (12, 48, 56)).astype(np.uint8)
    image[3] = 7
    label = np.zeros(image.shape, np.uint16)
    grid = np.indices(image.shape)
    for number, centre in enumerate([(4, 10, 10), (7, 30, 20), (6, 40, 12), (5, 20, 45)], 1):
        away = sum((g - c) ** 2 * w for g, c, w in zip(grid, centre, (4, 1, 1), strict=True))
        label[away < 30] = number
    mask = np.zeros(image.shape, bool)
    mask[:, :, :30] = True
    return Volume(name, image, label, mask if masked else None, (30.0, 8.0, 8.0))


def settings(**keys: object) -> Data:
    """Return `data` with small patches."""
    return Data.model_validate({"patch_size": SIZE, **keys})


def sampler(data: Data, *volumes: Volume, seed: int = 0, share: float = 0.5) -> PatchSampler:
    """Return a sampler over resident volumes."""
    sources = [ResidentVolume(v, data, CPU, 0) for v in volumes]
    return PatchSampler(sources, patch_size=SIZE, foreground_share=share, seed=seed)


def test_a_patch_is_the_volume_at_its_place() -> None:
    given = volume()
    source = ResidentVolume(given, settings(), CPU, 0)
    starts = np.array([[0, 0, 0], [8, 32, 40], [3, 7, 11]])
    patches = source.cut(starts, SIZE)
    assert patches.image.shape == (3, 1, *SIZE)
    whole = normalise(given.image)
    distance = instance_edt(given.label)
    for row, (z, y, x) in enumerate(starts.tolist()):
        box = (slice(z, z + 4), slice(y, y + 16), slice(x, x + 16))
        np.testing.assert_allclose(patches.image[row, 0].numpy(), whole[box], atol=1e-6)
        np.testing.assert_array_equal(patches.labels[row].numpy(), given.label[box])
        np.testing.assert_array_equal(patches.edt[row].numpy(), distance[box])
        np.testing.assert_array_equal(patches.mask[row].numpy(), given.mask[box])


@pytest.mark.parametrize("mode", ["0-1", "z_volume", "z_section", "none"])
def test_training_normalises_as_prediction_does(mode: str) -> None:
    given = volume()
    chosen = {"normalize": mode, "clip_percentile_low": 0.05, "clip_percentile_high": 0.95}
    source = ResidentVolume(given, settings(image_transform=chosen), CPU, 0)
    patch = source.cut(np.array([[2, 5, 9]]), SIZE).image[0, 0].numpy()
    whole = normalise(given.image, mode=mode, clip_low=0.05, clip_high=0.95)
    np.testing.assert_allclose(patch, whole[2:6, 5:21, 9:25], atol=1e-5)


@pytest.mark.parametrize("kind", [ResidentVolume, LazySource])
@pytest.mark.parametrize(
    ("mode", "ranges"),
    [
        ("none", [(20.0, 229.0), (20 / 255, 229 / 255), (20.0 - 300, 229.0 - 300)]),
        ("0-1", [(0.0, 1.0)] * 3),
        ("z_volume", [(-3.0, 3.0)] * 3),
        ("z_section", [(-3.0, 3.0)] * 3),
    ],
)
def test_black_and_white_are_those_of_the_image_that_the_network_gets(
    kind: type, mode: str, ranges: list[tuple[float, float]]
) -> None:
    given = volume()
    bits = given.image
    data = settings(image_transform={"normalize": mode})
    images = (bits, (bits / 255).astype(np.float32), bits.astype(np.int16) - 300)
    knobs = {"prob": 1.0, "contrast_prob": 0.0, "shift_intensity_prob": 1.0,
             "gaussian_noise_prob": 1.0, "gaussian_noise_std": 0.03,
             "shift_intensity_offset": 0.1}  # fmt: skip
    changes = []
    for image, expected in zip(images, ranges, strict=True):
        own = Volume("v", image, given.label, given.mask)
        source = kind(as_lazy(own) if kind is LazySource else own, data, CPU, 0)
        patch = source.cut(np.array([[4, 8, 8]]), SIZE)
        assert patch.intensity_range(0) == pytest.approx(expected)
        noisy = augment(patch, {"intensity": knobs}, torch.Generator().manual_seed(0))
        changes.append((noisy.image - patch.image) / patch.contrast(0))
    # The knobs are shares, so they change an image alike in whatever unit it comes.
    for change in changes:
        torch.testing.assert_close(change, changes[0], atol=1e-4, rtol=0)
        assert 0.01 < float(change.abs().mean()) < 0.2


def test_one_kernel_and_slices_cut_the_same() -> None:
    array = torch.arange(12 * 48 * 56).reshape(12, 48, 56)
    starts = torch.tensor([[0, 0, 0], [8, 32, 40], [1, 2, 3]])
    assert torch.equal(crop(array, starts, SIZE), gather(array, starts, SIZE))


def test_the_volume_stays_in_the_type_of_its_file() -> None:
    given = volume()
    source = ResidentVolume(given, settings(), CPU, 0)
    assert source.image.dtype == torch.uint8
    held = [source.image, source.label, source.distance, source.mask]
    assert sum(t.numel() * t.element_size() for t in held) == resident_bytes(given)


@pytest.mark.parametrize("kind", ["uint16", "int16", "float64", ">u2"])
def test_every_type_of_image_can_be_trained_on(kind: str) -> None:
    given = volume()
    wide = Volume("w", given.image.astype(kind), given.label, given.mask)
    patch = ResidentVolume(wide, settings(), CPU, 0).cut(np.array([[0, 0, 0]]), SIZE)
    np.testing.assert_allclose(
        patch.image[0, 0].numpy(), normalise(given.image)[:4, :16, :16], atol=1e-6
    )


def test_every_patch_overlaps_the_mask() -> None:
    patches = sampler(settings(), volume(), share=0.0).draw(200)
    assert patches.mask.flatten(1).any(1).all()
    # The mask ends in the middle: a fair share of patches must look beyond it.
    assert 0.1 < float((patches.mask.flatten(1).float().mean(1) < 1).float().mean()) < 0.9


def test_patches_without_a_mask_reach_every_corner_alike() -> None:
    drawn = sampler(settings(), volume(masked=False), share=0.0).draw_places(4000)
    starts = np.array([start for _, start in drawn])
    assert starts.min(0).tolist() == [0, 0, 0]
    assert starts.max(0).tolist() == [8, 32, 40]
    counts = np.bincount(starts[:, 0], minlength=9)
    assert counts.min() > 0.7 * counts.mean()


def test_the_share_centred_on_an_instance_is_kept_and_every_instance_is_as_likely() -> None:
    given = volume()
    everything = sampler(settings(), given, share=1.0)
    patches = everything.draw(300)
    centres = patches.labels[:, SIZE[0] // 2, SIZE[1] // 2, SIZE[2] // 2]
    # Instance 4 lies outside the mask; the others are clear of the rim, so no patch was moved.
    counts = torch.bincount(centres, minlength=5).tolist()
    assert counts[0] == 0
    assert counts[4] == 0
    assert min(counts[1:4]) > 70
    half = sampler(settings(), given, share=0.5).draw(400)
    hit = (half.labels[:, SIZE[0] // 2, SIZE[1] // 2, SIZE[2] // 2] > 0).float().mean()
    assert 0.45 < float(hit) < 0.7


def test_draws_follow_the_seed_and_go_on_from_a_state() -> None:
    one, two = (sampler(settings(), volume(), seed=3) for _ in range(2))
    assert one.draw_places(5) == two.draw_places(5)
    state = one.state_dict()
    expected = one.draw_places(5)
    two.draw_places(7)
    two.load_state_dict(state)
    assert two.draw_places(5) == expected


def test_several_volumes_are_drawn_by_the_voxels_that_count() -> None:
    small = replace(volume(1, name="small"), voxel_size_nm=(8.0, 8.0, 8.0))
    large = volume(2, masked=False, name="large")
    large = replace(large, image=(large.image / 255).astype(np.float32))
    both = sampler(settings(image_transform={"normalize": "none"}), small, large, share=0.0)
    drawn = [number for number, _ in both.draw_places(3000)]
    assert np.mean(drawn) == pytest.approx(56 / (56 + 30), abs=0.03)
    sizes = {number: source.voxel_size_nm for number, source in enumerate(both.sources)}
    assert len(set(sizes.values())) == 2
    # The rows of a batch keep the order in which they were drawn.
    state = both.state_dict()
    drawn_places = both.draw_places(12)
    both.load_state_dict(state)
    patches = both.draw(12)
    for row, (number, (z, y, x)) in enumerate(drawn_places):
        own = (small, large)[number].label[z : z + 4, y : y + 16, x : x + 16]
        np.testing.assert_array_equal(patches.labels[row].numpy(), own)
        assert patches.voxel_sizes_nm[row] == sizes[number]
        assert patches.contrast(row) == pytest.approx((209, 209 / 255)[number], rel=0.05)


@pytest.mark.parametrize("mode", ["reflect", "constant", "replicate"])
def test_padding_adds_image_but_nothing_that_counts(mode: str) -> None:
    given = volume()
    data = settings(pad_size=[2, 5, 6], pad_mode=mode)
    source = ResidentVolume(given, data, CPU, 0)
    assert source.places.shape == (16, 58, 68)
    corner = source.cut(np.array([[0, 0, 0]]), SIZE)
    assert not corner.mask[0, :2].any()
    assert not corner.labels[0, :2].any()
    assert (corner.edt[0, :2] == -1).all()
    names = {"reflect": "reflect", "constant": "constant", "replicate": "edge"}
    if mode != "constant":
        padded = np.pad(normalise(given.image), [(2, 2), (5, 5), (6, 6)], mode=names[mode])
        np.testing.assert_allclose(
            corner.image[0, 0].numpy(), padded[:4, :16, :16], atol=1e-6
        )  # fmt: skip
    inner = source.cut(np.array([[2, 5, 6]]), SIZE)
    np.testing.assert_array_equal(inner.labels[0].numpy(), given.label[:4, :16, :16])


def test_a_patch_larger_than_the_volume_is_refused_by_name() -> None:
    source = ResidentVolume(volume(name="thin"), settings(), CPU, 0)
    with pytest.raises(ConfigError, match=r"Volume 'thin': data\.patch_size is 16 along z.*12"):
        PatchSampler([source], patch_size=(16, 16, 16), foreground_share=0.5, seed=0)


def test_the_distance_knows_the_voxel_size_when_asked() -> None:
    given = volume()
    plain = ResidentVolume(given, settings(), CPU, 0)
    sized = ResidentVolume(given, settings(label_transform={"edt_voxel_size": "volume"}), CPU, 0)
    expected = instance_edt(given.label, voxel_size_nm=(30.0, 8.0, 8.0))
    np.testing.assert_array_equal(sized.distance.numpy(), expected)
    assert not torch.equal(sized.distance, plain.distance)
    unknown = Volume("u", given.image, given.label)
    with pytest.raises(ConfigError, match=r"Volume 'u'.*data\.train_resolution"):
        ResidentVolume(unknown, settings(label_transform={"edt_voxel_size": "volume"}), CPU, 0)


@pytest.fixture
def on_disk(tmp_path: Path) -> VolumePaths:
    """Return a volume in chunked HDF5."""
    given = volume()
    for name, array in (("im", given.image), ("label", given.label), ("mask", given.mask)):
        with h5py.File(tmp_path / f"{name}.h5", "w") as file:
            file.create_dataset("main", data=np.asarray(array, array.dtype), chunks=(4, 16, 16))
    image, label, mask = (str(tmp_path / f"{name}.h5") for name in ("im", "label", "mask"))
    return VolumePaths("v", image, label, mask)


@pytest.mark.parametrize("pad", [(0, 0, 0), (2, 5, 6)])
@pytest.mark.parametrize("mode", ["reflect", "replicate", "constant"])
def test_patches_from_disk_are_those_from_memory(
    on_disk: VolumePaths, pad: tuple[int, ...], mode: str
) -> None:
    transform = {"normalize": "z_section", "clip_percentile_high": 0.98}
    data = settings(pad_size=pad, pad_mode=mode, image_transform=transform)
    lazy = LazySource(open_volume(on_disk), data, CPU, 0)
    resident = ResidentVolume(volume(), data, CPU, 0)
    shape = resident.places.shape
    starts = np.array([[0, 0, 0], [s - t for s, t in zip(shape, SIZE, strict=True)], [3, 9, 14]])
    one, two = lazy.cut(starts, SIZE), resident.cut(starts, SIZE)
    for name in ("labels", "edt", "mask"):
        assert torch.equal(getattr(one, name), getattr(two, name)), name
    torch.testing.assert_close(one.image, two.image, atol=1e-4, rtol=0)


def places_of(
    label: np.ndarray, mask: np.ndarray | None, most: int, monkeypatch: pytest.MonkeyPatch
) -> Places:
    """Return the places of a volume of which only some are remembered, the same ones each time."""
    monkeypatch.setattr(sampling_locations, "MOST_PLACES", most)
    given = as_lazy(Volume("v", np.zeros(label.shape, np.uint8), label, mask))
    one, again = (
        find_sampling_locations("v", given.label, given.mask, pad=(0, 0, 0), seed=1) for _ in "ab"
    )
    for name in ("valid", "instances", "sizes"):
        np.testing.assert_array_equal(getattr(one, name), getattr(again, name))
    whole = find_sampling_locations("v", label, mask, pad=(0, 0, 0), seed=1)
    np.testing.assert_array_equal(one.instances, whole.instances)
    return one


def test_every_section_is_as_likely_though_few_voxels_of_it_are_remembered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    label = np.zeros((40, 40, 40), np.uint16)
    label[:, 5:15, 5:15] = 7  # through all sections, as a neurite
    label[:, 30:32, 30:32] = 2
    label[38:, 20:25, 20:25] = 9  # comes last, and is as large as its share
    mask = np.ones(label.shape, bool)
    mask[20:, 25:] = False
    found = places_of(label, mask, 2000, monkeypatch)
    assert found.valid is not None
    assert (len(found.valid), found.valid_voxels) == (2000, int(mask.sum()))
    assert len(np.unique(found.valid)) == 2000
    expected = mask.reshape(4, -1).sum(1) * 2000 / mask.sum()
    per_ten = np.histogram(found.valid // 1600, bins=[0, 10, 20, 30, 40])[0]
    assert np.abs(per_ten - expected).max() < 5 * np.sqrt(expected.max())
    assert found.sizes.tolist() == [80, 666, 50]
    of_seven = found.instances[found.first[1] : found.first[1] + found.sizes[1]]
    assert (label.ravel()[of_seven] == 7).all()
    per_ten = np.histogram(of_seven // 1600, bins=[0, 10, 20, 30, 40])[0]
    assert np.abs(per_ten - 666 / 4).max() < 5 * np.sqrt(666 / 4)


def test_what_is_remembered_of_the_mask_is_any_voxel_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over many seeds each voxel is kept as often as any other."""
    monkeypatch.setattr(sampling_locations, "MOST_PLACES", 20)
    label = np.ones((10, 4, 5), np.uint8)
    counts = np.zeros(200)
    for seed in range(1000):
        found = find_sampling_locations("v", label, np.ones(label.shape), pad=(0, 0, 0), seed=seed)
        assert len(found.valid) == len(found.instances) == 20
        counts[found.valid] += 1
        counts[found.instances] += 1
    # Binomial with mean 200, deviation 13.4; the extremes of 200 lie within 4.5 of them.
    assert 140 < counts.min() < counts.max() < 260


def test_draws_from_disk_are_those_from_memory_and_survive_a_checkpoint(
    on_disk: VolumePaths,
) -> None:
    data = settings()
    memory = sampler(data, volume(), seed=5)
    expected = [memory.draw(3).labels for _ in range(6)]

    def reader() -> PatchSampler:
        source = LazySource(open_volume(on_disk), data, CPU, 0)
        return PatchSampler([source], patch_size=SIZE, foreground_share=0.5, seed=5, ahead=2)

    disk = reader()
    got = [disk.draw(3).labels for _ in range(3)]
    state = disk.state_dict()
    disk.close()
    again = reader()
    again.load_state_dict(state)
    got += [again.draw(3).labels for _ in range(3)]
    again.close()
    for one, two in zip(got, expected, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("mode", ["0-1", "z_volume", "z_section", "none"])
@pytest.mark.parametrize("clip", [(0.0, 1.0), (0.02, 0.97)])
@pytest.mark.parametrize("kind", ["uint8", "int16"])
def test_statistics_read_section_by_section_are_those_of_the_whole(
    mode: str, clip: tuple[float, float], kind: str
) -> None:
    image = volume().image.astype(kind)
    if kind == "int16":
        image = image * 90 - 9000
    image[5:, 20:] = 0  # most of these sections is fill, as in a sparse volume
    chosen = {"normalize": mode, "clip_percentile_low": clip[0], "clip_percentile_high": clip[1]}
    streamed = stream_normalisation(windowed(image), settings(image_transform=chosen))
    whole = fit_normalisation(image, mode=mode, clip_low=clip[0], clip_high=clip[1])
    for name in ("low", "high", "offset", "scale"):
        np.testing.assert_allclose(getattr(streamed, name), getattr(whole, name), rtol=1e-4)


def drifting() -> Volume:
    """Return the volume with sections that grow brighter, and a right half that is darker."""
    given = volume()
    image = given.image // 2 + np.arange(12, dtype=np.uint8)[:, None, None] * 10
    image[:, :, 28:] //= 2
    return Volume("v", image, given.label)


@pytest.mark.parametrize("mode", ["0-1", "z_volume", "z_section", "none", "clahe"])
@pytest.mark.parametrize("axis", [0, 2])
@pytest.mark.parametrize("lazy", [False, True], ids=["in memory", "on disk"])
def test_a_part_is_normalised_as_in_the_whole_to_train_on_and_to_score(
    mode: str, axis: int, lazy: bool
) -> None:
    given = drifting()
    clips = (0.0, 1.0) if mode == "clahe" else (0.01, 0.98)
    chosen = {"normalize": mode, "clip_percentile_low": clips[0], "clip_percentile_high": clips[1]}
    data = settings(
        image_transform=chosen,
        split={"kind": "holdout", "axis": axis, "fraction": 0.5, "margin": 1},
    )
    plan = split_volumes([as_lazy(given) if lazy else given], data, receptive_field=(1, 1, 1))
    if mode == "clahe":
        whole = np.stack([equalised(section) for section in given.image]) / np.float32(255)
    else:
        whole = normalise(given.image, mode=mode, clip_low=clips[0], clip_high=clips[1])
    trained, scored = plan.folds[0].train[0], plan.folds[0].score[0]
    source = (LazySource if lazy else ResidentVolume)(trained, data, CPU, 0)
    patch = source.cut(np.array([[1, 5, 9]]), SIZE).image[0, 0].numpy()
    np.testing.assert_allclose(patch, whole[1:5, 5:21, 9:25], atol=1e-4)
    if lazy:
        # Three of its sections fit; which ones, its name says.
        few = data.model_copy(
            update={"memory_limit_gb": 3 * 40 * np.prod(scored.image.shape[1:]) / 1e9}
        )
        scored = part_to_score(scored, few)
        assert scored.image.shape[0] == 3
    half = whole.shape[axis] // 2
    expected = whole[half:] if axis == 0 else whole[:, :, half:]
    if lazy:
        first = int(scored.name.rpartition("[z ")[2].partition(":")[0])
        expected = expected[first : first + 3]
    assert scored.normalisation is not None
    np.testing.assert_allclose(scored.normalisation.apply(scored.image), expected, atol=1e-4)


def test_a_volume_on_disk_is_scored_where_its_truth_is(on_disk: VolumePaths) -> None:
    lazy = open_volume(on_disk)
    assert is_lazy(lazy)
    assert has_truth(lazy)
    assert lazy.fingerprint() == Volume("x", volume().image, volume().label,
                                        volume().mask).fingerprint()  # fmt: skip
    assert is_too_large(lazy, 1e-4)
    assert not is_too_large(lazy, 1.0)
    part = part_to_score(lazy, settings(memory_limit_gb=40 * 48 * 56 * 5 / 1e9))
    assert part.image.shape == (5, 48, 56)
    # The ball that begins at section 3 lies outside the mask.
    assert part.name == "v[z 4:9]"
    np.testing.assert_array_equal(part.label, volume().label[4:9])


def test_only_truth_inside_the_mask_decides_what_is_scored(tmp_path: Path) -> None:
    label = np.zeros((12, 24, 24), np.uint16)
    label[1:5, 2:22, 2:22] = 1  # most of the labels, where nothing is trusted
    label[9, 4:6, 4:6] = 2
    mask = np.zeros(label.shape, np.uint8)
    mask[7:] = 255
    arrays = {"im": np.ones_like(mask), "label": label, "mask": mask}
    for name, array in arrays.items():
        write_array(tmp_path / f"{name}.h5", array)
    lazy = open_volume(VolumePaths("v", *(str(tmp_path / f"{name}.h5") for name in arrays)))
    part = part_to_score(lazy, settings(memory_limit_gb=40 * 24 * 24 * 3 / 1e9))
    assert part.name == "v[z 7:10]"
    assert part.label[part.mask].any()


def split(kind: str, **keys: object) -> Data:
    return settings(split={"kind": kind, **keys})


def test_without_a_split_the_sentence_says_that_the_score_is_optimistic() -> None:
    given = volume()
    plan = split_volumes([given], split("none"), receptive_field=(1, 1, 1))
    for part in (*plan.folds[0].train, *plan.folds[0].score):
        assert part.image is given.image
    assert "optimistic" in plan.sentence


@pytest.mark.parametrize("side", ["low", "high"])
@pytest.mark.parametrize("lazy", [False, True])
def test_a_slab_is_held_out_with_a_margin_of_one_receptive_field(side: str, lazy: bool) -> None:
    given = as_lazy(volume()) if lazy else volume()
    chosen = split("holdout", axis=1, fraction=0.5, side=side)
    plan = split_volumes([given], chosen, receptive_field=(3, 6, 9))
    fold = plan.folds[0]
    assert plan.margin == 6
    assert fold.train[0].image.shape == (12, 18, 56)
    assert fold.score[0].image.shape == (12, 24, 56)
    names = (fold.train[0].name, fold.score[0].name)
    expected = ("v[y 0:18]", "v[y 24:48]") if side == "high" else ("v[y 30:48]", "v[y 0:24]")
    assert names == expected


def test_a_slab_that_leaves_nothing_is_refused() -> None:
    with pytest.raises(VolumeError, match=r"leaves -3 to train on.*data\.split\.margin"):
        split_volumes([volume()], split("holdout", fraction=0.25), receptive_field=(12, 1, 1))
    empty = slab(volume(), 0, 0, 2)
    with pytest.raises(VolumeError, match=r"no labelled voxel( inside the mask)?, so"):
        split_volumes([empty], split("none"), receptive_field=(1, 1, 1))


def test_volumes_are_held_out_by_name() -> None:
    one, two = volume(1, name="one"), volume(2, name="two")
    plan = split_volumes([one, two], split("volumes", volumes=["two"]), receptive_field=(1, 1, 1))
    assert [part.name for part in plan.folds[0].train] == ["one"]
    assert [part.name for part in plan.folds[0].score] == ["two"]
    with pytest.raises(ConfigError, match=r"data\.split\.volumes.*'tow'.*Did you mean 'two'"):
        split_volumes([one, two], split("volumes", volumes=["tow"]), receptive_field=(1, 1, 1))
    with pytest.raises(ConfigError, match="none is held out"):
        split_volumes([one, two], split("volumes"), receptive_field=(1, 1, 1))
    with pytest.raises(ConfigError, match="every volume is held out"):
        split_volumes([one], split("volumes", volumes=["one"]), receptive_field=(1, 1, 1))


def test_folds_hold_out_every_volume_once() -> None:
    volumes = [volume(i, name=f"v{i}") for i in range(5)]
    plan = split_volumes(volumes, split("cross_validation", folds=2), receptive_field=(1, 1, 1))
    assert [[v.name for v in fold.score] for fold in plan.folds] == [["v0", "v2", "v4"],
                                                                     ["v1", "v3"]]  # fmt: skip
    for fold in plan.folds:
        assert not {v.name for v in fold.train} & {v.name for v in fold.score}


def test_folds_of_one_volume_are_slabs_with_a_margin_on_both_sides() -> None:
    chosen = split("cross_validation", folds=3, axis=1, margin=2)
    plan = split_volumes([volume()], chosen, receptive_field=(99, 99, 99))
    names = [[part.name for part in (*fold.train, *fold.score)] for fold in plan.folds]
    assert names[1] == ["v[y 0:14]", "v[y 34:48]", "v[y 16:32]"]
    assert names[0] == ["v[y 18:48]", "v[y 0:16]"]


@pytest.mark.parametrize("lazy", [False, True])
def test_blocks_hold_out_all_of_a_volume_and_train_on_nothing_near(lazy: bool) -> None:
    given = volume()
    places = np.arange(given.image.size, dtype=np.int32).reshape(given.image.shape)
    given = replace(given, image=places, label=np.ones_like(places), mask=None)
    plan = split_volumes(
        [as_lazy(given) if lazy else given], split("blocks"), receptive_field=(99, 4, 6)
    )

    def places_in(part: Volume) -> np.ndarray:
        return np.concatenate([np.ravel(section) for section in part.image])

    assert plan.as_mapping()["kind"] == "blocks"
    assert plan.margin == 6
    assert "4 of 1×2×2 blocks" in plan.sentence
    held_out = [places_in(part) for fold in plan.folds for part in fold.score]
    np.testing.assert_array_equal(np.sort(np.concatenate(held_out)), places.ravel())
    for fold in plan.folds:
        (block,) = fold.score
        inside = np.isin(places, places_in(block))
        near = ndimage.binary_dilation(inside, np.ones((1, 9, 13)))  # 4 and 6 voxels on each side
        trained = np.isin(places, np.concatenate([places_in(part) for part in fold.train]))
        np.testing.assert_array_equal(trained, ~near)
    names = [part.name for part in (*plan.folds[0].train, *plan.folds[0].score)]
    assert names == ["v[y 28:48]", "v[x 34:56]", "v[y 0:24][x 0:28]"]


def test_blocks_without_truth_are_no_folds_and_a_single_one_is_refused() -> None:
    given = volume()
    label = np.zeros_like(given.label)
    label[:, :8, :] = 1
    half = replace(given, label=label, mask=None)
    plan = split_volumes([half], split("blocks", margin=2), receptive_field=(9, 9, 9))
    assert [fold.name for fold in plan.folds] == ["fold_1", "fold_2"]
    for fold in plan.folds:
        assert all(part.label.any() for part in fold.train)
    label[:, :, 20:] = 0
    with pytest.raises(VolumeError, match=r"truth lies in 1 of the blocks"):
        split_volumes(
            [replace(half, label=label)], split("blocks", margin=0, blocks=[1, 1, 2]),
            receptive_field=(9, 9, 9),
        )  # fmt: skip
    with pytest.raises(VolumeError, match="leaves nothing to train on"):
        split_volumes([given], split("blocks", margin=40), receptive_field=(9, 9, 9))
    with pytest.raises(VolumeError, match=r"cuts y into 49, but it has 48 voxels there"):
        split_volumes([given], split("blocks", blocks=[1, 49, 1]), receptive_field=(9, 9, 9))
