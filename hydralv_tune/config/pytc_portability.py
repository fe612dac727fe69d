"""Which networks of a candidate exist in PyTorch Connectomics, so that weights go over.

The rules were measured: `tests/vectors/pytc` holds, for every combination that goes over, weights
under that tool's names with an input and its output.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hydralv_tune.config.candidate import Candidate

RSUNET_ACTIVATIONS = ("relu", "leakyrelu", "prelu", "elu")
IN_PLACE = ("relu", "leakyrelu", "elu")
MONAI_NORMS = ("batch", "group")
VOXEL_WEIGHTED = ("SmoothL1Loss", "WeightedMSELoss", "WeightedMAELoss")
"""Losses that today's version balances between the classes unless `pos_weight` is said."""


def obstacles(candidate: Candidate) -> list[str]:
    """Return why a candidate's network does not exist in PyTorch Connectomics; none where it does.

    Args:
        candidate: A checked candidate.

    Returns:
        One sentence for each key of `model` that stands against it, the key first.
    """
    rules = {
        "rsunet": _rsunet,
        "monai_basic_unet3d": _basic_unet,
        "monai_unet": _unet,
    }
    rule = rules.get(candidate.model.architecture)
    if rule is None:
        return [
            f"model.architecture {candidate.model.architecture}: its network of that name, if "
            "any, comes from another package, with other weights."
        ]
    return list(rule(candidate))


def _rsunet(candidate: Candidate) -> Iterator[str]:
    """Yield what its RSUNet cannot be."""
    model = candidate.model
    activation = model.activation or "relu"
    if activation not in RSUNET_ACTIVATIONS:
        yield (
            f"model.activation {activation}: its RSUNet has {', '.join(RSUNET_ACTIVATIONS)} alone."
        )
    if model.norm == "none" and activation in IN_PLACE:
        yield (
            f"model.norm none with activation {activation}: its activations work in place, so "
            "without a norm they overwrite the identity of each residual pair. prelu goes."
        )
    for factor in model.down_factors or []:
        if factor[1] != factor[2]:
            yield f"model.down_factors {factor}: its up-sampling needs equal factors in y and x."
    if model.depth_2d and model.kernel_size not in (None, 3, (3, 3, 3)):
        yield f"model.kernel_size {model.kernel_size} beside depth_2d: it has one of the two."


def _basic_unet(candidate: Candidate) -> Iterator[str]:
    """Yield what its BasicUNet cannot be."""
    if candidate.model.activation is None:
        yield (
            "model.activation null: MONAI's own slope of 0.1 cannot be said there. relu, "
            "leakyrelu, prelu, elu, gelu, swish and mish go."
        )
    yield from _monai_norm(candidate)


def _unet(candidate: Candidate) -> Iterator[str]:
    """Yield what its UNet cannot be."""
    model = candidate.model
    strides = model.strides or [[1, 2, 2]] * (len(model.filters) - 1)
    if any(stride not in (2, [2, 2, 2]) for stride in strides):
        yield "model.strides: its UNet halves z, y and x at every level; [2, 2, 2] alone goes."
    if model.activation not in (None, "prelu"):
        yield f"model.activation {model.activation}: its UNet has PReLU alone."
    kernel = model.kernel_size
    if not (kernel is None or isinstance(kernel, int) or len(set(kernel)) == 1):
        yield f"model.kernel_size {list(kernel)}: its kernels have one size in z, y and x."
    yield from _monai_norm(candidate)


def _monai_norm(candidate: Candidate) -> Iterator[str]:
    """Yield which norm its MONAI networks lack."""
    norm = candidate.model.norm or "instance"
    if norm not in MONAI_NORMS:
        yield (
            f"model.norm {norm}: its instance norm learns no scale and shift. batch and group go."
        )
