"""What goes over to PyTorch Connectomics goes whole, and what cannot says so first."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from hydralv_tune.config.candidate import DecodingStep
from hydralv_tune.config.files import candidate_from_mapping, load_candidate
from hydralv_tune.config.pytc_portability import obstacles
from hydralv_tune.data.volumes import VolumePaths
from hydralv_tune.results.export.pytc import peer_config, peer_step
from hydralv_tune.results.export.pytc_blocks import PeerData, monai_block, rsunet_block

VECTORS = Path(__file__).parent / "vectors" / "pytc"
CASES: list[dict[str, Any]] = json.loads(
    gzip.decompress((VECTORS / "networks.json.gz").read_bytes())
)
DATA = PeerData(
    volumes=[VolumePaths("im", "im.h5", "lab.h5", "mask.h5")],
    voxel_size_nm=(30.0, 8.0, 8.0),
    weights="best.ckpt",
    experiment="best",
    description="exported",
)
PATCHES = {"rsunet": [4, 8, 8], "monai_unet": [4, 8, 8], "monai_basic_unet3d": [32, 32, 32]}


def candidate_of(case: dict[str, Any]) -> Any:
    """Return a candidate with the network of a vector."""
    model = dict(case["ours"])
    if "strides" in model:
        model["strides"] = [[2, 2, 2]]
    patch = PATCHES[model["architecture"]]
    if case["name"] == "rsunet-deep":
        patch = [4, 16, 16]
    partial = {
        "model": model,
        "data": {"patch_size": patch},
        "inference": {"sliding_window": {"window_size": None}},
    }
    return candidate_from_mapping(partial, place=case["name"])


@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
def test_a_network_is_asked_for_in_the_words_that_gave_its_output(case: dict[str, Any]) -> None:
    candidate, theirs = candidate_of(case), case["theirs"]
    against = obstacles(candidate)
    if case["ours"].get("norm") == "none" and theirs["activation"] != "prelu":
        assert "model.norm none" in against[0]
        return
    assert against == []
    rsunet = theirs["arch"] == "rsunet"
    asked = rsunet_block(candidate.model) if rsunet else monai_block(candidate.model)
    said = {k: v for k, v in theirs.items() if k not in ("arch", "size", "ds", "filters")}
    if not rsunet:
        said["filters"] = theirs["filters"]
    for key, value in said.items():
        assert asked[key] == value, key


@pytest.mark.parametrize(
    ("model", "key"),
    [
        ({"architecture": "mednext"}, "model.architecture mednext"),
        ({"architecture": "monai_unet"}, "model.strides"),
        ({"architecture": "monai_unet", "strides": [[2, 2, 2]] * 4}, "model.norm instance"),
        ({"architecture": "monai_basic_unet3d"}, "model.activation null"),
        ({"architecture": "monai_basic_unet3d", "activation": "relu"}, "model.norm instance"),
        ({"activation": "gelu"}, "model.activation gelu"),
        ({"norm": "none"}, "model.norm none"),
    ],
)
def test_what_that_tool_lacks_is_named_by_its_key(model: dict[str, Any], key: str) -> None:
    candidate = load_candidate("baseline", {"model": model})
    assert any(sentence.startswith(key) for sentence in obstacles(candidate))
    for schema in ("pytc", "pytc-2026-01"):
        exported = peer_config(candidate, candidate.test.decoding[0], DATA, schema=schema)
        assert "NOT loadable" in exported.notes[0]
        assert "external_weights_path" not in str(exported.mapping)


def test_january_reads_its_test_transform_and_single_numbers() -> None:
    candidate = load_candidate(
        "baseline",
        {
            "data": {
                "image_transform": {"normalize": "z_volume"},
                "augmentation": {"preset": "all"},
            },
            "model": {"loss_kwargs": [{}, {"foreground_weight": "balanced"}, {}, {},
                                      {"foreground_weight": "balanced"}]},
        },
    )  # fmt: skip
    mapping = peer_config(
        candidate, candidate.test.decoding[0], DATA, schema="pytc-2026-01"
    ).mapping
    assert mapping["test"]["data"]["image_transform"]["normalize"] == "normal"
    augmentation = mapping["data"]["augmentation"]
    for name, knob in (("cut_blur", "length_ratio"), ("cut_noise", "length_ratio"),
                       ("cut_noise", "noise_scale"), ("motion_blur", "sections")):  # fmt: skip
        assert isinstance(augmentation[name][knob], int | float)
    assert "foreground_weight" not in json.dumps(mapping)
    assert "min_instance_size" not in json.dumps(mapping["test"]["decoding"])
    assert mapping["inference"]["test_time_augmentation"]["apply_mask"] is True


def test_head_says_precision_mask_and_blending_where_it_reads_them() -> None:
    candidate = load_candidate("baseline")
    default = peer_config(candidate, candidate.test.decoding[0], DATA, schema="pytc").mapping[
        "default"
    ]
    assert default["optimization"]["precision"] == "bf16-mixed"
    assert default["inference"]["test_time_augmentation"]["apply_mask"] is True
    assert default["inference"]["window"]["blending"] == "distance_transform"


def test_sections_standardised_here_are_written_or_told() -> None:
    from dataclasses import replace

    candidate = load_candidate("section_standardised")
    step = candidate.test.decoding[0]
    told = peer_config(candidate, step, DATA, schema="pytc")
    assert any("--write-normalised" in note for note in told.notes)
    written = peer_config(candidate, step, replace(DATA, normalised=True), schema="pytc")
    assert written.mapping["default"]["data"]["image_transform"]["normalize"] == "none"


@pytest.mark.parametrize(("newer", "expected"), [(True, 49), (False, 50)])
def test_the_smallest_segment_kept_is_the_same_in_either_scikit_image(
    newer: bool, expected: int
) -> None:
    step = DecodingStep(kwargs={"min_instance_size": 50})
    assert peer_step(step, drops_exact_size=newer)["kwargs"]["min_instance_size"] == expected
