"""Runs that somebody started in a shell, below the folder of runs: seen while they train, and asked to stop.

Only those that train, or did when this server looked at them before: what lies there from earlier is no news.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdlora.errors import ConfigError
from sdlora.run_folder import REQUESTS, STOP, RunFolder

from .job_record import Status
from .progress import RunView
from .server.allowed_paths import STATE, AllowedPaths

MOST_FOLDERS = 2000
"""Run folders that are looked at."""
_LOCKS = Path("/proc/locks")
_QUIET_SECONDS = 600.0  # after which a run without a sign is taken to be over, where locks cannot be seen
_LOOK_EVERY = 3.0
PREFIX = "run-"
"""How the ids of such runs begin; no job's does."""


@dataclass
class ShellRun:
    """A run that no job of the queue started."""

    id: str
    folder: RunFolder
    created: float
    view: RunView
    held: bool = True

    @property
    def status(self) -> Status:
        """What the queue would call it."""
        if self.held:
            return "stopping" if self.folder.request_file(STOP).exists() else "running"
        return "finished" if self.view.ended and self.view.adapter_file else "stopped"

    def to_dict(self) -> dict[str, Any]:
        """Return what the queue shows of a job, as JSON values."""
        values = {"id": self.id, "name": self.folder.path.name, "run": str(self.folder.path)}
        state = {"created": self.created, "status": self.status, "error": "", "shell": True}
        return values | state | {"order": 0.0, "waits": False, "not_before": None} | self.view.brief()


class ShellRuns:
    """Those of one server; its methods may be called from any thread."""

    def __init__(self, paths: AllowedPaths) -> None:
        """Look at nothing yet."""
        self._paths, self._lock = paths, threading.Lock()
        self._known: dict[str, ShellRun] = {}
        self._looked = float("-inf")

    def listed(self, of_jobs: Collection[Path]) -> list[ShellRun]:
        """Return the runs that train or did, in the order in which they began.

        Args:
            of_jobs: run folders of the queue's jobs, which are not among them.
        """
        with self._lock:
            if time.monotonic() - self._looked >= _LOOK_EVERY:
                self._look(of_jobs)
                self._looked = time.monotonic()
            runs = [run for run in self._known.values() if run.folder.path not in of_jobs]
            for run in runs:
                run.view.refresh()
            return sorted(runs, key=lambda run: run.created)

    def get(self, run_id: str) -> ShellRun:
        """Return one run.

        Raises:
            ConfigError: when none has this id.
        """
        with self._lock:
            run = self._known.get(run_id)
            if run is None:
                raise ConfigError(f"job {run_id}: there is none (any more); reload the page")
            run.view.refresh()
            return run

    def request(self, run_id: str, what: str) -> ShellRun:
        """Ask a run to stop, to save or to draw previews: one of :data:`sdlora.run_folder.REQUESTS`.

        Raises:
            ConfigError: when it does not train.
        """
        run = self.get(run_id)
        if not run.held or what not in REQUESTS:
            raise ConfigError(f"{run.folder.path.name}: is not training right now; try again while it trains")
        run.folder.request_file(what).touch()
        return run

    def _look(self, of_jobs: Collection[Path]) -> None:
        locks = held_inodes()
        with suppress(OSError):
            for path in list(self._paths.runs.iterdir())[:MOST_FOLDERS]:
                folder, run_id = RunFolder(path), PREFIX + hashlib.sha256(str(path).encode()).hexdigest()[:12]
                if path.name == STATE or path in of_jobs:
                    continue
                held = folder.exists() and trains(folder, locks)
                if run_id in self._known:
                    self._known[run_id].held = held
                elif held and all(map(self._paths.reaches, (folder.config_file, folder.events_file))):
                    begun = folder.config_file.stat().st_mtime
                    self._known[run_id] = ShellRun(run_id, folder, begun, RunView(folder.events_file))
        gone = [run_id for run_id, run in self._known.items() if not run.folder.exists()]
        for run_id in gone:
            del self._known[run_id]


def trains(folder: RunFolder, locks: set[int] | None) -> bool:
    """Tell whether a process trains in a folder; its lock is not tried, as the run would find it taken."""
    try:
        if locks is not None:
            return folder.lock_file.stat().st_ino in locks
        quiet = time.time() - folder.events_file.stat().st_mtime
    except OSError:
        return False
    view = RunView(folder.events_file)
    view.refresh()
    return quiet < _QUIET_SECONDS and not view.ended


def held_inodes() -> set[int] | None:
    """Return the inodes of the files that are locked now, as Linux lists them; None elsewhere."""
    try:
        lines = _LOCKS.read_text().splitlines()
    except OSError:
        return None
    places = [word for line in lines for word in line.split() if word.count(":") == 2]
    return {int(place.rpartition(":")[2]) for place in places if place.rpartition(":")[2].isdigit()}
