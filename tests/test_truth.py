"""Truth of any kind: ids of every type, "no label", annotated sections, places without truth."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hydralv_tune.cli.main import exit_code
from hydralv_tune.config.errors import VolumeError
from hydralv_tune.data.volumes import VolumePaths, read_volume, write_array
from hydralv_tune.numerics.metrics.scores import score_labels
from hydralv_tune.numerics.watershed.decoders import CONTOUR, decode
from hydralv_tune.trial.scoring.sweep.sweep import Grid, sweep
from hydralv_tune.trial.training.lazy_reader import open_volume
from hydralv_tune.trial.training.sampling_locations import find_sampling_locations

SHAPE = (9, 16, 20)
NO_LABEL = 2**64 - 1


def boxes() -> np.ndarray:
    """Return labels of three boxes, 1 to 3, each of seven sections."""
    label = np.zeros(SHAPE, np.uint8)
    for i in range(3):
        label[1:8, 4:12, 1 + 6 * i : 6 + 6 * i] = i + 1
    return label


def with_ids(ids: list[int], dtype: str) -> np.ndarray:
    """Return the boxes under other ids."""
    return np.array([0, *ids], dtype=dtype)[boxes()]


@pytest.fixture(params=[read_volume, open_volume], ids=["in memory", "on disk"])
def reader(request: pytest.FixtureRequest) -> Any:
    """Return what reads a volume, whole or lazily."""
    return request.param


def paths_of(folder: Path, **arrays: Any) -> VolumePaths:
    """Write a volume and return its paths; what is no array is a path's own argument."""
    given: dict[str, Any] = {"image": np.random.default_rng(0).integers(0, 255, SHAPE, np.uint8)}
    given |= arrays
    for name, array in given.items():
        if isinstance(array, np.ndarray):
            write_array(folder / f"{name}.h5", array)
            given[name] = str(folder / f"{name}.h5")
    return VolumePaths("v", **given)


def whole(array: Any) -> np.ndarray:
    """Return an array of a volume in memory."""
    return np.stack(list(array))


@pytest.mark.parametrize(
    ("ids", "dtype"),
    [
        ([2**63 + 9, 3, 2**63 + 2], "uint64"),
        ([720575940600000007, 720575940600000014, 720575940600000021], "uint64"),
        ([2**31 + 1, 5, 2**32 - 2], ">u4"),
        ([2**40, 2, 2**62], ">i8"),
        ([1, 200, 30000], ">u2"),
    ],
)
def test_ids_of_any_type_are_the_same_instances(
    tmp_path: Path, reader: Any, ids: list[int], dtype: str
) -> None:
    label = with_ids(ids, dtype)
    volume = reader(paths_of(tmp_path, label=label))
    read = whole(volume.label)
    assert read.max() <= np.iinfo(np.int32).max
    names = [int(np.unique(read[boxes() == i])[0]) for i in (1, 2, 3)]
    assert len(set(names)) == 3
    own = names if volume.label_ids is None else [int(volume.label_ids[n - 1]) for n in names]
    assert own == ids
    scored = score_labels(prediction=label, truth=boxes())
    assert (scored.adapted_rand_error, scored.skimage_adapted_rand_error, scored.f1_iou50) == (
        0,
        0,
        1,
    )
    assert score_labels(prediction=boxes() * 0, truth=label).missed == tuple(sorted(ids))


@pytest.mark.parametrize(
    ("dtype", "ids", "ignore"),
    [
        ("uint64", [1, 2, NO_LABEL], ()),
        ("uint32", [1, 2, 2**32 - 1], ()),
        (">i4", [1, 2, -1], (-1,)),
        ("int16", [1, 2, -32768], (-32768, 77)),
        ("uint8", [1, 2, 255], (255,)),
    ],
)
def test_no_label_is_never_an_instance_and_scored_nowhere(
    tmp_path: Path, reader: Any, dtype: str, ids: list[int], ignore: tuple[int, ...]
) -> None:
    label = with_ids(ids, dtype)
    volume = reader(paths_of(tmp_path, label=label, ignore_labels=ignore))
    assert np.unique(whole(volume.label)).tolist() == [0, 1, 2]
    assert volume.mask is None
    np.testing.assert_array_equal(whole(volume.where_scored), boxes() != 3)
    scored = score_labels(prediction=boxes(), truth=label, ignore=ignore)
    assert (scored.instances_true, scored.instances_predicted) == (2, 2)
    assert scored.adapted_rand_error_foreground == 0
    places = find_sampling_locations("v", volume.label, volume.where_scored, pad=(0, 0, 0), seed=0)
    assert places.valid_voxels == np.count_nonzero(boxes() != 3)


def test_both_readers_agree_on_the_fingerprint_of_a_volume_with_all_of_it(tmp_path: Path) -> None:
    label = with_ids([2**63, 7, NO_LABEL], "uint64")
    mask, scored = np.ones(SHAPE, np.uint8), np.ones(SHAPE, np.uint8)
    mask[:, :2], scored[:, :, 15:] = 0, 0
    paths = paths_of(tmp_path, label=label, mask=mask, scored_mask=scored)
    one, two = read_volume(paths), open_volume(paths)
    assert one.fingerprint() == two.fingerprint()
    inside = (mask > 0) & (scored > 0) & (boxes() != 3)
    for volume in (one, two):
        np.testing.assert_array_equal(whole(volume.mask), mask > 0)
        np.testing.assert_array_equal(whole(volume.where_scored), inside)
    plain = read_volume(paths_of(tmp_path, label=boxes(), mask=mask))
    assert plain.scored_mask is None


def test_a_negative_label_is_refused_with_the_option_that_accepts_it(
    tmp_path: Path, reader: Any
) -> None:
    paths = paths_of(tmp_path, label=with_ids([1, -5, -1], "int32"), ignore_labels=(-1,))
    with pytest.raises(VolumeError, match="--ignore-label -5"):
        reader(paths)


def every(step: int, first: int = 1) -> np.ndarray:
    """Return a mask of every so manieth section."""
    mask = np.zeros(SHAPE, np.uint8)
    mask[first::step] = 1
    return mask


@pytest.mark.parametrize(
    ("mask", "tissue"),
    [
        (every(2), None),
        (every(100, 4), None),
        (np.ones(SHAPE, np.uint8), "mask"),
        (every(1, 3), "mask"),
    ],
)
def test_a_mask_of_single_sections_says_where_truth_is_known(
    tmp_path: Path, reader: Any, mask: np.ndarray, tissue: str | None
) -> None:
    volume = reader(paths_of(tmp_path, label=boxes(), mask=mask))
    np.testing.assert_array_equal(whole(volume.where_scored), mask > 0)
    if tissue is None:
        assert volume.mask is None
        assert volume.note is not None
    else:
        np.testing.assert_array_equal(whole(volume.mask), mask > 0)
        assert volume.note is None


def test_a_section_left_out_of_the_tissue_is_filled_from_its_neighbours(
    tmp_path: Path, reader: Any
) -> None:
    mask = np.zeros(SHAPE, np.uint8)
    mask[1:4, 2:9], mask[6:8, 4:12] = 1, 1
    paths = paths_of(tmp_path, label=boxes(), mask=mask)
    volume = reader(paths)
    tissue = whole(volume.mask)
    for z in (4, 5):
        np.testing.assert_array_equal(tissue[z], (mask[3] | mask[6]) > 0)
    np.testing.assert_array_equal(np.delete(tissue, (4, 5), 0), np.delete(mask, (4, 5), 0) > 0)
    np.testing.assert_array_equal(whole(volume.where_scored), mask > 0)
    assert volume.note is not None
    assert volume.fingerprint() == read_volume(paths).fingerprint()


def test_with_a_scored_mask_the_mask_is_tissue_whatever_its_shape(
    tmp_path: Path, reader: Any
) -> None:
    mask = every(2)
    volume = reader(
        paths_of(tmp_path, label=boxes(), mask=mask, scored_mask=np.ones(SHAPE, np.uint8))
    )
    np.testing.assert_array_equal(whole(volume.mask), mask > 0)


def perfect(label: np.ndarray) -> np.ndarray:
    """Return the probabilities of a perfect network, the distance falling towards the faces."""
    depth = np.minimum(np.arange(9) - 0, 8 - np.arange(9))[:, None, None] / 4
    inside = label > 0
    return np.stack(
        [inside * 0.95, inside * 0.0, np.where(inside, np.broadcast_to(depth, SHAPE), -0.9)]
    ).astype(np.float32)


def test_a_sweep_floods_the_tissue_and_scores_where_truth_is_known() -> None:
    maps, truth = perfect(boxes()), boxes()
    scored = every(3) > 0
    axes = {"distance_threshold.seed": [0.3, 0.9], "distance_threshold.foreground": [-0.5, 0.3],
            "min_instance_size": [0, 90, 250]}  # fmt: skip
    tissue = np.ones(SHAPE, bool)
    tissue[:, :, :3] = False
    result = sweep(maps, truth, tissue, Grid(CONTOUR, axes), scored_mask=scored)
    for row in result.table.to_dict("records"):
        labels = decode(
            CONTOUR, maps, tissue, min_instance_size=row["min_instance_size"],
            distance_threshold=[row[f"distance_threshold.{p}"] for p in ("seed", "foreground")],
        )  # fmt: skip
        wanted = score_labels(prediction=labels, truth=truth, mask=tissue & scored)
        for name in ("adapted_rand_error", "adapted_rand_error_foreground", "f1_iou50"):
            assert row[name] == pytest.approx(getattr(wanted, name), abs=1e-12)
        assert row["instances_predicted"] == wanted.instances_predicted
    assert result.winner.metrics["adapted_rand_error"] < 0.05


@pytest.mark.parametrize("other", ["size", "origin"])
def test_every_command_compares_size_and_origin_of_its_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], other: str
) -> None:
    size, moved = (30.0, 8.0, 8.0), {"origin_nm": (300.0, 0.0, 0.0)}
    wrong: dict[str, Any] = {"voxel_size_nm": (40.0, 4.0, 4.0)} if other == "size" else moved
    arrays = {"p": perfect(boxes()), "seg": boxes(), "mask": np.ones(SHAPE, np.uint8)}
    for name, array in arrays.items():
        there = {"voxel_size_nm": size, "origin_nm": (0.0, 0.0, 0.0)}
        write_array(tmp_path / f"{name}.h5", array, **there)
        write_array(tmp_path / f"{name}_wrong.h5", array, **{**there, **wrong})
    p, seg, seg_wrong, mask, mask_wrong = (
        str(tmp_path / f"{n}.h5") for n in ("p", "seg", "seg_wrong", "mask", "mask_wrong")
    )
    out = ("--out", str(tmp_path / "o.h5"))
    score, sweep_ = ("score", "--prediction", seg), ("sweep", "--probabilities", p)
    inspect = ("inspect", "--image", seg)
    best = tmp_path / "best.ckpt"
    best.touch()  # the files come first
    segment = ("segment", str(best), "--image", seg)
    for words in (
        (*score, "--label", seg_wrong),
        (*score, "--label", seg, "--mask", mask_wrong),
        (*score, "--label", seg, "--mask", mask, "--scored-mask", mask_wrong),
        (*sweep_, "--label", seg_wrong),
        (*sweep_, "--label", seg, "--mask", mask_wrong),
        (*sweep_, "--label", seg, "--mask", "none", "--scored-mask", mask_wrong),
        ("decode", "--probabilities", p, "--mask", mask_wrong, *out),
        (*segment, "--label", seg_wrong, *out),
        (*segment, "--mask", mask_wrong, *out),
        (*segment, "--label", seg, "--scored-mask", mask_wrong, *out),
        (*inspect, "--label", seg_wrong),
        (*inspect, "--label", seg, "--mask", mask_wrong),
        (*inspect, "--label", seg, "--scored-mask", mask_wrong),
    ):
        assert exit_code(words) == 2, words
        said = capsys.readouterr().err
        assert "the files of one volume must agree" in said
        assert "_wrong.h5" in said
    assert exit_code([*score, "--label", seg, "--mask", mask, "--scored-mask", mask]) == 0
    assert exit_code([*score, "--label", seg, "--mask", "none", "--scored-mask", "none"]) == 0
    write_array(tmp_path / "short.h5", boxes()[1:])
    short = ("--label", seg, "--scored-mask", str(tmp_path / "short.h5"))
    assert exit_code([*segment, *short, *out]) == 2
    assert "the scored mask has shape (8, 16, 20)" in capsys.readouterr().err


def test_commands_take_no_label_and_scored_mask_alike(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    label = with_ids([2**63 + 1, 4, -1 % 2**64], "uint64").astype(">u8")
    signed = with_ids([1, 4, -1], "int64")
    files = {"p": perfect(boxes()), "seg": boxes(), "label": label, "signed": signed,
             "known": (boxes() != 1).astype(np.uint8)}  # fmt: skip
    for name, array in files.items():
        write_array(tmp_path / f"{name}.h5", array)

    def run(command: str, *words: str) -> dict[str, Any]:
        given = [str(tmp_path / f"{w[1:]}.h5") if w.startswith("@") else w for w in words]
        assert exit_code([command, *given, "--json"]) == 0
        return json.loads(capsys.readouterr().out)  # type: ignore[no-any-return]

    scored = run("score", "--prediction", "@seg", "--label", "@label")
    assert (scored["instances_true"], scored["f1_iou50"]) == (2, 1.0)
    ignoring = ("--ignore-label", "-1")
    assert run("score", "--prediction", "@seg", "--label", "@signed", *ignoring) == scored
    one = run("score", "--prediction", "@seg", "--label", "@label", "--scored-mask", "@known")
    assert (one["instances_true"], one["instances_predicted"]) == (1, 1)
    for words in (("@label",), ("@signed", *ignoring)):
        swept = run("sweep", "--probabilities", "@p", "--label", *words, "--space", "smoke")
        assert swept["winner"]["adapted_rand_error_foreground"] < 0.05
        assert {"ap", "pq", "f1_iou30", "by_size"} <= set(swept["best"])
    facts = run("inspect", "--image", "@seg", "--label", "@signed", *ignoring)
    assert facts["instances"] == 2
