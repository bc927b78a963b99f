"""How two adapters' updates compare: cosine, norms and distance, for one module or many together."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from ..adapters.canonical import ModuleKey

Group = TypeVar("Group")


@dataclass(frozen=True)
class Likeness:
    """How two updates compare; a missing one counts as zero.

    Attributes:
        norm: Frobenius norm of the first.
        other_norm: of the second.
        product: their inner product.
        distance: norm of their difference.
        num_modules: modules in the comparison.
    """

    norm: float
    other_norm: float
    product: float
    distance: float
    num_modules: int = 1

    @property
    def cosine(self) -> float | None:
        """Return the cosine of the angle between them, None where one is zero or missing."""
        if self.norm == 0.0 or self.other_norm == 0.0:
            return None
        return max(-1.0, min(1.0, self.product / (self.norm * self.other_norm)))

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return {
            "cosine": self.cosine,
            "norm": self.norm,
            "other_norm": self.other_norm,
            "distance": self.distance,
            "num_modules": self.num_modules,
        }


def together(parts: Sequence[Likeness]) -> Likeness:
    """Return the comparison of all parts at once, as if their updates were one long vector."""
    return Likeness(
        math.hypot(*(part.norm for part in parts)),
        math.hypot(*(part.other_norm for part in parts)),
        math.fsum(part.product for part in parts),
        math.hypot(*(part.distance for part in parts)),
        sum(part.num_modules for part in parts),
    )


def grouped(
    modules: Mapping[ModuleKey, Likeness], group: Callable[[ModuleKey], Group]
) -> dict[Group, Likeness]:
    """Return {group: comparison of its modules}, in the order of their first modules."""
    groups: dict[Group, list[Likeness]] = {}
    for module, likeness in modules.items():
        groups.setdefault(group(module), []).append(likeness)
    return {name: together(parts) for name, parts in groups.items()}
