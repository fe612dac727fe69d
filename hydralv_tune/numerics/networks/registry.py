"""Networks by name: `ARCHITECTURES` holds how each is built and what each accepts.

To add one, write a function that builds it from the keys of `model` and enter it there; the
conformance tests run over the table. Every network takes (B, 1, Z, Y, X) and gives logits
(B, 3, Z, Y, X); with deep supervision, while training, a list of them from fine to coarse.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from hydralv_tune.numerics.networks.builders import (
    Arguments,
    Step,
    basic_unet_path,
    build_basic_unet,
    build_mednext,
    build_rsunet,
    build_unet,
    level_factors,
    mednext_path,
    rsunet_path,
    unet_path,
    whole_factor,
)
from hydralv_tune.numerics.networks.rsunet import Size3

COMMON_KEYS = frozenset({"in_channels", "out_channels", "filters", "deep_supervision"})
OWN_KEYS = frozenset(
    {"dropout", "norm", "activation", "kernel_size", "strides", "num_res_units", "down_factors",
     "upsample", "mednext_size", "mednext_kernel_size", "num_groups", "depth_2d", "kernel_2d"}
)  # fmt: skip
"""Keys of `model` that some architecture accepts and another refuses; None is not said."""


@dataclass(frozen=True)
class Architecture:
    """How an architecture is built, what it accepts, and what it asks of a patch.

    Args:
        build: Function of the keys of `model` that gives the network.
        arguments: Keys of `model` that have an effect, beyond `COMMON_KEYS`.
        deep_supervision: Whether it can give logits of its coarser levels.
        divisor: Function of the keys that gives what (z, y, x) of a patch must be multiples of.
        path: Function of (keys, axis) that gives the layers from an output voxel back to the
            image, on the way through the coarsest level.
        heads: Start of the names of the modules that turn features into logits.
        refusals: Why a key that others accept has no effect here.
    """

    build: Callable[[Arguments], nn.Module]
    arguments: frozenset[str]
    deep_supervision: bool
    divisor: Callable[[Arguments], Size3]
    path: Callable[[Arguments, int], list[Step]]
    heads: tuple[str, ...]
    refusals: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class WeightsReport:
    """What of a state dict fits a network.

    Args:
        matched: Names of the network's tensors that the state dict gives.
        missing: Names of the network's tensors that it does not give.
        unexpected: Names in it that the network does not have.
        mismatched: Names whose shapes differ, with both shapes.
        share: Matched tensors over the network's tensors, 0 to 1.
    """

    matched: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: tuple[str, ...]
    share: float

    def __str__(self) -> str:
        """Return the share, and the first names of what does not fit."""
        total = len(self.matched) + len(self.missing) + len(self.mismatched)
        parts = [f"{len(self.matched)} of {total} tensors match ({self.share:.1%})"]
        for title in ("missing", "mismatched", "unexpected"):
            names = getattr(self, title)
            if names:
                more = f" and {len(names) - 4} more" if len(names) > 4 else ""
                parts.append(f"{len(names)} {title}: {', '.join(names[:4])}{more}")
        return "; ".join(parts)


def build_network(
    name: str,
    *,
    in_channels: int = 1,
    out_channels: int = 3,
    filters: Sequence[int] = (32, 64, 128, 256, 512),
    deep_supervision: bool = False,
    **arguments: Any,
) -> nn.Module:
    """Return an untrained network.

    Args:
        name: A name of `ARCHITECTURES`.
        in_channels: Channels of the image.
        out_channels: Channels of the logits.
        filters: Channels of each level, finest first.
        deep_supervision: Whether to give a list of logits, fine to coarse, while training.
        arguments: Further keys of `model`; None is not said, and the architecture's own default
            counts.

    Raises:
        ValueError: The name is unknown, a key has no effect here, or a value is impossible.
    """
    keys = {"in_channels": in_channels, "out_channels": out_channels, "filters": tuple(filters),
            "deep_supervision": deep_supervision, **_said(arguments)}  # fmt: skip
    refused = ignored_keys(name, keys)
    if refused:
        raise ValueError("; ".join(refused.values()))
    for key in ("in_channels", "out_channels"):
        if keys[key] < 1:
            raise ValueError(f"{key} is {keys[key]}, but at least 1 is due.")
    return architecture(name).build(keys)


def architecture(name: str) -> Architecture:
    """Return the entry of that name.

    Raises:
        ValueError: The name is unknown.
    """
    if name not in ARCHITECTURES:
        raise ValueError(
            f"Unknown architecture '{name}'. Known: {', '.join(sorted(ARCHITECTURES))}."
        )
    return ARCHITECTURES[name]


def network_arguments(model: Arguments) -> dict[str, Any]:
    """Return those keys of a `model` block that determine the network, as `build_network` takes.

    Args:
        model: The block as a mapping; losses, weights and the rest are left out.
    """
    return _said({key: v for key, v in model.items() if key in COMMON_KEYS | OWN_KEYS})


def ignored_keys(name: str, model: Arguments) -> dict[str, str]:
    """Return, for each key said that has no effect on the architecture, a sentence with why.

    Args:
        name: A name of `ARCHITECTURES`.
        model: Keys of the `model` block; those that are None count as not said.

    Raises:
        ValueError: The name is unknown.
    """
    entry = architecture(name)
    refused = {}
    for key, value in _said(model).items():
        if key in COMMON_KEYS or key in entry.arguments:
            continue
        if key in OWN_KEYS:
            reason = entry.refusals.get(key, "it has no such part")
            accepted = ", ".join(sorted(entry.arguments)) or "no further key"
            refused[key] = (
                f"{key} is {value}, but it has no effect on {name}: {reason}. Accepted: {accepted}."
            )
        elif key not in _OTHER_MODEL_KEYS:
            refused[key] = f"Unknown key '{key}' of {name}. Known: {', '.join(sorted(OWN_KEYS))}."
    if model.get("deep_supervision") and not entry.deep_supervision:
        refused["deep_supervision"] = f"deep_supervision is true, but {name} has no coarser logits."
    return refused


def divisor(name: str, model: Arguments) -> Size3:
    """Return what (z, y, x) of a patch must be multiples of.

    Args:
        name: A name of `ARCHITECTURES`.
        model: Keys of the `model` block.

    Raises:
        ValueError: The name is unknown or a value is impossible.
    """
    return architecture(name).divisor(_with_filters(model))


def check_patch_size(name: str, model: Arguments, patch_size: Sequence[int]) -> None:
    """Refuse a patch that the architecture cannot take.

    Args:
        name: A name of `ARCHITECTURES`.
        model: Keys of the `model` block.
        patch_size: Voxels (z, y, x).

    Raises:
        ValueError: A side is no multiple of the divisor, or the coarsest level is one voxel.
    """
    needed = divisor(name, model)
    if any(side % d for side, d in zip(patch_size, needed, strict=True)):
        near = tuple(max(1, round(s / d)) * d for s, d in zip(patch_size, needed, strict=True))
        raise ValueError(
            f"patch {tuple(patch_size)} (z, y, x) does not fit {name}, which needs multiples of "
            f"{needed}. Try {near}."
        )
    if tuple(patch_size) == needed and math.prod(needed) > 1:
        raise ValueError(
            f"patch {tuple(patch_size)} (z, y, x) leaves a single voxel at the coarsest level of "
            f"{name}, which no normalisation can work on. Try twice the size in y and x."
        )


def receptive_field(name: str, model: Arguments) -> Size3:
    """Return how many voxels (z, y, x) one output voxel can see at most.

    It is the theoretical bound through the coarsest level: every image voxel further than this
    from another cannot influence the same prediction. Instance and group normalisation carry
    one mean and one variance beyond it, which does not count here.

    Args:
        name: A name of `ARCHITECTURES`.
        model: Keys of the `model` block.

    Raises:
        ValueError: The name is unknown or a value is impossible.
    """
    entry, keys = architecture(name), _with_filters(model)
    z, y, x = (
        _widest(entry.path(keys, axis), period) for axis, period in enumerate(entry.divisor(keys))
    )
    return z, y, x


def parameter_count(network: nn.Module) -> int:
    """Return the number of trained scalars."""
    return sum(p.numel() for p in network.parameters() if p.requires_grad)


def trunk_weights(name: str, network: nn.Module) -> list[Tensor]:
    """Return the weights of the convolutions before the heads, first to last.

    Args:
        name: A name of `ARCHITECTURES`.
        network: As `build_network` gives it for that name.

    Raises:
        ValueError: The name is unknown.
    """
    heads = architecture(name).heads
    return [
        module.weight
        for key, module in network.named_modules()
        if isinstance(module, nn.Conv3d | nn.ConvTranspose3d)
        and not any(f"{key}.".startswith(f"{head}.") for head in heads)
    ]


def match_weights(
    network: nn.Module, state_dict: Mapping[str, Any], *, prefix: str = "", strict: bool = True
) -> WeightsReport:
    """Load what fits into the network in place, and return what did and what did not.

    Args:
        network: Left as it is where an error is raised.
        state_dict: Names to tensors.
        prefix: Start of the names, cut off; names without it are unexpected.
        strict: Whether every tensor of the network must be given.

    Raises:
        ValueError: Nothing matches; or, when strict, not everything does.
    """
    own = network.state_dict()
    given = {
        key[len(prefix) :]: value
        for key, value in state_dict.items()
        if key.startswith(prefix) and isinstance(value, Tensor)
    }
    fits = {key: v for key, v in given.items() if key in own and v.shape == own[key].shape}
    report = WeightsReport(
        matched=tuple(key for key in own if key in fits),
        missing=tuple(key for key in own if key not in given),
        unexpected=tuple(
            key for key in state_dict
            if not key.startswith(prefix) or key[len(prefix) :] not in own
        ),
        mismatched=tuple(
            f"{key} {tuple(given[key].shape)} for {tuple(own[key].shape)}"
            for key in own if key in given and key not in fits
        ),
        share=len(fits) / len(own) if own else 1.0,
    )  # fmt: skip
    if own and not fits:
        raise ValueError(f"no weight fits the network: {report}.{_prefix_hint(own, state_dict)}")
    if strict and report.share < 1:
        raise ValueError(
            f"the weights fit the network only in part: {report}. Give the weights of this "
            "architecture and width, or allow a partial match (external_weights_strict: false)."
        )
    before = {key: value.clone() for key, value in own.items()}
    try:
        network.load_state_dict({**own, **fits})
    except RuntimeError as error:
        network.load_state_dict(before)
        raise ValueError(f"the weights do not fit the network: {error}") from error
    return report


_OTHER_MODEL_KEYS = frozenset(
    {"architecture", "input_size", "output_size", "deep_supervision_weights", "loss_functions",
     "loss_weights", "loss_kwargs", "multi_task_config", "loss_balancing",
     "external_weights_path", "external_weights_key_prefix", "external_weights_strict"}
)  # fmt: skip
"""Keys of a `model` block that are none of the network's business."""


def _said(arguments: Arguments) -> dict[str, Any]:
    """Return the arguments that say something; a dropout of 0 says what every network does."""
    return {
        key: value
        for key, value in arguments.items()
        if value is not None and not (key == "dropout" and value == 0)
    }


def _with_filters(model: Arguments) -> dict[str, Any]:
    """Return the keys that are said, with the default width where none is."""
    return {"filters": (32, 64, 128, 256, 512), **_said(model)}


def _prefix_hint(own: Mapping[str, Any], state_dict: Mapping[str, Any]) -> str:
    """Return a sentence that names the prefix under which the weights would fit, if any."""
    for name in own:
        for key in state_dict:
            if key.endswith(name):
                return f" Try the prefix '{key[: -len(name)]}'."
    return " Is it another architecture?"


def _widest(path: Sequence[Step], period: int) -> int:
    """Return the most voxels of one axis that an output voxel sees, over its alignments."""
    widest = 0
    for start in range(period):
        low = high = start
        for kind, kernel, stride, padding in path:
            if kind == "transposed":
                low = -((kernel - 1 - padding - low) // stride)
                high = (high + padding) // stride
            else:
                low, high = low * stride - padding, high * stride - padding + kernel - 1
        widest = max(widest, high - low + 1)
    return widest


_NOT_MEDNEXT = "only mednext comes in sizes"
_ONE_KERNEL = {
    "depth_2d": "all its levels have the same kernel; rsunet's may differ",
    "kernel_2d": "all its levels have the same kernel; rsunet's may differ",
}
ARCHITECTURES: dict[str, Architecture] = {
    "rsunet": Architecture(
        build=build_rsunet,
        arguments=frozenset(
            {
                "dropout",
                "norm",
                "activation",
                "kernel_size",
                "down_factors",
                "num_groups",
                "depth_2d",
                "kernel_2d",
            }
        ),
        deep_supervision=True,
        divisor=lambda keys: whole_factor(level_factors(keys, "down_factors")),
        path=rsunet_path,
        heads=("output_head", "ds_heads"),
        refusals={
            "strides": "it pools by down_factors instead",
            "num_res_units": "each block holds exactly one residual pair",
            "upsample": "its up-sampling is fixed bilinear interpolation",
            "mednext_size": _NOT_MEDNEXT,
            "mednext_kernel_size": "kernel_size is its key",
        },
    ),
    "monai_basic_unet3d": Architecture(
        build=build_basic_unet,
        arguments=frozenset({"dropout", "norm", "activation", "upsample", "num_groups"}),
        deep_supervision=True,
        divisor=lambda keys: (16, 16, 16),
        path=basic_unet_path,
        heads=("final_conv", "ds_heads"),
        refusals={
            "kernel_size": "MONAI fixes its kernels at 3",
            "strides": "MONAI fixes its pooling at 2 in z, y and x",
            "num_res_units": "it has no residual units; monai_unet has",
            "down_factors": "MONAI fixes its pooling at 2 in z, y and x",
            "mednext_size": _NOT_MEDNEXT,
            "mednext_kernel_size": _NOT_MEDNEXT,
            **_ONE_KERNEL,
        },
    ),
    "monai_unet": Architecture(
        build=build_unet,
        arguments=frozenset(
            {
                "dropout",
                "norm",
                "activation",
                "kernel_size",
                "strides",
                "num_res_units",
                "num_groups",
            }
        ),
        deep_supervision=True,
        divisor=lambda keys: whole_factor(level_factors(keys, "strides")),
        path=unet_path,
        # Its last decoder gives logits itself.
        heads=("model.2", "ds_heads"),
        refusals={
            "down_factors": "strides is its key",
            "upsample": "it always up-samples by transposed convolution",
            "mednext_size": _NOT_MEDNEXT,
            "mednext_kernel_size": "kernel_size is its key",
            **_ONE_KERNEL,
        },
    ),
    "mednext": Architecture(
        build=build_mednext,
        arguments=frozenset({"mednext_size", "mednext_kernel_size"}),
        deep_supervision=True,
        divisor=lambda keys: (16, 16, 16),
        path=mednext_path,
        heads=("out_0", "out_blocks"),
        refusals={
            "dropout": "MedNeXt has no dropout",
            "norm": "MedNeXt normalises each channel by itself, by definition",
            "activation": "MedNeXt uses GELU, by definition",
            "kernel_size": "mednext_kernel_size is its key",
            "strides": "MedNeXt halves z, y and x at every level",
            "num_res_units": "mednext_size fixes its blocks",
            "down_factors": "MedNeXt halves z, y and x at every level",
            "upsample": "MedNeXt up-samples by transposed convolution",
            "num_groups": "MedNeXt normalises each channel by itself, by definition",
            **_ONE_KERNEL,
        },
    ),
}
