"""Real tiny models, and random adapters for their layers, for the tests of files."""

from __future__ import annotations

import functools
import json
import struct
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from sdlora.adapters.canonical import AdapterFile, AdapterInfo, AdapterWeights, LowRankPair, ModuleKey
from sdlora.families.facts import FamilyInfo
from sdlora.families.table import family_info

SD1, SD2, SDXL = (family_info(name) for name in ("sd1", "sd2", "sdxl"))
ATTENTION = (".to_q", ".to_k", ".to_v", ".to_out.0")
LINEAR = (*ATTENTION, ".ff.net.0.proj", ".ff.net.2", ".proj_in", ".proj_out")
EVERYTHING = (
    *LINEAR,
    *(".conv1", ".conv2", ".conv_shortcut", ".time_emb_proj", ".downsamplers.0.conv", ".upsamplers.0.conv"),
)
TEXT = (".q_proj", ".k_proj", ".v_proj", ".out_proj", ".fc1", ".fc2")


def models_of(family: FamilyInfo) -> dict[str, nn.Module]:
    """Return all adaptable components of a family; shared between tests, so only to look at."""
    return _models(family.name)


@functools.cache
def _models(name: str) -> dict[str, nn.Module]:
    family = {"sd1": SD1, "sd2": SD2, "sdxl": SDXL}[name]
    models: dict[str, nn.Module] = {"unet": tiny_unet(family), "text_encoder": tiny_text_encoder()}
    if family is SDXL:
        models["text_encoder_2"] = tiny_text_encoder(projection=True, width=16)
    return models


def tiny_unet(family: FamilyInfo = SD1, layers_per_block: int = 2) -> UNet2DConditionModel:
    """Return a U-Net with the block layout of its family and 8 to 16 channels."""
    torch.manual_seed(1)
    if family is SDXL:
        return UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16, 16),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 1, 2),
            layers_per_block=2,
            cross_attention_dim=24,
            attention_head_dim=(2, 4, 4),
            use_linear_projection=True,
            norm_num_groups=4,
        )
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 8, 16, 16),
        layers_per_block=layers_per_block,
        cross_attention_dim=12,
        attention_head_dim=2,
        use_linear_projection=family is SD2,
        norm_num_groups=4,
    )


def tiny_text_encoder(*, projection: bool = False, width: int = 12) -> CLIPTextModel:
    """Return a CLIP text encoder of two layers."""
    torch.manual_seed(2)
    settings = CLIPTextConfig(
        vocab_size=40,
        hidden_size=width,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        projection_dim=10,
        bos_token_id=38,
        eos_token_id=39,
        pad_token_id=39,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(settings).eval()


def canonical(component: str, path: str) -> ModuleKey:
    """Return the key of a module found in a model."""
    if component != "unet" and not path.startswith("text_model."):
        path = f"text_model.{path}"
    return ModuleKey(component, path)


def random_pair(
    layer: nn.Module, rank: int, alpha: float, generator: torch.Generator, dtype: torch.dtype = torch.float32
) -> LowRankPair:
    """Return random factors of trained size for a layer."""
    kernel: tuple[int, ...]
    ones: tuple[int, ...]
    if isinstance(layer, nn.Conv2d):
        width, height, kernel, ones = layer.in_channels, layer.out_channels, layer.kernel_size, (1, 1)
    else:
        assert isinstance(layer, nn.Linear)
        width, height, kernel, ones = layer.in_features, layer.out_features, (), ()
    down = torch.randn(rank, width, *kernel, generator=generator) * 0.3
    up = torch.randn(height, rank, *ones, generator=generator) * 0.05
    return LowRankPair(down.to(dtype), up.to(dtype), alpha)


def random_adapter(
    models: dict[str, nn.Module],
    endings: tuple[str, ...],
    ranks: Sequence[int] = (4,),
    scales: Sequence[float] = (1.0,),
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> AdapterWeights:
    """Return an adapter for all layers with these endings; ranks and alpha / rank take turns."""
    generator = torch.Generator().manual_seed(seed)
    pairs: dict[ModuleKey, LowRankPair] = {}
    for component, model in models.items():
        chosen = endings if component == "unet" else TEXT
        for path, layer in model.named_modules():
            if path.endswith(chosen) and isinstance(layer, nn.Linear | nn.Conv2d):
                rank = ranks[len(pairs) % len(ranks)]
                alpha = rank * scales[len(pairs) % len(scales)]
                pairs[canonical(component, path)] = random_pair(layer, rank, alpha, generator, dtype)
    return AdapterWeights(pairs)


def file_of(weights: AdapterWeights) -> AdapterFile:
    """Return the weights with a name and trigger words."""
    return AdapterFile(weights, AdapterInfo(name="test style", trigger_words=("inkstyle", "ink, thick")))


def assert_same(actual: AdapterWeights, wanted: AdapterWeights, *, exactly: bool = True) -> None:
    """Assert that every factor and alpha is the same, whole tensors."""
    assert len(wanted) > 0
    assert sorted(actual.pairs) == sorted(wanted.pairs)
    for key, pair in wanted.items():
        other = actual.pairs[key]
        assert other.alpha == pair.alpha, key
        assert other.down.shape == pair.down.shape and other.up.shape == pair.up.shape, key
        if exactly:
            assert other.down.dtype == pair.down.dtype and other.up.dtype == pair.up.dtype, key
            assert torch.equal(other.down, pair.down), key
            assert torch.equal(other.up, pair.up), key
        else:
            assert torch.equal(other.down, pair.down), key
            assert torch.allclose(
                other.up.float(), pair.up.float(), rtol=torch.finfo(pair.up.dtype).eps, atol=0
            )


def raw_file(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    """Write a safetensors-like file with any header text and any claimed header length."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path
