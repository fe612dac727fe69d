"""A candidate as PyTorch Connectomics reads it, in today's schema and in that of January 2026.

That tool's loader checks keys but neither decoder names nor their arguments, so this module does.
What it has no words for is said in `notes`, never dropped in silence.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from hydralv_tune.config.candidate import Candidate, DecodingStep
from hydralv_tune.numerics.watershed.decoders import decoder_arguments
from hydralv_tune.results.export.pytc_blocks import (
    PeerData,
    augmentation_blocks,
    data_block,
    depth_weights,
    listed,
    loss_entries,
    monitor_block,
    network_block,
    optimization_block,
    paths_of,
    with_ranges,
)

PEER_FORMATS = ("pytc", "pytc-2026-01")
PREFIX = "model."
OFF = 1.1
"""A contour threshold above any probability, which is how that tool switches the test off."""

DECODERS = {
    "decode_instance_binary_contour_distance": "decode_instance_binary_contour_distance",
    "decode_instance_watershed_distance": "decode_distance_watershed",
    "decode_distance_watershed": "decode_distance_watershed",
}
NORMALISATIONS = {"0-1": "0-1", "z_volume": "normal", "z_section": "normal", "none": "none"}
LATER_KNOBS = ("full_section_prob", "partial_ratio_range", "fill_value_range")
"""Of `missing_section`: today's schema has them, January's had not."""

OURS_ALONE = (
    "system.cpu_threads", "system.training.num_cpus", "system.inference.num_cpus",
    "model.external_weights_strict", "model.mednext_kernel_size",
    "model.loss_kwargs", "data.sampling", "data.split", "data.memory_limit_gb",
    "data.use_preloaded_cache", "data.label_transform.edt_voxel_size", "monitor.evaluation",
    "test.decoding_grid",
)  # fmt: skip
"""Keys of ours that the plan's schema refuses; those that matter are told by `_notes`."""


@dataclass(frozen=True)
class PeerConfig:
    """A configuration for PyTorch Connectomics, and what it could not be told."""

    mapping: dict[str, Any]
    notes: tuple[str, ...]


def peer_weights(network: nn.Module) -> dict[str, dict[str, Tensor]]:
    """Return a network's weights as that tool's `external_weights_path` takes them."""
    tensors = {PREFIX + k: v.detach().cpu().clone() for k, v in network.state_dict().items()}
    return {"state_dict": tensors}


def peer_config(
    candidate: Candidate, step: DecodingStep, data: PeerData, *, schema: str
) -> PeerConfig:
    """Return a candidate in a schema of PyTorch Connectomics.

    Args:
        candidate: What was trained.
        step: The decoder with the winner's arguments.
        data: What else the configuration names.
        schema: One of `PEER_FORMATS`.

    Raises:
        ValueError: The schema is unknown, or that tool has no such decoder.
    """
    if schema not in PEER_FORMATS:
        raise ValueError(f"Unknown format '{schema}'. Known: {', '.join(PEER_FORMATS)}.")
    notes = _notes(candidate, step, data)
    build = _head if schema == "pytc" else _plan
    # Through JSON, so that no list is shared and YAML writes no anchors.
    return PeerConfig(json.loads(json.dumps(build(candidate, step, data, notes))), tuple(notes))


def peer_step(step: DecodingStep) -> dict[str, Any]:
    """Return a decoding step under that tool's name and arguments.

    Raises:
        ValueError: It has no such decoder, or the arguments are not the decoder's.
    """
    if step.name not in DECODERS:
        raise ValueError(
            f"PyTorch Connectomics has no decoder '{step.name}'. It has: "
            f"{', '.join(sorted(set(DECODERS.values())))}."
        )
    own = step.decoder_arguments()
    known = decoder_arguments(step.name)
    unknown = sorted(set(own) - set(known))
    if unknown:
        raise ValueError(f"Unknown argument '{unknown[0]}' of {step.name}.")
    said = {**known, **own}
    # Lists, and said: its default tuples pick section 0 instead of channel 0, and its distance
    # decoder takes the first channel.
    kwargs: dict[str, Any] = {"distance_channels": [2]}
    if DECODERS[step.name] == "decode_instance_binary_contour_distance":
        kwargs |= {"binary_channels": [0], "contour_channels": [1]}
    for key, value in said.items():
        if key in ("flood", "floor"):
            continue
        pair = isinstance(value, list | tuple)
        kwargs[key] = [OFF if entry is None else entry for entry in value] if pair else value
    return {"name": DECODERS[step.name], "kwargs": kwargs}


def _notes(candidate: Candidate, step: DecodingStep, data: PeerData) -> list[str]:
    """Return what neither schema can express."""
    model, told = candidate.model, candidate.data
    notes = []
    if any(volume.mask for volume in data.volumes):
        notes.append("The loss counted inside the mask alone; there it counts everywhere.")
    if step.decoder_arguments().get("flood", "support") == "support" and (
        step.name == "decode_instance_binary_contour_distance"
    ):
        notes.append(
            "The flood was confined to voxels that can be an instance (flood: support); there it "
            "fills the whole volume. The score under that flood stands above."
        )
    notes.append(
        f"{told.sampling.foreground_share:.0%} of the patches were centred on an instance; there "
        "patches are centred on any voxel of the mask."
    )
    if told.image_transform.normalize == "z_section":
        notes.append(
            "Images were standardised section by section; there per crop. Standardise the sections "
            "of your volume first, or scores will differ."
        )
    else:
        notes.append("Images were normalised over the volume in training too; there per crop.")
    if told.label_transform.edt_voxel_size == "volume":
        notes.append("Distance targets were in nm; there they are in voxels.")
    if told.split.kind != "none":
        notes.append(f"The split ({told.split.kind}) is not carried over: it trains on all.")
    if model.architecture == "rsunet" and model.dropout:
        notes.append(f"dropout {model.dropout}: its RSUNet has none.")
    if model.architecture == "rsunet" and model.kernel_size not in (None, 3, (3, 3, 3)):
        notes.append(f"kernel_size {model.kernel_size}: its RSUNet has 3 alone.")
    if model.architecture == "mednext":
        notes.append(
            "Its MedNeXt is another package than MONAI's: the weights beside this file are NOT "
            "loadable there and are not named in it."
        )
    elif model.architecture != "rsunet":
        notes.append(
            "The weights carry the names of MONAI's own network; that tool wraps it, so compare "
            "the names before you trust its loader, which skips what does not match."
        )
    if model.loss_balancing.strategy == "uncertainty":
        notes.append("Uncertainty balancing: check that its optimizer is given those parameters.")
    if candidate.optimization.scheduler.name == "constant":
        notes.append("The constant schedule is written as a cosine that ends where it starts.")
    if candidate.inference.test_time_augmentation.ensemble_mode == "min":
        notes.append("ensemble_mode min has no counterpart; mean is written.")
    return notes


def _model(candidate: Candidate, data: PeerData, notes: list[str]) -> dict[str, Any]:
    """Return today's `model` block."""
    model = candidate.model
    block = network_block(candidate)
    patch = list(candidate.data.patch_size)
    block |= {
        "in_channels": model.in_channels,
        "out_channels": model.out_channels,
        "input_size": patch,
        "output_size": patch,
    }
    if model.architecture != "mednext":
        block |= {"external_weights_path": data.weights, "external_weights_key_prefix": PREFIX}
    balancing = model.loss_balancing
    strategy = None if balancing.strategy == "none" else balancing.strategy
    gradnorm = (
        {
            "gradnorm_alpha": balancing.gradnorm_alpha,
            "gradnorm_lambda": balancing.gradnorm_lambda,
            "gradnorm_parameter_strategy": balancing.gradnorm_parameter_strategy,
        }
        if strategy == "gradnorm"
        else {}
    )
    loss: dict[str, Any] = {"deep_supervision": model.deep_supervision}
    weights = depth_weights(candidate)
    if weights is not None:
        loss["deep_supervision_weights"] = weights
    loss["losses"] = loss_entries(candidate, notes)
    loss["loss_balancing"] = {"strategy": strategy, **gradnorm}
    return {**block, "loss": loss}


def _head_data(candidate: Candidate, data: PeerData, notes: list[str]) -> dict[str, Any]:
    """Return today's `data` block."""
    told = candidate.data
    transform = told.image_transform
    return {
        "dataloader": {
            "batch_size": candidate.system.training.batch_size,
            "patch_size": list(told.patch_size),
            "cached_sampling_sample_nonzero_mask": paths_of(data, "mask") is not None,
        },
        "data_transform": {"pad_size": list(told.pad_size), "pad_mode": told.pad_mode},
        "image_transform": {
            "normalize": NORMALISATIONS[transform.normalize],
            "clip_percentile_low": transform.clip_percentile_low,
            "clip_percentile_high": transform.clip_percentile_high,
        },
        "label_transform": {
            "targets": [
                {"name": target.name, "kwargs": dict(target.kwargs)}
                for target in told.label_transform.targets
            ]
        },
        "augmentation": with_ranges(augmentation_blocks(candidate, notes)),
    }


def _head_inference(candidate: Candidate) -> dict[str, Any]:
    """Return today's `inference` block."""
    window = candidate.inference.sliding_window
    test_time = candidate.inference.test_time_augmentation
    augmented: dict[str, Any] = {"enabled": test_time.enabled}
    for key in ("flip_axes", "rotation90_axes", "rotate90_k"):
        if getattr(test_time, key) is not None:
            augmented[key] = listed(getattr(test_time, key))
    mode = test_time.ensemble_mode
    augmented["ensemble_mode"] = "mean" if mode == "min" else mode
    return {
        "window": {
            "window_size": list(window.window_size or candidate.data.patch_size),
            "overlap": window.overlap,
            "blending": "bump" if window.blending == "gaussian" else window.blending,
        },
        "model": {
            "channel_activations": [
                {"channels": f"{first}:{end}", "activation": name}
                for first, end, name in test_time.channel_activations
            ]
        },
        "test_time_augmentation": augmented,
    }


def _head(
    candidate: Candidate, step: DecodingStep, data: PeerData, notes: list[str]
) -> dict[str, Any]:
    """Return the candidate in today's schema."""
    return {
        "experiment_name": data.experiment,
        "description": data.description,
        "default": {
            "system": {"seed": candidate.system.seed, "num_gpus": 1, "num_workers": 4},
            "model": _model(candidate, data, notes),
            "data": _head_data(candidate, data, notes),
            "inference": _head_inference(candidate),
            "decoding": {"steps": [peer_step(step)]},
            "evaluation": {"enabled": True, "metrics": ["adapted_rand"]},
        },
        "train": {
            "data": {"train": data_block(data)},
            "optimization": optimization_block(candidate, head=True),
            "monitor": monitor_block(candidate),
        },
        "test": {"data": {"test": data_block(data)}},
    }


def _plan(
    candidate: Candidate, step: DecodingStep, data: PeerData, notes: list[str]
) -> dict[str, Any]:
    """Return the candidate in the schema of January 2026: our own keys, less what it refuses."""
    mapping = candidate.as_mapping()
    for key in OURS_ALONE:
        _drop(mapping, key.split("."))
    model = mapping["model"]
    if model["architecture"] == "rsunet":
        for key in ("norm", "activation", "down_factors"):
            model[f"rsunet_{key}"] = model.pop(key)
    if candidate.model.mednext_kernel_size:
        model["mednext_kernel_size"] = candidate.model.mednext_kernel_size
    terms = [dict(kwargs) for kwargs in candidate.model.loss_kwargs]
    if any(term.pop("foreground_weight", None) is not None for term in terms):
        notes.append("foreground_weight of a loss is not carried over.")
    model["loss_kwargs"] = terms or [{} for _ in candidate.model.loss_functions]
    model["deep_supervision_weights"] = depth_weights(candidate)
    if candidate.model.loss_balancing.strategy == "none":
        # `none` was an error there; nothing at all means none.
        del model["loss_balancing"]["strategy"]
    if model["architecture"] != "mednext":
        model |= {"external_weights_path": data.weights, "external_weights_key_prefix": PREFIX}
    mapping["data"]["image_transform"]["normalize"] = NORMALISATIONS[
        candidate.data.image_transform.normalize
    ]
    mapping["data"] |= {f"train_{key}": value for key, value in data_block(data).items()}
    augmentations = augmentation_blocks(candidate, notes)
    for key in LATER_KNOBS:
        augmentations.get("missing_section", {}).pop(key, None)
    mapping["data"]["augmentation"] = {"preset": "some", **augmentations}
    mapping["optimization"] = optimization_block(candidate, head=False)
    mapping["monitor"] = {
        "detect_anomaly": candidate.monitor.detect_anomaly,
        **monitor_block(candidate),
    }
    test_time = candidate.inference.test_time_augmentation
    if test_time.enabled and test_time.flip_axes is not None:
        notes.append(
            "Test-time flips over axis 0 turned the channels around in that version: "
            "check the flip axes, or leave them out."
        )
    mapping["test"] = {
        "data": {f"test_{key}": value for key, value in data_block(data).items()},
        "decoding": [peer_step(step)],
        "evaluation": {"enabled": True, "metrics": ["adapted_rand"]},
    }
    mapping |= {"experiment_name": data.experiment, "description": data.description}
    cleaned: dict[str, Any] = _without_none(mapping)
    return cleaned


def _drop(mapping: dict[str, Any], keys: Sequence[str]) -> None:
    """Delete a nested key where it is."""
    inner: Any = mapping
    for key in keys[:-1]:
        inner = inner.get(key)
        if not isinstance(inner, dict):
            return
    inner.pop(keys[-1], None)


def _without_none(value: Any) -> Any:
    """Return a mapping without the keys that say nothing, at any depth."""
    if isinstance(value, Mapping):
        kept = {k: _without_none(v) for k, v in value.items() if v is not None}
        return {k: v for k, v in kept.items() if v != {} or k == "kwargs"}
    return [_without_none(entry) for entry in value] if isinstance(value, list) else value
