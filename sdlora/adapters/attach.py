"""Adapters inside a model: attach them, set their strengths, read them out, merge them, detach them.

Plain low-rank pairs become layers of peft; other kinds are hooks on the base's layers
(:mod:`sdlora.adapters.hooks`). Each attached adapter has a name; a model can have any number of them.
An adapter's layers have the number format of the frozen weights beside them, so no cast is needed in the
forward pass; training keeps fp32 masters of them (:class:`sdlora.training.masters.MasterWeights`).
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..config.schema import AdapterConfig
from ..errors import ConfigError
from ..families.base import DiffusionModel
from .blocks import check_patterns, value_for
from .canonical import AdapterWeights, LowRankPair, ModuleKey, Update
from .hooks import all_hooks, hook_update, unhook_update
from .initial import file_alpha
from .kinds.lora import peft_config
from .kinds.table import KINDS
from .module_paths import (
    base_parameter,
    base_weight,
    canonical_path,
    fitted,
    holds,
    inner_name,
    installed_path,
    module_at,
    without_adapters,
)
from .peft_library import BaseTunerLayer, LoraConfig, LoraLayer, inject_adapter_in_model
from .strength import Strength, strength_of


@dataclass(frozen=True)
class AttachedLayer:
    """One plain layer of one adapter: where it is, and its two parameters."""

    key: ModuleKey
    down: nn.Parameter
    up: nn.Parameter
    alpha: float


def target_modules(model: DiffusionModel, config: AdapterConfig) -> list[ModuleKey]:
    """Return the modules a new adapter gets a LoRA in, sorted.

    Raises:
        ConfigError: if the preset matches nothing in the base.
    """
    infos = model.info.components
    wanted = [component for component, info in infos.items() if config.adapts(info.part)]
    modules: list[ModuleKey] = []
    for component in wanted:
        endings = infos[component].targets[config.targets]
        module = model.components()[component]
        matching = [
            ModuleKey(component, canonical_path(component, path))
            for path, layer in module.named_modules()
            if isinstance(without_adapters(layer), nn.Linear | nn.Conv2d) and f".{path}".endswith(endings)
        ]
        if not matching:
            raise ConfigError(
                f"`adapter.targets={config.targets}` matches no layer of the base's {component}; "
                "choose attention, linear or all"
            )
        modules += matching
    return sorted(modules)


def create_adapter(model: DiffusionModel, config: AdapterConfig, seed: int) -> AdapterWeights:
    """Return a new adapter for ``model``, float32, with the starting values of its kind.

    Each layer draws from its own generator, so the values depend only on the seed and the layer's name.

    Args:
        config: final settings, in which rank and alpha of every adapted component are set.

    Raises:
        ConfigError: if targets or block ranks match no layer, or leave none to adapt.
    """
    start = KINDS[config.kind].start
    assert start is not None, "settings name only kinds that can be started"
    updates: dict[ModuleKey, Update] = {}
    keys = target_modules(model, config)
    check_patterns("adapter.block_ranks", config.block_ranks, keys)
    for key in keys:
        rank, alpha = config.rank_and_alpha(model.info.components[key.component].part)
        module_rank = value_for(config.block_ranks, key, rank)
        if module_rank > 0:
            generator = torch.Generator().manual_seed(_layer_seed(seed, key))
            weight = base_weight(module_at(model, key))
            updates[key] = start(
                config, weight, module_rank, file_alpha(config, rank, alpha, module_rank), generator
            )
    if not updates:
        raise ConfigError("`adapter.block_ranks` leaves no layer to adapt; give some block a rank above 0")
    return AdapterWeights(updates)


def attach(
    model: DiffusionModel, weights: AdapterWeights, name: str, *, dropout: float = 0.0
) -> list[AttachedLayer]:
    """Put an adapter into a model under ``name`` at strength 1, and return its plain layers, sorted.

    Raises:
        AdapterFileError: if a module is missing in the model or has another shape.
    """
    weights = fitted(model, weights, name)
    plain = AdapterWeights({k: u for k, u in weights.only_plain().updates.items() if _has_layers(model, k)})
    for component in plain.components():
        module = model.components()[component]
        pairs = {installed_path(module, path): pair for path, pair in plain.component(component).items()}
        with warnings.catch_warnings():  # peft warns of a second adapter as of a mistake; here it is intended
            warnings.filterwarnings("ignore", "Already found a `peft_config` attribute", UserWarning)
            inject_adapter_in_model(peft_config(name, pairs, dropout), module, adapter_name=inner_name(name))
        module.requires_grad_(False)  # peft makes what it adds trainable; the masters say what learns
    for key, update in weights.all_items():
        if key not in plain.updates:
            layer = without_adapters(module_at(model, key))
            hook_update(layer, inner_name(name), update, bias=key.is_bias)
    layers = list(attached_layers(model, name))
    assert len(layers) == len(plain), f"peft adapted {len(layers)} of {len(plain)} layers"
    write_weights(layers, plain)
    set_strengths(model, {name: 1.0})
    return layers


def _has_layers(model: DiffusionModel, key: ModuleKey) -> bool:
    """Tell whether peft has a layer for plain pairs of this kind of module; embeddings get hooks."""
    return isinstance(without_adapters(module_at(model, key)), nn.Linear | nn.Conv2d)


def attached_layers(model: DiffusionModel, name: str) -> Iterator[AttachedLayer]:
    """Yield the plain layers of one adapter, sorted by module."""
    layers: list[AttachedLayer] = []
    inner = inner_name(name)
    for component, module in model.components().items():
        for path, layer in module.named_modules():
            if isinstance(layer, LoraLayer) and inner in layer.lora_A:
                layers.append(
                    AttachedLayer(
                        ModuleKey(component, canonical_path(component, path)),
                        layer.lora_A[inner].weight,
                        layer.lora_B[inner].weight,
                        float(layer.lora_alpha[inner]),
                    )
                )
    yield from sorted(layers, key=lambda attached: attached.key)


def updates_in(model: DiffusionModel, name: str) -> list[tuple[ModuleKey, Update]]:
    """Return (module, update) of one adapter of any kind, sorted, on the model's device."""
    pairs_found: list[tuple[ModuleKey, Update]] = [
        (attached.key, LowRankPair(attached.down, attached.up, attached.alpha))
        for attached in attached_layers(model, name)
    ]
    inner = inner_name(name)
    for component, module in model.components().items():
        for path, layer, updates in all_hooks(module):
            if inner in updates.updates:
                # a layer that peft has wrapped, too, is inside the wrapper, under this name
                key = ModuleKey(component, canonical_path(component, path.removesuffix(".base_layer")))
                pairs_found.append((key, updates.on(inner, base_weight(layer).device)))
            if inner in updates.biases:
                path = path.removesuffix(".base_layer")
                pairs_found.append(
                    (ModuleKey(component, canonical_path(component, path)).bias, updates.biases[inner])
                )
    return sorted(pairs_found, key=lambda pair: pair[0])


def write_weights(layers: Sequence[AttachedLayer], weights: AdapterWeights) -> None:
    """Copy an adapter's values into its layers, in the layers' number format."""
    with torch.no_grad():
        for layer in layers:
            pair = weights.pairs[layer.key]
            layer.down.copy_(pair.down)
            layer.up.copy_(pair.up)


def set_strengths(model: DiffusionModel, strengths: Mapping[str, Strength]) -> None:
    """Let exactly these adapters act, each at its strength; the others have no effect at all.

    Strength 0 takes the adapter out of the computation, so the result is the base's bit for bit.
    """
    for component, module in model.components().items():
        values = {inner_name(name): strength_of(strength, component) for name, strength in strengths.items()}
        active = [name for name, value in values.items() if value != 0.0]
        for layer in module.modules():
            if isinstance(layer, BaseTunerLayer):
                held = [name for name in active if holds(layer, name)]
                for name in held:
                    layer.set_scale(name, values[name])
                # without inference_mode, peft's set_adapter gives requires_grad to every adapter that it
                # activates, also to one that must stay frozen (the start that PiSSA subtracts)
                layer.set_adapter(held, inference_mode=True)
        for _, _, updates in all_hooks(module):
            updates.set_strengths(values)


@contextmanager
def adapters_disabled(model: DiffusionModel) -> Iterator[None]:
    """Take the trainable adapters out of the computation, for the length of one prediction.

    The output is then the base's, bit for bit. Nothing else changes: strengths and ``requires_grad`` stay as
    they are, unlike with :func:`set_strengths`.
    """
    layers = [
        layer
        for module in model.components().values()
        for layer in module.modules()
        if isinstance(layer, BaseTunerLayer)
    ]
    # peft's public switch, enable_adapters(False), also takes requires_grad from every adapter, and switching
    # back gives it to all active ones, frozen or not; this attribute is all that its forward pass looks at
    before = [layer._disable_adapters for layer in layers]
    try:
        for layer in layers:
            layer._disable_adapters = True
        yield
    finally:
        for layer, value in zip(layers, before, strict=True):
            layer._disable_adapters = value


def detach(model: DiffusionModel, name: str) -> None:
    """Remove an adapter; when the last one is gone, the model has its own layers back."""
    inner = inner_name(name)
    for module in model.components().values():
        for path, layer in list(module.named_modules()):
            if isinstance(layer, BaseTunerLayer) and holds(layer, inner):
                layer.delete_adapter(inner)
                if not any(getattr(layer, name) for name in layer.adapter_layer_names):
                    parent, _, child = path.rpartition(".")
                    setattr(module.get_submodule(parent), child, layer.get_base_layer())
        for _, layer, _ in list(all_hooks(module)):
            unhook_update(layer, inner)
        known: dict[str, LoraConfig] = getattr(module, "peft_config", {})
        known.pop(inner, None)
        if not known and hasattr(module, "peft_config"):
            delattr(module, "peft_config")  # else peft would treat the next adapter as a second one


class Merged:
    """Adapters folded into the base's weights; :meth:`undo` restores every weight bit for bit.

    The base's own weights are kept in main memory, so that a card need not hold the model twice.
    """

    def __init__(self, model: DiffusionModel, strengths: Mapping[str, Strength]) -> None:
        self._model = model
        self._originals: dict[ModuleKey, Tensor] = {}
        acting: dict[ModuleKey, list[tuple[float, Update]]] = {}
        for name, strength in strengths.items():
            for key, update in updates_in(model, name):
                value = strength_of(strength, key.component)
                if value != 0.0:
                    acting.setdefault(key, []).append((value, update))
        weights = {key: base_parameter(model, key) for key in acting}  # refused before any is changed
        try:
            self._fold(acting, weights)
        except BaseException:  # memory that ran out on the way
            self.undo()
            raise
        set_strengths(model, {})

    @torch.no_grad()
    def _fold(
        self, acting: Mapping[ModuleKey, list[tuple[float, Update]]], weights: Mapping[ModuleKey, Tensor]
    ) -> None:
        for key, updates in acting.items():
            weight = weights[key]
            self._originals[key] = weight.detach().to("cpu", copy=True)
            merged = original = weight.detach().float()  # W + sum of strength * dW, in the shape of W
            for value, update in updates:
                merged = merged + value * update.delta(original)
            weight.copy_(merged)  # rounded to the weight's format once

    def undo(self) -> None:
        """Put the base's own weights back; :func:`set_strengths` lets adapters act again."""
        with torch.no_grad():
            for key, original in self._originals.items():
                base_parameter(self._model, key).copy_(original)
        self._originals = {}


def _layer_seed(seed: int, key: ModuleKey) -> int:
    text = f"{seed}/{key.component}/{key.path}".encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:7], "big")
