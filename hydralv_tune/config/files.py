"""Candidates from files, mappings and the command line: found, merged, checked.

A file may be partial: what it does not say comes from `trials/baseline.yaml`. The models
themselves stand in `candidate.py`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydralv_tune.config.candidate import Candidate, DecodingStep, Model
from hydralv_tune.config.candidate_rules import KnownBlocks, check_candidate
from hydralv_tune.config.decoding_rules import check_decoding_step
from hydralv_tune.config.errors import ConfigError
from hydralv_tune.config.paths import find_file, shown_path
from hydralv_tune.config.validation import MISSING, check_keys, merged, nested, validated, value_at
from hydralv_tune.config.yaml_io import parse_yaml, read_yaml_mapping

if TYPE_CHECKING:
    from hydralv_tune.config.pytc_import import Imported

ARCHITECTURE_KEYS = (
    "dropout", "norm", "activation", "kernel_size", "strides", "num_res_units", "down_factors",
    "upsample", "mednext_size", "mednext_kernel_size", "num_groups", "depth_2d", "kernel_2d",
)  # fmt: skip
NETWORK_KEYS = ("architecture", "filters", "in_channels", *ARCHITECTURE_KEYS[1:])


@cache
def _baseline() -> dict[str, Any]:
    """Return the whole mapping of the baseline."""
    path = find_file("baseline", "trials")
    return whole_candidate(read_yaml_mapping(path), shown_path(path)).as_mapping()


def baseline() -> dict[str, Any]:
    """Return the mapping that stands under every partial candidate."""
    return deepcopy(_baseline())


def layered(base: Mapping[str, Any], *layers: Mapping[str, Any]) -> dict[str, Any]:
    """Return partial candidates laid over a base; what a new layer makes void goes.

    New losses void the arguments of the old ones, a new architecture the keys that only the
    old one had, and a new network the pretrained weights, unless the layer says them anew.
    """
    result = dict(base)
    for layer in layers:
        before = result.get("model") or {}
        result = merged(result, _switched_on(layer))
        model = result.get("model")
        given = layer.get("model")
        if not isinstance(given, Mapping) or not isinstance(model, dict):
            continue
        changed = {key for key in given if _plain(before.get(key)) != _plain(given[key])}
        if "loss_functions" in changed and "loss_kwargs" not in given:
            model["loss_kwargs"] = []
        if "architecture" in changed:
            # Keys that are no field of the model are those of an architecture from outside.
            own = {*ARCHITECTURE_KEYS, *(set(model) - set(Model.model_fields))}
            model.update({key: None for key in own if key not in given})
        if changed & set(NETWORK_KEYS) and "external_weights_path" not in given:
            model["external_weights_path"] = None
    return result


def _switched_on(layer: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the layer; one that says test-time transforms and nothing of `enabled` wants them."""
    path = "inference.test_time_augmentation"
    given = value_at(layer, path)
    if not isinstance(given, Mapping) or "enabled" in given:
        return layer
    if all(given.get(key) is None for key in ("flip_axes", "rotation90_axes")):
        return layer
    return merged(layer, nested(f"{path}.enabled", True))


def _plain(value: Any) -> Any:
    """Return tuples as lists, so that the two compare equal."""
    return [_plain(entry) for entry in value] if isinstance(value, list | tuple) else value


def whole_candidate(
    mapping: Mapping[str, Any], place: str, known: KnownBlocks | None = None
) -> Candidate:
    """Return the candidate of a whole mapping, every rule checked.

    Args:
        mapping: As `Candidate.as_mapping` gives it.
        place: Where it came from, for the message.
        known: Blocks of candidates checked before, which takes in those of this one.

    Raises:
        ConfigError: A key is unknown, or a value breaks a rule.
    """
    candidate = validated(Candidate, known.filled(mapping) if known else mapping, place)
    if known is not None:
        known.add(mapping, candidate)
    check_candidate(candidate, place, known)
    return candidate


def candidate_from_mapping(
    partial: Mapping[str, Any], *, place: str, base: Mapping[str, Any] | None = None
) -> Candidate:
    """Return the candidate of a partial mapping, every rule checked.

    Args:
        partial: Of plain YAML values.
        place: File or option it came from, for the message.
        base: What is not set comes from it; None is the baseline.

    Raises:
        ConfigError: A key is unknown, or a value breaks a rule.
    """
    check_keys(partial, Candidate, place)
    return whole_candidate(layered(_baseline() if base is None else base, partial), place)


def load_candidate(
    name_or_path: str | Path, overrides: Mapping[str, Any] | None = None
) -> Candidate:
    """Return the candidate of a file, or of a bare name in `trials/`.

    Args:
        name_or_path: What is not set there comes from the baseline.
        overrides: A partial candidate that wins, as `parse_overrides` returns it.

    Raises:
        ConfigError: There is no such file, or it or an override breaks a rule.
    """
    path = find_file(str(name_or_path), "trials")
    candidate = candidate_from_mapping(_own_keys(path), place=shown_path(path))
    return with_overrides(candidate, overrides) if overrides else candidate


def _own_keys(path: Path) -> dict[str, Any]:
    """Return the mapping of a file; a PyTorch Connectomics configuration is taken over first.

    What that leaves out and a result may depend on is warned of, in one message.
    """
    mapping = read_yaml_mapping(path)
    from hydralv_tune.config.pytc_files import is_peer_file, read_peer_file

    if not is_peer_file(mapping):
        return mapping
    imported = import_configuration(read_peer_file(path), path)
    if imported.left_out:
        listed = "".join(f"\n- {entry}" for entry in imported.left_out)
        warnings.warn(
            f"{shown_path(path)} is a PyTorch Connectomics configuration; left out:{listed}",
            stacklevel=3,
        )
    return imported.candidate


def import_configuration(mapping: Mapping[str, Any], path: Path) -> Imported:
    """Return a resolved PyTorch Connectomics configuration as a candidate, a grid and volumes.

    Args:
        mapping: As `read_peer_file` returns it, or as a checkpoint keeps it.
        path: The file; relative paths of volumes start at its folder.

    Raises:
        ConfigError: Its network has no counterpart, or works in two dimensions.
    """
    from hydralv_tune.config.pytc_import import import_peer

    place = shown_path(path)

    def check(partial: Mapping[str, Any]) -> Candidate:
        return candidate_from_mapping(partial, place=place)

    return import_peer(mapping, place=place, folder=path.parent, check=check)


def with_overrides(
    candidate: Candidate, overrides: Mapping[str, Any], place: str = "--set"
) -> Candidate:
    """Return a candidate with a partial one laid over it.

    Args:
        candidate: Is left as it is.
        overrides: A partial candidate, as `parse_overrides` returns it.
        place: Where it came from, for the message.

    Raises:
        ConfigError: The result breaks a rule.
    """
    return candidate_from_mapping(overrides, place=place, base=candidate.as_mapping())


def parse_overrides(settings: Iterable[str]) -> dict[str, Any]:
    """Return the nested mapping of `key.path=value` texts, each value read as YAML.

    Raises:
        ConfigError: A text has no `=`, a key is empty or set twice, or a value is no YAML.
    """
    result: dict[str, Any] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        key = key.strip()
        if not equals or not all(key.split(".")):
            raise ConfigError(
                f"--set: '{setting}' is no setting: it must be key=value. "
                "Try --set optimization.optimizer.lr=3e-4."
            )
        if value_at(result, key) is not MISSING:
            raise ConfigError(f"--set: {key} is set twice. Keep one of the two.")
        steps = key.split(".")
        for above in (".".join(steps[:end]) for end in range(1, len(steps))):
            held = value_at(result, above)
            if held is not MISSING and not isinstance(held, Mapping):
                raise ConfigError(
                    f"--set: {above} is set to {held!r}, which has no room for {key}."
                )
        result = merged(result, nested(key, parse_yaml(text, f"--set {key}")))
    return result


def decoding_step(decoder: str, arguments: Mapping[str, Any], place: str = "--set") -> DecodingStep:
    """Return a checked decoding step.

    Args:
        decoder: A name of the table of decoders.
        arguments: Of the decoder; what is left out takes its default.
        place: Where they came from, for the message.

    Raises:
        ConfigError: The decoder or an argument is unknown, or a value breaks its rule.
    """
    step = validated(DecodingStep, {"name": decoder, "kwargs": dict(arguments)}, place)
    check_decoding_step(step, place, "")
    return step
