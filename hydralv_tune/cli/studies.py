"""The commands of studies: run, status, export, report, dashboard, demo, doctor."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hydralv_tune.cli.console import format_value, print_facts, print_json, say
from hydralv_tune.cli.options import (
    IgnoreLabels,
    Images,
    Json,
    Labels,
    Masks,
    OptionalStorage,
    ScoredMasks,
    Settings,
    SpaceName,
    Storage,
    check_folder,
    path_option,
    text_option,
    volumes_given,
)
from hydralv_tune.config.errors import InputError

if TYPE_CHECKING:
    from hydralv_tune.data.volumes import VolumePaths

StudyName = Annotated[str, typer.Option("--study", help="Name of the study.")]
OptionalStudy = Annotated[
    str | None, typer.Option("--study", help="Name of the study. Default: the space's name.")
]
Trials = Annotated[
    int | None,
    typer.Option(min=1, help="Finished trials in all (COMPLETE or PRUNED). Default: the space's."),
]
GpusPerTrial = Annotated[
    float | None,
    typer.Option(min=0.0, help="GPUs a trial takes; 0.5 lets two share one. Default: 1, or 0."),
]
CpusPerTrial = Annotated[
    int | None, typer.Option(min=1, help="CPU cores a trial takes. Default: all, divided fairly.")
]

DEMO_SHAPE = (24, 128, 128)
DEMO_INSTANCES = 14
DEMO_TRIALS = 8
LONGEST_STUDY_NAME = 200
"""Characters; with an ending, still the name of a file."""


def run(
    space: SpaceName,
    image: Images,
    label: Labels = None,
    mask: Masks = None,
    scored_mask: ScoredMasks = None,
    ignore_label: IgnoreLabels = None,
    study: OptionalStudy = None,
    storage: OptionalStorage = None,
    trials: Trials = None,
    timeout_s: Annotated[
        float | None, typer.Option(min=1.0, help="Stop asking for trials after so many seconds.")
    ] = None,
    out: Annotated[
        Path | None, path_option(help="Folder of the study. Default: runs/STUDY")
    ] = None,
    gpus_per_trial: GpusPerTrial = None,
    cpus_per_trial: CpusPerTrial = None,
    ray_address: Annotated[
        str | None, typer.Option(help="Join this Ray cluster; without it, one starts here.")
    ] = None,
    checkpoints: Annotated[
        str | None,
        text_option(help="Folder or URL (file, s3, gs …) that machines without --out share."),
    ] = None,
    extend: Annotated[
        bool, typer.Option("--extend", help="Accept that the space has changed since.")
    ] = False,
    warm_start_from: Annotated[
        str | None, typer.Option(help="Add the fitting trials of this study of the same storage.")
    ] = None,
    settings: Settings = None,
    json: Json = False,
) -> None:
    """Start a study, or continue the one of that name until its trials are finished.

    Example: `hydralv-tune run smoke --image runs/phantom/im.h5 --label runs/phantom/label.h5
    --mask runs/phantom/mask.h5 --trials 2 --out runs/smoke`
    """

    if not label:
        raise InputError("run: --label is missing; a study needs instance labels to score against.")
    facts = _run(
        space,
        volumes_given(image, label, mask or [], scored_mask or [], ignore_label or []),
        study=study,
        storage=storage,
        out=out,
        settings=settings or [],
        trials=trials,
        timeout_s=timeout_s,
        gpus_per_trial=gpus_per_trial,
        cpus_per_trial=cpus_per_trial,
        ray_address=ray_address,
        checkpoints=checkpoints,
        extend=extend,
        warm_start_from=warm_start_from,
    )
    _show_facts(facts, json)


def _run(
    space_name: str,
    volumes: list[VolumePaths],
    *,
    study: str | None,
    storage: str | None,
    out: Path | None,
    settings: list[str],
    **options: Any,
) -> dict[str, Any]:
    """Run a study under the live view and return its facts; the best config is exported too."""
    from hydralv_tune.cli.live_view import LiveView
    from hydralv_tune.config.files import parse_overrides
    from hydralv_tune.config.search_space_files import load_space, with_fixed
    from hydralv_tune.launch.run import run_study
    from hydralv_tune.results.publish import publish_study_end, publish_trial_end

    space = load_space(space_name)
    if settings:
        space = with_fixed(space, parse_overrides(settings))
    name = space.name if study is None else study
    _check_study_name(name, names_folder=out is None)
    folder = out or Path("runs") / name
    check_folder("--out", folder)
    url = storage or f"sqlite:///{folder / 'study.db'}"
    with LiveView(name, trials=options["trials"] or space.budget.trials) as view:
        facts = run_study(
            space,
            volumes,
            study=name,
            storage=url,
            out=folder,
            on_event=view.on_event,
            on_trial_end=publish_trial_end,
            **options,
        )
    publish_study_end(url, name)
    return facts


def _check_study_name(name: str, *, names_folder: bool) -> None:
    """Refuse a name that nobody could type again, or that would lead out of `runs/`.

    Args:
        name: Of the study.
        names_folder: Whether a folder is called after it, since `--out` is not given.

    Raises:
        InputError: It is blank, too long, holds control characters, or is no name of a folder.
    """
    if not name.strip() or not name.isprintable() or len(name) > LONGEST_STUDY_NAME:
        raise InputError(
            f"--study: {name[:40]!r} is no name; it must be printable, not blank, and at most "
            f"{LONGEST_STUDY_NAME} characters long. Choose another."
        )
    if names_folder and (name in (".", "..") or "/" in name or "\\" in name):
        raise InputError(
            f"--study: {name!r} is no name of a folder, and without --out the study is kept in "
            "runs/STUDY. Choose another name, or give --out."
        )


def _show_facts(facts: dict[str, Any], json: bool) -> None:
    """Print what a study has reached."""
    if json:
        print_json(facts)
        return
    best = facts["best"]
    rows = {key: value for key, value in facts.items() if key not in ("best", "trials")}
    print_facts(f"Study {facts['study']}", {**rows, "trials": facts["trials"]})
    if best is None:
        say("No trial has finished yet.")
        return
    print_facts(f"Best trial, number {best['number']}", best)


def status(
    storage: Storage,
    study: StudyName,
    watch: Annotated[
        bool, typer.Option("--watch", help="Print again every few seconds until interrupted.")
    ] = False,
    json: Json = False,
) -> None:
    """Say how a study stands; reads only.

    Example: `hydralv-tune status --storage sqlite:///runs/smoke/study.db --study smoke`
    """
    from hydralv_tune.study.study import facts_of

    while True:
        _show_facts(facts_of(storage, study), json)
        if not watch:
            return
        time.sleep(5.0)


def export(
    storage: Storage,
    study: StudyName,
    out: Annotated[Path, path_option(help="Where the best config goes.")],
    format: Annotated[
        str, typer.Option(help="hydralv, pytc (today's PyTorch Connectomics) or pytc-2026-01.")
    ] = "hydralv",
    table: Annotated[
        Path | None, path_option(help="Also write all trials to this CSV or Parquet file.")
    ] = None,
    json: Json = False,
) -> None:
    """Write the best config, its checkpoint beside it, and say how to use them.

    Example: `hydralv-tune export --storage sqlite:///runs/smoke/study.db --study smoke
    --out runs/best.yaml`
    """
    from hydralv_tune.results.export.export import export_best

    check_folder("--out", out.parent)
    if table is not None:
        check_folder("--table", table.parent)
    document = export_best(storage, study, out, format=format, table=table)
    if json:
        print_json(document)
        return
    print_facts("Exported", {k: v for k, v in document.items() if k != "commands"})
    for command in document["commands"]:
        print(command)


def report(
    storage: Storage,
    study: StudyName,
    out: Annotated[Path, path_option(help="Folder for index.html and report.md.")],
    json: Json = False,
) -> None:
    """Write a self-contained page about a study.

    Example: `hydralv-tune report --storage sqlite:///runs/smoke/study.db --study smoke
    --out runs/report`
    """
    from hydralv_tune.results.report.report import write_report

    check_folder("--out", out)
    page = write_report(storage, study, out)
    if json:
        print_json({"out": str(page)})
    else:
        say(f"Report: {page}")


def dashboard(
    storage: Storage,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port on 127.0.0.1.")] = 8080,
    writable: Annotated[
        bool, typer.Option("--writable", help="Let the page rename, note and delete studies.")
    ] = False,
) -> None:
    """Open the Optuna dashboard on 127.0.0.1, for reading only unless told.

    Example: `hydralv-tune dashboard --storage sqlite:///runs/smoke/study.db --port 8080`
    """
    from hydralv_tune.results.dashboard import serve

    serve(storage, port=port, writable=writable, ready=lambda url: say(f"Dashboard: {url}"))


def demo(
    out: Annotated[Path, path_option(help="Folder of the demo.")] = Path("runs/demo"),
    trials: Annotated[int, typer.Option(min=1, help="Finished trials.")] = DEMO_TRIALS,
    settings: Settings = None,
    json: Json = False,
) -> None:
    """Do the main job on a phantom: study, best config, report.

    Example: `hydralv-tune demo --out runs/demo --trials 8`
    """
    from hydralv_tune.data.volumes import volume_paths, write_array
    from hydralv_tune.numerics.metrics.scores import HEADLINE
    from hydralv_tune.numerics.phantom.volume import make_phantom
    from hydralv_tune.results.export.export import export_best
    from hydralv_tune.results.report.report import write_report

    check_folder("--out", out)
    folder = out / "phantom"
    files = {name: folder / f"{name}.h5" for name in ("im", "label", "mask")}
    if not all(path.exists() for path in files.values()):
        say(f"Phantom of {DEMO_SHAPE} voxels with {DEMO_INSTANCES} vesicles in {folder}")
        made = make_phantom(shape=DEMO_SHAPE, instances=DEMO_INSTANCES, seed=0)
        for name, array in (("im", made.image), ("label", made.label), ("mask", made.mask)):
            write_array(files[name], array, voxel_size_nm=made.voxel_size_nm)
    facts = _run(
        "smoke",
        volume_paths([str(files["im"])], [str(files["label"])], [str(files["mask"])]),
        study="demo",
        storage=None,
        out=out,
        settings=settings or [],
        trials=trials,
    )
    storage = f"sqlite:///{out / 'study.db'}"
    exported = export_best(storage, "demo", out / "best.yaml", format="hydralv", table=None)
    page = write_report(storage, "demo", out / "report")
    document = {**facts, "best_config": exported["out"], "report": str(page)}
    _show_facts(document, json)
    best = facts["best"]
    if best is not None and not json:
        told = ", ".join(f"{name} {format_value(best[name])}" for name in HEADLINE)
        print(f"Best: {told}")
        print(f"Config: {exported['out']}")
        print(f"Checkpoint: {exported['checkpoint']}")
        print(f"Report: {page}")


def doctor(
    storage: OptionalStorage = None,
    json: Json = False,
) -> None:
    """Say what this machine has, and what is missing.

    Example: `hydralv-tune doctor`
    """
    from hydralv_tune.cli.doctor import examine

    findings = examine(storage)
    if json:
        print_json(findings)
    else:
        print_facts("This machine", findings)
        for line in findings["missing"]:
            say(f"missing: {line}")
