"""Samplers against diffusers' own pipeline, WebUI's schedules, and a flow whose solution is known."""

from __future__ import annotations

import importlib
import inspect
import math
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy
import pytest
import torch
from torch import Tensor

from sdlora.config.schema import ModelConfig, PredictionType
from sdlora.diffusion.ddpm import DDPM
from sdlora.diffusion.samplers import SAMPLERS, find_sampler, make_scheduler
from sdlora.errors import ConfigError
from sdlora.families.base import DiffusionModel
from sdlora.families.loading import load_model
from sdlora.generation.render import GenerateRequest, denoise

STEPS, GUIDANCE = 4, 5.0
NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


def process(prediction_type: PredictionType = "epsilon") -> DDPM:
    return DDPM.from_betas(0.00085, 0.012, "scaled_linear", 1000, prediction_type)


@pytest.fixture(scope="module")
def mini() -> DiffusionModel:
    model = load_model("mini", dtype=torch.float32, device=torch.device("cpu"))
    model.prepare(training=False)
    return model


def diffusers_sde(prediction_type: str = "epsilon") -> Any:
    """Return diffusers' scheduler, which imports torchsde for nothing but a Brownian path.

    ``scheduler.generators`` must be set; the path is drawn from them, half a step at a time.
    """
    sys.modules.setdefault("torchsde", types.ModuleType("torchsde"))
    module = importlib.import_module("diffusers.schedulers.scheduling_dpmsolver_sde")

    class WithPath(module.DPMSolverSDEScheduler):  # type: ignore[misc, name-defined]
        generators: list[torch.Generator]

        def step(self, model_output: Tensor, timestep: Any, sample: Tensor, **more: Any) -> Any:
            def drawn() -> Tensor:
                return torch.stack([torch.randn(sample.shape[1:], generator=g) for g in self.generators])

            def path(begin: Tensor, end: Tensor) -> Tensor:
                if self.state_in_first_order:
                    self.half = end, (begin - end) ** 0.5 * drawn()
                    return self.half[1] / (begin - end) ** 0.5
                middle, gone = self.half
                return (gone + (middle - end) ** 0.5 * drawn()) / (begin - end) ** 0.5

            self.noise_sampler = path
            return super().step(model_output, timestep, sample, **more)

    return WithPath(**{**NOISE, "steps_offset": 0}, use_karras_sigmas=True, prediction_type=prediction_type)


# How a user of diffusers makes each of these samplers: scheduler, and arguments of the pipeline.
PIPELINES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "DDIM": (
        lambda: diffusers.DDIMScheduler(**NOISE, clip_sample=False, set_alpha_to_one=False),
        {"num_inference_steps": STEPS},
    ),
    "Euler": (
        lambda: diffusers.EulerDiscreteScheduler(**NOISE, timestep_spacing="linspace"),
        {"num_inference_steps": STEPS},
    ),
    "Euler a": (
        lambda: diffusers.EulerAncestralDiscreteScheduler(**NOISE, timestep_spacing="linspace"),
        {"num_inference_steps": STEPS},
    ),
    "DPM++ 2M": (
        lambda: diffusers.DPMSolverMultistepScheduler(**NOISE),
        {"timesteps": numpy.linspace(999, 0, STEPS).round().astype(int).tolist()},
    ),
    "DPM++ 2M Karras": (
        lambda: diffusers.DPMSolverMultistepScheduler(**NOISE, use_karras_sigmas=True),
        {"num_inference_steps": STEPS},
    ),
    "DPM++ 2M SDE": (
        lambda: diffusers.DPMSolverMultistepScheduler(**NOISE, algorithm_type="sde-dpmsolver++"),
        {"timesteps": numpy.linspace(999, 0, STEPS).round().astype(int).tolist()},
    ),
    "DPM++ 2M SDE Karras": (
        lambda: diffusers.DPMSolverMultistepScheduler(
            **NOISE, algorithm_type="sde-dpmsolver++", use_karras_sigmas=True
        ),
        {"num_inference_steps": STEPS},
    ),
    "DPM++ SDE Karras": (lambda: diffusers_sde(), {"num_inference_steps": STEPS}),
    "UniPC": (
        lambda: diffusers.UniPCMultistepScheduler(**NOISE),
        {"num_inference_steps": STEPS},
    ),
    "LCM": (lambda: diffusers.LCMScheduler(**NOISE), {"num_inference_steps": STEPS}),
    "Heun": (lambda: diffusers.HeunDiscreteScheduler(**NOISE), {"num_inference_steps": STEPS}),
    "Euler trailing": (
        lambda: diffusers.EulerDiscreteScheduler(**NOISE, timestep_spacing="trailing"),
        {"num_inference_steps": STEPS},
    ),
}


@pytest.mark.long
@pytest.mark.parametrize("name", SAMPLERS)
def test_latents_equal_those_of_the_diffusers_pipeline(mini: DiffusionModel, name: str) -> None:
    build, arguments = PIPELINES[name]
    parts = mini.__dict__
    pipeline = diffusers.StableDiffusionPipeline(
        vae=parts["vae"],
        text_encoder=parts["text_encoders"]["text_encoder"],
        tokenizer=parts["tokenizers"]["text_encoder"],
        unet=parts["denoiser"],
        scheduler=build(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    prompts, seeds = ["an icon of a cat", "an icon of a red guitar"], [4, 5]
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    pipeline.scheduler.generators = generators
    expected = pipeline(
        prompts,
        negative_prompt=["", "blue"],
        guidance_scale=GUIDANCE,
        height=64,
        width=64,
        generator=generators,
        output_type="latent",
        **arguments,
    ).images
    requests = [
        GenerateRequest(
            prompt, negative, height=64, width=64, steps=STEPS, guidance=GUIDANCE, sampler=name, seed=seed
        )
        for prompt, negative, seed in zip(prompts, ["", "blue"], seeds, strict=True)
    ]
    actual = denoise(mini, requests)
    assert actual.shape == expected.shape == (2, 4, 16, 16)
    assert float(expected.std()) > 0.1
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_every_step_is_that_of_diffusers_scheduler(name: str, kind: PredictionType) -> None:
    build, arguments = PIPELINES[name]
    scheduler = build()
    config = {key: value for key, value in dict(scheduler.config).items() if not key.startswith("_")}
    theirs = type(scheduler)(**{**config, "prediction_type": kind})
    theirs.set_timesteps(**arguments)
    ours = make_scheduler(name, process(kind), STEPS)
    mine, other = (torch.Generator().manual_seed(1) for _ in range(2))
    theirs.generators = [other]
    told = torch.Generator().manual_seed(2)
    sample = torch.randn((1, 4, 8, 8), generator=told) * float(ours.init_noise_sigma)
    expected = sample.clone()
    extra = {"generator": mine} if SAMPLERS[name].ancestral else {}
    takes = "generator" in inspect.signature(type(theirs).step).parameters and SAMPLERS[name].ancestral
    assert len(ours.timesteps) == len(theirs.timesteps)
    for timestep, their_timestep in zip(ours.timesteps, theirs.timesteps, strict=True):
        assert float(timestep) == pytest.approx(float(their_timestep), abs=0.02)
        output = torch.randn(sample.shape, generator=told)
        seen = ours.scale_model_input(sample, timestep)
        their_input = theirs.scale_model_input(expected, their_timestep)
        torch.testing.assert_close(seen, their_input, rtol=1e-4, atol=1e-4)
        sample = ours.step(output, timestep, sample, **extra, return_dict=False)[0]
        more = {"generator": other} if takes else {}
        expected = theirs.step(output, their_timestep, expected, **more, return_dict=False)[0]
        torch.testing.assert_close(sample, expected, rtol=1e-4, atol=1e-4)
    assert float(expected.std()) > 0.1


def gaussian_flow(
    name: str, steps: int, start: Tensor, mean: Tensor, spread: float, kind: PredictionType
) -> Tensor:
    """Sample N(mean, spread^2) with its exact denoiser."""
    noise = process(kind)
    scheduler = make_scheduler(name, noise, steps)
    sample = start * float(scheduler.init_noise_sigma)
    for timestep in scheduler.timesteps:
        inputs = scheduler.scale_model_input(sample, timestep)
        low = math.floor(float(timestep))
        near = noise.alphas_cumprod[[low, min(low + 1, 999)]].log()
        alpha_bar = float(torch.lerp(near[0], near[1], float(timestep) - low).exp())
        a, s = alpha_bar**0.5, (1.0 - alpha_bar) ** 0.5
        epsilon = (inputs - a * mean) * s / (a * a * spread * spread + s * s)
        clean = (inputs - s * epsilon) / a
        prediction = epsilon if kind == "epsilon" else a * epsilon - s * clean
        sample = scheduler.step(prediction, timestep, sample, return_dict=False)[0]
    return sample


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", [name for name, sampler in SAMPLERS.items() if not sampler.ancestral])
def test_deterministic_samplers_follow_the_known_flow(name: str, kind: PredictionType) -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn((1, 4, 16, 16), generator=generator)
    mean, spread = 0.5 * torch.randn((1, 4, 16, 16), generator=generator), 0.6
    actual = gaussian_flow(name, 200, start, mean, spread, kind)
    # dx/dsigma = (x - mean) sigma / (spread^2 + sigma^2), from the largest sigma down to 0
    largest = float((1.0 / process().alphas_cumprod[-1] - 1.0) ** 0.5)
    expected = mean + (start * largest - mean) * spread / (spread**2 + largest**2) ** 0.5
    # DDIM and Euler are of first order (0.018 and 0.030 off here), DPM++ of second (0.013, Karras 0.003)
    first = name in ("DDIM", "Euler", "Euler trailing")
    torch.testing.assert_close(actual, expected, rtol=0.0, atol=0.04 if first else 0.02)


@pytest.mark.parametrize("name", ["Euler", "Euler a", "DPM++ 2M"])
@pytest.mark.parametrize("steps", [1, 5, 20, 31])
def test_even_schedules_are_those_of_webui(name: str, steps: int) -> None:
    sigmas = ((1.0 - process().alphas_cumprod) / process().alphas_cumprod).sqrt()
    times = torch.linspace(
        999, 0, steps, dtype=torch.float64
    )  # k_diffusion.external.DiscreteSchedule.get_sigmas
    low, high = times.floor().long(), times.ceil().long()
    wanted = torch.lerp(sigmas.log()[low], sigmas.log()[high], times - low).exp()
    scheduler = make_scheduler(name, process(), steps)
    exact = name != "DPM++ 2M"  # whole timesteps there
    torch.testing.assert_close(scheduler.timesteps.double(), times, rtol=0.0, atol=1e-3 if exact else 0.5)
    torch.testing.assert_close(
        scheduler.sigmas[:-1].double(), wanted, rtol=2e-4 if exact else 6e-2, atol=1e-5
    )
    assert float(scheduler.sigmas[-1]) == 0.0 and len(scheduler.timesteps) == steps


def test_the_karras_schedule_is_that_of_the_paper() -> None:
    sigmas = ((1.0 - process().alphas_cumprod) / process().alphas_cumprod).sqrt()
    ramp = torch.linspace(0, 1, 20, dtype=torch.float64)
    most, least = sigmas[-1] ** (1 / 7), sigmas[0] ** (1 / 7)
    scheduler = make_scheduler("DPM++ 2M Karras", process(), 20)
    torch.testing.assert_close(
        scheduler.sigmas[:-1].double(), (most + ramp * (least - most)) ** 7, rtol=1e-4, atol=0
    )


@pytest.mark.parametrize("steps", [1, 5, 20, 50])
def test_ddim_takes_the_timesteps_of_webui(steps: int) -> None:
    wanted = [min(t + 1, 999) for t in range(0, 1000, 1000 // steps)][::-1]
    assert make_scheduler("DDIM", process(), steps).timesteps.tolist() == wanted


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_schedulers_noise_is_the_bases(name: str) -> None:
    odd = DDPM.from_betas(0.001, 0.02, "linear", 500, "v_prediction")
    scheduler = make_scheduler(name, odd, 7)
    torch.testing.assert_close(scheduler.alphas_cumprod.double(), odd.alphas_cumprod, rtol=1e-4, atol=1e-7)
    assert scheduler.config.prediction_type == "v_prediction"
    assert scheduler.config.num_train_timesteps == 500


@pytest.mark.parametrize("steps", [1, 2, 600, 999])
@pytest.mark.parametrize("name", SAMPLERS)
def test_every_number_of_steps_runs_to_its_end(name: str, steps: int) -> None:
    scheduler = make_scheduler(name, process(), steps)
    sample = torch.full((1, 4, 2, 2), float(scheduler.init_noise_sigma))
    count = 0
    for timestep in scheduler.timesteps:
        assert 0 <= float(timestep) <= 999
        inputs = scheduler.scale_model_input(sample, timestep)
        sample = scheduler.step(inputs * 0.1, timestep, sample, return_dict=False)[0]
        count += 1
    expected = 2 * steps - 1 if SAMPLERS[name].second_order else steps
    assert count == expected and bool(torch.isfinite(sample).all())


@pytest.mark.parametrize("steps", [0, -3, 1000])
def test_impossible_numbers_of_steps_are_refused(steps: int) -> None:
    with pytest.raises(ConfigError, match=rf"steps={steps}.*1 to 999"):
        make_scheduler("DDIM", process(), steps)


def test_names_are_found_in_any_case_and_misspellings_get_the_nearest() -> None:
    assert find_sampler("dpm++ 2m  karras") is SAMPLERS["DPM++ 2M Karras"]
    assert find_sampler("EULER A") is SAMPLERS["Euler a"]
    with pytest.raises(ConfigError, match=r"`Eulr a`.*did you mean `Euler a`\?.*DDIM, Euler, Euler a, DPM"):
        find_sampler("Eulr a")
    with pytest.raises(ConfigError, match=r"`XQ`: unknown; There are"):
        find_sampler("XQ")
    with pytest.raises(ConfigError) as caught:
        find_sampler("Eu" * 100_000)
    assert len(str(caught.value)) < 500


def test_the_tiny_base_runs_with_v_prediction(tiny_base: Path) -> None:
    base = ModelConfig(base=str(tiny_base), prediction_type="v_prediction")
    model = load_model(base, dtype=torch.float32, device=torch.device("cpu"))
    for name in SAMPLERS:
        request = GenerateRequest("a", height=32, width=32, steps=3, guidance=2.0, sampler=name, seed=0)
        assert bool(torch.isfinite(denoise(model, [request])).all())


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_schedule_that_ends_in_noise_is_sampled_from_its_very_end(name: str) -> None:
    rescaled = DDPM.from_betas(0.00085, 0.012, "scaled_linear", 1000, "v_prediction", zero_terminal_snr=True)
    scheduler = make_scheduler(name, rescaled, 10)
    assert int(scheduler.timesteps[0]) == 999
    clean = torch.full((1, 4, 2, 2), 0.5)
    latents = (
        torch.randn(clean.shape, generator=torch.Generator().manual_seed(0)) * scheduler.init_noise_sigma
    )
    generator = {"generator": torch.Generator().manual_seed(1)} if SAMPLERS[name].ancestral else {}
    for timestep in scheduler.timesteps:
        scaled = scheduler.scale_model_input(latents, timestep)
        # what a perfect denoiser of that one image would say, at the timestep's own signal and noise
        alpha_bar = rescaled.alphas_cumprod[int(float(timestep))].float()
        a, s = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        noise = (scaled - a * clean) / s
        output = a * noise - s * clean
        latents = scheduler.step(output, timestep, latents, **generator, return_dict=False)[0]
    assert bool(torch.isfinite(latents).all())
    # DDIM ends at the first trained noise level, 0.03
    torch.testing.assert_close(latents, clean, rtol=0, atol=0.1)
