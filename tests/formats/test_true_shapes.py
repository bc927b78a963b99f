"""Adapters of the true SD1.5, SD2.1 and SDXL shapes in real diffusers pipelines, delta by delta.

The frozen weights are single numbers seen as whole tensors, so that the largest model takes no memory.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from sdlora.adapters.canonical import AdapterWeights
from sdlora.families.table import family_info
from sdlora.formats.adapter_files import OpenAdapter, read_adapter, write_adapter
from sdlora.formats.other_readers import loaded_updates, through_diffusers
from sdlora.formats.proof import compare, prove
from sdlora.surgery.convert import convert_adapter

from .adapters import EVERYTHING, LINEAR, file_of, random_adapter

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

UNETS: dict[str, dict[str, Any]] = {
    "sd1": {"cross_attention_dim": 768, "attention_head_dim": 8},
    "sd2": {
        "cross_attention_dim": 1024,
        "attention_head_dim": [5, 10, 20, 20],
        "use_linear_projection": True,
    },
    "sdxl": {
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": [1, 2, 10],
        "attention_head_dim": [5, 10, 20],
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
TEXTS: dict[str, dict[str, tuple[int, int, int]]] = {  # width, inner width, layers
    "sd1": {"text_encoder": (768, 3072, 12)},
    "sd2": {"text_encoder": (1024, 4096, 23)},
    "sdxl": {"text_encoder": (768, 3072, 12), "text_encoder_2": (1280, 5120, 32)},
}
# linear layers of the U-Net, with convolutions, and of the text encoders together (formats.md 1)
COUNTS = {"sd1": (192, 278, 72), "sd2": (192, 278, 138), "sdxl": (722, 788, 264)}


def weightless(model: nn.Module) -> nn.Module:
    """Give every parameter its shape, without memory of its own."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            number = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
            setattr(module, name, nn.Parameter(number, requires_grad=False))
        for name, buffer in list(module.named_buffers(recurse=False)):
            module.register_buffer(name, torch.zeros(buffer.shape, dtype=buffer.dtype), persistent=False)
    return model


def true_models(family: str) -> dict[str, nn.Module]:
    with torch.device("meta"):
        models: dict[str, nn.Module] = {"unet": diffusers.UNet2DConditionModel(**UNETS[family])}
        for name, (width, inner, layers) in TEXTS[family].items():
            settings = CLIPTextConfig(
                hidden_size=width,
                intermediate_size=inner,
                num_hidden_layers=layers,
                num_attention_heads=width // 64,
                projection_dim=width,
            )
            kind = CLIPTextModelWithProjection if name == "text_encoder_2" else CLIPTextModel
            models[name] = kind(settings)
    return {name: weightless(model) for name, model in models.items()}


def pipeline_of(family: str, models: dict[str, nn.Module]) -> Any:
    scheduler = diffusers.DDIMScheduler(steps_offset=1, clip_sample=False)
    if family == "sdxl":
        return diffusers.StableDiffusionXLPipeline(
            vae=None,
            tokenizer=None,
            tokenizer_2=None,
            scheduler=scheduler,
            add_watermarker=False,
            **models,
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


@pytest.mark.parametrize("format", ["webui", "diffusers"])
@pytest.mark.parametrize("family", list(UNETS))
def test_a_real_pipeline_of_true_shapes_loads_every_delta(family: str, format: str, tmp_path: Path) -> None:
    models = true_models(family)
    linear = random_adapter(models, LINEAR, ranks=(1,))
    weights = random_adapter(models, EVERYTHING, ranks=(4, 2), scales=(0.5, 1.0))
    in_text = sum(len(weights.component(name)) for name in TEXTS[family])
    assert (len(linear.component("unet")), len(weights.component("unet")), in_text) == COUNTS[family]

    target = tmp_path / "style.safetensors"
    write_adapter(file_of(weights), format, target, torch.float32, family_info(family))
    num_keys = len(weights) * (3 if format == "webui" else 2)
    assert read_adapter(target).info.family == family
    pipeline = pipeline_of(family, models)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # PEFT's word for keys it could not place
        pipeline.load_lora_weights(str(target))
    loaded = AdapterWeights(
        {key: pair for name, model in models.items() for key, pair in loaded_updates(name, model)}
    )
    largest, _ = compare(weights, loaded, torch.float32, "the pipeline")
    assert largest == 0.0

    proof, _ = prove(weights, OpenAdapter(target), torch.float32, family_info(family))
    assert (proof.num_modules, proof.num_keys, proof.largest_difference) == (len(weights), num_keys, 0.0)
    assert proof.read_by == ("sdlora", "diffusers")
    seen = through_diffusers(target, OpenAdapter(target).outline.weights, family_info(family))
    assert compare(seen, loaded, torch.float32, "both")[0] == 0.0


@pytest.mark.parametrize("family", list(UNETS))
def test_factors_in_four_dimensions_are_converted_to_what_the_true_models_load(
    family: str, tmp_path: Path
) -> None:
    models = true_models(family)
    weights = random_adapter(models, LINEAR, ranks=(1,))
    straight, odd, target = (tmp_path / f"{name}.safetensors" for name in ("straight", "odd", "new"))
    info = family_info(family)
    write_adapter(file_of(weights), "webui", straight, torch.float32, info)
    turned = {
        key: tensor[:, :, None, None].contiguous() if tensor.ndim == 2 else tensor
        for key, tensor in load_file(straight).items()
    }
    save_file(turned, odd, {"ss_base_model_version": info.header.version})
    with pytest.raises((RuntimeError, ValueError), match=r"size mismatch|shape"):
        pipeline_of(family, true_models(family)).load_lora_weights(str(odd))
    report = convert_adapter(odd, target)
    assert report.proof is not None and "largest delta difference 0.0" in report.proof
    pipeline_of(family, models).load_lora_weights(str(target))
    loaded = AdapterWeights(
        {key: pair for name, model in models.items() for key, pair in loaded_updates(name, model)}
    )
    assert compare(weights, loaded, torch.float32, "the pipeline")[0] == 0.0
