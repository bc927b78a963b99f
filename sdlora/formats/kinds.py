"""From the parts of one module in a file to its update, whatever its kind.

The kind follows from the parts that are present, by the table of kinds. Parts and scale rules:
formats.md 1.1 and 3.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..adapters.canonical import AdapterWeights, LowRankPair, ModuleKey, Update
from ..adapters.kinds.dora import DoRA
from ..adapters.kinds.kind import AdapterKind
from ..adapters.kinds.table import KINDS, title_of
from ..errors import AdapterFileError
from ..families.facts import is_text_encoder
from ..families.table import family_info

_KERNELS = {
    **{ending: (3, 3) for ending in (".conv1", ".conv2", ".conv", "conv_in", "conv_out")},
    ".conv_shortcut": (1, 1),
}


def update_of(
    where: str,
    module: ModuleKey,
    parts: Mapping[str, Tensor],
    alpha: float | None,
    scale: float | None = None,
) -> Update:
    """Return the update that a module's parts make up.

    Args:
        where: file and module, for messages.
        module: its name tells the kernel of a convolution with flat factors.
        parts: tensors by part.
        alpha: as stored; None means the rank.
        scale: used instead of alpha / rank, if given.

    Raises:
        AdapterFileError: when parts are missing, belong to different kinds, or do not fit.
    """
    kind = _kind_of_parts(where, parts)
    assert kind.build is not None
    mine = {part.name: parts[part.name] for part in kind.parts if part.name in parts}
    update: Update = kind.build(where, mine, alpha, _kernel(module))
    if scale is not None:
        update = dataclasses.replace(update, alpha=scale * update.rank)  # type: ignore[type-var]
    for wrapper in KINDS.values():
        if wrapper.wrap is not None and any(part.name in parts for part in wrapper.parts):
            update = wrapper.wrap(where, update, parts)
    return update


def with_projections(weights: AdapterWeights, family: str | None) -> AdapterWeights:
    """Return LoHa and LoKr of ``proj_in`` and ``proj_out`` as 1x1 convolutions if the family has these.

    Files hold the factors of a 1x1 convolution like those of a linear layer; in SD1 they are convolutions.
    """
    if weights.is_plain or family is None or not family_info(family).denoiser.conv_projections:
        return weights
    return AdapterWeights(
        {
            key: update.pointwise() if _is_projection(key.path) else update
            for key, update in weights.updates.items()
        }
    )


def as_in_base(weights: AdapterWeights, family: str | None) -> AdapterWeights:
    """Return an adapter whose ``proj_in`` and ``proj_out`` have the number of dimensions of its family.

    ``proj_in`` and ``proj_out`` are convolutions in SD1 and linear in SD2 and SDXL. Some programs write the
    factors of one like those of the other: the WebUIs reshape them, but kohya and diffusers refuse the file
    (formats.md 1.2).
    """
    weights = with_projections(weights, family)
    if family is None:
        return weights
    odd = {
        key: pair
        for key, pair in weights.only_plain().items()
        if wrong_dimensions(key.path, pair.shape, family)
    }
    if not odd:
        return weights
    return AdapterWeights({**weights.updates, **{key: _other_dimensions(pair) for key, pair in odd.items()}})


def wrong_dimensions(path: str, shape: tuple[int, ...], family: str) -> bool:
    """Tell whether an update is linear but its layer in the family is a 1x1 convolution, or vice versa."""
    convolves = family_info(family).denoiser.conv_projections
    if path.endswith(".conv_shortcut") or (_is_projection(path) and convolves):
        return len(shape) == 2
    return _is_projection(path) and shape[2:] == (1, 1)


def _other_dimensions(pair: LowRankPair) -> LowRankPair:
    if pair.down.ndim == 4:
        return LowRankPair(pair.down[:, :, 0, 0], pair.up[:, :, 0, 0], pair.alpha)
    return LowRankPair(pair.down[:, :, None, None], pair.up[:, :, None, None], pair.alpha)


def as_low_rank(
    where: str, format: str, weights: AdapterWeights
) -> tuple[AdapterWeights, dict[ModuleKey, Tensor]]:
    """Return an adapter as PEFT stores it: plain pairs, and the magnitudes that make them DoRA.

    Args:
        where: file, for messages.
        format: what users call it.
        weights: plain LoRA, or DoRA of plain pairs by output row.

    Returns:
        The pairs, and by module PEFT's ``lora_magnitude_vector``: (out,), for convolutions (1, out, 1, 1).

    Raises:
        AdapterFileError: for what the format cannot hold, with the reason.
    """
    pairs: dict[ModuleKey, LowRankPair] = {}
    magnitudes: dict[ModuleKey, Tensor] = {}
    for module, update in weights.all_items():
        pair = update.direction if isinstance(update, DoRA) else update
        if not isinstance(pair, LowRankPair):
            raise AdapterFileError(
                f"{where}: `{module.component}.{module.path}` is {title_of(pair)}, which {format} "
                "has no place for; export as webui, or convert the adapter to a plain LoRA first"
            )
        pairs[module] = pair
        if isinstance(update, DoRA):
            if not update.by_output:
                raise AdapterFileError(
                    f"{where}: `{module.component}.{module.path}` is a DoRA by input column, but "
                    f"{format} knows only those by output row; export as webui"
                )
            shape = (-1,) if len(update.shape) == 2 else (1, -1, 1, 1)
            magnitudes[module] = update.magnitude.reshape(shape)
    components = {module.component for module in magnitudes}
    plain = next(
        (key for key in sorted(pairs) if key.component in components and key not in magnitudes), None
    )
    if plain is not None:
        raise AdapterFileError(
            f"{where}: `{plain.component}.{plain.path}` is a plain LoRA beside DoRA layers, but "
            f"{format} makes all layers of a component DoRA or none; export as webui"
        )
    return AdapterWeights(pairs), magnitudes


def _kind_of_parts(where: str, parts: Mapping[str, Tensor]) -> AdapterKind[Any]:
    """Return the kind that a module's parts make, apart from parts that come on top of another kind's.

    Raises:
        AdapterFileError: when they belong to different kinds.
    """
    present: dict[tuple[str, ...], AdapterKind[Any]] = {}
    for kind in KINDS.values():
        if kind.wrap is None and (names := tuple(part.name for part in kind.parts if part.name in parts)):
            present.setdefault(names, kind)
    # down and up alone are LoRA's; with a core, all three are Tucker's
    most = [names for names in present if not any(set(names) < set(other) for other in present)]
    if len(most) > 1:
        raise AdapterFileError(
            f"{where}: mixes kinds (`{most[0][0]}` with `{most[1][0]}`); no program reads that, export it "
            "again"
        )
    return present[most[0]] if most else KINDS[LowRankPair.kind]


def _kernel(module: ModuleKey) -> tuple[int, int] | None:
    if is_text_encoder(module.component):
        return None
    return next((size for ending, size in _KERNELS.items() if module.path.endswith(ending)), None)


def _is_projection(path: str) -> bool:
    return path.endswith((".proj_in", ".proj_out"))
