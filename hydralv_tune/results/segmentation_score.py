"""A segmentation on disk against its labels, read slab by slab."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hydralv_tune.config.errors import InputError, as_input_error
from hydralv_tune.data.formats.files import open_lazy
from hydralv_tune.numerics.metrics.contingency import of_one_volume, slab_tables
from hydralv_tune.numerics.metrics.instance_errors import segment_kinds
from hydralv_tune.numerics.metrics.scores import ious, score

if TYPE_CHECKING:
    import pandas as pd


def scored_segmentation(
    segmentation: Path,
    label: str,
    rows: pd.DataFrame,
    *,
    masks: Sequence[str] = (),
    ignore: Collection[int] = (),
) -> tuple[dict[str, Any], pd.DataFrame]:
    """Return the figures of `score`, and the table with what became of each instance.

    Args:
        segmentation: Labels on disk.
        label: The truth on disk.
        rows: The table of the segmentation.
        masks: On disk; a voxel counts that lies in all of them.
        ignore: Ids of the label that mean "no label".

    Returns:
        The figures by name; the table with `verdict` (true, split, merged or invented), `truth`
        (the id that it overlaps best, 0 for none) and `iou` with that.

    Raises:
        VolumeError: A file cannot be read.
        InputError: The shapes differ, or there is no truth.
    """
    with ExitStack() as stack:
        found = stack.enter_context(open_lazy(segmentation, ndim=3))
        truth = stack.enter_context(open_lazy(label, ndim=3))
        valid = [stack.enter_context(open_lazy(mask, ndim=3)) for mask in masks]
        for path, other in zip((label, *masks), (truth, *valid), strict=True):
            if other.shape != found.shape:
                raise InputError(
                    f"{path}: has shape {other.shape}, but the image {found.shape}; both must be "
                    "equal. Give the one of this very volume."
                )
        with as_input_error(label):
            table = of_one_volume(list(slab_tables(found, truth, valid, ignore=ignore)))
    with as_input_error(label):
        figures = score(table).as_dict()
    return figures, _judged(rows, table)


def _judged(rows: pd.DataFrame, table: Any) -> pd.DataFrame:
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
