"""Any update as a plain low-rank pair: exactly, or cut to a rank with the error reported.

LoCon with Tucker factors keeps its rank. A LoHa of rank r is exactly a LoRA of rank r * r (the row-wise
Khatri-Rao products of its factors), a LoKr one of rank(w1) * rank(w2) (Kronecker products of their factors).
A DoRA needs the base's weight and has full rank. If an exact rank reached the layer's smaller side, the
update itself is one factor and the identity the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import AdapterFileError
from .canonical import AdapterWeights, LowRankPair, ModuleKey, Update
from .kinds.table import title_of


@dataclass(frozen=True)
class PlainUpdate:
    """A plain pair that replaces another update.

    Attributes:
        pair: float32 (or wider) factors, at the scale of the update.
        error: ``||dW - dW'|| / ||dW||`` (Frobenius), 0 where nothing was cut.
    """

    pair: LowRankPair
    error: float


def as_plain(update: Update, weight: Tensor | None = None, rank: int | None = None) -> PlainUpdate:
    """Return an update as a plain low-rank pair.

    Args:
        update: of any kind.
        weight: the base's weight of the layer, if the update needs it.
        rank: largest rank allowed (cut by SVD, which gives the closest of that rank); None for exactly.

    Raises:
        ValueError: without ``weight`` if the update needs it, or for a rank below 1.
    """
    if rank is not None and rank < 1:
        raise ValueError(f"a rank is 1 or more, not {rank}")
    up, down, scale = update.factors(weight)
    error = 0.0
    if rank is not None and rank < down.shape[0]:
        up, down, error = _cut(up, down, rank)
    elif isinstance(update, LowRankPair):
        return PlainUpdate(update, 0.0)
    shape = update.shape if weight is None else tuple(weight.shape)
    ones = (1,) * (len(shape) - 2)
    rank_kept = down.shape[0]
    pair = LowRankPair(
        down.reshape(rank_kept, *shape[1:]), up.reshape(shape[0], rank_kept, *ones), scale * rank_kept
    )
    return PlainUpdate(pair, error)


def to_plain(
    weights: AdapterWeights, *, rank: int | None = None, base: Callable[[ModuleKey], Tensor] | None = None
) -> tuple[AdapterWeights, Mapping[ModuleKey, float]]:
    """Return an adapter of any kind as a plain LoRA, and the relative error of each module that was cut.

    Args:
        weights: what to convert; plain pairs stay as they are, whatever their rank.
        rank: largest rank of a converted module; None for an exact conversion, at whatever rank it takes.
        base: gives the base's weight of a module, for kinds that need it.

    Raises:
        AdapterFileError: for a kind that needs the base, without ``base``.
    """
    pairs: dict[ModuleKey, LowRankPair] = {}
    errors: dict[ModuleKey, float] = {}
    for key, update in weights.all_items():
        if isinstance(update, LowRankPair):
            pairs[key] = update
            continue
        if update.needs_base and base is None:
            raise AdapterFileError(
                f"`{key.component}.{key.path}` is {title_of(update)}, whose update depends on the base's "
                "weights; give the base model too, or keep the kind"
            )
        plain = as_plain(update, base(key) if base is not None else None, rank)
        pairs[key], errors[key] = plain.pair, plain.error
    return AdapterWeights(pairs), errors


def _cut(up: Tensor, down: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """Return the closest factors of that rank (Eckart and Young 1936), balanced, and the relative error.

    The SVD is of a small square matrix: with up = Q1 R1 and down^T = Q2 R2, up @ down = Q1 (R1 R2^T) Q2^T.
    """
    left, right_up = torch.linalg.qr(up.double())
    right, right_down = torch.linalg.qr(down.double().T)
    u, sizes, v = torch.linalg.svd(right_up @ right_down.T)
    root = sizes[:rank].sqrt()
    whole = float(sizes.square().sum())
    error = math.sqrt(float(sizes[rank:].square().sum()) / whole) if whole > 0 else 0.0
    kept_up, kept_down = (left @ u[:, :rank]) * root, root[:, None] * (v[:rank] @ right.T)
    return kept_up.to(up.dtype), kept_down.to(down.dtype), error
