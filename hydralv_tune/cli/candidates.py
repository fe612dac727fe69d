"""The commands of one candidate: train, predict, segment."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from hydralv_tune.cli.console import (
    format_value,
    print_facts,
    print_json,
    progress_bar,
    say,
    step_progress,
)
from hydralv_tune.cli.options import (
    CandidateName,
    IgnoreLabels,
    Images,
    Json,
    Labels,
    Masks,
    OneImage,
    OneMask,
    OneScoredMask,
    ScoredMasks,
    Settings,
    check_file_out,
    check_folder,
    check_inputs,
    one_file,
    one_or_none,
    path_option,
    text_option,
    volumes_given,
)
from hydralv_tune.config.errors import InputError, as_input_error
from hydralv_tune.config.paths import expanded, expanded_path, find_file

PREDICTION_BLOCKS = {"inference", "system"}
"""What of a candidate may still be changed when its network is trained."""


def train(
    candidate: CandidateName,
    image: Images,
    out: Annotated[Path, path_option(help="Folder for checkpoint, record and tables.")],
    label: Labels = None,
    mask: Masks = None,
    scored_mask: ScoredMasks = None,
    ignore_label: IgnoreLabels = None,
    space: Annotated[
        str, typer.Option(help="Search space whose thresholds are swept, unless the candidate's.")
    ] = "hydra_lv",
    settings: Settings = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    json: Json = False,
) -> None:
    """Fine-tune one candidate, without a study. A folder with a checkpoint is continued.

    Example: `hydralv-tune train overfit_check --image runs/phantom/im.h5
    --label runs/phantom/label.h5 --out runs/overfit`
    """
    find_file(candidate, "trials")
    find_file(space, "search_spaces")
    check_folder("--out", out)
    from hydralv_tune.config.files import load_candidate, parse_overrides
    from hydralv_tune.config.search_space_files import load_space
    from hydralv_tune.numerics.formatting import duration

    loaded = load_candidate(candidate, parse_overrides(settings or []))
    searched = load_space(space)
    paths = volumes_given(image, label or [], mask or [], scored_mask or [], ignore_label or [])
    check_folder("--out", out, [file for volume in paths for file in volume.files])
    if not label:
        raise InputError("train: --label is missing; training needs instance labels.")

    from hydralv_tune.trial.run import Evaluation, TrialSpec, run_trial, stop_on_signal

    def show(evaluation: Evaluation) -> None:
        metrics = evaluation.metrics
        shown = {
            "error": metrics.get("adapted_rand_error"),
            "foreground": metrics.get("adapted_rand_error_foreground"),
            "F1": metrics.get("f1_iou50"),
            "loss": evaluation.losses.get("total"),
        }
        say(
            f"evaluation {evaluation.step}, epoch {evaluation.epoch}, "
            f"{duration(evaluation.seconds)}: {format_value(shown)}"
        )

    spec = TrialSpec(
        number=0,
        root=0,
        candidate=loaded,
        objective=searched.objective,
        grid=loaded.test.decoding_grid or searched.decoding,
        volumes=paths,
        out=str(out),
        device=device,
        threads=loaded.system.cpu_threads,
        study=None,
        timeout_s=None,
    )
    with progress_bar("Train") as move, stop_on_signal() as should_stop:
        record = run_trial(spec, report=show, progress=move, should_stop=should_stop)
    document = record.summary()
    if json:
        print_json(document)
    else:
        print_facts(f"Trained {candidate}", document)


def predict(
    checkpoint: Annotated[Path, path_option(help="best.ckpt of a trial, or an exported one.")],
    images: OneImage,
    out: Annotated[Path, path_option(help="Where the (3, Z, Y, X) probabilities go.")],
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    settings: Settings = None,
    json: Json = False,
) -> None:
    """Write the probabilities of a volume.

    Example: `hydralv-tune predict --checkpoint runs/overfit/best.ckpt
    --image runs/phantom/im.h5 --out runs/p.h5`
    """
    import time

    from hydralv_tune.data.formats import WRITABLE

    image = one_file("--image", images)
    check_file_out("--out", out, WRITABLE, [image, checkpoint])
    if not checkpoint.exists():
        raise InputError(f"{checkpoint}: no such file. Check the path.")
    check_inputs(image)
    from hydralv_tune.config.files import parse_overrides, with_overrides

    overrides = parse_overrides(settings or [])
    if other := sorted(set(overrides) - PREDICTION_BLOCKS):
        raise InputError(
            f"--set: '{other[0]}' is fixed by the checkpoint; predict takes keys of "
            f"{', '.join(sorted(PREDICTION_BLOCKS))} only. Leave it out."
        )
    from hydralv_tune.data.volumes import VolumePaths, read_volume, write_array
    from hydralv_tune.trial.scoring.prediction import load_members, pick_device, predict_members

    target = pick_device(device)
    members = load_members(checkpoint, device=target)
    if overrides:
        members = [
            replace(one, candidate=with_overrides(one.candidate, overrides)) for one in members
        ]
    volume = read_volume(VolumePaths(name=image, image=image))
    started = time.perf_counter()
    with progress_bar("Predict") as move, as_input_error(image):
        maps = predict_members(members, volume.image, device=target, progress=move)
    write_array(out, maps, voxel_size_nm=volume.voxel_size_nm, origin_nm=volume.origin_nm)
    document = {"out": str(out), "seconds": round(time.perf_counter() - started, 3)}
    if json:
        print_json(document)
    else:
        print_facts("Predicted", document)


def segment(
    best: Annotated[
        str,
        typer.Argument(
            help="Exported YAML file, checkpoint, or folder of a study.", metavar="BEST"
        ),
    ],
    images: OneImage,
    out: Annotated[Path, path_option(help="Where the instance labels go.")],
    masks: OneMask = None,
    labels: Annotated[
        list[str] | None,
        text_option("--label", help="Instance labels; the result is scored on them."),
    ] = None,
    scored_masks: OneScoredMask = None,
    ignore_label: IgnoreLabels = None,
    table: Annotated[
        Path | None, path_option(help="One row an instance: a .csv or .parquet file.")
    ] = None,
    neuroglancer: Annotated[
        Path | None,
        path_option(help="Folder for image, result and truth as neuroglancer shows them."),
    ] = None,
    memory_gb: Annotated[
        float | None,
        typer.Option(
            min=1.0,
            help="Most memory to use, on a Ray cluster for each task. Default: half of what is "
            "free, divided among the tasks of a node; or as it was begun.",
        ),
    ] = None,
    ray_address: Annotated[
        str | None, typer.Option(help="Ray cluster whose nodes share the folder of --out.")
    ] = None,
    study: Annotated[
        str | None, typer.Option("--study", help="Name of the study, where there are several.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="Argument of the decoder, such as min_instance_size=200."),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    json: Json = False,
) -> None:
    """Segment a volume of any size with the weights and thresholds of BEST.

    A segmentation that was stopped goes on with the same command.

    Example: `hydralv-tune segment runs/demo --image runs/demo/phantom/im.h5 --out runs/seg.h5`
    """
    import time
    from contextlib import ExitStack

    from hydralv_tune.data.formats import PRECOMPUTED, WRITABLE
    from hydralv_tune.data.volume_paths import NO_MASK, VolumePaths

    image, label = one_file("--image", images), one_or_none("--label", labels)
    mask, scored_mask = (
        None if path == NO_MASK else path
        for path in (one_or_none("--mask", masks), one_or_none("--scored-mask", scored_masks))
    )
    inputs = [path for path in (image, mask, label, scored_mask) if path is not None]
    check_file_out("--out", out, WRITABLE, inputs)
    if table is not None:
        check_file_out("--table", table, (".csv", ".parquet"), [*inputs, out])
    if neuroglancer is not None:
        for name in ("image", "truth", "segmentation"):
            shown = neuroglancer / f"{name}{PRECOMPUTED.suffixes[0]}"
            check_file_out("--neuroglancer", shown, PRECOMPUTED.suffixes, [*inputs, out])
        _ = PRECOMPUTED.code  # refused before any work where its package is missing
    check_inputs(*inputs)
    if "://" not in best and not expanded_path(best).exists():
        raise InputError(
            f"{best}: no such file or folder. Give an exported YAML file, a checkpoint, or a "
            "study's folder."
        )
    from hydralv_tune.data.volumes import check_heads, check_scorable

    check_heads(image, {"label": label, "mask": mask, "scored mask": scored_mask})
    if label is not None:
        ignored = tuple(ignore_label or ())
        check_scorable(VolumePaths(image, image, label, mask, scored_mask, ignored))
    from hydralv_tune.artifacts.writing import write_frame
    from hydralv_tune.config.files import parse_overrides
    from hydralv_tune.data.truth import ANNOTATED_NOTE
    from hydralv_tune.results.segmentation import gaps_of_tissue, load_model
    from hydralv_tune.results.segmentation_score import assess
    from hydralv_tune.trial.whole_volume.segmentation import Jobs, segmented_volume

    changed = parse_overrides(settings or [])
    model = load_model(expanded(best), study=study, changed=changed)
    gaps = gaps_of_tissue(image, mask, scored_mask)
    if gaps != []:
        say(f"{mask}: {ANNOTATED_NOTE}.")
    tissue = None if gaps is None else mask
    started = time.perf_counter()
    with ExitStack() as stack:
        jobs = Jobs()
        if ray_address is not None:
            from hydralv_tune.launch.segmentation_jobs import ray_jobs

            jobs = stack.enter_context(ray_jobs(ray_address))
        say_step = stack.enter_context(step_progress())
        found = stack.enter_context(
            segmented_volume(
                model, VolumePaths(image, image, label, tissue), out, gaps=gaps or (),
                memory_gb=memory_gb, table=table is not None, device=device, jobs=jobs,
                say=say_step,
            )
        )  # fmt: skip
        assessed = assess(
            out, found.table.frame(), image=image, label=label,
            masks=[path for path in (mask, scored_mask) if path is not None],
            ignore=ignore_label or [], view=neuroglancer, progress=say_step,
        )  # fmt: skip
        written = None if table is None else str(write_frame(assessed.rows, table))
    document = {
        "out": str(out),
        "instances": found.instances,
        "table": written,
        "neuroglancer": None if assessed.view is None else str(assessed.view),
        "seconds": round(time.perf_counter() - started, 3),
        **assessed.figures,
    }
    if json:
        print_json(document)
    else:
        print_facts("Segmented", document)
