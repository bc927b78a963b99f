"""Modules that stay in main memory and come to the device only while they work.

During a visit a module's own tensors stay in main memory: it computes with copies, which are dropped at the
end. So a visit costs one copy to the device and none back.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn


class Visit:
    """A module on a device, until :meth:`end`.

    Args:
        module: those of its tensors that are not on the device get copies there.
        device: where the copies go.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self._module = module
        self._places: list[tuple[dict[str, Tensor | None], str, Tensor, Tensor, int]] = []
        copies: dict[int, Tensor] = {}  # a tensor that two modules share gets one copy
        for part in module.modules():
            for tensors in (part._parameters, part._buffers):
                for name, original in tensors.items():
                    if original is not None and original.device.type != device.type:
                        if id(original) not in copies:
                            copies[id(original)] = copied_to(original, device)
                        copy = copies[id(original)]
                        self._places.append((tensors, name, original, copy, copy._version))  # type: ignore[arg-type]
        for tensors, name, _, copy, _ in self._places:
            tensors[name] = copy

    def end(self) -> None:
        """Put the module's own tensors back; they get the values of copies that changed (merged adapters)."""
        for tensors, name, original, copy, version in self._places:
            if copy._version != version:
                with torch.no_grad():
                    original.copy_(copy)
            tensors[name] = original
        self._places = []

    def end_with_guests(self) -> None:
        """:meth:`end`, and move what was added to the module meanwhile (adapters) to main memory, too."""
        self.end()
        self._module.to("cpu")


@contextmanager
def visiting(modules: Iterable[nn.Module], device: torch.device) -> Iterator[None]:
    """Have these modules on the device within the block."""
    with ExitStack() as visits:
        for module in modules:
            visits.callback(Visit(module, device).end)
        yield


def copied_to(original: Tensor, device: torch.device) -> Tensor:
    """Return a copy of a tensor on a device; a parameter's is a parameter."""
    with torch.no_grad():
        copy = original.detach().to(device)
    return nn.Parameter(copy, original.requires_grad) if isinstance(original, nn.Parameter) else copy
