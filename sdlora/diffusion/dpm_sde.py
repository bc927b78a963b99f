"""DPM-Solver++ as a stochastic equation, one step of second order at a time: WebUI's ``DPM++ SDE``.

Lu et al. 2022b (DPM-Solver++), algorithm 1, with new noise as in Song et al. 2021. diffusers has it as
``DPMSolverSDEScheduler``, which cannot be imported without torchsde and scipy; here the noise of a step comes
from each image's own generator instead, as two parts of one Brownian path. Noise levels and timesteps are
those of diffusers' ``HeunDiscreteScheduler``, which are the same but for the middle of each step.
"""

from __future__ import annotations

from typing import Any

import numpy
import torch
from diffusers import HeunDiscreteScheduler
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor


class DPMSolverSDE(HeunDiscreteScheduler):
    """A :class:`sdlora.diffusion.process.Scheduler`: two calls a step, one for the last."""

    def set_timesteps(self, num_inference_steps: int, *args: Any, **more: Any) -> None:
        """Take the timesteps of ``num_inference_steps`` steps, and of their middles."""
        super().set_timesteps(num_inference_steps, *args, **more)
        self._started: Tensor | None = None  # the sample that a step began with, between its two calls
        self._path: Tensor | None = None  # what the Brownian path went in its first half
        levels = numpy.asarray(self.sigmas[:-1:2], dtype=numpy.float64)
        trained = ((1.0 - self.alphas_cumprod) / self.alphas_cumprod).sqrt().log().double().numpy()
        # the middle of -log sigma
        middles = [self._sigma_to_t(level, trained) for level in numpy.sqrt(levels[:-1] * levels[1:])]
        self.timesteps[1::2] = torch.tensor(numpy.array(middles), dtype=self.timesteps.dtype)

    def scale_model_input(self, sample: Tensor, timestep: Tensor) -> Tensor:
        """Return the sample (B, C, h, w) as the denoiser takes it: of unit variance."""
        scaled: Tensor = sample / (self._level(timestep) ** 2 + 1) ** 0.5
        return scaled

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor,
        sample: Tensor,
        return_dict: bool = True,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> tuple[Tensor]:
        """Return the sample after this call, (B, C, h, w): in the middle of a step, or at its end."""
        level = self._level(timestep)
        clean = self._clean(model_output, sample, level)
        if self._started is None:
            begin, end = self.sigmas[self._step_index], self.sigmas[self._step_index + 1]
        else:
            begin, end = self.sigmas[self._step_index - 1], self.sigmas[self._step_index]
        self._step_index += 1
        if end == 0:
            return (clean,)
        middle = (begin * end) ** 0.5
        noise = randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=sample.dtype)
        if self._started is None:
            self._started, self._path = sample, (begin - middle) ** 0.5 * noise
            return (_towards(sample, clean, begin, middle, noise),)
        path = self._path + (middle - end) ** 0.5 * noise
        started, self._started, self._path = self._started, None, None
        return (_towards(started, clean, begin, end, path / (begin - end) ** 0.5),)

    def _level(self, timestep: Tensor) -> Tensor:
        """Return the noise level of the call that comes next."""
        if self._step_index is None:
            self._init_step_index(timestep)
        level: Tensor = self.sigmas[self._step_index]
        if self._started is not None:
            level = (self.sigmas[self._step_index - 1] * level) ** 0.5
        return level

    def _clean(self, model_output: Tensor, sample: Tensor, level: Tensor) -> Tensor:
        if self.config.prediction_type == "epsilon":
            return sample - level * model_output
        # v-prediction, with the sample's scale sqrt(level^2 + 1)
        return sample / (level**2 + 1) - model_output * level / (level**2 + 1) ** 0.5


def _towards(sample: Tensor, clean: Tensor, begin: Tensor, end: Tensor, noise: Tensor) -> Tensor:
    """Return the sample at level ``end``: less noise than that, and as much new noise as is missing."""
    up = torch.minimum(end, (end**2 * (begin**2 - end**2) / begin**2) ** 0.5)
    down = (end**2 - up**2) ** 0.5
    return down / begin * sample + (1 - down / begin) * clean + up * noise
