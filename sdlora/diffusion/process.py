"""Noise processes: how latents are corrupted, what the denoiser must predict, how errors are weighted.

Only mathematics, no models. Notation of Ho et al. 2020: ``alpha_bar_t`` is the kept share of signal
variance, ``a = sqrt(alpha_bar)``, ``s = sqrt(1 - alpha_bar)``, noisy = a * clean + s * noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

PredictionType = Literal["epsilon", "v_prediction"]


@dataclass(frozen=True)
class Corrupted:
    """One noised batch: what goes in, what should come out, and the timesteps.

    Attributes:
        noisy: (B, C, h, w) float32 input of the denoiser.
        target: (B, C, h, w) float32 desired output.
        timesteps: (B,) int64.
    """

    noisy: Tensor
    target: Tensor
    timesteps: Tensor


@dataclass(frozen=True)
class NoiseProcess:
    """A discrete diffusion with a fixed schedule.

    Attributes:
        alphas_cumprod: (T,) float64 alpha_bar of each training timestep, decreasing.
        prediction_type: ``epsilon`` (the noise) or ``v_prediction`` (a * noise - s * clean, Salimans
            and Ho 2022, appendix D).
    """

    alphas_cumprod: Tensor
    prediction_type: PredictionType

    @classmethod
    def from_betas(
        cls,
        beta_start: float,
        beta_end: float,
        schedule: str,
        num_steps: int,
        prediction_type: PredictionType,
        *,
        zero_terminal_snr: bool = False,
    ) -> NoiseProcess:
        """Build from a scheduler's settings.

        ``zero_terminal_snr`` rescales the schedule so that the last timestep is pure noise (Lin et al.
        2024, algorithm 1).

        Raises:
            ValueError: for a beta schedule other than ``linear`` or ``scaled_linear``.
        """
        if schedule == "scaled_linear":  # Stable Diffusion: linear in the square root of beta
            betas = torch.linspace(beta_start**0.5, beta_end**0.5, num_steps, dtype=torch.float64) ** 2
        elif schedule == "linear":
            betas = torch.linspace(beta_start, beta_end, num_steps, dtype=torch.float64)
        else:
            raise ValueError(f"unknown beta schedule {schedule!r}")
        alphas_cumprod = torch.cumprod(1.0 - betas, dim=0)
        if zero_terminal_snr:
            roots = alphas_cumprod.sqrt()
            roots = (roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])
            alphas_cumprod = roots**2
        return cls(alphas_cumprod, prediction_type)

    @property
    def ends_in_noise(self) -> bool:
        """Whether the last timestep keeps nothing of the image."""
        return float(self.alphas_cumprod[-1]) == 0.0

    @property
    def num_timesteps(self) -> int:
        """T, the number of training timesteps."""
        return self.alphas_cumprod.shape[0]

    def signal_and_noise(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Return a and s at ``timesteps`` (B,), each (B, 1, 1, 1) float32 on the timesteps' device."""
        alpha_bar = self.alphas_cumprod[timesteps.cpu()]
        a = alpha_bar.sqrt().float().view(-1, 1, 1, 1)
        s = (1.0 - alpha_bar).sqrt().float().view(-1, 1, 1, 1)
        return a.to(timesteps.device), s.to(timesteps.device)

    def corrupt(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Corrupted:
        """Mix clean latents and noise (both (B, C, h, w)) at ``timesteps`` (B,)."""
        clean, noise = clean.float(), noise.float()
        a, s = self.signal_and_noise(timesteps)
        noisy = a * clean + s * noise
        target = noise if self.prediction_type == "epsilon" else a * noise - s * clean
        return Corrupted(noisy, target, timesteps)

    def snr(self, timesteps: Tensor) -> Tensor:
        """Return alpha_bar / (1 - alpha_bar) at ``timesteps``, (B,) float32."""
        alpha_bar = self.alphas_cumprod[timesteps.cpu()]
        return (alpha_bar / (1.0 - alpha_bar)).float().to(timesteps.device)

    def loss_weights(self, timesteps: Tensor, min_snr_gamma: float) -> Tensor:
        """Return the weight (B,) of each image's loss; all ones for gamma 0.

        Min-SNR (Hang et al. 2023, section 3.4): min(snr, gamma) / snr for epsilon,
        min(snr, gamma) / (snr + 1) for v.
        """
        if min_snr_gamma <= 0:
            return torch.ones(timesteps.shape, dtype=torch.float32, device=timesteps.device)
        snr = self.snr(timesteps)
        limited = snr.clamp(max=min_snr_gamma)
        return limited / (snr if self.prediction_type == "epsilon" else snr + 1.0)

    def sample_timesteps(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw ``count`` uniform timesteps from a CPU generator, (count,) int64."""
        return torch.randint(0, self.num_timesteps, (count,), generator=generator)

    def spread_timesteps(self, count: int) -> Tensor:
        """Return ``count`` timesteps at the middles of equal parts of the range, ascending."""
        middles = (torch.arange(count, dtype=torch.float64) + 0.5) / count
        return (middles * self.num_timesteps).long()


def draw_noise(shape: Sequence[int], generator: torch.Generator, *, noise_offset: float = 0.0) -> Tensor:
    """Draw float32 noise (B, C, h, w) from a CPU generator.

    ``noise_offset`` adds one Gaussian constant per image and channel (Guttenberg 2023); the sum is
    the noise, so it is part of the target too.
    """
    noise = torch.randn(tuple(shape), generator=generator, dtype=torch.float32)
    if noise_offset > 0:
        noise = noise + noise_offset * torch.randn(
            (shape[0], shape[1], 1, 1), generator=generator, dtype=torch.float32
        )
    return noise


def per_image_loss(prediction: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the mean squared error of each image, (B,) float32.

    Args:
        prediction: (B, C, h, w).
        target: of the same shape.
        mask: (B or 1, 1, h, w) from 0 to 1: the mean is weighted with it, so that an image of which little
            counts weighs as much as any other. Where all of it is 0, the error is 0.
    """
    errors = (prediction.float() - target.float()).square()
    if mask is None:
        return errors.flatten(1).mean(1)
    weights = mask.to(errors).expand(errors.shape[0], 1, *errors.shape[2:])
    area = weights.flatten(1).sum(1) * errors.shape[1]
    return (errors * weights).flatten(1).sum(1) / area.clamp(min=torch.finfo(torch.float32).tiny)
