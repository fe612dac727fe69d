"""A training step and a prediction on the device `meta`, where every wait of the host raises.

Tensors there have shapes and no values: an operation that asks for a value, or that mixes devices,
fails as it would stall or fail on a GPU. Every loss and every augmentation takes part in each case.
`torch.autocast` does not act on `meta`, so the network itself is put into bf16 instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hydralv_tune.config.candidate import Candidate
from hydralv_tune.data.volumes import Volume
from hydralv_tune.numerics.augmentation.registry import AUGMENTATIONS
from hydralv_tune.numerics.losses.registry import LOSSES, loss_arguments
from hydralv_tune.numerics.networks.memory import training_bytes
from hydralv_tune.numerics.networks.registry import ARCHITECTURES, build_network
from hydralv_tune.numerics.test_time_augmentation import (
    activate,
    distinct_transforms,
    join_transforms,
)
from hydralv_tune.trial.scoring.prediction import network_of
from hydralv_tune.trial.training.loop import Trainer, build_loss
from hydralv_tune.trial.training.sampling import PatchSampler, ResidentVolume

META = torch.device("meta")
FILTERS = [2, 4, 8, 16, 32]
SIZE = (16, 32, 32)
NAMES = sorted(ARCHITECTURES)


def candidate(name: str, balancing: str, deep: bool) -> Candidate:
    """Return a candidate in which every loss and every augmentation takes part."""
    losses = sorted(LOSSES)
    weighted = [
        {key: "balanced" for key in ("foreground_weight", "pos_weight") if key in loss_arguments(n)}
        for n in losses
    ]
    augmentations = {name: {"enabled": True, "prob": 1.0} for name in AUGMENTATIONS}
    numbers = list(range(len(losses)))
    return Candidate.model_validate(
        {
            "system": {"training": {"batch_size": 2}},
            "model": {
                "architecture": name,
                "filters": FILTERS,
                "deep_supervision": deep,
                "loss_functions": losses,
                "loss_weights": [1.0] * len(losses),
                "loss_kwargs": weighted,
                "multi_task_config": [
                    [0, 1, "label", numbers[::3]], [1, 2, "boundary", numbers[1::3]],
                    [2, 3, "edt", numbers[2::3]],
                ],
                "loss_balancing": {"strategy": balancing},
            },
            "data": {
                "patch_size": list(SIZE),
                "pad_size": [2, 4, 4],
                "augmentation": {"preset": "some", **augmentations},
            },
            "optimization": {
                "accumulate_grad_batches": 2,
                "gradient_clip_val": 0.5,
                "ema": {"enabled": True, "decay": 0.9, "warmup_steps": 0},
            },
        }
    )  # fmt: skip


def volume() -> Volume:
    """Return a small volume with two instances and a mask."""
    rng = np.random.default_rng(0)
    label = np.zeros((20, 48, 48), np.uint16)
    label[4:9, 5:20, 5:20], label[10:16, 25:40, 20:44] = 1, 2
    mask = np.ones(label.shape, bool)
    mask[:, :3] = False
    return Volume("v", rng.integers(0, 255, label.shape).astype(np.uint8), label, mask)


BALANCINGS = (("none", False), ("uncertainty", True), ("gradnorm", True))
CHEAPEST = "monai_unet"
"""The architecture that takes part in every case; the others in all of them in the soak."""


def cases(chosen: Callable[[str, Any], bool], others: Iterable[Any]) -> list[Any]:
    """Return every architecture with each of the others; what is not chosen is for the soak."""
    return [
        pytest.param(name, *other, marks=() if chosen(name, other) else pytest.mark.slow)
        for name in NAMES
        for other in others
    ]


@pytest.mark.parametrize(
    ("name", "balancing", "deep"),
    # What a loss and its balancing do does not depend on the network.
    cases(lambda name, other: name == CHEAPEST or other == BALANCINGS[0], BALANCINGS),
)
def test_a_step_never_waits_for_the_device(name: str, balancing: str, deep: bool) -> None:
    chosen = candidate(name, balancing, deep)
    source = ResidentVolume(volume(), chosen.data, META, seed=0)
    sampler = PatchSampler([source], patch_size=SIZE, foreground_share=0.5, seed=0)
    trainer = Trainer(chosen, network_of(chosen).to(META), sampler, META, seed=0)
    trainer.clock.start()
    trainer._step()
    assert trainer.step == 1
    assert not trainer.notes
    states = trainer.optimizer.state
    assert len(states) >= len(list(trainer.network.parameters()))
    assert all(parameter.device == META for parameter in trainer.network.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_a_network_in_bf16_is_scored_in_float32(name: str) -> None:
    chosen = candidate(name, "uncertainty", deep=True)
    network = network_of(chosen).to(META).bfloat16()
    heads = network(torch.zeros(2, 1, *SIZE, device=META, dtype=torch.bfloat16))
    assert {head.dtype for head in heads} == {torch.bfloat16}
    targets = torch.zeros(2, 3, *SIZE, device=META)
    result = build_loss(chosen.model).to(META)(
        [head.float() for head in heads], targets, targets[:, :1] > 0
    )
    assert result.total.dtype == torch.float32
    result.total.backward()


@pytest.mark.parametrize(
    ("name", "mode"), cases(lambda name, _: name == CHEAPEST, [("mean",), ("min",), ("max",)])
)
def test_prediction_with_every_transform_never_waits_for_the_device(name: str, mode: str) -> None:
    with META:
        network = build_network(name, filters=FILTERS).eval()
    transforms = distinct_transforms("all", "all")
    assert len({transform.order for transform in transforms}) == 4

    def probabilities(window: Tensor) -> Tensor:
        return activate(network(window), [[0, 2, "sigmoid"], [2, 3, "tanh"]])

    with torch.inference_mode():
        whole = join_transforms(
            probabilities, torch.zeros(1, 1, 32, 32, 32, device=META), transforms, mode
        )
    assert whole.shape == (1, 3, 32, 32, 32)
    assert whole.device == META


@pytest.mark.parametrize("name", NAMES)
def test_the_memory_of_a_step_grows_with_batch_and_patch(name: str) -> None:
    chosen = candidate(name, "none", deep=False)

    def size(batch: int, patch: tuple[int, int, int], **keys: Any) -> int:
        network, loss = network_of(chosen).to(META), build_loss(chosen.model).to(META)
        return training_bytes(network, loss, batch=batch, patch_size=patch, **keys)

    one, two = size(1, SIZE), size(2, SIZE)
    fixed = 16 * sum(p.numel() for p in network_of(chosen).parameters())
    assert two - fixed == pytest.approx(2 * (one - fixed), rel=0.05)
    assert size(1, (16, 32, 64)) - fixed == pytest.approx(2 * (one - fixed), rel=0.05)
    assert size(1, SIZE, averaged=True) - one == fixed // 4
