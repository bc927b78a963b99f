"""How large the updates of an adapter are, by block of the model; one module in memory at a time."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from ..adapters.canonical import ModuleKey, Update
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

    For an update that needs the base, it is the norm of its direction.

    Args:
        updates: in any order; each is let go before the next is taken.
    """
    squares: dict[tuple[str, str], list[float]] = {}
    for key, update in updates:
        block = _block(key.component, key.path)
        squares.setdefault((key.component, block), []).append(update.norm() ** 2)
    order = sorted(squares, key=lambda at: (component_order(at[0]), _flow_order(at[1])))
    return tuple(
        BlockNorm(component, block, len(values), math.sqrt(math.fsum(values)))
        for component, block in order
        for values in [squares[component, block]]
    )


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
