"""The sentences of a report."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hydralv_tune.artifacts.pictures import COLOURS
from hydralv_tune.numerics.formatting import counted, duration, figure, number_of, objective_label
from hydralv_tune.results.report.data import KIND_COLOURS, ReportData
from hydralv_tune.results.report.limits import STILL_LEARNING
from hydralv_tune.study.trial_views import TrialView

BAD_ERROR = 0.2
"""Adapted Rand error under which losses above the plan's no longer matter most."""

KIND_WORDS = {
    "missed": "missed",
    "split": "split into pieces",
    "merged": "merged with a neighbour",
    "shrunken": "found only in part",
    "swollen": "swollen beyond their outline",
    "invented": "invented",
    "loose": "matched, but with a loose outline",
}


@dataclass(frozen=True)
class TrialRow:
    """One trial of the list."""

    number: int
    state: str
    value: float | None
    f1: float | None
    time: str
    note: str


def interval(data: ReportData, key: str) -> str:
    """Return the bootstrap interval of a figure."""
    if key not in data.intervals:
        return ""
    low, high = data.intervals[key]
    return f"{low:.3f} to {high:.3f} (95 %)"


def headline(data: ReportData) -> str:
    """Return what the study has reached, in one sentence."""
    metrics = data.metrics
    error = number_of(metrics.get("adapted_rand_error"))
    matched, true = metrics.get("matched_iou50"), metrics.get("instances_true")
    if matched is None or not true:
        return f"Trial {data.best.view.number} reaches an adapted Rand error of {figure(error)}"
    return (
        f"Trial {data.best.view.number} finds {matched} of {true} instances at an adapted Rand "
        f"error of {error:.3f}"
    )


def lead(data: ReportData) -> str:
    """Return what a reader must know beside the headline."""
    count = data.counts
    finished = count["complete"] + count["pruned"]
    parts = [f"Best of {finished} finished trials by {objective_label(data.metric)}."]
    sentence = str(data.record.split.get("sentence") or "")
    if sentence:
        parts.append(f"{sentence[0].upper()}{sentence[1:]}.")
    if not data.best.view.is_feasible:
        parts.append(
            f"Attention: no trial met the guard of F1 ≥ {data.guard_f1:g}; this one came nearest."
        )
    return " ".join(parts)


def tiles(data: ReportData) -> list[tuple[str, str, str]]:
    """Return the figures at the top: name, value, small print."""
    metrics, count = data.metrics, data.counts
    seconds = sum(trial.seconds for trial in data.trials)
    return [
        ("adapted Rand error", figure(metrics.get("adapted_rand_error")),
         interval(data, "adapted_rand_error")),
        ("its foreground form", figure(metrics.get("adapted_rand_error_foreground")),
         interval(data, "adapted_rand_error_foreground")),
        ("F1 at IoU 0.5", figure(metrics.get("f1_iou50")), interval(data, "f1_iou50")),
        ("trials", str(sum(count.values())),
         ", ".join(f"{number} {state}" for state, number in count.items() if number)),
        ("spent on trials", duration(seconds), str(data.record.device.get("name") or
                                                   data.record.device.get("type") or "")),
    ]  # fmt: skip


def verdict_bar(data: ReportData) -> list[tuple[str, int, str]]:
    """Return the parts of the bar: name, count, colour; empty where nothing is known."""
    matched = len(data.sizes_found)
    if not matched and not data.cards:
        return []
    rows = [("matched, nothing wrong", _clean(data), COLOURS["true"])]
    for kind, cards in data.cards.items():
        segments = len(data.metrics.get("merged") or ()) if kind == "merged" else 0
        name = f"merged (in {segments} segments)" if segments else kind
        rows.append((name, len(cards), KIND_COLOURS[kind]))
    return [row for row in rows if row[1] > 0]


def _clean(data: ReportData) -> int:
    """Return how many truths match and are neither split nor merged."""
    wrong_truths = sum(len(cards) for kind, cards in data.cards.items() if kind != "invented")
    return len(data.sizes_found) + len(data.sizes_lost) - wrong_truths


def limits_lead(data: ReportData) -> str:
    """Return what costs most, in a sentence."""
    if not data.limits:
        return ""
    first = data.limits[0]
    learning = still_learning(data)
    if first.worth <= 0:
        return f"{learning}Nothing that can be mended instance by instance costs error now."
    little = number_of(data.metrics.get("adapted_rand_error"))
    most = (
        "What little is lost, is lost" if little is not None and little < 0.02 else "Most is lost"
    )
    return (
        f"{learning}{most} by {counted(first.count, 'instance')} {KIND_WORDS[first.kind]}. "
        "Each bar says by how much the error would fall if all of that kind fitted exactly and "
        "nothing else changed."
    )


def still_learning(data: ReportData) -> str:
    """Return what to do first while the losses are far from what the plan wants."""
    loss = number_of(data.record.losses.get("plan_total"))
    error = number_of(data.metrics.get("adapted_rand_error"))
    if loss is None or error is None or loss < STILL_LEARNING or error < BAD_ERROR:
        return ""
    return (
        f"The network has not learned the volume yet: its total loss is {loss:.2f}, wanted under "
        "0.2. First see with trials/overfit_check.yaml whether it can at all, then train longer "
        "(trials/plan_quick_win.yaml). "
    )


def history_lead(data: ReportData) -> str:
    """Return how the search went, in a sentence."""
    count = data.counts
    parts = [f"{count['complete']} complete, {count['pruned']} pruned early"]
    if count["fail"]:
        parts.append(f"{count['fail']} failed")
    if count["running"] or count["waiting"]:
        parts.append(f"{count['running']} running and {count['waiting']} waiting")
    return (
        f"{', '.join(parts)}. A trial under F1 {data.guard_f1:g} violates the study's guard and "
        "counts behind every other."
    )


def plateau_lead(data: ReportData) -> str:
    """Return how flat it is around the winner, in a sentence."""
    sweep: Mapping[str, Any] = data.record.sweep or {}
    if not sweep:
        return "The sweep of the best trial is not recorded."
    seconds = float(sweep.get("seconds") or 0.0)
    text = (
        f"{int(sweep['combinations']):,} combinations were scored exactly in {seconds:.1f} s. "
        f"{int(sweep.get('plateau_width') or 1):,} of them are as good as the winner; a threshold "
        "in the middle of a flat region carries over to new data better than one at its edge. "
        "Gaps are combinations too far below the best F1."
    )
    return text + (f" {sweep['thinned']}." if sweep.get("thinned") else "")


def instances_lead(data: ReportData) -> str:
    """Return what the pictures show."""
    if not data.sizes_found and not data.sizes_lost:
        return "The volumes cannot be read from here, so the instances are not shown."
    if not data.cards:
        return "Every instance matches at IoU 0.5, and nothing is split, merged or invented."
    return (
        f"{counted(data.wrong, 'instance')} with something wrong, dearest first: planes xy, xz and "
        "yz, truth in colour, prediction dashed in white (in colour where there is no truth). "
        "Worth is how much error mending this one alone would take away."
    )


def all_trials(data: ReportData) -> list[TrialRow]:
    """Return the rows of the list of all trials."""
    return [_row(trial) for trial in data.trials]


def _row(trial: TrialView) -> TrialRow:
    """Return the row of a trial."""
    metrics = trial.user_attrs.get("metrics") or {}
    state = trial.state.lower()
    if trial.state == "COMPLETE" and not trial.is_feasible:
        state = "complete, under the guard"
    notes = [trial.user_attrs.get("warm_start"), trial.user_attrs.get("reason")]
    value = trial.value
    if value is None and trial.intermediate:
        value = min(trial.intermediate.values())
    return TrialRow(
        number=trial.number,
        state=state,
        value=value,
        f1=number_of(metrics.get("f1_iou50")),
        time=duration(trial.seconds) if trial.started else "–",
        note="; ".join(str(note) for note in notes if note),
    )


def commands(data: ReportData) -> str:
    """Return the commands that use the study; the storage's password is never in it."""
    options = ["--storage", data.storage, "--study", data.study]
    rows = [
        ["hydralv-tune", "export", *options, "--out", "best.yaml"],
        ["hydralv-tune", "dashboard", "--storage", data.storage],
        ["hydralv-tune", "status", *options],
    ]
    return "\n".join(shlex.join(row) for row in rows)


def provenance_rows(data: ReportData) -> list[tuple[str, str]]:
    """Return what made the best trial: volumes, versions, machine."""
    record = data.record
    rows = []
    for entry in record.volumes:
        shape = " × ".join(str(side) for side in entry.get("shape") or ())
        size = entry.get("voxel_size_nm")
        nm = " × ".join(f"{side:g}" for side in size) + " nm" if size else "voxel size unknown"
        rows.append(
            (f"volume {entry.get('name')}",
             f"{entry.get('image')}, {shape}, {nm}, fingerprint {entry.get('fingerprint')}")
        )  # fmt: skip
    package = record.provenance.get("package") or {}
    versions = record.provenance.get("versions") or {}
    commit = f", commit {str(package['git_commit'])[:12]}" if package.get("git_commit") else ""
    rows.append(("hydralv-tune", f"{package.get('version')}{commit}"))
    rows.append(("versions", ", ".join(f"{k} {v}" for k, v in versions.items())))
    host = record.provenance.get("host") or {}
    rows.append(("machine", f"{host.get('name')}, {host.get('processor')}, {host.get('system')}"))
    training = record.training
    rows.append(
        ("training", f"{training.get('parameters', 0):,} parameters, {training.get('steps_done')} "
                     f"steps of {training.get('effective_batch')} patches, seed {record.seed}")
    )  # fmt: skip
    return rows
