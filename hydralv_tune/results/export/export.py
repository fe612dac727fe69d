"""The best configuration of a study, its checkpoint, and the commands that use them."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shlex
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from hydralv_tune.artifacts.records import load_checkpoint, provenance
from hydralv_tune.artifacts.writing import write_atomically, write_frame
from hydralv_tune.config.candidate import Candidate
from hydralv_tune.config.errors import InputError, as_input_error, unknown_name
from hydralv_tune.config.files import baseline, candidate_from_mapping
from hydralv_tune.config.pytc_portability import obstacles
from hydralv_tune.config.yaml_io import dump_yaml
from hydralv_tune.data.formats.location import absolute
from hydralv_tune.data.volumes import VolumePaths, open_lazy, read_mask, read_volume, write_array
from hydralv_tune.numerics.metrics.registry import SUMMARY
from hydralv_tune.results.best_trial import BestTrial, best_portable, load_best_trial
from hydralv_tune.results.export import MODEL_FORMATS
from hydralv_tune.results.export.certificate import certificate_path, write_certificate
from hydralv_tune.results.export.models import (
    export_bioimageio,
    export_torchscript,
    write_safetensors,
)
from hydralv_tune.results.export.pytc import PEER_FORMATS, peer_config, peer_weights
from hydralv_tune.results.export.pytc_blocks import PeerData, deeply_supervised
from hydralv_tune.study.study import Study, open_readonly
from hydralv_tune.study.study_folder import check_apart_from_study
from hydralv_tune.study.trial_views import guard_warnings
from hydralv_tune.trial.fitted_normalisation import fit_image
from hydralv_tune.trial.scoring.prediction import load_network

FORMATS = ("hydralv", *PEER_FORMATS, *MODEL_FORMATS)
CHECKPOINT_KEYS = ("format", "version", "candidate", "weights")
"""What prediction needs; optimizer, schedule and random states stay behind."""


def export_best(
    storage: str,
    study: str,
    out: Path,
    *,
    format: str = "hydralv",
    table: Path | None = None,
    folder: Path | None = None,
    trial: int | None = None,
    portable: bool = False,
    write_normalised: bool = False,
    scikit_image_026: bool | None = None,
) -> dict[str, Any]:
    """Write the best configuration and its checkpoint, and return where and how to use them.

    Args:
        storage: Of the study.
        study: Its name.
        out: The YAML file; the checkpoint goes beside it under the same stem. A .pt file for
            TorchScript, a .zip for bioimage.io.
        format: One of `FORMATS`.
        table: Also write all trials here, as CSV or Parquet by its suffix.
        folder: Where the trials of the study are now; where the database says so by default.
        trial: Number of the trial to export instead of the best.
        portable: Export the best trial whose network PyTorch Connectomics has.
        write_normalised: For that tool, write the images standardised section by section beside.
        scikit_image_026: Whether that tool runs with scikit-image 0.26 or later, which drops
            segments of exactly `min_instance_size` voxels; None: today's format does.

    Returns:
        `out`, `checkpoint`, `commands`, `certificate` (what the export was chosen on, its figures
        with intervals), `warnings`, and `table` where it was asked for; for
        PyTorch Connectomics also `portable`, whether its segmentation is the same, and `left_out`.
        Where it is not, the first of the warnings says why; `checkpoint` is None where its network
        does not exist there.

    Raises:
        StudyError: No such storage or study, or no trial is finished.
        InputError: The format or a suffix is unknown, checkpoint or record are gone, or a file of
            the study would be replaced.
    """
    out = Path(out)
    if format not in FORMATS:
        raise InputError(f"export --format: {unknown_name('format', format, FORMATS)}")
    if format in MODEL_FORMATS:
        if out.suffix != MODEL_FORMATS[format]:
            raise InputError(
                f"export --out: {out} must end with {MODEL_FORMATS[format]} for --format {format}. "
                f"Name it {out.with_suffix(MODEL_FORMATS[format])}."
            )
    elif out.suffix not in (".yaml", ".yml"):
        raise InputError(
            f"export --out: {out} is no .yaml file; the checkpoint goes beside it as .ckpt."
        )
    if table is not None:
        check_table(Path(table))
    with load_best_trial(storage, study, folder, number=trial, portable=portable) as best:
        check_places(best.study, out, table)
        if format == "hydralv":
            document = _export_own(best, out)
        elif format == "torchscript":
            document = export_torchscript(best, out)
        elif format == "bioimageio":
            document = export_bioimageio(best, out)
        else:
            newer = format == "pytc" if scikit_image_026 is None else scikit_image_026
            document = _export_peer(best, out, format, write_normalised, newer)
        document["certificate"] = str(write_certificate(best, out))
        guard = best.study.space.objective.guard.f1_iou50
        told = document.setdefault("warnings", [])
        if best.leads:
            told.extend(guard_warnings(best.view, guard))
        elif not best.view.is_feasible:
            told.append(f"trial {best.view.number} does not meet the guard of F1 ≥ {guard:g}.")
    if table is not None:
        document["table"] = str(write_table(storage, study, Path(table)))
    return document


def _export_own(best: BestTrial, out: Path) -> dict[str, Any]:
    """Write a candidate like those of `trials/`, so that `train` of it repeats the score."""
    checkpoint = out.with_suffix(".ckpt")
    content = load_checkpoint(best.checkpoint)
    kept = {key: content[key] for key in CHECKPOINT_KEYS if key in content}
    text = exported_text(best, _head_lines(best))
    write_weights(checkpoint, kept)
    inert = write_safetensors(out.with_suffix(".safetensors"), *load_network(best.checkpoint))
    write_atomically(out, text.encode())
    return {
        "out": str(out),
        "checkpoint": str(checkpoint),
        "safetensors": str(inert),
        "commands": own_commands(best, out, checkpoint),
    }


def exported_text(best: BestTrial, lines: list[str]) -> str:
    """Return the YAML file of a trial with its thresholds, under lines of comment.

    Args:
        best: The trial, with the thresholds to write.
        lines: What its head says.
    """
    return _comments(lines) + dump_yaml(changed_keys(exported_candidate(best)))


def exported_candidate(best: BestTrial) -> Candidate:
    """Return the candidate with the best thresholds, and the grid that they were swept in."""
    grid = best.candidate.test.decoding_grid
    swept = grid.model_dump(mode="json") if grid is not None else _grid_of(best)
    partial = {
        "experiment_name": f"{best.study.name}_trial_{best.view.number}",
        "test": {
            "decoding": [best.step.model_dump(mode="json")],
            "decoding_grid": swept,
        },
    }
    return candidate_from_mapping(
        partial, place="the exported candidate", base=best.candidate.as_mapping()
    )


def _grid_of(best: BestTrial) -> dict[str, Any]:
    """Return the grid of the study's space as plain values."""
    mapping: dict[str, Any] = best.study.space.decoding.model_dump(mode="json")
    return mapping


def changed_keys(candidate: Candidate) -> dict[str, Any]:
    """Return the candidate as a mapping without the keys that say nothing.

    A null says nothing only where the baseline, which stands under every file, has one too.
    """

    def difference(value: Any, base: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        known = base if isinstance(base, Mapping) else {}
        kept = {
            key: difference(entry, known.get(key))
            for key, entry in value.items()
            if entry is not None or known.get(key) is not None
        }
        return {key: entry for key, entry in kept.items() if entry != {} or known.get(key)}

    mapping: dict[str, Any] = difference(candidate.as_mapping(), baseline())
    return mapping


def _head_lines(best: BestTrial) -> list[str]:
    """Return what the head of an exported file says about where it came from."""
    record, view = best.record, best.view
    objective = best.study.space.objective.metric
    lines = [
        (
            f"The best trial of study '{best.study.name}': trial {view.number} of "
            f"{len(best.study.trials())}, by {objective}."
            if best.leads
            else f"Trial {view.number} of study '{best.study.name}', which is not its best by "
            f"{objective}."
        ),
        *_score_lines(record.metrics),
        f"Split: {record.split.get('sentence') or record.split.get('kind')}.",
    ]
    if not view.is_feasible:
        lines.append(
            "WARNING: no trial meets the guard on F1; this one comes nearest."
            if best.leads
            else "WARNING: this trial does not meet the guard on F1."
        )
    for entry in record.volumes:
        where = entry.get("image") or "named by data.val_image"
        lines.append(
            f"Volume '{entry.get('name')}': {where}, fingerprint {entry.get('fingerprint')}."
        )
    if record.folds:
        lines.append(
            f"{len(record.folds)} folds: the figures are over all of them, the checkpoint is that "
            "of the best fold."
        )
    lines.append(f"Trained with {_versions(record.provenance)}.")
    lines.append(f"Exported with {_versions(provenance())}.")
    return lines


def _score_lines(metrics: Mapping[str, Any]) -> list[str]:
    """Return the figures, one line each, and the counts of what went wrong."""
    lines = [
        f"  {name} {float(metrics[name]):.4f}" for name in SUMMARY if metrics.get(name) is not None
    ]
    counts = [
        f"{len(metrics[key]) if isinstance(metrics[key], list) else metrics[key]} {key}"
        for key in ("missed", "split", "merged", "invented")
        if metrics.get(key) is not None
    ]
    if metrics.get("instances_true") is not None:
        counts.insert(0, f"{metrics.get('matched_iou50')} of {metrics['instances_true']} matched")
    return [*lines, f"  instances: {', '.join(counts)}"] if counts else lines


def _versions(source: Mapping[str, Any]) -> str:
    """Return version, commit and the packages that matter of a provenance."""
    package, versions = source.get("package") or {}, source.get("versions") or {}
    commit = package.get("git_commit")
    parts = [f"hydralv-tune {package.get('version')}" + (f" ({commit[:12]})" if commit else "")]
    parts += [
        f"{name} {versions[name]}" for name in ("torch", "monai", "optuna") if name in versions
    ]
    return ", ".join(parts)


def _comments(lines: list[str]) -> str:
    """Return lines as YAML comments; a line break inside one cannot end the comment."""
    flat = (" ".join(line.splitlines()) if line.strip() else "" for line in lines)
    return "".join(f"# {line}".rstrip() + "\n" for line in flat)


def own_commands(best: BestTrial, out: Path, checkpoint: Path) -> list[str]:
    """Return the commands that predict, decode and score a volume, train again, and segment.

    Args:
        best: The trial.
        out: Its exported configuration.
        checkpoint: Its weights.
    """
    volume = best.volumes[0] if best.volumes else VolumePaths("", "IMAGE.h5", "LABEL.h5")
    mask = ["--mask", volume.mask] if volume.mask else []
    truth = ["--label", volume.label or "LABEL.h5", *mask]
    truth += ["--scored-mask", volume.scored_mask] if volume.scored_mask else []
    truth += [word for number in volume.ignore_labels for word in ("--ignore-label", str(number))]
    probabilities, segmentation = out.with_suffix(".p.h5"), out.with_suffix(".seg.h5")
    image = ["--image", volume.image]
    rows = [
        ["predict", "--checkpoint", checkpoint, *image, "--out", probabilities],
        ["decode", "--probabilities", probabilities, "--out", segmentation, *mask,
         "--candidate", out],
        ["score", "--prediction", segmentation, *truth],
        ["train", out, *_all_volumes(best), "--out", out.with_suffix("")],
        ["segment", out, *image, "--out", segmentation, *truth],
    ]  # fmt: skip
    return [shlex.join(["hydralv-tune", *map(str, row)]) for row in rows]


def _all_volumes(best: BestTrial) -> list[str]:
    """Return the options that name every volume of the study."""
    words: list[str] = []
    for volume in best.volumes:
        for option in ("image", "label", "mask"):
            path = getattr(volume, option)
            words += [f"--{option}", path] if path else []
    return words


def _export_peer(
    best: BestTrial, out: Path, format: str, write_normalised: bool, drops_exact_size: bool
) -> dict[str, Any]:
    """Write a configuration for PyTorch Connectomics and weights as it takes them."""
    given, out = out, Path(os.path.abspath(out))
    weights = out.with_suffix(".ckpt")
    against = obstacles(best.candidate)
    unlike = normalised_otherwise(best.candidate, format)
    normalised = write_normalised and unlike is not None
    data = PeerData(
        volumes=with_masks_enlarged(
            _normalised_volumes(best, out) if normalised else _absolute(best.volumes), out
        ),
        voxel_size_nm=best.voxel_size_nm,
        weights=str(weights) if not against else None,
        experiment=f"{best.study.name}_trial_{best.view.number}",
        description=f"exported by hydralv-tune, study {best.study.name}, trial {best.view.number}",
        normalised=normalised,
        drops_exact_size=drops_exact_size,
        outputs=_outputs(best, format),
    )
    with as_input_error(f"export --format {format}"):
        config = peer_config(best.candidate, best.step, data, schema=format)
    differs = []
    if unlike is not None and not normalised:
        differs.append(
            f"{unlike}; export with --write-normalised to write the images as this network sees "
            "them."
        )
    if format == "pytc-2026-01" and any(best.candidate.data.pad_size):
        differs.append(
            f"that version pads no image before prediction (data.pad_size "
            f"{list(best.candidate.data.pad_size)}), so its windows lie elsewhere; --format pytc "
            "pads too, and a candidate with data.pad_size [0, 0, 0] goes over as it is."
        )
    about = _portable_lines(best, against, differs)
    lines = [*about, "", *_head_lines(best)]
    lines += ["", *_volume_flood_lines(best)]
    lines += ["", "What PyTorch Connectomics has no key for, and so does otherwise:"]
    lines += [f"- {note}" for note in config.notes] or ["- nothing"]
    if not against:
        lines += ["", f"Weights: {weights}, tensors under state_dict with the prefix 'model.'."]
        network, _ = load_network(best.checkpoint)
        write_weights(weights, peer_weights(network, heads=deeply_supervised(best.candidate)))
    lines += ["Its loader does not check decoder names or arguments; this export did."]
    write_atomically(out, (_comments(lines) + dump_yaml(config.mapping)).encode())
    command = shlex.join(["python", "scripts/main.py", "--config", str(out)])
    test = [f"{command} --mode test"] if not against else []
    portable = not against and not differs
    return {
        "out": str(given),
        "checkpoint": str(weights) if not against else None,
        "commands": [*test, f"{command} --mode train"],
        "portable": portable,
        "left_out": list(config.notes),
        "warnings": [] if portable else [" ".join(about)],
    }


def _outputs(best: BestTrial, format: str) -> str:
    """Return a folder for what that tool predicts, of another name where anything differs.

    It takes up a segmentation that lies in its folder of outputs, which it names after the
    configuration file by default: two exports of one file name must not share it.
    """
    said = [format, best.candidate.as_mapping(), best.step.model_dump(mode="json")]
    digest = hashlib.sha256(json.dumps([*said, [v.image for v in best.volumes]]).encode())
    digest.update(best.checkpoint.read_bytes())
    name = re.sub(r"[^\w.-]+", "_", best.study.name)
    return f"outputs/{name}_trial_{best.view.number}_{digest.hexdigest()[:8]}"


def _portable_lines(best: BestTrial, against: list[str], differs: list[str]) -> list[str]:
    """Return, first of all, whether that tool gives this segmentation, and what to do if not."""
    if differs and not against:
        return [
            "ATTENTION: PyTorch Connectomics gives another segmentation, though its weights go "
            f"over: {' And '.join(differs)}"
        ]
    if not against:
        return ["PyTorch Connectomics has this network: its weights go over."]
    lines = [
        "ATTENTION: PyTorch Connectomics cannot give this segmentation: it lacks this network, so "
        "no weights are written and the scores below are not its own.",
        *(f"- {sentence}" for sentence in against),
    ]
    other = best_portable(best.study)
    if other is None:
        hint = "No finished trial can go over. Put `export: pytc` into the search space."
    else:
        hint = f"The best trial that can go over is {other.number}: export --best-portable."
    return [*lines, hint]


def _absolute(volumes: list[VolumePaths]) -> list[VolumePaths]:
    """Return the volumes with absolute paths, so that the commands run from any folder."""
    placed = []
    for volume in volumes:
        files: dict[str, Any] = {
            key: absolute(path)
            for key in ("image", "label", "mask")
            if (path := getattr(volume, key))
        }
        placed.append(replace(volume, **files))
    return placed


def normalised_otherwise(candidate: Candidate, format: str) -> str | None:
    """Return how that tool's intensities differ from those that the network was trained on.

    Args:
        candidate: Whose network goes over.
        format: `pytc` or `pytc-2026-01`.
    """
    data = candidate.data
    transform = data.image_transform
    if transform.normalize == "z_section":
        return "it cannot standardise sections (data.image_transform.normalize z_section)"
    if transform.normalize == "clahe":
        return "it cannot equalise sections (data.image_transform.normalize clahe)"
    clips = (transform.clip_percentile_low, transform.clip_percentile_high) != (0.0, 1.0)
    if format == "pytc" and any(data.pad_size) and (transform.normalize == "z_volume" or clips):
        return (
            "that version takes mean, deviation and percentiles of the volume after it was padded "
            f"(data.pad_size {list(data.pad_size)}), so its intensities are others"
        )
    return None


def _normalised_volumes(best: BestTrial, out: Path) -> list[VolumePaths]:
    """Write each image as the network sees it, normalised, and return the volumes."""
    written = []
    for index, volume in enumerate(_absolute(best.volumes)):
        image = read_volume(VolumePaths(name=volume.name, image=volume.image)).image
        image, fitted = fit_image(image, best.candidate.data)
        path = out.with_name(f"{out.stem}.normalised_{index}.h5")
        write_array(path, fitted.apply(image))
        written.append(replace(volume, image=str(path)))
    return written


def with_masks_enlarged(volumes: list[VolumePaths], out: Path) -> list[VolumePaths]:
    """Write each mask of a lower resolution on the voxels of its image, and return the volumes.

    That tool enlarges masks when it tests, none when it trains.

    Args:
        volumes: With absolute paths.
        out: The exported file; masks go beside it.
    """
    whole = []
    for index, volume in enumerate(volumes):
        if volume.mask is not None:
            try:
                with open_lazy(volume.image, ndim=3) as image, open_lazy(volume.mask) as mask:
                    shape, coarse = image.shape, mask.shape != image.shape
            except InputError:  # The volumes of the study may lie on another machine.
                coarse = False
            if coarse:
                path = out.with_name(f"{out.stem}.mask_{index}.h5")
                write_array(path, read_mask(volume.mask, shape).astype("uint8"))
                volume = replace(volume, mask=str(path))
        whole.append(volume)
    return whole


def _volume_flood_lines(best: BestTrial) -> list[str]:
    """Return the best trial's score under that tool's flood, or why it is not known."""
    from hydralv_tune.results.scored_volumes import score_under_volume_flood

    title = "The same thresholds under that tool's flood over the whole volume (flood: volume):"
    try:
        metrics = score_under_volume_flood(best)
    except InputError as error:
        return [f"{title} not measured, since {error}"]
    return [title, *_score_lines(metrics)]


def write_weights(path: Path, content: Mapping[str, Any]) -> None:
    """Write a checkpoint whole or not at all.

    Args:
        path: Where it goes.
        content: Tensors and plain values.
    """
    buffer = io.BytesIO()
    torch.save(dict(content), buffer)
    write_atomically(path, buffer.getvalue())


def check_places(study: Study, out: Path, table: Path | None) -> None:
    """Refuse to export onto what a study keeps in its folder, before anything is written.

    Args:
        study: Open.
        out: The exported file.
        table: That of all trials, if it is asked for.

    Raises:
        InputError: One of them, or a file that goes beside, is a study's own.
    """
    written = [out, *(out.with_suffix(suffix) for suffix in (".ckpt", ".safetensors"))]
    check_apart_from_study("export --out", [*written, certificate_path(out)], study.out)
    check_apart_from_study("export --table", [] if table is None else [Path(table)], study.out)


def check_table(path: Path) -> None:
    """Refuse a table that is neither CSV nor Parquet.

    Raises:
        InputError: It is neither.
    """
    if path.suffix not in (".csv", ".parquet"):
        raise InputError(
            f"export --table: {path} is neither .csv nor .parquet. Name it TRIALS.csv."
        )


def write_table(storage: str, study: str, path: Path) -> Path:
    """Write all finished trials as CSV or Parquet, by the suffix, and return the path.

    Raises:
        InputError: The suffix is neither.
        StudyError: No such storage or study.
    """
    check_table(path)
    opened = open_readonly(storage, study)
    try:
        frame = opened.table()
    finally:
        opened.close()
    return write_frame(frame if path.suffix == ".csv" else _of_one_type(frame), path)


def _of_one_type(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the table with mixed columns as text: Parquet holds one type per column."""
    mixed = [
        name
        for name in frame.columns
        if frame[name].dtype == object and frame[name].dropna().map(type).nunique() > 1
    ]
    return frame.assign(**{name: frame[name].map(str, na_action="ignore") for name in mixed})
