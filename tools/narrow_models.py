"""Real models of each family's build, an eighth as wide and with few layers, for files of that width."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from sdlora.adapters.canonical import ModuleKey
from sdlora.families.facts import is_text_encoder
from sdlora.families.locating import ASSETS
from sdlora.families.table import family_info

_SHRINK = 8


def fresh(family: str) -> dict[str, nn.Module]:
    """Return the U-Net and text encoders of a family, random and float32."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    info = family_info(family)

    def config(component: str) -> dict[str, Any]:
        tree: dict[str, Any] = json.loads(
            (ASSETS / info.assets / component / "config.json").read_text(encoding="utf-8")
        )
        return tree

    torch.manual_seed(3)
    unet = config("unet")
    unet |= {
        "block_out_channels": [side // _SHRINK for side in unet["block_out_channels"]],
        "cross_attention_dim": unet["cross_attention_dim"] // _SHRINK,
        "transformer_layers_per_block": 1,
        "norm_num_groups": 4,
        "sample_size": 8,
    }
    if unet.get("addition_time_embed_dim"):
        unet["projection_class_embeddings_input_dim"] //= _SHRINK
    models: dict[str, nn.Module] = {"unet": UNet2DConditionModel.from_config(unet)}
    for encoder in info.text_encoders:
        text = config(encoder.component)
        text |= {name: text[name] // _SHRINK for name in ("hidden_size", "intermediate_size")}
        text |= {"num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 64}
        text |= {"projection_dim": text["projection_dim"] // _SHRINK}
        kind = CLIPTextModelWithProjection if encoder.projected else CLIPTextModel
        models[encoder.component] = kind(CLIPTextConfig(**text))
    return models


def pipeline_of(family: str, models: Mapping[str, nn.Module]) -> Any:
    """Return diffusers' pipeline around some models, without what a LoRA has nothing to do with."""
    import diffusers

    scheduler = diffusers.DDIMScheduler(steps_offset=1, clip_sample=False)
    if "text_encoder_2" in models:
        return diffusers.StableDiffusionXLPipeline(
            vae=None, tokenizer=None, tokenizer_2=None, scheduler=scheduler, add_watermarker=False, **models
        )
    return diffusers.StableDiffusionPipeline(
        vae=None,
        tokenizer=None,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        **models,
    )


def module_of(models: Mapping[str, nn.Module], key: ModuleKey) -> Any:
    """Return the base's layer that a key names, whatever lies over it."""
    model = models[key.component]
    path = key.layer
    if is_text_encoder(key.component) and not hasattr(model, "text_model"):
        path = path.removeprefix("text_model.")
    layer: Any = model.get_submodule(path)
    return layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer
