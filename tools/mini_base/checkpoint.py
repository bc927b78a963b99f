"""Training checkpoints as safetensors and JSON, never pickles."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from .files import read_json, write_bytes, write_json

_STATE = "state.json"


def _save(path: Path, tensors: dict[str, Tensor]) -> None:
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_bytes(path, safetensors.torch.save(whole))


def optimizer_tensors(optimizer: Optimizer) -> dict[str, Tensor]:
    """Returns an optimizer's state with flat names."""
    return {
        f"{index}.{key}": torch.as_tensor(value)
        for index, entry in optimizer.state_dict()["state"].items()
        for key, value in entry.items()
    }


def restore_optimizer(optimizer: Optimizer, tensors: dict[str, Tensor]) -> None:
    """Undoes ``optimizer_tensors``."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        index, _, key = name.partition(".")
        state.setdefault(int(index), {})[key] = tensor
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, entry in state.items():
        for key, value in entry.items():
            if value.shape == parameters[index].shape:
                # in the parameter's own memory layout: fused kernels go through memory, not through indices
                entry[key] = torch.empty_like(parameters[index]).copy_(value)
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def save(
    folder: Path, modules: dict[str, Module], optimizers: list[Optimizer], state: dict[str, Any]
) -> None:
    """Writes everything a stage needs to go on where it stopped.

    Two alternating generations are kept, and ``state.json``, written last,
    names the complete one; so a kill at any moment leaves a usable checkpoint.
    """
    path = folder / _STATE
    previous = read_json(path)["generation"] if path.exists() else 1
    generation = 1 - previous
    for name, module in modules.items():
        _save(folder / f"{name}.{generation}.safetensors", dict(module.state_dict()))
    for index, optimizer in enumerate(optimizers):
        tensors = optimizer_tensors(optimizer)
        _save(folder / f"optimizer-{index}.{generation}.safetensors", tensors)
    write_json(path, {**state, "generation": generation})


def load(folder: Path, modules: dict[str, Module], optimizers: list[Optimizer]) -> dict[str, Any] | None:
    """Restores what ``save`` wrote; returns its state, or ``None`` if there is none."""
    path = folder / _STATE
    if not path.exists():
        return None
    state: dict[str, Any] = read_json(path)
    generation = state["generation"]
    for name, module in modules.items():
        tensors = safetensors.torch.load_file(folder / f"{name}.{generation}.safetensors")
        module.load_state_dict(tensors)
    for index, optimizer in enumerate(optimizers):
        stored = folder / f"optimizer-{index}.{generation}.safetensors"
        restore_optimizer(optimizer, safetensors.torch.load_file(stored))
    return state
