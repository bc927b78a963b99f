"""Random updates of every kind, for layers of any shape."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sdlora.adapters.canonical import LowRankPair, Update
from sdlora.adapters.kinds.dora import DoRA
from sdlora.adapters.kinds.loha import LoHa
from sdlora.adapters.kinds.lokr import LoKr
from sdlora.adapters.kinds.tucker import TuckerPair

Shape = tuple[int, ...]


def factors(seed: int = 0, dtype: torch.dtype = torch.float32) -> Callable[..., Tensor]:
    """Return a function that draws normal tensors of the given sizes."""
    generator = torch.Generator().manual_seed(seed)
    return lambda *sizes: (0.3 * torch.randn(*sizes, generator=generator)).to(dtype)


def pair(shape: Shape, rank: int = 3, alpha: float = 1.5, seed: int = 0) -> LowRankPair:
    draw = factors(seed)
    return LowRankPair(draw(rank, *shape[1:]), draw(shape[0], rank, *[1] * (len(shape) - 2)), alpha)


def tucker(shape: Shape, rank: int = 3, alpha: float = 1.5, seed: int = 0) -> TuckerPair:
    draw = factors(seed)
    return TuckerPair(
        draw(rank, shape[1], 1, 1), draw(rank, rank, *shape[2:]), draw(shape[0], rank, 1, 1), alpha
    )


def loha(shape: Shape, rank: int = 3, alpha: float = 1.5, seed: int = 0, core: bool = False) -> LoHa:
    draw, (out, width, *rest) = factors(seed), shape
    if core:
        four = (draw(rank, out), draw(rank, width), draw(rank, out), draw(rank, width))
        return LoHa(*four, alpha, draw(rank, rank, *rest), draw(rank, rank, *rest))
    flat = width * (rest[0] * rest[1] if rest else 1)
    kernel = (rest[0], rest[1]) if rest else None
    return LoHa(draw(out, rank), draw(rank, flat), draw(out, rank), draw(rank, flat), alpha, kernel=kernel)


def lokr(
    shape: Shape,
    first: tuple[int, int] = (2, 4),
    rank: int = 3,
    alpha: float = 1.5,
    seed: int = 0,
    form: str = "second",
) -> LoKr:
    """``form``: which factors are decomposed: none, first, second, both, or core (second, with Tucker)."""
    draw, (out, width, *rest) = factors(seed), shape
    (rows, columns), kernel = first, (rest[0], rest[1]) if rest else None
    k, n = out // rows, width // columns
    flat = n * (rest[0] * rest[1] if rest else 1)
    split_first, split_second = form in ("first", "both"), form in ("second", "both")
    return LoKr(
        None if split_first else draw(rows, columns),
        None if split_second or form == "core" else draw(k, n, *rest),
        alpha,
        w1_a=draw(rows, rank) if split_first else None,
        w1_b=draw(rank, columns) if split_first else None,
        w2_a=draw(k, rank) if split_second else draw(rank, k) if form == "core" else None,
        w2_b=draw(rank, flat) if split_second else draw(rank, n) if form == "core" else None,
        t2=draw(rank, rank, *rest) if form == "core" else None,
        kernel=kernel if split_second else None,
    )


def dora(direction: Update, weight: Tensor, by_output: bool = True, seed: int = 9) -> DoRA:
    """A DoRA whose magnitudes are those of the base, moved by up to a fifth."""
    axis = 0 if by_output else 1
    others = [i for i in range(weight.ndim) if i != axis]
    norm = torch.linalg.vector_norm(weight, dim=others, keepdim=True)
    moved = 1 + 0.4 * (torch.rand(norm.shape, generator=torch.Generator().manual_seed(seed)) - 0.5)
    return DoRA(direction, (norm * moved).to(weight.dtype))


LINEAR: Shape = (8, 12)
CONVOLUTION: Shape = (8, 12, 3, 3)
POINTWISE: Shape = (8, 12, 1, 1)


def every_kind(shape: Shape, weight: Tensor | None = None) -> dict[str, Update]:
    """Return one update of each kind and form that a layer of this shape can have."""
    collected: dict[str, Update] = {"lora": pair(shape), "loha": loha(shape)}
    for form in ("none", "first", "second", "both"):
        collected[f"lokr-{form}"] = lokr(shape, form=form)
    if len(shape) == 4 and shape[2:] != (1, 1):
        collected |= {"tucker": tucker(shape), "loha-core": loha(shape, core=True)}
        collected["lokr-core"] = lokr(shape, form="core")
    if weight is not None:
        collected["dora"] = dora(pair(shape), weight)
        collected["dora-columns"] = dora(pair(shape), weight, by_output=False)
        collected["dora-loha"] = dora(loha(shape), weight)
    return collected
