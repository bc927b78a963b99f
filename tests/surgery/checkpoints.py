"""Narrow checkpoints in both layouts, adapters for them, and their sums in float64."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from families.narrow import States, as_ldm
from safetensors.torch import load_file, save_file
from torch import Tensor

from sdlora.adapters.canonical import AdapterFile, AdapterInfo, AdapterWeights, LowRankPair, ModuleKey
from sdlora.families.table import family_info
from sdlora.formats.adapter_files import write_adapter
from surgery.adapters import exact


def cast(states: States, dtype: torch.dtype) -> States:
    """All weights in a number format."""
    return {name: {key: t.to(dtype) for key, t in state.items()} for name, state in states.items()}


def ldm_file(folder: Path, family: str, states: States, dtype: torch.dtype, name: str = "model") -> Path:
    """Write a single-file checkpoint with text entries and keys in an order of its own."""
    tensors = as_ldm(family, cast(states, dtype))
    if family == "sd2":  # a layer beyond the last used one, which only the true number of layers tells
        tensors = {key: tensor for key, tensor in tensors.items() if ".resblocks.3." not in key}
    path = folder / f"{name}.safetensors"
    save_file(tensors, path, {"modelspec.title": "narrow", "modelspec.hash_sha256": "0x00", "note": "ä"})
    return path


def diffusers_folder(source: Path, target: Path, states: States, dtype: torch.dtype) -> Path:
    """Copy a folder and put weights in a number format into it."""
    shutil.copytree(source, target)
    for component, state in cast(states, dtype).items():
        for file in (target / component).glob("*.safetensors"):
            stored = {key: state[key].contiguous() for key in load_file(file)}
            save_file(stored, file, {"format": "pt"})
    return target


def layers(family: str, states: States, preset: str = "all") -> dict[ModuleKey, tuple[str, Tensor]]:
    """Module -> (its component's key, weight) of all layers that adapters change."""
    collected = {}
    for component, presets in family_info(family).targets.items():
        for key, tensor in states[component].items():
            path = key.removesuffix(".weight")
            if key.endswith(".weight") and f".{path}".endswith(presets[preset]):
                canonical = (
                    path if component == "unet" or path.startswith("text_model.") else f"text_model.{path}"
                )
                collected[ModuleKey(component, canonical)] = (key, tensor)
    return collected


def adapter_for(
    family: str, states: States, *, seed: int = 0, every: int = 3, rank: int = 3, size: float = 0.05
) -> AdapterWeights:
    """Random pairs for every third layer of the U-Net and all of the text encoders; alpha is not the rank."""
    generator = torch.Generator().manual_seed(seed)
    pairs = {}
    for index, (module, (_, weight)) in enumerate(sorted(layers(family, states).items())):
        own_rank = rank + index % 2
        down = torch.randn(own_rank, *weight.shape[1:], generator=generator)
        up = torch.randn(weight.shape[0], own_rank, *[1] * (weight.ndim - 2), generator=generator)
        if module.component != "unet" or index % every == 0:
            pairs[module] = LowRankPair(down * size, up * size, own_rank * 0.6)
    assert {pair.down.ndim for pair in pairs.values()} == {2, 4}
    return AdapterWeights(pairs)


def saved_for(folder: Path, family: str, name: str, weights: AdapterWeights) -> Path:
    """Write an adapter for a family."""
    path = folder / f"{name}.safetensors"
    info = AdapterInfo(family=family, name=name)
    write_adapter(AdapterFile(weights, info), "webui", path, torch.float32, family_info(family))
    return path


def added(
    family: str, states: States, dtype: torch.dtype, terms: list[tuple[AdapterWeights, Mapping[str, float]]]
) -> States:
    """The weights in a number format plus the adapters' exact updates at strengths by component: float64."""
    collected = {name: dict(state) for name, state in cast(cast(states, dtype), torch.float64).items()}
    known = layers(family, states)
    for weights, strengths in terms:
        for module, pair in weights.items():
            key, weight = known[module]
            update = strengths[module.component] * exact(pair).reshape(weight.shape)
            collected[module.component][key] = collected[module.component][key] + update
    return collected
