"""SDXL's text and sizes against diffusers' own pipeline and against the formulas."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image

from sdlora.data.batching.batches import make_batch
from sdlora.data.batching.buckets import place
from sdlora.data.batching.cache import EncodedDataset
from sdlora.data.batching.views import AugmentationViews
from sdlora.data.reading.folder import scan
from sdlora.data.reading.items import Visit
from sdlora.families.base import SizeHint
from sdlora.families.loading import load_model
from sdlora.families.unet_model import UNetModel

from .narrow import States

Bases = Mapping[str, tuple[Path, States]]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(bases: Bases) -> UNetModel:
    return load_model(str(bases["sdxl"][0]), dtype=torch.float32, device=CPU)


@pytest.fixture(scope="module")
def pipeline(bases: Bases) -> StableDiffusionXLPipeline:
    return StableDiffusionXLPipeline(
        vae=None,
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
        unet=None,
        scheduler=None,
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    )


def test_states_and_pooled_text_equal_diffusers(
    model: UNetModel, pipeline: StableDiffusionXLPipeline
) -> None:
    pipeline.register_modules(
        text_encoder=model.text_encoders["text_encoder"],
        text_encoder_2=model.text_encoders["text_encoder_2"],
        tokenizer=model.tokenizers["text_encoder"],
        tokenizer_2=model.tokenizers["text_encoder_2"],
    )
    with torch.no_grad():
        states, negative, pooled, negative_pooled = pipeline.encode_prompt(
            "a cat in ink", None, CPU, 1, True, negative_prompt=""
        )
        actual = model.encode_text(["a cat in ink", ""])
    assert actual["states"].shape == (2, 77, 40)
    torch.testing.assert_close(actual["states"][:1], states, rtol=0, atol=1e-6)
    torch.testing.assert_close(actual["states"][1:], negative, rtol=0, atol=1e-6)
    torch.testing.assert_close(actual["pooled"][:1], pooled, rtol=0, atol=1e-6)
    torch.testing.assert_close(actual["pooled"][1:], negative_pooled, rtol=0, atol=1e-6)


def test_tokenizers_fill_up_with_their_own_tokens(model: UNetModel) -> None:
    assert model.tokenizers["text_encoder"].pad_token_id == 49407
    assert model.tokenizers["text_encoder_2"].pad_token_id == 0


def test_sizes_are_told_in_the_order_of_the_paper(model: UNetModel) -> None:
    """Original, crop corner, target, each (height, width), as 256-wide sinusoids there (here 8)."""
    seen: list[torch.Tensor] = []
    hook = model.unet.add_time_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    try:
        with torch.no_grad():
            model.predict(
                torch.zeros(2, 4, 8, 8),
                torch.tensor([10, 10]),
                model.encode_text(["a", "b"]),
                [SizeHint((1, 2), (3, 4), (5, 6)), SizeHint((7, 8), (9, 10), (11, 12))],
            )
    finally:
        hook.remove()
    assert seen[0].tolist() == [float(n) for n in range(1, 13)]


def test_the_prediction_equals_diffusers_unet_with_its_pipelines_time_ids(
    model: UNetModel, pipeline: StableDiffusionXLPipeline
) -> None:
    pipeline.register_modules(unet=model.unet, text_encoder_2=model.text_encoders["text_encoder_2"])
    hint = SizeHint((1023, 777), (16, 0), (64, 64))
    ids = pipeline._get_add_time_ids(
        hint.original, hint.crop, hint.target, torch.float32, text_encoder_projection_dim=20
    )
    with torch.no_grad():
        text = model.encode_text(["a cat"])
        noisy = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        wanted = model.unet(
            noisy,
            torch.tensor([500]),
            encoder_hidden_states=text["states"],
            added_cond_kwargs={"text_embeds": text["pooled"], "time_ids": ids},
        ).sample
        actual = model.predict(noisy, torch.tensor([500]), text, [hint])
    assert torch.equal(actual, wanted)


def test_a_batch_tells_the_unet_what_diffusers_pipeline_would_of_the_same_crop(
    model: UNetModel, pipeline: StableDiffusionXLPipeline, tmp_path: Path
) -> None:
    """From the image on disk to the U-Net's input, plain and mirrored, with a crop off the centre line."""
    pipeline.register_modules(unet=model.unet, text_encoder_2=model.text_encoders["text_encoder_2"])
    (tmp_path / "images").mkdir()
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 157, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[274] = 6  # stored lying: 157 high and 90 wide for people
    image.save(tmp_path / "images" / "a.jpg", exif=exif, quality=95)
    items = scan(tmp_path / "images").items
    placement = place(items[0].height, items[0].width, [(96, 64)])
    assert ((items[0].height, items[0].width), placement.resized) == ((157, 90), (112, 64))
    placement = replace(
        placement, resized=(112, 71), crop=(8, 2)
    )  # wider than the bucket, left of the middle
    views = AugmentationViews((placement,), items, flip=True)
    data = EncodedDataset(items, views, model, tmp_path / "cache")
    seen: dict[bool, torch.Tensor] = {}
    hook = model.unet.add_time_proj.register_forward_pre_hook(lambda module, args: ids.append(args[0]))
    try:
        for repeat in range(12):
            visit, ids = Visit(0, 0, repeat), list[torch.Tensor]()
            batch = make_batch(data, model, [visit], seed=3)
            with torch.no_grad():
                model.predict(batch.latents, torch.tensor([500]), batch.text or {}, batch.sizes)
            seen[views.at(visit, 3).mirror] = ids[0].reshape(1, 6)
    finally:
        hook.remove()
    assert seen.keys() == {False, True}
    for mirrored, left in ((False, 2), (True, 71 - 64 - 2)):
        wanted = pipeline._get_add_time_ids(
            (157, 90), (8, left), (96, 64), torch.float32, text_encoder_projection_dim=20
        )
        assert torch.equal(seen[mirrored], wanted)
