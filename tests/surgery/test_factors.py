"""The arithmetic of factors, against dense float64 matrices."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sdlora.adapters.canonical import LowRankPair
from sdlora.errors import AdapterFileError, ConfigError
from sdlora.surgery.factors import (
    Cut,
    Factors,
    balanced,
    distance,
    factors_of,
    inner_product,
    joined,
    pair_of,
    rounding_distance,
    spectrum,
)
from surgery.adapters import dense

sizes = st.integers(1, 12)


def drawn(out: int, width: int, rank: int, seed: int) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    up = torch.randn(out, rank, generator=generator, dtype=torch.float64)
    down = torch.randn(rank, width, generator=generator, dtype=torch.float64)
    return Factors(up, down, (out, width))


@settings(max_examples=60, deadline=None)
@given(sizes, sizes, sizes, sizes, st.integers(0, 99))
def test_products_norms_and_distances_equal_those_of_the_matrices(
    out: int, width: int, rank: int, other_rank: int, seed: int
) -> None:
    first, other = drawn(out, width, rank, seed), drawn(out, width, other_rank, seed + 1)
    a, b = dense(first), dense(other)
    assert inner_product(first, other) == pytest.approx(float((a * b).sum()), rel=1e-10, abs=1e-10)
    assert first.norm() == pytest.approx(float(a.norm()), rel=1e-10)
    assert distance(first, other) == pytest.approx(float((a - b).norm()), rel=1e-10)
    torch.testing.assert_close(dense(joined([first, other])), a + b, rtol=1e-12, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(sizes, sizes, st.integers(1, 20), st.integers(0, 99))
def test_the_spectrum_is_that_of_the_full_svd_also_when_the_rank_exceeds_the_layer(
    out: int, width: int, rank: int, seed: int
) -> None:
    factors = drawn(out, width, rank, seed)
    actual, wanted = spectrum(factors), torch.linalg.svdvals(dense(factors))
    assert len(actual.values) == min(out, width, rank)
    torch.testing.assert_close(actual.values, wanted[: len(actual.values)], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(
        dense(actual.first(len(actual.values))), dense(factors), rtol=1e-10, atol=1e-10
    )


def test_the_distance_of_nearly_equal_updates_keeps_its_digits() -> None:
    first = drawn(30, 20, 5, 0)
    other = Factors(first.up * (1 + 1e-12), first.down, first.shape)
    wanted = 1e-12 * first.norm()
    assert distance(first, other) == pytest.approx(wanted, rel=1e-3)
    assert rounding_distance(first, other) == pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_rounding_distance_is_that_of_the_rounded_matrices(dtype: torch.dtype) -> None:
    factors = balanced(drawn(30, 20, 5, 1))
    pair = pair_of(factors, 3.0, dtype)
    stored = factors_of(pair)
    assert rounding_distance(factors, stored) == pytest.approx(
        float((dense(factors) - dense(stored)).norm()), rel=1e-5
    )


def test_balancing_changes_no_product_and_keeps_float16_precise() -> None:
    drawn_factors = drawn(30, 20, 5, 2)
    lopsided = Factors(drawn_factors.up * 2.0**-22, drawn_factors.down * 2.0**4, (30, 20))
    even = balanced(lopsided)
    assert torch.equal(dense(even), dense(lopsided))
    naive, careful = pair_of(lopsided, 5.0, torch.float16), pair_of(even, 5.0, torch.float16)
    errors = [distance(lopsided, factors_of(pair)) / lopsided.norm() for pair in (naive, careful)]
    assert errors[0] > 0.01
    assert errors[1] < 1e-3


def test_balancing_takes_factors_that_are_zero() -> None:
    factors = Factors(torch.zeros(4, 2, dtype=torch.float64), torch.ones(2, 3, dtype=torch.float64), (4, 3))
    assert torch.equal(dense(balanced(factors)), torch.zeros(4, 3, dtype=torch.float64))


def test_alpha_is_folded_into_up_alone() -> None:
    pair = LowRankPair(torch.full((2, 3), 2.0), torch.full((4, 2), 3.0), alpha=1.0)
    actual = factors_of(pair, weight=-0.5)
    assert torch.equal(actual.down, torch.full((2, 3), 2.0, dtype=torch.float64))
    assert torch.equal(actual.up, torch.full((4, 2), 3.0 * 0.5 * -0.5, dtype=torch.float64))


def test_a_convolution_keeps_its_shape() -> None:
    generator = torch.Generator().manual_seed(0)
    pair = LowRankPair(
        torch.randn(2, 3, 3, 3, generator=generator), torch.randn(5, 2, 1, 1, generator=generator), 1.0
    )
    back = pair_of(factors_of(pair), 2.0, torch.float32)
    assert back.down.shape == (2, 3, 3, 3) and back.up.shape == (5, 2, 1, 1)
    torch.testing.assert_close(back.delta(), pair.delta())


def test_a_pointwise_convolution_joins_with_its_linear_spelling() -> None:
    flat, spatial = drawn(4, 3, 2, 0), drawn(4, 3, 2, 1)
    spatial = Factors(spatial.up, spatial.down, (4, 3, 1, 1))
    assert joined([flat, spatial]).shape == (4, 3, 1, 1)
    with pytest.raises(AdapterFileError, match=r"\(4, 3\) and \(5, 3\)|\(5, 3\)"):
        joined([flat, drawn(5, 3, 2, 0)])


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(0.01, 10), min_size=1, max_size=8),
    st.floats(0.05, 1.0),
    st.integers(0, 8),
)
def test_energy_keeps_the_fewest_values_that_suffice(sizes: list[float], energy: float, known: int) -> None:
    values = torch.tensor(sorted(sizes, reverse=True), dtype=torch.float64)
    squares = values.square()
    count = Cut(energy=energy).choose(values)
    assert squares[:count].sum() >= energy * squares.sum() * (1 - 1e-9)
    assert count == 1 or squares[: count - 1].sum() < energy * squares.sum() * (1 + 1e-9)
    assert Cut(error=math.sqrt(1 - energy)).choose(values) in (count, count - 1, count + 1)
    first = values[: max(1, min(known, len(values)))]
    cut, total = Cut(energy=energy), float(squares.sum())
    assert cut.choose(first, total) == min(count, len(first))
    if cut.is_met(first, total):
        assert count <= len(first)


def test_rank_bounds_energy() -> None:
    values = torch.tensor([1.0, 1.0, 1.0, 1.0])
    assert Cut(energy=1.0).choose(values) == 4
    assert Cut(energy=1.0, rank=2).choose(values) == 2
    assert Cut(energy=0.5, rank=3).choose(values) == 2
    assert Cut(rank=9).choose(values) == 4


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({}, "give --rank, --energy or --error"),
        ({"rank": 0}, "--rank 0: must be 1 or more"),
        ({"energy": 1.5}, "--energy 1.5"),
        ({"energy": 0.0}, "--energy 0"),
        ({"error": 1.0}, "--error 1"),
        ({"energy": 0.9, "error": 0.1}, "two ways"),
    ],
)
def test_sizes_that_cannot_be_are_refused(sizes: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Cut(**sizes)  # type: ignore[arg-type]
