"""Counting the memory that operations allocate: what tensors made inside are alive, and the peak of it.

On the meta device nothing is allocated, so what a whole step would take is counted in advance.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry


@dataclass
class MemoryCount:
    """How many bytes of the tensors made while counting are alive, and the largest such amount so far.

    Attributes:
        flops: multiplications and additions of the products, convolutions and attentions so far.
    """

    alive: int = 0
    peak: int = 0
    flops: int = 0
    _known: weakref.WeakSet[Any] = field(default_factory=weakref.WeakSet)

    def see(self, tensor: Tensor) -> None:
        """Count the memory of a tensor, unless it was counted already, and later its release."""
        storage = tensor.untyped_storage()
        if storage in self._known:
            return
        self._known.add(storage)
        size = storage.nbytes()
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._release, size)

    def _release(self, size: int) -> None:
        self.alive -= size


@contextmanager
def counting_memory() -> Iterator[MemoryCount]:
    """Count all memory that operations allocate for their results inside."""
    count = MemoryCount()
    with _Counting(count):
        yield count


class _Counting(TorchDispatchMode):
    def __init__(self, count: MemoryCount) -> None:
        super().__init__()
        self._count = count

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        given = {
            id(leaf.untyped_storage()) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)
        }
        out = func(*args, **(kwargs or {}))
        self._count.flops += _flops(func, args, kwargs or {}, out)
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and id(leaf.untyped_storage()) not in given:
                self._count.see(leaf)
        return out


def _flops(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    """Return the arithmetic of an operation, by torch's own formulas; 0 for those that have none."""
    packet = func.overloadpacket
    if packet in _ATTENTIONS:
        query, key, value = args[_ATTENTIONS[packet] :][:3]
        products = 2 if _ATTENTIONS[packet] == 0 else 5  # backward: the scores once more, and four gradients
        rows = query.shape[0] * query.shape[1] * query.shape[2] * key.shape[2]
        return int(products * 2 * rows * (query.shape[3] + value.shape[3]) // 2)
    formula = flop_registry.get(packet)
    return 0 if formula is None else int(formula(*args, **kwargs, out_val=out))


_ATTENTIONS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: 0,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: 1,
}
"""Attention on the meta device -> where its query is among the arguments."""


@contextmanager
def fused_attention() -> Iterator[None]:
    """Keep fused attention one kernel on the meta device, where torch would unfold it.

    The function is replaced for this time, not intercepted by a dispatch mode: gradient checkpointing calls
    it again in the backward pass, where modes do not reach. Calls on other devices pass through.
    """
    original = functional.scaled_dot_product_attention

    def attention(query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any) -> Tensor:
        if not query.is_meta:
            return original(query, key, value, *rest, **options)
        fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out: Tensor = fused(query, key, value, 0.0, bool(options.get("is_causal", False)))[0]
        return out

    functional.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = original
