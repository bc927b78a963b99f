"""Adapters of every kind as layers that learn, all of them PEFT's.

Only one adapter learns at a time, so every kind can have PEFT's own tuner here; for using adapters see
:mod:`sdlora.adapters.attach`. PEFT makes the layers, and the factors of the canonical update take the place
of those it made up: so shapes, ranks and scales are the adapter's own, layer by layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig, inject_adapter_in_model
from peft.tuners.lora.dora import DoraConv2dLayer, DoraLinearLayer
from torch import Tensor, nn

from ..errors import AdapterFileError
from ..families.base import DiffusionModel
from .attach import attach, peft_config
from .canonical import AdapterWeights, LowRankPair, ModuleKey, Update
from .kinds import TITLES, DoRA, LoHa, LoKr, with_tensors
from .module_paths import check_fit, inner_name, installed_path, module_at


@dataclass(frozen=True)
class TrainedLayer:
    """One learning layer.

    Attributes:
        key: where it is.
        update: what it started as.
        parameters: what learns, by the factor's name in :meth:`Update.tensors`.
    """

    key: ModuleKey
    update: Update
    parameters: Mapping[str, nn.Parameter]

    def rebuilt(self, tensors: Mapping[str, Tensor]) -> Update:
        """Return the update that these factors make, each in the shape of its parameter."""
        shapes = {name: factor.shape for name, factor in self.update.tensors().items()}
        return with_tensors(self.update, {n: t.reshape(shapes[n]) for n, t in tensors.items()})


def attach_for_training(
    model: DiffusionModel, weights: AdapterWeights, name: str, *, dropout: float = 0.0
) -> list[TrainedLayer]:
    """Put an adapter of one kind into a model so that it can learn, and return its layers, sorted.

    Factors are in the number format of the layer's weight, but for the magnitudes of DoRA: those are fp32,
    as half a rounding step of bf16 would already be a change of the whole weight.

    Raises:
        AdapterFileError: if a module is missing in the model, has another shape, or is of a kind that
            cannot be trained.
    """
    kinds = list(weights.kinds())
    if len(kinds) > 1:
        titles = " and ".join(TITLES[kind] for kind in kinds)
        raise AdapterFileError(
            f"{name}: mixes {titles} layers, which cannot be trained together; convert it to a plain LoRA"
        )
    if weights.is_plain:
        return [
            TrainedLayer(
                layer.key,
                weights.pairs[layer.key],
                {"lora_down.weight": layer.down, "lora_up.weight": layer.up},
            )
            for layer in attach(model, weights, name, dropout=dropout)
        ]
    check_fit(model, weights, name)
    for component in weights.components():
        module = model.components()[component]
        updates = {
            installed_path(module, path): weights_update
            for path, weights_update in weights.updates_of(component).items()
        }
        config = _config(name, kinds[0], updates, dropout)
        inject_adapter_in_model(config, module, adapter_name=inner_name(name))
        module.requires_grad_(False)
    return [
        TrainedLayer(key, update, _take_over(module_at(model, key), inner_name(name), update))
        for key, update in weights.all_items()
    ]


def _config(name: str, kind: str, updates: Mapping[str, Update], dropout: float) -> Any:
    """Return PEFT's settings; ranks of LoHa and LoKr are 1, since their factors are replaced anyway."""
    targets = sorted(updates)
    if kind == LoHa.kind:
        return LoHaConfig(r=1, alpha=1, target_modules=targets, init_weights=False)
    if kind == LoKr.kind:
        return LoKrConfig(r=1, alpha=1, target_modules=targets, init_weights=False)
    directions = {path: update.direction for path, update in updates.items() if isinstance(update, DoRA)}
    pairs = {path: direction for path, direction in directions.items() if isinstance(direction, LowRankPair)}
    by_row = all(isinstance(update, DoRA) and update.by_output for update in updates.values())
    if len(pairs) != len(updates) or not by_row:
        raise AdapterFileError(
            f"{name}: this {TITLES[kind]} cannot be trained on: PEFT knows only that of low-rank factors "
            "with one magnitude an output row; convert it to a plain LoRA"
        )
    config: LoraConfig = peft_config(pairs, dropout)
    config.use_dora = True
    return config


def _take_over(layer: Any, inner: str, update: Update) -> dict[str, nn.Parameter]:
    """Give PEFT's layer the factors and the scale of an update, and return its parameters."""
    weight: Tensor = layer.get_base_layer().weight
    if isinstance(update, DoRA):
        return _take_over_dora(layer, inner, update)
    for name in layer.adapter_layer_names:
        if inner in getattr(layer, name):
            del getattr(layer, name)[inner]
    parameters: dict[str, nn.Parameter] = {}
    for name, factor in update.tensors().items():
        parameters[name] = nn.Parameter(factor.to(weight.device, weight.dtype), requires_grad=False)
        getattr(layer, name)[inner] = parameters[name]
    layer.scaling[inner] = layer.alpha[inner] = update.scale
    layer.r[inner] = 1
    # PEFT skips a layer when a random number is not above this; 0 itself would skip one now and then
    layer.module_dropout[inner] = -1.0
    return parameters


def _take_over_dora(layer: Any, inner: str, update: DoRA) -> dict[str, nn.Parameter]:
    pair = update.direction
    assert isinstance(pair, LowRankPair)
    down, up = layer.lora_A[inner].weight, layer.lora_B[inner].weight
    with torch.no_grad():
        down.copy_(pair.down)
        up.copy_(pair.up)
    magnitude_layer = layer.lora_magnitude_vector[inner]
    exact_layer = ExactDoraConv2d() if isinstance(magnitude_layer, DoraConv2dLayer) else ExactDoraLinear()
    magnitude = update.magnitude.to(down.device, torch.float32).reshape(magnitude_layer.weight.shape)
    exact_layer.weight = nn.Parameter(magnitude.contiguous(), requires_grad=False)
    layer.lora_magnitude_vector[inner] = exact_layer
    return {"lora_down.weight": down, "lora_up.weight": up, "dora_scale": exact_layer.weight}


class ExactDoraLinear(DoraLinearLayer):
    """PEFT's DoRA of a linear layer with norms in fp32: in bf16 they would be off by up to 0.4 percent."""

    def __init__(self) -> None:
        super().__init__(fan_in_fan_out=False)

    def get_weight_norm(
        self, weight: Tensor, lora_weight: Tensor, scaling: float, adapter_name: str | None = None
    ) -> Tensor:
        """Return the norm of every output row of W + scaling * BA."""
        return super().get_weight_norm(
            weight.float(), lora_weight.float(), scaling, adapter_name=adapter_name
        )


class ExactDoraConv2d(DoraConv2dLayer):
    """PEFT's DoRA of a convolution with norms in fp32."""

    def __init__(self) -> None:
        super().__init__(fan_in_fan_out=False)

    def get_weight_norm(
        self, weight: Tensor, lora_weight: Tensor, scaling: float, adapter_name: str | None = None
    ) -> Tensor:
        """Return the norm of every output channel of W + scaling * BA."""
        return super().get_weight_norm(
            weight.float(), lora_weight.float(), scaling, adapter_name=adapter_name
        )
