"""Score logits against a target: one function per loss, all inside the mask only.

Every function takes `(logits, target, mask)` and the keyword arguments that PyTorch Connectomics
and MONAI give the loss. Voxels outside the mask have no influence on the value and none on the
gradient, and nothing here makes the host wait for the device.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from monai.losses import DiceLoss, FocalLoss, TverskyLoss
from torch import Tensor

LARGEST_BALANCED_WEIGHT = 100.0
"""Cap of a weight that is counted from a batch: a patch with one foreground voxel is no reason to
multiply its gradient by the size of the patch."""

Loss = Callable[..., Tensor]
Weight = float | str | None


def dice(
    logits: Tensor,
    target: Tensor,
    mask: Tensor,
    *,
    sigmoid: bool = True,
    squared_pred: bool = False,
    jaccard: bool = False,
    batch: bool = False,
    smooth_nr: float = 1e-5,
    smooth_dr: float = 1e-5,
    reduction: str = "mean",
) -> Tensor:
    """Return 1 minus the Dice overlap, averaged over the samples that have a voxel to count.

    Args:
        logits: (B, C, Z, Y, X).
        target: (B, C, Z, Y, X) in [0, 1]; soft targets reach 0 where the prediction equals them.
        mask: (B, 1, Z, Y, X), True where a voxel counts.
        sigmoid: Whether to turn logits into probabilities; False if they are that already.
        squared_pred: Square prediction and target in the denominator.
        jaccard: Jaccard index in place of Dice.
        batch: One overlap over the whole batch rather than one per sample.
        smooth_nr: Added to the numerator.
        smooth_dr: Added to the denominator, above 0: nothing predicted, nothing true is no NaN.
        reduction: `mean` or `sum` over samples and channels.

    Raises:
        ValueError: Shapes that do not fit, or an argument out of range.
    """
    overlap = DiceLoss(
        squared_pred=squared_pred,
        jaccard=jaccard,
        batch=batch,
        smooth_nr=smooth_nr,
        smooth_dr=smooth_dr,
        soft_label=True,
        reduction="none",
    )
    return _overlap(overlap, logits, target, mask, sigmoid, batch, smooth_dr, reduction)


def tversky(
    logits: Tensor,
    target: Tensor,
    mask: Tensor,
    *,
    sigmoid: bool = True,
    alpha: float = 0.5,
    beta: float = 0.5,
    batch: bool = False,
    smooth_nr: float = 1e-5,
    smooth_dr: float = 1e-5,
    reduction: str = "mean",
) -> Tensor:
    """Return 1 minus the Tversky index: Dice with a price of its own for either error.

    Args:
        logits: As in `dice`.
        target: As in `dice`.
        mask: As in `dice`.
        sigmoid: As in `dice`.
        alpha: Weight of false positives; above `beta` it favours precision.
        beta: Weight of false negatives; above `alpha` it favours recall.
        batch: As in `dice`.
        smooth_nr: As in `dice`.
        smooth_dr: As in `dice`.
        reduction: As in `dice`.

    Raises:
        ValueError: As in `dice`.

    Source:
        Salehi et al. 2017, doi:10.1007/978-3-319-67389-9_44.
    """
    if alpha < 0 or beta < 0 or alpha + beta == 0:
        raise ValueError(
            f"TverskyLoss: alpha {alpha} and beta {beta} must not be negative nor both 0."
        )
    overlap = TverskyLoss(
        alpha=alpha,
        beta=beta,
        batch=batch,
        smooth_nr=smooth_nr,
        smooth_dr=smooth_dr,
        soft_label=True,
        reduction="none",
    )
    return _overlap(overlap, logits, target, mask, sigmoid, batch, smooth_dr, reduction)


def focal(
    logits: Tensor,
    target: Tensor,
    mask: Tensor,
    *,
    gamma: float = 2.0,
    alpha: float | None = None,
    foreground_weight: Weight = None,
    reduction: str = "mean",
) -> Tensor:
    """Return the focal loss: cross-entropy in which easy voxels count less.

    Args:
        logits: As in `dice`.
        target: As in `dice`.
        mask: As in `dice`.
        gamma: 0 is plain cross-entropy; larger ones fade out easy voxels faster.
        alpha: Weight of foreground, 1 - alpha that of background: 0.25 weights foreground three
            times *less*. None weights both with 1.
        foreground_weight: As in `bce_with_logits`.
        reduction: `mean` over the mask, or `sum`.

    Raises:
        ValueError: Shapes that do not fit, or an argument out of range.

    Source:
        Lin et al. 2017, doi:10.1109/ICCV.2017.324.
    """
    if alpha is not None and not 0 <= alpha <= 1:
        raise ValueError(f"FocalLoss: alpha is {alpha}, but must lie between 0 and 1.")
    if gamma < 0:
        raise ValueError(f"FocalLoss: gamma is {gamma}, but must not be negative.")
    logits, target, mask = _prepared(logits, target, mask)
    voxels = FocalLoss(gamma=gamma, alpha=alpha, reduction="none")(logits, target)
    return _reduced(voxels, target, mask, foreground_weight, reduction)


def bce_with_logits(
    logits: Tensor,
    target: Tensor,
    mask: Tensor,
    *,
    pos_weight: Weight = None,
    foreground_weight: Weight = None,
    reduction: str = "mean",
) -> Tensor:
    """Return the binary cross-entropy.

    Args:
        logits: As in `dice`.
        target: As in `dice`.
        mask: As in `dice`.
        pos_weight: Factor on the positive term, which does not enter the mean's denominator, as in
            PyTorch; `balanced` (or `auto`) counts negatives per positive in the batch.
        foreground_weight: Weight of voxels with a target above 0 in a weighted mean, background
            having 1; `balanced` gives both sides the same total. The scale of the loss stays.
        reduction: `mean` over the mask, or `sum`.

    Raises:
        ValueError: Shapes that do not fit, or an argument out of range.
    """
    logits, target, mask = _prepared(logits, target, mask)
    factor = _positive_weight("pos_weight", pos_weight, target, mask)
    voxels = F.binary_cross_entropy_with_logits(logits, target, reduction="none", pos_weight=factor)
    return _reduced(voxels, target, mask, foreground_weight, reduction)


def dice_ce(
    logits: Tensor,
    target: Tensor,
    mask: Tensor,
    *,
    sigmoid: bool = True,
    lambda_dice: float = 1.0,
    lambda_ce: float = 1.0,
    batch: bool = False,
    smooth_nr: float = 1e-5,
    smooth_dr: float = 1e-5,
    foreground_weight: Weight = None,
    reduction: str = "mean",
) -> Tensor:
    """Return `lambda_dice` times Dice plus `lambda_ce` times binary cross-entropy.

    Args:
        logits: As in `dice`.
        target: As in `dice`.
        mask: As in `dice`.
        sigmoid: Must stay True: the cross-entropy takes logits.
        lambda_dice: Weight of Dice.
        lambda_ce: Weight of the cross-entropy.
        batch: As in `dice`.
        smooth_nr: As in `dice`.
        smooth_dr: As in `dice`.
        foreground_weight: Of the cross-entropy, as in `bce_with_logits`.
        reduction: As in `dice`.

    Raises:
        ValueError: As in `dice`; `sigmoid` is False.
    """
    _needs_logits("DiceCELoss", sigmoid)
    overlap = dice(
        logits,
        target,
        mask,
        batch=batch,
        smooth_nr=smooth_nr,
        smooth_dr=smooth_dr,
        reduction=reduction,
    )
    entropy = bce_with_logits(
        logits, target, mask, foreground_weight=foreground_weight, reduction=reduction
    )
    return lambda_dice * overlap + lambda_ce * entropy


def dice_focal(
    logits: Tensor,
    target: Tensor,
    mask: Tensor,
    *,
    sigmoid: bool = True,
    gamma: float = 2.0,
    alpha: float | None = None,
    lambda_dice: float = 1.0,
    lambda_focal: float = 1.0,
    batch: bool = False,
    smooth_nr: float = 1e-5,
    smooth_dr: float = 1e-5,
    foreground_weight: Weight = None,
    reduction: str = "mean",
) -> Tensor:
    """Return `lambda_dice` times Dice plus `lambda_focal` times the focal loss.

    Args:
        logits: As in `dice`.
        target: As in `dice`.
        mask: As in `dice`.
        sigmoid: Must stay True: the focal loss takes logits.
        gamma: As in `focal`.
        alpha: As in `focal`.
        lambda_dice: Weight of Dice.
        lambda_focal: Weight of the focal loss.
        batch: As in `dice`.
        smooth_nr: As in `dice`.
        smooth_dr: As in `dice`.
        foreground_weight: Of the focal loss, as in `bce_with_logits`.
        reduction: As in `dice`.

    Raises:
        ValueError: As in `dice` and `focal`; `sigmoid` is False.
    """
    _needs_logits("DiceFocalLoss", sigmoid)
    overlap = dice(
        logits,
        target,
        mask,
        batch=batch,
        smooth_nr=smooth_nr,
        smooth_dr=smooth_dr,
        reduction=reduction,
    )
    hard = focal(
        logits,
        target,
        mask,
        gamma=gamma,
        alpha=alpha,
        foreground_weight=foreground_weight,
        reduction=reduction,
    )
    return lambda_dice * overlap + lambda_focal * hard


def smooth_l1(
    logits: Tensor,
    target: Tensor,
    mask: Tensor,
    *,
    beta: float = 1.0,
    tanh: bool = False,
    foreground_weight: Weight = None,
    reduction: str = "mean",
) -> Tensor:
    """Return the smooth L1 distance: squared below `beta`, absolute above.

    Args:
        logits: As in `dice`.
        target: (B, C, Z, Y, X), any range.
        mask: As in `dice`.
        beta: Where the two forms meet; 0 is plain L1.
        tanh: Whether to squash the output to (-1, 1) first, the range of the distance target.
        foreground_weight: As in `bce_with_logits`.
        reduction: `mean` over the mask, or `sum`.

    Raises:
        ValueError: Shapes that do not fit, or an argument out of range.
    """
    if beta < 0:
        raise ValueError(f"SmoothL1Loss: beta is {beta}, but must not be negative.")
    logits, target, mask = _prepared(logits, target, mask)
    prediction = torch.tanh(logits) if tanh else logits
    voxels = F.smooth_l1_loss(prediction, target, beta=beta, reduction="none")
    return _reduced(voxels, target, mask, foreground_weight, reduction)


def mean_squared(
    logits: Tensor,
    target: Tensor,
    mask: Tensor,
    *,
    tanh: bool = False,
    foreground_weight: Weight = None,
    reduction: str = "mean",
) -> Tensor:
    """Return the squared distance.

    Args:
        logits: As in `smooth_l1`.
        target: As in `smooth_l1`.
        mask: As in `smooth_l1`.
        tanh: As in `smooth_l1`.
        foreground_weight: As in `bce_with_logits`.
        reduction: `mean` over the mask, or `sum`.

    Raises:
        ValueError: Shapes that do not fit, or an argument out of range.
    """
    logits, target, mask = _prepared(logits, target, mask)
    prediction = torch.tanh(logits) if tanh else logits
    voxels = F.mse_loss(prediction, target, reduction="none")
    return _reduced(voxels, target, mask, foreground_weight, reduction)


def mean_absolute(
    logits: Tensor,
    target: Tensor,
    mask: Tensor,
    *,
    tanh: bool = False,
    foreground_weight: Weight = None,
    reduction: str = "mean",
) -> Tensor:
    """Return the absolute distance.

    Args:
        logits: As in `smooth_l1`.
        target: As in `smooth_l1`.
        mask: As in `smooth_l1`.
        tanh: As in `smooth_l1`.
        foreground_weight: As in `bce_with_logits`.
        reduction: `mean` over the mask, or `sum`.

    Raises:
        ValueError: Shapes that do not fit, or an argument out of range.
    """
    return smooth_l1(
        logits,
        target,
        mask,
        beta=0.0,
        tanh=tanh,
        foreground_weight=foreground_weight,
        reduction=reduction,
    )


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


def _overlap(
    overlap: Callable[[Tensor, Tensor], Tensor],
    logits: Tensor,
    target: Tensor,
    mask: Tensor,
    sigmoid: bool,
    batch: bool,
    smooth_dr: float,
    reduction: str,
) -> Tensor:
    """Return an overlap loss of what lies inside the mask.

    The mask is applied to probabilities, not to logits: a masked logit of 0 would count as a
    probability of one half.
    """
    if smooth_dr <= 0:
        raise ValueError(f"smooth_dr is {smooth_dr}, but must be above 0, as 1e-5.")
    logits, target, mask = _prepared(logits, target, mask)
    probability = torch.sigmoid(logits) if sigmoid else logits
    scores = overlap(probability * mask, target * mask)
    seen = mask.flatten(start_dim=1).amax(dim=1)
    if batch:
        seen = seen.amax(dim=0, keepdim=True)
    scores = scores.reshape(seen.shape[0], -1) * seen[:, None]
    if reduction == "sum":
        return scores.sum()
    _mean_only(reduction)
    return scores.sum() / (seen.sum().clamp(min=1.0) * scores.shape[1])


def _reduced(
    voxels: Tensor, target: Tensor, mask: Tensor, foreground_weight: Weight, reduction: str
) -> Tensor:
    """Return the weighted mean (or sum) of a loss per voxel over the mask; 0 where it is empty."""
    weight = mask.expand_as(voxels)
    factor = _positive_weight("foreground_weight", foreground_weight, target, mask)
    if factor is not None:
        weight = weight * torch.where(target > 0, factor, 1.0)
    total = (voxels * weight).sum()
    if reduction == "sum":
        return total
    _mean_only(reduction)
    return total / weight.sum().clamp(min=1e-6)


def _positive_weight(name: str, weight: Weight, target: Tensor, mask: Tensor) -> Tensor | None:
    """Return a weight of positives as a tensor, counted on the device where it is `balanced`."""
    if weight is None:
        return None
    if weight in ("balanced", "auto"):
        positives = ((target > 0) * mask).sum()
        negatives = ((target <= 0) * mask).sum()
        return (negatives / positives.clamp(min=1.0)).clamp(
            1 / LARGEST_BALANCED_WEIGHT, LARGEST_BALANCED_WEIGHT
        )
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not weight > 0:
        raise ValueError(f"{name} is {weight!r}, but must be a number above 0 or 'balanced'.")
    return torch.full((), float(weight), device=target.device)


def _mean_only(reduction: str) -> None:
    """Refuse a reduction that gives no scalar."""
    if reduction != "mean":
        raise ValueError(f"reduction is {reduction!r}. Known: mean, sum.")


def _needs_logits(name: str, sigmoid: bool) -> None:
    """Refuse to take probabilities where a cross-entropy wants logits."""
    if not sigmoid:
        raise ValueError(f"{name}: sigmoid is False, but it takes logits. Leave it out.")
