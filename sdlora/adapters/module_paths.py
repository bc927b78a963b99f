"""Where the modules of an adapter are in a model: canonical and installed module paths, and the layers."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..errors import AdapterFileError
from ..families.base import DiffusionModel
from ..families.facts import is_text_encoder
from ..families.quantised import refuse_to_change
from .canonical import AdapterWeights, ModuleKey, Update
from .peft_library import BaseTunerLayer

_TEXT_ROOT = "text_model."


def module_at(model: DiffusionModel, key: ModuleKey) -> Any:
    """Return the layer that a key names, or PEFT's layer around it."""
    root = model.components()[key.component]
    return root.get_submodule(installed_path(root, key.layer))


def without_adapters(layer: nn.Module) -> nn.Module:
    """Return the base's own layer inside PEFT's, or the layer itself."""
    return layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer


def base_weight(layer: Any) -> Tensor:
    """Return the weight of the base's own layer."""
    weight = without_adapters(layer).weight
    assert isinstance(weight, Tensor)
    return weight


def base_parameter(model: DiffusionModel, key: ModuleKey) -> Tensor:
    """Return the weight or bias of the base's own layer that a key means, to be changed.

    Raises:
        AttributeError: if the model has no such layer, or the layer no such parameter.
        ConfigError: for a weight that is kept quantised.
    """
    if key.parameter == "weight":
        refuse_to_change(without_adapters(module_at(model, key)), key.path)
    return _parameter(model, key)


def _parameter(model: DiffusionModel, key: ModuleKey) -> Tensor:
    layer = without_adapters(module_at(model, key))
    # of an offloaded layer the one in main memory, as what is written to its copy on the device is lost
    parameter = layer._parameters.get(key.parameter)
    parameter = getattr(layer, key.parameter) if parameter is None else parameter
    if not isinstance(parameter, Tensor):
        raise AttributeError(f"no {key.parameter} at {key.path}")
    return parameter


def canonical_path(component: str, path: str) -> str:
    """Return an installed path as adapters have it: in text encoders it starts with ``text_model.``."""
    if not is_text_encoder(component) or path.startswith(_TEXT_ROOT):
        return path
    return _TEXT_ROOT + path


def installed_path(root: nn.Module, path: str) -> str:
    """Return a canonical path as the installed transformers has it (5.6 dropped ``text_model``)."""
    if path.startswith(_TEXT_ROOT) and not hasattr(root, "text_model"):
        return path.removeprefix(_TEXT_ROOT)
    return path


def inner_name(name: str) -> str:
    """Return the name PEFT knows an adapter by: no dots, and none of torch's own attribute names."""
    # peft keeps adapters in ModuleDicts. These refuse dots, which separate names in a state_dict, and names
    # of their own attributes (`keys`, `train`). Doubled underscores keep `a.b` and `a_db` apart.
    return "adapter_" + name.replace("_", "__").replace(".", "_d")


def holds(layer: BaseTunerLayer, inner: str) -> bool:
    """Tell whether one of PEFT's layers has an adapter of that inner name."""
    return any(inner in getattr(layer, name) for name in layer.adapter_layer_names)


def fitted(model: DiffusionModel, weights: AdapterWeights, name: str) -> AdapterWeights:
    """Return an adapter with its updates in the shapes of a model's layers.

    A file may hold the factors of a 1x1 convolution like those of a linear layer, and reverse.

    Raises:
        AdapterFileError: naming the first module that the model does not have, or has in another shape.
    """
    components = model.components()
    updates: dict[ModuleKey, Update] = {}
    for key, update in weights.all_items():
        if key.component not in components:
            raise AdapterFileError(
                f"{name}: made for a base with a {key.component}, which {model.base.title} "
                f"({model.info.title}) does not have; use the base it was trained on"
            )
        try:
            weight = _parameter(model, key)
        except AttributeError:
            raise AdapterFileError(
                f"{name}: its {'bias' if key.is_bias else 'module'} {key.path} is not in the {key.component} "
                f"of {model.base.title}; use a base of the family it was trained on"
            ) from None
        try:
            updates[key] = update.in_shape(tuple(weight.shape))
        except ValueError:
            raise AdapterFileError(
                f"{name}: {key.path} is {update.shape} in the adapter but {tuple(weight.shape)} in "
                f"{model.base.title}; use the base it was trained on"
            ) from None
    return AdapterWeights(updates)
