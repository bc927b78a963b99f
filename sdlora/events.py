"""The events that a run emits, and the three requests it takes.

Events are frozen facts; a listener cannot change training with them. One that raises is dropped after
one warning. :class:`Control` is read once per step.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

from .files import parse_json
from .run_folder import REQUESTS, STOP, RunFolder


@dataclass(frozen=True)
class Event:
    """A fact with the time it was emitted (seconds since 1970)."""

    time: float = field(default_factory=time.time, kw_only=True)


@dataclass(frozen=True)
class Decided(Event):
    """A setting that was left open, the value it got, and why."""

    key: str
    value: Any
    reason: str


@dataclass(frozen=True)
class Notice(Event):
    """Something the user should know; training continues."""

    message: str


@dataclass(frozen=True)
class Caching(Event):
    """Images and captions are being encoded before training."""

    done: int
    total: int


@dataclass(frozen=True)
class RunStarted(Event):
    """The first step is about to be made; the expected time in seconds and memory in bytes, also by phase."""

    name: str
    steps: int
    first_step: int
    num_images: int
    num_parameters: int
    expected_seconds: float | None
    expected_bytes: int
    expected_phases: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class StepDone(Event):
    """One optimizer step; loss is the mean over its images, rate in images per second."""

    step: int
    steps: int
    epoch: int
    loss: float
    learning_rate: float
    grad_norm: float
    num_images: int
    images_per_second: float
    seconds_left: float
    data_wait_share: float
    """Share of the step's time spent waiting for data."""
    rates: Mapping[str, float] = field(default_factory=dict)
    """Learning rate of each group of weights, by the group's name."""
    found_rate: float | None = None
    """The rate that the optimizer itself works out and multiplies these by (Prodigy's d), if it does."""


@dataclass(frozen=True)
class Estimate:
    """A mean and its 90 % interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class NoiseBand:
    """Part of what was validated: the timesteps from ``start`` to ``end``, as shares of the base's range."""

    start: float
    end: float
    loss: float
    against_base: Estimate | None
    """Loss minus the base's, image by image; None with fewer than two images."""


@dataclass(frozen=True)
class Validated(Event):
    """Loss on the held-out images, at noise and timesteps that are the same at every step."""

    step: int
    loss: float
    num_images: int
    standard_error: float | None = None
    """Of the mean over the images; the true mean lies within twice of it, 19 times of 20."""
    learned_loss: float | None = None
    """That of the values as learned, where what is shown is an average of them."""
    against_base: Estimate | None = None
    """Loss minus that of the base alone, image by image; None with fewer than two images."""
    best_step: int | None = None
    """The step before this one with the lowest loss."""
    against_best: Estimate | None = None
    """Loss minus that of ``best_step``, image by image."""
    bands: tuple[NoiseBand, ...] = ()
    """The same by how much noise there was, least first."""
    losses: tuple[tuple[float, ...], ...] = ()
    """Of each image (outer) in each part of the range of timesteps (inner), for later comparisons."""
    base_losses: tuple[tuple[float, ...], ...] | None = None
    """The same of the base alone; only where they were measured."""


@dataclass(frozen=True)
class Sampled(Event):
    """A row of previews was written."""

    step: int
    files: tuple[Path, ...]
    grid: Path


@dataclass(frozen=True)
class Judged(Event):
    """A checkpoint was judged at some strengths; which step and strength are the best so far, and why."""

    step: int
    strengths: tuple[float, ...]
    scores: tuple[Estimate, ...]
    best_step: int
    best_strength: float
    reason: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reported(Event):
    """The run's page was written; what it recommends, and whether more steps would help."""

    page: Path
    best_step: int
    strength: float
    reason: str
    more_steps: bool
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class CheckpointSaved(Event):
    """A resumable state was written."""

    step: int
    folder: Path


@dataclass(frozen=True)
class RunFinished(Event):
    """The run reached its end or was asked to stop."""

    step: int
    stopped: bool
    seconds: float
    adapter_file: Path | None
    data_wait_share: float
    """Share of all steps' time spent waiting for data."""


Listener = Callable[[Event], None]


def to_json(event: Event) -> str:
    """Return the event as one line of JSON with its kind under ``event``.

    A number that is not finite (the loss of a step that fp16 left out) becomes ``null``: JSON has none such.
    """
    values = {name: _plain(value) for name, value in dataclasses.asdict(event).items()}
    return json.dumps({"event": type(event).__name__, **values}, default=str)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Emitter:
    """Hands each event to every listener; drops one that raises, with a single warning."""

    def __init__(self, listeners: tuple[Listener, ...]) -> None:
        self._listeners = list(listeners)

    def __call__(self, event: Event) -> None:
        for listener in tuple(self._listeners):
            try:
                listener(event)
            except Exception as error:  # a broken display must not end hours of training
                self._listeners.remove(listener)
                problem = f"event listener {listener!r} failed and was dropped: {error}"
                if self._listeners:
                    self(Notice(f"{problem}; training continues"))
                warnings.warn(problem, stacklevel=2)


class JsonlWriter:
    """Listener that appends each event to a file or stream, one JSON object per line."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __call__(self, event: Event) -> None:
        self._stream.write(to_json(event) + "\n")
        self._stream.flush()


class Journal:
    """Listener that appends each event to a file by itself: what cannot be written now may be written later.

    Attributes:
        problem: why the first event that is missing is missing; None if all are there.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self.problem: str | None = None

    def __call__(self, event: Event) -> None:
        """Write one event; a line that an earlier failure cut short is ended first."""
        line = to_json(event).encode("utf-8") + b"\n"
        try:
            with self._file.open("ab", buffering=0) as stream:
                if stream.write(b"\n" + line if self.problem else line) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            if self.problem is None:
                self.problem = f"{self._file}: some events are missing ({error.strerror})"


def read_events(folder: Path) -> list[dict[str, Any]]:
    """Return the events of a run so far, without a line that a killed process left incomplete."""
    file = RunFolder(folder).events_file
    lines = file.read_text(encoding="utf-8", errors="replace").split("\n") if file.is_file() else []
    return [event for line in lines if (event := _parsed(line))]


def _parsed(line: str) -> dict[str, Any]:
    try:
        value = parse_json(line)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


class Control:
    """Requests from outside: a signal, a method call, or a file named STOP, SAVE or SAMPLE in the run.

    A file is removed when it has been seen.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._requests: set[str] = set()
        self._left: dict[str, int] = {}  # files that could not be removed -> when they were written

    def stop(self) -> None:
        """Ask to finish the current step, save and end."""
        self._requests.add(STOP)

    @property
    def stopping(self) -> bool:
        """Whether :meth:`stop` was called, or Ctrl-C pressed, since the last :meth:`take`."""
        return STOP in self._requests

    def take(self) -> frozenset[str]:
        """Return and forget the requests made since the last call: any of STOP, SAVE, SAMPLE."""
        self._look()
        taken, self._requests = frozenset(self._requests), set()
        return taken

    def asked_to_stop(self) -> bool:
        """Return whether a stop was asked for since the last :meth:`take`, by file, too; forget nothing."""
        self._look()
        return self.stopping

    def _look(self) -> None:
        if self._folder is not None:
            for name in REQUESTS:
                file = RunFolder(self._folder).request_file(name)
                with suppress(OSError):  # a folder that became unreadable, or a disk that is gone
                    self._see(file)

    def _see(self, file: Path) -> None:
        """Take a file's request; one that cannot be removed counts once, and again when it is new."""
        if not file.is_file():
            self._left.pop(file.name, None)
            return
        written_at = file.stat().st_mtime_ns
        if self._left.get(file.name) == written_at:
            return
        self._requests.add(file.name)
        self._left[file.name] = written_at
        file.unlink(missing_ok=True)

    @contextmanager
    def on_interrupt(self) -> Iterator[None]:
        """Turn the first Ctrl-C (and a polite kill) into :meth:`stop`; a second one ends at once."""

        def ask(number: int, frame: FrameType | None) -> None:
            self.stop()
            signal.signal(number, signal.default_int_handler)
            with suppress(OSError):  # not through sys.stderr: a write to it may be under way
                os.write(2, b"\nfinishing this step, then saving; once more ends at once\n")

        try:
            previous = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not in the main thread: the caller owns the signals
            yield
            return
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
