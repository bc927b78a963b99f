"""What a training step of a real run takes: memory by what the device allocated, and images a second.

On a CUDA device torch's own peak is read. On a CPU every tensor that is alive before the step is summed up,
and the allocations of the step are taken from torch's profiler: neither knows anything of the plan.
"""

from __future__ import annotations

import gc
import statistics
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from sdlora.config.schema import Config
from sdlora.config.toml import load_config
from sdlora.events import Emitter, Event, StepDone
from sdlora.training.memory import MemoryPlan
from sdlora.training.run import prepare_run
from sdlora.training.state import Run
from sdlora.training.step import train_step
from sdlora.training.train import train


@dataclass(frozen=True)
class Measured:
    """The plan of a run, and the most bytes that were allocated at once in a step of its largest images."""

    plan: MemoryPlan
    bytes: int

    @property
    def ratio(self) -> float:
        """The plan divided by the truth."""
        return self.plan.peak / self.bytes


def settings(base: str, work: Path, *overrides: str, count: int = 16, side: int = 1024) -> Config:
    """Return settings for a short run without previews, on drawn images in ``work``."""
    images = work / "images"
    draw_images(images, count, side)
    fixed = ("data.validation=0", "sample.prompts=[]")
    values = {
        "data.folder": images,
        "data.cache_folder": work / "cache",
        "output.folder": work / "run",
        "model.base": base,
    }
    return load_config(None, [*fixed, *overrides], values)


def draw_images(folder: Path, count: int, side: int) -> None:
    """Draw captioned square images, unless they are there."""
    from PIL import Image, ImageDraw

    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        image = Image.new("RGB", (side, side), (15 * number, 90, 200))
        corner = side * (2 + number) // 24
        ImageDraw.Draw(image).ellipse(
            (side // 10, corner, side * 9 // 10, side - 1), fill=(250, 15 * number, 10)
        )
        file = folder / f"{number:02d}.png"
        if not file.exists():
            image.save(file)
            file.with_suffix(".txt").write_text(f"a drawing of shape {number}", encoding="utf-8")


def measure_memory(config: Config) -> Measured:
    """Make a run ready, and measure the step with the largest images of its first epoch."""
    gc.collect()
    before = alive_bytes()  # what else the process holds
    run = prepare_run(config, resume=False, emit=Emitter(()))
    steps = range(1, min(run.steps, max(2, run.order.steps_per_epoch)))
    largest = max(steps, key=lambda step: _area(run, step))
    with run.loader:
        while run.step < largest:
            train_step(run)
        if run.model.facts.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            train_step(run)
            return Measured(run.memory, torch.cuda.max_memory_allocated())
        gc.collect()
        return Measured(run.memory, alive_bytes() - before + _most_in_a_step(run))


def _area(run: Run, step: int) -> int:
    """Return how many px the largest micro-batch of a step has."""
    micros = [micro for rank in run.order.step(step) for micro in rank]
    buckets = [[run.training.placements[visit.index].bucket for visit in micro] for micro in micros]
    return max(sum(height * width for height, width in bucket) for bucket in buckets)


def alive_bytes() -> int:
    """Return the bytes of all tensors that are alive, each memory counted once."""
    storages = {}
    with warnings.catch_warnings():  # looking at every object wakes old names of libraries
        warnings.simplefilter("ignore")
        for candidate in gc.get_objects():
            if issubclass(type(candidate), torch.Tensor) and not candidate.is_meta:
                storages[candidate.untyped_storage().data_ptr()] = candidate.untyped_storage().nbytes()
    return sum(storages.values())


def _most_in_a_step(run: Run) -> int:
    run.splitter = None  # a profiler does not see into threads; their parts together take what the whole does
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        train_step(run)
    return most_allocated(record)


def most_allocated(record: profile) -> int:
    """Return the most bytes that torch had allocated at once on the CPU while a profiler looked."""
    assert record.profiler is not None
    raw = record.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in raw if event.name() == "[memory]")
    assert len(changes) > 1000
    now = most = 0
    for _, change in changes:
        now += change
        most = max(most, now)
    return most


def measure_speed(config: Config) -> dict[str, Any]:
    """Train; return images a second (median, without the first fifth), the loss and CUDA's peak."""
    seen: list[float] = []

    def listen(event: Event) -> None:
        if isinstance(event, StepDone):
            seen.append(event.images_per_second)

    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    result = train(config, listeners=[listen])
    return {
        "steps": result.step,
        "images_per_second": round(statistics.median(seen[len(seen) // 5 :]), 3),
        "loss": result.loss,
        "seconds": round(result.seconds, 1),
        "cuda_peak_bytes": torch.cuda.max_memory_allocated() if cuda else None,
    }
