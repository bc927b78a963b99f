"""Figures and images of a finished base."""

from __future__ import annotations

import io
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image, ImageDraw

from . import icons, renders, vae
from .captions import bare, load_nouns, styled
from .classifier import Judge
from .config import BASE_SETS, IMAGE_SIZE
from .files import write_bytes
from .renders import to_tensor

GUIDANCE = 4.0
STEPS = 20
BATCH = 8


def load_pipeline(folder: Path, device: torch.device) -> StableDiffusionPipeline:
    """Opens the shipped folder the way a user would."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def generate(
    pipeline: StableDiffusionPipeline, prompts: list[str], seed: int = 0, guidance: float = GUIDANCE
) -> np.ndarray:
    """Draws one image for each prompt: bytes (N, H, W, 3)."""
    images: list[np.ndarray] = []
    for start in range(0, len(prompts), BATCH):
        chunk = prompts[start : start + BATCH]
        # One generator an image: what a prompt gives does not depend on its neighbours.
        generators = [torch.Generator().manual_seed(seed * 1000 + start + i) for i in range(len(chunk))]
        drawn = pipeline(
            chunk,
            num_inference_steps=STEPS,
            guidance_scale=guidance,
            generator=generators,
            output_type="np",
        ).images
        images += list(drawn)
    return (np.array(images) * 255).round().astype(np.uint8)


@torch.no_grad()
def shares_named(judge: Judge, images: np.ndarray, truth: list[int]) -> tuple[float, float]:
    """Returns how often the judge's first, and one of its first five names, is right."""
    device = next(judge.parameters()).device
    chunks = np.array_split(images, max(1, len(images) // 64))
    scores = torch.cat([judge(to_tensor(chunk).to(device)) for chunk in chunks]).cpu()
    best = scores.topk(5).indices
    right = best == torch.tensor(truth)[:, None]
    return right[:, 0].float().mean().item(), right.any(1).float().mean().item()


@torch.no_grad()
def through_vae(pipeline: StableDiffusionPipeline, images: np.ndarray) -> np.ndarray:
    """Returns the VAE's reconstructions of byte images."""
    results = []
    for chunk in np.array_split(images, max(1, len(images) // 64)):
        latents = pipeline.vae.encode(to_tensor(chunk).to(pipeline.device)).latent_dist.mean
        drawn = pipeline.vae.decode(latents).sample.clamp(-1, 1)
        results.append(drawn.add(1).mul(127.5).round().byte().movedim(1, -1).cpu().numpy())
    return np.concatenate(results)


def machine(device: torch.device) -> str:
    """Names the device in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{os.cpu_count()} CPU cores"


def seconds_per_image(pipeline: StableDiffusionPipeline) -> float:
    """Times the best of three batches of eight, twenty steps each."""
    prompts = ["an icon of a teapot"] * BATCH
    times = []
    for seed in range(3):
        start = time.perf_counter()
        generate(pipeline, prompts, seed)
        times.append(time.perf_counter() - start)
    return min(times) / BATCH


def draw_nouns(pipeline: StableDiffusionPipeline, seed: int = 0) -> np.ndarray:
    """Draws every noun from a plain prompt."""
    prompts = [f"an icon of {phrase}" for phrase in load_nouns().phrases.values()]
    return generate(pipeline, prompts, seed)


def looks_followed(pipeline: StableDiffusionPipeline, cache_dir: Path, subjects: int = 24) -> dict[str, Any]:
    """Measures whether a style word is followed.

    Each subject is drawn once for each set's style word, and compared with the
    four sets' own drawings of it, as soft as the VAE draws them: is the nearest
    one (mean squared difference of pixels) of the set that the word names?

    Returns:
        ``looks_followed``, a share that is 0.25 by chance, and ``looks_images``.
    """
    packages = {icon_set.key: icons.load(icon_set, cache_dir) for icon_set in BASE_SETS}
    everywhere = set.intersection(*(package.names() for package in packages.values()))
    names = [name for name in load_nouns().phrases if name in everywhere][:subjects]
    phrases = load_nouns().phrases
    prompts = [styled(phrases[name], icon_set) for name in names for icon_set in BASE_SETS]
    drawn = generate(pipeline, prompts).reshape(len(names), len(BASE_SETS), -1).astype(np.float32)
    true = np.array([renders.pixels(packages[s.key].svg(name)) for name in names for s in BASE_SETS])
    soft = through_vae(pipeline, true).reshape(drawn.shape).astype(np.float32)
    apart = np.square(drawn[:, :, None] - soft[:, None]).mean(-1)
    right = apart.argmin(-1) == np.arange(len(BASE_SETS))
    return {"looks_followed": float(right.mean()), "looks_images": right.size}


def measure(
    pipeline: StableDiffusionPipeline, drawn: np.ndarray, judge: Judge, cache_dir: Path
) -> dict[str, Any]:
    """Measures agreement of text and image, reconstruction and speed.

    Args:
        pipeline: The finished base.
        drawn: What ``draw_nouns`` returned for it.
        judge: Names what images show.
        cache_dir: Folder of the fetched packages.
    """
    names = list(load_nouns().phrases)
    first, five = shares_named(judge, drawn, list(range(len(names))))
    images = renders.base_images(cache_dir)
    # Placings that the judge was not trained on, and as soft as the VAE draws.
    real = through_vae(pipeline, renders.render_variants(images, cache_dir, 2, seed=99)[:, 1])
    truth = [names.index(image.name) for image in images]
    real_first, real_five = shares_named(judge, real, truth)
    unseen = renders.render_unseen(cache_dir)
    return {
        "named": first,
        "named_in_five": five,
        "named_images": len(drawn),
        "real_named": real_first,
        "real_named_in_five": real_five,
        "vae_psnr": vae.psnr(pipeline.vae, unseen, pipeline.device),
        "vae_unseen": len(unseen),
        **looks_followed(pipeline, cache_dir),
        "seconds_per_image": seconds_per_image(pipeline),
        "machine": machine(pipeline.device),
    }


def _label(prompt: str) -> str:
    return bare(prompt.removeprefix("an icon of ").replace(" icon of", ""))


def write_sheet(images: np.ndarray, prompts: list[str], target: Path, columns: int = 10) -> None:
    """Writes images with what they were asked to show below, as one PNG of twice their size."""
    side, text = 2 * IMAGE_SIZE, 16
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * side, rows * (side + text)), "white")
    pen = ImageDraw.Draw(sheet)
    for index, (prompt, pixels) in enumerate(zip(prompts, images, strict=True)):
        x, y = index % columns * side, index // columns * (side + text)
        large = Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC)
        sheet.paste(large, (x, y))
        pen.text((x + side / 2, y + side), _label(prompt), fill="black", anchor="ma")
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG", optimize=True)
    write_bytes(target, buffer.getvalue())
