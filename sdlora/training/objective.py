"""What training minimises; read it from top to bottom."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..adapters.attach import adapters_disabled
from ..config.schema import Config, TrainingConfig
from ..data.batching.batches import Batch
from ..devices import onto
from ..diffusion.process import Corrupted, NoiseProcess, draw_noise, multires_noise, per_image_loss
from ..diffusion.weighting import ERRORS, SnrProcess, huber_threshold, loss_weights
from ..errors import ConfigError
from ..families.base import Conditioning, DiffusionModel, SizeHint, stack_conditioning

_PARTS = 1000  # of the range of timesteps, in which settings count

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


class StepInputs(NamedTuple):
    """What the loss of B images is computed from, as far as no learned value takes part.

    Attributes:
        noisy: (B, C, h, w), what the denoiser is given.
        timesteps: (B,) whole numbers.
        target: (B, C, h, w) float32.
        weights: (B,) float32, of the timestep times the image's own.
        mask: (B, 1, h, w) float32, or None.
        threshold: (B, 1, 1, 1) float32, from where a robust loss grows no faster; None for squared errors.
        text: conditioning of the captions; None when it is encoded in the loop.
    """

    noisy: Tensor
    timesteps: Tensor
    target: Tensor
    weights: Tensor
    mask: Tensor | None
    threshold: Tensor | None
    text: Conditioning | None


def inputs_of(process: NoiseProcess, batch: Batch, settings: TrainingConfig) -> StepInputs:
    """Draw noise and timestep of each image, and return what follows from them; all on the CPU."""
    corrupted = _corrupted(process, batch, settings)
    timesteps = corrupted.timesteps
    return StepInputs(
        corrupted.noisy,
        timesteps,
        corrupted.target,
        _weights(process, timesteps, settings) * batch.weights,
        batch.mask,
        _threshold(process, timesteps, settings),
        batch.text,
    )


def loss_of(
    model: DiffusionModel,
    batch: Batch,
    config: Config,
    predict: Predict | None = None,
    given: StepInputs | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the objective of each image and its plain squared error, both (B,) float32.

    The objective is the mean error of the prediction (over the mask) times the weight of its timestep and
    the image's own. With prior preservation, what the base itself predicts is the target of
    regularisation images; without such images, it is that of a second prediction of every image, for
    the empty caption. Noise and timestep of an image follow from its visit, whatever else is in the batch;
    only dropout, which torch draws for whole batches, follows from the first visit. ``predict`` stands in
    for the model's own call. ``given`` is :func:`inputs_of` the batch, if that is on the device already;
    not with prior preservation.
    """
    settings, prior = config.training, config.data.prior_preservation
    assert given is None or prior == 0
    count = len(batch.names)
    start = inputs_of(model.process, batch, settings) if given is None else given
    target, weights = start.target, start.weights
    # only this card's generator: saving the state of every card's would open a CUDA context on each of them
    cards = [model.facts.device] if model.facts.device.type == "cuda" else []
    with torch.random.fork_rng(cards, enabled=config.adapter.dropout > 0):
        if config.adapter.dropout > 0:  # torch's dropout draws from the global generator
            torch.manual_seed(int(torch.randint(0, 2**62, (1,), generator=batch.generators("dropout")[0])))
        text = start.text if start.text is not None else model.encode_text(batch.captions)
        inputs = _Inputs(start.noisy, start.timesteps, text, batch.sizes)
        blank = predicts_blank(config)
        if blank:
            inputs = inputs.and_blank(_blank(model, batch))
        prediction = (predict or model.predict)(*inputs)  # (B, C, h, w), or (2B, C, h, w) with blank captions
    target = onto(target, prediction.device)
    if prior > 0 and not blank and any(batch.regularisation):
        rows = [row for row in range(count) if batch.regularisation[row]]
        target = target.clone()
        target[rows] = _of_base(model, batch, inputs, rows)
        weights = weights * torch.where(torch.tensor(batch.regularisation), prior, 1.0)
    weights = onto(weights, prediction.device)
    mask = None if start.mask is None else onto(start.mask, prediction.device)
    error = _error(settings, start.threshold, prediction.device)
    losses = per_image_loss(prediction[:count], target, mask, error)  # (B,)
    weighted = losses * weights  # w_i * mean(error(prediction_i - target_i))
    if blank:
        base = _of_base(model, batch, inputs, range(count, 2 * count))
        weighted = weighted + prior * weights * per_image_loss(prediction[count:], base, None, error)
    plain = losses if settings.loss == "l2" else per_image_loss(prediction[:count], target, mask)
    return weighted, plain.detach()


def predicts_blank(config: Config) -> bool:
    """Return whether every image is predicted a second time, for the empty caption."""
    return config.data.prior_preservation > 0 and not config.data.has_regularisation


def _corrupted(process: NoiseProcess, batch: Batch, settings: TrainingConfig) -> Corrupted:
    """Return the batch noised, each image with the noise and at the timestep that its visit draws."""
    shape = (1, *batch.latents.shape[1:])
    noises, timesteps = [], []
    for generator in batch.generators("noise"):
        noises.append(draw_noise(shape, generator, noise_offset=settings.noise_offset))
        timesteps.append(draw_timestep(process, generator, settings))
    if levels := settings.multires_noise_iterations:
        pairs = zip(noises, batch.generators("multires"), strict=True)
        discount = settings.multires_noise_discount
        noises = [multires_noise(n, draws, iterations=levels, discount=discount) for n, draws in pairs]
    noise, times = torch.cat(noises), torch.cat(timesteps)
    corrupted = process.corrupt(batch.latents, noise, times)
    if settings.input_perturbation > 0:
        more = torch.cat([torch.randn(shape, generator=draws) for draws in batch.generators("perturbation")])
        disturbed = process.corrupt(batch.latents, noise + settings.input_perturbation * more, times)
        corrupted = replace(corrupted, noisy=disturbed.noisy)  # the target stays that of the noise itself
    return corrupted


def draw_timestep(process: NoiseProcess, generator: torch.Generator, settings: TrainingConfig) -> Tensor:
    """Draw one timestep (1,) as settings say: of which range, and which of it most.

    The share of the range is u uniform in 0..1; ``logit_normal``: the sigmoid of a standard normal number
    (Esser et al. 2024, section 3.1); ``low_noise``: u^2, half of all in the lowest quarter; ``high_noise``:
    1 - u^2.
    """
    low, high, distribution = settings.min_timestep, settings.max_timestep, settings.timestep_distribution
    if distribution == "uniform" and (low, high) == (0, _PARTS):
        return process.draw_timesteps(1, generator)
    if distribution == "logit_normal":
        share = float(torch.randn(1, generator=generator).sigmoid())
    else:
        uniform = float(torch.rand(1, generator=generator))
        shares = {"uniform": uniform, "low_noise": uniform**2, "high_noise": 1.0 - uniform**2}
        share = shares[distribution]
    part = min(low + int(share * (high - low)), high - 1)
    return process.spread_timesteps(_PARTS)[part : part + 1]


def check_objective(process: NoiseProcess, settings: TrainingConfig) -> None:
    """Refuse settings that need a signal-to-noise ratio for a base whose noise has none.

    Raises:
        ConfigError: naming the setting.
    """
    if isinstance(process, SnrProcess):
        return
    for key, value in (("loss_weighting", "min_snr"), ("loss", "l2")):
        if getattr(settings, key) != value:
            raise ConfigError(
                f"`training.{key}={getattr(settings, key)}`: the noise of a base that predicts "
                f"{process.prediction.name} has no such weights; use {value}"
            )


def _weights(process: NoiseProcess, timesteps: Tensor, settings: TrainingConfig) -> Tensor:
    if settings.loss_weighting == "min_snr" or not isinstance(process, SnrProcess):
        return process.loss_weights(timesteps, settings.min_snr_gamma)
    return loss_weights(process, timesteps, settings.loss_weighting, settings.min_snr_gamma)


def _threshold(process: NoiseProcess, timesteps: Tensor, settings: TrainingConfig) -> Tensor | None:
    if settings.loss == "l2" or not isinstance(process, SnrProcess):
        return None
    threshold = huber_threshold(process, timesteps, settings.huber_schedule, settings.huber_c)
    return threshold.view(-1, 1, 1, 1)


def _error(
    settings: TrainingConfig, threshold: Tensor | None, device: torch.device
) -> Callable[[Tensor], Tensor]:
    """Return what a difference (B, C, h, w) counts, element by element."""
    if threshold is None:
        return torch.square
    size, count = onto(threshold, device), ERRORS[settings.loss]
    return lambda difference: count(difference, size)


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
