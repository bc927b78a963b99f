"""What a card would have been asked to do, by the line of the program that asked.

Everything is counted under a place: the phase of a run, and the innermost line of sdlora or its UI
on the stack. The backward pass runs in a thread of torch's own, which no line of ours is on: it counts for
the phase that was last seen.
"""

from __future__ import annotations

import sys
import weakref
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
_WATCHED = (f"{ROOT / 'sdlora'}/", f"{ROOT / 'ui'}/")
_GRANULE = 512  # bytes; CUDA's caching allocator hands out multiples of it
_SNAPSHOT_STEP = 1.02  # who holds the memory at the peak is noted again when the peak grew by 2 %
PHASES = {
    "encode_all": "encoding",
    "cache._encoded": "encoding",
    "prepare._encoded": "encoding",
    "judge.look": "judging",
    "judge.conclude": "judging",
    "measure_cost": "step",
    "launch_step": "step",
    "validate": "validation",
    "preview": "previews",
    "preview_text": "encoding",
    "save": "checkpoint",
    "finish_run": "finish",
    "generate": "generating",
    "_restore": "placing",
    "_assemble": "placing",
}
"""Function of sdlora, after its module where others have its name, too -> the phase that everything it calls
belongs to; the innermost one counts."""


class StoredKey(NamedTuple):
    """Where something was asked for: the phase of the run, and ``file:line function``."""

    phase: str
    site: str


class Copy(NamedTuple):
    """How a copy goes."""

    way: str
    """``to card``, ``to host`` or ``between cards``."""
    pinned: bool
    """Whether the host's side is page-locked, without which nothing is copied in the background."""
    waits: bool
    """Whether the host waits for it."""


@dataclass
class Traffic:
    """Copies of one kind from one place."""

    count: int = 0
    bytes: int = 0


@dataclass
class CardMemory:
    """Memory of one card, in bytes, as the caching allocator counts it."""

    alive: int = 0
    peak: int = 0
    peak_since_reset: int = 0
    peaks: dict[str, int] = field(default_factory=dict)
    holders: dict[str, int] = field(default_factory=dict)
    """At the peak: site -> bytes that were allocated there and still alive."""


class Ledger:
    """All that was asked of the cards so far."""

    def __init__(self) -> None:
        self.launches: Counter[StoredKey] = Counter()
        self.kernel_bytes: Counter[StoredKey] = Counter()
        self.operations: Counter[tuple[str, bool]] = Counter()
        self.operation_bytes: Counter[tuple[str, bool]] = Counter()
        self.waits: Counter[tuple[str, StoredKey]] = Counter()
        self.copies: dict[tuple[Copy, StoredKey], Traffic] = {}
        self.calls: Counter[str] = Counter()
        self.touched: dict[int, StoredKey] = {}
        self.memory: dict[int, CardMemory] = {}
        self._alive: dict[int, tuple[int, int, str]] = {}
        self._writes: Counter[int] = Counter()
        self._codes: dict[CodeType, tuple[str | None, bool]] = {}
        self._phase = "start"

    def clear(self) -> None:
        """Forget what was counted so far, but not what is alive."""
        for counted in (
            self.launches,
            self.operations,
            self.operation_bytes,
            self.kernel_bytes,
            self.waits,
            self.copies,
            self.calls,
            self.touched,
        ):
            counted.clear()
        for memory in self.memory.values():
            memory.peak, memory.peaks, memory.holders = memory.alive, {}, {}

    def here(self) -> StoredKey:
        """Return the place the program is at."""
        frame: FrameType | None = sys._getframe(1)
        phase, site = None, None
        while frame is not None and phase is None:
            code = frame.f_code
            seen = self._codes.get(code) or self._codes.setdefault(code, _classified(code))
            if seen[1]:
                site = site or _named(frame)
                phase = seen[0]
            frame = frame.f_back
        if site is None:
            return StoredKey(self._phase, "backward")
        self._phase = phase or "start"
        return StoredKey(self._phase, site)

    def launch(self, name: str, kernels: int, traffic: int) -> None:
        """Note the kernels of an operation, and the bytes they read and write."""
        place = self.here()
        # one each, however many kernels the library has for it; those over lists of tensors are several
        self.operations[name, place.site == "backward"] += kernels if name.startswith("_foreach") else 1
        self.operation_bytes[name, place.site == "backward"] += traffic
        self.launches[place] += kernels
        self.kernel_bytes[place] += traffic

    def wait(self, why: str) -> None:
        """Note that the host waits for the card."""
        self.waits[why, self.here()] += 1

    def copy(self, copy: Copy, size: int) -> None:
        """Note a copy between host and card."""
        place = self.here()
        traffic = self.copies.setdefault((copy, place), Traffic())
        traffic.count += 1
        traffic.bytes += size
        if copy.waits:
            self.waits[f"copy {copy.way}", place] += 1

    def touch(self, card: int) -> None:
        """Note that a card is used, for which CUDA opens a context of some hundred MiB on it."""
        if card not in self.touched:
            self.touched[card] = self.here()

    def allocate(self, card: int, storage: Any, size: int) -> None:
        """Count a storage until it dies; a known one is not counted again."""
        key = storage._cdata
        if key in self._alive:
            return
        size = -(-size // _GRANULE) * _GRANULE
        place, memory = self.here(), self.memory.setdefault(card, CardMemory())
        self.touch(card)
        self._alive[key] = card, size, place.site
        memory.alive += size
        memory.peaks[place.phase] = max(memory.peaks.get(place.phase, 0), memory.alive)
        memory.peak_since_reset = max(memory.peak_since_reset, memory.alive)
        if memory.alive > memory.peak * _SNAPSHOT_STEP:
            memory.holders = self._holders(card)
        memory.peak = max(memory.peak, memory.alive)
        weakref.finalize(storage, self._release, key)

    def write(self, storage: Any) -> None:
        """Note that a storage on a card is written to."""
        self._writes[storage._cdata] += 1

    def writes(self, storage: Any) -> int:
        """Return how often a storage was written to."""
        return self._writes[storage._cdata]

    def alive(self, card: int) -> int:
        """Return the bytes that are allocated on a card."""
        return self.memory.setdefault(card, CardMemory()).alive

    def peak(self, phase: str | None = None) -> int:
        """Return the most bytes that were alive on one card, in all or in a phase."""
        memories = self.memory.values()
        peaks = (memory.peak if phase is None else memory.peaks.get(phase, 0) for memory in memories)
        return max(peaks, default=0)

    def copied(self, way: str, phase: str | None = None) -> int:
        """Return the bytes copied one way (see :class:`Copy`), in all or in a phase."""
        return sum(
            traffic.bytes
            for (copy, place), traffic in self.copies.items()
            if copy.way == way and phase in (None, place.phase)
        )

    def step(self) -> dict[str, Any]:
        """Return what was counted since :meth:`clear`, and which operations the launches are."""
        by_name, bytes_by_name = Counter[str](), Counter[str]()
        for (name, backward), count in self.operations.items():
            by_name[name] += count
            bytes_by_name[name] += self.operation_bytes[name, backward]
        return {
            "launches": sum(self.operations.values()),
            "backward": sum(count for (_, backward), count in self.operations.items() if backward),
            "kernels": sum(self.launches.values()),
            "kernel_bytes": sum(self.kernel_bytes.values()),
            "waits": sum(self.waits.values()),
            "waits_by_place": [[why, place.site, count] for (why, place), count in self.waits.most_common()],
            "copies": sum(traffic.count for traffic in self.copies.values()),
            "launches_by_operation": dict(by_name.most_common()),
            "bytes_by_operation": dict(bytes_by_name),
        }

    def to_dict(self) -> Mapping[str, Any]:
        """Return everything as JSON values, the largest first."""
        return {
            "launches": sum(self.launches.values()),
            "kernel_bytes": sum(self.kernel_bytes.values()),
            "waits": sum(self.waits.values()),
            "bytes_to_card": self.copied("to card"),
            "bytes_to_host": self.copied("to host"),
            "peak": self.peak(),
            "cards": {
                str(card): {
                    "peak": memory.peak,
                    "peak_by_phase": memory.peaks,
                    "held_at_peak": _top(memory.holders),
                }
                for card, memory in sorted(self.memory.items())
            },
            "touched": {str(card): list(place) for card, place in sorted(self.touched.items())},
            "launches_by_place": [[*place, count] for place, count in self.launches.most_common(60)],
            "waits_by_place": [[why, *place, count] for (why, place), count in self.waits.most_common(60)],
            "copies_by_place": [
                [copy.way, "pinned" if copy.pinned else "pageable", *place, traffic.count, traffic.bytes]
                for (copy, place), traffic in sorted(self.copies.items(), key=lambda item: -item[1].bytes)[
                    :60
                ]
            ],
            "calls": dict(self.calls.most_common()),
        }

    def _release(self, key: int) -> None:
        card, size, _ = self._alive.pop(key)
        self._writes.pop(key, None)
        self.memory[card].alive -= size

    def _holders(self, card: int) -> dict[str, int]:
        held: Counter[str] = Counter()
        for number, size, site in self._alive.values():
            if number == card:
                held[site] += size
        return dict(held)


def _top(sizes: Mapping[str, int]) -> dict[str, int]:
    return dict(sorted(sizes.items(), key=lambda item: -item[1])[:20])


def _classified(code: CodeType) -> tuple[str | None, bool]:
    """Return the phase that a function begins, and whether it is one of ours."""
    watched = code.co_filename.startswith(_WATCHED)
    named = f"{Path(code.co_filename).stem}.{code.co_name}"
    return PHASES.get(named, PHASES.get(code.co_name)) if watched else None, watched


def _named(frame: FrameType) -> str:
    file = Path(frame.f_code.co_filename).relative_to(ROOT).as_posix()
    return f"{file}:{frame.f_lineno} {frame.f_code.co_name}"
