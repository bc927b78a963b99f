"""LoCon with Tucker factors: the kernel of a convolution is a small core between them (``lora_mid``).

Only read and converted: a warm start from such a file trains the plain pair that equals it. Scale rules are
those that every client agrees on (formats.md 1.1).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..canonical import LowRankPair, Update, check_factors
from .kind import AdapterKind, FilePart, Kernel, check_floats, does_not_fit, require_parts
from .lora import DOWN, UP

MID = FilePart("mid", "lora_mid.weight", r"\.lora_mid\.weight$")


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

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> TuckerPair:
        """Return it with other factors."""
        down, mid, up = (tensors[f"lora_{name}.weight"] for name in ("down", "mid", "up"))
        return TuckerPair(down, mid, up, self.alpha)

    def factors(self, weight: Tensor | None = None) -> tuple[Tensor, Tensor, float]:
        """Return those of the plain pair that equals it."""
        return self.merged().factors()

    def norm(self) -> float:
        """Return the norm of the plain pair that equals it."""
        return self.merged().norm()


def build(where: str, parts: Mapping[str, Tensor], alpha: float | None, kernel: Kernel | None) -> TuckerPair:
    """Return the update of one module of a file; see :class:`AdapterKind`."""
    check_floats(where, parts.values())
    require_parts(where, parts, ("down", "up"))
    down = parts["down"]
    try:
        return TuckerPair(down, parts["mid"], parts["up"], float(down.shape[0]) if alpha is None else alpha)
    except ValueError as error:
        raise does_not_fit(where, error) from None


TUCKER = AdapterKind(
    title="LoCon with Tucker factors",
    parts=(DOWN, UP, MID),
    build=build,
    warm=TuckerPair.merged,
    others_do="fails on them",
    algorithm="locon",
)
