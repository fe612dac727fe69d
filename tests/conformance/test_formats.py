"""Every format in and out, against files and readers that are not ours."""

from __future__ import annotations

import gzip
import json
import re
import socket
import struct
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import h5py
import mrcfile
import nibabel
import nrrd
import numpy as np
import pytest
import tensorstore
import tifffile
import yaozarrs
import zarr
from PIL import Image

from hydralv_tune.config.errors import InputError, VolumeError
from hydralv_tune.data.formats import FORMATS
from hydralv_tune.data.formats.files import create_array, open_lazy, read_array, write_array
from hydralv_tune.data.volumes import agreed_placement

SHAPE = (5, 12, 17)
SIZE = (30.0, 8.0, 8.5)
ORIGIN = (300.0, -16.0, 85.0)


def values(dtype: Any = np.uint8, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    """Return an array in which every axis can be told from every other."""
    return np.random.default_rng(0).integers(0, 250, shape).astype(dtype)


# Each writes (Z, Y, X) uint16 of SIZE as the format's own users do, and returns what to open.


def hdf5(folder: Path, array: np.ndarray) -> str:
    """As CREMI writes its volumes."""
    with h5py.File(folder / "cremi.hdf", "w") as file:
        file["volumes/raw"] = array
        file["volumes/raw"].attrs["resolution"] = SIZE
        file["volumes/raw"].attrs["offset"] = ORIGIN
    return str(folder / "cremi.hdf")


def tiff(folder: Path, array: np.ndarray) -> str:
    """As Fiji saves a calibrated stack."""
    z, y, x = SIZE
    metadata = {"axes": "ZYX", "spacing": z, "unit": "nm"} | {
        f"{axis}origin": -o / s for axis, o, s in zip("zyx", ORIGIN, SIZE, strict=True)
    }
    tifffile.imwrite(
        folder / "fiji.tif", array, imagej=True, resolution=(1 / x, 1 / y), metadata=metadata
    )
    return str(folder / "fiji.tif")


def ome_zarr(folder: Path, array: np.ndarray, version: str = "0.4") -> str:
    """As ome-zarr-py writes an image with time and channels of length 1."""
    group = zarr.open_group(folder / "i.zarr", mode="w", zarr_format=2 if version == "0.4" else 3)
    named = {} if version == "0.4" else {"dimension_names": list("tczyx")}
    group.create_array("s0", data=array[None, None], **named)
    micrometres = [value / 1000 for value in SIZE]
    moved = [0, 0, *(value / 1000 for value in ORIGIN)]
    image = {
        "version": version,
        "axes": [{"name": "t", "type": "time"}, {"name": "c", "type": "channel"}]
        + [{"name": name, "type": "space", "unit": "micrometer"} for name in "zyx"],
        "datasets": [
            {
                "path": "s0",
                "coordinateTransformations": [
                    {"type": "scale", "scale": [1, 1, 1, 2, 0.5]},
                    {"type": "translation", "translation": [0, 0, 0, 0, 0]},
                ],
            }
        ],
        "coordinateTransformations": [
            {"type": "scale", "scale": [1, 1, *np.divide(micrometres, [1, 2, 0.5])]},
            {"type": "translation", "translation": moved},
        ],
    }
    group.attrs.update(
        {"multiscales": [image]}
        if version == "0.4"
        else {"ome": {"version": version, "multiscales": [image]}}
    )
    return str(folder / "i.zarr")


def ome_zarr_5(folder: Path, array: np.ndarray) -> str:
    """The same in version 0.5."""
    return ome_zarr(folder, array, "0.5")


def xarray_zarr(folder: Path, array: np.ndarray) -> str:
    """As xarray writes an array whose axes are in another order."""
    made = zarr.create_array(folder / "x.zarr", data=array.transpose(2, 0, 1), zarr_format=2)
    made.attrs.update(
        {
            "_ARRAY_DIMENSIONS": ["x", "z", "y"],
            "resolution": [SIZE[2], SIZE[0], SIZE[1]],
            "offset": [ORIGIN[2], ORIGIN[0], ORIGIN[1]],
            "units": "nm",
        }
    )
    return str(folder / "x.zarr")


def n5(folder: Path, array: np.ndarray) -> str:
    """By the letter of the N5 specification: one gzipped block, big-endian, x fastest."""
    level = folder / "v.n5" / "volumes" / "raw" / "s0"
    (level / "0" / "0").mkdir(parents=True)
    dimensions = list(array.shape[::-1])
    (level / "attributes.json").write_text(
        json.dumps(
            {
                "dimensions": dimensions,
                "blockSize": dimensions,
                "dataType": "uint16",
                "compression": {"type": "gzip"},
                "resolution": SIZE[::-1],
                "offset": ORIGIN[::-1],
                "units": ["nm"] * 3,
            }
        )
    )
    head = struct.pack(">HHIII", 0, 3, *dimensions)
    (level / "0" / "0" / "0").write_bytes(head + gzip.compress(array.astype(">u2").tobytes()))
    return f"{folder / 'v.n5'}:volumes/raw"


def precomputed(folder: Path, array: np.ndarray) -> str:
    """By the letter of the precomputed specification: one raw chunk, x fastest."""
    offset = [round(o / s) for o, s in zip(ORIGIN[::-1], SIZE[::-1], strict=True)]
    size = list(array.shape[::-1])
    scale = {
        "key": "8_8_30",
        "size": size,
        "resolution": SIZE[::-1],
        "voxel_offset": offset,
        "chunk_sizes": [size],
        "encoding": "raw",
    }
    root = folder / "hydra"
    (root / "8_8_30").mkdir(parents=True)
    info = {"type": "image", "data_type": "uint16", "num_channels": 1, "scales": [scale]}
    (root / "info").write_text(json.dumps(info))
    name = "_".join(f"{o}-{o + n}" for o, n in zip(offset, size, strict=True))
    (root / "8_8_30" / name).write_bytes(array.astype("<u2").tobytes())
    return f"precomputed://file://{root}"


def nifti(folder: Path, array: np.ndarray) -> str:
    """As nibabel saves an image in micrometres."""
    affine = np.diag([*np.divide(SIZE[::-1], 1000), 1])
    affine[:3, 3] = np.divide(ORIGIN[::-1], 1000)
    image = nibabel.Nifti1Image(array.T, affine)
    image.header.set_xyzt_units("micron", "sec")
    nibabel.save(image, folder / "v.nii.gz")
    return str(folder / "v.nii.gz")


def mrc(folder: Path, array: np.ndarray) -> str:
    """As mrcfile writes a volume in angstrom."""
    with mrcfile.new(folder / "v.mrc") as file:
        file.set_data(array)
        file.set_volume()
        file.voxel_size = tuple(10 * value for value in SIZE[::-1])
        for axis, value in zip("zyx", ORIGIN, strict=True):
            file.header.origin[axis] = 10 * value
    return str(folder / "v.mrc")


def nrrd_(folder: Path, array: np.ndarray) -> str:
    """As pynrrd writes a volume with a space."""
    header = {
        "space dimension": 3,
        "space directions": np.diag(SIZE[::-1]),
        "space origin": ORIGIN[::-1],
        "space units": ["nm"] * 3,
        "kinds": ["domain"] * 3,
    }
    nrrd.write(str(folder / "v.nrrd"), array.T, header)
    return str(folder / "v.nrrd")


WRITERS = [
    *(hdf5, tiff, ome_zarr, ome_zarr_5, xarray_zarr, n5, precomputed, nifti, mrc, nrrd_),
]


@pytest.mark.parametrize("write", WRITERS)
def test_a_file_of_another_program_is_read_with_size_and_origin(
    tmp_path: Path, write: Callable[[Path, np.ndarray], str]
) -> None:
    array = values(np.uint16)
    with open_lazy(write(tmp_path, array), ndim=3) as lazy:
        assert (lazy.shape, lazy.dtype) == (array.shape, array.dtype)
        np.testing.assert_array_equal(lazy[...], array)
        np.testing.assert_array_equal(lazy[1:4, 3:9, 5], array[1:4, 3:9, 5])
        np.testing.assert_array_equal(lazy[-1], array[-1])
        assert lazy.voxel_size_nm == pytest.approx(SIZE, rel=1e-6)
        assert lazy.origin_nm == pytest.approx(ORIGIN, rel=1e-6)


@pytest.mark.parametrize("suffix", [".png", ".tif", ".bmp"])
def test_a_folder_of_sections_is_a_stack(tmp_path: Path, suffix: str) -> None:
    array = values()
    for z, section in enumerate(array):
        Image.fromarray(section).save(tmp_path / f"em_{8 + z}{suffix}")
    (tmp_path / "notes.txt").write_text("8 nm")
    np.testing.assert_array_equal(read_array(tmp_path, ndim=3), array)


@pytest.mark.parametrize(
    ("names", "word"),
    [
        (["a_1.png", "a_2.png", "a_4.png", "a_5.png", "a_6.png"], "one is missing"),
        (["c0_1.png", "c0_2.png", "c0_3.png", "c1_1.png", "c1_2.png"], "do not rise together"),
        (["a_1.png", "b_2.png", "a_3.png", "a_4.png", "a_5.png"], "differ in more than numbers"),
        (["a_1.png", "a_2.png", "a_3.png", "a_4.png", "a_5.tif"], "several kinds"),
    ],
)
def test_sections_whose_order_is_not_known_are_refused(
    tmp_path: Path, names: list[str], word: str
) -> None:
    for name, section in zip(names, values(), strict=True):
        Image.fromarray(section).save(tmp_path / name)
    with pytest.raises(VolumeError, match=word):
        read_array(tmp_path, ndim=3)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".bmp"])
def test_a_single_section_names_the_folder_to_give(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"s_0{suffix}"
    Image.fromarray(values()[0]).save(path)
    assert f"Give the folder that holds the sections of a stack, one picture each: {tmp_path}" in (
        refusal(path)
    )


def test_hidden_files_of_macos_are_no_pictures(tmp_path: Path) -> None:
    (tmp_path / "._0.png").write_bytes(b"Mac OS X")
    assert "folder without pictures" in refusal(tmp_path)
    for z, section in enumerate(values()):
        Image.fromarray(section).save(tmp_path / f"{z}.png")
    np.testing.assert_array_equal(read_array(tmp_path, ndim=3), values())


def test_sections_that_differ_or_have_colours_are_refused(tmp_path: Path) -> None:
    for z, section in enumerate(values()):
        Image.fromarray(section).save(tmp_path / f"{z}.png")
    Image.fromarray(values()[0][:-1]).save(tmp_path / "3.png")
    with pytest.raises(VolumeError, match=r"3\.png.*must be alike"):
        read_array(tmp_path, ndim=3)
    Image.fromarray(values(shape=(9, 9, 3)), "RGB").save(tmp_path / "0.png")
    with pytest.raises(VolumeError, match=r"0\.png.*mode RGB"):
        read_array(tmp_path, ndim=3)


# What is written, read by libraries that are not ours.

OUT = ["o.h5", "o.tif", "o.zarr", "o.ome.zarr", "o.precomputed"]


@pytest.mark.parametrize("name", OUT)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32, np.uint64, np.float32])
def test_box_by_box_is_as_at_once_and_carries_size_and_origin(
    tmp_path: Path, name: str, dtype: Any
) -> None:
    array = values(dtype, (20, 150, 70))
    size, origin = (30.0, 8.0, 8.0), (300.0, 16.0, -80.0)
    with create_array(
        tmp_path / name, array.shape, dtype, voxel_size_nm=size, origin_nm=origin
    ) as out:
        for z in range(0, 20, 16):
            for y in range(0, 150, 128):
                box = np.s_[z : z + 16, y : y + 128, :]
                out[box] = array[box]
    with open_lazy(tmp_path / name, ndim=3) as lazy:
        np.testing.assert_array_equal(lazy[...], array)
        assert lazy.voxel_size_nm == size
        if not (name == "o.precomputed" and dtype == np.uint64):
            assert lazy.origin_nm == origin
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.filterwarnings("ignore:.*holds a single section")
@pytest.mark.parametrize("name", OUT)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32, np.float32])
@pytest.mark.parametrize("short", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)])
def test_axes_of_length_one_are_kept(
    tmp_path: Path, short: tuple[int, ...], dtype: Any, name: str
) -> None:
    shape = tuple(1 if axis in short else side for axis, side in enumerate((3, 7, 5)))
    for array in (values(dtype, shape), values(dtype, (2, *shape))):
        write_array(tmp_path / name, array, voxel_size_nm=SIZE, origin_nm=(300.0, 16.0, -85.0))
        with open_lazy(tmp_path / name, ndim=array.ndim) as lazy:
            np.testing.assert_array_equal(lazy[...], array)
            np.testing.assert_array_equal(lazy[..., :1, 1:, 0:], array[..., :1, 1:, 0:])
            assert lazy.voxel_size_nm == SIZE


def one_section(path: Path, section: np.ndarray, **options: Any) -> None:
    """Write a volume of one section as Fiji or OME's tools do."""
    axes = "ZYX" if path.name.startswith("fiji") else "YX"
    with tifffile.TiffWriter(path, imagej=axes == "ZYX", ome=axes == "YX") as file:
        file.write(section[None] if axes == "ZYX" else section, metadata={"axes": axes}, **options)


@pytest.mark.parametrize("options", [{}, {"compression": "zlib"}, {"tile": (16, 16)}])
@pytest.mark.parametrize("name", ["fiji.tif", "o.ome.tif"])
def test_a_volume_of_one_section_is_read_with_a_word(
    tmp_path: Path, name: str, options: dict[str, Any]
) -> None:
    one_section(tmp_path / name, values(np.uint16)[0], **options)
    with pytest.warns(UserWarning, match="a single section"):
        read = read_array(tmp_path / name, ndim=3)
    np.testing.assert_array_equal(read, values(np.uint16)[:1])


@pytest.mark.parametrize("suffix", [".tif", ".ome.tif"])
def test_sections_that_fiji_saved_one_by_one_are_a_stack(tmp_path: Path, suffix: str) -> None:
    for z, section in enumerate(values(np.uint16)):
        one_section(tmp_path / f"fiji_{z}{suffix}", section)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(read_array(tmp_path, ndim=3), values(np.uint16))


def test_fiji_finds_the_size_in_a_tiff(tmp_path: Path) -> None:
    write_array(tmp_path / "s.tif", values(np.uint16), voxel_size_nm=SIZE)
    with tifffile.TiffFile(tmp_path / "s.tif") as file:
        assert file.is_imagej
        assert file.imagej_metadata is not None
        assert (file.imagej_metadata["slices"], file.imagej_metadata["unit"]) == (SHAPE[0], "nm")
        assert file.imagej_metadata["spacing"] == SIZE[0]
        x = file.pages.first.tags["XResolution"].value
        assert x[1] / x[0] == pytest.approx(SIZE[2])
        np.testing.assert_array_equal(file.asarray(), values(np.uint16))


def test_an_ome_zarr_of_labels_is_valid_and_its_levels_lie_on_each_other(tmp_path: Path) -> None:
    labels = values(np.uint32, (24, 700, 600))
    path = tmp_path / "seg.ome.zarr"
    write_array(path, labels, voxel_size_nm=(30, 8, 8), origin_nm=(60, 0, 8))
    yaozarrs.validate_zarr_store(str(path))
    group = zarr.open_group(path, mode="r")
    assert group.attrs["image-label"]
    levels = group.attrs["multiscales"][0]["datasets"]
    assert [level["coordinateTransformations"][0]["scale"] for level in levels] == [
        [30, 8, 8],
        [30, 16, 16],
        [30, 32, 32],
    ]
    np.testing.assert_array_equal(group["1"][...], labels[:, ::2, ::2])
    np.testing.assert_array_equal(group["2"][...], labels[:, ::4, ::4])
    with open_lazy(f"{path}:1") as level:
        assert (level.voxel_size_nm, level.origin_nm) == ((30, 16, 16), (60, 0, 8))


@pytest.mark.filterwarnings("ignore:Consolidated metadata")
@pytest.mark.parametrize("name", ["im.ome.zarr", "im.zarr"])
@pytest.mark.parametrize("is_consolidated", [False, True])
@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_labels_go_beside_the_image_of_an_ome_zarr_in_its_own_version(
    tmp_path: Path, version: str, is_consolidated: bool, name: str
) -> None:
    path = Path(ome_zarr(tmp_path, values(np.uint16), version)).rename(tmp_path / name)
    if is_consolidated:
        zarr.consolidate_metadata(path)
    labels = values(np.uint32, (5, 12, 300))
    for label in ("first", "vesicles", "vesicles"):
        write_array(f"{path}:labels/{label}", labels, voxel_size_nm=SIZE)
    yaozarrs.validate_zarr_store(str(path))
    root = zarr.open_group(path, mode="r")
    assert (root.metadata.consolidated_metadata is not None) == is_consolidated
    assert root["labels/vesicles/1"].shape == (5, 6, 150)
    assert root.metadata.zarr_format == root["labels/vesicles"].metadata.zarr_format
    attributes = root["labels"].attrs
    assert attributes.get("ome", attributes)["labels"] == ["first", "vesicles"]
    np.testing.assert_array_equal(read_array(path, ndim=3), values(np.uint16))
    with open_lazy(f"{path}:labels/vesicles", ndim=3) as lazy:
        np.testing.assert_array_equal(lazy[...], labels)
        assert lazy.voxel_size_nm == SIZE


def test_an_array_of_an_ome_zarr_is_not_replaced_by_a_group(tmp_path: Path) -> None:
    path = tmp_path / "im.ome.zarr"
    write_array(path, values())
    with pytest.raises(VolumeError, match="an array, but an image of OME-Zarr is a group"):
        write_array(f"{path}:0", values(np.uint16))
    np.testing.assert_array_equal(read_array(path), values())


@pytest.mark.filterwarnings("ignore:Consolidated metadata")
@pytest.mark.parametrize("zarr_format", [2, 3])
def test_consolidated_metadata_that_are_stale_hide_nothing(
    tmp_path: Path, zarr_format: Any
) -> None:
    path = tmp_path / "c.zarr"
    group = zarr.open_group(path, mode="w", zarr_format=zarr_format)
    group.create_array("deep/old", data=values())
    zarr.consolidate_metadata(path)
    zarr.consolidate_metadata(path / "deep")
    group = zarr.open_group(path, mode="r+", use_consolidated=False)
    group.create_array("deep/new", data=values(np.uint16)).attrs["voxel_size_nm"] = SIZE
    with open_lazy(f"{path}:deep/new") as lazy:
        np.testing.assert_array_equal(lazy[...], values(np.uint16))
        assert lazy.voxel_size_nm == SIZE
    assert "deep/new, deep/old" in refusal(path)
    assert "2 datasets" in refusal(f"{path}:deep")
    write_array(f"{path}:deep/new", values(np.uint8))
    assert zarr.open_consolidated(path)["deep/new"].dtype == np.uint8
    assert zarr.open_consolidated(path / "deep")["new"].dtype == np.uint8


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.uint64])
def test_a_precomputed_segmentation_is_one_to_tensorstore(tmp_path: Path, dtype: Any) -> None:
    labels = values(dtype, (20, 70, 90))
    path = tmp_path / "seg.precomputed"
    write_array(path, labels, voxel_size_nm=(30, 8, 8), origin_nm=(90, 80, 8))
    information = json.loads((path / "info").read_text())
    scale = information["scales"][0]
    assert information["type"] == "segmentation"
    assert scale["resolution"] == [8, 8, 30]
    assert scale["voxel_offset"] == [1, 10, 3]
    store = tensorstore.open(
        {"driver": "neuroglancer_precomputed", "kvstore": f"file://{path}/"}
    ).result()
    read = store[1:91, 10:80, 3:23, 0].read().result()
    np.testing.assert_array_equal(read.T, labels)


def test_probabilities_keep_their_channels(tmp_path: Path) -> None:
    maps = values(np.float32, (3, *SHAPE)) / 250
    for name in OUT:
        write_array(tmp_path / name, maps, voxel_size_nm=SIZE)
        with open_lazy(tmp_path / name, ndim=4) as lazy:
            np.testing.assert_array_equal(lazy[...], maps)
            assert lazy.voxel_size_nm == SIZE


# What a file says of itself is heeded or refused.


def refusal(path: object, ndim: int = 3) -> str:
    """Return the message with which a file is refused."""
    with pytest.raises(VolumeError) as caught:
        read_array(str(path), ndim=ndim)
    assert "damaged" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("options", "shape", "word"),
    [
        ({"photometric": "rgb"}, (16, 16, 3), "colour"),
        ({"photometric": "rgb"}, (5, 16, 16, 3), "colour"),
        ({"imagej": True, "metadata": {"axes": "CYX"}}, (3, 16, 16), "channels"),
        ({"imagej": True, "metadata": {"axes": "TZCYX"}}, (2, 5, 1, 16, 16), "time points"),
        ({"ome": True, "metadata": {"axes": "CZYX"}}, (2, 5, 16, 16), "channels"),
        ({"photometric": "minisblack"}, (16, 16), "stack of sections"),
        ({"photometric": "minisblack", "extratags": [(274, 3, 1, 3, True)]}, (5, 9, 9), "upright"),
    ],
)
def test_a_tiff_that_is_no_volume_is_refused_as_what_it_is(
    tmp_path: Path, options: dict[str, Any], shape: tuple[int, ...], word: str
) -> None:
    tifffile.imwrite(tmp_path / "v.tif", values(shape=shape), **options)
    assert word in refusal(tmp_path / "v.tif")


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, bool])
@pytest.mark.parametrize("compression", [None, "zlib"])
def test_a_tiff_whose_zero_is_white_is_refused(
    tmp_path: Path, dtype: Any, compression: str | None
) -> None:
    options = {"photometric": "miniswhite", "compression": compression}
    tifffile.imwrite(tmp_path / "v.tif", values(dtype), **options)
    with pytest.raises(VolumeError, match=r"0 is white \(MinIsWhite\)"):
        read_array(tmp_path / "v.tif", ndim=3)


def test_numbers_of_a_palette_are_told_from_greys(tmp_path: Path) -> None:
    ramp = np.stack([np.arange(256, dtype=np.uint16) * 257] * 3)
    colours = np.random.default_rng(0).integers(0, 65535, (3, 256)).astype(np.uint16)
    for name, palette in (("ramp", ramp), ("turned", ramp[:, ::-1]), ("colours", colours)):
        path = tmp_path / f"{name}.tif"
        tifffile.imwrite(path, values(), photometric="palette", colormap=palette)
        with open_lazy(path, ndim=3) as lazy:
            assert lazy.palette == (name != "ramp")
            np.testing.assert_array_equal(lazy[...], values())


def test_pages_of_other_shapes_and_second_series_are_refused(tmp_path: Path) -> None:
    with tifffile.TiffWriter(tmp_path / "two.tif") as file:
        file.write(values(), photometric="minisblack")
        file.write(values(shape=(5, 9, 9)), photometric="minisblack")
    assert "2 images" in refusal(tmp_path / "two.tif")
    with tifffile.TiffWriter(tmp_path / "types.tif") as file:
        for dtype in (np.uint8, np.uint8, np.uint16):
            file.write(values(dtype, (9, 9)), photometric="minisblack", metadata=None)
    assert "2 images" in refusal(tmp_path / "types.tif")
    with tifffile.TiffWriter(tmp_path / "multi.ome.tif", ome=True) as file:
        for _ in range(2):
            file.write(values(), photometric="minisblack", metadata={"axes": "ZYX"})
    assert "2 images" in refusal(tmp_path / "multi.ome.tif")


def test_time_that_stands_for_z_is_read_with_a_word(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "t.tif", values(), imagej=True, metadata={"axes": "TYX"})
    with pytest.warns(UserWarning, match="time"):
        np.testing.assert_array_equal(read_array(tmp_path / "t.tif", ndim=3), values())


def test_axistags_of_ilastik_order_the_axes(tmp_path: Path) -> None:
    keys = "xzyc"
    with h5py.File(tmp_path / "i.h5", "w") as file:
        file["exported_data"] = values().transpose(2, 0, 1)[..., None]
        tags = [{"key": key, "typeFlags": 2, "resolution": 0} for key in keys]
        file["exported_data"].attrs["axistags"] = json.dumps({"axes": tags})
    np.testing.assert_array_equal(read_array(tmp_path / "i.h5", ndim=3), values())
    maps = values(np.float32, (3, *SHAPE)) / 250
    with h5py.File(tmp_path / "p.h5", "w") as file:
        file["exported_data"] = np.moveaxis(maps, 0, -1)
        tags = [{"key": key, "typeFlags": 2, "resolution": 0} for key in "zyxc"]
        file["exported_data"].attrs["axistags"] = json.dumps({"axes": tags})
    np.testing.assert_array_equal(read_array(tmp_path / "p.h5", ndim=4), maps)
    assert "channels" in refusal(tmp_path / "p.h5")


@pytest.mark.parametrize(
    "transformation",
    [
        {"type": "affine", "affine": [[1, 0, 0, 0]]},
        {"type": "scale", "path": "s"},
        {"type": "scale", "scale": [1, 1, 1]},
        {"type": "rotation"},
    ],
)
def test_a_transformation_that_is_not_understood_is_refused(
    tmp_path: Path, transformation: dict[str, Any]
) -> None:
    path = Path(ome_zarr(tmp_path, values()))
    group = zarr.open_group(path)
    image = dict(group.attrs["multiscales"][0])
    image["coordinateTransformations"] = [transformation]
    group.attrs["multiscales"] = [image]
    assert "not understood" in refusal(path)


@pytest.mark.parametrize("scale", [[-30, 8, 8], [30, 0, 8], [30, 8, float("nan")]])
def test_a_scale_that_mirrors_an_axis_or_is_none_is_refused(
    tmp_path: Path, scale: list[float]
) -> None:
    path = Path(ome_zarr(tmp_path, values()))
    group = zarr.open_group(path)
    image = dict(group.attrs["multiscales"][0])
    axes = len(image["axes"])
    steps = [{"type": "scale", "scale": [1.0] * (axes - 3) + scale}]
    image["coordinateTransformations"] = steps
    group.attrs["multiscales"] = [image]
    assert "mirrors an axis or is no scale" in refusal(path)


def bare_hdf5(path: Path, size: list[float], origin: list[float]) -> str:
    """In pixels, as some acquisition programs write it."""
    with h5py.File(path.with_suffix(".h5"), "w") as file:
        file["main"] = values()
        file["main"].attrs.update({"resolution": size, "offset": origin, "units": "pixels"})
    return str(path.with_suffix(".h5"))


def bare_zarr(path: Path, size: list[float], origin: list[float]) -> str:
    """OME-Zarr, which may leave units out."""
    group = zarr.open_group(path.with_suffix(".zarr"), mode="w", zarr_format=2)
    group.create_array("0", data=values())
    steps = [
        {"type": "scale", "scale": size},
        {"type": "translation", "translation": origin},
    ]
    group.attrs["multiscales"] = [
        {
            "axes": [{"name": name, "type": "space"} for name in "zyx"],
            "datasets": [{"path": "0", "coordinateTransformations": steps}],
        }
    ]
    return str(path.with_suffix(".zarr"))


def bare_nifti(path: Path, size: list[float], origin: list[float]) -> str:
    """NIfTI as nibabel writes it where nobody says a unit."""
    affine = np.diag([*size[::-1], 1.0])
    affine[:3, 3] = origin[::-1]
    nibabel.save(nibabel.Nifti1Image(values().T, affine), path.with_suffix(".nii"))
    return str(path.with_suffix(".nii"))


def bare_nrrd(path: Path, size: list[float], origin: list[float]) -> str:
    """NRRD without units."""
    header = {
        "space dimension": 3,
        "space directions": np.diag(size[::-1]),
        "space origin": origin[::-1],
    }
    nrrd.write(str(path.with_suffix(".nrrd")), values().T, header)
    return str(path.with_suffix(".nrrd"))


def bare_imagej(path: Path, size: list[float], origin: list[float]) -> str:
    """ImageJ, calibrated in pixels."""
    z, y, x = size
    places = [-o / s for o, s in zip(origin, size, strict=True)]
    metadata = dict(zip(("zorigin", "yorigin", "xorigin"), places, strict=True))
    tifffile.imwrite(
        path.with_suffix(".tif"), values(), imagej=True, resolution=(1 / x, 1 / y),
        metadata={"axes": "ZYX", "spacing": z, "unit": "pixel", **metadata},
    )  # fmt: skip
    return str(path.with_suffix(".tif"))


@pytest.mark.filterwarnings("ignore:.*is no known length")
@pytest.mark.parametrize("write", [bare_hdf5, bare_zarr, bare_nifti, bare_nrrd, bare_imagej])
def test_files_of_one_volume_agree_where_their_unit_is_not_known_too(
    tmp_path: Path, write: Callable[[Path, list[float], list[float]], str]
) -> None:
    size, origin = [30.0, 8.0, 8.0], [60.0, 0.0, 16.0]
    image = write(tmp_path / "image", size, origin)
    assert agreed_placement(image, write(tmp_path / "same", size, origin)) == (None, None)
    other = write(tmp_path / "other", [30.0, 16.0, 16.0], origin)
    with pytest.raises(VolumeError, match=r"other.*voxel size is 30 x 16 x 16 in a unit that is"):
        agreed_placement(image, other)
    moved = write(tmp_path / "moved", size, [0.0, 0.0, 16.0])
    with pytest.raises(VolumeError, match=r"moved.*origin is .*0 x .*0 x 16 in a unit that is no"):
        agreed_placement(image, moved)


@pytest.mark.parametrize(
    ("attributes", "size", "said"),
    [
        ({"resolution": [8, 8, 30], "units": ["nm", "nm", "um"]}, (30_000, 8, 8), None),
        ({"resolution": [8, 8, 30], "units": ["nm"]}, (30, 8, 8), None),
        ({"resolution": [8, -8, 30]}, None, "sizes z, y, x = [30.0, -8.0, 8.0]"),
        ({"resolution": [8, 8, 30], "units": ["nm", "px", "nm"]}, None, "The unit 'px'"),
        (
            {"transform": {"axes": ["x", "y", "z"], "scale": [8, 8, 30], "units": ["px"] * 3}},
            None,
            "The unit 'px'",
        ),
    ],
)
def test_each_axis_of_n5_has_its_own_unit_and_what_is_no_size_is_told(
    tmp_path: Path, attributes: dict[str, Any], size: Any, said: str | None
) -> None:
    path = n5(tmp_path, values())
    file = tmp_path / "v.n5" / "volumes" / "raw" / "s0" / "attributes.json"
    kept = ("dimensions", "blockSize", "dataType", "compression")
    own = {key: value for key, value in json.loads(file.read_text()).items() if key in kept}
    file.write_text(json.dumps({**own, **attributes}))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        with open_lazy(path, ndim=3) as lazy:
            assert lazy.voxel_size_nm == size
    told = [str(w.message) for w in caught if issubclass(w.category, UserWarning)]
    assert (said in told[0]) if said else not told


def test_a_transformation_by_infinity_is_refused(tmp_path: Path) -> None:
    path = Path(ome_zarr(tmp_path, values()))
    group = zarr.open_group(path)
    image = dict(group.attrs["multiscales"][0])
    for kind, words in (("scale", "is no scale"), ("translation", "is not understood")):
        steps = [{"type": kind, kind: [1.0] * 4 + [float("inf")]}]
        group.attrs["multiscales"] = [{**image, "coordinateTransformations": steps}]
        assert words in refusal(path)


def test_links_of_hdf5_are_followed_or_named(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "there.h5", "w") as file:
        file["raw"] = values()
    for name, target, dataset in (
        ("good", "there.h5", "main"), ("other", "there.h5", "em"), ("gone", "gone.h5", "main"),
    ):  # fmt: skip
        with h5py.File(tmp_path / f"{name}.h5", "w") as file:
            file[dataset] = h5py.ExternalLink(target, "/raw")
    for name in ("good.h5", "other.h5", "good.h5:main"):
        np.testing.assert_array_equal(read_array(tmp_path / name, ndim=3), values())
    assert "'main' is a link to gone.h5, which is not there" in refusal(tmp_path / "gone.h5")
    with h5py.File(tmp_path / "soft.h5", "w") as file:
        file["a"], file["b"] = values() + 1, values()
        file["main"] = h5py.SoftLink("/b")
        file["latest"] = h5py.SoftLink("/gone")
    np.testing.assert_array_equal(read_array(tmp_path / "soft.h5", ndim=3), values())
    assert "'latest' is a link to /gone" in refusal(f"{tmp_path / 'soft.h5'}:latest")


def test_an_mrc_of_an_unknown_kind_is_not_called_damaged(tmp_path: Path) -> None:
    content = bytearray(Path(mrc(tmp_path, values())).read_bytes())
    content[12:16] = struct.pack("<i", 101)
    (tmp_path / "packed.mrc").write_bytes(content)
    assert "of a kind that is not known" in refusal(tmp_path / "packed.mrc")


def test_plain_sections_of_tifffile_are_a_stack(tmp_path: Path) -> None:
    for z, section in enumerate(values()):
        tifffile.imwrite(tmp_path / f"s{z}.tif", section)
    np.testing.assert_array_equal(read_array(tmp_path, ndim=3), values())


def test_a_translation_by_nothing_says_where_an_image_is(tmp_path: Path) -> None:
    path = Path(ome_zarr(tmp_path, values()))
    group = zarr.open_group(path)
    image = dict(group.attrs["multiscales"][0])
    del image["coordinateTransformations"]
    group.attrs["multiscales"] = [image]
    with open_lazy(path, ndim=3) as lazy:
        assert lazy.origin_nm == (0, 0, 0), "a label of another origin is not of this image"
    image["datasets"][0]["coordinateTransformations"].pop()
    group.attrs["multiscales"] = [image]
    with open_lazy(path, ndim=3) as lazy:
        assert lazy.origin_nm is None


@pytest.mark.parametrize(
    ("attributes", "said"),
    [
        ({"voxel_size_nm": "thirty"}, "voxel_size_nm = thirty"),
        ({"voxel_size_nm": [-30.0, 8, 8]}, "voxel_size_nm = [-30."),
        ({"resolution": [8, 8]}, "resolution = [8 8]"),
        ({"element_size_um": [np.nan, 1, 1]}, "element_size_um = [nan"),
        ({"resolution": [30, 8, 8], "unit": "px"}, "The unit 'px' is no known length"),
    ],
)
def test_a_size_that_is_not_understood_is_told_and_unknown(
    tmp_path: Path, attributes: dict[str, Any], said: str
) -> None:
    with h5py.File(tmp_path / "v.h5", "w") as file:
        file["main"] = values()
        file["main"].attrs.update(attributes)
    with (
        pytest.warns(UserWarning, match=re.escape(said)),
        open_lazy(tmp_path / "v.h5", ndim=3) as lazy,
    ):
        assert lazy.voxel_size_nm is None


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        ({"spacing": -30, "unit": "nm"}, "spacing = -30"),
        ({"spacing": 30, "unit": "inch"}, "The unit 'inch' is no known length"),
    ],
)
def test_a_size_of_imagej_that_is_none_is_told_and_unknown(
    tmp_path: Path, metadata: dict[str, Any], said: str
) -> None:
    metadata = {"axes": "ZYX", **metadata}
    tifffile.imwrite(
        tmp_path / "v.tif", values(), imagej=True, resolution=(1 / 8, 1 / 8), metadata=metadata
    )
    with (
        pytest.warns(UserWarning, match=said),
        open_lazy(tmp_path / "v.tif", ndim=3) as lazy,
    ):
        assert lazy.voxel_size_nm is None


def test_two_images_of_one_group_are_refused_by_name(tmp_path: Path) -> None:
    path = Path(ome_zarr(tmp_path, values()))
    group = zarr.open_group(path)
    group.attrs["multiscales"] = [*group.attrs["multiscales"], *group.attrs["multiscales"]]
    assert "2 images" in refusal(path)
    np.testing.assert_array_equal(read_array(f"{path}:s0", ndim=3), values())


def test_a_level_is_found_by_its_path_too(tmp_path: Path) -> None:
    path = Path(ome_zarr(tmp_path, values()))
    with open_lazy(path / "s0", ndim=3) as lazy:
        assert lazy.voxel_size_nm == pytest.approx(SIZE)
        np.testing.assert_array_equal(lazy[...], values())


def test_a_virtual_dataset_whose_source_is_gone_is_refused(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "part.h5", "w") as file:
        file["d"] = values()
    layout = h5py.VirtualLayout(SHAPE, np.uint8)
    layout[...] = h5py.VirtualSource("part.h5", "d", SHAPE)
    with h5py.File(tmp_path / "v.h5", "w") as file:
        file.create_virtual_dataset("main", layout)
    np.testing.assert_array_equal(read_array(tmp_path / "v.h5"), values())
    (tmp_path / "part.h5").unlink()
    assert "part.h5, which is missing" in refusal(tmp_path / "v.h5")


def test_a_file_that_is_being_written_says_so(tmp_path: Path) -> None:
    path = tmp_path / "v.h5"
    write_array(path, values())
    hold = (
        f"import h5py, sys; f = h5py.File({str(path)!r}, 'a'); print('open', flush=True); input()"
    )
    program = subprocess.Popen(
        [sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert program.stdout is not None
    assert program.stdout.readline() == "open\n"
    assert "another program" in refusal(path)
    program.communicate("\n")
    np.testing.assert_array_equal(read_array(tmp_path / "v.h5"), values())


def test_old_bytes_of_imod_are_not_signed(tmp_path: Path) -> None:
    with mrcfile.new(tmp_path / "v.mrc") as file:
        file.set_data(values().view(np.int8))
    content = bytearray((tmp_path / "v.mrc").read_bytes())
    content[152:160] = struct.pack("<ii", 1146047817, 0)
    (tmp_path / "v.mrc").write_bytes(content)
    np.testing.assert_array_equal(read_array(tmp_path / "v.mrc"), values())


def test_an_mrc_whose_columns_are_z_is_turned(tmp_path: Path) -> None:
    with mrcfile.new(tmp_path / "v.mrc") as file:
        file.set_data(values().transpose(2, 1, 0))
        file.header.mapc, file.header.mapr, file.header.maps = 3, 2, 1
    np.testing.assert_array_equal(read_array(tmp_path / "v.mrc", ndim=3), values())


def test_a_nifti_that_lies_askew_is_refused(tmp_path: Path) -> None:
    affine = np.eye(4)
    affine[:2, :2] = [[0.8, -0.6], [0.6, 0.8]]
    nibabel.save(nibabel.Nifti1Image(values().T, affine), tmp_path / "v.nii")
    assert "askew" in refusal(tmp_path / "v.nii")


@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
@pytest.mark.parametrize("coded", [("sform", 1), ("qform", 1)])
def test_sizes_of_nifti_in_mm_are_whole_nanometres(
    tmp_path: Path, kind: Any, coded: tuple[str, int]
) -> None:
    image = kind(values().T, None)
    affine = np.diag([8.5e-6, 8e-6, 3e-5, 1])
    affine[:3, 3] = np.divide([85, -16, 300], 1e6)
    getattr(image, f"set_{coded[0]}")(affine, coded[1])
    image.header.set_xyzt_units("mm")
    nibabel.save(image, tmp_path / "v.nii")
    with open_lazy(tmp_path / "v.nii", ndim=3) as lazy:
        assert (lazy.voxel_size_nm, lazy.origin_nm) == (SIZE, ORIGIN)


@pytest.mark.parametrize("samples", [3, 4])
@pytest.mark.parametrize("name", ["v.h5", "v.tif", "v.zarr"])
def test_a_picture_whose_colours_have_no_name_is_read_with_a_word(
    tmp_path: Path, name: str, samples: int
) -> None:
    picture = values(shape=(12, 17, samples))
    if name == "v.tif":
        tifffile.imwrite(tmp_path / name, picture, photometric="minisblack")
    elif name == "v.zarr":
        zarr.create_array(tmp_path / name, data=picture)
    else:
        write_array(tmp_path / name, picture)
    with pytest.warns(UserWarning, match=f"may be {samples} colours"):
        np.testing.assert_array_equal(read_array(tmp_path / name, ndim=3), picture)


def test_how_voxels_run_in_the_world_is_one_thing_in_nifti_and_nrrd(tmp_path: Path) -> None:
    steps = np.diag([-8.0, -8.0, 30.0])
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = steps, (-1, -2, 3)
    image = nibabel.Nifti1Image(values().T, affine)
    image.header.set_xyzt_units("mm")
    nibabel.save(image, tmp_path / "v.nii.gz")
    # NIfTI counts x to the right and y to the front; this space does neither.
    header = {
        "space": "left-posterior-superior", "space directions": np.abs(steps),
        "space origin": [1.0, 2.0, 3.0], "space units": ["mm"] * 3,
    }  # fmt: skip
    nrrd.write(str(tmp_path / "v.nrrd"), values().T, header)
    for name in ("v.nii.gz", "v.nrrd"):
        with open_lazy(tmp_path / name, ndim=3) as lazy:
            assert lazy.placement.directions == (1, -1, -1)
            assert lazy.origin_nm == (3e6, -2e6, -1e6)
            np.testing.assert_array_equal(lazy[...], values())


def test_a_packed_file_of_another_kind_is_no_nifti(tmp_path: Path) -> None:
    (tmp_path / "v.h5.gz").write_bytes(gzip.compress(b"anything"))
    assert "Unpack" in refusal(tmp_path / "v.h5.gz")


def test_a_url_without_its_format_says_which_is_read(tmp_path: Path) -> None:
    message = refusal("https://example.org/volume")
    assert "zarr://, n5:// or precomputed://" in message
    assert "precomputed://https://example.org/volume" in message


@pytest.mark.parametrize("url", ["zarr5:///tmp/v", "ftp://host/v.h5", "zarr://ftp://host/v"])
def test_a_url_of_another_kind_says_what_is_known(url: str) -> None:
    assert f"{url}: no URL of a known kind. Known: file://PATH" in refusal(url)


@pytest.mark.parametrize(
    "url",
    [
        "file://{0}/s%20p%20%C3%A9.zarr",
        "file://localhost{0}/s%20p%20%C3%A9.zarr/raw",
        "file://{0}/s%20p%20%C3%A9.zarr:raw",
        "file://{0}/s p é.zarr",
        "zarr://{0}/s p é.zarr",
        "zarr3://file://{0}/s%20p%20%C3%A9.zarr",
        "{0}/s p é.zarr/|zarr3:",
        "file://{0}/s%20p%20%C3%A9.zarr|zarr:raw/",
    ],
)
def test_urls_of_what_is_here_are_read_as_browsers_and_viewers_show_them(
    tmp_path: Path, url: str
) -> None:
    write_array(f"{tmp_path}/s p é.zarr:raw", values())
    np.testing.assert_array_equal(read_array(url.format(tmp_path), ndim=3), values())


def test_a_name_that_has_a_percent_sign_is_not_changed(tmp_path: Path) -> None:
    write_array(tmp_path / "a%20b.h5", values())
    np.testing.assert_array_equal(read_array(f"file://{tmp_path}/a%20b.h5"), values())


class _Files(SimpleHTTPRequestHandler):
    """Serves files and parts of them, as buckets do; Python's own server gives whole ones only."""

    requested: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        """Answer with a file, or the part that is asked for."""
        path = Path(self.translate_path(self.path))
        self.requested.append(self.path)
        if "forbidden" in self.path or not path.is_file():
            self.send_error(403 if "forbidden" in self.path else 404)
            return
        content = whole = path.read_bytes()
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        first = 0
        if asked is not None:
            start, end = asked.groups()
            first = int(start) if start else len(whole) - int(end)
            content = whole[first : int(end) + 1 if start and end else None]
        self.send_response(200 if asked is None else 206)
        self.send_header("Content-Length", str(len(content)))
        if asked is not None:
            last = first + len(content) - 1
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(whole)}")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@pytest.fixture
def host(tmp_path: Path) -> Iterator[str]:
    """Serve a folder at a URL."""
    _Files.requested.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Files, directory=tmp_path)) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def sharded(folder: Path, array: np.ndarray) -> str:
    """As Zarr 3 keeps many chunks in a file."""
    made = zarr.create_array(
        folder / "sharded.zarr",
        data=array,
        chunks=(5, 3, 5),
        shards=(5, 6, 20),
        dimension_names=list("zyx"),
        attributes={"voxel_size_nm": SIZE, "origin_nm": ORIGIN},
    )
    return str(folder / made.store_path.store.root.name)


@pytest.mark.parametrize(
    "write", [ome_zarr, ome_zarr_5, xarray_zarr, sharded, n5, precomputed], ids=lambda w: w.__name__
)
@pytest.mark.parametrize("form", ["{scheme}://{url}", "{scheme}://{url}/", "{url}/|{scheme}:"])
def test_a_volume_elsewhere_is_read_as_it_is_here(
    tmp_path: Path, host: str, write: Callable[[Path, np.ndarray], str], form: str
) -> None:
    here = write(tmp_path, values(np.uint16)).removeprefix("precomputed://file://")
    scheme = {"n5": "n5", "precomputed": "precomputed"}.get(write.__name__, "zarr")
    url = here.replace(str(tmp_path), host).replace(".n5:", ".n5/")
    with open_lazy(form.format(scheme=scheme, url=url), ndim=3) as lazy:
        np.testing.assert_array_equal(lazy[...], values(np.uint16))
        np.testing.assert_array_equal(lazy[1:3, 4:9, ::2], values(np.uint16)[1:3, 4:9, ::2])
        assert lazy.voxel_size_nm == SIZE
        assert lazy.origin_nm == ORIGIN
        assert str(lazy.path) == f"{scheme}://{url}"


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_of_a_zarr_elsewhere_only_the_chunks_asked_for_are_fetched(
    tmp_path: Path, host: str, zarr_format: Any
) -> None:
    group = zarr.open_group(tmp_path / "v.zarr", mode="w", zarr_format=zarr_format)
    array = values(np.uint16, (40, 40, 40))
    group.create_array("deep/raw", data=array, chunks=(10, 10, 10))
    with open_lazy(f"zarr://{host}/v.zarr/deep/raw", ndim=3) as lazy:
        opened = len(_Files.requested)
        assert not any("zarr.json" not in path and "/.z" not in path for path in _Files.requested)
        np.testing.assert_array_equal(lazy[12:18, 3:7, 11:19], array[12:18, 3:7, 11:19])
        chunks = [path for path in _Files.requested[opened:] if not path.endswith((".json", "ray"))]
    name = "/v.zarr/deep/raw/" + ("1.0.1" if zarr_format == 2 else "c/1/0/1")
    assert chunks == [name]


@pytest.mark.filterwarnings("ignore:Consolidated metadata")
@pytest.mark.parametrize("zarr_format", [2, 3])
def test_a_group_elsewhere_is_listed_by_its_consolidated_metadata(
    tmp_path: Path, host: str, zarr_format: Any
) -> None:
    group = zarr.open_group(tmp_path / "v.zarr", mode="w", zarr_format=zarr_format)
    group.create_array("deep/raw", data=values())
    assert "cannot be listed. Name an array" in refusal(f"zarr://{host}/v.zarr")
    zarr.consolidate_metadata(tmp_path / "v.zarr")
    np.testing.assert_array_equal(read_array(f"zarr://{host}/v.zarr", ndim=3), values())
    group.create_array("deep/new", data=values(np.uint16))
    np.testing.assert_array_equal(
        read_array(f"zarr://{host}/v.zarr/deep/new", ndim=3), values(np.uint16)
    )
    zarr.consolidate_metadata(tmp_path / "v.zarr")
    assert f"for example zarr://{host}/v.zarr/deep/new" in refusal(f"zarr://{host}/v.zarr")


@pytest.mark.parametrize("folder", ["missing", "forbidden"])
@pytest.mark.parametrize("scheme", ["zarr", "n5", "precomputed"])
def test_what_is_not_elsewhere_is_refused_as_such(host: str, scheme: str, folder: str) -> None:
    message = refusal(f"{scheme}://{host}/{folder}/v")
    assert "damaged" not in message
    assert f"{scheme}://{host}/{folder}/v: there is no" in message


@pytest.mark.timeout(60)
@pytest.mark.parametrize("scheme", ["zarr", "n5", "precomputed"])
def test_an_address_that_nobody_answers_at_is_refused_in_seconds(scheme: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"{scheme}://http://127.0.0.1:{taken.getsockname()[1]}/volume"
        message = refusal(url)
    assert "no answer" in message


def test_a_format_without_its_package_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hydralv_tune.data.formats.find_spec", lambda name: None)
    for kind in FORMATS:
        if kind.package is not None:
            with pytest.raises(InputError, match=f"pip install {kind.package}"):
                _ = kind.code
        for scheme in kind.schemes:
            with pytest.raises(InputError, match="pip install tensorstore"):
                open_lazy(f"{scheme}://https://127.0.0.1/v")
