"""Asking the worker for the plan of a run, and remembering the answer until the run starts."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from sdlora.config.schema import Config

from .dataset_view import version_of
from .jobs import JobQueue
from .worker_client import Answer, CallCancelled, CallFailed, WorkerClient

_KEPT = 16
_MAX_AGE = 120.0  # seconds; the free memory changes
_MEMORY = "TrainingError"
"""Kind of the error for a run that does not fit into the memory that is free now."""


@dataclass
class Plans:
    """The latest answers, by the settings they are about.

    Attributes:
        worker: the one that is asked.
        queue: the jobs, one of which may use the GPU's memory now.
        device: the type of device that runs get, once a worker has said it.
    """

    worker: WorkerClient
    queue: JobQueue
    known: dict[str, tuple[float, Mapping[str, Any]]] = field(default_factory=dict)
    device: str | None = None

    def ask(self, config: Config, *, replace: str | None) -> Iterator[Answer]:
        """Yield the worker's answers about a run; the last one has the plan.

        Raises:
            CallCancelled: when a newer call took its place.
            CallFailed: for a run that is not possible, in the words of the training command.
        """
        values = _values(config)
        folder = config.data.folder
        telling = {name: value for name, value in values.items() if not name.startswith("output.")}
        key = json.dumps([telling, version_of(folder) if folder else ""], sort_keys=True)
        asked, known = self.known.get(key, (0.0, None))
        if known is not None and time.monotonic() - asked < _MAX_AGE:
            yield Answer(result=known)
            return
        for answer in self.worker.call("plan", {"values": values}, replace=replace):
            if answer.result is not None:
                self.device = str(answer.result["device"])
                while len(self.known) >= _KEPT:
                    self.known.pop(next(iter(self.known)))
                self.known[key] = time.monotonic(), answer.result
            yield answer

    def would_disturb(self) -> bool:
        """Return whether planning would take GPU memory from a job that trains."""
        on_gpu = shutil.which("nvidia-smi") is not None if self.device is None else self.device == "cuda"
        return on_gpu and trains(self.queue)

    def refusals(self, config: Config) -> Iterator[Answer]:
        """Yield the progress of finding out whether a run is possible.

        A run that lacks memory while another job trains is not refused: it may fit when that job is done.

        Raises:
            CallFailed: when it is not.
        """
        if self.would_disturb():
            return
        try:
            for answer in self.ask(config, replace=None):
                if answer.progress is not None:
                    yield answer
        except CallCancelled:
            return
        except CallFailed as error:
            if not (error.kind == _MEMORY and trains(self.queue)):
                raise


def trains(queue: JobQueue) -> bool:
    """Return whether a job trains now."""
    return any(job.status in ("running", "stopping") for job in queue.all())


def _values(config: Config) -> dict[str, Any]:
    """Return the set values by dotted key, as JSON values."""
    tree = config.model_dump(mode="json", exclude_unset=True, exclude_none=True)
    return {f"{section}.{name}": value for section, part in tree.items() for name, value in part.items()}
