"""What a batch holds follows from the seed and each visit: captions, mirrors and latents by their shares."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sdlora.data.batching.batches import caption_at, make_batch
from sdlora.data.batching.buckets import place
from sdlora.data.batching.cache import EncodedDataset
from sdlora.data.batching.views import AugmentationViews
from sdlora.data.reading.folder import scan
from sdlora.data.reading.items import Visit
from sdlora.families.latent_model import LatentModel
from sdlora.families.loading import load_model

VISITS = [Visit(index, epoch, 0) for index in range(6) for epoch in range(400)]


@pytest.fixture(scope="module")
def model(tiny_base: Path) -> LatentModel:
    return load_model(str(tiny_base), dtype=torch.float32, device=torch.device("cpu"))


@pytest.fixture
def data(model: LatentModel, image_folder: Callable[..., Path], tmp_path: Path) -> EncodedDataset:
    dataset = scan(image_folder())
    placements = tuple(place(item.height, item.width, [(32, 32)]) for item in dataset.items)
    views = AugmentationViews(placements, dataset.items, flip=True)
    return EncodedDataset(dataset.items, views, model, tmp_path / "cache")


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 1.0])
def test_captions_are_dropped_at_the_rate_asked_for(data: EncodedDataset, rate: float) -> None:
    captions = [caption_at(data, visit, 3, rate) for visit in VISITS]
    # 2,400 draws: their share is known to within 0.01 (one sigma)
    assert captions.count("") / len(captions) == pytest.approx(rate, abs=0.04 if 0 < rate < 1 else 0)
    assert {caption for caption in captions if caption} <= {item.caption for item in data.items}


def test_a_dropped_caption_says_nothing_about_mirroring(data: EncodedDataset) -> None:
    dropped = [visit for visit in VISITS if not caption_at(data, visit, 3, 0.5)]
    mirrored = sum(data.views.at(visit, 3).mirror for visit in dropped)
    assert len(dropped) > 1000 and 0.45 < mirrored / len(dropped) < 0.55


def test_latents_are_drawn_anew_at_each_visit_and_scaled(data: EncodedDataset, model: LatentModel) -> None:
    visits = (Visit(0, 0, 0), Visit(0, 1, 0), Visit(0, 0, 1))
    batch = make_batch(data, model, visits, seed=5)
    again = make_batch(data, model, visits[::-1], seed=5)
    assert torch.equal(batch.latents, again.latents.flip(0)), "company and place do not matter"
    scaling = model.vae.config.scaling_factor
    assert scaling == 0.5
    for latent, visit in zip(batch.latents, visits, strict=True):
        posterior = data.image(0, data.views.at(visit, 5)).posterior
        normal = (latent / scaling - posterior.mean[0]) / torch.exp(posterior.logvar[0] / 2)
        # what is left is standard normal noise of 256 values, whose deviation is known to within 4 %
        assert float(normal.std()) == pytest.approx(1.0, abs=0.2)
        assert abs(float(normal.mean())) < 0.3
    assert len({tuple(latent.flatten().tolist()) for latent in batch.latents}) == 3
