"""What the phantom's bodies lie in: a host process among neurites, and the sections it is cut into.

The pattern is how much each voxel scatters, from 0 (stained black) to 1; brightness comes last.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage
from scipy.spatial import cKDTree

VoxelSize = tuple[float, float, float]
Shape = tuple[int, int, int]
CYTOPLASM = 0.70
NEURITE_NM = 430.0
MEMBRANE_NM = 10.0
COARSE = 4
SECTION_MEAN_MIN, SECTION_MEAN_MAX = 86.0, 211.0


@dataclass(frozen=True)
class Host:
    """The process that holds the vesicles.

    Args:
        mask: (Z, Y, X) bool, True inside.
        depth_nm: (Z, Y, X) float32, about the distance to its membrane, positive inside.
    """

    mask: np.ndarray
    depth_nm: np.ndarray


@dataclass(frozen=True)
class Tissue:
    """The stained tissue before bodies are drawn into it.

    Args:
        pattern: (Z, Y, X) float32, 0 black to 1 white; bodies are drawn into it in place.
        clearance_nm: (Z, Y, X) float32, distance to the nearest membrane outside the host.
    """

    pattern: np.ndarray
    clearance_nm: np.ndarray


def smooth_noise(
    shape: tuple[int, ...], sigma: tuple[float, ...], rng: np.random.Generator
) -> np.ndarray:
    """Return Gaussian noise of unit deviation, correlated over `sigma` voxels; float32."""
    noise = rng.standard_normal(shape, dtype=np.float32)
    smooth: np.ndarray = ndimage.gaussian_filter(noise, sigma, mode="reflect", truncate=3.0)
    return smooth / max(float(smooth.std()), 1e-6)


def make_host(
    shape: Shape, share: float, voxel_size_nm: VoxelSize, rng: np.random.Generator
) -> Host:
    """Return a winding, branched process that takes exactly `share` of the volume."""
    coarse, positions = _coarse_grid(shape, voxel_size_nm)
    extent = np.array(shape) * voxel_size_nm
    line = _centre_line(extent, rng)
    sigma = (60.0 / voxel_size_nm[0], 14.0 / COARSE, 14.0 / COARSE)
    wander = _wander(shape, voxel_size_nm, rng)
    bent = positions + np.stack([0.8 * w.ravel() for w in wander], axis=1)
    distance = cKDTree(line).query(bent)[0].reshape(coarse).astype(np.float32)
    # The surface waves by a fifth of the radius that the share asks for.
    radius = float(np.quantile(distance, share))
    field = _upsample(distance + 0.09 * radius * smooth_noise(coarse, sigma, rng), shape)
    voxels = max(1, round(share * field.size))
    # Islands that the waves cut off are left out: the voxels come from one connected piece.
    wide = field <= np.partition(field.ravel(), min(2 * voxels, field.size - 1))[2 * voxels - 1]
    pieces, count = ndimage.label(wide)
    if count > 1:
        field[wide & (pieces != np.bincount(pieces[wide]).argmax())] += 2 * radius
    limit = np.partition(field.ravel(), voxels - 1)[voxels - 1]
    return Host(mask=field <= limit, depth_nm=(limit - field).astype(np.float32))


def make_tissue(host: Host, voxel_size_nm: VoxelSize, rng: np.random.Generator) -> Tissue:
    """Return neurites with membranes around the host, and the textured cytoplasm of all."""
    shape: Shape = host.mask.shape
    sites, levels = _neurites(shape, voxel_size_nm, rng)
    wander = _wander(shape, voxel_size_nm, rng)
    coarse, positions = _coarse_grid(shape, voxel_size_nm)
    shifted = positions + np.stack([w.ravel() for w in wander], axis=1)
    nearest = cKDTree(sites).query(shifted, k=4)[1].reshape(*coarse, 4)
    pattern = np.empty(shape, dtype=np.float32)
    clearance = np.empty(shape, dtype=np.float32)
    steps = [_centres(n, size) for n, size in zip(shape, voxel_size_nm, strict=True)]
    rows = np.minimum(np.arange(shape[1]) * coarse[1] // shape[1], coarse[1] - 1)
    columns = np.minimum(np.arange(shape[2]) * coarse[2] // shape[2], coarse[2] - 1)
    for z in range(shape[0]):
        moved = [_upsample(w[z], shape[1:]) for w in wander]
        place = np.stack(
            [
                np.full(shape[1:], steps[0][z], dtype=np.float32) + moved[0],
                steps[1][:, None] + moved[1],
                steps[2][None, :] + moved[2],
            ],
            axis=-1,
        )
        candidates = nearest[z][rows[:, None], columns[None, :]]
        gap, own, tilt = _to_membrane(place, sites, candidates)
        width = np.hypot(MEMBRANE_NM, 0.4 * voxel_size_nm[0] * tilt)
        dark = 0.6 * MEMBRANE_NM / width * np.exp(-0.5 * (gap / width) ** 2)
        pattern[z] = levels[own] - dark
        clearance[z] = gap
    inside = CYTOPLASM * np.ones_like(pattern)
    pattern = np.where(host.mask, inside, pattern)
    pattern -= _host_membrane(host, voxel_size_nm)
    pattern += 0.028 * smooth_noise(shape, (0.3, 1.6, 1.6), rng)
    pattern += 0.030 * _upsample(smooth_noise(coarse, (0.6, 2.0, 2.0), rng), shape)
    return Tissue(pattern=pattern, clearance_nm=np.minimum(clearance, -host.depth_nm))


def expose(pattern: np.ndarray, rng: np.random.Generator, grain: float = 1.0) -> np.ndarray:
    """Return the pattern as a microscope records it: uint8, every section with its own brightness.

    Blur and shot noise are those of the real sections; the means of the sections run from 86 to
    211 as those of the plan's volume do, in a slow drift with jumps. `grain` multiplies the noise.
    """
    means, gains = _sections(len(pattern), rng)
    image = np.empty(pattern.shape, dtype=np.uint8)
    for z, section in enumerate(pattern):
        sharp: np.ndarray = ndimage.gaussian_filter(section, 0.6)
        white = rng.standard_normal(section.shape, dtype=np.float32)
        coarse: np.ndarray = ndimage.gaussian_filter(
            rng.standard_normal(section.shape, dtype=np.float32), 0.7
        )
        values = gains[z] * (sharp + grain * (0.075 * white + 0.15 * coarse))
        values += means[z] - values.mean()
        # Clipping moves the mean, so it is set once more.
        values += means[z] - np.clip(values, 0, 255).mean()
        image[z] = np.clip(np.round(values), 0, 255)
    return image


def _sections(count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean brightness and the gain of each section."""
    drift = np.cumsum(rng.normal(0, 0.25, count))
    jumps = np.cumsum(rng.normal(0, 0.9, count) * (rng.random(count) < 0.2))
    flicker = rng.normal(0, 0.25, count)
    course = drift + jumps + flicker
    course = (course - course.min()) / max(float(np.ptp(course)), 1e-6)
    means = SECTION_MEAN_MIN + (SECTION_MEAN_MAX - SECTION_MEAN_MIN) * course
    return means, rng.uniform(180, 230, count)


def _centres(count: int, size: float) -> np.ndarray:
    """Return the centres of `count` voxels of `size` nanometres; float32."""
    return ((np.arange(count) + 0.5) * size).astype(np.float32)


def _coarse_grid(shape: Shape, voxel_size_nm: VoxelSize) -> tuple[Shape, np.ndarray]:
    """Return a grid of full height and a quarter of the width, and its positions (N, 3) in nm."""
    coarse = (shape[0], -(-shape[1] // COARSE), -(-shape[2] // COARSE))
    axes = [
        _centres(m, n * size / m) for m, n, size in zip(coarse, shape, voxel_size_nm, strict=True)
    ]
    grid = np.meshgrid(*axes, indexing="ij")
    return coarse, np.stack([axis.ravel() for axis in grid], axis=1)


def _upsample(coarse: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Return a coarse field on the full grid, linearly; float32."""
    factors = [n / m for n, m in zip(shape, coarse.shape, strict=True)]
    fine: np.ndarray = ndimage.zoom(
        coarse.astype(np.float32), factors, order=1, mode="nearest", grid_mode=True
    )
    return fine


def _centre_line(extent: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return points (N, 3) in nm along a winding line across the sections, with one branch."""
    angle = rng.uniform(0, np.pi)
    along = np.array([0.0, np.sin(angle), np.cos(angle)])
    across = np.array([0.0, -np.cos(angle), np.sin(angle)])
    up = np.array([1.0, 0.0, 0.0])
    reach = np.abs(extent[1:]).max()
    t = np.linspace(-0.75, 0.75, 600)
    phase = rng.uniform(0, 2 * np.pi, 2)
    sway = 0.10 * np.sin(2 * np.pi * 1.1 * t + phase[0])
    rise = 0.16 * np.sin(2 * np.pi * 0.9 * t + phase[1])
    middle = extent / 2
    trunk = (
        middle
        + t[:, None] * reach * along
        + sway[:, None] * reach * across
        + rise[:, None] * extent[0] * up
    )
    start = trunk[rng.integers(240, 360)]
    side = rng.choice([-1.0, 1.0])
    s = np.linspace(0, 0.45, 150)[:, None]
    branch = start + s * reach * (side * across + 0.45 * along) + 0.25 * s * extent[0] * up
    return np.concatenate([trunk, branch])


def _neurites(
    shape: Shape, voxel_size_nm: VoxelSize, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Return the sites (N, 3) in nm around which neurites lie, and the grey level of each."""
    margin = 1.5 * NEURITE_NM
    extent = np.array(shape) * voxel_size_nm + 2 * margin
    count = max(12, round(float(np.prod(extent)) / NEURITE_NM**3))
    sites = rng.random((count, 3)) * extent - margin
    levels = rng.normal(CYTOPLASM, 0.035, count) - 0.12 * (rng.random(count) < 0.12)
    return sites.astype(np.float32), levels.astype(np.float32)


def _wander(shape: Shape, voxel_size_nm: VoxelSize, rng: np.random.Generator) -> list[np.ndarray]:
    """Return how far the tissue is shifted along z, y, x, in nm on the coarse grid."""
    coarse, _ = _coarse_grid(shape, voxel_size_nm)
    wide = (150 / voxel_size_nm[0], 26 / COARSE, 26 / COARSE)
    narrow = (60 / voxel_size_nm[0], 9 / COARSE, 9 / COARSE)
    return [
        110 * smooth_noise(coarse, wide, rng) + 18 * smooth_noise(coarse, narrow, rng)
        for _ in range(3)
    ]


def _to_membrane(
    place: np.ndarray, sites: np.ndarray, candidates: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the distance to the wall between two neurites, the own neurite, and the wall's tilt.

    Args:
        place: (Y, X, 3) positions in nm.
        sites: (N, 3) sites in nm.
        candidates: (Y, X, 4) the sites that may be nearest.
    """
    away = place[:, :, None, :] - sites[candidates]
    squared = np.einsum("yxki,yxki->yxk", away, away)
    order = np.argpartition(squared, 1, axis=-1)[..., :2]
    near = np.take_along_axis(squared, order, axis=-1)
    pair = np.take_along_axis(candidates, order, axis=-1)
    between = sites[pair[..., 1]] - sites[pair[..., 0]]
    length = np.maximum(np.linalg.norm(between, axis=-1), 1.0)
    gap = (near[..., 1] - near[..., 0]) / (2 * length)
    return gap, pair[..., 0], np.abs(between[..., 0]) / length


def _host_membrane(host: Host, voxel_size_nm: VoxelSize) -> np.ndarray:
    """Return how much the membrane of the host darkens; wide and pale where it lies flat."""
    tilt = np.abs(np.gradient(host.depth_nm, voxel_size_nm[0], axis=0))
    width = np.hypot(MEMBRANE_NM, 0.4 * voxel_size_nm[0] * np.minimum(tilt, 1))
    dark: np.ndarray = 0.6 * MEMBRANE_NM / width * np.exp(-0.5 * (host.depth_nm / width) ** 2)
    return dark
