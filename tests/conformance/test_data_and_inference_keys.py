"""Every key of `data` and `inference` changes what is sampled or predicted, or says it does not.

A key that is added has to be entered in `CHANGES` with a change that shows, or its description has
to begin with "No effect"; a key whose way to the sampler or the predictor is cut fails here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import BaseModel

from hydralv_tune.config.candidate import Candidate, DecodingGrid
from hydralv_tune.config.explanation import NO_EFFECT
from hydralv_tune.config.search_space import Objective
from hydralv_tune.config.validation import merged, nested, sub_model
from hydralv_tune.data.volumes import Volume, VolumePaths, write_array
from hydralv_tune.numerics.augmentation.augment import augment
from hydralv_tune.numerics.targets import derive_targets
from hydralv_tune.trial.run import TrialSpec, run_trial
from hydralv_tune.trial.scoring.prediction import predict
from hydralv_tune.trial.state import TrialRun

BASE: dict[str, Any] = {
    "system": {"training": {"batch_size": 2}},
    "model": {"architecture": "monai_unet", "filters": [4, 8], "num_res_units": 0},
    "data": {
        "patch_size": [4, 16, 16],
        "iter_num_per_epoch": 4,
        "augmentation": {"preset": "none"},
    },
    "optimization": {"max_epochs": 1},
    "monitor": {"evaluation": {"count": 1}},
    "inference": {"sliding_window": {"overlap": 0.5}},
}
pytestmark = pytest.mark.usefixtures("without_pictures")
WINDOW, TTA = "inference.sliding_window", "inference.test_time_augmentation"
LABELS = "data.label_transform"


def targets(boundary: dict[str, Any], distance: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the targets with arguments of theirs."""
    return [
        {"name": "binary"},
        {"name": "instance_boundary", "kwargs": boundary},
        {"name": "instance_edt", "kwargs": distance},
    ]


HOLDOUT = {"data.split.kind": "holdout", "data.split.margin": 1, "data.split.axis": 1}
FLIPPED = {f"{TTA}.enabled": True, f"{TTA}.flip_axes": [1]}
TURNED = {f"{TTA}.enabled": True, f"{TTA}.rotation90_axes": [[1, 2]]}
AFFINE = {"preset": "some", "affine": {"enabled": True, "prob": 1.0}}
NM = (30.0, 8.0, 8.0)

SAMPLED, PREDICTED = ("sampled",), ("predicted",)
BOTH, SPLIT = ("sampled", "predicted"), ("sampled", "scored")

CHANGES: list[tuple[str, tuple[str, ...], dict[str, Any], Any]] = [
    # The volume says (30, 8, 8) nm itself; what the candidate says comes first.
    ("data.train_resolution", SAMPLED, {f"{LABELS}.edt_voxel_size": "volume"}, [8.0, 8.0, 8.0]),
    ("data.train_resolution", SAMPLED, {"data.augmentation": AFFINE}, [8.0, 8.0, 8.0]),
    ("data.patch_size", BOTH, {}, [4, 16, 32]),
    ("data.pad_size", BOTH, {}, [2, 4, 4]),
    ("data.pad_mode", BOTH, {"data.pad_size": [2, 8, 8]}, "constant"),
    ("data.iter_num_per_epoch", ("steps",), {}, 8),
    ("data.image_transform.normalize", BOTH, {}, "z_section"),
    ("data.image_transform.fill", BOTH, {}, "zeros"),
    ("data.image_transform.clip_percentile_low", BOTH, {}, 0.2),
    ("data.image_transform.clip_percentile_high", BOTH, {}, 0.8),
    (f"{LABELS}.targets", SAMPLED, {}, targets({"thickness": 2}, {})),
    (f"{LABELS}.targets", SAMPLED, {}, targets({"mode": "3d"}, {})),
    (f"{LABELS}.targets", SAMPLED, {}, targets({"edge_mode": "seg-no-bg"}, {})),
    (f"{LABELS}.targets", SAMPLED, {}, targets({}, {"mode": "2d"})),
    (f"{LABELS}.edt_voxel_size", SAMPLED, {}, "volume"),
    ("data.sampling.foreground_share", SAMPLED, {}, 1.0),
    ("data.augmentation.preset", SAMPLED, {}, "all"),
    ("data.augmentation.preset", SAMPLED, {"data.augmentation.flip": {"enabled": True}}, "some"),
    ("data.split.kind", SPLIT, {"data.split.margin": 1, "data.split.axis": 1}, "holdout"),
    ("data.split.axis", SPLIT, HOLDOUT, 2),
    ("data.split.fraction", SPLIT, HOLDOUT, 0.5),
    ("data.split.side", SPLIT, HOLDOUT, "low"),
    ("data.split.margin", SAMPLED, HOLDOUT, 3),
    (
        "data.split.volumes",
        SPLIT,
        {"data.split.kind": "volumes", "data.split.volumes": ["b"]},
        ["a"],
    ),
    ("data.split.folds", SPLIT, {"data.split.kind": "cross_validation", "data.split.folds": 2}, 3),
    ("data.split.blocks", SPLIT, {"data.split.kind": "blocks", "data.split.margin": 1}, [1, 1, 2]),
    ("data.memory_limit_gb", ("read", "scored"), {}, 1e-6),
    (f"{WINDOW}.window_size", PREDICTED, {}, [4, 32, 32]),
    (f"{WINDOW}.sw_batch_size", ("at_once",), {}, 3),
    (f"{WINDOW}.overlap", PREDICTED, {}, 0.25),
    (f"{WINDOW}.blending", PREDICTED, {}, "constant"),
    (f"{WINDOW}.sigma_scale", PREDICTED, {}, 0.3),
    (f"{WINDOW}.padding_mode", PREDICTED, {f"{WINDOW}.window_size": [16, 64, 64]}, "constant"),
    (f"{TTA}.enabled", PREDICTED, {**FLIPPED, f"{TTA}.enabled": False}, True),
    (f"{TTA}.flip_axes", PREDICTED, FLIPPED, [2]),
    (f"{TTA}.rotation90_axes", PREDICTED, {f"{TTA}.enabled": True}, [[1, 2]]),
    (f"{TTA}.rotate90_k", PREDICTED, TURNED, [0, 1]),
    (f"{TTA}.channel_activations", PREDICTED, {}, [[0, 3, "tanh"]]),
    (f"{TTA}.ensemble_mode", PREDICTED, FLIPPED, "max"),
    (f"{TTA}.apply_mask", PREDICTED, {}, True),
]
"""Key, where it must show, what else has to be said for it to matter, and a value to change to."""

HELD_OUT = ("data.val_image", "data.val_label", "data.val_mask")
"""Keys that name files; a test of their own changes them."""


def volume(name: str = "a", seed: int = 0) -> Volume:
    """Return noise (10, 40, 48) with a border and four balls, two of which touch; most counts."""
    rng = np.random.default_rng(seed)
    label = np.zeros((10, 40, 48), np.uint16)
    grid = np.indices(label.shape)
    centres = [(4, 9, 9), (4, 9, 15), (6, 30, 18), (5, 18, 36)]
    for number, centre in enumerate(centres, 1):
        away = sum((g - c) ** 2 * w for g, c, w in zip(grid, centre, (4, 1, 1), strict=True))
        label[(away < 30) & (label == 0)] = number
    image = rng.integers(20, 180, label.shape) + 5 * grid[0] + 60 * (label > 0)
    image[:, 36:] = 5  # a border of one value, as of padding
    mask = np.zeros(label.shape, bool)
    mask[:, :, :44] = True
    return Volume(name, image.clip(0, 255).astype(np.uint8), label, mask, NM)


def candidate(said: dict[str, Any]) -> Candidate:
    """Return the candidate of key paths and values, laid over `BASE`."""
    return Candidate.model_validate(merged(BASE, *(nested(key, v) for key, v in said.items())))


def spec(chosen: Candidate, **keys: Any) -> TrialSpec:
    """Return a trial of the candidate on a CPU."""
    # So loose that even what an untrained network says has instances.
    loose = {"binary_threshold": [0.5], "contour_threshold": [None], "distance_threshold": [-1.0]}
    axes = {key: {"seed": values, "foreground": values} for key, values in loose.items()}
    grid = DecodingGrid.model_validate({"grid": {**axes, "min_seed_size": [1]}})
    values = {"volumes": [], "out": "unused", "device": "cpu", "threads": 1, "study": "s", **keys}
    return TrialSpec(0, 0, chosen, Objective(), grid, **values)


@lru_cache
def outcome(said: str) -> dict[str, Any]:
    """Return all that a candidate, said as JSON, makes of volumes before it has learned."""
    torch.set_num_threads(1)
    chosen = candidate(json.loads(said))
    volumes = [volume(name, seed) for seed, name in enumerate("abc")]
    run = TrialRun(spec(chosen), volumes, [], torch.device("cpu"))
    found: dict[str, Any] = {"steps": run.plan.steps}
    for fold in run.folds:
        trainer, scored = fold.trainer, fold.score[0]
        patches = augment(trainer.sampler.draw(8), trainer.augmentation, trainer.generator)
        learnt = derive_targets(patches.labels, patches.edt, **trainer.boundary)
        at_once: list[int] = []
        hook = fold.network.register_forward_hook(lambda m, i, o, to=at_once: to.append(len(i[0])))
        maps = predict(fold.network, scored.image, chosen, mask=scored.mask)
        hook.remove()
        for part, value in {
            "sampled": [digest(each) for each in (patches.image, learnt, patches.mask)],
            "read": [type(source).__name__ for source in trainer.sampler.sources],
            "predicted": digest(maps),
            "at_once": sorted(set(at_once)),
            "scored": [volume.name for volume in fold.score],
        }.items():
            found.setdefault(part, []).append(value)
    run.close()
    return found


def digest(values: Any) -> str:
    """Return a fingerprint of an array."""
    array = np.ascontiguousarray(values)
    return hashlib.sha256(array.tobytes() + str(array.shape).encode()).hexdigest()


@pytest.mark.parametrize(("key", "parts", "setting", "value"), CHANGES)
def test_a_key_changes_what_is_sampled_or_predicted(
    key: str, parts: tuple[str, ...], setting: dict[str, Any], value: Any
) -> None:
    before, after = outcome(json.dumps(setting)), outcome(json.dumps({**setting, key: value}))
    for part in parts:
        assert before[part] != after[part], part


def test_without_a_change_the_outcome_is_the_same() -> None:
    said = {"data.augmentation.preset": "all", **FLIPPED}
    before = outcome(json.dumps(said))
    outcome.cache_clear()
    assert outcome(json.dumps(said)) == before


def files(folder: Path, name: str, seed: int) -> dict[str, str]:
    """Write a volume and return its paths."""
    given = volume(name, seed)
    arrays = {"image": given.image, "label": given.label, "mask": given.mask}
    for kind, array in arrays.items():
        write_array(folder / f"{name}_{kind}.h5", np.asarray(array, array.dtype), voxel_size_nm=NM)
    return {kind: str(folder / f"{name}_{kind}.h5") for kind in arrays}


@pytest.mark.parametrize("key", HELD_OUT)
def test_a_held_out_file_changes_what_is_scored(key: str, tmp_path: Path) -> None:
    own, other = files(tmp_path, "own", 0), files(tmp_path, "other", 1)
    label = np.roll(volume().label, 3, axis=2)
    write_array(tmp_path / "other_label.h5", label, voxel_size_nm=NM)
    said = {
        "data.split.kind": "volumes",
        "data.val_image": own["image"],
        "data.val_label": own["label"],
        "inference.sliding_window.window_size": [4, 32, 32],
    }
    changed = {
        "data.val_image": other["image"],
        "data.val_label": other["label"],
        "data.val_mask": own["mask"],
    }[key]
    trained = VolumePaths("t", own["image"], own["label"], None)
    scores = []
    for number, keys in enumerate((said, {**said, key: changed})):
        out = str(tmp_path / str(number))
        record = run_trial(spec(candidate(keys), volumes=[trained], out=out), lambda _: None)
        scores.append((record.volumes[1]["fingerprint"], record.metrics))
    assert scores[0][0] != scores[1][0]
    assert scores[0][1] != scores[1][1]


def keys_with_effect(model: type[BaseModel], path: str) -> Iterator[str]:
    """Yield each key of a block whose description does not say that it has none."""
    for name, field in model.model_fields.items():
        inner = sub_model(field.annotation)
        if inner is not None:
            yield from keys_with_effect(inner, f"{path}.{name}")
        elif not (field.description or "").startswith(NO_EFFECT):
            yield f"{path}.{name}"


def test_every_key_is_tried() -> None:
    tried = {key for key, *_ in CHANGES} | set(HELD_OUT)
    blocks = ("data", "inference")
    fields = Candidate.model_fields
    known = {key for block in blocks for key in keys_with_effect(fields[block].annotation, block)}
    assert tried == known
