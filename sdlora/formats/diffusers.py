"""The diffusers format: ``unet.<module>.lora_A.weight``, read in all spellings that were ever written.

Written without alphas: the scale alpha / rank is multiplied into ``lora_B``, so every diffusers release
and every other client computes the same update (FORMATS.md 4.3). The alphas as trained go into our own
header entry. The UNet's and the text encoder's keys are all of one spelling, because diffusers decides by
the first key it sees (FORMATS.md 4.2).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..adapters.base import COMPONENTS, AdapterWeights, ModuleKey
from ..errors import AdapterFileError
from ..tensor_file import shown
from . import folding, foreign, names
from .peft import effective_alpha

if TYPE_CHECKING:
    from ..families.base import FamilyInfo

CONFIG_ENTRY = "lora_adapter_metadata"

_FACTOR = re.compile(
    r"^(?P<path>.+?)(?:"
    r"\.lora_(?P<ab>[AB])(?:\.[A-Za-z]\w*)?\.weight"
    r"|\.lora(?:_linear_layer)?\.(?P<new>down|up)\.weight"
    r"|(?:\.processor)?\.(?P<old>to_q|to_k|to_v|to_out)_lora\.(?P<dir>down|up)\.weight"
    r"|\.(?P<alpha>alpha)"
    r")$"
)
_ROLES = {"A": "down", "B": "up"}
_OLD_TEXT_NAMES = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


def matches(keys: Iterable[str]) -> bool:
    """Tell whether keys are in one of this format's spellings."""
    starts = (*(f"{component}." for component in COMPONENTS), "down_blocks.", "up_blocks.", "mid_block.")
    return any(key.startswith(starts) and "lora" in key for key in keys)


def encode(
    where: str, weights: AdapterWeights, info: FamilyInfo, dtype: torch.dtype
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of a diffusers file, and the header entry with the alphas as trained.

    Raises:
        AdapterFileError: when values do not fit the number format.
    """
    tensors: dict[str, Tensor] = {}
    for module, pair in weights.items():
        at = f"{where}: module `{module.component}.{module.path}`"
        up = pair.up if pair.scale == 1.0 else folding.scaled(pair.up, pair.scale)
        key = f"{module.component}.{module.path}"
        tensors[f"{key}.lora_A.weight"] = folding.fitting(at, pair.down, dtype)
        tensors[f"{key}.lora_B.weight"] = folding.fitting(at, up, dtype)
    return tensors, {folding.RECORDED_ALPHAS: folding.recorded_alphas(weights), "format": "pt"}


def decode(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> AdapterWeights:
    """Return the adapter in a diffusers file of any spelling.

    Raises:
        AdapterFileError: listing keys that belong to no module, or naming an incomplete module.
    """
    groups: dict[ModuleKey, dict[str, Tensor]] = {}
    unknown: list[str] = []
    for key, tensor in tensors.items():
        parsed = parse_key(key)
        if parsed is None:
            unknown.append(key)
            continue
        module, role = parsed
        group = groups.setdefault(module, {})
        if role in group:
            raise AdapterFileError(
                f"{path}: module `{module.component}.{module.path}` is there twice (again as "
                f"`{shown(key)}`); the file mixes two spellings, export it again"
            )
        group[role] = tensor
    if unknown:
        raise foreign.unknown_keys(path, unknown)
    configs = _configs(path, metadata)
    originals = folding.original_alpha(path, metadata)
    pairs = {}
    for module, group in groups.items():
        where = f"{path}: module `{module.component}.{module.path}`"
        alpha = folding.alpha_value(where, group["alpha"]) if "alpha" in group else None
        pair = folding.pair_of(where, group.get("down"), group.get("up"), alpha)
        if alpha is None and module.component in configs:
            alpha = effective_alpha(where, configs[module.component], module, pair.rank)
            pair = folding.pair_of(where, pair.down, pair.up, alpha)
        pairs[module] = folding.restore(pair, module, originals)
    return AdapterWeights(pairs)


def parse_key(key: str) -> tuple[ModuleKey, str] | None:
    """Return (module, ``down`` | ``up`` | ``alpha``) of a key, or None if it is not of this format."""
    component, _, rest = key.partition(".")
    if component not in COMPONENTS:
        component, rest = "unet", key
        if key.split(".", 1)[0] not in names.UNET_ROOTS:
            return None
    match = _FACTOR.match(rest)
    if match is None:
        return None
    path = match["path"]
    if match["old"]:
        path += "." + (_old_name(match["old"], component))
    role = _ROLES.get(match["ab"] or "") or match["new"] or match["dir"] or match["alpha"]
    if component != "unet":
        path = names.with_text_prefix(path)
    elif names.is_ldm(path):
        return None
    return ModuleKey(component, path), role


def _old_name(name: str, component: str) -> str:
    if component != "unet":
        return _OLD_TEXT_NAMES[name]
    return "to_out.0" if name == "to_out" else name


def _configs(path: Path, metadata: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Return the PEFT settings of each component from diffusers' own header entry."""
    text = metadata.get(CONFIG_ENTRY)
    if text is None:
        return {}
    try:
        tree = json.loads(text)
    except (ValueError, RecursionError):
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
