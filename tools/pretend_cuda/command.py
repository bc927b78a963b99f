"""``python -m tools.pretend_cuda``: plays scenarios, each in a process of its own, and prints a table."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from .build import PRELOAD, Unavailable, built
from .ledger import ROOT
from .scenarios import SCENARIOS

_SECONDS = 3600  # one scenario's; SDXL's takes 2 minutes of one core, which others may want, too


def main(arguments: Sequence[str] | None = None) -> int:
    """Play what was asked for; return 0 if all went well, 1 if something failed, 2 if nothing can play."""
    parser = argparse.ArgumentParser(prog="python -m tools.pretend_cuda", description=__doc__)
    parser.add_argument("scenario", nargs="*", help="names of scenarios; see --list")
    parser.add_argument("--all", action="store_true", help="play all of them")
    parser.add_argument("--list", action="store_true", help="list them")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that was seen there")
    parser.add_argument("--jobs", type=int, default=1, help="how many at a time")
    parser.add_argument("--trace", action="store_true", help="print where each failure came from")
    given = parser.parse_args(arguments)
    if given.list:
        for name, scenario in SCENARIOS.items():
            print(f"{name:17} {scenario.what}")
        return 0
    unknown = [name for name in given.scenario if name not in SCENARIOS]
    names = list(SCENARIOS) if given.all else given.scenario
    if unknown or not names:
        parser.error(f"no such scenario: {', '.join(unknown)}" if unknown else "name a scenario, or --all")
    answers: dict[str, dict[str, Any]] = {}
    try:
        for name, answer in _table(play_all(names, given.jobs)):
            answers[name] = answer
            if given.json is not None:  # at once: what was seen is not lost if this is ended
                given.json.write_text(json.dumps(answers, indent=1), encoding="utf-8")
    except Unavailable as error:
        print(error, file=sys.stderr)
        return 2
    if given.trace:
        for name, answer in answers.items():
            print(f"\n--- {name}\n{answer['trace']}" if answer["trace"] else "", end="")
    return int(any(answer["outcome"] != "ok" for answer in answers.values()))


def play_all(names: Iterable[str], jobs: int = 1) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (scenario, answer) in the order of ``names``; see :func:`tools.pretend_cuda.play.play`.

    Raises:
        Unavailable: if the pretended device cannot be had here.
    """
    libraries = built()
    with ThreadPoolExecutor(jobs) as pool:
        todo = [(name, pool.submit(play, name, libraries)) for name in names]
        for name, answer in todo:
            yield name, answer.result()


def play(name: str, libraries: Path) -> dict[str, Any]:
    """Play a scenario in a process of its own and return its answer."""
    with tempfile.TemporaryDirectory(prefix="pretend-cuda-") as place:
        answer = Path(place) / "answer.json"
        environment = {
            **os.environ,
            "LD_PRELOAD": str(libraries / PRELOAD),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "SDLORA_CACHE_FOLDER": str(Path(place) / "kept"),
        }
        words = [name, str(libraries), str(Path(place) / "work"), str(answer)]
        try:
            done = subprocess.run(
                [sys.executable, "-m", "tools.pretend_cuda.play", *words],
                **{"cwd": ROOT, "env": environment, "timeout": _SECONDS, "check": False},
                **{"capture_output": True, "text": True},
            )
        except subprocess.TimeoutExpired:
            return _nothing(f"took more than {_SECONDS} s")
        if not answer.is_file():
            return _nothing(
                f"the process died with {done.returncode}: {_last_line(done.stderr)}", done.stderr
            )
        played: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
        played["printed"] = (done.stdout + done.stderr)[-4000:]
        return played


def _nothing(outcome: str, trace: str = "") -> dict[str, Any]:
    counts = dict.fromkeys(("launches", "waits", "bytes_to_card", "bytes_to_host", "peak", "seconds"), 0)
    return {"outcome": outcome, "where": "", "trace": trace, "facts": {}, "notices": [], **counts}


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else "nothing was printed"


def _table(answers: Iterable[tuple[str, dict[str, Any]]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Print a line for each answer as it comes, and pass it on."""
    print(f"{'scenario':17} {'launches':>9} {'waits':>6} {'to card':>9} {'to host':>9} {'peak':>9}  outcome")
    for name, answer in answers:
        sizes = " ".join(f"{_mib(answer[key]):>9}" for key in ("bytes_to_card", "bytes_to_host", "peak"))
        outcome = answer["outcome"] + (f" [{answer['where']}]" if answer["where"] else "")
        if shares := answer["facts"].get("plan_by_peak"):
            outcome += f" (plan by peak: {', '.join(f'{phase} {share}' for phase, share in shares.items())})"
        print(f"{name:17} {answer['launches']:9} {answer['waits']:6} {sizes}  {outcome}", flush=True)
        yield name, answer


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB" if size < 1000 * 2**20 else f"{size / 2**30:.2f} GiB"


def planned_against_peak(answer: Mapping[str, Any]) -> float:
    """Return the plan of an answer's run divided by the live peak of its card."""
    return float(answer["facts"]["planned"]) / float(answer["peak"])
