"""The report as Markdown, for a wiki or a pull request."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from hydralv_tune.numerics.formatting import figure, signed
from hydralv_tune.results.report.data import Card, ReportData, figure_names
from hydralv_tune.results.report.sentences import (
    all_trials,
    commands,
    headline,
    history_lead,
    instances_lead,
    lead,
    limits_lead,
    plateau_lead,
    provenance_rows,
    tiles,
    verdict_bar,
)


def as_markdown(data: ReportData) -> tuple[str, dict[str, bytes]]:
    """Return the text, and the pictures it names by their file names."""
    pictures: dict[str, bytes] = {}
    blocks = [f"# {headline(data)}", f"Study `{data.study}`, {data.written}.", lead(data)]
    blocks += [f"> {_line(note)}" for note in data.notes]
    blocks.append(_table(["figure", "value", ""], tiles(data)))
    if verdict_bar(data):
        blocks.append(", ".join(f"{count} {name}" for name, count, _ in verdict_bar(data)) + ".")
    blocks += [*_limits(data), *_targets(data), *_search(data), *_comparison(data)]
    blocks += [*_thresholds(data, pictures), *_instances(data, pictures)]
    blocks += ["## Use it, run it again", f"```sh\n{commands(data)}\n```"]
    blocks.append(_table(["what", "value"], provenance_rows(data)))
    return "\n\n".join(block for block in blocks if block) + "\n", pictures


def _line(text: Any) -> str:
    """Return text that stays in its table cell."""
    return " ".join(str(text).split()).replace("|", "\\|")


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a table; nothing where there is no row."""
    lines = ["| " + " | ".join(_line(cell) for cell in row) + " |" for row in rows]
    if not lines:
        return ""
    rule = "|" + "---|" * len(head)
    return "\n".join(["| " + " | ".join(head) + " |", rule, *lines])


def _limits(data: ReportData) -> list[str]:
    """Return what costs score."""
    if not data.limits:
        return []
    rows = [
        (limit.count, limit.kind, figure(max(limit.worth, 0.0)), figure(limit.error),
         figure(limit.error_foreground), limit.text, f"`trials/{limit.recipe}.yaml`")
        for limit in data.limits
    ]  # fmt: skip
    head = ["count", "what", "less error", "error then", "foreground then", "why", "recipe"]
    return ["## What limits the score now", limits_lead(data), _table(head, rows)]


def _targets(data: ReportData) -> list[str]:
    """Return the plan's targets."""
    rows = [
        (t.label, f"{t.rule} {t.limit:g}", figure(t.now), "–" if t.met else figure(t.distance),
         "met" if t.met else "not met" if t.now is not None else "not measured")
        for t in data.targets
    ]  # fmt: skip
    return [
        "## How far the plan's targets are",
        _table(["target", "wanted", "now", "missing", ""], rows),
    ]


def _search(data: ReportData) -> list[str]:
    """Return what was searched and every trial."""
    blocks = ["## The search", history_lead(data)]
    best: list[tuple[Any, ...]] = []
    for trial in sorted(data.trials, key=lambda t: (t.finished is None, t.finished or t.started)):
        value = trial.value
        better = value is not None and trial.is_feasible and trial.state == "COMPLETE"
        if better and (not best or value < best[-1][3]):
            best.append((trial.finished, trial.number, figure(value), value))
    if best:
        rows = [(f"{when:%Y-%m-%d %H:%M}", number, text) for when, number, text, _ in best]
        blocks += ["### Best so far", _table(["finished", "trial", "value"], rows)]
    if data.importances:
        shares = [(f"`{key}`", f"{share:.0%}") for key, share in data.importances.items()]
        blocks += ["### What mattered", _table(["parameter", "share"], shares)]
    searched = [(f"`{key}`", what, value) for key, what, value in data.searched]
    blocks += ["### What was searched", _table(["key", "searched", "best trial"], searched)]
    rows_ = [(r.number, r.state, figure(r.value), figure(r.f1), r.time, r.note)
             for r in all_trials(data)]  # fmt: skip
    head = ["trial", "state", "value", "F1", "time", "recipe or reason"]
    return [*blocks, "### All trials", _table(head, rows_)]


def _comparison(data: ReportData) -> list[str]:
    """Return the best trial beside the baseline."""
    title = "## The best trial beside the baseline"
    if not data.comparison:
        figures = [(label, figure(data.metrics.get(key))) for key, label, _ in figure_names()]
        reason = "There is nothing to compare the best trial with. Its figures:"
        return [title, reason, _table(["figure", "value"], figures)]
    rows = [(c.label, figure(c.baseline), figure(c.best), signed(c.change), c.verdict)
            for c in data.comparison]  # fmt: skip
    return [
        title,
        f"Trial {data.best.view.number} against trial {data.baseline_number}.",
        _table(["figure", "baseline", "best", "change", ""], rows),
    ]


def _thresholds(data: ReportData, pictures: dict[str, bytes]) -> list[str]:
    """Return the plateau."""
    axes = [(a.label, a.winner, a.plateau, a.tried) for a in data.axes]
    points = [
        (f"**{name}**: {why}", figure(point.get("adapted_rand_error")),
         figure(point.get("adapted_rand_error_foreground")), figure(point.get("f1_iou50")))
        for name, why, point in data.points
    ]  # fmt: skip
    heatmap = data.best.folder / "sweep.png"
    shown = []
    if heatmap.is_file():
        pictures["sweep.png"] = heatmap.read_bytes()
        shown.append("![error over the two most important thresholds](sweep.png)")
    return [
        "## The threshold plateau",
        plateau_lead(data),
        *shown,
        _table(["threshold", "winner", "as good", "tried"], axes),
        _table(["combination", "error", "foreground", "F1"], points),
    ]


def _instances(data: ReportData, pictures: dict[str, bytes]) -> list[str]:
    """Return every wrong instance with its picture."""
    blocks = ["## Where the wrong ones lie", instances_lead(data)]
    if data.contact_sheet is not None:
        pictures["contact_sheet.png"] = data.contact_sheet
        blocks.append("![sections with contours of truth and prediction](contact_sheet.png)")
    for kind, cards in data.cards.items():
        rows = []
        for number, card in enumerate(cards):
            rows.append((*_described(card), _picture(card, kind, number, pictures)))
        head = ["instance", "voxels", "best IoU", "worth", "foreground", "segments", "xy, xz, yz"]
        blocks += [f"### {len(cards)} {kind}", _table(head, rows)]
    return blocks


def _described(card: Card) -> tuple[str, str, str, str, str, str]:
    """Return what is said about an instance."""
    return (card.title, f"{card.size_voxels:,}", f"{card.iou:.2f}", f"{card.worth:.4f}",
            f"{card.worth_foreground:.4f}", card.details)  # fmt: skip


def _picture(card: Card, kind: str, number: int, pictures: dict[str, bytes]) -> str:
    """Return the reference to a card's picture, and take the picture in."""
    if card.picture is None:
        return ""
    name = f"instances/{kind}_{number:03d}.webp"
    pictures[name] = card.picture
    return f"![{card.title}]({name})"
