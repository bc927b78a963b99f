"""Proof that a written adapter file holds what it should: every update compared, element by element.

Updates are compared in float32. The allowed difference is not a guess: it follows from rounding each
factor once to the file's number format.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import formats
from ..adapters.base import AdapterWeights, LowRankPair, ModuleKey
from ..errors import AdapterFileError
from . import names
from .clients import Support, client_support

if TYPE_CHECKING:
    from ..families.base import FamilyInfo


@dataclass(frozen=True)
class Proof:
    """What comparing a written adapter with its source gave.

    Attributes:
        num_modules: modules compared, which is all of them.
        num_keys: tensors in the file or files.
        largest_difference: of any element of any update, absolute.
        relative_difference: largest difference of a module over the largest sum of |up| |down| in it.
        tolerance: relative difference that rounding to the number format allows.
        read_by: the readers the file was loaded through.
    """

    num_modules: int
    num_keys: int
    largest_difference: float
    relative_difference: float
    tolerance: float
    read_by: tuple[str, ...]


def prove(
    weights: AdapterWeights, path: Path, format: str, dtype: torch.dtype, info: FamilyInfo
) -> tuple[Proof, tuple[Support, ...]]:
    """Read an adapter back and compare every module with what it should be.

    WebUI and diffusers files are also read through diffusers' own conversion, unless diffusers is known
    to misread adapters of this shape (then the second result says so).

    Raises:
        AdapterFileError: when a module is missing or differs by more than rounding.
    """
    headers = formats.read_headers(path)
    keys = [key for header in headers for key in header.tensors]
    back = formats.read_adapter(path).weights
    largest, relative = compare(weights, back, dtype, str(path))
    readers = ["sdlora"]
    clients = client_support(format, info.name, formats.weights_as_stored(path), keys)
    by_diffusers = next(one for one in clients if one.client == "diffusers")
    if by_diffusers.full:
        seen = read_through_diffusers(path, info)
        more = compare(weights, seen, dtype, f"{path} (read by diffusers)")
        largest, relative = max(largest, more[0]), max(relative, more[1])
        readers.append("diffusers")
    rank = max(weights.ranks())
    proof = Proof(len(back), len(keys), largest, relative, relative_rounding(dtype, rank), tuple(readers))
    return proof, clients


def compare(
    wanted: AdapterWeights, written: AdapterWeights, dtype: torch.dtype, where: str
) -> tuple[float, float]:
    """Return the largest absolute and relative difference between two adapters' updates.

    Raises:
        AdapterFileError: when a module is missing or added, or an element differs by more than rounding
            both factors to ``dtype`` can cause.
    """
    missing = set(wanted.pairs) ^ set(written.pairs)
    if missing:
        first = min(missing)
        raise AdapterFileError(
            f"{where}: {len(missing)} modules are not the same as in the source, the first is "
            f"`{first.component}.{first.path}`; this is a fault of sdlora, please report it"
        )
    largest = relative = 0.0
    for module, pair in wanted.items():
        other = written.pairs[module]
        if other.down.shape != pair.down.shape or other.up.shape != pair.up.shape:
            raise AdapterFileError(
                f"{where}: module `{module.component}.{module.path}` has the shape {tuple(other.down.shape)} "
                f"instead of {tuple(pair.down.shape)}; this is a fault of sdlora, please report it"
            )
        difference = (other.delta() - pair.delta()).abs().flatten(1)
        allowed, magnitude = rounding_bound(other, dtype)
        if bool((difference > allowed).any()) or not bool(torch.isfinite(difference).all()):
            raise AdapterFileError(
                f"{where}: the update of `{module.component}.{module.path}` differs by "
                f"{float(difference.max()):.3g} from the source, rounding allows {float(allowed.max()):.3g}; "
                "nothing was kept. This is a fault of sdlora, please report it"
            )
        largest = max(largest, float(difference.max()))
        relative = max(relative, float(difference.max()) / max(float(magnitude.max()), 1e-38))
    return largest, relative


def relative_rounding(dtype: torch.dtype, rank: int) -> float:
    """Return the relative difference of an update that rounding both factors to ``dtype`` can cause.

    ``(1 + u)**2 - 1`` with unit roundoff u = eps / 2 (Higham 2002, section 2.2), plus what computing the two
    updates in float32 to compare them costs: (rank + 3) * eps32 for both together (section 3.1).
    """
    unit = torch.finfo(dtype).eps / 2
    return 2 * unit + unit**2 + (rank + 3) * torch.finfo(torch.float32).eps


def rounding_bound(pair: LowRankPair, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return (allowed difference, |scale| |up| |down|) of each element, both (out, in) float32.

    Every stored factor x stands for a number within ``u |x| + tiny / 2`` of it, where tiny is the smallest
    subnormal number; expanding the product of the two factors gives the bound.
    """
    numbers = torch.finfo(dtype)
    unit, half_step = numbers.eps / 2, numbers.smallest_normal * numbers.eps / 2
    up = pair.up.flatten(1).float().abs() * abs(pair.scale)
    down = pair.down.flatten(1).float().abs()
    magnitude = up @ down
    of_up = half_step * max(
        1.0, abs(pair.scale)
    )  # the scale is in `up` in some formats, outside it in others
    steps = (1 + unit) * (of_up * down.sum(0)[None, :] + half_step * up.sum(1)[:, None])
    least = of_up * half_step * pair.rank + torch.finfo(torch.float32).smallest_normal
    return relative_rounding(dtype, pair.rank) * magnitude + steps + least, magnitude


def read_through_diffusers(path: Path, info: FamilyInfo) -> AdapterWeights:
    """Return a WebUI or diffusers file as diffusers' own loader understands it.

    Runs the conversions of ``load_lora_weights`` without a model; alphas are taken as it takes them: one a
    component, or the rank where there are none.

    Raises:
        AdapterFileError: when diffusers refuses the file.
    """
    from diffusers.loaders import StableDiffusionLoraLoaderMixin, StableDiffusionXLLoraLoaderMixin
    from diffusers.utils.state_dict_utils import (
        convert_state_dict_to_diffusers,
        convert_state_dict_to_peft,
        convert_unet_state_dict_to_peft,
    )

    is_xl = info.unet_naming == "ldm"
    loader = StableDiffusionXLLoraLoaderMixin if is_xl else StableDiffusionLoraLoaderMixin
    options: dict[str, Any] = {"unet_config": SimpleNamespace(layers_per_block=2)} if is_xl else {}
    try:
        state, alphas = loader.lora_state_dict(str(path), local_files_only=True, **options)
        pairs: dict[ModuleKey, LowRankPair] = {}
        for component in sorted({key.split(".", 1)[0] for key in state}):
            start = component + "."
            part = {key.removeprefix(start): value for key, value in state.items() if key.startswith(start)}
            if component == "unet" and "lora_A" not in next(iter(part)):
                part = convert_unet_state_dict_to_peft(part)
            elif component != "unet":
                part = convert_state_dict_to_peft(convert_state_dict_to_diffusers(part))
            values = {value for key, value in (alphas or {}).items() if key.startswith(start)}
            pairs |= _pairs_of(component, part, values)
    except (ValueError, KeyError, RuntimeError) as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise AdapterFileError(f"{path}: diffusers refuses it ({first_line}); please report this") from error
    return AdapterWeights(pairs)


def _pairs_of(component: str, part: Mapping[str, Tensor], alphas: set[float]) -> dict[ModuleKey, LowRankPair]:
    pairs = {}
    for key, down in part.items():
        path, marker, _ = key.rpartition(".lora_A.")
        if not marker:
            continue
        alpha = next(iter(alphas)) if alphas else float(down.shape[0])
        canonical = path if component == "unet" else names.with_text_prefix(path)
        pairs[ModuleKey(component, canonical)] = LowRankPair(down, part[f"{path}.lora_B.weight"], alpha)
    return pairs
