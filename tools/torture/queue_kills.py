"""(f) The server is killed again and again during a queue, or one of two: no job is lost or run twice.

The servers are processes with the page's own queue; what they start is a program that trains nothing but
tells each start, and ends as a training does.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
from sdlora_ui.jobs import JobQueue

from sdlora.config.toml import load_config

from .play import Play, Tally
from .warm import ROOT

_JOBS = 12
_SERVER = """
import sys, time
from pathlib import Path
from sdlora_ui.jobs import JobQueue
queue = JobQueue(Path(sys.argv[1]), Path(sys.argv[2]), program=[sys.executable, sys.argv[3]])
print("ready", flush=True)
while True:
    queue.tick()
    time.sleep(0.005)
"""
_PROGRAM = """
import json, os, sys, time
words = sys.argv[1:]
events = words[words.index("--events") + 1]
with open(os.environ["TORTURE_STARTS"], "a") as starts:
    starts.write(os.path.dirname(events) + "\\n")
time.sleep(float(os.environ["TORTURE_SECONDS"]))
print(json.dumps({"adapter_file": None, "stopped": False}))
"""


def queue_kills(play: Play, trials: int, seed: int, say: Callable[[str], None]) -> Tally:
    """Kill the server at random moments, ``trials`` times in all, one or two servers at a time."""
    tally, left, number = Tally(), trials, 0
    while left > 0:
        rng = random.Random(seed + number)
        folder = play.folder / f"queue-{number}"
        kills, problems = _queue(folder, rng, min(left, rng.randint(3, 8)), servers=1 + number % 2)
        for _ in range(kills):
            words = f"--only f --seed {seed + number} --trials 1 (a queue with {kills} kills)"
            tally.add(problems, words, say, folder)
        left, number = left - kills, number + 1
    return tally


def _queue(folder: Path, rng: random.Random, kills: int, servers: int) -> tuple[int, list[str]]:
    folder.mkdir(parents=True)
    program = folder / "program.py"
    program.write_text(_PROGRAM, encoding="utf-8")
    starts = folder / "starts.txt"
    starts.touch()
    queue = JobQueue(folder / "jobs", folder)
    for number in range(_JOBS):
        queue.add(
            load_config(values={"output.name": f"job{number}", "output.folder": folder / f"run{number}"})
        )
    words = [sys.executable, "-c", _SERVER, str(folder / "jobs"), str(folder), str(program)]
    environment = os.environ | {
        "TORTURE_STARTS": str(starts),
        "TORTURE_SECONDS": f"{rng.uniform(0, 0.25):.3f}",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
    }

    def begin() -> subprocess.Popen[bytes]:
        server = subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, cwd=folder)
        assert server.stdout is not None
        server.stdout.readline()
        return server

    running = [begin() for _ in range(servers)]
    try:
        for _ in range(kills):
            time.sleep(rng.uniform(0, 0.4))
            server = running.pop(0)
            server.send_signal(signal.SIGKILL)
            server.wait()
            running.append(begin())
        end = time.monotonic() + 120
        while any(job.status not in ("finished", "failed", "stopped") for job in queue.all()):
            if time.monotonic() > end:
                break
            time.sleep(0.05)
    finally:
        for server in running:
            server.kill()
            server.wait()
        _end_all(program)
    return kills, _verdict(queue, starts)


def _verdict(queue: JobQueue, starts: Path) -> list[str]:
    jobs = queue.all()
    problems = [] if len(jobs) == _JOBS else [f"{len(jobs)} of {_JOBS} jobs are left"]
    counted = Counter(Path(line).name for line in starts.read_text(encoding="utf-8").split())
    for job in jobs:
        if job.status != "finished":
            problems.append(f"{job.name} is {job.status} {job.error}")
        if counted[job.id] != 1:
            problems.append(f"{job.name} was started {counted[job.id]} times")
    return problems


def _end_all(program: Path) -> None:
    for process in psutil.process_iter(["cmdline"]):
        if str(program) in (process.info["cmdline"] or []):
            with suppress(psutil.Error):
                process.kill()
