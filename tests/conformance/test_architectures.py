"""Every architecture of the table keeps the same promises."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hydralv_tune.numerics.networks import registry
from hydralv_tune.numerics.networks.receptive_field import receptive_field
from hydralv_tune.numerics.networks.registry import (
    ARCHITECTURES,
    NO_SUCH_PART,
    Architecture,
    Key,
    build_network,
    check_patch_size,
    divisor,
    ignored_keys,
    own_keys,
    supervised_levels,
)
from hydralv_tune.numerics.networks.weights import parameter_count, trunk_weights

NAMES = sorted(ARCHITECTURES)
FILTERS = (4, 8, 16, 32, 64)
ELSE: dict[str, Any] = {
    "dropout": 0.3,
    "norm": "group",
    "activation": "elu",
    "kernel_size": [1, 3, 3],
    "strides": [[2, 2, 2]] * 4,
    "num_res_units": 1,
    "down_factors": [[2, 2, 2]] * 4,
    "upsample": "nontrainable",
    "mednext_size": "B",
    "mednext_kernel_size": 5,
    "num_groups": 2,
    "depth_2d": 1,
    "kernel_2d": [1, 5, 5],
}
"""A value of each key that is the default of no architecture."""
MATTERS_WITH: dict[str, dict[str, Any]] = {
    "num_groups": {"norm": "group", "out_channels": 4}, "kernel_2d": {"depth_2d": 1},
}  # fmt: skip
"""What else must be set for a key to change the network."""


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def small(name: str, **arguments: Any) -> nn.Module:
    """Return a narrow network of five levels."""
    return build_network(name, **{"filters": FILTERS, **arguments})


def patch_for(name: str, *, batch: int = 1) -> Tensor:
    """Return an image of the smallest patch that leaves the coarsest level several voxels."""
    z, y, x = divisor(name, {"filters": FILTERS})
    return torch.randn(batch, 1, max(z, 2), 2 * y, 2 * x)


@pytest.mark.parametrize("name", NAMES)
def test_logits_have_the_shape_of_the_patch(name: str) -> None:
    network, image = small(name), patch_for(name, batch=2)
    for training in (True, False):
        logits = network.train(training)(image)
        assert isinstance(logits, Tensor)
        assert logits.shape == (2, 3, *image.shape[2:])
        assert logits.dtype == torch.float32
    assert small(name, in_channels=2, out_channels=5)(image.repeat(1, 2, 1, 1, 1)).shape[1] == 5


@pytest.mark.parametrize("name", [n for n in NAMES if ARCHITECTURES[n].deep_supervision])
def test_deep_supervision_gives_a_list_from_fine_to_coarse_in_training_alone(name: str) -> None:
    network, image = small(name, deep_supervision=True), patch_for(name)
    outputs = network(image)
    assert isinstance(outputs, list)
    assert len(outputs) == len(FILTERS)
    said = {"filters": FILTERS, "deep_supervision": True}
    assert supervised_levels(name, said) == len(FILTERS)
    assert supervised_levels(name, {"filters": FILTERS}) == 1
    assert outputs[0].shape[2:] == image.shape[2:]
    for fine, coarse in pairwise(outputs):
        ratio = [f / c for f, c in zip(fine.shape[2:], coarse.shape[2:], strict=True)]
        assert coarse.shape[:2] == (1, 3)
        assert set(ratio) <= {1.0, 2.0}
        assert ratio[1:] == [2.0, 2.0]
    assert isinstance(network.eval()(image), Tensor)


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_gradients_reach_every_parameter(name: str, deep: bool) -> None:
    network = small(name, deep_supervision=deep)
    outputs = network(patch_for(name, batch=2))
    for output in outputs if deep else [outputs]:
        # A plain sum would leave what stands before a normalisation without a gradient.
        output.pow(2).mean().backward(retain_graph=True)
    for key, parameter in network.named_parameters():
        assert parameter.grad is not None, key
        assert torch.isfinite(parameter.grad).all(), key
        if not key.endswith("bias"):  # a bias before a normalisation has none, and needs none
            assert parameter.grad.abs().sum() > 0, key


def trunk_cases() -> list[tuple[str, dict[str, Any]]]:
    """Return every architecture, and again with each number of residual units that changes it."""
    units = [(n, {"num_res_units": 0}) for n in NAMES if "num_res_units" in ARCHITECTURES[n].keys]
    return [*((name, {}) for name in NAMES), *units]


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize(("name", "said"), trunk_cases())
def test_the_trunk_is_no_head_and_every_task_depends_on_it(
    name: str, said: dict[str, Any], deep: bool
) -> None:
    network = small(name, deep_supervision=deep and ARCHITECTURES[name].deep_supervision, **said)
    trunk = trunk_weights(name, network)
    # No width is 3, so a convolution with 3 channels on a side is a head's.
    assert not [tuple(weight.shape) for weight in trunk if 3 in weight.shape[:2]]
    outputs = network(patch_for(name, batch=2))
    logits = outputs[0] if isinstance(outputs, list) else outputs
    for weight in (trunk[0], trunk[-1]):
        assert any(weight is parameter for parameter in network.parameters())
        for channel in range(3):
            loss = logits[:, channel].pow(2).mean()
            (gradient,) = torch.autograd.grad(loss, weight, retain_graph=True)
            assert gradient.abs().sum() > 0
    three = {"filters": [3 * f // 4 for f in FILTERS]}
    assert len(trunk_weights(name, build_network(name, **{**three, **said}))) == len(
        trunk_weights(name, small(name, **said))
    )


@pytest.mark.parametrize("name", NAMES)
def test_evaluation_is_deterministic_and_one_item_knows_nothing_of_another(name: str) -> None:
    has_dropout = "dropout" in ARCHITECTURES[name].keys
    network, image = small(name, dropout=0.5 if has_dropout else None), patch_for(name)
    network.eval()
    with torch.no_grad():
        once = network(image)
        assert torch.equal(once, network(image))
        beside = network(torch.cat([image, 100 * torch.randn_like(image)]))
    assert torch.allclose(beside[:1], once, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_the_seed_determines_the_weights(name: str) -> None:
    torch.manual_seed(3)
    first = small(name).state_dict()
    torch.manual_seed(3)
    second = small(name).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("name", NAMES)
def test_width_changes_the_number_of_parameters(name: str) -> None:
    wider = small(name, filters=tuple(2 * f for f in FILTERS))
    assert parameter_count(wider) > 2 * parameter_count(small(name))


@pytest.mark.parametrize("key", sorted(own_keys()))
@pytest.mark.parametrize("name", NAMES)
def test_each_key_has_an_effect_or_is_refused_with_the_reason(name: str, key: str) -> None:
    assert set(ELSE) == own_keys()
    said = {key: ELSE[key]}
    if key in ARCHITECTURES[name].keys:
        assert not ignored_keys(name, said)
        others = MATTERS_WITH.get(key, {})
        assert repr(small(name, **said, **others)) != repr(small(name, **others))
    else:
        reason = ignored_keys(name, said)[key]
        assert key in reason
        assert ARCHITECTURES[name].refusals.get(key, NO_SUCH_PART) in reason
        with pytest.raises(ValueError, match="has no effect on"):
            small(name, **said)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_said_is_the_architectures_own(name: str) -> None:
    unsaid = dict.fromkeys(own_keys())
    assert repr(small(name, **unsaid)) == repr(small(name))
    assert ignored_keys(name, {**unsaid, "dropout": 0.0, "loss_weights": [1.0]}) == {}


@pytest.mark.parametrize("name", NAMES)
def test_wrong_input_is_refused_with_a_reason(name: str) -> None:
    with pytest.raises(ValueError, match="filters is"):
        small(name, filters=(8,))
    with pytest.raises(ValueError, match="filters is"):
        small(name, filters=(0, 8, 16, 32, 64))
    with pytest.raises(ValueError, match="Unknown key 'depth'"):
        small(name, depth=3)
    with pytest.raises(ValueError, match="out_channels is 0"):
        small(name, out_channels=0)
    network, image = small(name), patch_for(name)
    with pytest.raises(ValueError, match=r"needs multiples of"):
        network(image[..., :-1])
    with pytest.raises(ValueError, match=r"\(B, C, Z, Y, X\)"):
        network(image[0])
    needed = divisor(name, {"filters": FILTERS})
    with pytest.raises(ValueError, match=rf"{name}, which needs multiples of .* Try \("):
        check_patch_size(name, {"filters": FILTERS}, (needed[0], needed[1] + 1, needed[2]))
    check_patch_size(name, {"filters": FILTERS}, image.shape[2:])
    for key in ("norm", "activation", "upsample", "mednext_size"):
        if key in ARCHITECTURES[name].keys:
            with pytest.raises(ValueError, match=f"Unknown {key} 'batsch'. Known: "):
                small(name, **{key: "batsch"})
    for key in ("strides", "down_factors"):
        if key in ARCHITECTURES[name].keys:
            with pytest.raises(ValueError, match=f"{key} has 1 entries, but"):
                small(name, **{key: [[1, 2, 2]]})
            with pytest.raises(ValueError, match=f"{key}.0 is 0, but"):
                small(name, **{key: [0, 2, 2, 2]})
    if "kernel_size" in ARCHITECTURES[name].keys:
        with pytest.raises(ValueError, match="kernels must be odd"):
            small(name, kernel_size=4)


@pytest.mark.parametrize("name", NAMES)
def test_the_smallest_patch_that_passes_the_check_can_be_trained_on(name: str) -> None:
    needed = divisor(name, {"filters": FILTERS})
    with pytest.raises(ValueError, match="single voxel"):
        check_patch_size(name, {"filters": FILTERS}, needed)
    smallest = (needed[0], needed[1], 2 * needed[2])
    check_patch_size(name, {"filters": FILTERS}, smallest)
    assert small(name)(torch.randn(1, 1, *smallest)).shape[2:] == smallest


def test_a_segresnet_keeps_sections_apart_in_its_finest_levels_alone() -> None:
    flat, cubic = [1, 2, 2], [2, 2, 2]
    for count in range(5):
        strides = [flat] * count + [cubic] * (4 - count)
        network = small("monai_segresnet", strides=strides)
        assert [int(side) for side in network.shape_factor()] == [2 ** (4 - count), 16, 16]
    with pytest.raises(ValueError, match=r"takes \[1, 2, 2\] first"):
        small("monai_segresnet", strides=[cubic, flat, cubic, cubic])
    with pytest.raises(ValueError, match="doubles its width"):
        small("monai_segresnet", filters=(4, 8, 12, 16, 20))


DERIVED_BY_HAND: list[Any] = [
    ("rsunet", {}, (73, 424, 424)),
    (
        "rsunet",
        {"filters": [4, 8, 16], "kernel_size": [1, 3, 3], "down_factors": [[1, 3, 3], [2, 2, 2]]},
        (4, 128, 128),
    ),
    ("monai_unet", {}, (37, 203, 203)),
    (
        "monai_unet",
        {"filters": [4, 8, 16], "num_res_units": 0, "strides": [[1, 2, 2], [2, 2, 2]]},
        (13, 19, 19),
    ),
    (
        "monai_unet",
        {"filters": [4, 8, 16], "kernel_size": 5, "num_res_units": 1},
        (25, 45, 45),
    ),
    ("monai_basic_unet3d", {}, (204, 204, 204)),
    pytest.param("mednext", {}, (235, 235, 235), marks=pytest.mark.slow),
]
"""Counted from kernels, strides and padding of each layer on the way through the coarsest level."""


@pytest.mark.parametrize(("name", "said", "field"), DERIVED_BY_HAND)
def test_receptive_field_by_gradient_is_the_one_derived_by_hand(
    name: str, said: dict[str, Any], field: tuple[int, int, int]
) -> None:
    assert receptive_field(name, said) == field


def test_a_network_that_sees_everything_has_no_receptive_field(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Global(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mean((2, 3, 4), keepdim=True) + x.expand(-1, 3, -1, -1, -1)

    monkeypatch.setitem(ARCHITECTURES, "global", Architecture(lambda keys: Global()))
    with pytest.raises(ValueError, match="global sees further than 4096 voxels along z"):
        receptive_field("global", {})


def test_a_registered_architecture_brings_its_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    def whole(keys: Any, key: str) -> int:
        if not 1 <= keys[key] <= 9:
            raise ValueError(f"{key} is {keys[key]}, but must be 1 to 9.")
        return int(keys[key])

    def build(keys: Any) -> nn.Module:
        return nn.Conv3d(keys["in_channels"], 3, 2 * keys["reach"] + 1, padding=keys["reach"])

    monkeypatch.setattr(registry, "ARCHITECTURES", dict(ARCHITECTURES))
    registry.register_architecture("one_layer", Architecture(build, {"reach": Key(2, whole)}))
    assert receptive_field("one_layer", {}) == (5, 5, 5)
    assert receptive_field("one_layer", {"reach": 3}) == (7, 7, 7)
    assert "reach" in own_keys()
    assert ignored_keys("rsunet", {"reach": 3})["reach"].startswith("reach is 3, but it has no")
    with pytest.raises(ValueError, match="reach is 12, but must be 1 to 9"):
        build_network("one_layer", reach=12)
    with pytest.raises(ValueError, match="declares the key filters"):
        registry.register_architecture("bad", Architecture(build, {"filters": Key(1, whole)}))


def bright_blobs(shape: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """Return noise with bright blobs, (1, 1, z, y, x), and where they are."""
    field = F.avg_pool3d(torch.randn(1, 1, *shape), 5, stride=1, padding=2)
    target = (field > field.quantile(0.8)).float()
    return target + 0.3 * torch.randn(1, 1, *shape), target


@pytest.mark.parametrize(
    ("name", "said"),
    [
        pytest.param(
            "mednext", {"mednext_size": "S", "filters": (32, 64, 128, 256, 512)},
            marks=pytest.mark.slow,
        ),
        ("monai_basic_unet3d", {"filters": (8, 16, 32, 64, 128)}),
        ("monai_unet", {"filters": (8, 16, 32)}),
        ("rsunet", {"filters": (8, 16, 32)}),
    ],
)  # fmt: skip
def test_a_few_real_steps_lower_the_loss(name: str, said: dict[str, Any]) -> None:
    image, target = bright_blobs((16, 32, 32))
    network = build_network(name, deep_supervision=True, **said)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2 if name != "mednext" else 2e-3)
    losses = []
    for _ in range(10):
        logits = network(image)[0][:, :1]
        loss = F.binary_cross_entropy_with_logits(logits, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
