"""LoHa and LoKr in PEFT folders: the settings with which PEFT makes factors of just these shapes.

PEFT knows no shapes of factors from a file; it makes them from its settings and then loads values into them.
So a folder can hold what those settings can say, and anything else is refused with the reason.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..adapters.canonical import Update
from ..adapters.kinds import LoHa, LoKr
from ..errors import AdapterFileError
from .folding import common

PEFT_TYPES = {"LORA": ("lora", "dora"), "LOHA": ("loha",), "LOKR": ("lokr",)}
"""``peft_type`` -> kinds of update in such a folder."""


def settings_of(where: str, updates: Mapping[str, Update], spelled: Mapping[str, str]) -> dict[str, Any]:
    """Return PEFT's settings for the LoHa or LoKr layers of one component.

    Args:
        where: file and component, for messages.
        updates: by canonical path, all LoHa or all LoKr.
        spelled: canonical path -> name of the module in the model.

    Raises:
        AdapterFileError: for factors that PEFT's settings cannot describe.
    """
    lohas = {path: update for path, update in updates.items() if isinstance(update, LoHa)}
    lokrs = {path: update for path, update in updates.items() if isinstance(update, LoKr)}
    if len(lohas) not in (0, len(updates)) or len(lohas) + len(lokrs) != len(updates):
        raise AdapterFileError(
            f"{where}: mixes kinds of layers, but a PEFT folder holds one kind; export as webui"
        )
    spatial = {path: update for path, update in updates.items() if update.shape[2:] not in ((), (1, 1))}
    cores = {loha.t1 is not None for path, loha in lohas.items() if path in spatial}
    cores |= {lokr.t2 is not None for path, lokr in lokrs.items() if path in spatial and lokr.w2 is None}
    if len(cores) > 1:
        raise AdapterFileError(
            f"{where}: only some convolutions have Tucker factors, PEFT makes all or none; export as webui"
        )
    more: dict[str, Any] = {}
    if lokrs:
        more = {"decompose_both": False, "decompose_factor": _decompose_factor(where, lokrs)}
    ranks = {path: _peft_rank(update) for path, update in updates.items()}
    alphas = {
        path: _whole(
            update.alpha
            if ranks[path] == update.rank and not _is_full(update)
            else ranks[path] * update.scale
        )
        for path, update in updates.items()
    }
    rank, alpha = int(common(ranks.values())), _whole(common(alphas.values()))
    return {
        "peft_type": "LOHA" if lohas else "LOKR",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": rank,
        "alpha": alpha,
        "rank_dropout": 0.0,
        "module_dropout": 0.0,
        "use_effective_conv2d": True in cores,
        "target_modules": sorted(spelled[path] for path in updates),
        "rank_pattern": {f"^{spelled[path]}": value for path, value in ranks.items() if value != rank},
        "alpha_pattern": {f"^{spelled[path]}": value for path, value in alphas.items() if value != alpha},
        **more,
    }


def _is_full(update: Update) -> bool:
    return isinstance(update, LoKr) and update.is_full


def _peft_rank(update: Update) -> int:
    """Return PEFT's rank; where LoKr's second factor is full, one that makes PEFT leave it whole."""
    if isinstance(update, LoKr) and update.w2 is not None:
        return max(update.w2.shape[:2])
    return update.rank


def _decompose_factor(where: str, updates: Mapping[str, LoKr]) -> int:
    """Return the setting with which PEFT splits the sides of all layers as they are split here."""
    from peft.tuners.lokr.layer import factorization

    split: Callable[[int, int], tuple[int, int]] = factorization
    sides: list[tuple[str, int, int]] = []
    for path, lokr in updates.items():
        if lokr.w1 is None:
            raise AdapterFileError(
                f"{where}: `{path}` has its first factor decomposed, which PEFT does for all layers or none; "
                "export as webui"
            )
        sides += [(path, lokr.shape[axis], lokr.w1.shape[axis]) for axis in (0, 1)]
    candidates: Sequence[int] = [-1, *sorted({first for _, _, first in sides}, reverse=True)]
    for factor in candidates:
        if all(split(size, factor)[0] == first for _, size, first in sides):
            return _checked(where, updates, factor)
    path = next(path for path, size, first in sides if split(size, -1)[0] != first)
    raise AdapterFileError(f"{where}: `{path}` is split otherwise than PEFT would split it; export as webui")


def _checked(where: str, updates: Mapping[str, LoKr], factor: int) -> int:
    for path, lokr in updates.items():
        if lokr.w1 is None or lokr.w2 is not None:
            continue
        largest = max(lokr.shape[axis] // lokr.w1.shape[axis] for axis in (0, 1))
        if lokr.rank >= largest / 2:
            raise AdapterFileError(
                f"{where}: `{path}` is decomposed at rank {lokr.rank}, where PEFT keeps the whole factor; "
                "export as webui"
            )
    return factor


def _whole(value: float) -> int | float:
    return int(value) if math.isfinite(value) and value == int(value) else value
