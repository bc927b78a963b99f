"""The base as it is, for the length of one prediction, while an adapter is being trained in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from peft.tuners.tuners_utils import BaseTunerLayer

from ..families.base import DiffusionModel


@contextmanager
def adapters_disabled(model: DiffusionModel) -> Iterator[None]:
    """Take the adapters that learn out of the computation: what the model gives is the base's, bit for bit.

    Only that: strengths, and what requires gradients, stay as they are, which
    :func:`sdlora.adapters.attach.set_strengths` would change.
    """
    layers = [
        layer
        for module in model.components().values()
        for layer in module.modules()
        if isinstance(layer, BaseTunerLayer)
    ]
    # peft's public switch, enable_adapters(False), also takes requires_grad from every adapter, and switching
    # back gives it to all active ones, frozen or not; this attribute is all that its forward asks
    before = [layer._disable_adapters for layer in layers]
    try:
        for layer in layers:
            layer._disable_adapters = True
        yield
    finally:
        for layer, value in zip(layers, before, strict=True):
            layer._disable_adapters = value
