"""Continuing from an existing adapter file: what it must hold, and which settings follow from it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import torch

from ..adapters.attach import target_modules
from ..adapters.canonical import AdapterWeights
from ..adapters.kinds.table import kind_of, titles
from ..config.adapter import PART_KEYS
from ..config.defaults import OpenSettings
from ..config.schema import Config
from ..errors import ConfigError
from ..families.base import DiffusionModel
from ..families.fingerprint import file_digest
from ..formats.adapter_files import OpenAdapter, read_adapter


def warm_start(open_settings: OpenSettings, model: DiffusionModel) -> AdapterWeights:
    """Fill in the ranks and alphas of the file to continue from, and return its weights in float32.

    LoCon with Tucker factors continues as a plain LoRA of the same ranks and alphas, which it equals exactly.

    Raises:
        AdapterFileError: if the file cannot be read.
        ConfigError: if settings contradict the file.
    """
    config = open_settings.config
    path = config.adapter.from_file
    assert path is not None
    read = read_adapter(path)
    updates = {key: kind_of(update).warm(update) for key, update in read.weights.all_items()}
    weights = AdapterWeights(updates).to(torch.float32)
    _check_kind(config, path, weights)
    if read.info.family not in (None, model.info.name):
        raise ConfigError(
            f"`adapter.from_file={path}`: made for {read.info.family} bases, but {model.base.title} is "
            f"{model.info.name}; choose another base or file"
        )
    _check_modules(config, path, weights, model)
    infos = model.info.components
    for component in (name for name in weights.components() if name in infos):
        component_updates = weights.updates_of(component).values()
        (rank, alpha), _ = Counter((update.rank, update.alpha) for update in component_updates).most_common(
            1
        )[0]
        keys = PART_KEYS[infos[component].part]
        for key, value in ((keys.rank, rank), (keys.alpha, alpha)):
            given = config.get(key)
            if given is not None and given != value:
                raise ConfigError(
                    f"`{key}={given}` contradicts `adapter.from_file={path}`, whose layers have {value:g}; "
                    f"leave {key} out"
                )
            open_settings.fill(key, value, f"as in {path.name}", ask_base=False)
    return weights


def digest_of(path: Path) -> str:
    """Return the digests of an adapter's files, to tell whether a run continues from the same ones."""
    return " ".join(file_digest(header.path) for header in OpenAdapter(path).headers)


def _check_kind(config: Config, path: Path, weights: AdapterWeights) -> None:
    kinds = list(weights.kinds())
    if kinds == [config.adapter.kind]:
        return
    advice = (
        f"set adapter.kind={kinds[0]}"
        if len(kinds) == 1
        else "convert the file to a plain LoRA (sdlora convert)"
    )
    raise ConfigError(
        f"`adapter.kind={config.adapter.kind}` contradicts `adapter.from_file={path}`, which holds "
        f"{titles(weights.kinds())}; {advice}"
    )


def _check_modules(config: Config, path: Path, weights: AdapterWeights, model: DiffusionModel) -> None:
    for component, info in model.info.components.items():
        has, wanted = bool(weights.updates_of(component)), config.adapter.adapts(info.part)
        if has == wanted:
            continue
        switch = PART_KEYS[info.part].switch
        if switch is None:
            raise ConfigError(
                f"`adapter.from_file={path}`: has no {model.info.denoiser.title} layers, so there is nothing "
                "to continue from"
            )
        advice = f"set {switch}={str(has).lower()}"
        what = "also adapts" if has else "does not adapt"
        raise ConfigError(f"`adapter.from_file={path}`: {what} the {component}; {advice}")
    default = type(config.adapter).model_fields["targets"].default
    if config.adapter.targets != default and set(target_modules(model, config.adapter)) != set(
        weights.updates
    ):
        raise ConfigError(
            f"`adapter.targets={config.adapter.targets}` contradicts `adapter.from_file={path}`, which has "
            "other layers; leave adapter.targets out"
        )
