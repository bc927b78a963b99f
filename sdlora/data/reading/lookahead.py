"""Work started before its result is needed, a bounded number of items ahead, with results in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")


def ahead(items: Iterable[Item], count: int) -> Iterator[Item]:
    """Yield each item after ``count`` further ones were taken from the iterator, or all that are left.

    With a generator that starts work and yields futures, this keeps ``count`` of them running, and
    memory does not grow with the number of items.
    """
    waiting: deque[Item] = deque()
    for item in items:
        waiting.append(item)
        if len(waiting) > count:
            yield waiting.popleft()
    yield from waiting
