"""The report of a study: one page that needs nothing else, and the same as Markdown."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from hydralv_tune.artifacts.records import provenance
from hydralv_tune.artifacts.writing import write_atomically
from hydralv_tune.config.yaml_io import dump_yaml
from hydralv_tune.numerics.formatting import figure, signed
from hydralv_tune.results.best_trial import load_best_trial
from hydralv_tune.results.report import sentences
from hydralv_tune.results.report.data import KIND_COLOURS, ReportData, report_data
from hydralv_tune.study.study_folder import check_apart_from_study

TEMPLATES = Path(__file__).parent
SECTIONS = (
    ("next", "Do next"),
    ("limits", "What limits it"),
    ("held-out", "Held out"),
    ("targets", "Targets"),
    ("history", "Search"),
    ("ensemble", "Ensemble"),
    ("comparison", "Baseline"),
    ("thresholds", "Thresholds"),
    ("instances", "Instances"),
    ("again", "Use it"),
)


def write_report(storage: str, study: str, out: Path, *, folder: Path | None = None) -> Path:
    """Write `index.html`, `report.md` and its pictures into a folder; return the page's path.

    `space.yaml` beside them is what the study searches, `--set` included: what the report proposes
    to change is changed there.

    Args:
        storage: URL of the database.
        study: Name of the study.
        out: The folder of the report.
        folder: Where the trials of the study are now; where the database says so by default.

    Raises:
        StudyError: No such storage or study, or no trial is finished.
        InputError: The best trial's record is gone, or the folder lies among a study's trials.
    """
    out = Path(out)
    with load_best_trial(storage, study, folder) as best:
        check_apart_from_study("report --out", [out / "index.html"], best.study.out)
        data = report_data(best, out)
        space = best.study.space.as_mapping()
        page, text = render(data), render_markdown(data)
    for name, content in {**data.pictures, **card_pictures(data)}.items():
        write_atomically(out / name, content)
    write_atomically(data.space_file, dump_yaml(space).encode())
    write_atomically(out / "report.md", text.encode())
    return write_atomically(out / "index.html", page.encode())


def card_pictures(data: ReportData) -> dict[str, bytes]:
    """Return the pictures of the wrong instances, by the names they have in the Markdown."""
    return {
        picture_name(kind, number): card.picture
        for kind, cards in data.cards.items()
        for number, card in enumerate(cards)
        if card.picture is not None
    }


def picture_name(kind: str, number: int) -> str:
    """Return the file name of the picture of an instance."""
    return f"instances/{kind}_{number:03d}.webp"


def render(data: ReportData) -> str:
    """Return the page."""
    from plotly.offline import get_plotlyjs

    figures, width = _figures(data)
    absent = {
        *(() if data.limits else ("limits",)),
        *(() if data.ensemble else ("ensemble",)),
    }
    most = max((limit.worth for limit in data.limits), default=0.0)
    return _template("page.html.j2", autoescape=True).render(
        **_facts(data),
        plotly=Markup(get_plotlyjs().replace("</script", "<\\/script")),
        figures={name: Markup(text) for name, text in figures.items()},
        parallel_width=width,
        sections=[pair for pair in SECTIONS if pair[0] not in absent],
        colours=KIND_COLOURS,
        limit_width=lambda limit: 100.0 * max(limit.worth, 0.0) / most if most > 0 else 0.0,
        images={name: _data_url(content) for name, content in data.pictures.items()},
    )


def render_markdown(data: ReportData) -> str:
    """Return the Markdown."""
    text = _template("report.md.j2", autoescape=False).render(
        **_facts(data), picture_name=picture_name
    )
    lines = [line.rstrip() for line in text.splitlines()]
    kept = [line for line, before in zip(lines, ["", *lines[:-1]], strict=True) if line or before]
    return "\n".join(kept).strip() + "\n"


def _facts(data: ReportData) -> dict[str, Any]:
    """Return what both templates fill in."""
    return {
        "data": data,
        "say": sentences,
        "figure": figure,
        "signed": signed,
        "best_so_far": sentences.best_so_far(data),
        "plain_figures": sentences.all_figures(data),
        "version": (provenance()["package"] or {}).get("version"),
    }


def _template(name: str, *, autoescape: bool) -> jinja2.Template:
    """Return one of the two templates."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=autoescape,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["cell"] = lambda text: " ".join(str(text).split()).replace("|", "\\|")
    return environment.get_template(name)


def _data_url(content: bytes) -> str:
    """Return a PNG as a data URL."""
    return "data:image/png;base64," + base64.b64encode(content).decode()


def _figures(data: ReportData) -> tuple[Mapping[str, str], int]:
    """Return the figures that there is something to draw of, and the parallel ones' width."""
    from hydralv_tune.results.report import figures

    drawn: dict[str, Any] = {"history": figures.history(data.candidates, data.metric)}
    width = 0
    parallel = figures.parallel_coordinates(data.candidates, data.best.study.space, data.metric)
    if parallel is not None:
        drawn["parallel"], width = parallel
    if data.importances:
        drawn["importances"] = figures.importances(data.importances)
    if len(data.record.history) > 1:
        drawn["curves"] = figures.curves(data.record.history)
    if data.sizes_found or data.sizes_lost:
        drawn["sizes"] = figures.sizes(data.sizes_found, data.sizes_lost)
    if (cost := figures.cost(data.candidates, data.metric)) is not None:
        drawn["cost"] = cost
    names = ("history", "parallel", "importances", "curves", "sizes", "cost")
    texts = {name: figures.as_html(drawn[name], name) if name in drawn else "" for name in names}
    return texts, width
