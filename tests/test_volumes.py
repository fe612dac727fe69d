"""Volumes are read as they are, refused in one sentence when wrong, and written whole or not."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import nibabel
import numpy as np
import pytest
import tifffile
import zarr

from hydralv_tune.config.errors import VolumeError
from hydralv_tune.data.formats import SUFFIXES
from hydralv_tune.data.formats.files import create_array
from hydralv_tune.data.volumes import (
    NO_MASK,
    Volume,
    VolumePaths,
    check_heads,
    open_lazy,
    open_mask,
    pairs,
    read_array,
    read_labels,
    read_mask,
    read_probabilities,
    read_volume,
    read_voxel_size_nm,
    volume_paths,
    write_array,
)
from hydralv_tune.trial.training.lazy_reader import open_volume

SHAPE = (9, 20, 21)
KINDS = ["v.h5", "v.hdf5", "v.tif", "v.zarr", "v.h5:raw/em", "v.zarr:raw/em"]


def counted(dtype: str = "uint8", shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    """Return an array with a different value in neighbouring voxels."""
    return (np.arange(np.prod(shape)) % 251).reshape(shape).astype(dtype)


def refused(path: object, *words: object, reader: Any = read_array, **options: Any) -> str:
    """Return the one-line message with which a file is refused, having checked its words."""
    with pytest.raises(VolumeError) as caught:
        reader(path, **options)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert str(word) in message
    return message


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """Return the files of a small, valid volume."""
    label = np.zeros(SHAPE, np.uint16)
    label[2:5, 3:9, 3:9] = 1
    label[2:5, 12:16, 12:16] = 2
    arrays = {"im": counted(), "label": label, "mask": np.ones(SHAPE, np.uint8)}
    for name, array in arrays.items():
        write_array(tmp_path / f"{name}.h5", array)
    return {name: tmp_path / f"{name}.h5" for name in arrays}


def paths_of(files: dict[str, Path], **others: object) -> VolumePaths:
    """Return the paths of a volume, some of them replaced."""
    chosen = {"image": files["im"], "label": files["label"], "mask": files["mask"], **others}
    return VolumePaths("v", **{k: None if p is None else str(p) for k, p in chosen.items()})


@pytest.fixture(params=[read_volume, open_volume], ids=["in memory", "on disk"])
def reader(request: pytest.FixtureRequest) -> Any:
    """Return what checks a volume: a rule holds whether it is read whole or stays on disk."""
    return request.param


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32", "int64", "float16", "float32"])
def test_what_is_written_is_read_back(tmp_path: Path, name: str, dtype: str) -> None:
    array = counted(dtype)
    write_array(tmp_path / name, array, voxel_size_nm=(30.0, 8.0, 8.5))
    again = read_array(tmp_path / name)
    assert again.dtype == array.dtype
    np.testing.assert_array_equal(again, array)
    assert read_voxel_size_nm(tmp_path / name) == (30.0, 8.0, 8.5)


@pytest.mark.parametrize("name", ["p.h5", "p.tif", "p.zarr"])
def test_probabilities_keep_four_axes_and_their_dtype(tmp_path: Path, name: str) -> None:
    maps = np.random.default_rng(0).random((3, *SHAPE)).astype(np.float16)
    write_array(tmp_path / name, maps)
    again = read_probabilities(tmp_path / name)
    assert again.dtype == np.float16
    np.testing.assert_array_equal(again, maps)
    assert read_voxel_size_nm(tmp_path / name) is None


@pytest.mark.parametrize("name", KINDS)
def test_lazy_slices_equal_the_whole(tmp_path: Path, name: str) -> None:
    array = counted("uint16", (33, 40, 41))
    write_array(tmp_path / name, array, voxel_size_nm=(30, 8, 8))
    with open_lazy(tmp_path / name, ndim=3) as lazy:
        assert (lazy.shape, lazy.dtype, lazy.ndim) == (array.shape, array.dtype, 3)
        assert lazy.voxel_size_nm == (30, 8, 8)
        np.testing.assert_array_equal(lazy[5:20, 3:8, 40], array[5:20, 3:8, 40])
        np.testing.assert_array_equal(lazy[-1], array[-1])


def test_lazy_reading_loads_only_the_chunks_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    array = counted("uint8", (64, 64, 64))
    path = tmp_path / "big.zarr"
    zarr.create_array(path, shape=array.shape, dtype="uint8", chunks=(16, 64, 64))[...] = array
    for chunk in (path / "c").iterdir():
        if chunk.name != "1":
            (chunk / "0" / "0").write_bytes(b"damaged")
    with open_lazy(path) as lazy:
        assert lazy.chunks == (16, 64, 64)
        np.testing.assert_array_equal(lazy[16:32], array[16:32])
        with pytest.raises(VolumeError, match=r"big\.zarr.*damaged"):
            lazy[0]


def test_a_compressed_tiff_is_read(tmp_path: Path) -> None:
    array = counted()
    tifffile.imwrite(tmp_path / "c.tif", array, compression="zlib", photometric="minisblack")
    np.testing.assert_array_equal(read_array(tmp_path / "c.tif"), array)


def test_zarr_of_format_two_is_read(tmp_path: Path) -> None:
    array = counted()
    group = zarr.open_group(tmp_path / "old.zarr", mode="w", zarr_format=2)
    group.create_array("em", shape=SHAPE, dtype="uint8", chunks=(4, 10, 10))[...] = array
    np.testing.assert_array_equal(read_array(tmp_path / "old.zarr"), array)


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        ({"voxel_size_nm": [30, 8, 8]}, (30, 8, 8)),
        ({"resolution": [40.0, 4.0, 4.0]}, (40, 4, 4)),
        ({"resolution": [0.04, 0.004, 0.004], "units": "um"}, (40, 4, 4)),
        ({"voxel_size": [0.03, 0.008, 0.008], "unit": "micrometer"}, (30, 8, 8)),
        ({"element_size_um": [0.03, 0.008, 0.008]}, (30, 8, 8)),
        ({"resolution": [30, 8]}, None),
        ({"resolution": [30, 0, 8]}, None),
        ({"resolution": "fine"}, None),
        ({}, None),
    ],
)
def test_voxel_size_is_read_as_other_tools_write_it(
    tmp_path: Path, attributes: dict[str, Any], expected: tuple[float, ...] | None
) -> None:
    with h5py.File(tmp_path / "v.h5", "w") as file:
        file["main"] = counted()
        file["main"].attrs.update(attributes)
    assert read_voxel_size_nm(tmp_path / "v.h5") == expected


def test_voxel_size_of_the_next_generation_file_format(tmp_path: Path) -> None:
    group = zarr.open_group(tmp_path / "n.zarr", mode="w")
    group.create_array("s0", shape=SHAPE, dtype="uint8")
    group.attrs["multiscales"] = [
        {
            "axes": [{"name": n, "type": "space", "unit": "micrometer"} for n in "zyx"],
            "datasets": [
                {
                    "path": "s0",
                    "coordinateTransformations": [{"type": "scale", "scale": [0.03, 0.01, 0.01]}],
                }
            ],
        }
    ]
    assert read_voxel_size_nm(tmp_path / "n.zarr") == (30, 10, 10)


def test_voxel_size_of_ome_tiff(tmp_path: Path) -> None:
    sizes = {f"PhysicalSize{a}": s for a, s in (("Z", 0.03), ("Y", 0.008), ("X", 0.008))}
    units = {f"PhysicalSize{a}Unit": "µm" for a in "ZYX"}
    tifffile.imwrite(
        tmp_path / "v.ome.tif", counted(), ome=True, metadata={"axes": "ZYX", **sizes, **units}
    )
    assert read_voxel_size_nm(tmp_path / "v.ome.tif") == (30, 8, 8)


def test_main_is_the_default_dataset_among_several(tmp_path: Path) -> None:
    write_array(tmp_path / "v.h5:other", counted() + 1)
    write_array(tmp_path / "v.h5:main", counted())
    np.testing.assert_array_equal(read_array(tmp_path / "v.h5"), counted())
    np.testing.assert_array_equal(read_array(tmp_path / "v.h5:other"), counted() + 1)


def test_a_missing_file_names_what_is_beside_it(files: dict[str, Path]) -> None:
    refused(files["im"].with_name("absent.h5"), "absent.h5", "no such file", "label.h5")


@pytest.mark.parametrize("name", ["v.h5", "v.tif"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.6, 0.95])
def test_a_truncated_file_is_refused(tmp_path: Path, name: str, share: float) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (20, 60, 60)).astype(np.uint8)
    write_array(tmp_path / name, noise)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: int(share * len(content))])
    message = refused(tmp_path / name, name)
    assert "Copy it again" in message


@pytest.mark.parametrize("name", ["v.h5", "v.tif", "v.zarr", "v.npy"])
def test_a_file_of_another_format_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("no volume at all")
    refused(tmp_path / name, name)


def test_a_pipe_is_refused_instead_of_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "v.h5")
    refused(tmp_path / "v.h5", "a pipe or a device", "Write it to one first")


def test_folders_that_are_no_zarr_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.zarr").mkdir()
    refused(tmp_path / "empty.zarr", "empty.zarr", "no Zarr metadata")
    refused(tmp_path, "folder")


def test_a_suffix_that_lies_is_seen_through(tmp_path: Path) -> None:
    write_array(tmp_path / "v.h5", counted())
    (tmp_path / "v.h5").rename(tmp_path / "v.tif")
    np.testing.assert_array_equal(read_array(tmp_path / "v.tif"), counted())


@pytest.mark.parametrize("suffix", [".h5", ".zarr"])
def test_two_datasets_and_none_named_lists_them(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"v{suffix}"
    write_array(f"{path}:first", counted())
    write_array(f"{path}:deep/second", counted())
    refused(path, "first", "deep/second", f"{path}:")
    refused(f"{path}:third", "third", "first")


def test_a_dataset_of_a_tiff_is_refused(tmp_path: Path) -> None:
    write_array(tmp_path / "v.tif", counted())
    refused(f"{tmp_path / 'v.tif'}:main", "no datasets")


@pytest.mark.parametrize("shape", [(20, 21), (1, *SHAPE), (0, 20, 21)])
@pytest.mark.parametrize("name", ["v.h5", "v.zarr"])
def test_other_than_three_axes_is_refused(
    tmp_path: Path, shape: tuple[int, ...], name: str
) -> None:
    path = tmp_path / name
    if name == "v.h5":
        with h5py.File(path, "w") as file:
            file["main"] = np.zeros(shape, np.uint8)
    else:
        zarr.create_array(path, shape=shape, dtype="uint8", chunks=tuple(max(n, 1) for n in shape))
    refused(path, shape, reader=read_labels)


@pytest.mark.parametrize("dtype", ["complex64", "S3", [("a", "u1")]])
def test_values_that_are_no_real_numbers_are_refused(tmp_path: Path, dtype: Any) -> None:
    with h5py.File(tmp_path / "v.h5", "w") as file:
        file["main"] = np.zeros(SHAPE, dtype=dtype)
    refused(tmp_path / "v.h5", "no real numbers")


def test_objects_are_refused(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "v.h5", "w") as file:
        file.create_dataset("main", data=np.full(SHAPE, "text", dtype=object))
    refused(tmp_path / "v.h5", "no real numbers")


def test_whole_numbers_as_floats_are_refused_with_a_hint(tmp_path: Path) -> None:
    write_array(tmp_path / "l.h5", counted("float32"))
    refused(tmp_path / "l.h5", "float32", "whole numbers", "uint16", reader=read_labels)
    write_array(tmp_path / "l.h5", counted("float32") / 7)
    refused(tmp_path / "l.h5", "float32", "probabilities", reader=read_labels)


def test_negative_and_boolean_labels_are_refused(tmp_path: Path) -> None:
    write_array(tmp_path / "l.h5", counted("int32") - 2)
    refused(tmp_path / "l.h5", "negative", "-2", reader=read_labels)
    write_array(tmp_path / "l.h5", counted() > 9)
    refused(tmp_path / "l.h5", "bool", reader=read_labels)


def test_an_empty_segmentation_may_be_read(tmp_path: Path) -> None:
    write_array(tmp_path / "l.h5", np.zeros(SHAPE, np.uint16))
    assert not read_labels(tmp_path / "l.h5").any()


def test_read_volume_keeps_dtypes_and_makes_the_mask_boolean(files: dict[str, Path]) -> None:
    volume = read_volume(paths_of(files))
    assert volume.image.dtype == np.uint8
    assert volume.label is not None
    assert volume.label.dtype == np.uint16
    assert volume.mask is not None
    assert volume.mask.dtype == bool
    assert read_volume(paths_of(files, label=None, mask=None)).label is None


def test_read_volume_takes_the_voxel_size_from_whichever_file_has_it(
    files: dict[str, Path], reader: Any
) -> None:
    assert reader(paths_of(files)).voxel_size_nm is None
    mask = read_array(files["mask"])
    write_array(files["mask"], mask, voxel_size_nm=(30, 8, 8))
    assert reader(paths_of(files)).voxel_size_nm == (30, 8, 8)


@pytest.mark.parametrize("which", ["label", "mask"])
def test_shapes_that_differ_are_refused(files: dict[str, Path], reader: Any, which: str) -> None:
    array = read_array(files[which])
    write_array(files[which], array[1:])
    refused(paths_of(files), f"{which}.h5", "shape", (8, 20, 21), SHAPE, reader=reader)
    write_array(files[which], array.transpose(2, 1, 0))
    refused(paths_of(files), "another order", reader=reader)


def test_a_mask_of_lower_resolution_lies_on_the_voxels_of_its_image(
    files: dict[str, Path], tmp_path: Path, reader: Any
) -> None:
    write_array(files["im"], counted(shape=(9, 20, 24)), voxel_size_nm=(30.0, 8.0, 8.0))
    write_array(files["label"], np.pad(read_array(files["label"]), ((0, 0), (0, 0), (0, 3))))
    coarse = np.random.default_rng(0).integers(0, 2, (3, 10, 6)).astype(np.uint8)
    whole = coarse.repeat(3, 0).repeat(2, 1).repeat(4, 2)
    write_array(tmp_path / "coarse.zarr", coarse, voxel_size_nm=(90.0, 16.0, 32.0))
    write_array(tmp_path / "whole.h5", whole)
    with pytest.warns(UserWarning, match=r"stands for 3 x 2 x 4 voxels"):
        volume = reader(paths_of(files, mask=tmp_path / "coarse.zarr"))
    assert volume.voxel_size_nm == (30.0, 8.0, 8.0)
    expected = reader(paths_of(files, mask=tmp_path / "whole.h5"))
    assert volume.fingerprint() == expected.fingerprint()
    lazy = open_mask(tmp_path / "coarse.zarr", whole.shape)
    for box in (np.s_[:], np.s_[1:8:2, 3:3, 5:23], np.s_[4, 1:20, 3], np.s_[-2:, ..., 1:2]):
        np.testing.assert_array_equal(lazy[box], whole[box])
    with pytest.warns(UserWarning, match="lower resolution"):
        check_heads(str(files["im"]), {"mask": str(tmp_path / "coarse.zarr")})
    write_array(tmp_path / "coarse.zarr", coarse, voxel_size_nm=(30.0, 8.0, 8.0))
    with (
        pytest.warns(UserWarning, match="lower resolution"),
        pytest.raises(VolumeError, match="must agree"),
    ):
        reader(paths_of(files, mask=tmp_path / "coarse.zarr"))


@pytest.mark.parametrize("shape", [(9, 20, 11), (9, 1, 21), (9, 40, 42), (3, 7, 7)])
def test_a_mask_that_is_not_coarser_by_whole_numbers_is_refused(
    files: dict[str, Path], reader: Any, shape: tuple[int, ...]
) -> None:
    write_array(files["mask"], np.ones(shape, np.uint8))
    refused(paths_of(files), "the mask has shape", shape, reader=reader)


def test_labels_are_never_enlarged(files: dict[str, Path], reader: Any) -> None:
    write_array(files["label"], read_array(files["label"])[::3])
    refused(paths_of(files), "the label has shape", reader=reader)


def test_labels_without_an_instance_are_refused(files: dict[str, Path], reader: Any) -> None:
    label = read_labels(files["label"])
    write_array(files["mask"], (label == 0).astype(np.uint8))
    refused(paths_of(files), "label.h5", "mask.h5", "inside the mask", reader=reader)
    write_array(files["label"], np.zeros_like(label))
    refused(paths_of(files), "label.h5", "no labelled voxel", reader=reader)


def test_ids_beyond_int32_are_numbered_anew(files: dict[str, Path], reader: Any) -> None:
    label = read_labels(files["label"])
    # Multiples of 2**32 are 0 in 32 bits, so such instances would become background.
    for factor in (2**30, 2**32, 2**40):
        write_array(files["label"], label.astype(np.uint64) * factor)
        volume = reader(paths_of(files))
        np.testing.assert_array_equal(np.stack(list(volume.label)), label)
        assert volume.label_ids.tolist() == [factor, 2 * factor]


def test_labels_that_are_no_ids_are_refused(files: dict[str, Path], reader: Any) -> None:
    label = read_labels(files["label"])
    write_array(files["label"], label.astype(np.int32) - 1)
    refused(paths_of(files), "negative", "smallest -1", reader=reader)
    for wrong in (label > 0, label / 7):
        write_array(files["label"], wrong)
        refused(paths_of(files), "label.h5", wrong.dtype, "integers", reader=reader)


def test_an_empty_mask_is_refused(files: dict[str, Path], reader: Any) -> None:
    write_array(files["mask"], np.zeros(SHAPE, np.uint8))
    refused(paths_of(files), "mask.h5", "no voxel above 0", reader=reader)
    refused(files["mask"], "mask.h5", reader=read_mask)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("which", ["im", "mask"])
def test_values_that_are_not_finite_are_refused(
    files: dict[str, Path], value: float, which: str, reader: Any
) -> None:
    array = np.ones(SHAPE, np.float32)
    array[3, 4, 5] = array[6, 7, 8] = value
    write_array(files[which], array)
    message = refused(paths_of(files), f"{which}.h5", "2 voxels", (3, 4, 5), reader=reader)
    assert "NaN" in message


def test_a_boolean_image_is_refused(files: dict[str, Path], reader: Any) -> None:
    write_array(files["im"], np.ones(SHAPE, bool))
    refused(paths_of(files), "im.h5", "bool", reader=reader)
    with pytest.raises(VolumeError, match="dtype bool, which is a mask"):
        check_heads(str(files["im"]), {})


def test_an_image_in_colours_of_a_palette_is_refused_and_labels_are_not(
    files: dict[str, Path], reader: Any, tmp_path: Path
) -> None:
    colours = np.random.default_rng(0).integers(0, 65535, (3, 256)).astype(np.uint16)
    for name in ("im", "label"):
        array = read_array(files[name]).astype(np.uint8)
        tifffile.imwrite(tmp_path / f"{name}.tif", array, photometric="palette", colormap=colours)
    image, label = tmp_path / "im.tif", tmp_path / "label.tif"
    refused(paths_of(files, image=image), "im.tif", "palette", reader=reader)
    assert np.max(list(reader(paths_of(files, label=label)).label)) == 2
    with pytest.raises(VolumeError, match="palette"):
        check_heads(str(image), {})


def test_files_that_lie_mirrored_on_each_other_are_refused(tmp_path: Path, reader: Any) -> None:
    label = np.zeros(SHAPE, np.uint8)
    label[3:6, 3:9, 3:9] = 1
    for name, array, x in (("im", counted(), 8), ("same", label, 8), ("mirrored", label, -8)):
        affine = np.diag([x, 8.0, 30.0, 1.0])
        nibabel.save(nibabel.Nifti1Image(array.T, affine), tmp_path / f"{name}.nii.gz")
    image = str(tmp_path / "im.nii.gz")
    paths = VolumePaths("v", image, str(tmp_path / "same.nii.gz"))
    assert reader(paths).label is not None
    wrong = replace(paths, label=str(tmp_path / "mirrored.nii.gz"))
    refused(wrong, "mirrored.nii.gz", "along x", "mirrored", reader=reader)


@pytest.mark.parametrize(
    ("maps", "word"),
    [
        (np.zeros((2, *SHAPE), np.float32), "2 channels"),
        (np.zeros((*SHAPE, 3), np.float32), "front"),
        (np.zeros((3, *SHAPE), np.uint8), "uint8"),
        (np.zeros(SHAPE, np.float32), "(3, Z, Y, X)"),
        (np.full((3, *SHAPE), np.nan, np.float32), "NaN"),
    ],
)
def test_wrong_probabilities_are_refused(tmp_path: Path, maps: np.ndarray, word: str) -> None:
    write_array(tmp_path / "p.h5", maps)
    refused(tmp_path / "p.h5", "p.h5", word, reader=read_probabilities)


def test_double_precision_probabilities_become_single(tmp_path: Path) -> None:
    write_array(tmp_path / "p.h5", np.zeros((3, *SHAPE)))
    assert read_probabilities(tmp_path / "p.h5").dtype == np.float32


def test_globs_give_volumes_in_natural_order(tmp_path: Path) -> None:
    for number in (10, 2, 1):
        write_array(tmp_path / f"im_{number}.h5", counted())
        write_array(tmp_path / f"seg_{number}.h5:lab", counted())
    found = volume_paths([f"{tmp_path}/im_*.h5"], [f"{tmp_path}/seg_*.h5:lab"])
    assert [v.name for v in found] == ["im_1", "im_2", "im_10"]
    assert [Path(v.label or "").name for v in found] == [
        "seg_1.h5:lab",
        "seg_2.h5:lab",
        "seg_10.h5:lab",
    ]
    assert all(v.mask is None for v in found)


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write_array(tmp_path / "v.h5", counted())
    assert volume_paths(["~/v.h5"])[0].image == str(tmp_path / "v.h5")
    np.testing.assert_array_equal(read_array("~/v.h5"), counted())


def test_volumes_get_names_that_tell_them_apart() -> None:
    found = volume_paths(["a/im.h5", "b/im.h5", "c/b.h5", "val_02.tif"])
    assert [v.name for v in found] == ["a", "b", "b_2", "val_02"]


@pytest.mark.parametrize(
    ("images", "options", "told"),
    [
        (["vol_1", "vol_2"], {"labels": ["vol_2_label", "vol_3_label"]},
         ["vol_1.h5 goes with vol_2_label.h5", "vol_2.h5 goes with vol_3_label.h5"]),
        (["fly_1", "mouse_1"], {"labels": ["fly_1_seg", "worm_1_seg"]},
         ["mouse_1.h5 goes with worm_1_seg.h5"]),
        (["vol_1", "vol_2"], {"masks": ["mask_2", NO_MASK]}, ["vol_1.h5 goes with mask_2.h5"]),
        (["vol_1", "vol_2"], {"scored_masks": ["valid_01", "valid_3"]},
         ["vol_2.h5 goes with valid_3.h5"]),
        (["a", "b"], {"labels": ["a_label", "a_label"]},
         ["b.h5 goes with a_label.h5", "a_label.h5 is given for a and for b"]),
        (["a", "a"], {}, ["a.h5 is given for a and for a_2"]),
        (["vol_1", "vol_2"], {"labels": ["seg_01", "seg_02"], "masks": ["m/1_roi", NO_MASK]}, []),
    ],
)  # fmt: skip
def test_names_that_disagree_within_a_volume_are_told(
    images: list[str], options: dict[str, list[str]], told: list[str]
) -> None:
    def files(names: list[str]) -> list[str]:
        return [name if name == NO_MASK else f"{name}.h5" for name in names]

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = volume_paths(files(images), **{k: files(v) for k, v in options.items()})
    said = [str(warning.message) for warning in caught]
    assert len(said) == len(told)
    assert all(any(text.startswith(one) for text in said) for one in told), said
    lines = pairs(found)
    for key, word in (("labels", "label"), ("masks", "mask"), ("scored_masks", "scored mask")):
        for line, name in zip(lines, files(options.get(key, [])), strict=False):
            assert f", {word} {name}" in line


def test_numbers_of_files_that_differ_are_refused(files: dict[str, Path]) -> None:
    with pytest.raises(VolumeError, match=r"--label names 1 files.*--image names 2"):
        volume_paths([files["im"], files["im"]], [files["label"]])
    for option in ("masks", "scored_masks"):
        with pytest.raises(VolumeError, match=r"names 1 files.* none' stands for no mask"):
            volume_paths([files["im"], files["im"]], **{option: [files["mask"]]})
    with pytest.raises(VolumeError, match="no file matches"):
        volume_paths([str(files["im"].with_name("none_*.h5"))])
    with pytest.raises(VolumeError, match="No image"):
        volume_paths([])


def test_a_colon_in_a_folder_is_no_dataset(tmp_path: Path) -> None:
    folder = tmp_path / "run.h5:2026"
    folder.mkdir()
    write_array(folder / "v.h5", counted())
    np.testing.assert_array_equal(read_array(folder / "v.h5"), counted())


def test_on_disk_a_volume_has_the_fingerprint_that_it_has_in_memory(
    files: dict[str, Path],
) -> None:
    assert read_array(files["mask"]).dtype == np.uint8
    assert open_volume(paths_of(files)).fingerprint() == read_volume(paths_of(files)).fingerprint()


def test_fingerprint_follows_content_not_name(files: dict[str, Path]) -> None:
    volume = read_volume(paths_of(files))
    print_ = volume.fingerprint()
    assert len(print_) == 16
    assert Volume("other", volume.image, volume.label, volume.mask).fingerprint() == print_
    changed = volume.image.copy()
    changed[0, 0, 0] += 1
    others = [
        Volume("v", changed, volume.label, volume.mask),
        Volume("v", volume.image.astype(np.uint16), volume.label, volume.mask),
        Volume("v", volume.image, volume.label, None),
        Volume("v", volume.image, None, volume.mask),
        Volume("v", volume.image.reshape(9, 21, 20), volume.label, volume.mask),
    ]
    assert len({v.fingerprint() for v in others} | {print_}) == 6


@pytest.mark.parametrize("name", ["v.h5", "v.tif", "v.zarr"])
def test_a_write_that_fails_leaves_the_old_file(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / name
    write_array(path, counted())
    code = SUFFIXES[path.suffix].code
    create = code.create

    @contextmanager
    def fail_late(*arguments: Any) -> Iterator[Any]:
        with create(*arguments) as target:
            yield target
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(code, "create", fail_late)
    with pytest.raises(VolumeError, match="No space left"):
        write_array(path, counted() + 1)
    np.testing.assert_array_equal(read_array(path), counted())
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize("new", ["other", "raw"])
def test_a_dataset_of_a_zarr_is_written_beside_the_old_ones_without_copying_them(
    tmp_path: Path, new: str
) -> None:
    path = tmp_path / "v.zarr"
    write_array(f"{path}:raw", counted())
    chunks = {file: file.stat().st_ino for file in path.rglob("0") if file.is_file()}
    assert chunks

    def fill(error: Exception | None) -> None:
        with create_array(f"{path}:{new}", SHAPE, np.uint8) as target:
            target[...] = counted() + 1
            if error is not None:
                raise error

    with pytest.raises(VolumeError, match="No space left"):
        fill(OSError(28, "No space left on device"))
    np.testing.assert_array_equal(read_array(f"{path}:raw"), counted())
    fill(None)
    np.testing.assert_array_equal(read_array(f"{path}:{new}"), counted() + 1)
    if new != "raw":
        assert chunks == {file: file.stat().st_ino for file in chunks}
    assert os.listdir(tmp_path) == ["v.zarr"]


@pytest.mark.parametrize("name", ["v.h5", "v.tif", "v.zarr"])
def test_writing_replaces_and_leaves_nothing_behind(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "new" / "deep"
    write_array(folder / name, counted())
    write_array(folder / name, counted() + 1)
    np.testing.assert_array_equal(read_array(folder / name), counted() + 1)
    assert os.listdir(folder) == [name]


def test_an_unknown_suffix_and_a_file_in_the_way_are_refused(tmp_path: Path) -> None:
    with pytest.raises(VolumeError, match=r"'\.npy' is no known format"):
        write_array(tmp_path / "v.npy", counted())
    (tmp_path / "file").write_text("")
    with pytest.raises(VolumeError, match="cannot be written"):
        write_array(tmp_path / "file" / "v.h5", counted())
