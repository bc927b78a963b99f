"""Stable Diffusion 1.x: one CLIP text encoder, a U-Net with cross-attention, a KL autoencoder.

The mini base has this layout, too; all of its smaller sizes are in its component configs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from .base import Conditioning
from .facts import FamilyInfo, HeaderWords, TextEncoderInfo
from .latent_model import TEXT_TARGETS, one_encoder_states
from .unet_model import UNET, UNetModel


class StableDiffusion1(UNetModel):
    """A loaded SD1-layout base."""

    info = FamilyInfo(
        name="sd1",
        title="Stable Diffusion 1.x",
        denoiser=replace(
            UNET,
            config={"use_linear_projection": False, "addition_embed_type": None, "class_embed_type": None},
            context_width=768,
            conv_projections=True,
        ),
        text_encoders=(
            TextEncoderInfo(
                component="text_encoder",
                targets=TEXT_TARGETS,
                file_prefix="lora_te",
                part="text_encoder",
                tokenizer="tokenizer",
                width=768,
                checkpoint_prefix="cond_stage_model.transformer.",
            ),
        ),
        header=HeaderWords(
            version="sd_v1",
            v_version="sd_v1_v",
            version_start="sd_v1",
            architecture="stable-diffusion-v1/lora",
            webui="SD1",
        ),
        assets="sd1",
        clip_skip=True,
    )

    def _encode_text(self, captions: Sequence[str]) -> Conditioning:
        return {"states": one_encoder_states(self, captions)}
