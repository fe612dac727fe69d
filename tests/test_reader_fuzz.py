"""Files of random axes, types, attributes and damage: read as others read them, or refused.

`HYDRALV_FUZZ_FILES=2000 pytest tests/test_reader_fuzz.py` makes so many of each format, from seed
`HYDRALV_FUZZ_FIRST` on.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import mrcfile
import nibabel
import nrrd
import numpy as np
import pytest
import tensorstore
import tifffile
import zarr
from PIL import Image

from hydralv_tune.config.errors import VolumeError
from hydralv_tune.data.formats.files import open_lazy

FILES = int(os.environ.get("HYDRALV_FUZZ_FILES", "40"))
FIRST = int(os.environ.get("HYDRALV_FUZZ_FIRST", "0"))
DTYPES = ["u1", "<u2", ">u2", "<i4", "<u8", "<f4", ">f8", "f2", "?", "i1", "<c8"]
WORDS = ["nm", "um", "pixel", "", None, "Å", 3, ["nm", "um", "x"], b"\xff", "micrometres", [], {}]
SIZES = [[30, 8, 8], [1], [0, 1, 2], "fine", [np.nan] * 3, [1, 2, 3, 4], None, [[30, 8, 8]], {}]
Random = np.random.Generator
Made = tuple[str, np.ndarray, str | None]
"""What to open, the array as it is stored, and its axes where they are named."""


def pick(random: Random, values: list[Any]) -> Any:
    """Return one of some values."""
    return values[int(random.integers(len(values)))]


def array_of(random: Random, least: int = 1, most: int = 5) -> np.ndarray:
    """Return a small array of any number of axes and any type."""
    shape = [
        int(n)
        for n in random.integers(
            0 if random.random() < 0.05 else 1, 6, pick(random, [*range(least, most + 1), 3, 3])
        )
    ]
    return (random.random(shape) * 200).astype(pick(random, DTYPES))


def axes_for(random: Random, count: int) -> str:
    """Return names for so many axes: often those of a volume, in some order."""
    names = list("zyx") + list("tcsqz")[: max(count - 3, 0)]
    random.shuffle(names)
    if random.random() < 0.15:
        names[0] = pick(random, ["z", "x", "w", "c", "t"])
    return "".join(names[:count])


def hdf5(random: Random, folder: Path) -> Made:
    """HDF5: names, filters, axistags, attributes."""
    array, named = array_of(random, 0), None
    options: dict[str, Any] = {}
    if array.ndim and array.size and random.random() < 0.4:
        options = pick(
            random,
            [{"compression": "gzip"}, {"compression": "lzf", "shuffle": True}, {"chunks": True}],
        )
    with h5py.File(folder / "v.h5", "w", userblock_size=pick(random, [0, 512])) as file:
        data = file.create_dataset(
            pick(random, ["main", "a/b", "volumes/raw"]), data=array, **options
        )
        if array.ndim and random.random() < 0.4:
            named = axes_for(random, array.ndim)
            data.attrs["axistags"] = json.dumps({"axes": [{"key": key} for key in named]})
        for key in ("resolution", "offset", "element_size_um", "units", "voxel_size"):
            value = pick(random, SIZES + WORDS)
            if random.random() < 0.3 and value is not None and not isinstance(value, dict):
                try:
                    data.attrs[key] = value
                except TypeError:
                    continue
    return str(folder / "v.h5"), array, named


def tiff(random: Random, folder: Path) -> Made:
    """TIFF: plain, ImageJ and OME, compressed and tiled, in colours."""
    array = array_of(random, 2)
    if array.dtype.kind == "c" or 0 in array.shape:
        array = np.ones(tuple(max(n, 1) for n in array.shape), "u1")
    form = pick(random, ["plain", "shaped", "imagej", "ome"])
    compression = pick(random, [None, None, "zlib", "lzw", "zstd"])
    options: dict[str, Any] = {"compression": compression, "photometric": "minisblack"}
    named = None
    if form == "plain":
        options["metadata"] = None
    elif form in ("imagej", "ome"):
        letters = list("tzcyx")[-array.ndim :] if array.ndim <= 5 else None
        if random.random() < 0.3:
            letters = list("cyx" if array.ndim == 3 else "tczyx"[-array.ndim :])
        named = "".join(letters or [])
        unit = ascii(pick(random, WORDS)).strip("'")
        metadata: dict[str, Any] = {"axes": named.upper(), "unit": unit}
        metadata["spacing"] = float(random.random() * 50)
        options |= {form: True, "metadata": metadata, "resolution": (1 / 8, 1 / 8)}
        array = array.astype(pick(random, ["u1", "u2", "f4"]))
    if (
        array.shape[-1] in (3, 4)
        and array.ndim > 2
        and array.dtype.itemsize <= 2
        and form == "plain"
        and random.random() < 0.5
    ):
        options["photometric"], named = "rgb", "zyxs"[-array.ndim :]
        array = array.astype("u1")
    elif form in ("plain", "shaped") and array.dtype == np.uint8 and random.random() < 0.4:
        options["photometric"] = pick(random, ["miniswhite", "palette"])
        options["colormap"] = random.integers(0, 65535, (3, 256)).astype(np.uint16)
        if options["photometric"] == "miniswhite":
            del options["colormap"]
            named = ""
    try:
        tifffile.imwrite(folder / "v.tif", array, **options)
        tifffile.imread(folder / "v.tif")
    except (ValueError, IndexError):
        # What no writer writes, no reader meets; nor what tifffile itself cannot read back.
        named = None
        tifffile.imwrite(folder / "v.tif", array, photometric="minisblack")
    if named is None:
        # Of a stack whose axes nobody named, tifffile drops those of length 1.
        array = tifffile.imread(folder / "v.tif")
    elif form in ("imagej", "ome"):
        # As written, axes of length 1 can be dropped or become others; these are the file's.
        with tifffile.TiffFile(folder / "v.tif") as file:
            array, named = file.series[0].asarray(), file.series[0].axes.lower()
        if not {"z", "t"} & set(named):
            # Among what they drop is the z of a volume of one section.
            array, named = array[None], "z" + named
    return str(folder / "v.tif"), array, named


def zarr_(random: Random, folder: Path) -> Made:
    """Zarr 2 and 3: arrays, groups, OME-Zarr with random transformations."""
    array = array_of(random)
    version, named = pick(random, [2, 3]), None
    native = np.abs(array).astype("u1") if array.dtype.kind == "c" else array
    array = native.astype(native.dtype.newbyteorder("<"))
    chunks = tuple(max(n, 1) for n in array.shape)
    kind = pick(random, ["array", "group", "ome", "ome", "xarray"])
    names = axes_for(random, array.ndim)
    if kind == "array" or kind == "xarray":
        given = {"dimension_names": list(names)} if kind == "xarray" and version == 3 else {}
        data = zarr.create_array(
            folder / "v.zarr",
            shape=array.shape,
            dtype=array.dtype,
            chunks=chunks,
            zarr_format=version,
            **given,
        )
        if kind == "xarray":
            named = names
            if version == 2:
                data.attrs["_ARRAY_DIMENSIONS"] = list(names)
    else:
        group = zarr.open_group(folder / "v.zarr", mode="w", zarr_format=version)
        data = group.create_array("0", shape=array.shape, dtype=array.dtype, chunks=chunks)
        if kind == "ome":
            named = names
            steps = [
                {"type": "scale", "scale": [float(n) for n in random.integers(0, 9, array.ndim)]},
                {"type": "translation", "translation": [1.0] * array.ndim},
                {"type": pick(random, ["identity", "affine", None])},
                pick(random, [None, "scale", {"type": "scale", "scale": "x"}]),
            ]
            image = {
                "axes": [
                    {"name": n, "type": "space", "unit": pick(random, WORDS[:6])} for n in names
                ],
                "datasets": [
                    {
                        "path": "0",
                        "coordinateTransformations": steps[: pick(random, [1, 1, 2, 3, 4])],
                    }
                ],
            }
            if random.random() < 0.2:
                del image[pick(random, list(image))]
            if random.random() < 0.2:
                image["axes"] = pick(random, [list(names), None, 3, [{}]])
                named = names if image["axes"] == list(names) else ""
            if "axes" not in image:
                named = "tczyx" if array.ndim == 5 else ""
            group.attrs["multiscales"] = [image]
    data[...] = array
    return str(folder / "v.zarr"), array, named


def n5(random: Random, folder: Path) -> Made:
    """N5, as tensorstore writes it."""
    array = array_of(random)
    dtype = pick(random, ["uint8", "uint16", "int32", "uint64", "float32"])
    array = (
        np.abs(np.maximum(array, 1))
        .astype(dtype)
        .reshape(tuple(max(n, 1) for n in array.shape) if array.size else -1)
    )
    if not array.size:
        array = np.ones((2, 3, 4), dtype)
    path = folder / "v.n5" / "raw"
    tensorstore.open(
        {
            "driver": "n5",
            "kvstore": f"file://{path}/",
            "metadata": {
                "dimensions": list(array.shape),
                "blockSize": [max(n // 2, 1) for n in array.shape],
                "dataType": dtype,
                "compression": {"type": pick(random, ["raw", "gzip", "zstd"])},
            },
        },
        create=True,
    ).result().write(array).result()
    attributes = json.loads((path / "attributes.json").read_text())
    for key in (
        "resolution",
        "pixelResolution",
        "offset",
        "units",
        "downsamplingFactors",
        "transform",
    ):
        value = pick(
            random,
            [*SIZES[:4], None, {}, {"dimensions": [1, 2, 3], "unit": "nm"}, "nm", ["nm"] * 3],
        )
        if random.random() < 0.25:
            attributes[key] = value
    (path / "attributes.json").write_text(json.dumps(attributes))
    return str(folder / "v.n5"), array, "xyz"[: array.ndim] + "??"[: max(array.ndim - 3, 0)]


def precomputed(random: Random, folder: Path) -> Made:
    """Precomputed, as tensorstore writes it."""
    dtype = pick(random, ["uint8", "uint16", "uint32", "uint64", "float32"])
    shape = [int(n) for n in random.integers(1, 7, 3)] + [pick(random, [1, 1, 3])]
    array = (random.random(shape) * 200).astype(dtype)
    tensorstore.open(
        {
            "driver": "neuroglancer_precomputed",
            "kvstore": f"file://{folder}/v/",
            "multiscale_metadata": {"type": "image", "data_type": dtype, "num_channels": shape[3]},
            "scale_metadata": {
                "size": shape[:3],
                "resolution": [8, 8, 30],
                "voxel_offset": [int(n) for n in random.integers(-9, 9, 3)],
                "chunk_size": [4, 4, 4],
                "encoding": "raw",
            },
        },
        create=True,
    ).result()[...].write(array).result()
    return str(folder / "v"), array, "xyzc"


def nifti(random: Random, folder: Path) -> Made:
    """NIfTI: any affine of axes that are turned, mirrored or askew."""
    array = array_of(random)
    if array.dtype.kind in "b" or array.dtype.str[1:] == "f2" or 0 in array.shape:
        array = np.ones(tuple(max(n, 1) for n in array.shape), "u1")
    order = list(random.permutation(3))
    affine = np.zeros((4, 4))
    for column, row in enumerate(order):
        affine[row, column] = pick(random, [1, -1, 8])
    affine[3, 3] = 1
    if random.random() < 0.1:
        affine[0] += 0.3
    image = nibabel.Nifti1Image(array, affine, dtype=array.dtype)
    image.header.set_xyzt_units(pick(random, ["mm", "micron", "unknown"]))
    nibabel.save(image, folder / pick(random, ["v.nii", "v.nii.gz"]))
    named = "xyz"[: array.ndim]
    if array.ndim >= 3:
        named = "".join("xyz"[row] for row in order) + "tc"[: array.ndim - 3]
    return str(next(folder.glob("v.nii*"))), array, named


def mrc(random: Random, folder: Path) -> Made:
    """MRC: any order of its axes."""
    array = array_of(random, 2, 4)
    dtype = pick(random, ["i1", "i2", "u2", "f4"])
    array = (
        np.ones(tuple(max(n, 1) for n in array.shape), dtype) * 3
        if not array.size
        else np.abs(array).astype(dtype)
    )
    order = [int(n) + 1 for n in random.permutation(3)] if random.random() < 0.5 else [1, 2, 3]
    if random.random() < 0.1:
        order[0] = pick(random, [0, 7, 2])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with mrcfile.new(folder / "v.mrc") as file:
            file.set_data(array)
            file.header.mapc, file.header.mapr, file.header.maps = order
            file.voxel_size = float(random.random())
    known = "?xyz???????"
    named = (
        "".join(known[n] for n in order[::-1])[-array.ndim :] if sorted(order) == [1, 2, 3] else ""
    )
    return str(folder / "v.mrc"), array, ("?" * (array.ndim - 3)) + named


def nrrd_(random: Random, folder: Path) -> Made:
    """NRRD: kinds, labels, directions."""
    array = array_of(random, 2, 4)
    if array.dtype.kind in "bc" or array.dtype.str[1:] == "f2" or not array.size:
        array = np.ones(tuple(max(n, 1) for n in array.shape), "<u2")
    array = array.astype(array.dtype.newbyteorder("<"))
    header: dict[str, Any] = {"encoding": pick(random, ["raw", "gzip"])}
    named: str = "xyz"[: array.ndim] + "?" * max(array.ndim - 3, 0)
    if array.ndim == 3 and random.random() < 0.4:
        order = list(random.permutation(3))
        header |= {"space dimension": 3, "space directions": np.eye(3)[order] * 8.0}
        named = "".join("xyz"[row] for row in order)
    elif array.ndim == 4 and random.random() < 0.4:
        header["kinds"] = [pick(random, ["list", "RGB-color"]), "domain", "domain", "domain"]
        named = ("c" if header["kinds"][0] == "list" else "s") + "xyz"
    elif random.random() < 0.4:
        header["spacings"] = [float(n) for n in random.integers(1, 9, array.ndim)]
        header["units"] = [str(pick(random, ["nm", "um", "pixel"]))] * array.ndim
    nrrd.write(str(folder / "v.nrrd"), array, header)
    return str(folder / "v.nrrd"), array, named


def sections(random: Random, folder: Path) -> Made:
    """Folders: pictures of one kind, now and then one of another size, kind or number."""
    shape = [int(n) for n in random.integers(1, 7, 3)]
    array = (random.random(shape) * 200).astype(pick(random, ["u1", "u2"]))
    suffix, numbers = pick(random, ["png", "tif"]), list(range(9, 9 + len(array)))
    inside = folder / "stack"
    inside.mkdir()
    named: str | None = "zyx"
    if random.random() < 0.2 and len(numbers) > 2:
        numbers[-1] += 1
        named = ""
    for number, section in zip(numbers, array, strict=True):
        Image.fromarray(section).save(inside / f"em{number}.{suffix}")
    if random.random() < 0.1:
        Image.fromarray(np.zeros((9, 9, 3), "u1")).save(inside / f"em0.{suffix}")
        named = ""
    return str(inside), array, named


WRITERS = [hdf5, tiff, zarr_, n5, precomputed, nifti, mrc, nrrd_, sections]


def damaged(random: Random, path: Path) -> None:
    """Cut a file, change some of its bytes, or put another file in its place."""
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    file = files[int(random.integers(len(files)))]
    content = bytearray(file.read_bytes())
    if random.random() < 0.5:
        content = content[: int(random.integers(len(content) + 1))]
    else:
        for at in random.integers(0, max(len(content), 1), 4):
            if content:
                content[int(at)] = int(random.integers(256))
    file.write_bytes(content)


def opened(path: str) -> tuple[np.ndarray | None, str | None]:
    """Return the volume in a file, or the message with which it is refused."""
    try:
        with open_lazy(path, ndim=3) as lazy:
            return lazy[...], None
    except VolumeError as error:
        return None, str(error)


def expected(array: np.ndarray, named: str | None) -> np.ndarray | None:
    """Return (Z, Y, X) of a stored array by the names of its axes; None where it is no volume."""
    if named is None:
        return array if array.ndim == 3 else None
    if len(set(named) - {"?"}) < len(named.replace("?", "")) or len(named) != array.ndim:
        return None
    if any(n not in "zyx" and array.shape[i] != 1 for i, n in enumerate(named)):
        if "z" in named or "t" not in named:
            return None
        named = named.replace("t", "z")
        if any(n not in "zyx" and array.shape[i] != 1 for i, n in enumerate(named)):
            return None
    if not set("zyx") <= set(named):
        return None
    keep = [named.index(n) for n in "zyx"]
    rest = [i for i in range(array.ndim) if i not in keep]
    moved = array.transpose(*keep, *rest)
    return moved.reshape(moved.shape[:3])


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.timeout(7200)
def test_a_random_file_is_read_as_others_read_it_or_refused(
    tmp_path: Path, write: Callable[[Random, Path], Made]
) -> None:
    read = 0
    for seed in range(FIRST, FIRST + FILES):
        random, folder = np.random.default_rng(seed), tmp_path / str(seed)
        folder.mkdir()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            path, array, named = write(random, folder)
            harmed = random.random() < 0.3
            if harmed:
                damaged(random, Path(path))
            found, refusal = opened(path)
        if refusal is not None:
            assert "\n" not in refusal, seed
            assert path in refusal, seed
            assert harmed or "damaged" not in refusal, f"{seed}: {refusal}"
        elif not harmed:
            wanted = expected(array, named)
            assert wanted is not None, f"{seed}: {named} {array.shape} {array.dtype} was read"
            np.testing.assert_array_equal(found, wanted, err_msg=str(seed))
            read += 1
        shutil.rmtree(folder)
    assert read > FILES / 20, "too few files were good for the test to say anything"
