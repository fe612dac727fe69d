"""The certificate of an export: what it was chosen on, how good it is, and on which evidence."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydralv_tune.artifacts.records import provenance, read_record, without_seed
from hydralv_tune.artifacts.writing import write_atomically
from hydralv_tune.config.errors import HydraLVError
from hydralv_tune.numerics.formatting import counted, figure
from hydralv_tune.numerics.metrics.instance_errors import bootstrap
from hydralv_tune.numerics.metrics.registry import HEADLINE, METRICS
from hydralv_tune.results.best_trial import BestTrial, record_of
from hydralv_tune.results.scored_volumes import judge_all, scored_volumes
from hydralv_tune.study.trial_views import count_outcomes, count_states
from hydralv_tune.trial.scoring.ensemble import RESAMPLES

PRINTED = ("hydralv-tune", "python", "torch", "monai", "scikit-image", "optuna", "ray")


def certificate_path(out: Path) -> Path:
    """Return where the certificate of an exported file lies."""
    return out.with_name(f"{out.stem}.certificate.md")


def write_certificate(
    best: BestTrial, out: Path, ensemble: Mapping[str, Any] | None = None
) -> Path:
    """Write the certificate of an export beside it, and return its path.

    Args:
        best: The exported trial, or the heaviest of an ensemble.
        out: The exported file.
        ensemble: The facts of the ensemble, where that is exported.
    """
    path = certificate_path(out)
    write_atomically(path, _text(best, out, ensemble).encode())
    return path


@dataclass(frozen=True)
class _Evidence:
    """What differs between the certificate of a trial and that of an ensemble.

    Args:
        figures: Every figure under the name of its metric.
        beside: What stands beside each of them, and over that column first.
        intervals: Of the figures, by their names.
        interval: What they are intervals of.
        is_feasible: Whether the figures meet the guard.
        made_of: The trials.
        seeds: Of their trainings.
        versions: That they were trained with.
    """

    figures: Mapping[str, Any]
    beside: tuple[str, Mapping[str, str]]
    intervals: Mapping[str, tuple[float, float]]
    interval: str
    is_feasible: bool
    made_of: str
    seeds: str
    versions: str


def _of_trial(best: BestTrial) -> _Evidence:
    """Return the evidence of a single trial."""
    intervals, why_not = _intervals(best)
    spans = {name: f"{low:.4f} to {high:.4f}" for name, (low, high) in intervals.items()}
    return _Evidence(
        figures=best.record.metrics,
        beside=("95 % interval over instances", spans),
        intervals=intervals,
        interval=why_not or "instances drawn anew 2000 times; nothing about another volume",
        is_feasible=best.view.is_feasible,
        made_of=f"trial {best.view.number}",
        seeds=_spread(best),
        versions=_versions(best.record.provenance),
    )


def _of_ensemble(best: BestTrial, ensemble: Mapping[str, Any]) -> _Evidence:
    """Return the evidence of an ensemble, whose figures have no interval but the gain has."""
    alone, f1 = ensemble["single"], ensemble.get("f1_iou50")
    views = {view.number: view for view in best.study.trials()}
    seeds, versions = {}, {}
    for trial in (int(one["trial"]) for one in ensemble["members"]):
        seeds[trial] = versions[trial] = "not known"
        with suppress(HydraLVError, OSError, KeyError):
            record = record_of(best.study, views[trial])[1]
            seeds[trial], versions[trial] = str(record.seed), _versions(record.provenance)
    return _Evidence(
        figures=ensemble,
        beside=("best trial alone", {name: figure(alone.get(name)) for name in HEADLINE}),
        intervals={},
        interval="none of the figures; that of the change by averaging, under Ensemble, comes from "
        f"{ensemble['cells']} parts of space drawn anew {RESAMPLES} times",
        is_feasible=f1 is not None and f1 >= best.study.space.objective.guard.f1_iou50,
        made_of=f"trials {', '.join(map(str, seeds))}",
        seeds=_by_trial(seeds),
        versions=_by_trial(versions),
    )


def _by_trial(values: Mapping[int, str]) -> str:
    """Return what trials say, once where they say the same."""
    if len(set(values.values())) == 1:
        return f"{next(iter(values.values()))} (each trial)"
    return "; ".join(f"{value} (trial {trial})" for trial, value in values.items())


def _text(best: BestTrial, out: Path, ensemble: Mapping[str, Any] | None) -> str:
    """Return the certificate as Markdown."""
    record, study = best.record, best.study
    objective = study.space.objective
    evidence = _of_trial(best) if ensemble is None else _of_ensemble(best, ensemble)
    heading, beside = evidence.beside
    rows = [("figure", "value", heading), ("---", "---", "---")]
    for name in HEADLINE:
        value = figure(evidence.figures.get(name))
        rows.append((METRICS[name].label, value, beside.get(name, "–")))
    chosen_on = str(record.split.get("sentence") or record.split.get("kind"))
    feasible = "met" if evidence.is_feasible else "NOT met"
    facts: list[tuple[str, str]] = [
        ("Exported", out.name),
        ("Study", f"{study.name} ({_counts(best)}), {evidence.made_of}"),
        ("Split", chosen_on),
        ("Checkpoint", "the best of its training by the objective, on what was scored"),
        ("Thresholds", _thresholds(best, ensemble)),
        ("Ensemble", "none" if ensemble is None else str(ensemble["sentence"])),
        ("Objective", f"{METRICS[objective.metric].cost_label}, minimised"),
        ("Guard", f"F1 at IoU 0.5 of at least {objective.guard.f1_iou50:g}: {feasible}"),
        ("Seeds", evidence.seeds),
        ("Interval", evidence.interval),
        *(
            (f"Volume {entry.get('name')}", f"fingerprint {entry.get('fingerprint')}, "
             f"shape {'×'.join(map(str, entry.get('shape') or ()))}")
            for entry in record.volumes
        ),
        ("Trained with", evidence.versions),
        ("Exported with", _versions(provenance())),
    ]  # fmt: skip
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    listed = "\n".join(f"- **{name}**: {' '.join(value.split())}" for name, value in facts)
    return (
        f"# Certificate of {out.name}\n\n{table}\n\n{listed}\n\n"
        f"For a paper:\n\n> {_sentence(best, evidence, ensemble)}\n"
    )


def _intervals(best: BestTrial) -> tuple[Mapping[str, tuple[float, float]], str | None]:
    """Return intervals over instances, or why there are none."""
    if best.record.folds:
        return {}, "none: with several folds the figures are means over them"
    try:
        return bootstrap(judge_all(scored_volumes(best)).table), None
    except (HydraLVError, OSError, ValueError) as error:
        return {}, f"not measured, since {error}"


def _counts(best: BestTrial) -> str:
    """Return how many trials there were."""
    counts = count_outcomes(best.study.trials())
    return ", ".join(f"{number} {state}" for state, number in counts.items() if number)


def _thresholds(best: BestTrial, ensemble: Mapping[str, Any] | None) -> str:
    """Return what the thresholds were chosen on."""
    sweep = best.record.sweep or {}
    where = "on what was scored"
    if ensemble is not None:
        return f"of the average, {where}; the figures above come from thresholds chosen elsewhere"
    return f"the winner of {sweep.get('combinations', 0):,} combinations, {where}"


def _spread(best: BestTrial) -> str:
    """Return mean and spread of the objective over trials that differ in their seed alone."""
    values = {best.record.seed: best.view.value}
    for view in best.study.trials():
        if view.state != "COMPLETE" or view.number == best.view.number:
            continue
        folder = best.study.folder_of(view)
        with suppress(HydraLVError, OSError):
            if folder is None:
                continue
            record = read_record(folder / "record.json")
            if without_seed(record.config) == without_seed(best.record.config):
                values.setdefault(record.seed, record.value)
    found = [float(value) for value in values.values() if value is not None]
    if len(found) < 2:
        return f"one (seed {best.record.seed}), so the spread is not known"
    mean = sum(found) / len(found)
    return (
        f"{len(found)}: mean {mean:.4f}, from {min(found):.4f} to {max(found):.4f}; the exported "
        f"one is seed {best.record.seed}"
    )


def _versions(source: Mapping[str, Any]) -> str:
    """Return the versions of what made something."""
    versions = source.get("versions") or {}
    commit = (source.get("package") or {}).get("git_commit")
    parts = [f"{name} {versions[name]}" for name in PRINTED if name in versions]
    return ", ".join([*parts, *([f"commit {commit[:12]}"] if commit else [])])


def _sentence(best: BestTrial, evidence: _Evidence, ensemble: Mapping[str, Any] | None) -> str:
    """Return what a paper may quote."""
    record = best.record
    version = ((record.provenance.get("package") or {}).get("version")) or "unknown"
    scores = []
    for name in HEADLINE:
        span = evidence.intervals.get(name)
        more = "" if span is None else f" (95 % interval {span[0]:.3f} to {span[1]:.3f})"
        value = evidence.figures.get(name)
        scores.append(f"{METRICS[name].label} {'–' if value is None else f'{value:.3f}'}{more}")
    if ensemble is None:
        what = f"a {best.candidate.model.architecture} (seed {record.seed})"
    else:
        networks = sum(one["networks"] for one in ensemble["members"])
        what = f"the average of {counted(networks, 'trained network')}"
    where = {
        None: "on the volume that it was trained on",
        "none": "on the volume that it was trained on",
    }.get(record.split.get("kind"), "on data that it was not trained on")
    choice = (
        "thresholds and checkpoint were chosen on the same data"
        if ensemble is None
        else "members and thresholds were chosen on other instances than those scored, checkpoints "
        "on the same"
    )
    instances = record.metrics.get("instances_true")
    rank = "the best" if best.leads else "one"
    if ensemble is not None:
        rank = f"from {len(ensemble['members'])}"
    return (
        f"Instances were segmented with {what}, {rank} of {_finished(best)} configurations that "
        f"hydralv-tune {version} tried; {where} ({counted(int(instances or 0), 'instance')}; "
        f"{choice}) it reached {', '.join(scores)}."
    )


def _finished(best: BestTrial) -> int:
    """Return how many trials were finished."""
    counts = count_states(best.study.trials())
    return counts["complete"] + counts["pruned"]
