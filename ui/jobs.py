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

import re
import shutil
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

from sdlora.config.schema import Config
from sdlora.config.toml import save_config
from sdlora.errors import ConfigError, OutputError
from sdlora.files import is_used, parse_json, write_json
from sdlora.run_folder import REQUESTS, STOP, RunFolder

from .job_process import (
    START_SECONDS,
    arguments_of,
    is_beginning,
    last_json,
    newest_step,
    own_group,
    process_of,
    process_with,
)
from .job_record import AT_WORK, ENDED, MOST_STEPS, Job, job_of
from .progress import RunView

_ID = re.compile(r"[0-9]{8}-[0-9]{6}-[0-9a-f]{6}")
LATEST_START = 366 * 86_400.0
"""Seconds from now that a job may be told to wait at most."""
MAX_LOG = 200_000
_LOST = "the process ended without a message: it was killed, or memory ran out; look at the log"


class JobQueue:
    """The jobs below one state folder. Its methods may be called from any thread.

    Attributes:
        held_up: tells why a job cannot start now, in a line; nothing if it can.
        waits_for: names what a job waits for before it starts by itself; nothing if for nothing.
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
        self.waits_for: Callable[[Job], str] = lambda job: ""
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
        return ["sdlora", "train", *arguments_of(self.get(job_id), self._folder / job_id / "run.toml")]

    # --- changing --------------------------------------------------------------------------------------

    def add(self, config: Config, *, not_before: float | None = None) -> Job:
        """Queue a run with these settings; ``output.folder`` must be set.

        Args:
            config: of the run.
            not_before: seconds since 1970 before which it does not start by itself.

        Raises:
            ConfigError: when no run folder is given, or for a time that is too far away.
            OutputError: when another job or run has this folder.
        """
        run = config.output.folder
        if run is None:
            raise ConfigError("`output.folder`: give the run folder")
        _check_time(not_before)
        with self._lock:
            if run.is_file() or is_used(run):
                raise OutputError(f"{run}: exists and is not empty; choose another name")
            if any(job.run == run and job.status not in ENDED for job in self.all()):
                raise OutputError(f"{run}: a job in the queue writes there; choose another name")
            now = time.time()
            stamp = time.strftime("%Y%m%d-%H%M%S", time.localtime(now))
            job = Job(f"{stamp}-{uuid.uuid4().hex[:6]}", config.output.name, run, now, not_before=not_before)
            save_config(config, self._folder / job.id / "run.toml")
            return self._write(job)

    @contextmanager
    def _alone(self, job_id: str) -> Iterator[Job]:
        """Give a job's state, which no other server changes or starts in the meantime.

        Raises:
            ConfigError: when no job has this id, or another server is busy for too long.
        """
        with self._lock:
            try:
                self._starting.acquire(timeout=START_SECONDS)
            except Timeout:
                raise ConfigError("another server is starting a job; try again") from None
            try:
                yield self.get(job_id)
            finally:
                self._starting.release()

    def start(self, job_id: str) -> Job:
        """Start a waiting job now, or next, if another one trains; return its new state.

        Raises:
            ConfigError: when it is not waiting.
            OutputError: when its process cannot be started.
        """
        with self._alone(job_id) as job:
            if job.status != "waiting":
                raise ConfigError(f"{job.name}: is {job.status}, not waiting; resume it instead")
            if why := self.held_up(job):
                raise ConfigError(why)
            first = min(other.order[0] for other in self._waiting())
            return self._launch(self._write(replace(job, not_before=None, place=first - 1)))

    def wait_until(self, job_id: str, not_before: float | None) -> Job:
        """Let a waiting job start by itself only from a time on; with None as soon as it can.

        Args:
            job_id: of the job.
            not_before: seconds since 1970.

        Raises:
            ConfigError: when it is not waiting, or for a time that is too far away.
        """
        _check_time(not_before)
        with self._alone(job_id) as job:
            if job.status != "waiting":
                raise ConfigError(f"{job.name}: is {job.status}, not waiting")
            return self._write(replace(job, not_before=not_before))

    def move(self, job_id: str, by: int) -> Job:
        """Let a waiting job start earlier (``by`` below 0) or later than it would, by that many places.

        Raises:
            ConfigError: when it is not waiting.
        """
        with self._alone(job_id) as job:
            if job.status != "waiting":
                raise ConfigError(f"{job.name}: is {job.status}, not waiting")
            waiting = self._waiting()
            places = [other.order[0] for other in waiting]
            at = [other.id for other in waiting].index(job.id)
            waiting.insert(max(0, at + by), waiting.pop(at))
            for number, (other, place) in enumerate(zip(waiting, places, strict=True)):
                if number:  # two that were made in the same moment stand apart from now on
                    place = places[number] = max(place, places[number - 1] + 1e-3)
                if other.order[0] != place:
                    self._write(replace(other, place=place))
            return self.get(job_id)

    def _waiting(self) -> list[Job]:
        """Return the waiting jobs in the order in which they start."""
        return sorted((job for job in self.all() if job.status == "waiting"), key=lambda job: job.order)

    def stop(self, job_id: str) -> Job:
        """Ask a job to finish its step, save and end; a waiting one only leaves the queue.

        Raises:
            ConfigError: when it has ended already.
        """
        with self._alone(job_id) as job:
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

        It comes after those that wait already.

        Raises:
            ConfigError: when it has not ended, or is complete.
            OutputError: when the run left files, but no checkpoint to continue from.
        """
        with self._alone(job_id) as job:
            if job.status not in ("stopped", "failed"):
                raise ConfigError(f"{job.name}: is {job.status}; only a stopped or failed job can be resumed")
            # a run that ended before its first checkpoint starts again, with the settings in its folder
            begun = RunFolder(job.run).exists()
            if not begun and (job.run.is_file() or is_used(job.run)):
                raise OutputError(f"{job.run}: holds no run to continue; clone the job and start the clone")
            return self._queue_again(replace(job, resume=begun))

    def extend(self, job_id: str, more: int) -> Job:
        """Queue a finished job again, to make that many steps more than it has made.

        Raises:
            ConfigError: when it is not finished, or for a number of steps that no run can make.
            OutputError: when its run has no checkpoint (any more) to continue from.
        """
        with self._alone(job_id) as job:
            if job.status != "finished":
                raise ConfigError(
                    f"{job.name}: is {job.status}; only a finished job can go on for more steps"
                )
            step = newest_step(job)
            if not step:
                raise OutputError(
                    f"{job.run}: has no checkpoint to continue from; clone the job and start the clone"
                )
            if not 1 <= more <= MOST_STEPS - step:
                raise ConfigError(f"{more} steps more: give a number from 1 to {MOST_STEPS - step}")
            return self._queue_again(replace(job, resume=True, goal=step + more))

    def _queue_again(self, job: Job) -> Job:
        job = replace(job, status="waiting", place=time.time(), not_before=None)
        return self._write(replace(job, pid=None, error="", forced=False))

    def delete(self, job_id: str, *, with_run: bool) -> None:
        """Forget an ended or waiting job, and on request remove its run folder.

        Raises:
            ConfigError: when it runs.
            OutputError: when the run folder is not one that a run wrote.
        """
        with self._alone(job_id) as job:
            if job.status in AT_WORK:
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
            waiting = [job for job in self._waiting() if not job.waits]
            if waiting and not any(job.status in AT_WORK for job in self.all()):
                ready = next(
                    (job for job in waiting if not self.held_up(job) and not self.waits_for(job)), None
                )
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
            job = job_of(parse_json(text), job_id)
        except (OSError, ValueError):
            return None
        if job.status in AT_WORK and job.pid is None:
            return self._half_started(job)
        if job.status in AT_WORK and not self._lives(job):
            return self._write(self._outcome(job))
        return job

    def _half_started(self, job: Job) -> Job:
        """Return a job that a server began to start: unchanged while the server lives, else settled."""
        try:
            with self._starting.acquire(timeout=0):
                process = process_with(str(self._folder / job.id / "events.jsonl"))
                if process is None and is_beginning():
                    return job  # perhaps its own: another look tells
                if process is None:
                    # it may have ended since, when the server was killed before it had written its id down
                    ended = last_json(self._folder / job.id / "output.txt") is not None
                    return self._write(self._outcome(job) if ended else replace(job, status="waiting"))
                started = process.create_time()
                return self._write(replace(job, pid=process.pid, process_started=started))
        except (Timeout, OSError, psutil.Error):
            return job

    def _write(self, job: Job) -> Job:
        write_json(self._folder / job.id / "job.json", job.to_dict())
        return job

    def _launch(self, job: Job) -> Job:
        """Start a job unless one runs, by this server or another; return its new state."""
        try:
            with self._starting.acquire(timeout=START_SECONDS):
                jobs = {known.id: known for known in self.all()}
                job = jobs.get(job.id, job)
                if job.status != "waiting" or any(known.status in AT_WORK for known in jobs.values()):
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
            arguments = arguments_of(job, folder / "run.toml")
            for request in REQUESTS:  # left over when a run died before it read them
                (job.run / request).unlink(missing_ok=True)
            with (folder / "log.txt").open("ab") as log, (folder / "output.txt").open("wb") as output:
                process = subprocess.Popen(
                    [*self._program, "train", *arguments, "--events", str(folder / "events.jsonl"), "--json"],
                    cwd=self._home,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=log,
                    **own_group(),
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
        result = last_json(self._folder / job.id / "output.txt")
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


def _check_time(not_before: float | None) -> None:
    """Refuse a time at which no job can be told to start.

    Raises:
        ConfigError: for one that is too far away.
    """
    if not_before is not None and not 0 <= not_before <= time.time() + LATEST_START:
        raise ConfigError("start: give a time within a year from now")
