"""Which attention a U-Net computes with: chosen once for a device and number format, with the reason.

All choices compute softmax(q k^T / sqrt(d)) v; they differ by rounding, speed and memory.
"""

from __future__ import annotations

import importlib
import importlib.util
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ..config.schema import AttentionName
from ..errors import ConfigError


@dataclass(frozen=True)
class Attention:
    """A chosen attention.

    Attributes:
        name: ``sdpa``, ``xformers`` or ``classic``.
        reason: why, for people.
    """

    name: Literal["sdpa", "xformers", "classic"]
    reason: str

    def apply(self, unet: Any) -> None:
        """Make a diffusers U-Net compute its attention this way."""
        from diffusers.models.attention_processor import (
            AttnProcessor,
            AttnProcessor2_0,
            XFormersAttnProcessor,
        )

        processors = {"sdpa": AttnProcessor2_0, "xformers": XFormersAttnProcessor, "classic": AttnProcessor}
        unet.set_attn_processor(processors[self.name]())


@dataclass(frozen=True)
class Attentions:
    """The attention a U-Net uses in training, and in drawing."""

    training: Attention
    drawing: Attention


def choose_attentions(setting: AttentionName, device: torch.device, dtype: torch.dtype) -> Attentions:
    """Return what :func:`choose_attention` chooses for training and for drawing."""
    training, drawing = (choose_attention(setting, device, dtype, training=both) for both in (True, False))
    return Attentions(training, drawing)


def choose_attention(
    setting: AttentionName, device: torch.device, dtype: torch.dtype, *, training: bool
) -> Attention:
    """Return the attention asked for, or else the fastest one for what comes next.

    Raises:
        ConfigError: for xformers where it is not installed or cannot run.
    """
    if setting == "xformers":
        _check_xformers(device)
        return Attention("xformers", "asked for")
    if setting == "sdpa":
        return Attention("sdpa", "asked for")
    # Measured on 2 AMX cores: the backward pass of torch's fused attention in bf16 takes 37 % of a step; the
    # classic bmm-softmax-bmm makes training 1.7x faster. The forward pass alone is as fast fused.
    if device.type == "cpu" and dtype == torch.bfloat16 and training:
        return Attention("classic", "torch's fused attention is slow backwards in bf16 on a CPU")
    return Attention("sdpa", f"torch's own fused attention is the fastest general one on {device.type}")


def without_more_memory(name: str, device: torch.device) -> list[Literal["sdpa", "xformers", "classic"]]:
    """Return the other ways to compute attention that take no more memory than this one, and run here."""
    names: list[Literal["sdpa", "xformers", "classic"]] = []
    if name != "sdpa":
        names.append("sdpa")
    if name != "xformers" and device.type == "cuda":
        with suppress(ConfigError):
            _check_xformers(device)
            names.append("xformers")
    return names


def _check_xformers(device: torch.device) -> None:
    if device.type != "cuda":
        raise ConfigError(
            f"`attention=xformers`: xformers computes on NVIDIA cards only, not on {device.type}; use sdpa"
        )
    if importlib.util.find_spec("xformers") is None:
        raise ConfigError(
            '`attention=xformers`: xformers is not installed; pip install "sdlora[xformers]", or use sdpa'
        )
    try:
        importlib.import_module("xformers.ops")
    except Exception as error:  # mostly one built for another torch or CUDA
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"`attention=xformers`: the xformers installed here cannot be loaded ({reason}); install the one "
            "made for this torch, or use sdpa"
        ) from error
