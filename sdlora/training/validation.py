"""Loss on held-out images at fixed noise and timesteps: smooth over time, comparable between runs."""

from __future__ import annotations

import json
import math
import statistics
from typing import TYPE_CHECKING

import torch

from ..data.batching.batches import generator_for
from ..diffusion.process import draw_noise, per_image_loss
from ..events import Validated
from ..families.base import Conditioning
from .memory import VALIDATION_TIMESTEPS, validation_rows

if TYPE_CHECKING:
    from .state import Run


def validate(run: Run, learned: float | None = None) -> float | None:
    """Measure the held-out images, emit the mean and return it; None if there are none.

    Args:
        run: its model holds the values to show.
        learned: the mean of the values as learned, where what is shown is an average of them.

    Raises:
        torch.OutOfMemoryError: in all processes, if one of them lacks memory.
    """
    losses = measure(run)
    if not losses:
        return None
    mean = sum(losses) / len(losses)
    error = statistics.stdev(losses) / math.sqrt(len(losses)) if len(losses) > 1 else None
    run.emit(Validated(run.step, mean, len(losses), error, learned))
    return mean


@torch.no_grad()
def measure(run: Run) -> list[float]:
    """Return the loss of each held-out image with what the model holds now, each process measuring its share.

    Raises:
        torch.OutOfMemoryError: in all processes, if one of them lacks memory.
    """
    if not run.validation.items:
        return []
    shares = run.processes.together(lambda: json.dumps(_losses(run)).encode())
    return [loss for _, loss in sorted(pair for share in shares for pair in json.loads(share))]


def _losses(run: Run) -> list[tuple[int, float]]:
    """Return the loss of the images of this process' share, each with its number."""
    adaptable = [run.model.components()[name] for name in run.model.info.components]
    for module in adaptable:
        module.eval()
    share = range(run.processes.rank, len(run.validation.items), run.processes.count)
    try:
        return [(index, _loss_of_image(run, index)) for index in share]
    finally:
        for module in adaptable:
            module.train()


def _loss_of_image(run: Run, index: int) -> float:
    model, item = run.model, run.validation.items[index]
    encoded = run.validation.image(index)
    timesteps = model.process.spread_timesteps(VALIDATION_TIMESTEPS)
    clean = model.facts.latents.scaled(encoded.posterior.mean.float()).repeat(VALIDATION_TIMESTEPS, 1, 1, 1)
    # the noise follows from the image's content, not from seed or step, so that losses are comparable
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
