"""What a run takes is counted, and what saves memory decided, before any weight is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..config.defaults import OpenSettings
from ..config.schema import Config
from ..config.toml import load_config
from ..devices import choose_dtype
from ..families.base import DiffusionModel
from ..families.compute import Compute
from ..families.latent_model import LatentModel
from ..families.loading import family_blueprint, load_model
from ..families.table import FAMILIES
from ..number_formats import dtype_of
from ..run_folder import RunFolder
from .ladder import APART, RUNG_KEYS, budget_of, decide, offload_room
from .memory import MemoryPlan, free_memory, plan_memory
from .memory_phases import WHOLE_SIDE
from .processes import Processes

META = torch.device("meta")


def make_base(config: Config, compute: Compute, device: torch.device) -> LatentModel:
    """Return the base; on the meta device only its blueprint, for which no weight is read."""
    base_format = config.training.base_format or "full"
    if device.type == "meta" and config.model.base in FAMILIES and not Path(config.model.base).exists():
        model = family_blueprint(  # nothing is trained on a family: only what it would take is asked for
            config.model.base, dtype=compute.dtype, attention=compute.attention, base_format=base_format
        )
    else:
        model = load_model(
            config.model,
            dtype=compute.dtype,
            device=device,
            attention=compute.attention,
            denoiser_waits=True,
            base_format=base_format,
        )
    if config.training.autoencoder == "banded":
        model.work_in_bands(WHOLE_SIDE)
    return model


class Planner:
    """Counts what settings take, on blueprints of the base.

    The blueprint on which the settings were decided is used up by the first count: the plan puts an adapter
    into it. Only for other settings, if the run does not fit, are others made.

    Args:
        compute: what the run computes with.
        blueprint: to be used up.
        config: that it was made for.
        free: bytes that the device has free; it is asked when None.
    """

    def __init__(
        self, compute: Compute, blueprint: DiffusionModel, config: Config, *, free: int | None = None
    ) -> None:
        self._compute, self._unused = compute, [blueprint]
        self._of = _base_settings(config)
        self.device, self.free = compute.device, free or free_memory(compute.device)

    def __call__(self, config: Config) -> MemoryPlan:
        """Return the plan of some settings."""
        wanted = _base_settings(config)
        usable = self._unused if wanted == self._of else []
        given = config.training.precision
        dtype = dtype_of(given) if given else choose_dtype(None, self._compute.device)
        other = replace(self._compute, dtype=dtype)
        return plan_memory(
            config, usable.pop if usable else lambda: make_base(config, other, META), free=self.free
        )


def _base_settings(config: Config) -> tuple[object, ...]:
    """Return the settings of training that a blueprint is made by."""
    return config.training.autoencoder == "banded", config.training.base_format or "full"


def save_memory(
    open_settings: OpenSettings, planner: Planner, kept: Mapping[str, Any] | None, processes: Processes
) -> None:
    """Decide what saves memory: as the run had it before it was stopped, or else by the ladder.

    Args:
        open_settings: all else is decided.
        planner: counts what settings take.
        kept: of the run that goes on, as the main process finds it; None for a new one.
        processes: they all decide as the one with the least memory.
    """
    kept = processes.exchange(kept)[0]  # other machines need not have the run folder
    if kept is not None:
        for key, value in kept.items():
            if open_settings.config.get(key) != value and _is_open(open_settings.config, key):
                open_settings.put(key, value, "as the run had it")
        return
    setting = open_settings.config.training.memory
    budgets = processes.exchange(budget_of(setting, planner.free, planner.device))
    known = [budget for budget in budgets if budget is not None]
    decide(open_settings, min(known, default=None), planner, offload_room(planner.device))


def _is_open(config: Config, key: str) -> bool:
    section, name = key.split(".")
    return config.get(key) is None or name not in getattr(config, section).model_fields_set


def kept_rungs(folder: RunFolder) -> dict[str, Any] | None:
    """Return what the run in a folder was decided to save memory with; None if there is none.

    Other fast paths than the ladder's are those that the checkpoint names.
    """
    if not folder.config_file.is_file():
        return None
    config = load_config(folder.config_file)
    held = {key: config.get(key) for key in RUNG_KEYS}
    return {key: value for key, value in held.items() if key != "training.fast" or value == APART}
