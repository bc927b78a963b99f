"""What training minimises; read it from top to bottom."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..adapters.attach import adapters_disabled
from ..config.schema import Config
from ..data.batching.batches import Batch
from ..devices import onto
from ..diffusion.process import draw_noise, per_image_loss
from ..families.base import Conditioning, DiffusionModel, SizeHint, stack_conditioning

Predict = Callable[[Tensor, Tensor, Conditioning, Sequence[SizeHint]], Tensor]
"""(noisy latents, timesteps, text, sizes) -> the denoiser's output, as :meth:`DiffusionModel.predict`."""


class _Inputs(NamedTuple):
    """What the denoiser is given: B rows of each."""

    noisy: Tensor
    timesteps: Tensor
    text: Conditioning
    sizes: Sequence[SizeHint]

    def rows(self, chosen: Sequence[int]) -> _Inputs:
        """Return those of some images."""
        text = {name: tensor[list(chosen)] for name, tensor in self.text.items()}
        sizes = [self.sizes[row] for row in chosen]
        return _Inputs(self.noisy[list(chosen)], self.timesteps[list(chosen)], text, sizes)

    def and_blank(self, blank: Conditioning) -> _Inputs:
        """Return these, followed by the same with the empty caption (tensors without batch axis)."""
        count = len(self.sizes)
        captions = [{name: tensor[row] for name, tensor in self.text.items()} for row in range(count)]
        text = stack_conditioning([*captions, *[blank] * count])
        twice = torch.cat([self.noisy, self.noisy]), torch.cat([self.timesteps, self.timesteps])
        return _Inputs(*twice, text, [*self.sizes, *self.sizes])


def loss_of(
    model: DiffusionModel,
    batch: Batch,
    config: Config,
    predict: Predict | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the objective of each image and its plain error, both (B,) float32.

    The objective is the mean squared error of the prediction (over the mask) times the min-SNR weight and
    the image's own. With prior preservation, what the base itself predicts is the target of
    regularisation images; without such images, it is that of a second prediction of every image, for
    the empty caption. Noise and timestep of an image follow from its visit, whatever else is in the batch;
    only dropout, which torch draws for whole batches, follows from the first visit. ``predict`` stands in
    for the model's own call.
    """
    settings, prior = config.training, config.data.prior_preservation
    count = len(batch.names)
    noise, timesteps = _drawn(model, batch, settings.noise_offset)
    corrupted = model.process.corrupt(batch.latents, noise, timesteps)
    # only this card's generator: saving the state of every card's would open a CUDA context on each of them
    cards = [model.facts.device] if model.facts.device.type == "cuda" else []
    with torch.random.fork_rng(cards, enabled=config.adapter.dropout > 0):
        if config.adapter.dropout > 0:  # torch's dropout draws from the global generator
            torch.manual_seed(int(torch.randint(0, 2**62, (1,), generator=batch.generators("dropout")[0])))
        text = batch.text if batch.text is not None else model.encode_text(batch.captions)
        inputs = _Inputs(corrupted.noisy, timesteps, text, batch.sizes)
        blank = prior > 0 and not config.data.has_regularisation
        if blank:
            inputs = inputs.and_blank(_blank(model, batch))
        prediction = (predict or model.predict)(*inputs)  # (B, C, h, w), or (2B, C, h, w) with blank captions
    target = onto(corrupted.target, prediction.device)
    weights = model.process.loss_weights(timesteps, settings.min_snr_gamma) * batch.weights
    if prior > 0 and not blank and any(batch.regularisation):
        rows = [row for row in range(count) if batch.regularisation[row]]
        target = target.clone()
        target[rows] = _of_base(model, batch, inputs, rows)
        weights = weights * torch.where(torch.tensor(batch.regularisation), prior, 1.0)
    weights = onto(weights, prediction.device)
    mask = None if batch.mask is None else onto(batch.mask, prediction.device)
    plain = per_image_loss(prediction[:count], target, mask)  # (B,)
    weighted = plain * weights  # w_i * mean((prediction_i - target_i)^2)
    if blank:
        base = _of_base(model, batch, inputs, range(count, 2 * count))
        weighted = weighted + prior * weights * per_image_loss(prediction[count:], base)
    return weighted, plain.detach()


def _drawn(model: DiffusionModel, batch: Batch, noise_offset: float) -> tuple[Tensor, Tensor]:
    """Return each image's noise (B, C, h, w) float32 and timestep (B,) int64."""
    shape = (1, *batch.latents.shape[1:])
    noises, timesteps = [], []
    for generator in batch.generators("noise"):
        noises.append(draw_noise(shape, generator, noise_offset=noise_offset))
        timesteps.append(model.process.draw_timesteps(1, generator))
    return torch.cat(noises), torch.cat(timesteps)


def _blank(model: DiffusionModel, batch: Batch) -> Conditioning:
    if batch.blank is not None:
        return batch.blank
    return {name: tensor[0] for name, tensor in model.encode_text([""]).items()}


@torch.no_grad()
def _of_base(model: DiffusionModel, batch: Batch, inputs: _Inputs, rows: Sequence[int]) -> Tensor:
    """Return what the base predicts for some rows, (len(rows), C, h, w) float32."""
    chosen = inputs.rows(rows)
    with adapters_disabled(model):
        if batch.text is None:  # the text encoder is trained too: the base's own text belongs to it
            captions = [batch.captions[row] if row < len(batch.captions) else "" for row in rows]
            chosen = chosen._replace(text=model.encode_text(captions))
        return model.predict(*chosen)
