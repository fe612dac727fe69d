"""The table and the pictures of a trial's best checkpoint."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydralv_tune.artifacts.pictures import draw_contact_sheet, draw_losses
from hydralv_tune.artifacts.sweep_figures import draw_heatmap
from hydralv_tune.artifacts.writing import write_atomically
from hydralv_tune.data.volumes import Volume, write_array
from hydralv_tune.trial.scoring.evaluation import Outcome


def draw_trial(
    outcome: Outcome, history: Sequence[Mapping[str, Any]], volume: Volume, out: Path
) -> None:
    """Write table, segmentations and pictures into the trial's folder.

    Args:
        outcome: Of the best checkpoint.
        history: Of the trial.
        volume: The first one scored.
        out: The folder.

    Raises:
        OSError: The disk is full.
    """
    buffer = io.BytesIO()
    outcome.sweep.table.to_parquet(buffer, index=False)
    write_atomically(out / "sweep.parquet", buffer.getvalue())
    draw_heatmap(outcome.sweep, out / "sweep.png")
    draw_losses(list(history), out / "losses.png")
    # In the order of the folds and their parts, for the report's instance by instance.
    for index, segmentation in enumerate(outcome.segmentations):
        write_array(out / f"segmentation_{index}.h5", segmentation)
    assert volume.label is not None, "checked by the split"
    draw_contact_sheet(
        image=volume.image,
        truth=volume.label,
        prediction=outcome.segmentations[0],
        mask=volume.where_scored,
        path=out / "contact_sheet.png",
        title=f"{volume.name}: adapted Rand error "
        f"{outcome.metrics['adapted_rand_error']:.3f}, F1 {outcome.f1:.3f}",
    )
