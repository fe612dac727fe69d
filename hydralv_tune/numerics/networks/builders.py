"""How each network is built from its checked keys; `registry` declares and checks them."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from hydralv_tune.numerics.networks.monai_heads import (
    HeadedBasicUNet,
    HeadedMedNeXt,
    HeadedSegResNet,
    HeadedUNet,
)
from hydralv_tune.numerics.networks.registry import Keys, group_count
from hydralv_tune.numerics.networks.rsunet import RSUNet

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


RESIDUAL_BLOCKS = (1, 3, 4, 6, 6, 6)
"""Of each level of the encoder, the last one's of any further: nnU-Net's residual encoder."""


def build_rsunet(keys: Keys) -> nn.Module:
    """Return a residual symmetric U-Net."""
    own = {key: keys[key] for key in keys if key not in ("kernel_size", "depth_2d", "kernel_2d")}
    coarse = len(keys["filters"]) - keys["depth_2d"]
    kernels = [keys["kernel_2d"]] * keys["depth_2d"] + [keys["kernel_size"]] * coarse
    return RSUNet(**own, kernel_sizes=kernels)


def build_basic_unet(keys: Keys) -> nn.Module:
    """Return MONAI's BasicUNet."""
    return HeadedBasicUNet(
        keys["filters"],
        in_channels=keys["in_channels"],
        out_channels=keys["out_channels"],
        deep_supervision=keys["deep_supervision"],
        norm=_monai_norm(keys),
        dropout=keys["dropout"],
        upsample=keys["upsample"],
        **_monai_activation(keys),
    )


def build_unet(keys: Keys) -> nn.Module:
    """Return MONAI's UNet; without `strides` it keeps the sections apart, as RSUNet does."""
    units = keys["num_res_units"]
    return HeadedUNet(
        keys["filters"],
        keys["strides"],
        in_channels=keys["in_channels"],
        out_channels=keys["out_channels"],
        deep_supervision=keys["deep_supervision"],
        # With residual units the last layer normalises the logits' channels too.
        norm=_monai_norm(keys, *([keys["out_channels"]] if units else [])),
        dropout=keys["dropout"],
        num_res_units=units,
        kernel_size=keys["kernel_size"],
        **_monai_activation(keys),
    )


def build_segresnet(keys: Keys) -> nn.Module:
    """Return MONAI's SegResNetDS with as many residual blocks a level as nnU-Net's encoder has."""
    levels = len(keys["filters"])
    blocks = RESIDUAL_BLOCKS + RESIDUAL_BLOCKS[-1:] * levels
    return HeadedSegResNet(
        keys["filters"],
        keys["strides"],
        in_channels=keys["in_channels"],
        out_channels=keys["out_channels"],
        deep_supervision=keys["deep_supervision"],
        norm=_monai_norm(keys),
        act=keys["activation"],
        blocks_down=blocks[:levels],
    )


def build_mednext(keys: Keys) -> nn.Module:
    """Return MONAI's MedNeXt of a size."""
    size = MEDNEXT[keys["mednext_size"]]
    return HeadedMedNeXt(
        in_channels=keys["in_channels"],
        out_channels=keys["out_channels"],
        deep_supervision=keys["deep_supervision"],
        init_filters=keys["filters"][0],
        kernel_size=keys["mednext_kernel_size"],
        encoder_expansion_ratio=size["encoder"],
        decoder_expansion_ratio=size["decoder"],
        bottleneck_expansion_ratio=size["bottleneck"],
        blocks_down=size["blocks"],
        blocks_bottleneck=size["bottom"],
        blocks_up=size["blocks"][::-1],
    )


def _monai_norm(keys: Keys, *also: int) -> tuple[str, dict[str, Any]]:
    """Return a norm as MONAI takes it; groups divide every number of channels that occurs."""
    if keys["norm"] == "group":
        common = math.gcd(*keys["filters"], *also)
        return "group", {"num_groups": group_count(common, keys["num_groups"])}
    return keys["norm"], {"affine": True}


def _monai_activation(keys: Keys) -> dict[str, Any]:
    """Return the activation as MONAI takes it, where one is set."""
    return {} if keys["activation"] is None else {"act": keys["activation"]}
