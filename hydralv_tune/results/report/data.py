"""What a report says, gathered once for both of its forms."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from hydralv_tune.artifacts.pictures import COLOURS
from hydralv_tune.artifacts.records import TrialRecord, read_record
from hydralv_tune.artifacts.thumbnails import thumbnail
from hydralv_tune.config.errors import HydraLVError, InputError
from hydralv_tune.config.paths import known_names
from hydralv_tune.config.search_space import Parameter
from hydralv_tune.data.volumes import Volume
from hydralv_tune.numerics.formatting import number_of
from hydralv_tune.numerics.metrics.instance_errors import InstanceError, bootstrap
from hydralv_tune.numerics.metrics.registry import METRICS
from hydralv_tune.numerics.watershed.decoders import arguments_of
from hydralv_tune.results.best_trial import BestTrial
from hydralv_tune.results.ensemble import kept_facts, outdated
from hydralv_tune.results.report.findings import (
    Change,
    Ranks,
    Stopped,
    changes,
    early_ranks,
    stopped,
)
from hydralv_tune.results.report.limits import Limit, PlanTarget, kind_of, limits, plan_targets
from hydralv_tune.results.scored_volumes import (
    Judgement,
    ScoredVolume,
    figures_where_trained,
    judge_all,
    scored_volumes,
)
from hydralv_tune.study.confirm import confirmations, confirmed
from hydralv_tune.study.ending import outlook
from hydralv_tune.study.study_folder import SPACE_FILE
from hydralv_tune.study.trial_views import TrialView, count_outcomes

MOST_THUMBNAILS = 400
"""More wrong instances than this are listed without a picture, or the page would not open."""

KINDS = ("missed", "split", "merged", "shrunken", "swollen", "invented")
KIND_COLOURS = {**COLOURS, "shrunken": "#E69F00", "swollen": "#0072B2", "loose": COLOURS["true"]}

COUNTS = {
    "matched_iou50": ("instances matched", "higher"),
    "instances_predicted": ("instances predicted", "zero"),
    **{name: (name, "lower") for name in ("missed", "split", "merged", "invented")},
}


def figure_names() -> list[tuple[str, str, str]]:
    """Return every figure with its label and direction: the metrics, then counts."""
    metrics = [(metric.name, metric.label, metric.direction) for metric in METRICS.values()]
    return [*metrics, *((name, *own) for name, own in COUNTS.items())]


@dataclass(frozen=True)
class Comparison:
    """One figure of the best trial beside the baseline's."""

    label: str
    baseline: float | None
    best: float | None
    change: float | None
    verdict: str


@dataclass(frozen=True)
class Card:
    """One instance that went wrong."""

    kind: str
    colour: str
    title: str
    size_voxels: int
    worth: float
    worth_foreground: float
    iou: float
    details: str
    place: str
    picture: bytes | None

    @property
    def source(self) -> str | None:
        """Return the picture as a data URL."""
        if self.picture is None:
            return None
        return "data:image/webp;base64," + base64.b64encode(self.picture).decode()


@dataclass(frozen=True)
class Axis:
    """One axis of the sweep: the winner's value, its plateau, and what was tried.

    `edge` is `low` or `high` where the winner stands at that end of what was tried, and more lies
    beyond, up to `bounds`; `values` are the values tried.
    """

    name: str
    label: str
    winner: str
    plateau: str
    tried: str
    edge: str
    values: Sequence[Any]
    bounds: tuple[float, float]


@dataclass(frozen=True)
class ReportData:
    """Everything that a report says."""

    study: str
    storage: str
    written: str
    metric: str
    guard_f1: float
    counts: Mapping[str, int]
    trials: Sequence[TrialView]
    best: BestTrial
    metrics: Mapping[str, Any]
    intervals: Mapping[str, tuple[float, float]]
    searched: Sequence[tuple[str, str, str]]
    importances: Mapping[str, float]
    comparison: Sequence[Comparison]
    baseline: TrialView | None
    differences: Sequence[tuple[str, str, str]]
    changes: Sequence[Change]
    ranks: Ranks | None
    stopped: Stopped | None
    targets: Sequence[PlanTarget]
    limits: Sequence[Limit]
    axes: Sequence[Axis]
    points: Sequence[tuple[str, str, Mapping[str, Any]]]
    cards: Mapping[str, list[Card]]
    sizes_found: Sequence[int]
    sizes_lost: Sequence[int]
    pictures: Mapping[str, bytes]
    space_file: Path
    ensemble: Mapping[str, Any] | None = None
    going_on: Mapping[str, Any] | None = None
    confirmed: Mapping[str, Any] | None = None
    confirmations: Sequence[Mapping[str, Any]] = ()
    trained_on: Mapping[str, Any] | None = None
    notes: Sequence[str] = field(default_factory=list)

    @property
    def record(self) -> TrialRecord:
        """Return the record of the best trial."""
        return self.best.record

    @property
    def candidates(self) -> list[TrialView]:
        """Return the trials of the search, without those that were trained again."""
        return [trial for trial in self.trials if not trial.is_repeat]

    @property
    def wrong(self) -> int:
        """Return how many instances are shown as wrong."""
        return sum(len(cards) for cards in self.cards.values())


def report_data(best: BestTrial, out: Path) -> ReportData:
    """Return what the report says about a study.

    What cannot be read any more (a volume that moved) is left out, and the notes say so.

    Args:
        best: The best trial of the open study.
        out: The folder of the report.
    """
    study, record = best.study, best.record
    trials = study.trials()
    searched = [trial for trial in trials if not trial.is_repeat]
    notes = list(record.notes)
    judgement: Judgement | None = None
    try:
        judgement = judge_all(scored_volumes(best))
    except (InputError, ValueError) as error:
        notes.append(f"The instances are not shown one by one: {error}")
    trained_on: Mapping[str, Any] | None = None
    try:
        trained_on = figures_where_trained(best)
    except (InputError, OSError, ValueError) as error:
        notes.append(f"The figures on what was trained on are not shown: {error}")
    ensemble: Mapping[str, Any] | None = None
    try:
        ensemble = kept_facts(study.out)
        if ensemble is not None and (told := outdated(study, ensemble)) is not None:
            ensemble = {**ensemble, "sentence": f"{ensemble['sentence']} {told}"}
    except InputError as error:
        notes.append(f"The ensemble is not shown: {error}")
    objective = study.space.objective
    baseline = _baseline(best, searched)
    compared = None if baseline is None or baseline.number == best.view.number else baseline
    return ReportData(
        study=study.name,
        storage=study.storage,
        space_file=out / SPACE_FILE,
        written=datetime.now().strftime("%Y-%m-%d %H:%M"),
        metric=objective.metric,
        guard_f1=objective.guard.f1_iou50,
        counts=count_outcomes(trials),
        trials=trials,
        best=best,
        metrics=record.metrics,
        intervals={} if judgement is None else bootstrap(judgement.table),
        searched=_searched(best),
        importances=study.importances(),
        comparison=[] if compared is None else compare(_metrics_of(best, compared), record.metrics),
        baseline=baseline,
        differences=_differences(compared, best.view),
        changes=changes(compared, best.view, searched),
        ranks=early_ranks(searched),
        stopped=stopped(searched),
        targets=plan_targets(record.metrics, record.losses),
        limits=[] if judgement is None else _limits(judgement, objective.metric),
        axes=_axes(record.sweep or {}, best),
        points=_points(record.sweep or {}),
        cards={} if judgement is None else _cards(judgement),
        sizes_found=_sizes(judgement, found=True),
        sizes_lost=_sizes(judgement, found=False),
        pictures=_pictures(best, compared),
        ensemble=ensemble,
        going_on=outlook(study.space, trials),
        confirmed=confirmed(study.space, trials),
        confirmations=confirmations(trials),
        trained_on=trained_on,
        notes=notes,
    )


def _pictures(best: BestTrial, compared: TrialView | None) -> dict[str, bytes]:
    """Return the pictures that the trials left, by the names they have in the report."""
    folder = None if compared is None else best.study.folder_of(compared)
    places = {
        "contact_sheet.png": best.folder / "contact_sheet.png",
        "sweep.png": best.folder / "sweep.png",
        **({} if folder is None else {"baseline.png": folder / "contact_sheet.png"}),
    }
    return {name: path.read_bytes() for name, path in places.items() if path.is_file()}


def _baseline(best: BestTrial, trials: Sequence[TrialView]) -> TrialView | None:
    """Return the trial that the best one is compared with.

    It is the warm start called `baseline`, else that of the space's base, else the first warm
    start, else the first finished trial.
    """
    done = [t for t in trials if t.state in ("COMPLETE", "PRUNED") and not t.is_imported]
    wanted = ["baseline", best.study.space.base, *best.study.space.warm_starts]
    by_recipe = {t.user_attrs.get("warm_start"): t for t in reversed(done)}
    chosen = next((by_recipe[name] for name in wanted if name in by_recipe), None)
    return chosen or (done[0] if done else None)


def _metrics_of(best: BestTrial, trial: TrialView) -> Mapping[str, Any]:
    """Return the figures of a trial, from its record where that can be read."""
    folder = best.study.folder_of(trial)
    if folder is not None:
        with suppress(HydraLVError, OSError):
            return read_record(folder / "record.json").metrics
    return trial.user_attrs.get("metrics") or {}


def _differences(compared: TrialView | None, best: TrialView) -> list[tuple[str, str, str]]:
    """Return key, baseline's value and best trial's value of what was searched and differs."""
    if compared is None:
        return []
    rows = []
    for name, key in (("recipe", "warm_start"), ("parameters", "parameters")):
        before, after = compared.user_attrs.get(key), best.user_attrs.get(key)
        if before != after:
            rows.append((name, _shown(before), _shown(after)))
    for key in sorted({*compared.params, *best.params}):
        pair = compared.params.get(key), best.params.get(key)
        if pair[0] != pair[1]:
            rows.append((key, _shown(pair[0]), _shown(pair[1])))
    return rows


def compare(baseline: Mapping[str, Any], best: Mapping[str, Any]) -> list[Comparison]:
    """Return every figure of both, its change, and whether that is for the better."""
    rows = []
    for key, label, direction in figure_names():
        before, after = number_of(baseline.get(key)), number_of(best.get(key))
        if before is None and after is None:
            continue
        change = None if before is None or after is None else after - before
        verdict = ""
        if change is not None and direction != "zero" and abs(change) > 1e-9:
            verdict = "better" if (change > 0) == (direction == "higher") else "worse"
        rows.append(Comparison(label, before, after, change, verdict))
    return rows


def _searched(best: BestTrial) -> list[tuple[str, str, str]]:
    """Return key, what was searched, and the best trial's value."""
    space = best.study.space
    return [
        (key, _range(parameter), _best_value(best.view.params, key))
        for key, parameter in space.parameters.items()
    ]


def _best_value(params: Mapping[str, Any], key: str) -> str:
    """Return the best trial's value of a parameter; a dash where it had none."""
    if key not in params:
        return "–"
    return "null" if params[key] is None else _shown(params[key])


def _range(parameter: Parameter) -> str:
    """Return what a parameter may be, in words."""
    if parameter.choice is not None:
        text = ", ".join("null" if c is None else _shown(c) for c in parameter.choices)
    else:
        low, high = parameter.float_ or parameter.int_ or (0, 0)
        text = f"{low:g} to {high:g}" + (", log" if parameter.log else "")
        text += f", step {parameter.step}" if parameter.step else ""
    if parameter.when:
        conditions = (
            f"{key.split('.')[-1]} is {' or '.join(map(_shown, values))}"
            for key, values in parameter.when.items()
        )
        text += f" (where {' and '.join(conditions)})"
    return text


def _shown(value: Any) -> str:
    """Return a value as people read it."""
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _limits(judgement: Judgement, metric: str) -> list[Limit]:
    """Return what costs score."""
    return limits(judgement.table, judgement.joined, metric=metric, recipes=known_names("trials"))


def _points(sweep: Mapping[str, Any]) -> list[tuple[str, str, Mapping[str, Any]]]:
    """Return the three combinations to look at, with what each is."""
    named = (
        ("winner", "smallest error among those near the best F1"),
        ("best_by_f1", "highest F1"),
        ("best_unguarded", "smallest error, whatever its F1"),
    )
    return [(name.replace("_", " "), why, sweep[name]) for name, why in named if name in sweep]


def _axes(sweep: Mapping[str, Any], best: BestTrial) -> list[Axis]:
    """Return each axis of the sweep with the winner's plateau on it."""
    plateau = sweep.get("plateau") or {}
    grid = best.candidate.test.decoding_grid or best.study.space.decoding
    arguments = best.step.decoder_arguments()
    rows = []
    for name, flat in plateau.items():
        key, _, part = name.partition(".")
        value = arguments.get(key)
        if part and isinstance(value, list | tuple):
            value = value[part == "foreground"]
        tried = list(grid.axes.get(name, ()))
        bounds = _bounds(best.step.name, key)
        rows.append(
            Axis(name, _axis(name), _limit(value), _listed(flat), _listed(tried),
                 _edge(value, tried, bounds), tried, bounds)
        )  # fmt: skip
    return rows


def _bounds(decoder: str, key: str) -> tuple[float, float]:
    """Return the values outside which an argument lets everything pass, or nothing."""
    argument = arguments_of(decoder).get(key)
    if argument is None:
        return 0.0, np.inf
    low = 0.0 if argument.low is None else argument.low
    # A contour threshold may be above 1, which switches the test off.
    high = 1.0 if argument.may_be_off else argument.high
    return low, np.inf if high is None else high


def _edge(value: Any, tried: Sequence[Any], bounds: tuple[float, float]) -> str:
    """Return at which end of what was tried a value stands, if there is more beyond it."""
    known = [float(v) for v in tried if v is not None and np.isfinite(v)]
    if value is None or not np.isfinite(value) or len(known) < 2:
        return ""
    low, high = bounds
    if value <= min(known) and value > low:
        return "low"
    return "high" if value >= max(known) and value < high else ""


def _axis(name: str) -> str:
    """Return the name of an axis in words."""
    key, _, part = name.partition(".")
    return f"{key.replace('_threshold', '').replace('_', ' ')}{', ' + part if part else ''}"


def _limit(value: Any) -> str:
    """Return a threshold as people read it; None is off."""
    return "off" if value is None or value == float("inf") else f"{value:g}"


def _listed(values: Sequence[Any]) -> str:
    """Return values in a row, the middle ones left out where they are many."""
    texts = [_limit(value) for value in values]
    if len(texts) > 8:
        texts = [*texts[:4], "…", *texts[-2:]]
    return ", ".join(texts) or "–"


def _sizes(judgement: Judgement | None, *, found: bool) -> list[int]:
    """Return the sizes of the truths that are matched, or not."""
    if judgement is None:
        return []
    return [v.size_voxels for v in judgement.joined if v.truth_id is not None and v.fits == found]


def _cards(judgement: Judgement) -> dict[str, list[Card]]:
    """Return the wrong instances by kind, the most costly first."""
    cards: dict[str, list[Card]] = {kind: [] for kind in KINDS}
    drawn = 0
    for instance, joined in zip(judgement.instances, judgement.joined, strict=True):
        kind = kind_of(joined, judgement.table)
        if kind is None:
            continue
        picture = None
        if drawn < MOST_THUMBNAILS:
            picture = _picture(judgement, instance.part, instance.error, kind)
            drawn += 1
        scored = judgement.parts[instance.part]
        where = f" of {scored.volume.name}" if len(judgement.parts) > 1 else ""
        place = instance_place(scored, instance.error)
        cards[kind].append(_card(instance.error, kind, where, place, picture, scored.volume))
    return {kind: own for kind, own in cards.items() if own}


def instance_place(scored: ScoredVolume, error: InstanceError) -> str:
    """Return where an instance lies in its volume: z, y, x of the middle of its box."""
    truths, segments = scored.boxes
    invented = error.truth_id is None
    box = segments[error.segment_ids[0]] if invented else truths[error.truth_id or 0]
    middle = {axis: (s.start + s.stop - 1) // 2 for axis, s in zip("zyx", box, strict=True)}
    # A slab, also one of a slab, counts from its own first voxel; people look in the whole volume.
    name = scored.volume.name
    slabs = name[len(re.sub(r"(\[[zyx] \d+:\d+\])+$", "", name)) :]
    for slab in re.finditer(r"\[([zyx]) (\d+):\d+\]", slabs):
        middle[slab[1]] += int(slab[2])
    return ", ".join(f"{axis} {at}" for axis, at in middle.items())


def _card(
    error: InstanceError,
    kind: str,
    where: str,
    place: str,
    picture: bytes | None,
    volume: Volume,
) -> Card:
    """Return the card of an instance."""
    segments = error.segment_ids
    if error.truth_id is None:
        title = f"Segment {segments[0]}{where}"
        details = "no instance of the truth makes up a tenth of it"
    else:
        title = f"Instance {volume.id_in_file(error.truth_id)}{where}"
        shown = ", ".join(map(str, segments[:6])) + (" …" if len(segments) > 6 else "")
        plural = "s" if len(segments) > 1 else ""
        details = f"segment{plural} {shown}" if segments else "no segment touches it"
    return Card(
        kind=kind,
        colour=KIND_COLOURS[kind],
        title=title,
        size_voxels=error.size_voxels,
        worth=error.worth,
        worth_foreground=error.worth_foreground,
        iou=error.iou,
        details=details,
        place=place,
        picture=picture,
    )


def _picture(judgement: Judgement, part: int, error: InstanceError, kind: str) -> bytes:
    """Return the thumbnail of an instance."""
    scored = judgement.parts[part]
    truths, segments = scored.boxes
    invented = error.truth_id is None
    box = segments[error.segment_ids[0]] if invented else truths[error.truth_id or 0]
    return thumbnail(
        image=scored.volume.image,
        truth=scored.truth,
        prediction=scored.inside_prediction,
        truth_ids=[] if invented else [error.truth_id or 0],
        segment_ids=error.segment_ids,
        colour=KIND_COLOURS[kind],
        voxel_size_nm=scored.volume.voxel_size_nm,
        box=box,
    )
