"""The table of file formats: one entry and one file each.

Light to import: help texts and checks of names are made from it, and no library is loaded.
A format's file has `open_stored(location)` and, where it can be written, `create(location, ...)`;
`interface.py` says what they take and give.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hydralv_tune.config.errors import InputError

IMPORT_NAMES = {"pynrrd": "nrrd"}


@dataclass(frozen=True)
class Format:
    """One file format.

    Args:
        name: What messages call it.
        module: Its file in this folder.
        suffixes: What its names end with, in lower case.
        magic: (offset, bytes) that its files have; one of them is enough.
        marks: Files that make a folder one of this format; one of them is enough.
        marks_optional: Whether a folder of such a name is one without them too.
        has_datasets: Whether `file:dataset` names an array in it.
        writable: Whether it can be written.
        package: What must be installed beside this package to read it; None where nothing.
        schemes: What stands before the URL of one that is elsewhere.
    """

    name: str
    module: str
    suffixes: tuple[str, ...]
    magic: tuple[tuple[int, bytes], ...] = ()
    marks: tuple[str, ...] = ()
    marks_optional: bool = False
    has_datasets: bool = False
    writable: bool = False
    package: str | None = None
    schemes: tuple[str, ...] = ()

    @property
    def code(self) -> Any:
        """Return the module that reads and writes it, imported on first use.

        Raises:
            InputError: The package that it needs is not installed.
        """
        if self.package is not None:
            check_installed(self.name, self.package)
        return import_module(f"{__name__}.{self.module}")


def check_installed(what: str, package: str) -> None:
    """Refuse what needs a package that is not installed.

    Raises:
        InputError: It is not.
    """
    if find_spec(IMPORT_NAMES.get(package, package)) is None:
        raise InputError(
            f"{what} needs the package {package}, which is not installed. Install it: "
            f"pip install {package}"
        )


HDF5_MAGIC = b"\x89HDF\r\n\x1a\n"
FORMATS = (
    Format(
        "HDF5",
        "hdf5",
        (".h5", ".hdf5", ".hdf", ".he5"),
        # After a block of the user's own, which doubles in size.
        magic=tuple((at, HDF5_MAGIC) for at in (0, 512, 1024, 2048, 4096)),
        has_datasets=True,
        writable=True,
    ),
    Format(
        "TIFF",
        "tiff",
        (".tif", ".tiff"),
        magic=tuple((0, head) for head in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")),
        writable=True,
    ),
    Format(
        "Zarr",
        "zarr",
        # A name that ends with .ome.zarr is written as OME-Zarr, any other as one array.
        (".zarr", ".ome.zarr"),
        marks=("zarr.json", ".zarray", ".zgroup"),
        has_datasets=True,
        writable=True,
        schemes=("zarr", "zarr2", "zarr3"),
    ),
    Format(
        "N5",
        "n5",
        (".n5",),
        marks=("attributes.json",),
        marks_optional=True,
        has_datasets=True,
        package="tensorstore",
        schemes=("n5",),
    ),
    Format(
        "precomputed",
        "precomputed",
        (".precomputed",),
        marks=("info",),
        has_datasets=True,
        writable=True,
        package="tensorstore",
        schemes=("precomputed",),
    ),
    Format(
        "NIfTI",
        "nifti",
        (".nii", ".nii.gz"),
        magic=((344, b"n+1\0"), (344, b"ni1\0"), (4, b"n+2\0"), (0, b"\x1f\x8b")),
        package="nibabel",
    ),
    Format(
        "MRC", "mrc", (".mrc", ".rec", ".map", ".st"), magic=((208, b"MAP "),), package="mrcfile"
    ),
    Format("NRRD", "nrrd", (".nrrd", ".nhdr"), magic=((0, b"NRRD"),), package="pynrrd"),
    Format("folder of sections", "sections", ()),
)
FOLDER_OF_SECTIONS = FORMATS[-1]
PRECOMPUTED = next(kind for kind in FORMATS if kind.name == "precomputed")
SCHEMES = {scheme: kind for kind in FORMATS for scheme in kind.schemes}
SUFFIXES = {suffix: kind for kind in FORMATS for suffix in kind.suffixes}
WRITABLE = tuple(suffix for suffix, kind in SUFFIXES.items() if kind.writable)
NAMES = f"{', '.join(kind.name for kind in FORMATS[:-1])} or {FORMATS[-1].name}"
"""For help texts."""


def suffix_of(path: Path) -> str:
    """Return the known suffix of a path, or else the last one; in lower case."""
    name = path.name.lower()
    known = [suffix for suffix in SUFFIXES if name.endswith(suffix)]
    return max(known, key=len) if known else path.suffix.lower()
