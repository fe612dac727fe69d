"""The blocks of a PyTorch Connectomics configuration that its schemas share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hydralv_tune.config.candidate import Candidate, Model
from hydralv_tune.config.pytc_portability import VOXEL_WEIGHTED
from hydralv_tune.data.volumes import VolumePaths
from hydralv_tune.numerics.augmentation.registry import AUGMENTATIONS, resolve_preset
from hydralv_tune.numerics.networks.registry import GROUPS, group_count

PEER_AUGMENTATIONS: dict[str, tuple[str, ...]] = {
    "flip": ("prob", "spatial_axis"),
    "rotate": ("prob", "spatial_axes"),
    "affine": ("prob", "rotate_range", "scale_range", "shear_range"),
    "elastic": ("prob", "sigma_range", "magnitude_range"),
    "intensity": (
        "gaussian_noise_prob", "gaussian_noise_std", "shift_intensity_prob",
        "shift_intensity_offset", "contrast_prob", "contrast_range",
    ),
    "misalignment": ("prob", "displacement", "rotate_ratio"),
    "missing_section": (
        "prob", "num_sections", "full_section_prob", "partial_ratio_range", "fill_value_range",
    ),
    "motion_blur": ("prob", "sections", "kernel_size"),
    "cut_noise": ("prob", "length_ratio", "noise_scale"),
    "cut_blur": ("prob", "length_ratio", "down_ratio_range", "downsample_z"),
    "copy_paste": ("prob", "max_obj_ratio", "rotation_angles", "border"),
}  # fmt: skip
"""The augmentations that tool knows and the knobs we share with it."""

SINGLE_IN_JANUARY = {
    "cut_blur": ("length_ratio",),
    "cut_noise": ("length_ratio", "noise_scale"),
    "motion_blur": ("sections",),
    "missing_section": ("num_sections",),
}
"""Knobs that are pairs here and one number in the schema of January 2026."""
PEER_LEVELS = 5
"""Its RSUNet has four heads beside the output, so deep supervision fails with more levels."""
WEIGHTED_FORMS = {
    "BCEWithLogitsLoss": "WeightedBCEWithLogitsLoss",
    "MSELoss": "WeightedMSELoss",
    "L1Loss": "WeightedMAELoss",
}
"""Losses whose `tanh`, `pos_weight` and mask only that tool's weighted form takes; else equal."""
OVER_ALL_VOXELS = ("FocalLoss", "DiceCELoss", "DiceFocalLoss")
"""Losses whose mean counts the voxels outside the mask too, as zeros, in today's version."""
DEFAULT_ON = ("flip", "rotate", "intensity")
"""What that tool does unless it is switched off."""


@dataclass(frozen=True)
class PeerData:
    """What a configuration names beside the candidate.

    Args:
        volumes: Where the volumes of the study lie.
        voxel_size_nm: (z, y, x), where known.
        weights: Path of the weights, as the configuration names it; None where they cannot go.
        experiment: Name of the experiment.
        description: One line.
        normalised: Whether the images are written as the network sees them.
        drops_exact_size: Whether its scikit-image (0.26 or later) drops segments of exactly
            `min_instance_size` voxels.
        outputs: Folder of its predictions; None: it names one after the configuration file.
    """

    volumes: Sequence[VolumePaths]
    voxel_size_nm: Sequence[float] | None
    weights: str | None
    experiment: str
    description: str
    normalised: bool = False
    drops_exact_size: bool = False
    outputs: str | None = None


def augmentation_blocks(candidate: Candidate, notes: list[str]) -> dict[str, Any]:
    """Return every augmentation written out, off ones too, since some are on there by default."""
    chosen = resolve_preset(
        candidate.data.augmentation.preset, candidate.data.augmentation.settings
    )
    blocks: dict[str, Any] = {}
    for name in AUGMENTATIONS:
        if name not in chosen:
            if name in PEER_AUGMENTATIONS:
                blocks[name] = {"enabled": False}
            continue
        if name not in PEER_AUGMENTATIONS:
            notes.append(f"Augmentation '{name}' does not exist there.")
            continue
        knobs = {k: v for k, v in dict(chosen[name]).items() if k != "enabled"}
        shared = {k: listed(v) for k, v in knobs.items() if k in PEER_AUGMENTATIONS[name]}
        lost = sorted(k for k in set(knobs) - set(shared) if knobs[k] is not None)
        if lost and not (name == "intensity" and lost == ["prob"]):
            notes.append(f"Augmentation '{name}': {', '.join(lost)} not carried over.")
        blocks[name] = {"enabled": True, **shared}
    for name in DEFAULT_ON:
        blocks.setdefault(name, {"enabled": False})
    return blocks


def with_ranges(blocks: dict[str, Any]) -> dict[str, Any]:
    """Return the blocks with the number of blurred sections as the range that tool takes."""
    blur = blocks.get("motion_blur", {})
    if isinstance(blur.get("sections"), int):
        blocks["motion_blur"] = {**blur, "sections": [blur["sections"], blur["sections"]]}
    return blocks


def with_numbers(blocks: dict[str, Any]) -> dict[str, Any]:
    """Return the blocks with single numbers where January's schema has no pairs: the upper one."""
    for name, knobs in SINGLE_IN_JANUARY.items():
        block = blocks.get(name, {})
        for knob in knobs:
            if isinstance(block.get(knob), list):
                block[knob] = block[knob][-1]
    return blocks


def listed(value: Any) -> Any:
    """Return tuples as lists."""
    return [listed(entry) for entry in value] if isinstance(value, list | tuple) else value


def depth_weights(candidate: Candidate) -> list[float] | None:
    """Return the weights of deep supervision in the order in which that tool hands them out.

    It gives the first to the finest output and the rest to the heads from the deepest on, so
    ours, which go from fine to coarse, are turned around after the first.
    """
    model = candidate.model
    if not deeply_supervised(candidate):
        return None
    levels = len(model.filters)
    weights = list(model.deep_supervision_weights or [0.5**level for level in range(levels)])
    return weights[:1] + weights[:0:-1]


def peer_losses(
    candidate: Candidate, notes: list[str], *, today: bool
) -> list[tuple[str, dict[str, Any], float | str | None]]:
    """Return name, arguments and `pos_weight` of each loss, as that tool has to be told them.

    Args:
        candidate: What was trained.
        notes: Takes what cannot be told.
        today: Whether for today's version, which weighs voxels by `pos_weight` beside the
            arguments; January's has it among the arguments of one loss.
    """
    model = candidate.model
    terms: list[tuple[str, dict[str, Any], float | str | None]] = []
    for index, ours in enumerate(model.loss_functions):
        given = model.loss_kwargs[index] if index < len(model.loss_kwargs) else {}
        name = WEIGHTED_FORMS.get(ours, ours)
        own = {key: listed(value) for key, value in given.items() if value is not None}
        if name.startswith(("Dice", "Tversky")):
            # Its default is False: the overlap of logits.
            own.setdefault("sigmoid", True)
        foreground, positive = own.pop("foreground_weight", None), own.pop("pos_weight", None)
        if foreground is not None and name == "WeightedBCEWithLogitsLoss" and positive is None:
            positive, foreground = foreground, None
            notes.append(
                f"{ours}: foreground_weight is written as pos_weight; voxels weigh the same, but "
                "its mean divides by their number, not by their weights."
            )
        if today and name in VOXEL_WEIGHTED:
            positive, foreground = 1.0 if foreground is None else foreground, None
            if isinstance(positive, float | int) and positive != 1:
                notes.append(
                    f"{ours}: foreground_weight is written as pos_weight; its mean divides by the "
                    "number of voxels, not by their weights."
                )
        if foreground is not None:
            notes.append(f"{ours}: foreground_weight {foreground} not carried over.")
        if isinstance(positive, str) and today:
            positive = "auto"
            notes.append(f"{ours}: it balances foreground by a factor of 10 at most, ours by 100.")
        elif isinstance(positive, str):
            positive = None
            notes.append(
                f"{ours}: foreground is not balanced there, since that version counts no batch; "
                "pos_weight takes a number."
            )
        terms.append((name, own, positive))
    return terms


def loss_entries(candidate: Candidate, notes: list[str]) -> list[dict[str, Any]]:
    """Return the loss terms with their channels, as today's version takes them."""
    model = candidate.model
    terms = peer_losses(candidate, notes, today=True)
    entries = []
    for first, end, _, indices in model.multi_task_config:
        for index in indices:
            name, own, positive = terms[index]
            entry: dict[str, Any] = {"function": name, "weight": model.loss_weights[index]}
            if positive is not None:
                entry["pos_weight"] = positive
            entry["kwargs"] = own
            entry["pred_slice"] = entry["target_slice"] = f"{first}:{end}"
            entries.append(entry)
    return entries


def deeply_supervised(candidate: Candidate) -> bool:
    """Return whether that tool can train the coarser levels too: its RSUNet of up to 5 levels."""
    model = candidate.model
    return (
        model.deep_supervision
        and model.architecture == "rsunet"
        and len(model.filters) <= PEER_LEVELS
    )


def rsunet_block(model: Model) -> dict[str, Any]:
    """Return the keys of its RSUNet, without their prefix.

    Its instance norm learns nothing, so ours goes as group norm with a channel in each group; its
    kernels are 3 but in the first `depth_2d` levels, which may be all of them.
    """
    block: dict[str, Any] = {"norm": model.norm or "batch"}
    if model.norm == "instance":
        block |= {"norm": "group", "num_groups": max(model.filters)}
    elif model.norm == "group":
        block["num_groups"] = model.num_groups or GROUPS
    factors = model.down_factors or [[1, 2, 2]] * (len(model.filters) - 1)
    block |= {"activation": model.activation or "relu", "down_factors": listed(factors)}
    kernel = model.kernel_size or 3
    kernels = [kernel] * 3 if isinstance(kernel, int) else list(kernel)
    if kernels != [3, 3, 3]:
        return {**block, "depth_2d": len(model.filters), "kernel_2d": kernels}
    if model.depth_2d:
        return {
            **block,
            "depth_2d": model.depth_2d,
            "kernel_2d": list(model.kernel_2d or (1, 3, 3)),
        }
    return {**block, "depth_2d": 0}


def monai_block(model: Model) -> dict[str, Any]:
    """Return the keys of its MONAI networks: what is said nowhere else is said here."""
    basic = model.architecture == "monai_basic_unet3d"
    filters = list(model.filters)
    if basic and len(filters) == 5:
        # That tool repeats the last width, MONAI's way here is the first.
        filters.append(filters[0])
    block: dict[str, Any] = {"filters": filters, "norm": model.norm or "instance"}
    block["dropout"] = model.dropout or 0.0
    units = 2 if model.num_res_units is None else model.num_res_units
    if model.norm == "group":
        logits = [model.out_channels] if not basic and units else []
        common = math.gcd(*filters, *logits)
        block["num_groups"] = group_count(common, model.num_groups or GROUPS)
    if basic:
        block["activation"] = model.activation or "relu"
        block["upsample"] = model.upsample or "deconv"
        return block
    kernel = model.kernel_size or 3
    block["num_res_units"] = units
    block["kernel_size"] = kernel if isinstance(kernel, int) else kernel[0]
    return block


def network_block(candidate: Candidate) -> dict[str, Any]:
    """Return today's `arch` block and the block of the architecture."""
    model = candidate.model
    if model.architecture == "rsunet":
        block = {"width": list(model.filters), **rsunet_block(model)}
        return {"arch": {"type": "rsunet"}, "rsunet": block}
    if model.architecture == "mednext":
        block = {"size": model.mednext_size or "S", "kernel_size": model.mednext_kernel_size or 3}
        return {"arch": {"type": "mednext"}, "mednext": block}
    block = monai_block(model)
    if "upsample" in block:
        block["upsample_mode"] = block.pop("upsample")
    return {"arch": {"type": model.architecture}, "monai": block}


def paths_of(data: PeerData, key: str) -> Any:
    """Return one path, or a list where there are several volumes; None where any has none."""
    paths = [getattr(volume, key) for volume in data.volumes]
    if not paths or None in paths:
        return None
    return paths[0] if len(paths) == 1 else paths


def data_block(data: PeerData) -> dict[str, Any]:
    """Return the block that names the volumes."""
    block = {key: paths_of(data, key) for key in ("image", "label", "mask")}
    block["resolution"] = list(data.voxel_size_nm) if data.voxel_size_nm is not None else None
    return {key: value for key, value in block.items() if value is not None}


def _scheduler(candidate: Candidate) -> dict[str, Any]:
    """Return the schedule; a constant one is a cosine from the rate to the rate."""
    scheduler = candidate.optimization.scheduler
    constant = scheduler.name == "constant"
    return {
        "name": "WarmupCosineLR",
        "warmup_epochs": scheduler.warmup_epochs,
        "warmup_start_lr": scheduler.warmup_start_lr,
        "min_lr": candidate.optimization.optimizer.lr if constant else scheduler.min_lr,
    }


def optimization_block(candidate: Candidate, *, head: bool) -> dict[str, Any]:
    """Return the `optimization` block."""
    own = candidate.optimization
    patches = candidate.data.iter_num_per_epoch
    a_step = candidate.system.training.batch_size * own.accumulate_grad_batches
    steps = {"n_steps_per_epoch": max(1, round(patches / a_step))} if head else {}
    scheduler = _scheduler(candidate)
    return {
        "max_epochs": own.max_epochs,
        **steps,
        "gradient_clip_val": own.gradient_clip_val,
        "accumulate_grad_batches": own.accumulate_grad_batches,
        "precision": own.precision,
        "optimizer": own.optimizer.model_dump(mode="json"),
        "scheduler": {**scheduler, "name": "warmupcosine"} if head else scheduler,
        "ema": own.ema.model_dump(mode="json"),
    }


def monitor_block(candidate: Candidate) -> dict[str, Any]:
    """Return the `monitor` block."""
    stopping = candidate.monitor.early_stopping.model_dump(mode="json")
    watched = "train_loss_total_epoch"
    return {
        "checkpoint": {"monitor": watched, "mode": "min", "save_top_k": 3, "save_last": True},
        "early_stopping": {k: v for k, v in stopping.items() if v is not None},
    }
