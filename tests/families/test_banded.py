"""An autoencoder in bands against diffusers' own on the whole image."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL

from sdlora.families.banded import BOUND, BandedAutoencoder, can_be_banded
from sdlora.families.loading import load_model
from sdlora.training.memory_count import counting_memory, fused_attention

SIZES = [(96, 64), (64, 136)]


def autoencoder(**options: Any) -> Any:
    """Of the build of Stable Diffusion's, narrow, with norms that do something."""
    torch.manual_seed(3)
    settings = {
        "block_out_channels": (16, 32, 32, 32),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "layers_per_block": 2,
        "norm_num_groups": 8,
        "latent_channels": 4,
        **options,
    }
    vae = AutoencoderKL(**settings).requires_grad_(False).eval()
    for module in vae.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.weight.normal_(1.0, 0.2)
            module.bias.normal_(0.0, 0.2)
    return vae


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("rows", [3, 16, 1000])
def test_bands_give_what_the_whole_gives(size: tuple[int, int], rows: int) -> None:
    vae, (height, width) = autoencoder(), size
    assert can_be_banded(vae)
    bands = BandedAutoencoder(vae, band=rows * width * 32)
    # unlike rows: a norm of single bands would be far off
    slope = torch.linspace(-1, 3, height)[None, None, :, None]
    pixels = torch.rand((2, 3, height, width)) + slope
    latents = torch.randn((2, 4, height // 8, width // 8)) * (1 + slope[:, :, ::8])
    for banded, whole in (
        (bands.encode(pixels), vae.encode(pixels).latent_dist.parameters),
        (bands.decode(latents), vae.decode(latents).sample),
    ):
        assert banded.shape == whole.shape
        assert float((banded - whole).abs().max()) <= BOUND * float(whole.abs().max())


def test_tiles_are_not_what_the_whole_is() -> None:
    """Why there are bands: diffusers' tiles of the same decoder are thousands of times as far off."""
    vae = autoencoder()
    latents = torch.randn((1, 4, 32, 32)) * torch.linspace(1, 4, 32)[None, None, :, None]
    whole = vae.decode(latents).sample
    banded = BandedAutoencoder(vae, band=1 << 14).decode(latents)
    vae.enable_tiling()
    vae.tile_sample_min_size, vae.tile_latent_min_size = 128, 16
    off, bound = (float((other - whole).abs().max()) for other in (vae.decode(latents).sample, banded))
    assert off > 1000 * bound


def test_the_memory_hardly_grows_with_the_height() -> None:
    """Only keys and values of the attention, and the latents, lie on the device for all places."""
    vae = autoencoder().to("meta")
    ways = {"banded": BandedAutoencoder(vae, band=1 << 15).decode, "whole": lambda z: vae.decode(z).sample}
    growth = {}
    for name, decode in ways.items():
        peaks = []
        for side in (32, 96):
            with torch.no_grad(), fused_attention(), counting_memory() as memory:
                decode(torch.empty((1, 4, side, 16), device="meta"))
            peaks.append(memory.peak)
        growth[name] = peaks[1] - peaks[0]
    assert growth["banded"] <= growth["whole"] / 16, growth


def test_the_bytes_that_would_be_copied_are_those_that_are() -> None:
    vae = autoencoder()
    counts = []
    for device in ("cpu", "meta"):
        bands = BandedAutoencoder(vae.to(device), band=1 << 14)
        bands.decode(torch.zeros((1, 4, 12, 9), device=device))
        counts.append(bands.copied)
    assert counts[0] == counts[1] and counts[0].to_device > counts[0].to_host > 0


@pytest.mark.parametrize(
    "options", [{"norm_num_groups": 4, "layers_per_block": 1}, {"mid_block_add_attention": False}]
)
def test_other_builds(options: dict[str, Any]) -> None:
    vae = autoencoder(**options)
    latents = torch.randn((1, 4, 10, 7))
    whole = vae.decode(latents).sample
    banded = BandedAutoencoder(vae, band=1 << 13).decode(latents)
    assert float((banded - whole).abs().max()) <= BOUND * float(whole.abs().max())


def test_what_is_not_known_stays_whole() -> None:
    vae = autoencoder()
    vae.decoder.up_blocks[1].resnets[0].nonlinearity = torch.nn.GELU()
    assert not can_be_banded(vae)


def test_a_base_works_in_bands_above_a_size_only() -> None:
    pixels = torch.rand((1, 3, 64, 96)) * 2 - 1
    answers, prints = [], []
    for above in (None, 96, 32):
        model = load_model("mini", dtype=torch.float32, device=torch.device("cpu"))
        if above is not None:
            model.work_in_bands(above)
        posterior = model.encode_images(pixels)
        drawn = model.decode_latents(posterior.mean * model.facts.latents.scaling)
        answers.append((posterior.mean, posterior.logvar, drawn))
        prints.append(model.encoder_fingerprint("images"))
    for whole, small, banded in zip(*answers, strict=True):
        assert torch.equal(whole, small), "a small image is not divided"
        assert float((banded - whole).abs().max()) <= 10 * BOUND * float(whole.abs().max())
    assert len(set(prints)) == 3, "what bands encoded is not taken for what the whole gives"
