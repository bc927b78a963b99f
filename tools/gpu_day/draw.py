"""Images: how long they take on the card and in how much memory, and that they are those of the CPU."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch

from sdlora.adapters.attach import create_adapter
from sdlora.adapters.canonical import AdapterFile, AdapterWeights, LowRankPair
from sdlora.config.adapter import AdapterConfig
from sdlora.config.schema import Precision
from sdlora.generation.generate import GenerateRequest
from sdlora.generation.image_generator import ImageGenerator

from .paths import SAMPLERS

STRENGTH = 0.7


def draw(base: str, path: str, device: str, *, side: int, steps: int) -> dict[str, Any]:
    """Draw one way: return seconds an image, the card's peaks, and the time to load.

    Args:
        base: what to load.
        path: one of :data:`.paths.DRAWING`.
        device: where.
        side: of the images, px.
        steps: denoising steps.
    """
    precision: Precision = "fp32" if path == "fp32" else "bf16"
    began = time.perf_counter()
    generator = ImageGenerator.load(base, device=device, precision=precision, offload=path == "offload")
    loading = time.perf_counter() - began
    strengths = {}
    if path in ("adapter", "merged", "offload"):
        strengths = {generator.add_adapter(random_adapter(generator)): STRENGTH}
    if path == "merged":
        generator.merge(strengths)
    count = 4 if path == "batch-4" else 1
    requests = [_request(side, steps, seed, strengths) for seed in range(count)]
    generator.generate([_request(side, 2, 0, strengths)])  # what is done but once
    _restart(device)
    began = time.perf_counter()
    images = generator.generate(requests)
    seconds = (time.perf_counter() - began) / count
    flat = [float(np.asarray(generated.image, dtype=float).std()) for generated in images]
    return {
        "precision": precision,
        "side": side,
        "steps": steps,
        "loading_seconds": round(loading, 2),
        "seconds_per_image": round(seconds, 3),
        **_peaks(device),
        "contrast": flat,
        "faults": [],
    }


def drawn_alike(device: str, reference: str, *, side: int, steps: int) -> dict[str, Any]:
    """Compare images of the mini base on the card with the CPU's, and ways that must not differ.

    Differences are means over all pixels, of 255.
    """
    exact = ImageGenerator.load("mini", device=reference, precision="fp32")
    seen: dict[str, Any] = {"by_precision": {}, "faults": []}
    wanted = {name: _pixels(exact, _request(side, steps, 1, {}, name))[0] for name in SAMPLERS}
    for precision, most in (("fp32", 1.0), ("fp16", 6.0), ("bf16", 12.0)):
        generator = ImageGenerator.load("mini", device=device, precision=precision)  # type: ignore[arg-type]
        apart = {
            name: round(
                float(np.abs(_pixels(generator, _request(side, steps, 1, {}, name))[0] - image).mean()), 3
            )
            for name, image in wanted.items()
        }
        seen["by_precision"][precision] = apart
        seen["faults"] += [
            f"{precision}, {name}: images are {value} of 255 off the CPU's, at most {most} are due"
            for name, value in apart.items()
            if not value <= most
        ]
    seen |= _same_ways(device, side, steps, seen["faults"])
    return seen


def _same_ways(device: str, side: int, steps: int, faults: list[str]) -> dict[str, Any]:
    generator = ImageGenerator.load("mini", device=device, precision="fp32")
    plain = _pixels(generator, _request(side, steps, 1))[0]
    adapter = random_adapter(generator)
    name = generator.add_adapter(adapter)
    off = _pixels(generator, _request(side, steps, 1, {name: 0.0}))[0]
    acting = _pixels(generator, _request(side, steps, 1, {name: STRENGTH}))[0]
    generator.merge({name: STRENGTH})
    merged = _pixels(generator, _request(side, steps, 1))[0]
    generator.unmerge()
    undone = _pixels(generator, _request(side, steps, 1))[0]
    moving = ImageGenerator.load("mini", device=device, precision="fp32", offload=True)
    moved = _pixels(moving, _request(side, steps, 1, {moving.add_adapter(adapter): STRENGTH}))[0]
    apart = {
        "the adapter and the base": float(np.abs(acting - plain).mean()),
        "strength 0 and the base": float(np.abs(off - plain).max()),
        "merged and acting": float(np.abs(merged - acting).mean()),
        "merging undone and the base": float(np.abs(undone - plain).max()),
        "offloaded and acting": float(np.abs(moved - acting).mean()),
    }
    most = dict.fromkeys(apart, 0.0) | {"merged and acting": 1.0, "offloaded and acting": 0.1}
    faults += [
        f"{what} are {value:.3f} of 255 apart"
        for what, value in apart.items()
        if (value <= 0.1 if what == "the adapter and the base" else value > most[what])
    ]
    return {"apart": apart}


def random_adapter(generator: ImageGenerator) -> AdapterFile:
    """Return an adapter whose effect is seen: a fresh one with random up factors."""
    fresh = create_adapter(generator.model, AdapterConfig(rank=8, alpha=8.0), 0)
    chance = torch.Generator().manual_seed(1)
    updates = {}
    for key, pair in fresh.items():
        assert isinstance(pair, LowRankPair)
        up = torch.randn(pair.up.shape, generator=chance) * 0.02
        updates[key] = LowRankPair(pair.down.cpu(), up, pair.alpha)
    return AdapterFile(AdapterWeights(updates))


def _request(
    side: int, steps: int, seed: int, strengths: dict[str, float] | None = None, sampler: str = "Euler a"
) -> GenerateRequest:
    return GenerateRequest(
        "an icon of a cat",
        height=side,
        width=side,
        steps=steps,
        guidance=5.0,
        sampler=sampler,
        seed=seed,
        strengths=strengths or {},
    )


def _pixels(generator: ImageGenerator, *requests: GenerateRequest) -> list[Any]:
    return [np.asarray(generated.image, dtype=float) for generated in generator.generate(requests)]


def _restart(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()


def _peaks(device: str) -> dict[str, int]:
    if not device.startswith("cuda"):
        return {}
    return {
        "allocated": int(torch.cuda.max_memory_allocated()),
        "reserved": int(torch.cuda.max_memory_reserved()),
    }
