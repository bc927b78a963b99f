"""NF4 against its definition and bitsandbytes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sdlora.families import nf4
from sdlora.families.nf4 import NF4_LEVELS, decode_nf4, encode_nf4

functional = pytest.importorskip("bitsandbytes.functional")


def weight(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    values = torch.randn(shape, generator=generator) * torch.rand(shape, generator=generator)
    values.view(-1)[64:128] = 0.0  # a block of zeros
    return values


@pytest.mark.parametrize("shape", [(40, 64), (24, 16, 3, 3), (10, 13)])
def test_each_value_becomes_the_nearest_level_of_its_block(shape: tuple[int, ...]) -> None:
    given = weight(*shape)
    codes, scales = encode_nf4(given)
    decoded = decode_nf4(codes, scales, shape, torch.float32)
    flat = torch.cat([given.flatten(), torch.zeros(-given.numel() % 64)]).double().view(-1, 64)
    largest = flat.abs().amax(1, keepdim=True)
    assert torch.equal(scales.double(), largest.flatten())
    levels = torch.tensor(NF4_LEVELS, dtype=torch.float64)
    nearest = (flat[..., None] - levels * largest[..., None]).abs().amin(-1).flatten()[: given.numel()]
    taken = (decoded.double() - given.double()).abs().flatten()
    assert torch.allclose(taken, nearest, rtol=1e-5, atol=1e-7)


def test_codes_and_scales_are_those_of_bitsandbytes() -> None:
    given = weight(32, 320)
    codes, state = functional.quantize_4bit(given, blocksize=64, quant_type="nf4")
    ours, scales = encode_nf4(given)
    assert torch.equal(ours, codes.flatten()) and torch.equal(scales, state.absmax)


@pytest.mark.parametrize("without_kernel", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_decoding_is_that_of_bitsandbytes_bit_for_bit(
    dtype: torch.dtype, without_kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = weight(48, 64).to(dtype)
    codes, state = functional.quantize_4bit(given, blocksize=64, quant_type="nf4")
    wanted = functional.dequantize_4bit(codes, state)
    if without_kernel:
        monkeypatch.setattr(nf4, "kernel_agrees", lambda device: False)
    assert torch.equal(decode_nf4(codes.flatten(), state.absmax, (48, 64), dtype), wanted)


def test_a_kernel_that_decodes_otherwise_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    codes, scales = encode_nf4(weight(32, 64))
    wanted = decode_nf4(codes, scales, (32, 64), torch.float32)
    right = nf4.decode_by_kernel
    calls = []

    def wrong(codes: Tensor, scales: Tensor, shape: list[int], dtype: torch.dtype) -> Tensor:
        calls.append(dtype)
        return right(codes, scales, shape, dtype) * 1.01

    monkeypatch.setattr(nf4, "decode_by_kernel", wrong)
    nf4.kernel_agrees.cache_clear()
    try:
        assert torch.equal(decode_nf4(codes, scales, (32, 64), torch.float32), wanted)
        assert calls == [torch.float32]
    finally:
        nf4.kernel_agrees.cache_clear()
