"""What a kind of adapter is: one record that says how it starts, learns and is stored, and who reads it.

A new kind is a file with its :class:`~sdlora.adapters.canonical.Update` and its :class:`AdapterKind`, a line
in :data:`sdlora.adapters.kinds.table.KINDS`, and one in :data:`sdlora.config.kinds.KIND_RULES` if it can be
trained; see docs/architecture.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from ...config.adapter import AdapterConfig
from ...errors import AdapterFileError
from ...tensor_file import FLOAT_DTYPES
from ..canonical import Update

U = TypeVar("U", bound=Update)
Kernel = tuple[int, int]
"""Height and width of a convolution's kernel."""

EVERY_CLIENT = ("WebUI", "Forge", "ComfyUI", "kohya sd-scripts", "diffusers", "stable-diffusion.cpp")
ADAPTER_NAME = r"(?:\.(?!(?:weight|bias)$)[^.]{1,80})?"
"""PEFT may write the adapter's name, which has no dot, behind that of a part."""
LYCORIS_CLIENTS = ("WebUI", "Forge", "ComfyUI", "stable-diffusion.cpp")
"""Those that compute what LyCORIS defined, from WebUI keys (formats.md 3.2)."""


@dataclass(frozen=True)
class FilePart:
    """One part of a module in files.

    Attributes:
        name: what readers call it.
        factor: its name in :meth:`Update.tensors`, which WebUI files have behind the module's name.
        spelling: regular expression of all that may follow the module's name, in any single-file format.
        peft: its name in PEFT's folders; None if PEFT has no such thing.
        always_wide: whether it is stored in fp32, whatever the file's number format.
        of_bias: whether it changes the layer's bias, not its weight.
        is_number: whether it is a single number.
        beside: ending of a key of the same module without which this one says nothing, if there is one.
    """

    name: str
    factor: str
    spelling: str
    peft: str | None = None
    always_wide: bool = False
    of_bias: bool = False
    is_number: bool = False
    beside: str = ""


def plain_part(name: str) -> FilePart:
    """Return a part that is called the same everywhere."""
    return FilePart(name, name, rf"\.{name}$", name)


@dataclass(frozen=True)
class TrainedForm(Generic[U]):
    """The layers that a kind learns in, which are PEFT's own.

    Attributes:
        config: (name, installed path -> update, dropout) -> PEFT's settings for one component.
        take_over: (PEFT's layer, PEFT's name of the adapter, update) -> what learns, by the factor's name;
            the layer has the update's values and scale then.
        undecayed: factors that weight decay does not pull to zero.
        up: factors whose rate LoRA+ multiplies.
    """

    config: Callable[[str, Mapping[str, U], float], Any]
    take_over: Callable[[Any, str, U], dict[str, nn.Parameter]]
    undecayed: frozenset[str] = frozenset()
    up: frozenset[str] = frozenset()


def no_more(where: str, updates: Mapping[str, Any]) -> dict[str, Any]:
    """Return no further settings."""
    return {}


@dataclass(frozen=True)
class PeftFolder(Generic[U]):
    """How a kind's settings in a PEFT folder follow from its updates.

    PEFT takes no shapes from a file: it makes factors from its settings and loads values into them.

    Attributes:
        rank: the rank for which PEFT makes factors of this update's shapes.
        alpha: PEFT's alpha at that rank.
        core: whether it has a Tucker core; None if PEFT makes none whatever is said.
        more: (file and component, for messages; canonical path -> update) -> further settings.
        rescaled: (update, PEFT's scale) -> the update as PEFT computes it, if it alone applies a scale.
    """

    rank: Callable[[U], int]
    alpha: Callable[[U], float]
    core: Callable[[U], bool | None]
    more: Callable[[str, Mapping[str, U]], dict[str, Any]] = no_more
    rescaled: Callable[[U, float], U] = lambda update, scale: update


def itself(update: Any) -> Any:
    """Return the update unchanged."""
    return update


def no_quirks(client: str, format: str, updates: Sequence[Any]) -> list[str]:
    """Return no deviation."""
    return []


@dataclass(frozen=True, eq=False)
class AdapterKind(Generic[U]):
    """One kind of adapter.

    Attributes:
        title: what users call it.
        parts: of a module in files. Kinds may share parts; a module is of the kind with most of its parts.
        build: (file and module, its parts, alpha or None for the rank, kernel of a convolution whose factors
            are flat) -> update; raises an AdapterFileError. None for a kind that wraps another.
        wrap: the same for a kind whose parts come on top of another's: (file and module, that update, parts).
        start: (settings, base's weight, rank, alpha as files hold it, generator) -> where training starts,
            float32 on the CPU; None if it cannot be started afresh.
        trained: the layers it learns in; None if it cannot be trained.
        warm: update of a file -> the update that a warm start from it trains.
        peft_type: the type of the PEFT folders that hold it; empty if none do.
        peft: the settings of these folders; None where they are those of plain pairs.
        clients: who computes it from WebUI keys.
        others_do: what the other clients do with such layers (diffusers refuses the file).
        quirks: (client, format, its updates) -> how that client deviates in computing them.
        algorithm: what LyCORIS calls it in headers.
        network_args: further entries of ``ss_network_args``.
        stores_alpha: whether files have an alpha for it.
        alpha_is_bound: whether that alpha bounds something instead of scaling the update: 0 is no bound, and
            so is none at all.
    """

    title: str
    parts: tuple[FilePart, ...]
    build: Callable[[str, Mapping[str, Tensor], float | None, Kernel | None], U] | None = None
    wrap: Callable[[str, Update, Mapping[str, Tensor]], U] | None = None
    start: Callable[[AdapterConfig, Tensor, int, float, torch.Generator], U] | None = None
    trained: TrainedForm[U] | None = None
    warm: Callable[[U], Update] = itself
    peft_type: str = ""
    peft: PeftFolder[U] | None = None
    clients: tuple[str, ...] = LYCORIS_CLIENTS
    others_do: str = "leaves them out silently"
    quirks: Callable[[str, str, Sequence[U]], list[str]] = no_quirks
    algorithm: str = ""
    network_args: Mapping[str, str] = field(default_factory=dict)
    stores_alpha: bool = True
    alpha_is_bound: bool = False


def require_parts(where: str, parts: Mapping[str, Tensor], names: Iterable[str]) -> None:
    """Refuse a module that lacks one of some parts.

    Raises:
        AdapterFileError: naming the first.
    """
    missing = [name for name in names if name not in parts]
    if missing:
        raise AdapterFileError(
            f"{where}: its `{missing[0]}` factor is missing; the file is incomplete, export it again"
        )


def check_floats(where: str, tensors: Iterable[Tensor]) -> None:
    """Refuse factors that are empty, or in a number format that cannot be computed with.

    Raises:
        AdapterFileError: naming the number format.
    """
    for tensor in tensors:
        if tensor.dtype not in FLOAT_DTYPES:
            raise AdapterFileError(f"{where}: has factors in {tensor.dtype}; save them as F16, BF16 or F32")
        if tensor.numel() == 0:
            raise AdapterFileError(f"{where}: has empty factors (rank 0); export the adapter again")


def does_not_fit(where: str, error: ValueError) -> AdapterFileError:
    """Return the error for factors whose shapes do not fit each other."""
    return AdapterFileError(f"{where}: {error}; the file is damaged, export it again")


def take_over_factors(layer: Any, inner: str, update: Update) -> dict[str, nn.Parameter]:
    """Put an update's factors and scale in place of those PEFT made for a layer of LyCORIS' kinds."""
    weight: Tensor = layer.get_base_layer().weight
    for name in layer.adapter_layer_names:
        if inner in getattr(layer, name):
            del getattr(layer, name)[inner]
    parameters: dict[str, nn.Parameter] = {}
    for name, factor in update.tensors().items():
        parameters[name] = nn.Parameter(factor.to(weight.device, weight.dtype), requires_grad=False)
        getattr(layer, name)[inner] = parameters[name]
    layer.scaling[inner] = layer.alpha[inner] = update.scale
    layer.r[inner] = 1
    # PEFT skips a layer whose random number in [0, 1) is not above this: 0 would skip one now and then
    layer.module_dropout[inner] = -1.0
    return parameters
