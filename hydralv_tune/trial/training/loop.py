"""The training loop: plain PyTorch, and the host does not wait for the device inside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hydralv_tune.artifacts import records
from hydralv_tune.artifacts.inert_checkpoint import read_foreign_checkpoint
from hydralv_tune.config.candidate import Candidate, Model
from hydralv_tune.config.candidate_rules import WATCHED
from hydralv_tune.config.errors import (
    CheckpointError,
    ConfigError,
    TrialFailed,
    TrialInterrupted,
    as_input_error,
)
from hydralv_tune.config.paths import weights_file
from hydralv_tune.numerics.augmentation.augment import augment
from hydralv_tune.numerics.augmentation.registry import resolve_preset
from hydralv_tune.numerics.losses.multi_task import LossResult, LossTerm, MultiTaskLoss
from hydralv_tune.numerics.networks.memory import is_out_of_memory
from hydralv_tune.numerics.networks.weights import match_weights, trunk_weights
from hydralv_tune.numerics.randomness import capture_random, restore_random, seeded
from hydralv_tune.numerics.targets import derive_targets
from hydralv_tune.trial.training.compiling import compiled_form, refuse, sentence
from hydralv_tune.trial.training.log import Clock, LossLog
from hydralv_tune.trial.training.optimization import (
    AveragedWeights,
    EarlyStop,
    StepPlan,
    build_optimizer,
    build_schedule,
    step_plan,
)
from hydralv_tune.trial.training.sampling import PatchSampler, boundary_arguments

LOG_STEPS = 50
"""Optimizer steps after which losses are read from the device and checked, at the latest."""

GRADNORM_RATE = 0.025

COMPILE_STEPS = 2000
"""Optimizer steps from which compiling on a GPU, which takes minutes, pays off."""


def loss_terms(model: Model) -> list[LossTerm]:
    """Return the losses of a candidate, each with its channels and its task."""
    kwargs = model.loss_kwargs or [{} for _ in model.loss_functions]
    terms = []
    for first, end, task, chosen in model.multi_task_config:
        for index in chosen:
            function = model.loss_functions[index]
            terms.append(
                LossTerm(
                    name=f"{task}_{function}_{index}",
                    function=function,
                    weight=model.loss_weights[index],
                    kwargs=kwargs[index],
                    pred_slice=(first, end),
                    target_slice=(first, end),
                    task=task,
                )
            )
    return terms


def build_loss(model: Model) -> MultiTaskLoss:
    """Return the weighted sum of the losses of a candidate, with its balancing."""
    chosen = model.loss_balancing
    strategy = chosen.strategy or "none"
    kwargs: dict[str, Any] = {}
    if strategy == "gradnorm":
        if chosen.gradnorm_lambda == 0:
            strategy = "none"
        else:
            rate = GRADNORM_RATE * chosen.gradnorm_lambda
            kwargs = {"alpha": chosen.gradnorm_alpha, "learning_rate": rate}
    with as_input_error("model"):
        return MultiTaskLoss(
            loss_terms(model),
            balancing=strategy,
            balancing_kwargs=kwargs,
            deep_supervision_weights=model.deep_supervision_weights,
        )


def shared_parameter(network: nn.Module, model: Model) -> Tensor:
    """Return the convolution that GradNorm measures gradients on: no head, every task needs it."""
    trunk = trunk_weights(model.architecture, network)
    return trunk[0 if model.loss_balancing.gradnorm_parameter_strategy == "first" else -1]


def load_external_weights(network: nn.Module, model: Model) -> str | None:
    """Load pretrained weights into the network; return what matched, None where there are none.

    Raises:
        CheckpointError: The file cannot be read, or does not fit and strictness was not waived.
    """
    if model.external_weights_path is None:
        return None
    path = weights_file(model.external_weights_path)
    content = read_foreign_checkpoint(path)
    own = content.get("format") == records.FORMAT
    state = content.get("weights" if own else "state_dict", content)
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    prefix = "" if own else _fitting_prefix(network, tensors, model.external_weights_key_prefix)
    try:
        report = match_weights(
            network, tensors, prefix=prefix, strict=model.external_weights_strict
        )
    except ValueError as error:
        raise CheckpointError(f"model.external_weights_path {path}: {error}") from error
    return f"{path.name}: {report}"


def _fitting_prefix(network: nn.Module, tensors: Mapping[str, Tensor], prefix: str) -> str:
    """Return the prefix under which the weights fit, which a wrapper of the network makes longer.

    PyTorch Connectomics wraps MONAI's networks in a module that calls them `model`, and
    `torch.compile` wraps any network in `_orig_mod`. Safetensors of this package have none.
    """
    own = network.state_dict().keys()
    longer = [prefix, f"{prefix}model.", f"{prefix}_orig_mod.", f"{prefix}_orig_mod.model.", ""]
    return max(longer, key=lambda start: sum(f"{start}{name}" in tensors for name in own))


class Trainer:
    """Trains one network on patches of a sampler, up to a step, as often as asked.

    Args:
        candidate: Its losses, optimizer, schedule, augmentation.
        network: On the device.
        sampler: Gives the patches, on the device.
        device: Where it runs.
        seed: Of augmentation and of what the network draws.
    """

    def __init__(
        self,
        candidate: Candidate,
        network: nn.Module,
        sampler: PatchSampler,
        device: torch.device,
        *,
        seed: int,
    ) -> None:
        self.candidate = candidate
        self.device = device
        self.network = network
        self.sampler = sampler
        self.plan: StepPlan = step_plan(candidate)
        settings = candidate.optimization
        self.loss = build_loss(candidate.model).to(device)
        self.optimizer = build_optimizer(
            network, self.loss.parameters(), settings, fused=device.type == "cuda"
        )
        self.schedule = build_schedule(self.optimizer, settings, self.plan)
        self.average: AveragedWeights | None = None
        if settings.ema.enabled:
            self.average = AveragedWeights(
                network, decay=settings.ema.decay, warmup_steps=settings.ema.warmup_steps
            )
        self.early_stop = EarlyStop(candidate.monitor.early_stopping)
        with as_input_error("data.augmentation"):
            chosen = candidate.data.augmentation
            self.augmentation = resolve_preset(chosen.preset, chosen.settings)
        self.boundary = boundary_arguments(candidate.data)
        # On the host: drawing on a GPU would make the host wait for what it drew.
        self.generator = torch.Generator().manual_seed(seed + 1)
        self.terms = loss_terms(candidate.model)
        self.log = LossLog(["total", *(term.name for term in self.terms)], device)
        self.clock = Clock(device)
        self.epoch_losses: list[float] = []  # `plan_total` of each epoch
        self.step = 0
        self.patches = 0
        self.stopped: str | None = None
        self.notes: list[str] = []
        self.autocast = device.type == "cuda" and settings.precision == "bf16-mixed"
        self.shared: Tensor | None = None
        if candidate.model.loss_balancing.strategy == "gradnorm":
            self.shared = shared_parameter(network, candidate.model)
        self.compiled: Callable[[Tensor], Any] | None = None
        self.compiled_works = False
        if device.type == "cuda":
            torch.backends.cudnn.benchmark = True
            if self.plan.steps >= COMPILE_STEPS:
                shape = (self.plan.batch_size, 1, *candidate.data.patch_size)
                self.compiled, note = compiled_form(network, shape, autocast=self.autocast)
                self.notes += [] if note is None else [note]
        with seeded(seed + 2, device):
            self.random = capture_random(device)

    @property
    def epoch(self) -> int:
        """Return how many epochs are complete."""
        return self.step // self.plan.steps_per_epoch

    @property
    def evaluated(self) -> nn.Module:
        """Return the network to evaluate: the averaged one where there is one."""
        if self.average is not None and self.candidate.optimization.ema.validate_with_ema:
            return self.average.network
        return self.network

    @property
    def seconds(self) -> float:
        """Return the time spent in training so far."""
        return sum(self.clock.seconds.values())

    def run_to(
        self,
        step: int,
        *,
        should_stop: Callable[[], bool] | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        """Train until so many optimizer steps are done, or until it stops early.

        Args:
            step: Optimizer steps since the beginning.
            should_stop: Asked before each step.
            progress: Told the steps done, after each.

        Raises:
            TrialInterrupted: `should_stop` said so; the state is that of a finished step.
            TrialFailed: A loss is not finite, or a batch of one patch does not fit in memory.
        """
        outside = capture_random(self.device)
        restore_random(self.random, self.device)
        self.network.train()
        self.clock.start()
        try:
            while self.step < step and self.stopped is None:
                if should_stop is not None and should_stop():
                    # What is interrupted is saved: weights that went bad must fail before.
                    self._read()
                    raise TrialInterrupted(
                        f"stopped at step {self.step} of {self.plan.steps}; it can be continued"
                    )
                self._step()
                if self.step == step or self._must_evaluate():
                    self._read()
                if progress is not None:
                    progress(self.step)
        finally:
            self.clock.flush()
            self.random = capture_random(self.device)
            restore_random(outside, self.device)

    def losses(self) -> dict[str, float]:
        """Return the mean losses since the last call: total, each task, each part."""
        return self._by_task(self.log.means())

    def recent_losses(self) -> dict[str, float]:
        """Return the mean losses since the last call as `losses` does; empty without a step."""
        recent = self.log.recent()
        return self._by_task(recent) if recent else {}

    def _by_task(self, means: Mapping[str, float]) -> dict[str, float]:
        """Return total, each task and each part of the means of the log.

        A task is the plain sum of its losses at the finest head, and `plan_total` half the sum of
        the tasks: that is how the plan's figures (0.555) are made, whatever weights and balancing.
        """
        tasks: dict[str, float] = {}
        for term in self.terms:
            tasks[term.task] = tasks.get(term.task, 0.0) + means[term.name]
        return {
            "total": means["total"],
            **tasks,
            "plan_total": 0.5 * sum(tasks.values()),
            **{term.name: means[term.name] for term in self.terms},
        }

    def _must_evaluate(self) -> bool:
        """Return whether the losses are to be read after this step, for which the host waits.

        Where a training may stop early that is the end of each epoch, so that the weights are
        those of the epoch that said stop.
        """
        ended = self.step % self.plan.steps_per_epoch == 0
        return self.step % LOG_STEPS == 0 or (ended and self.early_stop.settings.enabled)

    def _read(self) -> None:
        """Read the losses from the device; stop early where they say so."""
        ended = self.log.check()
        first = len(self.epoch_losses) + 1
        self.epoch_losses += [self._by_task(means)["plan_total"] for means in ended]
        self.stopped = self.early_stop.check([means["total"] for means in ended], first)

    def _step(self) -> None:
        """Take one optimizer step; where memory runs out, with smaller micro-batches."""
        while True:
            before = (self.sampler.state_dict(), self.generator.get_state())
            failed: str | None = None
            try:
                values = self._gradients()
                clip = self.candidate.optimization.gradient_clip_val
                if clip:
                    # No check for finiteness here: it would wait for the device.
                    nn.utils.clip_grad_norm_(self.network.parameters(), clip)
                # Memory runs out before a weight changes: AdamW makes its moments first.
                self.optimizer.step()
            except Exception as error:
                untried = self.compiled is not None and not self.compiled_works
                if not is_out_of_memory(error) and not untried:
                    raise
                failed = (str(error).splitlines() or [type(error).__name__])[0]
                memory = is_out_of_memory(error)
            if failed is None:
                self.compiled_works = True
                break
            # Outside the handler: the exception holds the tensors that are to be freed.
            if memory:
                self._halve(failed)
            else:
                self._run_uncompiled(failed)
            self.sampler.load_state_dict(before[0])
            self.generator.set_state(before[1])
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update(self.network)
        self.step += 1
        self.patches += self.plan.effective_batch
        for row in values:
            self.log.add(row, self.step)
        if self.step % self.plan.steps_per_epoch == 0:
            self.log.close_epoch()
        self.clock.lap("optimizer")

    def _gradients(self) -> list[Tensor]:
        """Sum the gradients of the micro-batches of a step; return the losses of each (K,)."""
        values = []
        for _ in range(self.plan.accumulate):
            patches = augment(
                self.sampler.draw(self.plan.batch_size), self.augmentation, self.generator
            )
            targets = derive_targets(patches.labels, patches.edt, **self.boundary)
            self.clock.lap("data")
            result = self._forward(patches.image, targets, patches.mask[:, None])
            if self.shared is not None:
                self.loss.rebalance(self.shared)
            (result.total / self.plan.accumulate).backward()  # type: ignore[no-untyped-call]
            parts = [result.parts[term.name] for term in self.terms]
            values.append(torch.stack([result.total.detach(), *parts]))
            self.clock.lap("forward_backward")
        return values

    def _forward(self, image: Tensor, targets: Tensor, mask: Tensor) -> LossResult:
        """Return the losses of a micro-batch."""
        network = self.network if self.compiled is None else self.compiled
        if not self.autocast:
            return self.loss(network(image), targets, mask)
        with torch.autocast("cuda", torch.bfloat16):
            outputs = network(image)
        heads = [outputs] if isinstance(outputs, Tensor) else outputs
        return self.loss([head.float() for head in heads], targets, mask)

    def _run_uncompiled(self, reason: str) -> None:
        """Go on with the network as it is, after its compiled form failed at its first step."""
        self.compiled = None
        self.optimizer.zero_grad(set_to_none=True)
        refuse(reason)
        self.notes.append(sentence(reason))

    def _halve(self, reason: str) -> None:
        """Make micro-batches smaller after memory ran out; a step keeps its patches.

        Raises:
            TrialFailed: A micro-batch is one patch already.
        """
        self.optimizer.zero_grad(set_to_none=True)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        old = self.plan
        if old.batch_size == 1:
            raise TrialFailed(
                "training", f"out of memory with a batch of one patch: {reason}", retry=True
            )
        self.plan = old.halved()
        self.notes.append(
            f"out of memory at step {self.step + 1}: micro-batch {old.batch_size} lowered to "
            f"{self.plan.batch_size}, accumulation raised from {old.accumulate} to "
            f"{self.plan.accumulate}"
        )

    def state_dict(self) -> dict[str, Any]:
        """Return everything that a training needs to go on as if never stopped."""
        return {
            "network": self.network.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "loss": self.loss.state_dict(),
            "early_stop": self.early_stop.state_dict(),
            "sampler": self.sampler.state_dict(),
            "generator": self.generator.get_state(),
            "random": self.random,
            "log": self.log.state_dict(),
            "epoch_losses": list(self.epoch_losses),
            "seconds": dict(self.clock.seconds),
            "step": self.step,
            "patches": self.patches,
            "batch_size": self.plan.batch_size,
            "stopped": self.stopped,
            "notes": list(self.notes),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what a checkpoint kept.

        Raises:
            CheckpointError: It does not fit the network.
        """
        try:
            self.network.load_state_dict(state["network"])
            if self.average is not None:
                self.average.load_state_dict(state["average"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.schedule.load_state_dict(state["schedule"])
            self.loss.load_state_dict(state["loss"])
            self.early_stop.load_state_dict(state["early_stop"])
            self.sampler.load_state_dict(state["sampler"])
            self.generator.set_state(state["generator"])
            self.log.load_state_dict(state["log"])
            self.epoch_losses = list(state["epoch_losses"])
            self.clock.seconds = dict(state["seconds"])
            while self.plan.batch_size > int(state["batch_size"]):
                self.plan = self.plan.halved()
        except (KeyError, RuntimeError, ValueError, TypeError) as error:
            raise CheckpointError(
                f"last.ckpt does not fit this candidate: {str(error).splitlines()[0]}. "
                "Give another --out."
            ) from error
        self.random = state["random"]
        self.step, self.patches = int(state["step"]), int(state["patches"])
        self.stopped = state["stopped"]
        self.notes = list(state["notes"])


def check_stopping(candidate: Candidate) -> None:
    """Refuse a value that early stopping cannot watch.

    Raises:
        ConfigError: `monitor.early_stopping.monitor` is not the total training loss.
    """
    chosen = candidate.monitor.early_stopping
    if chosen.enabled and chosen.monitor != WATCHED:
        raise ConfigError(
            f"monitor.early_stopping.monitor is '{chosen.monitor}', but only the total training "
            f"loss is watched. Set {WATCHED}."
        )
