"""Adapters of every kind as layers that learn, all of them PEFT's.

Only one adapter learns at a time, so every kind can have PEFT's own tuner here; for using adapters see
:mod:`sdlora.adapters.attach`. PEFT makes the layers; then the factors of the canonical update replace those
that it initialised, so that shapes, ranks and scales are the adapter's own, layer by layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..errors import AdapterFileError
from ..families.base import DiffusionModel
from .attach import set_strengths
from .canonical import AdapterWeights, ModuleKey, Update
from .kinds.kind import TrainedForm
from .kinds.table import KINDS, titles
from .module_paths import fitted, inner_name, installed_path, module_at
from .peft_library import inject_adapter_in_model


@dataclass(frozen=True)
class TrainedLayer:
    """One trainable layer.

    Attributes:
        key: its component and path.
        update: the update that it started as.
        parameters: what learns, by the factor's name in :meth:`Update.tensors`.
    """

    key: ModuleKey
    update: Update
    parameters: Mapping[str, nn.Parameter]

    @property
    def form(self) -> TrainedForm[Any]:
        """What its kind says about such layers."""
        form = KINDS[self.update.kind].trained
        assert form is not None
        return form

    def rebuilt(self, tensors: Mapping[str, Tensor]) -> Update:
        """Return the update made of these factors, which have the shapes of the parameters."""
        shapes = {name: factor.shape for name, factor in self.update.tensors().items()}
        return self.update.with_tensors({n: t.reshape(shapes[n]) for n, t in tensors.items()})


def attach_for_training(
    model: DiffusionModel, weights: AdapterWeights, name: str, *, dropout: float = 0.0
) -> list[TrainedLayer]:
    """Put an adapter of one kind into a model so that it can learn, and return its layers, sorted.

    Factors are in the number format of the layer's weight, except for the magnitudes of DoRA: these are fp32,
    as half a rounding step of bf16 would already change the whole weight.

    Raises:
        AdapterFileError: if a module is missing in the model, has another shape, or is of a kind that
            cannot be trained.
    """
    names = weights.kinds()
    if len(names) > 1:
        raise AdapterFileError(
            f"{name}: mixes {titles(names)} layers, which cannot be trained together; convert it to a plain "
            "LoRA"
        )
    (kind,) = (KINDS[kind_name] for kind_name in names)
    form = kind.trained
    if form is None:
        raise AdapterFileError(
            f"{name}: is {kind.title}, which cannot be trained; convert it to a plain LoRA"
        )
    weights = fitted(model, weights, name)
    for component in weights.components():
        module = model.components()[component]
        updates = {installed_path(module, p): update for p, update in weights.updates_of(component).items()}
        config = form.config(name, updates, dropout)
        inject_adapter_in_model(config, module, adapter_name=inner_name(name))
        module.requires_grad_(False)  # PEFT makes what it adds trainable; the masters say what learns
    layers = [
        TrainedLayer(key, update, form.take_over(module_at(model, key), inner_name(name), update))
        for key, update in weights.all_items()
    ]
    set_strengths(model, {name: 1.0})
    return layers
