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
from hydralv_tune.config.pytc_portability import obstacles
from hydralv_tune.numerics.watershed.decoders import decoder_arguments
from hydralv_tune.results.export.pytc_blocks import (
    OVER_ALL_VOXELS,
    PeerData,
    augmentation_blocks,
    data_block,
    deeply_supervised,
    depth_weights,
    listed,
    loss_entries,
    monai_block,
    monitor_block,
    network_block,
    optimization_block,
    paths_of,
    peer_losses,
    rsunet_block,
    with_numbers,
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
NORMALISATIONS = {"0-1": "0-1", "z_volume": "normal", "z_section": "normal",
                  "clahe": "0-1", "none": "none"}  # fmt: skip
AS_WRITTEN = {"normalize": "none", "clip_percentile_low": 0.0, "clip_percentile_high": 1.0}
"""Of `image_transform`, where the images are written as the network sees them."""
BLENDINGS = {"gaussian": "distance_transform", "constant": "constant"}
"""Its own `bump` shrinks the logits tenfold where a single window reaches the rim."""
PADDINGS = {"replicate": "edge", "reflect": "reflect", "constant": "constant"}
"""Padding modes by NumPy's names, which that tool pads volumes with."""
LATER_KNOBS = ("full_section_prob", "partial_ratio_range", "fill_value_range")
"""Of `missing_section`: today's schema has them, January's had not."""

OURS_ALONE = (
    "system.cpu_threads", "system.training.num_cpus", "system.inference.num_cpus",
    "model.external_weights_strict", "model.mednext_kernel_size",
    "model.loss_kwargs", "data.sampling", "data.split", "data.memory_limit_gb",
    "data.use_preloaded_cache", "data.label_transform.edt_voxel_size",
    "data.image_transform.fill", "monitor.evaluation",
    "test.decoding_grid",
)  # fmt: skip
"""Keys of ours that the plan's schema refuses; those that matter are told by `_notes`."""


OUR_NETWORK_KEYS = (
    "norm", "activation", "down_factors", "num_groups", "depth_2d", "kernel_2d", "kernel_size",
    "strides", "num_res_units", "upsample", "mednext_size", "mednext_kernel_size",
)  # fmt: skip
"""Keys of `model` that are written anew under that tool's names."""


@dataclass(frozen=True)
class PeerConfig:
    """A configuration for PyTorch Connectomics, and what it has no key for."""

    mapping: dict[str, Any]
    notes: tuple[str, ...]


def peer_weights(network: nn.Module, *, heads: bool = True) -> dict[str, dict[str, Tensor]]:
    """Return a network's weights as that tool's `external_weights_path` takes them.

    Args:
        network: As trained here.
        heads: Whether the heads of the coarser levels go too.
    """
    kept = {
        key: value
        for key, value in network.state_dict().items()
        if heads or not key.startswith("ds_heads.")
    }
    return {"state_dict": {PREFIX + k: v.detach().cpu().clone() for k, v in kept.items()}}


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
    notes.append(
        "Its windows are blended as logits, ours as probabilities: they differ a little where "
        "windows overlap."
    )
    build = _head if schema == "pytc" else _plan
    # Through JSON, so that no list is shared and YAML writes no anchors.
    return PeerConfig(json.loads(json.dumps(build(candidate, step, data, notes))), tuple(notes))


def peer_step(step: DecodingStep, *, drops_exact_size: bool = False) -> dict[str, Any]:
    """Return a decoding step under that tool's name and arguments.

    Args:
        step: Of ours.
        drops_exact_size: Whether it drops segments of exactly `min_instance_size` voxels too.

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
    values = {**known, **own}
    # Lists, and said: its default tuples pick section 0 instead of channel 0, and its distance
    # decoder takes the first channel.
    kwargs: dict[str, Any] = {"distance_channels": [2]}
    if DECODERS[step.name] == "decode_instance_binary_contour_distance":
        kwargs |= {"binary_channels": [0], "contour_channels": [1]}
    for key, value in values.items():
        if key in ("flood", "floor", "split_components"):
            continue
        pair = isinstance(value, list | tuple)
        kwargs[key] = [OFF if entry is None else entry for entry in value] if pair else value
    if drops_exact_size:
        kwargs["min_instance_size"] = max(kwargs["min_instance_size"] - 1, 0)
    if not kwargs["min_instance_size"]:
        del kwargs["min_instance_size"]
    return {"name": DECODERS[step.name], "kwargs": kwargs}


def _cleaning(step: DecodingStep) -> dict[str, Any]:
    """Return today's `postprocessing` entry of `decoding`, which splits instances, or nothing."""
    own = step.decoder_arguments()
    if not own.get("split_components"):
        return {}
    split = {"connectivity": 6, "min_size": own.get("min_instance_size", 0)}
    return {"postprocessing": {"enabled": True, "instance_cc3d": split}}


def _notes(candidate: Candidate, step: DecodingStep, data: PeerData) -> list[str]:
    """Return what neither schema can express."""
    model, ours = candidate.model, candidate.data
    notes = []
    against = obstacles(candidate)
    if against:
        notes.append("The weights are NOT loadable there: " + " ".join(against))
    if step.decoder_arguments().get("flood", "support") == "support" and (
        step.name == "decode_instance_binary_contour_distance"
    ):
        notes.append(
            "The flood was confined to voxels that can be an instance (flood: support); there it "
            "fills the whole volume. The score under that flood stands above."
        )
    notes.append(
        f"{ours.sampling.foreground_share:.0%} of the patches were centred on an instance; there "
        "patches are centred on any voxel of the mask."
    )
    if data.normalised:
        notes.append(
            "The images were written normalised, as the network sees them; do the same to every "
            "further volume."
        )
    elif ours.image_transform.normalize == "z_section":
        notes.append(
            "Images were standardised section by section, which cannot be said there: the "
            "segmentation differs. export --write-normalised writes the images so."
        )
    elif ours.image_transform.normalize == "clahe":
        notes.append(
            "Sections were equalised (CLAHE), which cannot be said there: the segmentation "
            "differs. export --write-normalised writes the images so."
        )
    else:
        notes.append("Images were normalised over the volume in training too; there per crop.")
    if any(target.kwargs.get("edge_mode") == "inner" for target in ours.label_transform.targets):
        notes.append(
            "The boundary was the instances' own side alone (edge_mode inner); there both."
        )
    if paths_of(data, "mask") is not None:
        notes.append(
            "There the mask hides the prediction and does not confine the flood: instances at its "
            "border may differ by some voxels."
        )
    if ours.label_transform.edt_voxel_size == "volume":
        notes.append("Distance targets were in nm; there they are in voxels.")
    if ours.split.kind != "none":
        notes.append(f"The split ({ours.split.kind}) is not carried over: it trains on all.")
    if model.architecture == "rsunet" and model.dropout:
        notes.append(f"dropout {model.dropout}: its RSUNet has none.")
    if model.deep_supervision and not deeply_supervised(candidate):
        notes.append(
            "deep_supervision is off: there it needs an RSUNet of at most 5 levels. It changes "
            "training alone."
        )
    if model.norm == "none" and model.architecture == "rsunet":
        notes.append("norm none: training without a norm may need a smaller rate there too.")
    if candidate.optimization.scheduler.warmup_epochs:
        notes.append(
            "Its cosine starts at epoch 0, ours after the warm-up: at the end of the warm-up its "
            "rate is already below the highest."
        )
    size = step.decoder_arguments().get("min_instance_size", 0)
    if size:
        notes.append(
            f"Segments of exactly {size} voxels (min_instance_size) are kept here. That tool keeps "
            "them with scikit-image before 0.26 and drops them from 0.26 on; this file is for "
            + ("0.26 and later (one voxel less is written)." if data.drops_exact_size
               else "earlier ones. export --scikit-image-026 says otherwise.")
        )  # fmt: skip
    if data.outputs is not None:
        notes.append(
            f"It writes to {data.outputs}, in the folder that it is started in, and where a "
            "segmentation lies there already it takes that one without predicting. Delete it after "
            "changing this file."
        )
    if candidate.optimization.scheduler.name == "constant":
        notes.append("The constant schedule is written as a cosine that ends where it starts.")
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
    if data.weights is not None and not obstacles(candidate):
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
    loss: dict[str, Any] = {"deep_supervision": deeply_supervised(candidate)}
    weights = depth_weights(candidate)
    if weights is not None:
        loss["deep_supervision_weights"] = weights
    loss["losses"] = loss_entries(candidate, notes)
    if paths_of(data, "mask") is not None:
        notes.extend(
            f"{name}: outside the mask its voxels count as zeros in the mean, so its share of the "
            "loss is smaller where a mask leaves out more."
            for name in dict.fromkeys(model.loss_functions)
            if name in OVER_ALL_VOXELS
        )
    loss["loss_balancing"] = {"strategy": strategy, **gradnorm}
    return {**block, "loss": loss}


def _targets(candidate: Candidate) -> list[dict[str, Any]]:
    """Return the targets; the tool has no boundary on the inner side alone."""
    return [
        {
            "name": target.name,
            "kwargs": {key: "all" if value == "inner" else value
                       for key, value in target.kwargs.items()},
        }
        for target in candidate.data.label_transform.targets
    ]  # fmt: skip


def _head_data(candidate: Candidate, data: PeerData, notes: list[str]) -> dict[str, Any]:
    """Return today's `data` block."""
    ours = candidate.data
    transform = ours.image_transform
    return {
        "dataloader": {
            "batch_size": candidate.system.training.batch_size,
            "patch_size": list(ours.patch_size),
            "cached_sampling_sample_nonzero_mask": paths_of(data, "mask") is not None,
        },
        "data_transform": {
            "pad_size": list(ours.pad_size),
            "pad_mode": PADDINGS[ours.pad_mode],
        },
        "image_transform": {
            "normalize": NORMALISATIONS[transform.normalize],
            "clip_percentile_low": transform.clip_percentile_low,
            "clip_percentile_high": transform.clip_percentile_high,
            **(AS_WRITTEN if data.normalised else {}),
        },
        "label_transform": {"targets": _targets(candidate)},
        "augmentation": with_ranges(augmentation_blocks(candidate, notes)),
    }


def _head_inference(candidate: Candidate, data: PeerData) -> dict[str, Any]:
    """Return today's `inference` block."""
    window = candidate.inference.sliding_window
    test_time = candidate.inference.test_time_augmentation
    augmented: dict[str, Any] = {"enabled": test_time.enabled}
    for key in ("flip_axes", "rotation90_axes", "rotate90_k"):
        if getattr(test_time, key) is not None:
            augmented[key] = listed(getattr(test_time, key))
    mode = test_time.ensemble_mode
    augmented["ensemble_mode"] = mode
    augmented["apply_mask"] = paths_of(data, "mask") is not None
    return {
        "window": {
            "window_size": list(window.window_size or candidate.data.patch_size),
            "overlap": window.overlap,
            "blending": BLENDINGS[window.blending],
            "padding_mode": window.padding_mode,
        },
        "model": {
            # The context that test images are padded with is in its prediction until it is cut off.
            **({"crop_pad": list(candidate.data.pad_size)} if any(candidate.data.pad_size) else {}),
            "channel_activations": [
                {"channels": f"{first}:{end}", "activation": name}
                for first, end, name in test_time.channel_activations
            ],
        },
        "test_time_augmentation": augmented,
        **({"save_path": data.outputs} if data.outputs is not None else {}),
    }


def _head(
    candidate: Candidate, step: DecodingStep, data: PeerData, notes: list[str]
) -> dict[str, Any]:
    """Return the candidate in today's schema."""
    if candidate.inference.sliding_window.blending == "gaussian":
        notes.append(
            "Windows were blended by a Gaussian; today's tool has none, so distance_transform, the "
            "closest, is written."
        )
    if any(volume.mask for volume in data.volumes) and paths_of(data, "mask") is None:
        notes.append("Some volumes have a mask and some none; it takes all or none, so none.")
    return {
        "experiment_name": data.experiment,
        "description": data.description,
        "default": {
            "system": {"seed": candidate.system.seed, "num_gpus": 1, "num_workers": 4},
            "model": _model(candidate, data, notes),
            "data": _head_data(candidate, data, notes),
            "inference": _head_inference(candidate, data),
            "optimization": {"precision": candidate.optimization.precision},
            "decoding": {
                "steps": [peer_step(step, drops_exact_size=data.drops_exact_size)],
                **_cleaning(step),
            },
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
    for key in OUR_NETWORK_KEYS:
        model.pop(key, None)
    if model["architecture"] == "rsunet":
        model |= {f"rsunet_{key}": v for key, v in rsunet_block(candidate.model).items()}
    elif model["architecture"] == "mednext":
        model["mednext_size"] = candidate.model.mednext_size or "S"
        model["mednext_kernel_size"] = candidate.model.mednext_kernel_size or 3
    else:
        model |= monai_block(candidate.model)
    model["deep_supervision"] = deeply_supervised(candidate)
    patch = list(candidate.data.patch_size)
    model |= {"input_size": patch, "output_size": patch}
    terms = peer_losses(candidate, notes, today=False)
    model["loss_functions"] = [name for name, _, _ in terms]
    model["loss_kwargs"] = [
        own if positive is None else {**own, "pos_weight": float(positive)}
        for _, own, positive in terms
    ]
    model["deep_supervision_weights"] = depth_weights(candidate)
    if candidate.model.loss_balancing.strategy == "none":
        # `none` was an error there; nothing at all means none.
        del model["loss_balancing"]["strategy"]
    elif candidate.model.loss_balancing.strategy == "uncertainty":
        notes.append(
            "Uncertainty balancing: that version gives its optimizer the network alone, so the "
            "weights of the losses are never learned and stay equal."
        )
    if data.weights is not None and not obstacles(candidate):
        model |= {"external_weights_path": data.weights, "external_weights_key_prefix": PREFIX}
    mapping["data"]["label_transform"]["targets"] = _targets(candidate)
    transform = mapping["data"]["image_transform"]
    transform["normalize"] = NORMALISATIONS[candidate.data.image_transform.normalize]
    if data.normalised:
        transform |= AS_WRITTEN
    if any(volume.mask for volume in data.volumes):
        notes.append("The loss counted inside the mask alone; there it counts everywhere.")
    padded = any(candidate.data.pad_size)
    if padded:
        notes.append(
            f"Volumes are padded by {list(candidate.data.pad_size)} before prediction too; that "
            "version pads them in training alone, so its windows lie elsewhere and its "
            "probabilities differ, most with group or instance norm."
        )
    mapping["data"] |= {f"train_{key}": value for key, value in data_block(data).items()}
    augmentations = augmentation_blocks(candidate, notes)
    for key in LATER_KNOBS:
        augmentations.get("missing_section", {}).pop(key, None)
    mapping["data"]["augmentation"] = {"preset": "some", **with_numbers(augmentations)}
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
    test_block = mapping["inference"]["test_time_augmentation"]
    # Its first state of that month has no such switch: what is off is left out.
    if not test_block.pop("enabled"):
        for key in ("flip_axes", "rotation90_axes", "rotate90_k"):
            test_block.pop(key, None)
    if test_block.pop("rotate90_k", None) is not None:
        notes.append("rotate90_k: that version takes all four quarter turns.")
    test_block["apply_mask"] = paths_of(data, "mask") is not None
    decoding = peer_step(step, drops_exact_size=data.drops_exact_size)
    later = {
        "decode_distance_watershed": decoding["name"] == "decode_distance_watershed",
        "min_instance_size": "min_instance_size" in decoding["kwargs"],
    }
    if any(later.values()):
        absent = " and ".join(name for name, used in later.items() if used)
        notes.append(
            f"Its state of 19 January stops at {absent} when it decodes, which came with that of "
            "28 January."
        )
    if _cleaning(step):
        notes.append(
            "Instances were split into their 6-connected pieces (split_components), which that "
            "version does not do: the segmentation differs."
        )
    notes.append(
        "Its state of 28 January cannot train these losses (it hands each a weight) and stops "
        "when it prints the error; that of 19 January does both."
    )
    mapping["test"] = {
        # That version reads the transform of its test images here and nowhere else.
        "data": {
            **{f"test_{key}": value for key, value in data_block(data).items()},
            "image_transform": dict(transform),
            "output_path": data.outputs,
        },
        "decoding": [decoding],
        "evaluation": {"enabled": True, "metrics": ["adapted_rand"]},
    }
    if padded:
        # It reads `data.pad_size` nowhere.
        mapping["data"]["image_transform"] |= {
            "pad_size": list(candidate.data.pad_size),
            "pad_mode": PADDINGS[candidate.data.pad_mode],
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
