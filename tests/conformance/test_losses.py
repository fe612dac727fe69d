"""Every loss of the table: what a trainer relies on, for each entry and each future one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hydralv_tune.numerics.losses.registry import LOSSES, check_loss, loss_arguments

SHAPE = (2, 1, 4, 8, 8)
TANH = {"SmoothL1Loss", "MSELoss", "WeightedMSELoss", "L1Loss", "WeightedMAELoss"}


@pytest.fixture(params=sorted(LOSSES))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def batch(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits that want a gradient, a binary target and a mask of about two thirds."""
    random = torch.Generator().manual_seed(seed)
    logits = torch.randn(SHAPE, generator=random, requires_grad=True)
    target = (torch.rand(SHAPE, generator=random) < 0.3).float()
    mask = torch.rand(SHAPE, generator=random) < 0.7
    return logits, target, mask


def bounded(name: str) -> dict[str, Any]:
    """Return arguments with which a perfect prediction scores 0."""
    return {"tanh": True} if name in TANH else {}


def test_it_is_a_positive_scalar_with_a_gradient(name: str) -> None:
    logits, target, mask = batch()
    loss = LOSSES[name](logits, target, mask)
    assert loss.shape == ()
    assert loss.dtype == torch.float32
    assert loss > 0
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient.isfinite().all()
    assert gradient.abs().sum() > 0


def test_what_lies_outside_the_mask_has_no_influence(name: str) -> None:
    logits, target, mask = batch()
    with torch.no_grad():
        other = torch.where(mask, logits, 9.0 * torch.randn(SHAPE)).requires_grad_()
    another_target = torch.where(mask, target, 1.0 - target)
    loss = LOSSES[name](logits, target, mask)
    same = LOSSES[name](other, another_target, mask)
    assert loss.item() == pytest.approx(same.item(), rel=1e-6)
    (gradient,) = torch.autograd.grad(same, other)
    assert (gradient[~mask] == 0).all()


def test_a_mask_that_excludes_half_equals_the_other_half_alone(name: str) -> None:
    logits, target, _ = batch()
    mask = torch.zeros(SHAPE, dtype=torch.bool)
    mask[..., :4] = True
    alone = LOSSES[name](logits[..., :4], target[..., :4], mask[..., :4])
    assert LOSSES[name](logits, target, mask).item() == pytest.approx(alone.item(), rel=1e-5)


@pytest.mark.parametrize("empty", ["batch", "sample"])
def test_an_empty_mask_gives_no_nan(name: str, empty: str) -> None:
    logits, target, mask = batch()
    mask[:1] = False
    if empty == "batch":
        mask[:] = False
    loss = LOSSES[name](logits, target, mask)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient.isfinite().all()
    assert loss.item() == 0 if empty == "batch" else loss.item() > 0


def test_a_sample_without_mask_does_not_dilute_the_mean(name: str) -> None:
    logits, target, mask = batch()
    mask[0] = False
    alone = LOSSES[name](logits[1:], target[1:], mask[1:])
    assert LOSSES[name](logits, target, mask).item() == pytest.approx(alone.item(), rel=1e-5)


@pytest.mark.parametrize("filled", [0.0, 1.0])
def test_a_target_of_one_class_alone_gives_no_nan(name: str, filled: float) -> None:
    logits, target, mask = batch()
    loss = LOSSES[name](logits, torch.full_like(target, filled), mask)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss.isfinite()
    assert gradient.isfinite().all()


def test_extreme_logits_give_no_nan(name: str) -> None:
    _, target, mask = batch()
    for size in (1e4, -1e4):
        logits = torch.full(SHAPE, size, requires_grad=True)
        loss = LOSSES[name](logits, target, mask, **bounded(name))
        (gradient,) = torch.autograd.grad(loss, logits)
        assert loss.isfinite()
        assert gradient.isfinite().all()


def test_a_perfect_prediction_scores_almost_nothing_and_the_inverse_much(name: str) -> None:
    _, target, mask = batch()
    sign = target * 2 - 1
    truth = sign if name in TANH else target
    right = LOSSES[name](20.0 * sign, truth, mask, **bounded(name))
    wrong = LOSSES[name](-20.0 * sign, truth, mask, **bounded(name))
    assert right.item() < 1e-3
    assert wrong.item() > 0.5


def test_descending_its_gradient_lowers_it(name: str) -> None:
    logits, target, mask = batch()
    weights = logits.detach().clone().requires_grad_()
    optimizer = torch.optim.Adam([weights], lr=0.1)
    first = LOSSES[name](weights, target, mask).item()
    for _ in range(30):
        optimizer.zero_grad()
        LOSSES[name](weights, target, mask).backward()
        optimizer.step()
    assert LOSSES[name](weights, target, mask).item() < 0.7 * first


def test_the_same_input_gives_the_same_value_and_stays_as_it_was(name: str) -> None:
    logits, target, mask = batch()
    before = [tensor.clone() for tensor in (logits.detach(), target, mask)]
    first, second = (LOSSES[name](logits, target, mask) for _ in range(2))
    assert first.item() == second.item()
    for kept, tensor in zip(before, (logits.detach(), target, mask), strict=True):
        assert torch.equal(kept, tensor)


def test_bf16_logits_are_summed_in_float32(name: str) -> None:
    logits, target, mask = batch()
    half = logits.detach().bfloat16()
    loss = LOSSES[name](half, target, mask)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(LOSSES[name](half.float(), target, mask).item())


def test_several_channels_share_one_mask(name: str) -> None:
    logits, target, mask = batch()
    twice = LOSSES[name](logits.repeat(1, 2, 1, 1, 1), target.repeat(1, 2, 1, 1, 1), mask)
    assert twice.item() == pytest.approx(LOSSES[name](logits, target, mask).item(), rel=1e-5)


def test_the_sum_is_a_multiple_of_the_mean(name: str) -> None:
    logits, target, mask = batch()
    mask[:] = True
    mean = LOSSES[name](logits, target, mask).item()
    total = LOSSES[name](logits, target, mask, reduction="sum").item()
    assert total > mean
    if "Dice" not in name or name == "DiceLoss":
        counted = 2 if name in {"DiceLoss", "TverskyLoss"} else mask.sum().item()
        assert total == pytest.approx(counted * mean, rel=1e-4)


def test_the_host_never_asks_the_device(name: str) -> None:
    # Tensors on "meta" hold no values, so whatever would wait for one raises.
    logits = torch.zeros(SHAPE, device="meta", requires_grad=True)
    target = torch.zeros(SHAPE, device="meta")
    weights = {"pos_weight", "foreground_weight"} & set(loss_arguments(name))
    kwargs = dict.fromkeys(weights, "balanced")
    LOSSES[name](logits, target, target.bool(), **kwargs).backward()
    assert logits.grad is not None


def test_its_arguments_are_known_with_defaults_that_work(name: str) -> None:
    arguments = loss_arguments(name)
    assert arguments["reduction"] == "mean"
    check_loss(name, arguments)
    logits, target, mask = batch()
    explicit = LOSSES[name](logits, target, mask, **arguments)
    assert explicit.item() == LOSSES[name](logits, target, mask).item()


def test_an_unknown_argument_is_refused_by_name(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} takes no argument 'alhpa'. Known: .*reduction"):
        check_loss(name, {"alhpa": 0.3})


def test_a_reduction_that_gives_no_scalar_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="reduction is 'none'"):
        check_loss(name, {"reduction": "none"})


def test_shapes_that_do_not_fit_are_refused(name: str) -> None:
    logits, target, mask = batch()
    with pytest.raises(ValueError, match="must be equal"):
        LOSSES[name](logits, target[..., 1:], mask)
    with pytest.raises(ValueError, match="mask of shape"):
        LOSSES[name](logits, target, mask[:, 0])


def test_foreground_counts_more_with_a_foreground_weight(name: str) -> None:
    if "foreground_weight" not in loss_arguments(name):
        # An overlap has foreground alone in it: Tversky's beta is its weight.
        assert name in {"DiceLoss", "TverskyLoss"}
        return
    logits, target, mask = batch()
    # Background is right and foreground is missed, everywhere.
    missed = torch.full_like(target, 0.0 if name in TANH else -3.0)
    plain = LOSSES[name](missed, target, mask).item()
    assert LOSSES[name](missed, target, mask, foreground_weight=5.0).item() > 1.2 * plain
    assert LOSSES[name](logits, target, mask, foreground_weight=1.0).item() == pytest.approx(
        LOSSES[name](logits, target, mask).item(), rel=1e-5
    )


@pytest.mark.parametrize("name", [n for n in sorted(LOSSES) if "batch" in loss_arguments(n)])
@pytest.mark.parametrize("channels", [1, 2])
def test_one_overlap_over_the_batch_is_that_of_its_samples_side_by_side(
    name: str, channels: int
) -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, channels, 2, 4, 4)
    target = (torch.rand(logits.shape) > 0.5).float()
    mask = torch.ones(2, 1, 2, 4, 4, dtype=torch.bool)
    mask[1] = False  # an empty sample changes nothing
    mask[0, 0, 0] = False
    check_loss(name, {"batch": True})
    loss = LOSSES[name](logits, target, mask, batch=True)
    assert loss.ndim == 0
    beside = (torch.cat(list(t[:, None]), dim=2) for t in (logits, target, mask))
    torch.testing.assert_close(loss, LOSSES[name](*beside))
