"""What `inspect --propose` writes is a space that fits volume, instances and machine."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from hydralv_tune.cli.main import exit_code
from hydralv_tune.config import paths
from hydralv_tune.config.errors import InputError
from hydralv_tune.config.search_space_files import load_space
from hydralv_tune.data.volumes import Volume, write_array
from hydralv_tune.trial.proposal import Machine, Proposal, propose
from hydralv_tune.trial.splits import split_volumes
from hydralv_tune.trial.training.sampling import PatchSampler, ResidentVolume

CPU = Machine(gpu_gb=None, cores=2, memory_gb=8.0)


def boxes(shape: tuple[int, int, int], side: tuple[int, int, int], count: int) -> Volume:
    """Return a volume with so many boxes of one size."""
    label = np.zeros(shape, np.int32)
    steps = [n // (s + 2) for n, s in zip(shape, side, strict=True)]
    assert math.prod(steps) >= count
    for number in range(count):
        z, y, x = (int(i) * (s + 2) for i, s in zip(np.unravel_index(number, steps), side,
                                                    strict=True))  # fmt: skip
        label[z : z + side[0], y : y + side[1], x : x + side[2]] = number + 1
    return Volume("boxes", np.zeros(shape, np.uint8), label)


def patch_of(volume: Volume) -> tuple[int, ...]:
    """Return the proposed patch on two cores."""
    return tuple(propose(volume, CPU).facts()["patch_size"])


def held_out(proposal: Proposal) -> tuple[int, str, int]:
    """Return axis, end and margin of the proposed holdout."""
    split = dict(proposal.facts()["split"])
    assert (split.pop("kind"), split.pop("fraction")) == ("holdout", 0.25)
    return split["axis"], split["side"], split["margin"]


def why(proposal: Proposal) -> str:
    """Return the reasons as one text."""
    return " ".join(proposal.reasons)


def check_trainable(proposal: Proposal, volume: Volume, folder: Path) -> None:
    """Check that the written space is valid, and that its patches can be cut from its parts."""
    (folder / "mine.yaml").write_text(proposal.text())
    space = load_space(folder / "mine.yaml")
    for name in space.warm_starts:
        data = space.candidate({}, space.warm_start(name).overrides).data
        plan = split_volumes([volume], data, receptive_field=(99, 99, 99))
        for part in plan.folds[0].train:
            source = ResidentVolume(part, data, torch.device("cpu"), 0)
            PatchSampler([source], patch_size=data.patch_size, foreground_share=0.5, seed=0)


def within(whole: Volume, shape: tuple[int, int, int]) -> Volume:
    """Return a larger volume with another in its low corner."""
    image, label = np.zeros(shape, np.uint8), np.zeros(shape, np.int32)
    z, y, x = whole.image.shape
    assert whole.label is not None
    label[:z, :y, :x] = whole.label
    return Volume("within", image, label)


def test_large_instances_get_a_wide_patch_and_deep_ones_a_deep_one() -> None:
    flat = patch_of(boxes((40, 300, 300), (3, 40, 40), 24))
    deep = patch_of(boxes((80, 200, 200), (30, 20, 20), 24))
    assert flat[1] > deep[1]
    assert deep[0] > flat[0]
    for patch in (flat, deep):
        assert math.prod(patch) <= 16 * 64 * 64
        assert patch[1] % 16 == patch[2] % 16 == 0


def test_a_patch_is_no_larger_than_the_volume() -> None:
    patch = patch_of(boxes((6, 64, 48), (4, 30, 20), 1))
    assert all(side <= whole for side, whole in zip(patch, (6, 64, 48), strict=True))


def test_few_instances_are_not_parted_and_many_leave_a_quarter() -> None:
    few = propose(boxes((16, 64, 128), (8, 16, 16), 10), CPU)
    assert few.facts()["split"] == {"kind": "none"}
    assert any("too few to part" in reason for reason in few.reasons)
    many = propose(boxes((16, 128, 256), (8, 16, 20), 24), CPU)
    assert held_out(many) == (2, "high", 20)
    assert "A quarter along x, the longest axis, is held out, with a margin of one" in why(many)


def test_long_instances_are_parted_across_or_with_less_margin(tmp_path: Path) -> None:
    rods = boxes((16, 128, 256), (4, 8, 250), 24)
    proposal = propose(rods, CPU)
    assert held_out(proposal) == (1, "high", 8)
    assert "along y, at its high end" in why(proposal)
    assert "a margin of 250 voxels leaves too little to train on" in why(proposal)
    check_trainable(proposal, rods, tmp_path)
    stripes = np.broadcast_to(np.arange(256, dtype=np.int32) % 24 + 1, rods.image.shape)
    woven = Volume("woven", rods.image, stripes)
    proposal = propose(woven, CPU)
    assert held_out(proposal) == (2, "high", 64)
    assert "64 voxels, less than a large instance (241)" in why(proposal)
    check_trainable(proposal, woven, tmp_path)


def test_an_end_without_truth_is_not_held_out(tmp_path: Path) -> None:
    low = within(boxes((16, 128, 80), (4, 8, 8), 24), (16, 128, 256))
    proposal = propose(low, CPU)
    assert held_out(proposal) == (2, "low", 8)
    assert "at the high end of x, the longest axis, one of the two" in why(proposal)
    check_trainable(proposal, low, tmp_path)
    corner = within(boxes((3, 30, 30), (1, 2, 2), 24), (16, 128, 256))
    proposal = propose(corner, CPU)
    assert proposal.facts()["split"] == {"kind": "none"}
    assert "one of the two parts has no truth, and no other cut is better." in why(proposal)
    check_trainable(proposal, corner, tmp_path)


@pytest.mark.parametrize(
    ("shape", "machine"),
    [
        pytest.param((12, 100, 100), CPU, id="cores"),
        pytest.param((24, 160, 160), Machine(80.0, 16, 64.0), id="gpu", marks=pytest.mark.slow),
    ],
)
def test_a_patch_fits_what_is_left_to_train_on(
    shape: tuple[int, int, int], machine: Machine, tmp_path: Path
) -> None:
    volume = boxes(shape, (4, 10, 10), shape[0] // 6 * (shape[1] // 12) ** 2)
    proposal = propose(volume, machine)
    axis, _, margin = held_out(proposal)
    left = shape[axis] - shape[axis] // 4 - margin
    assert left - 16 < proposal.facts()["patch_size"][axis] <= left
    check_trainable(proposal, volume, tmp_path)


def test_a_gpu_takes_the_large_space_and_a_small_one_a_smaller_batch() -> None:
    volume = boxes((40, 160, 160), (12, 30, 30), 8)
    large = propose(volume, Machine(80.0, 16, 64.0)).facts()
    small = propose(volume, Machine(8.0, 16, 64.0)).facts()
    assert large["space"] == small["space"] == "hydra_lv"
    assert small["batch_size"] < large["batch_size"]


def test_without_an_instance_there_is_nothing_to_go_by() -> None:
    empty = Volume("empty", np.zeros((8, 64, 64), np.uint8), np.zeros((8, 64, 64), np.int32))
    with pytest.raises(InputError, match="no labelled instance"):
        propose(empty, CPU)


def written(folder: Path, volume: Volume) -> list[str]:
    """Write image and label of a volume, and return the options that name them."""
    words = []
    for option, name, array in (
        ("--image", "im", volume.image),
        ("--label", "label", volume.label),
    ):
        assert array is not None
        write_array(folder / f"{name}.h5", array)
        words += [option, str(folder / f"{name}.h5")]
    return words


def test_inspect_writes_a_space_that_a_study_takes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    volume = boxes((16, 128, 256), (8, 16, 20), 24)
    files = written(tmp_path, volume)
    out = tmp_path / "mine.yaml"
    assert exit_code(["inspect", *files, "--propose", str(out), "--json"]) == 0
    proposal = json.loads(capsys.readouterr().out)["proposal"]
    space = load_space(out)
    candidate = space.candidate({}, space.warm_start(space.warm_starts[0]).overrides)
    assert list(candidate.data.patch_size) == proposal["patch_size"]
    assert list(candidate.inference.sliding_window.window_size) == proposal["patch_size"]
    assert candidate.system.training.batch_size == proposal["batch_size"]
    assert candidate.data.split.kind == "holdout"
    assert out.read_text().startswith("# Proposed over hydra_lv")
    before = out.read_bytes()
    monkeypatch.setattr(
        "hydralv_tune.trial.proposal.propose",
        lambda *_: Proposal("hydra_lv_small", {"fixed": {"data": {"patch_size": [16, 0, 64]}}}, ()),
    )
    assert exit_code(["inspect", *files, "--propose", str(out)]) == 2
    assert "data.patch_size" in capsys.readouterr().err
    assert out.read_bytes() == before
    assert exit_code(["inspect", *files[:2], "--propose", str(out)]) == 2
    assert "give --label too" in capsys.readouterr().err


def test_no_file_but_a_proposal_is_replaced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    volume = boxes((8, 32, 32), (4, 8, 8), 4)
    files = written(tmp_path, volume)
    shipped = paths.PACKAGE.parent
    for folder in ("search_spaces", "trials"):
        shutil.copytree(shipped / folder, tmp_path / folder)
    monkeypatch.setattr(paths, "PACKAGE", tmp_path / "hydralv_tune")
    monkeypatch.chdir(tmp_path)
    words = ["inspect", *files, "--propose"]
    mine, base = tmp_path / "mine.yaml", tmp_path / "search_spaces" / "hydra_lv_small.yaml"
    mine.write_text("base: smoke\n")
    base.write_text("# Proposed over nothing.\n" + base.read_text())
    for file, told in ((mine, "was not written by --propose"), (base, "would be lost")):
        before = file.read_bytes()
        assert exit_code([*words, str(file)]) == 2
        assert told in capsys.readouterr().err
        assert file.read_bytes() == before
    for _ in range(2):
        assert exit_code([*words, "new.yaml"]) == 0
