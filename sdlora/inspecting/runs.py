"""What training runs did, side by side: their length, best validation and the settings they differ in.

Run folders are read as files: settings of other versions and runs that go on are read as well.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..errors import ConfigError, OutputError
from ..events import read_events
from ..files import parse_toml
from ..generation.grids import Curve, compare_curves
from ..run_folder import RunFolder

_RECENT = 20  # steps that the last loss is the mean of
# where a run lies and what it is called is no difference of training
_PLACES = ("output.", "data.cache_folder", "training.checkpoint_every", "training.keep_checkpoints")
_OPEN = "(not set)"
_KINDS = ("loss", "validation", "rate")


@dataclass(frozen=True)
class RunSummary:
    """One run.

    Attributes:
        folder: where it is.
        name: of its adapter.
        settings: all of them, by dotted key.
        steps: of the whole run; None if it made none.
        state: ``finished``, ``stopped``, or ``unfinished``: it is still running, or was ended from outside.
        losses: (step, loss) of every step.
        validation: (step, held-out loss).
        rates: (step, learning rate).
        gains: (step, (low, high)): held-out loss minus the base's, 90 % interval.
        judged: what judging says at last: the best step, and its score at its best strength.
        seconds: that its last part took, if that ended.
    """

    folder: Path
    name: str
    settings: Mapping[str, Any]
    steps: int | None
    state: str
    losses: Sequence[tuple[int, float]] = ()
    validation: Sequence[tuple[int, float]] = ()
    rates: Sequence[tuple[int, float]] = ()
    gains: Mapping[int, tuple[float, float]] = field(default_factory=dict)
    judged: tuple[int, float] | None = None
    seconds: float | None = None

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.losses[-1][0] if self.losses else 0

    @property
    def loss(self) -> float | None:
        """Mean over the last 20 steps; None without any."""
        recent = [loss for _, loss in self.losses[-_RECENT:] if math.isfinite(loss)]
        return sum(recent) / len(recent) if recent else None

    @property
    def best(self) -> tuple[int, float] | None:
        """Step and loss of the best validation; None without any."""
        measured = [pair for pair in self.validation if math.isfinite(pair[1])]
        return min(measured, key=lambda pair: pair[1]) if measured else None

    def to_dict(self, *, curves: bool = False) -> dict[str, Any]:
        """Return this for scripts; with every point of its curves if asked for."""
        best = self.best
        answer: dict[str, Any] = {
            "folder": self.folder,
            "name": self.name,
            "state": self.state,
            "step": self.step,
            "steps": self.steps,
            "loss": self.loss,
            "best_validation": None if best is None else {"step": best[0], "loss": best[1]},
            "best_against_base": None if best is None else self.gains.get(best[0]),
            "judged": None if self.judged is None else {"step": self.judged[0], "score": self.judged[1]},
            "seconds": self.seconds,
        }
        if curves:
            answer |= {"losses": self.losses, "validation": self.validation, "learning_rates": self.rates}
        return answer


@dataclass(frozen=True)
class RunTable:
    """Several runs and what they differ in.

    Attributes:
        runs: in the order asked for.
        differences: dotted key -> value in each run, of settings that are not the same in all of them.
        image: where their curves were drawn, if they were.
        curves: whether scripts get every point.
    """

    runs: Sequence[RunSummary]
    differences: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    image: Path | None = None
    curves: bool = False

    def render(self, *, width: int = 140) -> str:
        """Return a table for people, and below it the settings that differ."""
        table = Table(box=None, pad_edge=False)
        for title in ("run", "state", "steps", "loss", "best validation", "at step", "against base", "score"):
            table.add_column(title, overflow="fold", justify="left" if title in ("run", "state") else "right")
        for run in self.runs:
            best = run.best
            measured = ("", "", "")
            if best is not None:
                span = run.gains.get(best[0])
                gain = "" if span is None else f"{span[0]:+.4f} to {span[1]:+.4f}"
                measured = (f"{best[1]:.5f}", str(best[0]), gain)
            loss = "" if run.loss is None else f"{run.loss:.5f}"
            total = "?" if run.steps is None else run.steps
            score = "" if run.judged is None else f"{run.judged[1]:.2f} (step {run.judged[0]})"
            table.add_row(str(run.folder), run.state, f"{run.step}/{total}", loss, *measured, score)
        stream = io.StringIO()
        console = Console(file=stream, width=width, highlight=False)
        console.print(table)
        if self.differences:
            settings = Table(box=None, pad_edge=False)
            for title in ("settings that differ", *(run.name for run in self.runs)):
                settings.add_column(title, overflow="fold")
            for key, values in self.differences.items():
                settings.add_row(key, *(_short(value) for value in values))
            console.print()
            console.print(settings)
        return stream.getvalue().rstrip() + (f"\n\ncurves: {self.image}" if self.image else "")

    def to_dict(self) -> dict[str, Any]:
        """Return the same for scripts."""
        differences = {key: list(values) for key, values in self.differences.items()}
        runs = [run.to_dict(curves=self.curves) for run in self.runs]
        return {"runs": runs, "differences": differences, "image": self.image}


def list_runs(folder: Path) -> RunTable:
    """Return the runs in a folder, by name, or the one that it is itself.

    Raises:
        ConfigError: if there is none.
    """
    here = [folder, *sorted(path for path in folder.iterdir() if path.is_dir())] if folder.is_dir() else []
    runs = [read_run(path) for path in here if RunFolder(path).exists()]
    if not runs:
        raise ConfigError(f"{folder}: holds no training run; give the folder that runs are in, e.g. runs")
    return RunTable(runs, differences(runs))


def compare_runs(folders: Sequence[Path], image: Path, *, overwrite: bool = False) -> RunTable:
    """Draw the curves of several runs over each other, and say what they differ in.

    Args:
        folders: the runs, two or more.
        image: the PNG to write.
        overwrite: replace it if it exists.

    Raises:
        ConfigError: for fewer than two folders, or one that holds no run.
        OutputError: if the image exists or cannot be written.
    """
    if len(folders) < 2:
        raise ConfigError("sdlora runs compare: give two or more run folders")
    for folder in folders:
        if not RunFolder(folder).exists():
            raise ConfigError(f"{folder}: holds no training run; `sdlora runs FOLDER` lists those there are")
    if image.exists() and not overwrite:
        raise OutputError(f"{image}: exists; choose another --image, or add --overwrite")
    runs = [read_run(folder) for folder in folders]
    labels = _labels(runs)
    curves = [
        Curve(label, run.losses, run.validation, run.rates) for label, run in zip(labels, runs, strict=True)
    ]
    if not any(run.losses for run in runs):
        raise ConfigError("none of these runs has made a step, so there is nothing to draw")
    compare_curves(curves, image)
    return RunTable(runs, differences(runs), image, curves=True)


def read_run(folder: Path) -> RunSummary:
    """Return what a run's files tell.

    Raises:
        ConfigError: if its settings cannot be read.
    """
    run = RunFolder(folder)
    try:
        tree = parse_toml(run.config_file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{run.config_file}: cannot be read ({error}); mend it, or leave that run out"
        ) from None
    settings = {
        f"{section}.{name}": value
        for section, values in tree.items()
        if isinstance(values, dict)
        for name, value in values.items()
    }
    told = _Told()
    for event in read_events(folder):
        with suppress(KeyError, TypeError, ValueError):  # of another version, or damaged
            told.take(event)
    name = str(settings.get("output.name", folder.name))
    losses, validation, rates = (sorted(told.points[kind].items()) for kind in _KINDS)
    return RunSummary(
        *(folder, name, settings, told.steps, told.state, losses, validation, rates),
        gains=told.gains,
        judged=told.judged,
        seconds=told.seconds,
    )


class _Told:
    """What the events of a run add up to."""

    def __init__(self) -> None:
        self.steps: int | None = None
        self.seconds: float | None = None
        self.state = "unfinished"
        self.points: dict[str, dict[int, float]] = {kind: {} for kind in _KINDS}
        self.gains: dict[int, tuple[float, float]] = {}
        self.scores: dict[int, float] = {}
        self.best_step: int | None = None

    @property
    def judged(self) -> tuple[int, float] | None:
        """The best step as told last, and its score at its best strength."""
        if self.best_step is None or self.best_step not in self.scores:
            return None
        return self.best_step, self.scores[self.best_step]

    def take(self, event: Mapping[str, Any]) -> None:
        """Take one event in."""
        match event["event"]:
            case "RunStarted":  # what was made after its checkpoint is made again
                first, self.steps, self.state = int(event["first_step"]), int(event["steps"]), "unfinished"
                self.points = {
                    kind: {step: value for step, value in points.items() if step <= first}
                    for kind, points in self.points.items()
                }
            case "Judged":
                self.scores[int(event["step"])] = max(float(score["mean"]) for score in event["scores"])
                self.best_step = int(event["best_step"])
            case "StepDone":
                step = int(event["step"])
                loss, rate = float(event["loss"]), float(event["learning_rate"])
                self.points["loss"][step], self.points["rate"][step] = loss, rate
            case "Validated":
                step = int(event["step"])
                self.points["validation"][step] = float(event["loss"])
                self.gains.pop(step, None)
                if (against := event.get("against_base")) is not None:
                    self.gains[step] = float(against["low"]), float(against["high"])
            case "RunFinished":
                self.state = "stopped" if event["stopped"] else "finished"
                self.seconds = float(event["seconds"])


def differences(runs: Sequence[RunSummary]) -> dict[str, list[Any]]:
    """Return the settings that are not the same in all runs: dotted key -> value in each."""
    keys = dict.fromkeys(key for run in runs for key in run.settings if not key.startswith(_PLACES))
    values = {key: [run.settings.get(key, _OPEN) for run in runs] for key in keys}
    return {key: row for key, row in values.items() if any(value != row[0] for value in row)}


def _labels(runs: Sequence[RunSummary]) -> list[str]:
    """Return the shortest names that tell the runs apart."""
    for names in ([run.name for run in runs], [run.folder.name for run in runs]):
        if len(set(names)) == len(runs) and all(names):
            return names
    return [str(run.folder) for run in runs]


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
