"""Checkpoints of the true sizes with random weights, written tensor by tensor."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path

import torch
from torch import Tensor

from sdlora.diffusion import NoiseProcess
from sdlora.families import FAMILIES
from sdlora.families.base import BaseModelInfo
from sdlora.families.ldm import text_places, unet_places, vae_places
from sdlora.families.loading import load_parts
from sdlora.families.recognition import Evidence, Recognised
from sdlora.families.unet_model import UNetModel
from sdlora.tensor_file import DTYPE_NAMES, tensor_bytes

_POOL = 1 << 22


def write_checkpoint(file: Path, family: str, dtype: torch.dtype) -> int:
    """Write a single-file checkpoint with random weights of the usual size; return its bytes."""
    shapes = checkpoint_shapes(family)
    position, header = 0, {}
    for key, shape in shapes.items():
        size = math.prod(shape) * dtype.itemsize
        offsets = [position, position + size]
        header[key] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": offsets}
        position += size
    text = json.dumps(header).encode()
    pool = torch.randn(_POOL, generator=torch.Generator().manual_seed(0))
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for number, (key, shape) in enumerate(shapes.items()):
            stream.write(tensor_bytes(_weights(key, shape, pool.roll(number * 7919)).to(dtype)))
    return file.stat().st_size


def checkpoint_shapes(family: str) -> dict[str, tuple[int, ...]]:
    """Return checkpoint key -> shape there."""
    model = blueprint(family)
    shapes: dict[str, tuple[int, ...]] = {}
    unet, vae = model.unet, model.vae
    places = [(unet, unet_places(unet.state_dict())), (vae, vae_places(vae.state_dict()))]
    for encoder in model.info.text_encoders:
        module = model.text_encoders[encoder.component]
        places.append((module, text_places(module.state_dict(), encoder)))
    for module, named in places:
        for name, tensor in module.state_dict().items():
            place, shape = named[name], tuple(tensor.shape)
            if place.third is not None:
                shape = (3 * shape[0], *shape[1:])
            shapes[place.key] = shape[::-1] if place.transposed else shape
    return shapes


def blueprint(family: str) -> UNetModel:
    """Return a model of the true sizes on the meta device, from the configs that ship for single files."""
    found = Recognised(Path("none.safetensors"), "file", family, "", (Evidence("nothing", "epsilon"),))
    meta = torch.device("meta")
    process = NoiseProcess.from_betas(0.00085, 0.012, "scaled_linear", 1000, "epsilon")
    base = BaseModelInfo("none", "none", found.path)
    return FAMILIES[family](base, load_parts(found, dtype=torch.float32, device=meta), process, device=meta)


def _weights(key: str, shape: tuple[int, ...], pool: Tensor) -> Tensor:
    """Return numbers of a usual scale, so that the network's values stay finite."""
    if len(shape) < 2:
        return torch.ones(shape) if key.endswith("weight") else torch.zeros(shape)
    count = math.prod(shape)
    flat = pool.repeat(-(-count // _POOL))[:count] if count > _POOL else pool[:count]
    return flat.reshape(shape) / math.sqrt(math.prod(shape[1:]))
