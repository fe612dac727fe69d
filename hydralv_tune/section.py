"""What the models of candidates and search spaces are made of: strict blocks and number types."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Whole = Annotated[int, Field(ge=0)]
Size3 = Annotated[tuple[Count, Count, Count], Field(strict=False)]
Pad3 = Annotated[tuple[Whole, Whole, Whole], Field(strict=False)]
Filters = Annotated[tuple[Count, ...], Field(strict=False, min_length=2)]
Numbers = Annotated[tuple[NotNegative, ...], Field(strict=False)]
Names = Annotated[tuple[str, ...], Field(strict=False, min_length=1)]
Paths = str | list[str] | None


def spelled(names: Mapping[Any, Any]) -> BeforeValidator:
    """Return a validator that turns the other spellings of a value into ours."""

    def ours(value: Any) -> Any:
        plain = isinstance(value, str | int) and not isinstance(value, bool)
        return names.get(value, value) if plain else value

    return BeforeValidator(ours)


class Section(BaseModel):
    """A block of a candidate: frozen, and strict about names and types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
