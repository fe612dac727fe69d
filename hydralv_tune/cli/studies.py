"""The commands of studies: run, status, export, report, dashboard, demo, doctor."""

from __future__ import annotations

import getpass
import shlex
import socket
import sys
import time
import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hydralv_tune.cli.console import console, format_value, print_facts, print_json, say
from hydralv_tune.cli.options import (
    IgnoreLabels,
    Images,
    Json,
    Labels,
    Masks,
    OptionalStorage,
    ScoredMasks,
    Settings,
    check_folder,
    completed,
    path_option,
    text_option,
    volumes_given,
)
from hydralv_tune.config.errors import InputError, unknown_name
from hydralv_tune.config.paths import expanded, expanded_path, expanded_url, find_file

if TYPE_CHECKING:
    from hydralv_tune.data.volumes import VolumePaths
    from hydralv_tune.study.find import StudyAddress
    from hydralv_tune.study.progress import StudyProgress
    from hydralv_tune.study.study import Study


def _expanded_place(text: str) -> str:
    """Return a folder or a storage URL with `~` and `$VARIABLES` expanded."""
    return expanded_url(text) if "://" in text else expanded(text)


Place = Annotated[
    str | None,
    typer.Argument(
        metavar="[FOLDER]",
        help="Folder of the study, or its storage URL. Default: newest in runs/.",
        parser=_expanded_place,
    ),
]
Storage = Annotated[
    str | None,
    typer.Option(
        "--storage",
        help="sqlite:///FILE, or postgresql+psycopg://… Default: $OPTUNA_STORAGE",
        parser=expanded_url,
        metavar="URL",
    ),
]
StudyName = Annotated[
    str | None, typer.Option("--study", help="Name of the study, where there are several.")
]
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

AUTO = "auto"
"""In place of a space: the one that fits this machine."""
WATCH_EVERY_S = 5.0
DEMO_SHAPE = (24, 128, 128)
DEMO_INSTANCES = 14
DEMO_TRIALS = 8
LONGEST_STUDY_NAME = 200
"""Characters; with an ending, still the name of a file."""


def run(
    space: Annotated[
        str,
        typer.Argument(
            help="A file, or a name in search_spaces/; auto: hydra_lv, or hydra_lv_small without "
            "a GPU.",
            autocompletion=completed("search_spaces"),
        ),
    ],
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
    learn_from: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FOLDER_OR_URL[/STUDY]",
            help="Try first what did well in this earlier study; may be repeated. none: nothing.",
            parser=_expanded_place,
        ),
    ] = None,
    settings: Settings = None,
    json: Json = False,
) -> None:
    """Start a study, or continue the one of that name until its trials are finished.

    Example: `hydralv-tune run smoke --image runs/phantom/im.h5 --label runs/phantom/label.h5
    --mask runs/phantom/mask.h5 --trials 2 --out runs/smoke`
    """
    if space != AUTO:
        find_file(space, "search_spaces")
    elif ray_address is not None:
        raise InputError(
            f"run: {AUTO} looks at this machine, but the trials run in the cluster of "
            "--ray-address. Name the space: hydra_lv, or hydra_lv_small."
        )
    if not label:
        raise InputError("run: --label is missing; a study needs instance labels to score against.")
    facts = _run(
        space if space != AUTO else _space_for_this_machine(),
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
        learn_from=learn_from or [],
    )
    _show_facts(facts, json)
    if not json:
        _say_next(out or Path("runs") / facts["study"], facts["best"] is not None)


def _space_for_this_machine() -> str:
    """Return the space that this machine can search, and say which and why."""
    import torch

    if torch.cuda.is_available():
        say("There is a GPU here, so hydra_lv is searched.")
        return "hydra_lv"
    say("There is no GPU here, so hydra_lv_small is searched: small networks, for an hour.")
    return "hydra_lv_small"


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
    if sys.stderr.isatty():  # elsewhere the message of a refusal is the first and only line
        say(f"Checking the search space {space_name} and the volumes.")
    from hydralv_tune.config.files import parse_overrides
    from hydralv_tune.config.search_space_files import load_space

    space = load_space(space_name, parse_overrides(settings))
    name = space.name if study is None else study
    _check_study_name(name, names_folder=out is None)
    folder = out or Path("runs") / name
    check_folder("--out", folder, [file for volume in volumes for file in volume.files])
    url = storage or f"sqlite:///{folder / 'study.db'}"
    if sys.stderr.isatty():
        say(f"Study {name} in {folder}: starting.")
    # Imported only now: Ray, PyTorch and Optuna take seconds, and people wait for a first line.
    from hydralv_tune.cli.live_view import LiveView
    from hydralv_tune.launch.run import run_study
    from hydralv_tune.results.publish import publish_study_end, publish_trial_change
    from hydralv_tune.study.find import StudyAddress

    trials = int(options["trials"] or space.budget.trials)
    limit_s = options.get("timeout_s") or space.budget.timeout_s
    reader = _ProgressReader(StudyAddress(url, name), trials)
    view = LiveView(
        name, trials=trials, progress=reader.read, log=folder / "run.log", limit_s=limit_s
    )
    with reader, view:
        facts = run_study(
            space,
            volumes,
            study=name,
            storage=url,
            out=folder,
            on_event=view.on_event,
            on_trial_end=publish_trial_change,
            on_trial_running=publish_trial_change,
            **options,
        )
    publish_study_end(url, name)
    from hydralv_tune.results.ensemble import ensemble_after_study

    ensemble_after_study(url, name, trials, say, folder)
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


class _ProgressReader:
    """Reads how a study stands, from a connection of its own that opens once there is a study."""

    def __init__(self, address: StudyAddress, target: int | None = None) -> None:
        self._address, self._target = address, target
        self._study: Study | None = None

    def __enter__(self) -> _ProgressReader:
        return self

    def __exit__(self, *_: object) -> None:
        if self._study is not None:
            self._study.close()

    def read(self) -> StudyProgress:
        """Return how the study stands now.

        Raises:
            StudyError: There is no such study.
            DatabaseAway: The database does not answer.
        """
        from hydralv_tune.study.progress import study_progress
        from hydralv_tune.study.study import open_readonly

        if self._study is None:
            address = self._address
            self._study = open_readonly(address.storage, address.name, address.folder)
        return study_progress(self._study, self._target)

    def facts(self) -> dict[str, Any]:
        """Return what `status --json` prints; the study must have been read before."""
        now = self.read()
        facts = self.facts_of_study()
        return {**facts, **now.as_facts(), "warnings": [*facts["warnings"], *now.warnings]}

    def facts_of_study(self) -> dict[str, Any]:
        """Return the same without the running trials, which a table has shown."""
        assert self._study is not None
        return self._study.facts()


def _show_facts(facts: dict[str, Any], json: bool) -> None:
    """Print what a study has reached, and what to do next."""
    if json:
        print_json(facts)
        return
    best = facts["best"]
    if best is None:
        say("No trial is complete yet.")
        return
    from hydralv_tune.numerics.formatting import or_off

    shown = {key: value for key, value in best.items() if key not in ("value", "warm_start")}
    if shown.get("decoding"):
        thresholds = {key: or_off(value) for key, value in shown["decoding"]["kwargs"].items()}
        shown["decoding"] = {**shown["decoding"], "kwargs": thresholds}
    print_facts(f"Best trial of study {facts['study']}: {best['number']}", shown)
    for key in ("confirmed", "going_on"):
        if key in facts:
            say(facts[key]["sentence"])
    for warning in facts.get("warnings", ()):
        say(f"warning: {warning}")


def _say_next(folder: Path, best: bool) -> None:
    """Say what to do now that a run is over."""
    words = ["report", "export", "dashboard"] if best else ["status", "dashboard"]
    outs = {"report": f" --out {folder / 'report'}", "export": f" --out {folder / 'best.yaml'}"}
    say("Next:")
    for word in words:
        say(f"  hydralv-tune {word} {shlex.quote(str(folder))}{outs.get(word, '')}")


def status(
    place: Place = None,
    storage: Storage = None,
    study: StudyName = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="Keep the table up to date until interrupted.")
    ] = False,
    json: Json = False,
) -> None:
    """Show how a study stands, running or not; reads only.

    Example: `hydralv-tune status runs/smoke`
    """
    from hydralv_tune.study.find import find_study

    found = find_study(place, storage=storage, study=study)
    from rich.live import Live

    from hydralv_tune.cli.live_view import progress_table

    with _ProgressReader(found) as reader:
        if json:
            print_json(reader.facts(), one_line=watch)
            while watch:
                time.sleep(WATCH_EVERY_S)
                print_json(reader.facts(), one_line=True)
            return
        if not watch:
            console().print(progress_table(reader.read()))
            facts = reader.facts_of_study()
            if facts["best"] is not None:  # the table has said that there is none
                _show_facts(facts, json=False)
            return
        with Live(progress_table(reader.read()), console=console(), auto_refresh=False) as live:
            while True:
                time.sleep(WATCH_EVERY_S)
                live.update(progress_table(reader.read()), refresh=True)


def export(
    place: Place = None,
    storage: Storage = None,
    study: StudyName = None,
    out: Annotated[
        Path | None,
        path_option(help="Where the best config goes. Default: best.yaml, .pt or .zip in FOLDER"),
    ] = None,
    format: Annotated[
        str,
        typer.Option(
            help="hydralv, pytc (today's PyTorch Connectomics), pytc-2026-01, torchscript or "
            "bioimageio."
        ),
    ] = "hydralv",
    table: Annotated[
        Path | None, path_option(help="Also write all trials to this CSV or Parquet file.")
    ] = None,
    trial: Annotated[
        int | None, typer.Option(min=0, help="Another trial than the best, by its number.")
    ] = None,
    best_portable: Annotated[
        bool,
        typer.Option(
            "--best-portable", help="The best trial whose network PyTorch Connectomics has."
        ),
    ] = False,
    ensemble: Annotated[
        bool,
        typer.Option("--ensemble", help="The average that `ensemble` found, where it is kept."),
    ] = False,
    write_normalised: Annotated[
        bool,
        typer.Option(
            "--write-normalised",
            help="For PyTorch Connectomics: write images as the network sees them beside.",
        ),
    ] = False,
    scikit_image_026: Annotated[
        bool | None,
        typer.Option(
            "--scikit-image-026/--scikit-image-before-026",
            help="Which scikit-image PyTorch Connectomics runs with: it decides whether segments "
            "of exactly min_instance_size voxels are dropped there.",
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Write the best config with its checkpoint, and print the commands that use them.

    Example: `hydralv-tune export runs/smoke --out runs/best.yaml`
    """
    from hydralv_tune.results.export import MODEL_FORMATS
    from hydralv_tune.study.find import check_place, find_study

    target = _out_in(place, out, f"best{MODEL_FORMATS.get(format, '.yaml')}", "export --out")
    check_folder("--out", target.parent)
    if table is not None:
        check_folder("--table", table.parent)
    if trial is not None and best_portable:
        raise InputError("export: --trial and --best-portable name two trials. Give one of them.")
    if ensemble:
        _check_alone(
            format, target, names_trial=trial is not None or best_portable,
            is_for_peer=write_normalised or scikit_image_026 is not None,
        )  # fmt: skip
    if storage is None:
        check_place(place)
    from hydralv_tune.results.export.export import export_best

    found = find_study(place, storage=storage, study=study)
    if ensemble:
        from hydralv_tune.results.ensemble import export_ensemble

        document = export_ensemble(found.storage, found.name, target, found.folder, table=table)
    else:
        document = export_best(
            found.storage,
            found.name,
            target,
            format=format,
            table=table,
            folder=found.folder,
            trial=trial,
            portable=best_portable,
            write_normalised=write_normalised,
            scikit_image_026=scikit_image_026,
        )
    if json:
        print_json(document)
        return
    for warning in document["warnings"]:
        say(f"warning: {warning}")
    say(f"Config: {document['out']}")
    none = "none is written, since PyTorch Connectomics lacks this network"
    say(f"Checkpoint: {document['checkpoint'] or none}")
    say(f"Certificate: {document['certificate']}")
    if "table" in document:
        say(f"Table: {document['table']}")
    for command in document["commands"]:
        print(command)


def _check_alone(format: str, out: Path, *, names_trial: bool, is_for_peer: bool) -> None:
    """Refuse what does not go together with `export --ensemble`.

    Args:
        format: As it was given.
        out: The exported file.
        names_trial: Whether a trial is asked for too.
        is_for_peer: Whether an option is given that is for PyTorch Connectomics alone.

    Raises:
        InputError: Any of it.
    """
    if names_trial:
        raise InputError(
            "export: --ensemble and --trial or --best-portable name two things. Give one of them."
        )
    if is_for_peer:
        raise InputError(
            "export: --write-normalised and --scikit-image-026 are for PyTorch Connectomics, which "
            "takes one network, but --ensemble is several. Leave them out."
        )
    if format != "hydralv":
        from hydralv_tune.results.export.export import FORMATS

        if format not in FORMATS:
            raise InputError(f"export --format: {unknown_name('format', format, FORMATS)}")
        raise InputError(
            f"export --format: {format} holds one network, but --ensemble is several. Leave "
            "--format out, or export the best trial."
        )
    if out.suffix not in (".yaml", ".yml"):
        raise InputError(
            f"export --out: {out} is no .yaml file; the checkpoint goes beside it as .ckpt."
        )


def _out_in(place: str | None, out: Path | None, name: str, option: str) -> Path:
    """Return where a result goes: as said, or beside the study that its folder names."""
    if out is not None:
        return out
    if place is None or "://" in place:
        raise InputError(f"{option} is missing. Say where the result goes, as in --out {name}.")
    return Path(place) / name


def report(
    place: Place = None,
    storage: Storage = None,
    study: StudyName = None,
    out: Annotated[
        Path | None,
        path_option(help="Folder for index.html and report.md. Default: FOLDER/report"),
    ] = None,
    json: Json = False,
) -> None:
    """Write a self-contained page about a study.

    Example: `hydralv-tune report runs/smoke --out runs/report`
    """
    from hydralv_tune.study.find import check_place, find_study

    target = _out_in(place, out, "report", "report --out")
    check_folder("--out", target)
    if storage is None:
        check_place(place)
    from hydralv_tune.results.report.report import write_report

    found = find_study(place, storage=storage, study=study)
    page = write_report(found.storage, found.name, target, folder=found.folder)
    with _ProgressReader(found) as reader:
        warnings = reader.facts()["warnings"]
    if json:
        print_json({"out": str(page), "warnings": warnings})
        return
    for warning in warnings:
        say(f"warning: {warning}")
    say(f"Report: {page}")


def ensemble(
    place: Place = None,
    storage: Storage = None,
    study: StudyName = None,
    members: Annotated[
        int, typer.Option(min=1, help="Different trials that are averaged at most.")
    ] = 3,
    timeout_s: Annotated[
        float | None,
        typer.Option(min=1.0, help="What it may take: fewer trials, coarser grids. Default: all."),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    json: Json = False,
) -> None:
    """Find the best average of a study's networks, and what it gains where it was not chosen.

    Example: `hydralv-tune ensemble runs/smoke`
    """
    from hydralv_tune.study.find import check_place, find_study

    if storage is None:
        check_place(place)
    from hydralv_tune.results.ensemble import find_ensemble

    found = find_study(place, storage=storage, study=study)
    facts = find_ensemble(
        found.storage, found.name, found.folder, members=members, limit_s=timeout_s, device=device,
        say=say,
    )  # fmt: skip
    if json:
        print_json(facts)
        return
    print_facts(f"Ensemble of study {found.name}", facts)
    say(facts["sentence"])
    if facts["out"] is not None:
        print(f"hydralv-tune segment {shlex.quote(facts['out'])} --image IMAGE.h5 --out SEG.h5")


def dashboard(
    places: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[FOLDER]...", help="Folders of studies, or URLs.", parser=_expanded_place
        ),
    ] = None,
    storage: Storage = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port on 127.0.0.1.")] = 8080,
    writable: Annotated[
        bool,
        typer.Option(
            "--writable", help="Let the page end trials, write notes, rename and delete studies."
        ),
    ] = False,
    open_page: Annotated[
        bool, typer.Option("--open", help="Open the page in the browser of this machine.")
    ] = False,
) -> None:
    """Serve the Optuna dashboard on 127.0.0.1, for reading only unless --writable is given.

    Example: `hydralv-tune dashboard runs/smoke --port 8080`
    """
    from hydralv_tune.study.find import check_place

    shown = [*(places or ()), *([storage] if storage is not None else [])]
    for place in shown or [None]:
        check_place(place)
    from hydralv_tune.results.dashboard import serve

    def ready(url: str) -> None:
        say(f"Dashboard: {url}")
        say(
            f"From another machine: ssh -N -L {port}:127.0.0.1:{port} "
            f"{getpass.getuser()}@{socket.gethostname()}, then open {url}"
        )
        if open_page:
            webbrowser.open(url)

    serve(shown or [None], port=port, writable=writable, ready=ready)


def enqueue(
    folder: Annotated[
        str, typer.Argument(help="Folder of the study, or its storage URL.", parser=_expanded_place)
    ],
    candidates: Annotated[
        list[str],
        typer.Argument(help="Candidates: files, or names in trials/.", metavar="CANDIDATE"),
    ],
    study: StudyName = None,
    json: Json = False,
) -> None:
    """Put candidates into a study, running or not; they are its next trials.

    Example: `hydralv-tune enqueue runs/smoke plan_focal`
    """
    from hydralv_tune.study.find import check_place, find_study

    files = [find_file(name, "trials") for name in candidates]
    check_place(folder)
    from hydralv_tune.config.yaml_io import read_yaml_mapping
    from hydralv_tune.study.study import open_readonly

    found = find_study(folder, study=study)
    opened = open_readonly(found.storage, found.name, found.folder)
    try:
        numbers = opened.enqueue_all({path.stem: read_yaml_mapping(path) for path in files})
        near = opened.near_trials(numbers)
        share = opened.space.sampler.min_distance
    finally:
        opened.close()
    for number, other in near.items():
        say(
            f"Trial {number} is near trial {other}: the same choices, and no number differs by "
            f"{share:.0%} of its range. It is run, since you asked for it."
        )
    if json:
        print_json({"numbers": numbers})
    else:
        say(f"Enqueued in study {found.name} as trial {', '.join(map(str, numbers))}.")
        say("`hydralv-tune run` with the study's options runs what waits, if it does not run now.")


def recover(
    folder: Annotated[
        Path,
        typer.Argument(help="Folder of the study, with its trials/.", parser=expanded_path),
    ],
    storage: OptionalStorage = None,
    json: Json = False,
) -> None:
    """Make a study again from the records of its trials, where its database was lost.

    Example: `hydralv-tune recover runs/smoke`
    """
    from hydralv_tune.study.recover import recover_study

    facts = recover_study(folder, storage)
    if json:
        print_json(facts)
    else:
        _show_facts(facts, json)
        print_facts("Recovered", facts["trials"])


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
    from hydralv_tune.numerics.metrics.registry import HEADLINE
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
        figures = ", ".join(f"{name} {format_value(best[name])}" for name in HEADLINE)
        print(f"Best: {figures}")
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
