"""The losses of logits (B, C, Z, Y, X) against a target of that shape, inside a mask.

Each is written per voxel or per overlap; `averaged_over_mask` and `overlap_inside_mask` do the
rest alike for all: voxels outside the mask (B, 1, Z, Y, X) change neither the value nor the
gradient, sums are taken in float32, and the host never waits for the device. `registry` declares
the arguments, which have the names of PyTorch Connectomics and MONAI, and checks them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F
from monai.losses import DiceLoss, FocalLoss, TverskyLoss
from torch import Tensor

LARGEST_BALANCED_WEIGHT = 100.0
"""Limit of a weight counted from a batch: a patch with one foreground voxel is no reason to
multiply its gradient by the size of the patch."""

Score = Callable[..., Tensor]
Weight = float | str | None


def averaged_over_mask(voxel_loss: Score) -> Score:
    """Return a loss per voxel as its mean (or sum) over the mask; 0 where the mask is empty.

    The loss takes two more arguments: `foreground_weight`, the weight of voxels whose target is
    above 0 in a weighted mean (background has 1; `balanced` gives both the same total), and
    `reduction`, `mean` or `sum`.

    Args:
        voxel_loss: Function of (logits, target, mask) in float32 and its own arguments, that
            returns a loss per voxel (B, C, Z, Y, X).
    """

    @wraps(voxel_loss)
    def loss(
        logits: Tensor,
        target: Tensor,
        mask: Tensor,
        *,
        foreground_weight: Weight,
        reduction: str,
        **arguments: Any,
    ) -> Tensor:
        logits, target, mask = _prepared(logits, target, mask)
        voxels = voxel_loss(logits, target, mask, **arguments)
        weight = mask.expand_as(voxels)
        factor = _positive_weight(foreground_weight, target, mask)
        if factor is not None:
            weight = weight * torch.where(target > 0, factor, 1.0)
        total = (voxels * weight).sum()
        return total if reduction == "sum" else total / weight.sum().clamp(min=1e-6)

    return loss


def overlap_inside_mask(criterion: Callable[..., Callable[[Tensor, Tensor], Tensor]]) -> Score:
    """Return 1 minus an overlap, averaged over the samples that have a voxel in the mask.

    Args:
        criterion: Function of a loss's own arguments and MONAI's common ones that returns MONAI's
            loss of (probabilities, target).
    """

    @wraps(criterion)
    def loss(
        logits: Tensor,
        target: Tensor,
        mask: Tensor,
        *,
        sigmoid: bool,
        batch: bool,
        reduction: str,
        **arguments: Any,
    ) -> Tensor:
        logits, target, mask = _prepared(logits, target, mask)
        overlap = criterion(batch=batch, soft_label=True, reduction="none", **arguments)
        probability = torch.sigmoid(logits) if sigmoid else logits
        # Probabilities are masked, not logits: a logit of 0 is a probability of one half.
        scores = overlap(probability * mask, target * mask)
        seen = mask.flatten(start_dim=1).amax(dim=1)
        if batch:
            seen = seen.amax(dim=0, keepdim=True)
        scores = scores.reshape(seen.shape[0], -1) * seen[:, None]
        if reduction == "sum":
            return scores.sum()
        return scores.sum() / (seen.sum().clamp(min=1.0) * scores.shape[1])

    return loss


@overlap_inside_mask
def dice(**arguments: Any) -> DiceLoss:
    """Return Dice. A soft target reaches 0 where the prediction equals it."""
    return DiceLoss(**arguments)


@overlap_inside_mask
def tversky(**arguments: Any) -> TverskyLoss:
    """Return Tversky: Dice in which `alpha` weighs false positives and `beta` false negatives.

    Source:
        Salehi et al. 2017, doi:10.1007/978-3-319-67389-9_44.
    """
    return TverskyLoss(**arguments)


@averaged_over_mask
def focal(
    logits: Tensor, target: Tensor, mask: Tensor, *, gamma: float, alpha: float | None
) -> Tensor:
    """Return the focal loss: cross-entropy in which easy voxels count less.

    `gamma` 0 is plain cross-entropy. `alpha` weighs foreground and 1 - alpha background, so 0.25
    weighs foreground three times *less*; None weighs both with 1.

    Source:
        Lin et al. 2017, doi:10.1109/ICCV.2017.324.
    """
    return FocalLoss(gamma=gamma, alpha=alpha, reduction="none")(logits, target)


@averaged_over_mask
def bce_with_logits(logits: Tensor, target: Tensor, mask: Tensor, *, pos_weight: Weight) -> Tensor:
    """Return the binary cross-entropy.

    `pos_weight` is a factor on the positive term that does not enter the mean's denominator, as
    in PyTorch; `balanced` (or `auto`) counts negatives per positive in the batch.
    """
    factor = _positive_weight(pos_weight, target, mask)
    return F.binary_cross_entropy_with_logits(logits, target, reduction="none", pos_weight=factor)


@averaged_over_mask
def smooth_l1(logits: Tensor, target: Tensor, mask: Tensor, *, beta: float, tanh: bool) -> Tensor:
    """Return the smooth L1 distance: squared below `beta`, absolute above; 0 is plain L1.

    `tanh` squashes the output to (-1, 1) first, the range of the distance target.
    """
    prediction = torch.tanh(logits) if tanh else logits
    return F.smooth_l1_loss(prediction, target, beta=beta, reduction="none")


@averaged_over_mask
def mean_squared(logits: Tensor, target: Tensor, mask: Tensor, *, tanh: bool) -> Tensor:
    """Return the squared distance; `tanh` as in `smooth_l1`."""
    return F.mse_loss(torch.tanh(logits) if tanh else logits, target, reduction="none")


@averaged_over_mask
def mean_absolute(logits: Tensor, target: Tensor, mask: Tensor, *, tanh: bool) -> Tensor:
    """Return the absolute distance; `tanh` as in `smooth_l1`."""
    return F.l1_loss(torch.tanh(logits) if tanh else logits, target, reduction="none")


def dice_ce(
    logits: Tensor,
    target: Tensor,
    mask: Tensor,
    *,
    lambda_dice: float,
    lambda_ce: float,
    foreground_weight: Weight,
    reduction: str,
    **overlap: Any,
) -> Tensor:
    """Return `lambda_dice` times Dice plus `lambda_ce` times binary cross-entropy."""
    entropy = bce_with_logits(
        logits, target, mask,
        pos_weight=None, foreground_weight=foreground_weight, reduction=reduction,
    )  # fmt: skip
    overlap_loss = dice(logits, target, mask, reduction=reduction, **overlap)
    return lambda_dice * overlap_loss + lambda_ce * entropy


def dice_focal(
    logits: Tensor,
    target: Tensor,
    mask: Tensor,
    *,
    gamma: float,
    alpha: float | None,
    lambda_dice: float,
    lambda_focal: float,
    foreground_weight: Weight,
    reduction: str,
    **overlap: Any,
) -> Tensor:
    """Return `lambda_dice` times Dice plus `lambda_focal` times the focal loss."""
    hard = focal(
        logits, target, mask,
        gamma=gamma, alpha=alpha, foreground_weight=foreground_weight, reduction=reduction,
    )  # fmt: skip
    overlap_loss = dice(logits, target, mask, reduction=reduction, **overlap)
    return lambda_dice * overlap_loss + lambda_focal * hard


def _prepared(logits: Tensor, target: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the three in float32, the mask as 0 and 1; bf16 sums over a patch lose digits."""
    if logits.shape != target.shape:
        raise ValueError(
            f"The loss got logits of shape {tuple(logits.shape)} and a target of shape "
            f"{tuple(target.shape)}; they must be equal."
        )
    if mask.shape != (logits.shape[0], 1, *logits.shape[2:]):
        raise ValueError(
            f"The loss got a mask of shape {tuple(mask.shape)} for logits of shape "
            f"{tuple(logits.shape)}; it must be (B, 1, Z, Y, X)."
        )
    return logits.float(), target.float(), mask.float()


def _positive_weight(weight: Weight, target: Tensor, mask: Tensor) -> Tensor | None:
    """Return a weight of positives as a tensor, counted on the device where it is `balanced`."""
    if weight is None:
        return None
    if isinstance(weight, str):
        positives = ((target > 0) * mask).sum()
        negatives = ((target <= 0) * mask).sum()
        return (negatives / positives.clamp(min=1.0)).clamp(
            1 / LARGEST_BALANCED_WEIGHT, LARGEST_BALANCED_WEIGHT
        )
    return torch.full((), float(weight), device=target.device)
