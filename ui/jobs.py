"""A queue of training jobs that survives the server: its state is on disk, its jobs are processes.

Several servers may share it. A server that starts a job holds the queue's lock, which the operating system
releases when its owner dies, and reads the states again under it. A job is marked as running before its
process exists, so that a server killed in between causes no second start: a server that finds such a job
looks for a process with its command line, and takes it over or puts the job back.

A job is a folder with ``run.toml`` (what ``sdlora train --config`` gets), ``events.jsonl``, ``log.txt``,
``output.txt`` (the command's JSON result) and ``job.json``. One job trains at a time. A job continues when
the server ends; the next server takes it over by its process id.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import psutil
from filelock import FileLock, Timeout

from sdlora.config.schema import Config
from sdlora.config.toml import save_config
from sdlora.errors import ConfigError, OutputError
from sdlora.files import is_used, parse_json, write_json
from sdlora.run_folder import REQUESTS, STOP, RunFolder

from .progress import RunView

Status = Literal["waiting", "running", "stopping", "stopped", "finished", "failed"]
ENDED: tuple[Status, ...] = ("stopped", "finished", "failed")
_ID = re.compile(r"[0-9]{8}-[0-9]{6}-[0-9a-f]{6}")
_AT_WORK: tuple[Status, ...] = ("running", "stopping")
_START_SECONDS = 10.0
_KERNEL = 2  # parent of Linux' own threads, which never have a command line
MAX_LOG = 200_000
_LOST = "the process ended without a message: it was killed, or memory ran out; look at the log"


@dataclass(frozen=True)
class Job:
    """One training run in the queue.

    Attributes:
        id: name of its folder.
        name: of the adapter.
        run: run folder.
        created: seconds since 1970.
        status: see :data:`Status`.
        resume: whether the next start continues from a checkpoint.
        pid: of its process.
        process_started: when that process was created; distinguishes it from a later one with the same id.
        forced: whether it was killed instead of being asked to stop.
        error: the command's error text.
    """

    id: str
    name: str
    run: Path
    created: float
    status: Status = "waiting"
    resume: bool = False
    pid: int | None = None
    process_started: float | None = None
    forced: bool = False
    error: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return asdict(self) | {"run": str(self.run)}


class JobQueue:
    """The jobs below one state folder. Its methods may be called from any thread.

    Attributes:
        held_up: tells why a job cannot start now, in a line; nothing if it can.
    """

    def __init__(self, folder: Path, home: Path, program: Sequence[str] | None = None) -> None:
        """Take over the jobs of an earlier server.

        Args:
            folder: holds one folder for each job.
            home: working folder of the jobs' processes.
            program: the program that runs a job's command; this Python's ``-m sdlora`` when None.
        """
        self._folder, self._home = folder, home
        self._program = tuple(program or (sys.executable, "-m", "sdlora"))
        self._lock = threading.RLock()
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._views: dict[str, RunView] = {}
        self._ended = threading.Event()
        folder.mkdir(parents=True, exist_ok=True)
        self.held_up: Callable[[Job], str] = lambda job: ""
        self._starting = FileLock(folder / "starting.lock", thread_local=False)

    # --- reading ---------------------------------------------------------------------------------------

    def all(self) -> list[Job]:
        """Return every job in its current state, the oldest first."""
        with self._lock:
            names = [path.name for path in self._folder.iterdir() if _ID.fullmatch(path.name)]
            jobs = [job for name in names if (job := self._read(name)) is not None]
            return sorted(jobs, key=lambda job: (job.created, job.id))

    def get(self, job_id: str) -> Job:
        """Return one job.

        Raises:
            ConfigError: when no job has this id.
        """
        with self._lock:
            job = self._read(job_id) if _ID.fullmatch(job_id) else None
        if job is None:
            raise ConfigError(f"job {job_id}: there is none (any more); reload the page")
        return job

    def view(self, job_id: str) -> RunView:
        """Return what a job's events say so far."""
        with self._lock:
            view = self._views.setdefault(job_id, RunView(self._folder / job_id / "events.jsonl"))
            view.refresh()
            return view

    def settings(self, job_id: str) -> Path:
        """Return the job's own TOML file."""
        return self._folder / self.get(job_id).id / "run.toml"

    def log(self, job_id: str) -> str:
        """Return the end of the log of the job's process."""
        file = self._folder / self.get(job_id).id / "log.txt"
        with suppress(OSError), file.open("rb") as stream:
            stream.seek(max(0, file.stat().st_size - MAX_LOG))
            return stream.read().decode("utf-8", "replace")
        return ""

    def command(self, job_id: str) -> list[str]:
        """Return the shell command that is equivalent to this job."""
        job = self.get(job_id)
        if job.resume:
            return ["sdlora", "train", "--resume", "--output", str(job.run)]
        return ["sdlora", "train", "--config", str(self._folder / job_id / "run.toml")]

    # --- changing --------------------------------------------------------------------------------------

    def add(self, config: Config) -> Job:
        """Queue a run with these settings; ``output.folder`` must be set.

        Raises:
            ConfigError: when no run folder is given.
            OutputError: when another job or run has this folder.
        """
        run = config.output.folder
        if run is None:
            raise ConfigError("`output.folder`: give the run folder")
        with self._lock:
            if run.is_file() or is_used(run):
                raise OutputError(f"{run}: exists and is not empty; choose another name")
            if any(job.run == run and job.status not in ENDED for job in self.all()):
                raise OutputError(f"{run}: a job in the queue writes there; choose another name")
            now = time.time()
            stamp = time.strftime("%Y%m%d-%H%M%S", time.localtime(now))
            job = Job(f"{stamp}-{uuid.uuid4().hex[:6]}", config.output.name, run, now)
            save_config(config, self._folder / job.id / "run.toml")
            return self._write(job)

    def start(self, job_id: str) -> Job:
        """Start a waiting job now, unless another one trains; return its new state.

        Raises:
            ConfigError: when it is not waiting.
            OutputError: when its process cannot be started.
        """
        with self._lock:
            job = self.get(job_id)
            if job.status != "waiting":
                raise ConfigError(f"{job.name}: is {job.status}, not waiting; resume it instead")
            if why := self.held_up(job):
                raise ConfigError(why)
            return self._launch(job)

    def stop(self, job_id: str) -> Job:
        """Ask a job to finish its step, save and end; a waiting one only leaves the queue.

        Raises:
            ConfigError: when it has ended already.
        """
        with self._lock:
            job = self.get(job_id)
            if job.status == "waiting":
                return self._write(replace(job, status="stopped"))
            if job.status != "running":
                raise ConfigError(f"{job.name}: is {job.status} and cannot be stopped")
            self._ask_to_stop(job)
            return self._write(replace(job, status="stopping"))

    def kill(self, job_id: str) -> Job:
        """End a job's process at once; its last checkpoint remains.

        Raises:
            ConfigError: when it is not running.
        """
        with self._lock:
            job = self.get(job_id)
            process = process_of(job)
            if process is None:
                raise ConfigError(f"{job.name}: is not running; reload the page")
            self._write(replace(job, forced=True))
            for member in [*process.children(recursive=True), process]:
                with suppress(psutil.NoSuchProcess):
                    member.kill()
            return job

    def request(self, job_id: str, what: str) -> None:
        """Ask a running job for a checkpoint (``SAVE``) or for previews (``SAMPLE``) after its current step.

        Raises:
            ConfigError: when it is not training.
        """
        job = self.get(job_id)
        if job.status != "running" or not self.view(job_id).started:
            raise ConfigError(f"{job.name}: is not training right now; try again while it trains")
        RunFolder(job.run).request_file(what).touch()

    def resume(self, job_id: str) -> Job:
        """Queue an ended job again, from its newest checkpoint, or from the start if it never began.

        Raises:
            ConfigError: when it has not ended, or is complete.
            OutputError: when the run left files, but no checkpoint to continue from.
        """
        with self._lock:
            job = self.get(job_id)
            if job.status not in ("stopped", "failed"):
                raise ConfigError(f"{job.name}: is {job.status}; only a stopped or failed job can be resumed")
            # a run that ended before its first checkpoint starts again, with the settings in its folder
            begun = RunFolder(job.run).exists()
            if not begun and (job.run.is_file() or is_used(job.run)):
                raise OutputError(f"{job.run}: holds no run to continue; clone the job and start the clone")
            return self._write(replace(job, status="waiting", resume=begun, pid=None, error="", forced=False))

    def delete(self, job_id: str, *, with_run: bool) -> None:
        """Forget an ended or waiting job, and on request remove its run folder.

        Raises:
            ConfigError: when it runs.
            OutputError: when the run folder is not one that a run wrote.
        """
        with self._lock:
            job = self.get(job_id)
            if job.status in ("running", "stopping"):
                raise ConfigError(f"{job.name}: is {job.status}; stop it first")
            if with_run and job.run.exists():
                if not RunFolder(job.run).exists():
                    raise OutputError(f"{job.run}: was not written by a training run; remove it yourself")
                shutil.rmtree(job.run)
            shutil.rmtree(self._folder / job.id)
            self._views.pop(job.id, None)

    # --- running the queue -----------------------------------------------------------------------------

    def tick(self) -> None:
        """Start the next waiting job if none runs."""
        with self._lock:
            jobs = self.all()
            waiting = [job for job in jobs if job.status == "waiting"]
            if waiting and not any(job.status in _AT_WORK for job in jobs):
                ready = next((job for job in waiting if not self.held_up(job)), None)
                if ready is not None:
                    self._launch(ready)

    def run_in_background(self, every: float = 0.5) -> None:
        """Keep the queue going in a daemon thread until :meth:`close`."""

        def work() -> None:
            while not self._ended.wait(every):
                with suppress(OSError, OutputError):  # a disk that is full now may have room at the next tick
                    self.tick()

        threading.Thread(target=work, name="job queue", daemon=True).start()

    def close(self) -> None:
        """Stop the queue; running jobs continue."""
        self._ended.set()

    # --- on disk and in the process table ---------------------------------------------------------------

    def _read(self, job_id: str) -> Job | None:
        try:
            text = (self._folder / job_id / "job.json").read_text(encoding="utf-8")
            job = _job_of(parse_json(text), job_id)
        except (OSError, ValueError):
            return None
        if job.status in _AT_WORK and job.pid is None:
            return self._half_started(job)
        if job.status in _AT_WORK and not self._lives(job):
            return self._write(self._outcome(job))
        return job

    def _half_started(self, job: Job) -> Job:
        """Return a job that a server began to start: unchanged while the server lives, else settled."""
        try:
            with self._starting.acquire(timeout=0):
                process = self._process_of_command(job)
                if process is None and _is_beginning():
                    return job  # perhaps its own: another look tells
                if process is None:
                    # it may have ended since, when the server was killed before it had written its id down
                    ended = _last_json(self._folder / job.id / "output.txt") is not None
                    return self._write(self._outcome(job) if ended else replace(job, status="waiting"))
                started = process.create_time()
                return self._write(replace(job, pid=process.pid, process_started=started))
        except (Timeout, OSError, psutil.Error):
            return job

    def _process_of_command(self, job: Job) -> psutil.Process | None:
        """Return the process that trains a job, found by the event file in its command line."""
        events = str(self._folder / job.id / "events.jsonl")
        for process in psutil.process_iter(["cmdline"]):
            words = process.info["cmdline"] or []
            if events in words and process.pid != os.getpid():
                return process
        return None

    def _write(self, job: Job) -> Job:
        write_json(self._folder / job.id / "job.json", job.to_dict())
        return job

    def _launch(self, job: Job) -> Job:
        """Start a job unless one runs, by this server or another; return its new state."""
        try:
            with self._starting.acquire(timeout=_START_SECONDS):
                jobs = {known.id: known for known in self.all()}
                job = jobs.get(job.id, job)
                if job.status != "waiting" or any(known.status in _AT_WORK for known in jobs.values()):
                    return job
                return self._launch_alone(job)
        except Timeout:  # another server is starting one
            return job

    def _launch_alone(self, job: Job) -> Job:
        folder = self._folder / job.id
        # what an earlier start answered must not be taken for this one's
        (folder / "output.txt").unlink(missing_ok=True)
        job = self._write(replace(job, status="running", pid=None, process_started=None, error=""))
        try:
            arguments = ["--config", str(folder / "run.toml")]
            if job.resume:
                arguments = ["--resume", "--output", str(job.run)]
            for request in REQUESTS:  # left over when a run died before it read them
                (job.run / request).unlink(missing_ok=True)
            with (folder / "log.txt").open("ab") as log, (folder / "output.txt").open("wb") as output:
                process = subprocess.Popen(
                    [*self._program, "train", *arguments, "--events", str(folder / "events.jsonl"), "--json"],
                    cwd=self._home,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=log,
                    **_own_group(),
                )
            self._processes[job.id] = process
            self.view(job.id).begin()
            started = psutil.Process(process.pid).create_time()
            return self._write(replace(job, pid=process.pid, process_started=started))
        except (OSError, psutil.Error) as error:
            return self._write(replace(job, status="failed", error=f"could not be started: {error}"))

    def _lives(self, job: Job) -> bool:
        started = self._processes.get(job.id)
        if started is not None and started.pid == job.pid:
            return started.poll() is None
        return process_of(job) is not None

    def _outcome(self, job: Job) -> Job:
        """Return a job whose process has ended with its outcome."""
        result = _last_json(self._folder / job.id / "output.txt")
        if result is None:
            if job.forced or job.status == "stopping":
                return replace(job, status="stopped", pid=None, error="")
            return replace(job, status="failed", pid=None, error=_LOST)
        if "error" in result:
            if job.status == "stopping" and result["error"] == "interrupted":
                return replace(job, status="stopped", pid=None)
            return replace(job, status="failed", pid=None, error=str(result["error"]))
        return replace(job, status="stopped" if result.get("stopped") else "finished", pid=None)

    def _ask_to_stop(self, job: Job) -> None:
        if self.view(job.id).started and job.run.is_dir():
            RunFolder(job.run).request_file(STOP).touch()
            return
        process = process_of(job)
        if process is not None:
            # before the first step nothing is lost; on POSIX the run still saves and ends by itself
            with suppress(psutil.NoSuchProcess):
                process.terminate()


def _is_beginning() -> bool:
    """Tell whether some process is so young that it has no command line yet: exec gives it at its end."""
    for process in psutil.process_iter(["cmdline", "status", "create_time", "ppid"]):
        young = time.time() - process.info["create_time"] < _START_SECONDS
        zombie = process.info["status"] == psutil.STATUS_ZOMBIE
        if young and process.info["cmdline"] == [] and not zombie and process.info["ppid"] != _KERNEL:
            return True
    return False


def _job_of(values: Any, job_id: str) -> Job:
    """Return the job that a file describes.

    Raises:
        ValueError: when it describes none: such a folder is passed over.
    """
    kinds = get_type_hints(Job) | {"run": str}
    if not isinstance(values, dict) or not {"name", "run", "created"} <= values.keys() <= kinds.keys():
        raise ValueError("not a job")
    for key, value in values.items():
        allowed = get_args(kinds[key]) or (kinds[key],)
        if value not in allowed if get_origin(kinds[key]) is Literal else type(value) not in allowed:
            raise ValueError(f"`{key}` is no {kinds[key]}")
    if "\0" in values["run"]:
        raise ValueError("no path has zero bytes")
    pid = values.get("pid")
    if pid is not None and not 0 < pid < 2**31:
        raise ValueError("no process has such an id")
    return Job(**(values | {"id": job_id, "run": Path(values["run"])}))


def _own_group() -> dict[str, Any]:
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


def _last_json(file: Path) -> dict[str, Any] | None:
    with suppress(OSError, ValueError, IndexError):
        value = parse_json(file.read_text(encoding="utf-8").strip().splitlines()[-1])
        return value if isinstance(value, dict) else None
    return None
