"""Cutting a full matrix to low rank, where there are no factors to start from.

Large matrices go through a randomised range finder with power iterations (Halko, Martinsson and Tropp 2011,
algorithms 4.4 and 5.1): a few products with a thin matrix in place of a full decomposition. When the share
of energy asked for needs more than a quarter of all ranks, the eigenvectors of the smaller Gram matrix give
the whole spectrum at once.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .factors import Cut, Factors

_OVERSAMPLING = 10
_POWER_ITERATIONS = 3
_FIRST_RANK = 16
_SMALL_SIDE = 96


def cut_matrix(matrix: Tensor, shape: tuple[int, ...], cut: Cut, seed: int) -> tuple[Factors, float, float]:
    """Return a matrix's low-rank update, the matrix's Frobenius norm, and the norm of what was cut away.

    The update is ``U U^T M`` for orthonormal columns U near the leading left singular vectors: the best
    approximation of M in their span. So the loss is measured, not estimated.

    Args:
        matrix: (out, in * kh * kw), float32 or float64.
        shape: of the layer's weight.
        cut: how much to keep.
        seed: fixes the random start.
    """
    total = float(matrix.double().square().sum())
    basis, values = leading_vectors(matrix, cut, total, seed)
    count = cut.choose(values, total)
    up = basis[:, :count]
    down = up.T @ matrix
    kept = float(down.double().square().sum())
    lost = math.sqrt(max(total - kept, 0.0))
    if lost**2 < 1e-4 * total:  # the difference of two nearly equal sums has lost its digits
        lost = float(torch.linalg.matrix_norm((matrix - up @ down).double()))
    return Factors(up.double(), down.double(), shape), math.sqrt(total), lost


def leading_vectors(matrix: Tensor, cut: Cut, total: float, seed: int) -> tuple[Tensor, Tensor]:
    """Return orthonormal columns (out, k) and singular values (k,), as many as the cut can ask for.

    Args:
        total: sum of the squares of all elements.
    """
    side = min(matrix.shape)
    wanted = cut.rank if cut.allowed_loss is None and cut.rank is not None else _FIRST_RANK
    generator = torch.Generator().manual_seed(seed)
    while side > _SMALL_SIDE and wanted + _OVERSAMPLING <= side // 4:
        basis, values = _randomised(matrix, wanted, generator)
        if cut.is_met(values, total):
            return basis, values
        wanted = min(2 * wanted, cut.rank or side)
    return _whole(matrix)


def _randomised(matrix: Tensor, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    start = torch.randn(matrix.shape[1], rank + _OVERSAMPLING, generator=generator, dtype=matrix.dtype)
    basis = torch.linalg.qr(matrix @ start).Q
    for _ in range(_POWER_ITERATIONS):
        basis = torch.linalg.qr(matrix.T @ basis).Q
        basis = torch.linalg.qr(matrix @ basis).Q
    inner = (basis.T @ matrix).double()
    left, values, _ = torch.linalg.svd(torch.linalg.qr(inner.T, mode="r").R.T, full_matrices=False)
    return (basis.double() @ left[:, :rank]).to(matrix.dtype), values[:rank]


def _whole(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return all left singular vectors and values, by way of the right ones where those are fewer."""
    wide = matrix.double()
    if min(matrix.shape) <= _SMALL_SIDE:
        left, values, _ = torch.linalg.svd(wide, full_matrices=False)
        return left.to(matrix.dtype), values
    if matrix.shape[0] <= matrix.shape[1]:
        squares, vectors = torch.linalg.eigh(wide @ wide.T)
        return vectors.flip(1).to(matrix.dtype), squares.flip(0).clamp(min=0.0).sqrt()
    squares, vectors = torch.linalg.eigh(wide.T @ wide)
    values = squares.flip(0).clamp(min=0.0).sqrt()
    # M V = U S; QR makes the columns of vanishing values orthonormal too, and keeps the order of the rest
    return torch.linalg.qr(wide @ vectors.flip(1)).Q.to(matrix.dtype), values
