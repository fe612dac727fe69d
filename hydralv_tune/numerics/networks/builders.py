"""How each network is built from the keys of `model`, and what lies between image and output."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from hydralv_tune.numerics.networks.monai_heads import HeadedBasicUNet, HeadedMedNeXt, HeadedUNet
from hydralv_tune.numerics.networks.rsunet import (
    ACTIVATIONS,
    GROUPS,
    NORMS,
    RSUNet,
    Size3,
    group_count,
)

Arguments = Mapping[str, Any]
Step = tuple[str, int, int, int]
"""One layer on the way from an output voxel back to the image: kind, kernel, stride, padding."""

UPSAMPLES = ("deconv", "nontrainable", "pixelshuffle")
MEDNEXT: dict[str, dict[str, Any]] = {
    "S": {"encoder": 2, "decoder": 2, "bottleneck": 2, "blocks": (2, 2, 2, 2), "bottom": 2},
    "B": {"encoder": (2, 3, 4, 4), "decoder": (4, 4, 3, 2), "bottleneck": 4,
          "blocks": (2, 2, 2, 2), "bottom": 2},
    "M": {"encoder": (2, 3, 4, 4), "decoder": (4, 4, 3, 2), "bottleneck": 4,
          "blocks": (3, 4, 4, 4), "bottom": 4},
    "L": {"encoder": (3, 4, 8, 8), "decoder": (8, 8, 4, 3), "bottleneck": 8,
          "blocks": (3, 4, 8, 8), "bottom": 8},
}  # fmt: skip
"""Expansion ratios and blocks of each size; MONAI's factories fix the width at 32, ours not.

Source: Roy et al. 2023, arXiv:2303.09975, table 1.
"""


def _size3(value: object, key: str) -> Size3:
    """Return a size (z, y, x) from one number or three.

    Raises:
        ValueError: It is neither, or a number is below 1.
    """
    sizes = [value] * 3 if isinstance(value, int) else value
    if (
        not isinstance(sizes, Sequence)
        or len(sizes) != 3
        or not all(isinstance(s, int) and s >= 1 for s in sizes)
    ):
        raise ValueError(f"{key} is {value}, but a number from 1 on or three (z, y, x) are due.")
    z, y, x = sizes
    return int(z), int(y), int(x)


def _odd_size3(value: object, key: str) -> Size3:
    """Return a kernel size (z, y, x), odd so that the shape is kept.

    Raises:
        ValueError: A number is even or below 1.
    """
    size = _size3(value, key)
    if not all(s % 2 for s in size):
        raise ValueError(f"{key} is {value}, but kernels must be odd. Try 3 or [1, 3, 3].")
    return size


def _one_of(value: str, key: str, known: Sequence[str]) -> str:
    """Return the value, if it is known.

    Raises:
        ValueError: It is not.
    """
    if value not in known:
        raise ValueError(f"Unknown {key} '{value}'. Known: {', '.join(known)}.")
    return value


def level_factors(keys: Arguments, key: str) -> list[Size3]:
    """Return the factors (z, y, x) between the levels; one for all is written once.

    Raises:
        ValueError: There are not as many as steps between the levels.
    """
    filters = _checked_filters(keys)
    steps = len(filters) - 1
    given = keys.get(key) or [[1, 2, 2]] * steps
    if len(given) != steps:
        raise ValueError(
            f"{key} has {len(given)} entries, but filters {list(filters)} have {steps} steps "
            "between levels. Give one entry for each, like [1, 2, 2]."
        )
    return [_size3(entry, f"{key}.{i}") for i, entry in enumerate(given)]


def _checked_filters(keys: Arguments) -> tuple[int, ...]:
    """Return the widths.

    Raises:
        ValueError: There are under two, or one is below 1.
    """
    filters = tuple(keys["filters"])
    if len(filters) < 2 or min(filters) < 1:
        raise ValueError(
            f"filters is {list(filters)}, but two levels or more with at least 1 channel are due. "
            "Try [16, 32, 64]."
        )
    return filters


def _dropout(keys: Arguments) -> float:
    """Return the share of channels that is dropped.

    Raises:
        ValueError: It is outside [0, 1).
    """
    dropout = float(keys.get("dropout", 0.0))
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout is {dropout}, but a share in [0, 1) is due.")
    return dropout


def whole_factor(factors: Sequence[Size3]) -> Size3:
    """Return the factor (z, y, x) from the finest to the coarsest level."""
    z, y, x = (math.prod(f[axis] for f in factors) for axis in range(3))
    return z, y, x


def build_rsunet(keys: Arguments) -> nn.Module:
    """Return a residual symmetric U-Net."""
    return RSUNet(
        in_channels=keys["in_channels"],
        out_channels=keys["out_channels"],
        filters=_checked_filters(keys),
        deep_supervision=keys["deep_supervision"],
        dropout=_dropout(keys),
        norm=_one_of(keys.get("norm", "batch"), "norm", NORMS),
        activation=_one_of(keys.get("activation", "relu"), "activation", ACTIVATIONS),
        down_factors=level_factors(keys, "down_factors"),
        kernel_sizes=_level_kernels(keys),
        num_groups=_groups(keys),
    )


def _level_kernels(keys: Arguments) -> list[Size3]:
    """Return the kernel of each level of an RSUNet: `kernel_2d` for the first `depth_2d` of them.

    Raises:
        ValueError: A kernel is even, or `depth_2d` is negative or above the number of levels.
    """
    levels = len(_checked_filters(keys))
    kernel = _odd_size3(keys.get("kernel_size", 3), "kernel_size")
    fine = int(keys.get("depth_2d", 0))
    if not 0 <= fine <= levels:
        raise ValueError(f"depth_2d is {fine}, but filters have {levels} levels. Try 1.")
    return [_odd_size3(keys.get("kernel_2d", (1, 3, 3)), "kernel_2d")] * fine + [kernel] * (
        levels - fine
    )


def _groups(keys: Arguments) -> int:
    """Return the most groups that `norm: group` makes.

    Raises:
        ValueError: It is below 1.
    """
    groups = int(keys.get("num_groups", GROUPS))
    if groups < 1:
        raise ValueError(f"num_groups is {groups}, but it must be at least 1. Try {GROUPS}.")
    return groups


def rsunet_path(keys: Arguments, axis: int) -> list[Step]:
    """Return four convolutions a block, with fixed up-sampling and pooling between."""
    kernels = [kernel[axis] for kernel in _level_kernels(keys)]
    blocks: list[list[Step]] = [[("conv", k, 1, k // 2)] * 4 for k in kernels]
    factors = [f[axis] for f in level_factors(keys, "down_factors")]
    path = list(blocks[0])
    for f, block in zip(factors, blocks[1:], strict=True):
        width = 2 * f - f % 2
        path += [("transposed", width, f, (width - f) // 2), *block]
    for f, block in zip(factors[::-1], blocks[-2::-1], strict=True):
        path += [("conv", f, f, 0), *block]
    return path


def _monai_norm(keys: Arguments, default: str, *also: int) -> tuple[str, dict[str, Any]]:
    """Return a norm as MONAI takes it; groups divide every number of channels that occurs."""
    name = _one_of(keys.get("norm", default), "norm", NORMS[:3])
    if name == "group":
        return name, {"num_groups": group_count(math.gcd(*keys["filters"], *also), _groups(keys))}
    return name, {"affine": True}


def _basic_unet_features(keys: Arguments) -> tuple[int, ...]:
    """Return the six widths of BasicUNet: five levels and the last decoder's.

    Five are completed by the first: PyTorch Connectomics repeats the last, so that the decoder
    at full resolution is the widest layer of all.

    Raises:
        ValueError: There are neither five nor six.
    """
    filters = _checked_filters(keys)
    if len(filters) not in (5, 6):
        raise ValueError(
            f"filters is {list(filters)}, but monai_basic_unet3d needs five levels, and may take "
            "the last decoder's width as sixth. Try [16, 32, 64, 128, 256]."
        )
    odd = [f for f in filters[1:5] if f % 2]
    if odd:
        raise ValueError(f"filters {odd} are odd, but monai_basic_unet3d halves them. Add 1.")
    return filters if len(filters) == 6 else (*filters, filters[0])


def build_basic_unet(keys: Arguments) -> nn.Module:
    """Return MONAI's BasicUNet."""
    features = _basic_unet_features(keys)
    options: dict[str, Any] = {}
    if "activation" in keys:
        options["act"] = _one_of(keys["activation"], "activation", ACTIVATIONS)
    return HeadedBasicUNet(
        features,
        in_channels=keys["in_channels"],
        out_channels=keys["out_channels"],
        deep_supervision=keys["deep_supervision"],
        norm=_monai_norm({**keys, "filters": features}, "instance"),
        dropout=_dropout(keys),
        upsample=_one_of(keys.get("upsample", "deconv"), "upsample", UPSAMPLES),
        **options,
    )


def basic_unet_path(keys: Arguments, axis: int) -> list[Step]:
    """Return two convolutions a level, with up-sampling and pooling by two between."""
    del axis
    pair: list[Step] = [("conv", 3, 1, 1)] * 2
    up: list[Step] = {
        "deconv": [("transposed", 2, 2, 0)],
        "nontrainable": [("transposed", 4, 2, 1)],
        "pixelshuffle": [("conv", 2, 1, 1), ("transposed", 2, 2, 0), ("conv", 3, 1, 1)],
    }[_one_of(keys.get("upsample", "deconv"), "upsample", UPSAMPLES)]
    return [*(pair + up) * 4, *pair, *([("conv", 2, 2, 0), *pair] * 4)]


def _unet_options(keys: Arguments) -> tuple[int, Size3]:
    """Return residual units and kernel of MONAI's UNet."""
    return (
        int(keys.get("num_res_units", 2)),
        _odd_size3(keys.get("kernel_size", 3), "kernel_size"),
    )


def build_unet(keys: Arguments) -> nn.Module:
    """Return MONAI's UNet; without `strides` it keeps the sections apart, as RSUNet does."""
    units, kernel = _unet_options(keys)
    options: dict[str, Any] = {}
    if "activation" in keys:
        options["act"] = _one_of(keys["activation"], "activation", ACTIVATIONS)
    return HeadedUNet(
        _checked_filters(keys),
        level_factors(keys, "strides"),
        in_channels=keys["in_channels"],
        out_channels=keys["out_channels"],
        deep_supervision=keys["deep_supervision"],
        # With residual units the last layer normalises the logits' channels too.
        norm=_monai_norm(keys, "instance", *([keys["out_channels"]] if units else [])),
        dropout=_dropout(keys),
        num_res_units=units,
        kernel_size=kernel,
        **options,
    )


def unet_path(keys: Arguments, axis: int) -> list[Step]:
    """Return strided units down, transposed convolutions and one unit up."""
    units, kernels = _unet_options(keys)
    kernel = kernels[axis]
    keep: Step = ("conv", kernel, 1, kernel // 2)
    strides = [s[axis] for s in level_factors(keys, "strides")]
    path: list[Step] = []
    for s in strides:
        path += [*([keep] if units else []), ("transposed", 3, s, 1)]
    path += [keep] * max(units, 1)
    for s in strides[::-1]:
        path += [*[keep] * (max(units, 1) - 1), ("conv", kernel, s, kernel // 2)]
    return path


def build_mednext(keys: Arguments) -> nn.Module:
    """Return MONAI's MedNeXt of a size.

    Raises:
        ValueError: The widths are not five that double, or the size is unknown.
    """
    filters = _checked_filters(keys)
    first = filters[0]
    if filters != tuple(first * 2**i for i in range(5)):
        raise ValueError(
            f"filters is {list(filters)}, but mednext has five levels and doubles its width. "
            f"Try {[first * 2**i for i in range(5)]}."
        )
    size = MEDNEXT[_one_of(keys.get("mednext_size", "S"), "mednext_size", tuple(MEDNEXT))]
    return HeadedMedNeXt(
        in_channels=keys["in_channels"],
        out_channels=keys["out_channels"],
        deep_supervision=keys["deep_supervision"],
        init_filters=first,
        kernel_size=_mednext_kernel(keys),
        encoder_expansion_ratio=size["encoder"],
        decoder_expansion_ratio=size["decoder"],
        bottleneck_expansion_ratio=size["bottleneck"],
        blocks_down=size["blocks"],
        blocks_bottleneck=size["bottom"],
        blocks_up=size["blocks"][::-1],
    )


def _mednext_kernel(keys: Arguments) -> int:
    """Return the kernel of the depthwise convolutions.

    Raises:
        ValueError: It is none of 3, 5, 7.
    """
    kernel = int(keys.get("mednext_kernel_size", 3))
    if kernel not in (3, 5, 7):
        raise ValueError(f"mednext_kernel_size is {kernel}, but 3, 5 or 7 is due.")
    return kernel


def mednext_path(keys: Arguments, axis: int) -> list[Step]:
    """Return depthwise convolutions; up-sampling pads at the start, hence the shift by one."""
    del axis
    kernel = _mednext_kernel(keys)
    size = MEDNEXT[_one_of(keys.get("mednext_size", "S"), "mednext_size", tuple(MEDNEXT))]
    keep: Step = ("conv", kernel, 1, kernel // 2)
    path: list[Step] = []
    for blocks in size["blocks"]:
        path += [*[keep] * blocks, ("transposed", kernel, 2, kernel // 2 - 1)]
    path += [keep] * size["bottom"]
    for blocks in size["blocks"][::-1]:
        path += [("conv", kernel, 2, kernel // 2), *[keep] * blocks]
    return path
