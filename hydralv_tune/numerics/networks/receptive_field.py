"""How far a network sees, measured by the gradient of its output on its input."""

from __future__ import annotations

import json
from contextlib import suppress
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from hydralv_tune.numerics.networks.registry import (
    Keys,
    Size3,
    build_network,
    checked_keys,
    divisor,
    network_arguments,
)

FURTHEST = 4096
"""Voxels along an axis beyond which a network counts as one that sees everything."""

NOT_LINEAR = (
    nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.modules.dropout._DropoutNd,
    nn.ReLU, nn.LeakyReLU, nn.ELU, nn.PReLU, nn.GELU, nn.SiLU, nn.Mish,
)  # fmt: skip


def receptive_field(name: str, model: Keys) -> Size3:
    """Return how many voxels (z, y, x) one output voxel can see at most.

    Two image voxels further apart than this cannot influence the same prediction. The mean and
    variance that instance and group normalisation take over the whole patch do not count.

    Args:
        name: A name of `ARCHITECTURES`.
        model: Keys of the `model` block.

    Raises:
        ValueError: The name is unknown, a value is impossible, or the network sees all of any
            patch.
    """
    return _measured(name, json.dumps(network_arguments(model), sort_keys=True))


@lru_cache(maxsize=64)
def _measured(name: str, model: str) -> Size3:
    """Return the largest extent along each axis, of a network whose every path is linear."""
    keys = json.loads(model)
    period = divisor(name, keys)
    network = _linear(_narrow(name, {**keys, "deep_supervision": False}))
    z, y, x = (_extent(network, name, axis, period) for axis in range(3))
    return z, y, x


def _narrow(name: str, keys: Keys) -> nn.Module:
    """Return the network with few channels, which do not change how far it sees."""
    levels = len(keys.get("filters") or checked_keys(name, keys)["filters"])
    for widths in ((1,) * levels, (2,) * levels, tuple(1 << i for i in range(levels))):
        with suppress(ValueError):  # an architecture has its own rules for its widths
            return build_network(name, **{**keys, "filters": widths})
    return build_network(name, **keys)


def _linear(network: nn.Module) -> nn.Module:
    """Return the network with everything replaced that could hide a path from the gradient.

    All weights become positive, so no two paths cancel. Each layer passes on only whether a
    gradient is above 0, so the product over many layers neither overflows nor vanishes.
    """
    for parent in list(network.modules()):
        for key, child in list(parent.named_children()):
            if isinstance(child, nn.MaxPool3d):
                pool = nn.AvgPool3d(child.kernel_size, child.stride, child.padding)
                setattr(parent, key, pool)
            elif isinstance(child, NOT_LINEAR):
                setattr(parent, key, nn.Identity())
    for parameter in network.parameters():
        nn.init.constant_(parameter, 1 / max(parameter[0].numel(), 1))
    for module in network.modules():
        if not list(module.children()):
            module.register_full_backward_hook(_signs)
    return network.eval()


def _signs(module: nn.Module, inward: Any, outward: Any) -> Any:
    """Return whether a layer's gradients on its inputs are above 0."""
    return tuple(None if gradient is None else gradient.sign() for gradient in inward)


def _extent(network: nn.Module, name: str, axis: int, period: Size3) -> int:
    """Return the most voxels of an axis that an output voxel sees, over its positions."""
    step = period[axis]
    length = 16 * step
    while length <= FURTHEST:
        first, last = _seen(network, axis, period, length)
        if first.min() > 0 and last.max() < length - 1:
            return int((last - first).max()) + 1
        length *= 2
    raise ValueError(
        f"{name} sees further than {FURTHEST} voxels along {'zyx'[axis]}, so no margin keeps "
        "training and scoring apart. Set data.split.margin, or hold out whole volumes."
    )


def _seen(network: nn.Module, axis: int, period: Size3, length: int) -> tuple[Tensor, Tensor]:
    """Return the first and last input voxel along an axis that matter to each of some outputs.

    The outputs are `period` neighbours in the middle: a network that pools sees a little further
    from some of them. Each has a copy of the input, so that one gradient tells of all.
    """
    count = period[axis]
    shape = [*period]
    shape[axis] = length
    image = torch.ones(count, 1, *shape, requires_grad=True)
    logits = network(image)[:, 0].movedim(axis + 1, 1)
    own = torch.arange(count)
    (gradient,) = torch.autograd.grad(logits[own, length // 2 // count * count + own].sum(), image)
    matters = (gradient[:, 0].movedim(axis + 1, 1).flatten(2) != 0).any(2).long()
    return matters.argmax(1), length - 1 - matters.flip(1).argmax(1)
