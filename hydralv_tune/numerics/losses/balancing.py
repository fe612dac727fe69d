"""Weigh tasks against each other: not at all, by uncertainty, or by gradient norms.

Each strategy is a module that turns the losses of the tasks into one scalar. Its state (what it
has learned) is in its `state_dict`, so a continued trial goes on with the same balance.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class NoBalancing(nn.Module):
    """Adds the losses of the tasks as they are.

    Args:
        tasks: Names of the tasks.
    """

    def __init__(self, tasks: Sequence[str]) -> None:
        super().__init__()
        self.tasks = tuple(tasks)

    def forward(self, losses: Tensor) -> Tensor:
        """Return the sum.

        Args:
            losses: One loss per task (T,).
        """
        return losses.sum()

    def weights(self) -> Tensor:
        """Return the factor on each task's loss (T,)."""
        return torch.ones(len(self.tasks))

    def rebalance(self, shared_parameter: Tensor) -> None:
        """Do nothing: there is nothing to balance.

        Args:
            shared_parameter: Ignored.
        """


class UncertaintyBalancing(NoBalancing):
    """Learns one log variance s per task and adds exp(-s) / 2 times its loss plus s / 2.

    The log variance is squashed to (-limit, limit): a loss close to 0 would otherwise drive its
    weight without bound. A hard clamp would have no gradient beyond the limit and stay there. The
    optimizer must be given this module's parameters, without weight decay.

    Args:
        tasks: Names of the tasks.
        initial: Log variance at the start.
        limit: Largest log variance in size, above 0; 4 keeps a weight between 0.009 and 27.

    Raises:
        ValueError: `limit` is not positive, or `initial` reaches it.

    Source:
        Kendall et al. 2018, doi:10.1109/CVPR.2018.00781, in the form that PyTorch Connectomics
        writes: with s = 0 it is half the sum.
    """

    def __init__(self, tasks: Sequence[str], *, initial: float = 0.0, limit: float = 4.0) -> None:
        super().__init__(tasks)
        if not limit > 0 or not abs(initial) < limit:
            raise ValueError(
                f"Uncertainty balancing: limit {limit} must be above 0 and initial {initial} "
                "smaller in size."
            )
        self.limit = limit
        start = torch.atanh(torch.tensor(initial / limit)) * limit
        self.raw_log_variance = nn.Parameter(start.repeat(len(self.tasks)))

    def log_variance(self) -> Tensor:
        """Return s per task (T,), with its gradient."""
        return self.limit * torch.tanh(self.raw_log_variance / self.limit)

    def forward(self, losses: Tensor) -> Tensor:
        """Return the balanced sum.

        Args:
            losses: One loss per task (T,).
        """
        log_variance = self.log_variance()
        return 0.5 * (torch.exp(-log_variance) * losses + log_variance).sum()

    def weights(self) -> Tensor:
        """Return the factor on each task's loss (T,)."""
        return 0.5 * torch.exp(-self.log_variance()).detach()


class GradNormBalancing(NoBalancing):
    """Keeps the tasks' gradients on a shared parameter in step with how fast each task learns.

    The weights always sum to the number of tasks, so a task that is not learned must not be among
    them: it would take the weight of the others. They are no parameters of the optimizer: the
    trainer calls `rebalance` after the forward and before the backward pass, as often as it
    likes, and the weights take a step of their own.

    Args:
        tasks: Names of the tasks.
        alpha: How strongly slow tasks are pulled up, from 0; 0 makes the gradients equal.
        learning_rate: Step of the weights, above 0.
        smallest: Smallest weight of a task, above 0 and under 1.

    Raises:
        ValueError: An argument out of range.

    Source:
        Chen et al. 2018, GradNorm, arXiv:1711.02257. The step is taken relative to the mean
        gradient norm, so that it has no unit.
    """

    initial_losses: Tensor
    task_weights: Tensor

    def __init__(
        self,
        tasks: Sequence[str],
        *,
        alpha: float = 1.5,
        learning_rate: float = 0.025,
        smallest: float = 0.05,
    ) -> None:
        super().__init__(tasks)
        if alpha < 0 or not learning_rate > 0 or not 0 < smallest < 1:
            raise ValueError(
                f"GradNorm: alpha {alpha} must not be negative, learning_rate {learning_rate} "
                f"above 0 and smallest {smallest} between 0 and 1."
            )
        self.alpha = alpha
        self.learning_rate = learning_rate
        self.smallest = smallest
        count = len(self.tasks)
        self.register_buffer("task_weights", torch.ones(count))
        self.register_buffer("initial_losses", torch.zeros(count))
        self._losses: Tensor | None = None

    def forward(self, losses: Tensor) -> Tensor:
        """Return the balanced sum, and remember the losses for `rebalance`.

        Args:
            losses: One loss per task (T,).
        """
        self._losses = losses if losses.requires_grad else None
        return (self.task_weights.clone() * losses).sum()

    def weights(self) -> Tensor:
        """Return the factor on each task's loss (T,)."""
        return self.task_weights.clone()

    def rebalance(self, shared_parameter: Tensor) -> None:
        """Take one step of the weights; call it between the forward and the backward pass.

        Args:
            shared_parameter: A parameter that every task's loss depends on, close to the heads:
                the weight of the last shared convolution.

        Raises:
            ValueError: There was no forward pass with gradients, or a task does not depend on
                the parameter.
        """
        if self._losses is None:
            raise ValueError("GradNorm: rebalance needs a forward pass with gradients before it.")
        losses = self._losses
        norms = torch.stack([_gradient_norm(loss, shared_parameter) for loss in losses])
        with torch.no_grad():
            values = losses.detach().clamp(min=1e-8)
            # The first losses seen, without asking the device whether they were seen.
            first = torch.where(self.initial_losses > 0, self.initial_losses, values)
            self.initial_losses.copy_(first)
            progress = values / first
            rate = progress / progress.mean()
            weighted = self.task_weights * norms
            mean = weighted.mean().clamp(min=1e-12)
            step = torch.sign(weighted - mean * rate**self.alpha) * norms / mean
            # Gradient norms of tasks can lie orders apart; a step is at most the learning rate
            # times ten.
            weights = self.task_weights - self.learning_rate * step.clamp(-10.0, 10.0)
            weights = weights.clamp(min=self.smallest)
            self.task_weights.copy_(weights * len(self.tasks) / weights.sum())
        self._losses = None


def _gradient_norm(loss: Tensor, parameter: Tensor) -> Tensor:
    """Return the norm of a loss's gradient on a parameter, keeping the graph."""
    (gradient,) = torch.autograd.grad(loss, parameter, retain_graph=True, allow_unused=True)
    if gradient is None:
        raise ValueError("GradNorm: a task's loss does not depend on the shared parameter.")
    return gradient.float().norm()


BALANCING: dict[str, Callable[..., NoBalancing]] = {
    "none": NoBalancing,
    "uncertainty": UncertaintyBalancing,
    "gradnorm": GradNormBalancing,
}


def build_balancing(
    name: str | None, tasks: Sequence[str], kwargs: Mapping[str, Any] | None = None
) -> NoBalancing:
    """Return the module of a balancing strategy.

    Args:
        name: A name of `BALANCING`; None means `none`.
        tasks: Names of the tasks.
        kwargs: Keyword arguments of the strategy.

    Raises:
        ValueError: An unknown strategy or argument, or a value out of range.
    """
    chosen = "none" if name is None else name
    if chosen not in BALANCING:
        raise ValueError(f"Unknown loss balancing '{name}'. Known: {', '.join(sorted(BALANCING))}.")
    try:
        return BALANCING[chosen](tasks, **(kwargs or {}))
    except TypeError as error:
        raise ValueError(f"Loss balancing '{chosen}': {error}") from error
