"""One ``.safetensors`` checkpoint in LDM layout -> diffusers components, with no network.

What such a file leaves out (component configs, the CLIP tokenizer) ships in ``assets/sd1``. Tensors are
memory-mapped and converted component by component.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..errors import ModelError

_UNET = "model.diffusion_model."
_VAE = "first_stage_model."
_TEXT = "cond_stage_model.transformer.text_model."
_FIRST_CONV = f"{_UNET}input_blocks.0.0.weight"
_CROSS_ATTENTION = f"{_UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
_IMAGE_CHANNELS = {9: "an inpainting", 8: "an instruct-pix2pix"}


def load_single_file(file: Path, assets: Path, dtype: torch.dtype) -> dict[str, Any]:
    """Return the components of an SD1 checkpoint.

    Args:
        file: the checkpoint.
        assets: folder with the components' configs and the tokenizer, as in a diffusers folder.
        dtype: of U-Net and text encoder; the autoencoder is float32.

    Raises:
        ModelError: for a damaged file, or a file that is no SD1 base, named by what it is.
    """
    _check_kind(file)
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTokenizer

    options = {"config": str(assets), "local_files_only": True}
    unet = UNet2DConditionModel.from_single_file(str(file), subfolder="unet", torch_dtype=dtype, **options)
    vae = AutoencoderKL.from_single_file(str(file), subfolder="vae", torch_dtype=torch.float32, **options)
    return {
        "unet": unet,
        "vae": vae,
        "text_encoder": _text_encoder(file, assets / "text_encoder", dtype),
        "tokenizer": CLIPTokenizer.from_pretrained(assets / "tokenizer", local_files_only=True),
    }


def _text_encoder(file: Path, config_folder: Path, dtype: torch.dtype) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel

    encoder = CLIPTextModel(CLIPTextConfig.from_pretrained(config_folder)).to(dtype)
    flat = not hasattr(encoder, "text_model")  # transformers >= 5.6
    wanted = encoder.state_dict()
    found: dict[str, torch.Tensor] = {}
    with safe_open(str(file), framework="pt") as handle:
        for key in handle.keys():  # noqa: SIM118 (the handle is no dict)
            if key.startswith(_TEXT):
                name = key.removeprefix(_TEXT) if flat else "text_model." + key.removeprefix(_TEXT)
                if name in wanted:  # position_ids, which old files hold, is computed
                    found[name] = handle.get_tensor(key).to(dtype)
    missing = sorted(set(wanted) - set(found))
    if missing:
        raise ModelError(
            f"{file}: {len(missing)} text-encoder tensors are missing (first: {missing[0]}); "
            "use the full checkpoint, not a pruned one"
        )
    encoder.load_state_dict(found)
    return encoder


def _check_kind(file: Path) -> None:
    """Raise ModelError unless the header says: an SD1 text-to-image checkpoint with all its parts."""
    try:
        with safe_open(str(file), framework="pt") as handle:
            keys = set(handle.keys())
            shapes = {
                key: handle.get_slice(key).get_shape()
                for key in (_FIRST_CONV, _CROSS_ATTENTION)
                if key in keys
            }
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"{file}: not a readable .safetensors file ({error}); check that the download is complete"
        ) from None
    kind = _kind(keys, shapes)
    if kind:
        raise ModelError(f"{file}: {kind}; give a Stable Diffusion 1.x text-to-image checkpoint")


def _kind(keys: set[str], shapes: dict[str, list[int]]) -> str | None:
    if any(key.startswith("conditioner.embedders.1.") for key in keys):
        return "an SDXL checkpoint, which this version does not train yet"
    if any(key.startswith("conditioner.") for key in keys):
        return "an SDXL refiner checkpoint"
    if any("lora_" in key or "hada_" in key or "lokr_" in key for key in keys):
        return "an adapter file, not a base model"
    if any(".joint_blocks." in key or key.startswith("joint_blocks.") for key in keys):
        return "an SD3 checkpoint, which this version does not train yet"
    if any("double_blocks." in key for key in keys):
        return "a Flux checkpoint"
    if any(key.startswith("cond_stage_model.model.") for key in keys):
        return "an SD2 checkpoint, which this version does not train yet"
    if _FIRST_CONV not in keys:
        vae = any(key.startswith(("decoder.", _VAE)) for key in keys)
        return "a VAE alone" if vae else "holds no Stable Diffusion U-Net"
    channels = shapes[_FIRST_CONV][1]
    if channels != 4:
        return f"{_IMAGE_CHANNELS.get(channels, f'a {channels}-channel')} checkpoint"
    if not any(key.startswith(_VAE) for key in keys) or not any(key.startswith(_TEXT) for key in keys):
        return "holds only a U-Net, without text encoder or VAE"
    return None
