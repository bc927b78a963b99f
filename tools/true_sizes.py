"""Bases of the true sizes with random weights, in every form users own them, written tensor by tensor.

For the slow tests and ``benchmarks/bases.py``: one LDM-layout file, the diffusers folder of the same numbers,
and the hub's cache holding that folder.
"""

from __future__ import annotations

import json
import math
import shutil
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdlora.config.schema import ModelConfig
from sdlora.diffusion.ddpm import DDPM
from sdlora.families.attention import choose_attentions
from sdlora.families.base import BaseModelInfo
from sdlora.families.components import load_parts
from sdlora.families.ldm import StoredKey, text_key_map, unet_key_map, vae_key_map
from sdlora.families.locating import ASSETS
from sdlora.families.recognition import Evidence, Recognised
from sdlora.families.table import FAMILIES
from sdlora.families.unet_model import UNetModel
from sdlora.families.weights import TensorSource
from sdlora.tensor_file import DTYPE_NAMES, tensor_bytes

_POOL = 1 << 22
_PIPELINES = {"sdxl": "StableDiffusionXLPipeline"}


def write_checkpoint(file: Path, family: str, dtype: torch.dtype) -> int:
    """Write a single-file checkpoint with random weights of the usual size; return its bytes."""
    shapes = checkpoint_shapes(family)
    pool = torch.randn(_POOL, generator=torch.Generator().manual_seed(0)).repeat(2)
    tensors = (
        _weights(key, shape, pool[number * 7919 % _POOL :][:_POOL]).to(dtype)
        for number, (key, shape) in enumerate(shapes.items())
    )
    _write(file, shapes, dtype, tensors)
    return file.stat().st_size


def write_folder(folder: Path, file: Path, family: str, dtype: torch.dtype) -> int:
    """Write the diffusers folder that holds the same numbers as a checkpoint; return its bytes."""
    source, model, assets = TensorSource([file]), blueprint(family), ASSETS / FAMILIES[family].info.assets
    index: dict[str, Any] = {"_class_name": _PIPELINES.get(family, "StableDiffusionPipeline")}
    for name, (module, key_map) in component_key_maps(model).items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        shutil.copy(assets / name / "config.json", folder / name / "config.json")
        stem = "model" if name.startswith("text_encoder") else "diffusion_pytorch_model"
        shapes = {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
        # published folders have the name of transformers before 5.6
        old = [f"text_model.{key}" if name == "text_encoder" else key for key in shapes]
        renamed = dict(zip(old, shapes.values(), strict=True))
        tensors = (_taken(source, key_map[key], shape).to(dtype) for key, shape in shapes.items())
        _write(folder / name / f"{stem}.safetensors", renamed, dtype, tensors)
        index[name] = [type(module).__module__.partition(".")[0], type(module).__name__]
    for encoder in model.info.text_encoders:
        model.tokenizers[encoder.component].save_pretrained(folder / encoder.tokenizer)
        index[encoder.tokenizer] = ["transformers", "CLIPTokenizer"]
    shutil.copytree(assets / "scheduler", folder / "scheduler", dirs_exist_ok=True)
    index["scheduler"] = ["diffusers", "DDIMScheduler"]
    (folder / "model_index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
    return sum(written.stat().st_size for written in folder.rglob("*.safetensors"))


def fill_hub_cache(cache: Path, folder: Path, hub_id: str) -> None:
    """Lay a folder's files out as the hub's cache does: snapshots of links to blobs (here: to the files)."""
    commit = "0" * 40
    repository = cache / f"models--{hub_id.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True, exist_ok=True)
    (repository / "refs" / "main").write_text(commit, encoding="utf-8")
    for file in folder.rglob("*"):
        link = repository / "snapshots" / commit / file.relative_to(folder)
        if file.is_file() and not link.exists():
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(file.resolve())


def checkpoint_shapes(family: str) -> dict[str, tuple[int, ...]]:
    """Return checkpoint key -> shape there."""
    shapes: dict[str, tuple[int, ...]] = {}
    for module, key_map in component_key_maps(blueprint(family)).values():
        for name, tensor in module.state_dict().items():
            stored_key, shape = key_map[name], tuple(tensor.shape)
            if stored_key.third is not None:
                shape = (3 * shape[0], *shape[1:])
            shapes[stored_key.key] = shape[::-1] if stored_key.transposed else shape
    return shapes


def component_key_maps(model: UNetModel) -> dict[str, tuple[Any, Mapping[str, StoredKey]]]:
    """Return component -> (module, where a checkpoint keeps each of its tensors)."""
    unet, vae = model.unet, model.vae
    key_maps = {"unet": (unet, unet_key_map(unet.state_dict())), "vae": (vae, vae_key_map(vae.state_dict()))}
    for encoder in model.info.text_encoders:
        module = model.text_encoders[encoder.component]
        key_maps[encoder.component] = module, text_key_map(module.state_dict(), encoder)
    return key_maps


def blueprint(family: str, dtype: torch.dtype = torch.float32) -> UNetModel:
    """Return a model of the true sizes on the meta device, from the configs that ship for single files."""
    nothing = (Evidence("nothing", "epsilon"),)
    recognised = Recognised(Path("none.safetensors"), "file", family, (), "", nothing)
    meta = torch.device("meta")
    process = DDPM.from_betas(0.00085, 0.012, "scaled_linear", 1000, "epsilon")
    base = BaseModelInfo("none", "none", recognised.path)
    parts = load_parts(recognised, dtype=dtype, device=meta)
    attention = choose_attentions("auto", meta, dtype)
    return FAMILIES[family](
        base, parts, process, settings=ModelConfig(base=base.source), device=meta, attention=attention
    )


def _weights(key: str, shape: tuple[int, ...], pool: Tensor) -> Tensor:
    """Return numbers of a usual scale, so that the network's values stay finite."""
    if len(shape) < 2:
        return torch.ones(shape) if key.endswith("weight") else torch.zeros(shape)
    count = math.prod(shape)
    flat = pool.repeat(-(-count // _POOL))[:count] if count > _POOL else pool[:count]
    return flat.reshape(shape) / math.sqrt(math.prod(shape[1:]))


def _taken(source: TensorSource, stored_key: StoredKey, shape: tuple[int, ...]) -> Tensor:
    ((_, stored),) = source.read([stored_key.key])
    return stored_key.take(stored, shape)


def _write(
    file: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, tensors: Iterable[Tensor]
) -> None:
    with file.open("wb") as stream:
        for part in _file(shapes, dtype, tensors):
            stream.write(part)


def _file(
    shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, tensors: Iterable[Tensor]
) -> Iterator[bytes]:
    position, header = 0, {}
    for key, shape in shapes.items():
        size = math.prod(shape) * dtype.itemsize
        offsets = [position, position + size]
        header[key] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": offsets}
        position += size
    text = json.dumps(header).encode()
    yield struct.pack("<Q", len(text)) + text
    for tensor in tensors:
        yield tensor_bytes(tensor)
