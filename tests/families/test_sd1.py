"""SD1 text and latents against diffusers' own pipeline and independent computations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline

from sdlora.config.schema import ModelConfig
from sdlora.errors import ConfigError
from sdlora.families.base import stack_conditioning
from sdlora.families.loading import load_model
from sdlora.families.unet_model import UNetModel

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model() -> UNetModel:
    return load_model("mini", dtype=torch.float32, device=CPU)


def loaded(base: Path, **options: Any) -> UNetModel:
    return load_model(ModelConfig(base=str(base), **options), dtype=torch.float32, device=CPU)


def pipeline_of(model: UNetModel) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        vae=model.vae,
        text_encoder=model.text_encoders["text_encoder"],
        tokenizer=model.tokenizers["text_encoder"],
        unet=model.unet,
        scheduler=None,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def test_short_captions_are_encoded_as_diffusers_does(model: UNetModel) -> None:
    pipeline = pipeline_of(model)
    wanted, negative = pipeline.encode_prompt("an icon of a cat", CPU, 1, True, "a dog")
    with torch.no_grad():
        actual = model.encode_text(["an icon of a cat", "a dog"])["states"]
    assert torch.equal(actual[0], wanted[0])
    assert torch.equal(actual[1], negative[0])


def test_long_captions_are_chunks_of_75_encoded_by_themselves(model: UNetModel) -> None:
    word = model.tokenizers["text_encoder"](" cat", add_special_tokens=False).input_ids
    assert len(word) == 1
    caption = " ".join(["cat"] * 100)
    with torch.no_grad():
        states = model.encode_text([caption])["states"]
        first = model.encode_text([" ".join(["cat"] * 75)])["states"]
        second = model.encode_text([" ".join(["cat"] * 25)])["states"]
    assert states.shape == (1, 154, model.text_encoders["text_encoder"].config.hidden_size)
    torch.testing.assert_close(states, torch.cat([first, second], dim=1), rtol=0, atol=2e-6)


def test_company_in_a_batch_changes_no_caption(model: UNetModel) -> None:
    """Training text encoders, captions are encoded in batches; previews and generation have them alone."""
    captions = [" ".join(["cat"] * 80), "a dog", " ".join(["cat"] * 170), "a cat"]
    with torch.no_grad():
        states = model.encode_text(captions)["states"]
        alone = [model.encode_text([caption])["states"] for caption in captions]
    assert states.shape[:2] == (4, 6 * 77)
    for together, alone_states in zip(states, alone, strict=True):
        repeated = alone_states[0].repeat(6 * 77 // alone_states.shape[1], 1)
        torch.testing.assert_close(together, repeated, rtol=0, atol=2e-6)


def test_repeating_a_context_leaves_attention_unchanged(model: UNetModel) -> None:
    """What stack_conditioning relies on to batch captions of different lengths."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        short, long = model.encode_text(["a cat"]), model.encode_text([" ".join(["cat"] * 80)])
        noisy = torch.randn((1, *model.facts.latents.shape(64, 64)), generator=generator)
        alone = model.predict(noisy, torch.tensor([500]), short, [])
        both = stack_conditioning([{k: v[0] for k, v in part.items()} for part in (short, long)])
        assert both["states"].shape[:2] == (2, 154)
        batched = model.predict(noisy.repeat(2, 1, 1, 1), torch.tensor([500, 500]), both, [])
    torch.testing.assert_close(batched[:1], alone, rtol=1e-3, atol=1e-4)


def test_clip_skip_takes_an_earlier_layer_and_the_final_norm(tiny_base: Path) -> None:
    model = loaded(tiny_base, clip_skip=2)
    ids = model.tokenizers["text_encoder"](
        "a cat", padding="max_length", max_length=77, return_tensors="pt"
    ).input_ids
    with torch.no_grad():
        encoder = model.text_encoders["text_encoder"]
        inner = getattr(encoder, "text_model", encoder)
        hidden = encoder(ids, output_hidden_states=True).hidden_states
        wanted = inner.final_layer_norm(hidden[-2])
        assert torch.equal(model.encode_text(["a cat"])["states"], wanted)
        assert not torch.equal(model.encode_text(["a cat"])["states"], inner.final_layer_norm(hidden[-1]))


def test_more_layers_than_there_are_cannot_be_skipped(tiny_base: Path) -> None:
    for device in ("cpu", "meta"):
        with pytest.raises(
            ConfigError, match=r"clip_skip=3`: the base's text encoder has 2 layers; give 1 to 2"
        ):
            load_model(
                ModelConfig(base=str(tiny_base), clip_skip=3),
                dtype=torch.float32,
                device=torch.device(device),
            )


def test_clip_skip_equals_diffusers_own(tiny_base: Path) -> None:
    """Counted from 1 here and in WebUI, from 0 in diffusers."""
    model = loaded(tiny_base, clip_skip=2)
    encoder = model.text_encoders["text_encoder"]
    if not hasattr(encoder, "text_model"):  # diffusers 0.42 knows only the name of transformers before 5.6
        object.__setattr__(encoder, "text_model", encoder)
    wanted, negative = pipeline_of(model).encode_prompt(
        "an icon of a cat", CPU, 1, True, "a dog", clip_skip=1
    )
    with torch.no_grad():
        actual = model.encode_text(["an icon of a cat", "a dog"])["states"]
    assert torch.equal(actual[:1], wanted)
    # diffusers forgets to skip layers for the negative prompt; WebUI does it for both
    assert not torch.equal(actual[1:], negative)


def test_encoding_and_decoding_invert_each_other_on_the_mini_base(model: UNetModel) -> None:
    from PIL import Image

    from sdlora.data.batching.buckets import place
    from sdlora.data.batching.cache import to_pixels

    icon = Image.open(Path("datasets/ink-icons") / "dog.png").convert("RGB")
    pixels = to_pixels(icon, place(icon.height, icon.width, [(64, 64)]), mirror=False)
    posterior = model.encode_images(pixels)
    latents = model.facts.latents.scaled(posterior.mean)
    assert latents.shape == (1, *model.facts.latents.shape(64, 64))
    assert 0.5 < float(latents.std()) < 2.0
    error = (model.decode_latents(latents) - pixels).square().mean()
    assert float(10 * torch.log10(4 / error)) > 15.0  # dB over the range [-1, 1]


def test_fingerprints_change_with_weights_and_settings(tiny_base: Path) -> None:
    first, other = loaded(tiny_base), loaded(tiny_base, clip_skip=2)
    assert first.encoder_fingerprint("images") == other.encoder_fingerprint("images")
    assert first.encoder_fingerprint("captions") != other.encoder_fingerprint("captions")
    with torch.no_grad():
        next(other.vae.encoder.parameters()).add_(1e-3)
    assert first.encoder_fingerprint("images") != other.encoder_fingerprint("images")


def test_prediction_type_can_be_overridden(tiny_base: Path) -> None:
    assert loaded(tiny_base, prediction_type="v_prediction").process.prediction.name == "v_prediction"
