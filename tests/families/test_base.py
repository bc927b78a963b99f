"""Latents: what is drawn from a posterior, and the scale that a denoiser works at."""

from __future__ import annotations

import math

import pytest
import torch

from sdlora.families.base import LatentSpace, Posterior


@pytest.mark.parametrize("deviation", [0.1, 1.0, 3.0])
def test_latents_are_drawn_with_the_posteriors_mean_and_deviation(deviation: float) -> None:
    mean = torch.full((1, 4, 64, 64), 7.0)
    logvar = torch.full_like(mean, 2 * math.log(deviation))
    latents = Posterior(mean, logvar).sample(torch.Generator().manual_seed(0))
    # 16,384 draws: their deviation is known to within 0.6 % (one sigma)
    assert float(latents.std()) == pytest.approx(deviation, rel=0.03)
    assert float(latents.mean()) == pytest.approx(7.0, abs=0.05 * deviation)


def test_scaling_subtracts_the_shift_and_multiplies_and_is_undone() -> None:
    space = LatentSpace(channels=16, factor=8, scaling=0.25, shift=0.5)
    latents = torch.tensor([0.5, 4.5, -3.5])
    assert space.scaled(latents).tolist() == [0.0, 1.0, -1.0]
    assert space.unscaled(space.scaled(latents)).tolist() == latents.tolist()
    assert space.shape(64, 128) == (16, 8, 16)
