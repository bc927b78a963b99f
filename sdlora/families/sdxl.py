"""Stable Diffusion XL: two text encoders, a pooled caption vector, and pixel sizes as further inputs.

States are both encoders' penultimate layers, without the final norm, side by side (768 + 1280 wide in the
true model). The pooled vector is the second encoder's projection at the first end token of the first chunk.
Empty captions are encoded like all others, as WebUI does (diffusers' pipeline puts zeros instead).
Source: Podell et al. 2023, sections 2.1 and 2.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..devices import onto
from .base import Conditioning, SizeHint
from .clip import chunk_tokens, encode_penultimate, weigh_states
from .facts import FamilyInfo, HeaderWords, TextEncoderInfo
from .latent_model import TEXT_TARGETS
from .unet_model import UNET, UNetModel


class StableDiffusionXL(UNetModel):
    """A loaded SDXL base."""

    info = FamilyInfo(
        name="sdxl",
        title="Stable Diffusion XL",
        denoiser=replace(
            UNET,
            config={"addition_embed_type": "text_time"},
            context_width=2048,
            module_path=".transformer_blocks.1.",  # the only one with several in one attention module
            webui_names="ldm",
        ),
        text_encoders=(
            TextEncoderInfo(
                component="text_encoder",
                targets=TEXT_TARGETS,
                file_prefix="lora_te1",
                part="text_encoder",
                tokenizer="tokenizer",
                width=768,
                checkpoint_prefix="conditioner.embedders.0.transformer.",
            ),
            TextEncoderInfo(
                component="text_encoder_2",
                targets=TEXT_TARGETS,
                file_prefix="lora_te2",
                part="text_encoder_2",
                tokenizer="tokenizer_2",
                width=1280,
                checkpoint_prefix="conditioner.embedders.1.model.",
                checkpoint_layout="openclip",
                projected=True,
                pad_token="!",
            ),
        ),
        header=HeaderWords(
            version="sdxl_base_v1-0",
            version_start="sdxl_",
            architecture="stable-diffusion-xl-v1-base/lora",
            webui="SDXL",
        ),
        diffusers_loader="StableDiffusionXLLoraLoaderMixin",
        assets="sdxl",
    )

    def _encode_text(self, captions: Sequence[str]) -> Conditioning:
        states, pooled = [], None
        for name, encoder in self.text_encoders.items():
            ids, weights = chunk_tokens(self.tokenizers[name], captions)
            ids = onto(ids, encoder.device)
            hidden, last = encode_penultimate(encoder, ids, self.tokenizers[name].eos_token_id)
            # the states of each encoder are weighted by themselves; the pooled vector is not
            states.append(weigh_states(hidden, weights))
            pooled = last if last is not None else pooled
        assert pooled is not None, "one of the text encoders has a projection"
        return {"states": torch.cat(states, dim=-1), "pooled": pooled}

    def _added(self, text: Conditioning, sizes: Sequence[SizeHint]) -> dict[str, Tensor]:
        ids = [[*size.original, *size.crop, *size.target] for size in sizes]
        return {
            "text_embeds": onto(text["pooled"], self.facts.device, self.facts.dtype),
            "time_ids": onto(torch.tensor(ids, dtype=torch.float32), self.facts.device),
        }
