"""The kernels of our own as operations of torch, ``torch.ops.sdlora``: one for each launch.

So whatever counts or plans operations sees them, on the meta device, too; on a card :mod:`.triton_images` and
:mod:`.triton_rows` compute them. What uses them is in :mod:`.kernels`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

MOST_BY_ONE = 1 << 17
"""Numbers of an image's group that one program normalises; larger groups are gone over in chunks."""
CHUNK = 4096
"""Numbers in a chunk."""
TOGETHER = 128
"""Chunks whose findings are put together at once."""
_PIECE = 1024  # numbers of a row of a gate that one program computes

_COLUMNS = 64  # of outputs or inputs whose gradients one program adds up
_OF_GATES = {"BLOCK": _PIECE, "num_warps": 4, "enable_fp_fusion": True}


_library = torch.library.Library("sdlora", "DEF")
operations: Any = torch.ops.sdlora


def is_last(x: Tensor) -> bool:
    """Tell whether an image (B, C, h, w) has its channels last in memory, and not first as well."""
    return not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def chunks_of(x: Tensor, groups: int) -> int:
    """Return in how many chunks a group is gone over."""
    size = x[0].numel() // groups
    return 1 if size <= MOST_BY_ONE else -(-size // CHUNK)


def _define(schema: str, allocate: Callable[..., Any]) -> Callable[[Callable[..., None]], None]:
    """Make an operation of torch: ``allocate`` makes its results, what is decorated fills them."""
    name = schema.partition("(")[0]
    _library.define(schema)

    def register(launch: Callable[..., None]) -> None:
        def compute(*given: Any) -> Any:
            results = allocate(*given)
            launch(*given, *(results if isinstance(results, tuple) else (results,)))
            return results

        _library.impl(name, compute, "CompositeExplicitAutograd")
        torch.library.register_fake(f"sdlora::{name}", allocate, lib=_library)

    return register


def _images() -> Any:
    return importlib.import_module(".triton_images", __package__)


def _rows() -> Any:
    return importlib.import_module(".triton_rows", __package__)


def _sides(x: Tensor, groups: int) -> tuple[int, int, int]:
    """Return pixels, channels and groups of images (B, C, h, w), as the kernels take them."""
    return x.shape[2] * x.shape[3], x.shape[1], groups


def _form(x: Tensor, shift: Tensor | None, groups: int) -> dict[str, Any]:
    """Return the width of a group, and what is compiled into the kernels of a group norm."""
    return {
        "width": x.shape[1] // groups,
        "LAST": is_last(x),
        "SHIFT": shift is not None,
        "BLOCK": CHUNK,
        "num_warps": 8,
        "enable_fp_fusion": True,
    }


def _ending(x: Tensor, silu: bool, tokens: bool) -> dict[str, Any]:
    """Return what is compiled in for what a group norm puts out: with channels last, images are tokens."""
    return {"SILU": silu, "TOKENS": tokens and not is_last(x)}


def _made_chunks(x: Tensor, shift: Tensor | None, groups: int) -> Tensor:
    return x.new_empty((len(x) * groups, chunks_of(x, groups), 2), dtype=torch.float32)


@_define("group_chunks(Tensor x, Tensor? shift, int groups) -> Tensor", _made_chunks)
def _(x: Tensor, shift: Tensor | None, groups: int, partial: Tensor) -> None:
    chunks = partial.shape[1]
    _images().group_chunks[len(x) * groups, chunks](
        x, shift, partial, *_sides(x, groups), chunks, **_form(x, shift, groups)
    )


def _made_norm(*given: Any) -> tuple[Tensor, ...]:
    x, groups, tokens = given[0], given[4], given[7]
    mean = x.new_empty(len(x) * groups, dtype=torch.float32)
    output = x.new_empty((len(x), x.shape[2] * x.shape[3], x.shape[1])) if tokens else torch.empty_like(x)
    return output, mean, torch.empty_like(mean)


@_define(
    "group_norm(Tensor x, Tensor? shift, Tensor weight, Tensor bias, int groups, float epsilon, bool silu, "
    "bool tokens, Tensor? partial) -> (Tensor, Tensor, Tensor)",
    _made_norm,
)
def _(*given: Any) -> None:
    *tensors, groups, epsilon, silu, tokens, partial, output, mean, rstd = given
    x, results = tensors[0], (output, mean, rstd)
    form, sides = {**_form(x, tensors[1], groups), **_ending(x, silu, tokens)}, _sides(x, groups)
    if partial is None:
        _images().group_norm[len(x) * groups,](*tensors, *results, *sides, epsilon, **form)
        return
    chunks = partial.shape[1]
    _images().group_norm_of_chunks[len(x) * groups, chunks](
        *tensors, partial, *results, *sides, chunks, epsilon, **form, TOGETHER=TOGETHER
    )


_GIVEN = (
    "Tensor g, Tensor x, Tensor? shift, Tensor weight, Tensor bias, Tensor mean, Tensor rstd, int groups, "
    "bool silu"
)


def _made_chunks_backward(g: Tensor, x: Tensor, *rest: Any) -> Tensor:
    return _made_chunks(x, None, rest[5])


@_define(f"group_chunks_backward({_GIVEN}) -> Tensor", _made_chunks_backward)
def _(*given: Any) -> None:
    *tensors, groups, silu, partial = given
    x, shift, chunks = tensors[1], tensors[2], partial.shape[1]
    _images().group_chunks_backward[len(x) * groups, chunks](
        *(*tensors, partial, *_sides(x, groups), chunks),
        **_form(x, shift, groups),
        **_ending(x, silu, tensors[0].ndim == 3),
    )


@_define(f"group_norm_backward({_GIVEN}, Tensor? partial) -> Tensor", lambda g, x, *rest: torch.empty_like(x))
def _(*given: Any) -> None:
    *tensors, groups, silu, partial, output = given
    x, shift, sides = tensors[1], tensors[2], _sides(given[1], groups)
    form = {**_form(x, shift, groups), **_ending(x, silu, tensors[0].ndim == 3)}
    if partial is None:
        _images().group_norm_backward[len(x) * groups,](*tensors, output, *sides, **form)
        return
    chunks = partial.shape[1]
    _images().group_norm_of_chunks_backward[len(x) * groups, chunks](
        *tensors, partial, output, *sides, chunks, **form, TOGETHER=TOGETHER
    )


def _of_rows(width: int) -> dict[str, Any]:
    """Return what is compiled into the kernels of a layer norm."""
    block = max(16, 1 << (width - 1).bit_length())
    return {"BLOCK": block, "num_warps": min(16, max(1, block // 256)), "enable_fp_fusion": True}


def _distance(rows: Tensor) -> int:
    """Return how far the rows of states (..., C) are apart."""
    return rows.flatten(0, -2).stride(0)


def _made_layer_norm(x: Tensor, *_: Any) -> tuple[Tensor, ...]:
    mean = x.new_empty(x.shape[:-1], dtype=torch.float32)
    return x.new_empty(x.shape), mean, torch.empty_like(mean)


@_define(
    "layer_norm(Tensor x, Tensor weight, Tensor bias, float epsilon) -> (Tensor, Tensor, Tensor)",
    _made_layer_norm,
)
def _(x: Tensor, weight: Tensor, bias: Tensor, epsilon: float, *results: Tensor) -> None:
    width = x.shape[-1]
    strides = _distance(x), 0, 0
    _rows().layer_norm[results[1].numel(),](
        x, None, weight, bias, None, *results, width, *strides, epsilon, ADD=False, **_of_rows(width)
    )


@_define(
    "add_layer_norm(Tensor x, Tensor more, Tensor weight, Tensor bias, float epsilon) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    lambda x, *rest: (x.new_empty(x.shape), *_made_layer_norm(x)),
)
def _(x: Tensor, more: Tensor, weight: Tensor, bias: Tensor, epsilon: float, *results: Tensor) -> None:
    _launch_sum(x, more, weight, bias, epsilon, *results)


@_define(
    "add_layer_norm_(Tensor x, Tensor(a!) more, Tensor weight, Tensor bias, float epsilon) "
    "-> (Tensor, Tensor, Tensor)",
    _made_layer_norm,
)
def _(x: Tensor, more: Tensor, weight: Tensor, bias: Tensor, epsilon: float, *results: Tensor) -> None:
    _launch_sum(x, more, weight, bias, epsilon, more, *results)


def _launch_sum(
    x: Tensor, more: Tensor, weight: Tensor, bias: Tensor, epsilon: float, total: Tensor, *results: Tensor
) -> None:
    width, strides = x.shape[-1], map(_distance, (x, more, total))
    _rows().layer_norm[results[1].numel(),](
        *(x, more, weight, bias, total, *results, width, *strides, epsilon), ADD=True, **_of_rows(width)
    )


def _made_with_room(
    g: Tensor, past: Tensor, x: Tensor, weight: Any, mean: Any, rstd: Any, room: int
) -> Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] + room))


@_define(
    "layer_norm_backward(Tensor g, Tensor past, Tensor x, Tensor weight, Tensor mean, Tensor rstd, int room) "
    "-> Tensor",
    _made_with_room,
)
def _(*given: Any) -> None:
    *tensors, _, output = given
    width = given[2].shape[-1]
    strides = map(_distance, (*given[:3], output))
    _rows().layer_norm_backward[given[4].numel(),](
        *tensors,
        output,
        width,
        *strides,
        **_of_rows(width),
    )


@_define("geglu(Tensor both) -> Tensor", lambda both: both.new_empty((*both.shape[:-1], both.shape[-1] // 2)))
def _(both: Tensor, output: Tensor) -> None:
    width = output.shape[-1]
    _rows().geglu[output.numel() // width, -(-width // _PIECE)](both, output, width, **_OF_GATES)


@_define("geglu_backward(Tensor g, Tensor both) -> Tensor", lambda g, both: torch.empty_like(both))
def _(g: Tensor, both: Tensor, output: Tensor) -> None:
    width = g.shape[-1]
    _rows().geglu_backward[g.numel() // width, -(-width // _PIECE)](g, both, output, width, **_OF_GATES)


def _of_gradients(layers: int, rank: int) -> dict[str, Any]:
    """Return what is compiled into the kernel of LoRA's gradients; products have sides of 16 at least."""
    up, down = (max(16, 1 << (size - 1).bit_length()) for size in (rank, layers * rank))
    sides = {"UP_RANK": up, "DOWN_RANK": down, "COLUMNS": _COLUMNS, "ROWS": 64}
    return {"LAYERS": layers, "RANK": rank, **sides}


@_define(
    "lora_gradients(Tensor g, Tensor inner, Tensor of_inner, Tensor x, Tensor(a!) of_up, Tensor(b!) of_down, "
    "int layers, float scale) -> ()",
    lambda *_: None,
)
def _(*given: Any) -> None:
    g, inner, of_inner, x, of_up, of_down, layers, scale, _ = given
    out, rank = of_up.shape[-2:]
    programs = layers * -(-out // _COLUMNS) + -(-x.shape[1] // _COLUMNS)
    _rows().lora_gradients[programs,](
        *(g, inner, of_inner, x, of_up, of_down, len(x), out, x.shape[1]),
        *(part.stride(0) for part in (g, inner, of_inner, x)),
        scale,
        **_of_gradients(layers, rank),
        num_warps=4,
        num_stages=2,
        enable_fp_fusion=True,
    )
