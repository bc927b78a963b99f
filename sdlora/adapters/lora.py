"""Adapters inside a model: put in, set strengths, read out, merge, take off again.

Plain low-rank pairs become layers of peft; other kinds hang beside the base's layers
(:mod:`sdlora.adapters.beside`). Each attached adapter has a name; a model can carry any number of them.
The adapter layers hold the number format of the frozen weights they sit beside; fp32 masters for training
live in the optimizer (:class:`sdlora.optim.MasterWeights`), which spares every cast in the forward pass.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from ..config import AdapterConfig
from ..errors import AdapterFileError, ConfigError
from ..families.base import DiffusionModel
from .base import AdapterWeights, LowRankPair, ModuleKey, Update
from .beside import all_beside, put_beside, take_away

_TEXT_ROOT = "text_model."


@dataclass(frozen=True)
class AttachedLayer:
    """One adapted layer of one adapter: where it is, peft's layer, and its two parameters."""

    key: ModuleKey
    layer: LoraLayer
    down: nn.Parameter
    up: nn.Parameter
    alpha: float


def target_modules(model: DiffusionModel, config: AdapterConfig) -> list[ModuleKey]:
    """Return the modules a new adapter gets a LoRA in, sorted.

    Raises:
        ConfigError: if the preset matches nothing in the base.
    """
    wanted = [component for component in model.components() if config.adapts(component)]
    found: list[ModuleKey] = []
    for component in wanted:
        endings = model.info.targets[component][config.targets]
        module = model.components()[component]
        matching = [
            ModuleKey(component, _canonical(component, path))
            for path, layer in module.named_modules()
            if isinstance(_without_adapters(layer), nn.Linear | nn.Conv2d) and f".{path}".endswith(endings)
        ]
        if not matching:
            raise ConfigError(
                f"`adapter.targets={config.targets}` matches no layer of the base's {component}; "
                "choose attention, linear or all"
            )
        found += matching
    return sorted(found)


def create_adapter(model: DiffusionModel, config: AdapterConfig, seed: int) -> AdapterWeights:
    """Return a fresh adapter for ``model``, float32: A Kaiming-uniform, B zero, so dW = 0.

    A as in Hu et al.'s code (uniform in +-1/sqrt(fan in)); each layer draws from its own generator, so
    the values depend only on the seed and the layer's name.

    Args:
        config: resolved settings: rank and alpha of every adapted component are set.
    """
    pairs: dict[ModuleKey, LowRankPair] = {}
    for key in target_modules(model, config):
        prefix = "" if key.component == "unet" else f"{key.component}_"
        rank: int | None = getattr(config, f"{prefix}rank") or config.rank
        alpha: float | None = getattr(config, f"{prefix}alpha") or config.alpha
        assert rank is not None and alpha is not None, "settings must be resolved first"
        weight = _module(model, key).weight
        generator = torch.Generator().manual_seed(_layer_seed(seed, key))
        down = torch.empty((rank, *weight.shape[1:]), dtype=torch.float32)
        nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=generator)
        up = torch.zeros((weight.shape[0], rank, *([1, 1] if weight.ndim == 4 else [])))
        pairs[key] = LowRankPair(down, up, float(alpha))
    return AdapterWeights(pairs)


def attach(
    model: DiffusionModel, weights: AdapterWeights, name: str, *, dropout: float = 0.0
) -> list[AttachedLayer]:
    """Put an adapter into a model under ``name`` at strength 1, and return its plain layers, sorted.

    Raises:
        AdapterFileError: if a module is missing in the model or has another shape.
    """
    _check_fit(model, weights, name)
    plain = weights.only_plain()
    for component in plain.components():
        module = model.components()[component]
        pairs = {_installed(module, path): pair for path, pair in plain.component(component).items()}
        with warnings.catch_warnings():  # a second adapter is meant, not a mishap
            warnings.filterwarnings("ignore", "Already found a `peft_config` attribute", UserWarning)
            inject_adapter_in_model(_peft_config(pairs, dropout), module, adapter_name=_inner(name))
        module.requires_grad_(False)
    for key, update in weights.all_items():
        if not isinstance(update, LowRankPair):
            put_beside(_without_adapters(_module(model, key)), _inner(name), update)
    layers = list(attached_layers(model, name))
    assert len(layers) == len(plain), f"peft adapted {len(layers)} of {len(plain)} layers"
    write_weights(layers, plain)
    set_strengths(model, {name: 1.0})
    return layers


def attached_layers(model: DiffusionModel, name: str) -> Iterator[AttachedLayer]:
    """Yield the plain layers of one adapter, sorted by module."""
    found: list[AttachedLayer] = []
    inner = _inner(name)
    for component, module in model.components().items():
        for path, layer in module.named_modules():
            if isinstance(layer, LoraLayer) and inner in layer.lora_A:
                found.append(
                    AttachedLayer(
                        ModuleKey(component, _canonical(component, path)),
                        layer,
                        layer.lora_A[inner].weight,
                        layer.lora_B[inner].weight,
                        float(layer.lora_alpha[inner]),
                    )
                )
    yield from sorted(found, key=lambda one: one.key)


def updates_in(model: DiffusionModel, name: str) -> list[tuple[ModuleKey, Update]]:
    """Return (module, update) of one adapter of any kind, sorted, on the model's device."""
    found: list[tuple[ModuleKey, Update]] = [
        (one.key, LowRankPair(one.down, one.up, one.alpha)) for one in attached_layers(model, name)
    ]
    inner = _inner(name)
    for component, module in model.components().items():
        for path, layer, updates in all_beside(module):
            if inner in updates.updates:
                key = ModuleKey(component, _canonical(component, path.removesuffix(".base_layer")))
                found.append((key, updates.on(inner, _base_weight(layer).device)))
    return sorted(found, key=lambda one: one[0])


def write_weights(layers: Sequence[AttachedLayer], weights: AdapterWeights) -> None:
    """Copy an adapter's numbers into its layers, in the layers' number format."""
    with torch.no_grad():
        for one in layers:
            pair = weights.pairs[one.key]
            one.down.copy_(pair.down)
            one.up.copy_(pair.up)


def read_weights(layers: Sequence[AttachedLayer], tensors: Sequence[Tensor] | None = None) -> AdapterWeights:
    """Return an adapter's numbers as copies on the CPU.

    Args:
        tensors: take these instead of the layers' own: down and up of each layer in turn (fp32 masters).
    """
    if tensors is None:
        tensors = [tensor for one in layers for tensor in (one.down, one.up)]
    pairs = {
        one.key: LowRankPair(
            tensors[2 * i].detach().cpu().clone(), tensors[2 * i + 1].detach().cpu().clone(), one.alpha
        )
        for i, one in enumerate(layers)
    }
    return AdapterWeights(pairs)


Strength = float | Mapping[str, float]
"""One strength for all components, or one a component (missing ones count as 0)."""


def strength_of(strength: Strength, component: str) -> float:
    """Return the strength that applies to a component."""
    return strength if isinstance(strength, int | float) else float(strength.get(component, 0.0))


def set_strengths(model: DiffusionModel, strengths: Mapping[str, Strength]) -> None:
    """Make exactly these adapters act, each at its strength; all others, and strength 0, leave no trace.

    Strength 0 takes the adapter out of the computation, so the result is the base's bit for bit.
    """
    for component, module in model.components().items():
        values = {_inner(name): strength_of(strength, component) for name, strength in strengths.items()}
        active = [name for name, value in values.items() if value != 0.0]
        for layer in module.modules():
            if isinstance(layer, LoraLayer):
                for name in active:
                    layer.set_scale(name, values[name])
                layer.set_adapter([name for name in active if name in layer.lora_A], inference_mode=True)
        for _, _, updates in all_beside(module):
            updates.set_strengths(values)


def detach(model: DiffusionModel, name: str) -> None:
    """Take an adapter off again; with the last one gone the model's own layers stand there again."""
    inner = _inner(name)
    for module in model.components().values():
        for path, layer in list(module.named_modules()):
            if isinstance(layer, LoraLayer) and inner in layer.lora_A:
                layer.delete_adapter(inner)
                if not layer.lora_A:
                    parent, _, child = path.rpartition(".")
                    setattr(module.get_submodule(parent), child, layer.get_base_layer())
        for _, layer, _ in list(all_beside(module)):
            take_away(layer, inner)
        known: dict[str, LoraConfig] = getattr(module, "peft_config", {})
        known.pop(inner, None)
        if not known and hasattr(module, "peft_config"):
            delattr(module, "peft_config")


class Merged:
    """Adapters folded into the base's weights; :meth:`undo` restores every weight bit for bit."""

    def __init__(self, model: DiffusionModel, strengths: Mapping[str, Strength]) -> None:
        self._model = model
        self._originals: dict[ModuleKey, Tensor] = {}
        acting: dict[ModuleKey, list[tuple[float, Update]]] = {}
        for name, strength in strengths.items():
            for key, update in updates_in(model, name):
                value = strength_of(strength, key.component)
                if value != 0.0:
                    acting.setdefault(key, []).append((value, update))
        with torch.no_grad():
            for key, updates in acting.items():
                weight = _base_weight(_module(model, key))
                self._originals[key] = original = weight.detach().clone()
                merged = original.float()
                for value, update in updates:
                    merged = merged + value * update.delta(original.float())
                weight.copy_(merged)  # rounded to the weight's format once
        set_strengths(model, {})

    def undo(self) -> None:
        """Put the base's own weights back; call :func:`set_strengths` to let adapters act again."""
        with torch.no_grad():
            for key, original in self._originals.items():
                _base_weight(_module(self._model, key)).copy_(original)
        self._originals = {}


def _without_adapters(layer: nn.Module) -> nn.Module:
    return layer.get_base_layer() if isinstance(layer, LoraLayer) else layer


def _base_weight(layer: Any) -> Tensor:
    weight = _without_adapters(layer).weight
    assert isinstance(weight, Tensor)
    return weight


def _peft_config(pairs: Mapping[str, LowRankPair], dropout: float) -> LoraConfig:
    """Return peft's settings: the most frequent rank and alpha, and patterns for the modules that differ."""
    (rank, alpha), _ = Counter((pair.rank, pair.alpha) for pair in pairs.values()).most_common(1)[0]
    odd = {
        f"^{path.replace('.', r'[.]')}": p for path, p in pairs.items() if (p.rank, p.alpha) != (rank, alpha)
    }
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=sorted(pairs),
        rank_pattern={path: pair.rank for path, pair in odd.items()},
        alpha_pattern={path: pair.alpha for path, pair in odd.items()},
        init_lora_weights=False,
    )


def _check_fit(model: DiffusionModel, weights: AdapterWeights, name: str) -> None:
    components = model.components()
    for key, update in weights.all_items():
        if key.component not in components:
            raise AdapterFileError(
                f"{name}: made for a base with a {key.component}, which {model.base.title} "
                f"({model.info.title}) has not; use the base it was trained on"
            )
        try:
            weight = _base_weight(_module(model, key))
        except AttributeError:
            raise AdapterFileError(
                f"{name}: its module {key.path} is not in the {key.component} of {model.base.title}; "
                "use a base of the family it was trained on"
            ) from None
        wanted, found = tuple(weight.shape), update.shape
        if wanted != found and not _is_flat(update, wanted):
            raise AdapterFileError(
                f"{name}: {key.path} is {found} in the adapter but {wanted} in {model.base.title}; "
                "use the base it was trained on"
            )


def _is_flat(update: Update, wanted: tuple[int, ...]) -> bool:
    """Tell whether an update is that of a 1x1 convolution, which LyCORIS files hold like a linear one."""
    flat = wanted[2:] == (1, 1) and update.shape == wanted[:2]
    return flat and not isinstance(update, LowRankPair)


def _module(model: DiffusionModel, key: ModuleKey) -> Any:
    root = model.components()[key.component]
    return root.get_submodule(_installed(root, key.path))


def _canonical(component: str, path: str) -> str:
    if component == "unet" or path.startswith(_TEXT_ROOT):
        return path
    return _TEXT_ROOT + path


def _installed(root: nn.Module, path: str) -> str:
    if path.startswith(_TEXT_ROOT) and not hasattr(root, "text_model"):
        return path.removeprefix(_TEXT_ROOT)
    return path


def _inner(name: str) -> str:
    """Return the name peft knows an adapter by: no dots, and none of torch's own attribute names."""
    return "adapter_" + name.replace("_", "__").replace(".", "_d")


def _layer_seed(seed: int, key: ModuleKey) -> int:
    text = f"{seed}/{key.component}/{key.path}".encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:7], "big")
