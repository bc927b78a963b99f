"""Coverage: every image exactly ``repeats`` times per epoch, for any buckets, batches and ranks."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdlora.data.batching.order import Order
from sdlora.data.reading.items import Visit

plans = st.fixed_dictionaries(
    {
        "images": st.lists(st.tuples(st.integers(0, 5), st.integers(1, 4)), min_size=1, max_size=40),
        "batch_size": st.integers(1, 9),
        "accumulation": st.integers(1, 5),
        "world_size": st.integers(1, 8),
        "seed": st.integers(0, 2**32 - 1),
    }
)


def order_of(plan: dict[str, object]) -> Order:
    images = plan["images"]
    assert isinstance(images, list)
    numbers = {key: plan[key] for key in ("batch_size", "accumulation", "world_size", "seed")}
    return Order([bucket for bucket, _ in images], [times for _, times in images], **numbers)  # type: ignore[arg-type]


def epoch_of(order: Order, epoch: int) -> list[list[list[tuple[Visit, ...]]]]:
    first = epoch * order.steps_per_epoch
    return [order.step(step) for step in range(first, first + order.steps_per_epoch)]


def micro_batches(steps: list[list[list[tuple[Visit, ...]]]]) -> list[tuple[Visit, ...]]:
    return [batch for ranks in steps for rank in ranks for batch in rank if batch]


@given(plans, st.integers(0, 3))
@settings(max_examples=150, deadline=None)
def test_every_image_is_visited_exactly_as_often_as_its_repeats(plan: dict[str, object], epoch: int) -> None:
    images = plan["images"]
    assert isinstance(images, list)
    order = order_of(plan)
    visits = [visit for batch in micro_batches(epoch_of(order, epoch)) for visit in batch]
    wanted = [Visit(i, epoch, repeat) for i, (_, times) in enumerate(images) for repeat in range(times)]
    assert Counter(visits) == Counter(wanted)
    assert order.images_per_epoch == len(wanted) > 0


@given(plans)
@settings(max_examples=100, deadline=None)
def test_micro_batches_are_of_one_bucket_and_full_but_for_one_per_bucket(plan: dict[str, object]) -> None:
    images, size = plan["images"], plan["batch_size"]
    assert isinstance(images, list) and isinstance(size, int)
    batches = micro_batches(epoch_of(order_of(plan), 0))
    per_bucket: dict[int, list[int]] = {}
    for batch in batches:
        buckets = {images[visit.index][0] for visit in batch}
        assert len(buckets) == 1
        per_bucket.setdefault(buckets.pop(), []).append(len(batch))
    for bucket, sizes in per_bucket.items():
        visits = sum(times for image_bucket, times in images if image_bucket == bucket)
        short = [visits % size] if visits % size else []
        assert sorted(sizes) == sorted([size] * (visits // size) + short)


@given(plans)
@settings(max_examples=100, deadline=None)
def test_every_step_has_one_list_per_rank_and_work_is_even(plan: dict[str, object]) -> None:
    world, accumulation = plan["world_size"], plan["accumulation"]
    assert isinstance(world, int) and isinstance(accumulation, int)
    order = order_of(plan)
    steps = epoch_of(order, 1)
    assert len(steps) == order.steps_per_epoch == -(-order.batches_per_epoch // (world * accumulation))
    filled = []
    for ranks in steps:
        assert [len(rank) for rank in ranks] == [accumulation] * world
        for rank in ranks:  # empty ones only at the end
            work = [bool(batch) for batch in rank]
            assert work == sorted(work, reverse=True)
        per_rank = [sum(bool(batch) for batch in rank) for rank in ranks]
        assert max(per_rank) - min(per_rank) <= 1
        filled.append(sum(per_rank))
    assert min(filled) >= 1
    assert max(filled) - min(filled) <= 1
    assert sum(filled) == order.batches_per_epoch


@pytest.mark.parametrize(("images", "batch_size", "accumulation", "world_size", "sizes"), [
    (7, 2, 1, 1, [[2], [2], [2], [1]]),
    (7, 2, 2, 1, [[2, 2], [2, 1]]),
    (5, 2, 2, 1, [[2], [2, 1]]),
    (11, 2, 2, 2, [[2, 2, 2], [2, 2, 1]]),
    (10, 4, 1, 2, [[4], [4, 2]]),
])  # fmt: skip
def test_what_does_not_divide_makes_one_short_batch_and_even_steps(
    images: int, batch_size: int, accumulation: int, world_size: int, sizes: list[list[int]]
) -> None:
    order = Order(
        [0] * images, [1] * images, batch_size=batch_size, accumulation=accumulation, world_size=world_size
    )
    steps = epoch_of(order, 0)
    lengths = [[len(batch) for rank in ranks for batch in rank if batch] for ranks in steps]
    assert sorted(map(len, lengths)) == sorted(map(len, sizes))
    assert sorted(length for step in lengths for length in step) == sorted(n for step in sizes for n in step)
    visited = [visit.index for batch in micro_batches(steps) for visit in batch]
    assert sorted(visited) == list(range(images))
    assert order.epoch_of(len(sizes) - 1) == 0 and order.epoch_of(len(sizes)) == 1


@given(plans, st.lists(st.integers(0, 60), min_size=1, max_size=12))
@settings(max_examples=80, deadline=None)
def test_the_answer_does_not_depend_on_what_was_asked_before(
    plan: dict[str, object], asked: list[int]
) -> None:
    first = order_of(plan)
    assert [first.step(step) for step in asked] == [order_of(plan).step(step) for step in asked]
    assert [first.epoch_of(step) for step in asked] == [step // first.steps_per_epoch for step in asked]


def test_the_order_changes_with_seed_and_epoch() -> None:
    def indices(seed: int, epoch: int) -> tuple[int, ...]:
        order = Order([0] * 50, [1] * 50, batch_size=4, seed=seed)
        return tuple(visit.index for batch in micro_batches(epoch_of(order, epoch)) for visit in batch)

    orders = {indices(seed, epoch) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9
    assert all(sorted(order) == list(range(50)) for order in orders)


def test_the_order_is_the_same_on_every_system_and_python() -> None:
    order = Order(["tall", "wide"] * 4, [1] * 7 + [2], batch_size=2, seed=5)
    assert [[visit.index for visit in order.step(step)[0][0]] for step in range(10)] == [
        *([7, 1], [3, 7], [4, 6], [5], [2, 0]),
        *([1, 3], [0, 2], [6, 4], [7], [7, 5]),
    ]


def test_looks_at_one_image_are_spread_so_that_they_do_not_meet_in_a_batch() -> None:
    order = Order([0] * 40, [8] + [1] * 39, batch_size=4, seed=0)
    batches = micro_batches(epoch_of(order, 0))
    assert len(batches) == 12
    assert max(sum(visit.index == 0 for visit in batch) for batch in batches) == 1


def test_short_micro_batches_are_spread_over_the_epoch() -> None:
    # 8 buckets of 13 images: 24 full micro-batches of 4 and 8 of one image
    order = Order([n % 8 for n in range(104)], [1] * 104, batch_size=4, seed=3)
    sizes = [len(batch) for batch in micro_batches(epoch_of(order, 0))]
    assert (sizes.count(4), sizes.count(1)) == (24, 8)
    places = [place for place, size in enumerate(sizes) if size == 1]
    assert all(3 <= after - before <= 5 for before, after in pairwise(places))


def test_twenty_images_and_eight_workers_leave_none_out() -> None:
    order = Order([0] * 20, [1] * 20, batch_size=1, world_size=8, seed=0)
    assert order.steps_per_epoch == 3
    for epoch in range(5):
        visits = [visit.index for batch in micro_batches(epoch_of(order, epoch)) for visit in batch]
        assert sorted(visits) == list(range(20))


@pytest.mark.parametrize(
    ("buckets", "repeats", "batch_size"), [([], [], 1), ([0], [], 1), ([0], [0], 1), ([0], [1], 0)]
)
def test_orders_that_cannot_be_are_refused(buckets: list[int], repeats: list[int], batch_size: int) -> None:
    with pytest.raises(ValueError, match=r"need one of each|must be 1 or more"):
        Order(buckets, repeats, batch_size=batch_size)


@given(plans, st.integers(0, 3))
@settings(max_examples=100, deadline=None)
def test_topped_up_micro_batches_are_full_and_every_image_still_gets_its_visits(
    plan: dict[str, object], epoch: int
) -> None:
    images, size = plan["images"], plan["batch_size"]
    assert isinstance(images, list) and isinstance(size, int)
    numbers = {key: plan[key] for key in ("accumulation", "world_size", "seed")}
    order = Order(
        [bucket for bucket, _ in images],
        [times for _, times in images],
        batch_size=size,
        top_up=True,
        **numbers,  # type: ignore[arg-type]
    )
    batches = micro_batches(epoch_of(order, epoch))
    assert {len(batch) for batch in batches} == {size}
    visits = [visit for batch in batches for visit in batch]
    assert len(set(visits)) == len(visits) == order.images_per_epoch
    counts = Counter(visit.index for visit in visits)
    extra: Counter[int] = Counter()
    for index, (bucket, times) in enumerate(images):
        assert {visit.repeat for visit in visits if visit.index == index} == set(range(counts[index]))
        assert counts[index] >= times
        extra[bucket] += counts[index] - times
    assert all(count < size for count in extra.values())


def test_topping_up_takes_other_images_each_epoch() -> None:
    order = Order([0] * 9, [1] * 9, batch_size=5, top_up=True)
    twice = []
    for epoch in range(6):
        visits = [visit.index for batch in micro_batches(epoch_of(order, epoch)) for visit in batch]
        twice.append(next(index for index, count in Counter(visits).items() if count == 2))
    assert len(set(twice)) > 2


def test_a_batch_is_topped_up_with_images_it_does_not_hold() -> None:
    order = Order([0] * 6, [1] * 6, batch_size=4, top_up=True)
    for epoch in range(10):
        for batch in micro_batches(epoch_of(order, epoch)):
            assert len({visit.index for visit in batch}) == 4
