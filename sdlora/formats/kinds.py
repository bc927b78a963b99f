"""From the parts of one module in a file to its update, whatever its kind.

The kind follows from the parts that are present, by the table of kinds. Parts and scale rules:
formats.md 1.1 and 3.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..adapters.canonical import AdapterWeights, LowRankPair, ModuleKey, Update
from ..adapters.kinds.dora import DoRA
from ..adapters.kinds.full import Difference
from ..adapters.kinds.kind import AdapterKind
from ..adapters.kinds.table import KINDS, title_of
from ..errors import AdapterFileError
from ..families.facts import is_text_encoder
from ..families.layer_shapes import kernel_by_name

_EMBEDDINGS = "text_model.embeddings."
"""Where text encoders have tables of words and positions, which no client adapts like a layer."""


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
    kernel = None if is_text_encoder(module.component) else kernel_by_name(module.path)
    mine = {part.name: parts[part.name] for part in kind.parts if part.name in parts}
    update: Update = kind.build(where, mine, alpha, kernel)
    if scale is not None and update.has_rank:
        update = dataclasses.replace(update, alpha=scale * update.rank)  # type: ignore[type-var]
    elif scale is not None and not kind.alpha_is_bound:  # WebUI multiplies any other update by it, too
        update = update.with_tensors({name: times(t, scale) for name, t in update.tensors().items()})
    for wrapper in KINDS.values():
        if wrapper.wrap is not None and any(part.name in parts for part in wrapper.parts):
            update = wrapper.wrap(where, update, parts)
    return update


def times(tensor: Tensor, factor: float) -> Tensor:
    """Return tensor * factor, float32 or wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32)) * factor


@dataclasses.dataclass(frozen=True)
class AsPeft:
    """An adapter as PEFT stores it.

    Attributes:
        weights: plain pairs.
        magnitudes: what makes them DoRA, PEFT's ``lora_magnitude_vector``: (out,), for convolutions
            (1, out, 1, 1).
        biases: layer -> (out,), what it adds to the layer's bias; all layers of a component or none.
    """

    weights: AdapterWeights
    magnitudes: dict[ModuleKey, Tensor]
    biases: dict[ModuleKey, Tensor]


def as_low_rank(where: str, format: str, weights: AdapterWeights) -> AsPeft:
    """Return an adapter as PEFT stores it.

    Args:
        where: file, for messages.
        format: what users call it.
        weights: plain LoRA, or DoRA of plain pairs by output row; a difference of a bias has a place beside a
            plain pair of the same layer (``lora_bias``).

    Raises:
        AdapterFileError: for what the format cannot hold, with the reason.
    """
    pairs: dict[ModuleKey, LowRankPair] = {}
    magnitudes: dict[ModuleKey, Tensor] = {}
    dora = {key.component for key, update in weights.updates.items() if isinstance(update, DoRA)}
    biases: dict[ModuleKey, Tensor] = {}
    for module, update in weights.all_items():
        layer = ModuleKey(module.component, module.layer)
        has_place = module.component not in dora and isinstance(weights.updates.get(layer), LowRankPair)
        if module.is_bias and isinstance(update, Difference) and has_place:
            biases[layer] = update.delta()
            continue
        pair = update.direction if isinstance(update, DoRA) else update
        word = drop_word(module, pair)
        if not isinstance(pair, LowRankPair) or word == "embedding":
            what = f"{title_of(pair)} of an embedding" if word == "embedding" else title_of(pair)
            raise AdapterFileError(
                f"{where}: `{module.component}.{module.path}` is {what}, which {format} "
                f"has no place for; export as webui, {_way_out(module, pair)}"
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
    plain = next((key for key in sorted(pairs) if key.component in dora and key not in magnitudes), None)
    if plain is not None:
        raise AdapterFileError(
            f"{where}: `{plain.component}.{plain.path}` is a plain LoRA beside DoRA layers, but "
            f"{format} makes all layers of a component DoRA or none; export as webui"
        )
    biased = {layer.component for layer in biases}
    none = {key: torch.zeros(pair.shape[0]) for key, pair in pairs.items() if key.component in biased}
    return AsPeft(AdapterWeights(dict(pairs)), magnitudes, {**none, **biases})


def _way_out(module: ModuleKey, update: Update) -> str:
    """Return what else can be done about an update that a format has no place for."""
    word = drop_word(module, update)
    drop = f"leave such layers out with --drop {word}"
    return (
        drop
        if len(update.shape) == 1 or word == "embedding"
        else f"convert the adapter to a plain LoRA first, or {drop}"
    )


def drop_word(module: ModuleKey, update: Update) -> str:
    """Return the word after ``--drop`` that leaves an update out."""
    if _EMBEDDINGS in module.path:
        return "embedding"
    if module.is_bias:
        return "norm" if "norm" in module.layer.rpartition(".")[2] else "bias"
    return "norm" if len(update.shape) == 1 else update.kind


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
