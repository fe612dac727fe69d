"""What a trial leaves behind is whole, or it is the version before."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from hydralv_tune.artifacts.records import (
    TrialRecord,
    load_checkpoint,
    plain,
    previous,
    provenance,
    read_json,
    read_record,
    save_checkpoint,
    write_json,
)
from hydralv_tune.artifacts.writing import write_atomically
from hydralv_tune.config.errors import CheckpointError, InputError
from hydralv_tune.data.volumes import Volume, VolumePaths
from hydralv_tune.trial.record import volume_facts


@contextmanager
def files_end_at(limit_bytes: int) -> Iterator[None]:
    """Let the kernel refuse every write beyond a size, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


def test_a_file_is_replaced_whole_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.bin"
    write_atomically(path, b"old")
    write_atomically(path, b"new and longer")
    assert path.read_bytes() == b"new and longer"
    assert os.listdir(path.parent) == ["a.bin"]


def test_others_may_read_what_the_umask_lets_them(tmp_path: Path) -> None:
    path = write_atomically(tmp_path / "a.bin", b"x")
    plain_file = tmp_path / "b.bin"
    plain_file.write_bytes(b"x")
    assert path.stat().st_mode == plain_file.stat().st_mode


def test_a_full_disk_keeps_the_old_file(tmp_path: Path) -> None:
    path = write_atomically(tmp_path / "a.bin", b"old")
    with files_end_at(1000), pytest.raises(OSError, match="large"):
        write_atomically(path, b"n" * 5000)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_a_full_disk_keeps_both_checkpoints(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    save_checkpoint(path, {"step": 1})
    save_checkpoint(path, {"step": 2})
    with files_end_at(2000), pytest.raises(OSError, match="large"):
        save_checkpoint(path, {"step": 3, "weights": torch.zeros(10_000)})
    assert load_checkpoint(path) == {"step": 2}
    assert load_checkpoint(previous(path)) == {"step": 1}


def test_a_checkpoint_keeps_the_one_before(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    for step in (1, 2, 3):
        save_checkpoint(path, {"step": step})
    assert previous(path) == tmp_path / "last.previous.ckpt"
    assert load_checkpoint(path)["step"] == 3
    assert load_checkpoint(previous(path))["step"] == 2


@pytest.mark.parametrize("kept", [0, 10, 500])
def test_a_truncated_checkpoint_falls_back_and_says_so(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "last.ckpt"
    save_checkpoint(path, {"step": 1})
    save_checkpoint(path, {"step": 2})
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.warns(UserWarning, match=r"last\.ckpt.*The one before, last\.previous\.ckpt"):
        assert load_checkpoint(path) == {"step": 1}


def test_a_kill_between_the_two_renames_leaves_the_one_before(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    save_checkpoint(path, {"step": 1})
    os.replace(path, previous(path))
    with pytest.warns(UserWarning, match="no such checkpoint"):
        assert load_checkpoint(path) == {"step": 1}


def test_without_one_before_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    save_checkpoint(path, {"step": 1})
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(
        CheckpointError, match=r"last\.ckpt: is no checkpoint, or a damaged one\. Give"
    ):
        load_checkpoint(path)
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        load_checkpoint(tmp_path / "none.ckpt")


class Trap:
    """An object that runs a command when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, ...]:
        return (os.system, (f"touch {self.target}",))


def test_a_checkpoint_that_carries_code_is_refused_and_not_run(tmp_path: Path) -> None:
    path, target = tmp_path / "evil.ckpt", tmp_path / "ran"
    torch.save({"weights": Trap(target)}, path)
    with pytest.raises(CheckpointError, match="nothing in it was run"):
        load_checkpoint(path)
    assert not target.exists()


def test_a_checkpoint_of_pytorch_connectomics_is_read(shared_data: Path) -> None:
    content = load_checkpoint(shared_data / "pytc-rsunet" / "plain.ckpt")
    assert all(key.startswith("model.") for key in content["state_dict"])


def test_json_holds_no_nan(tmp_path: Path) -> None:
    value = {"a": float("nan"), "b": np.float32(0.5), "c": (1, np.int64(2)), "d": tmp_path}
    path = write_json(tmp_path / "a.json", value)
    assert read_json(path) == {"a": None, "b": 0.5, "c": [1, 2], "d": str(tmp_path)}
    assert plain(torch.tensor([1.0, 2.0])) == [1.0, 2.0]


def test_json_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(InputError, match=r"a\.json: holds no JSON"):
        read_json(tmp_path / "a.json")
    with pytest.raises(InputError, match=r"b\.json: cannot be read: No such file"):
        read_json(tmp_path / "b.json")


def example(out: Path) -> TrialRecord:
    return TrialRecord(
        state="complete", number=3, root=1, study="s", out=str(out), config={}, objective={},
        provenance=provenance(), seed=1, device={"type": "cpu"}, split={"kind": "none"},
        volumes=[], training={}, metrics={"adapted_rand_error": 0.25, "f1_iou50": 0.5},
        losses={"total": 1.5}, value=0.25, decoding={"name": "d", "kwargs": {}},
        checkpoint=str(out / "best.ckpt"),
    )  # fmt: skip


def test_a_record_comes_back_as_it_was_written(tmp_path: Path) -> None:
    record = example(tmp_path)
    assert read_record(record.write()) == record
    later = {**record.as_mapping(), "field_of_a_later_version": 1}
    assert TrialRecord.from_mapping(later) == record


def test_a_record_that_was_cut_short_is_refused(tmp_path: Path) -> None:
    mapping = example(tmp_path).as_mapping()
    del mapping["volumes"]
    with pytest.raises(InputError, match="volumes"):
        TrialRecord.from_mapping(mapping)


def test_the_summary_has_the_keys_of_the_contract(tmp_path: Path) -> None:
    summary = example(tmp_path).summary()
    assert {"adapted_rand_error", "losses", "checkpoint", "record"} <= set(summary)
    assert summary["record"] == str(tmp_path / "record.json")
    assert summary["adapted_rand_error"] == 0.25
    json.dumps(summary)


def test_the_record_says_where_it_comes_from() -> None:
    made = provenance()
    assert made["versions"]["torch"] == torch.__version__
    assert made["versions"]["monai"]
    assert made["host"]["name"]
    assert made["host"]["cores"] >= 1
    commit = made["package"]["git_commit"]
    asked = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    # Without git, or outside a checkout, there is no commit to name.
    assert commit == (asked.stdout.strip() if asked.returncode == 0 else None)


def test_a_process_killed_while_writing_leaves_the_old_file(tmp_path: Path) -> None:
    path = write_atomically(tmp_path / "a.bin", b"old")
    code = (
        "import os, sys\n"
        "from hydralv_tune.artifacts.writing import write_atomically\n"
        "os.fsync = lambda handle: os.kill(os.getpid(), 9)\n"
        "write_atomically(sys.argv[1], b'new')\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], check=False, timeout=120)
    assert done.returncode == -signal.SIGKILL
    assert path.read_bytes() == b"old"


def test_a_record_says_where_volumes_lie_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    volume = Volume("v", np.zeros((2, 3, 4), "uint8"))
    paths = VolumePaths("v", "a/../im.h5", "lab.h5:main", None, "precomputed://https://x/known")
    (facts,) = volume_facts([volume], ["f"], [paths])
    assert [facts[role] for role in ("image", "label", "mask", "scored_mask")] == [
        str(tmp_path / "im.h5"), f"{tmp_path / 'lab.h5'}:main", None,
        "precomputed://https://x/known",
    ]  # fmt: skip
