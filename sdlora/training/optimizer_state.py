"""The whole state of any torch optimizer as named tensors and JSON values, and back.

Nothing is assumed about what an optimizer keeps. Whatever its ``state_dict`` holds is written, including the
numbers of its groups (Prodigy keeps its estimate of the rate there). Its own ``load_state_dict`` takes it
back, which knows on which device and in which number format each tensor has to be.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import TrainingError

_HOW = ("fused", "foreach", "capturable")
"""Options of torch's optimizers that say by which kernels they step here, not what they compute."""


def pack(optimizer: torch.optim.Optimizer, names: Sequence[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return an optimizer's tensors by name, and everything else as JSON that says where each belongs.

    Args:
        names: names of its parameters, in the order of its groups; the tensors' names begin with them.

    Raises:
        TrainingError: if it keeps something other than tensors, numbers, texts, and lists or dicts of them.
    """
    tensors: dict[str, Tensor] = {}
    state = optimizer.state_dict()
    extra = sorted(state.keys() - {"state", "param_groups"})
    values = {
        "parameters": {
            names[index]: {
                key: _packed(value, f"{names[index]}.{key}", tensors) for key, value in part.items()
            }
            for index, part in state["state"].items()
        },
        "groups": [
            {
                key: _packed(value, f"group {number}.{key}", tensors)
                for key, value in group.items()
                if key != "params"
            }
            for number, group in enumerate(state["param_groups"])
        ],
        "more": {key: _packed(state[key], f"more.{key}", tensors) for key in extra},
    }
    return tensors, values


def unpack(
    optimizer: torch.optim.Optimizer,
    names: Sequence[str],
    tensors: Mapping[str, Tensor],
    values: Mapping[str, Any],
) -> None:
    """Give an optimizer the state that :func:`pack` returned for one made with the same settings.

    Raises:
        TrainingError: if that one had other parameters or groups.
    """
    fresh = optimizer.state_dict()["param_groups"]
    unknown = sorted(values["parameters"].keys() - set(names))
    if unknown or len(values["groups"]) != len(fresh):
        raise TrainingError(
            "the checkpoint holds the optimizer's state for other parameters"
            f"{': ' if unknown else ''}{', '.join(unknown)}; this version of sdlora cannot resume it, but a "
            "new run can start from its adapter.safetensors with adapter.from_file"
        )
    optimizer.load_state_dict(
        {
            **{key: _unpacked(value, tensors) for key, value in values["more"].items()},
            "state": {
                index: {key: _unpacked(value, tensors) for key, value in values["parameters"][name].items()}
                for index, name in enumerate(names)
                if name in values["parameters"]
            },
            "param_groups": [
                {
                    **{key: _unpacked(value, tensors) for key, value in group.items()},
                    **{key: fresh_group[key] for key in ("params", *_HOW) if key in fresh_group},
                }
                for group, fresh_group in zip(values["groups"], fresh, strict=True)
            ],
        }
    )


def of_plain_tensors(
    optimizer: torch.optim.Optimizer, names: Sequence[str], tensors: Mapping[str, Tensor]
) -> dict[str, Any]:
    """Return the JSON that :func:`unpack` takes for tensors named ``NAME.KEY``, all that sdlora 0.1 wrote."""
    groups = optimizer.state_dict()["param_groups"]
    parameters: dict[str, dict[str, Any]] = {}
    for full_name in tensors:
        name, _, key = full_name.rpartition(".")
        if name in names:
            parameters.setdefault(name, {})[key] = {"tensor": full_name}
    plain = [{key: _packed(value, key, {}) for key, value in g.items() if key != "params"} for g in groups]
    return {"parameters": parameters, "groups": plain, "more": {}}


def _packed(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Return a value as JSON; its tensors go to ``tensors``."""
    if isinstance(value, Tensor):
        tensors[name] = value.detach().cpu()
        return {"tensor": name}
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"float": repr(float(value))}
    if isinstance(value, list | tuple):
        items = [_packed(item, f"{name}.{number}", tensors) for number, item in enumerate(value)]
        return items if isinstance(value, list) else {"tuple": items}
    if isinstance(value, dict):
        pairs = [[key, _packed(item, f"{name}.{key}", tensors)] for key, item in value.items()]
        return {"dict": pairs}
    raise TrainingError(
        f"the optimizer keeps a {type(value).__name__} as {name}, which a checkpoint cannot hold; use "
        "another optimizer.name"
    )


def _unpacked(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpacked(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "float":
        return float(content)
    if kind == "tuple":
        return tuple(_unpacked(item, tensors) for item in content)
    return {key: _unpacked(item, tensors) for key, item in content}
