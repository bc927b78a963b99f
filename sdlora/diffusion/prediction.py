"""What a denoiser's output means: one object for each prediction type, with its formulae.

In all of them noisy = a * clean + s * noise and snr = (a / s)^2. Whatever follows from the meaning of the
output (weights of the loss, whether it says anything about pure noise) is derived here and nowhere else.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor


class Prediction(ABC):
    """One prediction type.

    Attributes:
        name: in settings and in the configs of diffusers' schedulers.
        header_word: value of ``modelspec.prediction_type``; empty where the specification has none.
        speaks_of_pure_noise: whether the output says something about the image where a = 0.
    """

    name: ClassVar[str]
    header_word: ClassVar[str] = ""
    speaks_of_pure_noise: ClassVar[bool]

    @abstractmethod
    def target(self, clean: Tensor, noise: Tensor, a: Tensor, s: Tensor) -> Tensor:
        """Return what the denoiser should put out, (B, C, h, w) float32.

        Args:
            clean: (B, C, h, w) scaled latents.
            noise: (B, C, h, w).
            a: share of the clean latents, (B, 1, 1, 1).
            s: share of the noise, (B, 1, 1, 1).
        """

    @abstractmethod
    def error_ratio(self, snr: Tensor) -> Tensor:
        """Return the squared error of the output that a squared error of 1 in the clean latents means, (B,).

        So a loss on the clean latents with weight w(snr) is a loss on the output with weight w(snr) / this.
        """


class Epsilon(Prediction):
    """The noise (Ho et al. 2020, equation 14)."""

    name = "epsilon"
    header_word = "epsilon"
    speaks_of_pure_noise = False

    def target(self, clean: Tensor, noise: Tensor, a: Tensor, s: Tensor) -> Tensor:
        return noise  # (B, C, h, w)

    def error_ratio(self, snr: Tensor) -> Tensor:
        return snr  # clean = (noisy - s * output) / a, so the ratio is (a / s)^2


class Velocity(Prediction):
    """The velocity on the circle of a and s (Salimans and Ho 2022, appendix D)."""

    name = "v_prediction"
    header_word = "v"
    speaks_of_pure_noise = True

    def target(self, clean: Tensor, noise: Tensor, a: Tensor, s: Tensor) -> Tensor:
        return a * noise - s * clean

    def error_ratio(self, snr: Tensor) -> Tensor:
        return snr + 1.0  # clean = a * noisy - s * output and a^2 + s^2 = 1, so the ratio is 1 / s^2


PREDICTIONS: dict[str, Prediction] = {prediction.name: prediction for prediction in (Epsilon(), Velocity())}
