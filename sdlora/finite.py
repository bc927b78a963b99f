"""Whether numbers are finite, asked the cheap way."""

from __future__ import annotations

import torch
from torch import Tensor


def all_finite(tensor: Tensor) -> bool:
    """Return whether a floating-point tensor of any shape holds neither NaN nor infinity.

    Looks at the extremes, which NaN spoils both: one pass and no memory. ``isfinite(tensor).all()`` says
    the same but takes 20 times longer on a CPU: in a bake it was half of all processor time.
    """
    if tensor.numel() == 0:
        return True
    if tensor.device.type != "cpu":  # fast there, and NaN is not left to how each backend finds extremes
        return bool(torch.isfinite(tensor).all())
    return all(bool(end.isfinite()) for end in torch.aminmax(tensor))
