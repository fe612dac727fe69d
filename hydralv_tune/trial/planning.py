"""What a candidate would do with a volume: steps, patches, hours, and the patches to look at."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy import ndimage

from hydralv_tune.artifacts.writing import write_atomically
from hydralv_tune.config.candidate import Candidate, EarlyStopping
from hydralv_tune.config.errors import ConfigError, InputError, TrialFailed, as_input_error
from hydralv_tune.config.explanation import without_effect
from hydralv_tune.data.volumes import Volume
from hydralv_tune.numerics.augmentation.augment import augment
from hydralv_tune.numerics.augmentation.patches import Patches
from hydralv_tune.numerics.augmentation.registry import resolve_preset
from hydralv_tune.numerics.networks.memory import training_bytes
from hydralv_tune.numerics.networks.registry import divisor, network_arguments
from hydralv_tune.numerics.networks.weights import parameter_count
from hydralv_tune.numerics.randomness import seeded
from hydralv_tune.numerics.targets import derive_targets
from hydralv_tune.trial.scoring.prediction import network_of, pick_device
from hydralv_tune.trial.training.loop import Trainer, build_loss
from hydralv_tune.trial.training.optimization import step_plan
from hydralv_tune.trial.training.sampling import (
    PatchSampler,
    ResidentVolume,
    boundary_arguments,
    check_patch_fits,
)

TIMING_S = 10.0
LOOKED_AT = 400
"""Patches drawn to say how many hold foreground."""

SHEET_PATCHES = 6
SHEET_NAME = "patches.png"
FEW_WITH_FOREGROUND = 0.5
MOST_TIMED_STEPS = 5


@dataclass(frozen=True)
class Timing:
    """What a step costs here.

    Args:
        device: Where it was timed.
        seconds_per_step: Of one optimizer step, without evaluations.
        scaled: Whether it was scaled up from a smaller batch or patch, a whole one being too slow
            to time.
    """

    device: str
    seconds_per_step: float
    scaled: bool


def plan_facts(
    candidate: Candidate, volume: Volume, *, timing_s: float = TIMING_S
) -> dict[str, Any]:
    """Return what training the candidate on the volume amounts to.

    `plan_warnings` are sentences with a next step. `steps_per_s`, `hours` and `timed_on` are None
    where nothing can be timed: no label, or a patch larger than the volume.

    Args:
        candidate: What would be trained.
        volume: What it would be trained on.
        timing_s: About how long to time steps.
    """
    plan = step_plan(candidate)
    warnings: list[str] = []
    with seeded(candidate.system.seed, torch.device("cpu")):
        network = network_of(candidate)
    facts: dict[str, Any] = {
        "candidate": candidate.experiment_name,
        "architecture": candidate.model.architecture,
        "parameters": parameter_count(network),
        "training_memory_gb": training_memory_gb(candidate, network),
        "effective_batch": plan.effective_batch,
        "optimizer_steps_per_epoch": plan.steps_per_epoch,
        "patches_per_epoch": plan.patches_per_epoch,
        "epochs": plan.epochs,
        "optimizer_steps": plan.steps,
        "keys_without_effect": without_effect(candidate),
        "patch_size": list(candidate.data.patch_size),
        "instance_extent_voxels": None,
        "patches_with_foreground": None,
        "foreground_in_patches": None,
        "steps_per_s": None,
        "hours": None,
        "timed_on": None,
        "plan_warnings": warnings,
    }
    if volume.label is None:
        warnings.append("Without a label no patch can be drawn or timed. Add --label.")
        return facts
    facts["instance_extent_voxels"] = _extents(candidate, volume.label, warnings)
    try:
        source = _source(candidate, volume, pick_device("auto"))
    except ConfigError as error:
        warnings.append(str(error))
        return facts
    facts |= _foreground_facts(candidate, source, warnings)
    timing = _time_steps(candidate, source, network, timing_s, warnings)
    if timing is not None:
        facts |= {
            "steps_per_s": float(f"{1 / timing.seconds_per_step:.3g}"),
            "hours": float(f"{plan.steps * timing.seconds_per_step / 3600:.3g}"),
            "timed_on": timing.device + (", scaled from a smaller step" if timing.scaled else ""),
        }
    return facts


def training_memory_gb(candidate: Candidate, network: torch.nn.Module) -> float:
    """Return the least memory that a micro-batch takes, from a step that only counts.

    Args:
        candidate: With its batch, patch and losses.
        network: Its network.
    """
    settings = candidate.optimization
    counted = training_bytes(
        deepcopy(network).to("meta").train(),
        build_loss(candidate.model).to("meta"),
        batch=candidate.system.training.batch_size,
        patch_size=candidate.data.patch_size,
        averaged=settings.ema.enabled,
        mixed=settings.precision == "bf16-mixed" and torch.cuda.is_available(),
    )
    return float(f"{counted / 1e9:.3g}")


def draw_patches(candidate: Candidate, volume: Volume, out: str | Path) -> Path:
    """Draw augmented patches with their targets, as the network would get them, and return the PNG.

    Args:
        candidate: Its patch size, sampling, augmentation and targets.
        volume: With a label.
        out: Folder for `patches.png`.

    Raises:
        InputError: There is no label, or the patch is larger than the volume.
    """
    if volume.label is None:
        raise InputError(
            f"Volume '{volume.name}': patches cannot be drawn without a label. Add --label."
        )
    seed = candidate.system.seed
    source = _source(candidate, volume, torch.device("cpu"))
    sampler = _sampler(candidate, source)
    starts = np.array([start for _, start in sampler.draw_places(SHEET_PATCHES)], np.int64)
    plain = source.cut(starts, sampler.size)
    with as_input_error("data.augmentation"):
        chosen = candidate.data.augmentation
        augmentation = resolve_preset(chosen.preset, chosen.settings)
    drawn: list[list[str]] = [[] for _ in range(len(plain))]
    patches = augment(plain, augmentation, torch.Generator().manual_seed(seed + 1), drawn)
    targets = derive_targets(patches.labels, patches.edt, **boundary_arguments(candidate.data))
    first = [int(z) - candidate.data.pad_size[0] for z in starts[:, 0]]
    figure = _sheet(plain, patches, targets.numpy(), first, drawn)
    figure.suptitle(
        f"{volume.name}, {candidate.experiment_name or 'candidate'}: patches as they are cut and "
        f"as the network gets them (preset {chosen.preset})\n"
        "orange: outline of the label, and of its binary target; blue: border of the mask",
        fontsize=9,
    )
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    path = Path(out) / SHEET_NAME
    write_atomically(path, buffer.getvalue())
    return path


def _source(candidate: Candidate, volume: Volume, device: torch.device) -> ResidentVolume:
    """Return the volume on the device, having checked that a patch fits into it."""
    source = ResidentVolume(volume, candidate.data, device, candidate.system.seed)
    check_patch_fits(volume.name, source.places.shape, candidate.data.patch_size)
    return source


def _sampler(
    candidate: Candidate,
    source: ResidentVolume,
    *,
    foreground_share: float | None = None,
    patch_size: Sequence[int] | None = None,
) -> PatchSampler:
    """Return a sampler as training uses it, its share or size replaced where given."""
    share = candidate.data.sampling.foreground_share
    return PatchSampler(
        [source],
        patch_size=candidate.data.patch_size if patch_size is None else patch_size,
        foreground_share=share if foreground_share is None else foreground_share,
        seed=candidate.system.seed,
    )


def instance_reach(label: np.ndarray) -> np.ndarray:
    """Return how far each instance reaches along z, y, x in voxels, (instances, 3).

    Args:
        label: (Z, Y, X), 0 for background.
    """
    # Numbered anew: `find_objects` has a place for every id up to the largest.
    ids, numbers = np.unique(label, return_inverse=True)
    boxes = ndimage.find_objects(numbers.reshape(label.shape) + (1 if ids[0] > 0 else 0))
    return np.asarray([[side.stop - side.start for side in box] for box in boxes])


def _extents(
    candidate: Candidate, label: np.ndarray, warnings: list[str]
) -> dict[str, list[float]]:
    """Return how far instances reach along z, y, x; warn where a patch is too small for them."""
    reach = instance_reach(label)
    median, largest = np.median(reach, axis=0), reach.max(axis=0)
    patch = np.asarray(candidate.data.patch_size)
    for axis, name in enumerate("zyx"):
        if patch[axis] < median[axis]:
            warnings.append(
                f"The patch has {patch[axis]} voxels along {name}, less than the median instance "
                f"({median[axis]:.0f}): most are never seen whole. Set a larger data.patch_size."
            )
        elif patch[axis] < largest[axis]:
            count = int((reach[:, axis] > patch[axis]).sum())
            warnings.append(
                f"The patch has {patch[axis]} voxels along {name}, but {count} of {len(reach)} "
                f"instances reach further (up to {largest[axis]}). A larger data.patch_size would "
                "show them whole."
            )
    return {"median": median.tolist(), "max": largest.tolist()}


def _foreground_facts(
    candidate: Candidate, source: ResidentVolume, warnings: list[str]
) -> dict[str, Any]:
    """Return the share of patches that hold foreground: at random, and as the candidate samples."""
    size = candidate.data.patch_size
    shares: dict[str, float] = {}
    filled = 0.0
    counted = source.label > 0
    if source.mask is not None:
        counted &= source.mask
    for name, share in (("random", 0.0), ("as_sampled", None)):
        sampler = _sampler(candidate, source, foreground_share=share)
        voxels = np.asarray(
            [
                int(counted[z : z + size[0], y : y + size[1], x : x + size[2]].sum())
                for _, (z, y, x) in sampler.draw_places(LOOKED_AT)
            ]
        )
        shares[name] = round(float((voxels > 0).mean()), 3)
        filled = round(float(voxels.mean() / np.prod(size)), 5)
    if shares["as_sampled"] < FEW_WITH_FOREGROUND:
        warnings.append(
            f"Only {shares['as_sampled']:.0%} of the patches hold a labelled voxel. Raise "
            "data.sampling.foreground_share, for example to 0.5."
        )
    return {"patches_with_foreground": shares, "foreground_in_patches": filled}


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Let torch use as many CPU threads as a trial of the candidate would."""
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _time_steps(
    candidate: Candidate,
    source: ResidentVolume,
    network: torch.nn.Module,
    budget_s: float,
    warnings: list[str],
) -> Timing | None:
    """Return what a step costs, timed on ever larger parts of one as far as the time allows.

    A step of a large network takes minutes on a CPU and cannot be cut short, so the next part is
    begun only where the last one says that it fits.
    """
    device = source.device
    network.to(device).to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    end = time.perf_counter() + budget_s
    measured: list[_Part] = []
    with _threads(candidate.system.cpu_threads):
        for patch, batch, accumulate in _parts(candidate):
            voxels = float(batch * accumulate * np.prod(patch))
            left_s = end - time.perf_counter()
            # Two parts at least: with one, what grows cannot be told from what is fixed.
            if len(measured) > 1 and _predicted_s(measured, voxels) > left_s / 2:
                break
            trainer = _part_trainer(candidate, source, network, patch, batch, accumulate)
            try:
                measured.append(_timed(trainer, voxels, left_s))
            except TrialFailed as error:
                warnings.append(f"Steps could not be timed: {error}.")
                break
    if not measured:
        return None
    whole = step_plan(candidate).effective_batch * float(np.prod(candidate.data.patch_size))
    return Timing(
        device=_device_name(device),
        seconds_per_step=_predicted_s(measured, whole),
        scaled=measured[-1].voxels < whole,
    )


@dataclass(frozen=True)
class _Part:
    """What a part of a step took."""

    voxels: float
    seconds: float


def _predicted_s(measured: Sequence[_Part], voxels: float) -> float:
    """Return what a step of so many voxels takes: the line through the last two parts."""
    last = measured[-1]
    if last.voxels == voxels or len(measured) == 1:
        return last.seconds * voxels / last.voxels
    first = measured[-2]
    slope = (last.seconds - first.seconds) / (last.voxels - first.voxels)
    # A second measurement that came out quicker is noise; then all is taken to grow.
    if slope <= 0:
        slope = last.seconds / last.voxels
    return last.seconds + slope * (voxels - last.voxels)


def _timed(trainer: Trainer, voxels: float, left_s: float) -> _Part:
    """Return what a step of the trainer takes: the mean of a few after one to warm up.

    Where the first one already takes a quarter of the time that is left, it counts itself.
    """
    start = time.perf_counter()
    trainer.run_to(1)
    seconds = time.perf_counter() - start
    if seconds < left_s / 4:
        steps, start = 0, time.perf_counter()
        while steps < MOST_TIMED_STEPS and time.perf_counter() - start < left_s / 4:
            trainer.run_to(trainer.step + 1)
            steps += 1
        if trainer.device.type == "cuda":
            torch.cuda.synchronize(trainer.device)
        seconds = (time.perf_counter() - start) / steps
    return _Part(voxels, seconds)


def _parts(candidate: Candidate) -> list[tuple[tuple[int, ...], int, int]]:
    """Return parts of a step, smallest first: patch, batch, accumulation; the last is a whole."""
    model = candidate.model
    multiple = divisor(model.architecture, network_arguments(model.model_dump()))
    full = tuple(candidate.data.patch_size)
    quarter, half = (
        tuple(
            min(side, max(2 * m, side // share // m * m))
            for side, m in zip(full, multiple, strict=True)
        )
        for share in (4, 2)
    )
    plan = step_plan(candidate)
    # Twice the multiple: a batch norm at the coarsest level needs more than one voxel.
    least = tuple(min(side, 2 * m) for side, m in zip(full, multiple, strict=True))
    parts = [(patch, 1, 1) for patch in (least, quarter, half, full)]
    parts += [(full, plan.batch_size, 1), (full, plan.batch_size, plan.accumulate)]
    return list(dict.fromkeys(parts))


def _part_trainer(
    candidate: Candidate,
    source: ResidentVolume,
    network: torch.nn.Module,
    patch: Sequence[int],
    batch: int,
    accumulate: int,
) -> Trainer:
    """Return a trainer of the candidate with a part of its batch and patch.

    It never stops early: steps that are not taken would be timed as free.
    """
    training = candidate.system.training.model_copy(update={"batch_size": batch})
    part = candidate.model_copy(
        update={
            "system": candidate.system.model_copy(update={"training": training}),
            "optimization": candidate.optimization.model_copy(
                update={"accumulate_grad_batches": accumulate}
            ),
            "monitor": candidate.monitor.model_copy(update={"early_stopping": EarlyStopping()}),
        }
    )
    sampler = _sampler(candidate, source, patch_size=patch)
    return Trainer(part, network, sampler, source.device, seed=candidate.system.seed)


def _device_name(device: torch.device) -> str:
    """Return the GPU's name, or how many CPU threads there are."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} CPU threads"


def _sheet(
    plain: Patches,
    patches: Patches,
    targets: np.ndarray,
    first: Sequence[int],
    drawn: Sequence[Sequence[str]],
) -> Figure:
    """Return a row for each patch: as cut, augmented, and the three targets of one section.

    Args:
        plain: The patches as cut.
        patches: The same, augmented.
        targets: (B, 3, Z, Y, X).
        first: The section of the volume in which each patch begins.
        drawn: The augmentations of each patch.
    """
    titles = ("label, as cut", "target, augmented", "binary", "boundary", "distance")
    count = patches.image.shape[0]
    figure = Figure(figsize=(2.3 * len(titles), 2.75 * count + 0.8), layout="constrained")
    grid = figure.subplots(count, len(titles), squeeze=False)
    low, high = np.quantile(plain.image[..., ::2, ::2].numpy(), (0.005, 0.995))
    for row in range(count):
        label, valid = patches.labels[row].numpy(), patches.mask[row].numpy()
        z = _fullest(label, valid)
        before, known = plain.labels[row].numpy(), plain.mask[row].numpy()
        cut = _fullest(before, known)
        shown = [
            (plain.image[row, 0, cut].numpy(), "gray", low, high),
            (patches.image[row, 0, z].numpy(), "gray", low, high),
            (targets[row, 0, z], "gray", 0.0, 1.0),
            (targets[row, 1, z], "gray", 0.0, 1.0),
            (targets[row, 2, z], "cividis", -1.0, 1.0),
        ]
        outlines = {0: before[cut] > 0, 1: targets[row, 0, z] > 0.5}
        for column, (values, colours, lowest, highest) in enumerate(shown):
            axes = grid[row, column]
            axes.imshow(values, cmap=colours, vmin=lowest, vmax=highest, interpolation="nearest")
            where = known[cut] if column == 0 else valid[z]
            if where.any() and not where.all():
                axes.contour(where, levels=[0.5], colors="#56B4E9", linewidths=0.8)
            if column in outlines and outlines[column].any() and not outlines[column].all():
                axes.contour(outlines[column], levels=[0.5], colors="#E69F00", linewidths=0.9)
            axes.set_axis_off()
        grid[row, 0].set_title(f"{titles[0]}\nsection {first[row] + cut}", fontsize=7)
        names = fill(", ".join(drawn[row]) or "nothing drawn", 34)
        grid[row, 1].set_title(f"{titles[1]}\n{names}", fontsize=7)
        for column in (2, 3, 4):
            grid[row, column].set_title(f"{titles[column]}\n", fontsize=7)
    return figure


def _fullest(label: np.ndarray, valid: np.ndarray) -> int:
    """Return the section with most labelled voxels, or else the one with most valid ones."""
    labelled = ((label > 0) & valid).sum(axis=(1, 2))
    return int(np.argmax(labelled if labelled.any() else valid.sum(axis=(1, 2))))
