"""What LoHa and LoKr share: Tucker cores, flat kernels, and names of factors as LyCORIS has them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from ..canonical import Update
from .kind import Kernel


@dataclass(frozen=True)
class NamedFactors(Update):
    """An update, as a frozen dataclass, whose factors in files are its attributes behind a prefix.

    Attributes:
        parts: names of the factors in files, e.g. ``hada_w1_a`` for the attribute ``w1_a``; one that is None
            is not there.
    """

    parts: ClassVar[tuple[str, ...]]

    def tensors(self) -> dict[str, Tensor]:
        """Return the factors that are there."""
        factors = {part: getattr(self, attribute(part)) for part in self.parts}
        return {part: tensor for part, tensor in factors.items() if tensor is not None}

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Self:
        """Return it with other factors."""
        return replace(self, **{attribute(part): tensors[part] for part in self.tensors()})


def attribute(part: str) -> str:
    """Return what a factor is called without the prefix of its kind: ``hada_w1_a`` is ``w1_a``."""
    return part.partition("_")[2]


def merged_core(a: Tensor, b: Tensor, core: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return (out, rank) and (rank, in * kh * kw), whose product is that of both factors and their core."""
    if core is None:
        return a, b
    # (rank, out) -> (out, rank), as torch.kron fails on transposed views;
    # (rank, rank, kh, kw) and (rank, in) -> (rank, in * kh * kw)
    return a.T.contiguous(), torch.einsum("ijkl,jc->ickl", core.to(b.dtype), b).flatten(1)


def with_kernel(out: int, width: int, kernel: Kernel | None) -> tuple[int, ...]:
    """Return the shape of a layer's weight; the factors of a convolution have its kernel flattened."""
    return (out, width) if kernel is None else (out, width // math.prod(kernel), *kernel)


def uniform(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Return the values that a linear layer of this shape starts with."""
    tensor = torch.empty(shape)
    nn.init.kaiming_uniform_(tensor, a=math.sqrt(5), generator=generator)
    return tensor
