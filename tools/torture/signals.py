"""(d) Signals, closed pipes and a clock that jumps; (e) two runs in one folder, and two with one cache."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

from .play import Place, Play, Tally, complaints

_KINDS: dict[str, tuple[int, ...]] = {
    "SIGTERM": (signal.SIGTERM,),
    "SIGINT": (signal.SIGINT,),
    "SIGHUP": (signal.SIGHUP,),
    "SIGINT twice": (signal.SIGINT, signal.SIGINT),
    "SIGTERM twice": (signal.SIGTERM, signal.SIGTERM),
    "SIGINT, SIGTERM, SIGHUP": (signal.SIGINT, signal.SIGTERM, signal.SIGHUP),
}
_OTHERS = ("output closed", "errors closed", "both closed", "clock")


def signals(play: Play, trials: int, seed: int, say: Callable[[str], None]) -> Tally:
    """Send signals at random moments, close the streams, or have the clock jump; then go on."""
    tally, names = Tally(), [*_KINDS, *_OTHERS]
    for number in range(trials):
        rng = random.Random(seed + number)
        name = names[(seed + number) % len(names)]
        place = play.place(f"signal-{number}")
        problems = _signalled(play, place, name, rng) if name in _KINDS else _strained(play, place, name, rng)
        tally.add(problems, f"--only d --seed {seed + number} --trials 1 ({name})", say, place.folder)
    return tally


def _signalled(play: Play, place: Place, name: str, rng: random.Random) -> list[str]:
    running = play.warm.start(*place.begin())
    time.sleep(rng.uniform(0, 1.05 * play.seconds))
    for number in _KINDS[name]:
        running.signal(number)
        time.sleep(rng.choice((0.0, 0.01, 0.2)))
    ended = running.wait()
    problems = complaints(ended)
    if ended.code < 0 and -ended.code not in _KINDS[name]:
        problems.append(f"ended by signal {-ended.code}")
    return problems + play.carried_on(place)[0]


def _strained(play: Play, place: Place, name: str, rng: random.Random) -> list[str]:
    if name == "clock":
        ended = play.warm.run(*place.begin(), clock=rng.randrange(2**31))
    else:
        closed = {"output closed": (1,), "errors closed": (2,)}.get(name, (1, 2))
        ended = play.warm.run(*place.begin(), closed=closed)
    problems = [] if ended.code == 1 and name != "clock" else complaints(ended)
    if ended.code not in (0, 1) or (ended.code == 1 and name == "clock"):
        problems.append(f"exit code {ended.code}: {ended.err[-300:]}")
    return problems + play.differing(place.run)


def pairs(play: Play, trials: int, seed: int, say: Callable[[str], None]) -> Tally:
    """Start two at once: in one folder from the beginning, in one to go on, with one cache for both."""
    tally = Tally()
    kinds = {
        "two begin in one folder": _begin_twice,
        "two go on in one folder": _go_on_twice,
        "one cache": _one_cache,
    }
    for number in range(trials):
        rng = random.Random(seed + number)
        name = list(kinds)[(seed + number) % len(kinds)]
        place = play.place(f"pair-{number}")
        problems = kinds[name](play, place, rng)
        tally.add(problems, f"--only e --seed {seed + number} --trials 1 ({name})", say, place.folder)
    return tally


def _both(play: Play, first: list[str], second: list[str], rng: random.Random) -> tuple[list[str], list[int]]:
    running = [play.warm.start(*first)]
    time.sleep(rng.choice((0.0, 0.0, rng.uniform(0, 0.5 * play.seconds))))
    running.append(play.warm.start(*second))
    ended = [command.wait() for command in running]
    problems = [problem for command in ended for problem in complaints(command)]
    return problems, [command.code for command in ended]


def _begin_twice(play: Play, place: Place, rng: random.Random) -> list[str]:
    problems, codes = _both(play, place.begin(), place.begin(), rng)
    if sorted(codes) != [0, 2]:
        problems.append(f"exit codes {codes}, not one that trains and one that is refused")
    return problems + play.differing(place.run)


def _go_on_twice(play: Play, place: Place, rng: random.Random) -> list[str]:
    running = play.warm.start(*place.begin())
    while running.lives() and not list((place.run / "checkpoints").glob("step-*")):
        time.sleep(0.01)
    running.signal(signal.SIGKILL)
    running.wait()
    problems, codes = _both(play, place.go_on(), place.go_on(), rng)
    if 0 not in codes or set(codes) - {0, 2}:
        problems.append(f"exit codes {codes}")
    return problems + play.differing(place.run)


def _one_cache(play: Play, place: Place, rng: random.Random) -> list[str]:
    second = [word.replace(f"{place.run}", f"{place.run}-2") for word in place.begin()]
    problems, codes = _both(play, place.begin(), second, rng)
    if codes != [0, 0]:
        problems.append(f"exit codes {codes}")
    return problems + play.differing(place.run) + play.differing(Path(f"{place.run}-2"))
