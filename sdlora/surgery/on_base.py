"""Updates that depend on the base's weights (DoRA, GLoRA, IA3, OFT, BOFT), worked out on a given base.

Such an update counts as what it adds to the base's weights, strength times, as in drawing and baking. GLoRA's
is of low rank; the others' are not, so that a plain LoRA of them needs a size.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ..adapters.canonical import ModuleKey, Update
from ..adapters.kinds.table import title_of
from ..errors import AdapterFileError, ModelError
from .checkpoints import Checkpoint, open_checkpoint

BaseWeight = Callable[[ModuleKey], Tensor]
"""Gives the base's weight or bias of a module, float32, in the layer's shape."""


def weights_of(base: Path) -> BaseWeight:
    """Return what gives the weights of a checkpoint or diffusers folder.

    Raises:
        ModelError: when it cannot be read; later for a module that it has not.
    """
    return weights_in(open_checkpoint(base))


def weights_in(model: Checkpoint) -> BaseWeight:
    """Return what gives the weights of an opened checkpoint."""

    def weight(module: ModuleKey) -> Tensor:
        sites = model.sites(module)
        if not sites:
            raise ModelError(
                f"{model.path}: has no {module.component}.{module.path}; give the base the adapter was "
                "trained on"
            )
        return sites[0].read()

    return weight


def fitted(module: ModuleKey, update: Update, weight: Tensor) -> Update:
    """Return an update in the shape of the base's weight.

    Raises:
        AdapterFileError: when it is one of another layer.
    """
    try:
        return update.in_shape(tuple(weight.shape))
    except ValueError:
        raise AdapterFileError(
            f"`{module.component}.{module.path}` is a {title_of(update)} of {tuple(update.shape)}, but the "
            f"base's weight is {tuple(weight.shape)}; give the base the adapter was trained on"
        ) from None


def delta_on(module: ModuleKey, update: Update, base: BaseWeight | None) -> Tensor:
    """Return an update's dW, on the base's weight if it needs that, float32 or wider.

    Raises:
        AdapterFileError: when it needs the base and there is none, or is one of another layer.
    """
    if not update.needs_base:
        return update.delta()
    if base is None:
        raise AdapterFileError(
            f"`{module.component}.{module.path}` is a {title_of(update)}, whose update depends on the base's "
            "weights; give --base"
        )
    weight = base(module)
    return fitted(module, update, weight).delta(weight.to(torch.promote_types(weight.dtype, torch.float32)))
