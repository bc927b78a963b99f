"""From the parts of one module in a file to its update, whatever kind it is.

Plain pairs are the business of :mod:`.folding`; here are LoHa, LoKr, LoCon with Tucker factors, and the
magnitude that makes a DoRA of any of them. Parts and scale rules: formats.md 1.1 and 3.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

from torch import Tensor

from ..adapters.canonical import AdapterWeights, LowRankPair, ModuleKey, Update
from ..adapters.kinds import TITLES, DoRA, LoHa, LoKr, TuckerPair
from ..errors import AdapterFileError
from ..families.facts import is_text_encoder
from ..families.table import family_info
from ..tensor_file import FLOAT_DTYPES
from . import folding

LOHA_PARTS = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")
LOKR_PARTS = (
    *("lokr_w1", "lokr_w1_a", "lokr_w1_b"),
    *("lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
)
DORA_SCALE = "dora_scale"
MAGNITUDE = "magnitude"
"""PEFT's ``lora_magnitude_vector``, which is always that of output rows."""

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
    """Return the update that a module's parts make.

    Args:
        where: file and module, for messages.
        module: whose name tells the kernel of a convolution with flat factors.
        parts: tensors by part.
        alpha: as stored; None means the rank.
        scale: takes the place of alpha / rank.

    Raises:
        AdapterFileError: when parts are missing, belong to different kinds, or do not fit.
    """
    direction = _direction(where, module, parts, alpha)
    if scale is not None:
        direction = dataclasses.replace(direction, alpha=scale * direction.rank)  # type: ignore[type-var]
    if DORA_SCALE not in parts and MAGNITUDE not in parts:
        return direction
    magnitude = parts[DORA_SCALE] if DORA_SCALE in parts else parts[MAGNITUDE]
    if MAGNITUDE in parts or magnitude.ndim == 1:
        magnitude = magnitude.reshape(-1, *[1] * (len(direction.shape) - 1))
    _check_floats(where, [magnitude])
    try:
        return DoRA(direction, magnitude)
    except ValueError as error:
        raise _does_not_fit(where, error) from None


def with_projections(weights: AdapterWeights, family: str | None) -> AdapterWeights:
    """Return LoHa and LoKr of ``proj_in`` and ``proj_out`` as 1x1 convolutions where the family has these.

    Files hold the factors of a 1x1 convolution like those of a linear layer; in SD1 these are convolutions.
    """
    if weights.is_plain or family is None or not family_info(family).denoiser.conv_projections:
        return weights
    return AdapterWeights(
        {
            key: _pointwise(update) if _is_projection(key.path) else update
            for key, update in weights.updates.items()
        }
    )


def as_in_base(weights: AdapterWeights, family: str | None) -> AdapterWeights:
    """Return an adapter with layers that are or could be 1x1 convolutions in their family's own dimensions.

    ``proj_in`` and ``proj_out`` are convolutions in SD1 and linear in SD2 and SDXL. Some programs write the
    factors of one like those of the other: the WebUIs reshape them, kohya and diffusers refuse the file
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
    """Tell whether an update is that of a linear layer where the family has a 1x1 convolution, or reverse."""
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
    """Return an adapter as PEFT holds it: plain pairs, and the magnitudes that make them DoRA.

    Args:
        where: file, for messages.
        format: what users call it.
        weights: plain LoRA, or DoRA of plain pairs by output row.

    Returns:
        The pairs, and by module PEFT's ``lora_magnitude_vector``: (out,), for convolutions (1, out, 1, 1).

    Raises:
        AdapterFileError: for what the format has no place for, with the reason.
    """
    pairs: dict[ModuleKey, LowRankPair] = {}
    magnitudes: dict[ModuleKey, Tensor] = {}
    for module, update in weights.all_items():
        pair = update.direction if isinstance(update, DoRA) else update
        if not isinstance(pair, LowRankPair):
            raise AdapterFileError(
                f"{where}: `{module.component}.{module.path}` is {TITLES[pair.kind]}, which {format} "
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


def _direction(where: str, module: ModuleKey, parts: Mapping[str, Tensor], alpha: float | None) -> Update:
    plain = [part for part in ("down", "up", "mid") if part in parts]
    loha = [part for part in LOHA_PARTS if part in parts]
    lokr = [part for part in LOKR_PARTS if part in parts]
    kinds = [group for group in (plain, loha, lokr) if group]
    if len(kinds) > 1:
        raise AdapterFileError(
            f"{where}: mixes kinds (`{kinds[0][0]}` with `{kinds[1][0]}`); no program reads that, export it "
            "again"
        )
    if not loha and not lokr and "mid" not in parts:
        return folding.pair_of(where, parts.get("down"), parts.get("up"), alpha)
    factors = {part: parts[part] for part in (*plain, *loha, *lokr)}
    _check_floats(where, factors.values())
    try:
        if loha:
            return _loha(where, factors, alpha, _kernel(module))
        return _lokr(where, factors, alpha, _kernel(module)) if lokr else _tucker(where, factors, alpha)
    except ValueError as error:
        raise _does_not_fit(where, error) from None


def _loha(
    where: str, parts: Mapping[str, Tensor], alpha: float | None, kernel: tuple[int, int] | None
) -> LoHa:
    _require(where, parts, LOHA_PARTS[:4])
    t1 = parts.get("hada_t1")
    w1_b = parts["hada_w1_b"]
    return LoHa(
        parts["hada_w1_a"],
        w1_b,
        parts["hada_w2_a"],
        parts["hada_w2_b"],
        float(w1_b.shape[0]) if alpha is None else alpha,
        t1,
        parts.get("hada_t2"),
        kernel if t1 is None else None,
    )


def _lokr(
    where: str, parts: Mapping[str, Tensor], alpha: float | None, kernel: tuple[int, int] | None
) -> LoKr:
    for side in ("lokr_w1", "lokr_w2"):
        if side not in parts:
            _require(where, parts, (f"{side}_a", f"{side}_b"))
    flat = "lokr_w2_b" in parts and "lokr_t2" not in parts
    named = {part.removeprefix("lokr_"): tensor for part, tensor in parts.items()}
    update = LoKr(named.pop("w1", None), named.pop("w2", None), 1.0, **named, kernel=kernel if flat else None)
    return dataclasses.replace(update, alpha=float(update.rank) if alpha is None else alpha)


def _tucker(where: str, parts: Mapping[str, Tensor], alpha: float | None) -> TuckerPair:
    _require(where, parts, ("down", "up"))
    down = parts["down"]
    return TuckerPair(down, parts["mid"], parts["up"], float(down.shape[0]) if alpha is None else alpha)


def _require(where: str, parts: Mapping[str, Tensor], names: Iterable[str]) -> None:
    missing = [name for name in names if name not in parts]
    if missing:
        raise AdapterFileError(
            f"{where}: its `{missing[0]}` factor is missing; the file is incomplete, export it again"
        )


def _check_floats(where: str, tensors: Iterable[Tensor]) -> None:
    for tensor in tensors:
        if tensor.dtype not in FLOAT_DTYPES:
            raise AdapterFileError(f"{where}: has factors in {tensor.dtype}; save them as F16, BF16 or F32")
        if tensor.numel() == 0:
            raise AdapterFileError(f"{where}: has empty factors (rank 0); export the adapter again")


def _does_not_fit(where: str, error: ValueError) -> AdapterFileError:
    return AdapterFileError(f"{where}: {error}; the file is damaged, export it again")


def _kernel(module: ModuleKey) -> tuple[int, int] | None:
    if is_text_encoder(module.component):
        return None
    return next((size for ending, size in _KERNELS.items() if module.path.endswith(ending)), None)


def _is_projection(path: str) -> bool:
    return path.endswith((".proj_in", ".proj_out"))


def _pointwise(update: Update) -> Update:
    if isinstance(update, DoRA):
        return dataclasses.replace(update, direction=_pointwise(update.direction))
    if isinstance(update, LowRankPair | TuckerPair) or len(update.shape) == 4:
        return update
    assert isinstance(update, LoHa | LoKr)
    if isinstance(update, LoKr) and update.w2 is not None:
        return dataclasses.replace(update, w2=update.w2[:, :, None, None])
    return dataclasses.replace(update, kernel=(1, 1))
