"""MONAI's networks with heads on their coarser levels, so that all can be deeply supervised."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from monai.networks.nets.basic_unet import BasicUNet
from monai.networks.nets.mednext import MedNeXt
from monai.networks.nets.segresnet_ds import SegResNetDS
from monai.networks.nets.unet import UNet
from torch import Tensor, nn

from hydralv_tune.numerics.networks.registry import Size3
from hydralv_tune.numerics.networks.rsunet import check_divisible


class HeadedBasicUNet(BasicUNet):
    """MONAI's BasicUNet, with heads on the four coarser levels.

    Args:
        features: Channels of the five levels and of the last decoder.
        in_channels: Channels of the image.
        out_channels: Channels of the logits.
        deep_supervision: Whether to give logits of the coarser levels while training.
        options: Further arguments of BasicUNet.
    """

    def __init__(
        self,
        features: Sequence[int],
        *,
        in_channels: int,
        out_channels: int,
        deep_supervision: bool,
        **options: Any,
    ) -> None:
        super().__init__(
            spatial_dims=3,
            in_channels=in_channels,
            out_channels=out_channels,
            features=features,
            **options,
        )
        self.ds_heads = _heads(features[4:0:-1] if deep_supervision else (), out_channels)

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Return logits, or those of all levels, fine to coarse, in training."""
        check_divisible(x, (16, 16, 16))
        skips = [self.conv_0(x)]
        for down in (self.down_1, self.down_2, self.down_3, self.down_4):
            skips.append(down(skips[-1]))
        levels = [skips.pop()]
        for up in (self.upcat_4, self.upcat_3, self.upcat_2, self.upcat_1):
            levels.append(up(levels[-1], skips.pop()))
        return _outputs(self, self.final_conv(levels[-1]), levels)


class HeadedUNet(UNet):
    """MONAI's UNet, with heads on every level below the image's resolution.

    Args:
        channels: Channels of each level.
        strides: Strides (z, y, x) between them.
        in_channels: Channels of the image.
        out_channels: Channels of the logits.
        deep_supervision: Whether to give logits of the coarser levels while training.
        options: Further arguments of UNet.
    """

    def __init__(
        self,
        channels: Sequence[int],
        strides: Sequence[Size3],
        *,
        in_channels: int,
        out_channels: int,
        deep_supervision: bool,
        **options: Any,
    ) -> None:
        super().__init__(
            spatial_dims=3,
            in_channels=in_channels,
            out_channels=out_channels,
            channels=channels,
            strides=strides,
            **options,
        )
        z, y, x = (math.prod(factor[axis] for factor in strides) for axis in range(3))
        self.divisor = (z, y, x)
        # A decoder gives as many channels as the encoder above it, the bottom its own.
        coarse = (channels[-1], *channels[:-2][::-1]) if deep_supervision else ()
        self.ds_heads = _heads(coarse, out_channels)

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Return logits, or those of all levels, fine to coarse, in training."""
        check_divisible(x, self.divisor)
        if not (self.training and len(self.ds_heads)):
            logits: Tensor = self.model(x)
            return logits
        levels: list[Tensor] = []
        return _outputs(self, _through(self.model, x, levels), levels)


class HeadedMedNeXt(MedNeXt):
    """MONAI's MedNeXt, whose outputs in training are a list like those of the others.

    Args:
        options: Arguments of MedNeXt.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(spatial_dims=3, norm_type="group", use_residual_connection=True, **options)

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Return logits, or those of all levels, fine to coarse, in training."""
        check_divisible(x, (16, 16, 16))
        outputs = super().forward(x)
        return outputs if isinstance(outputs, Tensor) else list(outputs)


class HeadedSegResNet(SegResNetDS):
    """MONAI's SegResNetDS, a residual encoder and a light decoder, with heads on all levels.

    Args:
        channels: Channels of each level, doubling.
        strides: Strides (z, y, x) between them: [1, 2, 2] as often as wanted, then [2, 2, 2].
        deep_supervision: Whether to give logits of the coarser levels while training.
        options: Further arguments of SegResNetDS.
    """

    def __init__(
        self,
        channels: Sequence[int],
        strides: Sequence[Size3],
        *,
        out_channels: int,
        deep_supervision: bool,
        **options: Any,
    ) -> None:
        # MONAI halves the sections once voxels are no longer twice as deep as they are wide.
        flat = sum(stride == (1, 2, 2) for stride in strides)
        super().__init__(
            init_filters=channels[0],
            out_channels=out_channels,
            resolution=(2**flat, 1, 1),
            **options,
        )
        z, y, x = (math.prod(factor[axis] for factor in strides) for axis in range(3))
        self.divisor = (z, y, x)
        self.output_head = self.up_layers[-1].pop("head")
        self.ds_heads = _heads(channels[:0:-1] if deep_supervision else (), out_channels)

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Return logits, or those of all levels, fine to coarse, in training."""
        check_divisible(x, self.divisor)
        skips = self.encoder(x)
        levels = [skips.pop()]
        for up in self.up_layers:
            levels.append(up["blocks"](up["upsample"](levels[-1]) + skips.pop()))
        return _outputs(self, self.output_head(levels[-1]), levels)


def _heads(channels: Sequence[int], out_channels: int) -> nn.ModuleList:
    """Return projections to logits, one a level."""
    return nn.ModuleList(nn.Conv3d(c, out_channels, 1) for c in channels)


def _outputs(network: Any, logits: Tensor, levels: Sequence[Tensor]) -> Tensor | list[Tensor]:
    """Return the logits, before those of `levels` (coarse to fine) where they are trained."""
    if not (network.training and len(network.ds_heads)):
        return logits
    coarse = [head(level) for head, level in zip(network.ds_heads, levels, strict=False)]
    return [logits, *coarse[::-1]]


def _through(block: Any, x: Tensor, levels: list[Tensor]) -> Tensor:
    """Return what a block of UNet gives, and collect the features within, coarse to fine."""
    if not (isinstance(block, nn.Sequential) and len(block) == 3):
        bottom: Tensor = block(x)
        return bottom
    down, skip, up = block
    fine = down(x)
    coarse = _through(skip.submodule, fine, levels)
    levels.append(coarse)
    result: Tensor = up(torch.cat([fine, coarse], dim=1))
    return result
