"""IA3 (Liu et al. 2022): every output row or input column of a weight is scaled, ``dW = W * w``.

LyCORIS stores what is added to 1, PEFT the factor itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from ...errors import AdapterFileError
from ..canonical import Update, check_factors
from .kind import ADAPTER_NAME, AdapterKind, FilePart, Kernel, check_floats, does_not_fit, require_parts


@dataclass(frozen=True)
class IA3(Update):
    """``dW = W * w``, w for every output row or for every input column.

    Attributes:
        w: (n,) or as files hold it, (1, n, 1, 1) for convolutions.
        on_input: whether it is for input columns.
        layer: shape of the layer's weight where it is known; a side that is not is 0.
    """

    kind: ClassVar[str] = "ia3"
    needs_base: ClassVar[bool] = True
    has_rank: ClassVar[bool] = False

    w: Tensor
    on_input: bool
    alpha: float = 1.0
    layer: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        side = self.shape[1 if self.on_input else 0]
        check_factors(self.w.numel() == side, self.tensors(), self.alpha)

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
        """Shape of the layer's weight; 0 for the side that the file does not tell."""
        return self.layer or ((0, self.w.numel()) if self.on_input else (self.w.numel(), 0))

    def delta(self, weight: Tensor | None = None) -> Tensor:
        """Return dW.

        Raises:
            ValueError: without the base's weight.
        """
        if weight is None:
            raise ValueError("the update of an IA3 depends on the base's weight")
        dtype = torch.promote_types(torch.promote_types(torch.float32, self.w.dtype), weight.dtype)
        sides = [1] * weight.ndim
        sides[1 if self.on_input else 0] = -1
        return weight.to(dtype) * self.w.to(dtype).reshape(sides)

    def tensors(self) -> dict[str, Tensor]:
        """Return the scales, and which side they are for."""
        return {"weight": self.w, "on_input": torch.tensor(float(self.on_input))}

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> IA3:
        """Return it with other scales."""
        return replace(self, w=tensors["weight"])

    def of_bias(self) -> IA3:
        """Return the same for the layer's bias, where everything that it puts out is scaled (PEFT)."""
        return replace(self, w=self.w.reshape(-1), layer=(self.w.numel(),))

    def norm(self) -> float:
        """Return the norm of the scales, which is known without the base."""
        return float(torch.linalg.norm(self.w.double()))

    def in_shape(self, shape: tuple[int, ...]) -> Update:
        """Return it for a layer of this shape."""
        if shape == self.shape or shape[1 if self.on_input else 0] != self.w.numel():
            return super().in_shape(shape)
        return replace(self, layer=shape)


def build(where: str, parts: Mapping[str, Tensor], alpha: float | None, kernel: Kernel | None) -> IA3:
    """Return the update of one module of a file; see :class:`AdapterKind`."""
    if "ia3_l" in parts:
        return _of_peft(where, parts["ia3_l"])
    require_parts(where, parts, ("weight", "on_input"))
    check_floats(where, [parts["weight"]])
    if parts["on_input"].numel() != 1:
        raise AdapterFileError(f"{where}: `on_input` is not one number; the file is damaged, export it again")
    try:
        return IA3(parts["weight"], bool(parts["on_input"].reshape(()).item()))
    except ValueError as error:
        raise does_not_fit(where, error) from None


def _of_peft(where: str, factor: Tensor) -> IA3:
    """Return PEFT's ``ia3_l``: (out, 1) of rows, (1, in) of columns."""
    check_floats(where, [factor])
    if factor.ndim != 2 or 1 not in factor.shape:
        raise AdapterFileError(
            f"{where}: IA3 factors of {tuple(factor.shape)} do not tell which side they are for; merge them "
            "with PEFT (merge_and_unload) instead"
        )
    wide = factor.to(torch.promote_types(torch.float32, factor.dtype)) - 1.0
    return IA3(wide.reshape(-1), factor.shape[0] == 1)


_SIDE = FilePart("on_input", "on_input", r"\.on_input$", always_wide=True, is_number=True)
IA3_KIND = AdapterKind(
    title="IA3",
    parts=(
        FilePart("weight", "weight", r"\.weight$", beside=".on_input"),
        _SIDE,
        FilePart("ia3_l", "ia3_l", rf"\.ia3_l{ADAPTER_NAME}(?:\.weight)?$", "ia3_l"),
    ),
    build=build,
    stores_alpha=False,
    peft_type="IA3",
    clients=("WebUI",),
    algorithm="ia3",
)
