"""The command that takes a PyTorch Connectomics configuration over."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from hydralv_tune.cli.console import print_facts, print_json, say
from hydralv_tune.cli.options import Json, check_file_out, path_option
from hydralv_tune.config.errors import CheckpointError, InputError

YAML = (".yaml", ".yml")
SEARCHED: dict[str, dict[str, Any]] = {
    "optimization.optimizer.weight_decay": {"float": [1e-4, 1e-1], "log": True},
    "model.loss_balancing.strategy": {"choice": ["none", "uncertainty"]},
    "data.sampling.foreground_share": {"float": [0.0, 0.95]},
    "data.augmentation.preset": {"choice": ["none", "some", "all"]},
}
"""What a space around an imported candidate samples beside the learning rate."""


def import_(
    file: Annotated[
        Path, typer.Argument(help="A YAML of PyTorch Connectomics, or a checkpoint that holds one.")
    ],
    out: Annotated[Path, path_option(help="The candidate that is written.")],
    space: Annotated[
        Path | None, path_option(help="Also write a search space around the candidate.")
    ] = None,
    json: Json = False,
) -> None:
    """Write a PyTorch Connectomics configuration as a candidate, and list what was left behind.

    Today's files are resolved as that tool does (`_base_`, profiles, stages), those of January 2026
    are taken as they are. A checkpoint is read without running anything in it.

    Example: `hydralv-tune import hydra-lv-finetune.yaml --out candidate.yaml --space space.yaml`
    """
    from hydralv_tune.artifacts.writing import write_atomically
    from hydralv_tune.config.files import (
        baseline,
        candidate_from_mapping,
        import_configuration,
    )
    from hydralv_tune.config.pytc_files import read_peer_file
    from hydralv_tune.config.pytc_import import volume_options
    from hydralv_tune.config.search_space import SearchSpace
    from hydralv_tune.config.validation import merged, validated
    from hydralv_tune.config.yaml_io import dump_yaml

    check_file_out("import --out", out, YAML, [file])
    if space is not None:
        check_file_out("import --space", space, YAML, [file, out])
    if not file.is_file():
        raise InputError(f"import: {file}: there is no such file.")
    mapping = read_peer_file(file) if file.suffix in YAML else _configuration_of(file)
    imported = import_configuration(mapping, file)
    partial = merged({"experiment_name": out.stem}, imported.candidate)
    if file.suffix not in YAML and "external_weights_path" not in partial["model"]:
        weights = {"model": {"external_weights_path": str(file.absolute())}}
        partial = merged(partial, weights)
    candidate = candidate_from_mapping(partial, place=str(out), base=baseline())
    head = [f"Imported from {file.name} of PyTorch Connectomics."]
    groups = {
        "left out, a result may differ": [e for e in imported.left_out if e.matters],
        "left out, without effect": [e for e in imported.left_out if not e.matters],
    }
    for title, entries in groups.items():
        head += [f"{title.capitalize()}:", *(f"- {e}" for e in entries)] if entries else []
    written = {str(out): dump_yaml(partial)}
    if space is not None:
        around = _space_around(out, candidate.optimization.optimizer.lr, imported.grid)
        validated(SearchSpace, {"name": space.stem, **around}, str(space))
        written[str(space)] = dump_yaml(around)
    comments = "".join(f"# {' '.join(line.split())}\n" for line in head)
    for name, text in written.items():
        write_atomically(Path(name), (comments + text).encode())
    options = list(volume_options(imported))
    command = ["hydralv-tune", "run", str(space), *options] if space is not None else []
    document = {
        "out": str(out),
        "space": None if space is None else str(space),
        "left_out": [str(entry) for entry in imported.left_out],
    }
    if json:
        print_json(document)
        return
    print_facts("Imported", {key: v for key, v in document.items() if key != "left_out"})
    for title, entries in groups.items():
        for entry in entries:
            say(f"{title}: {entry}")
    if imported.whole:
        say("Nothing was left out that a result may depend on.")
    if command:
        print(shlex.join(command))


def _configuration_of(path: Path) -> dict[str, Any]:
    """Return the configuration object that Lightning stored in a checkpoint, as plain values.

    Raises:
        InputError: The checkpoint holds none.
    """
    from hydralv_tune.artifacts.inert_checkpoint import plain_values, read_inert_checkpoint

    content = read_inert_checkpoint(path)
    try:
        stored = plain_values(content.get("hyper_parameters"))
    except CheckpointError as error:
        raise CheckpointError(f"import: {path}: {error}") from error
    configuration = stored.get("cfg") if isinstance(stored, dict) else None
    if not isinstance(configuration, dict):
        raise InputError(
            f"import: {path}: holds no configuration beside its weights. Give the YAML that it was "
            "trained with, and name the checkpoint as model.external_weights_path."
        )
    return configuration


def _space_around(candidate: Path, rate: float, grid: dict[str, Any] | None) -> dict[str, Any]:
    """Return a search space that varies a candidate."""
    from hydralv_tune.config.search_space_files import load_space

    decoding = grid or load_space("hydra_lv").decoding.model_dump(mode="json")
    return {
        "base": str(candidate.absolute()),
        "warm_starts": [],
        "parameters": {
            "optimization.optimizer.lr": {"float": [rate / 10, min(rate * 10, 1.0)], "log": True},
            **SEARCHED,
        },
        "decoding": decoding,
    }
