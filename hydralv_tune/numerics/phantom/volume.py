"""A synthetic EM volume with known vesicles, as hard to segment as a real one.

What is labelled are vesicles: a dark rim, sometimes faded or broken, around a grey, granular lumen.
Beside them lie, inside the mask as well as outside, bodies that look alike and carry no label:
clear rings (the same rim around a lumen brighter than the cytoplasm), dark bodies without a rim,
double rings, small vesicles. Whoever segments every dark ring is wrong, and the score says so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtri

from hydralv_tune.numerics.phantom.bodies import (
    Body,
    Canvas,
    Look,
    clear_ring_look,
    dark_body_look,
    double_ring_look,
    draw_body,
    mitochondrion_look,
    random_body,
    vesicle_look,
)
from hydralv_tune.numerics.phantom.tissue import Host, Shape, Tissue, expose, make_host, make_tissue

VOXEL_SIZE_NM = (30.0, 8.0, 8.0)
SIZE_MIN, SIZE_MEDIAN, SIZE_MAX = 224, 555, 1396
# The deviation of the logarithm at which a median of 555 goes with a mean of 596.
SIZE_SPREAD = 0.378
MASK_SHARE = 0.021
FOREGROUND_IN_MASK = 0.107
LARGEST_MASK_SHARE = 0.45
TOUCHING_SHARE = 0.12
# Distractors inside the mask, for each vesicle.
INSIDE: tuple[tuple[float, Callable[[np.random.Generator], Look]], ...] = (
    (0.7, clear_ring_look),
    (0.45, dark_body_look),
    (0.15, double_ring_look),
)
# Voxels for each body outside the mask, its look, and its size in voxels.
OUTSIDE: tuple[tuple[int, Callable[[np.random.Generator], Look], tuple[int, int]], ...] = (
    (500_000, mitochondrion_look, (12_000, 26_000)),
    (90_000, clear_ring_look, (224, 1_400)),
    (120_000, dark_body_look, (150, 1_000)),
    (250_000, double_ring_look, (500, 2_000)),
    (40_000, clear_ring_look, (30, 70)),
)


@dataclass(frozen=True)
class Style:
    """How a phantom differs from those of Hydra.

    Args:
        voxel_size_nm: Along z, y, x.
        size: Factor on the voxels of each vesicle.
        longest: The length of the longest vesicle over its width.
        vesicle: Draws the look of one vesicle.
        grain: Factor on the noise of the sections.
        inverted: Whether what scatters is bright.
    """

    voxel_size_nm: tuple[float, float, float] = VOXEL_SIZE_NM
    size: float = 1.0
    longest: float = 1.3
    vesicle: Callable[[np.random.Generator], Look] = vesicle_look
    grain: float = 1.0
    inverted: bool = False


def random_style(seed: int) -> Style:
    """Return a style whose vesicles are bright or dark, with rims from none to black.

    All vesicles of a phantom look alike; from one seed to the next they differ far more than those
    of real volumes do, as do voxel size, sizes, noise and the sign of the contrast.

    Args:
        seed: The same seed gives the same style.
    """
    rng = np.random.default_rng(seed)
    lumen, rim = rng.uniform(-0.45, 0.2), rng.uniform(0.0, 0.5)
    if abs(lumen) < 0.15:
        rim = max(rim, 0.25)  # else nothing sets them apart
    grain, rim_nm = rng.uniform(0.01, 0.10), rng.uniform(6, 16)
    broken = rng.uniform(0, 0.4)

    def look(rng: np.random.Generator) -> Look:
        return Look(
            lumen=lumen + rng.normal(0, 0.03),
            grain=grain * rng.uniform(0.8, 1.2),
            rim=max(rim * rng.uniform(0.7, 1.2), 0.0),
            rim_nm=rim_nm * rng.uniform(0.85, 1.15),
            gap=rng.uniform(0.6, 1.0) if rng.random() < broken else 0.0,
            gap_angle=rng.uniform(0, 2 * np.pi),
        )

    flat = float(rng.uniform(4, 12))
    return Style(
        voxel_size_nm=(float(flat * rng.uniform(1.5, 7)), flat, flat),
        size=float(np.exp(rng.uniform(np.log(0.5), np.log(8)))),
        longest=float(rng.uniform(1.1, 3.0)),
        vesicle=look,
        grain=float(rng.uniform(0.4, 1.6)),
        inverted=bool(rng.random() < 0.25),
    )


@dataclass(frozen=True)
class Phantom:
    """A volume and its truth.

    Args:
        image: (Z, Y, X) uint8.
        label: (Z, Y, X) uint16, ids 1 to the number of instances.
        mask: (Z, Y, X) uint8, 1 inside the host process.
        distractors: (Z, Y, X) uint16, ids of the bodies that carry no label.
        voxel_size_nm: Along z, y, x.
    """

    image: np.ndarray
    label: np.ndarray
    mask: np.ndarray
    distractors: np.ndarray
    voxel_size_nm: tuple[float, float, float] = VOXEL_SIZE_NM


def make_phantom(
    shape: tuple[int, int, int] = (51, 516, 516),
    instances: int = 51,
    seed: int = 0,
    style: Style | None = None,
) -> Phantom:
    """Return a synthetic EM volume; the defaults are those of the plan's volume.

    The mask takes 2.1 % of the volume, or more where the vesicles would fill over a ninth of it:
    in the plan's volume 11 % of the mask is vesicle, and a small phantom keeps that share.

    Args:
        shape: Voxels along z, y, x; at least 8 x 48 x 48.
        instances: How many vesicles, at least 1.
        seed: The same seed gives the same volume.
        style: How its vesicles, voxels and sections look; as in Hydra without.

    Raises:
        ValueError: The shape is too small, or the instances do not fit into it.
    """
    shape = (int(shape[0]), int(shape[1]), int(shape[2]))
    if shape[0] < 8 or min(shape[1:]) < 48:
        raise ValueError(
            f"shape {shape} is too small to hold vesicles: it must be at least (8, 48, 48). "
            "Choose a larger shape."
        )
    if instances < 1:
        raise ValueError(f"instances is {instances}, but must be at least 1.")
    style = style or Style()
    rng = np.random.default_rng(seed)
    sizes = np.round(style.size * _sizes(instances, rng)).astype(int)
    share = float(sizes.sum()) / FOREGROUND_IN_MASK / float(np.prod(shape))
    if share > LARGEST_MASK_SHARE:
        raise ValueError(_too_many(instances, shape, int(LARGEST_MASK_SHARE / share * instances)))
    host = make_host(shape, max(MASK_SHARE, share), style.voxel_size_nm, rng)
    tissue = make_tissue(host, style.voxel_size_nm, rng)
    canvas = Canvas(
        pattern=tissue.pattern,
        taken=np.zeros(shape, dtype=np.int32),
        voxel_size_nm=style.voxel_size_nm,
    )
    placer = _Placer(canvas, host, tissue, style, rng)
    label = placer.vesicles(sizes)
    distractors = placer.distractors(instances)
    image = expose(tissue.pattern, rng, style.grain)
    return Phantom(
        255 - image if style.inverted else image,
        label,
        host.mask.astype(np.uint8),
        distractors,
        style.voxel_size_nm,
    )


def _sizes(instances: int, rng: np.random.Generator) -> np.ndarray:
    """Return sizes in voxels with the quantiles of the plan, the largest first."""
    quantiles = (np.arange(instances) + 0.5) / instances
    sizes = np.exp(np.log(SIZE_MEDIAN) + SIZE_SPREAD * ndtri(quantiles))
    sizes = np.clip(np.round(sizes), SIZE_MIN, SIZE_MAX).astype(int)
    if instances >= 20:
        sizes[0], sizes[-1] = SIZE_MIN, SIZE_MAX
    return sizes[::-1]


def _too_many(instances: int, shape: Shape, fit: int) -> str:
    """Return the message for a phantom that cannot be."""
    return (
        f"{instances} instances do not fit into shape {shape}. Choose at most {max(fit, 0)} "
        "instances, or a larger shape."
    )


class _Placer:
    """Finds a place for one body after another. Its state is what is taken already."""

    def __init__(
        self,
        canvas: Canvas,
        host: Host,
        tissue: Tissue,
        style: Style,
        rng: np.random.Generator,
    ) -> None:
        self.canvas = canvas
        self.host = host
        self.tissue = tissue
        self.style = style
        self.rng = rng
        self.shape: Shape = host.mask.shape
        self.number = 0
        self.inside = np.flatnonzero(host.mask)
        self.depth = host.depth_nm.ravel()[self.inside]
        self.outside = ~host.mask

    def vesicles(self, sizes: np.ndarray) -> np.ndarray:
        """Place all vesicles, some of them in touch with another, and return the labels."""
        label = np.zeros(self.shape, dtype=np.uint16)
        ids = self.rng.permutation(len(sizes)) + 1
        centres: list[tuple[int, int, int]] = []
        bodies: list[Body] = []
        others = max(len(sizes) - 1, 0)
        touching = 1 + self.rng.permutation(others)[: round(TOUCHING_SHARE * len(sizes))]
        for index, size in enumerate(sizes):
            body = random_body(int(size), self.rng, self.style.longest)
            look = self.style.vesicle(self.rng)
            touch = index in touching
            found = self._beside(body, look, bodies, centres) if touch else None
            if found is None:
                found = self._inside(body, look, tries=600)
            if found is None:
                raise ValueError(_too_many(len(sizes), self.shape, index))
            voxels, centre = found
            label.ravel()[voxels] = ids[index]
            centres.append(centre)
            bodies.append(body)
        return label

    def distractors(self, instances: int) -> np.ndarray:
        """Place what looks like vesicles inside and outside the mask, as far as there is room."""
        before = self.number
        for share, look in INSIDE:
            for _ in range(int(np.ceil(share * instances))):
                size = int(np.clip(np.exp(self.rng.normal(np.log(460), 0.4)), 240, 1_400))
                self._inside(random_body(size, self.rng), look(self.rng), tries=240)
        room = int(self.outside.sum())
        for voxels, look, (low, high) in OUTSIDE:
            for _ in range(int(room / voxels + self.rng.random())):
                size = int(self.rng.integers(low, high))
                self._outside(random_body(size, self.rng), look(self.rng))
        taken = self.canvas.taken
        return np.where(taken > before, taken - before, 0).astype(np.uint16)

    def _inside(
        self, body: Body, look: Look, tries: int
    ) -> tuple[np.ndarray, tuple[int, int, int]] | None:
        """Draw a body somewhere inside the mask, free of all others."""
        need = max(body.half_axes_nm(self.canvas.voxel_size_nm)) + 14
        for slack, spacing in ((1.0, 30.0), (0.85, 22.0), (0.7, 16.0)):
            candidates = self.inside[self.depth >= slack * need]
            if not len(candidates):
                continue
            for place in self.rng.choice(candidates, size=tries // 3):
                z, y, x = (int(i) for i in np.unravel_index(place, self.shape))
                voxels = self._draw(body, look, (z, y, x), self.host.mask, spacing)
                if voxels is not None:
                    return voxels, (z, y, x)
        return None

    def _beside(
        self,
        body: Body,
        look: Look,
        bodies: list[Body],
        centres: list[tuple[int, int, int]],
    ) -> tuple[np.ndarray, tuple[int, int, int]] | None:
        """Draw a vesicle in touch with one that is there."""
        for _ in range(200):
            other = int(self.rng.integers(len(centres)))
            apart = bodies[other].radius_nm(self.canvas.voxel_size_nm) + body.radius_nm(
                self.canvas.voxel_size_nm
            )
            tilt, turn = self.rng.normal(0, 0.35), self.rng.uniform(0, 2 * np.pi)
            direction = (np.sin(tilt), np.cos(tilt) * np.sin(turn), np.cos(tilt) * np.cos(turn))
            z, y, x = (
                round(c + 0.98 * apart * d / s)
                for c, d, s in zip(
                    centres[other], direction, self.canvas.voxel_size_nm, strict=True
                )
            )
            if not all(0 <= c < n for c, n in zip((z, y, x), self.shape, strict=True)):
                continue
            voxels = self._draw(body, look, (z, y, x), self.host.mask, 18.0, partner=other + 1)
            if voxels is not None:
                return voxels, (z, y, x)
        return None

    def _outside(self, body: Body, look: Look) -> None:
        """Draw a body inside some neurite outside the mask, where one is found with room."""
        need = 0.9 * body.radius_nm(self.canvas.voxel_size_nm)
        for _ in range(40):
            z, y, x = (int(self.rng.integers(n)) for n in self.shape)
            clear = self.tissue.clearance_nm[z, y, x] >= need
            if clear and self._draw(body, look, (z, y, x), self.outside, 20.0) is not None:
                return

    def _draw(
        self,
        body: Body,
        look: Look,
        centre: tuple[int, int, int],
        allowed: np.ndarray,
        spacing_nm: float,
        partner: int = 0,
    ) -> np.ndarray | None:
        """Draw a body at a place where it fits, and count it."""
        voxels = draw_body(
            self.canvas,
            body,
            look,
            centre,
            self.number + 1,
            self.rng,
            allowed=allowed,
            spacing_nm=spacing_nm,
            partner=partner,
        )
        if voxels is not None:
            self.number += 1
        return voxels
