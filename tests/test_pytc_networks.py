"""Networks of PyTorch Connectomics: the same names, the same outputs.

`vectors/pytc/README.md` says how the vectors were made; neither that tool nor a network is needed.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hydralv_tune.numerics.networks.registry import build_network, group_count
from hydralv_tune.numerics.networks.weights import match_weights

VECTORS = Path(__file__).parent / "vectors" / "pytc"
IN_PLACE = ("relu", "leakyrelu", "elu")
"""Activations that tool runs in place: without a norm before them they overwrite the identity."""
CASES: list[dict[str, Any]] = json.loads(
    gzip.decompress((VECTORS / "networks.json.gz").read_bytes())
)
OUTPUTS = np.load(VECTORS / "networks.npz")
KEPT = ("num_batches_tracked", ".up.weight")
"""Tensors that the vectors leave as the network makes them."""


def seeded_weights(case: dict[str, Any]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Return the weights and the input that the vector was made with, by the README's rule."""
    random = np.random.default_rng(case["seed"])
    weights = {}
    for name, shape in case["tensors"]:
        if name.endswith(KEPT):
            continue
        drawn = random.random(tuple(shape))
        if name.endswith("running_var"):
            value = 0.5 + drawn
        elif name.endswith("running_mean"):
            value = drawn - 0.5
        elif len(shape) == 1 and name.endswith("weight"):
            value = 0.75 + 0.5 * drawn
        elif len(shape) <= 1:
            value = 0.5 * (drawn - 0.5)
        else:
            value = (drawn - 0.5) * 4 / np.sqrt(np.prod(shape[1:]))
        weights[name] = torch.from_numpy(np.asarray(value, np.float32))
    image = random.random((1, 1, *case["theirs"]["size"])).astype(np.float32)
    return weights, torch.from_numpy(image)


def built(ours: dict[str, Any]) -> torch.nn.Module:
    """Return our network of a case."""
    return build_network(
        ours["architecture"], **{k: v for k, v in ours.items() if k != "architecture"}
    )


def goes_over(case: dict[str, Any]) -> bool:
    """Return whether the network of a case is the same function here and there."""
    ours = case["ours"]
    return ours.get("norm") != "none" or ours["activation"] not in IN_PLACE


SAME = [case for case in CASES if goes_over(case) and case["name"] != "rsunet-iso"]
OTHER = [case for case in CASES if not goes_over(case)]


@pytest.mark.parametrize("case", SAME, ids=[case["name"] for case in SAME])
def test_a_network_has_its_names_and_gives_its_output(case: dict[str, Any]) -> None:
    network = built(case["ours"]).eval()
    shapes = {name: list(tensor.shape) for name, tensor in network.state_dict().items()}
    assert shapes == dict(case["tensors"])
    difference, largest = output_difference(case, network)
    assert difference <= 1e-5 * max(1, largest)


@pytest.mark.parametrize("case", OTHER, ids=[case["name"] for case in OTHER])
def test_without_a_norm_its_in_place_activations_make_another_network(case: dict[str, Any]) -> None:
    difference, largest = output_difference(case, built(case["ours"]).eval())
    assert difference > 1e-3 * largest


def output_difference(case: dict[str, Any], network: torch.nn.Module) -> tuple[float, float]:
    """Return the largest difference of the logits, and the largest logit."""
    weights, image = seeded_weights(case)
    kept = {k: v for k, v in network.state_dict().items() if k.endswith(KEPT)}
    assert match_weights(network, {**kept, **weights}).share == 1
    with torch.inference_mode():
        logits = network(image)[0].numpy()
    step, expected = case["step"], OUTPUTS[case["name"]]
    difference = np.abs(logits[:, ::step, ::step, ::step] - expected).max()
    return float(difference), float(np.abs(expected).max())


def test_kernels_that_do_not_interpolate_between_sections_are_taken_as_they_are() -> None:
    case = next(case for case in CASES if case["name"] == "rsunet-iso")
    network = built(case["ours"]).eval()
    weights, image = seeded_weights(case)
    for name, tensor in network.state_dict().items():
        if name.endswith(".up.weight"):
            # Every tap along z weighs 1 there; ours interpolates.
            weights[name] = (tensor / tensor.sum((3, 4), keepdim=True)) * tensor.sum((3, 4)).max()
            weights[name] = weights[name] / weights[name][0, 0].sum((1, 2)).max() * 4
        elif name.endswith("num_batches_tracked"):
            weights[name] = tensor
    assert match_weights(network, weights).share == 1
    with torch.inference_mode():
        logits = network(image)[0].numpy()
    assert np.abs(logits - OUTPUTS[case["name"]]).max() <= 2e-5


@pytest.mark.parametrize(
    ("channels", "groups", "expected"),
    [(12, 8, 6), (32, 8, 8), (6, 8, 6), (7, 8, 7), (9, 8, 3), (11, 8, 1), (4, 2, 2)],
)
def test_groups_are_the_largest_divisor(channels: int, groups: int, expected: int) -> None:
    assert group_count(channels, groups) == expected
