"""Which image when: a pure function of (seed, step), hence resumable without saved state.

In an epoch every image is visited exactly ``repeats`` times; none is dropped or replaced by another.
A micro-batch holds images of one bucket, and is full except for at most one per bucket and epoch. These
short ones are spread over the epoch, and micro-batches over its steps, as evenly as possible. On request
they are topped up: then some images, different ones in each epoch, are visited once more.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Hashable, Sequence

from ..reading.items import Visit

MicroBatch = tuple[Visit, ...]


class Order:
    """The order of visits of a whole run; the answers do not depend on what was asked before.

    Args:
        bucket_of: the bucket of each image (anything hashable).
        repeats: visits per epoch of each image, 1 or more.
        batch_size: visits per full micro-batch.
        accumulation: micro-batches per rank and optimizer step.
        world_size: number of processes.
        seed: fixes the order.
        top_up: whether short micro-batches are filled with further visits to images of their bucket.

    Raises:
        ValueError: when there are no images, or a number is below 1.
    """

    steps_per_epoch: int
    """Optimizer steps in which every visit of an epoch is made."""
    images_per_epoch: int
    """Visits of an epoch: the sum of the repeats, and those that top up."""

    def __init__(
        self,
        bucket_of: Sequence[Hashable],
        repeats: Sequence[int],
        *,
        batch_size: int,
        accumulation: int = 1,
        world_size: int = 1,
        seed: int = 0,
        top_up: bool = False,
    ) -> None:
        if not bucket_of or len(bucket_of) != len(repeats):
            raise ValueError(
                f"{len(bucket_of)} buckets and {len(repeats)} repeats: need one of each, or more"
            )
        if min(batch_size, accumulation, world_size, *repeats) < 1:
            raise ValueError("batch_size, accumulation, world_size and all repeats must be 1 or more")
        self._members: dict[Hashable, list[int]] = {}
        for index, bucket in enumerate(bucket_of):
            self._members.setdefault(bucket, []).append(index)
        self._repeats = tuple(repeats)
        self._batch_size, self._accumulation, self._world_size = batch_size, accumulation, world_size
        self._seed, self._top_up = seed, top_up
        visits = [sum(self._repeats[index] for index in members) for members in self._members.values()]
        self.images_per_epoch = sum(visits)
        if top_up:
            self.images_per_epoch = sum(-(-count // batch_size) * batch_size for count in visits)
        self.batches_per_epoch = sum(-(-count // batch_size) for count in visits)
        self.steps_per_epoch = -(-self.batches_per_epoch // (world_size * accumulation))
        self._plan: tuple[int, list[MicroBatch]] = (-1, [])

    def epoch_of(self, step: int) -> int:
        """Return the epoch (from 0) that a step (from 0) belongs to; a step never straddles two."""
        return step // self.steps_per_epoch

    def step(self, step: int) -> list[list[MicroBatch]]:
        """Return the micro-batches of an optimizer step as ``[rank][micro]``.

        Every rank gets ``accumulation`` of them; if there are not enough, the last ones are empty.
        """
        epoch, local = divmod(step, self.steps_per_epoch)
        plan = self._epoch(epoch)
        first = len(plan) * local // self.steps_per_epoch
        after = len(plan) * (local + 1) // self.steps_per_epoch
        ranks: list[list[MicroBatch]] = [[] for _ in range(self._world_size)]
        for position in range(self._world_size * self._accumulation):
            at = first + position
            ranks[position % self._world_size].append(plan[at] if at < after else ())
        return ranks

    def rounds(self, step: int) -> int:
        """Return the largest number of micro-batches that any rank has at a step."""
        return max(sum(map(bool, micros)) for micros in self.step(step))

    def _epoch(self, epoch: int) -> list[MicroBatch]:
        kept, plan = self._plan
        if kept != epoch:
            plan = self._make_plan(epoch)
            self._plan = (epoch, plan)
        return plan

    def _make_plan(self, epoch: int) -> list[MicroBatch]:
        # Only Random.random() is promised to give the same numbers in every Python version for one seed;
        # shuffle() is not. So everything is ordered by keys drawn with it.
        draw = random.Random(f"{self._seed}/{epoch}").random
        full: list[tuple[float, MicroBatch]] = []
        short: list[tuple[float, MicroBatch]] = []
        for members in self._members.values():
            # Visits to one image are spread over the epoch, so they rarely meet in one micro-batch.
            keyed = [
                ((repeat + draw()) / self._repeats[index], Visit(index, epoch, repeat))
                for index in members
                for repeat in range(self._repeats[index])
            ]
            keyed.sort(key=lambda pair: pair[0])
            visits = [visit for _, visit in keyed]
            if self._top_up:
                visits += self._extra(members, visits, epoch, draw)
            for start in range(0, len(visits), self._batch_size):
                batch = tuple(visits[start : start + self._batch_size])
                (full if len(batch) == self._batch_size else short).append((draw(), batch))
        return _interleaved(full, short, draw())

    def _extra(
        self, members: Sequence[int], visits: Sequence[Visit], epoch: int, draw: Callable[[], float]
    ) -> list[Visit]:
        """Return the visits that fill a bucket's last micro-batch, of images not in it if possible."""
        remainder = len(visits) % self._batch_size
        if not remainder:
            return []
        last = {visit.index for visit in visits[-remainder:]}
        ranked = sorted((index in last, draw(), index) for index in members)
        missing = self._batch_size - remainder
        return [
            Visit(
                ranked[n % len(ranked)][2],
                epoch,
                self._repeats[ranked[n % len(ranked)][2]] + n // len(ranked),
            )
            for n in range(missing)
        ]


def _interleaved(
    full: list[tuple[float, MicroBatch]], short: list[tuple[float, MicroBatch]], shift: float
) -> list[MicroBatch]:
    """Return both kinds in their drawn order, the short ones evenly spaced from a random start."""
    placed: list[tuple[float, MicroBatch]] = []
    for kind, offset in ((full, 0.5), (short, shift)):
        kind.sort(key=lambda pair: pair[0])
        placed += [((place + offset) / len(kind), batch) for place, (_, batch) in enumerate(kind)]
    placed.sort(key=lambda pair: pair[0])
    return [batch for _, batch in placed]
