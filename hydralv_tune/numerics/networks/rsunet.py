"""The residual symmetric U-Net, with the parameter names of PyTorch Connectomics' checkpoints."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from monai.networks.layers.factories import Act
from torch import Tensor, nn
from torch.nn import functional as F

from hydralv_tune.numerics.networks.registry import GROUPS, Size3, group_count


def check_divisible(x: Tensor, divisor: Size3) -> None:
    """Refuse an input whose sides the levels of a network cannot halve.

    Args:
        x: (B, C, Z, Y, X).
        divisor: What (z, y, x) must be multiples of.

    Raises:
        ValueError: A side is no multiple.
    """
    if x.ndim != 5:
        raise ValueError(f"input has shape {tuple(x.shape)}, but must be (B, C, Z, Y, X).")
    if any(side % d for side, d in zip(x.shape[2:], divisor, strict=True)):
        raise ValueError(
            f"patch {tuple(x.shape[2:])} (z, y, x) does not fit the network, which needs "
            f"multiples of {divisor}."
        )


def _norm(name: str, channels: int, groups: int) -> nn.Module:
    """Return the normalisation layer of that name."""
    if name == "batch":
        return nn.BatchNorm3d(channels)
    if name == "instance":
        return nn.InstanceNorm3d(channels, affine=True)
    if name == "group":
        return nn.GroupNorm(group_count(channels, groups), channels)
    return nn.Identity()


def _activation(name: str) -> nn.Module:
    """Return the activation layer of that name."""
    layer = Act[name]
    # Not in place: the norm's output is kept for its own backward pass.
    return cast(
        nn.Module, layer(inplace=False) if name in ("relu", "leakyrelu", "elu") else layer()
    )


class NormAct(nn.Module):
    """Normalisation, then activation."""

    def __init__(self, channels: int, norm: str, activation: str, groups: int = GROUPS) -> None:
        super().__init__()
        self.norm = _norm(norm, channels, groups)
        self.act = _activation(activation)

    def forward(self, x: Tensor) -> Tensor:
        """Return the activated features."""
        return cast(Tensor, self.act(self.norm(x)))


class Residual(nn.Module):
    """Two pre-activated convolutions around an identity."""

    def __init__(
        self,
        channels: int,
        kernel: Size3,
        norm: str,
        activation: str,
        dropout: float,
        groups: int = GROUPS,
    ) -> None:
        super().__init__()
        self.norm_act1 = NormAct(channels, norm, activation, groups)
        self.conv1 = _conv(channels, channels, kernel)
        self.norm_act2 = NormAct(channels, norm, activation, groups)
        self.conv2 = _conv(channels, channels, kernel)
        # Between the pair, as in wide residual networks: the identity stays clean.
        self.dropout = nn.Dropout3d(dropout) if dropout else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Return the features plus their residual."""
        y = self.conv1(self.norm_act1(x))
        return x + cast(Tensor, self.conv2(self.dropout(self.norm_act2(y))))


class ResBlock(nn.Module):
    """Pre-convolution, residual pair, post-convolution."""

    def __init__(
        self,
        in_channels: int,
        channels: int,
        kernel: Size3,
        norm: str,
        activation: str,
        dropout: float,
        groups: int = GROUPS,
    ) -> None:
        super().__init__()
        self.pre = nn.Sequential(
            NormAct(in_channels, norm, activation, groups), _conv(in_channels, channels, kernel)
        )
        self.res = Residual(channels, kernel, norm, activation, dropout, groups)
        self.post = nn.Sequential(
            NormAct(channels, norm, activation, groups), _conv(channels, channels, kernel)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the features of this level."""
        return cast(Tensor, self.post(self.res(self.pre(x))))


class Down(nn.Module):
    """Max pooling, then a block."""

    def __init__(self, factor: Size3, block: ResBlock) -> None:
        super().__init__()
        self.down = nn.MaxPool3d(factor, factor)
        self.conv = block

    def forward(self, x: Tensor) -> Tensor:
        """Return the features of the next coarser level."""
        return cast(Tensor, self.conv(self.down(x)))


class FixedUpsample(nn.Module):
    """Linear interpolation as a transposed convolution whose weights are not trained.

    Args:
        channels: Channels that the checkpoints keep weights for.
        factor: Up-sampling (z, y, x).
    """

    weight: Tensor

    def __init__(self, channels: int, factor: Size3) -> None:
        super().__init__()
        self.factor = factor
        kernel = _interpolation_kernel(factor)
        self.padding = tuple((k - f) // 2 for k, f in zip(kernel.shape, factor, strict=True))
        self.register_buffer("weight", kernel.expand(channels, 1, *kernel.shape).contiguous())

    def forward(self, x: Tensor) -> Tensor:
        """Return the features at the next finer level, of at most `channels` channels."""
        channels = x.shape[1]
        return F.conv_transpose3d(
            x, self.weight[:channels], stride=self.factor, padding=self.padding, groups=channels
        )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        """Refuse weights that differ between channels, which `Up` relies on being alike.

        PyTorch Connectomics does not interpolate between sections where `down_factors` pools
        them, so its kernels are taken as they are.
        """
        given = state_dict.get(f"{prefix}weight")
        if (
            isinstance(given, Tensor)
            and given.shape == self.weight.shape
            and not torch.allclose(given, given[:1].expand_as(given), atol=1e-4)
        ):
            errors = others[-1]
            errors.append(f"{prefix}weight differs between channels, which is not supported here.")
            return
        super()._load_from_state_dict(state_dict, prefix, *others)


class Up(nn.Module):
    """Up-sampling, projection, sum with the skip connection, then a block."""

    def __init__(self, in_channels: int, channels: int, factor: Size3, block: ResBlock) -> None:
        super().__init__()
        self.up = FixedUpsample(in_channels, factor)
        self.proj = nn.Conv3d(in_channels, channels, 1, bias=False)
        self.conv = block

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """Return the features of the next finer level.

        The projection mixes channels and the interpolation mixes voxels, alike in every channel,
        so they commute: projecting first does the same with a quarter of the voxels and half the
        channels (a training step of the smoke network takes 20 % less on a CPU).
        """
        projected = self.proj(x) if self.proj.out_channels <= self.proj.in_channels else x
        fine = self.up(projected)
        return cast(Tensor, self.conv((self.proj(fine) if projected is x else fine) + skip))


class RSUNet(nn.Module):
    """Residual symmetric U-Net.

    Args:
        in_channels: Channels of the image.
        out_channels: Channels of the logits.
        filters: Channels of each level, finest first; two levels or more.
        deep_supervision: Whether to give logits of the coarser levels while training.
        dropout: Share of channels dropped between the convolutions of each residual pair.
        norm: One of `registry.NORMS`.
        activation: One of `registry.ACTIVATIONS`.
        down_factors: Pooling (z, y, x) between the levels.
        kernel_sizes: Size (z, y, x) of the convolutions of each level, odd.
        num_groups: Of `norm: group`; the largest divisor of the channels up to it.

    Source: Lee et al. 2017, arXiv:1706.00120; names and initialisation as PyTorch Connectomics.
        Its `ds_heads` are kept deepest first, the outputs here go from fine to coarse.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        out_channels: int,
        filters: Sequence[int],
        deep_supervision: bool,
        dropout: float,
        norm: str,
        activation: str,
        down_factors: Sequence[Size3],
        kernel_sizes: Sequence[Size3],
        num_groups: int = GROUPS,
    ) -> None:
        super().__init__()

        def block(into: int, channels: int, level: int) -> ResBlock:
            return ResBlock(
                into, channels, kernel_sizes[level], norm, activation, dropout, num_groups
            )

        z, y, x = (math.prod(factor[axis] for factor in down_factors) for axis in range(3))
        self.divisor = (z, y, x)
        pairs = list(enumerate(zip(filters[:-1], filters[1:], down_factors, strict=True)))
        self.input_conv = block(in_channels, filters[0], 0)
        self.down_blocks = nn.ModuleList(
            Down(factor, block(fine, coarse, level + 1)) for level, (fine, coarse, factor) in pairs
        )
        self.up_blocks = nn.ModuleList(
            Up(coarse, fine, factor, block(fine, fine, level))
            for level, (fine, coarse, factor) in pairs[::-1]
        )
        self.final_norm = NormAct(filters[0], norm, activation, num_groups)
        self.output_head = nn.Conv3d(filters[0], out_channels, 1)
        self.ds_heads = nn.ModuleList(
            nn.Conv3d(channels, out_channels, 1)
            for channels in (filters[:0:-1] if deep_supervision else ())
        )
        self.apply(_initialise)

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Return logits (B, C, Z, Y, X), or those of all levels, fine to coarse, in training."""
        check_divisible(x, self.divisor)
        skips = [self.input_conv(x)]
        for down in self.down_blocks:
            skips.append(down(skips[-1]))
        levels = [skips.pop()]
        for up in self.up_blocks:
            levels.append(up(levels[-1], skips.pop()))
        logits = cast(Tensor, self.output_head(self.final_norm(levels[-1])))
        if not (self.training and len(self.ds_heads)):
            return logits
        coarse = [head(level) for head, level in zip(self.ds_heads, levels, strict=False)]
        return [logits, *coarse[::-1]]


def _conv(in_channels: int, channels: int, kernel: Size3) -> nn.Conv3d:
    """Return a convolution that keeps the shape."""
    z, y, x = (k // 2 for k in kernel)
    return nn.Conv3d(in_channels, channels, kernel, padding=(z, y, x), bias=False)


def _interpolation_kernel(factor: Size3) -> Tensor:
    """Return the transposed-convolution kernel (kz, ky, kx) of linear interpolation."""
    axes = []
    for f in factor:
        size = 2 * f - f % 2
        centre = (size - 1) / 2
        axes.append(1 - (torch.arange(size) - centre).abs() / f)
    z, y, x = axes
    return z[:, None, None] * y[None, :, None] * x[None, None, :]


def _initialise(module: nn.Module) -> None:
    """Draw the weights of a convolution from Kaiming's normal distribution."""
    if isinstance(module, nn.Conv3d):
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)
