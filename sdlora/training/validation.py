"""Loss on held-out images at fixed noise and timesteps: smooth over time, comparable between runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..data.batching.batches import generator_for
from ..diffusion.process import draw_noise, per_image_loss
from ..events import Validated

if TYPE_CHECKING:
    from .state import Run

_NUM_TIMESTEPS = 4


@torch.no_grad()
def validate(run: Run) -> float | None:
    """Measure the held-out images and emit the mean; None if there are none (or on other ranks)."""
    if not run.validation.items or not run.accelerator.is_main_process:
        return None
    for module in run.model.components().values():
        module.eval()
    losses = [_loss_of_image(run, index) for index in range(len(run.validation.items))]
    for module in run.model.components().values():
        module.train()
    mean = sum(losses) / len(losses)
    run.emit(Validated(run.step, mean, len(losses)))
    return mean


def _loss_of_image(run: Run, index: int) -> float:
    model, item = run.model, run.validation.items[index]
    encoded = run.validation.image(index)
    timesteps = model.process.spread_timesteps(_NUM_TIMESTEPS)
    clean = model.scale_latents(encoded.posterior.mean.float()).repeat(_NUM_TIMESTEPS, 1, 1, 1)
    # by content, not by seed or step
    noise = draw_noise(clean.shape, generator_for("validation", item.digest))
    corrupted = model.process.corrupt(clean, noise, timesteps)
    if run.validation.encode_captions:
        text = {name: tensor[None] for name, tensor in run.validation.caption(item.caption).items()}
    else:
        text = model.encode_text([run.validation.prompt(item.caption)])
    repeated = {
        name: tensor.repeat(_NUM_TIMESTEPS, *[1] * (tensor.ndim - 1)) for name, tensor in text.items()
    }
    output = model.predict(corrupted.noisy, timesteps, repeated, [encoded.size] * _NUM_TIMESTEPS)
    return float(per_image_loss(output.cpu(), corrupted.target, encoded.mask).mean())
