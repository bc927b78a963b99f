"""Loss on held-out images at fixed noise and timesteps: smooth over time, comparable between runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..data.batching.batches import generator_for
from ..diffusion.process import draw_noise, per_image_loss
from ..events import Validated
from ..families.base import Conditioning
from .memory import VALIDATION_TIMESTEPS, validation_rows

if TYPE_CHECKING:
    from .state import Run


@torch.no_grad()
def validate(run: Run) -> float | None:
    """Measure the held-out images and emit the mean; None if there are none (or on other ranks)."""
    if not run.validation.items or not run.accelerator.is_main_process:
        return None
    adaptable = [run.model.components()[name] for name in run.model.info.components]
    for module in adaptable:
        module.eval()
    try:
        losses = [_loss_of_image(run, index) for index in range(len(run.validation.items))]
    finally:
        for module in adaptable:
            module.train()
    mean = sum(losses) / len(losses)
    run.emit(Validated(run.step, mean, len(losses)))
    return mean


def _loss_of_image(run: Run, index: int) -> float:
    model, item = run.model, run.validation.items[index]
    encoded = run.validation.image(index)
    timesteps = model.process.spread_timesteps(VALIDATION_TIMESTEPS)
    clean = model.scale_latents(encoded.posterior.mean.float()).repeat(VALIDATION_TIMESTEPS, 1, 1, 1)
    # by content, not by seed or step
    noise = draw_noise(clean.shape, generator_for("validation", item.digest))
    corrupted = model.process.corrupt(clean, noise, timesteps)
    if run.validation.encode_captions:
        text = {name: tensor[None] for name, tensor in run.validation.caption(item.caption).items()}
    else:
        text = model.encode_text([run.validation.prompt(item.caption)])
    rows = validation_rows(run.config)
    output = torch.cat(
        [
            model.predict(noisy, times, _repeated(text, len(times)), [encoded.size] * len(times)).cpu()
            for noisy, times in zip(corrupted.noisy.split(rows), timesteps.split(rows), strict=True)
        ]
    )
    return float(per_image_loss(output, corrupted.target, encoded.mask).mean())


def _repeated(text: Conditioning, count: int) -> Conditioning:
    return {name: tensor.repeat(count, *[1] * (tensor.ndim - 1)) for name, tensor in text.items()}
