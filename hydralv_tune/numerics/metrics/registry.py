"""The table of metrics: every figure of a segmentation under its name, which may be an objective.

Light to import, since names are checked against it; the formulas are in `scores.py`.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from hydralv_tune.numerics.metrics.contingency import ContingencyTable

HEADLINE = ("adapted_rand_error", "adapted_rand_error_foreground", "f1_iou50")
"""The metrics shown where there is room for three."""
SUMMARY = (
    "adapted_rand_error", "adapted_rand_precision", "adapted_rand_recall",
    "adapted_rand_error_foreground", "f1_iou50",
)  # fmt: skip
"""The metrics that a record and an exported file begin with."""
COUNTS = (
    "instances_true", "instances_predicted", "matched_iou50", "missed", "split", "merged",
    "invented", "by_size",
)  # fmt: skip
"""What a score holds beside the metrics."""


@dataclass(frozen=True)
class Metric:
    """One figure of a segmentation, which may be a study's objective.

    Args:
        name: On the command line, in records and in `objective.metric`.
        label: What people read.
        direction: Whether `lower` or `higher` values are better, or those near `zero`.
        of_table: The figure of a contingency table.
        stacked: Whether `of_table` reads a stack too, and returns one figure a combination. A
            sweep calls one that does not for each combination.
    """

    name: str
    label: str
    direction: Literal["lower", "higher", "zero"]
    of_table: Callable[[ContingencyTable], Any]
    stacked: bool = False

    def cost(self, value: Any) -> Any:
        """Return the figure as something to be minimised."""
        if self.direction == "zero":
            return abs(value)
        return value if self.direction == "lower" else 1.0 - value

    @property
    def cost_label(self) -> str:
        """Return what is minimised, as people read it."""
        return {"lower": self.label, "higher": f"1 − {self.label}", "zero": f"|{self.label}|"}[
            self.direction
        ]


METRICS: dict[str, Metric] = {}
"""Every metric under its name, in the order in which they are listed."""


def register_metric(metric: Metric) -> Metric:
    """Enter a metric into `METRICS`, and return it.

    Raises:
        ValueError: Its name is taken, no identifier, or its direction is none of the three.
    """
    if not metric.name.isidentifier() or metric.name in (*METRICS, *COUNTS):
        reason = "taken" if metric.name.isidentifier() else "no identifier"
        raise ValueError(f"metric name {metric.name!r} is {reason}; give it another")
    if metric.direction not in ("lower", "higher", "zero"):
        raise ValueError(
            f"metric '{metric.name}' has direction {metric.direction!r}, but it must be lower, "
            "higher or zero"
        )
    METRICS[metric.name] = metric
    return metric


def _scores() -> Any:
    """Return the module of the formulas, by name as in the other tables: it imports this one."""
    return pkgutil.resolve_name("hydralv_tune.numerics.metrics.scores")


ERROR, FOREGROUND = "adapted Rand error", "adapted Rand error, foreground form"
VOI = "variation of information"
_stacked = partial(Metric, stacked=True)
for _metric in (
    _stacked("adapted_rand_error", ERROR, "lower", lambda t: _scores().adapted_rand(t).error),
    _stacked("adapted_rand_precision", "adapted Rand precision", "higher",
             lambda t: _scores().adapted_rand(t).precision),
    _stacked("adapted_rand_recall", "adapted Rand recall", "higher",
             lambda t: _scores().adapted_rand(t).recall),
    _stacked("adapted_rand_error_foreground", FOREGROUND, "lower",
             lambda t: _scores().adapted_rand_foreground(t).error),
    _stacked("skimage_adapted_rand_error", f"{ERROR}, as scikit-image has it", "lower",
             lambda t: _scores().skimage_adapted_rand_error(t)),
    _stacked("voi_split", f"{VOI}, split", "lower",
             lambda t: _scores().variation_of_information(t)[0]),
    _stacked("voi_merge", f"{VOI}, merge", "lower",
             lambda t: _scores().variation_of_information(t)[1]),
    _stacked("voi", VOI, "lower", lambda t: sum(_scores().variation_of_information(t))),
    _stacked("f1_iou50", "F1 at IoU 0.5", "higher", lambda t: _scores().f1_above_half(t)),
    _stacked("precision_iou50", "precision at IoU 0.5", "higher",
             lambda t: _scores().precision_above_half(t)),
    _stacked("recall_iou50", "recall at IoU 0.5", "higher",
             lambda t: _scores().recall_above_half(t)),
    _stacked("f1_iou30", "F1 at IoU 0.3", "higher", lambda t: _scores().f1_at(t, 0.3)),
    _stacked("f1_iou75", "F1 at IoU 0.75", "higher", lambda t: _scores().f1_at(t, 0.75)),
    _stacked("ap_iou50", "average precision at IoU 0.5", "higher",
             lambda t: _scores().average_precision(t, 0.5)),
    _stacked("ap_iou75", "average precision at IoU 0.75", "higher",
             lambda t: _scores().average_precision(t, 0.75)),
    _stacked("ap", "average precision over IoU 0.5 to 0.95", "higher",
             lambda t: _scores().mean_average_precision(t)),
    _stacked("pq", "panoptic quality", "higher", lambda t: _scores().panoptic_quality(t)),
    _stacked("sq", "segmentation quality", "higher",
             lambda t: _scores().segmentation_quality(t)),
    _stacked("rq", "recognition quality", "higher", lambda t: _scores().f1_at(t, 0.5)),
    _stacked("best_dice", "symmetric best Dice", "higher", lambda t: _scores().best_dice(t)),
    _stacked("count_bias", "bias of the instance count", "zero",
             lambda t: _scores().count_bias(t)),
    _stacked("volume_bias", "bias of the instances' volume", "zero",
             lambda t: _scores().volume_bias(t)),
    Metric("recall_small", "recall of the smallest third at IoU 0.5", "higher",
           lambda t: _scores().recall_of_size(t, "small")),
    Metric("recall_medium", "recall of the middle third at IoU 0.5", "higher",
           lambda t: _scores().recall_of_size(t, "medium")),
    Metric("recall_large", "recall of the largest third at IoU 0.5", "higher",
           lambda t: _scores().recall_of_size(t, "large")),
):  # fmt: skip
    METRICS[_metric.name] = _metric
