"""The commands that read volumes: phantom, inspect, score, decode, sweep.

Imports stand inside the commands, because `--help` must not wait for torch and numba.
"""

from __future__ import annotations

import io
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hydralv_tune.artifacts.writing import write_atomically
from hydralv_tune.cli.console import print_facts, print_json, print_rows, progress_bar, say
from hydralv_tune.cli.options import (
    IgnoreLabels,
    Images,
    Json,
    Labels,
    Masks,
    OneLabel,
    OneMask,
    OneProbabilities,
    OneScoredMask,
    ScoredMasks,
    Settings,
    check_file_out,
    check_folder,
    check_inputs,
    local_path,
    one_file,
    one_or_none,
    path_option,
    text_option,
    volumes_given,
)
from hydralv_tune.config.errors import InputError, as_input_error
from hydralv_tune.config.paths import find_file

if TYPE_CHECKING:
    import numpy as np

    from hydralv_tune.data.volumes import Volume

LARGEST_PHANTOM = 10**9
"""Voxels; a hundred times the plan's volume, and more than most memories hold."""


def mask_or_none(path: str | None, shape: tuple[int, ...]) -> np.ndarray | None:
    """Return the mask as booleans, or None where no path is given.

    Raises:
        InputError: It cannot be read, has no valid voxel, or its shape differs from that of the
            volume it belongs to.
    """
    from hydralv_tune.data import volumes

    if path is None or path == volumes.NO_MASK:
        return None
    mask = volumes.read_mask(path, shape)
    if mask.shape != shape:
        raise InputError(
            f"{path}: the mask has shape {mask.shape}, but the volume has {shape}. "
            "Give the mask of this very volume."
        )
    return mask


def read_tissue(
    path: str | None, shape: tuple[int, ...], scored: str | None = None
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Return where there is tissue, and where the truth is known if that is not the same.

    A mask of annotated sections, given as the only one, is taken for where the truth is known,
    which is said on stderr.

    Args:
        path: Of the mask, or None.
        shape: Of the volume.
        scored: Of the scored mask, or None.

    Raises:
        InputError: As for `mask_or_none`.
    """
    from hydralv_tune.data.truth import ANNOTATED_NOTE, annotated_sections, tissue_of

    mask, known = mask_or_none(path, shape), mask_or_none(scored, shape)
    if mask is None or known is not None or not annotated_sections(mask.any(axis=(1, 2))):
        return mask, known
    say(f"{path}: {ANNOTATED_NOTE}.")
    return tissue_of(mask), mask


def joined_masks(one: np.ndarray | None, other: np.ndarray | None) -> np.ndarray | None:
    """Return where both masks are valid; None is everywhere."""
    return other if one is None else one if other is None else one & other


def phantom(
    out: Annotated[
        Path,
        typer.Argument(
            help="Folder for im.h5, label.h5 and mask.h5.", parser=local_path, metavar="OUT"
        ),
    ],
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
    from hydralv_tune.data.volumes import Volume, read_voxel_size_nm, write_array
    from hydralv_tune.numerics.phantom.volume import make_phantom

    check_folder("phantom", out)
    if math.prod(shape) > LARGEST_PHANTOM and min(shape) > 0:
        raise InputError(
            f"--shape: {shape} has {math.prod(shape):,} voxels, but a phantom has at most "
            f"{LARGEST_PHANTOM:,}. Choose a smaller shape."
        )
    with as_input_error("phantom"):
        made = make_phantom(shape=shape, instances=instances, seed=seed)
    arrays = {"im": made.image, "label": made.label, "mask": made.mask}
    files = {name: str(out / f"{name}.h5") for name in arrays}
    for path in files.values():
        # Real volumes have these names too, but hardly this size of a voxel.
        if os.path.exists(path) and read_voxel_size_nm(path) != made.voxel_size_nm:
            raise InputError(
                f"phantom: {path} is no phantom, and would be lost. Name a new folder."
            )
    for name, path in files.items():
        write_array(path, arrays[name], voxel_size_nm=made.voxel_size_nm)
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
    scored_mask: ScoredMasks = None,
    ignore_label: IgnoreLabels = None,
    candidate: Annotated[
        str | None,
        typer.Option(help="Also say what this candidate would do with the data."),
    ] = None,
    out: Annotated[
        Path | None, path_option(help="Folder for a PNG sheet of augmented patches.")
    ] = None,
    propose: Annotated[
        Path | None,
        path_option(help="Write a search space that fits the first volume and this machine."),
    ] = None,
    json: Json = False,
) -> None:
    """Say what is in the data and what is wrong with it.

    Example: `hydralv-tune inspect --image runs/phantom/im.h5 --label runs/phantom/label.h5`
    """
    read = [*image, *(label or []), *(mask or []), *(scored_mask or [])]
    if out is not None:
        check_folder("--out", out, read)
    if candidate is not None:
        read.append(str(find_file(candidate, "trials")))
    if propose is not None:
        bases = [str(find_file(name, "search_spaces")) for name in ("hydra_lv", "hydra_lv_small")]
        check_file_out("--propose", propose, (".yaml", ".yml"), [*read, *bases])
        _check_proposed(propose)
        if not label:
            raise InputError("inspect --propose: needs instance sizes, so give --label too.")
    given = volumes_given(image, label or [], mask or [], scored_mask or [], ignore_label or [])
    from hydralv_tune.data.inspection import characteristics
    from hydralv_tune.data.volumes import read_volume

    documents: list[dict[str, Any]] = []
    for paths in given:
        volume = read_volume(paths)
        facts = {"image": paths.image, **characteristics(volume)}
        if candidate is not None or out is not None:
            facts.update(_plan(volume, candidate or "baseline", out))
        if propose is not None and not documents:
            facts["proposal"] = _propose(volume, propose)
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


def _check_proposed(path: Path) -> None:
    """Refuse to replace a file that is no earlier proposal.

    Raises:
        InputError: There is such a file.
    """
    from hydralv_tune.config.search_space_files import PROPOSED

    if path.exists() and not path.read_bytes().startswith(PROPOSED.encode()):
        raise InputError(
            f"--propose: {path} was not written by --propose, and would be lost. Name another file."
        )


def _propose(volume: Volume, path: Path) -> dict[str, Any]:
    """Write a search space for a volume and this machine, and return what it chooses."""
    from hydralv_tune.artifacts.writing import write_atomically
    from hydralv_tune.config.search_space_files import read_space
    from hydralv_tune.trial.proposal import Machine, propose

    proposal = propose(volume, Machine.here())
    read_space(proposal.mapping, path)
    write_atomically(path, proposal.text().encode())
    return {"out": str(path), **proposal.facts()}


def _plan(volume: Volume, name: str, out: Path | None) -> dict[str, Any]:
    """Return what a candidate would do with a volume, and draw its patches where asked."""
    from hydralv_tune.config.files import load_candidate
    from hydralv_tune.trial.planning import draw_patches, plan_facts

    candidate = load_candidate(name)
    facts = plan_facts(candidate, volume)
    if out is not None:
        facts["patch_sheet"] = str(draw_patches(candidate, volume, out))
    return facts


def score(
    predictions: Annotated[list[str], text_option("--prediction", help="Segmentation to score.")],
    labels: OneLabel,
    masks: OneMask = None,
    scored_masks: OneScoredMask = None,
    ignore_label: IgnoreLabels = None,
    json: Json = False,
) -> None:
    """Score a segmentation against its labels.

    Example: `hydralv-tune score --prediction runs/seg.h5 --label runs/phantom/label.h5`
    """
    prediction, label = one_file("--prediction", predictions), one_file("--label", labels)
    mask = one_or_none("--mask", masks)
    scored_mask = one_or_none("--scored-mask", scored_masks)
    check_inputs(prediction, label, mask, scored_mask)
    from hydralv_tune.data.volumes import agreed_placement, read_labels
    from hydralv_tune.numerics.metrics.scores import score_labels

    ignored = ignore_label or []
    size, _ = agreed_placement(prediction, label, mask, scored_mask)
    truth = read_labels(label, ignored)
    segmentation = read_labels(prediction, [one for one in ignored if one < 0])
    inside = joined_masks(mask_or_none(mask, truth.shape), mask_or_none(scored_mask, truth.shape))
    with as_input_error(f"{prediction} against {label}"):
        result = score_labels(prediction=segmentation, truth=truth, mask=inside, ignore=ignored)
    figures = result.as_dict(size)
    if json:
        print_json(figures)
    else:
        print_facts(f"{prediction} against {label}", figures)


def decode(
    maps_given: OneProbabilities,
    out: Annotated[Path, path_option(help="Where the segmentation goes.")],
    masks: OneMask = None,
    candidate: Annotated[
        str | None,
        text_option(
            "--candidate",
            help="Decoder and thresholds of an exported YAML file, a checkpoint or a study.",
        ),
    ] = None,
    decoder: Annotated[
        str | None,
        typer.Option(
            help="A name of the table of decoders. Default: "
            "decode_instance_binary_contour_distance."
        ),
    ] = None,
    settings: Settings = None,
    json: Json = False,
) -> None:
    """Turn probabilities into labels.

    Thresholds come from --candidate, those that --set names from there.

    Example: `hydralv-tune decode --probabilities runs/p.h5 --out runs/seg.h5
    --set binary_threshold=[0.5,0.7]`
    """
    from hydralv_tune.data.formats import WRITABLE

    probabilities = one_file("--probabilities", maps_given)
    mask = one_or_none("--mask", masks)
    check_file_out("--out", out, WRITABLE, [probabilities, mask])
    check_inputs(probabilities, mask)
    from hydralv_tune.config.files import decoding_step, parse_overrides
    from hydralv_tune.data.volumes import (
        agreed_placement,
        narrowed,
        read_probabilities,
        write_array,
    )
    from hydralv_tune.numerics.watershed.decoders import decode as decode_labels

    changed = parse_overrides(settings or [])
    if candidate is None:
        step = decoding_step(decoder or "decode_instance_binary_contour_distance", changed)
    elif decoder is not None:
        raise InputError("decode: --candidate names the decoder too. Leave --decoder out.")
    else:
        from hydralv_tune.results.segmentation import load_thresholds

        step = load_thresholds(candidate, changed=changed)
    size, origin = agreed_placement(probabilities, mask)
    maps = read_probabilities(probabilities)
    with as_input_error(probabilities):
        labels = decode_labels(
            step.name, maps, read_tissue(mask, maps.shape[1:])[0], **step.decoder_arguments()
        )
    write_array(out, narrowed(out, labels), voxel_size_nm=size, origin_nm=origin)
    document = {"instances": int(labels.max(initial=0)), "out": str(out)}
    if json:
        print_json(document)
    else:
        print_facts("Decoded", document)


def _check_beside(out: Path) -> None:
    """Refuse an output whose table or picture would replace a file that is no sweep's.

    Raises:
        InputError: There is a file of that name, and no candidate of an earlier sweep.
    """
    for path in (out.with_suffix(".parquet"), out.with_suffix(".png")):
        if path.exists() and not out.exists():
            raise InputError(
                f"--out: {path} exists, and the sweep would write its table or picture there. "
                "Name another file, or move that one away."
            )


def sweep(
    maps_given: OneProbabilities,
    labels: OneLabel,
    masks: OneMask = None,
    scored_masks: OneScoredMask = None,
    ignore_label: IgnoreLabels = None,
    space: Annotated[
        str, typer.Option(help="The search space whose decoding grid is swept.")
    ] = "hydra_lv",
    out: Annotated[
        Path | None,
        path_option(help="Candidate with the best thresholds; table and PNG beside it."),
    ] = None,
    json: Json = False,
) -> None:
    """Score every threshold combination, exactly.

    Example: `hydralv-tune sweep --probabilities runs/p.h5 --label runs/phantom/label.h5`
    """
    probabilities, label = one_file("--probabilities", maps_given), one_file("--label", labels)
    mask = one_or_none("--mask", masks)
    scored_mask = one_or_none("--scored-mask", scored_masks)
    searched = find_file(space, "search_spaces")
    if out is not None:
        read = [probabilities, label, mask, scored_mask, str(searched)]
        check_file_out("--out", out, (".yaml", ".yml"), read)
        for suffix in (".parquet", ".png"):
            check_file_out("--out", out.with_suffix(suffix), (suffix,), read)
        _check_beside(out)
    check_inputs(probabilities, label, mask, scored_mask)
    from hydralv_tune.config.search_space_files import load_space
    from hydralv_tune.data.volumes import agreed_placement, read_labels, read_probabilities
    from hydralv_tune.numerics.metrics.contingency import split_unknown
    from hydralv_tune.trial.scoring.sweep.sweep import sweep as sweep_grid

    loaded = load_space(space)
    agreed_placement(probabilities, label, mask, scored_mask)
    maps = read_probabilities(probabilities)
    truth, unknown = split_unknown(
        read_labels(label, ignore_label or []), label, ignore_label or []
    )
    if truth.shape != maps.shape[1:]:
        raise InputError(
            f"{label} has shape {truth.shape}, but {probabilities} has {maps.shape[1:]} voxels. "
            "Give the labels of this very volume."
        )
    tissue, known = read_tissue(mask, truth.shape, scored_mask)
    known = joined_masks(known, None if unknown is None else ~unknown)
    with progress_bar("Sweep"), as_input_error(probabilities):
        result = sweep_grid(
            maps,
            truth,
            tissue,
            loaded.decoding,
            scored_mask=known,
            objective=loaded.objective,
        )
    if out is not None:
        from hydralv_tune.artifacts.sweep_figures import draw_heatmap
        from hydralv_tune.config.search_space import thresholds_yaml

        text = thresholds_yaml(loaded.decoding.decoder, result.winner.arguments)
        write_atomically(out, text.encode())
        table = io.BytesIO()
        result.table.to_parquet(table)
        write_atomically(out.with_suffix(".parquet"), table.getvalue())
        draw_heatmap(result, out.with_suffix(".png"))
    if json:
        print_json(result.as_mapping())
        return
    print_rows(f"Ten best of {result.combinations:,} combinations", result.best_rows(10))
    points = {name: getattr(result, name) for name in ("best_unguarded", "best_by_f1", "winner")}
    rows = [
        {
            "combination": name.replace("_", " "),
            "error": point.metrics["adapted_rand_error"],
            "foreground": point.metrics["adapted_rand_error_foreground"],
            "F1": point.metrics["f1_iou50"],
        }
        for name, point in points.items()
    ]
    print_rows("Smallest error, highest F1, and the winner of both", rows)
    say(f"{result.combinations:,} combinations in {result.seconds:.2f} s.")
    print_facts("Winner", points["winner"].arguments)
