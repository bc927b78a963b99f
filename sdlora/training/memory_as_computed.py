"""A blueprint that computes a step as a run will, for the memory plan."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ..adapters.direct import can_be_direct
from ..adapters.direct_adapter import DirectAdapter
from ..adapters.trainable_layers import TrainedLayer
from ..config.schema import Config
from ..families.base import DiffusionModel
from ..families.lean import join_times, make_lean, undo_lean
from ..families.recompute import Rungs
from .fast import can_take, chosen_paths, recompute_of


@contextmanager
def computed_as_in_a_run(
    model: DiffusionModel, layers: Sequence[TrainedLayer], config: Config, *, always: bool = False
) -> Iterator[None]:
    """Have a blueprint make again what the settings say, by the fast paths that the run will use for that.

    Where nothing is made again, or whole blocks by diffusers' own way, it stays as it is.

    Args:
        model: on the meta device, ready to train.
        layers: of the adapter in it.
        config: final settings.
        always: take the fast paths also where nothing is made again.
    """
    recompute, names = recompute_of(config, model), chosen_paths(config.training.fast)
    draws = config.adapter.rank_dropout > 0 or config.adapter.module_dropout > 0
    possible = "recompute" in names and can_take(model, recompute.rung, draws=draws)
    keeps_all = always and "blocks" in names and recompute.rung == Rungs.nothing
    if not possible and not keeps_all:
        yield
        return
    denoiser: Any = model.components()[model.info.denoiser.component]
    denoiser.disable_gradient_checkpointing()
    attentions = make_lean(denoiser)
    if possible:
        recompute.put_in_place(denoiser)
    direct = _direct(model, layers, config) if "lora" in names and not draws else None
    if direct is not None:
        if "joint" in names:
            join_times(denoiser)
        direct.put_in_place(attentions if "joint" in names else ())
    try:
        yield
    finally:
        if direct is not None:
            direct.take_out()
        undo_lean(denoiser)


def _direct(model: DiffusionModel, layers: Sequence[TrainedLayer], config: Config) -> DirectAdapter | None:
    if config.adapter.init not in ("default", "gaussian") or not can_be_direct(model, layers):
        return None
    for layer in layers:
        for parameter in layer.parameters.values():
            parameter.grad = torch.zeros_like(parameter)
    return DirectAdapter(model, layers)


def gradient_bytes(model: DiffusionModel) -> int:
    """Return the bytes of all gradients of a model's parameters."""
    parameters = [p for module in model.components().values() for p in module.parameters()]
    return sum(p.grad.numel() * p.grad.element_size() for p in parameters if p.grad is not None)
