"""Stable Diffusion 2.x: the U-Net of 1.x with linear projections, and OpenCLIP's ViT-H text encoder.

The states are those of the text encoder's penultimate layer: the module is stored with 23 of its 24 layers,
so there is no layer to skip. Checkpoints of 768 px predict v, those of 512 px the noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from .base import Conditioning
from .facts import FamilyInfo, HeaderWords, TextEncoderInfo
from .latent_model import TEXT_TARGETS, one_encoder_states
from .ldm import UNET_PREFIX
from .unet_model import UNET, UNetModel


class StableDiffusion2(UNetModel):
    """A loaded SD2-layout base."""

    info = FamilyInfo(
        name="sd2",
        title="Stable Diffusion 2.x",
        denoiser=replace(
            UNET,
            config={"use_linear_projection": True, "addition_embed_type": None, "class_embed_type": None},
            context_width=1024,
        ),
        text_encoders=(
            TextEncoderInfo(
                component="text_encoder",
                targets=TEXT_TARGETS,
                file_prefix="lora_te",
                part="text_encoder",
                tokenizer="tokenizer",
                width=1024,
                checkpoint_prefix="cond_stage_model.model.",
                checkpoint_layout="openclip",
                pad_token="!",
            ),
        ),
        header=HeaderWords(
            version="sd_v2",
            v_version="sd_v2_v",
            version_start="sd_v2",
            is_v2=True,
            architecture="stable-diffusion-v2-512/lora",
            v_architecture="stable-diffusion-v2-768-v/lora",
            webui="SD2",
        ),
        assets="sd2",
        resolutions={"epsilon": 512, "v_prediction": 768},
        prediction_probe=f"{UNET_PREFIX}output_blocks.11.1.transformer_blocks.0.norm1.bias",
    )

    def _encode_text(self, captions: Sequence[str]) -> Conditioning:
        return {"states": one_encoder_states(self, captions)}
