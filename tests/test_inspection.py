"""Inspection counts what is there, and says in a sentence what is wrong and what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hydralv_tune.data.inspection import characteristics, find_pieces, touching_pairs
from hydralv_tune.data.volumes import Volume, VolumePaths, read_volume, write_array
from hydralv_tune.numerics.phantom.volume import make_phantom

SHAPE = (12, 60, 60)
SIZE = (30.0, 8.0, 8.0)


def balls(dtype: str = "uint16", count: int = 12) -> np.ndarray:
    """Return so many blocks of 3 x 8 x 8 voxels, apart from each other."""
    label = np.zeros(SHAPE, dtype)
    corners = [(z, y, x) for z in (2, 7) for y in (4, 20, 36) for x in (4, 20, 36)]
    for one, (z, y, x) in enumerate(corners[:count], start=1):
        label[z : z + 3, y : y + 8, x : x + 8] = one
    return label


def noise() -> np.ndarray:
    """Return an image without any fault."""
    rng = np.random.default_rng(0)
    return np.clip(rng.normal(128, 25, SHAPE), 1, 254).astype(np.uint8)


def inspected(
    label: np.ndarray | None,
    image: np.ndarray | None = None,
    mask: np.ndarray | None = None,
    size: tuple[float, float, float] | None = SIZE,
) -> dict[str, Any]:
    """Return the characteristics of a volume of these arrays."""
    return characteristics(Volume("v", noise() if image is None else image, label, mask, size))


def warning_of(facts: dict[str, Any], *words: object) -> str:
    """Return the one warning that holds all words, a sentence that ends as one."""
    found = [w for w in facts["warnings"] if all(str(word) in w for word in words)]
    assert len(found) == 1, facts["warnings"]
    assert found[0].endswith(".")
    return str(found[0])


def test_a_sound_volume_has_its_figures_and_no_warning() -> None:
    mask = np.zeros(SHAPE, bool)
    mask[1:11, 2:50, 2:50] = True
    facts = inspected(balls(), mask=mask)
    assert facts["warnings"] == []
    assert facts["shape"] == [12, 60, 60]
    assert facts["dtype"] == "uint8"
    assert facts["voxel_size_nm"] == [30, 8, 8]
    assert facts["instances"] == facts["instances_in_mask"] == 12
    assert facts["instance_size_voxels"] == {"min": 192, "mean": 192, "median": 192, "max": 192}
    assert facts["mask_fraction"] == pytest.approx(10 * 48 * 48 / (12 * 60 * 60))
    assert facts["foreground_fraction"] == pytest.approx(12 * 192 / (12 * 60 * 60))
    assert facts["foreground_in_mask_fraction"] == pytest.approx(12 * 192 / (10 * 48 * 48))
    assert facts["touching_instances"] == 0
    assert facts["label_voxels_outside_mask"] == 0
    assert facts["intensity"]["mean"] == pytest.approx(128, abs=1)


def test_the_phantom_has_the_figures_it_was_made_with() -> None:
    made = make_phantom((16, 96, 96), instances=8, seed=0)
    volume = Volume("p", made.image, made.label, made.mask > 0, made.voxel_size_nm)
    facts = characteristics(volume)
    assert facts["instances"] == 8
    assert facts["foreground_in_mask_fraction"] == pytest.approx(0.107, abs=0.002)
    assert facts["fragmented_ids"] == facts["wrapped_ids"] == []
    assert facts["foreground_contrast"] > 0
    warning_of(facts, "Brightness jumps")
    warning_of(facts, "only 8 instances")


def test_touching_instances_are_counted_and_stay_apart() -> None:
    label = balls()
    label[2:5, 12:20, 4:12] = 13
    label[2:5, 44:52, 12:20] = 14
    facts = inspected(label)
    assert touching_pairs(label).tolist() == [[1, 13], [4, 13]]
    assert facts["touching_instances"] == 3
    assert facts["touching_pairs"] == 2
    assert facts["fragmented_ids"] == []
    assert len(find_pieces(label, None).ids) == 14


def test_a_corner_connects_the_pieces_of_an_id() -> None:
    label = balls()
    label[5, 12, 12] = 1
    assert inspected(label)["fragmented_ids"] == []


def test_a_fragmented_id_is_named() -> None:
    label = balls()
    label[2:5, 7, 4:12] = 0
    facts = inspected(label)
    assert facts["fragmented_ids"] == [1]
    assert facts["wrapped_ids"] == []
    warning_of(facts, "several pieces close together: 1")


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_a_wrapped_id_is_named(dtype: str) -> None:
    label = balls(dtype)
    label[label == 12] = 1
    facts = inspected(label)
    assert facts["wrapped_ids"] == [1]
    assert facts["fragmented_ids"] == []
    warning_of(facts, "far apart", ": 1", "uint8", "wrap at 256")


def test_the_voxel_size_decides_what_is_far_apart() -> None:
    label = balls()
    label[label == 10] = 1
    assert inspected(label, size=(30.0, 8.0, 8.0))["fragmented_ids"] == [1]
    assert inspected(label, size=(300.0, 8.0, 8.0))["wrapped_ids"] == [1]


def test_bytes_that_are_full_are_suspicious() -> None:
    label = balls("uint8")
    label[label == 12] = 255
    warning_of(inspected(label), "uint8", "255", "uint16")


def test_a_binary_mask_in_place_of_labels_is_seen() -> None:
    facts = inspected((balls() > 0).astype(np.uint8) * 255)
    warning_of(facts, "single id 255", "12 separate pieces", "binary mask")


def test_labels_outside_the_mask_are_named() -> None:
    mask = np.zeros(SHAPE, bool)
    mask[:, :24] = True
    facts = inspected(balls(), mask=mask)
    warning_of(facts, "3 of 12 instances lie wholly outside", "7, 8, 9", "Widen")
    warning_of(facts, "3 of 12 instances are cut by the mask", "288 voxels")
    assert facts["instances"] == 12
    assert facts["instances_in_mask"] == 9
    assert facts["label_voxels_outside_mask"] == 3 * 192 + 288


def test_a_mask_that_leaves_nothing_out_is_said() -> None:
    warning_of(inspected(balls(), mask=np.ones(SHAPE, bool)), "valid everywhere")


def test_tiny_and_huge_instances_are_named() -> None:
    label = balls()
    label[0, 0, 0] = 40
    label[0:12, 45:60, 30:60] = 41
    facts = inspected(label)
    warning_of(facts, "under 30 voxels", "40")
    warning_of(facts, "20 times the median", "41")


def test_few_instances_are_said() -> None:
    warning_of(inspected(balls(count=4)), "only 4 instances", "0.25")


@pytest.mark.parametrize(
    ("size", "word"),
    [
        (None, "not in the files"),
        ((1.0, 1.0, 1.0), "unknown"),
        ((0.03, 0.008, 0.008), "another unit"),
        ((30000.0, 8000.0, 8000.0), "another unit"),
        ((8.0, 8.0, 30.0), "x, y, z order"),
    ],
)
def test_a_missing_or_odd_voxel_size_is_said(
    size: tuple[float, float, float] | None, word: str
) -> None:
    warning_of(inspected(balls(), size=size), word, "voxel_size_nm")


def test_faulty_sections_are_named() -> None:
    image = noise()
    image[3] = 128
    image[6] = image[5]
    image[9] = (image[9].astype(int) - 128) // 8 + 128
    facts = inspected(balls(), image)
    warning_of(facts, "constant: 3")
    warning_of(facts, "repeat the one before: 6")
    warning_of(facts, "contrast: 9")


def test_a_brightness_jump_is_named_with_its_place() -> None:
    image = noise()
    image[:6] //= 2
    facts = inspected(balls(), image)
    warning_of(facts, "63 to 128", "between 5 and 6")
    assert facts["section_mean"]["at_section"] == 6
    assert facts["section_mean"]["largest_jump"] == pytest.approx(64, abs=1)


def test_black_and_clipped_voxels_are_said() -> None:
    image = noise()
    image[:, :5] = 0
    image[:, 50:] = 255
    facts = inspected(balls(), image)
    warning_of(facts, "black", "8.3%", "mask")
    warning_of(facts, "white (255)")
    mask = np.zeros(SHAPE, bool)
    mask[:, 5:50] = True
    inside = inspected(balls(), image, mask)
    assert not [w for w in inside["warnings"] if "black" in w or "white" in w]


def test_float_images_and_sparse_ids_are_taken() -> None:
    label = balls("int64") * (1 << 26)
    facts = inspected(label, noise() / np.float32(255))
    assert facts["instances"] == 12
    assert facts["instance_size_voxels"]["max"] == 192
    assert facts["dtype"] == "float32"
    assert facts["warnings"] == []


def test_large_ids_are_named_as_the_file_has_them(tmp_path: Path) -> None:
    small = balls()
    small[2:5, 7, 4:12] = 0  # id 1 in two pieces close together
    small[small == 12] = 2  # id 2 far apart
    small[0, 0, 0] = 40  # tiny
    mask = np.zeros(SHAPE, np.uint8)
    mask[:, :24] = 1
    write_array(tmp_path / "im.h5", noise())
    write_array(tmp_path / "mask.h5", mask)
    large = np.where(small > 0, small.astype(np.uint64) * 7 + 2**40, 0)
    found = []
    for name, label in (("small", small), ("large", large)):
        path = tmp_path / f"{name}.h5"
        write_array(path, label)
        volume = read_volume(
            VolumePaths("v", str(tmp_path / "im.h5"), str(path), str(tmp_path / "mask.h5"))
        )
        found.append(characteristics(volume))
    few, many = found
    for key in ("fragmented_ids", "wrapped_ids"):
        assert many[key] == [one * 7 + 2**40 for one in few[key]]
        assert many[key]
    names = {one: str(one * 7 + 2**40) for one in (1, 2, 7, 8, 9, 40)}
    warning_of(many, "far apart", names[2])
    warning_of(many, "several pieces close together", names[1])
    warning_of(many, "wholly outside", f"{names[7]}, {names[8]}, {names[9]}")
    warning_of(many, "under 30 voxels", names[40])
    assert "uint8" not in str(many["warnings"]), "ids that large were never bytes"


def test_without_a_label_the_image_is_still_judged() -> None:
    facts = inspected(None)
    assert facts["instances"] is None
    assert facts["mask_fraction"] == 1
    warning_of(facts, "No label", "--label")


def test_real_vesicles(shared_data: Any) -> None:
    folder = shared_data / "hydra-11-5"
    names = ("im_sparse", "label", "im_sparse_valid")
    image, label, mask = (str(folder / f"{name}.h5") for name in names)
    facts = characteristics(read_volume(VolumePaths("h", image, label, mask)))
    assert facts["instances"] == 285
    assert facts["instances_in_mask"] == 228
    assert facts["wrapped_ids"] == []
    assert facts["section_mean"]["max"] - facts["section_mean"]["min"] > 60
    warning_of(facts, "voxel size is not in the files")
    warning_of(facts, "57 of 285 instances lie wholly outside the mask")
