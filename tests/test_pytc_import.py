"""Configurations of PyTorch Connectomics become candidates; what cannot is listed, all at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hydralv_tune.cli.main import exit_code
from hydralv_tune.config.errors import ConfigError
from hydralv_tune.config.files import import_configuration, load_candidate
from hydralv_tune.config.pytc_files import numbers_of, read_peer_file, stage_view
from hydralv_tune.config.pytc_import import COARSEST_MASK, Imported
from hydralv_tune.config.search_space_files import load_space
from hydralv_tune.data.formats.interface import COARSEST

VECTORS = Path(__file__).parent / "vectors" / "pytc"

JANUARY = """
experiment_name: large_vesicles
system:
  training: {num_gpus: 4, num_cpus: 8, num_workers: 2, batch_size: 8}
  seed: 7
model:
  architecture: rsunet
  in_channels: 1
  out_channels: 3
  filters: [16, 32, 64]
  strides: [2, 2]
  dropout: 0.1
  rsunet_norm: group
  rsunet_num_groups: 4
  rsunet_activation: elu
  rsunet_down_factors: [[1, 2, 2], [2, 2, 2]]
  deep_supervision: true
  loss_functions: [DiceLoss, WeightedBCEWithLogitsLoss, DiceLoss, SmoothL1Loss]
  loss_weights: [1.0, 2.0, 1.0, 0.5]
  loss_kwargs: [{sigmoid: true}, {reduction: mean}, {sigmoid: true}, {beta: 0.1, tanh: true}]
  loss_balancing: {strategy: uncertainty}
  multi_task_config: [[0, 1, label, [0, 1]], [1, 2, boundary, [2]], [2, 3, edt, [3]]]
data:
  train_image: vol*_im.h5
  train_label: vol*_lab.h5
  train_resolution: [30, 8, 8]
  patch_size: [16, 64, 64]
  iter_num_per_epoch: 640
  image_transform: {normalize: normal}
  label_transform:
    targets:
      - name: binary
      - {name: instance_boundary, kwargs: {thickness: 1, edge_mode: all, mode: 2d}}
      - {name: instance_edt, kwargs: {mode: 3d, quantize: false}}
  augmentation:
    preset: some
    flip: {enabled: true, prob: 0.5}
    stripe: {enabled: true, prob: 0.5}
optimization:
  max_epochs: 300
  precision: 16-mixed
  optimizer: {name: AdamW, lr: 3e-4, weight_decay: 0.001}
  scheduler: {name: warmupcosine, warmup_epochs: 20, warmup_start_lr: 0.1, min_lr: 1e-6}
inference:
  sliding_window: {window_size: [16, 64, 64], overlap: 0.25, blending: gaussian}
  test_time_augmentation:
    flip_axes: [[0], [1, 2]]
    channel_activations: [[0, 1, sigmoid], [1, 2, sigmoid], [2, 3, tanh]]
    apply_mask: true
tune:
  n_trials: 50
  parameter_space:
    decoding:
      function_name: decode_instance_binary_contour_distance
      defaults: {binary_threshold: [0.9, 0.1], contour_threshold: [0.8, 1.1], min_seed_size: 8}
      parameters:
        seed: {type: float, range: [0.5, 1.0], step: 0.1, param_group: binary_threshold,
               tuple_index: 0}
        size: {type: int, range: [4, 16], step: 4}
        min_seed_size: {type: int, range: [4, 16], step: 4}
test:
  data: {test_image: vol0_im.h5}
  decoding:
    - name: decode_instance_binary_contour_distance
      kwargs: {binary_threshold: [0.5, 0.1], contour_threshold: [0.8, 1.1], min_seed_size: 8}
"""

PROFILES = """
arch_profiles:
  small: {arch: {type: rsunet}, rsunet: {width: [8, 16], norm: batch, num_groups: 4}}
loss_profiles:
  three:
    losses:
      - {function: DiceLoss, kwargs: {sigmoid: true}, pred_slice: "0:1", target_slice: "0:1"}
      - {function: DiceLoss, kwargs: {sigmoid: true}, pred_slice: 1, target_slice: 1}
      - {function: WeightedMSELoss, weight: 2.0, kwargs: {tanh: true}, pred_slice: "-1:",
         target_slice: "-1:"}
label_profiles:
  three:
    targets:
      - {name: binary}
      - {name: instance_boundary, kwargs: {thickness: 1, edge_mode: all, mode: 2d}}
      - {name: instance_edt, kwargs: {mode: 2d}}
pipeline_profiles:
  three:
    model: {out_channels: 3, loss: {profile: three}}
    data: {label_transform: {profile: three}}
    decoding: {steps: [{template: watershed}]}
decoding_templates:
  watershed:
    steps:
      - name: decode_instance_binary_contour_distance
        kwargs: {binary_threshold: [0.9, 0.85], contour_threshold: [0.8, 1.1], min_seed_size: 5}
tune_profiles:
  three:
    parameter_space:
      decoding:
        function_name: decode_instance_binary_contour_distance
        parameters:
          low: {type: float, range: [0.8, 1.5], step: 0.1, param_group: contour_threshold,
                tuple_index: 1}
"""
TODAY = """
_base_: [profiles.yaml]
default:
  pipeline_profile: three
  model:
    arch: {profile: small}
    loss: {overrides: {1: {weight: 0.5}}}
    input_size: [16, 32, 32]
  data:
    dataloader: {batch_size: 2, patch_size: "${model.input_size}"}
    augmentation: {flip: {enabled: true}, slice_drop_z: {enabled: true, prob: 0.4}}
  inference:
    window: {window_size: [16, 32, 32], overlap: 0.5, blending: bump}
    test_time_augmentation: {enabled: true, flip_axes: [1, 2]}
train:
  data: {train: {path: data, image: im.h5, label: lab.h5}}
  optimization: {n_steps_per_epoch: 100, max_epochs: 50, accumulate_grad_batches: 3,
                 optimizer: {lr: 1e-3}, scheduler: {name: ReduceLROnPlateau}}
test:
  data: {test: {image: other.h5}}
  decoding:
    steps:
      - {template: watershed, kwargs: {min_seed_size: 20}}
tune: {profile: three}
"""


@pytest.fixture
def january(tmp_path: Path) -> Path:
    for index in range(2):
        for kind in ("im", "lab"):
            (tmp_path / f"vol{index}_{kind}.h5").touch()
    path = tmp_path / "january.yaml"
    path.write_text(JANUARY)
    return path


@pytest.fixture
def today(tmp_path: Path) -> Path:
    (tmp_path / "profiles.yaml").write_text(PROFILES)
    path = tmp_path / "today.yaml"
    path.write_text(TODAY)
    return path


def imported(path: Path) -> Imported:
    """Return the import of a file."""
    return import_configuration(read_peer_file(path), path)


def test_a_configuration_of_january_becomes_a_candidate_with_its_values(january: Path) -> None:
    result = imported(january)
    model = result.candidate["model"]
    assert model["filters"] == [16, 32, 64]
    assert (model["norm"], model["num_groups"], model["activation"]) == ("group", 4, "elu")
    assert model["down_factors"] == [[1, 2, 2], [2, 2, 2]]
    assert model["dropout"] == 0
    assert model["loss_weights"] == [1.0, 2.0, 1.0, 0.5]
    assert result.candidate["optimization"]["scheduler"]["warmup_epochs"] == 20
    assert result.candidate["data"]["image_transform"]["normalize"] == "normal"
    assert result.candidate["inference"]["test_time_augmentation"]["flip_axes"] == [[0], [1, 2]]
    kwargs = result.candidate["test"]["decoding"][0]["kwargs"]
    assert kwargs["contour_threshold"] == [0.8, None]
    assert kwargs["flood"] == "volume"
    assert [Path(p).name for p in result.volumes["train"]["image"]] == ["vol0_im.h5", "vol1_im.h5"]


def test_what_january_says_without_effect_is_told_and_does_not_matter(january: Path) -> None:
    left = {entry.key: entry for entry in imported(january).left_out}
    assert not left["model.strides"].matters
    assert not left["model.dropout"].matters
    assert left["data.augmentation.stripe"].matters
    assert not any(key.startswith("system") for key in left)


def test_ranges_that_would_be_sampled_become_a_grid(january: Path) -> None:
    grid = imported(january).grid
    assert grid is not None
    assert grid["grid"]["binary_threshold"]["seed"] == [0.5, 0.6, 0.7, 0.9, 1.0]
    assert grid["grid"]["binary_threshold"]["foreground"] == [0.1]
    assert grid["grid"]["contour_threshold"] == {"seed": [0.8], "foreground": [None]}
    assert grid["grid"]["min_seed_size"] == [4, 12, 16]


def test_todays_file_is_resolved_through_bases_profiles_stages_and_references(today: Path) -> None:
    result = imported(today)
    model = result.candidate["model"]
    assert model["filters"] == [8, 16]
    assert model["loss_functions"] == ["DiceLoss", "DiceLoss", "WeightedMSELoss"]
    assert model["loss_weights"] == [1.0, 0.5, 2.0]
    assert model["multi_task_config"] == [
        [0, 1, "label", [0]], [1, 2, "boundary", [1]], [2, 3, "edt", [2]],
    ]  # fmt: skip
    data = result.candidate["data"]
    assert data["patch_size"] == [16, 32, 32]
    assert data["iter_num_per_epoch"] == 100 * 2 * 3
    assert data["augmentation"]["missing_section"] == {"enabled": True, "prob": 0.4}
    assert result.candidate["test"]["decoding"][0]["kwargs"]["min_seed_size"] == 20
    assert result.volumes["train"]["image"] == "data/im.h5"
    assert result.grid is not None
    left = {entry.key for entry in result.left_out if entry.matters}
    assert left == {"optimization.scheduler.name", "inference.sliding_window.blending"}


def test_what_only_the_test_stage_says_is_listed_with_what_to_do(today: Path) -> None:
    text = today.read_text().replace(
        "  data: {test: {image: other.h5}}\n",
        "  data: {test: {image: other.h5}, mask_transform: {resize: [1, 2, 2], binarize: true}}\n",
    )
    post = "    postprocessing: {enabled: true, instance_cc3d: {connectivity: 6, min_size: 100}}\n"
    today.write_text(text.replace("tune: {profile", post + "tune: {profile"))
    left = {entry.key: entry for entry in imported(today).left_out if entry.matters}
    assert "test.data.mask_transform.resize" not in left
    told = [entry.key for entry in imported(today).left_out]
    assert "test.data.mask_transform.resize" in told
    today.write_text(today.read_text().replace("resize: [1, 2, 2]", "resize: [1, 1.5, 2]"))
    left = {entry.key: entry for entry in imported(today).left_out if entry.matters}
    assert "whole numbers" in left["test.data.mask_transform.resize"].meaning
    assert not any(key.startswith("decoding.postprocessing") for key in left)
    step = imported(today).candidate["test"]["decoding"][0]
    assert step["kwargs"]["split_components"] is True
    assert step["kwargs"]["min_instance_size"] == 100
    today.write_text(today.read_text().replace("connectivity: 6", "connectivity: 26"))
    left = {entry.key: entry for entry in imported(today).left_out}
    assert "6-connected" in left["decoding.postprocessing.instance_cc3d.connectivity"].meaning
    assert "split_components" not in imported(today).candidate["test"]["decoding"][0]["kwargs"]


def test_a_loss_weighs_and_squashes_as_it_did_there(today: Path) -> None:
    kwargs = imported(today).candidate["model"]["loss_kwargs"]
    assert kwargs[0]["sigmoid"] is True
    assert kwargs[2]["foreground_weight"] == "balanced"
    profiles = today.parent / "profiles.yaml"
    plain = profiles.read_text().replace("{function: DiceLoss, kwargs: {sigmoid: true}",
                                         "{function: DiceLoss")  # fmt: skip
    profiles.write_text(plain.replace("MSELoss, weight: 2.0", "MSELoss, pos_weight: 1.0"))
    result = imported(today)
    kwargs = result.candidate["model"]["loss_kwargs"]
    assert kwargs[0]["sigmoid"] is True
    assert "foreground_weight" not in kwargs[2]
    left = {entry.key: entry.meaning for entry in result.left_out if entry.matters}
    assert "taken of logits there" in left["model.loss_kwargs.DiceLoss.sigmoid"]


def test_padding_is_that_which_the_volumes_were_trained_with(january: Path) -> None:
    january.write_text(
        JANUARY.replace(
            "image_transform: {normalize: normal}",
            "pad_size: [1, 2, 2]\n  image_transform: {normalize: normal, pad_size: [2, 8, 8], "
            "pad_mode: edge}",
        )
    )
    result = imported(january)
    assert result.candidate["data"]["pad_size"] == [2, 8, 8]
    assert result.candidate["data"]["pad_mode"] == "replicate"
    assert not any("pad" in entry.key for entry in result.left_out)


def test_a_candidate_may_be_such_a_file_itself(january: Path) -> None:
    with pytest.warns(UserWarning, match=r"left out:[^$]*- model\.strides"):
        candidate = load_candidate(january)
    assert candidate.model.norm == "group"
    assert candidate.system.training.batch_size == 8


def test_a_missing_base_and_an_unknown_profile_are_named(today: Path) -> None:
    text = today.read_text()
    today.write_text(text.replace("profile: small", "profile: smal"))
    with pytest.raises(ConfigError, match=r"arch_profiles has no such profile. Known: small"):
        read_peer_file(today)
    today.write_text(text.replace("[profiles.yaml]", "nowhere.yaml"))
    with pytest.raises(ConfigError, match=r"_base_ is nowhere\.yaml.*checkout"):
        read_peer_file(today)
    today.write_text("_base_: today.yaml\ndefault: {}\n")
    with pytest.raises(ConfigError, match="inherits from itself"):
        read_peer_file(today)


def test_a_stage_lies_over_default_and_default_over_the_root() -> None:
    mapping = {
        "data": {"a": 1, "b": 1, "c": 1},
        "default": {"data": {"b": 2, "c": 2}},
        "test": {"data": {"c": 3}},
    }
    assert stage_view(mapping, "test")["data"] == {"a": 1, "b": 2, "c": 3}
    assert stage_view(mapping, "train")["data"] == {"a": 1, "b": 2, "c": 2}


@pytest.mark.parametrize(
    ("selector", "expected"),
    [("0:2", [0, 1]), ("-1:", [2]), (1, [1]), (-1, [2]), (":", [0, 1, 2]), ("0:-1", [0, 1])],
)
def test_channel_selectors(selector: Any, expected: list[int]) -> None:
    assert list(numbers_of(selector, 3) or []) == expected


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("architecture: rsunet", "architecture: monai_unetr", "there is no such network here"),
        ("patch_size: [16, 64, 64]", "patch_size: [64, 64]", "three dimensions"),
        ("  architecture: rsunet\n", "", "the file names no network"),
    ],
)
def test_what_has_no_counterpart_at_all_is_refused(
    january: Path, capsys: pytest.CaptureFixture[str], old: str, new: str, said: str
) -> None:
    january.write_text(JANUARY.replace(old, new))
    out = january.parent / "candidate.yaml"
    assert exit_code(["import", str(january), "--out", str(out)]) == 2
    assert said in " ".join(capsys.readouterr().err.split())
    assert not out.exists()


def test_the_command_writes_a_candidate_and_a_space_that_load(
    january: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, space = january.parent / "candidate.yaml", january.parent / "space.yaml"
    words = ["import", str(january), "--out", str(out), "--space", str(space), "--json"]
    assert exit_code(words) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["out"] == str(out)
    assert document["space"] == str(space)
    assert any(entry.startswith("data.augmentation.stripe") for entry in document["left_out"])
    assert load_candidate(out).model.filters == (16, 32, 64)
    loaded = load_space(str(space))
    assert loaded.decoding.axes["min_seed_size"] == (4, 12, 16)
    assert loaded.base_mapping()["optimization"]["max_epochs"] == 300


def test_a_genuine_checkpoint_of_january_is_a_configuration_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "candidate.yaml"
    file = VECTORS / "january_last.ckpt"
    assert exit_code(["import", str(file), "--out", str(out), "--json"]) == 0
    candidate = load_candidate(out)
    assert candidate.model.filters == (4, 12)
    assert candidate.model.norm == "group"
    assert candidate.model.external_weights_path == str(file.absolute())
    assert candidate.optimization.optimizer.lr == 5e-4
    document = json.loads(capsys.readouterr().out)
    assert document["space"] is None
    # The checkpoint holds every default; those of what it did not use are no loss.
    keys = {entry.split(":")[0] for entry in document["left_out"]}
    assert not keys & {"model.mlp_dim", "model.mednext_norm", "data.split_pad_mode"}


def test_masks_are_enlarged_as_far_as_the_reader_enlarges_them() -> None:
    assert COARSEST_MASK == COARSEST
