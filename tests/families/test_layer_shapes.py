"""The shapes we compute from configs are those of diffusers' and transformers' own models."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from sdlora.families.layer_shapes import clip_shapes, has_bias, kernel_of, true_shapes, unet_shapes
from sdlora.families.ldm import TEXT_ROOT
from sdlora.families.table import FAMILIES, family_info
from sdlora.files import ASSETS


def shapes_in(model: nn.Module, prefix: str = "") -> dict[str, tuple[int, ...]]:
    """Return module path -> shape of its weight."""
    shapes = {}
    for key, tensor in model.state_dict().items():
        path, _, name = key.rpartition(".")
        path = path if not prefix or path.startswith((prefix, "text_projection")) else prefix + path
        if name == "weight":
            shapes[path] = tuple(tensor.shape)
    return shapes


@pytest.mark.parametrize("family", list(FAMILIES))
def test_every_weight_of_the_true_models_has_its_shape_and_kernel(family: str) -> None:
    info = family_info(family)

    def config(component: str) -> dict[str, Any]:
        path = ASSETS / info.assets / component / "config.json"
        tree: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return tree

    with torch.device("meta"):
        models: dict[str, nn.Module] = {"unet": UNet2DConditionModel.from_config(config("unet"))}
        for encoder in info.text_encoders:
            kind = CLIPTextModelWithProjection if encoder.projected else CLIPTextModel
            models[encoder.component] = kind(CLIPTextConfig(**config(encoder.component)))
    computed = true_shapes(family)
    assert set(computed) == set(models)
    for component, model in models.items():
        shapes = shapes_in(model, "" if component == "unet" else TEXT_ROOT)
        assert len(shapes) > 90 and dict(computed[component]) == shapes
        biased = {key.removesuffix(".bias") for key in model.state_dict() if key.endswith(".bias")}
        if component != "unet":
            biased = {path if path.startswith(TEXT_ROOT) else TEXT_ROOT + path for path in biased}
        assert {path for path in shapes if has_bias(path)} == biased
        for path, shape in shapes.items():
            assert kernel_of(family, component, path) == (shape[2:] if len(shape) == 4 else None), path


def test_the_shapes_of_narrow_models_of_the_same_build() -> None:
    unet = UNet2DConditionModel(
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=12,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    assert unet_shapes(unet.config) == shapes_in(unet)
    config = CLIPTextConfig(
        hidden_size=12, intermediate_size=20, num_hidden_layers=2, num_attention_heads=2, projection_dim=10
    )
    encoder = CLIPTextModelWithProjection(config)
    assert clip_shapes(config.to_dict(), True) == shapes_in(encoder, TEXT_ROOT)


def test_layers_that_no_true_model_has_go_by_their_names() -> None:
    assert kernel_of("sd1", "unet", "down_blocks.3.attentions.0.proj_in") == (1, 1)
    assert kernel_of("sdxl", "unet", "down_blocks.0.attentions.0.proj_in") is None
    assert kernel_of("sd1", "unet", "down_blocks.9.resnets.0.conv1") == (3, 3)
    assert kernel_of("sd1", "text_encoder", "text_model.encoder.layers.99.mlp.fc1") is None
    assert kernel_of(None, "unet", "mid_block.attentions.0.proj_in") is None
