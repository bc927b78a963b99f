"""What all pages share: the folders, the queue and the workers."""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from sdlora.config.toml import load_config
from sdlora.errors import SdloraError
from sdlora.run_folder import CheckpointFolder, RunFolder, list_checkpoints

from .bases import Bases
from .captioning import Captioning
from .drafts import Drafts
from .job_record import Job
from .jobs import JobQueue
from .owner import Owner
from .plans import Plans
from .server.allowed_paths import STATE, AllowedPaths, model_files
from .settings import folders_of
from .shell_runs import ShellRuns
from .worker_client import WorkerClient

EXPORTED = "exported"
"""Folder below the runs where exports go unless another one is named."""
_TEND_EVERY = 5.0


@dataclass(frozen=True)
class Choice:
    """An entry of a list to choose from: the text shown, and the path behind it."""

    label: str
    path: str


@dataclass
class Site:
    """The parts of one server.

    The workers start when something needs torch: one draws, one plans, exports and changes adapters, one
    captions.
    """

    paths: AllowedPaths
    queue: JobQueue
    draw: WorkerClient = field(init=False)
    desk: WorkerClient = field(init=False)
    captioning: Captioning = field(init=False)
    plans: Plans = field(init=False)
    drafts: Drafts = field(init=False)
    owner: Owner = field(init=False)
    known_bases: Bases = field(init=False)
    fetch: WorkerClient = field(init=False)
    shell_runs: ShellRuns = field(init=False)
    _ended: threading.Event = field(default_factory=threading.Event)
    _endpoint_before: str | None = field(default_factory=lambda: os.environ.get("HF_ENDPOINT"))

    def __post_init__(self) -> None:
        """Make the workers, without starting them, and the store for forms."""
        self.draw, self.desk = WorkerClient(self.paths.home), WorkerClient(self.paths.home)
        self.captioning = Captioning(self.paths, WorkerClient(self.paths.home, idle_seconds=_TEND_EVERY))
        self.plans = Plans(self.desk, self.queue)
        self.drafts = Drafts(self.paths.state / "forms")
        self.fetch = WorkerClient(self.paths.home, idle_seconds=_TEND_EVERY)
        self.owner = Owner(self.paths)
        self.known_bases = Bases(
            self.paths, self.owner, WorkerClient(self.paths.home, idle_seconds=_TEND_EVERY)
        )
        self.queue.held_up = self._held_up
        self.shell_runs = ShellRuns(self.paths)
        self.queue.waits_for = self._waits_for
        if self.owner.endpoint:
            self.use_endpoint()

    @classmethod
    def open(cls, paths: AllowedPaths) -> Site:
        """Return a site over these folders, which are made where they are missing."""
        for folder in (paths.runs, paths.images, paths.data, paths.state):
            folder.mkdir(parents=True, exist_ok=True)
        return cls(paths, JobQueue(paths.state / "jobs", paths.home))

    def begin(self) -> None:
        """Run the queue, and end workers that have nothing to do."""
        self.queue.run_in_background()
        self.known_bases.begin()

        def tend() -> None:
            while not self._ended.wait(_TEND_EVERY):
                for worker in self._workers():
                    worker.end_if_idle()

        threading.Thread(target=tend, name="tend workers", daemon=True).start()

    def end(self) -> None:
        """Stop the queue and the workers; running jobs continue."""
        self._ended.set()
        self.queue.close()
        for worker in self._workers():
            worker.close()

    def _workers(self) -> tuple[WorkerClient, ...]:
        return self.draw, self.desk, self.captioning.worker, self.fetch, self.known_bases.worker

    def _held_up(self, job: Job) -> str:
        """Return why a job cannot start now: its images are being captioned."""
        with suppress(SdloraError, OSError):
            return self.captioning.holds(folders_of(load_config(self.queue.settings(job.id))))
        return ""

    def _waits_for(self, job: Job) -> str:
        """Return the name of a run that was started in a shell and trains where a job would."""
        running = [
            run for run in self.shell_runs.listed({other.run for other in self.queue.all()}) if run.held
        ]
        if not running:
            return ""
        place = _device(self.queue.settings(job.id))
        places = {run.folder.path.name: _device(run.folder.config_file) for run in running}
        return next((name for name, other in places.items() if not (place and other and place != other)), "")

    def make_room(self) -> None:
        """Stop planning, and on a GPU release its memory: a job is about to start."""
        self.desk.cancel("plan")
        if self.plans.device == "cuda":
            self.desk.close()

    def bases(self) -> list[Choice]:
        """Return the bases that can be chosen: those found, the newest first, then the built-in one."""
        listed = [Choice(base.label, base.source) for base in self.known_bases.listed()]
        return [*listed, Choice("mini, to try it out (built in, 64 px, needs no GPU)", "mini")]

    def default_base(self) -> str:
        """Return the base that a new run starts with: the newest one found; empty when there is none."""
        return self.known_bases.newest()

    def use_endpoint(self) -> None:
        """Have every process that is started from now on ask the mirror that the owner named."""
        if self.owner.endpoint:
            os.environ["HF_ENDPOINT"] = self.owner.endpoint
        elif self._endpoint_before is None:
            os.environ.pop("HF_ENDPOINT", None)
        else:
            os.environ["HF_ENDPOINT"] = self._endpoint_before
        for worker in (self.draw, self.desk):
            worker.close()

    def runs(self) -> list[Choice]:
        """Return the run folders, the newest first."""
        folders = [
            folder for folder in self._run_folders() if self._checkpoints(folder) or self._finished(folder)
        ]
        return [Choice(folder.name, str(folder)) for folder in folders]

    def adapters(self) -> list[Choice]:
        """Return the adapters that can be drawn with: of the runs, then of the model folders."""
        choices = []
        for folder in self._run_folders():
            finished = self._finished(folder)
            if finished is not None:
                choices.append(Choice(folder.name, str(finished)))
            elif saved := self._checkpoints(folder):
                newest = saved[-1]
                choices.append(Choice(f"{folder.name} (step {newest.step})", str(newest.adapter_file)))
        exported = sorted((self.paths.runs / EXPORTED).glob("*.safetensors"))
        choices += [
            Choice(f"{EXPORTED}/{file.stem}", str(file))
            for file in exported
            if file.name[0] != "." and self.paths.reaches(file)
        ]
        choices += [Choice(file.stem, str(file)) for file in model_files(self.paths, "adapter")]
        return choices

    def checkpoints(self, run: Path) -> list[Choice]:
        """Return a run's checkpoints by step, and its finished adapter."""
        checkpoints = [
            Choice(f"step {saved.step}", str(saved.adapter_file)) for saved in self._checkpoints(run)
        ]
        finished = self._finished(run)
        return [*checkpoints, Choice("finished", str(finished))] if finished else checkpoints

    def data_sets(self) -> list[Choice]:
        """Return the folders below the data folder."""
        inside = (folder for folder in self.paths.data.iterdir() if folder.is_dir())
        folders = sorted(folder for folder in inside if self.paths.reaches(folder))
        return [Choice(folder.name, str(folder)) for folder in folders if not folder.name.startswith(".")]

    def base_of(self, run: Path) -> str:
        """Return the base a run was trained on; the built-in one when it does not say."""
        file = RunFolder(run).config_file
        return load_config(file).model.base if file.is_file() and self.paths.reaches(file) else "mini"

    def _run_folders(self) -> list[Path]:
        folders = [
            folder
            for folder in self.paths.runs.iterdir()
            if folder.name != STATE
            and RunFolder(folder).exists()
            and self.paths.reaches(RunFolder(folder).config_file)
        ]
        return sorted(folders, key=lambda run: RunFolder(run).config_file.stat().st_mtime, reverse=True)

    def _finished(self, run: Path) -> Path | None:
        return next((file for file in RunFolder(run).adapter_files() if self.paths.reaches(file)), None)

    def _checkpoints(self, run: Path) -> list[CheckpointFolder]:
        saved = list_checkpoints(RunFolder(run).checkpoints)
        files = ((checkpoint, checkpoint.adapter_file) for checkpoint in saved)
        return [checkpoint for checkpoint, file in files if file.is_file() and self.paths.reaches(file)]


def _device(settings: Path) -> str:
    """Return the device that settings name, as one word for each; empty for what they leave open."""
    with suppress(SdloraError, OSError):
        named = load_config(settings).training.device or ""
        return "cuda:0" if named == "cuda" else named
    return ""
