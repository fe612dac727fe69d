"""A batch of patches on one device, and the random draws that decide what happens to it.

Every decision (whether, where, how strongly) is drawn on the host, from a generator on the CPU,
and is known there without asking the device. Only noise fields are drawn where the patches are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hydralv_tune.numerics.normalisation import Normalisation

Span = float | Sequence[float]
VoxelSize = tuple[float, float, float]

INTENSITY_RANGES = {
    "0-1": (0.0, 1.0), "clahe": (0.0, 1.0), "z_volume": (-3.0, 3.0), "z_section": (-3.0, 3.0),
}  # fmt: skip
"""Black and white after a normalisation: three spreads hold nearly all of a standardised image."""


@dataclass(frozen=True)
class Patches:
    """A batch of patches, all tensors on one device.

    Args:
        image: float32 (B, 1, Z, Y, X), normalised.
        labels: int32 (B, Z, Y, X), 0 outside instances.
        edt: float32 (B, Z, Y, X), distance inside an instance, -1 outside.
        mask: bool (B, Z, Y, X), True where a voxel counts.
        voxel_sizes_nm: Voxel size (z, y, x) of each patch, so that a tilt is a rigid one; unit
            voxels where it is None, and for all where there is none.
        intensity_ranges: The values of black and white in each patch of `image`; 0 and 1 for all
            where there is none. Knobs of intensity are shares of it, so they mean the same for a
            0-1 image and a standardised one.
    """

    image: Tensor
    labels: Tensor
    edt: Tensor
    mask: Tensor
    voxel_sizes_nm: tuple[VoxelSize | None, ...] = ()
    intensity_ranges: tuple[tuple[float, float], ...] = ()

    @property
    def shape(self) -> tuple[int, int, int]:
        """Return the shape of one patch (Z, Y, X)."""
        z, y, x = self.labels.shape[1:]
        return z, y, x

    def __len__(self) -> int:
        """Return the number of patches."""
        return int(self.labels.shape[0])

    def voxel_size(self, row: int) -> VoxelSize:
        """Return the voxel size (z, y, x) of a patch; unit voxels where it is unknown.

        Args:
            row: Of the batch.
        """
        return (self.voxel_sizes_nm[row] if self.voxel_sizes_nm else None) or (1.0, 1.0, 1.0)

    def intensity_range(self, row: int) -> tuple[float, float]:
        """Return the values of black and white in a patch.

        Args:
            row: Of the batch.
        """
        return self.intensity_ranges[row] if self.intensity_ranges else (0.0, 1.0)

    def contrast(self, row: int) -> float:
        """Return white minus black of a patch.

        Args:
            row: Of the batch.
        """
        black, white = self.intensity_range(row)
        return white - black

    def with_image(self, image: Tensor) -> Patches:
        """Return the same patches with another image.

        Args:
            image: float32 (B, 1, Z, Y, X).
        """
        return replace(self, image=image)

    def check(self) -> None:
        """Refuse tensors that do not belong together.

        Raises:
            ValueError: Shapes or types are not as described.
        """
        shape = tuple(self.labels.shape)
        fits = (
            len(shape) == 4
            and tuple(self.image.shape) == (shape[0], 1, *shape[1:])
            and tuple(self.edt.shape) == shape
            and tuple(self.mask.shape) == shape
            and len(self.voxel_sizes_nm) in (0, shape[0])
            and len(self.intensity_ranges) in (0, shape[0])
        )
        if not fits:
            raise ValueError(
                f"Patches do not fit: image {tuple(self.image.shape)}, labels {shape}, edt "
                f"{tuple(self.edt.shape)}, mask {tuple(self.mask.shape)}; they must be "
                "(B, 1, Z, Y, X) and three times (B, Z, Y, X), with "
                f"{len(self.voxel_sizes_nm)} voxel sizes and {len(self.intensity_ranges)} "
                "intensity ranges, none or B."
            )
        kinds = (self.image.dtype, self.edt.dtype, self.mask.dtype)
        if kinds != (torch.float32, torch.float32, torch.bool) or self.labels.is_floating_point():
            raise ValueError(
                f"Patches have the types image {kinds[0]}, labels {self.labels.dtype}, edt "
                f"{kinds[1]}, mask {kinds[2]}; they must be float32, int32, float32, bool."
            )


def intensity_range(mode: str, fitted: Normalisation) -> tuple[float, float]:
    """Return black and white of a normalised volume.

    Args:
        mode: Of the normalisation. Under `none` intensities stay those of the file, so black and
            white are the volume's own: 0 and 255, or 0 and 1.
        fitted: The normalisation of the volume, with the intensities that it keeps.
    """
    kept = float(fitted.low.min()), float(fitted.high.max())
    return INTENSITY_RANGES.get(mode, kept)


def host_generator(generator: torch.Generator) -> torch.Generator:
    """Return a generator on the CPU: the given one, or one seeded from a device's.

    The second makes the host wait for the device once; a CPU generator avoids it.

    Args:
        generator: Any generator.
    """
    if generator.device.type == "cpu":
        return generator
    seed = torch.randint(2**62, (), generator=generator, device=generator.device)
    return torch.Generator().manual_seed(int(seed))


def device_generator(generator: torch.Generator, device: torch.device) -> torch.Generator:
    """Return a generator on a device that follows from the state of one on the CPU.

    Args:
        generator: A generator on the CPU.
        device: Where noise is needed.
    """
    # Tensors on "meta" hold no values and draw none; a test runs there, where every question that
    # the host would ask of the device is an error.
    if device.type in ("cpu", "meta"):
        return generator
    return torch.Generator(device).manual_seed(whole(generator, 0, 2**62))


def happens(generator: torch.Generator, prob: float) -> bool:
    """Return True with a probability.

    Args:
        generator: A generator on the CPU.
        prob: From 0 (never) to 1 (always).
    """
    return float(torch.rand((), generator=generator)) < prob


def rows(generator: torch.Generator, count: int, prob: float) -> list[int]:
    """Return the indices of the samples that something happens to.

    Args:
        generator: A generator on the CPU.
        count: Number of samples.
        prob: Probability of each.
    """
    return torch.nonzero(torch.rand(count, generator=generator) < prob).flatten().tolist()


def uniform(generator: torch.Generator, span: Span) -> float:
    """Return a number between the two of a span, or the number itself.

    Args:
        generator: A generator on the CPU.
        span: Lowest and highest, or one number.
    """
    if isinstance(span, int | float):
        return float(span)
    low, high = float(span[0]), float(span[1])
    return low + (high - low) * float(torch.rand((), generator=generator))


def whole(generator: torch.Generator, low: int, high: int) -> int:
    """Return a whole number from `low` to `high`, both included.

    Args:
        generator: A generator on the CPU.
        low: Lowest.
        high: Highest, not under `low`.
    """
    return int(torch.randint(low, high + 1, (), generator=generator))


def count(generator: torch.Generator, span: Span) -> int:
    """Return a whole number from a span, both ends included, or the number itself.

    Args:
        generator: A generator on the CPU.
        span: Lowest and highest, or one number.
    """
    if isinstance(span, int | float):
        return int(span)
    return whole(generator, int(span[0]), int(span[1]))


def choice(generator: torch.Generator, size: int, number: int) -> list[int]:
    """Return some different indices below `size`, in random order.

    Args:
        generator: A generator on the CPU.
        size: Number of indices to choose from.
        number: How many; all where it is larger than `size`.
    """
    return torch.randperm(size, generator=generator)[:number].tolist()
