"""Differences stored as they are: of whole weights (LyCORIS' ``full``), of norms, and of biases.

ComfyUI's own extraction writes them beside LoRA factors for every norm and bias. They have no rank and take
no alpha (formats.md 3.1).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...errors import AdapterFileError
from ..canonical import Update, check_factors
from .kind import ADAPTER_NAME, AdapterKind, FilePart, Kernel, check_floats

WEIGHT = FilePart("diff", "diff", r"\.diff$")
BIAS = FilePart("diff_b", "diff", r"\.diff_b$", of_bias=True)
NORM_WEIGHT = FilePart("w_norm", "diff", r"\.w_norm$")
NORM_BIAS = FilePart("b_norm", "diff", r"\.b_norm$", of_bias=True)
PEFT_BIAS = FilePart("up_bias", "diff", rf"\.lora_(?:up|B){ADAPTER_NAME}\.bias$", of_bias=True)
"""Of PEFT's ``lora_bias``: a bias behind the second factor, which the adapter's scale multiplies too."""


@dataclass(frozen=True)
class Difference(Update):
    """``dW = diff``: (out, in[, kh, kw]) of a weight, (n,) of a norm or a bias.

    Attributes:
        diff: the difference itself.
    """

    kind: ClassVar[str] = "full"
    has_rank: ClassVar[bool] = False

    diff: Tensor
    alpha: float = 1.0

    def __post_init__(self) -> None:
        check_factors(self.diff.ndim in (1, 2, 4), self.tensors(), self.alpha)

    @property
    def rank(self) -> int:
        """1: nothing is divided by it."""
        return 1

    @property
    def scale(self) -> float:
        """1, whatever a file's alpha says."""
        return 1.0

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight or bias."""
        return tuple(self.diff.shape)

    def delta(self, weight: Tensor | None = None) -> Tensor:
        """Return the difference, float32 or wider."""
        wide = self.diff.to(torch.promote_types(torch.float32, self.diff.dtype))
        return wide if weight is None else wide.reshape(weight.shape)

    def tensors(self) -> dict[str, Tensor]:
        """Return the difference."""
        return {"diff": self.diff}

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Difference:
        """Return another difference."""
        return Difference(tensors["diff"])

    def in_shape(self, shape: tuple[int, ...]) -> Update:
        """Return it in another number of dimensions."""
        if shape == self.shape:
            return self
        if shape[:1] != self.shape[:1] or math.prod(shape) != self.diff.numel():
            return super().in_shape(shape)
        return Difference(self.diff.reshape(shape))


def build(where: str, parts: Mapping[str, Tensor], alpha: float | None, kernel: Kernel | None) -> Difference:
    """Return the update of one weight or bias; see :class:`AdapterKind`."""
    check_floats(where, parts.values())
    if len(parts) != 1:
        raise AdapterFileError(f"{where}: has two differences ({', '.join(parts)}); export the adapter again")
    (tensor,) = parts.values()
    if tensor.ndim not in (1, 2, 4):  # e.g. (1, n): some programs keep biases so
        tensor = tensor.reshape(-1)
    return Difference(tensor)


FULL = AdapterKind(
    title="full difference",
    parts=(WEIGHT, BIAS, NORM_WEIGHT, NORM_BIAS, PEFT_BIAS),
    build=build,
    stores_alpha=False,
    others_do="leaves them out silently",
    algorithm="full",
)
