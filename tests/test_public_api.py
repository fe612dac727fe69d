"""What `import hydralv_tune` promises: names, laziness, and arrays in, arrays out."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from commands_in_a_process import SMALL_SPACE, environment

import hydralv_tune
from hydralv_tune.config.search_space import space_from_mapping

NAMES = {
    "Architecture", "Augmentation", "Candidate", "CheckpointError", "ConfigError", "HydraLVError",
    "InputError", "Key", "Metric", "RunOptions", "SearchSpace", "StudyError", "StudyResults",
    "TrialFailed", "TrialInterrupted", "Volume", "VolumeError", "VolumePaths", "__version__",
    "decode", "export_best", "load_candidate", "load_space", "make_phantom", "open_study",
    "predict", "read_volume", "register_architecture", "register_augmentation", "register_decoder",
    "register_loss", "register_metric", "register_pruner", "register_sampler", "run_study",
    "score", "segment", "sweep", "train", "write_report",
}  # fmt: skip
"""A name that goes breaks scripts: change this set on purpose, with a line in CHANGELOG.md."""
HEAVY = {"torch", "ray", "optuna", "numpy", "pandas", "pydantic", "numba", "monai", "scipy"}


def test_the_public_names_are_these() -> None:
    assert set(hydralv_tune.__all__) == NAMES
    assert set(dir(hydralv_tune)) == NAMES
    with pytest.raises(AttributeError, match="no attribute 'segmnt'"):
        hydralv_tune.segmnt  # noqa: B018


@pytest.mark.parametrize("name", sorted(NAMES - {"__version__"}))
def test_a_public_name_is_importable_and_documented(name: str) -> None:
    found = getattr(hydralv_tune, name)
    text = inspect.getdoc(found) or ""
    assert text.splitlines()[0].endswith("."), f"{name}: one line that says what it is"
    if inspect.isfunction(found):
        parameters = inspect.signature(found).parameters
        if len(parameters) > 1:
            assert "Args:" in text
        assert all(p.annotation is not inspect.Parameter.empty for p in parameters.values())


def test_type_checkers_see_the_same_names() -> None:
    source = Path(hydralv_tune.__file__).read_text()
    assert set(re.findall(r" as (\w+)$", source, re.MULTILINE)) | set(
        re.findall(r"^        (\w+) as \1,$", source, re.MULTILINE)
    ) == NAMES - {"__version__"}


def test_a_study_is_started_from_where_the_first_version_had_it() -> None:
    from hydralv_tune.launch import cluster, run
    from hydralv_tune.studies import launch as before

    assert before.run_study is run.run_study
    assert before.StudyInterrupted is run.StudyInterrupted
    assert before.cluster is cluster


def test_importing_imports_nothing_heavy() -> None:
    program = (
        "import sys, hydralv_tune; hydralv_tune.__version__; dir(hydralv_tune); "
        f"heavy = {sorted(HEAVY)!r}; found = [n for n in heavy if n in sys.modules]; "
        "sys.exit(f'imported {found}' if found else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False,
        env=environment(), timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def perfect(label: np.ndarray) -> np.ndarray:
    """Return probabilities that decode into exactly these instances."""
    inside = label > 0
    return np.stack([inside, np.zeros_like(inside), np.where(inside, 1.0, -1.0)]).astype(np.float16)


@pytest.fixture(scope="module")
def made() -> hydralv_tune.Volume:
    phantom = hydralv_tune.make_phantom(shape=(16, 96, 96), instances=6, seed=3)
    return hydralv_tune.Volume("phantom", phantom.image, phantom.label, phantom.mask)


def test_arrays_go_in_and_arrays_come_out(made: hydralv_tune.Volume) -> None:
    assert made.label is not None
    assert made.mask is not None
    maps = perfect(made.label)
    found = hydralv_tune.decode(maps, made.mask, min_seed_size=0)
    assert found.shape == made.label.shape
    figures = hydralv_tune.score(found, made.label, made.mask)
    assert figures["instances_true"] == len(np.unique(made.label)) - 1
    assert figures["recall_iou50"] > 0.8  # two may touch
    space = space_from_mapping({"decoding": SMALL_SPACE["decoding"]})
    swept = hydralv_tune.sweep(maps, made.label, made.mask, space=space)
    again = hydralv_tune.decode(maps, made.mask, **swept.winner.arguments)
    assert hydralv_tune.score(again, made.label, made.mask)["adapted_rand_error"] == pytest.approx(
        swept.winner.metrics["adapted_rand_error"]
    )


def test_a_wrong_argument_is_refused_by_name(made: hydralv_tune.Volume) -> None:
    maps = perfect(made.image)
    with pytest.raises(
        hydralv_tune.ConfigError, match=r"decode: min_seed is 3, but .*min_seed_size"
    ):
        hydralv_tune.decode(maps, min_seed=3)
    with pytest.raises(hydralv_tune.InputError, match="prediction against label"):
        hydralv_tune.score(made.label, made.label[1:])
    with pytest.raises(hydralv_tune.StudyError, match="nowhere"):
        hydralv_tune.open_study("nowhere")
    with pytest.raises(hydralv_tune.InputError, match="volumes: none is given"):
        hydralv_tune.run_study("smoke", [], "out")
