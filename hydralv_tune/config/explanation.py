"""What a candidate amounts to, in sentences: derived facts, keys without effect, flags."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from hydralv_tune.config.candidate import Candidate
from hydralv_tune.config.search_space import SearchSpace
from hydralv_tune.config.validation import MISSING, shown, value_at
from hydralv_tune.numerics.formatting import objective_label

NO_EFFECT = "No effect"
SMALL_BATCH = 4


def explain(candidate: Candidate) -> list[str]:
    """Return sentences on a candidate: derived facts, then keys without effect, then flags."""
    return [
        *training_sentences(candidate),
        *network_facts(candidate),
        *(f"No effect: {line}" for line in without_effect(candidate)),
        *(f"Note: {line}" for line in flags(candidate)),
    ]


def explain_space(space: SearchSpace) -> list[str]:
    """Return sentences: what is searched and swept, when it ends, and what the base amounts to."""
    combinations = math.prod(len(values) for values in space.decoding.axes.values())
    budget = [f"{space.budget.trials} trials"]
    budget += [f"{space.budget.timeout_s:g} s"] if space.budget.timeout_s else []
    budget += [f"{space.budget.gpu_hours:g} GPU hours"] if space.budget.gpu_hours else []
    conditional = sum(bool(p.when) for p in space.parameters.values())
    own = any(
        value_at(block, "test.decoding_grid") not in (MISSING, None)
        for block in (
            space.base_mapping(), *space.recipes.values(),
            *(block for one in space.parameters.values() if isinstance(one.choice, dict)
              for block in one.choice.values()),
        )
    )  # fmt: skip
    return [
        f"Minimises {objective_label(space.objective.metric)} over {len(space.parameters)} "
        f"parameters, {conditional} of them conditional; ends after {' or '.join(budget)}"
        + (f", or below {space.objective.stop_at:g}." if space.objective.stop_at else "."),
        f"{combinations:,} combinations of {space.decoding.decoder} are swept per evaluation"
        + (", where a candidate has no grid of its own (test.decoding_grid)." if own else "."),
        f"Enqueued first: {', '.join(space.warm_starts) or 'nothing'}.",
        *(f"Base '{space.base}': {line}" for line in explain(space.candidate({}))),
    ]


def training_sentences(candidate: Candidate) -> list[str]:
    """Return what the numbers of batch and epoch amount to."""
    batch = candidate.system.training.batch_size
    accumulation = candidate.optimization.accumulate_grad_batches
    asked = candidate.data.iter_num_per_epoch
    epochs = candidate.optimization.max_epochs
    effective = batch * accumulation
    steps = math.ceil(asked / effective)
    rounded = "" if steps * effective == asked else f" ({asked} rounded up to whole steps)"
    lines = [
        f"Effective batch {effective} ({batch} patches times {accumulation} accumulated); "
        f"{steps * effective:,} patches{rounded} and {steps:,} optimizer steps an epoch; "
        f"{steps * epochs:,} steps and {steps * effective * epochs:,} patches in {epochs:,} epochs."
    ]
    gpus = candidate.system.training.num_gpus
    if gpus > 1:
        there = max(1, asked // (batch * gpus * accumulation))
        lines.append(
            f"A tool that trains on {gpus} GPUs at once makes {there:,} steps of "
            f"{effective * gpus} patches an epoch of these numbers; a trial here uses one device."
        )
    warmup = candidate.optimization.scheduler.warmup_epochs
    if warmup:
        start = candidate.optimization.scheduler.warmup_start_lr
        lr = candidate.optimization.optimizer.lr
        lines.append(
            f"Warm-up of {warmup} epochs ({warmup * steps:,} steps) from {start * lr:g} to {lr:g}: "
            "warmup_start_lr is a factor of the rate."
        )
    count = min(candidate.monitor.evaluation.count, steps * epochs)
    lines.append(f"Evaluated {count} times, about every {steps * epochs // count:,} steps.")
    return lines


def network_facts(candidate: Candidate) -> list[str]:
    """Return size and start of the network."""
    import torch

    from hydralv_tune.numerics.networks.registry import build_network, network_arguments
    from hydralv_tune.numerics.networks.weights import parameter_count

    model = candidate.model
    with torch.device("meta"):
        network = build_network(
            model.architecture, **network_arguments(model.model_dump(mode="json"))
        )
    size = f"{model.architecture} with {parameter_count(network):,} parameters"
    if model.external_weights_path is None:
        return [f"{size}, trained from scratch: model.external_weights_path is null."]
    return [
        f"{size}, started from {model.external_weights_path}. Another architecture or width "
        "voids these weights, so an override of one drops them."
    ]


def without_effect(candidate: Candidate) -> list[str]:
    """Return each key that is said and does nothing, with the reason."""
    return [*_marked(candidate, ""), *_switched_off(candidate)]


def _marked(block: BaseModel, path: str) -> Iterator[str]:
    """Yield the keys that nothing reads, where they are not left at their default."""
    for name, field in type(block).model_fields.items():
        value = getattr(block, name)
        here = f"{path}{name}"
        if isinstance(value, BaseModel):
            yield from _marked(value, f"{here}.")
            continue
        words = field.description or ""
        unread = words.startswith(NO_EFFECT)
        if unread and value != field.get_default(call_default_factory=True):
            reason = words.removeprefix(NO_EFFECT).strip(": .")
            yield f"{here}: {reason}." if reason else f"{here}."


def _switched_off(candidate: Candidate) -> Iterator[str]:
    """Yield the keys that another key has switched off."""
    model, optimization = candidate.model, candidate.optimization
    if optimization.scheduler.name == "constant" and optimization.scheduler.min_lr:
        yield "optimization.scheduler.min_lr: the schedule is constant."
    if model.loss_balancing.strategy != "gradnorm" and (
        model.loss_balancing.model_fields_set - {"strategy"}
    ):
        default = type(model.loss_balancing)(strategy=model.loss_balancing.strategy)
        if model.loss_balancing != default:
            yield "model.loss_balancing.gradnorm_*: the strategy is another."
    stop = candidate.monitor.early_stopping
    if not stop.enabled and stop != type(stop)(enabled=False):
        yield "monitor.early_stopping: enabled is false."
    data = candidate.data
    if data.split.kind != "volumes" and (data.val_image or data.val_label or data.val_mask):
        yield f"data.val_image, val_label, val_mask: data.split.kind is {data.split.kind}."
    tta = candidate.inference.test_time_augmentation
    if not tta.enabled and (tta.flip_axes or tta.rotation90_axes):
        yield "inference.test_time_augmentation.flip_axes, rotation90_axes: enabled is false."
    if candidate.inference.sliding_window.blending == "constant":
        yield "inference.sliding_window.sigma_scale: blending is constant."
    yield from _idle_augmentations(candidate)
    steps = [step for step in candidate.test.decoding if step.enabled]
    if len(steps) > 1:
        yield "test.decoding[1:]: one decoding is used, the first that is enabled."


def _idle_augmentations(candidate: Candidate) -> Iterator[str]:
    """Yield the augmentations that have knobs and never run."""
    augmentation = candidate.data.augmentation
    for name, knobs in augmentation.settings.items():
        enabled = knobs.get("enabled")
        if augmentation.preset == "none" and enabled is True:
            yield f"data.augmentation.{name}: the preset is none."
        elif augmentation.preset == "some" and enabled is None and knobs:
            yield f"data.augmentation.{name}: the preset is some, and enabled is not true."


def flags(candidate: Candidate) -> list[str]:
    """Return what is allowed and often not meant."""
    return [*_threshold_flags(candidate), *_model_flags(candidate), *_training_flags(candidate)]


def _threshold_flags(candidate: Candidate) -> Iterator[str]:
    """Yield what stands out in the decoding thresholds."""
    step = next(step for step in candidate.test.decoding if step.enabled)
    for key, value in step.decoder_arguments().items():
        if not key.endswith("_threshold") or not isinstance(value, list | tuple):
            continue
        seed, foreground = value
        if key == "contour_threshold":
            if foreground is None or foreground > 1:
                yield (
                    f"contour_threshold's foreground {shown(foreground)} switches that test off: "
                    "a probability is never above 1. null says so openly."
                )
            if seed is None or seed > 1:
                yield f"contour_threshold's seed {shown(seed)} switches that test off."
            if foreground is not None and foreground < min(1, math.inf if seed is None else seed):
                yield (
                    f"contour_threshold's seed {shown(seed)} is above its foreground "
                    f"{foreground:g}: seeds may lie where there is no foreground. A lower contour "
                    "threshold is the stricter one."
                )
        elif seed < foreground:
            yield (
                f"{key}'s seed {seed:g} is below its foreground {foreground:g}: seeds may lie "
                "where there is no foreground. The second of the pair is what adds or removes "
                "voxels; lowering the first can only merge neighbours."
            )


def _model_flags(candidate: Candidate) -> Iterator[str]:
    """Yield what losses and weights mean, where the name misleads."""
    model = candidate.model
    for index, (name, kwargs) in enumerate(
        zip(model.loss_functions, model.loss_kwargs, strict=False)
    ):
        alpha = kwargs.get("alpha")
        if name in ("FocalLoss", "DiceFocalLoss") and alpha is not None and alpha < 0.5:
            ratio = f"{(1 - alpha) / alpha:.3g} times" if alpha else "infinitely"
            yield (
                f"loss {index}, {name}: alpha {alpha:g} weights foreground {ratio} less than "
                "background."
            )
        if name == "TverskyLoss":
            alpha, beta = kwargs.get("alpha", 0.5), kwargs.get("beta", 0.5)
            favours = "precision" if alpha > beta else "recall" if beta > alpha else "neither"
            yield (
                f"loss {index}, TverskyLoss: alpha {alpha:g} is the weight of false positives, "
                f"beta {beta:g} that of false negatives: it favours {favours}."
            )
    if model.external_weights_path and model.deep_supervision and model.external_weights_strict:
        yield (
            "model.deep_supervision adds heads that weights trained without it lack: they are "
            "refused unless model.external_weights_strict is false."
        )
    if model.loss_balancing.strategy != "none":
        yield (
            f"model.loss_balancing.strategy {model.loss_balancing.strategy} is learned while "
            "training, so total losses of different trials cannot be compared."
        )


def _training_flags(candidate: Candidate) -> Iterator[str]:
    """Yield what stands out in training and sampling."""
    stop = candidate.monitor.early_stopping
    learned = candidate.model.loss_balancing.strategy == "uncertainty"
    if stop.enabled and stop.threshold is not None and learned:
        yield (
            f"monitor.early_stopping.threshold {stop.threshold:g} is watched on a total that "
            "uncertainty balancing can take below 0, so it may stop too early."
        )
    norm, batch = candidate.model.norm, candidate.system.training.batch_size
    if batch < SMALL_BATCH and candidate.model.architecture == "rsunet" and norm in (None, "batch"):
        yield (
            f"model.norm batch with system.training.batch_size {batch}: the statistics come from "
            "so few patches. Try norm: instance or group."
        )
    if candidate.data.augmentation.preset != "none" and candidate.model.dropout:
        yield _overfit_note(candidate.model.dropout)
    if candidate.data.split.kind == "none":
        yield (
            "data.split.kind none scores on the training volume: score and thresholds are "
            "optimistic."
        )


def _overfit_note(dropout: Any) -> str:
    """Return the note on regularisation against fitting one small volume."""
    return (
        f"augmentation and dropout {dropout:g} both work against fitting the training volume; "
        "trials/overfit_check says whether it can be fitted at all."
    )
