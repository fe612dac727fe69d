"""Checkpoints of other tools are read, and nothing in them is run."""

from __future__ import annotations

import io
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hydralv_tune.artifacts.inert_checkpoint import (
    InertObject,
    plain_values,
    read_foreign_checkpoint,
    read_inert_checkpoint,
)
from hydralv_tune.config.errors import CheckpointError
from hydralv_tune.config.files import candidate_from_mapping
from hydralv_tune.trial.scoring.prediction import network_of
from hydralv_tune.trial.training.loop import load_external_weights

VECTORS = Path(__file__).parent / "vectors" / "pytc"


def test_a_genuine_checkpoint_of_january_gives_its_tensors_and_its_configuration() -> None:
    content = read_inert_checkpoint(VECTORS / "january_last.ckpt")
    network = {k: v for k, v in content["state_dict"].items() if k.startswith("model.")}
    assert len(network) == 42
    assert all(bool(torch.isfinite(tensor).all()) for tensor in network.values())
    configuration = plain_values(content["hyper_parameters"])["cfg"]
    assert configuration["model"]["filters"] == [4, 12]
    assert configuration["model"]["rsunet_norm"] == "group"
    assert configuration["data"]["train_resolution"] == [30, 8, 8]
    assert configuration["test"]["decoding"][0]["kwargs"]["min_seed_size"] == 8


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("january_last.ckpt", {"norm": "group"}),
        ("head_last.ckpt", {"norm": "group", "num_groups": 4, "activation": "elu", "depth_2d": 1}),
    ],
)
def test_fine_tuning_starts_from_every_tensor_of_a_genuine_checkpoint(
    name: str, model: dict[str, Any]
) -> None:
    path = VECTORS / name
    mapping = {
        "model": {"filters": [4, 12], **model, "external_weights_path": str(path)},
        "data": {"patch_size": [8, 32, 32]},
        "inference": {"sliding_window": {"window_size": None}},
    }
    candidate = candidate_from_mapping(mapping, place="test")
    network = network_of(candidate)
    report = load_external_weights(network, candidate.model)
    assert report is not None
    assert "42 of 42 tensors match" in report
    stored = read_foreign_checkpoint(path)["state_dict"]
    assert all(torch.equal(t, stored[f"model.{k}"]) for k, t in network.state_dict().items())


def test_what_both_readers_can_read_is_the_same() -> None:
    path = VECTORS / "head_last.ckpt"
    ours = read_inert_checkpoint(path)["state_dict"]
    torchs = torch.load(path, weights_only=True, map_location="cpu")["state_dict"]
    assert list(ours) == list(torchs)
    assert all(torch.equal(ours[key], torchs[key]) for key in torchs)


class Calls:
    """An object whose pickle calls a function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def archive(path: Path, content: bytes, *, compression: int = zipfile.ZIP_STORED) -> Path:
    """Write a pickle as torch's archive."""
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("archive/data.pkl", content)
        file.writestr("archive/data/0", b"\0" * 16)
    return path


def test_what_would_run_a_command_is_inert(tmp_path: Path) -> None:
    target = tmp_path / "ran"
    stored = {
        "state_dict": {"model.w": torch.ones(2)},
        "system": Calls(os.system, f"touch {target}"),
        "eval": Calls(eval, f"open({str(target)!r}, 'w')"),
        "exec": Calls(exec, f"open({str(target)!r}, 'w')"),
        "getattr": Calls(getattr, "", "upper"),
        "import": Calls(__import__, "antigravity"),
        "nested": [{"deep": Calls(os.system, f"touch {target}")}],
    }
    path = tmp_path / "hostile.ckpt"
    torch.save(stored, path)
    content = read_foreign_checkpoint(path)
    assert torch.equal(content["state_dict"]["model.w"], torch.ones(2))
    assert isinstance(content["system"], InertObject)
    assert content["system"].pickled_name.endswith(".system")
    assert isinstance(content["nested"][0]["deep"], InertObject)
    assert not target.exists()


def test_state_cannot_be_laid_on_what_the_reader_itself_uses(tmp_path: Path) -> None:
    # GLOBAL rebuild function; its attributes; BUILD.
    for name in ("torch._utils\n_rebuild_tensor_v2", "collections\nOrderedDict"):
        content = b"\x80\x02c" + name.encode() + b"\n}X\x08\x00\x00\x00__call__K\x01sb."
        with pytest.raises(CheckpointError, match="nothing in it was run"):
            read_inert_checkpoint(archive(tmp_path / "state.ckpt", content))


def rebuilt(size: tuple[int, ...], stride: tuple[int, ...], offset: int = 0) -> bytes:
    """Return the pickle of one tensor over the 16 bytes of storage 0."""

    class Writer(pickle.Pickler):
        def persistent_id(self, value: Any) -> Any:
            return ("storage", torch.FloatStorage, "0", "cpu", 4) if value == "STORAGE" else None

    buffer = io.BytesIO()
    arguments = ("STORAGE", offset, size, stride, False, {})
    Writer(buffer, protocol=2).dump({"w": Calls(torch._utils._rebuild_tensor_v2, *arguments)})
    return buffer.getvalue()


def test_a_tensor_beyond_its_storage_is_refused(tmp_path: Path) -> None:
    good = read_inert_checkpoint(archive(tmp_path / "good.ckpt", rebuilt((2, 2), (2, 1))))
    assert good["w"].shape == (2, 2)
    for size, stride, offset in (
        ((4,), (1,), 4), ((2, 2), (2, 1), 1), ((10**9,), (0,), 0), ((3,), (2,), 0),
    ):  # fmt: skip
        path = archive(tmp_path / "beyond.ckpt", rebuilt(size, stride, offset))
        with pytest.raises(CheckpointError, match="nothing in it was run"):
            read_inert_checkpoint(path)


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x02}r" + struct.pack("<I", 2**32 - 1) + b".",  # a memo index of 4 G entries
        b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b".",  # a bytearray of a terabyte
        b"\x80\x02\x82\x01.",  # a copyreg extension
        b"\x80\x02" + b"(" * 10,  # cut off
        b"",
        b"\x80\x02K\x01.",  # no mapping
        b"\x80\x02]" + b"]a" * 10,
    ],
)  # fmt: skip
def test_a_malformed_pickle_is_refused_in_one_sentence(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(CheckpointError):
        read_inert_checkpoint(archive(tmp_path / "malformed.ckpt", content))


def test_a_compressed_archive_is_refused(tmp_path: Path) -> None:
    content = pickle.dumps({"w": b"\0" * 10**6})
    path = archive(tmp_path / "bomb.ckpt", content, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match="compressed"):
        read_inert_checkpoint(path)


def test_a_value_that_repeats_itself_a_million_times_is_read_once(tmp_path: Path) -> None:
    value: list[Any] = []
    for _ in range(60):
        value = [value, value]
    path = tmp_path / "laughs.ckpt"
    torch.save({"value": value}, path)
    assert isinstance(plain_values(read_inert_checkpoint(path)["value"]), list)


def test_an_object_that_holds_itself_has_plain_values(tmp_path: Path) -> None:
    loop: list[Any] = []
    loop.append(loop)
    path = tmp_path / "loop.ckpt"
    torch.save({"loop": loop}, path)
    assert isinstance(plain_values(read_inert_checkpoint(path)), dict)


def test_what_is_nested_without_end_is_refused_in_one_sentence(tmp_path: Path) -> None:
    depth = 50_000
    lists = b"]" * depth + b"a" * (depth - 1)
    content = b"\x80\x02}X\x03\x00\x00\x00cfg" + lists + b"s."
    stored = read_inert_checkpoint(archive(tmp_path / "deep.ckpt", content))
    with pytest.raises(CheckpointError, match="nested too deeply"):
        plain_values(stored)
