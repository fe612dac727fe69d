"""What a candidate amounts to, in sentences: derived facts, keys without effect, flags."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hydralv_tune.candidate import Candidate


def explain(candidate: Candidate) -> list[str]:
    """Return sentences: effective batch, steps, patches; keys without effect; flags."""
    return training_facts(candidate)


def training_facts(candidate: Candidate) -> list[str]:
    """Return what the numbers of batch and epoch amount to."""
    batch = candidate.system.training.batch_size
    accumulation = candidate.optimization.accumulate_grad_batches
    patches = candidate.data.iter_num_per_epoch
    effective = batch * accumulation
    steps = max(1, patches // effective)
    return [
        f"Effective batch {effective} ({batch} patches, accumulation {accumulation}); "
        f"{patches} patches and {steps} optimizer steps an epoch."
    ]
