"""Updates beyond the plain low-rank pair, as LyCORIS, the WebUIs and PEFT define them.

Here: Tucker, a convolution's kernel in a small core between the factors (LoCon's ``lora_mid``), and DoRA
(Liu et al. 2024), a learned norm for every row or column of the whole weight. LoHa and LoKr are in
:mod:`sdlora.adapters.lycoris`. Scale rules are those that every client agrees on (formats.md 1.1 and 3).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from .canonical import LowRankPair, Update, check_factors
from .lycoris import LoHa, LoKr

__all__ = ["TITLES", "DoRA", "LoHa", "LoKr", "TuckerPair", "with_tensors"]

TITLES = {
    "lora": "LoRA",
    "tucker": "LoCon with Tucker factors",
    "loha": "LoHa",
    "lokr": "LoKr",
    "dora": "DoRA",
}
"""Kind -> what users call it."""


@dataclass(frozen=True)
class TuckerPair(Update):
    """A convolution's update with its kernel in the middle: 1x1 down, core, 1x1 up.

    Attributes:
        down: (rank, in, 1, 1).
        mid: (rank, rank, kh, kw).
        up: (out, rank, 1, 1).
        alpha: numerator of the scale alpha / rank.
    """

    kind: ClassVar[str] = "tucker"

    down: Tensor
    mid: Tensor
    up: Tensor
    alpha: float

    def __post_init__(self) -> None:
        rank = self.down.shape[0]
        fits = self.down.ndim == self.mid.ndim == self.up.ndim == 4 and (
            tuple(self.mid.shape[:2]) == (rank, rank)
            and self.up.shape[1] == rank
            and tuple(self.down.shape[2:]) == tuple(self.up.shape[2:]) == (1, 1)
        )
        check_factors(fits, self.tensors(), self.alpha)

    @property
    def rank(self) -> int:
        """Rows of ``down``."""
        return self.down.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in, kh, kw)."""
        return (self.up.shape[0], self.down.shape[1], *self.mid.shape[2:])

    def merged(self) -> LowRankPair:
        """Return the same update as a plain pair of the same rank and alpha: the core goes into ``down``."""
        dtype = torch.promote_types(torch.float32, self.down.dtype)
        # (rank, rank, kh, kw) and (rank, in) -> (rank, in, kh, kw)
        down = torch.einsum("ijkl,jc->ickl", self.mid.to(dtype), self.down.to(dtype).flatten(1))
        return LowRankPair(down, self.up.to(dtype), self.alpha)

    def delta(self, weight: Tensor | None = None) -> Tensor:
        """Return dW."""
        return self.merged().delta(weight)

    def tensors(self) -> dict[str, Tensor]:
        """Return the three factors."""
        return {"lora_down.weight": self.down, "lora_mid.weight": self.mid, "lora_up.weight": self.up}

    def to(self, dtype: torch.dtype) -> TuckerPair:
        """Return it in another number format."""
        return TuckerPair(self.down.to(dtype), self.mid.to(dtype), self.up.to(dtype), self.alpha)


@dataclass(frozen=True)
class DoRA(Update):
    """``W' = magnitude * (W + V) / norm(W + V)``, V being another update and W the base's weight.

    Attributes:
        direction: the update V, usually a low-rank pair.
        magnitude: (out, 1[, 1, 1]) where the norm is that of an output row (LyCORIS' default, PEFT), or
            (1, in[, 1, 1]) where it is that of an input column (WebUI).
    """

    kind: ClassVar[str] = "dora"

    direction: Update
    magnitude: Tensor

    def __post_init__(self) -> None:
        out, width = self.direction.shape[:2]
        shape = tuple(self.magnitude.shape)
        fits = not isinstance(self.direction, DoRA) and len(shape) in (2, 4)
        fits = fits and (shape[:2] in ((out, 1), (1, width))) and set(shape[2:]) <= {1}
        check_factors(fits, self.tensors(), self.alpha)

    @property
    def alpha(self) -> float:  # type: ignore[override]
        """The direction's alpha."""
        return self.direction.alpha

    @property
    def rank(self) -> int:
        """The direction's rank."""
        return self.direction.rank

    @property
    def scale(self) -> float:
        """The direction's scale."""
        return self.direction.scale

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the layer's weight."""
        return self.direction.shape

    @property
    def by_output(self) -> bool:
        """Whether the magnitude is that of output rows (else of input columns)."""
        return tuple(self.magnitude.shape[:2]) == (self.direction.shape[0], 1)

    def merged(self, weight: Tensor) -> Tensor:
        """Return W' in float32 (float64 stays), in the shape of ``weight``."""
        dtype = torch.promote_types(torch.promote_types(torch.float32, self.magnitude.dtype), weight.dtype)
        total = weight.to(dtype) + self.direction.delta(weight).to(dtype)
        shape = [1] * total.ndim
        shape[0 if self.by_output else 1] = -1
        # W' = m * (W + V) / norm(W + V); m and the norm are (out, 1, ...) by rows, (1, in, ...) by columns
        return total * (self.magnitude.to(dtype).reshape(shape) / self.norm_of(total).reshape(shape))

    def norm_of(self, weight: Tensor) -> Tensor:
        """Return the norm of each output row or input column of a weight, as a vector; never 0."""
        other = [axis for axis in range(weight.ndim) if axis != (0 if self.by_output else 1)]
        return torch.linalg.vector_norm(weight, dim=other).clamp_min(torch.finfo(weight.dtype).tiny)

    def delta(self, weight: Tensor | None = None) -> Tensor:
        """Return W' - W; at a strength s the WebUIs use W + s (W' - W).

        Raises:
            ValueError: without the base's weight.
        """
        if weight is None:
            raise ValueError("the update of a DoRA depends on the base's weight")
        merged = self.merged(weight)
        return merged - weight.to(merged.dtype)

    def tensors(self) -> dict[str, Tensor]:
        """Return the direction's factors and ``dora_scale``."""
        return {**self.direction.tensors(), "dora_scale": self.magnitude}

    def to(self, dtype: torch.dtype) -> DoRA:
        """Return it with the direction in another number format.

        The magnitude stays fp32 or wider: rounding it would be a change of the whole weight, in bf16 by up
        to 0.4 percent, which can be more than was learned.
        """
        return DoRA(self.direction.to(dtype), self.magnitude.to(torch.promote_types(torch.float32, dtype)))


def with_tensors(update: Update, tensors: Mapping[str, Tensor]) -> Update:
    """Return an update of the same kind, alpha and shape with other factors, by their file names."""
    if isinstance(update, DoRA):
        return DoRA(with_tensors(update.direction, tensors), tensors["dora_scale"])
    if isinstance(update, LowRankPair):
        return LowRankPair(tensors["lora_down.weight"], tensors["lora_up.weight"], update.alpha)
    if isinstance(update, TuckerPair):
        down, mid, up = (tensors[f"lora_{name}.weight"] for name in ("down", "mid", "up"))
        return TuckerPair(down, mid, up, update.alpha)
    assert isinstance(update, LoHa | LoKr)
    factors: dict[str, Any] = {
        name.partition("_")[2]: tensor for name, tensor in tensors.items() if name in update.tensors()
    }
    return replace(update, **factors)
