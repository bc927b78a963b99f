"""NF4: 16 levels at quantiles of a normal distribution, scaled block by block (QLoRA; Dettmers et al. 2023).

The layout is bitsandbytes': 64 values a block, divided by the largest magnitude among them; two levels a
byte, the first in its upper half. Where bitsandbytes is installed its kernel decodes, which is several times
as fast; both agree bit for bit, which is tried on each device before the kernel is used.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

NF4_BLOCK = 64
# appendix E of the paper: quantiles of N(0, 1) for each side of zero, normalised to [-1, 1]
NF4_LEVELS = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941),
    *(0.7229568362236023, 1.0),
)
_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_AT_ONCE = 2**22  # values that are encoded together: what is needed beside them is twelve bytes a value


def encode_nf4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the codes, uint8 (N / 2,), and scales, float32 (N / 64,), of a weight of N values.

    N is rounded up to whole blocks.
    """
    flat = weight.contiguous().flatten()
    missing = -flat.numel() % NF4_BLOCK
    if missing:
        flat = torch.cat([flat, flat.new_zeros(missing)])
    parts = [_encoded(part) for part in flat.view(-1, NF4_BLOCK).split(_AT_ONCE // NF4_BLOCK)]
    codes, scales = zip(*parts, strict=True)
    return torch.cat(codes), torch.cat(scales)


def _encoded(blocks: Tensor) -> tuple[Tensor, Tensor]:
    values = blocks.float()  # (n, 64)
    scales = values.abs().amax(1)
    # a block of zeros divided by the least positive number is still zeros
    values = values / scales.clamp_min(torch.finfo(torch.float32).tiny)[:, None]
    nearest = torch.bucketize(values, _midpoints(values.device), out_int32=True).to(torch.uint8)
    pairs = nearest.view(-1, 2)
    return (pairs[:, 0] << 4) | pairs[:, 1], scales


def decode_nf4(codes: Tensor, scales: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return the weight: ``level * scale`` in float32, rounded once to ``dtype``."""
    count = math.prod(shape)
    usual = count == 2 * codes.numel() and dtype in _KERNEL_DTYPES
    if usual and kernel_agrees(codes.device):
        flat = [count // NF4_BLOCK, NF4_BLOCK]
        return decode_by_kernel(codes, scales, flat, dtype).view(*shape)
    return _decoded(codes, scales, dtype).flatten()[:count].view(*shape)


def _decoded(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Decode by torch's own operations; (n, 64)."""
    values = torch.nn.functional.embedding(codes.int(), _pairs(codes.device))  # (N / 2, 2)
    return values.view(-1, NF4_BLOCK).mul_(scales[:, None]).to(dtype)


def decode_by_kernel(codes: Tensor, scales: Tensor, shape: list[int], dtype: torch.dtype) -> Tensor:
    """Decode whole blocks by bitsandbytes' kernel."""
    decoded: Any = torch.ops.bitsandbytes.dequantize_4bit(
        codes.view(-1, 1), scales, NF4_BLOCK, "nf4", shape, dtype
    )
    result: Tensor = decoded
    return result


@functools.lru_cache(maxsize=16)
def kernel_agrees(device: torch.device) -> bool:
    """Tell whether bitsandbytes has a kernel for a device that decodes as this module does."""
    try:
        import bitsandbytes  # noqa: F401  (registers the operation)
    except Exception:
        return False
    if device.type == "meta":
        return True
    codes = torch.arange(256, dtype=torch.uint8, device=device)
    scales = torch.tensor([1.0, 0.3, 1e-3, 7.0, 0.0, 2.5, 1 / 3, 100.0], device=device)
    try:
        return all(
            torch.equal(
                decode_by_kernel(codes, scales, [8, NF4_BLOCK], dtype), _decoded(codes, scales, dtype)
            )
            for dtype in _KERNEL_DTYPES
        )
    except Exception:  # no kernel for this device: extras never stop a run
        return False


@functools.lru_cache(maxsize=16)
def _midpoints(device: torch.device) -> Tensor:
    levels = torch.tensor(NF4_LEVELS, dtype=torch.float64, device="cpu")
    return ((levels[1:] + levels[:-1]) / 2).float().to(device)


@functools.lru_cache(maxsize=16)
def _pairs(device: torch.device) -> Tensor:
    """The two levels of each byte, (256, 2)."""
    levels = torch.tensor(NF4_LEVELS, dtype=torch.float32, device="cpu")
    return torch.cartesian_prod(levels, levels).to(device)
