"""Stable Diffusion 1.x: one CLIP text encoder, a U-Net with cross-attention, a KL autoencoder.

Also the layout of the mini base, whose smaller sizes all come from its component configs.
"""

from __future__ import annotations

from collections.abc import Sequence

from .base import Conditioning, FamilyInfo, TextEncoderInfo
from .unet_model import TEXT_TARGETS, UNET_TARGETS, UNetModel, one_encoder_states


class StableDiffusion1(UNetModel):
    """A loaded SD1-layout base."""

    info = FamilyInfo(
        name="sd1",
        title="Stable Diffusion 1.x",
        targets={"unet": UNET_TARGETS, "text_encoder": TEXT_TARGETS},
        file_prefixes={"unet": "lora_unet", "text_encoder": "lora_te"},
        unet_naming="diffusers",
        base_model_version="sd_v1",
        is_v2=False,
        architecture="stable-diffusion-v1/lora",
        webui_version="SD1",
        assets="sd1",
        text_encoders=(TextEncoderInfo("text_encoder", "tokenizer", "cond_stage_model.transformer."),),
        context_width=768,
        unet_config={"use_linear_projection": False, "addition_embed_type": None, "class_embed_type": None},
        clip_skip=True,
    )

    def _encode_text(self, captions: Sequence[str]) -> Conditioning:
        return {"states": one_encoder_states(self, captions)}
