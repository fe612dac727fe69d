"""Volumes, networks, segmentations and scores for scripts and notebooks: arrays in, arrays out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from hydralv_tune.config.candidate import Candidate
from hydralv_tune.config.errors import InputError, as_input_error
from hydralv_tune.config.files import decoding_step, load_candidate
from hydralv_tune.config.paths import expanded, expanded_path
from hydralv_tune.config.plugins import load_plugins
from hydralv_tune.config.search_space import SearchSpace
from hydralv_tune.config.search_space_files import load_space
from hydralv_tune.data import volumes as on_disk
from hydralv_tune.data.volumes import Volume, VolumePaths, write_array

if TYPE_CHECKING:
    from hydralv_tune.artifacts.records import TrialRecord
    from hydralv_tune.trial.scoring.sweep.sweep import SweepResult
    from hydralv_tune.trial.spec import Evaluation

Array = npt.NDArray[Any]
DEFAULT_DECODER = "decode_instance_binary_contour_distance"


def read_volume(
    image: str | Path, label: str | Path | None = None, mask: str | Path | None = None
) -> Volume:
    """Read an image and what belongs to it into memory.

    Args:
        image: `file` or `file:dataset`: HDF5, TIFF or Zarr, (Z, Y, X).
        label: Instance ids on the same voxels, 0 is background.
        mask: Above 0 where voxels count.

    Returns:
        A frozen value with `image` (Z, Y, X) in the dtype of its file, `label` (Z, Y, X) integers
        or None, `mask` (Z, Y, X) bool or None, and `voxel_size_nm` (z, y, x) or None.

    Raises:
        VolumeError: A file cannot be read, or the three do not belong together.
    """
    labels, masks = ([] if path is None else [path] for path in (label, mask))
    paths = on_disk.volume_paths([image], labels, masks)
    if len(paths) != 1:
        raise InputError(f"{image}: stands for {len(paths)} files, but must be one. Name one.")
    return on_disk.read_volume(paths[0])


def train(
    candidate: Candidate | str | Path,
    volumes: Sequence[Volume | VolumePaths],
    out: str | Path,
    *,
    space: SearchSpace | str | Path = "hydra_lv",
    device: str = "auto",
    on_evaluation: Callable[[Evaluation], None] | None = None,
) -> TrialRecord:
    """Fine-tune one candidate, without a study; a folder with a checkpoint is continued.

    Args:
        candidate: A candidate, a file, or a name in `trials/`.
        volumes: What is trained on and scored, with labels. Arrays are written below `out`, where
            a later call finds them.
        out: Folder for checkpoint, record and tables.
        space: Search space whose thresholds are swept, unless the candidate has a grid.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        on_evaluation: Called with each evaluation: step, epoch, value, losses, metrics, seconds.

    Returns:
        The record: `.metrics`, `.decoding`, `.history` and `.summary()`, which `train --json`
        prints.

    Raises:
        InputError: Candidate and volumes do not fit, or the folder holds another trial.
        TrialFailed: The training cannot be finished.
    """
    chosen = candidate if isinstance(candidate, Candidate) else load_candidate(candidate)
    searched = space if isinstance(space, SearchSpace) else load_space(space)
    folder = expanded_path(out)

    from hydralv_tune.trial.run import TrialSpec, run_trial

    spec = TrialSpec(
        number=0,
        root=0,
        candidate=chosen,
        objective=searched.objective,
        grid=chosen.test.decoding_grid or searched.decoding,
        volumes=stored(volumes, folder),
        out=str(folder),
        device=device,
        threads=chosen.system.cpu_threads,
    )
    return run_trial(spec, report=on_evaluation or (lambda evaluation: None))


def stored(volumes: Sequence[Volume | VolumePaths], out: Path) -> list[VolumePaths]:
    """Return where volumes lie; those in memory are written to `out/volumes/NAME`.

    Raises:
        InputError: There is none, one has no label, or its folder holds other arrays.
    """
    if not volumes:
        raise InputError("volumes: none is given, but training needs one. See read_volume.")
    for volume in volumes:
        if volume.label is None:
            raise InputError(f"volume '{volume.name}': has no label, but training needs one.")
    return [v if isinstance(v, VolumePaths) else _write_volume(v, out) for v in volumes]


def _write_volume(volume: Volume, out: Path) -> VolumePaths:
    """Return the paths of a volume that lies below a folder, written where it does not yet."""
    folder = out / "volumes" / volume.name
    arrays = {"im": volume.image, "label": volume.label, "mask": volume.mask}
    files = {name: folder / f"{name}.h5" for name, array in arrays.items() if array is not None}
    places = {name: str(path) for name, path in files.items()}
    paths = VolumePaths(volume.name, places["im"], places.get("label"), places.get("mask"))
    if files["im"].exists():
        if on_disk.read_volume(paths).fingerprint() != volume.fingerprint():
            raise InputError(
                f"{folder}: holds other arrays than volume '{volume.name}'. Name the volume "
                "otherwise, or give another folder."
            )
        return paths
    for name, path in files.items():
        write_array(path, np.asarray(arrays[name]), voxel_size_nm=volume.voxel_size_nm)
    return paths


def predict(
    checkpoint: str | Path,
    image: Array | str | Path,
    *,
    device: str = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> Array:
    """Predict the probabilities of a volume.

    Args:
        checkpoint: `best.ckpt` of a trial, or an exported one.
        image: (Z, Y, X) in any dtype, normalised as in training; or its file.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        progress: Called with windows done and in all.

    Returns:
        (3, Z, Y, X) float16: binary and boundary in [0, 1], distance in [-1, 1].

    Raises:
        CheckpointError: The checkpoint cannot be read.
        InputError: The image is no (Z, Y, X) volume that the network can take.
    """
    from hydralv_tune.trial.scoring.prediction import load_members, pick_device, predict_members

    array = image if isinstance(image, np.ndarray) else read_volume(image).image
    if array.ndim != 3:
        raise InputError(f"image: has shape {array.shape}, but must be (Z, Y, X).")
    target = pick_device(device)
    members = load_members(expanded_path(checkpoint), device=target)
    return predict_members(members, array, device=target, progress=progress)


def decode(
    probabilities: Array | str | Path,
    mask: Array | str | Path | None = None,
    *,
    decoder: str = DEFAULT_DECODER,
    **arguments: Any,
) -> Array:
    """Decode probabilities into instances.

    Args:
        probabilities: (3, Z, Y, X) float16 or float32, as `predict` returns them; or their file.
        mask: (Z, Y, X), above 0 where voxels count; the whole volume where there is none.
        decoder: A name that `hydralv-tune list decoders` shows.
        arguments: Of the decoder, as `binary_threshold=(0.5, 0.7)`; defaults for the rest.

    Returns:
        (Z, Y, X) int32, ids from 1, 0 is background.

    Raises:
        ConfigError: The decoder or an argument is unknown, or a value breaks its rule.
        InputError: An array breaks its rule.
    """
    step = decoding_step(decoder, arguments, place="decode")
    maps = _probabilities(probabilities)
    inside = _mask(mask, maps.shape[1:])

    from hydralv_tune.numerics.watershed.decoders import decode as decode_maps

    with as_input_error("probabilities"):
        return decode_maps(step.name, maps, inside, **step.decoder_arguments())


def sweep(
    probabilities: Array | str | Path,
    label: Array | str | Path,
    mask: Array | str | Path | None = None,
    *,
    space: SearchSpace | str | Path = "hydra_lv",
) -> SweepResult:
    """Score every combination of decoding thresholds, exactly.

    Args:
        probabilities: (3, Z, Y, X), as `predict` returns them; or their file.
        label: (Z, Y, X) instance ids, 0 is background; or their file.
        mask: (Z, Y, X), above 0 where voxels count.
        space: Search space with the grid and the objective; a file, or a name.

    Returns:
        `.winner`, `.best_by_f1` and `.best_unguarded`, each with `.arguments` (of `decode`) and
        `.metrics`; `.table`, a DataFrame with one row for each combination.

    Raises:
        ConfigError: The space breaks a rule.
        InputError: The arrays break a rule, or do not belong together.
    """
    searched = space if isinstance(space, SearchSpace) else load_space(space)
    maps, truth = _probabilities(probabilities), _labels(label)
    inside = _mask(mask, truth.shape)

    from hydralv_tune.trial.scoring.sweep.sweep import sweep as sweep_grid

    with as_input_error("probabilities against label"):
        return sweep_grid(maps, truth, inside, searched.decoding, objective=searched.objective)


def score(
    prediction: Array | str | Path,
    label: Array | str | Path,
    mask: Array | str | Path | None = None,
) -> dict[str, Any]:
    """Score a segmentation against its labels.

    Args:
        prediction: (Z, Y, X) instance ids, 0 is background; or their file.
        label: The truth, likewise.
        mask: (Z, Y, X), above 0 where voxels count.

    Returns:
        Each metric by its name, as `score --json` prints them; docs/metrics.md defines them.

    Raises:
        InputError: The arrays do not belong together, or there is no truth.
    """
    segmentation, truth = _labels(prediction), _labels(label)
    inside = _mask(mask, truth.shape)

    from hydralv_tune.numerics.metrics.scores import score_labels

    load_plugins()
    with as_input_error("prediction against label"):
        found = score_labels(prediction=segmentation, truth=truth, mask=inside)
    return dict(found.as_dict())


def _probabilities(given: Array | str | Path) -> Array:
    """Return an array, or that of a file."""
    return given if isinstance(given, np.ndarray) else on_disk.read_probabilities(expanded(given))


def _labels(given: Array | str | Path) -> Array:
    """Return an array, or that of a file."""
    return given if isinstance(given, np.ndarray) else on_disk.read_labels(expanded(given))


def _mask(given: Array | str | Path | None, shape: tuple[int, ...]) -> Array | None:
    """Return booleans of an array, or of a file on the voxels of a volume; None stays."""
    if given is None:
        return None
    if isinstance(given, np.ndarray):
        return given > 0
    return on_disk.read_mask(expanded(given), shape)
