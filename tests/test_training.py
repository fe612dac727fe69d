"""The loop does what its knobs say, says why it stops, and goes on as if it never had."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import BaseModel
from torch import nn

from hydralv_tune.artifacts.records import load_checkpoint, save_checkpoint
from hydralv_tune.config.candidate import Candidate
from hydralv_tune.config.errors import CheckpointError, TrialFailed, TrialInterrupted
from hydralv_tune.config.files import candidate_from_mapping
from hydralv_tune.config.search_space_files import load_space
from hydralv_tune.data.volumes import Volume
from hydralv_tune.numerics.networks.memory import is_out_of_memory
from hydralv_tune.numerics.networks.registry import ARCHITECTURES
from hydralv_tune.numerics.phantom.volume import make_phantom
from hydralv_tune.numerics.randomness import seeded
from hydralv_tune.results.export.models import write_safetensors
from hydralv_tune.trial.scoring.prediction import network_of, predict
from hydralv_tune.trial.scoring.sweep.sweep import sweep
from hydralv_tune.trial.training import compiling
from hydralv_tune.trial.training.log import LossLog
from hydralv_tune.trial.training.loop import (
    Trainer,
    build_loss,
    load_external_weights,
    shared_parameter,
)
from hydralv_tune.trial.training.optimization import (
    AveragedWeights,
    EarlyStop,
    build_optimizer,
    rate_factor,
    step_plan,
)
from hydralv_tune.trial.training.sampling import PatchSampler, ResidentVolume

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def candidate(**sections: Any) -> Candidate:
    """Return a candidate whose training takes milliseconds."""
    small: dict[str, Any] = {
        "system": {"training": {"batch_size": 2}},
        "model": {
            "architecture": "rsunet", "filters": [4, 8], "loss_balancing": {"strategy": "none"},
            "loss_functions": ["DiceLoss", "BCEWithLogitsLoss", "DiceLoss", "BCEWithLogitsLoss",
                               "SmoothL1Loss"],
        },
        "data": {
            "patch_size": [4, 16, 16], "pad_size": [0, 0, 0], "iter_num_per_epoch": 8,
            "augmentation": {"preset": "none"}, "sampling": {"foreground_share": 0.5},
        },
        "optimization": {
            "max_epochs": 3, "accumulate_grad_batches": 1, "precision": "32",
            "optimizer": {"lr": 1e-3}, "scheduler": {"warmup_epochs": 0, "min_lr": 0.0},
            "ema": {"enabled": False},
        },
        "monitor": {"evaluation": {"count": 3}, "early_stopping": {"enabled": False}},
    }  # fmt: skip
    for name, keys in sections.items():
        small[name] = _merged(small.get(name, {}), keys)
    return candidate_from_mapping(small, place="test")


def _merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    merged = dict(old)
    for key, value in new.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merged(merged[key], value) if both else value
    return merged


def volume() -> Volume:
    """Return a volume (8, 32, 32) with two bright balls."""
    rng = np.random.default_rng(0)
    label = np.zeros((8, 32, 32), np.uint16)
    grid = np.indices(label.shape)
    for number, centre in enumerate([(3, 9, 9), (4, 22, 20)], 1):
        away = sum((g - c) ** 2 * w for g, c, w in zip(grid, centre, (4, 1, 1), strict=True))
        label[away < 26] = number
    image = np.where(label > 0, 180, 90) + rng.normal(0, 12, label.shape)
    return Volume("balls", image.clip(0, 255).astype(np.uint8), label)


def trainer(
    chosen: Candidate,
    network: nn.Module | None = None,
    *,
    seed: int = 0,
    given: Volume | None = None,
) -> Trainer:
    """Return a trainer at its start."""
    sampler = PatchSampler(
        [ResidentVolume(given or volume(), chosen.data, CPU, seed)],
        patch_size=chosen.data.patch_size,
        foreground_share=chosen.data.sampling.foreground_share,
        seed=seed,
    )
    if network is None:
        with seeded(seed, CPU):
            network = network_of(chosen)
    return Trainer(chosen, network, sampler, CPU, seed=seed)


def weights_of(network: nn.Module) -> torch.Tensor:
    return torch.cat([value.double().flatten() for value in network.state_dict().values()])


def test_an_epoch_counts_patches_not_steps() -> None:
    chosen = candidate(
        system={"training": {"batch_size": 8}},
        data={"iter_num_per_epoch": 1280},
        optimization={"accumulate_grad_batches": 2, "max_epochs": 10},
    )
    plan = step_plan(chosen)
    assert (plan.effective_batch, plan.steps_per_epoch, plan.steps) == (16, 80, 800)
    assert plan.patches_per_epoch == 1280
    assert plan.evaluations == (267, 533, 800)


def test_there_are_no_more_evaluations_than_steps() -> None:
    chosen = candidate(
        data={"iter_num_per_epoch": 2},
        optimization={"max_epochs": 2},
        monitor={"evaluation": {"count": 10}},
    )
    assert step_plan(chosen).evaluations == (1, 2)


def test_the_rate_warms_up_from_a_factor_and_falls_to_a_rate() -> None:
    chosen = candidate(
        optimization={
            "max_epochs": 10,
            "optimizer": {"lr": 1e-2},
            "scheduler": {"warmup_epochs": 2, "warmup_start_lr": 0.1, "min_lr": 1e-3},
        }
    ).optimization
    plan = step_plan(candidate(optimization={"max_epochs": 10}))
    factor = rate_factor(chosen, plan)
    warm = 2 * plan.steps_per_epoch
    assert factor(0) == pytest.approx(0.1)
    assert factor(warm // 2) == pytest.approx(0.55)
    assert factor(warm) == pytest.approx(1.0)
    assert factor((warm + plan.steps) // 2) == pytest.approx((1 + 0.1) / 2)
    assert factor(plan.steps) == pytest.approx(0.1)
    constant = candidate(optimization={"scheduler": {"name": "constant"}}).optimization
    assert rate_factor(constant, plan)(plan.steps // 2) == 1.0


def test_the_optimizer_has_the_candidate_s_knobs_and_the_balancing_without_decay() -> None:
    chosen = candidate(
        model={"loss_balancing": {"strategy": "uncertainty"}},
        optimization={"optimizer": {"weight_decay": 0.2, "betas": [0.8, 0.9], "eps": 1e-5}},
    )
    network, loss = network_of(chosen), build_loss(chosen.model)
    network_group, balancing = build_optimizer(
        network, loss.parameters(), chosen.optimization
    ).param_groups
    assert network_group["weight_decay"] == 0.2
    assert network_group["betas"] == (0.8, 0.9)
    assert network_group["eps"] == 1e-5
    assert balancing["weight_decay"] == 0.0
    assert len(balancing["params"]) == 1


@pytest.mark.parametrize("strategy", ["uncertainty", "gradnorm"])
def test_balancing_learns(strategy: str) -> None:
    chosen = candidate(model={"loss_balancing": {"strategy": strategy}})
    training = trainer(chosen)
    before = {task: float(w) for task, w in training.loss.task_weights().items()}
    training.run_to(10)
    after = {task: float(w) for task, w in training.loss.task_weights().items()}
    assert set(after) == {"label", "boundary", "edt"}
    assert all(before[task] != after[task] for task in after)


def test_the_shared_parameter_is_no_head_and_every_task_depends_on_it() -> None:
    for name in ("rsunet", "monai_unet"):
        chosen = candidate(
            model={"architecture": name, "filters": [4, 8], "deep_supervision": False}
        )
        network = network_of(chosen)
        parameter = shared_parameter(network, chosen.model)
        output = network(torch.randn(1, 1, 4, 16, 16))
        for channel in range(3):
            (gradient,) = torch.autograd.grad(
                output[:, channel].square().sum(), parameter, retain_graph=True
            )
            assert gradient.abs().sum() > 0


def test_a_small_volume_is_learned() -> None:
    chosen = candidate(optimization={"max_epochs": 30, "optimizer": {"lr": 1e-2}})
    training = trainer(chosen)
    training.run_to(10)
    first = training.losses()
    training.run_to(110)
    training.losses()
    training.run_to(120)
    last = training.losses()
    assert last["total"] < 0.5 * first["total"]
    assert {"total", "label", "boundary", "edt", "plan_total"} <= set(last)
    parts = [value for name, value in last.items() if name.startswith("label_")]
    assert last["label"] == pytest.approx(sum(parts))
    assert last["plan_total"] == pytest.approx(
        0.5 * (last["label"] + last["boundary"] + last["edt"])
    )


def test_deep_supervision_trains_the_coarse_heads() -> None:
    training = trainer(candidate(model={"deep_supervision": True, "filters": [4, 8, 8]}))
    heads = {k: v.clone() for k, v in training.network.state_dict().items() if "ds_heads" in k}
    training.run_to(2)
    state = training.network.state_dict()
    assert heads
    assert all(not torch.equal(state[key], value) for key, value in heads.items())


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_every_architecture_trains(name: str) -> None:
    deep = name in ("monai_basic_unet3d", "mednext")
    chosen = candidate(
        model={
            "architecture": name,
            "filters": [4, 8, 16, 32, 64] if deep else [4, 8],
            "deep_supervision": ARCHITECTURES[name].deep_supervision,
            "mednext_size": "S" if name == "mednext" else None,
        },
        data={"patch_size": [16, 32, 32] if deep else [4, 16, 16], "pad_size": [8, 8, 8]},
        inference={"sliding_window": {"window_size": None}},
    )
    training = trainer(chosen)
    before = weights_of(training.network).clone()
    training.run_to(4)
    first = training.losses()["total"]
    training.run_to(12)
    assert not torch.equal(before, weights_of(training.network))
    assert training.losses()["total"] < first


def test_accumulated_micro_batches_are_one_large_batch() -> None:
    """Without batch statistics, four patches in one batch or in four give the same step."""

    def chosen(batch: int, accumulate: int) -> Candidate:
        return candidate(
            system={"training": {"batch_size": batch}},
            model={"norm": "instance", "loss_functions": ["BCEWithLogitsLoss"] * 4 + ["MSELoss"],
                   "loss_kwargs": []},
            optimization={"accumulate_grad_batches": accumulate},
        )  # fmt: skip

    one, four = trainer(chosen(4, 1)), trainer(chosen(1, 4))
    one.run_to(1)
    four.run_to(1)
    torch.testing.assert_close(
        weights_of(one.network), weights_of(four.network), atol=2e-5, rtol=1e-3
    )
    assert one.patches == four.patches == 4


def test_gradients_are_clipped() -> None:
    seen = []
    for limit in (0.0, 1e-3):
        training = trainer(candidate(optimization={"gradient_clip_val": limit}))
        kept: list[float] = []

        def norm(optimizer: Any, *_: Any, kept: list[float] = kept) -> None:
            grads = [p.grad for g in optimizer.param_groups for p in g["params"]]
            kept.append(float(torch.cat([g.flatten() for g in grads if g is not None]).norm()))

        training.optimizer.register_step_pre_hook(norm)
        training.run_to(1)
        seen.append(kept[0])
    assert seen[0] > 1e-2
    assert seen[1] == pytest.approx(1e-3, rel=1e-3)


def test_the_average_follows_the_weights_then_lags() -> None:
    network = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        network.weight.fill_(1.0)
    average = AveragedWeights(network, decay=0.5, warmup_steps=1)
    with torch.no_grad():
        network.weight.fill_(3.0)
    average.update(network)
    assert average.network.weight.tolist() == [[3.0, 3.0]]
    with torch.no_grad():
        network.weight.fill_(13.0)
    average.update(network)  # the ramp begins at 1 / 10
    assert average.network.weight[0, 0].item() == pytest.approx(0.1 * 3 + 0.9 * 13)
    for _ in range(100):
        before = average.network.weight[0, 0].item()
        with torch.no_grad():
            network.weight.add_(1.0)
        average.update(network)
    now = network.weight[0, 0].item()
    assert average.network.weight[0, 0].item() == pytest.approx(0.5 * before + 0.5 * now)


def test_the_averaged_network_is_evaluated_unless_said_otherwise() -> None:
    averaged = trainer(
        candidate(optimization={"ema": {"enabled": True, "decay": 0.9, "warmup_steps": 0}})
    )
    averaged.run_to(6)
    assert averaged.evaluated is not averaged.network
    assert not torch.equal(weights_of(averaged.evaluated), weights_of(averaged.network))
    plain = trainer(candidate(optimization={"ema": {"enabled": True, "validate_with_ema": False}}))
    assert plain.evaluated is plain.network


def test_voxels_outside_the_mask_teach_nothing() -> None:
    chosen = candidate(optimization={"optimizer": {"lr": 1e-2}})
    plain = volume()
    assert plain.label is not None
    mask = np.ones(plain.label.shape, bool)
    mask[:, 16:] = False  # one ball lies within, the other without
    other = plain.label.copy()
    other[:, 16:18] = 0
    other[:, 18:] = 7
    seen = []
    for label, valid in ((plain.label, mask), (other, mask), (other, None)):
        training = trainer(chosen, given=Volume("v", plain.image, label, valid))
        training.run_to(4)
        seen.append((training.losses(), weights_of(training.network)))
    assert seen[0][0] == seen[1][0]
    assert torch.equal(seen[0][1], seen[1][1])
    assert seen[2][0] != seen[1][0]


GRADNORM = {"model": {"loss_balancing": {"strategy": "gradnorm"}}}
DEEP = {"model": {"deep_supervision": True, "filters": [4, 8, 8]}}
EMA = {"optimization": {"ema": {"enabled": True, "decay": 0.1, "warmup_steps": 0}}}
WARM = {"optimization": {"scheduler": {"warmup_epochs": 1, "warmup_start_lr": 0.1}}}
STOPS: dict[str, Any] = {"monitor": {"early_stopping": {
    "enabled": True, "threshold": None, "divergence_threshold": None,
    "patience": 1, "min_delta": 100.0,
}}}  # fmt: skip


def boundary(**kwargs: Any) -> list[dict[str, Any]]:
    """Return targets whose boundary has these arguments."""
    plain = {"thickness": 1, "edge_mode": "all", "mode": "2d"}
    return [{"name": "binary"}, {"name": "instance_boundary", "kwargs": {**plain, **kwargs}},
            {"name": "instance_edt"}]  # fmt: skip


def tasks(*losses: list[int]) -> list[list[Any]]:
    names = ("label", "boundary", "edt")
    pairs = enumerate(zip(names, losses, strict=True))
    return [[n, n + 1, name, chosen] for n, (name, chosen) in pairs]


KNOBS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "model.filters": ([4, 8], [4, 6], {}),
    "model.deep_supervision": (True, False, DEEP),
    "model.deep_supervision_weights": (None, [1.0, 0.1, 0.1], DEEP),
    "model.loss_functions": (["DiceLoss"] * 4 + ["MSELoss"], ["DiceLoss"] * 4 + ["L1Loss"], {}),
    "model.loss_weights": ([1.0] * 5, [1.0, 1.0, 0.2, 1.0, 1.0], {}),
    "model.loss_kwargs": ([], [{}, {"foreground_weight": 5.0}, {}, {}, {}], {}),
    "model.multi_task_config": (tasks([0, 1], [2, 3], [4]), tasks([0], [1, 2, 3], [4]), {}),
    "model.loss_balancing.strategy": ("none", "uncertainty", {}),
    "model.loss_balancing.gradnorm_alpha": (0.0, 3.0, GRADNORM),
    "model.loss_balancing.gradnorm_lambda": (1.0, 0.2, GRADNORM),
    "model.loss_balancing.gradnorm_parameter_strategy": ("first", "last", GRADNORM),
    "data.label_transform.targets": (boundary(), boundary(thickness=2), {}),
    "data.label_transform.targets ": (boundary(), boundary(mode="3d"), {}),
    "data.label_transform.targets  ": (boundary(), boundary(edge_mode="seg-no-bg"), {}),
    "optimization.max_epochs": (3, 9, {}),
    "optimization.gradient_clip_val": (0.0, 1e-3, {}),
    "optimization.accumulate_grad_batches": (1, 2, {}),
    "optimization.optimizer.lr": (1e-3, 2e-3, {}),
    "optimization.optimizer.weight_decay": (0.0, 0.5, {}),
    "optimization.optimizer.betas": ([0.9, 0.999], [0.5, 0.999], {}),
    "optimization.optimizer.eps": (1e-8, 1e-3, {}),
    "optimization.scheduler.name": ("WarmupCosineLR", "constant", {}),
    "optimization.scheduler.warmup_epochs": (0, 1, WARM),
    "optimization.scheduler.warmup_start_lr": (0.1, 0.5, WARM),
    "optimization.scheduler.min_lr": (0.0, 5e-4, {}),
    "optimization.ema.enabled": (False, True, EMA),
    "optimization.ema.decay": (0.1, 0.15, EMA),
    "optimization.ema.warmup_steps": (0, 5, EMA),
    "optimization.ema.validate_with_ema": (True, False, EMA),
    "monitor.evaluation.count": (2, 3, {}),
    "monitor.early_stopping.enabled": (False, True, STOPS),
    "monitor.early_stopping.patience": (1, 2, STOPS),
    "monitor.early_stopping.min_delta": (0.0, 100.0, STOPS),
    "monitor.early_stopping.threshold": (None, 50.0, STOPS),
    "monitor.early_stopping.divergence_threshold": (None, 0.01, STOPS),
}
"""Two values of each key that must train differently, and the keys it needs to act at all.

A space at the end of a key stands for another pair of values of the same.
"""

ELSEWHERE = {
    "model.architecture": "test_every_architecture_trains",
    "model.in_channels": "it has one value",
    "model.out_channels": "it has one value",
    "model.external_weights_path": "test_weights_of_pytorch_connectomics_load_and_are_fine_tuned",
    "model.external_weights_key_prefix": "test_a_prefix_of_its_own_is_taken_off",
    "model.external_weights_strict": "test_weights_that_match_in_part_load_where_that_is_waived",
    "optimization.precision": "it acts on a GPU alone",
    "optimization.optimizer.name": "it has one value",
    "monitor.early_stopping.monitor": "it has one value",
    "monitor.early_stopping.mode": "it has one value",
    "monitor.evaluation.sweep_time_share": "it acts in the sweep",
    **{f"model.{key}": "conformance/test_architectures" for entry in ARCHITECTURES.values()
       for key in entry.keys},
}  # fmt: skip


def computed(chosen: str) -> torch.Tensor:
    """Return what a short training comes to: weights, losses, steps."""
    training = trainer(Candidate.model_validate_json(chosen))
    training.run_to(10)
    facts = [*training.losses().values(), training.step, *training.plan.evaluations]
    return torch.cat([weights_of(training.evaluated), torch.tensor(facts, dtype=torch.float64)])


computed_once = lru_cache(computed)
"""The same, kept: many keys have the same training before their change."""


@pytest.mark.parametrize("key", KNOBS)
def test_a_key_changes_what_the_trainer_computes(key: str) -> None:
    one, other, needed = KNOBS[key]
    seen = []
    for value, compute in ((one, computed_once), (other, computed), (other, computed)):
        said: dict[str, Any] = {}
        place = said
        *sections, last = key.strip().split(".")
        for name in sections:
            place = place.setdefault(name, {})
        place[last] = value
        seen.append(compute(candidate(**_merged(needed, said)).model_dump_json()))
    assert not torch.equal(seen[0], seen[1])
    assert torch.equal(seen[1], seen[2])


def test_every_key_of_the_training_is_in_the_table() -> None:
    def leaves(section: type[BaseModel], path: str) -> Iterator[str]:
        for name, entry in section.model_fields.items():
            below = f"{path}.{name}"
            if isinstance(entry.annotation, type) and issubclass(entry.annotation, BaseModel):
                yield from leaves(entry.annotation, below)
            elif not (entry.description or "").startswith("No effect"):
                yield below

    known = {key.strip() for key in KNOBS} | set(ELSEWHERE)
    for name in ("model", "optimization", "monitor"):
        section = Candidate.model_fields[name].annotation
        assert section is not None
        assert set(leaves(section, name)) <= known


def stopping(**keys: Any) -> EarlyStop:
    return EarlyStop(
        candidate(monitor={"early_stopping": {"enabled": True, **keys}}).monitor.early_stopping
    )


def test_early_stopping_waits_for_its_patience() -> None:
    stop = stopping(patience=2, min_delta=0.1)
    assert stop.check([1.0, 0.8, 0.75], 1) is None
    assert "after epoch 4: no better loss than 0.8 for 2 epochs" in str(stop.check([0.71], 4))


def test_early_stopping_ends_at_threshold_and_divergence() -> None:
    assert "under the threshold 0.1" in str(stopping(threshold=0.1).check([0.5, 0.05], 1))
    assert "it diverges" in str(stopping(divergence_threshold=2.0).check([1.0, 3.0], 1))
    off = EarlyStop(candidate().monitor.early_stopping)
    assert off.check([9.0] * 500, 1) is None


def test_a_training_stops_early_with_the_weights_of_the_epoch_that_it_names() -> None:
    training = trainer(candidate(monitor={"early_stopping": {"enabled": True, "threshold": 50.0}}))
    training.run_to(12)
    assert training.step == training.plan.steps_per_epoch == 4
    assert str(training.stopped).startswith("stopped early after epoch 1: ")
    training.run_to(12)
    assert training.step == 4
    one_epoch = trainer(candidate())
    one_epoch.run_to(4)
    assert torch.equal(weights_of(one_epoch.network), weights_of(training.network))


class CountedLog(LossLog):
    """A log that remembers how often it was read from the device."""

    reads = 0

    def check(self) -> Any:
        self.reads += 1
        return super().check()


@pytest.mark.parametrize(("enabled", "reads"), [(True, 3), (False, 1)])
def test_only_a_training_that_may_stop_early_waits_for_the_device_at_each_epoch(
    enabled: bool, reads: int
) -> None:
    training = trainer(candidate(monitor={"early_stopping": {"enabled": enabled}}))
    training.log = CountedLog(training.log.names, CPU)
    training.run_to(12)
    assert training.log.reads == reads


class Poisoned(nn.Module):
    """A network that gives not-a-number from a step on, as one that diverged does."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.convolution = nn.Conv3d(1, 3, 1)
        self.calls = 0
        self.after = after

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        bad = math.nan if self.calls > self.after else 1.0
        return self.convolution(x) * bad


def test_a_loss_that_is_not_finite_names_step_and_parts() -> None:
    training = trainer(candidate(), Poisoned(after=4))
    with pytest.raises(
        TrialFailed, match=r"not finite at step 5: total nan, label_DiceLoss_0 nan"
    ) as e:
        training.run_to(12)
    assert e.value.stage == "training"
    assert not e.value.retry


def test_an_interrupt_does_not_hide_a_loss_that_is_not_finite() -> None:
    asked = iter([False] * 6 + [True])
    training = trainer(candidate(), Poisoned(after=4))
    with pytest.raises(TrialFailed, match="not finite at step 5"):
        training.run_to(12, should_stop=lambda: next(asked))


class Hungry(nn.Module):
    """A network that runs out of memory where a batch is larger than it can take."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.convolution = nn.Conv3d(1, 3, 1)
        self.most = most

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[0] > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return self.convolution(x)


def test_out_of_memory_halves_the_micro_batch_and_keeps_the_effective_one() -> None:
    chosen = candidate(system={"training": {"batch_size": 8}}, data={"iter_num_per_epoch": 32})
    training = trainer(chosen, Hungry(most=2))
    training.run_to(3)
    assert (training.plan.batch_size, training.plan.accumulate) == (2, 4)
    assert training.plan.effective_batch == 8
    assert training.patches == 24
    assert "micro-batch 8 lowered to 4, accumulation raised from 1 to 2" in training.notes[0]
    assert "micro-batch 4 lowered to 2, accumulation raised from 2 to 4" in training.notes[1]


class HungryBackward(torch.autograd.Function):
    """An identity whose gradient does not fit in memory where a batch is large."""

    @staticmethod
    def forward(context: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> torch.Tensor:
        if gradient.shape[0] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return gradient


class HungryWhenLearning(Hungry):
    """A network whose backward pass runs out of memory."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = HungryBackward.apply(self.convolution(x))
        return result


def hungry_optimizer(training: Trainer) -> None:
    """Let the optimizer run out of memory until micro-batches hold two patches."""

    def hungry(*_: Any) -> None:
        if training.plan.batch_size > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    training.optimizer.register_step_pre_hook(hungry)


@pytest.mark.parametrize("where", ["forward", "backward", "optimizer"])
def test_wherever_a_step_runs_out_of_memory_the_next_try_ends_where_small_batches_do(
    where: str,
) -> None:
    def trained(batch: int, accumulate: int, most: int) -> Trainer:
        chosen = candidate(
            system={"training": {"batch_size": batch}},
            data={"iter_num_per_epoch": 32},
            optimization={"accumulate_grad_batches": accumulate},
        )
        network = HungryWhenLearning(most) if where == "backward" else Hungry(most)
        torch.manual_seed(0)
        torch.nn.init.normal_(network.convolution.weight)
        training = trainer(chosen, network)
        if where == "optimizer":
            hungry_optimizer(training)
        training.run_to(2)
        return training

    small = trained(2, 4, most=100)
    large = trained(8, 1, most=2 if where == "forward" else 100)
    assert (large.plan.batch_size, large.plan.accumulate) == (2, 4)
    assert len(large.notes) == 2
    assert "out of memory at step 1: micro-batch 8 lowered to 4" in large.notes[0]
    assert large.patches == small.patches == 16
    assert large.optimizer.state_dict()["state"][0]["step"] == 2


class HungryLater(Hungry):
    """A network that runs out of memory in its third micro-batch, once."""

    calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.most = 4 if self.calls == 3 else 100
        return super().forward(x)


def test_an_odd_batch_keeps_its_size_and_a_failed_attempt_is_not_counted() -> None:
    chosen = candidate(
        system={"training": {"batch_size": 5}},
        data={"iter_num_per_epoch": 30},
        optimization={"accumulate_grad_batches": 3},
    )
    training = trainer(chosen, HungryLater(most=0))
    training.run_to(2)
    assert (training.plan.batch_size, training.plan.accumulate) == (1, 15)
    assert training.plan.effective_batch == 15
    assert training.plan.patches_per_epoch == 30
    assert training.patches == 30
    assert training.log.epoch_count == 0
    assert "micro-batch 5 lowered to 1, accumulation raised from 3 to 15" in training.notes[0]
    sizes = [(p.batch_size, p.accumulate) for p in (step_plan(candidate(
        system={"training": {"batch_size": batch}},
        optimization={"accumulate_grad_batches": accumulate},
    )).halved() for batch, accumulate in ((8, 2), (6, 1), (6, 2), (7, 1), (9, 2)))]  # fmt: skip
    assert sizes == [(4, 4), (3, 2), (3, 4), (1, 7), (3, 6)]


def test_a_single_patch_that_does_not_fit_fails_and_may_be_tried_elsewhere() -> None:
    training = trainer(candidate(), Hungry(most=0))
    with pytest.raises(TrialFailed, match="out of memory with a batch of one patch") as error:
        training.run_to(1)
    assert error.value.retry


def test_a_network_that_cannot_be_compiled_is_trained_as_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(compiling, "_refusals", [])
    expected = trainer(candidate())
    expected.run_to(3)
    training = trainer(candidate())

    def broken(_: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("backend='inductor' raised: cannot find a C compiler")

    training.compiled = broken
    training.run_to(3)
    assert torch.equal(weights_of(expected.network), weights_of(training.network))
    assert "torch.compile does not work here" in training.notes[0]
    # Once it has worked, an error is an error.
    training.compiled, training.compiled_works = broken, True
    with pytest.raises(RuntimeError, match="inductor"):
        training.run_to(4)


def test_compiling_is_tried_once_in_a_process_and_ends_at_its_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = []

    def hanging(network: nn.Module) -> Any:
        calls.append(network)
        return lambda image: time.sleep(600)

    monkeypatch.setattr(compiling, "_refusals", [])
    monkeypatch.setattr(torch, "compile", hanging)
    network = nn.Conv3d(1, 3, 1)
    for _ in range(2):
        began = time.monotonic()
        found, note = compiling.compiled_form(network, (1, 1, 2, 4, 4), autocast=False, limit_s=0.2)
        assert time.monotonic() - began < 30
        assert found is None
        assert note is not None
        assert "not done after 0.2 s" in note
    assert len(calls) == 1


def test_what_compiles_is_the_network_and_leaves_no_gradients(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(compiling, "_refusals", [])
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda network: real(network, backend="eager"))
    network = nn.Conv3d(1, 3, 1)
    found, note = compiling.compiled_form(network, (1, 1, 2, 4, 4), autocast=True)
    assert note is None
    assert found is not None
    image = torch.rand(1, 1, 2, 4, 4)
    assert torch.equal(found(image), network(image))
    assert all(parameter.grad is None for parameter in network.parameters())

    def broken(_: nn.Module) -> Any:
        raise RuntimeError("cannot find a C compiler\nand more")

    monkeypatch.setattr(torch, "compile", broken)
    found, note = compiling.compiled_form(network, (1, 1, 2, 4, 4), autocast=False)
    assert found is None
    assert note is not None
    assert note.endswith("cannot find a C compiler")


def test_out_of_memory_is_told_from_other_errors() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("x"))
    assert is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"))
    assert is_out_of_memory(RuntimeError("CUDA error: out of memory"))
    assert is_out_of_memory(RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"))
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("size mismatch"))
    with pytest.raises(RuntimeError) as error:
        torch.empty(1 << 60)
    assert is_out_of_memory(error.value)


EVERYTHING: dict[str, Any] = {
    "model": {"loss_balancing": {"strategy": "gradnorm"}, "dropout": 0.2},
    "data": {"augmentation": {"preset": "all"}},
    "optimization": {
        "ema": {"enabled": True, "decay": 0.9, "warmup_steps": 1},
        "accumulate_grad_batches": 2,
    },
}


def test_the_same_seed_gives_the_same_weights() -> None:
    one, two, other = (trainer(candidate(**EVERYTHING), seed=s) for s in (1, 1, 2))
    for training in (one, two, other):
        torch.rand(17)  # what others draw in between changes nothing
        training.run_to(3)
    assert torch.equal(weights_of(one.network), weights_of(two.network))
    assert not torch.equal(weights_of(one.network), weights_of(other.network))


def test_training_leaves_the_global_generators_as_they_were() -> None:
    torch.manual_seed(5)
    np.random.seed(5)
    expected = (torch.rand(3), np.random.rand(3))
    torch.manual_seed(5)
    np.random.seed(5)
    trainer(candidate(**EVERYTHING)).run_to(2)
    assert torch.equal(torch.rand(3), expected[0])
    np.testing.assert_array_equal(np.random.rand(3), expected[1])


@pytest.mark.parametrize("strategy", ["gradnorm", "uncertainty"])
def test_a_continued_training_is_the_same_bit_for_bit(tmp_path: Path, strategy: str) -> None:
    chosen = candidate(**{**EVERYTHING, "model": {"loss_balancing": {"strategy": strategy},
                                                  "dropout": 0.2}})  # fmt: skip
    whole = trainer(chosen)
    whole.run_to(7)
    first = trainer(chosen)
    first.run_to(3)
    save_checkpoint(tmp_path / "last.ckpt", first.state_dict())
    second = trainer(chosen, seed=0)
    second.load_state_dict(load_checkpoint(tmp_path / "last.ckpt"))
    second.run_to(7)
    assert torch.equal(weights_of(whole.network), weights_of(second.network))
    assert torch.equal(weights_of(whole.evaluated), weights_of(second.evaluated))
    assert whole.loss.state_dict().keys() == second.loss.state_dict().keys()
    for key, value in whole.loss.state_dict().items():
        assert torch.equal(value, second.loss.state_dict()[key])
    assert whole.losses() == second.losses()
    assert whole.patches == second.patches


def continued(chosen: Candidate, first: Trainer, folder: Path) -> Trainer:
    """Return a trainer at its start that has taken over the state of another, through a file."""
    save_checkpoint(folder / "last.ckpt", first.state_dict())
    second = trainer(chosen, type(first.network)(1) if isinstance(first.network, Hungry) else None)
    second.load_state_dict(load_checkpoint(folder / "last.ckpt"))
    return second


def test_a_continued_training_keeps_its_smaller_micro_batch(tmp_path: Path) -> None:
    chosen = candidate(system={"training": {"batch_size": 8}}, data={"iter_num_per_epoch": 32})
    first = trainer(chosen, Hungry(most=2))
    first.run_to(1)
    second = continued(chosen, first, tmp_path)
    assert second.plan == first.plan
    assert (second.plan.batch_size, second.plan.accumulate) == (2, 4)
    assert second.notes == first.notes


def test_a_continued_training_stops_early_when_it_would_have(tmp_path: Path) -> None:
    chosen = candidate(
        optimization={"max_epochs": 6},
        monitor={"early_stopping": {"enabled": True, "patience": 3, "min_delta": 100.0}},
    )
    whole, first = trainer(chosen), trainer(chosen)
    whole.run_to(24)
    first.run_to(10)
    second = continued(chosen, first, tmp_path)
    second.run_to(24)
    assert whole.stopped is not None
    assert "after epoch 4: no better loss" in whole.stopped
    assert (second.stopped, second.step) == (whole.stopped, whole.step)
    assert second.epoch_losses == whole.epoch_losses


def test_a_checkpoint_of_another_network_is_refused() -> None:
    state = trainer(candidate()).state_dict()
    with pytest.raises(CheckpointError, match="does not fit this candidate"):
        trainer(candidate(model={"filters": [4, 4]})).load_state_dict(state)


def test_a_stop_comes_between_steps_and_loses_nothing() -> None:
    asked = iter([False, False, True])
    stopped = trainer(candidate())
    with pytest.raises(TrialInterrupted, match="stopped at step 2 of 12"):
        stopped.run_to(12, should_stop=lambda: next(asked))
    assert stopped.step == 2
    stopped.run_to(5)
    whole = trainer(candidate())
    whole.run_to(5)
    assert torch.equal(weights_of(whole.network), weights_of(stopped.network))


def test_time_is_told_apart() -> None:
    training = trainer(candidate())
    training.run_to(4)
    assert set(training.clock.seconds) == {"data", "forward_backward", "optimizer"}
    assert all(value > 0 for value in training.clock.seconds.values())


@pytest.mark.parametrize("name", ["plain", "deep"])
def test_weights_of_pytorch_connectomics_load_and_are_fine_tuned(
    shared_data: Path, name: str
) -> None:
    chosen = candidate(
        model={
            "filters": [4, 8, 16],
            "deep_supervision": name == "deep",
            "external_weights_path": str(shared_data / "pytc-rsunet" / f"{name}.ckpt"),
        }
    )
    network = network_of(chosen)
    report = load_external_weights(network, chosen.model)
    assert report is not None
    assert "(100.0%)" in report
    vectors = np.load(shared_data / "pytc-rsunet" / f"{name}.npz")
    arrays = [torch.from_numpy(vectors[key]) for key in ("input", "output") if key in vectors]
    if len(arrays) == 2:
        with torch.no_grad():
            torch.testing.assert_close(network.eval()(arrays[0]), arrays[1], atol=1e-5, rtol=1e-4)
    before = weights_of(network).clone()
    training = trainer(chosen, network)
    training.run_to(3)
    assert not torch.equal(before, weights_of(network))


def test_the_weights_that_ship_find_vesicles_they_have_never_seen() -> None:
    space = load_space("hydra_lv_small")
    phantom = make_phantom((24, 112, 192), instances=14, seed=990_000)
    found = {}
    for name in ("phantom_unet", "small_unet"):
        chosen = space.candidate({}, space.recipes[name])
        network = network_of(chosen)
        report = load_external_weights(network, chosen.model)
        assert report is None or report.startswith("phantom.safetensors: ")
        assert report is None or "(100.0%)" in report
        maps = predict(network.eval(), phantom.image, chosen)
        swept = sweep(maps, phantom.label, phantom.mask, space.decoding, objective=space.objective)
        found[name] = swept.best_by_f1.metrics["f1_iou50"]
    assert found["phantom_unet"] > 0.7 > 0.3 > found["small_unet"]


def test_exported_safetensors_are_weights_to_start_from(tmp_path: Path) -> None:
    given = network_of(candidate())
    path = write_safetensors(tmp_path / "weights.safetensors", given, candidate())
    chosen = candidate(model={"external_weights_path": str(path)})
    network = network_of(chosen)
    assert "(100.0%)" in str(load_external_weights(network, chosen.model))
    assert all(torch.equal(network.state_dict()[k], v) for k, v in given.state_dict().items())
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"weights\.safetensors: no safetensors"):
        load_external_weights(network, chosen.model)


def test_a_wrong_prefix_is_refused_not_trained_from_scratch(shared_data: Path) -> None:
    path = str(shared_data / "pytc-rsunet" / "plain.ckpt")
    chosen = candidate(
        model={"filters": [4, 8, 16], "external_weights_path": path,
               "external_weights_key_prefix": "net."}
    )  # fmt: skip
    with pytest.raises(CheckpointError, match=r"plain\.ckpt.*model\."):
        load_external_weights(network_of(chosen), chosen.model)


def test_a_prefix_of_its_own_is_taken_off(tmp_path: Path) -> None:
    path = tmp_path / "weights.ckpt"
    given = network_of(candidate()).state_dict()
    torch.save({"state_dict": {f"net.{key}": value for key, value in given.items()}}, path)
    chosen = candidate(
        model={"external_weights_path": str(path), "external_weights_key_prefix": "net."}
    )
    network = network_of(chosen)
    assert "(100.0%)" in str(load_external_weights(network, chosen.model))
    assert all(torch.equal(network.state_dict()[key], value) for key, value in given.items())


def test_weights_that_match_in_part_load_where_that_is_waived(tmp_path: Path) -> None:
    path = tmp_path / "weights.ckpt"
    given = network_of(candidate()).state_dict()
    lost = next(iter(given))
    part = {f"model.{key}": value for key, value in given.items() if key != lost}
    torch.save({"state_dict": part}, path)
    for strict in (True, False):
        chosen = candidate(
            model={"external_weights_path": str(path), "external_weights_strict": strict}
        )
        network = network_of(chosen)
        before = network.state_dict()[lost].clone()
        if strict:
            with pytest.raises(CheckpointError, match=r"weights\.ckpt"):
                load_external_weights(network, chosen.model)
            continue
        report = load_external_weights(network, chosen.model)
        assert report is not None
        assert "(100.0%)" not in report
        got = network.state_dict()
        assert torch.equal(got[lost], before)
        assert all(torch.equal(got[key], value) for key, value in given.items() if key != lost)
