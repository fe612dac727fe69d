"""Candidates whose exports PyTorch Connectomics was asked to load, and files of its own to import.

`python tests/pytc_vocabulary.py FOLDER` writes all of them, as `vectors/pytc/README.md` tells.
"""

from __future__ import annotations

import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hydralv_tune.config.candidate import Candidate
from hydralv_tune.config.files import candidate_from_mapping
from hydralv_tune.config.yaml_io import dump_yaml
from hydralv_tune.data.volumes import VolumePaths
from hydralv_tune.numerics.augmentation.registry import AUGMENTATIONS
from hydralv_tune.numerics.losses.registry import LOSSES, loss_arguments
from hydralv_tune.results.export.pytc import PEER_FORMATS, PeerConfig, peer_config
from hydralv_tune.results.export.pytc_blocks import PeerData

DATA = PeerData(
    volumes=[VolumePaths("im", "im.h5", "label.h5", "mask.h5")],
    voxel_size_nm=(30.0, 8.0, 8.0),
    weights=None,
    experiment="vocabulary",
    description="one word",
)
OF_DISTANCE = ("SmoothL1Loss", "MSELoss", "WeightedMSELoss", "L1Loss", "WeightedMAELoss")
"""Losses of a distance map; the others are of a probability."""
OVERLAPS = ("DiceLoss", "DiceCELoss", "DiceFocalLoss", "TverskyLoss")
SHAPE = (2, 3, 4, 8, 8)


def voxels() -> tuple[Tensor, Tensor, Tensor]:
    """Return logits, targets (two binary, one distance) and a mask that losses were asked for."""
    random = np.random.default_rng(0)
    logits = random.normal(0, 2, SHAPE).astype("float32")
    targets = (random.random(SHAPE) < 0.3).astype("float32")
    targets[:, 2] = random.uniform(-1, 1, SHAPE)[:, 2]
    mask = (random.random((2, 1, *SHAPE[2:])) < 0.7).astype("float32")
    return torch.from_numpy(logits), torch.from_numpy(targets), torch.from_numpy(mask)


def cases() -> dict[str, Candidate]:
    """Return the candidates by name: each augmentation alone, each loss with every argument."""
    made: dict[str, Candidate] = {}
    for name in AUGMENTATIONS:
        block = {"preset": "none", name: {"enabled": True}}
        made[f"augmentation {name}"] = _candidate({"data": {"augmentation": block}})
    for name in LOSSES:
        given = {k: v for k, v in loss_arguments(name).items() if v is not None}
        made[f"loss {name}"] = _candidate({"model": _losses(name, given)})
        made[f"loss {name} bare"] = _candidate({"model": _losses(name, {})})
        if "tanh" in given:
            made[f"loss {name} tanh"] = _candidate({"model": _losses(name, {"tanh": True})})
        for weight in sorted({"pos_weight", "foreground_weight"} & set(loss_arguments(name))):
            for value in (3.0, "balanced"):
                weighted = {"model": _losses(name, {weight: value})}
                made[f"loss {name} {weight} {value}"] = _candidate(weighted)
    return dict(sorted(made.items()))


def foreign(schema: str) -> dict[str, dict[str, Any]]:
    """Return files of that tool by name, each with one loss as its own users write it."""
    today = schema == "pytc"
    base = exported(cases()["loss DiceLoss"], schema).mapping
    made: dict[str, dict[str, Any]] = {}

    def add(name: str, kwargs: dict[str, Any], weight: Any = None) -> None:
        mapping, place = deepcopy(base), place_of(name)
        if today:
            entry = mapping["default"]["model"]["loss"]["losses"][place]
            entry |= {"function": name, "kwargs": kwargs}
            entry.pop("pos_weight", None)
            entry |= {} if weight is None else {"pos_weight": weight}
        else:
            mapping["model"]["loss_functions"][place] = name
            mapping["model"]["loss_kwargs"][place] = kwargs
        said = [f"{key} {value}" for key, value in kwargs.items()]
        said += [] if weight is None else [f"weight {weight}"]
        made[" ".join(["import", name, *said])] = mapping

    for name in LOSSES:
        add(name, {})
    for name in OVERLAPS:
        add(name, {"sigmoid": True})
    add("WeightedBCEWithLogitsLoss", {"pos_weight": 3.0})
    for name in ("SmoothL1Loss", "WeightedMSELoss", "WeightedMAELoss"):
        add(name, {"tanh": True})
    if today:
        for name in ("WeightedBCEWithLogitsLoss", "SmoothL1Loss", "WeightedMSELoss"):
            for weight in (1.0, 3.0, "auto"):
                add(name, {}, weight)
    return made


def place_of(name: str) -> int:
    """Return the channel, and so the place in the list of losses, that a loss is asked for at."""
    return 2 if name in OF_DISTANCE else 0


def exported(candidate: Candidate, schema: str) -> PeerConfig:
    """Return a candidate in a schema of that tool."""
    return peer_config(candidate, candidate.test.decoding[0], DATA, schema=schema)


def words(mapping: dict[str, Any], case: str, schema: str) -> Any:
    """Return the part of an export that a case is about."""
    today = schema == "pytc"
    kind, name = case.split()[:2]
    if kind == "augmentation":
        blocks = (mapping["default"] if today else mapping)["data"]["augmentation"]
        return blocks.get(name)
    if today:
        return mapping["default"]["model"]["loss"]["losses"][place_of(name)]
    return [mapping["model"][key][place_of(name)] for key in ("loss_functions", "loss_kwargs")]


def _candidate(partial: dict[str, Any]) -> Candidate:
    return candidate_from_mapping(partial, place="vocabulary")


def _losses(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the keys of `model` for one loss a channel, one of them the named one."""
    functions = ["DiceLoss", "DiceLoss", "SmoothL1Loss"]
    kwargs: list[dict[str, Any]] = [{}, {}, {"tanh": True}]
    functions[place_of(name)], kwargs[place_of(name)] = name, arguments
    return {
        "loss_functions": functions,
        "loss_weights": [1.0, 1.0, 1.0],
        "loss_kwargs": kwargs,
        "multi_task_config": [[0, 1, "label", [0]], [1, 2, "boundary", [1]], [2, 3, "edt", [2]]],
    }


if __name__ == "__main__":
    for schema in PEER_FORMATS:
        files = {case: exported(candidate, schema).mapping for case, candidate in cases().items()}
        for case, mapping in {**files, **foreign(schema)}.items():
            path = Path(sys.argv[1]) / f"{case.replace(' ', '-')}.{schema}.yaml"
            path.write_text(dump_yaml(mapping))
