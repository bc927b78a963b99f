"""How errors count in the loss: by the signal-to-noise ratio of their timestep, and by their own size.

Weights are written for errors in the clean latents, w(snr); the prediction type turns them into weights of
its own squared error (:meth:`sdlora.diffusion.prediction.Prediction.error_ratio`). Where the schedule ends
in pure noise (snr = 0), snr + 1 takes the place of snr: that is the unit weight of v-prediction (Salimans
and Ho 2022, "SNR + 1"), which Lin et al. 2024 train such schedules with. With snr itself the pure-noise step,
at which every drawing begins, would have weight 0 and never be learned.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from .prediction import Prediction


@runtime_checkable
class SnrProcess(Protocol):
    """A noise process that knows its signal-to-noise ratio; a :class:`sdlora.diffusion.ddpm.DDPM` does."""

    @property
    def prediction(self) -> Prediction:
        """What the denoiser puts out."""

    @property
    def ends_in_noise(self) -> bool:
        """Whether the last timestep keeps nothing of the image."""

    @property
    def num_timesteps(self) -> int:
        """T, the number of training timesteps."""

    def snr(self, timesteps: Tensor) -> Tensor:
        """Return (a / s)^2 at ``timesteps``, (B,) float32."""


def _min_snr(snr: Tensor, gamma: float) -> Tensor:
    """``min(snr, gamma)`` (Hang et al. 2023, section 3.4)."""
    return snr.clamp(max=gamma)


def _soft_min_snr(snr: Tensor, gamma: float) -> Tensor:
    """``snr gamma / (snr + gamma)``: the same without a corner (Crowson et al. 2024, section 3.2)."""
    return snr * gamma / (snr + gamma)


def _debiased(snr: Tensor, gamma: float) -> Tensor:
    """``sqrt(snr)``, so 1 / sqrt(snr) of an error in the noise (Yu et al. 2023); snr up to 1000."""
    return snr.clamp(max=1000.0).sqrt()


WEIGHTINGS: Mapping[str, Callable[[Tensor, float], Tensor]] = {
    "min_snr": _min_snr,
    "soft_min_snr": _soft_min_snr,
    "debiased": _debiased,
}
"""By the name in ``training.loss_weighting``: (snr, gamma) -> weight of an error in the clean latents."""


def loss_weights(process: SnrProcess, timesteps: Tensor, weighting: str, gamma: float) -> Tensor:
    """Return the weight (B,) float32 of each image's squared error; all ones for gamma 0."""
    if gamma <= 0 and weighting != "debiased":
        return torch.ones(timesteps.shape, dtype=torch.float32, device=timesteps.device)
    snr = process.snr(timesteps)
    signal = snr + 1.0 if process.ends_in_noise else snr
    return WEIGHTINGS[weighting](signal, gamma) / process.prediction.error_ratio(snr)


def huber_threshold(process: SnrProcess, timesteps: Tensor, schedule: str, c: float) -> Tensor:
    """Return where errors begin to count by their size, (B,) float32 (Khrapov et al. 2024, section 4).

    ``constant``: c at all timesteps. ``exponential``: from 1 without noise to c at the last timestep.
    ``snr``: (1 - c) / (1 + s / a)^2 + c, from 1 to c as well. All as in kohya's scripts.
    """
    if schedule == "constant":
        return torch.full(timesteps.shape, c, dtype=torch.float32, device=timesteps.device)
    if schedule == "exponential":
        return torch.exp(math.log(c) / process.num_timesteps * timesteps.float())
    sigma = process.snr(timesteps).clamp(min=torch.finfo(torch.float32).tiny).rsqrt()  # s / a
    return (1.0 - c) / (1.0 + sigma).square() + c


def squared(difference: Tensor, threshold: Tensor) -> Tensor:
    """Return d^2; the threshold is not needed."""
    return difference.square()


def huber(difference: Tensor, threshold: Tensor) -> Tensor:
    """Return the pseudo-Huber error 2 c (sqrt(d^2 + c^2) - c): d^2 where |d| << c, 2 c |d| where it is large.

    Args:
        difference: d, (B, C, h, w).
        threshold: c, (B, 1, 1, 1).
    """
    return threshold * smooth_l1(difference, threshold)


def smooth_l1(difference: Tensor, threshold: Tensor) -> Tensor:
    """Return the smooth absolute error 2 (sqrt(d^2 + c^2) - c): as :func:`huber`, divided by c."""
    return 2.0 * ((difference.square() + threshold.square()).sqrt() - threshold)


ERRORS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "l2": squared,
    "huber": huber,
    "smooth_l1": smooth_l1,
}
"""By the name in ``training.loss``."""
