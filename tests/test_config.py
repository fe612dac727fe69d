# ruff: noqa: E501 (a table of faults reads best with a fault on a line)
"""Candidates: partial files, every rule with its message, what is derived."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from hydralv_tune.config.candidate import Candidate
from hydralv_tune.config.errors import ConfigError
from hydralv_tune.config.explanation import explain
from hydralv_tune.config.files import (
    candidate_from_mapping,
    decoding_step,
    load_candidate,
    parse_overrides,
    with_overrides,
)
from hydralv_tune.config.paths import find_file, known_names
from hydralv_tune.config.reference import reference
from hydralv_tune.config.validation import key_paths, nested
from hydralv_tune.config.yaml_io import dump_yaml, parse_yaml
from hydralv_tune.numerics.augmentation.registry import resolve_preset
from hydralv_tune.numerics.networks.registry import build_network, network_arguments
from hydralv_tune.numerics.networks.weights import parameter_count
from hydralv_tune.numerics.watershed.decoders import DECODERS, Decoder, read_arguments
from hydralv_tune.trial.training.optimization import step_plan

REPOSITORY = Path(__file__).parents[1]
TRIALS = sorted(path.stem for path in (REPOSITORY / "trials").glob("*.yaml"))


def of(text: str, **options: Any) -> Candidate:
    """Return the candidate of a YAML text."""
    return candidate_from_mapping(parse_yaml(text, "x.yaml"), place="x.yaml", **options)


# --- Files -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TRIALS)
def test_every_recipe_is_valid_says_what_it_is_for_and_survives_a_round_trip(name: str) -> None:
    candidate = load_candidate(name)
    assert (REPOSITORY / "trials" / f"{name}.yaml").read_text().startswith("# ")
    assert candidate.experiment_name == name
    mapping = json.loads(json.dumps(candidate.as_mapping()))
    assert candidate_from_mapping(mapping, place="again", base={}) == candidate
    again = parse_yaml(dump_yaml(candidate.as_mapping()), "yaml")
    assert candidate_from_mapping(again, place="yaml") == candidate
    assert explain(candidate)


def test_the_recipes_of_the_plan_are_there() -> None:
    assert set(TRIALS) >= {
        "baseline", "plan_quick_win", "plan_focal", "plan_small_rsunet", "plan_basic_unet",
        "plan_mednext_s", "plan_from_scratch", "plan_watershed_distance", "overfit_check",
        "real_volume", "section_standardised", "foreground_sampling", "foreground_weighted",
        "smoke", "vesicle_xm", "vesiclepy", "nnunet_residual",
    }  # fmt: skip


def test_the_baseline_is_the_configuration_of_the_plan() -> None:
    candidate = load_candidate("baseline")
    model, optimization = candidate.model, candidate.optimization
    keys = network_arguments(model.model_dump(mode="json"))
    assert parameter_count(build_network(model.architecture, **keys)) == 42_570_245
    assert (optimization.optimizer.lr, optimization.optimizer.weight_decay) == (1e-4, 0.01)
    assert candidate.data.augmentation.preset == "some"
    assert model.loss_balancing.strategy == "uncertainty"
    assert (candidate.system.training.batch_size, candidate.data.iter_num_per_epoch) == (8, 1280)
    assert candidate.data.patch_size == (32, 128, 128)
    assert candidate.test.decoding[0].kwargs == {
        "binary_threshold": [0.5, 0.7], "contour_threshold": [0.8, 13.1],
        "distance_threshold": [0.5, -0.5], "min_seed_size": 4,
    }  # fmt: skip
    assert set(resolve_preset("some", candidate.data.augmentation.settings)) == {
        "flip", "rotate", "affine", "intensity", "misalignment", "missing_section", "motion_blur",
    }  # fmt: skip


def test_the_quick_win_is_that_of_the_plan() -> None:
    candidate = load_candidate("plan_quick_win")
    assert candidate.model.deep_supervision
    assert candidate.model.loss_weights == (2.0, 2.0, 1.0, 1.0, 0.5)
    assert candidate.data.augmentation.preset == "all"
    assert candidate.optimization.optimizer.lr == 3e-4
    assert candidate.optimization.optimizer.weight_decay == 0.001
    assert (candidate.data.iter_num_per_epoch, candidate.optimization.max_epochs) == (5000, 1000)


def test_what_a_file_does_not_say_comes_from_the_baseline(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("optimization: {optimizer: {lr: 1e-3}}\n")
    mine, base = load_candidate(path), load_candidate("baseline")
    assert mine.optimization.optimizer.lr == 1e-3
    assert mine.optimization.optimizer.weight_decay == base.optimization.optimizer.weight_decay
    assert mine.model == base.model
    path.write_text("")
    assert load_candidate(path) == base


def test_an_unknown_file_is_told_with_the_nearest_name(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"basline: there is no such file.*Did you mean 'baseline'"
    ):
        load_candidate("basline")
    with pytest.raises(ConfigError, match="it is a folder"):
        load_candidate(tmp_path)
    assert find_file("baseline", "trials") == REPOSITORY / "trials" / "baseline.yaml"
    assert known_names("trials") == TRIALS


def test_bare_names_are_found_inside_an_installed_package(tmp_path: Path) -> None:
    """The wheel holds both folders inside the package, as pyproject's force-include says."""
    package = tmp_path / "hydralv_tune"
    shutil.copytree(
        REPOSITORY / "hydralv_tune", package, ignore=shutil.ignore_patterns("__pycache__")
    )
    for kind in ("trials", "search_spaces"):
        (package / kind).symlink_to(REPOSITORY / kind)
    code = (
        "import hydralv_tune.config.files as c; print(c.__file__); "
        "print(c.find_file('baseline', 'trials'), c.find_file('smoke', 'search_spaces'))"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True,
        env={"PYTHONPATH": str(tmp_path), "PATH": ""},
    ).stdout  # fmt: skip
    assert out.count(str(package)) == 3


def test_importing_the_vocabulary_does_not_import_torch() -> None:
    code = "import sys, hydralv_tune.config.search_space; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=False).returncode == 0


# --- Faults, each with its message -----------------------------------------------------------

FAULTS = [
    # Keys
    ("optimization: {optimizer: {learning_rate: 1}}", "optimization.optimizer.learning_rate is no "
     "key of a candidate. Did you mean 'optimization.optimizer.lr'?"),
    ("optimisation: {}", "optimisation is no key.*Did you mean 'optimization'"),
    ("lr: 1", "lr is no key of a candidate. Did you mean 'optimization.optimizer.lr'"),
    ("model: {rsunet_norm: batch}", "Did you mean 'model.norm'"),
    ("test: {decoding: [{naem: x}]}", r"test.decoding\[0\].naem is no key.*'test.decoding\[0\].name'"),
    ("data: {label_transform: {targets: [{name: binary, kwarg: {}}]}}", r"targets\[0\].kwarg is no"),
    # Types
    ("model: null", "model is null, but it must be a mapping"),
    ("model: {filters: 3}", "model.filters is 3, but it must be a list"),
    ("model: {filters: [8, 1.5]}", r"model.filters\[1\] is 1.5, but it must be a whole number"),
    ("model: {deep_supervision: 1}", "model.deep_supervision is 1, but it must be true or false"),
    ("system: {seed: true}", "system.seed is true, but it must be a whole number"),
    ("data: {patch_size: [32, 128]}", r"data.patch_size\[2\] is missing, but it must be given"),
    ("data: {patch_size: [1, 2, 3, 4]}", "data.patch_size is .*at most 3 entries"),
    ("optimization: {optimizer: {lr: fast}}", "optimizer.lr is 'fast', but it must be a number"),
    # Values
    ("optimization: {optimizer: {lr: -1e-4}}", "lr is -0.0001, but it must be above 0"),
    ("optimization: {optimizer: {lr: .inf}}", "lr is inf, but it must be a finite number"),
    ("optimization: {optimizer: {lr: .nan}}", "lr is nan, but it must be a finite number"),
    ("optimization: {optimizer: {weight_decay: -1}}", "weight_decay is -1, but it must be at least 0"),
    ("optimization: {optimizer: {name: Adam}}", "name is 'Adam', .*Did you mean 'AdamW'"),
    ("optimization: {optimizer: {betas: [0.9, 1.0]}}", "betas .*both must be below 1"),
    ("optimization: {precision: bf16mixed}", "precision is 'bf16mixed'.*Did you mean 'bf16-mixed'"),
    ("optimization: {max_epochs: 0}", "max_epochs is 0, but it must be at least 1"),
    ("optimization: {scheduler: {name: cosine_warmup}}", "scheduler.name is 'cosine_warmup', but"),
    ("optimization: {scheduler: {warmup_epochs: 500}}", "warmup_epochs is 500, but .*max_epochs is "
     "500, so the warm-up would never end. Try 50"),
    ("optimization: {scheduler: {min_lr: 1e-3}}", "min_lr is 0.001, but optimization.optimizer.lr is "
     "0.0001"),
    ("optimization: {ema: {decay: 1.0}}", "ema.decay is 1.0, but it must be below 1"),
    ("system: {training: {batch_size: 0}}", "batch_size is 0, but it must be at least 1"),
    ("data: {image_transform: {clip_percentile_low: 0.9, clip_percentile_high: 0.2}}",
     "clip_percentile_low is 0.9, but clip_percentile_high is 0.2"),
    ("data: {image_transform: {normalize: clahe, clip_percentile_low: 0.01}}",
     "nothing is clipped before"),
    ("data: {image_transform: {normalize: zscor}}", "normalize is 'zscor', but it must be one of"),
    ("data: {train_resolution: [.nan, 8, 8]}", "train_resolution .*three lengths in nm"),
    ("data: {train_resolution: [30, 8]}", "train_resolution .*three lengths in nm"),
    ("data: {split: {kind: holdout, fraction: 1}}", "split.fraction is 1.*must be below 1"),
    ("data: {split: {volumes: [a]}}", "split.volumes .*data.split.kind is none"),
    ("data: {split: {kind: blocks, blocks: [60000, 60000, 60000]}}",
     r"split.blocks is \[60000.*each of the 216,000,000,000,000 blocks trains a network"),
    ("data: {split: {kind: blocks, blocks: [5, 13, 1]}}", "65 blocks .* at most 64. Try"),
    ("data: {split: {kind: cross_validation, folds: 65}}", "65 folds .* at most 64. Try 5"),
    ("data: {sampling: {foreground_share: 1.5}}", "foreground_share is 1.5.*at most 1"),
    ("monitor: {early_stopping: {enabled: true, monitor: val_loss}}", "only the total training "
     "loss is watched"),
    ("monitor: {early_stopping: {enabled: true, monitor: train_loss_boundary_epoch}}", "monitor is "
     "'train_loss_boundary_epoch', but only the total .* Set it to train_loss_total_epoch"),
    ("monitor: {early_stopping: {threshold: 200}}", "threshold is 200.*divergence_threshold is 100"),
    ("monitor: {early_stopping: {threshold: .nan}}", "threshold is nan, but it must be a finite"),
    # Network
    ("model: {architecture: mednxt}", "model.architecture is 'mednxt', but no architecture has that "
     r"name. Did you mean 'mednext'\? Known: mednext, monai_basic_unet3d"),
    ("model: {strides: [2, 2, 2, 2]}", "model.strides is .*no effect on rsunet: it pools by"),
    ("model: {architecture: mednext, dropout: 0.1}", "model.dropout is 0.1, but it has no effect on "
     "mednext: MedNeXt has no dropout"),
    ("model: {architecture: mednext, filters: [8, 16, 24, 32, 40]}", "doubles its width. Try"),
    ("model: {architecture: monai_basic_unet3d, filters: [8, 16]}", "model.filters .*five levels"),
    ("model: {norm: bach}", "model: Unknown norm 'bach'. Known"),
    ("model: {down_factors: [[1, 2, 2]]}", "model.down_factors has 1 entries, but filters"),
    ("model: {dropout: 1.0}", "model.dropout is 1.0, but it must be below 1"),
    ("model: {out_channels: 2}", "model.out_channels is 2, but it must be 3"),
    ("model: {in_channels: 2}", "model.in_channels is 2, but it must be 1"),
    ("data: {patch_size: [32, 120, 128]}", "data.patch_size: patch .*multiples of"),
    ("model: {architecture: mednext}\ndata: {patch_size: [12, 128, 128]}", "data.patch_size: "),
    ("inference: {sliding_window: {window_size: [32, 100, 128]}}", r"window_size is .*Try \[32, 96"),
    ("model: {deep_supervision_weights: [1.0, 0.5]}", "model.deep_supervision is false"),
    ("model: {deep_supervision: true, deep_supervision_weights: [1.0, 0.5]}", "gives logits at 5 levels"),
    # Losses
    ("model: {loss_functions: [DiceLos, FocalLoss, DiceLoss, DiceLoss, L1Loss]}",
     r"model.loss_functions\[0\] is 'DiceLos', but no loss has that name. Did you mean 'DiceLoss'"),
    ("model: {loss_weights: [1, 1]}", "model.loss_weights .*has 5 losses. Give 5 weights"),
    ("model: {loss_weights: [1, 1, 1, 1, -1]}", r"loss_weights\[4\] is -1, but it must be at least 0"),
    ("model: {loss_weights: [0, 0, 0, 0, 0]}", "one must be above 0"),
    ("model: {loss_kwargs: [{}]}", "model.loss_kwargs .*Give 5 mappings"),
    ("model: {loss_kwargs: [{sigmod: true}, {}, {}, {}, {}]}", r"loss_kwargs\[0\].sigmod is true, but "
     "DiceLoss has no such argument. Did you mean 'sigmoid'"),
    ("model: {loss_kwargs: [{}, {}, {}, {alpha: -1}, {}]}", r"loss_kwargs\[3\]: TverskyLoss: alpha"),
    ("model: {multi_task_config: [[0, 3, label, [0, 1, 2, 3]]]}", "no task uses loss 4"),
    ("model: {multi_task_config: [[0, 2, label, [0, 1, 2, 3, 4]]]}", "each of the 3 channels"),
    ("model: {multi_task_config: [[0, 3, label, [0, 1, 2, 3, 9]]]}", "losses are numbered 0 to 4"),
    ("model: {multi_task_config: [[0, 3, label]]}", r"it is \[first channel, end, task"),
    ("model: {multi_task_config: [[0, 4, label, [0]]]}", "channels must lie in 0 to 3"),
    *((f"model: {{multi_task_config: [[0, 1, label, [0, 1]], [1, 2, {name}, [2, 3]], [2, 3, edt, [4]]]}}",
       rf"multi_task_config\[1\] is \[1, 2, '{name}', .*{name} is recorded as a loss of its own. Give")
      for name in ("total", "plan_total", "label_DiceLoss_0", "edt_SmoothL1Loss_4")),
    ("model: {loss_balancing: {strategy: uncertanty}}", "strategy is .*Did you mean 'uncertainty'"),
    # Targets and augmentation
    ("data: {label_transform: {targets: [{name: binary}]}}", "targets is .*in this order"),
    ("data: {augmentation: {preset: most}}", "preset is 'most', but it must be one of"),
    ("data: {augmentation: {flipp: {}}}", "augmentation.flipp is .*Did you mean 'flip'"),
    ("data: {augmentation: {flip: true}}", "augmentation.flip is true, but it must be a mapping"),
    ("data: {augmentation: {flip: {prb: 1}}}", "flip.prb is 1, but flip has no such knob. Did you "
     "mean 'prob'"),
    ("data: {augmentation: {flip: {prob: 1.5}}}", "flip.prob is 1.5, but must be a number from 0 to 1"),
    ("data: {augmentation: {rotate: {enabled: 3}}}", "rotate.enabled is 3, but must be true or false"),
    ("data: {augmentation: {cutout: {hole_size: [0, 1, 1]}}}", "cutout.hole_size is"),
    # Inference and decoding
    ("inference: {test_time_augmentation: {flip_axes: [3]}}", "flip_axes .*axes are 0"),
    ("inference: {test_time_augmentation: {flip_axes: al}}", "flip_axes is 'al', but .*'all'"),
    ("inference: {test_time_augmentation: {rotation90_axes: [[1, 1]]}}", "a plane is two of"),
    ("inference: {test_time_augmentation: {rotation90_axes: all}, sliding_window: {window_size: "
     "[24, 128, 128]}}", r"rotation90_axes is 'all', but it turns the window \[24, 128, 128\] into "
     r"\[128, 24, 128\] \(z, y, x\), and rsunet needs multiples of \[1, 16, 16\]. Try \[\[1, 2\]\]"),
    ("inference: {test_time_augmentation: {rotation90_axes: [[0, 2]]}, sliding_window: {window_size: "
     "[8, 128, 128]}}", r"rotation90_axes is \[\[0, 2\]\], but it turns .* into \[128, 128, 8\]"),
    ("inference: {test_time_augmentation: {channel_activations: [[0, 3, sigmoid]]}}", "tanh"),
    ("inference: {sliding_window: {overlap: 1.0}}", "overlap is 1.0, but it must be below 1"),
    ("test: {decoding: []}", "test.decoding is .*at least 1 entries"),
    ("test: {decoding: [{name: decode_x}]}", "no decoder has that name"),
    ("test: {decoding: [{kwargs: {min_seed: 1}}]}", "Did you mean 'min_seed_size'"),
    ("test: {decoding: [{kwargs: {binary_threshold: 0.3}}]}", r"it is a pair: \[seed, foreground\]"),
    ("test: {decoding: [{kwargs: {binary_threshold: [0.3, 1.2]}}]}", r"must be in \[0, 1\]"),
    ("test: {decoding: [{kwargs: {binary_threshold: [0.3, null]}}]}", "a threshold is a number"),
    ("test: {decoding: [{kwargs: {distance_threshold: [0.3, -2]}}]}", r"must be in \[-1, 1\]"),
    ("test: {decoding: [{kwargs: {min_seed_size: -1}}]}", "a whole number of voxels from 0 on"),
    ("test: {decoding: [{kwargs: {flood: sea}}]}", "support or volume"),
    ("test: {decoding: [{enabled: false}]}", "one step must be enabled"),
    ("test: {decoding_grid: {grid: {binary_threshold: {sed: [0.3]}}}}", "no such axis. Did you mean"),
    ("test: {decoding_grid: {grid: {min_seed_size: []}}}", "a list of at least one value"),
    ("test: {decoding_grid: {grid: {binary_threshold: {seed: [2.0]}}}}", r"must be in \[0, 1\]"),
    ("test: {decoding_grid: {fixed: {flod: volume}}}", "Did you mean 'flood'"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "message"), FAULTS, ids=[text for text, _ in FAULTS])
def test_a_fault_is_told_by_place_key_value_and_rule(text: str, message: str) -> None:
    with pytest.raises(
        ConfigError, match=f"x.yaml: .*{message}" if message else "x.yaml"
    ) as caught:
        of(text)
    told = str(caught.value)
    assert "\n" not in told
    assert "pydantic" not in told
    assert told.startswith("x.yaml: ")


ODD = [[], {}, "x", -1, 10**30, float("nan"), [None], {"a": [{}]}]


@pytest.mark.parametrize("odd", ODD, ids=str)
def test_no_odd_value_at_any_key_is_a_crash(odd: Any) -> None:
    paths = [*key_paths(Candidate), "data.augmentation.flip", "data.augmentation.cutout.hole_size"]
    for path in paths:
        try:
            candidate = candidate_from_mapping(nested(path, odd), place="x.yaml")
        except ConfigError:
            continue
        assert candidate_from_mapping(candidate.as_mapping(), place="again", base={}) is not None


def test_a_turn_that_does_not_fit_is_no_fault_where_it_is_switched_off_or_none() -> None:
    text = (
        "inference: {test_time_augmentation: {rotation90_axes: all, %s}, "
        "sliding_window: {window_size: [24, 128, 128]}}"
    )
    for said in ("enabled: false", "rotate90_k: [0, 2]"):
        assert of(text % said).inference.test_time_augmentation.rotation90_axes == "all"


def test_a_mapping_is_due() -> None:
    with pytest.raises(ConfigError, match="but must be a mapping of keys to values"):
        of("[1, 2]")


# --- Blocks of the plan, as they stand --------------------------------------------------------

BLOCKS = [
    "data: {iter_num_per_epoch: 5000}",
    "model: {architecture: rsunet, deep_supervision: true}",
    'data: {augmentation: {preset: "all", flip: {enabled: true, prob: 0.8}, affine: {enabled: true, '
    "prob: 0.5, scale_range: [0.1, 0.1, 0.1]}, intensity: {enabled: true, gaussian_noise_prob: 0.5, "
    "shift_intensity_prob: 0.6, contrast_prob: 0.6}, cutout: {enabled: true, prob: 0.3, num_holes: 3,"
    " hole_size: [8, 16, 16]}}}",
    "optimization: {max_epochs: 1000, optimizer: {lr: 3e-4, weight_decay: 0.001}, scheduler: "
    "{warmup_epochs: 100, min_lr: 1e-5}}",
    "monitor: {early_stopping: {patience: 100, min_delta: 1e-5}}",
    "model: {loss_weights: [2.0, 2.0, 1.0, 1.0, 0.5], loss_balancing: {strategy: none}}",
    "model: {loss_balancing: {strategy: null}}",
    "model: {loss_functions: [DiceLoss, FocalLoss, DiceLoss, TverskyLoss, SmoothL1Loss], "
    "loss_kwargs: [{sigmoid: true, smooth_nr: 1e-5, smooth_dr: 1e-5}, {alpha: 0.25, gamma: 2.0, "
    "reduction: mean}, {sigmoid: true, smooth_nr: 1e-5, smooth_dr: 1e-5}, {sigmoid: true, alpha: "
    "0.6, beta: 0.4, smooth_nr: 1e-5, smooth_dr: 1e-5}, {beta: 0.1, reduction: mean, tanh: true}]}",
    "model: {filters: [16, 32, 64, 128, 256], dropout: 0.2}",
    "model: {architecture: monai_basic_unet3d, filters: [16, 32, 64, 128, 256], dropout: 0.2, "
    "deep_supervision: true}",
    "model: {architecture: mednext, mednext_size: S, deep_supervision: true}\n"
    "optimization: {optimizer: {lr: 1e-3}, scheduler: {name: constant}}",
    "inference: {test_time_augmentation: {flip_axes: [[0], [1], [2], [0, 1], [0, 2], [1, 2]], "
    "rotation90_axes: [[1, 2]]}}",
    "inference: {test_time_augmentation: {enabled: true, flip_axes: all, rotation90_axes: [[1, 2]],"
    " select_channel: all, ensemble_mode: mean, apply_mask: true}}",
    "test: {decoding: [{name: decode_instance_binary_contour_distance, kwargs: {binary_threshold: "
    "[0.3, 0.7], contour_threshold: [0.5, 13.1], min_seed_size: 10}}]}",
    "test: {decoding: [{name: decode_instance_watershed_distance, kwargs: {distance_threshold: 0.3,"
    " min_seed_size: 8}}]}",
    "test: {decoding: [{name: decode_distance_watershed, kwargs: {distance_threshold: [0.5, 0]}}]}",
    "test: {decoding: [{name: decode_instance_binary_contour_distance, kwargs: {binary_channels: "
    "[0], contour_channels: [1], distance_channels: [2], contour_threshold: [0.8, null]}}]}",
    "model: {external_weights_path: null}",
    'optimization: {precision: "bf16-mixed"}',
    "optimization: {precision: 32}",
    'optimization: {precision: "16-mixed"}',
    "optimization: {scheduler: {name: warmupcosine, warmup_start_lr: 0.1}}",
    "data: {image_transform: {normalize: normal}}",
    'data: {train_image: "a/*.h5", train_label: [b.h5], train_mask: m.h5, train_resolution: [30, 8, '
    "8], use_preloaded_cache: true, cache_rate: 0.0, persistent_workers: false}",
    "monitor: {detect_anomaly: false, logging: {scalar: {loss: [train_loss_total_epoch]}}, "
    "checkpoint: {mode: min, save_top_k: 3, dirpath: outputs/}}",
    "test: {data: {test_image: a.h5, test_resolution: [30, 8, 8]}, evaluation: {enabled: true, "
    "metrics: [adapted_rand]}}",
    "system: {training: {num_gpus: 4, num_cpus: 8, num_workers: 2, batch_size: 8}, inference: "
    "{num_gpus: 1, batch_size: 1}, seed: 42}",
    "inference: {save_prediction: {enabled: true, intensity_scale: -1}}",
]  # fmt: skip


@pytest.mark.parametrize("text", BLOCKS)
def test_a_block_of_the_plan_is_a_valid_candidate_as_it_stands(text: str) -> None:
    candidate = of(text)
    assert candidate_from_mapping(candidate.as_mapping(), place="again", base={}) == candidate


def test_other_spellings_mean_the_same() -> None:
    assert of("optimization: {precision: 32}").optimization.precision == "32"
    assert of("optimization: {precision: 16-mixed}").optimization.precision == "bf16-mixed"
    assert of("optimization: {scheduler: {name: ConstantLR}}").optimization.scheduler.name == (
        "constant"
    )
    assert of("data: {image_transform: {normalize: normal}}").data.image_transform.normalize == (
        "z_volume"
    )
    assert of("model: {loss_balancing: {strategy: null}}").model.loss_balancing.strategy == "none"


def test_one_distance_threshold_is_that_of_the_seeds() -> None:
    step = decoding_step("decode_distance_watershed", {"distance_threshold": 0.3})
    assert step.decoder_arguments() == {"distance_threshold": [0.3, 0.0]}
    with pytest.raises(ConfigError, match="pair"):
        decoding_step("decode_instance_binary_contour_distance", {"distance_threshold": 0.3})


def test_transforms_that_are_said_are_wanted_unless_switched_off() -> None:
    tta = "inference: {test_time_augmentation: {flip_axes: all%s}}"
    assert of(tta % "").inference.test_time_augmentation.enabled
    assert not of(tta % ", enabled: false").inference.test_time_augmentation.enabled
    assert not of("{}").inference.test_time_augmentation.enabled


# --- What a new layer makes void ---------------------------------------------------------------


def test_new_losses_void_the_arguments_of_the_old() -> None:
    text = "model: {loss_functions: [DiceLoss, BCEWithLogitsLoss, DiceLoss, DiceLoss, L1Loss]}"
    assert of(text).model.loss_kwargs == []


def test_a_new_architecture_voids_the_keys_of_the_old() -> None:
    mednext = load_candidate("plan_mednext_s")
    assert (mednext.model.norm, mednext.model.dropout) == (None, None)
    back = with_overrides(mednext, {"model": {"architecture": "rsunet"}})
    assert back.model.mednext_size is None


@pytest.mark.parametrize(
    ("override", "kept"),
    [("{model: {architecture: monai_unet}}", False), ("{model: {filters: [8, 16]}}", False),
     ("{model: {norm: group}}", False), ("{optimization: {optimizer: {lr: 1e-3}}}", True),
     ("{model: {architecture: rsunet}}", True), ("{model: {dropout: 0.1}}", True),
     ("{model: {filters: [32, 64, 128, 256, 512]}}", True)],
)  # fmt: skip
def test_a_new_network_voids_pretrained_weights(override: str, kept: bool) -> None:
    base = of("model: {external_weights_path: best.ckpt}")
    changed = with_overrides(base, parse_yaml(override, "here"))
    assert changed.model.external_weights_path == ("best.ckpt" if kept else None)


# --- The command line --------------------------------------------------------------------------


def test_overrides_are_read_as_yaml_and_win() -> None:
    overrides = parse_overrides(
        ["optimization.optimizer.lr=3e-4", "model.filters=[8, 16, 32]", "model.norm=instance",
         "optimization.optimizer.weight_decay=0"]
    )  # fmt: skip
    candidate = load_candidate("baseline", overrides)
    assert candidate.optimization.optimizer.lr == 3e-4
    assert candidate.optimization.optimizer.weight_decay == 0
    assert candidate.model.filters == (8, 16, 32)
    assert candidate.optimization.optimizer.betas == (0.9, 0.999)


@pytest.mark.parametrize(
    ("settings", "message"),
    [(["lr"], "'lr' is no setting: it must be key=value"),
     (["=3"], "it must be key=value"),
     (["a..b=3"], "it must be key=value"),
     (["a.b=1", "a.b=2"], "a.b is set twice"),
     (["model=3", "model.dropout=0.1"], "model is set to 3, which has no room for model.dropout"),
     (["a=[1"], " a: line 1.* no valid YAML")],
)  # fmt: skip
def test_a_malformed_override_is_told(settings: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=f"--set.*{message}"):
        parse_overrides(settings)


def test_a_wrong_override_names_the_option_not_the_file() -> None:
    with pytest.raises(ConfigError, match=r"--set: optimization.optimizer.lr is -1, but"):
        load_candidate("baseline", parse_overrides(["optimization.optimizer.lr=-1"]))


# --- What is derived ---------------------------------------------------------------------------


def explained(text: str) -> str:
    """Return all sentences on a YAML text."""
    return "\n".join(explain(of(text)))


def test_steps_are_told_as_the_trainer_makes_them() -> None:
    for name in TRIALS:
        candidate = load_candidate(name)
        plan = step_plan(candidate)
        told = explain(candidate)[0]
        assert f"{plan.steps_per_epoch:,} optimizer steps an epoch" in told
        assert f"{plan.steps:,} steps and {plan.steps * plan.effective_batch:,} patches" in told


def test_a_grid_of_more_combinations_than_a_sweep_takes_is_refused() -> None:
    sizes = [*range(1001)]
    grid = {"min_seed_size": sizes, "min_instance_size": sizes}
    with pytest.raises(ConfigError, match="1,002,001 combinations, but 1,000,000 is the most"):
        load_candidate("baseline", {"test": {"decoding_grid": {"grid": grid}}})


def test_a_threshold_that_is_no_pair_is_explained_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(maps: Any, mask: Any = None, *, lone_threshold: float = 0.5) -> Any:
        raise AssertionError

    monkeypatch.setitem(DECODERS, "lone", Decoder(decode, read_arguments(decode)))
    assert explained("test: {decoding: [{name: lone, kwargs: {lone_threshold: 0.3}}]}")


def test_what_the_plan_calls_320_patches_are_20_steps() -> None:
    told = explained("system: {training: {num_gpus: 4}}")
    assert "trains on 4 GPUs at once makes 20 steps of 64 patches an epoch" in told
    assert math.ceil(1280 / 16) == 80
    assert "1,280 patches and 80 optimizer steps an epoch" in told
    assert "No effect: system.training.num_gpus: a trial uses one device." in told


@pytest.mark.parametrize(
    ("text", "sentence"),
    [("monitor: {checkpoint: {save_top_k: 3}}", "No effect: monitor.checkpoint: last and best"),
     ("model: {input_size: [32, 128, 128]}", "No effect: model.input_size: `data.patch_size`"),
     ("data: {val_resolution: [30, 8, 8]}", "No effect: data.val_resolution: no score depends on"),
     ("data: {val_image: a.h5}", "No effect: data.val_image, val_label, val_mask: .* is none"),
     ("monitor: {early_stopping: {enabled: false, monitor: train_loss_boundary_epoch}}",
      "No effect: monitor.early_stopping: enabled is false"),
     ("optimization: {scheduler: {name: constant}}", "min_lr: the schedule is constant"),
     ("model: {loss_balancing: {gradnorm_alpha: 1.0}}", "gradnorm_.: the strategy is another"),
     ("data: {augmentation: {cutout: {prob: 0.3}}}", "cutout: the preset is some, and enabled"),
     ("data: {augmentation: {preset: none}}", "data.augmentation.flip: the preset is none"),
     ("{}", "binary_threshold's seed 0.5 is below its foreground 0.7"),
     ("{}", "foreground 13.1 switches that test off"),
     ("test: {decoding: [{kwargs: {contour_threshold: [0.8, 0.5]}}]}",
      "contour_threshold's seed 0.8 is above its foreground 0.5: seeds may lie where"),
     ("test: {decoding: [{kwargs: {contour_threshold: [null, 0.5]}}]}",
      "seed null is above its foreground 0.5"),
     ("{}", "alpha 0.7 is the weight of false positives, beta 0.3 .* favours precision"),
     ("{}", "uncertainty is learned while training, so total losses"),
     ("monitor: {early_stopping: {threshold: 0.02}}", "uncertainty balancing can take below 0"),
     ("{}", "42,570,245 parameters, trained from scratch"),
     ("model: {external_weights_path: a.ckpt}", "started from a.ckpt. Another architecture or"),
     ("model: {external_weights_path: a.ckpt, deep_supervision: true}", "adds heads that weights"),
     ("system: {training: {batch_size: 2}}", "statistics come from so few patches"),
     ("model: {dropout: 0.2}", "trials/overfit_check says")],
)  # fmt: skip
def test_what_misleads_is_said(text: str, sentence: str) -> None:
    assert re.search(sentence, explained(text))


def test_focal_alpha_is_explained() -> None:
    told = "\n".join(explain(load_candidate("plan_focal")))
    assert "alpha 0.25 weights foreground 3 times less than background" in told
    assert "FocalLoss" not in "\n".join(explain(load_candidate("foreground_weighted")))


# --- The reference -----------------------------------------------------------------------------


def test_the_reference_is_up_to_date_and_names_every_key() -> None:
    text = (REPOSITORY / "docs" / "config.md").read_text()
    assert text == reference(), "run: python -m hydralv_tune.config.reference > docs/config.md"
    for path in key_paths(Candidate):
        assert f"`{path.rpartition('.')[2]}`" in text or f"`{path}`" in text, path


def test_every_key_says_what_it_means() -> None:
    def walk(model: Any, path: str) -> None:
        from hydralv_tune.config.validation import names_of, sub_model

        for name, annotation in names_of(model).items():
            inner = sub_model(annotation)
            field = next(f for n, f in model.model_fields.items() if (f.alias or n) == name)
            if inner is not None:
                walk(inner, f"{path}{name}.")
            else:
                assert field.description, f"{path}{name}"

    walk(Candidate, "")


def test_a_layer_is_not_changed_by_merging() -> None:
    overrides: Mapping[str, Any] = nested("model.loss_kwargs", [{}, {}, {}, {}, {}])
    before = json.dumps(overrides)
    candidate = load_candidate("baseline", overrides)
    candidate.as_mapping()["model"]["loss_kwargs"][0]["x"] = 1
    assert json.dumps(overrides) == before
    assert load_candidate("baseline").model.loss_kwargs[0]
