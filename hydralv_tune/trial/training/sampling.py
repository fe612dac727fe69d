"""Training patches from volumes that live on the device.

A volume is uploaded once in the type of its file. A batch of patches is cut there by index
arithmetic and normalised by the rule that prediction uses; the distance target, which needs whole
instances, is computed once and cut along.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hydralv_tune.config.candidate import Data
from hydralv_tune.config.errors import ConfigError, as_input_error
from hydralv_tune.data.volumes import Volume
from hydralv_tune.numerics.augmentation.patches import Patches, intensity_range
from hydralv_tune.numerics.targets import instance_edt
from hydralv_tune.trial.fitted_normalisation import (
    PAD_MODES,
    padded_normalisation,
    with_normalisation,
)
from hydralv_tune.trial.training.sampling_locations import Ints, Places, find_sampling_locations

OUTSIDE = -1.0
"""The distance target where there is no instance."""

READERS = 2
"""Threads that read ahead from disk."""

RESIDENT_BYTES = 9
"""Bytes a voxel takes on the device beside its image: label 4, distance 4, mask 1."""


class Source(Protocol):
    """Where the patches of one volume come from."""

    @property
    def places(self) -> Places: ...
    def cut(self, starts: Ints, size: Sequence[int]) -> Patches: ...


class ResidentVolume:
    """One volume on the device, padded, with its distance target and its normalisation.

    Args:
        volume: With a label.
        data: `data` of the candidate.
        device: Where it lives.
        seed: Of the places remembered.
    """

    def __init__(self, volume: Volume, data: Data, device: torch.device, seed: int) -> None:
        label = volume.label
        assert label is not None, "checked by the split"
        with as_input_error(f"Volume '{volume.name}'"):
            distance = instance_edt(label, **distance_arguments(data, volume))
        pad, inside = data.pad_size, volume.where_scored
        self.voxel_size_nm = known_voxel_size(data, volume)
        volume = with_normalisation(volume, data)
        fitted = volume.normalisation
        assert fitted is not None
        self.intensity_range = intensity_range(data.image_transform.normalize, fitted)
        self.places = find_sampling_locations(volume.name, label, inside, pad=pad, seed=seed)
        self.device = device
        self.image = upload(_padded(volume.image, pad, PAD_MODES[data.pad_mode]), device)
        self.label = upload(_padded(label.astype(np.int32), pad, None), device)
        self.distance = upload(_padded(distance, pad, None, OUTSIDE), device)
        self.mask: Tensor | None = None
        if inside is not None or any(pad):
            mask = np.ones(label.shape, bool) if inside is None else inside
            self.mask = upload(_padded(mask, pad, None), device)
        self.normalisation = padded_normalisation(fitted, pad[0], data.pad_mode)
        self.per_section = {
            name: torch.from_numpy(getattr(self.normalisation, name)).to(device)
            for name in ("low", "high", "offset", "scale")
        }

    def cut(self, starts: Ints, size: Sequence[int]) -> Patches:
        """Return the patches that begin at `starts` (B, 3).

        Args:
            starts: First voxel (z, y, x) of each patch.
            size: Voxels (z, y, x) of a patch.
        """
        begin = torch.from_numpy(starts)
        labels = crop(self.label, begin, size)
        mask = None if self.mask is None else crop(self.mask, begin, size)
        sections = begin[:, :1] + torch.arange(size[0])
        image = normalised(crop(self.image, begin, size), self.per_section, sections)
        return Patches(
            image=image[:, None],
            labels=labels,
            edt=crop(self.distance, begin, size),
            mask=torch.ones_like(labels, dtype=torch.bool) if mask is None else mask,
            voxel_sizes_nm=(self.voxel_size_nm,) * len(starts),
            intensity_ranges=(self.intensity_range,) * len(starts),
        )


def distance_arguments(data: Data, volume: Volume) -> dict[str, Any]:
    """Return the keyword arguments of the distance target of a volume.

    Raises:
        ConfigError: Its voxel size is asked for, but unknown.
    """
    arguments: dict[str, Any] = {}
    for target in data.label_transform.targets:
        if target.name == "instance_edt":
            arguments.update(target.kwargs)
    if data.label_transform.edt_voxel_size == "volume":
        size = known_voxel_size(data, volume)
        if size is None:
            raise ConfigError(
                f"Volume '{volume.name}': data.label_transform.edt_voxel_size is volume, but its "
                "voxel size is unknown. Give it, for example --set data.train_resolution=[30,8,8] "
                "(nanometres along z, y, x)."
            )
        arguments["voxel_size_nm"] = size
    return arguments


def known_voxel_size(data: Data, volume: Volume) -> tuple[float, float, float] | None:
    """Return the voxel size (z, y, x) that the candidate or the volume states."""
    size = data.train_resolution or volume.voxel_size_nm
    if size is None or len(size) != 3:
        return None
    z, y, x = (float(side) for side in size)
    return z, y, x


def boundary_arguments(data: Data) -> dict[str, Any]:
    """Return the keyword arguments of the boundary target."""
    arguments: dict[str, Any] = {}
    for target in data.label_transform.targets:
        if target.name == "instance_boundary":
            arguments.update(target.kwargs)
    return arguments


def resident_bytes(volume: Volume) -> int:
    """Return what a volume takes on the device.

    Folds share a volume that is whole in them. Slabs differ in margin and in the instances that
    they cut, so of a volume that is cross-validated by itself each fold holds what it trains on.
    """
    return int(volume.image.size) * (volume.image.dtype.itemsize + RESIDENT_BYTES)


def crop(volume: Tensor, starts: Tensor, size: Sequence[int]) -> Tensor:
    """Return patches (B, *size) of a volume (Z, Y, X), copied.

    Args:
        volume: On any device.
        starts: First voxels (B, 3), on the CPU.
        size: Voxels (z, y, x).
    """
    dz, dy, dx = size
    if volume.device.type == "cpu":
        # Slices copy whole rows: 2 to 10 times faster there than indices (measured).
        return torch.stack(
            [volume[z : z + dz, y : y + dy, x : x + dx] for z, y, x in starts.tolist()]
        )
    return gather(volume, starts.to(volume.device, non_blocking=True), size)


def gather(volume: Tensor, starts: Tensor, size: Sequence[int]) -> Tensor:
    """Return patches by one indexing of all windows: one kernel for the whole batch.

    Args:
        volume: (Z, Y, X).
        starts: First voxels (B, 3), on the same device.
        size: Voxels (z, y, x).
    """
    windows = volume
    for axis, side in enumerate(size):
        windows = windows.unfold(axis, side, 1)
    z, y, x = starts.unbind(1)
    return windows[z, y, x]


def normalised(patches: Tensor, per_section: dict[str, Tensor], sections: Tensor) -> Tensor:
    """Return patches (B, Z, Y, X) as the network gets them, float32.

    Args:
        patches: In the intensities of the file.
        per_section: The fields of a `Normalisation`, (sections of the volume,) each.
        sections: Section (B, Z) of each patch's sections.
    """
    where = sections.to(patches.device, non_blocking=True)
    low, high, offset, scale = (
        per_section[name][where][:, :, None, None] for name in ("low", "high", "offset", "scale")
    )
    return patches.float().clamp_(low, high).sub_(offset).mul_(scale)


def _padded(
    array: npt.NDArray[Any], pad: Sequence[int], mode: str | None, value: float = 0
) -> npt.NDArray[Any]:
    """Return the array with a rim; of one value where no mode is given."""
    if not any(pad):
        return array
    width = [(p, p) for p in pad]
    if mode is None:
        return np.pad(array, width, constant_values=value)
    return np.pad(array, width, mode=mode)  # type: ignore[call-overload]


def upload(array: npt.NDArray[Any], device: torch.device) -> Tensor:
    """Return the array on the device, in a type that torch can index and clamp."""
    widened = {"u2": np.int32, "u4": np.int64, "u8": np.int64, "f8": np.float32}
    kind = f"{array.dtype.kind}{array.dtype.itemsize}"
    array = np.ascontiguousarray(array, dtype=widened.get(kind, array.dtype.newbyteorder("=")))
    return torch.from_numpy(array.copy() if not array.flags.writeable else array).to(device)


@dataclass(frozen=True)
class _Queued:
    """A batch that is being read: where the generator stood before it, and its parts."""

    batch: int
    before: Tensor
    order: Ints
    parts: list[Future[Patches]]


class PatchSampler:
    """Draws batches of patches from several volumes.

    A share of the patches is centred on a voxel of an instance: every instance is equally likely,
    whatever its size. The others lie anywhere, but overlap the mask. Volumes are drawn by the
    voxels that count in them.

    Args:
        sources: The volumes.
        patch_size: Voxels (z, y, x).
        foreground_share: Share of patches centred on an instance.
        seed: Of the draws.
        ahead: Batches read ahead by threads, for volumes on disk; what is drawn is the same.

    Raises:
        ConfigError: A patch is larger than a volume.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        *,
        patch_size: Sequence[int],
        foreground_share: float,
        seed: int,
        ahead: int = 0,
    ) -> None:
        self.sources = list(sources)
        depth, height, width = (int(side) for side in patch_size)
        self.size = (depth, height, width)
        self.share = foreground_share
        self.generator = torch.Generator().manual_seed(seed)
        for source in self.sources:
            check_patch_fits(source.places.name, source.places.shape, self.size)
        voxels = np.array([source.places.valid_voxels for source in self.sources], np.float64)
        self._volume_ends = np.cumsum(voxels / voxels.sum())
        counts = [len(source.places.sizes) for source in self.sources]
        self._instances = [(v, i) for v, count in enumerate(counts) for i in range(count)]
        self.ahead = ahead
        self._queue: deque[_Queued] = deque()
        self._readers = ThreadPoolExecutor(READERS) if ahead else None

    def draw(self, batch: int) -> Patches:
        """Return so many patches, normalised, on the device of the volumes."""
        if self._readers is None:
            order, jobs = self._jobs(batch)
            return _joined([source.cut(starts, self.size) for source, starts in jobs], order)
        if self._queue and self._queue[0].batch != batch:
            self._forget()
        while len(self._queue) <= self.ahead:
            before = self.generator.get_state()
            order, jobs = self._jobs(batch)
            parts = [self._readers.submit(source.cut, starts, self.size) for source, starts in jobs]
            self._queue.append(_Queued(batch, before, order, parts))
        queued = self._queue.popleft()
        return _joined([part.result() for part in queued.parts], queued.order)

    def _jobs(self, batch: int) -> tuple[Ints, list[tuple[Source, Ints]]]:
        """Return the row of each patch in the batch, and what is cut of each volume."""
        places = self.draw_places(batch)
        jobs: list[tuple[Source, Ints]] = []
        rows: list[int] = []
        for number, source in enumerate(self.sources):
            own = [row for row, (volume, _) in enumerate(places) if volume == number]
            if own:
                jobs.append((source, np.array([places[row][1] for row in own], np.int64)))
                rows.extend(own)
        return np.array(rows, np.int64), jobs

    def _forget(self) -> None:
        """Drop what was read ahead, and stand where its first batch was drawn."""
        if self._queue:
            self.generator.set_state(self._queue[0].before)
        for queued in self._queue:
            for part in queued.parts:
                part.cancel()
        self._queue.clear()

    def draw_places(self, batch: int) -> list[tuple[int, tuple[int, int, int]]]:
        """Return (volume, first voxel) of so many patches."""
        random = torch.rand(batch, 6, generator=self.generator, dtype=torch.float64).numpy()
        return [self._place(row) for row in random]

    def _place(self, u: npt.NDArray[np.float64]) -> tuple[int, tuple[int, int, int]]:
        """Return volume and first voxel from six numbers in [0, 1)."""
        if u[0] < self.share and self._instances:
            volume, instance = self._instances[int(u[1] * len(self._instances))]
            places = self.sources[volume].places
            voxel = places.first[instance] + int(u[2] * places.sizes[instance])
            middle = _unravelled(int(places.instances[voxel]), places.shape)
            corner = [c - s // 2 for c, s in zip(middle, self.size, strict=True)]
            return volume, self._clamped(places, corner)
        volume = int(np.searchsorted(self._volume_ends, u[1], side="right"))
        volume = min(volume, len(self.sources) - 1)
        places = self.sources[volume].places
        if places.valid is None:
            room = [side - s + 1 for side, s in zip(places.shape, self.size, strict=True)]
            return volume, self._clamped(
                places, [int(v * r) for v, r in zip(u[3:], room, strict=True)]
            )
        # A voxel of the mask at any place within the patch, so that rims are seen too.
        voxel = _unravelled(int(places.valid[int(u[2] * len(places.valid))]), places.shape)
        corner = [c - int(v * s) for c, v, s in zip(voxel, u[3:], self.size, strict=True)]
        return volume, self._clamped(places, corner)

    def _clamped(self, places: Places, corner: Sequence[int]) -> tuple[int, int, int]:
        """Return the corner moved so that the patch lies in the volume."""
        z, y, x = (
            min(max(c, 0), side - s)
            for c, side, s in zip(corner, places.shape, self.size, strict=True)
        )
        return z, y, x

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps: where the next batch that is given was drawn."""
        return {"generator": self._queue[0].before if self._queue else self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what a checkpoint kept."""
        self._forget()
        self.generator.set_state(state["generator"])

    def close(self) -> None:
        """End the readers."""
        self._forget()
        if self._readers is not None:
            self._readers.shutdown(cancel_futures=True)


def _joined(parts: Sequence[Patches], order: Ints) -> Patches:
    """Return the patches of several volumes as one batch, in the order they were drawn."""
    if len(parts) == 1:
        return parts[0]
    rows = np.argsort(order)
    back = torch.from_numpy(rows).to(parts[0].image.device)
    image, labels, edt, mask = (
        torch.cat([getattr(part, name) for part in parts])[back]
        for name in ("image", "labels", "edt", "mask")
    )
    sizes = [size for part in parts for size in part.voxel_sizes_nm]
    ranges = [span for part in parts for span in part.intensity_ranges]
    return Patches(
        image, labels, edt, mask,
        voxel_sizes_nm=tuple(sizes[row] for row in rows),
        intensity_ranges=tuple(ranges[row] for row in rows),
    )  # fmt: skip


def _unravelled(flat: int, shape: tuple[int, int, int]) -> tuple[int, int, int]:
    """Return (z, y, x) of a flat index."""
    rest, x = divmod(flat, shape[2])
    z, y = divmod(rest, shape[1])
    return z, y, x


def check_patch_fits(name: str, shape: Sequence[int], size: Sequence[int]) -> None:
    """Refuse a patch that is larger than the volume.

    Raises:
        ConfigError: It is, along some axis.
    """
    for axis, side, s in zip("zyx", shape, size, strict=True):
        if s > side:
            raise ConfigError(
                f"Volume '{name}': data.patch_size is {s} along {axis}, but what is trained on has "
                f"{side} voxels there. Set a smaller data.patch_size, or data.pad_size."
            )
