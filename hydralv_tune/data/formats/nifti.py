"""NIfTI: axes and size by its affine, values scaled as the header says."""

from __future__ import annotations

import nibabel
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError
from nibabel.wrapstruct import WrapStructError

from hydralv_tune.config.errors import VolumeError
from hydralv_tune.data.formats.interface import UNNAMED, Stored
from hydralv_tune.data.formats.location import Location
from hydralv_tune.data.voxel_size import measured, nm_of, unknown_unit

ERRORS = (ImageFileError, HeaderDataError, WrapStructError)
"""What nibabel raises beside the usual errors."""
SINGLE = 4
"""Bytes of single precision, which keeps seven digits: 3e-05 mm, not 2.9999999e-05, are 30 nm."""
ALIGNED = 1e-3
"""Share of a voxel by which an axis may lean."""


def open_stored(location: Location) -> Stored:
    """Open an image; its axes are called as the affine turns them.

    Raises:
        VolumeError: It lies askew, is no NIfTI but a packed file, or has an axis of more kinds.
            nibabel raises what else it cannot read.
    """
    name = location.path.name.lower()
    if not name.endswith((".nii", ".nii.gz", ".hdr", ".img")):
        raise VolumeError(
            f"{location}: a packed file, or NIfTI of another name. Unpack it, or name it .nii.gz."
        )
    image = nibabel.load(location.path)
    header, count = image.header, len(image.shape)
    directions = image.affine[:3, :3]
    sizes, origins = np.linalg.norm(directions, axis=0), image.affine[:3, 3]
    if header["pixdim"].dtype.itemsize == SINGLE:
        sizes, origins = (np.array([float(f"{v:.7g}") for v in vs]) for vs in (sizes, origins))
    axes, forward = list("xyz"[:count]), None
    if (sizes > 0).all() and count >= 3:
        unit = np.abs(directions) / sizes
        places = unit.argmax(axis=0)
        if sorted(places) != [0, 1, 2] or np.abs(unit.max(axis=0) - 1).max() > ALIGNED:
            raise VolumeError(
                f"{location}: it lies askew in its space (affine "
                f"{np.round(directions, 4).tolist()}). Resample it along its axes."
            )
        axes = ["xyz"[i] for i in places]
        signs = {a: int(np.sign(directions["xyz".index(a), i])) for i, a in enumerate(axes)}
        forward = (signs["z"], signs["y"], signs["x"])
    axes += ["t", "c", *[UNNAMED] * 3][: max(count - 3, 0)]
    unit_name = header.get_xyzt_units()[0]
    nm = [nm_of(unit_name)] * 3
    by_axis = dict(zip(axes, sizes, strict=False))
    notes = () if nm[0] is not None or unit_name == "unknown" else (unknown_unit(unit_name),)
    known = header["pixdim"][1:4].all()
    placement = measured(
        [by_axis.get(a, 0) for a in "zyx"] if known else None,
        origins[::-1] if known else None,
        nm,
        notes,
        forward,
    )
    return Stored(image.dataobj, tuple(axes), placement)
