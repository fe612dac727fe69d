"""The reference of every key, generated from the models and the tables: `docs/config.md`.

`python -m hydralv_tune.config.reference` prints it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel, TypeAdapter
from pydantic.fields import FieldInfo

from hydralv_tune.config.candidate import Candidate
from hydralv_tune.config.files import baseline
from hydralv_tune.config.search_methods import pruners, samplers
from hydralv_tune.config.search_space import SearchSpace
from hydralv_tune.config.validation import MISSING, sub_model, value_at

HEAD = """# Every key

Generated from the models: `python -m hydralv_tune.config.reference > docs/config.md`.
A test compares.

A **candidate** (a file in `trials/`, an exported best configuration) may be partial; what it does
not say has the value of `trials/baseline.yaml`, which the tables show. Keys are those of PyTorch
Connectomics as of January 2026. Keys marked *no effect* are accepted, so that its blocks can be
pasted as they stand; `hydralv-tune check --explain` names those that a file says. Unknown keys,
wrong types and impossible values are refused with file, key, value, rule and the nearest name.
Axes are always (z, y, x).

Other spellings that are read: `precision: 32` and `16-mixed`, `scheduler.name: warmupcosine` and
`ConstantLR`, `normalize: normal`, `loss_balancing.strategy: null`, a single `distance_threshold`
for the distance-only decoder, `*_channels` in a decoding step. New losses void the arguments of
the old ones, a new architecture the keys only the old one had, and a new network the pretrained
weights, unless they are said anew.
"""
SPACE_HEAD = """# Every key of a search space

A **search space** (a file in `search_spaces/`) says what a study samples. Each trial is the base,
with the recipe laid over it if it is a warm start, then the searched values, then `fixed`.
Everything is checked when the file is read: each bound and each choice must give a valid
candidate, a condition names an earlier parameter, a warm start lies inside the space.
"""


def reference() -> str:
    """Return the reference as Markdown."""
    parts = [HEAD, *_sections(Candidate, "", baseline()), *_tables(), SPACE_HEAD]
    parts += _sections(SearchSpace, "", {})
    return "\n".join(part.rstrip() + "\n" for part in parts)


def _sections(model: type[BaseModel], path: str, values: Mapping[str, Any]) -> Iterator[str]:
    """Yield a heading and a table for a model, then those of its blocks."""
    plain = {
        field.alias or name: field
        for name, field in model.model_fields.items()
        if sub_model(field.annotation) is None
    }
    if plain:
        rows = [_row(f"{path}{name}", field, values) for name, field in plain.items()]
        title = f"`{path.rstrip('.')}`" if path else "Top"
        default = "baseline" if values else "default"
        yield "\n".join(
            [f"## {title}\n", f"| key | values | {default} | meaning |", "|---|---|---|---|", *rows]
        )
    for name, field in model.model_fields.items():
        inner = sub_model(field.annotation)
        if inner is not None:
            yield from _sections(inner, f"{path}{field.alias or name}.", values)
        else:
            yield from _entries(field, f"{path}{field.alias or name}")


def _entries(field: FieldInfo, path: str) -> Iterator[str]:
    """Yield the table of the model that a list or a mapping holds."""
    arguments = getattr(field.annotation, "__args__", ())
    inner = sub_model(arguments[-1]) if arguments else None
    if inner is not None:
        yield from _sections(inner, f"{path}[].", {})


def _row(path: str, field: FieldInfo, values: Mapping[str, Any]) -> str:
    """Return the table row of a key."""
    value = value_at(values, path)
    if value is MISSING:
        value = None if field.is_required() else field.get_default(call_default_factory=True)
    meaning = (field.description or "").replace("No effect", "*No effect*")
    # The metadata carries bounds that the annotation of a field alone has lost.
    schema = TypeAdapter(_whole(field)).json_schema()
    kind = _values(schema, schema.get("$defs", {}))
    return f"| `{path.rsplit('.', 1)[-1]}` | {kind} | {_yaml(value)} | {meaning} |"


def _whole(field: FieldInfo) -> Any:
    """Return the annotation of a field with its bounds."""
    from typing import Annotated

    annotation: Any = field.annotation
    for bound in field.metadata:
        annotation = Annotated[annotation, bound]
    return annotation


def _values(schema: Mapping[str, Any], defs: Mapping[str, Any]) -> str:
    """Return in words what a JSON schema allows."""
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(_values(part, defs) for part in schema["anyOf"]))
    if "enum" in schema:
        return ", ".join(_yaml(value) for value in schema["enum"])
    if "const" in schema:
        return _yaml(schema["const"])
    kind = schema.get("type")
    if kind in ("integer", "number"):
        word = "whole number" if kind == "integer" else "number"
        return word + _range(schema)
    if kind == "array":
        return _array(schema, defs)
    words = {"string": "text", "boolean": "true, false", "null": "null", "object": "mapping"}
    return words.get(str(kind), "mapping" if "$ref" in schema else "any")


def _range(schema: Mapping[str, Any]) -> str:
    """Return the bounds of a number in words."""
    words = {"minimum": "from", "exclusiveMinimum": "above", "maximum": "to",
             "exclusiveMaximum": "below"}  # fmt: skip
    return "".join(f" {word} {schema[key]:g}" for key, word in words.items() if key in schema)


def _array(schema: Mapping[str, Any], defs: Mapping[str, Any]) -> str:
    """Return in words what a list may hold."""
    parts = schema.get("prefixItems")
    if parts:
        return f"list of {len(parts)}: {_values(parts[0], defs)}"
    items = schema.get("items") or {}
    return f"list of {_values(items, defs)}" if items else "list"


def _yaml(value: Any) -> str:
    """Return a value as one line of YAML, in code font."""
    if value is None:
        return "`null`"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, BaseModel):
        return "below"
    if isinstance(value, list | tuple) and any(isinstance(v, dict | BaseModel) for v in value):
        return f"{len(value)} entries"
    if isinstance(value, Mapping):
        return "below" if value else "`{}`"
    text = str(list(value)) if isinstance(value, tuple) else str(value)
    return f"`{text.replace(chr(39), '')}`" if text else "empty"


def _tables() -> Iterator[str]:
    """Yield what the tables of names hold, from architectures to pruners."""
    from hydralv_tune.numerics.augmentation.registry import AUGMENTATIONS
    from hydralv_tune.numerics.losses.registry import LOSSES, loss_arguments
    from hydralv_tune.numerics.networks.registry import ARCHITECTURES
    from hydralv_tune.numerics.watershed.decoders import DECODERS, decoder_arguments

    rows = [
        f"| `{name}` | {', '.join(f'`{key}`' for key in sorted(entry.keys))} | "
        f"{_yaml(entry.deep_supervision)} | "
        f"{'; '.join(f'`{key}`: {why}' for key, why in entry.refusals.items())} |"
        for name, entry in ARCHITECTURES.items()
    ]
    yield _table("Architectures", "name | own keys | deep supervision | refused, and why", rows)
    yield _table("Losses", "name | arguments and defaults", _named(LOSSES, loss_arguments))
    yield _table(
        "Augmentations",
        "name | knobs and defaults",
        _named(AUGMENTATIONS, lambda name: AUGMENTATIONS[name].defaults),
    )
    yield _table("Decoders", "name | arguments and defaults", _named(DECODERS, decoder_arguments))
    for title, table in (("Samplers", samplers()), ("Pruners", pruners())):
        rows = [f"| `{name}` | {entry.summary} |" for name, entry in table.items()]
        yield _table(title, "name | meaning", rows)


def _named(table: Mapping[str, Any], arguments: Any) -> list[str]:
    """Return a row for each name of a table, with its arguments."""
    return [
        f"| `{name}` | "
        + ", ".join(f"`{key}` {_yaml(value)}" for key, value in arguments(name).items())
        + " |"
        for name in table
    ]


def _table(title: str, columns: str, rows: list[str]) -> str:
    """Return a Markdown table under a heading."""
    rule = "|".join("---" for _ in columns.split("|"))
    return "\n".join([f"## {title}\n", f"| {columns} |", f"|{rule}|", *rows])


if __name__ == "__main__":
    print(reference(), end="")
