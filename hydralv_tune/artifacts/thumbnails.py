"""A small picture of one instance in three planes."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.colors import to_rgb
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage
from skimage.segmentation import find_boundaries

Array = npt.NDArray[Any]

ZOOM_OUT = 1.7
"""Side of a plane over the largest extent of the instance."""

QUALITY = 80
"""Of the WebP: a strip takes some 15 kB, so that a report of a hundred stays small."""

PLANES, GAP = ("xy", "xz", "yz"), 3
"""Names of the planes in their order, and pixels between them."""

LONGEST_BAR = 0.4
"""Share of a plane that the bar may take."""


def thumbnail(
    *,
    image: Array,
    truth: Array,
    prediction: Array,
    truth_ids: Sequence[int],
    segment_ids: Sequence[int],
    colour: str,
    voxel_size_nm: Sequence[float] | None = None,
    side: int = 240,
    box: tuple[slice, ...] | None = None,
) -> bytes:
    """Return a WebP strip of the planes xy, xz and yz through an instance.

    The instance's truth is a solid line in `colour`, its segments a dashed white one, or one in
    `colour` where there is no truth; neighbours are outlined in faint white. Planes are
    stretched so that a nanometre is as long either way; each is labelled, and a bar in the first
    shows a length.

    Args:
        image: (Z, Y, X).
        truth: (Z, Y, X) labels.
        prediction: (Z, Y, X) labels.
        truth_ids: The ids concerned; they or `segment_ids` may be empty.
        segment_ids: The ids concerned.
        colour: Hexadecimal, `#rrggbb`.
        voxel_size_nm: (z, y, x); voxels are shown as cubes where it is unknown.
        side: Pixels of each of the three squares.
        box: Where the instance lies, if that is known; the whole volume is searched otherwise.

    Raises:
        ValueError: None of the ids is in the volume.
    """
    place = box if box is not None else tuple(slice(0, side) for side in truth.shape)
    labels, ids = (truth, truth_ids) if truth_ids else (prediction, segment_ids)
    own = np.isin(labels[place], list(ids))
    if not own.any():
        raise ValueError(f"neither truth {truth_ids} nor segments {segment_ids} are in the volume")
    size = np.asarray(voxel_size_nm if voxel_size_nm is not None else (1.0, 1.0, 1.0), float)
    inside = [axis + s.start for axis, s in zip(np.nonzero(own), place, strict=True)]
    low, high = np.array([axis.min() for axis in inside]), np.array([axis.max() for axis in inside])
    extent_nm = float(((high - low + 1) * size).max()) * ZOOM_OUT + 8 * float(size.min())
    # The section through the middle of the body, not of the box, which a bent one may miss.
    centre = np.array([float(np.median(axis)) for axis in inside])
    strips: list[Array] = []
    for through in range(3):
        middle = (low + high) / 2
        middle[through] = centre[through]
        at = _coordinates(middle, through, extent_nm, size, side)
        strips += [
            _plane(image, truth, prediction, truth_ids, segment_ids, colour, at),
            np.ones((side, GAP, 3)),
        ]
    buffer = BytesIO()
    picture = Image.fromarray((np.concatenate(strips[:-1], axis=1) * 255).astype(np.uint8))
    _letter(picture, side, extent_nm, "voxels" if voxel_size_nm is None else "nm")
    picture.save(buffer, format="webp", quality=QUALITY)
    return buffer.getvalue()


def _letter(picture: Image.Image, side: int, extent_nm: float, unit: str) -> None:
    """Write the names of the planes into a strip, and a bar with its length."""
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(max(side // 16, 9))
    for index, plane in enumerate(PLANES):
        corner = (index * (side + GAP) + 6, 4)
        draw.text(corner, plane, fill="white", font=font, stroke_width=2, stroke_fill="black")
    steps = [base * 10.0**power for power in range(-2, 7) for base in (1, 2, 5)]
    length = max(step for step in steps if step <= max(extent_nm * LONGEST_BAR, steps[0]))
    right = 6 + length / extent_nm * side
    draw.rectangle((6, side - 10, right, side - 7), fill="white", outline="black")
    text = f"{length:g} {unit}"
    draw.text((6, side - 28), text, fill="white", font=font, stroke_width=2, stroke_fill="black")


def _coordinates(
    middle: Array, through: int, extent_nm: float, size: Array, side: int
) -> list[Array]:
    """Return the voxel coordinates (z, y, x), each (side, side), of a plane's pixels."""
    steps = (np.arange(side) - (side - 1) / 2) / side * extent_nm
    rows, columns = (axis for axis in range(3) if axis != through)
    at: list[Array] = [np.full((side, side), middle[axis]) for axis in range(3)]
    at[rows] = np.broadcast_to((middle[rows] + steps / size[rows])[:, None], (side, side))
    at[columns] = np.broadcast_to((middle[columns] + steps / size[columns])[None], (side, side))
    return at


def _plane(
    image: Array,
    truth: Array,
    prediction: Array,
    truth_ids: Sequence[int],
    segment_ids: Sequence[int],
    colour: str,
    at: list[Array],
) -> Array:
    """Return (side, side, 3) of one plane in [0, 1]."""
    nearest = [np.rint(axis).astype(int) for axis in at]
    known = np.ones(at[0].shape, bool)
    for axis, size in zip(nearest, image.shape, strict=True):
        known &= (axis >= 0) & (axis < size)
    at_voxel = tuple(np.clip(a, 0, s - 1) for a, s in zip(nearest, image.shape, strict=True))
    # Only the box around the plane is converted: the volume may be large.
    box = tuple(slice(int(a.min()), int(a.max()) + 2) for a in at_voxel)
    local = [np.clip(a, 0, s - 1) - b.start for a, b, s in zip(at, box, image.shape, strict=True)]
    grey = ndimage.map_coordinates(image[box].astype(np.float32), local, order=1, mode="nearest")
    low, high = np.percentile(grey, (1, 99))
    grey = np.clip((grey - low) / max(float(high - low), 1e-12), 0, 1)
    picture = np.repeat(np.where(known, grey, 0.1)[..., None], 3, axis=2)
    labels = np.where(known, truth[at_voxel], 0)
    segments = np.where(known, prediction[at_voxel], 0)
    _draw(picture, find_boundaries(labels, mode="inner"), (1.0, 1.0, 1.0), 0.35)
    dashes = np.add.outer(np.arange(len(grey)), np.arange(len(grey))) % 6 < 4
    _draw(picture, _edge(np.isin(labels, list(truth_ids)) & (labels > 0)), to_rgb(colour), 1.0)
    own = np.isin(segments, list(segment_ids)) & (segments > 0)
    line = (1.0, 1.0, 1.0) if truth_ids else to_rgb(colour)
    _draw(picture, _edge(own) & dashes, line, 0.95)
    return picture


def _edge(inside: Array) -> Array:
    """Return the outline, two pixels wide."""
    return inside & ~ndimage.binary_erosion(inside, iterations=2)


def _draw(picture: Array, where: Array, colour: Sequence[float], alpha: float) -> None:
    """Blend a colour into the picture."""
    picture[where] = (1 - alpha) * picture[where] + alpha * np.asarray(colour)
