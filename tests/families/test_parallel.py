"""Splitting a batch over cores changes nothing but rounding, and repeats bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sdlora.adapters.attach import attach, create_adapter
from sdlora.config.schema import AdapterConfig
from sdlora.families.loading import load_model
from sdlora.families.parallel import SplitPredictor
from sdlora.families.sd1 import StableDiffusion1

pytestmark = pytest.mark.usefixtures("two_threads")


@pytest.fixture(scope="module")
def model(tiny_base: Path) -> StableDiffusion1:
    return load_model(str(tiny_base), dtype=torch.float32, device=torch.device("cpu"))


def inputs(model: StableDiffusion1, count: int) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(count)
    noisy = torch.randn((count, *model.facts.latents.shape(32, 32)), generator=generator)
    with torch.no_grad():
        text = model.encode_text([f"a cat {number}" for number in range(count)])
    return noisy, torch.arange(count) * 100, text


@pytest.mark.parametrize("count", [1, 2, 5])
def test_prediction_equals_the_whole_batch(model: StableDiffusion1, count: int) -> None:
    noisy, timesteps, text = inputs(model, count)
    with torch.no_grad(), SplitPredictor(model) as split:
        whole = model.predict(noisy, timesteps, text, [])
        parts = split.predict_with_gradients(noisy, timesteps, text, []).detach()
        torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-5)


def test_gradients_equal_the_whole_batch_and_repeat_exactly(tiny_base: Path) -> None:
    model = load_model(str(tiny_base), dtype=torch.float32, device=torch.device("cpu"))
    settings = AdapterConfig(rank=2, alpha=2.0, targets="all")
    layers = attach(model, create_adapter(model, settings, 0), "a")
    parameters = [parameter for layer in layers for parameter in (layer.down, layer.up)]
    for parameter in parameters:
        parameter.requires_grad_(True)
    noisy, timesteps, text = inputs(model, 5)

    def gradients(split: SplitPredictor | None) -> list[torch.Tensor]:
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        predict = split.predict_with_gradients if split else model.predict
        predict(noisy, timesteps, text, []).square().sum().backward()
        if split:
            split.backward(parameters)
        return [parameter.grad.clone() for parameter in parameters if parameter.grad is not None]

    whole = gradients(None)
    assert sum(float(gradient.abs().sum()) for gradient in whole) > 1.0
    with SplitPredictor(model) as split:
        first, second = gradients(split), gradients(split)
    assert len(first) == len(parameters)
    for expected, other, again in zip(whole, first, second, strict=True):
        torch.testing.assert_close(other, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()) + 1e-6)
        assert torch.equal(other, again)
