"""TensorBoard: losses, scores, a few sections of every evaluation, and what trials differ in."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from hydralv_tune.config.validation import leaves
from hydralv_tune.data.volumes import Volume

Array = npt.NDArray[Any]

SLICES = 2
"""Sections shown at each evaluation: those with the most labelled voxels."""

HEADER = 12
"""Rows of a picture that name its panels."""

TARGETS = ("binary", "boundary", "distance")
PANELS = ("image", *(f"{name} target" for name in TARGETS), *TARGETS, "segments")
COMPARED = ("model.", "optimization.", "system.training.", "data.augmentation.preset")
"""Where the keys of a candidate begin by which trials are compared."""


class EventWriter:
    """Writes TensorBoard events under a folder; a full disk ends the writing, not the trial.

    Args:
        folder: Where the events go.
        step: Events after this optimizer step, of a run that was killed, are hidden.
    """

    def __init__(self, folder: Path, *, step: int) -> None:
        # Imported here: it takes a second, and nothing else needs it.
        from torch.utils.tensorboard import SummaryWriter

        self.problem: str | None = None
        self._targets: dict[tuple[str, int], Array] = {}
        self.writer = SummaryWriter(str(folder), purge_step=step + 1)

    def scalars(self, step: int, groups: Mapping[str, Mapping[str, Any]]) -> None:
        """Write numbers.

        Args:
            step: Of the optimizer.
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
        """Write sections of image, targets, prediction and segmentation side by side, named above.

        Args:
            step: Of the optimizer.
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
                    f"{volume.name}/section_{z}",
                    np.concatenate(
                        [_named(panel, name) for panel, name in zip(row, PANELS, strict=True)],
                        axis=1,
                    ),
                    step,
                    dataformats="HW",
                )

    def compare(self, candidate: Mapping[str, Any], scores: Mapping[str, float]) -> None:
        """Write what TensorBoard compares trials by, in its tab `HPARAMS`.

        Args:
            candidate: As plain values.
            scores: Of the finished trial.
        """
        known = {
            key: value if isinstance(value, bool | int | float | str) else str(value)
            for key, value in leaves(candidate)
            if key.startswith(COMPARED) and value is not None
        }
        with self._watched():
            self.writer.add_hparams(
                known, {f"result/{key}": value for key, value in scores.items()}, run_name="."
            )

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


def _named(panel: npt.NDArray[np.float32], name: str) -> npt.NDArray[np.float32]:
    """Return a panel (Y, X) with its name above (`HEADER` + Y, X)."""
    strip = Image.new("L", (panel.shape[1], HEADER))
    ImageDraw.Draw(strip).text((1, 0), name, fill=255)
    return np.concatenate([np.asarray(strip, np.float32) / 255, panel])


def _grey(section: Array) -> npt.NDArray[np.float32]:
    """Return a section stretched to [0, 1]."""
    values = section.astype(np.float32)
    low, high = float(values.min()), float(values.max())
    return (values - low) / max(high - low, 1e-12)
