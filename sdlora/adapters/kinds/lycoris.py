"""What LoHa and LoKr share: Tucker cores, flat kernels, and names of factors as LyCORIS has them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..canonical import Update
from .kind import Kernel


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


def renamed(update: Update, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return an update's factors by the names of its attributes: ``hada_w1_a`` as ``w1_a``."""
    return {name.partition("_")[2]: tensors[name] for name in update.tensors()}


def uniform(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Return the values that a linear layer of this shape starts with."""
    tensor = torch.empty(shape)
    nn.init.kaiming_uniform_(tensor, a=math.sqrt(5), generator=generator)
    return tensor
