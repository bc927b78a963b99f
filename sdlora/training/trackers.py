"""TensorBoard and Weights & Biases as listeners, through accelerate's trackers.

A tracker only listens: one that fails is dropped with a notice, and training continues. What it gets is what
the run's events tell: losses, the rates of all groups, gradient norm, speed, memory, validation with its
interval, and previews.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch

from ..config.schema import Config, OutputConfig
from ..data.reading.decoding import opened_image
from ..errors import ConfigError
from ..events import Event, Listener, Notice, RunStarted, Sampled, StepDone, Validated

if TYPE_CHECKING:
    from .state import Run

_PRIVATE = ("data.", "sample.", "output.", "model.base", "model.vae", "adapter.from_file")


def check_trackers(output: OutputConfig) -> None:
    """Refuse trackers whose package is not there, before anything is done.

    Raises:
        ConfigError: with the command that installs it.
    """
    for name in output.trackers:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"`output.trackers`: the package {name} is not installed; run: pip install {name}, or leave "
                "it out"
            )


@contextmanager
def tracking(run: Run) -> Iterator[Sequence[Listener]]:
    """Give the listeners that settings ask for, in the main process; they are closed at the end."""
    names = run.config.output.trackers if run.processes.is_main else ()
    listeners = [TrackerListener(name, run, lambda text: run.emit(Notice(text))) for name in names]
    try:
        yield listeners
    finally:
        for listener in listeners:
            listener.close()


class TrackerListener:
    """Hands a run's events to one of accelerate's trackers, which it starts with the first step.

    Args:
        name: of the tracker, ``tensorboard`` or ``wandb``.
        run: what is followed.
        notice: tells people that the tracker failed.
    """

    def __init__(self, name: str, run: Run, notice: Callable[[str], None]) -> None:
        self._name, self._run, self._notice = name, run, notice
        self._tracker: Any = None
        self._failed = False
        self._newest = 0

    def __call__(self, event: Event) -> None:
        """Tell the tracker of one event."""
        if self._failed:
            return
        try:
            self._take(event)
        except Exception as error:  # whatever it is, training continues without it
            self._failed = True
            what = str(error).strip().partition("\n")[0] or type(error).__name__
            self._notice(f"{self._name} failed ({what}); training continues without it")

    def close(self) -> None:
        """Have the tracker write what is left."""
        with suppress(Exception):
            if self._tracker is not None:
                self._tracker.finish()
        with suppress(Exception):
            if self._name == "wandb" and self._tracker is not None:
                import wandb

                wandb.teardown()  # or its own process would stay as long as this one

    def _take(self, event: Event) -> None:
        match event:
            case RunStarted():
                self._tracker = TRACKERS[self._name](self._run)
                if hasattr(self._tracker, "start"):  # not in accelerate before 1.8, which starts at once
                    self._tracker.start()
                self._tracker.store_init_configuration(shareable_settings(self._run.config))
            case StepDone():
                self._log(_of_step(event, self._run), event.step)
            case Validated():
                self._log(_of_validation(event), event.step)
            case Sampled():
                self._images(event)

    def _log(self, values: Mapping[str, float], step: int) -> None:
        self._tracker.log(dict(values), step=self._at(step))

    def _at(self, step: int) -> int:
        """Return the step to file values under: W&B throws away what comes after a later step's.

        What the start looks like is measured after the first step.
        """
        self._newest = max(self._newest, step)
        return self._newest if self._name == "wandb" else step

    def _images(self, event: Sampled) -> None:
        import numpy as np

        images = []
        for file in event.files:
            with opened_image(Path(file)) as loaded:
                images.append(np.asarray(loaded.image.convert("RGB")))
        more = {"dataformats": "NHWC"} if self._name == "tensorboard" else {}
        self._tracker.log_images({"previews": np.stack(images)}, step=self._at(event.step), **more)


def shareable_settings(config: Config) -> dict[str, bool | int | float | str]:
    """Return final settings by their dotted keys, as trackers take them.

    With ``output.private`` nothing tells of folders, captions, prompts and file names.
    """
    settings: dict[str, bool | int | float | str] = {}
    for section, values in config.model_dump(mode="json", exclude_none=True).items():
        for name, value in values.items():
            key = f"{section}.{name}"
            if not (config.output.private and key.startswith(_PRIVATE)):
                settings[key] = value if isinstance(value, bool | int | float | str) else str(value)
    return settings


def _of_step(event: StepDone, run: Run) -> dict[str, float]:
    values = {
        "loss": event.loss,
        "gradient norm": event.grad_norm,
        "images per second": event.images_per_second,
        "share of time waiting for data": event.data_wait_share,
        "epoch": float(event.epoch),
        "memory (GiB)": _memory(run) / 2**30,
        **{f"rate/{name}": rate for name, rate in event.rates.items()},
    }
    return values if event.found_rate is None else {**values, "rate/found": event.found_rate}


def _of_validation(event: Validated) -> dict[str, float]:
    values = {"validation/loss": event.loss}
    if event.standard_error is not None:
        values["validation/loss low"] = event.loss - 2 * event.standard_error
        values["validation/loss high"] = event.loss + 2 * event.standard_error
    if event.learned_loss is not None:
        values["validation/loss as learned"] = event.learned_loss
    for name, difference in (("base", event.against_base), ("best step", event.against_best)):
        if difference is not None:
            values[f"validation/against {name}"] = difference.mean
            values[f"validation/against {name} low"] = difference.low
            values[f"validation/against {name} high"] = difference.high
    for band in event.bands:
        values[f"validation/noise {band.start:.0%} to {band.end:.0%}"] = band.loss
    return values


def _memory(run: Run) -> int:
    """Return the most bytes that torch has held of a card so far, or what this process holds now."""
    device = run.model.facts.device
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return int(psutil.Process().memory_info().rss)


def _tensorboard(run: Run) -> Any:
    from accelerate.tracking import TensorBoardTracker

    # what a run told after its last checkpoint is told again when it is resumed: the earlier points go
    return TensorBoardTracker(run.config.output.name, run.folder.trackers, purge_step=run.step + 1)


def _wandb(run: Run) -> Any:
    import wandb
    from accelerate import PartialState
    from accelerate.tracking import WandBTracker

    PartialState()  # accelerate's own log asks it; several processes have joined it already
    output, folder = run.config.output, run.folder.trackers
    folder.mkdir(parents=True, exist_ok=True)
    identity = hashlib.sha256(f"{run.folder.path.resolve()} {run.started_at}".encode()).hexdigest()[:16]
    return WandBTracker(
        output.tracker_project,
        name=output.name,
        dir=str(folder),
        id=identity,
        resume="allow",
        mode=output.wandb_mode,
        settings=wandb.Settings(silent=True, console="off"),
    )


TRACKERS: Mapping[str, Callable[[Run], Any]] = {"tensorboard": _tensorboard, "wandb": _wandb}
"""By the name in ``output.trackers``; a new one is an entry here and its name in ``config/schema.py``."""
