"""Memory of a card by phase of a run, as its allocator counts it: the truth that a plan is held against."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch

PHASES = {
    "sdlora.training.run._assemble": "placing",
    "sdlora.training.run.prepare_data": "encoding",
    "sdlora.training.preview_prompts.encode_prompts": "encoding",
    "sdlora.training.train.measure_cost": "step",
    "sdlora.training.train.launch_step": "step",
    "sdlora.training.train.validate": "validation",
    "sdlora.training.train.preview": "previews",
}
"""Function of sdlora -> the phase that it is."""


class Watch:
    """Reads peaks where phases begin and end; on a CPU there is nothing to read.

    Attributes:
        allocated: phase -> most bytes of tensors at once.
        reserved: phase -> most bytes that torch held of the card at once.
    """

    def __init__(self, device: torch.device) -> None:
        self.allocated: dict[str, int] = {}
        self.reserved: dict[str, int] = {}
        self._device, self._stack = device, ["loading"]

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Follow the phases of every run made inside."""
        with ExitStack() as patches:
            for place, phase in PHASES.items():
                patches.enter_context(patch(place, self._within(phase, function_at(place))))
            yield
        self._read()

    def _within(self, phase: str, call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def watched(*args: Any, **kwargs: Any) -> Any:
            self._read()
            self._stack.append(phase)
            try:
                return call(*args, **kwargs)
            finally:
                self._read()
                self._stack.pop()

        return watched

    def _read(self) -> None:
        """Count what was taken since the last reading for the phase that has been."""
        if self._device.type != "cuda":
            return
        phase = self._stack[-1]
        for peaks, read in (
            (self.allocated, torch.cuda.max_memory_allocated),
            (self.reserved, torch.cuda.max_memory_reserved),
        ):
            peaks[phase] = max(peaks.get(phase, 0), int(read(self._device)))
        torch.cuda.reset_peak_memory_stats(self._device)


def function_at(place: str) -> Callable[..., Any]:
    """Return a function by its module's dotted name and its own."""
    module, _, name = place.rpartition(".")
    call: Callable[..., Any] = getattr(__import__(module, fromlist=[name]), name)
    return call
