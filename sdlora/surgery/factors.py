"""The arithmetic of low-rank updates: ``dW = up @ down`` as two float64 matrices, and what is done to them.

Everything follows from the factors: no full weight matrix is ever built or decomposed. With ``up`` of R
columns, a product, norm or singular value decomposition costs ``O((out + in) R^2)`` instead of
``O(out in R)`` or worse.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..adapters.canonical import LowRankPair
from ..errors import AdapterFileError, ConfigError

_CANCELLED = 1e-5
"""Below this share, a difference of sums has lost so many digits that a dearer way is worth it."""


@dataclass(frozen=True)
class Factors:
    """One layer's ``dW = up @ down``, with every scale folded in.

    Attributes:
        up: (out, R) float64.
        down: (R, in * kh * kw) float64.
        shape: of the layer's weight: (out, in) or (out, in, kh, kw).
    """

    up: Tensor
    down: Tensor
    shape: tuple[int, ...]

    @property
    def rank(self) -> int:
        """Number of columns of ``up``; the true rank may be lower."""
        return self.up.shape[1]

    def scaled(self, factor: float) -> Factors:
        """Return the update times a number, which goes into ``up`` alone (in both it would be squared)."""
        return Factors(self.up * factor, self.down, self.shape)

    def norm(self) -> float:
        """Return the Frobenius norm from two R x R Gram matrices."""
        return math.sqrt(max(inner_product(self, self), 0.0))


@dataclass(frozen=True)
class Cut:
    """How much of an update's spectrum is kept.

    Attributes:
        rank: at most this many singular values.
        energy: as few as hold this share of the sum of squares, above 0 and at most 1.
        error: as few as bring the Frobenius error, relative to the update's norm, to this or below.

    Raises:
        ConfigError: when nothing is asked for, ``energy`` and ``error`` both are, or one is out of range.
    """

    rank: int | None = None
    energy: float | None = None
    error: float | None = None

    def __post_init__(self) -> None:
        if self.rank is None and self.energy is None and self.error is None:
            raise ConfigError("a cut needs a size: give --rank, --energy or --error")
        if self.energy is not None and self.error is not None:
            raise ConfigError("--energy and --error say the same thing in two ways; give one of them")
        if self.rank is not None and self.rank < 1:
            raise ConfigError(f"--rank {self.rank}: must be 1 or more")
        if self.energy is not None and not 0.0 < self.energy <= 1.0:
            raise ConfigError(f"--energy {self.energy:g}: is a share, so above 0 and at most 1, e.g. 0.99")
        if self.error is not None and not 0.0 <= self.error < 1.0:
            raise ConfigError(f"--error {self.error:g}: is relative, so at least 0 and below 1, e.g. 0.05")

    @property
    def allowed_loss(self) -> float | None:
        """Share of the sum of squares that may go, if ``energy`` or ``error`` says so."""
        if self.error is not None:
            return self.error**2
        return None if self.energy is None else 1.0 - self.energy

    def choose(self, values: Tensor, total: float | None = None) -> int:
        """Return how many singular values to keep, at least 1 and at most all.

        Args:
            values: singular values, falling.
            total: sum of the squares of all values, where ``values`` are only the largest.
        """
        most = len(values) if self.rank is None else min(self.rank, len(values))
        if self.allowed_loss is None:
            return max(most, 1)
        squares = values.double().square()
        rest = 0.0 if total is None else max(total - float(squares.sum()), 0.0)
        # tails[i] is lost when i values are kept; summed from the small end, where 1 - sum would cancel
        tails = squares.flip(0).cumsum(0).flip(0) + rest
        whole = float(tails[0]) if len(tails) else 0.0
        enough = int((tails > self.allowed_loss * whole * (1.0 + 1e-12)).sum())
        return max(1, min(enough, most))

    def is_met(self, values: Tensor, total: float) -> bool:
        """Tell whether the largest ``values`` of a spectrum suffice; all its squares sum to ``total``."""
        if self.rank is not None and len(values) >= self.rank:
            return True
        if self.allowed_loss is None:
            return False
        lost = max(total - float(values.double().square().sum()), 0.0)
        return lost <= self.allowed_loss * total


def cut_of(rank: int | None, energy: float | None, error: float | None) -> Cut | None:
    """Return the cut that these sizes ask for, or None where none is given."""
    return None if (rank, energy, error) == (None, None, None) else Cut(rank, energy, error)


def factors_of(pair: LowRankPair, weight: float = 1.0) -> Factors:
    """Return ``weight * dW`` of a pair, with the whole ``weight * alpha / rank`` folded into ``up``."""
    # dW = (weight * alpha / rank * up) @ down: (out, R) @ (R, in * kh * kw)
    up = pair.up.flatten(1).double() * (weight * pair.alpha / pair.rank)
    return Factors(up, pair.down.flatten(1).double(), (pair.up.shape[0], *pair.down.shape[1:]))


def joined(updates: Sequence[Factors], where: str = "the adapters") -> Factors:
    """Return the sum of updates as one, by putting the factors side by side: exact, rank R1 + R2 + ...

    ``[U1 U2] @ [D1; D2] = U1 D1 + U2 D2``. Adding the factors instead would give the cross terms
    ``U1 D2 + U2 D1`` as well.

    Raises:
        AdapterFileError: when the updates are for layers of different shapes.
    """
    shape = common_shape([update.shape for update in updates], where)
    return Factors(
        torch.cat([update.up for update in updates], 1), torch.cat([update.down for update in updates]), shape
    )


def common_shape(shapes: Sequence[tuple[int, ...]], where: str) -> tuple[int, ...]:
    """Return the one shape of updates of a layer; a 1x1 convolution may be written with two dimensions.

    Raises:
        AdapterFileError: when they do not agree.
    """
    widest = max(shapes, key=len)
    for shape in shapes:
        if shape != widest and (*shape, 1, 1) != widest:
            raise AdapterFileError(
                f"{where} have updates of the shapes {shape} and {widest} for one layer; combine adapters "
                "made for the same base model"
            )
    return widest


def inner_product(first: Factors, other: Factors) -> float:
    """Return ``<dW1, dW2> = trace((U1^T U2) (D2 D1^T))`` in float64."""
    # trace(A B^T) is the sum of A * B: (R1, R2) * (R1, R2)
    return float(((first.up.T @ other.up) * (first.down @ other.down.T)).sum())


def distance(first: Factors, other: Factors) -> float:
    """Return the Frobenius norm of ``dW1 - dW2``, right to float64 rounding of the larger of the two.

    For nearly equal updates ``|dW1|^2 - 2 <dW1, dW2> + |dW2|^2`` loses half the digits. There the triangular
    factors of ``[U1 -U2]`` and ``[D1; D2]``, the factors of the difference, carry its norm without loss.
    """
    whole = inner_product(first, first) + inner_product(other, other)
    square = whole - 2.0 * inner_product(first, other)
    if square > _CANCELLED * whole:
        return math.sqrt(square)
    # |[U1 -U2] @ [D1; D2]| = |Ru Rd^T|, both triangular, (R1 + R2, R1 + R2) or smaller
    left = torch.linalg.qr(torch.cat([first.up, -other.up], 1), mode="r").R
    right = torch.linalg.qr(torch.cat([first.down, other.down]).T, mode="r").R
    return float(torch.linalg.matrix_norm(left @ right.T))


def rounding_distance(exact: Factors, stored: Factors) -> float:
    """Return the Frobenius norm of the difference of two updates whose factors differ by rounding only.

    ``U D - U' D' = (U - U') D + U' (D - D')``, where each bracket is small already; cheaper than
    :func:`distance`, and as exact.
    """
    change_up, change_down = exact.up - stored.up, exact.down - stored.down
    if not bool(change_down.any()):
        return Factors(change_up, exact.down, exact.shape).norm() if bool(change_up.any()) else 0.0
    left = torch.cat([change_up, stored.up], 1)  # [(U - U') U'] @ [D; (D - D')]
    return Factors(left, torch.cat([exact.down, change_down]), exact.shape).norm()


@dataclass(frozen=True)
class Spectrum:
    """The singular value decomposition of an update, kept in factored form.

    Attributes:
        values: (k,) falling.
        shape: of the layer's weight.
    """

    values: Tensor
    shape: tuple[int, ...]
    _left: tuple[Tensor, Tensor, Tensor]
    _right: tuple[Tensor, Tensor, Tensor]

    def first(self, count: int) -> Factors:
        """Return the best update of this rank (Eckart and Young 1936), half of each value on each side."""
        roots = self.values[:count].sqrt()  # up = Qu P sqrt(S): (out, count); down = (Qd V sqrt(S))^T
        up = _turned(*self._left[:2], self._left[2][:, :count] * roots)
        down = _turned(*self._right[:2], self._right[2][:, :count] * roots)
        return Factors(up, down.T, self.shape)


def spectrum(factors: Factors) -> Spectrum:
    """Return the SVD of an update through QR of its two factors and the SVD of an R x R matrix.

    With ``up = Qu Ru`` and ``down^T = Qd Rd``: ``dW = Qu (Ru Rd^T) Qd^T``, so the small matrix in the middle
    has the singular values of dW, and its vectors turned by Qu and Qd are those of dW. Qu and Qd stay
    Householder reflections: to turn the few vectors that are kept is cheaper than to write the matrices out.
    """
    (left, left_tau, up), (right, right_tau, down) = (_reduced(m) for m in (factors.up, factors.down.T))
    # Ru Rd^T = P S V^T, (R, R), so dW = (Qu P) S (Qd V)^T
    inner_left, values, inner_right = torch.linalg.svd(up @ down.T, full_matrices=False)
    return Spectrum(values, factors.shape, (left, left_tau, inner_left), (right, right_tau, inner_right.T))


def _reduced(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the Householder reflections of a matrix (their vectors and sizes) and its triangular factor."""
    vectors, sizes = torch.geqrf(matrix)
    return vectors[:, : len(sizes)], sizes, vectors[: len(sizes)].triu()


def _turned(vectors: Tensor, sizes: Tensor, small: Tensor) -> Tensor:
    """Return ``Q @ small`` for the Q that :func:`_reduced` gives, (rows, columns of small)."""
    padded = small.new_zeros(vectors.shape[0], small.shape[1])
    padded[: small.shape[0]] = small
    return torch.ormqr(vectors, sizes, padded)


def balanced(update: Factors) -> Factors:
    """Return the same update with each row of ``down`` and its column of ``up`` of similar size.

    Only powers of two move between them, so no product changes. It matters in float16, where a small scale
    folded into one factor would push its values below 6e-5, under which precision falls.
    """
    sizes_up, sizes_down = update.up.abs().amax(0), update.down.abs().amax(1)
    usable = (sizes_up > 0) & (sizes_down > 0)
    ratio = torch.where(usable, sizes_up, 1.0).log2() - torch.where(usable, sizes_down, 1.0).log2()
    exponent = (ratio / 2).round()
    return Factors(
        update.up * torch.exp2(-exponent), update.down * torch.exp2(exponent)[:, None], update.shape
    )


def pair_of(update: Factors, alpha: float, dtype: torch.dtype) -> LowRankPair:
    """Return the canonical pair of an update: ``rank / alpha`` folded into ``up``, each factor rounded once.

    Args:
        update: at least rank 1.
        alpha: of the pair.
        dtype: number format of the factors.
    """
    up = update.up if alpha == update.rank else update.up * (update.rank / alpha)
    out, rank, inputs = up.shape[0], update.rank, update.shape[1:]
    return LowRankPair(
        update.down.to(dtype).reshape(rank, *inputs).contiguous(),
        up.to(dtype).reshape(out, rank, *([1, 1] if len(inputs) == 3 else [])).contiguous(),
        alpha,
    )
