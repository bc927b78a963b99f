"""All number formats: what people, torch, files and kohya's headers call each. Imports no torch.

A new one is an entry in :data:`NUMBER_FORMATS`; if it can be chosen, its name is in :data:`Precision`, too.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from .errors import ConfigError

if TYPE_CHECKING:
    import torch

Precision = Literal["fp32", "bf16", "fp16"]
"""The formats that models compute in and adapter files are written in."""
PRECISIONS: tuple[Precision, ...] = get_args(Precision)


@dataclass(frozen=True)
class NumberFormat:
    """One number format.

    Attributes:
        name: for people and settings.
        torch_name: of torch's own ``dtype``.
        file_name: in the header of safetensors files.
        kohya: what kohya's ``ss_mixed_precision`` calls training in it.
        is_factor: whether an adapter's factors may have it; torch can hardly compute in the others.
    """

    name: str
    torch_name: str
    file_name: str
    kohya: str | None = None
    is_factor: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """Torch's own."""
        import torch

        dtype = getattr(torch, self.torch_name)
        assert isinstance(dtype, torch.dtype)
        return dtype


NUMBER_FORMATS: tuple[NumberFormat, ...] = (
    NumberFormat("fp64", "float64", "F64", is_factor=True),
    NumberFormat("fp32", "float32", "F32", kohya="no", is_factor=True),
    NumberFormat("fp16", "float16", "F16", kohya="fp16", is_factor=True),
    NumberFormat("bf16", "bfloat16", "BF16", kohya="bf16", is_factor=True),
    NumberFormat("F8_E4M3", "float8_e4m3fn", "F8_E4M3"),
    NumberFormat("F8_E5M2", "float8_e5m2", "F8_E5M2"),
    NumberFormat("I64", "int64", "I64"),
    NumberFormat("I32", "int32", "I32"),
    NumberFormat("I16", "int16", "I16"),
    NumberFormat("I8", "int8", "I8"),
    NumberFormat("U8", "uint8", "U8"),
    NumberFormat("BOOL", "bool", "BOOL"),
)


def named(name: str) -> NumberFormat:
    """Return the number format with that name for people."""
    return next(number_format for number_format in NUMBER_FORMATS if number_format.name == name)


@functools.cache
def by_dtype() -> Mapping[torch.dtype, NumberFormat]:
    """Return torch's dtype -> number format."""
    return {number_format.dtype: number_format for number_format in NUMBER_FORMATS}


@functools.cache
def writable_dtypes() -> tuple[torch.dtype, ...]:
    """Return the dtypes that adapter files are written in."""
    return tuple(named(name).dtype for name in PRECISIONS)


def dtype_of(asked: str) -> torch.dtype:
    """Return the dtype of the number format that a user asked for.

    Raises:
        ConfigError: when it is none of :data:`PRECISIONS`.
    """
    if asked not in PRECISIONS:
        raise ConfigError(f"--dtype {asked}: is not a number format; give one of {', '.join(PRECISIONS)}")
    return named(asked).dtype


def dtype_name(dtype: torch.dtype) -> str:
    """Return a dtype's usual short name, e.g. ``fp16``."""
    return by_dtype()[dtype].name
