"""The canonical adapter: what every file format, merge and injection works on.

A module is named by its component (``unet``, ``text_encoder``, ...; :mod:`sdlora.families.facts`) and its
path in diffusers/transformers terms; text-encoder paths always start with ``text_model.``, whatever the
installed transformers calls them. Each adapted module has one :class:`Update`. The plain one is the
low-rank pair, ``dW = (alpha / rank) * up @ down`` with W frozen (Hu et al. 2022, section 4.1); the others
are in ``adapters/kinds/``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from ..errors import AdapterFileError
from ..families.facts import component_order

_BIAS = ".bias"


class ModuleKey(NamedTuple):
    """One adapted layer: the component it sits in and its module path there.

    A path that ends in ``.bias`` is the bias of the layer before it, else the layer's weight is meant.
    """

    component: str
    path: str

    @property
    def layer(self) -> str:
        """Path of the layer."""
        return self.path.removesuffix(_BIAS)

    @property
    def parameter(self) -> str:
        """``weight`` or ``bias``."""
        return "bias" if self.is_bias else "weight"

    @property
    def is_bias(self) -> bool:
        """Whether it is the layer's bias."""
        return self.path.endswith(_BIAS)

    @property
    def bias(self) -> ModuleKey:
        """The bias of this layer."""
        return ModuleKey(self.component, self.layer + _BIAS)


class Update(ABC):
    """What an adapter adds to the weight of one layer, whatever factors it is made of.

    Attributes:
        kind: its kind's name, a key of :data:`sdlora.adapters.kinds.table.KINDS`.
        needs_base: whether dW follows from the base's weight too, so that it is not known without.
        has_rank: whether there is a rank, and an alpha over it.
        exact_factors: whether :meth:`factors` are of low rank although the update needs the base.
        alpha: numerator of the scale, as files store it.
    """

    kind: ClassVar[str]
    needs_base: ClassVar[bool] = False
    has_rank: ClassVar[bool] = True
    exact_factors: ClassVar[bool] = False
    alpha: float

    @property
    @abstractmethod
    def rank(self) -> int:
        """What alpha is divided by."""

    @property
    def scale(self) -> float:
        """alpha / rank: what the product of the factors is multiplied by."""
        return self.alpha / self.rank

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Shape of the layer's weight: (out, in) or (out, in, kh, kw)."""

    @abstractmethod
    def delta(self, weight: Tensor | None = None) -> Tensor:
        """Return dW at strength 1, computed in float32 (float64 stays).

        Args:
            weight: the base's weight; the result has its shape.

        Raises:
            ValueError: without ``weight``, if :attr:`needs_base`.
        """

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Return the factors by the name they have in LyCORIS and WebUI files, without ``alpha``."""

    @abstractmethod
    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Self:
        """Return an update of the same kind, alpha and shape with other factors.

        Args:
            tensors: all those of :meth:`tensors`, by their names; others are ignored.
        """

    def to(self, dtype: torch.dtype) -> Self:
        """Return the same update with its factors in another number format."""
        return self.with_tensors({name: tensor.to(dtype) for name, tensor in self.tensors().items()})

    def on(self, device: torch.device) -> Self:
        """Return the same update with all its factors on a device."""
        return self.with_tensors({name: tensor.to(device) for name, tensor in self.tensors().items()})

    def factors(self, weight: Tensor | None = None) -> tuple[Tensor, Tensor, float]:
        """Return ``dW = scale * up @ down`` as (up, down, scale): (out, R) and (R, in * kh * kw), exact.

        If the kind has no low-rank factors, R is the layer's smaller side: dW itself is one factor, and the
        identity the other.

        Args:
            weight: the base's weight, if :attr:`needs_base`.
        """
        delta = self.delta(weight).flatten(1)
        identity = torch.eye(min(delta.shape), dtype=delta.dtype, device=delta.device)
        return (delta, identity, 1.0) if delta.shape[0] > delta.shape[1] else (identity, delta, 1.0)

    def norm(self) -> float:
        """Return the Frobenius norm of dW, in float64."""
        return float(torch.linalg.norm(self.delta().double()))

    def in_shape(self, shape: tuple[int, ...]) -> Update:
        """Return the same update for a layer whose weight has this shape.

        A linear layer and a 1x1 convolution have the same values in another number of dimensions, and files
        may hold the factors of one like those of the other.

        Raises:
            ValueError: when the factors are those of another layer.
        """
        if shape != self.shape:
            raise ValueError(f"an update of {self.shape} cannot be one of {shape}")
        return self


class WrappedUpdate(Update):
    """An update that is made of another one, and has its rank, alpha and shape.

    Attributes:
        direction: the other update.
    """

    direction: Update

    @property
    def alpha(self) -> float:  # type: ignore[override]
        """The direction's alpha."""
        return self.direction.alpha

    @property
    def rank(self) -> int:
        """The direction's rank."""
        return self.direction.rank

    @property
    def scale(self) -> float:
        """The direction's scale."""
        return self.direction.scale

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the layer's weight."""
        return self.direction.shape

    @abstractmethod
    def around(self, direction: Update) -> Self:
        """Return the same update made of another direction."""

    def norm(self) -> float:
        """Return the norm of the direction, which is known without the base."""
        return self.direction.norm()

    def in_shape(self, shape: tuple[int, ...]) -> Update:
        """Return it with its direction in another shape."""
        return self.around(self.direction.in_shape(shape))


def check_factors(fits: bool, tensors: Mapping[str, Tensor], alpha: float) -> None:
    """Raise a ValueError that shows all shapes if factors do not fit each other, or alpha is not finite."""
    if not fits:
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
        raise ValueError(f"factors do not fit: {shapes}")
    if not math.isfinite(alpha):
        raise ValueError(f"alpha must be finite, not {alpha}")


@dataclass(frozen=True)
class LowRankPair(Update):
    """The two factors of one layer's update.

    Attributes:
        down: (rank, in) for a linear layer, (rank, in, kh, kw) for a convolution.
        up: (out, rank) for a linear layer, (out, rank, 1, 1) for a convolution.
        alpha: numerator of the scale alpha / rank; always given, never implied by the rank.
    """

    kind: ClassVar[str] = "lora"

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
    def shape(self) -> tuple[int, ...]:
        """Shape of the layer's weight."""
        return (self.up.shape[0], *self.down.shape[1:])

    def delta(self, weight: Tensor | None = None) -> Tensor:
        """Return dW in the shape of the layer's weight, computed in float32 (float64 stays)."""
        dtype = torch.promote_types(torch.float32, self.down.dtype)
        down = self.down.to(dtype).flatten(1)
        up = self.up.to(dtype).flatten(1)
        # dW = alpha / rank * up @ down: (out, rank) @ (rank, in * kh * kw)
        return ((up @ down) * self.scale).reshape(self.shape if weight is None else weight.shape)

    def tensors(self) -> dict[str, Tensor]:
        """Return the two factors."""
        return {"lora_down.weight": self.down, "lora_up.weight": self.up}

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> LowRankPair:
        """Return a pair of the same alpha with other factors."""
        return LowRankPair(tensors["lora_down.weight"], tensors["lora_up.weight"], self.alpha)

    def factors(self, weight: Tensor | None = None) -> tuple[Tensor, Tensor, float]:
        """Return up, down and alpha / rank."""
        dtype = torch.promote_types(torch.float32, self.down.dtype)
        return self.up.to(dtype).flatten(1), self.down.to(dtype).flatten(1), self.scale

    def in_shape(self, shape: tuple[int, ...]) -> LowRankPair:
        """Return the pair with its factors seen in another number of dimensions."""
        if shape == self.shape:
            return self
        if self.up.shape[0] != shape[0] or self.down[0].numel() != math.prod(shape[1:]):
            raise ValueError(f"an update of {self.shape} cannot be one of {shape}")
        ones = [1] * (len(shape) - 2)
        return LowRankPair(
            self.down.reshape(self.rank, *shape[1:]), self.up.reshape(shape[0], self.rank, *ones), self.alpha
        )

    def norm(self) -> float:
        """Return ``|scale| sqrt(trace((up^T up) (down down^T)))``, without building dW."""
        up, down = self.up.flatten(1).double(), self.down.flatten(1).double()
        # ||up @ down||^2 = trace(down^T up^T up down) = sum of (up^T up) * (down down^T)^T, both (rank, rank)
        square = float(((up.T @ up) * (down @ down.T).T).sum())
        return abs(self.scale) * math.sqrt(max(square, 0.0))


@dataclass(frozen=True)
class AdapterWeights:
    """All updates of one adapter, by module.

    Code that only works on plain LoRA uses :attr:`pairs`, :meth:`items` and :meth:`component`, which refuse
    an adapter of another kind instead of leaving modules out. :attr:`is_plain` says beforehand whether they
    will, and :func:`sdlora.adapters.plain.to_plain` converts. :attr:`updates`, :meth:`all_items` and
    :meth:`updates_of` give updates of every kind.
    """

    updates: Mapping[ModuleKey, Update]

    def __len__(self) -> int:
        return len(self.updates)

    @cached_property
    def is_plain(self) -> bool:
        """Whether every update is a plain low-rank pair."""
        return all(isinstance(update, LowRankPair) for update in self.updates.values())

    @cached_property
    def pairs(self) -> Mapping[ModuleKey, LowRankPair]:
        """The updates of a plain LoRA.

        Raises:
            AdapterFileError: if some are of another kind.
        """
        pairs = {key: update for key, update in self.updates.items() if isinstance(update, LowRankPair)}
        if len(pairs) != len(self.updates):
            key, other = next((k, u) for k, u in self.all_items() if not isinstance(u, LowRankPair))
            raise AdapterFileError(
                f"`{key.component}.{key.path}` holds a {other.kind} update, but this works on plain LoRA "
                "only; convert the adapter to a plain LoRA first"
            )
        return pairs

    def items(self) -> Iterator[tuple[ModuleKey, LowRankPair]]:
        """Yield (module, pair) of a plain LoRA, sorted, so that files do not depend on build order."""
        for key in sorted(self.pairs):
            yield key, self.pairs[key]

    def component(self, name: str) -> dict[str, LowRankPair]:
        """Return {module path: pair} of one component of a plain LoRA."""
        return {key.path: pair for key, pair in self.items() if key.component == name}

    def only_plain(self) -> AdapterWeights:
        """Return the modules with plain low-rank pairs."""
        return AdapterWeights(
            {k: update for k, update in self.updates.items() if isinstance(update, LowRankPair)}
        )

    def all_items(self) -> Iterator[tuple[ModuleKey, Update]]:
        """Yield (module, update) of any kind in sorted order."""
        for key in sorted(self.updates):
            yield key, self.updates[key]

    def updates_of(self, component: str) -> dict[str, Update]:
        """Return {module path: update of any kind} of one component."""
        return {key.path: update for key, update in self.all_items() if key.component == component}

    def components(self) -> list[str]:
        """Return the components with at least one adapted module, the denoiser first."""
        return sorted({key.component for key in self.updates}, key=component_order)

    def kinds(self) -> dict[str, int]:
        """Return how many modules each kind of update has, the most frequent first."""
        return dict(Counter(update.kind for update in self.updates.values()).most_common())

    def to(self, dtype: torch.dtype) -> AdapterWeights:
        """Return the adapter with all factors in another number format."""
        return AdapterWeights({key: update.to(dtype) for key, update in self.all_items()})

    def ranks(self) -> list[int]:
        """Return the distinct ranks, ascending."""
        return sorted({update.rank for update in self.updates.values()})


@dataclass(frozen=True)
class AdapterInfo:
    """What is known about an adapter besides its numbers.

    Attributes:
        family: name of the model family, e.g. ``sd1``.
        name: what prompts call it.
        trigger_words: words in a prompt that evoke the style.
        metadata: all text entries of the file's header, as read or as to be written.
        stray: keys of the file that hold no weight, and go no further.
    """

    family: str | None = None
    name: str = ""
    trigger_words: tuple[str, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)
    stray: tuple[str, ...] = ()


@dataclass(frozen=True)
class AdapterFile:
    """An adapter with its info: what every format reads and writes.

    Attributes:
        weights: what it changes in a model.
        info: what is known besides.
        embeddings: textual-inversion embeddings that its file brings along, by their keys.
    """

    weights: AdapterWeights
    info: AdapterInfo = AdapterInfo()
    embeddings: Mapping[str, Tensor] = field(default_factory=dict)
