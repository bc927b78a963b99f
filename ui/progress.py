"""A job's events, read as they are appended, in the form the page shows."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from sdlora.files import parse_json

_MAX_POINTS = 400
_BLOCK = 2**22

_NUMBER = int | float
_FIELDS: dict[str, dict[str, Any]] = {
    "StepDone": {"step": int, "steps": int, "loss": _NUMBER | None, "learning_rate": _NUMBER},
    "RunStarted": {"steps": int, "first_step": int},
    "Caching": {"done": int, "total": int},
    "Validated": {"step": int, "loss": _NUMBER | None},
    "Sampled": {"step": int, "files": list},
    "CheckpointSaved": {"step": int},
    "Judged": {"best_step": int, "best_strength": _NUMBER, "reason": str},
    "Reported": {"best_step": int, "strength": _NUMBER, "reason": str, "page": str},
    "Decided": {"key": str, "reason": str},
    "Notice": {"message": str},
    "Noticed": {"message": str},
    "RunFinished": {"adapter_file": str | None},
}
"""What the page computes with; a damaged line that says something else is passed over."""


class RunView:
    """The state of a run, from its event file; :meth:`refresh` reads only what is new."""

    def __init__(self, file: Path) -> None:
        self._file, self._offset = file, 0
        self.step, self.steps, self.first_step = 0, 0, 0
        self.started = self.ended = False
        self.preparing: tuple[int, int] | None = None
        self.seconds_left: float | None = None
        self.images_per_second: float | None = None
        self.expected_seconds: float | None = None
        self.expected_bytes: int | None = None
        self.loss: dict[int, float] = {}
        self.validation: dict[int, float] = {}
        self.against_base: dict[int, tuple[float, float]] = {}
        self.rate: float | None = None
        self.samples: dict[int, list[str]] = {}
        self.checkpoints: list[int] = []
        self.defaults: dict[str, tuple[Any, str]] = {}
        self.notes: list[str] = []
        self.best: dict[str, Any] | None = None
        self.reported = False
        self.adapter_file: str | None = None
        self.seconds: float | None = None

    def refresh(self) -> None:
        """Read the lines written since the last call; an incomplete last line waits for the next."""
        with suppress(OSError), self._file.open("rb") as stream:
            stream.seek(self._offset)
            while block := stream.read(_BLOCK):
                end = block.rfind(b"\n") + 1
                if end == 0:
                    return
                self._offset += end
                stream.seek(self._offset)
                for line in block[:end].splitlines():
                    with suppress(ValueError, KeyError, TypeError):
                        self._take(parse_json(line))

    def begin(self) -> None:
        """Forget that the run ended: its process is started again, and has said nothing yet."""
        self.ended = False

    @property
    def finishing(self) -> bool:
        """Whether all steps are made, and what comes after them is not, or only the process is to end."""
        return self.ended or (self.started and 0 < self.steps <= self.step)

    def _take(self, event: Mapping[str, Any]) -> None:
        kind = event["event"]
        for key, types in _FIELDS.get(kind, {}).items():
            if not isinstance(event[key], types):
                raise TypeError(f"{kind}: `{key}` is no such value")
        self.ended = kind == "RunFinished"
        if kind == "StepDone":
            self.step, self.steps = event["step"], event["steps"]
            if event["loss"] is not None:  # fp16 left the step out
                self.loss[event["step"]] = event["loss"]
            self.rate, self.seconds_left = event["learning_rate"], event["seconds_left"]
            self.images_per_second = event["images_per_second"]
            self.preparing = None
        elif kind == "RunStarted":
            self.started, self.preparing = True, None
            self.steps, self.first_step = event["steps"], event["first_step"]
            self.step = max(self.step, event["first_step"])
            self.expected_seconds, self.expected_bytes = event["expected_seconds"], event["expected_bytes"]
            self.seconds_left = event["expected_seconds"]
            self._forget_after(event["first_step"])
        elif kind == "Caching":
            self.preparing = event["done"], event["total"]
        elif kind == "Validated":
            if event["loss"] is not None:
                self.validation[event["step"]] = event["loss"]
            if against := event.get("against_base"):
                self.against_base[event["step"]] = float(against["low"]), float(against["high"])
        elif kind == "Sampled":
            self.samples[event["step"]] = list(event["files"])
        elif kind == "CheckpointSaved":
            self.checkpoints.append(event["step"])
        elif kind in ("Judged", "Reported"):
            strength = event["strength" if kind == "Reported" else "best_strength"]
            self.best = {"step": event["best_step"], "strength": strength, "reason": event["reason"]}
            self.reported = kind == "Reported"
        elif kind == "Decided":
            self.defaults[event["key"]] = event["value"], event["reason"]
        elif kind in ("Notice", "Noticed"):  # the latter in run folders of earlier versions
            self.notes.append(event["message"])
        elif kind == "RunFinished":
            self.adapter_file, self.seconds, self.started = event["adapter_file"], event["seconds"], False

    def _forget_after(self, step: int) -> None:
        """Forget the steps after a checkpoint, which a resumed run repeats."""
        self.step = step
        self.loss = {at: value for at, value in self.loss.items() if at <= step}
        self.validation = {at: value for at, value in self.validation.items() if at <= step}

    def brief(self) -> dict[str, Any]:
        """Return what the queue shows in a job's line."""
        recent = [self.loss[at] for at in sorted(self.loss)[-20:]]
        return {
            "step": self.step,
            "steps": self.steps,
            "seconds_left": self.seconds_left,
            "preparing": self.preparing,
            "started": self.started,
            "finishing": self.finishing,
            "loss": sum(recent) / len(recent) if recent else None,
            "adapter_file": self.adapter_file,
        }

    def curve(self, first: float, last: float) -> dict[str, Any]:
        """Return the losses of the steps ``first`` to ``last``, as fine as a plot can show them."""
        return {
            "steps": max(self.steps, self.step),
            "losses": thinned({at: value for at, value in self.loss.items() if first <= at <= last}),
            "validation": sorted((at, value) for at, value in self.validation.items() if first <= at <= last),
        }

    def full(self) -> dict[str, Any]:
        """Return everything the page of one run shows."""
        return self.brief() | {
            "losses": thinned(self.loss),
            "validation": sorted(self.validation.items()),
            "against_base": self.against_base.get(max(self.validation, default=-1)),
            "samples": [[step, self.samples[step]] for step in sorted(self.samples)],
            "checkpoints": sorted(set(self.checkpoints)),
            "defaults": [[key, value, reason] for key, (value, reason) in self.defaults.items()],
            "notes": self.notes[-20:],
            "best": self.best,
            "reported": self.reported,
            "rate": self.rate,
            "images_per_second": self.images_per_second,
            "expected_seconds": self.expected_seconds,
            "expected_bytes": self.expected_bytes,
            "seconds": self.seconds,
        }


def thinned(values: Mapping[int, float], limit: int = _MAX_POINTS) -> list[tuple[int, float]]:
    """Return at most about ``limit`` points of a curve, each the mean of its neighbours."""
    points = sorted(values.items())
    width = -(-len(points) // limit) or 1
    groups = [points[start : start + width] for start in range(0, len(points), width)]
    return [(group[-1][0], sum(value for _, value in group) / len(group)) for group in groups]
