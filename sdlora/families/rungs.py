"""Which of a denoiser's lean blocks make how much again in the backward pass (:mod:`.recompute`).

A rung can be taken block by block: first those where most memory is saved for the work, so that any amount
of memory between two rungs can be reached. What a number costs to make again, in multiplications: of a linear
layer its inputs, of a 3x3 convolution nine times its inputs, of an attention twice the positions that are
looked at. Norms, gates and attentions to the text cost next to nothing; of them the largest come first.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from .lean import LeanAttention, LeanResidual, is_plain_residual
from .lean_blocks import LeanBlock, is_plain_block
from .recompute import Rungs

Lean = LeanBlock | LeanResidual
_LEVEL = re.compile(r"(down|up)_blocks\.(\d+)\.")


@dataclass(frozen=True)
class Recompute:
    """What a denoiser makes again in the backward pass.

    Attributes:
        rung: of the first ``count`` blocks, in the order of :func:`blocks_by_saving`; the others are one
            rung below.
        count: None for all.
        positions: latent pixels of the largest images, on which the order depends.
    """

    rung: Rungs = Rungs.nothing
    count: int | None = None
    positions: int = 64 * 64

    def put_in_place(self, denoiser: nn.Module) -> None:
        """Set the rung of every lean block."""
        blocks = blocks_by_saving(denoiser, self.rung, self.positions)
        first = {id(block) for block in blocks[: self.count]}
        for block in _lean(denoiser):
            block.rung = self.rung if id(block) in first or self.count is None else Rungs(self.rung - 1)


def can_recompute(denoiser: nn.Module, rung: Rungs) -> bool:
    """Tell whether all blocks of a denoiser have lean forward passes by which a rung can be taken.

    They need not be in place. At ``projections`` and beyond, attentions must keep the projections themselves,
    as torch's fused ones do, and draw no random numbers.
    """
    from diffusers.models.attention import BasicTransformerBlock
    from diffusers.models.resnet import ResnetBlock2D

    blocks = [module for module in denoiser.modules() if isinstance(module, BasicTransformerBlock)]
    residuals = [module for module in denoiser.modules() if isinstance(module, ResnetBlock2D)]
    if not blocks or not all(map(is_plain_block, blocks)) or not all(map(is_plain_residual, residuals)):
        return False
    attentions = [attention for block in blocks for attention in (block.attn1, block.attn2)]
    return rung < Rungs.projections or all(map(LeanAttention.is_fused, attentions))


def blocks_by_saving(denoiser: nn.Module, rung: Rungs, positions: int) -> list[Lean]:
    """Return the lean blocks at which a rung changes anything, those first that save most for the work.

    Args:
        denoiser: with its lean blocks in place.
        rung: compared with the one below it.
        positions: latent pixels of an image.
    """
    ranked: list[tuple[float, int, int, Lean]] = []
    for name, block in _named(denoiser):
        here = positions >> 2 * _level(denoiser, name)
        work, width = _work(block, rung, here)
        if work is not None:
            ranked.append((work, -width * here, len(ranked), block))
    return [block for *_, block in sorted(ranked, key=lambda entry: entry[:3])]


def _work(block: Lean, rung: Rungs, positions: int) -> tuple[float | None, int]:
    """Return multiplications for each number that a rung does not keep (None if it keeps all), and how many
    numbers these are for each position."""
    module: Any = block.module
    if isinstance(block, LeanResidual):
        inside, outside = module.in_channels, module.out_channels
        if rung == Rungs.norms:
            return 0.0, inside + outside
        return (9.0 * inside, outside) if rung == Rungs.blocks else (None, 0)
    channels = module.norm1.normalized_shape[0]
    if rung == Rungs.blocks:
        return float(positions), 2 * channels
    widths = {Rungs.norms: 2, Rungs.gates: 5, Rungs.projections: 14}
    return (float(channels) if rung == Rungs.projections else 0.0), widths[rung] * channels


def _level(denoiser: nn.Module, name: str) -> int:
    """Return how many times the sides were halved where a block of a U-Net works."""
    parts: Any = denoiser
    deepest = len(getattr(parts, "down_blocks", ())) - 1
    match = _LEVEL.match(name)
    if match is None:
        return max(0, deepest)  # the middle
    return int(match[2]) if match[1] == "down" else deepest - int(match[2])


def _named(denoiser: nn.Module) -> Iterator[tuple[str, Lean]]:
    for name, module in denoiser.named_modules():
        if isinstance(forward := module.__dict__.get("forward"), LeanBlock | LeanResidual):
            yield name, forward


def _lean(denoiser: nn.Module) -> Iterator[Lean]:
    return (block for _, block in _named(denoiser))
