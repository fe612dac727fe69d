"""What the models of candidates and search spaces are made of: strict blocks and number types."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
# The upper bounds keep a slip of the finger from overflowing a 64-bit size.
Count = Annotated[int, Field(ge=1, le=1_000_000_000)]
Whole = Annotated[int, Field(ge=0, lt=2**32)]
Channels = Annotated[int, Field(ge=1, le=4096)]
Side = Annotated[int, Field(ge=1, le=65536)]
Size3 = Annotated[tuple[Side, Side, Side], Field(strict=False)]
Pad3 = Annotated[tuple[Whole, Whole, Whole], Field(strict=False)]
Filters = Annotated[tuple[Channels, ...], Field(strict=False, min_length=2)]
Numbers = Annotated[tuple[NotNegative, ...], Field(strict=False)]
Names = Annotated[tuple[str, ...], Field(strict=False, min_length=1)]
Paths = str | list[str] | None


def spelled(names: Mapping[Any, Any]) -> BeforeValidator:
    """Return a validator that turns the other spellings of a value into ours."""

    def ours(value: Any) -> Any:
        plain = isinstance(value, str | int) and not isinstance(value, bool)
        return names.get(value, value) if plain else value

    return BeforeValidator(ours)


class StrictModel(BaseModel):
    """A block of a candidate: frozen, and strict about names and types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, defer_build=True)


class OpenModel(StrictModel):
    """A block that takes further keys, which a table of names declares."""

    model_config = ConfigDict(extra="allow")

    @classmethod
    def open_keys(cls) -> Collection[str]:
        """Return the keys that may stand beside the declared ones."""
        raise NotImplementedError
