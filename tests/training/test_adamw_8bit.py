"""AdamW with moments in 8 bits against bitsandbytes, and against AdamW in fp32."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sdlora.config.schema import OptimizerConfig
from sdlora.training import optimizer_state
from sdlora.training.adamw_8bit import BLOCK, AdamW8bit, dequantise, dynamic_codes, quantise
from sdlora.training.masters import MasterWeights, ParameterGroup
from sdlora.training.optimizers import make_optimizer

bitsandbytes: Any = pytest.importorskip("bitsandbytes")
COUNT = 5000  # no multiple of a block


def drawn(seed: int, count: int = COUNT) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.logspace(-5, 0, count)[torch.randperm(count, generator=generator)]
    return torch.randn(count, generator=generator) * sizes


@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_those_of_bitsandbytes(signed: bool) -> None:
    codes = dynamic_codes(signed=signed)
    assert codes.shape == (256,) and torch.equal(codes, codes.sort()[0])
    torch.testing.assert_close(
        codes, bitsandbytes.functional.create_dynamic_map(signed=signed).cpu(), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("signed", [True, False])
def test_a_value_becomes_the_nearest_code(signed: bool) -> None:
    values = drawn(1) if signed else drawn(1).square()
    values[BLOCK : 2 * BLOCK] = 0.0
    codes = dynamic_codes(signed=signed)
    numbers, scales = quantise(values, codes)
    assert [float(scales[n]) for n in (0, 1, 19)] == [
        float(values[n * BLOCK : (n + 1) * BLOCK].abs().max()) for n in (0, 1, 19)
    ]
    back = dequantise(numbers, scales, codes)
    relative = torch.where(back == 0, 0.0, values / scales.repeat_interleave(BLOCK)[:COUNT])
    distances = (relative[:, None] - codes).abs()
    chosen = distances.gather(1, numbers[:, None].long())[:, 0]
    smallest = float(codes[codes > 0].min())
    assert bool((chosen <= distances.min(1)[0] + (0.0 if signed else smallest)).all())
    assert not back[BLOCK : 2 * BLOCK].any()
    if not signed:
        assert bool(((back > 0) == (values > 0)).all()), "a second moment that is not 0 must not become 0"
    theirs, state = bitsandbytes.functional.quantize_blockwise(values, code=codes, blocksize=BLOCK)
    wanted = bitsandbytes.functional.dequantize_blockwise(theirs, state)
    assert torch.equal(scales, state.absmax)
    assert float((back - values).norm()) <= 1.01 * float((wanted - values).norm())


def gradient(number: int, count: int = COUNT) -> Tensor:
    """Return noise around a mean, each value of a size of its own over two decades."""
    noise = torch.randn(count, generator=torch.Generator().manual_seed(10 + number))
    return (1 + noise) * torch.logspace(-2, 0, count)


def stepped(kind: Any, steps: int, count: int = COUNT, **more: Any) -> tuple[nn.Parameter, Any]:
    parameter = nn.Parameter(drawn(2, count))
    optimizer = kind([parameter], lr=1e-3, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1, **more)
    for number in range(steps):
        parameter.grad = gradient(number, count)
        optimizer.step()
    return parameter, optimizer


def test_steps_are_those_of_bitsandbytes_but_for_rounding() -> None:
    start = drawn(2)
    ours, _ = stepped(AdamW8bit, 12)
    theirs, _ = stepped(bitsandbytes.optim.AdamW8bit, 12)
    exact, _ = stepped(torch.optim.AdamW, 12)
    moved = float((exact.detach() - start).norm())
    assert float((ours - theirs).norm()) < 0.01 * moved
    assert float((ours - exact).norm()) < 1.2 * float((theirs - exact).norm()) < 0.02 * moved


def test_small_parameters_are_stepped_in_fp32() -> None:
    ours, optimizer = stepped(AdamW8bit, 5, 100)
    exact, _ = stepped(torch.optim.AdamW, 5, 100)
    torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-8)
    assert {tensor.dtype for tensor in optimizer.state[ours].values() if isinstance(tensor, Tensor)} == {
        torch.float32
    }


def test_two_moments_take_two_bytes_a_value_and_their_scales() -> None:
    parameter, optimizer = stepped(AdamW8bit, 1)
    kept = {name: value for name, value in optimizer.state[parameter].items() if isinstance(value, Tensor)}
    size = sum(tensor.nbytes for name, tensor in kept.items() if "qmap" not in name)
    assert size == 2 * COUNT + 2 * 4 * -(-COUNT // BLOCK)


@pytest.mark.parametrize("then", [AdamW8bit, bitsandbytes.optim.AdamW8bit])
def test_it_goes_on_from_a_checkpoint(then: Any) -> None:
    """Bit for bit with the same; a run may also move to a machine where bitsandbytes has kernels."""
    whole, _ = stepped(AdamW8bit, 8)
    parameter, before = stepped(AdamW8bit, 4)
    tensors, values = optimizer_state.pack(before, ["unet"])
    tensors = copy.deepcopy(tensors)
    resumed = nn.Parameter(parameter.detach().clone())
    after = then([resumed], lr=1e-3, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)
    optimizer_state.unpack(after, ["unet"], tensors, values)
    for number in range(4, 8):
        resumed.grad = gradient(number)
        after.step()
    if then is AdamW8bit:
        assert torch.equal(resumed, whole) and not torch.equal(resumed, parameter)
    else:
        assert float((resumed - whole).norm()) < 0.01 * float((whole - parameter).norm())


def test_without_bitsandbytes_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    values = drawn(1)
    group = ParameterGroup("unet", MasterWeights([nn.Parameter(values.clone())], [values]), 1e-3)
    settings = OptimizerConfig(name="adamw8bit")
    assert not isinstance(make_optimizer(settings, [group]), AdamW8bit)
    monkeypatch.setattr("sdlora.training.optimizers.is_there", lambda package: False)
    assert isinstance(make_optimizer(settings, [group]), AdamW8bit)
