"""The commands that read volumes: phantom, inspect, check, score, decode, sweep.

Imports stand inside the commands, because `--help` must not wait for torch and numba.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hydralv_tune.artifacts.writing import why_not_writable, write_atomically
from hydralv_tune.cli.console import print_facts, print_json, print_rows, progress_bar, say
from hydralv_tune.config.errors import InputError, as_input_error

if TYPE_CHECKING:
    import numpy as np

    from hydralv_tune.data.volumes import Volume

Images = Annotated[
    list[str], typer.Option("--image", help="Image volume: HDF5, TIFF or Zarr. May be repeated.")
]
Labels = Annotated[
    list[str] | None, typer.Option("--label", help="Instance labels, one for each image.")
]
Masks = Annotated[list[str] | None, typer.Option("--mask", help="Valid mask, one for each image.")]
OneLabel = Annotated[str, typer.Option("--label", help="Instance labels: HDF5, TIFF or Zarr.")]
OneMask = Annotated[str | None, typer.Option("--mask", help="Valid mask; the rest is ignored.")]
Json = Annotated[bool, typer.Option("--json", help="Print exactly one JSON document.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", help="key=value, the value read as YAML.")
]

LARGEST_PHANTOM = 10**9
"""Voxels; a hundred times the plan's volume, and more than most memories hold."""


def check_folder(option: str, path: Path) -> None:
    """Refuse a place where no folder can be made, before any work is done for it.

    Args:
        option: What the user calls it, for the message.
        path: The folder; it need not exist yet.

    Raises:
        InputError: A file stands in its way, or its folder cannot be written.
    """
    reason = why_not_writable(path)
    if reason is not None:
        raise InputError(
            f"{option}: {path}: {reason}. Name another folder, or change its permissions."
        )


def check_file_out(
    option: str, path: Path, suffixes: Collection[str], inputs: Collection[str | Path] = ()
) -> None:
    """Refuse a file that cannot be written or must not be, before any work is done for it.

    Args:
        option: What the user calls it, for the message.
        path: The file; `file:dataset` is a dataset of it.
        suffixes: What its name may end with.
        inputs: Files that the command reads, which it must not replace.

    Raises:
        InputError: The suffix is another, a folder of that name exists, the folder cannot be
            written, or the file is one of the inputs.
    """
    from hydralv_tune.data.formats.files import locate

    location = locate(path)
    file = location.path
    if file.suffix.lower() not in suffixes:
        raise InputError(
            f"{option}: {path} ends with '{file.suffix}', but one of {', '.join(suffixes)} is due. "
            "Name the file so."
        )
    if file.is_dir() and file.suffix.lower() != ".zarr":
        raise InputError(f"{option}: {path} is a folder, but a file is due. Name a file in it.")
    check_folder(option, file.parent)
    for given in inputs:
        other = locate(given)
        if other.path.absolute() == file.absolute() and other.dataset == location.dataset:
            raise InputError(
                f"{option}: {path} is what the command reads, and would be lost. Name another file."
            )


def read_mask(path: str | None, shape: tuple[int, ...]) -> np.ndarray | None:
    """Return the mask as booleans, or None where no path is given.

    Raises:
        InputError: It cannot be read, has no valid voxel, or its shape differs from that of the
            volume it belongs to.
    """
    from hydralv_tune.data import volumes

    if path is None:
        return None
    mask = volumes.read_mask(path)
    if mask.shape != shape:
        raise InputError(
            f"{path}: the mask has shape {mask.shape}, but the volume has {shape}. "
            "Give the mask of this very volume."
        )
    return mask


def phantom(
    out: Annotated[Path, typer.Argument(help="Folder for im.h5, label.h5 and mask.h5.")],
    shape: Annotated[tuple[int, int, int], typer.Option(help="Voxels along z, y and x.")] = (
        51,
        516,
        516,
    ),
    instances: Annotated[int, typer.Option(help="How many vesicles.")] = 51,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same volume.")] = 0,
    json: Json = False,
) -> None:
    """Write a synthetic EM volume with known vesicles.

    Example: `hydralv-tune phantom runs/phantom --shape 16 96 96 --instances 6`
    """
    from hydralv_tune.data.inspection import characteristics
    from hydralv_tune.data.volumes import Volume, write_array
    from hydralv_tune.numerics.phantom.volume import make_phantom

    check_folder("phantom", out)
    if math.prod(shape) > LARGEST_PHANTOM and min(shape) > 0:
        raise InputError(
            f"--shape: {shape} has {math.prod(shape):,} voxels, but a phantom has at most "
            f"{LARGEST_PHANTOM:,}. Choose a smaller shape."
        )
    with as_input_error("phantom"):
        made = make_phantom(shape=shape, instances=instances, seed=seed)
    files = {}
    for name, array in (("im", made.image), ("label", made.label), ("mask", made.mask)):
        path = out / f"{name}.h5"
        write_array(path, array, voxel_size_nm=made.voxel_size_nm)
        files[name] = str(path)
    volume = Volume(
        name=out.name,
        image=made.image,
        label=made.label,
        mask=made.mask > 0,
        voxel_size_nm=made.voxel_size_nm,
    )
    facts = {"files": files, **characteristics(volume)}
    if json:
        print_json(facts)
    else:
        _print_volume(f"Phantom {out}", facts)


def inspect(
    image: Images,
    label: Labels = None,
    mask: Masks = None,
    candidate: Annotated[
        str | None,
        typer.Option(help="Also say what this candidate would do with the data."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for a PNG sheet of augmented patches.")
    ] = None,
    json: Json = False,
) -> None:
    """Say what is in the data and what is wrong with it.

    Example: `hydralv-tune inspect --image runs/phantom/im.h5 --label runs/phantom/label.h5`
    """
    from hydralv_tune.data.inspection import characteristics
    from hydralv_tune.data.volumes import read_volume, volume_paths

    if out is not None:
        check_folder("--out", out)
    documents = []
    for paths in volume_paths(image, label or [], mask or []):
        volume = read_volume(paths)
        facts = {"image": paths.image, **characteristics(volume)}
        if candidate is not None or out is not None:
            facts.update(_plan(volume, candidate or "baseline", out))
        documents.append(facts)
    if json:
        one = documents[0]
        print_json(one if len(documents) == 1 else {**one, "volumes": documents})
        return
    for facts in documents:
        _print_volume(str(facts.pop("image")), facts)


def _print_volume(title: str, facts: dict[str, Any]) -> None:
    """Print what is in a volume, then what is wrong with it, a sentence a line."""
    warnings = [*facts.pop("warnings"), *facts.pop("plan_warnings", [])]
    print_facts(title, facts)
    for warning in warnings:
        say(f"warning: {warning}")


def _plan(volume: Volume, name: str, out: Path | None) -> dict[str, Any]:
    """Return what a candidate would do with a volume, and draw its patches where asked."""
    from hydralv_tune.config.files import load_candidate
    from hydralv_tune.trial.planning import draw_patches, plan_facts

    candidate = load_candidate(name)
    facts = plan_facts(candidate, volume)
    if out is not None:
        facts["patch_sheet"] = str(draw_patches(candidate, volume, out))
    return facts


def check(
    files: Annotated[list[str], typer.Argument(help="Candidates and search spaces.")],
    explain: Annotated[
        bool, typer.Option("--explain", help="Also say what each candidate amounts to.")
    ] = False,
    json: Json = False,
) -> None:
    """Read candidates and search spaces, and say the first fault of each.

    Example: `hydralv-tune check baseline hydra_lv`
    """
    from hydralv_tune.config.search_space_files import check_file, explain_file

    results = [check_file(path) for path in files]
    rows = [{"path": str(r.path), "kind": r.kind, "ok": r.ok, "error": r.error} for r in results]
    if json:
        print_json({"files": rows})
    for row in rows:
        if row["ok"] and not json:
            say(f"{row['path']}: a valid {row['kind']}.")
            if explain:
                for line in explain_file(str(row["path"])):
                    say(f"  {line}")
    faults = [str(row["error"]) for row in rows if not row["ok"]]
    if faults:
        raise InputError("\n".join(faults))


def score(
    prediction: Annotated[str, typer.Option(help="Segmentation to score.")],
    label: OneLabel,
    mask: OneMask = None,
    json: Json = False,
) -> None:
    """Score a segmentation against its labels.

    Example: `hydralv-tune score --prediction runs/seg.h5 --label runs/phantom/label.h5`
    """
    from hydralv_tune.data.volumes import read_labels
    from hydralv_tune.numerics.metrics import scores

    truth = read_labels(label)
    segmentation = read_labels(prediction)
    with as_input_error(f"{prediction} against {label}"):
        result = scores.score(
            prediction=segmentation, truth=truth, mask=read_mask(mask, truth.shape)
        )
    if json:
        print_json(result.as_dict())
    else:
        print_facts(f"{prediction} against {label}", result.as_dict())


def decode(
    probabilities: Annotated[str, typer.Option(help="(3, Z, Y, X) probabilities.")],
    out: Annotated[Path, typer.Option(help="Where the segmentation goes.")],
    mask: OneMask = None,
    decoder: Annotated[
        str, typer.Option(help="A name of the table of decoders.")
    ] = "decode_instance_binary_contour_distance",
    settings: Settings = None,
    json: Json = False,
) -> None:
    """Turn probabilities into labels.

    Example: `hydralv-tune decode --probabilities runs/p.h5 --out runs/seg.h5
    --set binary_threshold=[0.5,0.7]`
    """
    from hydralv_tune.config.files import decoding_step, parse_overrides
    from hydralv_tune.data.formats.files import SUFFIXES
    from hydralv_tune.data.volumes import read_probabilities, write_array
    from hydralv_tune.numerics.watershed.decoders import decode as decode_labels

    check_file_out("--out", out, SUFFIXES, [probabilities, *([mask] if mask else [])])
    step = decoding_step(decoder, parse_overrides(settings or []))
    maps = read_probabilities(probabilities)
    with as_input_error(probabilities):
        labels = decode_labels(
            step.name, maps, read_mask(mask, maps.shape[1:]), **step.decoder_arguments()
        )
    write_array(out, labels)
    document = {"instances": int(labels.max(initial=0)), "out": str(out)}
    if json:
        print_json(document)
    else:
        print_facts("Decoded", document)


def sweep(
    probabilities: Annotated[str, typer.Option(help="(3, Z, Y, X) probabilities.")],
    label: OneLabel,
    mask: OneMask = None,
    space: Annotated[
        str, typer.Option(help="The search space whose decoding grid is swept.")
    ] = "hydra_lv",
    out: Annotated[
        Path | None,
        typer.Option(help="Candidate with the best thresholds; table and PNG beside it."),
    ] = None,
    json: Json = False,
) -> None:
    """Score every threshold combination, exactly.

    Example: `hydralv-tune sweep --probabilities runs/p.h5 --label runs/phantom/label.h5`
    """
    from hydralv_tune.config.search_space_files import load_space
    from hydralv_tune.data.volumes import read_labels, read_probabilities
    from hydralv_tune.trial.scoring.sweep.sweep import sweep as sweep_grid

    if out is not None:
        check_file_out("--out", out, (".yaml", ".yml"))
    loaded = load_space(space)
    maps = read_probabilities(probabilities)
    truth = read_labels(label)
    if truth.shape != maps.shape[1:]:
        raise InputError(
            f"{label} has shape {truth.shape}, but {probabilities} has {maps.shape[1:]} voxels. "
            "Give the labels of this very volume."
        )
    with progress_bar("Sweep"), as_input_error(probabilities):
        result = sweep_grid(
            maps,
            truth,
            read_mask(mask, truth.shape),
            loaded.decoding,
            objective=loaded.objective,
        )
    if out is not None:
        from hydralv_tune.artifacts.sweep_figures import draw_heatmap
        from hydralv_tune.config.search_space import thresholds_yaml

        text = thresholds_yaml(loaded.decoding.decoder, result.winner.arguments)
        write_atomically(out, text.encode())
        result.table.to_parquet(out.with_suffix(".parquet"))
        draw_heatmap(result, out.with_suffix(".png"))
    if json:
        print_json(result.as_mapping())
        return
    print_rows(f"Ten best of {result.combinations:,} combinations", result.best_rows(10))
    for name in ("winner", "best_by_f1", "best_unguarded"):
        point = getattr(result, name)
        print_facts(name.replace("_", " "), {**point.arguments, **point.metrics})
    say(f"{result.combinations:,} combinations in {result.seconds:.2f} s.")
