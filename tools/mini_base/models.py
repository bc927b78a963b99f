"""The four networks of the base, new or from a folder, and the shipped pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from tokenizers import Tokenizer
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from .config import IMAGE_SIZE
from .files import read_json, write_json

TEXT_WIDTH = 128


def new_vae() -> AutoencoderKL:
    """Returns an untrained autoencoder of 2.2 million parameters: a fourth of the side, four channels."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 64, 96),
        layers_per_block=2,
        latent_channels=4,
        # SD 1 has 32 groups of 4 channels and more; groups of one channel would lose its mean: the colour.
        norm_num_groups=16,
        sample_size=IMAGE_SIZE,
    )


def new_unet() -> UNet2DConditionModel:
    """Returns an untrained U-Net of 12.6 million parameters in the SD 1 layout."""
    return UNet2DConditionModel(
        sample_size=IMAGE_SIZE // 4,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(64, 128, 192),
        layers_per_block=2,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,
    )


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Returns an untrained text encoder that fits ``tokenizer``."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=77,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def new_scheduler(prediction: str = "epsilon") -> DDIMScheduler:
    """Returns the noise schedule of Stable Diffusion 1, for a U-Net that predicts ``prediction``."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction,
    )


def load_tokenizer(folder: Path) -> CLIPTokenizer:
    """Reads a tokenizer folder."""
    return CLIPTokenizer.from_pretrained(folder)


def autocast_type(device: torch.device) -> torch.dtype | None:
    """Returns the type to train in by autocast, or ``None`` for plain float32.

    On a CPU with AMX bfloat16 trains the autoencoder twice as fast as float32
    (21.7 against 10.5 images a second on one core); without AMX it halves the speed.
    """
    if device.type == "cuda" or torch.cpu._is_amx_tile_supported():
        return torch.bfloat16
    return None


def choose_numerics(unet: UNet2DConditionModel, device: torch.device) -> torch.dtype | None:
    """Sets the attention and layout that are fastest on ``device``.

    Returns:
        What ``autocast_type`` does. On a CPU bfloat16 wins only with attention
        spelt out, whose backward pass has bfloat16 kernels there.
    """
    kind = autocast_type(device)
    if device.type == "cpu" and kind is not None:
        unet.set_attn_processor(AttnProcessor())
    else:
        unet.set_attn_processor(AttnProcessor2_0())
    if device.type == "cpu" and kind is None:
        unet.to(memory_format=torch.channels_last)
    return kind


def make_pipeline(
    vae: AutoencoderKL,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    unet: UNet2DConditionModel,
    prediction: str = "epsilon",
) -> StableDiffusionPipeline:
    """Puts the parts together as a pipeline that draws."""
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=new_scheduler(prediction),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _clean_config(path: Path) -> None:
    """Removes what only tells where the builder kept its files."""
    config: dict[str, Any] = read_json(path)
    for key in ("_name_or_path", "is_local", "local_files_only", "name_or_path"):
        config.pop(key, None)
    write_json(path, config)


def export_pipeline(pipeline: StableDiffusionPipeline, folder: Path) -> None:
    """Writes a pipeline folder in fp16, with both spellings of the tokenizer."""
    pipeline.save_pretrained(folder, safe_serialization=True)
    # Saved a second time in fp16: converting the live modules would end training.
    for part in ("vae", "text_encoder", "unet"):
        half = type(getattr(pipeline, part)).from_pretrained(folder / part, dtype=torch.float16)
        half.save_pretrained(folder / part, safe_serialization=True)
    backend = Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json"))
    # vocab.json and merges.txt: what transformers 4 looks for.
    backend.model.save(str(folder / "tokenizer"))
    for path in [*folder.glob("*.json"), *folder.glob("*/*config.json")]:
        _clean_config(path)
    for path in folder.glob("*/*.safetensors"):
        # Saved readable by their owner only, which a package must not pass on.
        path.chmod(0o644)
