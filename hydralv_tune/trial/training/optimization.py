"""How the weights move: steps of an epoch, learning rate, averaged weights, early stop."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from hydralv_tune.config.candidate import Candidate, EarlyStopping, Optimization


@dataclass(frozen=True)
class StepPlan:
    """How a training is cut into steps.

    Args:
        batch_size: Patches of one micro-batch.
        accumulate: Micro-batches of one optimizer step.
        steps_per_epoch: Optimizer steps of one epoch.
        epochs: Epochs in all.
        evaluations: Optimizer steps after which the network is evaluated, ascending; the last
            is the end.
    """

    batch_size: int
    accumulate: int
    steps_per_epoch: int
    epochs: int
    evaluations: tuple[int, ...]

    @property
    def effective_batch(self) -> int:
        """Return the patches of one optimizer step."""
        return self.batch_size * self.accumulate

    @property
    def steps(self) -> int:
        """Return the optimizer steps in all."""
        return self.steps_per_epoch * self.epochs

    @property
    def patches_per_epoch(self) -> int:
        """Return the patches of one epoch: the asked number, rounded up to whole steps."""
        return self.steps_per_epoch * self.effective_batch

    def halved(self) -> StepPlan:
        """Return the plan with micro-batches of half the size or less, the effective batch kept.

        The size is the largest that divides the effective batch: 5 × 3 becomes 1 × 15, not 2 × 8,
        which would be 16 patches a step.

        Raises:
            ValueError: A micro-batch is one patch already.
        """
        if self.batch_size == 1:
            raise ValueError("a micro-batch of 1 patch cannot be halved")
        size = next(n for n in range(self.batch_size // 2, 0, -1) if self.effective_batch % n == 0)
        return replace(self, batch_size=size, accumulate=self.effective_batch // size)


def step_plan(candidate: Candidate) -> StepPlan:
    """Return how the training of a candidate is cut into steps.

    `data.iter_num_per_epoch` counts patches, whatever the batch.
    """
    batch = candidate.system.training.batch_size
    accumulate = candidate.optimization.accumulate_grad_batches
    per_epoch = math.ceil(candidate.data.iter_num_per_epoch / (batch * accumulate))
    steps = per_epoch * candidate.optimization.max_epochs
    count = min(candidate.monitor.evaluation.count, steps)
    return StepPlan(
        batch_size=batch,
        accumulate=accumulate,
        steps_per_epoch=per_epoch,
        epochs=candidate.optimization.max_epochs,
        evaluations=tuple(round(steps * (index + 1) / count) for index in range(count)),
    )


def build_optimizer(
    network: nn.Module,
    balancing: Iterable[nn.Parameter],
    settings: Optimization,
    *,
    fused: bool = False,
) -> AdamW:
    """Return AdamW over the network and, without weight decay, the parameters of the balancing.

    Args:
        network: Its trained parameters are optimised.
        balancing: Parameters of the loss; decay would pull their weights back to equal ones.
        settings: `optimization` of the candidate.
        fused: Whether one kernel updates all parameters, on a GPU.
    """
    chosen = settings.optimizer
    own = [p for p in network.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [{"params": own, "weight_decay": chosen.weight_decay}]
    extra = [p for p in balancing if p.requires_grad]
    if extra:
        groups.append({"params": extra, "weight_decay": 0.0})
    beta1, beta2 = chosen.betas
    return AdamW(groups, lr=chosen.lr, betas=(beta1, beta2), eps=chosen.eps, fused=fused or None)


def rate_factor(settings: Optimization, plan: StepPlan) -> Callable[[int], float]:
    """Return the function of the step that gives the factor of the learning rate.

    The warm-up rises linearly from `warmup_start_lr`, a factor, to 1. The cosine then falls to
    `min_lr`, a rate, at the last step; a constant schedule stays at 1.
    """
    chosen = settings.scheduler
    warmup = chosen.warmup_epochs * plan.steps_per_epoch
    lowest = min(chosen.min_lr / settings.optimizer.lr, 1.0)
    cosine = chosen.name in ("WarmupCosineLR", "warmupcosine")

    def factor(step: int) -> float:
        if step < warmup:
            return chosen.warmup_start_lr + (1.0 - chosen.warmup_start_lr) * step / warmup
        if not cosine:
            return 1.0
        progress = min((step - warmup) / max(plan.steps - warmup, 1), 1.0)
        return lowest + (1.0 - lowest) * 0.5 * (1.0 + math.cos(math.pi * progress))

    return factor


def build_schedule(optimizer: Optimizer, settings: Optimization, plan: StepPlan) -> LambdaLR:
    """Return the learning-rate schedule, to be stepped once per optimizer step."""
    return LambdaLR(optimizer, rate_factor(settings, plan))


class AveragedWeights:
    """An exponential moving average of a network's weights; its buffers are copied.

    During the warm-up the average follows the weights. After it the decay rises as
    (1 + n) / (10 + n) up to its value, so that a short training is not dominated by its start.

    Args:
        network: The network that is trained.
        decay: Share of the average that is kept at each step.
        warmup_steps: Optimizer steps before averaging begins.

    Source: the ramp is that of TensorFlow's ExponentialMovingAverage.
    """

    def __init__(self, network: nn.Module, *, decay: float, warmup_steps: int) -> None:
        self.network = copy.deepcopy(network).eval().requires_grad_(False)
        self.decay = decay
        self.warmup_steps = warmup_steps
        self.steps = 0

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        """Move the average toward the network's weights by one step."""
        averaged = _floating(self.network.parameters())
        current = _floating(network.parameters())
        counted = self.steps - self.warmup_steps
        decay = 0.0 if counted < 0 else min(self.decay, (1.0 + counted) / (10.0 + counted))
        torch._foreach_lerp_(averaged, current, 1.0 - decay)
        for own, new in zip(self.network.buffers(), network.buffers(), strict=True):
            own.copy_(new)
        self.steps += 1

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return {"weights": self.network.state_dict(), "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what a checkpoint kept."""
        self.network.load_state_dict(state["weights"])
        self.steps = int(state["steps"])


def _floating(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """Return the tensors behind parameters."""
    return [parameter.detach() for parameter in parameters]


class EarlyStop:
    """Decides from the epochs' training losses whether to go on.

    Args:
        settings: `monitor.early_stopping` of the candidate.
    """

    def __init__(self, settings: EarlyStopping) -> None:
        self.settings = settings
        self.best = math.inf
        self.waited = 0

    def check(self, losses: Sequence[float], first_epoch: int) -> str | None:
        """Return why to stop, or None.

        Args:
            losses: Mean total loss of each epoch since the last call.
            first_epoch: Number of the first of them, from 1.
        """
        if not self.settings.enabled:
            return None
        for epoch, loss in enumerate(losses, start=first_epoch):
            reason = self._after(loss)
            if reason:
                return f"stopped early after epoch {epoch}: {reason}"
        return None

    def _after(self, loss: float) -> str | None:
        """Return why to stop after an epoch with this loss, or None."""
        chosen = self.settings
        if chosen.divergence_threshold is not None and loss > chosen.divergence_threshold:
            return f"the loss {loss:.4g} is above {chosen.divergence_threshold:g}, it diverges"
        if chosen.threshold is not None and loss < chosen.threshold:
            return f"the loss {loss:.4g} is under the threshold {chosen.threshold:g}"
        if loss < self.best - chosen.min_delta:
            self.best, self.waited = loss, 0
            return None
        self.waited += 1
        if self.waited >= chosen.patience:
            return f"no better loss than {self.best:.4g} for {self.waited} epochs"
        return None

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return {"best": self.best, "waited": self.waited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what a checkpoint kept."""
        self.best, self.waited = float(state["best"]), int(state["waited"])
