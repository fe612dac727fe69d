"""A trial from volumes to record: it keeps the best, goes on after a kill, and tells the truth."""

from __future__ import annotations

import gc
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from PIL import Image

from hydralv_tune.artifacts.records import load_checkpoint, previous, read_record, save_checkpoint
from hydralv_tune.config.candidate import Candidate, DecodingGrid
from hydralv_tune.config.errors import InputError, TrialFailed, TrialInterrupted, TrialTakenOver
from hydralv_tune.config.files import candidate_from_mapping
from hydralv_tune.config.search_space import Objective
from hydralv_tune.data.formats.files import LazyArray
from hydralv_tune.data.volumes import Volume, VolumePaths, read_labels, write_array
from hydralv_tune.numerics.metrics import scores
from hydralv_tune.numerics.watershed.decoders import decode
from hydralv_tune.trial import state
from hydralv_tune.trial.record import plan_findings
from hydralv_tune.trial.run import Evaluation, TrialSpec, run_trial, stop_on_signal
from hydralv_tune.trial.scoring import evaluation as scoring
from hydralv_tune.trial.scoring.evaluation import Outcome, better, evaluate
from hydralv_tune.trial.scoring.prediction import load_network, network_of, predict
from hydralv_tune.trial.state import BestUnit, TrialRun
from hydralv_tune.trial.training import sampling
from hydralv_tune.trial.training.lazy_reader import held_out_volumes

pytestmark = pytest.mark.usefixtures("without_pictures")  # the fixture `finished` draws them

GRID = DecodingGrid.model_validate(
    {
        "grid": {
            "binary_threshold": {"seed": [0.3, 0.5], "foreground": [0.2, 0.4]},
            "contour_threshold": {"seed": [0.6, None], "foreground": [None]},
            "distance_threshold": {"seed": [-0.3, 0.2], "foreground": [-0.9]},
            "min_seed_size": [1],
        }
    }
)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def volume(seed: int = 0, name: str = "balls") -> Volume:
    """Return a volume (8, 32, 48) with three bright balls in noise."""
    rng = np.random.default_rng(seed)
    label = np.zeros((8, 32, 48), np.uint16)
    grid = np.indices(label.shape)
    for number, centre in enumerate([(3, 9, 9), (4, 22, 20), (3, 12, 36)], 1):
        away = sum((g - c) ** 2 * w for g, c, w in zip(grid, centre, (4, 1, 1), strict=True))
        label[away < 30] = number
    image = np.where(label > 0, 190, 80) + rng.normal(0, 10, label.shape)
    mask = np.ones(label.shape, bool)
    mask[:, :2] = False
    return Volume(name, image.clip(0, 255).astype(np.uint8), label, mask, (30.0, 8.0, 8.0))


def candidate(**sections: Any) -> Candidate:
    """Return a candidate that learns bright balls within seconds."""
    small: dict[str, Any] = {
        "system": {"training": {"batch_size": 2}},
        "model": {
            "architecture": "monai_unet", "filters": [4, 8], "num_res_units": 0,
            "loss_balancing": {"strategy": "uncertainty"},
            "loss_functions": ["DiceLoss", "BCEWithLogitsLoss", "DiceLoss", "BCEWithLogitsLoss",
                               "SmoothL1Loss"],
        },
        "data": {
            "patch_size": [4, 16, 16], "pad_size": [0, 0, 0], "iter_num_per_epoch": 20,
            "augmentation": {"preset": "some"}, "sampling": {"foreground_share": 0.7},
        },
        "optimization": {
            "max_epochs": 6, "accumulate_grad_batches": 1, "precision": "32",
            "optimizer": {"lr": 2e-2}, "scheduler": {"warmup_epochs": 0, "min_lr": 1e-4},
            "ema": {"enabled": True, "decay": 0.8, "warmup_steps": 2},
        },
        "monitor": {"evaluation": {"count": 3}, "early_stopping": {"enabled": False}},
        "inference": {"sliding_window": {"window_size": [4, 32, 32]},
                      "test_time_augmentation": {"enabled": False}},
    }  # fmt: skip
    for name, keys in sections.items():
        small[name] = {**small.get(name, {}), **keys}
    return candidate_from_mapping(small, place="test")


def brief(**sections: Any) -> Candidate:
    """Return a candidate that trains for four steps, one an epoch, and learns nothing."""
    base: dict[str, Any] = {
        "data": {"patch_size": [4, 16, 16], "pad_size": [0, 0, 0], "iter_num_per_epoch": 2,
                 "augmentation": {"preset": "none"}, "sampling": {"foreground_share": 0.7}},
        "optimization": {"max_epochs": 4, "accumulate_grad_batches": 1, "precision": "32",
                         "optimizer": {"lr": 2e-2}},
        "monitor": {"evaluation": {"count": 2}, "early_stopping": {"enabled": False}},
    }  # fmt: skip
    return candidate(**{name: {**base.get(name, {}), **sections.get(name, {})}
                        for name in dict.fromkeys([*base, *sections])})  # fmt: skip


def written(folder: Path, given: Volume) -> VolumePaths:
    """Write a volume and return where it lies."""
    folder.mkdir(parents=True, exist_ok=True)
    assert given.label is not None
    assert given.mask is not None
    arrays = {"im": given.image, "label": given.label, "mask": given.mask.astype(np.uint8)}
    for name, array in arrays.items():
        write_array(folder / f"{name}.h5", array, voxel_size_nm=given.voxel_size_nm)
    image, label, mask = (str(folder / f"{name}.h5") for name in arrays)
    return VolumePaths(given.name, image, label, mask)


def spec(out: Path, chosen: Candidate | None = None, **keys: Any) -> TrialSpec:
    values: dict[str, Any] = {
        "number": 4, "root": 4, "candidate": chosen or candidate(), "objective": Objective(),
        "grid": GRID, "volumes": [], "out": str(out), "device": "cpu", "threads": 1, "study": "s",
    }  # fmt: skip
    return TrialSpec(**{**values, **keys})


def run(given: TrialSpec, report: Callable[[Evaluation], None] | None = None, **keys: Any) -> Any:
    keys = {"volumes": [volume()], **keys}
    return run_trial(given, report or (lambda _: None), **keys)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, list[Evaluation], Path]:
    """Return record, evaluations and folder of one trial."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("trial")
    seen: list[Evaluation] = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("hydralv_tune.trial.state.LEAST_SWEEP_S", 600.0)  # no sweep is thinned
        return run(spec(out), seen.append), seen, out


def test_a_trial_learns_what_it_is_given(finished: Any) -> None:
    record, _, _ = finished
    assert record.metrics["f1_iou50"] == 1.0
    assert record.value < 0.2


def test_it_reports_each_evaluation_with_the_best_so_far(finished: Any) -> None:
    record, seen, _ = finished
    assert [e.step for e in seen] == [1, 2, 3]
    assert [e.epoch for e in seen] == [2, 4, 6]
    assert {"adapted_rand_error", "f1_iou50", "missed_count"} <= set(seen[0].metrics)
    assert {"total", "label", "boundary", "edt"} <= set(seen[0].losses)
    assert seen[0].seconds < seen[1].seconds < seen[2].seconds
    json.dumps(seen[-1].as_mapping())
    # Intermediate and final values are one quantity.
    assert [row["thinned"] for row in record.history] == [None, None, None]
    assert record.value == seen[-1].value


def test_it_leaves_every_file_it_promises(finished: Any) -> None:
    record, _, out = finished
    names = {entry.name for entry in out.iterdir()}
    assert {
        "last.ckpt", "best.ckpt", "record.json", "sweep.parquet", "config.yaml",
        "contact_sheet.png", "sweep.png", "losses.png", "tensorboard",
    } <= names  # fmt: skip
    assert not [name for name in names if name.endswith(".tmp")]
    for name in ("contact_sheet.png", "sweep.png", "losses.png"):
        with Image.open(out / name) as picture:
            assert min(picture.size) > 100
    table = pd.read_parquet(out / "sweep.parquet")
    assert len(table) == record.sweep["combinations"] == 16
    assert yaml.safe_load((out / "config.yaml").read_text()) == record.config


def test_the_best_checkpoint_gives_the_recorded_score(finished: Any) -> None:
    record, _, _ = finished
    network, chosen = load_network(record.checkpoint)
    given = volume()
    maps = predict(network, given.image, chosen, mask=given.mask)
    kept = load_checkpoint(record.checkpoint)
    assert kept["decoding"] == record.decoding
    segments = decode(kept["decoding"]["name"], maps, given.mask, **kept["decoding"]["kwargs"])
    score = scores.score_labels(prediction=segments, truth=given.label, mask=given.mask)
    assert score.adapted_rand_error == record.metrics["adapted_rand_error"]
    assert score.voi_split == record.metrics["voi_split"]
    assert list(score.invented) == list(record.metrics["invented"])


def test_the_record_is_complete(finished: Any) -> None:
    record, _, out = finished
    assert read_record(out / "record.json").as_mapping() == record.as_mapping()
    assert record.state == "complete"
    assert (record.number, record.root, record.study, record.seed) == (4, 4, "s", 42)
    assert record.config == candidate().as_mapping()
    assert record.provenance["versions"]["torch"]
    assert record.device["type"] == "cpu"
    assert record.split["kind"] == "none"
    assert "optimistic" in record.split["sentence"]
    facts = record.volumes[0]
    assert (facts["name"], list(facts["shape"])) == ("balls", [8, 32, 48])
    assert facts["fingerprint"] == volume().fingerprint()
    training = record.training
    assert training["effective_batch"] == 2
    assert training["steps"] == training["steps_done"] == 60
    assert training["patches"] == 120
    assert training["patches_per_s"] == pytest.approx(2 * training["steps_per_s"])
    assert set(training["share"]) == {"data", "forward_backward", "optimizer", "evaluation"}
    assert sum(training["share"].values()) == pytest.approx(1.0)
    row = record.history[0]
    assert {"total", "label", "boundary", "edt", "label_DiceLoss_0"} <= set(row["losses"])
    assert {"adapted_rand_precision", "adapted_rand_recall", "adapted_rand_error_foreground",
            "split_count", "merged_count", "invented_count"} <= set(row["metrics"])  # fmt: skip
    assert row["lr"] == pytest.approx(2e-2 * 0.75, rel=0.02)
    assert record.history[0]["task_weights"] != record.history[2]["task_weights"]
    assert any(line.startswith("loss ") for line in record.verdicts)
    assert {"best_by_f1", "best_unguarded", "plateau", "seconds"} <= set(record.sweep)
    summary = record.summary()
    assert summary["adapted_rand_error"] == record.metrics["adapted_rand_error"]
    assert summary["losses"]["total"] == record.history[-1]["losses"]["total"]


def test_tensorboard_has_scalars_and_slices_of_every_evaluation(finished: Any) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    record, _, out = finished
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    losses = events.Scalars("loss/total")
    assert [event.step for event in losses] == [20, 40, 60]
    assert losses[-1].value == pytest.approx(record.history[-1]["losses"]["total"], rel=1e-5)
    assert len(events.Tags()["images"]) == 2


def test_a_finished_trial_returns_its_record_at_once(finished: Any) -> None:
    record, _, out = finished
    before = (out / "record.json").stat().st_mtime_ns
    seen: list[Evaluation] = []
    again = run(spec(out), seen.append)
    assert again.as_mapping() == record.as_mapping()
    assert seen == []
    assert (out / "record.json").stat().st_mtime_ns == before


def test_a_finished_trial_sweeps_another_grid_without_training(
    finished: Any, tmp_path: Path
) -> None:
    record, _, whole = finished
    shutil.copytree(whole, tmp_path / "copy")
    other = GRID.model_copy(update={"grid": {**GRID.grid, "min_seed_size": [1, 6]}})
    again = run(spec(tmp_path / "copy", grid=other))
    assert again.sweep["combinations"] == 32
    assert again.training["steps_done"] == 60
    assert again.training["seconds"]["data"] == record.training["seconds"]["data"]
    assert again.value <= record.value + 0.002  # a near tie may go to the higher F1


def test_a_folder_of_another_trial_is_refused(finished: Any) -> None:
    _, _, out = finished
    other = candidate(optimization={"max_epochs": 6, "optimizer": {"lr": 1e-3}})
    with pytest.raises(InputError, match=r"optimization\.optimizer\.lr = 0\.02"):
        run(spec(out, other))
    with pytest.raises(InputError, match="other volumes"):
        run(spec(out), volumes=[volume(seed=9)])
    threads = candidate(system={"training": {"batch_size": 2}, "cpu_threads": 2})
    assert run(spec(out, threads)).state == "complete"


def test_a_finished_folder_answers_for_the_volumes_on_disk_alone(tmp_path: Path) -> None:
    """As `train` does it: the volumes are named, not given."""
    same, other = (written(tmp_path / str(seed), volume(seed)) for seed in (0, 9))
    given = spec(tmp_path / "out", brief(), volumes=[same])
    record = run_trial(given, lambda _: None)
    assert run_trial(given, lambda _: None).as_mapping() == record.as_mapping()
    with pytest.raises(InputError, match="other volumes"):
        run_trial(replace(given, volumes=[other]), lambda _: None)
    write_array(Path(same.label or ""), np.roll(volume().label, 1, axis=2))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="other volumes"):
        run_trial(given, lambda _: None)


@pytest.mark.parametrize("ended", ["finished", "stopped"])
def test_a_trial_does_not_go_on_with_fewer_volumes(tmp_path: Path, ended: str) -> None:
    both = [volume(1, "one"), volume(2, "two")]

    def report(_: Evaluation) -> None:
        if ended == "stopped":
            raise KilledError

    with suppress(KilledError):
        run(spec(tmp_path, brief()), report, volumes=both)
    for given in (both[:1], both[::-1], [*both, volume(3, "three")]):
        with pytest.raises(InputError, match="other volumes"):
            run(spec(tmp_path, brief()), volumes=given)
    assert [facts["name"] for facts in run(spec(tmp_path, brief()), volumes=both).volumes] == [
        "one", "two",
    ]  # fmt: skip


def test_a_held_out_volume_is_scored_within_its_mask(tmp_path: Path) -> None:
    held = written(tmp_path / "held", volume(3, "held"))
    data = {"split": {"kind": "volumes"}, "val_image": held.image, "val_label": held.label}
    whole = run(spec(tmp_path / "whole", brief(data=data)))
    mask = np.zeros(volume().image.shape, np.uint8)
    mask[:, :, :14] = 1
    write_array(Path(held.mask or ""), mask)
    part = run(spec(tmp_path / "part", brief(data={**data, "val_mask": held.mask})))
    assert [r.metrics["instances_true"] for r in (whole, part)] == [3, 1]


def test_what_is_no_label_in_the_training_is_none_in_the_held_out_volume(tmp_path: Path) -> None:
    held = written(tmp_path / "held", volume(3, "held"))
    data = {"split": {"kind": "volumes"}, "val_image": held.image, "val_label": held.label}
    label = read_labels(held.label or "").astype(np.int32)
    label[label == 1] = -1
    label[label == 2] = 999
    write_array(Path(held.label or ""), label)
    paths = replace(written(tmp_path / "train", volume()), ignore_labels=(-1, 999))
    record = run(spec(tmp_path / "out", brief(data=data), volumes=[paths]), volumes=None)
    assert record.metrics["instances_true"] == 1
    with pytest.raises(InputError, match="--ignore-label -1"):
        run(spec(tmp_path / "unsaid", brief(data=data)))


def test_a_finished_folder_asks_for_its_held_out_volume_too(tmp_path: Path) -> None:
    held = written(tmp_path / "held", volume(3, "held"))
    data = {"split": {"kind": "volumes"}, "val_image": held.image, "val_label": held.label}
    given = spec(tmp_path / "out", brief(data=data))
    record = run(given)
    assert run(given).as_mapping() == record.as_mapping()
    write_array(Path(held.image), volume(4).image)
    with pytest.raises(InputError, match="other volumes"):
        run(given)


class KilledError(Exception):
    """What ends a trial from outside."""


def final_weights(out: Path) -> dict[str, torch.Tensor]:
    state = load_checkpoint(out / "last.ckpt")["folds"][0]
    return {**state["network"], **{f"average.{k}": v for k, v in
                                   state["average"]["weights"].items()}}  # fmt: skip


@pytest.mark.parametrize("after", [1, 2])
def test_a_killed_trial_goes_on_to_the_same_weights_bit_for_bit(
    finished: Any, tmp_path: Path, after: int
) -> None:
    record, seen, whole = finished

    def kill(evaluation: Evaluation) -> None:
        if evaluation.step == after:
            raise KilledError

    with pytest.raises(KilledError):
        run(spec(tmp_path), kill)
    assert read_record(tmp_path / "record.json").state == "stopped"
    again: list[Evaluation] = []
    second = run(spec(tmp_path), again.append)
    expected, got = final_weights(whole), final_weights(tmp_path)
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[key], got[key]) for key in expected)
    # What was reported before is reported again: the database may lack the last of it.
    assert [e.step for e in again] == [1, 2, 3]
    assert second.value == record.value
    assert [e.losses for e in again] == [e.losses for e in seen]
    assert any("continued from step" in note for note in second.notes)


STRICT = GRID.model_copy(
    update={
        "grid": {
            **GRID.grid,
            "binary_threshold": {"seed": [0.9], "foreground": [0.9]},
            "distance_threshold": {"seed": [0.2], "foreground": [-0.9]},
        }
    }
)
"""Thresholds under which each evaluation is better than the one before, and none is perfect."""


def with_grid(grid: DecodingGrid) -> dict[str, Any]:
    """Return what a study asks for: the grid, and a candidate that names it."""
    chosen = candidate(test={"decoding_grid": grid.model_dump(mode="json")})
    return {"chosen": chosen, "grid": grid}


def test_a_trial_goes_on_with_another_grid_and_ranks_by_it(finished: Any, tmp_path: Path) -> None:
    def kill(evaluation: Evaluation) -> None:
        raise KilledError

    with pytest.raises(KilledError):
        run(spec(tmp_path / "changed", **with_grid(GRID)), kill)
    before = read_record(tmp_path / "changed" / "record.json")
    expected = run(spec(tmp_path / "strict", **with_grid(STRICT)))
    seen: list[Evaluation] = []
    record = run(spec(tmp_path / "changed", **with_grid(STRICT)), seen.append)
    assert before.value == 0.0
    # By the old value, the first evaluation would have stayed the best for ever.
    values = [row["value"] for row in expected.history]
    assert [e.value for e in seen] == pytest.approx(values)
    assert record.value == expected.value == values[2]
    assert record.decoding == expected.decoding
    assert record.grid == STRICT.model_dump(mode="json")
    assert record.config["test"]["decoding_grid"] == record.grid
    assert [row["value"] for row in record.history] == [0.0, *values[1:]]
    weights = final_weights(finished[2]), final_weights(tmp_path / "changed")
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    (note,) = [note for note in record.notes if "another grid" in note]
    assert note.startswith("up to evaluation 1 the checkpoints were ranked by another grid")
    assert f"{values[0]:.4f} instead of 0.0000" in note


def test_what_is_scored_anew_stands_whole_in_record_and_checkpoint(tmp_path: Path) -> None:
    def kill(evaluation: Evaluation) -> None:
        raise KilledError

    for grid in (GRID, STRICT):
        with pytest.raises(KilledError):
            run(spec(tmp_path, **with_grid(grid)), kill)
    record = read_record(tmp_path / "record.json")
    best = load_checkpoint(tmp_path / "best.ckpt")
    assert record.value == best["metrics"]["adapted_rand_error"] > 0.0
    assert record.metrics["adapted_rand_error"] == record.value
    assert record.decoding == best["decoding"]
    assert record.decoding["kwargs"]["binary_threshold"] == [0.9, 0.9]
    assert len(pd.read_parquet(tmp_path / "sweep.parquet")) == 2
    # Killed again, it is not scored a third time.
    again = run(spec(tmp_path, **with_grid(STRICT)))
    assert sum("another grid" in note for note in again.notes) == 1


def test_a_trial_goes_on_with_another_objective_and_ranks_by_it(tmp_path: Path) -> None:
    def kill(evaluation: Evaluation) -> None:
        raise KilledError

    with pytest.raises(KilledError):
        run(spec(tmp_path, grid=STRICT), kill)
    objective = Objective(metric="voi")
    seen: list[Evaluation] = []
    record = run(spec(tmp_path, grid=STRICT, objective=objective), seen.append)
    voi = record.metrics["voi_split"] + record.metrics["voi_merge"]
    assert record.value == pytest.approx(voi)
    assert seen[0].value == pytest.approx(
        seen[0].metrics["voi_split"] + seen[0].metrics["voi_merge"]
    )
    assert any("another objective" in note for note in record.notes)


def test_a_process_that_is_killed_goes_on_to_the_same_weights(
    finished: Any, tmp_path: Path
) -> None:
    """As above, with SIGKILL in the middle of a step and another process to go on."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[2])\n"
        "from pathlib import Path; import test_trial as t\n"
        "t.run(t.spec(Path(sys.argv[1])))\n"
    )
    words = [sys.executable, "-c", code, str(tmp_path), str(Path(__file__).parent)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(words, env=environment) as process:
        deadline = time.monotonic() + 120
        while not (tmp_path / "last.ckpt").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.05)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "sweep.parquet").exists()
    record = run(spec(tmp_path))
    assert any("continued from step 20" in note for note in record.notes)
    expected, got = final_weights(finished[2]), final_weights(tmp_path)
    assert all(torch.equal(expected[key], got[key]) for key in expected)


def test_a_truncated_state_falls_back_and_the_record_says_so(finished: Any, tmp_path: Path) -> None:
    def kill(evaluation: Evaluation) -> None:
        if evaluation.step == 2:
            raise KilledError

    with pytest.raises(KilledError):
        run(spec(tmp_path), kill)
    last = tmp_path / "last.ckpt"
    assert previous(last).exists()
    last.write_bytes(last.read_bytes()[:1000])
    second = run(spec(tmp_path))
    assert any("last.previous.ckpt, is used" in note for note in second.notes)
    expected, got = final_weights(finished[2]), final_weights(tmp_path)
    assert all(torch.equal(expected[key], got[key]) for key in expected)


def test_a_stop_saves_in_the_middle_and_goes_on_to_the_same_weights(
    finished: Any, tmp_path: Path
) -> None:
    asked = iter(range(1000))
    with pytest.raises(TrialInterrupted, match="step 27 of 60"):
        run(spec(tmp_path), should_stop=lambda: next(asked) == 27)
    assert read_record(tmp_path / "record.json").state == "interrupted"
    second = run(spec(tmp_path))
    assert any("continued from step 27" in note for note in second.notes)
    expected, got = final_weights(finished[2]), final_weights(tmp_path)
    assert all(torch.equal(expected[key], got[key]) for key in expected)
    assert second.history[1]["losses"] == finished[0].history[1]["losses"]


def test_external_weights_are_read_once_and_stay_in_the_record(tmp_path: Path) -> None:
    given = brief()
    kept = {f"model.{key}": value for key, value in network_of(given).state_dict().items()}
    path = tmp_path / "pretrained.ckpt"
    torch.save({"state_dict": kept}, path)
    started = brief(model={**given.model.model_dump(mode="json"),
                           "external_weights_path": str(path)})  # fmt: skip
    whole = run(spec(tmp_path / "whole", started))
    assert whole.weights is not None
    assert whole.weights.startswith("pretrained.ckpt: ")
    assert "(100.0%)" in whole.weights

    with pytest.raises(KilledError):
        run(spec(tmp_path / "cut", started), kill_after_the_first)
    path.unlink()
    second = run(spec(tmp_path / "cut", started))
    assert second.weights == whole.weights
    expected, got = final_weights(tmp_path / "whole"), final_weights(tmp_path / "cut")
    assert all(torch.equal(expected[key], got[key]) for key in expected)
    with pytest.raises(InputError, match="no such checkpoint"):
        run(spec(tmp_path / "new", started))


def kill_after_the_first(_: Evaluation) -> None:
    raise KilledError


def test_a_continued_trial_knows_its_best(tmp_path: Path) -> None:
    """At this rate nothing is learned, so the second evaluation is no better than the first."""
    still = brief(optimization={"optimizer": {"lr": 1e-12},
                                "scheduler": {"warmup_epochs": 0, "min_lr": 0.0}})  # fmt: skip
    whole = run(spec(tmp_path / "whole", still))
    with pytest.raises(KilledError):
        run(spec(tmp_path / "cut", still), kill_after_the_first)
    second = run(spec(tmp_path / "cut", still))
    assert [row["is_best"] for row in whole.history] == [True, False]
    for row, expected in zip(second.history, whole.history, strict=True):
        for key in ("is_best", "best_value", "best_f1_iou50"):
            assert row[key] == expected[key]
    kept = [load_checkpoint(tmp_path / out / "best.ckpt")["weights"] for out in ("whole", "cut")]
    assert all(torch.equal(kept[0][key], kept[1][key]) for key in kept[0])


def test_a_state_of_another_version_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KilledError):
        run(spec(tmp_path, brief()), kill_after_the_first)
    last = tmp_path / "last.ckpt"
    save_checkpoint(last, {**load_checkpoint(last), "version": 1})
    with pytest.raises(InputError, match=r"last\.ckpt: .* in format 1, but .* from 2\. Give"):
        run(spec(tmp_path, brief()))


def test_what_the_training_met_stays_in_the_record(tmp_path: Path) -> None:
    """A trial that ran out of memory before it was killed: its state says so."""
    with pytest.raises(KilledError):
        run(spec(tmp_path, brief()), kill_after_the_first)
    last = tmp_path / "last.ckpt"
    state = load_checkpoint(last)
    state["folds"][0] |= {"batch_size": 1, "notes": ["out of memory at step 2: so and so"]}
    save_checkpoint(last, state)
    record = run(spec(tmp_path, brief()))
    assert "out of memory at step 2: so and so" in record.notes
    training = record.training
    assert (training["batch_size"], training["accumulate_grad_batches"]) == (1, 2)
    assert (training["effective_batch"], training["patches"]) == (2, 8)


class Exhausted:
    """Stands before a function, and says once that memory ran out, as CUDA or NumPy would."""

    def __init__(self, function: Callable[..., Any], error: Exception) -> None:
        self.function, self.error, self.calls = function, error, 0

    def __call__(self, *arguments: Any, **keys: Any) -> Any:
        self.calls += 1
        if self.calls == 1:
            raise self.error
        return self.function(*arguments, **keys)


@pytest.mark.parametrize(
    ("where", "name", "error"),
    [
        (sampling, "upload", torch.OutOfMemoryError("CUDA out of memory. Tried 2.00 GiB.")),
        (scoring, "sweep", MemoryError("Unable to allocate 2.00 GiB")),
    ],
    ids=["upload", "sweep"],
)
def test_memory_that_runs_out_beside_the_network_fails_and_the_next_attempt_ends_as_otherwise(
    where: Any, name: str, error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run(spec(tmp_path / "whole", brief()))
    hungry = Exhausted(getattr(where, name), error)
    monkeypatch.setattr(where, name, hungry)
    with pytest.raises(TrialFailed, match="out of memory") as failed:
        run(spec(tmp_path / "trial", brief()))
    assert failed.value.retry
    record = run(spec(tmp_path / "trial", brief()))
    assert hungry.calls > 1
    assert record.value == expected.value
    assert record.training["steps_done"] == expected.training["steps_done"]


def test_a_trial_that_ran_out_of_memory_leaves_none_to_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive = []

    def remembered(*arguments: Any, **keys: Any) -> Any:
        network = network_of(*arguments, **keys)
        alive.append(weakref.ref(network))
        network.register_forward_pre_hook(run_out)
        return network

    def run_out(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(state, "network_of", remembered)
    with suppress(TrialFailed):
        run(spec(tmp_path, brief()))
    gc.collect()
    assert alive
    assert not [network for network in alive if network() is not None]


def test_what_another_attempt_has_taken_over_is_not_touched_any_more(tmp_path: Path) -> None:
    written: dict[str, bytes] = {}

    def answer(evaluation: Evaluation) -> None:
        written.update({p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()})
        raise TrialTakenOver("by another")

    with pytest.raises(TrialTakenOver):
        run(spec(tmp_path), answer)
    assert read_record(tmp_path / "record.json").state == "running"
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()} == written


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_asks_to_stop_and_a_second_one_ends_at_once(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with stop_on_signal() as should_stop:
        assert not should_stop()
        os.kill(os.getpid(), number)
        assert should_stop()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
    assert signal.getsignal(number) is before


def test_a_spec_survives_the_way_to_another_process(tmp_path: Path) -> None:
    given = spec(tmp_path, volumes=[VolumePaths("v", "im.h5", "label.h5", None)], timeout_s=9.5)
    assert TrialSpec.from_mapping(json.loads(json.dumps(given.as_mapping()))) == given


def wild() -> Candidate:
    """Return a candidate whose loss is not finite before its first evaluation."""
    return candidate(
        optimization={
            "max_epochs": 6, "optimizer": {"lr": 9.0}, "gradient_clip_val": 0,
            "ema": {"enabled": False},
        },
        model={"architecture": "rsunet", "filters": [4, 8], "norm": "none", "num_res_units": None,
               "loss_functions": ["MSELoss"] * 5,
               "loss_kwargs": [{"tanh": False}] * 5},
        monitor={"evaluation": {"count": 1}, "early_stopping": {"enabled": False}},
    )  # fmt: skip


def test_a_loss_that_diverges_fails_without_a_retry(tmp_path: Path) -> None:
    with pytest.raises(TrialFailed, match=r"not finite at step \d+: total") as error:
        run(spec(tmp_path, wild()))
    assert not error.value.retry
    record = read_record(tmp_path / "record.json")
    assert record.state == "fail"
    assert "not finite at step" in str(record.error)
    assert record.value is None or np.isfinite(record.value)


def test_a_stop_after_a_loss_went_bad_saves_nothing_and_fails_as_it_would_have(
    tmp_path: Path,
) -> None:
    with pytest.raises(TrialFailed, match="not finite") as uninterrupted:
        run(spec(tmp_path / "whole", wild()))
    found = re.search(r"at step (\d+)", uninterrupted.value.reason)
    assert found is not None
    asked = iter(range(1000))
    with pytest.raises(TrialFailed) as stopped:
        run(spec(tmp_path / "cut", wild()), should_stop=lambda: next(asked) > int(found[1]))
    assert stopped.value.reason == uninterrupted.value.reason
    assert not (tmp_path / "cut" / "last.ckpt").exists()
    assert read_record(tmp_path / "cut" / "record.json").state == "fail"


def test_a_trial_that_takes_too_long_fails(tmp_path: Path) -> None:
    with pytest.raises(TrialFailed, match=r"took longer than 0\.001 s") as error:
        run(spec(tmp_path, timeout_s=0.001))
    assert not error.value.retry


def test_a_trial_whose_time_is_up_counts_with_its_best_evaluation(tmp_path: Path) -> None:
    def slow(_: Evaluation) -> None:
        time.sleep(5.0)

    record = run(spec(tmp_path, brief(), timeout_s=5.0), slow)
    assert record.state == "complete"
    assert record.training["steps_done"] < 4
    assert any("its time of 5 s was over" in note for note in record.notes)
    assert read_record(tmp_path / "record.json").value == record.value
    # What is complete is not trained again.
    assert run(spec(tmp_path, brief()), slow).value == record.value


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"data": {"patch_size": [16, 16, 16]}}, r"Volume 'balls'.*patch_size is 16 along z"),
        ({"data": {"patch_size": [4, 16, 16], "split": {"kind": "holdout"}}}, "to train on"),
        ({"model": {"external_weights_path": "none.ckpt"}}, r"none\.ckpt: no such checkpoint"),
    ],
)
def test_a_candidate_that_does_not_fit_the_volumes_is_the_user_s_error(
    tmp_path: Path, sections: dict[str, Any], said: str
) -> None:
    with pytest.raises(InputError, match=said):
        run(spec(tmp_path, candidate(**sections)))


def test_volumes_are_read_from_their_paths_and_lazily_where_large(
    finished: Any, tmp_path: Path
) -> None:
    given = volume()
    paths = [written(tmp_path, given)]
    expected = final_weights(finished[2])
    size = given.image.size
    for limit_gb, scored in ((8.0, 8), (size * 10 / 1e9 * 0.99, 1)):
        data = {**candidate().data.model_dump(mode="json"), "memory_limit_gb": limit_gb}
        out = tmp_path / f"out_{scored}"
        record = run_trial(spec(out, candidate(data=data), volumes=paths), lambda _: None)
        got = final_weights(out)
        # Read lazily, the patches are the same, and so are the weights.
        assert all(torch.equal(expected[key], got[key]) for key in expected)
        lazy = [note for note in record.notes if "read lazily" in note]
        assert len(lazy) == (limit_gb < 8)


def test_a_holdout_is_scored_where_it_was_not_trained(tmp_path: Path) -> None:
    data = {
        **candidate().data.model_dump(mode="json"),
        "split": {"kind": "holdout", "axis": 2, "fraction": 0.4, "margin": 2},
    }
    record = run(spec(tmp_path, candidate(data=data)))
    assert record.split["folds"][0]["train"] == ["balls[x 0:27] 8×32×27"]
    assert record.split["folds"][0]["score"] == ["balls[x 29:48] 8×32×19"]
    assert record.metrics["instances_true"] == 1
    assert "held out" in record.split["sentence"]


@pytest.mark.parametrize("limit_gb", [8.0, 40 * 32 * 48 / 1e9], ids=["in memory", "on disk"])
def test_a_part_is_scored_as_a_prediction_of_the_whole_volume_would_be(limit_gb: float) -> None:
    """The mean of a section grows, so a part that was normalised by itself would look different."""
    given = volume()
    image = given.image // 2 + np.arange(8, dtype=np.uint8)[:, None, None] * 15
    data = {
        **candidate().data.model_dump(mode="json"),
        "split": {"kind": "holdout", "axis": 0, "fraction": 0.5, "margin": 0},
        "memory_limit_gb": limit_gb,
        "image_transform": {"normalize": "z_volume"},
    }
    chosen = candidate(data=data)
    trial = TrialRun(spec(Path("unused"), chosen), [replace(given, image=image)], [],
                     torch.device("cpu"))  # fmt: skip
    fold = trial.folds[0]
    network = torch.nn.Conv3d(1, 3, 1)
    unit = BestUnit("all", network, fold.score)
    outcome = evaluate([unit], chosen, GRID, Objective(), device=torch.device("cpu"), threads=1)
    whole = predict(network, image, chosen)
    # Of the upper half, the first section has most truth; over the limit it is scored alone.
    part = whole[:, 4:] if limit_gb == 8.0 else whole[:, 4:5]
    inside = fold.score[0].mask
    assert np.abs(outcome.probabilities[0] - part)[:, inside].max() < 2e-3
    trial.close()


def test_a_volume_of_its_own_is_scored_where_the_candidate_names_one(tmp_path: Path) -> None:
    other = volume(3, "other")
    write_array(tmp_path / "val.h5", other.image)
    write_array(tmp_path / "val_label.h5", other.label)
    data = {
        **candidate().data.model_dump(mode="json"),
        "split": {"kind": "volumes"},
        "val_image": str(tmp_path / "val.h5"),
        "val_label": str(tmp_path / "val_label.h5"),
    }
    record = run(spec(tmp_path / "out", candidate(data=data)))
    assert record.split["folds"][0]["train"] == ["balls 8×32×48"]
    assert record.split["folds"][0]["score"] == ["val 8×32×48"]
    assert [facts["name"] for facts in record.volumes] == ["balls", "val"]
    assert "not trained on" in record.split["sentence"]
    # Over the limit it stays on disk, as one that is trained on does.
    for limit_gb, on_disk in ((8.0, False), (1e-4, True)):
        limited = candidate(data={**data, "memory_limit_gb": limit_gb})
        opened = held_out_volumes(limited.data, [])[0].image
        assert isinstance(getattr(opened, "array", None), LazyArray) == on_disk


@pytest.mark.parametrize(
    ("split", "said"),
    [
        ({"kind": "holdout", "axis": 2, "fraction": 0.4, "margin": 2}, "held out"),
        ({"kind": "volumes", "volumes": ["two"]}, "not trained on"),
        (
            {"kind": "cross_validation", "folds": 2},
            "by a network not trained on it",
        ),
        ({"kind": "cross_validation", "folds": 3, "axis": 2, "margin": 0}, "held out in turn"),
        ({"kind": "blocks", "blocks": [1, 1, 2], "margin": 0}, "1×1×2 blocks"),
    ],
)
def test_every_split_admits_that_thresholds_were_chosen_on_what_is_scored(
    tmp_path: Path, split: dict[str, Any], said: str
) -> None:
    given = spec(tmp_path, brief(data={"split": split}))
    made = TrialRun(given, [volume(1, "one"), volume(2, "two")], [], torch.device("cpu"))
    made.close()
    sentence = made.split.as_mapping()["sentence"]
    assert said in sentence
    assert sentence.endswith("were chosen there, so the score is optimistic")


def test_cross_validation_scores_the_mean_and_keeps_each_fold(tmp_path: Path) -> None:
    data = {
        **candidate().data.model_dump(mode="json"),
        "split": {"kind": "cross_validation", "folds": 2},
    }
    seen: list[Evaluation] = []
    volumes = [volume(1, "one"), volume(2, "two")]
    record = run(spec(tmp_path, candidate(data=data)), seen.append, volumes=volumes)
    assert [fold["name"] for fold in record.folds] == ["fold_1", "fold_2"]
    values = [fold["value"] for fold in record.folds]
    assert record.value == pytest.approx(np.mean(values))
    errors = [fold["metrics"]["adapted_rand_error"] for fold in record.folds]
    assert record.metrics["adapted_rand_error"] == pytest.approx(np.mean(errors))
    one, two = (load_checkpoint(tmp_path / f"fold_{n}" / "best.ckpt") for n in (1, 2))
    assert any(not torch.equal(one["weights"][k], two["weights"][k]) for k in one["weights"])
    root = load_checkpoint(tmp_path / "best.ckpt")
    best = (one, two)[int(np.argmin(values))]
    assert all(torch.equal(root["weights"][k], best["weights"][k]) for k in root["weights"])
    assert seen[-1].value == pytest.approx(record.value)
    for evaluation in seen:
        assert len(evaluation.best_folds or []) == 2
        assert evaluation.value == pytest.approx(np.mean(evaluation.best_folds))


def test_a_fold_that_stops_early_counts_with_its_last_losses_and_the_rest_goes_on(
    tmp_path: Path,
) -> None:
    """The first epoch of fold 1 has a loss of 1.88, no epoch of fold 2 one over 1.68."""

    def chosen(divergence_threshold: float) -> TrialSpec:
        stopping = {"enabled": True, "divergence_threshold": divergence_threshold}
        return spec(
            tmp_path / str(divergence_threshold),
            brief(
                data={"split": {"kind": "cross_validation", "folds": 2}},
                monitor={"evaluation": {"count": 4}, "early_stopping": stopping},
            ),
        )

    def train(given: TrialSpec, report: Callable[[Evaluation], None] | None = None) -> Any:
        return run(given, report, volumes=[volume(1, "one"), volume(2, "two")])

    free, cut = train(chosen(50.0)), train(chosen(1.75))
    for number, (row, whole) in enumerate(zip(cut.history, free.history, strict=True), 1):
        one, two = row["folds"]
        assert (one["name"], one["step"], two["step"]) == ("fold_1", 1, number)
        assert one["losses"] == free.history[0]["folds"][0]["losses"]
        assert two["losses"] == whole["folds"][1]["losses"]
        for key in ("losses", "task_weights"):
            assert row[key] == {k: (one[key][k] + two[key][k]) / 2 for k in one[key]}
        for key in ("step", "epoch", "lr"):
            assert row[key] == whole[key] == two[key]
        assert row["stopped"].startswith("fold_1 stopped early after epoch 1: ")
    assert cut.training["steps_done"] == 4
    assert cut.training["steps_done_by_fold"] == [1, 4]
    assert cut.training["patches"] == 10
    assert f"total loss {cut.losses['plan_total']:.4g}, wanted < 0.2: not met" in cut.verdicts

    def kill(evaluation: Evaluation) -> None:
        if evaluation.step == 2:
            raise KilledError

    again = replace(chosen(1.75), out=str(tmp_path / "again"))
    with pytest.raises(KilledError):
        train(again, kill)
    second = train(again)
    assert any("continued from step 1, 2" in note for note in second.notes)
    for row, whole in zip(second.history, cut.history, strict=True):
        for key in ("step", "lr", "losses", "task_weights", "value", "stopped"):
            assert row[key] == whole[key]
    assert second.verdicts == cut.verdicts


def test_folds_share_one_upload_of_a_volume_that_both_train_on() -> None:
    data = {
        **candidate().data.model_dump(mode="json"),
        "split": {"kind": "cross_validation", "folds": 3},
    }
    volumes = [volume(seed, f"v{seed}") for seed in range(3)]
    trial = TrialRun(spec(Path("unused"), candidate(data=data)), volumes, [], torch.device("cpu"))
    held = [{s.places.name: s for s in fold.trainer.sampler.sources} for fold in trial.folds]
    assert [sorted(sources) for sources in held] == [["v1", "v2"], ["v0", "v2"], ["v0", "v1"]]
    assert held[0]["v2"] is held[1]["v2"]
    assert len({id(source) for sources in held for source in sources.values()}) == 3
    drawn = [fold.trainer.sampler.draw_places(8) for fold in trial.folds]
    assert drawn[0] != drawn[1]
    trial.close()


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        ("f1_iou50", lambda m: 1 - m["f1_iou50"]),
        ("adapted_rand_error_foreground", lambda m: m["adapted_rand_error_foreground"]),
        ("voi", lambda m: m["voi_split"] + m["voi_merge"]),
    ],
)
def test_other_objectives_are_minimised_too(
    finished: Any, metric: str, expected: Callable[[dict[str, float]], float]
) -> None:
    network, chosen = load_network(finished[0].checkpoint)

    class Whole:
        name = "all"
        score = (volume(),)

    Whole.network = network  # type: ignore[attr-defined]
    outcome = evaluate(
        [Whole()],  # type: ignore[list-item]
        chosen, GRID, Objective(metric=metric), device=torch.device("cpu"), threads=1,
    )  # fmt: skip
    assert outcome.value == pytest.approx(expected(outcome.metrics))


def test_a_blob_of_small_error_does_not_outlive_a_good_checkpoint(finished: Any) -> None:
    def outcome(value: float, f1: float) -> Outcome:
        return Outcome(value, {"f1_iou50": f1}, None, {}, (), (), (), (), (), {})  # type: ignore[arg-type]

    assert better(outcome(0.9, 0.0), None, 0.0, 0.05)
    assert better(outcome(0.10, 0.9), 0.04, 0.2, 0.05)
    assert not better(outcome(0.01, 0.2), 0.10, 0.9, 0.05)
    assert better(outcome(0.09, 0.88), 0.10, 0.9, 0.05)
    assert not better(outcome(0.11, 0.92), 0.10, 0.9, 0.05)
    # Each a bit worse in F1 than the one before: the guard holds against the best F1 ever seen.
    best_value, best_f1, seen, chosen = None, 0.0, 0.0, []
    for value, f1 in ((0.10, 0.80), (0.09, 0.76), (0.08, 0.72), (0.07, 0.68)):
        if better(outcome(value, f1), best_value, best_f1, 0.05, seen):
            best_value, best_f1 = value, f1
            chosen.append(f1)
        seen = max(seen, f1)
    assert chosen == [0.80, 0.76]


def test_the_plan_s_checkpoints_appear_as_verdicts() -> None:
    losses = {"plan_total": 0.15, "label": 0.15, "edt": 0.005}
    scores = {"adapted_rand_error": 0.03, "adapted_rand_precision": 0.99,
              "adapted_rand_recall": 0.9}  # fmt: skip
    fell = [0.9, 0.25, *[0.15] * 8]
    lines = plan_findings([fell], 10, losses, scores)
    assert lines[0] == "loss 0.250 in epoch 2 of 10, under 0.3: on track"
    assert "total loss 0.15, wanted < 0.2: met" in lines
    assert "recall 0.9, wanted > 0.95: not met" in lines
    assert plan_findings([[0.9]], 10, {}, {}) == []
    assert "above 0.4: change the architecture" in plan_findings([[0.9, 0.5]], 10, {}, {})[0]
    # The first epoch that ends at a fifth or later; of a single one it is the whole run.
    assert "in epoch 3 of 11" in plan_findings([[0.9, 0.8, 0.1]], 11, {}, {})[0]
    assert "in epoch 1 of 1" in plan_findings([[0.2]], 1, {}, {})[0]
    # Over the folds that came so far: one that stopped early says nothing of a later epoch.
    assert "loss 0.350 " in plan_findings([[0.9, 0.3], [0.1], [0.8, 0.4]], 10, {}, {})[0]


def test_the_loss_at_a_fifth_is_that_of_its_epoch_whatever_the_evaluations(tmp_path: Path) -> None:
    said = []
    for count in (1, 4):
        monitor = {"evaluation": {"count": count}, "early_stopping": {"enabled": False}}
        record = run(spec(tmp_path / str(count), brief(monitor=monitor)))
        said.append(record.verdicts[0])
    assert said[0] == said[1]
    # Evaluated after each of its four epochs, the first row holds the losses of the first epoch.
    assert said[1].startswith(
        f"loss {record.history[0]['losses']['plan_total']:.3f} in epoch 1 of 4, "
    )


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_full_disk_fails_the_trial_and_keeps_the_state_before(tmp_path: Path) -> None:
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def fill(evaluation: Evaluation) -> None:
        if evaluation.step == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limit[1]))

    try:
        with pytest.raises(TrialFailed, match="large") as error:
            run(spec(tmp_path), fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, before)
    assert error.value.retry
    assert len(load_checkpoint(tmp_path / "last.ckpt")["history"]) == 1
    record = run(spec(tmp_path))
    assert record.state == "complete"
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".tmp")]


def test_threads_are_given_back(finished: Any, tmp_path: Path) -> None:
    torch.set_num_threads(2)
    with pytest.raises(InputError):
        run(spec(tmp_path, candidate(data={"patch_size": [16, 16, 16]})))
    assert torch.get_num_threads() == 2


def test_early_stopping_ends_the_trial_with_a_last_evaluation(tmp_path: Path) -> None:
    chosen = candidate(
        monitor={
            "evaluation": {"count": 3},
            "early_stopping": {"enabled": True, "threshold": 50.0, "divergence_threshold": None},
        }
    )
    record = run(replace(spec(tmp_path), candidate=chosen))
    assert len(record.history) == 1
    assert record.state == "complete"
    assert any("stopped early after epoch 1:" in note for note in record.notes)
    assert (record.history[0]["epoch"], record.training["steps_done"]) == (1, 10)
