"""What limits a score now, and which recipe of `trials/` addresses it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hydralv_tune.artifacts.records import PLAN_TARGETS
from hydralv_tune.numerics.metrics.instance_errors import InstanceError, errors_if_corrected
from hydralv_tune.numerics.metrics.scores import (
    ContingencyTable,
    adapted_rand,
    adapted_rand_foreground,
)


@dataclass(frozen=True)
class PlanTarget:
    """One target of the plan, and how far it is.

    `now` is None where it was not measured, and `met` then False.
    """

    label: str
    rule: str
    limit: float
    now: float | None

    @property
    def met(self) -> bool:
        """Return whether the target is reached."""
        if self.now is None:
            return False
        return self.now < self.limit if self.rule == "<" else self.now > self.limit

    @property
    def distance(self) -> float | None:
        """Return what is missing; 0 where the target is met."""
        if self.now is None:
            return None
        return 0.0 if self.met else abs(self.now - self.limit)


@dataclass(frozen=True)
class Limit:
    """One kind of fault, and what correcting it would gain.

    Args:
        kind: `missed`, `split`, `merged`, `shrunken`, `swollen`, `invented`, or `loose`: matched,
            with an outline that is off.
        count: How many instances.
        error: Adapted Rand error once all of them were mended.
        error_foreground: The same of the foreground form.
        worth: By how much the objective's error would fall.
        text: What it means and what helps.
        recipe: Name in `trials/`.
    """

    kind: str
    count: int
    error: float
    error_foreground: float
    worth: float
    text: str
    recipe: str


REMEDIES: Mapping[str, tuple[str, str]] = {
    "missed": (
        "No segment covers a tenth of them. The network does not call them foreground, so no "
        "threshold brings them back: give rare foreground more weight and more patches.",
        "foreground_weighted",
    ),
    "split": (
        "Several seeds stand in one instance. A higher distance threshold for seeds, or a larger "
        "min_seed_size, joins them where the sweep allows it; a decoder that reads the distance "
        "alone has no boundary to be split by.",
        "plan_watershed_distance",
    ),
    "merged": (
        "Neighbours share one seed. The boundary between them is not seen: give label and "
        "boundary more weight, train longer, and train the coarser levels too.",
        "plan_quick_win",
    ),
    "shrunken": (
        "They were found, but only their core. The foreground thresholds are as low as the guard "
        "allows, so the probabilities must rise at the rim: raise the weight of false negatives "
        "over false positives.",
        "foreground_weighted",
    ),
    "swollen": (
        "They were found, but reach beyond the truth, which adapted Rand error does not see. "
        "Minimise its foreground form, or raise the weight of false positives over false "
        "negatives.",
        "plan_focal",
    ),
    "invented": (
        "Segments where the label has nothing (false positives). Adapted Rand error does not see "
        "them; the foreground form and F1 do. Look at them first: some may be instances that "
        "nobody labelled. If not, raise the weight of false positives over false negatives.",
        "plan_focal",
    ),
}
"""What each kind of fault means, what helps, and the recipe that does it."""

WORTH_A_WORD = 0.005
"""Error under which loose outlines are not worth mentioning."""

STILL_LEARNING = 0.4
"""Total loss, as the plan counts it, above which no threshold is what limits the score."""


def plan_targets(metrics: Mapping[str, Any], losses: Mapping[str, Any]) -> list[PlanTarget]:
    """Return the plan's targets beside what was reached.

    Args:
        metrics: Figures of the best trial.
        losses: Losses of its last evaluation: `plan_total`, `label`, `boundary`, `edt`.
    """
    values = {**metrics, **{f"loss.{name}": value for name, value in losses.items()}}
    return [
        PlanTarget(label, rule, limit, None if values.get(key) is None else float(values[key]))
        for key, label, rule, limit in PLAN_TARGETS
    ]


def kind_of(error: InstanceError, table: ContingencyTable) -> str | None:
    """Return what is wrong with an instance, or None where it matches at IoU 0.5."""
    if error.kind != "true":
        return error.kind
    if error.fits or error.truth_id is None:
        return None
    own = table.pair_truth == error.row
    best = table.pair_voxels[own].argmax()
    segment = int(table.segment_sizes[table.pair_segment[own][best]])
    return "shrunken" if segment < error.size_voxels else "swollen"


def limits(
    table: ContingencyTable,
    errors: Sequence[InstanceError],
    *,
    metric: str,
    recipes: Sequence[str],
) -> list[Limit]:
    """Return what costs score, the most costly first.

    Args:
        table: Overlaps inside the mask.
        errors: Of `instance_errors`, of that table.
        metric: The study's; what is not a form of the error is ranked by the foreground form.
        recipes: Names in `trials/`; a recipe that is not there is named `baseline`.
    """
    groups: dict[str, list[InstanceError]] = {}
    for error in errors:
        kind = kind_of(error, table) or "loose"
        groups.setdefault(kind, []).append(error)
    before = (adapted_rand(table).error, adapted_rand_foreground(table).error)
    ranked = 0 if metric == "adapted_rand_error" else 1
    found = []
    for kind, own in groups.items():
        after = errors_if_corrected(table, own)
        text, recipe = _loose(table, own) if kind == "loose" else REMEDIES[kind]
        worth = before[ranked] - after[ranked]
        if kind == "loose" and before[1] - after[1] < WORTH_A_WORD:
            continue
        known = recipe if recipe in recipes else "baseline"
        found.append(Limit(kind, len(own), after[0], after[1], worth, text, known))
    return sorted(found, key=lambda limit: (-limit.worth, limit.error_foreground))


def _loose(table: ContingencyTable, matched: Sequence[InstanceError]) -> tuple[str, str]:
    """Return what is off with instances that match, and the recipe against it."""
    rows = np.zeros(len(table.truth_ids), bool)
    rows[[error.row for error in matched]] = True
    pairs = rows[table.pair_truth]
    covered = table.pair_voxels[pairs].sum() / table.truth_sizes[rows].sum()
    segments = np.unique(table.pair_segment[pairs])
    within = table.pair_voxels[pairs].sum() / table.segment_sizes[segments].sum()
    text = (
        f"They match at IoU 0.5. {covered:.0%} of their voxels are covered, and {within:.0%} of "
        "their segments lies inside them. "
    )
    if covered < within:
        return (
            f"{text}The rim is missing: raise the weight of false negatives.",
            "foreground_weighted",
        )
    return f"{text}The rim is too wide: raise the weight of false positives.", "plan_focal"
