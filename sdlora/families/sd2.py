"""Stable Diffusion 2.x: the U-Net of 1.x with linear projections, and OpenCLIP's ViT-H text encoder.

The text encoder's penultimate layer is read: its last one is left out of the 23-layer module, so there is
no layer to skip. Checkpoints of 768 px predict v, those of 512 px the noise.
"""

from __future__ import annotations

from collections.abc import Sequence

from .base import Conditioning, FamilyInfo, TextEncoderInfo
from .ldm import UNET_PREFIX
from .unet_model import TEXT_TARGETS, UNET_TARGETS, UNetModel, one_encoder_states


class StableDiffusion2(UNetModel):
    """A loaded SD2-layout base."""

    info = FamilyInfo(
        name="sd2",
        title="Stable Diffusion 2.x",
        targets={"unet": UNET_TARGETS, "text_encoder": TEXT_TARGETS},
        file_prefixes={"unet": "lora_unet", "text_encoder": "lora_te"},
        unet_naming="diffusers",
        base_model_version="sd_v2",
        is_v2=True,
        architecture="stable-diffusion-v2-512/lora",
        webui_version="SD2",
        assets="sd2",
        text_encoders=(
            TextEncoderInfo(
                "text_encoder", "tokenizer", "cond_stage_model.model.", "openclip", pad_token="!"
            ),
        ),
        context_width=1024,
        unet_config={"use_linear_projection": True, "addition_embed_type": None, "class_embed_type": None},
        resolutions={"epsilon": 512, "v_prediction": 768},
        prediction_probe=f"{UNET_PREFIX}output_blocks.11.1.transformer_blocks.0.norm1.bias",
    )

    def _encode_text(self, captions: Sequence[str]) -> Conditioning:
        return {"states": one_encoder_states(self, captions)}
