"""Noise processes: how latents are corrupted, what the denoiser must predict, how errors are weighted.

Only mathematics, no models. A process is a :class:`NoiseProcess`, e.g. :class:`sdlora.diffusion.ddpm.DDPM`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as functional
from torch import Tensor

from .prediction import Prediction


@dataclass(frozen=True)
class Corrupted:
    """One noised batch: what goes in, what should come out, and the timesteps.

    Attributes:
        noisy: (B, C, h, w) float32 input of the denoiser.
        target: (B, C, h, w) float32 desired output.
        timesteps: (B,) as they were given.
    """

    noisy: Tensor
    target: Tensor
    timesteps: Tensor


class Scheduler(Protocol):
    """What takes noise away step by step, as diffusers' schedulers do; each one serves a single batch.

    Attributes:
        timesteps: (steps,) the timestep that the denoiser is given at each step, from noise to image.
        init_noise_sigma: factor on the unit noise at the start.
    """

    timesteps: Tensor
    init_noise_sigma: float | Tensor

    def scale_model_input(self, sample: Tensor, timestep: Tensor) -> Tensor:
        """Return the sample (B, C, h, w) as the denoiser takes it."""

    def step(self, model_output: Tensor, timestep: Tensor, sample: Tensor, **more: Any) -> Any:
        """Return the sample after this step, as the first of a tuple if ``return_dict=False`` is given."""


MakeScheduler = Callable[[int], Scheduler]
"""Number of steps -> a scheduler whose timesteps are set for it, on the CPU."""


class NoiseProcess(Protocol):
    """How a base's images become noise. Timesteps (B,) are in the units that its denoiser takes."""

    @property
    def prediction(self) -> Prediction:
        """What the denoiser puts out."""

    @property
    def ends_in_noise(self) -> bool:
        """Whether the last timestep keeps nothing of the image."""

    @property
    def max_steps(self) -> int:
        """Denoising steps beyond which a sampler would repeat timesteps."""

    @property
    def schedulers(self) -> Mapping[str, MakeScheduler]:
        """The samplers that can undo it, by their name in :data:`sdlora.diffusion.samplers.SAMPLERS`."""

    def draw_timesteps(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw the timesteps of ``count`` images to train on from a CPU generator, (count,)."""

    def spread_timesteps(self, count: int) -> Tensor:
        """Return ``count`` timesteps at the middles of equal parts of the range, ascending (validation)."""

    def corrupt(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Corrupted:
        """Mix clean scaled latents and noise (both (B, C, h, w)) at ``timesteps`` (B,)."""

    def loss_weights(self, timesteps: Tensor, min_snr_gamma: float) -> Tensor:
        """Return the weight (B,) float32 of each image's loss; all ones for gamma 0."""


def draw_noise(shape: Sequence[int], generator: torch.Generator, *, noise_offset: float = 0.0) -> Tensor:
    """Draw float32 noise (B, C, h, w) from a CPU generator.

    ``noise_offset`` adds one Gaussian constant per image and channel, with this deviation (Guttenberg 2023);
    the sum is the noise, so it is part of the target, too.
    """
    noise = torch.randn(tuple(shape), generator=generator, dtype=torch.float32)
    if noise_offset > 0:  # (B, C, h, w) + offset * (B, C, 1, 1)
        noise = noise + noise_offset * torch.randn(
            (shape[0], shape[1], 1, 1), generator=generator, dtype=torch.float32
        )
    return noise


def multires_noise(noise: Tensor, generator: torch.Generator, *, iterations: int, discount: float) -> Tensor:
    """Add noise of ever coarser resolution to float32 noise (1, C, h, w); the deviation becomes 1 again.

    Level i (from 0) is ``discount^i`` of noise whose sides are divided by r^i, r drawn from 2 to 4 for each
    level, and enlarged again in straight lines (Whitaker 2023); it ends with a side of one value.
    """
    size = noise.shape[2:]
    for level in range(iterations):
        ratio = 2.0 + 2.0 * float(torch.rand(1, generator=generator))
        size = torch.Size(max(1, int(side / ratio**level)) for side in size)
        coarse = torch.randn((*noise.shape[:2], *size), generator=generator)
        noise = noise + discount**level * functional.interpolate(
            coarse, size=noise.shape[2:], mode="bilinear", align_corners=False
        )
        if 1 in size:
            break
    return noise / noise.std()


def per_image_loss(
    prediction: Tensor,
    target: Tensor,
    mask: Tensor | None = None,
    error: Callable[[Tensor], Tensor] = torch.square,
) -> Tensor:
    """Return the mean error of each image, (B,) float32.

    Args:
        prediction: (B, C, h, w).
        target: of the same shape.
        mask: (B or 1, 1, h, w) from 0 to 1: the mean is weighted with it, so that an image with a small
            unmasked part weighs as much as any other. For a mask that is 0 everywhere, the error is 0.
        error: of a difference, element by element.
    """
    errors = error(prediction.float() - target.float())
    if mask is None:
        return errors.flatten(1).mean(1)
    weights = mask.to(errors).expand(errors.shape[0], 1, *errors.shape[2:])
    area = weights.flatten(1).sum(1) * errors.shape[1]
    # sum(mask * error) / sum(mask), over C, h and w: (B,)
    return (errors * weights).flatten(1).sum(1) / area.clamp(min=torch.finfo(torch.float32).tiny)
