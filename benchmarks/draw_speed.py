"""Processor time of a drawn image: sdlora, adapters as layers and merged, against diffusers' own pipeline.

    python benchmarks/draw_speed.py --base mini --precision bf16

All draw the same: prompt, size, DDIM steps, guidance, an adapter of random values at 0.8, batch 1, in one
process and turn and turn about. Processor time is disturbed less by other processes than wall time; both are
shown. That they draw the same image is checked first, within what the number format's rounding makes of it.
Exit code 1: they do not, and the times mean nothing.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from PIL import Image

from sdlora.adapters.attach import create_adapter
from sdlora.adapters.canonical import AdapterFile, AdapterInfo, AdapterWeights, LowRankPair
from sdlora.config.adapter import AdapterConfig, Targets
from sdlora.diffusion.samplers import make_scheduler
from sdlora.families.base import DiffusionModel
from sdlora.families.locating import locate
from sdlora.formats.adapter_files import write_adapter
from sdlora.generation.generate import GenerateRequest, ImageGenerator

BAR = 0.9
"""Of the pipeline's processor time, at most."""
PROMPT, STRENGTH, GUIDANCE = "an icon of a cat", 0.8, 5.0
FORMATS = {"fp32": torch.float32, "bf16": torch.bfloat16}
FARTHEST = {"fp32": 2.0, "bf16": 12.0}
"""Mean difference of two images, in shades of 255."""

Draw = Callable[[int], Image.Image]
"""Seed -> image."""


def adapter_of(model: DiffusionModel, targets: Targets, rank: int) -> AdapterFile:
    """Return an adapter that changes the image visibly."""
    generator = torch.Generator().manual_seed(5)
    settings = AdapterConfig(targets=targets, rank=rank, alpha=float(rank))
    pairs = create_adapter(model, settings, 0).pairs
    changed = {
        key: LowRankPair(pair.down, 0.1 * torch.randn(pair.up.shape, generator=generator), pair.alpha)
        for key, pair in pairs.items()
    }
    return AdapterFile(AdapterWeights(changed), AdapterInfo(family=model.info.name, name="random"))


def ours(generator: ImageGenerator, name: str, side: int, steps: int, *, merge: bool) -> Draw:
    """Return what draws with sdlora, the adapter as layers or merged for each image."""

    def draw(seed: int) -> Image.Image:
        request = GenerateRequest(
            PROMPT,
            height=side,
            width=side,
            steps=steps,
            guidance=GUIDANCE,
            sampler="DDIM",
            seed=seed,
            strengths={name: STRENGTH},
        )
        return generator.generate([request], merge=merge)[0].image

    return draw


def pipelines(base: str, adapter: Path, model: DiffusionModel, side: int, steps: int, dtype: Any) -> Draw:
    """Return what draws with diffusers' pipeline, with its own LoRA layers."""
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(locate(base), safety_checker=None, torch_dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(adapter.parent, weight_name=adapter.name, adapter_name="random")
    pipeline.set_adapters(["random"], [STRENGTH])
    pipeline.scheduler = make_scheduler("DDIM", model.process, steps)
    shape = model.facts.latents.shape(side, side)

    def draw(seed: int) -> Image.Image:
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))[None].to(dtype)
        drawn: Image.Image = pipeline(
            PROMPT,
            height=side,
            width=side,
            num_inference_steps=steps,
            guidance_scale=GUIDANCE,
            latents=noise,
        ).images[0]
        return drawn

    return draw


def measured(ways: dict[str, Draw], rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Return (processor seconds, wall seconds) of each way in each round, turn and turn about."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for number in range(rounds + 1):  # the first warms up
        for name, draw in ways.items():
            processor, wall = time.process_time(), time.perf_counter()
            draw(number)
            if number:
                times[name].append((time.process_time() - processor, time.perf_counter() - wall))
    return times


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print the table; return 1 if the images differ."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--base", default="mini", help="a Stable Diffusion 1 folder; mini by default")
    parser.add_argument("--precision", choices=list(FORMATS), default="bf16")
    parser.add_argument("--side", type=int, default=128, metavar="PX")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--targets", choices=get_args(Targets), default="attention")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args(arguments)
    generator = ImageGenerator.load(given.base, device="cpu", precision=given.precision)
    with tempfile.TemporaryDirectory() as folder:
        adapter, dtype = adapter_of(generator.model, given.targets, given.rank), FORMATS[given.precision]
        file = Path(folder) / "random.safetensors"
        write_adapter(adapter, "webui", file, torch.float32, generator.model.info)
        name = generator.add_adapter(adapter)
        size = given.side, given.steps
        ways = {
            "sdlora": ours(generator, name, *size, merge=False),
            "sdlora, merged": ours(generator, name, *size, merge=True),
            "diffusers": pipelines(given.base, file, generator.model, *size, dtype),
        }
        images = {way: np.asarray(draw(1), dtype=np.float32) for way, draw in ways.items()}
    off = {way: float(np.abs(image - images["diffusers"]).mean()) for way, image in images.items()}
    print(
        "mean difference to the pipeline's image, of 255: "
        + ", ".join(f"{w} {d:.2f}" for w, d in off.items())
    )
    if max(off.values()) > FARTHEST[given.precision] or images["diffusers"].std() < 5:
        print("not the same image, so the times mean nothing", file=sys.stderr)
        return 1
    times = measured(ways, given.rounds)
    print(f"{'':16} {'CPU ms':>8} {'wall ms':>8} {'CPU / diffusers':>16}  bar {BAR}")
    for way, both in times.items():
        processor, wall = (statistics.median(column) for column in zip(*both, strict=True))
        ratios = [mine[0] / peer[0] for mine, peer in zip(both, times["diffusers"], strict=True)]
        ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}..{max(ratios):.2f})"
        print(f"{way:16} {1e3 * processor:8.0f} {1e3 * wall:8.0f} {ratio:>16}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
