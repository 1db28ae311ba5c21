"""What the sections of a recipe are made of: strict models, and the kinds of numbers in them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

STRICT = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, protected_namespaces=())

Precision = Literal["fp32", "bf16"]
Positive = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, le=2**63 - 1)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Rate = Annotated[float, Field(ge=0)]
PositiveNumber = Annotated[float, Field(gt=0)]


class Section(BaseModel):
    """What all parts of a recipe share: no unknown keys, no silent conversions, no changes after loading."""

    model_config = STRICT


def is_default(section: Section, field: str) -> bool:
    declared = type(section).model_fields[field]
    return bool(getattr(section, field) == declared.get_default(call_default_factory=True))
