"""What a base is computed with: chosen once for training or drawing, and set in torch."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..config.schema import AttentionName, Precision
from ..devices import choose_device, choose_dtype, make_current, set_exactness
from ..machine import idle_card_notice
from .attention import Attentions, choose_attentions


@dataclass(frozen=True)
class Compute:
    """What a base is computed with.

    Attributes:
        device: where it computes.
        dtype: number format of the frozen base.
        attention: which attention kernels.
        idle_card: a notice, if there is a card that torch cannot use and none was asked for.
    """

    device: torch.device
    dtype: torch.dtype
    attention: Attentions
    idle_card: str | None = None

    @classmethod
    def choose(
        cls,
        device: str | torch.device | None = None,
        precision: Precision | None = None,
        attention: AttentionName = "auto",
    ) -> Compute:
        """Return what is asked for, or else the fastest on this machine, and have torch use it.

        Args:
            device: a setting, see :func:`sdlora.devices.choose_device`, or an already chosen device.
            precision: see :func:`sdlora.devices.choose_dtype`.
            attention: see :func:`sdlora.families.attention.choose_attention`.

        Raises:
            ConfigError: for a device, format or attention that this machine does not have.
        """
        chosen = device if isinstance(device, torch.device) else choose_device(device)
        make_current(chosen)
        dtype = choose_dtype(precision, chosen)
        set_exactness(chosen, dtype)
        idle = idle_card_notice() if device is None and chosen.type == "cpu" else None
        return cls(chosen, dtype, choose_attentions(attention, chosen, dtype), idle)
