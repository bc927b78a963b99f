"""How a run looks in a terminal: chosen settings with their reasons, then bars with rate and time left."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from ..errors import without_controls
from ..events import (
    Caching,
    CheckpointSaved,
    Decided,
    Estimate,
    Event,
    Judged,
    Notice,
    Reported,
    RunFinished,
    RunStarted,
    Sampled,
    StepDone,
    Validated,
)
from ..files import size_text


def duration(seconds: float) -> str:
    """Return a length of time for people: ``42 s``, ``3 min 05 s``, ``2 h 10 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


class TrainingDisplay:
    """Listener that shows a run on stderr: live bars on a terminal, occasional lines elsewhere."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._live = self._console.is_terminal
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=self._console,
            disable=not self._live,
        )
        self._tasks: dict[str, TaskID] = {}
        self._announced = False

    def __enter__(self) -> TrainingDisplay:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def __call__(self, event: Event) -> None:
        """Show one event."""
        match event:
            case Decided():
                if not self._announced:
                    self._say("settings decided from the data (override any with key=value):")
                    self._announced = True
                self._say(f"  {event.key} = {_short(event.value)}  ({event.reason})")
            case Notice():
                self._say(f"note: {event.message}")
            case Caching():
                self._advance("encoding", event.done, event.total, "")
            case RunStarted():
                self._start(event)
            case StepDone():
                self._step(event)
            case Validated():
                learned = "" if event.learned_loss is None else f" (as learned {event.learned_loss:.4f})"
                what = f"loss {event.loss:.4f}{learned} on {event.num_images} held-out images"
                self._say(f"step {event.step}: {what}{_compared(event)}")
            case Sampled():
                self._say(f"step {event.step}: previews in {event.grid}")
            case Judged():
                best = f"step {event.best_step} at strength {event.best_strength:g}, {event.reason}"
                self._say(f"step {event.step}: judged; best so far {best}")
            case Reported():
                more = "; more steps would help (--continue-for N)" if event.more_steps else ""
                self._say(
                    f"best: step {event.best_step} at strength {event.strength:g}, {event.reason}{more}"
                )
                for note in event.notes:
                    self._say(f"note: {note}")
                self._say(f"report: {event.page}")
            case CheckpointSaved():
                self._say(f"step {event.step}: saved {event.folder}")
            case RunFinished():
                word = "stopped" if event.stopped else "finished"
                waited = f"{event.data_wait_share:.1%} of the step time was spent waiting for data"
                self._say(f"{word} after {event.step} steps and {duration(event.seconds)}; {waited}")

    def _start(self, event: RunStarted) -> None:
        time = "" if event.expected_seconds is None else f"about {duration(event.expected_seconds)} and "
        self._say(
            f"training {event.name}: {event.num_parameters:,} parameters on {event.num_images} images, "
            f"steps {event.first_step + 1}..{event.steps}; "
            f"expecting {time}{size_text(event.expected_bytes)} of memory"
        )

    def _step(self, event: StepDone) -> None:
        note = f"loss {event.loss:.4f}  {event.images_per_second:.1f} images/s"
        if event.found_rate is not None:
            note += f"  d {event.found_rate:.2e}"
        self._advance("training", event.step, event.steps, note)
        every = max(1, event.steps // 20)
        if not self._live and (event.step % every == 0 or event.step == event.steps):
            self._say(f"step {event.step}/{event.steps}  {note}  {duration(event.seconds_left)} left")

    def _advance(self, what: str, done: int, total: int, note: str) -> None:
        if what not in self._tasks:
            self._tasks[what] = self._progress.add_task(what, total=total, note=note)
        self._progress.update(self._tasks[what], completed=done, total=total, note=note)

    def _say(self, text: str) -> None:
        self._console.print(Text(without_controls(text)))


def _compared(event: Validated) -> str:
    """Return what a measurement says against the base and against the best step before it."""
    if event.against_base is None:
        return "; one image says nothing of others" if event.num_images == 1 else ""
    told = f"; {_against(event.against_base, 'the base')}"
    if event.best_step is not None and event.against_best is not None:
        told += f"; {_against(event.against_best, f'step {event.best_step}, the best so far')}"
    return told


def _against(difference: Estimate, other: str) -> str:
    if difference.low <= 0 <= difference.high:
        return f"not to be told from {other} ({difference.low:+.4f} to {difference.high:+.4f})"
    word = "below" if difference.mean < 0 else "above"
    low, high = sorted((abs(difference.low), abs(difference.high)))
    return f"{abs(difference.mean):.4f} ({low:.4f} to {high:.4f}) {word} {other}"


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 100 else text[:97] + "..."


@contextmanager
def progress_bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """Give a function (done, total) that moves a bar on stderr; silent where there is no terminal."""
    console = Console(stderr=True)
    with Progress(console=console, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


@contextmanager
def image_bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """Give a function (done, total) that shows images done, rate and time left on stderr.

    A terminal gets a bar, anything else a line every twentieth of the way.
    """
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    began: list[tuple[int, float]] = []  # images and time at the first report: what came before is loading
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=None, rate="")

        def show(done: int, total: int) -> None:
            if not began:
                began.append((done, time.monotonic()))
            first, start = began[0]
            each = (time.monotonic() - start) / max(1, done - first)
            rate = f"{1 / max(each, 1e-3):.1f} images/s" if each <= 1 else f"{each:.1f} s each"
            rate = rate if done > first else ""
            progress.update(task, completed=done, total=total, rate=rate)
            if not console.is_terminal and (done % max(1, total // 20) == 0 or done == total):
                left = duration(each * (total - done))
                console.print(Text(f"{what} {done}/{total}  {rate}  {left} left"))

        yield show
