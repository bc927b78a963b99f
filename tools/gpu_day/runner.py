"""Runs the jobs one after the other within the day's time, and keeps what each left as soon as it ended.

``report.json`` in the output folder is the state: a second call with the same folder goes on with what was
not done, also on another machine to which only that folder came.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from sdlora.files import parse_json, write_text

from .jobs import ROOT, Job, interpreter
from .report import as_markdown

_TAIL = 40  # lines of a failed job's log that go into the report
_MISSING = "pip install"  # a job that ends with such advice lacks something optional


@dataclass
class Day:
    """The state of the day.

    Attributes:
        output: folder of the report.
        work: folder of everything large.
        deadline: by ``time.monotonic()``.
        environment: of the jobs, besides this process' own.
        facts: about this call, for the report's head.
        calls: facts of this call and those before.
        results: job -> its result, of this call and those before.
        least: seconds that must be left for anything to be begun.
    """

    output: Path
    work: Path
    deadline: float
    environment: Mapping[str, str] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    calls: list[dict[str, Any]] = field(default_factory=list)
    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    least: float = 8.0

    def resume(self, again: Callable[[str], bool] = lambda state: False) -> None:
        """Take over the results of earlier calls, but those in a state to be done again.

        Raises:
            ValueError: if they were made on something else than this call's.
        """
        file = self.output / "report.json"
        if file.is_file():
            earlier = parse_json(file.read_bytes())
            kinds = {call.get("on") for call in (*earlier["calls"], self.facts)}
            if len(kinds) > 1:
                raise ValueError(f"{file}: is of {earlier['calls'][-1].get('on')}; choose another --output")
            self.calls = earlier["calls"]
            jobs = earlier["jobs"].items()
            self.results = {name: result for name, result in jobs if not again(result["state"])}
        self.calls.append(self.facts)

    @property
    def left(self) -> float:
        """Seconds left."""
        return self.deadline - time.monotonic()

    def run(self, jobs: Sequence[Job], wanted: Callable[[str], bool] = lambda name: True) -> list[str]:
        """Do what was not done and fits; return the names of what is left for another call."""
        known = {job.name: job for job in jobs}
        for job in jobs:
            # a product is made when something needs it
            if wanted(job.name) and job.product is None and job.name not in self.results:
                self._do(job, known)
        return [
            job.name for job in jobs if wanted(job.name) and not job.product and job.name not in self.results
        ]

    def _do(self, job: Job, known: Mapping[str, Job]) -> bool:
        """Do a job after those it needs; return whether it ended well."""
        if job.skip:
            return self._keep(job, {"state": "skipped", "why": job.skip})
        missing = [known[name] for name in job.needs]
        if self.left < self.least + job.seconds + sum(n.seconds for n in missing if not _there(n)):
            return False
        for need in missing:
            if _there(need):
                continue
            if self.results.get(need.name, {}).get("state") in ("failed", "too long"):
                return self._keep(job, {"state": "skipped", "why": f"{need.name} failed"})
            if not self._do(need, known):
                return False
        return self._run(job)

    def _run(self, job: Job) -> bool:
        answer, log = (self.work / "logs" / f"{job.name}.{ending}" for ending in ("json", "log"))
        answer.parent.mkdir(parents=True, exist_ok=True)
        answer.unlink(missing_ok=True)
        words = [interpreter(), *(word.replace("{answer}", str(answer)) for word in job.command)]
        began, bound = time.monotonic(), min(job.limit, self.left)
        print(f"{job.name}: {self.left / 60:.1f} min left", flush=True)
        with log.open("w", encoding="utf-8") as stream:
            process = subprocess.Popen(
                words,
                **{"cwd": ROOT, "stdout": stream, "stderr": subprocess.STDOUT, "start_new_session": True},
                env={**_always(), **self.environment, **job.environment},
            )
            try:
                code: int | None = process.wait(max(0.1, bound))
            except subprocess.TimeoutExpired:
                code = None
            finally:
                _end(process)
        seconds = round(time.monotonic() - began, 1)
        if code is None and bound < job.limit:
            print(f"{job.name}: cut off by the end of the time", flush=True)
            return False  # it is left for another call
        tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-_TAIL:]
        result = {
            "call": len(self.calls),
            "seconds": seconds,
            "command": " ".join(words[1:]),
            "answer": _read(answer),
        }
        result |= _outcome(code, result["answer"], tail, job.limit)
        return self._keep(job, result, log)

    def _keep(self, job: Job, result: dict[str, Any], log: Path | None = None) -> bool:
        """Write a result down at once, and its log."""
        self.results[job.name] = result
        if log is not None:
            with zipfile.ZipFile(self.output / "logs.zip", "a", zipfile.ZIP_DEFLATED) as kept:
                if log.name in kept.namelist():
                    kept.writestr(f"{job.name}.{len(kept.namelist())}.log", log.read_bytes())
                else:
                    kept.write(log, log.name)
        print(f"{job.name}: {result['state']}{_why(result)}", flush=True)
        self.write()
        return result["state"] == "ok"

    def write(self, left: Sequence[str] = ()) -> None:
        """Write the report as it is now."""
        whole = {"calls": self.calls, "left": list(left), "jobs": self.results}
        write_text(self.output / "report.json", json.dumps(whole, indent=1, default=str))
        write_text(self.output / "report.md", as_markdown(whole))


def _always() -> dict[str, str]:
    """Return every job's environment; a checkout that is not installed is found, too."""
    path = os.pathsep.join(part for part in (str(ROOT), os.environ.get("PYTHONPATH")) if part)
    return {**os.environ, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": path}


def _there(job: Job) -> bool:
    return job.product is not None and job.product.exists()


def _outcome(code: int | None, answer: Any, tail: list[str], limit: float) -> dict[str, Any]:
    if code is None:
        return {"state": "too long", "why": f"ended after {limit:.0f} s", "tail": tail}
    if isinstance(answer, dict) and answer.get("skipped"):
        return {"state": "skipped", "why": answer["skipped"]}
    if code == 0:
        return {"state": "ok"}
    faults = answer.get("faults") or answer.get("problems") if isinstance(answer, dict) else None
    last_words = next((line for line in reversed(tail) if line.strip()), f"exit code {code}")
    if not faults and _MISSING in last_words and ("Error" in last_words or last_words.startswith("sdlora: ")):
        return {"state": "skipped", "why": last_words.strip()}
    return {"state": "failed", "why": "; ".join(faults) if faults else last_words.strip(), "tail": tail}


def _why(result: Mapping[str, Any]) -> str:
    return f" ({result['why'][:300]})" if result.get("why") else ""


def _read(answer: Path) -> Any:
    with suppress(OSError, ValueError):
        return parse_json(answer.read_bytes())
    return None


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a job and all that it started, even if it ended itself."""
    if os.name == "posix":  # it leads a session of its own
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    else:
        with suppress(psutil.NoSuchProcess):
            for child in psutil.Process(process.pid).children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    child.kill()
        process.kill()
    process.wait()
