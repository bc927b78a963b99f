"""How large the updates of an adapter are, by block of the model; one module in memory at a time."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from ..adapters.canonical import LowRankPair, ModuleKey, Update
from ..adapters.kinds import DoRA, LoHa, LoKr, TuckerPair
from ..families.facts import component_order, is_text_encoder

_UNET_BLOCK = re.compile(
    r"^(?:(down|up)_blocks\.(\d+)\.(attentions|resnets|downsamplers|upsamplers)|mid_block)"
)
_TEXT_LAYER = re.compile(r"encoder\.layers\.(\d+)\.")


@dataclass(frozen=True)
class BlockNorm:
    """Size of the updates in one block.

    Attributes:
        component: e.g. ``unet``.
        block: e.g. ``down_blocks.0.attentions``.
        num_modules: adapted layers in it.
        norm: Frobenius norm of all their updates together.
    """

    component: str
    block: str
    num_modules: int
    norm: float


def block_norms(updates: Iterable[tuple[ModuleKey, Update]]) -> tuple[BlockNorm, ...]:
    """Return the Frobenius norm of the updates of each block, the denoiser first.

    Args:
        updates: in any order; each is let go before the next is taken.
    """
    squares: dict[tuple[str, str], list[float]] = {}
    for key, update in updates:
        block = _block(key.component, key.path)
        squares.setdefault((key.component, block), []).append(delta_norm(update) ** 2)
    order = sorted(squares, key=lambda at: (component_order(at[0]), _flow_order(at[1])))
    return tuple(
        BlockNorm(component, block, len(values), math.sqrt(math.fsum(values)))
        for component, block in order
        for values in [squares[component, block]]
    )


def delta_norm(update: Update) -> float:
    """Return the Frobenius norm of dW, where possible without building dW; of a DoRA that of its direction.

    ``||up @ down||_F^2 = trace((up^T up) (down down^T))`` and ``||kron(a, b)|| = ||a|| ||b||``, in float64.
    """
    if isinstance(update, DoRA):
        return delta_norm(update.direction)
    if isinstance(update, LoKr):
        sides = (side[0] if len(side) == 1 else side[0] @ side[1] for side in update.matrices())
        return abs(update.scale) * math.prod(float(torch.linalg.norm(side.double())) for side in sides)
    if isinstance(update, LoHa):
        return float(torch.linalg.norm(update.delta().double()))
    pair = update.merged() if isinstance(update, TuckerPair) else update
    assert isinstance(pair, LowRankPair)
    up, down = pair.up.flatten(1).double(), pair.down.flatten(1).double()
    square = float(((up.T @ up) * (down @ down.T).T).sum())
    return abs(pair.scale) * math.sqrt(max(square, 0.0))


def _block(component: str, path: str) -> str:
    match = (_TEXT_LAYER if is_text_encoder(component) else _UNET_BLOCK).search(path)
    if match is None:
        return path.split(".", 1)[0]
    return match.group().rstrip(".")


def _flow_order(block: str) -> tuple[int, int, str]:
    """Order blocks as data flows: in, down, middle, up, out; text layers by number."""
    number = re.search(r"\d+", block)
    first = {"down_blocks": 1, "mid_block": 2, "up_blocks": 3, "conv_out": 4}.get(block.split(".", 1)[0], 0)
    return first, int(number.group()) if number else 0, block
