"""Averages of networks are chosen by the sweep, judged where they were not chosen, and usable."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hydralv_tune.api.volumes import predict
from hydralv_tune.artifacts.records import plain
from hydralv_tune.cli.main import exit_code
from hydralv_tune.config.errors import StudyError
from hydralv_tune.config.search_space import Objective
from hydralv_tune.data.volumes import Volume, read_array
from hydralv_tune.results import ensemble
from hydralv_tune.results.ensemble import find_ensemble
from hydralv_tune.results.report.report import write_report
from hydralv_tune.results.segmentation import load_model
from hydralv_tune.study.study import Study
from hydralv_tune.trial.scoring.ensemble import (
    Selection,
    cells_of,
    cross_fitted,
    selection_of,
    shares_of,
)
from hydralv_tune.trial.scoring.prediction import averaged
from hydralv_tune.trial.scoring.sweep.sweep import Grid

GRID = Grid(
    "decode_instance_binary_contour_distance",
    {
        "binary_threshold.seed": (0.4, 0.6),
        "binary_threshold.foreground": (0.4, 0.6),
        "min_seed_size": (5,),
    },
)


@pytest.fixture(scope="module")
def label() -> np.ndarray:
    """Return (10, 24, 84) labels: 14 boxes in two rows, ids from 1."""
    labels = np.zeros((10, 24, 84), np.int32)
    for number in range(14):
        y, x = 3 + 12 * (number % 2), 3 + 12 * (number // 2)
        labels[2:8, y : y + 6, x : x + 6] = number + 1
    return labels


def seen_through(label: np.ndarray, hidden: Callable[[int], bool], seed: int) -> np.ndarray:
    """Return probabilities of a network that does not see some of the instances, in noise.

    Args:
        label: What there is to be seen.
        hidden: Whether an instance is not seen.
        seed: Of the noise.
    """
    rng = np.random.default_rng(seed)
    ids = [i for i in np.unique(label) if i and not hidden(int(i))]
    inside = np.isin(label, ids).astype(np.float32)
    binary = np.clip(0.05 + 0.9 * inside + rng.normal(0, 0.02, inside.shape), 0, 1)
    return np.stack([binary, np.zeros_like(binary), np.ones_like(binary)]).astype(np.float16)


def selection_with(label: np.ndarray, maps: list[np.ndarray], **options: Any) -> Selection:
    """Return candidates on the boxes, ready to be chosen from."""
    volume = Volume("boxes", label.astype(np.uint8), label)
    objective = Objective.model_validate({"metric": "f1_iou50"})
    return selection_of([[one] for one in maps], [volume], GRID, objective, **options)


def test_every_instance_lies_in_one_cell_and_no_cell_is_without(label: np.ndarray) -> None:
    (cells,) = cells_of([label], 6)
    of = [np.unique(cells[label == i]) for i in np.unique(label) if i]
    assert all(len(found) == 1 for found in of)
    assert sorted({int(found[0]) for found in of}) == list(range(6))
    assert set(np.unique(cells)) == set(range(6))


def test_cells_of_several_volumes_count_on(label: np.ndarray) -> None:
    first, second = cells_of([label, label[:, :, :60]], 9)
    assert first.min() == 0
    assert second.min() == first.max() + 1


def test_networks_that_see_different_instances_are_averaged_and_gain_where_not_chosen(
    label: np.ndarray,
) -> None:
    # Each misses a third of the instances, and what one of two sees their average has at 0.5.
    maps = [seen_through(label, lambda i, rest=r: i % 3 == rest, seed=r) for r in range(3)]
    found = cross_fitted(selection_with(label, maps), most=3)
    assert len(set(found.picks)) > 1
    assert found.gain > 0.1
    assert found.interval[0] > 0
    assert found.is_better
    assert found.metrics["f1_iou50"] - found.single_metrics["f1_iou50"] == pytest.approx(found.gain)


def test_a_network_beside_copies_of_itself_stays_alone(label: np.ndarray) -> None:
    one = seen_through(label, lambda i: i % 5 == 0, seed=1)
    found = cross_fitted(selection_with(label, [one, one, one]), most=3)
    assert len(found.picks) == 1
    assert not found.is_better
    assert found.gain == 0.0
    assert found.interval == (0.0, 0.0)


def test_what_helps_by_chance_where_it_is_chosen_is_not_kept(label: np.ndarray) -> None:
    """An average that is better on all instances together, but for one alone, is in the noise."""
    ids = [int(i) for i in np.unique(label) if i]
    maps = [
        seen_through(label, lambda i: i in ids[:2], seed=1),
        seen_through(label, lambda i: i in ids[1:3], seed=2),
    ]
    found = cross_fitted(selection_with(label, maps), most=2)
    assert found.interval[0] <= 0
    assert not found.is_better


def test_the_figure_of_a_fold_comes_from_thresholds_chosen_on_the_others(
    label: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    maps = [seen_through(label, lambda i, rest=r: i % 3 == rest, seed=r) for r in range(3)]
    selection = selection_with(label, maps)
    judged: list[tuple[frozenset[int], int]] = []
    kept = Selection.tables

    def watched(self: Selection, picks: Any, chosen_on: frozenset[int], at: int) -> Any:
        judged.append((chosen_on, at))
        return kept(self, picks, chosen_on, at)

    monkeypatch.setattr(Selection, "tables", watched)
    cross_fitted(selection, most=2)
    assert {at for _, at in judged} == set(np.unique(selection.cells[0]))
    assert all(at not in chosen_on for chosen_on, at in judged)


def test_a_network_may_weigh_twice_and_no_more_than_asked_are_taken(label: np.ndarray) -> None:
    maps = [seen_through(label, lambda i, rest=r: i % 4 == rest, seed=r) for r in range(4)]
    everything = frozenset(range(12))
    selection = selection_with(label, maps)
    assert len(set(selection.choose(2, everything))) <= 2
    assert len(selection.choose(1, everything)) == 1
    assert shares_of((0, 0, 2)) == {0: 2 / 3, 2: 1 / 3}


def test_an_instance_alone_cannot_be_chosen_on_and_scored(label: np.ndarray) -> None:
    volume = Volume("one", label.astype(np.uint8), np.where(label == 1, 1, 0))
    maps = [[seen_through(label, lambda i: i > 1, seed=s)] for s in range(2)]
    selection = selection_of(maps, [volume], GRID, Objective())
    with pytest.raises(ValueError, match="an instance each"):
        cross_fitted(selection, most=2)


@pytest.fixture
def study(finished_study: Any, tmp_path: Path) -> Path:
    """Return a copy of a study of three complete trials."""
    folder = finished_study.copied_to(tmp_path / "study").folder
    for record in folder.glob("trials/*/record.json"):
        record.write_text(record.read_text().replace(str(finished_study.folder), str(folder)))
    return folder


def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep an ensemble of the first two trials, whatever it gains: three tiny ones gain nothing."""
    found = ensemble.cross_fitted

    def fixed(selection: Selection, most: int) -> Any:

        cells = frozenset(np.unique(selection.cells[0]).tolist())
        picks = (0, 0, 1)
        point = selection.best_thresholds(picks, cells)
        return replace(found(selection, most), picks=picks, point=point, interval=(0.1, 0.2))

    monkeypatch.setattr(ensemble, "cross_fitted", fixed)


def test_the_command_says_what_the_contract_promises(
    study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(["ensemble", str(study), "--members", "2", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    for key in ("members", "adapted_rand_error", "f1_iou50", "gain", "gain_interval", "kept"):
        assert key in facts
    assert facts["kept"] in ("ensemble", "single")
    low, high = facts["gain_interval"]
    assert low <= high
    assert 1 <= len(facts["members"]) <= 2
    assert sum(one["share"] for one in facts["members"]) == pytest.approx(1)
    assert sorted(facts["considered"]) == [0, 1, 2]
    assert facts == json.loads((study / "ensemble.json").read_text())
    assert (study / "ensemble.ckpt").exists() == (facts["kept"] == "ensemble")


def test_networks_that_are_decoded_otherwise_than_the_best_are_not_averaged_with_it(
    study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = find_ensemble(f"sqlite:///{study / 'study.db'}", "tiny")
    best = facts["considered"][0]
    chosen = ensemble.chosen_trial

    def otherwise(opened: Any, number: int) -> Any:
        trial = chosen(opened, number)
        if number == best:
            return trial
        other = trial.step.model_copy(update={"name": "decode_distance_watershed"})
        return replace(trial, step=other)

    monkeypatch.setattr(ensemble, "chosen_trial", otherwise)
    with pytest.raises(StudyError, match="decoded otherwise than the best"):
        find_ensemble(f"sqlite:///{study / 'study.db'}", "tiny")


def test_an_ensemble_is_predicted_segmented_exported_and_reported_as_one_thing(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    always(monkeypatch)
    facts = find_ensemble(f"sqlite:///{study / 'study.db'}", "tiny", study, members=2)
    assert facts["kept"] == "ensemble"
    first, second = (one["trial"] for one in facts["members"])
    image = str(study / "im.h5")

    assert exit_code(["export", str(study), "--ensemble", "--out", str(tmp_path / "b.yaml")]) == 0
    maps = predict(tmp_path / "b.ckpt", image)
    alone = [predict(study / "trials" / str(n) / "best.ckpt", image) for n in (first, second)]
    np.testing.assert_array_equal(maps, averaged(alone, [2 / 3, 1 / 3]))
    assert not np.array_equal(maps, alone[0])

    wanted = dict(facts["decoding"]["kwargs"])
    model = load_model(str(tmp_path / "b.yaml"))
    assert plain({key: model.arguments[key] for key in wanted}) == plain(wanted)
    capsys.readouterr()
    words = ["segment", str(tmp_path / "b.yaml"), "--image", image, "--label"]
    words += [str(study / "label.h5"), "--out", str(tmp_path / "seg.h5"), "--json"]
    assert exit_code(words) == 0
    scored = json.loads(capsys.readouterr().out)
    from hydralv_tune.api.volumes import decode

    np.testing.assert_array_equal(
        read_array(tmp_path / "seg.h5") > 0,
        decode(maps, decoder=model.decoder, **model.arguments) > 0,
    )
    assert 0 <= scored["f1_iou50"] <= 1

    page = write_report(f"sqlite:///{study / 'study.db'}", "tiny", tmp_path / "r", folder=study)
    assert facts["sentence"] in page.with_name("report.md").read_text()
    assert 'id="ensemble"' in page.read_text()


def test_the_certificate_of_an_ensemble_says_what_is_known_of_it(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    storage = f"sqlite:///{study / 'study.db'}"
    opened = Study.open(storage, "tiny")
    space = opened.space.as_mapping()
    space["objective"]["guard"]["f1_iou50"] = 1.0  # each trial met that of its time, 0
    opened.remember("space", space)
    opened.close()
    always(monkeypatch)
    facts = find_ensemble(storage, "tiny", study, members=2)
    first, second = (one["trial"] for one in facts["members"])
    facts["members"][0]["networks"] = 3  # as of a cross-validation
    (study / "ensemble.json").write_text(json.dumps(facts))
    record = study / "trials" / str(second) / "record.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "seed": 7}))
    assert exit_code(["export", str(study), "--ensemble", "--out", str(tmp_path / "b.yaml")]) == 0
    assert "does not meet the guard of F1 ≥ 1" in capsys.readouterr().err
    text = (tmp_path / "b.certificate.md").read_text()
    for words in (
        "| figure | value | best trial alone |",
        "**Study**: tiny (3 complete, 1 pruned",
        f"), trials {first}, {second}\n",
        facts["sentence"],
        "F1 at IoU 0.5 of at least 1: NOT met",
        f"**Seeds**: 42 (trial {first}); 7 (trial {second})",
        f"{facts['cells']} parts of space drawn anew 1000 times",
        "the average of 4 trained networks, from 2 of 4 configurations",
    ):
        assert words in text
    assert "2000 times" not in text


def test_what_needs_one_network_refuses_an_ensemble(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", str(tmp_path / "b.yaml")]
    assert exit_code(["export", str(study), "--ensemble", *out]) == 2
    assert "has none yet" in capsys.readouterr().err
    always(monkeypatch)
    find_ensemble(f"sqlite:///{study / 'study.db'}", "tiny", study, members=2)
    for own in ("space.yaml", "ensemble.yaml", "trials/1/best.yaml"):
        assert exit_code(["export", str(study), "--ensemble", "--out", str(study / own)]) == 2
        assert "keeps what is its own" in capsys.readouterr().err
    assert exit_code(["export", str(study), "--ensemble", "--format", "torchscript", *out]) == 2
    assert "holds one network" in capsys.readouterr().err
    for words, said in (
        (["--trial", "1"], "name two things"),
        (["--format", "nonsense"], "Unknown format 'nonsense'. Known: bioimageio, hydralv"),
        (["--write-normalised"], "takes one network"),
        (["--scikit-image-before-026"], "takes one network"),
        (["--table", str(tmp_path / "t.txt")], "neither .csv nor .parquet"),
        (["--table", str(study / "trials" / "t.csv")], "keeps what is its own"),
    ):
        assert exit_code(["export", str(study), "--ensemble", *words, *out]) == 2
        assert said in capsys.readouterr().err
    (study / "ensemble.ckpt").rename(study / "away.ckpt")
    assert exit_code(["export", str(study), "--ensemble", *out]) == 2
    assert f"Make it again with `hydralv-tune ensemble {study}`" in capsys.readouterr().err
    (study / "away.ckpt").rename(study / "ensemble.ckpt")
    from hydralv_tune.config.errors import CheckpointError
    from hydralv_tune.trial.scoring.prediction import load_network

    with pytest.raises(CheckpointError, match="an ensemble of 2 networks"):
        load_network(study / "ensemble.ckpt")
    assert not list(tmp_path.glob("b.*"))
    assert not list(tmp_path.glob("t.*"))


def test_an_ensemble_that_is_exported_leaves_no_other_weights_and_says_how_old_it_is(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    always(monkeypatch)
    storage = f"sqlite:///{study / 'study.db'}"
    facts = find_ensemble(storage, "tiny", study, members=2)
    out = ["--out", str(tmp_path / "b.yaml")]
    assert exit_code(["export", str(study), *out]) == 0
    assert (tmp_path / "b.safetensors").is_file()
    words = ["export", str(study), "--ensemble", "--table", str(tmp_path / "t.csv"), *out, "--json"]
    capsys.readouterr()
    assert exit_code(words) == 0
    document = json.loads(capsys.readouterr().out)
    (warning,) = document["warnings"]
    assert "b.safetensors held the weights of an earlier export" in warning
    assert not (tmp_path / "b.safetensors").exists()
    assert Path(document["table"]).is_file()
    assert "ensemble.ckpt" not in (tmp_path / "b.yaml").read_text()

    older = {**facts, "considered": facts["considered"][:2]}
    (study / "ensemble.json").write_text(json.dumps(older))
    assert exit_code(words) == 0
    (warning,) = json.loads(capsys.readouterr().out)["warnings"]
    assert "looked for among 2 complete trials; the study has 3 now" in warning
    page = write_report(storage, "tiny", tmp_path / "r", folder=study)
    assert f"{facts['sentence']} {warning}" in page.with_name("report.md").read_text()


def test_a_study_of_one_trial_has_no_ensemble(
    study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in (1, 2):
        shutil.rmtree(study / "trials" / str(number))
    assert exit_code(["ensemble", str(study)]) == 2
    said = capsys.readouterr().err
    assert "needs two complete trials with checkpoints, and there is 1" in said
    assert "the best. What is averaged with it needs its channels, its decoder" in said
    assert "trial 1:" in said


def test_a_kept_ensemble_is_not_lost_to_a_look_that_saw_less(
    study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = f"sqlite:///{study / 'study.db'}"
    with monkeypatch.context() as patched:
        always(patched)
        find_ensemble(storage, "tiny", study, members=2)
    kept = {name: (study / name).read_bytes() for name in ("ensemble.json", "ensemble.ckpt")}
    facts = find_ensemble(storage, "tiny", study, members=1)
    assert facts["sentence"].startswith("No average was looked for, since one member was asked")
    assert "an earlier look at more found is kept" in facts["sentence"]
    assert (facts["kept"], facts["out"]) == ("earlier", str(study / "ensemble.yaml"))
    assert find_ensemble(storage, "tiny", study, members=2, limit_s=1e3)["kept"] == "earlier"
    assert {name: (study / name).read_bytes() for name in kept} == kept
    (study / "ensemble.json").unlink()
    assert find_ensemble(storage, "tiny", study, members=1)["sentence"].endswith("alone is kept.")
    assert not (study / "ensemble.ckpt").exists()


def test_a_device_that_is_none_is_refused_before_a_volume_is_read(
    study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (study / "im.h5").unlink()
    assert exit_code(["ensemble", str(study), "--device", "foo"]) == 2
    assert "device is 'foo'" in capsys.readouterr().err


def test_it_is_looked_for_once_after_a_study_and_not_where_the_space_says_so(
    study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage, said = f"sqlite:///{study / 'study.db'}", []
    ensemble.ensemble_after_study(storage, "tiny", 5, said.append, study)
    assert not (study / "ensemble.json").exists(), "it aims at more trials"
    assert f"`hydralv-tune ensemble {study}` looks among those that are complete" in said[-1]
    ensemble.ensemble_after_study(storage, "tiny", 3, said.append, study)
    assert (study / "ensemble.json").is_file(), said
    before = len(said)
    ensemble.ensemble_after_study(storage, "tiny", 3, said.append, study)
    assert len(said) == before
    (study / "ensemble.json").unlink()
    # A volume that has gone costs the ensemble, not the run.
    (study / "im.h5").unlink()
    ensemble.ensemble_after_study(storage, "tiny", 3, said.append, study)
    assert "No ensemble was found: " in said[-1]


@pytest.mark.parametrize("content", ["[]", "{}", "{", '{"kept": "ensemble", "members": []}'])
def test_facts_that_are_none_are_refused_noted_and_made_anew(
    study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    (study / "ensemble.json").write_text(content)
    assert exit_code(["export", str(study), "--ensemble", "--out", str(tmp_path / "b.yaml")]) == 2
    said = capsys.readouterr().err
    assert str(study / "ensemble.json") in said
    assert "again" in said
    storage = f"sqlite:///{study / 'study.db'}"
    page = write_report(storage, "tiny", tmp_path / "r", folder=study)
    assert "The ensemble is not shown: " in page.with_name("report.md").read_text()
    told: list[str] = []
    ensemble.ensemble_after_study(storage, "tiny", 3, told.append, study)
    facts = json.loads((study / "ensemble.json").read_text())
    assert facts["sentence"] == told[-1]


def test_no_fault_of_the_search_for_an_ensemble_costs_the_result_of_a_run(
    study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of\nmemory")

    said: list[str] = []
    monkeypatch.setattr(ensemble, "find_ensemble", fails)
    ensemble.ensemble_after_study(f"sqlite:///{study / 'study.db'}", "tiny", 3, said.append, study)
    assert said == ["No ensemble was found: RuntimeError: out of memory"]
