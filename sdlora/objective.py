"""What training minimises, to be read top to bottom in one place."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .config import Config
from .data.batches import Batch
from .diffusion import draw_noise, per_image_loss
from .families.base import Conditioning, DiffusionModel, SizeHint

Predict = Callable[[Tensor, Tensor, Conditioning, Sequence[SizeHint]], Tensor]


def loss_of(
    model: DiffusionModel,
    batch: Batch,
    config: Config,
    generator: torch.Generator,
    predict: Predict | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the objective of each picture and its plain error, both (B,) float32.

    The objective is the mean squared error of the prediction times the min-SNR weight and the picture's
    own. Noise and
    timesteps are drawn with ``generator``, in this order. ``predict`` stands in for the model's own call.
    """
    settings = config.training
    noise = draw_noise(batch.latents.shape, generator, noise_offset=settings.noise_offset)
    timesteps = model.process.sample_timesteps(len(batch.names), generator)
    corrupted = model.process.corrupt(batch.latents, noise, timesteps)
    with torch.random.fork_rng(enabled=config.adapter.dropout > 0):
        if config.adapter.dropout > 0:  # torch's dropout draws from the global generator
            torch.manual_seed(int(torch.randint(0, 2**62, (1,), generator=generator)))
        text = batch.text if batch.text is not None else model.encode_text(batch.captions)
        prediction = (predict or model.predict)(corrupted.noisy, timesteps, text, batch.sizes)
    plain = per_image_loss(prediction, corrupted.target.to(prediction.device), batch.mask)
    weights = model.process.loss_weights(timesteps, settings.min_snr_gamma) * batch.weights
    return plain * weights.to(plain.device), plain.detach()
