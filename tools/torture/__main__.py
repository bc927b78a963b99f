"""Disturb runs and the queue in every way, and print what was tried and what held.

    python -m tools.torture [--only a,b,...] [--trials N] [--seed N] [--keep FOLDER]

a kill -9 at random moments, b writes that fail, c images, cache, base and records changed between stop and
resume, d signals, closed pipes, a jumping clock, e two at once, f the server killed during a queue, g the
page used in three tabs (a trial is a minute of it).
Without ``--trials`` each makes its full number; a failure prints how to repeat it. Linux only.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from .changes import changes
from .kills import failing_writes, kills
from .play import Play, Tally
from .queue_kills import queue_kills
from .signals import pairs, signals
from .soak import soak
from .warm import Warm

Scene = Callable[[Play, int, int, Callable[[str], None]], Tally]
SCENES: dict[str, tuple[str, int, Scene]] = {
    "a": ("killed at a random moment, resumed to the same bits", 200, kills),
    "b": ("disk full, read-only, quota, I/O errors at a random write", 200, failing_writes),
    "c": ("images, cache, base, records changed before resuming", 81, changes),
    "d": ("signals, closed pipes, a jumping clock", 60, signals),
    "e": ("two in one folder, two with one cache", 30, pairs),
    "f": ("the server killed during a queue, also one of two", 50, queue_kills),
    "g": ("the page used in three tabs, memory flat", 120, soak),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the scenes that are asked for; return 1 if something did not hold."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.torture",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--only", default=",".join(SCENES), help="letters of scenes, with commas between them"
    )
    parser.add_argument("--trials", type=int, help="of each scene")
    parser.add_argument(
        "--seed", type=int, default=0, help="of the first trial; each further one has one more"
    )
    parser.add_argument("--keep", type=Path, help="folder to work in, which stays")
    options = parser.parse_args(arguments)
    wanted = options.only.split(",")
    rows: list[tuple[str, Tally, float]] = []
    with ExitStack() as stack:
        kept = options.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder = kept.resolve()
        play = None
        for letter in wanted:
            begun = time.monotonic()
            title, full, scene = SCENES[letter]
            play = play or Play(folder, stack.enter_context(Warm(folder / "streams")))
            tally = scene(play, options.trials or full, options.seed, _say)
            rows.append((f"{letter} {title}", tally, time.monotonic() - begun))
            _say(f"{letter}: {tally.held} of {tally.tried} held")
    print(f"{'':60} tried  held   time")
    for title, tally, seconds in rows:
        print(f"{title:60} {tally.tried:5} {tally.held:5} {seconds:5.0f} s")
    failures = [failure for _, tally, _ in rows for failure in tally.failures]
    print("\n".join(failures))
    return 1 if failures else 0


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
