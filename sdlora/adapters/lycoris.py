"""LoHa and LoKr, as LyCORIS defined them and every client that reads them computes them.

LoHa: Hyeon-Woo et al. 2022 (FedPara), the element-wise product of two low-rank matrices. LoKr: Yeh et al.
2024 (LyCORIS), a Kronecker product. Scale rules: formats.md 3.1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .canonical import Update, check_factors

Kernel = tuple[int, int]


@dataclass(frozen=True)
class LoHa(Update):
    """``alpha / rank * (w1_a @ w1_b) * (w2_a @ w2_b)``, the middle product element by element.

    Attributes:
        w1_a, w2_a: (out, rank); with cores (rank, out).
        w1_b, w2_b: (rank, in) or, for a convolution without cores, (rank, in * kh * kw).
        alpha: numerator of the scale.
        t1, t2: Tucker cores (rank, rank, kh, kw), both or none.
        kernel: (kh, kw) of a convolution without cores; None for a linear layer.
    """

    kind: ClassVar[str] = "loha"

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
        return _with_kernel(self.w1_a.shape[0], self.w1_b.shape[1], self.kernel)

    def matrices(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Return ((a1, b1), (a2, b2)), float32 or wider: dW = scale * (a1 @ b1) * (a2 @ b2), 2-D."""
        dtype = torch.promote_types(torch.float32, self.w1_a.dtype)
        sides = ((self.w1_a, self.w1_b, self.t1), (self.w2_a, self.w2_b, self.t2))
        (a1, b1), (a2, b2) = (_merged_core(a.to(dtype), b.to(dtype), core) for a, b, core in sides)
        return (a1, b1), (a2, b2)

    def delta(self, weight: Tensor | None = None) -> Tensor:
        """Return dW."""
        (a1, b1), (a2, b2) = self.matrices()
        # dW = alpha / rank * (a1 @ b1) * (a2 @ b2), element by element: both (out, in * kh * kw)
        product = (a1 @ b1) * (a2 @ b2) * self.scale
        return product.reshape(self.shape if weight is None else weight.shape)

    def tensors(self) -> dict[str, Tensor]:
        """Return the four factors, and the cores if there are any."""
        factors = {
            "hada_w1_a": self.w1_a,
            "hada_w1_b": self.w1_b,
            "hada_w2_a": self.w2_a,
            "hada_w2_b": self.w2_b,
            "hada_t1": self.t1,
            "hada_t2": self.t2,
        }
        return {name: tensor for name, tensor in factors.items() if tensor is not None}

    def to(self, dtype: torch.dtype) -> LoHa:
        """Return it in another number format."""
        return LoHa(
            self.w1_a.to(dtype),
            self.w1_b.to(dtype),
            self.w2_a.to(dtype),
            self.w2_b.to(dtype),
            self.alpha,
            _cast(self.t1, dtype),
            _cast(self.t2, dtype),
            self.kernel,
        )


@dataclass(frozen=True)
class LoKr(Update):
    """``scale * kron(w1, w2)``, each of the two full or the product of two factors.

    The scale is alpha / rank, the rank being that of the decomposed factor (of ``w2`` if both are); where
    both are full it is 1, whatever alpha says.

    Attributes:
        w1: (l, m), or None if decomposed.
        w2: (k, n) or (k, n, kh, kw), or None if decomposed; out = l * k, in = m * n.
        alpha: numerator of the scale.
        w1_a, w1_b: (l, rank) and (rank, m).
        w2_a, w2_b: (k, rank) and (rank, n * kh * kw); with a core (rank, k) and (rank, n).
        t2: Tucker core (rank, rank, kh, kw).
        kernel: (kh, kw) of a convolution whose ``w2_b`` is flat; None otherwise.
    """

    kind: ClassVar[str] = "lokr"

    w1: Tensor | None
    w2: Tensor | None
    alpha: float
    w1_a: Tensor | None = None
    w1_b: Tensor | None = None
    w2_a: Tensor | None = None
    w2_b: Tensor | None = None
    t2: Tensor | None = None
    kernel: Kernel | None = None

    def __post_init__(self) -> None:
        check_factors(self._fits(), self.tensors(), self.alpha)

    def _fits(self) -> bool:
        if (self.w1 is None) == (self.w1_a is None or self.w1_b is None):
            return False
        if (self.w2 is None) == (self.w2_a is None or self.w2_b is None):
            return False
        if self.w1 is not None and (self.w1.ndim != 2 or self.w1_a is not None or self.w1_b is not None):
            return False
        halves = (self.w2_a, self.w2_b, self.t2)
        if self.w2 is not None:
            return self.w2.ndim in (2, 4) and all(half is None for half in halves) and self._first_fits()
        assert self.w2_a is not None and self.w2_b is not None
        if self.w2_a.ndim != 2 or self.w2_b.ndim != 2 or not self._first_fits():
            return False
        rank = self.w2_b.shape[0]
        if self.kernel and self.w2_b.shape[1] % math.prod(self.kernel):
            return False
        if self.t2 is None:
            return self.w2_a.shape[1] == rank
        return self.t2.ndim == 4 and tuple(self.t2.shape[:2]) == (rank, rank) and self.w2_a.shape[0] == rank

    def _first_fits(self) -> bool:
        if self.w1_a is None or self.w1_b is None:
            return True
        return self.w1_a.ndim == self.w1_b.ndim == 2 and self.w1_a.shape[1] == self.w1_b.shape[0]

    @property
    def is_full(self) -> bool:
        """Whether neither factor is decomposed, so that alpha means nothing."""
        return self.w1 is not None and self.w2 is not None

    @property
    def rank(self) -> int:
        """Rank of the decomposed factor; of two full ones the largest that ``w2`` can have."""
        if self.w2_b is not None:
            return self.w2_b.shape[0]
        if self.w1_b is not None:
            return self.w1_b.shape[0]
        assert self.w2 is not None
        return min(self.w2.shape[0], math.prod(self.w2.shape[1:]))

    @property
    def scale(self) -> float:
        """alpha / rank, but 1 where both factors are full."""
        return 1.0 if self.is_full else self.alpha / self.rank

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the layer's weight."""
        first, (second, kernel) = self._first_shape(), self._second_shape()
        return (first[0] * second[0], first[1] * second[1], *kernel)

    def matrices(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Return the factors of w1 and those of w2 as 2-D float32 (or wider) matrices, one or two each."""
        dtype = torch.promote_types(torch.float32, next(iter(self.tensors().values())).dtype)
        if self.w1 is not None:
            first: tuple[Tensor, ...] = (self.w1.to(dtype),)
        else:
            assert self.w1_a is not None and self.w1_b is not None
            first = (self.w1_a.to(dtype), self.w1_b.to(dtype))
        if self.w2 is not None:
            return first, (self.w2.to(dtype).flatten(1),)
        assert self.w2_a is not None and self.w2_b is not None
        return first, _merged_core(self.w2_a.to(dtype), self.w2_b.to(dtype), self.t2)

    def delta(self, weight: Tensor | None = None) -> Tensor:
        """Return dW."""
        # dW = scale * kron(w1, w2): (l, m) and (k, n * kh * kw) -> (l * k, m * n * kh * kw),
        # which is (out, in * kh * kw)
        first, second = (_product(factors) for factors in self.matrices())
        return (torch.kron(first, second) * self.scale).reshape(
            self.shape if weight is None else weight.shape
        )

    def tensors(self) -> dict[str, Tensor]:
        """Return the factors that are there."""
        factors = {
            "lokr_w1": self.w1,
            "lokr_w1_a": self.w1_a,
            "lokr_w1_b": self.w1_b,
            "lokr_w2": self.w2,
            "lokr_w2_a": self.w2_a,
            "lokr_w2_b": self.w2_b,
            "lokr_t2": self.t2,
        }
        return {name: tensor for name, tensor in factors.items() if tensor is not None}

    def to(self, dtype: torch.dtype) -> LoKr:
        """Return it in another number format."""
        return LoKr(
            _cast(self.w1, dtype),
            _cast(self.w2, dtype),
            self.alpha,
            _cast(self.w1_a, dtype),
            _cast(self.w1_b, dtype),
            _cast(self.w2_a, dtype),
            _cast(self.w2_b, dtype),
            _cast(self.t2, dtype),
            self.kernel,
        )

    def _first_shape(self) -> tuple[int, int]:
        if self.w1 is not None:
            return self.w1.shape[0], self.w1.shape[1]
        assert self.w1_a is not None and self.w1_b is not None
        return self.w1_a.shape[0], self.w1_b.shape[1]

    def _second_shape(self) -> tuple[tuple[int, int], tuple[int, ...]]:
        """Return ((k, n), kernel), the kernel empty for a linear layer."""
        if self.w2 is not None:
            return (self.w2.shape[0], self.w2.shape[1]), tuple(self.w2.shape[2:])
        assert self.w2_a is not None and self.w2_b is not None
        if self.t2 is not None:
            return (self.w2_a.shape[1], self.w2_b.shape[1]), tuple(self.t2.shape[2:])
        out, width, *kernel = _with_kernel(self.w2_a.shape[0], self.w2_b.shape[1], self.kernel)
        return (out, width), tuple(kernel)


def _merged_core(a: Tensor, b: Tensor, core: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return (out, rank) and (rank, in * kh * kw), whose product is the factors' with their core."""
    if core is None:
        return a, b
    # (rank, out) -> (out, rank), as torch.kron fails on transposed views;
    # (rank, rank, kh, kw) and (rank, in) -> (rank, in * kh * kw)
    return a.T.contiguous(), torch.einsum("ijkl,jc->ickl", core.to(b.dtype), b).flatten(1)


def _product(factors: Sequence[Tensor]) -> Tensor:
    return factors[0] if len(factors) == 1 else factors[0] @ factors[1]


def _with_kernel(out: int, width: int, kernel: Kernel | None) -> tuple[int, ...]:
    return (out, width) if kernel is None else (out, width // math.prod(kernel), *kernel)


def _cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)
