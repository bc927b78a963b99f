"""GLoRA (Chavan et al. 2023) as LyCORIS has it: ``dW = alpha / rank * (W A + B)``, A and B of low rank.

LyCORIS changed the order of the factors once; ComfyUI and Forge tell both orders by the shapes, WebUI knows
the old one only. Written as they were read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from ..canonical import Update, check_factors
from .kind import AdapterKind, FilePart, Kernel, check_floats, does_not_fit, require_parts

_PARTS = ("a1", "a2", "b1", "b2")


@dataclass(frozen=True)
class GLoRA(Update):
    """``alpha / rank * ((W @ right) @ left + up @ down)``.

    Attributes:
        right: (in, rank[, 1, 1]).
        left: (rank, in[, 1, 1]).
        up: (out, rank[, 1, 1]).
        down: (rank, in[, kh, kw]).
        alpha: numerator of the scale.
        is_old: whether files hold them in LyCORIS' first order: ``left, right, down, up``.
    """

    kind: ClassVar[str] = "glora"
    needs_base: ClassVar[bool] = True
    exact_factors: ClassVar[bool] = True

    right: Tensor
    left: Tensor
    up: Tensor
    down: Tensor
    alpha: float
    is_old: bool = False

    def __post_init__(self) -> None:
        rank = self.down.shape[0]
        fits = all(t.ndim in (2, 4) for t in (self.right, self.left, self.up, self.down)) and (
            self.up.shape[1] == rank
            and self.right.shape[0] == self.left.shape[1] == self.down.shape[1]
            and self.right.shape[1] == self.left.shape[0]
            and all(tuple(t.shape[2:]) in ((), (1, 1)) for t in (self.right, self.left, self.up))
        )
        check_factors(fits, self.tensors(), self.alpha)

    @property
    def rank(self) -> int:
        """Rows of ``down``."""
        return self.down.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the layer's weight."""
        return (self.up.shape[0], *self.down.shape[1:])

    def delta(self, weight: Tensor | None = None) -> Tensor:
        """Return dW.

        Raises:
            ValueError: without the base's weight.
        """
        if weight is None:
            raise ValueError("the update of a GLoRA depends on the base's weight")
        dtype = torch.promote_types(torch.promote_types(torch.float32, self.down.dtype), weight.dtype)
        right, left, up, down = (t.to(dtype).flatten(1) for t in (self.right, self.left, self.up, self.down))
        # (out, in, kh, kw) over its inputs: in -> rank -> in
        turned = torch.einsum("oi...,ir->or...", weight.to(dtype), right)
        turned = torch.einsum("or...,ri->oi...", turned, left)
        return (turned + (up @ down).reshape(weight.shape)) * self.scale

    def factors(self, weight: Tensor | None = None) -> tuple[Tensor, Tensor, float]:
        """Return factors of twice the rank; for a kernel those of the layer's smaller side."""
        if weight is None or weight.ndim != 2:
            return super().factors(weight)
        dtype = torch.promote_types(torch.promote_types(torch.float32, self.down.dtype), weight.dtype)
        right, left, up, down = (t.to(dtype).flatten(1) for t in (self.right, self.left, self.up, self.down))
        return torch.cat([weight.to(dtype) @ right, up], 1), torch.cat([left, down]), self.scale

    def tensors(self) -> dict[str, Tensor]:
        """Return the four factors in the order of the file."""
        order = (
            (self.left, self.right, self.down, self.up)
            if self.is_old
            else (self.right, self.left, self.up, self.down)
        )
        return {f"{name}.weight": tensor for name, tensor in zip(_PARTS, order, strict=True)}

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> GLoRA:
        """Return it with other factors."""
        first, second, third, fourth = (tensors[f"{name}.weight"] for name in _PARTS)
        if self.is_old:
            return replace(self, left=first, right=second, down=third, up=fourth)
        return replace(self, right=first, left=second, up=third, down=fourth)

    def norm(self) -> float:
        """Return the norm of ``up @ down``, which is known without the base."""
        up, down = self.up.flatten(1).double(), self.down.flatten(1).double()
        return abs(self.scale) * float(torch.linalg.norm(up @ down))

    def in_shape(self, shape: tuple[int, ...]) -> Update:
        """Return it with ``down`` in the dimensions of the layer."""
        if shape == self.shape or self.down[0].numel() != torch.Size(shape[1:]).numel():
            return super().in_shape(shape)
        down = self.down.reshape(self.rank, *shape[1:])
        return replace(self, down=down) if shape[0] == self.up.shape[0] else super().in_shape(shape)


def build(where: str, parts: Mapping[str, Tensor], alpha: float | None, kernel: Kernel | None) -> GLoRA:
    """Return the update of one module of a file; see :class:`AdapterKind`."""
    check_floats(where, parts.values())
    require_parts(where, parts, _PARTS)
    a1, a2, b1, b2 = (parts[name] for name in _PARTS)
    matrices = all(t.ndim >= 2 for t in (a1, a2, b1, b2))
    is_old = matrices and b2.shape[1] == b1.shape[0] == a1.shape[0] == a2.shape[1]
    if is_old and b2.shape[0] == b1.shape[1] == a1.shape[1] == a2.shape[0]:
        # a square layer fits both orders: ComfyUI goes by which side is the layer's, the larger one
        is_old = a2.shape[0] >= a2.shape[1]
    right, left, up, down = (a2, a1, b2, b1) if is_old else (a1, a2, b1, b2)
    try:
        if not matrices:
            raise ValueError(f"factors do not fit: {[tuple(t.shape) for t in (a1, a2, b1, b2)]}")
        rank = float(down.shape[0])
        return GLoRA(right, left, up, down, rank if alpha is None else alpha, is_old)
    except ValueError as error:
        raise does_not_fit(where, error) from None


def quirks(client: str, format: str, updates: Sequence[GLoRA]) -> list[str]:
    """WebUI multiplies in the first order of the factors, and takes no alpha."""
    if client != "WebUI":
        return []
    if any(not update.is_old for update in updates):
        return ["multiplies GLoRA's factors in their first order, the file has LyCORIS' present one"]
    return ["ignores the alpha of GLoRA layers"] if any(update.scale != 1.0 for update in updates) else []


GLORA = AdapterKind(
    title="GLoRA",
    parts=tuple(FilePart(name, f"{name}.weight", rf"\.{name}\.weight$") for name in _PARTS),
    build=build,
    clients=("WebUI", "Forge", "ComfyUI"),
    quirks=quirks,
    algorithm="glora",
)
