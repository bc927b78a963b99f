"""The discrete diffusion of Stable Diffusion, and what its samplers must know about it.

Notation of Ho et al. 2020: ``alpha_bar_t`` is the kept share of signal variance, ``a = sqrt(alpha_bar)``,
``s = sqrt(1 - alpha_bar)``, noisy = a * clean + s * noise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .prediction import PREDICTIONS, Prediction
from .process import Corrupted, MakeScheduler
from .samplers import SAMPLERS
from .weighting import loss_weights

MOST_STEPS = 100_000


@dataclass(frozen=True)
class DDPM:
    """A discrete diffusion with a fixed schedule; a :class:`sdlora.diffusion.process.NoiseProcess`.

    Attributes:
        alphas_cumprod: (T,) float64 alpha_bar of each training timestep, decreasing.
        prediction: what the denoiser puts out.
    """

    alphas_cumprod: Tensor
    prediction: Prediction

    @classmethod
    def from_betas(
        cls,
        beta_start: float,
        beta_end: float,
        schedule: str,
        num_steps: int,
        prediction_type: str,
        *,
        zero_terminal_snr: bool = False,
    ) -> DDPM:
        """Build from a scheduler's settings.

        ``zero_terminal_snr`` rescales the schedule so that the last timestep is pure noise (Lin et al.
        2024, algorithm 1).

        Raises:
            ValueError: for a beta schedule other than ``linear`` or ``scaled_linear``, and for numbers that
                make none.
            KeyError: for a prediction type that is not in the table.
        """
        if not (0 < beta_start < 1 and 0 < beta_end < 1 and 1 < num_steps <= MOST_STEPS):
            raise ValueError(f"no noise schedule has betas {beta_start} to {beta_end} in {num_steps} steps")
        if schedule == "scaled_linear":  # Stable Diffusion: linear in the square root of beta
            betas = torch.linspace(beta_start**0.5, beta_end**0.5, num_steps, dtype=torch.float64) ** 2
        elif schedule == "linear":
            betas = torch.linspace(beta_start, beta_end, num_steps, dtype=torch.float64)
        else:
            raise ValueError(f"unknown beta schedule {schedule!r}")
        alphas_cumprod = torch.cumprod(1.0 - betas, dim=0)  # alpha_bar_t = prod(1 - beta_i), i <= t: (T,)
        if zero_terminal_snr:
            roots = alphas_cumprod.sqrt()
            # shift a_T to 0, scale a_1 back to what it was
            roots = (roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])
            alphas_cumprod = roots**2
        return cls(alphas_cumprod, PREDICTIONS[prediction_type])

    @property
    def ends_in_noise(self) -> bool:
        """Whether the last timestep keeps nothing of the image."""
        return float(self.alphas_cumprod[-1]) == 0.0

    @property
    def num_timesteps(self) -> int:
        """T, the number of training timesteps."""
        return self.alphas_cumprod.shape[0]

    @property
    def max_steps(self) -> int:
        """T - 1: DDIM's rule (every (T // steps)-th timestep plus 1) leaves the schedule with T steps."""
        return self.num_timesteps - 1

    @property
    def schedulers(self) -> Mapping[str, MakeScheduler]:
        """Every sampler of the table, each built on this schedule."""
        return {name: partial(sampler.build, self.schedule()) for name, sampler in SAMPLERS.items()}

    def schedule(self) -> dict[str, Any]:
        """Return this schedule as the settings that diffusers' schedulers of a discrete diffusion share."""
        alphas = self.alphas_cumprod
        before = torch.cat([torch.ones(1, dtype=alphas.dtype), alphas[:-1]])
        betas = 1.0 - alphas / before  # beta_t = 1 - alpha_bar_t / alpha_bar_(t-1), with alpha_bar_(-1) = 1
        return {
            "num_train_timesteps": self.num_timesteps,
            "trained_betas": betas.tolist(),
            "prediction_type": self.prediction.name,
            # our betas are rescaled already, so they stay the same; but this keeps diffusers' sigmas finite
            "rescale_betas_zero_snr": self.ends_in_noise,
        }

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
        noisy = a * clean + s * noise  # (B, C, h, w); a and s are (B, 1, 1, 1)
        return Corrupted(noisy, self.prediction.target(clean, noise, a, s), timesteps)

    def snr(self, timesteps: Tensor) -> Tensor:
        """Return alpha_bar / (1 - alpha_bar) at ``timesteps``, (B,) float32."""
        alpha_bar = self.alphas_cumprod[timesteps.cpu()]
        return (alpha_bar / (1.0 - alpha_bar)).float().to(timesteps.device)

    def loss_weights(self, timesteps: Tensor, min_snr_gamma: float) -> Tensor:
        """Return the min-SNR weight (B,) of each image's loss; all ones for gamma 0."""
        return loss_weights(self, timesteps, "min_snr", min_snr_gamma)

    def draw_timesteps(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw ``count`` uniform timesteps from a CPU generator, (count,) int64."""
        return torch.randint(0, self.num_timesteps, (count,), generator=generator)

    def spread_timesteps(self, count: int) -> Tensor:
        """Return ``count`` timesteps at the middles of equal parts of the range, ascending."""
        middles = (torch.arange(count, dtype=torch.float64) + 0.5) / count
        return (middles * self.num_timesteps).long()
