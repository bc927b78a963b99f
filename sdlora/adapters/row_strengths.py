"""Adapters at strengths of their own for each row of a batch: the columns of a sweep drawn together.

A layer's update is computed once, as at strength 1, and each row of it multiplied by the row's own strength.
Only the denoiser's layers are covered: prompts are encoded one by one anyway.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..families.base import DiffusionModel
from .attach import set_strengths
from .hooks import all_hooks
from .module_paths import inner_name
from .peft_library import LoraLayer
from .strength import Strength, strength_of


class RowStrengths:
    """The strengths of adapters by row, while :meth:`acting`.

    Args:
        model: holds the adapters.
        rows: of each row of the denoiser's batch, the strength of each adapter.
    """

    def __init__(self, model: DiffusionModel, rows: Sequence[Mapping[str, Strength]]) -> None:
        self._model = model
        component = model.info.denoiser.component
        self._denoiser = model.components()[component]
        names = dict.fromkeys(name for row in rows for name in row)
        self._factors = {
            name: torch.tensor([strength_of(row.get(name, 0.0), component) for row in rows]) for name in names
        }
        self._factors = {name: row.to(model.facts.device) for name, row in self._factors.items() if row.any()}

    @contextmanager
    def acting(self) -> Iterator[None]:
        """Let the adapters act so in the denoiser; afterwards none acts."""
        handles = []
        inner = {inner_name(name): factors for name, factors in self._factors.items()}
        try:
            set_strengths(self._model, dict.fromkeys(self._factors, 1.0))
            for module in self._denoiser.modules():
                if isinstance(module, LoraLayer):
                    for name in inner.keys() & module.lora_B.keys():
                        handles.append(module.lora_B[name].register_forward_hook(self._scaled(inner[name])))
            for _, _, hook in all_hooks(self._denoiser):
                hook.by_row = {name: self._by_row(factors) for name, factors in inner.items()}
            yield
        finally:
            for handle in handles:
                handle.remove()
            for _, _, hook in all_hooks(self._denoiser):
                hook.by_row = {}
            set_strengths(self._model, {})

    def _scaled(self, factors: Tensor) -> Any:
        by_row = self._by_row(factors)

        def scale(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            return by_row(output)

        return scale

    def _by_row(self, factors: Tensor) -> Any:
        """Return what multiplies each row of an update (B, ...) by its factor, rounding once."""

        def scaled(update: Tensor) -> Tensor:
            return (update * factors.view(-1, *[1] * (update.ndim - 1))).to(update.dtype)

        return scaled
