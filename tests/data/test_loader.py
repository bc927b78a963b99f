"""Batches made ahead are the same batches, and waiting for them is measured."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from sdlora.data.batches import Batch
from sdlora.data.loader import BatchLoader, Loaded
from sdlora.data.order import MicroBatch, Order
from sdlora.errors import DatasetError


def order_of(count: int = 7, accumulation: int = 2) -> Order:
    return Order([0] * count, [1] * count, batch_size=2, accumulation=accumulation, world_size=1, seed=3)


def loaded(step: int, micro: int, visits: MicroBatch) -> Loaded:
    """A batch that says what it was made from."""
    names = tuple(f"{step} {micro} {visit.index} {visit.epoch}" for visit in visits)
    count = len(visits)
    weights = torch.ones(count)
    return Loaded(Batch(torch.zeros(count), ("",) * count, None, (), names, weights), torch.Generator())


@pytest.mark.parametrize("accumulation", [1, 2, 3])
@pytest.mark.parametrize("first", [0, 3])
def test_every_step_gets_its_own_micro_batches(accumulation: int, first: int) -> None:
    order = order_of(accumulation=accumulation)
    with BatchLoader(order, 0, 9, loaded, single_threaded=True) as loader:
        for step in range(first, 9):
            wanted = [
                loaded(step, micro, visits).batch.names
                for micro, visits in enumerate(order.step(step)[0])
                if visits
            ]
            assert wanted
            assert [batch.names for batch, _ in loader.step(step)] == wanted


def test_a_step_asked_for_again_or_skipped_to_is_right_too() -> None:
    with BatchLoader(order_of(), 0, 50, loaded, single_threaded=True) as loader:
        for step in (0, 0, 7, 2, 2, 40):
            assert all(name.startswith(f"{step} ") for b, _ in loader.step(step) for name in b.names)


def test_batches_are_made_while_training_goes_on_and_not_past_the_end() -> None:
    made: list[tuple[int, int]] = []

    def slow(step: int, micro: int, visits: MicroBatch) -> Loaded:
        time.sleep(0.02)
        made.append((step, micro))
        return loaded(step, micro, visits)

    with BatchLoader(order_of(count=8, accumulation=1), 0, 4, slow, single_threaded=True) as loader:
        list(loader.step(0))
        first = loader.waited
        assert first >= 0.02
        time.sleep(0.2)  # a step that takes longer than two batches
        assert made == [(0, 0), (1, 0), (2, 0)]
        list(loader.step(1))
        assert loader.waited - first < 0.01
        for step in (2, 3):
            list(loader.step(step))
        time.sleep(0.05)
    assert made == [(0, 0), (1, 0), (2, 0), (3, 0)]


def test_waiting_is_measured_when_data_is_the_slower_part() -> None:
    def slow(step: int, micro: int, visits: MicroBatch) -> Loaded:
        time.sleep(0.03)
        return loaded(step, micro, visits)

    began = time.perf_counter()
    with BatchLoader(order_of(count=8, accumulation=1), 0, 4, slow, single_threaded=True) as loader:
        for step in range(4):
            list(loader.step(step))
    assert 0.1 < loader.waited <= time.perf_counter() - began


def test_an_error_in_the_making_is_raised_by_the_step_that_needs_it() -> None:
    def failing(step: int, micro: int, visits: MicroBatch) -> Loaded:
        if step == 1:
            raise DatasetError("cup.png: gone")
        return loaded(step, micro, visits)

    with BatchLoader(order_of(accumulation=1), 0, 4, failing, single_threaded=True) as loader:
        assert len(list(loader.step(0))) == 1
        with pytest.raises(DatasetError, match=r"cup\.png: gone"):
            list(loader.step(1))


def test_after_settling_nothing_is_being_made() -> None:
    busy = threading.Event()

    def slow(step: int, micro: int, visits: MicroBatch) -> Loaded:
        busy.set()
        time.sleep(0.03)
        busy.clear()
        return loaded(step, micro, visits)

    with BatchLoader(order_of(), 0, 9, slow, single_threaded=True) as loader:
        list(loader.step(0))
        loader.settle()
        assert not busy.is_set()
        time.sleep(0.05)
        assert not busy.is_set()
