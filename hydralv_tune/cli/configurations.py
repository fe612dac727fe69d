"""The commands that read configurations and name what there is: check, list."""

from __future__ import annotations

from enum import StrEnum
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any

import typer

from hydralv_tune.cli.options import Json, completed
from hydralv_tune.config.errors import InputError

RUNS = Path("runs")


def _candidates_and_spaces(incomplete: str) -> list[str]:
    """Return the completion of `check`: names and files of either kind."""
    found = [*completed("trials")(incomplete), *completed("search_spaces")(incomplete)]
    return list(dict.fromkeys(found))


def check(
    files: Annotated[
        list[str],
        typer.Argument(help="Candidates and search spaces.", autocompletion=_candidates_and_spaces),
    ],
    explain: Annotated[
        bool, typer.Option("--explain", help="Also say what each candidate amounts to.")
    ] = False,
    json: Json = False,
) -> None:
    """Read candidates and search spaces, and say the first fault of each.

    Example: `hydralv-tune check baseline hydra_lv`
    """
    from hydralv_tune.cli.console import print_json, say
    from hydralv_tune.config.search_space_files import check_file, explain_file

    rows: list[dict[str, Any]] = []
    for result in map(check_file, files):
        explanation = explain_file(result.path) if explain and result.ok else []
        row = {"path": result.path, "kind": result.kind, "ok": result.ok, "error": result.error}
        rows.append({**row, "explanation": explanation} if explain else row)
        if result.ok and not json:
            say(f"{result.path}: a valid {result.kind}.")
            for line in explanation:
                say(f"  {line}")
    if json:
        print_json({"files": rows})
    if faults := [str(row["error"]) for row in rows if not row["ok"]]:
        raise InputError("\n".join(faults))


class Kind(StrEnum):
    """What `list` can be asked for."""

    spaces = "spaces"
    candidates = "candidates"
    studies = "studies"
    formats = "formats"
    metrics = "metrics"
    decoders = "decoders"
    architectures = "architectures"
    losses = "losses"
    augmentations = "augmentations"
    samplers = "samplers"


def list_(
    kind: Annotated[Kind | None, typer.Argument(help="Of one kind only.")] = None,
    json: Json = False,
) -> None:
    """List what there is: search spaces, candidates, studies under runs/, and every table of names.

    Example: `hydralv-tune list decoders`
    """
    from hydralv_tune.cli.console import console, print_json
    from hydralv_tune.config.plugins import load_plugins

    load_plugins()
    kinds = list(Kind) if kind is None else [kind]
    items = [{"kind": str(one), **item} for one in kinds for item in _items(one)]
    if json:
        print_json({"items": items})
        return
    width = max((len(item["name"]) for item in items), default=0)
    stdout = console()
    for one in kinds:
        found = [item for item in items if item["kind"] == one]
        if kind is None:
            stdout.print(f"[{one}]" if found else f"[{one}] none", style="bold")
        for item in found:
            stdout.print(f"{item['name']:<{width}}  {item['about']}".rstrip(), soft_wrap=True)


def _items(kind: Kind) -> list[dict[str, str]]:
    """Return name and meaning of each thing of a kind."""
    if kind in (Kind.spaces, Kind.candidates):
        return _configurations("search_spaces" if kind is Kind.spaces else "trials")
    if kind is Kind.studies:
        return [
            {"name": str(path.parent), "about": f"sqlite:///{path}"}
            for path in sorted(RUNS.glob("*/study.db"))
        ]
    if kind is Kind.formats:
        from hydralv_tune.data.formats import FORMATS

        return [
            {
                "name": entry.name,
                "about": ", ".join(entry.suffixes) + ("" if entry.writable else " (read only)"),
            }
            for entry in FORMATS
        ]
    return [{"name": name, "about": about} for name, about in _table(kind).items()]


def _table(kind: Kind) -> dict[str, str]:
    """Return the names of a table, each with its arguments or choices."""
    if kind is Kind.metrics:
        from hydralv_tune.numerics.metrics.registry import METRICS

        best = {"zero": "near 0"}
        return {
            name: f"{metric.label}; {best.get(metric.direction, metric.direction)} is better"
            for name, metric in METRICS.items()
        }
    if kind is Kind.decoders:
        from hydralv_tune.numerics.watershed.decoders import DECODERS, decoder_arguments

        return {name: ", ".join(decoder_arguments(name)) for name in DECODERS}
    if kind is Kind.architectures:
        from hydralv_tune.numerics.networks.registry import ARCHITECTURES

        return {name: ", ".join(sorted(e.keys)) for name, e in ARCHITECTURES.items()}
    if kind is Kind.losses:
        from hydralv_tune.numerics.losses.registry import LOSSES, loss_arguments

        return {name: ", ".join(loss_arguments(name)) for name in LOSSES}
    if kind is Kind.augmentations:
        from hydralv_tune.numerics.augmentation.registry import AUGMENTATIONS

        return {name: ", ".join(entry.defaults) for name, entry in AUGMENTATIONS.items()}
    from hydralv_tune.config.search_methods import samplers

    return {name: entry.summary for name, entry in samplers().items()}


def _configurations(kind: str) -> list[dict[str, str]]:
    """Return the files of a kind, each with the first sentence of the comment it begins with."""
    from hydralv_tune.config.paths import find_file, known_names

    found = []
    for name in known_names(kind):
        lines = find_file(name, kind).read_text(encoding="utf-8").splitlines()
        comment = takewhile(lambda line: line.startswith("# "), lines)
        text = " ".join(line.removeprefix("# ") for line in comment)
        found.append({"name": name, "about": text.partition(". ")[0].rstrip(".")})
    return found
