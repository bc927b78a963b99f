"""Answers that may take long, or never come, asked for beside the page that shows them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Generic, TypeVar

T = TypeVar("T")


class Latest(Generic[T]):
    """What a question was last answered with; it is asked again in a thread, and nobody waits for it."""

    def __init__(self, ask: Callable[[], T], before: T, *, every: float) -> None:
        """Ask nothing yet.

        Args:
            ask: gives the answer; one that fails leaves the last one.
            before: what there is before the first answer.
            every: seconds between two questions; none is asked while one is under way.
        """
        self._ask, self._answer, self._every = ask, before, every
        self._asked, self._under_way = float("-inf"), False
        self._lock = threading.Lock()

    def now(self) -> T:
        """Return the last answer at once, and ask again if it is old."""
        with self._lock:
            if not self._under_way and time.monotonic() - self._asked >= self._every:
                self._under_way = True
                threading.Thread(target=self._work, name="asking", daemon=True).start()
            return self._answer

    def _work(self) -> None:
        try:
            with suppress(Exception):  # whatever it is, it says nothing new
                answer = self._ask()
                with self._lock:
                    self._answer = answer
        finally:
            with self._lock:
                self._asked, self._under_way = time.monotonic(), False
