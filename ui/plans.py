"""Asking the worker what a run would be, and remembering the answer for the moment of its start."""

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
_MAX_AGE = 120.0  # seconds; the memory that is free changes
_MEMORY = "TrainingError"
"""Kind of the refusal of a run that does not fit into the memory that is free now."""


@dataclass
class Plans:
    """The answers of late, by the settings they are about.

    Attributes:
        worker: who is asked.
        queue: the jobs, one of which may use the GPU's memory now.
        device: the type of device that runs get, once a worker has told.
    """

    worker: WorkerClient
    queue: JobQueue
    known: dict[str, tuple[float, Mapping[str, Any]]] = field(default_factory=dict)
    device: str | None = None

    def ask(self, config: Config, *, replace: str | None) -> Iterator[Answer]:
        """Yield what the worker emits about a run; the last answer has the plan.

        Raises:
            CallCancelled: when a newer call took its place.
            CallFailed: for a run that cannot be, in the words of the training command.
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
        """Return whether planning takes the GPU's memory from a job that trains on it."""
        on_gpu = shutil.which("nvidia-smi") is not None if self.device is None else self.device == "cuda"
        return on_gpu and trains(self.queue)

    def refusals(self, config: Config) -> Iterator[Answer]:
        """Yield the progress of finding out whether a run can be.

        What another job's memory is needed for may fit when that job is done, so it is not refused then.

        Raises:
            CallFailed: when it cannot.
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
    """Return the set values by dotted key, as JSON takes them."""
    tree = config.model_dump(mode="json", exclude_unset=True, exclude_none=True)
    return {f"{section}.{name}": value for section, part in tree.items() for name, value in part.items()}
