"""Planning says what a candidate costs here, and shows the patches it would train on."""

from __future__ import annotations

import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from hydralv_tune.config.candidate import Candidate
from hydralv_tune.config.errors import InputError
from hydralv_tune.config.files import candidate_from_mapping
from hydralv_tune.data.volumes import Volume
from hydralv_tune.numerics.phantom.volume import make_phantom
from hydralv_tune.trial import planning
from hydralv_tune.trial.planning import (
    _Part,
    _part_trainer,
    _predicted_s,
    draw_patches,
    plan_facts,
    training_memory_gb,
)
from hydralv_tune.trial.scoring.prediction import network_of
from hydralv_tune.trial.training.loop import build_loss
from hydralv_tune.trial.training.optimization import build_optimizer
from hydralv_tune.trial.training.sampling import ResidentVolume

# Too short for any step: the two smallest parts of one are timed all the same.
BRIEF = 1e-6
TINY: dict[str, Any] = {
    "experiment_name": "tiny",
    "system": {"training": {"batch_size": 2}},
    "model": {"architecture": "rsunet", "filters": [4, 8]},
    "data": {"patch_size": [8, 32, 32], "pad_size": [0, 0, 0], "iter_num_per_epoch": 10},
    "optimization": {
        "max_epochs": 3,
        "accumulate_grad_batches": 2,
        "scheduler": {"warmup_epochs": 0},
    },
    "inference": {"sliding_window": {"window_size": [8, 32, 32]}},
}


def candidate(**data: Any) -> Candidate:
    """Return a small candidate with some keys of `data` replaced."""
    return candidate_from_mapping({**TINY, "data": {**TINY["data"], **data}}, place="test")


@pytest.fixture(scope="module")
def volume() -> Volume:
    """Return a phantom of few voxels."""
    made = make_phantom((12, 96, 96), instances=5, seed=1)
    return Volume("phantom", made.image, made.label, made.mask > 0, made.voxel_size_nm)


def test_extents_cost_nothing_for_a_large_id(volume: Volume) -> None:
    label = np.zeros((12, 96, 96), np.int32)
    label[2:5, 10:30, 10:50] = 10**9
    label[6:12, 40:48, 60:64] = 2**31 - 1
    one = Volume("v", volume.image, label, None, volume.voxel_size_nm)
    tracemalloc.start()
    facts = plan_facts(candidate(), one, timing_s=BRIEF)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert facts["instance_extent_voxels"] == {"median": [4.5, 14.0, 22.0], "max": [6, 20, 40]}
    assert peak < 200 * 2**20


def test_steps_and_patches_follow_from_batch_and_epoch(volume: Volume) -> None:
    facts = plan_facts(candidate(), volume, timing_s=BRIEF)
    assert facts["effective_batch"] == 4
    assert facts["optimizer_steps_per_epoch"] == 3
    assert facts["patches_per_epoch"] == 12
    assert facts["optimizer_steps"] == 9
    assert facts["plan_warnings"] == []


def test_the_estimate_is_that_of_steps_really_taken(volume: Volume) -> None:
    quick = candidate_from_mapping(
        {
            **TINY,
            "system": {"training": {"batch_size": 1}},
            "data": {**TINY["data"], "patch_size": [4, 16, 16], "augmentation": {"preset": "none"}},
            "optimization": {**TINY["optimization"], "accumulate_grad_batches": 1},
        },
        place="test",
    )
    start = time.perf_counter()
    facts = plan_facts(quick, volume, timing_s=60)
    taken = time.perf_counter() - start
    assert "CPU threads" in facts["timed_on"]
    assert "scaled" not in facts["timed_on"]
    assert 1 / taken < facts["steps_per_s"] < 5000
    hours = facts["optimizer_steps"] / facts["steps_per_s"] / 3600
    assert facts["hours"] == pytest.approx(hours, rel=0.02)


def test_a_training_that_would_stop_at_once_is_timed_all_the_same(volume: Volume) -> None:
    """Steps that are not taken, since the first said stop, would be timed as free."""
    hasty = candidate_from_mapping(
        {
            **TINY,
            "data": {**TINY["data"], "patch_size": [4, 16, 16], "iter_num_per_epoch": 1},
            "monitor": {"early_stopping": {"enabled": True, "threshold": 1e6,
                                           "divergence_threshold": None}},
        },
        place="test",
    )  # fmt: skip
    cpu = torch.device("cpu")
    source = ResidentVolume(volume, hasty.data, cpu, seed=0)
    timed = _part_trainer(hasty, source, network_of(hasty), (4, 16, 16), batch=1, accumulate=1)
    timed.run_to(3)
    assert timed.step == 3


def test_what_is_too_slow_to_time_whole_is_scaled_and_said(volume: Volume) -> None:
    facts = plan_facts(candidate(), volume, timing_s=BRIEF)
    assert "scaled" in facts["timed_on"]
    assert facts["hours"] > 0


def test_a_line_through_two_parts_gives_the_whole() -> None:
    fixed, each = 0.5, 2e-6
    parts = [_Part(n, fixed + each * n) for n in (1_000.0, 64_000.0)]
    assert _predicted_s(parts, 1e7) == pytest.approx(fixed + each * 1e7)
    assert _predicted_s(parts, 64_000.0) == parts[-1].seconds
    noisy = [_Part(1_000.0, 2.0), _Part(2_000.0, 1.0)]
    assert _predicted_s(noisy, 4_000.0) == pytest.approx(2.0)


def test_the_share_of_patches_with_foreground_follows_the_sampling(volume: Volume) -> None:
    size = [4, 16, 16]
    rare = plan_facts(
        candidate(patch_size=size, sampling={"foreground_share": 0.0}), volume, timing_s=BRIEF
    )
    often = plan_facts(
        candidate(patch_size=size, sampling={"foreground_share": 1.0}), volume, timing_s=BRIEF
    )
    assert often["patches_with_foreground"]["as_sampled"] == 1
    assert rare["patches_with_foreground"]["as_sampled"] < 0.9
    assert rare["patches_with_foreground"] == {
        "random": rare["patches_with_foreground"]["as_sampled"],
        "as_sampled": rare["patches_with_foreground"]["as_sampled"],
    }
    assert often["foreground_in_patches"] > rare["foreground_in_patches"] > 0


def test_a_patch_smaller_than_instances_is_said(volume: Volume) -> None:
    facts = plan_facts(candidate(patch_size=[2, 32, 8]), volume, timing_s=BRIEF)
    told = [w for w in facts["plan_warnings"] if "data.patch_size" in w]
    assert [w.split("along ")[1][0] for w in told] == ["z", "x"]
    assert facts["instance_extent_voxels"]["median"][0] >= 3


def test_a_patch_larger_than_the_volume_is_said_and_not_timed(volume: Volume) -> None:
    large = candidate(patch_size=[16, 64, 64])
    facts = plan_facts(large, volume)
    assert facts["hours"] is None
    assert any("16 along z" in w and "12" in w for w in facts["plan_warnings"])
    with pytest.raises(InputError, match="16 along z"):
        draw_patches(large, volume, "unused")


def test_keys_without_effect_are_named(volume: Volume) -> None:
    facts = plan_facts(candidate(cache_rate=0.5), volume, timing_s=BRIEF)
    assert any("data.cache_rate" in line for line in facts["keys_without_effect"])


def test_without_a_label_there_are_steps_but_no_patches(volume: Volume, tmp_path: Path) -> None:
    bare = Volume("bare", volume.image)
    facts = plan_facts(candidate(), bare)
    assert facts["optimizer_steps"] == 9
    assert facts["hours"] is None
    with pytest.raises(InputError, match=r"'bare'.*--label"):
        draw_patches(candidate(), bare, tmp_path)


def test_the_sheet_shows_patches_and_is_the_same_again(
    volume: Volume, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "SHEET_PATCHES", 2)
    path = draw_patches(candidate(), volume, tmp_path / "new")
    assert path == tmp_path / "new" / "patches.png"
    pixels = np.asarray(Image.open(path).convert("RGB"))
    assert pixels.shape[0] > 400
    assert pixels.shape[1] > 1000
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 100
    again = draw_patches(candidate(), volume, tmp_path / "again")
    np.testing.assert_array_equal(np.asarray(Image.open(again).convert("RGB")), pixels)


def test_planning_leaves_global_random_numbers_alone(volume: Volume) -> None:
    import torch

    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    plan_facts(candidate(), volume, timing_s=BRIEF)
    torch.testing.assert_close(torch.rand(3), expected)


@pytest.mark.parametrize("name", ["monai_unet", "rsunet", "monai_segresnet"])
def test_the_memory_that_is_counted_is_about_what_a_cpu_takes(name: str) -> None:
    """Against every allocation of a real step, in the order of time, as the profiler saw them."""
    batch, patch = 4, (8, 32, 32)
    chosen = candidate_from_mapping(
        {
            "model": {"architecture": name, "filters": [8, 16, 32]},
            "data": {"patch_size": patch},
            "system": {"training": {"batch_size": batch}},
            "optimization": {"precision": "32"},
        },
        place="test",
    )
    network, loss = network_of(chosen).train(), build_loss(chosen.model)
    counted = training_memory_gb(chosen, network)
    optimizer = build_optimizer(network, loss.parameters(), chosen.optimization)
    image, targets = torch.rand(batch, 1, *patch), torch.rand(batch, 3, *patch)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as seen:
        outputs = network(image)
        heads = outputs if isinstance(outputs, list) else [outputs]
        loss(heads, targets, targets[:, :1] > 0.5).total.backward()
        optimizer.step()
    events = sorted(seen.events(), key=lambda event: event.time_range.end)
    held = np.cumsum([event.self_cpu_memory_usage for event in events]).max()
    weights = sum(4 * parameter.numel() for parameter in network.parameters())
    assert (held + weights) / 1e9 == pytest.approx(counted, rel=0.2)
