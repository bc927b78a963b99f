"""What all groups of settings are built from: the frozen base class, types of numbers, and marks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, field_validator
from pydantic_core.core_schema import ValidationInfo

from ..files import given_path, name_problem

Positive = Annotated[int, Field(ge=1)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[int, Field(ge=0)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Probability = Annotated[float, Field(ge=0, le=1)]
Dropout = Annotated[float, Field(ge=0, lt=1)]


@dataclass(frozen=True)
class NamesFiles:
    """Marks a text that may be the path of a file or folder: the UI checks it against the allowed paths."""


def _as_path(value: Any) -> Any:
    """Return a path from a text (or a path), ``~`` expanded; anything else stays, and is refused later."""
    return given_path(str(value)) if isinstance(value, str | Path) else value


def _as_source(text: str) -> str:
    path = given_path(text)
    return str(path) if text.startswith("~") else text


def _as_file_name(name: str) -> str:
    if problem := name_problem(name):
        raise ValueError(problem)
    return name


GivenPath = Annotated[Path, BeforeValidator(_as_path)]
"""The path of a file or folder: not empty, ``~`` expanded."""

ModelSource = Annotated[str, NamesFiles(), AfterValidator(_as_source)]
"""A built-in base, a file, a folder, or a hub id."""

FileName = Annotated[str, AfterValidator(_as_file_name)]
"""A name that becomes the name of a file, on any system."""


class Section(BaseModel):
    """Base of every group of settings: frozen, no unknown keys, docstrings are descriptions."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _no_switch_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse true and false where a number is meant: pydantic takes them for 1 and 0."""
        if info.field_name is None or not any(isinstance(item, bool) for item in _scalars(value)):
            return value
        kinds = set(_kinds(cls.model_fields[info.field_name].annotation))
        if kinds & {int, float} and not kinds & {bool, str}:
            raise ValueError("is true or false, but a number is meant")
        return value


@dataclass(frozen=True)
class OnlyFor:
    """Marks a setting that has an effect only for some values of another setting in its section.

    Attributes:
        names: these values.
        of: that other setting.
    """

    names: tuple[str, ...]
    of: str = "name"


def _scalars(value: Any, levels: int = 2) -> Iterator[Any]:
    if levels and isinstance(value, list | tuple | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _scalars(item, levels - 1)
    else:
        yield value


def _kinds(annotation: Any) -> Iterator[Any]:
    """Yield the classes that an annotation is made of; limits and the keys of a table do not count."""
    parts = get_args(annotation)
    if hasattr(annotation, "__metadata__"):
        parts = parts[:1]
    elif get_origin(annotation) is dict:
        parts = parts[1:]
    if isinstance(annotation, type) and not parts:
        # a table has switches of its own, and looks at its own values
        yield bool if issubclass(annotation, Section) else annotation
    for part in parts:
        yield from _kinds(part)
