"""Makes the next micro-batches while the current one is trained on, and measures the time spent waiting.

What a batch holds follows from its visits alone, so making it early changes nothing. One thread
makes them one after the other; it is far from busy, unless images must be read from a slow disk.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from types import TracebackType
from typing import Generic, Self, TypeVar

import torch

from .order import MicroBatch, Order

_AHEAD = 2

Loaded = TypeVar("Loaded")


class BatchLoader(Generic[Loaded]):
    """Gives the micro-batches of one process, step by step.

    Args:
        order: says which images make a micro-batch.
        rank: number of the process.
        steps: where the run ends.
        make: (step, micro-batch, visits) -> what is loaded; called in the loader's own thread.
        single_threaded: whether torch uses one core in that thread, and leaves the others to training.
        clock: gives seconds; it is read before and after each wait.
    """

    waited: float
    """Seconds that :meth:`step` has waited for data in total."""

    def __init__(
        self,
        order: Order,
        rank: int,
        steps: int,
        make: Callable[[int, int, MicroBatch], Loaded],
        *,
        single_threaded: bool,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._order, self._rank, self._steps, self._make = order, rank, steps, make
        self._clock = clock
        threads = (torch.set_num_threads, (1,)) if single_threaded else (None, ())
        self._pool = ThreadPoolExecutor(1, "batches", *threads)
        self._pending: dict[tuple[int, int], Future[Loaded]] = {}
        self.waited = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)

    def step(self, step: int) -> Iterator[Loaded]:
        """Yield the micro-batches of an optimizer step that are not empty.

        Raises:
            SdloraError: when an image cannot be loaded.
        """
        self._pending = {key: future for key, future in self._pending.items() if key[0] >= step}
        for micro, visits in self._micro_batches(step):
            future = self._pending.pop((step, micro), None) or self._submit(step, micro, visits)
            self._look_ahead(step, micro)
            began = self._clock()
            loaded = future.result()
            self.waited += self._clock() - began
            yield loaded

    def settle(self) -> None:
        """Wait until no batch is being made, so that the model may be moved or used for something else."""
        wait(self._pending.values())

    def _look_ahead(self, step: int, micro: int) -> None:
        for later in range(step, min(step + _AHEAD + 1, self._steps)):
            for number, visits in self._micro_batches(later):
                if len(self._pending) >= _AHEAD:
                    return
                if (later, number) > (step, micro) and (later, number) not in self._pending:
                    self._pending[later, number] = self._submit(later, number, visits)

    def _micro_batches(self, step: int) -> list[tuple[int, MicroBatch]]:
        return [
            micro_batch for micro_batch in enumerate(self._order.step(step)[self._rank]) if micro_batch[1]
        ]

    def _submit(self, step: int, micro: int, visits: MicroBatch) -> Future[Loaded]:
        return self._pool.submit(self._make, step, micro, visits)
