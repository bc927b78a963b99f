"""One job of the queue, as its file says it, and the process that belongs to it."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

Status = Literal["waiting", "running", "stopping", "stopped", "finished", "failed"]
ENDED: tuple[Status, ...] = ("stopped", "finished", "failed")
AT_WORK: tuple[Status, ...] = ("running", "stopping")
MOST_STEPS = 10_000_000
"""Steps that a run can be asked to make in all."""


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
        place: what the waiting ones are sorted by; when it was made, where None.
        not_before: seconds since 1970 before which it does not start by itself.
        goal: steps that the run is to make in all, where that is more than its settings say.
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
    place: float | None = None
    not_before: float | None = None
    goal: int | None = None

    @property
    def waits(self) -> bool:
        """Whether it waits for its time."""
        return self.not_before is not None and self.not_before > time.time()

    @property
    def order(self) -> tuple[float, str]:
        """What the waiting jobs are sorted by."""
        return (self.created if self.place is None else self.place), self.id

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return asdict(self) | {"run": str(self.run)}


def job_of(values: Any, job_id: str) -> Job:
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
    if not 1 <= (values.get("goal") or 1) <= MOST_STEPS:
        raise ValueError("no run makes so many steps")
    return Job(**(values | {"id": job_id, "run": Path(values["run"])}))
