"""DoRA (Liu et al. 2024): a learned norm for every row or column of the whole weight, over another update.

All clients agree on the scale of the update (formats.md 3.3), but not on the axis of the norms.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from ...config.adapter import AdapterConfig
from ...errors import AdapterFileError
from ..canonical import LowRankPair, Update, WrappedUpdate, check_factors
from ..initial import low_rank
from . import lora
from .kind import ADAPTER_NAME, EVERY_CLIENT, AdapterKind, FilePart, TrainedForm, check_floats, does_not_fit

if TYPE_CHECKING:
    from peft import LoraConfig

SCALE = FilePart("dora_scale", "dora_scale", r"\.dora_scale$", always_wide=True)
"""One value an output row or an input column; its shape tells which."""
MAGNITUDE = FilePart(
    "magnitude",
    "dora_scale",
    rf"\.lora_magnitude_vector{ADAPTER_NAME}(?:\.weight)?$",
    "lora_magnitude_vector",
)
"""PEFT's, always one value an output row."""


@dataclass(frozen=True)
class DoRA(WrappedUpdate):
    """``W' = magnitude * (W + V) / norm(W + V)``, V being another update and W the base's weight.

    Attributes:
        direction: the update V, usually a low-rank pair.
        magnitude: (out, 1[, 1, 1]) where the norm is that of an output row (LyCORIS' default, PEFT), or
            (1, in[, 1, 1]) where it is that of an input column (WebUI).
    """

    kind: ClassVar[str] = "dora"
    needs_base: ClassVar[bool] = True

    direction: Update
    magnitude: Tensor

    def __post_init__(self) -> None:
        if len(self.direction.shape) < 2:
            raise ValueError(f"factors do not fit: a DoRA of a vector of {tuple(self.direction.shape)}")
        out, width = self.direction.shape[:2]
        shape = tuple(self.magnitude.shape)
        fits = not isinstance(self.direction, DoRA) and len(shape) in (2, 4)
        fits = fits and (shape[:2] in ((out, 1), (1, width))) and set(shape[2:]) <= {1}
        check_factors(fits, self.tensors(), self.alpha)

    @property
    def by_output(self) -> bool:
        """Whether the magnitude is that of output rows (else of input columns)."""
        return tuple(self.magnitude.shape[:2]) == (self.direction.shape[0], 1)

    def merged(self, weight: Tensor) -> Tensor:
        """Return W' in float32 (float64 stays), in the shape of ``weight``."""
        dtype = torch.promote_types(torch.promote_types(torch.float32, self.magnitude.dtype), weight.dtype)
        # W' = m * (W + V) / norm(W + V); m and the norm are (out, 1, ...) by rows, (1, in, ...) by columns
        total = weight.to(dtype) + self.direction.delta(weight).to(dtype)
        shape = [1] * total.ndim
        shape[0 if self.by_output else 1] = -1
        return total * (self.magnitude.to(dtype).reshape(shape) / self.norm_of(total).reshape(shape))

    def norm_of(self, weight: Tensor) -> Tensor:
        """Return the norm of each output row or input column of a weight, as a vector; never 0."""
        other = [axis for axis in range(weight.ndim) if axis != (0 if self.by_output else 1)]
        return torch.linalg.vector_norm(weight, dim=other).clamp_min(torch.finfo(weight.dtype).tiny)

    def delta(self, weight: Tensor | None = None) -> Tensor:
        """Return W' - W; at a strength s the WebUIs use W + s (W' - W).

        Raises:
            ValueError: without the base's weight.
        """
        if weight is None:
            raise ValueError("the update of a DoRA depends on the base's weight")
        merged = self.merged(weight)
        return merged - weight.to(merged.dtype)

    def tensors(self) -> dict[str, Tensor]:
        """Return the direction's factors and ``dora_scale``."""
        return {**self.direction.tensors(), "dora_scale": self.magnitude}

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> DoRA:
        """Return it with other factors and magnitudes."""
        return DoRA(self.direction.with_tensors(tensors), tensors["dora_scale"])

    def around(self, direction: Update) -> DoRA:
        """Return it with the same magnitudes and another direction."""
        return DoRA(direction, self.magnitude)

    def in_shape(self, shape: tuple[int, ...]) -> DoRA:
        """Return it with its direction in another shape, and the magnitudes in as many dimensions."""
        direction = self.direction.in_shape(shape)
        sides = (-1, 1) if self.by_output else (1, -1)
        return DoRA(direction, self.magnitude.reshape(*sides, *[1] * (len(shape) - 2)))

    def to(self, dtype: torch.dtype) -> DoRA:
        """Return it with the direction in another number format.

        The magnitude stays fp32 or wider: rounding it would be a change of the whole weight, in bf16 by up
        to 0.4 percent, which can be more than was learned.
        """
        return DoRA(self.direction.to(dtype), self.magnitude.to(torch.promote_types(torch.float32, dtype)))


def wrap(where: str, direction: Update, parts: Mapping[str, Tensor]) -> DoRA:
    """Return the update of one module of a file; see :class:`AdapterKind`."""
    magnitude = parts[SCALE.name] if SCALE.name in parts else parts[MAGNITUDE.name]
    if MAGNITUDE.name in parts or magnitude.ndim == 1:
        magnitude = magnitude.reshape(-1, *[1] * (len(direction.shape) - 1))
    check_floats(where, [magnitude])
    try:
        return DoRA(direction, magnitude)
    except ValueError as error:
        raise does_not_fit(where, error) from None


def start(config: AdapterConfig, weight: Tensor, rank: int, alpha: float, generator: torch.Generator) -> DoRA:
    """Return low-rank factors that change nothing, and the norms of the base's rows."""
    pair = low_rank(config.init, weight, rank, alpha, generator)
    ones = [1] * (weight.ndim - 1)
    if weight.is_meta:  # a blueprint, on which only shapes count
        return DoRA(pair, torch.ones((weight.shape[0], *ones)))
    length = torch.linalg.vector_norm(weight.detach().float().flatten(1), dim=1)
    return DoRA(pair, length.cpu().reshape(-1, *ones))


def peft_config(name: str, updates: Mapping[str, DoRA], dropout: float) -> LoraConfig:
    """Return PEFT's settings.

    Raises:
        AdapterFileError: for a DoRA that PEFT does not know.
    """
    pairs = {
        p: update.direction for p, update in updates.items() if isinstance(update.direction, LowRankPair)
    }
    if len(pairs) != len(updates) or not all(update.by_output for update in updates.values()):
        raise AdapterFileError(
            f"{name}: this DoRA cannot be trained on: PEFT knows only that of low-rank factors "
            "with one magnitude an output row; convert it to a plain LoRA"
        )
    config = lora.peft_config(name, pairs, dropout)
    config.use_dora = True
    return config


def take_over(layer: Any, inner: str, update: DoRA) -> dict[str, nn.Parameter]:
    """Give PEFT's layer the factors and magnitudes; these in fp32, and with norms in fp32.

    Half a rounding step of bf16 would already be a change of the whole weight.
    """
    from peft.tuners.lora.dora import DoraConv2dLayer

    from .exact_dora import ExactDoraConv2d, ExactDoraLinear

    assert isinstance(update.direction, LowRankPair)
    parameters = lora.take_over(layer, inner, update.direction)
    peft_layer = layer.lora_magnitude_vector[inner]
    exact = ExactDoraConv2d() if isinstance(peft_layer, DoraConv2dLayer) else ExactDoraLinear()
    down = parameters["lora_down.weight"]
    magnitude = update.magnitude.to(down.device, torch.float32).reshape(peft_layer.weight.shape)
    exact.weight = nn.Parameter(magnitude.contiguous(), requires_grad=False)
    layer.lora_magnitude_vector[inner] = exact
    return {**parameters, "dora_scale": exact.weight}


def quirks(client: str, format: str, updates: Sequence[DoRA]) -> list[str]:
    """Return how a client deviates with such a file, in WebUI keys or diffusers keys (formats.md 3.3)."""
    if format == "diffusers":
        if client == "diffusers":
            return []
        return ["does not know `lora_magnitude_vector` and loads DoRA as a plain LoRA"]
    axes = sorted({update.by_output for update in updates}, reverse=True)
    return [reason for by_output in axes for reason in _in_webui_keys(client, by_output)]


def _in_webui_keys(client: str, by_output: bool) -> list[str]:
    if client in ("diffusers", "kohya sd-scripts", "stable-diffusion.cpp"):
        more = "; export as diffusers" if client == "diffusers" and by_output else ""
        return [f"drops `dora_scale` and loads DoRA as a plain LoRA{more}"]
    if not by_output:
        return []
    if client == "WebUI":
        return [
            "computes this DoRA wrongly: it takes norms of input columns, the file has those of output rows"
        ]
    return ["computes this DoRA differently: it divides by the norm of the base's weight alone"]


DORA = AdapterKind(
    title="DoRA",
    parts=(SCALE, MAGNITUDE),
    wrap=wrap,
    start=start,
    trained=TrainedForm(
        peft_config,
        take_over,
        undecayed=frozenset({"dora_scale"}),  # a row's norm has no reason to tend to 0
        up=frozenset({"lora_up.weight"}),
    ),
    peft_type="LORA",
    clients=EVERY_CLIENT,
    quirks=quirks,
    network_args={"dora_wd": "True"},
)
