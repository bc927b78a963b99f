"""Writing the diffusers format: ``unet.<module>.lora_A.weight``, all keys of one spelling.

One spelling, because diffusers goes by the first key it sees (formats.md 4.2). The format has no alphas. If
it costs no more than the rounding that the number format needs anyway, the scale alpha / rank goes into
``lora_B``, so that every release and every other client computes the same update (4.3); the alphas as trained
are then kept in our own header entry. If it would cost more, the values stay as they are, and the alphas go
where diffusers itself has kept them since 0.34, into ``lora_adapter_metadata``.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..adapters.canonical import AdapterFile, AdapterWeights
from ..families.facts import is_text_encoder
from ..tensor_file import write_tensors
from . import folding, kinds, metadata, names, peft, single_file
from .clients import TEXT_ATTENTION, diffusers_reasons
from .folding import CONFIG_ENTRY
from .format_code import FormatCode, ReadBack, grouped, spelled
from .other_readers import through_diffusers

if TYPE_CHECKING:
    from ..families.facts import FamilyInfo


def encode(
    where: str, weights: AdapterWeights, info: FamilyInfo, dtype: torch.dtype
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of a diffusers file, and the header entry with the alphas as trained.

    Raises:
        AdapterFileError: for a kind that diffusers cannot hold, or values that do not fit the number format.
    """
    stored = kinds.as_low_rank(where, "diffusers", weights)
    weights, magnitudes = stored.weights, stored.magnitudes
    fold = all(folding.folds_freely(pair.up, pair.scale, dtype) for pair in weights.pairs.values())
    without_attention = {
        component
        for component in weights.components()
        if is_text_encoder(component)
        and not any(path.endswith(TEXT_ATTENTION) for path in weights.component(component))
    }
    tensors: dict[str, Tensor] = {}
    for module, pair in weights.items():
        at = f"{where}: module `{module.component}.{module.path}`"
        up = folding.scaled(pair.up, pair.scale) if fold and pair.scale != 1.0 else pair.up
        key = f"{module.component}.{module.path}"
        # diffusers tells a text encoder's spelling by its attention; without any it knows only the older one
        older = module.component in without_attention
        down_part, up_part = (
            ("lora_linear_layer.down", "lora_linear_layer.up") if older else ("lora_A", "lora_B")
        )
        tensors[f"{key}.{down_part}.weight"] = folding.fitting(at, pair.down, dtype)
        tensors[f"{key}.{up_part}.weight"] = folding.fitting(at, up, dtype)
        if module in stored.biases:  # PEFT multiplies them by the scale that it knows
            bias = folding.scaled(stored.biases[module], 1.0 if fold else 1.0 / pair.scale)
            tensors[f"{key}.lora_B.bias"] = folding.fitting(at, bias, dtype)
        if module in magnitudes:
            # transformers' loader of text encoders finds the magnitude only with `.weight`
            ending = ".weight" if is_text_encoder(module.component) else ""
            tensors[f"{key}.lora_magnitude_vector{ending}"] = folding.fitting(
                at, magnitudes[module], torch.float32
            )
    if fold:
        return tensors, {folding.RECORDED_ALPHAS: folding.recorded_alphas(weights), "format": "pt"}
    dora, biased = ({module.component for module in part} for part in (magnitudes, stored.biases))
    return tensors, {CONFIG_ENTRY: _settings(weights, dora, biased), "format": "pt"}


def _settings(weights: AdapterWeights, dora: Collection[str], biased: Collection[str]) -> str:
    """Return the PEFT settings of all components, as diffusers 0.34 and later write them.

    Text-encoder modules are named without ``text_model.``: PEFT matches the end of a name, so releases of
    transformers with that prefix and those without it both find them.
    """
    entries: dict[str, object] = {}
    for component in weights.components():
        spelled = {path: path.removeprefix(names.TEXT_PREFIX) for path in weights.component(component)}
        settings = peft.settings_of(
            weights.component(component), spelled, anchor="" if is_text_encoder(component) else "^"
        )
        settings |= {"use_dora": component in dora, "lora_bias": component in biased}
        entries |= {f"{component}.{name}": value for name, value in settings.items()}
    return json.dumps(entries, separators=(",", ":"))


def write(adapter: AdapterFile, target: Path, dtype: torch.dtype, info: FamilyInfo) -> list[Path]:
    """Write a file atomically and return it."""
    tensors, more = encode(str(target), adapter.weights, info, dtype)
    entries = metadata.for_file(adapter, info, more)
    write_tensors(target, tensors, entries)
    return [target]


CODE = FormatCode(
    write,
    spelled("diffusers"),
    grouped,
    single_file.read_modules,
    diffusers_reasons,
    read_back=ReadBack("diffusers", through_diffusers),
)
