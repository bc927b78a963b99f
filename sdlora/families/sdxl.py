"""Stable Diffusion XL: two text encoders side by side, a pooled caption vector, and pixel sizes as input.

States are both encoders' penultimate layers, without the final norm, side by side (768 + 1280 wide in the
true model). The pooled vector is the second encoder's projection at the first end token of the first chunk.
Empty captions are encoded like all others, as WebUI does (diffusers' pipeline puts zeros instead).
Source: Podell et al. 2023, sections 2.1 and 2.2.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .base import Conditioning, FamilyInfo, SizeHint, TextEncoderInfo
from .clip import chunk_tokens, encode_penultimate, weigh_states
from .unet_model import TEXT_TARGETS, UNET_TARGETS, UNetModel


class StableDiffusionXL(UNetModel):
    """A loaded SDXL base."""

    info = FamilyInfo(
        name="sdxl",
        title="Stable Diffusion XL",
        targets={"unet": UNET_TARGETS, "text_encoder": TEXT_TARGETS, "text_encoder_2": TEXT_TARGETS},
        file_prefixes={"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"},
        unet_naming="ldm",
        base_model_version="sdxl_base_v1-0",
        is_v2=False,
        architecture="stable-diffusion-xl-v1-base/lora",
        webui_version="SDXL",
        assets="sdxl",
        text_encoders=(
            TextEncoderInfo("text_encoder", "tokenizer", "conditioner.embedders.0.transformer."),
            TextEncoderInfo(
                "text_encoder_2",
                "tokenizer_2",
                "conditioner.embedders.1.model.",
                "openclip",
                projected=True,
                pad_token="!",
            ),
        ),
        context_width=2048,
        unet_config={"addition_embed_type": "text_time"},
    )

    def _encode_text(self, captions: Sequence[str]) -> Conditioning:
        states, pooled = [], None
        for name, encoder in self.text_encoders.items():
            ids, weights = chunk_tokens(self.tokenizers[name], captions)
            ids = ids.to(encoder.device)
            hidden, last = encode_penultimate(encoder, ids, self.tokenizers[name].eos_token_id)
            # each encoder's own states are weighed; the pooled vector is not
            states.append(weigh_states(hidden, weights))
            pooled = last if last is not None else pooled
        assert pooled is not None, "one of the text encoders has a projection"
        return {"states": torch.cat(states, dim=-1), "pooled": pooled}

    def _added(self, text: Conditioning, sizes: Sequence[SizeHint]) -> dict[str, Tensor]:
        ids = [[*size.original, *size.crop, *size.target] for size in sizes]
        return {
            "text_embeds": text["pooled"].to(self.device, self.dtype),
            "time_ids": torch.tensor(ids, dtype=torch.float32, device=self.device),
        }
