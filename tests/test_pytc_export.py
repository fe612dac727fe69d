"""What goes over to PyTorch Connectomics goes whole, and what cannot says so first."""

from __future__ import annotations

import gzip
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hydralv_tune.config.candidate import DecodingStep
from hydralv_tune.config.errors import ConfigError
from hydralv_tune.config.files import candidate_from_mapping, load_candidate
from hydralv_tune.config.pytc_portability import obstacles
from hydralv_tune.config.search_space_files import load_space
from hydralv_tune.config.search_space_rules import drawn
from hydralv_tune.data.volumes import VolumePaths, read_array, write_array
from hydralv_tune.results.export.export import with_masks_enlarged
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


@pytest.mark.parametrize("enabled", [True, False])
def test_january_is_told_what_is_off_by_leaving_it_out(enabled: bool) -> None:
    transforms = {"enabled": enabled, "flip_axes": [[1], [2]], "rotation90_axes": [[1, 2]],
                  "rotate90_k": [0, 2]}  # fmt: skip
    candidate = load_candidate("baseline", {"inference": {"test_time_augmentation": transforms}})
    exported = peer_config(candidate, candidate.test.decoding[0], DATA, schema="pytc-2026-01")
    block = exported.mapping["inference"]["test_time_augmentation"]
    assert not {"enabled", "rotate90_k"} & set(block)
    assert any("rotate90_k" in note for note in exported.notes) is enabled
    assert ("flip_axes" in block) is ("rotation90_axes" in block) is enabled
    assert any("19 January" in note for note in exported.notes)


def test_head_says_precision_mask_and_blending_where_it_reads_them() -> None:
    candidate = load_candidate("baseline")
    default = peer_config(candidate, candidate.test.decoding[0], DATA, schema="pytc").mapping[
        "default"
    ]
    assert default["optimization"]["precision"] == "bf16-mixed"
    assert default["inference"]["test_time_augmentation"]["apply_mask"] is True
    assert default["inference"]["window"]["blending"] == "distance_transform"


def test_the_context_of_a_prediction_is_padded_and_cut_off_there_too() -> None:
    candidate = load_candidate("baseline", {"data": {"pad_mode": "replicate"}})
    step = candidate.test.decoding[0]
    default = peer_config(candidate, step, DATA, schema="pytc").mapping["default"]
    assert default["data"]["data_transform"] == {"pad_size": [8, 24, 24], "pad_mode": "edge"}
    assert default["inference"]["model"]["crop_pad"] == [8, 24, 24]
    assert default["inference"]["window"]["padding_mode"] == "replicate"
    january = peer_config(candidate, step, DATA, schema="pytc-2026-01")
    assert january.mapping["data"]["image_transform"]["pad_size"] == [8, 24, 24]
    assert "pad_size" not in january.mapping["test"]["data"]["image_transform"]
    assert any("windows lie elsewhere" in note for note in january.notes)
    bare = load_candidate("baseline", {"data": {"pad_size": [0, 0, 0]}})
    default = peer_config(bare, step, DATA, schema="pytc").mapping["default"]
    assert "crop_pad" not in default["inference"]["model"]


def test_sections_standardised_here_are_written_or_told() -> None:
    candidate = load_candidate("section_standardised")
    step = candidate.test.decoding[0]
    told = peer_config(candidate, step, DATA, schema="pytc")
    assert any("--write-normalised" in note for note in told.notes)
    written = peer_config(candidate, step, replace(DATA, normalised=True), schema="pytc")
    assert written.mapping["default"]["data"]["image_transform"]["normalize"] == "none"


@pytest.mark.parametrize(
    ("partial", "said"),
    [
        ({"optimization": {"scheduler": {"warmup_epochs": 50}}}, "cosine starts at epoch 0"),
        (
            {
                "model": {
                    "deep_supervision": True,
                    "filters": [4, 8, 8, 8, 8, 8],
                    "down_factors": None,
                }
            },
            "deep_supervision is off",
        ),
        ({"model": {"dropout": 0.2}}, "dropout 0.2: its RSUNet has none"),
        ({"inference": {"sliding_window": {"blending": "gaussian"}}}, "blended as logits"),
        ({"data": {"label_transform": {"edt_voxel_size": "volume"}}}, "there they are in voxels"),
    ],
)
def test_what_is_otherwise_there_is_told(partial: dict[str, Any], said: str) -> None:
    candidate = load_candidate("baseline", partial)
    step = candidate.test.decoding[0]
    for schema in ("pytc", "pytc-2026-01"):
        assert any(said in note for note in peer_config(candidate, step, DATA, schema=schema).notes)


def test_a_gaussian_is_another_blending_in_todays_version_alone() -> None:
    candidate = load_candidate("baseline")
    for schema, blending in (("pytc", "distance_transform"), ("pytc-2026-01", "gaussian")):
        written = peer_config(candidate, candidate.test.decoding[0], DATA, schema=schema)
        assert f"'blending': '{blending}'" in str(written.mapping)
        told = any("distance_transform" in note for note in written.notes)
        assert told == (schema == "pytc")


def test_losses_are_told_what_weighs_their_voxels() -> None:
    model = {
        "loss_functions": ["DiceLoss", "BCEWithLogitsLoss", "FocalLoss", "L1Loss", "SmoothL1Loss"],
        "loss_kwargs": [{}, {"pos_weight": 3.0}, {}, {"tanh": True},
                        {"foreground_weight": "balanced"}],
        "loss_weights": [1.0] * 5,
        "multi_task_config": [[0, 1, "label", [0, 1]], [1, 2, "boundary", [2]],
                              [2, 3, "edt", [3, 4]]],
        "loss_balancing": {"strategy": "none"},
    }  # fmt: skip
    candidate = load_candidate("baseline", {"model": model})
    step = candidate.test.decoding[0]
    today = peer_config(candidate, step, DATA, schema="pytc")
    losses = today.mapping["default"]["model"]["loss"]["losses"]
    assert losses[0]["kwargs"] == {"sigmoid": True}
    assert [entry["function"] for entry in losses[1:4]] == [
        "WeightedBCEWithLogitsLoss", "FocalLoss", "WeightedMAELoss",
    ]  # fmt: skip
    assert [entry.get("pos_weight") for entry in losses] == [None, 3.0, None, 1.0, "auto"]
    assert any(note.startswith("FocalLoss: outside the mask") for note in today.notes)
    assert any(note.startswith("SmoothL1Loss: it balances") for note in today.notes)
    assert not any("counts everywhere" in note for note in today.notes)
    january = peer_config(candidate, step, DATA, schema="pytc-2026-01")
    block = january.mapping["model"]
    assert block["loss_functions"][1:4] == [entry["function"] for entry in losses[1:4]]
    assert block["loss_kwargs"][:2] == [{"sigmoid": True}, {"pos_weight": 3.0}]
    assert any("foreground_weight balanced not carried over" in note for note in january.notes)
    assert any("counts everywhere" in note for note in january.notes)


def test_what_came_later_in_january_is_told() -> None:
    steps = {
        "stops at min_instance_size when": DecodingStep(kwargs={"min_instance_size": 50}),
        "stops at decode_distance_watershed when": DecodingStep(
            name="decode_instance_watershed_distance", kwargs={}
        ),
    }
    candidate = load_candidate("baseline")
    for said, step in steps.items():
        exported = peer_config(candidate, step, DATA, schema="pytc-2026-01")
        assert any(said in note for note in exported.notes)
    plain = peer_config(candidate, DecodingStep(kwargs={}), DATA, schema="pytc-2026-01")
    assert not any("when it decodes" in note for note in plain.notes)


def test_a_note_says_which_scikit_image_the_size_is_written_for() -> None:
    step = DecodingStep(kwargs={"min_instance_size": 50})
    candidate = load_candidate("baseline")
    for newer, said in ((True, "for 0.26 and later"), (False, "for earlier ones")):
        notes = peer_config(
            candidate, step, replace(DATA, drops_exact_size=newer), schema="pytc"
        ).notes
        assert any("exactly 50 voxels" in note and said in note for note in notes)


@pytest.mark.parametrize(("newer", "expected"), [(True, 49), (False, 50)])
def test_the_smallest_segment_kept_is_the_same_in_either_scikit_image(
    newer: bool, expected: int
) -> None:
    step = DecodingStep(kwargs={"min_instance_size": 50})
    assert peer_step(step, drops_exact_size=newer)["kwargs"]["min_instance_size"] == expected


def test_a_mask_of_lower_resolution_is_written_on_the_voxels_of_its_image(tmp_path: Path) -> None:
    coarse = np.random.default_rng(0).integers(0, 2, (4, 5, 6)).astype("uint8")
    write_array(tmp_path / "im.h5", np.zeros((4, 10, 12), "uint8"))
    write_array(tmp_path / "coarse.h5", coarse)
    write_array(tmp_path / "fine.h5", np.ones((4, 10, 12), "uint8"))
    image, kept = str(tmp_path / "im.h5"), str(tmp_path / "fine.h5")
    volumes = [VolumePaths("a", image, None, kept),
               VolumePaths("b", image, None, str(tmp_path / "coarse.h5"))]  # fmt: skip
    with pytest.warns(UserWarning, match="lower resolution"):
        fine, enlarged = with_masks_enlarged(volumes, tmp_path / "best.yaml")
    assert fine.mask == kept
    assert enlarged.mask == str(tmp_path / "best.mask_1.h5")
    np.testing.assert_array_equal(read_array(enlarged.mask), coarse.repeat(2, 1).repeat(2, 2))


def test_split_instances_are_asked_for_where_that_tool_splits_them() -> None:
    step = DecodingStep(kwargs={"split_components": True, "min_instance_size": 50})
    candidate = load_candidate("baseline")
    today = peer_config(candidate, step, DATA, schema="pytc").mapping["default"]["decoding"]
    split = {"connectivity": 6, "min_size": 50}
    assert today["postprocessing"] == {"enabled": True, "instance_cc3d": split}
    assert "split_components" not in today["steps"][0]["kwargs"]
    january = peer_config(candidate, step, DATA, schema="pytc-2026-01")
    assert any("6-connected" in note for note in january.notes)
    whole = peer_config(candidate, DecodingStep(kwargs={}), DATA, schema="pytc").mapping
    assert "postprocessing" not in whole["default"]["decoding"]


def test_an_inner_boundary_is_written_as_the_one_that_tool_has() -> None:
    targets = [{"name": "binary"}, {"name": "instance_boundary", "kwargs": {"edge_mode": "inner"}},
               {"name": "instance_edt", "kwargs": {"mode": "2d"}}]  # fmt: skip
    candidate = load_candidate("baseline", {"data": {"label_transform": {"targets": targets}}})
    for schema in ("pytc", "pytc-2026-01"):
        exported = peer_config(candidate, candidate.test.decoding[0], DATA, schema=schema)
        assert "inner" not in json.dumps(exported.mapping)
        assert any("edge_mode inner" in note for note in exported.notes)


PORTABLE = """
base: baseline
export: pytc
warm_starts: [baseline, plan_mednext_s]
parameters:
  model.architecture: {choice: [rsunet, mednext, monai_unet]}
  model.num_res_units: {choice: [0, 3], when: {model.architecture: [monai_unet]}}
  model.norm: {choice: [batch, none], when: {model.architecture: [rsunet]}}
  optimization.optimizer.lr: {float: [1e-4, 1e-3], log: true}
"""


def portable_space(folder: Path, text: str, settings: dict[str, Any] | None = None) -> Any:
    """Return the space of a text."""
    path = folder / "space.yaml"
    path.write_text(text)
    return load_space(str(path), settings)


def test_a_space_that_asks_for_export_proposes_only_what_goes_over(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"export is pytc; left out") as told:
        space = portable_space(tmp_path, PORTABLE)
    said = str(told[0].message)
    for entry in ("model.architecture 'mednext'", "model.architecture 'monai_unet'",
                  "model.num_res_units", "model.norm 'none'",
                  "warm start 'plan_mednext_s'"):  # fmt: skip
        assert f"- {entry}" in said
    assert space.warm_starts == ["baseline"]
    assert space.parameters["model.architecture"].choice == ["rsunet"]
    assert space.parameters["model.norm"].choice == ["batch"]
    generator = random.Random(3)
    for _ in range(30):
        assert obstacles(space.candidate(drawn(space, generator))) == []


def test_a_candidate_put_into_such_a_study_must_go_over_too(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="left out"):
        space = portable_space(tmp_path, PORTABLE)
    params = {"model.architecture": "rsunet", "model.norm": "batch"}
    with pytest.raises(ConfigError, match=r"lacks this network. model\.activation gelu"):
        space.candidate(params, {"model": {"activation": "gelu"}})
    assert space.candidate(params, {"model": {"activation": "elu"}}).model.activation == "elu"


def test_choices_that_do_not_go_over_together_are_refused(tmp_path: Path) -> None:
    text = """
export: pytc
parameters:
  model.activation: {choice: [relu, prelu]}
  model.norm: {choice: [batch, none]}
"""
    with pytest.raises(ConfigError, match=r"model\.activation 'relu', model\.norm 'none' cannot"):
        portable_space(tmp_path, text)
    tied = """
export: pytc
parameters:
  layers:
    choice:
      usual: {model: {norm: batch, activation: relu}}
      bare: {model: {norm: none, activation: prelu}}
"""
    assert len(portable_space(tmp_path, tied).parameters["layers"].choice) == 2


def test_the_base_of_such_a_space_need_not_go_over_itself(tmp_path: Path) -> None:
    text = """
base: smoke
export: pytc
parameters:
  model.architecture: {choice: [rsunet, monai_unet]}
  model.norm: {choice: [batch, group], when: {model.architecture: [rsunet]}}
  optimization.optimizer.lr: {float: [1e-3, 1e-2], log: true}
"""
    with pytest.warns(UserWarning, match=r"left out:\n- model.architecture 'monai_unet'"):
        space = portable_space(tmp_path, text)
    generator = random.Random(3)
    assert all(not obstacles(space.candidate(drawn(space, generator))) for _ in range(20))


def test_what_holds_for_every_trial_decides_what_goes_over(tmp_path: Path) -> None:
    text = "export: pytc\nparameters:\n  model.norm: {choice: [batch, none]}\n"
    space = portable_space(tmp_path, text, {"model": {"activation": "prelu"}})
    assert space.parameters["model.norm"].choice == ["batch", "none"]
    with pytest.raises(ConfigError, match=r"cannot go over. model\.architecture mednext"):
        portable_space(tmp_path, "base: plan_mednext_s\nexport: pytc\n")
