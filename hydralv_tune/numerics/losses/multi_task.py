"""Sum the losses of all tasks: which function scores which channel, balanced, at every depth.

`MultiTaskLoss` scores a network's output against the targets of `targets.derive_targets`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hydralv_tune.numerics.losses.balancing import build_balancing
from hydralv_tune.numerics.losses.registry import LOSSES, check_loss


@dataclass(frozen=True)
class LossTerm:
    """One loss on a slice of channels.

    Args:
        name: Name of the term in the record, unique among the terms.
        function: A name of `LOSSES`.
        weight: Factor in the sum, not negative.
        kwargs: Keyword arguments of the loss.
        pred_slice: First channel of the output and the one after the last.
        target_slice: The same of the targets.
        task: The task that it belongs to: `label`, `boundary`, `edt`.
    """

    name: str
    function: str
    weight: float = 1.0
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    pred_slice: tuple[int, int] = (0, 1)
    target_slice: tuple[int, int] = (0, 1)
    task: str = "label"


@dataclass(frozen=True)
class LossResult:
    """What one forward pass of `MultiTaskLoss` gives.

    Args:
        total: The scalar to call `backward` on.
        parts: Loss of each term at the finest head, without weight, detached.
        tasks: Mean over a task's terms of those, weighted by the terms' weights, detached. It
            does not depend on balancing or deep supervision, so it can be compared among trials
            with the same losses.
    """

    total: Tensor
    parts: dict[str, Tensor]
    tasks: dict[str, Tensor]


class MultiTaskLoss(nn.Module):
    """Scores every head of a network on every task.

    Args:
        terms: The losses.
        balancing: `none`, `uncertainty` or `gradnorm`: how the tasks are weighed. A task whose
            terms all weigh 0 is scored, but neither learned nor balanced.
        balancing_kwargs: Arguments of the strategy.
        deep_supervision_weights: Weight of each head from fine to coarse; 1, 0.5, 0.25, …
            without it.

    Raises:
        ValueError: No term, two of one name, all weights 0, an unknown loss, argument or
            strategy, a slice that holds nothing.
    """

    def __init__(
        self,
        terms: Sequence[LossTerm],
        *,
        balancing: str | None = "none",
        balancing_kwargs: Mapping[str, Any] | None = None,
        deep_supervision_weights: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.terms = tuple(terms)
        _check_terms(self.terms)
        self.tasks = tuple(dict.fromkeys(term.task for term in self.terms))
        learned = {term.task for term in self.terms if term.weight > 0}
        self.learned = tuple(task for task in self.tasks if task in learned)
        self.balance = build_balancing(balancing, self.learned, balancing_kwargs)
        self.deep_supervision_weights = _checked_weights(deep_supervision_weights)

    def forward(
        self, outputs: Tensor | Sequence[Tensor], targets: Tensor, mask: Tensor
    ) -> LossResult:
        """Return the total to minimise and its parts, without waiting for the device.

        Args:
            outputs: Logits (B, C, Z, Y, X), or one tensor per head from fine to coarse.
            targets: (B, T, Z, Y, X).
            mask: (B, 1, Z, Y, X) or (B, Z, Y, X), True where a voxel counts.

        Raises:
            ValueError: More heads than weights, or channels that a term asks for and that are not
                there.
        """
        heads = [outputs] if isinstance(outputs, Tensor) else list(outputs)
        valid = (mask if mask.ndim == targets.ndim else mask.unsqueeze(1)).bool()
        weights = self._head_weights(len(heads))
        parts: dict[str, Tensor] = {}
        sums: dict[str, Tensor] = {}
        for depth, (head, weight) in enumerate(zip(heads, weights, strict=True)):
            coarse_targets, coarse_mask = downsample_targets(targets, valid, head.shape[2:])
            for term in self.terms:
                loss = _score(term, head, coarse_targets, coarse_mask)
                if depth == 0:
                    parts[term.name] = loss.detach()
                share = weight * term.weight * loss
                sums[term.task] = sums[term.task] + share if term.task in sums else share
        total = self.balance(torch.stack([sums[task] for task in self.learned]))
        return LossResult(total=total, parts=parts, tasks=self._task_means(parts))

    def rebalance(self, shared_parameter: Tensor) -> None:
        """Let the balancing take its step; only `gradnorm` has one.

        Args:
            shared_parameter: A parameter that every task depends on, close to the heads.
        """
        self.balance.rebalance(shared_parameter)

    def task_weights(self) -> dict[str, Tensor]:
        """Return the factor that balancing puts on each task that is learned, detached."""
        return dict(zip(self.learned, self.balance.weights(), strict=True))

    def _head_weights(self, heads: int) -> list[float]:
        """Return one weight per head."""
        if self.deep_supervision_weights is None:
            return [0.5**depth for depth in range(heads)]
        if len(self.deep_supervision_weights) < heads:
            raise ValueError(
                f"deep_supervision_weights has {len(self.deep_supervision_weights)} values for "
                f"{heads} heads. Give one per head, from fine to coarse."
            )
        return list(self.deep_supervision_weights[:heads])

    def _task_means(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the mean loss of each task."""
        means = {}
        for task in self.tasks:
            terms = [term for term in self.terms if term.task == task]
            weights = [term.weight for term in terms]
            if not sum(weights):
                weights = [1.0] * len(terms)
            weighted = [w * parts[term.name] for w, term in zip(weights, terms, strict=True)]
            means[task] = torch.stack(weighted).sum() / sum(weights)
        return means


def downsample_targets(
    targets: Tensor, mask: Tensor, shape: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Return targets and mask at the resolution of a coarse head, averaged over valid voxels.

    Averaging, and not the nearest voxel or the largest: at a 16th of the resolution the nearest
    voxel drops most boundaries by chance, and the largest turns a vesicle of 16 voxels into
    boundary alone. The mean keeps the amount of each class and is a soft target that Dice (in its
    soft form), cross-entropy and the distance losses can reach. A coarse voxel counts where at
    least half of it lies in the mask.

    Args:
        targets: (B, T, Z, Y, X).
        mask: (B, 1, Z, Y, X), bool.
        shape: Spatial shape of the head.

    Raises:
        ValueError: The head is finer than the targets.
    """
    if tuple(targets.shape[2:]) == tuple(shape):
        return targets, mask
    if any(coarse > fine for coarse, fine in zip(shape, targets.shape[2:], strict=True)):
        raise ValueError(
            f"A head has the shape {tuple(shape)}, larger than the targets "
            f"{tuple(targets.shape[2:])}."
        )
    size = (shape[0], shape[1], shape[2])
    share = F.adaptive_avg_pool3d(mask.float(), size)
    mean = F.adaptive_avg_pool3d(targets.float() * mask, size)
    return mean / share.clamp(min=1e-6), share >= 0.5


def _score(term: LossTerm, head: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    """Return one term at one head."""
    (first, last), (start, stop) = term.pred_slice, term.target_slice
    if last > head.shape[1] or stop > targets.shape[1]:
        raise ValueError(
            f"Loss '{term.name}' wants channels {first}:{last} of {head.shape[1]} outputs and "
            f"{start}:{stop} of {targets.shape[1]} targets."
        )
    return LOSSES[term.function](head[:, first:last], targets[:, start:stop], mask, **term.kwargs)


def _check_terms(terms: Sequence[LossTerm]) -> None:
    """Refuse terms that cannot be scored."""
    if not terms:
        raise ValueError("A loss needs at least one term.")
    names = [term.name for term in terms]
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        raise ValueError(f"Two loss terms have the name '{doubled[0]}'; each needs its own.")
    if not any(term.weight > 0 for term in terms):
        raise ValueError("All loss weights are 0, so there is nothing to learn.")
    for term in terms:
        check_loss(term.function, term.kwargs)
        if not term.weight >= 0:
            raise ValueError(f"Loss '{term.name}': weight is {term.weight}, below 0.")
        widths = [b - a for a, b in (term.pred_slice, term.target_slice)]
        if min(*term.pred_slice, *term.target_slice) < 0 or widths[0] < 1 or widths[0] != widths[1]:
            raise ValueError(
                f"Loss '{term.name}': pred_slice {term.pred_slice} and target_slice "
                f"{term.target_slice} must hold the same number of channels, at least one."
            )


def _checked_weights(weights: Sequence[float] | None) -> tuple[float, ...] | None:
    """Return the weights of the heads."""
    if weights is None:
        return None
    if not weights or not all(weight >= 0 for weight in weights) or not weights[0] > 0:
        raise ValueError(
            f"deep_supervision_weights is {list(weights)}, but must hold numbers from 0, the "
            "first (finest) above 0."
        )
    return tuple(float(weight) for weight in weights)
