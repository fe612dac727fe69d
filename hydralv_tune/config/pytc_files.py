"""Configuration files of PyTorch Connectomics, resolved as that tool resolves them.

Today's files inherit (`_base_`), choose profiles and templates by name, refer to other keys
(`${a.b}`) and overlay `default` with `train`, `test` or `tune`. Those of January 2026 are plain.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from hydralv_tune.config.errors import ConfigError
from hydralv_tune.config.validation import MISSING, merged, nested, value_at
from hydralv_tune.config.yaml_io import read_yaml_mapping

STAGES = ("default", "train", "test", "tune")
SECTIONS = (
    "system", "model", "data", "optimization", "monitor", "inference", "decoding", "evaluation",
)  # fmt: skip
PROFILES: tuple[tuple[str, str, str, str | None], ...] = (
    ("pipeline_profiles", "pipeline_profile", "", None),
    ("system_profiles", "system.profile", "system", None),
    ("arch_profiles", "model.arch.profile", "model", None),
    ("augmentation_profiles", "data.augmentation.profile", "data.augmentation", None),
    ("dataloader_profiles", "data.dataloader.profile", "data.dataloader", None),
    ("optimizer_profiles", "optimization.profile", "optimization", None),
    ("loss_profiles", "model.loss.profile", "model.loss", "losses"),
    ("label_profiles", "data.label_transform.profile", "data.label_transform", None),
    ("activation_profiles", "inference.model.activation_profile", "inference.model", None),
    ("tune_profiles", "profile", "", None),
)
"""Registry, the key that chooses from it, what it lies under, the list that `overrides` patches.

The order matters: a pipeline chooses further profiles.
"""
TEMPLATES = "decoding_templates"
REFERENCE = re.compile(r"\$\{([^}]+)\}")


def is_todays(mapping: Mapping[str, Any]) -> bool:
    """Return whether a mapping has the form of today's files rather than January's."""
    arch = value_at(mapping, "model.arch")
    return arch is not MISSING or any(key in mapping for key in ("_base_", "default", "decoding"))


def is_peer_file(mapping: Mapping[str, Any]) -> bool:
    """Return whether a mapping can only be a configuration of that tool, not one of ours."""
    model = mapping.get("model")
    if not isinstance(model, Mapping) or is_todays(mapping):
        return is_todays(mapping)
    january = "tune" in mapping or any(str(key).startswith("rsunet_") for key in model)
    return january and "architecture" in model


def read_peer_file(path: Path) -> dict[str, Any]:
    """Return a file with its bases merged, its profiles applied and its references resolved.

    Raises:
        ConfigError: A base is missing or names itself, or a profile is unknown.
    """
    mapping = _with_bases(path, ())
    if not is_todays(mapping):
        return mapping
    for registry, selector, target, listed in PROFILES:
        for stage in ("tune",) if registry == "tune_profiles" else STAGES:
            _apply_profile(mapping, registry, stage, selector, target, listed, path)
    for place in ("decoding.steps", *(f"{stage}.decoding.steps" for stage in STAGES)):
        _expand_templates(mapping, place, path)
    for key in [key for key in mapping if key.endswith("_profiles") or key == TEMPLATES]:
        del mapping[key]
    resolved: dict[str, Any] = _resolved(mapping, mapping)
    return resolved


def stage_view(mapping: Mapping[str, Any], stage: str) -> dict[str, Any]:
    """Return what that tool runs a stage with: root sections, then `default`, then the stage."""
    root = {key: mapping[key] for key in SECTIONS if isinstance(mapping.get(key), Mapping)}
    layers = [mapping.get(name) for name in ("default", stage)]
    return merged(root, *(layer for layer in layers if isinstance(layer, Mapping)))


def _with_bases(path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    """Return the mapping of a file laid over those that it inherits from."""
    path = path.resolve()
    if path in above:
        chain = " -> ".join(entry.name for entry in (*above, path))
        raise ConfigError(f"{path}: _base_ inherits from itself: {chain}.")
    mapping = read_yaml_mapping(path)
    named = mapping.pop("_base_", None) or []
    result: dict[str, Any] = {}
    for entry in [named] if isinstance(named, str) else named:
        base = path.parent / str(entry)
        if not base.is_file():
            raise ConfigError(
                f"{path}: _base_ is {entry}, but there is no such file. Its profiles lie in a "
                "checkout of PyTorch Connectomics: give the file there."
            )
        result = merged(result, _with_bases(base, (*above, path)))
    return merged(result, mapping)


def _apply_profile(
    mapping: dict[str, Any],
    registry: str,
    stage: str,
    selector: str,
    target: str,
    listed: str | None,
    path: Path,
) -> None:
    """Lay the chosen profile of a registry under what the file itself says."""
    key = f"{stage}.{selector}"
    chosen = value_at(mapping, key)
    if chosen is MISSING or chosen is None:
        return
    profiles = mapping.get(registry)
    known = sorted(profiles) if isinstance(profiles, Mapping) else []
    if chosen not in known:
        raise ConfigError(
            f"{path}: {key} is {chosen}, but {registry} has no such profile. "
            f"Known: {', '.join(map(str, known)) or 'none'}."
        )
    _remove(mapping, key)
    place = f"{stage}.{target}" if target else stage
    own = value_at(mapping, place)
    profile = merged((profiles or {})[chosen], own if isinstance(own, Mapping) else {})
    if listed is not None:
        for index, patch in (profile.pop("overrides", None) or {}).items():
            entries = profile[listed]
            entries[int(index)] = merged(entries[int(index)], patch)
    mapping.update(merged(mapping, _replacing(mapping, place, profile)))


def _replacing(mapping: dict[str, Any], place: str, value: dict[str, Any]) -> dict[str, Any]:
    """Remove what is at a place and return the nested mapping that puts a value there."""
    _remove(mapping, place)
    return nested(place, value)


def _remove(mapping: dict[str, Any], path: str) -> None:
    """Delete a nested key where it is."""
    above, _, key = path.rpartition(".")
    block = value_at(mapping, above) if above else mapping
    if isinstance(block, dict):
        block.pop(key, None)


def _expand_templates(mapping: dict[str, Any], place: str, path: Path) -> None:
    """Replace `{template: name}` entries of a list by the steps of that name."""
    steps = value_at(mapping, place)
    if not isinstance(steps, list):
        return
    templates = mapping.get(TEMPLATES) or {}
    expanded: list[Any] = []
    for step in steps:
        if not isinstance(step, Mapping) or "template" not in step:
            expanded.append(step)
            continue
        template = templates.get(step["template"])
        if not isinstance(template, Mapping):
            raise ConfigError(
                f"{path}: {place}: there is no decoding template '{step['template']}'. "
                f"Known: {', '.join(sorted(templates)) or 'none'}."
            )
        own = {key: value for key, value in step.items() if key != "template"}
        entries = deepcopy(list(template.get("steps") or []))
        expanded += [merged(entries[0], own)] if own and entries else entries
    mapping.update(merged(mapping, nested(place, expanded)))


def _resolved(value: Any, root: Mapping[str, Any]) -> Any:
    """Return a value with every `${a.b}` replaced by what stands at that key."""
    if isinstance(value, Mapping):
        return {key: _resolved(entry, root) for key, entry in value.items()}
    if isinstance(value, list):
        return [_resolved(entry, root) for entry in value]
    if not isinstance(value, str) or "${" not in value:
        return value
    whole = REFERENCE.fullmatch(value)
    if whole:
        return _referred(whole[1], root)
    return REFERENCE.sub(lambda found: str(_referred(found[1], root)), value)


def _referred(path: str, root: Mapping[str, Any]) -> Any:
    """Return what a reference names: at the root, or under `default`; None where nothing is."""
    for place in (path, f"default.{path}"):
        found = value_at(root, place)
        if found is not MISSING and not (isinstance(found, str) and "${" in found):
            return found
    return None


def numbers_of(selector: Any, channels: int) -> range | None:
    """Return the channels of a selector such as "0:2", "-1:" or 1; None where it is none."""
    if isinstance(selector, int) and not isinstance(selector, bool):
        selector = f"{selector}:{selector + 1 if selector != -1 else ''}"
    if not isinstance(selector, str):
        return range(channels) if selector is None else None
    match = re.fullmatch(r"\s*(-?\d*)\s*(:?)\s*(-?\d*)\s*", selector)
    if match is None:
        return None
    if not match[2]:
        return numbers_of(int(match[1]), channels) if match[1] else None
    bounds = slice(*(int(part) if part else None for part in (match[1], match[3])))
    return range(channels)[bounds]


def leaf_paths(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield each key path of nested mappings with its value; an empty mapping is a value."""
    if isinstance(value, Mapping) and value:
        for key, entry in value.items():
            yield from leaf_paths(entry, f"{path}.{key}" if path else str(key))
    else:
        yield path, value
