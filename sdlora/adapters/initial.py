"""The low-rank factors that a layer starts with; kinds with other factors define their starts themselves.

Every start but two changes nothing, as one factor is zero. PiSSA and OLoRA start at a part of the base's own
weight, which has to be subtracted again: :mod:`sdlora.training.trainable` keeps it and writes the difference.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..config.adapter import AdapterConfig
from .canonical import LowRankPair

_OVERSAMPLING, _ITERATIONS = 10, 16
"""Extra directions and power iterations of the randomised SVD; PEFT recommends 16 (``pissa_niter_16``)."""


def file_alpha(config: AdapterConfig, rank: int, alpha: float, module_rank: int) -> float:
    """Return the alpha a file holds for a layer of rank ``module_rank``, where ``rank`` is the usual one.

    With standard scaling all layers have the scale alpha / rank. rsLoRA scales a layer by
    alpha / sqrt(module_rank) (Kalajdzievski 2023, section 3). Files divide alpha by the layer's rank, so
    this is an alpha of alpha * sqrt(module_rank) in them.
    """
    return alpha * math.sqrt(module_rank) if config.scaling == "rslora" else alpha * module_rank / rank


def low_rank(init: str, weight: Tensor, rank: int, alpha: float, generator: torch.Generator) -> LowRankPair:
    """Return A uniform in +-1/sqrt(fan in), as in Hu et al.'s code, or normal as in their paper; B zero."""
    down = torch.empty((rank, *weight.shape[1:]), dtype=torch.float32)
    if init == "gaussian":
        nn.init.normal_(down, std=1 / rank, generator=generator)
    else:
        nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=generator)
    up = torch.zeros((weight.shape[0], rank, *([1, 1] if weight.ndim == 4 else [])))
    return LowRankPair(down, up, float(alpha))


def from_weight(
    init: str, weight: Tensor, rank: int, alpha: float, generator: torch.Generator
) -> LowRankPair:
    """Return factors whose scaled product is the part of the weight that training starts from.

    PiSSA (Meng et al. 2024, section 3): the largest singular values, with their roots in each factor. OLoRA
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
        # scale * up @ down = u * sizes * v: (out, rank) and (rank, in * kh * kw)
        up, down = u * roots, roots[:, None] * v
    ones = [1, 1] if weight.ndim == 4 else []
    down = down.reshape(rank, *weight.shape[1:]).cpu().contiguous()
    return LowRankPair(down, up.reshape(-1, rank, *ones).cpu().contiguous(), scale * rank)


def _largest(matrix: Tensor, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Return the largest singular values with their vectors: (out, rank), (rank,), (rank, in).

    By subspace iteration from a random start if that is far cheaper than the whole decomposition
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
