"""TensorBoard: scalars and a few slices of every evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hydralv_tune.data.volumes import Volume

Array = npt.NDArray[Any]

SLICES = 2
"""Sections shown at each evaluation: those with the most labelled voxels."""


class Monitor:
    """Writes TensorBoard events under a folder; a full disk ends the writing, not the trial.

    Args:
        folder: Where the events go.
        step: Events after this evaluation, of a run that was killed, are hidden.
    """

    def __init__(self, folder: Path, *, step: int) -> None:
        # Imported here: it takes a second, and nothing else needs it.
        from torch.utils.tensorboard import SummaryWriter

        self.problem: str | None = None
        self._targets: dict[tuple[str, int], Array] = {}
        self.writer = SummaryWriter(str(folder), purge_step=step + 1)

    def scalars(self, step: int, groups: Mapping[str, Mapping[str, Any]]) -> None:
        """Write the numbers of an evaluation.

        Args:
            step: Of the evaluation, from 1.
            groups: Name of a group to names and values; what is no number is left out.
        """
        with self._watched():
            for group, values in groups.items():
                for name, value in values.items():
                    if isinstance(value, int | float) and not isinstance(value, bool):
                        self.writer.add_scalar(f"{group}/{name}", value, step)

    def slices(
        self,
        step: int,
        volume: Volume,
        probabilities: Array,
        segmentation: Array,
        targets: Callable[[int], Array],
    ) -> None:
        """Write sections of image, targets, prediction and segmentation side by side.

        Args:
            step: Of the evaluation, from 1.
            volume: With a label.
            probabilities: (3, Z, Y, X).
            segmentation: (Z, Y, X).
            targets: Function of a section that gives what is trained, (3, Y, X); asked once.
        """
        label = volume.label
        assert label is not None, "checked by the split"
        filled = np.count_nonzero(label.reshape(len(label), -1), axis=1)
        for z in sorted(np.argsort(-filled, kind="stable")[:SLICES]):
            place = (volume.name, int(z))
            if place not in self._targets:
                self._targets[place] = targets(int(z))
            row = [
                _grey(volume.image[z]),
                *_shown(self._targets[place]),
                *_shown(probabilities[:, z]),
                (segmentation[z] > 0).astype(np.float32),
            ]
            with self._watched():
                self.writer.add_image(
                    f"{volume.name}/section_{z}", np.concatenate(row, axis=1), step,
                    dataformats="HW",
                )  # fmt: skip

    def close(self) -> None:
        """Write what is pending."""
        with self._watched():
            self.writer.close()

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Remember why events cannot be written, and go on without them."""
        try:
            yield
        except OSError as error:
            self.problem = f"TensorBoard events are incomplete: {error.strerror or error}"


def _shown(maps: Array) -> list[npt.NDArray[np.float32]]:
    """Return binary, boundary and distance (3, Y, X) in [0, 1]."""
    binary, boundary, distance = maps.astype(np.float32)
    return [binary, boundary, (distance + 1) / 2]


def _grey(section: Array) -> npt.NDArray[np.float32]:
    """Return a section stretched to [0, 1]."""
    values = section.astype(np.float32)
    low, high = float(values.min()), float(values.max())
    return (values - low) / max(high - low, 1e-12)
