"""Reading a LoRA kept in one file, in any spelling or mixture of spellings, module by module.

Everything that :mod:`.keys` recognises is read the same way. An update's scale comes from the first of these:
the file's ``scale``, its ``alpha``, the PEFT settings that diffusers puts into the header; else alpha = rank.
After that, the alphas that we recorded when folding a scale are restored, which does not change the update.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..adapters.canonical import LowRankPair, ModuleKey, Update, WrappedUpdate
from ..errors import AdapterFileError
from ..families.table import component_names
from ..tensor_file import Header, Load, entry_json
from . import folding, kinds
from .folding import CONFIG_ENTRY
from .keys import Groups
from .peft import Alphas


def read_modules(header: Header, groups: Groups, load: Load) -> Iterator[tuple[ModuleKey, Update]]:
    """Yield every module of a file with its update, in sorted order, with one in memory at a time.

    Args:
        header: of the file.
        groups: the key of every part of every module.
        load: gives the tensor of a key.

    Raises:
        AdapterFileError: naming an incomplete module.
    """
    path, metadata = header.path, header.metadata
    settings = {
        component: Alphas(f"{path}: header entry `{CONFIG_ENTRY}`", config)
        for component, config in peft_settings(path, metadata).items()
    }
    originals = folding.original_alpha(path, metadata)
    for module in sorted(groups):
        where = f"{path}: module `{module.component}.{module.path}`"
        update = _update(where, groups[module], load, settings.get(module.component), module)
        if "up_bias" in groups[module]:
            layer = ModuleKey(module.component, module.layer)
            if layer not in groups:
                raise AdapterFileError(f"{where}: is a bias without its factors; export the adapter again")
            if folding.is_zero(update):
                continue
            factors = _update(where, groups[layer], load, settings.get(module.component), layer)
            update = folding.times(update, factors.scale)
        yield module, _restored(update, module, originals)


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
        if component in component_names() and setting:
            configs.setdefault(component, {})[setting] = value
    return configs


def _restored(update: Update, module: ModuleKey, originals: Mapping[str, float]) -> Update:
    if isinstance(update, LowRankPair):
        return folding.restore(update, module, originals)
    if isinstance(update, WrappedUpdate):
        return update.around(_restored(update.direction, module, originals))
    return update


def _update(
    where: str, parts: Mapping[str, str], load: Load, alphas: Alphas | None, module: ModuleKey
) -> Update:
    tensors = {part: load(key) for part, key in parts.items()}
    alpha, scale = (
        folding.alpha_value(where, tensors.pop(part)) if part in tensors else None
        for part in ("alpha", "scale")
    )
    folding.check_sides(where, tensors)
    if alpha is None and scale is None and alphas is not None and "down" in tensors:
        alpha = alphas.of(where, module, tensors["down"].shape[0])
    # WebUI and stable-diffusion.cpp: a `scale` takes the place of alpha / rank
    return kinds.update_of(where, module, tensors, alpha, scale)
