"""Batches made ahead are the same batches, and waiting for them is measured."""

from __future__ import annotations

import threading

import pytest
import torch
from patience import PATIENCE

from sdlora.data.batching.batches import Batch
from sdlora.data.batching.loader import BatchLoader
from sdlora.data.batching.order import MicroBatch, Order
from sdlora.errors import DatasetError


def order_of(count: int = 7, accumulation: int = 2) -> Order:
    return Order([0] * count, [1] * count, batch_size=2, accumulation=accumulation, world_size=1, seed=3)


def loaded(step: int, micro: int, visits: MicroBatch) -> Batch:
    """A batch that says what it was made from."""
    names = tuple(f"{step} {micro} {visit.index} {visit.epoch}" for visit in visits)
    count = len(visits)
    weights = torch.ones(count)
    return Batch(torch.zeros(count), ("",) * count, None, (), names, weights)


@pytest.mark.parametrize("accumulation", [1, 2, 3])
@pytest.mark.parametrize("first", [0, 3])
def test_every_step_gets_its_own_micro_batches(accumulation: int, first: int) -> None:
    order = order_of(accumulation=accumulation)
    with BatchLoader(order, 0, 9, loaded, single_threaded=True) as loader:
        for step in range(first, 9):
            wanted = [
                loaded(step, micro, visits).names
                for micro, visits in enumerate(order.step(step)[0])
                if visits
            ]
            assert wanted
            assert [batch.names for batch in loader.step(step)] == wanted


def test_a_step_asked_for_again_or_skipped_to_is_right_too() -> None:
    with BatchLoader(order_of(), 0, 50, loaded, single_threaded=True) as loader:
        for step in (0, 0, 7, 2, 2, 40):
            assert all(name.startswith(f"{step} ") for b in loader.step(step) for name in b.names)


class Clock:
    """Seconds that pass only when a test says so; ``asked`` counts the waits that began."""

    def __init__(self) -> None:
        self.now, self.asked = 10.0, threading.Semaphore(0)
        self._readings = 0

    def __call__(self) -> float:
        self._readings += 1
        if self._readings % 2:
            self.asked.release()
        return self.now


def test_batches_are_made_while_training_goes_on_and_not_past_the_end() -> None:
    batches: list[tuple[int, int]] = []
    ahead, go_on = threading.Event(), threading.Event()

    def make(step: int, micro: int, visits: MicroBatch) -> Batch:
        if step == 3:
            assert go_on.wait(PATIENCE)
        batches.append((step, micro))
        if step == 2:
            ahead.set()
        return loaded(step, micro, visits)

    with BatchLoader(order_of(count=8, accumulation=1), 0, 4, make, single_threaded=True) as loader:
        list(loader.step(0))
        assert ahead.wait(PATIENCE)  # nobody asks for a batch meanwhile
        loader.settle()
        assert batches == [(0, 0), (1, 0), (2, 0)]
        list(loader.step(1))
        list(loader.step(2))  # both were there: the maker is held up with another
        assert batches == [(0, 0), (1, 0), (2, 0)]
        go_on.set()
        list(loader.step(3))
        loader.settle()
    assert batches == [(0, 0), (1, 0), (2, 0), (3, 0)]


def test_waiting_is_measured_when_data_is_the_slower_part() -> None:
    clock = Clock()

    def slow(step: int, micro: int, visits: MicroBatch) -> Batch:
        assert clock.asked.acquire(timeout=PATIENCE)  # the training waits already
        clock.now += 0.25 * (step + 1)
        return loaded(step, micro, visits)

    order = order_of(count=8, accumulation=1)
    with BatchLoader(order, 0, 4, slow, single_threaded=True, clock=clock) as loader:
        shares = []
        for step in range(4):
            list(loader.step(step))
            shares.append(loader.waited)
    assert shares == [0.25, 0.75, 1.5, 2.5]


def test_making_that_nobody_waited_for_is_not_counted() -> None:
    clock, go_on = Clock(), threading.Event()

    def make(step: int, micro: int, visits: MicroBatch) -> Batch:
        if step:
            assert go_on.wait(PATIENCE)
            clock.now += 7.0
        return loaded(step, micro, visits)

    order = order_of(count=8, accumulation=1)
    with BatchLoader(order, 0, 3, make, single_threaded=True, clock=clock) as loader:
        list(loader.step(0))
        go_on.set()
        loader.settle()
        for step in (1, 2):
            list(loader.step(step))
    assert (clock.now, loader.waited) == (24.0, 0.0)


def test_an_error_in_the_making_is_raised_by_the_step_that_needs_it() -> None:
    def failing(step: int, micro: int, visits: MicroBatch) -> Batch:
        if step == 1:
            raise DatasetError("cup.png: gone")
        return loaded(step, micro, visits)

    with BatchLoader(order_of(accumulation=1), 0, 4, failing, single_threaded=True) as loader:
        assert len(list(loader.step(0))) == 1
        with pytest.raises(DatasetError, match=r"cup\.png: gone"):
            list(loader.step(1))


def test_settling_waits_for_what_is_being_made_and_nothing_is_made_after_it() -> None:
    batches: list[tuple[int, int]] = []
    go_on = threading.Event()

    def held(step: int, micro: int, visits: MicroBatch) -> Batch:
        if step:
            assert go_on.wait(PATIENCE)
        batches.append((step, micro))
        return loaded(step, micro, visits)

    with BatchLoader(order_of(), 0, 9, held, single_threaded=True) as loader:
        list(loader.step(0))
        settling = threading.Thread(target=loader.settle)
        settling.start()
        settling.join(0.05)  # too short or not: it cannot end before the maker may go on
        assert settling.is_alive()
        go_on.set()
        settling.join(PATIENCE)
        assert batches == [(0, 0), (0, 1), (1, 0), (1, 1)]
        assert not settling.is_alive()
    assert batches == [(0, 0), (0, 1), (1, 0), (1, 1)]
