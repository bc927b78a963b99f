"""The plan of a run: the open settings with their reasons, its time and its memory.

The run is prepared by :func:`sdlora.training.run.prepare_run`, as for training, in a temporary folder. The
cost of a step is measured by a trial step, and again only when a setting changed that can affect it.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdlora.config.schema import Config
from sdlora.config.toml import load_config
from sdlora.devices import release_unused
from sdlora.events import Caching, Decided, Emitter, Event
from sdlora.training.cost import Cost, measure_cost
from sdlora.training.run import prepare_run
from sdlora.training.state import Run

from ..worker import Emit

_costs: dict[str, Cost] = {}
_FREE = (
    "sample.",
    "judge.",
    "output.",
    "optimizer.",
    "training.steps",
    "training.epochs",
    "training.checkpoint_every",
    "training.keep_checkpoints",
    "training.validate_every",
    "training.seed",
    "training.min_snr_gamma",
    "training.noise_offset",
    "training.multires_noise",
    "training.input_perturbation",
    "training.huber_",
    "training.loss_weighting",
    "training.timestep_distribution",
    "training.min_timestep",
    "training.max_timestep",
    "data.caption_dropout",
)
"""Settings that change neither the time of a step nor the memory."""
_SMALL, _LARGE_FOR = 256, 4
"""Resolution in px below which a base is small, and how many times that images are large."""
_COUNTS = ("optimizer.name",)
"""Those of them that do, as optimizers keep more or less for each value."""


def plan(arguments: Mapping[str, Any], emit: Emit) -> dict[str, Any]:
    """Return ``defaults`` [[key, value, reason]], ``steps``, ``seconds``, ``bytes``, ``free_bytes``.

    Args:
        arguments: ``values``: settings by dotted key, as the form has them.
        emit: takes the progress; the defaults come early, as a part.
    """
    config = load_config(values=dict(arguments["values"]))
    defaults: list[list[Any]] = []

    def hear(event: Event) -> None:
        if isinstance(event, Decided):
            defaults.append([event.key, event.value, event.reason])
        elif isinstance(event, Caching):
            emit.progress(event.done, event.total, "encoding the images")

    emit.progress(0, 3, f"reading the base {Path(config.model.base).name} and the images")
    with tempfile.TemporaryDirectory(prefix="sdlora-plan-") as place:
        trial = config.with_values({"output.folder": Path(place) / "trial"})
        run = prepare_run(trial, resume=False, emit=Emitter((hear,)))
        images = len(run.training.items)
        advice = _advice(run)
        emit.part({"defaults": defaults, "images": images, "advice": advice})
        emit.progress(2, 3, "trying one step")
        cost = _cost_of(run)
    device = run.model.facts.device
    answer = {
        "defaults": defaults,
        "images": images,
        "advice": advice,
        "steps": run.steps,
        "seconds": run.steps * cost.seconds_per_step,
        "bytes": cost.bytes,
        "free_bytes": run.memory.free,
        "device": device.type,
        "fits": run.memory.fits() is not False,
    }
    del run
    release_unused()
    return answer


def _advice(run: Run) -> str:
    """Return what is worth knowing before the start: photos are wasted on a base of small images."""
    side = run.model.facts.native_resolution
    sides = [min(item.height, item.width) for item in run.dataset.items]
    usual = statistics.median_low(sides) if sides else 0
    if side >= _SMALL or usual < _LARGE_FOR * side:
        return ""
    base = run.model.base.title
    return (
        f"Your images are about {usual} px wide, and the base {base} draws {side} px: good to try. "
        "For images to use, choose the base that you draw with."
    )


def _cost_of(run: Run) -> Cost:
    key = json.dumps([_structure(run.config), len(run.training.items)])
    if key not in _costs:
        _costs[key] = measure_cost(run)
    return _costs[key]


def _structure(config: Config) -> dict[str, Any]:
    """Return the settings that a step's time and memory may depend on."""
    return {
        key: value
        for section, part in config.model_dump(mode="json").items()
        for name, value in part.items()
        if not (key := f"{section}.{name}").startswith(_FREE) or key in _COUNTS
    }
