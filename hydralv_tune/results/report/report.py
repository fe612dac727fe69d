"""The report of a study: one page that needs nothing else, and the same as Markdown."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from hydralv_tune.artifacts.records import provenance
from hydralv_tune.artifacts.writing import write_atomically
from hydralv_tune.numerics.formatting import figure, number_of, signed
from hydralv_tune.results.best_trial import load_best_trial
from hydralv_tune.results.report import figures
from hydralv_tune.results.report.data import KIND_COLOURS, ReportData, figure_names, gather
from hydralv_tune.results.report.limits import Limit
from hydralv_tune.results.report.markdown import as_markdown
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

TEMPLATE = Path(__file__).with_name("template.html")

SECTIONS = (
    ("limits", "What limits it"),
    ("targets", "Targets"),
    ("history", "Search"),
    ("comparison", "Baseline"),
    ("thresholds", "Thresholds"),
    ("instances", "Instances"),
    ("again", "Use it"),
)


def write_report(storage: str, study: str, out: Path) -> Path:
    """Write `index.html`, `report.md` and its pictures into a folder; return the page's path.

    Args:
        storage: Of the study.
        study: Its name.
        out: The folder.

    Raises:
        StudyError: No such storage or study, or no trial is finished.
        InputError: The best trial's record is gone.
    """
    out = Path(out)
    with load_best_trial(storage, study) as best:
        data = gather(best)
        page = render(data)
        text, pictures = as_markdown(data)
    for name, content in pictures.items():
        write_atomically(out / name, content)
    write_atomically(out / "report.md", text.encode())
    return write_atomically(out / "index.html", page.encode())


def render(data: ReportData) -> str:
    """Return the page."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    figures, width = _figures(data)
    sections = [pair for pair in SECTIONS if pair[0] != "limits" or data.limits]
    return template.render(
        data=data,
        plotly=Markup(get_plotlyjs().replace("</script", "<\\/script")),
        figures={name: Markup(text) for name, text in figures.items()},
        parallel_width=width,
        sections=sections,
        colours=KIND_COLOURS,
        headline=headline(data),
        lead=lead(data),
        tiles=tiles(data),
        bar=verdict_bar(data),
        limits_lead=limits_lead(data),
        limit_width=lambda limit: _share(limit, data),
        history_lead=history_lead(data),
        plateau_lead=plateau_lead(data),
        instances_lead=instances_lead(data),
        rows=all_trials(data),
        plain_figures=[
            (label, number_of(data.metrics.get(key))) for key, label, _ in figure_names()
        ],
        sheet=_image(data.contact_sheet),
        commands=commands(data),
        provenance=provenance_rows(data),
        version=(provenance()["package"] or {}).get("version"),
        figure=figure,
        signed=signed,
    )


def _share(limit: Limit, data: ReportData) -> float:
    """Return a limit's worth in percent of the dearest one's."""
    most = max((entry.worth for entry in data.limits), default=0.0)
    return 100.0 * max(limit.worth, 0.0) / most if most > 0 else 0.0


def _image(content: bytes | None) -> str | None:
    """Return a PNG as a data URL."""
    if content is None:
        return None
    return "data:image/png;base64," + base64.b64encode(content).decode()


def _figures(data: ReportData) -> tuple[Mapping[str, str], int]:
    """Return the figures that there is something to draw of, and the parallel ones' width."""
    drawn: dict[str, Any] = {"history": figures.history(data.trials, data.metric)}
    width = 0
    parallel = figures.parallel_coordinates(data.trials, data.best.study.space, data.metric)
    if parallel is not None:
        drawn["parallel"], width = parallel
    if data.importances:
        drawn["importances"] = figures.importances(data.importances)
    if len(data.record.history) > 1:
        drawn["curves"] = figures.curves(data.record.history)
    if data.sizes_found or data.sizes_lost:
        drawn["sizes"] = figures.sizes(data.sizes_found, data.sizes_lost)
    plateau = figures.plateau_of(data.table, data.metric, data.best.step)
    if plateau is not None:
        drawn["plateau"] = plateau
    names = ("history", "parallel", "importances", "curves", "sizes", "plateau")
    texts = {name: figures.as_html(drawn[name], name) if name in drawn else "" for name in names}
    return texts, width
