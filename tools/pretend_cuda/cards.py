"""What a pretended card is; imports no torch, so that the command can list its scenarios at once."""

from __future__ import annotations

from dataclasses import dataclass

GIB = 2**30
CONTEXT_BYTES = 450 * 2**20
"""What a CUDA context and its libraries take of a card before the first tensor."""


@dataclass(frozen=True)
class Card:
    """One pretended card.

    Attributes:
        name: what it calls itself.
        capability: compute capability, (major, minor).
        bytes: its memory.
        taken: what other programs hold of it.
    """

    name: str = "Pretended RTX, 24 GiB"
    capability: tuple[int, int] = (8, 9)
    bytes: int = 24 * GIB
    taken: int = 0
