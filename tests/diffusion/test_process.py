"""Noise processes against diffusers' schedulers and the papers' formulae."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from diffusers import DDPMScheduler

from sdlora.config.schema import PredictionType
from sdlora.diffusion.ddpm import DDPM
from sdlora.diffusion.prediction import PREDICTIONS
from sdlora.diffusion.process import draw_noise, per_image_loss

TIMESTEPS = torch.tensor([0, 1, 250, 500, 998, 999])


def process(prediction_type: str = "epsilon") -> DDPM:
    return DDPM.from_betas(0.00085, 0.012, "scaled_linear", 1000, prediction_type)  # type: ignore[arg-type]


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_noising_and_target_equal_diffusers(prediction_type: str) -> None:
    scheduler = DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=prediction_type
    )
    generator = torch.Generator().manual_seed(0)
    clean = torch.randn((6, 4, 8, 8), generator=generator)
    noise = torch.randn((6, 4, 8, 8), generator=generator)
    corrupted = process(prediction_type).corrupt(clean, noise, TIMESTEPS)
    target = noise if prediction_type == "epsilon" else scheduler.get_velocity(clean, noise, TIMESTEPS)
    # diffusers accumulates its schedule in float32, ours in float64
    torch.testing.assert_close(
        corrupted.noisy, scheduler.add_noise(clean, noise, TIMESTEPS), rtol=0, atol=2e-4
    )
    torch.testing.assert_close(corrupted.target, target, rtol=0, atol=2e-4)


def test_min_snr_weights_follow_the_paper() -> None:
    snr = process().snr(TIMESTEPS)
    gamma = torch.full_like(snr, 5.0)
    torch.testing.assert_close(process().loss_weights(TIMESTEPS, 5.0), torch.minimum(snr, gamma) / snr)
    torch.testing.assert_close(
        process("v_prediction").loss_weights(TIMESTEPS, 5.0), torch.minimum(snr, gamma) / (snr + 1)
    )
    assert torch.equal(process().loss_weights(TIMESTEPS, 0.0), torch.ones(6))


IMPLIED = {  # the clean latents that an output stands for, solved from its meaning
    "epsilon": lambda output, noisy, a, s: (noisy - s * output) / a,
    "v_prediction": lambda output, noisy, a, s: a * noisy - s * output,
}


@pytest.mark.parametrize("name", PREDICTIONS)
def test_the_error_ratio_follows_from_the_meaning_of_the_output(name: str) -> None:
    times = torch.tensor([1, 250, 500, 998])
    ours = process(name)
    a, s = ours.signal_and_noise(times)
    generator = torch.Generator().manual_seed(0)
    clean, noise, error = (torch.randn((4, 4, 8, 8), generator=generator) for _ in range(3))
    corrupted = ours.corrupt(clean, noise, times)
    torch.testing.assert_close(
        IMPLIED[name](corrupted.target, corrupted.noisy, a, s), clean, rtol=1e-3, atol=1e-3
    )
    moved = IMPLIED[name](corrupted.target + 0.1 * error, corrupted.noisy, a, s)
    ratio = (0.1 * error).square().mean((1, 2, 3)) / (moved - clean).square().mean((1, 2, 3))
    torch.testing.assert_close(PREDICTIONS[name].error_ratio(ours.snr(times)), ratio, rtol=0.02, atol=1e-4)


def test_settings_offer_exactly_the_prediction_types_of_the_table() -> None:
    assert tuple(PREDICTIONS) == get_args(PredictionType)


def test_noise_offset_is_part_of_the_noise_and_constant_per_channel() -> None:
    plain = draw_noise((2, 4, 8, 8), torch.Generator().manual_seed(1))
    offset = draw_noise((2, 4, 8, 8), torch.Generator().manual_seed(1), noise_offset=0.5) - plain
    torch.testing.assert_close(offset, offset[:, :, :1, :1].expand_as(offset), rtol=0, atol=1e-6)
    assert float(offset[:, :, 0, 0].std()) > 0.1


def test_spread_timesteps_cover_the_range_evenly() -> None:
    assert process().spread_timesteps(4).tolist() == [125, 375, 625, 875]


def test_per_image_loss_keeps_images_apart() -> None:
    prediction, target = torch.zeros(2, 1, 2, 2), torch.tensor([1.0, 3.0]).view(2, 1, 1, 1).expand(2, 1, 2, 2)
    assert per_image_loss(prediction, target).tolist() == [1.0, 9.0]


def test_unknown_beta_schedule_is_refused() -> None:
    with pytest.raises(ValueError, match="cosine"):
        DDPM.from_betas(0.1, 0.2, "cosine", 10, "epsilon")


def test_zero_terminal_snr_rescales_as_diffusers_does() -> None:
    from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr

    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    wanted = torch.cumprod(1 - rescale_zero_terminal_snr(betas), dim=0)
    process = DDPM.from_betas(0.00085, 0.012, "scaled_linear", 1000, "v_prediction", zero_terminal_snr=True)
    torch.testing.assert_close(process.alphas_cumprod, wanted, rtol=1e-9, atol=1e-12)
    assert process.ends_in_noise
    assert not DDPM.from_betas(0.00085, 0.012, "scaled_linear", 1000, "epsilon").ends_in_noise
    assert bool(torch.isfinite(process.loss_weights(torch.arange(1000), 5.0)).all())


@pytest.mark.parametrize("size", [0.05, 0.5])
def test_noise_offset_has_the_size_it_is_given(size: float) -> None:
    shape = (512, 4, 2, 2)
    plain, offset = (draw_noise(shape, torch.Generator().manual_seed(2), noise_offset=s) for s in (0.0, size))
    constants = (offset - plain)[:, :, 0, 0]
    # 2048 draws: their deviation is known to within 2 % (one sigma)
    assert float(constants.std()) == pytest.approx(size, rel=0.08)
    assert abs(float(constants.mean())) < 0.1 * size
    # each image and each channel has its own
    assert float((constants[:, :1] - constants[:, 1:]).abs().min()) > 0
    assert float((constants[:1] - constants[1:]).abs().min()) > 0


def test_every_timestep_is_drawn_as_often_as_any_other() -> None:
    short = DDPM.from_betas(0.00085, 0.012, "scaled_linear", 10, "epsilon")
    drawn = short.draw_timesteps(5000, torch.Generator().manual_seed(0))
    counts = torch.bincount(drawn, minlength=10)
    # 500 each, known to within 21 (one sigma)
    assert len(counts) == 10 and int(counts.min()) > 400 and int(counts.max()) < 600
