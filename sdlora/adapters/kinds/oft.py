"""OFT (Qiu et al. 2023) and BOFT (Liu et al. 2024): a rotation of a weight's output rows.

As LyCORIS defined the files. The alpha of such a file is no numerator but a bound: the norm of all skew
matrices together stays below alpha times the number of rows, where alpha is above 0. At a strength s the
update W' - W counts s times, as in WebUI.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from ..canonical import Update, check_factors
from .kind import AdapterKind, FilePart, Kernel, check_floats, does_not_fit, require_parts


@dataclass(frozen=True)
class OFT(Update):
    """``W' = rescale * R^T W``, R block-diagonal, each block the Cayley transform of a skew matrix.

    Attributes:
        blocks: (blocks, size, size): Q, of which ``Q - Q^T`` is taken; or R itself.
        alpha: bound on the norm of ``Q - Q^T`` over the number of rows; 0 for none.
        rescale: (out, 1[, 1, 1]) or None.
        is_rotation: whether ``blocks`` are R themselves, as LyCORIS' first files have them (``oft_diag``).
        layer: shape of the layer's weight where it is known.
    """

    kind: ClassVar[str] = "oft"
    needs_base: ClassVar[bool] = True
    has_rank: ClassVar[bool] = False

    blocks: Tensor
    alpha: float = 0.0
    rescale: Tensor | None = None
    is_rotation: bool = False
    layer: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        dimensions = 4 if self.kind == "boft" else 3
        fits = self.blocks.ndim == dimensions and self.blocks.shape[-1] == self.blocks.shape[-2] > 0
        fits = fits and (self.rescale is None or self.rescale.numel() == self._rows)
        fits = fits and (not self.layer or self.layer[0] == self._rows)
        check_factors(fits, self.tensors(), self.alpha)

    @property
    def _rows(self) -> int:
        return self.blocks.shape[-3] * self.blocks.shape[-1]

    @property
    def rank(self) -> int:
        """1: nothing is divided by it."""
        return 1

    @property
    def scale(self) -> float:
        """1."""
        return 1.0

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the layer's weight; 0 for the inputs, which the file does not tell."""
        return self.layer or (self._rows, 0)

    def rotations(self, dtype: torch.dtype) -> Tensor:
        """Return R, in the shape of the blocks: ``(I + S) (I - S)^-1`` of the bounded ``S = Q - Q^T``."""
        blocks = self.blocks.to(dtype)
        if self.is_rotation:
            return blocks
        skew = blocks - blocks.transpose(-1, -2)
        bound = self.alpha * self._rows
        norm = torch.linalg.vector_norm(skew) + 1e-8
        if bound > 0 and norm > bound:
            skew = skew * (bound / norm)
        eye = torch.eye(blocks.shape[-1], dtype=dtype, device=blocks.device)
        # (I + S)(I - S)^-1, the two commute
        return torch.linalg.solve(eye - skew, eye + skew)

    def delta(self, weight: Tensor | None = None) -> Tensor:
        """Return W' - W.

        Raises:
            ValueError: without the base's weight.
        """
        if weight is None:
            raise ValueError("the update of an OFT depends on the base's weight")
        dtype = torch.promote_types(torch.promote_types(torch.float32, self.blocks.dtype), weight.dtype)
        wide = weight.to(dtype)
        turned = self._turned(self.rotations(dtype), wide)
        if self.rescale is not None:
            turned = turned * self.rescale.to(dtype).reshape(-1, *[1] * (weight.ndim - 1))
        return turned - wide

    def _turned(self, rotations: Tensor, weight: Tensor) -> Tensor:
        count, size = rotations.shape[:2]
        rows = weight.reshape(count, size, -1)
        return torch.einsum("knm,kni->kmi", rotations, rows).reshape(weight.shape)

    def tensors(self) -> dict[str, Tensor]:
        """Return the blocks, and the factor on every row if there is one."""
        name = "oft_diag" if self.is_rotation else "oft_blocks"
        more = {} if self.rescale is None else {"rescale": self.rescale}
        return {name: self.blocks, **more}

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> OFT:
        """Return it with other blocks."""
        blocks = tensors["oft_diag" if self.is_rotation else "oft_blocks"]
        return replace(self, blocks=blocks, rescale=tensors.get("rescale"))

    def norm(self) -> float:
        """Return the norm of R - I, which is known without the base."""
        rotations = self.rotations(torch.float64)
        return float(torch.linalg.norm(rotations - torch.eye(rotations.shape[-1], dtype=torch.float64)))

    def in_shape(self, shape: tuple[int, ...]) -> Update:
        """Return it for a layer of this shape."""
        if shape == self.shape or shape[0] != self._rows:
            return super().in_shape(shape)
        return replace(self, layer=shape)


@dataclass(frozen=True)
class BOFT(OFT):
    """The same with several rotations one after another, of rows shuffled as in a butterfly.

    Attributes:
        blocks: (steps, blocks, size, size).
    """

    kind: ClassVar[str] = "boft"

    def _turned(self, rotations: Tensor, weight: Tensor) -> Tensor:
        size = rotations.shape[-1]
        rows = weight.flatten(1)  # (out, in * kh * kw)
        for step, blocks in enumerate(rotations):
            stride = 2**step * (size // 2)
            # (c g k) -> (c k g): pairs that lie `stride` apart come side by side
            rows = rows.unflatten(0, (-1, 2, stride)).transpose(1, 2).flatten(0, 2)
            rows = torch.einsum("bij,bjn->bin", blocks, rows.unflatten(0, (-1, size))).flatten(0, 1)
            rows = rows.unflatten(0, (-1, stride, 2)).transpose(1, 2).flatten(0, 2)
        return rows.reshape(weight.shape)


def build(where: str, parts: Mapping[str, Tensor], alpha: float | None, kernel: Kernel | None) -> OFT:
    """Return the update of one module of a file; see :class:`AdapterKind`."""
    check_floats(where, parts.values())
    rotation = "oft_diag" in parts
    require_parts(where, parts, ("oft_diag" if rotation else "oft_blocks",))
    blocks = parts["oft_diag" if rotation else "oft_blocks"]
    try:
        if rotation and "oft_blocks" in parts:
            raise ValueError("factors do not fit: two sets of blocks")
        kind = BOFT if blocks.ndim == 4 else OFT
        update = kind(blocks, 0.0 if alpha is None else alpha, parts.get("rescale"), rotation)
        if kind is BOFT:
            _check_butterfly(update)
        return update
    except ValueError as error:
        raise does_not_fit(where, error) from None


def _check_butterfly(update: OFT) -> None:
    steps, count, size = update.blocks.shape[:3]
    rows = count * size
    strides = [2**step * (size // 2) for step in range(min(steps, 64))]
    if size % 2 or steps > 64 or any(stride == 0 or rows % (2 * stride) for stride in strides):
        raise ValueError(f"factors do not fit: {tuple(update.blocks.shape)} is no butterfly")


def quirks(client: str, format: str, updates: Sequence[OFT]) -> list[str]:
    """What the clients do with the bound, and with the first files."""
    reasons = []
    if client == "ComfyUI" and any(update.is_rotation for update in updates):
        reasons.append("does not know `oft_diag`")
    if client == "ComfyUI" and any(update.alpha > 0 for update in updates):
        reasons.append("bounds the rotations by alpha alone, not by alpha times the rows")
    return reasons


_PARTS = tuple(FilePart(name, name, rf"\.{name}$") for name in ("oft_blocks", "oft_diag", "rescale"))
OFT_KIND = AdapterKind(
    title="OFT",
    parts=_PARTS,
    build=build,
    alpha_is_bound=True,
    clients=("WebUI", "ComfyUI"),
    quirks=quirks,
    algorithm="diag-oft",
)
BOFT_KIND = AdapterKind(
    title="BOFT",
    parts=(),
    build=build,
    alpha_is_bound=True,
    clients=("WebUI", "ComfyUI"),
    quirks=quirks,
    algorithm="boft",
)
