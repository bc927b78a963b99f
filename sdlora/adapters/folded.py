"""An adapter folded into a base's weights for a while, the model being otherwise as it is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from ..families.base import DiffusionModel
from ..families.quantised import QuantisedLayer
from .attach import adapters_disabled
from .canonical import AdapterWeights, ModuleKey, Update
from .hooks import acting_update
from .module_paths import base_parameter, module_at, without_adapters

_NAME = "folded"


@contextmanager
def folded(model: DiffusionModel, weights: AdapterWeights, strength: float) -> Iterator[None]:
    """Have the model compute as its base with an adapter at a strength; those attached do not act.

    So a run can show its adapter at any strength, whatever its kind, without touching what learns. The base's
    weights are kept in main memory and put back bit for bit; beside a quantised weight, which cannot be
    changed, the update acts by itself. Strength 0 is the base alone.

    Args:
        model: its attached adapters keep their strengths and ``requires_grad``.
        weights: the adapter, on any device.
        strength: factor on its updates.
    """
    originals: dict[ModuleKey, Tensor] = {}
    try:
        with adapters_disabled(model), ExitStack() as hooked:
            if strength != 0.0:
                for key, update in sorted(weights.updates.items(), key=lambda pair: pair[0]):
                    layer = without_adapters(module_at(model, key))
                    if isinstance(layer, QuantisedLayer) and not key.is_bias:
                        hooked.enter_context(acting_update(layer, _NAME, update, strength))
                    else:
                        _add(model, key, update.on(base_parameter(model, key).device), strength, originals)
            yield
    finally:
        with torch.no_grad():
            for key, original in originals.items():
                base_parameter(model, key).copy_(original)


@torch.no_grad()
def _add(
    model: DiffusionModel, key: ModuleKey, update: Update, strength: float, originals: dict[ModuleKey, Tensor]
) -> None:
    """Add ``strength`` times an update to a weight, which is kept first."""
    weight = base_parameter(model, key)
    originals[key] = weight.detach().to("cpu", copy=True)
    before = weight.detach().float()
    weight.copy_(before + strength * update.delta(before))  # rounded to the weight's format once
