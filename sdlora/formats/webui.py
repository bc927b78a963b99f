"""The WebUI (kohya) format: ``lora_unet_..._to_q.lora_down.weight``; the one every client reads.

Rules from formats.md sections 0 to 2: diffusers block names for SD1 and SD2 but the original ones for
SDXL, ``text_model_`` in every text-encoder key, a 0-dim float32 ``alpha`` for every module (rank 1 apart),
and one alpha per component wherever that costs nothing, because diffusers misreads files that mix them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..adapters.canonical import AdapterFile, AdapterWeights, LowRankPair, ModuleKey, WrappedUpdate
from ..adapters.kinds.full import Difference
from ..adapters.kinds.table import file_parts, kind_of, title_of
from ..errors import AdapterFileError
from ..tensor_file import write_tensors
from . import folding, hashes, keys, metadata, names, single_file
from .clients import webui_reasons
from .format_code import FormatCode, ReadBack, grouped, spelled
from .other_readers import through_diffusers

if TYPE_CHECKING:
    from ..families.facts import FamilyInfo


def encode(
    where: str, weights: AdapterWeights, info: FamilyInfo, dtype: torch.dtype
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of a WebUI file, and the header entries that undo folded scales.

    Raises:
        AdapterFileError: for a module that the format has no name for, or values that do not fit.
    """
    tensors: dict[str, Tensor] = {}
    taken: set[tuple[str, bool]] = set()
    plain, folded = weights.only_plain(), False
    wide = {part.factor for part in file_parts().values() if part.always_wide}
    for component in weights.components():
        pairs = plain.component(component)
        uniform, implied = _shared_alpha(pairs, dtype)
        for path, update in weights.updates_of(component).items():
            key = ModuleKey(component, path)
            module = _module_name(where, component, key.layer, info)
            if (module, key.is_bias) in taken:
                raise AdapterFileError(
                    f"{where}: two modules would both be named `{module}`; rename one of them in the adapter"
                )
            taken.add((module, key.is_bias))
            alpha, factors = update.alpha, update.tensors()
            if key.is_bias and not isinstance(update, Difference):
                raise AdapterFileError(
                    f"{where}: `{component}.{path}` is {title_of(update)} of a bias, which this format has "
                    "no place for; leave it out with --drop bias, or bake or merge the adapter with --base"
                )
            if path in pairs and uniform is not None and alpha != uniform:
                factors["lora_up.weight"] = folding.scaled(pairs[path].up, alpha / uniform)
                alpha, folded = uniform, True
            at = f"{where}: module `{component}.{path}`"
            for name, factor in factors.items():
                stored = torch.float32 if name in wide else dtype  # see DoRA.to
                tensors[f"{module}.{'diff_b' if key.is_bias else name}"] = folding.fitting(at, factor, stored)
            kind = kind_of(update.direction if isinstance(update, WrappedUpdate) else update)
            if kind.alpha_is_bound:
                tensors[f"{module}.alpha"] = torch.tensor(alpha, dtype=torch.float32)
            elif kind.stores_alpha and not (implied and path in pairs and update.rank == 1):
                tensors[f"{module}.alpha"] = folding.stored_alpha(at, alpha)
    return tensors, {folding.RECORDED_ALPHAS: folding.recorded_alphas(plain)} if folded else {}


def _shared_alpha(pairs: Mapping[str, LowRankPair], dtype: torch.dtype) -> tuple[float | None, bool]:
    """Return the alpha that all modules can share at no cost, and whether rank 1 goes without.

    No cost means no rounding, or none beyond the rounding that the number format needs anyway.

    stable-diffusion.cpp takes the input width for the rank of a rank-1 module with an alpha (formats.md 5.7),
    and every client takes a missing alpha for the rank. So if all can share alpha 1, rank-1 modules get none.
    Otherwise it is the smallest alpha, so that factors only grow: shrinking would make fp16 values subnormal.
    """

    def shares(alpha: float) -> bool:
        deviating = ((pair.up, pair.alpha / alpha) for pair in pairs.values() if pair.alpha != alpha)
        return all(
            folding.folds_freely(up, factor, dtype)
            if abs(factor) > 1.0
            else folding.folds_exactly(up, factor, dtype)
            for up, factor in deviating
        )

    if any(pair.rank == 1 for pair in pairs.values()) and shares(1.0):
        return 1.0, True
    least = min((pair.alpha for pair in pairs.values()), key=abs, default=1.0)
    return (least if shares(least) else None), False


def _module_name(where: str, component: str, path: str, info: FamilyInfo) -> str:
    prefix = info.file_prefixes.get(component)
    if prefix is None:
        raise AdapterFileError(
            f"{where}: the adapter has modules in `{component}`, which {info.title} does not have; "
            "choose the base model that it was trained on"
        )
    spelled: str | None = path
    if component == info.denoiser.component and info.denoiser.webui_names == "ldm":
        spelled = names.to_ldm(path)
    name = f"{prefix.removesuffix('_')}_{names.to_underscores(spelled)}" if spelled else ""
    if keys.webui_module(name) != ModuleKey(component, path):
        raise AdapterFileError(
            f"{where}: module `{component}.{path}` has no name in the WebUI format; "
            "export as diffusers or peft, or train without it"
        )
    return name


def write(adapter: AdapterFile, target: Path, dtype: torch.dtype, info: FamilyInfo) -> list[Path]:
    """Write a file atomically and return it."""
    tensors, more = encode(str(target), adapter.weights, info, dtype)
    tensors |= {key: tensor.contiguous() for key, tensor in adapter.embeddings.items()}
    entries = metadata.for_file(adapter, info, more)
    write_tensors(target, tensors, hashes.with_hashes(tensors, entries))
    return [target]


CODE = FormatCode(
    write,
    spelled("webui"),
    grouped,
    single_file.read_modules,
    webui_reasons,
    read_back=ReadBack("diffusers", through_diffusers),
    holds_embeddings=True,
)
