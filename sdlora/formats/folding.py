"""Moving a module's scale between ``alpha`` and the values of ``up``.

Some formats hold no alpha, and diffusers misreads files with several alphas in one component. In these cases
the scale is multiplied into ``up``. The alphas as trained are kept in the header entry
:data:`RECORDED_ALPHAS`, from which our own reader restores what was trained.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..adapters.canonical import AdapterWeights, LowRankPair, ModuleKey, Update, WrappedUpdate
from ..adapters.kinds.table import file_parts
from ..errors import AdapterFileError, shown
from ..number_formats import writable_dtypes
from ..tensor_file import all_finite, entry_json

RECORDED_ALPHAS = "sdlora.alphas"
"""Our header entry with the alphas as trained."""
CONFIG_ENTRY = "lora_adapter_metadata"
"""Diffusers' header entry with PEFT settings, alphas among them."""


def check_sides(where: str, tensors: Mapping[str, Tensor]) -> None:
    """Refuse a factor that is a single number, before code that asks for its rank.

    Raises:
        AdapterFileError: naming the part.
    """
    parts = file_parts()
    for part, tensor in tensors.items():
        if tensor.ndim == 0 and not (part in parts and parts[part].is_number):
            raise AdapterFileError(
                f"{where}: its `{part}` factor is a single number; the file is damaged, export it again"
            )


def alpha_value(where: str, tensor: Tensor) -> float:
    """Return the number in an alpha tensor, as the shortest decimal number with the same float32 value.

    So 12.7 is read as 12.7 and not as 12.69999980926514, and settings survive a round trip.

    Raises:
        AdapterFileError: when it is not one finite number.
    """
    if tensor.numel() != 1:
        raise AdapterFileError(f"{where}: alpha has {tensor.numel()} values instead of one; export it again")
    value = float(tensor.reshape(()).to(torch.float64))
    if not math.isfinite(value):
        raise AdapterFileError(f"{where}: alpha is {value}; export it again with a finite one")
    if tensor.dtype == torch.float32:
        return next(
            short for digits in range(1, 10) if _is_float32(short := float(f"{value:.{digits}g}"), value)
        )
    return value


def stored_alpha(where: str, alpha: float) -> Tensor:
    """Return alpha as a 0-dim float32 tensor (clients call ``.item()``; half formats would round it).

    Raises:
        AdapterFileError: when it becomes zero or infinity in float32.
    """
    tensor = torch.tensor(alpha, dtype=torch.float32)
    if tensor == 0 or not bool(torch.isfinite(tensor)):
        raise AdapterFileError(f"{where}: alpha {alpha} cannot be stored; clients need one that is not 0")
    return tensor


def without_zero_alphas(weights: AdapterWeights) -> AdapterWeights:
    """Return an adapter whose layers that alpha 0 switches off are zero by their factors.

    Clients read an alpha of 0 differently: as nothing, or as the rank.
    """
    return AdapterWeights(
        {
            key: _off(update) if update.has_rank and update.alpha == 0.0 else update
            for key, update in weights.updates.items()
        }
    )


def _off(update: Update) -> Update:
    if isinstance(update, WrappedUpdate):
        return update.around(_off(update.direction))
    kept = {"lora_down.weight"}
    zeros = {n: t if n in kept else torch.zeros_like(t) for n, t in update.tensors().items()}
    return dataclasses.replace(update.with_tensors(zeros), alpha=float(update.rank))  # type: ignore[type-var]


def times(update: Update, factor: float) -> Update:
    """Return an update, of a single tensor, times a number."""
    if factor == 1.0:
        return update
    return update.with_tensors({name: scaled(tensor, factor) for name, tensor in update.tensors().items()})


def is_zero(update: Update) -> bool:
    """Tell whether an update, of a single tensor, is all zeros; False while its values are not known.

    PEFT has a bias for all layers of a component or for none, so most may be zeros, also those of layers
    without a bias in the base.
    """
    return not any(tensor.is_meta or bool(tensor.any()) for tensor in update.tensors().values())


def scaled(tensor: Tensor, factor: float) -> Tensor:
    """Return tensor * factor with one rounding to float32 (float64 stays float64)."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32)) * factor


def own_dtype(weights: AdapterWeights) -> torch.dtype:
    """Return the number format that an adapter's factors are stored in; float32 if there are several.

    For pairs it is that of ``down``: ``up`` may have been widened to divide a folded scale out of it again.
    Magnitudes on top of another update are always float32 and tell nothing.
    """
    dtypes: set[torch.dtype] = set()
    wide = {part.factor for part in file_parts().values() if part.always_wide}
    for update in weights.updates.values():
        inner = update.direction if isinstance(update, WrappedUpdate) else update
        tensors = {"": inner.down} if isinstance(inner, LowRankPair) else inner.tensors()
        dtypes |= {tensor.dtype for name, tensor in tensors.items() if name not in wide}
    return dtypes.pop() if len(dtypes) == 1 and dtypes <= set(writable_dtypes()) else torch.float32


def is_power_of_two(value: float) -> bool:
    """Tell whether multiplying by ``value`` only changes the exponent."""
    return value != 0.0 and abs(math.frexp(value)[0]) == 0.5


def unfold(up: Tensor, factor: float) -> Tensor:
    """Return ``up / factor``: in its own number format if that is exact, else in float32."""
    wide = scaled(up, 1.0 / factor) if is_power_of_two(factor) else up.to(torch.float32) / factor
    narrow = wide.to(up.dtype)
    if is_power_of_two(factor) and torch.equal(scaled(narrow, factor), scaled(up, 1.0)):
        return narrow
    return wide


def folds_exactly(up: Tensor, factor: float, dtype: torch.dtype) -> bool:
    """Tell whether ``up`` in ``dtype`` can be multiplied by ``factor`` and back without any rounding."""
    if not is_power_of_two(factor):
        return False
    stored = up.to(dtype)
    folded = scaled(stored, factor).to(dtype)
    return torch.equal(unfold(folded, factor).to(dtype), stored)


def folds_freely(up: Tensor, factor: float, dtype: torch.dtype) -> bool:
    """Tell whether storing ``up * factor`` in ``dtype`` rounds no more than storing ``up`` itself does.

    This is so if neither needs rounding, and if ``up`` has to be rounded anyway.
    """
    if factor == 1.0:
        return True
    if torch.equal(up.to(dtype).to(up.dtype), up):
        return folds_exactly(up, factor, dtype)
    return all_finite(scaled(up, factor).to(dtype))


def common(values: Iterable[float]) -> float:
    """Return the most frequent value; of equally frequent ones the largest."""
    counts = Counter(values)
    return max(counts, key=lambda value: (counts[value], value))


def recorded_alphas(weights: AdapterWeights) -> str:
    """Return all alphas as JSON: the usual one of each component, and the modules that differ."""
    entries: dict[str, float] = {}
    for component in weights.components():
        pairs = weights.component(component)
        entries[component] = usual = common(pair.alpha for pair in pairs.values())
        entries.update({f"{component}.{path}": p.alpha for path, p in pairs.items() if p.alpha != usual})
    return json.dumps(entries, separators=(",", ":"))


def original_alpha(path: Path, metadata: Mapping[str, str]) -> Mapping[str, float]:
    """Return the alphas that :func:`recorded_alphas` wrote; empty if there are none.

    Raises:
        AdapterFileError: when the entry is not what we write.
    """
    text = metadata.get(RECORDED_ALPHAS)
    if text is None:
        return {}
    try:
        entries = entry_json(text)
        valid = isinstance(entries, dict) and all(
            isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) and abs(v) > 1e-30
            for v in entries.values()
        )
    except (ValueError, OverflowError):
        entries, valid = None, False
    if not valid or not isinstance(entries, dict):
        raise AdapterFileError(
            f"{path}: header entry `{RECORDED_ALPHAS}` is `{shown(text, 60)}`, not a list of alphas; "
            "the file was changed by another program, export it again"
        )
    return {name: float(value) for name, value in entries.items()}


def restore(pair: LowRankPair, module: ModuleKey, originals: Mapping[str, float]) -> LowRankPair:
    """Return the pair with the alpha it was trained with; its delta stays the same."""
    alpha = originals.get(f"{module.component}.{module.path}", originals.get(module.component))
    if alpha is None or alpha == pair.alpha or pair.alpha == 0.0:
        return pair
    if _is_float32(alpha, float(torch.tensor(pair.alpha, dtype=torch.float32))):
        return LowRankPair(pair.down, pair.up, alpha)  # the same value, as far as the file's float32 tells
    return LowRankPair(pair.down, unfold(pair.up, alpha / pair.alpha), alpha)


def fitting(where: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the tensor in ``dtype``, contiguous.

    Raises:
        AdapterFileError: when a value is not finite, or too large for the number format.
    """
    if not all_finite(tensor):
        raise AdapterFileError(f"{where}: holds NaN or infinite values; use an earlier checkpoint of the run")
    result = tensor.detach().to("cpu", dtype).contiguous()
    if not all_finite(result):
        largest = float(tensor.abs().max())
        raise AdapterFileError(
            f"{where}: the value {largest:.3g} is too large for {str(dtype).removeprefix('torch.')}; "
            "export with bf16 or fp32"
        )
    return result


def _is_float32(candidate: float, value: float) -> bool:
    return float(torch.tensor(candidate, dtype=torch.float32)) == value
