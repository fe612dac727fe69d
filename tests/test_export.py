"""What is exported trains, predicts and scores again, here and in PyTorch Connectomics' form."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from safetensors import safe_open

from hydralv_tune.artifacts.records import FORMAT, FORMAT_VERSION, load_checkpoint, read_record
from hydralv_tune.cli.main import exit_code
from hydralv_tune.config.candidate import DecodingStep
from hydralv_tune.config.errors import InputError, StudyError
from hydralv_tune.config.files import load_candidate
from hydralv_tune.config.paths import known_names
from hydralv_tune.config.validation import value_at
from hydralv_tune.config.yaml_io import dump_yaml
from hydralv_tune.data.volumes import VolumePaths, read_array, read_volume, write_array
from hydralv_tune.numerics.networks.registry import build_network
from hydralv_tune.numerics.networks.weights import match_weights
from hydralv_tune.numerics.test_time_augmentation import activate
from hydralv_tune.results.export import models
from hydralv_tune.results.export.export import changed_keys, export_best, normalised_otherwise
from hydralv_tune.results.export.models import export_bioimageio, window_of
from hydralv_tune.results.export.pytc import peer_config, peer_step, peer_weights
from hydralv_tune.results.export.pytc_blocks import PeerData
from hydralv_tune.results.report.report import write_report
from hydralv_tune.study.study import Study, open_readonly
from hydralv_tune.trial.fitted_normalisation import fit_image
from hydralv_tune.trial.scoring.prediction import load_network, network_of

REPOSITORY = Path(__file__).parents[1]

DATA = PeerData(
    volumes=[VolumePaths("im", "im.h5", "lab.h5", "mask.h5")],
    voxel_size_nm=(30.0, 8.0, 8.0),
    weights="best.ckpt",
    experiment="best",
    description="exported",
)


def best_record(finished_study: Any) -> Any:
    """Return the record of the best trial."""
    study = open_readonly(finished_study.storage, finished_study.name)
    best = study.best()
    folder = study.folder_of(best)
    study.close()
    return read_record(folder / "record.json")


def test_exported_candidate_holds_everything_that_determines_the_score(
    finished_study: Any, tmp_path: Path
) -> None:
    document = export_best(finished_study.storage, "tiny", tmp_path / "best.yaml")
    record = best_record(finished_study)
    candidate = load_candidate(document["out"])
    assert candidate.test.decoding[0].kwargs == record.decoding["kwargs"]
    assert candidate.test.decoding_grid is not None
    assert candidate.test.decoding_grid.axes["binary_threshold.seed"] == (0.3, 0.5, 0.7)
    again = {**candidate.as_mapping(), **dict.fromkeys(("experiment_name", "test"))}
    trained = {**record.config, **dict.fromkeys(("experiment_name", "test"))}
    assert again == trained
    head = Path(document["out"]).read_text().split("experiment_name")[0]
    for word in (f"{record.metrics['adapted_rand_error']:.4f}", record.volumes[0]["fingerprint"],
                 "study 'tiny'", f"torch {torch.__version__}", "optimistic"):  # fmt: skip
        assert word in head


def test_exported_checkpoint_holds_weights_alone(finished_study: Any, tmp_path: Path) -> None:
    document = export_best(finished_study.storage, "tiny", tmp_path / "best.yaml")
    assert document["checkpoint"] == str(tmp_path / "best.ckpt")
    content = load_checkpoint(document["checkpoint"])
    assert sorted(content) == ["candidate", "format", "version", "weights"]


def test_the_commands_it_prints_give_the_recorded_score(
    finished_study: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    document = export_best(finished_study.storage, "tiny", tmp_path / "best.yaml")
    assert [shlex.split(c)[1] for c in document["commands"]] == [
        "predict", "decode", "score", "train", "segment",
    ]  # fmt: skip
    metrics = best_record(finished_study).metrics
    printed = {shlex.split(command)[1]: command for command in document["commands"]}
    for name in ("predict", "decode", "score", "segment"):
        capfd.readouterr()
        assert exit_code([*shlex.split(printed[name])[1:], "--json"]) == 0
        found = json.loads(capfd.readouterr().out)
        for key in ("adapted_rand_error", "adapted_rand_error_foreground", "f1_iou50"):
            assert name in ("predict", "decode") or found[key] == metrics[key]


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_table_holds_every_finished_trial(finished_study: Any, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"trials{suffix}"
    export_best(finished_study.storage, "tiny", tmp_path / "best.yaml", table=path)
    table = pd.read_csv(path) if suffix == ".csv" else pd.read_parquet(path)
    assert list(table["state"]) == ["COMPLETE"] * 3 + ["PRUNED", "FAIL"]
    assert table["metrics.f1_iou50"].notna().sum() == 3
    assert "params.optimization.optimizer.lr" in table


@pytest.mark.parametrize("format", ["pytc", "pytc-2026-01"])
def test_peer_export_names_what_it_cannot_say_and_the_score_under_its_flood(
    finished_study: Any, tmp_path: Path, format: str
) -> None:
    document = export_best(finished_study.storage, "tiny", tmp_path / "p.yaml", format=format)
    text = Path(document["out"]).read_text()
    head = [line for line in text.splitlines() if line.startswith("#")]
    assert any("flood: volume" in line for line in head)
    assert sum("adapted_rand_error " in line for line in head) == 2
    # Today's losses count inside the mask alone too.
    assert any("inside the mask alone" in line for line in head) is (format == "pytc-2026-01")
    mapping = yaml.safe_load(text)
    assert "&id" not in text
    model = mapping["default"]["model"] if format == "pytc" else mapping["model"]
    assert model["external_weights_path"] == str(tmp_path / "p.ckpt")
    assert all(str(tmp_path / "p.yaml") in command for command in document["commands"])
    assert model["external_weights_key_prefix"] == "model."
    # The network of this study goes over, but its sections are standardised, which it cannot say.
    assert not document["portable"]
    assert "gives another segmentation" in head[0]
    assert "--write-normalised" in document["warnings"][0]


@pytest.mark.parametrize("format", ["pytc", "pytc-2026-01"])
def test_a_peer_export_with_its_images_written_gives_the_same_segmentation(
    finished_study: Any, tmp_path: Path, format: str
) -> None:
    document = export_best(
        finished_study.storage, "tiny", tmp_path / "p.yaml", format=format, write_normalised=True
    )
    text = Path(document["out"]).read_text()
    assert document["portable"]
    assert text.startswith("# PyTorch Connectomics has this network: its weights go over.")
    mapping = yaml.safe_load(text)
    today = format == "pytc"
    data = mapping["default"]["data"] if today else mapping["data"]
    assert data["image_transform"]["normalize"] == "none"
    image = mapping["test"]["data"]["test"]["image"] if today else mapping["data"]["train_image"]
    assert mapping["test"]["data"].get("test_image", image) == image
    sections = read_volume(VolumePaths("written", image)).image
    assert np.abs(sections.mean(axis=(1, 2))).max() < 1e-3
    assert np.abs(sections.std(axis=(1, 2)) - 1).max() < 1e-3


@pytest.mark.parametrize(
    ("format", "key"),
    [("pytc", "default.inference.save_path"), ("pytc-2026-01", "test.data.output_path")],
)
def test_no_two_exports_share_the_folder_in_which_that_tool_takes_up_segmentations(
    finished_study: Any, tmp_path: Path, format: str, key: str
) -> None:
    copied = finished_study.copied_to(tmp_path / "copy")
    record = copied.folder_of_best() / "record.json"
    content = json.loads(record.read_text())

    def folder(trial: int | None = None) -> Any:
        out = tmp_path / "best.yaml"
        export_best(copied.storage, "tiny", out, format=format, trial=trial)
        text = out.read_text()
        written = value_at(yaml.safe_load(text), key)
        assert f"It writes to {written}," in text
        return written

    first = folder()
    assert first == folder()
    assert first.startswith("outputs/tiny_trial_")
    assert first != folder((copied.best().number + 1) % 3)
    content["decoding"]["kwargs"]["min_seed_size"] += 1
    record.write_text(json.dumps(content))
    assert folder() != first


def test_january_is_said_to_differ_where_the_volume_was_padded(
    finished_study: Any, tmp_path: Path
) -> None:
    copied = finished_study.copied_to(tmp_path / "copy")
    record = copied.folder_of_best() / "record.json"
    content = json.loads(record.read_text())
    content["config"]["data"]["pad_size"] = [2, 8, 8]
    record.write_text(json.dumps(content))
    for format, portable in (("pytc", True), ("pytc-2026-01", False)):
        document = export_best(
            copied.storage, "tiny", tmp_path / "p.yaml", format=format, write_normalised=True
        )
        assert document["portable"] is portable
        first = Path(document["out"]).read_text().splitlines()[0]
        assert ("windows lie elsewhere" in first) is not portable
    content["config"]["data"]["image_transform"]["normalize"] = "z_volume"
    record.write_text(json.dumps(content))
    for written in (False, True):
        document = export_best(
            copied.storage, "tiny", tmp_path / "p.yaml", format="pytc", write_normalised=written
        )
        assert document["portable"] is written
        text = Path(document["out"]).read_text()
        assert ("after it was padded" in text.splitlines()[0]) is not written
        transform = yaml.safe_load(text)["default"]["data"]["image_transform"]
        assert transform["normalize"] == ("none" if written else "normal")


def test_a_trial_that_stays_here_names_the_best_that_goes_over(
    finished_study: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    copied = finished_study.copied_to(tmp_path / "copy")
    best, record = copied.best(), copied.folder_of_best() / "record.json"
    content = json.loads(record.read_text())
    content["config"]["model"]["activation"] = "gelu"
    record.write_text(json.dumps(content))
    monkeypatch.chdir(tmp_path)

    def exported(*words: str) -> dict[str, Any]:
        line = [
            "export",
            str(copied.folder),
            "--format",
            "pytc",
            "--json",
            *(() if "--out" in words else ("--out", "p.yaml")),
            *words,
        ]
        assert exit_code(line) == 0
        return dict(json.loads(capsys.readouterr().out))

    stays = exported()
    assert stays["checkpoint"] is None
    assert not stays["portable"]
    assert not Path("p.ckpt").exists()
    assert [command.split()[-1] for command in stays["commands"]] == ["train"]
    first = Path("p.yaml").read_text().splitlines()[0]
    assert "cannot give this segmentation" in first
    said = stays["warnings"][0]
    assert "model.activation gelu" in said
    number = int(said.split("can go over is ")[1].split(":")[0])
    assert number != best.number
    goes = exported("--best-portable")
    assert goes["checkpoint"] == str(tmp_path / "p.ckpt")
    mapping = yaml.safe_load(Path("p.yaml").read_text())
    assert mapping["experiment_name"] == f"tiny_trial_{number}"
    assert f"Trial {number} of study 'tiny', which is not its best" in Path("p.yaml").read_text()
    assert "one of 4 configurations" in Path(goes["certificate"]).read_text()
    assert not any("comes nearest" in warning for warning in goes["warnings"])
    assert all(str(tmp_path / "p.yaml") in command for command in goes["commands"])
    led = exported("--trial", str(best.number), "--out", "copy/../p.yaml")
    assert f"The best trial of study 'tiny': trial {best.number} of" in Path("p.yaml").read_text()
    assert "the best of 4 configurations" in Path(led["certificate"]).read_text()
    assert all(f" {tmp_path / 'p.yaml'} " in command for command in led["commands"])
    assert f"tiny_trial_{best.number}" in Path("p.yaml").read_text()
    assert exit_code(["export", str(copied.folder), "--trial", "77", "--out", "p.yaml"]) == 2
    assert "77 is no finished trial. Known:" in " ".join(capsys.readouterr().err.split())


def test_peer_export_of_todays_schema_has_no_key_that_its_example_lacks(
    shared_data: Path,
) -> None:
    example = yaml.safe_load((shared_data.parent / "pytc_head_example.yaml").read_text())
    candidate = load_candidate("baseline", {"model": {"deep_supervision": True}})
    ours = peer_config(candidate, candidate.test.decoding[0], DATA, schema="pytc").mapping
    # Fields of that tool's own classes which the example leaves at their defaults.
    further = {
        "default.data.augmentation", "train.optimization.optimizer", "train.optimization.ema",
        "train.monitor.early_stopping", "default.optimization",
        "default.inference.test_time_augmentation", "default.inference.window",
        "default.inference.model",
    }  # fmt: skip
    new = {key for key in keys_of(ours) - keys_of(example)
           if not any(key.startswith(f"{place}.") for place in further)}  # fmt: skip
    assert new == set()
    assert (
        ours["default"]["model"]["loss"]["deep_supervision_weights"]
        == (example["default"]["model"]["loss"]["deep_supervision_weights"])
    )
    # 5,000 patches at batch 4, accumulation 2, four devices are 156 steps there; one device here.
    assert ours["train"]["optimization"]["n_steps_per_epoch"] == 1280 // (8 * 2)


def keys_of(mapping: dict[str, Any], path: str = "") -> set[str]:
    """Return the dotted keys of a nested mapping; keyword arguments are values."""
    keys: set[str] = set()
    for key, value in mapping.items():
        nested = isinstance(value, dict) and key != "kwargs" and value
        keys |= keys_of(value, f"{path}{key}.") if nested else {f"{path}{key}"}
    return keys


def test_peer_decoding_writes_channels_and_switches_tests_off_above_one() -> None:
    step = DecodingStep(kwargs={"contour_threshold": [0.8, None], "flood": "support"})
    kwargs = peer_step(step)["kwargs"]
    assert kwargs["contour_threshold"] == [0.8, 1.1]
    assert [kwargs[f"{c}_channels"] for c in ("binary", "contour", "distance")] == [[0], [1], [2]]
    assert "flood" not in kwargs
    assert "floor" not in kwargs


def test_peer_decoding_knows_the_distance_decoder_by_that_tools_name() -> None:
    step = DecodingStep(name="decode_instance_watershed_distance", kwargs={"min_seed_size": 8})
    exported = peer_step(step)
    assert exported["name"] == "decode_distance_watershed"
    assert exported["kwargs"]["distance_channels"] == [2]


@pytest.mark.parametrize(
    ("step", "said"),
    [
        (DecodingStep(name="decode_by_magic"), "no decoder 'decode_by_magic'"),
        (DecodingStep(kwargs={"binary_treshold": [0.5, 0.5]}), "binary_treshold"),
    ],
)
def test_peer_decoding_refuses_what_its_loader_would_not_notice(
    step: DecodingStep, said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        peer_step(step)


def test_a_constant_rate_becomes_a_cosine_from_the_rate_to_the_rate() -> None:
    candidate = load_candidate(
        "baseline",
        {"optimization": {"optimizer": {"lr": 1e-3}, "scheduler": {"name": "constant"}}},
    )
    exported = peer_config(candidate, candidate.test.decoding[0], DATA, schema="pytc")
    assert exported.mapping["train"]["optimization"]["scheduler"]["min_lr"] == 1e-3
    assert any("constant" in note for note in exported.notes)


def test_mednext_weights_are_marked_as_not_loadable_there() -> None:
    candidate = load_candidate("plan_mednext_s")
    for schema in ("pytc", "pytc-2026-01"):
        exported = peer_config(candidate, candidate.test.decoding[0], DATA, schema=schema)
        assert any("NOT" in note for note in exported.notes)
        assert "external_weights_path" not in str(exported.mapping)


@pytest.mark.parametrize("kind", ["plain", "deep"])
def test_weights_survive_the_way_to_that_tool_and_back(
    shared_data: Path, tmp_path: Path, kind: str
) -> None:
    theirs = torch.load(shared_data / "pytc-rsunet" / f"{kind}.ckpt", weights_only=True)
    vectors = np.load(shared_data / "pytc-rsunet" / f"{kind}.npz")
    network = build_network("rsunet", filters=(4, 8, 16), deep_supervision=kind == "deep")
    match_weights(network, theirs["state_dict"], prefix="model.")
    torch.save(peer_weights(network, heads=kind == "deep"), tmp_path / "best.ckpt")
    ours = torch.load(tmp_path / "best.ckpt", weights_only=True)
    assert set(ours["state_dict"]) == set(theirs["state_dict"])
    again = build_network("rsunet", filters=(4, 8, 16), deep_supervision=kind == "deep").eval()
    match_weights(again, ours["state_dict"], prefix="model.")
    names = list(vectors.keys())
    image = torch.from_numpy(vectors[next(n for n in names if n in ("input", "x", "image"))])
    wanted = vectors[next(n for n in names if n.startswith("out"))]
    with torch.no_grad():
        given = again(image)
    assert np.abs(given.numpy() - wanted).max() < 1e-5


def test_study_without_a_finished_trial_is_refused(tmp_path: Path) -> None:
    from hydralv_tune.config.search_space_files import load_space

    storage = f"sqlite:///{tmp_path / 'study.db'}"
    Study.open(storage, "empty", space=load_space("smoke"), create=True).close()
    with pytest.raises(StudyError, match="no complete trial yet"):
        export_best(storage, "empty", tmp_path / "best.yaml")
    assert not (tmp_path / "best.yaml").exists()


def test_unknown_format_names_the_known_ones(finished_study: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Did you mean 'pytc'"):
        export_best(finished_study.storage, "tiny", tmp_path / "best.yaml", format="pytcc")
    with pytest.raises(InputError, match=r"no \.yaml file"):
        export_best(finished_study.storage, "tiny", tmp_path / "best.ckpt")
    with pytest.raises(InputError, match=r"neither \.csv nor \.parquet"):
        export_best(finished_study.storage, "tiny", tmp_path / "b.yaml", table=Path("t.xlsx"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("format", "name"),
    [
        ("hydralv", "space.yaml"), ("pytc", "space.yaml"), ("hydralv", "ensemble.yaml"),
        ("hydralv", "trials/1/best.yaml"), ("hydralv", "trials/new/best.yaml"),
        ("torchscript", "trials/1/best.pt"), ("bioimageio", "trials/1/best.zip"),
        ("pytc-2026-01", "trials/1/best.yaml"),
    ],
)  # fmt: skip
def test_an_export_replaces_nothing_that_a_study_keeps(
    finished_study: Any, tmp_path: Path, format: str, name: str
) -> None:
    copied = finished_study.copied_to(tmp_path / "copy")
    (copied.folder / "space.yaml").write_text("its own")
    (tmp_path / "link").symlink_to(copied.folder)
    before = {path: path.read_bytes() for path in copied.folder.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match=r"^export --out: .* keeps what is its own"):
        export_best(copied.storage, "tiny", tmp_path / "link" / name, format=format)
    table = copied.folder / "trials" / "t.csv"
    with pytest.raises(InputError, match=r"^export --table: .* keeps what is its own"):
        export_best(copied.storage, "tiny", tmp_path / "best.yaml", table=table)
    assert {path: path.read_bytes() for path in before} == before
    assert sum(path.is_file() for path in copied.folder.rglob("*")) == len(before)
    assert not list(tmp_path.glob("best.*"))


def test_an_export_replaces_nothing_of_another_study_either(
    finished_study: Any, tmp_path: Path
) -> None:
    (tmp_path / "study.json").touch()
    with pytest.raises(InputError, match="keeps what is its own"):
        export_best(finished_study.storage, "tiny", tmp_path / "space.yaml")
    with pytest.raises(InputError, match="keeps what is its own"):
        write_report(finished_study.storage, "tiny", tmp_path / "trials" / "1")
    export_best(finished_study.storage, "tiny", tmp_path / "best.yaml")


def test_missing_checkpoint_says_where_it_should_be(finished_study: Any, tmp_path: Path) -> None:
    copied = finished_study.copied_to(tmp_path / "copy")
    storage = copied.storage
    folder = copied.folder_of_best()
    for path in folder.glob("best*.ckpt"):
        path.unlink()
    with pytest.raises(InputError, match=r"best\.ckpt.*no checkpoint any more"):
        export_best(storage, "tiny", tmp_path / "best.yaml")
    (folder / "record.json").unlink()
    with pytest.raises(InputError, match=r"no.*record\.json"):
        export_best(storage, "tiny", tmp_path / "best.yaml")
    assert not (tmp_path / "best.yaml").exists()


@pytest.mark.parametrize("name", known_names("trials"))
def test_every_recipe_survives_being_written_and_read(name: str, tmp_path: Path) -> None:
    candidate = load_candidate(name)
    path = tmp_path / "again.yaml"
    path.write_text(dump_yaml(changed_keys(candidate)))
    assert load_candidate(path) == candidate


def network_and_window(finished_study: Any) -> tuple[Any, Any, np.ndarray]:
    """Return network, candidate and a window of the study's image."""
    study = open_readonly(finished_study.storage, finished_study.name)
    folder = study.folder_of(study.best())
    study.close()
    network, candidate = load_network(folder / "best.ckpt")
    size = window_of(candidate)
    image = read_array(finished_study.folder / "im.h5")
    assert all(side <= n for side, n in zip(size, image.shape, strict=True))
    return network, candidate, image[tuple(slice(side) for side in size)]


def at_once(network: Any, candidate: Any, window: np.ndarray) -> np.ndarray:
    """Return what the network says of a window, normalised by itself and not padded."""
    shown = fit_image(window, candidate.data)[1].apply(window)
    with torch.inference_mode():
        logits = network(torch.from_numpy(shown)[None, None])
    tta = candidate.inference.test_time_augmentation
    return activate(logits, tta.channel_activations)[0].numpy()


def sources_named_in(torchscript: Path) -> list[str]:
    """Return the records of a TorchScript file that name a folder with Python sources of here."""
    folders = [str(Path(file).parent).encode() for file in (models.__file__, torch.__file__)]
    with zipfile.ZipFile(torchscript) as records:
        contents = {name: records.read(name) for name in records.namelist()}
    assert any(name.endswith("data.pkl") for name in contents)
    return [name for name, content in contents.items() if any(f in content for f in folders)]


def test_the_page_gives_the_same_probabilities_without_this_package(
    finished_study: Any, tmp_path: Path
) -> None:
    network, candidate, window = network_and_window(finished_study)
    document = export_best(
        finished_study.storage, "tiny", tmp_path / "best.pt", format="torchscript"
    )
    write_array(tmp_path / "im.h5", window)
    page = (REPOSITORY / "docs/howto/use-the-model-elsewhere.md").read_text()
    code = page.split("```python\n")[1].split("```")[0]
    code += "import sys\nassert not [m for m in sys.modules if m.startswith('hydralv')]\n"
    (tmp_path / "page.py").write_text(code)
    subprocess.run([sys.executable, "page.py"], cwd=tmp_path, check=True, timeout=200)
    found = np.load(tmp_path / "probabilities.npy")
    np.testing.assert_allclose(found, at_once(network, candidate, window), atol=1e-5)
    assert sources_named_in(tmp_path / "best.pt") == []
    extra = {"hydralv.json": ""}
    torch.jit.load(tmp_path / "best.pt", _extra_files=extra)
    told_there = json.loads(extra["hydralv.json"])
    assert told_there["decoding"]["kwargs"] == best_record(finished_study).decoding["kwargs"]
    with safe_open(document["safetensors"], "pt") as weights:
        assert json.loads(weights.metadata()["candidate"])["model"] == json.loads(
            json.dumps(candidate.as_mapping()["model"], default=list)
        )
        for name, value in network.state_dict().items():
            assert torch.equal(weights.get_tensor(name), value)


def test_a_model_of_bioimage_io_has_what_its_description_names(
    finished_study: Any, tmp_path: Path
) -> None:
    """`bioimageio.core`, which is no dependency, was run on such a file by hand."""
    network, candidate, _ = network_and_window(finished_study)
    document = export_best(
        finished_study.storage, "tiny", tmp_path / "best.zip", format="bioimageio"
    )
    with zipfile.ZipFile(document["out"]) as package:
        package.extractall(tmp_path / "model")
    rdf = yaml.safe_load((tmp_path / "model" / "rdf.yaml").read_text())
    named = [rdf["documentation"], *rdf["attachments"], rdf["weights"]["torchscript"]]
    named += [rdf[side][0]["test_tensor"] for side in ("inputs", "outputs")]
    for entry in named:
        content = (tmp_path / "model" / entry["source"]).read_bytes()
        assert hashlib.sha256(content).hexdigest() == entry["sha256"]
    raw = np.load(tmp_path / "model" / "test_input.npy")
    stated = np.load(tmp_path / "model" / "test_output.npy")
    assert str(raw.dtype) == rdf["inputs"][0]["data"]["type"]
    assert candidate.data.image_transform.normalize == "z_section"
    assert rdf["inputs"][0]["preprocessing"] == [
        {"id": "ensure_dtype", "kwargs": {"dtype": "float32"}},
        {"id": "zero_mean_unit_variance", "kwargs": {"axes": ["y", "x"], "eps": 1e-6}},
        {"id": "ensure_dtype", "kwargs": {"dtype": "float32"}},
    ]
    spread = (raw - raw.mean((3, 4), keepdims=True)) / raw.std((3, 4), keepdims=True)
    assert sources_named_in(tmp_path / "model" / "weights.pt") == []
    traced = torch.jit.load(tmp_path / "model" / "weights.pt")
    found = traced(torch.from_numpy(spread.astype(np.float32)))[0].detach().numpy()
    np.testing.assert_allclose(found, stated[0], atol=1e-4)
    np.testing.assert_allclose(stated[0], at_once(network, candidate, raw[0, 0]), atol=1e-5)


@pytest.mark.parametrize(("format", "suffix"), [("torchscript", ".pt"), ("bioimageio", ".zip")])
def test_a_model_is_refused_a_name_of_another_kind(
    finished_study: Any, tmp_path: Path, format: str, suffix: str
) -> None:
    with pytest.raises(InputError, match=rf"must end with \{suffix}"):
        export_best(finished_study.storage, "tiny", tmp_path / "best.yaml", format=format)


def test_a_network_that_sees_equalised_sections_is_refused_by_bioimage_io(tmp_path: Path) -> None:
    transform = {"data": {"image_transform": {"normalize": "clahe"}}}
    candidate = load_candidate("smoke", transform)
    kept = {"format": FORMAT, "version": FORMAT_VERSION, "candidate": candidate.as_mapping(),
            "weights": network_of(candidate).state_dict()}  # fmt: skip
    torch.save(kept, tmp_path / "best.ckpt")
    best: Any = SimpleNamespace(checkpoint=tmp_path / "best.ckpt")
    with pytest.raises(InputError, match="equalise first"):
        export_bioimageio(best, tmp_path / "best.zip")
    peer = peer_config(candidate, candidate.test.decoding[0], DATA, schema="pytc")
    assert any("CLAHE" in note for note in peer.notes)
    assert "cannot equalise" in str(normalised_otherwise(candidate, "pytc"))


def test_every_export_has_a_certificate_of_what_it_was_chosen_on(
    finished_study: Any, tmp_path: Path
) -> None:
    record = best_record(finished_study)
    document = export_best(finished_study.storage, "tiny", tmp_path / "best.yaml")
    path = Path(document["certificate"])
    assert path == tmp_path / "best.certificate.md"
    text = path.read_text()
    error, f1 = record.metrics["adapted_rand_error"], record.metrics["f1_iou50"]
    row = re.search(r"\| adapted Rand error \| (\S+) \| (\S+) to (\S+) \|", text)
    assert row is not None
    value, low, high = map(float, row.groups())
    assert low <= value <= high
    assert value == pytest.approx(error, abs=1e-4)
    for words in (
        record.split["sentence"], record.volumes[0]["fingerprint"], "Guard", "met",
        f"one (seed {record.seed}), so the spread is not known",
        f"hydralv-tune {record.provenance['versions']['hydralv-tune']}",
        f"the winner of {record.sweep['combinations']:,} combinations",
        "on the volume that it was trained on",
        "thresholds and checkpoint were chosen on the same data",
        f"F1 at IoU 0.5 {f1:.3f} (95 % interval",
    ):  # fmt: skip
        assert words in text
    for format, name in (("torchscript", "best.pt"), ("pytc", "theirs.yaml")):
        other = export_best(finished_study.storage, "tiny", tmp_path / name, format=format)
        assert record.split["sentence"] in Path(other["certificate"]).read_text()


def test_a_certificate_says_where_seeds_differ_and_where_a_volume_is_gone(
    finished_study: Any, tmp_path: Path
) -> None:
    copied = finished_study.copied_to(tmp_path / "study")
    folder, storage = copied.folder, copied.storage
    study = open_readonly(finished_study.storage, "tiny")
    best, other = study.best(), next(view for view in study.trials() if view.state == "COMPLETE")
    if best.number == other.number:
        other = [view for view in study.trials() if view.state == "COMPLETE"][1]
    mine, theirs = (folder / "trials" / str(view.root) / "record.json" for view in (best, other))
    study.close()
    document = json.loads(mine.read_text())
    document["config"]["system"]["seed"] = document["seed"] = 7
    document["value"] = best.value + 0.1
    gone = mine.read_text().replace(str(finished_study.folder / "im.h5"), str(folder / "gone.h5"))
    mine.write_text(gone)
    theirs.write_text(json.dumps(document))
    made = export_best(storage, "tiny", tmp_path / "best.yaml", folder=folder)
    text = Path(made["certificate"]).read_text()
    assert f"2: mean {best.value + 0.05:.4f}, from {best.value:.4f}" in text
    assert "not measured, since" in text
