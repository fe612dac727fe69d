"""The reference of the public names, generated from their docstrings: `docs/reference/api.md`.

`python -m hydralv_tune.api.reference` prints it.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

import hydralv_tune

HEAD = """# The names of `import hydralv_tune`

Generated from the docstrings: `python -m hydralv_tune.api.reference > docs/reference/api.md`.
A test compares. [How to use them](../howto/python.md).
"""
SECTION = re.compile(r"^(Args|Returns|Raises|Source):$", re.MULTILINE)
ENTRY = re.compile(r"^    (\S[^:\n]*): (.*(?:\n {8,}.*)*)$", re.MULTILINE)


def reference() -> str:
    """Return the reference as Markdown: functions first, then values, then errors."""
    found = {n: getattr(hydralv_tune, n) for n in hydralv_tune.__all__ if n != "__version__"}
    errors = {n: v for n, v in found.items() if inspect.isclass(v) and issubclass(v, Exception)}
    values = {n: v for n, v in found.items() if inspect.isclass(v) and n not in errors}
    parts = [HEAD]
    for name, value in found.items():
        if name not in errors and name not in values:
            parts += [f"## `{name}`", f"```python\n{_signature(name, value)}\n```", _text(value)]
    for name, value in values.items():
        parts += [f"## `{name}`", _text(value), *_members(value)]
    rows = [f"| `{name}` | {_first_line(value)} |" for name, value in errors.items()]
    parts += ["## Errors", "\n".join(["| error | when |", "|---|---|", *rows])]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _signature(name: str, function: Any) -> str:
    """Return a signature, one parameter a line."""
    signature = inspect.signature(function)
    lines, keyword_only = [], False
    for one in signature.parameters.values():
        if one.kind is one.KEYWORD_ONLY and not keyword_only:
            keyword_only = True
            lines.append("    *,")
        stars = str(one).partition(one.name)[0]
        default = "" if one.default is one.empty else f" = {one.default!r}"
        lines.append(f"    {stars}{one.name}: {one.annotation}{default},")
    return "\n".join([f"{name}(", *lines, f") -> {signature.return_annotation}"])


def _text(value: Any) -> str:
    """Return a docstring as Markdown, its arguments as a list."""
    text = inspect.getdoc(value) or ""
    first, *rest = SECTION.split(text)
    parts = [first.strip()]
    for title, body in zip(rest[::2], rest[1::2], strict=True):
        entries = ENTRY.findall(body) if title in ("Args", "Raises") else []
        listed = "\n".join(f"- `{name}`: {' '.join(words.split())}" for name, words in entries)
        parts.append(f"**{title}**\n\n{listed or ' '.join(body.split())}")
    return "\n\n".join(parts)


def _members(value: type) -> Iterator[str]:
    """Yield a list of the properties and methods that a class of ours defines itself."""
    rows = []
    for name, member in vars(value).items():
        function = member.fget if isinstance(member, property) else member
        if name.startswith("_") or not inspect.isfunction(function) or not function.__doc__:
            continue
        call = "" if isinstance(member, property) else "(…)"
        rows.append(f"- `.{name}{call}`: {_first_line(function)}")
    if rows:
        yield "\n".join(rows)


def _first_line(value: Any) -> str:
    """Return the first line of a docstring."""
    return (inspect.getdoc(value) or "").splitlines()[0]


if __name__ == "__main__":
    print(reference(), end="")
