"""A tensor's numbers are finite or not, wherever the odd one stands and whatever the format."""

from __future__ import annotations

import math

import pytest
import torch

from sdlora.tensor_file import all_finite

FORMATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("length", [1, 7, 1000, 70_001])
def test_one_bad_number_is_found_wherever_it_stands(dtype: torch.dtype, length: int) -> None:
    good = torch.randn(length, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert all_finite(good)
    for place in {0, length // 2, length - 1}:
        for bad in (math.nan, math.inf, -math.inf):
            spoilt = good.clone()
            spoilt[place] = bad
            assert not all_finite(spoilt)


@pytest.mark.parametrize("dtype", FORMATS)
def test_the_largest_numbers_of_a_format_are_finite(dtype: torch.dtype) -> None:
    ends = torch.tensor([torch.finfo(dtype).max, torch.finfo(dtype).min], dtype=dtype)
    assert all_finite(ends.repeat(50_000).view(4, -1).T)


def test_nothing_is_finite() -> None:
    assert all_finite(torch.empty(0, 3))
