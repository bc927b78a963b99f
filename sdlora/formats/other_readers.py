"""An adapter as diffusers and PEFT themselves load it, to be compared with what was written.

Their own loading code runs: ``load_lora_weights`` of the pipeline's class, ``PeftModel.from_pretrained``.
They load into stand-ins: modules with the right names and shapes, whose weights take no memory.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..adapters.canonical import AdapterWeights, ModuleKey, Update
from ..adapters.kinds.dora import MAGNITUDE
from ..adapters.kinds.full import Difference
from ..adapters.kinds.table import kind_of
from ..errors import AdapterFileError
from ..families.facts import is_text_encoder
from ..families.table import component_names
from . import kinds, names

if TYPE_CHECKING:
    from ..families.facts import FamilyInfo

TEXT_CLASSES = {"text_encoder": "CLIPTextModel", "text_encoder_2": "CLIPTextModelWithProjection"}


def through_diffusers(path: Path, outline: AdapterWeights, info: FamilyInfo) -> AdapterWeights:
    """Return a WebUI or diffusers file as ``load_lora_weights`` of diffusers understands it.

    Raises:
        AdapterFileError: when diffusers refuses the file.
    """
    from diffusers import loaders

    standins = _standins(outline)
    parts: dict[str, Any] = {name: standins.get(name) for name in component_names() if is_text_encoder(name)}
    parts[info.denoiser.component] = standins.get(info.denoiser.component) or _denoiser({})
    pipeline = type(
        "Pipeline",
        (getattr(loaders, info.diffusers_loader),),
        {"hf_device_map": None, "components": standins, **parts},
    )
    with _loading(path, "diffusers"):
        pipeline().load_lora_weights(str(path), local_files_only=True)
    return AdapterWeights(
        {key: pair for name, model in standins.items() for key, pair in loaded_updates(name, model)}
    )


def through_peft(folder: Path, outline: AdapterWeights, info: FamilyInfo) -> AdapterWeights:
    """Return the PEFT folders of an adapter, one per component, as ``PeftModel.from_pretrained`` loads them.

    Raises:
        AdapterFileError: when PEFT refuses one.
    """
    from peft import PeftModel

    pairs: dict[ModuleKey, Update] = {}
    for component, standin in _standins(outline).items():
        inside = folder / component
        with _loading(inside, "PEFT"):
            model = PeftModel.from_pretrained(standin, str(inside if inside.is_dir() else folder))
        pairs |= loaded_updates(component, model.base_model.model)
    return AdapterWeights(pairs)


@contextmanager
def _loading(path: Path, program: str) -> Iterator[None]:
    """Silence the program (comparing finds what it leaves out), and name it in the error if it refuses."""
    from diffusers.utils import logging
    from transformers.utils import logging as transformers_logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    had_bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (ValueError, KeyError, RuntimeError, AttributeError, TypeError) as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise AdapterFileError(f"{path}: {program} refuses it ({first_line}); please report this") from error
    finally:
        logging.set_verbosity(verbosity)
        if had_bars:
            transformers_logging.enable_progress_bar()


def _standins(weights: AdapterWeights) -> dict[str, nn.Module]:
    layers = AdapterWeights({key: update for key, update in weights.updates.items() if not key.is_bias})
    return {
        name: _text_encoder(TEXT_CLASSES[name], layers.updates_of(name))
        if is_text_encoder(name)
        else _denoiser(layers.updates_of(name))
        for name in layers.components()
    }


def _denoiser(pairs: Mapping[str, Update]) -> nn.Module:
    """Return a tree of modules named like the adapter's, with the loader of diffusers' own models."""
    from diffusers.loaders import PeftAdapterMixin

    class Denoiser(nn.Module, PeftAdapterMixin):
        config = SimpleNamespace(layers_per_block=2)

    root = Denoiser()
    for path, pair in pairs.items():
        parent: nn.Module = root
        *above, last = path.split(".")
        for name in above:
            if name not in parent._modules:
                parent.add_module(name, nn.Module())
            parent = parent.get_submodule(name)
        parent.add_module(last, _layer(pair))
    return root


def _text_encoder(kind: str, pairs: Mapping[str, Update]) -> nn.Module:
    """Return a real text encoder, tiny except for the layers that are adapted."""
    import transformers

    numbers = [int(part) for path in pairs for part in path.split(".") if part.isdecimal()]
    encoder: nn.Module = getattr(transformers, kind)(
        transformers.CLIPTextConfig(
            vocab_size=8,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=max(numbers, default=0) + 1,
            num_attention_heads=1,
            projection_dim=8,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    )
    nested = hasattr(encoder, "text_model")
    for path, pair in pairs.items():
        parent, _, last = (path if nested else path.removeprefix(names.TEXT_PREFIX)).rpartition(".")
        setattr(encoder.get_submodule(parent), last, _layer(pair))
    return encoder


def _layer(update: Update) -> nn.Module:
    """Return a layer that such an update fits; its weight is one number expanded, so it takes no memory."""
    out, width, *kernel = update.shape
    if kernel:
        layer: nn.Module = nn.Conv2d(width, out, (kernel[0], kernel[1]), bias=False, device="meta")
    else:
        layer = nn.Linear(width, out, bias=False, device="meta")
    layer.weight = nn.Parameter(torch.zeros(()).expand(update.shape), requires_grad=False)
    return layer


def loaded_updates(component: str, model: nn.Module) -> Iterator[tuple[ModuleKey, Update]]:
    """Yield the module and update of each of PEFT's layers in a model."""
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lycoris_utils import LycorisLayer

    for path, layer in model.named_modules():
        if isinstance(layer, LycorisLayer):
            module = ModuleKey(component, names.canonical_path(component, path))
            yield module, _lycoris(module, layer)
        if isinstance(layer, LoraLayer):
            any_layer: Any = layer
            (name,) = any_layer.lora_A
            down, up = any_layer.lora_A[name].weight, any_layer.lora_B[name].weight
            alpha = float(any_layer.lora_alpha[name])
            if any_layer.scaling[name] != alpha / down.shape[0]:
                alpha = float(any_layer.scaling[name]) * down.shape[0]
            canonical = names.canonical_path(component, path)
            parts = {"down": down.detach(), "up": up.detach()}
            if name in any_layer.lora_magnitude_vector:
                parts[MAGNITUDE.name] = any_layer.lora_magnitude_vector[name].weight.detach()
            module = ModuleKey(component, canonical)
            yield module, kinds.update_of(canonical, module, parts, alpha)
            if (bias := any_layer.lora_B[name].bias) is not None:
                yield module.bias, Difference(bias.detach() * float(any_layer.scaling[name]))


def _lycoris(module: ModuleKey, layer: Any) -> Update:
    """Return the update that PEFT's layer of one of LyCORIS' kinds holds."""
    held = {name: getattr(layer, name) for name in layer.adapter_layer_names}
    (inner,) = {inner for factors in held.values() for inner in factors}
    parts = {name: factors[inner].detach() for name, factors in held.items() if inner in factors}
    update = kinds.update_of(module.path, module, parts, float(layer.alpha[inner]))
    folder = kind_of(update).peft
    return update if folder is None else folder.rescaled(update, float(layer.scaling[inner]))
