"""Optimizers as a table of records: how one is made, and everything else that differs between them.

The loop, the memory plan, checkpoints and file headers read the record and know no optimizer by name.
"""

from __future__ import annotations

import importlib
import importlib.util
import io
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import Any

import torch

from ..config.adapter import PART_KEYS, AdaptedPart
from ..config.defaults import USUAL_RATE, RateRule
from ..config.schema import Config, OptimizerConfig
from ..errors import ConfigError
from .adamw_8bit import AdamW8bit
from .masters import ParameterGroup

OptimizerGroup = dict[str, Any]
"""What torch calls a parameter group: ``params``, ``lr`` and ``weight_decay``."""


@dataclass(frozen=True)
class OptimizerKind:
    """What the program has to know about an optimizer.

    Attributes:
        make: returns it over groups of parameters; the settings are those that all groups share.
        header: the text that ``ss_optimizer`` holds in an adapter file; see :func:`header_of`.
        bytes_per_value: memory of its state for each trained number, besides the fp32 value and gradient.
        rate: the learning rate if the user gives none, and whether all components must have the same.
        looks_at_shapes: whether it tells matrices from vectors; it then gets each factor in its shape
            instead of one flat buffer.
        heeds_found_inf: whether it changes nothing where its attribute ``found_inf`` is 1.0 on the device,
            and takes rates that are numbers there, as torch's that step in one kernel do.
        has_eval_mode: whether the values it steps differ from those to be used: ``eval()`` puts the latter
            into the parameters and ``train()`` takes them out again (schedule-free optimizers, Defazio et
            al. 2024).
        package: what it needs besides sdlora's own dependencies, by the name that is imported.
        distribution: that package's name for pip, where it is another one.
        found_rate: returns the rate it works out by itself, for progress and events.
    """

    make: Callable[[Sequence[OptimizerGroup], OptimizerConfig], torch.optim.Optimizer]
    header: Callable[[OptimizerConfig], str]
    bytes_per_value: float
    rate: RateRule = USUAL_RATE
    looks_at_shapes: bool = False
    heeds_found_inf: bool = False
    has_eval_mode: bool = False
    package: str | None = None
    distribution: str | None = None
    found_rate: Callable[[torch.optim.Optimizer], float] | None = None


def _header(name: str, *keys: str, **more: Any) -> Callable[[OptimizerConfig], str]:
    """Return what writes ``NAME(key=value,...)``, as kohya's scripts do: settings, and more."""

    def write(settings: OptimizerConfig) -> str:
        values = {"eps" if key == "epsilon" else key: getattr(settings, key) for key in keys} | more
        shown = [f"{key}={value}".replace(" ", "") for key, value in values.items()]
        return f"{name}({','.join(shown)})"

    return write


def _adamw(groups: Sequence[OptimizerGroup], settings: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019)."""
    device = groups[0]["params"][0].device.type
    return torch.optim.AdamW(
        groups,
        betas=settings.betas,
        eps=settings.epsilon,
        weight_decay=settings.weight_decay,
        fused=device in ("cpu", "cuda"),
        capturable=device == "cuda",
    )


def _adamw8bit(groups: Sequence[OptimizerGroup], settings: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW with both moments in 8 bits, scaled by blocks of 256 values (Dettmers et al. 2022).

    By bitsandbytes, if it is installed and has kernels for the device; they keep the same states.
    """
    kind: Any = AdamW8bit
    if is_there("bitsandbytes") and groups[0]["params"][0].device.type in ("cpu", "cuda"):
        kind = importlib.import_module("bitsandbytes.optim").AdamW8bit
    optimizer: torch.optim.Optimizer = kind(groups, betas=settings.betas, eps=settings.epsilon)
    return optimizer


def _adafactor(groups: Sequence[OptimizerGroup], settings: OptimizerConfig) -> torch.optim.Optimizer:
    """Adafactor (Shazeer and Stern 2018) with rates as given.

    Its own rates, relative to the size of the values, would leave factors that start at zero there for long
    and take no account of the rates of single components.
    """
    from transformers.optimization import Adafactor

    return Adafactor(groups, lr=0.0, scale_parameter=False, relative_step=False, warmup_init=False)


def _lion(groups: Sequence[OptimizerGroup], settings: OptimizerConfig) -> torch.optim.Optimizer:
    """Lion (Chen et al. 2023): the sign of a mean of the gradients."""
    from pytorch_optimizer import Lion

    return Lion(groups, betas=settings.betas)


def _prodigy(groups: Sequence[OptimizerGroup], settings: OptimizerConfig) -> torch.optim.Optimizer:
    """Prodigy (Mishchenko and Defazio 2023), as its authors advise for diffusion models."""
    from prodigyopt import Prodigy

    with redirect_stdout(io.StringIO()):  # it prints how it decays, and stdout is for answers
        return Prodigy(
            groups,
            d0=1e-6 if settings.d0 is None else settings.d0,
            d_coef=settings.d_coef,
            use_bias_correction=True,
            safeguard_warmup=True,
        )


def _schedule_free(groups: Sequence[OptimizerGroup], settings: OptimizerConfig) -> torch.optim.Optimizer:
    """Schedule-free AdamW (Defazio et al. 2024)."""
    from schedulefree import AdamWScheduleFree

    return AdamWScheduleFree(groups, betas=settings.betas, eps=settings.epsilon)


def _came(groups: Sequence[OptimizerGroup], settings: OptimizerConfig) -> torch.optim.Optimizer:
    """CAME (Luo et al. 2023): Adafactor with a momentum that distrusts what varies."""
    from pytorch_optimizer import CAME

    return CAME(groups)


OPTIMIZERS: dict[str, OptimizerKind] = {
    "adamw": OptimizerKind(
        _adamw,
        _header("torch.optim.adamw.AdamW", "betas", "weight_decay"),
        bytes_per_value=8,  # two fp32 moments
        heeds_found_inf=True,
    ),
    "adamw8bit": OptimizerKind(
        _adamw8bit,
        _header("bitsandbytes.optim.adamw.AdamW8bit", "betas", "weight_decay"),
        bytes_per_value=2.04,  # two moments of a byte, and two fp32 scales for 256 values
    ),
    "adafactor": OptimizerKind(
        _adafactor,
        _header(
            "transformers.optimization.Adafactor",
            *("weight_decay",),
            **{"scale_parameter": False, "relative_step": False, "warmup_init": False},
        ),
        bytes_per_value=1,  # fp32 rows and columns: 4 / rank and little more
        looks_at_shapes=True,
    ),
    "lion": OptimizerKind(
        _lion,
        _header("pytorch_optimizer.optimizer.lion.Lion", "betas", "weight_decay"),
        bytes_per_value=4,  # one fp32 moment
        rate=RateRule(3e-5, "a third of AdamW's: every value moves by the whole rate", share=0.3),
        package="pytorch_optimizer",
        distribution="pytorch-optimizer",
    ),
    "prodigy": OptimizerKind(
        _prodigy,
        _header(
            "prodigyopt.prodigy.Prodigy",
            *("weight_decay", "d_coef", "d0"),
            **{"use_bias_correction": True, "safeguard_warmup": True},
        ),
        bytes_per_value=16,  # two moments, where it started, and a sum of gradients
        rate=RateRule(
            1.0, "Prodigy finds it", follows_scale=False, one_rate=True, share=0, first_guess="optimizer.d0"
        ),
        package="prodigyopt",
        found_rate=lambda optimizer: float(optimizer.param_groups[0]["d"]),
    ),
    "adamw_schedulefree": OptimizerKind(
        _schedule_free,
        _header("schedulefree.adamw_schedulefree.AdamWScheduleFree", "betas", "weight_decay"),
        bytes_per_value=8,  # the second moment, and the values that are not averaged
        rate=RateRule(schedule="constant"),
        has_eval_mode=True,
        package="schedulefree",
    ),
    "came": OptimizerKind(
        _came,
        _header("pytorch_optimizer.optimizer.came.CAME", "weight_decay"),
        bytes_per_value=6,  # one fp32 moment, and twice Adafactor's rows and columns
        # steady gradients get large steps: at 1e-4 the mini base learns as by AdamW at 2e-3
        rate=RateRule(share=0.05),
        looks_at_shapes=True,
        package="pytorch_optimizer",
        distribution="pytorch-optimizer",
    ),
}
"""By the name in ``optimizer.name``; a new one is an entry here, its name in ``config/schema.py``, and its
settings there, marked with ``OnlyFor``."""


def optimizer_kind(settings: OptimizerConfig) -> OptimizerKind:
    """Return the record of the optimizer that settings name.

    Raises:
        ConfigError: if there is none, or the package that has it is not installed.
    """
    kind = OPTIMIZERS.get(settings.name)
    if kind is None:
        raise ConfigError(f"`optimizer.name={settings.name}`: no such optimizer; use {', '.join(OPTIMIZERS)}")
    if kind.package is not None and not is_there(kind.package):
        raise ConfigError(
            f"`optimizer.name={settings.name}`: the package {kind.distribution or kind.package} is not "
            f"installed; run: pip install {kind.distribution or kind.package}"
        )
    return kind


def header_of(optimizer: torch.optim.Optimizer, settings: OptimizerConfig) -> str:
    """Return the text that ``ss_optimizer`` holds of a run's optimizer, by the name of what it really is.

    sdlora's own 8-bit AdamW stands in for bitsandbytes' where that has no kernels.
    """
    header = optimizer_kind(settings).header(settings)
    if not isinstance(optimizer, AdamW8bit):
        return header
    return f"{AdamW8bit.__module__}.{AdamW8bit.__qualname__}({header.partition('(')[2]}"


def is_there(package: str) -> bool:
    return package in sys.modules or importlib.util.find_spec(package) is not None


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
