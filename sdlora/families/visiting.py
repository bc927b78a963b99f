"""Modules that wait in main memory and come to the device only for the time they work.

While a module is away its own tensors stay where they are: it computes with copies, which are dropped when it
is done. So a visit costs one copy to the device and none back.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn


class Visit:
    """A module on a device, until :meth:`end`.

    Args:
        module: its tensors that are elsewhere get copies there.
        device: where to.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self._module = module
        self._places: list[tuple[dict[str, Tensor | None], str, Tensor, Tensor, int]] = []
        copies: dict[int, Tensor] = {}  # a tensor in two places stays one
        for part in module.modules():
            for tensors in (part._parameters, part._buffers):
                for name, original in tensors.items():
                    if original is not None and original.device.type != device.type:
                        if id(original) not in copies:
                            copies[id(original)] = _copy(original, device)
                        copy = copies[id(original)]
                        self._places.append((tensors, name, original, copy, copy._version))  # type: ignore[arg-type]
        for tensors, name, _, copy, _ in self._places:
            tensors[name] = copy

    def end(self) -> None:
        """Put the module's own tensors back; what was changed meanwhile (merged adapters) is taken over."""
        for tensors, name, original, copy, version in self._places:
            if copy._version != version:
                with torch.no_grad():
                    original.copy_(copy)
            tensors[name] = original
        self._places = []

    def end_with_guests(self) -> None:
        """:meth:`end`, and send what was put into the module meanwhile (adapters) to main memory, too."""
        self.end()
        self._module.to("cpu")


@contextmanager
def visiting(modules: Iterable[nn.Module], device: torch.device) -> Iterator[None]:
    """Have these modules on the device for a time."""
    with ExitStack() as visits:
        for module in modules:
            visits.callback(Visit(module, device).end)
        yield


def _copy(original: Tensor, device: torch.device) -> Tensor:
    with torch.no_grad():
        copy = original.detach().to(device)
    return nn.Parameter(copy, original.requires_grad) if isinstance(original, nn.Parameter) else copy
