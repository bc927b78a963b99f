"""LoKr: a Kronecker product (Yeh et al. 2024, LyCORIS).

Every client that reads it computes it the same way; scale rules: formats.md 3.1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...config.adapter import AdapterConfig
from ...errors import AdapterFileError
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
from .lycoris import NamedFactors, merged_core, uniform, with_kernel

_PARTS = (
    *("lokr_w1", "lokr_w1_a", "lokr_w1_b"),
    *("lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
)


@dataclass(frozen=True)
class LoKr(NamedFactors):
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
    parts: ClassVar[tuple[str, ...]] = _PARTS

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
        return first, merged_core(self.w2_a.to(dtype), self.w2_b.to(dtype), self.t2)

    def delta(self, weight: Tensor | None = None) -> Tensor:
        """Return dW."""
        first, second = (_product(factors) for factors in self.matrices())
        # dW = scale * kron(w1, w2): (l, m) and (k, n * kh * kw) -> (l * k, m * n * kh * kw),
        # which is (out, in * kh * kw)
        return (torch.kron(first, second) * self.scale).reshape(
            self.shape if weight is None else weight.shape
        )

    def factors(self, weight: Tensor | None = None) -> tuple[Tensor, Tensor, float]:
        """Return the Kronecker products of the two sides' factors: of rank(w1) * rank(w2)."""
        first, second = (_two(factors) for factors in self.matrices())
        full = min(self.shape[0], math.prod(self.shape[1:]))
        if first[1].shape[0] * second[1].shape[0] < full:
            return torch.kron(first[0], second[0]), torch.kron(first[1], second[1]), self.scale
        return super().factors(weight)

    def norm(self) -> float:
        """Return ``|scale| ||w1|| ||w2||``, which is ``||scale * kron(w1, w2)||``."""
        sides = (side[0] if len(side) == 1 else side[0] @ side[1] for side in self.matrices())
        return abs(self.scale) * math.prod(float(torch.linalg.norm(side.double())) for side in sides)

    def in_shape(self, shape: tuple[int, ...]) -> Update:
        """Return it with its second factor as that of this kernel, if any."""
        if shape == self.shape or self.t2 is not None:
            return super().in_shape(shape)
        kernel = (shape[2], shape[3]) if len(shape) == 4 else None
        if self.w2 is None:
            return replace(self, kernel=kernel)._as(shape)
        size = math.prod(kernel) if kernel else 1
        rows, columns = self.w2.shape[0], math.prod(self.w2.shape[1:])
        if columns % size:
            return super().in_shape(shape)
        return replace(self, w2=self.w2.reshape(rows, columns // size, *(kernel or ())))._as(shape)

    def _as(self, shape: tuple[int, ...]) -> Update:
        return super().in_shape(shape)

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
        out, width, *kernel = with_kernel(self.w2_a.shape[0], self.w2_b.shape[1], self.kernel)
        return (out, width), tuple(kernel)


def _product(factors: Sequence[Tensor]) -> Tensor:
    return factors[0] if len(factors) == 1 else factors[0] @ factors[1]


def _two(factors: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Return a matrix as two factors, the one on its smaller side an identity; two factors as they are."""
    if len(factors) == 2:
        return factors[0], factors[1]
    (matrix,) = factors
    rows, columns = matrix.shape
    identity = torch.eye(min(rows, columns), dtype=matrix.dtype, device=matrix.device)
    return (matrix, identity) if columns <= rows else (identity, matrix)


def build(where: str, parts: Mapping[str, Tensor], alpha: float | None, kernel: Kernel | None) -> LoKr:
    """Return the update of one module of a file; see :class:`AdapterKind`."""
    check_floats(where, parts.values())
    for side in ("lokr_w1", "lokr_w2"):
        if side not in parts:
            require_parts(where, parts, (f"{side}_a", f"{side}_b"))
    flat = "lokr_w2_b" in parts and "lokr_t2" not in parts
    named = {part.removeprefix("lokr_"): tensor for part, tensor in parts.items()}
    w1, w2 = named.pop("w1", None), named.pop("w2", None)
    try:
        update = LoKr(w1, w2, 1.0, **named, kernel=kernel if flat else None)
        return replace(update, alpha=float(update.rank) if alpha is None else alpha)
    except ValueError as error:
        raise does_not_fit(where, error) from None


def start(config: AdapterConfig, weight: Tensor, rank: int, alpha: float, generator: torch.Generator) -> LoKr:
    """LyCORIS' start: uniform as in a linear layer, the last factor of ``w2`` zero (so dW = 0).

    ``w2`` is decomposed if the rank is below half of its larger side.
    """
    factor = config.lokr_factor
    (rows, k), (columns, n) = split_side(weight.shape[0], factor), split_side(weight.shape[1], factor)
    kernel = tuple(weight.shape[2:])
    w1 = uniform((rows, columns), generator)
    if rank >= max(k, n) / 2:
        return LoKr(w1, torch.zeros((k, n, *kernel)), alpha)
    flat = n * math.prod(kernel)
    return LoKr(
        w1,
        None,
        alpha,
        w2_a=uniform((k, rank), generator),
        w2_b=torch.zeros((rank, flat)),
        kernel=(kernel[0], kernel[1]) if kernel else None,
    )


def split_side(size: int, factor: int | None) -> tuple[int, int]:
    """Return two numbers whose product is a layer's side; the first is that of LoKr's small matrix.

    The first is ``factor`` if that divides the side, else the largest divisor up to it and up to the
    square root.
    """
    if factor is not None and size % factor == 0:
        return factor, size // factor
    limit = math.isqrt(size) if factor is None else min(factor, math.isqrt(size))
    first = max(divisor for divisor in range(1, limit + 1) if size % divisor == 0)
    return first, size // first


def peft_config(name: str, updates: Mapping[str, LoKr], dropout: float) -> Any:
    """Return PEFT's settings; the rank is 1, since the factors are replaced anyway."""
    from peft import LoKrConfig

    return LoKrConfig(r=1, alpha=1, target_modules=sorted(updates), init_weights=False)


def quirks(client: str, format: str, updates: Sequence[LoKr]) -> list[str]:
    """stable-diffusion.cpp takes no alpha at rank 1 (formats.md 5.7)."""
    if client == "stable-diffusion.cpp" and 1 in {update.rank for update in updates if not update.is_full}:
        return ["ignores the alpha of LoKr layers of rank 1"]
    return []


# --- in PEFT folders -----------------------------------------------------------------------------------


def _folder_rank(update: LoKr) -> int:
    """Return PEFT's rank; if the second factor is full, one so large that PEFT leaves it whole."""
    return update.rank if update.w2 is None else max(update.w2.shape[:2])


def _folder_alpha(update: LoKr) -> float:
    rank = _folder_rank(update)
    return update.alpha if rank == update.rank and not update.is_full else rank * update.scale


def _folder_more(where: str, updates: Mapping[str, LoKr]) -> dict[str, Any]:
    return {"decompose_both": False, "decompose_factor": _decompose_factor(where, updates)}


def _decompose_factor(where: str, updates: Mapping[str, LoKr]) -> int:
    """Return the ``decompose_factor`` with which PEFT splits the sides of all layers as these are split."""
    from peft.tuners.lokr.layer import factorization

    split: Callable[[int, int], tuple[int, int]] = factorization
    sides: list[tuple[str, int, int]] = []
    for path, update in updates.items():
        if update.w1 is None:
            raise AdapterFileError(
                f"{where}: `{path}` has its first factor decomposed, which PEFT does for all layers or none; "
                "export as webui"
            )
        sides += [(path, update.shape[axis], update.w1.shape[axis]) for axis in (0, 1)]
    candidates: Sequence[int] = [-1, *sorted({first for _, _, first in sides}, reverse=True)]
    for factor in candidates:
        if all(split(size, factor)[0] == first for _, size, first in sides):
            return _checked(where, updates, factor)
    path = next(path for path, size, first in sides if split(size, -1)[0] != first)
    raise AdapterFileError(f"{where}: `{path}` is not split as PEFT would split it; export as webui")


def _checked(where: str, updates: Mapping[str, LoKr], factor: int) -> int:
    for path, update in updates.items():
        if update.w1 is None or update.w2 is not None:
            continue
        largest = max(update.shape[axis] // update.w1.shape[axis] for axis in (0, 1))
        if update.rank >= largest / 2:
            raise AdapterFileError(
                f"{where}: `{path}` is decomposed at rank {update.rank}, where PEFT keeps the whole factor; "
                "export as webui"
            )
    return factor


def _rescaled(update: LoKr, scale: float) -> LoKr:
    """Return what PEFT computes: it scales even two whole factors, which everyone else takes as they are."""
    if not update.is_full or scale == 1.0:
        return update
    assert update.w1 is not None
    return replace(update, w1=update.w1.to(torch.promote_types(update.w1.dtype, torch.float32)) * scale)


LOKR = AdapterKind(
    title="LoKr",
    parts=tuple(plain_part(name) for name in _PARTS),
    build=build,
    start=start,
    trained=TrainedForm(peft_config, take_over_factors),
    peft_type="LOKR",
    peft=PeftFolder(
        rank=_folder_rank,
        alpha=_folder_alpha,
        core=lambda update: update.t2 is not None if update.w2 is None else None,
        more=_folder_more,
        rescaled=_rescaled,
    ),
    quirks=quirks,
    algorithm="lokr",
)
