"""The lean forward passes for drawing: what is the same in all calls for an image is computed once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from .lean import is_lean, make_lean, undo_lean


@contextmanager
def drawing_lean(denoiser: nn.Module) -> Iterator[None]:
    """Have a denoiser compute with the lean forward passes for a while: the same results, bit for bit.

    Keys and values of the text are kept as long as it is the same tensor, so adapters must keep their
    strengths meanwhile. Where lean passes are in place already, nothing changes.
    """
    if is_lean(denoiser):
        yield
        return
    for attention in make_lean(denoiser):
        attention.remembers_text = True
    try:
        yield
    finally:
        undo_lean(denoiser)
