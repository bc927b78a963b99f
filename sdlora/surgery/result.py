"""From the updates that an operation computed to the pairs that go into a file, with their errors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from ..adapters.canonical import AdapterWeights, LowRankPair, ModuleKey
from ..errors import AdapterFileError
from ..formats.table import FORMATS
from ..tensor_file import all_finite
from .factors import Cut, Factors, balanced, factors_of, pair_of, rounding_distance, spectrum
from .report import ModuleChange, relative, sorted_changes


@dataclass(frozen=True)
class Part:
    """One module's result before rounding.

    Attributes:
        module: which one.
        update: the result, float64.
        rank_before: rank that went in; None for a full weight.
        norm: Frobenius norm of what an exact result would be.
        cut_error: Frobenius norm of what a cut took away.
    """

    module: ModuleKey
    update: Factors
    rank_before: int | None
    norm: float
    cut_error: float = 0.0


def cut_part(module: ModuleKey, update: Factors, cut: Cut | None) -> Part:
    """Return a module's update, cut if asked for; one of no higher rank than wanted stays as it is."""
    kept = cut is None or (cut.allowed_loss is None and cut.rank is not None and update.rank <= cut.rank)
    if kept or cut is None:
        return Part(module, update, update.rank, update.norm())
    values = spectrum(update)
    count = cut.choose(values.values)
    lost = float(torch.linalg.vector_norm(values.values[count:]))
    norm = float(torch.linalg.vector_norm(values.values))
    return Part(module, values.first(count), update.rank, norm, lost)


def finish(
    parts: Iterable[Part],
    format: str,
    dtype: torch.dtype,
    *,
    with_errors: bool,
    ranks: Mapping[ModuleKey, int] | None = None,
) -> tuple[AdapterWeights, tuple[ModuleChange, ...]]:
    """Return the adapter that is written, and what became of each module.

    Args:
        parts: one for each module; taken one by one if ``ranks`` are given, so that only one is in memory.
        format: of the file; decides the alphas.
        dtype: number format that the factors are rounded to, once.
        with_errors: measure each module's error, rounding included. Cut and rounding error are added as
            squares: what a cut takes away is orthogonal to what is kept.
        ranks: of the results, where they are known beforehand.

    Raises:
        AdapterFileError: when a value does not fit the number format.
    """
    if ranks is None:
        parts = list(parts)
        ranks = {part.module: part.update.rank for part in parts}
    alphas = file_alphas(ranks, format)
    pairs: dict[ModuleKey, LowRankPair] = {}
    changes = []
    for part in parts:
        update = balanced(part.update)
        pair = pair_of(update, alphas[part.module], dtype)
        _check_finite(part.module, pair)
        error = None
        if with_errors:
            lost = math.hypot(part.cut_error, rounding_distance(update, factors_of(pair)))
            error = relative(lost, part.norm)
        pairs[part.module] = pair
        changes.append(ModuleChange(part.module, part.rank_before, pair.rank, part.norm, error))
    return AdapterWeights(pairs), sorted_changes(changes)


def file_alphas(ranks: Mapping[ModuleKey, int], format: str) -> dict[ModuleKey, float]:
    """Return the alpha of each module of a result: the new rank.

    Where clients take one alpha for each component (as diffusers does for WebUI files, formats.md 4.3), it
    is the component's largest rank for all its modules; the factors take up the difference.
    """
    if not FORMATS[format].one_alpha:
        return {module: float(rank) for module, rank in ranks.items()}
    largest: dict[str, int] = {}
    for module, rank in ranks.items():
        largest[module.component] = max(largest.get(module.component, 0), rank)
    return {module: float(largest[module.component]) for module in ranks}


def _check_finite(module: ModuleKey, pair: LowRankPair) -> None:
    if not (all_finite(pair.up) and all_finite(pair.down)):
        raise AdapterFileError(
            f"`{module.component}.{module.path}`: its result is too large for "
            f"{str(pair.up.dtype).removeprefix('torch.')}, or the source holds NaN; use --dtype fp32 or "
            "bf16, or smaller weights"
        )
