"""Tensors that the backward pass needs, made again there instead of kept since the forward pass.

A block names the tensors that it can make again, and from what (:meth:`Kept.again`). Whatever saves such a
tensor or a view of it for its own backward pass (torch's functions, PEFT's layers, ours) then keeps a recipe
instead. It is followed with the same kernels on the same numbers, so gradients are the same bit for bit. A
result is held until all that wait for it have it, and no longer.

:class:`Rungs` are how much of a block is made again, each with all before it:

* ``norms``: what norms and SiLU put out, from the input of the norm;
* ``gates``: GELU and its product, from what the projection of a gated feed-forward network puts out, and what
  the attention to the text puts out before its last projection, from its query, key and value;
* ``projections``: queries, keys and values, what enters the gates, and the states between the attentions;
  kept are the block's input and what the self-attention puts out before its last projection;
* ``blocks``: everything but the block's input.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

Make = Callable[..., Tensor]


class Rungs(IntEnum):
    """How much of a block is made again in the backward pass; by the names of ``training.recompute``."""

    nothing = 0
    norms = 1
    gates = 2
    projections = 3
    blocks = 4


class _Recipe:
    """How a tensor is made from others, which are kept or made again themselves.

    Args:
        make: computes it; the layout of the result's memory must be that of the original.
        sources: given to it.
    """

    def __init__(self, make: Make, sources: tuple[_Recipe | Tensor, ...]) -> None:
        self._make, self._sources = make, sources
        self._claims = self._taken = 0
        self._value: Tensor | None = None

    def claim(self) -> _Recipe:
        """Take note that one more will ask for the tensor."""
        if not self._claims:  # only what is asked for asks for its sources
            for source in self._sources:
                if isinstance(source, _Recipe):
                    source.claim()
        self._claims += 1
        return self

    def take(self) -> Tensor:
        """Return the tensor; to be called once by each that claimed it, in each backward pass."""
        value = self._value
        if value is None:
            with torch.no_grad():
                value = self._make(*map(_taken, self._sources))
        self._taken += 1
        self._value = value if self._taken % self._claims else None
        return value


def _taken(source: _Recipe | Tensor) -> Tensor:
    return source.take() if isinstance(source, _Recipe) else source


class _Saved:
    """What one function keeps: a tensor, or a view of what a recipe makes."""

    def __init__(self, tensor: Tensor) -> None:
        self.source: _Recipe | Tensor = tensor.detach()  # the function's own output would keep itself alive
        self._view = tensor.shape, tensor.stride(), tensor.storage_offset()

    def make_again(self, recipe: _Recipe) -> None:
        self.source = recipe.claim()

    def tensor(self) -> Tensor:
        if isinstance(self.source, Tensor):
            return self.source
        return self.source.take().as_strided(*self._view)


class Kept:
    """What a part of a block keeps for the backward pass; see :func:`keeping`."""

    def __init__(self, rung: Rungs) -> None:
        self.rung = rung
        self._recipes: dict[int, tuple[Tensor, _Recipe]] = {}  # memory -> its tensor, so that it stays taken
        self._saved: list[weakref.ref[_Saved]] = []

    def again(self, rung: Rungs, tensor: Tensor, make: Make, *sources: Tensor) -> Tensor:
        """Have a tensor made again by who saved or will save it in this part, and return it.

        Args:
            rung: from which on.
            tensor: just made, with memory of its own (a view stands for all of that memory).
            make: makes it, or another view of the same memory, from the sources.
            sources: may be tensors that are made again themselves.
        """
        if self.rung < rung or tensor.grad_fn is None:
            return tensor
        memory = _memory(tensor)
        recipe = _Recipe(make, tuple(map(self._source, sources)))
        self._recipes[memory] = tensor, recipe
        for reference in self._saved:
            saved = reference()
            if saved is not None and isinstance(saved.source, Tensor) and _memory(saved.source) == memory:
                saved.make_again(recipe)
        return tensor

    def pack(self, tensor: Tensor) -> _Saved:
        """Return what a function keeps for a tensor."""
        saved = _Saved(tensor)
        known = self._recipes.get(_memory(tensor))
        if known is not None:
            saved.make_again(known[1])
        else:
            self._saved.append(weakref.ref(saved))
        return saved

    def only(self, tensor: Tensor) -> None:
        """Let go of all named tensors but one: no function will save them any more."""
        memory = _memory(tensor)
        self._recipes = {key: known for key, known in self._recipes.items() if key == memory}

    def close(self) -> None:
        """Let go of everything: what was saved holds the hooks, and so this, until the backward pass."""
        self._recipes.clear()
        self._saved.clear()

    def _source(self, tensor: Tensor) -> _Recipe | Tensor:
        known = self._recipes.get(_memory(tensor))
        return tensor.detach() if known is None else known[1]


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class _Here(threading.local):
    kept: Kept | None = None


_HERE = _Here()  # parts of a batch are computed in threads of their own


@contextmanager
def keeping(rung: Rungs) -> Iterator[Kept | None]:
    """Have the functions inside keep recipes for what is named by :meth:`Kept.again`; None if nothing is."""
    if rung == Rungs.nothing or not torch.is_grad_enabled():
        yield None
        return
    before, kept = _HERE.kept, Kept(rung)
    _HERE.kept = kept
    hooks: Any = torch.autograd.graph.saved_tensors_hooks(kept.pack, _Saved.tensor)
    try:
        with hooks:
            yield kept
    finally:
        _HERE.kept = before
        kept.close()


def again(rung: Rungs, tensor: Tensor, make: Make, *sources: Tensor) -> Tensor:
    """Do :meth:`Kept.again` in the part that this thread computes, if there is one."""
    return tensor if _HERE.kept is None else _HERE.kept.again(rung, tensor, make, *sources)


def recomputed(rung: Rungs) -> bool:
    """Return whether the part that this thread computes is at a rung, or beyond it."""
    return _HERE.kept is not None and _HERE.kept.rung >= rung
