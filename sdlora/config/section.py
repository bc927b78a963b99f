"""What all groups of settings are built from: the frozen base class, types of numbers, and marks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(ge=1)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[int, Field(ge=0)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Probability = Annotated[float, Field(ge=0, le=1)]
Dropout = Annotated[float, Field(ge=0, lt=1)]


@dataclass(frozen=True)
class NamesFiles:
    """Marks a text that may be the path of a file or folder: the UI checks it against the allowed paths."""


ModelSource = Annotated[str, NamesFiles()]
"""A built-in base, a file, a folder, or a hub id."""


class Section(BaseModel):
    """Base of every group of settings: frozen, no unknown keys, docstrings are descriptions."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=False
    )


@dataclass(frozen=True)
class OnlyFor:
    """Marks a setting that has an effect only for some values of another setting in its section.

    Attributes:
        names: these values.
        of: that other setting.
    """

    names: tuple[str, ...]
    of: str = "name"
