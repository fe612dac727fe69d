"""A report looks at what the trial was scored on, also where that was a part of a large volume."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
from test_trial import candidate, spec, volume

from hydralv_tune.config.files import decoding_step
from hydralv_tune.data.volumes import VolumePaths, write_array
from hydralv_tune.numerics.metrics.contingency import joined
from hydralv_tune.results.scored_volumes import scored_volumes
from hydralv_tune.trial.run import run_trial


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
