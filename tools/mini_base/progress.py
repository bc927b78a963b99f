"""Plain progress lines that read well in a terminal and in a log file."""

from __future__ import annotations

import time


def clock(seconds: float) -> str:
    """Formats a duration as minutes and seconds, or hours and minutes."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes} min {rest:02d} s"


class Progress:
    """Prints amount done, rate, loss and time left every few seconds."""

    def __init__(
        self, label: str, total: int, done: int = 0, share: float = 0.0, every: float = 15.0
    ) -> None:
        """Starts at ``done`` of ``total`` units, the share ``share`` of the whole."""
        self.label = label
        self.total = total
        self.every = every
        self._start = self._last = time.monotonic()
        self._done_at_last = done
        self._share_at_start = share
        self._losses: list[float] = []

    def update(self, done: int, loss: float, fraction: float | None = None) -> None:
        """Takes note of ``done`` units and prints when it is time to.

        Args:
            done: Units done so far.
            loss: Loss of the latest step; lines show the mean since the last line.
            fraction: Share of the whole that is done, when a wall-clock budget
                and not the count decides it.
        """
        self._losses.append(loss)
        now = time.monotonic()
        if now - self._last < self.every and done < self.total:
            return
        rate = (done - self._done_at_last) / max(now - self._last, 1e-6)
        share = max(done / self.total, fraction or 0.0)
        mean = sum(self._losses) / len(self._losses)
        gained = share - self._share_at_start
        left = clock((now - self._start) * (1 - share) / gained) if gained > 0 else "unknown time"
        print(
            f"{self.label}: {done:,} of {self.total:,} ({share:.1%}), {rate:.1f}/s, "
            f"loss {mean:.4f}, about {left} left",
            flush=True,
        )
        self._last, self._done_at_last = now, done
        self._losses.clear()
