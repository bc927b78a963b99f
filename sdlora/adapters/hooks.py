"""Updates of any kind, added to a layer's output by a forward hook on the base's own layer.

PEFT cannot put two sorts of adapters over one layer, so what is not a plain low-rank pair acts here instead.
The hook works beside PEFT's layers, in whichever order they come; while nothing acts the layer's output is
passed on untouched, and taking the hook off leaves the layer as it was. The update is worked out from its
factors at every call, which costs little beside the layer itself and spares a second copy of the weights;
:class:`sdlora.adapters.attach.Merged` avoids even that.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .canonical import Update

_ATTRIBUTE = "_sdlora_hook"


class UpdateHook:
    """A forward hook: the updates of one layer, by adapter."""

    def __init__(self) -> None:
        self.updates: dict[str, Update] = {}
        self._strengths: dict[str, float] = {}
        self._handle: RemovableHandle | None = None

    def set_strengths(self, strengths: Mapping[str, float]) -> None:
        """Let exactly these adapters act; strength 0 counts as not acting."""
        self._strengths = {
            name: value for name, value in strengths.items() if value != 0.0 and name in self.updates
        }

    def __call__(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        """Return the layer's output with the updates' part, or None to leave it as it is."""
        if not self._strengths:
            return None
        weight: Any = layer.weight
        total = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        for name, strength in self._strengths.items():
            # DoRA's update follows the weight that the layer computes with
            total = total.add(self.on(name, weight.device).delta(weight.detach()), alpha=strength)
        part = total.to(output.dtype)  # sum of strength * dW; output = W x + this x
        if isinstance(layer, nn.Conv2d):
            return output + layer._conv_forward(inputs[0], part, None)
        return output + nn.functional.linear(inputs[0], part)

    def on(self, name: str, device: torch.device) -> Update:
        """Return an update with its factors on a device, where they stay from then on."""
        update = self.updates[name]
        if next(iter(update.tensors().values())).device != device:
            update = self.updates[name] = update.on(device)
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


def hook_update(layer: nn.Module, name: str, update: Update) -> None:
    """Give a layer (linear, or a 2-D convolution) an update that does not act yet."""
    hook = hook_of(layer)
    if hook is None:
        hook = UpdateHook()
        hook.attach_to(layer)
    weight: Any = layer.weight
    hook.updates[name] = update.on(weight.device)


def unhook_update(layer: nn.Module, name: str) -> None:
    """Remove an adapter's update from a layer, if it has one there."""
    hook = hook_of(layer)
    if hook is not None and hook.updates.pop(name, None) is not None:
        hook.set_strengths({})
        if not hook.updates:
            hook.detach_from(layer)


def hook_of(layer: nn.Module) -> UpdateHook | None:
    """Return the hook on a layer, if it has one."""
    hook = getattr(layer, _ATTRIBUTE, None)
    return hook if isinstance(hook, UpdateHook) else None


def all_hooks(module: nn.Module) -> Iterator[tuple[str, nn.Module, UpdateHook]]:
    """Yield (path, layer, updates) of every layer inside a module that has some."""
    for path, layer in module.named_modules():
        if (hook := hook_of(layer)) is not None:
            yield path, layer, hook
