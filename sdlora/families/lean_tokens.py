"""Images to tokens and back, around the blocks of a transformer, without copies of their own."""

from __future__ import annotations

import weakref
from typing import Any

import torch.nn.functional as functional
from torch import Tensor, nn

from .kernels import is_usual_norm, tokens_norm


class LeanTokens:
    """What goes before and after the blocks of one of diffusers' ``Transformer2DModel``, by our own kernels.

    To be set on it in place of its two methods for that. Images become tokens in the kernel of their norm,
    and images again in the sum with what went past. A 1x1 convolution is a product of the tokens then.
    """

    enters, leaves = "_operate_on_continuous_inputs", "_get_output_for_continuous_inputs"

    def __init__(self, module: Any) -> None:
        self._module = weakref.ref(module)  # it holds this object

    @classmethod
    def can_be(cls, module: Any) -> bool:
        """Tell whether a module has these methods, and does by them what is known here."""
        return (
            all(hasattr(type(module), name) for name in (cls.enters, cls.leaves))
            and bool(module.is_input_continuous)
            and is_usual_norm(module.norm)
            and (module.use_linear_projection or all(map(_is_product, (module.proj_in, module.proj_out))))
        )

    def put_in_place(self) -> None:
        """Take over both methods."""
        module: Any = self._module()
        setattr(module, self.enters, self._entered)
        setattr(module, self.leaves, self._left)

    @classmethod
    def take_out(cls, module: nn.Module) -> None:
        """Give both methods back, if they were taken."""
        for name in (cls.enters, cls.leaves):
            module.__dict__.pop(name, None)

    def _entered(self, hidden_states: Tensor) -> tuple[Tensor, int]:
        """Return the tokens (B, h w, C') of images (B, C, h, w), projected, and C'."""
        module: Any = self._module()
        tokens = _projected(module.proj_in, tokens_norm(hidden_states, module.norm))
        return tokens, tokens.shape[-1]

    def _left(self, hidden_states: Tensor, residual: Tensor, *, height: int, width: int, **_: int) -> Tensor:
        """Return the images (B, C, h, w) of tokens (B, h w, C'), projected, plus those that went past."""
        module: Any = self._module()
        tokens = _projected(module.proj_out, hidden_states)
        return residual + tokens.transpose(1, 2).unflatten(2, (height, width))


def _is_product(layer: nn.Module) -> bool:
    """Tell whether a layer is a convolution that multiplies each pixel by a matrix, and learns nothing."""
    return (
        type(layer) is nn.Conv2d
        and (layer.kernel_size, layer.stride, layer.padding, layer.groups) == ((1, 1), (1, 1), (0, 0), 1)
        and not layer.weight.requires_grad
        and "forward" not in layer.__dict__  # as that of one whose weight is elsewhere in between
    )


def _projected(layer: Any, tokens: Tensor) -> Tensor:
    if type(layer) is nn.Conv2d:
        return functional.linear(tokens, layer.weight.flatten(1), layer.bias)
    output: Tensor = layer(tokens)
    return output
