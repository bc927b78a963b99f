"""The objective against its formulae: noise, timesteps and weights of each image from its visit alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from sdlora.config.toml import load_config
from sdlora.data.batching.batches import Batch
from sdlora.data.reading.items import Visit
from sdlora.diffusion.ddpm import DDPM
from sdlora.families.base import SizeHint
from sdlora.families.latent_model import LatentModel
from sdlora.families.loading import load_model
from sdlora.training.objective import loss_of

CAPTIONS = ("a cat", "a dog", "a hat")
WEIGHTS = (1.0, 3.0, 0.5)


@pytest.fixture(scope="module")
def model(tiny_base: Path) -> LatentModel:
    return load_model(str(tiny_base), dtype=torch.float32, device=torch.device("cpu"))


def batch_of(model: LatentModel, regularisation: tuple[bool, ...] = (False, False, False)) -> Batch:
    latents = torch.randn((3, 4, 8, 8), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        text = model.encode_text(CAPTIONS)
    return Batch(
        latents=latents,
        captions=CAPTIONS,
        text=text,
        sizes=(SizeHint((32, 32), (0, 0), (32, 32)),) * 3,
        names=("a.png", "b.png", "c.png"),
        weights=torch.tensor(WEIGHTS),
        regularisation=regularisation,
        blank={name: tensor[0] for name, tensor in text.items()},
        visits=(Visit(0, 0, 0), Visit(1, 4, 0), Visit(1, 4, 2)),
        seed=11,
    )


def drawn(batch: Batch, offset: float) -> tuple[Tensor, Tensor]:
    """Return each image's noise and timestep, drawn one after the other from its visit's generator."""
    noises, times = [], []
    for generator in batch.generators("noise"):
        noise = torch.randn((1, 4, 8, 8), generator=generator)
        if offset:
            noise = noise + offset * torch.randn((1, 4, 1, 1), generator=generator)
        noises.append(noise)
        times.append(torch.randint(0, 1000, (1,), generator=generator))
    return torch.cat(noises), torch.cat(times)


class Zeros:
    """Stands in for the denoiser's call: keeps what it is given and predicts zeros."""

    noisy: Tensor
    timesteps: Tensor

    def __call__(self, noisy: Tensor, timesteps: Tensor, text: object, sizes: object) -> Tensor:
        self.noisy, self.timesteps = noisy, timesteps
        return torch.zeros_like(noisy)


@pytest.mark.parametrize("offset", [0.0, 0.4])
@pytest.mark.parametrize("gamma", [0.0, 5.0, 0.05])
def test_the_loss_is_the_error_against_each_images_noise_times_its_weights(
    model: LatentModel, offset: float, gamma: float
) -> None:
    config = load_config(None, [f"training.noise_offset={offset}", f"training.min_snr_gamma={gamma}"])
    batch, predict = batch_of(model), Zeros()
    weighted, plain = loss_of(model, batch, config, predict)
    noise, times = drawn(batch, offset)
    assert predict.timesteps.tolist() == times.tolist() and len(set(times.tolist())) == 3
    assert isinstance(model.process, DDPM)
    alpha_bar = model.process.alphas_cumprod[times].float()
    a, s = (share.sqrt().view(-1, 1, 1, 1) for share in (alpha_bar, 1 - alpha_bar))
    torch.testing.assert_close(predict.noisy, a * batch.latents + s * noise)
    torch.testing.assert_close(plain, noise.square().mean((1, 2, 3)))
    snr = alpha_bar / (1 - alpha_bar)
    factor = snr.clamp(max=gamma) / snr if gamma else torch.ones(3)
    assert gamma != 0.05 or float(factor.min()) < 0.5, "the limit is reached"
    torch.testing.assert_close(weighted, plain * factor * torch.tensor(WEIGHTS))


def test_a_regularisation_image_has_the_bases_own_prediction_for_its_target(model: LatentModel) -> None:
    config = load_config(None, ["data.prior_preservation=4", "training.min_snr_gamma=0"]).with_values(
        {"data.sources": [{"folder": "x", "regularisation": True}]}
    )
    batch, predict = batch_of(model, (False, True, False)), Zeros()
    weighted, plain = loss_of(model, batch, config, predict)
    noise, times = drawn(batch, 0.0)
    with torch.no_grad():
        assert batch.text is not None
        text = {name: tensor[1:2] for name, tensor in batch.text.items()}
        base = model.predict(predict.noisy[1:2], times[1:2], text, batch.sizes[1:2])
    wanted = torch.stack([noise[0], base[0], noise[2]]).square().mean((1, 2, 3))
    torch.testing.assert_close(plain, wanted)
    torch.testing.assert_close(weighted, wanted * torch.tensor(WEIGHTS) * torch.tensor([1.0, 4.0, 1.0]))


def test_without_such_images_the_empty_caption_adds_its_distance_from_the_base(model: LatentModel) -> None:
    config = load_config(None, ["data.prior_preservation=4", "training.min_snr_gamma=0"])
    batch, predict = batch_of(model), Zeros()
    weighted, plain = loss_of(model, batch, config, predict)
    noise, times = drawn(batch, 0.0)
    assert batch.blank is not None and predict.noisy.shape[0] == 6
    with torch.no_grad():
        blank = {name: torch.stack([tensor] * 3) for name, tensor in batch.blank.items()}
        base = model.predict(predict.noisy[3:], times, blank, batch.sizes)
    torch.testing.assert_close(predict.noisy[:3], predict.noisy[3:])
    torch.testing.assert_close(plain, noise.square().mean((1, 2, 3)))
    expected = (plain + 4 * base.square().mean((1, 2, 3))) * torch.tensor(WEIGHTS)
    torch.testing.assert_close(weighted, expected)
