"""Narrow bases of every family: the true build (levels, layers, both layouts), few channels, random weights.

The writer of LDM-layout files is written from formats.md 1.3 for the tests alone; the product's reader has
its own tables.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from sdlora.files import ASSETS

FAMILY_NAMES = ("sd1", "sd2", "sdxl")
FORMS = ("folder", "file", "hub cache")
States = dict[str, dict[str, Tensor]]

_UNET: dict[str, dict[str, Any]] = {
    "sd1": {"block_out_channels": [16, 16, 32, 32], "cross_attention_dim": 16, "attention_head_dim": 2},
    "sd2": {
        "block_out_channels": [16, 16, 32, 32],
        "cross_attention_dim": 24,
        "attention_head_dim": [2, 2, 4, 4],
    },
    "sdxl": {
        "block_out_channels": [16, 16, 32],
        "cross_attention_dim": 40,
        "attention_head_dim": [2, 2, 4],
        "transformer_layers_per_block": [1, 1, 2],
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 20,
    },
}
_TEXT: dict[str, dict[str, Any]] = {
    "text_encoder": {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2},
    "wide": {"hidden_size": 24, "intermediate_size": 48, "num_attention_heads": 2, "projection_dim": 20},
}


def read(*parts: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(ASSETS.joinpath(*parts).read_text(encoding="utf-8"))
    return config


def make_base(folder: Path, family: str, **scheduler: Any) -> States:
    """Write a diffusers folder of a narrow base; return its weights by component."""
    torch.manual_seed(5)
    unet = UNet2DConditionModel.from_config(
        read(family, "unet", "config.json") | {"norm_num_groups": 8, "sample_size": 8} | _UNET[family]
    )
    vae = AutoencoderKL.from_config(
        read(family, "vae", "config.json") | {"block_out_channels": [8, 8, 16, 16], "norm_num_groups": 4}
    )
    parts: dict[str, Any] = {"unet": unet, "vae": vae}
    components = ["text_encoder"] if family != "sdxl" else ["text_encoder", "text_encoder_2"]
    for name in components:
        wide = family == "sd2" or name == "text_encoder_2"
        settings = read(family, name, "config.json") | {"num_hidden_layers": 3}
        config = CLIPTextConfig(**settings | _TEXT["wide" if wide else "text_encoder"])
        kind = CLIPTextModelWithProjection if name == "text_encoder_2" else CLIPTextModel
        parts[name] = kind(config)
        tokenizer = CLIPTokenizer.from_pretrained(
            ASSETS / "sd1" / "tokenizer", pad_token="!" if wide else "<|endoftext|>"
        )
        tokenizer.save_pretrained(folder / name.replace("text_encoder", "tokenizer"))
    index: dict[str, Any] = {
        "_class_name": "StableDiffusionXLPipeline" if family == "sdxl" else "StableDiffusionPipeline"
    }
    for name, part in parts.items():
        # every weight differs from every other, also those that start as zeros or ones
        with torch.no_grad():
            for parameter in part.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
        part.save_pretrained(folder / name)
        index[name] = [type(part).__module__.split(".")[0], type(part).__name__]
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    (folder / "scheduler").mkdir()
    settings = read(family, "scheduler", "scheduler_config.json") | scheduler
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return {name: dict(part.state_dict()) for name, part in parts.items()}


def copy_configs(folder: Path, target: Path) -> Path:
    """Copy a base without its weights and tokenizers: what a single file leaves out."""
    for file in folder.rglob("*.json"):
        if "tokenizer" not in str(file):
            (target / file.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, target / file.relative_to(folder))
    return target


def in_form(
    form: str, family: str, base: tuple[Path, States], room: Path, monkeypatch: pytest.MonkeyPatch
) -> str:
    """Return what users would give for a base as a ``folder``, one ``file``, or in the ``hub cache``."""
    folder, states = base
    if form == "folder":
        return str(folder)
    if form == "file":
        file = room / "model.safetensors"
        save_file(as_ldm(family, states), file)
        # the shipped configs describe the true sizes; here the narrow base's stand in for them
        shutil.copytree(folder, room / "assets" / family)
        monkeypatch.setattr("sdlora.families.components.ASSETS", room / "assets")
        return str(file)
    commit = "0" * 40
    model = room / "hub" / "models--somebody--narrow"
    shutil.copytree(folder, model / "snapshots" / commit)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(commit, encoding="utf-8")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(room / "hub"))
    return "somebody/narrow"


def as_ldm(family: str, states: States) -> dict[str, Tensor]:
    """Return a narrow base's weights under the keys of a single-file checkpoint."""
    tensors = {
        "model.diffusion_model." + ldm_unet_name(n, xl=family == "sdxl"): t for n, t in states["unet"].items()
    }
    for name, tensor in states["vae"].items():
        ldm = ldm_vae_name(name)
        is_projection = "mid.attn_1" in ldm and ".norm." not in ldm and ldm.endswith("weight")
        tensors["first_stage_model." + ldm] = tensor[:, :, None, None] if is_projection else tensor
    if family == "sd2":
        tensors |= as_openclip("cond_stage_model.model.", states["text_encoder"])
        # the checkpoint has a 24th layer, which is not used
        for name, tensor in as_openclip("cond_stage_model.model.", states["text_encoder"]).items():
            if ".resblocks.2." in name:
                tensors[name.replace(".resblocks.2.", ".resblocks.3.")] = tensor + 1
    else:
        prefix = "conditioner.embedders.0." if family == "sdxl" else "cond_stage_model."
        for name, tensor in states["text_encoder"].items():
            tensors[f"{prefix}transformer.text_model." + name.removeprefix("text_model.")] = tensor
        tensors[f"{prefix}transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    if family == "sdxl":
        tensors |= as_openclip("conditioner.embedders.1.model.", states["text_encoder_2"])
        tensors["conditioner.embedders.1.model.logit_scale"] = torch.tensor(4.6)
    tensors["model_ema.decay"] = torch.tensor(0.9999)
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def as_openclip(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a text encoder's weights as OpenCLIP names and packs them."""
    plain = {name.removeprefix("text_model."): tensor for name, tensor in state.items()}
    out = {
        "token_embedding.weight": plain["embeddings.token_embedding.weight"],
        "positional_embedding": plain["embeddings.position_embedding.weight"],
        "ln_final.weight": plain["final_layer_norm.weight"],
        "ln_final.bias": plain["final_layer_norm.bias"],
    }
    if "text_projection.weight" in plain:
        out["text_projection"] = plain["text_projection.weight"].T
    layers = 1 + max(int(m[1]) for n in plain if (m := re.match(r"encoder\.layers\.(\d+)", n)))
    for n in range(layers):
        old, new = f"encoder.layers.{n}.", f"transformer.resblocks.{n}."
        for kind in ("weight", "bias"):
            out[f"{new}attn.in_proj_{kind}"] = torch.cat(
                [plain[f"{old}self_attn.{x}_proj.{kind}"] for x in "qkv"]
            )
            out[f"{new}attn.out_proj.{kind}"] = plain[f"{old}self_attn.out_proj.{kind}"]
            for layer_name, other in (
                ("layer_norm1", "ln_1"),
                ("layer_norm2", "ln_2"),
                ("mlp.fc1", "mlp.c_fc"),
                ("mlp.fc2", "mlp.c_proj"),
            ):
                out[f"{new}{other}.{kind}"] = plain[f"{old}{layer_name}.{kind}"]
    return {prefix + name: tensor for name, tensor in out.items()}


def ldm_unet_name(name: str, *, xl: bool = False) -> str:
    """Name a U-Net tensor as CompVis' code does (formats.md 1.3), written for this test alone."""
    inner = {
        "norm1": "in_layers.0",
        "conv1": "in_layers.2",
        "time_emb_proj": "emb_layers.1",
        "norm2": "out_layers.0",
        "conv2": "out_layers.3",
        "conv_shortcut": "skip_connection",
    }
    fixed = {
        "conv_in": "input_blocks.0.0",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
    }
    for old, new in fixed.items():
        if name.startswith(old + "."):
            return new + name.removeprefix(old)
    if m := re.match(r"(down|up)_blocks\.(\d)\.(resnets|attentions)\.(\d)\.(.*)", name):
        side, i, kind, j, rest = m[1], int(m[2]), m[3], int(m[4]), m[5]
        block = f"input_blocks.{1 + 3 * i + j}" if side == "down" else f"output_blocks.{3 * i + j}"
        if kind == "resnets":
            head, _, tail = rest.partition(".")
            return f"{block}.0.{inner[head]}.{tail}"
        return f"{block}.1.{rest}"
    if m := re.match(r"down_blocks\.(\d)\.downsamplers\.0\.conv\.(.*)", name):
        return f"input_blocks.{3 * (int(m[1]) + 1)}.0.op.{m[2]}"
    if m := re.match(r"up_blocks\.(\d)\.upsamplers\.0\.conv\.(.*)", name):
        return f"output_blocks.{3 * int(m[1]) + 2}.{1 if m[1] == '0' and not xl else 2}.conv.{m[2]}"
    m = re.match(r"mid_block\.(resnets|attentions)\.(\d)\.(.*)", name)
    assert m, name
    if m[1] == "attentions":
        return f"middle_block.1.{m[3]}"
    head, _, tail = m[3].partition(".")
    return f"middle_block.{2 * int(m[2])}.{inner[head]}.{tail}"


def ldm_vae_name(name: str) -> str:
    name = name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
    name = re.sub(r"encoder\.down_blocks\.(\d)\.resnets\.", r"encoder.down.\1.block.", name)
    name = re.sub(r"encoder\.down_blocks\.(\d)\.downsamplers\.0", r"encoder.down.\1.downsample", name)
    name = re.sub(r"up_blocks\.(\d)\.resnets\.", lambda m: f"up.{3 - int(m[1])}.block.", name)
    name = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{3 - int(m[1])}.upsample", name)
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    for old, new in (
        ("group_norm", "norm"),
        ("to_q", "q"),
        ("to_k", "k"),
        ("to_v", "v"),
        ("to_out.0", "proj_out"),
    ):
        name = name.replace(f"mid_block.attentions.0.{old}.", f"mid.attn_1.{new}.")
    return name
