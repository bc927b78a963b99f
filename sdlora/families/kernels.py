"""What is computed by kernels of our own: group norm with SiLU, add with layer norm, GEGLU, LoRA's gradients.

The functions here put :mod:`.kernel_operations` into a graph, for frozen norms: gradients are those of the
images and states alone. Torch's own functions are the reference, and take their place elsewhere.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from shutil import which
from typing import Any

import torch
from torch import Tensor, nn

from .kernel_operations import chunks_of, is_last, operations

MOST_RANK_BYTES = 256
"""Of a column of A, of all layers together, that the kernel of their gradients takes: the shared memory of a
program is 99 KiB on consumers' cards."""


def can_launch(device: torch.device, dtype: torch.dtype) -> bool:
    """Tell whether Triton is installed, with the C compiler it needs, and compiles for a card in a format."""
    if device.type != "cuda" or torch.version.hip or importlib.util.find_spec("triton") is None:
        return False
    # on Windows it brings one
    if sys.platform != "win32" and not os.environ.get("CC") and not (which("gcc") or which("clang")):
        return False
    least = (8, 0) if dtype == torch.bfloat16 else (7, 5)
    return torch.cuda.get_device_capability(device) >= least


def can_multiply(device: torch.device) -> bool:
    """Tell whether the kernel of LoRA's gradients suits a card: before Ampere, registers do not hold it."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def is_usual_norm(norm: nn.Module) -> bool:
    """Tell whether a norm is one that the kernels compute: of torch's own class, frozen, with its factors."""
    known = type(norm) in (nn.GroupNorm, nn.LayerNorm)
    values = [getattr(norm, name, None) for name in ("weight", "bias")]
    return known and all(value is not None and not value.requires_grad for value in values)


def _laid_out(x: Tensor, last: bool) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


class _ImageNorm(torch.autograd.Function):
    """Group norm of x (B, C, h, w), plus a constant (B, C) if there is one, then SiLU if asked for; as tokens
    (B, h w, C) if these are asked for."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, shift: Tensor | None, norm: nn.GroupNorm, silu: bool, tokens: bool
    ) -> Tensor:
        x = _laid_out(x, is_last(x))
        given = (x, shift, norm.weight, norm.bias, norm.num_groups)
        partial = (
            operations.group_chunks(x, shift, norm.num_groups) if chunks_of(x, norm.num_groups) > 1 else None
        )
        output, mean, rstd = operations.group_norm(*given, norm.eps, silu, tokens, partial)
        ctx.save_for_backward(x, shift, mean, rstd)
        ctx.norm, ctx.silu = norm, silu
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        x, shift, mean, rstd = ctx.saved_tensors
        norm: nn.GroupNorm = ctx.norm
        gradient = gradient.contiguous() if gradient.ndim == 3 else _laid_out(gradient, is_last(x))
        given = (gradient, x, shift, norm.weight, norm.bias, mean, rstd, norm.num_groups, ctx.silu)
        partial = operations.group_chunks_backward(*given) if chunks_of(x, norm.num_groups) > 1 else None
        return operations.group_norm_backward(*given, partial), None, None, None, None


def _in_rows(states: Tensor) -> Tensor:
    """Return states (..., C) whose rows follow each other at one distance: they may have room beside them."""
    distance = states.stride(-2)
    even = states.stride(-1) == 1 and distance >= states.shape[-1]
    for side, stride in zip(states.shape[-2::-1], states.stride()[-2::-1], strict=True):
        even = even and (stride == distance or side == 1)
        distance *= side
    return states if even else states.contiguous()


class _AddedNorm(torch.autograd.Function):
    """The sum of two states (B, S, C) and its layer norm; the sum of their gradients has room beside it."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, more: Tensor | None, norm: nn.LayerNorm, room: int
    ) -> tuple[Tensor, Tensor]:
        x = _in_rows(x)
        if more is None:
            total = x.view_as(x)
            normed, mean, rstd = operations.layer_norm(x, norm.weight, norm.bias, norm.eps)
        else:
            total, normed, mean, rstd = operations.add_layer_norm(
                x, _in_rows(more), norm.weight, norm.bias, norm.eps
            )
        ctx.save_for_backward(x if more is None else total, mean, rstd)
        ctx.norm, ctx.room, ctx.added = norm, room, more is not None
        return total, normed

    @staticmethod
    def backward(ctx: Any, past: Tensor, of_normed: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        x, mean, rstd = ctx.saved_tensors
        wide = before_norm(of_normed, past, x, ctx.norm, mean, rstd, ctx.room)
        of_sum = wide[..., : x.shape[-1]] if ctx.room else wide
        return of_sum, of_sum if ctx.added else None, None, None


class _Geglu(torch.autograd.Function):
    """``a * gelu(b)`` of the two halves of (..., 2C)."""

    @staticmethod
    def forward(ctx: Any, both: Tensor) -> Tensor:
        both = both.contiguous()
        ctx.save_for_backward(both)
        output: Tensor = operations.geglu(both)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (both,) = ctx.saved_tensors
        of_both: Tensor = operations.geglu_backward(gradient.contiguous(), both)
        return of_both


def image_norm(x: Tensor, norm: nn.GroupNorm, *, shift: Tensor | None = None, silu: bool) -> Tensor:
    """Return a group norm of images (B, C, h, w) in their layout, of x + shift (B, C) if that is given."""
    output: Tensor = _ImageNorm.apply(x, None if shift is None else shift.contiguous(), norm, silu, False)
    return output


def tokens_norm(x: Tensor, norm: nn.GroupNorm) -> Tensor:
    """Return a group norm of images (B, C, h, w), as tokens (B, h w, C)."""
    output: Tensor = _ImageNorm.apply(x, None, norm, False, True)
    return output


def added_norm(x: Tensor, more: Tensor | None, norm: nn.LayerNorm, room: int = 0) -> tuple[Tensor, Tensor]:
    """Return x + more (x alone if None), both (B, S, C), and the layer norm of that.

    Args:
        x: states.
        more: to be added.
        norm: frozen.
        room: numbers beside each row that the gradient leaves free, see :func:`.lean_blocks.with_room`.
    """
    both: tuple[Tensor, Tensor] = _AddedNorm.apply(x, more, norm, room)
    return both


def add_and_norm_(more: Tensor, x: Tensor, norm: nn.LayerNorm) -> tuple[Tensor, Tensor, Tensor]:
    """Add x to ``more`` in place, rows (..., C) both; return the layer norm of that, means and 1/deviations.

    No graph is made: it is for functions that know their own gradient, see :func:`before_norm`.
    """
    assert more is _in_rows(more)
    results: tuple[Tensor, Tensor, Tensor] = operations.add_layer_norm_(
        _in_rows(x), more, norm.weight, norm.bias, norm.eps
    )
    return results


def before_norm(
    of_normed: Tensor, past: Tensor, x: Tensor, norm: nn.LayerNorm, mean: Tensor, rstd: Tensor, room: int
) -> Tensor:
    """Return the gradient of what a layer norm is given, with room beside each row, (..., C + room).

    Args:
        of_normed: the gradient of what the norm puts out, (..., C).
        past: that of x itself, which is added.
        x: what the norm was given.
        norm: frozen.
        mean: of each row of x.
        rstd: one by the deviation of each row.
        room: numbers beside each row, left as they are.
    """
    given = (_in_rows(of_normed), _in_rows(past), x, norm.weight, mean, rstd, room)
    wide: Tensor = operations.layer_norm_backward(*given)
    return wide


def geglu(both: Tensor) -> Tensor:
    """Return ``a * gelu(b)`` of the two halves of (..., 2C)."""
    output: Tensor = _Geglu.apply(both)
    return output


def add_lora_gradients(
    g: Tensor, inner: Tensor, of_inner: Tensor, x: Tensor, of_up: Tensor, of_down: Tensor, scale: float
) -> None:
    """Add the gradients of the factors of n linear layers that lie beside each other.

    Args:
        g: of the outputs, (N, n out).
        inner: what A puts out, (N, n rank).
        of_inner: its gradient.
        x: the input, (N, in).
        of_up: (n, out, rank) or (out, rank); ``scale * g^T inner`` of each layer is added.
        of_down: (n, rank, in) or (rank, in); ``of_inner^T x`` is added.
        scale: of the layers.
    """
    layers = of_up.shape[0] if of_up.ndim == 3 else 1
    given = (part if part.stride(1) == 1 else part.contiguous() for part in (g, inner, of_inner, x))
    operations.lora_gradients(*given, of_up, of_down, layers, scale)
