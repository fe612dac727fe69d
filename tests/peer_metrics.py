"""Ten segmentations, and what stardist and panoptica say of them.

`python tests/peer_metrics.py tests/peer_metrics.json`, in an environment of its own that has both
packages (stardist 0.9.2 and panoptica 2.1.7 made what stands there), writes their figures. The
tests need neither.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage

SHAPE = (12, 40, 40)


def balls(seed: int) -> np.ndarray:
    """Return labels of some twelve balls, some of them touching."""
    rng = np.random.default_rng(seed)
    grid = np.indices(SHAPE)
    labels = np.zeros(SHAPE, np.int32)
    for name in range(1, 13):
        centre = [rng.integers(2, side - 2) for side in SHAPE]
        away = sum(((g - c) / s) ** 2 for g, c, s in zip(grid, centre, (3, 5, 6), strict=True))
        labels[(away < 1) & (labels == 0)] = name
    return labels


def bricks() -> np.ndarray:
    """Return labels of bricks of an even number of sections, each of which has two halves."""
    labels = np.zeros(SHAPE, np.int32)
    for i in range(4):
        labels[2:8, 3:9, 1 + 10 * i : 8 + 10 * i] = i + 1
    return labels


def segmentations() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return (truth, prediction) of each, four of them degenerate."""
    one = balls(0)
    halves = np.where(np.indices(SHAPE)[0] < 5, 2 * bricks(), np.maximum(2 * bricks() - 1, 0))
    rng = np.random.default_rng(1)
    noisy = balls(4)
    for _ in range(8):
        z, y, x = (rng.integers(0, side - 6) for side in SHAPE)
        noisy[z : z + 4, y : y + 6, x : x + 6] = rng.integers(0, 20)
    return {
        "identical": (one, one),
        "nothing predicted": (one, np.zeros_like(one)),
        "one segment for all": (one, (one > 0).astype(np.int32)),
        "cut in halves": (bricks(), halves),
        "shrunken": (one, one * ndimage.binary_erosion(one > 0)),
        "swollen": (balls(1), ndimage.grey_dilation(balls(1), size=(1, 3, 3))),
        "shifted": (balls(2), np.roll(balls(2), (0, 2, 1), (0, 1, 2))),
        "merged in pairs": (balls(3), (balls(3) + 1) // 2),
        "noisy": (balls(4), noisy),
        "another volume": (balls(5), np.where(rng.random(SHAPE) < 0.9, balls(6), balls(5))),
    }


def peers(truth: np.ndarray, prediction: np.ndarray) -> dict[str, Any]:
    """Return the figures of both peers."""
    from panoptica import InputType, NaiveThresholdMatching, Panoptica_Evaluator
    from stardist.matching import matching

    limits = [round(0.5 + 0.05 * step, 2) for step in range(10)]
    found = {limit: matching(truth, prediction, thresh=limit) for limit in (0.3, *limits)}
    theirs = {
        "f1_iou30": found[0.3].f1,
        "f1_iou75": found[0.75].f1,
        "ap_iou50": found[0.5].accuracy,
        "ap_iou75": found[0.75].accuracy,
        "ap": float(np.mean([found[limit].accuracy for limit in limits])),
        "pq": found[0.5].panoptic_quality,
        "sq": found[0.5].mean_matched_score,
        "rq": found[0.5].f1,
    }
    evaluator = Panoptica_Evaluator(
        expected_input=InputType.UNMATCHED_INSTANCE,
        instance_matcher=NaiveThresholdMatching(matching_threshold=0.5),
    )
    result = evaluator.evaluate(
        prediction.astype(np.uint16), truth.astype(np.uint16), verbose=False
    )["ungrouped"]
    keys = {"pq": "pq", "sq": "sq", "rq": "rq"}
    panoptic = {name: float(getattr(result, key)) for name, key in keys.items()}
    return {"stardist": {k: float(v) for k, v in theirs.items()}, "panoptica": panoptic}


if __name__ == "__main__":
    made = {name: peers(*pair) for name, pair in segmentations().items()}
    Path(sys.argv[1]).write_text(json.dumps(made, indent=1, sort_keys=True) + "\n")
