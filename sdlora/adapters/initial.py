"""The values an adapter starts with, one layer at a time, each kind as its authors start it.

Every start but two changes nothing: one factor is zero. PiSSA and OLoRA start at a part of the base's own
weight, which has to be taken off again (:mod:`sdlora.training.trainable` keeps it and writes the difference).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..config.adapter import AdapterConfig
from .canonical import LowRankPair, Update
from .kinds import DoRA, LoHa, LoKr

_OVERSAMPLING, _ITERATIONS = 10, 16
"""Extra directions and power iterations of the randomised SVD; PEFT recommends 16 (``pissa_niter_16``)."""


def file_alpha(config: AdapterConfig, rank: int, alpha: float, module_rank: int) -> float:
    """Return the alpha a file holds for a layer of rank ``module_rank``, where ``rank`` is the usual one.

    With standard scaling all layers have the usual alpha / rank. rsLoRA scales by alpha / sqrt(own)
    (Kalajdzievski 2023, section 3), which in a file is alpha * sqrt(own) over own.
    """
    return alpha * math.sqrt(module_rank) if config.scaling == "rslora" else alpha * module_rank / rank


def fresh(
    config: AdapterConfig, weight: Tensor, rank: int, alpha: float, generator: torch.Generator
) -> Update:
    """Return the starting update of one layer, float32 on the CPU.

    Args:
        config: kind and start.
        weight: the base's, (out, in) or (out, in, kh, kw).
        rank: of the update.
        alpha: as files hold it.
        generator: on the CPU; all that is random comes from it.
    """
    if config.kind == "loha":
        return _loha(weight, rank, alpha, generator)
    if config.kind == "lokr":
        return _lokr(weight, rank, alpha, config.lokr_factor, generator)
    if config.init in ("pissa", "olora"):
        return _from_weight(config.init, weight, rank, alpha, generator)
    pair = _low_rank(config.init, weight, rank, alpha, generator)
    if config.kind == "lora":
        return pair
    ones = [1] * (weight.ndim - 1)
    if weight.is_meta:  # a blueprint, on which only shapes count
        return DoRA(pair, torch.ones((weight.shape[0], *ones)))
    length = torch.linalg.vector_norm(weight.detach().float().flatten(1), dim=1)
    return DoRA(pair, length.cpu().reshape(-1, *ones))


def _low_rank(init: str, weight: Tensor, rank: int, alpha: float, generator: torch.Generator) -> LowRankPair:
    """A uniform in +-1/sqrt(fan in), as in Hu et al.'s code, or normal as their paper says; B zero."""
    down = torch.empty((rank, *weight.shape[1:]), dtype=torch.float32)
    if init == "gaussian":
        nn.init.normal_(down, std=1 / rank, generator=generator)
    else:
        nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=generator)
    up = torch.zeros((weight.shape[0], rank, *([1, 1] if weight.ndim == 4 else [])))
    return LowRankPair(down, up, float(alpha))


def _from_weight(
    init: str, weight: Tensor, rank: int, alpha: float, generator: torch.Generator
) -> LowRankPair:
    """Factors whose scaled product is the part of the weight that is learned on.

    PiSSA (Meng et al. 2024, section 3): the largest singular values, their roots in both factors. OLoRA
    (Buyukakyuz 2024, section 3): the first columns and rows of its QR decomposition, as in PEFT.
    """
    matrix = weight.detach().float().flatten(1)
    scale, rank = alpha / rank, min(rank, *matrix.shape)
    if init == "olora":
        q, r = torch.linalg.qr(matrix)
        up, down = q[:, :rank], r[:rank]
    else:
        u, sizes, v = _largest(matrix, rank, generator)
        roots = (sizes / scale).sqrt()
        up, down = u * roots, roots[:, None] * v
    ones = [1, 1] if weight.ndim == 4 else []
    down = down.reshape(rank, *weight.shape[1:]).cpu().contiguous()
    return LowRankPair(down, up.reshape(-1, rank, *ones).cpu().contiguous(), scale * rank)


def _largest(matrix: Tensor, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Return the largest singular values with their vectors: (out, rank), (rank,), (rank, in).

    By subspace iteration from a random start where that is far cheaper than the whole decomposition
    (Halko, Martinsson and Tropp 2011, algorithm 4.4).
    """
    sought = rank + _OVERSAMPLING
    if 4 * sought >= min(matrix.shape):
        u, sizes, v = torch.linalg.svd(matrix, full_matrices=False)
        return u[:, :rank], sizes[:rank], v[:rank]
    start = torch.randn((matrix.shape[1], sought), generator=generator).to(matrix.device)
    basis, _ = torch.linalg.qr(matrix @ start)
    for _ in range(_ITERATIONS):
        other, _ = torch.linalg.qr(matrix.T @ basis)
        basis, _ = torch.linalg.qr(matrix @ other)
    u, sizes, v = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    return basis @ u[:, :rank], sizes[:rank], v[:rank]


def _loha(weight: Tensor, rank: int, alpha: float, generator: torch.Generator) -> LoHa:
    """LyCORIS' start: ``w1_a`` of deviation 0.1, both ``b`` of 1, ``w2_a`` zero."""
    out, width = weight.shape[0], math.prod(weight.shape[1:])
    w1_b, w2_b = (torch.randn((rank, width), generator=generator) for _ in range(2))
    w1_a = 0.1 * torch.randn((out, rank), generator=generator)
    kernel = (weight.shape[2], weight.shape[3]) if weight.ndim == 4 else None
    return LoHa(w1_a, w1_b, torch.zeros((out, rank)), w2_b, alpha, kernel=kernel)


def _lokr(weight: Tensor, rank: int, alpha: float, factor: int | None, generator: torch.Generator) -> LoKr:
    """LyCORIS' start: uniform as a linear layer's, the last factor of ``w2`` zero.

    ``w2`` is decomposed where the rank is below half of its larger side.
    """
    (rows, k), (columns, n) = split_side(weight.shape[0], factor), split_side(weight.shape[1], factor)
    kernel = tuple(weight.shape[2:])
    w1 = _uniform((rows, columns), generator)
    if rank >= max(k, n) / 2:
        return LoKr(w1, torch.zeros((k, n, *kernel)), alpha)
    flat = n * math.prod(kernel)
    return LoKr(
        w1,
        None,
        alpha,
        w2_a=_uniform((k, rank), generator),
        w2_b=torch.zeros((rank, flat)),
        kernel=(kernel[0], kernel[1]) if kernel else None,
    )


def split_side(size: int, factor: int | None) -> tuple[int, int]:
    """Return two factors of a layer's side, the first for LoKr's small matrix.

    The first is ``factor`` if that divides the side, else the largest divisor below it and below the
    square root.
    """
    if factor is not None and size % factor == 0:
        return factor, size // factor
    limit = math.isqrt(size) if factor is None else min(factor, math.isqrt(size))
    first = max(divisor for divisor in range(1, limit + 1) if size % divisor == 0)
    return first, size // first


def _uniform(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    tensor = torch.empty(shape)
    nn.init.kaiming_uniform_(tensor, a=math.sqrt(5), generator=generator)
    return tensor
