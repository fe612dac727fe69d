"""A segmentation on disk against its labels, read slab by slab: score, verdicts and view."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hydralv_tune.artifacts.neuroglancer import write_view
from hydralv_tune.config.errors import InputError, as_input_error
from hydralv_tune.data.formats.files import open_lazy, open_mask
from hydralv_tune.data.volumes import agreed_placement
from hydralv_tune.numerics.metrics.contingency import (
    ContingencyTable,
    of_one_volume,
    slab_tables,
)
from hydralv_tune.numerics.metrics.instance_errors import segment_kinds
from hydralv_tune.numerics.metrics.scores import ious, score

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Assessment:
    """What is known of a segmentation.

    Args:
        rows: Its table; where there is truth with `verdict` (true, split, merged or invented),
            `truth` (the id that it overlaps best, 0 for none) and `iou` with that.
        figures: Those of `score` by name; none without truth.
        view: The state that neuroglancer shows it with, where one was asked for.
    """

    rows: pd.DataFrame
    figures: Mapping[str, Any]
    view: Path | None


def assess(
    segmentation: Path,
    rows: pd.DataFrame,
    *,
    image: str,
    label: str | None = None,
    masks: Sequence[str] = (),
    ignore: Collection[int] = (),
    view: Path | None = None,
    progress: Callable[[str, int, int], None] = lambda step, done, whole: None,
) -> Assessment:
    """Compare a segmentation with its truth, once, for its score, its table and its view.

    Args:
        segmentation: Labels on disk.
        rows: The table of its instances.
        image: What was segmented, on disk.
        label: The truth on disk, where there is one.
        masks: On disk; a voxel counts that lies in all of them.
        ignore: Ids of the label that mean "no label".
        view: A folder for image, segmentation and truth as neuroglancer reads them.
        progress: Told the step, the sections done and those there are.

    Raises:
        VolumeError: A file cannot be read, or the folder cannot be written.
        InputError: The shapes differ, or there is no truth.
    """
    table, figures = None, {}
    shown: dict[str, str | Path] = {"image": image}
    if label is not None:
        shown["truth"] = label
        table = _compared(segmentation, label, masks, ignore)
        with as_input_error(label):
            size, _ = agreed_placement(str(segmentation), label, *masks)
            figures = score(table).as_dict(size)
        rows = _judged(rows, table)
    state = None
    if view is not None:
        volumes = {**shown, "segmentation": segmentation}
        state = write_view(view, volumes, compared=table, progress=progress)
    return Assessment(rows, figures, state)


def _compared(
    segmentation: Path, label: str, masks: Sequence[str], ignore: Collection[int]
) -> ContingencyTable:
    """Return the table of a segmentation and its truth, read slab by slab."""
    with ExitStack() as stack:
        found = stack.enter_context(open_lazy(segmentation, ndim=3))
        truth = stack.enter_context(open_lazy(label, ndim=3))
        valid = [stack.enter_context(open_mask(mask, found.shape)) for mask in masks]
        for path, other in zip((label, *masks), (truth, *valid), strict=True):
            if other.shape != found.shape:
                raise InputError(
                    f"{path}: has shape {other.shape}, but the image {found.shape}; both must be "
                    "equal. Give the one of this very volume."
                )
        with as_input_error(label):
            return of_one_volume(list(slab_tables(found, truth, valid, ignore=ignore)))


def _judged(rows: pd.DataFrame, table: ContingencyTable) -> pd.DataFrame:
    """Return the table of instances with what became of each."""
    kinds = segment_kinds(table)
    best = np.zeros(len(table.segment_ids))
    truths = np.zeros(len(table.segment_ids), np.uint64)
    for overlap, segment, truth in zip(
        ious(table), table.pair_segment, table.pair_truth, strict=True
    ):
        if overlap > best[segment]:
            best[segment], truths[segment] = overlap, table.truth_ids[truth]
    place = {int(segment): row for row, segment in enumerate(table.segment_ids)}
    found = [place.get(int(number)) for number in rows["id"]] if len(rows) else []
    return rows.assign(
        verdict=[kinds.get(int(n), "outside") for n in rows["id"]] if len(rows) else [],
        truth=[0 if row is None else int(truths[row]) for row in found],
        iou=[0.0 if row is None else float(best[row]) for row in found],
    )
