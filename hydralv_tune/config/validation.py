"""Mapping to model: every fault named by its key, its value, the rule and the nearest name."""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Collection, Iterable, Iterator, Mapping
from difflib import get_close_matches
from functools import cache
from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel, ValidationError

from hydralv_tune.config.errors import ConfigError
from hydralv_tune.config.plugins import load_plugins
from hydralv_tune.config.strict_model import OpenModel

M = TypeVar("M", bound=BaseModel)

SYNONYMS = {
    "learning_rate": "lr", "epochs": "max_epochs", "num_epochs": "max_epochs",
    "decay": "weight_decay", "arch": "architecture", "loss": "loss_functions",
    "rsunet_norm": "norm", "width": "filters", "channels": "filters", "random_seed": "seed",
    "ema_decay": "decay", "pretrained": "external_weights_path", "lr_scheduler": "scheduler",
    "gradient_clip": "gradient_clip_val", "accumulation": "accumulate_grad_batches",
    "n_steps_per_epoch": "iter_num_per_epoch", "tta": "test_time_augmentation",
}  # fmt: skip
"""What people call a key elsewhere."""


def merged(base: Mapping[str, Any], *layers: Mapping[str, Any]) -> dict[str, Any]:
    """Return the layers laid over the base: mappings join, all else is replaced.

    What no layer touches is shared with the base, so nobody may change the result in place.
    """
    result = dict(base)
    for layer in layers:
        for key, value in layer.items():
            old = result.get(key)
            if isinstance(old, Mapping) and isinstance(value, Mapping):
                result[key] = merged(old, value)
            else:
                result[key] = value
    return result


def nested(path: str, value: Any) -> dict[str, Any]:
    """Return `{a: {b: value}}` of `a.b`."""
    for part in reversed(path.split(".")):
        value = {part: value}
    return value


def leaves(mapping: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted path and the value of everything that is no filled mapping."""
    for key, value in mapping.items():
        here = f"{path}.{key}" if path else str(key)
        if isinstance(value, Mapping) and value:
            yield from leaves(value, here)
        else:
            yield here, value


MISSING = object()


def value_at(mapping: Any, path: str) -> Any:
    """Return the value at a dotted path, or `MISSING`."""
    for part in path.split("."):
        if not isinstance(mapping, Mapping) or part not in mapping:
            return MISSING
        mapping = mapping[part]
    return mapping


def sub_model(annotation: Any) -> type[BaseModel] | None:
    """Return the model that an annotation holds directly or as `X | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        found = [sub_model(part) for part in typing.get_args(annotation)]
        return next((model for model in found if model is not None), None)
    return None


def names_of(model: type[BaseModel]) -> dict[str, Any]:
    """Return each key of a model as a file spells it, and its annotation."""
    return {field.alias or name: field.annotation for name, field in model.model_fields.items()}


@cache
def _blocks_of(model: type[BaseModel]) -> dict[str, tuple[type[BaseModel] | None, bool]]:
    """Return the model that each key of a model holds, and whether it holds a list of them."""
    found: dict[str, tuple[type[BaseModel] | None, bool]] = {}
    for name, annotation in names_of(model).items():
        listed = typing.get_origin(annotation) is list
        found[name] = (sub_model(typing.get_args(annotation)[0] if listed else annotation), listed)
    return found


@cache
def key_paths(model: type[BaseModel]) -> tuple[str, ...]:
    """Return every dotted key path of a model, blocks and leaves, in order."""
    paths: list[str] = []
    for name, annotation in names_of(model).items():
        paths.append(name)
        inner = sub_model(annotation)
        if inner is not None:
            paths += [f"{name}.{path}" for path in key_paths(inner)]
    return tuple(paths)


def nearest_key(model: type[BaseModel], path: str) -> str | None:
    """Return the known key path that an unknown one most likely means."""
    known = key_paths(model)
    block, _, leaf = path.rpartition(".")
    for name in (leaf, SYNONYMS.get(leaf, leaf)):
        beside = f"{block}.{name}" if block else name
        if beside in known:
            return beside
        same = [other for other in known if other.rpartition(".")[2] == name]
        if same:
            # The same name elsewhere: the one whose block reads most like the block given.
            return (get_close_matches(path, same, n=1, cutoff=0.0) or same)[0]
    siblings = {other.rpartition(".")[2]: other for other in known
                if other.rpartition(".")[0] == block}  # fmt: skip
    near = get_close_matches(leaf, siblings, n=1, cutoff=0.6)
    if near:
        return siblings[near[0]]
    near = get_close_matches(path, known, n=1, cutoff=0.5)
    return near[0] if near else None


def _unknown_keys(
    mapping: Mapping[Any, Any], model: type[BaseModel], path: str
) -> Iterator[tuple[str, type[BaseModel]]]:
    """Yield each key path that the model does not have, with the model of its block."""
    known = _blocks_of(model)
    for key, value in mapping.items():
        here = f"{path}{key}"
        if key not in known:
            if model.model_config.get("extra") != "allow" or key not in _open_keys(model, key):
                yield here, model
            continue
        inner, listed = known[key]
        if inner is None:
            continue
        if not listed and isinstance(value, Mapping):
            yield from _unknown_keys(value, inner, f"{here}.")
        elif listed and isinstance(value, list):
            for index, entry in enumerate(value):
                if isinstance(entry, Mapping):
                    yield from _unknown_keys(entry, inner, f"{here}[{index}].")


def _open_keys(model: type[BaseModel], key: Any) -> Collection[Any]:
    """Return what may stand in a block beside its declared keys; anything where it says nothing."""
    return model.open_keys() if issubclass(model, OpenModel) else (key,)


def check_keys(mapping: Any, model: type[BaseModel], place: str) -> None:
    """Refuse what is no mapping, and a key that the model does not have.

    Raises:
        ConfigError: With the nearest known key.
    """
    if not isinstance(mapping, Mapping):
        raise ConfigError(
            f"{place}: holds {shown(mapping)}, but must be a mapping of keys to values."
        )
    for path, block in _unknown_keys(mapping, model, ""):
        stem, _, leaf = path.rpartition(".")
        if stem.endswith("]"):
            close = get_close_matches(leaf, names_of(block), n=1)
            near = f"{stem}.{close[0]}" if close else None
        else:
            near = nearest_key(model, path)
        if near is None:
            hint = f"Known there: {', '.join(sorted(names_of(block)))}."
        else:
            hint = f"Did you mean '{near}'?"
        raise ConfigError(f"{place}: {path} is no key of a {_kind(model)}. {hint}")


def _kind(model: type[BaseModel]) -> str:
    """Return the words for a model: `search space` of SearchSpace."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", model.__name__).lower()


def shown(value: Any) -> str:
    """Return a value as YAML would write it, shortened."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    text = repr(list(value)) if isinstance(value, tuple) else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"


def place_of(location: tuple[int | str, ...], value: Any) -> str:
    """Return pydantic's location as a key path, without the names of union branches."""
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
            value = value[part] if isinstance(value, list | tuple) and part < len(value) else None
        elif isinstance(value, Mapping) and part in value:
            path += f".{part}" if path else part
            value = value[part]
        elif not path:
            path = part
    return path


RULES = {
    "greater_than": "it must be above {gt}",
    "greater_than_equal": "it must be at least {ge}",
    "less_than": "it must be below {lt}",
    "less_than_equal": "it must be at most {le}",
    "finite_number": "it must be a finite number",
    "int_type": "it must be a whole number",
    "int_from_float": "it must be a whole number",
    "float_type": "it must be a number",
    "bool_type": "it must be true or false",
    "string_type": "it must be a text",
    "list_type": "it must be a list",
    "tuple_type": "it must be a list",
    "dict_type": "it must be a mapping",
    "model_type": "it must be a mapping",
    "model_attributes_type": "it must be a mapping",
    "literal_error": "it must be one of {expected}",
    "missing": "it must be given",
    "too_short": "it needs at least {min_length} entries",
    "too_long": "it may have at most {max_length} entries",
    "none_required": "it must be null",
}


def _rule(error: Mapping[str, Any]) -> str:
    """Return the rule that an error of pydantic broke, as half a sentence."""
    context = error.get("ctx") or {}
    if error["type"] == "value_error":
        return str(context.get("error", error["msg"])).rstrip(".")
    if error["type"] == "literal_error" and " or " not in context["expected"]:
        return f"it must be {context['expected']}"
    if error["type"] in RULES:
        return RULES[error["type"]].format_map({**context})
    return f"the rule is: {error['msg'][:1].lower()}{error['msg'][1:]}"


def _next_step(error: Mapping[str, Any]) -> str:
    """Return the nearest of the values allowed, where the value is a near miss of one."""
    expected = (error.get("ctx") or {}).get("expected")
    if error["type"] != "literal_error" or not isinstance(expected, str):
        return ""
    near = get_close_matches(str(error["input"]), re.findall(r"'([^']+)'", expected), n=1)
    return f" Did you mean '{near[0]}'?" if near else ""


def validated(model: type[M], mapping: Mapping[str, Any], place: str) -> M:
    """Return the model of a mapping.

    Args:
        model: The model's class.
        mapping: Of plain YAML values.
        place: File or option, for the message.

    Raises:
        ConfigError: The first key that breaks a rule, with value, rule and nearest name.
    """
    load_plugins()
    check_keys(mapping, model, place)
    try:
        return model.model_validate(dict(mapping))
    except ValidationError as caught:
        errors: list[Any] = caught.errors()
    first = place_of(errors[0]["loc"], mapping)
    # Each branch of a union gives an error of its own: they are alternatives, told as one.
    same = [error for error in errors if place_of(error["loc"], mapping) == first]
    rules = list(dict.fromkeys(_rule(error) for error in same))
    rule = rules[0] + "".join(f", or {other}" for other in rules[1:])
    received = same[0]["input"]
    is_missing = same[0]["type"] == "missing"
    state = "is missing" if is_missing else f"is {shown(received)}"
    raise ConfigError(f"{place}: {first} {state}, but {rule}.{_next_step(same[0])}")


def refuse(place: str, path: str, value: Any, rule: str, step: str = "") -> NoReturn:
    """Raise the error of a value that breaks a rule.

    Raises:
        ConfigError: Always.
    """
    raise ConfigError(f"{place}: {path} is {shown(value)}, but {rule}.{' ' + step if step else ''}")


def known_step(value: object, known: Iterable[str]) -> str:
    """Return the next step for a name outside a table."""
    names = sorted(known)
    near = get_close_matches(str(value), names, n=1)
    hint = f"Did you mean '{near[0]}'? " if near else ""
    return f"{hint}Known: {', '.join(names)}."
