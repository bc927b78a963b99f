"""What micro-batches are computed from comes to a card ahead of its step, in one piece, beside its work.

In the loader's thread noise is drawn and added, everything is brought to the number format it is used in and
laid side by side in page-locked memory; one copy on a stream of its own takes that to the card while it still
computes the step before. The step's own stream waits for the copy; the host does not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..data.batching.batches import Batch
from ..devices import make_current
from .objective import StepInputs

_ALIGNED = 256  # bytes: as torch's own allocations are, which kernels for whole vectors need
_TEXT = "text."


@dataclass(frozen=True)
class Sent:
    """Tensors on their way to a card.

    Attributes:
        buffer: on the card, in which they all lie.
        tensors: views into it, by name.
        copied: when they are there.
    """

    buffer: Tensor
    tensors: Mapping[str, Tensor]
    copied: torch.cuda.Event


@dataclass(frozen=True)
class Ready:
    """A micro-batch, and what it is computed from where that is on its way already."""

    batch: Batch
    sent: Sent | None = None

    def received(self) -> tuple[StepInputs, Tensor] | None:
        """Return the inputs on the card, usable by what comes next there, and the rates of the step (G,)."""
        if self.sent is None:
            return None
        stream = torch.cuda.current_stream(self.sent.buffer.device)
        stream.wait_event(self.sent.copied)
        # the memory belongs to the other stream, which must not give it on before this one is done with it
        self.sent.buffer.record_stream(stream)
        tensors = dict(self.sent.tensors)
        rates = tensors.pop("rates")
        text = {name.removeprefix(_TEXT): part for name, part in tensors.items() if name.startswith(_TEXT)}
        fields = {name: tensors.get(name) for name in StepInputs._fields if name != "text"}
        return StepInputs(**fields, text=text or None), rates  # type: ignore[arg-type]


class Sender:
    """Sends what micro-batches are computed from to a card, on a stream of its own.

    Args:
        device: a CUDA card.
        dtype: what the denoiser is given is in.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._device, self._dtype = device, dtype
        self._stream = torch.cuda.Stream(device)

    def send(self, inputs: StepInputs, rates: Sequence[float]) -> Sent:
        """Start sending them, and the learning rates of the step, by group."""
        text = inputs.text or {}
        named = {
            **{name: value for name, value in inputs._asdict().items() if isinstance(value, Tensor)},
            **{_TEXT + name: value for name, value in text.items()},
            "noisy": inputs.noisy.to(self._dtype),
            "rates": torch.tensor(rates, dtype=torch.float32),
        }
        host, places = packed(named)
        # each thread has a current card, at first the first one, on which this would open a context
        make_current(self._device)
        with torch.cuda.stream(self._stream):
            buffer = host.pin_memory().to(self._device, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record(self._stream)
        return Sent(buffer, unpacked(buffer, named, places), copied)


def packed(tensors: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, int]]:
    """Return tensors of any shapes and formats side by side in one of bytes (N,), and where each begins."""
    places: dict[str, int] = {}
    end = 0
    for name, tensor in tensors.items():
        places[name] = end
        size = tensor.numel() * tensor.element_size()
        end += -(-size // _ALIGNED) * _ALIGNED
    buffer = torch.zeros(end, dtype=torch.uint8)
    for name, view in unpacked(buffer, tensors, places).items():
        view.copy_(tensors[name])
    return buffer, places


def unpacked(buffer: Tensor, like: Mapping[str, Tensor], places: Mapping[str, int]) -> dict[str, Tensor]:
    """Return views into a buffer of bytes, of the formats and shapes of others, contiguous."""
    views = {}
    for name, tensor in like.items():
        size = tensor.numel() * tensor.element_size()
        views[name] = buffer[places[name] : places[name] + size].view(tensor.dtype).view(tensor.shape)
    return views
