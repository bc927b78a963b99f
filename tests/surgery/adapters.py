"""Adapters of tiny real models, and their updates in float64, for the tests of surgery."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from formats.adapters import EVERYTHING, SD1, file_of, models_of, random_adapter
from torch import Tensor

from sdlora.adapters.canonical import AdapterWeights, LowRankPair, ModuleKey
from sdlora.families.facts import FamilyInfo
from sdlora.formats.adapter_files import write_adapter
from sdlora.surgery.factors import Factors

RANKS = (4, 3, 6)
SCALES = (0.5, 1.0, 0.3)


def dense(factors: Factors) -> Tensor:
    """Return dW as a float64 matrix (out, in * kh * kw)."""
    return factors.up @ factors.down


def mixed_adapter(
    seed: int = 0,
    *,
    family: FamilyInfo = SD1,
    ranks: Sequence[int] = RANKS,
    scales: Sequence[float] = SCALES,
    dtype: torch.dtype = torch.float32,
) -> AdapterWeights:
    """Convolutions, linear layers and text encoders; mixed ranks, alpha not the rank.

    Of the U-Net only every ninth layer, to be quick.
    """
    whole = random_adapter(models_of(family), EVERYTHING, ranks, scales, dtype, seed)
    modules = sorted(whole.pairs)
    kept = {m: whole.pairs[m] for i, m in enumerate(modules) if m.component != "unet" or i % 9 == 0}
    assert {len(pair.shape) for pair in kept.values()} == {2, 4}
    return AdapterWeights(kept)


def saved(
    folder: Path,
    name: str,
    weights: AdapterWeights,
    dtype: torch.dtype = torch.float32,
    family: FamilyInfo = SD1,
) -> Path:
    """Write an adapter in WebUI's format and return the file."""
    path = folder / f"{name}.safetensors"
    write_adapter(file_of(weights), "webui", path, dtype, family)
    return path


def exact(pair: LowRankPair) -> Tensor:
    """dW as a matrix in float64."""
    return (pair.up.flatten(1).double() @ pair.down.flatten(1).double()) * (pair.alpha / pair.rank)


def relative_errors(actual: AdapterWeights, wanted: dict[ModuleKey, Tensor]) -> dict[ModuleKey, float]:
    """Frobenius error of each update over the norm of the wanted one; all modules must be there."""
    assert wanted and set(actual.pairs) == set(wanted)
    return {
        module: float((exact(actual.pairs[module]) - matrix).norm() / matrix.norm())
        for module, matrix in wanted.items()
    }


def truncated(matrix: Tensor, rank: int) -> Tensor:
    """The closest matrix of that rank, from the full SVD."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return (left[:, :rank] * values[:rank]) @ right[:rank]


def rank_for(matrix: Tensor, energy: float) -> int:
    """The fewest singular values that hold this share of the sum of squares."""
    squares = torch.linalg.svdvals(matrix).square()
    shares = [float(squares[:count].sum() / squares.sum()) for count in range(1, len(squares) + 1)]
    return next(
        i for i, share in enumerate(shares, 1) if share >= energy - 1e-12 or math.isclose(share, energy)
    )
