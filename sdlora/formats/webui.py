"""The WebUI (kohya) format: ``lora_unet_..._to_q.lora_down.weight``; the one every client reads.

Rules from FORMATS.md sections 0 to 2: diffusers block names for SD1 and SD2 but the original ones for
SDXL, ``text_model_`` in every text-encoder key, a 0-dim float32 ``alpha`` for every module, and one alpha
per component wherever that needs no rounding, because diffusers misreads files that mix them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..adapters.base import AdapterWeights, LowRankPair, ModuleKey
from ..errors import AdapterFileError
from . import folding, foreign, names

if TYPE_CHECKING:
    from ..families.base import FamilyInfo

PREFIXES = {
    "lora_unet_": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
}
_SUFFIXES = {
    "lora_down.weight": "down",
    "lora_up.weight": "up",
    "lora_A.weight": "down",
    "lora_B.weight": "up",
    "alpha": "alpha",
    "scale": "scale",
}


def matches(keys: Iterable[str]) -> bool:
    """Tell whether keys are in this format."""
    return any(key.startswith(tuple(PREFIXES)) for key in keys)


def encode(
    where: str, weights: AdapterWeights, info: FamilyInfo, dtype: torch.dtype
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of a WebUI file, and header entries that undo foldings.

    Raises:
        AdapterFileError: for a module that the format has no name for, or values that do not fit.
    """
    tensors: dict[str, Tensor] = {}
    folded = False
    for component in weights.components():
        pairs = weights.component(component)
        uniform = _uniform_alpha(pairs, dtype)
        for path, pair in pairs.items():
            module = _module_name(where, component, path, info)
            if module + ".alpha" in tensors:
                raise AdapterFileError(
                    f"{where}: two modules would both be named `{module}`; rename one of them in the adapter"
                )
            alpha, up = pair.alpha, pair.up
            if uniform is not None and alpha != uniform:
                alpha, up = uniform, folding.scaled(up, pair.alpha / uniform)
                folded = True
            at = f"{where}: module `{component}.{path}`"
            tensors[f"{module}.lora_down.weight"] = folding.fitting(at, pair.down, dtype)
            tensors[f"{module}.lora_up.weight"] = folding.fitting(at, up, dtype)
            tensors[f"{module}.alpha"] = folding.stored_alpha(at, alpha)
    return tensors, {folding.RECORDED_ALPHAS: folding.recorded_alphas(weights)} if folded else {}


def decode(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> AdapterWeights:
    """Return the adapter in a WebUI file.

    Raises:
        AdapterFileError: listing keys that belong to no module, or naming an incomplete module.
    """
    groups: dict[ModuleKey, dict[str, Tensor]] = {}
    unknown: list[str] = []
    for key, tensor in tensors.items():
        name, _, suffix = key.partition(".")
        module, role = module_key(name), _SUFFIXES.get(suffix)
        if module is None or role is None:
            unknown.append(key)
            continue
        group = groups.setdefault(module, {})
        if role in group:
            raise AdapterFileError(
                f"{path}: module `{module.component}.{module.path}` is there twice (again as "
                f"`{foreign.listing([key])}`); the file mixes two namings, export it again"
            )
        group[role] = tensor
    if unknown:
        raise foreign.unknown_keys(path, unknown)
    originals = folding.original_alpha(path, metadata)
    pairs = {}
    for module, group in groups.items():
        where = f"{path}: module `{module.component}.{module.path}`"
        pairs[module] = folding.restore(_pair(where, group), module, originals)
    return AdapterWeights(pairs)


def module_key(name: str) -> ModuleKey | None:
    """Return the module a key names (the part before its first dot), or None if there is no such."""
    for prefix, component in PREFIXES.items():
        if not name.startswith(prefix):
            continue
        path = names.to_dots(name.removeprefix(prefix))
        if path is None:
            return None
        if component == "unet":
            path = names.from_ldm(path) if names.is_ldm(path) else path
            valid = path is not None and path.split(".", 1)[0] in names.UNET_ROOTS
            return ModuleKey(component, path) if path is not None and valid else None
        if path.split(".", 1)[0] in (*names.UNET_ROOTS, "input_blocks", "middle_block", "output_blocks"):
            return None
        return ModuleKey(component, names.with_text_prefix(path))
    return None


def _pair(where: str, group: Mapping[str, Tensor]) -> LowRankPair:
    alpha = folding.alpha_value(where, group["alpha"]) if "alpha" in group else None
    pair = folding.pair_of(where, group.get("down"), group.get("up"), alpha)
    if "scale" in group:  # WebUI and stable-diffusion.cpp: takes the place of alpha / rank
        return LowRankPair(pair.down, pair.up, folding.alpha_value(where, group["scale"]) * pair.rank)
    return pair


def _uniform_alpha(pairs: Mapping[str, LowRankPair], dtype: torch.dtype) -> float | None:
    """Return the alpha that all modules can share without any rounding, if there is one.

    It is the smallest one, so that factors only grow: shrinking would make some fp16 values subnormal.
    """
    least = min((pair.alpha for pair in pairs.values()), key=abs)
    deviating = [pair for pair in pairs.values() if pair.alpha != least]
    exact = all(folding.folds_exactly(pair.up, pair.alpha / least, dtype) for pair in deviating)
    return least if exact else None


def _module_name(where: str, component: str, path: str, info: FamilyInfo) -> str:
    prefix = info.file_prefixes.get(component)
    if prefix is None:
        raise AdapterFileError(
            f"{where}: the adapter has modules in `{component}`, which {info.title} does not have; "
            "choose the base model that it was trained on"
        )
    spelled: str | None = path
    if component == "unet" and info.unet_naming == "ldm":
        spelled = names.to_ldm(path)
    name = f"{prefix.removesuffix('_')}_{names.to_underscores(spelled)}" if spelled else ""
    if module_key(name) != ModuleKey(component, path):
        raise AdapterFileError(
            f"{where}: module `{component}.{path}` has no name in the WebUI format; "
            "export as diffusers or peft, or train without it"
        )
    return name
