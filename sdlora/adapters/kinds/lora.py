"""LoRA: two low-rank factors (Hu et al. 2022), the kind every program reads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...config.adapter import AdapterConfig
from ...errors import AdapterFileError
from ...tensor_file import FLOAT_DTYPES
from ..canonical import LowRankPair
from ..initial import from_weight, low_rank
from .kind import (
    ADAPTER_NAME,
    EVERY_CLIENT,
    AdapterKind,
    FilePart,
    Kernel,
    TrainedForm,
    does_not_fit,
    require_parts,
)

if TYPE_CHECKING:
    from peft import LoraConfig

_ADAPTER_NAME = rf"{ADAPTER_NAME}(?:\.weight)?$"
_OLD = r"(?:\.lora|_lora|\.lora_linear_layer)"
DOWN = FilePart(
    "down", "lora_down.weight", rf"\.lora_(?:down|A){_ADAPTER_NAME}|{_OLD}\.down\.weight$", "lora_A"
)
UP = FilePart("up", "lora_up.weight", rf"\.lora_(?:up|B){_ADAPTER_NAME}|{_OLD}\.up\.weight$", "lora_B")

_EMBEDDING_END = _ADAPTER_NAME
EMBEDDING_A = FilePart(
    "embedding_a", "lora_up.weight", rf"\.lora_embedding_A{_EMBEDDING_END}", "lora_embedding_A"
)
EMBEDDING_B = FilePart(
    "embedding_b", "lora_down.weight", rf"\.lora_embedding_B{_EMBEDDING_END}", "lora_embedding_B"
)
"""PEFT's factors of an embedding: (rank, words) and (width, rank), the transpose of a layer's."""


def build(where: str, parts: Mapping[str, Tensor], alpha: float | None, kernel: Kernel | None) -> LowRankPair:
    """Return the pair of one module of a file; a missing alpha means alpha = rank.

    Args:
        where: file and module, for messages.
        parts: ``down`` (rank, in[, kh, kw]) and ``up`` (out, rank[, 1, 1]); a 2-D one beside a 4-D one is
            brought to the other's form.
        alpha: as stored, or None.
        kernel: not needed.

    Raises:
        AdapterFileError: when a factor is missing, empty, not floating point or does not fit.
    """
    if EMBEDDING_A.name in parts and EMBEDDING_B.name in parts:
        sides = (parts[EMBEDDING_B.name], parts[EMBEDDING_A.name])
        if any(side.ndim != 2 for side in sides):
            raise AdapterFileError(f"{where}: embedding factors are no matrices; export the adapter again")
        parts = {"down": sides[0].T.contiguous(), "up": sides[1].T.contiguous()}
    require_parts(where, parts, ("down", "up"))
    down, up = parts["down"], parts["up"]
    if down.dtype not in FLOAT_DTYPES or up.dtype not in FLOAT_DTYPES:
        raise AdapterFileError(
            f"{where}: has factors in {down.dtype} and {up.dtype}; save them as F16, BF16 or F32"
        )
    if down.ndim == 4 and up.ndim == 2:
        up = up[:, :, None, None]
    elif down.ndim == 2 and up.ndim == 4 and tuple(up.shape[2:]) == (1, 1):
        up = up[:, :, 0, 0]
    if down.numel() == 0 or up.numel() == 0:
        raise AdapterFileError(
            f"{where}: has empty factors (rank 0); export the adapter again with rank 1 or more"
        )
    try:
        return LowRankPair(down, up, float(down.shape[0]) if alpha is None else alpha)
    except ValueError as error:
        raise does_not_fit(where, error) from None


def peft_config(name: str, pairs: Mapping[str, LowRankPair], dropout: float) -> LoraConfig:
    """Return PEFT's settings: the most frequent rank and alpha, and patterns for the modules that differ."""
    from peft import LoraConfig  # slow to import, and needed only in a model

    (rank, alpha), _ = Counter((pair.rank, pair.alpha) for pair in pairs.values()).most_common(1)[0]
    # peft matches a key with the end of a path, re.match(r"(.*\.)?(KEY)$"): ^ and [.] make it this one module
    odd = {
        f"^{path.replace('.', r'[.]')}": p for path, p in pairs.items() if (p.rank, p.alpha) != (rank, alpha)
    }
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=sorted(pairs),
        rank_pattern={path: pair.rank for path, pair in odd.items()},
        alpha_pattern={path: pair.alpha for path, pair in odd.items()},
        init_lora_weights=False,
    )


def take_over(layer: Any, inner: str, pair: LowRankPair) -> dict[str, nn.Parameter]:
    """Copy a pair into PEFT's layer, in the layer's number format, and return the layer's two parameters."""
    down, up = layer.lora_A[inner].weight, layer.lora_B[inner].weight
    with torch.no_grad():
        down.copy_(pair.down)
        up.copy_(pair.up)
    return {"lora_down.weight": down, "lora_up.weight": up}


def start(
    config: AdapterConfig, weight: Tensor, rank: int, alpha: float, generator: torch.Generator
) -> LowRankPair:
    """Return the pair that one layer starts with, as ``adapter.init`` says."""
    if config.init in ("pissa", "olora"):
        return from_weight(config.init, weight, rank, alpha, generator)
    return low_rank(config.init, weight, rank, alpha, generator)


LORA = AdapterKind(
    title="LoRA",
    parts=(DOWN, UP, EMBEDDING_A, EMBEDDING_B),
    build=build,
    start=start,
    trained=TrainedForm(peft_config, take_over, up=frozenset({"lora_up.weight"})),
    peft_type="LORA",
    clients=EVERY_CLIENT,
)
