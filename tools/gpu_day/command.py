"""``python -m tools.gpu_day``: does what only a card can show, as much as fits into the time, and reports.

Everything is one call's or several': a second one with the same --output continues. Exit code 0: all is done
and well; 1: something failed; 2: there is no card; 3: all is well, but not all is done.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from .jobs import ROOT, Setting, all_jobs, interpreter
from .runner import Day

_NEEDED = (
    *("torch", "diffusers", "transformers", "peft", "accelerate", "safetensors", "tokenizers", "numpy"),
    *("pydantic", "platformdirs", "psutil", "filelock", "rich", "matplotlib", "tomli_w", "PIL"),
    *("pytest", "xdist", "pytest_timeout", "hypothesis"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Spend the time that is given."""
    began = time.monotonic()
    given = _parser().parse_args(arguments)
    if missing := [name for name in _NEEDED if importlib.util.find_spec(name) is None]:
        print(
            f"gpu_day: not installed: {', '.join(missing)}; run `pip install -e '.[test]'` first",
            file=sys.stderr,
        )
        return 2
    environment = {"SDLORA_CACHE_FOLDER": str(given.work / "kept"), "SDLORA_TRUE_BASES": str(given.work)}
    libraries = None
    if given.rehearse == "pretend":
        from tools.pretend_cuda.build import PRELOAD, Unavailable, built

        try:
            libraries = built()
        except Unavailable as error:
            print(f"gpu_day: {error}", file=sys.stderr)
            return 2
        environment |= {"LD_PRELOAD": str(libraries / PRELOAD), "OMP_NUM_THREADS": "1"}
    setting = Setting(
        work=given.work.resolve(),
        rehearsal=given.rehearse,
        libraries=libraries,
        peer=given.peer_script.resolve() if given.peer_script else None,
        kohya=given.kohya.resolve() if given.kohya else None,
    )
    jobs = all_jobs(setting)
    if given.list:
        print("\n".join(job.name for job in jobs))
        return 0
    if unknown := set(given.only or ()) - {job.name for job in jobs}:
        print(f"gpu_day: no such job: {', '.join(sorted(unknown))}; see --list", file=sys.stderr)
        return 2
    if given.rehearse is None and (problem := _no_card()):
        print(
            f"gpu_day: {problem}; `sdlora doctor` tells more, and --rehearse cpu tries all this without",
            file=sys.stderr,
        )
        return 2
    output = given.output or ROOT / "build" / "gpu-day" / (given.rehearse or "report")
    output.mkdir(parents=True, exist_ok=True)
    setting.work.mkdir(parents=True, exist_ok=True)
    facts = {"commit": _commit(), "at": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())}
    facts |= {
        "on": f"a rehearsal on {given.rehearse}" if given.rehearse else "a card",
        "minutes": given.minutes,
    }
    day = Day(output.resolve(), setting.work, began + 60 * given.minutes, environment, facts)
    try:
        day.resume(lambda state: given.again and state != "ok")
    except ValueError as error:
        print(f"gpu_day: {error}", file=sys.stderr)
        return 2
    left = day.run(jobs, lambda name: not given.only or name in given.only)
    day.write(left)
    return _ended(day, left)


def _ended(day: Day, left: Sequence[str]) -> int:
    failed = [name for name, result in day.results.items() if result["state"] in ("failed", "too long")]
    print(f"{day.output / 'report.md'}: {len(day.results)} jobs, {len(failed)} failed, {len(left)} left")
    if left:
        print("go on with the same command")
    return 1 if failed else 3 if left else 0


def _no_card() -> str:
    """Return why nothing can be done here; asked in another process, so that this one holds no memory."""
    code = (
        "from sdlora.machine import idle_card_notice\nimport torch\n"
        "print(idle_card_notice() or ('' if torch.cuda.is_available() else 'there is no card here'))"
    )
    done = subprocess.run([interpreter(), "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    return lines[-1] if lines else ""


def _commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tools.gpu_day", description=__doc__)
    parser.add_argument("--minutes", type=float, default=25.0, help="that this call may take")
    parser.add_argument(
        "--output", type=Path, help="report.md, report.json, logs.zip; below build/gpu-day when left out"
    )
    parser.add_argument(
        "--work", type=Path, default=ROOT / "build" / "gpu-day", help="bases (10 GB), runs, logs"
    )
    parser.add_argument("--rehearse", choices=["cpu", "pretend"], help="without a card, with narrow bases")
    parser.add_argument("--peer-script", type=Path, help="diffusers' train_text_to_image_lora.py")
    parser.add_argument("--kohya", type=Path, help="a checkout of kohya's sd-scripts, its packages installed")
    parser.add_argument("--only", nargs="+", metavar="JOB", help="these jobs")
    parser.add_argument("--again", action="store_true", help="do again what did not end well")
    parser.add_argument("--list", action="store_true", help="list the jobs, the most valuable ones first")
    return parser


if os.name == "nt":  # a console there may not know what the report holds
    for stream in (sys.stdout, sys.stderr):
        getattr(stream, "reconfigure", lambda **_: None)(errors="replace")
