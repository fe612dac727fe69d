"""A report looks at what the trial was scored on, also where that was a part of a large volume."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from test_trial import candidate, spec, volume

from hydralv_tune.artifacts.records import write_json
from hydralv_tune.config.candidate import Data
from hydralv_tune.config.files import decoding_step
from hydralv_tune.data.volumes import Volume, VolumePaths, write_array
from hydralv_tune.numerics.metrics.contingency import joined
from hydralv_tune.results.report.data import instance_place
from hydralv_tune.results.scored_volumes import (
    ScoredVolume,
    figures_where_trained,
    judge_all,
    scored_volumes,
)
from hydralv_tune.trial.run import run_trial
from hydralv_tune.trial.splits import slab
from hydralv_tune.trial.training.lazy_reader import as_lazy, part_to_score

pytestmark = pytest.mark.usefixtures("without_pictures")


def test_the_part_of_a_large_volume_that_was_scored_is_found_and_decoded_again(
    tmp_path: Path,
) -> None:
    given = volume()
    arrays = {"im": given.image, "label": given.label, "mask": given.mask.astype(np.uint8)}
    for name, array in arrays.items():
        write_array(tmp_path / f"{name}.h5", array)
    paths = VolumePaths("balls", *(str(tmp_path / f"{name}.h5") for name in arrays))
    # One of its eight sections can be scored in what is just too little for the volume.
    few = candidate(
        data={
            **candidate().data.model_dump(mode="json"),
            "memory_limit_gb": given.image.size * 10 / 1e9 * 0.999,
        },
        optimization={"max_epochs": 2, "optimizer": {"lr": 2e-2}},
        monitor={"evaluation": {"count": 1}, "early_stopping": {"enabled": False}},
    )
    record = run_trial(spec(tmp_path / "out", few, volumes=[paths]), lambda _: None)
    assert any("scored on balls[z" in note for note in record.notes)
    winner = SimpleNamespace(
        record=record, candidate=few, volumes=[paths], folder=tmp_path / "out",
        checkpoint=tmp_path / "out" / "best.ckpt",
        step=decoding_step(record.decoding["name"], record.decoding["kwargs"]),
    )  # fmt: skip
    kept = scored_volumes(winner)
    (tmp_path / "out" / "segmentation_0.h5").unlink()
    again = scored_volumes(winner)
    for parts in (kept, again):
        assert [part.volume.name for part in parts] == ["balls[z 3:4]"]
        table = joined([part.table for part in parts])
        assert len(table.truth_ids) == record.metrics["instances_true"]
    np.testing.assert_array_equal(kept[0].prediction, again[0].prediction)


@pytest.mark.parametrize("lazy", [False, True], ids=["block", "sections of a slab"])
def test_an_instance_is_placed_in_the_whole_volume(lazy: bool) -> None:
    label = np.zeros((8, 32, 48), np.uint16)
    label[3:6, 20:23, 30:33] = 1
    whole = Volume("v[x 9:99] y", np.zeros(label.shape, np.uint8), label)
    if lazy:
        part = slab(slab(as_lazy(whole), 0, 1, 8), 1, 16, 32)
        few = Data(memory_limit_gb=40 * 16 * 48 * 3 / 1e9)
        part = part_to_score(part, few)
        assert part.name == "v[x 9:99] y[z 1:8][y 16:32][z 2:5]"
    else:
        part = slab(slab(whole, 1, 16, 32), 2, 24, 48)
    scored = ScoredVolume(part, np.zeros_like(part.label))
    (instance,) = judge_all([scored]).instances
    assert instance_place(scored, instance.error) == "z 4, y 21, x 31"


def test_what_was_trained_on_is_scored_under_the_same_thresholds_and_once(tmp_path: Path) -> None:
    given = volume()
    arrays = {"im": given.image, "label": given.label, "mask": given.mask.astype(np.uint8)}
    for name, array in arrays.items():
        write_array(tmp_path / f"{name}.h5", array)
    paths = VolumePaths("balls", *(str(tmp_path / f"{name}.h5") for name in arrays))
    split = {"kind": "blocks", "blocks": [1, 1, 2], "margin": 2}
    halves = candidate(
        data={**candidate().data.model_dump(mode="json"), "split": split},
        optimization={"max_epochs": 2, "optimizer": {"lr": 2e-2}},
        monitor={"evaluation": {"count": 1}, "early_stopping": {"enabled": False}},
    )
    out = tmp_path / "out"
    record = run_trial(spec(out, halves, volumes=[paths]), lambda _: None)
    assert [fold["name"] for fold in record.folds] == ["fold_1", "fold_2"]
    best = SimpleNamespace(
        record=record, candidate=halves, volumes=[paths], folder=out, checkpoint=out / "best.ckpt",
        step=decoding_step(record.decoding["name"], record.decoding["kwargs"]),
    )  # fmt: skip
    figures = figures_where_trained(best)
    # The truth of both folds' training parts, which end two voxels before what each holds out.
    width = given.label.shape[2]
    half = width // 2
    inside = np.where(given.mask, given.label, 0)
    parts = [inside[:, :, half + 2 :], inside[:, :, : half - 2]]
    assert figures["instances_true"] == sum(len(np.unique(p[p > 0])) for p in parts)
    assert figures["instances_true"] != record.metrics["instances_true"]
    (out / "fold_1" / "best.ckpt").touch()
    kept = json.loads((out / "trained_on.json").read_text())
    write_json(out / "trained_on.json", {**kept, "metrics": {"f1_iou50": 0.123}})
    assert figures_where_trained(best) == {"f1_iou50": 0.123}
    changed = SimpleNamespace(
        **{**vars(best), "step": decoding_step(best.step.name, {"min_instance_size": 50})}
    )
    assert figures_where_trained(changed) != {"f1_iou50": 0.123}
