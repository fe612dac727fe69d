"""A network and a volume to probabilities: windows, blending, test-time augmentation."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from hydralv_tune.artifacts.records import FORMAT, load_checkpoint
from hydralv_tune.config.candidate import Candidate
from hydralv_tune.config.errors import CheckpointError, ConfigError, InputError, TrialFailed
from hydralv_tune.config.files import candidate_from_mapping
from hydralv_tune.numerics.networks.memory import is_out_of_memory
from hydralv_tune.numerics.networks.registry import (
    GROUPS,
    build_network,
    divisor,
    group_count,
    network_arguments,
)
from hydralv_tune.numerics.networks.weights import match_weights
from hydralv_tune.numerics.normalisation import Normalisation
from hydralv_tune.numerics.test_time_augmentation import (
    Transform,
    activate,
    distinct_transforms,
    join_transforms,
    unfit_turn,
)
from hydralv_tune.trial.fitted_normalisation import (
    as_it_was_trained,
    fit_image,
    padded_normalisation,
)
from hydralv_tune.trial.scoring.stitching import (
    BACKGROUND,
    Lane,
    Predictor,
    Size3,
    Span,
    Windows,
    predicted_sections,
)

Array = npt.NDArray[Any]
Probabilities = npt.NDArray[np.float16]
Progress = Callable[[int, int], None]

PAD_MODES = {"reflect": "reflect", "constant": "constant", "replicate": "edge", "circular": "wrap"}
"""Our padding modes as NumPy names them."""
CPU_WINDOWS = 4
"""Windows at once on a CPU where the candidate does not say: one at a time is the slowest way."""
VOLUME_SHARE = 0.5
"""Share of the free GPU memory that a layer of windows may take before it stays behind."""


def pick_device(name: str = "auto") -> torch.device:
    """Return the device of a name.

    Args:
        name: `auto` (a GPU where there is one), `cpu`, `cuda` or `cuda:N`.

    Raises:
        InputError: There is no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except (RuntimeError, ValueError) as error:
        raise InputError(f"device is '{name}', but must be auto, cpu, cuda or cuda:N.") from error
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"device is '{name}', but must be auto, cpu, cuda or cuda:N.")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= count:
        raise InputError(
            f"device is '{name}', but torch finds {count} GPUs here. Try --device cpu."
        )
    return device


def network_of(candidate: Candidate) -> nn.Module:
    """Return the untrained network that a candidate describes.

    Raises:
        ConfigError: The architecture is unknown, or a key of `model` does not fit it.
    """
    model = candidate.model.model_dump()
    try:
        return build_network(candidate.model.architecture, **network_arguments(model))
    except ValueError as error:
        raise ConfigError(f"model: {error}") from error


def load_network(
    checkpoint: str | Path, *, device: torch.device | str = "cpu"
) -> tuple[nn.Module, Candidate]:
    """Return the network of a checkpoint in evaluation mode, and the candidate it was trained as.

    Args:
        checkpoint: As a trial writes it: mapping with `format`, `version`, `candidate`,
            `weights`. Its weights are the averaged ones where the candidate asked for that.
        device: Where the network goes.

    Raises:
        CheckpointError: The file is missing, damaged, of another tool, or its weights do not fit.
    """
    members = load_members(checkpoint, device=device)
    if len(members) > 1:
        raise CheckpointError(
            f"{checkpoint}: holds an ensemble of {len(members)} networks, but one network is "
            "needed. Give best.ckpt of a trial, or an export of one."
        )
    return members[0].network, members[0].candidate


@dataclass(frozen=True)
class Member:
    """One network of a checkpoint.

    Args:
        network: In evaluation mode.
        candidate: What it was trained as.
        share: Its weight in the average of all; 1 where there is no other.
    """

    network: nn.Module
    candidate: Candidate
    share: float = 1.0


def load_members(
    checkpoint: str | Path, *, device: torch.device | str = "cpu", only: int | None = None
) -> list[Member]:
    """Return every network of a checkpoint: those of an ensemble, or the one of a trial.

    Args:
        checkpoint: As for `load_network`; that of an ensemble has `members` instead, each with
            `candidate`, `weights`, `version` and `share`.
        device: Where the networks go.
        only: Number of the one to load; all of them without.

    Raises:
        CheckpointError: As for `load_network`.
    """
    path = Path(checkpoint)
    content = load_checkpoint(path)
    if content.get("format") != FORMAT:
        other = "state_dict" in content
        hint = (
            " It holds a bare state_dict; fine-tune from it with model.external_weights_path."
            if other
            else " Give best.ckpt of a trial, or an exported checkpoint."
        )
        raise CheckpointError(f"{path}: is no checkpoint of hydralv-tune.{hint}")
    parts = content.get("members") or [content]
    return [
        _member(part, path, device)
        for number, part in enumerate(parts)
        if only is None or number == only
    ]


def _member(content: Mapping[str, Any], path: Path, device: torch.device | str) -> Member:
    """Return one network with the candidate that it was trained as."""
    mapping, weights = content.get("candidate"), content.get("weights")
    if not isinstance(mapping, Mapping) or not isinstance(weights, Mapping):
        raise CheckpointError(
            f"{path}: holds {sorted(map(str, content))}, but must hold candidate and weights. "
            "Give best.ckpt of a trial."
        )
    try:
        trained = as_it_was_trained(mapping)
        candidate = candidate_from_mapping(trained, place=f"{path}: candidate", base={})
        if content.get("version") == 1:
            _check_groups(candidate, path)
        network = network_of(candidate)
        match_weights(network, weights)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    # As in training: convolutions are up to 1.7 times faster in this order on a CPU.
    network.to(device).to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    return Member(network.eval(), candidate, float(content.get("share", 1.0)))


def _check_groups(candidate: Candidate, path: Path) -> None:
    """Refuse a checkpoint of version 1 whose group norm had other groups than it would have now.

    Raises:
        CheckpointError: A width has a larger divisor than the power of two that divided it.
    """
    widths = candidate.model.filters if candidate.model.norm == "group" else ()
    changed = [width for width in widths if math.gcd(GROUPS, width) != group_count(width)]
    if changed:
        raise CheckpointError(
            f"{path}: was trained by an earlier version, where norm group made "
            f"{math.gcd(GROUPS, changed[0])} groups of {changed[0]} channels; now it makes "
            f"{group_count(changed[0])}, so its outputs would differ. Train it again."
        )


class LowMemoryWarning(UserWarning):
    """Memory ran out, and the work goes on in smaller parts."""


@dataclass(frozen=True)
class _InMemory:
    """A padded volume, (z, y, x) float32, in memory."""

    array: Array

    def read(self, z: Span, y: Span, x: Span) -> Array:
        """Return the box between first and end places."""
        return self.array[slice(*z), slice(*y), slice(*x)]


@dataclass(frozen=True)
class _Job:
    """What does not change while a volume is predicted."""

    predictor: Predictor
    padded: _InMemory
    shape: Size3
    candidate: Candidate
    windows: Windows
    device: torch.device
    progress: Progress | None
    wanted: _InMemory | None


def plan_windows(shape: Sequence[int], candidate: Candidate) -> Windows:
    """Return how a volume of that shape is predicted.

    The volume is padded as in training (`data.pad_size`), then to a window at least.

    Args:
        shape: (z, y, x) of the volume.
        candidate: Its `inference.sliding_window`, `data.patch_size`, `data.pad_size`.

    Raises:
        ValueError: The window is no multiple of what the architecture needs.
    """
    window = candidate.inference.sliding_window
    size = window.window_size or candidate.data.patch_size
    needed = divisor(candidate.model.architecture, network_arguments(candidate.model.model_dump()))
    if any(s % d for s, d in zip(size, needed, strict=True)):
        near = tuple(max(1, round(s / d)) * d for s, d in zip(size, needed, strict=True))
        raise ValueError(
            f"inference.sliding_window.window_size is {tuple(size)} (z, y, x), but "
            f"{candidate.model.architecture} needs multiples of {needed}. Try {near}."
        )
    padded, before, count = [], [], 1
    for axis in range(3):
        whole = shape[axis] + 2 * candidate.data.pad_size[axis]
        extra = max(size[axis] - whole, 0)
        before.append(candidate.data.pad_size[axis] + extra // 2)
        padded.append(whole + extra)
        if padded[axis] > size[axis]:
            step = max(int(size[axis] * (1 - window.overlap)), 1)
            count *= math.ceil((padded[axis] - size[axis]) / step) + 1
    return Windows(
        shape=(padded[0], padded[1], padded[2]),
        before=(before[0], before[1], before[2]),
        size=size,
        overlap=window.overlap,
        count=count,
    )


def transforms_of(candidate: Candidate) -> tuple[Transform, ...]:
    """Return the transforms of a candidate's test-time augmentation; the identity where it is off.

    Raises:
        ValueError: An axis does not exist, or a turned window does not fit the architecture.
    """
    tta = candidate.inference.test_time_augmentation
    if not tta.enabled:
        return (Transform(),)
    transforms = distinct_transforms(tta.flip_axes, tta.rotation90_axes, tta.rotate90_k)
    size = candidate.inference.sliding_window.window_size or candidate.data.patch_size
    needed = divisor(candidate.model.architecture, network_arguments(candidate.model.model_dump()))
    turned = unfit_turn(transforms, size, needed)
    if turned is not None:
        raise ValueError(
            f"inference.test_time_augmentation.rotation90_axes turns the window {tuple(size)} "
            f"into {turned} (z, y, x), but {candidate.model.architecture} needs multiples of "
            f"{needed}. Try [[1, 2]]."
        )
    return transforms


def predict(
    network: nn.Module,
    image: Array,
    candidate: Candidate,
    *,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
    mask: Array | None = None,
    normalisation: Normalisation | None = None,
) -> Probabilities:
    """Return the probabilities of a volume.

    Args:
        network: As trained; its mode is left as it was.
        image: (Z, Y, X), raw intensities; normalised here as in training.
        candidate: Its `inference`, `data.image_transform` and `data.pad_size` are followed.
        device: Where the network is.
        progress: Called with (windows done, windows in all) after each batch.
        mask: (Z, Y, X); windows that it does not touch are not computed. Inside it the result
            is the same as without; windows left out are background.
        normalisation: Of the sections, where the image comes from `with_normalisation`; fitted on
            the image without.

    Returns:
        (3, Z, Y, X) float16: binary and boundary in [0, 1], distance in [-1, 1].

    Raises:
        ValueError: The image or the mask has a wrong shape, the window does not fit the
            architecture, or a key of the test-time augmentation is wrong.
        TrialFailed: The network gives values that are not finite, or one window does not fit
            into the GPU's memory.
    """
    _check_image(image)
    if mask is not None and mask.shape != image.shape:
        raise ValueError(f"mask has shape {mask.shape}, but the image has {image.shape}.")
    windows = plan_windows(image.shape, candidate)
    target = torch.device(device)
    job = _Job(
        predictor=window_predictor(network, candidate, transforms_of(candidate), target),
        padded=_InMemory(_padded(np.asarray(image), windows, candidate, normalisation)),
        shape=cast(Size3, image.shape),
        candidate=candidate,
        windows=windows,
        device=target,
        progress=progress,
        wanted=None if mask is None else _InMemory(_zero_padded(np.asarray(mask) > 0, windows)),
    )
    was_training = network.training
    network.eval()
    try:
        result = _within_memory(job)
    finally:
        network.train(was_training)
    if mask is not None and candidate.inference.test_time_augmentation.apply_mask:
        result[:, ~(np.asarray(mask) > 0)] = np.array(BACKGROUND, np.float16)[:, None]
    return result


def predict_members(
    members: Sequence[Member],
    image: Array,
    *,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
    mask: Array | None = None,
) -> Probabilities:
    """Return the probabilities of a volume: the weighted mean of what each network gives.

    Args:
        members: As `load_members` gives; each normalises and is cut as it was trained.
        image: As for `predict`.
        device: Where the networks are.
        progress: As for `predict`; windows of all networks are counted together.
        mask: As for `predict`.

    Returns:
        As `predict`; of a single network exactly that.

    Raises:
        ValueError: As for `predict`.
        TrialFailed: As for `predict`.
    """
    _check_image(image)
    counts = [plan_windows(image.shape, member.candidate).count for member in members]
    whole = sum(counts)
    maps = []
    for number, member in enumerate(members):
        before = sum(counts[:number])

        def count(done: int, _: int, before: int = before) -> None:
            if progress is not None:
                progress(before + done, whole)

        maps.append(
            predict(
                member.network, image, member.candidate, device=device, progress=count, mask=mask
            )
        )
    return maps[0] if len(maps) == 1 else averaged(maps, [member.share for member in members])


def _check_image(image: Array) -> None:
    """Refuse what is no volume."""
    if image.ndim != 3 or not image.size:
        raise ValueError(f"image has shape {image.shape}, but must be (Z, Y, X).")


def averaged(maps: Sequence[Array], shares: Sequence[float]) -> Probabilities:
    """Return the weighted mean of probabilities, (3, Z, Y, X) float16.

    Args:
        maps: (3, Z, Y, X) each.
        shares: Weight of each; they add up to 1.
    """
    total = np.zeros(maps[0].shape, np.float32)
    for one, share in zip(maps, shares, strict=True):
        total += np.float32(share) * one.astype(np.float32)
    return total.astype(np.float16)


def _within_memory(job: _Job) -> Probabilities:
    """Return the probabilities; windows at once are halved while the GPU's memory runs out."""
    window = job.candidate.inference.sliding_window
    batch = window.sw_batch_size or max(
        job.candidate.system.inference.batch_size, CPU_WINDOWS if job.device.type == "cpu" else 1
    )
    while True:
        try:
            return _stitched(job, batch)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            if batch == 1:
                raise TrialFailed(
                    "prediction",
                    f"out of memory with window {job.windows.size}. Try a smaller "
                    "inference.sliding_window.window_size",
                    retry=True,
                ) from error
        # Outside the handler: the exception holds the tensors that are to be freed.
        if job.device.type == "cuda":
            torch.cuda.empty_cache()
        warnings.warn(
            f"out of memory in prediction: {batch} windows at once lowered to {batch // 2}",
            LowMemoryWarning,
            stacklevel=2,
        )
        batch //= 2


def window_predictor(
    network: nn.Module, candidate: Candidate, transforms: Sequence[Transform], device: torch.device
) -> Callable[[Tensor], Tensor]:
    """Return what turns windows (B, 1, z, y, x) into probabilities (B, 3, z, y, x), float32.

    Args:
        network: In evaluation mode.
        candidate: Its precision and test-time augmentation are followed.
        transforms: Of the test-time augmentation.
        device: Where the network is.
    """
    tta = candidate.inference.test_time_augmentation
    mixed = device.type == "cuda" and candidate.optimization.precision == "bf16-mixed"

    def probabilities(inputs: Tensor) -> Tensor:
        # For a single narrow item on a single thread, torch leaves oneDNN for a convolution that
        # is ten times slower (719 ms for a window of the smoke network, 67 ms among others).
        alone = len(inputs) == 1 and device.type == "cpu" and torch.get_num_threads() == 1
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=mixed):
            logits = network(inputs.expand(2, -1, -1, -1, -1) if alone else inputs)
        return activate(logits[: len(inputs)].float(), tta.channel_activations)

    return lambda inputs: join_transforms(probabilities, inputs, transforms, tta.ensemble_mode)


def _stitched(job: _Job, batch: int) -> Probabilities:
    """Return the probabilities of the volume, (3, z, y, x)."""
    windows, device = job.windows, job.device
    done = 0

    def count(more: int) -> None:
        nonlocal done
        done += more
        if job.progress is not None and more:
            job.progress(done, windows.count)

    # A layer stays on the host where it would crowd the network out.
    home = device if _fits(windows, device) else torch.device("cpu")
    result = np.empty((3, *job.shape), np.float16)
    wanted = job.wanted
    for first, values in predicted_sections(
        job.padded, job.candidate, windows, Lane((0, 0, 0), job.shape), predictor=job.predictor,
        wanted=lambda z, y, x: None if wanted is None else wanted.read(z, y, x), batch=batch,
        device=device, progress=count, home=home,
    ):  # fmt: skip
        result[:, first : first + values.shape[1]] = values
    return result


def _fits(windows: Windows, device: torch.device) -> bool:
    """Return whether a layer of windows with its sums leaves the GPU room for a network."""
    if device.type != "cuda":
        return True
    needed = windows.size[0] * math.prod(windows.shape[1:]) * 4 * (1 + 2 * 3 + 1)
    return needed < VOLUME_SHARE * torch.cuda.mem_get_info(device)[0]


def _padded(
    image: Array, windows: Windows, candidate: Candidate, normalisation: Normalisation | None
) -> Array:
    """Return the normalised volume, padded as in training, then to a window at least."""
    data = candidate.data
    fitted = normalisation
    if fitted is None:
        image, fitted = fit_image(image, data)
    # Intensities are padded before they are normalised: a rim of 0 is black, not average.
    context = _pad(image, [(p, p) for p in data.pad_size], data.pad_mode)
    volume = padded_normalisation(fitted, data.pad_size[0], data.pad_mode).apply(context)
    rest = [
        (before - pad, whole - side - (before - pad))
        for before, pad, whole, side in zip(
            windows.before, data.pad_size, windows.shape, context.shape, strict=True
        )
    ]
    mode = candidate.inference.sliding_window.padding_mode
    return np.ascontiguousarray(_pad(volume, rest, mode))


def _pad(volume: Array, widths: Sequence[tuple[int, int]], mode: str) -> Array:
    """Return the padded volume."""
    return np.pad(volume, widths, mode=cast(Any, PAD_MODES[mode]))


def _zero_padded(mask: Array, windows: Windows) -> Array:
    """Return the mask in the padded volume, where padding is not wanted."""
    result = np.zeros(windows.shape, bool)
    result[
        tuple(slice(b, b + side) for b, side in zip(windows.before, mask.shape, strict=True))
    ] = mask
    return result
