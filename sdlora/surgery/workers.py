"""Work on modules side by side: one for each core, each on a single thread.

The matrices are too small to be split over cores: measured on 2 cores, QR of two 1280 x 128 factors takes
12 ms on one thread and 55 ms or more on two that wait for each other.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

import torch

Job = TypeVar("Job")
Result = TypeVar("Result")


def in_order(work: Callable[[Job], Result], jobs: Iterable[Job]) -> Iterator[Result]:
    """Yield ``work(job)`` of each job in the order of the jobs; few are under way at a time."""
    num_workers = torch.get_num_threads()
    remaining = iter(jobs)
    pool = ThreadPoolExecutor(num_workers, initializer=torch.set_num_threads, initargs=(1,))
    try:
        waiting: deque[Future[Result]] = deque(
            pool.submit(work, job) for job in islice(remaining, num_workers + 1)
        )
        while waiting:
            result = waiting.popleft().result()
            waiting.extend(pool.submit(work, job) for job in islice(remaining, 1))
            yield result
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(num_workers)  # a worker's setting reaches MKL's own for the whole process
