"""What steps did, read without making the host wait for a card.

A number on a card can be read only when all work before it is done, and meanwhile nothing new is given to it.
So what a step has to report (its losses, the norm of its gradient) is copied to page-locked memory behind
the step's own work, and looked at when it has arrived: with the next steps, or when :data:`MOST` are open.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

MOST = 8
"""Steps whose reports may be open: what a step did is known this many steps later at most."""


@dataclass(frozen=True)
class StepReport:
    """What a step did.

    Attributes:
        loss: mean of the finite ones of all processes; NaN if there is none.
        norm: of the gradient, before it was shortened.
        rate: learning rate of the first group.
        images: seen by all processes.
        step: number of the step, from 1.
        rates: learning rate by the group's name.
        seconds: that the loop spent on it.
        waiting_share: of these seconds, for data.
    """

    loss: float
    norm: float
    rate: float
    images: int
    step: int
    rates: Mapping[str, float]
    seconds: float = 0.0
    waiting_share: float = 0.0


class MicroReport(NamedTuple):
    """Of one micro-batch of this process: its images, their objectives and plain losses (B,) each."""

    names: tuple[str, ...]
    objectives: Tensor
    losses: Tensor


class Numbers(NamedTuple):
    """What was found on the device: norm, objectives and losses of each round, scale of the losses."""

    norm: float
    micro: list[tuple[list[float], list[float]] | None]
    scale: float | None


@dataclass
class OpenStep:
    """A step whose report is not known yet, or not given on.

    Attributes:
        step: its number, from 1.
        rates: by the group's name, in the order of the groups.
        micro: of each round one of this process, or None where it had no images.
        images: of all processes.
        done: the report, once it is known.
        seconds: see :class:`StepReport`.
        waiting_share: see :class:`StepReport`.
    """

    step: int
    rates: Mapping[str, float]
    micro: list[MicroReport | None] = field(default_factory=list)
    images: int = 0
    done: StepReport | None = None
    seconds: float = 0.0
    waiting_share: float = 0.0
    _numbers: Tensor | None = None
    _arrival: torch.cuda.Event | None = None

    @property
    def names(self) -> list[str]:
        """All images of this process in this step."""
        return [name for micro in self.micro if micro is not None for name in micro.names]

    def send(self, numbers: Tensor) -> None:
        """Start copying what was found, (1 + 2 * images [+ 1],) float32, to the host."""
        if numbers.device.type != "cuda":
            self._numbers = numbers.clone()
            return
        self._numbers = torch.empty(numbers.shape).pin_memory()
        self._numbers.copy_(numbers, non_blocking=True)
        self._arrival = torch.cuda.Event()
        self._arrival.record(torch.cuda.current_stream(numbers.device))

    @property
    def has_arrived(self) -> bool:
        """Whether it can be read without waiting."""
        return self.done is not None or self._arrival is None or self._arrival.query()

    def read(self) -> Numbers:
        """Return what was sent; waits for it if need be."""
        assert self._numbers is not None
        if self._arrival is not None and not self._arrival.query():
            self._arrival.synchronize()
        norm, *values = self._numbers.tolist()
        micro: list[tuple[list[float], list[float]] | None] = []
        for part in self.micro:
            if part is None:
                micro.append(None)
                continue
            count = len(part.names)
            micro.append((values[:count], values[count : 2 * count]))
            values = values[2 * count :]
        return Numbers(norm, micro, values[0] if values else None)


class Reports:
    """The steps whose reports were not given on yet, oldest first.

    Args:
        deferred: whether they are read later; if not, each is known before the weights change.
        together: several processes read them, which must do so for the same steps.
    """

    def __init__(self, *, deferred: bool, together: bool = False) -> None:
        self.deferred, self._together = deferred, together
        self._open: deque[OpenStep] = deque()
        self._one: Tensor | None = None

    def add(self, step: OpenStep) -> None:
        """Take a step that was made."""
        self._open.append(step)

    def send(self, step: OpenStep, norm: Tensor, scale: Tensor | None) -> Tensor:
        """Start copying what a step found to the host; return on the device whether it must be left out, 1.0.

        Args:
            step: with all its micro-batches.
            norm: of the gradient.
            scale: that the losses are multiplied by, if they are.
        """
        parts = [norm.detach().reshape(1)]
        for micro in step.micro:
            if micro is not None:
                parts += [micro.objectives, micro.losses]
        numbers = torch.cat(parts)
        skip = torch.zeros((), device=numbers.device)
        if self._one is None:
            self._one = torch.ones((), device=numbers.device)
        # what GradScaler asks of gradients: whether all are finite, in one kernel; times 1 changes nothing
        torch._amp_foreach_non_finite_check_and_unscale_([numbers], skip, self._one)
        step.send(numbers if scale is None else torch.cat([numbers, scale.reshape(1)]))
        return skip

    def ready(self, *, everything: bool) -> Iterator[OpenStep]:
        """Yield steps in their order and forget them: all, or those that have arrived or are overdue."""
        while self._open:
            first = self._open[0]
            arrived = first.done is not None or (first.has_arrived and not self._together)
            if not (everything or arrived or len(self._open) > MOST):
                return
            yield self._open.popleft()


def total_of(rounds: Iterable[Iterable[tuple[float, int]]]) -> tuple[float, int]:
    """Return sum and number of the finite losses of a step: (sum, number) of each process in each round.

    Added round by round and in it by rank, as one process adds that makes all these micro-batches itself.
    """
    total, finite = 0.0, 0
    for of_all in rounds:
        for loss, good in of_all:
            total, finite = total + loss, finite + good
    return total, finite
