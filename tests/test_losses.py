"""Losses by hand-worked values and public references; their sum, balance and depth."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from monai.losses import DiceCELoss, DiceFocalLoss, DiceLoss, FocalLoss, TverskyLoss
from torch import Tensor, nn

from hydralv_tune.numerics.losses import registry
from hydralv_tune.numerics.losses.multi_task import LossTerm, MultiTaskLoss, downsample_targets
from hydralv_tune.numerics.losses.registry import LOSSES, check_loss, loss_arguments, register_loss

SHAPE = (2, 1, 3, 8, 8)
PLAN = (
    LossTerm("label/DiceLoss", "DiceLoss", 2.0, {"sigmoid": True, "smooth_nr": 1e-5}),
    LossTerm("label/BCE", "WeightedBCEWithLogitsLoss", 2.0, {"reduction": "mean"}),
    LossTerm("boundary/Dice", "DiceLoss", 1.0, {}, (1, 2), (1, 2), "boundary"),
    LossTerm(
        "boundary/Tversky",
        "TverskyLoss",
        1.0,
        {"alpha": 0.3, "beta": 0.7},
        (1, 2),
        (1, 2),
        "boundary",
    ),
    LossTerm(
        "edt/SmoothL1", "SmoothL1Loss", 0.5, {"beta": 0.1, "tanh": True}, (2, 3), (2, 3), "edt"
    ),
)
"""The losses, weights and tasks of the plan."""


def batch(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits, a binary target and a full mask of one channel."""
    random = torch.Generator().manual_seed(seed)
    logits = torch.randn(SHAPE, generator=random)
    target = (torch.rand(SHAPE, generator=random) < 0.3).float()
    return logits, target, torch.ones(SHAPE, dtype=torch.bool)


def three(seed: int = 0, heads: int = 1) -> tuple[list[Tensor], Tensor, Tensor]:
    """Return heads of three channels from fine to coarse, their targets and a mask."""
    random = torch.Generator().manual_seed(seed)
    outputs = [
        torch.randn(2, 3, 4, 16 >> k, 16 >> k, generator=random).requires_grad_()
        for k in range(heads)
    ]
    binary = (torch.rand(2, 2, 4, 16, 16, generator=random) < 0.3).float()
    distance = torch.rand(2, 1, 4, 16, 16, generator=random) * 2 - 1
    mask = torch.rand(2, 1, 4, 16, 16, generator=random) < 0.8
    return outputs, torch.cat([binary, distance], 1), mask


class TestHandWorked:
    logits = torch.tensor([0.0, math.log(3), -math.log(3), 0.0]).reshape(1, 1, 1, 2, 2)
    target = torch.tensor([1.0, 1.0, 0.0, 0.0]).reshape(1, 1, 1, 2, 2)
    mask = torch.tensor([True, True, True, False]).reshape(1, 1, 1, 2, 2)
    """Probabilities 1/2, 3/4, 1/4 count; the last voxel does not."""

    def value(self, name: str, **kwargs: object) -> float:
        return float(LOSSES[name](self.logits, self.target, self.mask, **kwargs))

    def test_dice(self) -> None:
        assert self.value("DiceLoss") == pytest.approx(1 - 2 * 1.25 / (1.5 + 2), abs=1e-5)

    def test_tversky_prices_false_negatives_with_beta(self) -> None:
        wanted = 1 - 1.25 / (1.25 + 0.3 * 0.25 + 0.7 * 0.75)
        assert self.value("TverskyLoss", alpha=0.3, beta=0.7) == pytest.approx(wanted, abs=1e-5)

    def test_cross_entropy(self) -> None:
        wanted = -(math.log(1 / 2) + 2 * math.log(3 / 4)) / 3
        assert self.value("BCEWithLogitsLoss") == pytest.approx(wanted)

    def test_pos_weight_multiplies_the_positive_term_alone(self) -> None:
        wanted = -(4 * math.log(1 / 2) + 4 * math.log(3 / 4) + math.log(3 / 4)) / 3
        assert self.value("WeightedBCEWithLogitsLoss", pos_weight=4) == pytest.approx(wanted)

    def test_balanced_pos_weight_is_negatives_per_positive_inside_the_mask(self) -> None:
        assert self.value("BCEWithLogitsLoss", pos_weight="balanced") == pytest.approx(
            self.value("BCEWithLogitsLoss", pos_weight=0.5)
        )

    def test_foreground_weight_is_a_weighted_mean(self) -> None:
        wanted = -(3 * math.log(1 / 2) + 3 * math.log(3 / 4) + math.log(3 / 4)) / 7
        assert self.value("BCEWithLogitsLoss", foreground_weight=3) == pytest.approx(wanted)

    def test_balanced_foreground_is_the_mean_of_both_sides(self) -> None:
        inside = -(math.log(1 / 2) + math.log(3 / 4)) / 2
        wanted = (inside - math.log(3 / 4)) / 2
        found = self.value("BCEWithLogitsLoss", foreground_weight="balanced")
        assert found == pytest.approx(wanted)

    def test_focal_alpha_of_a_quarter_weights_foreground_three_times_less(self) -> None:
        hit, miss = torch.full((1, 1, 1, 1, 1), -2.0), torch.full((1, 1, 1, 1, 1), 2.0)
        one = torch.ones(1, 1, 1, 1, 1)
        foreground = LOSSES["FocalLoss"](hit, one, one.bool(), alpha=0.25)
        background = LOSSES["FocalLoss"](miss, 0 * one, one.bool(), alpha=0.25)
        assert background.item() == pytest.approx(3 * foreground.item())

    def test_smooth_l1_squashes_first_and_is_squared_below_beta(self) -> None:
        logits = torch.tensor([0.0, math.atanh(0.5)]).reshape(1, 1, 1, 1, 2)
        target = torch.tensor([0.05, -0.5]).reshape(1, 1, 1, 1, 2)
        loss = LOSSES["SmoothL1Loss"](
            logits, target, torch.ones_like(target, dtype=torch.bool), tanh=True, beta=0.1
        )
        assert loss.item() == pytest.approx((0.05**2 / 0.2 + (1 - 0.05)) / 2)

    def test_squared_and_absolute_distance(self) -> None:
        logits, target, mask = torch.tensor([[[[[0.5, 3.0]]]]]), torch.zeros(1, 1, 1, 1, 2), None
        mask = torch.ones_like(target, dtype=torch.bool)
        assert LOSSES["MSELoss"](logits, target, mask).item() == pytest.approx((0.25 + 9) / 2)
        assert LOSSES["L1Loss"](logits, target, mask).item() == pytest.approx(1.75)


class TestAgainstPublicReferences:
    @pytest.mark.parametrize(
        ("name", "reference"),
        [
            ("DiceLoss", DiceLoss(sigmoid=True)),
            ("DiceCELoss", DiceCELoss(sigmoid=True)),
            ("DiceFocalLoss", DiceFocalLoss(sigmoid=True, gamma=2.0)),
            ("TverskyLoss", TverskyLoss(sigmoid=True)),
            ("FocalLoss", FocalLoss(gamma=2.0)),
            ("BCEWithLogitsLoss", nn.BCEWithLogitsLoss()),
            ("WeightedBCEWithLogitsLoss", nn.BCEWithLogitsLoss()),
            ("SmoothL1Loss", nn.SmoothL1Loss()),
            ("MSELoss", nn.MSELoss()),
            ("WeightedMSELoss", nn.MSELoss()),
            ("L1Loss", nn.L1Loss()),
            ("WeightedMAELoss", nn.L1Loss()),
        ],
    )
    def test_a_full_mask_gives_the_public_value(self, name: str, reference: nn.Module) -> None:
        logits, target, mask = batch()
        wanted = reference(logits, target).item()
        assert LOSSES[name](logits, target, mask).item() == pytest.approx(wanted, rel=1e-5)

    def test_the_table_above_is_whole(self) -> None:
        (mark,) = (m for m in self.test_a_full_mask_gives_the_public_value.pytestmark)
        assert {entry[0] for entry in mark.args[1]} == set(LOSSES)

    def test_a_masked_voxel_is_no_probability_of_one_half(self) -> None:
        # MONAI's own masked loss multiplies logits with the mask, and sigmoid(0) is one half.
        logits, target = torch.full(SHAPE, 20.0), torch.ones(SHAPE)
        mask = torch.zeros(SHAPE, dtype=torch.bool)
        mask[..., :1] = True
        assert LOSSES["DiceLoss"](logits, target, mask).item() < 1e-5


class TestArguments:
    @pytest.mark.parametrize(
        ("name", "kwargs", "message"),
        [
            ("DiceLos", {}, "Unknown loss 'DiceLos'. Known: .*DiceLoss"),
            ("DiceLoss", {"smooth_dr": 0.0}, "smooth_dr is 0.0, but must be above 0"),
            ("TverskyLoss", {"alpha": -0.1}, "must not be negative"),
            ("TverskyLoss", {"alpha": 0, "beta": 0}, "nor both 0"),
            ("FocalLoss", {"alpha": 1.5}, "between 0 and 1"),
            ("FocalLoss", {"gamma": -1}, "gamma is -1"),
            ("SmoothL1Loss", {"beta": -1}, "beta is -1"),
            ("BCEWithLogitsLoss", {"pos_weight": 0}, "pos_weight is 0"),
            ("BCEWithLogitsLoss", {"pos_weight": "much"}, "'much', but must be .* 'balanced'"),
            ("MSELoss", {"foreground_weight": True}, "foreground_weight is True"),
            ("DiceCELoss", {"sigmoid": False}, "it takes logits"),
            ("TverskyLoss", {"alpha": "high"}, "TverskyLoss: "),
            ("DiceLoss", {"batch": 1}, "DiceLoss: batch is 1, but must be true or false"),
            ("DiceLoss", {"smooth_nr": math.nan}, "smooth_nr is nan, but must be a finite number"),
        ],
    )
    def test_wrong_ones_are_refused(
        self, name: str, kwargs: dict[str, object], message: str
    ) -> None:
        with pytest.raises(ValueError, match=message):
            check_loss(name, kwargs)

    def test_a_registered_function_is_checked_by_its_signature_and_by_running_it(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def squared(logits: Tensor, target: Tensor, mask: Tensor, *, power: float = 2.0) -> Tensor:
            if power < 1:
                raise ValueError(f"power is {power}, but must be at least 1.")
            return ((logits - target).abs() ** power * mask).mean()

        monkeypatch.setattr(registry, "LOSSES", dict(LOSSES))
        register_loss("Squared", squared)
        assert loss_arguments("Squared") == {"power": 2.0}
        check_loss("Squared", {"power": 3})
        with pytest.raises(ValueError, match=r"Squared: power is 0\.5, but must be at least 1"):
            check_loss("Squared", {"power": 0.5})
        with pytest.raises(ValueError, match=r"Squared: .*str"):
            check_loss("Squared", {"power": "high"})
        with pytest.raises(ValueError, match="its argument power has no default"):
            register_loss("Bare", lambda logits, target, mask, *, power: logits.sum())

    def test_those_of_the_plan_are_known(self) -> None:
        assert {"sigmoid", "smooth_nr", "smooth_dr"} <= set(loss_arguments("DiceLoss"))
        assert {"alpha", "beta", "sigmoid"} <= set(loss_arguments("TverskyLoss"))
        assert {"alpha", "gamma"} <= set(loss_arguments("FocalLoss"))
        assert {"beta", "tanh", "reduction"} <= set(loss_arguments("SmoothL1Loss"))


class TestSum:
    def test_it_is_the_weighted_sum_of_its_parts(self) -> None:
        (output,), targets, mask = three()
        result = MultiTaskLoss(PLAN)(output, targets, mask)
        wanted = sum(term.weight * result.parts[term.name].item() for term in PLAN)
        assert result.total.item() == pytest.approx(wanted, rel=1e-6)
        assert set(result.parts) == {term.name for term in PLAN}

    def test_each_term_scores_its_own_channels(self) -> None:
        (output,), targets, mask = three()
        result = MultiTaskLoss(PLAN)(output, targets, mask)
        alone = LOSSES["TverskyLoss"](output[:, 1:2], targets[:, 1:2], mask, alpha=0.3, beta=0.7)
        assert result.parts["boundary/Tversky"].item() == pytest.approx(alone.item())

    def test_tasks_are_means_weighted_by_their_terms(self) -> None:
        (output,), targets, mask = three()
        result = MultiTaskLoss(PLAN)(output, targets, mask)
        parts = result.parts
        assert list(result.tasks) == ["label", "boundary", "edt"]
        label = (2 * parts["label/DiceLoss"] + 2 * parts["label/BCE"]) / 4
        assert result.tasks["label"].item() == pytest.approx(label.item())
        assert result.tasks["edt"].item() == pytest.approx(parts["edt/SmoothL1"].item())

    def test_parts_and_tasks_carry_no_graph(self) -> None:
        (output,), targets, mask = three()
        result = MultiTaskLoss(PLAN, balancing="uncertainty")(output, targets, mask)
        assert result.total.requires_grad
        for value in (*result.parts.values(), *result.tasks.values()):
            assert not value.requires_grad

    def test_a_mask_without_channel_axis_is_the_same(self) -> None:
        (output,), targets, mask = three()
        loss = MultiTaskLoss(PLAN)
        assert torch.equal(
            loss(output, targets, mask).total, loss(output, targets, mask[:, 0]).total
        )

    def test_tasks_do_not_depend_on_balance_or_depth(self) -> None:
        outputs, targets, mask = three(heads=3)
        plain = MultiTaskLoss(PLAN)(outputs[0], targets, mask)
        for balancing in ("none", "uncertainty", "gradnorm"):
            deep = MultiTaskLoss(PLAN, balancing=balancing)(outputs, targets, mask)
            assert {k: v.item() for k, v in deep.tasks.items()} == {
                k: v.item() for k, v in plain.tasks.items()
            }

    @pytest.mark.parametrize("balancing", ["none", "uncertainty", "gradnorm"])
    def test_the_host_never_asks_the_device(self, balancing: str) -> None:
        loss = MultiTaskLoss(PLAN, balancing=balancing).to("meta")
        shared = torch.zeros(3, 3, 1, 1, 1, device="meta", requires_grad=True)
        output = F.conv3d(torch.zeros(2, 3, 4, 16, 16, device="meta"), shared)
        heads = [output, F.avg_pool3d(output, (1, 2, 2))]
        targets = torch.zeros(2, 3, 4, 16, 16, device="meta")
        result = loss(heads, targets, targets[:, :1].bool())
        loss.rebalance(shared)
        result.total.backward()
        assert shared.grad is not None

    @pytest.mark.parametrize(
        ("terms", "message"),
        [
            ([], "at least one term"),
            ([PLAN[0], PLAN[0]], "Two loss terms"),
            ([LossTerm("a", "DiceLoss", 0.0)], "All loss weights are 0"),
            ([PLAN[0], LossTerm("a", "DiceLoss", -1.0)], "weight is -1"),
            ([LossTerm("a", "DiceLoss", pred_slice=(0, 2))], "same number of channels"),
            ([LossTerm("a", "DiceLoss", pred_slice=(1, 1), target_slice=(1, 1))], "at least one"),
            ([LossTerm("a", "Dice")], "Unknown loss 'Dice'"),
        ],
        ids=["none", "doubled", "zero", "negative", "widths", "empty", "unknown"],
    )
    def test_terms_that_cannot_be_scored_are_refused(
        self, terms: list[LossTerm], message: str
    ) -> None:
        with pytest.raises(ValueError, match=message):
            MultiTaskLoss(terms)

    def test_channels_that_are_not_there_are_named(self) -> None:
        loss = MultiTaskLoss([LossTerm("far", "DiceLoss", 1.0, {}, (3, 4), (2, 3))])
        (output,), targets, mask = three()
        with pytest.raises(ValueError, match="'far' wants channels 3:4 of 3 outputs"):
            loss(output, targets, mask)


class TestDeepSupervision:
    def test_heads_weigh_one_a_half_a_quarter_from_fine_to_coarse(self) -> None:
        outputs, targets, mask = three(heads=3)
        loss = MultiTaskLoss(PLAN)
        total = loss(outputs, targets, mask).total.item()
        wanted = 0.0
        for depth, head in enumerate(outputs):
            coarse, valid = downsample_targets(targets, mask, head.shape[2:])
            wanted += 0.5**depth * loss(head, coarse, valid).total.item()
        assert total == pytest.approx(wanted, rel=1e-5)

    def test_given_weights_are_used_in_that_order(self) -> None:
        outputs, targets, mask = three(heads=2)
        first = MultiTaskLoss(PLAN, deep_supervision_weights=[1.0, 0.0])
        assert first(outputs, targets, mask).total.item() == pytest.approx(
            MultiTaskLoss(PLAN)(outputs[0], targets, mask).total.item()
        )

    def test_every_head_gets_a_gradient(self) -> None:
        outputs, targets, mask = three(heads=3)
        MultiTaskLoss(PLAN)(outputs, targets, mask).total.backward()
        sizes = [head.grad.abs().sum().item() for head in outputs if head.grad is not None]
        assert len(sizes) == 3
        assert min(sizes) > 0

    def test_too_few_weights_are_refused(self) -> None:
        outputs, targets, mask = three(heads=3)
        loss = MultiTaskLoss(PLAN, deep_supervision_weights=[1.0, 0.5])
        with pytest.raises(ValueError, match="2 values for 3 heads"):
            loss(outputs, targets, mask)

    @pytest.mark.parametrize("weights", [[], [0.0, 1.0], [1.0, -0.5]], ids=str)
    def test_weights_without_sense_are_refused(self, weights: list[float]) -> None:
        with pytest.raises(ValueError, match="deep_supervision_weights"):
            MultiTaskLoss(PLAN, deep_supervision_weights=weights)

    def test_coarse_targets_keep_the_amount_of_each_class(self) -> None:
        _, targets, _ = three()
        mask = torch.ones(2, 1, 4, 16, 16, dtype=torch.bool)
        coarse, valid = downsample_targets(targets, mask, (4, 4, 4))
        assert valid.all()
        torch.testing.assert_close(coarse.mean((2, 3, 4)), targets.mean((2, 3, 4)))

    def test_a_thin_boundary_neither_vanishes_nor_takes_all(self) -> None:
        targets = torch.zeros(1, 1, 1, 16, 16)
        targets[..., 3] = 1
        coarse, _ = downsample_targets(targets, torch.ones_like(targets).bool(), (1, 4, 4))
        assert coarse[0, 0, 0, 0].tolist() == [0.25, 0, 0, 0]

    def test_masked_voxels_have_no_part_in_coarse_targets(self) -> None:
        targets = torch.zeros(1, 1, 1, 2, 4)
        mask = torch.ones(1, 1, 1, 2, 4, dtype=torch.bool)
        targets[..., 0], mask[..., 0] = 1, False
        mask[..., 1, 3] = False
        mask[..., 1, 1] = False
        coarse, valid = downsample_targets(targets, mask, (1, 1, 2))
        assert coarse.flatten().tolist() == [0, 0]
        assert valid.flatten().tolist() == [False, True]

    def test_a_head_finer_than_the_targets_is_refused(self) -> None:
        with pytest.raises(ValueError, match="larger than the targets"):
            downsample_targets(
                torch.zeros(1, 1, 2, 2, 2), torch.ones(1, 1, 2, 2, 2).bool(), (2, 4, 2)
            )


class TestUncertainty:
    def test_it_starts_at_half_the_sum_as_the_public_tool_writes_it(self) -> None:
        # The plan's total of 0.555 is 0.5 * (0.660 + 0.449 + 0.002): it never learned.
        loss = MultiTaskLoss(PLAN, balancing="uncertainty")
        total = loss.balance(torch.tensor([0.660, 0.449, 0.002]))
        assert total.item() == pytest.approx(0.5555)

    def test_it_learns_the_weights_that_the_theory_wants(self) -> None:
        # exp(-s) L / 2 + s / 2 is smallest at s = log L: the weight is 1 / (2 L).
        loss = MultiTaskLoss(PLAN, balancing="uncertainty")
        losses = torch.tensor([2.0, 0.5, 0.1])
        optimizer = torch.optim.Adam(loss.parameters(), lr=0.05)
        for _ in range(600):
            optimizer.zero_grad()
            loss.balance(losses).backward()
            optimizer.step()
        weights = torch.stack(list(loss.task_weights().values()))
        torch.testing.assert_close(weights, 0.5 / losses, rtol=0.02, atol=0)

    def test_a_loss_of_zero_cannot_drive_its_weight_without_bound(self) -> None:
        loss = MultiTaskLoss(PLAN, balancing="uncertainty", balancing_kwargs={"limit": 3.0})
        optimizer = torch.optim.SGD(loss.parameters(), lr=50.0)
        for _ in range(50):
            optimizer.zero_grad()
            loss.balance(torch.tensor([0.0, 1e4, 1.0])).backward()
            optimizer.step()
        weights = loss.task_weights()
        assert all(v.isfinite() for v in weights.values())
        assert weights["label"] <= 0.5 * math.exp(3.0) + 1e-3

    def test_what_it_learned_is_in_its_state(self) -> None:
        loss = MultiTaskLoss(PLAN, balancing="uncertainty")
        nn.init.constant_(loss.balance.raw_log_variance, 0.7)  # type: ignore[arg-type]
        other = MultiTaskLoss(PLAN, balancing="uncertainty")
        other.load_state_dict(loss.state_dict())
        assert other.task_weights() == loss.task_weights()
        assert len(list(loss.parameters())) == 1


class TestGradNorm:
    def descend(self, alpha: float, steps: int = 300) -> tuple[MultiTaskLoss, list[float]]:
        """Train one shared parameter on three tasks of very different gradients."""
        loss = MultiTaskLoss(PLAN, balancing="gradnorm", balancing_kwargs={"alpha": alpha})
        shared = torch.tensor([1.0], requires_grad=True)
        scales = torch.tensor([1.0, 2.0, 0.5])
        for _ in range(steps):
            losses = scales * (shared - 3.0) ** 2
            loss.balance(losses)
            loss.rebalance(shared)
        norms = [
            scale * weight
            for scale, weight in zip([1.0, 2.0, 0.5], loss.task_weights().values(), strict=True)
        ]
        return loss, [float(norm) for norm in norms]

    def test_gradients_of_all_tasks_become_equal_at_alpha_zero(self) -> None:
        loss, norms = self.descend(alpha=0.0)
        assert max(norms) / min(norms) < 1.2
        assert sum(loss.task_weights().values()) == pytest.approx(3.0)

    def test_a_task_that_lags_is_pulled_up(self) -> None:
        loss = MultiTaskLoss(PLAN, balancing="gradnorm", balancing_kwargs={"alpha": 1.5})
        shared = torch.tensor([1.0], requires_grad=True)
        loss.balance(torch.ones(3) * shared**2)
        loss.rebalance(shared)
        for _ in range(20):
            progress = torch.tensor([1.0, 0.2, 0.2])
            # Equal gradients, unequal progress: the first task has not moved.
            losses = shared - shared.detach() + progress
            loss.balance(losses)
            loss.rebalance(shared)
        weights = loss.task_weights()
        assert weights["label"] > 1.2 > weights["boundary"]

    def test_it_leaves_the_graph_for_the_backward_pass(self) -> None:
        (output,), targets, mask = three()
        loss = MultiTaskLoss(PLAN, balancing="gradnorm")
        shared = torch.nn.Parameter(torch.eye(3).reshape(3, 3, 1, 1, 1))
        result = loss(F.conv3d(output, shared), targets, mask)
        loss.rebalance(shared)
        result.total.backward()
        assert shared.grad is not None
        assert loss.task_weights()["label"] != 1.0

    def test_it_goes_on_from_its_state(self) -> None:
        loss, _ = self.descend(alpha=1.0, steps=10)
        other = MultiTaskLoss(PLAN, balancing="gradnorm")
        other.load_state_dict(loss.state_dict())
        assert other.task_weights() == loss.task_weights()
        assert not list(loss.parameters())

    def test_without_a_forward_pass_it_says_so(self) -> None:
        with pytest.raises(ValueError, match="needs a forward pass"):
            MultiTaskLoss(PLAN, balancing="gradnorm").rebalance(torch.zeros(1, requires_grad=True))

    def test_a_parameter_that_a_task_does_not_use_is_refused(self) -> None:
        (output,), targets, mask = three()
        loss = MultiTaskLoss(PLAN, balancing="gradnorm")
        loss(output, targets, mask)
        with pytest.raises(ValueError, match="does not depend"):
            loss.rebalance(torch.zeros(1, requires_grad=True))


class TestBalancing:
    def test_null_means_none_and_adds_up(self) -> None:
        loss = MultiTaskLoss(PLAN, balancing=None)
        assert loss.balance(torch.tensor([1.0, 2.0, 3.0])).item() == 6
        assert not loss.state_dict()

    def test_an_unknown_strategy_or_argument_is_refused(self) -> None:
        with pytest.raises(
            ValueError, match=r"Unknown loss balancing 'gradnrom'\. Known: gradnorm"
        ):
            MultiTaskLoss(PLAN, balancing="gradnrom")
        with pytest.raises(ValueError, match=r"'uncertainty': .*'alpha'"):
            MultiTaskLoss(PLAN, balancing="uncertainty", balancing_kwargs={"alpha": 1})

    @pytest.mark.parametrize(
        ("balancing", "kwargs"),
        [("uncertainty", {"limit": 0}), ("gradnorm", {"alpha": -1}), ("gradnorm", {"smallest": 2})],
        ids=str,
    )
    def test_values_out_of_range_are_refused(
        self, balancing: str, kwargs: dict[str, float]
    ) -> None:
        with pytest.raises(ValueError, match=next(iter(kwargs))):
            MultiTaskLoss(PLAN, balancing=balancing, balancing_kwargs=kwargs)

    @pytest.mark.parametrize("balancing", ["none", "uncertainty", "gradnorm"])
    def test_a_task_of_weight_0_has_no_part_in_the_balance(self, balancing: str) -> None:
        # Two tasks with and without a dead third: the same total, the same weights, all the way.
        dead = tuple(
            LossTerm(**{**vars(term), "weight": 0.0 if term.task == "label" else term.weight})
            for term in PLAN
        )
        alive = tuple(term for term in dead if term.task != "label")
        totals: list[list[float]] = []
        for terms in (dead, alive):
            torch.manual_seed(0)
            loss = MultiTaskLoss(terms, balancing=balancing)
            shared = torch.nn.Parameter(torch.eye(3).reshape(3, 3, 1, 1, 1))
            optimizer = torch.optim.SGD([shared, *loss.parameters()], lr=0.1)
            totals.append([])
            for step in range(30):
                (output,), targets, mask = three(step)
                optimizer.zero_grad()
                result = loss(F.conv3d(output.detach(), shared), targets, mask)
                loss.rebalance(shared)
                result.total.backward()
                optimizer.step()
                totals[-1].append(result.total.item())
            assert set(loss.task_weights()) == {"boundary", "edt"}
            if balancing == "gradnorm":
                assert sum(loss.task_weights().values()) == pytest.approx(2.0)
        assert totals[0] == totals[1]
        assert set(result.tasks) == {"boundary", "edt"}
        assert set(MultiTaskLoss(dead)(output, targets, mask).tasks) == {"label", "boundary", "edt"}

    @pytest.mark.parametrize("balancing", ["none", "uncertainty", "gradnorm"])
    def test_a_small_network_learns_under_it(self, balancing: str) -> None:
        torch.manual_seed(0)
        image = torch.randn(1, 1, 4, 16, 16)
        binary = (image > 0.8).float()
        targets = torch.cat([binary, (image.abs() > 1.5).float(), binary * 2 - 1], 1)
        network = nn.Sequential(nn.Conv3d(1, 8, 1), nn.ReLU(), nn.Conv3d(8, 8, 1), nn.ReLU())
        head = nn.Conv3d(8, 3, 1)
        loss = MultiTaskLoss(PLAN, balancing=balancing)
        parameters = [*network.parameters(), *head.parameters(), *loss.parameters()]
        optimizer = torch.optim.Adam(parameters, lr=0.02)
        history = []
        for _ in range(120):
            optimizer.zero_grad()
            result = loss(head(network(image)), targets, torch.ones(1, 4, 16, 16).bool())
            loss.rebalance(network[2].weight)  # type: ignore[arg-type]
            result.total.backward()
            optimizer.step()
            history.append(sum(value.item() for value in result.tasks.values()))
        assert history[-1] < 0.35 * history[0]
        assert all(math.isfinite(value) for value in history)


def test_default_head_weights_halve() -> None:
    weights = MultiTaskLoss(PLAN)._head_weights(4)
    assert all(coarse == fine / 2 for fine, coarse in pairwise(weights))
