"""(a) SIGKILL at random moments of whole runs, and (b) writes that fail: each goes on to the same bits."""

from __future__ import annotations

import errno
import random
import signal
import time
from collections.abc import Callable

from .play import Place, Play, Tally, complaints
from .warm import Fault

_ERRORS = {
    "full disk": errno.ENOSPC,
    "I/O error": errno.EIO,
    "read-only": errno.EROFS,
    "quota": errno.EDQUOT,
    "no permission": errno.EACCES,
}
Say = Callable[[str], None]


def kills(play: Play, trials: int, seed: int, say: Say) -> Tally:
    """Kill runs at random moments, the one that goes on, too, now and then, and let them come to their end.

    Every other time the moment is drawn from the clock, else from the calls that change a file: so the short
    moments in which a file is half there are met as well.
    """
    tally, calls = Tally(), play.calls
    for number in range(trials):
        rng = random.Random(seed + number)
        place = play.place(f"kill-{number}")
        words, steps = place.begin(), []
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            fault = Fault(place.folder, rng.randrange(calls), 0) if rng.random() < 0.5 else None
            running = play.warm.start(*words, fault=fault)
            if fault is None:
                wait = rng.uniform(0, 1.1 * play.seconds)
                time.sleep(wait)
                running.signal(signal.SIGKILL)
                steps.append(f"killed after {wait:.2f} s")
            else:
                steps.append(f"killed at call {fault.after}")
            ended = running.wait()
            if ended.code not in (-signal.SIGKILL, 0):
                steps.append(f"ended with {ended.code}: {ended.err[-200:]}")
            words = place.go_on() if (place.run / "config.toml").is_file() else place.begin()
        problems, _ = play.carried_on(place)
        tally.add(
            problems, f"--only a --seed {seed + number} --trials 1 ({', '.join(steps)})", say, place.folder
        )
    return tally


def failing_writes(play: Play, trials: int, seed: int, say: Say) -> Tally:
    """Have writes fail from a random one on, or a few of them; then the disk is well again."""
    tally, calls = Tally(), play.calls
    for number in range(trials):
        rng = random.Random(seed + number)
        place = play.place(f"disk-{number}")
        name = rng.choice(list(_ERRORS))
        fault = Fault(place.folder, rng.randrange(calls), _ERRORS[name], rng.choice((-1, -1, 1, 3)))
        ended = play.warm.run(*place.begin(), fault=fault)
        problems = complaints(ended)
        if ended.code < 0:
            problems.append(f"ended by signal {-ended.code}")
        if ended.code == 0:  # nothing that failed was needed, so the user was told, and the adapter is there
            differing = play.differing(place.run)
        else:
            differing, _ = play.carried_on(place)
        forgiven = {"previews differ"} if "preview" in ended.err or "preview" in _events(place) else set()
        problems += [problem for problem in differing if problem not in forgiven]
        times = "always" if fault.times < 0 else f"{fault.times} times"
        what = f"{name} {times} from call {fault.after} of {calls} on, code {ended.code}"
        tally.add(problems, f"--only b --seed {seed + number} --trials 1 ({what})", say, place.folder)
    return tally


def _events(place: Place) -> str:
    file = place.run / "events.jsonl"
    return file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
