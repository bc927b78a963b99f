"""The process of a job: its command line, and how it is found again by a server that did not start it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from sdlora.config.toml import load_config
from sdlora.errors import SdloraError
from sdlora.files import parse_json
from sdlora.run_folder import RunFolder, list_checkpoints

from .job_record import Job

START_SECONDS = 10.0
"""Seconds that the start of a process takes at most."""
_KERNEL = 2  # parent of Linux' own threads, which never have a command line


def arguments_of(job: Job, settings: Path) -> list[str]:
    """Return what ``sdlora train`` is to be given for a job, whose settings are in a file."""
    if not job.resume:
        return ["--config", str(settings)]
    goes_on = ["--output", str(job.run)]
    if job.goal is not None and _steps_set(job) < job.goal:
        # what was made since the goal was set counts
        return [*goes_on, "--continue-for", str(max(1, job.goal - newest_step(job)))]
    return ["--resume", *goes_on]


def newest_step(job: Job) -> int:
    """Return the step of the newest checkpoint of a job's run; 0 without one."""
    saved = list_checkpoints(RunFolder(job.run).checkpoints)
    return saved[-1].step if saved else 0


def _steps_set(job: Job) -> int:
    """Return how many steps the settings in a job's run folder ask for; 0 if they do not say."""
    with suppress(SdloraError, OSError):
        return load_config(RunFolder(job.run).config_file).training.steps or 0
    return 0


def process_with(word: str) -> psutil.Process | None:
    """Return another process that has this word in its command line."""
    for process in psutil.process_iter(["cmdline"]):
        if word in (process.info["cmdline"] or []) and process.pid != os.getpid():
            return process
    return None


def is_beginning() -> bool:
    """Tell whether some process is so young that it has no command line yet: exec gives it at its end."""
    for process in psutil.process_iter(["cmdline", "status", "create_time", "ppid"]):
        young = time.time() - process.info["create_time"] < START_SECONDS
        zombie = process.info["status"] == psutil.STATUS_ZOMBIE
        if young and process.info["cmdline"] == [] and not zombie and process.info["ppid"] != _KERNEL:
            return True
    return False


def own_group() -> dict[str, Any]:
    """Return the options that keep a job alive when the server or its terminal ends."""
    if sys.platform == "win32":
        return {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP | subprocess.DETACHED_PROCESS}
    return {"start_new_session": True}


def process_of(job: Job) -> psutil.Process | None:
    """Return a job's process while it lives; a later one with the same id is not mistaken for it."""
    if job.pid is None or job.process_started is None:
        return None
    try:
        process = psutil.Process(job.pid)
        same = abs(process.create_time() - job.process_started) < 1
        return process if same and process.status() != psutil.STATUS_ZOMBIE else None
    except psutil.Error:
        return None


def last_json(file: Path) -> dict[str, Any] | None:
    """Return the JSON object in the last line of a file; None without one."""
    with suppress(OSError, ValueError, IndexError):
        value = parse_json(file.read_text(encoding="utf-8").strip().splitlines()[-1])
        return value if isinstance(value, dict) else None
    return None
