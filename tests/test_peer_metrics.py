"""The figures that peers print are theirs, on ten segmentations."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from peer_metrics import segmentations

from hydralv_tune.numerics.metrics.scores import score_labels

THEIRS = json.loads((Path(__file__).parent / "peer_metrics.json").read_text())


@pytest.mark.parametrize("name", THEIRS)
def test_figures_equal_those_of_stardist_and_panoptica(name: str) -> None:
    truth, prediction = segmentations()[name]
    ours = score_labels(prediction=prediction, truth=truth)
    for peer in ("stardist", "panoptica"):
        for key, value in THEIRS[name][peer].items():
            # Where nothing matches, panoptica leaves the quality undefined.
            wanted = 0.0 if math.isnan(value) else value
            assert ours.metrics[key] == pytest.approx(wanted, abs=1e-6), (peer, key)
