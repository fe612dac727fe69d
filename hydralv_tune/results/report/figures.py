"""The figures of a report, drawn by Plotly so that they can be hovered and zoomed."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.io import to_html
from plotly.subplots import make_subplots

from hydralv_tune.artifacts.pictures import COLOURS
from hydralv_tune.config.search_space import SearchSpace
from hydralv_tune.numerics.formatting import objective_label, short_names
from hydralv_tune.results.report.findings import parameters_of
from hydralv_tune.study.trial_views import TrialView

INK, FAINT, GRID, ACCENT = "#1c2430", "#5f6b7a", "#e7eaef", "#0072B2"
STATES = {
    "COMPLETE": ("circle", ACCENT),
    "PRUNED": ("x-thin-open", "#7d8896"),
    "INFEASIBLE": ("circle-open", "#D55E00"),
}
GOOD_TO_BAD = [[0.0, "#3d7edb"], [0.5, "#2a9d8f"], [1.0, "#c77d1e"]]
"""Of middling lightness, so that lines stand out from a light page and a dark one."""

AXIS_PIXELS = 118
"""Width of one axis of the parallel coordinates; narrower, and its labels overlap."""


def as_html(figure: go.Figure, name: str) -> str:
    """Return a figure as a piece of HTML that needs Plotly's script somewhere before it."""
    text: str = to_html(
        figure,
        include_plotlyjs=False,
        full_html=False,
        div_id=f"figure-{name}",
        config={"displayModeBar": False, "responsive": True, "scrollZoom": False},
    )
    return text


def _styled(figure: go.Figure, *, height: int, x: str = "", y: str = "") -> go.Figure:
    """Return the figure with the fonts, margins and grid of the report."""
    figure.update_layout(
        height=height,
        margin={"l": 52, "r": 12, "t": 14, "b": 44},
        font={"family": "system-ui, -apple-system, Segoe UI, sans-serif", "size": 13, "color": INK},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0, "title": None},
        hoverlabel={"bgcolor": "white", "font": {"color": INK}},
        bargap=0.18,
    )
    shared = {"gridcolor": GRID, "zeroline": False, "automargin": True}
    figure.update_xaxes(title={"text": x, "font": {"size": 13}}, **shared)
    figure.update_yaxes(title={"text": y, "font": {"size": 13}}, **shared)
    return figure


def history(trials: Sequence[TrialView], metric: str) -> go.Figure:
    """Return each trial's value over time, and the best feasible one so far."""
    done = sorted(
        (t for t in trials if t.value is not None or t.intermediate),
        key=lambda t: (t.finished is None, t.finished or t.started, t.number),
    )
    done = [t for t in done if t.finished is not None and t.state in ("COMPLETE", "PRUNED")]
    figure = go.Figure()
    if not done:
        return _styled(figure, height=120)
    first = min(t.started or t.finished for t in done if t.finished)
    assert first is not None
    hours = {t.number: (t.finished - first).total_seconds() / 3600 for t in done if t.finished}
    unit, factor = ("hours", 1.0) if max(hours.values()) >= 2 else ("minutes", 60.0)
    for state, (symbol, colour) in STATES.items():
        own = [t for t in done if _state(t) == state]
        if own:
            figure.add_scatter(
                x=[hours[t.number] * factor for t in own],
                y=[_value(t) for t in own],
                mode="markers",
                name={"INFEASIBLE": "violates the guard"}.get(state, state.lower()),
                marker={"symbol": symbol, "color": colour, "size": 9, "line": {"width": 2}},
                hovertext=[_hover(t) for t in own],
                hoverinfo="text",
            )
    best_x: list[float] = []
    best_y: list[float] = []
    best = np.inf
    for trial in done:
        value = trial.value
        if _state(trial) == "COMPLETE" and value is not None and value < best:
            best = value
            best_x.append(hours[trial.number] * factor)
            best_y.append(value)
    if best_x:
        figure.add_scatter(
            x=[*best_x, max(hours.values()) * factor],
            y=[*best_y, best],
            mode="lines",
            line={"shape": "hv", "color": INK, "width": 2},
            name="best so far",
            hoverinfo="skip",
        )
    figure.update_xaxes(rangemode="tozero")
    figure.update_yaxes(rangemode="tozero")
    figure.update_layout(showlegend=True)
    return _styled(figure, height=340, x=f"{unit} since the start", y=objective_label(metric))


def _state(trial: TrialView) -> str:
    """Return the state, told apart by the study's guard."""
    return "INFEASIBLE" if trial.state == "COMPLETE" and not trial.is_feasible else trial.state


def _value(trial: TrialView) -> float | None:
    """Return the final value, or the best that a pruned trial had reached."""
    if trial.value is not None:
        return trial.value
    return min(trial.intermediate.values()) if trial.intermediate else None


def _hover(trial: TrialView) -> str:
    """Return what is said about a trial under the pointer."""
    lines = [f"<b>trial {trial.number}</b> {trial.state.lower()}"]
    value = _value(trial)
    if value is not None:
        lines.append(f"{value:.4f}")
    if trial.user_attrs.get("warm_start"):
        lines.append(f"recipe {trial.user_attrs['warm_start']}")
    lines += [f"{key} {_short(v)}" for key, v in list(trial.params.items())[:8]]
    return "<br>".join(lines)


def _short(value: Any) -> str:
    """Return a value in a few characters."""
    if isinstance(value, float):
        return f"{value:.3g}"
    text = str(value)
    return text if len(text) <= 28 else text[:27] + "…"


def parallel_coordinates(
    trials: Sequence[TrialView], space: SearchSpace | None, metric: str
) -> tuple[go.Figure, int] | None:
    """Return every finished trial as a line through its parameters, and the width it needs.

    None where fewer than two trials have a value.
    """
    done = [t for t in trials if t.state in ("COMPLETE", "PRUNED") and _value(t) is not None]
    names = [
        name
        for name in dict.fromkeys(name for t in done for name in t.params)
        if len({str(t.params.get(name)) for t in done}) > 1
    ]
    if len(done) < 2 or not names:
        return None
    values = [float(_value(t) or 0.0) for t in done]
    dimensions = [{"label": "value", "values": values}]
    labels = short_names(names)
    for name in names:
        column = [t.params.get(name) for t in done]
        log = bool(space and name in space.parameters and space.parameters[name].log)
        dimensions.append(_dimension(_label(labels[name]), column, log=log))
    # A failed trial's error of 1 would wash out the colours of those worth telling apart.
    low, high = min(values), float(np.quantile(values, 0.8))
    figure = go.Figure(
        go.Parcoords(
            line={
                "color": values, "colorscale": GOOD_TO_BAD,
                "cmin": low, "cmax": max(high, low + 1e-9),
            },
            dimensions=dimensions,
            labelfont={"size": 12, "color": INK},
            tickfont={"size": 11, "color": INK},
            rangefont={"size": 10, "color": FAINT},
        )
    )  # fmt: skip
    _styled(figure, height=380)
    figure.update_layout(margin={"l": 60, "r": 60, "t": 56, "b": 26})
    return figure, AXIS_PIXELS * len(dimensions)


def _dimension(label: str, column: Sequence[Any], *, log: bool) -> dict[str, Any]:
    """Return one axis; what a trial did not have lies at the bottom under a dash."""
    missing = any(value is None for value in column)
    # A conditional choice may be null in every trial: one tick, a dash, tells that too.
    numeric = any(value is not None for value in column) and all(
        value is None or (isinstance(value, int | float) and not isinstance(value, bool))
        for value in column
    )
    if numeric:
        known = [float(v) for v in column if v is not None]
        shown = np.log10(known) if log else np.asarray(known)
        low, high = float(shown.min()), float(shown.max())
        floor = low - 0.15 * max(high - low, 1e-9)
        scaled = [floor if v is None else float(np.log10(v) if log else v) for v in column]
        ticks = np.linspace(low, high, 4) if high > low else np.array([low])
        texts = [f"{10**t if log else t:.2g}" for t in ticks]
        if missing:
            ticks, texts = np.append(floor, ticks), ["–", *texts]
        return {"label": label, "values": scaled, "tickvals": list(ticks), "ticktext": texts}
    words = sorted({"–" if v is None else _word(v) for v in column})
    index = {word: i for i, word in enumerate(words)}
    return {
        "label": label,
        "values": [index["–" if v is None else _word(v)] for v in column],
        "tickvals": list(range(len(words))),
        "ticktext": words,
    }


def _label(name: str) -> str:
    """Return a name as a plot shows it."""
    return name.replace("_", " ").replace(".", " ")


def _word(value: Any) -> str:
    """Return a choice as a tick; a list in JSON loses its spaces."""
    text = str(value)
    if text.startswith("["):
        with contextlib.suppress(ValueError):
            text = "[" + ",".join(_short(v) for v in json.loads(text)) + "]"
    return text if len(text) <= 22 else text[:21] + "…"


def importances(shares: Mapping[str, float]) -> go.Figure:
    """Return how much of the spread of the objective each parameter explains."""
    rows = sorted(shares.items(), key=lambda row: row[1])[-14:]
    names = short_names(shares)
    figure = go.Figure(
        go.Bar(
            x=[share for _, share in rows],
            y=[_label(names[name]) for name, _ in rows],
            orientation="h",
            marker={"color": ACCENT},
            text=[f"{share:.0%}" for _, share in rows],
            textposition="outside",
            cliponaxis=False,
            hovertext=[name for name, _ in rows],
            hoverinfo="text",
        )
    )
    _styled(figure, height=70 + 26 * len(rows))
    figure.update_xaxes(visible=False, range=[0, 1.18 * max(share for _, share in rows)])
    return figure


def cost(trials: Sequence[TrialView], metric: str) -> go.Figure | None:
    """Return the objective against the time spent and the size of the network.

    None where fewer than two complete trials have a value.
    """
    done = [t for t in trials if t.state == "COMPLETE" and t.value is not None]
    if len(done) < 2:
        return None
    on_gpu = any(float(t.user_attrs.get("gpus") or 0) for t in done)
    hours = [
        t.seconds * (float(t.user_attrs.get("gpus") or 0) if on_gpu else 1) / 3600 for t in done
    ]
    scale, unit = (1.0, "hours") if max(hours) >= 1 else (60.0, "minutes")
    unit = f"GPU-{unit}" if on_gpu else f"{unit} of training"
    columns = [(unit, [value * scale for value in hours])]
    sizes = [parameters_of(trial) for trial in done]
    if len(set(sizes)) > 1 and None not in sizes:
        columns.append(("parameters, millions", [(size or 0) / 1e6 for size in sizes]))
    figure = make_subplots(rows=1, cols=len(columns), shared_yaxes=True, horizontal_spacing=0.06)
    for column, (_, values) in enumerate(columns, start=1):
        for state, (symbol, colour) in STATES.items():
            own = [i for i, trial in enumerate(done) if _state(trial) == state]
            if own:
                figure.add_scatter(
                    x=[values[i] for i in own],
                    y=[done[i].value for i in own],
                    mode="markers",
                    name={"INFEASIBLE": "violates the guard"}.get(state, state.lower()),
                    marker={"symbol": symbol, "color": colour, "size": 9, "line": {"width": 2}},
                    hovertext=[_hover(done[i]) for i in own],
                    hoverinfo="text",
                    showlegend=column == 1,
                    row=1,
                    col=column,
                )
    _styled(figure, height=320, y=objective_label(metric))
    for column, (title, _) in enumerate(columns, start=1):
        figure.update_xaxes(title={"text": title}, rangemode="tozero", row=1, col=column)
        if column > 1:
            figure.update_yaxes(title={"text": ""}, row=1, col=column)
    figure.update_layout(showlegend=True)
    return figure


def sizes(found: Sequence[int], lost: Sequence[int]) -> go.Figure:
    """Return a histogram over the sizes of the instances, matched and not, in log bins."""
    every = np.array([*found, *lost], float)
    low, high = float(every.min()), float(every.max())
    bins = int(np.clip(np.sqrt(len(every)) * 1.6, 4, 14))
    edges = np.geomspace(low, max(high, low * 1.01), bins + 1)
    labels = [f"{a:.0f}–{b:.0f}" for a, b in itertools.pairwise(edges)]
    figure = go.Figure()
    for name, values, colour in (
        ("matched at IoU 0.5", found, COLOURS["true"]),
        ("not matched", lost, COLOURS["missed"]),
    ):
        counts, _ = np.histogram(np.clip(values, low, high), edges)
        figure.add_bar(x=labels, y=counts, name=name, marker={"color": colour})
    figure.update_layout(barmode="stack")
    figure.update_yaxes(tickformat="d", dtick=1 if len(every) <= 24 else None)
    return _styled(figure, height=300, x="size in voxels", y="instances")


def curves(rows: Sequence[Mapping[str, Any]]) -> go.Figure:
    """Return the losses of the best trial over its epochs.

    Args:
        rows: `TrialRecord.history`.
    """
    figure = go.Figure()
    palette = [INK, "#0072B2", "#D55E00", "#009E73"]
    epochs = [row.get("epoch") for row in rows]
    for name, colour in zip(("total", "label", "boundary", "edt"), palette, strict=True):
        values = [(row.get("losses") or {}).get(name) for row in rows]
        if any(value is not None for value in values):
            figure.add_scatter(
                x=epochs, y=values, mode="lines+markers", name=name, line={"color": colour}
            )
    ticks = [base * 10**power for power in range(-4, 3) for base in (1, 2, 5)]
    figure.update_yaxes(type="log", tickvals=ticks, ticktext=[f"{tick:g}" for tick in ticks])
    return _styled(figure, height=300, x="epoch", y="loss")
