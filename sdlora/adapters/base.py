"""The canonical adapter: what every file format, merge and injection works on.

``dW = (alpha / rank) * up @ down`` with W frozen (Hu et al. 2022, section 4.1). A module is named by its
component (``unet``, ``text_encoder``, ``text_encoder_2``) and its path in diffusers/transformers terms;
text-encoder paths always start with ``text_model.``, whatever the installed transformers calls them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

COMPONENTS = ("unet", "text_encoder", "text_encoder_2")


class ModuleKey(NamedTuple):
    """One adapted layer: the component it sits in and its module path there."""

    component: str
    path: str


@dataclass(frozen=True)
class LowRankPair:
    """The two factors of one layer's update.

    Attributes:
        down: (rank, in) for a linear layer, (rank, in, kh, kw) for a convolution.
        up: (out, rank) for a linear layer, (out, rank, 1, 1) for a convolution.
        alpha: numerator of the scale alpha / rank; never implied.
    """

    down: Tensor
    up: Tensor
    alpha: float

    def __post_init__(self) -> None:
        rank_up = self.up.shape[1] if self.up.ndim >= 2 else None
        if self.down.ndim not in (2, 4) or self.up.ndim != self.down.ndim or rank_up != self.down.shape[0]:
            raise ValueError(f"factors do not fit: down {tuple(self.down.shape)}, up {tuple(self.up.shape)}")
        if self.up.ndim == 4 and tuple(self.up.shape[2:]) != (1, 1):
            raise ValueError(f"up of a convolution must end in 1x1, not {tuple(self.up.shape)}")
        if not math.isfinite(self.alpha):
            raise ValueError(f"alpha must be finite, not {self.alpha}")

    @property
    def rank(self) -> int:
        """Number of rows of ``down``."""
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return self.alpha / self.rank

    def delta(self) -> Tensor:
        """Return dW in the shape of the layer's weight, computed in float32 (float64 stays)."""
        dtype = torch.promote_types(torch.float32, self.down.dtype)
        down = self.down.to(dtype).flatten(1)
        up = self.up.to(dtype).flatten(1)
        return ((up @ down) * self.scale).reshape(self.up.shape[0], *self.down.shape[1:])

    def to(self, dtype: torch.dtype) -> LowRankPair:
        """Return the pair with both factors in another number format."""
        return LowRankPair(self.down.to(dtype), self.up.to(dtype), self.alpha)


@dataclass(frozen=True)
class AdapterWeights:
    """All updates of one adapter, by module."""

    pairs: Mapping[ModuleKey, LowRankPair]

    def __len__(self) -> int:
        return len(self.pairs)

    def items(self) -> Iterator[tuple[ModuleKey, LowRankPair]]:
        """Yield (module, pair) in sorted order, so that files do not depend on build order."""
        for key in sorted(self.pairs):
            yield key, self.pairs[key]

    def component(self, name: str) -> dict[str, LowRankPair]:
        """Return {module path: pair} of one component."""
        return {key.path: pair for key, pair in self.items() if key.component == name}

    def components(self) -> list[str]:
        """Return the components with at least one adapted module, in canonical order."""
        present = {key.component for key in self.pairs}
        return [name for name in COMPONENTS if name in present]

    def to(self, dtype: torch.dtype) -> AdapterWeights:
        """Return the adapter with all factors in another number format."""
        return AdapterWeights({key: pair.to(dtype) for key, pair in self.items()})

    def ranks(self) -> list[int]:
        """Return the distinct ranks, ascending."""
        return sorted({pair.rank for pair in self.pairs.values()})


@dataclass(frozen=True)
class AdapterInfo:
    """What is known about an adapter besides its numbers.

    Attributes:
        family: name of the model family, e.g. ``sd1``.
        name: what prompts call it.
        trigger_words: words that call the style.
        metadata: all text entries of the file's header, as read or as to be written.
    """

    family: str | None = None
    name: str = ""
    trigger_words: tuple[str, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class AdapterFile:
    """An adapter with its info: what every format reads and writes."""

    weights: AdapterWeights
    info: AdapterInfo = AdapterInfo()
