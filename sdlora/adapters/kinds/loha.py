"""LoHa: the element-wise product of two low-rank matrices (Hyeon-Woo et al. 2022, FedPara).

LyCORIS defined it, and every client that reads it computes it so; scale rules: formats.md 3.1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...config.adapter import AdapterConfig
from ..canonical import Update, check_factors
from .kind import (
    AdapterKind,
    Kernel,
    PeftFolder,
    TrainedForm,
    check_floats,
    does_not_fit,
    plain_part,
    require_parts,
    take_over_factors,
)
from .lycoris import NamedFactors, merged_core, with_kernel

_PARTS = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")


@dataclass(frozen=True)
class LoHa(NamedFactors):
    """``alpha / rank * (w1_a @ w1_b) * (w2_a @ w2_b)``, the middle product element by element.

    Attributes:
        w1_a, w2_a: (out, rank); with cores (rank, out).
        w1_b, w2_b: (rank, in) or, for a convolution without cores, (rank, in * kh * kw).
        alpha: numerator of the scale.
        t1, t2: Tucker cores (rank, rank, kh, kw), both or none.
        kernel: (kh, kw) of a convolution without cores; None for a linear layer.
    """

    kind: ClassVar[str] = "loha"
    parts: ClassVar[tuple[str, ...]] = _PARTS

    w1_a: Tensor
    w1_b: Tensor
    w2_a: Tensor
    w2_b: Tensor
    alpha: float
    t1: Tensor | None = None
    t2: Tensor | None = None
    kernel: Kernel | None = None

    def __post_init__(self) -> None:
        fits = all(t.ndim == 2 for t in (self.w1_a, self.w1_b, self.w2_a, self.w2_b))
        fits = fits and (self.t1 is None) == (self.t2 is None) and self.w1_b.shape[1] == self.w2_b.shape[1]
        if fits:
            ranks = (self.w1_b.shape[0], self.w2_b.shape[0])
            out = 0 if self.t1 is None else 1
            fits = (self.w1_a.shape[1 - out], self.w2_a.shape[1 - out]) == ranks
            fits = fits and self.w1_a.shape[out] == self.w2_a.shape[out]
            cores = [t for t in (self.t1, self.t2) if t is not None]
            fits = fits and all(
                t.ndim == 4 and tuple(t.shape[:2]) == (rank, rank)
                for t, rank in zip(cores, ranks, strict=False)
            )
            fits = fits and len({tuple(t.shape[2:]) for t in cores}) <= 1
            fits = fits and not (self.kernel and self.w1_b.shape[1] % math.prod(self.kernel))
        check_factors(fits, self.tensors(), self.alpha)

    @property
    def rank(self) -> int:
        """Rows of ``w1_b``."""
        return self.w1_b.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the layer's weight."""
        if self.t1 is not None:
            return (self.w1_a.shape[1], self.w1_b.shape[1], *self.t1.shape[2:])
        return with_kernel(self.w1_a.shape[0], self.w1_b.shape[1], self.kernel)

    def matrices(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Return ((a1, b1), (a2, b2)), float32 or wider: dW = scale * (a1 @ b1) * (a2 @ b2), 2-D."""
        dtype = torch.promote_types(torch.float32, self.w1_a.dtype)
        sides = ((self.w1_a, self.w1_b, self.t1), (self.w2_a, self.w2_b, self.t2))
        (a1, b1), (a2, b2) = (merged_core(a.to(dtype), b.to(dtype), core) for a, b, core in sides)
        return (a1, b1), (a2, b2)

    def delta(self, weight: Tensor | None = None) -> Tensor:
        """Return dW."""
        (a1, b1), (a2, b2) = self.matrices()
        # dW = alpha / rank * (a1 @ b1) * (a2 @ b2), element by element: both (out, in * kh * kw)
        product = (a1 @ b1) * (a2 @ b2) * self.scale
        return product.reshape(self.shape if weight is None else weight.shape)

    def factors(self, weight: Tensor | None = None) -> tuple[Tensor, Tensor, float]:
        """Return the row-wise Khatri-Rao products: a LoHa of rank r is exactly a LoRA of rank r * r."""
        (a1, b1), (a2, b2) = self.matrices()
        if b1.shape[0] * b2.shape[0] < min(self.shape[0], math.prod(self.shape[1:])):
            return _by_row(a1, a2), _by_row(b1.T, b2.T).T, self.scale
        return super().factors(weight)

    def in_shape(self, shape: tuple[int, ...]) -> Update:
        """Return it with its flat factors as those of this kernel, if any."""
        if shape == self.shape or self.t1 is not None:
            return super().in_shape(shape)
        kernel = (shape[2], shape[3]) if len(shape) == 4 else None
        return replace(self, kernel=kernel)._as(shape)

    def _as(self, shape: tuple[int, ...]) -> Update:
        return super().in_shape(shape)


def _by_row(first: Tensor, other: Tensor) -> Tensor:
    """Return (rows, r1 * r2): for each row all products of the first's and the other's values."""
    return (first[:, :, None] * other[:, None, :]).flatten(1)


def build(where: str, parts: Mapping[str, Tensor], alpha: float | None, kernel: Kernel | None) -> LoHa:
    """Return the update of one module of a file; see :class:`AdapterKind`."""
    check_floats(where, parts.values())
    require_parts(where, parts, _PARTS[:4])
    core, w1_b = parts.get("hada_t1"), parts["hada_w1_b"]
    try:
        return LoHa(
            parts["hada_w1_a"],
            w1_b,
            parts["hada_w2_a"],
            parts["hada_w2_b"],
            float(w1_b.shape[0]) if alpha is None else alpha,
            core,
            parts.get("hada_t2"),
            kernel if core is None else None,
        )
    except ValueError as error:
        raise does_not_fit(where, error) from None


def start(config: AdapterConfig, weight: Tensor, rank: int, alpha: float, generator: torch.Generator) -> LoHa:
    """LyCORIS' start: ``w1_a`` normal with deviation 0.1, both ``b`` with 1, ``w2_a`` zero (so dW = 0)."""
    out, width = weight.shape[0], math.prod(weight.shape[1:])
    w1_b, w2_b = (torch.randn((rank, width), generator=generator) for _ in range(2))
    w1_a = 0.1 * torch.randn((out, rank), generator=generator)
    kernel = (weight.shape[2], weight.shape[3]) if weight.ndim == 4 else None
    return LoHa(w1_a, w1_b, torch.zeros((out, rank)), w2_b, alpha, kernel=kernel)


def peft_config(name: str, updates: Mapping[str, LoHa], dropout: float) -> Any:
    """Return PEFT's settings; the rank is 1, since the factors are replaced anyway."""
    from peft import LoHaConfig

    return LoHaConfig(r=1, alpha=1, target_modules=sorted(updates), init_weights=False)


LOHA = AdapterKind(
    title="LoHa",
    parts=tuple(plain_part(name) for name in _PARTS),
    build=build,
    start=start,
    trained=TrainedForm(peft_config, take_over_factors),
    peft_type="LOHA",
    peft=PeftFolder(
        rank=lambda update: update.rank,
        alpha=lambda update: update.alpha,
        core=lambda update: update.t1 is not None,
    ),
    algorithm="loha",
)
