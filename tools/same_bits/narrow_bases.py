"""Writes an SDXL and an SD2 base of few channels and random weights, with diffusers and transformers alone.

Run as a script by the interpreter of the checkout that is recorded: ``narrow_bases.py TOKENIZER SDXL SD2``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, EulerDiscreteScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

_CROSS, _PLAIN = "CrossAttn", ""


def _blocks(kinds: tuple[str, ...]) -> dict[str, Any]:
    """Return the block types of a U-Net from the finest level to the coarsest."""
    return {
        "down_block_types": tuple(f"{kind}DownBlock2D" for kind in kinds),
        "up_block_types": tuple(f"{kind}UpBlock2D" for kind in reversed(kinds)),
    }


_UNETS: dict[str, dict[str, Any]] = {
    "sdxl": {
        **_blocks((_PLAIN, _CROSS, _CROSS)),
        "block_out_channels": (16, 16, 32),
        "attention_head_dim": (2, 2, 4),
        "transformer_layers_per_block": (1, 1, 2),
        "cross_attention_dim": 40,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 20,
    },
    "sd2": {
        **_blocks((_CROSS, _CROSS, _CROSS, _PLAIN)),
        "block_out_channels": (16, 16, 32, 32),
        "attention_head_dim": (2, 2, 4, 4),
        "cross_attention_dim": 24,
    },
}
_NARROW = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
_WIDE = {"hidden_size": 24, "intermediate_size": 48, "num_attention_heads": 2, "projection_dim": 20}


def write_base(folder: Path, family: str, tokenizer: CLIPTokenizer) -> None:
    """Write a diffusers folder of one family."""
    torch.manual_seed(5)
    unet = UNet2DConditionModel(
        sample_size=8, norm_num_groups=8, use_linear_projection=True, layers_per_block=2, **_UNETS[family]
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        norm_num_groups=4,
        sample_size=64,
        scaling_factor=0.13025 if family == "sdxl" else 0.18215,
    )
    parts: dict[str, Any] = {"unet": unet, "vae": vae}
    words = {
        "vocab_size": len(tokenizer),
        "num_hidden_layers": 3,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if family == "sdxl":
        parts["text_encoder"] = CLIPTextModel(CLIPTextConfig(**words, **_NARROW))
        wide = CLIPTextConfig(**words, **_WIDE, hidden_act="gelu")
        parts["text_encoder_2"] = CLIPTextModelWithProjection(wide)
    else:
        parts["text_encoder"] = CLIPTextModel(CLIPTextConfig(**words, **_WIDE, hidden_act="gelu"))
    index: dict[str, Any] = {
        "_class_name": "StableDiffusionXLPipeline" if family == "sdxl" else "StableDiffusionPipeline"
    }
    for name, part in parts.items():
        with torch.no_grad():  # no weight stays a zero or a one, which could hide a mix-up
            for parameter in part.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
        part.save_pretrained(folder / name)
        index[name] = [type(part).__module__.split(".")[0], type(part).__name__]
        if name.startswith("text_encoder"):
            place = name.replace("text_encoder", "tokenizer")
            tokenizer.save_pretrained(folder / place)
            index[place] = ["transformers", "CLIPTokenizer"]
    schedule = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    if family == "sdxl":
        EulerDiscreteScheduler(**schedule).save_pretrained(folder / "scheduler")
    else:
        more = {"prediction_type": "v_prediction", "clip_sample": False, "set_alpha_to_one": False}
        DDIMScheduler(**schedule, **more).save_pretrained(folder / "scheduler")
    index["scheduler"] = ["diffusers", "EulerDiscreteScheduler" if family == "sdxl" else "DDIMScheduler"]
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")


if __name__ == "__main__":
    pieces = CLIPTokenizer.from_pretrained(sys.argv[1])
    for kind, place in zip(("sdxl", "sd2"), sys.argv[2:], strict=True):
        write_base(Path(place), kind, pieces)
