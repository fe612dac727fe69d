"""Every architecture of the table keeps the same promises."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hydralv_tune.numerics.networks.registry import (
    ARCHITECTURES,
    OWN_KEYS,
    build_network,
    check_patch_size,
    divisor,
    ignored_keys,
    parameter_count,
    receptive_field,
    trunk_weights,
)

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
WITH = {"num_groups": {"norm": "group"}, "kernel_2d": {"depth_2d": 1}}
"""What a key needs beside it to have an effect."""


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
    units = [
        (n, {"num_res_units": 0}) for n in NAMES if "num_res_units" in ARCHITECTURES[n].arguments
    ]
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
    network, image = small(name, dropout=0.5 if name != "mednext" else None), patch_for(name)
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


@pytest.mark.parametrize("key", sorted(OWN_KEYS))
@pytest.mark.parametrize("name", NAMES)
def test_each_key_has_an_effect_or_is_refused_with_the_reason(name: str, key: str) -> None:
    assert set(ELSE) == OWN_KEYS
    said = {key: ELSE[key]}
    if key in ARCHITECTURES[name].arguments:
        beside = WITH.get(key, {})
        assert not ignored_keys(name, said)
        assert repr(small(name, **said, **beside)) != repr(small(name, **beside))
    else:
        reason = ignored_keys(name, said)[key]
        assert key in reason
        assert ARCHITECTURES[name].refusals[key] in reason
        with pytest.raises(ValueError, match="has no effect on"):
            small(name, **said)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_said_is_the_architectures_own(name: str) -> None:
    unsaid = dict.fromkeys(OWN_KEYS)
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
        if key in ARCHITECTURES[name].arguments:
            with pytest.raises(ValueError, match=f"Unknown {key} 'batsch'. Known: "):
                small(name, **{key: "batsch"})
    for key in ("strides", "down_factors"):
        if key in ARCHITECTURES[name].arguments:
            with pytest.raises(ValueError, match=f"{key} has 1 entries, but"):
                small(name, **{key: [[1, 2, 2]]})
            with pytest.raises(ValueError, match=f"{key}.0 is 0, but"):
                small(name, **{key: [0, 2, 2, 2]})
    if "kernel_size" in ARCHITECTURES[name].arguments:
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


def linear(network: nn.Module) -> nn.Module:
    """Return the network with all that hides a path replaced: its gradient shows every path."""
    for parent in list(network.modules()):
        for key, child in list(parent.named_children()):
            if isinstance(child, nn.MaxPool3d):
                setattr(parent, key, nn.AvgPool3d(child.kernel_size, child.stride))
            elif isinstance(
                child,
                nn.modules.batchnorm._BatchNorm | nn.modules.instancenorm._InstanceNorm
                | nn.GroupNorm | nn.ReLU | nn.LeakyReLU | nn.PReLU | nn.GELU,
            ):  # fmt: skip
                setattr(parent, key, nn.Identity())
    for parameter in network.parameters():
        nn.init.constant_(parameter, 1.0)
    return network.double().eval()


def seen(network: nn.Module, length: int, axis: int, needed: tuple[int, int, int]) -> int:
    """Return the most voxels of an axis that an output voxel depends on, over its alignments."""
    shape = list(needed)
    shape[axis] = length
    image = torch.ones(1, 1, *shape, dtype=torch.float64, requires_grad=True)
    logits = network(image)[0, 0].movedim(axis, 0)
    most = 0
    for start in range(needed[axis]):
        centre = length // 2 // needed[axis] * needed[axis] + start
        (gradient,) = torch.autograd.grad(logits[centre].sum(), image, retain_graph=True)
        where = gradient[0, 0].movedim(axis, 0).flatten(1).abs().sum(1).nonzero()
        most = max(most, int(where.max() - where.min()) + 1)
    return most


@pytest.mark.parametrize("name", NAMES)
def test_receptive_field_is_exactly_what_an_output_voxel_depends_on(name: str) -> None:
    filters = FILTERS if name in ("mednext", "monai_basic_unet3d") else FILTERS[:3]
    model = {"filters": filters}
    needed, field = divisor(name, model), receptive_field(name, model)
    network = linear(build_network(name, **model))
    for axis in {0, 2} if needed[0] != needed[2] else {2}:
        length = (-(-field[axis] // needed[axis]) + 2) * needed[axis]
        assert seen(network, length, axis, needed) == field[axis]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("rsunet", {"kernel_size": [1, 3, 3], "down_factors": [[1, 3, 3], [2, 2, 2]]}),
        ("monai_unet", {"num_res_units": 0, "strides": [[1, 2, 2], [2, 2, 2]]}),
        ("monai_unet", {"kernel_size": 5, "num_res_units": 1}),
    ],
)
def test_receptive_field_follows_the_keys(name: str, said: dict[str, Any]) -> None:
    model = {"filters": FILTERS[:3], **said}
    needed, field = divisor(name, model), receptive_field(name, model)
    network = linear(build_network(name, **model))
    for axis in range(3):
        length = (-(-field[axis] // needed[axis]) + 2) * needed[axis]
        assert seen(network, length, axis, needed) == field[axis]


def bright_blobs(shape: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """Return noise with bright blobs, (1, 1, z, y, x), and where they are."""
    field = F.avg_pool3d(torch.randn(1, 1, *shape), 5, stride=1, padding=2)
    target = (field > field.quantile(0.8)).float()
    return target + 0.3 * torch.randn(1, 1, *shape), target


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("mednext", {"mednext_size": "S", "filters": (32, 64, 128, 256, 512)}),
        ("monai_basic_unet3d", {"filters": (8, 16, 32, 64, 128)}),
        ("monai_unet", {"filters": (8, 16, 32)}),
        ("rsunet", {"filters": (8, 16, 32)}),
    ],
)
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
