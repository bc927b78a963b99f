"""Optimizers as a table of records: how one is made, and everything else that differs between them.

The loop, the memory plan, checkpoints and file headers read the record and know no optimizer by name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..config.adapter import PART_KEYS, AdaptedPart
from ..config.defaults import USUAL_RATE, RateRule
from ..config.schema import Config, OptimizerConfig
from ..errors import ConfigError
from .masters import ParameterGroup

OptimizerGroup = dict[str, Any]
"""What torch calls a parameter group: ``params``, ``lr`` and ``weight_decay``."""


@dataclass(frozen=True)
class OptimizerKind:
    """What the program has to know about an optimizer.

    Attributes:
        make: returns it over groups of parameters; the settings are those that all groups share.
        header: the text that ``ss_optimizer`` holds in an adapter file.
        bytes_per_value: memory of its state for each trained number, besides the fp32 value and gradient.
        rate: the learning rate if the user gives none, and whether all components must have the same.
        looks_at_shapes: whether it tells matrices from vectors; it then gets each factor in its shape
            instead of one flat buffer.
        has_eval_mode: whether the values it steps differ from those to be used: ``eval()`` puts the latter
            into the parameters and ``train()`` takes them out again (schedule-free optimizers, Defazio et
            al. 2024).
    """

    make: Callable[[Sequence[OptimizerGroup], OptimizerConfig], torch.optim.Optimizer]
    header: Callable[[OptimizerConfig], str]
    bytes_per_value: float
    rate: RateRule = USUAL_RATE
    looks_at_shapes: bool = False
    has_eval_mode: bool = False


def _adamw(groups: Sequence[OptimizerGroup], settings: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019)."""
    return torch.optim.AdamW(
        groups,
        betas=settings.betas,
        eps=settings.epsilon,
        weight_decay=settings.weight_decay,
        fused=groups[0]["params"][0].device.type in ("cpu", "cuda"),
    )


def _adamw_header(settings: OptimizerConfig) -> str:
    betas = ",".join(map(str, settings.betas))
    return f"torch.optim.adamw.AdamW(betas=({betas}),weight_decay={settings.weight_decay})"


OPTIMIZERS: dict[str, OptimizerKind] = {
    "adamw": OptimizerKind(_adamw, _adamw_header, bytes_per_value=8),  # two fp32 moments
}
"""By the name in ``optimizer.name``; a new one is an entry here, its name in ``config/schema.py``, and its
settings there, marked with ``OnlyFor``."""


def optimizer_kind(settings: OptimizerConfig) -> OptimizerKind:
    """Return the record of the optimizer that settings name.

    Raises:
        ConfigError: if there is none.
    """
    kind = OPTIMIZERS.get(settings.name)
    if kind is None:
        raise ConfigError(f"`optimizer.name={settings.name}`: no such optimizer; use {', '.join(OPTIMIZERS)}")
    return kind


def check_rates(config: Config, parts: Sequence[AdaptedPart]) -> None:
    """Refuse several learning rates for an optimizer that finds or takes only one.

    Args:
        config: final settings.
        parts: of the base.

    Raises:
        ConfigError: naming every setting that makes another rate.
    """
    settings = config.optimizer
    if not optimizer_kind(settings).rate.one_rate:
        return
    keys = [PART_KEYS[part].learning_rate for part in parts if config.adapter.adapts(part)]
    others = [key for key in keys if config.get(key) != config.get(keys[0])]
    if settings.lora_plus_ratio != 1.0:
        others.append("optimizer.lora_plus_ratio")
    if any(factor != 1.0 for factor in settings.block_rates.values()):
        others.append("optimizer.block_rates")
    if others:
        raise ConfigError(
            f"`optimizer.name={settings.name}` has one learning rate for everything it trains, but "
            f"{', '.join(f'`{key}`' for key in others)} would give another one; leave it out"
        )


def make_optimizer(settings: OptimizerConfig, groups: Sequence[ParameterGroup]) -> torch.optim.Optimizer:
    """Return the optimizer that settings name over the masters of all groups, in their order."""
    kind = optimizer_kind(settings)
    optimizer = kind.make(
        [
            {
                "params": group.master.optimized(shaped=kind.looks_at_shapes),
                "lr": group.learning_rate,
                "weight_decay": settings.weight_decay if group.decays else 0.0,
            }
            for group in groups
        ],
        settings,
    )
    if kind.has_eval_mode:
        optimizer.train()  # type: ignore[attr-defined]
    return optimizer


def parameter_names(settings: OptimizerConfig, groups: Sequence[ParameterGroup]) -> list[str]:
    """Return names of the optimizer's parameters, in its order: of groups, or of each factor in them."""
    if not optimizer_kind(settings).looks_at_shapes:
        return [group.name for group in groups]
    return [f"{group.name}.{number}" for group in groups for number in range(len(group.master.parameters))]
