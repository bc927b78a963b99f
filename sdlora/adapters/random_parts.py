"""Ranks and whole layers left out at random while an adapter learns, for each image by itself.

PEFT's own dropout draws for a whole batch from the global generator. Here what is left out for an image
follows from a generator of its own, so that neither its company in a batch nor the number of processes
matters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..families.base import DiffusionModel
from .module_paths import inner_name, module_at
from .trainable_layers import TrainedLayer


class RandomParts:
    """Leaves out parts of a plain LoRA in the denoiser, by hooks on PEFT's layers in train mode.

    What is kept counts 1 / (1 - share) as much, so that on average the update is the whole one that drawing
    uses.

    Args:
        model: holds the adapter.
        name: of the adapter.
        layers: of it.
        rank_share: of the ranks of a layer that is left out.
        module_share: of the layers that is left out.
    """

    def __init__(
        self,
        model: DiffusionModel,
        name: str,
        layers: Sequence[TrainedLayer],
        *,
        rank_share: float,
        module_share: float,
    ) -> None:
        self._rank_share, self._module_share = rank_share, module_share
        self._device = model.facts.device
        self._kept: Tensor | None = None
        self._count = 0
        for layer in layers:
            if layer.key.component == model.info.denoiser.component:
                parts: Any = module_at(model, layer.key)
                rank = layer.update.rank
                factor = self._hook(self._count, rank)
                parts.lora_A[inner_name(name)].register_forward_hook(factor)
                self._count += rank + 1

    def draw(self, generators: Sequence[torch.Generator], *, times: int = 1) -> None:
        """Draw what is left out until the next call.

        Args:
            generators: a CPU generator for each of the B images of a batch.
            times: how often the batch comes after itself in what the denoiser is given.
        """
        drawn = torch.stack([torch.rand(self._count, generator=generator) for generator in generators])
        self._kept = drawn.repeat(times, 1).to(self._device)  # (times * B, count)

    def _hook(self, start: int, rank: int) -> Callable[[nn.Module, Any, Tensor], Tensor | None]:
        """Return the hook of a layer whose numbers begin at ``start``: one a rank, and one for the whole."""

        def leave_out(module: nn.Module, inputs: Any, output: Tensor) -> Tensor | None:
            if self._kept is None or not module.training:
                return None
            ranks = self._kept[:, start : start + rank] >= self._rank_share  # (B, rank)
            whole = self._kept[:, start + rank, None] >= self._module_share  # (B, 1)
            scale = 1.0 / ((1.0 - self._rank_share) * (1.0 - self._module_share))
            factor = (ranks & whole).to(output.dtype) * scale
            spatial = isinstance(module, nn.Conv2d)
            ones = [1] * (output.ndim - 2)
            return output * factor.view(len(factor), *(rank, *ones) if spatial else (*ones, rank))

        return leave_out
