"""Frozen layers whose weights are read again in the backward pass: nothing but the layer is kept for it.

So a weight may be made anew (a quantised one) or be elsewhere in between (an offloaded one).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor, nn


class FrozenLinear(torch.autograd.Function):
    """A linear layer, (..., in) to (..., out), without gradients of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: nn.Linear) -> Tensor:
        ctx.layer = layer
        return functional.linear(x, layer.weight, layer.bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ ctx.layer.weight, None


class FrozenConvolution(torch.autograd.Function):
    """A 2-D convolution, (B, in, h, w) to (B, out, h', w'), without gradients of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: nn.Conv2d) -> Tensor:
        ctx.layer, ctx.shape = layer, x.shape
        return layer._conv_forward(x, layer.weight, layer.bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        layer: nn.Conv2d = ctx.layer
        # the gradient of the input does not depend on its values: this has its shape and takes no memory
        x = gradient.new_empty(1).expand(ctx.shape)
        of_input, _, _ = torch.ops.aten.convolution_backward(
            *(gradient, x, layer.weight, None, layer.stride, layer.padding, layer.dilation),
            *(False, (0, 0), layer.groups, (True, False, False)),
        )
        return of_input, None
