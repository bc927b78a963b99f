"""Fifty steps of a run: speed, memory by phase against the plan, and that it learns finite numbers."""

from __future__ import annotations

import math
import shutil
import statistics
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file
from torch.profiler import ProfilerActivity, profile

from sdlora.config.schema import Config
from sdlora.config.toml import load_config
from sdlora.events import Control, Emitter, Event, Notice, RunStarted, Sampled, StepDone, Validated
from sdlora.run_folder import list_checkpoints
from sdlora.training.objective import loss_of
from sdlora.training.run import prepare_run
from sdlora.training.step import train_step
from sdlora.training.train import train

from .watch import Watch

_TOLERANCE = 0.15  # between plan and truth, as tests/gpu asks
_MIB = 2**20
_SLACK = 64 * _MIB  # cuBLAS' and cuDNN's own space, which only tiny bases notice
IMAGES = 6


def settings(base: str, work: Path, name: str, *overrides: str, side: int, count: int = IMAGES) -> Config:
    """Return settings for a run of drawn images below ``work``; its cache serves all runs of a base."""
    wide = "data.crop=random" in overrides  # what is to be cropped must not fit
    images = work / f"images-{side}-{count}{'-wide' if wide else ''}"
    draw_images(images, count, side, side * 5 // 4 if wide else side)
    overrides = tuple(text.replace("{smaller}", str(side * 3 // 4)) for text in overrides)
    shutil.rmtree(work / name, ignore_errors=True)
    fixed = {
        "data.folder": images,
        "data.cache_folder": work / "cache",
        "output.folder": work / name,
        "model.base": base,
        "data.resolution": side,
        "data.validation": 1,
        "sample.prompts": ["a drawing, shape 1"],
        "sample.steps": 4,
        "training.batch_size": 1,
    }
    given = {text.partition("=")[0] for text in overrides}
    return load_config(None, overrides, {key: value for key, value in fixed.items() if key not in given})


def draw_images(folder: Path, count: int, side: int, width: int) -> None:
    """Draw captioned images, ``side`` px high, with transparent edges, unless they are there."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        file = folder / f"{number:02d}.png"
        if file.exists():
            continue
        image = Image.new("RGBA", (width, side), (0, 0, 0, 0))
        corner = side * (2 + number) // 24
        draw = ImageDraw.Draw(image)
        draw.rectangle((corner, side // 8, side - corner, side * 7 // 8), fill=(15 * number, 90, 200, 255))
        draw.ellipse((side // 4, corner, side * 3 // 4, side - corner), fill=(250, 15 * number, 10, 255))
        image.save(file)
        file.with_suffix(".txt").write_text(f"a drawing, shape {number}, bright", encoding="utf-8")


def measured(config: Config, device: torch.device, *, numbers: bool) -> dict[str, Any]:
    """Train, and return what was seen; ``faults`` in it says what is not as it must be.

    Args:
        config: of the run.
        device: where.
        numbers: whether the device computes; the pretended one does not.
    """
    watch = Watch(device)
    speeds: list[float] = []
    told: list[str] = []
    kinds: dict[str, int] = {}

    def listen(event: Event) -> None:
        kinds[type(event).__name__] = kinds.get(type(event).__name__, 0) + 1
        if isinstance(event, StepDone):
            speeds.append(event.images_per_second)
        elif isinstance(event, Notice):
            told.append(event.message)
        elif isinstance(event, RunStarted):
            plan.update(event.expected_phases)
            seen["expected_seconds"] = event.expected_seconds

    plan: dict[str, int] = {}
    seen: dict[str, Any] = {}
    with watch.watching():
        result = train(config, listeners=[listen])
    shares = {
        phase: round(size / watch.allocated[phase], 3)
        for phase, size in plan.items()
        if watch.allocated.get(phase)
    }
    seen |= {
        "steps": result.step,
        "images_per_second": round(statistics.median(speeds[len(speeds) // 5 :]), 3),
        "loss": result.loss,
        "validation_loss": result.validation_loss,
        "seconds": round(result.seconds, 1),
        "plan": plan,
        "allocated": watch.allocated,
        "reserved": watch.reserved,
        "plan_by_allocated": shares,
        "notices": [text for text in told if "skipped" in text or "overflow" in text],
        "events": kinds,
    }
    seen["faults"] = _faults(seen, result.loss, numbers=numbers)
    return seen


def _faults(seen: dict[str, Any], loss: float | None, *, numbers: bool) -> list[str]:
    faults = [
        f"the plan of {phase} is {seen['plan'][phase] / 2**30:.2f} GiB, the truth {taken / 2**30:.2f} GiB"
        for phase, taken in seen["allocated"].items()
        if phase in seen["plan"] and abs(seen["plan"][phase] - taken) > max(_SLACK, _TOLERANCE * taken)
    ]
    if numbers and (loss is None or not math.isfinite(loss) or not 0 < loss < 10):
        faults.append(f"the loss is {loss}")
    for kind in (Validated, Sampled):
        if not seen["events"].get(kind.__name__):
            faults.append(f"nothing was {kind.__name__.lower()}")
    return faults


def profiled(config: Config, device: torch.device, steps: int) -> dict[str, Any]:
    """Return what a step launches: its most expensive kernels, their number, and how busy the card is."""
    run = prepare_run(config, resume=False, emit=Emitter(()))
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with run.loader:
        run.splitter = None  # a profiler does not see into threads
        for _ in range(2):
            train_step(run)
        began = perf_counter()
        for _ in range(steps):
            train_step(run)
        plain = (perf_counter() - began) / steps
        with profile(activities=activities) as record:
            for _ in range(steps):
                train_step(run)
    averages = list(record.key_averages())
    times = {event.key: (_own_time(event, cuda), event.count) for event in averages}
    total = sum(time for time, _ in times.values())
    launches = sum(event.count for event in averages if "LaunchKernel" in event.key)
    top = sorted(times.items(), key=lambda pair: -pair[1][0])[:25]
    return {
        "ms_per_step": round(1e3 * plain, 2),
        "launches_per_step": launches // steps if cuda else None,
        "card_busy": round(total / 1e6 / steps / plain, 3) if cuda else None,
        "top": [
            {"name": name[:120], "ms_per_step": round(time / 1e3 / steps, 3), "calls_per_step": count / steps}
            for name, (time, count) in top
        ],
        "faults": [] if total > 0 else ["the profiler saw nothing"],
    }


def _own_time(event: Any, cuda: bool) -> float:
    """Return the microseconds that a kernel took itself, on the card or on the CPU."""
    if not cuda:
        return float(event.self_cpu_time_total)
    # the time of operations on the host's side is that of the kernels they launched, counted again
    on_card = str(getattr(event, "device_type", "")).endswith("CUDA")
    return float(event.self_device_time_total) if on_card else 0.0


def resumed(config: Config) -> dict[str, Any]:
    """Stop a run half-way, go on from its checkpoint, and compare with one that was not stopped."""
    assert config.output.folder is not None and config.training.steps is not None
    whole = config.with_values({"output.folder": config.output.folder.with_name("whole")})
    _fresh(whole)
    control = Control()

    def stop(event: Event) -> None:
        if isinstance(event, StepDone) and event.step == config.training.steps // 2:  # type: ignore[operator]
            control.stop()

    assert train(config, listeners=[stop], control=control).stopped
    train(config, resume=True)
    train(whole)
    states = []
    for folder in (config.output.folder, whole.output.folder):
        assert folder is not None
        states.append(load_file(list_checkpoints(folder / "checkpoints")[-1].optimizer_file))
    masters = [name for name in states[0] if name.endswith(".master")]
    distance = max(float((states[0][n] - states[1][n]).norm() / states[1][n].norm()) for n in masters)
    equal = all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    return {
        "steps": config.training.steps,
        "bit_equal": equal,
        "distance": distance,
        "faults": [] if distance < 1e-2 else [f"the resumed run is {distance:.3g} off the uninterrupted one"],
    }


def _fresh(config: Config) -> None:
    if config.output.folder is not None:
        shutil.rmtree(config.output.folder, ignore_errors=True)


def gradient_of(config: Config) -> tuple[float, torch.Tensor]:
    """Return (loss, gradient (N,) float32 on the CPU) of a step at values that are not the start's."""
    run = prepare_run(config, resume=False, emit=Emitter(()))
    loss, parts = 0.0, []
    for number, group in enumerate(run.groups):
        generator = torch.Generator().manual_seed(number)
        noise = torch.randn(group.master.flat.shape, generator=generator).to(group.master.flat.device)
        group.master.load(group.master.flat.data + 0.01 * noise)
    with run.loader:
        for batch in [ready.batch for ready in run.loader.step(0)]:
            weighted, plain = loss_of(run.model, batch, run.config)
            loss += float(plain.float().sum())
            (weighted.sum() * 64.0).backward()  # a small scale, for what is small in fp16
            for group in run.groups:
                group.master.collect()
    for group in run.groups:
        assert group.master.flat.grad is not None
        parts.append(group.master.flat.grad.detach().cpu() / 64.0)
    return loss, torch.cat(parts)
