"""MRC: mapped where it is not packed, sizes in angstrom, bytes signed as IMOD marks them."""

from __future__ import annotations

import mrcfile
import numpy as np

from hydralv_tune.config.errors import VolumeError
from hydralv_tune.data.formats.interface import Stored
from hydralv_tune.data.formats.location import Location
from hydralv_tune.data.voxel_size import Placement, in_nm

IMOD_STAMP = 1146047817
SIGNED_BYTES = 1
"""Bit of IMOD's flags: its bytes are signed, as the standard has them; else they are not."""
ANGSTROM = [0.1] * 3


def open_stored(location: Location) -> Stored:
    """Open a volume or a stack of sections.

    Raises:
        VolumeError: Its axes are in no order that is known. mrcfile raises what else it cannot
            read, and where the length of the file is not what the header says.
    """
    try:
        file = mrcfile.mmap(location.path, mode="r", permissive=False)
    except ValueError as error:
        if "nrecognised mode" not in str(error):
            raise
        raise VolumeError(
            f"{location}: its voxels are of a kind that is not known ({error}). Save them as "
            "bytes, 16-bit integers or floats, for example with newstack -mode 1 of IMOD."
        ) from error
    try:
        header, array = file.header, file.data
        order = [int(header[name]) for name in ("mapc", "mapr", "maps")]
        if order == [0, 0, 0]:
            order = [1, 2, 3]
        if sorted(order) != [1, 2, 3]:
            raise VolumeError(
                f"{location}: its header calls columns, rows and sections {order}, but each of 1 "
                "(x), 2 (y) and 3 (z) must be there once. Correct the header."
            )
        axes = [*"?" * (array.ndim - 3), *("xyz"[i - 1] for i in order[::-1])][-array.ndim :]
        # Fields 'extra2' of the header hold IMOD's stamp and flags, at bytes 152 and 156.
        stamp, flags = np.frombuffer(header.tobytes(), header.dtype["nx"], 2, 152)
        if array.dtype == np.int8 and stamp == IMOD_STAMP and not flags & SIGNED_BYTES:
            array = array.view(np.uint8)
        cells = [float(header.cella[a]) for a in "zyx"]
        counts = [int(header[f"m{a}"]) for a in "zyx"]
        known = all(c > 0 for c in cells) and all(n > 0 for n in counts)
        size = (
            in_nm([c / n for c, n in zip(cells, counts, strict=True)], ANGSTROM) if known else None
        )
        if array.ndim == 3 and counts[0] == 1 and array.shape[0] > 1:
            # A stack of pictures: it says nothing of the distance between them.
            size = None
        places = [float(header.origin[a]) for a in "zyx"]
        starts = [int(header[f"n{a}start"]) for a in "xyz"]
        origin = in_nm(places, ANGSTROM, positive=False) if size and any(places) else None
        if size and origin is None and any(starts):
            along = {"xyz"[order[i] - 1]: starts[i] for i in range(3)}
            offsets = [along[a] * s for a, s in zip("zyx", size, strict=True)]
            origin = in_nm(offsets, [1.0] * 3, positive=False)
        return Stored(array, tuple(axes), Placement(size, origin), close=file.close)
    except BaseException:
        file.close()
        raise
