"""The bodies of the phantom: vesicles, and what looks like them.

A body is a deformed ellipsoid. Its voxels are the ones nearest to its centre in its own metric, so
that a size in voxels is met exactly.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from hydralv_tune.numerics.phantom.tissue import CYTOPLASM, VoxelSize

CONNECT_26 = np.ones((3, 3, 3), dtype=bool)
# A section shows what lies within its thickness; three planes stand for it.
PLANES = (-1 / 3, 0.0, 1 / 3)


@dataclass(frozen=True)
class Look:
    """How a body is stained.

    Args:
        lumen: Grey level inside, relative to the cytoplasm.
        grain: Deviation of the lumen's texture.
        rim: How much the rim darkens, 0 for none.
        rim_nm: Half width of the rim.
        gap: Share of the rim's darkness that is missing on one side.
        gap_angle: Where, in radians in the section.
        inner_rim: Where a second rim lies, as a share of the radius; 0 for none.
    """

    lumen: float
    grain: float
    rim: float
    rim_nm: float
    gap: float = 0.0
    gap_angle: float = 0.0
    inner_rim: float = 0.0


@dataclass(frozen=True)
class Body:
    """The form of a body.

    Args:
        size: Its voxels.
        flat: Its height over its width, both in nm.
        long: Its length over its width in the section.
        angle: Where its length points, in radians.
        waves: (3, 2) amplitudes and phases of its deformation.
    """

    size: int
    flat: float
    long: float
    angle: float
    waves: np.ndarray

    def radius_nm(self, voxel_size_nm: VoxelSize) -> float:
        """Return the radius of the ball of the same volume."""
        return float((3 * self.size * np.prod(voxel_size_nm) / (4 * np.pi)) ** (1 / 3))

    def half_axes_nm(self, voxel_size_nm: VoxelSize) -> tuple[float, float, float]:
        """Return half its height, width and length."""
        ball = self.radius_nm(voxel_size_nm)
        width = ball / (self.flat * self.long) ** (1 / 3)
        return self.flat * width, width, self.long * width


@dataclass
class Canvas:
    """What bodies are drawn into.

    Args:
        pattern: (Z, Y, X) float32, changed in place.
        taken: (Z, Y, X) int32, the number of the body that holds a voxel, 0 for none.
        voxel_size_nm: Along z, y, x.
    """

    pattern: np.ndarray
    taken: np.ndarray
    voxel_size_nm: VoxelSize


def random_body(size: int, rng: np.random.Generator, longest: float = 1.3) -> Body:
    """Return a body of `size` voxels: a little flat along z, a little bumpy, up to so long."""
    amplitudes = rng.normal(0, [0.05, 0.035, 0.05])
    phases = rng.uniform(0, 2 * np.pi, 3)
    return Body(
        size=size,
        flat=rng.uniform(0.85, 1.05),
        long=rng.uniform(1.0, longest),
        angle=rng.uniform(0, np.pi),
        waves=np.stack([amplitudes, phases], axis=1),
    )


def vesicle_look(rng: np.random.Generator) -> Look:
    """Return the look of a labelled vesicle: a dark rim, often faded or broken, a grey lumen."""
    faded = rng.random() < 0.2
    broken = rng.random() < 0.25
    return Look(
        lumen=-rng.uniform(0.13, 0.24),
        grain=rng.uniform(0.05, 0.08),
        rim=rng.uniform(0.13, 0.21) if faded else rng.uniform(0.24, 0.46),
        rim_nm=rng.uniform(8, 12),
        gap=rng.uniform(0.7, 1.0) if broken else 0.0,
        gap_angle=rng.uniform(0, 2 * np.pi),
    )


def clear_ring_look(rng: np.random.Generator) -> Look:
    """Return the look of a clear ring: a vesicle's rim around a lumen brighter than cytoplasm."""
    return Look(
        lumen=rng.uniform(0.06, 0.14),
        grain=0.01,
        rim=rng.uniform(0.24, 0.48),
        rim_nm=rng.uniform(8, 12),
        gap=rng.uniform(0.7, 1.0) if rng.random() < 0.25 else 0.0,
        gap_angle=rng.uniform(0, 2 * np.pi),
    )


def dark_body_look(rng: np.random.Generator) -> Look:
    """Return the look of a dark body: no lumen, no rim."""
    return Look(lumen=-rng.uniform(0.38, 0.52), grain=0.03, rim=0.0, rim_nm=10.0)


def double_ring_look(rng: np.random.Generator) -> Look:
    """Return the look of a body within a body."""
    return Look(
        lumen=rng.uniform(0.0, 0.08),
        grain=0.02,
        rim=rng.uniform(0.24, 0.46),
        rim_nm=rng.uniform(7, 10),
        inner_rim=rng.uniform(0.4, 0.6),
    )


def mitochondrion_look(rng: np.random.Generator) -> Look:
    """Return the look of a mitochondrion: large, dark grey, coarse."""
    return Look(lumen=-rng.uniform(0.16, 0.26), grain=0.10, rim=0.30, rim_nm=10.0)


def draw_body(
    canvas: Canvas,
    body: Body,
    look: Look,
    centre: tuple[int, int, int],
    number: int,
    rng: np.random.Generator,
    *,
    allowed: np.ndarray,
    spacing_nm: float,
    partner: int = 0,
) -> np.ndarray | None:
    """Draw a body where it fits, and return the flat indices of its voxels; None where not.

    Args:
        canvas: Changed in place where the body fits.
        body: Its form.
        look: Its stain.
        centre: Its voxel in the middle.
        number: What `canvas.taken` gets.
        rng: For the texture of its lumen.
        allowed: (Z, Y, X) bool, where its voxels may lie.
        spacing_nm: How far other bodies stay away.
        partner: The number of a body that this one must touch; 0 for none.
    """
    shape = canvas.taken.shape
    half = body.half_axes_nm(canvas.voxel_size_nm)
    if not partner and _core_taken(canvas, half, centre):
        return None
    reach = [
        int(np.ceil((h * 1.25 + 36) / s))
        for h, s in zip((half[0], max(half[1:]), max(half[1:])), canvas.voxel_size_nm, strict=True)
    ]
    low = [max(0, c - r) for c, r in zip(centre, reach, strict=True)]
    high = [min(n, c + r + 1) for c, r, n in zip(centre, reach, shape, strict=True)]
    box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
    form, angle = _metric(body, canvas.voxel_size_nm, centre, low, high, 0.0)
    others = canvas.taken[box]
    free = (others == 0) & allowed[box]
    spacing = spacing_nm / body.radius_nm(canvas.voxel_size_nm)
    if not _has_room(body.size, form, others, free, spacing, partner):
        return None
    ranked = np.where(free, form, np.inf)
    limit = np.partition(ranked.ravel(), body.size - 1)[body.size - 1]
    own = _exactly(ranked, limit, body.size)
    if ndimage.label(own, CONNECT_26)[1] != 1 or _touches_border(own):
        return None
    if partner and not (ndimage.binary_dilation(own) & (others == partner)).any():
        return None
    _stain(canvas, body, look, centre, (low, high), limit, (free, angle), rng)
    canvas.taken[box][own] = number
    places = np.nonzero(own)
    flat: np.ndarray = np.ravel_multi_index(
        tuple(p + a for p, a in zip(places, low, strict=True)), shape
    )
    return flat


def _core_taken(
    canvas: Canvas, half: tuple[float, float, float], centre: tuple[int, int, int]
) -> bool:
    """Return whether another body holds the middle; nine of ten tries end here, at no cost."""
    steps = [
        int(0.55 * h / s)
        for h, s in zip((half[0], half[1], half[1]), canvas.voxel_size_nm, strict=True)
    ]
    core = tuple(slice(max(0, c - r), c + r + 1) for c, r in zip(centre, steps, strict=True))
    return bool(canvas.taken[core].any())


def _has_room(
    size: int,
    form: np.ndarray,
    others: np.ndarray,
    free: np.ndarray,
    spacing: float,
    partner: int,
) -> bool:
    """Return whether a body of `size` voxels keeps its distance and loses at most a tenth.

    Args:
        size: Its voxels.
        form: The distance from its centre in its own metric.
        others: The numbers of the bodies that are there.
        free: Where its voxels may lie.
        spacing: How far others stay away, in its own metric.
        partner: The one that may be near and overlap a little; 0 for none.
    """
    whole = np.partition(form.ravel(), min(size, form.size - 1))[size - 1]
    near = others[form <= whole + spacing]
    inside = form <= whole
    if partner:
        shared = int((others[inside] == partner).sum())
        if shared > 0.06 * size or ((near != 0) & (near != partner)).any():
            return False
    elif near.any():
        return False
    return int((inside & ~free).sum()) <= 0.10 * size and int(free.sum()) >= size


def _exactly(ranked: np.ndarray, limit: float, size: int) -> np.ndarray:
    """Return the `size` voxels of the lowest rank; equal ranks go in scan order."""
    own = ranked < limit
    ties = np.flatnonzero(ranked.ravel() == limit)[: size - int(own.sum())]
    own.ravel()[ties] = True
    return own


def _touches_border(own: np.ndarray) -> bool:
    """Return whether a body reaches the border of its box, where the volume would cut it."""
    core = own[1:-1, 1:-1, 1:-1]
    return bool(own.sum() > core.sum())


def _metric(
    body: Body,
    voxel_size_nm: VoxelSize,
    centre: tuple[int, int, int],
    low: list[int],
    high: list[int],
    lift_nm: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the distance from the centre in the body's metric (1 about its surface), the angle."""
    z, y, x = np.meshgrid(
        *(
            (np.arange(a, b) - c) * s
            for a, b, c, s in zip(low, high, centre, voxel_size_nm, strict=True)
        ),
        indexing="ij",
    )
    z = z + lift_nm
    cos, sin = np.cos(body.angle), np.sin(body.angle)
    height, width, length = body.half_axes_nm(voxel_size_nm)
    u, v = (cos * x + sin * y) / length, (-sin * x + cos * y) / width
    w = z / height
    angle = np.arctan2(v, u)
    bumps = np.ones_like(u)
    for order, (amplitude, phase) in zip((2, 3), body.waves[:2], strict=True):
        bumps += amplitude * np.sin(order * angle + phase)
    bumps += body.waves[2, 0] * np.clip(w, -1, 1)
    return np.sqrt(u**2 + v**2 + w**2) / bumps, angle + body.angle


def _stain(
    canvas: Canvas,
    body: Body,
    look: Look,
    centre: tuple[int, int, int],
    corners: tuple[list[int], list[int]],
    limit: float,
    place: tuple[np.ndarray, np.ndarray],
    rng: np.random.Generator,
) -> None:
    """Draw lumen and rim, averaged over the thickness of the section."""
    low, high = corners
    free, angle = place
    box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
    pattern = canvas.pattern[box]
    radius = body.radius_nm(canvas.voxel_size_nm)
    cover = np.zeros(pattern.shape)
    dark = np.zeros(pattern.shape)
    for plane in PLANES:
        form, _ = _metric(
            body, canvas.voxel_size_nm, centre, low, high, plane * canvas.voxel_size_nm[0]
        )
        outside_nm = (form - limit) * radius
        cover += np.clip(0.5 - outside_nm / 8, 0, 1) / len(PLANES)
        dark += np.exp(-0.5 * (outside_nm / look.rim_nm) ** 2) / len(PLANES)
        if look.inner_rim:
            inner = (form - look.inner_rim * limit) * radius
            dark += 0.8 * np.exp(-0.5 * (inner / look.rim_nm) ** 2) / len(PLANES)
    cover *= free
    texture = ndimage.gaussian_filter(rng.standard_normal(pattern.shape), (0.3, 0.9, 0.9))
    texture *= look.grain / max(float(texture.std()), 1e-6)
    lumen = CYTOPLASM + look.lumen + texture
    broken = 1 - look.gap * np.exp(2.5 * (np.cos(angle - look.gap_angle) - 1))
    pattern += cover * (lumen - pattern)
    pattern -= look.rim * dark * broken
    np.maximum(pattern, 0.10, out=pattern)
