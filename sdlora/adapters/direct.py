"""Plain LoRA layers that learn, computed by functions of our own: few kernels, gradients where they belong.

PEFT's layer takes 14 kernels forward and backward (base, A, B, scale, add; the same backward and two
gradients that are added to others). Here the update is added into the base's output, the scale is part of the
copy of B that is computed with, and the gradients of A and B are added straight into the buffer that the
masters collect from: 8 kernels, and nothing is kept for the backward pass that PEFT would not keep. PEFT's
layer stays where it is, with its names and parameters; only its forward pass is taken over, and given back.
It is the reference: both agree but for rounding (``tests/adapters/test_direct.py``).

``y = W x + b + (s B) A x``; for a convolution A has the base's kernel and B is 1x1. With ``g`` the gradient
of y: ``dB = s g (A x)^T``, ``dA = (s B)^T g x^T``, ``dx = W^T g + A^T (s B)^T g``.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from ..families.base import DiffusionModel
from ..families.kernels import add_lora_gradients
from ..families.lean_blocks import with_room
from ..families.quantised import QuantisedLinear
from .canonical import LowRankPair
from .module_paths import module_at
from .peft_library import LoraLayer
from .trainable_layers import TrainedLayer


@dataclass(frozen=True)
class Factors:
    """The two factors of one layer or of several that are computed as one, in the layers' number format.

    Attributes:
        down: A, ([n,] rank, in[, kh, kw]).
        up: ``scale * B``, ([n,] out, rank[, 1, 1]).
        scale: ``alpha / rank`` of each of them.
        rows: the base's weight with A below it in one piece, (out + rank, in), if they lie so.
        kernels: whether both gradients are computed by one kernel of our own.
    """

    down: Tensor
    up: Tensor
    scale: float
    rows: Tensor | None = None
    kernels: bool = False


@dataclass
class Gradients:
    """Where the gradients of :class:`Factors` are added, in the same shapes; those of B without the scale."""

    down: Tensor
    up: Tensor


@dataclass(eq=False)
class DirectLayer:
    """One adapted layer: PEFT's, its parameters, and what is computed with.

    Attributes:
        peft: PEFT's layer around the base's own.
        down: its A.
        up: its B.
        scale: alpha / rank.
        factors: what its own forward pass computes with; None while it is computed with others.
        gradients: of those factors, one a part of the batch.
    """

    peft: LoraLayer
    down: nn.Parameter
    up: nn.Parameter
    scale: float
    factors: Factors | None = None
    gradients: list[Gradients] = field(default_factory=list)

    @property
    def base(self) -> Any:
        """The base's own layer."""
        return self.peft.get_base_layer()

    @property
    def acts(self) -> bool:
        """Whether the adapter is part of the computation."""
        return not self.peft._disable_adapters


class Part(threading.local):
    """Which part of the batch this thread computes; each part has gradients of its own."""

    index = 0


@dataclass
class Anchors:
    """What all functions share.

    Attributes:
        leaf: a number that requires a gradient and gets none, so that torch makes a graph.
        part: of the batch.
    """

    leaf: Tensor
    part: Part = field(default_factory=Part)

    @contextmanager
    def computing(self, index: int) -> Iterator[None]:
        """Have this thread's forward passes belong to a part of the batch."""
        before, self.part.index = self.part.index, index
        try:
            yield
        finally:
            self.part.index = before


class DirectLinear(torch.autograd.Function):
    """Of a linear layer; the gradients of the factors are added where they belong, not returned."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, _: Tensor, base: nn.Linear, factors: Factors, sink: Gradients) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])  # (N, in)
        output = functional.linear(flat, base.weight, base.bias)
        inner = flat @ factors.down.t()  # (N, rank)
        output.addmm_(inner, factors.up.t())
        ctx.save_for_backward(flat, inner)
        ctx.base, ctx.factors, ctx.sink, ctx.shape = base, factors, sink, x.shape
        return output.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        flat, inner = ctx.saved_tensors
        factors: Factors = ctx.factors
        gradient = gradient.reshape(-1, gradient.shape[-1])  # (N, out)
        both = None if factors.rows is None else with_room(gradient, factors.down.shape[0])
        if both is None:
            of_inner = gradient @ factors.up  # (N, rank)
        else:
            of_inner = torch.mm(gradient, factors.up, out=both[:, gradient.shape[1] :])
        sink: Gradients = ctx.sink
        if factors.kernels:
            add_lora_gradients(gradient, inner, of_inner, flat, sink.up, sink.down, factors.scale)
        else:
            sink.up.addmm_(gradient.t(), inner, alpha=factors.scale)
            sink.down.addmm_(of_inner.t(), flat)
        if not ctx.needs_input_grad[0]:
            return None, None, None, None, None
        if both is None:
            of_input = (gradient @ ctx.base.weight).addmm_(of_inner, factors.down)
        else:
            assert factors.rows is not None
            of_input = both @ factors.rows  # g W + (g s B) A
        return of_input.view(ctx.shape), None, None, None, None


class DirectConvolution(torch.autograd.Function):
    """The same of a 2-D convolution."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, _: Tensor, base: nn.Conv2d, factors: Factors, sink: Gradients) -> Tensor:
        output = base._conv_forward(x, base.weight, base.bias)  # (B, out, h, w)
        inner = base._conv_forward(x, factors.down, None)  # (B, rank, h, w)
        up = factors.up.flatten(1)  # (out, rank)
        rows, columns = _rows(output), _rows(inner)
        if rows is not None and columns is not None:
            rows.addmm_(columns, up.t())
        else:
            output = output + functional.conv2d(inner, factors.up)
        ctx.save_for_backward(x, inner)
        ctx.base, ctx.factors, ctx.sink = base, factors, sink
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        x, inner = ctx.saved_tensors
        factors, base, needed = ctx.factors, ctx.base, bool(ctx.needs_input_grad[0])
        of_inner, of_up, _ = _convolution_backward(gradient, inner, factors.up, None, (True, True))
        ctx.sink.up.add_(of_up, alpha=factors.scale)
        of_input, of_down, _ = _convolution_backward(of_inner, x, factors.down, base, (needed, True))
        ctx.sink.down.add_(of_down)
        if not needed:
            return None, None, None, None, None
        through_base, _, _ = _convolution_backward(gradient, x, base.weight, base, (True, False))
        return through_base.add_(of_input), None, None, None, None


def _rows(images: Tensor) -> Tensor | None:
    """Return (B, C, h, w) as a matrix with a row for each pixel (B h w, C), if it can share the memory."""
    pixels = images.permute(0, 2, 3, 1)
    return pixels.view(-1, images.shape[1]) if pixels.is_contiguous() else None


def _convolution_backward(
    gradient: Tensor, x: Tensor, weight: Tensor, like: nn.Conv2d | None, wanted: tuple[bool, bool]
) -> Any:
    """Return (gradient of x, of the weight, None) of a convolution like a layer's, or of a 1x1 one."""
    stride, padding, dilation = ((1, 1), (0, 0), (1, 1)) if like is None else _settings(like)
    return torch.ops.aten.convolution_backward(
        *(gradient, x, weight, None, stride, padding, dilation, False, (0, 0), 1, (*wanted, False))
    )


def _settings(layer: nn.Conv2d) -> tuple[Any, Any, Any]:
    return layer.stride, layer.padding, layer.dilation


class DirectForward:
    """The forward pass of one of PEFT's layers, to be set on it as ``forward``."""

    def __init__(self, layer: DirectLayer, anchors: Anchors) -> None:
        self._peft = weakref.ref(layer.peft)  # it holds this object
        self._base, self._anchors, self._layer = layer.base, anchors, weakref.ref(layer)
        self._function = DirectLinear if isinstance(layer.base, nn.Linear) else DirectConvolution

    def __call__(self, x: Tensor) -> Tensor:
        """Return the layer's output, (..., in) to (..., out) or (B, in, h, w) to (B, out, h', w')."""
        layer = self._layer()
        assert layer is not None
        if not layer.acts:
            return self._base(x)
        assert layer.factors is not None
        return self._function.apply(
            x, self._anchors.leaf, self._base, layer.factors, layer.gradients[self._anchors.part.index]
        )


def can_be_direct(model: DiffusionModel, layers: Sequence[TrainedLayer]) -> bool:
    """Tell whether all layers are plain LoRA over linear layers or usual convolutions."""
    return bool(layers) and all(
        isinstance(layer.update, LowRankPair) and _is_usual(module_at(model, layer.key)) for layer in layers
    )


def _is_usual(peft: Any) -> bool:
    if not isinstance(peft, LoraLayer) or len(peft.lora_A) != 1 or peft.merged:
        return False
    base: Any = peft.get_base_layer()
    # whoever changes what PEFT's parts put out does so by hooks on them, which would not be asked
    hooked = any(module._forward_hooks or module._forward_pre_hooks for module in peft.modules())
    dropouts = not hooked and all(isinstance(dropout, nn.Identity) for dropout in peft.lora_dropout.values())
    conv = isinstance(base, nn.Conv2d) and base.groups == 1 and base.padding_mode == "zeros"
    return dropouts and not peft.lora_variant and (type(base) in (nn.Linear, QuantisedLinear) or conv)
