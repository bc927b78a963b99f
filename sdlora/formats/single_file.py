"""Reading a LoRA kept in one file, in any spelling or mixture of spellings, module by module.

Everything that :mod:`.keys` recognises is read the same way. What scales an update is, in this order: the
file's ``scale``, its ``alpha``, the PEFT settings that diffusers puts into the header, or nothing, which
means alpha = rank. The alphas that we recorded when a scale had to be folded come on top of that, and
leave the update as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..adapters.base import COMPONENTS, LowRankPair, ModuleKey
from ..errors import AdapterFileError
from ..tensor_file import Header, Load, entry_json
from . import folding
from .keys import group_keys
from .peft import effective_alpha

CONFIG_ENTRY = "lora_adapter_metadata"


def read_modules(header: Header, load: Load) -> Iterator[tuple[ModuleKey, LowRankPair]]:
    """Yield every module of a file with its update, in sorted order, holding one module at a time.

    Args:
        header: of the file.
        load: gives the tensor of a key.

    Raises:
        AdapterFileError: listing keys that belong to no module, or naming an incomplete module.
    """
    path, metadata = header.path, header.metadata
    groups = group_keys(path, header.tensors)
    configs = peft_settings(path, metadata)
    originals = folding.original_alpha(path, metadata)
    for module in sorted(groups):
        where = f"{path}: module `{module.component}.{module.path}`"
        pair = _pair(where, groups[module], load, configs.get(module.component), module)
        yield module, folding.restore(pair, module, originals)


def peft_settings(path: Path, metadata: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Return the PEFT settings of each component from diffusers' own header entry.

    Raises:
        AdapterFileError: when the entry is not a JSON object.
    """
    text = metadata.get(CONFIG_ENTRY)
    if text is None:
        return {}
    try:
        tree = entry_json(text)
    except ValueError:
        tree = None
    if not isinstance(tree, dict):
        raise AdapterFileError(
            f"{path}: header entry `{CONFIG_ENTRY}` is not a JSON object; export the file again"
        )
    configs: dict[str, dict[str, Any]] = {}
    for key, value in tree.items():
        component, _, setting = key.partition(".")
        if component in COMPONENTS and setting:
            configs.setdefault(component, {})[setting] = value
    return configs


def _pair(
    where: str, parts: Mapping[str, str], load: Load, config: Mapping[str, Any] | None, module: ModuleKey
) -> LowRankPair:
    down, up = (load(parts[part]) if part in parts else None for part in ("down", "up"))
    alpha = folding.alpha_value(where, load(parts["alpha"])) if "alpha" in parts else None
    pair = folding.pair_of(where, down, up, alpha)
    if "scale" in parts:  # WebUI and stable-diffusion.cpp: takes the place of alpha / rank
        return LowRankPair(pair.down, pair.up, folding.alpha_value(where, load(parts["scale"])) * pair.rank)
    if alpha is None and config is not None:
        return folding.pair_of(where, pair.down, pair.up, effective_alpha(where, config, module, pair.rank))
    return pair
