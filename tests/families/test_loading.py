"""Loading bases from a folder and from a single LDM-layout file, and refusing what is neither."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from sdlora.errors import ModelError
from sdlora.families.loading import ASSETS, load_model
from sdlora.families.single_file import load_single_file

CPU = torch.device("cpu")


def load(source: Path | str) -> object:
    return load_model(str(source), dtype=torch.float32, device=CPU)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, Tensor]]]:
    """Configs of a narrow SD1 (four levels, two residual layers, 1x1 VAE attention), and its weights."""
    folder = tmp_path_factory.mktemp("narrow")
    torch.manual_seed(5)
    unet_config = json.loads((ASSETS / "sd1" / "unet" / "config.json").read_text(encoding="utf-8"))
    vae_config = json.loads((ASSETS / "sd1" / "vae" / "config.json").read_text(encoding="utf-8"))
    text_config = json.loads((ASSETS / "sd1" / "text_encoder" / "config.json").read_text(encoding="utf-8"))
    unet_config |= {"block_out_channels": [32, 32, 64, 64], "cross_attention_dim": 16, "norm_num_groups": 8}
    unet_config |= {"attention_head_dim": 4}
    vae_config |= {"block_out_channels": [8, 8, 16, 16], "norm_num_groups": 4}
    text_config |= {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    unet = UNet2DConditionModel.from_config(unet_config)
    vae = AutoencoderKL.from_config(vae_config)
    text = CLIPTextModel(CLIPTextConfig(**text_config))
    for name, part in (("unet", unet), ("vae", vae), ("text_encoder", text)):
        part.save_pretrained(folder / name)
    for name in ("tokenizer", "scheduler"):
        shutil.copytree(ASSETS / "sd1" / name, folder / name)
    states = {"unet": unet.state_dict(), "vae": vae.state_dict(), "text_encoder": text.state_dict()}
    return folder, states


def ldm_unet_name(name: str) -> str:
    """Name a U-Net tensor as CompVis' code does (FORMATS.md 1.3), written for this test alone."""
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
        return f"output_blocks.{3 * int(m[1]) + 2}.{1 if m[1] == '0' else 2}.conv.{m[2]}"
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


def as_ldm(states: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    tensors = {"model.diffusion_model." + ldm_unet_name(n): t for n, t in states["unet"].items()}
    for name, tensor in states["vae"].items():
        ldm = ldm_vae_name(name)
        is_projection = "mid.attn_1" in ldm and ".norm." not in ldm and ldm.endswith("weight")
        tensors["first_stage_model." + ldm] = tensor[:, :, None, None] if is_projection else tensor
    for name, tensor in states["text_encoder"].items():
        tensors["cond_stage_model.transformer.text_model." + name.removeprefix("text_model.")] = tensor
    tensors["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    tensors["model_ema.decay"] = torch.tensor(0.9999)
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def test_single_file_equals_folder_tensor_for_tensor(
    parts: tuple[Path, dict[str, dict[str, Tensor]]], tmp_path: Path
) -> None:
    folder, states = parts
    file = tmp_path / "narrow.safetensors"
    save_file(as_ldm(states), file)
    loaded = load_single_file(file, folder, torch.float32)
    for name, wanted in states.items():
        found = loaded[name].state_dict()
        assert found.keys() == wanted.keys()
        assert [key for key in wanted if not torch.equal(found[key], wanted[key])] == []
    half = load_single_file(file, folder, torch.bfloat16)
    assert (half["unet"].dtype, half["text_encoder"].dtype, half["vae"].dtype) == (
        torch.bfloat16,
        torch.bfloat16,
        torch.float32,
    )


def test_shipped_tokenizer_gives_clips_own_ids() -> None:
    tokenizer = CLIPTokenizer.from_pretrained(ASSETS / "sd1" / "tokenizer")
    ids = tokenizer("a photo of an astronaut riding a horse").input_ids
    assert ids == [49406, 320, 1125, 539, 550, 18376, 6765, 320, 4558, 49407]
    assert (len(tokenizer), tokenizer.pad_token_id) == (49408, 49407)


def test_folder_loads_frozen_with_its_own_sizes(tiny_base: Path) -> None:
    model = load_model(str(tiny_base), dtype=torch.float32, device=CPU)
    assert (model.native_resolution, model.size_multiple, model.latent_shape(32, 64)) == (32, 8, (4, 8, 16))
    assert model.process.prediction_type == "epsilon"
    parameters = [p for module in model.components().values() for p in module.parameters()]
    assert len(parameters) > 50
    assert not any(parameter.requires_grad for parameter in parameters)


def test_mini_base_is_small_and_complete() -> None:
    size = sum(path.stat().st_size for path in (ASSETS / "mini").rglob("*") if path.is_file())
    assert size <= 32 * 2**20
    model = load_model("mini", dtype=torch.float32, device=CPU)
    assert model.native_resolution >= 64
    assert {path.name for path in (ASSETS / "mini").iterdir()} >= {"README.md", "LICENSE", "model_index.json"}


KINDS = {
    "SDXL": {"conditioner.embedders.1.model.ln_final.weight": (4,)},
    "SDXL refiner": {"conditioner.embedders.0.model.ln_final.weight": (4,)},
    "SD2": {"cond_stage_model.model.ln_final.weight": (4,)},
    "SD3": {"model.diffusion_model.joint_blocks.0.x.weight": (4,)},
    "Flux": {"double_blocks.0.img_attn.weight": (4,)},
    "adapter file": {"lora_unet_x.lora_down.weight": (4, 4)},
    "VAE alone": {"decoder.conv_in.weight": (4,)},
    "inpainting": {"model.diffusion_model.input_blocks.0.0.weight": (8, 9, 3, 3)},
    "only a U-Net": {"model.diffusion_model.input_blocks.0.0.weight": (8, 4, 3, 3)},
    "no Stable Diffusion U-Net": {"something.weight": (2,)},
}


@pytest.mark.parametrize("kind", KINDS)
def test_other_kinds_of_files_are_refused_by_name(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({name: torch.zeros(shape) for name, shape in KINDS[kind].items()}, file)
    with pytest.raises(ModelError, match=kind):
        load(file)


@pytest.mark.parametrize("ending", [".ckpt", ".pt", ".bin"])
def test_files_that_can_run_code_are_refused_with_the_way_out(ending: str, tmp_path: Path) -> None:
    file = tmp_path / f"model{ending}"
    file.write_bytes(b"\x80\x04")
    with pytest.raises(ModelError, match="convert it once"):
        load(file)


def test_damaged_missing_and_wrong_places_are_named(tmp_path: Path, tiny_base: Path) -> None:
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{")
    with pytest.raises(ModelError, match="download is complete"):
        load(broken)
    with pytest.raises(ModelError, match="no such base model"):
        load(tmp_path / "missing.safetensors")
    with pytest.raises(ModelError, match=r"no model_index\.json"):
        load(tmp_path)
    cut = tmp_path / "cut"
    shutil.copytree(tiny_base, cut)
    shutil.rmtree(cut / "unet")
    with pytest.raises(ModelError, match="cannot be loaded"):
        load(cut)


def test_sdxl_folder_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(
        '{"_class_name": "StableDiffusionXLPipeline", "text_encoder_2": []}', encoding="utf-8"
    )
    with pytest.raises(ModelError, match="StableDiffusionXLPipeline"):
        load(tmp_path)


def test_hub_id_without_network_is_one_clear_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match="somebody/some-model"):
        load("somebody/some-model")


def test_hub_id_in_the_cache_loads_offline(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    snapshot = tmp_path / "models--somebody--tiny" / "snapshots" / ("0" * 40)
    shutil.copytree(tiny_base, snapshot)
    refs = tmp_path / "models--somebody--tiny" / "refs"
    refs.mkdir()
    (refs / "main").write_text("0" * 40, encoding="utf-8")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    model = load_model("somebody/tiny", dtype=torch.float32, device=CPU)
    assert model.native_resolution == 32
