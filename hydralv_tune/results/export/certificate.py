"""The certificate of an export: what it was chosen on, how good it is, and on which evidence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from hydralv_tune.artifacts.records import provenance, read_record, without_seed
from hydralv_tune.artifacts.writing import write_atomically
from hydralv_tune.config.errors import HydraLVError
from hydralv_tune.numerics.formatting import counted, figure
from hydralv_tune.numerics.metrics.instance_errors import bootstrap
from hydralv_tune.numerics.metrics.registry import HEADLINE, METRICS
from hydralv_tune.results.best_trial import BestTrial
from hydralv_tune.results.scored_volumes import judge_all, scored_volumes
from hydralv_tune.study.trial_views import count_outcomes, count_states

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


def _text(best: BestTrial, out: Path, ensemble: Mapping[str, Any] | None) -> str:
    """Return the certificate as Markdown."""
    record, study = best.record, best.study
    objective = study.space.objective
    intervals, why_not = _intervals(best) if ensemble is None else ({}, None)
    figures = record.metrics if ensemble is None else ensemble
    rows = [("figure", "value", "95 % interval over instances"), ("---", "---", "---")]
    for name in HEADLINE:
        span = intervals.get(name)
        shown = "–" if span is None else f"{span[0]:.4f} to {span[1]:.4f}"
        rows.append((METRICS[name].label, figure(figures.get(name)), shown))
    chosen_on = str(record.split.get("sentence") or record.split.get("kind"))
    feasible = "met" if best.view.is_feasible else "NOT met"
    facts: list[tuple[str, str]] = [
        ("Exported", out.name),
        ("Study", f"{study.name}, {_counts(best)}"),
        ("Split", chosen_on),
        ("Checkpoint", "the best of its training by the objective, on what was scored"),
        ("Thresholds", _thresholds(best, ensemble)),
        ("Ensemble", "none" if ensemble is None else str(ensemble["sentence"])),
        ("Objective", f"{METRICS[objective.metric].cost_label}, minimised"),
        ("Guard", f"F1 at IoU 0.5 of at least {objective.guard.f1_iou50:g}: {feasible}"),
        ("Seeds", _spread(best)),
        ("Interval", why_not or "instances drawn anew 2000 times; nothing about another volume"),
        *(
            (f"Volume {entry.get('name')}", f"fingerprint {entry.get('fingerprint')}, "
             f"shape {'×'.join(map(str, entry.get('shape') or ()))}")
            for entry in record.volumes
        ),
        ("Trained with", _versions(record.provenance)),
        ("Exported with", _versions(provenance())),
    ]  # fmt: skip
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    listed = "\n".join(f"- **{name}**: {' '.join(value.split())}" for name, value in facts)
    return (
        f"# Certificate of {out.name}\n\n{table}\n\n{listed}\n\n"
        f"For a paper:\n\n> {_sentence(best, figures, intervals, ensemble)}\n"
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
    """Return how many trials there were and which one this is."""
    counts = count_outcomes(best.study.trials())
    said = ", ".join(f"{number} {state}" for state, number in counts.items() if number)
    return f"trial {best.view.number} of {said}"


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


def _sentence(
    best: BestTrial, figures: Mapping[str, Any], intervals: Mapping[str, Sequence[float]],
    ensemble: Mapping[str, Any] | None,
) -> str:  # fmt: skip
    """Return what a paper may quote."""
    record = best.record
    version = ((record.provenance.get("package") or {}).get("version")) or "unknown"
    scores = []
    for name in HEADLINE:
        span = intervals.get(name)
        more = "" if span is None else f" (95 % interval {span[0]:.3f} to {span[1]:.3f})"
        value = figures.get(name)
        scores.append(f"{METRICS[name].label} {'–' if value is None else f'{value:.3f}'}{more}")
    if ensemble is None:
        what = f"a {best.candidate.model.architecture} (seed {record.seed})"
    else:
        what = f"the average of {counted(len(ensemble['members']), 'trained network')}"
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
    rank = "the best" if best.leads or ensemble is not None else "one"
    return (
        f"Instances were segmented with {what}, {rank} of {_finished(best)} configurations that "
        f"hydralv-tune {version} tried; {where} ({counted(int(instances or 0), 'instance')}; "
        f"{choice}) it reached {', '.join(scores)}."
    )


def _finished(best: BestTrial) -> int:
    """Return how many trials were finished."""
    counts = count_states(best.study.trials())
    return counts["complete"] + counts["pruned"]
