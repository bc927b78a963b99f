"""A frozen denoiser whose weights are kept in 8 or 4 bits, and computed with in the run's number format.

``fp8``: e4m3 with one fp32 scale for each output row, so that the largest value of a row is 448. ``nf4``: the
16 levels of QLoRA (Dettmers et al. 2023), with one fp32 scale for each 64 values in a row of memory; only
linear layers are in 4 bits then, and convolutions in fp8. A layer makes the full weight when it needs it, in
the forward pass and again in the backward pass, and drops it: what is alive at once is the quantised base and
the weight of one layer. No multiplication in 8 bits is needed, so this works on every card.

The layers stay subclasses of torch's, which PEFT and all kinds of adapters know; ``layer.weight`` is made at
each access, and writing to it changes nothing (:func:`refuse_to_change`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from ..config.schema import Quantisation
from ..errors import ConfigError
from .frozen_layers import FrozenConvolution, FrozenLinear
from .nf4 import NF4_BLOCK, decode_nf4, encode_nf4

FP8 = torch.float8_e4m3fn
FP8_LARGEST = 448.0
WITHOUT_FP8 = ("mps",)  # Metal has no such number format: codes are looked up there
_LEAST = 2**8  # values; a smaller layer saves nothing that is worth an error
# what reads and writes the latents, what says how much noise there is and which size the image has, and what
# leads into and out of transformer blocks or past residual blocks: few weights that every value of the result
# passes through. Of the error of nf4 on the mini base these last, 5 % of its weights, made more than half
_KEPT_WHOLE = ("conv_in", "conv_out", "time_proj", "time_embedding", "add_embedding", "class_embedding")
_KEPT_WHOLE_ENDINGS = ("time_emb_proj", "proj_in", "proj_out", "conv_shortcut")


def encode_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the codes (uint8, in the weight's shape) and scales (out, 1, ...), float32, of a weight.

    Args:
        weight: (out, ...), of any float format.
    """
    rows = weight.float()
    largest = rows.flatten(1).abs().amax(1)
    scales = (largest / FP8_LARGEST).clamp_min(torch.finfo(torch.float32).tiny)
    scales = scales.view(-1, *[1] * (weight.ndim - 1))
    return (rows / scales).to(FP8).view(torch.uint8), scales


def decode_fp8(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the weight: ``code * scale`` rounded once to ``dtype``; codes are exact in every format."""
    if codes.device.type in WITHOUT_FP8:
        table = fp8_values().to(codes.device, dtype)
        return functional.embedding(codes.int(), table[:, None])[..., 0].mul_(scales)
    return codes.view(FP8).to(dtype).mul_(scales)


def fp8_values() -> Tensor:
    """Return the number that each of the 256 codes stands for, float32."""
    return torch.arange(256, dtype=torch.uint8, device="cpu").view(FP8).float()


@dataclass(frozen=True)
class Quantising:
    """How a base is quantised while it is read.

    Attributes:
        format: that its large weights are kept in.
        device: where each is quantised, wherever it is kept then: a card does that at once.
    """

    format: Quantisation
    device: torch.device


class QuantisedLayer(nn.Module):
    """What quantised layers share; made by :func:`quantise`.

    Attributes:
        quantisation: the format of the codes.
        codes: uint8; in the weight's shape (fp8), or two values a byte (nf4).
        scales: float32.
    """

    quantisation: Quantisation
    codes: Tensor
    scales: Tensor
    _shape: torch.Size
    _dtype: torch.dtype
    _memory_format: torch.memory_format

    @property
    def weight(self) -> Tensor:
        """The full weight, made anew at each access, in the layout that was last set."""
        if self.quantisation == "fp8":
            return decode_fp8(self.codes, self.scales, self._dtype)
        weight = decode_nf4(self.codes, self.scales, self._shape, self._dtype)
        return weight.to(memory_format=self._memory_format) if weight.ndim == 4 else weight

    def set_memory_format(self, memory_format: torch.memory_format) -> None:
        """Have a convolution's weight made in this layout from now on."""
        self._memory_format = memory_format
        if self.quantisation == "fp8":
            self.codes = self.codes.to(memory_format=memory_format)

    def take(self, weight: Tensor, device: torch.device) -> None:
        """Quantise a weight where it lies, and keep the result on a device."""
        weight = weight.cpu() if weight.device.type in WITHOUT_FP8 else weight
        codes, scales = encode_fp8(weight) if self.quantisation == "fp8" else encode_nf4(weight)
        self.codes, self.scales = codes.to(device), scales.to(device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move or convert the layer: another number format is that of the full weight, not of its parts."""
        scales = self.scales
        super()._apply(fn, recurse)
        if self.scales.dtype != scales.dtype:
            self._dtype = self.scales.dtype
            self.scales = scales.to(self.scales.device)
        return self

    def become(self, quantisation: Quantisation, dtype: torch.dtype) -> None:
        """Give up the full weight for empty codes of its shape."""
        weight = self._parameters.pop("weight")
        assert weight is not None
        self.quantisation, self._shape, self._dtype = quantisation, weight.shape, dtype
        self._memory_format = torch.contiguous_format
        if quantisation == "fp8":
            codes, scales = weight.shape, (weight.shape[0], *[1] * (weight.ndim - 1))
        else:
            blocks = -(-weight.numel() // NF4_BLOCK)
            codes, scales = torch.Size([blocks * NF4_BLOCK // 2]), (blocks,)
        device = weight.device
        self.register_buffer("codes", torch.empty(codes, dtype=torch.uint8, device=device))
        self.register_buffer("scales", torch.empty(scales, dtype=torch.float32, device=device))


class QuantisedLinear(QuantisedLayer, nn.Linear):  # type: ignore[override]  # weight cannot be set
    """A frozen linear layer with its weight in 8 or 4 bits."""

    def forward(self, input: Tensor) -> Tensor:
        """Return what the layer with the full weight would, (..., in) to (..., out)."""
        output: Tensor = FrozenLinear.apply(input, self)
        return output


class QuantisedConv2d(QuantisedLayer, nn.Conv2d):  # type: ignore[override]
    """A frozen 2-D convolution with its weight in 8 or 4 bits."""

    def __new__(cls, *arguments: Any, **options: Any) -> Any:
        """Make an ordinary convolution: PEFT makes A and B as ``type(base_layer)(...)``."""
        return nn.Conv2d(*arguments, **options)

    def forward(self, input: Tensor) -> Tensor:
        """Return what the layer with the full weight would, (B, in, h, w) to (B, out, h', w')."""
        output: Tensor = FrozenConvolution.apply(input, self)
        return output


_QUANTISED: dict[type[nn.Module], type[QuantisedLayer]] = {
    nn.Linear: QuantisedLinear,
    nn.Conv2d: QuantisedConv2d,
}


def quantise(model: nn.Module, quantisation: Quantisation, dtype: torch.dtype) -> None:
    """Have a model's large linear layers and convolutions give up their weights for codes.

    Each layer stays the object that it is. The codes are empty: :meth:`QuantisedLayer.take` fills them. So a
    model made on the meta device never has its full weights anywhere.

    Args:
        model: a frozen denoiser.
        quantisation: the format of the codes of linear layers; convolutions are in 8 bits in any case.
        dtype: number format that is computed in.
    """
    for name, layer in model.named_modules():
        kind = _QUANTISED.get(type(layer))
        if kind is not None and _is_worth_it(name, layer):
            layer.__class__ = kind
            assert isinstance(layer, QuantisedLayer)
            layer.become("fp8" if kind is QuantisedConv2d else quantisation, dtype)


def _is_worth_it(name: str, layer: Any) -> bool:
    first, *_ = name.split(".")
    usual = not isinstance(layer, nn.Conv2d) or (
        layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    )
    kept = first in _KEPT_WHOLE or name.endswith(_KEPT_WHOLE_ENDINGS)
    return usual and not kept and layer.weight.numel() >= _LEAST


def quantisation_of(model: nn.Module) -> Quantisation | None:
    """Return the format that a model was quantised to, None for whole weights."""
    formats = {layer.quantisation for layer in model.modules() if isinstance(layer, QuantisedLayer)}
    return "nf4" if "nf4" in formats else next(iter(formats), None)


def refuse_to_change(layer: nn.Module, path: str) -> None:
    """Refuse to change the weight of a layer that has only codes of it.

    Raises:
        ConfigError: saying what can be done instead.
    """
    if isinstance(layer, QuantisedLayer):
        raise ConfigError(
            f"{path}: this base is kept in {layer.quantisation}, so nothing can be merged into it; load it "
            "in full (training.base_format=full), or bake the adapter into the base's file: sdlora bake"
        )
