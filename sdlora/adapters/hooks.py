"""Updates of any kind, added to a layer's output by a forward hook on the base's own layer.

PEFT cannot put two sorts of adapters over one layer, so what is not a plain low-rank pair acts here instead.
The hook works beside PEFT's layers, in whichever order they come; while nothing acts the layer's output is
passed on untouched, and taking the hook off leaves the layer as it was. The update is worked out from its
factors at every call, which costs little beside the layer itself and spares a second copy of the weights;
:class:`sdlora.adapters.attach.Merged` avoids even that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .canonical import Update

_ATTRIBUTE = "_sdlora_hook"


class UpdateHook:
    """A forward hook: the updates of one layer, by adapter.

    Attributes:
        by_row: what multiplies the part of an adapter (B, ...) by the strength of each row, instead of one
            strength for all.
    """

    def __init__(self) -> None:
        self.by_row: Mapping[str, Callable[[Tensor], Tensor]] = {}
        self.updates: dict[str, Update] = {}
        self.biases: dict[str, Update] = {}
        self._strengths: dict[str, float] = {}
        self._handle: RemovableHandle | None = None

    def set_strengths(self, strengths: Mapping[str, float]) -> None:
        """Let exactly these adapters act; strength 0 counts as not acting."""
        self._strengths = {
            name: value
            for name, value in strengths.items()
            if value != 0.0 and (name in self.updates or name in self.biases)
        }

    def __call__(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        """Return the layer's output with the updates' part, or None to leave it as it is."""
        if not self._strengths:
            return None
        if not self.by_row:
            return output + self._part(layer, inputs[0], output.dtype, list(self._strengths))
        for name in self._strengths:
            part = self._part(layer, inputs[0], output.dtype, [name])
            output = output + self.by_row[name](part.expand_as(output))
        return output

    def _part(self, layer: nn.Module, inputs: Tensor, dtype: torch.dtype, names: Sequence[str]) -> Tensor:
        """Return what some of the adapters add to the output."""
        weight: Any = layer.weight
        part = self._sum(self.updates, weight, names)
        bias = self._sum(self.biases, getattr(layer, "bias", None), names)
        # sum of strength * dW; output = W x + b + this: all of these layers are linear in W and b
        return _computed(
            layer,
            inputs,
            None if part is None else part.to(dtype),
            None if bias is None else bias.to(dtype),
        )

    def _sum(self, updates: dict[str, Update], value: Tensor | None, names: Sequence[str]) -> Tensor | None:
        """Return the sum of what acts on a weight or bias, in its shape; None if nothing does."""
        acting = [name for name in names if name in updates]
        if not acting or value is None:
            return None
        total = torch.zeros(value.shape, dtype=torch.float32, device=value.device)
        for name in acting:
            # DoRA's update follows the weight that the layer computes with
            update = updates[name] = _moved(updates[name], value.device)
            total = total.add(update.delta(value.detach()), alpha=self._strengths[name])
        return total

    def on(self, name: str, device: torch.device) -> Update:
        """Return an update of the weight with its factors on a device, where they stay from then on."""
        update = self.updates[name] = _moved(self.updates[name], device)
        return update

    def attach_to(self, layer: nn.Module) -> None:
        """Register with a layer, whose forward pass then calls this hook at its end."""
        self._handle = layer.register_forward_hook(self)
        setattr(layer, _ATTRIBUTE, self)

    def detach_from(self, layer: nn.Module) -> None:
        """Remove the hook, which leaves the layer as it was before."""
        if self._handle is not None:
            self._handle.remove()
        delattr(layer, _ATTRIBUTE)


def _moved(update: Update, device: torch.device) -> Update:
    here = next(iter(update.tensors().values())).device == device
    return update if here else update.on(device)


def _computed(layer: nn.Module, inputs: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Return what a layer would put out with these in place of its weight and bias; None counts as zero.

    Raises:
        TypeError: for a layer that is not linear in them.
    """
    own_layer: Any = layer
    if weight is None and not isinstance(layer, nn.Linear | nn.Conv2d):
        weight = torch.zeros_like(own_layer.weight, dtype=bias.dtype if bias is not None else None)
    if isinstance(layer, nn.Conv2d):
        if weight is None:
            assert bias is not None
            return bias[:, None, None]
        return own_layer._conv_forward(inputs, weight, bias)
    if isinstance(layer, nn.Linear):
        if weight is None:
            assert bias is not None
            return bias
        return nn.functional.linear(inputs, weight, bias)
    if isinstance(layer, nn.LayerNorm):
        return nn.functional.layer_norm(inputs, layer.normalized_shape, weight, bias, layer.eps)
    if isinstance(layer, nn.GroupNorm):
        return nn.functional.group_norm(inputs, layer.num_groups, weight, bias, layer.eps)
    if isinstance(layer, nn.Embedding):
        assert weight is not None
        return nn.functional.embedding(inputs, weight, layer.padding_idx)
    raise TypeError(f"no updates of a {type(layer).__name__}")


def hook_update(layer: nn.Module, name: str, update: Update, *, bias: bool = False) -> None:
    """Give a layer an update of its weight or bias that does not act yet.

    A linear layer, 2-D convolution, norm or embedding.
    """
    hook = hook_of(layer)
    if hook is None:
        hook = UpdateHook()
        hook.attach_to(layer)
    weight: Any = layer.weight
    (hook.biases if bias else hook.updates)[name] = update.on(weight.device)


def unhook_update(layer: nn.Module, name: str) -> None:
    """Remove an adapter's update from a layer, if it has one there."""
    hook = hook_of(layer)
    if hook is None or not (name in hook.updates or name in hook.biases):
        return
    hook.updates.pop(name, None)
    hook.biases.pop(name, None)
    hook.set_strengths({})
    if not hook.updates and not hook.biases:
        hook.detach_from(layer)


@contextmanager
def acting_update(layer: nn.Module, name: str, update: Update, strength: float) -> Iterator[None]:
    """Have an update of a layer's weight act within the block, beside whatever acts there already."""
    hook_update(layer, name, update)
    hook = hook_of(layer)
    assert hook is not None
    before = dict(hook._strengths)
    hook.set_strengths({**before, name: strength})
    try:
        yield
    finally:
        unhook_update(layer, name)
        hook.set_strengths(before)


def hook_of(layer: nn.Module) -> UpdateHook | None:
    """Return the hook on a layer, if it has one."""
    hook = getattr(layer, _ATTRIBUTE, None)
    return hook if isinstance(hook, UpdateHook) else None


def all_hooks(module: nn.Module) -> Iterator[tuple[str, nn.Module, UpdateHook]]:
    """Yield (path, layer, updates) of every layer inside a module that has some."""
    for path, layer in module.named_modules():
        if (hook := hook_of(layer)) is not None:
            yield path, layer, hook
