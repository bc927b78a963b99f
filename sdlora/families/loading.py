"""From what the user gives (``mini``, a folder, a file, a hub id) to a loaded base model.

Only safetensors are read. A folder or hub id is a diffusers layout; a single file is an LDM layout.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ..diffusion import PredictionType
from ..errors import ModelError
from .base import BaseModelInfo
from .fingerprint import file_digest
from .sd1 import StableDiffusion1
from .single_file import load_single_file

ASSETS = Path(__file__).parent.parent / "assets"
_HUB_FILES = ["model_index.json", "sdlora.json"] + [
    f"{part}/{pattern}"
    for part in ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
    for pattern in ("*.json", "*.txt", "*.safetensors")
]


def load_model(
    source: str,
    *,
    dtype: torch.dtype,
    device: torch.device,
    prediction_type: PredictionType | None = None,
    clip_skip: int = 1,
) -> StableDiffusion1:
    """Load a base model, frozen and in eval mode.

    Args:
        source: ``mini``, a diffusers folder, a ``.safetensors`` checkpoint, or a hub id.
        dtype: number format of U-Net and text encoder; the autoencoder is always float32, since fp16
            overflows in some and it runs once a picture.
        prediction_type: overrides the base's own.
        clip_skip: see :func:`sdlora.families.clip.encode_chunks`.

    Raises:
        ModelError: if it is not there, not a supported family, or damaged.
    """
    path = _locate(source)
    options: dict[str, Any] = {"prediction_type": prediction_type, "clip_skip": clip_skip}
    try:
        with _quiet():
            parts = (
                load_single_file(path, ASSETS / "sd1", dtype) if path.is_file() else _load_folder(path, dtype)
            )
    except ModelError:
        raise
    except Exception as error:  # whatever the libraries raise on damaged input
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"{path}: cannot be loaded as a Stable Diffusion base ({reason}); "
            "check that the download is complete"
        ) from error
    parts.setdefault("scheduler_config", _read_json(ASSETS / "sd1" / "scheduler" / "scheduler_config.json"))
    base = BaseModelInfo(
        source=source,
        title=source if source == "mini" else path.stem if path.is_file() else path.name,
        digest=_base_digest(path),
        recommended=_recommended(path),
    )
    _check_family(path, parts["unet"])
    model = StableDiffusion1(base, **parts, **options)
    # Measured on 2 AVX-512 cores: channels-last takes 5-10 % off a training step on the CPU. CUDA's
    # group norm forces the other layout, so there it would cost.
    layout = torch.channels_last if device.type == "cpu" else torch.preserve_format
    model.unet.to(device=device, memory_format=layout)
    model.text_encoder.to(device)
    model.vae.to(device)
    return model


def _locate(source: str) -> Path:
    if source == "mini":
        return ASSETS / "mini"
    path = Path(source).expanduser()
    if path.suffix.lower() in (".ckpt", ".pt", ".pth", ".bin"):
        raise ModelError(
            f"{source}: {path.suffix} files can run code when opened and are not read; use the "
            ".safetensors version of this checkpoint, or convert it once in your WebUI (Checkpoint Merger)"
        )
    if path.is_file():
        if path.suffix.lower() != ".safetensors":
            raise ModelError(f"{source}: not a .safetensors file; give a .safetensors checkpoint or a folder")
        return path
    if path.is_dir():
        if not (path / "model_index.json").is_file():
            raise ModelError(
                f"{source}: no model_index.json inside, so this is no diffusers model folder; "
                "give the folder that holds model_index.json, or a .safetensors checkpoint"
            )
        return path
    if source.count("/") == 1 and not path.is_absolute() and not source.startswith((".", "~")):
        return _from_hub(source)
    raise ModelError(f"{source}: no such base model; give `mini`, a folder, a .safetensors file or a hub id")


def _from_hub(source: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, allow_patterns=_HUB_FILES))
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"{source}: neither a path here nor a model that the hub gives ({reason}); check the "
            "spelling and the network, or give a local folder or .safetensors file"
        ) from error


def _load_folder(folder: Path, dtype: torch.dtype) -> dict[str, Any]:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    index = _read_json(folder / "model_index.json")
    if "text_encoder_2" in index or "transformer" in index:
        raise ModelError(
            f"{folder}: a {index.get('_class_name', 'model')} folder; this version trains "
            f"{StableDiffusion1.info.title} bases"
        )
    options = {"use_safetensors": True, "local_files_only": True}
    return {
        "unet": UNet2DConditionModel.from_pretrained(folder, subfolder="unet", torch_dtype=dtype, **options),
        "vae": AutoencoderKL.from_pretrained(folder, subfolder="vae", torch_dtype=torch.float32, **options),
        "text_encoder": CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=dtype, **options),
        "tokenizer": CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True),
        "scheduler_config": _read_json(folder / "scheduler" / "scheduler_config.json"),
    }


def _check_family(path: Path, unet: Any) -> None:
    config = unet.config
    if config.in_channels != 4:
        raise ModelError(
            f"{path}: its U-Net takes {config.in_channels} channels (inpainting?); give a plain base"
        )
    if config.addition_embed_type is not None or config.use_linear_projection:
        raise ModelError(
            f"{path}: an SD2 or SDXL base; this version trains {StableDiffusion1.info.title} bases"
        )


def _base_digest(path: Path) -> str:
    if path.is_file():
        return file_digest(path)
    weights = sorted((path / "unet").glob("*.safetensors"))
    if len(weights) > 1:  # both an fp16 variant and the full one: from_pretrained took the full one
        plain = [w for w in weights if ".fp16." not in w.name and ".non_ema." not in w.name]
        weights = plain or weights
    return file_digest(weights[0])


def _recommended(path: Path) -> dict[str, Any]:
    """Return settings the base's author suggests, from ``sdlora.json`` in its folder."""
    file = path / "sdlora.json"
    if not file.is_file():
        return {}
    data = _read_json(file).get("recommended", {})
    return data if isinstance(data, dict) else {}


def _read_json(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the libraries' own progress bars and notices out of ours; real errors are raised."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    libraries = [transformers_logging, diffusers_logging]
    shown = [library for library in libraries if library.is_progress_bar_enabled()]
    for library in shown:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in shown:
            library.enable_progress_bar()
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
