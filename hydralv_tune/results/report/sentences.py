"""The sentences and the commands of a report, for both of its forms."""

from __future__ import annotations

import math
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

from hydralv_tune.artifacts.pictures import COLOURS
from hydralv_tune.numerics.formatting import (
    counted,
    duration,
    figure,
    millions,
    number_of,
    objective_label,
    voxel_size,
)
from hydralv_tune.numerics.metrics.registry import SUMMARY
from hydralv_tune.results.report.data import KIND_COLOURS, Axis, ReportData, figure_names
from hydralv_tune.results.report.limits import STILL_LEARNING
from hydralv_tune.study.trial_views import REPEAT_OF, TrialView, state_word

BAD_ERROR = 0.2
"""Adapted Rand error under which losses above the plan's no longer matter most."""

KIND_WORDS = {
    "missed": "missed",
    "split": "split into pieces",
    "merged": "merged with a neighbour",
    "shrunken": "found only in part",
    "swollen": "swollen beyond their outline",
    "invented": "invented (false positive)",
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
            f"Warning: no trial meets the guard of F1 ≥ {data.guard_f1:g}; this one comes nearest."
        )
    return " ".join(parts)


def tiles(data: ReportData) -> list[tuple[str, str, str]]:
    """Return the figures at the top: name, value, small print."""
    metrics, count = data.metrics, data.counts
    seconds = sum(trial.seconds for trial in data.trials)
    return [
        ("adapted Rand error", figure(metrics.get("adapted_rand_error")),
         interval(data, "adapted_rand_error")),
        ("foreground form of it", figure(metrics.get("adapted_rand_error_foreground")),
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
        return f"{learning}No single kind of fault costs error now."
    return (
        f"{learning}Most of the remaining error comes from {counted(first.count, 'instance')} "
        f"{KIND_WORDS[first.kind]}. Each bar shows by how much the error would fall if all "
        "instances of that kind fitted exactly and nothing else changed."
    )


def still_learning(data: ReportData) -> str:
    """Return what to do first while the losses are far from what the plan wants."""
    loss = number_of(data.record.losses.get("plan_total"))
    error = number_of(data.metrics.get("adapted_rand_error"))
    if loss is None or error is None or loss < STILL_LEARNING or error < BAD_ERROR:
        return ""
    return (
        f"The network has not learned the volume yet: its total loss is {loss:.2f}; the target is "
        "below 0.2. Check with the recipe overfit_check that it can, then train longer "
        "(plan_quick_win). "
    )


def history_lead(data: ReportData) -> str:
    """Return how the search went, in a sentence."""
    count = data.counts
    parts = [f"{count['complete']} complete, {count['pruned']} pruned early"]
    if count["fail"]:
        parts.append(f"{count['fail']} failed")
    if count["interrupted"]:
        parts.append(f"{count['interrupted']} interrupted and continued")
    if count["running"] or count["waiting"]:
        parts.append(f"{count['running']} running and {count['waiting']} waiting")
    going_on = "" if data.going_on is None else f" {data.going_on['sentence']}"
    return (
        f"{', '.join(parts)}. A trial with F1 below {data.guard_f1:g} violates the guard and ranks "
        f"behind every trial that does not.{going_on}"
    )


def plateau_lead(data: ReportData) -> str:
    """Return how flat the score is around the best thresholds, in a sentence."""
    sweep: Mapping[str, Any] = data.record.sweep or {}
    if not sweep:
        return "The sweep of the best trial is not recorded."
    seconds = float(sweep.get("seconds") or 0.0)
    text = (
        f"{int(sweep['combinations']):,} combinations were scored exactly in {seconds:.1f} s. "
        f"{int(sweep.get('plateau_width') or 1):,} of them are as good as the best one. A "
        "threshold in the middle of a flat region carries over to new data better than one at "
        "its edge."
    )
    return text + (f" {sweep['thinned']}." if sweep.get("thinned") else "")


def instances_lead(data: ReportData) -> str:
    """Return what the pictures show."""
    if not data.sizes_found and not data.sizes_lost:
        return "The volumes cannot be read from here, so the instances are not shown."
    if not data.cards:
        return "Every instance matches at IoU 0.5, and nothing is split, merged or invented."
    return (
        f"{counted(data.wrong, 'instance')} with a fault, the most costly first. Truth is drawn in "
        "colour, the prediction dashed in white (in colour where there is no truth). The gain is "
        "what the error would fall by if this instance alone were correct. Click a picture to "
        "enlarge it."
    )


def size_lines(data: ReportData) -> list[str]:
    """Return what became of small, medium and large instances; none of records without them."""
    nm = data.best.voxel_size_nm
    lines = []
    for name, own in (data.metrics.get("by_size") or {}).items():
        count, low, high = own["instances_true"], own["smallest_voxels"], own["largest_voxels"]
        if not count:
            continue
        ends = f"{low:,} to {high:,} voxels"
        if nm is not None:
            ends += f", {low * math.prod(nm):.3g} to {high * math.prod(nm):.3g} nm³"
        lines.append(
            f"{name.capitalize()} ({ends}): {own['matched_iou50']} of {count} match at IoU 0.5, "
            f"{own['missed']} missed, {own['split']} split."
        )
    return lines


def all_figures(data: ReportData) -> list[tuple[str, float | None]]:
    """Return every figure of the best trial with its name."""
    return [(label, number_of(data.metrics.get(key))) for key, label, _ in figure_names()]


def best_so_far(data: ReportData) -> list[tuple[str, int, str]]:
    """Return when the best value fell, which trial brought it, and the value."""
    rows: list[tuple[str, int, str]] = []
    best = math.inf
    complete = [t for t in data.candidates if t.state == "COMPLETE" and t.finished]
    done = [trial for trial in complete if trial.is_feasible]
    for trial in sorted(done, key=lambda t: (t.finished or datetime.max, t.number)):
        if trial.value is not None and trial.value < best:
            best = trial.value
            rows.append((f"{trial.finished:%Y-%m-%d %H:%M}", trial.number, figure(best)))
    return rows


def all_trials(data: ReportData) -> list[TrialRow]:
    """Return the rows of the list of all trials."""
    return [_row(trial) for trial in data.trials]


def _row(trial: TrialView) -> TrialRow:
    """Return the row of a trial."""
    metrics = trial.user_attrs.get("metrics") or {}
    state = state_word(trial.state, trial.user_attrs.get("reason"))
    if trial.state == "COMPLETE" and not trial.is_feasible:
        state = "complete, violates the guard"
    of = f"trial {trial.user_attrs[REPEAT_OF]} with another seed" if trial.is_repeat else None
    notes = [trial.user_attrs.get("warm_start"), of, trial.user_attrs.get("reason")]
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


def study_words(data: ReportData) -> list[str]:
    """Return how a command names the study; the storage's password is never in it."""
    folder = data.best.study.out
    if folder is not None and (folder / "study.db").is_file():
        return [str(folder)]
    return ["--storage", data.storage, "--study", data.study]


def command(*words: Any) -> str:
    """Return a command as a shell takes it."""
    return shlex.join(["hydralv-tune", *map(str, words)])


def commands(data: ReportData) -> str:
    """Return the commands that use the study."""
    named = study_words(data)
    shown = named if named[0] != "--storage" else named[:2]
    best = named if named[0] != "--storage" else [data.storage, "--study", data.study]
    return "\n".join(
        (
            command("segment", *best, "--image", "IMAGE", "--out", "seg.h5", "--table", "seg.csv"),
            command("export", *named, "--out", "best.yaml"),
            command("dashboard", *shown),
            command("status", *named),
        )
    )


def volume_words(data: ReportData) -> list[str]:
    """Return the options that name every volume of the study."""
    return [
        word
        for volume in data.best.volumes
        for option in ("image", "label", "mask")
        if (path := getattr(volume, option))
        for word in (f"--{option}", path)
    ]


def _run_again(data: ReportData, *words: Any) -> str:
    """Return the command that continues the study."""
    study = data.best.study
    out = ["--out", str(study.out)] if study.out is not None else []
    storage = [] if study_words(data)[0] != "--storage" else ["--storage", data.storage]
    return command(
        "run", data.space_file, *volume_words(data), "--study", data.study, *storage, *out, *words
    )


@dataclass(frozen=True)
class NextStep:
    """One thing to do next: what, why, what to copy, and the command after it, if that is none."""

    title: str
    why: str
    text: str
    then: str = ""


def next_steps(data: ReportData) -> list[NextStep]:
    """Return what to do next, the most useful first; empty where nothing is left to gain here."""
    steps = [*_first_steps(data), *_edge_steps(data)]
    for limit in [entry for entry in data.limits if entry.worth >= WORTH_A_STEP][:2]:
        steps.append(
            NextStep(
                f"Try the recipe {limit.recipe} against what is {KIND_WORDS[limit.kind]}",
                f"{counted(limit.count, 'instance')}; without that fault the error would be "
                f"{limit.error:.3f}. {limit.text}",
                command(
                    "train", limit.recipe, *volume_words(data), "--out", f"runs/{limit.recipe}"
                ),
            )
        )
    steps += _budget_steps(data)
    if data.record.split.get("kind") in (None, "none"):
        steps.append(
            NextStep(
                "Score a volume that it was not trained on",
                "The best trial was trained and scored on the same voxels, so its figures are "
                "optimistic. Hold a part out, or use another labelled volume.",
                command("run", data.space_file, *volume_words(data),
                        "--set", "data.split.kind=holdout", "--study", f"{data.study}_holdout"),
            )
        )  # fmt: skip
    return steps


WORTH_A_STEP = 0.005
"""Error under which correcting a kind of fault is not worth a training."""


def _first_steps(data: ReportData) -> list[NextStep]:
    """Return what comes before anything else: no trial meets the guard, or nothing is learned."""
    if data.best.view.is_feasible and not still_learning(data):
        return []
    why = still_learning(data) or "No trial meets the guard, so there is nothing to tune yet."
    words = ("train", "overfit_check", *volume_words(data), "--out", "runs/overfit_check")
    return [NextStep("Check that the network can learn the volume", why.strip(), command(*words))]


def _edge_steps(data: ReportData) -> list[NextStep]:
    """Return the axes and parameters whose best value stands at the end of what was tried."""
    steps = []
    edges = [axis for axis in data.axes if axis.edge]
    if edges:
        found = "; ".join(
            f"{axis.label}: {axis.winner} is the "
            f"{'smallest' if axis.edge == 'low' else 'largest'} tried"
            for axis in edges
        )
        own = data.best.candidate.test.decoding_grid
        is_own = own is not None and own != data.best.study.space.decoding
        where = ", where the candidate's own grid is set" if is_own else ""
        block = "decoding_grid" if is_own else "decoding"
        steps.append(
            NextStep(
                f"Widen {counted(len(edges), 'threshold')}",
                f"Their best values are at the end of the grid ({found}). Put this into "
                f"{data.space_file}{where}, then run it.",
                "\n".join([f"{block}:", "  grid:", *_widened_grid(data.axes, edges)]),
                _run_again(data, "--extend"),
            )
        )
    for key, parameter in data.best.study.space.parameters.items():
        ends, value = parameter.float_ or parameter.int_, data.best.view.params.get(key)
        if ends is None or not isinstance(value, int | float):
            continue
        place = _place_in(value, ends, log=parameter.log)
        if 0.03 < place < 0.97 or ends[0] == ends[1]:
            continue
        factor = 3.0 if parameter.log else 0.0
        width = float(ends[1]) - float(ends[0])
        low, high = float(ends[0]), float(ends[1])
        if place <= 0.03:
            low = low / factor if factor else max(low - width / 2, 0.0)
        else:
            high = high * factor if factor else high + width / 2
        if (low, high) == (float(ends[0]), float(ends[1])):
            continue  # a dropout of 0 has nothing below it
        kind = "float" if parameter.float_ is not None else "int"
        log = ", log: true" if parameter.log else ""
        steps.append(
            NextStep(
                f"Widen the range of {key}",
                f"The best value, {value:.3g}, is at the end of {ends[0]:g} to {ends[1]:g}. Put "
                f"this into {data.space_file}, then run it.",
                f"parameters:\n  {key}: {{{kind}: [{low:g}, {high:g}]{log}}}",
                _run_again(data, "--extend"),
            )
        )
    return steps


def _widened_grid(axes: Sequence[Axis], ends: Sequence[Axis]) -> list[str]:
    """Return the lines of a grid for the thresholds of `ends`, with both parts of a pair."""
    lines = []
    for key in dict.fromkeys(axis.name.partition(".")[0] for axis in ends):
        parts = {
            axis.name.partition(".")[2]: ", ".join(map(str, _widened(axis)))
            for axis in axes
            if axis.name.partition(".")[0] == key and len(axis.values)
        }
        both = ", ".join(f"{part}: [{values}]" for part, values in parts.items())
        lines.append(f"    {key}: " + (f"[{parts['']}]" if "" in parts else f"{{{both}}}"))
    return lines


def _widened(axis: Axis) -> list[Any]:
    """Return the values of an axis; with one more, half way to its bound, where the best ends it.

    An axis without an upper bound, a size, goes to twice its largest value.
    """
    known = sorted({float(v) for v in axis.values if v is not None})
    whole = all(v.is_integer() for v in known) and not math.isfinite(axis.bounds[1])
    low, high = axis.bounds
    if axis.edge == "low":
        known.insert(0, (known[0] + low) / 2)
    elif axis.edge == "high":
        known.append((known[-1] + high) / 2 if math.isfinite(high) else 2 * known[-1])
    shown: list[Any] = [int(v) if whole else round(v, 4) for v in known]
    return [*shown, *("null" for v in axis.values if v is None)]


def _place_in(value: float, ends: Sequence[float], *, log: bool) -> float:
    """Return where a value lies between two ends, 0 to 1, on the scale that is searched."""
    low, high = float(ends[0]), float(ends[1])
    if log:
        low, high, value = math.log(low), math.log(high), math.log(value)
    return 0.5 if high == low else (value - low) / (high - low)


def _budget_steps(data: ReportData) -> list[NextStep]:
    """Return whether more trials, or shorter ones, are worth their time."""
    steps = []
    ended = [t for t in data.candidates if t.state in ("COMPLETE", "PRUNED")]
    finished = [trial for trial in ended if not trial.is_imported]
    later = sum(t.number > data.best.view.number for t in finished)
    is_worth_it = data.going_on is None or data.going_on["is_worth_it"]
    if len(finished) >= 4 and later < len(finished) / 3 and is_worth_it:
        more = len(finished) + max(len(finished) // 2, 4)
        steps.append(
            NextStep(
                "Run more trials",
                f"The best trial is among the last third of {len(finished)}; the search was still "
                "improving.",
                _run_again(data, "--trials", more),
            )
        )
    ranks = data.ranks
    if ranks is not None and ranks.trials >= FEWEST_FOR_RANKS and ranks.half_would_do:
        epochs = max(data.best.candidate.optimization.max_epochs // 2, 1)
        steps.append(
            NextStep(
                "Search with half the training",
                f"{ranks_sentence(data)} A new study can try twice as many candidates in the time.",
                command("run", data.space_file, *volume_words(data), "--study",
                        f"{data.study}_short", "--set", f"optimization.max_epochs={epochs}",
                        "--learn-from", study_words(data)[0] if len(study_words(data)) == 1
                        else data.storage),
            )
        )  # fmt: skip
    return steps


FEWEST_FOR_RANKS = 10
"""Trials whose ranks half way say whether half of the training would do."""


def ranks_sentence(data: ReportData) -> str:
    """Return whether early evaluations rank trials as the last one does."""
    ranks = data.ranks
    if ranks is None:
        return ""
    if ranks.trials < FEWEST_FOR_RANKS:
        verdict = "too few trials to say whether half of the training would do"
    else:
        verdict = f"half of the training would {'do' if ranks.half_would_do else 'not do'}"
    return (
        f"Half way through training, the ranks of {ranks.trials} complete trials agreed with the "
        f"final ones by ρ = {ranks.half:.2f} (Spearman), and the best one stood at place "
        f"{ranks.rank}: {verdict}."
    )


def stopped_sentence(data: ReportData) -> str:
    """Return who was stopped early and where they stood."""
    gone = data.stopped
    if gone is None:
        return ""
    ahead = (
        "none of them stood" if gone.ahead == 0 else f"{counted(gone.ahead, 'trial')} of them stood"
    )
    return (
        f"{counted(gone.count, 'trial')} stopped early, at evaluation {gone.evaluation} (median); "
        f"{ahead} better than the median of the complete trials at that evaluation."
    )


def changes_lead(data: ReportData) -> str:
    """Return how the path from the baseline to the best trial was made."""
    if not data.changes:
        return (
            "There are too few complete trials to say what each change bought; it takes twelve, or "
            "one change only."
        )
    guessed = sum(change.trained is None for change in data.changes)
    note = (
        "Every step was trained."
        if not guessed
        else f"{counted(guessed, 'value')} estimated by a random forest over the complete trials."
    )
    return (
        f"One change at a time from the baseline to the best trial, the largest gain first. {note}"
    )


def result_files(data: ReportData) -> list[tuple[str, str]]:
    """Return what the best trial left behind: each file, and its address from the report."""
    folder = data.best.folder
    files = sorted(folder.glob("segmentation_*.h5"))
    files += [folder / name for name in ("sweep.parquet", "best.ckpt", "record.json")]
    home = data.space_file.absolute().parent
    return [
        (str(path), quote(Path(os.path.relpath(path.absolute(), home)).as_posix()))
        for path in files
        if path.is_file()
    ]


def provenance_rows(data: ReportData) -> list[tuple[str, str]]:
    """Return what made the best trial: volumes, versions, machine."""
    record = data.record
    rows = []
    for entry in record.volumes:
        shape = " × ".join(str(side) for side in entry.get("shape") or ())
        size = entry.get("voxel_size_nm")
        nm = f"{voxel_size(size)} nm" if size else "voxel size unknown"
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
        ("training", f"{millions(training.get('parameters', 0))} parameters, "
                     f"{training.get('steps_done')} "
                     f"steps of {training.get('effective_batch')} patches, seed {record.seed}")
    )  # fmt: skip
    return rows


def ensemble_rows(data: ReportData) -> list[tuple[str, str, str]]:
    """Return name, figure of the best trial alone, and of the ensemble: both where not chosen."""
    facts = data.ensemble
    if facts is None:
        return []
    alone = facts["single"]
    return [
        (label, figure(alone[name]), figure(facts[name]))
        for name, label, _ in figure_names()
        if name in alone and name in facts
    ]


def repeated_rows(data: ReportData) -> list[tuple[str, str, str, str, str]]:
    """Return trial, value in the search, mean, spread and seeds of what was trained again."""
    return [
        (str(one["trial"]), figure(one["values"][0]), figure(one["mean"]), figure(one["spread"]),
         f"{one['seeds']} of {one['wanted']}")
        for one in data.confirmations
    ]  # fmt: skip


def held_out_lead(data: ReportData) -> str:
    """Return what the figures beside each other are of."""
    split = data.record.split
    if split.get("kind") in (None, "none"):
        return (
            "The best trial was trained and scored on the same voxels, so how it does elsewhere is "
            "not known: `data.split.kind: blocks` tells, with one volume too."
        )
    return f"The best trial was {split.get('sentence')}."


def held_out_rows(data: ReportData) -> list[tuple[str, str, str]]:
    """Return name, figure on what the best trial was trained on, and on what was held out."""
    held_out = {} if data.record.split.get("kind") in (None, "none") else data.metrics
    trained = data.trained_on or {}
    return [
        (label, figure(trained.get(name)), figure(held_out.get(name)))
        for name, label, _ in figure_names()
        if name in SUMMARY and (name in trained or name in held_out)
    ]
