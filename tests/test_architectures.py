"""RSUNet equals its public peer, and weights are never taken in silence."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from hydralv_tune.config.candidate import Model
from hydralv_tune.numerics.networks.registry import (
    ARCHITECTURES,
    architecture,
    build_network,
    network_arguments,
)
from hydralv_tune.numerics.networks.weights import match_weights, parameter_count


def test_every_key_that_an_architecture_may_take_is_a_key_of_the_candidate() -> None:
    for name, entry in ARCHITECTURES.items():
        assert set(entry.keys) <= set(Model.model_fields), name
        # The defaults of a candidate build every architecture.
        arguments = network_arguments(Model(architecture=name).model_dump())
        with torch.device("meta"):
            assert parameter_count(build_network(name, **arguments)) > 1_000_000


@pytest.mark.parametrize(
    ("filters", "deep", "count"),
    [
        ((32, 64, 128, 256, 512), False, 42_570_245),
        ((32, 64, 128, 256, 512), True, 42_573_137),
        ((16, 32, 64, 128, 256), False, 10_645_509),
    ],
)
def test_rsunet_has_the_published_number_of_parameters(
    filters: tuple[int, ...], deep: bool, count: int
) -> None:
    with torch.device("meta"):
        network = build_network("rsunet", filters=filters, deep_supervision=deep)
    assert parameter_count(network) == count


def test_mednext_has_the_shapes_of_monais_factories() -> None:
    from monai.networks.nets.mednext import create_mednext

    for size in "SBML":
        with torch.device("meta"):
            ours = build_network("mednext", mednext_size=size, deep_supervision=True)
            theirs = create_mednext(size, out_channels=3, deep_supervision=True)
        shapes = {key: value.shape for key, value in theirs.state_dict().items()}
        assert {key: value.shape for key, value in ours.state_dict().items()} == shapes


def test_monai_networks_keep_monais_names_and_results() -> None:
    from monai.networks.nets.basic_unet import BasicUNet
    from monai.networks.nets.unet import UNet

    image = torch.randn(1, 1, 16, 32, 32)
    theirs = BasicUNet(features=(4, 8, 16, 32, 64, 4), out_channels=3, norm=("batch", {}))
    ours = build_network("monai_basic_unet3d", filters=(4, 8, 16, 32, 64), norm="batch")
    assert match_weights(ours, theirs.state_dict()).share == 1
    assert torch.allclose(ours.eval()(image), theirs.eval()(image), atol=1e-6)

    strides = [(1, 2, 2), (2, 2, 2)]
    theirs = UNet(3, 1, 3, channels=(4, 8, 16), strides=strides, num_res_units=2, norm="batch")
    for deep in (False, True):
        ours = build_network(
            "monai_unet", filters=(4, 8, 16), strides=strides, norm="batch", deep_supervision=deep
        )
        match_weights(ours, theirs.state_dict(), strict=not deep)
        logits = theirs.eval()(image)
        assert torch.allclose(ours.eval()(image), logits, atol=1e-6)
        if deep:
            # Collecting the levels must not change what the network says.
            norms = [m for m in ours.train().modules() if isinstance(m, torch.nn.BatchNorm3d)]
            for norm in norms:
                norm.eval()
            assert torch.allclose(ours(image)[0], logits, atol=1e-6)


@pytest.mark.parametrize("name", ["plain", "deep"])
def test_rsunet_equals_its_public_peer(shared_data: Path, name: str) -> None:
    folder = shared_data / "pytc-rsunet"
    content = torch.load(folder / f"{name}.ckpt", weights_only=True)
    vectors = np.load(folder / f"{name}.npz")
    network = build_network("rsunet", filters=(4, 8, 16), deep_supervision=name == "deep")
    report = match_weights(network, content["state_dict"], prefix="model.")
    assert report.share == 1
    assert not report.unexpected
    image = torch.from_numpy(vectors["input"])
    with torch.no_grad():
        assert np.abs(network.eval()(image).numpy() - vectors["output"]).max() < 1e-5
    # The other way round: what we save loads there, name by name and shape by shape.
    ours = {f"model.{key}": value for key, value in network.state_dict().items()}
    assert list(ours) == list(content["state_dict"])
    assert all(torch.equal(ours[key], value) for key, value in content["state_dict"].items())


def test_heads_of_the_coarser_levels_equal_the_public_peer(shared_data: Path) -> None:
    folder = shared_data / "pytc-rsunet"
    content = torch.load(folder / "deep.ckpt", weights_only=True)
    vectors = np.load(folder / "deep.npz")
    network = build_network("rsunet", filters=(4, 8, 16), deep_supervision=True)
    match_weights(network, content["state_dict"], prefix="model.")
    for module in network.eval().modules():
        module.training = module is network  # lists are given in training alone
    with torch.no_grad():
        fine, middle, coarse = network(torch.from_numpy(vectors["input"]))
    for ours, key in ((fine, "output"), (middle, "ds_2"), (coarse, "ds_1")):
        assert np.abs(ours.numpy() - vectors[key]).max() < 1e-5


def test_up_sampling_is_linear_interpolation_and_leaves_a_constant_alone() -> None:
    from hydralv_tune.numerics.networks.rsunet import FixedUpsample

    image = torch.randn(1, 2, 3, 5, 6)
    ours = FixedUpsample(2, (1, 2, 2))(image)
    theirs = torch.nn.functional.interpolate(image, scale_factor=(1, 2, 2), mode="trilinear")
    assert torch.allclose(ours[..., 1:-1, 1:-1], theirs[..., 1:-1, 1:-1], atol=1e-6)
    for factor in ((1, 2, 2), (2, 3, 4)):
        constant = FixedUpsample(1, factor)(torch.ones(1, 1, 6, 6, 6))
        assert constant.shape[2:] == tuple(6 * f for f in factor)
        inner = constant[
            0, 0, factor[0] : -factor[0], factor[1] : -factor[1], factor[2] : -factor[2]
        ]
        assert torch.allclose(inner, torch.ones_like(inner))


def tiny(**arguments: object) -> torch.nn.Module:
    """Return a network of two levels."""
    return build_network("rsunet", **{"filters": (2, 4), **arguments})


def test_a_wrong_prefix_is_refused_and_the_right_one_is_named() -> None:
    source = {f"net.model.{key}": value for key, value in tiny().state_dict().items()}
    for strict in (True, False):
        with pytest.raises(ValueError, match=r"no weight fits .* Try the prefix 'net\.model\.'"):
            match_weights(tiny(), source, prefix="model.", strict=strict)
    assert match_weights(tiny(), source, prefix="net.model.").share == 1


def test_a_partial_match_is_listed_and_refused_unless_allowed() -> None:
    torch.manual_seed(0)
    source = tiny().state_dict()
    network = tiny(deep_supervision=True, out_channels=4)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    with pytest.raises(ValueError, match=r"only in part: \d+ of \d+ tensors match") as refusal:
        match_weights(network, source)
    for part in ("2 missing: ds_heads.0.weight", "(3, 2, 1, 1, 1) for (4, 2, 1, 1, 1)", "strict"):
        assert part in str(refusal.value)
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())

    report = match_weights(network, source, strict=False)
    total = len(network.state_dict())
    assert report.share == (total - 4) / total
    assert report.missing == ("ds_heads.0.weight", "ds_heads.0.bias")
    assert [entry.split()[0] for entry in report.mismatched] == [
        "output_head.weight", "output_head.bias",
    ]  # fmt: skip
    after = network.state_dict()
    assert torch.equal(after["input_conv.res.conv1.weight"], source["input_conv.res.conv1.weight"])
    assert torch.equal(after["output_head.weight"], before["output_head.weight"])


def test_weights_beyond_the_network_are_told() -> None:
    source = tiny(deep_supervision=True).state_dict()
    report = match_weights(tiny(), {**source, "epoch": 3})
    assert report.share == 1
    assert report.unexpected == ("ds_heads.0.weight", "ds_heads.0.bias", "epoch")


def test_trained_up_sampling_is_refused_rather_than_replaced() -> None:
    network, source = tiny(), dict(tiny().state_dict())
    before = {key: value.clone() for key, value in network.state_dict().items()}
    # One kernel for all channels is fixed; a trained layer has one of its own for each.
    source["up_blocks.0.up.weight"] = source["up_blocks.0.up.weight"].clone()
    source["up_blocks.0.up.weight"][0] *= 2
    with pytest.raises(ValueError, match="differs between channels"):
        match_weights(network, source)
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())


def test_a_name_outside_the_table_is_refused_with_those_inside() -> None:
    with pytest.raises(ValueError, match=r"Unknown architecture 'mednxt'\. Known: mednext, monai"):
        architecture("mednxt")


def test_widths_that_do_not_fit_are_refused_with_some_that_do() -> None:
    with pytest.raises(ValueError, match=r"Try \[8, 16, 32, 64, 128\]"):
        build_network("mednext", filters=(8, 16, 32))
    with pytest.raises(ValueError, match="five levels"):
        build_network("monai_basic_unet3d", filters=(8, 16, 32))
    with pytest.raises(ValueError, match=r"\[9\] are odd"):
        build_network("monai_basic_unet3d", filters=(8, 9, 16, 32, 64))


def test_fine_tuning_starts_where_the_public_checkpoint_stands(shared_data: Path) -> None:
    content = torch.load(shared_data / "pytc-rsunet" / "plain.ckpt", weights_only=True)
    torch.manual_seed(0)
    network = build_network("rsunet", filters=(4, 8, 16), dropout=0.1)
    match_weights(network, content["state_dict"], prefix="model.")
    image = torch.randn(1, 1, 6, 24, 24)
    target = (image > 0).float().expand(1, 3, -1, -1, -1)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    losses = []
    for _ in range(10):
        loss = torch.nn.functional.binary_cross_entropy_with_logits(network(image), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
